"""The commands: parse, call, print one line when something is wrong, and exit with a code scripts can rely on.

torch is imported only once the command line is known to be right, so that --help and a typo answer at once.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from dpo_cli.errors import ConfigError, DpoError, OutOfMemoryError, StorageError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from dpo_cli.console.reporter import Reporter

TRAIN_HELP = """\
dpo-train: preference-tune a language model with Direct Preference Optimization.

    dpo-train [group=choice ...] [key=value ...]      -m/--multirun sweeps comma-separated values

Groups and their choices (* is the default)
{groups}

Dials, with their defaults
  beta=0.1             pull toward the reference: higher stays closer
  optimizer.lr=5e-5    learning rate: the dial that ruins models when too high
  epochs=1             passes over the data; max_steps=N wins over it
  batch_size=8         pairs per optimizer step
  data.train=PATH      .jsonl(.gz), .json, .parquet, .csv, or a hub data set
  data.eval=PATH       held-out pairs; without it a share of data.train is held out
  data.max_length=512  tokens, prompt + response
  batching=auto        packed rows where the model's numbers allow; or packed, padded
  reference.cache=auto keep the reference's log-probs on disk for later runs; run, for this one alone; or off
  lora.r=16            rank of the adapters; lora=off trains every weight
  model.name_or_path=X your own SFT model: a folder or a hub id
  save_every=0         steps between checkpoints; resume=auto output_dir=RUN goes on
  dry_run=true         check everything, rehearse the longest batch, estimate time and memory, stop
  verify_resume=true   prove on this machine that a stopped run resumes to the same bytes, stop
  replay=RUN           run the config of an earlier run again, say what differs
  objective=reward     train a reward model instead: a scalar head, no reference, beta left out

Examples
  dpo-train                                        the embedded model on the shipped pairs: some minutes
  dpo-train model=qwen data=hh beta=0.1            Qwen2.5-0.5B on Anthropic's dialogues
  dpo-train data=jsonl data.train=pairs.jsonl      your own pairs: prompt, chosen, rejected
  dpo-train -m beta=0.05,0.1,0.3                   a sweep, one run after the other
  dpo-train output_dir=outputs/a resume=auto       go on where a stopped run left off

Results go to outputs/<model>-<data>/<date_time>/: metrics.jsonl, checkpoints/, final/ (the adapter).
--config prints the composed config and stops.
Every key with what turning it does: the YAML files in {conf}
Exit codes: 0 done, 2 command line, 3 data, 4 checkpoint or model, 5 diverged, 6 memory, 7 storage,
75 stopped by a signal with a checkpoint saved, 130 Ctrl-C.
"""

EVAL_HELP = """\
dpo-eval: score a finished run, checkpoint, adapter or model on preference pairs, without training.

    dpo-eval checkpoint=PATH [data=choice] [key=value ...]

  checkpoint=PATH      a run directory, checkpoints/step-*, final/, a PEFT adapter directory, or a model
  data=CHOICE          pairs other than those the run held out: {data}
  data.eval=PATH       your own file of pairs
  samples=0            prompts for which answers of policy and reference are shown side by side
  max_new_tokens=128   length limit of those answers
  trust_remote_code=false  true runs Python of the model's authors, where the model needs it
  reference_model=PATH the SFT model, where the checkpoint is a whole model
  micro_batch_size=auto, batching=auto, reference_cache=auto, device=auto, name=NAME, output_dir=DIR

Examples
  dpo-eval checkpoint=outputs/smollm2-sample/2026-01-31_12-00-00 samples=3
  dpo-eval checkpoint=my-adapter data=jsonl data.eval=pairs.jsonl
  dpo-eval checkpoint=merged-model reference_model=sft-model data=hh

Writes report.json (means and 95% intervals), pairs.jsonl (a line a pair) and report.html to <run>/eval/<name>/.
Exit codes: 0 done, 2 command line, 3 data, 4 checkpoint or model, 6 memory, 7 storage, 75 stopped by a
signal, 130 Ctrl-C.
"""


SAMPLE_HELP = """\
dpo-sample: draw answers of a model to a file of prompts, to be compared.

    dpo-sample prompts=FILE [model=choice] [key=value ...]

  prompts=FILE         .jsonl(.gz), .json, .csv, .parquet: a prompt a row, or pairs, whose prompts are taken;
                       .txt: a prompt a line; sample:train and sample:test are the shipped ones
  model=CHOICE         {model}; or model.name_or_path=X
  checkpoint=PATH      draw from a trained policy instead: a run, checkpoints/step-*, final/ or an adapter
  n=2                  answers to a prompt, all different
  temperature=1 top_p=1   1 is the model itself; lower is tidier
  max_new_tokens=256   length limit of an answer
  limit=N              first N rows only
  seed=0, batch_size=auto, template=null, max_prompt_length=1024, on_bad_row=error, device=auto,
  trust_remote_code=false  (of a checkpoint; for a model model.trust_remote_code)
  output=FILE          the samples; a file that was begun is gone on with

