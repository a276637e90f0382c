"""The command line: what goes to stdout and stderr, exit codes, JSON for scripts, and planted faults found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import llmopt
from llmopt.cli import app
from llmopt.commands.figures import deliver
from llmopt.compiler import gpus
from llmopt.compiler.recipe import RECIPES, Recipe
from llmopt.compiler.target import TARGETS
from llmopt.console import guarded

PICO = Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m"
COMMANDS = ("compile", "run", "bench", "eval", "show", "diff", "bisect", "kernels", "recipes", "targets")

RULES = """
from llmopt.compiler.graph import origin
from llmopt.compiler.pattern import ir
from llmopt.compiler.rewrite import Rule

class OpenGated(Rule):
    wrong = "nowhere"
    def pattern(self, gate, up):
        return ir.gated(gate, up, "silu")
    def rewrite(self, b, m):
        gate, up = m["gate"], m["up"]
        if origin(m.root).module.startswith(self.wrong):
            gate, up = up, gate
        return b.aten.mul.Tensor(b.aten.silu.default(gate), up)

class Planted(OpenGated):
    wrong = "layers.1."

class Shorter(Rule):  # the last three tokens only
    def pattern(self, q, k, v, tables, seqs, positions, scale):
        return ir.attend(q, k, v, tables, seqs, positions, None, scale, 0, 0.0)
    def rewrite(self, b, m):
        given = [m[n] for n in ("q", "k", "v", "tables", "seqs", "positions")]
        return b.ir.attend(*given, None, m["scale"], 3, 0.0)
