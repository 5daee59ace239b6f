"""What a run records while it trains and leaves when it ends: metrics, evaluations, checkpoints, final/, verdict."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dpo_cli.console.text import duration, plural, safe_text, significant
from dpo_cli.data.leaks import NO_LEAKS
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE
from dpo_cli.errors import CheckpointError, DivergedError, DpoError, StorageError
from dpo_cli.evaluation.scores import ScoredPairs, Scorer, by_source, prompts_of, score_pairs, summarize, with_sources
from dpo_cli.generation.answers import MeasuredAnswers
from dpo_cli.models.adapters import START_FILE
from dpo_cli.models.generators import rng_states
from dpo_cli.models.memory import describe_peak_memory, peak_memory_gib
from dpo_cli.objectives.findings import Verdict, assess
from dpo_cli.objectives.history import WITH_INTERVALS, History
from dpo_cli.runs.checkpoint import (
    Checkpoint,
    TrainingState,
    best_checkpoint,
    checkpoint_name,
    optimizer_tensors,
    restore_weights,
    save_checkpoint,
    save_policy,
    trainable,
    trained_weights,
    validate,
)
from dpo_cli.runs.manifest import weights_sha256
from dpo_cli.runs.model_card import model_card
from dpo_cli.runs.page import write_page
from dpo_cli.runs.replay import describe_replay
from dpo_cli.runs.tensor_files import gather
from dpo_cli.storage.durable import write_folder
from dpo_cli.theory.losses import ResponseScores
from dpo_cli.theory.metrics import MeanOverPairs
from dpo_cli.trackers.tables import evaluation_table, samples_table
from dpo_cli.trackers.trackers import Trackers
from dpo_cli.training.choice import Choice, choose
from dpo_cli.training.guard import require_finite
from dpo_cli.training.parts import Context, Learner, Material, Progress, Window
from dpo_cli.training.samples import Samples, describe_samples


@dataclass(frozen=True)
class Final:
    """Which step final/ is of, and why."""

    step: int
    reason: str


def means_of(line: dict[str, Any] | None) -> dict[str, float] | None:
    """The means over held-out pairs and answers in a line of metrics.jsonl; None where there is no line."""
    others = ("epoch", "seconds", "peak_memory_gib")
    return line and {name: value for name, value in line.items() if type(value) is float and name not in others}


class Recorder:
    """Writes metrics, checkpoints and results of a run on rank 0; every rank computes them."""

    def __init__(
        self, context: Context, learner: Learner, material: Material, progress: Progress, trackers: Trackers
    ) -> None:
        self.context, self.learner, self.material, self.progress = context, learner, material, progress
        self.directory, self.reporter, self.engine = context.directory, context.reporter, context.engine
        self.trackers = trackers
        self.samples = Samples(context, learner, material)

    def save_alone(self, rng: dict[str, Tensor]) -> None:
        """Write a checkpoint of a run that has lost a rank, where this rank holds all of it; no other is asked."""
        self.engine = SINGLE
        if self.is_logged and self.progress.window.metrics.pairs:  # lost between the step and its line
            self.log()
        self.save(rng)

    @property
    def is_logged(self) -> bool:
        """Whether the step just done ends with a line in metrics.jsonl: also one that may be the last."""
        config, is_due = self.context.config, self.progress.is_due
        may_end = bool(config.choosing()) and is_due(config.eval_every)
        return is_due(config.log_every) or may_end or self.progress.step == self.material.total_steps

    @property
    def choice(self) -> Choice:
        """What the evaluations so far decide, where the run chooses what final/ is."""
        config = self.context.config
        return choose(config, self.progress.evaluated) if config.choosing() else Choice()

    @property
    def evaluation_is_missing(self) -> bool:
        """Whether the run that this one resumes was stopped in the evaluation after its last step."""
        step = self.progress.step
        is_between = step not in (0, self.material.total_steps)
        return (
            is_between and self.progress.is_due(self.context.config.eval_every) and step not in self.progress.evaluated
        )

    # Metrics

    def log_start(self, metrics: dict[str, Tensor], batch: list[TokenizedPair]) -> None:
        """The line of step 0: the first batch before the first update."""
        start = MeanOverPairs()
        start.add(metrics, [pair.source for pair in batch])
        self._write("train", start.means(), lr=0.0, peak_memory_gib=self._peak_memory())

    def log(self) -> None:
        """Log the mean over the pairs since the last logged step, sound new alarms, and begin a new window."""
        learner, progress, window = self.learner, self.progress, self.progress.window
        learner.guard.look()
        peak_memory = self._peak_memory()  # what follows asks no other rank: a line is written, or nothing is changed
        if window.metrics.pairs == 0:  # every step since the last line was skipped, and each has been said
            return
        drift = learner.monitor.drift()
        alarms = learner.monitor.alarms(drift)
        self._write(
            "train",
            window.metrics.means(),
            grad_norm=float(window.grad_norm),
            lr=learner.optimizer.param_groups[0]["lr"],
            pairs_per_second=window.metrics.pairs / window.seconds,
            tokens_per_second=window.tokens / window.seconds,
            **learner.objective.drift_metrics(drift),
            **({"skipped_steps": progress.skipped_steps} if progress.skipped_steps else {}),
            **({"alarms": {alarm.name: alarm.text for alarm in alarms}} if alarms else {}),
            peak_memory_gib=peak_memory,
        )
        progress.window = Window()
        for alarm in alarms:
            self.reporter.warn(f"step {progress.step}: {alarm.text}")
        ruin = learner.monitor.ruin(drift)
        if ruin is not None:
            checkpoint = self.save()
            self.reporter.stop()
            self._show(self._assess())
            self._write_page()
            raise DivergedError(
                f"step {progress.step}: stopped by the monitor (monitor=stop), saved as {checkpoint}: {ruin.text}"
            )

    def evaluate(self) -> None:
        """Log the means over all held-out pairs with the verdict's intervals, and the means over each source's pairs.

        Besides, what generated answers show. A step that final/ may be of is saved.
        """
        held_out, step = self.material.data.held_out, self.progress.step
        if not held_out:
            return
        scores = self._score("evaluating pair", held_out)
        prompts = prompts_of(held_out)
        estimates = summarize(scores, self.learner.objective, prompts)
        means = {name: estimate.mean for name, estimate in estimates.items()}
        of_sources = by_source(scores, self.learner.objective, held_out)
        means |= {name: estimate.mean for name, estimate in with_sources(of_sources).items()}
        intervals = {name: estimates[name].ends() for name in WITH_INTERVALS}
        answers = self.samples.measure() if self.samples.prompts else MeasuredAnswers({})
        means |= {name: estimate.mean for name, estimate in answers.estimates.items()}
        intervals |= {name: estimate.ends() for name, estimate in answers.estimates.items()}
        number = {"samples/n": len(answers.rows)} if answers.rows else {}
        self.progress.evaluated[step] = self._write(
            "eval", means, **number, prompts=prompts.prompts, intervals95=intervals, peak_memory_gib=self._peak_memory()
        )
        if not math.isfinite(means["loss"]):
            self.reporter.warn(f"step {step}: the held-out loss is not finite")
        self.trackers.table(step, "evaluation", *evaluation_table(estimates | answers.estimates))
        if answers.rows:
            self._show_answers(answers)
        if self.choice.step == step < self.material.total_steps:
            self.save()

    def _show_answers(self, answers: MeasuredAnswers) -> None:
        step = self.progress.step
        self.engine.same(lambda: self.samples.write(step, answers.rows))
        self.reporter.say(describe_samples(step, answers.estimates))
        self.trackers.table(step, "samples", *samples_table(answers.rows))

    def _score(self, what: str, pairs: Sequence[TokenizedPair]) -> ScoredPairs:
        learner, context = self.learner, self.context
        scorer = Scorer(learner.policy, learner.objective, learner.reference, learner.batcher, context.engine)
        return score_pairs(scorer, pairs, context.poll, self.reporter.working(what, len(pairs)))

    def _write(self, split: str, means: dict[str, float], **more: Any) -> dict[str, Any]:
        """One line of metrics.jsonl, and the console's view of it; returns the line."""
        record: dict[str, Any] = {
            "step": self.progress.step,
            "epoch": round(self.progress.step / self.material.schedule.steps_per_epoch, 6),
            "split": split,
            **means,
            **more,
            "seconds": self.progress.seconds,
        }
        trouble = self.directory.metrics.append(record) if self.engine.rank == 0 else None
        if trouble is not None:
            self.reporter.warn(trouble)
        self.reporter.record(record)
        self.trackers.record(record)
        return record

    def _peak_memory(self) -> float | None:
        """In GiB, of the rank that has taken most."""
        here = peak_memory_gib(self.learner.batcher.device)
        return here if self.engine.alone or here is None else self.engine.agree(int(here * 2**30)) / 2**30

    # Checkpoints

    def save(self, rng: dict[str, Tensor] | None = None) -> Path:
        """Write a checkpoint of the run as it stands after its last complete step."""
        learner, progress, policy = self.learner, self.progress, self.learner.policy
        learner.guard.look()
        trained = trainable(policy)
        require_finite(trained, progress.step, self.engine)
        records = self.engine.same(self._flushed)  # a checkpoint counts lines: they must be there after a power cut
        window = progress.window
        state = TrainingState(
            step=progress.step,
            seconds=progress.seconds,
            sums=window.metrics.sums(),
            sums_pairs=window.metrics.pairs,
            sums_tokens=window.tokens,
            sums_seconds=window.seconds,
            records=records,
            skipped_steps=progress.skipped_steps,
            data_fingerprint=self.material.data.train.fingerprint,
            model_fingerprint=learner.fingerprint,
            settings=learner.settings,
            alarms_sounded=learner.monitor.sounded,
        )
        state_of_optimizer = optimizer_tensors(policy, learner.optimizer, self.engine)
        checkpoint = Checkpoint(
            policy=policy,
            objective=learner.objective,
            weights=trained_weights(policy, self.engine),
            optimizer=gather(state_of_optimizer, self.directory.checkpoints, self.engine.rank == 0),
            rng=rng or rng_states(),
            window={"last_pairs": learner.monitor.state()},
            state=state,
        )
        keep, folder = self.context.config.keep_checkpoints, self.directory.checkpoints
        losses, chosen = progress.held_out_losses, self.choice.step
        return self.engine.same(lambda: save_checkpoint(folder, checkpoint, keep, losses, chosen))

    def _flushed(self) -> int:
        self.directory.metrics.flush()
        return self.directory.metrics.records

    def save_or_continue(self) -> None:
        """Write a checkpoint; where the disk has no room, say so and try again at the next interval."""
        try:
            self.save()
        except StorageError as error:
            self.reporter.warn(f"{error}; trying again at the next checkpoint")

    # The end

    def finish(self) -> None:
        """Evaluate, choose the step that final/ is of, write it, and say where everything is."""
        context, learner, progress, config = self.context, self.learner, self.progress, self.context.config
        total = self.material.total_steps
        if progress.step == total:  # else it has been evaluated, and ends there
            self.save()
            self._finish_objective()
            self.evaluate()
        final = self._final()
        checkpoint = self.directory.checkpoints / checkpoint_name(final.step)
        if final.step != progress.step:
            self.engine.same(lambda: self._check_kept(checkpoint, final))
            restore_weights(checkpoint, learner.policy, learner.objective)
        if final.step != total:
            self._finish_objective()
        weights = self.engine.same(lambda: weights_sha256(checkpoint))
        means = means_of(progress.evaluated.get(final.step))
        self.reporter.stop()
        self.engine.same(self.directory.metrics.flush)
        verdict = self._assess(weights, final)
        tensors = trained_weights(learner.policy, self.engine)
        self._write_page()  # before final/, which says that nothing is left to do
        self.engine.same(lambda: self._write_final(tensors, means, final))
        self.reporter.say()
        memory = f"peak memory {describe_peak_memory(learner.batcher.device)}"
        skipped = (
            f", {plural(progress.skipped_steps, 'update')} skipped as not finite" if progress.skipped_steps else ""
        )
        self.reporter.facts(
            [
                ("done", f"{plural(progress.step, 'step')} in {duration(progress.seconds)}, {memory}{skipped}"),
                ("adapter" if config.lora.enabled else "model", str(self.directory.final)),
                *([("final", f"step {final.step} of {total}: {final.reason}")] if config.choosing() else []),
                *([] if config.choosing() else self._best(final.step)),
                *describe_replay(config, weights),
                *([("page", str(self.directory.page))] if config.page and self.directory.page.is_file() else []),
                ("next", learner.objective.next_command(context.directory.path)),
            ]
        )
        self._show(verdict)
        ended = {"status": "finished", "final": str(self.directory.final), "verdict": verdict.as_dict()}
        self.trackers.finish({**ended, "held_out": means, "final_step": final.step, "final_reason": final.reason})

    def _write_page(self) -> None:
        """Write report.html; a run that could not is as good without."""
        if self.context.config.page and self.engine.rank == 0:
            try:
                write_page(self.directory)
            except DpoError as error:
                self.reporter.warn(str(error))

    def _finish_objective(self) -> None:
        said = self.learner.objective.finish(self.learner.policy, self._first_scores)
        if said:
            self.reporter.say(said)

    def _final(self) -> "Final":
        """The step that final/ is of; DivergedError where no evaluation was within the budget."""
        config, step, choice = self.context.config, self.progress.step, self.choice
        if not config.choosing():
            return Final(step, "the last step")
        if choice.step is not None:
            return Final(choice.step, choice.reason)
        self.reporter.stop()
        self._show(self._assess())
        self._write_page()
        raise DivergedError(
            f"step {step}: {choice.reason}; so there is no final/. Start again with a smaller optimizer.lr "
            f"({config.optimizer.lr / 10:g}), or with a smaller eval_every, which stops earlier"
        )

    def _check_kept(self, checkpoint: Path, final: "Final") -> None:
        """CheckpointError where the step that final/ is to hold was not kept, or its checkpoint is damaged."""
        if not checkpoint.exists():
            raise CheckpointError(
                f"{checkpoint}: is not there, and final/ would be of it ({final.reason}); resume as the run began, or "
                f"without {', '.join(self.context.config.choosing())}"
            )
        validate(checkpoint)

    def _first_scores(self, number: int) -> ResponseScores:
        return self._score("scoring pair", self.material.data.train[:number]).policy

    def _best(self, step: int) -> list[tuple[str, str]]:
        """The checkpoint with the lowest held-out loss, where that is not the step that final/ is of."""
        losses = self.progress.held_out_losses
        best, end = best_checkpoint(self.directory.checkpoints, losses), losses.get(step)
        if best is None or end is None or best[1] >= end:
            return []
        there = "at the end" if step == self.progress.step else f"at step {step}"
        return [("best", f"{best[0]}: held-out loss {significant(best[1])}, {there} {significant(end)}")]

    def _assess(self, weights: str | None = None, final: "Final | None" = None) -> Verdict:
        """How the run went, by its metrics up to the step that final/ is of; kept in the manifest."""
        config, data = self.context.config, self.material.data
        records = self.engine.same(self.directory.metrics.read)
        records = [record for record in records if final is None or record["step"] <= final.step]
        objective, leaks = self.learner.objective, data.held_out_report.leaks or NO_LEAKS
        history = History.of(
            records, len(data.held_out), config.optimizer.lr, objective.beta, objective.start_loss, leaks
        )
        verdict = assess(history, objective.findings)
        ended = {
            "weights_sha256": weights, "skipped_steps": self.progress.skipped_steps, "verdict": verdict.as_dict(),
            **({"final": vars(final)} if final is not None else {}),
        }  # fmt: skip
        self.engine.same(lambda: self.directory.write_manifest({**self.directory.read_manifest(), **ended}))
        return verdict

    def _show(self, verdict: Verdict) -> None:
        self.reporter.say(f"verdict  {verdict.color}: {verdict.summary}", style=verdict.color)
        for finding in verdict.findings:
            self.reporter.say(f"  {finding.name}: {finding.reason}", style=finding.color)
            self.reporter.say(f"    next: {finding.next_step}")

    def _write_final(self, tensors: dict[str, Tensor], means: dict[str, float] | None, final: "Final") -> None:
        """Write final/ under another name, then rename it: final/ is complete or absent."""
        config, learner, material = self.context.config, self.learner, self.material

        def write(beside: Path) -> None:
            save_policy(learner.policy, beside, learner.objective, tensors)
            if config.model.adapter is not None:  # without it the adapter would sit on the wrong base
                note = json.dumps({"sft_adapter": config.model.adapter})
                (beside / START_FILE).write_text(note, encoding="utf-8")
            try:
                material.encoder.tokenizer.save_pretrained(str(beside))
            except Exception as error:  # the tokenizers library has no kind of its own for a full disk
                raise OSError(str(error)) from None
            card = model_card(
                config, material.source, learner.fingerprint, material.encoder, learner.objective, means,
                len(material.data.train),
                f"The weights are those of step {final.step} of {material.total_steps}: {final.reason}"
                if config.choosing() else "",
            )  # fmt: skip
            (beside / "README.md").write_text(card, encoding="utf-8")

        try:
            write_folder(self.directory.final, write)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{self.directory.final}: cannot be written ({safe_text(error)})") from None
