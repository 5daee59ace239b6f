"""Against TRL's DPOTrainer: the same pairs, the same weights, and every number on the way to the gradient.

TRL is a yardstick, never a dependency. It runs in a process of its own, under the Python that $DPO_TRL_PYTHON names.
`make test-peer` builds one in .venv-peer/ where none is named. With $DPO_HH, a .jsonl.gz file of HH dialogues, the
pairs are 64 real ones of at most 800 characters.

Where TRL computes something else by design, and what is compared here:
- `sft` is a mean over the tokens of a batch in TRL and over each pair's own in ours: compared pair by pair.
- `sigmoid` takes no label smoothing in TRL: compared without, here; with it, in test_original.py.
- Where a token straddles the border of prompt and response, TRL moves the border back. The tokenizer used here has
  no such tokens.
"""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dialogues import pairs_to_compare
from torch import Tensor

from dpo_cli.config.schema import LoraConfig
from dpo_cli.data.batches import Layout
from dpo_cli.data.formats import PreferencePair
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.data.truncation import Encoded
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.logps import make_micro_batch, pair_logps
from dpo_cli.models.reference import AdapterOffReference
from dpo_cli.theory.losses import LOSSES, LogRatios, PairLogps, loss_options, sft_loss

pytestmark = pytest.mark.peer

BETA = 0.1
PAIRS = 64
BATCH = 8  # pairs
# Relative. A log-prob of -1,700 nats is a sum over 300 bytes, fp32 holds it to 1e-4, and the two sides add in a
# different order; 1e-5 absolute would ask more of them than fp32 has.
ROUNDING = 5e-7

# TRL's `loss_type`s, each with the hyperparameters that it needs, by TRL's name and by ours.
TRL_LOSSES: dict[str, dict[str, float]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.05},
    "sft": {},
    "sigmoid_norm": {},
}
OUR_NAMES = {"discopop_tau": "temperature"}


@dataclass(frozen=True)
class Numbers:
    """What one side computed of N pairs."""

    ids: list[Encoded]
    policy: PairLogps
    reference: PairLogps
    losses: dict[str, Tensor]  # (N,) by loss
    gradients: dict[str, dict[str, Tensor]]  # by loss and parameter; as in trl_worker.py


def our_loss(name: str, policy: PairLogps, reference: PairLogps) -> Tensor:
    if name == "sft":
        return sft_loss(policy)
    hyperparameters = {OUR_NAMES.get(theirs, theirs): value for theirs, value in TRL_LOSSES[name].items()}
    assert set(hyperparameters) <= loss_options(name)
    return LOSSES[name](LogRatios.between(policy, reference), BETA, **hyperparameters)


# The two sides


@pytest.fixture(scope="module")
def trl_python() -> str:
    """A Python that has trl."""
    named = os.environ.get("DPO_TRL_PYTHON")
    assert named, "DPO_TRL_PYTHON names no Python that has trl: run make test-peer"
    return named


