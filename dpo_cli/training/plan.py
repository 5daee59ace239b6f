"""The plan of a run: what it takes in memory, time and money, said before a weight is loaded or downloaded.

One idea to keep in mind: no formula for a family. The model is built without content from its config.json, and the
program's own passes run on it (models/meter.py) in the micro-batch that the run itself would try first. What is left to
formulas is what several GPUs share, and what has no size before it runs; both are said to be assumed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import combinations
from typing import Any

import torch

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, first_line, plural, safe_text, significant
from dpo_cli.data.batches import Layout, Schedule, Split, SplitByPairs, SplitByTokens, longest_side, packed_tokens
from dpo_cli.data.pairs import check_sources, load_pairs
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.errors import CheckpointError, ConfigError, OutOfMemoryError
from dpo_cli.models.dtype import choose_device, choose_dtype
from dpo_cli.models.loading import find_model, load_model, load_tokenizer
from dpo_cli.models.logps import make_micro_batch
from dpo_cli.models.memory import budget_of, free_memory, kept_bytes, two_sizes
from dpo_cli.models.meter import PassMemory, count_flops, meter_pass, meter_scoring, without_content
from dpo_cli.objectives.table import make_objective
from dpo_cli.training.header import describe_policy, millions
from dpo_cli.training.memory_probe import largest_micro_batch, longest_trained
from dpo_cli.training.optimizers import STATE_VALUES
from dpo_cli.training.parts import Material

GIB = 2**30
CONTEXT = GIB // 2  # that CUDA and its libraries take on a GPU
ASSUMED_TFLOPS = {torch.float32: 10.0}  # that one GPU reaches; 2-byte dtypes:
ASSUMED_TFLOPS_HALF = 100.0
BUCKET_BYTES = 4 * 2**26  # that ddp sums in one call
MOST_GPUS = 1024
SOME = 256  # pairs that the size of micro-batches is found on


@dataclass(frozen=True)
class Sharing:
    """How the ranks of an engine share memory."""

    several: bool  # GPUs
    shards: bool  # weights, gradients and optimizer state


# By `engine.name`.
SHARING = {"single": Sharing(False, False), "ddp": Sharing(True, False), "fsdp": Sharing(True, True)}
# The parts of a run, as columns and in words.
WHEN = {
    "reference": "while the reference's log-probs are computed",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "update": "in the update",
}


@dataclass(frozen=True)
class Hardware:
    """What is planned for."""

    device: torch.device
    memory: int  # bytes of one GPU, or free on this computer
    gpus: int

    @property
    def is_gpu(self) -> bool:
        """Whether the memory is a GPU's."""
        return self.device.type == "cuda"

    def __str__(self) -> str:
        if not self.is_gpu:
            return f"{self.device}, {gib(self.memory)} GiB free"
        return f"{plural(self.gpus, 'GPU')} of {gib(self.memory)} GiB{' each' if self.gpus > 1 else ''}"


@dataclass(frozen=True)
class Weights:
    """Bytes of a policy's weights."""

    base: int
    adapters: int  # and a head of a reward model
    trained: int  # values, not bytes
    largest_trained: int  # values of the largest tensor that trains
    layer: int  # of the largest layer, adapters included
    layer_trained: int  # values of one layer
    root: int  # outside the layers


