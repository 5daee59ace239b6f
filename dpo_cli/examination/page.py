"""report.html: an examination as one page that needs nothing else, made from report.json alone.

Every text from elsewhere passes `html_text`; the page's own policy forbids scripts, frames and requests of any kind.
"""

from collections.abc import Sequence
from typing import Any

from dpo_cli.console.text import plural, significant
from dpo_cli.evaluation.page import html_text, whole_page
from dpo_cli.examination.tables import SIDES, columns_read, lengths, max_lengths, phrases, scores, share

STYLE = (
    ":root{color-scheme:light dark;--text:#222;--back:#fff;--dim:#777;--line:#ddd;--bar:#4a7;--other:#c55}"
    "@media(prefers-color-scheme:dark){:root{--text:#ddd;--back:#181818;--dim:#999;--line:#444}}"
    "@media print{:root{--text:#000;--back:#fff;--dim:#555;--line:#bbb}details>*{display:block}}"
    "body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;"
    "color:var(--text);background:var(--back)}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem .25rem 0;text-align:left;"
    "vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}th,.dim{color:var(--dim);"
    "font-weight:normal}td{overflow-wrap:break-word}table{display:block;overflow-x:auto;max-width:100%}"
    ".examples td{border-top:1px solid var(--line)}"
    "code{font-size:.95em}svg{display:block;max-width:100%}rect{fill:var(--bar)}rect.o{fill:var(--other)}"
    "text{fill:var(--dim);font-size:11px}"
)
WIDTH, HEIGHT = 720, 110  # pixels of a figure


def page(report: dict[str, Any]) -> str:
    """The page of a report."""
    title = f"Preference data: {report['train']['source']}"
    parts = [f"<h1>{html_text(title)}</h1>"]
    if report["pointless"]:
        parts.append(f"<p><strong>{html_text('Training would be pointless: ' + report['pointless'])}</strong></p>")
    parts += [_findings(report["findings"]), _sides(report)]
    if report["tokens"]:
        parts.append(_lengths(report["tokens"], report["data"]["max_length"]))
    if report["bias"]:
        parts.append(_bias(report["bias"]))
    if report["score"]:
        parts.append(_score(report["score"]))
    parts.append(_examples(report))
    return whole_page(title, STYLE, parts)


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1, kind: str = "") -> str:
    """The first `left` columns are texts, the others numbers."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}>{html_text(cell)}</{tag}>" if place < left else f'<{tag} class="n">{html_text(cell)}</{tag}>'
            for place, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{cells("th", headings)}</tr>{body}</table>'


def _findings(found: list[dict[str, str]]) -> str:
    if not found:
        return "<p>No findings.</p>"
    return "<h2>Findings</h2>" + _table(["finding", "next step"], [[one["text"], one["next"]] for one in found], left=2)


def _sides(report: dict[str, Any]) -> str:
    sides = [(name, report[key]) for name, key in (("train", "train"), ("held out", "held_out")) if report[key]]
    reasons = list(dict.fromkeys(reason for _, side in sides for reason in side["dropped"]))
    rows = [["rows", *(f"{side['rows']:,}" for _, side in sides)], ["pairs", *(f"{s['pairs']:,}" for _, s in sides)]]
    rows += [[reason, *(f"{side['dropped'].get(reason, 0):,}" for _, side in sides)] for reason in reasons]
    rows += [["kept", *(f"{side['kept']:,}" for _, side in sides)]]
    rows += [["near-duplicates among them", *(f"{side['near_duplicates']:,}" for _, side in sides)]]
    lines = [f"{name}: {line}" for name, side in sides for line in columns_read(side)]
    text = "".join(f"<p>{html_text(line)}</p>" for line in lines)
    return "<h2>Rows and pairs</h2>" + _table(["", *(name for name, _ in sides)], rows) + text


def _lengths(tokens: dict[str, Any], max_length: int) -> str:
    of = f"{plural(tokens['pairs'], 'pair')} of {tokens['of']:,}, in tokens, before anything is cut"
    return (
        f"<h2>Lengths</h2><p>{html_text(of)}</p>{_table(*lengths(tokens))}"
        + "".join(_bars(side, tokens["histogram"]["edges"], tokens["histogram"][side]) for side in SIDES)
        + _table(*max_lengths(tokens, max_length))
    )


def _bars(name: str, edges: list[int], counts: list[int]) -> str:
    wide, tall = WIDTH / max(1, len(counts)), (HEIGHT - 30) / max(1, max(counts, default=1))
    bars = "".join(
        f'<rect x="{place * wide:.1f}" y="{HEIGHT - 16 - number * tall:.1f}" width="{wide - 1:.1f}" '
        f'height="{number * tall:.1f}"/>'
        for place, number in enumerate(counts)
    )
    labels = "".join(
        f'<text x="{place * wide:.1f}" y="{HEIGHT - 3}">{edges[place]:,}</text>'
        for place in range(0, len(counts), max(1, len(counts) // 10))
    )
    title = f'<text x="0" y="10">{html_text(name)}: pairs by tokens</text>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{title}{bars}{labels}</svg>'


def _bias(bias: dict[str, Any]) -> str:
    rows = [["all", f"{bias['longer_preferred']['pairs']:,}", share(bias["longer_preferred"])]]
    rows += [
        [one["source"], f"{one['longer_preferred']['pairs']:,}", share(one["longer_preferred"])]
        for one in bias["by_source"]
    ]
    text = "<h2>Length and word bias</h2><h3>The longer response is preferred</h3>"
    text += _table(["source", "pairs", "share (95% interval over prompts)"], rows)
    words = bias["words"]
    if not words:
        return text
    text += (
        f"<h3>Words</h3><p>A bag of words finds the chosen response in {html_text(share(words['accuracy']))} of "
        f"{words['accuracy']['pairs']:,} pairs that it did not see. A policy that does not beat "
        f"{significant(words['accuracy']['mean'] or 0, 2)} has learned no more than these words.</p>"
    )
    return text + _table(*phrases(words), left=2)


def _score(score: dict[str, Any]) -> str:
    heading = f"<h2>The reference model on {plural(score['pairs'], 'pair')}</h2>"
    return heading + _table(["", "mean (95% interval over prompts)"], scores(score))


def _examples(report: dict[str, Any]) -> str:
    text = ""
    for side in (report["train"], report["held_out"]):
        for reason, rows in (side or {"examples": {}})["examples"].items():
            shown = [
                [row["location"], row.get("problem", row.get("prompt", "")), row.get("chosen", ""),
                 row.get("rejected", "")]
                for row in rows
            ]  # fmt: skip
            text += f"<h3>{html_text(reason)}</h3>"
            text += _table(["where", "prompt", "chosen", "rejected"], shown, left=4, kind="examples")
    return f"<h2>Examples</h2>{text}" if text else ""
