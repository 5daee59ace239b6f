"""Make the sample preference data: two answers per prompt, both drawn from the reference model itself.

For every line of the prompts file the model answers the bare prompt (its own chat template, nothing added)
several times, by temperature and nucleus sampling. A fixed rule, with no judge and no editing, picks one
pair:

* An answer is *eligible* if the model ended it by itself and it is one paragraph of 8 to 50 words
  that begins and ends like a sentence; that takes up the prompt's own content words (one, or two if the
  prompt has more than three; inflections count), at least one of them in its first sentence; that adds
  three content words or more; that repeats no sentence, no run of four words and no word twice in a row;
  that holds one figure at most, no markup, and no "I"; and that does not open with a list number, a
  greeting, a refusal or a stock phrase.
* The *agreement* of an answer is the share of its added content words that another answer to the same
  prompt says too. An eligible answer with an agreement under MIN_AGREEMENT falls out.
* rejected = the longest answer of 25 to 160 words; one that ran into the token limit is first cut back to
  its last whole sentence.
* chosen = of the eligible answers at most half as long as the rejected one, the one with the highest
  agreement (rounded to tenths); of several, the one closest to 20 words.
* A prompt without such a pair is dropped.

So a *direct, complete, short* answer is preferred over a *rambling* one to the same prompt. The prompts
with the smallest seeded hashes are held out. A prompts line that starts with "- " was screened out: it is
still sampled, so that the other prompts of its batch get the same answers on a re-run, but it never gives a
pair. Batches are cut in file order and seeded by their number, so prompts added at the end leave the answers
of all full batches as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

MIN_WORDS, MAX_WORDS, AIM_WORDS = 8, 50, 20
REJECTED_MIN, REJECTED_MAX, REJECTED_RATIO = 25, 160, 2.0
MIN_AGREEMENT = 0.2
TEMPERATURE, TOP_K, TOP_P = 0.7, 100, 0.95
STOP = frozenset(
    re.findall(
        r"\w+",
        "a about after all also am an and answer any are as at be because been before being best between "
        "both brief briefly but by can could definition describe did difference different do does each "
        "every explain fact few find for from fun get give go good had has have he her his how i if in "
        "into is it its just kind know like line list long make makes many may me mean means might more "
        "most much my name no not of off often on one only or other our out over people poem quick "
        "quickly reason same say sentence she short should simple so some something suggest tell than "
        "that the their them then there these they thing things this those to too two under up us use "
        "used using very want was way we were what when where which while who whom whose why will with "
        "word words would write you your ",
    )
)
BAD_START = re.compile(
    r"(\d+[.)]|awesome|oh\b|aw\b|ah\b|well,|another|i'm|i am|i'd|i can\b|i cannot|i don't|i do not|i hope|"
    r"i think|i have|i would|i'll|as an?\b|sorry|unfortunately|hello|hi\b|hey|dear|sure|certainly|of course|"
    r"absolutely|great|thank|yes, i|no, i|here is|here's|here are|that.s a|what a|let.s|let me|you.re|"
    r"the answer|good (morning|evening|question))",
    re.IGNORECASE,
)
BAD_ANYWHERE = re.compile(
    r"[\n\[\]{}<>|*#_`@=]|https?:|www\.|[^\x00-\u024f\u2010-\u2026]|\b(?-i:I)\b|"
    r"\b(language model|ai assistant|smollm)\b",
    re.IGNORECASE,
)


def words_of(text: str) -> list[str]:
    """The words of a text: runs without white space that hold a letter or a digit."""
    return [word for word in text.split() if any(char.isalnum() for char in word)]


def stems_of(text: str) -> set[str]:
    """The content words of a text, each cut to its first five letters so that inflections meet."""
    found = re.findall(r"[a-z]+|\d+", text.lower().replace("'s", ""))
    return {word[:5].rstrip("s") for word in found if word not in STOP and (len(word) > 2 or word.isdigit())}


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, lower-cased and without end marks."""
    parts = re.split(r"[.!?]+[\"')]*(?:\s+|$)", text.lower())
    return [" ".join(part.split()) for part in parts if part.strip()]


