#!/usr/bin/env bash
# Round-to-nearest (RTN) over weight and activation bits: the baseline of every method.
#   sweeps/baseline_no_lqer.sh CONFIG TAG [--section.key=value ...]
source "$(dirname "$0")/common.sh"
sweep baseline_no_lqer
