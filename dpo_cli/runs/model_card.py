"""The model card of a finished run: final/README.md, with how to load what was trained."""

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.text import safe_text, significant
from dpo_cli.models.loading import ModelSource
from dpo_cli.objectives.objective import Objective


def model_card(
    config: RunConfig, source: ModelSource, objective: Objective, metrics: dict[str, float] | None, pairs: int
) -> str:
    """Markdown with PEFT's front matter, the options of the run, its held-out metrics, and loading code."""
    card = objective.card(config, source.path)
    name = safe_text(source.name)
    library = "peft" if config.lora.enabled else "transformers"
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {name}",
        "tags:",
        f"- {card.tag}",
        "- preference-tuning",
        "---",
        "",
        f"# {name}, {card.title}",
        "",
        f"Trained by dpo-cli on {pairs:,} preference pairs (`{safe_text(config.data.train)}`) with "
        f"{card.loss}, learning rate {significant(config.optimizer.lr)}, "
        f"seed {config.seed}. The full config is `config.yaml` in the run directory.",
        "",
    ]
    if metrics:
        lines += ["| held-out metric | mean |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in sorted(metrics.items())]
        lines.append("")
    lines += ["```python", *card.code, "```", ""]
    return "\n".join(lines)
