"""Untrusted text: data, model output, names and messages of libraries pass `safe_text` before they are shown.

Characters that could move the cursor, set the clipboard, reorder the line or fake a style are shown as escapes.
"""

import math
import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

# Cc: C0 and C1 controls. Cf: bidi marks, zero-width characters. Cs: lone surrogates. Co, Cn: unassigned glyphs.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Tokens with a known form: Hugging Face, OpenAI and similar, GitHub, GitLab, Slack, AWS, Google.
_SECRET = re.compile(
    r"\b(?:hf_|sk-(?=\S*\d)|gh[opsu]_|github_pat_|glpat-|xox[a-z]-|AIza)[A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user and password in a URL
)
# Names of environment variables that hold secrets.
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY)(?:_|$)", re.I)
REDACTED = "[redacted]"


def redacted(text: str) -> str:
    """The text without secrets: tokens of a known form, and values of environment variables with such a name."""
    text = _SECRET.sub(REDACTED, text)
    named = {value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_NAME.search(name)}
    for value in sorted(named, key=len, reverse=True):  # one may contain another
        text = text.replace(value, REDACTED)
    return text


def without_secrets(value: Any) -> Any:
    """Nested mappings and lists with every text `redacted`."""
    if isinstance(value, dict):
        return {key: without_secrets(content) for key, content in value.items()}
    if isinstance(value, list):
        return [without_secrets(content) for content in value]
    return redacted(value) if isinstance(value, str) else value


def _escape(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def safe_text(text: object, limit: int | None = None) -> str:
    """The text on one line with every control, bidi and invisible character escaped, secrets redacted.

    Cut to `limit` characters with an ellipsis.
    """
    raw = redacted(str(text))
    if limit is not None and len(raw) > limit:
        raw = raw[: max(0, limit - 3)] + "..."
    if raw.isascii() and raw.isprintable():
        return raw
    return "".join(
        _escape(character) if unicodedata.category(character) in _UNSAFE_CATEGORIES else character for character in raw
    )


def cut_apart(names: Sequence[str], limit: int) -> list[str]:
    """Names as `safe_text` of at most `limit` characters, cut where they differ: `...10-05-12`, `...10-31-07`."""
    columns = zip(*(name for name in names if len(name) > limit), strict=False)
    same = "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
    word = max(same.rfind("/"), same.rfind("_")) + 1  # a date begins behind its job, a time behind its date
    for start in (0, word, len(same)):
        cut = [name if len(name) <= limit else f"{'...' if start else ''}{name[start:]}" for name in names]
        shown = [safe_text(name, limit) for name in cut]
        if len(set(shown)) == len(shown):
            return shown
    return [safe_text(name, limit) for name in names]


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where the message is empty."""
    words = str(error).strip()
    return words.splitlines()[0] if words else type(error).__name__


def hydra_quoted(text: str) -> str:
    """The text as a quoted value of Hydra's grammar, where a backslash escapes only before a quote."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def shell_word(key: str, value: object) -> str:
    """`key=value` to copy onto a command line: quoted for the shell and for Hydra's grammar."""
    text = str(value)
    if set(text) & set("[]{}(),'\"\\$"):
        text = hydra_quoted(text)
    return shlex.quote(f"{key}={text}") if re.search(r"[^\w./:@%+=-]", text) else f"{key}={text}"


def plural(number: int, noun: str) -> str:
    """`1 pair`, `2 pairs`, with thousands separated."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def significant(value: float, digits: int = 3) -> str:
    """A number in `digits` significant digits, without an exponent where that is short: 0.0312, 5e-07."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return f"{float(text):.0f}" if "e" in text else text
    return f"{value:.{digits}g}"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """`0.63 to 0.76`; `no interval` where an end is not known: not finite, or None as in JSON."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    return f"{significant(low, digits)} to {significant(high, digits)}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
