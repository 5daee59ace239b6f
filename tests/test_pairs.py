"""From files to tokenized pairs: counts for all left behind, a split that cannot leak, a seeded order."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sample_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import DataConfig, RunConfig, run_config
from dpo_cli.data.batches import (
    Layout,
    Schedule,
    SplitByPairs,
    SplitByTokens,
    epoch_order,
    longest_side,
    packed_tokens,
)
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.report import Report
from dpo_cli.data.splits import row_sizes
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.errors import DataError

Load = Callable[..., PairData]


def data_options(*words: str) -> DataConfig:
    return run_config(composed("train", parse_overrides(["data=jsonl", *words]), RunConfig).container).data


@pytest.fixture
def load(tiny_tokenizer: Any, tmp_path: Path) -> Load:
    def run(rows: list[Any], *words: str, seed: int = 0) -> PairData:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        words = ("data.template=plain", "data.eval_fraction=0", *words)
        return load_pairs(data_options(f"data.train={path}", *words), PairEncoder(tiny_tokenizer, "plain"), seed)

    return run


def row(prompt: str = "one two", chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_every_dropped_pair_is_counted_under_its_reason(load: Load) -> None:
    rows = [
        row(),
        row(chosen="same", rejected="same"),
        row(chosen=""),
        row(prompt="x" * 30),
        row(prompt="short", chosen="a" * 30 + "b", rejected="a" * 30 + "c"),
        {"prompt": "p"},
    ]
    data = load(rows, "data.max_length=20", "data.on_bad_row=skip", "data.max_bad_fraction=1")
    assert dict(data.train_report.dropped) == {
        "identical": 1, "empty_response": 1, "prompt_too_long": 1, "identical_after_truncation": 1, "bad_row": 1,
    }  # fmt: skip
    assert (data.train_report.rows, data.train_report.kept) == (6, 1)
    assert [pair.index for pair in data.train] == [0]


def test_the_counts_are_shown_as_sentences(load: Load) -> None:
    data = load([row(), row(prompt="x" * 30), row(chosen="y" * 40)], "data.max_length=20")
    assert data.train_report.sentences(20)[1:] == [
        "dropped 1 pair whose prompt leaves no room for a response (max_length=20)",
        "1 response cut at the end, without the closing EOS (max_length=20)",
    ]


def adds_up(report: Report) -> bool:
    rows = report.dropped["bad_row"] + report.dropped["refused_by_template"]
    dropped = report.dropped.total() - rows
    return report.pairs == report.kept + report.held_out + report.over_eval_limit + dropped


def test_the_numbers_of_the_header_and_the_manifest_add_up(load: Load) -> None:
    rows = [*sample_rows(40), row(chosen="same", rejected="same"), {"prompt": "p"}]
    data = load(rows, "data.eval_fraction=0.5", "data.eval_limit=3", "data.on_bad_row=skip", "data.max_bad_fraction=1")
    train = data.train_report
    kept, held_out = len(data.train), 40 - len(data.train)
    assert train.sentences(512) == [
        f"kept {kept} pairs of 42 rows from {train.source}",
        "held out 3 pairs",
        f"held out {held_out - 3} pairs more, which data.eval_limit leaves out",
        "dropped 1 row that could not be read",
        "dropped 1 pair whose two responses are the same text",
    ]
    assert data.held_out_report.sentences(512) == [
        f"kept 3 pairs of 3 rows from {train.source} (held out by a hash of the first human turn)"
    ]
    assert adds_up(train) and adds_up(data.held_out_report)
    facts = train.as_dict()
    counts = {key: facts[key] for key in ("rows", "pairs", "kept", "held_out", "over_eval_limit", "dropped")}
    assert counts == {
        "rows": 42, "pairs": 41, "kept": kept, "held_out": 3, "over_eval_limit": held_out - 3,
        "dropped": {"identical": 1, "bad_row": 1},
    }  # fmt: skip


def test_rows_of_several_pairs_add_up_too(load: Load) -> None:
    rows = [{"prompt": f"Question {n}?", "responses": [f"good {n}", f"fair {n}", f"poor {n}"]} for n in range(20)]
    data = load([*rows, row()], "data.eval_fraction=0.4")
    held_out = len(data.held_out)
    assert data.train_report.sentences(512) == [
        f"kept {61 - held_out} pairs of 21 rows from {data.train_report.source}",
        "the rows make 61 pairs",
        f"held out {held_out} pairs",
    ]
    assert data.held_out_report.rows == len({pair.index for pair in data.held_out})
    assert adds_up(data.train_report) and adds_up(data.held_out_report)


def test_a_bad_row_stops_with_file_and_line(load: Load) -> None:
    with pytest.raises(DataError) as error:
        load([row(), {"prompt": "p", "chosen": "c"}])
    assert str(error.value).endswith(
        "rows.jsonl line 2: no 'rejected' key. A row needs prompt, chosen and rejected; it has prompt, chosen "
        "(data.on_bad_row=skip counts and drops such rows)"
    )


def test_columns_may_have_other_names(load: Load) -> None:
    data = load([{"prompt": "p", "better": "yes", "worse": "no"}], "data.columns.chosen=better",
                "data.columns.rejected=worse")  # fmt: skip
    assert len(data.train) == 1


def test_a_named_column_is_taken_from_there_and_from_nowhere_else(load: Load, tiny_tokenizer: Any) -> None:
    two = {"prompt": "p", "chosen": "old", "preferred": "new", "rejected": "no"}
    data = load([two], "data.columns.chosen=preferred")
    assert tiny_tokenizer.decode(data.train[0].chosen) == "new<|im_end|>"
    swapped = load([two], "data.columns.chosen=rejected", "data.columns.rejected=chosen")
    assert tiny_tokenizer.decode(swapped.train[0].chosen) == "no<|im_end|>"
    with pytest.raises(
        DataError, match=r"no 'preferred' key \(data\.columns\.chosen\); it has prompt, chosen, rejected"
    ):
        load([row()], "data.columns.chosen=preferred")


def test_eval_limit_is_counted_where_a_hash_holds_out(load: Load) -> None:
    data = load(sample_rows(40), "data.eval_fraction=0.5", "data.eval_limit=3")
    assert len(data.held_out) == data.held_out_report.kept == 3
    assert data.train_report.kept == len(data.train)


def test_a_file_without_pairs_to_train_on_says_why(load: Load) -> None:
    with pytest.raises(DataError) as error:
        load([row(chosen="a", rejected="a")])
    assert str(error.value).endswith("rows.jsonl: no pair can be used: 1 pair whose two responses are the same text")
    with pytest.raises(DataError) as error:
        load([])
    assert str(error.value).endswith("rows.jsonl: has no pairs; name another file, or change data.eval_fraction")


def test_limit_takes_the_first_rows(load: Load) -> None:
    assert [pair.index for pair in load(sample_rows(9), "data.limit=3").train] == [0, 1, 2]


def test_the_split_is_the_same_in_every_run_and_pairs_of_one_prompt_stay_together(load: Load) -> None:
    rows = sample_rows(60) + [{**one, "chosen": one["chosen"] + " Again."} for one in sample_rows(60)]
    first, second = (load(rows, "data.eval_fraction=0.3") for _ in range(2))
    assert [pair.key for pair in first.held_out] == [pair.key for pair in second.held_out]
    prompts = [{pair.prompt.tobytes() for pair in side} for side in (first.train, first.held_out)]
    assert not prompts[0] & prompts[1]
    assert 0.15 * 120 < len(first.held_out) < 0.45 * 120
    assert len(first.train) + len(first.held_out) == 120


def test_the_split_does_not_depend_on_the_order_of_the_rows_but_on_the_seed(load: Load) -> None:
    rows = sample_rows(40)
    keys = [{pair.key for pair in load(some, "data.eval_fraction=0.3").held_out} for some in (rows, rows[::-1])]
    assert keys[0] == keys[1]
    assert {pair.key for pair in load(rows, "data.eval_fraction=0.3", seed=1).held_out} != keys[0]


def test_a_file_of_its_own_is_held_out_whole(load: Load, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", sample_rows(12)[8:])
    data = load(sample_rows(8), f"data.eval={held}")
    assert (len(data.train), len(data.held_out)) == (8, 4)


def test_the_fingerprint_changes_with_any_token(load: Load) -> None:
    rows = sample_rows(4)
    before = load(rows).train.fingerprint
    assert load(rows).train.fingerprint == before
    rows[2]["rejected"] += "!"
    assert load(rows).train.fingerprint != before


def test_hub_data_that_cannot_be_reached_says_what_to_do(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"Anthropic/hh-rlhf \(split train\): cannot be loaded from the hub"):
        load_pairs(data_options("data.train=Anthropic/hh-rlhf"), PairEncoder(tiny_tokenizer, "plain"), 0)


# Order and cutting


@given(st.integers(1, 200), st.integers(0, 10**9), st.integers(0, 50))
def test_an_epoch_sees_every_pair_once(pairs: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(pairs, seed, epoch, shuffle=True)) == list(range(pairs))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    assert epoch_order(50, 1, 2, True).tolist() == epoch_order(50, 1, 2, True).tolist()
    assert epoch_order(50, 1, 2, True).tolist() != epoch_order(50, 1, 3, True).tolist()
    assert epoch_order(50, 1, 2, True).tolist() != epoch_order(50, 2, 2, True).tolist()
    assert epoch_order(50, 1, 2, False).tolist() == list(range(50))
    # Fixed for ever: a run resumed under a newer version must see the same order.
    assert epoch_order(8, 0, 0, True).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_batches_from_the_middle_are_those_of_the_whole_run() -> None:
    schedule = Schedule(pairs=10, batch_size=4, seed=3, shuffle=True)
    whole = [batch.tolist() for batch in schedule.batches(0, 7)]
    assert [len(batch) for batch in whole] == [4, 4, 2, 4, 4, 2, 4]
    for first in range(7):
        assert [batch.tolist() for batch in schedule.batches(first, 7)] == whole[first:]


def test_max_steps_wins_over_epochs() -> None:
    schedule = Schedule(pairs=10, batch_size=4, seed=0, shuffle=True)
    assert (schedule.total_steps(2, None), schedule.total_steps(2, 5)) == (6, 5)


def fake(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    return TokenizedPair(*(token_ids(range(n)) for n in (prompt, chosen, rejected)), index=0, key="", group=0)


@given(st.lists(st.tuples(*[st.integers(1, 60)] * 3), min_size=1, max_size=20), st.integers(1, 400))
def test_a_cut_keeps_every_pair_and_its_budget(lengths: list[tuple[int, int, int]], budget: int) -> None:
    batch = [fake(*some) for some in lengths]
    pieces = SplitByTokens(budget, Layout.PADDED)(batch)
    assert sorted(id(pair) for piece in pieces for pair in piece) == sorted(map(id, batch))
    for piece in pieces:
        padded = 2 * len(piece) * max(map(longest_side, piece))
        assert padded <= budget or len(piece) == 1


@given(st.lists(st.tuples(*[st.integers(1, 60)] * 3), min_size=1, max_size=20), st.integers(1, 400))
def test_a_cut_of_packed_rows_keeps_every_pair_and_its_budget(lengths: list[tuple[int, int, int]], budget: int) -> None:
    batch = [fake(*some) for some in lengths]  # prompts of one length are the same, and shared
    pieces = SplitByTokens(budget, Layout.PACKED_SEGMENTS)(batch)
    assert sorted(id(pair) for piece in pieces for pair in piece) == sorted(map(id, batch))
    assert all(packed_tokens(piece) <= budget or len(piece) == 1 for piece in pieces)


def test_packed_pieces_are_alike_in_size_and_keep_pairs_of_one_prompt_together() -> None:
    distinct = [TokenizedPair(token_ids([n]), token_ids(range(size)), token_ids([1]), n, "", n)
                for n, size in enumerate([9, 8, 7, 6, 5, 5])]  # fmt: skip
    pieces = SplitByTokens(30, Layout.PACKED_SEGMENTS)(distinct)
    # 52 tokens in two pieces: 11 + 8 + 7 and 10 + 9 + 7.
    assert sorted(map(packed_tokens, pieces)) == [26, 26]
    one_prompt = [fake(10, n, n + 1) for n in range(1, 5)]  # 10 + (1 + 2 + 3 + 4 + 5) tokens when shared
    assert [len(piece) for piece in SplitByTokens(25, Layout.PACKED_SEGMENTS)([*one_prompt, fake(3, 9, 9)])] == [4, 1]


def test_cutting_by_size_keeps_the_order_and_leaves_a_short_rest() -> None:
    batch = [fake(1, 1, 1) for _ in range(5)]
    assert [len(piece) for piece in SplitByPairs(2)(batch)] == [2, 2, 1]
    assert np.concatenate([[id(pair) for pair in piece] for piece in SplitByPairs(2)(batch)]).tolist() == list(
        map(id, batch)
    )


def test_pairs_of_one_ranked_row_stay_together_in_a_shuffled_order() -> None:
    pairs = [TokenizedPair(token_ids([row]), token_ids([n]), token_ids([9]), index=row, key="", group=row)
             for row, size in enumerate([1, 3, 1, 6, 3]) for n in range(size)]  # fmt: skip
    index = np.array([pair.index for pair in pairs])
    schedule = Schedule(len(pairs), batch_size=4, seed=1, shuffle=True, rows=row_sizes(index))
    orders = [np.concatenate(list(schedule.batches(4 * epoch, 4 * epoch + 4))).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(14))
        rows = [pairs[place].index for place in order]
        assert len(rows) - sum(a == b for a, b in pairwise(rows)) == 5  # each row begins once
    assert row_sizes(index[:2]) is None  # a pair a row: the order is as it ever was
