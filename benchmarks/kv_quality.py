"""What packed keys and values cost in accuracy: scores of made-up keys, perplexity, and how long generated texts agree.

    python benchmarks/kv_quality.py --models-dir FOLDER --tokens HELDOUT.safetensors [--parts scores perplexity prefix]

`scores`: 2,048 keys and 64 queries of 128 channels, N(0, 1); some channels of the keys times ten (queries times 0.2), a
constant added to all. Root mean square error of q.k / sqrt(128), and relative error of attention's result.
`perplexity`: each checkpoint of the folder under each packing, and `-k-bias-10` and `-30`: the checkpoint with the
slowest pair of RoPE's channels taken out of all queries, and biases of so many times the keys' size added to the keys
there, such as Qwen2's models have. What those add to a score is 0, so the models are the same, but for the outliers.
`prefix`: tokens that greedy texts from 64 prompts share with those of the unpacked cache, before they part, of 512.
Results are written after each; what is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _gpu_cases import RESULTS
from safetensors.torch import load_file
from torch import Tensor

import llmopt
from llmopt.commands.eval import logits_of, tokens_at_once
from llmopt.compiler.quant.kv import Packing
from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.measure import environment, write_json
from llmopt.runtime.perplexity import batched, measure

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("int4", "int4-h16", "int4-h32", "int4-h64", "int4-h128", "int8", "fp8", "nvfp4")
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"keys": "int8", "values": "int8", "rotate": "none"},
    "fp8": {"keys": "fp8", "values": "fp8", "rotate": "none"},
    "nvfp4": {"keys": "nvfp4", "values": "nvfp4", "rotate": "none"},
    "int4": {"rotate": "none"},
    **{f"int4 k{order}": {"order": order, "rotate": "k"} for order in (16, 32, 64)},
    **{f"int4 kv{order}": {"order": order, "rotate": "kv"} for order in (16, 32, 64)},
    "int4 near": {"rotate": "none", "sinks": 4, "recent": 60},
    "int4 k32 near": {"order": 32, "rotate": "k", "sinks": 4, "recent": 60},
}
BIASES = (10.0, 30.0)  # times a key's root mean square
Figures = dict[str, Any]


def recipe_of(name: str) -> Recipe:
    """The default recipe with such a cache; `bf16` is as the model computes."""
    options = OPTIONS[name]
    if not options:
        return Recipe.parse("default")
    base = Recipe.parse("int4-kv")
    passes = [PassSpec.of(s.name, **options) if s.name == "quantize-kv" else s for s in base.passes]
    return replace(base, name=name, passes=tuple(passes))


def made_up(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [64, 128], k and v [2048, 128]."""
    make = torch.Generator().manual_seed(seed)
    k, v, q = (torch.randn(n, 128, generator=make) for n in (2048, 2048, 64))
    if kind == "4 channels x10":
        at = torch.randperm(128, generator=make)[:4]
        k[:, at] *= 10
        q[:, at] *= 0.2
    elif kind == "offset 3":
        k += 3
    return q, k, v


def scores(kind: str, name: str) -> Figures:
    """Errors of one packing of the keys, over eight draws."""
    how, found = Packing.parse(name), []
    for seed in range(8):
        q, k, v = made_up(kind, seed)
        rounded = how.turned_back(how.unpack(how.pack(k)))
        want, got = (q @ x.T / 128**0.5 for x in (k, rounded))
        out, near = (torch.softmax(s, -1) @ v for s in (want, got))
        found.append(((got - want).square().mean().sqrt(), (near - out).norm() / out.norm()))
    rmse, error = torch.tensor(found).mean(0).tolist()
    return {"part": "scores", "keys": kind, "packing": name, "logit_rmse": rmse, "result_error": error}


def with_biases(model: Any, times: float, seed: int = 0) -> Any:
    """A Llama of transformers with biases of keys that no score sees; every head's slowest pair of channels."""
    config = model.config
    config.attention_bias = True
    wide = type(model)(config).eval()
    wide.load_state_dict(model.state_dict(), strict=False)
    half, heads = config.head_dim // 2, config.num_key_value_heads
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in wide.model.layers:
            attention = layer.self_attn
            for product in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                product.bias.zero_()
            attention.q_proj.weight.view(-1, config.head_dim, config.hidden_size)[:, [half - 1, -1]] = 0
            size = float(attention.k_proj.weight.norm(dim=1).mean())
            sign = torch.randint(0, 2, (heads, 2), generator=make) * 2.0 - 1
            attention.k_proj.bias.view(heads, config.head_dim)[:, [half - 1, -1]] = times * size * sign
    return wide


def models_of(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """By name the checkpoints, and those with biases."""
    from transformers import AutoModelForCausalLM

    for path in sorted(p for p in folder.iterdir() if (p / "config.json").is_file()):
        yield path.name, lambda path=path: str(path)
        for times in BIASES:
            yield (
                f"{path.name}-k-bias-{times:g}",
                lambda path=path, times=times: with_biases(
                    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), times
                ),
            )


