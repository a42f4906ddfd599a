"""Roundings: which of a number format's values each weight takes."""
