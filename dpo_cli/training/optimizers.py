"""The optimizers by name: anything with torch's interface; a state of any shape resumes."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dpo_cli.config.schema import OptimizerConfig
from dpo_cli.runs.checkpoint import StateShapes

# Chosen by `optimizer.name`.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": lambda weights, options: torch.optim.AdamW(
        weights,
        lr=options.lr,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=weights[0].device.type == "cuda",
    ),
    "rmsprop": lambda weights, options: torch.optim.RMSprop(
        weights, lr=options.lr, eps=options.eps, weight_decay=options.weight_decay
    ),
    "sgd": lambda weights, options: torch.optim.SGD(weights, lr=options.lr, weight_decay=options.weight_decay),
}
# Values that an optimizer keeps for each trained weight, for an estimate of memory; others are taken to keep two.
STATE_VALUES = {"adamw": 2, "rmsprop": 1, "sgd": 0}


def state_shapes(weights: Iterable[nn.Parameter], options: OptimizerConfig) -> StateShapes | None:
    """The shapes of an optimizer's state, by the shape of a weight and by key; None where they cannot be known.

    Found by one step on weights without storage. An optimizer that reads values of its weights fails there.
    """
    found: StateShapes = {}
    try:
        for shape in {tuple(weight.shape) for weight in weights}:
            weight = nn.Parameter(torch.empty(shape, device="meta"))
            weight.grad = torch.empty(shape, device="meta")
            optimizer = OPTIMIZERS[options.name]([weight], options)
            optimizer.step()
            found[shape] = {key: tuple(value.shape) for key, value in optimizer.state[weight].items()}
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return found
