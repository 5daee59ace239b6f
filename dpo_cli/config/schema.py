"""The schema behind conf/: the type, range and choices of every key, declared with the key.

YAML holds the values, these dataclasses hold the rules. `config_of` turns a plain container (composed by Hydra, or read
from a file) into the checked dataclass, or says in one line what does not fit. pydantic checks strictly: no value is
converted, except a number where text is meant. Nothing here imports torch, so that a typo is answered at once.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass
from pydantic.fields import FieldInfo

from dpo_cli.config.foreign_words import WORDS, answer
from dpo_cli.config.objectives import OBJECTIVES
from dpo_cli.config.versions import VERSION, read_stored
from dpo_cli.console.text import safe_text, without_secrets
from dpo_cli.errors import CheckpointError, ConfigError

Config = TypeVar("Config")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# The losses and the options each of them uses; a test compares them with the functions in theory/losses.py.
LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("label_smoothing",),
    "robust": ("label_smoothing",),
    "hinge": (),
    "ipo": (),
    "ipo_sum": (),
    "sigmoid_norm": (),
    "exo_pair": ("label_smoothing",),
    "nca_pair": (),
    "bco_pair": (),
    "sppo_hard": (),
    "apo_zero": (),
    "apo_down": (),
    "discopop": ("temperature",),
}
# What early_stop.metric can be: its key in metrics.jsonl, and 1 where more of it is better, -1 where less is.
METRICS = {"loss": ("loss", -1), "accuracy": ("rewards/accuracies", 1), "margin": ("rewards/margins", 1)}
# What decides which step final/ holds, where a run chooses it.
OF_CHOOSING = ("eval_every", "samples.n", "samples.max_new_tokens")
# Who labels samples, the key that each needs, and what to give.
LABELLERS = {
    "human": ("annotator", "annotator=NAME, under which the judgements are kept"),
    "reward": ("judge", "judge=RUN, a run of dpo-train objective=reward"),
    "implicit": ("judge", "judge=RUN, a run or adapter of dpo-train"),
    "rule": ("rule", "rule=NAME, for instance rule=shorter"),
}
# What a column of a data set can be; those of LABELS say which of several responses is preferred.
LABELS = ("preferred", "preference", "scores", "ranks")
COLUMNS = (
    "prompt", "system", "history", "chosen", "rejected", "responses", *LABELS, "probability", "source", "tools",
    "documents",
)  # fmt: skip
LISTS = ("prompt", "responses", "scores", "ranks")  # may be several columns
# Options of data in a mixture. These hold for the whole; all others are each source's own.
OF_WHOLE = (
    "split_by", "eval_leaks", "template", "template_options", "special_tokens_in_text", "max_length",
    "max_prompt_length", "prompt_truncation", "shuffle", "processes", "cache_gib",
)  # fmt: skip
# `data.` sets them for all sources.
FOR_EACH = ("eval_fraction", "ties", "soft_labels", "limit", "eval_limit", "on_bad_row", "max_bad_fraction")
OF_SOURCE = ("subset", "eval_split", "columns", "preferred", "tied", "roles")  # how the rows of one source are read
MIXTURE = ("sources", "stop")
# The name of a source or held-out set is put behind a metric's name: rewards/margins/hh. These names end so already.
METRIC_ENDINGS = (
    "chosen", "rejected", "margins", "accuracies", "improvement", "policy", "reference", "heaviest_10_share",
    "n", "kl", "length", "length_ratio", "ends", "repetition", "distinct_2", "reference_length", "reference_ends",
    "reference_repetition", "reference_distinct_2",
)  # fmt: skip
PROMPTS_NEEDED = "name a file of prompts, for instance prompts=prompts.jsonl"

# Whether a resumed run may change a key: silently (what is shown, kept or checked), or with a warning (the end of the
# run and with it the schedule, or its rounding). Any other change is refused.
FREE: dict[str, Any] = {"on_resume": "free"}
LOUD: dict[str, Any] = {"on_resume": "loud"}

# `Field(description=...)` is the hint behind the rule in an error message; where it begins with "must" or stands at a
# rule without words of its own, it is the rule.
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
# A value in a cell: as text, so that 1, 1.0 and "1" of JSON, Parquet and CSV are one value.
Cell = Annotated[str, BeforeValidator(lambda value: cell_text(value))]
Files = Text | Annotated[list[Text], Field(min_length=1)]
WholeOrAuto = Annotated[int, Field(ge=1)] | Literal["auto"]
Layout = Literal["auto", "packed", "padded"]
OnBadRow = Literal["error", "skip"]
Template = Literal["chat", "plain"]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="must be a whole number from 0 to 2**63 - 1")]
EMPTY = "is empty; leave it out, or name a directory"
Directory = Annotated[Text, Field(pattern=r"\S")]
FILES = "must be a file, a folder, a pattern such as shards/*.jsonl, a list of these, or a hub data set"
WHOLE_OR_AUTO = "must be auto or at least 1"


def cell_text(value: Any) -> Any:
    """A cell's number or truth value as text, in one spelling; whatever else it is stays."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise FieldError(key, value, rule)


class FieldError(ConfigError):
    """A key whose value breaks a rule; `key` is its dotted path."""

    def __init__(self, key: str, value: Any, rule: str) -> None:
        self.key, self.value, self.rule = key, value, rule
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else safe_text(value)
        super().__init__(f"{key}={shown}: {rule}")


