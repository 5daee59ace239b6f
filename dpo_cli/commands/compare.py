"""dpo-compare: which of several models is better on the same held-out pairs, by paired differences.

What is given are reports of dpo-eval, or what dpo-eval takes. Of the latter the report of an earlier evaluation is used
where it belongs to the same weights; else they are scored now. Reports alone need no PyTorch.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config.schema import CompareConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.engine.ranks import place_of_process
from dpo_cli.errors import CheckpointError, ConfigError, DpoError, StorageError
from dpo_cli.evaluation.comparison import compare as compared
from dpo_cli.evaluation.comparison import sentences
from dpo_cli.evaluation.evaluated import Evaluated, read_report
from dpo_cli.pages.pages import comparison_page
from dpo_cli.paths import user_path
from dpo_cli.storage.report_files import write_files

if TYPE_CHECKING:
    from dpo_cli.runs.model_ref import ModelRef

OF_A_MODEL = ("config.yaml", "final", "checkpoints", "adapter_config.json", "config.json")  # in its folder
PLAIN_FOLDERS = ("eval", "checkpoints")  # say nothing in a label
LONGEST_NAME = 100  # characters


@dataclass(frozen=True)
class Named:
    """What a user named: its word, and the report.json that it is, or None for what dpo-eval takes."""

    word: str
    report: Path | None


def reports_only(config: CompareConfig) -> bool:
    """Whether nothing but reports is compared, so that no model may have to be scored."""
    return all(_named(word).report is not None for word in config.models or ())


def compare(config: CompareConfig, overrides: list[tuple[str, Any]], reporter: Reporter) -> Path:
    """Compare as the config says, with `overrides` of the runs' own data options; returns the folder of the result.

    ConfigError for less than two models or one named twice.
    """
    assert config.models is not None
    if place_of_process().world_size > 1:
        raise ConfigError("dpo-compare is one process; under a launcher run dpo-eval, then compare its reports")
    words, kind = [*config.models], "comparison"
    sweeps = [word for word in words if _is_sweep(user_path(word, ConfigError, "models"))]
    unfinished: list[str] = []
    if sweeps:
        if len(words) > 1:
            raise ConfigError(
                f"{safe_text(sweeps[0])}: is the folder of a sweep; compare it alone, or name single runs"
            )
        words, unfinished = _runs_of_sweep(user_path(words[0], ConfigError, "models"))
        kind = "sweep"
    if len(words) < 2:
        raise ConfigError(f"{safe_text(words[0])}: is one model; name two or more, or the folder of a sweep")
    models = _evaluated(config, overrides, [_named(word) for word in words], reporter)
    comparison, margins = compared(models, kind)
    if unfinished:
        comparison["warnings"].insert(0, f"not compared, unfinished or failed: {', '.join(unfinished)}")
    folder = _folder(config, comparison, Path(config.models[0]).resolve().name if sweeps else None)
    _show(reporter, comparison)
    _write(folder, comparison, comparison_page(comparison, margins))
    reporter.facts(
        [(name, str(folder / f"report.{ending}")) for name, ending in (("report", "json"), ("page", "html"))]
    )
    return folder


# What is compared


def _named(word: str) -> Named:
    path = user_path(word, ConfigError, "models")
    file = path / "report.json" if path.is_dir() else path
    return Named(word, file.resolve() if file.is_file() else None)


def _is_sweep(path: Path) -> bool:
    """Whether a folder holds runs, and is not a run, a model or a report itself."""
    if not path.is_dir() or any((path / name).exists() for name in (*OF_A_MODEL, "report.json")):
        return False
    return any((run / "config.yaml").is_file() for run in path.iterdir())


def _runs_of_sweep(path: Path) -> tuple[list[str], list[str]]:
    """The runs of a sweep that are finished, and the names of the others; CheckpointError for fewer than two."""
    runs = sorted(run for run in path.iterdir() if (run / "config.yaml").is_file())
    finished = [str(run) for run in runs if (run / "final").is_dir()]
    unfinished = [safe_text(run.name) for run in runs if not (run / "final").is_dir()]
    if len(finished) < 2:
        raise CheckpointError(
            f"{safe_text(path)}: {plural(len(finished), 'finished run')} of {len(runs)}, and a comparison takes two; "
            f"unfinished or failed: {', '.join(unfinished) or 'none'}"
        )
    return finished, unfinished


def _evaluated(
    config: CompareConfig, overrides: list[tuple[str, Any]], given: Sequence[Named], reporter: Reporter
) -> list[Evaluated]:
    """The report of everything that was named, made where it is missing."""
    chosen = config.data is not None or bool(overrides)
    for one in given:
        if chosen and one.report is not None:
            raise ConfigError(f"{safe_text(one.word)}: is a report, which has its pairs; to score it on others, name "
                              "its run or checkpoint")  # fmt: skip
    refs = [None if one.report is not None else _find(config, one.word) for one in given]
    sources = [str(one.report.parent) if one.report else _weights(ref) for one, ref in zip(given, refs, strict=True)]
    _refuse_twice([one.word for one in given], sources)
    names = labels(sources)
    reports, runs = [], []
    for one, ref, name in zip(given, refs, names, strict=True):
        report = one.report or (None if chosen or ref is None else _earlier_report(ref))
        if report is None:
            assert ref is not None
            reporter.say(f"scoring {name}")
            report = _score(config, overrides, one.word, ref, name, reporter) / "report.json"
            reporter.say()
        elif ref is not None:
            reporter.say(f"{name}: scored earlier, {report.parent}")
        reports.append(report.resolve())
        runs.append(ref.directory.path if ref is not None and ref.directory is not None else _run_around(report))
    _refuse_twice([one.word for one in given], list(map(str, reports)))
    return [read_report(*one) for one in zip(reports, names, runs, strict=True)]


def _refuse_twice(words: Sequence[str], sources: Sequence[str]) -> None:
    for index, source in enumerate(sources):
        if source in sources[:index]:
            earlier = safe_text(words[sources.index(source)])
            raise ConfigError(f"{safe_text(words[index])}: is given twice (as {earlier}); name each model once")


def _find(config: CompareConfig, word: str) -> "ModelRef":
    from dpo_cli.runs.model_ref import ModelName, find_model_ref

    return find_model_ref(ModelName(word, config.reference_model, config.trust_remote_code, key="models"))


def _weights(ref: "ModelRef | None") -> str:
    assert ref is not None
    return ref.weights


def _earlier_report(ref: "ModelRef") -> Path | None:
    """The report of dpo-eval on what a run held out, where it is of the weights that are there now."""
    from dpo_cli.runs.manifest import weights_sha256

    if ref.directory is None:
        return None
    report = ref.directory.path / "eval" / f"held-out-{ref.label}" / "report.json"
    try:
        known = json.loads(report.read_bytes()).get("weights_sha256")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return report if known is not None and known == weights_sha256(Path(ref.weights)) else None


def _score(
    config: CompareConfig, overrides: list[tuple[str, Any]], word: str, ref: "ModelRef", name: str, reporter: Reporter
) -> Path:
    """Evaluate as dpo-eval does, and return the folder of the report; an error says of which model it is."""
    from dpo_cli.commands.evaluate import evaluate
    from dpo_cli.config.composition import composed
    from dpo_cli.config.schema import EvalConfig, config_of

    options = ("reference_model", "kl_samples", "layout", "trust_remote_code", "device")
    given = {"checkpoint": word} | {option: getattr(config, option) for option in options}
    wanted = config_of({**composed("eval", [], EvalConfig).container, **given}, EvalConfig)
    in_run = ref.directory is not None
    try:
        return evaluate(replace(wanted, data=config.data, name=None if in_run else plain(name)), overrides, reporter)
    except DpoError as error:
        error.args = (f"{safe_text(word)}: {error}",)
        raise


def _run_around(report: Path) -> Path | None:
    """The run of a report that lies in its eval/<name>/."""
    run = report.parent.parent.parent
    return run if report.parent.parent.name == "eval" and (run / "config.yaml").is_file() else None


def labels(sources: Sequence[str]) -> list[str]:
    """A name for each of several paths, from what differs in them: `a`, `b` of outputs/a/final and outputs/b/final."""
    parts = [
        [part.removeprefix("held-out-") for part in Path(source).parts if part not in PLAIN_FOLDERS]
        for source in sources
    ]
    before = _alike(parts)
    after = _alike([path[before:][::-1] for path in parts])
    found = ["/".join(path[before : len(path) - after]) or path[-1] for path in parts]
    return found if len(set(found)) == len(found) else [*sources]


def _alike(paths: Sequence[Sequence[str]]) -> int:
    """How many first parts all paths have in common."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False)))


