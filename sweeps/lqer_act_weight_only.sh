#!/usr/bin/env bash
# Weight-only L2QER (activations, biases, attention, A and B in half precision), over bits and ranks.
#   sweeps/lqer_act_weight_only.sh CONFIG TAG [--section.key=value ...]
source "$(dirname "$0")/common.sh"
sweep lqer_act_weight_only
