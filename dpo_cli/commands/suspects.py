"""dpo-data run=RUN: which labels of a run's training data are probably wrong, by cross-fitting with the run's config.

The rows are split into folds by prompt. For each fold a policy is trained on the others as the run was, and scores the
fold's pairs: no policy has seen a pair that it scores.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cli.commands.evaluate import evaluate
from dpo_cli.config.composition import composed
from dpo_cli.config.schema import EvalConfig, ExamineConfig, RunConfig, config_of, read_config
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import interval, plural, safe_text, significant
from dpo_cli.data.files import name_of
from dpo_cli.data.groups import prompt_group
from dpo_cli.data.prepare import content_key
from dpo_cli.errors import CheckpointError, ConfigError, DataError, StorageError
from dpo_cli.examination.label_noise import label_noise
from dpo_cli.examination.reading import SourceName, rows_with_pairs, sources_of
from dpo_cli.examination.report import estimate_facts, excerpts
from dpo_cli.paths import user_path
from dpo_cli.storage.durable import whole_file, write_together
from dpo_cli.training.runner import train

FEWEST = 50  # pairs
SUSPECT = 0.5  # the probability above which a label is listed
SHOWN = 5  # on the console


def find_suspects(config: ExamineConfig, reporter: Reporter) -> Path:
    """Train and score every fold; returns the folder of suspects.jsonl and suspects.json.

    An earlier call that was stopped is continued. A DpoError of a fold's training ends the command.
    """
    assert config.run is not None
    run = user_path(config.run, CheckpointError, "run")
    earlier = read_config(run / "config.yaml")
    if earlier.model.trust_remote_code:
        raise ConfigError(f"run={safe_text(run)}: its model runs Python of its authors; suspects are not looked for")
    folder = run / "suspects"
    if config.output_dir is not None:
        folder = user_path(config.output_dir, StorageError, "output_dir")
    which, _ = sources_of(earlier.data)
    places = _write_folds(earlier, which, folder, config.folds)
    pairs = [
        pair
        for fold, indices in enumerate(places)
        for pair in _score_fold(earlier, folder, fold, indices, len(places), reporter)
    ]
    if len(pairs) < FEWEST:
        raise DataError(f"{name_of(which.name)}: {plural(len(pairs), 'pair')} could be scored; {FEWEST} are needed")
    groups = [int(pair["prompt"], 16) for pair in pairs]
    noise = label_noise([pair["margin"] for pair in pairs], groups, config.seed)
    suspects = _suspects(pairs, noise.probabilities.tolist())
    _add_excerpts(suspects, earlier, which)
    smoothing = round(noise.share.mean, 2) if noise.share.low > 0 else 0.0
    facts = {
        "version": 1,
        "pairs": len(pairs),
        "folds": config.folds,
        "suspects": len(suspects),
        "wrong_labels": estimate_facts(noise.share),
        "label_smoothing": smoothing,
    }
    _write(folder, suspects, facts)
    reporter.say()
    for one in suspects[:SHOWN]:
        reporter.say(
            f"row {one['index'] + 1}, wrong with probability {one['probability']:.2f}, margin {one['margin']:+.2f}"
        )
        reporter.say(f"    {' | '.join(safe_text(one[name], 60) for name in ('prompt', 'chosen', 'rejected'))}")
    share = f"{significant(noise.share.mean, 2)} ({interval(noise.share.low, noise.share.high, 2)})"
    step = f"loss.label_smoothing={smoothing}" if smoothing else "none is needed: the interval reaches 0"
    reporter.facts(
        [
            ("wrong labels", f"{share} of {plural(len(pairs), 'pair')}; the interval is over prompts"),
            ("suspects", f"{plural(len(suspects), 'pair')} in {safe_text(folder / 'suspects.jsonl')}"),
            ("smoothing", step),
        ]
    )
    return folder


def _score_fold(
    run: RunConfig, folder: Path, fold: int, indices: list[int], folds: int, reporter: Reporter
) -> list[dict[str, Any]]:
    """Train on the rows of the other folds; the scored pairs of this one, with the indices of their rows in the source.

    Pairs whose score is not finite are left out.
    """
    reporter.say(f"fold {fold + 1} of {folds}: train on the other rows, score {len(indices):,} rows")
    reporter.say()
    of_run = Reporter()  # whose log is that of the fold's run
    try:
        trained = train(_of_fold(run, folder, fold), of_run)
    finally:
        of_run.close()
    options: dict[str, Any] = {"checkpoint": str(trained), "name": "fold", "device": run.device}
    scored = evaluate(config_of(composed("eval", [], EvalConfig).container | options, EvalConfig), [], reporter)
    pairs = map(json.loads, (scored / "pairs.jsonl").read_text(encoding="utf-8").splitlines())
    return [{**pair, "index": indices[pair["index"]]} for pair in pairs if pair["margin"] is not None]


def _suspects(pairs: list[dict[str, Any]], probabilities: list[float]) -> list[dict[str, Any]]:
    """The pairs whose label is probably wrong, the most probable first."""
    found = sorted(zip(probabilities, pairs, strict=True), key=lambda one: (-one[0], one[1]["index"]))
    return [
        {"index": pair["index"], "margin": pair["margin"], "probability": probability, "key": pair["key"]}
        for probability, pair in found
        if probability > SUSPECT
    ]


def _write(folder: Path, suspects: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in suspects)
    files = {"suspects.jsonl": lines, "suspects.json": json.dumps(facts, indent=1) + "\n"}
    try:
        write_together({folder / name: text.encode("utf-8", "backslashreplace") for name, text in files.items()})
    except OSError as error:
        raise StorageError(f"{safe_text(folder)}: the suspects cannot be written ({error.strerror})") from None


def _of_fold(run: RunConfig, folder: Path, fold: int) -> RunConfig:
    """The run's config for one fold; a fold that was started is resumed."""
    data = replace(
        run.data,
        train=str(folder / f"others-{fold + 1}.jsonl"),
        eval=str(folder / f"fold-{fold + 1}.jsonl"),
        eval_split=None,
        limit=None,
        eval_limit=None,
        eval_leaks="warn",
    )
    into = folder / f"run-{fold + 1}"
    return replace(
        run.to_the_end(), samples=replace(run.samples, n=0), data=data,
        output_dir=str(into), resume="auto", tracker=None, eval_every=0, dry_run=False,
        verify_resume=False, replay=None,
    )  # fmt: skip


