"""Memory layouts of packed weights: integer codes, integers in groups, codebooks, lattice and trellis codes."""
