"""Reports and logs for the tests of the pages, as the commands write them; the numbers are made up."""

import math
from typing import Any

import numpy as np

from dpo_cli.theory.statistics import Clusters, Estimate

NAME = "outputs/run"


def ends(one: Estimate) -> list[float]:
    return [one.mean, one.low, one.high]


def pairs(number: int, sources: tuple[str, ...] = ("harmless", "helpful"), seed: int = 0) -> list[dict[str, Any]]:
    """The lines of a pairs.jsonl; two pairs share a prompt."""
    draw = np.random.default_rng(seed)
    chosen, rejected = draw.normal(1.0, 9.0, number), draw.normal(-7.0, 12.0, number)
    lengths = draw.integers(5, 400, (number, 3))
    return [
        {
            "index": index,
            "key": f"{index:032x}",
            "prompt": f"{index // 2:016x}",
            "policy_logps_chosen": -90.0 + chosen[index],
            "policy_logps_rejected": -95.0 + rejected[index],
            "reference_logps_chosen": -90.0,
            "reference_logps_rejected": -95.0,
            "reward_chosen": 0.1 * chosen[index],
            "reward_rejected": 0.1 * rejected[index],
            "margin": 0.1 * (chosen[index] - rejected[index]),
            "prompt_tokens": int(lengths[index, 0]),
            "chosen_tokens": int(lengths[index, 1]),
            "rejected_tokens": int(lengths[index, 2]),
            **({"source": sources[index % len(sources)]} if sources else {}),
        }
        for index in range(number)
    ]


def report(lines: list[dict[str, Any]], name: str = NAME) -> dict[str, Any]:
    """The report.json of these pairs, with all that an evaluation can have."""
    prompts = Clusters([int(line["prompt"], 16) for line in lines])
    margins = np.asarray([line["margin"] for line in lines])
    estimates = {
        "rewards/accuracies": prompts.share(margins > 0),
        "rewards/margins": prompts.mean(margins),
        "loss": prompts.mean(np.log1p(np.exp(-margins))),
        "loss/improvement": prompts.mean(math.log(2) - np.log1p(np.exp(-margins))),
    }
    for source in sorted({line["source"] for line in lines if "source" in line}):
        of = [place for place, line in enumerate(lines) if line["source"] == source]
        some = Clusters([int(lines[place]["prompt"], 16) for place in of])
        estimates |= {
            f"rewards/accuracies/{source}": some.share(margins[of] > 0),
            f"rewards/margins/{source}": some.mean(margins[of]),
            f"loss/{source}": some.mean(np.log1p(np.exp(-margins[of]))),
        }
    samples = {
        "samples/kl": (7.31, 5.2, 9.4),
        "samples/length": (183.0, 160.0, 206.0),
        "samples/length_ratio": (1.41, 1.2, 1.6),
        "samples/ends": (0.91, 0.8, 0.96),
        "samples/repetition": (0.034, 0.02, 0.05),
        "samples/reference_length": (130.0, 118.0, 142.0),
        "samples/reference_ends": (0.95, 0.86, 0.98),
        "samples/reference_repetition": (0.031, 0.02, 0.04),
    }
    scales = [
        {
            "scale": scale,
            "rewards/accuracies": [0.5 + 0.2 * scale, 0.46 + 0.2 * scale, 0.54 + 0.2 * scale],
            "rewards/margins": [scale, scale - 0.1, scale + 0.1],
            "loss": [0.69 - 0.1 * scale, 0.6, 0.7],
            "samples/kl": [7 * scale**2, 6 * scale**2, 8 * scale**2] if scale else None,
            "answers": [f"At {scale:g} boat {place} is the {name}." for place in range(3)],
        }
        for scale in (0, 0.25, 0.5, 0.75, 1, 1.25)
    ]
    return {
        "checkpoint": f"{name}/final",
        "reference": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "weights_sha256": "3f" * 32,
        "beta": 0.1,
        "loss_name": "sigmoid",
        "device": "cpu",
        "dtype": "bfloat16",
        "layout": "packed_segments",
        "data": {
            "source": "test.jsonl.gz",
            "rows": len(lines) + 13,
            "kept": len(lines),
            "dropped": {"prompt_too_long": 12, "duplicate": 1},
        },
        "summary": {
            "color": "green",
            "text": "accuracy 0.71 (0.68 to 0.74): better than the reference; the answers are 1.41 times as long",
        },
        "pairs": len(lines),
        "prompts": prompts.prompts,
        "prompts_effective": prompts.effective,
        "calibration": {"error": 0.0431, "bins": []},
        "scales": scales,
        "harness": {
            "arc_easy": {
                "policy": {"acc,none": 0.613, "acc_stderr,none": 0.01},
                "reference": {"acc,none": 0.6},
                "difference": {"acc,none": [0.013, -0.01, 0.036]},
            },
            "hellaswag": {
                "policy": {"acc,flexible": 0.4312},
                "reference": {"acc,flexible": 0.4412},
                "difference": {"acc,flexible": [-0.01, None, None]},
            },
        },
        **{name: estimate.mean for name, estimate in estimates.items()},
        **{name: one[0] for name, one in samples.items()},
        "intervals95": {
            **{name: estimate.ends() for name, estimate in estimates.items()},
            **{name: list(one[1:]) for name, one in samples.items()},
        },
    }


