"""Converters between this project's checkpoints and the formats of others; each is run as `python -m convert.NAME`."""
