#!/usr/bin/env bash
# L2QER: MXINT weights and activations, rounding error scaled by activation magnitudes, over bits and ranks.
#   sweeps/lqer_act.sh CONFIG TAG [--section.key=value ...]
weights=(w4 w3 w2)
activations=(x8 x6)
ranks=(32 64)

source "$(dirname "$0")/common.sh"
for weight in "${weights[@]}"; do
    for activation in "${activations[@]}"; do
        for rank in "${ranks[@]}"; do
            run_one "$weight$activation-r$rank" --quantize.method=lqer-act --quantize.weight="$weight" \
                --quantize.activation="$activation" --quantize.attention="$activation" \
                --quantize.low_rank.rank="$rank" --quantize.low_rank.format="$activation"
        done
    done
done
finish
