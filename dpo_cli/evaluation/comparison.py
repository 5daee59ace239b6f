"""Models compared on the pairs that all of them were evaluated on: from their reports to one comparison.

Nothing here loads a model or imports torch. N shared pairs, in the order of the first report.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config.schema import public_container, read_config
from dpo_cli.config.versions import flat
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.errors import CheckpointError, DataError
from dpo_cli.evaluation.evaluated import Evaluated, Floats, sampled_metric
from dpo_cli.theory.paired import Difference, holm, paired_difference
from dpo_cli.theory.statistics import Clusters

LEVEL = 0.05  # of the tests
SAME_REFERENCE = 0.005  # relative: dtypes and layouts move the log-prob of a response by less, other weights by more
MOST_NEEDED = 1_000_000  # pairs; a difference that takes more is none in practice
# Keys of a config that say where and how often a run writes, not what it does.
NOT_COMPARED = (
    "output_dir", "resume", "replay", "log_every", "eval_every", "save_every", "keep_checkpoints", "page", "dry_run",
    "verify_resume",
)  # fmt: skip
METRICS = ("accuracy", "margin", "loss")


@dataclass(frozen=True)
class Shared:
    """The pairs that all models were evaluated on: their indices in each model's report, (models, N)."""

    models: Sequence[Evaluated]
    indices: NDArray[np.int64]
    warnings: list[str] = field(default_factory=list)

    def values(self, model: int, metric: str) -> Floats | None:
        """A metric of a model on the N shared pairs."""
        found = self.models[model].values(metric, self.nats)
        return None if found is None else found[self.indices[model]]

    @property
    def nats(self) -> bool:
        """Whether margins are divided by beta: those of different beta do not compare."""
        return len({model.beta for model in self.models}) > 1

    @property
    def prompts(self) -> Clusters:
        """Which of the N pairs share a prompt."""
        return Clusters(self.models[0].prompts[self.indices[0]])


def shared_pairs(models: Sequence[Evaluated]) -> Shared:
    """The pairs that two or more models share.

    CheckpointError for models that do not compare (a reward model and a DPO model, other references), DataError for too
    few shared pairs.
    """
    first = models[0]
    for model in models[1:]:
        if model.has_reference != first.has_reference:
            reward, other = (first, model) if model.has_reference else (model, first)
            raise CheckpointError(f"{reward.name}: is a reward model and {other.name} is not; compare one kind")
    keys = [key for key in first.indices if all(key in model.indices for model in models[1:])]
    if not keys:
        raise DataError(_nothing_shared(models))
    indices = np.array([[model.indices[key] for key in keys] for model in models])
    shared = Shared(models, indices)
    if shared.prompts.prompts < 2:
        raise DataError(f"{_names(models)}: share pairs of one prompt only; score all of them on more with data.eval=")
    for model, of_model in zip(models[1:], indices[1:], strict=True):
        _check_reference(first, indices[0], model, of_model)
    left_out = [
        f"{len(model.indices) - len(keys):,} of {model.name}" for model in models if len(model.indices) > len(keys)
    ]
    if left_out:
        shared.warnings.append(f"compared on the {plural(len(keys), 'pair')} that all share; left out {_and(left_out)}")
    return shared


def _nothing_shared(models: Sequence[Evaluated]) -> str:
    first = models[0]
    texts = {key[0] for key in first.indices}
    for model in models[1:]:
        if not first.indices.keys() & model.indices.keys():
            if texts & {key[0] for key in model.indices}:
                return (
                    f"{first.name}, {model.name}: the same texts with other labels or tokens; evaluate both with one "
                    "template, tokenizer and data.max_length"
                )
            return (
                f"{first.name}, {model.name}: were evaluated on other data and share no pair; name their runs and the "
                "pairs to score them on, for instance data=jsonl data.eval=pairs.jsonl"
            )
    return f"{_names(models)}: no pair is shared by all; compare fewer, or score all on the same pairs with data.eval="


def _check_reference(first: Evaluated, of_first: Any, model: Evaluated, of_model: Any) -> None:
    """CheckpointError where the references of two models give other log-probs on the shared pairs."""
    if first.reference is None or model.reference is None:
        return
    known, other = first.reference[of_first], model.reference[of_model]
    apart = float(np.abs(other - known).mean() / max(np.abs(known).mean(), 1e-9))
    if apart > SAME_REFERENCE:
        raise CheckpointError(
            f"{model.name}: its reference is not that of {first.name}: their log-probs differ by {100 * apart:.1f}% "
            f"({safe_text(model.facts['reference'])} and {safe_text(first.facts['reference'])}); rewards compare only "
            "with one reference"
        )


