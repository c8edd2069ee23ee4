"""A part of a finite sequence of batches, for when all of them would take too long."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmq_jax.errors import BadInput


@dataclass(frozen=True, eq=False)
class SomeBatches:
    """At most `most` of the batches, spread evenly over all of them, the same ones each time."""

    batches: Any
    """Has a length, and is indexed by 0, 1, ..."""
    most: int | None = None
    """None: all of them."""

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise BadInput(f"most is {self.most} and must be at least 1, or None for all")

    def __len__(self) -> int:
        return len(self.batches) if self.most is None else min(self.most, len(self.batches))

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self.batches[index * len(self.batches) // len(self)]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))
