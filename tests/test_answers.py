"""What generated answers show: hand-computed statistics, and the KL of toy models against its exact value."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CPU, LORA, tiny

from dpo_cli.data.batches import Layout, SplitByPairs
from dpo_cli.data.formats import FinishReason
from dpo_cli.evaluation.scores import Scorer
from dpo_cli.generation.answers import Answer, AskedPrompt, compare_answers, measure_answers
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.loading import compile_layers
from dpo_cli.models.logps import MicroBatcher, causal_model
from dpo_cli.models.reference import AdapterOffReference, FrozenReference
from dpo_cli.objectives.preference import Preference
from dpo_cli.theory.repetition import distinct, repetition
from dpo_cli.theory.statistics import Clusters

END = 1
BATCHER = MicroBatcher(CPU, Layout.PADDED, SplitByPairs(64))


def answer(ids: list[int], ends: bool) -> Answer:
    reason = FinishReason.STOP if ends else FinishReason.LENGTH
    return Answer(ids, [*ids, *([END] if ends else [])], " ".join(map(str, ids)), reason)


def encoder() -> Any:
    """What decodes token ids as numbers and closes with token 1."""
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    return SimpleNamespace(tokenizer=tokenizer, closing=END, completion_text=lambda text, reason: text)


def prompts(number: int) -> list[AskedPrompt]:
    return [AskedPrompt([2 + i % 7, 2 + i // 7 % 50, 2 + i // 350], str(i), i) for i in range(number)]


def measured(policy: Any, reference: Any, number: int = 8, tokens: int = 6, **more: Any) -> Any:
    scorer = Scorer(policy, Preference.default(), reference, BATCHER)
    return measure_answers(scorer, encoder(), prompts(number), tokens, 0, **more)


def test_repetition_and_distinct_by_hand() -> None:
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4: five 4-grams, four of them distinct.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) == 0 and repetition([]) == 0
    # 12 23 | 12 24 | none: four bigrams, three of them distinct.
    assert distinct([[1, 2, 3], [1, 2, 4], [5]]) == pytest.approx(3 / 4)
    assert distinct([[5], []]) == 0


def test_what_answers_show_by_hand() -> None:
    ours = [answer([5, 5, 5, 5, 5], False), answer([6, 7], True)]
    theirs = [answer([5, 6], True), answer([6], True)]
    found = compare_answers(Clusters([3, 9]), ours, theirs)
    means = {name.removeprefix("samples/"): estimate.mean for name, estimate in found.items()}
    assert means == {
        "length": (5 + 3) / 2,  # tokens, the closing one included
        "ends": 1 / 2,
        "repetition": (1 / 2 + 0) / 2,  # 5555 5555
        "distinct_2": 2 / 5,  # 55 four times, 67
        "reference_length": (3 + 2) / 2,
        "reference_ends": 1.0,
        "reference_repetition": 0.0,
        "reference_distinct_2": 1.0,
        "length_ratio": 8 / 5,
    }
    # Without the first prompt the ratio is 3/2, without the second 5/3; t with one degree of freedom is 12.706.
    half = 12.706204736 * math.sqrt(((3 / 2 - 8 / 5) ** 2 + (5 / 3 - 8 / 5) ** 2) / 2)
    ratio = found["samples/length_ratio"]
    assert (ratio.low, ratio.high, ratio.n) == (pytest.approx(8 / 5 - half), pytest.approx(8 / 5 + half), 2)


def test_the_jackknife_of_a_mean_is_its_interval() -> None:
    values, clusters = np.array([1.0, 4.0, 2.0, 8.0]), Clusters([1, 2, 3, 4])
    found, known = clusters.jackknife(lambda kept: float(values[kept].mean())), clusters.mean(values)
    assert (found.mean, found.low, found.high) == pytest.approx((known.mean, known.low, known.high))
    assert Clusters([7, 7]).jackknife(lambda kept: 3.0).high == math.inf


def categorical(logits: dict[int, float]) -> Any:
    """A model whose every token is drawn from one distribution, whatever came before; all else has no weight."""
    model = tiny(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.fill_(-30.0 / 32)  # 32 hidden values, each 1
        for token, logit in logits.items():
            model.lm_head.weight[token].fill_(logit / 32)
    return model


def test_the_kl_of_known_distributions_lies_in_its_interval() -> None:
    limit, number = 5, 700
    policy, reference = {END: 0.2, 5: 0.5, 6: 0.3}, {END: 0.3, 5: 0.2, 6: 0.5}
    models = [categorical({token: math.log(p) for token, p in one.items()}) for one in (policy, reference)]
    found = measured(models[0], FrozenReference(models[1]), number, limit).estimates
    of_token = sum(p * math.log(p / reference[token]) for token, p in policy.items())
    tokens = sum((1 - policy[END]) ** step for step in range(limit))  # expected, the closing one included
    kl, length = found["samples/kl"], found["samples/length"]
    assert kl.low < of_token * tokens < kl.high and kl.high - kl.low < 0.3
    assert length.low < tokens < length.high
    ends = found["samples/ends"]
    assert ends.low < 1 - (1 - policy[END]) ** limit < ends.high
    of_reference = sum((1 - reference[END]) ** step for step in range(limit))
    assert found["samples/reference_length"].low < of_reference < found["samples/reference_length"].high
    ratio = found["samples/length_ratio"]
    assert ratio.low < tokens / of_reference < ratio.high


def test_before_training_the_answers_are_the_reference_s_and_nothing_changes() -> None:
    policy = attach_lora(tiny(), LORA).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = measured(policy, AdapterOffReference(policy))
    assert found.estimates["samples/kl"].mean == 0.0 and found.estimates["samples/length_ratio"].mean == 1.0
    assert all(row["policy"] == row["reference"] and row["kl"] == 0 for row in found.rows)
    assert policy.training and torch.equal(before, torch.get_rng_state())
    assert all(weight.grad is None for weight in policy.parameters())


def moved(policy: Any) -> Any:
    """The policy after a step: its adapters are no longer 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return policy


