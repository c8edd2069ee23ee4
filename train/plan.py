"""Plan a run on many devices: what each must hold and send, and what to change if that is too much.

    python -m train.plan --preset llama3.1-8b --mesh fsdp=8 --context 4096 --dtype bfloat16
    python -m train.plan --preset deepseek-v3 --mesh fsdp=32,tensor=8,expert=8 --context 4096 --remat full

No weights are made, and the devices need not be there. Options are named like those of train.pretrain. Exit code 1: the
run does not fit.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llmq_jax.backend import use_device
from llmq_jax.command_line import run
from llmq_jax.errors import BadInput
from llmq_jax.options import default_is, named_as_options, option_name
from train.options import LONGEST_CONTEXT, ComputeOptions, TrainingOptions, context_of
from train.pretrain import RUNS, default_tokenizer, new_config, require_preset

if TYPE_CHECKING:
    from llmq_jax.training.plan import Run

DEVICE_MEMORY = 80.0  # GiB


@dataclass(frozen=True)
class Options:
    preset: str
    """A model size (see llmq models), or a complete run of train.pretrain (demo, nanogpt-shakespeare-cpu), of which the
    model is taken."""
    config: Annotated[tuple[str, ...], default_is("the preset's", metavar="FIELD=VALUE ...")] = ()
    """Fields of the model's config: num_hidden_layers=4 vocab_size=257."""
    mesh: str = "data=1"
    """Number of devices along the mesh axes data, fsdp, expert and tensor, such as data=2,fsdp=4; see
    docs/scaling.md."""
    batch_size: Annotated[int | None, default_is("one window a device and micro-batch")] = None
    """Windows in a batch."""
    context: Annotated[int | None, default_is(f"the model's, at most {LONGEST_CONTEXT}")] = None
    """Tokens in a window."""
    accumulate: int = TrainingOptions.accumulate
    """Compute each batch in this many parts (micro-batches), whose gradients add up."""
    dtype: Literal["float32", "bfloat16"] = ComputeOptions.dtype
    """Type of activations and matrix products; weights and gradients stay in float32."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, with two moments for each parameter, or muon, with one for each of the layers' matrices."""
    moments: Literal["float32", "first-bfloat16", "bfloat16"] = TrainingOptions.moments
    """Type in which the optimizer's moments are stored: all of them, or the first alone (first-bfloat16)."""
    remat: Literal["none", "dots", "full"] = ComputeOptions.remat
    """What the backward pass recomputes to save memory: what is elementwise (none), all but the products with weights
    (dots), or whole layers (full)."""
    attention: Annotated[
        Literal["plain", "masked", "blocked"] | None, default_is("masked; blocked in models with windows")
    ] = None
    """How attention within a sequence is computed: by the plain formula (plain), with all scores at once (masked), or
    block by block (blocked). See docs/attention.md."""
    device_memory: Annotated[float | None, default_is(f"{DEVICE_MEMORY:.0f}")] = None
    """Memory of a device, in GiB."""
    compile_for: Annotated[str | None, default_is("no; plan", metavar="TPU:SHAPE")] = None
    """Compile the step for a TPU slice, v5e:4x4 or v5p:2x2x4, and report what its compiler says, in place of a plan.
    Needs no TPU, but libtpu, and minutes. Attention is then "auto" by default."""


def main(options: Options) -> int:
    for name in ("accumulate", "batch_size", "context", "device_memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{option_name(name)} is {value} and must be positive")

    use_device("cpu")
    from llmq_jax.models import fields_from_text, override, preset
    from llmq_jax.training.plan import Run, changes_text, plan, plan_text
    from llmq_jax.training.sharding import mesh_sizes, row_devices

    require_preset(options.preset)
    config = model_of_run(options.preset) if options.preset in RUNS else preset(options.preset)
    config = override(config, **fields_from_text(type(config), options.config))
    sizes = mesh_sizes(options.mesh)
    if options.compile_for is not None and options.device_memory is not None:
        raise BadInput("--device-memory has no effect with --compile-for: the compiler knows the TPU's; leave it out")
    windowed = getattr(config, "sliding_window", None)
    automatic = "auto" if options.compile_for else "blocked" if windowed else "masked"
    given = Run(
        config,
        sizes,
        batch_size=options.batch_size or options.accumulate * row_devices(sizes),
        context=context_of(options, config),
        accumulate=options.accumulate,
        dtype=options.dtype,
        remat=options.remat,
        optimizer=options.optimizer,
        moments=options.moments,
        attention=options.attention or automatic,
    )
    if options.compile_for is not None:
        return compiled(given, options.compile_for)
    with named_as_options("attention"):
        found, memory = plan(given), round((options.device_memory or DEVICE_MEMORY) * 2**30)
    print(plan_text(found, memory), flush=True)
    if found.total <= memory:
        return 0
    print(changes_text(found, memory))
    return 1


def compiled(given: "Run", slice_name: str) -> int:
    """Print what the compiler of a TPU says of the step; returns the exit code."""
    import jax

    from llmq_jax.models import build
    from llmq_jax.training.compiled_plan import compile_step, topology_devices
    from llmq_jax.training.out_of_memory import shortage, size
    from llmq_jax.training.sharding import make_mesh

    devices, wanted = topology_devices(slice_name), math.prod(given.sizes.values())
    if wanted not in (1, len(devices)):
        raise BadInput(f"--mesh is for {wanted} devices, and --compile-for {slice_name} has {len(devices)}")
    kind = devices[0].device_kind
    where = f"each of {wanted:,} devices, {kind}" if wanted > 1 else f"the device, {kind}"
    mesh = make_mesh(",".join(f"{axis}={size}" for axis, size in given.sizes.items()), devices[:wanted])
    try:
        with named_as_options("attention"), jax.set_mesh(mesh):
            model = build(given.config, dtype=given.dtype, attention=given.attention)
            # In a trace: no array can be made on devices that are not here.
            jax.eval_shape(
                lambda: print(f"compiling for {wanted:,} x {kind}; {model.attention_choice(True)}", flush=True)
            )
            memory = compile_step(given)
    except jax.errors.JaxRuntimeError as error:
        short = shortage(error)
        if short is None:
            raise
        print(f"does not fit {where}: {short}; try --remat dots, a smaller --batch-size or --context, or more devices")
        return 1
    held, beside = size(memory.held), size(memory.beside)
    print(f"fits {where}: {held} of parameters, moments and batch, and {beside} beside them in a step")
    return 0


def model_of_run(name: str) -> Any:
    """The config of the model that train.pretrain's complete run of this name makes."""
    from llmq_jax.data import load_tokenizer

    return new_config(RUNS[name], load_tokenizer(default_tokenizer(name)).vocab_size)


if __name__ == "__main__":
    run(main)
