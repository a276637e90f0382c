"""A program as ONNX, alone or as a folder that onnxruntime-genai generates from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmopt.codegen.onnx.options import OnnxOptions
from llmopt.compiler.errors import InputError, VerifyError
from llmopt.compiler.graph import Graph
from llmopt.compiler.program import ModelFacts, Program
from llmopt.compiler.propagate import propagate, symbolic_inputs
from llmopt.compiler.rowwise import check_rowwise
from llmopt.passes.insert_kv_cache import use_positions
from llmopt.runtime.export_folder import companions, export_folder
from llmopt.runtime.export_kv import KVSteps
from llmopt.runtime.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL, DATA = "model.onnx", "model.onnx.data"
EXTERNAL_BYTES = 100 * 2**20  # a file that is one message has to fit in memory several times, and in 2 GB
ALIGNMENT = 2**16  # what any system maps files at


def write_onnx(program: Program, options: OnnxOptions, kv: KVSteps, out: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Write `model.onnx`, its weights beside it where they are large, and the tokenizer to the folder `out`.

    For the format `genai` (of `told`) also `genai_config.json`; `kv` are the steps of `options.kv_cache`. Returns what
    the file holds. Raises InputError (what the format cannot say, a package is missing) and ArtifactError (the folder).
    """
    try:
        import onnx_ir as ir

        from llmopt.codegen.onnx.emitter import onnx_model
    except ImportError as error:
        raise InputError(
            f"--to {told['format']} needs the package {error.name}, which is not installed; pip install 'llmopt[onnx]'"
        ) from error
    ours = options.weights == "standard" and told["format"] == "onnx"
    if program.facts.dtype not in (torch.float32, torch.float16) and not ours:
        raise InputError(
            f"the model computes in {str(program.facts.dtype).removeprefix('torch.')}, in which ONNX Runtime's CPU "
            "provider has no products; export it in float32 or float16 (--dtype; an artifact has to be compiled again "
            "with it), or --to onnx with --weights standard"
        )
    graph = _plain(program, options)
    model = onnx_model(program, graph, options, kv)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    held = {"bytes": size, "nodes": model.graph.num_nodes(), "opset": options.opset}
    configured = genai_config(program.facts, graph, model, options) if told["format"] == "genai" else None
    files = companions(program.facts.tokenizer)
    if program.facts.config is not None:
        files["config.json"] = program.facts.config.encode()
    with export_folder(out, {**told, **held}) as new:
        if size > EXTERNAL_BYTES:
            ir.save(model, new / MODEL, external_data=DATA, alignment=ALIGNMENT)
        else:
            ir.save(model, new / MODEL)
        _check(new / MODEL)
        for name, data in files.items():
            (new / name).write_bytes(data)
        if configured is not None:
            (new / "genai_config.json").write_text(json.dumps(configured, indent=2) + "\n", encoding="utf-8")
    return held


def _check(file: Path) -> None:
    """Raises InputError: ONNX's checker finds that operators are given what they do not take."""
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            f"the graph is not valid ONNX ({str(error).strip().splitlines()[0]}), so nothing was written; rewrite the "
            "line of the model that it names, and report it as a bug in llmopt"
        ) from error


def _plain(program: Program, options: OnnxOptions) -> Graph:
    """A copy of the forward that knows the types of its values, and whose tokens need only keys and values of others.

    Raises InputError: it cannot be given a cache.
    """
    graph = program.graph("forward").copy()
    if not isinstance(graph.inputs()[0].meta["val"], Tensor):  # read from an artifact
        propagate(graph, symbolic_inputs(dict.fromkeys((n.name for n in graph.inputs()), ("B", "T"))), program.weights)
    if options.cache:
        try:
            check_rowwise(graph, use_positions(graph))
        except VerifyError as error:
            told, _, around = str(error).partition("\n")
            raise InputError(f"{told}; export it with --no-cache\n{around}") from error
    return graph


def genai_config(facts: ModelFacts, graph: Graph, model: ir.Model, options: OnnxOptions) -> dict[str, Any]:
    """`genai_config.json` of onnxruntime-genai 0.18 for a model of the generic type `decoder`."""
    attention = list(graph.calls("attention"))
    shapes = {tuple(int(arg.meta["val"].shape[at]) for at in (1, 3)) for n in attention for arg in n.args[1:3]}  # type: ignore[union-attr]
    if len(shapes) != 1:
        raise InputError(
            f"the layers' keys and values have {len(shapes)} shapes (heads, channels): {sorted(shapes)}; a GenAI "
            "folder has one for all; export --to onnx, where each layer has its own"
        )
    ((kv_heads, channels),) = shapes
    tokenizer: Any = load_tokenizer(facts.tokenizer)
    if tokenizer is None:
        raise InputError("the model has no tokenizer, which a GenAI folder holds; export --to onnx")
    if not facts.eos_token_ids:
        raise InputError(
            "the model names no end token (eos_token_id in generation_config.json or config.json), and a GenAI folder "
            "has one; add it there, or export --to onnx"
        )
    names = {value.name for value in model.graph.inputs}
    ends = list(facts.eos_token_ids)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    q = attention[0].args[0].meta["val"].shape  # type: ignore[union-attr]
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ends[0],
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": padding,
            "context_length": facts.context_length,
            "vocab_size": facts.vocab_size,
            "decoder": {
                "filename": MODEL,
                "head_size": channels,
                "hidden_size": int(q[1]) * int(q[3]),
                "num_attention_heads": int(q[1]),
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": len(attention),
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False, "max_length": facts.context_length, "min_length": 0, "num_beams": 1,
            "num_return_sequences": 1, "temperature": 1.0, "top_k": 1, "top_p": 1.0, "repetition_penalty": 1.0,
            "length_penalty": 1.0, "no_repeat_ngram_size": 0, "diversity_penalty": 0.0, "early_stopping": True,
            "past_present_share_buffer": options.attention == "gqa",
        },
    }  # fmt: skip