def test_a_moved_policy_is_compared_with_its_base_whose_answers_are_kept() -> None:
    policy = moved(attach_lora(tiny(), LORA))
    found = measured(policy, AdapterOffReference(policy))
    second = measured(policy, FrozenReference(tiny()))
    assert found.estimates["samples/kl"].mean > 0.1
    assert {name: one.mean for name, one in found.estimates.items()} == pytest.approx(
        {name: one.mean for name, one in second.estimates.items()}, abs=1e-4
    )
    base = measured(attach_lora(tiny(), LORA), FrozenReference(tiny()))
    assert [row["policy"] for row in base.rows] == [row["reference"] for row in found.rows]
    again = measured(policy, AdapterOffReference(policy), of_reference=[*found.of_reference[1:], found.of_reference[0]])
    assert [row["policy"] for row in again.rows] == [row["policy"] for row in found.rows]
    assert again.rows[0]["reference"] == found.rows[1]["reference"]  # taken as given, not generated again


def logp(model: Any, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) by transformers' own forward pass."""
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(float(logps[len(prompt) + place - 1, token]) for place, token in enumerate(response))


def test_each_answer_s_log_ratio_is_that_of_its_tokens_with_what_ended_it() -> None:
    policy = moved(attach_lora(tiny(), LORA))
    found = measured(policy, AdapterOffReference(policy), number=40)
    assert {row["finish_reason"] for row in found.rows} == {"stop", "length"}
    for asked, row in zip(prompts(40), found.rows, strict=True):
        ids = [int(word) for word in row["policy"].split()] + [END] * (row["finish_reason"] == "stop")
        assert row["tokens"] == len(ids)
        scores = [logp(policy, asked.ids, ids)]
        with policy.disable_adapter():
            scores.append(logp(policy, asked.ids, ids))
        assert row["kl"] == pytest.approx(scores[0] - scores[1], abs=1e-3)


# Torch's compiler touches deprecated paths of its own while it traces.
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_generate_as_they_are_written() -> None:
    from torch._dynamo.utils import counters

    policy = moved(attach_lora(tiny(), LORA))
    plain = measured(policy, AdapterOffReference(policy), number=12)
    counters.clear()
    compile_layers(causal_model(policy), backend="aot_eager")
    compiled = measured(policy, AdapterOffReference(policy), number=12)
    assert [row["policy"] for row in compiled.rows] == [row["policy"] for row in plain.rows]
    assert compiled.estimates["samples/kl"].mean == pytest.approx(plain.estimates["samples/kl"].mean, abs=1e-4)
    # Two kinds of code, the layers' with the adapter and without it: of scoring, and none of generating.
    assert counters["stats"]["unique_graphs"] == 2
