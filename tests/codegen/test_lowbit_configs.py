"""Which constants the `lowbit` template would be compiled with: there are some for whatever it takes."""

from __future__ import annotations

from itertools import product

import pytest

from llmopt.codegen.templates import lowbit
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.target import Target


@pytest.mark.parametrize("isa", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whatever_is_taken_has_a_configuration(isa: str, scheme: str) -> None:
    target = Target.parse(f"cuda:{isa}")
    for K, J, parts, tokens, norm in product((64, 1000, 14336), (16, 48, 4096), (1, 2), (1, 8, 16, 64), (0, 1)):
        shape = {"K": K, "J": J, "PARTS": parts, "NORM": norm, "N": tokens}
        ordered = lowbit.ordered(shape, scheme, target)
        shape |= {"ORDERED": int(ordered), "NORM": 0 if ordered else norm}
        assert lowbit.supports(shape, scheme, target) is None
        found = lowbit.configs(shape, scheme, target)
        assert found, shape
        assert not ordered or all(config["WIDE"] for config in found)
