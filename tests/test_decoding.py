"""Decoding: the model's own answers, the same in any company, by numbers that belong to prompt and answer."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CPU, LORA, VOCABULARY, tiny

from dpo_cli.errors import ConfigError
from dpo_cli.generation import decoding
from dpo_cli.generation.decoding import Answer, Decoding, Draw, draw_answers, end_tokens, nucleus, pick
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.loading import position_limit

FAMILIES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere", "gpt_neox",
    "gpt2", "gpt_oss", "mixtral", "qwen3_moe", "phi", "nemotron", "stablelm", "bloom", "qwen3_next", "mamba",
]  # fmt: skip
END = 1
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(2, VOCABULARY, length).tolist() for length in (33, 12, 9, 5, 3)]
GREEDY, SAMPLED = Decoding(20), Decoding(20, 1.0, 0.9)


def drawn(model: Any, draws: list[Draw], how: Decoding = SAMPLED) -> list[list[int]]:
    return [answer.tokens for answer in draw_answers(model, draws, how, {END}, CPU)]


def generated(model: Any, prompt: list[int]) -> list[int]:
    """transformers' own greedy answer to one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=END,
        pad_token_id=0,
    )  # fmt: skip
    row: list[int] = output[0, len(prompt) :].tolist()
    return row[: row.index(END)] if END in row else row


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_generate_does_one_prompt_at_a_time(family: str) -> None:
    model = tiny(family)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert drawn(model, [Draw(prompt) for prompt in PROMPTS], GREEDY) == expected
    assert drawn(model, [Draw(PROMPTS[3])], GREEDY) == [expected[3]]


# Families whose state is no cache of transformers, and one whose cache does not know of its window.
PECULIAR_STATE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 7},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 7},
    "rwkv": {"attention_hidden_size": 32},
    "falcon_mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("family", PECULIAR_STATE)
def test_a_batch_answers_as_a_model_that_reads_everything_anew_for_every_token(family: str) -> None:
    model = tiny(family, **PECULIAR_STATE[family])
    for prompt, answer in zip(PROMPTS, drawn(model, [Draw(prompt) for prompt in PROMPTS], GREEDY), strict=True):
        text = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
            if text[-1] == END:
                text.pop()
                break
        assert answer == text[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawn_answer_is_the_same_in_any_company(family: str) -> None:
    """Alone, with its sister that shares the prompt's forward pass, in another order (float32)."""
    model = tiny(family)
    draws = [Draw(prompt, 7, number) for prompt in PROMPTS for number in range(2)]
    alone = [drawn(model, [draw])[0] for draw in draws]
    assert drawn(model, draws) == alone
    assert drawn(model, draws[::-1]) == alone[::-1]
    assert alone[0] != alone[1]


def kernels_go_by_the_row_alone() -> bool:
    """Whether this machine multiplies a row of bfloat16 the same with two rows as with sixty-four."""
    random = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(64, 64, generator=random).bfloat16() * 8 for _ in range(2))
    together = torch.nn.functional.linear(rows, weight)
    return all(torch.equal(torch.nn.functional.linear(rows[:n], weight), together[:n]) for n in range(2, 64))


def test_in_bfloat16_a_row_is_the_same_in_any_company_where_kernels_go_by_the_row() -> None:
    """Prompts of unlike length, hundreds of tokens apart: every row reads and attends at a width of its own."""
    if not kernels_go_by_the_row_alone():
        pytest.skip("this CPU's bfloat16 products depend on the number of rows")
    model = tiny("llama", max_position_embeddings=1024, hidden_size=64, head_dim=16).bfloat16()
    random = np.random.default_rng(1)
    draws = [
        Draw(random.integers(2, VOCABULARY, length).tolist(), 3, number)
        for length in (400, 300, 290, 100, 40, 31, 4)
        for number in range(2)
    ]
    together = drawn(model, draws)
    assert [drawn(model, [draw])[0] for draw in draws] == together
    assert drawn(model, draws[4:9]) == together[4:9]


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    draws = [Draw(prompt, 5, number) for prompt in PROMPTS for number in range(2)]
    expected, run = drawn(model, draws), decoding._Batch.run

    def limited(batch: Any, poll: Any) -> list[Answer]:
        if len(batch.answers) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return run(batch, poll)

    monkeypatch.setattr(decoding._Batch, "run", limited)
    assert drawn(model, draws) == expected


def test_answers_follow_the_probabilities_of_the_model() -> None:
    """2,000 answers of one token: each token as often as softmax(logits / T) says, to 4 standard deviations and 1."""
    model, prompt, number = tiny(), PROMPTS[2], 2000
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 0.7, -1)
    answers = draw_answers(model, [Draw(prompt, 0, n) for n in range(number)], Decoding(1, 0.7), {-1}, CPU)
    counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=VOCABULARY)
    off = (counts - number * expected).abs()
    assert bool((off <= 4 * (number * expected * (1 - expected)).sqrt() + 1).all())


