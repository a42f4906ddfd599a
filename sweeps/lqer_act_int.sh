#!/usr/bin/env bash
# L2QER on integer weights with a scale and a zero point per group, and on MXINT with groups of 128, the paper's INT.
#   sweeps/lqer_act_int.sh CONFIG TAG [--section.key=value ...]
bits=(4 3)
groups=(128)
ranks=(32 64)

source "$(dirname "$0")/common.sh"
for b in "${bits[@]}"; do
    for group in "${groups[@]}"; do
        for rank in "${ranks[@]}"; do
            run_one "int${b}g$group-r$rank" --formats.q="{ kind = 'int', bits = $b, block_size = $group }" \
                --quantize.method=lqer-act --quantize.weight=q --quantize.low_rank.rank="$rank"
            run_one "mxint${b}g$group-r$rank" --formats.q="{ kind = 'mxint', bits = $b, block_size = $group }" \
                --quantize.method=lqer-act --quantize.weight=q --quantize.low_rank.rank="$rank"
        done
    done
done
finish
