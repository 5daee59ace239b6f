"""Monitor and verdict on real runs of a small model: silent where all is well, and not where a run is ruined."""

from pathlib import Path

import pytest
from verdicts import WAYS, Said, told

from dpo_cli.theory.losses import LOSSES

RUINED = {  # what must be said, besides a color that is not green
    "lr x 100": "damaged",
    "swapped": "wrong_way",
    "shuffled": None,
    "length only": "length_driven",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small model and its runs are."""
    return tmp_path_factory.mktemp("verdicts")


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_healthy_run_is_green_under_every_loss(folder: Path, loss: str) -> None:
    if loss == "discopop":  # at its temperature of 0.05 it prefers a small margin of the wrong sign
        assert told(folder, loss, "short", "healthy").findings[0] == "wrong_way"
        return
    said = told(folder, loss, "short", "healthy")
    assert (said.color, said.findings, said.alarms) == ("green", [], []), said.summary


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_ruined_run_is_not_green(folder: Path, way: str) -> None:
    said: Said = told(folder, "sigmoid", "short", way)
    assert said.color == ("red" if way in ("lr x 100", "swapped") else "yellow"), said.summary
    assert said.findings and (RUINED[way] is None or RUINED[way] in said.findings)