@dataclass(frozen=True)
class Phase:
    """A part of a run, and what it takes on each GPU: bytes by what they are for."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Passed:
    """The largest micro-batch of a run, and what its passes take."""

    memory: PassMemory
    scoring: int  # bytes at the peak of a forward pass without gradient
    accumulates: bool  # whether gradients are there before it
    pairs: int
    layout: Layout


@dataclass(frozen=True)
class Plan:
    """What a run takes on each GPU."""

    phases: tuple[Phase, ...]
    hardware: Hardware
    passed: Passed
    policy: str  # in words
    dtype: torch.dtype

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return self.peak.total <= self.hardware.memory


@dataclass(frozen=True)
class Work:
    """What a run computes."""

    steps: int
    tokens: float  # that the policy is trained on
    flops: float


def gib(size: float) -> str:
    """Bytes in GiB."""
    return significant(size / GIB)


def plan_run(config: RunConfig, reporter: Reporter) -> None:
    """Show what a run would take in memory, time and money; OutOfMemoryError with a remedy where it does not fit."""
    check_sources(config.data)
    planner = Planner.of(config, reporter)
    reporter.doing("planning: the model runs without weights")
    plan = planner.plan(config)
    show(config, plan, planner.work(config, plan.passed.layout), planner.source.name, reporter)
    if plan.fits:
        return
    needed = (
        f"{gib(plan.peak.total)} GiB are needed{' on each' if plan.hardware.gpus > 1 else ''} {WHEN[plan.peak.name]}"
    )
    has = f"gpu={safe_text(config.gpu)}" if config.gpu is not None else f"{plan.hardware}"
    reporter.doing("looking for what would make it fit")
    raise OutOfMemoryError(f"{has}: does not fit: {needed}; {remedy(planner, config)}")


# What is planned for


def hardware_of(config: RunConfig) -> Hardware:
    """The GPUs or the computer that a config plans for; ConfigError for GPUs that its engine does not use."""
    processes = config.engine.processes
    gpus = config.gpus or (processes if isinstance(processes, int) else 1)
    name = config.engine.name
    if gpus > 1 and not SHARING[name].several:
        raise ConfigError(f"gpus={gpus}: engine={name} uses one; choose engine=ddp or engine=fsdp")
    if config.gpu is not None:
        memory = float(config.gpu.strip().removesuffix("GiB"))
        return Hardware(torch.device("cuda"), int(memory * GIB), gpus)
    device: torch.device = choose_device(config.device).value
    free = free_memory(device)
    return Hardware(device, free if device.type == "cuda" else free // gpus, gpus)


def dtype_of(config: RunConfig, hardware: Hardware) -> torch.dtype:
    """The dtype of the base weights."""
    if config.gpu is None or config.model.dtype != "auto":
        dtype: torch.dtype = choose_dtype(config.model.dtype, hardware.device, config.lora.enabled, keep=False).value
        return dtype
    return torch.bfloat16 if config.lora.enabled else torch.float32


# What is measured without weights


def weigh(policy: Any, lora: bool) -> Weights:
    """The bytes of a policy's weights, packed where they are quantised."""
    sizes = {id(tensor): tensor.nbytes for tensor in [*policy.parameters(), *policy.buffers()]}
    names = set(getattr(policy, "_no_split_modules", None) or ())
    layers = [module for module in policy.modules() if type(module).__name__ in names]

    def of(module: Any) -> int:
        return sum(sizes[id(tensor)] for tensor in [*module.parameters(), *module.buffers()])

    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    adapters = sum(weight.nbytes for weight in trained) if lora else 0
    return Weights(
        base=sum(sizes.values()) - adapters,
        adapters=adapters,
        trained=sum(weight.numel() for weight in trained),
        largest_trained=max(weight.numel() for weight in trained),
        layer=max(map(of, layers), default=0),
        layer_trained=max((sum(w.numel() for w in one.parameters() if w.requires_grad) for one in layers), default=0),
        root=sum(sizes.values()) - sum(map(of, layers)),
    )


