"""The preflight: what must hold before the first update, checked on the run's own model, tokenizer and pairs.

Each check is an identity of the mathematics, and the objective names those that hold for it. A check fails with the
cause and the remedy, or returns a few words; when all hold the run says so in one line. Policy and
random generators are left unchanged.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text
from dpo_cli.data.batches import Layout, longest_side
from dpo_cli.data.pairs import TextPair
from dpo_cli.data.tokens import ALL_SCORED, PairEncoder, TokenizedPair
from dpo_cli.engine.engine import Engine, gathered, local, on_whole
from dpo_cli.errors import CheckpointError
from dpo_cli.models.loading import undisturbed
from dpo_cli.models.logps import TOLERANCES, MicroBatch, causal_model, make_micro_batch, plain_attention
from dpo_cli.models.quantization import QuantizedLinear
from dpo_cli.models.reference import FrozenReference, Reference
from dpo_cli.objectives.objective import Objective
from dpo_cli.theory.losses import ResponseScores
from dpo_cli.training.parts import Learner, Material

PAIRS_IN_A_BATCH = 4


@dataclass(frozen=True)
class PreflightSubject:
    """What is checked."""

    policy: Any
    reference: Reference
    objective: Objective
    encoder: PairEncoder
    pairs: list[TokenizedPair]  # two batches of real pairs
    texts: list[TextPair]  # their texts, in the same order
    device: torch.device
    layout: Layout
    dtype: torch.dtype
    engine: Engine
    at_start: bool  # false for a resumed run, whose policy has moved

    @property
    def first(self) -> list[TokenizedPair]:
        """The first of the two batches."""
        return self.pairs[:PAIRS_IN_A_BATCH]

    @property
    def second(self) -> list[TokenizedPair]:
        """The other; the first where there are too few pairs for two."""
        return self.pairs[PAIRS_IN_A_BATCH : 2 * PAIRS_IN_A_BATCH] or self.first

    def micro_batch(self, pairs: list[TokenizedPair]) -> MicroBatch:
        """The pairs as one micro-batch in the run's layout."""
        return make_micro_batch(pairs, self.device, self.layout)

    def scores(self, pairs: list[TokenizedPair]) -> ResponseScores:
        """The policy's scores, without gradient."""
        micro_batch = self.micro_batch(pairs)
        with torch.no_grad():
            return micro_batch.scores(self.objective.score(self.policy, micro_batch))

    @cached_property
    def start_scores(self) -> ResponseScores:
        """The policy's scores of the first batch, as it is found."""
        return self.scores(self.first)


def preflight(learner: Learner, material: Material, engine: Engine, at_start: bool) -> str:
    """Run every check of the objective; returns the line that says all hold. CheckpointError names cause and remedy.

    Every rank checks the same pairs.
    """
    pairs, texts = choose_pairs(material.data.train, material.data.train_texts)
    subject = PreflightSubject(
        learner.policy, learner.reference, learner.objective, material.encoder, pairs, texts, learner.batcher.device,
        learner.batcher.layout, learner.dtype, engine, at_start,
    )  # fmt: skip
    return run_checks(subject)


def run_checks(subject: PreflightSubject) -> str:
    """Run the checks that the objective names, in their order."""
    started = time.perf_counter()
    with undisturbed(subject.policy):
        said = [CHECKS[name](subject) for name in subject.objective.checks]
    return f"preflight passed in {time.perf_counter() - started:.1f} s: " + "; ".join(filter(None, said))


def choose_pairs(train: Sequence[TokenizedPair], texts: list[TextPair]) -> tuple[list[TokenizedPair], list[TextPair]]:
    """Two batches of real pairs: the shortest of those whose texts are kept, to save time and memory.

    Ties come last: at the start they have no gradient.
    """
    cost = [(pair.probability == 0.5, longest_side(pair)) for pair in train[: len(texts)]]
    indices = sorted(range(len(texts)), key=lambda index: cost[index])[: 2 * PAIRS_IN_A_BATCH]
    return [train[index] for index in indices], [texts[index] for index in indices]


