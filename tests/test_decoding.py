"""Decoding: the model's own completions, the same in any batch, by random numbers of prompt and index."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CPU, LORA, VOCABULARY, tiny

from dpo_cli.data.formats import FinishReason
from dpo_cli.errors import ConfigError
from dpo_cli.generation import decoding
from dpo_cli.generation.decoding import (
    Completion,
    CompletionRequest,
    SamplingParams,
    generate_completions,
    inverse_cdf,
    nucleus,
    stop_token_ids,
)
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.loading import position_limit

FAMILIES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere", "gpt_neox",
    "gpt2", "gpt_oss", "mixtral", "qwen3_moe", "phi", "nemotron", "stablelm", "bloom", "qwen3_next", "mamba",
]  # fmt: skip
END = 1
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(2, VOCABULARY, length).tolist() for length in (33, 12, 9, 5, 3)]
GREEDY, SAMPLED = SamplingParams(20), SamplingParams(20, 1.0, 0.9)


def completed(model: Any, requests: list[CompletionRequest], params: SamplingParams = SAMPLED) -> list[list[int]]:
    return [completion.token_ids for completion in generate_completions(model, requests, params, {END}, CPU)]


def generated(model: Any, prompt: list[int]) -> list[int]:
    """transformers' own greedy completion to one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=END,
        pad_token_id=0,
    )  # fmt: skip
    row: list[int] = output[0, len(prompt) :].tolist()
    return row[: row.index(END)] if END in row else row


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_generate_gives_for_one_prompt_at_a_time(family: str) -> None:
    model = tiny(family)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert completed(model, [CompletionRequest(prompt) for prompt in PROMPTS], GREEDY) == expected
    assert completed(model, [CompletionRequest(PROMPTS[3])], GREEDY) == [expected[3]]


# Families without transformers' cache, and one whose cache ignores its window.
PECULIAR_STATE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 7},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 7},
    "rwkv": {"attention_hidden_size": 32},
    "falcon_mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("family", PECULIAR_STATE)
def test_a_batch_gives_what_a_model_without_a_cache_gives(family: str) -> None:
    model = tiny(family, **PECULIAR_STATE[family])
    for prompt, completion in zip(
        PROMPTS, completed(model, [CompletionRequest(prompt) for prompt in PROMPTS], GREEDY), strict=True
    ):
        text = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
            if text[-1] == END:
                text.pop()
                break
        assert completion == text[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_is_the_same_in_any_batch(family: str) -> None:
    """Alone, with another completion of its prompt, and in another order (float32)."""
    model = tiny(family)
    requests = [CompletionRequest(prompt, 7, number) for prompt in PROMPTS for number in range(2)]
    alone = [completed(model, [request])[0] for request in requests]
    assert completed(model, requests) == alone
    assert completed(model, requests[::-1]) == alone[::-1]
    assert alone[0] != alone[1]


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    requests = [CompletionRequest(prompt, 5, number) for prompt in PROMPTS for number in range(2)]
    expected, run = completed(model, requests), decoding._Batch.run

    def limited(batch: Any, poll: Any) -> list[Completion]:
        if len(batch.completions) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return run(batch, poll)

    monkeypatch.setattr(decoding._Batch, "run", limited)
    assert completed(model, requests) == expected


def test_completions_follow_the_probabilities_of_the_model() -> None:
    """2,000 completions of one token: each as often as softmax(logits / T) says, to 4 standard deviations and 1."""
    model, prompt, number = tiny(), PROMPTS[2], 2000
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 0.7, -1)
    completions = generate_completions(
        model, [CompletionRequest(prompt, 0, n) for n in range(number)], SamplingParams(1, 0.7), {-1}, CPU
    )
    counts = torch.bincount(torch.tensor([completion.token_ids[0] for completion in completions]), minlength=VOCABULARY)
    off = (counts - number * expected).abs()
    assert bool((off <= 4 * (number * expected * (1 - expected)).sqrt() + 1).all())


