"""Labelled pairs: what dpo-label writes and dpo-train reads, whoever has judged."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LabelledPair:
    """Two answers to one prompt, the better first, with how sure that is."""

    sample: str  # id of the sample that both are of
    prompt: Any  # as it stands in the file of samples: text, or a list of messages
    chosen: str
    rejected: str
    # That `chosen` is the better: sigmoid(reward_chosen - reward_rejected). Under 1/2 where a drawn label is an upset.
    probability: float
    reward_chosen: float  # in nats
    reward_rejected: float
    by: str  # the kind of judge: human, reward, implicit, rule
    judge: str  # who or which: annotators' names, a model's path, a rule's name
    chosen_finished: bool = True  # False: cut at the limit when it was drawn
    rejected_finished: bool = True


def label_row(pair: LabelledPair) -> dict[str, Any]:
    """The row of a file of labels; `dpo-train data=jsonl` takes its first five keys."""
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "chosen_finished": pair.chosen_finished,
        "rejected_finished": pair.rejected_finished,
        "probability": pair.probability,
        "reward_chosen": pair.reward_chosen,
        "reward_rejected": pair.reward_rejected,
        "by": pair.by,
        "judge": pair.judge,
        "sample": pair.sample,
    }
