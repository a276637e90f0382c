from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmopt.compiler.errors import PassOrderError, RecipeError
from llmopt.compiler.recipe import RECIPES, Dims, PassSpec, Recipe, check, check_order, compose, with_bits


@dataclass(frozen=True)
class Raise:
    name: ClassVar[str] = "raise-aten"
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset({"raised"})


@dataclass(frozen=True)
class Cache:
    name: ClassVar[str] = "insert-kv-cache"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    ensures: ClassVar[frozenset[str]] = frozenset({"cached"})
    fmt: Literal["plain", "int4"] = "plain"


@dataclass(frozen=True)
class Quantize:
    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    fmt: str
    block: int = 32
    damp: float = 0.01
    symmetric: bool = True
    skip: tuple[str, ...] = ()
    seed: int | None = None
    derived: int = dataclasses.field(default=0, init=False)


@dataclass(frozen=True)
class Lower:
    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[str]] = frozenset({"raised", "cached"})
    ensures: ClassVar[frozenset[str]] = frozenset({"lowered"})


REGISTRY = {kind.name: kind for kind in (Raise, Cache, Quantize, Lower)}


def recipe(*passes: str | PassSpec, name: str = "mine", **more: object) -> Recipe:
    return Recipe(name, tuple(PassSpec(p) if isinstance(p, str) else p for p in passes), **more)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
names = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
ranges = st.tuples(st.integers(1, 99), st.integers(0, 99)).map(lambda p: (p[0], p[0] + p[1]))
chosen_names = st.sets(st.sampled_from("abcdef"), min_size=1)
specs = st.builds(lambda n, o: PassSpec.of(n, **o), names, st.dictionaries(names, plain_values, max_size=3))
recipes = st.builds(
    Recipe,
    name=st.text(min_size=1, max_size=8),
    passes=st.lists(specs, min_size=1, max_size=4, unique_by=lambda s: s.name).map(tuple),
    providers=st.lists(names, min_size=1, max_size=3, unique=True).map(tuple),
    dims=st.builds(Dims, ranges, ranges),
    page_size=st.integers(1, 4096),
    dtype=st.sampled_from([None, "bfloat16", "float32"]),
)


@given(recipes)
def test_json_and_yaml_both_ways(made: Recipe):
    for again in (Recipe.from_json(made.to_json()), Recipe.from_yaml(made.to_yaml())):
        assert again == made
        assert again.digest() == made.digest()
    assert hash(made) == hash(Recipe.from_json(made.to_json()))


@given(recipes)
def test_a_recipe_composed_with_itself_is_itself(made: Recipe):
    assert compose([made, made]).digest() == made.digest()


@given(st.permutations("abcdef"), chosen_names, chosen_names)
def test_composing_keeps_both_orders(order: list[str], left: set[str], right: set[str]):
    one, two = (recipe(*[n for n in order if n in chosen]) for chosen in (left, right))
    made = [spec.name for spec in compose([one, two]).passes]
    assert sorted(made) == sorted(left | right)
    for part in (one, two):
        assert [n for n in made if n in {s.name for s in part.passes}] == [s.name for s in part.passes]


def test_digest_is_stable():
    """The same in another process (no salted hashing), blind to the name, changed by anything else."""
    made = recipe("raise-aten", PassSpec.of("quantize", fmt="nvfp4", block=16))
    code = (
        "from llmopt.compiler.recipe import PassSpec, Recipe;"
        "quantize = PassSpec.of('quantize', block=16, fmt='nvfp4');"
        "print(Recipe('other', (PassSpec('raise-aten'), quantize)).digest())"
    )
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == made.digest()
    changes = [
        {"passes": made.passes[::-1]},
        {"passes": made.passes[:1]},
        {"passes": (made.passes[0], PassSpec.of("quantize", fmt="nvfp4"))},
        {"providers": ("reference",)},
        {"dims": Dims(tokens=(1, 16))},
        {"page_size": 32},
        {"dtype": "float32"},
    ]
    digests = {dataclasses.replace(made, **change).digest() for change in changes}
    assert len(digests | {made.digest()}) == len(changes) + 1


def test_built_in_recipes_are_named_after_their_keys():
    assert {name: made.name for name, made in RECIPES.items()} == {name: name for name in RECIPES}
    assert RECIPES["reference"].providers == ("reference",)
    assert RECIPES["reference"].passes == RECIPES["default"].passes


def test_yaml_file_in_short_form(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "version: 1\nname: mine\ndims: {tokens: [1, 64]}\n"
        "passes:\n  - raise-aten\n  - {name: quantize, options: {fmt: nvfp4, skip: [lm_head]}}\n"
    )
    assert Recipe.parse(str(path)) == recipe(
        "raise-aten", PassSpec.of("quantize", fmt="nvfp4", skip=["lm_head"]), dims=Dims(tokens=(1, 64))
    )