Examples
  dpo-sample prompts=prompts.txt output=samples.jsonl
  dpo-sample model=qwen prompts=pairs.jsonl n=4 temperature=0.8 output=samples.jsonl
  dpo-sample checkpoint=outputs/qwen-hh/2026-01-31_12-00-00 prompts=prompts.txt output=round2.jsonl

Answers with the same seed are the same, whatever is drawn beside them. The next step is dpo-label.
Exit codes: 0 done, 2 command line, 3 prompts, 4 checkpoint or model, 6 memory, 7 storage, 75 stopped by a signal (run
again to go on), 130 Ctrl-C.
"""

LABEL_HELP = """\
dpo-label: turn samples into preference pairs for dpo-train.

    dpo-label samples=FILE by=human|reward|implicit|rule [key=value ...]

  by=human annotator=NAME   you, at the keyboard: two answers in blinded order, saved after every key
  by=reward judge=RUN       a reward model: a run of dpo-train objective=reward, or a classifier with one label
  by=implicit judge=RUN     a DPO run's own reward, beta log(policy / reference)
  by=rule rule=NAME         {rules}
  pairs=all                 of more than two answers: all, or extremes, the best against the worst
  labels=best               or drawn: chosen with probability sigmoid(r+ - r-), as noisy as people are
  seed=0, prior=1, batching=auto, trust_remote_code=false, device=auto
  output=FILE               the pairs; null = <samples>.<by>.jsonl beside the samples

Examples
  dpo-label samples=samples.jsonl by=human annotator=ann
  dpo-label samples=samples.jsonl by=reward judge=outputs/smollm2-hh-reward/2026-01-31_12-00-00
  dpo-label samples=samples.jsonl by=rule rule=shorter output=pairs.jsonl

Every pair comes with the probability that its chosen answer is the better. The next step is
dpo-train data=jsonl data.train=FILE.
Exit codes: 0 done, 2 command line, 3 samples, 4 judge, 6 memory, 7 storage, 75 stopped by a signal (run again to go
on), 130 Ctrl-C.
"""

RANK_HELP = """\
dpo-rank: a Bradley-Terry ranking with 95% intervals.

    dpo-rank games=FILE [prior=0]
    dpo-rank checkpoints=[a,b,c] judge=JUDGE prompts=FILE [key=value ...]

  games=FILE           who beat whom: .csv with the header winner,loser,count, or .jsonl of the same; a column tie
  checkpoints=[a,b]    runs, checkpoints, adapters or models: each answers every prompt, the judge compares
  judge=JUDGE          a reward model, a DPO run (its implicit reward), or a rule: {rules}
  prompts=FILE         as for dpo-sample
  prior=0              above 0: drawn games with an average player, which bound the undefeated and join the unconnected
  template=chat|plain  how checkpoints are asked; unset, each as it was trained
  temperature=1 top_p=1 max_new_tokens=256 max_prompt_length=1024 limit=N on_bad_row=error seed=0 batch_size=auto
  trust_remote_code=false device=auto
  output=FILE          the ranking as JSON; all answers beside it, from which the same command goes on

Examples
  dpo-rank games=games.csv
  dpo-rank checkpoints=[outputs/a,outputs/b,outputs/c] judge=outputs/reward prompts=prompts.txt limit=100

