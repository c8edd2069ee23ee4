"""Texts with a label each, for a classifier: reading, removing duplicates, balancing, splitting, weights of classes.

Every random choice depends on a seed and the number of examples of each class alone, not on numpy's version.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from llmq_jax.counts import counted
from llmq_jax.data.bad_rows import usable
from llmq_jax.data.folders import DataPath
from llmq_jax.data.records import Record, checked_text, is_blank, no_field, read_records
from llmq_jax.data.splits import seeded_order
from llmq_jax.errors import BadInput

LONGEST_NUMBER = 1000
"""Digits of a label that counts as a number: Python refuses to read numbers of more than 4,300."""


@dataclass(frozen=True)
class LabelledTexts:
    """`texts[i]` is of the class `names[labels[i]]`."""

    texts: list[str]
    labels: list[int]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise BadInput(
                f"{counted(len(self.texts), 'text')} and {counted(len(self.labels), 'label')} were given: give each "
                "text one"
            )
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

    def without(self, texts: Collection[str]) -> "LabelledTexts":
        """The examples whose text is none of these."""
        return self.take(index for index, text in enumerate(self.texts) if text not in texts)

    def counts(self) -> list[int]:
        """Examples of each class."""
        return np.bincount(self.labels, minlength=len(self.names)).tolist() if self.labels else [0] * len(self.names)

    def without_duplicates(self) -> "Deduplicated":
        """The first example of every text. Call it before splitting: otherwise the test holds training texts.

        Texts are equal if every character is. A text that occurs under two labels teaches and tests nothing, so all its
        examples are removed.
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
        """As many examples of each class as the smallest has, chosen by the seed, in their order. A class without
        examples stays empty."""
        members = self._members()
        least = min((len(each) for each in members if len(each)), default=0)
        if not least:
            raise BadInput("there is no example to balance; give some")
        chosen = [each[seeded_order(len(each), [seed, label])[:least]] for label, each in enumerate(members)]
        return self.take(np.sort(np.concatenate(chosen)).tolist())

    def stratified_split(
        self, fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
    ) -> tuple["LabelledTexts", ...]:
        """Parts that each hold their fraction of every class, at least one example of it; each in its order.

        A class without examples stays empty. Raises BadInput for fractions that are not positive or do not add up to 1,
        and for a class with too few examples.
        """
        if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise BadInput(f"the fractions of a split must be positive and add up to 1, not {list(fractions)}")
        parts: list[list[int]] = [[] for _ in fractions]
        for label, each in enumerate(self._members()):
            if (count := len(each)) == 0:
                continue
            # The first part, for training, takes what rounding leaves over.
            others = [max(1, round(fraction * count)) for fraction in fractions[1:]]
            if count <= sum(others):
                raise BadInput(
                    f"class {self.names[label]!r} has {counted(count, 'example')}, too few for {len(fractions)} parts "
                    f"of {', '.join(map(str, fractions))}: give more of them, or leave the class out"
                )
            ends = np.cumsum([count - sum(others), *others])[:-1]
            for part, chosen in zip(parts, np.split(each[seeded_order(count, [seed, label])], ends), strict=True):
                part.extend(chosen.tolist())
        return tuple(self.take(sorted(part)) for part in parts)

    def class_weights(self) -> Float[np.ndarray, " classes"]:
        """Weights inverse to the frequency of each class, 1 on average over the examples; 1 for a class without any."""
        counts = np.array(self.counts())
        there = counts > 0
        return np.where(there, len(self) / (there.sum() * np.maximum(counts, 1)), 1).astype(np.float32)

    def _members(self) -> list[np.ndarray]:
        """The examples of each class, in their order."""
        by_class = np.argsort(np.asarray(self.labels, np.int64), kind="stable")
        return np.split(by_class, np.cumsum(self.counts())[:-1])


class LabelledRow(NamedTuple):
    """A text and its label, as a file has them."""

    where: str
    """The file and the row, for messages."""
    text: str
    label: str


class Deduplicated(NamedTuple):
    """What `LabelledTexts.without_duplicates` gives."""

    kept: LabelledTexts
    repeated: int
    """Examples removed because an equal one, label included, came before."""
    contradictory: int
    """Examples removed because their text occurs under several labels."""


def read_labelled(
    path: DataPath,
    text_field: str = "text",
    label_field: str = "label",
    columns: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> LabelledTexts:
    """The examples of a file or folder of records (see `read_records`, which says what `columns` is for too), in order.

    Labels are strings or whole numbers, without the white space around them; the classes are in the order of the
    numbers, or of the alphabet. `names` gives classes and order instead, as for a second file: a label that is none of
    them is refused.
    Raises BadInput for an empty text or label, and for fewer than two classes.
    """
    rows = read_rows(path, text_field, label_field, columns)
    return labelled_texts(rows, class_names(rows, path) if names is None else names)


def read_rows(
    path: DataPath,
    text_field: str = "text",
    label_field: str = "label",
    columns: Sequence[str] | None = None,
    left_out: list[BadInput] | None = None,
) -> list[LabelledRow]:
    """The rows of `read_labelled`, before the classes are numbered. With a list `left_out` rows without a text or a
    label are left out (see `usable`)."""

    def row(record: Record) -> LabelledRow:
        return LabelledRow(record.where, text_to_classify(record, text_field), _label(record, label_field))

    records = read_records(path, columns, {text_field: "--text-field", label_field: "--label-field"})
    return list(usable(row, records, left_out))


def class_names(rows: Sequence[LabelledRow], path: DataPath) -> tuple[str, ...]:
    """The classes of rows, in order. BadInput for fewer than two."""
    found = {row.label for row in rows}
    if len(found) < 2:
        only = rows[0].label
        raise BadInput(f"{path}: every label is {only!r}, and a classifier tells classes apart: give two or more")
    # "7" and "07" are two labels of one number: the set's own order, which differs between processes, must not decide
    by_number = all(map(_is_number, found))
    return tuple(sorted(found, key=(lambda label: (int(label), label)) if by_number else None))


def labelled_texts(rows: Sequence[LabelledRow], names: Sequence[str]) -> LabelledTexts:
    """Rows whose labels are among these names, as texts and numbers of classes. BadInput: another label."""
    numbers = {name: number for number, name in enumerate(names)}
    for row in rows:
        if row.label not in numbers:
            raise BadInput(
                f"{row.where}: label {row.label!r} is none of the classes {', '.join(names)}; correct the "
                "label, or remove the row"
            )
    return LabelledTexts([row.text for row in rows], [numbers[row.label] for row in rows], tuple(names))


def text_to_classify(record: Record, name: str) -> str:
    """The text in a field. BadInput where there is none."""
    text = record.text(name, "--text-field")
    if is_blank(text):
        raise BadInput(f"{record.where}: field {name!r} holds no text: remove the row, or fill it in")
    return text


def _label(record: Record, name: str) -> str:
    if name not in record.fields:
        raise BadInput(no_field(record.where, name, record.fields, "--label-field"))
    value = record.fields[name]
    label = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(label, str) or is_blank(label):
        raise BadInput(f"{record.where}: field {name!r} is {value!r} and must be a label: a string or a whole number")
    return checked_text(label, f"{record.where}: field {name!r}").strip()


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and len(label) <= LONGEST_NUMBER
