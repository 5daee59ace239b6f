"""Weights & Biases: online with a key and a network, else offline in the run directory, to upload later.

The library is kept from asking, printing, and sending what is not a record: code, git, packages, machine, console.
"""

import os
import shlex
from collections.abc import Mapping
from typing import Any, Literal

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.trackers.tables import Cell
from dpo_cli.trackers.tracker import Start, reachable, verdict_of

# How a run ended, in the exit codes of wandb: finished, killed, failed.
EXIT_CODES = {"finished": 0, "stopped": 255, "failed": 1}
PATIENCE = 30  # seconds that a server may take to open a run, and to take its last records


class WeightsAndBiases:
    """A run with the id of trackers.json."""

    package = "wandb"

    def __init__(self, options: Mapping[str, Any], start: Start) -> None:
        # Read when the package is imported. Error reports would go to wandb.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(
            program="dpo-train", console="off", symlink=False, save_code=False, x_save_requirements=False,
            x_disable_machine_info=True, x_disable_stats=True, init_timeout=PATIENCE, finish_timeout=PATIENCE,
            finish_timeout_raises=True,
        )  # fmt: skip
        self._teardown, self._table = wandb.teardown, wandb.Table

        def init(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                project=options["project"], entity=options["entity"], name=options["name"] or start.name, id=start.id,
                resume="allow", mode=mode, dir=str(start.directory), config=start.config, settings=settings,
                reinit="create_new",
            )  # fmt: skip

        try:
            self._url = wandb.setup().settings.base_url
            offline = self._why_offline(options["mode"], self._url)
            if not offline:
                try:
                    self._run = init("online")
                except Exception as error:  # a wrong key, a server that has gone: what is recorded can go up later
                    offline = safe_text(first_line(error), limit=200)
                    wandb.teardown()  # its process still holds the id
            if offline:
                self._run = init("offline")
        except BaseException:
            wandb.teardown()
            raise
        self._online, self._warn = not offline, start.warn
        self._upload = f"upload with: wandb sync {safe_text(shlex.quote(self._run.settings.sync_dir))}"
        if offline:
            start.warn(f"tracker=wandb: offline ({offline}); {self._upload}")

    @staticmethod
    def _why_offline(mode: str, url: str) -> str:
        """Why the run cannot be online, or nothing."""
        from wandb.sdk.lib.wbauth import authenticate_session

        if mode == "offline":
            return "tracker.wandb.mode=offline"
        if mode == "auto" and (wanted := os.environ.get("WANDB_MODE", "online")) != "online":
            return f"WANDB_MODE={wanted}"
        if authenticate_session(host=url, source="dpo-train", prompt=False, update_session=False) is None:
            return "no API key: set WANDB_API_KEY or run `wandb login`"
        return f"{safe_text(url)} does not answer" if mode == "auto" and not reachable(url) else ""

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Add to the row of the step; a step before the last one that wandb knows keeps its first row."""
        self._run.log(metrics, step=step)

    def alarm(self, step: int, name: str, text: str) -> None:
        """Add the text under alarms/<name>; online also an alert, which wandb can mail."""
        self._run.log({f"alarms/{name}": text}, step=step)
        if self._online:
            self._run.alert(title=f"{name} at step {step}", text=text)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Cell]]) -> None:
        """Add a wandb.Table to the row of the step; online not where the server does not answer."""
        # Records wait for a server; a table asks it, for up to a minute, and raises where it is gone.
        if self._online and not reachable(self._url):
            answer = f"{safe_text(self._url)} does not answer: the table {name} of step {step} is left out"
            self._warn(f"tracker=wandb: {answer}")
            return
        # Mixed types: a column of numbers may hold text in another row.
        self._run.log({name: self._table(columns=columns, data=rows, allow_mixed_types=True)}, step=step)

    def finish(self, step: int, summary: dict[str, Any]) -> None:
        """Put the summary into the run's, the verdict under flat names too, and upload."""
        self._run.summary.update(summary | verdict_of(summary))
        try:
            self._run.finish(exit_code=EXIT_CODES[summary["status"]])
        except TimeoutError:
            raise RuntimeError(f"the server has not taken everything; {self._upload}") from None

    def close(self) -> None:
        """End the process that wandb has started."""
        self._teardown()
