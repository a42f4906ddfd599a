"""The parts of experiments/benchmark_pipeline.py."""
