"""The process of one side: `python -m bench.worker FOLDER SIDE`, driven through its standard input.

It reads one request per line, `{"call": method, ...arguments}`, and answers with one line of JSON. Between requests it
waits in a blocking read, its threads asleep, so that the other sides have the cores to themselves. Whether that holds
is measured, as the processor time that it uses between an answer and the next request.
"""

import json
import math
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

from bench.rows import Row


class Side:
    """One competitor in one row: `prepare` once, then `measure` in every round."""

    def __init__(self, row: Row, folder: Path, name: str):
        self.row, self.folder, self.name = row, folder, name
        self.seconds_each = 0.0

    def prepare(self) -> dict[str, Any]:
        """Build, compile, warm up; returns `compile_seconds` and what the sides must agree on (`losses`, `tokens`)."""
        raise NotImplementedError

    def repeat(self, count: int) -> None:
        """Run the workload that many times and wait for the last result."""
        raise NotImplementedError

    def first_runs(self) -> float:
        """Seconds that the first run took beyond a later one: what compiling costs. Also sizes the rounds."""
        first = self._seconds(1)
        self._seconds(1)
        self.seconds_each = self._seconds(1)
        return max(0.0, first - self.seconds_each)

    def measure(self, at_least: float) -> dict[str, float]:
        """Seconds of one run: the mean over about `at_least` seconds, after one run that is not counted."""
        self.repeat(1)
        count = max(1, math.ceil(at_least / self.seconds_each))
        return {"seconds": self._seconds(count) / count}

    def _seconds(self, count: int) -> float:
        started = time.perf_counter()
        self.repeat(count)
        return time.perf_counter() - started

    def peak_memory(self) -> int:
        """Bytes of this process at its largest. Not `ru_maxrss`, which begins at the size of the parent."""
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def create_side(row: Row, folder: Path, name: str) -> Side:
    if name.startswith("ours"):
        from bench import ours

        return ours.SIDES[row.kind](row, folder, name)
    from bench import torch_peers

    return torch_peers.SIDES[row.kind](row, folder, name)


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    # Libraries may print to standard output at any time, so answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(folder / "row.pickle", "rb") as file:
        side = create_side(pickle.load(file), folder, name)
    rested = time.process_time()
    for line in sys.stdin:
        request = json.loads(line)
        idle = time.process_time() - rested
        answer = getattr(side, request.pop("call"))(**request)
        rested = time.process_time()
        print(json.dumps({"answer": answer, "idle": idle}), file=answers, flush=True)


if __name__ == "__main__":
    main()
