"""Statistics know the weights that they were gathered with: another checkpoint of the same shapes does not pass."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import IDS, WHOLE, bits, raised, stopped
from passes_common import llama
from torch import Tensor

from llmopt.compiler.calibration import calibrate
from llmopt.compiler.calibration_fingerprint import Fingerprint, fingerprint_of
from llmopt.compiler.capture_hf import capture_hf
from llmopt.compiler.errors import InputError
from llmopt.compiler.program import ModelFacts, Program, Weight, tensor_weight

PICO = str(Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m")
GATE, QUERY = "model.layers.1.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[str, Tensor], Tensor]


captured = functools.cache(llama)


def with_weights(change: Change) -> Program:
    """The model of `small`, its checkpoint changed before any pass."""
    program = captured().copy()
    for name, weight in program.weights.items():
        program.weights[name] = replace(tensor_weight(change(name, weight.load().clone())), note=weight.note)
    return raised(program)


def seeded(name: str, weight: Tensor) -> Tensor:
    return 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) if weight.dim() == 2 else weight


def tuned(name: str, weight: Tensor) -> Tensor:
    """One weight, everywhere a little different, by the last bits of bfloat16."""
    return weight * 1.004 if name == GATE else weight


def adapted(name: str, weight: Tensor) -> Tensor:
    """A small product of rank one, merged into a weight that is part of a merged one."""
    factors = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    return weight + 1e-3 * torch.outer(factors[0], factors[1]) if name == QUERY else weight


# what is wrong, as the message counts it, and the weight it names
CHANGES = [
    pytest.param(seeded, "16 of 22 weights hold other values", id="seed"),
    pytest.param(tuned, f"1 of 22 weights hold other values, '{GATE}'", id="fine-tune"),
    pytest.param(adapted, f"1 of 22 weights hold other values, '{QUERY}'", id="adapter"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_finished_statistics_of_other_weights_are_refused(small: Program, tmp_path: Path, change: Change, said: str):
    path, other = tmp_path / "s.safetensors", with_weights(change)
    made = calibrate(small, IDS, path=path, settings=WHOLE)
    before = path.read_bytes()
    assert bits(calibrate(other, IDS, settings=WHOLE)) != bits(made)
    remedy = "calibrate this model, .* or use the weights that they were made with"
    for source, kept in ((path, None), (IDS, path)):
        with pytest.raises(InputError, match=f"another model than Llama, in {str(path)!r}: {said}.* wanted .*{remedy}"):
            calibrate(other, source, path=kept, settings=WHOLE)
    with pytest.raises(InputError, match=f"another model than Llama: {said}"):
        calibrate(other, made.with_tensors(dict(made.tensors)))
    assert path.read_bytes() == before
    assert bits(calibrate(with_weights(lambda name, weight: weight), path)) == bits(made)


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_run_does_not_go_on_with_other_weights(small: Program, tmp_path: Path, change: Change, said: str):
    path = tmp_path / "s.safetensors"
    stopped(small, path)
    told: list[int] = []
    where = rf"unfinished statistics are of another model than Llama, in {str(path) + '.part0'!r}"
    with pytest.raises(InputError, match=f"{where}: {said}.* wanted .*calibrate this model"):
        calibrate(with_weights(change), IDS, path=path, settings=WHOLE, progress=lambda *at: told.append(at[1]))
    assert told == []
    made = calibrate(small, IDS, path=path, settings=WHOLE)  # nothing was lost
    assert "went on after 3 windows" in made.notes
    assert bits(made) == bits(calibrate(small, IDS, settings=WHOLE))


def test_unfinished_work_of_any_division_is_looked_at(small: Program, tmp_path: Path):
    """Part 1 alone is left: it would be met when part 0 is done."""
    path = tmp_path / "s.safetensors"
    stopped(small, path)
    (tmp_path / "s.safetensors.part0").rename(tmp_path / "s.safetensors.part1")
    (tmp_path / "s.safetensors.parts").write_text("someone's")
    with pytest.raises(InputError, match=r"\.part1'"):
        calibrate(with_weights(tuned), IDS, path=path, settings=WHOLE)
    calibrate(small, IDS, path=path, settings=WHOLE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "s.safetensors.parts"]


def test_a_model_of_other_names_or_shapes_is_told_by_the_first(small: Program):
    here = fingerprint_of(small)
    assert fingerprint_of(raised(captured().copy())).difference(here) is None
    fewer = fingerprint_of(raised(llama(layers=1)))
    assert "is wanted and not there" in str(fewer.difference(here))
    assert "is one too many" in str(here.difference(fewer))
    wide = replace(here, shapes={**here.shapes, "model.norm.weight": (33,)})
    assert "'model.norm.weight' has shape [33], wanted [32]" in str(wide.difference(here))
    assert len({f.digest for f in (here, fewer, wide)}) == 3


def test_each_weight_of_the_checkpoint_is_read_once():
    program = captured().copy()
    count: Counter[str] = Counter()

    def counted(name: str, weight: Weight) -> Weight:
        return replace(weight, load=lambda: (count.update([name]), weight.load())[1])

    for name, weight in program.weights.items():
        program.weights[name] = counted(name, weight)
    program = raised(program)
    merged = [name for name, weight in program.used_weights().items() if weight.inputs]
    for name in merged:
        program.weights[name] = counted(name, program.weights[name])
    count.clear()
    values = fingerprint_of(program).values
    assert any("q_proj|k_proj|v_proj" in name for name in merged)
    assert count == Counter(list(values))
    assert not set(merged) & set(count)


def of(tensor: Tensor) -> str:
    """The digest of one weight's values."""
    program = Program({}, {"w": tensor_weight(tensor)}, ModelFacts("One", 1, 1))
    program.used_weights = lambda: program.weights  # type: ignore[method-assign]
    return fingerprint_of(program).values["w"][1]