def examples(number: int = 20, tokens: int = 60, word: str = " word") -> list[dict[str, Any]]:
    """The best and the worst pairs, token by token."""
    draw = np.random.default_rng(1)
    return [
        {
            "kind": kind,
            "prompt": f"Question {place}: how do I keep my bread fresh?\n\nPlease be short.",
            "margin": (3.0 if kind == "best" else -3.0) - 0.01 * place,
            "source": "helpful",
            "chosen": [[word, float(draw.normal(0.2, 0.6))] for _ in range(tokens)],
            "rejected": [[word, float(draw.normal(-0.3, 0.8))] for _ in range(tokens)],
        }
        for kind in ("best", "worst")
        for place in range(number)
    ]


def answers(number: int = 3) -> list[dict[str, Any]]:
    """Lines of a file of samples."""
    return [
        {
            "prompt": f"What is a good name for boat {place}?",
            "reference": "I do not know. " * 12,
            "kl": 6.2 + place,
            "policy": "Here are some names:\n\n1. The Heron\n2. Second Wind\n" + "3. Patience, of course. " * 9,
        }
        for place in range(number)
    ]


CONFIG = {
    "objective": "dpo",
    "beta": 0.1,
    "batch_size": 16,
    "log_every": 1,
    "loss": {"name": "sigmoid", "label_smoothing": 0.0},
    "model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "adapter": None},
    "budget": {"kl": 10.0, "length": 1.5},
    "lora": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
    "resume": None,
    "dry_run": False,
}
MANIFEST = {
    "dpo_cli": "0.1.0",
    "device": "cpu",
    "dtype": "bfloat16",
    "total_steps": 300,
    "skipped_steps": 2,
    "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "data": {
        "train": {"source": "train.jsonl.gz", "kept": 4800, "rows": 4900},
        "held_out": {"source": "test.jsonl.gz", "kept": 512, "rows": 512},
    },
    "final": {"step": 200, "reason": "the last evaluation within budget.kl=10"},
    "verdict": {
        "color": "yellow",
        "summary": "accuracy 0.68 (0.64 to 0.72), margin 0.61 (0.5 to 0.72); 512 held-out pairs",
        "findings": [
            {
                "name": "far",
                "color": "yellow",
                "reason": "the answers left the reference by 11 nats",
                "next_step": "beta=0.2",
            }
        ],
    },
}


