"""The schema behind conf/: what every dial means, and what it may be.

YAML holds the values, these dataclasses hold the meaning. The numbers live in conf/, once; here are types and
rules, so each field is MISSING until a config is composed. `config_of` turns a plain container
(composed by Hydra, or read from a checkpoint with a safe YAML loader) into the dataclass or says in one line what
does not fit. Nothing here imports torch, so that a typo is answered at once.
"""

import difflib
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Type, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_cli.console.text import safe_text, without_secrets
from dpo_cli.errors import CheckpointError, ConfigError

Config = TypeVar("Config")

OBJECTIVES = ("dpo", "reward")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEMPLATES = ("chat", "plain")
FORMAT_NAMES = ("auto", "hh", "standard", "messages", "ranked")
OPTIMIZER_NAMES = ("adamw", "rmsprop", "sgd")
SCHEDULE_NAMES = ("constant", "linear", "cosine")
# The losses and the dials each of them uses; a test compares them with the functions in theory/losses.py.
LOSS_DIALS = {
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
REFERENCE_NAMES = ("frozen", "adapter_off")
ENGINE_NAMES = ("single",)
# Who labels samples, and what each needs.
LABELLERS = {
    "human": "annotator=NAME, under which the judgements are kept",
    "reward": "judge=RUN, a run of dpo-train objective=reward",
    "implicit": "judge=RUN, a run or adapter of dpo-train",
    "rule": "rule=NAME, for instance rule=shorter",
}
CACHE_MODES = ("auto", "run", "off")
BATCHINGS = ("auto", "packed", "padded")
RADAR_MODES = ("warn", "stop", "off")
NON_FINITE_MODES = ("abort", "skip")
# Keys that a resumed run may change: what is shown, kept or checked, and what is done where a run would end.
FREE_KEYS = (
    "log_every", "eval_every", "save_every", "keep_checkpoints", "output_dir", "resume", "radar", "dry_run",
    "verify_resume", "replay", "non_finite", "reference.cache",
)  # fmt: skip
# Keys that a resumed run may change, and is told so: the end of the run, and with it the schedule, or its roundings.
LOUD_KEYS = ("max_steps", "epochs", "micro_batch_size", "device", "deterministic")
PROMPTS_NEEDED = "name a file of prompts, for instance prompts=prompts.jsonl"
MAX_CONFIG_BYTES = 2**20
MAX_CONFIG_DEPTH = 10


def did_you_mean(word: str, choices: List[str]) -> str:
    """`; did you mean 'x'?` for the choice closest to a word, or nothing."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={_show(value)}: {rule}")


def _one_of(key: str, value: str, choices: "tuple[str, ...]") -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}{did_you_mean(value, [*choices])}")


def _at_least(key: str, value: Any, least: float) -> None:
    _require(value is None or value >= least, key, value, f"must be at least {least:g}")


def _finite(key: str, value: float) -> None:
    _require(math.isfinite(value), key, value, "must be a finite number")


@dataclass
class ModelConfig:
    """The SFT model: the start of the policy, and the reference."""

    name_or_path: str = MISSING
    revision: Optional[str] = MISSING
    dtype: str = MISSING
    adapter: Optional[str] = MISSING
    trust_remote_code: bool = MISSING

    def __post_init__(self) -> None:
        _require(bool(self.name_or_path.strip()), "model.name_or_path", self.name_or_path, "name a model")
        _one_of("model.dtype", self.dtype, DTYPES)


@dataclass
class DataConfig:
    """Preference pairs: where they are, how rows become pairs, how pairs become tokens."""

    train: Optional[str] = MISSING
    eval: Optional[str] = MISSING
    subset: Optional[str] = MISSING
    train_split: str = MISSING
    eval_split: Optional[str] = MISSING
    eval_fraction: float = MISSING
    format: str = MISSING
    columns: Dict[str, str] = MISSING
    template: Optional[str] = MISSING
    max_length: int = MISSING
    max_prompt_length: Optional[int] = MISSING
    limit: Optional[int] = MISSING
    eval_limit: Optional[int] = MISSING
    shuffle: bool = MISSING
    on_bad_row: str = MISSING

    def __post_init__(self) -> None:
        _require(
            0 <= self.eval_fraction < 1,
            "data.eval_fraction",
            self.eval_fraction,
            "must be in [0, 1), 0.1 is usual",
        )
        _one_of("data.format", self.format, FORMAT_NAMES)
        for name in self.columns:
            known = ["prompt", "chosen", "rejected", "responses", "scores"]
            _require(name in known, f"data.columns.{name}", self.columns[name], f"columns are {', '.join(known)}")
        if self.template is not None:
            _one_of("data.template", self.template, TEMPLATES)
        _at_least("data.max_length", self.max_length, 2)
        _at_least("data.max_prompt_length", self.max_prompt_length, 1)
        _require(
            self.max_prompt_length is None or self.max_prompt_length < self.max_length,
            "data.max_prompt_length",
            self.max_prompt_length,
            f"must be below data.max_length={self.max_length}, or no response fits",
        )
        _at_least("data.limit", self.limit, 1)
        _at_least("data.eval_limit", self.eval_limit, 1)
        _one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))


@dataclass
class OptimizerConfig:
    """How the trainable weights move."""

    name: str = MISSING
    lr: float = MISSING
    weight_decay: float = MISSING
    betas: List[float] = MISSING
    eps: float = MISSING
    schedule: str = MISSING
    warmup_steps: int = MISSING

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, OPTIMIZER_NAMES)
        _finite("optimizer.lr", self.lr)
        _require(self.lr > 0, "optimizer.lr", self.lr, "must be above 0; 5e-5 is usual with LoRA")
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            self.betas,
            "must be two numbers in [0, 1), for instance [0.9,0.999]",
        )
        _require(self.eps > 0, "optimizer.eps", self.eps, "must be above 0")
        _one_of("optimizer.schedule", self.schedule, SCHEDULE_NAMES)
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)


@dataclass
class LossConfig:
    """Which function of the log-ratios is minimised, and its dials."""

    name: str = MISSING
    label_smoothing: Optional[float] = MISSING
    temperature: Optional[float] = MISSING
    sft_weight: float = MISSING

    def __post_init__(self) -> None:
        _one_of("loss.name", self.name, tuple(LOSS_DIALS))
        for dial in ("label_smoothing", "temperature"):
            value = getattr(self, dial)
            users = ", ".join(name for name, dials in LOSS_DIALS.items() if dial in dials)
            # 0 is "none of it", which is what a loss without the dial does.
            _require(
                dial in LOSS_DIALS[self.name] or not value,
                f"loss.{dial}",
                value,
                f"the loss {self.name} does not use it; it is a dial of {users}",
            )
            _require(
                dial not in LOSS_DIALS[self.name] or value is not None,
                f"loss.{dial}",
                value,
                f"the loss {self.name} needs it; loss={self.name} chooses the loss together with its dials",
            )
        _require(
            0 <= (self.label_smoothing or 0) < 0.5,
            "loss.label_smoothing",
            self.label_smoothing,
            "must be in [0, 0.5): the share of labels taken to be wrong",
        )
        _require(
            self.name != "exo_pair" or bool(self.label_smoothing),
            "loss.label_smoothing",
            self.label_smoothing,
            "must be above 0 for exo_pair, which compares with the smoothed label; 1e-3 is usual",
        )
        _require(
            self.name != "discopop" or (self.temperature or 0) > 0,
            "loss.temperature",
            self.temperature,
            "must be above 0; 0.05 is what the search found",
        )
        _finite("loss.sft_weight", self.sft_weight)
        _at_least("loss.sft_weight", self.sft_weight, 0)

    def options(self) -> Dict[str, Optional[float]]:
        """The hyperparameters that losses may use, by name."""
        return {"label_smoothing": self.label_smoothing, "temperature": self.temperature}


@dataclass
class LoraConfig:
    """The adapters: PEFT's names."""

    enabled: bool = MISSING
    r: int = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    target_modules: Any = MISSING  # "all-linear" or a list of module names: OmegaConf has no such union

    def __post_init__(self) -> None:
        _at_least("lora.r", self.r, 1)
        _finite("lora.alpha", self.alpha)
        _require(self.alpha > 0, "lora.alpha", self.alpha, "must be above 0; twice lora.r is usual")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "must be in [0, 1)")
        names = self.target_modules
        as_list = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
        _require(
            names == "all-linear" or as_list,
            "lora.target_modules",
            names,
            "must be all-linear or a list of module names, for instance [q_proj,v_proj]",
        )


