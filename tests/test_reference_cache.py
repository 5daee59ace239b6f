"""The reference on disk: the same numbers as the reference itself, another model's values never, torn ones never."""

import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ended, both_at_once, records, tiny_words, write_jsonl
from test_logps import PAIRS
from tiny_models import CPU, LORA, VOCABULARY, pair, tiny
from torch import Tensor

from dpo_cli.console.reporter import Reporter
from dpo_cli.data.batches import Layout, SplitByPairs, SplitByTokens
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.errors import StoppedError
from dpo_cli.models import precompute
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.loading import model_fingerprint
from dpo_cli.models.logps import MicroBatch, MicroBatcher, make_micro_batch
from dpo_cli.models.precompute import FillOptions, complete
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, Reference
from dpo_cli.models.reference_cache import CachedReference, ReferenceCache, cache_key, cache_path
from dpo_cli.storage import logps_file
from dpo_cli.storage.cache_folder import clear_cache
from dpo_cli.storage.logps_file import RECORD
from dpo_cli.training import reference_logps

Command = Callable[..., Ended]
BATCHER = MicroBatcher(CPU, Layout.PACKED_SEGMENTS, SplitByTokens(40, Layout.PACKED_SEGMENTS))
LOGPS = [(-1.5 * n, -2.5 * n) for n in range(1, len(PAIRS) + 1)]  # chosen and rejected


def never() -> Reference:
    raise AssertionError("the reference was loaded")


def the_model() -> Reference:
    return FrozenReference(tiny())


