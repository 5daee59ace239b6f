"""Faults 2 and 3: a signal in any phase ends in a saved run and the promised code; a second one corrupts nothing."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import LEDGER, Child, fault, run_words, same_content, start, straight, wrap  # noqa: F401

from dpo_cli.runs.checkpoint import checkpoints, validate

pytestmark = pytest.mark.faults
Straight = Callable[..., dict[str, bytes]]


def slow(name: str, seconds: float) -> Callable[[], None]:
    """In a child: make one part of the runner slow enough to be met."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*arguments: Any, **more: Any) -> Any:
            time.sleep(seconds)
            return original(*arguments, **more)

        return slowly

    return lambda: wrap(name, around)


def resumes(folder: Path, expected: dict[str, bytes], number: int) -> None:
    for checkpoint in checkpoints(folder / "run" / "checkpoints"):
        validate(checkpoint)
    resumed = start(folder, run_words(folder, "resume=auto")).wait()
    assert resumed.code == 0, resumed.err
    LEDGER.compared[number] += same_content(folder / "run", expected)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", ["tokenising", "reference", "training", "evaluation", "save"])
def test_a_signal_in_any_phase_saves_and_ends_with_75(
    tmp_path: Path,
    straight: Straight,
    phase: str,
    kind: signal.Signals,
) -> None:
    with fault(2):
        slowed = {"tokenising": "load_pairs", "reference": "complete_reference"}.get(phase, "log")
        child = start(tmp_path, run_words(tmp_path), slow(slowed, 0.2))
        assert child.reach(phase)
        child.send(kind)
        left = child.wait()
        assert left.code == 75, left
        assert f"{kind.name} received: stopping at the next safe point\n" in left.err
        assert f"error: stopped by {kind.name} at step " in left.err or phase == "tokenising"
        resumes(tmp_path, straight(), 2)


def test_a_second_signal_while_saving_corrupts_nothing(tmp_path: Path, straight: Straight) -> None:
    with fault(2, tries=2):
        child = start(tmp_path, run_words(tmp_path), slow("save_checkpoint", 0.3))
        assert child.reach("training")
        child.send(signal.SIGTERM)
        assert child.reach("save")
        child.send(signal.SIGTERM)
        child.send(signal.SIGUSR1)
        assert child.wait().code == 75
        resumes(tmp_path, straight(), 2)


def test_a_second_signal_ends_a_chat_template_that_loops_for_ever(tmp_path: Path, tiny_path: str) -> None:
    shutil.copytree(tiny_path, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for n in range(99999) %}" * 4 + "{% endfor %}" * 4)

    def telling() -> None:
        from dpo_cli.training import build

        original = build.load_tokenizer

        def load_tokenizer(source: Any) -> Any:
            os.write(2, b"loading the tokenizer\n")
            return original(source)

        build.load_tokenizer = load_tokenizer

    for kind, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        folder = tmp_path / kind.name
        with fault(2, tries=2):
            child = start(folder, run_words(folder, f"model.name_or_path={tmp_path / 'model'}"), telling)
            child.heard("loading the tokenizer")
            child.send(kind)
            child.heard(f"{kind.name} received")
            child.send(kind)
            assert child.wait(10).code == code


def test_a_signal_while_answers_are_generated_is_answered(tmp_path: Path, straight: Straight) -> None:
    run = tmp_path / "trained"
    assert start(run, run_words(run)).wait().code == 0

    def generate_slowly() -> None:
        from dpo_cli.generation import generate

        original = generate.generate_completions

        def slowly(*arguments: Any) -> Any:
            *others, poll = arguments

            def slow_poll() -> None:
                Path(tmp_path / "generating").touch()
                time.sleep(0.05)
                poll()

            return original(*others, slow_poll)

        generate.generate_completions = slowly

    with fault(2):
        words = [f"checkpoint={run / 'run'}", "samples=3", "max_new_tokens=2000"]
        child = start(tmp_path / "eval", words, generate_slowly, "dpo-eval")
        deadline = time.monotonic() + 60
        while not (tmp_path / "generating").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "generating").exists()
        child.send(signal.SIGTERM)
        left = child.wait()
        assert (left.code, left.err.splitlines()[-1]) == (75, "error: stopped by SIGTERM")


def test_ctrl_c_once_saves_and_ends_with_130(tmp_path: Path, straight: Straight) -> None:
    with fault(3):
        child = start(tmp_path, run_words(tmp_path), slow("log", 0.2))
        assert child.reach("training")
        child.send(signal.SIGINT)
        left = child.wait()
        assert left.code == 130 and "error: stopped by Ctrl-C at step " in left.err
        resumes(tmp_path, straight(), 3)


