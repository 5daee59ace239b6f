"""The engine: a run on several ranks is the run on one; what ranks share, how they agree, and where they stand."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, sample_rows, tiny_words, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from ranks import BeforeStep, Left, Signal, start_ranks
from safetensors.torch import load_file

from dpo_cli.engine.ddp import DdpEngine
from dpo_cli.engine.engine import SINGLE
from dpo_cli.engine.ranks import Place, find_place, first_host
from dpo_cli.engine.table import ENGINES, open_engine
from dpo_cli.errors import ConfigError

Command = Callable[..., Ended]
Run = Callable[..., Path]
ROOT = Path(__file__).parent.parent
TIMINGS = {"seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib"}
# A batch of 3 leaves one of 4 ranks without a pair; the last batch of an epoch holds 2 of the 14 pairs.
WORDS = ("batch_size=3", "max_steps=6", "eval_every=2", "save_every=2", "log_every=2", "keep_checkpoints=9")
OTHER_REFERENCE = ("reference=adapter_off", "engine.gradient_checkpointing=true", "reference.cache=off")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_path: str) -> Path:
    """A folder with pairs; the model is in the cache."""
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "pairs.jsonl", sample_rows(20))
    return folder


def launch(folder: Path, number: int, *words: str, pairs: Path, **more: Any) -> list[Left]:
    all_words = [*tiny_words(pairs, folder / "run"), *WORDS, *words]
    return start_ranks(folder, number, all_words, **more).wait()


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    """The run directory of a complete run on so many ranks with these words; each is run once."""
    known: dict[tuple[Any, ...], Path] = {}

    def train(number: int, *words: str) -> Path:
        key = (number, *words)
        if key not in known:
            folder = home / f"run-{len(known)}"
            left = launch(folder, number, *words, pairs=home / "pairs.jsonl")
            assert [one.code for one in left] == [0] * number, [one.err for one in left]
            assert [one.out + one.err for one in left[1:]] == [""] * (number - 1)  # rank 0 speaks for all
            known[key] = folder / "run"
        return known[key]

    return train


def tensors(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    """Weights and optimizer state at the end of a run."""
    found = {}
    for file in [
        *(run / "final").glob("*.safetensors"),
        run / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors",
    ]:
        found |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    assert len(found) > 50
    return found


def same_run(one: Path, other: Path) -> None:
    """Weights, optimizer state and every metric are equal up to rounding; nothing more or less is written."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-6, rtol=1e-4), name
    lines, others = records(one), records(other)
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
    for line, again in zip(lines, others, strict=True):
        assert line.keys() == again.keys()
        intervals, same_intervals = line.pop("intervals95", {}), again.pop("intervals95", {})
        assert intervals.keys() == same_intervals.keys()
        for name, ends in intervals.items():
            assert ends == pytest.approx(same_intervals[name], abs=2e-3), name
        for key in line.keys() - TIMINGS:
            assert line[key] == (pytest.approx(again[key], abs=2e-4) if isinstance(again[key], float) else again[key])
    for folder in (".", "final", "checkpoints/step-00000006"):
        assert {path.name for path in (one / folder).iterdir()} == {path.name for path in (other / folder).iterdir()}


# A run


@pytest.mark.parametrize(
    ("engine", "number", "words"),
    [
        ("ddp", 2, ()),
        ("ddp", 4, ()),
        ("ddp", 2, ("objective=reward",)),
        ("ddp", 2, ("lora=off", "optimizer.lr=1e-4")),
        ("fsdp", 2, ()),
        ("fsdp", 4, ()),
        ("fsdp", 2, ("objective=reward",)),
        ("fsdp", 2, ("lora=off", "optimizer.lr=1e-4")),
        ("fsdp", 2, OTHER_REFERENCE),
    ],
    ids=lambda value: "-".join(value).replace("=", "_") if isinstance(value, tuple) else str(value),
)
def test_a_run_on_several_ranks_is_the_run_on_one(run: Run, engine: str, number: int, words: tuple[str, ...]) -> None:
    same_run(run(number, f"engine={engine}", *words), run(1, *words))


