"""Prompt + response is the chat template's rendering, token for token, also without its oldest turns."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import FORMS, chat_tokenizer
from conftest import write_jsonl

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import DataConfig, RunConfig, run_config
from dpo_cli.data.chat_template import RefusedRowError
from dpo_cli.data.formats import FinishReason, Message, PreferencePair, dialogue_text, messages, pairs_of, standard
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.prompts import accepted_prompts, read_prompts
from dpo_cli.data.samples import Sample, as_stored
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.data.truncation import Truncation, truncate
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.labelling.judges import ModelJudge

TURNS = [("user", "first words"), ("assistant", "an answer"), ("user", "more words"), ("assistant", "well then"),
         ("user", "the last question")]  # fmt: skip
SYSTEM = ("system", "Be brief.")
ROOM = 30  # tokens for a response
CODE = "    if a:\n        return b\n"


def rendered(tokenizer: Any, turns: list[tuple[str, str]], asks: bool) -> list[int]:
    conversation = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=asks)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def pair_of(turns: list[tuple[str, str]], chosen: str = "yes", rejected: str = "no") -> PreferencePair:
    prompt = [{"role": role, "content": content} for role, content in turns]
    sides = {"chosen": chosen, "rejected": rejected}
    return messages({"prompt": prompt} | {k: [{"role": "assistant", "content": text}] for k, text in sides.items()})


def with_system(form: str) -> list[list[tuple[str, str]]]:
    return [TURNS] if form == "gemma" else [TURNS, [SYSTEM, *TURNS]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ["yes", CODE, "  two spaces", "ends in a line\n"])
def test_prompt_and_response_are_the_rendering_of_the_whole_conversation(form: str, answer: str) -> None:
    tokenizer = chat_tokenizer(form)
    encoder = PairEncoder(tokenizer, None)
    for turns in with_system(form):
        encoded = encoder.encode([pair_of(turns, answer)])[0]
        assert encoded.prompt == rendered(tokenizer, turns, True)
        whole = rendered(tokenizer, [*turns, ("assistant", answer)], False)
        after = whole[len(encoded.prompt) + len(encoded.chosen) :]
        assert encoded.prompt + encoded.chosen + after == whole
        # ChatML and Gemma put a line break behind the closing token, Phi 3 one and EOS.
        assert tokenizer.decode(after).strip() in ("", "<|endoftext|>")
    assert encoder.borders_merged == encoder.rendered_otherwise == 0


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ("chatml", CODE + "<|im_end|>"),
        ("llama-2", " if a:\n        return b </s>"),
        ("mistral", f" {CODE}</s>"),
        ("llama-3", "if a:\n        return b<|eot_id|>"),
        ("gemma", "if a:\n        return b<end_of_turn>"),
    ],
)
def test_white_space_is_trained_where_the_template_has_it(form: str, code: str) -> None:
    tokenizer = chat_tokenizer(form)
    encoded = PairEncoder(tokenizer, None).encode([pair_of(TURNS, CODE)])[0]
    assert tokenizer.decode(encoded.chosen) == code


def test_the_space_before_an_answer_is_part_of_its_first_token() -> None:
    tokenizer = chat_tokenizer("mistral")
    encoder = PairEncoder(tokenizer, None)
    encoded = encoder.encode([standard({"prompt": "q", "chosen": "yes", "rejected": "no"})])[0]
    assert encoded.chosen[0] == tokenizer.convert_tokens_to_ids("Ġy")
    assert encoder.reason == ("the model has a chat template, which begins an answer with ' ': that is trained, too")


@pytest.mark.parametrize("form", FORMS)
def test_what_a_model_wrote_is_trained_as_it_wrote_it(form: str) -> None:
    tokenizer = chat_tokenizer(form)
    encoder = PairEncoder(tokenizer, None)
    for wanted in ("yes", "if a:\n    b"):
        encoded = encoder.encode([pair_of(TURNS, wanted)])[0]
        text = tokenizer.decode(encoded.chosen, skip_special_tokens=True)
        assert encoder.completion_text(text, FinishReason.STOP) == wanted


def test_a_space_that_a_model_wrote_first_comes_back_from_a_file_of_samples() -> None:
    tokenizer = chat_tokenizer("chatml")
    prompt = [{"role": "user", "content": "q"}]
    stored = as_stored(prompt, " yes", "chat")
    pair = messages({"prompt": prompt, "chosen": [{"role": "assistant", "content": stored}], "rejected": "no"})
    assert tokenizer.decode(PairEncoder(tokenizer, None).encode([pair])[0].chosen) == " yes<|im_end|>"
    assert as_stored(prompt, " yes", "plain") == "yes"  # there the space follows `Assistant:`
    assert PairEncoder(tokenizer, "plain").render(pair).chosen == "  yes"


def test_a_response_of_finish_reason_length_ends_with_its_own_text() -> None:
    tokenizer = chat_tokenizer("llama-2")
    row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    pair = PreferencePair(standard(row).messages, "q", "yes", "no", chosen_finish_reason=FinishReason.LENGTH)
    encoded = PairEncoder(tokenizer, None).encode([pair])[0]
    assert [tokenizer.decode(ids) for ids in (encoded.chosen, encoded.rejected)] == [" yes", " no </s>"]


def test_an_answer_that_a_template_opens_otherwise_when_asked_is_trained_as_asked_and_that_is_said() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    encoder = PairEncoder(tokenizer, None)
    encoded = encoder.encode([pair_of([("user", "q")], CODE)])[0]
    assert tokenizer.decode(encoded.prompt).endswith("<think>\n")
    assert tokenizer.decode(encoded.chosen) == CODE + "<|im_end|>"
    assert encoder.reason.endswith("which opens an answer otherwise when it is asked for one: so it is trained")
    assert encoder.rendered_otherwise == 0


def test_a_prompt_that_the_template_renders_otherwise_with_an_answer_is_counted() -> None:
    tokenizer = chat_tokenizer("mistral")  # some put the system message before the newest turn, where that is a user's
    tokenizer.chat_template = tokenizer.chat_template.replace("if loop.first and", "if loop.last and")
    encoder = PairEncoder(tokenizer, None)
    encoded = encoder.encode([pair_of([SYSTEM, *TURNS])])[0]
    assert encoded.prompt == rendered(tokenizer, [SYSTEM, *TURNS], True)
    assert tokenizer.decode(encoded.chosen) == " yes</s>"
    assert encoder.rendered_otherwise == 2


def test_a_conversation_that_the_template_refuses_is_named_in_its_words_escaped() -> None:
    tokenizer = chat_tokenizer("mistral")
    twice = [("user", "a"), ("user", "b")]
    with pytest.raises(RefusedRowError) as error:
        PairEncoder(tokenizer, None).render(pair_of(twice))
    assert str(error.value) == "the chat template refuses it (roles must alternate)"
    tokenizer.chat_template = tokenizer.chat_template.replace("roles must", "\x1b[2J roles must")
    with pytest.raises(RefusedRowError, match=r"refuses it \(\\x1b\[2J roles must alternate\)$"):
        PairEncoder(tokenizer, None).render(pair_of(twice))


# Rows that the template refuses


def data_options(file: Path, *words: str) -> DataConfig:
    words = ("data=jsonl", f"data.train={file}", "data.eval_fraction=0", *words)
    return run_config(composed("train", parse_overrides(list(words)), RunConfig).container).data


def row(*turns: tuple[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": role, "content": content} for role, content in turns],
        "chosen": "yes",
        "rejected": "no",
    }


TWICE = row(("user", "a"), ("user", "b"))


def test_a_row_that_the_template_refuses_ends_with_file_line_and_its_words(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("mistral")
    tokenizer.chat_template = tokenizer.chat_template.replace("roles must", "\x1b[2J roles must")
    file = write_jsonl(tmp_path / "rows.jsonl", [row(*TURNS), TWICE])
    with pytest.raises(DataError) as error:
        load_pairs(data_options(file), PairEncoder(tokenizer, None), 0)
    assert str(error.value) == (
        f"{file} line 2: the chat template refuses it (\\x1b[2J roles must alternate) "
        "(data.on_bad_row=skip counts and drops such rows)"
    )


def test_skip_counts_and_drops_the_rows_that_the_template_refuses(tmp_path: Path) -> None:
    encoder = PairEncoder(chat_tokenizer("mistral"), None)
    file = write_jsonl(tmp_path / "rows.jsonl", [TWICE, row(*TURNS), {"prompt": "q"}])
    report = load_pairs(data_options(file, "data.on_bad_row=skip", "data.max_bad_fraction=1"), encoder, 0).train_report
    assert (report.rows, report.kept) == (3, 1)
    assert dict(report.dropped) == {"refused_by_template": 1, "bad_row": 1}
    assert "dropped 1 row that the chat template refuses" in report.sentences(512)
    only = write_jsonl(tmp_path / "only.jsonl", [TWICE])
    with pytest.raises(DataError, match=r"1 row that the chat template refuses; choose data\.template=plain$"):
        load_pairs(data_options(only, "data.on_bad_row=skip", "data.max_bad_fraction=1"), encoder, 0)


def test_a_prompt_to_complete_that_the_template_refuses_is_named_or_dropped(tmp_path: Path) -> None:
    encoder = PairEncoder(chat_tokenizer("mistral"), None)
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q"}, TWICE])
    prompts, report = read_prompts(str(file), None, skip_bad=True)
    with pytest.raises(DataError) as error:
        accepted_prompts(prompts, encoder, report, skip_bad=False)
    assert str(error.value) == (
        f"{file} line 2: the chat template refuses it (roles must alternate) "
        "(on_bad_row=skip counts and drops such rows)"
    )
    assert accepted_prompts(prompts, encoder, report, skip_bad=True) == prompts[:1]
    assert (report.kept, dict(report.dropped)) == (1, {"refused_by_template": 1})
    with pytest.raises(DataError, match="the chat template refuses all prompts; choose template=plain"):
        accepted_prompts(prompts[1:], encoder, report, skip_bad=True)


def test_a_sample_that_the_judges_template_refuses_is_named() -> None:
    encoder = PairEncoder(chat_tokenizer("mistral"), None)
    judge = ModelJudge("j", {}, None, None, encoder, 60, torch.device("cpu"), "auto", "")  # type: ignore[arg-type]
    sample = Sample("1f" * 16, TWICE["prompt"], ("yes", "no"))
    with pytest.raises(DataError) as error:
        judge.rewards([sample], lambda: None)
    assert str(error.value) == (
        f"sample {sample.id}: the chat template refuses it (roles must alternate); remove it from the samples"
    )


# Texts that a template has rendered already

MANY = [row(("user", f"question {number}")) for number in range(9)]


def chatml(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_text_that_is_rendered_already_is_refused_with_file_line_and_what_to_do(tmp_path: Path) -> None:
    rows = [MANY[0], *({"prompt": chatml(f"q {n}"), "chosen": "yes", "rejected": "no"} for n in range(3))]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    encoder = PairEncoder(chat_tokenizer("chatml"), None)
    with pytest.raises(DataError) as error:
        load_pairs(data_options(file), encoder, 0)
    assert str(error.value) == (
        f"{file} line 2: the prompt begins with <|im_start|>, as 3 of the first 4 do: a chat template has rendered "
        "it already, and data.template=chat would do so again; choose data.template=plain"
    )
    plain = load_pairs(data_options(file), PairEncoder(encoder.tokenizer, "plain"), 0)
    assert plain.train_report.kept == 4 and not plain.train_report.notes
    with pytest.raises(DataError, match=r"and template=chat would do so again; choose template=plain$"):
        prompts, report = read_prompts(str(file), None, skip_bad=False)
        accepted_prompts(prompts, encoder, report, skip_bad=False)


def test_a_row_of_several_pairs_is_one_prompt_there(tmp_path: Path) -> None:
    ranked = {"prompt": chatml("q"), "responses": ["yes", "well", "no"]}
    file = write_jsonl(tmp_path / "rows.jsonl", [ranked, MANY[0], MANY[1]])
    report = load_pairs(data_options(file), PairEncoder(chat_tokenizer("chatml"), None), 0).train_report
    assert (report.rows, report.kept) == (3, 5)


@pytest.mark.parametrize(
    "text", ["[INST] q [/INST]", " <|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>", "<start_of_turn>user\nq",
             "<s>[INST] q [/INST]", chatml("q")]
)  # fmt: skip
def test_the_markers_of_every_common_template_are_known(tmp_path: Path, text: str) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": text, "chosen": "yes", "rejected": "no"}])
    with pytest.raises(DataError, match=r"line 1: the prompt begins with .*, as 1 of the first 1 do"):
        load_pairs(data_options(file), PairEncoder(chat_tokenizer("mistral"), None), 0)


def test_a_marker_here_and_there_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    spoken = [row(("user", "What does <|im_start|> mean?")), row(("user", chatml("q"))), row(("user", "[INST]?"))]
    file = write_jsonl(tmp_path / "rows.jsonl", [*spoken, *MANY])
    report = load_pairs(data_options(file), PairEncoder(chat_tokenizer("chatml"), None), 0).train_report
    assert report.sentences(512)[1:] == [
        "2 pairs with <|im_start|>, a special token, in their text: it is encoded as text",
        "1 pair with <|im_end|>, a special token, in their text: it is encoded as text",
        "1 pair with [INST], the marker of a chat template, in the text of the prompt",
    ]


# Cut prompts


def cut(encoder: PairEncoder, pair: PreferencePair, max_length: int, tally: Truncation | None = None) -> list[int]:
    short = truncate(encoder.encode([pair])[0], max_length, max_length - ROOM, tally or Truncation())
    assert short is not None and len(short.prompt) <= max_length - ROOM
    return short.prompt


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_that_loses_turns_is_the_rendering_of_those_that_stay(form: str) -> None:
    tokenizer = chat_tokenizer(form)
    encoder = PairEncoder(tokenizer, None)
    for turns in with_system(form):
        system = [turn for turn in turns if turn == SYSTEM]
        kept = [rendered(tokenizer, [*system, *TURNS[start:]], True) for start in (0, 2, 4)]
        assert len(kept[0]) > len(kept[1]) > len(kept[2])
        for longer, shorter in pairwise(kept):
            # One token too few for the longer one, and just enough for the shorter.
            assert cut(encoder, pair_of(turns), len(longer) - 1 + ROOM) == shorter
            assert cut(encoder, pair_of(turns), len(shorter) + ROOM) == shorter


@pytest.mark.parametrize("form", FORMS)
def test_a_single_turn_is_cut_inside_and_keeps_bos_and_header(form: str) -> None:
    tokenizer = chat_tokenizer(form)
    encoder = PairEncoder(tokenizer, None)
    long = "".join(f"word{number} " for number in range(40)) + "the end"
    for turns in ([("user", long)], [*TURNS[:2], ("user", long)]):
        whole = rendered(tokenizer, [("user", long)], True)
        header = rendered(tokenizer, [("user", "@")], True)
        header = header[: next(i for i, (one, other) in enumerate(zip(header, whole, strict=False)) if one != other)]
        prompt = cut(encoder, pair_of(turns), 100 + ROOM)
        assert len(prompt) == 100
        assert prompt == header + whole[-(100 - len(header)) :]
    bos = tokenizer.bos_token_id
    for length in range(ROOM + 2, ROOM + 20):
        prompt = cut(encoder, pair_of([("user", long)]), length)
        assert bos is None or prompt[0] == bos
        assert prompt[-1] == whole[-1] or len(prompt) == 1


def test_a_system_message_stays_unless_it_would_fill_more_than_half() -> None:
    tokenizer = chat_tokenizer("llama-3")
    encoder = PairEncoder(tokenizer, None)
    long = "".join(f"word{number} " for number in range(40))
    prompt = tokenizer.decode(cut(encoder, pair_of([SYSTEM, ("user", long)]), 120))
    assert prompt.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")
    short = cut(encoder, pair_of([("system", long), ("user", "and so?")]), 120)
    assert short == rendered(tokenizer, [("user", "and so?")], True)


def test_a_plain_dialogue_loses_whole_turns_and_keeps_bos() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer("mistral")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    encoder = PairEncoder(tokenizer, "plain")
    plain = [dialogue_text(tuple(Message(*turn) for turn in TURNS[start:])) for start in (0, 2, 4)]
    ids = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in plain]
    assert cut(encoder, pair_of(TURNS), len(ids[1]) + ROOM + 1) == ids[1]
    assert cut(encoder, pair_of(TURNS), len(ids[1]) + ROOM - 1) == ids[2]
    text = standard({"prompt": "word " * 60, "chosen": "yes", "rejected": "no"})
    prompt = cut(encoder, text, 40 + ROOM)
    assert len(prompt) == 40 and tokenizer.decode(prompt).startswith("<s>") and prompt[1] != prompt[0]
    already = standard({"prompt": "<s>[INST] q [/INST]", "chosen": "yes", "rejected": "no"})
    assert tokenizer.decode(encoder.encode([already])[0].prompt) == "<s>[INST] q [/INST]"  # BOS once


def test_cut_prompts_are_counted_once_each() -> None:
    encoder = PairEncoder(chat_tokenizer("llama-2"), None)
    tally = Truncation()
    for length in (400, 80, 60, 40):
        cut(encoder, pair_of(TURNS), length, tally)
    assert (tally.prompts_cut, tally.responses_cut) == (3, 0)


def test_the_oldest_tokens_alone_are_cut_where_a_run_began_so(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("llama-3")
    encoder = PairEncoder(tokenizer, None)
    file = write_jsonl(tmp_path / "rows.jsonl", [row(*TURNS)])
    words = ("data.max_length=60", "data.max_prompt_length=50")
    turns, tokens = (
        load_pairs(data_options(file, *words, *more), encoder, 0).train[0].prompt.tolist()
        for more in ((), ("data.prompt_truncation=tokens",))
    )
    assert turns == rendered(tokenizer, TURNS[4:], True)
    assert tokens == rendered(tokenizer, TURNS, True)[-50:]


# Whole conversations: tools, thoughts, responses of several messages

USER = {"role": "user", "content": "Is it warm?"}
WARMTH = {"name": "warmth", "arguments": {"city": "Bern"}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call00001", "type": "function", "function": WARMTH}],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "warmth", "content": "12 degrees"}
ANSWER = {"role": "assistant", "content": "Not very."}
LATER = [ANSWER, {"role": "user", "content": "And there?"}, {"role": "assistant", "content": "No, never."}]
TOOL = {"type": "function", "function": {"name": "warmth", "description": "How warm it is.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
NO = {"role": "assistant", "content": "no"}


def loaded(encoder: PairEncoder, prompt: Any, chosen: Any, rejected: Any = (NO,), **context: Any) -> TokenizedPair:
    """The pair that a row of messages becomes, whole."""
    (pair,) = pairs_of({"prompt": prompt, "chosen": list(chosen), "rejected": list(rejected), **context}, "messages")
    whole = truncate(encoder.encode([pair])[0], 4096, None, Truncation())
    assert whole is not None
    ids = (token_ids(whole.prompt), token_ids(whole.chosen), token_ids(whole.rejected))
    spans = (token_ids(whole.chosen_unscored), token_ids(whole.rejected_unscored))
    return TokenizedPair(*ids, 0, "", 0, *spans)


def scored(tokenizer: Any, response: Any, unscored: Any) -> list[str]:
    """The texts of a response that are scored."""
    borders = [0, *unscored.tolist(), len(response)]
    return [tokenizer.decode(response[start:stop]) for start, stop in zip(borders[::2], borders[1::2], strict=True)]


def whole_ids(tokenizer: Any, turns: list[Any], asks: bool, **given: Any) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks, **given)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def check_whole(form: str, prompt: list[Any], response: list[Any], **context: Any) -> list[str]:
    """That prompt and response are the rendering of the whole conversation, token for token; what is scored."""
    tokenizer = chat_tokenizer(form)
    encoder = PairEncoder(tokenizer, None)
    pair = loaded(encoder, prompt, response, **context)
    whole = whole_ids(tokenizer, [*prompt, *response], False, **context)
    assert pair.prompt.tolist() == whole_ids(tokenizer, prompt, True, **context)
    ours = [*pair.prompt.tolist(), *pair.chosen.tolist()]
    assert ours == whole[: len(ours)]
    assert tokenizer.decode(whole[len(ours) :]).strip() in ("", "<|endoftext|>")
    assert encoder.rendered_otherwise == encoder.borders_merged == 0
    return scored(tokenizer, pair.chosen, pair.chosen_unscored)


# What the assistant writes in LATER, with the token that closes each turn.
DIALOGUE = {
    "chatml": ["Not very.<|im_end|>", "No, never.<|im_end|>"],
    "llama-2": [" Not very. </s>", " No, never. </s>"],
    "mistral": [" Not very.</s>", " No, never.</s>"],
    "llama-3": ["Not very.<|eot_id|>", "No, never.<|eot_id|>"],
    "gemma": ["Not very.<end_of_turn>", "No, never.<end_of_turn>"],
    "qwen-2.5": ["Not very.<|im_end|>", "No, never.<|im_end|>"],
    "qwen-3": ["Not very.<|im_end|>", "<think>\n\n</think>\n\nNo, never.<|im_end|>"],
    "mistral-tools": [" Not very.</s>", " No, never.</s>"],
    "phi-3": ["Not very.<|end|>", "No, never.<|end|>"],
    "smollm": ["Not very.<|im_end|>", "No, never.<|im_end|>"],
    "deepseek": ["Not very.</s>", "No, never.</s>"],
}


@pytest.mark.parametrize("form", FORMS)
def test_of_later_turns_only_what_the_assistant_wrote_is_scored(form: str) -> None:
    for turns in ([USER], [USER, ANSWER, USER]):
        assert check_whole(form, turns, LATER) == DIALOGUE[form]
    assert check_whole(form, [USER], LATER[:1]) == [DIALOGUE[form][1].replace("No, never", "Not very")]


JSON_CALL = '{"name": "warmth", "arguments": {"city": "Bern"}'
CALLS = {
    "llama-3": ['{"name": "warmth", "parameters": {"city": "Bern"}}<|eom_id|>', "Not very.<|eot_id|>"],
    "qwen-2.5": [f"<tool_call>\n{JSON_CALL}}}\n</tool_call><|im_end|>", "Not very.<|im_end|>"],
    "qwen-3": [
        f"<tool_call>\n{JSON_CALL}}}\n</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nNot very.<|im_end|>",
    ],
    "mistral-tools": [f'[TOOL_CALLS] [{JSON_CALL}, "id": "call00001"}}]</s>', " Not very.</s>"],
}


@pytest.mark.parametrize("form", CALLS)
def test_a_call_and_an_answer_are_scored_and_the_tools_result_is_not(form: str) -> None:
    call, answer = CALLS[form]
    assert check_whole(form, [USER], [CALL, RESULT, ANSWER], tools=[TOOL]) == [call, answer]
    assert check_whole(form, [USER, CALL, RESULT], [ANSWER], tools=[TOOL]) == [answer]
    assert check_whole(form, [USER], [CALL, RESULT, CALL, RESULT, ANSWER], tools=[TOOL]) == [call, call, answer]
    # A response that is a call alone ends with the token that closes calls.
    alone = f"<think>\n\n</think>\n\n{call}" if form == "qwen-3" else call
    assert check_whole(form, [USER], [CALL], tools=[TOOL]) == [alone]
    if form != "mistral-tools":  # where they would move to the newest question
        assert check_whole(form, [USER], [CALL, RESULT, *LATER], tools=[TOOL]) == [call, *DIALOGUE[form]]


def test_tool_results_in_a_row_stay_unscored() -> None:
    both = CALL | {"tool_calls": CALL["tool_calls"] * 2}
    call = f"<tool_call>\n{JSON_CALL}}}\n</tool_call>"
    found = check_whole("qwen-2.5", [USER], [both, RESULT, RESULT, ANSWER], tools=[TOOL])
    assert found == [f"{call}\n{call}<|im_end|>", "Not very.<|im_end|>"]


def test_thoughts_are_scored_where_the_template_renders_them() -> None:
    thinks = ANSWER | {"reasoning_content": "Twelve is few."}
    assert check_whole("qwen-3", [USER], [thinks]) == ["<think>\nTwelve is few.\n</think>\n\nNot very.<|im_end|>"]
    found = check_whole("qwen-3", [USER], [CALL | {"reasoning_content": "Ask."}, RESULT, thinks], tools=[TOOL])
    assert [text.split("\n")[1] for text in found] == ["Ask.", "Twelve is few."]


@pytest.mark.parametrize(
    "thinks",
    [ANSWER | {"reasoning_content": "Few."}, ANSWER | {"content": "<think>\nFew.\n</think>\n\nNot very."}],
)
def test_a_response_whose_earlier_thoughts_the_template_drops_is_refused_with_both_texts(thinks: Any) -> None:
    with pytest.raises(RefusedRowError) as error:
        loaded(PairEncoder(chat_tokenizer("qwen-3"), None), [USER], [thinks, *LATER[1:]])
    assert str(error.value) == (
        "the chat template renders message 1 otherwise in the whole conversation: "
        "'assistant\\n<think>\\nFew.\\n</think>\\n\\nNot very.<|im_end' becomes "
        "'assistant\\nNot very.<|im_end|>\\n<|im_start|>user\\nAnd'"
    )


def test_tools_that_move_to_a_later_question_are_refused() -> None:
    with pytest.raises(RefusedRowError, match=r"message 1 otherwise in the whole conversation: .*AVAILABLE_TOOLS"):
        loaded(PairEncoder(chat_tokenizer("mistral-tools"), None), [USER], LATER, tools=[TOOL])


@pytest.mark.parametrize("arguments", [{"city": "Bern"}, '{"city": "Bern"}'])
def test_arguments_are_given_as_the_template_takes_them(arguments: Any) -> None:
    call = CALL | {"tool_calls": [{"id": "call00001", "function": {"name": "warmth", "arguments": arguments}}]}
    for form, template in CALLS.items():
        assert loaded_text(form, [call, RESULT, ANSWER])[0] == template[0]
    for content in (None, ""):
        assert (
            loaded_text("deepseek", [call | {"content": content}, RESULT, ANSWER])[0]
            == '<|call|>warmth\n{"city": "Bern"}</s>'
        )


def loaded_text(form: str, response: list[Any]) -> list[str]:
    tokenizer = chat_tokenizer(form)
    pair = loaded(PairEncoder(tokenizer, None), [USER], response, tools=[TOOL])
    return scored(tokenizer, pair.chosen, pair.chosen_unscored)


def test_the_spelling_of_arguments_that_are_text_stays_where_the_template_takes_text() -> None:
    call = CALL | {"tool_calls": [{"function": {"name": "warmth", "arguments": '{"city":"Bern"}'}}]}
    assert '{"city":"Bern"}' in loaded_text("qwen-3", [call])[0]


def test_a_template_that_takes_parts_gets_parts() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}",
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    )
    encoder = PairEncoder(tokenizer, None)
    assert encoder.template is not None and encoder.template.takes_parts
    assert scored(tokenizer, loaded(encoder, [USER], LATER).chosen, token_ids([])) == [
        "Not very.<|im_end|>\n<|im_start|>user\nAnd there?<|im_end|>\n<|im_start|>assistant\nNo, never.<|im_end|>"
    ]


def test_a_reader_of_null_contents_never_writes_none() -> None:
    assert "None" not in "".join(loaded_text("chatml", [CALL, RESULT, ANSWER]))


def test_hh_rows_that_part_early_train_only_the_assistant_under_a_chat_template() -> None:
    tokenizer = chat_tokenizer("chatml")
    first = "\n\nHuman: Is it warm?\n\nAssistant:"
    row = {"chosen": f"{first} Not very.\n\nHuman: And there?\n\nAssistant: No, never.", "rejected": f"{first} no"}
    encoded = PairEncoder(tokenizer, None).encode([*pairs_of(row, "hh")])[0]
    found = scored(tokenizer, encoded.chosen, token_ids(encoded.chosen_unscored))
    assert found == ["Not very.<|im_end|>", "No, never.<|im_end|>"]
    plain = PairEncoder(tokenizer, "plain").encode([*pairs_of(row, "hh")])[0]
    assert plain.chosen_unscored == ()
    assert tokenizer.decode(plain.prompt + plain.chosen) == row["chosen"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": [CALL, RESULT, ANSWER]}, "for tool_calls in a message; choose data.template=chat"),
        ({"prompt": [USER, ANSWER, RESULT]}, "for tool results in a message; choose data.template=chat"),
        (
            {"tools": [TOOL]},
            "for the row's tools; choose data.template=chat, or data.columns.tools=null leaves them out",
        ),
    ],
)
def test_plain_text_refuses_what_it_has_no_form_for(row: dict[str, Any], says: str) -> None:
    (pair,) = pairs_of({"prompt": [USER], "chosen": "yes", "rejected": "no"} | row, "messages")
    with pytest.raises(RefusedRowError) as error:
        PairEncoder(chat_tokenizer("chatml"), "plain").render(pair)
    assert str(error.value) == f"plain text has no form {says}"


def test_what_a_template_does_not_render_is_counted_by_name(tmp_path: Path) -> None:
    thinks = ANSWER | {"reasoning_content": "Few."}
    rows = [{"prompt": [USER, CALL, RESULT], "chosen": [thinks], "rejected": [NO], "tools": [TOOL]},
            {"prompt": [USER], "chosen": [thinks], "rejected": [thinks | {"content": "x"}], "documents": [{"a": 1}]},
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [NO]}]  # fmt: skip
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = load_pairs(data_options(file), PairEncoder(chat_tokenizer("chatml"), None), 0).train_report
    assert dict(report.notes) == {
        "with tools that the chat template does not render": 1,
        "with documents that the chat template does not render": 1,
        "with tool_calls in the prompt that the chat template does not render": 1,
        "with tool_call_id in the prompt that the chat template does not render": 1,
        "with name in the prompt that the chat template does not render": 1,
        "with reasoning_content in a response that the chat template does not render": 2,
    }
    assert "2 pairs with reasoning_content in a response that the chat template does not render" in report.sentences(9)
    read = load_pairs(data_options(file), PairEncoder(chat_tokenizer("qwen-3"), None), 0).train_report
    assert not any("reasoning" in note or "tool_calls" in note or "tools" in note for note in read.notes)


# Options of a template


def test_options_reach_the_template() -> None:
    encoder = PairEncoder(chat_tokenizer("qwen-3"), None, template_options={"enable_thinking": False})
    pair = loaded(encoder, [USER], [ANSWER])
    assert encoder.tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert encoder.tokenizer.decode(pair.chosen) == "Not very.<|im_end|>"
    dated = PairEncoder(chat_tokenizer("llama-3"), None, template_options={"date_string": "1 May 2026"})
    assert "Date: 1 May 2026" in dated.tokenizer.decode(loaded(dated, [USER], [ANSWER], tools=[TOOL]).prompt)


def test_later_turns_follow_the_prompt_that_asks_for_no_thoughts() -> None:
    encoder = PairEncoder(chat_tokenizer("qwen-3"), None, template_options={"enable_thinking": False})
    pair = loaded(encoder, [USER], LATER)
    assert encoder.tokenizer.decode(pair.prompt).endswith("<think>\n\n</think>\n\n")
    assert scored(encoder.tokenizer, pair.chosen, pair.chosen_unscored) == DIALOGUE["chatml"]
    assert encoder.rendered_otherwise == 1


@pytest.mark.parametrize(
    ("form", "kind", "option", "says"),
    [
        ("qwen-3", None, "enable_thinkng", "the model's chat template does not read it; it reads enable_thinking"),
        ("chatml", None, "date_string", "the model's chat template does not read it; it has no options"),
        ("chatml", None, "messages", "the model's chat template does not read it; it has no options"),
        ("llama-3", None, "bos_token", "the model's chat template does not read it; it reads date_string"),
        ("qwen-3", "plain", "enable_thinking", "is for a chat template, and data.template is plain; leave it out"),
    ],
)
def test_an_option_that_nothing_reads_is_refused_by_name(form: str, kind: str | None, option: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        PairEncoder(chat_tokenizer(form), kind, template_options={option: False})
    assert str(error.value) == f"data.template_options.{option}=False: {says}"


def test_options_are_read_from_the_command_line_and_travel_with_a_run(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [row(*TURNS)])
    config = data_options(file, "data.template_options.enable_thinking=false")
    assert config.template_options == {"enable_thinking": False}
    assert PairEncoder.of(chat_tokenizer("qwen-3"), config).template_options == {"enable_thinking": False}
    assert data_options(file).template_options == {}


# Cut conversations with tools


@pytest.mark.parametrize("form", CALLS)
def test_a_prompt_loses_whole_turns_and_no_call_loses_its_result(form: str) -> None:
    tokenizer = chat_tokenizer(form)
    encoder = PairEncoder(tokenizer, None)
    system = [] if form == "mistral-tools" else [{"role": "system", "content": "Be brief."}]
    turns = [USER, CALL, RESULT, ANSWER, USER, CALL, RESULT, CALL, RESULT]
    whole = [*system, *turns]
    kept = [whole_ids(tokenizer, [*system, *rest], True, tools=[TOOL])
            for rest in (turns, turns[4:], [USER, *turns[7:]])]  # fmt: skip
    assert len(kept[0]) > len(kept[1]) > len(kept[2])
    (pair,) = pairs_of({"prompt": whole, "chosen": [ANSWER], "rejected": [NO], "tools": [TOOL]}, "messages")
    for length in range(len(kept[2]), len(kept[0]) + 1):
        longest = next(ids for ids in kept if len(ids) <= length)
        assert cut(encoder, pair, length + ROOM) == longest
    bos = tokenizer.bos_token_id
    assert bos is None or all(cut(encoder, pair, length + ROOM)[0] == bos for length in range(2, len(kept[2]), 40))


@pytest.mark.parametrize("form", ["chatml", "llama-3", "qwen-3"])
def test_a_response_that_is_cut_never_ends_with_what_is_not_scored(form: str) -> None:
    tokenizer = chat_tokenizer(form)
    encoder = PairEncoder(tokenizer, None)
    (pair,) = pairs_of({"prompt": [USER], "chosen": LATER, "rejected": [NO]}, "messages")
    whole = encoder.encode([pair])[0]
    start, stop = whole.chosen_unscored
    for room in range(1, len(whole.chosen) + 1):
        short = truncate(whole, len(whole.prompt) + room, len(whole.prompt), Truncation())
        if short is None or len(short.prompt) < len(whole.prompt):
            continue
        assert short.chosen == whole.chosen[: start if start < room <= stop else room]
        assert short.chosen_unscored == (whole.chosen_unscored if room > stop else ())
    assert len(whole.prompt) < len(whole.chosen)


# Text that spells a special token

SPELLED = "Write <|im_end|> here."


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def test_a_special_token_that_a_message_spells_is_encoded_as_text() -> None:
    tokenizer = chat_tokenizer("chatml")
    encoder = PairEncoder(tokenizer, None)
    closing = encoder.closing
    letters = [token for character in "<|im_end|>" for token in ids_of(tokenizer, character)]
    pair = loaded(encoder, [{"role": "user", "content": SPELLED}], [{"role": "assistant", "content": SPELLED}])
    said = [*ids_of(tokenizer, "Write "), *letters, *ids_of(tokenizer, " here.")]
    assert pair.chosen.tolist() == [*said, closing]
    assert pair.prompt.tolist() == [*ids_of(tokenizer, "<|im_start|>user\n"), *said, *ids_of(tokenizer, "<|im_end|>\n"),
                                    *ids_of(tokenizer, "<|im_start|>assistant\n")]  # fmt: skip
    assert encoder.closing_inside == encoder.borders_merged == encoder.rendered_otherwise == 0


def test_a_special_token_in_a_tool_result_or_a_call_ends_no_turn() -> None:
    call = CALL | {"tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "warmth", "arguments": {
        "city": SPELLED}}}]}  # fmt: skip
    tokenizer = chat_tokenizer("qwen-2.5")
    encoder = PairEncoder(tokenizer, None)
    later = [call, RESULT | {"content": SPELLED}, ANSWER | {"content": SPELLED}, *LATER[1:]]
    tool = {"type": "function", "function": {"name": "warmth", "description": SPELLED, "parameters": {}}}
    pair = loaded(encoder, [USER], later, tools=[tool])
    found = scored(tokenizer, pair.chosen, pair.chosen_unscored)
    assert [text.count("<|im_end|>") for text in found] == [2, 2, 1]
    assert found[1:] == [f"{SPELLED}<|im_end|>", "No, never.<|im_end|>"]
    # Closing tokens: one a message, of the assistant or not.
    assert pair.chosen.tolist().count(encoder.closing) == len(later)
    assert pair.prompt.tolist().count(encoder.closing) == 2


def test_a_prompt_with_a_spelled_special_token_is_cut_by_whole_turns_too() -> None:
    tokenizer = chat_tokenizer("chatml")
    encoder = PairEncoder(tokenizer, None)
    spelled = [("user", SPELLED), ("assistant", SPELLED), ("user", SPELLED)]
    last = encoder.encode([pair_of(spelled[2:])])[0].prompt
    assert cut(encoder, pair_of(spelled), len(last) + ROOM) == last


def test_what_special_tokens_in_text_become_is_chosen_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": SPELLED, "rejected": "no"}, {"prompt": [USER], "chosen": "a", "rejected": "b"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)

    def with_choice(*words: str) -> PairData:
        config = data_options(file, *words)
        return load_pairs(config, PairEncoder.of(tokenizer, config), 0)

    tokenizer = chat_tokenizer("chatml")
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    note = "with <|im_end|>, a special token, in their text: it is encoded as "
    escaped, kept = with_choice(), with_choice("data.special_tokens_in_text=keep")
    assert dict(escaped.train_report.notes) == {note + "text": 1}
    assert dict(kept.train_report.notes) == {note + "that token": 1}
    assert [data.train[0].chosen.tolist().count(closing) for data in (escaped, kept)] == [1, 2]
    with pytest.raises(DataError) as error:
        with_choice("data.special_tokens_in_text=error")
    assert str(error.value) == (
        f"{file} line 1: its text holds <|im_end|>, a special token (data.special_tokens_in_text=error) "
        "(data.on_bad_row=skip counts and drops such rows)"
    )
    plain = with_choice("data.template=plain")  # the text as it is: a template may have rendered it
    assert plain.train[0].chosen.tolist().count(closing) == 2 and not plain.train_report.notes


def test_rendered_text_reads_back_without_marks() -> None:
    encoder = PairEncoder(chat_tokenizer("chatml"), None)
    rendered = encoder.render(pair_of(TURNS, SPELLED))
    assert encoder.readable(rendered.chosen) == SPELLED != rendered.chosen


def test_an_answer_that_is_opened_otherwise_when_asked_is_escaped_too() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    encoder = PairEncoder(tokenizer, None)
    encoded = encoder.encode([pair_of([("user", "q")], SPELLED)])[0]
    assert encoded.chosen.count(encoder.closing) == 1 and encoded.chosen[-1] == encoder.closing
