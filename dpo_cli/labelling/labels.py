"""Labelled pairs: what dpo-label writes and dpo-train reads, for every kind of judge."""

from dataclasses import dataclass
from typing import Any

from dpo_cli.data.formats import FinishReason


@dataclass(frozen=True)
class LabelledPair:
    """Two responses to one prompt, the chosen one first, with its probability of being better."""

    sample: str  # id of the sample that both are of
    prompt: Any  # as in the file of samples: text, or a list of messages
    chosen: str
    rejected: str
    # That `chosen` is better: sigmoid(reward_chosen - reward_rejected). A sampled label may have one below 1/2.
    probability: float
    reward_chosen: float  # in nats
    reward_rejected: float
    by: str  # the kind of judge: human, reward, implicit, rule
    judge: str  # the annotators' names, a model's path, or a rule's name
    chosen_finish_reason: FinishReason = FinishReason.STOP
    rejected_finish_reason: FinishReason = FinishReason.STOP
    sampled: bool = False  # the label was drawn with its probability


def label_row(pair: LabelledPair) -> dict[str, Any]:
    """The row of a file of labels; `dpo-train data=jsonl` reads its first five keys, and `probability`.

    A label that was sampled is as noisy as it is meant to be: its probability is no soft label and has another name.
    """
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "chosen_finish_reason": pair.chosen_finish_reason,
        "rejected_finish_reason": pair.rejected_finish_reason,
        ("sampled_with_probability" if pair.sampled else "probability"): pair.probability,
        "reward_chosen": pair.reward_chosen,
        "reward_rejected": pair.reward_rejected,
        "by": pair.by,
        "judge": pair.judge,
        "sample": pair.sample,
    }
