"""Decoding: completions of many prompts at once, each sampled with random numbers of its own.

One idea to keep in mind: a token is where a uniform number falls in the model's distribution, and the numbers of a
completion are a function of its seed, its prompt and its index. So the other sequences of the batch change a completion
only through rounding. To keep that small, the keys and values of every row begin at slot 0 and widths are multiples of
32, at which kernels work. Where a kernel depends on the number of rows all the same (float32, GPUs), single tokens may
differ; batch_probe.py finds out. R rows, V vocabulary.
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

from dpo_cli.data.formats import FinishReason
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.errors import ConfigError
from dpo_cli.models.attention import SPANS, STEPS, use_attention
from dpo_cli.models.head import head_logits
from dpo_cli.models.loading import position_limit
from dpo_cli.models.logps import causal_model, plain_attention
from dpo_cli.models.memory import free_memory, make_room, ran_out

PADDING = 0  # any token: the mask hides it
STEP = 32  # slots: every width is a multiple of it
PREFILL_TOKENS = 2048  # of the prompts in one forward pass, padding included
CHECK_EVERY = 8  # tokens between two checks for rows that have stopped
MIN_ROWS = 2  # rows: a single row takes another matrix kernel, which rounds differently
MAX_ROWS = {"cpu": 64, "mps": 64, "cuda": 512}  # rows: more bring no speed
MEMORY_SHARE = 0.4  # of the free memory, for keys and values
NUCLEUS = 512  # likeliest tokens that are sorted first; all are sorted where these do not reach top_p
CACHES = {"past_key_values", "cache_params"}  # the argument that takes the cache, by family
OWN_CACHE = {"minimax", "recurrent_gemma", "rwkv", "xlstm"}  # families with a cache of their own, or none


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled, under the names of vLLM."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy: the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability


@dataclass(frozen=True)
class CompletionRequest:
    """One completion to generate: its prompt, and what its random numbers depend on."""

    prompt: list[int]  # token ids
    seed: int = 0
    index: int = 0  # among the completions of this prompt

    def uniforms(self, tokens: int) -> NDArray[np.float64]:
        """`tokens` numbers in [0, 1), from the raw stream of a counter-based generator: the same on every machine."""
        name = hashlib.blake2b(np.array(self.prompt, dtype="<i4").tobytes(), digest_size=8, salt=b"answers")
        key = np.array([self.seed, int.from_bytes(name.digest(), "little")], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=[0, 0, self.index, 0]).random_raw(tokens)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass
class Completion:
    """A completion as token ids."""

    token_ids: list[int] = field(default_factory=list)  # without the stop token
    finish_reason: FinishReason = FinishReason.LENGTH
    stop_token: int | None = None  # that ended it; None where it reached the limit


@dataclass
class _Slots:
    """The slot of each row's next keys and values: right after its own tokens, so that rows may differ in length."""

    lengths: Tensor  # (R,) slots in use
    width: int  # slots that the current forward pass sees, its own included
    room: int  # slots allocated at first
    prefilling: tuple[int, int] | None = None  # the rows of this prefill; None while decoding, one token a row


