"""Peak memory of `llmopt export` on a random model of a few gigabytes, above that on a small one of the same structure.

python benchmarks/export_memory.py --out benchmarks/results/export-memory.json

Each export runs in a process of its own, which keeps what the kernel says of it when it ends: VmHWM of
/proc/self/status, which counts the pages of mapped files, too (ru_maxrss would count what this process had when it
forked). The small model, of as many layers, gives the baseline: what interpreter, torch, capture and passes take.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llmopt.runtime.measure import environment, write_json

PICO = Path(__file__).resolve().parents[1] / "examples" / "models" / "pico-llama-4m"
MEASURED = """
import atexit, sys
from pathlib import Path
kept = Path(sys.argv.pop())
atexit.register(lambda: kept.write_text(Path("/proc/self/status").read_text()))
from llmopt.cli import main
main()
"""
CASES = (
    ("compressed-tensors", "default"),
    ("compressed-tensors", "nvfp4+max"),
    ("compressed-tensors", "int4+max"),
    ("onnx", "int4+max"),
    ("onnx", "default"),
    ("genai", "nvfp4+max"),
)


def checkpoint(folder: Path, layers: int, hidden: int, vocabulary: int) -> int:
    """A random Llama in bfloat16, a file for each few tensors; its bytes."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(hidden // 256, 1), max_position_embeddings=2048,
        dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PICO / name, folder)
    where, total = {}, 0
    make = torch.Generator().manual_seed(0)
    for number, (name, weight) in enumerate(model.named_parameters()):
        tensor = (torch.randn(weight.shape, generator=make) * 0.02).bfloat16()
        where[name], total = f"model-{number:05d}.safetensors", total + tensor.nbytes
        save_file({name: tensor}, folder / where[name], {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak(model: Path, out: Path, to: str, recipe: str) -> tuple[int, int]:
    """Peak bytes and bytes written of one export."""
    kept = out.with_suffix(".status")
    given = ["export", str(model), "--to", to, "-r", recipe, "-o", str(out), str(kept)]
    if subprocess.run([sys.executable, "-c", MEASURED, *given], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"llmopt {' '.join(given[:-1])} failed")
    (line,) = (line for line in kept.read_text().splitlines() if line.startswith("VmHWM"))
    written = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    return int(line.split()[1]) * 1024, written


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        checkpoint(small, args.layers, 256, 512)
        size = checkpoint(large, args.layers, args.hidden, args.vocabulary)
        print(f"{size / 2**30:.2f} GiB of weights")
        for to, recipe in CASES:
            base, _ = peak(small, Path(folder, "out"), to, recipe)
            most, written = peak(large, Path(folder, "out"), to, recipe)
            results.append({
                "to": to, "recipe": recipe, "baseline_bytes": base, "peak_bytes": most, "above_bytes": most - base,
                "written_bytes": written,
            })  # fmt: skip
            print(f"{to:20} {recipe:10} {(most - base) / 2**20:6.0f} MiB above {base / 2**20:5.0f}")
    if args.out:
        settings = {"layers": args.layers, "hidden": args.hidden, "vocabulary": args.vocabulary, "weight_bytes": size}
        write_json(args.out, {**environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
