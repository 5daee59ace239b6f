"""TRL's side of test_trl.py: what its DPOTrainer makes of a file of pairs.

    python trl_worker.py --model DIR --pairs FILE.jsonl --adapter FILE.safetensors --losses JSON --out DIR

Runs under a Python that has trl, and imports nothing of the project: only files pass between the two sides. The
trainer is never told to train. It is asked for its loss as `train` would ask for it, one loss type after the other.

Written to DIR, N pairs in file order:
    ids.json               prompt, chosen and rejected token ids of each pair, and TRL's version
    values.safetensors     policy/chosen, policy/rejected, reference/chosen, reference/rejected: (N,) log-probs
                           loss/NAME: (N,) each pair in a batch of its own
                           gradient/NAME/PARAMETER: of the mean loss, in padded batches: over all pairs for the
                           first loss, over the first 8 for the others, since 15 passes back take minutes
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, __version__

BATCH = 8  # pairs


class Recorder:
    """Stands for the model while one batch is looked at: each loss type reads the same outputs, computed once."""

    def __init__(self, model):
        self.model, self.outputs = model, None

    def __call__(self, **inputs):
        if self.outputs is None:
            self.outputs = self.model(**inputs)
        return self.outputs


def make_trainer(model, pairs, adapter, scratch):
    """A DPOTrainer in plain fp32 on the CPU, every piece of randomness off, with the given adapter weights."""
    with open(pairs, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    config = DPOConfig(
        output_dir=scratch, beta=0.1, loss_type=["sigmoid"], max_length=None, precompute_ref_log_probs=False,
        per_device_train_batch_size=BATCH, gradient_checkpointing=False, bf16=False, use_cpu=True, seed=0,
        model_init_kwargs={"dtype": "float32"}, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    loaded = set_peft_model_state_dict(trainer.model, load_file(adapter))
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    trainer.model.train()
    # From here on reference log-probs come with the batch, so that they are computed once and not for every loss.
    trainer.precompute_ref_logps = True
    return trainer


def collate(trainer, examples):
    """A batch as TRL's collator makes it, with TRL's own reference log-probs."""
    batch = trainer.data_collator(examples)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = trainer.compute_ref_log_probs(trainer.model, batch)
    return batch


def loss_of(trainer, model, batch, name, hyperparameters):
    """TRL's loss `name` of a batch: its mean over the batch's pairs."""
    trainer.loss_types = [name]
    trainer.label_smoothing = hyperparameters.get("label_smoothing", 0.0)
    trainer.args.discopop_tau = hyperparameters.get("discopop_tau", 0.05)
    return trainer.compute_loss(model, batch)


def values_of(trainer, losses):
    """Everything that is compared, by name."""
    examples = list(trainer.train_dataset)
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    columns = {f"{who}/{side}": [] for who in ("policy", "reference") for side in ("chosen", "rejected")}
    columns |= {f"loss/{name}": [] for name in losses}
    for example in examples:
        batch, model = collate(trainer, [example]), Recorder(trainer.model)
        with torch.no_grad():
            for name, hyperparameters in losses.items():
                columns[f"loss/{name}"].append(loss_of(trainer, model, batch, name, hyperparameters))
        for side in ("chosen", "rejected"):
            columns[f"policy/{side}"].append(torch.tensor(trainer._metrics["train"][f"logps/{side}"][-1]))
            columns[f"reference/{side}"].append(batch[f"ref_{side}_logps"][0])
    values = {name: torch.stack(column) for name, column in columns.items()}
    for start in range(0, len(examples), BATCH):
        some = examples[start : start + BATCH]
        batch, model = collate(trainer, some), Recorder(trainer.model)
        for name in list(losses)[: None if start == 0 else 1]:
            share = len(some) / len(examples) if name == next(iter(losses)) else 1.0
            loss = share * loss_of(trainer, model, batch, name, losses[name])
            gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            for key, part in zip(weights, gradients, strict=True):
                values[f"gradient/{name}/{key}"] = values.get(f"gradient/{name}/{key}", 0.0) + part
    return values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "pairs", "adapter", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument(
        "--losses", type=json.loads, default={"sigmoid": {}}, help='{"robust": {"label_smoothing": 0.1}}'
    )
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(words.model, words.pairs, words.adapter, scratch)
        values = values_of(trainer, words.losses)
    ids = {side: list(trainer.train_dataset[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")}
    (Path(words.out) / "ids.json").write_text(json.dumps({**ids, "trl": __version__}))
    save_file({key: value.contiguous() for key, value in values.items()}, Path(words.out) / "values.safetensors")


if __name__ == "__main__":
    main()
