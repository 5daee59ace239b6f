"""report.html of a run: its curves, verdict and last answers, drawn from the files in its directory alone."""

import json
from typing import Any

from dpo_cli.config.schema import public_container, read_config
from dpo_cli.errors import StorageError
from dpo_cli.pages.pages import run_page
from dpo_cli.runs.checkpoint import checkpoint_name
from dpo_cli.runs.run_directory import RunDirectory

ANSWERS = 8  # sampled answers shown


def write_page(directory: RunDirectory) -> None:
    """Write the page; StorageError where a file cannot be read or written."""
    manifest, config = directory.read_manifest(), public_container(read_config(directory.config))
    step = manifest.get("final", {}).get("step", 0)
    name = f"{directory.path.parent.name}/{directory.path.name}"
    page = run_page(name, config, manifest, directory.metrics.read(), _answers(directory, step))
    directory.write(directory.page, page.encode())


def _answers(directory: RunDirectory, step: int) -> list[dict[str, Any]]:
    """The first answers of the evaluation at a step."""
    file = directory.samples / f"{checkpoint_name(step)}.jsonl"
    try:
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()[:ANSWERS]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        raise StorageError(f"{file}: cannot be read") from None
