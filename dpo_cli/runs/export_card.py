"""The model card of an exported model: README.md with the hub's front matter.

It is read by others, far from the run: it names no path of this machine, and what users wrote is escaped for Markdown
and YAML.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from dpo_cli import __version__
from dpo_cli.config.schema import RunConfig
from dpo_cli.console.text import interval, safe_text, significant
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import CheckpointError
from dpo_cli.models.builtin import SMOLLM2
from dpo_cli.models.loading import ModelSource
from dpo_cli.runs.checkpoint import read_json
from dpo_cli.runs.manifest import weights_sha256
from dpo_cli.runs.model_card import asking_code, portable
from dpo_cli.runs.model_ref import ModelRef

SHOWN = (
    ("rewards/accuracies", "accuracy", "share of pairs whose chosen response has the higher implicit reward"),
    ("rewards/margins", "reward margin", "chosen minus rejected, in units of the implicit reward"),
    ("loss", "loss", "the training loss"),
    ("samples/kl", "KL from the SFT model", "nats a response, over its own sampled answers"),
    ("samples/length_ratio", "length ratio", "tokens of an answer, relative to the SFT model's"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DATA_FILE = re.compile(r"\.(jsonl?|jsonl\.gz|csv|parquet|txt)$")


@dataclass(frozen=True)
class Exported:
    """What was exported, for its card."""

    name: str  # `owner/name` on the hub, else the folder's name
    on_hub: bool
    what: str  # merged or adapter
    scale: float
    dtype: str  # of the weights
    checks: Sequence[str] = ()  # sentences: what was compared before the export was done


@dataclass(frozen=True)
class Measured:
    """Held-out metrics of the weights, and where they come from."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    source: str