@dataclass(config=STRICT, kw_only=True)
class ModelConfig:
    """The SFT model: the start of the policy, and the reference."""

    name_or_path: Text = Field(pattern=r"\S", description="name a model")
    revision: Text | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    quantization: Literal["none", "nf4", "int8"]
    adapter: Text | None
    trust_remote_code: bool


@dataclass(config=STRICT, kw_only=True)
class DataConfig:
    """Preference pairs: where they are, how rows become pairs, how pairs become tokens."""

    train: Files | None = Field(description=FILES)
    eval: Files | dict[str, Files] | None = Field(description=f"{FILES}; or a name for each of several sets")
    sources: dict[str, Any]  # a SourceConfig of each name
    stop: Literal["first", "all"]
    subset: Text | None
    train_split: Text
    eval_split: Text | None
    eval_fraction: float = Field(ge=0, lt=1, description="0.1 is usual")
    split_by: Literal["first_turn", "prompt"]
    eval_leaks: Literal["warn", "drop", "error"]
    format: Literal["auto", "hh", "standard", "messages", "ranked"]
    columns: dict[str, Text | list[Text] | None] = Field(description="must be a column, a list of columns, or null")
    preferred: list[Cell] = Field(description="must be a list of values, one for each response")
    tied: list[Cell] = Field(description="must be a list of values")
    ties: Literal["drop", "half"]
    soft_labels: bool
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool"]] = Field(
        description="must be system, developer, user, assistant or tool for each speaker"
    )
    template: Template | None
    template_options: dict[str, bool | int | float | str | None] = Field(
        description="must be text, a number, true, false or null"
    )
    special_tokens_in_text: Literal["escape", "keep", "error"]
    max_length: int = Field(ge=2)
    max_prompt_length: int | None = Field(ge=1)
    prompt_truncation: Literal["turns", "tokens"]
    limit: int | None = Field(ge=1)
    eval_limit: int | None = Field(ge=1)
    shuffle: bool
    on_bad_row: OnBadRow
    max_bad_fraction: float = Field(ge=0, le=1, json_schema_extra=FREE)
    processes: WholeOrAuto = Field(json_schema_extra=FREE, description=WHOLE_OR_AUTO)
    cache_gib: float | None = Field(gt=0, json_schema_extra=FREE)

    def __post_init__(self) -> None:
        self._check_mapping()
        self._check_mixture()
        for name in self.eval if isinstance(self.eval, dict) else ():
            _check_name(f"data.eval.{name}", name)
        _require(
            self.max_prompt_length is None or self.max_prompt_length < self.max_length,
            "data.max_prompt_length",
            self.max_prompt_length,
            f"must be below data.max_length={self.max_length}, or no response fits",
        )

    def _check_mixture(self) -> None:
        """Whether the sources have a share each, and nothing else says where pairs are."""
        _require(bool(self.sources) or self.stop == "first", "data.stop", self.stop, "is of data=mixture; leave it out")
        if not self.sources:
            return
        _require(self.train is None, "data.train", self.train, "leave it out: data.sources names what is trained on")
        for key in OF_SOURCE if self.eval is None else ():
            why = f"each source of a mixture has its own: data.sources.NAME.{key}"
            _require(not getattr(self, key), f"data.{key}", getattr(self, key), why)
        kinds = set()
        for name, source in self.sources.items():
            shares = [key for key in ("weight", "pairs") if getattr(source, key) is not None]
            if len(shares) != 1:
                raise ConfigError(f"data.sources.{name}: needs weight (its share) or pairs (how many in an epoch)")
            kinds.add(shares[0])
        if len(kinds) > 1:
            raise ConfigError(f"data.sources: give all of {', '.join(self.sources)} weight, or all of them pairs")

    def parts(self) -> dict[str, "DataConfig"]:
        """The options of each source by its name; "" is the name where there is no mixture."""
        whole = {key: getattr(self, key) for key in OF_WHOLE}
        return {name: replace(source.options, **whole) for name, source in self.sources.items()} or {"": self}

    def held_out_sets(self) -> dict[str, str | list[str]]:
        """What `eval` names, by the name of the set; "" is the name of one set alone."""
        if isinstance(self.eval, dict):
            return self.eval
        return {"": self.eval} if self.eval is not None else {}

    def named(self) -> list[str | list[str]]:
        """Everything that is named as a source of rows, held-out sets included."""
        return [
            source
            for part in {**self.parts(), "": self}.values()
            for source in (part.train, *part.held_out_sets().values())
            if source is not None
        ]

    def describe_train(self) -> str:
        """What is trained on, in words for messages."""
        if self.sources:
            return f"a mixture of {', '.join(self.sources)}"
        return self.train if isinstance(self.train, str) else ", ".join(self.train or ())

    def _check_mapping(self) -> None:
        """Whether columns and the values in them together say what a row is."""
        for name, column in self.columns.items():
            key = f"data.columns.{name}"
            _require(name in COLUMNS, key, column, f"columns are {', '.join(COLUMNS)}")
            _require(name in LISTS or not isinstance(column, list), key, column, "name one column")
        columns = {name: column for name, column in self.columns.items() if column}
        labels = [name for name in LABELS if name in columns]
        responses = columns.get("responses")
        for name in labels[1:]:
            why = f"data.columns.{labels[0]} says already which response is preferred; keep one of the two"
            _require(False, f"data.columns.{name}", columns[name], why)
        for name in ("preferred", "preference", "ranks"):
            why = "is about several responses; name them in data.columns.responses"
            _require(name not in columns or bool(responses), f"data.columns.{name}", columns.get(name), why)
        if responses:
            why = "data.columns.responses needs format=auto"
            _require(self.format in ("auto", "ranked"), "data.format", self.format, why)
            for name in ("chosen", "rejected", "probability"):
                why = "leave it out: data.columns.responses names the responses"
                _require(name not in columns, f"data.columns.{name}", columns.get(name), why)
        if isinstance(responses, list):
            why = "say which is preferred, with one of " + ", ".join(f"data.columns.{name}" for name in LABELS)
            _require(bool(labels), "data.columns.responses", responses, why)
            _require(len(responses) >= 2, "data.columns.responses", responses, "name two columns or more")
            for name in ("scores", "ranks"):
                label = columns.get(name)
                fits = not isinstance(label, list) or len(label) == len(responses)
                _require(fits, f"data.columns.{name}", label, f"name {len(responses)}, one for each response")
            fits = not self.preferred or len(self.preferred) == len(responses)
            _require(fits, "data.preferred", self.preferred, f"name {len(responses)} values, one for each response")
        for key, values in (("data.preferred", self.preferred), ("data.tied", self.tied)):
            _require(not values or "preferred" in columns, key, values, "needs data.columns.preferred, their column")
        different = len({*self.preferred, *self.tied}) == len(self.preferred) + len(self.tied)
        _require(different, "data.preferred", self.preferred, f"and data.tied={self.tied}: name each value once")
        for speaker, role in self.roles.items():
            # A config is stored under dotted keys.
            _require("." not in speaker, f"data.roles.{speaker}", role, "a speaker's name cannot hold a dot")