def records(steps: int = 300, evaluate_every: int = 50) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl with two alarms, and all that is measured on generated answers."""
    draw = np.random.default_rng(2)
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        done = step / max(1, steps)
        margin = 0.8 * done + float(draw.normal(0, 0.08))
        line = {
            "step": step,
            "epoch": done,
            "split": "train",
            "loss": math.log1p(math.exp(-margin)),
            "rewards/chosen": -0.4 * done**2 + 0.1 * done,
            "rewards/rejected": -0.4 * done**2 + 0.1 * done - margin,
            "rewards/margins": margin,
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.2 * done + float(draw.normal(0, 0.1)))),
            "lr": 1e-5 * (1 - done),
        }
        if step:
            line |= {
                "grad_norm": float(np.exp(draw.normal(0.5, 0.4))),
                "pairs_per_second": 20 + float(draw.normal(0, 1)),
                "drift/chosen_per_token": -0.03 * done,
                "drift/rejected_per_token": -0.11 * done,
                "drift/kl_per_token": 0.02 * done**2,
                "drift/case": "both down",
            }
        if step in (steps // 3, steps // 2) and steps > 6:
            line["alarms"] = {"far": f"step {step}: the responses have moved by 0.3 nats a token; a larger beta helps"}
        found.append(line)
        if step and (step % evaluate_every == 0 or step == steps):
            kl, ratio = 12 * done**1.5, 1 + 0.6 * done
            means = {
                "loss": 0.69 - 0.15 * done,
                "rewards/margins": 0.6 * done,
                "rewards/accuracies": 0.5 + 0.18 * done,
                "samples/kl": kl,
                "samples/length_ratio": ratio,
                "samples/ends": 0.95 - 0.1 * done,
                "samples/reference_ends": 0.95,
                "samples/repetition": 0.03 + 0.04 * done,
                "samples/reference_repetition": 0.03,
            }
            intervals = {
                "rewards/accuracies": [0.46 + 0.18 * done, 0.54 + 0.18 * done],
                "rewards/margins": [0.6 * done - 0.1, 0.6 * done + 0.1],
                "samples/kl": [0.7 * kl, 1.3 * kl],
                "samples/length_ratio": [ratio - 0.15, ratio + 0.15],
            }
            found.append({"step": step, "epoch": done, "split": "eval", **means, "intervals95": intervals})
    return found


def comparison(
    kind: str = "comparison", number: int = 3, word: str = "beta"
) -> tuple[dict[str, Any], list[list[float]]]:
    """The report.json of a comparison or a sweep, and the margins of each model."""
    draw = np.random.default_rng(3)
    models: list[dict[str, Any]] = []
    for place in range(number):
        gain, better = 0.06 * place - 0.02 * place**2, place == 1
        difference = {
            "accuracy": {"mean": gain, "low": gain - 0.03, "high": gain + 0.03, "p": 0.012},
            "margin": {"mean": 3 * gain, "low": 3 * gain - 0.1, "high": 3 * gain + 0.1, "p": 0.2},
            "loss": {"mean": -gain, "low": -gain - 0.02, "high": -gain + 0.02, "p": 0.04},
        }
        words = (
            f"{word}-{place}: better by 0.04 (0.01 to 0.07)"
            if better
            else f"{word}-{place}: not told apart from the first"
        )
        models.append(
            {
                "name": f"{word}-{place}",
                "source": f"outputs/{word}-{place}/eval/held-out",
                "beta": 0.1 * 2**place,
                "swept": {"beta": 0.1 * 2**place, "optimizer.lr": 1e-5} if kind == "sweep" else {},
                "loss_name": "sigmoid",
                "reference": "SmolLM2",
                "checkpoint": f"outputs/{word}-{place}",
                "metrics": {
                    "accuracy": [0.62 + gain, 0.58 + gain, 0.66 + gain],
                    "margin": [0.5 + gain, 0.4 + gain, 0.6 + gain],
                    "loss": [0.6, 0.58, 0.62],
                    "kl": [12 / (place + 1), 10 / (place + 1), 14 / (place + 1)],
                    "length_ratio": None if place else [1.2, 1.1, 1.3],
                },
                "difference": difference if place else None,
                "words": words,
                "verdict": "better" if better else "not told apart" if place else "first",
                "pairs_needed": None if better or not place else 1900,
            }
        )
    report = {
        "kind": kind,
        "pairs": 512,
        "prompts": 498,
        "prompts_effective": 491.3,
        "models": models,
        "best": f"{word}-1",
        "swept": ["beta", "optimizer.lr"] if kind == "sweep" else [],
        "config_differences": [{"key": "beta", "values": [str(model["beta"]) for model in models]}],
        "warnings": [f"{word}-2: another dtype (float32) than the first (bfloat16)"],
    }
    return report, [draw.normal(0.5 + 0.1 * place, 1.0, 512).tolist() for place in range(number)]


def examination(word: str = "train.jsonl") -> dict[str, Any]:
    """The report.json of dpo-data."""
    estimate = {"mean": 0.52, "interval95": [0.5, 0.54], "pairs": 900}
    row = {"location": f"{word} line 3", "prompt": f"{word} or tea?", "chosen": word, "rejected": "Neither. " * 9}
    side = {
        "source": word,
        "rows": 1000,
        "pairs": 1000,
        "dropped": {"duplicate": 40},
        "kept": 960,
        "near_duplicates": 7,
        "examples": {"duplicate": [row, row]},
        "soft_labels": 3,
        "not_used": {word: 9},
        "not_used_form": "",
    }
    edges = [1, 2, 3, 4, 6, 8, 11, 16, 23, 33, 47, 66, 93, 132]
    counts = [0, 1, 3, 9, 20, 60, 120, 200, 190, 150, 90, 40, 17]
    sides = ("prompt", "chosen", "rejected")
    tokens = {
        "pairs": 900,
        "of": 960,
        "lengths": {one: {"mean": 40.0, "median": 31.0, "longest": 130.0} for one in sides},
        "histogram": {"edges": edges, **dict.fromkeys(sides, counts)},
        "max_length": [
            {"max_length": 512, "prompt_too_long": 3, "prompts_cut": 0, "responses_cut": 12, "tokens_per_epoch": 90_000}
        ],
    }
    phrase = {"phrase": word, "weight": -0.21, "in_chosen": 0.08, "in_rejected": 0.2}
    means = ("nats_per_token_chosen", "nats_per_token_rejected", "ordered_by_sum", "ordered_per_token", "token_overlap")
    return {
        "train": side,
        "held_out": side | {"source": "test.jsonl"},
        "pointless": None,
        "data": {"max_length": 512},
        "findings": [{"text": f"{word}: 40 duplicates", "next": f"dpo-data data.train={word} fix=cleaned.jsonl"}],
        "tokens": tokens,
        "bias": {
            "longer_preferred": estimate,
            "by_source": [{"source": word, "longer_preferred": estimate}],
            "words": {"accuracy": estimate, "phrases": [phrase]},
        },
        "score": {"pairs": 900, "overlapping": 4, "alike": 0, **dict.fromkeys(means, estimate)},
    }
