"""The parts of locate_harm.py: the model with its texts, quantized weights, and what is measured of them."""
