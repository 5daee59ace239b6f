"""Rows as published, read with the YAML of their set: which response is preferred, what is a tie, what is not used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from dpo_cli.config.composition import composed, conf_dir, parse_overrides
from dpo_cli.config.schema import DataConfig, RunConfig, run_config
from dpo_cli.data.formats import BadRowError, Message, fields_read, pairs_of
from dpo_cli.data.known_forms import form_of
from dpo_cli.data.mapping import RowMapping, canonical, not_used
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import ConfigError, DataError

Load = Callable[..., PairData]
Row = dict[str, Any]


def data_config(*words: str) -> DataConfig:
    return run_config(composed("train", parse_overrides([*words]), RunConfig).container).data


@pytest.fixture
def load(tiny_tokenizer: Any, tmp_path: Path) -> Load:
    def run(rows: list[Row], *words: str) -> PairData:
        words = (*words, f"data.train={write_jsonl(tmp_path / 'rows.jsonl', rows)}", "data.eval_fraction=0")
        return load_pairs(data_config(*words), PairEncoder(tiny_tokenizer, "chat"), 0)

    return run


def turns(*contents: str) -> list[Row]:
    """user, assistant, user, ... messages."""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]


def answered(first: str, second: str, **more: Any) -> Row:
    """UltraFeedback's form, in which both responses repeat the prompt."""
    return {"prompt": "q", "chosen": turns("q", first), "rejected": turns("q", second), **more}


def said(speaker: str, text: str) -> Row:
    return {"from": speaker, "value": text}


def arena(winner: str, *more: str) -> Row:
    sides = {"conversation_a": turns("q", "a", *more), "conversation_b": turns("q", "b", *more)}
    return {"question_id": "1", "model_a": "x", "model_b": "y", "winner": winner, **sides, "turn": 1}


def webgpt(first: float, second: float) -> Row:
    question = {"dataset": "eli5", "id": "1", "full_text": "q"}
    return {"question": question, "answer_0": "a", "score_0": first, "answer_1": "b", "score_1": second}


def summaries(post: str | None, article: str | None, choice: int) -> Row:
    info = {"id": "1", "post": post, "title": None, "article": article}
    return {"info": info, "summaries": [{"text": "a", "policy": "x"}, {"text": "b", "policy": "y"}], "choice": choice}


def helpsteer3(preference: int) -> Row:
    context = turns("q", "earlier", "q2")
    return {"domain": "code", "context": context, "response1": "a", "response2": "b", "overall_preference": preference}


