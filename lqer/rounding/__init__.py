"""Roundings: which value of a number format each weight takes. Imports torch and lqer.formats only."""
