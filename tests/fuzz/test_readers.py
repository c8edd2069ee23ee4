"""Every reader against damaged input: it gives a result or refuses in one line, in bounded time and memory.

`make test` tries 300 inputs on each, `make fuzz` 10,000. An input depends on its reader and its number alone; a failure
names both, and `FUZZ_FIRST=number` begins with it.
"""

import os
import random
import traceback
import warnings

import pytest

from llmq_jax.errors import BadInput
from tests.fuzz.bounds import bounded, bounded_time
from tests.fuzz.mutations import mutated
from tests.fuzz.readers import READERS, Reader

INPUTS = int(os.environ.get("FUZZ_INPUTS", "300"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
SHOWN_FAILURES = 5


@pytest.mark.parametrize("name", READERS)
def test_damaged_input(name, tmp_path):
    reader = READERS[name]
    parts = reader.parts()
    reader.write(tmp_path, parts)
    reader.read(tmp_path)  # what is right is read
    refusals, failures, count = 0, {}, INPUTS // reader.cost
    with warnings.catch_warnings(), bounded(count):
        warnings.simplefilter("ignore")
        for number in range(FIRST, FIRST + count):
            try:
                with bounded_time():
                    reader.write(tmp_path, damaged(reader, name, number, parts))
                    reader.read(tmp_path)
            except BadInput as error:
                refusals += 1
                if "\n" in str(error):
                    failures.setdefault("more than one line", f"{number}: {error}")
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a Hang, and panics of Rust, are no Exceptions
                place = traceback.extract_tb(error.__traceback__)[-1]
                shown = f"{number}: {''.join(traceback.format_exception(error))[-3000:]}"
                failures.setdefault(f"{type(error).__name__} at {place.filename}:{place.lineno}", shown)
    shown = "\n\n".join(f"{what}, input {how}" for what, how in list(failures.items())[:SHOWN_FAILURES])
    assert not failures, f"{len(failures)} kinds of failures of {name}:\n{shown}"
    assert refusals >= count // 20  # the inputs are damaged indeed


def damaged(reader: Reader, name: str, number: int, parts: dict[str, bytes]) -> dict[str, bytes]:
    """The parts with one of them, or two, changed."""
    rng = random.Random(f"{name} {number}")
    changed = rng.sample(sorted(parts), min(len(parts), rng.choice((1, 1, 1, 2))))
    return {
        part: mutated(rng, content, part.endswith((".json", ".jsonl"))) if part in changed else content
        for part, content in parts.items()
    }
