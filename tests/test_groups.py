"""Groups of prompts: what looks alike, and prefixes of one dialogue, are one."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.formats import Prompt, hh, messages, prompt_of
from dpo_cli.data.groups import first_human_turn, normalised, prompt_group

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\u0130\u0131"), max_size=30)
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


def prompt(text: str) -> Prompt:
    return prompt_of({"prompt": text})


def test_the_group_of_a_prompt_is_the_same_in_every_version() -> None:
    # printf 'gr\xc3\xbcsse 1' | b2sum -l 64
    assert f"{prompt_group(prompt('Grüße  1 ')):016x}" == "187b25e212926407"


@pytest.mark.parametrize(
    "twin",
    ["What is a café? ", "what is A CAFÉ?", "What is a cafe\u0301?", "What  is\na\tcafé?",
     "\ufeffWhat is a ca\u200bfé?", "What is a ｃａｆé?",
     f"{HUMAN}What is a café?{ASSISTANT}", f"Human: What is a café?{ASSISTANT}",
     f"{HUMAN}What is a café?{ASSISTANT}".replace("\n", "\r\n"), "Human: What is a café?\nAssistant: "],
)  # fmt: skip
def test_twins_of_a_prompt_are_one_group(twin: str) -> None:
    assert prompt_group(prompt(twin)) == prompt_group(prompt("What is a café?"))


def test_prompts_that_read_otherwise_are_other_groups() -> None:
    texts = ["What is a cafe?", "What is a café?", "What is a café", "What is acafé?", "", "hi", "3 > 2", "3 < 2"]
    assert len({prompt_group(prompt(text)) for text in texts}) == len(texts)


def test_cuts_of_a_dialogue_are_one_group_in_every_format() -> None:
    turns = f"{HUMAN}Hi there{ASSISTANT} Hello.{HUMAN}Bake bread?{ASSISTANT}"
    cuts = [
        prompt(f"{HUMAN}Hi there{ASSISTANT}"),
        prompt(turns),
        hh({"chosen": f"{turns} Yes.", "rejected": f"{turns} No."}).prompt,
        prompt_of({"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi  there"}]}),
        messages({"prompt": turns, "chosen": "Yes.", "rejected": "No."}).prompt,  # a dialogue as one message
    ]
    assert len({prompt_group(cut) for cut in cuts}) == 1
    assert [first_human_turn(cut).strip() for cut in cuts[:3]] == ["Hi there"] * 3


def test_a_dialogue_that_the_assistant_opens_has_the_group_of_its_first_human_turn() -> None:
    assert first_human_turn(prompt(f"{ASSISTANT} Welcome.{HUMAN}Thanks{ASSISTANT}")).strip() == "Thanks"
    alone = prompt_of({"prompt": [{"role": "system", "content": "Be kind."}]})
    assert first_human_turn(alone) == alone.text


@given(WORDS)
def test_a_text_is_normalised_once_and_for_all_its_twins(text: str) -> None:
    plain = normalised(text)
    assert normalised(plain) == plain
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normalised(unicodedata.normalize(form, text)) == plain
    assert normalised(f" \n{text}\u200b\t") == plain
    assert normalised(text.casefold()) == plain


@given(st.lists(WORDS, min_size=2, max_size=6), st.integers(1, 3))
def test_every_cut_of_a_dialogue_has_the_group_of_the_whole(said: list[str], kept: int) -> None:
    turns = [f"{(HUMAN, ASSISTANT + ' ')[number % 2]}{words}" for number, words in enumerate(said)]
    whole = "".join(turns[: len(turns) // 2 * 2 - 1]) + ASSISTANT
    cut = "".join(turns[: min(2 * kept - 1, len(turns) // 2 * 2 - 1)]) + ASSISTANT
    assert prompt_group(prompt(cut)) == prompt_group(prompt(whole))
