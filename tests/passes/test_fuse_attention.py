"""fuse: which attentions are kernels, the same ones that the templates take, and the order of their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from llmopt.compiler.capture import capture
from llmopt.compiler.emittable import attention_shape, keeps_order, puts_tokens_first
from llmopt.compiler.graph import Graph, target_name
from llmopt.compiler.pipeline import Context, Pipeline, verify_hook
from llmopt.compiler.program import ModelFacts
from llmopt.compiler.recipe import RECIPES
from llmopt.compiler.target import Target
from llmopt.passes import Canonicalize, Fuse, InsertKVCache, QuantizeKV, RaiseAten
from llmopt.passes.fuse import notes
from llmopt.passes.fusible import reason_against
from llmopt.passes.partition import partition

F = nn.functional
GPU = Context(Target.parse("cuda:sm_90"), RECIPES["default"], None)
Tail = Callable[[Tensor], Tensor]


def in_order(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


class Heads(nn.Module):
    """Attention of so many query and key/value heads; `tail` makes [1, N, H * D] of [1, H, N, D]."""

    def __init__(self, heads: int, kv_heads: int, size: int, tail: Tail) -> None:
        super().__init__()
        self.sizes, self.shapes = (
            [heads * size, kv_heads * size, kv_heads * size],
            [(h, size) for h in (heads, kv_heads)],
        )
        self.embed, self.qkv = nn.Embedding(96, 32), nn.Linear(32, sum(self.sizes), bias=False)
        self.norm, self.o = nn.RMSNorm(32), nn.Linear(heads * size, 32, bias=False)
        self.head, self.tail = nn.Linear(32, 96, bias=False), tail

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        q, k, v = (
            x.unflatten(-1, self.shapes[min(i, 1)]).transpose(1, 2)
            for i, x in enumerate(self.qkv(h).split(self.sizes, -1))
        )
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head(self.norm(h + self.o(self.tail(o))))


def step_of(heads: int = 2, kv_heads: int = 2, size: int = 16, tail: Tail = in_order, fused: bool = True) -> Graph:
    torch.manual_seed(0)
    program = capture(Heads(heads, kv_heads, size, tail).eval(), ModelFacts("heads", 96, 64))
    passes = (RaiseAten(), Canonicalize(), InsertKVCache(), *([Fuse()] if fused else []))
    return Pipeline(passes, [verify_hook]).run(program, GPU).graph("step")


@pytest.mark.parametrize("sizes", [(2, 2, 16), (128, 1, 4), (160, 1, 4), (2, 2, 512)], ids=str)
def test_the_partition_takes_what_the_templates_take_and_gives_their_reason(sizes: tuple[int, int, int]) -> None:
    pytest.importorskip("triton")
    from llmopt.codegen.templates import decode_attention, prefill_attention

    step = step_of(*sizes, fused=False)
    (attend,) = step.calls("attend")
    for template in (decode_attention, prefill_attention):
        assert reason_against(attend, GPU.target) == template.supports(attention_shape(attend), "float32", GPU.target)
    said = [note for note in notes(partition(step, GPU.target), GPU.target) if note.startswith("by torch: attend")]
    assert bool(said) == (sizes[0] == 160 or sizes[2] == 512)
    assert said == [f"by torch: attend: {reason_against(attend, GPU.target)} (x1)"] * len(said)


@pytest.mark.parametrize(("at", "name"), [(3, "tables"), (5, "positions"), (6, "sinks")])
def test_what_attention_reads_ahead_is_not_computed_in_the_step(at: int, name: str) -> None:
    step = step_of(fused=False)
    (attend,) = step.calls("attend")
    assert reason_against(attend, GPU.target) is None
    computed(step, attend, at, attend.args[5] if at == 6 else attend.args[at])
    assert (reason_against(attend, GPU.target) or "").startswith(f"its {name} are computed in the step; wanted")
    (write, _) = step.calls("kv_write")
    assert reason_against(write, GPU.target) == reason_against(attend, GPU.target)


def test_slots_are_not_computed_in_the_step() -> None:
    step = step_of(fused=False)
    for write in step.calls("kv_write"):
        computed(step, write, 2, write.args[2])
    (attend,) = step.calls("attend")
    assert (reason_against(attend, GPU.target) or "").startswith("its slots are computed")


def test_a_norm_whose_weight_is_computed_in_the_step_is_apart_from_the_product() -> None:
    for changed in (False, True):
        step = step_of(fused=False)
        (norm,) = step.calls("rms_norm")
        if changed:
            computed(step, norm, 1, norm.args[1])
        found = [k for k in partition(step, GPU.target) if norm in k.nodes]
        assert [k.kind for k in found] == ["rows" if changed else "gemm"]


def computed(step: Graph, node: fx.Node, at: int, source: object) -> None:
    """Argument `at` doubled in the step."""
    assert isinstance(source, fx.Node)
    with step.fx.inserting_before(node):
        made = step.fx.call_function(torch.ops.aten.add.Tensor, (source, source))
    made.meta["val"] = source.meta["val"]
    node.update_arg(at, made)


def near_step(page: int, dtype: torch.dtype = torch.bfloat16, tail: Tail = in_order) -> Graph:
    torch.manual_seed(0)
    program = capture(Heads(16, 16, 16, tail).to(dtype).eval(), ModelFacts("heads", 96, 64, dtype=dtype))
    passes = (RaiseAten(), Canonicalize(), InsertKVCache(), QuantizeKV(sinks=1, recent=4), Fuse())
    context = replace(GPU, recipe=replace(RECIPES["int4-kv"], page_size=page))
    return Pipeline(passes, [verify_hook]).run(program, context).graph("step")


@pytest.mark.parametrize("tail", ["in order", "in order and not"])
def test_near_tokens_are_written_by_the_kernel_that_attends(tail: str) -> None:
    step = near_step(4, tail=TAILS[tail])
    (attend,) = step.calls("attend_near")
    inside = [n for n in step.calls() if n.meta["kernel"] == attend.meta["kernel"]]
    names = [target_name(n) for n in inside]
    assert names.count("kv_write") == names.count("near_write") == 2
    assert all(n.args[5] is attend for n in step.calls("near_write"))
    kernels = partition(step, GPU.target)
    (found,) = (kernel for kernel in kernels if attend in kernel.nodes)
    assert found.kind == "attention"
    assert "by torch: attention of prompts, since" in "\n".join(notes(kernels, GPU.target))


@pytest.mark.parametrize(
    ("page", "dtype", "said"),
    [
        (2, torch.bfloat16, "pages of 2 tokens hold no whole row of 16 channels as it is; wanted larger ones"),
        (16, torch.float32, "dtype float32: packed keys and values are multiplied in bfloat16"),
    ],
)
def test_near_tokens_that_no_kernel_takes_are_torch_s(page: int, dtype: torch.dtype, said: str) -> None:
    step = near_step(page, dtype)
    for name in ("attend_near", "kv_write", "near_write"):
        assert {reason_against(node, GPU.target) for node in step.calls(name)} == {said}
    assert f"by torch: attend_near: {said} (x1)" in notes(partition(step, GPU.target), GPU.target)


TAILS: dict[str, Tail] = {
    "in order": in_order,
    "scaled by head": lambda o: in_order(o * torch.arange(1, 17, dtype=o.dtype)[:, None, None]),
    "channels before heads": lambda o: o.permute(0, 2, 3, 1).flatten(2),
    "in order and not": lambda o: in_order(o) + in_order(o.relu()),
    "head by head": lambda o: torch.cat([o[:, i] for i in range(16)], -1),
}


@pytest.mark.parametrize("name", TAILS)
def test_an_attention_s_kernel_ends_with_its_result_token_by_token(name: str) -> None:
    """Of as many heads as channels, so that no shape tells the one order from the other."""
    step = step_of(16, 16, 16, TAILS[name])
    (attend,) = step.calls("attend")
    (turned,) = attend.users
    assert puts_tokens_first(turned)
    inside = [n for n in step.calls() if n.meta["kernel"] == attend.meta["kernel"]]
    (result,) = (n for n in inside if target_name(n) != "kv_write" and any(u not in inside for u in n.users))
    assert result is turned or keeps_order(result)
    assert turned in inside
