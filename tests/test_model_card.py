"""The model card: code that runs as it stands, and nothing of the machine it was written on."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.models.builtin import SMOLLM2
from dpo_cli.runs.model_card import portable

Trained = Callable[..., Path]


def code_of(run: Path, places: dict[str, str]) -> str:
    """The Python of the card, with what the reader must fill in."""
    card = (run / "final" / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    assert set(re.findall(r'"path/to/([^"]+)"', code)) == set(places)
    for name, place in places.items():
        code = code.replace(f"path/to/{name}", place)
    return code


@pytest.mark.parametrize("words", [[], ["data.template=plain"], ["lora=off", "optimizer.lr=1e-3"]])
def test_the_code_of_the_model_card_loads_and_asks_the_model(
    trained: Trained,
    tiny_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    run = trained("run", *words)
    code = code_of(run, {} if "lora=off" in words else {"tiny-random": tiny_path})
    capsys.readouterr()
    monkeypatch.chdir(run)
    names: dict[str, Any] = {}
    exec(code, names)
    asked = "What is a rainbow?"
    if not words or "lora=off" in words:
        asked = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer, given, answer = names["tokenizer"], names["inputs"]["input_ids"], names["answer"]
    assert tokenizer.decode(given[0]) == asked
    assert torch.equal(answer[:, : given.shape[1]], given) and answer.shape[1] > given.shape[1]
    assert capsys.readouterr().out == tokenizer.decode(answer[0, given.shape[1] :], skip_special_tokens=True) + "\n"


def test_a_card_names_no_path_of_the_machine(trained: Trained, tiny_path: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "my \"SFT' model")
    base = f"model.name_or_path={tmp_path / 'my'} \"SFT' model"
    sft = trained("sft", base)
    run = trained("run", base, f"model.adapter={sft / 'final'}")
    card = (run / "final" / "README.md").read_text()
    assert str(tmp_path) not in card and tiny_path not in card
    assert "\nbase_model: my-SFT-model\n" in card and "(`path/to/pairs.jsonl`)" in card
    assert re.search(
        r"^Base model: my-SFT-model \(local folder\), fingerprint of its weights `[0-9a-f]{32}-[0-9a-f]{16}`\. "
        r"License: see the base model\.$", card, re.MULTILINE,
    )  # fmt: skip
    names: dict[str, Any] = {}
    code = code_of(run, {"my-SFT-model": tiny_path, "final": str(sft / "final")})
    exec(code.replace('"final"', f'"{run / "final"}"'), names)
    assert names["answer"].shape[1] > 0


def test_names_of_the_hub_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert [portable(name) for name in (SMOLLM2, "sample:train")] == [SMOLLM2, "sample:train"]
    (tmp_path / "b").mkdir()
    assert portable("b") == portable(str(tmp_path / "b")) == "path/to/b"
