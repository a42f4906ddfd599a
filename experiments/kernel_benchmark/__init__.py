"""The parts of benchmark_kernels.py: rows and bars, contenders, timing, the decoder, and how the result is written."""
