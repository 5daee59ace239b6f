"""What a run tells before it begins: which weights, which data, which decisions, and why."""

from typing import Any

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.batches import Way
from dpo_cli.models.loading import parameter_counts
from dpo_cli.training.run import Run

SHOWN_TOKENS = 160  # of a long prompt, its end is what matters


def millions(number: int) -> str:
    """A parameter count: 16,384, 4.88M, 1.54B."""
    if number >= 1e9:
        return f"{significant(number / 1e9)}B"
    return f"{significant(number / 1e6)}M" if number >= 1e6 else f"{number:,}"


def reference_in_words(config: RunConfig) -> str:
    """Which weights the policy is held to."""
    start = "the SFT model" + (f" with the adapter {safe_text(config.model.adapter)}" if config.model.adapter else "")
    if config.objective == "reward":
        return "none: a reward model is held to nothing"
    if config.reference.name == "adapter_off":
        return f"{start}: the policy's own base weights with the adapter switched off"
    if config.reference.cache != "off" and not config.dry_run:
        return f"{start}, frozen; loaded a second time only where its log-probs are not on disk"
    return f"{start}, loaded a second time and frozen"


def policy_in_words(config: RunConfig, policy: Any) -> str:
    """What trains, and how much of it."""
    trainable, total = parameter_counts(policy)
    share = f"{millions(trainable)} of {millions(total)} parameters train ({100 * trainable / total:.2g}%)"
    if not config.lora.enabled:
        return f"every weight: {share}"
    where = config.lora.target_modules
    modules = "all linear layers" if where == "all-linear" else ", ".join(where)
    head = " and a reward head" if config.objective == "reward" else ""
    return f"LoRA r={config.lora.r} alpha={significant(config.lora.alpha)} on {modules}{head}: {share}"


def _objective_in_words(config: RunConfig) -> str:
    if config.objective == "reward":
        return "a Bradley-Terry reward model: -log sigmoid(r+ - r-), the head read at the closing token, starting at 0"
    return f"{config.loss.name} loss, beta {significant(config.beta)}"


def _optimizer_in_words(config: RunConfig, steps: int) -> str:
    dials = config.optimizer
    warmup = plural(dials.warmup_steps, "warm-up step")
    if dials.warmup_steps >= steps:
        warmup += " (as many as the run or more: this rate is never reached)"
    clip = f"max_grad_norm {significant(config.max_grad_norm)}"
    return f"{dials.name}, lr {significant(dials.lr)} {dials.schedule}, {warmup}, {clip}"


def show_header(run: Run, cut: str, reference: str, memory: str) -> None:
    """Print the header: one fact a line, then one pair as the model sees it."""
    config, encoder, data, reporter = run.config, run.encoder, run.data, run.reporter
    closing = encoder.tokenizer.decode([encoder.closing])
    dtype_name = str(run.dtype.value).removeprefix("torch.")
    rows = [
        ("model", f"{safe_text(run.source.name)} ({run.source.origin})"),
        ("policy", policy_in_words(config, run.policy)),
        ("reference", reference_in_words(config)),
        ("", reference),
        ("device", f"{run.device}: {run.device_reason}"),
        ("memory", memory),
        ("dtype", f"{dtype_name}: {run.dtype.reason}" + ("; adapters float32" if config.lora.enabled else "")),
        ("objective", _objective_in_words(config)),
        ("optimizer", _optimizer_in_words(config, run.total_steps)),
        ("template", f"{encoder.kind}: {encoder.reason}; {safe_text(closing)} closes a response"),
    ]
    for name, report in data.reports():
        for place, sentence in enumerate(report.sentences(config.data.max_length)):
            rows.append((name if place == 0 else "", sentence))
    closed = "closed all the same, as the head reads there" if encoder.always_closes else "left without a closing EOS"
    for number, words in (
        (encoder.borders_merged, "encoded apart from the prompt, lest a token straddle the border"),
        (encoder.cut_when_drawn, f"cut when drawn: {closed}"),
        (encoder.closing_inside, f"with the closing token {safe_text(closing)} in the middle"),
    ):
        if number:
            rows.append(("", f"{plural(number, 'response')} {words}"))
    epochs = run.total_steps / run.schedule.steps_per_epoch
    size = f"{plural(run.total_steps, 'step')} of {plural(config.batch_size, 'pair')}"
    rows.append(("steps", f"{size}, {significant(epochs)} epochs"))
    layout = "padded rows" if run.batching.way is Way.PADDED else "packed, every prompt once"
    rows.append(("batches", f"{layout}: {run.batching_reason}"))
    rows.append(("", cut))
    rows.append(("run", safe_text(run.directory.path)))
    if config.model.trust_remote_code:
        reporter.say("model.trust_remote_code=true: Python of the model's authors runs on this machine", style="red")
    reporter.facts(rows)
    first = data.train[0]
    decode = encoder.tokenizer.decode
    ellipsis = "... " if len(first.prompt) > SHOWN_TOKENS else ""
    reporter.say()
    reporter.pair(
        ellipsis + decode(first.prompt[-SHOWN_TOKENS:]), decode(first.chosen), decode(first.rejected), closing
    )
    reporter.say()