def compare(models: Sequence[Evaluated], kind: str = "comparison") -> tuple[dict[str, Any], list[list[float]]]:
    """The comparison for report.json, and each model's margins on the shared pairs.

    Differences are to the first model. In a `sweep` that is the best one: the highest accuracy, then the lowest loss
    where losses compare.
    """
    shared = shared_pairs(models)
    if kind == "sweep":
        shared = _best_first(shared)
        models = shared.models
    differences, prompts = _differences(shared), shared.prompts
    keys, rows = config_differences(models)
    swept = keys if kind == "sweep" else []
    reported = [
        {
            "name": model.name,
            "source": str(model.path.parent),
            "swept": {key: rows[key][index] for key in swept},
            **{name: model.facts[name] for name in ("beta", "loss_name", "reference", "checkpoint")},
            "metrics": _metrics(shared, index, prompts),
            **_told(differences[index], models[0].name, prompts),
        }
        for index, model in enumerate(models)
    ]
    comparison = {
        "kind": kind,
        "pairs": prompts.pairs,
        "prompts": prompts.prompts,
        "prompts_effective": prompts.effective,
        "margin": "margin/beta" if shared.nats else "margin",
        "swept": swept,
        "models": reported,
        "best": models[0].name if kind == "sweep" else None,
        "config_differences": [{"key": key, "values": rows[key]} for key in keys],
        "warnings": [*shared.warnings, *_limits(shared, reported)],
    }
    margins = [shared.values(index, "margin") for index in range(len(models))]
    return comparison, [values.tolist() for values in margins if values is not None]


def _best_first(shared: Shared) -> Shared:
    """The models from the highest accuracy to the lowest; of equal ones the lower loss first, where losses compare."""
    comparable = len({model.loss_used for model in shared.models}) == 1

    def rank(index: int) -> tuple[float, float]:
        loss = shared.values(index, "loss") if comparable else None
        accuracy = shared.values(index, "accuracy")
        assert accuracy is not None
        return -float(accuracy.mean()), 0.0 if loss is None else float(loss.mean())

    order = sorted(range(len(shared.models)), key=rank)
    return Shared([shared.models[index] for index in order], shared.indices[order], shared.warnings)


def _differences(shared: Shared) -> list[dict[str, Difference]]:
    """Of each model its paired differences to the first, by metric; p values by Holm over all models."""
    first, prompts = shared.models[0], shared.prompts
    found: list[dict[str, Difference]] = [{}]
    for index, model in enumerate(shared.models[1:], start=1):
        of_model = {}
        for metric in METRICS:
            before, after = shared.values(0, metric), shared.values(index, metric)
            compares = metric != "loss" or model.loss_used == first.loss_used
            if compares and before is not None and after is not None:
                of_model[metric] = paired_difference(prompts, after - before, share=metric == "accuracy")
        found.append(of_model)
    for metric in METRICS:
        tested = [one for one in found if metric in one]
        for one, p in zip(tested, holm([one[metric].p for one in tested]), strict=True):
            one[metric] = Difference(one[metric].estimate, p, one[metric].prompts_needed)
    return found


def _metrics(shared: Shared, index: int, prompts: Clusters) -> dict[str, Any]:
    """What is known of a model alone, each as [mean, low, high]."""
    model, estimates = shared.models[index], dict[str, Any]()
    for metric in METRICS:
        values = shared.values(index, metric)
        mean = prompts.share if metric == "accuracy" else prompts.mean
        estimates[metric] = None if values is None else mean(values).triple()
    for label, name in (("kl", "samples/kl"), ("length_ratio", "samples/length_ratio")):
        estimates[label] = sampled_metric(model.facts, model.run, name)
    return estimates


def _told(differences: dict[str, Difference], first: str, prompts: Clusters) -> dict[str, Any]:
    """Differences to the first model, and the verdict by accuracy."""
    if not differences:
        return {
            "difference": None,
            "verdict": "first",
            "words": "the others are compared with it",
            "pairs_needed": None,
        }
    names = ("mean", "low", "high")
    reported = {
        metric: {**dict(zip(names, one.estimate.triple(), strict=True)), "p": one.p}
        for metric, one in differences.items()
    }
    verdict, words, needed = _verdict(differences["accuracy"], prompts)
    return {"difference": dict.fromkeys(METRICS) | reported, "verdict": verdict, "words": words, "pairs_needed": needed}


