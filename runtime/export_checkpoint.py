"""A program as a transformers checkpoint: what vLLM, SGLang, TensorRT-LLM and transformers load.

The graph says what leaves: each weight that a product reads is split into the modules it was joined from, and written
as its program has it, in codes or as it is, rotated or not; a `CheckpointFormat` says how codes are written. Norms that
were folded into products become neutral, and a head that no longer equals the embeddings gets weights of its own.
Tensors are made and written one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from transformers import AutoConfig, AutoModelForCausalLM

from llmopt.compiler.emittable import argument, op_name
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import Graph, origin, where
from llmopt.compiler.program import Program
from llmopt.compiler.quant import scheme_of
from llmopt.compiler.quant.checkpoint_format import CheckpointFormat, Contents, rows_of
from llmopt.compiler.quant.storage import PARTS, types_of
from llmopt.runtime.export_folder import companions, export_folder
from llmopt.runtime.export_kv import KVSteps
from llmopt.runtime.export_rotations import Rotations, rotations
from llmopt.runtime.replace import Folder
from llmopt.runtime.tensors import bytes_of, header

SHARD_BYTES = 5 * 10**9
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
Types = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Item:
    """Tensors of a checkpoint that are made together."""

    types: Types
    make: Callable[[], Mapping[str, Tensor]]


@dataclass
class Plan:
    """What a checkpoint holds: its tensors, what its configs tell of them, and whether the head is the embeddings."""

    items: list[Item] = field(default_factory=list)
    contents: Contents = field(default_factory=Contents)
    tied: bool = True


def plan(program: Program, stored: Sequence[str], to: CheckpointFormat) -> Plan:
    """How the weights of the forward become the tensors `stored`, names of the checkpoint that the model came from.

    Raises InputError: the graph computes what a transformers model of this kind does not, or `to` cannot say it.
    """
    graph, made = program.graph("forward"), Plan()
    taken: dict[str, str] = {}
    products: dict[fx.Node, list[str]] = {}
    for name, user in _weights(graph):
        if program.origins(name)[0] not in stored:
            continue  # computed from the config
        pieces = _pieces(program, name)
        if any(key in taken for key, _ in pieces):  # a head that was tied to the embeddings
            pieces = [(HEAD, count) for _, count in pieces]
            made.tied = False
        taken.update((key, name) for key, _ in pieces)
        if op_name(user) in ("linear", "quantized_linear"):
            products[user] = [key.removesuffix(".weight") for key, _ in pieces]
        if op_name(user) == "quantized_linear" and f"{name}.packed" in program.weights:
            made.items.append(_quantised(program, name, user, pieces, made.contents, to))
        else:
            made.items.append(_as_it_is(program, name, pieces))
            if op_name(user) == "linear" and _read(user, 1) == name:
                made.contents.plain += [key.removesuffix(".weight") for key, _ in pieces]
    for key in stored:
        if key not in taken:
            made.items.append(_neutral(program, key))
    turned = rotations(program, products, to)
    made.items += _rotation_items(program, turned)
    made.contents.transforms = turned.config() if turned.orders else None
    tables = {_read(node, 0) for node in graph.calls("aten.embedding")}
    if any(_read(node, 1) in tables for node in graph.calls("linear")):
        made.contents.plain.append(HEAD.removesuffix(".weight"))
    return made


def _rotation_items(program: Program, found: Rotations) -> Iterator[Item]:
    dtype = program.facts.dtype
    for key, (order, make) in found.tensors(program).items():
        yield Item({key: ((order, order), dtype)}, lambda key=key, make=make: {key: make().to(dtype)})  # type: ignore[misc]


def _read(node: fx.Node, at: int) -> str | None:
    """The weight that is this argument."""
    weight = node.args[at]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _weights(graph: Graph) -> Iterator[tuple[str, fx.Node]]:
    """(name, who reads it) of each weight of the graph; of a quantised one, once, the name it had."""
    seen = set()
    for node in graph.fx.nodes:
        if node.op != "get_attr":
            continue
        user, name = next(iter(node.users)), str(node.target)
        quantised = op_name(user) == "quantized_linear" and node in user.args[1 : 1 + len(PARTS)]
        if quantised:
            name = name.removesuffix(f".{PARTS[user.args.index(node) - 1]}")
        if (name, quantised) not in seen:  # tied embeddings stay as they are where the head does not
            seen.add((name, quantised))
            yield name, user


def _pieces(program: Program, name: str) -> list[tuple[str, int]]:
    """(name in the checkpoint, rows) of the tensors that a weight was joined from; factors folded into it left out."""
    weight = program.weights[name]
    found = [(key, program.weights[key].shape) for key in program.origins(name)]
    rows = [(key, shape[0]) for key, shape in found if shape[1:] == weight.shape[1:]]
    if sum(count for _, count in rows) != weight.shape[0]:
        raise InputError(
            f"weight {name!r} is {weight.note}, which is no whole tensors of a checkpoint one below another; "
            "export --to onnx, which takes it as it is"
        )
    return rows


def _as_it_is(program: Program, name: str, pieces: Sequence[tuple[str, int]]) -> Item:
    weight = program.weights[name]
    types: Types = {key: ((count, *weight.shape[1:]), weight.dtype) for key, count in pieces}

    def make() -> Mapping[str, Tensor]:
        parts = weight.load().split([count for _, count in pieces])
        return {key: part.contiguous() for (key, _), part in zip(pieces, parts, strict=True)}

    return Item(types, make)


def _quantised(
    program: Program,
    name: str,
    node: fx.Node,
    pieces: Sequence[tuple[str, int]],
    contents: Contents,
    to: CheckpointFormat,
) -> Item:
    scheme, activations = scheme_of(argument(node, "scheme", "")), argument(node, "activations", "")
    columns = program.weights[name].shape[1]
    if why := to.why_not(scheme, activations, columns):
        raise InputError(f"weight {name!r} cannot leave as a {to.name} checkpoint: {why}")
    modules = [key.removesuffix(".weight") for key, _ in pieces]
    contents.groups.setdefault((scheme.name, activations), []).extend(modules)

    def split(parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        first = 0
        for module, (_, count) in zip(modules, pieces, strict=True):
            rows = rows_of(parts, scheme, first, count)
            found |= {f"{module}.{last}": tensor for last, tensor in to.tensors(rows, scheme, columns).items()}
            first += count
        return found

    held = types_of(scheme, *program.weights[name].shape)
    # the types by the same code that makes the tensors, without data
    empty = split({part: torch.empty(shape, dtype=dtype, device="meta") for part, (shape, dtype) in held.items()})
    types: Types = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in empty.items()}
    return Item(types, lambda: split({part: program.weights[f"{name}.{part}"].load() for part in held}))


def _neutral(program: Program, key: str) -> Item:
    """What a norm has whose own weight was folded into the products behind it."""
    weight = program.weights.get(key)
    if weight is None or key not in program.neutral:
        raise InputError(
            f"tensor {key!r} of the checkpoint is in no weight of the program; wanted a model whose every tensor is "
            "read, or a norm's"
        )
    shape, dtype = weight.shape, weight.dtype
    return Item({key: (shape, dtype)}, lambda: {key: torch.full(shape, program.neutral[key], dtype=dtype)})


def write_checkpoint(
    program: Program, to: CheckpointFormat, kv: KVSteps, out: Path, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a program as a checkpoint in the format `to` to the folder `out`, whole or not at all; what it holds.

    `kv`: what keys and values in fp8 are divided by, the largest of all channels as the format has one number a layer.
    Raises InputError (not a transformers model, what the format cannot say) and ArtifactError (the folder).
    """
    if program.facts.config is None:
        raise InputError(
            f"{program.facts.name} is no transformers model, and a checkpoint is loaded by one; export --to onnx"
        )
    config = json.loads(program.facts.config)
    stored = stored_names(config)
    made = plan(program, stored, to)
    if kv:
        made.items += _kv_items(program, kv, stored, to)
        made.contents.kv_cache = True
    config["dtype"] = str(program.facts.dtype).removeprefix("torch.")
    if not made.tied:
        config["tie_word_embeddings"] = False
    files = companions(program.facts.tokenizer)
    if made.contents:
        config["quantization_config"] = to.config(made.contents)
        files |= {name: text.encode() for name, text in to.files(made.contents).items()}
    held = write(made.items, config, files, out, told)
    return {**held, "modules": sum(map(len, made.contents.groups.values()))}


