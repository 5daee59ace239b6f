"""The commands: parse, call, print one line when something is wrong, and exit with a code scripts can rely on.

torch is imported only once the command line is known to be right, so that --help and a typo answer at once.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dpo_cli.engine.ranks import MEETING_FILE, place_of_process
from dpo_cli.engine.workers import end_with_parent
from dpo_cli.errors import ConfigError, DpoError, LostRankError, OutOfMemoryError, StorageError

if TYPE_CHECKING:
    from dpo_cli.config.command_line import CommandLine
    from dpo_cli.config.schema import DataConfig, RunConfig
    from dpo_cli.console.reporter import Reporter

Config = TypeVar("Config")


def train() -> NoReturn:
    """The command dpo-train."""
    _run("train", _train)


def evaluate() -> NoReturn:
    """The command dpo-eval."""
    _run("eval", _evaluate)


def sample() -> NoReturn:
    """The command dpo-sample."""
    _run("sample", _sample)


def label() -> NoReturn:
    """The command dpo-label."""
    _run("label", _label)


def rank() -> NoReturn:
    """The command dpo-rank."""
    _run("rank", _rank)


def data() -> NoReturn:
    """The command dpo-data."""
    _run("data", _examine)


def compare() -> NoReturn:
    """The command dpo-compare."""
    _run("compare", _compare)


def export() -> NoReturn:
    """The command dpo-export."""
    _run("export", _export)


def _run(name: str, command: Callable[["Words"], int]) -> NoReturn:
    code = 1
    _open_standard_streams()
    end_with_parent()
    try:
        words = read_words(name, sys.argv[1:])
        code = _help(words) if words.help else command(words)
    except DpoError as error:
        # What every process of a computer finds before the ranks have met, the first of them says.
        if not (error.told if error.told is not None else place_of_process().local_rank):
            _print_error(str(error), *error.details)
        code = error.exit_code
        if isinstance(error, LostRankError):  # the libraries would wait for the lost rank when the process ends
            sys.stdout.flush()
            os._exit(code)
    except KeyboardInterrupt:
        if place_of_process().local_rank == 0:
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
    """Replace a closed standard stream by nothing: else the next file would take its number."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _print_error(text: str, *details: str) -> None:
    from dpo_cli.console.text import safe_text

    _write_error("".join(f"{line}\n" for line in (f"error: {safe_text(text)}", *map(safe_text, details))))


