"""Sampling as the code of a region, so that it is compiled, stored and launched as the step's own regions are."""

from __future__ import annotations

from typing import Any

from llmopt.codegen.kernel import Buffer, Call, Kernel, RegionCode
from llmopt.compiler.target import Target

REGION = "sample"
BLOCK = 4096  # logits a program
INPUTS = ("logits", "temperature", "seeds", "sequences", "moves", "tables", "tokens", "positions", "slots")
_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def sampling_code(vocab_size: int, dtype: str, page_size: int, target: Target) -> RegionCode:
    """Code over `INPUTS` (`in0` to `in8`, of R rows; tables [R, M]): tokens, positions and slots are written in place.

    `dtype` is that of the logits, float32, float16 or bfloat16.
    """
    block = min(BLOCK, max(256, 1 << (vocab_size - 1).bit_length()))
    blocks = -(-vocab_size // block)
    pdl = "pdl" in target.features
    words = dict.fromkeys(INPUTS[2:], "*i64")
    types = {"logits": _TYPES[dtype], "temperature": "*fp32", **words, "best": "*fp32", "places": "*i32"}
    constants: dict[str, Any] = {
        "V": vocab_size, "BLOCK": block, "BLOCKS": blocks, "ROOM": 1 << (blocks - 1).bit_length(), "PAGE": page_size,
        "PDL": pdl,
    }  # fmt: skip
    kernel = Kernel(
        "sample:sample",
        (*types.items(), ("tickets", "*i32"), ("M", "i32")),
        tuple(constants.items()),
        num_warps=8 if block >= BLOCK else 4,
        pdl=pdl,
    )
    parts = Buffer((f"R*{blocks}",), "float32"), Buffer((f"R*{blocks}",), "int32"), Buffer(("R",), "int32", kept=True)
    args = (*(f"in{i}" for i in range(len(INPUTS))), "tmp0", "tmp1", "tmp2", "M")
    return RegionCode((Call(args, kernel, ("R", blocks)),), (), parts)
