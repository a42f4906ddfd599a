"""Transforms: the basis or scale in which a weight is rounded. Pure functions; torch only."""
