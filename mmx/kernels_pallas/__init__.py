"""Hot spots: oracles in reference.py, one file per kernel, choice of implementation in api.py."""
