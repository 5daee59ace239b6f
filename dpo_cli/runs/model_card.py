"""The model card of a finished run: final/README.md, with how to load what was trained."""

from dpo_cli.config.schema import RunConfig
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
        "- reward-model" if config.objective == "reward" else "- dpo",
        "- preference-tuning",
        "---",
        "",
        f"# {name}, {'a reward model' if config.objective == 'reward' else 'tuned with DPO'}",
        "",
        f"Trained by dpo-cli on {pairs:,} preference pairs (`{safe_text(config.data.train)}`) with "
        f"{_loss_in_words(config)}, learning rate {significant(config.optimizer.lr)}, "
        f"seed {config.seed}. The full config is `config.yaml` in the run directory.",
        "",
    ]
    if metrics:
        lines += ["| held-out metric | mean |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in sorted(metrics.items())]
        lines.append("")
    lines += ["```python", *_loading_code(config, source), "```", ""]
    return "\n".join(lines)


def _loss_in_words(config: RunConfig) -> str:
    if config.objective == "reward":
        return "the Bradley-Terry loss -log sigmoid(r+ - r-)"
    return f"the {config.loss.name} loss, beta {significant(config.beta)}"


def _loading_code(config: RunConfig, source: ModelSource) -> list[str]:
    if config.objective == "reward":
        return _reward_code(config, source)
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


def _reward_code(config: RunConfig, source: ModelSource) -> list[str]:
    code = [
        "from peft import PeftModel",
        "from safetensors.torch import load_file",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{safe_text(source.path)}")',
    ]
    if config.model.adapter:
        code.append(f'model = PeftModel.from_pretrained(model, "{safe_text(config.model.adapter)}").merge_and_unload()')
    return [
        *code,
        'model = PeftModel.from_pretrained(model, "final").eval()',
        'head = load_file("final/reward_head.safetensors")',
        "# input_ids: prompt and response by the model's template, up to the token that closes the response",
        "hidden = model.get_base_model().get_decoder()(input_ids=input_ids).last_hidden_state[:, -1]",
        'reward = hidden.float() @ head["weight"] - head["center"]',
    ]
