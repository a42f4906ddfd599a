#!/usr/bin/env bash
# Weight-only RTN, GPTQ and GPTVQ (1D, 2D, 4D) at about 2.125, 2.25 and 3.125 bits; GPTVQ-2D with low-rank factors.
#   sweeps/gptvq.sh CONFIG TAG [--section.key=value ...]
#   RANKS   the ranks of the factors (default: "4 41", for SmolLM2-135M; stories15M takes "2 21")
source "$(dirname "$0")/common.sh"
sweep gptvq ${RANKS:+--parameters.ranks="[${RANKS// /, }]"}
