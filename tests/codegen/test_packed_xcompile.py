"""The kernels of packed keys and values compiled for GPUs that are not there, and the machine code for sm_90."""

from __future__ import annotations

import re
from typing import Any

import pytest
from attention_cases import HOOKS, ISAS, SHAPE
from sass import loop, names

from llmopt.codegen import cubin
from llmopt.codegen.kernel import Kernel
from llmopt.codegen.machine_code import instructions
from llmopt.codegen.templates import decode_packed, prefill_attention, write_packed
from llmopt.compiler.target import Target

pytestmark = pytest.mark.xcompile

LOADS = (("LOAD_Q", "load_q"), ("LOAD_K", "load_k"), ("LOAD_V", "load_v"))
SETTINGS = {"SCALE": 0.125, "WINDOW": 0, "SOFTCAP": 0.0}
PACKINGS = (("int4", 128, "int4", 64), ("int8", 1, "fp8", 1), ("nvfp4", 1, "nvfp4", 1))


def kernel(
    template: str, types: dict[str, str], config: dict[str, Any], packing: tuple[Any, ...], **more: Any
) -> Kernel:
    """Of bf16 operands, `packing` as kinds and orders."""
    how = dict(zip(("K_KIND", "K_ORDER", "V_KIND", "V_ORDER"), packing, strict=True))
    if template == "prefill_attention":
        how.pop("K_ORDER")
    tuned = {name: value for name, value in config.items() if not name.startswith("num_")}
    hooks = LOADS if template != "prefill_attention" else ()
    return Kernel(
        f"{template}:{template}", tuple(types.items()), tuple({**SHAPE, **more, **how, **tuned}.items()), hooks,
        HOOKS if hooks else "", config["num_warps"], config["num_stages"], bool(more.get("PDL")),
    )  # fmt: skip


def decoding(target: Target, config: dict[str, Any], packing: tuple[Any, ...], **more: Any) -> Kernel:
    types = {"k_pages": "*u8", "v_pages": "*u8", "tables": "*i64", "positions": "*i64", "slots": "*i64", "out": "*bf16"}
    types |= {"partial": "*fp32", "lse": "*fp32", "tickets": "*i32", "e0": "*bf16", "e1": "*bf16", "e2": "*bf16"}
    types |= {"N": "i32", "M": "i32", "SPLITS": "i32"}
    none = dict.fromkeys(("sinks", "e3", "e4", "e5"))
    pdl = "pdl" in target.features
    return kernel("decode_packed", types, config, packing, **SETTINGS, ORDER=0, PDL=pdl, **none, **more)


def writing(target: Target, packing: tuple[Any, ...]) -> Kernel:
    types = {"q_out": "*bf16", "k_out": "*bf16", "v_out": "*bf16", "k_pages": "*u8", "v_pages": "*u8", "slots": "*i64"}
    types |= {"e0": "*bf16", "e1": "*bf16", "e2": "*bf16"}
    config = write_packed.configs(SHAPE, "bfloat16", target)[0]
    return kernel(
        "write_packed", types, config, packing, PDL="pdl" in target.features, **dict.fromkeys(("e3", "e4", "e5"))
    )


def prompts(config: dict[str, Any], packing: tuple[Any, ...], **more: Any) -> Kernel:
    types = {"q": "*bf16", "k_pages": "*u8", "v_pages": "*u8", "tables": "*i64", "tiles": "*i32", "out": "*bf16"}
    return kernel("prefill_attention", {**types, "M": "i32"}, config, packing, **SETTINGS, sinks=None, **more)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_every_isa(isa: str, packing: tuple[Any, ...]) -> None:
    target = Target.parse(f"cuda:{isa}")
    shape = {**SHAPE, "N": 1, "INT4": packing[0] == "int4"}
    first = decode_packed.configs(shape, "bfloat16", target)[0]
    made = [decoding(target, first, packing)]
    if isa in ("sm_80", "sm_90"):
        made.append(writing(target, packing))
        made.append(prompts(prefill_attention.configs({**SHAPE, "PACKED": 1}, "bfloat16", target)[0], packing))
    for one in made:
        found = cubin.compile_kernel(one, target)
        assert found.spills <= (8 if isa == "sm_80" else 0), one.template  # there two registers of what runs once


