"""Tables of what was measured on GPUs, from the result files of benchmarks/results/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ON_GPU = ("batch", "alone", "chunks")  # ways of `benchmarks/exactness.py` that run there
OURS = "llmopt"
SCHEMES = {
    "nvfp4": "NVFP4", "mxfp4": "MXFP4", "int4_g128": "INT4, groups of 128", "mxfp6_e2m3": "MXFP6 E2M3",
    "fp8_channel": "FP8 by row", "mxfp8": "MXFP8", "int8": "INT8 by row",
}  # fmt: skip
INT4_PEERS = ("tinygemm", "gemlite")
MODELS = {"8b": "8B", "70b-tp8": "70B on eight GPUs"}


def everything(results: Path) -> str:
    """All tables, heading included; nothing where no result is committed."""
    parts = [text for stem in PARTS for path in sorted(results.glob(f"{stem}_*.json")) if (text := _part(path))]
    return "\n\n".join(["## Speed on a GPU", *parts]) if parts else ""


def _part(path: Path) -> str:
    """The table of one result file; nothing if no case of it has llmopt."""
    return PARTS[path.stem.partition("_")[0]](json.loads(path.read_text()))


def recipes(figures: dict[str, Any]) -> str:
    """Decoding steps of low-bit recipes: a row for each case and recipe."""
    cases = [c for c in figures["cases"] if OURS in peers(c)]
    lines = [
        f"The same steps with low-bit weights, one {machine(cases[-1])}, as many steps in turns; each recipe's logits "
        "are held to fp64 ones of its own rounded weights. Bytes are those that a step reads.",
        "",
        "| model | batch | context | recipe | a step | times default | GB a step | of read bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in cases:
        default = peers(c)[OURS]["ms"]["median"]
        for name, row in peers(c).items():
            if not name.startswith(OURS):
                continue
            ms, recipe = row["ms"]["median"], name.removeprefix(OURS).removeprefix("-") or "default"
            read = (c["bytes_per_step"] - row["saved_bytes"]) / 1e9
            lines.append(
                f"| {c['model']} | {c['batch']} | {c['tokens']} | `{recipe}` | {ms:.2f} ms | {default / ms:.2f}x | "
                f"{read:.1f} | {row['read_bandwidth_share']:.0%} |"
            )
    return "\n".join(lines)


def products(results: Path) -> str:
    """Products with low-bit weights: a row for each scheme and shape; nothing where no result is committed."""
    found = sorted(results.glob("lowbit-gemm_*.json"))
    return "\n\n".join(_products(json.loads(path.read_text())) for path in found)


def _products(figures: dict[str, Any]) -> str:
    cases: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for c in figures["cases"]:
        if not c["name"].endswith("-alone") and c["rows"]:  # what the runtime does comes first
            cases.setdefault((c["scheme"], c["model"], c["name"]), {}).setdefault(c["tokens"], c)
    counts = sorted({tokens for row in cases.values() for tokens in row})
    lines = [
        f"Microseconds of a product on one {machine({'environment': figures['parts'][0]})}, and how many times as long "
        "cuBLAS takes in bf16. Behind a norm (gate_up, qkv) ours include it up to 8 tokens, and read what its kernel "
        "made above; cuBLAS' never do.",
        "",
        "| weights | product | " + " | ".join(f"{n} token" + "s" * (n > 1) for n in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    for (scheme, model, name), row in sorted(cases.items(), key=lambda kv: list(SCHEMES).index(kv[0][0])):
        shown = [_timed(row[n]) if n in row else "-" for n in counts]
        lines.append(f"| {SCHEMES[scheme]} | {MODELS[model]} {name} | {' | '.join(shown)} |")
    chains = [
        f"{SCHEMES[c['scheme']]} {c['us']['pdl']:.1f} us, {c['us']['cublas'] / c['us']['pdl']:.2f}x cuBLAS' products "
        f"and {c['us']['torch'] / c['us']['pdl']:.2f}x torch's with what stands between them"
        for c in figures["chain"]
        if c["tokens"] == 1 and c["model"] == "8b"
    ]
    chain = f"A layer's four products in a chain of 32 layers, 8B, one token: {'; '.join(chains)}."
    return "\n".join([*lines, "", chain, *_int4_peers(figures)])


def _int4_peers(figures: dict[str, Any]) -> list[str]:
    """Against other kernels for int4 weights, of 8B; nothing where none was measured."""
    cases = figures["cases"]
    why = [f"{what}: {told}" for part in figures["parts"] for what, told in part["said"].items() if " 8b " in what]
    mine = [c for c in cases if c["scheme"] == "int4_g128" and c["model"] == "8b" and len(c["peers_us"]) > 1]
    if not mine:
        return []
    counts, rows = sorted({c["tokens"] for c in mine}), {c["name"]: [] for c in mine}
    for c in sorted(mine, key=lambda c: c["tokens"]):
        us, peers_us = next(row["us"] for row in c["rows"] if row["pdl"]), c["peers_us"]
        rows[c["name"]].append(", ".join(f"{peers_us[p] / us:.1f}x" if p in peers_us else "-" for p in INT4_PEERS))
    return [
        "",
        "How many times as long torch's int4 product (tinygemm) and gemlite's (tuned as it ships for an H100) take, "
        f"8B, groups of 128.{' -: ' + '; '.join(why) + '.' if why else ''}",
        "",
        "| product | " + " | ".join(f"{n} token" + "s" * (n > 1) for n in counts) + " |",
        "|---|" + "---|" * len(counts),
        *(f"| {name} | {' | '.join(times)} |" for name, times in rows.items()),
    ]


def _timed(case: dict[str, Any]) -> str:
    us = next(row["us"] for row in case["rows"] if row["pdl"])
    return f"{us:.1f}, {case['peers_us']['cublas'] / us:.2f}x"


def decode(figures: dict[str, Any]) -> str:
    """Decoding steps: a row for each case."""
    cases = [c for c in figures["cases"] if OURS in peers(c)]
    if not cases:
        return ""
    lines = [
        f"A decoding step on one {machine(cases[-1])}, {names(cases, 'dtype')}, token in to token out. Peers share "
        "weights (random) and process, run in turns, and pass one numerics gate: logits no farther from fp64 than 1.5 "
        "times transformers' eager ones. *Inductor* is the fastest of a plain module with fused matrices under "
        f"`torch.compile` with CUDA graphs ({modes(cases, 'plain-')}), *transformers* of its StaticCache "
        f"({modes(cases, 'hf-r hf-m')}). The share is of the read bandwidth measured in the same minutes that weights "
        "and cache read take up.",
        "",
        "| model | batch | context | **llmopt** | Inductor | transformers | eager | of read bandwidth | kernels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cases:
        ours = peers(c)[OURS]
        theirs = " | ".join(against(c, prefix) for prefix in ("plain-", "hf-r hf-m", "hf-eager"))
        lines.append(
            f"| {c['model']} | {c['batch']} | {c['tokens']} | {ours['ms']['median']:.2f} ms | {theirs} | "
            f"{ours['read_bandwidth_share']:.0%} | {ours['kernels']} |"
        )
    return "\n".join(lines)


def prefill(figures: dict[str, Any]) -> str:
    """Reading prompts: a row for each case."""
    cases = [c for c in figures["cases"] if OURS in peers(c)]
    if not cases:
        return ""
    lines = [
        f"Reading prompts on one {machine(cases[-1])}, {names(cases, 'dtype')}, under the same rules; *Inductor* is "
        "the plain module with `max-autotune-no-cudagraphs`, shapes fixed.",
        "",
        "| model | prompts | **llmopt** | Inductor | eager |",
        "|---|---|---|---|---|",
    ]
    for c in cases:
        ours = peers(c)[OURS]["ms"]["median"]
        theirs = " | ".join(against(c, prefix) for prefix in ("plain-", "hf-eager"))
        lines.append(f"| {c['model']} | {c['batch']} x {c['tokens']} | {ours:.1f} ms | {theirs} |")
    return "\n".join(lines)


def startup(figures: dict[str, Any]) -> str:
    """Seconds to the first token."""
    ways = figures["ways"]
    said = [
        f"{figures['model']}, {figures['dtype']}, on one {machine(figures)}, from weights on the device to the first "
        f"token: {ways['cold']['first_token_s']:.1f} s with empty caches, {ways['cached']['first_token_s']:.1f} s with "
        "kernels cached."
    ]
    if "load" in ways:
        load = ways["load"]
        said.append(
            f"From an artifact, without any compiler: {load['first_token_weights_resident_s']:.1f} s, and "
            f"{load['weights_s'] + load['hashes_s']:.1f} s to read and check "
            f"{ways['cold']['weight_bytes'] / 1e9:.0f} GB of weights."
        )
    return " ".join(said)


def attention(figures: dict[str, Any]) -> str:
    """Decoding attention over pages: a row for each case."""
    rows = figures.get("decode", [])
    if not rows:
        return ""
    lines = [
        f"Attention of one new token a sequence over paged keys and values, 32 query and 8 key/value heads of 128, "
        f"bfloat16, as the runtime launches it; copying moves {figures['copy_bytes_per_s'] / 1e12:.2f} TB/s here. "
        "*FlexAttention* is the fastest of its paged forms (pages as ours, and of 128).",
        "",
        "| contexts | page | **llmopt** | of copy bandwidth | FlexAttention |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        like = [r for r in rows if (r["batch"], r["context"]) == (row["batch"], row["context"])]
        flex = [us for r in like for name, us in r["us"].items() if name.startswith("flex")]
        ours, share = row["us"]["ours"], row["bytes_per_s"]["ours"] / figures["copy_bytes_per_s"]
        theirs = f"{min(flex):.0f} us, {min(flex) / ours:.2f}x" if flex else "-"
        lines.append(f"| {row['batch']} x {row['context']} | {row['page']} | {ours:.0f} us | {share:.0%} | {theirs} |")
    return "\n".join(lines)


def packed(figures: dict[str, Any]) -> str:
    """Decoding attention over packed keys and values: a row for each packing; and what storing them takes."""
    cases = figures["attention"]
    pages = " and ".join(n.removeprefix("flex") for n in cases[0]["us"] if n.startswith("flex"))
    lines = [
        "The same over packed keys and values (`keys/values`; `h128`: rotated in blocks of 128), against our own bf16 "
        f"pages and FlexAttention over pages of {pages}, one {machine(figures)}; reading moves "
        f"{figures['read_bytes_per_s'] / 1e12:.2f} TB/s here. *GB/s* are those of the packed bytes.",
        "",
        "| contexts | keys/values | a call | GB/s | times bf16 | times FlexAttention |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        us = case["us"]
        flex = min((t for name, t in us.items() if name.startswith("flex")), default=None)
        for name in (n for n in us if not n.startswith("flex")):
            rate, more = case["bytes_per_s"][name] / 1e9, f"{flex / us[name]:.1f}x" if flex else "-"
            lines.append(
                f"| {case['batch']} x {case['context']} | {name} | {us[name]:.0f} us | {rate:.0f} | "
                f"{us['bf16'] / us[name]:.2f}x | {more} |"
            )
    told = [
        f"{c['tokens']:,} token{'s' * (c['tokens'] > 1)} {c['us']['plain']:.1f} us plain, "
        + ", ".join(f"`{n}` {c['us'][n] / c['us']['plain']:.2f}x" for n in ("int4-h128/int4", "int4/int4", "int8/int8"))
        for c in figures["write"]
    ]
    lines += ["", f"To norm, rotate and store a step's keys and values, and its queries: {'; '.join(told)}."]
    return "\n".join(lines)


def rotations(results: Path) -> str:
    """Rotations of what down projections read; nothing where no result is committed."""
    return "\n\n".join(_rotations(json.loads(path.read_text())) for path in sorted(results.glob("rotation_*.json")))


def _rotations(figures: dict[str, Any]) -> str:
    lines = [
        f"Microseconds to rotate {figures['width']:,} channels in one block, alone or with SwiGLU before it, one "
        f"{machine(figures)}. *Copy* is one of as many bytes, *Inductor* multiplies by the two factors in bf16.",
        "",
        "| tokens | what | llmopt | copy | Inductor | SwiGLU alone by Inductor |",
        "|---|---|---|---|---|---|",
    ]
    for case in figures["cases"]:
        us = case["us"]
        what = "SwiGLU and rotation" if case["gated"] else "rotation"
        plain = f"{us['swiglu alone by inductor']:.1f}" if case["gated"] else "-"
        row = f"{us[case['shipped']]:.1f} | {us['copy']:.1f} | {us['by inductor']:.1f} | {plain}"
        lines.append(f"| {case['tokens']:,} | {what} | {row} |")
    return "\n".join(lines)


def contexts(figures: dict[str, Any]) -> str:
    """Decoding steps behind long contexts."""
    cases = figures["cases"]
    lines = [
        f"Steps of {names(cases, 'model')} with packed caches, one {machine(cases[0])}, in turns. `:` changes options "
        "of the cache as `benchmarks/long_context.py` takes them (a recipe has them in its file): `rotate=none` "
        "rotates nothing, `sinks` and `recent` are tokens seen as they are.",
        "",
        "| batch | context | recipe | KV bytes a token | a step | times the first |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        first = case["peers"][0]["ms"]["median"]
        for row in case["peers"]:
            ms = row["ms"]["median"]
            held = f"{case['batch']} | {case['tokens']:,} | `{row['peer']}` | {row['kv_bytes_per_token']:,}"
            lines.append(f"| {held} | {ms:.3f} ms | {first / ms:.2f}x |")
    return "\n".join(lines)


def exactness(figures: dict[str, Any]) -> str:
    """What was equal, and the largest ratio of errors."""
    models = figures["models"]
    ways = [w for m in models.values() for name, w in m["float32"]["ways"].items() if name in ON_GPU]
    equal, total = (sum(way[key] for way in ways) for key in ("equal", "of"))
    halves = [e for m in models.values() for d in ("bfloat16", "float16") for e in m[d]["errors"].values()]
    return (
        f"Exactness, {', '.join(models)}: in fp32 {equal} of {total} greedy tokens (each prompt in a batch, alone and "
        "read in chunks) are those of transformers on a CPU; in bf16 and fp16 the logits' error against fp64 is "
        f"{min(e['ratio'] for e in halves):.2f} to {max(e['ratio'] for e in halves):.2f} times that of transformers' "
        f"eager forward, of the worst single prompt {max(e['worst_sequence_ratio'] for e in halves):.2f} times."
    )


def peers(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of a case by peer."""
    return {row["peer"]: row for row in case["peers"]}