def test_a_signal_to_one_rank_stops_all_and_another_engine_on_fewer_ranks_resumes(run: Run, home: Path) -> None:
    """4 ranks with shards, then 2 with whole models, then one process: the uninterrupted run's numbers."""
    folder, pairs = home / "chain", home / "pairs.jsonl"
    for number, engine, stop in ((4, "fsdp", Signal(3, 1)), (2, "ddp", Signal(1, 3))):
        left = launch(folder, number, f"engine={engine}", "resume=auto", pairs=pairs, hook=BeforeStep(stop))
        assert [one.code for one in left] == [75] * number, left
        said = f"error: stopped by SIGTERM at step {stop.step + 1}; to resume, run the same command with output_dir="
        assert left[0].err.splitlines()[-1].startswith(said)
        assert all(one.err == "" for one in left[1:])
    assert (
        "resuming with another engine.name: fsdp -> ddp: the run is no longer the one that was started"
        in left[0].out + left[0].err
    )
    (left,) = launch(folder, 1, "resume=auto", pairs=pairs)
    assert left.code == 0 and "resuming from " in left.out, left
    same_run(folder / "run", run(1))


def test_each_rank_drops_other_values_and_a_run_again_drops_the_same(run: Run, home: Path) -> None:
    dropping = ("engine=ddp", "lora.dropout=0.5", "max_steps=3")
    left = [
        launch(home / name, 2, *dropping, pairs=home / "pairs.jsonl", hook=note_masks) for name in ("first", "again")
    ]
    assert [one.code for ranks in left for one in ranks] == [0] * 4
    first, again = (
        [(home / name / f"masks-{rank}").read_text().splitlines() for rank in (0, 1)] for name in ("first", "again")
    )
    assert first == again and len(set(first[0])) == len(set(first[1])) == 3
    assert not set(first[0]) & set(first[1])


def note_masks(rank: int) -> None:
    """Write down, in each step, what the generator would drop next when the batch begins."""
    from dpo_cli.training import runner

    original, file = runner.until_it_fits, Path(os.readlink("/proc/self/fd/1")).with_name(f"masks-{rank}")

    def noted(*arguments: Any) -> Any:
        state = torch.get_rng_state()
        with file.open("a") as lines:
            lines.write(f"{torch.rand(4).tolist()}\n")
        torch.set_rng_state(state)
        return original(*arguments)

    file.unlink(missing_ok=True)
    runner.until_it_fits = noted


def test_a_rank_that_finds_its_pairs_made_stays_in_step(run: Run, home: Path, tmp_path: Path) -> None:
    """Of two computers, each with a cache of its own, one has trained on this file before."""
    for rank in (0, 1):
        for model in Path(os.environ["DPO_CACHE"]).glob("tiny*"):
            shutil.copytree(model, tmp_path / f"cache-{rank}" / model.name)
    pairs = home / "pairs.jsonl"
    assert launch(tmp_path, 1, pairs=pairs, DPO_CACHE=str(tmp_path / "cache-1"))[0].code == 0
    shutil.rmtree(tmp_path / "run")
    left = launch(tmp_path, 2, "engine=ddp", pairs=pairs, DPO_CACHE=str(tmp_path / "cache"), hook=own_cache)
    assert [one.code for one in left] == [0, 0], left
    same_run(tmp_path / "run", run(1))


def own_cache(rank: int) -> None:
    os.environ["DPO_CACHE"] += f"-{rank}"


# Parts of a run, on ranks that run a function of this file


def on_ranks(folder: Path, number: int, check: Callable[[int], None], **environ: str) -> list[Left]:
    """`check` in each of so many ranks that have met; the command itself, --help, then says that it returned."""
    return start_ranks(folder, number, ["--help"], hook=check, **environ).wait()


def engine_of(name: str) -> Any:
    from dpo_cli.config.composition import composed, parse_overrides
    from dpo_cli.config.schema import RunConfig, run_config

    config = run_config(composed("train", parse_overrides([f"engine={name}"]), RunConfig).container)
    return open_engine(config.engine, "cpu")