def eligible(prompt: str, answer: str) -> str | None:
    """None if the answer may be chosen, else the name of the first test it fails."""
    count = len(words_of(answer))
    if not MIN_WORDS <= count <= MAX_WORDS:
        return "length"
    if not re.search(r"[.!][\"')]?$", answer) or not re.match(r"[\"'(]?[A-Z0-9]", answer):
        return "not a whole sentence"
    if BAD_START.match(answer) or BAD_ANYWHERE.search(answer):
        return "form"
    sentences = sentences_of(answer)
    if len(set(sentences)) < len(sentences):
        return "repeated sentence"
    words = [word.strip(".,;:!?\"'()").lower() for word in words_of(answer)]
    if len(words) - 3 > len({tuple(words[i : i + 4]) for i in range(len(words) - 3)}):
        return "repeated phrase"
    if any(left == right for left, right in pairwise(words)):
        return "repeated word"
    if len(re.findall(r"\d[\d.,:]*", answer)) > 1:
        return "figures"
    asked, said = stems_of(prompt), stems_of(answer)
    if len(asked & said) < (2 if len(asked) > 3 else 1) or not asked & stems_of(sentences[0]):
        return "off topic"
    if len(said - asked) < 3:
        return "echo"
    return None


def cut_back(text: str) -> str:
    """The text up to its last whole sentence; an empty string if it holds none."""
    ends = list(re.finditer(r"[.!?][\"')]*(?=\s|$)", text))
    return text[: ends[-1].end()] if ends else ""


def agreement(prompt: str, answer: str, others: list[str]) -> float:
    """Of the content words that an answer adds to the prompt, the share that another answer says too."""
    added = stems_of(answer) - stems_of(prompt)
    return len(added & set().union(*map(stems_of, others))) / max(1, len(added))


def pair_of(prompt: str, answers: list[dict[str, Any]]) -> tuple[str, str] | str:
    """The (chosen, rejected) pair of one prompt by the rule above, or the reason why there is none."""
    texts = sorted({answer["text"] for answer in answers})
    ended = {answer["text"] for answer in answers if answer["ended"]}
    good = [text for text in texts if text in ended and eligible(prompt, text) is None]
    if not good:
        return "no eligible answer"
    shares = {text: agreement(prompt, text, [other for other in texts if other != text]) for text in good}
    good = [text for text in good if shares[text] >= MIN_AGREEMENT]
    if not good:
        return "no agreement"
    whole = [text if text in ended else cut_back(text) for text in texts]
    rambling = [text for text in whole if REJECTED_MIN <= len(words_of(text)) <= REJECTED_MAX]
    rejected = max(rambling, key=lambda text: (len(words_of(text)), text), default="")
    good = [text for text in good if REJECTED_RATIO * len(words_of(text)) <= len(words_of(rejected))]
    if not good:
        return "no rambling answer"
    chosen = min(good, key=lambda text: (-round(shares[text], 1), abs(len(words_of(text)) - AIM_WORDS), text))
    return chosen, rejected


def read_prompts(path: Path) -> tuple[list[str], set[str]]:
    """All prompts in file order, and those of them that were screened out (lines that start with "- ")."""
    lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
    prompts = [line.removeprefix("- ") for line in lines]
    if len(set(prompts)) < len(prompts):
        raise SystemExit(f"{path}: a prompt stands there twice: {Counter(prompts).most_common(1)[0][0]}")
    return prompts, {line.removeprefix("- ") for line in lines if line.startswith("- ")}


