"""The options that say where a command computes: on one device, or on a mesh of all that there are."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmq_jax.command_line import default_is, use_device
from llmq_jax.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""
    mesh: Annotated[str | None, default_is("one device")] = None
    """Devices along the axes data, fsdp, expert and tensor, as fsdp=2,tensor=4: see docs/scaling.md."""

    @contextlib.contextmanager
    def on_devices(self, rows: int | None = None) -> Iterator[None]:
        """The device, or the mesh, on which whatever is loaded and computed meanwhile lies.

        `rows` is how many go through the model at a time. BadInput: there is no such device, --mesh does not fit the
        devices that there are, or its axes do not divide so many rows.
        """
        use_device(self.device)
        import jax

        from llmq_jax.training.sharding import check_rows, make_mesh, mesh_sizes

        if self.mesh is None:
            yield
            return
        mesh = make_mesh(self.mesh)
        if rows is not None:
            check_rows(rows, 1, mesh_sizes(self.mesh))
        with jax.set_mesh(mesh):
            yield

    def load_model(self, source: str, dtype: Any) -> Any:
        """`lq.load`, which reads weights straight to the devices that have their parts. BadInput also where an axis of
        --mesh divides none of them."""
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
        """The least number of rows, from `count` on, that --mesh divides."""
        from llmq_jax.layers.axes import row_devices
        from llmq_jax.training.sharding import mesh_sizes

        devices = 1 if self.mesh is None else row_devices(mesh_sizes(self.mesh))
        return -(-count // devices) * devices

    def check_one_row(self, what: str) -> None:
        """BadInput for an axis that divides nothing but rows, where they come one at a time; `what` they are."""
        if self.mesh is None:
            return
        from llmq_jax.training.sharding import mesh_sizes

        if (size := mesh_sizes(self.mesh)["data"]) > 1:
            raise BadInput(
                f"mesh axis data={size} has no effect on {what} at a time: its devices would all do the same; divide "
                "the model in its place, as tensor or fsdp do"
            )
