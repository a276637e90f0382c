"""fuse: how many kernels models become, and what may not share one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from models.families import FAMILIES
from passes_common import context, llama
from torch import Tensor, fx, nn

from llmopt.compiler.capture import capture
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.graph import Graph, target_name
from llmopt.compiler.pipeline import Context, Pipeline, verify_hook
from llmopt.compiler.program import ModelFacts, Program
from llmopt.compiler.recipe import RECIPES
from llmopt.compiler.target import Target
from llmopt.passes import Canonicalize, Fuse, InsertKVCache, Lower, RaiseAten

# kernels of a layer; besides them there are the embedding, cos and sin, the choice of rows, and the head
PER_LAYER = {
    "Llama": 5, "Qwen3": 5, "Phi-2": 5, "Cohere": 5, "GPT-NeoX": 6, "Gemma 2": 7, "Gemma 3": 7, "OLMo 2": 9,
}  # fmt: skip
BESIDES = 4
BEFORE = (RaiseAten(), Canonicalize(), InsertKVCache())


def gpu() -> Context:
    return Context(Target.parse("cuda:sm_90"), RECIPES["default"], None)


def fused(program: Program) -> tuple[Graph, Pipeline]:
    pipeline = Pipeline((*BEFORE, Fuse()), [verify_hook])
    return pipeline.run(program, gpu()).graph("step"), pipeline


@cache
def family(name: str) -> tuple[Graph, Pipeline]:
    (found,) = (f for f in FAMILIES if f.name == name)
    return fused(capture_model(found.model()))


def kernels(step: Graph) -> dict[int, list[fx.Node]]:
    """Nodes by kernel, in the order the kernels run."""
    found: dict[int, list[fx.Node]] = {}
    for node in step.calls():
        found.setdefault(node.meta["kernel"], []).append(node)
    return dict(sorted(found.items()))


def names(nodes: list[fx.Node]) -> set[str]:
    """What a kernel calls, views left out."""
    views = {"getitem", "aten.reshape", "aten.transpose", "aten.split_with_sizes", "aten.unsqueeze", "aten.select"}
    return {target_name(n) for n in nodes} - views


@pytest.mark.parametrize("name", PER_LAYER)
def test_kernels_of_a_layer(name: str) -> None:
    step, pipeline = family(name)
    layers = len(list(step.calls("attend")))
    assert len(kernels(step)) == PER_LAYER[name] * layers + BESIDES
    assert pipeline.reports[-1].stats.rewritten == len(kernels(step))


def test_a_llama_s_layer_is_qkv_attention_o_gate_up_down() -> None:
    step, _ = family("Llama")
    layer = [names(nodes) for nodes in kernels(step).values()][2:7]
    assert layer == [
        {"rms_norm", "linear"},
        {"rope", "kv_write", "attend"},
        {"linear", "aten.add"},
        {"rms_norm", "linear", "gated"},
        {"linear", "aten.add"},
    ]


def test_no_elementwise_kernel_but_positions_and_embedding() -> None:
    for name in ("Llama", "Qwen3"):
        alone = [names(n) for n in kernels(family(name)[0]).values() if not names(n) & {"linear", "attend"}]
        positions = {"aten.to", "aten.mul", "aten.cat", "aten.cos", "aten.sin"}
        assert alone == [{"aten.embedding"}, positions, {"aten.index_select"}]


def test_what_crosses_a_border_is_a_whole_tensor() -> None:
    """Views belong to their readers, but for those that put an attention's result in order."""
    for name in ("Llama", "Gemma 2", "Phi-2"):
        for node in family(name)[0].calls():
            outside = [u for u in node.users if u.op != "output" and u.meta["kernel"] != node.meta["kernel"]]
            if outside:
                assert target_name(node) not in ("aten.split_with_sizes", "getitem", "aten.transpose")
                tail = target_name(node.args[0]) == "aten.transpose"
                assert target_name(node) != "aten.reshape" or tail


def test_every_kernel_runs_after_those_it_reads() -> None:
    for name in ("Llama", "GPT-NeoX", "Gemma 2", "OLMo 2"):
        for node in family(name)[0].calls():
            for source in node.all_input_nodes:
                assert source.meta.get("kernel", -1) <= node.meta["kernel"], (name, node, source)


def test_window_and_softcap_stay_with_the_attention() -> None:
    step, _ = family("Gemma 2")
    assert [(n.args[8], n.args[9]) for n in step.calls("attend")] == [(7, 3.0), (0, 3.0)] * 2
    (cap,) = step.calls("softcap")
    assert names(kernels(step)[cap.meta["kernel"]]) == {"rms_norm", "linear", "softcap"}


