# Shared by the sweeps, which source it. Needs CONFIG and TAG from the command line of the sweep.
#   OUTPUT_DIR   where runs and the store go (default: checkpoints)
#   PYTHON       the interpreter (default: .venv/bin/python of this checkout, else python)
#   KEEP_GOING   1: continue after a failed combination and fail at the end
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ]; then
    echo "usage: ${0##*/} CONFIG TAG [--section.key=value ...]" >&2
    exit 2
fi
config=$1 tag=$2
shift 2
extra=("$@")
output_dir=${OUTPUT_DIR:-checkpoints}
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
failed=()

# run_one NAME --section.key=value ...: one combination; finished artifacts are reused.
run_one() {
    local name=$tag-$1
    shift
    echo "== $name"
    if ! "$python" "$root/experiments/pipeline.py" "$config" "$name" --output_dir="$output_dir" "$@" ${extra[@]+"${extra[@]}"}; then
        [ "${KEEP_GOING:-0}" = 1 ] || exit 1
        failed+=("$name")
    fi
}

# The table of all combinations, and a non-zero status if any failed.
finish() {
    "$python" "$root/experiments/collect_results.py" "$output_dir" --match "$tag-*" --out "$output_dir/$tag-table"
    if [ ${#failed[@]} -gt 0 ]; then
        echo "failed: ${failed[*]}" >&2
        exit 1
    fi
}
