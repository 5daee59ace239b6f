"""The reference: the weights the policy is held to, asked for the log-probs of a batch and for nothing else."""

from typing import Any, Protocol

import torch

from dpo_cli.models.logps import Batch, pair_logps
from dpo_cli.theory.losses import PairLogps


class Reference(Protocol):
    """Log-probs of the reference, without gradient."""

    def logps(self, batch: Batch) -> PairLogps:
        """log pi_ref(response | prompt) of each pair, (B,) float32, in nats."""
        ...


class FrozenReference:
    """The SFT model, loaded a second time: in eval mode, and no parameter takes a gradient."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    def logps(self, batch: Batch) -> PairLogps:
        """log pi_ref(response | prompt) of each pair, (B,) float32, in nats."""
        with torch.no_grad():
            return pair_logps(self.model, batch)


class NoReference:
    """What a reward model is held to: nothing. Its rewards stand for themselves."""

    def logps(self, batch: Batch) -> PairLogps:
        """0 for each pair, (B,) float32."""
        nothing = torch.zeros(len(batch.pairs), device=batch.tokens.device)
        return PairLogps(nothing, nothing, batch.tokens[batch.chosen], batch.tokens[batch.rejected])


class UnmovedPolicy:
    """A policy before its first update: the reference is a copy of it."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def logps(self, batch: Batch) -> PairLogps:
        """log pi_ref(response | prompt) of each pair, (B,) float32, in nats."""
        training = self.policy.training
        self.policy.eval()  # LoRA dropout is the policy's, not the reference's
        try:
            with torch.no_grad():
                return pair_logps(self.policy, batch)
        finally:
            self.policy.train(training)


class AdapterOffReference(UnmovedPolicy):
    """The policy's base weights with the adapter switched off: the same numbers without a second model."""

    def logps(self, batch: Batch) -> PairLogps:
        """log pi_ref(response | prompt) of each pair, (B,) float32, in nats."""
        with self.policy.disable_adapter():
            return super().logps(batch)