def check_agreement(rank: int) -> None:
    engine = engine_of("ddp")
    assert (engine.rank, engine.world_size, engine.alone) == (rank, 3, False)
    assert (engine.agree(rank), engine.least(rank + 5)) == (2, 5)
    assert engine.same(lambda: f"made by {rank}") == "made by 0"
    with pytest.raises(ConfigError, match="of rank 0"):
        engine.same(lambda: (_ for _ in ()).throw(ConfigError(f"of rank {rank}")))
    # A table in which each rank has filled its own columns: no value is added to another.
    table = torch.zeros(2, 7)
    mine = engine.share([5, 1, 1, 1, 9, 2, 2])
    table[:, mine] = torch.tensor([[10.0], [20.0]]) + torch.tensor(mine)
    assert torch.equal(engine.sum(table), torch.tensor([[10.0], [20.0]]) + torch.arange(7))
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    weights[0].grad = torch.full((2,), float(rank + 1))
    if rank == 1:  # the others have no gradient of it, as a rank without pairs
        weights[1].grad = torch.ones(3)
    engine.sum_gradients(weights)
    assert [weight.grad.tolist() for weight in weights if weight.grad is not None] == [[6.0] * 2, [1.0] * 3]
    engine.alike({"model": "", "data": "x"} if rank else {"model": "a", "data": "x"})
    with pytest.raises(ConfigError, match=r"rank 2 has another seed than rank 0: 2 and 0; every rank must find"):
        engine.alike({"data": "x", "seed": str(rank if rank == 2 else 0)})


def test_ranks_agree_on_numbers_tables_gradients_and_what_they_found(tmp_path: Path) -> None:
    left = on_ranks(tmp_path, 3, check_agreement)
    assert [one.code for one in left] == [0, 0, 0], [one.err for one in left]


def check_shards(rank: int) -> None:
    from tiny_models import CPU, LORA, pair, tiny

    from dpo_cli.data.batches import Layout, SplitByPairs
    from dpo_cli.engine.engine import local
    from dpo_cli.models.adapters import attach_lora
    from dpo_cli.models.logps import MicroBatcher, response_logps
    from dpo_cli.models.reference import AdapterOffReference

    engine = engine_of("fsdp")
    whole = attach_lora(tiny(), LORA)
    policy = engine.shard(attach_lora(tiny(), LORA), CPU)
    shards = [local(weight).numel() for weight in policy.parameters()]
    assert sum(shards) < 0.6 * sum(weight.numel() for weight in whole.parameters())
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained == [name for name, weight in whole.named_parameters() if weight.requires_grad]
    batcher = MicroBatcher(CPU, Layout.PADDED, SplitByPairs(1))
    batch = [pair(4, 3, 5, seed) for seed in range(3)]
    AdapterOffReference(policy).logps(batcher.lay_out(batch))
    assert trained == [name for name, weight in policy.named_parameters() if weight.requires_grad]
    # One rank has two micro-batches, the other one, and a void one that adds nothing.
    counts = []
    for pairs, counted in batcher.rounds(batch, engine):
        (response_logps(policy, batcher.lay_out(pairs)).sum() * counted).backward()
        counts.append(counted)
    assert len(counts) == 2 and sum(counts) == len(engine.share([one.tokens for one in batch]))
    response_logps(whole, batcher.lay_out(batch)).sum().backward()
    found = dict(policy.named_parameters())
    for name, weight in whole.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and found[name].grad is not None
            assert torch.allclose(found[name].grad.full_tensor(), weight.grad, atol=1e-5), name
    norm = engine.clip([weight for weight in policy.parameters() if weight.requires_grad], 1e-3)
    ours = torch.nn.utils.clip_grad_norm_([weight for weight in whole.parameters() if weight.requires_grad], 1e-3)
    assert torch.allclose(norm, ours, rtol=1e-4)


def test_sharded_ranks_sum_gradients_over_unequal_micro_batches_and_keep_what_trains(tmp_path: Path) -> None:
    left = on_ranks(tmp_path, 2, check_shards)
    assert [one.code for one in left] == [0, 0], [one.err for one in left]


# Who computes which pair


def engine_at(rank: int, world_size: int) -> DdpEngine:
    engine = DdpEngine.__new__(DdpEngine)
    engine.rank, engine.world_size = rank, world_size
    return engine


@given(sizes=st.lists(st.integers(1, 4096), max_size=40), world_size=st.integers(1, 9))
def test_the_shares_of_all_ranks_are_the_batch(sizes: list[int], world_size: int) -> None:
    shares = [engine_at(rank, world_size).share(sizes) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)  # nobody has a whole item more than another
    if len(sizes) >= world_size:
        assert min(map(len, shares)) > 0


def test_a_rank_without_pairs_computes_one_that_does_not_count() -> None:
    assert [*engine_at(0, 2).rounds(["a", "b"], "spare")] == [("a", True), ("b", True)]
    assert [*engine_at(1, 2).rounds([], "spare")] == [("spare", False)]


