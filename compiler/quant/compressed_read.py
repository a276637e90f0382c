"""Checkpoints in compressed-tensors: which weights are held in codes, and how those become ours.

compressed-tensors itself reads `quantization_config` and says which modules it is about. Codes of schemes that there
are here are kept, bit for bit; weights in others are restored by compressed-tensors when they are read, and a note says
why. Nothing but shapes is read here, except scales that would have to fit in fewer bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Coded, Weight, safetensors_weight
from llmopt.compiler.quant.coded import by_module, kept
from llmopt.compiler.quant.schemes import SCHEMES, Scheme
from llmopt.compiler.quant.storage import PARTS
from llmopt.compiler.quant.transforms_read import turn_activations

GROUPS = (128, 64, 32)
_FLOATS = {
    (4, "tensor_group", 16): "nvfp4", (4, "group", 32): "mxfp4", (6, "group", 32): "mxfp6_e2m3",
    (8, "group", 32): "mxfp8", (8, "tensor", None): "fp8", (8, "channel", None): "fp8_channel",
    (8, "block", None): "fp8_block",
}  # fmt: skip
_ACTIVATIONS = {
    ("float", 4, "tensor_group"): "nvfp4", ("float", 4, "group"): "mxfp4", ("float", 8, "token"): "fp8_channel",
    ("float", 8, "tensor"): "fp8_channel", ("int", 8, "token"): "int8", ("int", 8, "tensor"): "int8",
}  # fmt: skip


def coded_weights(
    model: nn.Module, config: Mapping[str, Any], files: Mapping[str, Path], dtype: torch.dtype
) -> dict[str, tuple[Weight, Coded]]:
    """By the names that `model`'s weights have: what each stands for, in `dtype`, and its codes.

    `config` is the checkpoint's `quantization_config`, `files` says which file holds which tensor. Raises InputError:
    no config of compressed-tensors, a model that needs more than weights (rotations at run time), a tensor missing.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets

    notes = _beside(model, config, files, dtype)
    known = {key: value for key, value in config.items() if key in QuantizationConfig.model_fields}
    try:
        parsed = QuantizationConfig.model_validate(known)
    except ValueError as error:
        raise InputError(
            f"quantization_config of config.json is none that compressed-tensors reads ({str(error).splitlines()[0]}); "
            "save the checkpoint again"
        ) from error
    if parsed.kv_cache_scheme:
        notes.append("keys and values stay as they are: a recipe -kv packs them")
    found: dict[str, tuple[Weight, Coded]] = {}
    tensors = by_module(files)
    groups = {target: group for group in (parsed.config_groups or {}).values() for target in group.targets}
    ignored = list(parsed.ignore or ())
    for name, module in model.named_modules():
        stored = tensors.get(name, {})
        if not isinstance(module, nn.Linear) or "weight_scale" not in stored:
            continue
        try:
            # the most specific first: a name, a pattern, a class
            targets = [] if is_match(name, module, ignored) else match_targets(name, module, list(groups))
        except re.error as error:
            raise InputError(
                f"quantization_config of config.json has a pattern that is none ({error}); mend `targets` and `ignore`"
            ) from error
        if targets and (group := groups[targets[0]]).weights is not None:
            held = {last: safetensors_weight(files[key], key) for last, key in stored.items()}
            shape = (module.out_features, module.in_features)
            found[f"{name}.weight"] = _module(name, held, shape, group, parsed.format, dtype, notes)
    return found


