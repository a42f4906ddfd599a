"""End-to-end training of what a quantized checkpoint stores in floating point; its codes stay as they are."""
