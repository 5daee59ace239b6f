"""Reward models of others: the score of a whole conversation, alone as in company, and who is taken for one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, write_jsonl
from tiny_models import CPU, SHAPE

from dpo_cli.data.samples import Sample
from dpo_cli.labelling import classifier, judges
from dpo_cli.labelling.classifier import scores
from dpo_cli.models.dtype import Decision

Command = Callable[..., Ended]
PROMPT = "Tell me about tea."
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "More."}]
ANSWERS = ["A leaf in water.", "No.", "I would rather not say, you see."]


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, which a CPU may choose, roundings would hide what is compared."""
    monkeypatch.setattr(judges, "ref_dtype", lambda *_: Decision(torch.float32, "for the test"))


def saved(folder: Path, tokenizer: Any, family: str, labels: int = 1, **changes: Any) -> Any:
    """A small random sequence-classification model on disk, and in memory as transformers has it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 400, "num_labels": labels, **changes}
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # larger weights, so that differences show
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def judged(command: Command, folder: Path, judge: Path, *words: str) -> list[dict[str, Any]]:
    rows = [{"prompt": PROMPT, "responses": ANSWERS}, {"prompt": TURNS, "responses": ANSWERS[:2]}]
    samples = write_jsonl(folder / "s.jsonl", rows)
    output = folder / "labels.jsonl"
    ended = command("dpo-label", f"samples={samples}", "by=reward", f"judge={judge}", f"output={output}", *words)
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def rewards(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """By prompt and response; one response has one reward in all its pairs."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        for side in ("chosen", "rejected"):
            key = json.dumps(row["prompt"]), row[side]
            assert found.setdefault(key, row[f"reward_{side}"]) == row[f"reward_{side}"]
    return found


@pytest.mark.parametrize("pad", [None, 2])  # 2 is the token that closes an answer
def test_a_decoder_scores_a_conversation_at_its_last_token(
    command: Command, tmp_path: Path, tiny_tokenizer: Any, pad: int | None
) -> None:
    model = saved(tmp_path / "judge", tiny_tokenizer, "llama", pad_token_id=pad)
    model.config.pad_token_id = None  # alone, transformers then reads the last token
    found = rewards(judged(command, tmp_path, tmp_path / "judge"))
    assert len(found) == 5 and len({round(value, 4) for value in found.values()}) == 5
    for (prompt, answer), reward in found.items():
        written = json.loads(prompt)
        turns = [{"role": "user", "content": written}] if isinstance(written, str) else written
        turns = [*turns, {"role": "assistant", "content": answer}]
        ids = tiny_tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True).input_ids
        with torch.no_grad():
            assert reward == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-4)


def test_an_encoder_without_a_chat_template_reads_prompt_and_answer_as_a_pair(
    command: Command, tmp_path: Path, tiny_path: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = None
    model = saved(tmp_path / "judge", tokenizer, "bert")
    (tmp_path / "judge" / "chat_template.jinja").unlink(missing_ok=True)
    found = rewards(judged(command, tmp_path, tmp_path / "judge"))
    for answer in ANSWERS:
        ids = torch.tensor([tokenizer(PROMPT, answer).input_ids])
        with torch.no_grad():
            expected = float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
        assert found[json.dumps(PROMPT), answer] == pytest.approx(expected, abs=1e-4)


def test_the_other_sequences_of_a_batch_change_no_score(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [[5 + number % 7, *range(10, 10 + number)] for number in (3, 30, 1, 30, 12)]
    for family in ("llama", "gpt2", "bert"):
        model = saved(tmp_path / family, tiny_tokenizer, family)
        together = scores(model, sequences, CPU)
        monkeypatch.setattr(classifier, "BATCH_SIZE", 1)
        assert together == pytest.approx(scores(model, sequences, CPU), abs=1e-4)
        monkeypatch.undo()
        assert together[1] == pytest.approx(together[3], abs=1e-5) and len({round(one, 4) for one in together}) == 4


def test_what_is_no_reward_model_is_refused(command: Command, tmp_path: Path, tiny_tokenizer: Any) -> None:
    saved(tmp_path / "two", tiny_tokenizer, "llama", labels=2)
    saved(tmp_path / "one", tiny_tokenizer, "llama")
    samples = write_jsonl(tmp_path / "s.jsonl", [{"prompt": PROMPT, "responses": ANSWERS}])
    for words, code, says in (
        (("by=reward", f"judge={tmp_path / 'two'}"), 4, f"{tmp_path / 'two'}: has 2 labels; a reward model has one"),
        (("by=implicit", f"judge={tmp_path / 'one'}"), 2,
         f"judge={tmp_path / 'one'}: is a reward model; set by=reward"),
        (("by=reward", f"judge={tmp_path / 'one'}", "layout=packed"), 2,
         "layout=packed: is not supported for a reward model from the hub; leave it out"),
        (("by=reward", "judge=dpo-cli/tiny-random"), 2,
         "judge=dpo-cli/tiny-random: is not a reward model; set by=implicit for a DPO run's implicit reward, or train "
         "a reward model with dpo-train objective=reward"),
    ):  # fmt: skip
        ended = command("dpo-label", f"samples={samples}", *words)
        assert (ended.code, ended.err) == (code, f"error: {says}\n")


def test_a_conversation_that_does_not_fit_loses_its_beginning_and_is_counted(
    command: Command, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    saved(tmp_path / "judge", tiny_tokenizer, "llama", max_position_embeddings=90)
    samples = write_jsonl(
        tmp_path / "s.jsonl", [{"prompt": "tea " * 50, "responses": ANSWERS}, {"prompt": "?", "responses": ["a", "b"]}]
    )
    ended = command("dpo-label", f"samples={samples}", "by=reward", f"judge={tmp_path / 'judge'}")
    assert ended.code == 0, ended.err
    assert "reads 90 tokens" in ended.out and "the judge truncated 1 prompt and 0 responses" in ended.out


def test_the_answer_is_what_is_read_of_a_long_conversation(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = saved(tmp_path / "judge", tiny_tokenizer, "llama")
    sample = Sample("id", "tea " * 50, ("Yes, it is.", "No, it is not."))
    judge = judges.ClassifierJudge("judge", {}, model, tiny_tokenizer, 30, CPU)
    (rewards,) = judge.rewards([sample], lambda: None)
    turns = [[{"role": "user", "content": "tea " * 50}, {"role": "assistant", "content": x}] for x in sample.responses]
    ids = [tiny_tokenizer.apply_chat_template(one, tokenize=True, return_dict=False)[-30:] for one in turns]
    assert rewards == pytest.approx(scores(model, ids, CPU, lambda: None)) and rewards[0] != rewards[1]


def test_it_judges_a_match(command: Command, tmp_path: Path, tiny_tokenizer: Any, tiny_path: str) -> None:
    saved(tmp_path / "judge", tiny_tokenizer, "llama")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": PROMPT}, {"prompt": TURNS}])
    ended = command("dpo-rank", f"checkpoints=[dpo-cli/tiny-random,{tiny_path}]", f"judge={tmp_path / 'judge'}",
                    f"prompts={prompts}", "max_new_tokens=6", "prior=1")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "a reward model (LlamaForSequenceClassification)" in ended.out
