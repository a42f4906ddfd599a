"""Kernels on E8P lattice codes, and their launches."""