def test_the_second_token_follows_the_first() -> None:
    """Greedy tokens are the likeliest at every position, by full forward passes."""
    model = tiny()
    for prompt, completion in zip(
        PROMPTS, completed(model, [CompletionRequest(prompt) for prompt in PROMPTS], GREEDY), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion


def test_every_token_is_the_inverse_cdf_of_its_own_uniform_number() -> None:
    """By full forward passes in float32: the first token whose cumulative softmax(logits / T) passes its number."""
    model, params = tiny(), SamplingParams(12, 0.8)
    requests = [CompletionRequest(prompt, 3, number) for prompt in PROMPTS for number in range(2)]
    for request, completion in zip(requests, generate_completions(model, requests, params, {-1}, CPU), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt + completion.token_ids])).logits[
                0, len(request.prompt) - 1 : -1
            ]
        cumulative = torch.softmax(logits / 0.8, -1).double().cumsum(-1)
        numbers = torch.from_numpy(request.uniforms(12))[:, None] * cumulative[:, -1:]
        assert completion.token_ids == (cumulative <= numbers).sum(-1).tolist()


def test_any_stop_token_stops_a_completion_also_those_of_the_models_config() -> None:
    model = tiny()
    model.generation_config.eos_token_id = [8, 9]
    assert stop_token_ids(model, 1) == {1, 8, 9}
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, 1) == {1}
    free = generate_completions(model, [CompletionRequest(PROMPTS[0])], SamplingParams(6), {-1}, CPU)[0].token_ids
    for token in free:
        ended = generate_completions(
            model, [CompletionRequest(PROMPTS[0])], SamplingParams(6), {-1, VOCABULARY, token}, CPU
        )[0]
        assert ended == Completion(free[: free.index(token)], FinishReason.STOP, token)


def test_a_completion_finishes_at_a_stop_token_or_at_the_limit() -> None:
    model = tiny()
    free = generate_completions(model, [CompletionRequest(PROMPTS[0])], SamplingParams(6), {-1}, CPU)[0]
    assert (len(free.token_ids), free.finish_reason) == (6, "length")
    last = free.token_ids[3]
    ended = generate_completions(model, [CompletionRequest(PROMPTS[0])], SamplingParams(6), {last}, CPU)[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(last)] and ended.finish_reason == "stop"


def test_the_random_numbers_of_a_completion_depend_on_seed_prompt_and_index() -> None:
    request = CompletionRequest([5, 6, 7], 11, 2)
    numbers = request.uniforms(5)
    assert np.array_equal(numbers, CompletionRequest([5, 6, 7], 11, 2).uniforms(9)[:5])
    for other in (
        CompletionRequest([5, 6, 7], 12, 2),
        CompletionRequest([5, 6, 7], 11, 3),
        CompletionRequest([5, 6, 8], 11, 2),
        CompletionRequest([5, 6], 11, 2),
    ):
        assert not np.array_equal(numbers, other.uniforms(5))
    many = CompletionRequest([5], 0, 0).uniforms(20_000)
    assert many.min() >= 0 and many.max() < 1
    # Mean 1/2 and variance 1/12, to four standard deviations.
    assert abs(many.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 20_000)


def test_the_random_numbers_of_a_seed_never_change() -> None:
    """Completions of an earlier version with the same seed stay the same: NumPy guarantees Philox's raw stream."""
    assert CompletionRequest([1, 2, 3], 7, 1).uniforms(2).tolist() == GOLDEN


GOLDEN = [0.16767518525002112, 0.04091592539936362]


def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    best_first = [0.4, 0.3, 0.2, 0.1]
    for top_p, fewest in ((0.3, 1), (0.39, 1), (0.41, 2), (0.8, 3), (1.0, 4)):
        left = nucleus(probabilities, top_p)
        assert sorted(left[left > 0].tolist(), reverse=True) == pytest.approx(best_first[:fewest]), top_p


def test_tokens_exactly_as_likely_as_the_last_of_the_nucleus_are_in_it() -> None:
    """0.5 and one token of 0.25 reach 0.7; the other of 0.25 cannot be told from it."""
    kept = nucleus(torch.tensor([[0.25, 0.0, 0.5, 0.25]]), 0.7)
    assert kept.tolist() == [[0.25, 0.0, 0.5, 0.25]]


