"""Texts by name, and the token windows that are read from them."""
