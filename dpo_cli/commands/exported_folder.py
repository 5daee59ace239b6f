"""The folder of an export: written, reloaded and compared with the checkpoint, and only then given its name.

What is checked, with every log-prob computed in float32 on real pairs:

1. the merge: the merged weights, not yet rounded, against the policy as dpo-eval loads it;
2. the folder: what plain transformers loads from it, against the merged weights rounded in memory.

Both may differ by float32 rounding alone (evaluation/agreement.py), so that a wrong sign or a missing adapter shows
whatever the dtype. Where the base was packed, or rounded, while the adapter trained, the first comparison is made with
the adapter on the published base, and that one may differ from the policy by a few times what packing or rounding
changes in the base alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.config.schema import ExportConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import first_line, plural, safe_text, significant
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.errors import CheckpointError, StorageError
from dpo_cli.evaluation.agreement import NOTHING, Difference, agree, difference, response_logps
from dpo_cli.models.adapters import adapter_off
from dpo_cli.models.dtype import dtype_name
from dpo_cli.models.loading import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    model_config,
    model_fingerprint,
    same_weights,
)
from dpo_cli.models.memory import give_memory_back, make_room
from dpo_cli.models.merging import Adapter, at_scale, merge, put_on, round_weights, write_adapter
from dpo_cli.runs.export_card import Exported, export_card
from dpo_cli.runs.manifest import base_fingerprint, settings_in
from dpo_cli.runs.model_ref import ModelRef, load_policy
from dpo_cli.storage.durable import write_folder

BASES_DIFFER = 4.0  # how many times what packing or rounding the base changes the policy may be off by
PROBES = [
    "",
    "Hello, world!",
    " two  spaces\n\n\tand a tab",
    "Grüße, 你好, \U0001f600",
    "def f(x): return x ** 2  # 1,000",
]


@dataclass(frozen=True)
class Subject:
    """What is exported: a checkpoint with its base, and the pairs on which its copy is checked."""

    config: ExportConfig
    ref: ModelRef
    device: torch.device
    encoder: PairEncoder
    pairs: list[TokenizedPair]
    pairs_are: str
    poll: Callable[[], None]

    @cached_property
    def source(self) -> ModelSource:
        """The published weights that are exported or changed: no adapter folded in, not packed."""
        plain = replace(self.ref.base, adapter=None, quantization="none")
        return find_model(
            plain if self.ref.is_adapter else replace(plain, name_or_path=self.ref.weights, revision=None)
        )

    @cached_property
    def published(self) -> torch.dtype:
        """The dtype of the published weights."""
        return published_dtype(self.source)

    @property
    def dtype(self) -> torch.dtype:
        """That of the exported weights of a merged model."""
        return self.published if self.config.dtype == "auto" else getattr(torch, self.config.dtype)

    @property
    def adapters(self) -> list[Adapter]:
        """What changes the published weights, in order."""
        sft = [Adapter(self.ref.base.adapter)] if self.ref.is_adapter and self.ref.base.adapter else []
        return [*sft, Adapter(self.ref.weights, self.config.scale)] if self.ref.is_adapter else []

    @cached_property
    def trained_dtype(self) -> torch.dtype:
        """The dtype of the base while the adapter trained; float32 where that is not known."""
        settings = settings_in(self.ref.directory.read_manifest()) if self.ref.directory else None
        return getattr(torch, settings.dtype) if settings and self.ref.is_adapter else torch.float32

    @property
    def base_differs(self) -> bool:
        """Whether the base that the adapter trained on is another than the published one, by packing or rounding."""
        rounded = self.trained_dtype != torch.float32
        return self.ref.base.quantization != "none" or (
            rounded and (self.trained_dtype != self.published or self.ref.base.adapter is not None)
        )

    def logps(self, model: Any) -> list[Tensor]:
        """The log-probs of the pairs' response tokens."""
        return response_logps(model, self.pairs, self.poll)

    def load(self) -> Any:
        """The published weights in float32."""
        return load_model(self.source, torch.float32, self.device)

    def free(self) -> None:
        """Give the memory of a model back that has gone."""
        make_room(self.device)
        give_memory_back(self.device)


@dataclass(frozen=True)
class Trained:
    """What the checkpoint says of the pairs, as dpo-eval loads it, and what the base says that it trained on."""

    policy: list[Tensor]
    base: list[Tensor] | None  # None for a whole model


@dataclass(frozen=True)
class Made:
    """A folder that is written and agrees with the checkpoint."""

    checks: list[str]
    rank: int  # of the adapter


