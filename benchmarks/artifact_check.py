"""Does an artifact that another machine compiled run here, without any compiler, and make the tokens of the CPU?

    python benchmarks/artifact_check.py ARTIFACT --record MODEL --expect tokens.json     on a CPU: what to expect
    python benchmarks/artifact_check.py ARTIFACT --expect tokens.json                    on the GPU it was made for

Recording takes the artifact's dtype and runs the recipe `reference` on the CPU, greedily. Beside the tokens it keeps
the best logits of the same weights in fp64 after each of them, and how far the CPU's own logits were from those: a
token that differs is excused only where fp64 puts both within twice that rounding of the best, and the rest of that
prompt is not compared.

Checking makes `import triton` fail and the compilation of a kernel an error. It times loading (weights lie on the disk;
reading and hashing them is in it) and the first token behind a prompt, then makes all tokens, of the prompts in a batch
and of each alone. Exits with 1 if a token is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LENGTHS = (1, 33, 150)  # of the prompts
KEPT = 8  # of the best logits
Figures = dict[str, Any]


def record(artifact: Path, model: str, new_tokens: int) -> Figures:
    """Prompts, the tokens of the CPU behind them, and the best logits in fp64."""
    import torch
    from _exact_models import exact_logits, logits, subject, widened
    from _exact_runs import greedy, opened

    manifest = json.loads((artifact / "manifest.json").read_text())
    source = subject(model)
    prompts = [source.ids(length, row) for row, length in enumerate(LENGTHS)]
    source.model.to(getattr(torch, manifest["model"]["dtype"]))
    tokens = opened(source.model, "cpu", "reference").engine.generate(prompts, greedy(new_tokens))
    exact, best = widened(source.model), []
    for prompt, made in zip(prompts, tokens, strict=True):
        ids = [*prompt, *made[:-1]]
        truth = exact_logits(exact, ids)[len(prompt) - 1 :]
        rounding = (logits(source.model, ids)[len(prompt) - 1 :] - truth).abs().amax(-1)
        top = truth.topk(KEPT)
        best.append([
            {"ids": i, "logits": v, "rounding": r}
            for i, v, r in zip(top.indices.tolist(), top.values.tolist(), rounding.tolist(), strict=True)
        ])  # fmt: skip
    return {"model": manifest["model"]["name"], "dtype": manifest["model"]["dtype"], "torch": torch.__version__,
            "prompts": prompts, "tokens": tokens, "best": best}  # fmt: skip


def without_compilers() -> None:
    """From here on Triton cannot be imported and no kernel compiled."""
    sys.modules["triton"] = None  # type: ignore[assignment]
    from llmopt.codegen import cubin, cubin_parallel

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was to be compiled: the artifact lacks it")

    for module in (cubin, cubin_parallel):
        module.compile_kernel = refuse  # type: ignore[assignment]
    cubin_parallel.compile_all = refuse  # type: ignore[assignment]


def check(artifact: Path, expected: Figures) -> tuple[Figures, list[str]]:
    """Load, time and compare; the figures, and what is wrong."""
    import llmopt
    from llmopt.compiler import knobs
    from llmopt.runtime.engine import SamplingParams

    with tempfile.TemporaryDirectory() as empty, knobs.scope(cache=empty):
        started = time.perf_counter()
        model = llmopt.load(artifact, cache_bytes=256 << 20)
        loading = time.perf_counter() - started
        prompts, count = expected["prompts"], len(expected["tokens"][0])
        started = time.perf_counter()
        next(iter(model.generate(prompts[-1], 1, ignore_eos=True, stream=True)))
        first = time.perf_counter() - started
        params = SamplingParams(max_new_tokens=count, ignore_eos=True)
        ways = {
            "batch": model.engine.generate(prompts, params),
            "alone": [model.engine.generate([p], params)[0] for p in prompts],
        }
        left = [str(p.name) for p in Path(empty).rglob("*.cubin")]
    found: Figures = {"load_s": loading, "first_token_s": loading + first, "ways": {}}
    wrong = [f"kernels were compiled: {left}"] if left else []
    for way, made in ways.items():
        pairs = list(zip(made, expected["tokens"], expected["best"], strict=True))
        places = [compared(*pair) for pair in pairs]
        found["ways"][way] = {"equal": sum(p["equal"] for p in places), "of": count * len(prompts),
                              "differences": [p for p in places if "got" in p]}  # fmt: skip
        wrong += [f"{way}, prompt {row}: {p}" for row, p in enumerate(places) if not p.get("within_rounding", True)]
    return found, wrong


def compared(made: Sequence[int], want: Sequence[int], best: Sequence[Figures]) -> Figures:
    """How many tokens are equal, and the first that is not: is it within rounding of the best?"""
    at = next((i for i, (a, b) in enumerate(zip(made, want, strict=True)) if a != b), None)
    if at is None:
        return {"equal": len(want)}
    values = dict(zip(best[at]["ids"], best[at]["logits"], strict=True))
    below = max(values.values()) - min(values.get(token, float("-inf")) for token in (made[at], want[at]))
    excused = below <= 2 * best[at]["rounding"]
    return {"equal": at, "got": made[at], "want": want[at], "below_best_fp64": below,
            "rounding": best[at]["rounding"], "within_rounding": excused}  # fmt: skip


def origin(artifact: Path) -> Figures:
    """What made the artifact."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    code = json.loads((artifact / "code" / "cubins.json").read_text()) if "gpu" in manifest["code"] else []
    return {"torch": manifest["torch"], "llmopt": manifest["llmopt"], "target": manifest["target"],
            "kernels": len(code), "toolkits": sorted({entry["cubin"]["toolkit"] for entry in code}),
            "bytes": sum(f["size"] for f in manifest["files"].values())}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Record or check; 1 if a token is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--expect", type=Path, help="file of tokens, written by --record (ARTIFACT.json)")
    parser.add_argument("--record", metavar="MODEL", help="write that file for the artifact's checkpoint folder")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, help="result file; results of other artifacts in it stay")
    args = parser.parse_args(argv)
    if args.artifact is None:
        print("no artifact is given: nothing is checked")
        return 0
    args.expect = args.expect or args.artifact.with_name(f"{args.artifact.name}.json")
    if args.record:
        args.expect.write_text(json.dumps(record(args.artifact, args.record, args.new_tokens)) + "\n")
        return 0
    without_compilers()
    from llmopt.runtime.measure import environment, write_json

    expected = json.loads(args.expect.read_text())
    found, wrong = check(args.artifact, expected)
    figures = {"model": expected["model"], "dtype": expected["dtype"], "made_by": origin(args.artifact), **found,
               "failed": wrong, "environment": environment()}  # fmt: skip
    print(f"{args.artifact.name}: loaded in {found['load_s']:.2f} s, first token after {found['first_token_s']:.2f} s; "
          + ", ".join(f"{w} {f['equal']} of {f['of']} tokens equal" for w, f in found["ways"].items()))  # fmt: skip
    for line in wrong:
        print(f"  FAILED {line}")
    if args.out:
        results = json.loads(args.out.read_text()) if args.out.exists() else {}
        write_json(args.out, {**results, args.artifact.name: figures})
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
