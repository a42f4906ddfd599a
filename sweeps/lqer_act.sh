#!/usr/bin/env bash
# L2QER: MXINT weights and activations, rounding error scaled by activation magnitudes, over bits and ranks.
#   sweeps/lqer_act.sh CONFIG TAG [--section.key=value ...]
source "$(dirname "$0")/common.sh"
sweep lqer_act
