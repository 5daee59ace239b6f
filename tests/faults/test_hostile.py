"""Faults 14 to 17 and 19 to 23: what strangers wrote is data. It is shown escaped, read with limits, never executed."""

import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Ended, sample_rows, tiny_words, write_jsonl
from harness import LEDGER, fault, run_words, same_content, start, straight  # noqa: F401
from safetensors.torch import load_file, save_file

from dpo_cli.console.text import redacted, safe_text
from dpo_cli.errors import CheckpointError
from dpo_cli.runs.checkpoint import (
    MANIFEST,
    checkpoints,
    read_state,
    validate,
)
from dpo_cli.storage.hashing import sha256_of

pytestmark = pytest.mark.faults
Command = Callable[..., Ended]
Straight = Callable[..., dict[str, bytes]]


@pytest.fixture
def model(tmp_path: Path, tiny_path: str) -> Path:
    """A copy of the tiny model, to be spoilt."""
    shutil.copytree(tiny_path, tmp_path / "model")
    return tmp_path / "model"


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def with_model(pairs: Path, folder: Path, model: Path) -> list[str]:
    return [*tiny_words(pairs, folder), f"model.name_or_path={model}", "max_steps=1"]


# Fault 14: templates and special tokens

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
REFUSED = {
    "leaves out the content": ("hello", "leaves out what user or assistant say"),
    "syntax error": ("{% for m in messages %}{{ m.role }", "the model's chat template fails ("),
    "raises": ("{{ raise_exception('only tools') }}", "the model's chat template fails (only tools)"),
    "endless": ("{% for i in range(99999999) %}a{% endfor %}", "the model's chat template fails (Range too big."),
    "looks around": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the model's chat template fails (access to"),
    "runs a command": (
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "the model's chat template fails (",
    ),
    "writes escape codes": ("{{ raise_exception('\x1b]0;owned\x07') }}", "fails (\\x1b]0;owned\\x07)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_used_is_refused_and_runs_nothing(
    command: Command, pairs_file: Path, tmp_path: Path, model: Path, name: str
) -> None:
    template, says = REFUSED[name]
    canary = tmp_path / "canary"
    (model / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    with fault(14):
        ended = command("dpo-train", *with_model(pairs_file, tmp_path / "run", model))
        assert ended.code == 2 and says in ended.err and ended.err.endswith("choose data.template=plain\n"), ended.err
        assert not canary.exists()
        assert command("dpo-train", *with_model(pairs_file, tmp_path / "run", model), "data.template=plain").code == 0


def test_a_template_that_opens_an_answer_otherwise_when_asked_is_said(
    command: Command, pairs_file: Path, tmp_path: Path, model: Path
) -> None:
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}"
    (model / "chat_template.jinja").write_text(CHATML + opening)
    with fault(14):
        ended = command("dpo-train", *with_model(pairs_file, tmp_path / "run", model))
        assert ended.code == 0
        assert "which opens an answer otherwise when it is asked for one: so it is trained" in ended.out


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        ({"pad_token": "<|im_end|>"}, "<|im_end|> closes a response"),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, "<|im_end|> closes a response"),
        ({"eos_token": None}, "<|im_end|> closes a response"),  # the template says what closes a turn
    ],
    ids=["pad is EOS", "BOS in template and tokenizer", "no EOS"],
)
def test_responses_are_closed_once_whatever_the_special_tokens_are(
    command: Command, pairs_file: Path, tmp_path: Path, model: Path, tokenizer: dict[str, Any], says: str
) -> None:
    change_json(model / "tokenizer_config.json", **tokenizer)
    with fault(14):
        ended = command("dpo-train", *with_model(pairs_file, tmp_path / "run", model))
        assert ended.code == 0 and says in ended.out
        shown = ended.out.split("\n\n")[1]
        assert shown.count("<|im_end|>") == 3 and shown.count("<|im_start|>") == 2


