"""dpo-data: examine preference data before it costs GPU hours."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import DataConfig, ExamineConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.pairs import check_sources
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import DataError, StorageError
from dpo_cli.examination.findings import findings
from dpo_cli.examination.fix import changes_path, fix_path, write_fixed
from dpo_cli.examination.lengths import EncodedPair, count_tokens
from dpo_cli.examination.page import page
from dpo_cli.examination.reading import Side, compare, read_side, sources_of
from dpo_cli.examination.reference import reference_logps, score_facts
from dpo_cli.examination.report import VERSION, bias_facts, pointless, side_facts, token_facts
from dpo_cli.examination.tables import SIDES, columns_read, lengths, max_lengths, phrases, scores, share
from dpo_cli.examination.words import FEWEST, Words, classify
from dpo_cli.models.loading import find_model, load_tokenizer
from dpo_cli.paths import user_path
from dpo_cli.signals import StopSignals
from dpo_cli.storage.cache_folder import cache_files, cache_folder, clear_cache
from dpo_cli.storage.durable import write_together

CACHES = {"reference": "log-probs of references", "tokens": "tokens of data sets"}
REPORTS = (("report", "report.json"), ("page", "report.html"))


def examine(config: ExamineConfig, given: list[str], reporter: Reporter) -> Path:
    """Examine the data; `given` are the data overrides as the user wrote them. Returns the report's folder.

    DataError, once the report is written, where training would be pointless.
    """
    started = time.monotonic()
    fixed = fix_path(config.fix) if config.fix is not None else None
    check_sources(config.data)
    with StopSignals(reporter.warn) as signals:
        source = find_model(config.model, reporter.say)
        encoder = PairEncoder.of(load_tokenizer(source), config.data)
        reporter.doing("reading pairs")
        of_train, of_held_out = sources_of(config.data)
        train = read_side(config.data, of_train, config.sample, config.seed, signals.poll)
        held_out = read_side(config.data, of_held_out, 0, config.seed, signals.poll) if of_held_out else None
        compare(train, held_out)
        reporter.doing("counting tokens")
        keep = max(config.show, config.score or 0)
        tokens = count_tokens(train.sample, encoder, config.data, keep, signals.poll)
        reason = pointless(train, tokens)
        words = _words(train, config.seed, reporter) if len(tokens.used) else None
        score = None
        if config.score and tokens.first:
            reporter.doing("scoring pairs with the reference")
            scored = [one.tokenized for one in tokens.first[: config.score]]
            score = score_facts(scored, reference_logps(scored, config.model, config.device, reporter, signals.poll))
        report: dict[str, Any] = {
            "version": VERSION,
            "data": {
                "overrides": [safe_text(word) for word in given],
                "model": source.name,
                "template": encoder.kind,
                "max_length": config.data.max_length,
                "seed": config.seed,
            },
            "train": side_facts(train, tokens, config.data),
            "held_out": side_facts(held_out, None, config.data) if held_out is not None else None,
            "tokens": token_facts(tokens, train.kept, config.data) if tokens.used else None,
            "bias": bias_facts(train, tokens, words) if tokens.used else None,
            "score": score,
            "pointless": reason,
        }
        report["findings"] = [asdict(one) for one in findings(report, config.fix, config.data.max_bad_fraction)]
        report["seconds"] = time.monotonic() - started
        _show(reporter, report)
        for one in tokens.first[: config.show]:
            _show_pair(reporter, one, encoder)
        signals.protect_saving()
        folder = _write(report, config)
        files = [(name, str(folder / file)) for name, file in REPORTS]
        if fixed is not None and train.kept:
            files += _fix(train, config.data, fixed)
        reporter.facts(files)
    if reason is not None:
        raise DataError(f"{train.name}: {reason}")
    return folder


def show_caches(action: str, reporter: Reporter) -> None:
    """Say what the cache folder holds, and with `clear` remove it."""
    rows = []
    for kind, what in CACHES.items():
        entries, line = cache_files(kind), f"{what}: none"
        if entries:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entries[-1].used))
            size = significant(sum(entry.bytes for entry in entries) / 2**20)
            line = f"{what}: {plural(len(entries), 'item')}, {size} MiB, last used {when}"
        rows.append((str(cache_folder(kind)), line))
    reporter.facts(rows)
    if action == "clear":
        freed = sum(clear_cache(kind) for kind in CACHES)
        reporter.say(f"freed {significant(freed / 2**20)} MiB")


def _words(train: Side, seed: int, reporter: Reporter) -> Words | None:
    pairs, groups = [one.pair for one in train.sample], [one.group for one in train.sample]
    if len(set(groups)) < FEWEST:
        reporter.say(f"the bag of words needs pairs of {FEWEST} prompts; left out")
        return None
    reporter.doing("training a bag of words")
    try:
        return classify(pairs, groups, seed)
    except ImportError:
        reporter.warn("the bag of words needs scikit-learn: pip install 'dpo-cli[data]'; left out")
        return None


def _write(report: dict[str, Any], config: ExamineConfig) -> Path:
    if config.output_dir is not None:
        folder = user_path(config.output_dir, StorageError, "output_dir")
    else:
        stem = Path(report["train"]["source"].split(" ")[0].replace(":", "-")).name.split(".")[0]
        if not any(c.isalnum() for c in stem):  # a pattern: shards/*.jsonl
            stem = Path(report["train"]["source"]).parent.name or "data"
        folder = Path("outputs") / "data" / "".join(c if c.isalnum() or c in "._-" else "_" for c in stem)
    files = {"report.html": page(report), "report.json": json.dumps(report, indent=1, allow_nan=False) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together({folder / name: text.encode("utf-8") for name, text in files.items()}, shared=True)
    except OSError as error:
        reason = error.strerror or "cannot be written"
        raise StorageError(f"{safe_text(folder)}: the report cannot be written ({reason})") from None
    return folder


def _fix(train: Side, config: DataConfig, path: Path) -> list[tuple[str, str]]:
    kept, dropped = write_fixed(train, config, path)
    changes = safe_text(changes_path(path))
    return [("fixed", f"{safe_text(path)}: {plural(kept, 'row')}"), ("changes", f"{changes}: {plural(dropped, 'row')}")]


# The console


def _show(reporter: Reporter, report: dict[str, Any]) -> None:
    for name, side in (("train", report["train"]), ("held out", report["held_out"])):
        if side is not None:
            _show_side(reporter, name, side)
    if report["tokens"] is not None:
        _show_lengths(reporter, report["tokens"], report["data"])
    if report["bias"] is not None:
        _show_bias(reporter, report["bias"])
    if report["score"] is not None:
        score = report["score"]
        reporter.say(f"the reference model on {plural(score['pairs'], 'pair')}")
        reporter.facts(scores(score))
        reporter.say()
    if report["pointless"] is None:
        found = report["findings"]
        reporter.say(f"{plural(len(found), 'finding')}" if found else "no findings")
        for one in found:
            reporter.say(f"  {one['text']}", style="yellow")
            reporter.say(f"    next: {one['next']}")
        reporter.say()


def _show_side(reporter: Reporter, name: str, side: dict[str, Any]) -> None:
    reporter.say(
        f"{name}: {side['source']}, {plural(side['rows'], 'row')}, {plural(side['pairs'], 'pair')}, "
        f"{side['kept']:,} kept"
    )
    counts = [*side["dropped"].items()]
    counts += [("near_duplicate", side["near_duplicates"])] if side["near_duplicates"] else []
    rows = []
    for reason, number in counts:
        examples = side["examples"].get(reason, [{}])
        different = {one.get("problem") or one.get("index"): one for one in reversed(examples)}  # a problem once
        for place, example in enumerate(reversed(different.values())):
            text = example.get("problem") or " | ".join(safe_text(example[key], 40) for key in SIDES if key in example)
            where = f"row {example['index'] + 1}: {text}" if example else ""
            rows.append([reason if place == 0 else "", f"{number:,}" if place == 0 else "", where])
    if rows:
        reporter.grid(["reason", "count", "for instance (prompt | chosen | rejected)"], rows, left=3)
    for line in columns_read(side):
        reporter.say(line)
    reporter.say()


def _show_lengths(reporter: Reporter, tokens: dict[str, Any], data: dict[str, Any]) -> None:
    part = "" if tokens["pairs"] == tokens["of"] else f", a sample of {tokens['of']:,}"
    reporter.say(
        f"tokens of {plural(tokens['pairs'], 'pair')}{part}, by the tokenizer of {safe_text(data['model'])}, "
        f"template {data['template']}"
    )
    reporter.grid(*lengths(tokens))
    reporter.grid(*max_lengths(tokens, data["max_length"]))
    reporter.say()


def _show_bias(reporter: Reporter, bias: dict[str, Any]) -> None:
    rows = [("longer preferred", f"share of pairs {share(bias['longer_preferred'])}; the interval is over prompts")]
    rows += [("", f"{one['source']}: {share(one['longer_preferred'])}, {one['longer_preferred']['pairs']:,} pairs")
             for one in bias["by_source"]]  # fmt: skip
    words = bias["words"]
    if words is not None:
        accuracy = words["accuracy"]
        rows.append(("words alone", f"find the chosen response in {share(accuracy)} of {accuracy['pairs']:,} pairs"))
    reporter.facts(rows)
    if words is not None and words["phrases"]:
        reporter.grid(*phrases(words), left=2)
    reporter.say()


def _show_pair(reporter: Reporter, one: EncodedPair, encoder: PairEncoder) -> None:
    """The exact ids of a pair, what was cut, and the pair as the model sees it."""
    closing = encoder.tokenizer.decode([encoder.closing])
    rows = []
    for name in SIDES:
        whole, cut = getattr(one.whole, name), getattr(one.cut, name)
        lost = len(whole) - len(cut)
        end = (
            ""
            if name == "prompt"
            else f", closed by {encoder.closing}"
            if cut[-1] == encoder.closing
            else ", not closed"
        )
        gone = f", {lost:,} cut {'at its beginning' if name == 'prompt' else 'at its end'}" if lost else ""
        rows.append((name, f"{plural(len(cut), 'token')}{end}{gone}: {_ids(cut)}"))
    reporter.say(safe_text(one.sampled.location))
    reporter.facts(rows)
    decode = encoder.tokenizer.decode
    reporter.pair(decode(one.cut.prompt), decode(one.cut.chosen), decode(one.cut.rejected), closing)
    reporter.say()


def _ids(ids: list[int]) -> str:
    return " ".join(map(str, ids))
