"""`llmopt export --to genai`: onnxruntime-genai writes the text that the compiled model writes."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime_genai as genai
import pytest
import torch
from onnx_runtime import greedy
from torch import nn

import llmopt
from llmopt.compiler.errors import InputError

PICO = Path(__file__).parents[2] / "examples" / "models" / "pico-llama-4m"


def written(folder: Path, text: str, count: int) -> str:
    """By onnxruntime-genai, text and new text."""
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    ids = tokenizer.encode(text)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("default", {}), ("default", {"attention": "standard"}), ("int4", {}), ("rotate+nvfp4", {"weights": "function"})],
)
def test_the_same_text(recipe: str, settings: dict[str, str], tmp_path: Path) -> None:
    compiled = llmopt.compile(str(PICO), recipe=recipe, dtype="float32")
    out = compiled.export(tmp_path / "out", "genai", **settings)
    for text in ("def main():", "Once upon a time"):
        assert written(out, text, 24) == text + compiled.generate(text, max_new_tokens=24)


def test_a_cache_in_int8(tmp_path: Path) -> None:
    """Its text is that of ONNX Runtime alone, which another test compares with the program."""
    compiled = llmopt.compile(str(PICO), dtype="float32")
    text, data = "def main():", "import os\n\n\ndef main():\n    return os.environ\n"
    ids = torch.tensor([compiled.tokenizer.encode(data)])
    out = compiled.export(tmp_path / "out", "genai", ids, kv_cache="int8")
    prompt = compiled.tokenizer.encode(text)
    (made,) = greedy(out, [prompt], 16, right=True)
    assert written(out, text, 16) == compiled.tokenizer.decode(prompt + made)


def test_the_config(tmp_path: Path) -> None:
    out = llmopt.compile(str(PICO), dtype="float32").export(tmp_path / "out", "genai")
    model = json.loads((out / "genai_config.json").read_text())["model"]
    config = json.loads((PICO / "config.json").read_text())
    assert model["decoder"]["num_hidden_layers"] == config["num_hidden_layers"]
    assert model["decoder"]["num_key_value_heads"] == config["num_key_value_heads"]
    assert model["decoder"]["head_size"] == config["head_dim"]
    assert model["context_length"] == config["max_position_embeddings"]
    assert model["eos_token_id"] == config["eos_token_id"]
    assert (out / "tokenizer.json").read_bytes() == (PICO / "tokenizer.json").read_bytes()


class Uneven(nn.Module):
    """Two layers, whose keys and values have these numbers of heads."""

    def __init__(self, heads: tuple[int, int] = (2, 4)) -> None:
        super().__init__()
        self.vocab_size, self.context_length = 64, 32
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.heads, self.products = heads, nn.ModuleList(nn.Linear(32, 32 + 2 * 8 * count) for count in heads)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for product, heads in zip(self.products, self.heads, strict=True):
            q, k, v = product(x).view(*input_ids.shape, -1, 8).transpose(1, 2).split([4, heads, heads], 1)
            x = x + torch.ops.llmopt.attention(q, k, v, None, 0.35, 0, 0.0).transpose(1, 2).flatten(2)
        return self.head(x)


def test_what_a_folder_cannot_say(tmp_path: Path) -> None:
    compiled = llmopt.compile(Uneven().eval(), target="cpu:generic")
    with pytest.raises(
        InputError, match=r"keys and values have 2 shapes .* export --to onnx, where each layer has its"
    ):
        compiled.export(tmp_path / "out", "genai")
    with pytest.raises(InputError, match="no tokenizer, which a GenAI folder holds; export --to onnx"):
        llmopt.compile(Uneven((2, 2)).eval(), target="cpu:generic").export(tmp_path / "out", "genai")
    assert not list(tmp_path.iterdir())
    compiled.export(tmp_path / "out", "onnx")
