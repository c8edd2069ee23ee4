"""How a recipe runs on the devices that its options ask for, and what to change where memory runs out."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmq_jax.backend import use_device
from llmq_jax.errors import BadInput
from llmq_jax.options import named_as_options, option_name
from train.options import PLACES, RecipeOptions


def on_devices(recipe: Callable) -> Callable:
    """Decorator: run a recipe, a function of its options, on the device or the mesh that they ask for."""

    @functools.wraps(recipe)
    def run(options: RecipeOptions, *arguments: Any) -> Any:
        import jax

        from llmq_jax.training.joining import joined
        from llmq_jax.training.processes import of_first, one_speaks, same
        from llmq_jax.training.profile import profiled_steps
        from llmq_jax.training.run_config import differences
        from llmq_jax.training.run_folder import config_of_run
        from llmq_jax.training.sharding import make_mesh

        preview = getattr(options, "preview", False)
        trains = not (options.layout or preview)
        if options.profile is not None:
            profiled_steps(options.profile, options.steps, "--profile")
        with joined(options.coordinator, options.processes, options.process), contextlib.ExitStack() as stack:
            use_device(options.device)
            stack.enter_context(one_speaks())
            mesh = mesh_of(options)
            # Processes with different options would wait for one another in exchanges that not all of them make.
            given = {name: value for name, value in dataclasses.asdict(options).items() if name not in PLACES}
            same({**given, "mesh": mesh, "processes": options.processes, "layout": options.layout}, differences)
            if (folder := options.folder) is not None and trains:
                # Only looked at: the run itself opens it later, once data and model, which may take long, are loaded.
                of_first(lambda: config_of_run(Path(folder)))
            if mesh is not None and not options.layout:  # a layout needs no devices
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
            stack.enter_context(named_as_options("branch_from"))
            return recipe(options, *arguments)

    return run


def mesh_of(options: RecipeOptions) -> str | None:
    """The mesh that the options ask for; None: one device, or --pmap. Without --mesh, several processes use all their
    devices along `data`."""
    import jax

    if options.pmap and options.mesh is not None:
        raise BadInput("--mesh has no effect with --pmap; leave one of them out")
    if options.pmap and jax.device_count() == 1:
        raise BadInput("--pmap has no effect on one device; leave it out")
    if jax.process_count() == 1 or options.mesh is not None:
        return options.mesh
    if options.pmap:
        raise BadInput(f"--pmap is for one process, and here are {jax.process_count()}; use --mesh in its place")
    return f"data={jax.device_count()}"


@contextlib.contextmanager
def advice_on_memory(options: RecipeOptions) -> Iterator[None]:
    """Turn running out of memory into BadInput that says which options to change."""
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
    """At most three changes that save memory, such as "--remat none -> full": in steps, or (not `in_steps`) in the
    state alone. Changes that are no longer possible are left out."""
    import jax

    from llmq_jax.training.sharding import row_devices

    sizes = devices_of(options)
    of_prompts = hasattr(options, "prompts_per_step")
    changes = []
    if in_steps:
        # Fewer rows in a batch (in GRPO, in a step), or fewer of them at a time.
        name = "prompts_per_step" if of_prompts else "batch_size"
        count, each = getattr(options, name), options.group_size if of_prompts else 1
        devices, parts = row_devices(sizes), options.accumulate
        more = next((n for n in range(parts + 1, count * each + 1) if count * each % (n * devices) == 0), None)
        halves = count % 2 == 0 and count // 2 * each % (parts * devices) == 0
        fewer = [f"{option_name(name)} {count} -> {count // 2}"] if halves else []
        same = "" if options.loss_of_parts else " (the same result)"
        # Updates of a reward model with --judge are neither cut into parts nor computed in another type.
        alone = " for the policy" if getattr(options, "judge", None) is not None else ""
        fewer += [f"--accumulate {parts} -> {more}{same}{alone}"] if more else []
        changes += [" or ".join(fewer)] if fewer else []
        changes += [f"--remat {options.remat} -> full"] if options.remat != "full" else []
        changes += [f"--dtype float32 -> bfloat16{alone}"] if options.dtype == "float32" else []
    train = getattr(options, "train", "all")
    muon = " (then without --optimizer muon)" if options.optimizer == "muon" else ""
    changes += [f"--train all -> lora{muon}"] if hasattr(options, "train") and train == "all" else []
    in_float32 = train == "lora" and options.weight_dtype == "float32"
    changes += ["--base-dtype float32 -> bfloat16"] if in_float32 else []
    if train == "all" and options.moments == "float32" and options.betas[0] <= 0.99:
        changes += [f"--moments float32 -> {'bfloat16' if options.betas[1] <= 0.99 else 'first-bfloat16'}"]
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
    """The number of devices among which the rows of a batch are divided."""
    from llmq_jax.training import sharding

    return sharding.row_devices(devices_of(options))


def check_mesh(options: RecipeOptions, variables: Any, rows: int) -> None:
    """BadInput where --mesh does not fit these variables (or their shapes), or batches of this many rows. With
    --layout, print the table of shardings and exit."""
    from llmq_jax.training import sharding

    sizes = devices_of(options)
    sharding.check_mesh(sizes, variables)
    sharding.check_rows(rows, options.accumulate, sizes)
    if options.layout:
        print(sharding.layout_text(variables, sizes), flush=True)
        raise SystemExit(0)