def compiled(given: Any, name: str, args: argparse.Namespace) -> Any:
    """One model with one cache."""
    return llmopt.compile(given, recipe_of(name), target=args.target, dtype=args.dtype)


def perplexity(model: str, given: Any, name: str, args: argparse.Namespace) -> Figures:
    """Over disjoint windows of held-out tokens."""
    made = compiled(given, name, args)
    tokens = load_file(args.tokens)["tokens"].flatten().long()
    # as `llmopt eval` cuts them: a window's last target is the token behind it
    windows = [tokens[i * args.window : (i + 1) * args.window + 1] for i in range(args.windows)]
    found = measure(logits_of(made, tokens_at_once([made])), batched(torch.stack(windows), 1), None, lambda q, n: None)
    cache = made.cache
    return {
        "part": "perplexity", "model": model, "packing": name, "perplexity": found.perplexity,
        "bytes_per_token": cache.bytes_per_page // cache.page_size, "windows": args.windows, "window": args.window,
    }  # fmt: skip


def texts(given: Any, name: str, args: argparse.Namespace) -> list[list[int]]:
    """Greedy texts from the starts of disjoint windows."""
    made = compiled(given, name, args)
    tokens = load_file(args.tokens)["tokens"].flatten().tolist()
    prompts = [tokens[i * 512 : i * 512 + args.prompt] for i in range(args.prompts)]
    return made.generate(prompts, max_new_tokens=args.length)  # type: ignore[no-any-return]


def shared(a: list[int], b: list[int]) -> int:
    """Tokens until they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def prefix(model: str, name: str, got: list[list[int]], want: list[list[int]], args: argparse.Namespace) -> Figures:
    """How long texts agree."""
    common = [shared(a, b) for a, b in zip(got, want, strict=True)]
    return {
        "part": "prefix", "model": model, "packing": name, "mean": sum(common) / len(common),
        "median": sorted(common)[len(common) // 2], "whole": sum(n == args.length for n in common),
        "prompts": args.prompts, "prompt_tokens": args.prompt, "tokens": args.length,
    }  # fmt: skip


class Rows:
    """The result file."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.rows: list[Figures] = json.loads(out.read_text())["rows"] if out is not None and out.is_file() else []

    def has(self, **about: Any) -> bool:
        """Is it measured already?"""
        return any(all(row.get(k) == v for k, v in about.items()) for row in self.rows)

    def add(self, row: Figures, started: float, args: argparse.Namespace) -> None:
        """Take it in and write."""
        where = {} if row["part"] == "scores" else {"dtype": args.dtype, "target": args.target}
        self.rows.append({**row, **where, "seconds": round(time.perf_counter() - started, 1), **environment()})
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
        if self.out is not None:
            write_json(self.out, {"rows": self.rows})


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=ROOT / "examples" / "models")
    parser.add_argument("--models", nargs="+", help="only these, by the names that the results have")
    parser.add_argument("--tokens", type=Path, help="a .safetensors file with `tokens`; without it only scores")
    parser.add_argument("--parts", nargs="+", default=["scores", "perplexity", "prefix"])
    parser.add_argument("--packings", nargs="+", default=list(OPTIONS), choices=OPTIONS, metavar="PACKING")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--target", default=None)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.target = args.target or Target.detect().name
    rows = Rows(args.out or (RESULTS / "kv-quality.json" if args.tokens else None))
    if "scores" in args.parts:
        for kind in ("normal", "4 channels x10", "offset 3"):
            for name in SCORES:
                if not rows.has(part="scores", keys=kind, packing=name):
                    started = time.perf_counter()
                    rows.add(scores(kind, name), started, args)
    if args.tokens is None:
        sys.exit()
    for model, load in models_of(args.models_dir):
        if args.models and model not in args.models:
            continue
        given = load()
        with tempfile.TemporaryDirectory() as folder:
            if not isinstance(given, str):
                given.save_pretrained(folder)
                given = folder
            measured(model, given, rows, args)


def measured(model: str, given: str, rows: Rows, args: argparse.Namespace) -> None:
    """Both parts of one model."""
    want: list[list[int]] | None = None
    for name in args.packings:
        started = time.perf_counter()
        about = {"model": model, "packing": name, "dtype": args.dtype}
        if "perplexity" in args.parts and not rows.has(part="perplexity", **about):
            rows.add(perplexity(model, given, name, args), started, args)
        started = time.perf_counter()
        if "prefix" in args.parts and "-k-bias-" not in model and not rows.has(part="prefix", **about):
            want = want or texts(given, "bf16", args)
            if name != "bf16":
                rows.add(prefix(model, name, texts(given, name, args), want, args), started, args)


if __name__ == "__main__":
    main()
