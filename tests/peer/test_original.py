"""Against the original code of the DPO paper, written down here as formulas.

`_get_batch_logps` and `preference_loss` of trainers.py in https://github.com/eric-mitchell/direct-preference-optimization
say what a DPO implementation computes. Below are their definitions in fp64, from whole logits and -100 masks: none of
our layout, chunking or formulas.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from dialogues import made_pairs
from torch import Tensor

from dpo_cli.config.schema import LoraConfig
from dpo_cli.data.batches import Layout
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.data.truncation import Encoded
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.logps import make_micro_batch, pair_logps, plain_attention
from dpo_cli.models.reference import AdapterOffReference
from dpo_cli.theory.losses import LOSSES, LogRatios, implicit_rewards

BETA = 0.1
IGNORED = -100


# The original, in formulas


def original_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """sum over t of log softmax(logits_t)[label_{t+1}], over the labels that are not -100."""
    sums = []
    for row, scores in zip(labels, logits.double(), strict=True):
        places = (row[1:] != IGNORED).nonzero()[:, 0] + 1
        sums.append((scores[places - 1, row[places]] - scores[places - 1].logsumexp(1)).sum())
    return torch.stack(sums)


@dataclass(frozen=True)
class Original:
    """What `preference_loss` returns, each (B,)."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def original_loss(
    policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], label_smoothing: float = 0.0, ipo: bool = False
) -> Original:
    """Eq. 7 of https://arxiv.org/abs/2305.18290, Eq. 3 of the cDPO note, Eq. 17 of https://arxiv.org/abs/2310.12036."""
    h = (policy[0] - policy[1]) - (reference[0] - reference[1])
    if ipo:
        losses = (h - 1 / (2 * BETA)) ** 2
    else:
        agree, differ = torch.log(1 / (1 + torch.exp(-BETA * h))), torch.log(1 / (1 + torch.exp(BETA * h)))
        losses = -(1 - label_smoothing) * agree - label_smoothing * differ
    return Original(losses, *(BETA * (pi - ref) for pi, ref in zip(policy, reference, strict=True)))