class RoomyLayer(DynamicLayer):
    """A KV cache layer that grows in steps of 32 tokens, not by a full copy at every token."""

    room = 0
    keys: torch.Tensor
    values: torch.Tensor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **more: Any) -> tuple[Any, Any]:
        """Put the new states behind the old ones; return all of them."""
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if new > self.room:
            self.room = new + 32
            rows, heads, _, size = key_states.shape
            fresh = [key_states.new_empty(rows, heads, self.room, size) for _side in range(2)]
            if old:
                fresh[0][:, :, :old], fresh[1][:, :, :old] = self.keys, self.values
            else:
                self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = fresh
        self.all_keys[:, :, old:new], self.all_values[:, :, old:new] = key_states, value_states
        self.keys, self.values = self.all_keys[:, :, :new], self.all_values[:, :, :new]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        self.room = 0


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One sampled token per row: temperature, then top-k, then the nucleus of the k best."""
    best, index = logits.topk(TOP_K, dim=-1)
    best = torch.softmax(best.float() / TEMPERATURE, dim=-1)
    best[best.cumsum(-1) - best > TOP_P] = 0.0
    return index.gather(-1, torch.multinomial(best, 1, generator=generator))[:, 0]


@torch.inference_mode()
def sample_batch(
    model: Any, tokenizer: Any, prompts: list[str], samples: int, limit: int, seed: int
) -> list[dict[str, Any]]:
    """Sample every prompt several times in one left-padded batch; rows that have ended leave the KV cache."""
    generator = torch.Generator().manual_seed(seed)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in prompts
        for _ in range(samples)
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    rows = torch.arange(len(texts))  # which text each live row belongs to
    made: list[list[int]] = [[] for _ in texts]
    alive = torch.ones(len(texts), dtype=torch.bool)
    for step in range(limit):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        tokens = draw(out.logits[:, -1], generator)
        for row, token, live in zip(rows.tolist(), tokens.tolist(), alive.tolist(), strict=True):
            if live:
                made[row].append(token)
        alive &= tokens != tokenizer.eos_token_id
        if not alive.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if step % 8 == 7 and not alive.all():
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            tokens, mask, rows, alive = tokens[keep], mask[keep], rows[keep], alive[keep]
        tokens = tokens[:, None]
    answers = [
        {
            "text": tokenizer.decode(ids, skip_special_tokens=True).strip(),
            "ended": ids[-1] == tokenizer.eos_token_id,
        }
        for ids in made
    ]
    return [{"prompt": p, "answers": answers[i * samples : (i + 1) * samples]} for i, p in enumerate(prompts)]


def sample_all(args: argparse.Namespace, prompts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """All raw answers: what the --raw file holds already, then the batches it lacks, sampled and appended."""
    raw: dict[str, list[dict[str, Any]]] = {}
    if args.raw.exists():
        for line in args.raw.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            record = json.loads(line)
            raw[record["prompt"]] = record["answers"]
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    missing = [(number, batch) for number, batch in enumerate(batches) if any(p not in raw for p in batch)]
    if not missing or args.no_sampling:
        return raw
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    for number, batch in missing:
        seed = int(hashlib.sha256(f"{args.seed}:{number}".encode()).hexdigest()[:12], 16)
        records = sample_batch(model, tokenizer, batch, args.samples, args.max_new_tokens, seed)
        with args.raw.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        raw.update((record["prompt"], record["answers"]) for record in records)
        print(f"batch {number + 1} of {len(batches)} sampled", flush=True)
    return raw


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines and print their number and mean lengths."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    chosen, rejected = (
        sum(len(words_of(row[key])) for row in rows) / max(1, len(rows)) for key in ("chosen", "rejected")
    )
    print(f"{path.name}: {len(rows)} pairs, mean words {chosen:.1f} chosen, {rejected:.1f} rejected")


def main() -> None:
    """Sample, label, split and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of the reference model")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).with_name("sample_prompts.txt"))
    parser.add_argument("--raw", type=Path, default=Path("sample_raw.jsonl"), help="cache of the raw answers")
    parser.add_argument("--samples", type=int, default=6, help="answers drawn per prompt")
    parser.add_argument("--batch", type=int, default=24, help="prompts per batch")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=100, help="pairs in test.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-sampling", action="store_true", help="only apply the rule to the --raw file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    prompts, screened = read_prompts(args.prompts)
    raw = sample_all(args, prompts)
    reasons: Counter[str] = Counter()
    rows: list[dict[str, str]] = []
    for prompt in prompts:
        if prompt in screened or prompt not in raw:
            reasons["screened out" if prompt in screened else "not sampled"] += 1
        elif isinstance(pair := pair_of(prompt, raw[prompt]), str):
            reasons[pair] += 1
        else:
            rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    print(f"{len(prompts)} prompts, {len(rows)} pairs; without a pair: {dict(reasons)}")
    rows.sort(key=lambda row: hashlib.sha256(f"{args.seed}:{row['prompt']}".encode()).hexdigest())
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "test.jsonl", rows[: args.held_out])
    write_rows(args.out / "train.jsonl", rows[args.held_out :])


if __name__ == "__main__":
    main()
