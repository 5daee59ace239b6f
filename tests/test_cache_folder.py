"""The limit of a cache: what was unused longest goes first, what is in use stays."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, tiny_words

from dpo_cli.errors import StorageError
from dpo_cli.storage.cache_folder import cache_files, clear_cache, filled_once, filling, folder_files, shrink, touch
from dpo_cli.storage.locks import opened_alone

Command = Callable[..., Ended]


def filled(folder: Path) -> list[Path]:
    """Four entries of 100 bytes, the first unused longest; the third is a folder."""
    folder.mkdir(parents=True)
    paths = [folder / name for name in ("d", "b", "c", "a")]
    for age, path in enumerate(paths):
        if age == 2:
            path.mkdir()
            (path / "inside").write_bytes(bytes(100))
        else:
            path.write_bytes(bytes(100))
        os.utime(path, (1000 + age, 1000 + age))
    return paths


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_unused_longest_is_dropped_until_the_limit_holds(tmp_path: Path) -> None:
    paths = filled(tmp_path / "cache")
    size = sum(entry.bytes for entry in folder_files(tmp_path / "cache"))
    assert shrink(tmp_path / "cache", size) == []
    assert [entry.path for entry in shrink(tmp_path / "cache", size - 101)] == paths[:2]
    assert names(tmp_path / "cache") == ["a", "c"]
    assert [entry.path for entry in shrink(tmp_path / "cache", 100)] == paths[2:3]


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    paths = filled(tmp_path / "cache")
    with opened_alone(paths[1]):  # another process writes it
        assert [entry.path for entry in shrink(tmp_path / "cache", 0, keep={paths[0], None})] == paths[2:]
    assert names(tmp_path / "cache") == ["b", "d"]


def test_a_folder_that_is_being_filled_stays_and_is_swept_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "entry"
    with filling(folder) as same:
        assert same == folder and shrink(tmp_path / "cache", 0) == []
        (folder / ".tmp-part-7").write_bytes(b"half")
        (folder / ".tmp-other-7").mkdir()
        (folder / "whole").write_bytes(b"whole")
        polled = []

        def give_up() -> None:
            polled.append(1)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), filling(folder, give_up):
            raise AssertionError("two fill it")
        assert polled
    assert sorted(names(folder)) == [".tmp-other-7", ".tmp-part-7", "whole"]
    with filling(folder):
        assert names(folder) == ["lock", "whole"]
    assert [entry.path for entry in shrink(tmp_path / "cache", 0)] == [folder]


def test_what_is_filled_once_is_whole_or_an_error_in_one_line(tmp_path: Path) -> None:
    def full(beside: Path) -> None:
        (beside / "half").write_bytes(b"x")
        raise OSError("100 requested and 5 written")

    with pytest.raises(StorageError, match=r"entry: cannot be written \(100 requested and 5 written\); set DPO_CACHE"):
        filled_once(tmp_path / "entry" / "facts", full)
    assert names(tmp_path / "entry") == []
    made = filled_once(tmp_path / "entry" / "facts", lambda beside: (beside / "x").touch())
    assert names(made) == ["x"] and filled_once(made, full) == made


def test_an_entry_that_is_used_is_no_longer_the_oldest(tmp_path: Path) -> None:
    paths = filled(tmp_path / "cache")
    touch(paths[0])
    assert [entry.path for entry in folder_files(tmp_path / "cache")] == [*paths[1:], paths[0]]
    touch(tmp_path / "nowhere")


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    filled(tmp_path / "elsewhere")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "elsewhere")
    shrink(tmp_path / "cache", -1)
    assert names(tmp_path / "cache") == [] and len(names(tmp_path / "elsewhere")) == 4


def test_a_cache_is_listed_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    assert (cache_files(), clear_cache()) == ([], 0)
    paths = filled(tmp_path / "reference")
    assert [(entry.path, entry.used) for entry in cache_files()] == [
        (path, 1000.0 + age) for age, path in enumerate(paths)
    ]
    freed = sum(entry.bytes for entry in cache_files())
    assert clear_cache() == freed >= 400
    assert cache_files() == [] and names(tmp_path) == ["reference"]


def test_a_run_drops_the_log_probs_that_were_unused_longest_and_says_so(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder = cache / "reference"
    clear_cache()
    folder.mkdir(exist_ok=True)
    (folder / "old.logps").write_bytes(bytes(2**20))
    os.utime(folder / "old.logps", (1, 1))
    kept = command("dpo-train", *tiny_words(pairs_file, tmp_path / "kept"), "reference.cache_gib=null")
    assert kept.code == 0 and (folder / "old.logps").exists()
    limited = command("dpo-train", *tiny_words(pairs_file, tmp_path / "one"), "reference.cache_gib=0.0005")
    assert limited.code == 0 and len(names(folder)) == 1 and not (folder / "old.logps").exists()
    said = f"{folder}: dropped 1 item that was unused longest, 0.000977 GiB (reference.cache_gib=0.0005)"
    assert said in " ".join(limited.out.split())
    small = command("dpo-train", *tiny_words(pairs_file, tmp_path / "two"), "reference.cache_gib=1e-9")
    assert small.code == 0 and "not loaded: " in small.out and len(names(folder)) == 1
    assert small.out.count("GiB, more than reference.cache_gib=1e-09; raise it") == 1
