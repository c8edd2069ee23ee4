"""Defaults that the commands' help shows. They are here because it must not wait for JAX."""

# For sampling text.
TEMPERATURE = 0.8
TOP_P = 0.95
MTP = "mtp"
"""In place of a draft model: the model's own modules of multi-token prediction."""

MAX_SHARD_SIZE = "5GB"
"""Of files of weights that are written."""
