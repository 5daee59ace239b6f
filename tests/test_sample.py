"""dpo-sample: what a row holds, which prompts are answered, what a policy says, and how a job goes on."""

import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, sample_rows, write_jsonl

from dpo_cli.commands import sample as command_module
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.generation import sampler as sampling
from dpo_cli.generation.decoding import Answer, Decoding
from dpo_cli.generation.generate import REDRAWS, distinct_answers, said_by
from dpo_cli.storage.job_log import journal_of, manifest_of, opened_journal

Command = Callable[..., Ended]
Trained = Callable[..., Path]
PROMPTS = ["Tell me about cats.", "Why does it rain, and where does the water go?", "Bread?", "Is the moon far?"]
DRAWING = ("model=tiny", "model.dtype=float32", "max_new_tokens=8")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def drawn(command: Command, prompts: Path, output: Path, *words: object) -> list[dict[str, Any]]:
    ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={output}", *words)
    assert ended.code == 0, ended.err
    return rows(output)


def answers(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {row["prompt"]: row["responses"] for row in found}


# What is drawn


def test_a_row_says_what_was_drawn_from_what_and_the_manifest_counts(
    command: Command, prompts: Path, tmp_path: Path
) -> None:
    found = drawn(command, prompts, tmp_path / "out.jsonl", "n=3", "top_p=0.9", "temperature=0.8", "seed=5")
    assert list(found[0]) == [
        "id", "prompt", "responses", "tokens", "finished", "index", "model", "weights", "template", "temperature",
        "top_p", "seed",
    ]  # fmt: skip
    for row in found:
        assert len(row["responses"]) == len(set(row["responses"])) == len(row["tokens"]) == len(row["finished"]) == 3
        # An answer that did not end has every token that it may have; one that did has fewer.
        assert all((tokens == 8) != ended for tokens, ended in zip(row["tokens"], row["finished"], strict=True))
        assert (row["template"], row["temperature"], row["top_p"], row["seed"]) == ("chat", 0.8, 0.9, 5)
    assert len({row["id"] for row in found}) == 4 and len({row["weights"] for row in found}) == 1
    made = json.loads(manifest_of(tmp_path / "out.jsonl").read_text())
    cut = sum(row["finished"].count(False) for row in found)
    counts = ("samples", "answers", "dropped", "fewer_than_asked", "cut_at_the_limit")
    assert [made[key] for key in counts] == [4, 12, {}, 0, cut]
    assert (made["job"]["n"], made["job"]["dtype"], made["job"]["device"]) == (3, "float32", "cpu")


def test_answers_do_not_depend_on_the_size_of_the_batch(command: Command, prompts: Path, tmp_path: Path) -> None:
    together = drawn(command, prompts, tmp_path / "auto.jsonl")
    assert drawn(command, prompts, tmp_path / "one.jsonl", "batch_size=1") == together


def test_more_answers_begin_with_the_ones_that_fewer_gave(command: Command, prompts: Path, tmp_path: Path) -> None:
    """An answer is drawn by its number: asking for four keeps the first."""
    one, four = (answers(drawn(command, prompts, tmp_path / f"{n}.jsonl", f"n={n}")) for n in (1, 4))
    assert {prompt: found[:1] for prompt, found in four.items()} == one
    assert {len(found) for found in four.values()} == {4}


def test_one_answer_is_called_one_and_is_not_sent_to_be_compared(
    command: Command, prompts: Path, tmp_path: Path
) -> None:
    ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={tmp_path / 'one.jsonl'}", "n=1", "limit=1")
    assert "drawing   1 answer a prompt, temperature 1, top_p 1, at most 8 tokens, seed 0\n" in ended.out
    assert "\ndone     1 sample of 1 answer in " in ended.out and "dpo-label" not in ended.out


@pytest.mark.parametrize("temperature", ["0.01", "1.0"])
def test_the_same_answer_again_is_redrawn_then_left_out_and_counted(
    command: Command, tmp_path: Path, temperature: str
) -> None:
    """One token at a temperature at which there is only one, or from a nucleus of one: no second answer is possible."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS])
    words = ("max_new_tokens=1", f"temperature={temperature}", "top_p=0.0001", f"prompts={prompts}")
    ended = command("dpo-sample", *DRAWING, *words, f"output={tmp_path / 'o.jsonl'}")
    assert ended.code == 3
    assert ended.err == f"error: {prompts}: no prompt got two different answers; a higher temperature helps\n"
    assert not (tmp_path / "o.jsonl").exists()
    alone = command("dpo-sample", *DRAWING, *words, f"output={tmp_path / 'one.jsonl'}", "n=1")
    assert alone.code == 0 and len(rows(tmp_path / "one.jsonl")) == 4


def test_samples_with_fewer_answers_and_prompts_without_two_are_counted(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four prompts the second keeps one answer of three and the third two."""
    real = sampling.distinct_answers

    def scarce(*arguments: Any) -> list[Any]:
        found = real(*arguments)
        return [texts[: {1: 1, 2: 2}.get(PROMPTS.index(known[tuple(ids)]), 3)]
                for ids, texts in zip(arguments[2], found, strict=True)]  # fmt: skip

    known: dict[tuple[int, ...], str] = {}
    encode = PairEncoder.encode_prompts

    def noted(self: PairEncoder, asked: list[Any]) -> list[list[int]]:
        found = encode(self, asked)
        known.update({tuple(ids): prompt.messages[-1].content for ids, prompt in zip(found, asked, strict=True)})
        return found

    monkeypatch.setattr(PairEncoder, "encode_prompts", noted)
    monkeypatch.setattr(sampling, "distinct_answers", scarce)
    output = tmp_path / "out.jsonl"
    ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={output}", "n=3")
    assert ended.code == 0, ended.err
    assert [(row["prompt"], len(row["responses"])) for row in rows(output)] == [
        (PROMPTS[0], 3), (PROMPTS[2], 2), (PROMPTS[3], 3),
    ]  # fmt: skip
    assert "         left out 1 prompt whose answers came out the same, redrawn or not\n" in ended.out
    assert "         1 sample with fewer answers: the others came out the same\n" in ended.out
    made = json.loads(manifest_of(output).read_text())
    assert (made["samples"], made["answers"], made["dropped"], made["fewer_than_asked"]) == (3, 8, {"identical": 1}, 1)


def test_an_answer_that_is_there_already_is_redrawn_four_times_and_no_more(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is drawn says the same: 2 answers are asked for at first, then 1 in each of the redraws, 2 to 5."""
    from dpo_cli.generation import generate

    asked: list[list[int]] = []

    def same(_: Any, draws: list[Any], *__: Any) -> list[Answer]:
        asked.append([draw.number for draw in draws])
        return [Answer([65], True) for _ in draws]

    monkeypatch.setattr(generate, "draw_answers", same)
    monkeypatch.setattr(generate, "end_tokens", lambda *_: {0})
    encoder = PairEncoder(tiny_tokenizer, "plain")
    found = distinct_answers(None, encoder, [[1, 2]], 2, Decoding(1, 1.0), 0, sampling.torch.device("cpu"))
    assert [len(texts) for texts in found] == [1]
    assert asked == [[0, 1], [2], [3], [4], [5]] and REDRAWS == 4


def test_special_tokens_that_a_model_emits_are_no_text(tiny_tokenizer: Any) -> None:
    special, word = tiny_tokenizer.all_special_ids, tiny_tokenizer.encode("word", add_special_tokens=False)
    assert len(special) >= 2
    for kind in ("chat", "plain"):
        for token in special:
            text = said_by(PairEncoder(tiny_tokenizer, kind), Answer([*word, token, *word], False))
            assert (text.text, text.tokens, text.ended) == ("wordword", 2 * len(word) + 1, False)


def test_an_answer_that_was_cut_within_a_character_ends_before_it(tiny_tokenizer: Any) -> None:
    encoder = PairEncoder(tiny_tokenizer, "plain")
    tokens = tiny_tokenizer("good \N{EARTH GLOBE EUROPE-AFRICA}", add_special_tokens=False).input_ids
    assert said_by(encoder, Answer(tokens, False)).text == "good \N{EARTH GLOBE EUROPE-AFRICA}"
    for lost in (1, 2, 3):
        cut = said_by(encoder, Answer(tokens[:-lost], False))
        assert (cut.text, cut.tokens) == ("good ", len(tokens) - lost)
    assert said_by(encoder, Answer(tokens[:-1], True)).text == "good \ufffd"  # the model itself ended there


def test_white_space_around_an_answer_goes_under_a_template_and_stays_in_plain_text(tiny_tokenizer: Any) -> None:
    tokens = tiny_tokenizer.encode(" yes \n", add_special_tokens=False)
    assert said_by(PairEncoder(tiny_tokenizer, "chat"), Answer(tokens, True)).text == "yes"
    assert said_by(PairEncoder(tiny_tokenizer, "plain"), Answer(tokens, True)).text == " yes \n"


def test_a_plain_template_asks_with_the_prompt_as_it_stands(command: Command, prompts: Path, tmp_path: Path) -> None:
    chat, plain = (
        drawn(command, prompts, tmp_path / f"{kind}.jsonl", f"template={kind}") for kind in ("chat", "plain")
    )
    assert {row["template"] for row in plain} == {"plain"}
    assert all(answers(chat)[prompt] != answers(plain)[prompt] for prompt in PROMPTS)


# Which prompts


def test_prompts_left_out_are_counted_by_reason(command: Command, tmp_path: Path) -> None:
    """Eight rows: a bad one, an empty one, a repeated one and a long one are left out, four are kept.

    The same words as text and as messages are two prompts: a plain template reads them otherwise.
    """
    turns = [{"role": "user", "content": "Bread?"}]
    content = [
        {"prompt": "Bread?"}, {"question": "x"}, {"prompt": " \n"}, {"prompt": "Bread?"}, {"prompt": "word " * 200},
        {"prompt": turns}, {"prompt": [{"role": "system", "content": "Be brief."}, *turns]}, {"prompt": "Tea?"},
    ]  # fmt: skip
    file = write_jsonl(tmp_path / "p.jsonl", content)
    output = tmp_path / "o.jsonl"
    words = (f"prompts={file}", f"output={output}", "on_bad_row=skip", "max_prompt_length=100")
    ended = command("dpo-sample", *DRAWING, *words)
    assert ended.code == 0, ended.err
    assert [row["index"] for row in rows(output)] == [0, 5, 6, 7]
    dropped = json.loads(manifest_of(output).read_text())["dropped"]
    assert dropped == {"bad_row": 1, "empty": 1, "duplicate": 1, "prompt_too_long": 1}
    assert (
        f"prompts   4 prompts of 8 rows from {file}\n"
        "          left out 1 that held none\n"
        "          left out 1 that were empty\n"
        "          left out 1 that stood there before\n"
        "          left out 1 over max_prompt_length\n"
    ) in ended.out


def test_the_limit_counts_rows_of_the_file(command: Command, prompts: Path, tmp_path: Path) -> None:
    assert [row["index"] for row in drawn(command, prompts, tmp_path / "o.jsonl", "limit=2")] == [0, 1]


def test_prompts_that_are_all_too_long_are_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    words = (f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}", "max_prompt_length=3")
    ended = command("dpo-sample", *DRAWING, *words)
    assert ended.code == 3
    assert ended.err == f"error: {prompts}: all prompts are longer than max_prompt_length=3\n"
    assert not journal_of(tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ": no prompt in it (the file has no rows)"),
        (b'{"prompt": ""}\n{"prompt": " "}\n', ": no prompt in it (2 empty)"),
    ],
)
def test_a_file_without_a_prompt_is_refused(command: Command, tmp_path: Path, content: bytes, error: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    ended = command("dpo-sample", *DRAWING, f"prompts={file}", f"output={tmp_path / 'o.jsonl'}")
    assert ended.code == 3 and ended.err.startswith(f"error: {file}{error}"), ended.err


def test_a_line_of_text_that_is_not_utf_8_is_named(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"fine\n\ncaf\xe9\n")
    words = (f"prompts={file}", f"output={tmp_path / 'o.jsonl'}")
    ended = command("dpo-sample", *DRAWING, *words)
    assert ended.code == 3
    assert ended.err == (
        f"error: {file} line 3: not UTF-8 at byte 4 (on_bad_row=skip counts and leaves out such rows)\n"
    )
    assert command("dpo-sample", *DRAWING, *words, "on_bad_row=skip").code == 0


def test_hostile_prompts_and_names_never_reach_the_screen_raw(command: Command, tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202eevil"
    file = write_jsonl(tmp_path / f"{hostile}.jsonl", [{"prompt": hostile}, {hostile: "x"}])
    words = (f"prompts='{file}'", f"output='{tmp_path / hostile}-out.jsonl'")
    refused = command("dpo-sample", *DRAWING, *words)
    assert refused.code == 3 and "\\x1b]0;owned\\x07" in refused.err
    ended = command("dpo-sample", *DRAWING, *words, "on_bad_row=skip")
    assert ended.code == 0, ended.err
    for shown in (refused.out, refused.err, ended.out, ended.err):
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    (row,) = rows(tmp_path / f"{hostile}-out.jsonl")
    assert row["prompt"] == hostile


# Whose answers


def test_a_checkpoint_answers_as_its_policy_which_is_its_base_where_training_did_not_move_it(
    command: Command, trained: Trained, prompts: Path, tmp_path: Path
) -> None:
    base = answers(drawn(command, prompts, tmp_path / "base.jsonl"))
    for name, rate, moved in (("still", "1e-12", False), ("far", "0.1", True)):
        run = trained(name, f"optimizer.lr={rate}")
        output = tmp_path / f"{name}.jsonl"
        told = (f"checkpoint={run}", f"prompts={prompts}", f"output={output}", "max_new_tokens=8")
        ended = command("dpo-sample", *told)
        assert ended.code == 0, ended.err
        assert (answers(rows(output)) != base) is moved
        assert {row["model"] for row in rows(output)} == {str(run / "final")}
        assert "dtype     float32: as in training\n" in ended.out
    weights = [rows(tmp_path / f"{name}.jsonl")[0]["weights"] for name in ("base", "still", "far")]
    assert len(set(weights)) == 3  # an adapter's weights count, however small


def test_a_checkpoint_beside_a_model_is_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    ended = command("dpo-sample", "model=tiny", f"checkpoint={tmp_path}", f"prompts={prompts}")
    assert ended.code == 2
    assert ended.err == "error: model=tiny: checkpoint= names the model already; leave one of them out\n"


def test_a_reward_model_gives_no_answers(command: Command, pairs_file: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "reward"
    training = ("model=tiny", "data=jsonl", f"data.train={pairs_file}", "batch_size=4", "max_steps=1")
    assert command("dpo-train", *training, "objective=reward", f"output_dir={run}").code == 0
    ended = command("dpo-sample", f"checkpoint={run}", f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}")
    assert ended.code == 2
    assert ended.err == f"error: {run / 'final'}: is a reward model, which gives no answers\n"


def test_a_run_on_dialogues_in_plain_text_answers_in_plain_text(
    command: Command, trained: Trained, prompts: Path, tmp_path: Path
) -> None:
    run = trained("plain", "data.template=plain")
    told = (f"checkpoint={run}", f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}", "max_new_tokens=4")
    assert command("dpo-sample", *told).code == 0
    assert {row["template"] for row in rows(tmp_path / "o.jsonl")} == {"plain"}


def test_preference_pairs_serve_as_prompts(command: Command, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sample_rows(3))
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": row["prompt"]} for row in sample_rows(3)])
    assert drawn(command, pairs, tmp_path / "a.jsonl") == drawn(command, bare, tmp_path / "b.jsonl")


# How it goes on


def test_a_signal_stops_with_75_and_the_same_command_goes_on_to_the_same_bytes(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches; the signal comes while the third is drawn, whose answers so far are lost."""
    drawn(command, prompts, tmp_path / "straight.jsonl", "batch_size=1")
    real, calls = sampling.distinct_answers, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[2])
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(sampling, "distinct_answers", counted)
    output = tmp_path / "stopped.jsonl"
    words = (*DRAWING, f"prompts={prompts}", f"output={output}", "batch_size=1")
    stopped = command("dpo-sample", *words)
    assert stopped.code == 75
    assert stopped.err.endswith(f"error: stopped by SIGTERM; go on with the same command and output={output}\n")
    assert not output.exists() and len(journal_of(output).read_bytes().splitlines()) == 1 + 2
    resumed = command("dpo-sample", *words)
    assert resumed.code == 0 and "going on: 2 prompts of 4 were answered\n" in resumed.out
    assert len(calls) == 3 + 2  # the third again, and the fourth
    assert output.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert not journal_of(output).exists()


def test_a_journal_that_is_begun_is_gone_on_with_by_the_same_settings_alone(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "o.jsonl"
    words = (*DRAWING, f"prompts={prompts}", f"output={output}")
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "finish", interrupted)
        assert command("dpo-sample", *words).code == 130
    before = journal_of(output).read_bytes()
    other = command("dpo-sample", *words, "seed=1", "n=3")
    assert other.code == 2
    assert other.err == (
        f"error: {output}.part: was begun with other settings (n was 2, is 3; seed was 0, is 1); "
        "take the changes back, or name another output\n"
    )
    assert journal_of(output).read_bytes() == before


def test_prompts_that_changed_under_a_journal_are_noticed(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row put before the others: same texts at other places would file the answers under the wrong prompts."""
    output = tmp_path / "o.jsonl"
    drawn(command, prompts, output)
    before = output.read_bytes()
    write_jsonl(prompts, [{"prompt": ""}, *({"prompt": prompt} for prompt in PROMPTS)])
    ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={output}")
    assert ended.code == 2 and f"error: output={output}: was begun with other settings (prompts was " in ended.err
    assert output.read_bytes() == before


def test_two_processes_do_not_write_one_file(command: Command, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    with journal_of(output).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={output}")
    assert ended.code == 2
    assert ended.err == f"error: {output}.part: another process is writing it; wait for it, or name another output\n"
    assert journal_of(output).read_bytes() == b"" and not output.exists()


def test_an_output_that_could_not_be_read_again_is_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    for name in ("o.jsonl.gz", "o.csv", "o"):
        ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={tmp_path / name}")
        says = f"output={tmp_path / name}: must end in .jsonl, which is what is written"
        assert (ended.code, ended.err) == (2, f"error: {says}\n")
    os.mkfifo(tmp_path / "o.jsonl")
    ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}")
    assert (ended.code, ended.err) == (2, f"error: output={tmp_path / 'o.jsonl'}: is no regular file; name another\n")


def test_an_output_that_is_a_folder_or_a_link_is_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    words = (*DRAWING, f"prompts={prompts}")
    folder = command("dpo-sample", *words, f"output={tmp_path}")
    assert folder.code == 2 and folder.err == f"error: output={tmp_path}: is a folder; name a file in it\n"
    (tmp_path / "o.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    link = command("dpo-sample", *words, f"output={tmp_path / 'o.jsonl'}")
    assert link.code == 7
    assert link.err == f"error: {tmp_path / 'o.jsonl'}: is a symbolic link, and is not written through\n"
    assert not (tmp_path / "elsewhere.jsonl").exists()


# The journal


JOB = {"model": "m", "seed": 0}


def test_a_journal_cut_at_any_byte_of_its_last_line_loses_that_line_alone(tmp_path: Path) -> None:
    output, told = tmp_path / "o.jsonl", []
    with opened_journal(output, JOB, ("rows",), told.append) as journal:
        for number in range(3):
            journal.append({"rows": [{"index": number, "responses": ["caf\u00e9", "\u2028\x1b"]}]})
    content = journal_of(output).read_bytes()
    whole = content[: content[:-1].rfind(b"\n") + 1]
    for end in range(len(whole), len(content) + 1):
        journal_of(output).write_bytes(content[:end])
        told.clear()
        with opened_journal(output, JOB, ("rows",), told.append) as journal:
            assert [part["rows"][0]["index"] for part in journal.done] == [0, 1, 2][: 3 if end == len(content) else 2]
            journal.append({"rows": [{"index": 9}]})
        assert bool(told) == (len(whole) < end < len(content))
        kept = content if end == len(content) else whole
        assert journal_of(output).read_bytes() == kept + b'{"rows": [{"index": 9}]}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b"[1]\n",
        b"not JSON\n",
        b'{"journal": 2, "job": {}}\n',
        b"\xff\n",
    ],
)
def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path: Path, line: bytes) -> None:
    path = journal_of(tmp_path / "o.jsonl")
    path.write_bytes(line)
    with pytest.raises(DataError) as refused, opened_journal(tmp_path / "o.jsonl", JOB, ("rows",), print):
        pass
    said = "is not what this program writes; remove the file to begin anew"
    assert str(refused.value) == f"{path} line 1: {said}"
    assert path.read_bytes() == line


def test_a_line_of_a_journal_without_what_a_part_holds_is_named(tmp_path: Path) -> None:
    with opened_journal(tmp_path / "o.jsonl", JOB, ("rows",), print) as journal:
        journal.append({"rows": []})
        journal.append({"part": 1})
    with pytest.raises(DataError, match="line 3: is not what this program writes"):
        opened_journal(tmp_path / "o.jsonl", JOB, ("rows",), print).__enter__()


def test_a_journal_of_another_job_says_what_differs(tmp_path: Path) -> None:
    with opened_journal(tmp_path / "o.jsonl", JOB, ("rows",), print):
        pass
    with (
        pytest.raises(ConfigError) as refused,
        opened_journal(tmp_path / "o.jsonl", {"model": "m", "n": 2}, ("rows",), print),
    ):
        pass
    differs = "(n was not there, is 2; seed was 0, is not there)"
    assert f"o.jsonl.part: was begun with other settings {differs}; take the changes back" in str(refused.value)
