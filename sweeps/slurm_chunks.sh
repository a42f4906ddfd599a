#!/usr/bin/env bash
# One experiment in chunks, as a SLURM job array: task i of n quantizes the i-th chunk of the decoder blocks (--chunk i/n).
#   sweeps/slurm_chunks.sh CONFIG TAG [--section.key=value ...]
#   CHUNKS       number of chunks, one task each (default: 4)
#   OUTPUT_DIR   where the run, its store and its logs go (default: checkpoints)
#   SBATCH       sbatch and its options, such as "sbatch --partition=gpu --gres=gpu:1 --time=4:00:00" (default: sbatch)
# The tasks use one store under OUTPUT_DIR, which every node must see; their logs are in OUTPUT_DIR/slurm. The first task
# calibrates while the others wait; the last one evaluates and writes the report. Rerun the same command to resume.
source "$(dirname "$0")/common.sh"
chunks=${CHUNKS:-4}
output_dir=${OUTPUT_DIR:-checkpoints}
read -ra sbatch <<< "${SBATCH:-sbatch}"

if ! [[ $chunks =~ ^[1-9][0-9]*$ ]]; then
    echo "CHUNKS must be a number of chunks, 1 or more; found '$chunks'" >&2
    exit 2
fi
if ! command -v "${sbatch[0]}" > /dev/null; then
    echo "${sbatch[0]}: no such command; without SLURM, start the chunks yourself: experiments/pipeline.py --chunk 1/$chunks ..." >&2
    exit 2
fi
# SLURM copies the script and runs the copy elsewhere: the command of a task must be complete.
printf -v task '%q ' "$python" "$root/experiments/pipeline.py" "$config" "$tag" --output_dir="$output_dir" ${extra[@]+"${extra[@]}"}
mkdir -p "$output_dir/slurm"
# A task that SLURM starts again, as after the loss of a node, goes on where it was.
"${sbatch[@]}" --job-name="$tag" --requeue --open-mode=append --array="1-$chunks" \
    --output="$output_dir/slurm/$tag-%A_%a.log" \
    --wrap="$task --chunk \$SLURM_ARRAY_TASK_ID/$chunks"
