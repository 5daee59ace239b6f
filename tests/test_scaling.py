"""The cost model of a step: its formulas by hand, and its sizes against models that are known."""

from pathlib import Path

import pytest
import scaling
from scaling import CASES, LLAMA_7B, NODE, SIZES, SMOLLM2, Case, Machine, Model

UNIT = Machine(rate=1, memory=1, link=1, latency=0)


def test_a_ring_sends_every_part_but_its_own() -> None:
    """100 bytes on 4 ranks: 3 hops of 25 bytes gather them; a sum needs a reduce-scatter as well."""
    machine = Machine(1, 1, link=1, latency=2)
    assert scaling.all_gather(100, 4, machine) == 3 * 25 + 3 * 2
    assert scaling.all_gather(100, 4, machine, messages=5) == 3 * 25 + 5 * 3 * 2
    assert scaling.all_reduce(100, 4, machine) == 2 * (3 * 25 + 3 * 2)
    assert scaling.all_reduce(100, 1, machine) == 0


def test_sizes_are_those_of_the_models() -> None:
    assert SMOLLM2.adapters(16) == 4_884_480  # PEFT counts as many: 19.5 MB of float32 gradients
    assert SMOLLM2.weights() == 134_515_008 - 61 * 576  # its parameters (the head is tied) without the norms
    assert LLAMA_7B.weights() == 6_738_415_616 - 32000 * 4096 - 65 * 4096  # without embedding and norms


def test_the_parts_of_a_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RANK_TOKENS", 10)
    model = Model(hidden=1, intermediate=1, layers=1, keys=1, vocabulary=1)
    weights, adapters = 2 + 2 + 3 + 1, 9 + 2 + 3
    flops, memory, link = scaling.step_seconds(Case("", model, r=1, least=1, color=""), 2, UNIT)
    assert flops == 10 * (4 * weights + 6 * adapters)
    assert memory == 2 * 2 * weights + 2 * 2 * 17 * 10 + 28 * adapters  # bfloat16
    assert link == 4 * adapters  # two ranks: half of it out, and the other half
    flops, memory, link = scaling.step_seconds(Case("", model, r=0, least=2, color=""), 2, UNIT)
    assert flops == 10 * 6 * weights
    assert memory == 2 * 4 * weights + 2 * 4 * 17 * 10 + 2 * 2 * 4 * weights + 28 * weights / 2  # float32
    assert link == (4 + 4 + 4) * weights / 2


def test_the_fit_finds_the_constants_that_made_the_points() -> None:
    true = Machine(1, 1, link=2e9, latency=1e-4)
    link, latency = scaling.fit_link(4, SIZES, [scaling.all_reduce(size, 4, true) for size in SIZES])
    assert (link, latency) == (pytest.approx(2e9), pytest.approx(1e-4))


def test_only_adapters_cross_the_link_under_ddp_and_a_slow_network_hurts_fsdp() -> None:
    ddp, fsdp, _ = CASES
    parts = {
        case: [scaling.step_seconds(case, 64, scaling.h100(case, 64, n)) for n in (NODE, 1)] for case in (ddp, fsdp)
    }
    fast, slow = parts[ddp]
    assert slow[2] < 0.03 * slow[0]
    fast, slow = parts[fsdp]
    assert fast[2] < fast[0] < slow[2]


def test_the_figure_is_drawn_and_the_table_says_that_it_is_a_calculation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seconds = [scaling.all_reduce(size, 2, Machine(1, 1, 1e9, 1e-4)) for size in SIZES]
    scaling.draw({2: seconds, 4: seconds}, tmp_path / "scale.svg")
    assert (tmp_path / "scale.svg").read_text().startswith("<?xml")
    assert scaling.table().startswith("calculated,")
    assert "not measured" in (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
