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
    from llmopt.compiler.program import ModelFacts
    from llmopt.model import CompiledModel

__version__ = "0.1.0"

__all__ = ["Recipe", "Target", "compile", "load"]


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
    is allocated at once; by default half of the memory that the weights leave free).

    Raises `llmopt.compiler.errors.LlmoptError`.
    """
    from llmopt.compiler.errors import InputError
    from llmopt.model import CompiledModel
    from llmopt.runtime.build import build
    from llmopt.runtime.gpu_code import code_for

    if calibration is not None:
        raise InputError("calibration data was given, but no pass of this version reads any; leave it out")
    program, report, context = build(src, recipe, target, dtype, facts)
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
