"""Benchmarks beside our own scores: tasks of lm-evaluation-harness, on the policy and on its reference.

One idea to keep in mind: both models answer the same examples, in the same batches, with the same random numbers. So
the difference is taken example by example, and its interval is narrower than those of the two scores.
"""

import copy
import difflib
import importlib.metadata
import importlib.util
import io
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants

from dpo_cli.config.schema import EvalConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import first_line, interval, safe_text, significant
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import ConfigError, DataError, DpoError
from dpo_cli.models.adapters import adapter_off
from dpo_cli.models.loading import undisturbed
from dpo_cli.models.logps import causal_model, plain_attention
from dpo_cli.models.memory import ran_out
from dpo_cli.models.reference import AdapterOffReference, Reference
from dpo_cli.paths import user_path
from dpo_cli.theory.statistics import Estimate, mean_estimate

BATCH_SIZE = 8  # texts in a forward pass where micro_batch_size=auto
BOOTSTRAP = 1_000  # resamples for the standard error of a metric that is no mean
SEED = 1_234  # of torch, NumPy and the choice of few-shot examples, as in lm_eval


class Harness:
    """The tasks that `config.harness` names."""

    def __init__(self, config: EvalConfig, reporter: Reporter) -> None:
        self.config, self.reporter = config, reporter
        self._loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        self._shortened_to: int | None = None  # tokens, where a prompt was longer

    def load(self) -> None:
        """Find the tasks and read their data, before a model is loaded.

        ConfigError where lm_eval is not installed, or for a task that does not exist, runs code that the model writes,
        or shows images; DataError where a task cannot be loaded.
        """
        if importlib.util.find_spec("lm_eval") is None:
            shown = safe_text(self.config.harness, limit=100)
            raise ConfigError(f"harness={shown}: the package lm_eval is not installed; pip install 'dpo-cli[harness]'")
        self.reporter.doing("reading the tasks of lm_eval")
        manager, names = self._find()
        for name in names:
            try:
                with _quiet(), _offline():
                    found = manager.load([name])
            except Exception as error:  # whatever a task's own code raises
                raise DataError(f"harness={name}: cannot be loaded ({_said(error)}){_remedy(error)}") from None
            for task in found["tasks"].values():
                if getattr(task, "UNSAFE_CODE", False):
                    raise ConfigError(f"harness={name}: runs code that the model writes, which dpo-eval never does")
                if getattr(task, "MULTIMODAL", False):
                    raise ConfigError(f"harness={name}: shows images to the model; choose a task of text alone")
            for part, content in self._loaded.items():
                content.update(found[part])

    def _find(self) -> tuple[Any, list[str]]:
        """lm_eval's index, and the names in it that are asked for; those in `harness_tasks` come before its own."""
        with _quiet() as heard:
            from lm_eval.tasks import TaskManager

            own = self.config.harness_tasks
            folder = None if own is None else user_path(own, ConfigError, "harness_tasks")
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"harness_tasks={safe_text(own)}: no such folder")
            if folder is not None:
                self.reporter.say(f"harness_tasks={safe_text(own)}: Python in it runs on this machine", style="red")
            # The index of all 15,000 names takes seconds: it is made where a name is not in the user's own folder.
            manager = TaskManager(include_path=folder, include_defaults=False)
            if folder is None or not all(map(manager.match_tasks, ([name] for name in self.config.harness))):
                manager = TaskManager(include_path=folder)
        names: dict[str, None] = {}
        for name in self.config.harness:
            found = manager.match_tasks([name])
            if not found:
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                skipped = [line for line in heard if line.startswith("Skip ") and folder and str(folder) in line]
                hints = [f"near it are {', '.join(near)}"] * bool(near) + skipped[:1]
                said = f"harness={safe_text(name)}: no such task; {'; '.join(hints) or '`lm_eval ls tasks` lists them'}"
                raise ConfigError(safe_text(said))
            names.update(dict.fromkeys(found))
        return manager, list(names)

    def measure(self, policy: Any, reference: Reference, encoder: PairEncoder, poll: Callable[[], None]) -> Any:
        """What the tasks find of policy and reference, shown and for report.json: `harness`, `lm_eval`.

        `poll` is asked before each batch. ConfigError where a task does not fit the model.
        """
        found = {}
        for role in ("reference", "policy"):
            is_adapter = isinstance(reference, AdapterOffReference)
            model = policy if role == "policy" or is_adapter else reference.model  # type: ignore[attr-defined]
            with adapter_off(policy) if role == "reference" and is_adapter else nullcontext():
                found[role] = self._evaluate(role, model, encoder, poll)
        if self._shortened_to is not None:
            limit = f"{self._shortened_to:,} tokens"
            self.reporter.warn(f"harness: some prompts are longer than the model's {limit} and lost their beginning")
        tasks = compared(found["policy"], found["reference"])
        settings = {
            "version": importlib.metadata.version("lm_eval"), "chat_template": encoder.kind == "chat",
            "limit": self.config.harness_limit, "batch_size": self._batch_size,
        }  # fmt: skip
        self._show(tasks, settings)
        return {"harness": tasks, "lm_eval": settings}

    @property
    def _batch_size(self) -> int:
        given = self.config.micro_batch_size
        return BATCH_SIZE if given == "auto" else int(given)

    def _evaluate(self, role: str, model: Any, encoder: PairEncoder, poll: Callable[[], None]) -> Any:
        """What lm_eval returns for one model."""
        is_chat = encoder.kind == "chat"
        try:
            with undisturbed(model), plain_attention(model), _quiet() as heard, _offline():
                from lm_eval.evaluator import evaluate

                lm = _language_model(causal_model(model), encoder, self._batch_size, poll, self.reporter, role)
                random.seed(0)
                np.random.seed(SEED)
                torch.manual_seed(SEED)
                for task in self._loaded["tasks"].values():
                    if task.get_config("num_fewshot") is None:
                        task.set_config(key="num_fewshot", value=0)
                    task.set_fewshot_seed(seed=SEED)
                found = evaluate(
                    lm=lm, task_dict=self._loaded, limit=self.config.harness_limit, bootstrap_iters=BOOTSTRAP,
                    apply_chat_template=is_chat, fewshot_as_multiturn=is_chat,
                )  # fmt: skip
        except DpoError:
            raise
        except Exception as error:
            if ran_out(error):
                raise
            raise ConfigError(f"harness={self.config.harness}: lm_eval fails on the {role} ({_said(error)})") from None
        if any("truncat" in line.lower() for line in heard):
            self._shortened_to = lm.max_length
        return found

    def _show(self, tasks: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        template = "the chat template" if settings["chat_template"] else "no chat template"
        first = "" if settings["limit"] is None else f", the first {settings['limit']:,} examples of each task"
        about = f"benchmarks by lm_eval {settings['version']}, with {template}{first}; standard errors in brackets"
        self.reporter.say(about)
        rows = []
        for name, task in tasks.items():
            for metric, (difference, low, high) in task["difference"].items():
                measure, _, filter_name = metric.partition(",")
                scores = [_with_stderr(task[role], measure, filter_name) for role in ("reference", "policy")]
                lower = " (lower is better)" if task["higher_is_better"].get(measure) is False else ""
                label = f"{measure}{'' if filter_name == 'none' else f' {filter_name}'}{lower}"
                rows.append([name, label, f"{task['n']:,}", *scores, f"{difference:+.3g}", interval(low, high, 2)])
        headings = ["task", "metric", "n", "reference", "policy", "difference", "95% interval"]
        self.reporter.grid(headings, rows, left=2)
        self.reporter.say()


def _with_stderr(scores: Mapping[str, float], measure: str, filter_name: str) -> str:
    stderr = scores.get(f"{measure}_stderr,{filter_name}")
    return significant(scores[f"{measure},{filter_name}"]) + ("" if stderr is None else f" ({significant(stderr, 2)})")


def compared(policy: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Two results of lm_eval on the same examples, as `report.json` has them.

    Of each task or group: `policy` and `reference`, lm_eval's own names with their numbers, and `difference`, policy
    minus reference with its 95% interval over examples; null where the metric is no mean over them, or where no example
    differs from another.
    """
    tasks = {}
    for name in policy["results"]:
        ours, theirs = _scores(policy["results"][name]), _scores(reference["results"][name])
        difference = {}
        for metric in ours:
            if "_stderr," in metric or metric not in theirs:
                continue
            values = [_values(found, name, metric) for found in (policy, reference)]
            apart = Estimate(ours[metric] - theirs[metric], math.nan, math.nan, 0)
            if all(values) and len(values[0]) == len(values[1]):
                paired = mean_estimate([after - before for after, before in zip(*values, strict=True)])
                # Where all examples differ alike, their spread says nothing of the interval.
                known = math.isclose(paired.mean, apart.mean, abs_tol=1e-9) and paired.high > paired.low
                apart = paired if known else apart
            difference[metric] = apart.triple()
        tasks[name] = {
            "n": policy.get("n-samples", {}).get(name, {}).get("effective", 0), "version": policy["versions"].get(name),
            "higher_is_better": policy["higher_is_better"].get(name, {}),
            "policy": ours, "reference": theirs, "difference": difference,
        }  # fmt: skip
    return tasks


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one task, by lm_eval's names, metric and filter: `acc,none`, `acc_stderr,none`."""
    return {
        name: float(value)
        for name, value in results.items()
        if "," in name and isinstance(value, int | float) and math.isfinite(value)
    }


def _values(found: Mapping[str, Any], task: str, metric: str) -> list[float]:
    """A metric of each example, in their order; [] where an example has no number."""
    measure, _, filter_name = metric.partition(",")
    samples = [one for one in found.get("samples", {}).get(task, []) if one["filter"] == filter_name]
    try:
        return [float(one[measure]) for one in sorted(samples, key=lambda one: int(one["doc_id"]))]
    except (KeyError, TypeError, ValueError):
        return []


def _language_model(
    model: Any, encoder: PairEncoder, batch_size: int, poll: Callable[[], None], reporter: Reporter, role: str
) -> Any:
    """The model in memory as lm_eval takes it."""
    from lm_eval.models.huggingface import HFLM

    ends = model.generation_config.eos_token_id
    closing = {encoder.closing, *([] if ends is None else ends if isinstance(ends, list) else [ends])}

    def shown(answer: Callable[..., Any], requests: Any) -> Any:
        reporter.start(f"{role}: benchmark request", len(requests))
        try:
            with _quiet():  # the live view has taken standard output
                return answer(requests, disable_tqdm=True)
        finally:
            reporter.stop()

    class InMemory(HFLM):
        """Asks `poll` before each batch, and shows progress."""

        def loglikelihood(self, requests: Any, *_: Any, **__: Any) -> Any:
            return shown(super().loglikelihood, requests)

        def generate_until(self, requests: Any, *_: Any, **__: Any) -> Any:
            return shown(super().generate_until, requests)

        def _model_call(self, inputs: Any, *arguments: Any, **options: Any) -> Any:
            poll()
            logits = super()._model_call(inputs, *arguments, **options)
            reporter.advance(len(inputs))
            return logits

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            poll()
            # A chat model ends with the token that its template puts behind an answer, as in training.
            answers = super()._model_generate(context, *arguments, eos_token_id=sorted(closing), **options)
            reporter.advance(len(context))
            return answers

    return InMemory(
        pretrained=model,
        tokenizer=copy.deepcopy(encoder.tokenizer),  # its padding is changed
        batch_size=batch_size,
        softmax_dtype=torch.float32,  # summed over a response, bfloat16 rounds away what tells the models apart
        chat_template_args=dict(encoder.template_options) or None,
    )


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep from the console what libraries print, log and warn of; gives the lines that lm_eval logs."""
    heard: list[str] = []
    keep = logging.Handler()
    keep.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    ours, others = logging.getLogger("lm_eval"), [logging.getLogger(name) for name in ("datasets", "evaluate")]
    before = [(logger, logger.level, logger.propagate) for logger in (ours, *others)]
    for logger in others:
        logger.setLevel(logging.ERROR)
    ours.setLevel(logging.DEBUG)
    ours.propagate = False
    ours.addHandler(keep)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield heard
    finally:
        ours.removeHandler(keep)
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate


@contextmanager
def _offline() -> Iterator[None]:
    """With HF_HUB_OFFLINE, within, the libraries of tasks ask no network either."""
    if not constants.HF_HUB_OFFLINE:
        yield
        return
    os.environ["HF_EVALUATE_OFFLINE"] = "1"  # read when the package is imported
    import nltk

    def refuse(what: str, *_: Any, **__: Any) -> None:
        raise OSError(f"nltk's {what} is not on this machine")

    download, nltk.download = nltk.download, refuse
    try:
        yield
    finally:
        nltk.download = download


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {safe_text(first_line(error), limit=200)}"


def _remedy(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return "; pip install 'lm_eval[tasks]' brings what its tasks need"
    offline = constants.HF_HUB_OFFLINE and isinstance(error, OSError)
    return "; HF_HUB_OFFLINE is set: fetch its data once without" if offline else ""
