"""transformers as the oracle: its greedy tokens, one prompt at a time and unpadded, and errors against fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def hf_tokens(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """What `model.generate` makes of each prompt, `count` tokens whatever they are."""
    made = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        made.append(out[0, len(prompt) :].tolist())
    return made


def relative_error(got: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Root mean square error of `got` against fp64 `exact`, in units of that of `eager`."""

    def error(x: Tensor) -> float:
        return float((x.double() - exact.double()).pow(2).mean().sqrt())

    return error(got) / error(eager)
