"""The optimizers by name: anything with torch's interface; a state of any shape resumes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dpo_cli.config.schema import OptimizerConfig
from dpo_cli.errors import ConfigError
from dpo_cli.models.quantization import check_installed
from dpo_cli.runs.checkpoint import StateShapes


def _adamw8bit(weights: list[nn.Parameter], options: OptimizerConfig, paged: bool = False) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes; a weight of fewer than 4,096 values keeps its state in float32."""
    from bitsandbytes.optim import AdamW8bit

    betas = (options.betas[0], options.betas[1])
    optimizer: torch.optim.Optimizer = AdamW8bit(
        weights, lr=options.lr, betas=betas, eps=options.eps, weight_decay=options.weight_decay, is_paged=paged
    )
    return optimizer


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
    "adamw8bit": _adamw8bit,
    "paged_adamw8bit": lambda weights, options: _adamw8bit(weights, options, paged=True),
    "rmsprop": lambda weights, options: torch.optim.RMSprop(
        weights, lr=options.lr, eps=options.eps, weight_decay=options.weight_decay
    ),
    "sgd": lambda weights, options: torch.optim.SGD(weights, lr=options.lr, weight_decay=options.weight_decay),
}
# float32 values that an optimizer keeps for each trained weight, for an estimate of memory; others: two.
STATE_VALUES = {"adamw": 2, "adamw8bit": 0.5, "paged_adamw8bit": 0.5, "rmsprop": 1, "sgd": 0}
EIGHT_BIT = ("adamw8bit", "paged_adamw8bit")


def check_optimizer(options: OptimizerConfig, device: torch.device) -> None:
    """ConfigError for an optimizer that is not installed or does not run on the device; before anything is loaded."""
    if options.name in EIGHT_BIT:
        check_installed("optimizer.name", options.name)
    if options.name == "paged_adamw8bit" and device.type != "cuda":
        raise ConfigError(
            "optimizer.name=paged_adamw8bit: it pages between a GPU's memory and the CPU's, and the device is "
            f"{device}; choose adamw8bit"
        )


def allocate_state(optimizer: Any) -> None:
    """Give an 8-bit optimizer its state at once, so that a checkpoint is read into the memory it belongs in."""
    for number, group in enumerate(optimizer.param_groups if hasattr(optimizer, "init_state") else ()):
        for index, weight in enumerate(group["params"]):
            optimizer.init_state(group, weight, number, index)


def state_shapes(weights: Iterable[nn.Parameter], options: OptimizerConfig) -> StateShapes | None:
    """The shapes of an optimizer's state, by the shape of a weight and by key; None where they cannot be known.

    Found by one step on weights without storage. An optimizer that reads values of its weights fails there. An 8-bit
    state is not asked for: it is allocated before it is read.
    """
    if options.name in EIGHT_BIT:
        return None
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
