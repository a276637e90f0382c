"""How a model leaves as ONNX: which opset, which form of low-bit weights, which attention."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.compiler.errors import InputError, did_you_mean

WEIGHTS = ("portable", "standard", "function")
ATTENTION = ("standard", "gqa")
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
KV_CACHES = ("int8", "int4")
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class OnnxOptions:
    """What an ONNX graph is made of.

    `weights`: `portable` is what ONNX Runtime's CPU provider runs (MatMulNBits, DequantizeLinear), `standard` keeps
    the format's own types under DequantizeLinear (FLOAT4E2M1, FLOAT8E8M0: TensorRT and runtimes to come), `function`
    calls functions that the model itself defines. `attention`: the operator `Attention` of opset 23, or com.microsoft's
    `gqa`, GroupQueryAttention. `cache`: keys and values of earlier tokens are inputs, those of all tokens outputs.
    `accuracy_level` is MatMulNBits' own: 4 rounds activations to int8, 0 does not. `kv_cache` is what
    GroupQueryAttention keeps keys and values in, `int8` or `int4`; empty: as they are.
    """

    weights: str = "portable"
    attention: str = "standard"
    cache: bool = True
    accuracy_level: int = 0
    kv_cache: str = ""

    def __post_init__(self) -> None:
        """Raises InputError: a value that is none of those."""
        if not isinstance(self.cache, bool):
            raise InputError(f"cache is {self.cache!r}; wanted True or False")
        if self.accuracy_level and self.weights != "portable":
            raise InputError(
                f"--accuracy-level {self.accuracy_level} is MatMulNBits', which --weights {self.weights} has none of; "
                "leave it out, or take --weights portable"
            )
        if self.weights not in WEIGHTS:
            raise InputError(f"--weights {self.weights!r} is no form of weights; {did_you_mean(self.weights, WEIGHTS)}")
        if self.attention not in ATTENTION:
            raise InputError(f"--attention {self.attention!r} is unknown; {did_you_mean(self.attention, ATTENTION)}")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise InputError(
                f"--accuracy-level {self.accuracy_level} is none that MatMulNBits has; wanted 0 (activations stay as "
                "they are) or 4 (int8, faster); 1 to 3 ask for float32, float16 and bfloat16"
            )
        if self.kv_cache and (self.attention != "gqa" or self.kv_cache not in KV_CACHES):
            raise InputError(
                f"--kv-cache {self.kv_cache} with --attention {self.attention} cannot be said in ONNX: "
                f"GroupQueryAttention (gqa) keeps keys and values in {' or '.join(KV_CACHES)}"
            )
        if self.attention == "gqa" and not self.cache:
            raise InputError(
                "--attention gqa without a cache cannot be said: GroupQueryAttention always has one; leave out "
                "--no-cache, or take --attention standard"
            )

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators: 23 brought Attention and FLOAT4E2M1, 24 scales of FLOAT8E8M0."""
        return 24 if self.weights == "standard" else 23