# By the name of a YAML in conf/data/: rows as published, then (index of the row, preferred, dispreferred) of each pair.
FORMS: dict[str, tuple[list[Row], list[tuple[int, str, str]]]] = {
    "ultrafeedback": (
        [
            answered("a", "b", prompt_id="1", messages=turns("q", "a"), score_chosen=8.5, score_rejected=3.0),
            answered("a", "b", prompt_id="2", messages=turns("q", "a"), score_chosen=7.0, score_rejected=7.0),
        ],
        [(0, "a", "b")],
    ),
    "orca": ([{"system": "", "question": "q", "chosen": "a", "rejected": "b"}], [(0, "a", "b")]),
    "truthy": (
        [{"id": "1", "source": "s", "system": "Be true.", "prompt": "q", "chosen": "a", "rejected": "b"}],
        [(0, "a", "b")],
    ),
    "helpsteer2": (
        [
            {"split": "train", "prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": strength}
            for strength in (-3, 2, 0)
        ],
        [(0, "a", "b"), (1, "b", "a")],
    ),
    "helpsteer3": ([helpsteer3(-1), helpsteer3(0), helpsteer3(3)], [(0, "a", "b"), (2, "b", "a")]),
    "shp": (
        [
            {"post_id": "1", "history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": label, "score_A": 9}
            for label in (1, 0)
        ],
        [(0, "a", "b"), (1, "b", "a")],
    ),
    "pku_saferlhf": (
        [
            {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": best, "safer_response_id": 0}
            for best in (0, 1)
        ],
        [(0, "a", "b"), (1, "b", "a")],
    ),
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: q\n\nAssistant: ",
                "answers": [
                    {"answer": "b", "model": "x", "rank": 2.0},
                    {"answer": "a", "model": "y", "rank": 1.0},
                    {"answer": "c", "model": "z", "rank": 2.0},
                ],
                "source": ["lmsys", "sharegpt"],
            }
        ],
        [(0, "a", "b"), (0, "a", "c")],
    ),
    "webgpt": ([webgpt(0.5, -0.5), webgpt(0, 0), webgpt(-1, 1)], [(0, "a", "b"), (2, "b", "a")]),
    "summarize": ([summaries("q", None, 0), summaries(None, "q", 1)], [(0, "a", "b"), (1, "b", "a")]),
    "stack_exchange": (
        [{"qid": 1, "question": "q", "date": "2020", "response_j": "a", "response_k": "b"}],
        [(0, "a", "b")],
    ),
    "arena": (
        [arena("model_a"), arena("model_b"), arena("tie"), arena("tie (bothbad)"), arena("model_a", "q2", "more")],
        [
            (0, "a", "b"),
            (1, "b", "a"),
            (4, "a\n\nHuman: q2\n\nAssistant: more", "b\n\nHuman: q2\n\nAssistant: more"),
        ],
    ),
    "tulu3": ([answered("a", "b", id="1", source="s", chosen_model="x")], [(0, "a", "b")]),
    "skywork": ([{"chosen": turns("q", "a"), "rejected": turns("q", "b"), "source": "s"}], [(0, "a", "b")]),
    "capybara": (
        [
            {
                "source": "s",
                "prompt": "q2",
                "chosen": turns("q", "earlier", "q2", "a"),
                "rejected": turns("q", "earlier", "q2", "b"),
                "rating_chosen": 5,
                "rating_rejected": rating,
            }
            for rating in (4, 5)
        ],
        [(0, "a", "b")],
    ),
    "alpaca": (
        [
            {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
            {"instruction": "q", "chosen": "a", "rejected": "b"},
            {"instruction": "q", "chosen": "a", "rejected": "b", "system": "s", "history": [["q0", "earlier"]]},
        ],
        [(0, "a", "b"), (1, "a", "b"), (2, "a", "b")],
    ),
    "ultrafeedback_raw": (
        [
            {
                "source": "s",
                "instruction": "q",
                "completions": [
                    {"model": "x", "response": text, "overall_score": score}
                    for text, score in (("b", 6.0), ("a", 8.5), ("c", 6.0))
                ],
            }
        ],
        [(0, "a", "b"), (0, "a", "c")],
    ),
    "when2call": (
        [{"messages": turns("q"), "chosen_response": turns("", "a")[1], "rejected_response": turns("", "b")[1]}],
        [(0, "a", "b")],
    ),
    "ms_swift": (
        [
            {"messages": turns("q", "a"), "rejected_response": "b"},
            {"messages": turns("q0", "earlier", "q", "a"), "rejected_response": "b"},
        ],
        [(0, "a", "b"), (1, "a", "b")],
    ),
    "axolotl": (
        [{"messages": turns("q"), "chosen": turns("", "a")[1], "rejected": turns("", "b")[1]}],
        [(0, "a", "b")],
    ),
    "openai": (
        [
            {
                "input": {"messages": turns("q"), "parallel_tool_calls": True},
                "preferred_output": turns("", "a")[1:],
                "non_preferred_output": turns("", "b")[1:],
            }
        ],
        [(0, "a", "b")],
    ),
    "sharegpt": (
        [
            {
                "conversations": [said("system", "Be brief."), said("human", "q")],
                "chosen": said("gpt", "a"),
                "rejected": said("gpt", "b"),
            }
        ],
        [(0, "a", "b")],
    ),
    "trl": (
        [
            {"chosen": turns("q", "a"), "rejected": turns("q", "b"), "score_chosen": 9.0, "score_rejected": score}
            for score in (5.0, 9.0)
        ],
        [(0, "a", "b")],
    ),
    "jsonl": (
        [
            {"prompt": "q", "chosen": "a", "rejected": "b"},  # TRL's forms with a prompt or messages
            {"prompt": turns("q"), "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]},
            {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
        ],
        [(0, "a", "b"), (1, "a", "b"), (2, "a", "b")],
    ),
}
TIES = {
    "ultrafeedback": 1,
    "helpsteer2": 1,
    "helpsteer3": 1,
    "nectar": 1,
    "webgpt": 1,
    "arena": 2,
    "capybara": 1,
    "trl": 1,
    "ultrafeedback_raw": 1,
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_as_published_give_the_pairs_that_their_labels_say(load: Load, name: str) -> None:
    rows, expected = FORMS[name]
    data = load(rows, f"data={name}")
    found = [(text.index, text.pair.chosen.strip(), text.pair.rejected.strip()) for text in data.train_texts]
    assert found == expected
    ends = {"q", "q2"} if name in ("helpsteer3", "capybara") else {"q"}
    assert {text.pair.messages[-1] for text in data.train_texts} <= {Message("user", end) for end in ends}
    assert data.train_report.dropped["tie"] == TIES.get(name, 0)
    assert data.train_report.dropped["bad_row"] == 0


def test_every_yaml_of_a_data_set_is_tried_on_rows_of_its_form() -> None:
    names = {file.stem for file in (conf_dir() / "data").glob("[!_]*.yaml")}
    assert names == FORMS.keys() | {"hh", "sample", "mixture"}
    for file in (conf_dir() / "data").glob("[!_]*.yaml"):
        assert file.stem in ("hh", "jsonl", "sample", "mixture") or "\n# Rows: " in file.read_text(), file


def test_a_system_column_comes_before_the_prompt_and_an_empty_one_is_no_message(load: Load) -> None:
    rows = [{"system": text, "question": "q", "chosen": "a", "rejected": "b"} for text in ("Be kind.", "", None)]
    pairs = [text.pair for text in load(rows, "data=orca").train_texts]
    assert [pair.messages for pair in pairs] == [
        (Message("system", "Be kind."), Message("user", "q")), (Message("user", "q"),), (Message("user", "q"),),
    ]  # fmt: skip


def test_speakers_with_other_names_keep_their_turns(load: Load) -> None:
    (text,) = load(FORMS["sharegpt"][0], "data=sharegpt").train_texts
    assert text.pair.messages == (Message("system", "Be brief."), Message("user", "q"))
    turn = {"role": "developer", "content": "Be brief."}
    row = {"prompt": [turn, *turns("q")], "chosen": "a", "rejected": "b"}
    (text,) = load([row], "data=jsonl", "data.roles.developer=system").train_texts
    assert text.pair.messages[0] == Message("system", "Be brief.")


def test_a_call_in_sharegpt_form_is_a_tool_call_and_its_observation_a_tool_result() -> None:
    call = {"name": "warmth", "arguments": {"city": "Bern"}}
    row = {"conversations": [said("human", "q"), said("function_call", json.dumps(call)), said("observation", "12")],
           "chosen": said("gpt", "a"), "rejected": said("gpt", "b"), "tools": '[{"name": "warmth"}]'}  # fmt: skip
    pair = canonical(row, RowMapping.of(data_config("data=sharegpt", "data.train=x")))
    assert pair["prompt"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "12"},
    ]
    (text,) = pairs_of(pair, "auto")
    assert [message.role for message in text.messages] == ["user", "assistant", "tool"]
    assert text.messages[1].more["tool_calls"] == ({"type": "function", "function": call},)
    assert text.tools == ({"name": "warmth"},)
    assert not_used(row, {"prompt": "conversations"}, frozenset(("chosen", "rejected", "tools"))) == []
    with pytest.raises(BadRowError, match="the value of function_call must be a list of objects; its text is not JSON"):
        canonical({"prompt": [said("function_call", "warmth(")]}, RowMapping())


def test_what_a_chat_template_may_render_counts_as_used(load: Load) -> None:
    thinking = {"role": "assistant", "content": "a", "reasoning_content": "hm", "logprob": -1.5}
    row = {"prompt": turns("q"), "chosen": [thinking], "rejected": turns("", "b")[1:], "tools": [], "documents": None}
    assert load([row], "data=jsonl").train_report.not_used == {"chosen.logprob": 1}


def test_an_input_beside_the_instruction_is_part_of_the_prompt(load: Load) -> None:
    row = {"instruction": "Translate.", "input": "Hallo", "chosen": "Hello", "rejected": "Bye"}
    (text,) = load([row], "data=alpaca").train_texts
    assert text.pair.prompt_text == "Translate.\nHallo"


def test_history_and_system_come_before_the_instruction(load: Load) -> None:
    history = [["q0", "earlier"], ["q1", "later"]]
    row = {"instruction": "q2", "system": "s", "history": history, "chosen": "a", "rejected": "b"}
    (text,) = load([row], "data=alpaca").train_texts
    assert [(one.role, one.content) for one in text.pair.messages] == [
        ("system", "s"), ("user", "q0"), ("assistant", "earlier"), ("user", "q1"), ("assistant", "later"),
        ("user", "q2"),
    ]  # fmt: skip
    plain = row | {"history": [], "system": ""}
    assert [one.content for one in load([plain], "data=alpaca").train_texts[0].pair.messages] == ["q2"]
    with pytest.raises(
        DataError, match=r"'history' must hold pairs of texts, of a user and of an assistant; it holds "
    ):
        load([row | {"history": [["q0"]]}], "data=alpaca")


def test_a_conversation_that_holds_prompt_and_chosen_response_is_cut_before_its_last_message(load: Load) -> None:
    row = {"messages": turns("q0", "earlier", "q", "a"), "rejected_response": "b"}
    (text,) = load([row], "data=ms_swift").train_texts
    assert [one.content for one in text.pair.messages] == ["q0", "earlier", "q"]
    for messages in (turns("q"), turns("q", "a", "q2"), [], "q"):
        with pytest.raises(
            DataError, match="'messages' must be messages that end with the chosen response, of an assist"
        ):
            load([row | {"messages": messages}], "data=ms_swift")


@pytest.mark.parametrize("label", [1, 1.0, "1", True])
def test_a_label_is_the_same_value_in_json_parquet_and_csv(label: object) -> None:
    values = ["true", "false"] if label is True else ["1", "0"]
    mapping = RowMapping({"responses": ["x", "y"], "preferred": "label"}, values)
    read = canonical({"x": "a", "y": "b", "label": label}, mapping)
    assert read == {"responses": ["a", "b"], "scores": [1, 0]}


def test_without_values_a_label_is_the_position_of_the_preferred_response() -> None:
    mapping = RowMapping({"responses": ["x", "y"], "preferred": "label"})
    assert canonical({"x": "a", "y": "b", "label": 1}, mapping)["scores"] == [0, 1]


def test_a_column_with_a_dot_in_its_name_is_found_before_a_path() -> None:
    row = {"a.b": "flat", "a": {"b": "nested"}}
    assert canonical(row, RowMapping({"prompt": "a.b"}))["prompt"] == "flat"
    assert canonical({"a": {"b": "nested"}}, RowMapping({"prompt": "a.b"}))["prompt"] == "nested"


def test_lists_in_lists_are_no_path_however_deep() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRowError, match=r"no 'a\.b' key"):
        canonical({"a": deep}, RowMapping({"prompt": "a.b"}))


@pytest.mark.parametrize(
    ("row", "columns", "says"),
    [
        ({"x": "a", "y": "b", "w": 3}, {"preferred": "w"}, "'w' is '3'; data.preferred and data.tied know 0, 1"),
        ({"x": "a", "y": "b", "w": None}, {"preferred": "w"}, "'w' is None; data.preferred and data.tied know 0, 1"),
        ({"x": "a", "y": "b", "w": "good"}, {"preference": "w"}, "'w' must hold numbers, it holds 'good'"),
        ({"x": "a", "y": "b", "w": [1, True]}, {"ranks": "w"}, "'w' must hold numbers, it holds [1, True]"),
        ({"x": "a", "w": 1}, {"preferred": "w"}, "no 'y' key (data.columns.responses); it has x, w"),
        ({"x": "a", "y": "b"}, {"preference": "w.u"}, "no 'w.u' key (data.columns.preference); it has x, y"),
        ({"x": "a", "y": "b", "w": 1, "s": 7, "prompt": "q"}, {"preferred": "w", "system": "s"},
         "'s' must be text, it is a number"),
        ({"x": "a", "y": "b", "w": 1, "s": "t", "prompt": [{"role": "system", "content": "u"}, *turns("q")]},
         {"preferred": "w", "system": "s"},
         "the prompt has a system message, too; data.columns.system=null keeps that one"),
        ({"x": "a"}, {"prompt": ["i", "j"]}, "no 'i, j' key (data.columns.prompt); it has x"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_mapping_is_said_exactly(row: Row, columns: Row, says: str) -> None:
    columns = columns if "prompt" in columns else {"responses": ["x", "y"], **columns}
    with pytest.raises(BadRowError) as error:
        canonical(row, RowMapping(columns))
    assert str(error.value) == says


# What the header says


def test_the_columns_that_nothing_reads_are_listed_with_their_rows(load: Load) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "grade": 1, "note": "x" if n == 0 else None, "tag": "t"}
            for n in range(3)]  # fmt: skip
    report = load(rows, "data=jsonl").train_report
    assert report.sentences(512)[1:] == ["not used: grade, tag (3 rows), note (1 row)"]
    assert report.as_dict()["not_used"] == {"grade": 3, "tag": 3, "note": 1}
    words = ("data=jsonl", "data.columns.prompt=note", "data.on_bad_row=skip", "data.max_bad_fraction=1")
    assert load(rows, *words).train_report.not_used == {"prompt": 1, "grade": 1, "tag": 1}


def test_parts_of_a_used_column_that_nothing_reads_are_listed(load: Load) -> None:
    row = {
        "prompt": [{"role": "user", "content": "q", "images": ["x.png"], "weight": 0}],
        "chosen": [{"role": "assistant", "content": "a", "weight": 1, "annotations": {}}],
        "rejected": [{"role": "assistant", "content": "b", "weight": None}],
    }
    assert load([row], "data=jsonl").train_report.sentences(512)[1:] == [
        "not used: prompt.images, prompt.weight, chosen.weight (1 row)"
    ]
    shared = {
        "conversations": [{**said("human", "q"), "id": 7}],
        "chosen": said("gpt", "a"),
        "rejected": said("gpt", "b"),
    }
    assert load([shared, shared], "data=sharegpt").train_report.not_used == {"conversations.id": 2}
    nested = {"question": {"full_text": "q", "dataset": "d", "id": 1, "extra": {"x": 1}, "none": None},
              "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 0}  # fmt: skip
    assert load([nested], "data=webgpt").train_report.not_used == {"question.id": 1, "question.extra": 1}


def test_a_format_reads_its_own_keys_and_one_that_is_added_may_read_all() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "responses": ["a"], "more": 1}
    names = {name: {key for key in row if key in fields_read(row, name)} for name in ("hh", "auto", "ranked", "mine")}
    assert names == {
        "hh": {"chosen", "rejected"},
        "auto": {"prompt", "chosen", "rejected"},
        "ranked": {"prompt", "responses"},
        "mine": set(row),
    }


def test_a_column_that_another_yaml_would_use_is_named_with_it(load: Load) -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}
    words = ("data=jsonl", "data.columns.chosen=response_0", "data.columns.rejected=response_1")
    assert load([row], *words).train_report.sentences(512)[1:] == [
        "not used: better_response_id (1 row); data=pku_saferlhf reads better_response_id, too"
    ]
    row = {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert load([row], "data=jsonl").train_report.sentences(512)[1:] == [
        "not used: system (1 row); data=truthy reads system, too"
    ]


def test_names_of_columns_and_sources_are_shown_as_data(load: Load) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "\x1b[2J\ud800": 1, "source": "\x1b[31m"}
    report = load([row], "data=tulu3").train_report
    assert "\x1b" not in "".join(report.sentences(512))
    json.dumps(report.as_dict(), ensure_ascii=False).encode("utf-8")


def test_a_file_with_endless_names_is_counted_by_the_first_of_them(load: Load) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", f"column {n}": n + 1} for n in range(150)]
    report = load(rows, "data=jsonl").train_report
    assert (len(report.not_used), report.not_used["others"]) == (101, 50)
    assert (
        report.sentences(512)[1]
        == "not used: others (50 rows), " + ", ".join(f"column {n}" for n in range(12)) + " and 88 more (1 row)"
    )


def test_ties_and_sources_are_counted(load: Load) -> None:
    rows = FORMS["webgpt"][0]
    assert load(rows, "data=webgpt").train_report.sentences(512)[1:] == [
        "dropped 1 pair whose two responses are equally good (a tie)",
        "rows by source: eli5 3",
        "not used: question.id (3 rows)",
    ]
    with pytest.raises(DataError, match="no pair can be used: 1 pair whose two responses are equally good"):
        load(rows[1:2], "data=webgpt")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"question": "q", "response_0": "a", "response_1": "b", "better_response_id": 1},
            "no 'chosen' key. A row needs prompt, chosen and rejected; it has question, response_0, response_1, "
            "better_response_id; data=pku_saferlhf data.columns.prompt=question reads such rows",
        ),
        (
            {"prompt": "q", "answers": [{"answer": "a", "rank": 1}]},
            "no 'chosen' key. A row needs prompt, chosen and rejected; it has prompt, answers; "
            "data=nectar reads such rows",
        ),
        (
            {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
            "no 'prompt' key. A row needs prompt, chosen and rejected; it has system, question, chosen, rejected; "
            "did you mean data.columns.prompt=question?; data=orca reads such rows",
        ),
        (
            {"prompt": "p", "chosen": "c"},
            "no 'rejected' key. A row needs prompt, chosen and rejected; it has prompt, chosen",
        ),
        (
            {"messages": turns("q"), "chosen": turns("", "a")[1], "rejected": turns("", "b")[1]},
            "the prompt must end with a user message before the responses begin (format=messages); "
            "data=axolotl reads such rows",
        ),
        (
            {"prompt": "p", "completion": "c", "label": True},
            "no 'chosen' key. A row needs prompt, chosen and rejected; it has prompt, completion, label; rows of one "
            "completion with a label are for KTO, which dpo-cli does not train: a row needs two responses",
        ),
    ],
)
def test_a_row_of_another_form_names_the_yaml_that_reads_it(load: Load, row: Row, says: str) -> None:
    with pytest.raises(DataError) as error:
        load([row], "data=jsonl")
    assert (
        str(error.value).split("rows.jsonl ")[1] == f"line 1: {says} (data.on_bad_row=skip counts and drops such rows)"
    )


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("jsonl", "tulu3", "skywork")])
def test_rows_of_each_form_are_recognised(name: str) -> None:
    assert form_of(FORMS[name][0][0], {}, "{form}") == f"data={name}"
    assert form_of(FORMS[name][0][0], data_config(f"data={name}", "data.train=x.jsonl").columns, "{form}") == ""


