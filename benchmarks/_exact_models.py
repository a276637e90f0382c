"""What exactness is checked on: checkpoint folders, random models of further families, prompts, and oracles.

The oracles are transformers' own: greedy tokens of `generate` on the CPU in fp32, one prompt at a time without padding,
and logits of the whole forward in fp64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "models" / "pico-llama-4m"
TEXTS = ("llmopt/model.py", "runtime/engine.py", "compiler/rewrite.py", "passes/partition.py", "compiler/recipe.py")
LENGTHS = (1, 300, 17, 64, 133)  # of the prompts in a batch

_COMMON: dict[str, Any] = {"max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None}
# widths and vocabularies that are no powers of two; soft-caps low enough to bend, a window shorter than the longest
# prompts; one key head and biases
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "gemma2": ("gemma2", {
        "vocab_size": 5003, "hidden_size": 384, "intermediate_size": 1000, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64, "query_pre_attn_scalar": 64,
        "sliding_window": 48, "attn_logit_softcapping": 6.0, "final_logit_softcapping": 4.0,
        "tie_word_embeddings": False, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    "qwen2": ("qwen2", {
        "vocab_size": 3001, "hidden_size": 480, "intermediate_size": 1320, "num_hidden_layers": 2,
        "num_attention_heads": 5, "num_key_value_heads": 1, "tie_word_embeddings": False,
    }),
    "gpt-oss": ("gpt_oss", {  # its experts replaced by one dense layer
        "vocab_size": 2999, "hidden_size": 320, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 48,
        "num_local_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    "tiny": ("gemma2", {
        "vocab_size": 131, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
        "sliding_window": 8, "attn_logit_softcapping": 6.0, "final_logit_softcapping": 4.0,
        "tie_word_embeddings": False, "layer_types": ["sliding_attention", "full_attention"],
    }),
}  # fmt: skip
SPREAD = 1.6  # of what a random matrix makes of a vector of ones: tokens then depend on all that came before
WORDS = 0.3  # of the embeddings: tied to the head, large ones repeat the input


class Subject(NamedTuple):
    """A model in fp32 on the CPU, and real token ids [n] for it (None: random ones serve)."""

    name: str
    model: PreTrainedModel
    text: list[list[int]] | None

    def ids(self, length: int, row: int) -> list[int]:
        """`length` tokens, others for each row."""
        if self.text is not None:
            ids = self.text[row % len(self.text)]
            return (ids * (1 + length // len(ids)))[:length]
        generator = torch.Generator().manual_seed(1000 + row)
        return torch.randint(self.model.config.vocab_size, (length,), generator=generator).tolist()


class Dense(nn.Module):
    """In the place of a mixture of experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, T, width] -> ([B, T, width], scores of a router that nobody reads)"""
        return self.down(nn.functional.relu(self.up(x))), None


def subject(name: str) -> Subject:
    """A checkpoint folder, or a random model by name."""
    name = str(CHECKPOINT) if name == "pico" else name
    if name in RANDOM:
        return Subject(name, random_model(*RANDOM[name]), None)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = [tokenizer.encode((ROOT / path).read_text(encoding="utf-8")) for path in TEXTS]
    return Subject(Path(name).name, model.requires_grad_(False), texts)


@torch.no_grad()
def random_model(kind: str, options: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model of transformers with random matrices, norms and biases."""
    config = CONFIG_MAPPING[kind](**_COMMON, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    if kind == "gpt_oss":
        for layer in model.model.layers:
            layer.mlp = Dense(config.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            shift = 1.0 if name.endswith("norm.weight") and not kind.startswith("gemma") else 0.0
            parameter.normal_(shift, 0.2, generator=generator)
        else:
            parameter.normal_(0.0, SPREAD / parameter.shape[-1] ** 0.5, generator=generator)
    model.get_input_embeddings().weight.mul_(WORDS * model.config.hidden_size**0.5 / SPREAD)
    return model


@torch.no_grad()
def oracle_tokens(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy tokens of transformers, `count` for each prompt."""
    made = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        made.append(out[0, len(prompt) :].tolist())
    return made


class _Double(TorchFunctionMode):
    """fp64 wherever a model asks for fp32: norms, softmax and angles are written with casts to it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in fp64, and whatever the model keeps beside them."""
    return copy.deepcopy(model).double()


@torch.no_grad()
def exact_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """fp64 [T, V] of the whole forward of a `widened` model, every step of it in fp64."""
    with _Double():
        return logits(model, ids)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[T, V] of the whole forward, where the model is."""
    rows = torch.tensor([list(ids)], device=model.device)
    return model(rows, use_cache=False).logits[0]  # type: ignore[no-any-return]


@torch.no_grad()
def cached_logits(model: PreTrainedModel, ids: Sequence[int], prompt: int) -> tuple[Tensor, Tensor]:
    """Logits of a prompt [prompt, V], and of the tokens behind it read one at a time with a cache [T - prompt, V]."""
    rows = torch.tensor([list(ids)], device=model.device)
    out = model(rows[:, :prompt], use_cache=True)
    first, steps = out.logits[0], []
    for at in range(prompt, len(ids)):
        out = model(rows[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[0, 0])
    return first, torch.stack(steps)
