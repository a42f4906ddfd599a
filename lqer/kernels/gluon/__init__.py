"""Kernels in Gluon for four-bit codes and 33 tokens or more, on compute capability 9.0, and their launches."""
