"""Answers of a model to prompts as text: greedy ones, to see what training did, and sampled ones, to compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.data.formats import PreferencePair, Prompt
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.generation.decoding import Answer, Decoding, Draw, draw_answers, end_tokens, rows_at_once

PROMPTS_AT_ONCE = 16
REDRAWS = 4  # of an answer that is there already


@dataclass(frozen=True)
class Text:
    """An answer as text."""

    text: str
    tokens: int
    ended: bool  # by itself, not at the limit


def greedy_answers(
    model: Any,
    encoder: PairEncoder,
    pairs: list[PreferencePair],
    max_new_tokens: int,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> list[str]:
    """The greedy answer to the prompt of each pair, as text, cut after `max_new_tokens` tokens."""
    prompts = encoder.encode_prompts([Prompt(pair.messages, pair.prompt_text) for pair in pairs])
    answers: list[str] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        draws = [Draw(prompt) for prompt in prompts[start : start + PROMPTS_AT_ONCE]]
        ends = end_tokens(model, encoder.closing)
        drawn = draw_answers(model, draws, Decoding(max_new_tokens), ends, device, poll)
        answers += [encoder.tokenizer.decode(answer.tokens).strip() for answer in drawn]
    return answers


def said_by(encoder: PairEncoder, answer: Answer) -> Text:
    """What a drawn answer says, without special tokens: as text they would become commands to whoever reads it.

    Under a chat template white space around it goes, as it does in training. Of an answer that was cut within a
    character, whose bytes may be several tokens, the part of it goes.
    """
    text = encoder.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    text = text if answer.ended else text.rstrip("\ufffd")
    return Text(encoder.response_text(text), len(answer.tokens), answer.ended)


def batches_of(
    model: Any, prompts: Sequence[list[int]], each: int, decoding: Decoding, device: torch.device, size: int | None
) -> list[list[int]]:
    """The prompts, by number, in batches of `size` answers, the longest first: those of like length are together."""
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    longest = len(prompts[order[0]]) if order else 1
    together = max(1, (size or rows_at_once(model, longest, decoding, device)) // each)
    return [order[start : start + together] for start in range(0, len(order), together)]


def distinct_answers(
    model: Any,
    encoder: PairEncoder,
    prompts: Sequence[list[int]],
    each: int,
    decoding: Decoding,
    seed: int,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> list[list[Text]]:
    """`each` answers to every prompt, all different; one that is there already is redrawn up to REDRAWS times.

    Where a prompt still lacks some, fewer are returned. An answer depends on seed, prompt and its number alone.
    """
    ends = end_tokens(model, encoder.closing)
    found: list[list[Text]] = [[] for _ in prompts]
    asked = [0] * len(prompts)  # answers drawn so far
    for _ in range(1 + REDRAWS):
        lacking = [place for place in range(len(prompts)) if len(found[place]) < each]
        if not lacking:
            break
        draws, owners = [], []
        for place in lacking:
            wanted = each - len(found[place])
            draws += [Draw(list(prompts[place]), seed, asked[place] + number) for number in range(wanted)]
            owners += [place] * wanted
            asked[place] += wanted
        for place, answer in zip(owners, draw_answers(model, draws, decoding, ends, device, poll), strict=True):
            text = said_by(encoder, answer)
            if all(text.text != known.text for known in found[place]):
                found[place].append(text)
    return found