def _check_name(key: str, name: str) -> None:
    """FieldError for the name of a source or held-out set that could not stand behind a metric's name."""
    plain = re.fullmatch(r"[\w-]+", name, re.ASCII) is not None
    _require(plain, key, name, "a name has letters, digits, - and _ only: metrics carry it")
    _require(name not in METRIC_ENDINGS, key, name, "metrics have this name already; choose another")


@dataclass(config=STRICT, kw_only=True)
class SourceConfig:
    """A source of a mixture: its share, and its options of data."""

    weight: float | None = Field(gt=0, description="shares are relative to each other")
    pairs: int | None = Field(ge=1)
    options: DataConfig


@dataclass(config=STRICT, kw_only=True)
class OptimizerConfig:
    """How the trainable weights move."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "rmsprop", "sgd"]
    lr: float = Field(gt=0, description="5e-5 is usual with LoRA")
    weight_decay: float = Field(ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        min_length=2, max_length=2, description="must be two numbers in [0, 1), for instance [0.9,0.999]"
    )
    eps: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int = Field(ge=0)


@dataclass(config=STRICT, kw_only=True)
class LossConfig:
    """Which function of the log-ratios is minimised, and its options."""

    name: Literal[*LOSS_OPTIONS]  # type: ignore[valid-type]
    label_smoothing: float | None = Field(ge=0, lt=0.5, description="the share of labels taken to be wrong")
    temperature: float | None = Field(gt=0, description="0.05 is what the search found")
    sft_weight: float = Field(ge=0)

    def __post_init__(self) -> None:
        for option, value in self.options().items():
            users = ", ".join(name for name, options in LOSS_OPTIONS.items() if option in options)
            uses = option in LOSS_OPTIONS[self.name]
            # 0 is "none of it", which is what a loss without the option does.
            why = f"the loss {self.name} does not use it; it is an option of {users}"
            _require(uses or not value, f"loss.{option}", value, why)
            why = f"the loss {self.name} needs it; loss={self.name} chooses the loss together with its options"
            _require(not uses or value is not None, f"loss.{option}", value, why)
        _require(
            self.name != "exo_pair" or bool(self.label_smoothing),
            "loss.label_smoothing",
            self.label_smoothing,
            "must be above 0 for exo_pair, which compares with the smoothed label; 1e-3 is usual",
        )

    def options(self) -> dict[str, float | None]:
        """The options that losses may use, by name."""
        return {"label_smoothing": self.label_smoothing, "temperature": self.temperature}


@dataclass(config=STRICT, kw_only=True)
class LoraConfig:
    """The adapters: PEFT's names."""

    enabled: bool
    r: int = Field(ge=1)
    alpha: float = Field(gt=0, description="twice lora.r is usual")
    dropout: float = Field(ge=0, lt=1)
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = Field(
        description="must be all-linear or a list of module names, for instance [q_proj,v_proj]"
    )


@dataclass(config=STRICT, kw_only=True)
class ReferenceConfig:
    """Which weights the policy is held to."""

    name: Literal["frozen", "adapter_off"]
    cache: Literal["auto", "run", "off"] = Field(json_schema_extra=FREE)
    cache_gib: float | None = Field(gt=0, json_schema_extra=FREE)


@dataclass(config=STRICT, kw_only=True)
class EngineConfig:
    """What the run is computed on, and whether memory is traded for time."""

    name: Literal["single", "ddp", "fsdp"] = Field(json_schema_extra=LOUD)
    gradient_checkpointing: bool
    compile: bool
    processes: WholeOrAuto = Field(json_schema_extra=FREE, description=WHOLE_OR_AUTO)
    timeout: float = Field(gt=0, json_schema_extra=FREE)
    cpu_offload: bool = Field(json_schema_extra=FREE)

    def __post_init__(self) -> None:
        alone = self.name != "single" or self.processes in ("auto", 1)
        _require(
            alone, "engine.processes", self.processes, "engine=single is one process; choose engine=ddp or engine=fsdp"
        )
        _require(self.name == "fsdp" or not self.cpu_offload, "engine.cpu_offload", True, "needs engine=fsdp")


