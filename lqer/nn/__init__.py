"""Modules that take the place of the original ones in a quantized model."""