def test_no_end_of_a_response_at_all_is_refused(
    command: Command, pairs_file: Path, tmp_path: Path, model: Path
) -> None:
    change_json(model / "tokenizer_config.json", eos_token=None)
    with fault(14):
        ended = command("dpo-train", *with_model(pairs_file, tmp_path / "run", model), "data.template=plain")
        assert ended.code == 4 and ended.err == (
            "error: the tokenizer has no EOS token, so no response can be closed; set its eos_token\n"
        )


# Fault 15: what does not fit


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    command: Command, pairs_file: Path, tmp_path: Path, model: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:100].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    change_json(model / "config.json", vocab_size=100)
    with fault(15):
        ended = command("dpo-train", *with_model(pairs_file, tmp_path / "run", model))
        assert ended.code == 4
        assert (
            "of the tokenizer lies outside the model's 100 embeddings: tokenizer and model do not belong" in ended.err
        )


def test_other_weights_under_the_same_name_are_refused_on_resume(
    command: Command, pairs_file: Path, tmp_path: Path, model: Path
) -> None:
    words = [*with_model(pairs_file, tmp_path / "run", model), "max_steps=3"]
    with fault(15, tries=2):
        assert command("dpo-train", *words).code == 0
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"][0] += 1e-3
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        warned = command("dpo-eval", f"checkpoint={tmp_path / 'run'}")
        assert warned.code == 0 and "holds other weights than when this run was trained on it" in warned.out
        shutil.rmtree(tmp_path / "run" / "final")
        ended = command("dpo-train", *words, "resume=auto")
        assert (
            ended.code == 4 and f"was trained on other weights than model.name_or_path={model} holds now" in ended.err
        )
        assert "step 3/3" not in ended.out


@pytest.mark.parametrize("harm", ["missing", "left over", "shape"])
def test_an_adapter_that_does_not_fit_in_every_tensor_is_refused(
    command: Command, pairs_file: Path, tmp_path: Path, harm: str
) -> None:
    words = tiny_words(pairs_file, tmp_path / "run")
    with fault(15, tries=2):
        assert command("dpo-train", *words).code == 0
        shutil.rmtree(tmp_path / "run" / "final")
        last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
        file = last / "adapter_model.safetensors"
        tensors = load_file(file)
        name = sorted(tensors)[0]
        if harm == "missing":
            del tensors[name]
        elif harm == "left over":
            tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(2, 2)
        else:
            tensors[name] = tensors[name][:, :-1].contiguous()
        save_file(tensors, file)
        manifest = json.loads((last / MANIFEST).read_text())
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        (last / MANIFEST).write_text(json.dumps(manifest))
        resumed = command("dpo-train", *words, "resume=auto")
        assert resumed.code == 4
        assert "adapter_model.safetensors" in resumed.err or "does not fit this run" in resumed.err
        evaluated = command("dpo-eval", f"checkpoint={last}")
        assert evaluated.code == 4, evaluated.err


OPTIMIZER_HARMS = {
    "another shape": "error: optimizer.safetensors: {name} has another shape than this optimizer's state\n",
    "another key": "error: optimizer.safetensors: {name}_2 has another shape than this optimizer's state\n",
    "another weight": "error: optimizer.safetensors: no parameter layers.9 in this run\n",
    "whole numbers": "error: optimizer.safetensors: {name} holds no numbers of the optimizer\n",
    "missing": "error: optimizer.safetensors: lacks {name}\n",
}


@pytest.mark.parametrize("harm", OPTIMIZER_HARMS)
def test_an_optimizer_state_of_a_wrong_shape_name_or_type_is_refused_by_name(
    command: Command, pairs_file: Path, tmp_path: Path, harm: str
) -> None:
    words = tiny_words(pairs_file, tmp_path / "run")
    with fault(15):
        assert command("dpo-train", *words).code == 0
        shutil.rmtree(tmp_path / "run" / "final")
        last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
        file = last / "optimizer.safetensors"
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if name.endswith("|exp_avg") and "lora_A" in name)
        state = tensors.pop(name)
        tensors |= {
            "another shape": {name: state[:, :-1].contiguous()},
            "another key": {name: state, f"{name}_2": state.clone()},
            "another weight": {name: state, "layers.9|exp_avg": state.clone()},
            "whole numbers": {name: state.long()},
            "missing": {},
        }[harm]
        save_file(tensors, file)
        manifest = json.loads((last / MANIFEST).read_text())
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        (last / MANIFEST).write_text(json.dumps(manifest))
        resumed = command("dpo-train", *words, "resume=auto")
        assert (resumed.code, resumed.err) == (4, OPTIMIZER_HARMS[harm].format(name=name))