def test_the_second_token_follows_the_first() -> None:
    """log p of what was drawn, by full forward passes: greedy tokens are the likeliest at every place."""
    model = tiny()
    for prompt, answer in zip(PROMPTS, drawn(model, [Draw(prompt) for prompt in PROMPTS], GREEDY), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


def test_every_token_is_where_a_number_of_its_own_falls_in_what_the_model_says_behind_the_ones_before() -> None:
    """By full forward passes in float32: the first token whose cumulative softmax(logits / T) passes its number."""
    model, how = tiny(), Decoding(12, 0.8)
    draws = [Draw(prompt, 3, number) for prompt in PROMPTS for number in range(2)]
    for draw, answer in zip(draws, draw_answers(model, draws, how, {-1}, CPU), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([draw.prompt + answer.tokens])).logits[0, len(draw.prompt) - 1 : -1]
        cumulative = torch.softmax(logits / 0.8, -1).double().cumsum(-1)
        numbers = torch.from_numpy(draw.uniforms(12))[:, None] * cumulative[:, -1:]
        assert answer.tokens == (cumulative <= numbers).sum(-1).tolist()


def test_any_of_several_end_tokens_ends_an_answer_the_models_own_included() -> None:
    model = tiny()
    model.generation_config.eos_token_id = [8, 9]
    assert end_tokens(model, 1) == {1, 8, 9}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, 1) == {1}
    free = draw_answers(model, [Draw(PROMPTS[0])], Decoding(6), {-1}, CPU)[0].tokens
    for token in free:
        ended = draw_answers(model, [Draw(PROMPTS[0])], Decoding(6), {-1, VOCABULARY, token}, CPU)[0]
        assert ended == Answer(free[: free.index(token)], True)


def test_an_answer_ends_at_its_end_token_or_at_the_limit() -> None:
    model = tiny()
    free = draw_answers(model, [Draw(PROMPTS[0])], Decoding(6), {-1}, CPU)[0]
    assert len(free.tokens) == 6 and not free.ended
    last = free.tokens[3]
    ended = draw_answers(model, [Draw(PROMPTS[0])], Decoding(6), {last}, CPU)[0]
    assert ended.tokens == free.tokens[: free.tokens.index(last)] and ended.ended


def test_the_numbers_of_an_answer_are_its_seeds_prompts_and_its_own() -> None:
    draw = Draw([5, 6, 7], 11, 2)
    numbers = draw.uniforms(5)
    assert np.array_equal(numbers, Draw([5, 6, 7], 11, 2).uniforms(9)[:5])
    for other in (Draw([5, 6, 7], 12, 2), Draw([5, 6, 7], 11, 3), Draw([5, 6, 8], 11, 2), Draw([5, 6], 11, 2)):
        assert not np.array_equal(numbers, other.uniforms(5))
    many = Draw([5], 0, 0).uniforms(20_000)
    assert many.min() >= 0 and many.max() < 1
    # Mean 1/2 and variance 1/12, to four standard deviations.
    assert abs(many.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 20_000)


def test_the_generator_is_the_one_it_was() -> None:
    """Answers of an earlier version with the same seed must come again: NumPy keeps Philox's raw stream the same."""
    assert Draw([1, 2, 3], 7, 1).uniforms(2).tolist() == GOLDEN


GOLDEN = [0.16767518525002112, 0.04091592539936362]


def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    best_first = [0.4, 0.3, 0.2, 0.1]
    for top_p, fewest in ((0.3, 1), (0.39, 1), (0.41, 2), (0.8, 3), (1.0, 4)):
        left = nucleus(probabilities, top_p)
        assert sorted(left[left > 0].tolist(), reverse=True) == pytest.approx(best_first[:fewest]), top_p


def test_tokens_exactly_as_likely_as_the_last_of_the_nucleus_belong_to_it() -> None:
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


def test_a_token_is_where_the_number_falls() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert int(pick(probabilities, torch.tensor([number], dtype=torch.float64))) == token, number
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    picked = pick(probabilities.expand(1000, -1) * 3, grid)  # not normalised
    assert torch.bincount(picked, minlength=6).tolist() == [0, 250, 0, 500, 250, 0]


@pytest.mark.parametrize(("family", "room"), [("gpt2", 128), ("opt", 128)])
def test_positions_that_a_model_has_not_learned_are_refused_before_a_token_is_drawn(family: str, room: int) -> None:
    model = tiny(family)
    assert position_limit(model) == room and position_limit(tiny("llama")) is None
    prompt = list(range(2, 50)) * 2  # 96 tokens
    (answer,) = draw_answers(model, [Draw(prompt)], Decoding(room + 1 - 96), set(), CPU)
    assert len(answer.tokens) == room + 1 - 96  # the last is not read
    says = "max_new_tokens=34: behind a prompt of 96 tokens there is no room for so many, since this model has learned"
    with pytest.raises(ConfigError, match=re.escape(f"{says} 128 positions; 33 fit")):
        draw_answers(model, [Draw(prompt)], Decoding(room + 2 - 96), set(), CPU)


def test_a_temperature_near_zero_draws_the_likeliest_token() -> None:
    model, prompt = tiny(), [5, 6, 7]
    (greedy,) = draw_answers(model, [Draw(prompt)], Decoding(8), set(), CPU)
    (cold,) = draw_answers(model, [Draw(prompt, seed=3)], Decoding(8, temperature=1e-40), set(), CPU)
    assert cold.tokens == greedy.tokens


def test_a_limit_of_no_token_draws_none_and_a_limit_of_one_draws_one() -> None:
    draws = [Draw(prompt) for prompt in PROMPTS]
    assert draw_answers(tiny(), draws, Decoding(0), {END}, CPU) == [Answer([], False)] * 5
    first = [answer[:1] for answer in drawn(tiny(), draws, GREEDY)]
    assert drawn(tiny(), draws, Decoding(1)) == first


def test_adapters_draw_and_switched_off_they_do_not() -> None:
    model = tiny()
    expected = drawn(model, [Draw(prompt) for prompt in PROMPTS], GREEDY)
    policy = attach_lora(model, LORA)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    policy.train()
    before = model.config._attn_implementation
    assert drawn(policy, [Draw(prompt) for prompt in PROMPTS], GREEDY) != expected
    with policy.disable_adapter():
        assert drawn(policy, [Draw(prompt) for prompt in PROMPTS], GREEDY) == expected
    assert policy.training and model.config._attn_implementation == before
