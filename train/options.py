"""Options that recipes share, by name and meaning, and what can be said of them without the recipe."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import Flag, default_is, option_name, refuse_idle, use_device
from llmq_jax.errors import BadInput

LONGEST_CONTEXT = 1024
"""Tokens that a row has at most, unless --context says otherwise."""
VALIDATION_FRACTION = 0.1
"""Part of the data that is held out, unless --validation-fraction says otherwise."""


@dataclass(frozen=True)
class TrainingOptions:
    steps: int = 2000
    """Updates in the whole run."""
    batch_size: int = 12
    """Windows in a batch."""
    accumulate: int = 1
    """Cut each batch into this many parts, whose gradients add up: the same result in less memory."""
    learning_rate: float = 6e-4
    """The peak learning rate, reached after the warm-up."""
    schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"] | None, default_is("cosine")] = None
    """How the learning rate falls from its peak to the last step: cosine, linear, wsd (linear over --decay-steps), or
    not at all."""
    decay_steps: Annotated[int | None, default_is("a tenth of the steps")] = None
    """Steps over which the learning rate of --schedule wsd falls, the last ones."""
    minimum_learning_rate: Annotated[float | None, default_is("a tenth of the peak")] = None
    """The learning rate at the last step."""
    initial_learning_rate: Annotated[float | None, default_is("0")] = None
    """The learning rate that the warm-up starts from."""
    warmup_steps: Annotated[int | None, default_is("a twentieth of the steps, at most 100")] = None
    """Steps until the peak of the learning rate."""
    optimizer: Annotated[Literal["adamw", "muon"] | None, default_is("adamw")] = None
    """AdamW, or Muon for the matrices of the layers and AdamW for all else: see docs/training.md."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    weight_decay: float = 0.1
    """Decay of kernels and embeddings, times the learning rate."""
    clip: float = 1.0
    """Greatest global norm of the gradient; 0 does not clip."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type that the gradient's moments are kept in; bfloat16 wants --betas of at most 0.99."""
    seed: int = 0
    """Seed of initial weights, order of the data and dropout; equal options give equal runs."""

    branch_from: Annotated[str | None, default_is("none", metavar="CHECKPOINT")] = None
    """Checkpoint of another run, or its folder for the newest one: begin with its whole state, weights, moments and
    step, and go on from there with these options; see docs/training.md."""

    options: Annotated[str | None, default_is("none", metavar="FILE")] = None
    """YAML file of options, as learning_rate: 3e-4, one in a line; those of the command line win over it."""


@dataclass(frozen=True)
class ComputeOptions:
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""
    mesh: Annotated[str | None, default_is("one device")] = None
    """Devices along the axes data, fsdp, expert and tensor, as data=2,fsdp=4: see docs/scaling.md."""
    pmap: Flag = False
    """All devices by jax.pmap, each with everything and its part of the batch, in place of --mesh."""
    coordinator: Annotated[str | None, default_is("what SLURM or Kubernetes tells")] = None
    """Address of process 0, HOST:PORT, where several processes run this command."""
    processes: Annotated[int | None, default_is("what SLURM or Kubernetes tells, else 1")] = None
    """How many processes run this command."""
    process: Annotated[int | None, default_is("what SLURM or Kubernetes tells, else 0")] = None
    """Which of the --processes this one is, from 0."""
    layout: Flag = False
    """Show where --mesh puts each parameter, and stop there."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of products; weights that train stay in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """Recompute in the backward pass, to save memory: nothing, all but products with weights, or whole layers."""
    scan_layers: bool = True
    """Compile one layer and loop over it; otherwise write all layers out (slower to compile, at times faster)."""
    attention: Literal["auto", "plain", "masked", "blocked", "fused"] = "auto"
    """How a sequence looks at itself: by the plain formula, all scores at once, block by block, or in a kernel of
    NVIDIA GPUs, which wants --dtype bfloat16; auto takes what suits the device: see docs/attention.md."""


@dataclass(frozen=True)
class LoggingOptions:
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluate_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two measurements of the validation loss; 0: never."""
    patience: Annotated[int | None, default_is("none: all steps")] = None
    """Stop after so many evaluations in a row without a new best."""
    sample_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two samples; 0: never."""
    sample_prompt: Annotated[str | None, default_is("a line break; def for Python's source")] = None
    """What the samples go on from."""
    checkpoint_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two checkpoints, besides those of a new lowest validation loss; 0: no checkpoints at all."""
    keep_last: Annotated[int | None, default_is("3")] = None
    """Checkpoints to keep, besides the one of lowest validation loss."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """Where there is no room for a checkpoint: stop, or warn and go on until the next one."""
    wandb: Annotated[str | None, default_is("none")] = None
    """Project at Weights & Biases to log to."""
    profile: Annotated[str | None, default_is("none", metavar="FIRST:LAST")] = None
    """Steps to trace with JAX's profiler, counted from 1, both included, as 10:15; see docs/training.md."""