def test_one_process_is_all_ranks() -> None:
    table = torch.ones(2, 3)
    assert SINGLE.alone and SINGLE.rank == 0 and SINGLE.world_size == 1
    assert SINGLE.share([3, 2, 1]) == [0, 1, 2] and SINGLE.sum(table) is table and SINGLE.full(table) is table
    assert SINGLE.same(lambda: 7) == SINGLE.agree(7) == SINGLE.least(7) == 7
    assert [*ENGINES] == ["single", "ddp", "fsdp"]


# Where a process stands

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "50007",
         "SLURM_STEP_NODELIST": "gpu[03-05,9],x", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2"}, None),
        (TORCHRUN, Place(3, 8, 1, 2, "env://")),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}, Place(3, 8, 1, 2, "env://", "2")),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, Place(1, 2, 0, None, "env://")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0, None, "")),
        ({**TORCHRUN, "DPO_MEETING_FILE": "/m"}, Place(3, 8, 1, 2, "file:///m")),
        (SLURM, Place(3, 8, 1, 2, "tcp://gpu03:30007")),
        ({**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "1"}, Place(3, 8, 1, 2, "tcp://h:1")),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),  # sbatch's own shell
    ],
)
def test_a_launcher_is_known_by_its_variables(environ: dict[str, str], place: Place | None) -> None:
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set, and MASTER_ADDR and MASTER_PORT are not: the "
         "ranks cannot meet"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8, WORLD_SIZE=8: a rank lies between 0 and the number of ranks less one"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1, WORLD_SIZE=8: a rank lies between 0 and the number of ranks less one"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "RANK=3, WORLD_SIZE=two: a launcher sets whole numbers"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "x"}, "RANK=3, WORLD_SIZE=x: a launcher sets whole numbers"),
    ],
)  # fmt: skip
def test_variables_that_do_not_fit_are_refused(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_place(environ)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],login", "gpu03"), ("a,b", "a"), ("n7", "n7"), ("r1n[2,4]-ib", "r1n2-ib"), ("", "")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# Mistakes, each said once


