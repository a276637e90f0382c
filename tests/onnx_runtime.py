"""ONNX Runtime over exported files: logits in one call or through the cache, and greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

FORMS: list[dict[str, Any]] = [{"cache": False}, {}, {"attention": "gqa"}]
IDS = torch.randint(1, 96, (3, 11), generator=torch.Generator().manual_seed(1))
DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip


def session(folder: Path) -> ort.InferenceSession:
    """On the CPU, alike in every run; DequantizeLinear before a product multiplies in float32, not in int8."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


class Cached:
    """Steps of a model with a cache."""

    def __init__(self, folder: Path) -> None:
        self.session = session(folder)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.past: dict[str, np.ndarray] = {}

    def step(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, T, V] of the next tokens [B, T]."""
        for name, value in self.inputs.items():
            if "past" in name and name not in self.past:
                dtype = DTYPES[value.type]
                self.past[name] = np.zeros((ids.shape[0], value.shape[1], 0, value.shape[3]), dtype)
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        feed = {name: value.contiguous().numpy() for name, value in given.items() if name in self.inputs}
        made = dict(zip(self.outputs, self.session.run(None, feed | self.past), strict=True))
        self.past = {name: made[name.replace("past_key_values", "present")] for name in self.past}
        return torch.from_numpy(made["logits"])


def logits(folder: Path, ids: Tensor, steps: tuple[int, ...] = ()) -> Tensor:
    """[B, T, V] of sequences of one length: in one call without a cache, else `steps` tokens at a time."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    if not steps:
        feed = {"input_ids": ids.numpy(), "position_ids": positions.contiguous().numpy()}
        opened = session(folder)
        wanted = {value.name for value in opened.get_inputs()}
        return torch.from_numpy(opened.run(None, {name: value for name, value in feed.items() if name in wanted})[0])
    model, made, first = Cached(folder), [], 0
    for count in steps:
        part = slice(first, first + count)
        first += count
        made.append(model.step(ids[:, part], positions[:, part], torch.ones(ids.shape[0], first, dtype=torch.int64)))
    return torch.cat(made, 1)


def greedy(folder: Path, prompts: list[list[int]], count: int, right: bool) -> list[list[int]]:
    """New tokens of prompts in one batch, padded on the left, or on the `right` as GroupQueryAttention wants."""
    model, longest = Cached(folder), max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        at = slice(0, len(prompt)) if right else slice(longest - len(prompt), longest)
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    made: list[Tensor] = []
    for _ in range(count):
        found = model.step(ids, positions, mask)
        last = lengths - 1 if right and not made else torch.full_like(lengths, ids.shape[1] - 1)
        made.append(found[torch.arange(len(prompts)), last].argmax(-1))
        ids, positions = made[-1][:, None], (lengths + len(made) - 1)[:, None]
        if right:  # what counts is how many ones there are
            total = mask.shape[1] + 1
            mask = (torch.arange(total) < (lengths + len(made))[:, None]).to(torch.int64)
        else:
            mask = torch.cat((mask, torch.ones_like(ids)), 1)
    return torch.stack(made, 1).tolist()


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def checked(folder: Path) -> onnx.ModelProto:
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)
