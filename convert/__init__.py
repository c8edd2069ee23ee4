"""Converters between this project's checkpoints and the formats of others, each run as `python -m convert.NAME`.

`parity` compares a model with its PyTorch counterpart; the modules whose names begin with `parity_` are its parts.
"""
