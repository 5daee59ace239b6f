"""Rows become pairs: where the prompt ends, what is refused, and what is noted."""

import json
import re
from typing import Any

import pytest

from dpo_cli.data.formats import (
    DIVERGES_EARLY,
    PROMPT_REPEATED,
    BadRowError,
    Message,
    auto,
    dialogue_messages,
    hh,
    messages,
    pairs_of,
    standard,
)


def turns(*contents: str) -> list[dict[str, str]]:
    """user, assistant, user, ... messages."""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]


def test_hh_prompt_ends_at_the_last_shared_assistant_marker_not_inside_a_word() -> None:
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: I think so.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: I thank you.",  # shares "I th" as well
    }
    pair = hh(row)
    assert pair.prompt_text == "\n\nHuman: Hi\n\nAssistant:"
    assert (pair.chosen, pair.rejected) == (" I think so.", " I thank you.")
    assert pair.messages == (Message("user", "Hi"),)
    assert pair.notes == ()


def test_hh_keeps_earlier_turns_as_messages() -> None:
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = hh({"chosen": prompt + " yes", "rejected": prompt + " no"})
    assert pair.messages == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


def test_hh_that_parts_before_the_last_turn_keeps_all_text_and_says_so() -> None:
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: y\n\nAssistant: z",
    }
    pair = hh(row)
    assert pair.prompt_text == "\n\nHuman: a\n\nAssistant:"
    assert pair.prompt_text + pair.chosen == row["chosen"]
    assert pair.prompt_text + pair.rejected == row["rejected"]
    assert pair.notes == (DIVERGES_EARLY,)


def test_hh_where_one_response_begins_with_the_other_still_ends_the_prompt_at_the_marker() -> None:
    prompt = "\n\nHuman: a\n\nAssistant:"
    pair = hh({"chosen": prompt + " yes and more", "rejected": prompt + " yes"})
    assert (pair.chosen, pair.rejected) == (" yes and more", " yes")


def test_a_prompt_in_hh_form_may_end_in_a_space() -> None:
    pair = standard({"prompt": "\n\nHuman: a\n\nAssistant: ", "chosen": "yes", "rejected": "no"})
    assert pair.messages == (Message("user", "a"),)


def test_two_turns_of_one_speaker_are_joined_since_templates_want_them_to_alternate() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant:"
    assert dialogue_messages(text) == (Message("user", "a\n\nb"),)


