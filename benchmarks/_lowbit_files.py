"""Result files of `lowbit_gemm.py`: put together, tried again, accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _lowbit_cases import SHAPES, Shape, Variant

from llmopt.codegen import tuning

Job = tuple[str, Shape, int]  # scheme, shape, tokens


def fastest(plan: dict[Job, list[Variant]], files: list[Path]) -> dict[Job, list[Variant]]:
    """What earlier result files have of each case."""
    known: dict[tuple[Any, ...], set[str]] = {}
    for r in (case for path in files for case in json.loads(path.read_text())["cases"]):
        key = r["scheme"], r["model"], r["name"], r["ordered"], r["tokens"]
        known.setdefault(key, set()).update(row["text"] for row in r["rows"])
    return {
        job: [
            v for v in tried if v.text() in known.get((job[0], job[1].model, job[1].name, job[1].ordered, job[2]), ())
        ]
        for job, tried in plan.items()
    }


def merged(files: list[Path]) -> dict[str, Any]:
    """The cases of several files as one; each part keeps its command, commit and bandwidth."""
    read = [json.loads(path.read_text()) for path in files]
    whole: dict[str, Any] = {"parts": [{k: v for k, v in r.items() if k not in ("cases", "chain")} for r in read]}
    for key in ("cases", "chain"):
        whole[key] = [case for r in read for case in r[key]]
    return whole


def accept(path: Path) -> Path:
    """Put what a result file found fastest into the shipped table."""
    results = json.loads(path.read_text())
    entries = []
    for r in results["cases"]:
        row = next((w for w in r["rows"] if w["pdl"]), None)
        if row is not None and r["name"] in SHAPES:
            entries.append({
                "template": "lowbit", "source": row["source"], "shape": {**row["shape"], "N": r["tokens"]},
                "dtype": r["scheme"], "config": row["config"], "us": row["us"], "device": results["parts"][0]["device"],
                "date": results["parts"][0]["date"][:10],
            })  # fmt: skip
    return tuning.write("sm_90", entries)
