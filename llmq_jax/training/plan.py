"""Whether a training step fits a mesh, and what its devices exchange, before there is a device or a weight.

A step is traced on shapes alone (`jax.eval_shape`, an abstract mesh) and read as one device of the mesh runs it
(`training.device_program`). Per device, of P parameters in float32, on a mesh that divides them by n:

    parameters, gradients       4 P/n bytes each
    moments                     8 P/n, in bfloat16 4 P/n; of Muon's matrices half of that
    gathered weights            of the layer that runs, its parameters undivided by fsdp, in the type of products
    activations kept            as the trace says: by `remat`, layer by layer
    logits                      of a chunk of tokens (objectives/cross_entropy.py)

and sent, with S the bytes that a device has of what is gathered or summed, over n devices along an axis (rings):

    fsdp      all-gather of each layer's weights, forward and again backward: S (n-1)/n each;
              reduce-scatter of their gradients: S (n-1)/n
              all-to-all of looked-up embeddings, forward and backward: S (n-1)/n each
    data      all-reduce of gradients: 2 S (n-1)/n
    tensor    all-reduce of activations: forward of what attention and the network give, backward of the gradients of
              their inputs: 2 S (n-1)/n
    expert    all-to-all of tokens to their experts and back, forward and backward: S (n-1)/n. A device sends as much
              room as all its tokens need at each other one

all of it once for each of `accumulate` micro-batches; and in an update by Muon, once, all-to-all of the matrices'
momentum and of their updates, S (n-1)/n each along fsdp and tensor. A plan knows nothing of the allocator's gaps, of
what the runtime itself takes, or of buffers that exchanges and fused kernels keep: leave a tenth of the memory free.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import AXES, MESH_AXES, partition_spec, path_names, row_devices
from llmq_jax.models import build, init
from llmq_jax.models.deepseek3 import modules_ahead
from llmq_jax.objectives import MultiToken, NextToken
from llmq_jax.training.device_program import COPIES, GRADIENTS, KEPT, LOSS, UNSUMMED, UPDATE, WORKING, Device
from llmq_jax.training.optimizer import MOMENTS, adamw, muon
from llmq_jax.training.partitioner import BACKWARD, FORWARD, GATHERED, LOGITS, Spec, axes_in, size_of, spec_of
from llmq_jax.training.sharding import check_mesh, check_rows
from llmq_jax.training.state import TrainState, create_state
from llmq_jax.training.step import make_train_step

PARTS = (FORWARD, LOSS, BACKWARD, UPDATE)
PARAMETERS, OPTIMIZER, BATCH = "parameters", "optimizer's moments", "batch and rest"
ROWS = (
    *(PARAMETERS, OPTIMIZER, BATCH, GRADIENTS, COPIES, KEPT),
    *(LOGITS, GATHERED, UNSUMMED, WORKING),
)
GROWTH = (2, 4, 8, 16, 32)  # of the number of devices, where nothing else helps
OPTIONS = ("moments", "attention", "dtype", "accumulate", "remat")  # to change; the first is taken back first
WORTH = 0.97  # A change that leaves more of the total than this is none.


@dataclass(frozen=True)
class Run:
    """What is planned."""

    config: Any
    sizes: Mapping[str, int]
    batch_size: int
    context: int
    accumulate: int = 1
    dtype: str = "float32"
    remat: str = "none"
    optimizer: str = "adamw"
    moments: str = "float32"
    attention: str = "auto"


@dataclass(frozen=True)
class Plan:
    run: Run
    held: Counter[str]
    """Bytes on a device all the time."""
    parts: dict[str, Counter[str]]
    """Bytes beside them when a part of the step needs most."""
    sent: Mapping[tuple[str, str], float]
    """Bytes that a device sends in a step, by (kind, axes)."""

    @cached_property
    def total(self) -> int:
        return self.held.total() + max(part.total() for part in self.parts.values())

    @property
    def least(self) -> int:
        """Bytes of parameters, moments and gradients, in whatever way the step is run."""
        return self.held.total() + self.held[PARAMETERS]


def check(run: Run) -> None:
    """BadInput for a mesh or a batch that cannot be."""
    check_mesh(run.sizes, _abstract_state(run.config, run.optimizer, run.moments, run.dtype).variables)
    check_rows(run.batch_size, run.accumulate, run.sizes)
    longest = run.config.max_position_embeddings
    if run.context > longest:
        raise BadInput(f"a context of {run.context} exceeds the model's, {longest}; choose a shorter one")


def plan(run: Run) -> Plan:
    """What a device of the mesh needs and sends. BadInput as from `check`."""
    check(run)
    auto = (AxisType.Auto,) * len(MESH_AXES)
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(run.sizes.values()), MESH_AXES, axis_types=auto)):
        step, state, batch = abstract_step(run)
        program = jax.make_jaxpr(step)(state, batch)

    leaves = [(path_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path((state, batch))]
    specs = [_division(run, names, leaf) for names, leaf in leaves]
    weights = [(leaf.shape, spec) for (names, leaf), spec in zip(leaves, specs, strict=True) if "params" in names]
    held: Counter[str] = Counter()
    device = Device(run.sizes, weights, run.config.vocab_size, passes=1 if run.accumulate == 1 else 2)
    for (names, leaf), spec in zip(leaves, specs, strict=True):
        kind = PARAMETERS if "params" in names else OPTIMIZER if "optimizer_state" in names else BATCH
        held[kind] += size_of(leaf) // device.parts(axes_in(spec))
    parts = device.run(program.jaxpr, specs)
    return Plan(run, held, parts, device.sent)


def abstract_step(run: Run) -> tuple[Any, TrainState, dict[str, Any]]:
    """(the compiled step, its state and its batch as shapes), on the mesh that is set."""
    model = build(run.config, dtype=run.dtype, remat=run.remat, attention=run.attention)
    objective = MultiToken(model) if modules_ahead(run.config) else NextToken(model)
    state: TrainState = _abstract_state(run.config, run.optimizer, run.moments, run.dtype)
    tokens = jax.ShapeDtypeStruct((run.batch_size, run.context), "int32")
    batch = {"tokens": tokens, "targets": tokens, "mask": jax.ShapeDtypeStruct(tokens.shape, "float32")}
    optimizer = _optimizer(run.optimizer, run.moments, run.dtype)
    return make_train_step(objective, optimizer, accumulate=run.accumulate).program, state, batch


@cache
def _abstract_state(config: Any, optimizer: str, moments: str, dtype: str) -> TrainState:
    state: TrainState = jax.eval_shape(lambda: create_state(init(config), _optimizer(optimizer, moments, dtype)))
    return state


def _optimizer(name: str, moments: str, dtype: str) -> optax.GradientTransformation:
    if name == "muon":
        return muon(1e-3, b2=0.95, moments=moments, dtype=dtype)
    return adamw(1e-3, b2=0.95, moments=moments)


def _division(run: Run, names: tuple[str, ...], leaf: Any) -> Spec:
    of_batch = names[0] == "1"  # of (state, batch)
    spec = PartitionSpec(AXES["batch"]) if of_batch else partition_spec(names, leaf.shape, run.sizes)
    return spec_of(spec, len(leaf.shape), run.sizes)


# What to change where a run does not fit.


@dataclass(frozen=True)
class Change:
    """Options as on a command line, and the plan with them."""

    words: str
    plan: Plan


def changes(given: Plan, memory: int) -> list[Change]:
    """Single changes by which the run fits, the least one of each option; else a combination that fits; else
    nothing."""
    single = [_first_that_fits(runs, given, memory) for runs in _variants(given.run)]
    return [change for change in single if change] or _combined(given, memory)


def _variants(run: Run) -> list[list[Run]]:
    """For each option, the runs that differ by it, the least change first; the last entry has more devices."""
    remats = ("none", "dots", "full")
    rows = run.batch_size // row_devices(run.sizes)
    data, fsdp = run.sizes["data"], run.sizes["fsdp"]
    return [
        [replace(run, remat=remat) for remat in remats[remats.index(run.remat) + 1 :]],
        [replace(run, accumulate=n) for n in range(run.accumulate + 1, rows + 1) if rows % n == 0],
        [replace(run, dtype="bfloat16")] if run.dtype == "float32" else [],
        [replace(run, attention="blocked")] if run.attention != "blocked" else [],
        [replace(run, moments=moments) for moments in MOMENTS[MOMENTS.index(run.moments) + 1 :]],
        [
            replace(run, sizes={**run.sizes, "data": data // n, "fsdp": fsdp * n})
            for n in range(2, data + 1)
            if data % n == 0
        ],
        # With as many rows on each device.
        [replace(run, sizes={**run.sizes, "fsdp": fsdp * n}, batch_size=run.batch_size * n) for n in GROWTH],
    ]


def _first_that_fits(runs: list[Run], given: Plan, memory: int) -> Change | None:
    for run in runs:
        same_state = (run.sizes, run.moments) == (given.run.sizes, given.run.moments)
        # Either the state stays as it is, or what is live beside it does: where that alone is too much, nothing helps.
        if (given.least if same_state else given.total - given.least) > memory:
            return None
        found = _planned(run)
        if found and found.total <= memory:
            return Change(words(given.run, run), found)
    return None


def _planned(run: Run) -> Plan | None:
    """None where rows or dimensions cannot be divided so."""
    try:
        return plan(run)
    except BadInput:
        return None


def _combined(given: Plan, memory: int) -> list[Change]:
    """Change one option after another, as far as it goes, until the run fits; then take back those without which it
    still fits."""
    best, options = given, len(_variants(given.run))
    for option in range(options):
        runs = _variants(best.run)[option]
        for run in runs if option == options - 1 else runs[-1:]:
            if best.total <= memory:
                break
            found = _planned(run)
            if found and found.total < WORTH * best.total:
                best = found
    if best.total > memory:
        return []
    for name in OPTIONS:
        if getattr(best.run, name) != getattr(given.run, name):
            found = _planned(replace(best.run, **{name: getattr(given.run, name)}))
            best = found if found and found.total <= memory else best
    return [Change(words(given.run, best.run), best)]


def words(before: Run, after: Run) -> str:
    """The options that differ, as on a command line."""
    options = [
        f"--{name} {getattr(after, name)}"
        for name in reversed(OPTIONS)
        if getattr(after, name) != getattr(before, name)
    ]
    if after.batch_size != before.batch_size:
        options.append(f"--batch-size {after.batch_size}")
    if after.sizes != before.sizes:
        devices = math.prod(after.sizes.values())
        more = f" ({devices:,} devices)" if devices != math.prod(before.sizes.values()) else ""
        options.append(f"--mesh {mesh_text(after.sizes)}{more}")
    return " ".join(options)


def mesh_text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "data=1"


# As text.


def plan_text(found: Plan, memory: int) -> str:
    """Tables of memory and of what is sent, in GiB or MiB of a device, and whether it fits."""
    run = found.run
    unit, name = _unit(found.total)
    parts = [part for part in PARTS if part in found.parts]
    table = {row: [found.held[row] or found.parts[part][row] for part in parts] for row in ROWS}
    width = max(map(len, (*ROWS, *(kind for kind, _ in found.sent))))
    lines = [f"{f'{name} on a device while most is needed in':{width}}  " + "".join(f"{part:>10}" for part in parts)]
    width = max(width, len(lines[0]) - 2 - 10 * len(parts))

    def line(label: str, sizes: list[int]) -> str:
        return f"{label:{width}}  " + "".join(f"{size / unit:10.2f}" for size in sizes)

    lines += [line(row, sizes) for row, sizes in table.items() if max(sizes) > unit / 200]
    lines.append(line("total", [found.held.total() + found.parts[part].total() for part in parts]))
    if found.sent:
        lines += ["", f"{f'{name} that a device sends in a step':{width}}{'along':>12}"]
        largest = sorted(found.sent.items(), key=lambda item: item[1], reverse=True)
        sent = [(of, axes, size) for (of, axes), size in largest if size > unit / 200]
        lines += [f"{of:{width}}{axes:>12}{size / unit:10.2f}" for of, axes, size in sent]
        lines.append(f"{'total':{width}}{'':12}{sum(found.sent.values()) / unit:10.2f}")
    devices = math.prod(run.sizes.values())
    fits = "fits" if found.total <= memory else "does not fit"
    where = f"each of {devices:,} devices" if devices > 1 else "the device"
    room = f"{memory / _unit(memory)[0]:.2f}".rstrip("0").rstrip(".")
    lines += ["", f"{found.total / unit:.2f} {name} on {where}: {fits} {room} {_unit(memory)[1]}"]
    return "\n".join(lines)


def changes_text(given: Plan, memory: int) -> str:
    """What to change, one line each."""
    found = changes(given, memory)
    if not found:
        return (
            f"no change that was tried makes it fit, nor all of them on {GROWTH[-1]} times the devices; choose a "
            "shorter --context or a smaller model"
        )
    lines = ["what makes it fit, each alone:" if len(found) > 1 else "what makes it fit:"]
    for change in found:
        unit, name = _unit(change.plan.total)
        lines.append(f"  {change.words}: {change.plan.total / unit:.2f} {name}")
    return "\n".join(lines)


def _unit(size: int) -> tuple[int, str]:
    """The unit in which so many bytes are shown: (bytes, name)."""
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
