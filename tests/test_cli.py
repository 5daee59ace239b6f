"""The command line: every mistake ends in one line with the thing, its value, what to do, and the right exit code."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ended, records, sample_rows, tiny_words, write_jsonl

from dpo_cli.commands.sweep import Job, Result, show_table
from dpo_cli.config.composition import check_overrides, composed, conf_dir, groups, parse_overrides, sweep
from dpo_cli.config.files import override_value
from dpo_cli.config.help import PAGES, key_rows
from dpo_cli.config.objectives import OBJECTIVES
from dpo_cli.config.schema import SCHEMAS, RunConfig, group_of, run_config, tracker_options, walk
from dpo_cli.config.versions import VERSION, flat
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import shell_word, significant

Command = Callable[..., Ended]

DATA_SETS = [
    "alpaca", "arena", "axolotl", "capybara", "helpsteer2", "helpsteer3", "hh", "jsonl", "mixture", "ms_swift",
    "nectar", "openai", "orca", "pku_saferlhf", "sample", "sharegpt", "shp", "skywork", "stack_exchange", "summarize",
    "trl", "truthy", "tulu3", "ultrafeedback", "ultrafeedback_raw", "webgpt", "when2call",
]  # fmt: skip
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
     "(choices: " + ", ".join(DATA_SETS) + ")"),
    ("beta=-1", "beta=-1: must be above 0; 0.1 is usual, higher stays closer to the reference"),
    ("beta=0", "beta=0: must be above 0; 0.1 is usual, higher stays closer to the reference"),
    ("beta=abc", "beta=abc: must be a number"),
    ("beta=nan", "beta=nan: must be a finite number"),
    ("beta=null", "beta=null: must be a number"),
    ("beta=true", "beta=true: must be a number"),
    ("beta=\"1\"", "beta=1: must be a number"),
    ("batch_size=true", "batch_size=true: must be a whole number"),
    ("dry_run=1", "dry_run=1: must be true or false"),
    ("seed=1.5", "seed=1.5: must be a whole number"),
    ("batch_size=0", "batch_size=0: must be at least 1"),
    ("micro_batch_size=many", "micro_batch_size=many: must be auto or at least 1"),
    ("data.shuffle=perhaps", "data.shuffle=perhaps: must be true or false"),
    ("data.format=chatml", "data.format=chatml: choose one of auto, hh, standard, messages, ranked"),
    ("data.columns.chsen=x", "data.columns.chsen=x: columns are prompt, system, history, chosen, rejected, "
     "responses, preferred, preference, scores, ranks, probability, source, tools, documents"),
    ("data.max_prompt_length=512",
     "data.max_prompt_length=512: must be below data.max_length=512, or no response fits"),
    ("loss.label_smoothing=0.5",
     "loss.label_smoothing=0.5: must be in [0, 0.5); the share of labels taken to be wrong"),
    ("loss.temperature=0.1", "loss.temperature=0.1: the loss sigmoid does not use it; it is an option of discopop"),
    ("loss.name=exo_pair", "loss.label_smoothing=0.0: must be above 0 for exo_pair, which compares with the smoothed "
     "label; 1e-3 is usual"),
    ("loss.name=discopop", "loss.temperature=null: the loss discopop needs it; loss=discopop chooses the loss together "
     "with its options"),
    ("monitor=loud", "monitor=loud: choose one of warn, stop, off"),
    ("optimizer.lr=0", "optimizer.lr=0: must be above 0; 5e-5 is usual with LoRA"),
    ("lora.target_modules=3", "lora.target_modules=3: must be all-linear or a list of module names, for instance "
     "[q_proj,v_proj]"),
    ("model.dtype=bf16", "model.dtype=bf16: choose one of auto, float32, bfloat16, float16; "
     "did you mean 'bfloat16'?"),
    ("~beta", "'~beta': a key cannot be removed; set it to null or to another choice"),
    ("beta", "'beta': not of the form key=value; --help lists keys and groups"),
    ("--beta=1", "'--beta=1': values are given as key=value: beta=1"),
    ("--bata=1", "'--bata=1': no such flag; values are given as key=value, see dpo-train --help"),
    ("run.yaml", "'run.yaml': not of the form key=value; to read a file write --config run.yaml"),
    ("beta=0.1,0.2", "'beta=0.1,0.2': several values need -m: dpo-train -m beta=0.1,0.2"),
    ("hydra.run.dir=x", "'hydra.run.dir=x': Hydra's own settings are fixed here; output_dir= sets where a run goes"),
    ("resume=auto", "resume=auto: name the run directory with output_dir, for instance output_dir=outputs/my-run"),
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
        (b'{"prompt": "p", "chosen": "", "rejected": "r"}\n', "no pair can be used: 1 pair with an empty response"),
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
        ("data=hhh", f"data=hhh: no such choice; did you mean 'hh'? (choices: {', '.join(DATA_SETS)})"),
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


FIRST_LINE = """
import sys
from dpo_cli import cli
from dpo_cli.console.reporter import Reporter

