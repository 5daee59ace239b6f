"""--help, made from conf/: every key with its default and its YAML comment. What is written here is only usage.

`--help` shows the keys that most runs set, `--help-all` all of them.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.config.composition import SEVERAL, composed, conf_dir, groups
from dpo_cli.config.files import keys_and_lines, override_value
from dpo_cli.config.schema import SCHEMAS, group_of, schema_fields
from dpo_cli.config.versions import flat

WIDTH = 80
INDENT = 30  # columns of key=default


@dataclass(frozen=True)
class Page:
    """The hand-written part of a command's help."""

    what: str
    usage: str
    common: tuple[str, ...]  # the keys of the short help; a group stands for its keys
    examples: tuple[tuple[str, str], ...]
    result: str
    codes: str = (
        "0 done, 2 command line, 3 data, 4 checkpoint or model, 6 memory, 7 storage, 75 stopped by a signal (run again "
        "to continue), 130 Ctrl-C"
    )


PAGES = {
    "train": Page(
        "preference-tune a language model with Direct Preference Optimization",
        "dpo-train [group=choice ...] [key=value ...]",
        (
            "model.name_or_path", "data.train", "data.eval", "data.max_length", "objective", "beta", "optimizer.lr",
            "batch_size", "epochs", "max_steps", "lora.r", "eval_every", "save_every", "output_dir", "resume",
            "dry_run",
        ),
        (
            ("dpo-train", "the embedded model and pairs"),
            ("dpo-train model=qwen data=hh", "Qwen2.5-0.5B on Anthropic's pairs"),
            ("dpo-train data=jsonl data.train=pairs.jsonl", "your own pairs"),
            ("dpo-train -m beta=0.05,0.1,0.3", "a sweep, one run after the other"),
            ("dpo-train output_dir=outputs/a resume=auto", "resume a stopped run"),
        ),
        "Results go to outputs/<model>-<data>/<date_time>/: metrics.jsonl, checkpoints/, final/ (the adapter).",
        "0 done, 2 command line, 3 data, 4 checkpoint or model, 5 diverged, 6 memory, 7 storage, 75 stopped by a "
        "signal (run again with resume=auto), 130 Ctrl-C",
    ),
    "eval": Page(
        "score a finished run, checkpoint, adapter or model on preference pairs, without training",
        "dpo-eval checkpoint=PATH [data=choice] [key=value ...]",
        ("checkpoint", "data.eval", "reference_model", "samples", "max_new_tokens", "name", "output_dir"),
        (
            ("dpo-eval checkpoint=outputs/smollm2-sample/2026-01-31_12-00-00 samples=3", ""),
            ("dpo-eval checkpoint=my-adapter data=jsonl data.eval=pairs.jsonl", ""),
            ("dpo-eval checkpoint=merged-model reference_model=sft-model data=hh", ""),
        ),
        "Writes report.json (means and 95% intervals), pairs.jsonl (a line a pair) and report.html to "
        "<run>/eval/<name>/.",
    ),
    "sample": Page(
        "generate completions for a file of prompts, to be compared",
        "dpo-sample prompts=FILE [model=choice] [key=value ...]",
        ("prompts", "model.name_or_path", "checkpoint", "n", "temperature", "max_new_tokens", "limit", "output"),
        (
            ("dpo-sample prompts=prompts.txt output=samples.jsonl", ""),
            ("dpo-sample model=qwen prompts=pairs.jsonl n=4 temperature=0.8 output=samples.jsonl", ""),
            ("dpo-sample checkpoint=outputs/a prompts=prompts.txt output=round2.jsonl", ""),
        ),
        "The same seed gives the same completions, whatever else is generated. The next step is dpo-label.",
    ),
    "label": Page(
        "turn samples into preference pairs for dpo-train",
        "dpo-label samples=FILE by=human|reward|implicit|rule [key=value ...]",
        ("samples", "by", "judge", "rule", "annotator", "pairs", "labels", "output"),
        (
            ("dpo-label samples=samples.jsonl by=human annotator=ann", ""),
            ("dpo-label samples=samples.jsonl by=reward judge=outputs/reward", ""),
            ("dpo-label samples=samples.jsonl by=rule rule=shorter output=pairs.jsonl", ""),
        ),
        "Every pair has the probability that its chosen response is the better one. The next step is "
        "dpo-train data=jsonl data.train=FILE.",
    ),
    "rank": Page(
        "a Bradley-Terry ranking with 95% intervals",
        "dpo-rank games=FILE [prior=0]\n    dpo-rank checkpoints=[a,b,c] judge=JUDGE prompts=FILE [key=value ...]",
        ("games", "checkpoints", "judge", "prompts", "prior", "limit", "output"),
        (
            ("dpo-rank games=games.csv", ""),
            ("dpo-rank checkpoints=[outputs/a,outputs/b] judge=outputs/reward prompts=prompts.txt limit=100", ""),
            ("dpo-rank checkpoints=[outputs/a,outputs/b] judge=shorter prompts=prompts.txt", ""),
        ),
        "Checkpoints answer every prompt; the judge compares their answers. The same command continues a stopped one.",
    ),
    "data": Page(
        "examine preference data before it is trained on",
        "dpo-data data=choice [key=value ...]",
        ("model.name_or_path", "data.train", "data.eval", "data.max_length", "sample", "show", "score", "fix", "cache",
         "run", "output_dir"),
        (
            ("dpo-data data=hh", ""),
            ("dpo-data data=jsonl data.train=pairs.jsonl", ""),
            ("dpo-data data=jsonl data.train=pairs.jsonl data.eval=held_out.jsonl", "leaks between the two, too"),
            ("dpo-data data=jsonl data.train=pairs.jsonl fix=cleaned.jsonl", ""),
            ("dpo-data data=hh show=3 score=500", ""),
            ("dpo-data cache=show", ""),
            ("dpo-data run=outputs/a", "labels that are probably wrong"),
        ),
        "Writes report.json and report.html: what would be dropped, lengths and their cost, length and word bias.",
        "0 done, 2 command line, 3 data that cannot be read, or from which nothing can be learned, 4 model, 6 memory, "
        "7 storage, 75 stopped by a signal, 130 Ctrl-C",
    ),
    "compare": Page(
        "say which of several models is better, by paired differences on the same held-out pairs",
        "dpo-compare A B [C ...] [data=choice] [key=value ...]\n    dpo-compare SWEEP",
        ("models", "data.eval", "reference_model", "name", "output_dir"),
        (
            ("dpo-compare outputs/a outputs/b", ""),
            ("dpo-compare outputs/a/checkpoints/step-00000100 outputs/a/final", ""),
            ("dpo-compare outputs/a/eval/held-out-final outputs/b/eval/held-out-final", "loads no model"),
            ("dpo-compare outputs/a my-adapter data=jsonl data.eval=pairs.jsonl", ""),
            ("dpo-compare outputs/multirun/2026-01-31_12-00-00", "which run of a sweep"),
        ),
        "The others are compared with A. A model without a report on these pairs is scored first, as by dpo-eval. "
        "Writes report.json and report.html to outputs/compare/<name>/.",
    ),
    "export": Page(
        "hand a trained model over: a folder that transformers, vLLM, llama.cpp and Ollama read, or a repository",
        "dpo-export checkpoint=PATH to=DIR|hub:owner/name [key=value ...]",
        ("checkpoint", "to", "what", "scale", "dtype", "yes", "private", "device"),
        (
            ("dpo-export checkpoint=outputs/a to=my-model", ""),
            ("dpo-export checkpoint=outputs/a to=my-adapter what=adapter", ""),
            ("dpo-export checkpoint=outputs/a to=half scale=0.5", ""),
            ("dpo-export checkpoint=outputs/a to=hub:me/my-model", "lists what would go"),
            ("dpo-export checkpoint=outputs/a to=hub:me/my-model yes=true", "uploads it"),
        ),
        "The folder is reloaded with transformers and compared with the checkpoint before it gets its name. "
        "to=hub: without yes=true makes and checks the folder in a temporary place, lists its files, uploads nothing "
        "and removes it. The token is that of HF_TOKEN or of `hf auth login`.",
        "0 done, 2 command line, 4 checkpoint or model, or the folder does not answer as the checkpoint does, "
        "6 memory, 7 storage or hub, 75 stopped by a signal, 130 Ctrl-C",
    ),
}  # fmt: skip
FLAGS = (
    (
        "--config FILE.yaml",
        "overrides, a key: value a line, nested keys too; the command line wins",
    ),
    (
        "--config-dir DIR",
        "your own groups, found before the packaged ones: data/mine.yaml with defaults: [_base, _self_]",
    ),
    ("--print-config", "print the composed config and stop; --config takes it back"),
    ("--help-all", "every key"),
)
SWEEP_FLAG = ("-m, --multirun", "try every combination of comma-separated values")


