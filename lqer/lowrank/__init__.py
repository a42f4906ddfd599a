"""Low-rank reconstruction of a quantization error: solvers, and the scalings that choose what they minimise."""
