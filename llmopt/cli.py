"""The command line. Results go to stdout, progress and errors to stderr; a user's mistake exits with 2, a bug with 1.

Nothing heavy is imported here: a command imports what it needs when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt.console import guarded

app = typer.Typer(
    name="llmopt",
    help="A graph compiler for LLM inference in PyTorch: a plain causal forward in, a fast server out.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A checkpoint folder (config.json, *.safetensors) or a Hugging Face id.")]
Either = Annotated[str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="A checkpoint folder or id, or an artifact.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe's name, a .yaml file, or several joined with +.")
]
OwnRecipe = Annotated[str | None, typer.Option("--recipe", "-r", help="As in compile; an artifact has its own.")]
TargetName = Annotated[
    str | None, typer.Option("--target", "-t", help="What to compile for; this machine if not given.")
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16 or float64; the checkpoint's own if not given."),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with", metavar="FILE.py:NAME[@PASS]", help="Put a Pass or Rule of yours into the recipe, behind PASS."
    ),
]
CalibrationFile = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="FILE", help="What recipes like gptq learn from: tokens, text, a folder, statistics."
    ),
]
StatisticsFile = Annotated[
    Path | None,
    typer.Option("--statistics", metavar="FILE.safetensors", help="Keep what was learned there; go on from there."),
]
Bits = Annotated[
    float | None, typer.Option("--bits", help="Mixed precision: at most so many bits a weight, such as 4.5.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        from llmopt import __version__

        print(f"llmopt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What holds for every command."""


@app.command()
@guarded
def compile(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The artifact folder to write.")],
    recipe: RecipeName = "default",
    target: TargetName = None,
    dtype: DType = None,
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile a model into an artifact that loads without compiling.

    [dim]llmopt compile meta-llama/Llama-3.2-1B -o llama.llmopt --dtype float32[/dim]
    """
    from llmopt.commands.model import Wanted, compile_to

    compile_to(model, out, Wanted(recipe, target, dtype, calibration, statistics, bits), as_json)


@app.command()
@guarded
def export(
    model: Either,
    to: Annotated[str, typer.Option("--to", help="The format: onnx, genai, compressed-tensors or modelopt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    recipe: OwnRecipe = None,
    weights: Annotated[
        str | None, typer.Option(help="Low-bit weights in ONNX: portable (the default), standard or function.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention in ONNX: standard (the default) or gqa (that of genai).")
    ] = None,
    cache: Annotated[bool, typer.Option(help="Keys and values as inputs and outputs.")] = True,
    accuracy_level: Annotated[
        int | None, typer.Option(help="MatMulNBits: 0 is exact (the default), 4 rounds activations to int8, faster.")
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Keys and values in int8, int4 (gqa), fp8 (checkpoints), by --calibration.")
    ] = None,
    dtype: DType = None,
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model, quantised and rotated as its recipe says, for other runtimes.

    onnx: a graph for ONNX Runtime, TensorRT and others, one model with a cache. genai: a folder that onnxruntime-genai
    generates from. compressed-tensors: a checkpoint that vLLM, SGLang and transformers load. modelopt: one that
    TensorRT-LLM, vLLM and SGLang load.

    [dim]llmopt export meta-llama/Llama-3.2-1B --to genai -r int4 --accuracy-level 4 -o OUT[/dim]
    """
    from llmopt.commands.export import export
    from llmopt.commands.model import Wanted

    settings = {"weights": weights, "attention": attention, "cache": None if cache else False,
                "accuracy_level": accuracy_level, "kv_cache": kv_cache}  # fmt: skip
    export(model, to, out, settings, Wanted(recipe, None, dtype, calibration, statistics, bits), as_json)


@app.command()
@guarded
def run(
    model: Either,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue; stdin if none is given.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", "-f", help="A file that holds one prompt; - is stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to make at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it is made.")] = True,
    recipe: OwnRecipe = None,
    target: TargetName = None,
    dtype: DType = None,
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    debug: Debug = False,
) -> None:
    """Continue prompts with a model or an artifact. The text goes to stdout.

    [dim]llmopt run llama.llmopt "def fibonacci(n):" -n 64 --temperature 0.7[/dim]
    """
    from llmopt.commands.model import Sampling, Wanted, run_prompts

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stream)
    wanted = Wanted(recipe, target, dtype, calibration, statistics, bits)
    run_prompts(model, prompts or [], prompt_file, sampling, wanted)


