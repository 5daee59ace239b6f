"""What an evaluation leaves behind: report.json (means), pairs.jsonl (a line a pair), report.html (to look at)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.evaluation.scores import ScoredPairs
from dpo_cli.objectives.objective import Objective
from dpo_cli.storage.report_files import write_files
from dpo_cli.theory.calibration import Bin, calibration_error
from dpo_cli.theory.losses import implicit_rewards
from dpo_cli.theory.statistics import Estimate

FILES = ("pairs.jsonl", "samples.jsonl", "report.html", "report.json")  # in the order in which they are written


def report_of(facts: dict[str, Any], estimates: dict[str, Estimate], pairs: int) -> dict[str, Any]:
    """report.json: the facts, each metric's mean, and its 95% interval. A number that is not finite is null."""
    return {
        **facts,
        "pairs": pairs,
        **{name: _known(estimate.mean) for name, estimate in sorted(estimates.items())},
        "intervals95": {name: estimate.ends() for name, estimate in sorted(estimates.items()) if pairs > 1},
    }


def lines_of(pairs: Sequence[TokenizedPair], scores: ScoredPairs, objective: Objective) -> list[dict[str, Any]]:
    """The lines of pairs.jsonl: all that is known of each pair. A number that is not finite is null."""
    rewards_chosen, rewards_rejected = implicit_rewards(scores.ratios, objective.beta)
    policy, reference = scores.policy.pairs(), scores.reference.pairs()
    logps = [
        ("policy_logps_chosen", policy.chosen),
        ("policy_logps_rejected", policy.rejected),
        ("reference_logps_chosen", reference.chosen),
        ("reference_logps_rejected", reference.rejected),
    ]
    columns = [
        *(logps if objective.scores_are_logps else []),
        ("reward_chosen", rewards_chosen),
        ("reward_rejected", rewards_rejected),
        ("margin", rewards_chosen - rewards_rejected),
        ("loss", objective(scores.policy, scores.reference).losses),
    ]
    values = {name: column.tolist() for name, column in columns}
    lines = []
    for position, pair in enumerate(pairs):
        line: dict[str, Any] = {"index": pair.index, "key": pair.key, "prompt": f"{pair.group:016x}"}
        line |= {name: _known(column[position]) for name, column in values.items()}
        line |= {"probability": pair.probability} if pair.probability != 1 else {}
        line |= {"source": pair.source} if pair.source else {}
        line["prompt_tokens"] = len(pair.prompt)
        line["chosen_tokens"], line["rejected_tokens"] = pair.scored_tokens
        lines.append(line)
    return lines


def write_report(
    folder: Path,
    report: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    page: str,
) -> None:
    """Write `pairs.jsonl`, `samples.jsonl` (sampled answers), `report.html` and `report.json`, all of them or none.

    `report.json` comes last: it makes the report complete. StorageError where a file cannot be written; then an
    earlier report is as it was.
    """
    whole = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_files(folder, dict(zip(FILES, (_jsonl(lines), _jsonl(answers), page, whole), strict=True)), "report")


def _jsonl(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def calibration_facts(bins: list[Bin]) -> dict[str, Any]:
    """Calibration for report.json: its error, and a line a bin."""
    lines = [
        {
            "confidence": one.confidence,
            "right": one.right.mean,
            "interval95": one.right.ends(),
            "pairs": one.right.n,
        }
        for one in bins
    ]
    return {"error": calibration_error(bins), "bins": lines}