class Heard(Reporter):
    """Keeps what was begun and what was warned of."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.begun: list[int] = []
        self.warned: list[str] = []

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.begun.append(total)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def how(
    load: Callable[[], Reference] = the_model, batcher: MicroBatcher = BATCHER, loaded: Reference | None = None,
    reporter: Reporter | None = None, poll: Callable[[], None] = lambda: None,
) -> FillOptions:  # fmt: skip
    return FillOptions(batcher, torch.float32, load, loaded, reporter or Heard(), poll)


def filled(path: Path | None) -> ReferenceCache:
    cache = ReferenceCache(path)
    complete(cache, [PAIRS], how())
    return cache


def keep(cache: ReferenceCache, pairs: list[TokenizedPair], logps: list[tuple[float, float]]) -> None:
    """Add chosen and rejected of each pair."""
    cache.add([key for pair in pairs for key in pair.response_keys], [logp for both in logps for logp in both])


def known(cache: ReferenceCache, pairs: list[TokenizedPair]) -> list[tuple[float, ...]]:
    """Chosen and rejected of each pair."""
    return [tuple(cache.logps(pair.response_keys)) for pair in pairs]


def test_the_cache_equals_the_second_model_equals_the_adapter_switched_off(tmp_path: Path) -> None:
    filled(tmp_path / "values")
    cached = CachedReference(ReferenceCache(tmp_path / "values"))
    batch = make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)
    policy = attach_lora(tiny(), LORA)
    for other in (FrozenReference(tiny()), AdapterOffReference(policy)):
        assert torch.allclose(cached.logps(batch), other.logps(batch), rtol=1e-6, atol=1e-6)


def test_a_full_cache_loads_no_reference_and_a_hundred_new_rows_cost_a_hundred_rows(tmp_path: Path) -> None:
    filled(tmp_path / "values")
    cache, heard = ReferenceCache(tmp_path / "values"), Heard()
    assert complete(cache, [PAIRS], how(load=never)) == 0
    more = [pair(4, 3, 2, seed) for seed in range(100, 200)]
    assert complete(cache, [PAIRS, more], how(reporter=heard)) == 100
    assert heard.begun == [100]
    assert (tmp_path / "values").stat().st_size == 2 * (len(PAIRS) + 100) * RECORD.itemsize


def test_a_response_is_one_record_of_24_bytes(tmp_path: Path) -> None:
    cache = filled(tmp_path / "values")
    assert (len(cache), (tmp_path / "values").stat().st_size) == (8, 8 * 24)  # four pairs of two responses
    swapped = [replace(one, chosen=one.rejected, rejected=one.chosen) for one in PAIRS]
    assert complete(cache, [swapped], how(load=never)) == 0  # the same responses in another order cost nothing
    assert known(cache, swapped) == [both[::-1] for both in known(cache, PAIRS)]


def test_a_ranking_of_five_answers_is_five_records(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    prompt, *answers = (token_ids(random.integers(2, VOCABULARY, size).tolist()) for size in (4, 3, 6, 2, 5, 4))
    ranking = [TokenizedPair(prompt, better, worse, 0, str(n), 0)
               for n, (better, worse) in enumerate(itertools.combinations(answers, 2))]  # fmt: skip
    cache = ReferenceCache(tmp_path / "values")
    assert complete(cache, [ranking], how()) == 10  # pairs
    assert (len(cache), (tmp_path / "values").stat().st_size) == (5, 5 * 24)
    alone = [make_micro_batch([one], CPU, Layout.PACKED_SEGMENTS) for one in ranking]
    for one, micro_batch in zip(ranking, alone, strict=True):
        assert cache.logps(one.response_keys) == pytest.approx(the_model().logps(micro_batch).tolist(), abs=1e-4)


def test_the_key_of_a_response_changes_with_its_tokens_and_with_nothing_else() -> None:
    one = PAIRS[0]
    longer = token_ids([*one.prompt, 5])
    others = [
        replace(one, prompt=longer), replace(one, chosen=longer), replace(one, rejected=longer),
        replace(one, chosen=one.rejected, rejected=one.chosen), replace(one, chosen=one.chosen[:-1]),
        replace(one, prompt=one.prompt[:-1], chosen=token_ids([one.prompt[-1], *one.chosen])),
    ]  # fmt: skip
    assert len({other.response_keys for other in [one, *others]}) == len(others) + 1
    # Of a prompt and a response: what else the pair holds changes nothing.
    assert len({key for other in [one, *others] for key in other.response_keys}) == 8
    assert replace(one, chosen=longer).response_keys[1] == one.response_keys[1]
    assert replace(one, chosen=one.rejected, rejected=one.chosen).response_keys == one.response_keys[::-1]
    assert replace(one, index=99, key="another").response_keys == one.response_keys


def test_the_key_of_the_file_changes_with_what_decides_a_log_prob_and_with_nothing_else() -> None:
    def key(model: Any, **changes: Any) -> str:
        computed = {"dtype": torch.float32, "device": CPU, "layout": Layout.PACKED_SEGMENTS, **changes}
        return cache_key(model_fingerprint(model), **computed)

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
        key(tiny(), dtype=torch.bfloat16), key(tiny(), layout=Layout.PADDED), key(tiny(), device=torch.device("cuda")),
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
    assert f"reference log-probs: those of {held_out} of {held_out} pairs were in {cache}" in evaluated.out


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
    keep(cache, PAIRS, LOGPS)
    return path.read_bytes()


@pytest.mark.parametrize("cut", range(1, RECORD.itemsize, 5))
def test_a_torn_last_record_is_computed_anew_and_the_file_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "values"
    data = written(path)
    path.write_bytes(data[:-cut])
    cache = ReferenceCache(path)
    assert cache.missing(PAIRS) == PAIRS[-1:]
    assert cache.damaged == 1
    keep(cache, PAIRS[-1:], LOGPS[-1:])
    assert path.read_bytes() == data


@pytest.mark.parametrize("place", range(0, RECORD.itemsize, 3))
def test_a_flipped_bit_is_noticed_and_its_value_computed_anew(tmp_path: Path, place: int) -> None:
    path = tmp_path / "values"
    data = bytearray(written(path))
    data[2 * RECORD.itemsize + place] ^= 4  # the chosen response of the second pair
    path.write_bytes(bytes(data))
    cache = ReferenceCache(path)
    assert (cache.missing(PAIRS), cache.damaged) == (PAIRS[1:2], 1)
    assert known(cache, PAIRS[:1]) == LOGPS[:1]
    heard = Heard()
    assert complete(cache, [PAIRS], how(reporter=heard)) == 1
    assert heard.warned == [f"{path}: 1 record torn or damaged, computed again"]
    right = the_model().logps(make_micro_batch(PAIRS[1:2], CPU, Layout.PACKED_SEGMENTS)).tolist()
    # Its other response keeps the value that it had, and the next one to read the file finds both.
    assert known(ReferenceCache(path), PAIRS[1:2]) == [(pytest.approx(right[0], abs=1e-4), LOGPS[1][1])]


def written_by_version_1(path: Path) -> bytes:
    """A file of the first version: 32 bytes a pair, of which key, both log-probs and 64 bits of checksum."""
    pairs = np.zeros(len(PAIRS), dtype=[("key", "<u8", 2), ("logps", "<f4", 2), ("check", "<u8")])
    for number, one in enumerate(PAIRS):
        digest = hashlib.blake2b(digest_size=16)
        for ids in (one.prompt, one.chosen, one.rejected):
            digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
        pairs["key"][number] = np.frombuffer(digest.digest(), dtype="<u8")
    pairs["logps"] = LOGPS
    words = np.column_stack([pairs["key"], np.ascontiguousarray(pairs["logps"]).view("<u8")])
    check = np.full(len(PAIRS), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for word in words.T:
        check ^= word
        check = (check ^ (check >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        check = (check ^ (check >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        check ^= check >> np.uint64(31)
    pairs["check"] = check
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pairs.tobytes())
    return path.read_bytes()


def test_a_file_of_the_first_version_is_left_alone_and_never_misread(tmp_path: Path) -> None:
    fingerprint, computed = model_fingerprint(tiny()), (torch.float32, CPU, Layout.PACKED_SEGMENTS)
    of_old = hashlib.sha256(json.dumps([1, fingerprint, "torch.float32", "cpu", "segments"]).encode()).hexdigest()[:32]
    old, new = cache_path(of_old), cache_path(cache_key(fingerprint, *computed))
    assert new != old and new.parent == old.parent
    data = written_by_version_1(old)
    new.unlink(missing_ok=True)
    cache = ReferenceCache(new)
    assert (len(cache), cache.missing(PAIRS)) == (0, PAIRS)
    assert complete(cache, [PAIRS], how()) == len(PAIRS)
    assert old.read_bytes() == data
    new.unlink()
    old.unlink()
    # Even under the name of a new one, not a single record of it passes for one.
    data = written_by_version_1(tmp_path / "values")
    misnamed, heard = ReferenceCache(tmp_path / "values"), Heard()
    assert (len(misnamed), misnamed.missing(PAIRS)) == (0, PAIRS)
    assert misnamed.damaged == math.ceil(len(data) / RECORD.itemsize)
    assert complete(misnamed, [PAIRS], how(reporter=heard)) == len(PAIRS)
    assert heard.warned == [f"{tmp_path / 'values'}: {misnamed.damaged} records torn or damaged, computed again"]
    assert known(ReferenceCache(tmp_path / "values"), PAIRS) == known(misnamed, PAIRS) == known(cache, PAIRS)


def test_values_of_another_model_are_noticed_and_never_used(tmp_path: Path) -> None:
    path, heard = tmp_path / "values", Heard()
    cache = ReferenceCache(path)
    keep(cache, PAIRS, LOGPS)
    loaded = the_model()
    assert complete(cache, [PAIRS], how(loaded=loaded, reporter=heard)) == len(PAIRS)
    assert len(heard.warned) == 1 and "its log-probs are dropped and computed again" in heard.warned[0]
    micro_batch = make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)
    right = loaded.logps(micro_batch)[micro_batch.units[:, 0]].tolist()
    assert [chosen for chosen, _ in known(ReferenceCache(path), PAIRS)] == pytest.approx(right, abs=1e-4)


def test_a_run_on_a_cache_of_another_model_says_so_and_starts_at_ln2(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path
) -> None:
    words = tiny_words(pairs_file, tmp_path / "one")
    assert command("dpo-train", *words).code == 0
    for path in (cache / "reference").iterdir():
        lies = np.frombuffer(path.read_bytes(), dtype=RECORD).copy()
        lies["logp"] = -8.0
        lies["check"] = logps_file.checks(lies)
        path.write_bytes(lies.tobytes())
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "two"))
    assert ended.code == 0
    assert "its log-probs are dropped and computed again" in " ".join(ended.out.split())
    assert records(tmp_path / "two")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert records(tmp_path / "two")[0]["rewards/margins"] == 0


def test_a_cache_that_cannot_be_written_is_said_and_the_run_goes_on(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("dpo_cli.training.build.cache_path", lambda key: tmp_path / "file" / key)
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"))
    assert ended.code == 0
    assert "cannot be read (Not a directory); its log-probs stay in memory" in " ".join((ended.out + ended.err).split())


def test_a_stop_in_the_reference_pass_keeps_what_was_done(tmp_path: Path) -> None:
    asked = 0

    def poll() -> None:
        nonlocal asked
        asked += 1
        if asked == 6:  # a batch of two pairs asks once before it and once a micro-batch
            raise StoppedError("stopped")

    cache = ReferenceCache(tmp_path / "values")
    one_by_one = replace(BATCHER, split=SplitByPairs(1))
    with pytest.raises(StoppedError):
        complete(cache, [PAIRS[:2], PAIRS[2:]], how(batcher=one_by_one, poll=poll))
    assert ReferenceCache(tmp_path / "values").missing(PAIRS) == PAIRS[2:]


def test_a_writer_waits_for_another_and_neither_loses_a_record(tmp_path: Path) -> None:
    path = tmp_path / "values"
    write = (
        "import sys; from pathlib import Path; from dpo_cli.data.tokens import TokenizedPair, token_ids\n"
        "from dpo_cli.models.reference_cache import ReferenceCache\n"
        "who = int(sys.argv[2]); cache = ReferenceCache(Path(sys.argv[1]))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(50):\n"
        "    pair = TokenizedPair(token_ids([who]), token_ids([n]), token_ids([n, 1]), n, '', n)\n"
        "    cache.add(pair.response_keys, [float(-n), float(-who)])\n"
    )
    both_at_once(write, path)
    cache = ReferenceCache(path)
    assert (len(cache), cache.damaged) == (200, 0)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more


def test_a_writer_killed_at_any_byte_leaves_a_cache_that_the_next_one_mends(tmp_path: Path) -> None:
    path = tmp_path / "values"
    data = written(path)
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        cache = ReferenceCache(path)
        lacking = cache.missing(PAIRS)
        assert len(lacking) == len(PAIRS) - size // RECORD.itemsize // 2
        keep(cache, lacking, LOGPS[len(PAIRS) - len(lacking) :])
        assert path.read_bytes() == data


def test_an_unreadable_cache_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "values"
    os.mkdir(folder)
    cache = ReferenceCache(folder)
    assert cache.trouble is not None and "cannot be read" in cache.trouble
    keep(cache, PAIRS, LOGPS)
    assert cache.missing(PAIRS) == []


def test_rows_added_to_the_data_cost_only_themselves(command: Command, tmp_path: Path) -> None:
    from conftest import sample_rows

    rows = [{**row, "prompt": "Here: " + row["prompt"]} for row in sample_rows(20)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows[:12])
    words = ["data.eval_fraction=0", "epochs=1", "max_steps=null"]
    command("dpo-train", *tiny_words(file, tmp_path / "one"), *words)
    write_jsonl(file, rows)
    ended = command("dpo-train", *tiny_words(file, tmp_path / "two"), *words)
    assert "reference log-probs of 8 pairs computed in" in ended.out


def test_a_pass_that_was_cut_off_is_completed_beside_the_same_pairs(tmp_path: Path) -> None:
    """In bfloat16 a value depends on the row it was computed in: what is missing is asked for beside what is there."""
    asked: list[list[TokenizedPair]] = []

    class Watched(FrozenReference):
        def logps(self, micro_batch: MicroBatch) -> Tensor:
            asked.append(list(micro_batch.examples))
            return super().logps(micro_batch)

    class FirstAndRest(SplitByPairs):
        def __call__(self, batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
            return [batch[:1], batch[1:]]

    cache = ReferenceCache(tmp_path / "values")
    keep(cache, PAIRS[:2], LOGPS[:2])
    split = replace(BATCHER, split=FirstAndRest(1))
    complete(cache, [PAIRS], how(lambda: Watched(tiny()), batcher=split))
    assert asked == [PAIRS[1:]]  # not PAIRS[2:], and not the micro-batch of which all is known
    assert known(cache, PAIRS[:2]) == LOGPS[:2]  # what is there stays


def test_a_run_takes_the_values_it_began_with_before_those_of_the_cache(tmp_path: Path) -> None:
    own, shared = filled(tmp_path / "own"), ReferenceCache(tmp_path / "shared")
    keep(shared, PAIRS, LOGPS)
    copy = tmp_path / "reference_logps.bin"
    own.write(copy, [PAIRS, PAIRS], b"these four pairs")
    assert copy.stat().st_size == 48 + 24 * 2 * len(PAIRS)  # each once, behind a header
    assert shared.adopt(copy)
    assert known(shared, PAIRS) == known(own, PAIRS)
    assert not shared.adopt(tmp_path / "nowhere")
    copy.write_bytes(copy.read_bytes()[:-1])
    assert not ReferenceCache(None).adopt(copy)


# More pairs than are gone through in a moment


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Four pairs are many, the cache is empty. Hears how many batches each set of pairs has that is gone through."""
    clear_cache()
    original, surveys = precompute.survey, list[int]()

    def survey(cache: ReferenceCache, needed: Any, *more: Any) -> Any:
        surveys.append(len(needed))
        return original(cache, needed, *more)

    monkeypatch.setattr(reference_logps, "LARGE", 4)
    monkeypatch.setattr(precompute, "survey", survey)
    return surveys


