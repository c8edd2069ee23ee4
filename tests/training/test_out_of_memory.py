"""Memory runs out for real: a petabyte is more than a process can address."""

import io
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.host_copies import to_host
from llmq_jax.objectives import NextToken
from llmq_jax.training import engine, out_of_memory
from llmq_jax.training.checkpoints import Checkpoints
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.out_of_memory import OutOfMemory, bytes_on_a_device, shortage, size, usage
from llmq_jax.training.sharding import mesh_sizes
from llmq_jax.training.state import create_state
from llmq_jax.training.step import Compiled, make_train_step
from tests.training import tiny_run
from tests.training.tiny_run import OPTIONS, Batches

PETABYTE = (2**24, 2**24)
PLAIN = replace(OPTIONS, evaluate_every=0, sample_every=0)


@jax.jit
def too_much(x):
    return jnp.sort(x * jnp.arange(PETABYTE[0])[:, None] * jnp.ones(PETABYTE), 0)[0, 0]


def step_that_fails(at, fails):
    def step(state, batch):
        number = int(state.step) + 1
        state, metrics = tiny_run.train_step(state, batch)
        return state, {**metrics, "loss": fails(metrics["loss"])} if number == at else metrics

    return step


def out_of_python(x):
    raise MemoryError("Unable to allocate 2.98 GiB for an array")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (too_much, "Out of memory allocating 1,048,576.0 GiB"),  # when the loss is read
        (lambda loss: loss + jnp.zeros(PETABYTE), "Out of memory allocating 1,048,576.0 GiB"),  # in the call
        (out_of_python, "Unable to allocate 2.98 GiB for an array"),
    ],
)
@pytest.mark.parametrize("under_way", [True, False])
def test_a_step_without_memory_ends_the_run_in_a_line(fails, said, under_way, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "is_under_way", lambda result: under_way)
    folder = tmp_path / "run"
    with pytest.raises(OutOfMemory) as error:
        engine.run(
            tiny_run.new_state(),
            step_that_fails(7, fails),
            Batches(),
            PLAIN,
            folder=folder,
            output=io.StringIO(),
        )
    told = str(error.value)
    assert told.startswith(f"out of memory in step 7 ({said}): a device holds parameters of 256 bytes, ")
    # Adam's two moments and two counts; 4 x 6 tokens, targets and a mask of 4 bytes each.
    assert "an optimizer state of 520 bytes and a batch of 288 bytes; a step adds gradients of 256 bytes, and" in told
    assert told.endswith(f"; the last checkpoint is {folder}/checkpoints/00000004")
    assert "\n" not in told
    assert Checkpoints(folder / "checkpoints").latest_step() == 4
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] in (4, 6)
    assert not (folder / "finished.json").exists()


def test_an_array_without_memory_raises_each_time():
    """To copy it at once aborts the process, about once in 100 times."""
    ones, product = jnp.ones((300, 300)), jax.jit(jnp.matmul)
    for _ in range(500):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
            to_host(product(ones, ones).sum() + jnp.zeros(PETABYTE))


def test_the_place_is_named(tmp_path):
    with pytest.raises(OutOfMemory, match=r"out of memory in the evaluation of step 4 .*; no checkpoint was saved"):
        tiny_run.run(tmp_path / "run", output=io.StringIO(), evaluate=lambda variables: {"loss": jnp.zeros(PETABYTE)})


def test_other_errors_keep_their_traceback(tmp_path):
    def wrong(x):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such device")

    with pytest.raises(jax.errors.JaxRuntimeError, match="no such device"):
        options = replace(PLAIN, checkpoint_every=0)
        engine.run(tiny_run.new_state(), step_that_fails(2, wrong), Batches(), options, output=io.StringIO())


def test_the_compilers_figure_is_told_where_it_is_at_hand():
    state = tiny_run.new_state()
    compiled = jax.jit(lambda state, batch: jnp.sort(state.variables["params"]["dense"]["kernel"] @ jnp.ones((8, 999))))

    step = Compiled(compiled, lambda batch: batch)
    assert "; a step adds 3" in usage(state, Batches()[0], step)  # a product of 8 x 999 floats
    told = "a batch of 288 bytes; a step adds gradients of 256 bytes, and activations"
    assert told in usage(state, Batches()[0], step, compiled=False)
    assert told.replace("288", "144") in usage(state, Batches()[0], replace(step, replicas=2), compiled=False)


def test_a_device_has_its_share_of_the_rows_of_all_processes(monkeypatch):
    """The devices along the tensor axis hold the same rows."""
    monkeypatch.setattr(out_of_memory, "axis_sizes", lambda: mesh_sizes("data=2,fsdp=3,tensor=4"))
    monkeypatch.setattr(out_of_memory, "row_share", lambda: {"process_index": 0, "process_count": 2})
    told = usage(tiny_run.new_state(), Batches()[0], None, compiled=False)
    assert "a batch of 96 bytes;" in told  # 2 · 288 / 6


def test_the_compilers_figure_of_a_step_by_pmap():
    config = lq.GPT2Config(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    optimizer = optax.sgd(0.1)
    step = make_train_step(NextToken(lq.build(config)), optimizer, mode="pmap")
    assert step.replicas == jax.local_device_count()
    batch = {name: np.ones((2, 4), np.int32) for name in ("tokens", "targets")} | {"mask": np.ones((2, 4), np.float32)}
    told = usage(create_state(lq.init(config), optimizer), batch, step)
    assert re.search(r"a batch of 96 bytes; a step adds [\d.]+ [KM]iB, gradients of", told)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (jax.errors.JaxRuntimeError("x:\nRESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes."),
         "Out of memory while trying to allocate 3.0 GiB"),
        (jax.errors.JaxRuntimeError("INTERNAL: Failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "out of memory"),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"), "CUDA_ERROR_OUT_OF_MEMORY"),
        (jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"), "std::bad_alloc"),
        (MemoryError(), "no memory is left for Python"),
        (jax.errors.JaxRuntimeError("INTERNAL: something else"), None),
        (RuntimeError("out of memory"), None),
    ],
)  # fmt: skip
def test_shortages_are_told_from_other_errors(error, told):
    assert shortage(error) == told


def test_sizes():
    assert [size(count) for count in (12, 1024, 3 * 2**19, 5 * 2**30)] == ["12 bytes", "1.0 KiB", "1.5 MiB", "5.0 GiB"]
    assert bytes_on_a_device({"a": jnp.ones((3, 4)), "b": None, "c": [2.5]}) == 48
