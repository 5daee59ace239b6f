"""TRL's DPOTrainer on the rows that bench.py times, under a Python that has trl; nothing of the project is imported.

    python bench_trl.py '{"model": DIR, "rows": FILE.jsonl, "best": false, "fp32": false, "adapter": null}'

LoRA r=16 on all linear layers, beta 0.1, sigmoid, 8 pairs a step, max_length 512, constant lr 5e-5, rows in file
order, one warm-up step left out. `best` is the fastest setting found: bf16 weights, no checkpointing, reference
log-probs precomputed. Prints one line, `RESULT {...}`.
"""
# mypy: ignore-errors
# trl is installed elsewhere, if at all

import json
import os
import resource
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="bench-trl-")

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, __version__

BATCH = 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    """Seconds of each step, and what was logged."""

    def __init__(self):
        self.seconds, self.losses, self.margins = [], [], []

    def on_step_begin(self, *_, **__):  # noqa: D102
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):  # noqa: D102
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, _args, _state, _control, logs=None, **__):  # noqa: D102
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.margins.append(float(logs["rewards/margins"]))


class InOrder(DPOTrainer):
    """Takes the rows as they come, and times the reference pass."""

    reference_seconds = 0.0

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _precompute_ref_logps(self, *words, **named):
        began = time.perf_counter()
        out = super()._precompute_ref_logps(*words, **named)
        self.reference_seconds = time.perf_counter() - began
        return out


def main():
    """Train, and print what it took."""
    task = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    with open(task["rows"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    best, fp32 = task["best"], task["fp32"]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_length=512, beta=0.1,
        loss_type=["sigmoid"], learning_rate=5e-5, lr_scheduler_type="constant", warmup_steps=0, num_train_epochs=1,
        bf16=not fp32, gradient_checkpointing=not (best or fp32), precompute_ref_log_probs=best, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to="none", seed=0, max_grad_norm=1.0, weight_decay=0.0,
        disable_tqdm=True, dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "bfloat16" if best and not fp32 else "float32"},
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM")
    clock = Clock()
    trainer = InOrder(
        model=task["model"], args=config, train_dataset=Dataset.from_list(rows), peft_config=lora, callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
    )  # fmt: skip
    if task["adapter"]:
        loaded = set_peft_model_state_dict(trainer.model, load_file(task["adapter"]))
        assert not loaded.unexpected_keys, loaded.unexpected_keys
    trainer.train()
    result = {
        "step_seconds": clock.seconds,
        "reference_seconds": trainer.reference_seconds,
        "pairs": len(trainer.train_dataset),
        "losses": clock.losses,
        "margins": clock.margins,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "trl": __version__,
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