def against(case: dict[str, Any], prefixes: str) -> str:
    """`5.09 ms, 1.25x`: the fastest of the peers with one of these prefixes, and how many times its time is ours."""
    found = [row["ms"]["median"] for name, row in peers(case).items() if name.startswith(tuple(prefixes.split()))]
    if not found:
        return "-"
    return f"{min(found):.2f} ms, {min(found) / peers(case)[OURS]['ms']['median']:.2f}x"


def modes(cases: list[dict[str, Any]], prefixes: str) -> str:
    """`reduce-overhead, max-autotune`: which of the peers with one of these prefixes were measured, in any case."""
    found = (name for case in cases for name in peers(case) if name.startswith(tuple(prefixes.split())))
    return ", ".join(dict.fromkeys(name.partition("-")[2] for name in found)) or "not measured"


def machine(case: dict[str, Any]) -> str:
    """`NVIDIA H200 (torch 2.11.0, Triton 3.6.0)`."""
    made = case["environment"]
    return f"{made['gpu']['name']} (torch {made['torch']}, Triton {made['triton']})"


def names(cases: list[dict[str, Any]], key: str) -> str:
    """The values of a key, each once."""
    return ", ".join(dict.fromkeys(str(c[key]) for c in cases))


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "decode": decode, "decode-lowbit": recipes, "prefill": prefill, "attention": attention,
    "kv-attention": packed, "long-context": contexts, "startup": startup,
    "exactness": exactness,
}  # fmt: skip
