"""Small random models of many families, and pairs of random tokens for them."""

from typing import Any

import numpy as np
import torch

from dpo_cli.config.schema import LoraConfig
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.models.loading import disable_dropout

CPU = torch.device("cpu")
VOCABULARY = 61
LORA = LoraConfig(enabled=True, r=4, alpha=8.0, dropout=0.0, target_modules="all-linear")

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip

# What a family needs besides, so that its peculiarities bind on pairs of some thirty tokens.
PECULIAR: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen3_next": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
}  # fmt: skip


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A small random model of a family, in float32 and eval mode, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **PECULIAR.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger weights, so that differences show
        for parameter in model.parameters():
            parameter.mul_(3.0)
    disable_dropout(model)
    return model.eval()


def pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> TokenizedPair:
    """A pair of random tokens of the lengths given."""
    random = np.random.default_rng(seed)
    ids = (token_ids(random.integers(2, VOCABULARY, size).tolist()) for size in (prompt, chosen, rejected))
    return TokenizedPair(*ids, index=seed, key=str(seed), group=seed)
