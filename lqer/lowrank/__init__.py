"""Low-rank reconstruction of a quantization error: metrics that say what an error costs, solvers that minimise it."""