@dataclass(frozen=True)
class RecipeOptions(LoggingOptions, ComputeOptions, TrainingOptions):  # fields are collected from right to left
    @property
    def evaluate_first(self) -> bool:
        """Whether a run is evaluated before its first step: one that begins from weights."""
        return bool(getattr(self, "init_from", None)) and self.evaluate_every != 0

    @property
    def folder(self) -> str | None:
        """The run folder, None of a recipe that writes none."""
        return getattr(self, "out", None)

    @property
    def loss_of_parts(self) -> bool:
        """Whether the loss averages over micro-batches, so that another --accumulate makes it another one."""
        return False


def check_ranges(options: RecipeOptions) -> None:
    """BadInput for a number that no training can mean, for what would have no effect, and for W&B that is not there: of
    shared options, before a model is loaded."""
    from llmq_jax.training.run_options import LEAST
    from llmq_jax.training.trackers import require_wandb

    size = options.batch_size
    for name, holds, rule in (
        *((name, lambda number, least=least: number >= least, f"be at least {least}") for name, least in LEAST.items()),
        ("batch_size", lambda size: size > 0, "be at least 1"),
        ("accumulate", lambda parts: parts > 0, "be at least 1"),
        ("accumulate", lambda parts: size is None or size % parts == 0, f"divide --batch-size {size}"),
        ("learning_rate", lambda rate: rate > 0, "be positive"),
        ("betas", lambda betas: all(0 <= beta < 1 for beta in betas), "be at least 0 and below 1"),
        ("weight_decay", lambda decay: decay >= 0, "not be negative"),
        ("clip", lambda norm: norm >= 0, "not be negative (0 does not clip)"),
        ("seed", lambda seed: 0 <= seed < 2**32, "be at least 0 and below 2^32"),
        ("evaluate_batches", lambda count: count > 0, "be at least 1"),
        ("epochs", lambda count: 0 < count < math.inf, "be positive"),
        ("validation_fraction", lambda part: 0 < part < 1, "lie between 0 and 1"),
        ("test_fraction", lambda part: 0 < part < 1, "lie between 0 and 1"),
        ("split_seed", lambda seed: seed >= 0, "not be negative"),
    ):
        value = getattr(options, name, None)  # a recipe may lack it, or leave it open
        if value is not None and not holds(value):
            raise BadInput(f"{option_name(name)} is {value} and must {rule}")
    cases = (
        ("minimum_learning_rate", options.schedule == "constant", "with --schedule constant"),
        ("decay_steps", options.schedule != "wsd", "without --schedule wsd"),
        ("epochs", options.steps is not None, "beside --steps"),
        ("validation_fraction", getattr(options, "validation_data", None), "beside --validation-data"),
        ("evaluate_batches", options.evaluate_every == 0, "with --evaluate-every 0"),
        ("patience", options.evaluate_every == 0, "with --evaluate-every 0"),
        ("sample_prompt", options.sample_every == 0, "with --sample-every 0"),
        ("keep_last", options.checkpoint_every == 0, "with --checkpoint-every 0"),
    )
    refuse_idle(options, (case for case in cases if hasattr(options, case[0])))
    if options.wandb:
        require_wandb()


