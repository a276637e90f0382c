"""Compile a checkpoint folder, continue prompts of different lengths in one batch, save, load in place of compiling."""

import sys
import tempfile
from pathlib import Path

import llmopt

folder = Path(__file__).resolve().parent / "models" / "pico-llama-4m"
recipe = sys.argv[1] if len(sys.argv) > 1 else "default"

model = llmopt.compile(folder, recipe=recipe, dtype="float32")
prompts = ["import os\n", "def add(a, b):\n    return", "class Node:\n    def __init__(self"]
for prompt, text in zip(prompts, model.generate(prompts, max_new_tokens=24), strict=True):
    print(f"{prompt!r} -> {text!r}")

print("sampled:", repr(model.generate("for i in", max_new_tokens=12, temperature=0.8, top_p=0.9, seed=7)))

with tempfile.TemporaryDirectory() as place:
    model.save(Path(place) / "pico.llmopt")
    again = llmopt.load(Path(place) / "pico.llmopt")
    print(
        "loaded gives the same:",
        again.generate(prompts, max_new_tokens=24) == model.generate(prompts, max_new_tokens=24),
    )
