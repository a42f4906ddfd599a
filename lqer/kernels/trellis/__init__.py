"""Kernels on trellis codes, and their launches."""