@dataclass
class Planner:
    """Plans of a run and of its variants on the same pairs."""

    source: Any
    material: Material
    tried: dict[Any, Passed] = field(default_factory=dict)  # smallest micro-batches
    weighed: dict[Any, Weights] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, reporter: Reporter) -> "Planner":
        """A planner for the model and the pairs of a config: its config.json and tokenizer are read, and the data."""
        hardware_of(config)
        source = find_model(config.model, reporter.say)
        reporter.doing(f"loading the tokenizer of {safe_text(source.name)}")
        encoder = PairEncoder.of(load_tokenizer(source), config.data, make_objective(config).always_closes)
        reporter.doing(f"reading pairs from {safe_text(config.data.describe_train())}")
        data = load_pairs(config.data, encoder, config.seed, working=reporter.bar)
        reporter.stop()
        schedule = Schedule(len(data.train), config.batch_size, config.seed, config.data.shuffle, data.train.rows)
        steps = schedule.total_steps(config.epochs, config.max_steps)
        return cls(source, Material(source, encoder, data, schedule, steps))

    def longest(self, config: RunConfig) -> list[TokenizedPair]:
        """As many of the longest pairs as a batch has, shortened to the config's length."""
        longest = longest_trained(self.material, config.batch_size)
        return [shortened(pair, config.data.max_length) for pair in longest]

    def policy(self, config: RunConfig, dtype: torch.dtype) -> Any:
        """The policy without content."""
        model = load_model(replace(self.source, config=config.model), dtype, torch.device("meta"))
        policy = make_objective(config).prepare(model, config.lora, self.source.name)
        if config.engine.gradient_checkpointing:
            policy.activation_checkpointing_enable()
        return policy.train()

    def plan(self, config: RunConfig, least: bool = False) -> Plan:
        """What the run takes; with `least`, in the smallest micro-batch that it can have: its longest pair.

        CheckpointError for a model that does not run without content.
        """
        hardware = hardware_of(config)
        dtype = dtype_of(config, hardware)
        policy = self.policy(config, dtype)
        weights = weigh(policy, config.lora.enabled)
        free = hardware.memory - sum(resident(config, weights, hardware, in_every_step=True).values())
        passed = self._passed(config, policy, hardware, free, least)
        described = describe_policy(config, make_objective(config), policy)
        return Plan(tuple(phases_of(config, weights, hardware, passed)), hardware, passed, described, dtype)

    def fits(self, config: RunConfig) -> bool:
        """Whether the run fits in its smallest micro-batch, which it comes to where memory is short."""
        hardware = hardware_of(config)
        key = (config.lora.enabled, config.model.quantization)
        if key not in self.weighed:
            self.weighed[key] = weigh(self.policy(config, dtype_of(config, hardware)), config.lora.enabled)
        if sum(resident(config, self.weighed[key], hardware, in_every_step=True).values()) > hardware.memory:
            return False
        return self.plan(config, least=config.micro_batch_size == "auto").fits

    def _passed(self, config: RunConfig, policy: Any, hardware: Hardware, free: int, least: bool) -> Passed:
        """The largest micro-batch, and what it takes."""
        key = (config.lora.enabled, config.model.quantization, config.engine.gradient_checkpointing,
               config.data.max_length, hardware.gpus > 1)  # fmt: skip
        if least and key in self.tried:
            return self.tried[key]
        score, longest, failed = make_objective(config).score, self.longest(config), ""
        for layout in layouts(config):
            try:
                with without_content(policy, device_of(hardware, layout)) as device:
                    split = self._split(config, policy, device, layout, hardware, free, least)
                    largest = largest_micro_batch(longest, split)
                    micro_batch = make_micro_batch(largest, device, layout)
                    accumulates = shards(config, hardware) or len(split(longest)) > 1
                    memory = meter_pass(policy, score, micro_batch, accumulates)
                    scoring = meter_scoring(policy, score, micro_batch)
            except (ValueError, RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
                failed = first_line(error)
            else:
                found = Passed(memory, scoring, accumulates, len(largest), layout)
                if least:
                    self.tried[key] = found
                return found
        raise CheckpointError(
            f"{safe_text(self.source.name)}: cannot be planned without its weights ({safe_text(failed, 200)}); "
            "dry_run=true tries a run with them"
        )

    def _split(
        self, config: RunConfig, policy: Any, device: torch.device, layout: Layout, hardware: Hardware, free: int,
        least: bool,
    ) -> Split:  # fmt: skip
        """How a run would split its batches, as training/build.py does with weights."""
        if config.micro_batch_size != "auto" or least:
            return SplitByPairs(1 if least else int(config.micro_batch_size))
        some = [shortened(pair, config.data.max_length) for pair in self.material.data.train[:SOME]]
        kept = [kept_bytes(policy, row, device, layout) for row in two_sizes(some)]
        return SplitByTokens(budget_of(kept, policy, free, hardware.device).tokens, layout)

    def work(self, config: RunConfig, layout: Layout) -> Work:
        """Tokens and floating-point operations of the whole run, from a micro-batch of its first pairs."""
        hardware, data, objective = hardware_of(config), self.material.data, make_objective(config)
        policy = self.policy(replace_engine(config, gradient_checkpointing=False), dtype_of(config, hardware))
        pairs = self.material.batch(next(self.material.schedule.batches(0, 1)))
        with without_content(policy, device_of(hardware, layout)) as device:
            scoring, training = count_flops(policy, objective.score, make_micro_batch(pairs, device, layout))
        if config.engine.gradient_checkpointing:
            training += scoring  # every layer is computed twice
        steps, in_epoch = self.material.total_steps, self.material.schedule.steps_per_epoch
        lengths = data.train.lengths()
        tokens = float(lengths.sum()) * steps / in_epoch
        held_out = sum(packed_tokens([pair]) for pair in data.held_out)
        evaluations = 1 + ((steps - 1) // config.eval_every if config.eval_every else 0)
        referred = 0.0
        if objective.needs_reference:
            always = config.reference.cache == "off"
            referred = tokens if always else min(tokens, float(lengths.sum()))
            referred += held_out * (evaluations if always else 1)
        return Work(steps, tokens, training * tokens + scoring * (referred + held_out * evaluations))


def device_of(hardware: Hardware, layout: Layout) -> torch.device:
    """Where tensors without content are: `meta` has a GPU's attention by segments, `cpu` the fused one of all else."""
    return hardware.device if layout is Layout.PACKED_SEGMENTS else torch.device("cpu")


def layouts(config: RunConfig) -> list[Layout]:
    """The layouts that a run may take, the one it is most likely to take first."""
    packed = [Layout.PACKED_SEGMENTS, Layout.PACKED_MASK]
    return {"auto": [*packed, Layout.PADDED], "packed": packed, "padded": [Layout.PADDED]}[config.layout]


def shortened(pair: TokenizedPair, length: int) -> TokenizedPair:
    """The pair with no more tokens a side than `length`: from the prompt's front, then from the responses' end."""
    if longest_side(pair) <= length:
        return pair
    responses = max(len(pair.chosen), len(pair.rejected))
    kept = max(1, length - responses)
    chosen, rejected = pair.chosen[: length - kept], pair.rejected[: length - kept]
    nothing = pair.chosen_unscored[:0]
    return replace(pair, prompt=pair.prompt[-kept:], chosen=chosen, rejected=rejected, chosen_unscored=nothing,
                   rejected_unscored=nothing)  # fmt: skip


# What is where, and when


def resident(config: RunConfig, weights: Weights, hardware: Hardware, in_every_step: bool) -> dict[str, int]:
    """Bytes of the weights on each GPU, in a training step or while the reference's cache is filled."""
    ranks, gathers = ranks_of(config, hardware), shards(config, hardware)
    uses_second = make_objective(config).needs_reference and config.reference.name == "frozen"
    second = uses_second and (config.reference.cache == "off" or not in_every_step)
    return {
        "base weights": share(weights.base, ranks),
        "second model": share(weights.base, ranks) if second else 0,
        "adapters": share(weights.adapters, ranks),
        "one layer and what is outside, whole": (weights.layer + weights.root * (2 if second else 1)) if gathers else 0,
        "collectives' buffers": weights.layer if gathers else 0,  # the next layer is gathered meanwhile
        "CUDA and libraries (assumed)": CONTEXT if hardware.is_gpu else 0,
    }


def shards(config: RunConfig, hardware: Hardware) -> bool:
    """Whether each GPU holds a part of every weight."""
    return SHARING[config.engine.name].shards and hardware.gpus > 1


def ranks_of(config: RunConfig, hardware: Hardware) -> int:
    """Into how many parts weights, gradients and optimizer state are cut; 0 where they are kept elsewhere."""
    if not shards(config, hardware):
        return 1
    return 0 if config.engine.cpu_offload else hardware.gpus


def share(size: int, ranks: int) -> int:
    """A rank's part of some bytes; 0 ranks keep them elsewhere."""
    return math.ceil(size / ranks) if ranks else 0


def phases_of(config: RunConfig, weights: Weights, hardware: Hardware, passed: Passed) -> Iterator[Phase]:
    """What each part of a run takes on each GPU."""
    ranks, gathers, memory = ranks_of(config, hardware), shards(config, hardware), passed.memory
    if make_objective(config).needs_reference and config.reference.cache != "off":
        filling = resident(config, weights, hardware, in_every_step=False)
        yield Phase("reference", {**filling, "head chunk or a layer": passed.scoring})
    always = resident(config, weights, hardware, in_every_step=True)
    state = share(int(4 * STATE_VALUES.get(config.optimizer.name, 2) * weights.trained), ranks)
    gradients = share(4 * weights.trained, ranks)
    always["optimizer state"] = state
    yield Phase(
        "forward",
        {
            **always,
            "gradients": gradients if passed.accumulates else 0,
            "activations": memory.kept,
            "head chunk or a layer": max(0, memory.forward - memory.kept),
        },
    )
    rest = memory.backward - memory.new_gradients - memory.kept  # below 0 where the peak comes late
    summed = always["collectives' buffers"] + (2 * 4 * weights.layer_trained if gathers else 0)
    yield Phase(
        "backward",
        {
            **always,
            "collectives' buffers": summed,
            "gradients": gradients if passed.accumulates else memory.new_gradients,
            "activations": memory.kept + min(0, rest),
            "backward pass": max(0, rest),
        },
    )
    bucket = min(BUCKET_BYTES + 4 * weights.largest_trained, 4 * weights.trained)
    yield Phase(
        "update",
        {
            **always,
            "collectives' buffers": bucket if hardware.gpus > 1 and not gathers else always["collectives' buffers"],
            "gradients": gradients,
            "the update itself": update_bytes(config, weights, hardware, ranks),
        },
    )


def update_bytes(config: RunConfig, weights: Weights, hardware: Hardware, ranks: int) -> int:
    """What an optimizer makes in an update beside its state."""
    if not hardware.is_gpu:
        return share(2 * 4 * weights.largest_trained, ranks)  # weight after weight
    return 0 if config.optimizer.name == "adamw" else share(4 * weights.trained, ranks)  # AdamW's is one kernel


# What would make it fit


def replace_engine(config: RunConfig, **changes: Any) -> RunConfig:
    """The config with other options of its engine."""
    return replace(config, engine=replace(config.engine, **changes))


def options(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a run may do with less memory, as words of its command line and as changes; what costs least comes first."""
    lora, frozen = config.lora.enabled, config.reference.name == "frozen" and make_objective(config).needs_reference
    if lora and frozen:
        yield "reference=adapter_off", {"reference": {"name": "adapter_off"}}
    elif frozen and config.reference.cache == "off":
        yield "reference.cache=auto", {"reference": {"cache": "auto"}}
    if config.micro_batch_size != "auto":
        yield "micro_batch_size=auto", {"micro_batch_size": "auto"}
    if not config.engine.gradient_checkpointing:
        yield "engine.gradient_checkpointing=true", {"engine": {"gradient_checkpointing": True}}
    if lora and config.model.quantization == "none" and find_spec("bitsandbytes") is not None:
        yield "model.quantization=nf4", {"model": {"quantization": "nf4"}}
    for part in (2, 4):
        length = config.data.max_length // part
        if length > (config.data.max_prompt_length or 1):
            yield f"data.max_length={length}", {"data": {"max_length": length}}
    if not lora:
        yield "lora=all_linear", {"lora": {"enabled": True}}


def changed(config: RunConfig, changes: Sequence[Mapping[str, Any]]) -> RunConfig:
    """The config with changes, one after the other; a mapping stands for options of a group."""
    for change in changes:
        for key, value in change.items():
            new = replace(getattr(config, key), **value) if isinstance(value, dict) else value
            config = replace(config, **{key: new})
    return config


def remedy(planner: Planner, config: RunConfig) -> str:
    """The fewest options with which the run fits, and how many GPUs would hold it."""
    possible, found = list(options(config)), list[str]()
    several = (chosen for number in range(len(possible)) for chosen in combinations(possible, number + 1))
    for chosen in several:
        words = [word for word, _ in chosen]
        once = len({word.split("=")[0] for word in words}) == len(words)
        if once and planner.fits(changed(config, [changes for _, changes in chosen])):
            found.append(" ".join(words))
            break
    if config.gpu is not None:
        found += _sharded(planner, config, [one for one in possible if not one[0].startswith(("data.", "lora"))])
    return f"{', or '.join(found)} would fit" if found else "a smaller model or a larger GPU is needed"


def _sharded(planner: Planner, config: RunConfig, possible: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The fewest GPUs that hold the run in shards, by themselves or with every option that leaves the result."""
    for chosen in ([], possible):
        sharded = replace_engine(changed(config, [changes for _, changes in chosen]), name="fsdp")
        gpus = 2 * hardware_of(config).gpus
        while gpus <= MOST_GPUS:
            if planner.fits(replace(sharded, gpus=gpus)):
                return [" ".join([f"engine=fsdp gpus={gpus}", *(word for word, _ in chosen)])]
            gpus *= 2
    return []


# What is shown


def show(config: RunConfig, plan: Plan, work: Work, name: str, reporter: Reporter) -> None:
    """The memory of each phase by part, then whether it fits, then time and cost."""
    hardware, passed, peak = plan.hardware, plan.passed, plan.peak
    names = list(dict.fromkeys(part for phase in plan.phases for part in phase.parts))
    rows = [
        [part, *("" if not phase.parts.get(part) else gib(phase.parts[part]) for phase in plan.phases)]
        for part in names
        if any(phase.parts.get(part) for phase in plan.phases)
    ]
    rows.append(["total", *(gib(phase.total) for phase in plan.phases)])
    reporter.say()
    reporter.grid([f"GiB{' on each GPU' if hardware.gpus > 1 else ''}", *(phase.name for phase in plan.phases)], rows)
    reporter.say()
    dtype = str(plan.dtype).removeprefix("torch.")
    quantization = config.model.quantization
    packed = "" if quantization == "none" else f", {quantization}"
    size = f"{plural(passed.memory.tokens, 'token')}, {plural(passed.pairs, 'pair')} of the longest"
    fits = f"{gib(peak.total)} of {gib(hardware.memory)} GiB {WHEN[peak.name]}"
    reporter.facts(
        [
            ("model", f"{safe_text(name)} in {dtype}{packed}; from its config.json, no weight was read"),
            ("policy", plan.policy),
            ("planned for", f"{hardware}, engine={config.engine.name}"),
            ("micro-batch", f"{size}; {LAYOUTS[passed.layout]}"),
            *_reference_row(plan),
            *_time_rows(config, plan, work),
            ("memory", f"{fits}: {'fits' if plan.fits else 'does not fit'}"),
        ]
    )


LAYOUTS = {
    Layout.PACKED_SEGMENTS: "packed rows by segments (the run tries whether the model takes them)",
    Layout.PACKED_MASK: "packed rows under a mask (the run tries whether the model takes them)",
    Layout.PADDED: "padded rows",
}


def _reference_row(plan: Plan) -> list[tuple[str, str]]:
    if plan.phases[0].name != "reference":
        return []
    return [("reference", "its log-probs are computed once, before the first step, and not where they are on disk")]


def _time_rows(config: RunConfig, plan: Plan, work: Work) -> list[tuple[str, str]]:
    size = (
        f"{plural(work.steps, 'step')}, {millions(round(work.tokens))} tokens, {significant(work.flops / 1e15)} PFLOP"
    )
    hardware = plan.hardware
    tflops = config.tflops or (ASSUMED_TFLOPS.get(plan.dtype, ASSUMED_TFLOPS_HALF) if hardware.is_gpu else None)
    if tflops is None:
        return [
            ("work", size),
            ("time", "not estimated for this device: tflops=... says what it reaches, dry_run=true measures"),
        ]
    seconds = work.flops / (tflops * 1e12 * hardware.gpus)
    why = "tflops" if config.tflops else "assumed; tflops=... says what yours reaches"
    rows = [
        ("work", size),
        ("time", f"{duration(seconds)}, {work.tokens / seconds:,.0f} tokens/s"),
        ("", f"at {significant(tflops)} TFLOP/s a GPU ({why}), loading and compiling aside"),
    ]
    if config.price is not None:
        cost = seconds / 3600 * hardware.gpus * config.price
        hours = significant(seconds / 3600 * hardware.gpus)
        rows.append(("cost", f"{cost:,.2f}: {hours} GPU-hours at {significant(config.price)}"))
    return rows