@dataclass
class ReferenceConfig:
    """Which weights the policy is held to."""

    name: str = MISSING
    cache: str = MISSING

    def __post_init__(self) -> None:
        _one_of("reference.name", self.name, REFERENCE_NAMES)
        _one_of("reference.cache", self.cache, CACHE_MODES)


@dataclass
class EngineConfig:
    """What the run is computed on, and how thriftily."""

    name: str = MISSING
    gradient_checkpointing: bool = MISSING
    compile: bool = MISSING

    def __post_init__(self) -> None:
        _one_of("engine.name", self.name, ENGINE_NAMES)


def _check_whole_or_auto(key: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(value == "auto" or (whole and value >= 1), key, value, "must be auto or at least 1")


@dataclass
class RunConfig:
    """One training run."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    loss: LossConfig = MISSING
    lora: LoraConfig = MISSING
    reference: ReferenceConfig = MISSING
    engine: EngineConfig = MISSING
    objective: str = MISSING
    beta: float = MISSING
    seed: int = MISSING
    batch_size: int = MISSING
    micro_batch_size: Any = MISSING
    batching: str = MISSING
    epochs: int = MISSING
    max_steps: Optional[int] = MISSING
    log_every: int = MISSING
    eval_every: int = MISSING
    save_every: int = MISSING
    keep_checkpoints: int = MISSING
    max_grad_norm: float = MISSING
    device: str = MISSING
    output_dir: Optional[str] = MISSING
    resume: Optional[str] = MISSING
    replay: Optional[str] = MISSING
    radar: str = MISSING
    non_finite: str = MISSING
    deterministic: bool = MISSING
    dry_run: bool = MISSING
    verify_resume: bool = MISSING

    def __post_init__(self) -> None:
        _one_of("radar", self.radar, RADAR_MODES)
        _one_of("non_finite", self.non_finite, NON_FINITE_MODES)
        for key in ("output_dir", "resume", "replay"):
            value = getattr(self, key)
            _require(value is None or bool(value.strip()), key, value, "is empty; leave it out, or name a directory")
        alone = not self.verify_resume or (self.resume is None and not self.dry_run)
        _require(alone, "verify_resume", True, "trains some steps of its own; leave resume and dry_run out")
        _one_of("objective", self.objective, OBJECTIVES)
        if self.objective == "reward":
            self._check_reward()
        _finite("beta", self.beta)
        _require(
            self.beta > 0,
            "beta",
            self.beta,
            "must be above 0; 0.1 is usual, higher stays closer to the reference",
        )
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be a whole number from 0 to 2**63 - 1")
        _at_least("batch_size", self.batch_size, 1)
        _check_whole_or_auto("micro_batch_size", self.micro_batch_size)
        _one_of("batching", self.batching, BATCHINGS)
        _at_least("epochs", self.epochs, 1)
        _at_least("max_steps", self.max_steps, 1)
        for key in ("log_every", "eval_every", "save_every"):
            _at_least(key, getattr(self, key), 0)
        _at_least("keep_checkpoints", self.keep_checkpoints, 1)
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "must be above 0; 1.0 is usual")
        _require(
            self.data.train is not None,
            "data.train",
            None,
            "name a file (.jsonl, .json, .parquet, .csv) or a hub data set, for instance data.train=pairs.jsonl",
        )
        _require(
            self.lora.enabled or self.reference.name == "frozen",
            "reference",
            self.reference.name,
            "needs an adapter to switch off; with lora=off choose reference=frozen",
        )

    def _check_reward(self) -> None:
        """A reward model is adapters and a head under the Bradley-Terry loss, with nothing to be held to."""
        why = "a reward model (objective=reward) is held to no reference; leave it out"
        _require(self.beta == 1, "beta", self.beta, why)
        _require(self.loss.name == "sigmoid", "loss", self.loss.name, "a reward model has the sigmoid loss")
        _require(self.radar != "stop", "radar", self.radar, "of a reward model no alarm means ruin; choose warn or off")
        _require(not self.loss.sft_weight, "loss.sft_weight", self.loss.sft_weight, "a reward model gives no answers")
        _require(self.lora.enabled, "lora", "off", "a reward model trains adapters and a head; choose a LoRA")


@dataclass
class EvalConfig:
    """One evaluation of a finished run, checkpoint, adapter or model."""

    checkpoint: Optional[str] = MISSING
    data: Any = MISSING  # null: what the run held out; else the content of a DataConfig
    reference_model: Optional[str] = MISSING
    name: Optional[str] = MISSING
    samples: int = MISSING
    max_new_tokens: int = MISSING
    micro_batch_size: Any = MISSING
    batching: str = MISSING
    reference_cache: str = MISSING
    trust_remote_code: bool = MISSING
    device: str = MISSING
    output_dir: Optional[str] = MISSING

    def __post_init__(self) -> None:
        _require(
            bool(self.checkpoint),
            "checkpoint",
            self.checkpoint,
            "name a run directory, a checkpoint, an adapter or a model, for instance checkpoint=outputs/...",
        )
        _at_least("samples", self.samples, 0)
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _check_whole_or_auto("micro_batch_size", self.micro_batch_size)
        _one_of("batching", self.batching, BATCHINGS)
        _one_of("reference_cache", self.reference_cache, ("auto", "off"))
        allowed = self.name is None or (bool(self.name) and not set(self.name) & set("/\\\0") and self.name[0] != ".")
        _require(allowed, "name", self.name, "must be a plain folder name")


@dataclass
class DrawingConfig:
    """What holds wherever answers are drawn to the prompts of a file."""

    prompts: Optional[str] = MISSING
    template: Optional[str] = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    max_new_tokens: int = MISSING
    max_prompt_length: int = MISSING
    limit: Optional[int] = MISSING
    on_bad_row: str = MISSING
    seed: int = MISSING
    batch_size: Any = MISSING
    trust_remote_code: bool = MISSING
    device: str = MISSING
    output: Optional[str] = MISSING

    def __post_init__(self) -> None:
        if self.template is not None:
            _one_of("template", self.template, TEMPLATES)
        _finite("temperature", self.temperature)
        _require(self.temperature > 0, "temperature", self.temperature, "must be above 0; 1 is the model itself")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]; 1 leaves nothing out")
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _at_least("max_prompt_length", self.max_prompt_length, 1)
        _at_least("limit", self.limit, 1)
        _one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be a whole number from 0 to 2**63 - 1")
        _check_whole_or_auto("batch_size", self.batch_size)


@dataclass
class SampleConfig(DrawingConfig):
    """Answers drawn from a model to a file of prompts."""

    model: ModelConfig = MISSING
    checkpoint: Optional[str] = MISSING
    n: int = MISSING

    def __post_init__(self) -> None:
        _require(bool(self.prompts), "prompts", self.prompts, PROMPTS_NEEDED)
        _at_least("n", self.n, 1)
        super().__post_init__()


@dataclass
class LabelConfig:
    """Samples turned into preference pairs."""

    samples: Optional[str] = MISSING
    by: Optional[str] = MISSING
    judge: Optional[str] = MISSING
    rule: Optional[str] = MISSING
    annotator: Optional[str] = MISSING
    pairs: str = MISSING
    labels: str = MISSING
    seed: int = MISSING
    prior: float = MISSING
    batching: str = MISSING
    trust_remote_code: bool = MISSING
    device: str = MISSING
    output: Optional[str] = MISSING

    def __post_init__(self) -> None:
        _require(bool(self.samples), "samples", self.samples, "name a file that dpo-sample wrote")
        _require(bool(self.by), "by", self.by, f"say who labels: {', '.join(LABELLERS)}")
        assert self.by is not None
        _one_of("by", self.by, tuple(LABELLERS))
        for key, users in (("judge", ("reward", "implicit")), ("rule", ("rule",)), ("annotator", ("human",))):
            value = getattr(self, key)
            _require(value is None or self.by in users, key, value, f"by={self.by} does not use it; leave it out")
            _require(bool(value) or self.by not in users, key, value, f"by={self.by} needs it: {LABELLERS[self.by]}")
        _one_of("pairs", self.pairs, ("extremes", "all"))
        _one_of("labels", self.labels, ("best", "drawn"))
        _require(
            self.by != "human" or (self.pairs, self.labels) == ("all", "best"),
            "pairs" if self.pairs != "all" else "labels",
            self.pairs if self.pairs != "all" else self.labels,
            "people are asked for all pairs, and their word is taken; leave it out with by=human",
        )
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be a whole number from 0 to 2**63 - 1")
        _finite("prior", self.prior)
        bounded = 1e-3 <= self.prior <= 1e9
        _require(bounded, "prior", self.prior, "must be from 0.001 to 1e9; 1 is one drawn game with an average answer")
        _one_of("batching", self.batching, BATCHINGS)


@dataclass
class RankConfig(DrawingConfig):
    """Players ranked by who beat whom: from a file of games, or checkpoints that answer prompts before a judge."""

    games: Optional[str] = MISSING
    checkpoints: Optional[List[str]] = MISSING
    judge: Optional[str] = MISSING
    prior: float = MISSING

    def __post_init__(self) -> None:
        one = (self.games is None) != (self.checkpoints is None)
        _require(one, "games", self.games, "give games=FILE, or checkpoints=[a,b,c] judge=... prompts=FILE")
        _finite("prior", self.prior)
        _at_least("prior", self.prior, 0)
        super().__post_init__()
        if self.games is not None:
            for key in ("judge", "prompts"):
                value = getattr(self, key)
                _require(value is None, key, value, "games=FILE holds the results already; leave it out")
            return
        assert self.checkpoints is not None
        names = self.checkpoints
        _require(len(names) >= 2, "checkpoints", names, "must be two or more, for instance checkpoints=[runs/a,runs/b]")
        _require(len(set(names)) == len(names), "checkpoints", names, "name each once")
        _require(bool(self.judge), "judge", self.judge, "name a reward model's run, a DPO run, or a rule")
        _require(bool(self.prompts), "prompts", self.prompts, PROMPTS_NEEDED)


@dataclass
class EvalSchema(EvalConfig):
    """The keys dpo-eval knows: those of EvalConfig, and a data group's where one is chosen."""

    data: DataConfig = MISSING


def schema_keys(schema: type, prefix: str = "") -> List[str]:
    """Every key of a schema as a dotted path, groups included."""
    keys: List[str] = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(hints[field.name]):
            keys += schema_keys(hints[field.name], f"{prefix}{field.name}.")
    return keys


# Names that users of other trainers bring along.
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "loss_type": "loss.name",
    "model_name_or_path": "model.name_or_path",
    "dataset_name": "data.train",
    "gradient_checkpointing": "engine.gradient_checkpointing",
    "lr_scheduler_type": "optimizer.schedule",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
}