def check_distinct(policy: Any, reference: Reference) -> None:
    """Policy and reference share no memory, and no weight of the reference takes a gradient."""
    if not isinstance(reference, FrozenReference):
        return
    model = reference.model
    ours = {local(weight).data_ptr() for weight in policy.parameters() if local(weight).numel()}
    shared = [name for name, weight in model.named_parameters() if local(weight).data_ptr() in ours]
    if shared:
        raise CheckpointError(
            f"preflight: policy and reference share {len(shared)} weights ({safe_text(shared[0])} first): "
            "training would move both; the reference must be loaded a second time"
        )
    trains = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if trains:
        raise CheckpointError(
            f"preflight: {len(trains)} weights of the reference take a gradient ({safe_text(trains[0])} first): "
            "the reference must be frozen"
        )


def check_reference(subject: PreflightSubject) -> str:
    """As `check_distinct`, for the run's own reference."""
    check_distinct(subject.policy, subject.reference)
    return ""


def check_finite(subject: PreflightSubject) -> str:
    """Every score is a number."""
    values = subject.start_scores.values
    if not bool(torch.isfinite(values).all()):
        remedy = "its weights are damaged" if subject.dtype is torch.float32 else "try model.dtype=float32"
        raise CheckpointError(f"preflight: the model's log-probs are not finite ({values[0]:g} first): {remedy}")
    return ""


def check_not_positive(subject: PreflightSubject) -> str:
    """No log-prob is above 0."""
    largest = float(subject.start_scores.values.max())
    if largest > 1e-3:
        raise CheckpointError(f"preflight: a log-prob of {largest:g} is above 0: the head is not a softmax")
    return ""


def check_start(subject: PreflightSubject) -> str:
    """Before the policy has moved every log-ratio is 0, and the loss what it is there: ln 2 for DPO."""
    if not subject.at_start:
        return ""
    worst, loss = 0.0, 0.0
    for batch in (subject.first, subject.second):
        policy = subject.start_scores if batch is subject.first else subject.scores(batch)
        micro_batch = subject.micro_batch(batch)
        reference = micro_batch.scores(subject.reference.logps(micro_batch))
        gap = float((policy.values - reference.values).abs().max())
        if not gap <= TOLERANCES[subject.dtype].of(int(policy.tokens.max())):
            raise CheckpointError(
                f"preflight: the reference differs from the policy's start by up to {gap:.2f} nats a response: "
                "they are not the same weights; check that model.adapter is folded into both, that both have one "
                "dtype, and that model.revision names one commit"
            )
        outcome, unmoved = subject.objective(policy, reference), subject.objective(policy, policy)
        loss = float(outcome.losses.mean())
        off = abs(loss - float(unmoved.losses.mean()))
        worst = max(worst, off, float(outcome.metrics["rewards/margins"].abs().max()))
    return f"the loss starts at {loss:.4g} and margins at 0 (off by {worst:.1g})"


