#!/usr/bin/env bash
# LQER: truncated SVD of the rounding error, over bits and ranks.
#   sweeps/lqer_svd.sh CONFIG TAG [--section.key=value ...]
source "$(dirname "$0")/common.sh"
sweep lqer_svd
