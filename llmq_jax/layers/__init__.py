"""One idea a file: the pieces from which every architecture is built.

Letters of shapes, in the whole project:
B batch, T query length, S key length, D model width, N query heads, K key/value heads, G = N/K, H head width,
F feed-forward width, E experts, L layers, R low rank, M rows (batch and time flattened into one axis).

Two letters depend on the context: V is the vocabulary, and in attention the width of values; C is the classes of a
classifier, in GRPO the tokens of completions, and in latent attention the features that a cache holds per token. A
file that needs other letters defines them itself.
"""

import llmq_jax.layers.bfloat16_on_cpu  # noqa: F401  # replaces lowering rules
