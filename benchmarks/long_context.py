"""Decoding steps behind long contexts on one GPU: packed keys and values against bf16 ones, all in one process.

    python benchmarks/long_context.py [--ctx 131008] [--recipes nvfp4 nvfp4+int4-kv:sinks=4,recent=124]

Llama-3.1-8B, weights N(0, 0.02). Nobody reads a prompt: pages are filled with normal keys and values, those of recipes
that do not pack them with what the codes of `int4-kv` stand for, so that both attend to the same. Before anything is
timed the logits of the first step are compared: an error above 0.12 of the first recipe's ends the script (of other
packings, low-bit weights and rotations, which make other numbers of the same pages, and where near tokens, whose pages
are left empty, are seen as they are, the error is told). Then the recipes run in turns, as in `decode.py`.
`RECIPE:rotate=none` is the recipe without rotation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _gpu_cases import add_cases, default_out, each_case, has_device, random_case, say, show
from _gpu_models import Weights, step_bytes
from _gpu_peers import Llmopt
from _gpu_timing import Clock, Denominators, interleaved, kernels, relative_error, summary
from torch import Tensor

from llmopt.compiler.emittable import ATTENDS, op_name, packings_of
from llmopt.compiler.ops.attention import write_packed
from llmopt.compiler.quant.kv import Packing
from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.runtime.measure import environment

RECIPES = [
    "nvfp4", "nvfp4+int4-kv", "nvfp4+int4-kv:rotate=none", "nvfp4+int4-kv:sinks=4,recent=124", "nvfp4+rotate-online"
]  # fmt: skip
MOST = 0.12  # bf16 steps are each 0.06 to 0.075 from fp64 here (decode_h200.json), so two of them that far apart
CHUNK = 8192  # tokens filled in one go
FILLED = Packing("int4", 128)  # what plain pages are rounded by beforehand


def recipe_of(text: str) -> Recipe:
    """`nvfp4+int4-kv`, or with `:rotate=none,recent=60` and the like options of its cache changed."""
    name, _, changes = text.partition(":")
    recipe = Recipe.parse(name)
    if not changes:
        return recipe
    pairs = (change.split("=") for change in changes.split(","))
    options = {option: int(value) if value.isdigit() else value for option, value in pairs}
    passes = [
        PassSpec.of(s.name, **{**dict(s.options), **options}) if s.name == "quantize-kv" else s for s in recipe.passes
    ]
    return replace(recipe, name=text, passes=tuple(passes))


class Filled(Llmopt):
    """`Llmopt` whose prompt nobody read."""

    def _read(self, row: int, ids: Tensor) -> None:
        cache = self.model.cache
        keys, values, channels = packings(self.model.program)
        for number, (name, pages) in enumerate(cache.tensors.items()):
            make = torch.Generator(self.device).manual_seed(number)
            for first in range(0, len(ids), CHUNK):
                slots = torch.tensor(cache.slots(row, first, min(first + CHUNK, len(ids))), device=self.device)
                x = torch.randn(1, pages.shape[1], len(slots), channels, device=self.device, generator=make).bfloat16()
                self._fill(pages, x, slots, keys if name.startswith("k") else values, name.startswith("k"))

    def _fill(self, pages: Tensor, x: Tensor, slots: Tensor, packing: str, keys: bool) -> None:
        if packing:
            write_packed(pages, x, slots, packing)
            return
        how = FILLED if keys else Packing("int4")
        rounded = how.turned_back(how.unpack(how.pack(x[0].transpose(0, 1)))).to(pages.dtype)
        pages[slots // pages.shape[2], :, slots % pages.shape[2]] = rounded


def packings(program: Any) -> tuple[str, str, int]:
    """How keys and values are packed, all layers alike, and a head's channels."""
    nodes = (node for graph in program.graphs.values() for node in graph.calls())
    attend = next(node for node in nodes if op_name(node) in ATTENDS)
    return *packings_of(attend), attend.args[0].meta["val"].shape[-1]


def gate(peers: Mapping[str, Llmopt]) -> dict[str, float]:
    """Relative error of each peer's first logits against the first peer's. Exits above MOST, where both have the
    same weights."""
    want, errors, first = None, {}, next(_basis(peer) for peer in peers.values())
    for name, peer in peers.items():
        peer.rewind()
        got = peer.step().clone()
        want = got if want is None else want
        errors[name] = relative_error(got, want)
        keys, values, _ = packings(peer.model.program)
        same = (not keys or (keys, values) == (str(FILLED), "int4")) and not peer.model.program.near_pages
        alike = same and _basis(peer) == first
        if not errors[name] <= (MOST if alike else sys.float_info.max):  # NaN and infinity never pass
            raise SystemExit(f"numerics: {name} is {errors[name]:.4f} from the first recipe, wanted at most {MOST}")
    return errors


def _basis(peer: Llmopt) -> tuple[PassSpec, ...]:
    """What a recipe does to weights. Where it turns them, pages of the same numbers hold other values."""
    return tuple(s for s in peer.model.recipe.passes if s.name in ("quantize", "rotate-hadamard"))


def run(args: argparse.Namespace) -> None:
    """Every length."""
    out = args.out or default_out("long-context", args.device)

    def one(model: Any, weights: Weights, about: tuple[str, int, int, dict[str, Any]]) -> None:
        name, batch, context, kept = about
        case = random_case(model, weights, batch, context + 1, False, kept)
        peers, ready = {}, {}
        for text in args.recipes:
            started = time.perf_counter()
            peers[text] = Filled(case, recipe_of(text), int(args.cache_gb * 2**30))
            ready[text] = time.perf_counter() - started
            say(f"  {text}: ready in {ready[text]:.1f} s")
        errors, clock, rates = gate(peers), Clock(args.device), Denominators(args.device)
        found = interleaved(peers, args.rounds, args.steps, clock, rates)
        rows = [
            {
                "peer": text, "note": peer.note, "ms": summary(found[text]["ms"]),
                "host_ms": summary(found[text]["host_ms"]), "error": errors[text], "ready_s": ready[text],
                "kv_bytes_per_token": peer.model.cache.bytes_per_page // peer.model.cache.page_size,
                **kernels(peer, clock),
            }
            for text, peer in peers.items()
        ]  # fmt: skip
        made = {
            "model": name, "dtype": args.dtype, "batch": batch, "tokens": context,
            "layers": model.config.num_hidden_layers,
            "bytes_per_step": step_bytes(weights, batch, context), **rates.to_dict(), "peers": rows, "failed": {},
            "gate": f"at most {MOST} from the first recipe's logits", "environment": environment(),
        }  # fmt: skip
        show(made, f"decoding step, {name}, batch {batch}, context {context}")
        if out:
            add_cases(out, [made])

    each_case([args.model], [(args.batch, c) for c in args.ctx], args, one)


def main() -> None:
    """Measure."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="llama-3.1-8b")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--ctx", type=int, nargs="+", default=[512, 131008], help="tokens in the cache")
    made.add_argument("--recipes", nargs="+", default=RECIPES)
    made.add_argument("--rounds", type=int, default=12)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--device", default="cuda")
    made.add_argument("--layers", type=int, help="fewer layers than the model has (not for figures)")
    made.add_argument("--minutes", type=float, default=1e9, help="begin no case after this long")
    made.add_argument("--cache-gb", type=float, default=16.5, help="the most that a recipe's cache may take")
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    if has_device(args.device):
        with torch.no_grad():
            run(args)


if __name__ == "__main__":
    main()
