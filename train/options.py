"""The options that recipes share, and what follows from them without the recipe: checks, defaults, optimizer."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmq_jax.backend import Device
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, default_is, named_as_options, option_name, refuse_idle

LONGEST_CONTEXT = 1024
"""Tokens that a row has at most, unless --context says otherwise."""
VALIDATION_FRACTION = 0.1
"""Part of the data that is held out, unless --validation-fraction says otherwise."""


@dataclass(frozen=True)
class TrainingOptions:
    steps: int = 2000
    """Training steps (optimizer updates) in the whole run."""
    batch_size: int = 12
    """Windows in a batch."""
    accumulate: int = 1
    """Compute each batch in this many parts (micro-batches), whose gradients add up: the same result in less memory."""
    learning_rate: float = 6e-4
    """The peak learning rate, reached after the warm-up."""
    schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"] | None, default_is("cosine")] = None
    """How the learning rate falls after the warm-up: along a cosine, linearly, at the end only (wsd: linearly over
    --decay-steps), or not at all (constant)."""
    decay_steps: Annotated[int | None, default_is("a tenth of the steps")] = None
    """Number of steps at the end over which the learning rate falls, with --schedule wsd."""
    minimum_learning_rate: Annotated[float | None, default_is("a tenth of the peak")] = None
    """The learning rate at the last step."""
    initial_learning_rate: Annotated[float | None, default_is("0")] = None
    """The learning rate that the warm-up starts from."""
    warmup_steps: Annotated[int | None, default_is("a twentieth of the steps, at most 100")] = None
    """Steps over which the learning rate rises linearly to its peak."""
    optimizer: Annotated[Literal["adamw", "muon"] | None, default_is("adamw")] = None
    """adamw, or muon: Muon for the layers' matrices and AdamW for all other parameters; see docs/training.md."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    weight_decay: float = 0.1
    """Weight decay of kernels and embeddings (not of norms and biases), multiplied by the learning rate."""
    clip: float = 1.0
    """Clip the gradient to this global norm; 0: no clipping."""
    moments: Literal["float32", "first-bfloat16", "bfloat16"] = "float32"
    """Type in which the optimizer's moments are stored: both, or the first alone (first-bfloat16). In bfloat16 a moment
    needs a decay rate in --betas of at most 0.99."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout; equal options give equal runs."""

    branch_from: Annotated[str | None, default_is("none", metavar="CHECKPOINT")] = None
    """Checkpoint of another run, or its run folder for the newest one: start from its whole state (weights, moments and
    step) and continue with these options; see docs/training.md."""

    options: Annotated[str | None, default_is("none", metavar="FILE")] = None
    """YAML file of options, one a line, such as learning_rate: 3e-4; options on the command line override it."""


@dataclass(frozen=True)
class ComputeOptions:
    device: Device = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""
    mesh: Annotated[str | None, default_is("one device")] = None
    """Number of devices along the mesh axes data, fsdp, expert and tensor, such as data=2,fsdp=4; see
    docs/scaling.md."""
    pmap: Flag = False
    """Use all devices by jax.pmap instead of --mesh: each holds the whole model and computes its part of the batch."""
    coordinator: Annotated[str | None, default_is("that of SLURM's or Kubernetes' job")] = None
    """Address of process 0, HOST:PORT, where several processes run this command."""
    processes: Annotated[int | None, default_is("as many as SLURM's or Kubernetes' job has, else 1")] = None
    """How many processes run this command."""
    process: Annotated[int | None, default_is("its number in SLURM's or Kubernetes' job, else 0")] = None
    """Number of this process among the --processes, counted from 0."""
    layout: Flag = False
    """Show how --mesh divides each parameter among the devices, and exit."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; weights that train stay in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes to save memory: what is elementwise (none), all but the products with weights
    (dots), or whole layers (full)."""
    scan_layers: bool = True
    """Compile one layer and loop over it. With --no-scan-layers every layer is compiled: slower to compile, at times
    faster to run."""
    attention: Literal["auto", "plain", "masked", "blocked", "fused"] = "auto"
    """How attention within a sequence is computed: by the plain formula (plain), with all scores at once (masked),
    block by block (blocked), or by an NVIDIA GPU's kernel, which needs --dtype bfloat16 (fused); auto: what suits the
    device. See docs/attention.md."""