def split_of(options: Any) -> tuple[float, int]:
    """(--validation-fraction, --split-seed), or what they stand for."""
    fraction = VALIDATION_FRACTION if options.validation_fraction is None else options.validation_fraction
    return fraction, options.split_seed or 0


def context_of(options: Any, config: Any) -> int:
    """--context, or what it stands for in a model of this config. BadInput where it exceeds the model's."""
    longest: int = config.max_position_embeddings
    if options.context is None:
        return min(longest, LONGEST_CONTEXT)
    if options.context > longest:
        raise BadInput(f"--context {options.context} exceeds the model's, {longest}; choose a shorter one")
    given: int = options.context
    return given


def on_devices(recipe: Callable) -> Callable:
    """A recipe, a function of its options, on the device that they ask for, or on a mesh of all that there are."""

    @functools.wraps(recipe)
    def run(options: RecipeOptions, *arguments: Any) -> Any:
        import jax

        from llmq_jax.training.processes import first, joined, one_speaks, same, together
        from llmq_jax.training.profile import profiled_steps
        from llmq_jax.training.run_folder import config_of_run, differences
        from llmq_jax.training.sharding import make_mesh

        preview = getattr(options, "preview", False)
        trains = not (options.layout or preview)
        if options.profile is not None:
            profiled_steps(options.profile, options.steps, "--profile")
        with joined(options.coordinator, options.processes, options.process), contextlib.ExitStack() as stack:
            use_device(options.device)
            stack.enter_context(one_speaks())
            mesh = mesh_of(options)
            # Processes with other meshes would wait for one another; how many there are is what process 0 says.
            same({"mesh": mesh, "processes": options.processes}, differences)
            if (folder := options.folder) is not None and trains:
                # The run itself opens it once data and model, which may take long, have told what it is of.
                together(lambda: config_of_run(Path(folder)) if first() else None)
            if mesh is not None and not options.layout:  # which needs no devices
                stack.enter_context(jax.set_mesh(make_mesh(mesh)))
            devices = jax.device_count()
            if devices > 1 and not (mesh is not None or options.pmap or preview):
                of_prompts = hasattr(options, "prompts_per_step")
                rows = "--prompts-per-step times --group-size" if of_prompts else "--batch-size"
                print(
                    f"only 1 of {devices} devices is used; add --mesh fsdp={devices} ({rows} must then be a multiple "
                    f"of {devices * options.accumulate})"
                )
            stack.enter_context(advice_on_memory(options))
            return recipe(options, *arguments)

    return run


def mesh_of(options: RecipeOptions) -> str | None:
    """The mesh that the options ask for: of several processes all devices, however they are used."""
    import jax

    if options.pmap and options.mesh is not None:
        raise BadInput("--mesh has no effect with --pmap; leave one of them out")
    if jax.process_count() == 1 or options.mesh is not None:
        return options.mesh
    if options.pmap:
        raise BadInput(f"--pmap is for one process, and here are {jax.process_count()}; use --mesh in its place")
    return f"data={jax.device_count()}"


@contextlib.contextmanager
def advice_on_memory(options: RecipeOptions) -> Iterator[None]:
    """BadInput for memory that has run out, with what to change."""
    from llmq_jax.training.out_of_memory import ERRORS, OutOfMemory, placed, shortage

    try:
        yield
    except OutOfMemory as error:
        raise BadInput(f"{error}; to need less, change {', '.join(less_memory(options))}") from error
    except ERRORS as error:
        if shortage(error) is None:
            raise
        raise BadInput(
            f"out of memory outside the steps, as in making the model and its state ({shortage(error)}), beside "
            f"{placed()} of arrays; to need less, change {', '.join(less_memory(options, in_steps=False))}"
        ) from error


