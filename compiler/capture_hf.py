"""Capture of transformers models: a folder or hub id (structure on the meta device, weights lazy), or a live model.

The model's attention is swapped, for the duration of the export, for one call of `llmopt.attention` through
transformers' AttentionInterface and AttentionMaskInterface. The mask function each layer was given is evaluated on
indices, so the window comes from what the mask really does, and a mask that is not causal is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmopt.compiler import ops
from llmopt.compiler._torch import concrete_values
from llmopt.compiler.capture import capture
from llmopt.compiler.checkpoint import (
    QUANTIZED,
    checkpoint_dtype,
    checkpoint_files,
    eos_of,
    generation_eos,
    read_config,
    stored_weight,
    taken_quantization,
)
from llmopt.compiler.errors import CaptureError, InputError
from llmopt.compiler.program import ModelFacts, Program, Weight, tensor_weight

INTERFACE = "llmopt"


@dataclass(frozen=True)
class CausalMask:
    """What stands in for a mask tensor during capture: causal, cut by `window` if it is not 0."""

    window: int


def _mask(*args: Any, mask_function: Any, config: Any = None, **kwargs: Any) -> CausalMask:
    """transformers' mask factory: find out what `mask_function(batch, head, q, kv)` allows."""
    length = int(getattr(config, "max_position_embeddings", 0) or 4096)
    with concrete_values():
        keys = torch.arange(length)
        zero = torch.zeros((), dtype=torch.int64)
        rows = {q: mask_function(zero, zero, torch.tensor(q), keys) for q in {0, 1, length // 2, length - 1}}
        last = rows[length - 1].expand(length)
        first = int(last.int().argmax())
        window = length - first if first > 0 else 0
        for q, row in rows.items():
            low = max(0, q - window + 1) if window else 0
            if not torch.equal(row.expand(length), (keys <= q) & (keys >= low)):
                raise CaptureError(
                    f"attention mask of {type(config).__name__}: the row of query {q} is neither causal nor a causal "
                    "sliding window; wanted one of the two; llmopt compiles causal language models only"
                )
    return CausalMask(window)


_IGNORED = {
    "dropout", "position_ids", "cache_position", "output_attentions", "use_cache", "past_key_values",
    "is_causal", "sliding_window", "softcap", "s_aux", "scaling", "num_items_in_batch", "position_embeddings",
}  # fmt: skip


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: q [B, Hq, T, D], k/v [B, Hkv, T, D] -> ([B, T, Hq, D], None)."""
    unknown = {k for k, v in kwargs.items() if k not in _IGNORED and v is not None and v is not False}
    if unknown or not (kwargs.get("is_causal") or getattr(module, "is_causal", True)):
        raise CaptureError(
            f"{type(module).__name__} calls its attention with {sorted(unknown) or 'is_causal=False'}, which "
            "llmopt.attention does not model; wanted causal attention with scale, window, softcap and sinks only"
        )
    window = kwargs.get("sliding_window") or 0
    if isinstance(attention_mask, CausalMask):
        window = attention_mask.window
    scale = kwargs.get("scaling")
    out = ops.attention(
        query,
        key,
        value,
        kwargs.get("s_aux"),
        float(scale if scale is not None else query.shape[-1] ** -0.5),
        int(window),
        float(kwargs.get("softcap") or 0.0),
    )
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, _mask)


@contextlib.contextmanager
def _swapped(model: PreTrainedModel) -> Iterator[None]:
    """The model calls llmopt's attention, and packed sequences are not looked for, until the block ends.

    A model that does not go through AttentionInterface keeps its own attention, which `raise_aten` then reads.
    """
    configs = [m.config for m in model.modules() if hasattr(m, "config") and type(model)._supports_attention_backend]
    before = {id(c): (c, c._attn_implementation) for c in configs}
    find_packed = masking_utils.find_packed_sequence_indices
    try:
        for config, _ in before.values():
            config._attn_implementation = INTERFACE
        masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find_packed
        for config, name in before.values():
            config._attn_implementation = name


class _Forward(nn.Module):
    """(input_ids, position_ids) -> logits, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def facts_of(config: PretrainedConfig, dtype: torch.dtype, tokenizer: str | None = None) -> ModelFacts:
    """Context length, vocabulary and stop tokens from a transformers config."""
    text = config.get_text_config(decoder=True)
    eos = text.eos_token_id if text.eos_token_id is not None else config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
    name = type(config).__name__.removesuffix("Config")
    return ModelFacts(name, text.vocab_size, int(context), eos_ids, dtype, tokenizer, config.to_json_string())


def capture_model(model: PreTrainedModel) -> Program:
    """A Program of a live transformers causal LM; its weights are the model's own tensors."""
    if not model.can_generate():
        raise CaptureError(
            f"{type(model).__name__} is not a causal language model (it cannot generate); wanted an "
            "AutoModelForCausalLM class; load the checkpoint with AutoModelForCausalLM"
        )
    facts = facts_of(model.config, model.dtype, model.config.name_or_path or None)
    facts = replace(facts, eos_token_ids=eos_of(model.generation_config))
    with _swapped(model):
        return _strip(capture(_Forward(model), facts))


def _strip(program: Program) -> Program:
    """Weight names as the model has them, without the wrapper's `model.`."""
    graph = program.graph("forward")
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix("model.")
    program.weights = {k.removeprefix("model."): w for k, w in program.weights.items()}
    return program


def capture_hf(source: str, dtype: torch.dtype | None = None) -> Program:
    """A Program of a transformers checkpoint folder or hub id; weights are read from safetensors when asked for.

    `dtype` None keeps the checkpoint's. Raises InputError (no such folder, not a causal LM, weights missing or
    quantised) or CaptureError.
    """
    config = read_config(source)
    quantization = taken_quantization(config)
    wanted = dtype or checkpoint_dtype(config)
    facts = facts_of(config, wanted, source)
    eos = generation_eos(source)
    facts = facts if eos is None else replace(facts, eos_token_ids=eos)
    model = _empty_model(config, source, wanted)
    if quantization is not None:
        return _coded(source, model, quantization, facts)
    files = checkpoint_files(Path(source)) if Path(source).is_dir() else {}
    # names differ from the checkpoint's, or it lies in the hub's cache: transformers' own conversion
    if model is None or any(name not in files for name, _ in model.named_parameters()):
        return _loaded(source, wanted, facts)

    program = _read(model, facts, files, {})
    if any(w.note == "meta" for w in program.weights.values()):  # a constant made outside of the model's buffers
        return _loaded(source, wanted, facts)
    return program


def _read(
    model: PreTrainedModel, facts: ModelFacts, files: Mapping[str, Path], decoded: Mapping[str, Weight]
) -> Program:
    """The Program of an empty model, whose weights are `decoded` ones or lie in files."""
    computed = _buffers_to_meta(model)

    def weight(name: str, tensor: Tensor) -> Weight:
        key = name.removeprefix("model.")
        if key in decoded:
            return decoded[key]
        if key in files:
            return stored_weight(files[key], key, tensor)
        return _computed_weight(computed.get(key, tensor))

    with _swapped(model):
        return _strip(capture(_Forward(model), facts, weight))


def _coded(source: str, model: PreTrainedModel | None, config: Mapping[str, Any], facts: ModelFacts) -> Program:
    """The Program of a checkpoint that holds weights in codes. Raises InputError as its format's reader."""
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=_CHECKPOINT))
    files = checkpoint_files(folder)
    read = QUANTIZED[config["quant_method"]]
    try:
        coded = {} if model is None else read(model, config, files, facts.dtype)
    except InputError as error:
        raise InputError(f"model {source!r}: {error}") from error
    lacking = [] if model is None else [n for n, _ in model.named_parameters() if n not in files and n not in coded]
    if model is None or lacking:
        raise InputError(
            f"model {source!r}: {lacking[0] if lacking else 'a computed buffer'} is not among its tensors under the "
            "name that transformers' model has for it, and codes are read by name; use the checkpoint it was made from"
        )
    program = _read(model, facts, files, {name: weight for name, (weight, _) in coded.items()})
    program.coded = {name: found for name, (_, found) in coded.items()}
    return program


