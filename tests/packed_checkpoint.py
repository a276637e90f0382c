"""Checkpoints of a small Llama that compressed-tensors packed, as llm-compressor saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.transform import TransformConfig, apply_transform_config
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
JOINED = ([f"{ATTENTION}.{p}_proj" for p in "qkv"], [f"{MLP}.{p}_proj" for p in ("gate", "up")])


def range_of(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest elements of what shares a scale."""
    if args.strategy == "tensor":
        blocks = weight.reshape(1, -1)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    else:
        blocks = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    return blocks.amin(-1), blocks.amax(-1)


def written(
    folder: Path,
    kind: QuantizationScheme | tuple[QuantizationScheme, ...],
    dtype: torch.dtype = torch.bfloat16,
    share: bool = True,
    ignore: tuple[str, ...] = ("lm_head",),
    transforms: TransformConfig | None = None,
) -> Path:
    """A model saved as llm-compressor saves it: parameters beside each weight, packed, with the config."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(dtype)
    if transforms is not None:
        apply_transform_config(model, transforms)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    config = QuantizationConfig(config_groups={f"group_{n}": k for n, k in enumerate(kinds)}, ignore=list(ignore))
    apply_quantization_config(model, config)
    modules = {n: m for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    for name, module in modules.items():
        args = module.quantization_scheme.weights
        fused = next((group for group in JOINED if name.replace("layers.1", "layers.0") in group), [name])
        own = name[: name.index("layers.") + 8] if "layers." in name else ""
        seen = [modules[n.replace("model.layers.0", own)] for n in fused] if share else [module]
        divisor = None
        if hasattr(module, "weight_global_scale"):
            whole = torch.cat([m.weight.detach().float().flatten() for m in seen])
            divisor = generate_gparam(whole.min(), whole.max())
            module.weight_global_scale.data.copy_(divisor)
        low, high = range_of(module.weight.detach().float(), args)
        scales, zeros = calculate_qparams(low, high, args, global_scale=divisor)
        module.weight_scale.data = scales.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zeros.reshape(module.weight_zero_point.shape).to(torch.int8)
        for last in ("input_scale", "input_global_scale"):
            if hasattr(module, last):
                getattr(module, last).data.fill_(1.0)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder
