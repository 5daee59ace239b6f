"""Speed and memory of data, side by side in one run: ours, and TRL's own preparation where a Python has trl.

    python scripts/bench_data.py [--trl PYTHON] [--pairs 20000] [--repeats 3] [--sizes 10000,1000000]

Pairs are generated: messages of 8 to 60 words. Table `prepare`: from JSON lines to tokens that can be trained on, with
empty caches; the ways take turns, each in a process of its own, and each figure is the median over the repeats. Table
`start`: seconds and the largest resident memory of `dpo-train max_steps=1` on the tiny model with SmolLM2's tokenizer,
when tokens are made and when they are there. Nothing else should run beside it.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OFTEN = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an"


def generate(path: Path, pairs: int, words: int = 60) -> Path:
    """A file of so many pairs, of at most so many words a response, the same every time."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    often = OFTEN.split()
    seldom = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(5000)]

    def text(low: int, high: int) -> str:
        words = (draw.choice(often if draw.random() < 0.6 else seldom) for _ in range(draw.randint(low, high)))
        return " ".join(words).capitalize() + "."

    if not path.exists():
        with path.open("w", encoding="utf-8") as file:
            for number in range(pairs):
                few = min(8, words)
                sides = {"prompt": ("user", f"{text(few, words)} {number}"), "chosen": ("assistant", text(few, words)),
                         "rejected": ("assistant", text(few, words))}  # fmt: skip
                row = {name: [{"role": role, "content": said}] for name, (role, said) in sides.items()}
                file.write(json.dumps(row) + "\n")
    return path