def help_page(command: str, everything: bool = False, own: Path | None = None) -> str:
    """What --help or --help-all prints; `own` is the folder of --config-dir, whose choices are listed too."""
    page = PAGES[command]
    flags = [*([SWEEP_FLAG] if command == "train" else []), *FLAGS[: 3 if everything else 4]]
    parts = [
        textwrap.fill(f"dpo-{command}: {page.what}.", WIDTH),
        f"    {page.usage}",
        _groups(command, own),
        ("Keys" if everything else "Common keys (all: --help-all)")
        + f", with their defaults\n{_keys(command, everything)}",
        "Flags\n" + "\n".join(_row(flag, text) for flag, text in flags),
        "Examples\n" + "\n".join(_example(words, text) for words, text in page.examples),
        textwrap.fill(page.result, WIDTH),
        textwrap.fill(f"Exit codes: {page.codes}.", WIDTH),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _groups(command: str, own: Path | None) -> str:
    """Each group that the command knows, its choices, the default marked."""
    defaults = default_choices(command)
    lines = []
    for group, choices in groups(own).items():
        if group in defaults:
            marked = [f"{choice}*" if choice == defaults[group] else choice for choice in choices]
            lines += textwrap.wrap(
                "  ".join(marked), WIDTH - 13, initial_indent=f"  {group:<11}", subsequent_indent=" " * 13
            )
    # textwrap counts the indent within the width, so that a line ends before column 80.
    return "Groups and their choices (* is the default)\n" + "\n".join(lines) if lines else ""


def default_choices(command: str) -> dict[str, str | None]:
    """The groups of a command's defaults list, each with its choice."""
    text = (conf_dir() / f"{command}.yaml").read_text(encoding="utf-8")
    return {name: None if choice == "null" else choice for name, choice in re.findall(r"^  - (\w+): (\w+)", text, re.M)}


def _keys(command: str, everything: bool) -> str:
    """The keys with default and comment: those that are common, or all, group by group."""
    rows = key_rows(command)
    shown = [*rows] if everything else PAGES[command].common
    lines = []
    for before, key in zip(["", *shown], shown, strict=False):
        if everything and before and before.split(".")[0] != key.split(".")[0] and ("." in key or "." in before):
            lines.append("")
        default, comment = rows[key]
        lines.append(_row(f"{key}={default}", comment))
    return "\n".join(lines)


def key_rows(command: str) -> dict[str, tuple[str, str]]:
    """Every key of a command, its default as it would be written, and its comment in conf/."""
    schema = SCHEMAS[command]
    values = flat(composed(command, [], schema).container)
    chosen = default_choices(command)
    rows = _of_file(conf_dir() / f"{command}.yaml", "", values)
    for group in (name for name, field in schema_fields(schema).items() if group_of(field.annotation)):
        # What all choices share says best what a key means; where it is silent, the default choice does. Where nothing
        # is chosen by default, every choice may add keys.
        names = [f"{name}.yaml" for name in ("_base", chosen.get(group)) if name]
        names += [file.name for file in sorted((conf_dir() / group).glob("*.yaml")) if group in SEVERAL]
        for name in names:
            file = conf_dir() / group / name
            for key, (default, comment) in (_of_file(file, f"{group}.", values) if file.is_file() else {}).items():
                rows[key] = (default, rows.get(key, ("", ""))[1] or comment)
    unexplained = {key: value for key, (value, comment) in rows.items() if not comment}
    return rows | {key: (value, f"set by choosing {key.split('.')[0]}=") for key, value in unexplained.items()}


def _of_file(file: Path, prefix: str, values: dict[str, Any]) -> dict[str, tuple[str, str]]:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    prefix = "" if text.startswith("# @package _global_") else prefix
    rows = {}
    for key, value, line in keys_and_lines(text, file.name):
        if key != "defaults":
            comment = re.search(r"(?<=\s)#\s*(.*)", lines[line - 1])
            shown = override_value(values.get(prefix + key, value))
            rows[prefix + key] = (shown, comment[1] if comment else "")
    return rows


def _row(left: str, text: str) -> str:
    """A column of keys and one of words; a key that is too long stands on a line of its own."""
    lines = textwrap.wrap(text, WIDTH - INDENT - 2, break_on_hyphens=False) or [""]
    if len(left) >= INDENT - 1:
        return "\n".join([f"  {left}", *(" " * (INDENT + 2) + line for line in lines if line)])
    return "\n".join([f"  {left:<{INDENT}}{lines[0]}".rstrip(), *(" " * (INDENT + 2) + line for line in lines[1:])])


def _example(words: str, text: str) -> str:
    return f"  {words:<45}  {text}".rstrip()