def test_a_nucleus_of_more_tokens_than_are_sorted_at_first() -> None:
    """1,000 tokens alike but for one: 0.9 of the probability needs far more than NUCLEUS of them."""
    weights = torch.arange(1, 1001, dtype=torch.float64)
    probabilities = (weights / weights.sum())[None]
    kept = nucleus(probabilities, 0.9)
    fewest = int((kept > 0).sum())
    assert fewest > decoding.NUCLEUS
    assert float(kept.sum()) >= 0.9 > float(kept.sum() - kept[kept > 0].min())


def test_a_token_is_where_the_uniform_number_falls() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert int(inverse_cdf(probabilities, torch.tensor([number], dtype=torch.float64))) == token, number
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    picked = inverse_cdf(probabilities.expand(1000, -1) * 3, grid)  # not normalised
    assert torch.bincount(picked, minlength=6).tolist() == [0, 250, 0, 500, 250, 0]


@pytest.mark.parametrize(("family", "room"), [("gpt2", 128), ("opt", 128)])
def test_positions_that_a_model_has_not_learned_are_refused_before_generation(family: str, room: int) -> None:
    model = tiny(family)
    assert position_limit(model) == room and position_limit(tiny("llama")) is None
    prompt = list(range(2, 50)) * 2  # 96 tokens
    (completion,) = generate_completions(model, [CompletionRequest(prompt)], SamplingParams(room + 1 - 96), set(), CPU)
    assert len(completion.token_ids) == room + 1 - 96  # the last is not read
    says = "max_new_tokens=34: too many after a prompt of 96 tokens, since this model has 128 positions"
    with pytest.raises(ConfigError, match=re.escape(f"{says}; set max_new_tokens=33")):
        generate_completions(model, [CompletionRequest(prompt)], SamplingParams(room + 2 - 96), set(), CPU)


def test_a_temperature_near_zero_samples_the_likeliest_token() -> None:
    model, prompt = tiny(), [5, 6, 7]
    (greedy,) = generate_completions(model, [CompletionRequest(prompt)], SamplingParams(8), set(), CPU)
    (cold,) = generate_completions(
        model, [CompletionRequest(prompt, seed=3)], SamplingParams(8, temperature=1e-40), set(), CPU
    )
    assert cold.token_ids == greedy.token_ids


def test_a_limit_of_zero_tokens_gives_none_and_a_limit_of_one_gives_one() -> None:
    requests = [CompletionRequest(prompt) for prompt in PROMPTS]
    assert (
        generate_completions(tiny(), requests, SamplingParams(0), {END}, CPU)
        == [Completion([], FinishReason.LENGTH)] * 5
    )
    first = [completion[:1] for completion in completed(tiny(), requests, GREEDY)]
    assert completed(tiny(), requests, SamplingParams(1)) == first


def test_an_adapter_changes_completions_until_it_is_disabled() -> None:
    model = tiny()
    expected = completed(model, [CompletionRequest(prompt) for prompt in PROMPTS], GREEDY)
    policy = attach_lora(model, LORA)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    policy.train()
    before = model.config._attn_implementation
    assert completed(policy, [CompletionRequest(prompt) for prompt in PROMPTS], GREEDY) != expected
    with policy.disable_adapter():
        assert completed(policy, [CompletionRequest(prompt) for prompt in PROMPTS], GREEDY) == expected
    assert policy.training and model.config._attn_implementation == before


def test_a_completion_knows_which_token_ended_it() -> None:
    model, requests, params = tiny(), [CompletionRequest(prompt) for prompt in PROMPTS], SamplingParams(20, 1.0)
    whole = [one.token_ids for one in generate_completions(model, requests, params, set(), CPU)]
    stops = {ids[4] for ids in whole[:3]}
    for ids, ended in zip(whole, generate_completions(model, requests, params, stops, CPU), strict=True):
        first = next((place for place, token in enumerate(ids) if token in stops), None)
        assert ended.token_ids == ids[:first]
        assert ended.stop_token == (None if first is None else ids[first])