"""


def cli(*args: str, stdin: str | None = None, code: int = 0) -> str:
    """stdout of a command that exits with `code`."""
    done = CliRunner().invoke(app, list(args), input=stdin)
    assert done.exit_code == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "pico.llmopt"
    said = json.loads(cli("compile", str(PICO), "-o", str(out), "-r", "reference", "--dtype", "float32", "--json"))
    assert said["artifact"] == str(out)
    assert said["bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert [entry["name"] for entry in said["report"]["passes"]] == [s.name for s in RECIPES["reference"].passes]
    return out


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "my_rules.py"
    path.write_text(RULES)
    return path


def greedy(model: Path, *rest: str) -> str:
    return cli("run", str(model), "import os\n", "-n", "12", *rest)


def test_version_and_help():
    assert cli("--version") == f"llmopt {llmopt.__version__}\n"
    for command in COMMANDS:
        assert f"llmopt {command}" in cli(command, "--help")


def test_help_does_not_wait_for_torch():
    code = "import sys, llmopt.cli; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    fastest = 9.0
    for _ in range(3):
        started = time.process_time(), time.perf_counter()
        subprocess.run([sys.executable, "-P", "-m", "llmopt.cli", "--help"], check=True, capture_output=True)
        fastest = min(fastest, time.perf_counter() - started[1])
    assert fastest < 2.0  # 0.2 s on an idle machine; torch alone takes longer than this on a busy one


def test_unknown_options_and_commands_exit_with_2():
    cli("compile", str(PICO), "-o", "x", "--no-such-option", code=2)
    cli("no-such-command", code=2)
    cli("compile", str(PICO), code=2)


def test_recipes():
    listed = json.loads(cli("recipes", "--json"))
    assert [Recipe.from_dict(entry) for entry in listed] == list(RECIPES.values())
    assert Recipe.from_yaml(cli("recipes", "reference")) == RECIPES["reference"]
    assert yaml.safe_load(cli("recipes", "default"))["name"] == "default"
    for name in RECIPES:
        assert name in cli("recipes")


def test_targets():
    said = json.loads(cli("targets", "--json"))
    runs = {entry["target"]: entry["runs_here"] for entry in said["targets"]}
    assert list(runs) == list(TARGETS)
    assert runs["cpu"]
    assert runs["cpu:generic"]
    assert not (runs["cpu:avx2"] and runs["cpu:neon"])


def test_a_gpu_that_cannot_be_used_is_explained_and_nothing_is_compiled_for_it(monkeypatch: pytest.MonkeyPatch):
    seen = gpus.Seen(
        "2.11.0+cu130", "13.0", "550.54.14", True, None, "the NVIDIA driver ... too old (found version 12040)"
    )
    monkeypatch.setattr(gpus, "look", lambda: seen)
    monkeypatch.setattr("llmopt.commands.model.build", None)
    assert "the NVIDIA driver is 550.54.14 and knows CUDA up to 12.4" in cli("targets")
    done = CliRunner().invoke(app, ["run", str(PICO), "def", "--target", "cuda:sm_90"])
    assert done.exit_code == 2
    assert (
        "error: run: a model for target cuda:sm_90 cannot run here: this machine has no GPU to use: the" in done.stderr
    )
    assert done.stderr.endswith("run the artifact there\n")


def test_artifact_gives_the_text_of_the_model(artifact: Path):
    want = llmopt.compile(PICO, recipe="reference", dtype="float32").generate("import os\n", max_new_tokens=12)
    assert want.strip()
    assert greedy(artifact) == f"{want}\n"
    assert greedy(artifact, "--no-stream") == f"{want}\n"
    assert cli("run", str(artifact), "-n", "12", stdin="import os\n") == f"{want}\n"
    assert greedy(PICO, "-r", "reference", "--dtype", "float32") == f"{want}\n"


def test_prompt_file_and_several_prompts(artifact: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("import os\n")
    one = cli("run", str(artifact), "-n", "12", "-f", str(tmp_path / "prompt.txt"))
    assert one == greedy(artifact)
    both = cli("run", str(artifact), "import os\n", "def f(x):", "-n", "12")
    assert both.startswith(f"--- prompt 0\n{one}--- prompt 1\n")


def test_seed_decides_samples(artifact: Path):
    texts = [greedy(artifact, "--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_artifact_takes_no_recipe(artifact: Path):
    done = CliRunner().invoke(app, ["run", str(artifact), "x", "-r", "default", "--dtype", "float32"])
    assert done.exit_code == 2
    assert "leave out --recipe and --dtype" in done.stderr


def test_show(artifact: Path):
    captured = cli("show", str(PICO), "-r", "reference", "--after", "capture", "--no-provenance")
    assert captured.startswith("def forward(input_ids: i64[B, T], position_ids: i64[B, T]):\n")
    assert "aten.rsqrt" in captured
    raised = cli("show", str(PICO), "-r", "reference", "-a", "raise-aten")
    assert "rms_norm(" in raised
    assert "aten.rsqrt" not in raised
    assert "layers.0.input_layernorm modeling_llama.py" in raised
    step = cli("show", str(PICO), "-r", "reference", "-g", "step", "--dtype", "float32", "--no-provenance")
    assert step.startswith("def step(")
    assert cli("show", str(artifact), "-g", "step", "--no-provenance") == step


def test_diff_of_a_pass(rules: Path):
    text = cli("diff", str(PICO), "-r", "reference", "--with", f"{rules}:Planted", "--pass", "planted")
    changed = [line for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert text.startswith("--- before planted\n+++ after planted\n@@ ")
    assert sum("gated(" in line for line in changed) == 2  # both layers
    assert sum("aten.silu(" in line for line in changed) == 2


def test_diff_of_all_passes():
    text = cli("diff", str(PICO), "-r", "reference")
    heads = [line.removeprefix("+++ after ") for line in text.splitlines() if line.startswith("+++ ")]
    assert heads == [spec.name for spec in RECIPES["reference"].passes]


def test_diff_of_artifacts(artifact: Path, tmp_path: Path):
    assert cli("diff", str(artifact), str(artifact)) == ""
    cli("compile", str(PICO), "-o", str(tmp_path / "bf16"), "-r", "reference")
    changed = cli("diff", str(artifact), str(tmp_path / "bf16"))
    assert "-    embedding: f32[B, T, 256]" in changed
    assert "+    embedding: bf16[B, T, 256]" in changed


def test_bisect_finds_the_planted_rewrite(rules: Path):
    args = ("bisect", str(PICO), "-r", "reference", "--with", f"{rules}:Planted")
    said = json.loads(cli(*args, "--json", code=3))
    culprit = said["culprit"]
    assert (culprit["pass_name"], culprit["rule"], culprit["graph"]) == ("planted", "planted", "forward")
    assert culprit["module"].startswith("layers.1.mlp")
    assert culprit["source"].startswith("modeling_llama.py:")
    text = cli(*args, code=3)
    assert "first to blame: pass 'planted', rewrite" in text
    assert "(layers.1.mlp" in text
    (removed,) = [line for line in text.splitlines() if line.startswith("-") and "= gated(" in line]
    assert culprit["node"] in removed


def test_bisect_finds_nothing_in_right_rules(rules: Path):
    said = cli("bisect", str(PICO), "-r", "reference", "--with", f"{rules}:OpenGated@canonicalize")
    assert said.endswith("nothing is wrong\n")
    assert said.count(": right (") == 6


@pytest.mark.skipif(gpus.fault(gpus.look()) is None, reason="its kernels are what runs then")
def test_bisect_judges_the_graphs_of_a_gpu_that_is_not_there(rules: Path):
    said = cli("bisect", str(PICO), "--target", "cuda:sm_90")
    assert said.count(": right (") == 5
    assert "after lower: right (forward" in said
    args = ("bisect", str(PICO), "--target", "cuda:sm_90", "--with", f"{rules}:Shorter@insert-kv-cache", "--json")
    culprit = json.loads(cli(*args, code=3))["culprit"]
    assert (culprit["rule"], culprit["graph"]) == ("shorter", "step")


def test_bench_json():
    args = ("--batch", "1", "--new-tokens", "4", "--prompt-tokens", "8", "--rounds", "1", "--peers", "hf-eager")
    said = json.loads(cli("bench", str(PICO), "-r", "reference", *args, "--json"))
    assert [row["peer"] for row in said["results"]] == ["llmopt", "hf-eager"]
    for row in said["results"]:
        assert row["identical_tokens"]
        assert 0 < row["first_token_ms"] < 1e3 * row["seconds"]["median"]
        # 3.57 million fp32 weights (the embedding is the head), and the cache of ten tokens
        assert row["bytes_per_step"] == pytest.approx(4 * 3_574_016, rel=0.01)
    assert min(said["peak_rss_bytes"].values()) > 50 * 2**20
    assert {"command", "commit", "date", "cpu", "threads", "torch", "transformers"} <= set(said)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("oh"), 1)])
def test_interrupts_and_bugs(error: BaseException, code: int):
    own = typer.Typer()

    @own.command()
    @guarded
    def fail(debug: bool = False) -> None:
        raise error

    done = CliRunner().invoke(own, [])
    assert done.exit_code == code
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("interrupted" if code == 130 else "error: ZeroDivisionError: oh; this is a bug")
    assert "Traceback" in CliRunner().invoke(own, ["--debug"]).stderr


def test_json_knows_no_infinities(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    figures = {"a": [1.5, float("inf"), {"b": float("nan")}], "c": (True, None, "inf"), "d": -float("inf")}
    want = {"a": [1.5, None, {"b": None}], "c": [True, None, "inf"], "d": None}
    deliver(figures, pytest.fail, tmp_path / "f.json", as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "f.json").read_text()) == want
    seen = []
    deliver(figures, seen.append, None, as_json=False)
    assert seen == [figures]