# What is shown and kept


def _show(reporter: Reporter, comparison: dict[str, Any]) -> None:
    models, metrics = comparison["models"], ("accuracy", "margin", "loss", "kl", "length_ratio")
    over = plural(comparison["prompts"], "prompt")
    reporter.say(f"{plural(comparison['pairs'], 'pair')} of {over}; intervals hold 95%, over prompts")
    reporter.grid(
        ["model", "accuracy", comparison["margin"], "loss", "KL", "length"],
        [[one["name"], *(_mean(one["metrics"][metric]) for metric in metrics)] for one in models],
    )
    reporter.say()
    rows = []
    for one in models[1:]:
        found = one["difference"]["accuracy"]
        ends = "no interval" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}"
        rows.append([one["name"], f"{found['mean']:+.3f}", ends, significant(found["p"], 2), one["verdict"]])
    reporter.grid([f"against {models[0]['name']}", "accuracy", "95% interval", "p", "verdict"], rows)
    reporter.say()
    for sentence in sentences(comparison):
        reporter.say(sentence)
    for warning in comparison["warnings"]:
        reporter.say(f"note: {warning}")
    reporter.say()
    if comparison["config_differences"]:
        lines = [[one["key"], *one["values"]] for one in comparison["config_differences"]]
        reporter.grid(["config", *(one["name"] for one in models)], lines)
        reporter.say()


