"""The parts of experiments/benchmark_cluster.py."""
