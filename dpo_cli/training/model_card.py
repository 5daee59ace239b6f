"""The model card of a finished run: final/README.md, with how to load what was trained."""

from dpo_cli.config import RunConfig
from dpo_cli.console.text import safe_text, significant
from dpo_cli.models.loading import ModelSource


def model_card(config: RunConfig, source: ModelSource, metrics: dict[str, float] | None, pairs: int) -> str:
    """Markdown with PEFT's front matter, the dials of the run, its held-out metrics, and loading code."""
    name = safe_text(source.name)
    library = "peft" if config.lora.enabled else "transformers"
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {name}",
        "tags:",
        "- dpo",
        "- preference-tuning",
        "---",
        "",
        f"# {name}, tuned with DPO",
        "",
        f"Trained by dpo-cli on {pairs:,} preference pairs (`{safe_text(config.data.train)}`) with the "
        f"{config.loss.name} loss, beta {significant(config.beta)}, learning rate {significant(config.optimizer.lr)}, "
        f"seed {config.seed}. The full config is `config.yaml` in the run directory.",
        "",
    ]
    if metrics:
        lines += ["| held-out metric | mean |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in sorted(metrics.items())]
        lines.append("")
    lines += ["```python", *_loading_code(config, source), "```", ""]
    return "\n".join(lines)


def _loading_code(config: RunConfig, source: ModelSource) -> list[str]:
    if not config.lora.enabled:
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("final")',
        ]
    code = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{safe_text(source.path)}")',
    ]
    if config.model.adapter:
        code.append("# The SFT adapter is part of the start: fold it in first.")
        code.append(f'model = PeftModel.from_pretrained(model, "{safe_text(config.model.adapter)}").merge_and_unload()')
    return [*code, 'model = PeftModel.from_pretrained(model, "final")']
