"""Preference optimisation: the policy itself is the reward model, r = beta log(pi / pi_ref).

    u = beta [log pi(y+|x)/pi_ref(y+|x) - log pi(y-|x)/pi_ref(y-|x)],  loss = -log sigmoid(u)

DPO, Eq. 7 of https://arxiv.org/abs/2305.18290, and every other loss of log-ratios in theory/losses.py.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text, significant
from dpo_cli.errors import DataError
from dpo_cli.models.adapters import attach_lora
from dpo_cli.objectives.alarms import preference_alarms
from dpo_cli.objectives.drift import Drift, measure_drift
from dpo_cli.objectives.findings import finding_rules
from dpo_cli.objectives.objective import Card, Objective, Outcome, loading_code
from dpo_cli.theory.losses import TWO_SIDED, LogRatios, PreferenceLoss, ResponseScores, gradient_weight, make_loss
from dpo_cli.theory.metrics import pair_metrics

if TYPE_CHECKING:
    from dpo_cli.config.schema import LoraConfig, RunConfig


DEFAULT_BETA = 0.1  # where a checkpoint does not say


class Preference(Objective):
    """A loss of how far the policy has moved from the reference on the two responses of a pair."""

    name = "dpo"
    judges_by = "implicit"
    checks = ("distinct", "finite", "not_positive", "start", "gradients", "transposes", "chain_rule",
              "batch_invariance", "closing", "round_trip")  # fmt: skip

    def __init__(self, beta: float, loss: PreferenceLoss, loss_name: str = "sigmoid") -> None:
        self.beta, self.loss, self.loss_name = beta, loss, loss_name
        self.is_calibrated = loss_name == "sigmoid"
        self.alarms = preference_alarms(loss_name)
        self.findings = finding_rules(loss_name)

    @classmethod
    def of(cls, config: "RunConfig") -> "Preference":
        """The loss of the config with its hyperparameters."""
        loss = make_loss(config.loss.name, config.beta, config.loss.sft_weight, **config.loss.options())
        return cls(config.beta, loss, config.loss.name)

    @classmethod
    def default(cls) -> "Preference":
        """DPO with a usual beta."""
        return cls(DEFAULT_BETA, make_loss("sigmoid", DEFAULT_BETA))

    def prepare(self, model: Any, lora: "LoraConfig", base_name: str | None = None) -> Any:
        """The model with fresh adapters; or with every weight set to train."""
        if lora.enabled:
            return attach_lora(model, lora, base_name)
        model.requires_grad_(True)
        return model

    def __call__(self, policy: ResponseScores, reference: ResponseScores) -> Outcome:
        """The loss of each pair by how far the policy has moved from the reference."""
        policy_logps = policy.pairs()
        ratios = LogRatios.between(policy_logps, reference.pairs())
        losses = self.loss(policy_logps, ratios)
        weights = gradient_weight(self.loss.loss, ratios)
        return Outcome(losses, pair_metrics(policy_logps, ratios, losses, weights, self.beta), columns_of(ratios))

    def check_soft_labels(self, location: str) -> None:
        """DataError where the loss has no form for a label that may be wrong."""
        if location and self.loss_name not in TWO_SIDED:
            raise DataError(
                f"{location}: has a soft label, which the loss {self.loss_name} does not take; choose one of "
                f"{', '.join(TWO_SIDED)}, or data.soft_labels=false and data.ties=drop"
            )

    def drift(self, watched: Tensor) -> Drift:
        """Where the policy has moved on the last W pairs."""
        return measure_drift(LogRatios(*watched), self.beta, self.loss.loss)

    def describe(self) -> str:
        """The loss and beta."""
        return f"{self.loss_name} loss, beta {significant(self.beta)}"

    def describe_reference(self, config: "RunConfig") -> str:
        """Which weights the policy is compared with, and whether they are loaded a second time."""
        adapter = f" with the adapter {safe_text(config.model.adapter)}" if config.model.adapter else ""
        start = f"the SFT model{adapter}"
        if config.reference.name == "adapter_off":
            return f"{start}: the policy's own base weights with the adapter switched off"
        if config.reference.cache != "off" and not config.dry_run:
            return f"{start}, frozen; loaded a second time only where its log-probs are not on disk"
        return f"{start}, loaded a second time and frozen"

    def card(self, config: "RunConfig", base_path: str) -> Card:
        """Adapters on the base, or a whole model."""
        code = [*loading_code(config, base_path), 'model = PeftModel.from_pretrained(model, "final")']
        if not config.lora.enabled:
            code = ["from transformers import AutoModelForCausalLM", "",
                    'model = AutoModelForCausalLM.from_pretrained("final")']  # fmt: skip
        return Card("dpo", "tuned with DPO", f"the {self.loss_name} loss, beta {significant(self.beta)}", code)


def columns_of(ratios: LogRatios) -> Tensor:
    """The log-ratios and token counts of B pairs, (4, B) float32: c, r, n+, n-."""
    columns = (ratios.chosen, ratios.rejected, ratios.chosen_tokens, ratios.rejected_tokens)
    return torch.stack([column.detach().float() for column in columns])
