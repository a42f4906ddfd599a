#!/usr/bin/env bash
# Integer weights by every method from round-to-nearest to TesseraQ, and TesseraQ with low-rank factors.
#   sweeps/block_methods.sh CONFIG TAG [--section.key=value ...]
#   WEIGHTS    bits and group size, or "channel" for one group per row (default: 2g128 3channel)
#   STEPS      Adam steps per round of adaptive rounding (default: the published 250 and learning rates)
#   EPOCHS     epochs of learnable clipping (default: 20)
source "$(dirname "$0")/common.sh"
steps=${STEPS:-250}
# Few steps need larger learning rates (docs/methods/tesseraq.md).
rates=", learning_rate = 1e-3, scale_learning_rate = 1e-3"
[ "$steps" -ge 200 ] || rates=", learning_rate = 2e-2, scale_learning_rate = 1e-2"
sets=
for weight in ${WEIGHTS:-2g128 3channel}; do
    group=${weight#*g}
    [ "$group" != "$weight" ] || group="'row'"
    sets+="{ name = '$weight', formats.q = { bits = ${weight%%[gc]*}, block_size = $group } }, "
done
sweep block_methods --parameters.weights="[$sets]" --parameters.epochs="${EPOCHS:-20}" \
    --parameters.adaptive="{ kind = 'adaptive', steps = $steps$rates }"
