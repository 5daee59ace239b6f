"""Whether a model can take packed rows, decided by numbers on real pairs: no list of families is kept.

A packed row is right for a model if its log-probs are those of plain rows and no response sees another. Both are
measured here, for attention by segments first and by mask second; plain padded rows are what is left.

What two right ways may differ by is measured too: by how much the model's log-probs move when its input embeddings
are rounded once more. Every layer rounds several times, and differently in each way.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text
from dpo_cli.data.batches import Way, longest_side
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.errors import ConfigError
from dpo_cli.models.loading import Decision
from dpo_cli.models.logps import causal_model, make_batch, response_logps
from dpo_cli.storage.measurements import note, recall

VERSION = 1  # of the check below: another number measures anew
FLOOR = 2e-5  # nats a token: below this a difference is rounding in any dtype


@dataclass(frozen=True)
class _Noise:
    """How far two ways of computing the same log-probs lie apart, in nats a token."""

    mean: float
    largest: float

    @classmethod
    def between(cls, first: Tensor, second: Tensor) -> "_Noise":
        off = (first - second).abs()
        return cls(float(off.mean()), float(off.max()))

    def within(self, other: "_Noise") -> bool:
        """Not more than twice the other's, nor four times at any one token."""
        return self.mean <= 2 * other.mean + FLOOR and self.largest <= 4 * other.largest + 10 * FLOOR


def choose_way(asked: str, policy: Any, pairs: Sequence[TokenizedPair], device: torch.device) -> Decision:
    """The way to make batches for `policy`, with the reason. `asked` is auto, packed or padded.

    ConfigError where packed rows are asked for and the model cannot take them. The policy must be in eval mode or
    without dropout; nothing about it is changed.
    """
    if asked == "padded":
        return Decision(Way.PADDED, "as asked")
    obstacle = _obstacle(policy)
    reasons = [obstacle] if obstacle else []
    if not obstacle:
        some = _telling_pairs(pairs)
        plain, noise = _plain(policy, some, device)
        for way in (Way.SEGMENTS, Way.MASK):
            found = _differs(policy, some, device, way, plain, noise)
            if isinstance(found, _Noise):
                names = {Way.SEGMENTS: "attention by segments", Way.MASK: "attention by mask"}
                words = (
                    f"equals plain rows to {found.mean:.1g} nats a token, one rounding moves them by {noise.mean:.1g}"
                )
                return Decision(way, f"{names[way]}; {words}, measured")
            reasons.append(f"by {way} {found}")
    if asked == "packed":
        raise ConfigError(f"layout=packed: this model cannot take packed rows ({'; '.join(reasons)}); choose auto")
    return Decision(Way.PADDED, f"packed rows do not suit this model: {'; '.join(reasons)}")


def remembered_way(
    asked: str, policy: Any, pairs: Sequence[TokenizedPair], device: torch.device, digest: str, keep: bool = True
) -> Decision:
    """As `choose_way`, measured once for a model (by its digest), the lengths at hand and the libraries' versions.

    A note of a few bytes in the cache folder says what was found; with `keep` false none is left.
    """
    libraries = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft")]
    longest = max(map(longest_side, pairs))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    how = [VERSION, digest, str(next(policy.parameters()).dtype), where, longest, *libraries]
    known = recall("ways", how) if asked == "auto" else None
    if known is not None and known.get("way") in [*Way]:
        return Decision(Way(known["way"]), f"{safe_text(known.get('reason'), 300)} (earlier, on this very model)")
    chosen = choose_way(asked, policy, pairs, device)
    if asked == "auto" and keep:
        note("ways", how, {"way": chosen.value.value, "reason": chosen.reason})
    return chosen


def _obstacle(policy: Any) -> str | None:
    """What rules packed rows out before anything is computed."""
    configs = getattr(policy, "peft_config", {}).values()
    if any(config.is_prompt_learning for config in configs):
        return "its prompt is learned, and sits before every row"
    causal = causal_model(policy)
    if causal.get_decoder() is causal:
        return "its decoder cannot be called apart from its head"
    return None


