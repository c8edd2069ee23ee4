"""Recipes on 8 virtual devices, one after another in one process, which must ask for devices before JAX starts: imports
are half of a tiny run. `OnDevices` starts that process and asks it:

    python -m tests.train.on_devices
"""

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from tests import programs
from tests.devices import with_devices

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 600
"""That a recipe may take: then the process tells where it was, and ends."""


class OnDevices:
    """A context: `call(recipe, words)` -> (exit code, stdout, stderr) of `python -m train.RECIPE WORDS`."""

    def __enter__(self) -> "OnDevices":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.train.on_devices"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=with_devices(8), **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.communicate(timeout=60)  # at the end of its input it ends
        finally:
            self.process.kill()

    def call(self, recipe: str, words: list[str]) -> tuple[int, str, str]:
        print(json.dumps([recipe, words]), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))


def ended(recipe: str, words: list[str]) -> tuple[int, str, str]:
    """With what XLA says, which writes to the standard error that is no stream of Python's."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = programs.ended(f"train.{recipe}", *words)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


if __name__ == "__main__":
    from matplotlib.figure import Figure

    Figure.savefig = lambda figure, image, **options: None  # which takes two seconds of every run
    answers, errors = os.fdopen(os.dup(1), "w"), os.dup(2)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True, file=errors)
        answer = ended(*json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        os.dup2(errors, 2)  # for a fault of this program
        print(json.dumps(answer), file=answers, flush=True)
