# Shared by the sweeps, which source it. Needs CONFIG and TAG from the command line of the sweep.
#   OUTPUT_DIR   where runs and the store go (default: the output_dir of CONFIG)
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
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}

# sweep NAME [--parameters.key=value ...]: every run of sweeps/NAME.toml; what is finished is not run again.
sweep() {
    local file=$root/sweeps/$1.toml
    shift
    [ "${KEEP_GOING:-0}" != 1 ] || set -- "$@" --keep_going=true
    exec "$python" "$root/experiments/sweep.py" "$file" "$config" "$tag" \
        ${OUTPUT_DIR:+--output_dir="$OUTPUT_DIR"} "$@" ${extra[@]+"${extra[@]}"}
}
