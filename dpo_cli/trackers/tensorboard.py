"""TensorBoard: an event file in the run directory, written record by record in this thread.

SummaryWriter of torch writes in a thread of its own, where a full disk ends in a traceback on the user's screen; the
record writer of tensorboard raises it where it happens, and needs neither torch nor TensorFlow.
"""

import json
import os
import platform
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_cli.trackers.tables import Cell, markdown_table
from dpo_cli.trackers.tracker import Start, as_markdown


class TensorBoard:
    """Scalars, and as text the config, alarms, tables and the summary."""

    package = "tensorboard"

    def __init__(self, options: Mapping[str, Any], start: Start) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder = start.directory / "tensorboard"
        if options["directory"] is not None:
            folder = Path(options["directory"]).expanduser() / f"{start.name}-{start.id}"
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names, so the time comes first.
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}.0"
        self._writer = RecordWriter((folder / name).open("xb"))
        first = 0 if start.resumed_at is None else start.resumed_at + 1
        self._write(0, file_version="brain.Event:2")
        # Makes readers forget what an earlier process wrote from this step on: it is recorded again.
        self._write(first, session_log=SessionLog(status=SessionLog.START))
        self._text(first, "config", textwrap.indent(json.dumps(start.config, indent=2), "    "))

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write one event with every number."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step, summary=self._summary(value=values))

    def alarm(self, step: int, name: str, text: str) -> None:
        """Write the alarm as text under alarms/<name>."""
        self._text(step, f"alarms/{name}", text)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Cell]]) -> None:
        """Write the table as text, in Markdown."""
        self._text(step, name, markdown_table(columns, rows))

    def finish(self, step: int, summary: dict[str, Any]) -> None:
        """Write the summary as text."""
        self._text(step, "summary", as_markdown(summary))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = self._summary.Value(tag=tag, tensor=tensor, metadata=create_summary_metadata(tag, ""))
        self._write(step, summary=self._summary(value=[value]))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._writer.flush()
