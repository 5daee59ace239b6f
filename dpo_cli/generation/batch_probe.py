"""Whether the other rows of a batch change a completion on this machine: measured, not assumed.

A kernel may sum in another order where a batch has more rows. Then logits differ in their last bits, and where two
tokens are almost equally likely a completion takes the other one. P prompts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_cli.generation.decoding import MIN_ROWS, rows_of
from dpo_cli.models.loading import position_limit
from dpo_cli.models.logps import causal_model, plain_attention
from dpo_cli.models.memory import make_room, ran_out

PROMPT_TOKENS = 256  # of a prompt: the start is enough
PREFILL_TOKENS = 512  # of all prompts together, so that the probe takes about a second on a CPU


def batch_invariant(
    model: Any, prompts: Sequence[list[int]], rows: int, device: torch.device, poll: Callable[[], None] = lambda: None
) -> bool:
    """Whether prompts have the same logits, to the last bit, in a batch of `rows` rows as alone.

    A probe: it takes the start of some prompts (each a list of token ids), a prefill and two greedy tokens. False where
    memory runs out. `poll` is called between forward passes and may raise.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), plain_attention(model):
            causal = causal_model(model)
            chosen = _chosen(prompts, min(PROMPT_TOKENS, (position_limit(causal) or PROMPT_TOKENS + 2) - 2))
            together = _logits(causal, chosen, max(MIN_ROWS, -(-rows // len(chosen))), device)
            for index in sorted({0, len(chosen) // 2, len(chosen) - 1}):
                poll()
                alone = _logits(causal, [chosen[index]], MIN_ROWS, device)
                if not all(torch.equal(one[index], other[0]) for one, other in zip(together, alone, strict=True)):
                    return False
            return True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    finally:
        model.train(was_training)
    make_room(device)
    return False


def _chosen(prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The first `tokens` of some prompts, from the longest to the shortest; at least two where they differ."""
    starts = sorted({tuple(prompt[:tokens]) for prompt in prompts}, key=lambda ids: (-len(ids), ids))
    number = min(len(starts), max(2, PREFILL_TOKENS // len(starts[0])))
    return [list(starts[index * (len(starts) - 1) // max(1, number - 1)]) for index in range(number)]


def _logits(causal: Any, prompts: list[list[int]], copies: int, device: torch.device) -> list[Tensor]:
    """Logits (P, V) after the prompts, after a token in `copies` rows of each prompt, and after one in few rows."""
    rows = rows_of(causal, prompts, device)
    each = torch.arange(len(prompts), device=device)
    first = each * copies
    logits = [rows.prefill()]
    rows.select(each.repeat_interleave(copies))
    logits.append(rows.decode(logits[0].argmax(-1).repeat_interleave(copies))[first])
    # As when the other rows have stopped. Decoding never has fewer rows than MIN_ROWS.
    few = first if len(prompts) >= MIN_ROWS else torch.arange(MIN_ROWS, device=device)
    rows.select(few)
    logits.append(rows.decode(logits[1].argmax(-1).expand(len(few)))[: len(prompts)])
    return logits
