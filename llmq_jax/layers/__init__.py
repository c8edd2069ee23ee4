"""One idea a file: the pieces from which every architecture is built.

One alphabet of shapes serves the whole project:
B batch, T query length, S key length, D model width, N query heads, K key/value heads, G = N/K, H head width,
F feed-forward width, E experts, C expert capacity, V vocabulary, L layers, R low rank.
"""
