"""The history of a run: its logged metrics, as the rules of the verdict ask for them."""

from dataclasses import dataclass
from typing import Any

from dpo_cli.console.text import plural
from dpo_cli.data.leaks import NO_LEAKS, Leaks
from dpo_cli.objectives.alarms import preference_alarms
from dpo_cli.objectives.answers import Answers, answers_in
from dpo_cli.theory.statistics import Estimate, proportion_estimate

MOVED = (
    0.02  # nats a token by which a response must change to have learned something; the console shows less as a change
)
MATTERS = (0.1, 1.0)  # margin, or margin/beta in nats: a change of either size can be seen in answers
ACCURACY, MARGIN, IMPROVEMENT = "rewards/accuracies", "rewards/margins", "loss/improvement"
RUINS = {rule.name for rule in preference_alarms("sigmoid") if rule.ruins}
WITH_INTERVALS = (ACCURACY, MARGIN, IMPROVEMENT)  # of a held-out line of metrics.jsonl, under `intervals95`


@dataclass(frozen=True)
class History:
    """The records of metrics.jsonl, and the hyperparameters a verdict speaks of."""

    train: list[dict[str, Any]]  # steps 1 and later
    held_out: list[dict[str, Any]]
    held_out_pairs: int
    lr: float
    beta: float
    start_loss: float  # before the first update: ln 2 for DPO, something else for most other losses
    leaks: Leaks = NO_LEAKS  # held-out pairs that are also in training

    @classmethod
    def of(
        cls,
        records: list[dict[str, Any]],
        held_out_pairs: int,
        lr: float,
        beta: float,
        start_loss: float,
        leaks: Leaks = NO_LEAKS,
    ) -> "History":
        """From the lines of metrics.jsonl; `start_loss` is the formula's, for a run whose step 0 was not logged."""
        train = [record for record in records if record["split"] == "train"]
        held_out = [record for record in records if record["split"] == "eval"]
        if held_out and IMPROVEMENT in held_out[0]:  # on the pairs that the end is compared on
            start_loss = float(held_out[0]["loss"]) + float(held_out[0][IMPROVEMENT])
        elif train and train[0]["step"] == 0:
            start_loss = float(train[0]["loss"])
        after_start = [record for record in train if record["step"] > 0]
        return cls(after_start, held_out, held_out_pairs, lr, beta, start_loss, leaks)

    def late(self, key: str) -> float:
        """The mean of a train metric over the last quarter of the logged steps."""
        values = [float(record[key]) for record in self.train if key in record]
        last = values[-max(1, len(values) // 4) :]
        return sum(last) / len(last) if last else 0.0

    def last(self, key: str) -> float:
        """A train metric at the last logged step."""
        return float(self.train[-1].get(key, 0.0)) if self.train else 0.0

    @property
    def evaluated(self) -> bool:
        """Whether held-out pairs were scored."""
        return bool(self.held_out) and self.held_out_pairs > 0

    def at_end(self, name: str) -> Estimate:
        """A held-out metric at the end with its 95% interval.

        Lines of earlier versions have no intervals: accuracy gets Wilson's over pairs, the others are infinitely wide.
        """
        record, n = self.held_out[-1], self.held_out_pairs
        mean = float(record.get(name, 0.0))
        low, high = record.get("intervals95", {}).get(name, (None, None))
        if low is not None and high is not None:
            return Estimate(mean, float(low), float(high), n)
        return proportion_estimate(mean * n, n) if name == ACCURACY else Estimate(mean, -float("inf"), float("inf"), n)

    @property
    def answers(self) -> Answers:
        """The metrics of the answers that were generated at the end, with 95% intervals; empty where none were."""
        if not self.evaluated or "samples/kl" not in self.held_out[-1]:
            return {}
        measured = self.held_out[-1]["intervals95"]
        return answers_in({name: self.at_end(name) for name in measured})

    @property
    def better(self) -> bool:
        """Whether the held-out loss is lower than at the start, margin above 0 and accuracy above one half.

        Each beyond its interval: a tail of easy pairs lifts the means alone.
        """
        if not self.evaluated:
            return False
        return self.at_end(IMPROVEMENT).low > 0 < self.at_end(MARGIN).low and self.at_end(ACCURACY).low > 0.5

    @property
    def worse(self) -> bool:
        """Whether the held-out loss is higher than at the start, beyond its interval."""
        return self.evaluated and self.at_end(IMPROVEMENT).high < 0

    @property
    def margin(self) -> float:
        """Held-out margin at the end; the late train margin where nothing is held out."""
        return float(self.held_out[-1][MARGIN]) if self.evaluated else self.late(MARGIN)

    @property
    def matters(self) -> bool:
        """Whether the margin has a size that can be seen in answers.

        A small beta makes every margin small, so a nat of log-ratio is enough; a large one makes it large also where no
        response has moved.
        """
        return self.margin / self.beta >= MATTERS[1] or (self.margin >= MATTERS[0] and not self.still)

    @property
    def moved(self) -> float | None:
        """The larger change of a response's log-prob since the start, in nats a token; None of a reward model."""
        last, sides = self.train[-1], ("drift/chosen_per_token", "drift/rejected_per_token")
        return max(abs(float(last[side])) for side in sides) if all(side in last for side in sides) else None

    @property
    def in_nats(self) -> bool:
        """Whether scores are log-probs: then beta scales margins, and a response can move."""
        return self.moved is not None

    @property
    def still(self) -> bool:
        """Whether no response has moved: what has not moved has memorised nothing either."""
        return self.moved is not None and self.moved < MOVED

    @property
    def ruin(self) -> str | None:
        """The text of the first alarm for which monitor=stop would have ended the run; None without one."""
        said = (alarm for record in self.train for alarm in record.get("alarms", {}).items())
        return next((text for name, text in said if name in RUINS), None)

    @property
    def held_out_words(self) -> str:
        """How many pairs the end was compared on; of how many prompts, where some share one."""
        prompts = int(self.held_out[-1].get("prompts", self.held_out_pairs))
        of_prompts = f" of {plural(prompts, 'prompt')}" if prompts < self.held_out_pairs else ""
        return plural(self.held_out_pairs, "held-out pair") + of_prompts