def less_memory(options: RecipeOptions, in_steps: bool = True) -> list[str]:
    """Three options at most by which steps need less memory, or a state does, from what they are to what they could be;
    none that is used up."""
    import jax

    from llmq_jax.training.sharding import row_devices

    sizes = devices_of(options)
    of_prompts = hasattr(options, "prompts_per_step")
    changes = []
    if in_steps:
        # The rows of a batch, or of a GRPO step, and a way to take fewer of them at once.
        name = "prompts_per_step" if of_prompts else "batch_size"
        count, each = getattr(options, name), options.group_size if of_prompts else 1
        devices, parts = row_devices(sizes), options.accumulate
        more = next((n for n in range(parts + 1, count * each + 1) if count * each % (n * devices) == 0), None)
        halves = count % 2 == 0 and count // 2 * each % (parts * devices) == 0
        fewer = [f"{option_name(name)} {count} -> {count // 2}"] if halves else []
        same = "" if options.loss_of_parts else " (the same result)"
        fewer += [f"--accumulate {parts} -> {more}{same}"] if more else []
        changes += [" or ".join(fewer)] if fewer else []
        changes += [f"--remat {options.remat} -> full"] if options.remat != "full" else []
        changes += ["--dtype float32 -> bfloat16"] if options.dtype == "float32" else []
    train = getattr(options, "train", "all")
    muon = " (then without --optimizer muon)" if options.optimizer == "muon" else ""
    changes += [f"--train all -> lora{muon}"] if hasattr(options, "train") and train == "all" else []
    both = " and --dtype float32 -> bfloat16" if of_prompts and options.dtype == "float32" else ""  # GRPO wants both
    in_float32 = train == "lora" and options.weight_dtype == "float32"
    changes += [f"--base-dtype float32 -> bfloat16{both}"] if in_float32 else []
    many_moments = train == "all" and options.moments == "float32"
    changes += ["--moments float32 -> bfloat16"] if many_moments and max(options.betas) <= 0.99 else []
    here = jax.device_count()
    fsdp = here if sizes["fsdp"] < here else 2 * here
    mesh = f"--pmap -> --mesh fsdp={fsdp}" if options.pmap else f"--mesh {options.mesh or 'none'} -> fsdp={fsdp}"
    changes += [mesh + (f" on {fsdp} devices" if fsdp > here else "")]
    return [*changes, "the model to a smaller one"][:3]


def devices_of(options: RecipeOptions) -> dict[str, int]:
    """{axis: devices along it}"""
    import jax

    from llmq_jax.training import sharding

    mesh = f"data={jax.device_count()}" if options.pmap else mesh_of(options)
    return sharding.mesh_sizes("data=1" if mesh is None else mesh)


def row_parts(options: RecipeOptions) -> int:
    """So many devices have other rows of a batch."""
    from llmq_jax.training import sharding

    return sharding.row_devices(devices_of(options))


def check_mesh(options: RecipeOptions, variables: Any, rows: int) -> None:
    """BadInput where --mesh does not fit these variables (or their shapes) or batches of so many rows; with --layout,
    the table, and the end."""
    from llmq_jax.training import sharding

    sizes = devices_of(options)
    sharding.check_mesh(sizes, variables)
    sharding.check_rows(rows, options.accumulate, sizes)
    if options.layout:
        print(sharding.layout_text(variables, sizes), flush=True)
        raise SystemExit(0)


def filled(options: Any, **values: Any) -> Any:
    """The options with these values in place of None."""
    return dataclasses.replace(options, **{k: v for k, v in values.items() if getattr(options, k) is None})


