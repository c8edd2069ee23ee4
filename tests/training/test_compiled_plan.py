"""Steps for a TPU: lowered here, where all that JAX itself does is seen; and compiled, where libtpu is installed."""

import re
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import llmq_jax as lq
from llmq_jax.layers.axes import target_device, target_platform
from tests.bench.test_gpu import CONFIGS, calls_of

TPU = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
MEND = "try --remat dots, a smaller --batch-size or --context, or more devices"
FULL = "Ran out of memory on HBM, the total memory required for HLO temporaries (39.38G) exceeds available HBM (15.75G)"


@pytest.fixture
def planned(program):
    """`planned(*words)` -> (exit code, stdout, stderr)."""
    return partial(program, "train.plan", "--preset", "llama-10m", "--config", "num_hidden_layers=1")


@pytest.mark.parametrize(("name", "length"), [("gpt2", 64), ("llama", 63), ("mixture", 64)])
def test_the_training_step_as_a_tpu_gets_it(name, length):
    """The kernel forward and back, products in bfloat16 except the router's, nothing that calls the host, and the state
    donated."""
    config, rows = CONFIGS[name], 4
    optimizer = lq.training.adamw(1e-4)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=TPU)):
        assert (target_device(), target_platform()) == (TPU, "tpu")
        model = lq.build(config, dtype="bfloat16")
        assert model.attention_choice(training=True) == "attention: fused"
        step = lq.training.make_train_step(lq.objectives.NextToken(model), optimizer)
        state = jax.eval_shape(lambda: lq.training.create_state(lq.init(config), optimizer))
        types = {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in types.items()}
        lowered = step.program.trace(state, batch).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert calls_of(lowered) == {"tpu_custom_call"}
    kernels = re.findall(r'kernel_name = "(\w+)"', text)
    assert {re.sub(r"_.*", "", kernel) for kernel in kernels} == {"splash"}, kernels
    products = [line.rpartition(" : ") for line in text.splitlines() if "stablehlo.dot_general" in line]
    wide = [what for what, _, types in products if "f32>" in types.partition("->")[0]]
    wide = [what for what in wide if "[3] x [3]" not in what]  # the kernel's, of rows of results with their gradients
    assert bool(wide) == (name == "mixture") and all("precision = [HIGHEST, HIGHEST]" in what for what in wide)
    assert {argument.donated for argument in jax.tree.leaves(lowered.args_info[0][0])} == {True}


def test_what_the_compiler_says_is_told(planned, monkeypatch):
    """Of the devices that there are, in place of TPUs."""
    monkeypatch.setattr("llmq_jax.training.compiled_plan.topology_devices", lambda name: jax.devices()[:1])
    words = ("--compile-for", "v5e:2x2", "--context", 32, "--batch-size", 2)
    code, out, err = planned(*words)
    assert (code, err) == (0, "")
    held, beside = re.fullmatch(
        r"compiling for 1 x cpu; attention: blocked\nfits the device, cpu: ([\d.]+) MiB of parameters, moments and "
        r"batch, and ([\d.]+) MiB beside them in a step\n",
        out,
    ).groups()
    config = lq.preset("llama-10m", num_hidden_layers=1)
    weights = sum(leaf.size for leaf in jax.tree.leaves(lq.models.abstract_variables(config)["params"]))
    assert float(held) == pytest.approx(12 * weights / 2**20, abs=0.1)
    assert 4 < float(beside) * 2**20 / weights < 8  # gradients, and activations; the new state is where the old one was

    code, out, err = planned(*words[:-1], 3, "--accumulate", 2)
    assert code == 2 and err.endswith(": a batch of 3 rows in 2 parts cannot be divided; choose a multiple of 2\n")

    def full(run):
        assert run.attention == "auto"
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {FULL}.\n\nMore.")

    monkeypatch.setattr("llmq_jax.training.compiled_plan.compile_step", full)
    code, out, err = planned(*words)
    assert (code, err) == (1, "")
    assert out.splitlines()[1] == f"does not fit the device, cpu: {FULL}; {MEND}"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("v5e:2x4",), "to compile for a TPU takes its compiler; pip install -e '.[tpu]'"),
        (("v5e:2x4", "--device-memory", "16"), "--device-memory has no effect with --compile-for"),
        (("two", "--mesh", "fsdp=4"), "--mesh is for 4 devices, and --compile-for two has 2"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(planned, words, why, monkeypatch):
    monkeypatch.setattr("llmq_jax.training.compiled_plan.find_spec", lambda name: None)
    if words[0] == "two":
        monkeypatch.setattr("llmq_jax.training.compiled_plan.topology_devices", lambda name: jax.devices()[:1] * 2)
    code, out, err = planned("--compile-for", *words)
    assert (code, out) == (2, "") and why in err and len(err.splitlines()) == 1


if find_spec("libtpu") is not None:  # an extra that the tests do not install

    @pytest.mark.exhaustive
    def test_it_compiles_for_tpus(program):
        for words, code, told in (
            (("v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--batch-size", 4), 0, "fits each of 4 devices, TPU v5 lite: "),
            (("v5e:3x5",), 2, "there is no TPU slice 'v5e:3x5': "),
        ):
            given = ("--preset", "llama-10m", "--dtype", "bfloat16", "--compile-for", *words)
            ended, out, err = program("train.plan", *given)
            assert ended == code and told in (err if code == 2 else out)