_CHECKPOINT = ["*.safetensors", "*.json"]


def _loaded(source: str, dtype: torch.dtype, facts: ModelFacts) -> Program:
    """The Program of the checkpoint as transformers loads it, whole; a tensor it would make up is an error."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"model {source!r}: transformers cannot load its weights ({str(error).splitlines()[0]}); wanted a "
            "checkpoint that AutoModelForCausalLM loads; download it again"
        ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise InputError(
            f"model {source!r}: the checkpoint lacks {names[0]} ({len(names)} tensors in all); wanted every weight of "
            f"{type(model).__name__}; download the checkpoint again, or save it with save_pretrained"
        )
    program = capture_model(model)
    program.facts = facts
    return program


def capture_config(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Program:
    """A Program of the structure alone: no weight exists, reading one is an error (compile-time studies)."""
    model = _empty_model(config, type(config).__name__, dtype)
    if model is None:
        raise CaptureError(
            f"{type(config).__name__}: transformers cannot compute the model's buffers from the config alone; wanted a "
            "model made of parameters and computed buffers; load a checkpoint"
        )

    computed = _buffers_to_meta(model)

    def weight(name: str, tensor: Tensor) -> Weight:
        return _computed_weight(computed.get(name.removeprefix("model."), tensor))

    with _swapped(model):
        return _strip(capture(_Forward(model), facts_of(config, dtype), weight))


def _empty_model(config: PretrainedConfig, source: str, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model on the meta device, its computed buffers (rotary frequencies, embedding scales) real.

    None if transformers does not say how to compute one of them.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    except ValueError as error:
        raise InputError(
            f"model {source!r}: {config.model_type!r} is not a causal language model for transformers "
            f"(architectures {config.architectures}); wanted a checkpoint that AutoModelForCausalLM loads"
        ) from error
    for module in model.modules():
        computed = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        for name in computed:
            module._buffers[name] = _unset(module._buffers[name])
        if computed:
            model._init_weights(module)
        if any(_is_unset(module._buffers[n]) for n in computed):
            return None
    model.tie_weights()
    return model.eval()


def _buffers_to_meta(model: PreTrainedModel) -> dict[str, Tensor]:
    """Take the real buffers out, so that one device is left to trace on; their values by name."""
    values = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = value.to("meta")
    return values


def _computed_weight(tensor: Tensor) -> Weight:
    return tensor_weight(tensor, "meta" if tensor.is_meta else "computed from the config")


def _unset(like: Tensor) -> Tensor:
    """A real tensor of values nothing computes."""
    if like.dtype == torch.bool:
        return torch.zeros(like.shape, dtype=torch.bool)
    value = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).min
    return torch.full(like.shape, value, dtype=like.dtype)


def _is_unset(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return not bool(tensor.any())
    marked = tensor.isnan() if tensor.is_floating_point() else tensor == torch.iinfo(tensor.dtype).min
    return bool(marked.any())
