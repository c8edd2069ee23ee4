"""What becomes of rows of data that cannot be used: they end the reading, or are left out and listed."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput

Row = TypeVar("Row")
Result = TypeVar("Result")


def usable(
    convert: Callable[[Row], Result], rows: Iterable[Row], left_out: list[BadInput] | None = None
) -> Iterator[Result]:
    """`convert(row)` of each row that can be used, one by one: whoever cuts the results need not hold them whole.

    Raises the BadInput of the first row for which `convert` does, with the number of the others. With a list `left_out`
    these errors are added to it and the rows left out; BadInput then only where no row can be used.
    """
    used, faults = 0, []
    for row in rows:
        try:
            result = convert(row)
        except BadInput as fault:
            faults.append(fault)
            continue
        used += 1
        if not faults or left_out is not None:
            yield result
    if faults and (left_out is None or not used):
        others = counted(len(faults) - 1, "other row")
        message = f"{faults[0]}; {others} cannot be used either" if len(faults) > 1 else str(faults[0])
        if used:
            raise BadInput(f"{message}; --bad-rows drop leaves such rows out")
        raise BadInput(message if left_out is None else f"{message}; no row is left")
    if left_out is not None:
        left_out.extend(faults)
