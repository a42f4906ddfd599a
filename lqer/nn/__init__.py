"""Modules that replace the original ones in a quantized model: linears and attention."""
