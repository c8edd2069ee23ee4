"""Programs as forks of a process that has imported what they need, for tests that begin many of them, to kill them or
to have two at a time: the imports take longer than the rest. `Forks` starts that process and asks it:

    python -m tests.forks MODULE ...

A fork has none of its parent's threads, and JAX begins threads with its devices: so the parent computes nothing.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

from jax._src import xla_bridge

LATE = (
    "orbax.checkpoint",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "tensorboardX",
    "grain",
    "jax.scipy.stats",
)
"""What a run imports as it comes to need it."""
MOST_SECONDS = 600
"""That a child may take, whoever waits for it and however: then SIGALRM ends it."""


class Forks:
    """A context, whose children have the environment of whoever makes it; none outlives it."""

    def __init__(self, *modules: str):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.forks", *modules, *LATE]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=60)  # at the end of its input it ends

    def begin(self, program: str | Path, *arguments: object, output: Path, errors: Path, **variables: str) -> int:
        """The id of a process, and of its group, that runs the file as `python PROGRAM ARGUMENTS` would, with these
        variables in its environment as well."""
        return self._ask("begin", [str(program), *map(str, arguments)], [str(output), str(errors)], variables)

    def wait(self, process: int) -> int:
        """The exit code of this child; -9 of one that was killed. Until then its id is no other process's."""
        return self._ask("wait", process)

    def has_ended(self, process: int) -> bool:
        """Whether this child has, which is still to be waited for."""
        return bool(self._ask("has_ended", process))

    def _ask(self, *request: object) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def serve() -> list[str]:
    """Returns in a child, with its program and arguments; here it exits."""
    children = set()  # that were not waited for
    try:
        for line in sys.stdin:
            match json.loads(line):
                case ["begin", words, files, variables]:
                    assert threading.active_count() == 1 and not xla_bridge.backends_are_initialized()
                    if (child := os.fork()) == 0:
                        children.clear()
                        become(files, variables)
                        return words
                    os.setpgid(child, child)
                    children.add(child)
                    print(child, flush=True)
                case ["wait", child]:
                    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
                    children.remove(child)
                case ["has_ended", child]:
                    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    print(int(ended is not None), flush=True)
    finally:
        for child in children:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    sys.exit()


def become(files: list[str], variables: dict[str, str]) -> None:
    """Makes this process, a child, one that writes to these two files, with these variables."""
    os.environ.update(variables)
    signal.alarm(MOST_SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    # New ones: a stream asks only once whether its file can be sought in, and these were others.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    sys.argv = serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
