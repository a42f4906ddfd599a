"""Kernels and modules for all experts of a layer."""
