#!/usr/bin/env bash
# L2QER on integer weights with a scale and a zero point per group, and on MXINT with groups of 128, the paper's INT.
#   sweeps/lqer_act_int.sh CONFIG TAG [--section.key=value ...]
source "$(dirname "$0")/common.sh"
sweep lqer_act_int