Exit codes: 0 done, 2 command line, 3 games or prompts, 4 checkpoint or judge, 6 memory, 7 storage, 75 stopped by a
signal, 130 Ctrl-C.
"""


def train() -> NoReturn:
    """The command dpo-train."""
    _run(_train)


def evaluate() -> NoReturn:
    """The command dpo-eval."""
    _run(_evaluate)


def sample() -> NoReturn:
    """The command dpo-sample."""
    _run(_sample)


def label() -> NoReturn:
    """The command dpo-label."""
    _run(_label)


def rank() -> NoReturn:
    """The command dpo-rank."""
    _run(_rank)


def _run(command: Callable[[list[str]], int]) -> NoReturn:
    code = 1
    _open_standard_streams()
    try:
        code = command(sys.argv[1:])
    except DpoError as error:
        _print_error(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        _print_error("stopped by Ctrl-C")
        code = 130
    except MemoryError as error:
        _print_error(f"out of memory: {error}")
        code = OutOfMemoryError.exit_code
    except BrokenPipeError:
        code = 0
    except OSError as error:  # one that no part foresaw is still about a file, and the user can see to it
        _print_error(f"{error.filename or 'a file'}: {error.strerror or error}")
        code = StorageError.exit_code
    from dpo_cli.console.reporter import silence_closed_stdout

    silence_closed_stdout()
    sys.exit(code)


def _open_standard_streams() -> None:
    """Put nothing in the place of a standard stream that is closed, lest the next file take its number."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _print_error(text: str) -> None:
    from dpo_cli.console.text import safe_text

    try:
        sys.stderr.write(f"error: {safe_text(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _wants_help(words: list[str]) -> bool:
    return any(word in ("-h", "--help", "help") for word in words)


def _without_flag(words: list[str], *flags: str) -> tuple[list[str], bool]:
    return [word for word in words if word not in flags], any(word in flags for word in words)


def _train(words: list[str]) -> int:
    from dpo_cli.config.composition import composed_run, parse_overrides, replayed, sweep
    from dpo_cli.config.schema import run_config

    if _wants_help(words):
        print(train_help())
        return 0
    words, many = _without_flag(words, "-m", "--multirun")
    words, show = _without_flag(words, "--config")
    _refuse_flags(words, "dpo-train")
    overrides = parse_overrides(words)
    if many:
        jobs = sweep(overrides)
        for job in jobs:  # a mistake in the last of them is said before the first has trained
            run_config(composed_run(parse_overrides(job)).container)
        if any(override.key_or_group == "output_dir" for override in overrides):
            raise ConfigError("output_dir: the runs of a sweep cannot share one; leave it out")
        return _sweep(jobs, show)
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}': several values need -m: dpo-train -m {override.input_line}")
    choice = composed_run(overrides)
    if choice.container.get("replay") is not None:
        config, name = replayed(overrides)
    else:
        config = run_config(choice.container)
        kind = "-reward" if config.objective == "reward" else ""
        name = f"{choice.choices['model']}-{choice.choices['data']}{kind}"
    if show:
        from dpo_cli.config.schema import config_text

        print(config_text(config), end="")
        return 0
    _check_files_early(config.data.train, config.data.eval)
    quiet_libraries()
    from dpo_cli.commands.verify_resume import verify_resume
    from dpo_cli.training.runner import train as run_training

    if config.verify_resume:
        return _reporting(lambda reporter: verify_resume(config, reporter))
    return _reporting(lambda reporter: run_training(config, reporter, name))


def _evaluate(words: list[str]) -> int:
    from dpo_cli.config.composition import check_overrides, composed, groups, parse_overrides
    from dpo_cli.config.schema import EvalConfig, EvalSchema, config_of

    if _wants_help(words):
        print(EVAL_HELP.format(data=", ".join(groups()["data"])))
        return 0
    _refuse_flags(words, "dpo-eval")
    overrides = parse_overrides(words)
    has_group = any(override.key_or_group == "data" for override in overrides)
    # Without a data group, data.* changes what the run itself was trained with.
    of_run = [] if has_group else [o for o in overrides if o.key_or_group.startswith("data.")]
    check_overrides(overrides, EvalSchema)
    rest = [override for override in overrides if override not in of_run]
    container = {"data": None, **composed("eval", rest, EvalSchema).container}
    config = config_of(container, EvalConfig)
    quiet_libraries()
    from dpo_cli.commands.evaluate import evaluate as run_evaluation

    return _reporting(lambda reporter: run_evaluation(config, [(o.key_or_group, o.value()) for o in of_run], reporter))


def _sample(words: list[str]) -> int:
    from dpo_cli.config.composition import composed, groups, parse_overrides
    from dpo_cli.config.schema import SampleConfig, config_of

    if _wants_help(words):
        print(SAMPLE_HELP.format(model=", ".join(groups()["model"])))
        return 0
    _refuse_flags(words, "dpo-sample")
    overrides = parse_overrides(words)
    config = config_of(composed("sample", overrides, SampleConfig).container, SampleConfig)
    if config.checkpoint is not None:
        for override in overrides:
            if override.key_or_group.split(".")[0] == "model":
                raise ConfigError(f"{override.input_line}: checkpoint= names the model already; leave one of them out")
    elif config.trust_remote_code:
        raise ConfigError("trust_remote_code=true: of a checkpoint; for a model write model.trust_remote_code=true")
    _check_files_early(config.prompts)
    quiet_libraries()
    from dpo_cli.commands.sample import sample as run_sampling

    return _reporting(lambda reporter: run_sampling(config, reporter))


