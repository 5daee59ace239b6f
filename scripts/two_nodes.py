"""Train on two nodes that meet by rendezvous, on one machine, and compare the weights with those of one process.

    sudo python scripts/two_nodes.py [--engine fsdp] [--cut 35]

The two nodes are network namespaces that see each other through one virtual cable alone; in each, torchrun starts one
process. The bytes that crossed the cable are counted: two runs that know nothing of each other would end with equal
weights, too. `--cut STEP` unplugs the cable there until a node has given up; then the other must end as well, and
the same command resumes. Needs Linux, root, and `ip` of iproute2.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

NODES = {f"dpo{os.getpid()}{letter}": f"10.77.0.{number}" for number, letter in enumerate("ab", start=1)}
FIRST = next(iter(NODES))
TIMEOUT = 20  # seconds after which a rank that does not answer ends the run
TOLERANCE = 1e-5  # of a weight in float32: sums of another order round differently
DPO_TRAIN = Path(sys.executable).parent / "dpo-train"


def ip(*words: str) -> str:
    """Run `ip` and return what it prints."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_nodes() -> Iterator[None]:
    """Within, there are two namespaces, joined by a cable; each end has the name of its node."""
    try:
        for node in NODES:
            ip("netns", "add", node)
        first, second = NODES
        ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for node, address in NODES.items():
            ip("-n", node, "address", "add", f"{address}/24", "dev", node)
            ip("-n", node, "link", "set", "lo", "up")
            ip("-n", node, "link", "set", node, "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], check=False, capture_output=True)


def bytes_sent() -> int:
    """Bytes that the two nodes have put on the cable."""
    links = [json.loads(ip("-n", node, "-json", "-statistics", "link", "show", node))[0] for node in NODES]
    return sum(int(link["stats64"]["tx"]["bytes"]) for link in links)


def launch(folder: Path, node: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start torchrun on a node; it logs to `folder`."""
    meeting = [f"--rdzv-endpoint={NODES[FIRST]}:29400", f"--rdzv-conf=is_host={int(node == FIRST)}"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    command = ["ip", "netns", "exec", node, *torchrun, *meeting, f"--local-addr={NODES[node]}", str(DPO_TRAIN), *words]
    with (folder / f"{node}.log").open("ab") as log:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": node, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def train_on_two(folder: Path, words: Sequence[str], cut_at: int = 0) -> list[int]:
    """The exit codes of the two nodes; after `cut_at` logged steps the cable is unplugged until one has ended."""
    nodes = [launch(folder, node, words) for node in NODES]
    metrics, end = folder / "two" / "metrics.jsonl", time.monotonic() + 400
    try:
        if cut_at:
            while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > cut_at) and still(nodes, end) == 2:
                time.sleep(0.02)
            ip("-n", FIRST, "link", "set", FIRST, "down")
            since = time.monotonic()
            while still(nodes, end) == 2:
                time.sleep(0.1)
            print(
                f"cable cut at step {cut_at}: a node ended after {time.monotonic() - since:.0f} s", end="", flush=True
            )
            # torchrun of the other node asks the first one, for minutes while there is no cable.
            ip("-n", FIRST, "link", "set", FIRST, "up")
        codes = [node.wait(end - time.monotonic()) for node in nodes]
        if cut_at:
            print(f", both after {time.monotonic() - since:.0f} s, with exit codes {codes}", flush=True)
        return codes
    except subprocess.TimeoutExpired:
        return [-1, -1]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)


def still(nodes: Sequence[subprocess.Popen[bytes]], end: float) -> int:
    """How many nodes run; none after `end`."""
    return sum(node.poll() is None for node in nodes) if time.monotonic() < end else 0


def losses(run: Path) -> list[float]:
    """The loss of every logged step."""
    return [record["loss"] for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def main(given: Sequence[str] | None = None) -> None:
    """Train twice, compare, and print one line; exit 1 where the weights differ or the nodes did not talk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cut", type=int, default=0, metavar="STEP", help="unplug the cable there, then resume")
    args = parser.parse_args(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are removed
    words = ["model=tiny", "model.dtype=float32", "data=sample", "data.eval_limit=8", "device=cpu", "optimizer.lr=1e-3"]
    words += [f"max_steps={args.steps}", "save_every=10"]
    with tempfile.TemporaryDirectory(prefix="two-nodes-") as name, two_nodes():
        folder = Path(name)
        single, two = folder / "single", folder / "two"
        subprocess.run([DPO_TRAIN, *words, f"output_dir={single}"], check=True, stdout=subprocess.DEVNULL)
        words += [f"engine={args.engine}", f"engine.timeout={TIMEOUT}", f"output_dir={two}", "resume=auto"]
        cut = train_on_two(folder, words, cut_at=args.cut) if args.cut else [1, 1]
        codes = train_on_two(folder, words)
        if codes != [0, 0] or not all(code > 0 for code in cut):
            for node in NODES:
                print(f"--- {node}", (folder / f"{node}.log").read_text()[-3000:], sep="\n")
            sys.exit(
                f"FAILED: the nodes ended with {codes}" + (f", with {cut} when the cable was cut" if args.cut else "")
            )
        adapters = [run / "final" / "adapter_model.safetensors" for run in (single, two)]
        one, other = map(load_file, adapters)
        weights = max(float((one[key] - other[key]).abs().max()) for key in one.keys() | other.keys())
        loss = max(abs(a - b) for a, b in zip(losses(single), losses(two), strict=True))
        sent, least = bytes_sent(), adapters[0].stat().st_size * args.steps // (2 if args.cut else 1)
        equal, talked = weights < TOLERANCE, sent > least
        print(
            f"{'ok' if equal and talked else 'FAILED'}: engine={args.engine} on two nodes against one process, "
            f"{args.steps} steps{', cut and resumed' if args.cut else ''}: largest difference of a weight "
            f"{weights:.1e}, of a loss {loss:.1e}; {sent / 2**20:.1f} MiB crossed the cable, gradients alone "
            f"{least / 2**20:.1f} MiB"
        )
        sys.exit(0 if equal and talked else 1)


if __name__ == "__main__":
    main()
