"""Writes the generated blocks of README.md and docs/: tables from result files, tests and recipes, graphs from a model.

python docs/generate.py          # rewrite the blocks
python docs/generate.py --check  # fail if a block is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import export_tables  # noqa: E402
import gpu_tables  # noqa: E402
from gpu_tables import names  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MEASURED = "llmopt/measured.json"


def result(name: str) -> dict[str, Any]:
    """A committed result file."""
    return json.loads((RESULTS / name).read_text())  # type: ignore[no-any-return]


def one_layer_llama() -> Any:
    """A captured Llama of one layer, random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmopt.compiler.capture_hf import capture_model

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    return capture_model(LlamaForCausalLM(config))


def code(text: str) -> str:
    """A graph as a block; not marked as Python, whose formatters would break its lines."""
    return f"```text\n{text.strip()}\n```"


def kv_cache_graphs() -> str:
    """`forward` and `step` around insert-kv-cache."""
    from llmopt.compiler.pipeline import Context, Pipeline
    from llmopt.compiler.recipe import RECIPES
    from llmopt.compiler.target import Target
    from llmopt.passes import Canonicalize, InsertKVCache, RaiseAten

    context = Context(Target.parse("cpu:generic"), RECIPES["reference"])
    before = Pipeline([RaiseAten(), Canonicalize()]).run(one_layer_llama(), context)
    after = Pipeline([InsertKVCache()]).run(before, context)
    texts = (before.graph("forward").print(provenance=False), after.graph("step").print(provenance=False))
    return "\n\n".join(map(code, texts))


def fused_graph() -> str:
    """`step` after fuse for cuda:sm_90, a line each for the kernels."""
    from llmopt.compiler.pipeline import Context, Pipeline
    from llmopt.compiler.recipe import RECIPES
    from llmopt.compiler.target import Target
    from llmopt.passes import Canonicalize, Fuse, InsertKVCache, RaiseAten

    context = Context(Target.parse("cuda:sm_90"), RECIPES["default"])
    passes = [RaiseAten(), Canonicalize(), InsertKVCache(), Fuse()]
    return code(Pipeline(passes).run(one_layer_llama(), context).graph("step").print(provenance=False))


def quantized_graph() -> str:
    """What quantize changes in `forward`, as a diff."""
    from llmopt.passes import Quantize

    return changed_by(Quantize(weights="nvfp4"))


def rotated_graph() -> str:
    """What rotate-hadamard changes in `forward`, as a diff."""
    from llmopt.passes import RotateHadamard

    return changed_by(RotateHadamard(r4=True))


def packed_graph() -> str:
    """What quantize-kv changes in `step`, as a diff."""
    from llmopt.passes import InsertKVCache, QuantizeKV

    return changed_by(QuantizeKV(), InsertKVCache())


def changed_by(item: Any, *ahead: Any) -> str:
    """The lines that a pass takes away and those that it puts there; `ahead`: passes that it stands behind."""
    from llmopt.compiler.pipeline import Context, Pipeline, program_diff
    from llmopt.compiler.recipe import RECIPES
    from llmopt.compiler.target import Target
    from llmopt.passes import Canonicalize, RaiseAten

    context = Context(Target.parse("cpu:generic"), RECIPES["default"])
    before = Pipeline([RaiseAten(), Canonicalize(), *ahead]).run(one_layer_llama(), context)
    after = Pipeline([item]).run(before, context)
    changed = [line for line in program_diff(before, after).splitlines() if line[:2] in ("- ", "+ ")]
    return "```diff\n" + "\n".join(changed) + "\n```"


def measured() -> str:
    """The perplexities that `llmopt recipes` tells of, by recipe, as JSON."""
    from llmopt.commands.catalog import MEASURED_ON

    rows = result("quality.json")["rows"] if (RESULTS / "quality.json").is_file() else []
    found = {row["recipe"]: round(row["perplexity"], 4) for row in rows if row["model"] == MEASURED_ON}
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def recipes() -> str:
    """The built-in recipes."""
    from llmopt.commands.catalog import MEASURED_ON, bits_of, measured
    from llmopt.compiler.recipe import RECIPES

    lines = [f"| recipe | what it is | bits a weight | perplexity of {MEASURED_ON} |", "|---|---|---|---|"]
    for recipe in RECIPES.values():
        lines.append(f"| `{recipe.name}` | {recipe.about} | {bits_of(recipe)} | {measured(recipe.name)} |")
    return "\n".join(lines)


def models() -> str:
    """The model families that the tests compare with transformers."""
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from families import markdown

    return str(markdown())


