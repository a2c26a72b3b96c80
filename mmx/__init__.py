"""mmx: study, ablate, scale and serve MiniMax-class models in JAX."""

__version__ = '0.1.0'
