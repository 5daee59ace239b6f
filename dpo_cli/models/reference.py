"""The reference: the weights the policy is compared with; only its log-probs of responses are used."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_cli.models.adapters import adapter_off
from dpo_cli.models.logps import MicroBatch, response_logps, token_logps_of


class Reference(Protocol):
    """Log-probs of the reference, without gradient."""

    def logps(self, micro_batch: MicroBatch) -> Tensor:
        """log pi_ref(response | prompt), (M,) float32, in nats."""
        ...


class FrozenReference:
    """The SFT model, loaded a second time: in eval mode, and no parameter takes a gradient."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    def logps(self, micro_batch: MicroBatch) -> Tensor:
        """log pi_ref(response | prompt), (M,) float32, in nats."""
        with torch.no_grad():
            return response_logps(self.model, micro_batch)

    def token_logps(self, micro_batch: MicroBatch) -> Tensor:
        """log p of every scored response token, (N,) float32, in nats, response after response."""
        with torch.no_grad():
            return token_logps_of(self.model, micro_batch)


class NoReference:
    """A reference of zeros, for an objective that has none."""

    def logps(self, micro_batch: MicroBatch) -> Tensor:
        """0 for each response, (M,) float32."""
        return torch.zeros(len(micro_batch.tokens), device=micro_batch.tokens.device)


class UnmovedPolicy:
    """A policy before its first update: the reference is a copy of it."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def logps(self, micro_batch: MicroBatch) -> Tensor:
        """log pi_ref(response | prompt), (M,) float32, in nats."""
        return self._without_gradient(response_logps, micro_batch)

    def token_logps(self, micro_batch: MicroBatch) -> Tensor:
        """log p of every scored response token, (N,) float32, in nats, response after response."""
        return self._without_gradient(token_logps_of, micro_batch)

    def _without_gradient(self, compute: Callable[[Any, MicroBatch], Tensor], micro_batch: MicroBatch) -> Tensor:
        training = self.policy.training
        self.policy.eval()  # LoRA dropout is the policy's, not the reference's
        try:
            with torch.no_grad():
                return compute(self.policy, micro_batch)
        finally:
            self.policy.train(training)


class AdapterOffReference(UnmovedPolicy):
    """The policy's base weights with the adapter switched off: the same numbers without a second model."""

    def _without_gradient(self, compute: Callable[[Any, MicroBatch], Tensor], micro_batch: MicroBatch) -> Tensor:
        with adapter_off(self.policy):
            return super()._without_gradient(compute, micro_batch)
