"""What is read of a transformers checkpoint before its weights: config, stop tokens, which file holds which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from llmopt.compiler.errors import InputError
from llmopt.compiler.program import STORED_DTYPES, Weight, open_safetensors, safetensors_weight
from llmopt.compiler.quant import compressed_read, compressed_tensors, modelopt, modelopt_read

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


# by `quant_method`: what reads a checkpoint's codes
QUANTIZED = {compressed_tensors.METHOD: compressed_read.coded_weights, modelopt.METHOD: modelopt_read.coded_weights}


def read_config(source: str) -> PretrainedConfig:
    """The config of a folder or hub id; InputError if there is none, or its weights are in codes that none of
    QUANTIZED says."""
    path = Path(source)
    looks_local = source.startswith((".", "/", "~")) or path.exists()
    if looks_local and not (path / "config.json").is_file():
        raise InputError(f"model {source!r}: {_no_checkpoint(path)}")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(
            f"model {source!r}: its config cannot be read ({str(error).splitlines()[0]}); wanted a checkpoint folder "
            "with a valid config.json or a reachable hub id; check the path, or the network for a hub id"
        ) from error
    quantization = getattr(config, "quantization_config", None) or _beside(source)
    if quantization:
        config.quantization_config = quantization
    if quantization and dict(quantization).get("quant_method") not in QUANTIZED:
        method = dict(quantization).get("quant_method", "unknown method")
        raise InputError(
            f"model {source!r}: a quantised checkpoint ({method}); wanted weights in {', '.join(DTYPES)}, or in codes "
            f"of {' or '.join(QUANTIZED)}; use the checkpoint it was made from"
        )
    return config


def _beside(source: str) -> dict[str, Any] | None:
    """What ModelOpt says of a checkpoint in a file of its own, as it did before 0.31; None without that file."""
    path = cached_file(
        source, modelopt.CONFIG, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if path is None:
        return None
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8")), "quant_method": modelopt.METHOD}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"file {path!r} does not say how weights are quantised ({type(error).__name__}: {error}); download it again"
        ) from error


def taken_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """The checkpoint's `quantization_config`, None if it has none; the config is one without it afterwards."""
    found = getattr(config, "quantization_config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return dict(found) if found else None


def _no_checkpoint(path: Path) -> str:
    """What a path is that holds no config.json, and what was wanted."""
    if (path / "manifest.json").is_file():
        return "it is an artifact, compiled already; wanted the model it was made from"
    if (path / "graphs").is_dir():
        return "it is an artifact without its manifest.json; copy the artifact again, or compile the model again"
    seen = "no such folder" if not path.exists() else "a folder without config.json" if path.is_dir() else "a file"
    return f"{seen}; wanted a transformers checkpoint folder (config.json, *.safetensors) or a hub id"


def checkpoint_dtype(config: PretrainedConfig) -> torch.dtype:
    """What the config says the weights are stored in (fp32 if it does not)."""
    stored = getattr(config, "dtype", None) or torch.float32
    stored = DTYPES.get(stored, stored) if isinstance(stored, str) else stored
    if stored not in DTYPES.values():
        raise InputError(
            f"model dtype {stored}: not supported; wanted one of {', '.join(DTYPES)}; pass dtype=... to convert "
            "while loading"
        )
    return stored


def eos_of(config: GenerationConfig) -> tuple[int, ...]:
    """The stop tokens of a generation config, one, several or none."""
    eos = config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def generation_eos(source: str) -> tuple[int, ...] | None:
    """The stop tokens of generation_config.json, which win over config.json's as in transformers; None without one."""
    try:
        return eos_of(GenerationConfig.from_pretrained(source))
    except OSError:
        return None


def _weight_map(index: Path) -> dict[str, str]:
    """tensor name -> file name, as the index says."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"file {str(index)!r} is no index of weights ({type(error).__name__}: {error}); download or save it again"
        ) from error


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """tensor name -> the safetensors file of the folder that holds it; a missing shard is an error."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        names = _weight_map(index)
    elif single.is_file():
        with open_safetensors(single) as file:
            names = dict.fromkeys(file.keys(), single.name)
    else:
        raise InputError(
            f"model {str(folder)!r}: no model.safetensors and no model.safetensors.index.json; wanted safetensors "
            "weights; convert the checkpoint with transformers' save_pretrained"
        )
    lost = sorted({str(f) for f in names.values() if not (folder / f).is_file()})
    if lost:
        raise InputError(
            f"model {str(folder)!r}: the index names {lost[0]}, which is not there; wanted all shards; "
            "download it again"
        )
    return {name: folder / file for name, file in names.items()}


def stored_weight(file: Path, key: str, tensor: Tensor) -> Weight:
    """The tensor `key` of a safetensors file, in the shape and cast to the dtype of the model's own `tensor`."""
    with open_safetensors(file) as opened:
        part = opened.get_slice(key)
        shape, name = tuple(part.get_shape()), part.get_dtype()
    if shape != tuple(tensor.shape):
        raise InputError(
            f"weight {key} of {file.name} has shape {shape}; wanted {tuple(tensor.shape)} as config.json says; "
            "the two belong to different models, download both again"
        )
    stored = STORED_DTYPES.get(name)
    if tensor.is_floating_point() and stored not in DTYPES.values():
        raise InputError(
            f"weight {key} of {file.name} is stored as {name}; wanted one of {', '.join(DTYPES)}: without its scales a "
            "quantised weight means nothing; use the checkpoint it was made from"
        )
    return safetensors_weight(file, key, tensor.dtype)