def _mean(values: list[float | None] | None) -> str:
    return "" if values is None or values[0] is None else significant(values[0])


def plain(text: str) -> str:
    """A name for a folder; one that was changed or cut ends in a hash."""
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:LONGEST_NAME].strip(".-") or "models"
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _folder(config: CompareConfig, comparison: dict[str, Any], sweep: str | None) -> Path:
    """Where the comparison goes: a folder that is new, or has an earlier comparison of the same models."""
    root = user_path(config.output_dir, StorageError, "output_dir") if config.output_dir else Path("outputs", "compare")
    if config.name is not None:
        return root / config.name
    sources = sorted(one["source"] for one in comparison["models"])
    first = root / plain(sweep or "_vs_".join(one["name"] for one in comparison["models"]))
    folder, suffix = first, 2
    while folder.exists() and _sources(folder) != sources:
        folder, suffix = first.with_name(f"{first.name}_{suffix}"), suffix + 1
    return folder


def _sources(folder: Path) -> list[str] | None:
    """The reports that the comparison in a folder is of."""
    try:
        return sorted(one["source"] for one in json.loads((folder / "report.json").read_bytes())["models"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _write(folder: Path, comparison: dict[str, Any], page: str) -> None:
    """Write `report.html` and `report.json`, both or neither; StorageError where that is not possible."""
    files = {"report.html": page, "report.json": json.dumps(comparison, indent=1, allow_nan=False) + "\n"}
    try:
        write_files(folder, files, "comparison")
    except StorageError:
        with suppress(OSError):  # it holds an earlier comparison
            folder.rmdir()
        raise
