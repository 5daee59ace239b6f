"""Who gives answers a reward without being a person: a reward model, a DPO policy's implicit reward, a rule.

Models are asked by the training forward: the answers to a prompt share it in one packed row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.batches import cut_by_tokens
from dpo_cli.data.formats import PreferencePair
from dpo_cli.data.samples import Sample, as_drawn
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, Truncation, token_ids, truncate
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.evaluation.scores import score_pairs
from dpo_cli.labelling.classifier import conversation_ids, is_classifier, load_classifier, scores
from dpo_cli.labelling.rules import RULES
from dpo_cli.models.loading import (
    ModelSource,
    choose_device,
    find_model,
    load_model,
    load_tokenizer,
    model_digest,
    position_limit,
)
from dpo_cli.models.logps import Batching
from dpo_cli.models.memory import ENOUGH_TOKENS, OTHERWISE
from dpo_cli.models.packing import remembered_way
from dpo_cli.models.reference import AdapterOffReference, NoReference
from dpo_cli.objectives.reward_model import HEAD_FILE
from dpo_cli.runs.model_ref import Asked, Subject, find_subject, load_policy, subject_dtype, subject_encoder
from dpo_cli.storage.hashing import sha256_of

DEFAULT_LENGTH = 2048  # tokens, prompt + response, where the judge's run does not say


class Judge(Protocol):
    """Gives answers a reward, in nats: P(a beats b) = sigmoid(r_a - r_b)."""

    @property
    def name(self) -> str:
        """What it is known by."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What the rewards depend on."""
        ...

    @property
    def truncation(self) -> Truncation:
        """What it could not read of all that it has judged: each prompt and response is counted once."""
        ...

    def rewards(self, samples: Sequence[Sample], poll: Callable[[], None]) -> list[list[float]]:
        """A reward for every response of every sample."""
        ...


@dataclass(frozen=True)
class RuleJudge:
    """A named function of the text."""

    name: str

    @property
    def facts(self) -> dict[str, Any]:
        """What the rewards depend on."""
        return {"rule": self.name}

    @property
    def truncation(self) -> Truncation:
        """Nothing: a rule reads the whole text."""
        return Truncation()

    def rewards(self, samples: Sequence[Sample], poll: Callable[[], None]) -> list[list[float]]:
        """A reward for every response of every sample."""
        return [[RULES[self.name](response) for response in sample.responses] for sample in samples]


