"""What the policy writes now, beside what the reference writes: over-optimisation as users see it.

Scores of given responses do not show a model that loops, rambles or never stops. So held-out prompts are answered, an
answer each, by policy and reference with the same random numbers, at temperature 1 and top_p 1: then the mean of
log pi(y)/pi_ref(y) over the policy's own answers y is an unbiased estimate of KL(pi || pi_ref), as in Figure 2 of
https://arxiv.org/abs/2305.18290. An answer that reaches `max_new_tokens` is cut there, and its KL is of that beginning.
Nothing of training changes: mode, gradients and random generators stay as they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from dpo_cli.data.formats import FinishReason
from dpo_cli.data.pairs import PairData
from dpo_cli.data.prepare import content_key
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.engine.engine import SINGLE, Engine, in_turns, on_whole
from dpo_cli.evaluation.scores import Scorer, score_pairs
from dpo_cli.generation.decoding import (
    Completion,
    CompletionRequest,
    SamplingParams,
    generate_completions,
    max_batch_size,
    stop_token_ids,
)
from dpo_cli.generation.generate import completion_text
from dpo_cli.models.adapters import adapter_off
from dpo_cli.models.loading import undisturbed
from dpo_cli.models.reference import AdapterOffReference, FrozenReference
from dpo_cli.theory.repetition import distinct, repetition
from dpo_cli.theory.statistics import Clusters, Estimate

ROWS = 64  # answers generated together, at most: a fixed number, so that a run again rounds alike


@dataclass(frozen=True)
class AskedPrompt:
    """A held-out prompt that is answered."""

    ids: list[int]
    text: str  # what the human said last
    group: int  # as of a pair: prompts of one group are not independent


@dataclass(frozen=True)
class Answer:
    """An answer as it was generated."""

    ids: list[int]  # without what ended it
    response: list[int]  # with it: what is scored and counted, at least one token
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class MeasuredAnswers:
    """What the answers show, and the answers."""

    estimates: dict[str, Estimate]  # by the name of the metric, `samples/kl` and so on
    rows: list[dict[str, Any]] = field(default_factory=list)  # a line an answer, for JSON
    of_reference: list[Answer] = field(default_factory=list)  # the reference never moves: they may be used again


def asked_prompts(data: PairData, encoder: PairEncoder, n: int, longest: int | None = None) -> list[AskedPrompt]:
    """The first `n` distinct prompts of the held-out pairs, or as many as there are, taken in turns from each source.

    `longest` is the most tokens that a prompt may have, where the model has a limit.
    """
    texts = {content_key(text.pair): text.pair.messages[-1].content for text in data.held_out_texts}
    distinct_prompts: dict[bytes, TokenizedPair] = {}
    for pair in data.held_out:
        if longest is None or len(pair.prompt) <= longest:
            distinct_prompts.setdefault(pair.prompt.tobytes(), pair)
    of_sources: dict[str, list[TokenizedPair]] = {}
    for pair in distinct_prompts.values():
        of_sources.setdefault(pair.source, []).append(pair)
    turns = zip_longest(*of_sources.values())
    asked = [pair for turn in turns for pair in turn if pair is not None][:n]

    def text(pair: TokenizedPair) -> str:
        known = texts.get(pair.key)
        return encoder.tokenizer.decode(pair.prompt, skip_special_tokens=True) if known is None else known

    return [AskedPrompt(pair.prompt.tolist(), text(pair), pair.group) for pair in asked]


def measure_answers(
    scorer: Scorer,
    encoder: PairEncoder,
    prompts: Sequence[AskedPrompt],
    max_new_tokens: int,
    seed: int,
    poll: Callable[[], None] = lambda: None,
    of_reference: Sequence[Answer] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> MeasuredAnswers:
    """Answer the prompts by policy and reference, and compare: every `samples/...` metric with its 95% interval.

    The scorer's reference must be a model: the policy with its adapter off, or a second one. `of_reference` are its
    answers where they are known from an earlier call with the same prompts, limit and seed. `advance` hears how many
    answers are done. The ranks share the work, and each knows the result. Collective.
    """
    reference, engine, device = scorer.reference, scorer.engine, scorer.batcher.device
    assert isinstance(reference, AdapterOffReference | FrozenReference) and prompts
    how = (encoder, prompts, SamplingParams(max_new_tokens, temperature=1.0), seed, device, engine, poll, advance)
    with undisturbed(scorer.policy):
        known = list(of_reference or ())
        if not known:
            with _generating(reference) as model:
                known = _answers(model, *how)
        answers = _answers(scorer.policy, *how)
        pairs = [
            _as_pair(prompt, answer, number)
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        ratios = score_pairs(scorer, pairs, poll).ratios.chosen.double().numpy()
    clusters = Clusters([prompt.group for prompt in prompts])
    rows = [
        {
            "prompt": prompt.text,
            "reference": before.text,
            "policy": now.text,
            "kl": ratio if math.isfinite(ratio) else None,
            "tokens": len(now.response),
            "reference_tokens": len(before.response),
            "finish_reason": now.finish_reason.value,
            "reference_finish_reason": before.finish_reason.value,
        }
        for prompt, before, now, ratio in zip(prompts, known, answers, ratios.tolist(), strict=True)
    ]
    estimates = {"samples/kl": clusters.mean(ratios), **compare_answers(clusters, answers, known)}
    return MeasuredAnswers(estimates, rows, known)


def compare_answers(
    clusters: Clusters, answers: Sequence[Answer], of_reference: Sequence[Answer]
) -> dict[str, Estimate]:
    """What the texts show: length, how many end by themselves, repetition; of policy and reference."""
    found = {}
    for who, some in (("", answers), ("reference_", of_reference)):
        ids = [answer.ids for answer in some]
        ended = np.array([float(answer.finish_reason is FinishReason.STOP) for answer in some])

        def distinct_bigrams(kept: Any, ids: list[list[int]] = ids) -> float:
            return distinct([one for one, keeps in zip(ids, kept, strict=True) if keeps])

        found[f"samples/{who}length"] = clusters.mean(_lengths(some))
        found[f"samples/{who}ends"] = clusters.share(ended)
        found[f"samples/{who}repetition"] = clusters.mean([repetition(one) for one in ids])
        found[f"samples/{who}distinct_2"] = clusters.jackknife(distinct_bigrams)
    ours, theirs = _lengths(answers), _lengths(of_reference)
    found["samples/length_ratio"] = clusters.jackknife(lambda kept: float(ours[kept].sum() / theirs[kept].sum()))
    return found


def _lengths(answers: Sequence[Answer]) -> Any:
    """Tokens of each answer, what ended it included, (N,)."""
    return np.array([len(answer.response) for answer in answers], dtype=float)


@contextmanager
def _generating(reference: AdapterOffReference | FrozenReference) -> Iterator[Any]:
    """The reference as a model that generates."""
    if isinstance(reference, FrozenReference):
        yield reference.model
        return
    with adapter_off(reference.policy):
        yield reference.policy


def _as_pair(prompt: AskedPrompt, answer: Answer, number: int) -> TokenizedPair:
    """An answer in the form in which responses are scored: on both sides, which is scored once."""
    ids = token_ids(answer.response)
    return TokenizedPair(token_ids(prompt.ids), ids, ids, number, str(number), prompt.group)


def _answers(
    model: Any,
    encoder: PairEncoder,
    prompts: Sequence[AskedPrompt],
    params: SamplingParams,
    seed: int,
    device: torch.device,
    engine: Engine,
    poll: Callable[[], None],
    advance: Callable[[int], None],
) -> list[Answer]:
    """An answer to each prompt, in their order.

    Ranks with the whole model take the batches in turns. Those of a sharded one generate all of them in step.
    """
    requests = [CompletionRequest(prompt.ids, seed) for prompt in prompts]
    stop_ids = stop_token_ids(model, encoder.closing)
    longest = max(len(prompt.ids) for prompt in prompts)
    size = min(ROWS, engine.least(max_batch_size(model, longest, params, device)))
    if engine.retries:
        size = min(size, math.ceil(len(requests) / engine.world_size))
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]

    def complete(batch: list[CompletionRequest]) -> list[Answer]:
        within = poll if engine.alone else lambda: None
        in_step = SINGLE if engine.retries else engine
        found = on_whole(model, generate_completions, batch, params, stop_ids, device, within, in_step)
        return [_answer(encoder, completion) for completion in found]

    answers: list[Answer] = []
    with _uncompiled(model):
        if not engine.retries:
            for batch in batches:
                poll()
                answers += complete(batch)
                advance(len(batch))
            return answers
        for some in in_turns(engine, batches, complete, poll):
            for batch, found in some:
                answers += found
                advance(len(batch))
    return answers


def _answer(encoder: PairEncoder, completion: Completion) -> Answer:
    ended_by = [] if completion.stop_token is None else [completion.stop_token]
    text = completion_text(encoder, completion).text
    return Answer(completion.token_ids, [*completion.token_ids, *ended_by], text, completion.finish_reason)


def _uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Within, compiled layers run as they are written: their code is for training, and does not know a cache."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
