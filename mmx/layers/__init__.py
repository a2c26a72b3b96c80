"""Layers: thin linen shells over pure functions."""
