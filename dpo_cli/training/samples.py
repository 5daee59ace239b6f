"""Held-out prompts that are answered at each evaluation: what the policy writes now, beside the reference."""

import json
from typing import Any

from dpo_cli.console.text import interval, plural, safe_text, significant
from dpo_cli.errors import ConfigError, StorageError
from dpo_cli.evaluation.scores import Scorer
from dpo_cli.generation.answers import Answer, AskedPrompt, MeasuredAnswers, asked_prompts, measure_answers
from dpo_cli.models.loading import position_limit
from dpo_cli.models.logps import causal_model
from dpo_cli.models.memory import give_memory_back
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, Reference
from dpo_cli.runs.checkpoint import checkpoint_name
from dpo_cli.theory.statistics import Estimate
from dpo_cli.training.build import load_reference
from dpo_cli.training.choice import budgets
from dpo_cli.training.parts import Context, Learner, Material


class Samples:
    """The prompts that are answered, and the reference's answers to them, which are generated once."""

    def __init__(self, context: Context, learner: Learner, material: Material) -> None:
        self.context, self.learner, self.material = context, learner, material
        self.prompts: list[AskedPrompt] = []
        self._of_reference: list[Answer] = []
        wanted, limit = context.config.samples.n, position_limit(causal_model(learner.policy))
        if not (wanted and material.data.held_out):
            return
        longest = None if limit is None else limit + 1 - context.config.samples.max_new_tokens
        self.prompts = asked_prompts(material.data, material.encoder, wanted, longest)
        if not self.prompts:
            why = f"no held-out prompt leaves room for an answer within the {limit:,} positions of this model"
            if budgets(context.config):
                raise ConfigError(f"samples.max_new_tokens={context.config.samples.max_new_tokens}: {why}")
            context.reporter.warn(f"{why}: none is answered")
        elif len(self.prompts) < wanted:
            there = plural(len(self.prompts), "held-out prompt")
            context.reporter.say(f"samples.n={wanted}: there are {there}, and all are answered at each evaluation")

    def measure(self) -> MeasuredAnswers:
        """Answer the prompts by policy and reference, and compare; nothing of training changes. Collective."""
        context, learner, options = self.context, self.learner, self.context.config.samples
        reference = self._reference()
        scorer = Scorer(learner.policy, learner.objective, reference, learner.batcher, context.engine)
        advance = context.reporter.working("answering prompt", len(self.prompts) * (1 if self._of_reference else 2))
        found = measure_answers(
            scorer, self.material.encoder, self.prompts, options.max_new_tokens, context.config.seed, context.poll,
            self._of_reference, advance,
        )  # fmt: skip
        self._of_reference = found.of_reference
        if reference is not learner.reference:
            del scorer, reference
            give_memory_back(learner.batcher.device)
        return found

    def _reference(self) -> Reference:
        """A reference that generates: the policy with its adapter off, else the SFT model, loaded for this alone."""
        learner, context = self.learner, self.context
        if context.config.lora.enabled:
            return AdapterOffReference(learner.policy)
        if isinstance(learner.reference, FrozenReference):
            return learner.reference
        return load_reference(context, learner.policy, self.material.source, learner.batcher.device)

    def write(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write `samples/step-*.jsonl`, a line an answer; where that is not possible say so, and the run goes on."""
        directory = self.context.directory
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        try:
            directory.write_samples(f"{checkpoint_name(step)}.jsonl", text.encode("ascii"))
        except StorageError as error:
            self.context.reporter.warn(str(error))


def describe_samples(step: int, found: dict[str, Estimate]) -> str:
    """What the answers show, in one line; the reference's own values are in brackets."""

    def percent(name: str) -> str:
        return f"{100 * found[f'samples/{name}'].mean:.0f}%"

    kl = found["samples/kl"]
    parts = [
        f"KL {significant(kl.mean, 2)} nats a response ({interval(kl.low, kl.high, digits=2)})",
        f"{significant(found['samples/length_ratio'].mean, 2)} times the reference's length",
        f"{percent('ends')} end by themselves ({percent('reference_ends')})",
        f"{percent('repetition')} of 4-grams repeat ({percent('reference_repetition')})",
    ]
    return safe_text(f"answers at step {step}: {', '.join(parts)}")
