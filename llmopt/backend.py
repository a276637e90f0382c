"""The backend of `torch.compile(model, backend="llmopt", options={...})`, found through its entry point.

Options: `recipe` (a name or a Recipe), `target`, `strict` (an error instead of a warning when a graph cannot be
rewritten, or a product not be quantised as the recipe asks), `inductor` (settings for Inductor, as in
`torch.compile(options=...)` of that backend). `reports` holds what was done to the latest graphs, newest last. With
`.generate()` use `model.compile(backend="llmopt")`: what `torch.compile(model)` returns hands `generate` to the
original model, uncompiled.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from llmopt.compiler._torch import inductor_options, on_generate
from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target

if TYPE_CHECKING:
    from llmopt.runtime.dynamo import FragmentCompiler, GraphReport

reports: deque[GraphReport] = deque(maxlen=256)
_OPTIONS: dict[str, tuple[type, ...]] = {
    "recipe": (str, Recipe),
    "target": (str, Target),
    "strict": (bool,),
    "inductor": (dict,),
}
_said: set[str] = set()


def llmopt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; what torch.compile calls. Raises InputError for a bad option.

    Graphs that need gradients run as they are. A graph that cannot be rewritten is compiled unrewritten, with one
    warning that says why (with `strict`, an error), and so is a product that the recipe wants quantised and that cannot
    be. Results are those of the model, to rounding, unless the recipe changes them.
    """
    from llmopt.runtime.dynamo import GraphReport

    on_gpu = any(isinstance(i, Tensor) and i.device.type == "cuda" for i in example_inputs)
    compiler, strict = _read(mode, options or {}, "cuda" if on_gpu else "cpu")
    report = GraphReport([_describe(i) for i in example_inputs], compiler.recipe.name)
    reports.append(report)
    if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in example_inputs):
        report.fallback = "gradients are wanted"
        _warn_once(
            "gradients",
            "llmopt compiles for inference, and gradients are on: the model runs as it is, uncompiled, whatever the "
            "recipe asks for. Call it under "
            "torch.no_grad() or torch.inference_mode(), or freeze it with model.requires_grad_(False)",
        )
        return gm.forward
    compiled = compiler.compile(gm, example_inputs, strict, report)
    _warn(compiler, report)
    return compiled


def _warn(compiler: FragmentCompiler, report: GraphReport) -> None:
    """One warning of each kind about what did not happen to a graph."""
    listed = "llmopt.backend.reports lists all graphs"
    strict = "options={'strict': True} makes this an error"
    recipe = f"recipe {report.recipe!r}"
    if report.fallback is not None and compiler.lossy:
        _warn_once(
            "unrewritten",
            f"llmopt left a graph as it is ({report.fallback}): what {recipe} asks for did not happen in it "
            f"({compiler.lossy}), and it computes what the model does. {listed}; {strict}",
        )
    elif report.fallback is not None:
        _warn_once(
            "unrewritten",
            f"llmopt left a graph unrewritten ({report.fallback}); results are right, but slower than they could be. "
            f"{listed}; {strict}",
        )
    if report.unquantised:
        said = compiler.said_unquantised(report)
        _warn_once("unquantised", f"{recipe} asks for low-bit weights, and {said}. {listed}; {strict}")
    for note in report.notes:
        _warn_once(note, f"llmopt, {recipe}, a graph of the model: {note}. {listed}")


def _reset() -> None:
    reports.clear()
    _said.clear()


llmopt.reset = _reset  # type: ignore[attr-defined]  # called by torch.compiler.reset()


def _read(mode: str | None, options: dict[str, Any], kind: str) -> tuple[FragmentCompiler, bool]:
    """`kind` of target, if no other is asked for: where the tensors are is where the graph will run."""
    from llmopt.runtime.dynamo import make_compiler

    if mode is not None:
        raise InputError(
            f"mode {mode!r} is one of Inductor's, which backend 'llmopt' does not take; use "
            f"options={{'inductor': torch._inductor.list_mode_options({mode!r})}} in its place"
        )
    if not isinstance(options, dict):
        raise InputError(f"options of backend 'llmopt' is {options!r}; wanted a dict such as {{'recipe': 'default'}}")
    for key, value in options.items():
        if key not in _OPTIONS:
            raise InputError(f"option {key!r} of backend 'llmopt' is unknown; {did_you_mean(key, _OPTIONS)}")
        if not isinstance(value, _OPTIONS[key]):
            wanted = " or ".join(kind.__name__ for kind in _OPTIONS[key])
            raise InputError(f"option {key!r} of backend 'llmopt' is {value!r}, wanted a {wanted}")
    inductor = options.get("inductor", {})
    for key in inductor:
        if key not in (known := inductor_options()):
            raise InputError(f"options['inductor'] of backend 'llmopt': {key!r} is unknown; {_close(key, known)}")
    recipe, target = options.get("recipe", "default"), options.get("target")
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    target = Target.parse(target) if isinstance(target, str) else target or Target.detect(kind)
    return make_compiler(recipe, target, inductor), options.get("strict", False)


def _close(key: str, known: list[str]) -> str:
    hint = did_you_mean(key, known).split(" Known:")[0]
    return hint if hint.startswith("did you mean") else "torch._inductor.list_options() lists the known ones"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[str(s) for s in value.shape]}".replace("'", "")
    return type(value).__name__


def _warn_once(topic: str, message: str) -> None:
    if topic not in _said:
        _said.add(topic)
        warnings.warn(message, stacklevel=3)


def _warn_generate() -> None:
    _warn_once(
        "generate",
        'torch.compile(model, backend="llmopt").generate(...) runs the original model, uncompiled, because generate is '
        'looked up on it; call model.compile(backend="llmopt") instead, and then model.generate(...)',
    )


on_generate(llmopt, _warn_generate)
