"""Decoding on ONNX Runtime's CPU provider: llmopt's exports against a default export by transformers.

python benchmarks/onnx_cpu.py MODEL --out benchmarks/results/onnx-cpu.json

transformers' `OnnxExporter.export_for_generation` (dynamic shapes, decode graph) is what it makes by default, in
float32; `hf-fused` is the same with its own fusions for ONNX Runtime. All run in one process, in turns, through one
loop: a prompt, then token by token, greedily, keys and values staying with ONNX Runtime between calls. Before anything
is timed, exports that claim to be exact have to give the same tokens as the compiled model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import llmopt
from llmopt.runtime.measure import ReadBandwidth, environment, write_json

PROMPT = 32
PICO = Path(__file__).resolve().parents[1] / "examples" / "models" / "pico-llama-4m"


@dataclass(frozen=True)
class Case:
    """An export: whose, by which recipe and with which settings; `exact` ones give the compiled model's tokens."""

    name: str
    recipe: str
    settings: dict[str, Any]
    exact: bool = True


CASES = (
    Case("fp32", "default", {}),
    Case("fp32-gqa", "default", {"attention": "gqa"}),
    Case("fp8-exact", "fp8", {"attention": "gqa"}),
    Case("int8-exact", "int8", {"attention": "gqa"}),
    Case("int8-fast", "int8", {"attention": "gqa", "accuracy_level": 4}, exact=False),
    Case("int4-exact", "int4", {"attention": "gqa"}),
    Case("int4-fast", "int4", {"attention": "gqa", "accuracy_level": 4}, exact=False),
    Case("nvfp4-exact", "nvfp4", {"attention": "gqa"}),
    Case("nvfp4-fast", "nvfp4", {"attention": "gqa", "accuracy_level": 4}, exact=False),
)


class Run:
    """A model file and what is known of its inputs."""

    def __init__(self, file: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        past = [name for name in self.inputs if "past" in name]
        self.present = dict(zip(past, (name for name in self.outputs if name != "logits"), strict=True))

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, float]:
        """Greedy tokens, seconds to the first one, tokens a second behind it."""
        made: list[int] = []
        at, tokens = 0, prompt
        empty = {
            name: np.zeros((1, int(s[1]), 0, int(s[3])), np.float32)
            for name, s in self.inputs.items()
            if name in self.present
        }
        past = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}
        started = first = time.perf_counter()
        for _ in range(count):
            end = at + len(tokens)
            given = {
                "input_ids": np.array([tokens]), "position_ids": np.arange(at, end)[None],
                "attention_mask": np.ones((1, end), np.int64),
            }  # fmt: skip
            feed = {
                name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in given.items() if name in self.inputs
            }
            got = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feed | past), strict=True))
            made.append(int(got["logits"].numpy()[0, -1].argmax()))
            past = {name: got[present] for name, present in self.present.items()}
            at, tokens = end, made[-1:]
            if len(made) == 1:
                first = time.perf_counter()
        return made, first - started, (count - 1) / (time.perf_counter() - first)


def peer(model: str, out: Path, fused: bool) -> Path:
    """transformers' own export: the graph that decodes, any number of tokens at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.randint(0, loaded.config.vocab_size, (2, 16))
    config = OnnxConfig(dynamic=True, ort_fusions="cpu" if fused else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made = OnnxExporter().export_for_generation(loaded, given, config=config, multi_token_decode=True)
    made.save_pretrained(str(out))
    return out / "decode.onnx"


def prepared(
    args: argparse.Namespace, prompt: list[int], folder: Path
) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """Every export, opened, and what is known of it; exact ones checked."""
    runs, facts = {}, {}
    for name, fused in (("hf", False), ("hf-fused", True)):
        runs[name] = Run(peer(args.model, folder / name, fused), args.threads)
        size = sum(file.stat().st_size for file in (folder / name).glob("decode.onnx*"))
        facts[name] = {"exact": True, "recipe": "default", "file_bytes": size}
    for case in CASES:
        model = llmopt.compile(args.model, recipe=case.recipe, dtype="float32")
        model.export(folder / case.name, "onnx", **case.settings)
        runs[case.name] = Run(folder / case.name / "model.onnx", args.threads)
        size = sum(file.stat().st_size for file in (folder / case.name).glob("model.onnx*"))
        facts[case.name] = {"exact": case.exact, "recipe": case.recipe, "settings": case.settings, "file_bytes": size}
        if case.exact:
            want = model.generate(prompt, max_new_tokens=args.new_tokens, ignore_eos=True)
            got = runs[case.name].generate(prompt, args.new_tokens)[0]
            if got != want:
                raise SystemExit(f"{case.name}: tokens {got[:8]}..., and the compiled model makes {want[:8]}...")
            if case.recipe == "default":
                for name in ("hf", "hf-fused"):
                    facts[name]["identical_tokens"] = runs[name].generate(prompt, args.new_tokens)[0] == want
    return runs, facts


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(PICO), help="checkpoint folder or hub id (the embedded model)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    bandwidth = ReadBandwidth()
    with tempfile.TemporaryDirectory() as folder:
        prompt = [7 * at + 100 for at in range(PROMPT)]
        runs, facts = prepared(args, prompt, Path(folder))
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            bandwidth()
            for name, run in runs.items():
                seen[name].append(run.generate(prompt, args.new_tokens)[1:])
    base = statistics.median(rate for _, rate in seen["hf"])
    results = []
    for name, rounds in seen.items():
        rate = statistics.median(rate for _, rate in rounds)
        first = statistics.median(first for first, _ in rounds)
        results.append({
            "export": name, **facts[name], "decode_tokens_per_s": rate, "first_token_ms": first * 1e3,
            "rounds": [rate for _, rate in rounds], "times_hf": rate / base,
        })  # fmt: skip
        size = facts[name]["file_bytes"] / 2**20
        print(f"{name:12} {rate:5.0f} tokens/s  {rate / base:5.2f}x  first {first * 1e3:5.1f} ms  {size:6.1f} MiB")
    figures = {
        **environment(), "onnxruntime": ort.__version__, "onnxscript": metadata.version("onnxscript"),
        "settings": {"model": Path(args.model).name, "new_tokens": args.new_tokens, "prompt_tokens": PROMPT,
                     "rounds": args.rounds, "threads": args.threads},
        "read_bandwidth_bytes_per_s": bandwidth.median(), "results": results,
    }  # fmt: skip
    if args.out:
        write_json(args.out, figures)


if __name__ == "__main__":
    main()
