"""Triton's interpreter made to round as GPUs do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def rounding() -> Iterator[None]:
    """Inside, fp32 goes to bf16 by rounding to the nearest, ties to even; by itself the interpreter cuts off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        near = torch.from_numpy(np.array(src.data)).bfloat16()
        return TensorHandle(near.view(torch.int16).numpy().view(np.uint16), dst_type.scalar)

    InterpreterBuilder.cast_impl = rounded
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl = cast