@dataclass(config=STRICT, kw_only=True)
class TensorboardConfig:
    """Curves for TensorBoard."""

    directory: Directory | None = Field(description=EMPTY)


@dataclass(config=STRICT, kw_only=True)
class WandbConfig:
    """Curves for Weights & Biases."""

    project: Text = Field(pattern=r"\S", description="name a project")
    entity: Text | None
    name: Text | None
    mode: Literal["auto", "online", "offline"]


@dataclass(config=STRICT, kw_only=True)
class TrackioConfig:
    """Curves for trackio."""

    project: Text = Field(pattern=r"\S", description="name a project")
    name: Text | None
    space_id: Text | None
    private: bool


@dataclass(config=STRICT, kw_only=True)
class TrackerConfig:
    """Where a run's metrics go besides metrics.jsonl; null is a tracker that is not used."""

    tensorboard: TensorboardConfig | None = None
    wandb: WandbConfig | None = None
    trackio: TrackioConfig | None = None


@dataclass(config=STRICT, kw_only=True)
class SamplesConfig:
    """Held-out prompts that policy and reference answer at each evaluation."""

    n: int = Field(ge=0, json_schema_extra=FREE)
    max_new_tokens: int = Field(ge=1, json_schema_extra=FREE)


@dataclass(config=STRICT, kw_only=True)
class EarlyStopConfig:
    """When a run ends because it no longer improves."""

    patience: int | None = Field(ge=1, json_schema_extra=LOUD)
    metric: Literal[*METRICS] = Field(json_schema_extra=LOUD)  # type: ignore[valid-type]


@dataclass(config=STRICT, kw_only=True)
class BudgetConfig:
    """How far the policy's answers may go from the reference's."""

    kl: float | None = Field(gt=0, json_schema_extra=LOUD, description="nats a response; 10 is usual")
    length: float | None = Field(
        ge=1, json_schema_extra=LOUD, description="times the reference's length, which is 1 at the start; 1.5 is usual"
    )


