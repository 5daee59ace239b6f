"""Published forms of preference data: whether each is read, with the label that its rows have.

    python scripts/forms.py

Of each form two rows are read as `dpo-train` reads them: in the first the text "a" is preferred, in the second "b".
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_cli.config.composition import composed_run, parse_overrides
from dpo_cli.config.schema import run_config
from dpo_cli.data.pairs import load_pairs
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import DpoError

Row = dict[str, Any]
CHAT = (
    "{% if tools %}<|tools|>{{ tools | tojson }}</s>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<|call|>{{ call.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Form:
    """A form of rows, as somebody publishes them."""

    name: str
    data: str  # the words that read it
    row: Callable[[int], Row]  # a row in which "a" is preferred to "b" (0), or "b" to "a" (1)
    unused: tuple[str, ...] = ()  # columns of such a row that nothing reads
    refused: str = ""  # what is said of a form that cannot be trained on


@dataclass(frozen=True)
class Result:
    """What became of a form's two rows."""

    loads: bool
    is_right: bool  # both labels
    unused: tuple[str, ...]
    problem: str = ""


def say(*contents: str) -> list[Row]:
    """user, assistant, user, ... messages."""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]


def answer(text: str) -> Row:
    """An assistant's message."""
    return {"role": "assistant", "content": text}


def said(speaker: str, text: str) -> Row:
    """A turn in ShareGPT's form."""
    return {"from": speaker, "value": text}


def sides(better: int, wrap: Callable[[str], Any] = str, chosen: str = "chosen", rejected: str = "rejected") -> Row:
    """The preferred text under one name, the other under another."""
    return {chosen: wrap("ab"[better]), rejected: wrap("ba"[better])}


def conversation(text: str) -> list[Row]:
    """A question with its answer."""
    return say("q", text)


def dialogue(text: str) -> str:
    """The same in HH form."""
    return f"\n\nHuman: q\n\nAssistant: {text}"


def completions(better: int) -> list[Row]:
    """UltraFeedback's, with scores of GPT-4."""
    return [
        {"model": model, "response": text, "overall_score": score, "critique": "c"}
        for model, text, score in (("x", "a", 8.5 - better), ("y", "b", 8.0))
    ]


def comparison(better: int) -> Row:
    """A row of summarize_from_feedback."""
    info = {"id": "1", "post": "q", "title": None, "article": None}
    return {"info": info, "summaries": [{"text": "a", "policy": "x"}, {"text": "b", "policy": "y"}], "choice": better}


def webgpt(better: int) -> Row:
    """A row of WebGPT comparisons."""
    question = {"dataset": "eli5", "id": "1", "full_text": "q"}
    return {"question": question, "answer_0": "a", "score_0": -better, "answer_1": "b", "score_1": better - 1}


def arena(better: int) -> Row:
    """A row of chatbot_arena_conversations."""
    of_models = {"conversation_a": conversation("a"), "conversation_b": conversation("b")}
    return {"question_id": "1", "winner": f"model_{'ab'[better]}", **of_models, "language": "English"}


TOOL = {"type": "function", "function": {"name": "warmth", "description": "d", "parameters": {"type": "object"}}}
CALL = {"name": "warmth", "arguments": {"city": "Bern"}}


