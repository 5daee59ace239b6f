"""Which step final/ holds, and when a run ends before its last one: by its evaluations alone.

One idea to keep in mind: it is a function of the config and of the held-out lines of metrics.jsonl. So a run that is
killed and resumed chooses what a run that was never stopped chooses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.config.schema import METRICS, RunConfig
from dpo_cli.console.text import plural, significant

Line = Mapping[str, Any]  # a held-out line of metrics.jsonl


@dataclass(frozen=True)
class Choice:
    """What the evaluations so far decide."""

    step: int | None = None  # of the checkpoint that final/ is to hold; None: no evaluation is within the budget
    reason: str = ""
    end: str | None = None  # why no further step is trained; None: the run goes on


def choose(config: RunConfig, evaluations: Mapping[int, Line]) -> Choice:
    """The choice after these evaluations, by step: the last within the budget, or with keep_best the best of those.

    The run ends at the first evaluation beyond the budget, and where the metric has not improved `patience` times in a
    row. A value that is not a number improves on nothing.
    """
    chosen: int | None = None
    end, best, best_at, last = None, -float("inf"), None, None
    kept = -float("inf")  # the score of `chosen`
    waited, within = 0, 0
    for step, line in sorted(evaluations.items()):
        last, score = step, _score(config, line)
        beyond = next(_beyond(config, line), None)
        if beyond is not None:
            end = f"at step {step} {beyond}"
            break
        if score > best:
            best, best_at, waited = score, step, 0
        else:
            waited += 1
        if _is_known(config, line):
            within += 1
            if chosen is None or not config.keep_best or score > kept:
                chosen, kept = step, score
        if config.early_stop.patience is not None and waited >= config.early_stop.patience:
            since = "" if best_at is None else f" since step {best_at}"
            end = (
                f"the held-out {config.early_stop.metric} did not improve{since} "
                f"(early_stop.patience={config.early_stop.patience})"
            )
            break
    return Choice(chosen, _reason(config, chosen, last, end, within), end)


def _reason(config: RunConfig, chosen: int | None, last: int | None, end: str | None, evaluations: int) -> str:
    within = " within the budget" if budgets(config) else ""
    if chosen is None:
        which = f"no evaluation is{within}"
    elif config.keep_best:
        which = f"the best held-out {config.early_stop.metric} of {plural(evaluations, 'evaluation')}{within}"
    else:
        which = "the last step" if chosen == last and end is None else "the last evaluation" + within * (chosen != last)
    return "; ".join(filter(None, [which, end]))


def budgets(config: RunConfig) -> dict[str, tuple[str, float]]:
    """The key and the limit of each budget, by the metric that it limits."""
    given = {
        "samples/kl": ("budget.kl", config.budget.kl),
        "samples/length_ratio": ("budget.length", config.budget.length),
    }
    return {metric: (key, limit) for metric, (key, limit) in given.items() if limit is not None}


def _beyond(config: RunConfig, line: Line) -> Iterator[str]:
    """In words, each budget that an evaluation is beyond; what is not a number is beyond, too."""
    for metric, (key, limit) in budgets(config).items():
        if metric in line and not line[metric] <= limit:
            yield f"{metric} is {significant(line[metric])}, beyond {key}={limit:g}"


def _is_known(config: RunConfig, line: Line) -> bool:
    """Whether an evaluation has measured what the budgets limit: one of before a resume may not have."""
    return all(metric in line for metric in budgets(config))


def _score(config: RunConfig, line: Line) -> float:
    """The metric of an evaluation, more is better."""
    key, sign = METRICS[config.early_stop.metric]
    value = sign * float(line[key])
    return value if value == value else -float("inf")
