"""A recipe; to be killed at its n-th coming to a place, if wanted: DELAY seconds after, or when it leaves it before.

python run_recipe.py RECIPE OPTIONS
python run_recipe.py --kill-at PLACE N DELAY RECIPE OPTIONS      PLACE is a part of TimeSpent, or "resume"

Its pictures are empty: drawing takes two seconds of every run.
"""

import contextlib
import os
import signal
import sys
import threading

from matplotlib.figure import Figure

from llmq_jax.training import engine
from llmq_jax.training.time_spent import TimeSpent
from tests.programs import start


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place, number, delay):
    left, on, resume = number, TimeSpent.on, engine.resume

    @contextlib.contextmanager
    def fatal(here):
        nonlocal left
        left -= here == place
        if here == place and left == 0:
            threading.Timer(delay, kill).start()
            yield
            kill()
        yield

    @contextlib.contextmanager
    def fatal_part(self, part, *rest):
        with on(self, part, *rest), fatal(part):
            yield

    def fatal_resume(*arguments):
        with fatal("resume"):
            return resume(*arguments)

    TimeSpent.on, engine.resume = fatal_part, fatal_resume


recipe, *arguments = sys.argv[1:]
if recipe == "--kill-at":
    place, number, delay, recipe, *arguments = arguments
    kill_at(place, int(number), float(delay))
Figure.savefig = lambda figure, image, **options: None
start(f"train.{recipe}", *arguments)
