"""Sampling as region code, run through a launcher: the tokens of the torch sampler at every class's number of rows."""

from __future__ import annotations

import pytest
import torch

from llmopt.codegen.sampling import sampling_code
from llmopt.compiler.target import Target
from llmopt.runtime.bound_region import BoundRegion, Frame
from llmopt.runtime.decoder import Batch, DecodeState
from llmopt.runtime.sampler import SampleRows, SamplingParams, sample

SM90 = "cuda:sm_90"


@pytest.mark.interp
@pytest.mark.parametrize("rows", [1, 5])
def test_a_decoding_state_is_sampled_and_moved_on(rows):
    from llmopt.codegen.interpret import launcher

    vocab, page = 5000, 4
    params = [SamplingParams(temperature=i % 2, seed=i) for i in range(rows)]
    each = torch.arange(rows)
    sampling = SampleRows.of(params, list(range(rows)))
    state = DecodeState(8, 6, page)
    state.load(Batch(each, each + 6, each, each, torch.arange(1, 1 + rows * 4).view(rows, 4), sampling, 20))
    frame = Frame()
    frame.sizes |= {"R": rows, "M": state.width}
    code = sampling_code(vocab, "float32", page, Target.parse(SM90))
    run = BoundRegion(code, launcher, {}, frame, torch.device("cpu"))
    for step in range(3):
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(step))
        expected = sample(logits, sampling, state.positions[:rows] + 1)
        vectors = state.temperature, state.seeds, state.sequences, state.moves, state.tables
        run([logits, *(v[:rows] for v in (*vectors, state.tokens, state.positions, state.slots))])
        assert state.read(rows)() == expected.tolist()
    after = each + 6 + 3
    assert state.positions[:rows].tolist() == after.tolist()
    assert state.slots[:rows].tolist() == [
        int(state.tables[i, p // page]) * page + int(p) % page for i, p in enumerate(after)
    ]
