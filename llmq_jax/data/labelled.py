"""Texts with a label each, for a classifier: reading, removing duplicates, balancing, splitting, weights of classes.

Everything random is chosen by a seed and by the number of examples of each class alone, whatever the version of numpy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from llmq_jax.data.records import Record, no_field, read_records
from llmq_jax.data.splits import seeded_order
from llmq_jax.errors import BadInput


@dataclass(frozen=True)
class LabelledTexts:
    """`texts[i]` is of the class `names[labels[i]]`."""

    texts: list[str]
    labels: list[int]
    names: tuple[str, ...]

    def __post_init__(self):
        if len(self.texts) != len(self.labels):
            raise BadInput(f"there are {len(self.texts)} texts and {len(self.labels)} labels: give each text one")
        if len(self.names) < 2:
            only = f", {self.names[0]!r}" if self.names else ""
            raise BadInput(f"a classifier tells classes apart, and there is only {len(self.names)}{only}: give two")
        if outside := [label for label in self.labels if not 0 <= label < len(self.names)]:
            raise BadInput(f"label {outside[0]} is none of the {len(self.names)} classes, which count from 0")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> "LabelledTexts":
        """Those examples, in that order."""
        indices = list(indices)
        return LabelledTexts([self.texts[i] for i in indices], [self.labels[i] for i in indices], self.names)

    def counts(self) -> list[int]:
        """Examples of each class."""
        return np.bincount(self.labels, minlength=len(self.names)).tolist() if self.labels else [0] * len(self.names)

    def without_duplicates(self) -> "Deduplicated":
        """The first example of every text, to be called before splitting: else what is learned is in the test too.

        Texts are the same if they are to the character. A text that occurs under two labels teaches and tests nothing,
        so that all its examples go.
        """
        first: dict[str, int] = {}
        contradicted = set()
        for index, (text, label) in enumerate(zip(self.texts, self.labels, strict=True)):
            if self.labels[first.setdefault(text, index)] != label:
                contradicted.add(text)
        kept = self.take(index for text, index in first.items() if text not in contradicted)
        contradictory = sum(text in contradicted for text in self.texts)
        return Deduplicated(kept, len(self) - len(kept) - contradictory, contradictory)

    def balanced(self, seed: int = 0) -> "LabelledTexts":
        """As many examples of each class as the smallest has, chosen by the seed, in their order."""
        least = self._least()
        chosen = [self._of_class(label)[seeded_order(count, [seed, label])[:least]] for label, count in self._counted()]
        return self.take(np.sort(np.concatenate(chosen)).tolist())

    def stratified_split(
        self, fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
    ) -> tuple["LabelledTexts", ...]:
        """Parts that each hold their fraction of every class, and at least one example; each in its order.

        Raises BadInput for fractions that do not add up to 1, and for a class with too few examples.
        """
        if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise BadInput(f"the fractions of a split must be positive and add up to 1, not {list(fractions)}")
        parts: list[list[int]] = [[] for _ in fractions]
        for label, count in self._counted():
            # The first part, that to learn from, takes what rounding leaves over.
            others = [max(1, round(fraction * count)) for fraction in fractions[1:]]
            if count <= sum(others):
                raise BadInput(
                    f"class {self.names[label]!r} has {count} examples, too few for {len(fractions)} parts of "
                    f"{', '.join(map(str, fractions))}: give more of them, or leave the class out"
                )
            members = self._of_class(label)[seeded_order(count, [seed, label])]
            ends = np.cumsum([count - sum(others), *others])[:-1]
            for part, chosen in zip(parts, np.split(members, ends), strict=True):
                part.extend(chosen.tolist())
        return tuple(self.take(sorted(part)) for part in parts)

    def class_weights(self) -> Float[np.ndarray, " classes"]:
        """Weights inverse to the frequency of each class, 1 on average over the examples."""
        self._least()
        return (len(self) / (len(self.names) * np.array(self.counts()))).astype(np.float32)

    def _of_class(self, label: int) -> np.ndarray:
        return np.flatnonzero(np.array(self.labels) == label)

    def _counted(self) -> Iterable[tuple[int, int]]:
        return enumerate(self.counts())

    def _least(self) -> int:
        counts = self.counts()
        if min(counts) == 0:
            raise BadInput(f"class {self.names[counts.index(0)]!r} has no example: give some, or leave the class out")
        return min(counts)


class Deduplicated(NamedTuple):
    kept: LabelledTexts
    repeated: int
    """Examples that went because an equal one, label included, came before."""
    contradictory: int
    """Examples that went because their text occurs under several labels."""


def read_labelled(
    path: str | Path,
    text_field: str = "text",
    label_field: str = "label",
    columns: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> LabelledTexts:
    """The examples of a file of records (see `read_records`, which also says what `columns` is for), in order.

    Labels are strings or whole numbers; the classes are in the order of the numbers, or of the alphabet. `names` gives
    classes and order instead, as for a second file: a label that is none of them is refused.
    Raises BadInput for an empty text or label, and for fewer than two classes.
    """
    records = read_records(path, columns)
    texts = [_text(record, text_field) for record in records]
    labels = [_label(record, label_field) for record in records]
    if names is None:
        found = set(labels)
        names = sorted(found, key=int) if all(map(_is_number, found)) else sorted(found)
    if len(names) < 2:
        raise BadInput(f"{path}: every label is {names[0]!r}, and a classifier tells classes apart: give two or more")
    numbers = {name: number for number, name in enumerate(names)}
    for record, label in zip(records, labels, strict=True):
        if label not in numbers:
            raise BadInput(f"{record.where}: label {label!r} is none of the classes {', '.join(names)}")
    return LabelledTexts(texts, [numbers[label] for label in labels], tuple(names))


def _text(record: Record, name: str) -> str:
    text = record.text(name, "--text-field")
    if not text or text.isspace():
        raise BadInput(f"{record.where}: field {name!r} holds no text: remove the row, or fill it in")
    return text


def _label(record: Record, name: str) -> str:
    if name not in record.fields:
        raise BadInput(no_field(record.where, name, record.fields, "--label-field"))
    value = record.fields[name]
    label = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(label, str) or not label or label.isspace():
        raise BadInput(f"{record.where}: field {name!r} is {value!r} and must be a label: a string or a whole number")
    return label


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
