"""The preflight: what must hold before the first update, proved on the run's own model, tokenizer and pairs.

Each check is an identity of the mathematics. It fails with the cause and the remedy, or it says nothing; when all
hold the run says so in one line. Policy and generators are left as they were found.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text
from dpo_cli.data.batches import Way, longest_side
from dpo_cli.data.pairs import TextPair
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.errors import CheckpointError
from dpo_cli.models.loading import undisturbed
from dpo_cli.models.logps import (
    TOLERANCES,
    Batch,
    causal_model,
    make_batch,
    plain_attention,
)
from dpo_cli.models.reference import FrozenReference, Reference
from dpo_cli.objectives.reward_model import HEAD_NAME, head_of, pair_scores, probing
from dpo_cli.theory.losses import LogRatios, Objective, PairLogps

PAIRS_A_BATCH = 4


@dataclass(frozen=True)
class PreflightSubject:
    """What is checked."""

    policy: Any
    reference: Reference
    objective: Objective
    beta: float
    encoder: PairEncoder
    pairs: list[TokenizedPair]  # two batches of real pairs
    texts: list[TextPair]  # their texts, in the same order
    device: torch.device
    way: Way
    dtype: torch.dtype
    at_start: bool  # false for a resumed run, whose policy has moved

    @property
    def is_reward_model(self) -> bool:
        """Whether rewards stand where log-probs do: some identities are of probabilities alone."""
        return head_of(self.policy) is not None


def preflight(subject: PreflightSubject) -> str:
    """Run every check; the line that says all hold. CheckpointError names the cause and the remedy."""
    started = time.perf_counter()
    first, second = subject.pairs[:PAIRS_A_BATCH], subject.pairs[PAIRS_A_BATCH : 2 * PAIRS_A_BATCH]
    with undisturbed(subject.policy):
        check_distinct(subject.policy, subject.reference)
        together = _logps(subject, first)
        check_finite(together, subject.dtype, may_be_positive=subject.is_reward_model)
        said = []
        if subject.at_start:
            loss, off = check_start(subject, [first, second or first], together)
            said.append(f"the loss starts at {loss:.4g} and margins at 0 (off by {off:.1g})")
        with probing(subject.policy):
            together = _logps(subject, first) if subject.is_reward_model else together
            said.append(check_gradients(subject, first))
            if not subject.is_reward_model:
                said.append(f"the chain rule holds to {check_chain_rule(subject, first):.1g} nats")
            said.append(f"a pair alone equals the pair in a batch to {check_company(subject, first, together):.1g}")
            closed = check_closing(subject, first)
        check_round_trip(subject)
        said.append(f"{'EOS is scored' if closed else 'no response here is closed'}, tokens read back as the text")
    return f"preflight passed in {time.perf_counter() - started:.1f} s: " + "; ".join(said)


def choose_pairs(train: list[TokenizedPair], texts: list[TextPair]) -> tuple[list[TokenizedPair], list[TextPair]]:
    """Two batches of real pairs: the shortest of those whose texts are kept, so that seconds and little memory do."""

    places = sorted(range(len(texts)), key=lambda place: longest_side(train[place]))[: 2 * PAIRS_A_BATCH]
    return [train[place] for place in places], [texts[place] for place in places]


def _batch(subject: PreflightSubject, pairs: list[TokenizedPair]) -> Batch:
    return make_batch(pairs, subject.device, subject.way)


def _logps(subject: PreflightSubject, pairs: list[TokenizedPair]) -> PairLogps:
    with torch.no_grad():
        return pair_scores(subject.policy, _batch(subject, pairs))


def _both(logps: PairLogps) -> Tensor:
    """(2, B)."""
    return torch.stack([logps.chosen, logps.rejected])


def check_distinct(policy: Any, reference: Reference) -> None:
    """Policy and reference share no memory, and no weight of the reference takes a gradient."""
    if not isinstance(reference, FrozenReference):
        return
    model = reference.model
    ours = {weight.data_ptr() for weight in policy.parameters()}
    shared = [name for name, weight in model.named_parameters() if weight.data_ptr() in ours]
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


def check_finite(logps: PairLogps, dtype: torch.dtype, may_be_positive: bool = False) -> None:
    """Every log-prob is a number, and none is above 0; a reward may be."""
    values = _both(logps)
    if not bool(torch.isfinite(values).all()):
        remedy = "its weights are damaged" if dtype is torch.float32 else "try model.dtype=float32"
        raise CheckpointError(
            f"preflight: the model's log-probs are not finite ({values.flatten()[0]:g} first): {remedy}"
        )
    if not may_be_positive and bool((values > 1e-3).any()):
        raise CheckpointError(f"preflight: a log-prob of {float(values.max()):g} is above 0: the head is not a softmax")


def check_start(
    subject: PreflightSubject, batches: list[list[TokenizedPair]], together: PairLogps
) -> tuple[float, float]:
    """Before the policy has moved every log-ratio is 0, and the loss what it is there: ln 2 for DPO.

    Returns the loss, and by how much it or a margin is off at most.
    """
    worst, loss = 0.0, 0.0
    for batch in batches:
        policy = together if batch is batches[0] else _logps(subject, batch)
        reference = subject.reference.logps(_batch(subject, batch))
        gap = float((_both(policy) - _both(reference)).abs().max())
        tokens = int(torch.stack([policy.chosen_tokens, policy.rejected_tokens]).max())
        if not gap <= TOLERANCES[subject.dtype].of(tokens):
            raise CheckpointError(
                f"preflight: the reference differs from the policy's start by up to {gap:.2f} nats a response: "
                "they are not the same weights; check that model.adapter is folded into both, that both have one "
                "dtype, and that model.revision names one commit"
            )
        ratios = LogRatios.between(policy, reference)
        still = LogRatios.between(policy, policy)
        loss = float(subject.objective(policy, ratios).mean())
        off = abs(loss - float(subject.objective(policy, still).mean()))
        worst = max(worst, off, float((subject.beta * ratios.margin).abs().max()))
    return loss, worst


def check_gradients(subject: PreflightSubject, pairs: list[TokenizedPair]) -> str:
    """With LoRA only adapters train, and at the start a backward pass reaches each of them; returns so in words."""
    weights = {name: weight for name, weight in subject.policy.named_parameters() if weight.requires_grad}
    adapters = {name.split(".lora_")[0] for name in weights if ".lora_" in name}
    strangers = sorted(name for name in weights if adapters and ".lora_" not in name and HEAD_NAME not in name)
    if strangers:
        raise CheckpointError(
            f"preflight: {len(strangers)} weights of the base train beside the adapters ({safe_text(strangers[0])} "
            "first): the reference would no longer be where the policy began"
        )
    if not subject.at_start:  # a policy that has learned its pairs may have none left: hinge is flat beyond its margin
        return f"{len(adapters)} adapters train" if adapters else f"{len(weights)} weights train"
    layout = _batch(subject, pairs)
    reference = subject.reference.logps(layout)
    policy = pair_scores(subject.policy, layout)
    losses = subject.objective(policy, LogRatios.between(policy, reference))
    if losses.requires_grad:
        losses.sum().backward()
    reached = [name for name, weight in weights.items() if weight.grad is not None and bool(weight.grad.any())]
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


def _sequence_logp(model: Any, ids: Tensor, start: int) -> Tensor:
    """log p(ids[start:] | ids[:start]) by the definition: full logits of one sequence, shifted by one."""
    with plain_attention(model):
        logits = causal_model(model)(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    each = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return each[start - 1 :].sum()


def check_chain_rule(subject: PreflightSubject, pairs: list[TokenizedPair]) -> float:
    """log p(y | x) = log p(x y) - log p(x), on the shortest pair, by another route; returns the difference."""
    pair = min(pairs, key=lambda one: len(one.prompt) + len(one.chosen))
    prompt = torch.from_numpy(pair.prompt).long().to(subject.device)
    whole = torch.cat([prompt, torch.from_numpy(pair.chosen).long().to(subject.device)])
    with torch.no_grad():
        difference = _sequence_logp(subject.policy, whole, 1)
        if len(prompt) > 1:
            difference = difference - _sequence_logp(subject.policy, prompt, 1)
    off = abs(float(difference) - float(_logps(subject, [pair]).chosen[0]))
    if not off <= TOLERANCES[subject.dtype].of(len(whole)):
        raise CheckpointError(
            f"preflight: log p(response | prompt) is off the chain rule by {off:.2f} nats on row {pair.index}: "
            "the model scores other tokens than it is given, or its forward pass depends on what follows"
        )
    return off


def check_company(subject: PreflightSubject, pairs: list[TokenizedPair], together: PairLogps) -> float:
    """A pair scored alone has the numbers it has in a batch; returns the largest difference."""
    worst = 0.0
    for place in {0, len(pairs) - 1}:
        alone, company = _both(_logps(subject, [pairs[place]]))[:, 0], _both(together)[:, place]
        off = float((alone - company).abs().max())
        tokens = max(len(pairs[place].chosen), len(pairs[place].rejected))
        if not off <= TOLERANCES[subject.dtype].of(tokens):
            raise CheckpointError(
                f"preflight: row {pairs[place].index} scores {off:.2f} nats differently in a batch than alone: "
                "this model sees its padding or its neighbours; micro_batch_size=1 with layout=padded avoids it"
            )
        worst = max(worst, off)
    return worst


def check_closing(subject: PreflightSubject, pairs: list[TokenizedPair]) -> bool:
    """Another token in the place of the closing EOS changes the log-prob, all else being equal: so it is scored.

    False where there is none to be scored.

    That it is scored once, and as the last token, is what the chain rule says.
    """
    closing = subject.encoder.closing
    closed = next((one for one in pairs if int(one.chosen[-1]) == closing), None)
    if closed is None:
        return False  # every one of them was cut, and the header has said so
    other = closed.chosen.copy()
    other[-1] = next(token for token in range(2) if token != closing)
    logps = _logps(subject, [closed, replace(closed, chosen=other)]).chosen
    if float(logps[0]) == float(logps[1]):
        raise CheckpointError(
            f"preflight: the closing EOS of row {closed.index} is not scored: another token there changes nothing"
        )
    return True


def check_round_trip(subject: PreflightSubject) -> None:
    """The tokens of a response read back as its text, white space aside."""
    decode = subject.encoder.tokenizer.decode
    closing = decode([subject.encoder.closing])
    for pair, text in zip(subject.pairs, subject.texts, strict=True):
        for ids, original in ((pair.chosen, text.pair.chosen), (pair.rejected, text.pair.rejected)):
            if int(ids[-1]) != subject.encoder.closing:
                continue  # cut
            read = "".join(decode(ids[:-1].tolist()).split())
            # A closing token that the text brings along is taken once.
            expected = subject.encoder.response_text(original).removesuffix(closing)
            if read != "".join(expected.split()):
                raise CheckpointError(
                    f"preflight: row {pair.index} does not read back from its tokens ({safe_text(read, 60)}): "
                    "the tokenizer loses text, or is not the model's"
                )
