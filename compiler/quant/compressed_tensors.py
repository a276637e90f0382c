"""compressed-tensors: how a quantised weight stands in a checkpoint that vLLM, SGLang and transformers read.

Tensors of a module and entries of `quantization_config` as compressed-tensors 0.20 writes them. Its global scale of
NVFP4 is a divisor, ours a multiplier; its bytes of packed integers are the same as ours, read as int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.quant.checkpoint_format import CheckpointFormat, Contents
from llmopt.compiler.quant.schemes import SCHEMES, Scheme

METHOD = "compressed-tensors"
FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6_e2m3": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "int8": "int-quantized",
    "fp8": "float-quantized",
    "fp8_channel": "float-quantized",
    "fp8_block": "float-quantized",
    **{name: "pack-quantized" for name, scheme in SCHEMES.items() if scheme.scale in ("bfloat16", "float16")},
}
# of activations, whose scales are taken from each token: the arguments; those of NVFP4 and of whole tensors are static
# numbers in this format
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "token"},
    "fp8_block": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128},
    "int8": {"num_bits": 8, "type": "int", "strategy": "token"},
}
_KV_CACHE = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
}  # fmt: skip
_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


def why_not(scheme: Scheme, activations: str, columns: int) -> str | None:
    """What of weights with so many columns the format cannot say, and what it can; None if it can say all."""
    if scheme.name not in FORMATS:
        return f"compressed-tensors has no format for {scheme.name}; nearest is mxfp6_e2m3 or mxfp8"
    if activations and activations not in _ACTIVATIONS:
        return (
            f"activations in {activations} have one static scale in compressed-tensors, and here each token has its "
            f"own; leave `activations` out, or take one of {', '.join(_ACTIVATIONS)}"
        )
    if scheme.group and columns % scheme.group:
        return (
            f"its {columns} columns are no whole groups of {scheme.group}, which compressed-tensors wants; leave it "
            "out (`exclude`), or take a scheme without groups, such as int8 or fp8_channel"
        )
    return None


def group_of(scheme: Scheme, activations: str, targets: list[str]) -> dict[str, Any]:
    """An entry of `config_groups`."""
    shared = (scheme.group, scheme.rows)
    strategy = {(0, 0): "tensor", (0, 1): "channel", (128, 128): "block", (16, 1): "tensor_group"}.get(shared, "group")
    weights: dict[str, Any] = {
        "num_bits": scheme.element.bits, "type": "float" if scheme.element.is_float else "int", "strategy": strategy,
        "symmetric": scheme.symmetric, "dynamic": False,
    }  # fmt: skip
    if "group" in strategy:
        weights["group_size"] = scheme.group
    if strategy == "block":
        weights["block_structure"] = [scheme.rows, scheme.group]
    if scheme.scale in _DTYPES:
        weights["scale_dtype"] = _DTYPES[scheme.scale]
    given = {**_ACTIVATIONS[activations], "symmetric": True, "dynamic": True} if activations else None
    return {"targets": targets, "weights": weights, "input_activations": given, "format": FORMATS[scheme.name]}


def config_of(contents: Contents) -> dict[str, Any]:
    """`quantization_config` of a checkpoint."""
    alone = len(contents.groups) == 1
    entries = [
        group_of(SCHEMES[scheme], activations, ["Linear"] if alone else sorted(modules))
        for (scheme, activations), modules in contents.groups.items()
    ]
    formats = {entry["format"] for entry in entries}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "config_groups": {f"group_{number}": entry for number, entry in enumerate(entries)},
        "ignore": sorted(contents.plain),
        "kv_cache_scheme": {**_KV_CACHE} if contents.kv_cache else None,
        "global_compression_ratio": None,
        **({"transform_config": contents.transforms} if contents.transforms else {}),
    }


def tensors_of(parts: Mapping[str, Tensor], scheme: Scheme, columns: int) -> dict[str, Tensor]:
    """What a module keeps of its weight [N, columns], by the tensor's last name."""
    packed, scales = parts["packed"].contiguous(), parts["scales"].contiguous()
    if not scheme.element.is_float:
        return _integers(packed, scales, parts.get("zero_points"), scheme, columns)
    whole = scheme.element.bits == 8
    weight = {"weight": packed.view(torch.float8_e4m3fn)} if whole else {"weight_packed": packed}
    if scheme.has_global:
        return {**weight, "weight_scale": scales, "weight_global_scale": 1.0 / parts["global_scale"].reshape(1)}
    return {**weight, "weight_scale": scales.reshape(-1) if scheme.rows == 0 else scales}


def _integers(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, scheme: Scheme, columns: int
) -> dict[str, Tensor]:
    if FORMATS[scheme.name] == "int-quantized":
        return {"weight": (packed.int() - 128).to(torch.int8), "weight_scale": scales}
    shape = torch.tensor([packed.shape[0], columns])
    found = {"weight_packed": packed.view(torch.int32), "weight_scale": scales, "weight_shape": shape}
    if zero_points is not None:
        found["weight_zero_point"] = _along_rows(zero_points)
    return found


def _along_rows(zero_points: Tensor) -> Tensor:
    """Zero points [N, G] of 4 bits, those of eight rows in an int32: [N / 8 rounded up, G]."""
    rows = -(-zero_points.shape[0] // 8)
    padded = zero_points.new_zeros(rows * 8, zero_points.shape[1])
    padded[: zero_points.shape[0]] = zero_points
    pairs = padded.view(rows, 4, 2, -1)
    bytes_ = (pairs[:, :, 0] | pairs[:, :, 1] << 4).transpose(1, 2)
    # `contiguous` keeps the odd stride of a single column, which `view` refuses
    return bytes_.clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(2)


COMPRESSED_TENSORS = CheckpointFormat(
    METHOD, why_not, tensors_of, config_of, kv_scale="{0}_scale", kv_shape=(1,), rotates=True
)
