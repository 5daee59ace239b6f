"""The pages of a run, an evaluation and a comparison: plain data in, one self-contained HTML text out.

Jinja2 escapes every text; control characters are escaped first, as on the console. The page's own policy forbids
scripts, frames and requests of any kind.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_cli.console.text import safe_text


def evaluation_page(
    report: dict[str, Any],
    pairs: Sequence[dict[str, Any]],
    examples: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, str]],
) -> str:
    """The page of report.json with the lines of pairs.jsonl.

    `examples` are the best and the worst pairs token by token, `answers` the answers before and after.
    """
    return _render("evaluation", title=f"Evaluation of {report['checkpoint']}")


def run_page(
    name: str,
    config: dict[str, Any],
    manifest: dict[str, Any],
    records: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
) -> str:
    """The page of a run: config.yaml, manifest.json, the lines of metrics.jsonl, and its last sampled answers."""
    return _render("run", title=f"Run {name}")


def comparison_page(comparison: dict[str, Any], margins: Sequence[Sequence[float]]) -> str:
    """The page of a comparison, or of a sweep: its report.json, and the margins of each model on the shared pairs."""
    return _render("comparison", title="Comparison")


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(f"{name}.html").render(values)


@cache
def _environment() -> Environment:
    loader = PackageLoader("dpo_cli.pages")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_escaped)


def _escaped(value: Any) -> Any:
    """Plain text with its control characters escaped, line breaks kept; markup that is ours passes."""
    if hasattr(value, "__html__") or not isinstance(value, str):
        return value
    return "\n".join(safe_text(line) for line in value.split("\n"))
