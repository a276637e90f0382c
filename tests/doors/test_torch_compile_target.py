"""The door torch.compile on a GPU: the target follows the tensors, and Inductor compiles all of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmopt import backend
from llmopt.compiler.target import Target


class _Asked(Exception):
    pass


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_target_is_where_the_tensors_are(kind: str, monkeypatch: pytest.MonkeyPatch):
    def detect(wanted: str | None = None) -> Target:
        assert wanted == kind
        raise _Asked

    monkeypatch.setattr(Target, "detect", detect)
    with FakeTensorMode():
        inputs = [3, torch.empty(2, device=kind)]
    with pytest.raises(_Asked):
        backend.llmopt(torch.fx.symbolic_trace(nn.Identity()), inputs)


def test_inductor_serves_every_op_of_a_gpu():
    target = Target.parse("cuda:sm_90")
    if "triton" not in target.facts:
        pytest.skip("Triton is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.RMSNorm(16)).eval()
    x = torch.rand(3, 8)
    with torch.no_grad():
        got = torch.compile(model, backend="llmopt", options={"target": target, "strict": True})(x)
        torch.testing.assert_close(got, model(x))
    chosen = backend.reports[-1].providers
    assert chosen
    assert all(name.endswith("=inductor") for name in chosen), chosen
