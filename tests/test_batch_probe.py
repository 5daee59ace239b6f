"""Whether completions depend on the batch size is asked of this machine's kernels, and the answer is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ended
from tiny_models import CPU, VOCABULARY, tiny
from torch import Tensor

from dpo_cli.generation import batch_probe, sampler
from dpo_cli.generation.batch_probe import batch_invariant
from dpo_cli.generation.decoding import CompletionRequest, SamplingParams, generate_completions
from dpo_cli.storage.job_log import manifest_path

ROWS = 14


class Rows:
    """Rows whose logits follow from their own tokens, but for an error where a forward pass has certain rows."""

    def __init__(self, prompts: list[list[int]], wrong: Callable[[str, int], bool]) -> None:
        self.tokens, self.wrong = [list(prompt) for prompt in prompts], wrong

    def prefill(self) -> Tensor:
        return self.logits("prefill")

    def decode(self, tokens: Tensor) -> Tensor:
        self.tokens = [ids + [token] for ids, token in zip(self.tokens, tokens.tolist(), strict=True)]
        return self.logits("decode")

    def select(self, rows: Tensor) -> None:
        self.tokens = [self.tokens[row] for row in rows.tolist()]

    def logits(self, what: str) -> Tensor:
        error = 2.0**-20 if self.wrong(what, len(self.tokens)) else 0.0
        return (
            torch.stack([torch.randn(9, generator=torch.Generator().manual_seed(sum(ids))) for ids in self.tokens])
            + error
        )


@pytest.mark.parametrize(
    ("wrong", "invariant"),
    [
        (lambda what, rows: False, True),
        (lambda what, rows: True, True),  # the same error alone
        (lambda what, rows: what == "prefill" and rows > 1, False),
        (lambda what, rows: what == "decode" and rows >= ROWS, False),
        (lambda what, rows: what == "decode" and 2 < rows < ROWS, False),
    ],
    ids=["exact", "always off", "prefill off", "many rows off", "few rows off"],
)
def test_logits_that_depend_on_the_number_of_rows_are_noticed(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[str, int], bool], invariant: bool
) -> None:
    monkeypatch.setattr(batch_probe, "rows_of", lambda _, prompts, __: Rows(prompts, wrong))
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [6, 7], [8]]
    assert batch_invariant(tiny(), prompts, ROWS, CPU) is invariant


def test_where_memory_runs_out_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(batch_probe, "rows_of", exhausted)
    assert batch_invariant(tiny(), [[1, 2]], ROWS, CPU) is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_the_probe_says_so_a_completion_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    """Prompts whose lengths differ by hundreds of tokens: every row has its own width."""
    model = tiny("llama", max_position_embeddings=1024, hidden_size=64, head_dim=16).to(dtype)
    random = np.random.default_rng(1)
    prompts = [random.integers(2, VOCABULARY, length).tolist() for length in (400, 300, 290, 100, 40, 31, 4)]
    requests = [CompletionRequest(prompt, 3, number) for prompt in prompts for number in range(2)]

    def completed(some: list[CompletionRequest]) -> list[list[int]]:
        found = generate_completions(model, some, SamplingParams(20, 0.7), {-1}, CPU)
        return [one.token_ids for one in found]

    if batch_invariant(model, prompts, ROWS, CPU):
        together = completed(requests)
        assert [completed([request])[0] for request in requests] == together
        assert completed(requests[4:9]) == together[4:9]


def test_prompts_may_take_all_positions_that_a_model_has_learned() -> None:
    model = tiny("gpt2", max_position_embeddings=16)
    prompts = [list(range(2, 18)), [3, 4]]
    assert isinstance(batch_invariant(model, prompts, 4, CPU), bool)
    requests = [CompletionRequest(prompt) for prompt in prompts]
    found = generate_completions(model, requests, SamplingParams(1), {-1}, CPU)
    with torch.no_grad():
        likeliest = [int(model(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in prompts]
    assert [one.token_ids for one in found] == [[token] for token in likeliest]


@pytest.mark.parametrize(
    ("invariant", "line"),
    [
        (True, "batch_size  changes no completion here: logits are the same alone and among 4 rows\n"),
        (
            False,
            "batch_size  may change single tokens here: in float32 on cpu logits depend on the other rows of a batch\n",
        ),
    ],
)
def test_screen_and_manifest_say_whether_completions_depend_on_the_batch_size(
    command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invariant: bool, line: str
) -> None:
    asked = []

    def probe(model: Any, prompts: list[list[int]], rows: int, *_: Any) -> bool:
        asked.append((len(prompts), rows))
        return invariant

    monkeypatch.setattr(sampler, "batch_invariant", probe)
    (tmp_path / "prompts.txt").write_text("Hello\nWhy?\n")
    output = tmp_path / "samples.jsonl"
    words = ("model=tiny", "model.dtype=float32", f"prompts={tmp_path / 'prompts.txt'}", "n=2", "max_new_tokens=4")
    ended = command("dpo-sample", *words, f"output={output}")
    assert ended.code == 0, ended.err
    assert line in ended.out
    assert asked == [(2, 4)]
    assert json.loads(manifest_path(output).read_text())["batch_invariant"] is invariant
