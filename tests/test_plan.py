"""The plan: what it counts is what a real run takes, and a run that does not fit is told so before a weight is read."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, tiny_words
from tiny_models import CPU, LORA, pair, tiny

from dpo_cli.config.composition import composed_run, parse_overrides
from dpo_cli.config.schema import RunConfig, run_config
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.batches import Layout
from dpo_cli.errors import ConfigError
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.logps import make_micro_batch, response_logps
from dpo_cli.models.meter import count_flops, meter_pass, meter_scoring, without_content
from dpo_cli.training import plan as planning
from dpo_cli.training.plan import GIB, Plan, Planner, Work, remedy, shortened, weigh

Command = Callable[..., Ended]
PAIRS = [pair(20, 15, 11 + seed, seed) for seed in range(4)]


@pytest.fixture
def skeleton(tiny_path: str, tmp_path: Path) -> Path:
    """The folder of the tiny model without its weights."""
    folder = tmp_path / "skeleton"
    shutil.copytree(tiny_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    return folder


def config_of(pairs: Path, skeleton: Path, *words: str) -> RunConfig:
    base = [*tiny_words(pairs, pairs.parent / "run"), f"model.name_or_path={skeleton}", "plan=true"]
    base.remove("model.dtype=float32")
    return run_config(composed_run(parse_overrides([*base, *words])).container)


@pytest.fixture
def plan_of(pairs_file: Path, skeleton: Path) -> Iterator[Callable[..., Plan]]:
    planners: list[Planner] = []

    def plan(*words: str, **engine: Any) -> Plan:
        config = config_of(pairs_file, skeleton, *words)
        if engine:
            config = replace(planning.replace_engine(config, **engine), gpus=config.gpus)
        planners[:] = planners or [Planner.of(config, Reporter())]
        return planners[0].plan(config)

    yield plan


def parts(plan: Plan, phase: str) -> dict[str, int]:
    return dict(next(one for one in plan.phases if one.name == phase).parts)


# What is counted


@pytest.mark.parametrize("lora", [True, False])
def test_weights_are_those_of_the_real_model(lora: bool) -> None:
    policy = attach_lora(tiny(), LORA) if lora else tiny().requires_grad_(True)
    weights = weigh(policy, lora)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    every = sum(tensor.nbytes for tensor in [*policy.parameters(), *policy.buffers()])
    assert weights.trained == sum(weight.numel() for weight in trained)
    assert weights.adapters == (sum(weight.nbytes for weight in trained) if lora else 0)
    assert weights.base + weights.adapters == every
    assert 0 < weights.layer < every and weights.root + 2 * weights.layer == every


def test_a_model_without_content_has_the_parameters_of_the_real_one(
    plan_of: Callable[..., Plan], tiny_path: str
) -> None:
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    every = sum(tensor.nbytes for tensor in [*real.parameters(), *real.buffers()])
    assert parts(plan_of("lora=off", "gpu=1GiB"), "update")["base weights"] == every


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantised_base_is_packed_except_its_head_and_embeddings(plan_of: Callable[..., Plan], method: str) -> None:
    pytest.importorskip("bitsandbytes")
    linear = [
        (32, 32),
        (16, 32),
        (16, 32),
        (32, 32),
        (64, 32),
        (64, 32),
        (32, 64),
    ] * 2  # outputs and inputs, two layers
    packed_bytes = {"nf4": lambda o, i: o * i // 2 + o * i // 64 * 4, "int8": lambda o, i: o * i + 4 * o}[method]
    plain, packed = (
        parts(plan_of("gpu=1GiB", "micro_batch_size=4", *words), "update")
        for words in ((), (f"model.quantization={method}",))
    )
    saved = sum(2 * outputs * inputs - packed_bytes(outputs, inputs) for outputs, inputs in linear)  # of bfloat16
    assert plain["base weights"] - packed["base weights"] == saved
    assert packed["adapters"] == plain["adapters"]


@pytest.mark.parametrize("layout", [Layout.PACKED_SEGMENTS, Layout.PACKED_MASK, Layout.PADDED])
@pytest.mark.parametrize("how", ["lora", "checkpointing", "full"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_pass_without_content_takes_what_the_real_one_takes(layout: Layout, how: str, accumulates: bool) -> None:
    def policy(model: Any) -> Any:
        made = model.requires_grad_(True) if how == "full" else attach_lora(model, LORA)
        if how == "checkpointing":
            made.activation_checkpointing_enable()
        return made.train()

    batch = make_micro_batch(PAIRS, CPU, layout)
    real = policy(tiny())
    expected = meter_pass(real, response_logps, batch, accumulates)
    scored = meter_scoring(real, response_logps, batch)
    hollow = policy(tiny().to("meta"))
    with without_content(hollow, CPU) as device:
        batch = make_micro_batch(PAIRS, device, layout)
        found = meter_pass(hollow, response_logps, batch, accumulates)
        assert meter_scoring(hollow, response_logps, batch) == pytest.approx(scored, rel=0.02)
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.02, abs=256), name
    assert expected.kept > 0 and expected.backward > expected.kept / 2


def test_a_pass_as_on_a_gpu_keeps_queries_keys_values_and_no_square_of_scores() -> None:
    policy = attach_lora(tiny().to("meta"), LORA).train()
    with without_content(policy, torch.device("cuda")) as device:
        found = [
            meter_pass(policy, response_logps, make_micro_batch([pair(n, n, n, 0)], device, layout), False).kept
            for layout in [Layout.PACKED_SEGMENTS]
            for n in (32, 64, 128)
        ]
    assert found[2] - found[1] == pytest.approx(2 * (found[1] - found[0]), rel=0.02)  # linear in the tokens


def test_flops_are_two_a_weight_forward_and_four_more_backward() -> None:
    hollow = tiny().to("meta").requires_grad_(True)
    linear = sum(
        m.weight.numel() for n, m in hollow.named_modules() if type(m) is torch.nn.Linear and "lm_head" not in n
    )
    head = hollow.lm_head.weight.numel() * 26 / 46  # of 46 tokens 26 are scored
    with without_content(hollow, torch.device("cuda")) as device:
        batch = make_micro_batch(PAIRS[:1], device, Layout.PACKED_SEGMENTS)
        scoring, training = count_flops(hollow, response_logps, batch)
    assert 2 * (linear + head) <= scoring <= 3 * (linear + head)
    assert 6 * (linear + head) <= training <= 10 * (linear + head)


# What options change


def test_each_option_changes_the_part_that_it_should(plan_of: Callable[..., Plan]) -> None:
    default = plan_of("gpu=1GiB", "micro_batch_size=4")
    for phase in default.phases:
        assert phase.total == sum(phase.parts.values())
    base = parts(default, "backward")["base weights"]
    assert [phase.name for phase in default.phases] == ["reference", "forward", "backward", "update"]
    assert [parts(default, name)["second model"] for name in ("reference", "backward")] == [base, 0]

    in_every_step = plan_of("gpu=1GiB", "micro_batch_size=4", "reference.cache=off")
    assert [phase.name for phase in in_every_step.phases] == ["forward", "backward", "update"]
    assert parts(in_every_step, "backward")["second model"] == base
    off = plan_of("gpu=1GiB", "micro_batch_size=4", "reference=adapter_off")
    assert parts(off, "reference")["second model"] == 0 and parts(off, "backward") == parts(default, "backward")

    full = plan_of("gpu=1GiB", "micro_batch_size=4", "lora=off")
    update = parts(full, "update")
    assert update["adapters"] == 0 and update["base weights"] == pytest.approx(2 * base, rel=0.01)  # float32
    assert update["optimizer state"] == 2 * update["gradients"]
    assert update["gradients"] == pytest.approx(update["base weights"], rel=0.01)  # which has buffers besides
    momentum = plan_of("gpu=1GiB", "micro_batch_size=4", "optimizer=rmsprop")
    states = [parts(one, "update")["optimizer state"] for one in (default, momentum)]
    assert states[0] == 2 * states[1] == 2 * parts(default, "update")["gradients"]

    saved = plan_of("gpu=1GiB", "micro_batch_size=4", "engine.gradient_checkpointing=true")
    assert parts(saved, "forward")["activations"] < parts(default, "forward")["activations"] / 2
    small = plan_of("gpu=1GiB", "micro_batch_size=1")
    assert parts(small, "forward")["activations"] < parts(default, "forward")["activations"] / 2
    wide = plan_of("gpu=1GiB", "micro_batch_size=4", "lora.r=32")
    assert parts(wide, "update")["adapters"] == 2 * parts(default, "update")["adapters"]


def test_ddp_holds_everything_on_each_gpu_and_fsdp_a_part(plan_of: Callable[..., Plan]) -> None:
    alone = parts(plan_of("gpu=1GiB", "micro_batch_size=4"), "update")
    ddp = parts(plan_of("gpu=1GiB", "micro_batch_size=4", "engine=ddp", "gpus=4"), "update")
    fsdp = parts(plan_of("gpu=1GiB", "micro_batch_size=4", "engine=fsdp", "gpus=4"), "update")
    for part in ("base weights", "adapters", "gradients", "optimizer state"):
        assert ddp[part] == alone[part] and fsdp[part] == -(-alone[part] // 4)
    assert alone["collectives' buffers"] == 0 and ddp["collectives' buffers"] == ddp["gradients"]  # one bucket
    assert alone["one layer and what is outside, whole"] == 0 < fsdp["one layer and what is outside, whole"]


def test_gpus_that_the_engine_does_not_use_are_refused(plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"^gpus=2: engine=single uses one; choose engine=ddp or engine=fsdp$"):
        plan_of("gpu=1GiB", "gpus=2")


def test_a_shortened_pair_keeps_the_end_of_its_prompt() -> None:
    long = pair(20, 15, 10, 0)
    short = shortened(long, 18)
    assert [len(part) for part in (short.prompt, short.chosen, short.rejected)] == [3, 15, 10]
    assert short.prompt.tolist() == long.prompt.tolist()[-3:]
    assert len(shortened(long, 8).chosen) == 7 and shortened(long, 40) is long


# Whether it fits, time and money


def test_a_plan_fits_to_the_byte(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("gpu=1GiB")
    exact = replace(plan, hardware=replace(plan.hardware, memory=plan.peak.total))
    assert exact.fits and not replace(plan, hardware=replace(plan.hardware, memory=plan.peak.total - 1)).fits


def test_the_remedy_is_the_fewest_options(pairs_file: Path, skeleton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(pairs_file, skeleton, "gpu=1GiB")
    planner = Planner.of(config, Reporter())
    enough: set[str] = set()

    def fits(_: Planner, one: RunConfig) -> bool:
        has = {f"reference={one.reference.name}", f"checkpointing={one.engine.gradient_checkpointing}",
               f"gpus={one.gpus}"}  # fmt: skip
        return enough <= has

    monkeypatch.setattr(Planner, "fits", fits)
    enough = {"checkpointing=True"}
    assert remedy(planner, config).startswith("engine.gradient_checkpointing=true, or ")
    enough = {"checkpointing=True", "reference=adapter_off"}
    expected = "reference=adapter_off engine.gradient_checkpointing=true, or engine=fsdp gpus=2 "
    assert remedy(planner, config).startswith(expected)
    enough = {"gpus=8"}
    assert remedy(planner, config) == "engine=fsdp gpus=8 would fit"
    enough = {"gpus=3"}
    assert remedy(planner, config) == "a smaller model or a larger GPU is needed"


def test_time_and_money_by_hand(pairs_file: Path, skeleton: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("gpu=1GiB", "engine=ddp", "gpus=4")
    work = Work(steps=100, tokens=2e6, flops=1.44e18)
    config = config_of(pairs_file, skeleton, "gpu=1GiB", "engine=ddp", "gpus=4", "tflops=50", "price=2.5")
    rows = planning._time_rows(config, plan, work)
    # 1.44e18 / (4 x 50e12) = 7,200 s = 2 h on 4 GPUs = 8 GPU-hours = 20
    assert rows == [
        ("work", "100 steps, 2M tokens, 1440 PFLOP"),
        ("time", "2 h 00 min, 278 tokens/s"),
        ("", "at 50 TFLOP/s a GPU (tflops), loading and compiling aside"),
        ("cost", "20.00: 8 GPU-hours at 2.5"),
    ]
    assumed = planning._time_rows(replace(config, tflops=None), plan, work)
    assert assumed[2][1].startswith("at 100 TFLOP/s a GPU (assumed;") and assumed[3] == (
        "cost",
        "10.00: 4 GPU-hours at 2.5",
    )


# The command


def words_of(pairs: Path, skeleton: Path) -> list[str]:
    return [*tiny_words(pairs, pairs.parent / "run"), f"model.name_or_path={skeleton}", "plan=true"]


def test_a_plan_reads_no_weight_and_writes_no_run(
    command: Command, pairs_file: Path, skeleton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = command("dpo-train", *words_of(pairs_file, skeleton), "gpu=24GiB", "price=2.5")
    assert (ended.code, ended.err) == (0, "")
    table = ended.out[ended.out.index("\nGiB ") : ended.out.index("\nmodel ")]
    assert max(map(len, table.splitlines())) <= 80
    for shown in (
        "base weights",
        "second model",
        "optimizer state",
        "1 GPU of 24 GiB, engine=single",
        ": fits",
        "cost ",
    ):
        assert shown in ended.out
    assert not (pairs_file.parent / "run").exists()
    (skeleton / "model.safetensors").write_bytes(b"not weights")
    assert command("dpo-train", *words_of(pairs_file, skeleton), "device=cpu").code == 0


def test_a_run_that_does_not_fit_ends_with_code_6_after_its_table(
    command: Command, pairs_file: Path, skeleton: Path
) -> None:
    shape = json.loads((skeleton / "config.json").read_text())
    shape |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32}
    (skeleton / "config.json").write_text(json.dumps(shape | {"num_key_value_heads": 8, "head_dim": 128}))
    words = [word for word in words_of(pairs_file, skeleton) if "dtype" not in word]
    # Eight layers of a Llama of 8B are 1.75 billion weights, 3.25 GiB: two of them do not fit in 5.
    ended = command("dpo-train", *words, "gpu=5GiB")
    assert ended.code == 6 and "total" in ended.out
    assert ended.err.startswith("error: gpu=5GiB: does not fit: ") and ended.err.count("\n") == 1
    assert "while the reference's log-probs are computed; reference=adapter_off, or engine=fsdp gpus=2" in ended.err
    assert command("dpo-train", *words, "gpu=5GiB", "reference=adapter_off").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpu=24GiB"], "gpu=24GiB: is of plan=true; add it, or leave this out"),
        (["price=2"], "price=2.0: is of plan=true; add it, or leave this out"),
        (["gpus=2"], "gpus=2: is of plan=true; add it, or leave this out"),
        (["plan=true", "gpu=much"], "gpu=much: must be the memory of one GPU, for instance 24GiB"),
        (["plan=true", "gpu=0"], "gpu=0: must be the memory of one GPU, for instance 24GiB"),
        (["plan=true", "gpus=0"], "gpus=0: must be at least 1"),
        (["plan=true", "gpu=8", "device=cpu"],
         "gpu=8: a GPU is planned for, and device=cpu is none; leave one of them out"),
        (["plan=true", "dry_run=true"], "plan=true: runs nothing; leave resume, dry_run, verify_resume out"),
        (["plan=true", "resume=auto"], "plan=true: runs nothing; leave resume, dry_run, verify_resume out"),
        (["-m", "plan=true", "beta=0.1,0.2"], "plan=true: plans one run; leave -m out"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_of_a_plan_is_refused(
    command: Command, pairs_file: Path, words: list[str], says: str
) -> None:
    ended = command("dpo-train", *tiny_words(pairs_file, pairs_file.parent / "run")[:-1], *words)
    assert (ended.code, ended.err) == (2, f"error: {says}\n")


@pytest.mark.parametrize("written", ["24", "24GiB", "'24 GiB'"])
def test_memory_of_a_gpu_is_read_in_gib(pairs_file: Path, skeleton: Path, written: str) -> None:
    config = config_of(pairs_file, skeleton, f"gpu={written}")
    assert planning.hardware_of(config).memory == 24 * GIB
