"""The console: untrusted text cannot act, no stream can stop a run, numbers are short."""

import io
import math
import re
from pathlib import Path

import pytest
from conftest import share
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_cli.console.reporter import Reporter, sparkline
from dpo_cli.console.text import duration, interval, plural, safe_text, significant


@share(4)
@given(
    st.text(st.characters(codec=None), max_size=60) | st.text(st.characters(codec="ascii"), max_size=30),
    st.none() | st.integers(3, 30),
)
@example("\x1b[31mred\x1b[0m \x1b]0;title\x07", None)
def test_shown_text_is_one_line_that_moves_no_cursor_and_fakes_no_style(raw: str, limit: int | None) -> None:
    shown = safe_text(raw, limit)
    assert not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", shown)  # controls, ESC among them; surrogates
    assert not re.search("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]", shown)  # unseen
    assert len(shown.splitlines()) <= 1
    assert safe_text(shown) == shown


def test_safe_text_escapes_what_could_act() -> None:
    assert safe_text("a\x1b[31mb\u202ec\r\nd\x9b") == "a\\x1b[31mb\\u202ec\\r\\nd\\x9b"
    assert safe_text("a\x1b[31mb\tc\x07") == "a\\x1b[31mb\\tc\\x07"
    assert safe_text("naïve 日本 [red]") == "naïve 日本 [red]"
    assert safe_text("x" * 20, limit=10) == "xxxxxxx..."
    assert safe_text("token hf_abcdefghijklmnopqrstuvwx end") == "token [redacted] end"
    assert safe_text("token hf_abcdefghijklmnopqrstuvwx end", limit=20) == "token [redacted] end"


def test_numbers_read_well() -> None:
    cases = [5e-7, 0.000123, 0.69314, 12.345, 4321.0, 0, -2.5, 1e9, float("nan")]
    assert [significant(value) for value in cases] == [
        "5e-07", "0.000123", "0.693", "12.3", "4320", "0", "-2.5", "1e+09", "nan",
    ]  # fmt: skip
    assert [duration(value) for value in (45, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 05 min"]
    assert (plural(1, "pair"), plural(42537, "pair")) == ("1 pair", "42,537 pairs")


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([0, 1, 2, 3], width=4) == "▁▃▆█"
    assert sparkline([1.0, 1.0], width=5) == "▁▁"
    assert len(sparkline(list(map(float, range(100))), width=10)) == 10
    assert sparkline([float("nan")], width=3) == ""


RECORD = {
    "step": 2, "split": "train", "loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75,
    "rewards/chosen": 0.1, "rewards/rejected": -0.15, "lr": 5e-7, "pairs_per_second": 4.0, "peak_memory_gib": 1.5,
}  # fmt: skip


WATCHED = {
    "gradient_weight": 0.4567, "gradient_weight/over_0.9": 0.05, "gradient_weight/under_0.1": 0.125,
    "drift/case": "both down", "drift/chosen_per_token": -0.0213, "drift/rejected_per_token": -0.1,
}  # fmt: skip


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_record_is_one_plain_line() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.start("step", 10)
    reporter.record(RECORD)
    assert stream.getvalue() == (
        "step 2/10  loss 0.5  margin 0.25  accuracy 0.75  chosen 0.1  rejected -0.15  lr 5e-07  pairs/s 4  GiB 1.5\n"
    )


def test_an_interval_with_an_unknown_end_is_none() -> None:
    assert interval(0.634, 0.7, digits=2) == "0.63 to 0.7"
    assert interval(-math.inf, math.inf) == interval(math.nan, 1.0) == "no interval"


def test_the_gradient_weight_ends_the_line() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.start("step", 10)
    reporter.record({**RECORD, **WATCHED})
    assert stream.getvalue().endswith("pairs/s 4  GiB 1.5  grad weight 0.457\n")


def test_on_a_terminal_a_table_a_sparkline_and_a_bar_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    reporter = Reporter(stream)
    reporter.start("step", 10)
    for step in (1, 2, 3):
        reporter.record({**RECORD, **WATCHED, "step": step, "rewards/margins": step / 10})
        reporter.advance()
    reporter.stop()
    shown = stream.getvalue()
    assert "5e-07" in shown and "3/10" in shown and "ETA" in shown and "margin ▁▅█ 0.3" in shown
    assert "grad weight 0.46; over 0.9 for 5% of pairs, under 0.1 for 12%" in shown
    assert "log-ratio to the reference: chosen -0.021, rejected -0.100 nats a token" in shown


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([90], None),  # the first compiles, and says nothing about the others
        ([90, 4], "ETA 32 s"),  # 8 steps of 4 s
        ([90, 4, 6], "ETA 35 s"),  # 7 steps of 5 s
    ],
)
def test_the_time_left_is_shown_from_the_second_step_on(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], steps: list[int], left: str | None
) -> None:
    now = [0.0]
    monkeypatch.setattr("dpo_cli.console.reporter.time.monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    shown = stream()
    reporter = Reporter(shown)
    reporter.start("step", 10)
    for number, seconds in enumerate(steps, start=1):
        now[0] += seconds
        reporter.advance()
        reporter.record({**RECORD, "step": number})
    reporter.stop()
    assert re.findall(r"ETA \d+ \w+", shown.getvalue())[-1:] == ([left] if left else [])
    rates = re.findall(r"([\d.]+)/s ETA", shown.getvalue())
    assert rates[-1:] == ([{"ETA 32 s": "0.25", "ETA 35 s": "0.2"}[left]] if left and stream is Terminal else [])


def test_work_between_two_steps_has_a_bar_of_its_own_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    reporter = Reporter(stream)
    reporter.start("step", 10)
    advance = reporter.working("evaluating pair", 20)
    advance(5)
    reporter.stop()
    assert "evaluating pair" in stream.getvalue() and "5/20" in stream.getvalue()


@pytest.mark.parametrize("columns", ["20", "80"])
@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_odd_terminals_raise_nothing(monkeypatch: pytest.MonkeyPatch, columns: str, term: str) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    reporter = Reporter(stream)
    reporter.facts([("model", "x" * 100)])
    reporter.pair("prompt", "yes<eos>", "no", "<eos>")
    reporter.start("step", 10)
    reporter.record(RECORD)
    reporter.close()
    if term == "dumb":
        assert "\x1b" not in stream.getvalue()


def test_a_stream_that_cannot_encode_or_write_falls_silent(tmp_path: Path) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Reporter(ascii_only).say("naïve ▁▂")
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"na\\xefve \\u2581\\u2582\n"  # type: ignore[attr-defined]

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    reporter = Reporter(Full())
    reporter.open_log(tmp_path / "train.log")
    reporter.say("still here")
    reporter.close()
    assert (tmp_path / "train.log").read_text() == "still here\n"


def test_work_between_two_steps_is_told_of_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("dpo_cli.console.reporter.time.monotonic", lambda: now[0])
    advance = Reporter(stream).working("evaluating pair", 100)
    for seconds in (20, 20, 20, 20):
        now[0] += seconds
        advance(25)
    assert stream.getvalue() == "evaluating pair 50/100\n"
