"""Defaults for sampling text. They are here because the commands' help shows them, and must not wait for JAX."""

TEMPERATURE = 0.8
TOP_P = 0.95
MTP = "mtp"
"""In place of a draft model: the model's own modules of multi-token prediction."""
