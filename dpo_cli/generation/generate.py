"""Completions of a model as text: greedy ones, which show what training changed, and sampled ones, to compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.data.formats import FinishReason, PreferencePair
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.engine.engine import SINGLE, Engine, in_turns
from dpo_cli.generation.decoding import (
    Completion,
    CompletionRequest,
    SamplingParams,
    generate_completions,
    max_batch_size,
    stop_token_ids,
)

GREEDY_BATCH = 16  # prompts
MAX_RETRIES = 4  # of a completion that repeats an earlier one


@dataclass(frozen=True)
class CompletionText:
    """A completion as text."""

    text: str
    tokens: int
    finish_reason: FinishReason


def greedy_completions(
    model: Any,
    encoder: PairEncoder,
    pairs: list[PreferencePair],
    max_new_tokens: int,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
    engine: Engine = SINGLE,
) -> list[str]:
    """Generate the greedy completion of each pair's prompt, at most `max_new_tokens` tokens long, as text.

    The ranks share the batches, and each knows all texts.
    """
    prompts = encoder.encode_prompts([pair.prompt for pair in pairs])
    stop_ids = stop_token_ids(model, encoder.closing)
    requests = [CompletionRequest(prompt) for prompt in prompts]
    batches = [requests[start : start + GREEDY_BATCH] for start in range(0, len(requests), GREEDY_BATCH)]
    within = poll if engine.alone else lambda: None

    def complete(batch: list[CompletionRequest]) -> list[str]:
        completions = generate_completions(model, batch, SamplingParams(max_new_tokens), stop_ids, device, within)
        return [encoder.tokenizer.decode(completion.token_ids).strip() for completion in completions]

    return [text for some in in_turns(engine, batches, complete, poll) for _, texts in some for text in texts]


def completion_text(encoder: PairEncoder, completion: Completion) -> CompletionText:
    """Decode a completion without special tokens, which as text could act as commands to whoever reads it.

    White space that the chat template puts around an answer is no part of it. A completion of finish reason `length`
    may end within a character of several tokens; that part is dropped.
    """
    text = encoder.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    text = text.rstrip("\ufffd") if completion.finish_reason is FinishReason.LENGTH else text
    text = encoder.completion_text(text, completion.finish_reason)
    return CompletionText(text, len(completion.token_ids), completion.finish_reason)


def prompt_batches(
    model: Any, prompts: Sequence[list[int]], n: int, params: SamplingParams, device: torch.device, size: int | None
) -> list[list[int]]:
    """Indices of the prompts in batches of `size` completions, `n` of each prompt, the longest prompts first."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    longest = len(prompts[order[0]]) if order else 1
    step = max(1, (size or max_batch_size(model, longest, params, device)) // n)
    return [order[start : start + step] for start in range(0, len(order), step)]


def distinct_completions(
    model: Any,
    encoder: PairEncoder,
    prompts: Sequence[list[int]],
    n: int,
    params: SamplingParams,
    seed: int,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> list[list[CompletionText]]:
    """Generate `n` different completions of every prompt; a repeated one is generated again up to MAX_RETRIES times.

    A prompt may still end with fewer. A completion depends on the seed, its prompt and its index alone.
    """
    stop_ids = stop_token_ids(model, encoder.closing)
    found: list[list[CompletionText]] = [[] for _ in prompts]
    generated = [0] * len(prompts)  # completions of each prompt so far, repeated ones included
    for _ in range(1 + MAX_RETRIES):
        requests, owners = [], []
        for index, prompt in enumerate(prompts):
            missing = n - len(found[index])
            first = generated[index]
            requests += [CompletionRequest(list(prompt), seed, first + number) for number in range(missing)]
            owners += [index] * missing
            generated[index] += missing
        if not requests:
            break
        completions = generate_completions(model, requests, params, stop_ids, device, poll)
        for index, completion in zip(owners, completions, strict=True):
            text = completion_text(encoder, completion)
            if all(text.text != known.text for known in found[index]):
                found[index].append(text)
    return found
