"""Sweeps on two nodes by sweeps/slurm_cluster.sh: namespaces of Linux in place of machines, scripts in place of SLURM.

    python tests/campaigns/nodes.py          as root, with Ray and the commands ip, nsenter and unshare

A node has its own processes, address, host name and folder of Ray; the disk is common to both, as a shared file system
is. Cases: nobody is disturbed; the second node is lost, and the sweep goes on without it; all nodes are lost, as where
SLURM ends a job because of one, and the job is submitted again. Each ends with the store of one process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from workbench import ROOT, Tally, artifacts, write_inputs

INSIDE = "--inside"
OWN = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
NAMES = ("node1", "node2")
# The first process of a node, which has to bury those whose parents have ended.
FIRST = """
import os, time
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.05)
"""
SBATCH = """#!/usr/bin/env bash
for option in "$@"; do case $option in --wrap=*) body=${option#--wrap=} ;; esac; done
SLURM_JOB_NODELIST='node[1-2]' sh -c "$body"
"""
SCONTROL = "#!/usr/bin/env bash\nprintf 'node1\\nnode2\\n'\n"
# As srun does, its status is the largest of the tasks'.
SRUN = """#!/usr/bin/env bash
for node in $NODE_PIDS; do nsenter -t "$node" -n -m -u -p "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || { code=$?; worst=$((code > ${worst:-0} ? code : worst)); }; done
exit "${worst:-0}"
"""
SWEEP = """
[[run]]
name = "lqer"
set = { quantize = { method = "lqer-act", low_rank.rank = 4 } }
[[run]]
name = "gptq"
set = { quantize = { method = "gptq", weight = "w4g128" } }
[[run]]
name = "qera"
set = { quantize = { method = "qera-exact", low_rank.rank = 4 } }
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "PYTHON": sys.executable,
    "RAY": str(Path(sys.executable).with_name("ray")), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT), "NODES": "2",
}  # fmt: skip
# The nodes that are lost.
CASES = {"nobody is disturbed": (), "a node is lost": (1,), "all nodes are lost": (0, 1)}
KILLED = 128 + signal.SIGKILL
LONGEST_S = 400


@contextmanager
def two_nodes() -> Iterator[list[int]]:
    """The first process of each node; what still runs on one at the end is killed."""
    nodes, first = [], []
    for name in NAMES:
        start = f'hostname {name} && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$0" -c "$1"'
        nodes.append(subprocess.Popen([*OWN, "--uts", "sh", "-c", start, sys.executable, FIRST]))
    for node in nodes:
        while not (children := psutil.Process(node.pid).children()):
            time.sleep(0.05)
        first.append(children[0].pid)
    try:
        # A switch of its own, since a wire from one node to the other would end with either.
        _ip("link add switch type bridge")
        _ip("link set switch up")
        for number, node in enumerate(first, 1):
            # Named by the process, since what led to a lost node may be there for a while.
            _ip(f"link add to{node} type veth peer name eth0 netns {node}")
            _ip(f"link set to{node} master switch up")
            _ip(f"addr add 10.9.0.{number}/24 dev eth0", node)
            _ip("link set eth0 up", node)
            _ip("link set lo up", node)
        yield first
    finally:
        for node in nodes:
            node.kill()
            node.wait()
        _ip("link del switch")


def _ip(command: str, node: int | None = None) -> None:
    """Change the network of a node, or what joins the nodes."""
    there = [] if node is None else ["nsenter", "-t", str(node), "-n"]
    subprocess.run([*there, "ip", *command.split()], check=True)


def submit(folder: Path, arguments: Sequence[str], nodes: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start the script of a sweep; its output goes into `folder`/log."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "NODE_PIDS": " ".join(map(str, nodes))}
    environment = {**os.environ, **ENVIRONMENT, **paths, "OUTPUT_DIR": str(folder / "out")}
    with (folder / "log").open("ab") as log:
        command = [str(ROOT / "sweeps/slurm_cluster.sh"), *arguments, "--cluster.cpus_per_job=1"]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_for(output: Path, name: str, job: subprocess.Popen[bytes]) -> None:
    """Until there is a file or folder of that name in the store, or the job has ended."""
    while job.poll() is None and not any((output / "store").glob(name)):
        time.sleep(0.05)


def run(folder: Path, arguments: Sequence[str], victims: Sequence[int]) -> int:
    """The exit status of a job that loses nodes once a block is quantized."""
    with two_nodes() as nodes:
        job = submit(folder, arguments, nodes)
        if victims:
            wait_for(folder / "out", "quantize-*.partial/block-*", job)
        for victim in victims:
            os.kill(nodes[victim], signal.SIGKILL)
        return job.wait(LONGEST_S)


def wrong(found: Mapping[str, object], expected: Mapping[str, object]) -> str | None:
    """How what a store has differs from what one process makes; None where it does not."""
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return f"{names[0]} is not that of one process" if names else None


def campaign(folder: Path) -> Tally:
    inputs = write_inputs(folder / "inputs", windows=32)
    (folder / "sweep.toml").write_text(SWEEP)
    arguments = [str(folder / "sweep.toml"), str(inputs / "tiny.toml"), "tag", "--device=cpu"]
    alone = [sys.executable, str(ROOT / "experiments/sweep.py"), *arguments, f"--output_dir={folder / 'alone'}"]
    subprocess.run(alone, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True)
    expected = artifacts(folder / "alone" / "store")
    tally = Tally()
    for case, victims in CASES.items():
        place = folder / case.replace(" ", "-")
        place.mkdir()
        status = run(place, arguments, victims)
        if len(victims) == len(NAMES):
            # SLURM submits it again.
            status = run(place, arguments, ())
        # That of a task that was killed, whatever becomes of the others.
        awaited = KILLED if 0 < len(victims) < len(NAMES) else 0
        problem = f"exit {status}" if status != awaited else wrong(artifacts(place / "out" / "store"), expected)
        if problem is None:
            log = (place / "log").read_text(errors="replace")
            tally.add(case, "done again" if "its worker was lost" in log else "right")
        else:
            tally.fail(case, case, f"{problem}: {place / 'log'}")
    return tally


def main() -> None:
    if INSIDE not in sys.argv:
        # What is mounted and connected here is nobody else's, and ends with this process.
        os.execvp(OWN[0], [*OWN, sys.executable, __file__, INSIDE])
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))
    hosts = "127.0.0.1 localhost\n" + "".join(f"10.9.0.{i} {name}\n" for i, name in enumerate(NAMES, 1))
    (folder / "hosts").write_text(hosts)
    subprocess.run(["mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
    tally = campaign(folder)
    print(tally.table())
    if tally.failures:
        sys.exit(1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