# Faults 16 and 17: resume

REFUSED_CHANGES = {
    "beta=0.2": "beta: 0.1 -> 0.2", "optimizer.lr=2e-3": "optimizer.lr: 0.001 -> 0.002", "seed=1": "seed: 0 -> 1",
    "batch_size=2": "batch_size: 4 -> 2", "data.max_length=99": "data.max_length: 512 -> 99",
    "lora.r=8": "lora.r: 16 -> 8", "loss=ipo": "loss.name: sigmoid -> ipo",
    "max_grad_norm=2": "max_grad_norm: 1.0 -> 2.0",
    "optimizer=sgd": "optimizer.name: adamw -> sgd", "data.template=plain": "data.template: None -> plain",
    "data.shuffle=false": "data.shuffle: True -> False",
    "reference=adapter_off": "reference.name: frozen -> adapter_off",
    "model.dtype=bfloat16": "model.dtype: float32 -> bfloat16", "lora.dropout=0.2": "lora.dropout: 0.0 -> 0.2",
    "data.eval_fraction=0.1": "data.eval_fraction: 0.3 -> 0.1", "layout=padded": "layout: auto -> padded",
}  # fmt: skip


def test_every_change_that_would_make_it_another_run_is_refused_with_a_table(
    command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    words = tiny_words(pairs_file, tmp_path / "run")
    assert command("dpo-train", *words).code == 0
    shutil.rmtree(tmp_path / "run" / "final")
    for change, says in REFUSED_CHANGES.items():
        with fault(16):
            ended = command("dpo-train", *words, "resume=auto", change)
            assert ended.code == 4, (change, ended.out[-300:])
            assert says in ended.err and ended.err.count("\n") == 1, ended.err
            key, was, now = re.split(": | -> ", says)
            assert re.search(rf"^{re.escape(key)} +{re.escape(was)} +{re.escape(now)}", ended.out, re.M), ended.out
    with fault(16, tries=2):
        told = command("dpo-train", *words, "resume=auto", "max_steps=4", "log_every=2", "save_every=1")
        assert told.code == 0
        assert (
            "warning: resuming with another max_steps: 3 -> 4: the run is no longer the one that was started"
            in told.out
        )
        assert "log_every" not in told.out


@pytest.mark.parametrize("change", ["a row more", "a row less", "a word", "the order"])
def test_changed_data_are_refused(command: Command, tmp_path: Path, change: str) -> None:
    rows = sample_rows(20)
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    words = tiny_words(file, tmp_path / "run")
    with fault(17):
        assert command("dpo-train", *words).code == 0
        shutil.rmtree(tmp_path / "run" / "final")
        changed = {
            "a row more": [*rows, *sample_rows(21)[20:]],
            "a row less": rows[:-1],
            "a word": [*rows[:-1], {**rows[-1], "chosen": "Another."}],
            "the order": rows[::-1],
        }[change]
        write_jsonl(file, changed)
        ended = command("dpo-train", *words, "resume=auto")
        assert ended.code == 4 and "was trained on other data than data.train=" in ended.err


def test_a_finished_run_is_complete_and_stays_as_it_is(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    words = tiny_words(pairs_file, tmp_path / "run")
    with fault(17):
        assert command("dpo-train", *words).code == 0
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        ended = command("dpo-train", *words, "resume=auto")
        assert ended.code == 0 and ended.out.endswith(f"\nalready complete: {tmp_path / 'run' / 'final'}\n")
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


# Fault 19: terminals


@pytest.mark.parametrize("columns", [20, 80, 200])
@pytest.mark.parametrize("kind", ["xterm-256color", "dumb", "no color", "ascii", "no terminal"])
def test_no_terminal_makes_a_run_fail(tmp_path: Path, straight: Straight, kind: str, columns: int) -> None:
    import fcntl
    import pty
    import struct
    import termios

    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def on_terminal() -> None:
        import sys

        os.environ.update({"TERM": "dumb" if kind == "dumb" else "xterm-256color"})
        os.environ.pop("COLUMNS", None)
        if kind == "no color":
            os.environ["NO_COLOR"] = "1"
        if kind != "no terminal":
            os.dup2(terminal, 1)
        sys.stdout = open(1, "w", closefd=False, encoding="ascii" if kind == "ascii" else "utf-8")  # noqa: SIM115

    with fault(19):
        child = start(tmp_path, run_words(tmp_path), on_terminal)
        os.set_blocking(screen, False)
        shown, ended, resized = b"", False, False
        while not ended:  # read on, or the terminal fills up and holds the run
            ended = bool(os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
            if not resized and child.phase[0] == 3:
                resized = True
                fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 33, 0, 0))
            try:
                shown += os.read(screen, 1 << 16)
            except BlockingIOError:
                time.sleep(0.005)
        left = child.wait()
        os.close(screen)
        os.close(terminal)
        assert (left.code, left.err) == (0, "")
        if kind == "no terminal":
            shown = left.out.encode()
        assert b"6/6" in shown and b"verdict" in shown
        if kind in ("dumb", "no terminal"):
            assert b"\x1b" not in shown
        if kind == "no color":
            assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", shown)
        LEDGER.compared[19] += same_content(tmp_path / "run", straight())


# Fault 20: hostile text

HOSTILE = [
    "\x1b[2J\x1b[31mred", "\x1b]52;c;cm0gLXJmIH4=\x07", "\x9b31m\x90q\x9c", "a\u202egnp.exe\u2066b\u2069",
    "[/INST] [red]x[/red] [link=file:///etc/passwd]y[/link]", "a\rb\x08c\x00d", "\u200bzero\ufeffwidth",
    "\U000e0041tag", "%s %n {0} {x!r} ${oc.env:HOME}", "<script>alert(1)</script>", "' OR 1=1; --", "\ud83d",
]  # fmt: skip
FORBIDDEN = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]"
)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_text_in_pairs_names_and_answers_is_shown_escaped_everywhere(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    from dpo_cli.commands import evaluate

    row = text.encode("utf-8", "ignore").decode()
    rows = [{"prompt": f"{row} {n}", "chosen": f"yes {row} {n}", "rejected": f"no {n} {row}"} for n in range(20)]
    name = "".join(c for c in row if c not in "\x00/=,$") or "x"
    file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    with fault(20, tries=3):
        words = [*tiny_words(tmp_path / "a", tmp_path / "run")[:3], f"data.train={file}", "data.eval_fraction=0.3"]
        words += ["batch_size=4", "max_steps=1", f"output_dir={tmp_path / 'run'}"]
        trained = command("dpo-train", *words)
        assert trained.code == 0, trained.err
        monkeypatch.setattr(evaluate, "greedy_completions", lambda _, __, pairs, *___: [text] * len(pairs))
        scored = command("dpo-eval", f"checkpoint={tmp_path / 'run'}", "samples=2")
        assert scored.code == 0, scored.err
        missing = command("dpo-train", *tiny_words(tmp_path / f"{name}-gone.jsonl", tmp_path / "other"))
        assert missing.code == 3 and missing.err.count("\n") == 1
        log = (tmp_path / "run" / "train.log").read_text()
        card = (tmp_path / "run" / "final" / "README.md").read_text()
        (page,) = (tmp_path / "run" / "eval").glob("*/report.html")
        for surface in (trained.out, scored.out, missing.err, log, card, page.read_text()):
            found = FORBIDDEN.search(surface)
            assert not found, (found, surface[max(0, found.start() - 40) : found.end() + 20] if found else "")


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</td></table><iframe src=//evil>", "<!--", "]]>",
     "&lt;b&gt;", "javascript:alert(1)", "<style>*{display:none}</style>", "\x1b[31m</title><svg onload=alert(1)>"],
)  # fmt: skip
def test_the_page_of_a_report_holds_no_mark_that_is_not_its_own(text: str) -> None:
    from html.parser import HTMLParser

    from dpo_cli.pages.pages import evaluation_page

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.marks: set[str] = set()
            self.words = ""

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.marks |= {tag, *(f"{tag}.{name}" for name, _ in attributes)}

        def handle_data(self, data: str) -> None:
            self.words += data + "\n"

        def handle_comment(self, data: str) -> None:
            self.marks.add("comment")

    def read(words: str) -> Reader:
        reader = Reader()
        report = {"checkpoint": "run", "reference": words, "summary": {"color": "green", "text": words}}
        report["harness"] = {words: {"policy": {words: 0.5}, "reference": {}, "difference": {words: [0.5, 0.4, 0.6]}}}
        pieces = {"chosen": [[words, 0.5]], "rejected": [[words, -0.5]]}
        examples = [{"kind": "best", "margin": 1.0, "prompt": words, "source": words, **pieces}]
        answers = [{"prompt": words, "reference": words, "policy": words}]
        reader.feed(evaluation_page(report, [], examples, answers))
        return reader

    with fault(20):
        plain, found = read("plain"), read(text)
        assert found.marks == plain.marks and "script" not in found.marks
        assert found.words.count(safe_text(text)) == plain.words.count("plain") > 8