def check_gradients(subject: PreflightSubject) -> str:
    """With LoRA only adapters train, and at the start a backward pass reaches each of them; returns so in words."""
    weights = {name: weight for name, weight in subject.policy.named_parameters() if weight.requires_grad}
    adapters = {name.split(".lora_")[0] for name in weights if ".lora_" in name}
    base = {id(weight) for name, weight in causal_model(subject.policy).named_parameters() if ".lora_" not in name}
    unwanted = sorted(name for name, weight in weights.items() if adapters and id(weight) in base)
    if unwanted:
        raise CheckpointError(
            f"preflight: {len(unwanted)} weights of the base train beside the adapters ({safe_text(unwanted[0])} "
            "first): the reference would no longer be where the policy began"
        )
    if not subject.at_start:  # a policy that has learned its pairs may have none left: hinge is flat beyond its margin
        return f"{len(adapters)} adapters train" if adapters else f"{len(weights)} weights train"
    micro_batch = subject.micro_batch(subject.first)
    reference = micro_batch.scores(subject.reference.logps(micro_batch))
    with subject.objective.probing(subject.policy):
        policy = micro_batch.scores(subject.objective.score(subject.policy, micro_batch))
        losses = subject.objective(policy, reference).losses
        if losses.requires_grad:
            losses.sum().backward()
    here = [weight.grad is not None and bool(local(weight.grad).any()) for weight in weights.values()]
    anywhere = subject.engine.sum(torch.tensor(here, dtype=torch.float32))
    reached = [name for name, found in zip(weights, anywhere.tolist(), strict=True) if found]
    if not reached:
        raise CheckpointError(
            "preflight: no gradient reaches the trainable weights, so nothing would be learned: is the reference the "
            "policy itself, or loss.name one that is flat at the start?"
        )
    # At the start LoRA's B is 0, so A has no gradient yet: an adapter counts as reached by either of its matrices.
    silent = sorted(adapters - {name.split(".lora_")[0] for name in reached})
    if silent:
        raise CheckpointError(
            f"preflight: no gradient reaches {len(silent)} of {len(adapters)} adapters ({safe_text(silent[0])} first): "
            "they take no part in the forward pass; leave them out of lora.target_modules"
        )
    whole = f"all {len(adapters)} adapters" if adapters else f"{len(reached)} of {len(weights)} weights"
    return f"gradient reaches {whole} and nothing else"


def check_transposes(subject: PreflightSubject) -> str:
    """<W x, y> = <x, W' y> with y = W x, for each quantised layer: its backward pass uses the matrix of its forward.

    With the adapter on it, if it has one. W x is computed as an evaluation computes it, without gradient.
    """
    tolerance = 1e-4 if subject.dtype is torch.float32 else 0.05
    parts = dict(subject.policy.named_modules())
    with_adapters: dict[int, str] = {
        id(part.base_layer): name for name, part in parts.items() if hasattr(part, "base_layer")
    }
    packed = ((name, part) for name, part in parts.items() if isinstance(part, QuantizedLinear))
    layers = {with_adapters.get(id(part)) or name: part for name, part in packed}
    for name, base in layers.items():
        layer = parts[name]
        x = torch.randn(4, base.in_features, dtype=subject.dtype, device=subject.device)
        with gathered(subject.policy, name):
            with torch.no_grad():
                y = layer(x) - layer(torch.zeros_like(x))  # a bias is no part of W
            again = layer(x.requires_grad_())
            gradient = torch.autograd.grad(again, x, y)[0] if again.requires_grad else torch.zeros_like(x)
        there, back = float((y.double() ** 2).sum()), float((gradient.double() * x.detach().double()).sum())
        if not abs(there - back) <= tolerance * there:
            raise CheckpointError(
                f"preflight: the gradient of the quantised layer {safe_text(name)} is not that of its forward pass "
                f"({back:.4g} where {there:.4g} is right): its packed weights were changed, or are unpacked wrongly; "
                "model.quantization=none trains without them"
            )
    return f"{len(layers)} quantised layers have the right gradient" if layers else ""


def _sequence_logp(model: Any, ids: Tensor, start: int) -> Tensor:
    """log p(ids[start:] | ids[:start]) by the definition: full logits of one sequence, shifted by one."""
    return on_whole(model, _from_full_logits, ids, start)


