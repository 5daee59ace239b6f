"""Answers a second: this program's drawing against `generate` on one prompt at a time, and on batches, in one run.

The three take turns on the same prompts and the median of the rounds counts, so that what else the machine does falls
on all alike. Every way draws at temperature 1 from the same model, at most `max_new_tokens` an answer.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import SampleConfig, config_of
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.prompts import read_prompts
from dpo_cli.generation.decoding import Decoding, Draw, draw_answers, end_tokens
from dpo_cli.generation.generate import batches_of
from dpo_cli.generation.sampler import Sampler, load_sampler

Layout = Callable[[Sampler, list[list[int]], Decoding], int]


def ours(sampler: Sampler, prompts: list[list[int]], decoding: Decoding) -> int:
    """As dpo-sample draws; returns the tokens drawn."""
    ends, tokens = end_tokens(sampler.model, sampler.encoder.closing), 0
    for batch in batches_of(sampler.model, prompts, 2, decoding, sampler.device, None):
        draws = [Draw(prompts[place], number=number) for place in batch for number in range(2)]
        answers = draw_answers(sampler.model, draws, decoding, ends, sampler.device)
        tokens += sum(len(answer.tokens) for answer in answers)
    return tokens


def one_at_a_time(sampler: Sampler, prompts: list[list[int]], decoding: Decoding) -> int:
    """transformers' generate, a prompt at a time, two answers each."""
    return sum(_generate(sampler, [prompt], decoding) for prompt in prompts)


def in_batches(sampler: Sampler, prompts: list[list[int]], decoding: Decoding) -> int:
    """transformers' generate on the same batches as ours, padded on the left."""
    batches = batches_of(sampler.model, prompts, 2, decoding, sampler.device, None)
    return sum(_generate(sampler, [prompts[place] for place in batch], decoding) for batch in batches)


def _generate(sampler: Sampler, prompts: list[list[int]], decoding: Decoding) -> int:
    closing, width = sampler.encoder.closing, max(map(len, prompts))
    padded = torch.tensor([[closing] * (width - len(ids)) + ids for ids in prompts], device=sampler.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=sampler.device)
    dials: dict[str, Any] = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    ends = end_tokens(sampler.model, closing)
    with torch.no_grad():
        output = sampler.model.generate(
            input_ids=padded, attention_mask=mask, num_return_sequences=2, max_new_tokens=decoding.max_new_tokens,
            eos_token_id=sorted(ends), pad_token_id=closing, **dials,
        )  # fmt: skip
    rows = output[:, width:].tolist()
    return sum(next((place for place, token in enumerate(row) if token in ends), len(row)) for row in rows)


KEYS = ("model", "checkpoint", "prompts", "limit", "max_new_tokens", "template", "device", "trust_remote_code")
WAYS: dict[str, Layout] = {
    "dpo-sample": ours,
    "generate, in batches": in_batches,
    "generate, one prompt": one_at_a_time,
}


def main(words: Sequence[str] | None = None) -> None:
    """Time the three ways in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help=f"of dpo-sample: {', '.join(KEYS)}")
    args = parser.parse_args(words)

    for word in args.overrides:
        if word.split("=")[0].split(".")[0] not in KEYS:
            parser.error(f"{word}: of dpo-sample's dials these count here: {', '.join(KEYS)}")
    # Of prompts, one at a time takes an eighth.
    overrides = parse_overrides(["prompts=sample:test", "limit=32", "max_new_tokens=64", *args.overrides])
    config = config_of(composed("sample", overrides, SampleConfig).container, SampleConfig)
    sampler = load_sampler(config, Reporter())
    assert config.prompts is not None
    prompts, _ = read_prompts(config.prompts, config.limit, False)
    ids = sampler.encoder.encode_prompts([prompt.read for prompt in prompts])
    decoding = Decoding(config.max_new_tokens, 1.0)
    few = ids[:: 8 if len(ids) >= 16 else 1]
    sizes = {"dpo-sample": ids, "generate, in batches": ids, "generate, one prompt": few}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    tokens: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_number in range(args.rounds + 1):
        for name, way in WAYS.items():
            torch.manual_seed(round_number)
            started = time.perf_counter()
            drawn = way(sampler, sizes[name], decoding)
            elapsed = time.perf_counter() - started
            if round_number:  # the first warms up
                seconds[name].append(elapsed / (2 * len(sizes[name])))
                tokens[name].append(drawn / elapsed)
    lengths = f"{min(map(len, ids))} to {max(map(len, ids))} tokens"
    machine = f"{sampler.name}, {sampler.dtype.value}, {torch.get_num_threads()} threads"
    print(f"{len(ids)} prompts of {lengths}, two answers each, at most {config.max_new_tokens} tokens; {machine}")
    print(f"{'':<22}  answers/s  in {args.rounds} rounds      tokens/s  times")
    slowest = statistics.median(seconds["generate, one prompt"])
    for name, each in seconds.items():
        rates = sorted(1 / one for one in each)
        middle, drawn_a_second = 1 / statistics.median(each), statistics.median(tokens[name])
        spread = f"{rates[0]:.2f} to {rates[-1]:.2f}"
        print(f"{name:<22}  {middle:>9.2f}  {spread:<15}  {drawn_a_second:>8.0f}  {slowest * middle:>5.1f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
