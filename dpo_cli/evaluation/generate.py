"""Answers of a model to prompts, greedily: what a person looks at to see what training did."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dpo_cli.data.formats import PreferencePair
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.models.logps import plain_attention

PROMPTS_AT_ONCE = 8


class _Polled(StoppingCriteria):
    """Asks after every token whether a signal has come."""

    def __init__(self, poll: Callable[[], None]) -> None:
        self.poll = poll

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.poll()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def greedy_answers(
    model: Any,
    encoder: PairEncoder,
    pairs: list[PreferencePair],
    max_new_tokens: int,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> list[str]:
    """The greedy answer to the prompt of each pair, as text, cut after `max_new_tokens` tokens."""
    prompts = [encoded.prompt for encoded in encoder.encode(pairs)]
    ends = {encoder.closing}
    configured = model.generation_config.eos_token_id
    ends |= set(configured) if isinstance(configured, list) else {configured} - {None}
    answers: list[str] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            poll()
            some = prompts[start : start + PROMPTS_AT_ONCE]
            width = max(len(prompt) for prompt in some)
            padded = [[encoder.closing] * (width - len(prompt)) + prompt for prompt in some]
            mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in some]
            with torch.no_grad(), plain_attention(model):
                output = model.generate(
                    input_ids=torch.tensor(padded, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=sorted(ends),
                    pad_token_id=encoder.closing,
                    stopping_criteria=StoppingCriteriaList([_Polled(poll)]),
                )
            for row in output[:, width:].tolist():
                end = next((place for place, token in enumerate(row) if token in ends), len(row))
                answers.append(encoder.tokenizer.decode(row[:end]).strip())
    finally:
        model.train(was_training)
    return answers