@pytest.mark.parametrize("isa", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_wide_heads_hardly_spill(isa: str, packing: tuple[Any, ...]) -> None:
    """Of 256 channels, such as Gemma's; 160 are padded to as many."""
    target, heads = Target.parse(f"cuda:{isa}"), {"HQ": 8, "HKV": 2, "D": 256, "DV": 256}
    shape = {**SHAPE, **heads, "N": 1, "INT4": packing[0] == "int4"}
    config = decode_packed.configs(shape, "bfloat16", target)[0]
    assert cubin.compile_kernel(decoding(target, config, packing, **heads), target).spills == 0
    config = prefill_attention.configs({**shape, "PACKED": 1}, "bfloat16", target)[0]
    # nine registers of what runs once, of codes that are pairs of numbers and scales
    assert cubin.compile_kernel(prompts(config, packing, **heads), target).spills <= 36


@pytest.mark.parametrize(
    ("isa", "packing", "first", "recent"),
    [
        *((isa, PACKINGS[0], 4, 64) for isa in ISAS),
        *(("sm_90", packing, 4, 64) for packing in PACKINGS[1:]),
        ("sm_90", PACKINGS[0], 4, 0),
    ],
)
def test_near_tokens_take_no_more_registers_than_there_are(
    isa: str, packing: tuple[Any, ...], first: int, recent: int
) -> None:
    target = Target.parse(f"cuda:{isa}")
    shape = {**SHAPE, "N": 1, "INT4": packing[0] == "int4"}
    config = decode_packed.configs(shape, "bfloat16", target)[0]
    kernel = decoding(target, config, packing, FIRST=first, RECENT=recent)
    assert cubin.compile_kernel(kernel, target).spills == 0


def test_a_wgmma_over_near_values_reads_them_from_shared_memory() -> None:
    """From registers it would have to be drained (`paged.drain`). So many heads have four warps, which can do it."""
    target, heads = Target.parse("cuda:sm_90"), {"HQ": 64, "HKV": 2}
    config = decode_packed.configs({**SHAPE, **heads, "N": 1, "INT4": 1}, "bfloat16", target)[0]
    made = [
        "\n".join(
            instructions(cubin.compile_kernel(decoding(target, config, PACKINGS[0], **heads, **near), target).data)
        )
        for near in ({}, {"FIRST": 4, "RECENT": 64})
    ]
    from_registers, from_shared = (r"HGMMA\S* R\d+, R\d+, gdesc", r"HGMMA\S* R\d+, gdesc\S+, R")
    assert len({len(re.findall(from_registers, code)) for code in made}) == 1
    assert [len(re.findall(from_shared, code)) for code in made] == [0, 2]


def test_a_tile_reaches_the_tensor_cores_without_moving_between_lanes() -> None:
    """Two bits of arithmetic a code: with the softmax at most 30 instructions a key of 256 codes and warp."""
    target = Target.parse("cuda:sm_90")
    for config in decode_packed.configs({**SHAPE, "N": 1, "INT4": 1}, "bfloat16", target)[:3]:
        made = cubin.compile_kernel(decoding(target, config, PACKINGS[0]), target)
        counted = names(loop(instructions(made.data)))
        assert made.spills == 0, config
        assert counted["SHFL"] <= 16, config  # of the maximum over a tile's keys
        assert counted["HMMA"] == config["BLOCK_T"], config
        assert sum(counted.values()) <= 30 * config["BLOCK_T"], config


def test_codes_come_by_copies_of_16_bytes() -> None:
    target = Target.parse("cuda:sm_90")
    config = decode_packed.configs({**SHAPE, "N": 1, "INT4": 1}, "bfloat16", target)[0]
    text = "\n".join(instructions(cubin.compile_kernel(decoding(target, config, PACKINGS[0]), target).data))
    assert len(re.findall(r"LDGSTS\.E\.(?:\w+\.)*128", text)) >= 8
