"""Whether a model can take packed rows, decided by numbers on real pairs: no list of families is kept.

A packed row is right for a model if its log-probs are those of plain rows and no response sees another. Both are
measured here, for attention by segments first and by mask second; plain padded rows are what is left.

How much two correct layouts may differ is measured too: by how much the model's log-probs move when its input
embeddings are rounded once more. Every layer rounds several times, and differently in each layout.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text
from dpo_cli.data.batches import Layout, longest_side
from dpo_cli.data.tokens import ALL_SCORED, TokenizedPair, token_ids
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.errors import ConfigError
from dpo_cli.models.dtype import Decision
from dpo_cli.models.logps import causal_model, make_micro_batch, token_logps_of
from dpo_cli.storage.measurements import note, recall

VERSION = 1  # of the check below: another number measures anew
FLOOR = 2e-5  # nats a token: below this a difference is rounding in any dtype


@dataclass(frozen=True)
class _Noise:
    """How far two computations of the same log-probs lie apart, in nats a token."""

    mean: float
    largest: float

    @classmethod
    def between(cls, first: Tensor, second: Tensor) -> "_Noise":
        off = (first - second).abs()
        return cls(float(off.mean()), float(off.max()))

    def within(self, other: "_Noise") -> bool:
        """Not more than twice the other's, nor four times at any one token."""
        return self.mean <= 2 * other.mean + FLOOR and self.largest <= 4 * other.largest + 10 * FLOOR


def choose_layout(requested: str, policy: Any, pairs: Sequence[TokenizedPair], device: torch.device) -> Decision:
    """The layout of micro-batches for `policy`, with the reason. `requested` is auto, packed or padded.

    ConfigError where packed rows are requested and the model cannot take them. The policy must be in eval mode or
    without dropout; nothing about it is changed.
    """
    if requested == "padded":
        return Decision(Layout.PADDED, "as requested")
    obstacle = _obstacle(policy)
    reasons = [obstacle] if obstacle else []
    if not obstacle:
        some = _telling_pairs(pairs)
        plain, noise = _plain(policy, some, device)
        for layout in (Layout.PACKED_SEGMENTS, Layout.PACKED_MASK):
            found = _differs(policy, some, device, layout, plain, noise)
            if isinstance(found, _Noise):
                names = {Layout.PACKED_SEGMENTS: "attention by segments", Layout.PACKED_MASK: "attention by mask"}
                words = (
                    f"equals plain rows to {found.mean:.1g} nats a token, one rounding moves them by {noise.mean:.1g}"
                )
                return Decision(layout, f"{names[layout]}; {words}, measured")
            reasons.append(f"by {layout} {found}")
    if requested == "packed":
        raise ConfigError(f"layout=packed: this model cannot take packed rows ({'; '.join(reasons)}); choose auto")
    return Decision(Layout.PADDED, f"packed rows do not suit this model: {'; '.join(reasons)}")


def remembered_layout(
    requested: str,
    policy: Any,
    pairs: Sequence[TokenizedPair],
    device: torch.device,
    fingerprint: str,
    keep: bool = True,
    engine: Engine = SINGLE,
) -> Decision:
    """As `choose_layout`, measured once for a model (by its fingerprint), the longest pair and the libraries' versions.

    A note of a few bytes in the cache folder says what was found; with `keep` false none is left. Every rank measures,
    and what rank 0 finds holds.
    """
    libraries = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft")]
    longest = max(map(longest_side, pairs))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    how = [VERSION, fingerprint, str(next(policy.parameters()).dtype), where, longest, *libraries]
    known = engine.same(lambda: recall("layouts", how) if requested == "auto" else None)
    if known is not None and known.get("layout") in [*Layout]:
        reason = safe_text(str(known.get("reason")).removesuffix("measured"), 300)
        return Decision(Layout(known["layout"]), f"{reason}measured earlier")
    found = choose_layout(requested, policy, pairs, device)
    chosen = engine.same(lambda: found)
    if requested == "auto" and keep and engine.rank == 0:
        note("layouts", how, {"layout": chosen.value.value, "reason": chosen.reason})
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
    """The shortest pair and the longest: what leaks from the first is seen in the second, every window binds there.

    Every token of them is scored.
    """
    longest = max(pairs, key=longest_side)
    others = [pair for pair in pairs if pair.prompt.tobytes() != longest.prompt.tobytes()]
    some = [min(others, key=longest_side), longest] if others else [longest]
    return [replace(pair, chosen_unscored=ALL_SCORED, rejected_unscored=ALL_SCORED) for pair in some]