@dataclass(config=STRICT, kw_only=True)
class RunConfig:
    """One training run."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    lora: LoraConfig
    reference: ReferenceConfig
    engine: EngineConfig
    tracker: TrackerConfig | None = Field(json_schema_extra=FREE)
    objective: Literal[*OBJECTIVES]  # type: ignore[valid-type]
    beta: float = Field(gt=0, description="0.1 is usual, higher stays closer to the reference")
    seed: Seed
    batch_size: int = Field(ge=1)
    micro_batch_size: WholeOrAuto = Field(json_schema_extra=LOUD, description=WHOLE_OR_AUTO)
    layout: Layout
    epochs: int = Field(ge=1, json_schema_extra=LOUD)
    max_steps: int | None = Field(ge=1, json_schema_extra=LOUD)
    log_every: int = Field(ge=0, json_schema_extra=FREE)
    eval_every: int = Field(ge=0, json_schema_extra=FREE)
    save_every: int = Field(ge=0, json_schema_extra=FREE)
    keep_checkpoints: int = Field(ge=1, json_schema_extra=FREE)
    samples: SamplesConfig
    early_stop: EarlyStopConfig
    keep_best: bool = Field(json_schema_extra=LOUD)
    budget: BudgetConfig
    page: bool = Field(json_schema_extra=FREE)
    max_grad_norm: float = Field(gt=0, description="1.0 is usual")
    device: Text = Field(json_schema_extra=LOUD)
    output_dir: Directory | None = Field(json_schema_extra=FREE, description=EMPTY)
    resume: Directory | None = Field(json_schema_extra=FREE, description=EMPTY)
    replay: Directory | None = Field(json_schema_extra=FREE, description=EMPTY)
    monitor: Literal["warn", "stop", "off"] = Field(json_schema_extra=FREE)
    non_finite: Literal["abort", "skip"] = Field(json_schema_extra=FREE)
    deterministic: bool = Field(json_schema_extra=LOUD)
    dry_run: bool = Field(json_schema_extra=FREE)
    verify_resume: bool = Field(json_schema_extra=FREE)
    plan: bool = Field(json_schema_extra=FREE)
    gpu: Text | None = Field(
        pattern=r"^\s*0*[1-9]\d*(\.\d+)?\s*(GiB)?\s*$",
        json_schema_extra=FREE,
        description="must be the memory of one GPU, for instance 24GiB",
    )
    gpus: int | None = Field(ge=1, json_schema_extra=FREE)
    tflops: float | None = Field(gt=0, json_schema_extra=FREE)
    price: float | None = Field(ge=0, json_schema_extra=FREE)

    def __post_init__(self) -> None:
        for fixed in OBJECTIVES[self.objective].fixed:
            value = attrgetter(fixed.key)(self)
            written = (fixed.written or f"{fixed.key}={{}}").format(value)
            if value not in fixed.allowed:
                raise ConfigError(f"{written}: {fixed.reason}")
        alone = not self.verify_resume or (self.resume is None and not self.dry_run)
        _require(alone, "verify_resume", True, "trains some steps of its own; leave resume and dry_run out")
        self._check_plan()
        self._check_choosing()
        _require(
            self.engine.name != "fsdp" or "8bit" not in self.optimizer.name,
            "optimizer",
            self.optimizer.name,
            "its state cannot be sharded; with engine=fsdp choose optimizer=adamw",
        )
        _require(
            self.data.train is not None or bool(self.data.sources),
            "data.train",
            None,
            "name a file (.jsonl, .json, .parquet, .csv) or a hub data set, for instance data.train=pairs.jsonl",
        )
        _require(
            self.lora.enabled or self.model.quantization == "none",
            "model.quantization",
            self.model.quantization,
            "packed weights cannot train; choose a group of adapters such as lora=all_linear, or none",
        )
        _require(
            self.lora.enabled or self.reference.name == "frozen",
            "reference",
            self.reference.name,
            "needs an adapter to switch off; with lora=off choose reference=frozen",
        )

    def choosing(self) -> dict[str, Any]:
        """The keys that make the run choose what final/ is by its evaluations, with their values."""
        given = {
            "budget.kl": self.budget.kl,
            "budget.length": self.budget.length,
            "early_stop.patience": self.early_stop.patience,
            "keep_best": self.keep_best or None,
        }
        return {key: value for key, value in given.items() if value is not None}

    def to_the_end(self) -> "RunConfig":
        """The config of a run that goes to its last step, whatever its evaluations say."""
        never = EarlyStopConfig(patience=None, metric="loss")
        return replace(self, budget=BudgetConfig(kl=None, length=None), early_stop=never, keep_best=False)

    def _check_choosing(self) -> None:
        """Whether there are evaluations, and answers, by which what final/ is can be chosen."""
        for key, value in self.choosing().items():
            why = "is decided at evaluations; set the steps between two of them, for instance eval_every=50"
            _require(self.eval_every > 0, key, value, why)
            why = "is measured on generated answers; leave samples.n=0 out"
            _require(not key.startswith("budget.") or self.samples.n > 0, key, value, why)
        used = self.early_stop.patience is not None or self.keep_best or self.early_stop.metric == "loss"
        why = "decides with early_stop.patience or keep_best=true; set one of them"
        _require(used, "early_stop.metric", self.early_stop.metric, why)

    def _check_plan(self) -> None:
        """Whether what a plan is made for is given with plan=true, and nothing is to run besides."""
        for key in ("gpu", "gpus", "tflops", "price"):
            value = getattr(self, key)
            _require(self.plan or value is None, key, value, "is of plan=true; add it, or leave this out")
        nothing_runs = self.resume is None and not self.dry_run and not self.verify_resume
        _require(nothing_runs or not self.plan, "plan", True, "runs nothing; leave resume, dry_run, verify_resume out")
        why = f"a GPU is planned for, and device={self.device} is none; leave one of them out"
        _require(self.gpu is None or self.device.split(":")[0] in ("auto", "cuda"), "gpu", self.gpu, why)


@dataclass(config=STRICT, kw_only=True)
class EvalConfig:
    """One evaluation of a finished run, checkpoint, adapter or model."""

    checkpoint: Text | None
    data: DataConfig | None  # null: what the run held out
    reference_model: Text | None
    name: Text | None = Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$", description="must be a plain folder name")
    samples: int = Field(ge=0)
    max_new_tokens: int = Field(ge=1)
    kl_samples: int = Field(ge=0)
    scales: list[Annotated[float, Field(ge=0, le=1000)]] = Field(
        description="must be a list of numbers from 0 to 1000, such as [0,0.5,1]"
    )
    micro_batch_size: WholeOrAuto = Field(description=WHOLE_OR_AUTO)
    layout: Layout
    reference_cache: Literal["auto", "off"]
    harness: list[Text] = Field(description="must be a list of task names, for instance [ifeval,gsm8k]")
    harness_limit: int | None = Field(ge=1)
    harness_tasks: Text | None
    trust_remote_code: bool
    device: Text
    processes: WholeOrAuto = Field(description=WHOLE_OR_AUTO)
    output_dir: Text | None

    def __post_init__(self) -> None:
        rule = "name a run directory, a checkpoint, an adapter or a model, for instance checkpoint=outputs/..."
        _require(bool(self.checkpoint), "checkpoint", self.checkpoint, rule)
        for key in ("harness_limit", "harness_tasks"):
            needed = bool(self.harness) or getattr(self, key) is None
            _require(needed, key, getattr(self, key), "needs tasks, for instance harness=[ifeval,gsm8k]")
        # By !function and class, by Jinja templates, which lm_eval renders without a sandbox, and by metrics it loads.
        rule = "its YAML can run Python; read it, then add trust_remote_code=true"
        _require(self.harness_tasks is None or self.trust_remote_code, "harness_tasks", self.harness_tasks, rule)


@dataclass(config=STRICT, kw_only=True)
class GenerationConfig:
    """What holds wherever completions are generated for the prompts of a file."""

    prompts: Text | None
    template: Template | None
    temperature: float = Field(gt=0, description="1 is the model itself")
    top_p: float = Field(gt=0, le=1, description="1 leaves nothing out")
    max_new_tokens: int = Field(ge=1)
    max_prompt_length: int = Field(ge=1)
    limit: int | None = Field(ge=1)
    on_bad_row: OnBadRow
    seed: Seed
    batch_size: WholeOrAuto = Field(description=WHOLE_OR_AUTO)
    trust_remote_code: bool
    device: Text
    processes: WholeOrAuto = Field(description=WHOLE_OR_AUTO)
    output: Text | None


@dataclass(config=STRICT, kw_only=True)
class SampleConfig(GenerationConfig):
    """Completions of a model for a file of prompts."""

    model: ModelConfig
    checkpoint: Text | None
    n: int = Field(ge=1)

    def __post_init__(self) -> None:
        _require(bool(self.prompts), "prompts", self.prompts, PROMPTS_NEEDED)


@dataclass(config=STRICT, kw_only=True)
class LabelConfig:
    """Samples turned into preference pairs."""

    samples: Text | None
    by: Literal[*LABELLERS] | None  # type: ignore[valid-type]
    judge: Text | None
    rule: Text | None
    annotator: Text | None
    pairs: Literal["extremes", "all"]
    labels: Literal["best", "sampled"]
    seed: Seed
    prior: float = Field(ge=1e-3, le=1e9, description="must be from 0.001 to 1e9; 1 is one tie with an average answer")
    layout: Layout
    trust_remote_code: bool
    device: Text
    processes: WholeOrAuto = Field(description=WHOLE_OR_AUTO)
    output: Text | None

    def __post_init__(self) -> None:
        _require(bool(self.samples), "samples", self.samples, "name a file that dpo-sample wrote")
        _require(self.by is not None, "by", self.by, f"say who labels: {', '.join(LABELLERS)}")
        assert self.by is not None
        needed, what = LABELLERS[self.by]
        for key in ("judge", "rule", "annotator"):
            value = getattr(self, key)
            _require(value is None or key == needed, key, value, f"by={self.by} does not use it; leave it out")
            _require(bool(value) or key != needed, key, value, f"by={self.by} needs it: {what}")
        for key, usual in (("pairs", "all"), ("labels", "best")):
            why = "people are asked for all pairs, and their word is taken; leave it out with by=human"
            _require(self.by != "human" or getattr(self, key) == usual, key, getattr(self, key), why)


@dataclass(config=STRICT, kw_only=True)
class RankConfig(GenerationConfig):
    """Players ranked by who beat whom: from a file of games, or checkpoints that answer prompts before a judge."""

    games: Text | None
    checkpoints: list[Text] | None
    judge: Text | None
    prior: float = Field(ge=0)

    def __post_init__(self) -> None:
        one = (self.games is None) != (self.checkpoints is None)
        _require(one, "games", self.games, "give games=FILE, or checkpoints=[a,b,c] judge=... prompts=FILE")
        if self.checkpoints is None:
            for key in ("judge", "prompts"):
                value = getattr(self, key)
                _require(value is None, key, value, "games=FILE holds the results already; leave it out")
            return
        names = self.checkpoints
        _require(len(names) >= 2, "checkpoints", names, "must be two or more, for instance checkpoints=[runs/a,runs/b]")
        _require(len(set(names)) == len(names), "checkpoints", names, "name each once")
        _require(bool(self.judge), "judge", self.judge, "name a reward model's run, a DPO run, or a rule")
        _require(bool(self.prompts), "prompts", self.prompts, PROMPTS_NEEDED)


@dataclass(config=STRICT, kw_only=True)
class ExamineConfig:
    """Preference data examined before it is trained on."""

    model: ModelConfig
    data: DataConfig
    sample: int | None = Field(ge=1)
    show: int = Field(ge=0)
    score: int | None = Field(ge=1)
    fix: Text | None = Field(pattern=r"\S", description="is empty; leave it out, or name a file")
    cache: Literal["show", "clear"] | None
    run: Text | None = Field(pattern=r"\S", description="is empty; leave it out, or name a run directory")
    folds: int = Field(ge=2, le=20)
    seed: Seed
    device: Text
    output_dir: Directory | None = Field(description=EMPTY)

    def __post_init__(self) -> None:
        rule = "name a file (.jsonl, .json, .parquet, .csv) or a hub data set, for instance data.train=pairs.jsonl"
        others = self.cache is not None or self.run is not None
        _require(self.data.train is not None or bool(self.data.sources) or others, "data.train", None, rule)


@dataclass(config=STRICT, kw_only=True)
class CompareConfig:
    """Models compared on the pairs that all of them were evaluated on."""

    models: list[Text] | None
    data: DataConfig | None  # null: what each run held out
    reference_model: Text | None
    name: Text | None = Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$", description="must be a plain folder name")
    kl_samples: int = Field(ge=0)
    layout: Layout
    trust_remote_code: bool
    device: Text
    output_dir: Directory | None = Field(description=EMPTY)

    def __post_init__(self) -> None:
        rule = (
            "name two or more runs, checkpoints or reports, or the folder of a sweep: dpo-compare outputs/a outputs/b"
        )
        _require(bool(self.models), "models", self.models, rule)


@dataclass(config=STRICT, kw_only=True)
class ExportConfig:
    """A trained model as a folder for other programs, or on the hub."""

    checkpoint: Text | None
    to: Directory | None = Field(description=EMPTY)
    what: Literal["merged", "adapter"]
    scale: float = Field(ge=-1000, le=1000)
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    max_shard_size: Text = Field(
        pattern=r"^[1-9]\d*(\.\d+)?(KB|MB|GB|TB)$", description="must be a size, for instance 5GB or 500MB"
    )
    check: int = Field(ge=1)
    yes: bool
    private: bool
    trust_remote_code: bool
    device: Text

    def __post_init__(self) -> None:
        rule = "name a run directory, a checkpoint, an adapter or a model, for instance checkpoint=outputs/..."
        _require(bool(self.checkpoint), "checkpoint", self.checkpoint, rule)
        assert self.checkpoint is not None
        _require(self.to is not None, "to", self.to, "name a new folder, or hub:owner/name")
        assert self.to is not None
        on_hub = self.to.startswith("hub:")
        named = re.fullmatch(r"hub:[\w-][\w.-]*/[\w-][\w.-]*", self.to)
        _require(not on_hub or named is not None, "to", self.to, "must be hub:owner/name")
        of_adapter = "an adapter keeps the dtype it is stored in; leave it out with what=adapter"
        _require(self.what == "merged" or self.dtype == "auto", "dtype", self.dtype, of_adapter)
        for key, usual in (("yes", False), ("private", True)):
            value = getattr(self, key)
            _require(on_hub or value is usual, key, value, "is for to=hub:owner/name; leave it out")


# The config of each command; conf/ has a file of that name with the defaults.
SCHEMAS = {
    "train": RunConfig,
    "eval": EvalConfig,
    "sample": SampleConfig,
    "label": LabelConfig,
    "rank": RankConfig,
    "data": ExamineConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
}


# Keys: their tree, and what a key that does not exist was meant to be


def schema_fields(schema: type) -> dict[str, FieldInfo]:
    """The fields of a schema by name, with their rules."""
    fields: dict[str, FieldInfo] = schema.__pydantic_fields__  # type: ignore[attr-defined]
    return fields


def group_of(annotation: Any) -> type | None:
    """The schema of a group of keys, or None for a key that holds a value."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((part for part in parts if isinstance(part, type) and is_pydantic_dataclass(part)), None)


