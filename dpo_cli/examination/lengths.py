"""Lengths in tokens, and what each max_length would drop, cut and cost. N pairs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.text import safe_text
from dpo_cli.data.formats import BadRowError
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.data.truncation import Encoded, Truncation, truncate
from dpo_cli.examination.reading import SampledPair

CHUNK = 512  # pairs that are encoded together
TRIED = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
QUANTILES = {"5%": 0.05, "median": 0.5, "95%": 0.95, "99%": 0.99, "longest": 1.0}
Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class EncodedPair:
    """A pair in tokens, before and after truncation."""

    sampled: SampledPair
    whole: Encoded
    cut: Encoded

    @property
    def tokenized(self) -> TokenizedPair:
        """As training takes it."""
        cut, sampled = self.cut, self.sampled
        ids = (token_ids(cut.prompt), token_ids(cut.chosen), token_ids(cut.rejected))
        unscored = (token_ids(cut.chosen_unscored), token_ids(cut.rejected_unscored))
        return TokenizedPair(*ids, sampled.index, "", sampled.group, *unscored)


@dataclass
class Tokens:
    """The lengths of a sample's pairs before truncation, and the reasons that depend on tokens."""

    prompt: Lengths  # (N,) tokens
    chosen: Lengths  # (N,)
    rejected: Lengths  # (N,)
    used: list[SampledPair]  # (N,) the pairs: those that the template does not refuse
    dropped: dict[str, list[SampledPair]] = field(default_factory=dict)  # by reason, under data.max_length
    problems: dict[int, str] = field(default_factory=dict)  # why the template refuses a row, by its index
    truncation: Truncation = field(default_factory=Truncation)  # of the pairs that are kept
    first: list[EncodedPair] = field(default_factory=list)  # of those

    @property
    def counts(self) -> Counter[str]:
        """How many pairs each reason drops."""
        return Counter({reason: len(pairs) for reason, pairs in self.dropped.items()})

    @property
    def kept(self) -> int:
        """Pairs that can be trained on."""
        lengthy = sum(number for reason, number in self.counts.items() if reason != "refused_by_template")
        return len(self.used) - lengthy


def count_tokens(
    sample: list[SampledPair], encoder: PairEncoder, config: DataConfig, keep: int, poll: Callable[[], None]
) -> Tokens:
    """Encode every pair of a sample as training does; the first `keep` pairs that are kept stay in memory."""
    lengths: list[tuple[int, int, int]] = []
    none = np.zeros(0, np.int64)
    tokens = Tokens(none, none, none, used=[])
    for start in range(0, len(sample), CHUNK):
        poll()
        rendered = []
        for one in sample[start : start + CHUNK]:
            try:
                text = encoder.render(one.pair)
            except BadRowError as error:
                tokens.problems[one.index] = safe_text(error, limit=300)
                tokens.dropped.setdefault("refused_by_template", []).append(one)
                continue
            if text.chosen == text.rejected:  # a template may trim white space
                tokens.dropped.setdefault("identical", []).append(one)
            else:
                rendered.append((one, text))
        for (one, _), encoded in zip(rendered, encoder.encode_rendered([text for _, text in rendered]), strict=True):
            lengths.append((len(encoded.prompt), len(encoded.chosen), len(encoded.rejected)))
            tokens.used.append(one)
            tally = Truncation()
            whole = encoded if config.prompt_truncation == "turns" else encoded.by_tokens()
            cut = truncate(whole, config.max_length, config.max_prompt_length, tally)
            if cut is None:
                tokens.dropped.setdefault("prompt_too_long", []).append(one)
            elif cut.chosen == cut.rejected:
                tokens.dropped.setdefault("identical_after_truncation", []).append(one)
            else:
                tokens.truncation.prompts_cut += tally.prompts_cut
                tokens.truncation.responses_cut += tally.responses_cut
                if len(tokens.first) < keep:
                    tokens.first.append(EncodedPair(one, whole, cut))
    table = np.array(lengths, dtype=np.int64).reshape(-1, 3)
    tokens.prompt, tokens.chosen, tokens.rejected = table.T
    return tokens


def quantiles(values: Lengths) -> dict[str, float]:
    """Mean and quantiles of N lengths."""
    found = {name: float(np.quantile(values, share, method="inverted_cdf")) for name, share in QUANTILES.items()}
    return {"mean": float(values.mean()), **found}


def cost_of(tokens: Tokens, max_length: int, max_prompt_length: int | None) -> dict[str, Any]:
    """What a max_length does to the pairs: counts as `truncate` makes them, and the tokens of an epoch over them.

    A prompt that loses whole turns may become shorter than is assumed here; then fewer responses are cut.
    """
    allowed = tokens.prompt if max_prompt_length is None else np.minimum(tokens.prompt, max_prompt_length)
    too_long = (
        allowed >= max_length if max_prompt_length is None else np.full(len(allowed), max_prompt_length >= max_length)
    )
    longer = np.maximum(tokens.chosen, tokens.rejected)
    shortened = np.maximum(max_length - longer, np.minimum(allowed, max_length // 2))
    prompt = np.where(allowed + longer > max_length, shortened, allowed)
    room = max_length - prompt
    chosen, rejected = np.minimum(tokens.chosen, room), np.minimum(tokens.rejected, room)
    kept = ~too_long
    return {
        "max_length": max_length,
        "prompt_too_long": int(too_long.sum()),
        "prompts_cut": int((kept & (prompt < tokens.prompt)).sum()),
        "responses_cut": int((kept & (chosen < tokens.chosen)).sum() + (kept & (rejected < tokens.rejected)).sum()),
        "tokens_per_epoch": int((prompt + chosen + rejected)[kept].sum()),
    }


def lengths_tried(tokens: Tokens, config: DataConfig) -> list[int]:
    """The lengths of TRIED up to the first that cuts nothing, and data.max_length."""
    whole = int((tokens.prompt + np.maximum(tokens.chosen, tokens.rejected)).max(initial=1))
    enough = [length for length in TRIED if length >= whole][:1]
    fits = [length for length in TRIED if length < whole]
    lowest = (config.max_prompt_length or 0) + 1
    return sorted(length for length in {*fits, *enough, config.max_length} if length >= lowest)


def histogram(tokens: Tokens) -> dict[str, Any]:
    """Pairs by length: the bins double every second edge, the counts are of prompt, chosen and rejected."""
    longest = max(int(values.max(initial=1)) for values in (tokens.prompt, tokens.chosen, tokens.rejected))
    edges = [1]
    while edges[-1] <= longest:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 2**0.5)))
    parts = {"prompt": tokens.prompt, "chosen": tokens.chosen, "rejected": tokens.rejected}
    return {"edges": edges, **{name: np.histogram(values, edges)[0].tolist() for name, values in parts.items()}}
