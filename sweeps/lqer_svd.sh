#!/usr/bin/env bash
# LQER: truncated SVD of the rounding error, over bits and ranks.
#   sweeps/lqer_svd.sh CONFIG TAG [--section.key=value ...]
weights=(w4 w3 w2)
ranks=(32 64)

source "$(dirname "$0")/common.sh"
for weight in "${weights[@]}"; do
    for rank in "${ranks[@]}"; do
        run_one "$weight-r$rank" --quantize.method=lqer-svd --quantize.weight="$weight" --quantize.low_rank.rank="$rank"
    done
done
finish
