"""dpo-sample: the rows, the prompts, the model, and how a stopped job resumes."""

import fcntl
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Ended, sample_rows, write_jsonl

from dpo_cli.commands import sample as command_module
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.generation import sampler as sampling
from dpo_cli.generation.decoding import Completion, SamplingParams
from dpo_cli.generation.generate import MAX_RETRIES, completion_text, distinct_completions
from dpo_cli.storage.job_log import JobLog, finish_job, is_done, job_log_path, manifest_path, open_job_log

Command = Callable[..., Ended]
Trained = Callable[..., Path]
PROMPTS = ["Tell me about cats.", "Why does it rain, and where does the water go?", "Bread?", "Is the moon far?"]
OPTIONS = ("model=tiny", "model.dtype=float32", "max_new_tokens=8")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sampled(command: Command, prompts: Path, output: Path, *words: object) -> list[dict[str, Any]]:
    ended = command("dpo-sample", *OPTIONS, f"prompts={prompts}", f"output={output}", *words)
    assert ended.code == 0, ended.err
    return rows(output)


def responses(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {row["prompt"]: row["responses"] for row in found}


# Rows


def test_a_row_names_its_model_and_parameters_and_the_manifest_has_counts(
    command: Command, prompts: Path, tmp_path: Path
) -> None:
    found = sampled(command, prompts, tmp_path / "out.jsonl", "n=3", "top_p=0.9", "temperature=0.8", "seed=5")
    assert list(found[0]) == [
        "id", "prompt", "responses", "tokens", "finish_reason", "index", "model", "weights", "template", "temperature",
        "top_p", "seed",
    ]  # fmt: skip
    for row in found:
        assert (
            len(row["responses"]) == len(set(row["responses"])) == len(row["tokens"]) == len(row["finish_reason"]) == 3
        )
        # A completion of finish reason length has every token that it may have; others have fewer.
        reasons = ["length" if tokens == 8 else "stop" for tokens in row["tokens"]]
        assert row["finish_reason"] == reasons
        assert (row["template"], row["temperature"], row["top_p"], row["seed"]) == ("chat", 0.8, 0.9, 5)
    assert len({row["id"] for row in found}) == 4 and len({row["weights"] for row in found}) == 1
    made = json.loads(manifest_path(tmp_path / "out.jsonl").read_text())
    cut = sum(row["finish_reason"].count("length") for row in found)
    counts = ("samples", "completions", "dropped", "fewer_than_n", "finish_reason_length")
    assert [made[key] for key in counts] == [4, 12, {}, 0, cut]
    assert (made["job"]["n"], made["job"]["dtype"], made["job"]["device"]) == (3, "float32", "cpu")


def test_completions_do_not_depend_on_the_batch_size(command: Command, prompts: Path, tmp_path: Path) -> None:
    together = sampled(command, prompts, tmp_path / "auto.jsonl")
    assert sampled(command, prompts, tmp_path / "one.jsonl", "batch_size=1") == together


def test_another_seed_gives_other_completions(command: Command, prompts: Path, tmp_path: Path) -> None:
    first, other = (
        responses(sampled(command, prompts, tmp_path / f"{seed}.jsonl", "limit=2", f"seed={seed}")) for seed in (0, 1)
    )
    assert first.keys() == other.keys() and not any(first[prompt] == other[prompt] for prompt in first)


def test_a_larger_n_begins_with_the_completions_of_a_smaller_n(command: Command, prompts: Path, tmp_path: Path) -> None:
    """The random numbers of a completion depend on its index: n=4 keeps the first."""
    one, four = (responses(sampled(command, prompts, tmp_path / f"{n}.jsonl", f"n={n}")) for n in (1, 4))
    assert {prompt: found[:1] for prompt, found in four.items()} == one
    assert {len(found) for found in four.values()} == {4}


def test_one_completion_is_singular_and_no_label_command_is_suggested(
    command: Command, prompts: Path, tmp_path: Path
) -> None:
    ended = command("dpo-sample", *OPTIONS, f"prompts={prompts}", f"output={tmp_path / 'one.jsonl'}", "n=1", "limit=1")
    assert "generation  1 completion a prompt, temperature 1, top_p 1, at most 8 tokens, seed 0\n" in ended.out
    assert "\ndone     1 sample of 1 completion in " in ended.out and "dpo-label" not in ended.out


@pytest.mark.parametrize("temperature", ["0.01", "1.0"])
def test_prompts_with_only_one_distinct_completion_are_refused(
    command: Command, tmp_path: Path, temperature: str
) -> None:
    """One token at a very low temperature, or from a nucleus of one token: no second completion is possible."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS])
    words = ("max_new_tokens=1", f"temperature={temperature}", "top_p=0.0001", f"prompts={prompts}")
    ended = command("dpo-sample", *OPTIONS, *words, f"output={tmp_path / 'o.jsonl'}")
    assert ended.code == 3
    assert ended.err == f"error: {prompts}: no prompt has two different completions; raise temperature or top_p\n"
    assert not (tmp_path / "o.jsonl").exists()
    alone = command("dpo-sample", *OPTIONS, *words, f"output={tmp_path / 'one.jsonl'}", "n=1")
    assert alone.code == 0 and len(rows(tmp_path / "one.jsonl")) == 4


def test_samples_with_fewer_completions_and_prompts_without_two_are_counted(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four prompts the second keeps one completion of three and the third two."""
    real = sampling.distinct_completions

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
    monkeypatch.setattr(sampling, "distinct_completions", scarce)
    output = tmp_path / "out.jsonl"
    ended = command("dpo-sample", *OPTIONS, f"prompts={prompts}", f"output={output}", "n=3")
    assert ended.code == 0, ended.err
    assert [(row["prompt"], len(row["responses"])) for row in rows(output)] == [
        (PROMPTS[0], 3), (PROMPTS[2], 2), (PROMPTS[3], 3),
    ]  # fmt: skip
    assert "         dropped 1 prompt without two different completions\n" in ended.out
    assert "         1 sample with fewer than 3 different completions\n" in ended.out
    made = json.loads(manifest_path(output).read_text())
    assert (made["samples"], made["completions"], made["dropped"], made["fewer_than_n"]) == (3, 8, {"identical": 1}, 1)


def test_a_repeated_completion_is_generated_again_at_most_four_times(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All completions are equal: 2 are requested at first, then 1 in each of the retries, with index 2 to 5."""
    from dpo_cli.generation import generate

    requested: list[list[int]] = []

    def same(_: Any, requests: list[Any], *__: Any) -> list[Completion]:
        requested.append([request.index for request in requests])
        return [Completion([65], FinishReason.STOP) for _ in requests]

    monkeypatch.setattr(generate, "generate_completions", same)
    monkeypatch.setattr(generate, "stop_token_ids", lambda *_: {0})
    encoder = PairEncoder(tiny_tokenizer, "plain")
    found = distinct_completions(None, encoder, [[1, 2]], 2, SamplingParams(1, 1.0), 0, sampling.torch.device("cpu"))
    assert [len(texts) for texts in found] == [1]
    assert requested == [[0, 1], [2], [3], [4], [5]] and MAX_RETRIES == 4


def test_special_tokens_that_a_model_generates_are_not_in_the_text(tiny_tokenizer: Any) -> None:
    special, word = tiny_tokenizer.all_special_ids, tiny_tokenizer.encode("word", add_special_tokens=False)
    assert len(special) >= 2
    for kind in ("chat", "plain"):
        for token in special:
            text = completion_text(PairEncoder(tiny_tokenizer, kind), Completion([*word, token, *word]))
            assert (text.text, text.tokens, text.finish_reason) == ("wordword", 2 * len(word) + 1, "length")


def test_a_completion_cut_within_a_character_ends_before_it(tiny_tokenizer: Any) -> None:
    encoder = PairEncoder(tiny_tokenizer, "plain")
    tokens = tiny_tokenizer("good \N{EARTH GLOBE EUROPE-AFRICA}", add_special_tokens=False).input_ids
    assert completion_text(encoder, Completion(tokens)).text == "good \N{EARTH GLOBE EUROPE-AFRICA}"
    for lost in (1, 2, 3):
        cut = completion_text(encoder, Completion(tokens[:-lost]))
        assert (cut.text, cut.tokens) == ("good ", len(tokens) - lost)
    assert (
        completion_text(encoder, Completion(tokens[:-1], FinishReason.STOP)).text == "good \ufffd"
    )  # the model itself stopped there


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_white_space_around_a_completion_stays_where_the_template_keeps_it(tiny_tokenizer: Any, template: str) -> None:
    tokens = tiny_tokenizer.encode(" yes \n", add_special_tokens=False)
    encoder = PairEncoder(tiny_tokenizer, template)  # ChatML, which trims no answer
    assert completion_text(encoder, Completion(tokens, FinishReason.STOP)).text == " yes \n"


def test_a_plain_template_gives_the_model_the_prompt_as_it_is(command: Command, prompts: Path, tmp_path: Path) -> None:
    chat, plain = (
        sampled(command, prompts, tmp_path / f"{kind}.jsonl", f"template={kind}") for kind in ("chat", "plain")
    )
    assert {row["template"] for row in plain} == {"plain"}
    assert all(responses(chat)[prompt] != responses(plain)[prompt] for prompt in PROMPTS)


# Which prompts


def test_dropped_prompts_are_counted_by_reason(command: Command, tmp_path: Path) -> None:
    """Eight rows: a bad one, an empty one, a repeated one and a long one are dropped, four are kept.

    The same words as text and as messages are two prompts, which a plain template renders differently.
    """
    turns = [{"role": "user", "content": "Bread?"}]
    content = [
        {"prompt": "Bread?"}, {"question": "x"}, {"prompt": " \n"}, {"prompt": "Bread?"}, {"prompt": "word " * 200},
        {"prompt": turns}, {"prompt": [{"role": "system", "content": "Be brief."}, *turns]}, {"prompt": "Tea?"},
    ]  # fmt: skip
    file = write_jsonl(tmp_path / "p.jsonl", content)
    output = tmp_path / "o.jsonl"
    words = (f"prompts={file}", f"output={output}", "on_bad_row=skip", "max_prompt_length=100")
    ended = command("dpo-sample", *OPTIONS, *words)
    assert ended.code == 0, ended.err
    assert [row["index"] for row in rows(output)] == [0, 5, 6, 7]
    dropped = json.loads(manifest_path(output).read_text())["dropped"]
    assert dropped == {"bad_row": 1, "empty": 1, "duplicate": 1, "prompt_too_long": 1}
    assert (
        f"prompts     4 prompts of 8 rows from {file}\n"
        "            dropped 1 prompt (not readable)\n"
        "            dropped 1 prompt (empty)\n"
        "            dropped 1 prompt (repeated)\n"
        "            dropped 1 prompt (longer than max_prompt_length)\n"
    ) in ended.out


def test_the_limit_counts_rows_of_the_file(command: Command, prompts: Path, tmp_path: Path) -> None:
    assert [row["index"] for row in sampled(command, prompts, tmp_path / "o.jsonl", "limit=2")] == [0, 1]


def test_prompts_that_are_all_too_long_are_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    words = (f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}", "max_prompt_length=3")
    ended = command("dpo-sample", *OPTIONS, *words)
    assert ended.code == 3
    assert ended.err == f"error: {prompts}: every prompt is longer than max_prompt_length=3; raise it\n"
    assert not job_log_path(tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ": has no rows; name a file with prompts"),
        (b'{"prompt": ""}\n{"prompt": " "}\n', ": all prompts were dropped: 2 empty"),
    ],
)
def test_a_file_without_a_prompt_is_refused(command: Command, tmp_path: Path, content: bytes, error: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    ended = command("dpo-sample", *OPTIONS, f"prompts={file}", f"output={tmp_path / 'o.jsonl'}")
    assert ended.code == 3 and ended.err == f"error: {file}{error}\n"


def test_a_line_of_text_that_is_not_utf_8_is_named(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"fine\n\ncaf\xe9\n")
    words = (f"prompts={file}", f"output={tmp_path / 'o.jsonl'}")
    ended = command("dpo-sample", *OPTIONS, *words)
    assert ended.code == 3
    assert ended.err == (f"error: {file} line 3: not UTF-8 at byte 4 (on_bad_row=skip counts and drops such rows)\n")
    assert command("dpo-sample", *OPTIONS, *words, "on_bad_row=skip").code == 0


def test_hostile_prompts_and_names_never_reach_the_screen_raw(command: Command, tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202eevil"
    file = write_jsonl(tmp_path / f"{hostile}.jsonl", [{"prompt": hostile}, {hostile: "x"}])
    words = (f"prompts='{file}'", f"output='{tmp_path / hostile}-out.jsonl'")
    refused = command("dpo-sample", *OPTIONS, *words)
    assert refused.code == 3 and "\\x1b]0;owned\\x07" in refused.err
    ended = command("dpo-sample", *OPTIONS, *words, "on_bad_row=skip")
    assert ended.code == 0, ended.err
    for shown in (refused.out, refused.err, ended.out, ended.err):
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    (row,) = rows(tmp_path / f"{hostile}-out.jsonl")
    assert row["prompt"] == hostile


# Models


def test_a_checkpoint_gives_its_policys_completions_which_equal_the_bases_where_training_changed_nothing(
    command: Command, trained: Trained, prompts: Path, tmp_path: Path
) -> None:
    base = responses(sampled(command, prompts, tmp_path / "base.jsonl"))
    for name, rate, moved in (("still", "1e-12", False), ("far", "0.1", True)):
        run = trained(name, f"optimizer.lr={rate}")
        output = tmp_path / f"{name}.jsonl"
        told = (f"checkpoint={run}", f"prompts={prompts}", f"output={output}", "max_new_tokens=8")
        ended = command("dpo-sample", *told)
        assert ended.code == 0, ended.err
        assert (responses(rows(output)) != base) is moved
        assert {row["model"] for row in rows(output)} == {str(run / "final")}
        assert "dtype       float32: as in training\n" in ended.out
    weights = [rows(tmp_path / f"{name}.jsonl")[0]["weights"] for name in ("base", "still", "far")]
    assert len(set(weights)) == 3  # the weights of an adapter count, even tiny ones


def test_a_checkpoint_beside_a_model_is_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    ended = command("dpo-sample", "model=tiny", f"checkpoint={tmp_path}", f"prompts={prompts}")
    assert ended.code == 2
    assert ended.err == "error: model=tiny: checkpoint= names the model already; leave one of them out\n"


def test_a_reward_model_is_refused(command: Command, pairs_file: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "reward"
    training = ("model=tiny", "data=jsonl", f"data.train={pairs_file}", "batch_size=4", "max_steps=1")
    assert command("dpo-train", *training, "objective=reward", f"output_dir={run}").code == 0
    ended = command("dpo-sample", f"checkpoint={run}", f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}")
    assert ended.code == 2
    assert ended.err == f"error: {run / 'final'}: is a reward model, which generates no text; name a policy\n"


def test_a_run_with_the_plain_template_samples_with_it(
    command: Command, trained: Trained, prompts: Path, tmp_path: Path
) -> None:
    run = trained("plain", "data.template=plain")
    told = (f"checkpoint={run}", f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}", "max_new_tokens=4")
    assert command("dpo-sample", *told).code == 0
    assert {row["template"] for row in rows(tmp_path / "o.jsonl")} == {"plain"}


def test_preference_pairs_are_read_as_prompts(command: Command, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sample_rows(3))
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": row["prompt"]} for row in sample_rows(3)])
    assert sampled(command, pairs, tmp_path / "a.jsonl") == sampled(command, bare, tmp_path / "b.jsonl")


# Resume


def test_a_signal_stops_with_75_and_the_same_command_resumes_to_the_same_bytes(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches; the signal comes during the third, whose completions so far are lost."""
    sampled(command, prompts, tmp_path / "straight.jsonl", "batch_size=1")
    real, calls = sampling.distinct_completions, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[2])
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(sampling, "distinct_completions", counted)
    output = tmp_path / "stopped.jsonl"
    words = (*OPTIONS, f"prompts={prompts}", f"output={output}", "batch_size=1")
    stopped = command("dpo-sample", *words)
    assert stopped.code == 75
    assert stopped.err.endswith(f"error: stopped by SIGTERM; to resume, run the same command with output={output}\n")
    assert not output.exists() and len(job_log_path(output).read_bytes().splitlines()) == 1 + 2
    resumed = command("dpo-sample", *words)
    assert resumed.code == 0 and "resuming: 2 prompts of 4 done\n" in resumed.out
    assert len(calls) == 3 + 2  # the third again, and the fourth
    assert output.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert not job_log_path(output).exists()


def test_a_job_log_is_resumed_with_the_same_settings_only(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "o.jsonl"
    words = (*OPTIONS, f"prompts={prompts}", f"output={output}")
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "finish_job", interrupted)
        assert command("dpo-sample", *words).code == 130
    before = job_log_path(output).read_bytes()
    other = command("dpo-sample", *words, "seed=1", "n=3")
    assert other.code == 2
    assert other.err == (
        f"error: {output}.part: was started with other settings (n was 2, is 3; seed was 0, is 1); "
        "undo the changes, or name another output\n"
    )
    assert job_log_path(output).read_bytes() == before


def test_changed_prompts_are_noticed(
    command: Command, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row before the others: equal texts at other indices would assign completions to the wrong prompts."""
    output = tmp_path / "o.jsonl"
    sampled(command, prompts, output)
    before = output.read_bytes()
    write_jsonl(prompts, [{"prompt": ""}, *({"prompt": prompt} for prompt in PROMPTS)])
    ended = command("dpo-sample", *OPTIONS, f"prompts={prompts}", f"output={output}")
    assert ended.code == 2 and f"error: output={output}: was started with other settings (prompts was " in ended.err
    assert output.read_bytes() == before


def test_two_processes_do_not_write_one_file(command: Command, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    with job_log_path(output).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = command("dpo-sample", *OPTIONS, f"prompts={prompts}", f"output={output}")
    assert ended.code == 2
    assert ended.err == f"error: {output}.part: another process is writing it; wait for it, or name another output\n"
    assert job_log_path(output).read_bytes() == b"" and not output.exists()


def test_an_output_of_another_file_type_is_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    for name in ("o.jsonl.gz", "o.csv", "o"):
        ended = command("dpo-sample", *OPTIONS, f"prompts={prompts}", f"output={tmp_path / name}")
        says = f"output={tmp_path / name}: must end in .jsonl"
        assert (ended.code, ended.err) == (2, f"error: {says}\n")
    os.mkfifo(tmp_path / "o.jsonl")
    ended = command("dpo-sample", *OPTIONS, f"prompts={prompts}", f"output={tmp_path / 'o.jsonl'}")
    assert (ended.code, ended.err) == (
        2,
        f"error: output={tmp_path / 'o.jsonl'}: is not a regular file; name another\n",
    )


def test_an_output_that_is_a_folder_or_a_link_is_refused(command: Command, prompts: Path, tmp_path: Path) -> None:
    words = (*OPTIONS, f"prompts={prompts}")
    folder = command("dpo-sample", *words, f"output={tmp_path}")
    assert folder.code == 2 and folder.err == f"error: output={tmp_path}: is a folder; name a file in it\n"
    (tmp_path / "o.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    link = command("dpo-sample", *words, f"output={tmp_path / 'o.jsonl'}")
    assert link.code == 7
    assert link.err == f"error: {tmp_path / 'o.jsonl'}: is a symbolic link; name a regular file\n"
    assert not (tmp_path / "elsewhere.jsonl").exists()


# The job log


JOB = {"model": "m", "seed": 0}


def test_a_job_log_cut_at_any_byte_of_its_last_line_loses_that_line_only(tmp_path: Path) -> None:
    output, told = tmp_path / "o.jsonl", []
    with open_job_log(output, JOB, ("rows",), told.append) as log:
        for number in range(3):
            log.append({"rows": [{"index": number, "responses": ["caf\u00e9", "\u2028\x1b"]}]})
    content = job_log_path(output).read_bytes()
    whole = content[: content[:-1].rfind(b"\n") + 1]
    for end in range(len(whole), len(content) + 1):
        job_log_path(output).write_bytes(content[:end])
        told.clear()
        with open_job_log(output, JOB, ("rows",), told.append) as log:
            assert [part["rows"][0]["index"] for part in log.done] == [0, 1, 2][: 3 if end == len(content) else 2]
            log.append({"rows": [{"index": 9}]})
        assert bool(told) == (len(whole) < end < len(content))
        kept = content if end == len(content) else whole
        assert job_log_path(output).read_bytes() == kept + b'{"rows": [{"index": 9}]}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b"[1]\n",
        b"not JSON\n",
        b'{"journal": 1, "job": {}}\n',
        b'{"job_log": 3, "job": {}}\n',
        b"\xff\n",
    ],
)
def test_a_file_that_is_not_a_job_log_is_not_changed(tmp_path: Path, line: bytes) -> None:
    path = job_log_path(tmp_path / "o.jsonl")
    path.write_bytes(line)
    with pytest.raises(DataError) as refused, open_job_log(tmp_path / "o.jsonl", JOB, ("rows",), print):
        pass
    said = "is not a job log of this version; remove it to start again"
    assert str(refused.value) == f"{path} line 1: {said}"
    assert path.read_bytes() == line


def test_a_line_of_a_job_log_without_the_keys_of_a_part_is_named(tmp_path: Path) -> None:
    with open_job_log(tmp_path / "o.jsonl", JOB, ("rows",), print) as log:
        log.append({"rows": []})
        log.append({"part": 1})
    with pytest.raises(DataError, match="line 3: is not a job log of this version"):
        open_job_log(tmp_path / "o.jsonl", JOB, ("rows",), print).__enter__()


def test_a_job_log_of_another_job_says_what_differs(tmp_path: Path) -> None:
    with open_job_log(tmp_path / "o.jsonl", JOB, ("rows",), print):
        pass
    with (
        pytest.raises(ConfigError) as refused,
        open_job_log(tmp_path / "o.jsonl", {"model": "m", "n": 2}, ("rows",), print),
    ):
        pass
    differs = "(n was not set, is 2; seed was 0, is not set)"
    assert f"o.jsonl.part: was started with other settings {differs}; undo the changes" in str(refused.value)


def test_the_output_of_another_job_is_not_taken_as_done(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert not is_done(output, JOB)
    finish_job(output, [{"n": 1}], {"job": JOB})
    assert is_done(output, JOB)
    with pytest.raises(ConfigError, match=r"was started with other settings \(seed was 0, is 1\)"):
        is_done(output, {**JOB, "seed": 1})


def test_a_resumed_job_keeps_the_batch_size_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sampling, "prompt_batches", lambda *arguments: asked.append(arguments[-1]) or [[0]])
    part = {"model_index": 0, "batch_size": 3, "seconds": 1.0, "completions": [[0, [["hi", 2, "stop"]]]]}
    options = sampling.GenerationOptions(1, SamplingParams(8), seed=0, batch_size=None)
    model: Any = SimpleNamespace(model=None, device=None)
    log, reporter = JobLog(done=[part]), Reporter(io.StringIO())
    found = sampling.generate_all(model, [[1, 2]], options, log, reporter, lambda: None)
    assert asked == [3] and found[0][0].text == "hi"