def _write_error(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


@dataclass(frozen=True)
class Words:
    """The words of a command line: overrides, and the flags beside them."""

    command: str
    overrides: tuple[str, ...]
    help: str = ""  # --help or --help-all
    many: bool = False
    print_config: bool = False
    config: str | None = None
    config_dir: str | None = None

    def read(self) -> "CommandLine":
        """The overrides of file and command line, checked as far as they can be without composing."""
        from dpo_cli.config.command_line import read_command_line

        return read_command_line(self.command, [*self.overrides], self.config, self.config_dir, self.many)


def read_words(command: str, words: list[str]) -> Words:
    """Part flags from overrides; ConfigError for a flag that does not exist or lacks its value."""
    read = Words(command, ())
    switches: dict[str, dict[str, Any]] = {
        **{flag: {"help": "--help"} for flag in ("-h", "--help", "help")},
        "--help-all": {"help": "--help-all"},
        "--print-config": {"print_config": True},
        **{flag: {"many": True} for flag in ("-m", "--multirun") if command == "train"},
    }
    needs = {"--config": "a file of overrides, such as --config run.yaml; --print-config shows the composed config",
             "--config-dir": "a folder of your own groups, such as --config-dir my_conf"}  # fmt: skip
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if word in switches:
            read = replace(read, **switches[word])
        elif flag in needs:
            value = value if equals else next(rest, "")
            if not value or value.startswith("-"):
                raise ConfigError(f"'{flag}': give {needs[flag]}")
            key = flag.removeprefix("--").replace("-", "_")
            if getattr(read, key) is not None:
                raise ConfigError(f"'{flag}' is given twice; give it once")
            given: dict[str, Any] = {key: value}
            read = replace(read, **given)
        elif word.startswith("-"):
            raise ConfigError(_no_such_flag(command, word, next(rest, ""), [*switches, *needs]))
        else:
            read = replace(read, overrides=(*read.overrides, word))
    return read


def _no_such_flag(command: str, word: str, following: str, flags: list[str]) -> str:
    """What to write instead of a flag that does not exist: other trainers take keys as flags."""
    from dpo_cli.config.foreign_words import answer
    from dpo_cli.config.schema import SCHEMAS, did_you_mean, schema_keys

    flag, equals, value = word.partition("=")
    key, keys = flag.lstrip("-").replace("-", "_"), schema_keys(SCHEMAS[command])
    if not equals:
        value = "true" if not following or following.startswith("-") or "=" in following else following
    if key in keys:
        return f"'{word}': values are given as key=value: {key}={value}"
    if found := answer(key, value, keys):
        return f"'{word}': no such flag; {found}"
    hint = did_you_mean(flag, flags) or f"; values are given as key=value, see dpo-{command} --help"
    return f"'{word}': no such flag{hint}"


def _help(words: Words) -> int:
    from dpo_cli.config.composition import user_dir
    from dpo_cli.config.help import help_page

    own = user_dir(words.config_dir) if words.config_dir is not None else None
    print(help_page(words.command, everything=words.help == "--help-all", own=own), end="")
    return 0


def _print(config: object) -> int:
    from dpo_cli.config.schema import config_text

    print(config_text(config), end="")
    return 0


def _train(words: Words) -> int:
    from dpo_cli.config.command_line import run_of

    line = words.read()
    if words.many:
        return _sweep(words, line)
    for override in line.overrides:
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}': several values need -m: dpo-train -m {override.input_line}")
    config, name = run_of(line)
    if words.print_config:
        return _print(config)
    _check_data_early(config.data)
    if not config.plan and (workers := _workers(config)) > 1:
        return _on_workers("train", workers, config.engine.timeout)

    def work(reporter: "Reporter") -> None:
        from dpo_cli.commands.verify_resume import verify_resume
        from dpo_cli.training.plan import plan_run
        from dpo_cli.training.runner import train as run_training

        if config.plan:
            plan_run(config, reporter)
        elif config.verify_resume:
            verify_resume(config, reporter)
        else:
            run_training(config, reporter, name)

    return _reporting(work)


def _workers(config: "RunConfig") -> int:
    """How many processes this command starts for a run; 1 where it is one of them, or computes by itself."""
    return 1 if config.engine.name == "single" else _processes(config.engine.processes, config.device, "engine.")


def _processes(processes: int | str, device: str, group: str = "") -> int:
    """How many processes a command starts that may be several; 1 where it is one of them, or computes by itself."""
    from dpo_cli.engine.ranks import find_place

    if processes == 1 or find_place() is not None:
        return 1
    if device not in ("auto", "cuda"):
        if processes != "auto" and ":" in device:
            raise ConfigError(f"device={device}: is one device, and {group}processes={processes} take one each; "
                              f"write device={device.split(':')[0]}")  # fmt: skip
        return 1 if processes == "auto" else int(processes)
    from torch.cuda import device_count

    found = device_count()
    if processes == "auto":
        return max(1, found)
    if found < int(processes) and (found or device == "cuda"):
        from dpo_cli.console.text import plural

        raise ConfigError(
            f"{group}processes={processes}: this computer has {plural(found, 'GPU')}, and each process takes one"
        )
    return int(processes)


def _on_workers(command: str, processes: int, timeout: float | None = None) -> int:
    """Run this command again as so many ranks."""
    from dpo_cli.engine.workers import PATIENCE, start_workers

    again = [sys.executable, "-c", f"from dpo_cli import cli; cli.{command}()", *sys.argv[1:]]
    return start_workers(again, processes, lambda text: _write_error(f"{text}\n"), min(PATIENCE, timeout or PATIENCE))


