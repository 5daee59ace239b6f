"""What the README shows is run: its commands, its rows, its code."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from conftest import Ended, records, sample_rows, write_jsonl

from dpo_cli.config.composition import composed, composed_run, parse_overrides, sweep
from dpo_cli.config.schema import EvalConfig, LabelConfig, RankConfig, SampleConfig, config_of, run_config
from dpo_cli.data.formats import FORMATS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
Command = Callable[..., Ended]


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("dpo-")]


OTHERS = {"dpo-sample": SampleConfig, "dpo-label": LabelConfig, "dpo-rank": RankConfig}


def test_every_command_composes() -> None:
    assert len(commands()) >= 5
    for name, *words in commands():
        overrides = parse_overrides([word for word in words if word != "-m"])
        if name == "dpo-train":
            for job in sweep(overrides):
                run_config(composed_run(parse_overrides(job)).container)
        elif name == "dpo-eval":
            composed("eval", overrides, EvalConfig)
        else:
            config_of(composed(name.removeprefix("dpo-"), overrides, OTHERS[name]).container, OTHERS[name])
    assert {name for name, *_ in commands()} == {"dpo-train", "dpo-eval", *OTHERS}


def test_the_commands_run_as_written_on_a_tiny_model(command: Command, tmp_path: Path, tiny_path: str) -> None:
    """The training line for one's own model and data, then the evaluation of its run and of its bare adapter."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sample_rows(20))
    run = tmp_path / "run"
    own = next(words for words in commands() if words[0] == "dpo-train" and "path/to/my-sft" in words[1])
    there = {"path/to/my-sft": tiny_path, "pairs.jsonl": str(pairs), "my-adapter": str(run / "final")}
    filled = [re.sub("|".join(map(re.escape, there)), lambda hit: there[hit[0]], word) for word in own]
    ended = command(*filled, "max_steps=2", f"output_dir={run}")
    assert ended.code == 0, ended.err
    assert records(run)[-1]["split"] == "eval"
    for words in (words for words in commands() if words[0] == "dpo-eval"):
        filled = [re.sub("|".join(map(re.escape, there)), lambda hit: there[hit[0]], word) for word in words]
        filled = [re.sub(r"outputs/\S+", str(run), word) for word in filled]
        ended = command(*filled, "max_new_tokens=3", f"output_dir={tmp_path / 'out'}")
        assert ended.code == 0, (filled, ended.err)


def test_the_rows_shown_are_read_as_the_form_they_stand_for() -> None:
    rows = re.findall(r"^\| (standard|messages|hh) \| `(.*)` \|$", README, re.M)
    assert {form for form, _ in rows} == {"standard", "messages", "hh"}
    for form, row in rows:
        value = json.loads(row)
        assert FORMATS[form](value) == FORMATS["auto"](value), form


def test_the_loss_in_the_diff_works() -> None:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from dpo_cli.theory.losses import LogRatios

    diff = re.search(r"```diff\n(.*?def cubic.*?)```", README, re.S)
    assert diff
    added = "\n".join(line[1:] for line in diff[1].splitlines() if line.startswith("+") and 'cubic":' not in line)
    names: dict[str, object] = {"LogRatios": LogRatios, "Tensor": Tensor, "F": F}
    exec(added, names)  # the README is ours
    d = torch.tensor([0.0, 10.0, 20.0])
    cubic = names["cubic"]
    assert callable(cubic)
    assert cubic(LogRatios(d, torch.zeros(3), torch.ones(3), torch.ones(3)), 0.1).tolist() == [1, 0, 0]


def test_the_files_of_the_map_exist_and_the_make_targets_too() -> None:
    listed = re.findall(r"^      (\S+)  ", README, re.M)
    assert len(listed) > 8
    for name in listed:
        assert (ROOT / "dpo_cli" / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