def test_json_file(tmp_path: Path):
    path = tmp_path / "a+b.json"
    path.write_text(RECIPES["default"].to_json())
    assert Recipe.load(path) == Recipe.parse(str(path)) == RECIPES["default"]


def test_parse_composes_names_and_files(tmp_path: Path):
    path = tmp_path / "small.yaml"
    path.write_text(recipe("raise-aten", "quantize", "lower", name="small", page_size=4).to_yaml())
    made = Recipe.parse(f"reference + {path}")
    assert made.name == "reference+small"
    assert [s.name for s in made.passes] == [
        "raise-aten",
        "canonicalize",
        "insert-kv-cache",
        "fuse",
        "quantize",
        "lower",
    ]
    assert (made.providers, made.page_size) == (("reference",), 4)


def test_composing_merges_options_and_set_values():
    one = recipe(PassSpec.of("quantize", fmt="nvfp4"), dtype="bfloat16", name="a")
    two = recipe(PassSpec.of("quantize", block=16), page_size=32, name="b")
    assert compose([one, two]) == recipe(
        PassSpec.of("quantize", block=16, fmt="nvfp4"), dtype="bfloat16", page_size=32, name="a+b"
    )


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (recipe("a", page_size=8), recipe("a", page_size=4), "page_size is both 8 and 4"),
        (recipe(PassSpec.of("a", x=1)), recipe(PassSpec.of("a", x=2)), "option 'x' is both 1 and 2"),
        (recipe("a", "b"), recipe("b", "a"), "the passes a, b stand in two orders"),
    ],
)
def test_what_cannot_be_composed(one: Recipe, two: Recipe, said: str):
    with pytest.raises(RecipeError, match=said):
        compose([one, two])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defualt", "recipe 'defualt' is unknown; did you mean 'default'?"),
        (
            "default+refrence",
            "recipe 'refrence' (in 'default+refrence') is unknown; did you mean 'reference'?",
        ),
        ("", "recipe '' is unknown"),
        ("default+", "recipe '' (in 'default+') is unknown"),
        ("no/such.yaml", "recipe 'no/such.yaml' cannot be read"),
    ],
)
def test_unknown_recipe(text: str, said: str):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"version": 2}, "`version: 1`"),
        ({"version": None}, "`version: 1`"),
        ({"pases": []}, "key 'pases' is unknown; did you mean 'passes'?"),
        ({"name": 3}, "name is 3, wanted a name"),
        ({"passes": "lower"}, "passes is 'lower', wanted a list"),
        ({"passes": []}, "has no passes"),
        ({"passes": [["lower"]]}, "a pass is ['lower'], wanted a mapping"),
        ({"passes": [{"options": {}}]}, "a pass: key 'name' is missing"),
        ({"passes": [{"name": "a", "option": {}}]}, "key 'option' is unknown; did you mean 'options'?"),
        ({"passes": [{"name": "a", "options": {"x": {}}}]}, "option 'x' is {}, wanted a plain value"),
        ({"passes": [{"name": "a", "options": {1: 2}}]}, "options is {1: 2}, wanted a mapping of names"),
        ({"passes": ["a", "b", "a"]}, "pass 'a' stands twice (1st and 3rd)"),
        ({"providers": []}, "has no providers"),
        ({"providers": ["cpp", "cpp"]}, "provider 'cpp' stands twice (1st and 2nd)"),
        ({"providers": [1]}, "providers is 1, wanted a name"),
        ({"dims": {"token": [1, 2]}}, "dims: key 'token' is unknown; did you mean 'tokens'?"),
        ({"dims": {"tokens": [0, 2]}}, "dims.tokens is (0, 2)"),
        ({"dims": {"tokens": [4, 2]}}, "dims.tokens is (4, 2)"),
        ({"dims": {"sequences": 3}}, "dims.sequences is 3"),
        ({"page_size": 0}, "page_size is 0"),
        ({"page_size": True}, "page_size is True"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'?"),
    ],
)
def test_malformed_recipe(edit: dict, said: str):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(RECIPES["default"].to_dict() | edit, "mine.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["version", "name", "passes"])
def test_missing_key(key: str):
    data = RECIPES["default"].to_dict()
    del data[key]
    with pytest.raises(RecipeError, match=f"mine.yaml: key '{key}' is missing"):
        Recipe.from_yaml(yaml.safe_dump(data), "mine.yaml")


@pytest.mark.parametrize("text", ["", "[", "- a", "a: [", "\t", "null"])
def test_what_is_no_recipe(text: str):
    for read in (Recipe.from_json, Recipe.from_yaml):
        with pytest.raises(RecipeError) as caught:
            read(text, "mine")
        assert str(caught.value).startswith("mine")
        assert "\n" not in str(caught.value)


def test_the_json_form_is_the_documented_one():
    assert json.loads(RECIPES["default"].to_json()) == {
        "version": 1,
        "name": "default",
        "passes": [
            {"name": name, "options": {}} for name in ("raise-aten", "canonicalize", "insert-kv-cache", "fuse", "lower")
        ],
        "providers": ["triton", "cpp", "inductor", "reference"],
        "dims": {"tokens": [1, 8192], "sequences": [1, 256]},
        "page_size": 16,
        "dtype": None,
        "about": "exact, as fast as this machine can",
    }


GOOD = [
    PassSpec.of("quantize", fmt="nvfp4"),
    PassSpec.of("quantize", fmt="nvfp4", block=16, damp=1, symmetric=False, skip=["lm_head"], seed=None),
    PassSpec.of("quantize", fmt="nvfp4", seed=3, skip=[]),
    PassSpec.of("insert-kv-cache", fmt="int4"),
]


@pytest.mark.parametrize("spec", GOOD)
def test_options_that_fit(spec: PassSpec):
    check(recipe(spec), REGISTRY)
    REGISTRY[spec.name](**dict(spec.options))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (PassSpec("lowr"), "pass 'lowr' is unknown; did you mean 'lower'?"),
        (PassSpec.of("quantize", fmt="a", blok=1), "option 'blok' is unknown; did you mean 'block'?"),
        (PassSpec.of("quantize", fmt="a", derived=1), "option 'derived' is unknown"),
        (PassSpec.of("quantize", fmt="a", name="x"), "option 'name' is unknown"),
        (PassSpec.of("quantize"), "needs option 'fmt'"),
        (PassSpec.of("quantize", fmt=4), "option 'fmt' is 4, wanted str"),
        (PassSpec.of("quantize", fmt="a", block="16"), "option 'block' is '16', wanted int"),
        (PassSpec.of("quantize", fmt="a", block=True), "option 'block' is True, wanted int"),
        (PassSpec.of("quantize", fmt="a", block=1.5), "option 'block' is 1.5, wanted int"),
        (PassSpec.of("quantize", fmt="a", symmetric=1), "option 'symmetric' is 1, wanted bool"),
        (PassSpec.of("quantize", fmt="a", skip="lm_head"), "wanted tuple[str, ...]"),
        (PassSpec.of("quantize", fmt="a", skip=[1]), "wanted tuple[str, ...]"),
        (PassSpec.of("quantize", fmt="a", seed="3"), "wanted int | None"),
        (PassSpec.of("insert-kv-cache", fmt="int5"), "wanted Literal['plain', 'int4']"),
    ],
)
def test_options_that_do_not_fit(spec: PassSpec, said: str):
    with pytest.raises(RecipeError) as caught:
        check(recipe("raise-aten", spec), REGISTRY)
    assert said in str(caught.value)


