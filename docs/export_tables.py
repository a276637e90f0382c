"""Tables of docs/export.md and README.md from the results of exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXPORTS = {
    "hf": "transformers' `OnnxExporter`, float32",
    "hf-fused": "the same with its fusions for ONNX Runtime",
    "fp32": "**llmopt**, float32",
    "fp32-gqa": "**llmopt**, float32, `--attention gqa`",
    "fp8-exact": "**llmopt** `fp8`",
    "int8-exact": "**llmopt** `int8`",
    "int8-fast": "**llmopt** `int8 --accuracy-level 4`",
    "int4-exact": "**llmopt** `int4`",
    "int4-fast": "**llmopt** `int4 --accuracy-level 4`",
    "nvfp4-exact": "**llmopt** `nvfp4`",
    "nvfp4-fast": "**llmopt** `nvfp4 --accuracy-level 4`",
}


def _read(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / name).read_text())  # type: ignore[no-any-return]


def onnx_cpu(results: Path) -> str:
    """Decoding on ONNX Runtime's CPU provider."""
    figures = _read(results, "onnx-cpu.json")
    settings = figures["settings"]
    lines = [
        f"{settings['model']}, batch 1, {settings['prompt_tokens']} prompt and {settings['new_tokens']} new tokens, "
        f"{figures['cpu']}, {settings['threads']} threads, ONNX Runtime {figures['onnxruntime']}, transformers "
        f"{figures['transformers']}; all in one process, in turns, {settings['rounds']} rounds. Rows without "
        "`--accuracy-level 4` give the compiled model's tokens exactly.",
        "",
        "| export | tokens/s (decode) | | first token | file |",
        "|---|---|---|---|---|",
    ]
    for row in figures["results"]:
        lines.append(
            f"| {EXPORTS[row['export']]} | {row['decode_tokens_per_s']:.0f} | {row['times_hf']:.2f}x | "
            f"{row['first_token_ms']:.0f} ms | {row['file_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def export_memory(results: Path) -> str:
    """Peak memory of exports."""
    figures = _read(results, "export-memory.json")
    size = figures["settings"]["weight_bytes"]
    lines = [
        f"A random Llama of {size / 2**30:.2f} GiB in bfloat16 on {figures['cpu']}, {figures['threads']} threads; "
        "above the peak of the same export of a small model of as many layers.",
        "",
        "| format | recipe | peak above the baseline | baseline | written |",
        "|---|---|---|---|---|",
    ]
    for row in figures["results"]:
        above, base = (row[key] / 2**20 for key in ("above_bytes", "baseline_bytes"))
        written = row["written_bytes"] / 2**30
        lines.append(f"| {row['to']} | `{row['recipe']}` | {above:.0f} MiB | {base:.0f} MiB | {written:.2f} GiB |")
    return "\n".join(lines)