def _sweep(words: Words, line: "CommandLine") -> int:
    from dpo_cli.commands.sweep import Job, check_sweep, run_sweep
    from dpo_cli.config.command_line import run_of
    from dpo_cli.config.composition import parse_overrides, sweep
    from dpo_cli.console.reporter import Reporter

    swept = [override.key_or_group for override in line.overrides if override.is_sweep_override()]
    folders = [override for override in line.overrides if override.key_or_group == "output_dir"]
    if "output_dir" in swept:
        raise ConfigError(
            f"{line.given['output_dir']}: a sweep has one folder, in which each run gets its own; name one"
        )
    jobs = []
    # A mistake in the last of them is said before the first has trained.
    for job in sweep([override for override in line.overrides if override not in folders]):
        config, _ = run_of(replace(line, overrides=[*parse_overrides(job), *folders]))
        values = {key: value for key, _, value in (word.lstrip("+").partition("=") for word in job) if key in swept}
        jobs.append(Job(tuple(job), values, config))
    folder = str(folders[-1].value()) if folders and folders[-1].value() is not None else None
    check_sweep(jobs, folder)
    if words.print_config:
        for number, one in enumerate(jobs, start=1):
            print(f"# run {number}/{len(jobs)}: {', '.join(f'{key}={value}' for key, value in one.swept.items())}")
            _print(one.config)
        return 0
    reporter = Reporter()
    try:
        return run_sweep(jobs, folder, ["--config-dir", str(line.own)] if line.own is not None else [], reporter)
    finally:
        reporter.close()


def _evaluate(words: Words) -> int:
    from dpo_cli.config.schema import EvalConfig

    config, of_run = _config_and_data_of_run(words, words.read(), EvalConfig)
    if words.print_config:
        return _print(config)

    def work(reporter: "Reporter") -> object:
        from dpo_cli.commands.evaluate import evaluate as run_evaluation

        return run_evaluation(config, of_run, reporter)

    return _reporting(work, "evaluate", config)


def _config_and_data_of_run(
    words: Words, line: "CommandLine", schema: type[Config]
) -> tuple[Config, list[tuple[str, Any]]]:
    """The config of a command that evaluates, and the `data.*` keys that change what a run itself was trained with."""
    from dpo_cli.config.composition import parse_overrides
    from dpo_cli.config.schema import DataConfig, schema_keys

    of_data = [override for override in line.overrides if override.key_or_group.startswith("data.")]
    # Without a data group, data.* changes what the run itself was trained with, unless every key is given.
    whole = set(schema_keys(DataConfig)) <= {override.key_or_group.split(".")[1] for override in of_data}
    if "data" not in line.given and whole:
        line = replace(line, overrides=[*parse_overrides(["data=jsonl"]), *line.overrides])
    of_run = [] if "data" in line.given else of_data
    line.check()
    config = replace(line, overrides=[one for one in line.overrides if one not in of_run]).config(schema)
    if words.print_config and of_run:
        raise ConfigError("--print-config: data.* keys change what the run was trained with, which is read later")
    return config, [(one.key_or_group, one.value()) for one in of_run]


def _compare(words: Words) -> int:
    from dpo_cli.config.schema import CompareConfig
    from dpo_cli.console.text import hydra_quoted

    models = [word for word in words.overrides if "=" not in word or os.path.exists(word)]
    others = tuple(word for word in words.overrides if word not in models)
    if models:
        others = (f"models=[{','.join(map(hydra_quoted, models))}]", *others)
    line = replace(words, overrides=others).read()
    config, of_run = _config_and_data_of_run(words, line, CompareConfig)
    if words.print_config:
        return _print(config)
    from dpo_cli.commands.compare import compare as run_comparison
    from dpo_cli.commands.compare import reports_only

    def work(reporter: "Reporter") -> object:
        return run_comparison(config, of_run, reporter)

    if not reports_only(config):
        return _reporting(work)
    from dpo_cli.console.reporter import Reporter

    reporter = Reporter()
    try:
        work(reporter)
    finally:
        reporter.close()
    return 0


def _sample(words: Words) -> int:
    from dpo_cli.config.schema import SampleConfig

    line = words.read()
    config = line.config(SampleConfig)
    if words.print_config:
        return _print(config)
    if config.checkpoint is not None:
        for key, written in line.given.items():
            if key.split(".")[0] == "model":
                raise ConfigError(f"{written}: checkpoint= names the model already; leave one of them out")
    elif config.trust_remote_code:
        raise ConfigError("trust_remote_code=true: of a checkpoint; for a model write model.trust_remote_code=true")
    _check_files_early(config.prompts)

    def work(reporter: "Reporter") -> object:
        from dpo_cli.commands.sample import sample as run_sampling

        return run_sampling(config, reporter)

    return _reporting(work, "sample", config)


