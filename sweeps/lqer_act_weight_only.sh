#!/usr/bin/env bash
# Weight-only L2QER (activations, biases, attention, A and B in half precision), over bits and ranks.
#   sweeps/lqer_act_weight_only.sh CONFIG TAG [--section.key=value ...]
weights=(w4 w3 w2)
ranks=(32 64)

source "$(dirname "$0")/common.sh"
for weight in "${weights[@]}"; do
    for rank in "${ranks[@]}"; do
        run_one "$weight-r$rank" --quantize.method=lqer-act --quantize.weight="$weight" \
            --quantize.activation=none --quantize.bias=none --quantize.attention=none \
            --quantize.low_rank.rank="$rank" --quantize.low_rank.format=none
    done
done
finish
