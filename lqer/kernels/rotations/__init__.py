"""Kernels that rotate tokens before and after products with lattice and trellis codes, and their launch."""
