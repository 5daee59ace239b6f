"""Answers of a model, token by token: many prompts at once, each answer with random numbers of its own.

One idea to keep in mind: a token is where a uniform number falls in the model's distribution, and the numbers of an
answer are a function of its seed, its prompt and its place among the answers to it. So what is drawn depends on the
batch only as far as another batch rounds otherwise. Therefore every row's keys and values begin at slot 0, whatever the
lengths of its neighbours, and widths are multiples of 32, at which kernels work: in bfloat16 on a CPU (AMD EPYC, torch
2.13) a row was seen to come out the same to the last bit in any company. Where kernels choose by the number of rows
(float32, GPUs), a token may turn here and there. R rows, D hidden size, V vocabulary.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from dpo_cli.errors import ConfigError
from dpo_cli.models.attention import SPANS, STEPS, use_attention
from dpo_cli.models.head import head_logits
from dpo_cli.models.loading import position_limit
from dpo_cli.models.logps import causal_model, plain_attention
from dpo_cli.models.memory import free_memory, make_room, ran_out

PADDING = 0  # a token that is never seen: the mask says so
STEP = 32  # slots: widths are multiples of it
READ_TOKENS = 2048  # of prompts that are read together, padding included
CHECK_EVERY = 8  # tokens between two looks at how many rows have ended
FEWEST = 2  # rows: a single one is multiplied by another kernel, which rounds otherwise
AT_ONCE = {"cpu": 64, "mps": 64, "cuda": 512}  # rows: more are no faster
SHARE = 0.4  # of the free memory that keys and values may take
NUCLEUS = 512  # tokens sorted for a nucleus, before all of them are
CACHES = {"past_key_values", "cache_params"}  # what families call the cache that transformers gives them
OWN_STATE = {"minimax", "recurrent_gemma", "rwkv", "xlstm"}  # families that keep it in a cache of their own, or nowhere


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # the share of probability that the likeliest tokens must make up; the others are left out


@dataclass(frozen=True)
class Draw:
    """One answer to be drawn: its prompt, and the random numbers it is drawn with."""

    prompt: list[int]
    seed: int = 0
    number: int = 0  # among the answers to this prompt

    def uniforms(self, tokens: int) -> NDArray[np.float64]:
        """As many numbers in [0, 1), from the raw stream of a counter-based generator: the same on every machine."""
        name = hashlib.blake2b(np.array(self.prompt, dtype="<i4").tobytes(), digest_size=8, salt=b"answers")
        key = np.array([self.seed, int.from_bytes(name.digest(), "little")], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=[0, 0, self.number, 0]).random_raw(tokens)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass
class Answer:
    """The tokens of an answer."""

    tokens: list[int] = field(default_factory=list)  # without the one that ends it
    ended: bool = False  # by itself, not at the limit


@dataclass
class _Slots:
    """Where each row's next keys and values go: behind its own tokens, so that rows need not end together."""

    lengths: Tensor  # (R,) slots that are taken
    width: int  # slots that the forward pass at hand sees, its own included
    room: int  # slots that there are, before they grow
    reading: tuple[int, int] | None = None  # the rows whose prompts are read; else every row reads one token