def test_hh_without_a_shared_turn_is_refused() -> None:
    with pytest.raises(BadRowError, match=r"share no .*Assistant:"):
        hh({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"})


def test_standard_keeps_texts_as_they_are() -> None:
    pair = standard({"prompt": "Hello there, friend", "chosen": "Hi", "rejected": " no "})
    assert (pair.prompt_text, pair.chosen, pair.rejected) == ("Hello there, friend", "Hi", " no ")
    assert pair.messages == (Message("user", "Hello there, friend"),)


def test_a_prompt_repeated_in_both_responses_is_taken_once() -> None:
    prompt = "What is the sun? "
    pair = standard({"prompt": prompt, "chosen": prompt + "A star.", "rejected": prompt + "A lamp."})
    assert (pair.chosen, pair.rejected, pair.notes) == ("A star.", "A lamp.", (PROMPT_REPEATED,))


def test_a_prompt_that_one_response_repeats_is_a_part_of_it() -> None:
    prompt = "What is the sun?"
    for row in ((prompt + " A star.", "A lamp that somebody lit."), ("A lamp that somebody lit.", prompt + " A star.")):
        pair = standard({"prompt": prompt, "chosen": row[0], "rejected": row[1]})
        assert ((pair.chosen, pair.rejected), pair.notes) == (row, ())


def test_generated_responses_keep_the_prompt_that_they_repeat() -> None:
    row = {"prompt": "What is the sun?", "chosen": "What is the sun? A star.", "rejected": "What is the sun? No."}
    generated = row | {"chosen_finish_reason": "stop", "rejected_finish_reason": "stop"}
    (pair,), (repeated,) = pairs_of(generated, "auto"), pairs_of(row, "auto")
    assert (pair.chosen, pair.rejected, pair.notes) == (row["chosen"], row["rejected"], ())
    assert (repeated.chosen, repeated.notes) == (" A star.", (PROMPT_REPEATED,))


def test_a_short_greeting_that_opens_both_responses_is_no_repeated_prompt() -> None:
    pair = standard({"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Hello?"})
    assert pair.chosen == "Hello! How are you?"


def test_messages_with_a_given_a_repeated_and_an_implied_prompt_are_the_same_pair() -> None:
    given = {"prompt": turns("q"), "chosen": turns("", "yes")[1:], "rejected": turns("", "no")[1:]}
    repeated = {"prompt": "q", "chosen": turns("q", "yes"), "rejected": turns("q", "no")}  # UltraFeedback's mix
    implied = {"chosen": turns("q", "yes"), "rejected": turns("q", "no")}
    pairs = [messages(row) for row in (given, repeated, implied)]
    assert {(pair.messages, pair.chosen, pair.rejected) for pair in pairs} == {((Message("user", "q"),), " yes", " no")}
    assert [pair.notes for pair in pairs] == [(), (PROMPT_REPEATED,), ()]


def test_messages_in_plain_form_read_like_hh() -> None:
    pair = messages({"prompt": turns("a", "b", "c"), "chosen": "yes", "rejected": "no"})
    assert pair.prompt_text + pair.chosen == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes"


def test_a_system_message_is_plain_text_before_the_turns() -> None:
    system = {"role": "system", "content": "Answer in one word."}
    pair = messages({"prompt": [system, *turns("a")], "chosen": "yes", "rejected": "no"})
    assert pair.prompt_text == "Answer in one word.\n\nHuman: a\n\nAssistant:"


def test_a_response_may_be_later_turns_and_that_is_said() -> None:
    pair = messages({"prompt": "q", "chosen": turns("", "a", "b", "c")[1:], "rejected": "no"})
    assert [message.content for message in pair.chosen_messages] == ["a", "b", "c"]
    assert (pair.chosen, pair.rejected) == (" a\n\nHuman: b\n\nAssistant: c", " no")
    assert (pair.rejected_messages, pair.notes) == ((), (DIVERGES_EARLY,))


@pytest.mark.parametrize(
    ("chosen", "roles"),
    [(turns("a", "b"), "user, assistant"), (turns("", "a", "b")[1:], "assistant, user"), ([], "nothing")],
)
def test_a_response_begins_and_ends_with_the_assistant(chosen: list[dict[str, str]], roles: str) -> None:
    with pytest.raises(BadRowError) as error:
        messages({"prompt": "q", "chosen": chosen, "rejected": "no"})
    assert str(error.value) == (
        f"'chosen' must begin and end with an assistant message behind the prompt; it has {roles}"
    )


def test_conversations_that_differ_early_share_a_prompt_up_to_before_the_assistant_speaks() -> None:
    pair = messages({"chosen": turns("q", "a", "b", "c"), "rejected": turns("q", "x", "y", "z")})
    assert pair.messages == (Message("user", "q"),)
    assert [message.content for message in pair.rejected_messages] == ["x", "y", "z"]
    # They differ first in what the user says: the answer before it, which both have, begins both responses.
    pair = messages({"chosen": turns("q", "a", "b", "c"), "rejected": turns("q", "a", "y", "z")})
    assert pair.messages == (Message("user", "q"),)
    assert [message.content for message in pair.chosen_messages] == ["a", "b", "c"]


def test_hh_that_parts_early_has_its_later_turns_as_messages_too() -> None:
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n\nHuman: thanks",
        "rejected": "\n\nHuman: a\n\nAssistant: x",
    }
    pair = hh(row)
    assert pair.chosen_messages == (Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    assert pair.rejected_messages == ()


# What a message holds


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_nothing_in_a_message_is_lost() -> None:
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}  # null: a column of Parquet
    result = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    answer = {"role": "assistant", "content": "Two.", "reasoning_content": "One and one."}
    pair = messages({"prompt": [{"role": "developer", "content": "d"}, *turns("q")], "chosen": [asks, result, answer],
                     "rejected": [answer | {"thinking": "t"}]})  # fmt: skip
    kept = [message.as_dict() for message in pair.chosen_messages]
    assert kept == [{key: value for key, value in asks.items() if key != "name"} | {"tool_calls": (CALL,)}, result,
                    answer]  # fmt: skip
    assert pair.rejected_messages[0].more == {"reasoning_content": "One and one.", "thinking": "t"}
    assert pair.messages[0] == Message("developer", "d")


def test_pairs_that_differ_in_a_tool_call_alone_differ_in_their_texts() -> None:
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    other = asks | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"a": 2}'}}]}
    pair = messages({"prompt": "q", "chosen": [asks], "rejected": [other]})
    assert pair.chosen != pair.rejected and "add" in pair.chosen


