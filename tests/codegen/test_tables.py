"""Every template, and every config of the shipped tables: what they compute, and that every listed GPU takes them.

Configs repeat over shapes, and what they compile to hardly depends on the lengths: each is taken once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import lowbit_cases
import pytest
import torch
from gemm_cases import Case, Data
from sass import names, undisturbed

from llmopt.codegen import cubin, cubin_parallel, tuning
from llmopt.codegen.kernel import Kernel
from llmopt.codegen.lowbit_layout import own
from llmopt.codegen.sampling import sampling_code
from llmopt.compiler.quant.schemes import scheme_of
from llmopt.compiler.target import Target

PRODUCTS = ("gemv", "gemm", "lowbit")
ISAS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]


@dataclass(frozen=True)
class Tuned:
    """A config of a table, with a shape that it is picked for."""

    template: str
    shape: dict[str, int]
    dtype: str
    config: dict[str, Any]

    def __str__(self) -> str:
        scheme = f" {self.dtype}" if self.template == "lowbit" else ""
        ordered = " ordered" if self.shape.get("ORDERED") else ""
        kind = f"{self.template}{scheme}{ordered} PARTS={self.shape['PARTS']} NORM={self.shape['NORM']}"
        return " ".join([kind, *(f"{name}={value}" for name, value in sorted(self.config.items()))])

    def case(self, K: int, J: int) -> Case | lowbit_cases.Case:
        """The product with other lengths."""
        if self.template == "lowbit":
            parts, norm, ordered = (self.shape[name] for name in ("PARTS", "NORM", "ORDERED"))
            return lowbit_cases.Case(self.dtype, K, J, parts, norm, ordered=ordered)
        return Case(K, J, self.shape["PARTS"], self.shape["NORM"], dtype=getattr(torch, self.dtype))

    @property
    def span(self) -> int:
        """Columns that all parts of K take in one step."""
        steps = (self.config.get(name, 1) for name in ("SLICES", "UNROLL", "SPLIT_K"))
        return int(self.config["BLOCK_K"] * math.prod(steps))

    def kernel(self, target: Target) -> Kernel:
        """Of the shape itself."""
        case = self.case(self.shape["K"], self.shape["J"])
        pdl = "pdl" in target.features
        if isinstance(case, lowbit_cases.Case):
            return case.kernel(self.config, pdl)
        return case.kernel(self.template, self.config, pdl=pdl)

    def errors(self, K: int, J: int) -> tuple[float, float]:
        """Against fp64, of the kernel and of torch in the product's own dtype."""
        case = self.case(K, J)
        if isinstance(case, lowbit_cases.Case):
            of = lowbit_cases.Data.of(case, self.shape["N"])
            return of.error(of.run(self.config)), of.error(of.plain(torch.bfloat16))
        data = Data.of(case, self.shape["N"])
        return data.error(data.run(self.template, self.config)), data.error(data.plain(case.dtype))


@cache
def tuned(isa: str = "*") -> list[Tuned]:
    """Each template and config of a product once for each kind of it, of the table of this isa or of all."""
    found: dict[str, Tuned] = {}
    for path in sorted(tuning.TABLES.glob(f"{isa}.json")):
        for entry in tuning.table(path.stem).values():
            if entry["template"] not in PRODUCTS:
                continue
            one = Tuned(entry["template"], entry["shape"], entry["dtype"], entry["config"])
            found.setdefault(f"{one} {one.dtype}", one)
    return list(found.values())


def test_entries_are_of_the_kernels_there_are() -> None:
    assert tuned()
    for path in sorted(tuning.TABLES.glob("*.json")):
        for key, entry in tuning.table(path.stem).items():
            assert entry["source"] == tuning.source_hash(entry["template"]), f"{key}: measure again"
            # attention's are tried in test_attention_kernels and test_attention_xcompile
            assert entry["template"] in (*PRODUCTS, "decode_attention"), "a template that is not tried"


def interpreted() -> list[Tuned]:
    """One of those that differ only by what an interpreter does not know."""
    found: dict[str, Tuned] = {}
    for one in tuned():
        known = {name: value for name, value in one.config.items() if name not in ("num_warps", "num_stages")}
        found.setdefault(f"{replace(one, config=known)} {one.dtype}", one)
    return list(found.values())


@pytest.mark.interp
@pytest.mark.parametrize("one", interpreted(), ids=str)
def test_a_config_computes_the_product(one: Tuned) -> None:
    """Two steps along K and two blocks of J, with a rest where the shape has one."""
    rest = 8 * bool(one.shape["K"] % one.span) if not one.shape.get("ORDERED") else 0
    ours, theirs = one.errors(2 * one.span + rest, 2 * one.config["BLOCK_J"])
    assert ours <= 1.5 * theirs


@pytest.mark.xcompile
@pytest.mark.timeout(600)
@pytest.mark.parametrize("isa", [path.stem for path in sorted(tuning.TABLES.glob("*.json"))])
def test_configs_compile_for_the_gpu_they_were_measured_on(isa: str) -> None:
    target = Target.parse(f"cuda:{isa}")
    kernels = {one.kernel(target): one for one in tuned(isa)}
    made = cubin_parallel.compile_all(kernels, target)
    assert made.keys() == set(kernels)
    assert {found.pdl for found in made.values()} == {"pdl" in target.features}
    if isa == "sm_90":
        for kernel, one in kernels.items():
            if one.template == "lowbit":
                check_operands(one, made[kernel])


def check_operands(one: Tuned, made: cubin.Cubin) -> None:
    """Weights become a product's operand where they were loaded, and stay there until it has read them."""
    repeated = undisturbed(made, one)
    count = names(repeated)
    # for the squares of x, where a lane has few neighbouring columns of it: of eight bytes each, where lanes spread
    spread = one.shape["N"] == 1 and one.config["SLICES"] > 1 and own(scheme_of(one.dtype)) == 32
    assert count["SHFL"] <= one.shape["NORM"] * (1 + spread), one
    if one.shape["ORDERED"]:
        assert not count["STS"] + count["STSM"], one
    columns = one.config["BLOCK_K"] * one.config["SLICES"] * one.config["UNROLL"]
    weights = one.shape["PARTS"] * one.config["BLOCK_J"] * columns / (32 * one.config["num_warps"])
    groups = one.config["num_warps"] / 4 if one.config["WIDE"] else 1  # of warps, who share what is not the weights'
    assert len(repeated) / weights <= 4.8 * groups, one


@pytest.mark.xcompile
@pytest.mark.parametrize("isa", ISAS)
def test_sampling_compiles_for_every_gpu(isa: str) -> None:
    target = Target.parse(f"cuda:{isa}")
    for vocab, dtype in ((128256, "bfloat16"), (1000, "float32")):
        (kernel,) = sampling_code(vocab, dtype, 16, target).kernels()
        made = cubin.compile_kernel(kernel, target)
        assert (made.spills, made.pdl) == (0, "pdl" in target.features)
