"""What monitor and verdict say about healthy and ruined runs, for every loss: the table of docs/reading-the-numbers.md.

A small Llama first learns a toy language, in which some words are kind and some are rude. Then DPO shall make it
kinder, with short responses and with long ones. A run is ruined by a learning rate a hundred times too high, by
swapped labels, by labels drawn at random, or by labels that follow length alone. Where the training labels are
swapped, the held-out labels are right: where both are swapped no number can tell.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_cli.config.composition import composed_run, parse_overrides
from dpo_cli.config.schema import run_config
from dpo_cli.console.reporter import Reporter
from dpo_cli.errors import DpoError
from dpo_cli.theory.losses import LOSSES
from dpo_cli.training.runner import train

WAYS = ("healthy", "lr x 100", "swapped", "shuffled", "length only")
LENGTHS = {"short": (6, 10), "long": (60, 100)}  # words of a response, the upper end excluded
BETA = {"sigmoid_norm": 2.0, "ipo": 1.0}  # losses of log-ratios a token
LR = 1e-3  # of a healthy run
TOPICS, NEUTRAL, KIND, RUDE = 8, 24, 6, 6
PAIRS, STEPS, BATCH = 350, 40, 16  # as many pairs are held out


def words_of(number: int, name: str) -> list[str]:
    """Made-up words."""
    return [f"{name}{index}" for index in range(number)]


@dataclass(frozen=True)
class Language:
    """Texts of the toy language, from a seed."""

    random: np.random.Generator

    def response(self, topic: int, length: int) -> list[str]:
        """Neutral words, half of them of the topic, with kind and rude ones between."""
        kindness = self.random.random()
        words = []
        for _ in range(length):
            if self.random.random() < 0.5:
                kind = self.random.random() < kindness
                words.append(f"{'kind' if kind else 'rude'}{self.random.integers(KIND if kind else RUDE)}")
            else:
                near = self.random.random() < 0.5
                words.append(f"word{topic * 3 + self.random.integers(3) if near else self.random.integers(NEUTRAL)}")
        return words

    def pair(self, length: tuple[int, int], way: str) -> dict[str, str]:
        """A prompt with a chosen and a rejected response; the kinder one is chosen nine times of ten."""
        topic = int(self.random.integers(TOPICS))
        first, second = (self.response(topic, int(self.random.integers(*length))) for _ in range(2))
        if way == "length only":
            chosen, rejected = sorted((first, second), key=len, reverse=True)
            rejected = rejected[: max(2, len(rejected) * 2 // 3)]
        else:
            shares = [sum(word.startswith("kind") for word in one) / len(one) for one in (first, second)]
            chosen, rejected = (first, second) if shares[0] >= shares[1] else (second, first)
            swapped = {"swapped": 0.9, "shuffled": 0.5}.get(way, 0.1)  # share of pairs
            if self.random.random() < swapped:
                chosen, rejected = rejected, chosen
        prompt = f"topic{topic} " + " ".join(f"word{self.random.integers(NEUTRAL)}" for _ in range(4))
        return {"prompt": prompt, "chosen": " " + " ".join(chosen), "rejected": " " + " ".join(rejected)}


def make_model(folder: Path, length: tuple[int, int]) -> None:
    """Train a small Llama on texts of the language and save it with its tokenizer."""
    torch.manual_seed(0)
    names = [*words_of(TOPICS, "topic"), *words_of(NEUTRAL, "word"), *words_of(KIND, "kind"), *words_of(RUDE, "rude")]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    language = Language(np.random.default_rng(1))
    for _ in range(200):
        rows = [language.pair(length, "shuffled") for _ in range(16)]
        ids = fast([row["prompt"] + row["chosen"] + " <eos>" for row in rows], padding=True, return_tensors="pt")
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        loss = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def write_pairs(folder: Path, length: str, way: str, seed: int) -> Path:
    """A file of pairs."""
    language, file = Language(np.random.default_rng(seed)), folder / f"{length}-{way}-{seed}.jsonl".replace(" ", "-")
    file.write_text("".join(json.dumps(language.pair(LENGTHS[length], way)) + "\n" for _ in range(PAIRS)))
    return file


@dataclass(frozen=True)
class Said:
    """What a run said: the alarms during training, the color of the verdict (or `stopped`), findings and summary."""

    alarms: list[str]
    color: str
    findings: list[str]
    summary: str


def told(folder: Path, loss: str, length: str, way: str, steps: int = STEPS) -> Said:
    """Train one run in `folder` and read what it said."""
    base = folder / f"model-{length}"
    if not base.is_dir():
        make_model(base, LENGTHS[length])
    data = write_pairs(folder, length, way, seed=2)
    held_out = write_pairs(folder, length, "healthy" if way == "swapped" else way, seed=3)
    run = folder / f"{loss}-{length}-{way}".replace(" ", "-")
    words = (
        "model=tiny", f"model.name_or_path={base}", "model.dtype=float32", "data=jsonl", f"data.train={data}",
        f"data.eval={held_out}", "data.template=plain", f"loss={loss}", f"beta={BETA.get(loss, 0.1)}",
        f"batch_size={BATCH}", f"max_steps={steps}", "epochs=9",
        f"optimizer.lr={LR * (100 if way == 'lr x 100' else 1)}", f"output_dir={run}",
    )  # fmt: skip
    reporter = Reporter(io.StringIO())
    color, findings, summary = "stopped", [], ""
    try:
        train(run_config(composed_run(parse_overrides(list(words))).container), reporter)
        verdict = json.loads((run / "manifest.json").read_text())["verdict"]
        color, findings = verdict["color"], [finding["name"] for finding in verdict["findings"]]
        summary = verdict["summary"]
    except DpoError as error:
        summary = str(error)
    finally:
        reporter.close()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Said([name for line in lines for name in line.get("alarms", {})], color, findings, summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--way", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--summaries", action="store_true", help="print each run's numbers, too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(f"| loss | responses | {' | '.join(options.way)} |")
        print("|---|---|" + "---|" * len(options.way))
        for loss in options.loss:
            for length in LENGTHS:
                cells = []
                for way in options.way:
                    said = told(Path(folder), loss, length, way)
                    cells.append(f"{said.color} {', '.join(dict.fromkeys([*said.findings, *said.alarms]))}".strip())
                    if options.summaries:
                        print(f"    {loss} {length} {way}: {said.summary}", file=sys.stderr, flush=True)
                print(f"| {loss} | {length} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