def called(text: str) -> list[Row]:
    """A response that calls a tool, reads the result and answers."""
    call = {"id": "1", "type": "function", "function": CALL}
    return [{"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "warmth", "content": "12 degrees"}, answer(text)]  # fmt: skip


def with_calls(better: int) -> Row:
    """LLaMA-Factory's conversation with a call."""
    turns = [said("human", "q"), said("function_call", json.dumps(CALL)), said("observation", "12 degrees")]
    return {"conversations": turns, "tools": json.dumps([TOOL]), **sides(better, lambda text: said("gpt", text))}


def ms_swift(better: int) -> Row:
    """A row of ms-swift."""
    return {"messages": conversation("ab"[better]), "rejected_response": "ba"[better]}


FORMS = (
    Form("Anthropic HH", "data=hh", lambda better: sides(better, dialogue)),
    Form("TRL, standard", "data=jsonl", lambda better: {"prompt": "q", **sides(better)}),
    Form(
        "TRL, standard, implicit prompt", "data=jsonl", lambda better: sides(better, "q {}".format),
        refused="no 'prompt' key. A row needs prompt, chosen and rejected; it has chosen, rejected",
    ),
    Form("TRL, conversational", "data=jsonl",
         lambda better: {"prompt": say("q"), **sides(better, lambda text: [answer(text)])}),
    Form("TRL, conversational, implicit prompt", "data=jsonl", lambda better: sides(better, conversation)),
    Form("TRL, conversational, with tools", "data=jsonl",
         lambda better: {"prompt": say("q"), **sides(better, called), "tools": [TOOL]}),
    Form(
        "TRL, unpaired (KTO)", "data=jsonl",
        lambda better: {"prompt": "q", "completion": "ab"[better], "label": True},
        refused="rows of one completion with a label are for KTO, which dpo-cli does not train",
    ),
    Form(
        "UltraFeedback, binarized (H4)", "data=ultrafeedback",
        lambda better: {"prompt": "q", "prompt_id": "1", **sides(better, conversation), "messages": conversation("a"),
                        "score_chosen": 8.5, "score_rejected": 3.0},
        ("prompt_id", "messages"),
    ),
    Form("UltraFeedback, binarized (TRL)", "data=trl",
         lambda better: {**sides(better, conversation), "score_chosen": 9.0, "score_rejected": 5.0}),
    Form(
        "UltraFeedback, as collected", "data=ultrafeedback_raw",
        lambda better: {"source": "s", "instruction": "q", "models": ["x", "y"], "completions": completions(better)},
        ("models", "completions.model", "completions.critique"),
    ),
    Form("Orca DPO pairs", "data=orca", lambda better: {"system": "s", "question": "q", **sides(better)}),
    Form("Truthy DPO", "data=truthy",
         lambda better: {"id": "1", "source": "s", "system": "s", "prompt": "q", **sides(better)}, ("id",)),
    Form(
        "HelpSteer2-Preference", "data=helpsteer2",
        lambda better: {"split": "train", "prompt": "q", "response_1": "a", "response_2": "b",
                        "preference_strength": (-2, 1)[better]},
        ("split",),
    ),
    Form(
        "HelpSteer3-Preference", "data=helpsteer3",
        lambda better: {"domain": "code", "language": "python", "context": say("q", "earlier", "q2"), "response1": "a",
                        "response2": "b", "overall_preference": (-3, 2)[better]},
        ("language",),
    ),
    Form(
        "Stanford Human Preferences", "data=shp",
        lambda better: {"post_id": "1", "history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1 - better},
        ("post_id",),
    ),
    Form(
        "PKU-SafeRLHF", "data=pku_saferlhf",
        lambda better: {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": better,
                        "safer_response_id": 0},
        ("safer_response_id",),
    ),
    Form(
        "Nectar", "data=nectar",
        lambda better: {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [
                {"answer": "a", "model": "x", "rank": 1.5 + better},
                {"answer": "b", "model": "y", "rank": 2.0},
            ],
            "source": ["s"],
        },
        ("answers.model",),
    ),
    Form("WebGPT comparisons", "data=webgpt", webgpt, ("question.id",)),
    Form("Summarize from feedback", "data=summarize", comparison, ("info.id", "summaries.policy")),
    Form("Stack Exchange, paired", "data=stack_exchange",
         lambda better: {"qid": 1, "question": "q", **sides(better, str, "response_j", "response_k")}, ("qid",)),
    Form("Chatbot Arena", "data=arena", arena, ("question_id", "language")),
    Form("Tulu 3 preference mixture", "data=tulu3",
         lambda better: {"id": "1", "source": "s", "prompt": "q", **sides(better, conversation)}, ("id",)),
    Form("Skywork reward preference", "data=skywork", lambda better: {**sides(better, conversation), "source": "s"}),
    Form(
        "Capybara (distilabel)", "data=capybara",
        lambda better: {"source": "s", "prompt": "q2", "rating_chosen": 5, "rating_rejected": 4,
                        **sides(better, lambda text: say("q", "earlier", "q2", text))},
        ("prompt",),
    ),
    Form("LLaMA-Factory, Alpaca", "data=alpaca", lambda better: {"instruction": "q", "input": "", **sides(better)}),
    Form(
        "LLaMA-Factory, Alpaca with history and system", "data=alpaca",
        lambda better: {"instruction": "q", "system": "s", "history": [["first", "reply"]], "input": "i",
                        **sides(better)},
    ),
    Form(
        "LLaMA-Factory, ShareGPT", "data=sharegpt",
        lambda better: {"conversations": [said("human", "q")], "system": "s",
                        **sides(better, lambda text: said("gpt", text))},
    ),
    Form("LLaMA-Factory, ShareGPT with tools", "data=sharegpt", with_calls),
    Form("ms-swift", "data=ms_swift", ms_swift),
    Form("axolotl, chat_template.default", "data=axolotl",
         lambda better: {"messages": [{"role": "system", "content": "s"}, *say("q")], **sides(better, answer)}),
    Form(
        "OpenAI preference fine-tuning", "data=openai",
        lambda better: {
            "input": {"messages": say("q"), "tools": [TOOL], "parallel_tool_calls": True},
            **sides(better, lambda text: [answer(text)], "preferred_output", "non_preferred_output"),
        },
        ("input.parallel_tool_calls",),
    ),
    Form("When2Call", "data=when2call",
         lambda better: {"tools": [json.dumps(TOOL["function"])], "messages": say("q"),
                         **sides(better, answer, "chosen_response", "rejected_response")}),
    Form("ranked", "data=jsonl",
         lambda better: {"prompt": "q", "responses": ["a", "b"], "scores": [1 - better, better]}),
    Form(
        "dpo-label", "data=jsonl",
        lambda better: {"prompt": "q", **sides(better), "probability": 0.8, "by": "rule", "judge": "shorter"},
        ("by", "judge"),
    ),
)  # fmt: skip


@cache
def tokenizer() -> Any:
    """Bytes as tokens, with a chat template."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = Tokenizer(models.BPE({token: number for number, token in enumerate(["</s>", *sorted(alphabet)])}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", chat_template=CHAT)


def read(form: Form) -> Result:
    """Read two rows of a form whose preferences are each other's swap."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(form.row(better)) + "\n" for better in (0, 1)), encoding="utf-8")
        words = [form.data, f"data.train={file}", "data.eval_fraction=0", "data.on_bad_row=error"]
        config = run_config(composed_run(parse_overrides(words)).container).data
        try:
            found = load_pairs(config, PairEncoder(tokenizer(), "chat"), 0)
        except DpoError as error:
            return Result(False, False, (), str(error).removeprefix(folder).removeprefix("/"))
    labels = [(text.pair.chosen.split()[-1], text.pair.rejected.split()[-1]) for text in found.train_texts]
    return Result(True, labels == [("a", "b"), ("b", "a")], tuple(found.train_report.not_used))


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    lines = [("form", "read with", "loads", "label", "not used")]
    for form in FORMS:
        result = read(form)
        loads = "yes" if result.loads else "no"
        label = "right" if result.is_right else "-" if not result.loads else "WRONG"
        lines.append((form.name, form.data, loads, label, ", ".join(result.unused) or result.problem))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[4]]).rstrip())


if __name__ == "__main__":
    main()
