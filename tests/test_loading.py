"""What a model's own files may ask for when it is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU
from transformers import Gemma3Config

from dpo_cli.config.schema import ModelConfig
from dpo_cli.models.builtin import TINY, resolve_builtin
from dpo_cli.models.loading import ModelSource, load_model, use_stock_attention


def source_at(path: Path | str) -> ModelSource:
    given = ModelConfig(
        name_or_path=str(path), revision=None, dtype="auto", quantization="none", adapter=None, trust_remote_code=False
    )
    return ModelSource(given, str(path), "local")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["somebody/kernel", "kernels-community/flash-attn2", "flash_attention_2"])
def test_an_attention_that_a_config_names_is_not_fetched(
    tiny_path: str, tmp_path: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*arguments: Any, **more: Any) -> None:
        raise AssertionError(f"asked for the attention kernel {arguments}")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    shutil.copytree(tiny_path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    ids = torch.arange(3, 20)[None]
    model, stock = (load_model(source_at(path), torch.float32, CPU) for path in (tmp_path / "model", tiny_path))
    assert model.config._attn_implementation == stock.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_neither_is_one_of_a_part_and_eager_is_kept() -> None:
    config = Gemma3Config()
    config._attn_implementation = "eager"
    config.text_config._attn_implementation = "somebody/kernel"
    use_stock_attention(config)
    assert (config._attn_implementation, config.text_config._attn_implementation) == ("eager", None)
    assert config.vision_config._attn_implementation == "eager"


def test_a_built_in_model_is_whole_whichever_rank_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers saves a model on rank 0 alone; ranks on several computers have a cache each."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda *_: 1)
    folder = Path(resolve_builtin(TINY, print)[0])
    assert folder.parent == tmp_path
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