def _label(words: Words) -> int:
    from dpo_cli.config.command_line import refuse_unused
    from dpo_cli.config.schema import LabelConfig

    line = words.read()
    config = line.config(LabelConfig)
    if words.print_config:
        return _print(config)
    if config.by in ("rule", "human"):
        refuse_unused(line, ("layout", "device", "processes", "trust_remote_code"), f"by={config.by} asks no model")
    if config.by != "human":
        refuse_unused(line, ("prior",), f"of by=human; by={config.by} fits no strengths")
        if config.labels == "best":
            refuse_unused(line, ("seed",), "of labels=sampled; nothing is sampled with labels=best")
    _check_files_early(config.samples)

    def work(reporter: "Reporter") -> object:
        from dpo_cli.commands.label import label as run_labelling
        from dpo_cli.commands.label import label_by_hand

        return (label_by_hand if config.by == "human" else run_labelling)(config, reporter)

    return _reporting(work, "label", config if config.judge is not None else None)


def _rank(words: Words) -> int:
    from dpo_cli.config.command_line import refuse_unused
    from dpo_cli.config.schema import RankConfig, schema_keys

    line = words.read()
    config = line.config(RankConfig)
    if words.print_config:
        return _print(config)
    if config.games is not None:
        unused = set(schema_keys(RankConfig)) - {"games", "prior", "output"}
        refuse_unused(line, unused, "games=FILE holds the results already")
    _check_files_early(config.games, config.prompts)

    def work(reporter: "Reporter") -> object:
        from dpo_cli.commands.rank import rank as run_ranking

        return run_ranking(config, reporter)

    return _reporting(work, "rank", config if config.games is None else None)


def _examine(words: Words) -> int:
    from dpo_cli.config.schema import ExamineConfig

    line = words.read()
    config = line.config(ExamineConfig)
    if words.print_config:
        return _print(config)
    if config.run is not None:
        for key, written in line.given.items():
            if key not in ("run", "folds", "seed", "output_dir"):
                raise ConfigError(f"{written}: run= takes data and options of that run; leave it out")
    elif config.cache is None:
        _check_data_early(config.data)
    given = [written for key, written in line.given.items() if key.split(".")[0] in ("data", "model")]

    def work(reporter: "Reporter") -> None:
        from dpo_cli.commands.examine import examine, show_caches

        if config.cache is not None:
            show_caches(config.cache, reporter)
        elif config.run is not None:
            from dpo_cli.commands.suspects import find_suspects

            find_suspects(config, reporter)
        else:
            examine(config, given, reporter)

    return _reporting(work)


def _export(words: Words) -> int:
    from dpo_cli.config.schema import ExportConfig

    line = words.read()
    config = line.config(ExportConfig)
    if words.print_config:
        return _print(config)

    def work(reporter: "Reporter") -> None:
        from dpo_cli.commands.export import export as run_export

        run_export(config, reporter)

    return _reporting(work)


def _reporting(work: Callable[["Reporter"], object], command: str = "", config: Any = None) -> int:
    """Do the work of a command, which imports torch; what is being done is on the screen before that.

    A command that may be several processes gives its name here and its config, which has `processes` and `device`.
    """
    from dpo_cli.console.reporter import Reporter

    reporter = Reporter()
    try:
        # Else it is said already.
        if place_of_process().rank == 0 and (config is None or MEETING_FILE not in os.environ):
            reporter.doing("loading PyTorch and transformers")
        if config is not None and (workers := _processes(config.processes, config.device)) > 1:
            return _on_workers(command, workers)
        quiet_libraries()
        from dpo_cli.models.memory import memory_errors

        with memory_errors():
            work(reporter)
    finally:
        reporter.close()
    return 0


def _check_data_early(data: "DataConfig") -> None:
    from dpo_cli.data.files import local_files

    for source in data.named():
        local_files(source)


def _check_files_early(*sources: str | None) -> None:
    from dpo_cli.data.files import local_path

    for source in sources:
        if source is not None:
            local_path(source)


def quiet_libraries() -> None:
    """No progress bars and advice of libraries between our lines; their errors become ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for kernels of layers that are not used here
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