# What a config may say


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["columns.responses=[x,y]"], "data.columns.responses=['x', 'y']: say which is preferred, with one of "
         "data.columns.preferred, data.columns.preference, data.columns.scores, data.columns.ranks"),
        (["columns.responses=[x]", "columns.preferred=w"], "data.columns.responses=['x']: name two columns or more"),
        (["columns.preferred=w"], "data.columns.preferred=w: is about several responses; name them in "
         "data.columns.responses"),
        (["columns.responses=[x,y]", "columns.preferred=w", "columns.ranks=[r,s]"],
         "data.columns.ranks=['r', 's']: data.columns.preferred says already which response is preferred; keep one of "
         "the two"),
        (["columns.responses=x", "format=messages"],
         "data.format=messages: data.columns.responses needs format=auto"),
        (["columns.responses=[x,y]", "columns.scores=[r]"],
         "data.columns.scores=['r']: name 2, one for each response"),
        (["columns.responses=[x,y]", "columns.preferred=w", "columns.chosen=x"],
         "data.columns.chosen=x: leave it out: data.columns.responses names the responses"),
        (["columns.responses=[x,y]", "columns.preferred=w", "preferred=[1]"],
         "data.preferred=['1']: name 2 values, one for each response"),
        (["columns.responses=[x,y]", "columns.preferred=w", "preferred=[1,1.0]"],
         "data.preferred=['1', '1']: and data.tied=[]: name each value once"),
        (["preferred=[1,0]"], "data.preferred=['1', '0']: needs data.columns.preferred, their column"),
        (["columns.chosen=[x,y]"], "data.columns.chosen=['x', 'y']: name one column"),
        (["columns.chosen={a: 1}"], "data.columns={'chosen': {'a': 1}}: must be a column, a list of columns, or null"),
        (["roles.gpt=bot"], "data.roles={'gpt': 'bot'}: must be system, developer, user, assistant or tool for each "
         "speaker"),
        (["ties=keep"], "data.ties=keep: choose one of drop, half"),
    ],
)  # fmt: skip
def test_a_mapping_that_says_too_little_or_too_much_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        data_config("data=jsonl", "data.train=x.jsonl", *(f"data.{word}" for word in words))
    assert str(error.value) == says
