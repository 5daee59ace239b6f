"""The model card of a finished run: final/README.md, with code that loads the trained model and asks it a question.

It is copied with the weights, so it names no path of this machine: a local path is written `path/to/NAME`.
"""

import re
from dataclasses import replace
from pathlib import Path

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.text import safe_text, significant
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.models.builtin import SMOLLM2
from dpo_cli.models.loading import ModelSource
from dpo_cli.objectives.objective import Objective


def model_card(
    config: RunConfig,
    source: ModelSource,
    fingerprint: str,
    encoder: PairEncoder,
    objective: Objective,
    metrics: dict[str, float] | None,
    pairs: int,
    chosen: str = "",
) -> str:
    """Markdown with PEFT's front matter, the options of the run, its held-out metrics, and code.

    `fingerprint` is that of the base model's weights, `encoder` how its texts became tokens. `chosen` says which step
    the weights are of and why, where the run chose it.
    """
    base = source.name if source.name == SMOLLM2 else portable(source.path, source.name)
    sft_adapter = config.model.adapter and portable(config.model.adapter, config.model.adapter)
    card = objective.card(replace(config, model=replace(config.model, adapter=sft_adapter)), base)
    on_hub = not base.startswith("path/to/")
    name = base if on_hub else base.removeprefix("path/to/")
    library = "peft" if config.lora.enabled else "transformers"
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {name}",
        *(["license: apache-2.0"] if base == SMOLLM2 else []),
        "tags:",
        f"- {card.tag}",
        "- preference-tuning",
        "---",
        "",
        f"# {name}, {card.title}",
        "",
        f"Trained by dpo-cli on {pairs:,} preference pairs ({_data(config)}) with "
        f"{card.loss}, learning rate {significant(config.optimizer.lr)}, "
        f"seed {config.seed}. The full config is `config.yaml` in the run directory.",
        "",
        *([f"{safe_text(chosen)}.", ""] if chosen else []),
        f"Base model: {name}{f', revision {safe_text(config.model.revision)}' if config.model.revision else ''} "
        f"({safe_text(source.origin)}), fingerprint of its weights `{fingerprint}`. License: see the base model.",
        "",
    ]
    method = config.model.quantization
    if method != "none":
        lines += [
            f"While the adapter trained, the base was packed to {method} (`model.quantization={method}`). The code "
            "below loads the base as it is, so log-probs differ a little from those of training.",
            "",
        ]
    if metrics:
        lines += ["| held-out metric | mean |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in sorted(metrics.items())]
        lines.append("")
    lines += ["Load it, in the run directory; elsewhere `final` is the folder of this file"]
    lines[-1] += ", and `path/to/` is where you keep what it names:" if "path/to/" in "".join(card.code) else ":"
    lines += ["", "```python", *card.code, "```", ""]
    if objective.generates:
        lines += ["Ask it:", "", "```python", *asking_code(encoder), "```", ""]
    return "\n".join(lines)


def _data(config: RunConfig) -> str:
    """What the run was trained on: each file or data set, of a mixture after the name of its source."""
    parts = []
    for name, part in config.data.parts().items():
        places = [part.train] if isinstance(part.train, str) else part.train or []
        parts += [f"{name}: `{portable(place)}`" if name else f"`{portable(place)}`" for place in places]
    return ", ".join(parts)


def portable(place: str, name: str | None = None) -> str:
    """A name on the hub as it is; a local path with its last part alone: `path/to/my-sft`.

    `name` is shown instead of `place` where the two differ.
    """
    name = name or place
    if not place.startswith(("/", ".", "~")) and not Path(place).exists():
        return safe_text(name)
    return f"path/to/{re.sub(r'[^A-Za-z0-9._-]+', '-', safe_text(Path(name).name))}"


def asking_code(encoder: PairEncoder, folder: str = "final") -> list[str]:
    """Python that asks `model` as it was trained: with the same template, up to the token that ended its responses.

    `folder` is where its tokenizer lies.
    """
    question = "What is a rainbow?"
    ask = [f'inputs = tokenizer("{question}", return_tensors="pt")']
    if encoder.kind == "chat":
        ask = [
            f'messages = [{{"role": "user", "content": "{question}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    return [
        "from transformers import AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        *ask,
        f"answer = model.generate(**inputs, max_new_tokens=100, do_sample=False, eos_token_id={encoder.closing})",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
