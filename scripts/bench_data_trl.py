"""TRL's preparation of a file of pairs, under a Python that has trl; nothing of the project is imported.

    python bench_data_trl.py '{"model": DIR, "tokenizer": DIR, "rows": FILE.jsonl, "processes": null}'

Times `datasets.load_dataset("json")` and DPOTrainer's own `_prepare_dataset`, with empty caches. Prints one line,
`RESULT {...}`.
"""
# mypy: ignore-errors
# trl is installed elsewhere, if at all

import json
import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="bench-trl-")

import transformers
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, __version__


class Timed(DPOTrainer):
    """Times the preparation alone."""

    seconds = 0.0

    def _prepare_dataset(self, *words, **named):
        began = time.perf_counter()
        prepared = super()._prepare_dataset(*words, **named)
        self.seconds = time.perf_counter() - began
        return prepared


def main():
    """Prepare once."""
    options = json.loads(sys.argv[1])
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    began = time.perf_counter()
    rows = load_dataset("json", data_files=options["rows"], split="train")
    loading = time.perf_counter() - began
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, dataset_num_proc=options["processes"],
        max_length=512,
    )  # fmt: skip
    trainer = Timed(options["model"], args=arguments, train_dataset=rows, processing_class=tokenizer)
    result = {"seconds": loading + trainer.seconds, "pairs": len(trainer.train_dataset), "trl": __version__}
    print("RESULT", json.dumps(result))


main()