def escaped(text: object) -> str:
    """Untrusted text for Markdown: on one line, without effect on it."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$&])", r"\\\1", safe_text(text, limit=500))


def measured(ref: ModelRef) -> Measured | None:
    """Metrics of the newest report of dpo-eval on these weights, else of the run's own evaluation at their step."""
    if ref.directory is None:
        return None
    weights = weights_sha256(Path(ref.weights))
    reports = [file for file in ref.directory.path.glob("eval/*/report.json") if not file.is_symlink()]
    for file in sorted(reports, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            report = read_json(file)
        except CheckpointError:
            continue
        if isinstance(report, dict) and weights is not None and report.get("weights_sha256") == weights:
            data = report.get("data")
            source = data.get("source") if isinstance(data, dict) else None
            on = f"{_pairs(report.get('pairs'))} of {_public(source)}" if source else _pairs(report.get("pairs"))
            return Measured(*_numbers(report), f"dpo-eval on {on}")
    manifest = ref.directory.read_manifest()
    final = manifest.get("final")
    step = int(ref.label.removeprefix("step-")) if re.fullmatch(r"step-\d+", ref.label) else None
    step = final.get("step") if step is None and isinstance(final, dict) else step
    records = [one for one in ref.directory.metrics.read() if one.get("split") == "eval"]
    records = [one for one in records if step is None or one.get("step") == step]
    if not records:
        return None
    return Measured(*_numbers(records[-1]), f"the run's own evaluation at step {records[-1].get('step')}")


def _pairs(number: Any) -> str:
    return f"{number:,} pairs" if isinstance(number, int) else "pairs"


def _numbers(record: dict[str, Any]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The metrics that are shown, and their intervals."""
    given = record.get("intervals95")
    intervals = given if isinstance(given, dict) else {}
    values = {name: float(record[name]) for name, _, _ in SHOWN if isinstance(record.get(name), int | float)}
    ends = {name: intervals.get(name) for name in values}
    pairs = {name: two for name, two in ends.items() if isinstance(two, list) and len(two) == 2}
    known = {name: two for name, two in pairs.items() if all(isinstance(end, int | float) for end in two)}
    return values, {name: (float(low), float(high)) for name, (low, high) in known.items()}


def _public(source: object) -> str:
    """The name of data without the folders of this machine."""
    name, space, rest = str(source).partition(" (")
    return f"{portable(name)}{space}{rest}" if HUB_ID.fullmatch(name) else f"{Path(name).name}{space}{rest}"


def license_of(source: ModelSource) -> str | None:
    """The license that the base's own card states; None where it states none, or there is no card here."""
    if source.name == SMOLLM2:
        return "apache-2.0"
    card = Path(source.path) / "README.md"
    if not Path(source.path).is_dir():
        cached = try_to_load_from_cache(source.path, "README.md", revision=source.config.revision)
        card = Path(cached) if isinstance(cached, str) else card
    try:
        stated = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        stated = None
    return stated if isinstance(stated, str) and re.fullmatch(r"[a-z0-9.-]{2,40}", stated) else None


def hub_datasets(run: RunConfig) -> list[str]:
    """The hub ids among what a run was trained on."""
    places = [part.train for part in run.data.parts().values() if isinstance(part.train, str)]
    named = [place for place in places if HUB_ID.fullmatch(place) and not DATA_FILE.search(place)]
    return [place for place in dict.fromkeys(named) if not Path(place).exists()]


def export_card(exported: Exported, ref: ModelRef, source: ModelSource, encoder: PairEncoder) -> str:
    """Markdown: what it is, how to use it, what it was trained on and how, how it did, and what is not known.

    `source` is the base as published, `encoder` how texts became tokens.
    """
    base = source.name if source.name == SMOLLM2 else portable(source.path, source.name)
    shown_base = base.removeprefix("path/to/")
    found = measured(ref)
    manifest = ref.directory.read_manifest() if ref.directory else {}
    parts = [
        _front_matter(exported, ref, base, source, found),
        [f"# {escaped(exported.name.rpartition('/')[2])}", "", _what_it_is(exported, ref, shown_base), ""],
        ["## Use", "", "```python", *_code(exported, base, encoder), "```", ""],
        _training(ref, manifest, encoder),
        _metrics(exported, found),
        _verdict(manifest),
        ["## Before it was handed over", "", *(f"- {escaped(check)}" for check in exported.checks), ""],
        _limits(shown_base),
    ]
    return "\n".join(line for part in parts for line in part)


def _front_matter(
    exported: Exported, ref: ModelRef, base: str, source: ModelSource, found: Measured | None
) -> list[str]:
    stated = license_of(source)
    datasets = hub_datasets(ref.run) if ref.run else []
    facts: dict[str, Any] = {
        "library_name": "peft" if exported.what == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if not base.startswith("path/to/") else {}),
        **({"base_model_relation": "adapter" if exported.what == "adapter" else "finetune"} if base else {}),
        **({"license": stated} if stated else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["dpo", "preference-tuning", "dpo-cli"],
    }
    if found is not None and found.values and exported.scale == 1:
        metrics = [
            {"type": "accuracy" if name == "rewards/accuracies" else name, "name": label, "value": found.values[name]}
            for name, label, _ in SHOWN
            if name in found.values
        ]
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": "preference-pairs", "name": safe_text(found.source, limit=200)},
            "metrics": metrics,
        }
        facts["model-index"] = [{"name": safe_text(exported.name.rpartition("/")[2]), "results": [result]}]
    return ["---", yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _what_it_is(exported: Exported, ref: ModelRef, base: str) -> str:
    start = f"{escaped(base)}, tuned with Direct Preference Optimization by dpo-cli {__version__}"
    sft = ", after an SFT adapter" if ref.base.adapter else ""
    how = "a LoRA adapter for it" if exported.what == "adapter" else f"the whole model in {exported.dtype}"
    scale = f" The change that the tuning made is scaled by {exported.scale:g}." if exported.scale != 1 else ""
    return f"{start}{sft}. This is {how}.{scale}"


def _code(exported: Exported, base: str, encoder: PairEncoder) -> list[str]:
    place = exported.name if exported.on_hub else f"path/to/{portable_name(exported.name)}"
    if exported.what == "merged":
        load = [
            "from transformers import AutoModelForCausalLM", "",
            f'model = AutoModelForCausalLM.from_pretrained("{place}")',
        ]  # fmt: skip
    else:
        load = [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(model, "{place}")',
        ]  # fmt: skip
    return [*load, *asking_code(encoder, place)]


def portable_name(name: str) -> str:
    """A folder's name without the characters that would end a string of Python."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", safe_text(name))


def _training(ref: ModelRef, manifest: dict[str, Any], encoder: PairEncoder) -> list[str]:
    lines = ["## Training", ""]
    if ref.run is None:
        return [*lines, "The checkpoint keeps no record of its training.", ""]
    run, data, split = ref.run, ref.run.data, manifest.get("data")
    train = split.get("train") if isinstance(split, dict) else None
    kept = train.get("kept") if isinstance(train, dict) else None
    places = [
        (name, place)
        for name, part in data.parts().items()
        for place in ([part.train] if isinstance(part.train, str) else part.train or [])
    ]
    named = [f"{escaped(name)}: {escaped(portable(place))}" if name else escaped(portable(place)) for name, place in places]  # noqa: E501 # fmt: skip
    facts: list[tuple[str, object]] = [
        ("trained on", f"{_pairs(kept)} of {', '.join(named)}"),
        ("data fingerprint", f"`{escaped(manifest.get('data_fingerprint', 'not known'))}`"),
        ("loss", f"{run.loss.name}, beta {significant(run.beta)}"),
        ("steps", _steps(ref, manifest)),
        ("batch size", f"{run.batch_size} pairs"),
        ("optimizer", f"{run.optimizer.name}, learning rate {run.optimizer.lr:g}, {run.optimizer.schedule}"),
        ("adapter", _lora(run)),
        ("base while training", _base(run, manifest)),
        ("template", f"{encoder.kind}, at most {data.max_length} tokens"),
        ("seed", run.seed),
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts), ""]
    return lines


def _steps(ref: ModelRef, manifest: dict[str, Any]) -> str:
    total, final = escaped(manifest.get("total_steps")), manifest.get("final")
    if re.fullmatch(r"step-\d+", ref.label):
        return f"{int(ref.label.removeprefix('step-'))} of {total}"
    if isinstance(final, dict):
        return f"{escaped(final.get('step'))} of {total} ({escaped(final.get('reason'))})"
    return total


def _lora(run: RunConfig) -> str:
    lora = run.lora
    if not lora.enabled:
        return "none: every weight trained"
    return f"LoRA, r {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {escaped(lora.target_modules)}"


def _base(run: RunConfig, manifest: dict[str, Any]) -> str:
    method = run.model.quantization
    packed = f", packed to {method}; the weights here are of the unpacked base" if method != "none" else ""
    return f"{escaped(manifest.get('dtype', run.model.dtype))}{packed}"


def _metrics(exported: Exported, found: Measured | None) -> list[str]:
    lines = ["## Held-out metrics", ""]
    if found is None or not found.values:
        return [*lines, "None are known of these weights.", ""]
    scaled = "" if exported.scale == 1 else f" They are of scale 1; this export has scale {exported.scale:g}."
    lines += [f"From {escaped(found.source)}, with 95% intervals over prompts.{scaled}", ""]
    lines += ["| metric | mean | 95% interval | |", "|---|---|---|---|"]
    for name, label, meaning in SHOWN:
        if name in found.values:
            ends = interval(*found.intervals[name]) if name in found.intervals else ""
            lines.append(f"| {label} | {significant(found.values[name])} | {ends} | {meaning} |")
    return [*lines, ""]


def _verdict(manifest: dict[str, Any]) -> list[str]:
    verdict = manifest.get("verdict")
    if not isinstance(verdict, dict):
        return []
    found = verdict.get("findings")
    findings = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [
        "## Verdict of the run", "",
        f"{escaped(verdict.get('color'))}: {escaped(verdict.get('summary'))}", "",
        *(f"- {escaped(one.get('name'))}: {escaped(one.get('reason'))}" for one in findings),
        *([""] if findings else []),
    ]  # fmt: skip


def _limits(base: str) -> list[str]:
    return [
        "## Limits", "",
        "- It was not evaluated on other data than named above, nor on general abilities.",
        "- Its safety was not tested. Tuning on preferences can weaken what the base refuses.",
        "- It learned the preferences of its data, with their errors and their taste in length and style.",
        f"- The limits and the license of {escaped(base)} hold for it too.",
        "",
    ]  # fmt: skip
