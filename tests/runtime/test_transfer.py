"""Integer inputs of a step on their way to a device."""

from __future__ import annotations

import pytest
import torch

from llmopt.runtime.transfer import inputs_on, to_device

CPU, META = torch.device("cpu"), torch.device("meta")


def test_tensors_on_the_device_stay_unless_they_are_not_aligned() -> None:
    ids = torch.arange(9)
    whole, odd, strided = inputs_on(CPU, [ids, ids[1:4], ids.view(3, 3).T])
    assert whole is ids
    assert odd.tolist() == [1, 2, 3]
    assert odd.data_ptr() % 16 == 0
    assert strided.is_contiguous()
    assert strided.tolist() == ids.view(3, 3).T.tolist()


def test_tensors_of_the_host_travel_in_one_piece_each_at_a_multiple_of_16_bytes() -> None:
    ids, table, there = torch.arange(3)[None], torch.arange(5), torch.arange(2, device=META)
    got = inputs_on(META, [ids, there, table])
    assert [(t.device.type, t.shape) for t in got] == [
        ("meta", ids.shape),
        ("meta", there.shape),
        ("meta", table.shape),
    ]
    assert got[1] is there
    assert [t.storage_offset() for t in (got[0], got[2])] == [0, 4]
    assert got[0].untyped_storage()._cdata == got[2].untyped_storage()._cdata


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_arrive_on_a_gpu() -> None:
    values = [torch.arange(7), torch.randint(100, (3, 5)), torch.arange(4, device="cuda")]
    got = inputs_on(torch.device("cuda"), values)
    assert [t.tolist() for t in got] == [t.tolist() for t in values]
    assert to_device(torch.arange(5), "cuda").tolist() == [0, 1, 2, 3, 4]