def test_text_parts_are_joined_and_others_are_refused_by_name() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    pair = messages({"prompt": [{"role": "user", "content": parts}], "chosen": "yes", "rejected": "no"})
    assert pair.messages == (Message("user", "ab"),)
    for kind in ("image", "image_url", "input_audio", "video"):
        row = {"prompt": [{"role": "user", "content": [*parts, {"type": kind}]}], "chosen": "yes", "rejected": "no"}
        with pytest.raises(BadRowError) as error:
            messages(row)
        assert str(error.value) == (
            f"'prompt' message 0 has a part of type '{kind}'; dpo-cli trains on text parts alone"
        )


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize("written", [[TOOL], [json.dumps(TOOL)], json.dumps([TOOL]), TOOL])
def test_tools_and_documents_travel_with_the_pair_as_objects_or_as_json(written: object) -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "tools": written, "documents": [{"text": "t"}]}
    (pair,) = pairs_of(row, "auto")
    assert (pair.tools, pair.documents) == ((TOOL,), ({"text": "t"},))
    assert pair.prompt.tools == (TOOL,)
    ranked = {"prompt": "q", "responses": ["a", "b"], "tools": written}
    assert [pair.tools for pair in pairs_of(ranked, "auto")] == [(TOOL,)]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (7, "'tools' must be a list of objects, it is a number"),
        ("add", "'tools' must be a list of objects; its text is not JSON"),
        ([["add"]], "'tools' must be a list of objects, it holds a list"),
    ],
)
def test_tools_that_are_no_objects_are_refused(written: object, says: str) -> None:
    with pytest.raises(BadRowError) as error:
        pairs_of({"prompt": "q", "chosen": "yes", "rejected": "no", "tools": written}, "auto")
    assert str(error.value) == says


