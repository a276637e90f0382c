"""The IR ops. Importing this package declares all of them."""

from llmopt.compiler.ops.activation import gated, softcap
from llmopt.compiler.ops.attention import attend, attention, kv_write
from llmopt.compiler.ops.linear import linear
from llmopt.compiler.ops.near import attend_near, near_write
from llmopt.compiler.ops.norm import rms_norm
from llmopt.compiler.ops.quantized import quantized_linear, rounded_linear
from llmopt.compiler.ops.rope import rope
from llmopt.compiler.ops.rotate import rotate

__all__ = [
    "attend",
    "attend_near",
    "attention",
    "gated",
    "kv_write",
    "linear",
    "near_write",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rotate",
    "rounded_linear",
    "softcap",
]
