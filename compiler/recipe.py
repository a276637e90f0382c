"""Recipes: what to do to a model, as plain data: passes with their options, and who may implement the ops.

A recipe knows no pass: whatever needs them takes a registry (name -> pass class), so that a recipe is checked whole
before anything runs. Two recipes that say the same have the same digest, whatever they are called.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, get_args, get_type_hints

import yaml

from llmopt.compiler import plain
from llmopt.compiler.errors import PassOrderError, RecipeError, did_you_mean

VERSION = 1
DTYPES = ("bfloat16", "float16", "float32", "float64")

Option = bool | int | float | str | None | tuple["Option", ...]


class PassType(Protocol):
    """What a recipe needs to know of a pass class; its options are its dataclass fields."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    ensures: ClassVar[frozenset[str]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


Registry = Mapping[str, type[PassType]]


@dataclass(frozen=True)
class PassSpec:
    """One pass by name, with the options set for it, as (name, value) pairs sorted by name."""

    name: str
    options: tuple[tuple[str, Option], ...] = ()

    @classmethod
    def of(cls, name: str, /, **options: Any) -> PassSpec:
        """`PassSpec.of("quantize", fmt="nvfp4")`; lists become tuples."""
        return cls(name, tuple(sorted((key, plain.frozen(value)) for key, value in options.items())))

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., "options": {...}}` of JSON types."""
        return {"name": self.name, "options": {key: plain.thawed(value) for key, value in self.options}}


@dataclass(frozen=True)
class Dims:
    """Inclusive bounds (lowest, highest) of what one step holds: tokens, and the sequences they are of."""

    tokens: tuple[int, int] = (1, 8192)
    sequences: tuple[int, int] = (1, 256)

    def __post_init__(self) -> None:
        for name in ("tokens", "sequences"):
            bounds = getattr(self, name)
            if not plain.is_range(bounds):
                raise RecipeError(f"dims.{name} is {bounds!r}, wanted 1 <= lowest <= highest, such as [1, 256]")


@dataclass(frozen=True)
class Recipe:
    """The passes in the order they run, the providers allowed (most wanted first), the bounds compiled for.

    `page_size` is in tokens; `dtype` (a name of `DTYPES`) is what weights are loaded as, None = the
    checkpoint's own. `about` tells people what it is for.
    """

    name: str
    passes: tuple[PassSpec, ...]
    providers: tuple[str, ...] = ("triton", "cpp", "inductor", "reference")
    dims: Dims = field(default_factory=Dims)
    page_size: int = 16
    dtype: str | None = None
    about: str = ""

    def __post_init__(self) -> None:
        _no_repeats(f"recipe {self.name!r}: pass", [spec.name for spec in self.passes])
        _no_repeats(f"recipe {self.name!r}: provider", self.providers)
        if not self.passes or not self.providers:
            missing = "providers" if self.passes else "passes"
            raise RecipeError(f"recipe {self.name!r} has no {missing}, wanted at least one")
        if not plain.is_int(self.page_size) or self.page_size < 1:
            raise RecipeError(
                f"recipe {self.name!r}: page_size is {self.page_size!r}, wanted a whole number of tokens >= 1"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            remedy = did_you_mean(str(self.dtype), DTYPES)
            raise RecipeError(f"recipe {self.name!r}: dtype {self.dtype!r} is unknown; {remedy}")

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `from_dict` reads it back."""
        return {
            "version": VERSION,
            "name": self.name,
            "passes": [spec.to_dict() for spec in self.passes],
            "providers": list(self.providers),
            "dims": {"tokens": list(self.dims.tokens), "sequences": list(self.dims.sequences)},
            "page_size": self.page_size,
            "dtype": self.dtype,
            **({"about": self.about} if self.about else {}),
        }

    def to_json(self) -> str:
        """One JSON object, keys in a fixed order."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """The same object in YAML: what `--recipe file.yaml` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def digest(self) -> str:
        """16 hex digits over all but the name and what it is about, the same in every process and on every machine."""
        said = {key: value for key, value in self.to_dict().items() if key not in ("name", "about")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> Recipe:
        """Read `to_dict`'s form; `where` names the source in messages. Raises RecipeError.

        A pass may be a bare name; only `version`, `name` and `passes` must be given.
        """
        known = {f.name for f in fields(cls)} | {"version"}
        data = plain.mapping(data, where, RecipeError, known, wanted={"version", "name", "passes"})
        if data.pop("version") != VERSION:
            raise RecipeError(f"{where}: this llmopt reads recipes of `version: {VERSION}`; write it in that form")
        data["name"] = plain.text(data["name"], f"{where}: name", RecipeError)
        data["passes"] = tuple(
            _read_pass(item, where) for item in plain.items(data["passes"], f"{where}: passes", RecipeError)
        )
        if "providers" in data:
            names = plain.items(data["providers"], f"{where}: providers", RecipeError)
            data["providers"] = tuple(plain.text(name, f"{where}: providers", RecipeError) for name in names)
        if "about" in data:
            data["about"] = plain.text(data["about"], f"{where}: about", RecipeError)
        if "dims" in data:
            bounds = plain.mapping(data["dims"], f"{where}: dims", RecipeError, {f.name for f in fields(Dims)})
            data["dims"] = Dims(**{key: plain.frozen(value) for key, value in bounds.items()})
        return cls(**data)

    @classmethod
    def from_json(cls, text: str, where: str = "recipe") -> Recipe:
        """Read `to_json`'s form. Raises RecipeError."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{where}: not JSON: {error}") from error
        return cls.from_dict(data, where)

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Read `to_yaml`'s form. Raises RecipeError."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(data, where)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a .yaml, .yml or .json file. Raises RecipeError."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {str(path)!r} cannot be read: {error}") from error
        return cls.from_json(text, str(path)) if path.suffix == ".json" else cls.from_yaml(text, str(path))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """A built-in name, a path ending in .yaml, .yml or .json, or several joined with `+` (`compose`)."""
        if _is_path(text) and Path(text).is_file():
            return cls.load(text)
        return compose([_named(part.strip(), text) for part in text.split("+")])

    def build(self, registry: Registry) -> tuple[Any, ...]:
        """The pass objects, in order, after `check` and `check_order`. Raises theirs."""
        check(self, registry)
        check_order(self, registry)
        return tuple(registry[spec.name](**dict(spec.options)) for spec in self.passes)


def with_bits(recipe: Recipe, bits: float) -> Recipe:
    """The recipe with mixed precision of at most `bits` bits a weight, whatever it said of bits.

    Raises RecipeError: `bits` is no finite number above 0.
    """
    if not math.isfinite(bits) or bits <= 0:
        raise RecipeError(f"bits (--bits) is {bits!r}; wanted a finite number of bits a weight above 0, such as 4.5")
    if all(spec.name != "quantize" for spec in recipe.passes):
        recipe = compose([recipe, RECIPES["mixed"]])
    passes = tuple(
        PassSpec.of(spec.name, **{**dict(spec.options), "bits": bits}) if spec.name == "quantize" else spec
        for spec in recipe.passes
    )
    return replace(recipe, passes=passes)


def compose(recipes: Iterable[Recipe]) -> Recipe:
    """One recipe that does what each of them does.

    Passes keep the order every recipe gives them; where that leaves a choice, those of the earlier recipe
    come first. A value left at its default gives way to one that was set; two different set values are an
    error, as are two recipes that order the same passes differently. Raises RecipeError.
    """
    first, *rest = recipes
    for recipe in rest:
        first = _composed(first, recipe)
    return first


def check(recipe: Recipe, registry: Registry) -> None:
    """Every pass is known, and so is every option and its type. Raises RecipeError."""
    for spec in recipe.passes:
        if spec.name not in registry:
            raise RecipeError(
                f"recipe {recipe.name!r}: pass {spec.name!r} is unknown; {did_you_mean(spec.name, registry)}"
            )
        _check_options(recipe, spec, registry[spec.name])


def check_order(recipe: Recipe, registry: Registry) -> None:
    """Whatever a pass requires, an earlier one ensures (all passes known: `check`). Raises PassOrderError."""
    ensured: set[str] = set()
    for at, spec in enumerate(recipe.passes):
        for lacking in sorted(registry[spec.name].requires - ensured):
            raise PassOrderError(_order_message(recipe, registry, at, lacking))
        ensured |= registry[spec.name].ensures


def _order_message(recipe: Recipe, registry: Registry, at: int, lacking: str) -> str:
    name = recipe.passes[at].name
    said = f"recipe {recipe.name!r}: pass {name!r} ({_ordinal(at)}) requires {lacking!r}, which "
    for later, spec in enumerate(recipe.passes[at + 1 :], start=at + 1):
        if lacking in registry[spec.name].ensures:
            return f"{said}{spec.name!r} ({_ordinal(later)}) ensures: move it before"
    able = " or ".join(sorted(repr(kind) for kind, found in registry.items() if lacking in found.ensures))
    return f"{said}no pass ensures{f' here: put {able} before it' if able else ', here or anywhere in llmopt'}"


def _check_options(recipe: Recipe, spec: PassSpec, kind: type[PassType]) -> None:
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind) if f.init]
    for option, value in spec.options:
        what = f"recipe {recipe.name!r}: pass {spec.name!r}: option {option!r}"
        if option not in known:
            raise RecipeError(f"{what} is unknown; {did_you_mean(option, known)}")
        if not plain.is_a(value, hints[option]):
            raise RecipeError(f"{what} is {value!r}, wanted {_type_name(hints[option])}")
    given = {option for option, _ in spec.options}
    for f in fields(kind):
        if f.init and f.default is MISSING and f.default_factory is MISSING and f.name not in given:
            raise RecipeError(f"recipe {recipe.name!r}: pass {spec.name!r} needs option {f.name!r}: set it")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _composed(left: Recipe, right: Recipe) -> Recipe:
    name = f"{left.name}+{right.name}"
    by_name = {spec.name: spec for spec in left.passes}
    for spec in right.passes:
        by_name[spec.name] = _merged(name, by_name[spec.name], spec) if spec.name in by_name else spec
    order = _merged_order(name, [s.name for s in left.passes], [s.name for s in right.passes])
    defaults = Recipe(name, left.passes)
    chosen = {
        key: _chosen(name, key, getattr(left, key), getattr(right, key), getattr(defaults, key))
        for key in ("providers", "dims", "page_size", "dtype")
    }
    return replace(defaults, passes=tuple(by_name[n] for n in order), **chosen)


def _chosen(name: str, key: str, left: Any, right: Any, default: Any) -> Any:
    if left != default and right != default and left != right:
        raise RecipeError(f"recipe {name!r}: {key} is both {left!r} and {right!r}; set it in one of them only")
    return right if left == default else left


def _merged(name: str, left: PassSpec, right: PassSpec) -> PassSpec:
    options = dict(left.options)
    for key, value in right.options:
        if options.setdefault(key, value) != value:
            raise RecipeError(
                f"recipe {name!r}: pass {left.name!r}: option {key!r} is both {options[key]!r} "
                f"and {value!r}; set it in one of them only"
            )
    return PassSpec.of(left.name, **options)


def _merged_order(name: str, left: list[str], right: list[str]) -> list[str]:
    """Both orders in one: before a shared pass go those of the left, then of the right, that precede it."""
    shared = [n for n in left if n in right]
    if shared != [n for n in right if n in left]:
        raise RecipeError(f"recipe {name!r}: the passes {', '.join(shared)} stand in two orders; give them one")
    order: list[str] = []
    left, right = list(left), list(right)
    for stop in [*shared, None]:
        for names in (left, right):
            while names and names[0] != stop:
                order.append(names.pop(0))
        if stop is not None:
            order.append(left.pop(0))
            right.pop(0)
    return order


def _named(part: str, whole: str) -> Recipe:
    if _is_path(part):
        return Recipe.load(part)
    if part in RECIPES:
        return RECIPES[part]
    inside = "" if part == whole else f" (in {whole!r})"
    raise RecipeError(f"recipe {part!r}{inside} is unknown; {did_you_mean(part, RECIPES)} A file must end in .yaml.")


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json"))


def _read_pass(item: Any, where: str) -> PassSpec:
    if isinstance(item, str):
        return PassSpec(item)
    data = plain.mapping(item, f"{where}: a pass", RecipeError, {"name", "options"}, wanted={"name"})
    name = plain.text(data["name"], f"{where}: a pass's name", RecipeError)
    options = plain.mapping(data.get("options") or {}, f"{where}: pass {name!r}: options", RecipeError)
    for key, value in options.items():
        if not plain.is_plain(value):
            raise RecipeError(f"{where}: pass {name!r}: option {key!r} is {value!r}, wanted a plain value or a list")
    return PassSpec.of(name, **options)


def _no_repeats(what: str, names: Iterable[str]) -> None:
    seen: dict[str, int] = {}
    for at, name in enumerate(names):
        if name in seen:
            raise RecipeError(f"{what} {name!r} stands twice ({_ordinal(seen[name])} and {_ordinal(at)}); remove one")
        seen[name] = at


def _ordinal(index: int) -> str:
    """0 -> `1st`, 10 -> `11th`."""
    n = index + 1
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


_STANDARD = tuple(map(PassSpec, ("raise-aten", "canonicalize", "insert-kv-cache", "fuse", "lower")))


def _with(item: str, at: int, name: str, about: str, **options: Any) -> Recipe:
    return Recipe(name, (*_STANDARD[:at], PassSpec.of(item, **options), *_STANDARD[at:]), about=about)


_rotated = partial(_with, "rotate-hadamard", 2)
_quantized = partial(_with, "quantize", 3)
_packed = partial(_with, "quantize-kv", 3)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("default", _STANDARD, about="exact, as fast as this machine can"),
        Recipe("reference", _STANDARD, providers=("reference",), about="exact, every op by its plain meaning, slow"),
        _rotated("rotate", "with one below: no outliers in hidden vectors and values, at no cost in time (R1, R2)"),
        _rotated("rotate-online", "the same, and in what down projections read (R4), at some cost", r4=True),
        _quantized("nvfp4", "4-bit floats, 16 to a scale of 8 bits", weights="nvfp4"),
        _quantized("mxfp4", "4-bit floats, 32 to a power of two", weights="mxfp4"),
        _quantized("mxfp6", "6-bit floats (E2M3), 32 to a power of two", weights="mxfp6_e2m3"),
        _quantized("mxfp6-e3m2", "6-bit floats of wider range (E3M2)", weights="mxfp6_e3m2"),
        _quantized("mxfp8", "8-bit floats (E4M3), 32 to a power of two", weights="mxfp8"),
        _quantized("fp8", "8-bit floats (E4M3), a scale a row", weights="fp8_channel"),
        _quantized("int8", "8-bit integers, a scale a row", weights="int8"),
        _quantized("int4", "4-bit integers, 128 to a scale", weights="int4_g128"),
        _quantized("int4-asym", "4-bit integers, 128 to a scale and a zero point", weights="int4_g128_asym"),
        _quantized("w4a4", "NVFP4 weights and activations", scheme="NVFP4"),
        _quantized("w8a8", "8-bit integer weights and activations", scheme="W8A8"),
        _quantized("w8a8-fp8", "8-bit float weights and activations", scheme="FP8_DYNAMIC"),
        _packed("int4-kv", "keys and values of 4 bits, keys rotated head by head", keys="int4", values="int4"),
        _packed("int8-kv", "keys and values of 8-bit integers", keys="int8", values="int8", rotate="none"),
        _packed("fp8-kv", "keys and values of 8-bit floats (E4M3)", keys="fp8", values="fp8", rotate="none"),
        _packed("nvfp4-kv", "keys and values of NVFP4", keys="nvfp4", values="nvfp4", rotate="none"),
        # to be joined to one of those above: how scales and codes are chosen
        _quantized("max", "with one above: each scale by the largest weight, not by a search", scale="max"),
        _quantized("search", "with one above: each scale by the least squared error (what they do)", scale="search"),
        _quantized("weighted", "with one above: errors count by what each channel is fed", weighted=True),
        _quantized("gptq", "with one above: later columns make up for what earlier ones lost", method="gptq"),
        _quantized("mixed", "some of all of them, within --bits bits a weight (5)", bits=5.0),
    )
}