def decode_cpu() -> str:
    """Decoding against transformers."""
    figures = result("decode-cpu.json")
    settings = figures["settings"]
    lines = [
        f"{Path(settings['model']).name}, {settings['dtype']}, {settings['prompt_tokens']} prompt and "
        f"{settings['new_tokens']} new tokens, {figures['cpu']}, {figures['threads']} threads, "
        f"torch {figures['torch']}; peers interleaved in one process, greedy tokens identical. The last column is the "
        "share of the read bandwidth measured in the same rounds "
        f"({figures['read_bandwidth_bytes_per_s'] / 1e9:.0f} GB/s) that the weights and cache read take up.",
        "",
        "| batch | | tokens/s (decode) | first token | of read bandwidth |",
        "|---|---|---|---|---|",
    ]
    for row in figures["results"]:
        lines.append(
            f"| {row['batch']} | {NOTES[row['peer']]} | {row['decode_tokens_per_s']:.0f} | "
            f"{row['first_token_ms']:.0f} ms | {row['read_bandwidth_share']:.0%} |"
        )
    return "\n".join(lines)


NOTES = {
    "llmopt": "**llmopt**",
    "hf-eager": "transformers `generate`",
    "hf-inductor": "transformers StaticCache + `torch.compile`",
}


def compile_cost() -> str:
    """Rewriting against torch's matcher, and compiling a 70B config."""
    rewrite, model = result("rewrite-cost.json"), result("compile-cost.json")
    lines = ["| nodes | llmopt | PatternMatcherPass | ratio |", "|---|---|---|---|"]
    for row in rewrite["sizes"]:
        ours, theirs = row["llmopt_s"], row["inductor_s"]
        lines.append(f"| {row['nodes']:,} | {ours:.3f} s | {theirs:.3f} s | {theirs / ours:.1f}x |")
    last = model["depths"][-1]
    lines += [
        "",
        f"A Llama-70B config ({last['layers']} layers, {last['weight_gb']:.0f} GB of weights that are never allocated) "
        f"goes from the meta device to the lowered step in {last['total_s']:.1f} s, of which torch.export takes "
        f"{last['export_s']:.1f} s, in {last['peak_gb']:.2f} GB; {last['region_calls']} region calls are "
        f"{last['distinct_regions']} distinct regions.",
    ]
    return "\n".join(lines)


def quality() -> str:
    """What recipes cost in accuracy: a table a model; nothing where no result is committed."""
    if not (RESULTS / "quality.json").is_file():
        return ""
    rows = [row for row in result("quality.json")["rows"] if not row["recipe"].startswith("rotate")]
    return "\n\n".join(
        quality_of([r for r in rows if r["model"] == m]) for m in dict.fromkeys(r["model"] for r in rows)
    )


def rotations() -> str:
    """Perplexity of recipes with and without rotations."""
    from llmopt.commands.catalog import MEASURED_ON

    rows = [row for row in result("quality.json")["rows"] if row["model"] == MEASURED_ON]
    found = {row["recipe"]: row["perplexity"] for row in rows}
    lines = [
        f"{MEASURED_ON}, as above; the lowest of a line is bold.",
        "",
        "| recipe | as it is | `rotate` | `rotate-online` |",
        "|---|---|---|---|",
    ]
    for name in ("default", *found):
        kinds = [f"{rotation}+{name}" if name != "default" else rotation for rotation in ("rotate", "rotate-online")]
        three = [found.get(kind) for kind in (name, *kinds)]
        if name.startswith("rotate") or (name == "default" and len(lines) > 4) or None in three:
            continue
        told = [f"**{x:.4f}**" if x == min(three) else f"{x:.4f}" for x in three]  # type: ignore[type-var, str-format]
        lines.append(f"| `{name}` | {' | '.join(told)} |")
    return "\n".join(lines)


def kv_quality() -> str:
    """What packed keys and values cost: scores, perplexity, how long texts agree."""
    rows = result("kv-quality.json")["rows"]
    return "\n\n".join((kv_scores(rows), kv_perplexity(rows), kv_prefix(rows)))


