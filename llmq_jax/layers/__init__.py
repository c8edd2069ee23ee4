"""One idea a file: the pieces from which every architecture is built.

Letters of shapes, in the whole project:
B batch, T query length, S key length, D model width, N query heads, K key/value heads, G = N/K, H head width,
F feed-forward width, E experts, L layers, R low rank, M rows that batch and time were made one axis of.

Two letters go by the place: V is the vocabulary, and in attention the width of values; C the classes of a classifier,
in GRPO the tokens of completions, and in latent attention the features that a cache keeps of a token. What one file
alone needs is told there.
"""
