"""Sorted files of log-probs: the values of a dict, whatever was added, merged, damaged or written at the same time."""

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import both_at_once, share
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.engine.engine import SingleEngine
from dpo_cli.errors import StorageError
from dpo_cli.models import reference_cache
from dpo_cli.models.reference_cache import ReferenceCache
from dpo_cli.storage import logps_file
from dpo_cli.storage.logps_file import (
    HEADER_BYTES,
    RECORD,
    blocks_of,
    in_memory,
    make_records,
    merged,
    sorted_at,
    sorted_runs,
    words_of,
    write_sorted,
)


def random_keys(number: int, seed: int = 0) -> list[bytes]:
    data = np.random.default_rng(seed).bytes(16 * number)
    return [data[16 * n : 16 * n + 16] for n in range(number)]


def write(path: Path, keys: list[bytes], logps: list[float]) -> None:
    """A file of which all is sorted."""
    write_sorted(path, merged([make_records(keys, logps)]))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few records are many: merges and blocks come often."""
    monkeypatch.setattr(reference_cache, "UNSORTED", 8)
    monkeypatch.setattr(logps_file, "BLOCK", 16)
    monkeypatch.setattr(reference_cache, "BLOCK", 16)


def test_a_sorted_file_gives_the_values_of_a_dict_for_thousands_of_keys(tmp_path: Path) -> None:
    keys = random_keys(20_000)
    expected = {key: float(n) for n, key in enumerate(keys)}
    write(tmp_path / "values", keys, list(expected.values()))
    found = sorted_at(tmp_path / "values")
    values, known = found.find(words_of(keys))
    assert known.all() and values.tolist() == list(expected.values())
    assert not found.find(words_of(random_keys(20_000, seed=1)))[1].any()
    assert found.is_whole() and len(found) == 20_000
    words = found.records["key"].tolist()
    assert words == sorted(words)


# Keys whose first words are alike, at the ends of the range, and not spread as those of hashes are.
KEYS = st.builds(
    lambda first, second: first.to_bytes(8, "little") + second.to_bytes(8, "little"),
    st.sampled_from([0, 1, 5, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    st.integers(0, 3) | st.integers(0, 2**64 - 1),
)  # fmt: skip
VALUES = st.dictionaries(KEYS, st.floats(-1e6, 0, width=32), max_size=40)


@share(1)
@given(st.lists(VALUES, min_size=1, max_size=4), st.lists(KEYS, max_size=10), st.sampled_from([3, 16, 2**19]))
def test_of_several_sources_the_first_that_knows_a_key_has_the_word(
    sources: list[dict[bytes, float]], others: list[bytes], block: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logps_file, "BLOCK", block)
        records = [make_records(list(source), list(source.values())) for source in sources]
        found = in_memory(merged(records))
    expected: dict[bytes, float] = {}
    for source in sources:
        expected = {**source, **expected}
    assert len(found) == len(expected)
    asked = [*expected, *others]
    values, known = found.find(words_of(asked))
    assert known.tolist() == [key in expected for key in asked]
    assert values.tolist() == [expected.get(key, 0.0) for key in asked]


@share(0.5)
@given(st.lists(st.tuples(st.sampled_from(["one", "two"]), st.booleans(), VALUES), max_size=12))
def test_two_that_write_and_merge_one_file_keep_the_values_they_have_used(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bool, dict[bytes, float]]]
) -> None:
    path = tmp_path_factory.mktemp("cache") / "values"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference_cache, "UNSORTED", 8)
        patched.setattr(logps_file, "BLOCK", 16)
        caches = {"one": ReferenceCache(path), "two": ReferenceCache(path)}
        used: dict[str, dict[bytes, float]] = {"one": {}, "two": {}}
        given_values: dict[bytes, set[float]] = {}
        for who, again, values in steps:
            if again:
                caches[who], used[who] = ReferenceCache(path), {}
            caches[who].add(list(values), list(values.values()))
            for key, logp in values.items():
                given_values.setdefault(key, set()).add(logp)
            for key, logp in zip(values, caches[who].logps(list(values)), strict=True):
                assert used[who].setdefault(key, logp) == logp
            assert caches[who].logps(list(used[who])) == list(used[who].values())
        last = ReferenceCache(path)
        assert (last.damaged, last.trouble) == (0, None)
        assert all(logp in given_values[key] for key, logp in zip(given_values, last.logps(list(given_values)),
                                                                strict=True))  # fmt: skip


def test_what_is_appended_is_merged_and_memory_holds_few(tmp_path: Path, small: None) -> None:
    path, keys = tmp_path / "values", random_keys(100)
    cache = ReferenceCache(path)
    for start in range(0, 100, 5):
        cache.add(keys[start : start + 5], [float(n) for n in range(start, start + 5)])
        assert len(cache._recent) <= 8
    assert len(cache) == 100 and len(cache._sorted) > 90
    assert cache.logps(keys) == ReferenceCache(path).logps(keys) == [float(n) for n in range(100)]
    assert path.stat().st_size == HEADER_BYTES + 100 * RECORD.itemsize
    assert [file.name for file in tmp_path.iterdir()] == ["values"]


def test_without_a_file_the_values_are_sorted_in_memory(small: None) -> None:
    keys, cache = random_keys(100), ReferenceCache(None)
    for start in range(0, 100, 5):
        cache.add(keys[start : start + 5], [float(n) for n in range(start, start + 5)])
    assert cache.logps(keys) == [float(n) for n in range(100)] and len(cache._recent) <= 8


def test_a_file_without_a_header_is_read_and_merged_when_it_is_opened(tmp_path: Path, small: None) -> None:
    """Files of the version before: records in the order in which they were computed."""
    path, keys = tmp_path / "values", random_keys(50)
    path.write_bytes(make_records([*keys, keys[0]], [*map(float, range(50)), -1.0]).tobytes() + b"torn")
    cache = ReferenceCache(path)
    assert cache.logps(keys) == [float(n) for n in range(50)] and cache.damaged == 1
    assert len(sorted_at(path)) == 50 and ReferenceCache(path).damaged == 0


def test_a_file_that_may_not_be_written_is_read_all_the_same(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, keys = tmp_path / "values", random_keys(50)
    path.write_bytes(make_records(keys, [0.5] * 50).tobytes())
    before = path.read_bytes()

    def refused(*_: Any) -> Any:
        raise StorageError("read only")

    monkeypatch.setattr(reference_cache, "opened_in_place", refused)
    cache = ReferenceCache(path)
    assert cache.logps(keys) == [0.5] * 50 and path.read_bytes() == before


@pytest.mark.parametrize("place", range(0, HEADER_BYTES + 3 * RECORD.itemsize, 5))
def test_damage_in_the_sorted_part_gives_no_wrong_value_and_is_mended(tmp_path: Path, small: None, place: int) -> None:
    path, keys = tmp_path / "values", random_keys(40)
    write(path, keys, [float(n) for n in range(40)])
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))
    cache = ReferenceCache(path)
    values, known = cache.find(keys)
    assert all(value == n for n, value in enumerate(values.tolist()) if known[n])
    assert known.sum() >= 30  # one bit does not hide the others
    lacking = [n for n in range(40) if not known[n]]
    cache.add([keys[n] for n in lacking], [float(n) for n in lacking])
    more = random_keys(20, seed=2)
    cache.add(more, [0.0] * 20)  # a merge puts what was damaged in order
    again = ReferenceCache(path)
    assert again.logps([*keys, *more]) == cache.logps([*keys, *more]) == [*map(float, range(40)), *[0.0] * 20]
    assert sorted_at(path).is_whole()
    # Of a header that was lost its second record stays, under a key that nothing has.
    assert len(again) == 60 + (place < 8)


def test_a_damaged_value_is_counted_once_when_it_is_used(tmp_path: Path) -> None:
    path, keys = tmp_path / "values", random_keys(40)
    write(path, keys, [1.0] * 40)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 16] ^= 1  # the log-prob of the first record
    path.write_bytes(bytes(data))
    cache = ReferenceCache(path)
    assert cache.damaged == 0
    assert [cache.find(keys)[1].sum() for _ in range(2)] == [39, 39]
    assert cache.damaged == 1
    with pytest.raises(StorageError, match="1 record missing or damaged since the run began; start it again"):
        cache.logps(keys)


@pytest.mark.parametrize("cut", [1, 24, 25, 100])
def test_a_sorted_file_that_lost_its_end_is_put_in_order(tmp_path: Path, cut: int) -> None:
    path, keys = tmp_path / "values", random_keys(40)
    write(path, keys, [1.0] * 40)
    path.write_bytes(path.read_bytes()[:-cut])
    cache = ReferenceCache(path)
    left = 40 - -(-cut // RECORD.itemsize)
    assert cache.find(keys)[1].sum() == left
    assert len(sorted_at(path)) == left and sorted_at(path).is_whole()


def test_a_file_that_is_removed_or_replaced_does_no_harm_to_who_reads_it(tmp_path: Path, small: None) -> None:
    path, keys, more = tmp_path / "values", random_keys(40), random_keys(60, seed=3)
    write(path, keys, [1.0] * 40)
    cache = ReferenceCache(path)
    path.unlink()
    assert cache.logps(keys) == [1.0] * 40
    cache.add(more[:5], [2.0] * 5)
    assert ReferenceCache(path).logps(more[:5]) == [2.0] * 5  # it was made again
    write(path, more[:10], [3.0] * 10)  # another process has replaced it
    cache.add(more[5:], [2.0] * 55)
    assert cache.logps([*keys, *more]) == [1.0] * 40 + [2.0] * 60
    assert ReferenceCache(path).find([*keys, *more])[1].all()  # the merge has brought all of it back


def test_a_value_that_was_used_stays_where_another_process_wrote_one_for_the_same_key_first(
    tmp_path: Path, small: None
) -> None:
    keys, more = random_keys(1), random_keys(20, seed=6)
    one, two = ReferenceCache(tmp_path / "values"), ReferenceCache(tmp_path / "values")
    one.add(keys, [1.0])
    two.add(keys, [2.0])  # beside other pairs of a batch it was rounded differently
    for cache in (two, one):
        cache.add(more, [0.0] * 20)  # a merge
        assert not cache._recent
    assert (one.logps(keys), two.logps(keys)) == ([1.0], [2.0])


def test_a_writer_that_waited_for_a_file_that_was_replaced_writes_to_the_new_one(tmp_path: Path) -> None:
    path, keys = tmp_path / "values", random_keys(3)
    cache = ReferenceCache(path)
    cache.add(keys[:1], [1.0])
    with logps_file.opened_in_place(path):
        waiting = threading.Thread(target=cache.add, args=(keys[1:2], [2.0]))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        write(path, [keys[0], keys[2]], [1.0, 3.0])  # a merge ends with a rename
    waiting.join()
    assert ReferenceCache(path).logps(keys) == [1.0, 2.0, 3.0]


def test_two_processes_that_both_merge_lose_no_record(tmp_path: Path) -> None:
    path = tmp_path / "values"
    code = (
        "import sys; from pathlib import Path; from dpo_cli.models import reference_cache\n"
        "reference_cache.UNSORTED = 8\n"
        "who = int(sys.argv[2]); cache = reference_cache.ReferenceCache(Path(sys.argv[1]))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(0, 300, 3):\n"
        "    keys = [(who * 1000 + k).to_bytes(8, 'big') * 2 for k in range(n, n + 3)]\n"
        "    cache.add(keys, [float(-k) for k in range(n, n + 3)])\n"
        "assert cache.trouble is None, cache.trouble\n"
    )
    both_at_once(code, path)
    keys = [(who * 1000 + n).to_bytes(8, "big") * 2 for who in (1, 2) for n in range(300)]
    cache = ReferenceCache(path)
    assert cache.logps(keys) == [float(-n) for n in range(300)] * 2
    assert (len(cache), cache.damaged) == (600, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["values"]


def test_lookups_in_two_million_records_take_no_memory(tmp_path: Path) -> None:
    path, keys = tmp_path / "values", random_keys(2_000_000)
    with (tmp_path / "scratch").open("w+b") as scratch:
        records = make_records(keys, [-1.0] * len(keys))
        write_sorted(path, merged(sorted_runs(blocks_of(records), scratch)))
    (tmp_path / "keys").write_bytes(b"".join(keys[::1000]))
    code = (
        "import sys; from pathlib import Path; from dpo_cli.models.reference_cache import ReferenceCache\n"
        "def pages(): return int(Path('/proc/self/statm').read_text().split()[1])\n"
        "data = Path(sys.argv[2]).read_bytes(); keys = [data[n:n + 16] for n in range(0, len(data), 16)]\n"
        "before = pages(); cache = ReferenceCache(Path(sys.argv[1]))\n"
        "for n in range(0, 2000, 16): assert set(cache.logps(keys[n:n + 16])) == {-1.0}\n"
        "print((pages() - before) * 4096)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "keys")], capture_output=True,
                           text=True, check=True)  # fmt: skip
    assert int(found.stdout) < 8 * 2**20 < path.stat().st_size / 5


# Several ranks


class Rank(SingleEngine):
    """One of two ranks, each a thread."""

    world_size = 2
    alone = False

    def __init__(self, rank: int, meeting: threading.Barrier, table: dict[Any, Any]) -> None:
        self.rank, self._meeting, self._table = rank, meeting, table

    def _exchanged(self, read: Callable[[], Any]) -> Any:
        self._meeting.wait(60)
        found = read()
        self._meeting.wait(60)
        return found

    def same(self, make: Callable[[], Any]) -> Any:
        if self.rank == 0:
            self._table["same"] = pickle.dumps(make())
        return self._exchanged(lambda: pickle.loads(self._table["same"]))

    def agree(self, value: int) -> int:
        self._table[self.rank] = value
        return int(self._exchanged(lambda: max(self._table[0], self._table[1])))


def on_two_ranks(work: Callable[[Rank], Any]) -> list[Any]:
    meeting, table, results = threading.Barrier(2), dict[Any, Any](), [None, None]

    def run(rank: int) -> None:
        results[rank] = work(Rank(rank, meeting, table))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("folders", [("one", "one"), ("one", "two")], ids=["one disk", "two disks"])
def test_every_rank_knows_what_rank_0_has_read_and_rank_0_alone_writes(
    tmp_path: Path, small: None, folders: tuple[str, str]
) -> None:
    keys, more, own = random_keys(40), random_keys(40, seed=4), random_keys(10, seed=5)
    for folder in set(folders):
        (tmp_path / folder).mkdir()
    write(tmp_path / "one" / "values", keys[:35], [1.0] * 35)
    with (tmp_path / "one" / "values").open("ab") as file:
        file.write(make_records(keys[35:], [1.0] * 5).tobytes())
    write(tmp_path / "one" / "own", own, [5.0] * 10)

    def work(rank: Rank) -> Any:
        cache = ReferenceCache(tmp_path / folders[rank.rank] / "values", rank)
        first = cache.logps(keys)
        assert cache.adopt(tmp_path / folders[rank.rank] / "own")
        for start in range(0, 40, 5):
            cache.add(more[start : start + 5], [2.0] * 5)
        return first, cache.logps([*keys, *more, *own]), len(cache), cache.trouble

    first, second = on_two_ranks(work)
    assert first == second == ([1.0] * 40, [1.0] * 40 + [2.0] * 40 + [5.0] * 10, 90, None)
    assert ReferenceCache(tmp_path / "one" / "values").logps([*keys, *more]) == [1.0] * 40 + [2.0] * 40
    assert not (tmp_path / "two" / "values").exists()