class Import(Exception):
    pass

class Refuse:  # the import of torch or transformers ends the command
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            raise Import(name)

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
entry = {"dpo-train": cli.train, "dpo-eval": cli.evaluate, "dpo-sample": cli.sample, "dpo-label": cli.label,
         "dpo-rank": cli.rank, "dpo-data": cli.data, "dpo-compare": cli.compare, "dpo-export": cli.export}[sys.argv[0]]
try:
    entry()
except Import:
    print("import")
"""


@pytest.mark.parametrize(
    "words",
    [
        "dpo-train model=tiny",
        "dpo-eval checkpoint=run",
        "dpo-sample prompts=some.jsonl",
        "dpo-label samples=some.jsonl by=rule rule=shorter",
        "dpo-rank games=some.jsonl",
        "dpo-data model=tiny",
        "dpo-compare run other",
        "dpo-export checkpoint=run to=folder",
    ],
)
def test_the_first_line_is_on_the_screen_before_torch_is_imported(tmp_path: Path, words: str) -> None:
    (tmp_path / "some.jsonl").write_text("{}\n")
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_LINE, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr) == ("loading PyTorch and transformers ...\nimport\n", "")


COMMANDS = {name: f"dpo-{name}" for name in ("train", "eval", "sample", "label", "rank", "data", "compare", "export")}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_what_conf_says(command: Command, name: str) -> None:
    """Every key of the schema, its composed default and its comment in conf/; no line is wider than 100 columns."""
    short, page = (command(COMMANDS[name], flag).out for flag in ("--help", "--help-all"))
    values = flat(composed(name, [], SCHEMAS[name]).container)
    together = " ".join(page.split())
    leaves = [key for key, field, _ in walk(SCHEMAS[name]) if group_of(field.annotation) is None]
    for key in leaves:
        assert re.search(rf"^  {re.escape(key)}=\S", page, re.M), key
        if key in values:
            assert re.search(rf"^  {re.escape(key)}={re.escape(override_value(values[key]))}( |$)", page, re.M), key
    for line in (conf_dir() / f"{name}.yaml").read_text().splitlines():
        documented = re.fullmatch(r"\w+: *\S+ +# (.*)", line)
        if documented:
            assert " ".join(documented[1].split()) in together, line
    for group, choices in groups().items():
        block = re.search(rf"^  {group} +(.*(?:\n {{13}}.*)*)", page, re.M)
        known = group in SCHEMAS[name].__dataclass_fields__ or (group, name) == ("experiment", "train")
        assert bool(block) == known
        assert block is None or [word.rstrip("*") for word in block[1].split()] == choices
    assert all(len(line) <= 100 for line in (short + page).splitlines())
    assert len(short.splitlines()) < 80 and "--help-all" in short
    assert f"\n\nExamples\n  dpo-{name}" in page and "\nExit codes: 0 done, 2 command line" in page


def test_every_common_key_and_every_example_of_the_help_exists() -> None:
    assert PAGES.keys() == SCHEMAS.keys()
    for name, page in PAGES.items():
        assert set(page.common) <= key_rows(name).keys()
        for words, _ in page.examples:
            assert words.split()[0] == f"dpo-{name}"
            plain = [word for word in words.split()[1:] if "=" not in word and word != "-m"]
            assert not plain or name == "compare"
            keys = [word for word in words.split()[1:] if "=" in word]
            check_overrides(parse_overrides(keys), SCHEMAS[name])


def test_help_marks_the_default_of_each_group(command: Command) -> None:
    page = command("dpo-train", "--help").out
    assert (
        "\n  model      llama  qwen  smollm2*  tiny\n" in page
        and "  adamw*  adamw8bit  paged_adamw8bit  rmsprop  sgd\n" in page
    )
    assert "  beta=0.1                      how close the policy stays to the reference" in page


# A user's own YAML


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes files of the user's, beside whom the command runs."""
    monkeypatch.chdir(tmp_path)

    def write(**files: str) -> None:
        for name, content in files.items():
            path = Path(*name.split("__")).with_suffix(".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def printed(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    container: dict[str, Any] = yaml.safe_load(ended.out)
    return container


def test_groups_of_the_users_folder_are_found_before_the_packaged_ones(
    command: Command, own: Callable[..., None]
) -> None:
    own(
        my_conf__data__mine="defaults: [_base, _self_]\ntrain: pairs.jsonl\nmax_length: 300\n",
        my_conf__data__hh="defaults: [_base, _self_]\ntrain: my-hh.jsonl\n",
        my_conf__experiment__big="# @package _global_\nbeta: 0.7\noptimizer:\n  lr: 1e-4\n",
    )
    words = ("--config-dir", "my_conf", "--print-config")
    run = printed(command("dpo-train", *words, "data=mine", "experiment=big"))
    assert run["data"]["train"] == "pairs.jsonl" and run["data"]["max_length"] == 300
    assert run["data"]["eval_fraction"] == 0.1 and run["beta"] == 0.7 and run["optimizer"]["lr"] == 1e-4
    assert printed(command("dpo-train", *words, "data=hh"))["data"]["train"] == "my-hh.jsonl"
    assert printed(command("dpo-train", "data=hh", "--print-config"))["data"]["train"] == "Anthropic/hh-rlhf"
    page = " ".join(command("dpo-train", "--help", *words[:2]).out.split())
    listed = " ".join(sorted([*DATA_SETS, "mine"])).replace("sample", "sample*")
    assert f" data {listed} engine " in page


USER_MISTAKES = [
    ("data=typo", "my_conf/data/typo.yaml line 2: unknown key 'data.trian'; did you mean 'data.train'?"),
    ("data=small", "my_conf/data/small.yaml line 2: data.max_length=1: must be at least 2"),
    ("data=broken", "my_conf/data/broken.yaml line 2: not valid YAML (expected ',' or ']', but got '<stream end>')"),
    ("data=parent", "my_conf/data/parent.yaml line 1: Could not load 'data/_bse'."),
    ("data=absolute", "my_conf/data/absolute.yaml line 1: '/data/...' in defaults; in a file of data/ write _base"),
    ("data=mne", "data=mne: no such choice; did you mean 'mine'? (choices: "
     + ", ".join(sorted([*DATA_SETS, "absolute", "broken", "mine", "parent", "small", "typo"])) + ")"),
    ("experiment=off", "my_conf/experiment/off.yaml line 3: monitor=false: choose one of warn, stop, off; in YAML "
     "write 'off' in quotes"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "says"), USER_MISTAKES)
def test_a_mistake_in_the_users_folder_is_one_line_with_its_place(
    command: Command, own: Callable[..., None], word: str, says: str
) -> None:
    own(
        my_conf__data__mine="defaults: [_base, _self_]\ntrain: x\n",
        my_conf__data__typo="defaults: [_base, _self_]\ntrian: x\n",
        my_conf__data__small="defaults: [_base, _self_]\nmax_length: 1\ntrain: x\n",
        my_conf__data__broken="train: [x\n",
        my_conf__data__parent="defaults: [_bse, _self_]\ntrain: x\n",
        my_conf__data__absolute="defaults: [/data/_base, _self_]\ntrain: x\n",
        my_conf__experiment__off="# @package _global_\nbeta: 0.2\nmonitor: off\n",
    )
    ended = command("dpo-train", "--config-dir", "my_conf", word)
    assert (ended.code, ended.err) == (2, f"error: {says}\n")


def test_a_folder_that_holds_no_groups_is_refused_in_words(command: Command, own: Callable[..., None]) -> None:
    known = "data, engine, experiment, lora, loss, model, optimizer, reference, tracker"
    own(a__models__x="", b__data__x="", b__train="beta: 1\n", a__run="beta: 0.1\n")
    for words, says in (
        (["--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["--config-dir=a"], f"--config-dir a: holds no folder of a group ({known}); 'models' is not one; did you mean "
         "'model'?"),
        (["--config-dir", "b"], "--config-dir b: train.yaml is not read; put overrides into a file for --config"),
        (["--config-dir"], "'--config-dir': give a folder of your own groups, such as --config-dir my_conf"),
        (["--config-dir", "a", "--config-dir", "b"], "'--config-dir' is given twice; give it once"),
        (["--config", "--print-config"], "'--config': give a file of overrides, such as --config run.yaml; "
         "--print-config shows the composed config"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read (No such file or directory)"),
        (["--confg", "a/run.yaml"], "'--confg': no such flag; did you mean '--config'?"),
    ):  # fmt: skip
        ended = command("dpo-train", *words)
        assert (ended.code, ended.err) == (2, f"error: {says}\n")


def test_a_file_of_overrides_is_words_that_the_command_line_wins_over(
    command: Command, own: Callable[..., None]
) -> None:
    own(run="beta: 0.3\ndata: jsonl\ndata.train: 'my pairs, all.jsonl'\ndata.columns: {chosen: good}\n"
            "optimizer: {lr: 1e-4, betas: [0.8, 0.9]}\nmonitor: off\nlora: off\n")  # fmt: skip
    run = printed(command("dpo-train", "--config", "run.yaml", "beta=0.4", "--print-config"))
    assert run["beta"] == 0.4 and run["monitor"] == "off" and run["lora"]["enabled"] is False
    assert run["data"]["train"] == "my pairs, all.jsonl" and run["data"]["columns"] == {"chosen": "good"}
    assert run["optimizer"]["lr"] == 1e-4 and run["optimizer"]["betas"] == [0.8, 0.9]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("beta: 0.2\nbta: 1\n", "run.yaml line 2: unknown key 'bta' in 'bta=1'; did you mean 'beta'?"),
        ("optimizer:\n  lr: -1\n", "run.yaml line 2: optimizer.lr=-1: must be above 0; 5e-5 is usual with LoRA"),
        ("beta: '0.1'\n", "run.yaml line 1: beta=0.1: must be a number"),
        ("model: qwn\n", "run.yaml line 1: model=qwn: no such choice; did you mean 'qwen'? (choices: llama, qwen, "
         "smollm2, tiny)"),
        ("beta: [0.1, 0.2]\n", "run.yaml line 1: 'beta: [0.1,0.2]': several values need -m"),
        ("beta: 1\nbeta: 2\n", "run.yaml line 2: 'beta' stands here twice"),
        ("- beta\n", "run.yaml line 1: must be keys with values, such as beta: 0.1"),
        ("beta: [0.1\n", "run.yaml line 2: not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("a: &a {b: 1}\nc: *a\n", "run.yaml: holds a YAML alias; a config is data only"),
        ("model.trust_remote_code: true\n", "run.yaml line 1: model.trust_remote_code: true runs Python of others; say "
         "so on the command line: model.trust_remote_code=true"),
        ("version: 9\n", "run.yaml: written by a newer dpo-cli (config version 9; this one reads up to "
         f"{VERSION}); update dpo-cli"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_of_overrides_is_one_line_with_its_place(
    command: Command, own: Callable[..., None], content: str, says: str
) -> None:
    own(run=content)
    ended = command("dpo-train", "--config", "run.yaml")
    assert (ended.code, ended.err) == (2, f"error: {says}\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("++model.trust_remote_code: true\n", "'++model.trust_remote_code': is not a key; write keys without marks"),
        ("'beta=1,model.trust_remote_code': true\n", "'beta=1,model.trust_remote_code': is not a key; write keys "
         "without marks"),
        ('"be\\e[31mta": 1\n', "'be\\x1b[31mta': is not a key; write keys without marks"),
        ("model.trust_remote_code: [true]\n", "model.trust_remote_code: true runs Python of others; say so on the "
         "command line: model.trust_remote_code=true"),
    ],
)  # fmt: skip
def test_no_way_of_writing_a_key_lets_a_file_run_python(
    command: Command, own: Callable[..., None], content: str, says: str
) -> None:
    own(run=content)
    ended = command("dpo-train", "-m", "--config", "run.yaml", "--print-config")
    assert (ended.code, ended.out, ended.err) == (2, "", f"error: run.yaml line 1: {says}\n")


PRINTED = {
    "dpo-train": ("data=jsonl", 'data.train="a,b c.jsonl"', "data.columns.chosen=x", "lora=off", "monitor=off",
                  "tracker=[tensorboard,wandb]", "optimizer.betas=[0.8,0.9]", "loss=robust", "objective=dpo"),
    "dpo-eval": ("checkpoint=run", "data=jsonl", "data.eval=pairs.jsonl"),
    "dpo-sample": ("model=tiny", "prompts=p.txt", "temperature=0.5"),
    "dpo-label": ("samples=s.jsonl", "by=rule", "rule=shorter"),
    "dpo-rank": ("checkpoints=[a,b]", "judge=shorter", "prompts=p.txt"),
    "dpo-data": ("data=jsonl", "data.train=pairs.jsonl", "show=3", "fix=cleaned.jsonl"),
    "dpo-compare": ("outputs/a", "a b,c", "device=cpu"),
    "dpo-export": ("checkpoint=run", "to=folder", "scale=0.5", "max_shard_size=500MB"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_a_printed_config_can_be_given_back(command: Command, tmp_path: Path, name: str) -> None:
    first = command(name, *PRINTED[name], "--print-config")
    assert first.code == 0, first.err
    (tmp_path / "printed.yaml").write_text(first.out)
    again = command(name, "--config", tmp_path / "printed.yaml", "--print-config")
    assert (again.code, again.out) == (0, first.out), again.err


def test_a_file_of_an_earlier_version_is_read_with_the_names_of_today(
    command: Command, own: Callable[..., None]
) -> None:
    own(old="version: 1\nradar: stop\nbatching: padded\n", mine="radar: stop\n")
    run = printed(command("dpo-train", "--config", "old.yaml", "--print-config"))
    assert (run["monitor"], run["layout"]) == ("stop", "padded")
    assert command("dpo-train", "--config", "mine.yaml").err.startswith("error: mine.yaml line 1: unknown key 'radar'")


def test_every_objective_that_trains_has_an_entry_in_the_config() -> None:
    from dpo_cli.objectives.table import OBJECTIVES as TRAINED

    assert OBJECTIVES.keys() == TRAINED.keys()


def test_a_default_of_an_objective_does_not_replace_what_a_users_experiment_sets(
    command: Command, own: Callable[..., None]
) -> None:
    own(my_conf__experiment__mine="# @package _global_\nbeta: 0.3\n", my_conf__experiment__other="# @package _global_\n"
        "seed: 1\n")  # fmt: skip
    words = ("--config-dir", "my_conf", "objective=reward", "--print-config")
    assert printed(command("dpo-train", *words, "experiment=other"))["beta"] == 1
    assert printed(command("dpo-train", *words))["beta"] == 1
    ended = command("dpo-train", *words, "experiment=mine")
    assert ended.err == "error: beta=0.3: a reward model (objective=reward) is held to no reference; leave it out\n"


# Trackers: several choices of one group


def test_several_trackers_can_be_chosen(command: Command) -> None:
    def tracker(*words: str) -> Any:
        return printed(command("dpo-train", *words, "--print-config"))["tracker"]

    assert tracker() is tracker("tracker=none") is tracker("tracker=null") is tracker("tracker=[]") is None
    assert tracker("tracker=tensorboard") == {"tensorboard": {"directory": None}, "wandb": None, "trackio": None}
    both = ["tracker=[tensorboard,wandb]", "tracker.wandb.project=mine"]
    config = run_config(composed("train", parse_overrides(both), RunConfig).container)
    assert tracker_options(config) == {
        "tensorboard": {"directory": None},
        "wandb": {"project": "mine", "entity": None, "name": None, "mode": "auto"},
    }
    assert tracker_options(replace(config, tracker=None)) == {}
    for word, says in (
        ("tracker=[wandb,tensorbord]", "tracker=tensorbord: no such choice; did you mean 'tensorboard'? (choices: "
         "none, tensorboard, trackio, wandb)"),
        ("tracker.wandb.project=mine", "tracker.wandb.entity has no value; choose tracker=wandb with it"),
        ("report_to=wandb", "unknown key 'report_to' in 'report_to=wandb'; here it is tracker=wandb"),
    ):  # fmt: skip
        assert command("dpo-train", word).err == f"error: {says}\n"


# Sweeps and composition


def test_every_group_choice_composes_to_a_valid_run() -> None:
    for group, choices in groups().items():
        for choice in choices:
            words = [f"{group}={choice}"] + (
                ["data.train=x.jsonl"] if choice in ("jsonl", "alpaca", "axolotl", "ms_swift", "openai") else []
            )
            words += ["data.sources.hh=1"] if choice == "mixture" else []
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
    assert ended.code == 2 and ended.err.startswith("error: beta=-1: must be above 0") and ended.out == ""
    for more, says in (
        (["beta=0.1,0.2", "output_dir=a,b"],
         "output_dir=a,b: a sweep has one folder, in which each run gets its own; name one"),
        (["beta=0.1,0.1"], "beta=0.1: is twice in the sweep; give every value once"),
        (["beta=0.1,0.2", "resume=auto"], "resume=auto: a sweep resumes with resume=auto and output_dir=FOLDER, its "
         "own folder, for instance output_dir=outputs/multirun/2026-01-31_12-00-00"),
    ):  # fmt: skip
        assert command("dpo-train", "-m", *words[:-1], *more).err == f"error: {says}\n"


@pytest.mark.usefixtures("runs_in_this_process")
def test_a_sweep_runs_each_in_a_directory_of_its_own_and_ends_in_a_table(
    command: Command, tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny_words(pairs_file, tmp_path) if not word.startswith(("output_dir", "optimizer"))]
    ended = command("dpo-train", "-m", "beta=0.1,0.5", "optimizer.lr=1e-3,1e30", *words)
    assert ended.code == 5, ended.err
    (folder,) = (tmp_path / "outputs" / "multirun").iterdir()
    runs = [folder / f"beta-{beta}_optimizer.lr-{rate}" for beta in ("0.1", "0.5") for rate in ("0.001", "1e+30")]
    assert sorted(folder.iterdir()) == runs
    manifests = [json.loads((run / "manifest.json").read_text()) for run in runs]
    assert len({tuple(one["argv"]) for one in manifests}) == 4
    *_, heading, first, second, third, fourth, best, loss, margin, following = ended.out.splitlines()
    assert heading.split() == ["beta", "optimizer.lr", "loss", "accuracy", "margin/beta", "verdict", "run"]
    lines = [line.split() for line in (first, second, third, fourth)]
    assert [line[:2] for line in lines] == [["0.1", "0.001"], ["0.1", "1e+30"], ["0.5", "0.001"], ["0.5", "1e+30"]]
    assert lines[1][2:] == ["exit", "5", str(runs[1].relative_to(tmp_path))]
    for place, beta in ((0, 0.1), (2, 0.5)):
        last = records(runs[place])[-1]
        shown = [word for word in lines[place] if word != "*"]
        assert shown[2:4] == [significant(last[key]) for key in ("loss", "rewards/accuracies")]
        assert shown[4] == significant(last["rewards/margins"] / beta)
        assert shown[5:] == [manifests[place]["verdict"]["color"], str(runs[place].relative_to(tmp_path))]
    accuracies = [records(runs[place])[-1]["rewards/accuracies"] for place in (0, 2)]
    assert ["*" in line for line in (lines[0], lines[2])] == [one == max(accuracies) for one in accuracies]
    assert best.startswith("* has the highest held-out accuracy") and "its 95% interval is" in best
    assert loss == "loss is comparable only between runs of the same loss and beta"
    assert margin == "margin/beta is how far the policy moved the pair apart, in nats, whatever the beta"
    where = folder.relative_to(tmp_path)
    assert following == f"which is better, with paired intervals: dpo-compare {where}"


def test_of_equal_accuracies_the_lower_loss_is_best_where_losses_compare(tmp_path: Path) -> None:
    def result(loss: float, accuracy: float, *words: str) -> Result:
        config = run_config(composed("train", parse_overrides([*words]), RunConfig).container)
        evaluation = {"loss": loss, "rewards/accuracies": accuracy, "rewards/margins": 0.2}
        return Result(Job((), {"seed": "1"}, config), 0, tmp_path, evaluation, {})

    def starred(*results: Result) -> list[bool]:
        stream = io.StringIO()
        show_table(results, Reporter(stream))
        return ["*" in line for line in stream.getvalue().splitlines()[2 : 2 + len(results)]]

    assert starred(result(0.6, 0.7), result(0.5, 0.7), result(0.4, 0.6)) == [False, True, False]
    assert starred(result(0.6, 0.7), result(0.5, 0.7, "beta=0.2"), result(0.4, 0.6)) == [True, True, False]
    assert starred(result(0.6, 0.7), result(0.5, 0.7, "loss=ipo")) == [True, True]


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
