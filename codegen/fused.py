"""The code of a region that `fuse` has cut: which kernels it calls for a class of shapes, with what arguments.

Classes "1", "8", ... "64" are decoding steps of so many tokens at most, each of its own sequence; there a region is
one kernel:

    gemm       y = EPILOGUE(W . NORM(x))       gemv for one token, else gemm; lowbit where W has few bits
    attention  q, k, v made from the products before, k and v stored, attend      decode_attention
    rotation   y = rotate(x)                   rotated, in class "many", too; also behind the product that makes x
    rows       everything without an anchor    rows

Class "many" is any other step: the product is torch's (cuBLAS, low-bit weights decoded first), attention works on
tiles of queries, and what stands before and behind them are kernels over rows. Attention that sees some tokens as they
are, in packed pages, is torch's there.

A product whose activations are rounded, too, is two kernels in every class: `rounded` (or `rotated_codes`, which turns
them first) and `scaled`.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmopt.codegen.fused_attention import attention, many_attention
from llmopt.codegen.fused_product import many_product, product
from llmopt.codegen.fused_region import FusedRegion
from llmopt.codegen.fused_rotation import MANY_TOKENS, rotation
from llmopt.codegen.fused_scaled import is_scaled, scaled_product
from llmopt.codegen.kernel import RegionCode
from llmopt.compiler.emittable import ATTENDS, op_name
from llmopt.compiler.errors import BuildError, EmitError
from llmopt.compiler.graph import Graph
from llmopt.compiler.target import Target

MANY = "many"


def region_code(graph: Graph, shape: str, target: Target, ordered: Mapping[str, int] | None = None) -> RegionCode:
    """The code of a region for a class of shapes; `ordered`: its arguments that `handed_over` says stand in order.
    Raises BuildError: no template takes it as it is."""
    region = FusedRegion.of(graph, target, ordered)
    try:
        tokens = MANY_TOKENS if shape == MANY else int(shape)
        if any(op_name(node) in ATTENDS for node in region.graph.calls()):
            many_attention(region) if shape == MANY else attention(region, tokens)
        elif any(map(is_scaled, region.products())):
            scaled_product(region, tokens)
        elif region.products():
            many_product(region) if shape == MANY else product(region, tokens)
        elif list(region.graph.calls("rotate")):
            rotation(region, region.result(), "out0", tokens)
        else:
            _rows(region)
    except EmitError as error:
        raise BuildError(
            f"region {graph.name} for class {shape}: {error}; set LLMOPT_PROVIDER=reference to run the model by "
            "torch's own ops, and report the model"
        ) from error
    calls, temporaries = tuple(region.calls), tuple(region.temporaries)
    return RegionCode(calls, region.outputs, temporaries, tuple(region.notes), tuple(region.prepared))


def _rows(region: FusedRegion) -> None:
    outputs = {n: f"out{i}" for i, n in enumerate(region.graph.outputs())}
    region.rows(outputs, region.tokens(next(iter(outputs))))