@pytest.fixture(scope="module")
def policy(tiny_path: str) -> Any:
    """A random Llama under a LoRA adapter that has moved away from zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32).eval()
    torch.manual_seed(0)
    policy = attach_lora(model, LoraConfig(enabled=True, r=4, alpha=8.0, dropout=0.0, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=1.0)
    return policy


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    return pairs_to_compare(PAIRS)


@pytest.fixture(scope="module")
def theirs(
    trl_python: str,
    policy: Any,
    pairs: list[PreferencePair],
    tiny_path: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Numbers:
    """TRL's numbers, from texts, weights and names alone."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("trl")
    rows = [{"prompt": pair.prompt_text, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_file(get_peft_model_state_dict(policy), folder / "adapter.safetensors")
    words = {"model": tiny_path, "pairs": folder / "pairs.jsonl", "adapter": folder / "adapter.safetensors",
             "losses": json.dumps(TRL_LOSSES), "out": folder}  # fmt: skip
    command = [trl_python, str(Path(__file__).parent / "trl_worker.py")]
    command += [part for name, value in words.items() for part in (f"--{name}", str(value))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]

    ids = json.loads((folder / "ids.json").read_text())
    values = load_file(folder / "values.safetensors")
    encoded = [Encoded(*one) for one in zip(ids["prompt"], ids["chosen"], ids["rejected"], strict=True)]
    tokens = [torch.tensor([len(getattr(one, side)) for one in encoded]) for side in ("chosen", "rejected")]
    gradients: dict[str, dict[str, Tensor]] = {name: {} for name in TRL_LOSSES}
    for key, value in values.items():
        if key.startswith("gradient/"):
            _, name, parameter = key.split("/")
            gradients[name][parameter] = value
    return Numbers(
        ids=encoded,
        policy=PairLogps(values["policy/chosen"], values["policy/rejected"], *tokens),
        reference=PairLogps(values["reference/chosen"], values["reference/rejected"], *tokens),
        losses={name: values[f"loss/{name}"] for name in TRL_LOSSES},
        gradients=gradients,
    )


@pytest.fixture(scope="module")
def ours(policy: Any, pairs: list[PreferencePair], tiny_tokenizer: Any) -> Numbers:
    """Our numbers, in packed micro-batches."""
    encoded = PairEncoder(tiny_tokenizer, "plain").encode(pairs)
    tokenized = [
        TokenizedPair(token_ids(one.prompt), token_ids(one.chosen), token_ids(one.rejected), row, str(row), row)
        for row, one in enumerate(encoded)
    ]
    weights = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    gradients = {name: {key: torch.zeros_like(weight) for key, weight in weights.items()} for name in TRL_LOSSES}
    losses: dict[str, list[Tensor]] = {name: [] for name in TRL_LOSSES}
    logps: tuple[list[PairLogps], list[PairLogps]] = ([], [])
    for start in range(0, len(tokenized), BATCH):
        micro_batch = make_micro_batch(tokenized[start : start + BATCH], torch.device("cpu"), Layout.PACKED_SEGMENTS)
        mine = pair_logps(policy, micro_batch)
        reference = micro_batch.scores(AdapterOffReference(policy).logps(micro_batch)).pairs()
        logps[0].append(mine.detach())
        logps[1].append(reference)
        for name in TRL_LOSSES:
            loss = our_loss(name, mine, reference)
            losses[name].append(loss.detach())
            if name != "sigmoid" and start > 0:
                continue
            counted = len(tokenized) if name == "sigmoid" else len(micro_batch.examples)
            parts = torch.autograd.grad(loss.sum() / counted, list(weights.values()), retain_graph=True)
            for key, part in zip(weights, parts, strict=True):
                gradients[name][key] += part
    joined = {name: torch.cat(values) for name, values in losses.items()}
    return Numbers(encoded, joined_logps(logps[0]), joined_logps(logps[1]), joined, gradients)


def joined_logps(parts: list[PairLogps]) -> PairLogps:
    fields = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    return PairLogps(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


# The comparison


def difference(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.double() - theirs.double()).abs()


def test_token_ids_are_trls(ours: Numbers, theirs: Numbers) -> None:
    assert ours.ids == theirs.ids


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("who", ["policy", "reference"])
def test_logps_are_trls(ours: Numbers, theirs: Numbers, who: str, side: str) -> None:
    mine, other = (getattr(getattr(numbers, who), side) for numbers in (ours, theirs))
    assert (difference(mine, other) <= ROUNDING * other.abs() + 1e-5).all()


def test_the_policy_has_moved(theirs: Numbers) -> None:
    # else equal log-ratios would be equal zeros, and all losses their values at the start
    margin = LogRatios.between(theirs.policy, theirs.reference).margin
    assert (margin > 1.0).any() and (margin < -1.0).any()


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_losses_of_the_same_logps_are_trls(theirs: Numbers, name: str) -> None:
    mine, other = our_loss(name, theirs.policy, theirs.reference), theirs.losses[name]
    assert (difference(mine, other) <= 1e-5 * other.abs().clamp(min=1.0)).all()


def passed_on(name: str, numbers: Numbers) -> Tensor:
    """How far a loss may move, (N,), where each of its four log-probs moves by its own rounding: slope times that."""
    sides = [side.clone().requires_grad_() for side in (numbers.policy.chosen, numbers.policy.rejected)]
    policy = replace(numbers.policy, chosen=sides[0], rejected=sides[1])
    slopes = torch.autograd.grad(our_loss(name, policy, numbers.reference).sum(), sides, materialize_grads=True)
    references = (numbers.reference.chosen, numbers.reference.rejected)
    moves = [slope.abs() * ROUNDING * (one.detach().abs() + other.abs())
             for slope, one, other in zip(slopes, sides, references, strict=True)]  # fmt: skip
    return moves[0] + moves[1]


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_losses_are_trls_from_text_to_number(ours: Numbers, theirs: Numbers, name: str) -> None:
    mine, other = ours.losses[name], theirs.losses[name]
    assert (difference(mine, other) <= 1e-5 * other.abs().clamp(min=1.0) + passed_on(name, theirs)).all()


@pytest.mark.parametrize("name", [name for name in TRL_LOSSES if name != "sft"])
def test_adapter_gradients_are_trls(ours: Numbers, theirs: Numbers, name: str) -> None:
    assert ours.gradients[name].keys() == theirs.gradients[name].keys()
    mine, other = (torch.cat([part.flatten() for _, part in sorted(numbers.gradients[name].items())]).double()
                   for numbers in (ours, theirs))  # fmt: skip
    assert other.norm() > 0
    assert (mine - other).norm() <= 1e-4 * other.norm()
