"""What becomes of rows of data that cannot be used: the first one ends the reading, or all are left out and listed."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from llmq_jax.errors import BadInput

Row = TypeVar("Row")
Result = TypeVar("Result")


def usable(
    convert: Callable[[Row], Result], rows: Iterable[Row], left_out: list[BadInput] | None = None
) -> Iterator[Result]:
    """`convert(row)` of each row that can be used.

    Raises the BadInput of the first row for which `convert` does. With a list `left_out` that error is added to it
    instead and the row left out; BadInput then only where no row can be used.
    """
    used, faults = 0, []
    for row in rows:
        try:
            result = convert(row)
        except BadInput as fault:
            if left_out is None:
                raise BadInput(f"{fault}; or leave out such rows: --bad-rows drop") if used else fault from None
            faults.append(fault)
        else:
            used += 1
            yield result
    if faults and not used:
        raise BadInput(f"{faults[0]}; none of the other rows can be used either" if faults[1:] else str(faults[0]))
    if left_out is not None:
        left_out.extend(faults)