@dataclass
class ModelJudge:
    """A reward model's r(x, y), or beta log pi(y|x)/pi_ref(y|x) of a DPO policy: Section 5 of arXiv:2305.18290."""

    name: str
    facts: dict[str, Any]
    policy: Any
    is_reward_model: bool
    beta: float
    encoder: PairEncoder
    max_length: int
    device: torch.device
    batching_asked: str
    digest: str
    batching: Batching | None = None
    truncation: Truncation = field(default_factory=Truncation)  # each prompt and response that was judged, once

    def rewards(self, samples: Sequence[Sample], poll: Callable[[], None]) -> list[list[float]]:
        """A reward for every response of every sample; each response is read once."""
        pairs, owners = self._pairs(samples)
        if self.batching is None:
            way = remembered_way(self.batching_asked, self.policy, pairs, self.device, self.digest).value
            self.batching = Batching(
                self.device, way, cut_by_tokens(ENOUGH_TOKENS.get(self.device.type, OTHERWISE), way)
            )
        reference = NoReference() if self.is_reward_model else AdapterOffReference(self.policy)
        ratios = score_pairs(self.policy, reference, pairs, self.batching, poll).ratios
        found = [[0.0] * len(sample.responses) for sample in samples]
        values = zip(ratios.chosen.tolist(), ratios.rejected.tolist(), strict=True)
        for (number, first, second), (chosen, rejected) in zip(owners, values, strict=True):
            found[number][first], found[number][second] = self.beta * chosen, self.beta * rejected
        for one, rewards in zip(samples, found, strict=True):
            # The same answer has the same reward, however it was rounded.
            ends = [one.is_finished(place) or self.encoder.always_closes for place in range(len(one.responses))]
            answers = list(zip(one.responses, ends, strict=True))
            rewards[:] = [rewards[answers.index(answer)] for answer in answers]
        return finite(found, self.name)

    def _pairs(self, samples: Sequence[Sample]) -> tuple[list[TokenizedPair], list[tuple[int, int, int]]]:
        """The responses two by two, an odd last one beside the one before it, and whose they are."""
        owners = [
            (number, first, first + 1 if first + 1 < len(sample.responses) else max(0, first - 1))
            for number, sample in enumerate(samples)
            for first in range(0, len(sample.responses), 2)
        ]
        encoded = self.encoder.encode([_pair(samples[number], first, second) for number, first, second in owners])
        longest = [0] * len(samples)  # tokens
        for (number, _, __), one in zip(owners, encoded, strict=True):
            longest[number] = max(longest[number], len(one.chosen), len(one.rejected))
        pairs = []
        prompts_cut, responses_cut = set(), set()
        for (number, first, second), one in zip(owners, encoded, strict=True):
            # Answers are compared behind one and the same prompt: what the longest of them leaves of it, at least half.
            room = max(self.max_length - longest[number], self.max_length // 2)
            cut = truncate(one, self.max_length, room, Truncation())
            assert cut is not None
            prompts_cut |= {number} if len(cut.prompt) < len(one.prompt) else set()
            responses_cut |= {(number, first)} if len(cut.chosen) < len(one.chosen) else set()
            responses_cut |= {(number, second)} if len(cut.rejected) < len(one.rejected) else set()
            ids = (token_ids(cut.prompt), token_ids(cut.chosen), token_ids(cut.rejected))
            pairs.append(TokenizedPair(*ids, index=number, key=samples[number].id))
        self.truncation.prompts_cut += len(prompts_cut)
        self.truncation.responses_cut += len(responses_cut)
        return pairs, owners


@dataclass
class ClassifierJudge:
    """A reward model of others: one score for a whole conversation, which ends as its own template ends it."""

    name: str
    facts: dict[str, Any]
    model: Any
    tokenizer: Any
    max_length: int
    device: torch.device
    truncation: Truncation = field(default_factory=Truncation)

    def rewards(self, samples: Sequence[Sample], poll: Callable[[], None]) -> list[list[float]]:
        """A reward for every response of every sample; an overlong conversation loses its beginning."""
        sequences = []
        for sample in samples:
            prompt = sample.read
            ids = [
                conversation_ids(self.tokenizer, prompt.messages, prompt.text, response.strip())
                for response in sample.responses
            ]
            self.truncation.prompts_cut += any(len(one) > self.max_length for one in ids)
            sequences += [one[-self.max_length :] for one in ids]
        values = iter(scores(self.model, sequences, self.device, poll))
        return finite([[next(values) for _ in sample.responses] for sample in samples], self.name)


def finite(rewards: list[list[float]], judge: str) -> list[list[float]]:
    """The rewards; CheckpointError where one is no number."""
    if not all(math.isfinite(reward) for some in rewards for reward in some):
        raise CheckpointError(f"judge={safe_text(judge)}: gives rewards that are no numbers; its weights are damaged")
    return rewards


def _pair(sample: Sample, first: int, second: int) -> PreferencePair:
    """Two responses of a sample; which of them is `chosen` says nothing here."""
    prompt = sample.read
    one, other = (as_drawn(sample.prompt, sample.responses[place]) for place in (first, second))
    pair = PreferencePair(prompt.messages, prompt.text, one, other)
    return replace(pair, chosen_finished=sample.is_finished(first), rejected_finished=sample.is_finished(second))


def truncation_in_words(lost: Truncation) -> list[str]:
    """What a judge could not read, one fact a line."""
    if not lost.prompts_cut and not lost.responses_cut:
        return []
    return [f"the judge read {lost.prompts_cut:,} prompts and {lost.responses_cut:,} answers cut short"]


def find_judge(name: str, kind: str | None, trust_remote_code: bool) -> Subject | None:
    """The checkpoint that the judge `name` is, None for a rule; `kind` (reward, implicit, rule) says what it must be.

    CheckpointError or ConfigError where it is something else. Nothing is loaded yet.
    """
    if kind == "rule" or (kind is None and name in RULES):
        if name not in RULES:
            raise ConfigError(f"rule={safe_text(name)}: choose one of {', '.join(RULES)}")
        return None
    if kind is None and "/" not in name and not Path(name).exists():
        raise ConfigError(f"judge={safe_text(name)}: no such directory, and no rule; rules are {', '.join(RULES)}")
    subject = find_subject(Asked(name, None, trust_remote_code, alone=True, key="judge"))
    whole = not subject.is_adapter and is_classifier(find_model(subject.base))
    if kind == "reward" and not subject.is_reward_model and not whole:
        raise ConfigError(
            f"judge={safe_text(name)}: is no reward model; by=implicit takes a DPO run's own reward, and "
            "dpo-train objective=reward trains a reward model"
        )
    if kind == "implicit" and (subject.is_reward_model or whole):
        raise ConfigError(f"judge={safe_text(name)}: is a reward model; by=reward asks it")
    if not subject.is_adapter and not whole:
        raise ConfigError(
            f"judge={safe_text(name)}: a judge is an adapter on the model it was trained from, or a "
            "sequence-classification model with one label"
        )
    return subject


def load_judge(
    name: str, kind: str | None, batching: str, device: str, trust_remote_code: bool, reporter: Reporter
) -> Judge:
    """The judge that `find_judge` finds, ready to be asked.

    CheckpointError where its tokenizer is not the one it was trained with.
    """
    subject = find_judge(name, kind, trust_remote_code)
    if subject is None:
        return RuleJudge(name)
    where = choose_device(device).value
    dtype = subject_dtype(subject, where).value
    source = find_model(subject.base, reporter.say)
    if not subject.is_adapter:
        if batching != "auto":
            raise ConfigError(
                f"batching={batching}: a reward model that is no run of this program has one way to be read"
            )
        return _classifier_judge(subject, source, dtype, where, reporter)
    encoder = subject_encoder(subject)
    _check_tokenizer(subject, encoder)
    base = load_model(source, dtype, where)
    digest = model_digest(base)
    policy = load_policy(subject, base, dtype, where)
    beta = subject.beta
    facts = {
        "judge": subject.weights,
        "kind": "reward" if subject.is_reward_model else "implicit",
        "weights": digest,
        "adapter": sha256_of(Path(subject.weights) / "adapter_model.safetensors"),
        **({"head": sha256_of(Path(subject.weights) / HEAD_FILE)} if subject.is_reward_model else {}),
        "beta": beta,
        "dtype": str(dtype).removeprefix("torch."),
        "device": where.type,
        "batching": batching,
        "template": encoder.kind,
    }
    limit = subject.run.data.max_length if subject.run else min(DEFAULT_LENGTH, position_limit(base) or DEFAULT_LENGTH)
    _say(reporter, subject, facts, limit)
    return ModelJudge(
        subject.weights, facts, policy, subject.is_reward_model, beta, encoder, limit, where, batching, digest
    )


def _classifier_judge(
    subject: Subject, source: ModelSource, dtype: torch.dtype, device: torch.device, reporter: Reporter
) -> ClassifierJudge:
    tokenizer, model = load_tokenizer(source), load_classifier(source, dtype, device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    limit = min(DEFAULT_LENGTH, positions, tokenizer.model_max_length)
    template = "chat" if tokenizer.chat_template else "prompt and answer, paired"
    facts = {
        "judge": subject.weights,
        "kind": "reward",
        "weights": model_digest(model),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "template": template,
    }
    reporter.facts(
        [
            ("judge", f"{safe_text(subject.weights)}: a reward model ({type(model).__name__})"),
            ("", f"{facts['dtype']} on {device.type}, its own template ({template}), reads {plural(limit, 'token')}"),
        ]
    )
    return ClassifierJudge(subject.weights, facts, model, tokenizer, limit, device)


def _check_tokenizer(subject: Subject, encoder: PairEncoder) -> None:
    """CheckpointError where the judge was trained with another tokenizer or template than its base brings now."""
    facts = subject.directory.read_manifest().get("template") if subject.directory else None
    if isinstance(facts, dict) and (facts.get("kind"), facts.get("closing_token")) != (encoder.kind, encoder.closing):
        raise CheckpointError(
            f"judge={safe_text(subject.weights)}: was trained with the template {safe_text(facts.get('kind'))} closed "
            f"by token {safe_text(facts.get('closing_token'))}, and {safe_text(subject.base.name_or_path)} now gives "
            f"{encoder.kind} closed by {encoder.closing}: its rewards would be of other texts"
        )
    beside = Path(subject.weights)
    if not (beside / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        saved = AutoTokenizer.from_pretrained(str(beside), trust_remote_code=subject.base.trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{safe_text(beside)}: its tokenizer cannot be read ({safe_text(error, 120)})") from None
    now = encoder.tokenizer
    if saved.get_vocab() != now.get_vocab() or saved.chat_template != now.chat_template:
        what = "vocabulary" if saved.get_vocab() != now.get_vocab() else "chat template"
        raise CheckpointError(
            f"judge={safe_text(subject.weights)}: was trained with another tokenizer than "
            f"{safe_text(subject.base.name_or_path)} has now (its {what} differs): its rewards would be of other texts"
        )


def _say(reporter: Reporter, subject: Subject, facts: dict[str, Any], limit: int) -> None:
    kind = "reward model" if subject.is_reward_model else f"implicit reward, beta {significant(facts['beta'])}"
    if not subject.is_reward_model and subject.run is None:
        kind += " (the checkpoint does not say)"
    reporter.facts(
        [
            ("judge", f"{safe_text(subject.weights)}: {kind}"),
            (
                "",
                f"{facts['dtype']} on {facts['device']}, template {facts['template']}, reads {plural(limit, 'token')}",
            ),
        ]
    )
