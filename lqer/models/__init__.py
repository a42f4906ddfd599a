"""Models before quantization: where they come from, their decoder blocks, and the loop over those."""