def test_what_no_kernel_takes_is_said() -> None:
    step, pipeline = family("Falcon")
    (note,) = (n for n in pipeline.reports[-1].stats.notes if n.startswith("by torch"))
    assert "aten.index" in note
    assert "(x4)" in note
    assert all(names(kernels(step)[n.meta["kernel"]]) == {"aten.index"} for n in step.calls("aten.index"))


def test_a_second_run_changes_nothing() -> None:
    pipeline = Pipeline((*BEFORE, Fuse(), Fuse()), [verify_hook])
    step = pipeline.run(llama(), gpu()).graph("step")
    assert pipeline.reports[-2].stats.rewritten == len(kernels(step))
    assert pipeline.reports[-1].stats.rewritten == 0
    assert pipeline.reports[-1].nodes_before == pipeline.reports[-1].nodes_after


def test_nothing_to_do_on_a_cpu_or_without_triton() -> None:
    reference = Context(gpu().target, RECIPES["reference"], None)
    for where in (context("default"), reference):
        pipeline = Pipeline((*BEFORE, Fuse()), [verify_hook])
        step = pipeline.run(llama(layers=1), where).graph("step")
        assert pipeline.reports[-1].stats.rewritten == 0
        assert not any("kernel" in n.meta for n in step.calls())


def test_equal_layers_share_regions() -> None:
    def names_of(layers: int) -> set[str]:
        program = Pipeline((*BEFORE, Fuse(), Lower()), [verify_hook]).run(llama(layers=layers), gpu())
        assert program.choices["providers"]["linear=triton"] == 4 * layers + 1
        return set(program.graphs)

    assert names_of(2) == names_of(6)


class Block(nn.Module):
    """A projection to queries, keys and values, attention, and what a test puts behind it."""

    def __init__(self, behind: Callable[[Block, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False)
        self.norm = nn.RMSNorm(32)
        self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 96, bias=False)
        self.behind = behind

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in self.qkv(h).chunk(3, -1))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.behind(self, h, o.transpose(1, 2).flatten(2)))


def block(behind: Callable[[Block, Tensor, Tensor], Tensor]) -> Graph:
    torch.manual_seed(0)
    return fused(capture(Block(behind).eval(), ModelFacts("block", 96, 64)))[0]


def test_a_norm_that_others_read_is_not_the_product_s() -> None:
    def behind(m: Block, h: Tensor, o: Tensor) -> Tensor:
        n = m.norm(h + o)
        return n * torch.sigmoid(m.a(n))

    step = block(behind)
    (norm,) = step.calls("rms_norm")
    assert "linear" not in names(kernels(step)[norm.meta["kernel"]])


def test_a_norm_that_two_products_read_is_computed_in_both() -> None:
    def behind(m: Block, h: Tensor, o: Tensor) -> Tensor:
        n = m.norm(h + o)
        return torch.tanh(m.a(n)) * torch.tanh(m.b(torch.relu(m.a(n))))

    step = block(behind)
    norms = list(step.calls("rms_norm"))
    assert norms
    assert all("linear" in names(kernels(step)[n.meta["kernel"]]) for n in norms)


def test_an_operand_made_of_the_product_s_own_result_stays_outside() -> None:
    """y * act(b(norm(y))) waits for b, and b for y: y's kernel cannot hold the product."""

    def behind(m: Block, h: Tensor, o: Tensor) -> Tensor:
        y = m.a(o)
        return y * torch.sigmoid(m.b(m.norm(y)))

    step = block(behind)
    first, second = (n for n in step.calls("linear") if n.args[1].target in ("a.weight", "b.weight"))
    (product,) = step.calls("aten.mul")
    assert first.meta["kernel"] < second.meta["kernel"]
    assert product.meta["kernel"] == second.meta["kernel"]


def test_two_values_out_of_a_product_are_no_epilogue() -> None:
    def behind(m: Block, h: Tensor, o: Tensor) -> Tensor:
        y = torch.relu(m.a(o))
        return m.b(y - y.mean(-1, keepdim=True)) + m.norm(y)

    step = block(behind)
    (act,) = step.calls("aten.relu")
    assert "linear" in names(kernels(step)[act.meta["kernel"]])
    assert names(kernels(step)[act.meta["kernel"]]) == {"linear", "aten.relu"}
