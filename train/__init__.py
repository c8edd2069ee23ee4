"""Recipes, one objective a file; each is run as `python -m train.NAME`, and read from top to bottom."""