@dataclass(frozen=True)
class LoggingOptions:
    log_every: int = 10
    """Steps between two lines of metrics; 0: never."""
    evaluate_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two measurements of the validation loss; 0: never."""
    patience: Annotated[int | None, default_is("none: all steps")] = None
    """Stop after this many evaluations in a row without a new best."""
    sample_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two samples; 0: never."""
    sample_prompt: Annotated[str | None, default_is("a line break; def for Python's source")] = None
    """Text that the samples continue."""
    checkpoint_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two checkpoints, besides those saved at a new lowest validation loss; 0: no checkpoints at all."""
    keep_last: Annotated[int | None, default_is("3")] = None
    """How many of the newest checkpoints to keep, besides the one with the lowest validation loss."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """When the disk has no room for a checkpoint: stop, or warn and go on until the next one."""
    wandb: Annotated[str | None, default_is("none")] = None
    """Weights & Biases project to log to."""
    profile: Annotated[str | None, default_is("none", metavar="FIRST:LAST")] = None
    """First and last step to trace with JAX's profiler, counted from 1, such as 10:15; see docs/training.md."""


@dataclass(frozen=True)
class RecipeOptions(LoggingOptions, ComputeOptions, TrainingOptions):  # fields are collected from right to left
    @property
    def evaluate_first(self) -> bool:
        """Whether the run is evaluated before its first step, as runs that start from given weights are."""
        return bool(getattr(self, "init_from", None)) and self.evaluate_every != 0

    @property
    def folder(self) -> str | None:
        """The run folder; None for a recipe without one."""
        return getattr(self, "out", None)

    @property
    def loss_of_parts(self) -> bool:
        """Whether the loss contains means over each micro-batch, so that it depends on --accumulate."""
        return False


Range = tuple[str, Callable[[Any], bool], str]
"""A field, whether it may have a value, and what it must else: ("clip", lambda norm: norm >= 0, "not be negative")."""