def _logps(policy: Any, pairs: Sequence[TokenizedPair], device: torch.device, layout: Layout) -> Tensor:
    with torch.no_grad():
        return token_logps_of(policy, make_micro_batch(pairs, device, layout)).float()


def _plain(policy: Any, pairs: list[TokenizedPair], device: torch.device) -> tuple[Tensor, _Noise]:
    """Log-probs of every response token by plain rows, one pair at a time, and how far one rounding moves them."""

    def apart() -> Tensor:
        return torch.cat([_logps(policy, [pair], device, Layout.PADDED) for pair in pairs])

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
    policy: Any, pairs: list[TokenizedPair], device: torch.device, layout: Layout, plain: Tensor, noise: _Noise
) -> _Noise | str:
    """How far packed rows lie from plain ones, or why they are not the same."""
    layers = getattr(causal_model(policy).config.get_text_config(), "num_hidden_layers", None)
    micro_batch = make_micro_batch(pairs, device, layout)
    try:
        with torch.no_grad():
            packed = token_logps_of(policy, micro_batch).float()
        changed = _logps(policy, [_other_chosen(pair) for pair in pairs], device, layout)
        telling = min(pairs, key=lambda pair: (len(pair.chosen) == 1 == len(pair.rejected), longest_side(pair)))
        reads_positions = _reads_positions(policy, telling, device, layout)
    except (torch.OutOfMemoryError, MemoryError):
        raise  # which says nothing of the model
    except Exception as error:  # whatever a model's own code may raise: it says that this layout does not suit it
        return f"it fails ({safe_text(str(error).strip().splitlines()[0] if str(error).strip() else error, 120)})"
    assert micro_batch.row is not None
    if layout is Layout.PACKED_SEGMENTS and len(micro_batch.row.layers_seen) != layers:
        return f"only {len(micro_batch.row.layers_seen)} of its {layers} layers can be reached"
    if packed.shape != plain.shape or not bool(torch.isfinite(packed).all()):
        return "its log-probs are not numbers"
    if not reads_positions:
        return "it uses a token's index in the row, not the position ids"
    found = _Noise.between(packed, plain)
    if not found.within(noise):
        return f"it is off by {found.mean:.2g} nats a token where one rounding moves them by {noise.mean:.2g}"
    of_rejected = torch.cat([torch.arange(len(p.chosen) + len(p.rejected)) >= len(p.chosen) for p in pairs]).to(device)
    if changed.shape != packed.shape:
        return found  # the other tokens happen to be the rejected response, which is then shared: nothing can be seen
    leak = _Noise.between(packed[of_rejected], changed[of_rejected])
    # The shapes are the same, so that nothing is rounded otherwise: far less is allowed than between two layouts.
    if not leak.within(_Noise(noise.mean / 8, noise.largest / 8)):
        return f"a response sees another one (by {leak.largest:.2g} nats a token)"
    return found


def _reads_positions(policy: Any, pair: TokenizedPair, device: torch.device, layout: Layout) -> bool:
    """Whether other position ids change anything. A bias by distance (ALiBi) uses indices only; packing shifts them."""
    micro_batch = make_micro_batch([pair], device, layout)
    assert micro_batch.row is not None
    apart = micro_batch.row.positions_in_group + 7 * (micro_batch.row.response_ids > 0)
    moved = replace(micro_batch, row=replace(micro_batch.row, positions_in_group=apart))
    with torch.no_grad():
        return not torch.equal(token_logps_of(policy, micro_batch), token_logps_of(policy, moved))


def _other_chosen(pair: TokenizedPair) -> TokenizedPair:
    """The pair with other tokens in its chosen response, taken from its own, so that the model knows them."""
    known = sorted({int(token) for ids in (pair.prompt, pair.chosen, pair.rejected) for token in ids})
    following = {token: known[(index + 1) % len(known)] for index, token in enumerate(known)}
    return replace(pair, chosen=token_ids(following[int(token)] for token in pair.chosen))
