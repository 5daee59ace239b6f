"""report.html: an examination as one page that needs nothing else, made from report.json alone."""

from collections.abc import Sequence
from typing import Any

from dpo_cli.console.text import plural
from dpo_cli.examination.tables import SIDES, Table, columns_read, lengths, max_lengths, phrases, scores, share
from dpo_cli.pages import figures
from dpo_cli.pages.pages import render


def page(report: dict[str, Any]) -> str:
    """The page of a report."""
    tokens, bias, score = report["tokens"], report["bias"], report["score"]
    sides = [(name, report[key]) for name, key in (("train", "train"), ("held out", "held_out")) if report[key]]
    words = bias["words"] if bias else None
    return render(
        "examination",
        title=f"Preference data: {report['train']['source']}",
        pointless=report["pointless"],
        findings=[[one["text"], one["next"]] for one in report["findings"]],
        sides=_sides(sides),
        columns=[f"{name}: {line}" for name, side in sides for line in columns_read(side)],
        pairs=f"{plural(tokens['pairs'], 'pair')} of {tokens['of']:,}" if tokens else "",
        lengths=lengths(tokens) if tokens else None,
        figures=[_histogram(side, tokens["histogram"]) for side in SIDES] if tokens else [],
        max_lengths=max_lengths(tokens, report["data"]["max_length"]) if tokens else None,
        longer=_longer(bias) if bias else None,
        words=words["accuracy"] | {"share": share(words["accuracy"])} if words else None,
        phrases=phrases(words) if words else None,
        score=(["", "mean (95% interval over prompts)"], scores(score)) if score else None,
        scored=plural(score["pairs"], "pair") if score else "",
        examples=[example for name, side in sides for example in _examples(name, side)],
    )


def _sides(sides: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    reasons = list(dict.fromkeys(reason for _, side in sides for reason in side["dropped"]))
    counts = [("rows", "rows"), ("pairs", "pairs"), *((reason, None) for reason in reasons), ("kept", "kept")]
    counts.append(("near-duplicates among them", "near_duplicates"))
    return ["", *(name for name, _ in sides)], [
        [label, *(f"{side[key] if key else side['dropped'].get(label, 0):,}" for _, side in sides)]
        for label, key in counts
    ]


def _histogram(side: str, histogram: dict[str, Any]) -> figures.Drawing:
    caption = "How many pairs have so many tokens, before anything is cut. The scale is logarithmic."
    return figures.counted(f"Tokens of {side}", caption, ("tokens", "pairs"), histogram["edges"], histogram[side])


def _longer(bias: dict[str, Any]) -> Table:
    every = [{"source": "all", "longer_preferred": bias["longer_preferred"]}, *bias["by_source"]]
    return ["source", "pairs", "share (95% interval over prompts)"], [
        [one["source"], f"{one['longer_preferred']['pairs']:,}", share(one["longer_preferred"])] for one in every
    ]


def _examples(name: str, side: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    return [
        (
            f"{name}: {reason}",
            [
                [row["location"], row.get("problem", row.get("prompt", "")), row.get("chosen", ""),
                 row.get("rejected", "")]
                for row in rows
            ],
        )
        for reason, rows in side["examples"].items()
    ]  # fmt: skip
