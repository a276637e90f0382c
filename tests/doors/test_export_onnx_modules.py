"""Modules of one's own as ONNX: ops that no transformers model has, and what cannot be given a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_runtime import FORMS, IDS, checked, logits, off
from torch import nn

import llmopt
from llmopt.compiler.errors import InputError
from llmopt.compiler.recipe import Recipe
from llmopt.runtime.build import capture_any
from llmopt.runtime.export import export


class Own(nn.Module):
    """Numbers its tokens itself and uses an op that the exporter has no lowering of its own for."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.context_length = 64, 32
        self.table, self.places = nn.Embedding(64, 32), nn.Embedding(32, 32)
        self.mask = nn.Parameter(torch.ones(32))  # a name that the graph's inputs have, too
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids) * self.mask + self.places(torch.arange(input_ids.shape[1]))
        q, k, v = self.qkv(x).view(*input_ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(nn.functional.mish(x + self.out(made.transpose(1, 2).flatten(2))))


class Turned(Own):
    """Rotary embedding by tables of one row for all sequences, and operators on whole numbers and truth values."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        at = torch.arange(input_ids.shape[1])[None].float()[..., None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        table = torch.cat((at, at), -1)
        cos, sin = table.cos(), table.sin()
        few = (input_ids > 3) * (input_ids < 60)
        x = self.table(input_ids) * (few + (input_ids > 61))[..., None] + torch.sqrt(input_ids + 1)[..., None]
        x = x + torch.sigmoid(position_ids)[..., None] + torch.arange(0, 16, 0.5)
        q, k, v = self.qkv(x).view(*input_ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        q, k = (torch.ops.llmopt.rope(y, cos, sin) for y in (q, k))
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(made.transpose(1, 2).flatten(2)))


def test_tables_for_all_sequences_and_whole_numbers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Turned().eval()
    compiled = llmopt.compile(model, target="cpu:generic")
    places = torch.arange(11).expand(3, 11)
    with torch.no_grad():
        want = model(IDS % 64, places)
    for number, form in enumerate(FORMS):
        out = compiled.export(tmp_path / str(number), "onnx", **form)
        checked(out)
        assert off(logits(out, IDS % 64, (8, 1, 1, 1) if form.get("cache", True) else ()), want) < 2e-6


class Shifted(Own):
    """Each token also reads the one before it."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.roll(input_ids, 1, 1), position_ids)


def test_a_module_of_one_s_own(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Own().eval()
    compiled = llmopt.compile(model, target="cpu:generic")
    want = model(IDS % 64, IDS)
    for number, form in enumerate(FORMS):
        out = compiled.export(tmp_path / str(number), "onnx", **form)
        assert off(logits(out, IDS % 64, (8, 1, 1, 1) if form.get("cache", True) else ()), want) < 2e-6


def test_sinks(tmp_path: Path) -> None:
    """GPT-OSS' attention in a module of one's own: GroupQueryAttention has sinks, Attention has none."""
    torch.manual_seed(1)

    class Sinks(Own):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = nn.Parameter(torch.randn(4))

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            x = self.table(input_ids)
            q, k, v = self.qkv(x).view(*input_ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
            made = torch.ops.llmopt.attention(q, k, v, self.sinks, 0.35, 4, 0.0)
            return self.head(self.out(made.transpose(1, 2).flatten(2)))

    model = Sinks().eval()
    compiled = llmopt.compile(model, target="cpu:generic")
    with pytest.raises(InputError, match=r"has sinks, which ONNX's Attention does not; take --attention gqa"):
        compiled.export(tmp_path / "out", "onnx")
    out = compiled.export(tmp_path / "out", "onnx", attention="gqa")
    assert off(logits(out, IDS % 64, (8, 1, 1, 1)), model(IDS % 64, IDS)) < 2e-6


def test_a_model_that_mixes_tokens_has_no_cache(tmp_path: Path) -> None:
    program = capture_any(Shifted().eval())
    with pytest.raises(InputError, match=r"(?s)cannot be given a KV cache; export it with --no-cache"):
        export(program, Recipe.parse("default"), "onnx", tmp_path / "out", {})