@pytest.mark.parametrize("phase", ["training", "evaluation", "save"])
def test_ctrl_c_twice_leaves_at_once_with_the_last_checkpoint_intact(
    tmp_path: Path,
    straight: Straight,
    phase: str,
) -> None:
    with fault(3):
        slowed = {"training": "forward_backward", "evaluation": "score_pairs", "save": "save_checkpoint"}[phase]
        child = start(tmp_path, run_words(tmp_path), slow(slowed, 1.0))
        assert child.reach(phase)
        child.send(signal.SIGINT)
        child.heard("SIGINT received")  # two signals at once would be one
        child.send(signal.SIGINT)
        left = child.wait()
        assert left.code == 130 and "error" not in left.err, left
        resumes(tmp_path, straight(), 3)


def test_ctrl_c_twice_after_a_sigterm_leaves_at_once(tmp_path: Path, straight: Straight) -> None:
    with fault(3):
        child = start(tmp_path, run_words(tmp_path), slow("forward_backward", 1.0))
        assert child.reach("training")
        for number, name in ((signal.SIGTERM, "SIGTERM received"), (signal.SIGINT, "SIGINT received")):
            child.send(number)
            child.heard(name)
        child.send(signal.SIGINT)
        assert child.wait().code == 130
        resumes(tmp_path, straight(), 3)


def test_ctrl_c_twice_on_a_terminal_gives_the_cursor_back(tmp_path: Path) -> None:
    import pty

    screen, terminal = pty.openpty()
    shown = b""

    def on_terminal() -> None:
        import sys

        os.environ["TERM"] = "xterm-256color"
        for number in (1, 2):
            os.dup2(terminal, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        slow("forward_backward", 1.0)()

    with fault(3):
        child = start(tmp_path, run_words(tmp_path), on_terminal)
        os.set_blocking(screen, False)

        def read() -> bytes:
            try:
                return os.read(screen, 65536)
            except OSError:
                return b""

        def until(what: bytes) -> None:
            nonlocal shown
            deadline = time.monotonic() + 60
            while what not in shown:
                assert time.monotonic() < deadline, shown[-300:]
                shown += read()
                time.sleep(0.005)

        until(b"\x1b[?25l")  # the cursor is hidden while the table is live
        child.send(signal.SIGINT)
        until(b"SIGINT received")
        child.send(signal.SIGINT)
        assert child.wait().code == 130
        shown += read()
        assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def test_a_signal_at_every_moment_of_a_run_is_answered(tmp_path: Path, straight: Straight) -> None:
    """Fifteen moments, spread evenly: whatever the run is doing, it ends in one of the promised ways and goes on."""
    measured = time.monotonic()
    assert start(tmp_path / "whole", run_words(tmp_path / "whole")).wait().code == 0
    whole = time.monotonic() - measured
    for moment in range(15):
        folder = tmp_path / str(moment)
        with fault(2):
            child: Child = start(folder, run_words(folder))
            child.reach("tokenising")  # before that the signal's own meaning holds: nothing is begun yet
            time.sleep(moment / 15 * whole)
            child.send(signal.SIGTERM)
            left = child.wait()
            assert left.code in (75, 0), left
            resumes(folder, straight(), 2)


def test_a_terminal_that_is_closed_changes_no_byte(tmp_path: Path, straight: Straight) -> None:
    """The terminal is the process's own: closing it sends SIGHUP, and nothing can be written to it any more."""
    import fcntl
    import pty
    import sys
    import termios

    screen, terminal = pty.openpty()

    def on_its_own_terminal() -> None:
        os.setpgid(0, 0)
        pid = os.getpid()
        if os.getsid(0) != pid:
            try:
                os.setsid()
            except PermissionError:  # a leader of a group cannot; its signal is then sent by hand
                return
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for number in (0, 1, 2):
            os.dup2(terminal, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115

    with fault(5):
        child = start(tmp_path, run_words(tmp_path), on_its_own_terminal)
        os.close(terminal)
        assert child.reach("training")
        os.close(screen)
        child.send(signal.SIGHUP)
        assert child.wait().code == 0
        LEDGER.compared[5] += same_content(tmp_path / "run", straight())


def test_signals_that_are_sent_again_and_again_end_with_the_same_code(tmp_path: Path, straight: Straight) -> None:
    with fault(2, tries=40):
        child = start(tmp_path, run_words(tmp_path), slow("log", 0.1))
        assert child.reach("training")
        for _ in range(40):
            child.send(signal.SIGTERM)
            time.sleep(0.01)
        assert child.wait().code == 75
        resumes(tmp_path, straight(), 2)
