"""A run of 20 steps of a tiny model, for the tests of the engine; as a script, one that kills itself.

python tiny_run.py FOLDER [patient] [KILL]      KILL is "step:7", "torn:6", "orbax:8", ... : a point and its step
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmq_jax.training import engine
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.state import create_state

STEPS, WIDTH = 20, 8
SCHEDULE = optax.linear_schedule(0.05, 0.0, STEPS)
OPTIMIZER = optax.adam(SCHEDULE)
OPTIONS = RunOptions(
    steps=STEPS, log_every=2, evaluate_every=4, sample_every=8, checkpoint_every=4, keep_last=2, tensorboard=False
)
PATIENT = replace(OPTIONS, evaluate_every=2, patience=4)


class Batches:
    """Batch i from (seed, i) alone. `before` is called with i first."""

    def __init__(self, before=lambda step: None):
        self.before = before

    def __getitem__(self, step):
        self.before(step)
        rng = np.random.default_rng((17, step))
        tokens = rng.integers(0, WIDTH, (4, 6), dtype=np.int32)
        return {"tokens": tokens, "targets": (tokens * 3 + 1) % WIDTH, "mask": (rng.random((4, 6)) < 0.8).astype("f4")}


def new_state():
    kernel = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH))
    return create_state({"params": {"dense": {"kernel": kernel}}}, OPTIMIZER, seed=3)


def loss(params, batch, key=None):
    logits = params["dense"]["kernel"][batch["tokens"]]
    if key is not None:  # dropout, so that the key's place in the state matters
        logits = logits * jax.random.bernoulli(key, 0.8, logits.shape)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (each * batch["mask"]).sum() / batch["mask"].sum()


@jax.jit
def train_step(state, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    value, grads = jax.value_and_grad(loss)(state.variables["params"], batch, key)
    updates, optimizer_state = OPTIMIZER.update(grads, state.optimizer_state)
    variables = {"params": optax.apply_updates(state.variables["params"], updates)}
    state = state.replace(step=state.step + 1, variables=variables, optimizer_state=optimizer_state)
    return state, {"loss": value, "grad_norm": optax.tree.norm(grads)}


def evaluate(variables):
    return {"loss": float(jax.jit(loss)(variables["params"], Batches()[1000]))}


def turning(variables):
    """Lowest after step 6: with PATIENT, the run stops after step 14, at which nothing else is due."""
    return {"loss": abs(evaluate(variables)["loss"] - 1.9)}


def sample(variables, step):
    return f"step {step}\nargmax {jnp.argmax(variables['params']['dense']['kernel'], -1)}"


def run(folder, batches=None, options=OPTIONS, drawn=False, **changed):
    """The tiny run, with whatever is given changed. Its pictures are empty unless they are to be `drawn`, which takes
    twice as long as the rest."""
    arguments = {"schedule": SCHEDULE, "evaluate": evaluate, "sample": sample, "model_config": {"width": WIDTH}}
    batches = Batches() if batches is None else batches
    empty = mock.patch("matplotlib.figure.Figure.savefig", lambda figure, image, **options: None)
    with contextlib.nullcontext() if drawn or folder is None else empty:
        return engine.run(new_state(), train_step, batches, options, folder=folder, **{**arguments, **changed})


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point, step):
    """Patch the library so that the process is killed at `point` in `step`."""
    from llmq_jax.training import checkpoints, metrics

    named = f"{step:08d}"
    save, rename, rmtree, write = checkpoints.Checkpoints.save, os.rename, shutil.rmtree, metrics.MetricsFile.write

    def torn_write(self, record):
        if record["step"] == step:
            self._file.write(b'{"step": 6, "tok')
            self._file.flush()
            die()
        write(self, record)

    def save_with_a_timer(self, at, *arguments, **named):
        if at == step:
            threading.Timer(0.03, die).start()
        return save(self, at, *arguments, **named)

    def rename_or_die(source, target):
        if str(source).endswith(f".saving-{named}") and point == "manifest":
            die()
        rename(source, target)
        if str(source).endswith(f".saving-{named}") and point == "committed":
            die()

    def rmtree_half(path, **options):
        if ".deleting-" in str(path):
            with contextlib.suppress(FileNotFoundError):  # of one that an earlier kill left half deleted
                os.remove(os.path.join(path, "manifest.json"))
            die()
        rmtree(path, **options)

    if point == "torn":
        metrics.MetricsFile.write = torn_write
    elif point == "arrays":
        checkpoints.write_manifest = lambda folder, known: (
            die() if named in folder.name else write_manifest(folder, known)
        )
        from llmq_jax.training.manifest import write_manifest
    elif point == "orbax":
        checkpoints.Checkpoints.save = save_with_a_timer
    elif point in ("manifest", "committed"):
        os.rename = rename_or_die
    elif point == "deletion":
        shutil.rmtree = rmtree_half
    elif point == "plot":
        engine.plot_losses = die
    elif point == "report":
        engine.write_report_page = die
    elif point != "step":
        raise ValueError(point)


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    batches, how = Batches(), {}
    if "patient" in words:
        words.remove("patient")
        how = {"options": PATIENT, "evaluate": turning}
    if words:
        point, _, step = words[0].partition(":")
        step = int(step or 0)
        arm(point, step)
        if point == "step":
            batches = Batches(lambda i: die() if i == step else None)
    run(folder, batches, **how)
