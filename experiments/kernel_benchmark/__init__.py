"""The parts of benchmark_kernels.py: plan, contenders, trials, timing, the decoder, and the report."""
