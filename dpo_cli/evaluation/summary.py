"""The verdict of an evaluation: whether the policy is better than its reference on these pairs, in one sentence."""

from dpo_cli.console.text import interval, plural, significant
from dpo_cli.data.leaks import Leaks
from dpo_cli.objectives.answers import ANSWER_RULES, answers_in
from dpo_cli.theory.statistics import Clusters, Estimate

ACCURACY, LOWER = "rewards/accuracies", "loss/improvement"


def summary_of(estimates: dict[str, Estimate], prompts: Clusters, leaks: Leaks | None, unknown: int) -> dict[str, str]:
    """A color and its reason. Green: accuracy above one half and loss lower than at the start, both beyond chance.

    A fault of the generated answers comes before what pairs say. `unknown` counts pairs whose scores are not finite.
    """
    accuracy, lower = estimates[ACCURACY], estimates[LOWER]
    on = f"on {plural(prompts.pairs, 'pair')} of {plural(prompts.prompts, 'prompt')}"
    numbers = f"accuracy {_with_interval(accuracy)}, loss lower than at the start by {_with_interval(lower)}, {on}"
    if unknown:
        return _said("red", f"the scores of {plural(unknown, 'pair')} are not finite: the weights are damaged")
    if accuracy.high < 0.5:
        return _said("red", f"it prefers the rejected responses: {numbers}")
    if lower.high < 0:
        return _said("yellow", f"its loss is higher than at the start: {numbers}")
    answers = answers_in(estimates)
    for rule in ANSWER_RULES if answers else ():  # red ones come first
        if rule.holds(answers):
            return _said(rule.color, f"{rule.reason(answers)}; {numbers}")
    if not (accuracy.low > 0.5 and lower.low > 0):
        return _said("yellow", f"it cannot be told from the reference: {numbers}")
    if leaks:
        return _said("yellow", f"it was trained on some of these pairs, so they prove little: {numbers}")
    return _said("green", f"it prefers the chosen responses beyond chance: {numbers}")


def _said(color: str, text: str) -> dict[str, str]:
    return {"color": color, "text": text}


def _with_interval(estimate: Estimate) -> str:
    return f"{significant(estimate.mean)} ({interval(estimate.low, estimate.high, digits=2)})"
