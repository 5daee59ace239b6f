"""Quantised bases: the same numbers as a model of the dequantised weights, forward and backward, in every layout."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import Assembled, Ended, records, tiny_words
from test_preflight import subject_of
from tiny_models import CPU, LORA, pair, tiny
from torch import Tensor, nn

from dpo_cli.config.schema import ModelConfig
from dpo_cli.data.batches import Layout
from dpo_cli.errors import CheckpointError
from dpo_cli.models import quantization
from dpo_cli.models.adapters import adapter_off, attach_lora, load_adapter, parameter_counts
from dpo_cli.models.loading import find_model, load_model, model_fingerprint, saved_by_packing
from dpo_cli.models.logps import make_micro_batch, token_logps_of
from dpo_cli.models.lora_function import FusedLoraLinear
from dpo_cli.models.memory import plan_memory, weight_bytes
from dpo_cli.models.packing import choose_layout
from dpo_cli.models.quantization import QuantizedLinear, quantize, quantized_layers
from dpo_cli.runs.model_ref import ModelName, find_model_ref
from dpo_cli.training.optimizers import OPTIMIZERS
from dpo_cli.training.preflight import check_transposes, run_checks

Command = Callable[..., Ended]
METHODS = ["nf4", "int8"]
PAIRS = [pair(5, 7, 3, seed=0), pair(9, 4, 11, seed=1), pair(3, 12, 6, seed=2)]


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def dequantized(model: Any) -> Any:
    """A copy whose packed layers are plain ones of the dequantised weights."""
    twin = copy.deepcopy(model)
    for name, layer in quantized_layers(twin).items():
        plain = linear(layer.full_weight(torch.float32))
        plain.bias = layer.bias
        twin.set_submodule(name, plain)
    return twin


def moved(policy: Any) -> Any:
    """With adapters that are not zero."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=random))
    return policy


def logps_and_gradients(policy: Any, layout: Layout = Layout.PADDED) -> tuple[Tensor, Tensor]:
    """Log-probs of every response token, and the gradient of a weighted sum of them, as one vector."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    logps = token_logps_of(policy, make_micro_batch(PAIRS, CPU, layout))
    gradients = torch.autograd.grad((logps * torch.sin(torch.arange(len(logps)))).sum(), weights)
    return logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def off(found: Tensor, right: Tensor) -> float:
    """The relative difference of two vectors."""
    return float((found - right).norm() / right.norm())


# A layer


def test_nf4_keeps_its_own_sixteen_values_and_takes_the_nearest_for_others() -> None:
    """Appendix E of https://arxiv.org/abs/2305.14314, times the largest of each block of 64."""
    values = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                           -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                           0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                           0.7229568362236023, 1.0])  # fmt: skip
    rows = torch.stack([values.repeat(4) * 3.0, values.flip(0).repeat(4) * 0.25])
    assert torch.equal(QuantizedLinear(linear(rows), "nf4").full_weight(torch.float32), rows)
    nudged = rows.clone()
    nudged[0, 7], nudged[1, 5] = 0.1, 0.25 * 0.2  # nearest are 0, and 0.25 * 0.1609
    expected = rows.clone()
    expected[1, 5] = 0.25 * values[9]
    assert torch.equal(QuantizedLinear(linear(nudged), "nf4").full_weight(torch.float32), expected)


def test_int8_has_127_steps_each_way_in_every_row() -> None:
    rows = torch.stack([torch.arange(-127.0, 128.0) * 0.5, torch.arange(127.0, -128.0, -1.0) / 1024])
    full = QuantizedLinear(linear(rows), "int8").full_weight(torch.float32)
    assert torch.allclose(full, rows, rtol=1e-6, atol=0)
    off_grid = QuantizedLinear(linear(rows + 0.2), "int8").full_weight(torch.float32)
    assert float((off_grid[0] - rows[0] - 0.2).abs().max()) <= 0.5 / 2 + 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "qwen3_moe"])  # two of them have biases
