"""Kernels on learned codebooks, and their launch."""