@pytest.mark.parametrize(
    ("number", "words", "code", "says"),
    [
        (2, ["engine=single"], 2, "engine=single: started as rank 0 of 2, and each would train a run of its own; "
         "choose engine=ddp or engine=fsdp"),
        (2, ["engine=ddp", "engine.processes=3"], 2, "engine.processes=3: the launcher has started 2 here; leave "
         "engine.processes out"),
        (2, ["engine=ddp", "device=cuda"], 2, "device=cuda: "),
        (2, ["engine=fsdp", "engine.cpu_offload=true"], 2, "engine.cpu_offload=true: a CPU has no other memory to move "
         "weights to; leave it out"),
        (1, ["engine=fsdp"], 2, "engine=fsdp: one rank shards nothing; choose engine=single, or more engine.processes"),
        (1, ["engine.processes=2"], 2, "engine.processes=2: engine=single is one process; choose engine=ddp or "
         "engine=fsdp"),
        (1, ["engine=ddp", "engine.cpu_offload=true"], 2, "engine.cpu_offload=true: needs engine=fsdp"),
        (2, ["engine=ddp", "data.train={dir}/none.jsonl"], 3, "{dir}/none.jsonl: no such file"),
        (2, ["engine=ddp", "data.train={dir}/empty.jsonl"], 3, "{dir}/empty.jsonl: the file is empty"),
        (2, ["engine=ddp", "model.name_or_path={dir}"], 4, "model.name_or_path={dir}: holds no model"),
    ],
)  # fmt: skip
def test_a_mistake_that_all_ranks_find_is_said_once(
    home: Path, tmp_path: Path, number: int, words: list[str], code: int, says: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    filled = [word.replace("{dir}", str(tmp_path)) for word in words]
    left = launch(tmp_path / "run", number, *filled, pairs=home / "pairs.jsonl")
    assert [one.code for one in left] == [code] * number, left
    assert left[0].err.startswith(f"error: {says.replace('{dir}', str(tmp_path))}") and left[0].err.count("\n") == 1
    assert all(one.err == "" for one in left[1:])


def other_words(rank: int) -> None:
    """Rank 1 finds another value of a key than rank 0."""
    if rank == 1:
        sys.argv.append(os.environ["OTHER"])


def other_version(rank: int) -> None:
    from importlib import metadata

    original = metadata.version
    if rank == 1:
        metadata.version = lambda name: "0.1" if name == "torch" else original(name)


@pytest.mark.parametrize(
    ("other", "code", "says"),
    [
        ("beta=0.3", 2, "rank 1 has another beta than rank 0: 0.3 and 0.1; every rank must find the same program, "
         "config and files"),
        ("version", 2, "rank 1 has another torch than rank 0: 0.1 and "),
    ],
)  # fmt: skip
def test_a_rank_that_differs_is_named_by_one_line(home: Path, tmp_path: Path, other: str, code: int, says: str) -> None:
    hook = other_version if other == "version" else other_words
    left = launch(tmp_path, 2, "engine=ddp", pairs=home / "pairs.jsonl", hook=hook, OTHER=other)
    assert [one.code for one in left] == [code, code], left
    assert left[0].err.startswith(f"error: {says}") and left[0].err.count("\n") == 1 and left[1].err == ""


def test_ranks_with_another_file_or_model_are_named(home: Path, tmp_path: Path, tiny_path: str) -> None:
    """On each computer a file of the same name: links that lead elsewhere on rank 1."""
    write_jsonl(tmp_path / "b.jsonl", sample_rows(19))
    os.symlink(home / "pairs.jsonl", tmp_path / "a.jsonl")
    left = launch(tmp_path / "data", 2, "engine=ddp", pairs=tmp_path / "a.jsonl", hook=reads_b)
    assert [one.code for one in left] == [2, 2], left
    assert left[0].err.startswith("error: rank 1 has another training data than rank 0: ") and left[1].err == ""
    left = launch(tmp_path / "model", 2, "engine=ddp", pairs=home / "pairs.jsonl", hook=loads_other_weights)
    assert [one.code for one in left] == [2, 2], left
    assert left[0].err.startswith("error: rank 1 has another model than rank 0: ") and left[1].err == ""


def reads_b(rank: int) -> None:
    from dataclasses import replace

    from dpo_cli.training import build

    original = build.load_pairs
    if rank == 1:
        build.load_pairs = lambda data, *more, **named: original(
            replace(data, train=data.train.replace("a.jsonl", "b.jsonl")), *more, **named
        )


def loads_other_weights(rank: int) -> None:
    from dpo_cli.training import build

    original = build.load_model

    def load(*arguments: Any) -> Any:
        model = original(*arguments)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return model

    if rank == 1:
        build.load_model = load


def test_more_ranks_than_pairs_are_warned_of(run: Run) -> None:
    out = (run(4, "engine=ddp").parent / "out-0").read_text() + (run(4, "engine=ddp").parent / "err-0").read_text()
    assert (
        "batch_size=3: in each step 1 rank of 4 has no pair to compute; raise batch_size, or start fewer ranks" in out
    )
    assert "no pair to compute" not in (run(2, "engine=ddp").parent / "out-0").read_text()


# The commands as a user starts them


def real(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, cwd=folder, text=True, capture_output=True, timeout=240, check=False)


DPO_TRAIN = (sys.executable, "-c", "from dpo_cli import cli; cli.train()")


def test_the_command_starts_its_workers_itself(run: Run, home: Path, tmp_path: Path) -> None:
    words = [*tiny_words(home / "pairs.jsonl", tmp_path / "run"), *WORDS, "engine=ddp", "engine.processes=2"]
    done = real(tmp_path, *DPO_TRAIN, *words)
    assert done.returncode == 0 and "error" not in done.stderr, done
    same_run(tmp_path / "run", run(1))


def test_torchrun_starts_a_dead_worker_again_and_the_run_is_whole(run: Run, home: Path, tmp_path: Path) -> None:
    """Rank 1 is killed once, in its third step; torchrun starts both again, and resume=auto continues the run."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from dpo_cli import cli\n"
        "from ranks import BeforeStep, Signal\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    BeforeStep(Signal(1, 3, 9))(int(os.environ['RANK']))\n"
        "cli.train()\n"
    )
    words = [*tiny_words(home / "pairs.jsonl", tmp_path / "run"), *WORDS, "engine=ddp", "resume=auto"]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = real(tmp_path, *launcher, "--max-restarts", "1", str(script), *words)
    assert done.returncode == 0, done.stderr
    assert "resuming from " in done.stdout
    same_run(tmp_path / "run", run(1))