def walk(schema: type, prefix: str = "", marks: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any, Any]]:
    """Every key as a dotted path, groups included, with its field and its marks (a group's hold for its keys)."""
    for name, field in schema_fields(schema).items():
        own = field.json_schema_extra or marks or {}
        yield prefix + name, field, own
        group = group_of(field.annotation)
        if group is not None:
            yield from walk(group, f"{prefix}{name}.", own)  # type: ignore[arg-type]


def schema_keys(schema: type) -> list[str]:
    """Every key of a schema as a dotted path, groups included."""
    return [key for key, _, _ in walk(schema)]


FREE_KEYS = tuple(key for key, _, marks in walk(RunConfig) if marks == FREE)
LOUD_KEYS = tuple(key for key, _, marks in walk(RunConfig) if marks == LOUD)


def free_keys(config: RunConfig) -> tuple[str, ...]:
    """What a resumed run or a replay may change without a word: nothing that decides which step final/ holds."""
    return tuple(key for key in FREE_KEYS if not (config.choosing() and key in OF_CHOOSING))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice closest to a word, or nothing."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def suggest_key(key: str, schema: type, value: str | None = None) -> str:
    """What to write instead of a key that the schema lacks.

    `; here it is optimizer.lr=1e-5` for a key of another trainer with that value, else `; did you mean 'optimizer.lr'?`
    by the key's last word, then by likeness.
    """
    keys = schema_keys(schema)
    group, _, leaf = key.rpartition(".")
    if found := answer(key, value, keys) or (answer(leaf, value, keys) if leaf not in _leaves(keys) else None):
        return f"; {found}"
    # Candidates in order: the same word elsewhere, a like word in the same group, a like word anywhere.
    by_leaf = _leaves(keys)
    beside = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == group}
    anywhere = {**by_leaf, **{word: known for word, known in WORDS.items() if isinstance(known, str) and known in keys}}
    for candidates, cutoff in ((by_leaf, 1.0), (beside, 0.6), (anywhere, 0.6)):
        close = difflib.get_close_matches(leaf, [*candidates], n=1, cutoff=cutoff)
        if close:
            return f"; did you mean '{candidates[close[0]]}'?"
    return ""


