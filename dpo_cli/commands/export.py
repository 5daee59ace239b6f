"""dpo-export: hand a trained model over, as a folder that other programs read or as a repository on the hub."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo_cli.commands.exported_folder import Subject, write_checked
from dpo_cli.commands.hub import check_account, check_hub, upload
from dpo_cli.commands.serving import Served, serving_commands
from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import EvalConfig, ExportConfig, data_config
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import first_line, plural, safe_text, shell_word, significant
from dpo_cli.data.pairs import load_pairs
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.models.dtype import choose_device, dtype_name
from dpo_cli.models.loading import find_model
from dpo_cli.models.memory import plan_memory, weight_bytes
from dpo_cli.paths import user_path
from dpo_cli.runs.export_card import Exported
from dpo_cli.runs.model_card import portable
from dpo_cli.runs.model_ref import ModelName, ModelRef, find_model_ref, ref_encoder
from dpo_cli.signals import StopSignals


def export(config: ExportConfig, reporter: Reporter) -> None:
    """Export as the config says."""
    assert config.checkpoint is not None and config.to is not None
    hub = config.to.removeprefix("hub:") if config.to.startswith("hub:") else None
    if hub is not None:
        check_hub(hub)
    target = None if hub is not None else _target(config.to)
    ref = find_model_ref(ModelName(config.checkpoint, None, config.trust_remote_code, alone=True))
    _refuse(config, ref, target, hub)
    if hub is not None and config.yes:
        check_account(hub)
    with StopSignals(reporter.warn) as signals, _place(target, hub) as folder:
        subject = _subject(config, ref, reporter, signals)
        _check_room(subject, folder)
        _show_header(reporter, subject, hub or str(folder))
        name = hub or folder.name
        exported = Exported(name, hub is not None, config.what, config.scale, dtype_name(subject.dtype))
        made = write_checked(subject, folder, exported, reporter)
        total = _show_files(reporter, folder, made.checks)
        if hub is None:
            reporter.facts([("done", f"{folder}: {total}")])
        elif config.yes:
            _upload(hub, folder, total, config.private, reporter, signals)
        else:
            reporter.say(
                f"{total} would go to {hub} ({_whose(config.private)}); nothing was uploaded. To upload, add yes=true"
            )
            return
        base = str(subject.source.path) if Path(subject.source.path).is_dir() else subject.source.name
        served = Served(hub or str(folder), name.rpartition("/")[2], config.what == "adapter", base, made.rank)
        _show_commands(reporter, served)


def _target(to: str) -> Path:
    """The folder to make; an error where it cannot be made, or holds something."""
    target, shown = user_path(to, StorageError, "to").absolute(), f"to={safe_text(to)}"
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ConfigError(f"{shown}: exists already, and is not an empty folder; name a new one")
        parent = next(folder for folder in target.parents if folder.exists())
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise StorageError(f"{shown}: cannot be written ({error.strerror})") from None
    return target


def _refuse(config: ExportConfig, ref: ModelRef, target: Path | None, hub: str | None) -> None:
    """ConfigError for what cannot be exported as it is asked for, before anything is loaded."""
    shown = f"checkpoint={safe_text(config.checkpoint)}"
    if not ref.objective.generates:
        raise ConfigError(
            f"{shown}: a reward model answers no prompts, and no server loads its head; use it with "
            f"dpo-label by=reward {shell_word('judge', config.checkpoint)}, or by the code in its final/README.md"
        )
    if not ref.is_adapter and config.what == "adapter":
        raise ConfigError(f"what=adapter: {shown} holds a whole model and no adapter; leave what=merged")
    if not ref.is_adapter and config.scale != 1:
        raise ConfigError(f"scale={config.scale:g}: is for an adapter, and {shown} holds a whole model; leave it out")
    inside = [Path(ref.weights)] + ([ref.directory.final, ref.directory.checkpoints] if ref.directory else [])
    if target is not None and any(target.resolve().is_relative_to(folder.resolve()) for folder in inside):
        raise ConfigError(f"to={safe_text(config.to)}: lies inside what is exported; name a folder elsewhere")
    base = ref.base.name_or_path
    if hub is not None and config.what == "adapter" and portable(base).startswith("path/to/"):
        raise ConfigError(
            f"to=hub:{hub}: the adapter's base is a folder of this machine ({safe_text(base)}), which nobody else has; "
            "export what=merged"
        )


@contextmanager
def _place(target: Path | None, hub: str | None) -> Iterator[Path]:
    """The folder to fill: the target, or one that is removed at the end. Folders made above it go if they are empty."""
    if target is None:
        assert hub is not None
        with tempfile.TemporaryDirectory(prefix="dpo-export-") as temporary:
            yield Path(temporary) / hub.rpartition("/")[2]
        return
    new = [folder for folder in target.parents if not folder.exists()]
    try:
        yield target
    finally:
        for folder in new:
            with suppress(OSError):  # it is not empty: the export is there
                folder.rmdir()


def _subject(config: ExportConfig, ref: ModelRef, reporter: Reporter, signals: StopSignals) -> Subject:
    device = choose_device(config.device).value
    source = find_model(ref.base, reporter.say)
    reporter.doing(f"loading the tokenizer of {safe_text(source.name)}")
    encoder = ref_encoder(ref)
    reporter.doing("reading pairs")
    pairs, pairs_are = _pairs(ref, encoder, config.check, reporter, signals.poll)
    reporter.stop()
    return Subject(config, ref, device, encoder, pairs, pairs_are, signals.poll)


def _pairs(
    ref: ModelRef, encoder: PairEncoder, number: int, reporter: Reporter, poll: Callable[[], None]
) -> tuple[list[TokenizedPair], str]:
    """The first pairs that the run held out, and what they are; shipped ones where there are none."""

    def first(options: Any, seed: int) -> list[TokenizedPair]:
        options = replace(options, eval_limit=min(number, options.eval_limit or number))
        found = load_pairs(options, encoder, seed, held_out_only=True, poll=poll, working=reporter.bar).held_out
        return [found[index] for index in range(min(number, len(found)))]

    if ref.run is not None:
        try:
            return first(ref.run.data, ref.run.seed), "held-out pairs of the run"
        except DataError as error:  # held none out, or its data is not here: nothing that an export needs
            reporter.say(
                f"no held-out pairs of the run ({safe_text(first_line(error), limit=200)}): shipped ones serve"
            )
    shipped = composed("eval", parse_overrides(["checkpoint=x", "data=sample"]), EvalConfig).container["data"]
    return first(data_config(shipped), 0), "shipped pairs (data=sample)"


def _check_room(subject: Subject, folder: Path) -> None:
    """Errors where memory or disk cannot hold what is to come, as far as it is known before."""
    path = subject.source.path
    plan_memory(path, torch.float32, subject.device, second_model=False)
    size = weight_bytes(path, subject.dtype) if subject.config.what == "merged" else None
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if size is not None and size > free:
        raise StorageError(
            f"to={safe_text(subject.config.to)}: the weights take {significant(size / 1e9)} GB, and "
            f"{significant(free / 1e9)} GB are free in {safe_text(parent)}"
        )


def _show_header(reporter: Reporter, subject: Subject, to: str) -> None:
    config, ref = subject.config, subject.ref
    how = "adapters folded in" if subject.adapters else "a whole model"
    if config.what == "adapter":
        how = "one LoRA adapter" if len(subject.adapters) > 1 else "the adapter"
    rows = [("checkpoint", safe_text(ref.weights))]
    if ref.is_adapter:
        rows.append(
            ("base", f"{safe_text(subject.source.name)} ({subject.source.origin}), {dtype_name(subject.published)}")
        )
    if ref.is_adapter and ref.base.adapter:
        rows.append(("SFT adapter", safe_text(ref.base.adapter)))
    rows.append(("export", f"{config.what}: {how}" + (f", scale {config.scale:g}" if config.scale != 1 else "")))
    if config.what == "merged":
        of = "the base as published" if ref.is_adapter else "the model"
        reason = f"that of {of}" if config.dtype == "auto" else "as requested"
        rows.append(("dtype", f"{dtype_name(subject.dtype)}: {reason}"))
    if ref.base.quantization != "none":
        rows.append(("note", f"the adapter trained on the base packed to {ref.base.quantization}; the export is of the "
                             "unpacked base, so its answers differ a little from those of training"))  # fmt: skip
    if ref.base.trust_remote_code:
        reporter.say("trust_remote_code=true: Python of the model's authors runs on this machine", style="red")
    rows.append(("to", safe_text(to)))
    reporter.facts(rows)
    reporter.say()


def _show_files(reporter: Reporter, folder: Path, checks: Sequence[str]) -> str:
    """Show what was compared and the files; returns how many there are, and their size."""
    files = [(file.name, file.stat().st_size) for file in sorted(folder.iterdir())]
    reporter.facts([("checked" if number == 0 else "", line) for number, line in enumerate(checks)])
    reporter.say()
    reporter.grid(["file", "MB"], [[name, significant(size / 1e6)] for name, size in files])
    return f"{plural(len(files), 'file')}, {significant(sum(size for _, size in files) / 1e9)} GB"


def _upload(hub: str, folder: Path, total: str, private: bool, reporter: Reporter, signals: StopSignals) -> None:
    reporter.doing(f"uploading {total} to {hub} ({_whose(private)})")
    signals.protect_saving()
    reporter.facts([("uploaded", f"{upload(folder, hub, private)} ({_whose(private)})")])


def _whose(private: bool) -> str:
    return "private" if private else "PUBLIC"


def _show_commands(reporter: Reporter, served: Served) -> None:
    """The commands that serve it."""
    commands = serving_commands(served)
    reporter.say()
    if not commands:
        reporter.say("the adapter is not LoRA: servers do not load it; what=merged is a whole model")
        return
    reporter.say("to serve it (these were not run here):")
    for program, lines in commands:
        reporter.say(f"  {program}")
        for line in lines:
            reporter.say(f"    {safe_text(line)}")
