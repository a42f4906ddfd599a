#!/usr/bin/env bash
# A sweep on several nodes, as one SLURM job: Ray on every node, the sweep on the first (docs/cluster.md).
#   sweeps/slurm_cluster.sh SWEEP CONFIG TAG [--section.key=value ...]
#   NODES        number of nodes (default: 2)
#   OUTPUT_DIR   where runs, store and log go: a folder that every node sees (default: checkpoints)
#   SBATCH       sbatch and its options, such as "sbatch --partition=gpu --gres=gpu:8 --time=8:00:00" (default: sbatch)
#   RAY          the command of Ray (default: .venv/bin/ray of this checkout, else ray)
# Rerun the same command to resume.
if [ $# -lt 3 ]; then
    echo "usage: ${0##*/} SWEEP CONFIG TAG [--section.key=value ...]" >&2
    exit 2
fi
sweep_file=$1
shift
source "$(dirname "$0")/common.sh"
nodes=${NODES:-2}
output_dir=${OUTPUT_DIR:-checkpoints}
ray=${RAY:-$([ -x "$root/.venv/bin/ray" ] && echo "$root/.venv/bin/ray" || echo ray)}
read -ra sbatch <<< "${SBATCH:-sbatch}"

if ! [[ $nodes =~ ^[1-9][0-9]*$ ]]; then
    echo "NODES must be a number of nodes, 1 or more; found '$nodes'" >&2
    exit 2
fi
if ! command -v "${sbatch[0]}" > /dev/null; then
    echo "${sbatch[0]}: no such command; without SLURM, start Ray yourself and pass --cluster.address=auto" >&2
    exit 2
fi
# SLURM copies the script and runs the copy elsewhere: the command must be complete. OUTPUT_DIR is a folder of all nodes.
printf -v task '%q ' "$python" "$root/experiments/sweep.py" "$sweep_file" "$config" "$tag" --output_dir="$output_dir" \
    --cluster.address=auto --cluster.store=shared ${extra[@]+"${extra[@]}"}
printf -v start '%q ' "$ray" symmetric-run --min-nodes "$nodes"
# symmetric-run itself calls `ray start` and `ray stop`, by name.
printf -v path '%q' "$(dirname "$ray")"
mkdir -p "$output_dir/slurm"
# Nodes for this job alone: `ray stop` ends whatever Ray of the user runs on them.
# A job that SLURM starts again, as after the loss of a node, goes on where it was.
"${sbatch[@]}" --job-name="$tag" --requeue --open-mode=append --nodes="$nodes" --ntasks-per-node=1 --exclusive \
    --output="$output_dir/slurm/$tag-%j.log" \
    --wrap="head=\$(scontrol show hostnames \"\$SLURM_JOB_NODELIST\" | head -n 1); export PATH=$path:\$PATH; srun $start --address \"\$head:6379\" -- $task"
