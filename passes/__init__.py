"""All passes by name; a recipe names passes from this table, and its order is checked against what they require."""

from llmopt.compiler.pipeline import Pass
from llmopt.passes.canonicalize import Canonicalize
from llmopt.passes.fuse import Fuse
from llmopt.passes.insert_kv_cache import InsertKVCache
from llmopt.passes.keep_codes import KeepCodes
from llmopt.passes.lower import Lower
from llmopt.passes.quantize import Quantize
from llmopt.passes.quantize_kv import QuantizeKV
from llmopt.passes.raise_aten import RaiseAten
from llmopt.passes.rotate_hadamard import RotateHadamard

PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (RaiseAten, Canonicalize, RotateHadamard, InsertKVCache, KeepCodes, Quantize, QuantizeKV, Fuse, Lower)
}

__all__ = [
    "PASSES", "Canonicalize", "Fuse", "InsertKVCache", "KeepCodes", "Lower", "Quantize", "QuantizeKV", "RaiseAten",
    "RotateHadamard",
]  # fmt: skip
