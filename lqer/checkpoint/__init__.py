"""The quantized checkpoint: written per decoder block, loaded as a transformers model."""