def _label(words: list[str]) -> int:
    from dpo_cli.config.composition import composed, parse_overrides
    from dpo_cli.config.schema import LabelConfig, config_of

    if _wants_help(words):
        print(LABEL_HELP.format(rules=_rules()))
        return 0
    _refuse_flags(words, "dpo-label")
    overrides = parse_overrides(words)
    config = config_of(composed("label", overrides, LabelConfig).container, LabelConfig)
    if config.by in ("rule", "human"):
        _refuse_unused(overrides, ("batching", "device", "trust_remote_code"), f"by={config.by} asks no model")
    if config.by != "human":
        _refuse_unused(overrides, ("prior",), f"of by=human; by={config.by} fits no strengths")
        if config.labels == "best":
            _refuse_unused(overrides, ("seed",), "of labels=drawn; nothing is drawn with labels=best")
    _check_files_early(config.samples)
    quiet_libraries()
    from dpo_cli.commands.label import label as run_labelling
    from dpo_cli.commands.label import label_by_hand

    work = label_by_hand if config.by == "human" else run_labelling
    return _reporting(lambda reporter: work(config, reporter))


def _refuse_unused(overrides: Sequence["Override"], keys: Collection[str], why: str) -> None:
    """ConfigError for a key that would change nothing here."""
    for override in overrides:
        if override.key_or_group in keys:
            raise ConfigError(f"{override.input_line}: {why}; leave it out")


def _rank(words: list[str]) -> int:
    from dpo_cli.config.composition import composed, parse_overrides
    from dpo_cli.config.schema import RankConfig, config_of, schema_keys

    if _wants_help(words):
        print(RANK_HELP.format(rules=_rules()))
        return 0
    _refuse_flags(words, "dpo-rank")
    overrides = parse_overrides(words)
    config = config_of(composed("rank", overrides, RankConfig).container, RankConfig)
    if config.games is not None:
        unused = set(schema_keys(RankConfig)) - {"games", "prior", "output"}
        _refuse_unused(overrides, unused, "games=FILE holds the results already")
    _check_files_early(config.games, config.prompts)
    quiet_libraries()
    from dpo_cli.commands.rank import rank as run_ranking

    return _reporting(lambda reporter: run_ranking(config, reporter))


def _rules() -> str:
    from dpo_cli.labelling.rules import RULES

    return ", ".join(RULES)


def _reporting(work: Callable[["Reporter"], object]) -> int:
    from dpo_cli.console.reporter import Reporter

    reporter = Reporter()
    try:
        with _memory_errors():
            work(reporter)
    finally:
        reporter.close()
    return 0


def _refuse_flags(words: list[str], command: str) -> None:
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"'{word}': no such flag; values are given as key=value, see {command} --help")


def _check_files_early(*sources: str | None) -> None:
    from dpo_cli.data.files import local_path

    for source in sources:
        if source is not None:
            local_path(source)


def _sweep(jobs: list[list[str]], show: bool) -> int:
    """One run after the other, each a process of its own: its memory goes back, its failure stays its own."""
    from dpo_cli.console.text import safe_text

    worst = 0
    for number, words in enumerate(jobs, start=1):
        with suppress(OSError, ValueError):  # whoever reads along may go away: the runs go on
            print(f"run {number}/{len(jobs)}: dpo-train {safe_text(' '.join(words))}", flush=True)
        command = [
            sys.executable,
            "-c",
            "from dpo_cli.cli import train; train()",
            *words,
            *(["--config"] if show else []),
        ]
        code = subprocess.run(command, check=False).returncode
        if code in (75, 130):
            return code
        worst = worst or code
    return worst


def quiet_libraries() -> None:
    """No progress bars and advice of libraries between our lines; their errors become ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class _memory_errors:  # noqa: N801 - reads as a statement
    """The device's own out-of-memory error, as ours with what usually helps."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from dpo_cli.models.memory import ran_out

        if error is not None and ran_out(error):
            raise OutOfMemoryError(
                "out of memory. What helps, in this order: micro_batch_size=1, engine.gradient_checkpointing=true, "
                "reference=adapter_off, a smaller data.max_length"
            ) from None


def train_help() -> str:
    """The page that dpo-train --help prints."""
    from dpo_cli.config.composition import conf_dir, groups

    defaults = {"model": "smollm2", "data": "sample", "optimizer": "adamw", "loss": "sigmoid", "lora": "all_linear",
                "reference": "frozen", "engine": "single"}  # fmt: skip
    lines = []
    for group, choices in groups().items():
        marked = [f"{choice}*" if defaults.get(group) == choice else choice for choice in choices]
        lines += textwrap.wrap("  ".join(marked), 90, initial_indent=f"  {group:<11}", subsequent_indent=" " * 13)
    return TRAIN_HELP.format(groups="\n".join(lines), conf=conf_dir())
