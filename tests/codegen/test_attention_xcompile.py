"""The attention kernels compiled for GPUs that are not there, and what stands in the machine code for sm_90."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attention_cases import HOOKS, ISAS, SHAPE, attention_entries

from llmopt.codegen import cubin
from llmopt.codegen.kernel import Kernel
from llmopt.codegen.machine_code import instructions
from llmopt.codegen.splits import splits as splits_for
from llmopt.codegen.templates import decode_attention as decode
from llmopt.codegen.templates import prefill_attention as prefill
from llmopt.compiler.target import Target

pytestmark = pytest.mark.xcompile


def constants(shape: dict[str, int], settings: dict[str, Any], config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    base = {"SCALE": 0.125, "WINDOW": 0, "SOFTCAP": 0.0}
    kept = {name: value for name, value in config.items() if not name.startswith("num_")}
    return tuple({**shape, **base, **settings, **kept}.items())


def decoding(
    target: Target, shape: dict[str, int], config: dict[str, Any], dtype: str, sinks: bool = False, **settings: Any
) -> Kernel:
    p = {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = {"k_pages": p, "v_pages": p, "tables": "*i64", "positions": "*i64", "slots": "*i64"}
    types |= {**({"sinks": p} if sinks else {}), "out": p, "partial": "*fp32", "lse": "*fp32", "tickets": "*i32"}
    types |= {"e0": p, "e1": p, "e2": p, "N": "i32", "M": "i32", "SPLITS": "i32"}
    pdl = "pdl" in target.features
    none = tuple((name, None) for name in ("e3", "e4", "e5", *(() if sinks else ("sinks",))))
    hooks = (("LOAD_Q", "load_q"), ("LOAD_K", "load_k"), ("LOAD_V", "load_v"))
    return Kernel(
        "decode_attention:decode_attention", tuple(types.items()),
        (*constants(shape, settings, config), ("ORDER", 0), ("PDL", pdl), *none), hooks, HOOKS,
        config["num_warps"], config["num_stages"], pdl,
    )  # fmt: skip


def prompts(shape: dict[str, int], config: dict[str, Any], dtype: str, sinks: bool = False, **settings: Any) -> Kernel:
    p = {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = {"q": p, "k_pages": p, "v_pages": p, "tables": "*i64", "tiles": "*i32"}
    types |= {**({"sinks": p} if sinks else {}), "out": p, "M": "i32"}
    none = (*(() if sinks else (("sinks", None),)), ("K_KIND", ""), ("V_KIND", ""), ("V_ORDER", 1))
    return Kernel(
        "prefill_attention:prefill_attention", tuple(types.items()), (*constants(shape, settings, config), *none),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


def test_configs_of_the_tables_compile() -> None:
    target = Target.parse("cuda:sm_90")  # the one that has a table
    for entry in attention_entries():
        shape = {name: size for name, size in entry["shape"].items() if name != "N"}
        made = cubin.compile_kernel(decoding(target, shape, entry["config"], entry["dtype"]), target)
        assert made.spills == 0, entry


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_defaults_compile_for_every_gpu(isa: str, dtype: str) -> None:
    target = Target.parse(f"cuda:{isa}")
    made = cubin.compile_kernel(decoding(target, SHAPE, decode.configs(SHAPE, dtype, target)[0], dtype), target)
    assert made.spills == 0
    made = cubin.compile_kernel(prompts(SHAPE, prefill.configs(SHAPE, dtype, target)[0], dtype), target)
    assert made.spills == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256)], ids=str)
def test_prompts_in_fp32_fit_every_gpu_and_hardly_spill(dims: tuple[int, int], isa: str) -> None:
    shape, target = {**SHAPE, "D": dims[0], "DV": dims[1]}, Target.parse(f"cuda:{isa}")
    assert prefill.supports(shape, "float32", target) is None
    config = prefill.configs(shape, "float32", target)[0]
    assert cubin.compile_kernel(prompts(shape, config, "float32"), target).spills <= 8


def test_prompts_that_no_tile_fits_are_not_taken() -> None:
    target = replace(Target.parse("cuda:sm_89"), shared_bytes=49152)
    for size, dtype, fits in ((64, "float32", True), (256, "float32", False), (256, "bfloat16", False)):
        shape = {**SHAPE, "D": size, "DV": size}
        reason = prefill.supports(shape, dtype, target)
        assert (reason is None) == fits == bool(prefill.configs(shape, dtype, target))
        assert fits or "49152 bytes of shared memory" in str(reason)


@pytest.mark.parametrize(
    ("heads", "dims", "settings"),
    [
        ((32, 32), (128, 128), {}),
        ((16, 2), (256, 256), {"SOFTCAP": 50.0, "WINDOW": 4096}),
        ((71, 1), (64, 64), {}),
        ((14, 2), (80, 96), {"sinks": True}),
    ],
    ids=str,
)
def test_other_heads_compile_and_hardly_spill(
    heads: tuple[int, int], dims: tuple[int, int], settings: dict[str, Any]
) -> None:
    target = Target.parse("cuda:sm_90")
    shape = {"HQ": heads[0], "HKV": heads[1], "D": dims[0], "DV": dims[1], "PAGE": 64}
    config = decode.configs(shape, "bfloat16", target)[0]
    assert cubin.compile_kernel(decoding(target, shape, config, "bfloat16", **settings), target).spills <= 8
    config = prefill.configs(shape, "bfloat16", target)[0]
    assert cubin.compile_kernel(prompts(shape, config, "bfloat16", **settings), target).spills <= 8


def test_keys_and_values_arrive_by_asynchronous_copies_of_16_bytes() -> None:
    target = Target.parse("cuda:sm_90")
    config = decode.configs(SHAPE, "bfloat16", target)[0]
    code = instructions(cubin.compile_kernel(decoding(target, SHAPE, config, "bfloat16"), target).data)
    copies = [text for text in code if text.startswith("LDGSTS")]
    assert len(copies) >= 2 * config["BLOCK_T"] * 128 * 2 // (16 * 32 * config["num_warps"])
    assert all(".128" in copy for copy in copies)


def in_order(made: cubin.Cubin) -> list[str]:
    """Instructions and labels: ACQBULK waits for the kernel ahead, PREEXIT lets the next one start."""
    found = instructions(made.data)
    assert found.count("ACQBULK") == 1
    return found


@pytest.mark.parametrize("tile", [(32, 1), (64, 4)], ids=str)
def test_first_keys_are_read_and_nothing_written_before_the_wait(tile: tuple[int, int]) -> None:
    target = Target.parse("cuda:sm_90")
    plain = (c for c in decode.configs(SHAPE, "bfloat16", target) if (c["BLOCK_T"], c["num_warps"]) == tile)
    config = {**next(plain), "PEEL": 1, "AHEAD": 1, "EARLY": 1}
    keys = 2 * tile[0] // tile[1]  # keys and values a warp
    made = cubin.compile_kernel(decoding(target, SHAPE, config, "bfloat16"), target)
    assert made.spills == 0
    found = in_order(made)
    wait = found.index("ACQBULK")
    ahead, after = found[:wait], found[wait:]
    assert sum(".128" in name for name in ahead if name.startswith("LDG")) == keys * 128 * 2 // (16 * 32)
    assert sum(".PF2" in name for name in ahead) == keys * 2 // 32
    assert not any(name.startswith(("STG", "ATOM", "RED")) for name in ahead)
    assert ahead.index("PREEXIT") < next(i for i, name in enumerate(ahead) if name.startswith("LDG"))
    assert any(name.startswith("STG") for name in after)


def test_without_early_the_next_kernel_starts_after_the_last_keys() -> None:
    target = Target.parse("cuda:sm_90")
    config = decode.configs(SHAPE, "bfloat16", target)[0]
    found = in_order(cubin.compile_kernel(decoding(target, SHAPE, config, "bfloat16"), target))
    assert found.index("PREEXIT") > max(i for i, name in enumerate(found) if name.startswith("LDGSTS"))


def test_rows_let_the_next_kernel_start_after_their_own_wait() -> None:
    """What attention reads before its wait rests on this: the first kernel of a step is one over rows."""
    text = (Path(decode.__file__).parent / "rows.py").read_text()
    assert -1 < text.find("gdc_wait()") < text.find("gdc_launch_dependents()")


def test_a_product_from_registers_has_ended_before_they_are_used_again() -> None:
    target = Target.parse("cuda:sm_90")
    config = prefill.configs(SHAPE, "bfloat16", target)[0]
    drained, plain = (
        cubin.compile_kernel(prompts(SHAPE, {**config, "DRAIN": drain}, "bfloat16"), target) for drain in (1, 0)
    )
    assert config["DRAIN"] == 1
    waits = ["\n".join(instructions(made.data)).count("WARPGROUP.DEPBAR") for made in (drained, plain)]
    assert waits[0] > waits[1]


def overwritten(code: list[str]) -> list[str]:
    """What comes, before a wait, behind a wgmma that reads its left operand from registers: the loop's next turn, and
    writes to those registers."""
    found, held = [], set()
    for text in code:
        if left := re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", text):
            held |= {f"R{int(left[1]) + i}" for i in range(4)}
        elif re.match(r"WARPGROUP\.DEPBAR\S* gsb0, 0x0", text):
            held = set()
        elif held and (text.startswith("BRA") or held & set(re.findall(r"^\S+ (R\d+)", text))):
            found.append(text)
    return found


@pytest.mark.parametrize(("group", "size"), [(33, 128), (71, 64), (128, 64)])
def test_many_heads_a_key_wait_for_products_from_registers(group: int, size: int) -> None:
    target, shape = Target.parse("cuda:sm_90"), {"HQ": group, "HKV": 1, "D": size, "DV": size, "PAGE": 16}
    config = decode.configs(shape, "bfloat16", target)[0]
    drained, plain = (
        cubin.compile_kernel(decoding(target, shape, {**config, "DRAIN": drain}, "bfloat16"), target)
        for drain in (config["DRAIN"], 0)
    )
    assert overwritten(instructions(plain.data))
    assert not overwritten(instructions(drained.data))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"D": 512}, "head size 512"), ({"PAGE": 24}, "power of two"), ({"HQ": 20}, "no whole group")],
)
def test_what_is_not_taken_has_a_reason(change: dict[str, int], reason: str) -> None:
    target = Target.parse("cuda:sm_90")
    for module in (decode, prefill):
        assert reason in (module.supports({**SHAPE, **change}, "bfloat16", target) or "")
        assert module.supports(SHAPE, "bfloat16", target) is None
        assert "float64" in (module.supports(SHAPE, "float64", target) or "")


@pytest.mark.parametrize(
    ("batch", "context", "low", "high"),
    [
        # one tile a part
        (1, 256, 4, 4), (1, 512, 8, 8), (1, 1024, 16, 16),
        # a program a multiprocessor, then four
        (1, 2048, 16, 16), (4, 1024, 8, 8), (16, 512, 4, 4), (16, 1024, 4, 4),
        # long contexts
        (1, 131072, 64, 66), (8, 32768, 8, 8), (64, 8192, 1, 1), (64, 64, 1, 1),
    ],
)  # fmt: skip
def test_parts_fill_the_gpu_and_none_is_empty(batch: int, context: int, low: int, high: int) -> None:
    parts = splits_for(batch, 8, context, Target.parse("cuda:sm_90"))
    assert low <= parts <= high
    chunk = math.ceil(context / parts / 64) * 64
    assert (parts - 1) * chunk < context