def _beside(model: nn.Module, config: Mapping[str, Any], files: Mapping[str, Path], dtype: torch.dtype) -> list[str]:
    """Take over what runs beside the weights; what is to be said of it. Raises InputError: what cannot be."""
    for name in ("transform_config", "sparsity_config"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise InputError(f"quantization_config has a {name} that is {config[name]!r}; wanted an object")
    sparse = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise InputError(
            f"quantization_config has sparse weights ({sparse}), which are not read; use a dense checkpoint"
        )
    return turn_activations(model, config.get("transform_config") or {"config_groups": {}}, files, dtype)


def _module(
    name: str,
    held: Mapping[str, Weight],
    shape: tuple[int, int],
    group: Any,
    whole: str,
    dtype: torch.dtype,
    beside: list[str],
) -> tuple[Weight, Coded]:
    scheme, why = _scheme(group.weights, held, shape)
    activations, rounded = _activations(group.input_activations)
    notes = [note for note in (why, rounded, *beside) if note]
    if scheme is None:
        load = partial(_restored, held, group, whole, dtype)
        return Weight(shape, dtype, load, f"{name} by compressed-tensors"), Coded("", "", None, {}, tuple(notes))
    return kept(name, scheme, activations, shape, dtype, _readers(name, held, scheme, shape, group.weights), notes)


def _scheme(args: Any, held: Mapping[str, Weight], shape: tuple[int, int]) -> tuple[Scheme | None, str]:
    """The scheme of a module's weight, else why there is none."""
    kind, strategy, columns = _text(args.type), _text(args.strategy), shape[1]
    said = f"{args.num_bits}-bit {kind} weights by {strategy}" + f" of {args.group_size}" * bool(args.group_size)
    if "weight_g_idx" in held:
        return None, f"{said} with columns in another order (g_idx) are restored: groups run along the columns here"
    if kind == "float":
        name = _FLOATS.get((args.num_bits, strategy, args.group_size or None))
        if strategy == "block" and list(args.block_structure or ()) != [128, 128]:
            name = None
        if name is None or columns % max(SCHEMES[name].group, 1):
            return None, f"{said} are restored: there is no such scheme here"
        return SCHEMES[name], ""
    if not args.symmetric and args.num_bits != 4:
        return None, f"{said} with zero points are restored: there is no such scheme here"
    every = columns if strategy in ("channel", "tensor") else int(args.group_size or 0)  # columns that share a scale
    if args.num_bits == 8 and strategy in ("channel", "tensor"):
        return SCHEMES["int8"], ""
    wanted = (128,) if args.num_bits == 8 else GROUPS
    size = next((g for g in wanted if every and every % g == 0 and columns % every == 0), 0)
    if args.num_bits not in (4, 8) or not size or strategy == "tensor":
        return None, f"{said} are restored: there is no such scheme here"
    kept = _fits(held["weight_scale"])
    if kept is None:
        return None, f"{said} with scales of {held['weight_scale'].dtype} are restored: here they have 16 bits"
    return SCHEMES[f"int{args.num_bits}_g{size}" + "_asym" * (not args.symmetric) + kept], ""


def _text(value: Any) -> str:
    """Of an enumeration, or what stands for one of its values."""
    return str(getattr(value, "value", value))


def _fits(scales: Weight) -> str | None:
    """What names of schemes end in whose scales are these numbers, None if there are none. Reads those of more bits."""
    known = {torch.bfloat16: "", torch.float16: "_f16"}
    if scales.dtype in known:
        return known[scales.dtype]
    values = scales.load().float()
    return next((suffix for dtype, suffix in known.items() if torch.equal(values.to(dtype).float(), values)), None)


def _activations(args: Any) -> tuple[str, str]:
    """The scheme that activations are rounded to, and what is to be said of it."""
    if args is None:
        return "", ""
    kind = _text(args.type), int(args.num_bits), _text(args.strategy)
    name = _ACTIVATIONS.get(kind, "")
    if kind == ("float", 8, "group"):
        name = {32: "mxfp8", 128: "fp8_block"}.get(args.group_size, "")
    said = f"{kind[1]}-bit {kind[0]} activations by {kind[2]}"
    if not name:
        return "", f"{said} stay as they are: there is no such scheme here"
    fixed = args.dynamic is not True
    return name, f"{said} have scales of each token instead of the checkpoint's own number" if fixed else ""


def _readers(
    name: str, held: Mapping[str, Weight], scheme: Scheme, shape: tuple[int, int], args: Any
) -> dict[str, Callable[[], Tensor]]:
    """How each of `storage.PARTS` is made of a module's tensors (`compressed_tensors.tensors_of`, the other way)."""
    rows, columns = shape
    said = f"{_text(args.strategy)}{f' of {args.group_size}' * bool(args.group_size)}"
    groups = columns // args.group_size if args.group_size else scheme.scales_shape(*shape)[1] if scheme.rows > 1 else 1

    def spread(stored: Tensor) -> Tensor:
        """Scales or zero points, those of larger groups, whole rows or the whole weight repeated."""
        wanted = scheme.scales_shape(*shape)
        if stored.numel() == 1 and _text(args.strategy) == "tensor":
            return stored.reshape(1, 1).expand(wanted).contiguous()
        matrix = stored.reshape(stored.shape[0], -1)
        if matrix.shape[1] != groups:
            raise InputError(
                f"module {name}: the checkpoint has {matrix.shape[1]} scales a row; wanted {groups}, as its "
                f"quantization_config says (scales by {said}, {columns} columns); the two do not belong together, save "
                "it again"
            )
        return matrix.repeat_interleave(wanted[1] // groups, 1)

    def packed() -> Tensor:
        codes = held["weight" if "weight" in held else "weight_packed"].load()
        if codes.dtype == torch.int8:
            return (codes.int() + 128).to(torch.uint8)
        found = codes.view(torch.uint8)
        if codes.dtype == torch.int32 and codes.shape[1] == -(-columns * scheme.element.bits // 32):
            found = found[:, : columns * scheme.element.bits // 8]  # the last word may be part full
        return found.contiguous()

    def scales() -> Tensor:
        found = held["weight_scale"].load()
        stored = found.view(torch.uint8) if found.dtype == torch.float8_e8m0fnu else found.to(scheme.scale_dtype)
        return spread(stored)

    def global_scale() -> Tensor:
        return (1.0 / held["weight_global_scale"].load().float()).reshape(())

    def zero_points() -> Tensor:
        words = held["weight_zero_point"].load().t().contiguous().view(torch.uint8)  # eight rows a word
        codes = torch.stack((words & 15, words >> 4), -1).flatten(1).t()[:rows]
        return spread(codes.contiguous())

    made: tuple[Callable[[], Tensor], ...] = (packed, scales, global_scale, zero_points)
    return dict(zip(PARTS, made, strict=True))


def _restored(held: Mapping[str, Weight], group: Any, whole: str, dtype: torch.dtype) -> Tensor:
    from compressed_tensors.compressors.base import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(group.format or whole)
    made = compressor.decompress({name: weight.load() for name, weight in held.items()}, group)
    return made["weight"].to(dtype)  # type: ignore[no-any-return]
