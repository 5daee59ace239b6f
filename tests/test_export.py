"""dpo-export: what plain transformers loads from the folder is the checkpoint, or there is no folder."""

import json
import re
import resource
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from conftest import Ended
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo_cli.commands import export as export_module
from dpo_cli.commands import exported_folder
from dpo_cli.commands.serving import Served, serving_commands
from dpo_cli.errors import CheckpointError
from dpo_cli.evaluation.agreement import Difference, agree, difference
from dpo_cli.models.builtin import SMOLLM2
from dpo_cli.models.merging import Adapter, join, merge, put_on, round_weights, write_adapter
from dpo_cli.runs.export_card import escaped

Command = Callable[..., Ended]
Trained = Callable[..., Path]
FAST = "optimizer.lr=1e-2"  # three steps move the tiny model by several nats


def exported(command: Command, checkpoint: Path, to: Path, *words: object) -> str:
    ended = command("dpo-export", f"checkpoint={checkpoint}", f"to={to}", "check=3", *words)
    assert ended.code == 0, ended.err
    return ended.out


def refused(command: Command, code: int, *words: object) -> str:
    ended = command("dpo-export", *words, "check=3")
    assert ended.code == code and ended.err.count("\n") == 1, ended.err + ended.out
    return ended.err.removeprefix("error: ").rstrip("\n")