def completed(options: Any) -> Any:
    """The options with what the shared ones stand for in place of None: what config.json shows."""
    return filled(
        options,
        warmup_steps=warmup_steps(options),
        initial_learning_rate=0.0,
        minimum_learning_rate=options.learning_rate / (1 if options.schedule == "constant" else 10),
        keep_last=3,
    )


def warmup_steps(options: RecipeOptions) -> int:
    return min(100, options.steps // 20) if options.warmup_steps is None else options.warmup_steps


def with_steps(options: Any, steps_in_an_epoch: float, epochs: float | None) -> Any:
    """The options with a number of steps, by default as many as these epochs have, and what follows from it."""
    if options.steps is None:
        epochs = epochs if options.epochs is None else options.epochs
        options = dataclasses.replace(options, steps=max(1, round(epochs * steps_in_an_epoch)), epochs=epochs)
    refuse_idle(options, [("initial_learning_rate", warmup_steps(options) == 0, "without warm-up")])
    return completed(options)


def model_of(options: RecipeOptions, config: Any, drops: bool = True) -> Any:
    """The model of a config that computes as the options say. BadInput: an --attention that cannot run here; `drops` is
    whether the objective has dropout act in training."""
    from llmq_jax.models import build

    how = {"dtype": options.dtype, "remat": options.remat, "scan_layers": options.scan_layers}
    model = build(config, **how, attention=options.attention)
    model.attention_choice(training=drops)
    return model


def optimizer_of(options: RecipeOptions, updates_per_step: int = 1) -> tuple[Any, Any]:
    """(schedule of steps, optimizer), its rate warmed up and let fall."""
    from llmq_jax.training.optimizer import adamw, muon, warmup_schedule

    schedule = warmup_schedule(
        peak=options.learning_rate,
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        initial=options.initial_learning_rate,
        minimum=options.minimum_learning_rate,
        decay=options.schedule or "cosine",
        decay_steps=options.decay_steps,
    )
    b1, b2 = options.betas
    fields = {"b1": b1, "b2": b2, "weight_decay": options.weight_decay, "clip": options.clip or None}
    fields["moments"] = options.moments
    if options.optimizer == "muon":
        fields["dtype"] = options.dtype
    optimizer = muon if options.optimizer == "muon" else adamw
    return schedule, optimizer(lambda update: schedule(update // updates_per_step), **fields)


def train_step_of(options: RecipeOptions, objective: Any, optimizer: Any) -> Any:
    """The step that the options ask for."""
    from llmq_jax.training.step import make_train_step

    return make_train_step(objective, optimizer, accumulate=options.accumulate, pmap=options.pmap)


def run_options(options: RecipeOptions) -> Any:
    """What of the options is the engine's."""
    from llmq_jax.training.run_options import RunOptions

    names = [field.name for field in dataclasses.fields(RunOptions) if hasattr(options, field.name)]
    return RunOptions(**{name: getattr(options, name) for name in names})


PLACES = ("out", "options", "device", "mesh", "pmap", "layout", "coordinator", "processes", "process")
"""Options of where a run goes, where they come from and what it runs on, which it may leave for others."""


MAY_CHANGE = (
    *("sample_prompt", "accumulate", "remat", "scan_layers", "attention"),
    *("data", "validation_data", "test_data", "replay_data", "chat_template"),
)
"""A recipe's own options that a run may go on with others of: what samples continue; how a step is computed, which is
the same but for rounding (dropout draws, and experts balance, by micro-batches; --attention too changes dropout's
draws); and where the data lie, whose contents are told by digests."""


def own_options(options: RecipeOptions, *without: str) -> dict[str, Any]:
    """The others, which are a recipe's own, for config.json; but for where it runs and goes, and `without`."""
    theirs = {field.name for field in dataclasses.fields(run_options(options))}
    values = dataclasses.asdict(options)
    return {name: value for name, value in values.items() if name not in {*theirs, *PLACES, *without}}
