"""How text is drawn unless someone says otherwise. The commands show it in their help, which does not wait for JAX."""

TEMPERATURE = 0.8
TOP_P = 0.95
MTP = "mtp"
"""In place of a draft model: the model's own modules of multi-token prediction."""