def _write_folds(run: RunConfig, which: SourceName, folder: Path, folds: int) -> list[list[int]]:
    """The rows of each fold and those of the others, as files; of each fold the index of each row in the source."""
    places: list[list[int]] = [[] for _ in range(folds)]
    rows: list[tuple[int, bytes]] = []
    for read in rows_with_pairs(run.data, which):
        if read.pairs:
            fold = prompt_group(read.pairs[0].prompt) % folds
            places[fold].append(read.row.index)
            line = json.dumps(read.row.value, ensure_ascii=False, default=str) + "\n"
            rows.append((fold, line.encode("utf-8", "backslashreplace")))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for fold in range(folds):
            with whole_file(folder / f"others-{fold + 1}.jsonl") as file:
                file.writelines(line for of, line in rows if of != fold)
            with whole_file(folder / f"fold-{fold + 1}.jsonl") as file:
                file.writelines(line for of, line in rows if of == fold)
    except OSError as error:
        raise StorageError(f"{safe_text(folder)}: the folds cannot be written ({error.strerror})") from None
    return places


def _add_excerpts(suspects: list[dict[str, Any]], run: RunConfig, which: SourceName) -> None:
    """Where each suspect stands, and the beginning of its texts."""
    wanted: dict[int, list[dict[str, Any]]] = {}
    for one in suspects:
        wanted.setdefault(one["index"], []).append(one)
    for read in rows_with_pairs(run.data, which, wanted) if wanted else ():
        for one in wanted[read.row.index]:
            pair = next((pair for pair in read.pairs if content_key(pair) == one["key"]), read.pairs[0])
            one |= {"location": read.row.location, **excerpts(pair)}
