"""report.json of an examination: every number that the console and the page show. `report_schema.json` describes it."""

import math
from itertools import islice
from typing import Any

import numpy as np

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.text import safe_text
from dpo_cli.data.formats import PreferencePair
from dpo_cli.examination.lengths import Tokens, cost_of, histogram, lengths_tried, quantiles
from dpo_cli.examination.reading import OF_PAIRS, OF_TOKENS, Side, advice, rows_with_pairs
from dpo_cli.examination.words import Words
from dpo_cli.theory.statistics import Clusters, Estimate

VERSION = 1
EXAMPLES = 3  # of each reason
EXCERPT = 160  # characters of a text

Facts = dict[str, Any]


def side_facts(side: Side, tokens: Tokens | None, config: DataConfig) -> Facts:
    """Where the rows of a side went, with examples.

    Reasons that depend on tokens are counted here where every pair was encoded; else `tokens` has counts of its sample.
    """
    dropped = side.dropped()
    if tokens is not None and len(side.sample) == side.kept:
        dropped.update(tokens.counts)
    near = np.flatnonzero(side.near >= 0)
    wanted = {"bad_row": side.bad_rows.tolist(), "near_duplicate": [side.indices[place] for place in near.tolist()]}
    for number, reason in enumerate(OF_PAIRS):
        wanted[reason] = [side.indices[place] for place in np.flatnonzero(side.reasons == number)[:EXAMPLES].tolist()]
    if tokens is not None:
        for reason, pairs in tokens.dropped.items():
            wanted[reason] = [*wanted.get(reason, []), *(one.index for one in pairs)]
    wanted = {reason: list(dict.fromkeys(indices))[:EXAMPLES] for reason, indices in wanted.items() if indices}
    examples = _examples(side, wanted, config)
    if tokens is not None:
        for example in examples.get("refused_by_template", []):
            example["problem"] = tokens.problems[example["index"]]
    return {
        "source": side.name,
        "rows": side.rows,
        "pairs": side.pairs,
        "kept": side.pairs - sum(number for reason, number in dropped.items() if reason != "bad_row"),
        "dropped": dict(dropped),
        "near_duplicates": len(near),
        "sources": {safe_text(name, 40): number for name, number in side.sources.most_common()},
        "not_used": {safe_text(name, 40): number for name, number in side.not_used.most_common()},
        "not_used_form": side.not_used_form,
        "soft_labels": side.soft_labels,
        "examples": examples,
    }


def _examples(side: Side, wanted: dict[str, list[int]], config: DataConfig) -> dict[str, list[Facts]]:
    """Row and excerpt of the wanted rows, by reason; the source is read again, as far as the last of them."""
    rows = {index for indices in wanted.values() for index in indices}
    found: dict[int, Facts] = {}
    for read in islice(rows_with_pairs(config, side.which, rows), len(rows)):
        place = {"index": read.row.index, "location": safe_text(read.row.location)}
        found[read.row.index] = place | (
            {"problem": advice(read, config)} if read.problem is not None else excerpts(read.pairs[0])
        )
    return {reason: [found[index] for index in indices if index in found] for reason, indices in wanted.items()}


def excerpts(pair: PreferencePair) -> Facts:
    """The beginning of the last message and of both responses, safe to show."""
    texts = {"prompt": pair.messages[-1].content, "chosen": pair.chosen, "rejected": pair.rejected}
    return {name: safe_text(text.strip(), EXCERPT) for name, text in texts.items()}


def token_facts(tokens: Tokens, kept: int, config: DataConfig) -> Facts:
    """Lengths before truncation, and what lengths would do. `kept`: the pairs that `tokens` is a sample of."""
    whole = kept / max(1, len(tokens.used) + tokens.counts["refused_by_template"] + tokens.counts["identical"])
    tried = [cost_of(tokens, length, config.max_prompt_length) for length in lengths_tried(tokens, config)]
    return {
        "pairs": len(tokens.used),
        "of": kept,
        "dropped": dict(tokens.counts),
        "prompts_cut": tokens.truncation.prompts_cut,
        "responses_cut": tokens.truncation.responses_cut,
        "lengths": {name: quantiles(getattr(tokens, name)) for name in ("prompt", "chosen", "rejected")},
        "max_length": [one | {"tokens_per_epoch": round(one["tokens_per_epoch"] * whole)} for one in tried],
        "histogram": histogram(tokens),
    }


def bias_facts(side: Side, tokens: Tokens, words: Words | None) -> Facts:
    """How often the longer response is preferred, in all and by source; how well words find the label."""
    longer = np.sign(tokens.chosen - tokens.rejected) / 2 + 0.5
    groups = np.array([one.group for one in tokens.used], dtype=np.uint64)
    sources = np.array([side.sources_of_sample.get(one.position, "") for one in tokens.used], dtype=object)
    by_source = []
    for name, _ in side.sources.most_common():
        mine = sources == name
        if mine.any():
            share = estimate_facts(Clusters(groups[mine]).share(longer[mine]))
            by_source.append({"source": safe_text(name, 40), "longer_preferred": share})
    found: Facts = {
        "longer_preferred": estimate_facts(Clusters(groups).share(longer)),
        "by_source": by_source,
        "words": None,
    }
    if words is not None:
        found["words"] = {
            "accuracy": estimate_facts(words.accuracy),
            "phrases": [
                {"phrase": one.text, "weight": one.weight, "in_chosen": one.chosen, "in_rejected": one.rejected}
                for one in words.phrases
            ],
        }
    return found


def estimate_facts(estimate: Estimate) -> Facts:
    """A mean with its 95% interval over prompts; null where a number is not known."""
    mean = estimate.mean if math.isfinite(estimate.mean) else None
    return {"mean": mean, "interval95": estimate.ends(), "pairs": estimate.n}


def pointless(side: Side, tokens: Tokens | None) -> str | None:
    """Why training on these pairs would be pointless, in one line; None where it is not."""
    labelled = side.pairs - int((side.reasons == OF_PAIRS.index("tie")).sum())
    counts = side.dropped()
    if side.rows and 2 * len(side.bad_rows) > side.rows:
        bad = f"{len(side.bad_rows):,} of {side.rows:,} rows cannot be read"
        return f"{bad}; the first is {side.first_problem}"
    if 2 * counts["contradictory"] > labelled:
        both = f"{counts['contradictory']:,} of {labelled:,} pairs are labelled both ways"
        return f"{both}, so there is nothing to learn from them; take these pairs out, or label them again"
    if side.kept == 0 or (tokens is not None and tokens.kept == 0):
        reasons = counts + (tokens.counts if tokens is not None else type(counts)())
        listed = ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())
        refused = next(iter(tokens.problems.values()), "") if tokens is not None else ""
        lengthy = set(reasons) & {"prompt_too_long", "identical_after_truncation"}
        remedy = (
            "raise data.max_length"
            if lengthy
            else f"the first: {refused}. Another model's template may take it; data.template=plain takes plain text"
            if (set(reasons) & set(OF_TOKENS))
            else "name other pairs"
        )
        return f"no pair can be used ({listed or 'there are no pairs'}); {remedy}"
    return None