class _RaggedLayer(DynamicLayer):
    """Keys and values of rows of unlike length, all from slot 0, in a tensor that grows in steps."""

    all_keys: Tensor
    all_values: Tensor

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots

    def get_seq_length(self) -> int:
        """As if all slots but the last were taken: the mask says which of them a row has."""
        return 0 if self.slots.reading is not None else self.slots.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that are seen, from the first."""
        return self.slots.width, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put new states (R, heads, tokens, size) behind each row's own; all that the pass sees."""
        width = self.slots.width
        if self.slots.reading is not None:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                # Not empty but 0: what is masked must still be a number.
                shape = (len(self.slots.lengths), key_states.shape[1], self.slots.room)
                self.all_keys = key_states.new_zeros(*shape, key_states.shape[3])
                self.all_values = value_states.new_zeros(*shape, value_states.shape[3])
            first, last = self.slots.reading
            self.all_keys[first:last, :, :width] = key_states
            self.all_values[first:last, :, :width] = value_states
            return key_states, value_states
        if width > self.all_keys.shape[2]:
            self.all_keys, self.all_values = _roomier(self.all_keys, width), _roomier(self.all_values, width)
        rows = torch.arange(len(key_states), device=key_states.device)
        self.all_keys[rows, :, self.slots.lengths] = key_states[:, :, 0]
        self.all_values[rows, :, self.slots.lengths] = value_states[:, :, 0]
        return self.all_keys[:, :, :width], self.all_values[:, :, :width]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, some of them twice or not at all."""
        self.all_keys, self.all_values = self.all_keys[beam_idx], self.all_values[beam_idx]


def _roomier(states: Tensor, width: int) -> Tensor:
    rows, heads, old, size = states.shape
    fresh = states.new_zeros(rows, heads, width + 2 * STEP, size)
    fresh[:, :, :old] = states
    return fresh


def _rounded(width: int) -> int:
    """The next multiple above: there is always a slot to mask, so that attention always takes the masked way."""
    return (width // STEP + 1) * STEP


def end_tokens(model: Any, closing: int) -> set[int]:
    """The tokens that end an answer: the one that closes responses in training, and those of the model's own config."""
    configured = model.generation_config.eos_token_id
    return {closing} | (set(configured) if isinstance(configured, list) else {configured} - {None})