@pytest.mark.parametrize("shape", [(300, 200), (70_000,), (40, 60, 50), (16_385, 1), (1, 16_384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_large_weights_are_looked_at_everywhere(shape: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    drawn = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32) * 8
    tensor = drawn.to(dtype)
    known = of(tensor)
    assert of(tensor.clone()) == known
    first, last = tensor.clone(), tensor.clone()
    first.view(-1)[0] = 100
    last.view(-1)[-1] = 100
    half = tensor.clone()
    half[..., ::2] = drawn[..., ::2].roll(1, 0).to(dtype)  # as the weights of another seed would be
    low = tensor.clone()
    low[: max(1, shape[0] // 8)] = 100  # an eighth of the rows, next to each other
    assert len({known, of(first), of(last), of(half), of(low)}) == (5 if shape[0] > 1 else 4)


def test_a_digest_is_of_values_wherever_they_lie():
    tensor = torch.randn(300, 200)
    assert of(tensor) == of(tensor.T.contiguous().T) == of(tensor.double()) != of(tensor.T)
    assert of(tensor) != of(tensor.bfloat16()) == of(tensor.bfloat16().float())


def test_a_checkpoint_has_one_fingerprint_in_every_dtype_that_holds_it():
    """It is stored in bfloat16. RoPE's frequencies are computed, and no other for their last bit."""
    stored, wide = (fingerprint_of(capture_hf(PICO, dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert stored.digest == wide.digest
    assert stored.difference(wide) is None
    program = capture_hf(PICO, torch.float32)
    name = "model.rotary_emb.inv_freq"
    exact = program.weights[name]
    for change, same in ((lambda t: t.nextafter(torch.tensor(9.0)), True), (lambda t: t * 0.9, False)):
        program.weights[name] = replace(exact, load=lambda change=change: change(exact.load()))
        assert (fingerprint_of(program).difference(wide) is None) == same


def test_the_dtype_is_named_where_it_explains_other_values():
    a, b = Fingerprint({}, {"w": ("bfloat16", "12")}), Fingerprint({}, {"w": ("float32", "34")})
    assert a.difference(b) == "1 of 1 weights hold other values (bfloat16 seen, float32 wanted), 'w' 12, wanted 34"
    assert "('w'" not in str(a.difference(Fingerprint({}, {"w": ("bfloat16", "34")})))
    assert "wanted none" in str(a.difference(Fingerprint({}, {})))
