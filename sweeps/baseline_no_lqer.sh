#!/usr/bin/env bash
# Round-to-nearest (RTN) over weight and activation bits: the baseline of every method.
#   sweeps/baseline_no_lqer.sh CONFIG TAG [--section.key=value ...]
weights=(w4 w3 w2)
activations=(x8 x6 none)

source "$(dirname "$0")/common.sh"
for weight in "${weights[@]}"; do
    for activation in "${activations[@]}"; do
        run_one "$weight-$activation" --quantize.method=none --quantize.low_rank.rank=0 --quantize.weight="$weight" \
            --quantize.activation="$activation" --quantize.attention="$activation"
    done
done
finish