def check_ranges(options: RecipeOptions, *own: Range) -> None:
    """Check the shared options, and the recipe's `own`, before a model is loaded. BadInput: a number out of range, an
    option without effect, or --wandb where it is not installed."""
    from llmq_jax.training.run_options import LEAST
    from llmq_jax.training.trackers import require_wandb

    size = options.batch_size
    for name, holds, rule in (
        *((name, lambda number, least=least: number >= least, f"be at least {least}") for name, least in LEAST.items()),
        ("batch_size", lambda size: size > 0, "be at least 1"),
        ("accumulate", lambda parts: parts > 0, "be at least 1"),
        ("accumulate", lambda parts: size is None or size % parts == 0, f"divide --batch-size {size}"),
        ("learning_rate", lambda rate: 0 < rate < math.inf, "be positive and finite"),
        ("warmup_steps", lambda steps: steps >= 0, "not be negative"),
        ("betas", lambda betas: all(0 <= beta < 1 for beta in betas), "be at least 0 and below 1"),
        ("weight_decay", lambda decay: 0 <= decay < math.inf, "be finite and not negative"),
        ("clip", lambda norm: norm >= 0, "not be negative (0 does not clip)"),
        ("seed", lambda seed: 0 <= seed < 2**32, "be at least 0 and below 2^32"),
        ("evaluate_batches", lambda count: count > 0, "be at least 1"),
        ("epochs", lambda count: 0 < count < math.inf, "be positive and finite"),
        ("validation_fraction", lambda part: 0 < part < 1, "lie between 0 and 1"),
        ("test_fraction", lambda part: 0 < part < 1, "lie between 0 and 1"),
        ("split_seed", lambda seed: seed >= 0, "not be negative"),
        *own,
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
    """(--validation-fraction, --split-seed), or their defaults."""
    fraction = VALIDATION_FRACTION if options.validation_fraction is None else options.validation_fraction
    return fraction, options.split_seed or 0


def context_of(options: Any, config: Any) -> int:
    """--context, or its default for a model of this config. BadInput where it exceeds the model's context."""
    longest: int = config.max_position_embeddings
    context: int = min(longest, LONGEST_CONTEXT) if options.context is None else options.context
    if context > longest:
        raise BadInput(f"--context {context} exceeds the model's, {longest}; choose a shorter one")
    return context


def filled(options: Any, **values: Any) -> Any:
    """The options with these values in place of None."""
    return dataclasses.replace(options, **{k: v for k, v in values.items() if getattr(options, k) is None})


def completed(options: Any) -> Any:
    """The options with the shared ones' defaults in place of None, as config.json shows them. BadInput for an initial
    learning rate without warm-up."""
    warmup_steps = min(100, options.steps // 20) if options.warmup_steps is None else options.warmup_steps
    refuse_idle(options, [("initial_learning_rate", warmup_steps == 0, "without warm-up")])
    return filled(
        options,
        warmup_steps=warmup_steps,
        initial_learning_rate=0.0,
        minimum_learning_rate=options.learning_rate / (1 if options.schedule == "constant" else 10),
        keep_last=3,
    )


def with_steps(options: Any, steps_in_an_epoch: float, epochs: float | None) -> Any:
    """The options with a number of steps, by default as many as --epochs (else `epochs`) take, and with the defaults
    that follow from it."""
    if options.steps is None:
        epochs = epochs if options.epochs is None else options.epochs
        options = dataclasses.replace(options, steps=max(1, round(epochs * steps_in_an_epoch)), epochs=epochs)
    return completed(options)


def model_of(options: RecipeOptions, config: Any, drops: bool = True) -> Any:
    """The model of a config, computing as the options say. `drops`: whether the objective applies dropout in training.
    BadInput: an --attention that cannot run here."""
    from llmq_jax.models import build

    how = {"dtype": options.dtype, "remat": options.remat, "scan_layers": options.scan_layers}
    model = build(config, **how, attention=options.attention)
    model.attention_choice(training=drops)
    return model


def optimizer_of(options: RecipeOptions, updates_per_step: int = 1) -> tuple[Any, Any]:
    """(learning rate by step, optimizer). All of a step's `updates_per_step` optimizer updates have the step's learning
    rate."""
    from llmq_jax.training.optimizer import adamw, muon, warmup_schedule

    with named_as_options("decay_steps"):
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
    """The compiled training step that the options ask for."""
    from llmq_jax.training.step import make_train_step

    return make_train_step(objective, optimizer, accumulate=options.accumulate, mode="pmap" if options.pmap else "jit")


def run_options(options: RecipeOptions) -> Any:
    """Those of the options that the training loop takes."""
    from llmq_jax.training.run_options import RunOptions

    names = [field.name for field in dataclasses.fields(RunOptions) if hasattr(options, field.name)]
    return RunOptions(**{name: getattr(options, name) for name in names})


PLACES = ("out", "options", "device", "mesh", "pmap", "layout", "coordinator", "processes", "process")
"""Options that say where a run is written, which file options come from and what the run computes on. They are not
recorded, so that a run may be resumed with other ones."""


MAY_CHANGE = (
    *("sample_prompt", "accumulate", "remat", "scan_layers", "attention"),
    *("data", "validation_data", "test_data", "replay_data", "bad_rows", "fields", "chat_template"),
)
"""A recipe's own options that may differ when a run is resumed: what samples continue; how a step is computed, which
gives the same result up to rounding (except that dropout is drawn and experts are balanced by micro-batch, and that
--attention too changes dropout's draws); and where the data are, what their fields are called and what becomes of
bad rows: contents are compared by digests."""


def own_options(options: RecipeOptions, *without: str) -> dict[str, Any]:
    """The recipe's own options, for config.json: all but the training loop's, those of `PLACES`, and `without`."""
    theirs = {field.name for field in dataclasses.fields(run_options(options))}
    values = dataclasses.asdict(options)
    return {name: value for name, value in values.items() if name not in {*theirs, *PLACES, *without}}
