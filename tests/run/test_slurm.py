"""What SLURM runs: one experiment as a job array, whose tasks together do what one process does; a sweep on nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lqer.config import read_config
from lqer.run import pipeline

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "sweeps/slurm_chunks.sh"

# Takes the options that the script uses, notes them, and runs the tasks of the array all at once, as SLURM does.
SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS"
for option in "$@"; do
    case $option in
        --array=*) array=${option#--array=} ;;
        --output=*) output=${option#--output=} ;;
        --wrap=*) body=${option#--wrap=} ;;
    esac
done
for (( i = ${array%-*}; i <= ${array#*-}; i++ )); do
    log=${output//%A/1}
    SLURM_ARRAY_TASK_ID=$i sh -c "$body" > "${log//%a/$i}" 2>&1 &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || failed=1; done
exit ${failed:-0}
"""


@pytest.fixture
def sbatch(tmp_path: Path) -> Path:
    path = tmp_path / "sbatch"
    path.write_text(SBATCH)
    path.chmod(0o755)
    return path


def submit(sbatch: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    calls = sbatch.with_name("calls.txt")
    done = subprocess.run(
        [str(SCRIPT), *arguments],
        env=os.environ
        | {"PYTHON": sys.executable, "SBATCH": f"{sbatch} --partition=gpu", "CALLS": str(calls)}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_the_tasks_of_the_array_end_with_what_one_process_makes(experiment, sbatch, tmp_path):
    done, options = submit(sbatch, str(experiment.config), "shared", CHUNKS="2", OUTPUT_DIR=str(experiment.output))
    logs = [path.read_text() for path in sorted((experiment.output / "slurm").glob("shared-1_*.log"))]
    assert done.returncode == 0, logs
    assert options[:5] == [
        "--partition=gpu", "--job-name=shared", "--requeue", "--open-mode=append", "--array=1-2",
    ]  # fmt: skip
    assert len(logs) == 2
    assert any("perplexity" in log for log in logs)
    found = json.loads((experiment.output / "shared/results.json").read_text())
    alone = pipeline.run(read_config(experiment.config, "alone", [f"--output_dir={tmp_path / 'elsewhere'}"]))
    assert found["perplexity"] == alone["perplexity"]
    assert found["bits"] == alone["bits"]


def test_what_is_said_reaches_every_task_word_by_word(sbatch, tmp_path):
    """The interpreter of this test notes the words it is called with."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$NOTES/$SLURM_ARRAY_TASK_ID"\n')
    python.chmod(0o755)
    dataset = "--calibration.dataset={ path = 'my text.txt', rows = \"$x\" }"
    runs = tmp_path / "my runs"
    done, _ = submit(
        sbatch, "a b.toml", "tag", dataset, CHUNKS="3", PYTHON=str(python), OUTPUT_DIR=str(runs), NOTES=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    for index in (1, 2, 3):
        words = (tmp_path / str(index)).read_text().splitlines()
        assert words[1:] == ["a b.toml", "tag", f"--output_dir={runs}", dataset, "--chunk", f"{index}/3"]


@pytest.mark.parametrize(
    ("arguments", "environment", "part"),
    [
        (["some.toml"], {}, "usage: slurm_chunks.sh CONFIG TAG"),
        (["some.toml", "tag"], {"CHUNKS": "0"}, "CHUNKS must be a number of chunks, 1 or more; found '0'"),
        (["some.toml", "tag"], {"SBATCH": "no-such-sbatch --x"}, "no-such-sbatch: no such command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_submits_nothing(sbatch, tmp_path, arguments, environment, part):
    done, calls = submit(sbatch, *arguments, OUTPUT_DIR=str(tmp_path / "runs"), **environment)
    assert done.returncode == 2
    assert part in done.stderr
    assert done.stderr.count("\n") == 1
    assert calls == []
    assert not (tmp_path / "runs").exists()


# Runs the script of a job, as its first node does.
ONE_JOB = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS"
for option in "$@"; do case $option in --wrap=*) body=${option#--wrap=} ;; esac; done
SLURM_JOB_NODELIST='node[1-2]' sh -c "$body"
"""


def test_a_sweep_on_nodes_starts_ray_on_each_with_the_head_of_the_job(tmp_path):
    commands = {
        "sbatch": ONE_JOB,
        "scontrol": "#!/usr/bin/env bash\nprintf 'node1\\nnode2\\n'\n",
        # symmetric-run calls Ray by name.
        "srun": '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$NOTES"\nprintf "%s\\n" "${PATH%%:*}" > "$NOTES.path"\n',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "NOTES": str(tmp_path / "notes"),
        "NODES": "2", "OUTPUT_DIR": str(tmp_path / "out"), "PYTHON": "python", "RAY": "/opt/its venv/bin/ray",
    }  # fmt: skip
    arguments = ["sweeps/atlas.toml", "a b.toml", "tag", "--calibration.dataset={ rows = '$x' }"]
    command = [str(ROOT / "sweeps/slurm_cluster.sh"), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[:6] == [
        "--job-name=tag", "--requeue", "--open-mode=append", "--nodes=2", "--ntasks-per-node=1", "--exclusive",
    ]  # fmt: skip
    words = (tmp_path / "notes").read_text().splitlines()
    assert (tmp_path / "notes.path").read_text() == "/opt/its venv/bin\n"
    assert words[:7] == ["/opt/its venv/bin/ray", "symmetric-run", "--min-nodes", "2", "--address", "node1:6379", "--"]
    assert words[7:] == [
        "python", str(ROOT / "experiments/sweep.py"), "sweeps/atlas.toml", "a b.toml", "tag",
        f"--output_dir={tmp_path / 'out'}", "--cluster.address=auto", "--cluster.store=shared",
        "--calibration.dataset={ rows = '$x' }",
    ]  # fmt: skip