def test_words_that_look_like_markup_stay_words(command: Command, tmp_path: Path) -> None:
    rows = [{"prompt": f"[/INST] {n}", "chosen": f"[red]yes[/red] {n}", "rejected": f"[bold] {n}"} for n in range(9)]
    with fault(20):
        ended = command("dpo-train", *tiny_words(write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "run"))
        assert ended.code == 0 and "[/INST]" in ended.out and "[red]yes[/red]" in ended.out


# Fault 21: a stranger's checkpoint


class Canary:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def stranger(command: Command, pairs_file: Path, tmp_path: Path) -> Path:
    """Somebody's run, finished, before it is spoilt."""
    assert command("dpo-train", *tiny_words(pairs_file, tmp_path / "stranger")).code == 0
    return tmp_path / "stranger"


def billion_laughs() -> str:
    levels = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(levels) + "\n"


CONFIGS = {
    "a target": ("loss:\n  _target_: os.system\n", "unknown key 'data'"),
    "an interpolation": ("EARLIER\nx: ${oc.env:HOME}\n", "holds an interpolation"),
    "a resolver": ("beta: ${oc.decode:1}", "holds an interpolation"),
    "a tag": ("!!python/object/apply:os.system ['touch CANARY']", "cannot be read as YAML (ConstructorError)"),
    "an alias bomb": (billion_laughs(), "holds a YAML alias; a config is data only"),
    "a nesting bomb": ("[" * 100_000, "nested too deeply to be the config of a run"),
    "a large file": ("x: " + "a" * 2**21, "too large to be the config of a run"),
    "a list": ("[1, 2]", "is not the config of a run"),
    "bytes": ("\x00\x01", "cannot be read as YAML ("),
    "another key": ("EARLIER\nexec: rm\n", "unknown key 'exec'"),
    "another type": ("EARLIER\nbeta: {a: 1}\n", "beta={'a': 1}: must be a number"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_strangers_config_is_data_or_refused(command: Command, tmp_path: Path, stranger: Path, name: str) -> None:
    text, says = CONFIGS[name]
    canary = tmp_path / "canary"
    earlier = (stranger / "config.yaml").read_text()
    if name.startswith("another"):
        earlier = re.sub(r"^beta: .*\n", "", earlier, flags=re.M) if name == "another type" else earlier
    (stranger / "config.yaml").write_text(text.replace("CANARY", str(canary)).replace("EARLIER", earlier))
    with fault(21, tries=2):
        for words in (("dpo-eval", f"checkpoint={stranger}"), ("dpo-train", f"replay={stranger}")):
            ended = command(*words)
            assert ended.code == 4 and ended.err.count("\n") == 1, ended
            assert says in ended.err or name == "a target", ended.err
            assert not canary.exists()


SETTINGS = {"device": "cpu", "dtype": "float32", "layout": "packed_segments", "token_budget": 9, "max_pairs": None}
STATES: dict[str, Any] = {
    "a nesting bomb": "[" * 100_000,
    "a large file": '"' + "a" * 2**21 + '"',
    "a list": "[]",
    "a negative step": {"step": -1},
    "a step of text": {"step": "4"},
    "a step that is true": {"step": True},
    "a dtype that is a function": {"settings": {**SETTINGS, "dtype": "load"}},
    "a layout that is none": {"settings": {**SETTINGS, "layout": "x"}},
    "a budget below 1": {"settings": {**SETTINGS, "token_budget": 0}},
    "no pair in a micro-batch": {"settings": {**SETTINGS, "max_pairs": 0}},
    "a setting more": {"settings": {**SETTINGS, "more": 1}},
    "a later version": {"version": 3},
    "a version of text": {"version": "2"},
    "a number without end": {"seconds": 10**400},
    "fewer pairs than none": {"sums_pairs": -1},
    "an infinity": {"seconds": float("inf")},
    "a key more": {"more": 1},
}


@pytest.mark.parametrize("name", STATES)
def test_a_strangers_state_is_numbers_or_refused(stranger: Path, name: str) -> None:
    checkpoint, harm = checkpoints(stranger / "checkpoints")[-1], STATES[name]
    file = checkpoint / "state.json"
    known = json.loads(file.read_text())
    file.write_text(harm if isinstance(harm, str) else json.dumps({**known, **harm}))
    with fault(21), pytest.raises(CheckpointError, match=r"state\.json: "):
        read_state(checkpoint)


@pytest.mark.parametrize("name", ["../../config.yaml", "/etc/passwd", "..", "a/b", "", "x\x00y", "\x1b[31m"])
def test_a_manifest_names_files_of_its_folder_only(
    command: Command, pairs_file: Path, stranger: Path, name: str
) -> None:
    last = checkpoints(stranger / "checkpoints")[-1]
    manifest = json.loads((last / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "x"}
    (last / MANIFEST).write_text(json.dumps(manifest))
    with fault(21):
        ended = command("dpo-eval", f"checkpoint={last}")
        assert ended.code == 4 and ended.err.count("\n") == 1
        assert "names a file outside the checkpoint" in ended.err or "missing" in ended.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", ended.err)


@pytest.mark.parametrize("link", ["metrics.jsonl", "config.yaml", "manifest.json", "train.log", "reference_logps.bin",
                                  "trained_on.safetensors", "checkpoints", "final", ".lock"])  # fmt: skip
def test_a_link_in_a_run_directory_is_not_written_through(
    command: Command, pairs_file: Path, tmp_path: Path, stranger: Path, link: str
) -> None:
    victim = tmp_path / "victim"
    place = stranger / link
    if place.is_dir():
        shutil.move(place, victim)
    else:
        victim.write_bytes(place.read_bytes())
        place.unlink()
    before = sorted((path, path.stat().st_mtime_ns) for path in [victim, *victim.rglob("*")])
    place.symlink_to(victim)
    if link != "final":
        shutil.rmtree(stranger / "final")
    with fault(21):
        ended = command("dpo-train", *tiny_words(pairs_file, stranger), "resume=auto")
        assert ended.code == 4 or (link == "final" and "already complete" in ended.out), ended
        assert "is a symbolic link" in ended.err or link == "final"
        assert before == sorted((path, path.stat().st_mtime_ns) for path in [victim, *victim.rglob("*")])


@pytest.mark.parametrize("place", ["eval", "eval/x", "eval/x/report.json", "eval/x/pairs.jsonl", "eval/x/report.html"])
def test_a_report_is_not_written_through_a_link(command: Command, tmp_path: Path, stranger: Path, place: str) -> None:
    victim = tmp_path / "victim"
    if place.endswith(("json", "jsonl", "html")):
        victim.write_text("precious")
    else:
        victim.mkdir()
    (stranger / place).parent.mkdir(parents=True, exist_ok=True)
    (stranger / place).symlink_to(victim)
    with fault(21):
        ended = command("dpo-eval", f"checkpoint={stranger}", "name=x")
        assert ended.code in (4, 7) and "is a symbolic link" in ended.err
        assert (victim.is_dir() and not list(victim.iterdir())) or victim.read_text() == "precious"


def test_a_strangers_manifest_of_a_run_is_shown_escaped_or_not_at_all(
    command: Command, pairs_file: Path, tmp_path: Path, stranger: Path
) -> None:
    hostile: dict[str, Any] = {
        "packages": {"\x1b]52;c;cm0gLXJm\x07": 1, "torch": "\x1b[31m1"},
        "device": 5,
        "batches": [],
    }
    change_json(stranger / "manifest.json", **hostile)
    with fault(21, tries=2):
        again = command("dpo-train", f"replay={stranger}", f"output_dir={tmp_path / 'again'}")
        scored = command("dpo-eval", f"checkpoint={stranger}")
        assert (again.code, scored.code) == (0, 0), (again.err, scored.err)
        assert "packages.torch: \\x1b[31m1 -> " in again.out
        for surface in (again.out, scored.out, (tmp_path / "again" / "train.log").read_text()):
            assert not FORBIDDEN.search(surface)


def test_a_manifest_with_a_size_without_end_is_refused(stranger: Path) -> None:
    last = checkpoints(stranger / "checkpoints")[-1]
    (last / MANIFEST).write_text(re.sub(r'"bytes": \d+', '"bytes": 1e999', (last / MANIFEST).read_text()))
    with fault(21), pytest.raises(CheckpointError, match="is not the manifest of a checkpoint"):
        validate(last)


def test_no_pickle_is_read_from_a_model_or_an_adapter(
    command: Command, pairs_file: Path, tmp_path: Path, stranger: Path, model: Path
) -> None:
    canary = tmp_path / "canary"
    poison = pickle.dumps(Canary(canary))
    with fault(21, tries=3):
        adapter = tmp_path / "adapter"
        shutil.copytree(stranger / "final", adapter)
        (adapter / "adapter_model.safetensors").unlink()
        (adapter / "adapter_model.bin").write_bytes(poison)
        ended = command("dpo-eval", f"checkpoint={adapter}", "data=jsonl", f"data.eval={pairs_file}")
        assert ended.code == 4 and "has no adapter_model.safetensors; only safetensors are read" in ended.err
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(poison)
        ended = command("dpo-train", *with_model(pairs_file, tmp_path / "run", model))
        assert ended.code == 4 and ended.err.count("\n") == 1
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (checkpoints(stranger / "checkpoints")[-1] / name).write_bytes(poison)
        shutil.rmtree(stranger / "final")
        assert command("dpo-train", *tiny_words(pairs_file, stranger), "resume=auto").code == 0
        assert not canary.exists()
        pickle.loads(poison)  # the trap itself works
        assert canary.exists()


ADAPTERS = {
    "a nesting bomb": "[" * 100_000,
    "a large file": '{"x": "' + "a" * 2**21 + '"}',
    "no base": {"base_model_name_or_path": None},
    "a base elsewhere": {"base_model_name_or_path": "/nowhere/at/all"},
    "a rank without end": {"r": 10**12},
    "a rank of text": {"r": "many"},
    "another method": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9},
    "no method": {"peft_type": "../../x"},
    "a method that reads pickles": {"peft_type": "XLORA"},
    "another rank": {"r": 2},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_strangers_adapter_config_is_data_or_refused(
    command: Command, pairs_file: Path, tmp_path: Path, stranger: Path, name: str
) -> None:
    adapter, harm = tmp_path / "adapter", ADAPTERS[name]
    shutil.copytree(stranger / "final", adapter)
    if isinstance(harm, str):
        (adapter / "adapter_config.json").write_text(harm)
    else:
        change_json(adapter / "adapter_config.json", **harm)
    with fault(21):
        ended = command("dpo-eval", f"checkpoint={adapter}", "data=jsonl", f"data.eval={pairs_file}")
        assert ended.code == 4 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended


# Fault 22: secrets


def test_secrets_reach_no_file_and_no_screen(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, key, password = "hf_" + "a1B2" * 8, "a-value-only-its-name-betrays", "p4ssw0rd-of-a-proxy"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WANDB_API_KEY", key)
    shutil.copy(pairs_file, tmp_path / f"{key}.jsonl")
    run = tmp_path / "run"
    with fault(22, tries=4):
        words = tiny_words(tmp_path / f"{key}.jsonl", run)
        ended = command("dpo-train", *words)
        assert ended.code == 0
        gone = command("dpo-train", *tiny_words(tmp_path / f"{token}.jsonl", tmp_path / "other"))
        proxied = command("dpo-train", f"data.train=https://me:{password}@example.org/a/b.jsonl", "data=jsonl")
        texts = [ended.out, gone.err, gone.out, proxied.err]
        texts += [path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()]
        for secret in (token, key, password):
            assert not [text for text in texts if secret in text]
        assert "[redacted]" in gone.err and "[redacted]" in proxied.err
        assert "[redacted]" in yaml.safe_load((run / "config.yaml").read_text())["data"]["train"]
        assert "[redacted]" in json.loads((run / "manifest.json").read_text())["argv"][3]
        shutil.rmtree(run / "final")
        resumed = command("dpo-train", *words, "resume=auto")
        assert resumed.code == 0, resumed.err


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "x" * 30, "sk-" + "y7" * 20, "sk-proj-" + "y7" * 20, "ghp_" + "z" * 36, "github_pat_" + "w" * 30,
     "xoxb-" + "1" * 20, "AKIA" + "A" * 16, "AIza" + "b" * 35, "glpat-" + "c" * 20],
)  # fmt: skip
def test_tokens_are_known_by_their_form(secret: str) -> None:
    with fault(22):
        assert redacted(f"a {secret} b") == "a [redacted] b"
        assert safe_text(f"https://u:{secret}@host/x") == "https://[redacted]@host/x"
        assert redacted("data/sk-learn-preferences-v hf_short") == "data/sk-learn-preferences-v hf_short"


# Fault 23: code of a model's authors


@pytest.fixture
def with_code(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model whose config points to Python beside it, which writes a file when it is imported."""
    canary = tmp_path / "canary"
    (model / "theirs.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    change_json(
        model / "config.json", auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
        model_type="theirs",
    )  # fmt: skip
    return model, canary


def test_a_models_own_code_does_not_run(
    command: Command, pairs_file: Path, tmp_path: Path, with_code: tuple[Path, Path]
) -> None:
    model, canary = with_code
    with fault(23):
        ended = command("dpo-train", *with_model(pairs_file, tmp_path / "run", model))
        assert ended.code == 4 and "contains custom code" in ended.err and ended.err.count("\n") == 1
        assert not canary.exists()


def test_a_file_cannot_decide_that_code_runs(command: Command, tmp_path: Path, stranger: Path) -> None:
    config = (stranger / "config.yaml").read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    (stranger / "config.yaml").write_text(config)
    with fault(23, tries=2):
        scored = command("dpo-eval", f"checkpoint={stranger}")
        assert scored.code == 2 and "add trust_remote_code=true" in scored.err
        again = command("dpo-train", f"replay={stranger}", f"output_dir={tmp_path / 'again'}")
        assert again.code == 2 and "add model.trust_remote_code=true" in again.err
        assert not (tmp_path / "again").exists()


def test_trust_that_the_user_gives_is_said_in_red_and_recorded(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.console.reporter import Reporter

    said: list[tuple[str, str | None]] = []
    original = Reporter.say

    def say(self: Reporter, text: str = "", style: str | None = None) -> None:
        said.append((text, style))
        original(self, text, style)

    monkeypatch.setattr(Reporter, "say", say)
    with fault(23):
        words = [*tiny_words(pairs_file, tmp_path / "run"), "model.trust_remote_code=true"]
        assert command("dpo-train", *words).code == 0
        told = "model.trust_remote_code=true: Python of the model's authors runs on this machine"
        assert (told, "red") in said
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["trust_remote_code"] is True
        assert command("dpo-eval", f"checkpoint={tmp_path / 'run'}", "trust_remote_code=true").code == 0
        assert any(style == "red" and text.startswith("trust_remote_code=true") for text, style in said)