def _leaves(keys: list[str]) -> dict[str, str]:
    """The first key with each last word."""
    return {known.rpartition(".")[2]: known for known in reversed(keys)}


def unknown_keys(container: Mapping[str, Any], schema: type, prefix: str = "") -> list[str]:
    """The dotted paths in a container that the schema does not have."""
    fields = schema_fields(schema)
    found: list[str] = []
    for key, value in container.items():
        if key not in fields:
            found.append(f"{prefix}{key}")
        elif isinstance(value, dict) and (group := group_of(fields[key].annotation)) is not None:
            found += unknown_keys(value, group, f"{prefix}{key}.")
    return found


# From a plain container to a checked config, and back


def config_of(container: Mapping[str, Any], schema: type[Config]) -> Config:
    """A plain container as a checked config of that schema; ConfigError names the first thing that does not fit."""
    unknown = unknown_keys(container, schema)
    if unknown:
        raise ConfigError(f"unknown key '{unknown[0]}'{suggest_key(unknown[0], schema)}")
    return _build(container, schema, "")


def _build(container: Mapping[str, Any], schema: type[Config], prefix: str) -> Config:
    values = dict(container)
    for name, field in schema_fields(schema).items():
        group = group_of(field.annotation)
        if group is not None and isinstance(values.get(name), dict):
            values[name] = _build(values[name], group, f"{prefix}{name}.")
    if schema is DataConfig and values.get("sources"):
        values["sources"] = _sources(values, f"{prefix}sources")
    try:
        return schema(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, inside = str(first["loc"][0]), len(first["loc"]) > 1
        key = prefix + name
        if first["type"] == "missing":
            made = re.fullmatch(r"(\w+)\.(\w+)\.", prefix)  # tracker.wandb. where that choice was not made
            how = "give it one on the command line or in its YAML file"
            how = f"choose {made[1]}={made[2]} with it" if made else how
            raise ConfigError(f"{key} has no value; {how}") from None
        rule = _rule(first, schema_fields(schema)[name], inside)
        raise FieldError(key, container[name], rule) from None


def _sources(data: Mapping[str, Any], key: str) -> dict[str, SourceConfig]:
    """The sources of a mixture, each checked with the options that hold for the whole."""
    if not isinstance(data["sources"], dict):
        raise FieldError(key, data["sources"], "must be names with weights, for instance {hh: 0.3, tulu3: 0.7}")
    whole = {name: value for name, value in data.items() if name not in MIXTURE} | {"train": None, "eval": None}
    own = [name for name in whole if name not in OF_WHOLE]
    built = {}
    for name, given in data["sources"].items():
        place = f"{key}.{name}"
        _check_name(place, str(name))
        if isinstance(given, SourceConfig):
            built[str(name)] = given
            continue
        _require(isinstance(given, dict), place, given, "must be options, for instance {train: pairs.jsonl, weight: 1}")
        for option, value in given.items():
            _require(option not in (*OF_WHOLE, *MIXTURE), f"{place}.{option}", value,
                     f"holds for all sources; set data.{option}")  # fmt: skip
            if option not in (*own, "weight", "pairs"):
                raise ConfigError(f"unknown key '{place}.{option}'{did_you_mean(str(option), whole)}")
        options = {option: value for option, value in given.items() if option in own}
        try:
            of_source = _build({**whole, **options, "sources": {}, "stop": "first"}, DataConfig, "data.")
        except FieldError as error:
            raise FieldError(f"{place}.{error.key.removeprefix('data.')}", error.value, error.rule) from None
        _require(of_source.train is not None, f"{place}.train", None, "name files or a hub data set")
        one = not isinstance(of_source.eval, dict)
        _require(one, f"{place}.eval", of_source.eval, "is one set; name others in data.eval")
        share = {name: given.get(name) for name in ("weight", "pairs")}
        built[str(name)] = _build({**share, "options": of_source}, SourceConfig, f"{place}.")
    return built


def _rule(error: Mapping[str, Any], field: FieldInfo, inside: bool) -> str:
    """What a value must be, in words: from the kind of error, and the rules and the hint of its field."""
    kind, hint = error["type"], field.description or ""
    if inside and hint:
        return hint
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        quoted = "; in YAML write 'off' in quotes" if error["input"] is False and "off" in choices else ""
        return f"choose one of {', '.join(choices)}{did_you_mean(str(error['input']), choices)}{quoted}"
    if kind == "finite_number":
        return "must be a finite number"
    bounds = {name: value for rule in field.metadata for name, value in _bounds(rule).items()}
    if kind not in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return hint if kind.startswith(("string_pattern", "too_")) else f"must be {_type_in_words(field.annotation)}"
    if hint.startswith("must"):
        return hint
    low, high = bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le"))
    if high is None:
        rule = f"must be {'above' if 'gt' in bounds else 'at least'} {low:g}"
    else:
        rule = f"must be in {'(' if 'gt' in bounds else '['}{low:g}, {high:g}{')' if 'lt' in bounds else ']'}"
    return f"{rule}; {hint}" if hint else rule


def _bounds(rule: Any) -> dict[str, float]:
    return {name: getattr(rule, name) for name in ("gt", "ge", "lt", "le") if hasattr(rule, name)}


def _type_in_words(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_in_words(get_args(annotation)[0])
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    if parts:
        return " or ".join("null" if part is type(None) else _type_in_words(part) for part in parts)
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return words.get(annotation) or ("a list" if get_origin(annotation) is list else "a group of keys")


def run_config(container: Mapping[str, Any]) -> RunConfig:
    """A plain container as a checked `RunConfig`."""
    return config_of(container, RunConfig)


def data_config(container: Mapping[str, Any]) -> DataConfig:
    """The data part alone, for an evaluation on other data."""
    return _build(container, DataConfig, "data.")


def to_container(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, ready for YAML or JSON."""
    container: dict[str, Any] = asdict(config)
    for source in (container.get("data") or {}).get("sources", {}).values():
        options = source.pop("options")
        source |= {key: value for key, value in options.items() if key not in (*OF_WHOLE, *MIXTURE)}
    return container


def public_container(config: Any) -> dict[str, Any]:
    """The config as plain data in which every secret is redacted: what may be written and shown."""
    container: dict[str, Any] = without_secrets(to_container(config))
    return container


def tracker_options(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The options of each tracker that is used, by its name."""
    chosen = asdict(config.tracker) if config.tracker is not None else {}
    return {name: options for name, options in chosen.items() if options is not None}


def config_text(config: Any) -> str:
    """config.yaml: the version of its keys, then data only: no interpolation, no target, no secret."""
    container = {"version": VERSION, **public_container(config)}
    return yaml.safe_dump(container, sort_keys=False, allow_unicode=True)


def read_config(path: Path) -> RunConfig:
    """The config of an earlier run, of this version or an older one, read as data: nothing in it runs or resolves.

    CheckpointError where the file is missing, is not such a config, or is of a newer version.
    """
    container = read_stored(path)
    try:
        return run_config(container)
    except ConfigError as error:
        raise CheckpointError(f"{safe_text(path)}: {safe_text(error)}") from None