EPOCH = ("max_steps=null", "epochs=1", "seed=31")


def test_a_later_run_on_the_same_pairs_goes_through_none_of_them(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path, large: list[int]
) -> None:
    first = command("dpo-train", *tiny_words(pairs_file, tmp_path / "one"), *EPOCH)
    assert first.code == 0 and len(large) == 1
    second = command(
        "dpo-train", *tiny_words(pairs_file, tmp_path / "two"), *EPOCH, "optimizer.lr=1e-4", "batch_size=3"
    )
    assert second.code == 0 and len(large) == 1
    assert "reference log-probs of" not in second.out
    one, two = (tmp_path / name / "reference_logps.bin" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    steps = command("dpo-train", *tiny_words(pairs_file, tmp_path / "three"), "max_steps=2", "seed=31")
    assert steps.code == 0 and len(large) == 2  # another set of pairs
    write_jsonl(pairs_file, [json.loads(line) for line in pairs_file.read_text().splitlines()][:-1])
    fewer = command("dpo-train", *tiny_words(pairs_file, tmp_path / "four"), *EPOCH)
    assert fewer.code == 0 and len(large) == 3


def test_a_resumed_run_reads_its_own_log_probs_and_goes_through_no_pairs(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path, large: list[int]
) -> None:
    run = tmp_path / "one"
    words = [*tiny_words(pairs_file, run), *EPOCH, "save_every=1", "keep_checkpoints=9"]
    assert command("dpo-train", *words).code == 0 and len(large) == 1
    before, lines = (run / "reference_logps.bin").stat().st_ino, records(run)
    shutil.rmtree(run / "final")
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    shutil.rmtree(cache / "reference")
    assert command("dpo-train", *words, "resume=auto").code == 0
    assert len(large) == 1 and (run / "reference_logps.bin").stat().st_ino == before
    assert [line["loss"] for line in records(run)] == [line["loss"] for line in lines]


def test_a_damaged_list_of_log_probs_is_not_used(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path, large: list[int]
) -> None:
    assert command("dpo-train", *tiny_words(pairs_file, tmp_path / "one"), *EPOCH).code == 0
    (kept,) = (file for file in (cache / "reference").glob("*-*.logps"))
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(bytes(data))
    before = len(large)
    again = command("dpo-train", *tiny_words(pairs_file, tmp_path / "two"), *EPOCH)
    assert again.code == 0 and len(large) == before + 1
    assert [line["loss"] for line in records(tmp_path / "two")] == [line["loss"] for line in records(tmp_path / "one")]