def kv_scores(rows: list[dict[str, Any]]) -> str:
    """Errors of made-up keys: a row for each packing."""
    rows = [row for row in rows if row["part"] == "scores"]
    kinds = list(dict.fromkeys(row["keys"] for row in rows))
    lines = [
        "Errors of packed keys, N(0, 1), 128 channels, 2,048 keys: the root mean square error of q.k / sqrt(128), and "
        "the relative error of attention's result. `-h16`: rotated in blocks of 16.",
        "",
        f"| keys | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for packing in dict.fromkeys(row["packing"] for row in rows):
        of = {row["keys"]: row for row in rows if row["packing"] == packing}
        cells = [f"{of[k]['logit_rmse']:.3f}, {of[k]['result_error']:.3f}" for k in kinds]
        lines.append(f"| `{packing}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def kv_perplexity(rows: list[dict[str, Any]]) -> str:
    """Perplexity: a row for each packing, a column for each model."""
    rows = [row for row in rows if row["part"] == "perplexity"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    first = rows[0]
    lines = [
        f"Perplexity, {names(rows, 'dtype')}, {first['windows']} windows of {first['window']:,} tokens, weights as "
        "they are. `k64`: keys are rotated in blocks of 64, `kv64`: values, too; *as computed*: nothing is packed. "
        "`near`: the first 4 and the last 60 tokens are seen as they are. `-k-bias-10`: biases of ten times the keys' "
        "size on one pair of channels, which no score sees (`benchmarks/kv_quality.py`).",
        "",
        f"| packing | {' | '.join(models)} |",
        "|---" * (len(models) + 1) + "|",
    ]
    for packing in dict.fromkeys(row["packing"] for row in rows):
        of = {row["model"]: f"{row['perplexity']:.3f}" for row in rows if row["packing"] == packing}
        lines.append(f"| {_cache(packing)} | {' | '.join(of.get(m, '-') for m in models)} |")
    return "\n".join(lines)


def kv_prefix(rows: list[dict[str, Any]]) -> str:
    """Common prefixes of greedy texts."""
    rows = [row for row in rows if row["part"] == "prefix"]
    first = rows[0]
    lines = [
        f"Tokens that greedy texts share with those of the unpacked cache before they part, of {first['tokens']}: "
        f"{first['prompts']} prompts of {first['prompt_tokens']} tokens, {names(rows, 'model')}, "
        f"{names(rows, 'dtype')}, one {first['gpu']['name']}. Texts part at near ties, so means of so few prompts "
        "differ by chance, too.",
        "",
        "| packing | mean | median | whole texts |",
        "|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["mean"]):
        lines.append(f"| {_cache(row['packing'])} | {row['mean']:.1f} | {row['median']} | {row['whole']} |")
    return "\n".join(lines)


def _cache(packing: str) -> str:
    return "as computed" if packing == "bf16" else f"`{packing}`"


def quality_of(rows: list[dict[str, Any]]) -> str:
    """The table of one model."""
    first = rows[0]
    lines = [
        f"{first['model']}, {names(rows, 'dtype')}, {first['windows']} windows of {first['window']:,} tokens of "
        f"{first['data']}, {names(rows, 'cpu')}, torch {names(rows, 'torch')}. Bits are those of the quantised "
        "weights, scales included; SQNR is that of the worst of them.",
        "",
        "| recipe | bits | SQNR | perplexity | KL | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        bits = f"{row['bits_per_weight']:.2f}" if row["bits_per_weight"] else "-"
        noise = f"{min(row['sqnr_db'].values()):.1f} dB" if row["sqnr_db"] else "-"
        close = row["against"]
        apart = f"{close['kl']:.4f} | {close['top1']:.1%}" if close else "- | -"
        lines.append(f"| `{row['recipe']}` | {bits} | {noise} | {row['perplexity']:.4f} | {apart} |")
    return "\n".join(lines)


def gpu() -> str:
    """Everything measured on GPUs, heading included."""
    return gpu_tables.everything(RESULTS)


def rotation_kernels() -> str:
    """Rotations on GPUs."""
    return gpu_tables.rotations(RESULTS)


def lowbit() -> str:
    """Products with low-bit weights on GPUs."""
    return gpu_tables.products(RESULTS)


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "recipes": recipes,
        "models": models,
        "decode-cpu": decode_cpu,
        "onnx-cpu": lambda: export_tables.onnx_cpu(RESULTS),
        "gpu": gpu,
        "compile-cost": compile_cost,
    },
    "docs/quality.md": {"quality": quality, "rotations": rotations, "kv-quality": kv_quality},
    "docs/export.md": {
        "onnx-cpu": lambda: export_tables.onnx_cpu(RESULTS),
        "export-memory": lambda: export_tables.export_memory(RESULTS),
    },
    "docs/gpu.md": {"rotation": rotation_kernels, "lowbit": lowbit},
    "docs/passes.md": {
        "insert-kv-cache": kv_cache_graphs, "rotate-hadamard": rotated_graph, "quantize": quantized_graph,
        "quantize-kv": packed_graph, "fuse": fused_graph,
    },
}  # fmt: skip


def filled(text: str, name: str, body: str) -> str:
    """`text` with the block `name` replaced; KeyError if the markers are missing."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise KeyError(f"no block {name!r}: add the lines <!-- {name}:begin --> and <!-- {name}:end -->")
    return pattern.sub(lambda m: f"{m.group(1)}{body.strip()}\n{m.group(2)}", text)


def main() -> None:
    """Fill or check every block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a block is out of date")
    check = parser.parse_args().check
    stale = []
    for file in (MEASURED, *BLOCKS):  # the recipes' table reads the first
        path = ROOT / file
        old = new = path.read_text()
        for name, make in BLOCKS.get(file, {}).items():
            new = filled(new, name, make())
        if file == MEASURED:
            new = measured()
        if new != old:
            stale.append(file)
            if not check:
                temporary = path.with_name(path.name + ".tmp")
                temporary.write_text(new)
                temporary.replace(path)
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/generate.py")


if __name__ == "__main__":
    main()
