"""The token budget: measured on two sizes, kept by a resumed run, and honest where memory is short."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, tiny_words
from tiny_models import CPU, LORA, pair, tiny
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_cli.data.batches import Layout, packed_tokens
from dpo_cli.models import memory
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.logps import make_micro_batch, response_logps
from dpo_cli.models.memory import ENOUGH_TOKENS, SHARE, TRAINING_BYTES, kept_bytes, measure_budget
from dpo_cli.models.meter import Meter
from dpo_cli.runs.checkpoint import read_state

Command = Callable[..., Ended]
MANY = [pair(20, 15, 15, seed) for seed in range(12)]


def test_a_measured_forward_pass_leaves_nothing_behind() -> None:
    # 250 MiB a call of a model of 135 million parameters stayed, and no garbage collection found them.
    policy = attach_lora(tiny(), LORA)
    with Meter([*policy.parameters(), *policy.buffers()]) as meter:
        _, kept = kept_bytes(policy, MANY[:4], CPU, Layout.PACKED_SEGMENTS)
        gc.collect()
        assert meter.peak > kept > 50 * meter.now


def test_kept_bytes_are_those_of_the_tensors_that_the_backward_pass_reads() -> None:
    # y = (x w)^2: the product keeps x for w's gradient, the square keeps its input; w is a weight and does not count.
    class Squared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

    model = Squared()

    def logps(*_: Any) -> Any:
        return (torch.ones(100, 8) * model.weight) ** 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "response_logps", logps)
        assert kept_bytes(model, MANY[:1], CPU, Layout.PACKED_SEGMENTS) == (20 + 15 + 15, 2 * 100 * 8 * 4)
        assert kept_bytes(model, MANY[:2], CPU, Layout.PADDED)[0] == 4 * 35


def test_what_is_kept_grows_with_tokens_and_shrinks_with_checkpointing() -> None:
    policy = attach_lora(tiny(), LORA)
    few, many = (kept_bytes(policy, MANY[:n], CPU, Layout.PACKED_SEGMENTS)[1] for n in (2, 8))
    assert 3 * few < many < 5 * few  # four times the tokens
    policy.activation_checkpointing_enable()
    policy.train()
    assert kept_bytes(policy, MANY[:8], CPU, Layout.PACKED_SEGMENTS)[1] < many / 3


def test_the_budget_is_what_fits_into_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = attach_lora(tiny(), LORA)
    trained = TRAINING_BYTES * sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    monkeypatch.setattr(memory, "free_memory", lambda _: trained + 10_000_000)
    budget = measure_budget(policy, MANY, CPU, Layout.PACKED_SEGMENTS)
    assert budget.fits == int(SHARE * 10_000_000 / budget.bytes_per_token)
    assert budget.tokens == min(budget.fits, ENOUGH_TOKENS["cpu"])
    rows = [packed_tokens(MANY[:n]) for n in (2, 8)]
    kept = [kept_bytes(policy, MANY[:n], CPU, Layout.PACKED_SEGMENTS)[1] for n in (2, 8)]
    assert budget.bytes_per_token == pytest.approx(1.25 * (kept[1] - kept[0]) / (rows[1] - rows[0]), rel=0.1)
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**40)
    assert measure_budget(policy, MANY, CPU, Layout.PACKED_SEGMENTS).tokens == ENOUGH_TOKENS["cpu"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live, after every operation; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: live for key, live in self._live.items() if not live[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


# Of few layers, one that is computed again would be most of the memory; real models have twelve or more.
@pytest.mark.parametrize(("layers", "checkpointed"), [(2, False), (12, True)])
def test_the_bytes_of_a_token_cover_the_peak_of_a_forward_and_backward_pass(layers: int, checkpointed: bool) -> None:
    policy = attach_lora(tiny(num_hidden_layers=layers), LORA).train()
    if checkpointed:
        policy.activation_checkpointing_enable()
    tokens, peaks = [], []
    for number in (1, 4):
        micro_batch = make_micro_batch(MANY[:number], CPU, Layout.PADDED)
        with LiveBytes() as live:
            response_logps(policy, micro_batch).sum().backward()
        tokens.append(micro_batch.input_ids.numel())
        peaks.append(live.peak)
        policy.zero_grad()
    needed = (peaks[1] - peaks[0]) / (tokens[1] - tokens[0])
    measured = measure_budget(policy, MANY, CPU, Layout.PADDED).bytes_per_token
    assert needed < measured < 2 * needed


def test_a_budget_too_small_for_a_pair_says_so_and_the_pair_runs_alone(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 2_000_000)
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"))
    assert ended.code == 0
    said = " ".join((ended.out + ended.err).split())
    assert (
        "the longest pair has 1" in said and "it may not fit; engine.gradient_checkpointing=true or a smaller" in said
    )


def test_a_resumed_run_keeps_the_budget_and_the_layout_it_began_with(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_words(pairs_file, tmp_path / "run"), "optimizer.schedule=constant"]
    monkeypatch.setitem(ENOUGH_TOKENS, "cpu", 200)
    assert command("dpo-train", *words).code == 0
    state = read_state(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert (state.settings.layout, state.settings.token_budget) == ("packed_segments", 200)
    (tmp_path / "run" / "final").rename(tmp_path / "away")
    monkeypatch.setitem(ENOUGH_TOKENS, "cpu", 1000)
    resumed = command("dpo-train", *words, "resume=auto", "max_steps=4")
    assert resumed.code == 0
    assert "200 tokens in a micro-batch, as when the run began" in resumed.out
    assert read_state(tmp_path / "run" / "checkpoints" / "step-00000004").settings.token_budget == 200


def test_another_device_measures_anew(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    import json

    from dpo_cli.runs.checkpoint import MANIFEST, _seal

    words = [*tiny_words(pairs_file, tmp_path / "run"), "optimizer.schedule=constant"]
    assert command("dpo-train", *words, "layout=padded").code == 0
    (tmp_path / "run" / "final").rename(tmp_path / "away")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(
        json.dumps({**state, "settings": {**state["settings"], "device": "cuda", "layout": "packed_segments"}})
    )
    (checkpoint / MANIFEST).unlink()
    _seal(checkpoint)
    resumed = command("dpo-train", *words, "layout=padded", "resume=auto", "max_steps=4")
    assert resumed.code == 0, resumed.err
    assert (
        "padded rows: as requested" in resumed.out and "as when the run began" not in resumed.out.split("\nbatches ")[1]
    )


def test_how_a_batch_is_split_and_laid_out_changes_nothing_beyond_rounding(
    command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    layouts = {
        "auto": [], "one": ["micro_batch_size=1"], "three": ["micro_batch_size=3"], "padded": ["layout=padded"],
        "checkpointed": ["engine.gradient_checkpointing=true"],
    }  # fmt: skip
    for name, words in layouts.items():
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / name), "optimizer.lr=1e-2", *words)
        assert ended.code == 0, ended.err
    first = records(tmp_path / "auto")
    assert abs(first[-1]["rewards/margins"]) > 1e-3
    for name in layouts:
        for one, other in zip(first, records(tmp_path / name), strict=True):
            for key in ("loss", "rewards/margins", "logps/chosen"):
                assert other[key] == pytest.approx(one[key], rel=2e-4, abs=2e-5), (name, key)


def test_free_memory_is_at_most_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < memory.free_memory(CPU) < 2**50
    monkeypatch.setattr(memory, "_left_in_container", lambda: 123)
    assert memory.free_memory(CPU) == 123


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cached"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_files_that_were_read_do_not_count_as_used_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, limit: str, used: str, cached: str
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in ((limit, "1000\n"), (used, "900\n"), ("memory.stat", f"anon 600\n{cached} 300\n")):
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory._left_in_container() == 1000 - 900 + 300
    (tmp_path / folder / limit).write_text("max\n")
    assert memory._left_in_container() == 2**62


def test_weights_that_cannot_fit_are_refused_before_they_are_loaded(
    command: Command, pairs_file: Path, tmp_path: Path, tiny_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    parameters = AutoModelForCausalLM.from_pretrained(tiny_path).num_parameters()
    assert memory.weight_bytes(tiny_path, torch.bfloat16) == 2 * parameters
    assert memory.weight_bytes(str(tmp_path), torch.bfloat16) is None  # a model on the hub: not known yet
    monkeypatch.setattr(memory, "free_memory", lambda _: int(1.5 * 4 * parameters))
    words = tiny_words(pairs_file, tmp_path / "run")
    assert command("dpo-train", *words).code == 0
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "other"), "reference.cache=off")
    assert ended.code == 6
    assert "two models' weights in float32 take " in ended.err and "reference=adapter_off" in ended.err
