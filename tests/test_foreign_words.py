"""Keys of other trainers: each is answered with ours, which exists, or in a sentence."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended

from dpo_cli.config.composition import check_overrides, composed, groups, parse_overrides
from dpo_cli.config.files import override_value
from dpo_cli.config.foreign_words import WORDS, Note
from dpo_cli.config.schema import SCHEMAS, config_of, schema_keys
from dpo_cli.config.versions import flat, nested

Command = Callable[..., Ended]
KEYS = {name: set(schema_keys(schema)) for name, schema in SCHEMAS.items()}
TRACKERS = "tracker=[tensorboard,wandb,trackio]"
NEEDED = {"train": [TRACKERS], "sample": ["prompts=p.jsonl"], "eval": ["checkpoint=run"]}  # for a config that is whole


def answers() -> Iterator[str]:
    """Every answer of the table but the sentences."""
    for found in WORDS.values():
        for words in [found] if isinstance(found, str) else found.values():
            if not isinstance(words, Note):
                yield from words.split("|")


def test_every_key_and_value_that_the_table_names_composes() -> None:
    assert len(WORDS) >= 80
    choices = groups()
    usual: dict[str, dict[str, Any]] = {}
    for word in sorted({word for words in answers() for word in words.split()}):
        key, equals, _ = word.partition("=")
        command = next(name for name, keys in KEYS.items() if key in keys)
        schema = SCHEMAS[command]
        if command not in usual:
            usual[command] = flat(composed(command, parse_overrides(NEEDED.get(command, [])), schema).container)
        before = choices[key][0] if key in choices else override_value(usual[command][key])
        (override,) = parse_overrides([word if equals else f"{key}={before}"])
        check_overrides([override], schema)  # the key exists, and the choice of a group
        if key not in choices and key != "objective":  # which changes what other keys may be
            # A metric decides only where something is chosen by it.
            more = {"early_stop.patience": 3, "eval_every": 1} if key == "early_stop.metric" else {}
            config_of(nested({**usual[command], **more, key: override.value()}), schema)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lora.rank=8", "unknown key 'lora.rank' in 'lora.rank=8'; here it is lora.r=8"),
        ("model.lora_alpha=16", "unknown key 'model.lora_alpha' in 'model.lora_alpha=16'; here it is lora.alpha=16"),
        ("report_to=wandb", "unknown key 'report_to' in 'report_to=wandb'; here it is tracker=wandb"),
        ("wandb_project=x", "unknown key 'wandb_project' in 'wandb_project=x'; here it is tracker=wandb "
         "tracker.wandb.project=x"),
        ("optim=adamw_torch", "unknown key 'optim' in 'optim=adamw_torch'; here it is optimizer=adamw"),
        ("dataset_mixer={a: 0.5}", "unknown key 'dataset_mixer' in 'dataset_mixer={a: 0.5}'; here it is data=mixture "
         "data.sources"),
        ("mix_strategy=interleave_over", "unknown key 'mix_strategy' in 'mix_strategy=interleave_over'; with "
         "data=mixture it is data.stop=all"),
        ("bf16=true", "unknown key 'bf16' in 'bf16=true'; here it is model.dtype=bfloat16"),
        ("load_in_4bit=true", "unknown key 'load_in_4bit' in 'load_in_4bit=true'; here it is model.quantization=nf4"),
        ("bnb_4bit_quant_type=fp4", "unknown key 'bnb_4bit_quant_type' in 'bnb_4bit_quant_type=fp4'; not supported "
         "yet: 4 bits are nf4 (model.quantization=nf4), 8 bits int8"),
        ("bnb_4bit_compute_dtype=bfloat16", "unknown key 'bnb_4bit_compute_dtype' in "
         "'bnb_4bit_compute_dtype=bfloat16'; here it is model.dtype=bfloat16"),
        ("quantization_bit=8", "unknown key 'quantization_bit' in 'quantization_bit=8'; here it is "
         "model.quantization=int8"),
        ("adapter=qlora", "unknown key 'adapter' in 'adapter=qlora'; here it is lora=all_linear "
         "model.quantization=nf4"),
        ("optim=paged_adamw_8bit", "unknown key 'optim' in 'optim=paged_adamw_8bit'; here it is "
         "optimizer=paged_adamw8bit"),
        ("load_in_4bit=false", "unknown key 'load_in_4bit' in 'load_in_4bit=false'; leave it out"),
        ("gradient_accumulation_steps=4", "unknown key 'gradient_accumulation_steps' in "
         "'gradient_accumulation_steps=4'; not needed: batch_size counts the pairs of a step, micro_batch_size those "
         "of a forward pass"),
        ("per_device_train_batch_size=2", "unknown key 'per_device_train_batch_size' in "
         "'per_device_train_batch_size=2'; here it is micro_batch_size=2"),
        ("dataset_name=org/pairs", "unknown key 'dataset_name' in 'dataset_name=org/pairs'; here it is data=jsonl "
         "data.train=org/pairs"),
        ("adapter=lora", "unknown key 'adapter' in 'adapter=lora'; here it is lora=all_linear"),
        ("learnin_rate=1e-5", "unknown key 'learnin_rate' in 'learnin_rate=1e-5'; did you mean 'optimizer.lr'?"),
    ],
)  # fmt: skip
def test_a_key_of_another_trainer_is_answered_with_ours(command: Command, word: str, says: str) -> None:
    ended = command("dpo-train", word)
    assert (ended.code, ended.err) == (2, f"error: {says}\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--beta 0.1", "'--beta': values are given as key=value: beta=0.1"),
        ("--beta=0.1", "'--beta=0.1': values are given as key=value: beta=0.1"),
        ("--max-steps 5 beta=1", "'--max-steps': values are given as key=value: max_steps=5"),
        ("--learning_rate 1e-5", "'--learning_rate': no such flag; here it is optimizer.lr=1e-5"),
        ("--bf16 --tf32", "'--bf16': no such flag; here it is model.dtype=bfloat16"),
        ("--config-name run", "'--config-name': no such flag; to read a file of overrides write --config FILE.yaml"),
        ("--hlep", "'--hlep': no such flag; did you mean '--help'?"),
    ],
)
def test_a_key_written_as_a_flag_is_answered_with_ours(command: Command, words: str, says: str) -> None:
    ended = command("dpo-train", *words.split())
    assert (ended.code, ended.err) == (2, f"error: {says}\n")


AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
trust_remote_code: true
load_in_4bit: false
rl: dpo
rl_beta: 0.2
datasets:
  - path: Intel/orca_dpo_pairs
    split: train
adapter: lora
lora_target_linear: true
sequence_len: 2048
micro_batch_size: 2
wandb_project:
"""