def suggest_key(key: str, schema: type) -> str:
    """`; did you mean 'optimizer.lr'?` for a key that the schema lacks: by its last word, then by likeness."""
    keys = schema_keys(schema)
    group, _, leaf = key.rpartition(".")
    # Candidates in order: the same word elsewhere, a like word in the same group, a like word anywhere.
    by_leaf = {known.rpartition(".")[2]: known for known in reversed(keys)}
    beside = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == group}
    anywhere = {**by_leaf, **{name: known for name, known in OTHER_NAMES.items() if known in keys}}
    for candidates, cutoff in ((by_leaf, 1.0), (beside, 0.6), (anywhere, 0.6)):
        close = difflib.get_close_matches(leaf, [*candidates], n=1, cutoff=cutoff)
        if close:
            return f"; did you mean '{candidates[close[0]]}'?"
    return ""


def unknown_keys(container: Dict[str, Any], schema: type, prefix: str = "") -> List[str]:
    """The dotted paths in a container that the schema does not have."""
    hints = get_type_hints(schema)
    found: List[str] = []
    for key, value in container.items():
        if key not in hints:
            found.append(f"{prefix}{key}")
        elif is_dataclass(hints[key]) and isinstance(value, dict):
            found += unknown_keys(value, hints[key], f"{prefix}{key}.")
    return found


