"""What a run shows before it starts: which weights, which data, which decisions, and why."""

from typing import Any

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.batches import Layout
from dpo_cli.models.adapters import parameter_counts
from dpo_cli.models.quantization import quantized_layers
from dpo_cli.objectives.objective import Objective
from dpo_cli.training.parts import Choices, Context, Learner, Material

SHOWN_TOKENS = 160  # of a long prompt: its end, where the response begins


def millions(number: int) -> str:
    """A parameter count: 16,384, 4.88M, 1.54B."""
    if number >= 1e9:
        return f"{significant(number / 1e9)}B"
    return f"{significant(number / 1e6)}M" if number >= 1e6 else f"{number:,}"


def describe_policy(config: RunConfig, objective: Objective, policy: Any) -> str:
    """What trains, and how much of it."""
    trainable, total = parameter_counts(policy)
    share = f"{millions(trainable)} of {millions(total)} parameters train ({100 * trainable / total:.2g}%)"
    if not config.lora.enabled:
        return f"every weight: {share}"
    where = config.lora.target_modules
    modules = "all linear layers" if where == "all-linear" else ", ".join(where)
    return f"LoRA r={config.lora.r} alpha={significant(config.lora.alpha)} on {modules}{objective.trains}: {share}"


def describe_quantization(config: RunConfig, policy: Any) -> list[tuple[str, str]]:
    """How many of the base's weights are packed: experts that are one parameter, for example, are not."""
    layers = quantized_layers(policy).values()
    if not layers:
        return []
    packed = sum(layer.in_features * layer.out_features for layer in layers)
    trainable, total = parameter_counts(policy)
    share = f"{packed / (total - trainable):.0%} of the base's {millions(total - trainable)} parameters"
    return [("", f"{config.model.quantization}: {plural(len(layers), 'linear layer')} packed, {share}")]


def _describe_optimizer(config: RunConfig, steps: int) -> str:
    options = config.optimizer
    warmup = plural(options.warmup_steps, "warm-up step")
    if options.warmup_steps >= steps:
        warmup += f" (the run has only {plural(steps, 'step')}, all below the full lr)"
    clip = f"max_grad_norm {significant(config.max_grad_norm)}"
    return f"{options.name}, lr {significant(options.lr)} {options.schedule}, {warmup}, {clip}"


def show_header(context: Context, learner: Learner, material: Material, choices: Choices, reference: str) -> None:
    """Print the header: one fact a line, then one pair as the model sees it."""
    config, reporter, encoder, data = context.config, context.reporter, material.encoder, material.data
    steps = material.total_steps
    closing = encoder.tokenizer.decode([encoder.closing])
    dtype_name = str(choices.dtype.value).removeprefix("torch.")
    rows = [
        ("model", f"{safe_text(material.source.name)} ({material.source.origin})"),
        ("policy", describe_policy(config, learner.objective, learner.policy)),
        ("reference", learner.objective.describe_reference(config)),
        ("", reference),
        ("device", f"{choices.device.value}: {choices.device.reason}"),
        *(
            []
            if context.engine.world_size == 1
            else [("engine", f"{config.engine.name}: {context.engine.description}")]
        ),
        ("memory", choices.memory),
        ("dtype", f"{dtype_name}: {choices.dtype.reason}" + ("; adapters float32" if config.lora.enabled else "")),
        *describe_quantization(config, learner.policy),
        ("objective", learner.objective.describe()),
        ("optimizer", _describe_optimizer(config, steps)),
        ("template", f"{encoder.kind}: {encoder.reason}; {safe_text(closing)} closes a response"),
    ]
    if mixture := data.describe_mixture():
        rows.append(("mixture", mixture))
    for name, report in data.reports():
        for number, sentence in enumerate(report.sentences(config.data.max_length)):
            rows.append((name if number == 0 else "", sentence))
    closed = (
        "closed all the same, for the head is read there" if encoder.always_closes else "left without a closing EOS"
    )
    for number, words in (
        (encoder.borders_merged, "encoded apart from the prompt, so that no token spans the border"),
        (
            encoder.rendered_otherwise,
            "whose prompt the template renders otherwise with an answer: trained as it is asked",
        ),
        (encoder.length_limited, f"with finish_reason length: {closed}"),
        (encoder.closing_inside, f"with the closing token {safe_text(closing)} in the middle"),
    ):
        if number:
            rows.append(("", f"{plural(number, 'response')} {words}"))
    epochs = steps / material.schedule.steps_per_epoch
    size = f"{plural(steps, 'step')} of {plural(config.batch_size, 'pair')}"
    rows.append(("steps", f"{size}, {significant(epochs)} epochs"))
    layout = "padded rows" if learner.batcher.layout is Layout.PADDED else "packed, every prompt once"
    rows.append(("batches", f"{layout}: {choices.layout.reason}"))
    rows.append(("", choices.split))
    rows.append(("run", safe_text(context.directory.path)))
    if config.model.trust_remote_code:
        reporter.say("model.trust_remote_code=true: Python of the model's authors runs on this machine", style="red")
    reporter.facts(rows)
    if data.held_out_report.leaks:
        reporter.warn(data.held_out_report.leaks.warning)
    first = data.train[0]
    decode = encoder.tokenizer.decode
    ellipsis = "... " if len(first.prompt) > SHOWN_TOKENS else ""
    reporter.say()
    reporter.pair(
        ellipsis + decode(first.prompt[-SHOWN_TOKENS:]), decode(first.chosen), decode(first.rejected), closing
    )
    reporter.say()