def test_order_that_holds():
    check_order(recipe("raise-aten", "insert-kv-cache", "quantize", "lower"), REGISTRY)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (
            ("raise-aten", "lower", "insert-kv-cache"),
            "pass 'lower' (2nd) requires 'cached', which 'insert-kv-cache' (3rd) ensures: move it before",
        ),
        (
            ("raise-aten", "lower"),
            "'lower' (2nd) requires 'cached', which no pass ensures here: put 'insert-kv-cache' before it",
        ),
        (
            ("quantize",),
            "pass 'quantize' (1st) requires 'raised', which no pass ensures here: put 'raise-aten'",
        ),
    ],
)
def test_order_that_does_not_hold(passes: tuple[str, ...], said: str):
    with pytest.raises(PassOrderError) as caught:
        check_order(recipe(*passes), REGISTRY)
    assert said in str(caught.value)


def test_requirement_nobody_ensures():
    with pytest.raises(PassOrderError, match="which no pass ensures, here or anywhere in llmopt"):
        check_order(recipe("quantize"), {"quantize": Quantize})


def test_build_checks_and_makes_the_passes():
    made = recipe("raise-aten", PassSpec.of("quantize", fmt="nvfp4", skip=["lm_head"])).build(REGISTRY)
    assert made == (Raise(), Quantize("nvfp4", skip=("lm_head",)))
    with pytest.raises(PassOrderError):
        recipe("lower").build(REGISTRY)
    with pytest.raises(RecipeError):
        recipe("raise").build(REGISTRY)


def test_bits_go_to_the_pass_or_bring_it():
    own = recipe("raise-aten", PassSpec.of("quantize", bits=5.0, skip=["lm_head"]))
    assert with_bits(own, 4.5).passes[1] == PassSpec.of("quantize", bits=4.5, skip=["lm_head"])
    brought = {spec.name: dict(spec.options) for spec in with_bits(RECIPES["default"], 4.5).passes}
    assert brought["quantize"] == {"bits": 4.5}
    assert list(brought) == [spec.name for spec in RECIPES["mixed"].passes]


@pytest.mark.parametrize("bits", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_bits_that_are_no_budget(bits: float):
    with pytest.raises(RecipeError, match=rf"^bits \(--bits\) is {bits}; wanted a finite number .* above 0, such as"):
        with_bits(RECIPES["default"], bits)
