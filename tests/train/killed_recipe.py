"""A recipe that is killed at its n-th coming to a place: DELAY seconds after, and at the latest when it leaves it.

python killed_recipe.py RECIPE PLACE N DELAY OPTIONS      PLACE is a part of TimeSpent, "resume", or none

Its pictures are empty: drawing takes two seconds of every run.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading

from matplotlib.figure import Figure

from llmq_jax.command_line import run
from llmq_jax.training import engine
from llmq_jax.training.time_spent import TimeSpent

recipe, place, number, delay, *arguments = sys.argv[1:]
left = int(number)
on, resume = TimeSpent.on, engine.resume


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def fatal(here):
    global left
    left -= here == place
    if here == place and left == 0:
        threading.Timer(float(delay), kill).start()
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


Figure.savefig = lambda figure, image, **options: None
TimeSpent.on, engine.resume = fatal_part, fatal_resume
module = importlib.import_module(f"train.{recipe}")
run(module.main, arguments, program=f"python -m train.{recipe}", defaults=getattr(module, "starting_options", None))
