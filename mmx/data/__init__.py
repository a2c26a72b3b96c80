"""Tokens in: sources, mixture, packing, batches."""
