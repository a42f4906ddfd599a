"""The parts of benchmark_kernels.py: plan, contenders, trials, timing, and the report."""
