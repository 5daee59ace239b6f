"""trackio: a local store that `trackio show` displays, or a Hugging Face Space."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_cli.trackers.tables import Cell
from dpo_cli.trackers.tracker import Start, as_markdown, reachable


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what trackio prints from the screen; what it warns of is raised, as it raises nothing itself."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "trackio" in warning.filename:
            raise RuntimeError(str(warning.message))


class Trackio:
    """A run whose name holds the id of trackers.json, since trackio finds a run to resume by its name."""

    package = "trackio"

    def __init__(self, options: Mapping[str, Any], start: Start) -> None:
        with _quietly():
            import trackio

            space = options["space_id"] or os.environ.get("TRACKIO_SPACE_ID")
            local = space and self._why_local()
            if local:
                os.environ.pop("TRACKIO_SPACE_ID", None)  # trackio would read it again
            self._trackio = trackio
            self._run = trackio.init(
                project=options["project"], name=f"{options['name'] or start.name}-{start.id}",
                space_id=None if local else space, private=options["private"], config=start.config, resume="allow",
                embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        # Its threads warn at any moment, between the lines of the console: the next call raises it instead.
        self._failures: list[str] = []
        self._run._warn_once = lambda key, message: self._failures.append(message)
        warnings.filterwarnings("ignore", module=r"trackio\b")
        if local:
            upload = f"trackio sync --project {options['project']} --space-id {space}"
            start.warn(f"tracker=trackio: local ({local}); upload with: {upload}")

    @staticmethod
    def _why_local() -> str:
        """Why a Space cannot be used, or nothing."""
        import huggingface_hub
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        if huggingface_hub.get_token() is None:
            return "no Hugging Face token: set HF_TOKEN or run `hf auth login`"
        return "" if reachable(constants.ENDPOINT) else f"{constants.ENDPOINT} does not answer"

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        with _quietly():
            yield
        if self._failures:
            raise RuntimeError(self._failures[0])

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Add a row; a resumed run adds the rows after its checkpoint once more."""
        with self._recording():
            self._run.log(metrics, step=step)

    def alarm(self, step: int, name: str, text: str) -> None:
        """Raise an alert, which trackio can send to a webhook."""
        with self._recording():
            self._run.alert(name, text, step=step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Cell]]) -> None:
        """Add a row with a trackio.Table; the dashboard shows it under Media & Tables."""
        with self._recording():
            self._run.log({name: self._trackio.Table(columns=columns, data=rows)}, step=step)

    def finish(self, step: int, summary: dict[str, Any]) -> None:
        """Add the summary as an alert of level info, and wait until all is stored."""
        with self._recording():
            level = self._trackio.AlertLevel.INFO
            self._run.alert(f"run {summary['status']}", as_markdown(summary), level, step=step)
            self._run.finish()

    def close(self) -> None:
        """Let trackio forget the run, or it prints when Python exits."""
        with _quietly():
            self._trackio.finish()