def test_auto_judges_each_row_by_its_own_shape() -> None:
    prompt = "\n\nHuman: q\n\nAssistant:"
    assert auto({"chosen": prompt + " yes", "rejected": prompt + " no"}).chosen == " yes"
    assert auto({"prompt": "one two", "chosen": "yes", "rejected": "no"}).chosen == "yes"
    assert auto({"chosen": turns("q", "yes"), "rejected": turns("q", "no")}).chosen == " yes"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"prompt": "p", "chosen": "c"},
            "no 'rejected' key. A row needs prompt, chosen and rejected; it has prompt, chosen",
        ),
        (
            {"prompt": "p", "chosen": "c", "rejectd": "r"},
            "no 'rejected' key. A row needs prompt, chosen and rejected; it has prompt, chosen, rejectd; "
            "did you mean data.columns.rejected=rejectd?",
        ),
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "'chosen' must be text, it is null"),
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "'chosen' must be text, it is a number"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "'prompt' must be text, it is a number"),
        (
            {"prompt": "p", "chosen": "\ud800", "rejected": "r"},
            "'chosen' holds half a surrogate pair (\\ud800 to \\udfff), which is not text",
        ),
        ({"chosen": "c", "rejected": "r"}, "no 'prompt' key. A row needs prompt, chosen and rejected; it has "
         "chosen, rejected"),
        ({"chosen": [], "rejected": []}, "the prompt must end with a user message before the responses begin "
         "(format=messages)"),
        ({"prompt": "p", "chosen": [{"role": "bot", "content": "x"}], "rejected": "r"},
         "'chosen' message 0 has role 'bot'; roles are system, developer, user, assistant, tool"),
        ({"prompt": "p", "chosen": [{"role": "user"}], "rejected": "r"},
         "'chosen' message 0: content must be text, it is null"),
        ({"prompt": "p", "chosen": ["x"], "rejected": "r"},
         "'chosen' message 0 must be an object with role and content"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said_exactly(row: dict[str, object], says: str) -> None:
    with pytest.raises(BadRowError) as error:
        auto(row)
    assert str(error.value) == says


# Ranked


def test_ranked_responses_make_a_pair_of_every_two_best_first() -> None:
    pairs = pairs_of({"prompt": "Which one is best?", "responses": ["a", "b", "c"]}, "auto")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {pair.prompt_text for pair in pairs} == {"Which one is best?"}


def test_scores_rank_responses_and_equal_scores_are_ties() -> None:
    row = {"prompt": "Q", "responses": ["low", "high", "low too"], "scores": [1, 9.5, 1]}
    assert [(pair.chosen, pair.rejected, pair.tied) for pair in pairs_of(row, "ranked")] == [
        ("high", "low", False), ("high", "low too", False), ("low", "low too", True),
    ]  # fmt: skip


def test_finish_reasons_are_read_from_pairs_and_from_ranked_rows() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    for more, reasons in (({}, ("stop", "stop")), ({"chosen_finish_reason": "length"}, ("length", "stop"))):
        (pair,) = pairs_of(row | more, "auto")
        assert (pair.chosen_finish_reason, pair.rejected_finish_reason) == reasons
    ranked = {"prompt": "Q", "responses": ["low", "high"], "scores": [1, 2], "finish_reason": ["stop", "length"]}
    (pair,) = pairs_of(ranked, "auto")
    assert (pair.chosen, pair.chosen_finish_reason, pair.rejected_finish_reason) == ("high", "length", "stop")
    for value, reason in ((None, "stop"), ("", "stop"), ("length", "length")):  # null in Parquet, an empty cell of CSV
        (pair,) = pairs_of(row | {"rejected_finish_reason": value}, "standard")
        assert pair.rejected_finish_reason == reason


OLDER_LIST = '\'finished\' is an older name; write "finish_reason": a list of "stop" or "length"'
NOT_A_LIST = '\'finish_reason\' must be a list of "stop" or "length", one for each response'


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"rejected_finish_reason": "eos"}, "'rejected_finish_reason' is 'eos'; it must be \"stop\" or \"length\""),
        ({"chosen_finish_reason": False}, "'chosen_finish_reason' is False; it must be \"stop\" or \"length\""),
        ({"chosen_finished": True},
         "'chosen_finished' is an older name; write \"chosen_finish_reason\": \"stop\" or \"length\""),
        ({"rejected_finished": False},
         "'rejected_finished' is an older name; write \"rejected_finish_reason\": \"stop\" or \"length\""),
    ],
)  # fmt: skip
def test_an_older_name_or_an_unknown_value_of_a_finish_reason_is_refused(more: dict[str, object], says: str) -> None:
    with pytest.raises(BadRowError) as error:
        pairs_of({"prompt": "Q", "chosen": "a", "rejected": "b"} | more, "auto")
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"finished": [True, False]}, OLDER_LIST),
        ({"finish_reason": ["stop"]}, NOT_A_LIST),
        ({"finish_reason": "stop"}, NOT_A_LIST),
        ({"finish_reason": ["stop", True]}, '\'finish_reason\' is True; it must be "stop" or "length"'),
    ],
)
def test_finish_reasons_of_a_ranked_row_that_cannot_be_read_are_refused(more: dict[str, object], says: str) -> None:
    with pytest.raises(BadRowError) as error:
        pairs_of({"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]} | more, "auto")
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Q", "responses": ["one"]}, "'responses' must hold at least two, it has 1"),
        ({"prompt": "Q", "responses": "one"}, "'responses' must be a list, it is text"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1]}, "'scores' has 1 numbers for 2 responses"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": ["1", "2"]}, "'scores' must be a list of numbers"),
        ({"prompt": "Q", "responses": ["a", 7]}, "'rejected' must be text, it is a number"),
        ({"responses": ["a", "b"]}, "'prompt' must be text, it is null"),
    ],
)
def test_a_ranked_row_that_ranks_nothing_says_why(row: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRowError, match=re.escape(says)):
        pairs_of(row, "auto")
