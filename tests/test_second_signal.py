"""A second signal ends a process whose safe point never comes, and no save."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO

import pytest

ENDLESS = "{% for n in range(99999) %}" * 4 + "{% endfor %}" * 4  # the sandbox bounds each loop, not their product
PROGRAM = f"""
import signal, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
from dpo_cli.signals import StopSignals

template = ImmutableSandboxedEnvironment().from_string({ENDLESS!r})
with StopSignals(print) as signals:
    if "saving" in sys.argv:
        signals.protect_saving()
    print("ready", flush=True)
    if "waits" in sys.argv:
        sys.stdin.readline()
        signals.poll()
    template.render()
"""


@pytest.fixture
def started() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the program; what still runs at the end is killed."""
    children: list[subprocess.Popen[str]] = []

    def start(*words: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        program = [sys.executable, "-c", PROGRAM, *words]
        children.append(subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        assert heard(children[-1].stdout) == "ready\n"
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def heard(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("SIGTERM", "SIGTERM", 75), ("SIGINT", "SIGINT", 130), ("SIGUSR1", "SIGTERM", 75), ("SIGINT", "SIGTERM", 130)],
)
def test_a_second_signal_ends_a_template_that_loops_for_ever(
    started: Callable[..., "subprocess.Popen[str]"], first: str, second: str, code: int
) -> None:
    child = started()
    child.send_signal(signal.Signals[first])
    assert heard(child.stderr) == f"{first} received: stopping at the next safe point\n"
    child.send_signal(signal.Signals[second])
    assert child.wait(60) == code


def test_a_second_sigterm_does_not_cut_a_save_short(started: Callable[..., "subprocess.Popen[str]"]) -> None:
    child = started("saving", "waits")
    for _ in range(2):
        child.send_signal(signal.SIGTERM)
        assert heard(child.stderr) == "SIGTERM received: stopping at the next safe point\n"
    _, said = child.communicate("go on\n", timeout=60)
    assert said.endswith("StoppedError: stopped by SIGTERM\n")


def test_a_second_ctrl_c_does(started: Callable[..., "subprocess.Popen[str]"]) -> None:
    child = started("saving", "waits")
    child.send_signal(signal.SIGINT)
    assert heard(child.stderr) == "SIGINT received: stopping at the next safe point\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
