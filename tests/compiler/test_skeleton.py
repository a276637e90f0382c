"""A model on a GPU is traced as a skeleton on the CPU; here the CPU's own models stand in for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler import capture as capture_module
from llmopt.compiler import skeleton as skeleton_module
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.skeleton import lives_elsewhere, skeleton, weights_of


def tiny():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_skeleton_shares_nothing_and_keeps_ties_and_types():
    model = tiny().bfloat16()
    bare = skeleton(model)
    assert bare.lm_head.weight is bare.model.embed_tokens.weight
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for (name, real), (other, made) in zip(model.named_parameters(), bare.named_parameters(), strict=True):
        assert (name, real.shape, real.stride(), real.dtype) == (other, made.shape, made.stride(), made.dtype)
        assert made.untyped_storage().data_ptr() not in own


def test_loose_tensors_keep_their_values():
    model = nn.Linear(2, 2)
    model.scale = torch.tensor([3.0, 4.0])
    assert skeleton(model).scale.tolist() == [3.0, 4.0]


def test_only_other_devices_count():
    assert not lives_elsewhere(tiny())
    assert not lives_elsewhere(tiny().to("meta"))


def test_captured_by_a_skeleton_the_weights_are_the_models_own(monkeypatch):
    model = tiny()
    wanted = capture_model(model)
    for module in (capture_module, skeleton_module):
        monkeypatch.setattr(module, "lives_elsewhere", lambda model: True)
    made = capture_model(model)
    assert made.graph("forward").print(False) == wanted.graph("forward").print(False)
    assert made.weights.keys() == wanted.weights.keys()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in made.weights.items():
        assert torch.equal(weight.load(), wanted.weights[name].load())
        if name in parameters:
            assert weight.load().data_ptr() == parameters[name].data_ptr(), "no copy"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_captured_without_copying_its_parameters():
    model = tiny().cuda()
    program = capture_model(model)
    weight = program.weights["model.norm.weight"].load()
    assert weight.data_ptr() == model.model.norm.weight.data_ptr()
    assert weights_of(model)("model.rotary_emb.inv_freq", weight).load().device.type == "cpu"
