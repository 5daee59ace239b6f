"""Draw docs/console.svg: the console of a real run on the shipped pairs, as rich recorded it.

    python scripts/console_picture.py                                   # what `make demo` trains, some minutes
    python scripts/console_picture.py --output tiny.svg model=tiny max_steps=3

Words after the options are given to dpo-train. The live view redraws itself all the time; its last state is shown.
"""

import argparse
import io
import os
import tempfile
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from dpo_cli.cli import quiet_libraries
from dpo_cli.config.command_line import read_command_line, run_of
from dpo_cli.console.reporter import Reporter

ROOT = Path(__file__).parent.parent
COLUMNS = 104


class Recorded(Reporter):
    """The console on a terminal of fixed width, recorded."""

    def __init__(self, command: str) -> None:
        super().__init__(io.StringIO())
        self.console = Console(
            record=True, force_terminal=True, color_system="truecolor", width=COLUMNS, file=io.StringIO(),
            highlight=False, markup=False, emoji=False, legacy_windows=False,
        )  # fmt: skip
        self.console.print(Text(f"$ {command}", style="bold"))

    def facts(self, rows: list[tuple[str, str]]) -> None:
        """Show the home folder as ~: the picture is everybody's."""
        super().facts([(label, text.replace(str(Path.home()), "~")) for label, text in rows])

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Start the live view, whose frames are not recorded."""
        super().start(what, total, done)
        self.console.record = False

    def stop(self) -> None:
        """End the live view and record its last frame."""
        frame: RenderableType | None = self._frame() if self._live is not None else None
        super().stop()
        self.console.record = True
        if frame is not None:
            self.console.print(frame)


def main() -> None:
    """Train, and write what the console showed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "console.svg")
    parser.add_argument("words", nargs="*", default=["experiment=demo"], help="of dpo-train")
    options = parser.parse_args()
    config, name = run_of(read_command_line("train", options.words))
    quiet_libraries()
    from dpo_cli.training.runner import train

    command = " ".join(["dpo-train", *options.words])
    output = options.output.absolute()
    reporter = Recorded(command)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the run directory is named as a user sees it: outputs/...
        try:
            train(config, reporter, name)
        finally:
            reporter.close()
            os.chdir(ROOT)
    output.write_text(reporter.console.export_svg(title=command, unique_id="console"), encoding="utf-8")
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