def _verdict(accuracy: Difference, prompts: Clusters) -> tuple[str, str, int | None]:
    """The verdict, in words, and how many more pairs would tell the models apart.

    Better or worse takes both: the test over prompts, and an interval on the same side of 0.
    """
    if accuracy.p <= LEVEL and accuracy.estimate.low > 0:
        return "better", "better", None
    if accuracy.p <= LEVEL and accuracy.estimate.high < 0:
        return "worse", "worse", None
    apart = "not told apart"
    if accuracy.estimate.mean == 0:
        return apart, f"{apart}: no number of held-out pairs would do, the difference is 0", None
    more = accuracy.prompts_needed - prompts.prompts
    if not 0 < more < math.inf:
        return apart, f"{apart}: more held-out pairs would be needed", None
    pairs = math.ceil(more * prompts.pairs / prompts.prompts)
    number = "more than a million" if pairs > MOST_NEEDED else f"some {round_up(pairs):,}"
    return apart, f"{apart}: {number} more held-out pairs would be needed", pairs


def round_up(number: int) -> int:
    """A number to two digits, rounded up: 1,812 is 1,900."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def _limits(shared: Shared, reported: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers cannot say, in words."""
    first, said = shared.models[0], []
    if shared.nats:
        said.append("margins are divided by beta, in nats: those of different beta do not compare")
    for one, model in zip(reported[1:], shared.models[1:], strict=True):
        if one["difference"]["loss"] is None:
            lacking = next((lacks.name for lacks in (first, model) if lacks.loss is None), None)
            why = f"{first.name} has another loss or beta"
            if lacking is not None:
                why = f"pairs.jsonl of {lacking} has not every loss; evaluate it again"
            said.append(f"the loss of {model.name} is not compared: {why}")
    for model in shared.models:
        leaks = model.facts.get("data", {}).get("leaks")
        if isinstance(leaks, dict) and any(leaks.values()):
            said.append(
                f"{model.name} was trained on some of its pairs or prompts: data.eval_leaks=drop leaves them out"
            )
    unknown = [one["name"] for one in reported if one["metrics"]["kl"] is None]
    if unknown and first.has_reference:
        said.append(f"no KL of {_and(unknown)}: dpo-eval checkpoint=PATH measures it")
    return said


def config_differences(models: Sequence[Evaluated]) -> tuple[list[str], dict[str, list[str]]]:
    """The keys that differ in the runs' configs, and under each key the value of each model as text."""
    configs: list[dict[str, Any] | None] = []
    for model in models:
        try:
            config = read_config(model.run / "config.yaml") if model.run is not None else None
        except CheckpointError:  # of another version, say: it is not needed to compare
            config = None
        configs.append(flat(public_container(config)) if config is not None else None)
    known = [config for config in configs if config is not None]
    rows = {}
    for key in dict.fromkeys(key for config in known for key in config):
        values = ["unknown" if config is None else _text(config.get(key)) for config in configs]
        if key not in NOT_COMPARED and not key.startswith("tracker") and len({*values} - {"unknown"}) > 1:
            rows[key] = values
    return [*rows], rows


def _text(value: Any) -> str:
    return safe_text("null" if value is None else str(value).lower() if isinstance(value, bool) else value)


def _names(models: Sequence[Evaluated]) -> str:
    return ", ".join(model.name for model in models)


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentences(comparison: dict[str, Any]) -> list[str]:
    """The comparison in words, a sentence each: every difference, how it was tested, and what limits it."""
    first, *others = comparison["models"]
    said = []
    for one in others:
        parts = [
            f"{comparison['margin'] if metric == 'margin' else metric} {_signed(found['mean'])}"
            + ("" if found["low"] is None else f" ({_signed(found['low'])} to {_signed(found['high'])})")
            for metric, found in one["difference"].items()
            if found is not None
        ]
        said.append(f"{one['name']} against {first['name']}: {', '.join(parts)}; {one['words']}")
    if comparison["best"] is not None:
        said += _of_sweep(comparison)
    tests = "exact McNemar test on prompts" + ("; p values are Holm's, for several models" if len(others) > 1 else "")
    said.append(f"verdict by accuracy: {tests}")
    return said


def _of_sweep(comparison: dict[str, Any]) -> list[str]:
    first, *others = comparison["models"]
    accuracy = first["metrics"]["accuracy"][0]
    tied = [one["name"] for one in others if one["metrics"]["accuracy"][0] == accuracy]
    near = [one["name"] for one in others if one["verdict"] == "not told apart"]
    said = f"best: {first['name']}, with the highest held-out accuracy ({significant(accuracy)})"
    said += f", shared with {_and(tied)}" if tied else ""
    said += f"; not told apart from it: {_and(near)}" if near else ""
    return [said, "the best was chosen by these pairs, which flatters it: confirm it on others with data.eval="]


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{significant(value)}"
