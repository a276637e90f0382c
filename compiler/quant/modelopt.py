"""ModelOpt: how a quantised weight stands in a checkpoint that TensorRT-LLM, vLLM and SGLang read.

Tensors of a module [N, K] and configs as NVIDIA Model Optimizer 0.47 exports them for transformers. NVFP4's codes lie
two a byte, the even column in the low bits, and its global scale is a multiplier, as here.

    quant_algo                  weight             weight_scale                       weight_scale_2    input_scale
    W4A16_NVFP4                 uint8 [N, K/2]     e4m3 [N, K/16]                     float32 []
    NVFP4                       uint8 [N, K/2]     e4m3 [N, K/16]                     float32 []        float32 []
    FP8                         e4m3 [N, K]        float32 []                                           float32 []
    FP8_PER_CHANNEL_PER_TOKEN   e4m3 [N, K]        float32 [N]
    fp8_pb_wo                   e4m3 [N, K]        float32 [N/128, 1, K/128, 1]
    MXFP8                       e4m3 [N, K]        uint8 [N, K/32], the exponents
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.checkpoint_format import CheckpointFormat, Contents
from llmopt.compiler.quant.schemes import SCHEMES, Scheme

METHOD = "modelopt"
CONFIG = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
# the schemes of weights and activations. Its name for blocks is in small letters, and TensorRT-LLM knows no other
ALGOS = {
    "W4A16_NVFP4": ("nvfp4", ""),
    "NVFP4": ("nvfp4", "nvfp4"),
    "FP8": ("fp8", "fp8_channel"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "fp8_channel"),
    "fp8_pb_wo": ("fp8_block", ""),
    "MXFP8": ("mxfp8", "mxfp8"),
}
STATIC = ("NVFP4", "FP8")  # those whose activations have one scale, a number of the checkpoint
_WRITTEN = {schemes: algo for algo, schemes in ALGOS.items() if algo not in STATIC}
_SIZES = {"W4A16_NVFP4": 16, "MXFP8": 32}  # entries `group_size`
# what to take instead, by the scheme of weights
_NEAREST = {
    "nvfp4": "nvfp4 without activations",
    "mxfp8": "mxfp8 with activations in mxfp8 (scheme MXFP8)",
    "fp8": "fp8_channel with activations in fp8_channel (recipe w8a8-fp8)",
    "fp8_channel": "fp8_channel with activations in fp8_channel (recipe w8a8-fp8)",
    "fp8_block": "fp8_block without activations, which vLLM and TensorRT-LLM round by 128 columns of a token anyway",
    "int8": "fp8_channel with activations in fp8_channel (recipe w8a8-fp8)",
}


def why_not(scheme: Scheme, activations: str, columns: int) -> str | None:
    """What of weights with so many columns the format cannot say, and what is nearest; None if it can say all."""
    if (scheme.name, activations) not in _WRITTEN:
        nearest = _NEAREST.get(scheme.name, _NEAREST["nvfp4"] if scheme.element.bits == 4 else _NEAREST["mxfp8"])
        if activations in ("fp8", "nvfp4"):
            why = f"activations in {activations} have one static scale in modelopt, and here each token has its own"
            return f"{why}; nearest is {nearest}"
        kind = f"{scheme.name} with activations in {activations}" if activations else f"{scheme.name} alone"
        return (
            f"modelopt has no algorithm that vLLM loads for {kind}; nearest is {nearest}, or export --to "
            "compressed-tensors"
        )
    if scheme.group and columns % scheme.group:
        return (
            f"its {columns} columns are no whole groups of {scheme.group}, which modelopt wants; leave it out "
            "(`exclude`), or take a scheme without groups, such as fp8_channel"
        )
    return None


def tensors_of(parts: Mapping[str, Tensor], scheme: Scheme, columns: int) -> dict[str, Tensor]:
    """What a module keeps of its weight [N, columns], by the tensor's last name."""
    packed, scales = parts["packed"].contiguous(), parts["scales"].contiguous()
    weight = packed.view(torch.float8_e4m3fn) if scheme.element.bits == 8 else packed
    if scheme.name == "fp8_channel":
        scales = scales.flatten()
    elif scheme.name == "fp8_block":
        scales = scales[:, None, :, None]
    found = {"weight": weight, "weight_scale": scales}
    return found | ({"weight_scale_2": parts["global_scale"].reshape(())} if scheme.has_global else {})


def quantization_of(contents: Contents) -> dict[str, Any]:
    """`quantization` of hf_quant_config.json. Raises InputError: no weights are in codes."""
    groups = contents.groups
    if not groups:
        raise InputError(
            "modelopt has no quant_algo for keys and values alone, and what loads it wants one; take a recipe of "
            "weights too, such as nvfp4, or export --to compressed-tensors"
        )
    found: dict[str, Any] = {"quant_algo": MIXED, "kv_cache_quant_algo": "FP8" if contents.kv_cache else None}
    if len(groups) == 1:
        (schemes,) = groups
        found |= _entry(schemes)
    else:
        found["quantized_layers"] = {
            module: _entry(schemes) for schemes, modules in groups.items() for module in sorted(modules)
        }
    return {**found, "exclude_modules": sorted(contents.plain)}


def config_of(contents: Contents) -> dict[str, Any]:
    """`quantization_config` of config.json: the same in other words, which vLLM reads first."""
    told, groups = quantization_of(contents), contents.groups
    layers = {"quantized_layers": told["quantized_layers"]} if "quantized_layers" in told else {}
    entries = [
        _described(schemes) | {"targets": ["Linear"] if len(groups) == 1 else sorted(modules)}
        for schemes, modules in groups.items()
        if layers or schemes == ALGOS["W4A16_NVFP4"]  # the only one that has an entry when it is alone
    ]
    numbered = {"config_groups": {f"group_{number}": entry for number, entry in enumerate(entries)}} if entries else {}
    kept = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if contents.kv_cache else {}
    return {
        **numbered, **layers, "ignore": told["exclude_modules"], "quant_algo": told["quant_algo"], **kept,
        "producer": {"name": "llmopt"}, "quant_method": METHOD,
    }  # fmt: skip


def files_of(contents: Contents) -> dict[str, str]:
    """hf_quant_config.json, where TensorRT-LLM looks first."""
    told = {"producer": {"name": "llmopt"}, "quantization": quantization_of(contents)}
    return {CONFIG: json.dumps(told, indent=4) + "\n"}


def _entry(schemes: tuple[str, str]) -> dict[str, Any]:
    algo = _WRITTEN[schemes]
    return {"quant_algo": algo, **({"group_size": _SIZES[algo]} if algo in _SIZES else {})}


def _described(schemes: tuple[str, str]) -> dict[str, Any]:
    """An entry of `config_groups`, as `modelopt.torch.export.convert_hf_config` makes it."""
    algo = _WRITTEN[schemes]
    if algo == "fp8_pb_wo":
        return {"quant_algo": algo}
    element = {"dynamic": False, "num_bits": SCHEMES[schemes[0]].element.bits, "type": "float"}
    sized = {**element, **({"group_size": _SIZES[algo]} if algo in _SIZES else {})}
    weights = {**sized, **({"strategy": "channel"} if schemes[0] == "fp8_channel" else {})}
    return {**({"input_activations": sized} if schemes[1] else {}), "weights": weights}


MODELOPT = CheckpointFormat(
    METHOD, why_not, tensors_of, config_of, "{0}_proj.{0}_scale", kv_shape=(), rotates=False, files=files_of
)