def _type_in_words(key: str, schema: type) -> str:
    hint: Any = schema
    for part in key.split("."):
        hint = get_type_hints(hint).get(part) if is_dataclass(hint) else None
    optional = type(None) in get_args(hint)
    base = next((arg for arg in get_args(hint) if arg is not type(None)), hint) if optional else hint
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    name = words.get(base, "a list" if "List" in str(base) else "a group of keys")
    return f"{name} or null" if optional else name


def config_of(container: Dict[str, Any], schema: Type[Config]) -> Config:
    """A plain container as a checked config of that schema; ConfigError names the first thing that does not fit."""
    unknown = unknown_keys(container, schema)
    if unknown:
        raise ConfigError(f"unknown key '{unknown[0]}'{suggest_key(unknown[0], schema)}")
    try:
        # The plain container onto a fresh schema: a merge of two configs would let unknown keys through.
        merged = OmegaConf.merge(OmegaConf.structured(schema), container)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]} has no value; give it one on the command line or in its YAML file")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        value: Any = container
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else value
        raise ConfigError(f"{key}={_show(value)}: must be {_type_in_words(key, schema)}") from None


def run_config(container: Dict[str, Any]) -> RunConfig:
    """A plain container as a checked `RunConfig`."""
    return config_of(container, RunConfig)


