"""Completions a second: dpo-sample against `generate` on one prompt at a time, and on batches, in one run.

The three take turns on the same prompts and the median of the rounds counts, so that other load of the machine affects
all of them. Every method samples at temperature 1 from the same model, at most `max_new_tokens` a completion.
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
from dpo_cli.generation.decoding import CompletionRequest, SamplingParams, generate_completions, stop_token_ids
from dpo_cli.generation.generate import prompt_batches
from dpo_cli.generation.sampler import GenerationModel, load_generation_model

Method = Callable[[GenerationModel, list[list[int]], SamplingParams], int]


def ours(model: GenerationModel, prompts: list[list[int]], params: SamplingParams) -> int:
    """As dpo-sample generates; return the number of tokens."""
    stop_ids, tokens = stop_token_ids(model.model, model.encoder.closing), 0
    for batch in prompt_batches(model.model, prompts, 2, params, model.device, None):
        requests = [CompletionRequest(prompts[index], index=number) for index in batch for number in range(2)]
        completions = generate_completions(model.model, requests, params, stop_ids, model.device)
        tokens += sum(len(completion.token_ids) for completion in completions)
    return tokens


def one_at_a_time(model: GenerationModel, prompts: list[list[int]], params: SamplingParams) -> int:
    """transformers' generate, a prompt at a time, two completions each."""
    return sum(_generate(model, [prompt], params) for prompt in prompts)


def in_batches(model: GenerationModel, prompts: list[list[int]], params: SamplingParams) -> int:
    """transformers' generate on the same batches as ours, padded on the left."""
    batches = prompt_batches(model.model, prompts, 2, params, model.device, None)
    return sum(_generate(model, [prompts[index] for index in batch], params) for batch in batches)


def _generate(model: GenerationModel, prompts: list[list[int]], params: SamplingParams) -> int:
    closing, width = model.encoder.closing, max(map(len, prompts))
    padded = torch.tensor([[closing] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    options: dict[str, Any] = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
    stop_ids = stop_token_ids(model.model, closing)
    with torch.no_grad():
        output = model.model.generate(
            input_ids=padded, attention_mask=mask, num_return_sequences=2, max_new_tokens=params.max_new_tokens,
            eos_token_id=sorted(stop_ids), pad_token_id=closing, **options,
        )  # fmt: skip
    rows = output[:, width:].tolist()
    return sum(next((index for index, token in enumerate(row) if token in stop_ids), len(row)) for row in rows)


KEYS = ("model", "checkpoint", "prompts", "limit", "max_new_tokens", "template", "device", "trust_remote_code")
METHODS: dict[str, Method] = {
    "dpo-sample": ours,
    "generate, in batches": in_batches,
    "generate, one prompt": one_at_a_time,
}


def main(words: Sequence[str] | None = None) -> None:
    """Time the three methods in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help=f"of dpo-sample: {', '.join(KEYS)}")
    args = parser.parse_args(words)

    for word in args.overrides:
        if word.split("=")[0].split(".")[0] not in KEYS:
            parser.error(f"{word}: of dpo-sample's options only these apply: {', '.join(KEYS)}")
    # One at a time gets an eighth of the prompts.
    overrides = parse_overrides(["prompts=sample:test", "limit=32", "max_new_tokens=64", *args.overrides])
    config = config_of(composed("sample", overrides, SampleConfig).container, SampleConfig)
    model = load_generation_model(config, Reporter())
    assert config.prompts is not None
    prompts, _ = read_prompts(config.prompts, config.limit, False)
    ids = model.encoder.encode_prompts([prompt.read for prompt in prompts])
    params = SamplingParams(config.max_new_tokens, 1.0)
    few = ids[:: 8 if len(ids) >= 16 else 1]
    sizes = {"dpo-sample": ids, "generate, in batches": ids, "generate, one prompt": few}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    tokens: dict[str, list[float]] = {name: [] for name in METHODS}
    for round_number in range(args.rounds + 1):
        for name, method in METHODS.items():
            torch.manual_seed(round_number)
            started = time.perf_counter()
            generated = method(model, sizes[name], params)
            elapsed = time.perf_counter() - started
            if round_number:  # the first warms up
                seconds[name].append(elapsed / (2 * len(sizes[name])))
                tokens[name].append(generated / elapsed)
    lengths = f"{min(map(len, ids))} to {max(map(len, ids))} tokens"
    machine = f"{model.name}, {model.dtype.value}, {torch.get_num_threads()} threads"
    print(f"{len(ids)} prompts of {lengths}, two completions each, at most {config.max_new_tokens} tokens; {machine}")
    print(f"{'':<22}  compl./s   in {args.rounds} rounds      tokens/s  times")
    slowest = statistics.median(seconds["generate, one prompt"])
    for name, each in seconds.items():
        rates = sorted(1 / one for one in each)
        middle, token_rate = 1 / statistics.median(each), statistics.median(tokens[name])
        spread = f"{rates[0]:.2f} to {rates[-1]:.2f}"
        print(f"{name:<22}  {middle:>9.2f}  {spread:<15}  {token_rate:>8.0f}  {slowest * middle:>5.1f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