def test_every_foreign_key_of_a_file_is_answered_at_once(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yaml"
    file.write_text(AXOLOTL)
    ended = command("dpo-train", "--config", file)
    first, *rest = ended.err.splitlines()
    assert (ended.code, first) == (2, "error: 10 keys of the --config file do not exist")
    said = [re.fullmatch(rf"{file} line (\d+): unknown key '(\w+)' in '.*'; (.*)", line) for line in rest]
    assert [one.groups() for one in said if one] == [
        ("1", "base_model", "here it is model.name_or_path=NousResearch/Llama-3.2-1B"),
        ("2", "trust_remote_code", "did you mean 'model.trust_remote_code'?"),
        ("3", "load_in_4bit", "leave it out"),
        ("4", "rl", "leave it out: DPO is the default (objective=dpo)"),
        ("5", "rl_beta", "here it is beta=0.2"),
        ("6", "datasets", "here it is data=jsonl data.train"),
        ("9", "adapter", "here it is lora=all_linear"),
        ("10", "lora_target_linear", "here it is lora.target_modules=all-linear"),
        ("11", "sequence_len", "here it is data.max_length=2048"),
        ("13", "wandb_project", "leave it out"),
    ]  # fmt: skip


def test_a_key_is_answered_only_where_the_command_has_ours(command: Command) -> None:
    assert "here it is checkpoint=x" in command("dpo-eval", "model_name_or_path=x").err
    assert "here it is n=4" in command("dpo-sample", "num_return_sequences=4").err
    assert "optimizer" not in command("dpo-rank", "learning_rate=1").err
