"""The pages of a run, an evaluation and a comparison: plain data in, one self-contained HTML text out.

Jinja2 escapes every text; control characters are escaped first, as on the console. The page's own policy forbids
scripts, frames and requests of any kind.
"""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_cli.console.labels import SCALES
from dpo_cli.console.text import interval, safe_text, significant
from dpo_cli.pages import comparison as of_comparison
from dpo_cli.pages import evaluation as of_evaluation
from dpo_cli.pages import run as of_run
from dpo_cli.pages.reading import Triple, number, triple


def evaluation_page(
    report: dict[str, Any],
    pairs: Sequence[dict[str, Any]],
    examples: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, str]],
) -> str:
    """The page of report.json with the lines of pairs.jsonl.

    `examples` are the best and the worst pairs token by token, `answers` the answers before and after.
    """
    colored, edges = of_evaluation.colored(examples)
    return render(
        "evaluation",
        title=f"Evaluation of {'/'.join(PurePath(report['checkpoint']).parts[-2:])}",
        verdict=report.get("summary"),
        facts=of_evaluation.facts(report),
        metrics=of_evaluation.metric_rows(report),
        sources=of_evaluation.source_rows(report, pairs),
        samples=of_evaluation.sample_rows(report),
        scales=report.get("scales") or [],
        scale_columns=SCALES,
        harness=of_evaluation.harness_rows(report),
        calibration=report.get("calibration"),
        figures=of_evaluation.drawings(report, pairs),
        examples=[(kind, [one for one in colored if one["kind"] == kind]) for kind in ("best", "worst")],
        shown=of_evaluation.SHOWN,
        edges=edges,
        answers=answers,
    )


def run_page(
    name: str,
    config: dict[str, Any],
    manifest: dict[str, Any],
    records: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
) -> str:
    """The page of a run: config.yaml, manifest.json, the lines of metrics.jsonl, and its last sampled answers."""
    verdict = manifest.get("verdict")
    return render(
        "run",
        title=f"Run {name}",
        verdict={"color": verdict["color"], "text": verdict["summary"]} if verdict else None,
        findings=verdict["findings"] if verdict else [],
        facts=of_run.facts(config, manifest, records),
        heading="Last evaluation" if any(record.get("split") == "eval" for record in records) else "Last logged step",
        metrics=of_run.last_rows(records),
        figures=of_run.drawings(config, records),
        alarms=of_run.alarm_rows(records),
        config=of_run.flat(config),
        answers=samples,
    )


def comparison_page(comparison: dict[str, Any], margins: Sequence[Sequence[float]]) -> str:
    """The page of a comparison, or of a sweep: its report.json, and the margins of each model on the shared pairs."""
    what = "Sweep" if comparison["kind"] == "sweep" else "Comparison"
    return render(
        "comparison",
        title=f"{what} of {len(comparison['models'])} models",
        comparison=comparison,
        headline=of_comparison.headline(comparison),
        margin=comparison.get("margin", "margin"),
        figures=of_comparison.drawings(comparison, margins),
        colors=of_comparison.WORDS,
        places=[(model["name"], model["source"]) for model in comparison["models"]],
    )


def render(name: str, **values: Any) -> str:
    """The template of this name with these values."""
    _shown.cache_clear()  # what counts as a secret may have changed since the last page
    return _environment().get_template(f"{name}.html").render(values)


@cache
def _environment() -> Environment:
    loader = PackageLoader("dpo_cli.pages")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"significant": _significant, "ends": _ends, "triple": triple, "named": _named}
    return environment


def _escaped(value: Any) -> Any:
    """Plain text with its control characters escaped, line breaks kept; markup that is ours passes."""
    return _shown(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


@lru_cache(maxsize=16384)  # the tokens of the best and the worst pairs are thousands, and few are distinct
def _shown(text: str) -> str:
    return "\n".join(safe_text(line) for line in text.split("\n"))


def _significant(value: Any, digits: int = 3) -> str:
    """A number in so many digits; a dash for what is not known."""
    known = number(value)
    return significant(known, digits) if math.isfinite(known) else "–"


def _ends(one: Triple) -> str:
    return interval(one[1], one[2]) if all(map(math.isfinite, one)) else ""


def _named(value: Any) -> str:
    """A value of a config as YAML shows it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
