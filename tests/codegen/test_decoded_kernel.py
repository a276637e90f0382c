"""The kernel that decodes low-bit weights for torch's product: every scheme, bit by bit, and that GPUs take it."""

from __future__ import annotations

import pytest
import torch
from interpreted import rounding

from llmopt.codegen import cubin_parallel
from llmopt.codegen.fused_lowbit import types_of_laid
from llmopt.codegen.kernel import Kernel
from llmopt.codegen.lowbit_layout import constants, lay
from llmopt.compiler.quant import SCHEMES, quantize
from llmopt.compiler.target import Target


def kernel(scheme: str, rows: int, columns: int, config: dict[str, int], pdl: bool = False) -> Kernel:
    """Of a weight [rows, columns]."""
    kind = SCHEMES[scheme]
    names = {"w": "words", "scales": "scales", "factor": "factor"}
    types = {name: types_of_laid(kind)[result] for name, result in names.items()}
    given = [(name, type_) for name, type_ in types.items() if type_ is not None]
    absent = {name: None for name, type_ in types.items() if type_ is None}
    fixed = {**constants(kind), **absent, "K": columns, "J": rows, "BLOCK_J": config["BLOCK_J"], "PDL": pdl}
    options = {key: config[key] for key in ("num_warps", "num_stages")}
    return Kernel("decoded:decoded", (*given, ("y", "*bf16")), tuple(fixed.items()), pdl=pdl, **options)


@pytest.mark.interp
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_gives_the_weights_rounded_once(scheme: str) -> None:
    """Rows that fill no block, columns that fill no span."""
    from llmopt.codegen.interpret import launcher
    from llmopt.codegen.templates import decoded

    torch.manual_seed(0)
    rows, columns = 41, 296
    q = quantize(torch.randn(rows, columns) * torch.logspace(-1, 1, rows)[:, None], scheme)
    laid = lay(q.packed(), q.scales, q.global_scale, q.zero_points, scheme, columns)
    config = decoded.configs({"K": columns, "J": rows}, scheme, Target.parse("cuda:sm_90"))[0]
    y = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    given = [t for t in (laid.words, laid.scales, laid.factor) if t is not None]
    with rounding():
        grid = decoded.grid({"K": columns, "J": rows}, config)
        launcher(kernel(scheme, rows, columns, config))(grid, [*given, y])
    assert torch.equal(y, q.dequantize(torch.float64).bfloat16())


@pytest.mark.xcompile
@pytest.mark.parametrize("isa", ["sm_80", "sm_90", "sm_120"])
def test_it_compiles_without_spills(isa: str) -> None:
    from llmopt.codegen.templates import decoded

    target = Target.parse(f"cuda:{isa}")
    pdl = "pdl" in target.features
    configs = {s: decoded.configs({"K": 4096, "J": 6144}, s, target)[0] for s in ("nvfp4", "mxfp6_e3m2", "int4_g32")}
    made = cubin_parallel.compile_all([kernel(s, 6144, 4096, config, pdl) for s, config in configs.items()], target)
    assert [(found.spills, found.pdl) for found in made.values()] == [(0, pdl)] * 3