def original_forward(model: Any, pairs: list[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """`concatenated_forward`: chosen rows, then rejected ones, in one batch padded on the right with zeros."""
    sides = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(response) for prompt, response in sides)
    ids = torch.zeros(len(sides), width, dtype=torch.long)
    mask = torch.zeros(len(sides), width, dtype=torch.long)
    labels = torch.full((len(sides), width), IGNORED)
    for row, (prompt, response) in enumerate(sides):
        whole = torch.tensor([*prompt.tolist(), *response.tolist()])
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    with plain_attention(model):
        logits = model(input_ids=ids, attention_mask=mask).logits
    logps = original_logps(logits, labels)
    return logps[: len(pairs)], logps[len(pairs) :]


# Ours


def tokenized(encoded: list[Encoded]) -> list[TokenizedPair]:
    return [
        TokenizedPair(token_ids(one.prompt), token_ids(one.chosen), token_ids(one.rejected), row, str(row), row)
        for row, one in enumerate(encoded)
    ]


def random_pairs(vocabulary: int) -> list[TokenizedPair]:
    random = np.random.default_rng(0)
    lengths = [(5, 3, 7), (1, 1, 1), (9, 2, 1), (3, 30, 8), (20, 12, 40), (2, 1, 25)]
    return tokenized([Encoded(*(random.integers(0, vocabulary, size).tolist() for size in row)) for row in lengths])


@pytest.fixture(scope="module")
def policy(tiny_path: str) -> Any:
    """A random Llama under a LoRA adapter that has moved away from zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32).eval()
    lora = LoraConfig(enabled=True, r=4, alpha=8.0, dropout=0.0, target_modules="all-linear")
    torch.manual_seed(0)
    policy = attach_lora(model, lora)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=1.0)
    return policy


@pytest.fixture(scope="module", params=["random ids", "dialogues"])
def pairs(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> list[TokenizedPair]:
    if request.param == "random ids":
        return random_pairs(len(tiny_tokenizer))
    return tokenized(PairEncoder(tiny_tokenizer, "plain").encode(made_pairs(8)))


@dataclass(frozen=True)
class Numbers:
    """Log-probs of policy and reference on both sides."""

    ours: LogRatios
    our_logps: Tensor  # (4, B): policy chosen and rejected, reference chosen and rejected
    policy: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def numbers(policy: Any, pairs: list[TokenizedPair]) -> Numbers:
    batch = make_micro_batch(pairs, torch.device("cpu"), Layout.PACKED_SEGMENTS)
    with torch.no_grad():
        mine = pair_logps(policy, batch)
        reference = batch.scores(AdapterOffReference(policy).logps(batch)).pairs()
        theirs = original_forward(policy, pairs)
        with policy.disable_adapter():
            theirs_reference = original_forward(policy, pairs)
    stacked = torch.stack([mine.chosen, mine.rejected, reference.chosen, reference.rejected])
    return Numbers(LogRatios.between(mine, reference), stacked, theirs, theirs_reference)


def close(ours: Tensor, theirs: Tensor, absolute: float) -> bool:
    return bool(torch.allclose(ours.double(), theirs, rtol=0.0, atol=absolute))


# fp32 rounds a log-prob of -1,000 nats to 3e-5, and a sum of some hundred terms rounds that often.
def rounding(numbers: Numbers) -> float:
    return float(numbers.our_logps.abs().max()) * 1e-6


def test_logps_are_those_of_the_original(numbers: Numbers) -> None:
    theirs = torch.stack([*numbers.policy, *numbers.reference])
    assert close(numbers.our_logps, theirs, rounding(numbers))
    # and the policy has moved, so that equal log-ratios below are not equal zeros
    assert (theirs[:2] - theirs[2:]).abs().max() > 1.0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_sigmoid_losses_are_those_of_the_original(numbers: Numbers, label_smoothing: float) -> None:
    ours = LOSSES["sigmoid"](numbers.ours, BETA, label_smoothing=label_smoothing)
    theirs = original_loss(numbers.policy, numbers.reference, label_smoothing).losses
    assert close(ours, theirs, BETA * rounding(numbers) * 4 + 1e-6)  # the slope is below beta, in four log-probs


def test_ipo_on_sums_is_that_of_the_original(numbers: Numbers) -> None:
    ours = LOSSES["ipo_sum"](numbers.ours, BETA)
    theirs = original_loss(numbers.policy, numbers.reference, ipo=True).losses
    slope = 2 * float(theirs.max().sqrt())
    assert close(ours, theirs, slope * rounding(numbers) * 4 + 1e-6)


def test_rewards_are_those_of_the_original(numbers: Numbers) -> None:
    theirs = original_loss(numbers.policy, numbers.reference)
    chosen, rejected = implicit_rewards(numbers.ours, BETA)
    assert close(chosen, theirs.chosen_rewards, BETA * rounding(numbers) * 2)
    assert close(rejected, theirs.rejected_rewards, BETA * rounding(numbers) * 2)


def test_adapter_gradients_are_those_of_the_original(policy: Any, pairs: list[TokenizedPair], numbers: Numbers) -> None:
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    theirs = torch.autograd.grad(
        original_loss(original_forward(policy, pairs), numbers.reference).losses.mean(), weights
    )
    batch = make_micro_batch(pairs, torch.device("cpu"), Layout.PACKED_SEGMENTS)
    reference = batch.scores(AdapterOffReference(policy).logps(batch)).pairs()
    ratios = LogRatios.between(pair_logps(policy, batch), reference)
    ours = torch.autograd.grad(LOSSES["sigmoid"](ratios, BETA).mean(), weights)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.norm() > 0
        assert (mine - other).norm() <= 1e-4 * other.norm()