def rows_at_once(model: Any, longest_prompt: int, decoding: Decoding, device: torch.device) -> int:
    """Answers that are drawn together: as many as are of use and as their keys and values leave room for."""
    config = causal_model(model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_token = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size
    width = next(model.parameters()).element_size()
    of_row = of_token * width * (longest_prompt + decoding.max_new_tokens + 3 * STEP)
    return max(1, min(AT_ONCE.get(device.type, 64), int(SHARE * free_memory(device) / of_row)))


def draw_answers(
    model: Any,
    draws: Sequence[Draw],
    decoding: Decoding,
    ends: set[int],
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answers, in the order of `draws`. The model is left in the mode it was in.

    Draws of one prompt that stand next to each other read it once. A batch that does not fit into memory is halved;
    MemoryError or the device's own error where one answer alone does not fit.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), plain_attention(model):
            causal = causal_model(model)
            _check_room(causal, draws, decoding)
            answers: dict[int, Answer] = {}
            for places in _together(causal, draws):
                some = _halving(causal, [draws[place] for place in places], decoding, ends, device, poll)
                answers |= dict(zip(places, some, strict=True))
            return [answers[place] for place in range(len(draws))]
    finally:
        model.train(was_training)


def _check_room(causal: Any, draws: Sequence[Draw], decoding: Decoding) -> None:
    """ConfigError where answers would run past the positions that a model has learned."""
    limit = position_limit(causal)
    longest = max((len(draw.prompt) for draw in draws), default=0)
    if limit is not None and longest + decoding.max_new_tokens - 1 > limit:  # the last token is not read
        raise ConfigError(
            f"max_new_tokens={decoding.max_new_tokens}: behind a prompt of {longest:,} tokens there is no room for so "
            f"many, since this model has learned {limit:,} positions; {max(1, limit + 1 - longest)} fit"
        )


def _together(causal: Any, draws: Sequence[Draw]) -> list[list[int]]:
    """The draws, by number, that may share a batch: all, but where a model is a recurrent state and sees padding."""
    layers = DynamicCache(config=causal.config.get_text_config()).layers
    if not layers or not all(type(layer) is LinearAttentionLayer for layer in layers):
        return [list(range(len(draws)))] if draws else []
    by_length: dict[int, list[int]] = {}
    for place, draw in enumerate(draws):
        by_length.setdefault(len(draw.prompt), []).append(place)
    return list(by_length.values())


def _halving(
    causal: Any, draws: list[Draw], decoding: Decoding, ends: set[int], device: torch.device, poll: Callable[[], None]
) -> list[Answer]:
    company = draws if len(draws) >= FEWEST else draws * FEWEST
    try:
        return _Batch(causal, company, decoding, ends, device).run(poll)[: len(draws)]
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error) or len(draws) == 1:
            raise
    make_room(device)
    half = len(draws) // 2
    first = _halving(causal, draws[:half], decoding, ends, device, poll)
    return first + _halving(causal, draws[half:], decoding, ends, device, poll)


class _Batch:
    """Answers that are drawn together: what grows with every token, and the rows that have not ended."""

    def __init__(
        self, causal: Any, draws: list[Draw], decoding: Decoding, ends: set[int], device: torch.device
    ) -> None:
        self.decoding, self.ends, self.device = decoding, ends, device
        self.answers = [Answer() for _ in draws]
        self.alive = list(range(len(draws)))  # which answer each row is of; ended ones stay until they are weeded out
        numbers = [draw.uniforms(decoding.max_new_tokens) for draw in draws] if decoding.temperature else None
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no other
        self.uniforms = torch.from_numpy(np.stack(numbers)).to(device, wide) if numbers is not None else None
        prompts, repeats = _shared(draws)
        self.repeats = torch.tensor(repeats, device=device)
        self.rows = _rows_of(causal, prompts, device)

    def run(self, poll: Callable[[], None]) -> list[Answer]:
        """Draw to the end, or to the limit."""
        if not self.decoding.max_new_tokens:
            return self.answers
        logits = self.rows.read_prompts()
        if len(self.repeats) < len(self.alive):
            each = torch.repeat_interleave(self.repeats)
            self.rows.take(each)
            logits = logits[each]
        for step in range(self.decoding.max_new_tokens):
            poll()
            tokens = self._choose(logits, step)
            self._note(tokens)
            if all(self.answers[row].ended for row in self.alive) or step + 1 == self.decoding.max_new_tokens:
                break
            going = [place for place, row in enumerate(self.alive) if not self.answers[row].ended]
            # Now and then, and where a quarter has ended: what is kept must be copied.
            if step % CHECK_EVERY == CHECK_EVERY - 1 and FEWEST <= len(going) <= 3 * len(self.alive) / 4:
                keep = torch.tensor(going, device=self.device)
                self.rows.take(keep)
                tokens, self.alive = tokens[keep], [self.alive[place] for place in going]
            logits = self.rows.read(tokens)
        return self.answers

    def _choose(self, logits: Tensor, step: int) -> Tensor:
        """The next token of every row, (R,), from logits (R, V)."""
        if self.uniforms is None:
            return logits.argmax(-1)
        relative = logits - logits.amax(-1, keepdim=True)  # 0 at most: no temperature makes it infinite
        probabilities = nucleus(torch.softmax(relative / self.decoding.temperature, dim=-1), self.decoding.top_p)
        return pick(probabilities, self.uniforms[self.alive, step])

    def _note(self, tokens: Tensor) -> None:
        for row, token in zip(self.alive, tokens.tolist(), strict=True):
            answer = self.answers[row]
            if not answer.ended:
                answer.ended = token in self.ends
                answer.tokens += [] if answer.ended else [token]


def _rows_of(causal: Any, prompts: list[list[int]], device: torch.device) -> "_RaggedRows | _LevelRows | _RereadRows":
    known = CACHES & set(inspect.signature(causal.forward).parameters)
    if not known or causal.config.model_type in OWN_STATE:
        return _RereadRows(causal, prompts, device)
    config = causal.config.get_text_config()
    layers = DynamicCache(config=config).layers
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo: a window that its cache does not know
        return _LevelRows(causal, prompts, device)
    # A sliding window or a recurrent state is kept as the family keeps it, and that wants rows that end together.
    plain = all(type(layer) is DynamicLayer for layer in layers) and causal.get_decoder() is not causal
    return (_RaggedRows if plain and layers else _LevelRows)(causal, prompts, device)


def _neighbours(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours, (first, last + 1), that have one width and together at most READ_TOKENS tokens.

    One width, because kernels go by it: what a prompt is padded to must not depend on its company.
    """
    first = 0
    for place in range(1, len(lengths) + 1):
        width = _rounded(lengths[first])
        others = place == len(lengths) or _rounded(lengths[place]) != width
        if others or (place + 1 - first) * width > READ_TOKENS:
            yield first, place
            first = place


class _RaggedRows:
    """Rows that begin together: each row's tokens from slot 0, what is behind them masked."""

    def __init__(self, causal: Any, prompts: list[list[int]], device: torch.device) -> None:
        self.causal, self.device = causal, device
        widest = _rounded(max(map(len, prompts)))
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        self.slots = _Slots(lengths, widest, widest + 2 * STEP)
        self.prompts = prompts
        self.cache = DynamicCache()
        self.cache.layers = [
            _RaggedLayer(self.slots) for _ in DynamicCache(config=causal.config.get_text_config()).layers
        ]
        takes = inspect.signature(causal.get_decoder().forward).parameters
        self.takes_positions = "position_ids" in takes
        self.takes_more = any(one.kind is one.VAR_KEYWORD for one in takes.values())

    def read_prompts(self) -> Tensor:
        """The logits behind every prompt, (R, V) float32; prompts are read some at a time, those of like length."""
        last = []
        for first, end in _neighbours([len(ids) for ids in self.prompts]):
            lengths = self.slots.lengths[first:end]
            self.slots.width, self.slots.reading = _rounded(int(lengths.max())), (first, end)
            padded = [ids + [PADDING] * (self.slots.width - len(ids)) for ids in self.prompts[first:end]]
            positions = torch.arange(self.slots.width, device=self.device).expand(end - first, -1)
            hidden = self._hidden(torch.tensor(padded, device=self.device), positions, lengths)
            last.append(hidden[torch.arange(end - first, device=self.device), lengths - 1])
        self.slots.reading = None
        return head_logits(self.causal, torch.cat(last)).float()

    def read(self, tokens: Tensor) -> Tensor:
        """The logits behind one more token in every row, (R, V) float32."""
        self.slots.width = _rounded(int(self.slots.lengths.max()) + 1)
        hidden = self._hidden(tokens[:, None], self.slots.lengths[:, None], self.slots.lengths + 1)
        self.slots.lengths = self.slots.lengths + 1
        return head_logits(self.causal, hidden[:, 0]).float()

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, some of them twice or not at all."""
        self.cache.reorder_cache(rows)
        self.slots.lengths = self.slots.lengths[rows]

    def _hidden(self, tokens: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        slots = torch.arange(self.slots.width, device=self.device)
        if self.causal.config._attn_implementation == "sdpa":
            use_attention(self.causal, STEPS)
        more: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        steps = self.slots.reading is None and self.causal.config._attn_implementation == STEPS
        if steps and self.takes_more and self.device.type == "cpu":  # on a GPU one call is worth more
            more[SPANS] = self._spans()
        output = self.causal.get_decoder()(
            input_ids=tokens,
            attention_mask=(slots < seen[:, None]).long(),
            past_key_values=self.cache,
            use_cache=True,
            **more,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _spans(self) -> list[tuple[int, int, int]]:
        """Neighbouring rows that need equally many slots, this pass's included: (first row, last row + 1, slots).

        Exactly as many as each needs: a kernel adds up otherwise over more of them, masked or not.
        """
        widths, first, spans = [_rounded(length + 1) for length in self.slots.lengths.tolist()], 0, []
        for place in range(1, len(widths) + 1):
            if place == len(widths) or widths[place] != widths[first]:
                spans.append((first, place, widths[first]))
                first = place
        return spans


class _LevelRows:
    """Rows that end together: prompts padded on the left, keys and values kept by the family's own cache."""

    def __init__(self, causal: Any, prompts: list[list[int]], device: torch.device) -> None:
        width = max(map(len, prompts))
        self.causal = causal
        self.prompts = torch.tensor([[PADDING] * (width - len(ids)) + ids for ids in prompts], device=device)
        self.mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        self.cache = DynamicCache(config=causal.config.get_text_config())
        self.padded = min(map(len, prompts)) < width
        self.takes = set(inspect.signature(causal.forward).parameters)

    def read_prompts(self) -> Tensor:
        """The logits behind every prompt, (R, V) float32."""
        return self._logits(self.prompts)

    def read(self, tokens: Tensor) -> Tensor:
        """The logits behind one more token in every row, (R, V) float32."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._logits(tokens[:, None])

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, some of them twice or not at all."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]

    def _logits(self, tokens: Tensor) -> Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        asked = {"position_ids": positions, "logits_to_keep": 1}
        # State-space models call their cache otherwise.
        cache = "past_key_values" if "past_key_values" in self.takes else "cache_params"
        output = self.causal(
            input_ids=tokens,
            attention_mask=self.mask if self.padded else None,
            use_cache=True,
            **{cache: self.cache},
            **{name: value for name, value in asked.items() if name in self.takes},
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


class _RereadRows:
    """Rows of a family that keeps its state in a way of its own: all their tokens are read again for each new one."""

    def __init__(self, causal: Any, prompts: list[list[int]], device: torch.device) -> None:
        self.causal, self.device = causal, device
        self.tokens = [list(ids) for ids in prompts]

    def read_prompts(self) -> Tensor:
        """The logits behind every row, (R, V) float32. Rows are padded on the right, which no causal model sees."""
        lengths = torch.tensor([len(ids) for ids in self.tokens], device=self.device)
        width = int(lengths.max())
        padded = torch.tensor([ids + [PADDING] * (width - len(ids)) for ids in self.tokens], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        logits = self.causal(input_ids=padded, attention_mask=mask, use_cache=False).logits
        last: Tensor = logits[torch.arange(len(logits), device=self.device), lengths - 1].float()
        return last

    def read(self, tokens: Tensor) -> Tensor:
        """The logits behind one more token in every row, (R, V) float32."""
        self.tokens = [ids + [token] for ids, token in zip(self.tokens, tokens.tolist(), strict=True)]
        return self.read_prompts()

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, some of them twice or not at all."""
        self.tokens = [self.tokens[row] for row in rows.tolist()]


def _shared(draws: list[Draw]) -> tuple[list[list[int]], list[int]]:
    """The prompts, each once where its draws are neighbours, and how many draws each has."""
    prompts: list[list[int]] = []
    repeats: list[int] = []
    for draw in draws:
        if prompts and prompts[-1] == draw.prompt:
            repeats[-1] += 1
        else:
            prompts.append(draw.prompt)
            repeats.append(1)
    return prompts, repeats


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The probabilities (R, V) with 0 for all but the likeliest tokens that together reach `top_p`; not normalised.

    A. Holtzman et al., The curious case of neural text degeneration, Section 3.1 of https://arxiv.org/abs/1904.09751.
    The token that reaches `top_p` belongs to them, and so do tokens exactly as likely as it.
    """
    if top_p >= 1:
        return probabilities
    best = probabilities.topk(min(NUCLEUS, probabilities.shape[-1]), dim=-1).values
    if best.shape[-1] < probabilities.shape[-1] and bool((best.sum(-1) < top_p).any()):
        best = probabilities.sort(dim=-1, descending=True).values
    before = best.cumsum(-1) - best
    least = best.masked_fill(before >= top_p, 2.0).amin(-1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0.0)


def pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens (R,) at which the cumulative probabilities (R, V), in the order of the vocabulary, pass the uniforms.

    That order, because one by likelihood would turn with a rounding. Probabilities need not be normalised.
    """
    cumulative = probabilities.double().cumsum(-1) if probabilities.device.type != "mps" else probabilities.cumsum(-1)
    target = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # u close to 1 can round to the total itself: then the last token that has any probability.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(found, last)