def _from_full_logits(model: Any, ids: Tensor, start: int) -> Tensor:
    with plain_attention(model):
        logits = causal_model(model)(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    each = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return each[start - 1 :].sum()


def check_chain_rule(subject: PreflightSubject) -> str:
    """log p(y | x) = log p(x y) - log p(x), on the shortest pair, from the full logits of one sequence."""
    pair = min(subject.first, key=lambda one: len(one.prompt) + len(one.chosen))
    pair = replace(pair, chosen_unscored=ALL_SCORED, rejected_unscored=ALL_SCORED)
    prompt = torch.from_numpy(pair.prompt).long().to(subject.device)
    whole = torch.cat([prompt, torch.from_numpy(pair.chosen).long().to(subject.device)])
    with torch.no_grad():
        difference = _sequence_logp(subject.policy, whole, 1)
        if len(prompt) > 1:
            difference = difference - _sequence_logp(subject.policy, prompt, 1)
    off = abs(float(difference) - float(subject.scores([pair]).pairs().chosen[0]))
    if not off <= TOLERANCES[subject.dtype].of(len(whole)):
        raise CheckpointError(
            f"preflight: log p(response | prompt) is off the chain rule by {off:.2f} nats on row {pair.index}: "
            "the model scores other tokens than it is given, or its forward pass depends on what follows"
        )
    return f"the chain rule holds to {off:.1g} nats"


def check_batch_invariance(subject: PreflightSubject) -> str:
    """A pair scored alone has the numbers it has in a batch."""
    worst = 0.0
    with subject.objective.probing(subject.policy):
        together = subject.scores(subject.first)
        for number in {0, len(subject.first) - 1}:
            pair = subject.first[number]
            off = float((subject.scores([pair]).values - together.values[together.units[number]]).abs().max())
            if not off <= TOLERANCES[subject.dtype].of(max(map(len, pair.responses))):
                raise CheckpointError(
                    f"preflight: row {pair.index} scores {off:.2f} nats differently in a batch than alone: "
                    "this model sees its padding or its neighbours; micro_batch_size=1 with layout=padded avoids it"
                )
            worst = max(worst, off)
    return f"a pair alone equals the pair in a batch to {worst:.1g}"


def check_closing(subject: PreflightSubject) -> str:
    """Another token in the place of the closing EOS changes the score, all else being equal: so it is scored.

    That it is scored once, and as the last token, is what the chain rule says.
    """
    closing = subject.encoder.closing
    closed = next((one for one in subject.first if int(one.chosen[-1]) == closing), None)
    if closed is None:  # every one of them was cut, and the header has said so
        return "no response here is closed"
    other = closed.chosen.copy()
    other[-1] = next(token for token in range(2) if token != closing)
    with subject.objective.probing(subject.policy):
        logps = subject.scores([closed, replace(closed, chosen=other)]).pairs().chosen
    if float(logps[0]) == float(logps[1]):
        raise CheckpointError(
            f"preflight: the closing EOS of row {closed.index} is not scored: another token there changes nothing"
        )
    return "EOS is scored"


def check_round_trip(subject: PreflightSubject) -> str:
    """The tokens of a response read back as its text, white space aside."""
    decode = subject.encoder.tokenizer.decode
    closing = decode([subject.encoder.closing])
    for pair, text in zip(subject.pairs, subject.texts, strict=True):
        rendered = subject.encoder.render(text.pair)
        for ids, original in ((pair.chosen, rendered.chosen), (pair.rejected, rendered.rejected)):
            if int(ids[-1]) != subject.encoder.closing:
                continue  # cut
            read = "".join(decode(ids[:-1].tolist()).split())
            # A closing token that the text brings along is taken once.
            expected = subject.encoder.readable(original).removesuffix(closing)
            if read != "".join(expected.split()):
                raise CheckpointError(
                    f"preflight: row {pair.index} does not read back from its tokens ({safe_text(read, 60)}): "
                    "the tokenizer loses text, or is not the model's"
                )
    return "tokens read back as the text"


# Named by an objective's `checks`.
CHECKS: dict[str, Callable[[PreflightSubject], str]] = {
    "distinct": check_reference,
    "finite": check_finite,
    "not_positive": check_not_positive,
    "start": check_start,
    "gradients": check_gradients,
    "transposes": check_transposes,
    "chain_rule": check_chain_rule,
    "batch_invariance": check_batch_invariance,
    "closing": check_closing,
    "round_trip": check_round_trip,
}
