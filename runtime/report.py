"""Report: what compiling a model did, kept in its artifact."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llmopt.compiler.pipeline import PassReport, PassStats


@dataclass
class Report:
    """What compiling did: one entry a pass, the seconds of each stage, the providers chosen."""

    passes: list[PassReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "passes": [
                {
                    "name": r.name,
                    "matched": r.stats.matched,
                    "rewritten": r.stats.rewritten,
                    "rules": dict(r.stats.per_rule),
                    "rejected": {f"{rule}: {why}": n for (rule, why), n in r.stats.rejected.items()},
                    "attempts": r.stats.attempts,
                    "notes": list(r.stats.notes),
                    "figures": r.stats.figures,
                    "nodes": [r.nodes_before, r.nodes_after],
                    "ms": round(r.ms, 3),
                }
                for r in self.passes
            ],
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "choices": self.choices,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Read `to_dict`'s form; a malformed one raises KeyError, TypeError, ValueError or AttributeError."""
        return cls([_read_pass(entry) for entry in data["passes"]], dict(data["seconds"]), dict(data["choices"]))


def _read_pass(entry: dict[str, Any]) -> PassReport:
    rejected: Counter[tuple[str, str]] = Counter()
    for said, count in entry["rejected"].items():
        rule, _, why = said.partition(": ")
        rejected[rule, why] = count
    stats = PassStats(
        matched=entry["matched"],
        rewritten=entry["rewritten"],
        per_rule=Counter(entry["rules"]),
        rejected=rejected,
        attempts=entry["attempts"],
        notes=list(entry["notes"]),
        figures=dict(entry["figures"]),
    )
    before, after = entry["nodes"]
    return PassReport(entry["name"], stats, entry["ms"], before, after)
