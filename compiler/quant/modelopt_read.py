"""Checkpoints in NVIDIA ModelOpt's format: which weights are held in codes, and how those become ours.

The tensors are those of `modelopt`. Weights in algorithms that are not there are refused: nothing here restores them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Coded, Weight, safetensors_weight
from llmopt.compiler.quant.coded import by_module, kept
from llmopt.compiler.quant.modelopt import ALGOS, MIXED, STATIC
from llmopt.compiler.quant.schemes import SCHEMES, Scheme
from llmopt.compiler.quant.storage import PARTS

_ALGOS = {algo.upper(): (algo, *schemes) for algo, schemes in ALGOS.items()}
_AGAIN = "use the checkpoint it was made from"


def coded_weights(
    model: nn.Module, config: Mapping[str, Any], files: Mapping[str, Path], dtype: torch.dtype
) -> dict[str, tuple[Weight, Coded]]:
    """By the names that `model`'s weights have: what each stands for, in `dtype`, and its codes.

    `config` is `quantization_config` of config.json, or what hf_quant_config.json says; `files` says which file holds
    which tensor. Raises InputError: an algorithm that is not read, inputs scaled in the model, a tensor missing.
    """
    told: Mapping[str, Any] = config.get("quantization", config)
    mixed = str(told.get("quant_algo")).upper() == MIXED
    layers = told.get("quantized_layers")
    if mixed and not isinstance(layers, Mapping):
        raise InputError(f"quant_algo {MIXED} without quantized_layers, which say what is in what; save it again")
    notes = []
    if kept_so := told.get("kv_cache_quant_algo") or told.get("kv_cache_scheme"):
        notes.append(
            f"keys and values are not rounded as the checkpoint says ({kept_so}); a recipe with -kv packs them"
        )
    found: dict[str, tuple[Weight, Coded]] = {}
    tensors = by_module(files)
    for name, module in model.named_modules():
        stored = tensors.get(name, {})
        if isinstance(module, nn.Linear) and "weight_scale" in stored:
            held = {last: safetensors_weight(files[key], key) for last, key in stored.items()}
            entry = layers.get(name, {}) if mixed and layers else told
            shape = (module.out_features, module.in_features)
            found[f"{name}.weight"] = _module(name, held, shape, entry, notes, dtype)
    return found


def _module(
    name: str,
    held: Mapping[str, Weight],
    shape: tuple[int, int],
    entry: Mapping[str, Any],
    notes: list[str],
    dtype: torch.dtype,
) -> tuple[Weight, Coded]:
    asked = str(entry.get("quant_algo", "none"))
    if asked.upper() not in _ALGOS:
        raise InputError(f"module {name}: quant_algo {asked} is not read; wanted one of {', '.join(ALGOS)}; {_AGAIN}")
    if more := sorted(set(held) & {"pre_quant_scale", "svdquant_lora_a"}):
        raise InputError(f"module {name}: its {more[0]} changes what it reads, which a plain model does not; {_AGAIN}")
    algo, weights, activations = _ALGOS[asked.upper()]
    scheme = SCHEMES[weights]
    size = entry.get("group_size")
    if size and scheme.group and int(size) != scheme.group:
        raise InputError(f"module {name}: {algo} in groups of {size}; wanted groups of {scheme.group}; {_AGAIN}")
    if algo in STATIC:
        notes = [*notes, f"activations of {algo} have scales of each token instead of the checkpoint's own number"]
    return kept(name, scheme, activations, shape, dtype, _readers(held, scheme), notes)


def _readers(held: Mapping[str, Weight], scheme: Scheme) -> dict[str, Callable[[], Tensor]]:
    """How each of `storage.PARTS` is made of a module's tensors (`modelopt.tensors_of`, the other way)."""

    def packed() -> Tensor:
        return held["weight"].load().view(torch.uint8)

    def scales() -> Tensor:
        found = held["weight_scale"].load()
        found = found.view(torch.uint8) if found.dtype == torch.float8_e8m0fnu else found
        if found.dim() == 4:
            return found[:, 0, :, 0].contiguous()
        return found.reshape(-1, 1) if found.dim() < 2 else found

    def global_scale() -> Tensor:
        return held["weight_scale_2"].load().float().reshape(())

    made = {"packed": packed, "scales": scales, "global_scale": global_scale}
    return {part: made[part] for part in PARTS if part in made}
