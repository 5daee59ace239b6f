"""The command line: every mistake ends in one line with the thing, its value, what to do, and the right exit code."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, records, sample_rows, tiny_words, write_jsonl

from dpo_cli.config.composition import composed, groups, parse_overrides, sweep
from dpo_cli.config.schema import RunConfig, run_config
from dpo_cli.console.text import shell_word

Command = Callable[..., Ended]

MISTAKES = [
    ("beat=0.2", "unknown key 'beat' in 'beat=0.2'; did you mean 'beta'?"),
    ("+bta=1", "unknown key 'bta' in '+bta=1'; did you mean 'beta'?"),
    ("lr=1e-6", "unknown key 'lr' in 'lr=1e-6'; did you mean 'optimizer.lr'?"),
    ("optimizer.lerning_rate=1", "unknown key 'optimizer.lerning_rate' in 'optimizer.lerning_rate=1'; "
     "did you mean 'optimizer.lr'?"),
    ("model=qwn", "model=qwn: no such choice; did you mean 'qwen'? (choices: llama, qwen, smollm2, tiny)"),
    ("model=./my-sft", "model=./my-sft: no such choice; for a path or hub id write model.name_or_path=./my-sft "
     "(choices: llama, qwen, smollm2, tiny)"),
    ("data=pairs.jsonl", "data=pairs.jsonl: no such choice; for a file write data=jsonl data.train=pairs.jsonl "
     "(choices: hh, jsonl, sample, ultrafeedback)"),
    ("beta=-1", "beta=-1.0: must be above 0; 0.1 is usual, higher stays closer to the reference"),
    ("beta=0", "beta=0.0: must be above 0; 0.1 is usual, higher stays closer to the reference"),
    ("beta=abc", "beta=abc: must be a number"),
    ("beta=nan", "beta=nan: must be a finite number"),
    ("beta=null", "beta=null: must be a number"),
    ("seed=1.5", "seed=1.5: must be a whole number"),
    ("batch_size=0", "batch_size=0: must be at least 1"),
    ("micro_batch_size=many", "micro_batch_size=many: must be auto or at least 1"),
    ("data.shuffle=perhaps", "data.shuffle=perhaps: must be true or false"),
    ("data.format=chatml", "data.format=chatml: choose one of auto, hh, standard, messages, ranked"),
    ("data.columns.chsen=x", "data.columns.chsen=x: columns are prompt, chosen, rejected, responses, scores"),
    ("data.max_prompt_length=512",
     "data.max_prompt_length=512: must be below data.max_length=512, or no response fits"),
    ("loss.label_smoothing=0.5",
     "loss.label_smoothing=0.5: must be in [0, 0.5): the share of labels taken to be wrong"),
    ("loss.temperature=0.1", "loss.temperature=0.1: the loss sigmoid does not use it; it is a dial of discopop"),
    ("loss.name=exo_pair", "loss.label_smoothing=0.0: must be above 0 for exo_pair, which compares with the smoothed "
     "label; 1e-3 is usual"),
    ("loss.name=discopop", "loss.temperature=null: the loss discopop needs it; loss=discopop chooses the loss together "
     "with its dials"),
    ("radar=loud", "radar=loud: choose one of warn, stop, off"),
    ("optimizer.lr=0", "optimizer.lr=0.0: must be above 0; 5e-5 is usual with LoRA"),
    ("lora.target_modules=3", "lora.target_modules=3: must be all-linear or a list of module names, for instance "
     "[q_proj,v_proj]"),
    ("model.dtype=bf16", "model.dtype=bf16: choose one of auto, float32, bfloat16, float16; "
     "did you mean 'bfloat16'?"),
    ("~beta", "'~beta': a key cannot be removed; set it to null or to another choice"),
    ("beta", "'beta': not of the form key=value; --help lists keys and groups"),
    ("--beta=1", "'--beta=1': no such flag; values are given as key=value, see dpo-train --help"),
    ("beta=0.1,0.2", "'beta=0.1,0.2': several values need -m: dpo-train -m beta=0.1,0.2"),
    ("hydra.run.dir=x", "'hydra.run.dir=x': Hydra's own settings are fixed here; output_dir= sets where a run goes"),
    ("resume=auto", "resume=auto: give the run directory to go on in, for instance output_dir=outputs/my-run"),
    ("device=tpu9", "device=tpu9: not on this machine; it has cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "says"), MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(command: Command, word: str, says: str) -> None:
    ended = command("dpo-train", word)
    assert ended.code == 2
    assert ended.err == f"error: {says}\n"


def test_lora_off_has_no_adapter_to_switch_off(command: Command) -> None:
    ended = command("dpo-train", "lora=off", "reference=adapter_off")
    assert ended.code == 2
    assert ended.err == (
        "error: reference=adapter_off: needs an adapter to switch off; with lora=off choose reference=frozen\n"
    )


def test_a_key_in_the_wrong_yaml_file_is_named_with_its_file_and_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from dpo_cli.config import composition

    conf = tmp_path / "conf"
    shutil.copytree(composition.conf_dir(), conf)
    monkeypatch.setattr(composition, "conf_dir", lambda: conf)
    (conf / "data" / "mine.yaml").write_text("defaults: [_base, _self_]\ntrian: pairs.jsonl\n")
    ended = command("dpo-train", "data=mine")
    assert (ended.code, ended.err) == (
        2, "error: conf/data/mine.yaml line 2: unknown key 'data.trian'; did you mean 'data.train'?\n"
    )  # fmt: skip
    (conf / "data" / "mine.yaml").write_text("train: [unclosed\n")
    ended = command("dpo-train", "data=mine")
    assert ended.code == 2 and "mine.yaml line 2: not valid YAML" in ended.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "pairs.jsonl: no such file"),
        (b"", "pairs.jsonl: the file is empty"),
        (b"oops\n", "pairs.jsonl line 1: not JSON (Expecting value at column 1): oops (data.on_bad_row=skip counts"),
        (b'{"prompt": "p", "chosen": "c"}\n', "pairs.jsonl line 1: no 'rejected' key. A row needs prompt, chosen and"),
        (b'{"prompt": "p", "chosen": "", "rejected": "r"}\n', "all pairs were dropped: 1 pair with an empty response"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_3(command: Command, tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    ended = command("dpo-train", "model=tiny", "data=jsonl", f"data.train={path}", f"output_dir={tmp_path / 'run'}")
    assert ended.code == 3
    assert says in ended.err and ended.err.count("\n") == 1 and "Traceback" not in ended.err


def test_terminal_escapes_in_data_do_not_reach_the_screen(command: Command, tmp_path: Path) -> None:
    rows = sample_rows(8)
    rows[0]["prompt"] = "\x1b]52;c;aGk=\x07 [red]hello[/red] [/INST] \u202e reversed"
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    ended = command("dpo-train", *tiny_words(path, tmp_path / "run"), "data.shuffle=false", "data.eval_fraction=0")
    assert ended.code == 0
    everything = ended.out + (tmp_path / "run" / "train.log").read_text()
    assert not set("\x1b\x07\u202e") & set(everything)
    assert "\\x1b]52;c;aGk=\\x07 [red]hello[/red] [/INST] \\u202e reversed" in ended.out


def test_a_missing_model_is_exit_code_4(command: Command, tmp_path: Path, pairs_file: Path) -> None:
    words = ("data=jsonl", f"data.train={pairs_file}", f"output_dir={tmp_path / 'run'}")
    ended = command("dpo-train", "model.name_or_path=/nowhere/model", *words)
    assert (ended.code, ended.err) == (4, "error: model.name_or_path=/nowhere/model: no such folder\n")
    ended = command("dpo-train", "model=qwen", *words)  # no hub here
    assert ended.code == 4 and ended.err.startswith("error: Qwen/Qwen2.5-0.5B-Instruct: its tokenizer cannot be loaded")


def test_an_sft_adapter_that_is_nowhere_is_exit_code_4(command: Command, tmp_path: Path, pairs_file: Path) -> None:
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "model.adapter=/nowhere/adapter")
    assert ended.code == 4 and ended.err.startswith(
        "error: /nowhere/adapter: no such folder; a PEFT adapter's folder or hub id"
    )


def test_an_output_directory_that_is_a_file_is_exit_code_7(command: Command, tmp_path: Path, pairs_file: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "file" / "run"))
    assert ended.code == 7
    assert ended.err == f"error: output_dir={tmp_path / 'file' / 'run'}: cannot be written (Not a directory)\n"


def test_unknown_adapter_modules_name_those_there_are(command: Command, tmp_path: Path, pairs_file: Path) -> None:
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "lora.target_modules=[query]")
    assert ended.code == 2 and "this model has down_proj, gate_proj, k_proj, lm_head, o_proj" in ended.err


def test_eval_mistakes_are_named(command: Command) -> None:
    for word, says in (
        ("checkpont=x", "unknown key 'checkpont' in 'checkpont=x'; did you mean 'checkpoint'?"),
        ("data.evl=x", "unknown key 'data.evl' in 'data.evl=x'; did you mean 'data.eval'?"),
        ("data=hhh", "data=hhh: no such choice; did you mean 'hh'? (choices: hh, jsonl, sample, ultrafeedback)"),
    ):
        ended = command("dpo-eval", word)
        assert ended.code == 2
        assert ended.err == f"error: {says}\n"
    assert command("dpo-eval", "checkpoint=x", "samples=-1").err == "error: samples=-1: must be at least 0\n"
    ended = command("dpo-eval")
    assert ended.err.startswith("error: checkpoint=null: name a run directory, a checkpoint, an adapter or a model")


# Help, sweeps, composition


def fresh_process(*words: str) -> "subprocess.CompletedProcess[str]":
    code = (
        "import sys\nfrom dpo_cli import cli\nsys.argv = ['dpo-train', *sys.argv[1:]]\n"
        "try:\n    cli.train()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("beat=0.2", 2), ("data.train=missing.jsonl", 3)])
def test_help_typos_and_missing_files_are_answered_without_torch(word: str, code: int) -> None:
    ended = fresh_process(word)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == "False"


def test_help_lists_every_group_and_choice(command: Command) -> None:
    page = command("dpo-train", "--help").out
    for group, choices in groups().items():
        block = re.search(rf"^  {group} +(.*(?:\n {{13}}.*)*)", page, re.M)
        assert block and [word.rstrip("*") for word in block[1].split()] == choices
    assert all(len(line) <= 110 for line in page.splitlines() if "YAML files in" not in line)
    assert "dpo-train model=qwen data=hh beta=0.1" in page
    assert command("dpo-eval", "--help").out.startswith("dpo-eval: score a finished run")


def test_every_group_choice_composes_to_a_valid_run() -> None:
    for group, choices in groups().items():
        for choice in choices:
            words = [f"{group}={choice}"] + (["data.train=x.jsonl"] if choice == "jsonl" else [])
            config = run_config(composed("train", parse_overrides(words), RunConfig).container)
            assert config.beta == 0.1, (group, choice)


def test_the_line_of_the_user_composes() -> None:
    config = run_config(composed("train", parse_overrides(["model=qwen", "data=hh", "beta=0.1"]), RunConfig).container)
    assert config.model.name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.data.train == "Anthropic/hh-rlhf" and config.data.eval_split == "test"


def test_values_outside_hydras_grammar_are_taken_as_text() -> None:
    words = ["model.name_or_path=/a b/c=d", "lora=off"]
    config = run_config(composed("train", parse_overrides(words), RunConfig).container)
    assert config.model.name_or_path == "/a b/c=d"
    assert config.optimizer.lr == 5e-7 and not config.lora.enabled


def test_a_sweep_is_every_combination() -> None:
    words = sweep(parse_overrides(["beta=0.05,0.1,0.3", "seed=1,2", "data=hh"]))
    assert len(words) == 6 and words[0] == ["beta=0.05", "seed=1", "data=hh"]


def test_a_sweep_is_checked_whole_before_its_first_run(command: Command, tmp_path: Path, pairs_file: Path) -> None:
    words = tiny_words(pairs_file, tmp_path / "run")
    ended = command("dpo-train", "-m", "beta=0.1,-1", *words[:-1])
    assert ended.code == 2 and ended.err.startswith("error: beta=-1.0: must be above 0") and ended.out == ""
    ended = command("dpo-train", "-m", "beta=0.1,0.2", *words)
    assert ended.err == "error: output_dir: the runs of a sweep cannot share one; leave it out\n"


def test_a_sweep_runs_each_in_a_directory_of_its_own(tmp_path: Path, pairs_file: Path) -> None:
    words = [word for word in tiny_words(pairs_file, tmp_path) if not word.startswith("output_dir")]
    code = "import sys; from dpo_cli.cli import train; train()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "-m", "beta=0.1,0.5", *words], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    runs = sorted((tmp_path / "outputs" / "tiny-jsonl").iterdir())
    assert len(runs) == 2
    betas = [json.loads((run / "manifest.json").read_text()) for run in runs]
    assert len({tuple(one["argv"]) for one in betas}) == 2
    assert all(records(run)[-1]["split"] == "eval" for run in runs)


def test_stdout_that_closes_early_does_not_stop_the_run(tmp_path: Path, pairs_file: Path) -> None:
    words = " ".join(tiny_words(pairs_file, tmp_path / "run"))
    script = f"{sys.executable} -c 'from dpo_cli.cli import train; train()' {words} | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1 and ended.stderr == ""
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "path", ["outputs/a b", "run=1/x,y", "[odd]", "it's", 'say "hi"', "back\\slash", "$HOME", "plain-1.5/x", "é", "~x"]
)
def test_a_command_that_is_shown_reads_back_as_the_path_it_is_of(path: str) -> None:
    (word,) = shlex.split(shell_word("checkpoint", path))
    (override,) = parse_overrides([word])
    assert (override.key_or_group, override.value()) == ("checkpoint", path)
    assert shell_word("checkpoint", "outputs/run-1") == "checkpoint=outputs/run-1"


@pytest.mark.parametrize("value", ["a\\b c=", "a b\\", 'a \\"b" =', "a = b"])
def test_a_value_outside_hydras_grammar_is_the_text_it_is(value: str) -> None:
    (override,) = parse_overrides([f"data.train={value}"])
    assert override.value() == value