def data_config(container: Dict[str, Any]) -> DataConfig:
    """The data part alone, for an evaluation on other data."""
    return config_of({"data": container}, _DataOnly).data


@dataclass
class _DataOnly:
    data: DataConfig = MISSING


def to_container(config: Any) -> Dict[str, Any]:
    """The config as plain dicts, lists and scalars, ready for YAML or JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def config_text(config: RunConfig) -> str:
    """config.yaml: data only, no interpolation, no target, no secret."""
    return yaml.safe_dump(public_container(config), sort_keys=False, allow_unicode=True)


def public_container(config: Any) -> Dict[str, Any]:
    """The config as plain data in which every secret is redacted: what may be written and shown."""
    container: Dict[str, Any] = without_secrets(to_container(config))
    return container


def flat(container: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Nested mappings as one, under dotted keys."""
    found: Dict[str, Any] = {}
    for key, value in container.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _refuse_bombs(text: str, shown: str) -> None:
    """CheckpointError for YAML that this program never writes, and that a loader would choke on."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        # A few lines of aliases to aliases unfold to gigabytes.
        if isinstance(event, yaml.AliasEvent):
            raise CheckpointError(f"{shown}: holds a YAML alias; a run's config is data only")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_CONFIG_DEPTH:
            raise CheckpointError(f"{shown}: nested too deeply to be the config of a run")


def read_config(path: Path) -> RunConfig:
    """The config of an earlier run, read as data: a stranger's file executes and resolves nothing.

    CheckpointError where the file is missing, is not such a config, or carries an interpolation or an alias.
    """
    shown = safe_text(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{shown}: is not a file")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{shown}: too large to be the config of a run ({path.stat().st_size:,} bytes)")
        text = path.read_text(encoding="utf-8")
        _refuse_bombs(text, shown)
        container = yaml.safe_load(text)
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: no such file; a run directory holds a config.yaml") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{shown}: cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(container, dict):
        raise CheckpointError(f"{shown}: is not the config of a run")
    if "${" in text:
        raise CheckpointError(f"{shown}: holds an interpolation (${{...}}); a run's config is data only")
    try:
        return run_config(container)
    except ConfigError as error:
        raise CheckpointError(f"{shown}: {safe_text(error)}") from None
