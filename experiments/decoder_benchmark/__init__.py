"""The parts of benchmark_decoder.py: the models, their compiled step, and the worker that times them."""
