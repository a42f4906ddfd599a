#!/usr/bin/env bash
# Weight-only RTN, GPTQ and GPTVQ (1D, 2D, 4D) at about 2.125, 2.25 and 3.125 bits with error propagation; GPTQ and GPTVQ-2D also
# without it; GPTVQ-2D with QERA's low-rank factors, of ranks that make it 2.25 and 3.125 bits.
#   sweeps/gptvq.sh CONFIG TAG [--section.key=value ...]
#   RANKS   the two ranks, in 8-bit MXINT (default: "4 41", for SmolLM2-135M; stories15M takes "2 21")
codebooks=("2 1 256" "2 2 2048" "2 4 65536" "2 1 128" "2 2 1024" "2 4 32768" "3 1 512" "3 2 8192")
bits=(2 3)

source "$(dirname "$0")/common.sh"
weights_alone=(--quantize.activation=none --quantize.bias=none --quantize.attention=none
    --formats.x8="{ kind = 'mxint', bits = 8 }")
for b in "${bits[@]}"; do
    integers=("${weights_alone[@]}" --formats.q="{ kind = 'int', bits = $b, block_size = 128 }" --quantize.weight=q
        --quantize.low_rank.rank=0)
    run_one "rtn-int${b}g128" --quantize.method=none "${integers[@]}"
    run_one "gptq-int${b}g128" --quantize.method=gptq "${integers[@]}"
    run_one "gptq-int${b}g128-original" --quantize.method=gptq --quantize.propagate_error=false "${integers[@]}"
done
for codebook in "${codebooks[@]}"; do
    read -r b dimension size <<<"$codebook"
    vectors=("${weights_alone[@]}" --quantize.method=gptvq --quantize.weight=q
        --formats.q="{ kind = 'codebook', bits = $b, dimension = $dimension, group_size = $size }")
    run_one "gptvq-${b}b-${dimension}d-$size" "${vectors[@]}" --quantize.low_rank.rank=0
    if [ "$codebook" = "2 2 2048" ]; then
        run_one "gptvq-${b}b-${dimension}d-$size-original" "${vectors[@]}" --quantize.low_rank.rank=0 \
            --quantize.propagate_error=false
        for rank in ${RANKS:-4 41}; do
            run_one "gptvq-${b}b-${dimension}d-$size-r$rank" "${vectors[@]}" --quantize.low_rank.rank="$rank" \
                --quantize.low_rank.format=x8
        done
    fi
done
finish
