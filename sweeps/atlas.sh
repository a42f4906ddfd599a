#!/usr/bin/env bash
# The atlas of CONFIG's model: every shipped method at two or three widths from 2 to 5 bits, under CONFIG's calibration
# text, seed and evaluation, ranked, with Pareto fronts over bits and over size. `lqer recommend CONFIG` reads it.
#   sweeps/atlas.sh CONFIG TAG [--section.key=value ...]
source "$(dirname "$0")/common.sh"
sweep atlas