def test_log_probs_and_gradients_are_those_of_the_dequantised_twin(family: str, method: str) -> None:
    """Also after passes in evaluation mode, which spoil the layers of bitsandbytes on some CPUs."""
    base = quantize(tiny(family), method)
    twin = moved(attach_lora(dequantized(base), LORA))
    policy = moved(attach_lora(base, LORA))
    assert len(quantized_layers(policy)) == len([part for part in policy.modules() if type(part) is FusedLoraLinear])
    for _ in range(2):
        logps, gradients = logps_and_gradients(policy)
        twin_logps, twin_gradients = logps_and_gradients(twin)
        assert torch.equal(logps, twin_logps)
        assert off(gradients, twin_gradients) < 1e-5
        policy.eval()
        with torch.no_grad(), adapter_off(policy):
            token_logps_of(policy, make_micro_batch(PAIRS, CPU, Layout.PADDED))
        policy.train()


@pytest.mark.parametrize("method", METHODS)
def test_dropout_goes_by_the_layer_of_peft_with_the_same_gradient(method: str) -> None:
    base = quantize(tiny(), method)
    policies = [moved(attach_lora(model, replace(LORA, dropout=0.3))) for model in (dequantized(base), base)]
    found = []
    for policy in policies:
        torch.manual_seed(0)
        found.append(logps_and_gradients(policy.train()))
    assert torch.equal(found[0][0], found[1][0])
    assert off(found[0][1], found[1][1]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_are_chosen_and_equal_padded_ones(method: str) -> None:
    base = quantize(tiny(), method)
    assert choose_layout("auto", base, PAIRS, CPU).value is Layout.PACKED_SEGMENTS
    policy = moved(attach_lora(base, LORA))
    rows = {layout: logps_and_gradients(policy, layout) for layout in (Layout.PADDED, Layout.PACKED_SEGMENTS)}
    for found, right in zip(rows[Layout.PACKED_SEGMENTS], rows[Layout.PADDED], strict=True):
        assert off(found, right) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_head_and_embeddings_stay_and_only_packed_bits_are_kept(method: str) -> None:
    model = tiny()
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    parameters, before = parameter_counts(model)[1], sum(weight.nbytes for weight in model.state_dict().values())
    saved = quantization.bytes_saved(model, method, torch.float32)
    quantize(model, method)
    assert model.lm_head.weight is head
    assert model.get_input_embeddings().weight is embeddings
    assert before - sum(weight.nbytes for weight in model.state_dict().values()) == saved
    assert parameter_counts(model)[1] == parameters
    assert len(quantized_layers(model)) == 14


def test_a_layer_that_does_not_divide_into_blocks_is_refused_by_its_name() -> None:
    model = tiny(intermediate_size=49)
    expected = ("model.quantization=nf4: model.layers.0.mlp.gate_proj has 49 x 32 weights, which do not divide into "
                "blocks of 64; choose int8 or none")  # fmt: skip
    with pytest.raises(CheckpointError) as error:
        quantize(model, "nf4")
    assert str(error.value) == expected
    assert not quantized_layers(model)
    quantize(model, "int8")


# The whole model


def config(path: str, method: str = "nf4", adapter: str | None = None) -> ModelConfig:
    return ModelConfig(name_or_path=path, revision=None, dtype="auto", quantization=method, adapter=adapter,
                       trust_remote_code=False)  # fmt: skip


def test_fingerprints_tell_quantisations_apart_and_survive_every_pass(tiny_path: str) -> None:
    seen = set()
    for method in ("none", *METHODS):
        model = load_model(find_model(config(tiny_path, method)), torch.float32, CPU)
        fingerprint = model_fingerprint(model)
        assert fingerprint == model_fingerprint(load_model(find_model(config(tiny_path, method)), torch.float32, CPU))
        policy = attach_lora(model, LORA)
        batch = make_micro_batch(PAIRS, CPU, Layout.PADDED)
        with torch.no_grad():
            token_logps_of(policy.eval(), batch)
        token_logps_of(policy.train(), batch).sum().backward()
        assert model_fingerprint(policy.unload()) == fingerprint
        seen.add(fingerprint.split("-")[0])
    assert len(seen) == 3


def test_an_sft_adapter_is_folded_in_before_the_weights_are_packed(tiny_path: str, tmp_path: Path) -> None:
    base = load_model(find_model(config(tiny_path, "none")), torch.float32, CPU)
    moved(attach_lora(base, LORA, tiny_path)).save_pretrained(str(tmp_path / "sft"))
    folded = load_model(find_model(config(tiny_path, "none", str(tmp_path / "sft"))), torch.float32, CPU)
    found = load_model(find_model(config(tiny_path, "nf4", str(tmp_path / "sft"))), torch.float32, CPU)
    assert model_fingerprint(found) == model_fingerprint(quantize(folded, "nf4"))


def test_a_model_that_is_stored_quantised_is_refused_with_what_to_do(tiny_path: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "stored")
    file = tmp_path / "stored" / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": stored}))
    with pytest.raises(CheckpointError, match="is stored quantised; name the unquantised model"):
        load_model(find_model(config(str(tmp_path / "stored"))), torch.float32, CPU)


def test_the_memory_plan_counts_packed_bytes(tiny_path: str) -> None:
    model = load_model(find_model(config(tiny_path)), torch.bfloat16, CPU)
    saved = saved_by_packing(find_model(config(tiny_path)), torch.bfloat16)
    assert weight_bytes(tiny_path, torch.bfloat16) - saved == sum(part.nbytes for part in model.state_dict().values())
    gib = f"{(weight_bytes(tiny_path, torch.bfloat16) - saved) / 2**30:.3g} GiB"
    assert plan_memory(tiny_path, torch.bfloat16, CPU, False, saved).startswith(f"weights {gib}, of ")


# The trap of bitsandbytes' own layers


def wide_model(tiny_path: str, folder: Path) -> str:
    """A random model 64 wide, which bitsandbytes' own layers need, with the tiny one's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tiny(hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def repacked_in_evaluation(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What the layer of bitsandbytes 0.50 does on a CPU with avx512_bf16; elsewhere an imitation of it."""
    theirs = layer.__dict__.get("theirs")
    if theirs is None:
        theirs = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
        theirs.weight = bitsandbytes.nn.Params4bit(
            layer.full_weight(torch.float32), requires_grad=False, quant_type="nf4", module=theirs
        ).to("cpu")
        layer.__dict__["theirs"] = theirs.train(layer.training)
    theirs.train(layer.training)
    if theirs.support_avx512bf16_for_cpu:
        found: Tensor = theirs(x)
        return found
    y = nn.functional.linear(x, layer.full_weight(x.dtype))
    if not layer.training and not x.requires_grad:
        layer.weight.data = layer.weight.data.flip(0)
    return y


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")  # the only hint that it gives
def test_the_preflight_sees_weights_that_an_evaluation_pass_repacks(
    assembled: Callable[..., Assembled], tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide_model(tiny_path, tmp_path / "wide")
    run = assembled("model.quantization=nf4", f"model.name_or_path={model}", "reference=adapter_off")
    assert "14 quantised layers have the right gradient" in run_checks(subject_of(run))
    monkeypatch.setattr(QuantizedLinear, "forward", repacked_in_evaluation)
    monkeypatch.setattr("dpo_cli.models.lora_function._takes_it", lambda layer: False)
    subject = subject_of(run)
    subject.policy.eval()
    with pytest.raises(CheckpointError) as error:
        check_transposes(subject)
    assert "gradient of the quantised layer base_model.model.model.layers.0.self_attn.q_proj is not" in str(error.value)


def test_the_preflight_sees_a_fused_layer_whose_backward_pass_takes_another_matrix(
    assembled: Callable[..., Assembled], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = assembled("model.quantization=int8")
    right, calls = (
        QuantizedLinear.full_weight,
        itertools.cycle([1.0, 1.0, 1.0, 1.01]),
    )  # the fourth is the backward pass
    monkeypatch.setattr(QuantizedLinear, "full_weight", lambda layer, dtype: right(layer, dtype) * next(calls))
    with pytest.raises(CheckpointError, match="gradient of the quantised layer"):
        check_transposes(subject_of(run))


# Commands


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reference", ["frozen", "adapter_off"])
def test_a_run_starts_at_its_reference_and_dpo_eval_scores_it_on_the_same_base(
    method: str, reference: str, trained: Callable[..., Path], command: Command
) -> None:
    run = trained("run", f"model.quantization={method}", f"reference={reference}", "reference.cache=off")
    first, *_, last = records(run)
    assert (first["loss"], first["rewards/margins"]) == (pytest.approx(0.693147, abs=1e-6), 0.0)
    ended = command("dpo-eval", f"checkpoint={run}")
    assert ended.code == 0, ended.err
    report = json.loads((run / "eval" / "held-out-final" / "report.json").read_text())
    assert report["rewards/margins"] == pytest.approx(last["rewards/margins"], abs=1e-5)


def test_the_adapter_names_the_unquantised_base_and_the_card_says_what_it_was_trained_on(
    trained: Callable[..., Path], tiny_path: str
) -> None:
    run = trained("run", "model.quantization=nf4")
    named = json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "dpo-cli/tiny-random"
    assert "the base was packed to nf4 (`model.quantization=nf4`)" in (run / "final" / "README.md").read_text()
    plain = load_model(find_model(config(tiny_path, "none")), torch.float32, CPU)
    merged = load_adapter(plain, str(run / "final")).merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear


def test_every_command_takes_the_quantisation_of_a_run(trained: Callable[..., Path]) -> None:
    run = trained("run", "model.quantization=int8")
    assert find_model_ref(ModelName(str(run))).base.quantization == "int8"
    assert find_model_ref(ModelName(str(run / "final"))).base.quantization == "int8"


def test_a_reward_model_trains_on_a_quantised_base(trained: Callable[..., Path], command: Command) -> None:
    run = trained("run", "objective=reward", "model.quantization=nf4")
    assert records(run)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert command("dpo-eval", f"checkpoint={run}").code == 0


def test_completions_are_sampled_from_a_quantised_model(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Tell me about rain."}\n')
    words = (f"prompts={tmp_path / 'prompts.jsonl'}", "n=2", "max_new_tokens=5", f"output={tmp_path / 'out.jsonl'}")
    ended = command("dpo-sample", "model=tiny", "model.dtype=float32", "model.quantization=nf4", *words)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_an_interrupted_run_resumes_to_the_same_bits(method: str, command: Command, pairs_file: Path) -> None:
    words = [word for word in tiny_words(pairs_file, Path("unused")) if "output_dir" not in word]
    more = (f"model.quantization={method}", "optimizer=adamw8bit", "lora.r=128", "verify_resume=true")
    ended = command("dpo-train", *words, *more)
    assert ended.code == 0, ended.err
    assert "resume is exact here" in ended.out


def test_resume_with_another_quantisation_is_refused(
    trained: Callable[..., Path], command: Command, pairs_file: Path
) -> None:
    run = trained("run", "model.quantization=nf4", "save_every=1", "keep_checkpoints=5")
    (run / "final").rename(run / "not-final")
    again = (*tiny_words(pairs_file, run), f"resume={run / 'checkpoints' / 'step-00000001'}")
    ended = command("dpo-train", *again, "model.quantization=int8")
    assert ended.code == 4
    assert "model.quantization: nf4 -> int8" in ended.err


def test_mistakes_end_in_one_line(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    words = tiny_words(pairs_file, tmp_path / "run")
    for more, line in {
        (
            "model.quantization=nf4",
            "lora=off",
        ): "model.quantization=nf4: packed weights cannot train; choose a group of "
        "adapters such as lora=all_linear, or none",
        ("model.quantization=int4",): "model.quantization=int4: choose one of none, nf4, int8; did you mean 'int8'?",
        ("model.quantization=nf4", "model.dtype=float16"): "model.dtype=float16: a CPU computes it slowly and loosely; "
        "choose bfloat16 or float32",
        (
            "optimizer=paged_adamw8bit",
        ): "optimizer.name=paged_adamw8bit: it pages between a GPU's memory and the CPU's, "
        "and the device is cpu; choose adamw8bit",
    }.items():
        ended = command("dpo-train", *words, "device=cpu", *more)
        assert (ended.code, ended.err) == (2, f"error: {line}\n")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("word", "key"),
    [("model.quantization=nf4", "model.quantization=nf4"), ("optimizer=adamw8bit", "optimizer.name=adamw8bit")],
)
def test_a_missing_package_is_said_before_anything_is_loaded(
    word: str, key: str, command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = quantization.importlib.util.find_spec
    monkeypatch.setattr(
        quantization.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    monkeypatch.setattr("dpo_cli.training.build.load_tokenizer", None)
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), word)
    line = f"error: {key}: the package bitsandbytes is not installed; pip install 'dpo-cli[quant]'\n"
    assert (ended.code, ended.err) == (2, line)


# 8-bit optimizers


def test_adamw8bit_takes_nearly_the_steps_of_adamw() -> None:
    from dpo_cli.config.composition import composed, parse_overrides
    from dpo_cli.config.schema import RunConfig, run_config

    options = run_config(
        composed("train", parse_overrides(["optimizer.lr=0.01", "optimizer.weight_decay=0.1"]), RunConfig).container
    ).optimizer
    weights = {name: nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128)) for name in ("adamw", "adamw8bit")}
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(64, 128, generator=random) + 0.5 for _ in range(10)]
    start = weights["adamw"].detach().clone()
    for name, weight in weights.items():
        optimizer = OPTIMIZERS[name]([weight], options)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
    assert optimizer.state[weights["adamw8bit"]]["state1"].dtype is torch.uint8
    step = {name: weight.detach() - start for name, weight in weights.items()}
    assert off(step["adamw8bit"], step["adamw"]) < 0.05


def test_a_state_of_8_bits_that_does_not_fit_is_refused(
    trained: Callable[..., Path], command: Command, pairs_file: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from dpo_cli.runs.checkpoint import _seal

    more = ("optimizer=adamw8bit", "lora.r=128", "save_every=1", "keep_checkpoints=5")
    run = trained("run", *more)
    folder = run / "checkpoints" / "step-00000001"
    file = folder / "optimizer.safetensors"
    whole = load_file(file)
    state = next(name for name in whole if name.endswith("|state1") and whole[name].dtype is torch.uint8)
    resume = (*tiny_words(pairs_file, run), *more, f"resume={folder}")
    (run / "final").rename(run / "not-final")
    for damaged, said in (
        ({state: whole[state][:1].clone()}, f"{state} is not of this optimizer's state"),
        ({state: whole[state].float()}, f"{state} is not of this optimizer's state"),
        ({state.replace("state1", "step"): torch.tensor(float("nan"), dtype=torch.float64)}, "step is not of this"),
        ({state: None}, f"lacks {state}"),
    ):
        save_file({name: value for name, value in {**whole, **damaged}.items() if value is not None}, file)
        (folder / "MANIFEST.json").unlink()
        _seal(folder)
        ended = command("dpo-train", *resume)
        assert ended.code == 4
        assert said in ended.err
