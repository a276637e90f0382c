"""llmopt: a graph compiler for LLM inference in PyTorch. `compile` a causal forward, `generate`, `save`, `load`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the packages stand beside this folder; Python started in the checkout's root finds this one first.
_checkout = Path(__file__).parent.parent
if (_checkout / "compiler" / "op.py").is_file():
    __path__.append(str(_checkout))

from llmopt.compiler.recipe import Recipe  # noqa: E402
from llmopt.compiler.target import Target  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from llmopt.cache import Cache
    from llmopt.compiler.program import ModelFacts
    from llmopt.compiler.quant import QuantizedTensor
    from llmopt.model import CompiledModel

__version__ = "0.1.0"

__all__ = ["Cache", "Recipe", "Target", "compile", "load", "quantize"]


def __getattr__(name: str) -> Any:
    # transformers is imported by whoever needs it
    if name == "Cache":
        from llmopt.cache import Cache

        return Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def compile(
    src: Any,
    recipe: str | Recipe = "default",
    target: str | Target | None = None,
    calibration: Any = None,
    *,
    dtype: str | None = None,
    facts: ModelFacts | None = None,
    cache_bytes: int | None = None,
) -> CompiledModel:
    """Compile a model: a Hugging Face folder or hub id, an `nn.Module` or an `ExportedProgram`.

    A module's forward is `(input_ids [B, T], position_ids [B, T]) -> logits [B, T, V]`, without any cache. `dtype` is
    what weights are computed in (`float32`, `bfloat16`, ...; the checkpoint's own by default); `facts` gives vocabulary
    and context length where they cannot be told from the model; `cache_bytes` bounds the KV cache (on a GPU it
    is allocated at once; by default half of the memory that the weights leave free). `calibration` is what recipes such
    as `nvfp4+gptq` learn from: token ids, a file of them (safetensors, `tokens`), a text file or a folder of texts, or
    statistics kept from an earlier run.

    Raises `llmopt.compiler.errors.LlmoptError`.
    """
    from llmopt.model import CompiledModel
    from llmopt.runtime.build import Calibration, build
    from llmopt.runtime.gpu_code import code_for

    data = None if calibration is None else Calibration(calibration)
    program, report, context = build(src, recipe, target, dtype, facts, calibration=data)
    return CompiledModel(
        program, context.recipe, context.target, report, code_for(program, context.target), cache_bytes
    )


def load(path: str | os.PathLike[str], *, cache_bytes: int | None = None) -> CompiledModel:
    """Load an artifact that `CompiledModel.save` or `llmopt compile` wrote; nothing is compiled.

    `cache_bytes` is as for `compile`.

    Every file is checked against its hash first; only load artifacts you trust, as their compiled code is run. Raises
    `llmopt.compiler.errors.ArtifactError` (none, damaged, too new) or `TargetError` (built for another machine).
    """
    from llmopt.model import CompiledModel
    from llmopt.runtime.artifact import load as load_parts

    return CompiledModel(*load_parts(Path(path)), cache_bytes)


def quantize(
    tensor: Tensor,
    scheme: str,
    scale: str = "max",
    *,
    weight: Tensor | None = None,
    global_scale: float | Tensor | None = None,
    scale_max: float = 448.0,
) -> QuantizedTensor:
    """Quantise a matrix [N, K] (float16, bfloat16, float32, float64) to low-bit codes; `.dequantize()` restores it.

    `scheme`: `nvfp4`, `mxfp4`, `mxfp6_e2m3`, `mxfp6_e3m2`, `mxfp8`, `fp8` (one scale a tensor), `fp8_channel`,
    `fp8_block`, `int8`, `int8_g128`, `int4_g32`, `int4_g64`, `int4_g128`, the latter three with `_asym`, too, and the
    latter four with `_f16` (scales in float16, not bfloat16, from 2^-24 to 65504; what is larger is cut). Any K: the
    last group may be short.

    `scale` chooses scales: `max` by the largest element of a block, as compressed-tensors; `search` keeps the one with
    the least squared error among its neighbours, never worse than `max` (ScaleSearch, arXiv 2605.12464; a grid of
    smaller ones for float scales). For nvfp4 also `optimal` (a window no best scale lies outside of) and `fast`
    (ScaleSweep, arXiv 2606.07618), `four-six` (Four Over Six, arXiv 2512.02010) and `all` codes. `weight` [K], not
    negative, says how much errors of each column count in a search (not in `max`), such as the diagonal of a layer's
    Hessian; only its proportions count.

    For nvfp4: `global_scale`, a positive number (float or []), shares the tensor's scale with others; `scale_max` is
    what the largest block scale becomes (448; with 256 a search can raise it).

    The result's `codes` are uint8 [N, K up to a whole group], `scales` [N, groups], `global_scale` float32 [] or None,
    `zero_points` as scales or None; `.error()` is the relative squared error, `.sqnr()` the same in dB, `.packed()` the
    codes without room between them.

    Raises `llmopt.compiler.errors.InputError`: no matrix, empty, sparse, on the device meta, not floating, NaN or
    infinite; an unknown scheme or rule; an option that the scheme or the rule cannot have, or a `global_scale` beyond
    the reach of block scales.
    """
    from llmopt.compiler.quant import quantize

    return quantize(tensor, scheme, scale, weight=weight, global_scale=global_scale, scale_max=scale_max)