def _telling_pairs(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The shortest pair and the longest: what leaks from the first is seen in the second, every window binds there."""
    longest = max(pairs, key=longest_side)
    others = [pair for pair in pairs if pair.prompt.tobytes() != longest.prompt.tobytes()]
    return [min(others, key=longest_side), longest] if others else [longest]


def _logps(policy: Any, pairs: Sequence[TokenizedPair], device: torch.device, way: Way) -> Tensor:
    with torch.no_grad():
        return response_logps(policy, make_batch(pairs, device, way)).float()


def _plain(policy: Any, pairs: list[TokenizedPair], device: torch.device) -> tuple[Tensor, _Noise]:
    """Log-probs of every response token by plain rows, one pair at a time, and how far one rounding moves them."""

    def apart() -> Tensor:
        return torch.cat([_logps(policy, [pair], device, Way.PADDED) for pair in pairs])

    def round_once_more(_: Any, __: Any, embeddings: Tensor) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(0)
        unit = torch.rand(embeddings.shape, generator=generator).to(embeddings) * 2 - 1
        return embeddings * (1 + torch.finfo(embeddings.dtype).eps * unit)

    plain = apart()
    hook = causal_model(policy).get_input_embeddings().register_forward_hook(round_once_more)
    try:
        return plain, _Noise.between(apart(), plain)
    finally:
        hook.remove()


def _differs(
    policy: Any, pairs: list[TokenizedPair], device: torch.device, way: Way, plain: Tensor, noise: _Noise
) -> _Noise | str:
    """How far packed rows lie from plain ones, or in words why they are not the same."""
    layers = getattr(causal_model(policy).config.get_text_config(), "num_hidden_layers", None)
    batch = make_batch(pairs, device, way)
    try:
        with torch.no_grad():
            packed = response_logps(policy, batch).float()
        changed = _logps(policy, [_other_chosen(pair) for pair in pairs], device, way)
        telling = min(pairs, key=lambda pair: (len(pair.chosen) == 1 == len(pair.rejected), longest_side(pair)))
        reads_positions = _reads_positions(policy, telling, device, way)
    except (torch.OutOfMemoryError, MemoryError):
        raise  # which says nothing of the model
    except Exception as error:  # whatever a model's own code may raise: it says that this way is not for it
        return f"it fails ({safe_text(str(error).strip().splitlines()[0] if str(error).strip() else error, 120)})"
    assert batch.row is not None
    if way is Way.SEGMENTS and len(batch.row.layers_seen) != layers:
        return f"only {len(batch.row.layers_seen)} of its {layers} layers can be reached"
    if packed.shape != plain.shape or not bool(torch.isfinite(packed).all()):
        return "its log-probs are not numbers"
    if not reads_positions:
        return "it goes by a token's place in the row, not by the position it is told"
    found = _Noise.between(packed, plain)
    if not found.within(noise):
        return f"it is off by {found.mean:.2g} nats a token where one rounding moves them by {noise.mean:.2g}"
    of_rejected = torch.cat([torch.arange(len(p.chosen) + len(p.rejected)) >= len(p.chosen) for p in pairs]).to(device)
    if changed.shape != packed.shape:
        return found  # the other tokens happen to be the rejected response, which is then shared: nothing can be seen
    leak = _Noise.between(packed[of_rejected], changed[of_rejected])
    # The shapes are the same, so that nothing is rounded otherwise: far less is allowed than between two ways.
    if not leak.within(_Noise(noise.mean / 8, noise.largest / 8)):
        return f"a response sees another one (by {leak.largest:.2g} nats a token)"
    return found


def _reads_positions(policy: Any, pair: TokenizedPair, device: torch.device, way: Way) -> bool:
    """Whether other position ids change anything. A bias by distance (ALiBi) knows places only; packing shifts them."""
    batch = make_batch([pair], device, way)
    assert batch.row is not None
    apart = batch.row.positions_in_group + 7 * (batch.row.response_ids > 0)
    moved = replace(batch, row=replace(batch.row, positions_in_group=apart))
    with torch.no_grad():
        return not torch.equal(response_logps(policy, batch), response_logps(policy, moved))


def _other_chosen(pair: TokenizedPair) -> TokenizedPair:
    """The pair with other tokens in its chosen response, taken from its own, so that the model knows them."""
    known = sorted({int(token) for ids in (pair.prompt, pair.chosen, pair.rejected) for token in ids})
    following = {token: known[(place + 1) % len(known)] for place, token in enumerate(known)}
    return replace(pair, chosen=token_ids(following[int(token)] for token in pair.chosen))
