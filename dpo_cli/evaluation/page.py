"""report.html: an evaluation as one page that needs nothing else, and in which untrusted text does nothing.

Every text from elsewhere passes `html_text`; the page's own policy forbids scripts, frames and requests of any kind.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_cli.console.text import interval, safe_text, significant
from dpo_cli.theory.statistics import Estimate

POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem .25rem 0;text-align:left}"
    "td,th{vertical-align:top}td{white-space:pre-line}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}th{color:#777;font-weight:normal}"
    ".answers td{white-space:pre-wrap;border-top:1px solid #ddd;width:33%}"
    "svg{display:block}rect{fill:#4a7}rect.w{fill:#c55}"
)
BARS, WIDTH, HEIGHT = 24, 720, 140  # of the histogram; pixels


def html_text(text: object) -> str:
    """Untrusted text as HTML: escaped as on the console, line breaks kept, then the marks of HTML."""
    return html.escape("\n".join(safe_text(line) for line in str(text).split("\n")))


def page(
    title: str,
    facts: dict[str, Any],
    estimates: Sequence[tuple[str, Estimate]],
    margins: Sequence[float],
    answers: Sequence[Sequence[str]],
) -> str:
    """The page: what was compared, each metric with its 95% interval, the margins, answers before and after.

    `estimates` come with their labels; an answer is prompt, reference's answer, policy's answer.
    """
    rows = "".join(f"<tr><th>{html_text(name)}</th><td>{html_text(value)}</td></tr>" for name, value in facts.items())
    metrics = "".join(
        f'<tr><td>{html_text(label)}</td><td class="n">{significant(one.mean)}</td>'
        f'<td class="n">{interval(one.low, one.high)}</td></tr>'
        for label, one in estimates
    )
    parts = [
        f"<h1>{html_text(title)}</h1><table>{rows}</table>",
        f"<h2>Metrics</h2><table><tr><th>metric</th><th>mean</th><th>95% interval</th></tr>{metrics}</table>",
        f"<h2>Margins</h2><p>reward of chosen minus reward of rejected, a pair each; red: the wrong way round</p>"
        f"{_histogram(margins)}",
    ]
    if answers:
        heading = "<tr><th>prompt</th><th>reference (before)</th><th>policy (after)</th></tr>"
        cells = "".join("<tr>" + "".join(f"<td>{html_text(text)}</td>" for text in row) + "</tr>" for row in answers)
        parts.append(f'<h2>Greedy answers</h2><table class="answers">{heading}{cells}</table>')
    return whole_page(title, STYLE, parts)


def whole_page(title: str, style: str, parts: Sequence[str]) -> str:
    """A page that runs no script and asks nobody: its parts are HTML, its title is text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{html_text(title)}</title><style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _histogram(margins: Sequence[float]) -> str:
    """Bars of equal width, as far to the left of 0 as to its right."""
    finite = [margin for margin in margins if math.isfinite(margin)]
    reach = max(map(abs, finite), default=0.0) or 1.0
    counts, _ = np.histogram(finite, bins=BARS, range=(-reach, reach))
    wide, tall = WIDTH / BARS, HEIGHT / max(1, counts.max())
    bars = "".join(
        f'<rect{" class=w" if index < BARS // 2 else ""} x="{index * wide:.1f}" y="{HEIGHT - number * tall:.1f}" '
        f'width="{wide - 1:.1f}" height="{number * tall:.1f}"/>'
        for index, number in enumerate(counts)
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{bars}</svg>'
    return f"{svg}<p>{significant(-reach)} to {significant(reach)}, 0 in the middle</p>"
