import jax.numpy as jnp

from llmq_jax.training.metrics import TIME_FIELDS
from llmq_jax.training.time_spent import SECONDS, TimeSpent, time_text


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


def spend(spent, clock, part, seconds, **named):
    with spent.on(part, 1, **named):
        clock.time += seconds


def test_every_second_is_of_one_part():
    clock = Clock()
    compiled = Clock()
    spent = TimeSpent(clock, compiled)
    spend(spent, clock, "input", 1)
    with spent.on("step", 1):
        clock.time += 23
        compiled.time += 20
    assert spent.since_mark() == {"compiling_seconds": 20, "step_seconds": 3, "input_seconds": 1}
    spend(spent, clock, "step", 57)
    with spent.on("evaluation", 1):
        clock.time += 12
        compiled.time += 5
    clock.time += 2
    spend(spent, clock, "checkpoints", 4)
    spend(spent, clock, "samples", 0.01)
    assert spent.since_mark() == {
        "step_seconds": 57,
        "evaluation_seconds": 12,
        "samples_seconds": 0.01,
        "checkpoints_seconds": 4,
    }
    assert spent.since_mark() == {}
    total = spent.total()
    assert sum(total.values()) == clock.time and total["other"] == 2
    assert time_text(total) == (
        "time: step 61% (60.0 s), compiling 20% (20.0 s), evaluation 12% (12.0 s), checkpoints 4% (4.0 s), "
        "other 2% (2.0 s), input 1% (1.0 s)"
    )
    assert set(SECONDS.values()) <= set(TIME_FIELDS)


def test_a_batch_costs_what_the_device_waited_for_it(monkeypatch):
    clock = Clock()
    spent = TimeSpent(clock)
    result = jnp.ones(())
    for ready in (True, False):
        monkeypatch.setattr(type(result), "is_ready", lambda self, ready=ready: ready)
        spend(spent, clock, "input", 5, under_way=result)
    spend(spent, clock, "input", 3, under_way=1.0)  # of a step that returns what is computed
    assert spent.since_mark() == {"step_seconds": 5, "input_seconds": 8}


def test_an_error_leaves_its_place():
    spent = TimeSpent()
    for part, place in (("step", "step 7"), ("evaluation", "the evaluation of step 7")):
        try:
            with spent.on(part, 7):
                raise MemoryError
        except MemoryError:
            assert spent.place == place
