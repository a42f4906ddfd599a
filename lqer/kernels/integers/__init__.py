"""Kernels for one token and for a few on integer codes, and their launches."""