def logits(model: Any, vocabulary: int = VOCABULARY) -> Tensor:
    ids = torch.randint(2, vocabulary, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


def plain(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def nothing_beside(folder: Path) -> bool:
    return not folder.exists() and not list(folder.parent.glob(".tmp-*"))


# The whole model


def test_the_folder_computes_what_the_adapter_computes(
    trained: Trained, command: Command, tiny_path: str, tmp_path: Path
) -> None:
    run, to = trained("run", FAST), tmp_path / "out" / "model"
    out = exported(command, run, to)
    expected = logits(PeftModel.from_pretrained(plain(tiny_path), str(run / "final")).eval(), 200)
    assert (logits(plain(to), 200) - expected).abs().max() < 1e-5
    assert (logits(plain(tiny_path), 200) - expected).abs().max() > 1e-2
    assert re.search(r"checked +reloaded with transformers [\d.]+ and compared with the checkpoint on 3 pairs", out)
    assert "vllm serve" in out and "--lora" not in out
    before, after = re.search(r"since the SFT model: (\S+) nats a pair in the checkpoint, (\S+) in", out).groups()  # type: ignore[union-attr]
    assert float(before) > 1 and after == before


def test_tokenizer_template_and_stop_tokens_are_those_of_training(
    trained: Trained, command: Command, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    exported(command, trained("run", FAST), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "<|im_start|>user\nGrüße  1,000<|im_end|>\n"
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == 2


def test_a_stop_token_of_training_that_the_base_lacks_is_added() -> None:
    for before, after in ((None, 7), (1, [7, 1]), ([1, 2], [7, 1, 2]), ([7, 1], [7, 1])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=before))
        exported_folder._set_stops(model, 7)
        assert model.generation_config.eos_token_id == after


def test_each_scale_is_its_share_of_the_change(
    trained: Trained, command: Command, tiny_path: str, tmp_path: Path
) -> None:
    run, name = trained("run", FAST), "model.layers.0.mlp.up_proj.weight"
    weights = {}
    for scale in (0.0, 0.5, 1.0):
        exported(command, run, tmp_path / f"at{scale}", f"scale={scale}")
        weights[scale] = load_file(tmp_path / f"at{scale}" / "model.safetensors")[name]
    base = load_file(Path(tiny_path) / "model.safetensors")[name]
    assert torch.equal(weights[0.0], base) and not torch.equal(weights[1.0], base)
    assert torch.allclose(weights[0.5] - base, (weights[1.0] - base) / 2, atol=1e-7)
    assert "scaled by 0.5" in (tmp_path / "at0.5" / "README.md").read_text()


def with_sft(trained: Trained) -> tuple[Path, Path]:
    """A run whose start is an SFT adapter, of another rank and with other layers; and that adapter."""
    sft = trained("sft", FAST, "lora.r=3", "lora.target_modules=[q_proj,down_proj]") / "final"
    return trained("run", FAST, f"model.adapter={sft}"), sft


def test_an_sft_adapter_is_folded_in(trained: Trained, command: Command, tiny_path: str, tmp_path: Path) -> None:
    run, sft = with_sft(trained)
    exported(command, run, tmp_path / "merged")
    out = exported(command, run, tmp_path / "adapter", "what=adapter")
    base = PeftModel.from_pretrained(plain(tiny_path), str(sft)).merge_and_unload()
    without = logits(PeftModel.from_pretrained(plain(tiny_path), str(run / "final")).eval(), 200)
    expected = logits(PeftModel.from_pretrained(base, str(run / "final")).eval(), 200)
    together = PeftModel.from_pretrained(plain(tiny_path), str(tmp_path / "adapter")).eval()
    for found in (logits(plain(tmp_path / "merged"), 200), logits(together, 200)):
        assert (found - expected).abs().max() < 1e-4 < 1e-2 < (found - without).abs().max()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (19, 19)  # 16 + 3, and nothing to scale
    assert "--enable-lora --max-lora-rank 32" in out and "--lora-modules adapter=" in out
    assert not (tmp_path / "adapter" / "dpo_start.json").exists()


@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_an_export_without_the_sft_adapter_is_refused(
    trained: Trained, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run, _ = with_sft(trained)
    last = property(lambda self: [Adapter(self.ref.weights)])
    monkeypatch.setattr(exported_folder.Subject, "adapters", last)
    said = refused(command, 4, f"checkpoint={run}", f"to={tmp_path / 'model'}", f"what={what}")
    assert said.startswith("the export is not the checkpoint: the ") and nothing_beside(tmp_path / "model")


def wrong_sign(model: Any, adapters: Sequence[Adapter]) -> Any:
    return merge(model, [Adapter(one.name, -one.scale) for one in adapters])


def not_at_all(model: Any, adapters: Sequence[Adapter]) -> Any:
    return model


def one_layer_less(model: Any, adapters: Sequence[Adapter]) -> Any:
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    merged = merge(model, adapters)
    merged.model.layers[1].mlp.up_proj.weight.data = before["model.layers.1.mlp.up_proj.weight"]
    return merged


@pytest.mark.parametrize("how", [wrong_sign, not_at_all, one_layer_less])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_is_refused_whatever_the_dtype(
    trained: Trained, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any, dtype: str
) -> None:
    run = trained("run", FAST)
    monkeypatch.setattr(exported_folder, "merge", how)
    said = refused(command, 4, f"checkpoint={run}", f"to={tmp_path / 'model'}", f"dtype={dtype}")
    assert "the merged model differs by up to" in said and nothing_beside(tmp_path / "model")


def test_a_folder_that_reloads_as_another_model_is_refused(
    trained: Trained, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = trained("run", FAST), exported_folder._plain

    def damaged(place: Any, *rest: Any) -> Any:
        file = Path(place) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.self_attn.v_proj.weight"] *= 1.01
        save_file(tensors, file, {"format": "pt"})
        return original(place, *rest)

    monkeypatch.setattr(exported_folder, "_plain", damaged)
    said = refused(command, 4, f"checkpoint={run}", f"to={tmp_path / 'model'}", "dtype=bfloat16")
    assert "the reloaded folder differs" in said and nothing_beside(tmp_path / "model")


@pytest.mark.parametrize("words", [[], ["model.quantization=nf4"]], ids=["alike", "packed"])
def test_the_adapter_is_reloaded_when_no_other_model_is_in_memory(
    trained: Trained, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    run, load, plain_model = trained("run", FAST, *words), exported_folder.load_model, exported_folder._plain
    loaded: list[weakref.ref[Any]] = []

    def noted(*what: Any) -> Any:
        model = load(*what)
        loaded.append(weakref.ref(model))
        return model

    def alone(*what: Any) -> Any:
        assert loaded and not [one for one in loaded if one() is not None]
        return plain_model(*what)

    monkeypatch.setattr(exported_folder, "load_model", noted)
    monkeypatch.setattr(exported_folder, "_plain", alone)
    exported(command, run, tmp_path / "adapter", "what=adapter")


def test_another_chat_template_is_refused(
    trained: Trained, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = trained("run", FAST), exported_folder.load_tokenizer

    def other(source: Any) -> Any:
        tokenizer = original(source)
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "bot")
        return tokenizer

    monkeypatch.setattr(exported_folder, "load_tokenizer", other)
    said = refused(command, 4, f"checkpoint={run}", f"to={tmp_path / 'model'}")
    assert "the reloaded tokenizer has another chat template" in said and nothing_beside(tmp_path / "model")


@pytest.mark.parametrize("words", [["dtype=bfloat16"], ["dtype=float16"], ["max_shard_size=50KB"]])
def test_dtype_and_shards_are_as_asked_for(
    trained: Trained, command: Command, tmp_path: Path, words: list[str]
) -> None:
    out = exported(command, trained("run", FAST), tmp_path / "model", *words)
    dtype = words[0].partition("=")[2] if "dtype" in words[0] else "float32"
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert {str(one.dtype) for file in files for one in load_file(file).values()} == {f"torch.{dtype}"}
    assert (f"rounding the weights to {dtype}" in out) == (dtype != "float32")
    assert (len(files) > 1) == (words == ["max_shard_size=50KB"])


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_adapter_of_a_packed_base_is_merged_into_the_unpacked_one(
    trained: Trained, command: Command, tiny_path: str, tmp_path: Path, method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = trained("run", FAST, f"model.quantization={method}")
    out = exported(command, run, tmp_path / "model")
    assert f"the adapter trained on the base packed to {method}" in out
    expected = PeftModel.from_pretrained(plain(tiny_path), str(run / "final")).eval()
    assert (logits(plain(tmp_path / "model"), 200) - logits(expected, 200)).abs().max() < 1e-5
    monkeypatch.setattr(exported_folder, "merge", not_at_all)
    said = refused(command, 4, f"checkpoint={run}", f"to={tmp_path / 'other'}")
    assert "the merged model differs" in said


def test_a_whole_model_is_exported_as_it_is(trained: Trained, command: Command, tmp_path: Path) -> None:
    run = trained("run", "lora=off", "optimizer.lr=1e-3")
    exported(command, run, tmp_path / "model")
    assert torch.equal(logits(plain(tmp_path / "model"), 200), logits(plain(run / "final"), 200))
    here = f"checkpoint={run}", f"to={tmp_path / 'other'}"
    assert "holds a whole model and no adapter" in refused(command, 2, *here, "what=adapter")
    assert "scale=0.5: is for an adapter" in refused(command, 2, *here, "scale=0.5")


def test_a_checkpoint_and_an_adapter_folder_are_exported_too(
    trained: Trained, command: Command, tmp_path: Path
) -> None:
    run = trained("run", FAST, "save_every=2", "max_steps=4", "eval_every=2")
    step = run / "checkpoints" / "step-00000002"
    exported(command, step, tmp_path / "two")
    assert "| steps | 2 of 4 |" in (tmp_path / "two" / "README.md").read_text()
    assert "the run's own evaluation at step 2" in (tmp_path / "two" / "README.md").read_text()
    shutil.copytree(run / "final", tmp_path / "alone")
    out = exported(command, tmp_path / "alone", tmp_path / "model")
    assert "(shipped pairs (data=sample))" in out
    names = [tmp_path / name / "model.safetensors" for name in ("two", "model")]
    first, second = map(load_file, names)
    assert any(not torch.equal(first[name], second[name]) for name in first)


# Arithmetic on families


def lora_on(model: Any, folder: Path, seed: int, **options: Any) -> Path:
    """A random adapter in a folder; the model is as before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True`")
        policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=random))
    policy.save_pretrained(str(folder), save_embedding_layers=False)
    policy.unload()
    return folder


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma2": {"tie_word_embeddings": True}, "gpt_neox": {}, "gpt2": {"fan_in_fan_out": True},
    "qwen2": {"tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_in_one_equal_the_two_in_turn(family: str, tmp_path: Path) -> None:
    options = dict(FAMILIES[family])
    fan = {"fan_in_fan_out": True} if options.pop("fan_in_fan_out", False) else {}
    model = tiny(family, **options)
    base = logits(model)
    layer = ("model.layers.1", "transformer.h.1", "gpt_neox.layers.1")
    parts = [name for name, part in model.named_modules() if name.startswith(layer) and hasattr(part, "weight")]
    some = [name.rpartition(".")[2] for name in parts if model.get_submodule(name).weight.ndim == 2]
    sft = lora_on(model, tmp_path / "sft", 1, r=3, lora_alpha=5, target_modules=some[:2], use_rslora=True, **fan)
    dpo = lora_on(model, tmp_path / "dpo", 2, r=4, lora_alpha=8, target_modules="all-linear",
                  rank_pattern={some[0]: 2}, alpha_pattern={some[0]: 7}, **fan)  # fmt: skip
    adapters = [Adapter(str(sft)), Adapter(str(dpo), 0.5)]
    rank = write_adapter(tmp_path / "both", model, adapters, "base", None)
    assert rank == 7 and torch.equal(logits(model), base)
    both = PeftModel.from_pretrained(model, str(tmp_path / "both")).eval()
    joined = logits(both)
    model = both.unload()
    merged = logits(merge(model, adapters))
    again = PeftModel.from_pretrained(tiny(family, **options), str(sft)).merge_and_unload()
    policy = PeftModel.from_pretrained(again, str(dpo)).eval()
    for part in policy.modules():
        if hasattr(part, "lora_A"):
            part.scaling["default"] *= 0.5
    in_turn = logits(policy)
    assert (joined - base).abs().max() > 0.1
    assert (joined - in_turn).abs().max() < 1e-4 and (merged - in_turn).abs().max() < 1e-4


def test_tied_weights_stay_tied_and_an_adapter_on_one_of_them_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    folder = lora_on(model, tmp_path / "one", 1, r=2, target_modules=["up_proj"])
    merged = merge(model, [Adapter(str(folder))])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    head = lora_on(merged, tmp_path / "head", 1, r=2, target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match="changes lm_head, whose weight is tied to another layer's"):
        merge(merged, [Adapter(str(head))])


def test_an_adapter_on_embeddings_is_joined_too(tmp_path: Path) -> None:
    model = tiny()
    folder = lora_on(model, tmp_path / "one", 1, r=2, target_modules=["embed_tokens", "q_proj"])
    write_adapter(tmp_path / "half", model, [Adapter(str(folder), 0.5)], "base", None)
    found = logits(PeftModel.from_pretrained(tiny(), str(tmp_path / "half")).eval())
    assert (found - logits(merge(tiny(), [Adapter(str(folder), 0.5)]))).abs().max() < 1e-4
    assert (found - logits(tiny())).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_changes_survive_rounding_at_random_and_not_to_the_nearest(dtype: torch.dtype) -> None:
    base = torch.randn(200, 500, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    change = 0.1 * base.abs() * torch.finfo(dtype).eps  # a tenth to a fifth of a step
    means = {}
    for at_random in (True, False):
        model = torch.nn.Linear(500, 200, bias=False)
        model.weight.data = base + change
        round_weights(model, dtype, at_random)
        assert model.weight.dtype == dtype
        off = (model.weight.float() - base).abs() / (base.abs() * torch.finfo(dtype).eps)
        assert off.max() <= 1.01 + 1e-3  # never more than a step
        means[at_random] = float((model.weight.detach().float() - base).mean() / change.mean())
    assert means[False] == 0 and means[True] == pytest.approx(1, abs=0.05)
    model.weight.data = base.clone()
    round_weights(model, dtype, True)
    assert torch.equal(model.weight.float(), base)  # what is such a number already stays


def test_weights_beyond_the_range_of_float16_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(1e6)
    with pytest.raises(CheckpointError, match="dtype=float16: weight has weights beyond its range"):
        round_weights(model, torch.float16, True)


def test_what_is_not_plain_lora_is_named(tmp_path: Path) -> None:
    model = tiny()
    dora = str(lora_on(model, tmp_path / "dora", 1, r=2, target_modules=["q_proj"], use_dora=True))
    plain_one = str(lora_on(model, tmp_path / "lora", 1, r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="is LoRA with use_dora; only plain LoRA can be joined or scaled"):
        join(model, [Adapter(dora), Adapter(plain_one)])
    with pytest.raises(CheckpointError, match=r"scale=0\.5: .* is LoRA with use_dora; only plain LoRA scales"):
        merge(tiny(), [Adapter(dora, 0.5)])
    policy = put_on(tiny(), Adapter(dora))
    expected = logits(policy.eval())
    assert (logits(merge(tiny(), [Adapter(dora)])) - expected).abs().max() < 1e-4


def test_agreement_counts_tokens_and_never_takes_what_is_not_finite() -> None:
    left, off = [torch.zeros(100)], [torch.full((100,), 5e-5)]
    assert agree(left, left) and not agree(left, off)  # 0.005 over 100 tokens: no random walk
    assert agree(left, off, Difference(0.0, 0.1)) and agree(left, [torch.tensor([5e-5, -5e-5]).repeat(50)])
    assert not agree(left, [torch.full((100,), float("nan"))], Difference(9.0, 9.0))
    found = difference(left, off)
    assert (found.token, found.response) == pytest.approx((5e-5, 5e-3))


# Refusals


def test_mistakes_end_as_one_line_and_nothing_is_written(trained: Trained, command: Command, tmp_path: Path) -> None:
    run = trained("run", FAST)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("")
    here = f"checkpoint={run}"
    new = f"to={tmp_path / 'new'}"
    for code, words, says in (
        (2, [here], "to=null: name a new folder, or hub:owner/name"),
        (2, [here, "to=hub:owner"], "to=hub:owner: must be hub:owner/name"),
        (2, [here, new, "yes=true"], "yes=true: is for to=hub:owner/name; leave it out"),
        (2, [here, new, "scale=1e300"], "scale=1e+300: must be in [-1000, 1000]"),
        (2, [here, new, "scale=inf"], "scale=inf: must be a finite number"),
        (2, [here, new, "max_shard_size=5"], "max_shard_size=5: must be a size, for instance 5GB or 500MB"),
        (2, [here, new, "what=adapter", "dtype=float32"],
         "dtype=float32: an adapter keeps the dtype it is stored in; leave it out with what=adapter"),
        (2, [here, f"to={full}"], f"to={full}: exists already, and is not an empty folder; name a new one"),
        (2, [here, f"to={run / 'final' / 'model'}"],
         f"to={run / 'final' / 'model'}: lies inside what is exported; name a folder elsewhere"),
        (7, [here, f"to={file / 'model'}"], f"to={file / 'model'}: cannot be written (Not a directory)"),
        (4, ["checkpoint=nowhere", new], "checkpoint=nowhere: no such directory; name a run directory, "
         "checkpoints/step-*, final/, a PEFT adapter directory or a model"),
    ):  # fmt: skip
        assert refused(command, code, *words) == says
    assert nothing_beside(tmp_path / "new") and list(full.iterdir()) == [full / "thesis.txt"]
    full.joinpath("thesis.txt").unlink()
    exported(command, run, full)


def test_a_reward_model_is_refused(trained: Trained, command: Command, tmp_path: Path) -> None:
    run = trained("run", "objective=reward")
    said = refused(command, 2, f"checkpoint={run}", f"to={tmp_path / 'model'}")
    assert "a reward model answers no prompts" in said and f"dpo-label by=reward judge={run}" in said


def test_an_adapter_of_another_base_is_refused(
    trained: Trained, command: Command, tiny_path: str, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_path, tmp_path / "base")
    run = trained("run", f"model.name_or_path={base}")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = refused(command, 4, f"checkpoint={run}", f"to={tmp_path / 'model'}")
    assert "holds other weights than when" in said and nothing_beside(tmp_path / "model")
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    alone = shutil.copytree(run / "final", tmp_path / "alone")
    tiny(hidden_size=64).save_pretrained(tmp_path / "large")
    shutil.copy(base / "tokenizer.json", tmp_path / "large")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "large")
    config["base_model_name_or_path"] = str(tmp_path / "large")
    (alone / "adapter_config.json").write_text(json.dumps(config))
    assert "does not fit the model" in refused(command, 4, f"checkpoint={alone}", f"to={tmp_path / 'model'}")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [5_000, 60_000])
@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_a_full_disk_leaves_nothing(trained: Trained, command: Command, tmp_path: Path, size: int, what: str) -> None:
    run = trained("run", FAST)
    exported(command, run, tmp_path / "first", f"what={what}")  # fills the cache of pairs
    largest = max(file.stat().st_size for file in (tmp_path / "first").iterdir())
    with files_up_to(min(size, largest - 1)):
        said = refused(command, 7, f"checkpoint={run}", f"to={tmp_path / 'deep' / 'model'}", f"what={what}")
    assert "cannot be written" in said and not (tmp_path / "deep").exists()


def test_too_little_disk_or_memory_is_said_before_anything_is_loaded(
    trained: Trained, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = trained("run", FAST), [f"to={tmp_path / 'model'}"]
    monkeypatch.setattr(exported_folder, "load_model", None)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "1e-06 GB are free" in refused(command, 7, f"checkpoint={run}", *words)
    monkeypatch.setattr("dpo_cli.models.memory.free_memory", lambda _: 1000)
    assert "take" in refused(command, 6, f"checkpoint={run}", *words) and nothing_beside(tmp_path / "model")


# The hub


class FakeApi:
    """What is sent to the hub, in the place of HfApi."""

    sent: list[Any]
    fails: dict[str, Exception]

    def whoami(self) -> dict[str, str]:
        self._do("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self._do("create_repo", repo_id, options)
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
        files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
        self._do("upload_folder", repo_id, files)

    def _do(self, what: str, *given: Any) -> None:
        if what in self.fails:
            raise self.fails[what]
        self.sent.append((what, *given))


def http_error(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://hub/api")
    return HfHubHTTPError(f"{status} Client Error", response=httpx.Response(status, request=request))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.sent, FakeApi.fails = [], {}
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_" + "x" * 30)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return FakeApi


def test_nothing_is_sent_without_yes_and_what_would_go_is_listed(
    trained: Trained, command: Command, hub: type[FakeApi]
) -> None:
    ended = command("dpo-export", f"checkpoint={trained('run', FAST)}", "to=hub:me/my-model", "check=2")
    assert ended.code == 0, ended.err
    assert hub.sent == [] and re.search(r"^model\.safetensors +0\.\d+$", ended.out, re.M)
    assert "would go to me/my-model (private); nothing was uploaded. To upload, add yes=true" in ended.out


@pytest.mark.parametrize("private", [True, False])
def test_with_yes_the_checked_folder_goes_to_a_new_repository(
    trained: Trained, command: Command, hub: type[FakeApi], tmp_path: Path, private: bool
) -> None:
    run = trained("run", FAST)
    words = ["yes=true", "check=2", *([] if private else ["private=false"])]
    ended = command("dpo-export", f"checkpoint={run}", "to=hub:me/my-model", *words)
    assert ended.code == 0, ended.err
    (_, made, options), (_, name, files) = hub.sent[1:]
    assert [step[0] for step in hub.sent] == ["whoami", "create_repo", "upload_folder"]
    assert (made, name) == ("me/my-model", "me/my-model") and options == {"private": private, "exist_ok": False}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= set(files)
    for text in (content for file, content in files.items() if not file.endswith(".safetensors")):
        assert str(tmp_path).encode() not in text and b"hf_xxx" not in text
    assert 'from_pretrained("me/my-model")' in files["README.md"].decode() and "vllm serve me/my-model" in ended.out
    assert "hf_xxx" not in ended.out + ended.err and ("PUBLIC" in ended.out) != private


@pytest.mark.parametrize(
    ("step", "error", "says"),
    [
        ("whoami", http_error(401), "to=hub:me/m: the token is not valid (401)"),
        ("create_repo", http_error(403), "to=hub:me/m: the token may not write there (403)"),
        ("create_repo", http_error(409), "to=hub:me/m: this repository exists already; name another (409)"),
        ("upload_folder", httpx.ConnectError("no route to host\nsecond line"),
         "to=hub:me/m: no route to host; the repository was made and may hold a part"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(
    trained: Trained, command: Command, hub: type[FakeApi], step: str, error: Exception, says: str
) -> None:
    run = trained("run", FAST)
    hub.fails = {step: error}
    assert refused(command, 7, f"checkpoint={run}", "to=hub:me/m", "yes=true") == says


def test_without_a_token_nothing_is_computed(command: Command, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(export_module, "find_model_ref", None)
    said = refused(command, 2, "checkpoint=run", "to=hub:me/m")
    assert said == "to=hub:me/m: needs a token: set HF_TOKEN, or run `hf auth login`"


def test_an_adapter_of_a_folder_does_not_go_to_the_hub(
    trained: Trained, command: Command, tiny_path: str, tmp_path: Path, hub: Any
) -> None:
    base = shutil.copytree(tiny_path, tmp_path / "base")
    run = trained("run", f"model.name_or_path={base}")
    said = refused(command, 2, f"checkpoint={run}", "to=hub:me/m", "what=adapter")
    assert "which nobody else has; export what=merged" in said


# The card


def front_matter(card: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return loaded


def test_the_card_says_what_is_known_and_names_no_path(
    trained: Trained, command: Command, tmp_path: Path, tiny_path: str
) -> None:
    base = shutil.copytree(tiny_path, tmp_path / "my *base*")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    run = trained("run", f'model.name_or_path="{base}"', FAST)
    exported(command, run, tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    facts = front_matter(card)
    assert (facts["license"], facts["pipeline_tag"]) == ("mit", "text-generation")
    assert "base_model" not in facts and "datasets" not in facts
    assert str(tmp_path) not in card and "my-base" in card and "*base*" not in card
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data_fingerprint"] in card and "From the run's own evaluation at step 3" in card
    assert escaped(manifest["verdict"]["summary"]) in card and "Its safety was not tested" in card
    metrics = {one["type"]: one["value"] for one in facts["model-index"][0]["results"][0]["metrics"]}
    assert command("dpo-eval", f"checkpoint={run}").code == 0
    exported(command, run, tmp_path / "two")
    later = (tmp_path / "two" / "README.md").read_text()
    assert re.search(r"From dpo-eval on \d+ pairs of pairs\.jsonl", later) and str(tmp_path) not in later
    assert re.search(r"^\| accuracy \| \S+ \| \S+ to \S+ \|", later, re.M)
    report = json.loads((run / "eval").glob("*/report.json").__next__().read_text())
    assert metrics["accuracy"] == pytest.approx(report["rewards/accuracies"])
    report["weights_sha256"] = "of others"
    next((run / "eval").glob("*/report.json")).write_text(json.dumps(report))
    exported(command, run, tmp_path / "three")
    assert "the run's own evaluation" in (tmp_path / "three" / "README.md").read_text()


def test_the_code_of_the_card_runs(
    trained: Trained, command: Command, tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("run", FAST)
    for what in ("merged", "adapter"):
        exported(command, run, tmp_path / what, f"what={what}")
        code = re.findall(r"```python\n(.*?)```", (tmp_path / what / "README.md").read_text(), re.S)[0]
        names: dict[str, Any] = {}
        exec(code.replace(f"path/to/{what}", str(tmp_path / what)).replace("dpo-cli/tiny-random", tiny_path)
             .replace("path/to/tiny-random", tiny_path), names)  # fmt: skip
        assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_untrusted_text_has_no_effect_on_markdown() -> None:
    assert escaped("a|b\n# c <script> [x](y) `d` $1$") == r"a\|b\\n\# c \<script\> \[x\]\(y\) \`d\` \$1\$"


# The commands that are printed


def test_the_printed_commands_fit_what_was_exported_and_are_quoted() -> None:
    whole = dict(serving_commands(Served("out/my model", "my model", False)))
    assert whole["vLLM"] == ["vllm serve 'out/my model'"]
    assert whole["llama.cpp"][0] == "python convert_hf_to_gguf.py 'out/my model' --outfile my-model.gguf"
    assert whole["Ollama"][0] == "echo 'FROM ./my-model.gguf' > Modelfile"
    dashed = [line for _, lines in serving_commands(Served("/out/-a", "-a", False)) for line in lines]
    assert dashed[1].endswith("--outfile a.gguf") and dashed[4] == "ollama create a -f Modelfile", dashed
    lora = dict(serving_commands(Served("out/a", "a", True, SMOLLM2, 19)))
    assert lora["vLLM"] == [f"vllm serve {SMOLLM2} --enable-lora --max-lora-rank 32 --lora-modules a=out/a"]
    assert any("convert_lora_to_gguf.py out/a" in line for line in lora["llama.cpp"])
    assert serving_commands(Served("out/a", "a", True, SMOLLM2, 0)) == []
