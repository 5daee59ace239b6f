"""What the reference model says of the pairs: how likely their responses are, and which it orders rightly already.

Its log-probs come from the cache on disk, and are left there for training. B pairs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dpo_cli.config.schema import ModelConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.batches import SplitByTokens, longest_side
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.evaluation.scores import prompts_of, windows
from dpo_cli.examination.report import estimate_facts
from dpo_cli.models.dtype import choose_device, choose_dtype
from dpo_cli.models.loading import check_positions, find_model, load_model, model_fingerprint
from dpo_cli.models.logps import MicroBatcher
from dpo_cli.models.memory import enough_tokens
from dpo_cli.models.packing import remembered_layout
from dpo_cli.models.precompute import FillOptions, complete
from dpo_cli.models.reference import FrozenReference
from dpo_cli.models.reference_cache import CachedReference, ReferenceCache, cache_key, cache_path

ALIKE = 0.1  # nats: the two responses are all but equally likely
OVERLAPPING = 0.8  # a share of common tokens above which the responses are nearly the same text


def reference_logps(
    pairs: list[TokenizedPair], config: ModelConfig, device_name: str, reporter: Reporter, poll: Callable[[], None]
) -> torch.Tensor:
    """log pi_ref of chosen and rejected, (B, 2), in nats, summed over the response."""
    device = choose_device(device_name).value
    dtype = choose_dtype(config.dtype, device, lora=True).value
    model = load_model(find_model(config, reporter.say), dtype, device)
    longest = max(map(longest_side, pairs))
    check_positions(model, longest, longest)
    fingerprint = model_fingerprint(model)
    layout = remembered_layout("auto", model, pairs, device, fingerprint).value
    batcher = MicroBatcher(device, layout, SplitByTokens(enough_tokens(device), layout))
    reference = FrozenReference(model)
    cache = ReferenceCache(cache_path(cache_key(fingerprint, dtype, device, layout)))
    complete(cache, list(windows(pairs)), FillOptions(batcher, dtype, lambda: reference, reference, reporter, poll))
    known, places = CachedReference(cache), {id(pair): place for place, pair in enumerate(pairs)}
    logps = torch.zeros(len(pairs), 2)
    for window in windows(pairs):
        for micro_batch in batcher.micro_batches(window):
            values = known.logps(micro_batch)[micro_batch.units].float().cpu()
            logps[[places[id(pair)] for pair in micro_batch.examples]] = values
    return logps


def score_facts(pairs: list[TokenizedPair], logps: torch.Tensor) -> dict[str, Any]:
    """The numbers of report.json from log-probs (B, 2), each a mean with its interval over prompts."""
    prompts = prompts_of(pairs)
    sums = logps.double().numpy()
    lengths = np.array([pair.scored_tokens for pair in pairs], dtype=float)
    per_token = sums / lengths
    overlaps = np.array([overlap(pair) for pair in pairs])
    difference = sums[:, 0] - sums[:, 1]

    def ordered(values: Any) -> dict[str, Any]:
        return estimate_facts(prompts.share(np.sign(values[:, 0] - values[:, 1]) / 2 + 0.5))

    return {
        "pairs": len(pairs),
        "nats_per_token_chosen": estimate_facts(prompts.mean(-per_token[:, 0])),
        "nats_per_token_rejected": estimate_facts(prompts.mean(-per_token[:, 1])),
        "ordered_by_sum": ordered(sums),
        "ordered_per_token": ordered(per_token),
        "token_overlap": estimate_facts(prompts.mean(overlaps)),
        "overlapping": int((overlaps > OVERLAPPING).sum()),
        "alike": int((np.abs(difference) < ALIKE).sum()),
    }


def overlap(pair: TokenizedPair) -> float:
    """The share of tokens that both responses have, each as often as it stands in both (Dice's coefficient)."""
    chosen, rejected = (Counter(side.tolist()) for side in pair.responses)
    return 2 * (chosen & rejected).total() / (chosen.total() + rejected.total())
