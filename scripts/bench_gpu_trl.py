"""TRL's DPOTrainer on the random pairs and weights of bench_gpu.py, under a Python that has trl.

    python bench_gpu_trl.py '{"shape": {...}, "rows": FILE.json, "batch": 32, "micro": 8, "cpu": false}'

bfloat16, LoRA r=16 on all linear layers, no checkpointing, the reference in the loop (TRL switches the adapter off) and
then precomputed. Tokens are words of a tokenizer made here, so that TRL sees the same lengths. Prints `RESULT {...}`.
"""
# mypy: ignore-errors
# trl is installed elsewhere, if at all

import json
import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, __version__


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):  # noqa: D102
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):  # noqa: D102
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def main():
    """Train on the rows twice: reference in the loop, reference precomputed."""
    task = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    vocabulary = task["shape"]["vocab_size"]
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(vocabulary)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0", unk_token="t1")
    with open(task["rows"], encoding="utf-8") as file:
        triples = json.load(file)
    text = [[" ".join(f"t{token}" for token in ids) for ids in triple] for triple in triples]
    rows = [{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in text]
    result = {"trl": __version__}
    for name, precompute in (("in_the_loop", False), ("cached", True)):
        torch.manual_seed(0)
        with torch.device("cpu" if task["cpu"] else "cuda"):
            config = AutoConfig.for_model("qwen2", max_position_embeddings=4096, **task["shape"])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        arguments = DPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=task["micro"], max_length=None, bf16=False,
            gradient_accumulation_steps=task["batch"] // task["micro"], gradient_checkpointing=False, beta=0.1,
            precompute_ref_log_probs=precompute, use_cpu=task["cpu"], save_strategy="no", report_to="none",
            logging_steps=100, num_train_epochs=1, disable_tqdm=True, learning_rate=1e-5,
        )  # fmt: skip
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        clock = Clock()
        trainer = DPOTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), peft_config=lora,
                             processing_class=tokenizer, callbacks=[clock])  # fmt: skip
        if not task["cpu"]:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        result[name] = {
            "pairs_per_second": task["batch"] / statistics.median(clock.seconds[1:]),
            "peak_gib": 0.0 if task["cpu"] else torch.cuda.max_memory_allocated() / 2**30,
        }
        del trainer, model
        if not task["cpu"]:
            torch.cuda.empty_cache()
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