@app.command()
@guarded
def bench(
    model: Model,
    recipe: RecipeName = "default",
    batch: Annotated[str, typer.Option("--batch", "-b", help="Batch sizes, separated by commas.")] = "1,8",
    new_tokens: Annotated[int, typer.Option(help="Tokens each sequence makes.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 48,
    rounds: Annotated[int, typer.Option(help="Timed rounds; every round runs every peer once.")] = 5,
    peers: Annotated[
        str, typer.Option(help="Of hf-eager and hf-inductor, separated by commas.")
    ] = "hf-eager,hf-inductor",
    dtype: DType = "float32",
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the figures to this JSON file, too.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure decoding against transformers, eager and compiled by Inductor, in the same process.

    [dim]llmopt bench examples/models/pico-llama-4m --batch 1,8 --new-tokens 128[/dim]
    """
    from llmopt.commands.bench import bench_model
    from llmopt.commands.model import Wanted

    wanted = Wanted(recipe, None, dtype, calibration, statistics, bits)
    bench_model(model, wanted, batch, new_tokens, prompt_tokens, rounds, peers, out, as_json)


@app.command()
@guarded
def eval(
    model: Either,
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", metavar="FILE", help="A .safetensors file of `tokens`, a text file, or a folder of them."
        ),
    ],
    recipe: OwnRecipe = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|none",
            help="Compare with this model or artifact; by default with MODEL uncompressed, if the recipe compresses.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window; each is read by itself.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="Read only so many windows; all if not given.")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Windows read side by side.")] = 1,
    target: TargetName = None,
    dtype: DType = None,
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the figures to this JSON file, too.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the error layer by layer into this .png, .svg or .pdf.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, and how far a compressed program's distributions are from the uncompressed one's.

    [dim]llmopt eval examples/models/pico-llama-4m --data README.md --window 256 --dtype float32[/dim]
    """
    from llmopt.commands.eval import Settings, eval_model

    settings = Settings(
        model, data, recipe, target, dtype, against, windows, window, batch, calibration, statistics, bits
    )
    eval_model(settings, as_json, out, plot)


@app.command()
@guarded
def show(
    model: Either,
    recipe: OwnRecipe = None,
    graph: Annotated[
        str | None, typer.Option("--graph", "-g", help="One graph (forward, step, a region); all if not given.")
    ] = None,
    after: Annotated[
        str | None, typer.Option("--after", "-a", help="As it is after this pass; `capture` is before all.")
    ] = None,
    provenance: Annotated[bool, typer.Option("--provenance/--no-provenance", help="Where each line came from.")] = True,
    extra: With = None,
    target: TargetName = None,
    dtype: DType = None,
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    debug: Debug = False,
) -> None:
    """Print a model's graphs as readable code.

    [dim]llmopt show examples/models/pico-llama-4m --graph step --after insert-kv-cache[/dim]
    """
    from llmopt.commands.inspect import Subject, show_graphs
    from llmopt.commands.model import Wanted

    wanted = Wanted(recipe, target, dtype, calibration, statistics, bits)
    show_graphs(Subject(model, wanted, tuple(extra or ())), graph, after, provenance)


@app.command()
@guarded
def diff(
    model: Either,
    other: Annotated[
        str | None, typer.Argument(metavar="[ARTIFACT]", help="With two artifacts: what sets them apart.")
    ] = None,
    recipe: OwnRecipe = None,
    pass_name: Annotated[str | None, typer.Option("--pass", "-p", help="This pass only.")] = None,
    extra: With = None,
    target: TargetName = None,
    dtype: DType = None,
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    debug: Debug = False,
) -> None:
    """Print what each pass changed, as a unified diff.

    [dim]llmopt diff examples/models/pico-llama-4m --pass raise-aten[/dim]
    """
    from llmopt.commands.inspect import Subject, diff_artifacts, diff_passes
    from llmopt.commands.model import Wanted

    subject = Subject(model, Wanted(recipe, target, dtype, calibration, statistics, bits), tuple(extra or ()))
    if other is not None:
        diff_artifacts(subject, other)
    else:
        diff_passes(subject, pass_name)


@app.command()
@guarded
def bisect(
    model: Model,
    recipe: RecipeName = "default",
    tokens: Annotated[
        str | None, typer.Option(help="A file with token ids to compare on, one sequence a line, all of one length.")
    ] = None,
    extra: With = None,
    target: TargetName = None,
    dtype: DType = "float32",
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the rewrite that makes the logits wrong. Exits with 0 if nothing is, with 3 if one was found.

    [dim]llmopt bisect examples/models/pico-llama-4m --with my_rules.py:MyNorm[/dim]
    """
    from llmopt.commands.inspect import Subject, bisect_model
    from llmopt.commands.model import Wanted

    wanted = Wanted(recipe, target, dtype, calibration, statistics, bits)
    bisect_model(Subject(model, wanted, tuple(extra or ())), tokens, as_json)


@app.command()
@guarded
def kernels(
    model: Either,
    recipe: OwnRecipe = None,
    target: TargetName = None,
    dtype: DType = None,
    calibration: CalibrationFile = None,
    statistics: StatisticsFile = None,
    bits: Bits = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the GPU kernels of a model or an artifact, and what each was compiled to. Needs no GPU.

    [dim]llmopt kernels meta-llama/Llama-3.2-1B --target cuda:sm_90[/dim]
    """
    from llmopt.commands.kernels import list_kernels
    from llmopt.commands.model import Wanted

    list_kernels(model, Wanted(recipe, target, dtype, calibration, statistics, bits), as_json)


@app.command()
@guarded
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe in full, as YAML.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or print one to start your own from.

    [dim]llmopt recipes default > mine.yaml[/dim]
    """
    from llmopt.commands.catalog import list_recipes

    list_recipes(name, as_json)


@app.command()
@guarded
def targets(as_json: Json = False, debug: Debug = False) -> None:
    """List the targets, and which of them this machine can run.

    [dim]llmopt targets[/dim]
    """
    from llmopt.commands.catalog import list_targets

    list_targets(as_json)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