def _kv_items(program: Program, kv: KVSteps, stored: Sequence[str], to: CheckpointFormat) -> list[Item]:
    """The scales of keys and of values of each attention, where the format has them."""
    items = []
    for node, both in zip(program.graph("forward").calls("attention"), kv, strict=True):
        inside = f"{origin(node).module}."
        module = next((name[: name.index(inside)] + inside for name in stored if inside in name), None)
        if module is None:
            raise InputError(
                f"attention at {where(node)} is in no module of the checkpoint, where its k_scale and v_scale would "
                "stand; leave --kv-cache out"
            )
        for letter, steps in zip("kv", both, strict=True):
            key, scale = module + to.kv_scale.format(letter), steps.max().reshape(to.kv_shape)
            items.append(Item({key: (to.kv_shape, torch.float32)}, lambda key=key, scale=scale: {key: scale}))  # type: ignore[misc]
    return items


def stored_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that a checkpoint of a model with this config holds; tied ones once."""
    given = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    model.tie_weights()
    names = [name for name, _ in model.named_parameters()]
    return names + [name for name, _ in model.named_buffers() if name in model.state_dict()]


def write(
    tensors: Sequence[Item],
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    out: Path,
    told: Mapping[str, Any],
) -> dict[str, int]:
    """Write tensors to the folder `out`; how many bytes, files and tensors they are.

    `config` is config.json, `files` are others, by name, `told` goes into the receipt. Raises ArtifactError: something
    that no export wrote is there, the disk is full, no permission.
    """
    groups = _shards(tensors)
    where: dict[str, str] = {}
    size = sum(_size(item) for item in tensors)
    with export_folder(out, told) as new:
        folder = Folder(new)
        for number, items in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            types = {name: kind for item in items for name, kind in item.types.items()}
            where.update(dict.fromkeys(types, file))
            with folder.open(file) as put:
                put(header(types))
                for item in items:
                    values = item.make()
                    for name in item.types:
                        put(bytes_of(values[name]))
        for name, data in files.items():
            folder.add(name, data)
        folder.add("config.json", json.dumps(config, indent=2) + "\n")
        folder.add(INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1) + "\n")
    return {"bytes": size, "files": len(groups), "tensors": len(where)}


def _shards(items: Sequence[Item]) -> list[list[Item]]:
    found: list[list[Item]] = [[]]
    room = SHARD_BYTES
    for item in items:
        if found[-1] and _size(item) > room:
            found.append([])
            room = SHARD_BYTES
        found[-1].append(item)
        room -= _size(item)
    return found


def _size(item: Item) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in item.types.values())