def published_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that a model's config states, else that of its first floating-point tensor, else float32."""
    stated = getattr(model_config(source), "dtype", None)
    stated = getattr(torch, stated, None) if isinstance(stated, str) else stated
    if isinstance(stated, torch.dtype):
        return stated
    for file in sorted(Path(source.path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                dtype = tensors.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def write_checked(subject: Subject, folder: Path, exported: Exported, reporter: Reporter) -> Made:
    """Fill the folder and check it; only then does it get its name.

    CheckpointError where it does not agree with the checkpoint, StorageError where it cannot be written.
    """
    reporter.doing("scoring pairs with the checkpoint, as dpo-eval loads it")
    trained = _trained(subject)
    subject.free()
    made: list[Made] = []

    def write(beside: Path) -> None:
        merged = subject.config.what == "merged"
        found = (_write_merged if merged else _write_adapter)(subject, beside, trained, reporter)
        load_tokenizer(find_model(subject.ref.base)).save_pretrained(str(beside))
        _check_tokenizer(subject, beside)
        card = export_card(replace(exported, checks=found.checks), subject.ref, subject.source, subject.encoder)
        (beside / "README.md").write_text(card, encoding="utf-8")
        made.append(found)
        if folder.is_dir():  # empty; Windows renames onto no folder
            folder.rmdir()

    try:
        write_folder(folder, write)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(f"{safe_text(folder)}: cannot be written ({safe_text(reason, limit=200)})") from None
    finally:
        reporter.stop()
    return made[0]


def _trained(subject: Subject) -> Trained:
    """Score the pairs with the policy, in float32 whatever the dtype of its weights."""
    ref = subject.ref
    if not ref.is_adapter:
        return Trained(subject.logps(subject.load()), None)
    base = load_model(find_model(ref.base), subject.trained_dtype, subject.device)
    _check_base(ref, base)
    policy = load_policy(ref, base, subject.trained_dtype, subject.device).float()
    with at_scale(policy, subject.config.scale):
        scores = subject.logps(policy)
    with adapter_off(policy):
        return Trained(scores, subject.logps(policy))


def _check_base(ref: ModelRef, base: Any) -> None:
    """CheckpointError where the base holds other weights than when the run trained on it."""
    known = base_fingerprint(ref.directory.read_manifest()) if ref.directory else None
    if known and not same_weights(known, model_fingerprint(base)):
        raise CheckpointError(
            f"{safe_text(ref.base.name_or_path)}: holds other weights than when {safe_text(ref.weights)} was trained "
            "on it; put the earlier ones there, or name their model.revision in the run's config.yaml"
        )


def _unmerged(subject: Subject, model: Any, trained: Trained) -> tuple[Any, list[Tensor]]:
    """What the DPO adapter says of the pairs on the published base, and that base with what comes before folded in.

    CheckpointError where that is another policy than the checkpoint's.
    """
    *before, last = subject.adapters
    model = merge(model, before)
    slack = NOTHING
    if subject.base_differs and trained.base is not None:
        found = difference(trained.base, subject.logps(model))
        slack = Difference(BASES_DIFFER * found.token, BASES_DIFFER * found.response)
    policy = put_on(model, last)
    with at_scale(policy, last.scale):
        scores = subject.logps(policy)
    _require("the adapter on the published base", trained.policy, scores, slack)
    return policy.unload(), scores


def _require(what: str, expected: Sequence[Tensor], found: Sequence[Tensor], slack: Difference = NOTHING) -> None:
    """CheckpointError where two lists of log-probs differ by more than rounding."""
    if not agree(expected, found, slack):
        allowed = f" and {slack} for the base" if slack.response else ""
        raise CheckpointError(
            f"the export is not the checkpoint: {what} differs by up to {difference(expected, found)}, where float32 "
            f"rounding{allowed} is allowed; nothing was written"
        )


def _write_merged(subject: Subject, beside: Path, trained: Trained, reporter: Reporter) -> Made:
    reporter.doing("merging")
    model, expected = subject.load(), trained.policy
    if subject.base_differs:
        model, expected = _unmerged(subject, model, trained)
        model = merge(model, subject.adapters[-1:])
    else:
        model = merge(model, subject.adapters)
    merged = subject.logps(model)
    _require("the merged model", expected, merged)
    reporter.doing("writing")
    round_weights(model, subject.dtype, at_random=subject.dtype == subject.published)
    stops = _set_stops(model, subject.encoder.closing)
    try:
        model.save_pretrained(str(beside), max_shard_size=subject.config.max_shard_size)
    except ValueError as error:  # a generation config that contradicts itself
        raise CheckpointError(
            f"{safe_text(subject.source.name)}: cannot be saved ({safe_text(first_line(error), limit=200)})"
        ) from None
    rounded = merged if subject.dtype == torch.float32 else subject.logps(model.float())
    del model
    subject.free()
    reporter.doing("reloading the folder with transformers")
    reloaded = _plain(beside, None, subject)
    _require("the reloaded folder", rounded, subject.logps(reloaded))
    if _stops(reloaded) != stops:
        raise CheckpointError("the export is not the checkpoint: its generation config has other stop tokens")
    return Made(_checks(subject, trained, rounded, difference(merged, rounded)), 0)


def _write_adapter(subject: Subject, beside: Path, trained: Trained, reporter: Reporter) -> Made:
    reporter.doing("writing")
    model, ref = subject.load(), subject.ref
    local = Path(subject.source.name).expanduser()
    base = str(local.resolve()) if local.is_dir() else subject.source.name
    rank = write_adapter(beside, model, subject.adapters, base, ref.base.revision)
    del model
    subject.free()
    expected = trained.policy
    if subject.base_differs:
        expected = _unmerged(subject, subject.load(), trained)[1]
        subject.free()
    reporter.doing("reloading the adapter with transformers and PEFT")
    reloaded = PeftModel.from_pretrained(_plain(subject.source.path, ref.base.revision, subject), str(beside))
    found = subject.logps(reloaded)
    _require("the reloaded adapter", expected, found)
    return Made(_checks(subject, trained, found, NOTHING), rank)


def _plain(place: Path | str, revision: str | None, subject: Subject) -> Any:
    """A model as anybody loads it, in float32."""
    trusted = subject.config.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(
        str(place), revision=revision or "main", dtype=torch.float32, trust_remote_code=trusted, use_safetensors=True
    )
    return model.to(subject.device).eval()


def _stops(model: Any) -> list[int]:
    """The tokens at which generation stops."""
    stops = model.generation_config.eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def _set_stops(model: Any, closing: int) -> list[int]:
    """Have generation stop at the token that closed responses in training, beside those of the base."""
    stops = _stops(model)
    if closing not in stops:
        stops = [closing, *stops]
        model.generation_config.eos_token_id = stops if len(stops) > 1 else closing
    return stops


def _check_tokenizer(subject: Subject, folder: Path) -> None:
    """CheckpointError where the reloaded tokenizer is another than the one in training."""
    ours = subject.encoder.tokenizer
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=subject.config.trust_remote_code)
    texts = [ours.decode([*pair.prompt, *ids]) for pair in subject.pairs for ids in pair.responses]
    for what, left, right in (
        ("ids", *([tokenizer(text).input_ids for text in [*PROBES, *texts]] for tokenizer in (ours, theirs))),
        ("chat template", *(getattr(tokenizer, "chat_template", None) for tokenizer in (ours, theirs))),
        ("EOS", ours.eos_token_id, theirs.eos_token_id),
    ):
        if left != right:
            raise CheckpointError(f"the export is not the checkpoint: the reloaded tokenizer has another {what}")


def _checks(subject: Subject, trained: Trained, found: Sequence[Tensor], rounding: Difference) -> list[str]:
    """What was compared and found, in sentences."""
    adapter = subject.config.what == "adapter"
    how = f"transformers {transformers.__version__}" + (" and PEFT" if adapter else "")
    lines = [
        f"reloaded with {how} and compared with the checkpoint on {plural(len(subject.pairs), 'pair')} "
        f"({subject.pairs_are}), computed in float32",
        f"log-probs differ by at most {difference(trained.policy, found)}",
    ]
    if not adapter and subject.dtype != torch.float32:
        lines.append(f"of which rounding the weights to {dtype_name(subject.dtype)}: {rounding}")
    if trained.base is not None:
        before, after = (_margin(one, trained.base) for one in (trained.policy, found))
        lines.append(
            f"chosen over rejected, since the SFT model: {significant(before)} nats a pair in the checkpoint, "
            f"{significant(after)} in the export"
        )
    if subject.base_differs:
        method = subject.ref.base.quantization
        how = f"packed to {method}" if method != "none" else f"rounded to {dtype_name(subject.trained_dtype)}"
        lines.append(f"while the adapter trained, the base was {how}: that is in the difference too")
    lines.append("the tokenizer gives the same ids, its chat template is the same")
    return lines


def _margin(logps: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """The mean over pairs of how much more likely chosen has become than rejected, in nats."""
    changes = torch.stack([(after - before).sum() for after, before in zip(logps, base, strict=True)])
    return float((changes[::2] - changes[1::2]).mean())
