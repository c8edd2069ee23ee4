"""The layers of a decoder as groups of repeating patterns, which are compiled once each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flax import linen as nn

from llmq_jax.layers.moe import Experts


@dataclass(frozen=True)
class LayerGroup:
    """`repeats` repetitions of a pattern of blocks, each given by its constructor."""

    blocks: tuple[Callable[..., nn.Module], ...]
    repeats: int


def layers_in_groups(
    block: Callable[..., nn.Module], layers: int, experts: Experts | None, **by_layer: Sequence[Any]
) -> tuple[LayerGroup, ...]:
    """Groups of layers that differ only in these arguments of the block: `experts`, for the layers that
    `experts.in_layer` names, and those in `by_layer`, one value per layer, as in `window=(512, 512, None)`. None leaves
    an argument at the block's default."""
    with_experts = [experts if experts is not None and experts.in_layer(layer) else None for layer in range(layers)]
    by_layer = {"experts": with_experts, **by_layer}
    kinds = tuple(  # each layer's arguments
        {name: value for name, value in zip(by_layer, values, strict=True) if value is not None}
        for values in zip(*by_layer.values(), strict=True)
    )
    return tuple(
        LayerGroup(tuple(partial(block, **kind) for kind in pattern), repeats)
        for pattern, repeats in repeating_patterns(kinds)
    )


def repeating_patterns(kinds: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], int]]:
    """Kinds of layers as repeating patterns, [(pattern, repeats)]: greedily, each time the pattern whose repetitions
    cover most of the layers that are left.

    26 layers of Gemma 3 are 4 times six and 2 times one. Layers that repeat nowhere are patterns of one.
    """

    def repeats(length: int) -> int:
        count = 1
        while kinds[count * length : (count + 1) * length] == kinds[:length]:
            count += 1
        return count

    def covered(length: int) -> int:
        count = repeats(length)
        return length * count if count > 1 or length == 1 else 0

    patterns = []
    while kinds:
        best = 1
        for length in range(2, len(kinds) // 2 + 1):
            if covered(best) == len(kinds):  # nothing covers more
                break
            best = length if covered(length) > covered(best) else best
        patterns.append((kinds[:best], repeats(best)))
        kinds = kinds[best * repeats(best) :]
    return patterns
