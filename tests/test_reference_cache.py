"""The reference on disk: the same numbers as the reference itself, another model's values never, torn ones never."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, tiny_words, write_jsonl
from test_logps import PAIRS
from tiny_models import CPU, LORA, pair, tiny

from dpo_cli.data.batches import Layout, SplitByTokens
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.errors import StoppedError
from dpo_cli.models import reference_cache
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.loading import model_fingerprint
from dpo_cli.models.logps import Batch, MicroBatcher, make_micro_batch
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, Reference
from dpo_cli.models.reference_cache import (
    RECORD,
    CachedReference,
    ReferenceCache,
    cache_key,
    complete,
)
from dpo_cli.theory.losses import PairLogps
from dpo_cli.training.parts import Progress

Command = Callable[..., Ended]
BATCHING = MicroBatcher(CPU, Layout.PACKED_SEGMENTS, SplitByTokens(40, Layout.PACKED_SEGMENTS))
VALUES = [(-1.5 * n, -2.5 * n) for n in range(1, len(PAIRS) + 1)]


def never() -> Reference:
    raise AssertionError("the reference was loaded")


def filled(path: Path | None) -> ReferenceCache:
    cache = ReferenceCache(path)
    complete(cache, [PAIRS], BATCHING, torch.float32, lambda: FrozenReference(tiny()), None, Progress())
    return cache


def test_the_cache_equals_the_second_model_equals_the_adapter_switched_off(tmp_path: Path) -> None:
    filled(tmp_path / "values")
    cached = CachedReference(ReferenceCache(tmp_path / "values"))
    batch = make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)
    policy = attach_lora(tiny(), LORA)
    for other in (FrozenReference(tiny()), AdapterOffReference(policy)):
        for one, two in zip(vars(cached.logps(batch)).values(), vars(other.logps(batch)).values(), strict=True):
            assert torch.allclose(one.float(), two.float(), rtol=1e-6, atol=1e-6)


def test_a_full_cache_loads_no_reference_and_a_hundred_new_rows_cost_a_hundred_rows(tmp_path: Path) -> None:
    filled(tmp_path / "values")
    cache, heard = ReferenceCache(tmp_path / "values"), []
    assert complete(cache, [PAIRS], BATCHING, torch.float32, never, None, Progress()) == 0
    more = [pair(4, 3, 2, seed) for seed in range(100, 200)]
    progress = Progress(begin=heard.append)
    assert (
        complete(cache, [PAIRS, more], BATCHING, torch.float32, lambda: FrozenReference(tiny()), None, progress) == 100
    )
    assert heard == [100]
    assert (tmp_path / "values").stat().st_size == (len(PAIRS) + 100) * RECORD.itemsize


def test_the_key_of_a_pair_changes_with_its_tokens_and_with_nothing_else() -> None:
    one = PAIRS[0]
    longer = token_ids([*one.prompt, 5])
    others = [
        replace(one, prompt=longer), replace(one, chosen=longer), replace(one, rejected=longer),
        replace(one, chosen=one.rejected, rejected=one.chosen), replace(one, chosen=one.chosen[:-1]),
        replace(one, prompt=one.prompt[:-1], chosen=token_ids([one.prompt[-1], *one.chosen])),
    ]  # fmt: skip
    assert len({other.token_key for other in [one, *others]}) == len(others) + 1
    assert replace(one, index=99, key="another").token_key == one.token_key


def test_the_key_of_the_file_changes_with_what_decides_a_log_prob_and_with_nothing_else() -> None:
    def key(model: Any, **changes: Any) -> str:
        how = {"dtype": torch.float32, "device": CPU, "way": Layout.PACKED_SEGMENTS, **changes}
        return cache_key(model_fingerprint(model), **how)

    same, moved = tiny(), tiny()
    same.config._name_or_path = "/somewhere/else"
    with torch.no_grad():
        moved.model.norm.weight[0] += 1e-6
    swapped = tiny()
    with torch.no_grad():  # the same numbers in other places
        layers = swapped.model.layers
        layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight = (
            layers[1].mlp.up_proj.weight, layers[0].mlp.up_proj.weight,
        )  # fmt: skip
    assert key(same) == key(tiny())
    different = [
        key(tiny()), key(moved), key(swapped), key(tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
        key(tiny(), dtype=torch.bfloat16), key(tiny(), way=Layout.PADDED), key(tiny(), device=torch.device("cuda")),
        key(tiny(), compiled=True),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_what_a_run_does_with_the_values_is_no_part_of_the_key(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path
) -> None:
    first = command("dpo-train", *tiny_words(pairs_file, tmp_path / "one"), "seed=5")
    assert "reference log-probs of " in first.out or "not loaded: " in first.out
    words = ["beta=0.3", "optimizer.lr=1e-4", "loss=ipo", "lora.r=4", "seed=5", "batch_size=2", "max_steps=6"]
    second = command("dpo-train", *tiny_words(pairs_file, tmp_path / "two"), *words)
    assert second.code == 0
    assert "not loaded: " in second.out and "reference log-probs of" not in second.out
    evaluated = command("dpo-eval", f"checkpoint={tmp_path / 'two'}")
    assert evaluated.code == 0
    held_out = len(next((tmp_path / "two" / "eval").rglob("pairs.jsonl")).read_text().splitlines())
    assert f"reference log-probs: {held_out} of {held_out} were in {cache}" in evaluated.out


def test_another_max_length_asks_the_reference_anew(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    command("dpo-train", *tiny_words(pairs_file, tmp_path / "one"), "seed=6")
    other = command("dpo-train", *tiny_words(pairs_file, tmp_path / "two"), "seed=6", "data.max_length=60")
    assert "reference log-probs of " in other.out


@pytest.mark.parametrize("words", [(), ("reference=adapter_off",), ("lora=off", "optimizer.lr=1e-4")])
def test_a_cached_run_is_the_run_with_the_reference_in_the_loop(
    command: Command, pairs_file: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for name, cache in (("cached", "auto"), ("loop", "off")):
        run = [*tiny_words(pairs_file, tmp_path / name), f"reference.cache={cache}", *words]
        assert command("dpo-train", *run).code == 0
    for one, two in zip(records(tmp_path / "cached"), records(tmp_path / "loop"), strict=True):
        for key in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected"):
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_computed_in_the_batches_that_are_trained_on(
    command: Command, pairs_file: Path, tmp_path: Path, dtype: str
) -> None:
    words = [*tiny_words(pairs_file, tmp_path / "run"), f"model.dtype={dtype}", "seed=77", "batch_size=5"]
    assert command("dpo-train", *words, "optimizer.lr=1e-30").code == 0
    for record in records(tmp_path / "run"):  # a rate that moves no weight: every batch starts where the policy does
        if record["split"] == "train":
            assert (record["rewards/margins"], record["rewards/accuracies"]) == (0, 0.5)


# Damage


def written(path: Path) -> bytes:
    cache = ReferenceCache(path)
    cache.add(PAIRS, VALUES)
    return path.read_bytes()


@pytest.mark.parametrize("cut", range(1, RECORD.itemsize, 5))
def test_a_torn_last_record_is_computed_anew_and_the_file_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "values"
    data = written(path)
    path.write_bytes(data[:-cut])
    cache = ReferenceCache(path)
    assert cache.missing(PAIRS) == PAIRS[-1:]
    assert cache.damaged == 1
    cache.add(PAIRS[-1:], VALUES[-1:])
    assert path.read_bytes() == data


@pytest.mark.parametrize("place", range(0, RECORD.itemsize, 3))
def test_a_flipped_bit_is_noticed_and_its_value_computed_anew(tmp_path: Path, place: int) -> None:
    path = tmp_path / "values"
    data = bytearray(written(path))
    data[RECORD.itemsize + place] ^= 4
    path.write_bytes(bytes(data))
    cache = ReferenceCache(path)
    assert (cache.missing(PAIRS), cache.damaged) == (PAIRS[1:2], 1)
    assert cache.logps(PAIRS[:1]) == ([VALUES[0][0]], [VALUES[0][1]])


def test_values_of_another_model_are_noticed_and_never_used(tmp_path: Path) -> None:
    path, warned = tmp_path / "values", []
    cache = ReferenceCache(path)
    cache.add(PAIRS, VALUES)
    at_hand = FrozenReference(tiny())
    progress = Progress(warn=warned.append)
    assert complete(cache, [PAIRS], BATCHING, torch.float32, lambda: at_hand, at_hand, progress) == len(PAIRS)
    assert len(warned) == 1 and "its values are dropped and computed anew" in warned[0]
    right = at_hand.logps(make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)).chosen.tolist()
    assert ReferenceCache(path).logps(PAIRS)[0] == pytest.approx(right, abs=1e-4)


def test_a_run_on_a_cache_of_another_model_says_so_and_starts_at_ln2(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path
) -> None:
    words = tiny_words(pairs_file, tmp_path / "one")
    assert command("dpo-train", *words).code == 0
    for path in (cache / "reference").iterdir():
        known = ReferenceCache(path)
        lies = [TokenizedPair(token_ids([1]), token_ids([n]), token_ids([2]), 0, "") for n in range(len(known))]
        data = path.read_bytes()
        path.unlink()
        other = ReferenceCache(path)
        other.add(lies, [(-7.0, -9.0)] * len(lies))
        import numpy as np

        records_there = np.frombuffer(path.read_bytes(), dtype=RECORD).copy()
        records_there["key"] = np.frombuffer(data, dtype=RECORD)["key"]
        records_there["check"] = reference_cache._checks(records_there)
        path.write_bytes(records_there.tobytes())
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "two"))
    assert ended.code == 0
    assert "its values are dropped and computed anew" in " ".join(ended.out.split())
    assert records(tmp_path / "two")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert records(tmp_path / "two")[0]["rewards/margins"] == 0


def test_a_cache_that_cannot_be_written_is_said_and_the_run_goes_on(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("dpo_cli.training.build.cache_path", lambda key: tmp_path / "file" / key)
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"))
    assert ended.code == 0
    assert "cannot be read (Not a directory); its values stay in memory" in " ".join((ended.out + ended.err).split())


def test_a_stop_in_the_reference_pass_keeps_what_was_done(tmp_path: Path) -> None:
    asked = 0

    def poll() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise StoppedError("stopped")

    cache = ReferenceCache(tmp_path / "values")
    one_by_one = replace(BATCHING, cut=lambda pairs: [[one] for one in pairs])
    with pytest.raises(StoppedError):
        complete(cache, [PAIRS], one_by_one, torch.float32, lambda: FrozenReference(tiny()), None, Progress(poll=poll))
    assert ReferenceCache(tmp_path / "values").missing(PAIRS) == PAIRS[2:]


def test_a_writer_waits_for_another_and_neither_loses_a_record(tmp_path: Path) -> None:
    path = tmp_path / "values"
    write = (
        "import sys; from pathlib import Path; from dpo_cli.data.tokens import TokenizedPair, token_ids\n"
        "from dpo_cli.models.reference_cache import ReferenceCache\n"
        "who = int(sys.argv[2]); cache = ReferenceCache(Path(sys.argv[1]))\n"
        "for n in range(200):\n"
        "    pair = TokenizedPair(token_ids([who]), token_ids([n]), token_ids([1]), n, '')\n"
        "    cache.add([pair], [(float(-n), float(-who))])\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", write, str(path), str(who)]) for who in (1, 2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    cache = ReferenceCache(path)
    assert (len(cache), cache.damaged) == (400, 0)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more


def test_a_writer_killed_at_any_byte_leaves_a_cache_that_the_next_one_mends(tmp_path: Path) -> None:
    path = tmp_path / "values"
    data = written(path)
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        cache = ReferenceCache(path)
        lacking = cache.missing(PAIRS)
        assert len(lacking) == len(PAIRS) - size // RECORD.itemsize
        cache.add(lacking, VALUES[-len(lacking) :] if lacking else [])
        assert path.read_bytes() == data


def test_an_unreadable_cache_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "values"
    os.mkdir(folder)
    cache = ReferenceCache(folder)
    assert cache.trouble is not None and "cannot be read" in cache.trouble
    cache.add(write_pairs(), VALUES)
    assert cache.missing(PAIRS) == []


def write_pairs() -> list[TokenizedPair]:
    return PAIRS


def test_rows_added_to_the_data_cost_only_themselves(command: Command, tmp_path: Path) -> None:
    from conftest import sample_rows

    rows = [{**row, "prompt": "Here: " + row["prompt"]} for row in sample_rows(20)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows[:12])
    words = ["data.eval_fraction=0", "epochs=1", "max_steps=null"]
    command("dpo-train", *tiny_words(file, tmp_path / "one"), *words)
    write_jsonl(file, rows)
    ended = command("dpo-train", *tiny_words(file, tmp_path / "two"), *words)
    assert "reference log-probs of 8 pairs computed in" in ended.out


def test_a_pass_that_was_cut_off_is_completed_in_the_same_company(tmp_path: Path) -> None:
    """In bfloat16 a value depends on the row it was computed in: what is missing is asked for beside what is there."""
    asked: list[list[TokenizedPair]] = []

    class Watched(FrozenReference):
        def logps(self, batch: Batch) -> PairLogps:
            asked.append(list(batch.pairs))
            return super().logps(batch)

    cache = ReferenceCache(tmp_path / "values")
    cache.add(PAIRS[:2], VALUES[:2])
    pieces = replace(BATCHING, cut=lambda pairs: [list(pairs[:1]), list(pairs[1:])])
    complete(cache, [PAIRS], pieces, torch.float32, lambda: Watched(tiny()), None, Progress())
    assert asked == [PAIRS[1:]]  # not PAIRS[2:], and not the piece of which all is known
    assert cache.logps(PAIRS[:2]) == ([c for c, _ in VALUES[:2]], [r for _, r in VALUES[:2]])  # what is there stays


def test_a_run_takes_the_values_it_began_with_before_those_of_the_cache(tmp_path: Path) -> None:
    own, shared = filled(tmp_path / "own"), ReferenceCache(tmp_path / "shared")
    shared.add(PAIRS, VALUES)
    copy = tmp_path / "reference.logps"
    copy.write_bytes(own.records([*PAIRS, *PAIRS]))
    assert copy.stat().st_size == 32 * len(PAIRS)  # each once
    assert shared.adopt(copy)
    assert shared.logps(PAIRS) == own.logps(PAIRS)
    assert not shared.adopt(tmp_path / "nowhere")
    copy.write_bytes(copy.read_bytes()[:-1])
    assert not ReferenceCache(None).adopt(copy)
