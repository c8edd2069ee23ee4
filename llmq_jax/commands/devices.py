"""The options that say where a command computes: on one device, or on a mesh of all devices."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from llmq_jax.backend import Device, use_device
from llmq_jax.errors import BadInput
from llmq_jax.options import default_is, option_name

LESS = ("context", "max_length", "max_new_tokens")
"""Options of commands that save memory when they are made smaller."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    device: Device = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""
    mesh: Annotated[str | None, default_is("one device")] = None
    """Number of devices along the mesh axes data, fsdp, expert and tensor, such as fsdp=2,tensor=4; see
    docs/scaling.md."""

    @contextlib.contextmanager
    def on_devices(self, rows: int | None = None) -> Iterator[None]:
        """Context in which everything is loaded and computed on the device, or the mesh, of the options.

        `rows` is how many rows go through the model at a time. BadInput: there is no such device, --mesh does not fit
        the devices that there are, or its axes do not divide the rows.
        """
        use_device(self.device)
        import jax

        from llmq_jax.training.sharding import check_rows, make_mesh, mesh_sizes

        with self.advice_on_memory():
            if self.mesh is None:
                yield
                return
            mesh = make_mesh(self.mesh)
            if rows is not None:
                check_rows(rows, 1, mesh_sizes(self.mesh))
            with jax.set_mesh(mesh):
                yield

    @contextlib.contextmanager
    def advice_on_memory(self) -> Iterator[None]:
        """Turn running out of memory into BadInput that says which options to change."""
        import jax

        from llmq_jax.training.out_of_memory import ERRORS, placed, shortage

        try:
            yield
        except ERRORS as error:
            if (said := shortage(error)) is None:
                raise
            less = [f"a smaller {option_name(name)}" for name in LESS if hasattr(self, name)]
            if getattr(self, "batch_size", None) not in (None, 1):
                less.append("a smaller --batch-size")
            dtype = getattr(self, "dtype", None)  # on a CPU None may be bfloat16, if it is that of the file
            if dtype == "float32" or (dtype is None and jax.default_backend() != "cpu"):
                less.append("--dtype bfloat16")
            divided = "other axes of --mesh" if self.mesh else "--mesh tensor=N, where there are N devices"
            raise BadInput(
                f"out of memory ({said}), beside {placed()} of arrays; to need less, take {', '.join([*less, divided])}"
            ) from error

    def load_model(self, source: str, dtype: Any) -> Any:
        """`lq.load`, which reads weights straight to the devices that hold their parts. BadInput also where an axis of
        --mesh divides no parameter."""
        import llmq_jax as lq

        lm = lq.load(source, dtype=dtype)
        self.check_model(lm)
        return lm

    def check_model(self, lm: Any) -> None:
        """BadInput where an axis of --mesh divides no parameter of the model."""
        from llmq_jax.training.sharding import check_mesh, mesh_sizes

        if self.mesh is not None:
            check_mesh(mesh_sizes(self.mesh), lm.variables)

    def rows_of(self, count: int) -> int:
        """`count` rounded up to a number of rows that --mesh divides."""
        from llmq_jax.layers.axes import row_devices
        from llmq_jax.training.sharding import mesh_sizes

        devices = row_devices(mesh_sizes(self.mesh or "data=1"))
        return -(-count // devices) * devices

    def check_one_row(self, what: str) -> None:
        """BadInput where --mesh has an axis that divides only rows, in a command that computes one row at a time.
        `what` names such a row."""
        from llmq_jax.training.sharding import mesh_sizes

        if (size := mesh_sizes(self.mesh or "data=1")["data"]) > 1:
            raise BadInput(
                f"mesh axis data={size} has no effect on {what} at a time: its devices would all do the same; divide "
                "the model in its place, as tensor or fsdp do"
            )