class _RaggedLayer(DynamicLayer):
    """Keys and values of rows of different lengths, each from slot 0, in a tensor that grows in steps."""

    all_keys: Tensor
    all_values: Tensor

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots

    def get_seq_length(self) -> int:
        """All slots but the last: the mask says which of them a row uses."""
        return 0 if self.slots.prefilling is not None else self.slots.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of slots seen and the first of them."""
        return self.slots.width, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new states (R, heads, tokens, size) to each row; return all that the forward pass sees."""
        width = self.slots.width
        if self.slots.prefilling is not None:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                # Zeros, not empty memory: a masked value must still be a number.
                shape = (len(self.slots.lengths), key_states.shape[1], self.slots.room)
                self.all_keys = key_states.new_zeros(*shape, key_states.shape[3])
                self.all_values = value_states.new_zeros(*shape, value_states.shape[3])
            first, last = self.slots.prefilling
            self.all_keys[first:last, :, :width] = key_states
            self.all_values[first:last, :, :width] = value_states
            return key_states, value_states
        if width > self.all_keys.shape[2]:
            self.all_keys, self.all_values = _grown(self.all_keys, width), _grown(self.all_values, width)
        rows = torch.arange(len(key_states), device=key_states.device)
        self.all_keys[rows, :, self.slots.lengths] = key_states[:, :, 0]
        self.all_values[rows, :, self.slots.lengths] = value_states[:, :, 0]
        return self.all_keys[:, :, :width], self.all_values[:, :, :width]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select these rows; a row may come twice or not at all."""
        self.all_keys, self.all_values = self.all_keys[beam_idx], self.all_values[beam_idx]


def _grown(states: Tensor, width: int) -> Tensor:
    rows, heads, old, size = states.shape
    fresh = states.new_zeros(rows, heads, width + 2 * STEP, size)
    fresh[:, :, :old] = states
    return fresh


def _padded_width(width: int) -> int:
    """The next multiple above `width`: one slot is always masked, so that attention always takes the same kernel."""
    return (width // STEP + 1) * STEP


def stop_token_ids(model: Any, closing: int) -> set[int]:
    """The tokens that stop a completion: the closing token of training, and the EOS tokens of the model's config."""
    configured = model.generation_config.eos_token_id
    return {closing} | (set(configured) if isinstance(configured, list) else {configured} - {None})