def in_process(script: list[str], cache: Path) -> dict[str, Any]:
    """The result that a process prints, with its seconds and largest resident memory, its children included."""
    began = time.perf_counter()
    environment = {**os.environ, "DPO_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err[-2000:] + out[-2000:])
    found = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return {"wall": time.perf_counter() - began, **(json.loads(found[-1][7:]) if found else {})}


def models(cache: Path) -> tuple[str, str]:
    """The tiny model with SmolLM2's tokenizer and vocabulary, and SmolLM2's tokenizer: folders in the cache."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    from dpo_cli.models.builtin import SMOLLM2, TINY, resolve_builtin

    smollm2, tiny = (resolve_builtin(name, print)[0] for name in (SMOLLM2, TINY))
    folder = cache / "tiny-smollm2"
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        config = AutoConfig.from_pretrained(tiny)
        config.vocab_size = len(tokenizer)
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder), smollm2


def ours(rows: str, tokenizer: str, processes: str) -> None:
    """In a process of its own: make tokens of the rows."""
    from transformers import AutoTokenizer

    from dpo_cli.config.composition import composed, parse_overrides
    from dpo_cli.config.schema import RunConfig, run_config
    from dpo_cli.data.pairs import load_pairs
    from dpo_cli.data.tokens import PairEncoder

    words = ["data=jsonl", f"data.train={rows}", "data.eval_fraction=0", f"data.processes={processes}"]
    config = run_config(composed("train", parse_overrides(words), RunConfig).container).data
    encoder = PairEncoder.of(AutoTokenizer.from_pretrained(tokenizer), config)
    began = time.perf_counter()
    data = load_pairs(config, encoder, 0)
    print("RESULT", json.dumps({"seconds": time.perf_counter() - began, "pairs": len(data.train)}))


def started(words: list[str]) -> None:
    """In a process of its own: `dpo-train`, and when its first step was logged."""
    from dpo_cli import cli
    from dpo_cli.training.records import Recorder

    began, original = time.perf_counter(), Recorder.log_start
    seen: dict[str, float] = {}

    def log_start(recorder: Recorder, *rest: Any) -> None:
        seen["seconds"] = time.perf_counter() - began
        original(recorder, *rest)

    Recorder.log_start = log_start  # type: ignore[method-assign, assignment]
    sys.argv = ["dpo-train", *words]
    try:
        cli.train()
    except SystemExit as ended:
        if ended.code:
            raise
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print("RESULT", json.dumps({**seen, "MiB": largest}))


def table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    print(f"\n{title}")
    for row in [headings, *rows]:
        first, *others = (cell.ljust(width) if n == 0 else cell.rjust(width)
                          for n, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        print("  ".join([first, *others]), flush=True)


def compare_preparation(folder: Path, options: argparse.Namespace, tiny: str, smollm2: str) -> None:
    """Table `prepare`."""
    rows = str(generate(folder / f"pairs-{options.pairs}.jsonl", options.pairs))
    own = [sys.executable, __file__, "--ours", rows, smollm2]
    ways: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ours, 1 process": lambda cache: in_process([*own, "1"], cache),
        "ours, one for each core": lambda cache: in_process([*own, "auto"], cache),
    }
    if options.trl:
        script = str(Path(__file__).with_name("bench_data_trl.py"))
        for name, processes in (("its default", None), ("2 processes", 2)):
            facts = json.dumps({"model": tiny, "tokenizer": smollm2, "rows": rows, "processes": processes})
            ways[f"TRL, {name}"] = lambda cache, facts=facts: in_process([options.trl, script, facts], cache)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as cache:
                found = way(Path(cache))
            assert found["pairs"] == options.pairs
            seconds[name].append(found["seconds"])
    best = statistics.median(seconds["ours, one for each core"])
    lines = []
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        lines.append([name, f"{middle:.1f}", spread, f"{options.pairs / middle:,.0f}", f"{middle / best:.1f}"])
    headings = ["", "s", "spread", "pairs/s", "times ours"]
    table(f"prepare: {options.pairs:,} pairs, JSON lines to tokens, empty caches", headings, lines)


def compare_starts(folder: Path, options: argparse.Namespace, tiny: str) -> None:
    """Table `start`."""
    lines = []
    for size in map(int, options.sizes.split(",")):
        rows = generate(folder / f"start-{size}.jsonl", size, options.words)
        cache = folder / f"cache-{size}"
        shutil.rmtree(cache, ignore_errors=True)
        for what in ("made", "there", "there"):
            words = [
                f"model.name_or_path={tiny}", "data=jsonl", f"data.train={rows}", "data.eval_fraction=0", "max_steps=1",
                "batch_size=8", "micro_batch_size=8", f"output_dir={tempfile.mkdtemp(dir=folder)}/run",
            ]  # fmt: skip
            found = in_process([sys.executable, __file__, "--started", *words], cache)
            kept = sum(file.stat().st_size for file in cache.rglob("*.arrow"))
            numbers = [f"{found['seconds']:.1f}", f"{found['MiB']:,.0f}"]
            lines.append([f"{size:,} pairs, tokens {what}", *numbers, f"{kept / 2**20:,.0f}"])
        if not options.keep:
            rows.unlink()
            shutil.rmtree(cache)
    headings = ["", "s to the first step", "MiB", "MiB on disk"]
    table("start: dpo-train max_steps=1, tiny model, SmolLM2's tokenizer", headings, lines)


def main() -> None:
    """Parse the words, and print the tables that they ask for."""
    if sys.argv[1:2] == ["--ours"]:
        ours(*sys.argv[2:5])
        return
    if sys.argv[1:2] == ["--started"]:
        started(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="a Python that has trl")
    parser.add_argument("--pairs", type=int, default=20_000, help="of table prepare")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default="10000,1000000", help="of table start")
    parser.add_argument("--words", type=int, default=60, help="of a response at most, in table start")
    parser.add_argument("--folder", type=Path, help="where generated files lie; they are kept there")
    parser.add_argument("--tables", default="prepare,start")
    options = parser.parse_args()
    options.keep = options.folder is not None
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-data-"))
    folder.mkdir(parents=True, exist_ok=True)
    tiny, smollm2 = models(folder)
    if "prepare" in options.tables:
        compare_preparation(folder, options, tiny, smollm2)
    if "start" in options.tables:
        compare_starts(folder, options, tiny)
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
