"""Token ids: the border between prompt and response, BOS, the closing EOS, truncation."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from chat_templates import FORMS as CHAT_FORMS
from chat_templates import chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.formats import FinishReason, PreferencePair, standard
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.data.truncation import Encoded, Truncation, truncate
from dpo_cli.errors import CheckpointError, ConfigError


def pair(prompt: str = "Say something nice.", chosen: str = "Nice.", rejected: str = "No.") -> PreferencePair:
    return standard({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def merging_tokenizer(**special: Any) -> Any:
    """A word-piece tokenizer that merges `:` + `a` into one token, so that a border can fall inside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["</s>", "<s>", *alphabet, ":a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>", **special})


def test_plain_text_is_prompt_then_response_then_eos(tiny_tokenizer: Any) -> None:
    encoder = PairEncoder(tiny_tokenizer, "plain")
    encoded = encoder.encode([pair("a b", " c", " d")])[0]
    decode = tiny_tokenizer.decode
    assert decode(encoded.prompt) == "a b"
    assert decode(encoded.chosen) == " c<|im_end|>"
    assert decode(encoded.rejected) == " d<|im_end|>"


def test_the_chat_template_renders_the_prompt_open_for_an_answer(tiny_tokenizer: Any) -> None:
    encoder = PairEncoder(tiny_tokenizer, None)
    encoded = encoder.encode([pair("Say something nice.", "Nice.")])[0]
    assert encoder.kind == "chat"
    assert tiny_tokenizer.decode(encoded.prompt) == (
        "<|im_start|>user\nSay something nice.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tiny_tokenizer.decode(encoded.chosen) == "Nice.<|im_end|>"


def test_prompt_and_response_are_what_the_whole_conversation_renders_to(tiny_tokenizer: Any) -> None:
    encoded = PairEncoder(tiny_tokenizer, "chat").encode([pair()])[0]
    turns = [{"role": "user", "content": "Say something nice."}, {"role": "assistant", "content": "Nice."}]
    whole = tiny_tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == tiny_tokenizer.decode(encoded.prompt + encoded.chosen) + "\n"


def test_what_closes_a_response_comes_from_the_template_not_from_the_eos_token(tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"  # as in base tokenizers of chat models: the turn ends with another token
    assert PairEncoder(tokenizer, "chat").closing == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert PairEncoder(tokenizer, "plain").closing == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_a_token_never_straddles_the_border() -> None:
    tokenizer = merging_tokenizer()
    encoder = PairEncoder(tokenizer, "plain")
    encoded = encoder.encode([pair("say:", "ab", "cd")])[0]
    # "say:" + "ab" on its own merges ":a"; the model is asked with "say:", so it must answer "a", "b".
    assert tokenizer("say:ab").input_ids[3] == tokenizer.convert_tokens_to_ids(":a")
    assert [tokenizer.decode([token]) for token in encoded.chosen] == ["a", "b", "</s>"]
    assert tokenizer.decode(encoded.prompt) == "say:"
    assert encoder.borders_merged == 1


def test_one_bos_where_the_tokenizer_adds_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = merging_tokenizer(bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    encoded = PairEncoder(tokenizer, "plain").encode([pair("say it ", "ab", "cd")])[0]
    assert tokenizer.decode(encoded.prompt + encoded.chosen) == "<s>say it ab</s>"
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = PairEncoder(tokenizer, "chat").encode([pair("say it ", "ab", "cd")])[0]
    assert tokenizer.decode(chat.prompt) == "<s>say it "


def test_a_response_that_brings_its_own_eos_is_closed_once(tiny_tokenizer: Any) -> None:
    encoder = PairEncoder(tiny_tokenizer, "plain")
    with_eos, without = encoder.encode([pair("p", "yes<|im_end|>"), pair("p", "yes")])
    assert with_eos.chosen == without.chosen


def test_a_response_of_finish_reason_length_stays_open_but_for_a_reward_model(tiny_tokenizer: Any) -> None:
    cut = replace(pair("p", "yes", "no"), chosen_finish_reason=FinishReason.LENGTH)
    encoder = PairEncoder(tiny_tokenizer, "plain")
    encoded = encoder.encode([cut])[0]
    assert [tiny_tokenizer.decode(ids) for ids in (encoded.chosen, encoded.rejected)] == ["yes", "no<|im_end|>"]
    assert encoder.length_limited == 1
    closing = PairEncoder(tiny_tokenizer, "plain", always_closes=True)
    assert tiny_tokenizer.decode(closing.encode([cut])[0].chosen) == "yes<|im_end|>"
    assert closing.length_limited == 1
    # A response needs one token at least: where the text is nothing but the closing token, it stays.
    nothing = replace(pair("p", "<|im_end|>", "no"), chosen_finish_reason=FinishReason.LENGTH)
    assert tiny_tokenizer.decode(encoder.encode([nothing])[0].chosen) == "<|im_end|>"


def test_an_empty_prompt_still_has_a_token_to_predict_from(tiny_tokenizer: Any) -> None:
    encoded = PairEncoder(tiny_tokenizer, "plain").encode([pair("", "yes", "no")])[0]
    assert len(encoded.prompt) == 1


def test_a_tokenizer_without_eos_is_refused(tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="the tokenizer has no EOS token"):
        PairEncoder(tokenizer, "plain")


def test_chat_without_a_template_is_refused_and_plain_is_the_default_then() -> None:
    with pytest.raises(ConfigError, match=r"data\.template=chat: this model has no chat template"):
        PairEncoder(merging_tokenizer(), "chat")
    assert PairEncoder(merging_tokenizer(), None).kind == "plain"


def cut(prompt: int, chosen: int, rejected: int, max_length: int, max_prompt: int | None = None) -> Any:
    """The lengths after truncation, and what was counted."""
    tally = Truncation()
    encoded = Encoded(list(range(prompt)), list(range(chosen)), list(range(rejected)))
    short = truncate(encoded, max_length, max_prompt, tally)
    if short is None:
        return None
    # The prompt loses its oldest tokens, a response its last.
    assert short.prompt == encoded.prompt[len(encoded.prompt) - len(short.prompt) :]
    assert short.chosen == encoded.chosen[: len(short.chosen)]
    return len(short.prompt), len(short.chosen), len(short.rejected), tally.prompts_cut, tally.responses_cut


def test_a_pair_that_fits_is_left_alone() -> None:
    assert cut(6, 4, 3, max_length=10) == (6, 4, 3, 0, 0)


def test_the_prompt_loses_its_oldest_part_before_a_response_loses_anything() -> None:
    assert cut(8, 4, 3, max_length=10) == (6, 4, 3, 1, 0)


def test_a_response_is_cut_only_when_the_prompt_is_down_to_half_and_it_is_counted() -> None:
    assert cut(8, 9, 3, max_length=10) == (5, 5, 3, 1, 1)
    assert cut(2, 12, 11, max_length=10) == (2, 8, 8, 0, 2)


def test_a_prompt_that_fills_max_length_is_refused_unless_it_has_a_limit_of_its_own() -> None:
    assert cut(10, 4, 3, max_length=10) is None
    assert cut(10, 4, 3, max_length=10, max_prompt=5) == (5, 4, 3, 1, 0)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(2, 30))
def test_truncation_keeps_every_promise(prompt: int, chosen: int, rejected: int, max_length: int) -> None:
    short = cut(prompt, chosen, rejected, max_length)
    if short is None:
        assert prompt >= max_length
        return
    kept_prompt, kept_chosen, kept_rejected, _, responses_cut = short
    assert kept_prompt >= 1 and kept_chosen >= 1 and kept_rejected >= 1
    assert kept_prompt + max(kept_chosen, kept_rejected) <= max_length
    if responses_cut:
        assert kept_prompt == min(prompt, max_length // 2)


# Encoding from the last special token on, by the tokenizer's own backend


def sentence_piece_tokenizer(scheme: str) -> Any:
    """A tokenizer that puts its mark for a space before words as SentencePiece does, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({chr(code) for code in range(33, 127)} | set("▁\nüß"))
    merges = [("▁", letter) for letter in "abcdeYN"]
    tokens = ["<unk>", "<s>", "</s>", *letters, *("".join(merge) for merge in merges)]
    model = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        additional_special_tokens=["[INST]", "[/INST]"])  # fmt: skip
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + "
        "' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def by_the_whole(encoder: PairEncoder) -> PairEncoder:
    """An encoder that encodes each prompt with each response, by the tokenizer itself."""
    other = PairEncoder(encoder.tokenizer, encoder.kind, encoder.always_closes)
    other.backend = None
    return other


PIECES = [*"abc YN\n:<|>[]/", "<|im_end|>", "</s>", "[INST]", "ü", "\u2581"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.mark.parametrize("form", [*CHAT_FORMS, "always", "first", "never"])
@given(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS)
def test_a_response_has_the_same_ids_behind_the_end_of_its_prompt(
    form: str, prompt: str, chosen: str, rejected: str
) -> None:
    encoder = fast_encoder(form)
    one = pair(prompt or "x", chosen, rejected)
    whole = by_the_whole(encoder)
    assert encoder.backend is not None
    assert encoder.encode([one, one]) == whole.encode([one, one])
    assert encoder.borders_merged == whole.borders_merged
    encoder.borders_merged = 0


@cache
def fast_encoder(form: str) -> PairEncoder:
    """The encoder of a form, its prompts as messages."""
    tokenizer = chat_tokenizer(form) if form in CHAT_FORMS else sentence_piece_tokenizer(form)
    return PairEncoder(tokenizer, "chat")


def test_most_of_a_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PairEncoder(chat_tokenizer("chatml"), "chat")
    seen: list[str] = []
    encode = PairEncoder._encode_many

    def noted(self: PairEncoder, texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(PairEncoder, "_encode_many", noted)
    encoder.encode([pair("a word that is long", "Yes", "No")] * 2)
    assert sum("a word that is long" in text for text in seen) == 2
    assert "<|im_start|>assistant\nYes" in seen


def test_a_tokenizer_whose_backend_encodes_otherwise_is_asked_itself() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.split_special_tokens = True
    assert PairEncoder(tokenizer, "chat").backend is None
