"""log p of given tokens from hidden states, in chunks: the logits of a whole batch never exist at once.

The head is the family's own: soft caps (gemma), scales (cohere, granite), biases (phi) and adapters on it come
for free, because the causal model itself is called on a chunk while its decoder is made to return the given
hidden states. N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 128  # logits of one chunk: 128 x 150,000 x 4 bytes are 77 MB


class _Given(SimpleNamespace):
    """What a decoder returns, holding hidden states that are known already; read by name or by position."""

    last_hidden_state: Tensor

    def __getitem__(self, position: int | slice) -> Any:
        return (self.last_hidden_state,)[position]

    def __getattr__(self, name: str) -> None:
        return None  # past_key_values, attentions, router_logits: there are none


@contextmanager
def _decoder_returns(model: Any, hidden: Tensor) -> Iterator[None]:
    decoder = model.get_decoder()
    decoder.forward = lambda *_, **__: _Given(last_hidden_state=hidden.unsqueeze(0))
    try:
        yield
    finally:
        del decoder.forward  # the class's own forward shows through again


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """The model's own head on hidden states (N, D): logits (N, V)."""
    tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
    with _decoder_returns(model, hidden):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0]


def head_trains(model: Any, hidden: Tensor) -> bool:
    """Whether a gradient reaches weights of the head: read from its output, since adapters on it are other modules."""
    with torch.enable_grad():
        return head_logits(model, hidden[:1].detach()).requires_grad


def token_logps(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """log p(label) from hidden states (N, D) and labels (N,): (N,) float32, with gradient to `hidden`."""
    if torch.is_grad_enabled() and head_trains(model, hidden):
        return torch.cat([_checkpointed(model, x, y) for x, y in _chunks(hidden, labels)])
    if torch.is_grad_enabled() and hidden.requires_grad:
        logps: Tensor = _FrozenHead.apply(hidden, labels, model)
        return logps
    return torch.cat([_logps(head_logits(model, x), y) for x, y in _chunks(hidden, labels)])


def _chunks(hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)


def _logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


def _checkpointed(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    def chunk(x: Tensor, y: Tensor) -> Tensor:
        return _logps(head_logits(model, x), y)

    logps: Tensor = checkpoint(chunk, hidden, labels, use_reentrant=False)
    return logps


class _FrozenHead(torch.autograd.Function):
    """log p through a head whose weights do not train, with the gradient taken in the forward pass.

    d log p(y|h) / dz = onehot(y) - softmax(z), and from the logits z to h by autograd, chunk by chunk: what is
    kept for the backward pass is (N, D), never (N, V).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, model: Any) -> Tensor:
        logps, gradients = [], []
        for x, y in _chunks(hidden, labels):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                z = head_logits(model, x)
            all_logps = z.detach().float().log_softmax(dim=1)
            logps.append(all_logps.gather(1, y[:, None])[:, 0])
            slope = all_logps.exp_().neg_()
            slope.scatter_add_(1, y[:, None], torch.ones_like(y[:, None], dtype=slope.dtype))
            gradients.append(torch.autograd.grad(z, x, slope.to(z.dtype))[0])
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * upstream[0][:, None]).to(gradients.dtype), None, None
