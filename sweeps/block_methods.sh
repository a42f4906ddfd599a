#!/usr/bin/env bash
# Integer weights by every method from round-to-nearest to TesseraQ, and TesseraQ with low-rank factors.
#   sweeps/block_methods.sh CONFIG TAG [--section.key=value ...]
#   WEIGHTS    bits and group size, or "channel" for one group per row (default: 2g128 3channel)
#   STEPS      Adam steps per round of adaptive rounding (default: the published 250 and learning rates)
#   EPOCHS     epochs of learnable clipping (default: 20)
weights=(${WEIGHTS:-2g128 3channel})
steps=${STEPS:-250}
# Few steps need larger learning rates (docs/methods/tesseraq.md).
rates=", learning_rate = 1e-3, scale_learning_rate = 1e-3"
[ "$steps" -ge 200 ] || rates=", learning_rate = 2e-2, scale_learning_rate = 1e-2"
adaptive="{ kind = 'adaptive', steps = $steps$rates }"
lwc="[{ kind = 'lwc', epochs = ${EPOCHS:-20} }]"

source "$(dirname "$0")/common.sh"
for weight in "${weights[@]}"; do
    group=${weight#*g}
    [ "$group" != "$weight" ] || group="'row'"
    common=(--formats.q="{ kind = 'int', bits = ${weight%%[gc]*}, block_size = $group }" --quantize.weight=q
        --quantize.method=none --quantize.low_rank.rank=0
        --quantize.activation=none --quantize.bias=none --quantize.attention=none)
    run_one "int$weight-rtn" "${common[@]}" --quantize.rounding=nearest --quantize.transforms='[]'
    run_one "int$weight-gptq" "${common[@]}" --quantize.rounding=gptq --quantize.transforms='[]' --quantize.propagate_error=true
    run_one "int$weight-awq" "${common[@]}" --quantize.rounding=nearest --quantize.transforms="['awq', 'clip']"
    run_one "int$weight-omniquant" "${common[@]}" --quantize.rounding=nearest --quantize.transforms="$lwc"
    run_one "int$weight-tesseraq" "${common[@]}" --quantize.rounding="$adaptive" --quantize.transforms="['awq', 'clip']"
    run_one "int$weight-tesseraq-r32" "${common[@]}" --quantize.rounding="$adaptive" --quantize.transforms="['awq', 'clip']" \
        --quantize.method=qera-exact --quantize.low_rank.rank=32 --quantize.low_rank.format=none
done
finish
