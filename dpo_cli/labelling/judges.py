"""Judges that give rewards to responses: a reward model, a DPO policy's implicit reward, a rule.

Models are run by the forward pass of training: the responses to a prompt share it in one packed row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.batches import SplitByTokens
from dpo_cli.data.chat_template import RefusedRowError
from dpo_cli.data.formats import FinishReason, PreferencePair
from dpo_cli.data.groups import prompt_group
from dpo_cli.data.samples import Sample, as_continuation
from dpo_cli.data.tokens import PairEncoder, RenderedPair, TokenizedPair, token_ids
from dpo_cli.data.truncation import Truncation, truncate
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.errors import CheckpointError, ConfigError, DataError
from dpo_cli.evaluation.scores import Scorer, score_pairs
from dpo_cli.labelling.classifier import conversation_ids, is_classifier, load_classifier, scores
from dpo_cli.labelling.rules import RULES
from dpo_cli.models.dtype import choose_device
from dpo_cli.models.loading import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    model_fingerprint,
    position_limit,
)
from dpo_cli.models.logps import MicroBatcher
from dpo_cli.models.memory import enough_tokens
from dpo_cli.models.packing import remembered_layout
from dpo_cli.models.reference import AdapterOffReference, NoReference
from dpo_cli.objectives.objective import Objective
from dpo_cli.runs.model_ref import (
    ModelName,
    ModelRef,
    find_model_ref,
    load_policy,
    ref_dtype,
    ref_encoder,
)
from dpo_cli.storage.hashing import sha256_of

DEFAULT_LENGTH = 2048  # tokens, prompt + response, where no run of the judge is known


class Judge(Protocol):
    """Gives responses a reward, in nats: P(a beats b) = sigmoid(r_a - r_b)."""

    @property
    def name(self) -> str:
        """Its name in messages and labels."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What the rewards depend on."""
        ...

    @property
    def truncation(self) -> Truncation:
        """How many prompts and responses were truncated so far, each counted once."""
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
        """None: a rule reads the whole text."""
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
    objective: Objective
    encoder: PairEncoder
    max_length: int
    device: torch.device
    layout_requested: str
    fingerprint: str
    batcher: MicroBatcher | None = None
    truncation: Truncation = field(default_factory=Truncation)  # each prompt and response is counted once
    engine: Engine = SINGLE

    def rewards(self, samples: Sequence[Sample], poll: Callable[[], None]) -> list[list[float]]:
        """A reward for every response of every sample; each response is computed once."""
        pairs, owners = self._pairs(samples)
        if self.batcher is None:
            requested, who = self.layout_requested, (self.device, self.fingerprint)
            layout = remembered_layout(requested, self.policy, pairs, *who, engine=self.engine).value
            split = SplitByTokens(enough_tokens(self.device), layout)
            self.batcher = MicroBatcher(self.device, layout, split)
        reference = AdapterOffReference(self.policy) if self.objective.needs_reference else NoReference()
        scorer = Scorer(self.policy, self.objective, reference, self.batcher, self.engine)
        ratios = score_pairs(scorer, pairs, poll).ratios
        found = [[0.0] * len(sample.responses) for sample in samples]
        values = zip(ratios.chosen.tolist(), ratios.rejected.tolist(), strict=True)
        for (number, first, second), (chosen, rejected) in zip(owners, values, strict=True):
            found[number][first], found[number][second] = self.objective.beta * chosen, self.objective.beta * rejected
        for one, rewards in zip(samples, found, strict=True):
            # Equal responses have equal rewards, also where rounding differs.
            numbers = range(len(one.responses))
            closed = [self.encoder.always_closes or one.finish_reason(i) is FinishReason.STOP for i in numbers]
            responses = list(zip(one.responses, closed, strict=True))
            rewards[:] = [rewards[responses.index(response)] for response in responses]
        return finite(found, self.name)

    def _rendered(self, sample: Sample, first: int, second: int) -> RenderedPair:
        try:
            return self.encoder.render(_pair(sample, first, second))
        except RefusedRowError as error:
            raise DataError(f"sample {safe_text(sample.id)}: {error}; remove it from the samples") from None

    def _pairs(self, samples: Sequence[Sample]) -> tuple[list[TokenizedPair], list[tuple[int, int, int]]]:
        """The responses in pairs, an odd last one with the one before it, and their (sample, first, second) indices."""
        owners = [
            (number, first, first + 1 if first + 1 < len(sample.responses) else max(0, first - 1))
            for number, sample in enumerate(samples)
            for first in range(0, len(sample.responses), 2)
        ]
        rendered = [self._rendered(samples[number], first, second) for number, first, second in owners]
        encoded = self.encoder.encode_rendered(rendered)
        longest = [0] * len(samples)  # tokens
        for (number, _, __), one in zip(owners, encoded, strict=True):
            longest[number] = max(longest[number], len(one.chosen), len(one.rejected))
        pairs = []
        prompts_cut, responses_cut = set(), set()
        for (number, first, second), one in zip(owners, encoded, strict=True):
            # All responses of a sample follow the same part of the prompt: what the longest leaves, at least half.
            room = max(self.max_length - longest[number], self.max_length // 2)
            cut = truncate(one, self.max_length, room, Truncation())
            assert cut is not None
            prompts_cut |= {number} if len(cut.prompt) < len(one.prompt) else set()
            responses_cut |= {(number, first)} if len(cut.chosen) < len(one.chosen) else set()
            responses_cut |= {(number, second)} if len(cut.rejected) < len(one.rejected) else set()
            ids = (token_ids(cut.prompt), token_ids(cut.chosen), token_ids(cut.rejected))
            sample = samples[number]
            pairs.append(TokenizedPair(*ids, index=number, key=sample.id, group=prompt_group(sample.read)))
        self.truncation.prompts_cut += len(prompts_cut)
        self.truncation.responses_cut += len(responses_cut)
        return pairs, owners


@dataclass
class ClassifierJudge:
    """A reward model from the hub: one score for a whole conversation in its own template."""

    name: str
    facts: dict[str, Any]
    model: Any
    tokenizer: Any
    max_length: int
    device: torch.device
    truncation: Truncation = field(default_factory=Truncation)
    engine: Engine = SINGLE

    def rewards(self, samples: Sequence[Sample], poll: Callable[[], None]) -> list[list[float]]:
        """A reward for every response of every sample; a conversation that is too long loses its beginning."""
        sequences = []
        for sample in samples:
            prompt = sample.read
            ids = [
                conversation_ids(self.tokenizer, prompt.messages, prompt.text, response.strip())
                for response in sample.responses
            ]
            self.truncation.prompts_cut += any(len(one) > self.max_length for one in ids)
            sequences += [one[-self.max_length :] for one in ids]
        values = iter(scores(self.model, sequences, self.device, poll, self.engine))
        return finite([[next(values) for _ in sample.responses] for sample in samples], self.name)


def finite(rewards: list[list[float]], judge: str) -> list[list[float]]:
    """The rewards; CheckpointError where one is not finite."""
    if not all(math.isfinite(reward) for some in rewards for reward in some):
        raise CheckpointError(f"judge={safe_text(judge)}: gives rewards that are not finite; its weights are damaged")
    return rewards


def _pair(sample: Sample, first: int, second: int) -> PreferencePair:
    """Two responses of a sample as a pair; which is `chosen` means nothing here."""
    prompt = sample.read
    one, other = (as_continuation(sample.prompt, sample.responses[index]) for index in (first, second))
    pair = PreferencePair(prompt.messages, prompt.text, one, other)
    return replace(
        pair, chosen_finish_reason=sample.finish_reason(first), rejected_finish_reason=sample.finish_reason(second)
    )


def describe_truncation(lost: Truncation) -> list[str]:
    """How many prompts and responses a judge truncated, as lines."""
    if not lost.prompts_cut and not lost.responses_cut:
        return []
    return [f"the judge truncated {plural(lost.prompts_cut, 'prompt')} and {plural(lost.responses_cut, 'response')}"]


def find_judge(name: str, kind: str | None, trust_remote_code: bool) -> ModelRef | None:
    """The checkpoint of the judge `name`, None for a rule; `kind` is reward, implicit, rule or None for any of them.

    CheckpointError or ConfigError where `name` is not of that kind. No weights are loaded.
    """
    if kind == "rule" or (kind is None and name in RULES):
        if name not in RULES:
            raise ConfigError(f"rule={safe_text(name)}: choose one of {', '.join(RULES)}")
        return None
    if kind is None and "/" not in name and not Path(name).exists():
        raise ConfigError(f"judge={safe_text(name)}: no such directory or rule; rules are {', '.join(RULES)}")
    ref = find_model_ref(ModelName(name, None, trust_remote_code, alone=True, key="judge"))
    whole = not ref.is_adapter and is_classifier(find_model(ref.base))
    if kind == "reward" and ref.objective.generates and not whole:
        raise ConfigError(
            f"judge={safe_text(name)}: is not a reward model; set by=implicit for a DPO run's implicit reward, "
            "or train a reward model with dpo-train objective=reward"
        )
    if kind == "implicit" and (not ref.objective.generates or whole):
        raise ConfigError(f"judge={safe_text(name)}: is a reward model; set by=reward")
    if not ref.is_adapter and not whole:
        raise ConfigError(
            f"judge={safe_text(name)}: is a model without an adapter; name a run's adapter, or a "
            "sequence-classification model with one label"
        )
    return ref


def load_judge(
    name: str,
    kind: str | None,
    layout: str,
    device: str,
    trust_remote_code: bool,
    reporter: Reporter,
    engine: Engine = SINGLE,
) -> Judge:
    """Load the judge that `find_judge` finds; CheckpointError where its tokenizer is not the one of its training.

    Every rank asks it for the rewards of the same samples, and gets all of them. Collective, as its `rewards` is.
    """
    ref = find_judge(name, kind, trust_remote_code)
    if ref is None:
        return RuleJudge(name)
    reporter.doing(f"loading the judge {safe_text(ref.weights)}")
    where = choose_device(device).value
    dtype = engine.same(lambda: ref_dtype(ref, where)).value
    source = find_model(ref.base, reporter.say)
    if not ref.is_adapter:
        if layout != "auto":
            raise ConfigError(f"layout={layout}: is not supported for a reward model from the hub; leave it out")
        return replace(_classifier_judge(ref, source, dtype, where, reporter), engine=engine)
    encoder = ref_encoder(ref)
    _check_tokenizer(ref, encoder)
    base = load_model(source, dtype, where)
    fingerprint = model_fingerprint(base)
    policy = load_policy(ref, base, dtype, where)
    objective = ref.objective
    facts = {
        "judge": ref.weights,
        "kind": objective.judges_by,
        "weights": fingerprint,
        "adapter": sha256_of(Path(ref.weights) / "adapter_model.safetensors"),
        **{file: sha256_of(Path(ref.weights) / file) for file in objective.files},
        "beta": objective.beta,
        "dtype": str(dtype).removeprefix("torch."),
        "device": where.type,
        "layout": layout,
        "template": encoder.kind,
    }
    limit = ref.run.data.max_length if ref.run else min(DEFAULT_LENGTH, position_limit(base) or DEFAULT_LENGTH)
    _say(reporter, ref, facts, limit)
    return ModelJudge(ref.weights, facts, policy, objective, encoder, limit, where, layout, fingerprint, engine=engine)


def _classifier_judge(
    ref: ModelRef, source: ModelSource, dtype: torch.dtype, device: torch.device, reporter: Reporter
) -> ClassifierJudge:
    tokenizer, model = load_tokenizer(source), load_classifier(source, dtype, device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    limit = min(DEFAULT_LENGTH, positions, tokenizer.model_max_length)
    template = "chat" if tokenizer.chat_template else "prompt and response as a text pair"
    facts = {
        "judge": ref.weights,
        "kind": "reward",
        "weights": model_fingerprint(model),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "template": template,
    }
    reporter.facts(
        [
            ("judge", f"{safe_text(ref.weights)}: a reward model ({type(model).__name__})"),
            ("", f"{facts['dtype']} on {device.type}, its own template ({template}), reads {plural(limit, 'token')}"),
        ]
    )
    return ClassifierJudge(ref.weights, facts, model, tokenizer, limit, device)


def _check_tokenizer(ref: ModelRef, encoder: PairEncoder) -> None:
    """CheckpointError where the judge was trained with another tokenizer or template than its base model has now."""
    facts = ref.directory.read_manifest().get("template") if ref.directory else None
    if isinstance(facts, dict) and (facts.get("kind"), facts.get("closing_token")) != (encoder.kind, encoder.closing):
        raise CheckpointError(
            f"judge={safe_text(ref.weights)}: was trained with template {safe_text(facts.get('kind'))} and closing "
            f"token {safe_text(facts.get('closing_token'))}, but {safe_text(ref.base.name_or_path)} now has "
            f"{encoder.kind} and {encoder.closing}; restore the base model of its training"
        )
    beside = Path(ref.weights)
    if not (beside / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        saved = AutoTokenizer.from_pretrained(str(beside), trust_remote_code=ref.base.trust_remote_code)
    except Exception as error:
        raise CheckpointError(
            f"{safe_text(beside)}: its tokenizer cannot be loaded ({safe_text(error, 120)})"
        ) from None
    now = encoder.tokenizer
    if saved.get_vocab() != now.get_vocab() or saved.chat_template != now.chat_template:
        what = "vocabulary" if saved.get_vocab() != now.get_vocab() else "chat template"
        raise CheckpointError(
            f"judge={safe_text(ref.weights)}: was trained with another tokenizer than "
            f"{safe_text(ref.base.name_or_path)} has now (its {what} differs); restore that base model"
        )


def _say(reporter: Reporter, ref: ModelRef, facts: dict[str, Any], limit: int) -> None:
    kind = "reward model" if not ref.objective.generates else f"implicit reward, beta {significant(facts['beta'])}"
    if ref.objective.generates and ref.run is None:
        kind += " (the default: the checkpoint has no config)"
    reporter.facts(
        [
            ("judge", f"{safe_text(ref.weights)}: {kind}"),
            (
                "",
                f"{facts['dtype']} on {facts['device']}, template {facts['template']}, reads {plural(limit, 'token')}",
            ),
        ]
    )
