"""README and docs say what the recipes, the tests and the result files say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", ["recipes", "models", "decode-cpu", "gpu", "compile-cost"])
def test_the_readme_is_up_to_date(generate: ModuleType, block: str) -> None:
    text = (ROOT / "README.md").read_text()
    assert generate.filled(text, block, generate.BLOCKS["README.md"][block]()) == text


def test_the_pass_page_shows_the_graph_before_and_after() -> None:
    # the text itself follows the versions of torch and transformers, so only its substance is compared
    before, after, fused = (ROOT / "docs" / "passes.md").read_text().split("```text\n")[1:4]
    after, fused = after.split("```")[0], fused.split("```")[0]
    assert before.startswith("def forward(input_ids: i64[B, T], position_ids: i64[B, T]):")
    assert "= attention(" in before
    assert after.startswith("def step(input_ids: i64[1, N], position_ids: i64[1, N], slots: i64[N], seq_ids: i64[N]")
    assert "attention(" not in after
    assert after.count("= kv_write(") == 2
    assert after.count("= attend(") == 1
    numbers = [int(n) for n in re.findall(r"# kernel (\d+)$", fused, re.MULTILINE)]
    assert sorted(set(numbers)) == list(range(numbers[-1] + 1))
    assert "kernel" not in after


def test_a_block_without_markers_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(KeyError, match="add the lines"):
        generate.filled("no markers here", "recipes", "x")


@pytest.mark.parametrize(("page", "block"), [("quality.md", "quality"), ("gpu.md", "lowbit")])
def test_the_pages_of_figures_are_up_to_date(generate: ModuleType, page: str, block: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert generate.filled(text, block, generate.BLOCKS[f"docs/{page}"][block]()) == text


def test_what_the_runtime_does_is_what_the_table_of_products_shows(generate: ModuleType, tmp_path: Path) -> None:
    row = {"us": 20.0, "pdl": 1}
    alike = {"scheme": "nvfp4", "model": "8b", "name": "gate_up", "peers_us": {"cublas": 60.0}}
    cases = [
        {**alike, "tokens": 1, "rows": [{**row, "us": 9.0, "pdl": 0}, row]},
        {**alike, "tokens": 16, "rows": [row]},
        {**alike, "tokens": 16, "rows": [{**row, "us": 10.0}]},  # the other way, measured to compare
        {**alike, "name": "gate_up-alone", "tokens": 1, "rows": [{**row, "us": 5.0}]},
    ]
    chain = {"scheme": "nvfp4", "model": "8b", "tokens": 1, "us": {"pdl": 40.0, "cublas": 100.0, "torch": 120.0}}
    why = {"gemlite 8b int4_g128 gate_up 16": "not there", "gemlite 70b-tp8 int4_g128 o 1": "nor here"}
    about = {"gpu": {"name": "NVIDIA H200"}, "torch": "2.11.0", "triton": "3.6.0", "said": why}
    for tokens, times in ((1, {"tinygemm": 30.0, "gemlite": 50.0}), (16, {"tinygemm": 60.0})):
        peers = {"cublas": 60.0, **times}
        cases.append({**alike, "scheme": "int4_g128", "tokens": tokens, "rows": [row], "peers_us": peers})
    figures = {"parts": [about], "cases": cases, "chain": [chain]}
    (tmp_path / "lowbit-gemm_h200.json").write_text(json.dumps(figures))
    said = generate.gpu_tables.products(tmp_path)
    assert "| NVFP4 | 8B gate_up | 20.0, 3.00x | 20.0, 3.00x |" in said
    assert "NVFP4 40.0 us, 2.50x cuBLAS' products and 3.00x torch's" in said
    assert "| gate_up | 1.5x, 2.5x | 3.0x, - |" in said
    assert "-: gemlite 8b int4_g128 gate_up 16: not there." in said


def test_a_row_for_each_recipe(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"model": "m", "dtype": "float32", "windows": 4, "window": 1024, "data": "d", "cpu": "c", "torch": "2"}
    plain = {"recipe": "default", "perplexity": 3.5, "bits_per_weight": None, "sqnr_db": {}, "against": None}
    lossy = {
        "recipe": "int4", "perplexity": 3.75, "bits_per_weight": 4.25, "sqnr_db": {"a": 19.96, "b": 21.0},
        "against": {"kl": 0.01234, "top1": 0.9512},
    }  # fmt: skip
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert generate.quality() == ""
    (tmp_path / "quality.json").write_text(json.dumps({"rows": [{**common, **plain}, {**common, **lossy}]}))
    said = generate.quality()
    assert "m, float32, 4 windows of 1,024 tokens of d, c, torch 2." in said
    assert "| `default` | - | - | 3.5000 | - | - |" in said
    assert said.endswith("| `int4` | 4.25 | 20.0 dB | 3.7500 | 0.0123 | 95.1% |")


PAGES = ("README.md", *(f"docs/{name}.md" for name in ("architecture", "passes", "torch_compile", "quality", "gpu")))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}"