def max_batch_size(model: Any, longest_prompt: int, params: SamplingParams, device: torch.device) -> int:
    """The most completions in one batch: limited by MAX_ROWS and by the memory of their keys and values."""
    config = causal_model(model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_token = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size
    width = next(model.parameters()).element_size()
    of_row = of_token * width * (longest_prompt + params.max_new_tokens + 3 * STEP)
    return max(1, min(MAX_ROWS.get(device.type, 64), int(MEMORY_SHARE * free_memory(device) / of_row)))


def generate_completions(
    model: Any,
    requests: Sequence[CompletionRequest],
    params: SamplingParams,
    stop_ids: set[int],
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
    engine: Engine = SINGLE,
) -> list[Completion]:
    """Generate the completions, in the order of `requests`; the model keeps its train or eval mode.

    Adjacent requests with the same prompt share its prefill. A batch that does not fit into memory is halved;
    MemoryError or the device's own error where a single completion does not fit. An `engine` of several ranks has them
    generate the same in step, which a sharded model needs: rank 0's tokens count, and nothing is halved. Collective.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), plain_attention(model):
            causal = causal_model(model)
            _check_positions(causal, requests, params)
            completions: dict[int, Completion] = {}
            for indices in _batchable(causal, requests):
                generated = _generate_halving(
                    causal, [requests[index] for index in indices], params, stop_ids, device, poll, engine
                )
                completions |= dict(zip(indices, generated, strict=True))
            return [completions[index] for index in range(len(requests))]
    finally:
        model.train(was_training)


def _check_positions(causal: Any, requests: Sequence[CompletionRequest], params: SamplingParams) -> None:
    """ConfigError where prompt and completion are longer than the positions that a model has learned."""
    limit = position_limit(causal)
    longest = max((len(request.prompt) for request in requests), default=0)
    if limit is not None and longest + params.max_new_tokens - 1 > limit:  # the last token is not read
        raise ConfigError(
            f"max_new_tokens={params.max_new_tokens}: too many after a prompt of {longest:,} tokens, since this model "
            f"has {limit:,} positions; set max_new_tokens={max(1, limit + 1 - longest)}"
        )


def _batchable(causal: Any, requests: Sequence[CompletionRequest]) -> list[list[int]]:
    """Indices of requests that may share a batch: all of them, or those of one length where the model sees padding."""
    layers = DynamicCache(config=causal.config.get_text_config()).layers
    if not layers or not all(type(layer) is LinearAttentionLayer for layer in layers):
        return [list(range(len(requests)))] if requests else []
    by_length: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        by_length.setdefault(len(request.prompt), []).append(index)
    return list(by_length.values())


def _generate_halving(
    causal: Any,
    requests: list[CompletionRequest],
    params: SamplingParams,
    stop_ids: set[int],
    device: torch.device,
    poll: Callable[[], None],
    engine: Engine,
) -> list[Completion]:
    batch = requests if len(requests) >= MIN_ROWS else requests * MIN_ROWS
    try:
        return _Batch(causal, batch, params, stop_ids, device, engine).run(poll)[: len(requests)]
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error) or len(requests) == 1 or not engine.alone:
            raise
    make_room(device)
    half = len(requests) // 2
    first = _generate_halving(causal, requests[:half], params, stop_ids, device, poll, engine)
    return first + _generate_halving(causal, requests[half:], params, stop_ids, device, poll, engine)


class _Batch:
    """One batch of completions: what grows with every token, and which rows are still active."""

    def __init__(
        self,
        causal: Any,
        requests: list[CompletionRequest],
        params: SamplingParams,
        stop_ids: set[int],
        device: torch.device,
        engine: Engine,
    ) -> None:
        self.params, self.stop_ids, self.device, self.engine = params, stop_ids, device, engine
        self.completions = [Completion() for _ in requests]
        self.active = list(range(len(requests)))  # the completion of each row; stopped rows stay until they are removed
        numbers = [request.uniforms(params.max_new_tokens) for request in requests] if params.temperature else None
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no other
        self.uniforms = torch.from_numpy(np.stack(numbers)).to(device, wide) if numbers is not None else None
        prompts, repeats = _distinct_prompts(requests)
        self.repeats = torch.tensor(repeats, device=device)
        self.rows = rows_of(causal, prompts, device)

    def run(self, poll: Callable[[], None]) -> list[Completion]:
        """Generate until every completion has stopped or has `max_new_tokens` tokens."""
        if not self.params.max_new_tokens:
            return self.completions
        logits = self.rows.prefill()
        if len(self.repeats) < len(self.active):
            each = torch.repeat_interleave(self.repeats)
            self.rows.select(each)
            logits = logits[each]
        for step in range(self.params.max_new_tokens):
            poll()
            tokens = self._next_tokens(logits, step)
            if not self.engine.alone:
                tokens = self.engine.sum(tokens if self.engine.rank == 0 else torch.zeros_like(tokens))
            self._append(tokens)
            if all(self._stopped(row) for row in self.active) or step + 1 == self.params.max_new_tokens:
                break
            going = [index for index, row in enumerate(self.active) if not self._stopped(row)]
            # Only sometimes, and once a quarter has stopped, since removing rows copies the others.
            if step % CHECK_EVERY == CHECK_EVERY - 1 and MIN_ROWS <= len(going) <= 3 * len(self.active) / 4:
                keep = torch.tensor(going, device=self.device)
                self.rows.select(keep)
                tokens, self.active = tokens[keep], [self.active[index] for index in going]
            logits = self.rows.decode(tokens)
        return self.completions

    def _next_tokens(self, logits: Tensor, step: int) -> Tensor:
        """The next token of every row, (R,), from logits (R, V)."""
        if self.uniforms is None:
            return logits.argmax(-1)
        relative = logits - logits.amax(-1, keepdim=True)  # at most 0, so that no temperature makes it infinite
        probabilities = nucleus(torch.softmax(relative / self.params.temperature, dim=-1), self.params.top_p)
        return inverse_cdf(probabilities, self.uniforms[self.active, step])

    def _append(self, tokens: Tensor) -> None:
        for row, token in zip(self.active, tokens.tolist(), strict=True):
            completion = self.completions[row]
            if token in self.stop_ids and not self._stopped(row):
                completion.finish_reason, completion.stop_token = FinishReason.STOP, token
            if not self._stopped(row):
                completion.token_ids.append(token)

    def _stopped(self, row: int) -> bool:
        return self.completions[row].finish_reason is FinishReason.STOP


def rows_of(
    causal: Any, prompts: list[list[int]], device: torch.device
) -> "_RaggedRows | _LeftPaddedRows | _UncachedRows":
    """A row of each prompt, in the layout that the family's cache allows."""
    known = CACHES & set(inspect.signature(causal.forward).parameters)
    if not known or causal.config.model_type in OWN_CACHE:
        return _UncachedRows(causal, prompts, device)
    config = causal.config.get_text_config()
    layers = DynamicCache(config=config).layers
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo: a window that DynamicCache ignores
        return _LeftPaddedRows(causal, prompts, device)
    # A sliding window or a recurrent state needs the family's own cache, in which all rows have one length.
    plain = all(type(layer) is DynamicLayer for layer in layers) and causal.get_decoder() is not causal
    return (_RaggedRows if plain and layers else _LeftPaddedRows)(causal, prompts, device)


def _prefill_runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of adjacent rows, (first, last + 1), of one width and at most PREFILL_TOKENS tokens together.

    One width, because kernels depend on it: what a prompt is padded to must not depend on the other prompts.
    """
    first = 0
    for index in range(1, len(lengths) + 1):
        width = _padded_width(lengths[first])
        others = index == len(lengths) or _padded_width(lengths[index]) != width
        if others or (index + 1 - first) * width > PREFILL_TOKENS:
            yield first, index
            first = index


class _RaggedRows:
    """Right-padded rows: each row's tokens begin at slot 0, and the slots after them are masked."""

    def __init__(self, causal: Any, prompts: list[list[int]], device: torch.device) -> None:
        self.causal, self.device = causal, device
        widest = _padded_width(max(map(len, prompts)))
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

    def prefill(self) -> Tensor:
        """The logits after every prompt, (R, V) float32; prompts of similar length share a forward pass."""
        last = []
        for first, end in _prefill_runs([len(ids) for ids in self.prompts]):
            lengths = self.slots.lengths[first:end]
            self.slots.width, self.slots.prefilling = _padded_width(int(lengths.max())), (first, end)
            padded = [ids + [PADDING] * (self.slots.width - len(ids)) for ids in self.prompts[first:end]]
            # The mask hides what is after a prompt; its position only has to be one that the model has.
            positions = torch.arange(self.slots.width, device=self.device).clamp(max=int(lengths.max()) - 1)
            hidden = self._hidden(torch.tensor(padded, device=self.device), positions.expand(end - first, -1), lengths)
            last.append(hidden[torch.arange(end - first, device=self.device), lengths - 1])
        self.slots.prefilling = None
        return head_logits(self.causal, torch.cat(last)).float()

    def decode(self, tokens: Tensor) -> Tensor:
        """The logits after one more token in every row, (R, V) float32."""
        self.slots.width = _padded_width(int(self.slots.lengths.max()) + 1)
        hidden = self._hidden(tokens[:, None], self.slots.lengths[:, None], self.slots.lengths + 1)
        self.slots.lengths = self.slots.lengths + 1
        return head_logits(self.causal, hidden[:, 0]).float()

    def select(self, rows: Tensor) -> None:
        """Continue with these rows; a row may come twice or not at all."""
        self.cache.reorder_cache(rows)
        self.slots.lengths = self.slots.lengths[rows]

    def _hidden(self, tokens: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        slots = torch.arange(self.slots.width, device=self.device)
        if self.causal.config._attn_implementation == "sdpa":
            use_attention(self.causal, STEPS)
        more: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        steps = self.slots.prefilling is None and self.causal.config._attn_implementation == STEPS
        if steps and self.takes_more and self.device.type == "cpu":  # on a GPU a single call is faster
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
        """Runs of adjacent rows that need the same number of slots: (first row, last row + 1, slots).

        Each run gets exactly what it needs: over more slots a kernel sums in another order, masked or not.
        """
        widths, first, spans = [_padded_width(length + 1) for length in self.slots.lengths.tolist()], 0, []
        for index in range(1, len(widths) + 1):
            if index == len(widths) or widths[index] != widths[first]:
                spans.append((first, index, widths[first]))
                first = index
        return spans


class _LeftPaddedRows:
    """Left-padded rows: all of one length, with the family's own cache."""

    def __init__(self, causal: Any, prompts: list[list[int]], device: torch.device) -> None:
        width = max(map(len, prompts))
        self.causal = causal
        self.prompts = torch.tensor([[PADDING] * (width - len(ids)) + ids for ids in prompts], device=device)
        self.mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        self.cache = DynamicCache(config=causal.config.get_text_config())
        self.padded = min(map(len, prompts)) < width
        self.takes = set(inspect.signature(causal.forward).parameters)

    def prefill(self) -> Tensor:
        """The logits after every prompt, (R, V) float32."""
        return self._logits(self.prompts)

    def decode(self, tokens: Tensor) -> Tensor:
        """The logits after one more token in every row, (R, V) float32."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._logits(tokens[:, None])

    def select(self, rows: Tensor) -> None:
        """Continue with these rows; a row may come twice or not at all."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]

    def _logits(self, tokens: Tensor) -> Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        optional = {"position_ids": positions, "logits_to_keep": 1}
        # State-space models have another name for their cache.
        cache = "past_key_values" if "past_key_values" in self.takes else "cache_params"
        output = self.causal(
            input_ids=tokens,
            attention_mask=self.mask if self.padded else None,
            use_cache=True,
            **{cache: self.cache},
            **{name: value for name, value in optional.items() if name in self.takes},
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


class _UncachedRows:
    """Rows without a cache, for families whose cache is not transformers': each step reads all tokens again."""

    def __init__(self, causal: Any, prompts: list[list[int]], device: torch.device) -> None:
        self.causal, self.device = causal, device
        self.tokens = [list(ids) for ids in prompts]

    def prefill(self) -> Tensor:
        """The logits after every row, (R, V) float32. Padding is on the right, where a causal model cannot see it."""
        lengths = torch.tensor([len(ids) for ids in self.tokens], device=self.device)
        width = int(lengths.max())
        padded = torch.tensor([ids + [PADDING] * (width - len(ids)) for ids in self.tokens], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        logits = self.causal(input_ids=padded, attention_mask=mask, use_cache=False).logits
        last: Tensor = logits[torch.arange(len(logits), device=self.device), lengths - 1].float()
        return last

    def decode(self, tokens: Tensor) -> Tensor:
        """The logits after one more token in every row, (R, V) float32."""
        self.tokens = [ids + [token] for ids, token in zip(self.tokens, tokens.tolist(), strict=True)]
        return self.prefill()

    def select(self, rows: Tensor) -> None:
        """Continue with these rows; a row may come twice or not at all."""
        self.tokens = [self.tokens[row] for row in rows.tolist()]


def _distinct_prompts(requests: list[CompletionRequest]) -> tuple[list[list[int]], list[int]]:
    """The prompts, each once where its requests are adjacent, and the number of requests of each."""
    prompts: list[list[int]] = []
    repeats: list[int] = []
    for request in requests:
        if prompts and prompts[-1] == request.prompt:
            repeats[-1] += 1
        else:
            prompts.append(request.prompt)
            repeats.append(1)
    return prompts, repeats


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The probabilities (R, V), set to 0 outside the likeliest tokens that together reach `top_p`; not normalized.

    A. Holtzman et al., The curious case of neural text degeneration, Section 3.1 of https://arxiv.org/abs/1904.09751.
    The token that reaches `top_p` is kept, and so are tokens exactly as likely.
    """
    if top_p >= 1:
        return probabilities
    best = probabilities.topk(min(NUCLEUS, probabilities.shape[-1]), dim=-1).values
    if best.shape[-1] < probabilities.shape[-1] and bool((best.sum(-1) < top_p).any()):
        best = probabilities.sort(dim=-1, descending=True).values
    before = best.cumsum(-1) - best
    least = best.masked_fill(before >= top_p, 2.0).amin(-1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0.0)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens (R,) at which the cumulative probabilities (R, V), in vocabulary order, exceed the uniforms.

    Not in order of likelihood, which rounding can change. Probabilities need not be normalized.
    """
    cumulative = probabilities.double().cumsum(-1) if probabilities.device.type != "mps" else probabilities.cumsum(-1)
    target = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # u close to 1 can round to the total itself: then take the last token with any probability.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(found, last)
