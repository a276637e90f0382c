"""The options of the pass `quantize`, and what they choose: formats of weights and activations, rules of scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmopt.compiler.errors import InputError, RecipeError, did_you_mean
from llmopt.compiler.quant import PRESETS, SCHEMES, scheme_of
from llmopt.compiler.quant.scales import check_rule, rules_of
from llmopt.passes.products import matches

METHODS = ("rtn", "gptq")
DEFAULT_RULE = "search"  # every scheme has it
LEFT_OUT = ("its weight is not included", "its weight is excluded")


@dataclass(frozen=True)
class Format:
    """What a product becomes: the schemes of its weight and of its activations ("" leaves them as they are)."""

    weights: str = ""
    activations: str = ""


@dataclass(frozen=True)
class Choice:
    """The format of the body's products, that of the product that makes the logits, the schemes that `bits` may choose
    from (none without it), and what a reader of the report should know."""

    body: Format
    head: Format
    schemes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class QuantizeOptions:
    """`weights` and `activations` are schemes (`compiler.quant.SCHEMES`); `scheme` names both by one of
    compressed-tensors' presets ("NVFP4", "W4A16", ...). `bits` instead of these: each weight gets one of the schemes
    `choices`, or none, so that all that are included take at most so many bits a weight, scales and all.

    `scale` is the rule that chooses scales; of several schemes, those that cannot have it take `DEFAULT_RULE`. With
    `weighted` each column's error counts by the calibration data's Hessian diagonal. `method` is rtn (round to nearest)
    or gptq. `lm_head` is a scheme (weights alone) or a preset for the product that makes the logits, which `bits` do
    not cover. `include` and `exclude` are patterns of weight names (`*.layers.0.*`; see `products.names_of`); a joined
    weight counts by the names of its parts, too.
    """

    scheme: str = ""
    weights: str = ""
    activations: str = ""
    scale: str = DEFAULT_RULE
    method: str = "rtn"
    weighted: bool = False
    bits: float | None = None
    choices: tuple[str, ...] = ("int4_g128", "mxfp4", "nvfp4", "mxfp6_e2m3", "fp8_channel")
    lm_head: str = ""
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def chosen(self) -> Choice:
        """What weights and activations become. Raises RecipeError, or InputError for an unknown scheme or rule."""
        given = [name for name in ("scheme", "weights", "bits") if getattr(self, name) not in ("", None)]
        if len(given) != 1:
            seen = " and ".join(f"{name} {getattr(self, name)!r}" for name in given) or "nothing"
            raise RecipeError(
                f"pass 'quantize' is told {seen} of what weights become; set one of `scheme` (such as NVFP4), "
                "`weights` (such as nvfp4) and `bits` (bits a weight, such as 4.5)"
            )
        self._check_method()
        found = preset(self.scheme) if self.scheme else Format(self.weights)
        named = found.weights, self.activations or found.activations
        weights, activations = (scheme_of(name).name if name else "" for name in named)
        schemes: tuple[str, ...] = ()
        if self.bits is not None:
            check_bits(self.bits, self.choices)
            schemes = tuple(dict.fromkeys(scheme_of(name).name for name in self.choices))
        head = format_of(self.lm_head)
        check_scale(self.scale, schemes or (weights,))
        return Choice(Format(weights, activations), head, schemes, told_rules(self.scale, (*schemes, head.weights)))

    def left_out(self, names: Sequence[str]) -> str | None:
        """Why `include` or `exclude` leave out a weight of these names: one of LEFT_OUT, None if they do not."""
        if not matches(names, self.include):
            return LEFT_OUT[0]
        return LEFT_OUT[1] if matches(names, self.exclude) else None

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(
                f"pass 'quantize': method {self.method!r} is unknown; {did_you_mean(self.method, METHODS)}"
            )
        if self.weighted and self.scale == "max":
            raise RecipeError(
                "pass 'quantize': weighted is set and scale is 'max'; weighted says how much errors count in a search, "
                f"and 'max' searches nothing: set scale to {DEFAULT_RULE!r}, or leave weighted out"
            )


def preset(name: str) -> Format:
    """The format that a preset's or a scheme's name stands for, in any case; the preset's where both are called so.

    Raises InputError.
    """
    known: Mapping[str, tuple[str, str | None]] = {k.lower(): v for k, v in PRESETS.items()}
    if name.lower() not in known and name.lower() not in SCHEMES:
        raise InputError(f"no quantisation scheme is called {name!r}; {did_you_mean(name, [*PRESETS, *SCHEMES])}")
    weights, activations = known.get(name.lower(), (name.lower(), None))
    return Format(weights, activations or "")


def format_of(name: str) -> Format:
    """As `preset`, but a name written as in SCHEMES (`nvfp4`) is the scheme, of weights alone; "" is no format."""
    return Format(name) if name in SCHEMES or not name else preset(name)


def rule_for(scale: str, scheme: str) -> str:
    """The rule `scale` where the scheme can have it, else the one that every scheme has."""
    return scale if scale in rules_of(scheme_of(scheme)) else DEFAULT_RULE


def check_scale(scale: str, body: Sequence[str]) -> None:
    """Raises InputError or RecipeError unless one of the body's schemes can have scales by the rule `scale`."""
    if any(scale in rules_of(scheme_of(name)) for name in body):
        return
    if len(body) == 1:
        check_rule(scale, scheme_of(body[0]))
    known = sorted({rule for name in body for rule in rules_of(scheme_of(name))})
    raise RecipeError(
        f"pass 'quantize': scale is {scale!r}, which none of {', '.join(body)} can have; {did_you_mean(scale, known)}"
    )


def told_rules(scale: str, schemes: Sequence[str]) -> tuple[str, ...]:
    """A line about the schemes that cannot have the rule `scale`; none where all can."""
    others = [name for name in dict.fromkeys(schemes) if name and rule_for(scale, name) != scale]
    return (f"scales of {', '.join(others)} are chosen by {DEFAULT_RULE!r}, not by {scale!r}",) if others else ()


def check_bits(bits: float, choices: Sequence[str]) -> None:
    """Raises RecipeError unless `bits` is a budget and there are schemes to choose from."""
    if not math.isfinite(bits) or bits <= 0:
        raise RecipeError(
            f"pass 'quantize': option 'bits' is {bits!r}; wanted a finite number of bits a weight above 0, such as 4.5"
        )
    if not choices:
        raise RecipeError(
            "pass 'quantize': option 'choices' is empty, and with `bits` each weight gets one of them; wanted at least "
            f"one scheme; known: {', '.join(SCHEMES)}"
        )
