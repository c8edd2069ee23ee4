"""Metrics for other tools to show: TensorBoard event files, and Weights & Biases on request.

Both are copies of metrics.jsonl, which alone is cut back exactly when a killed run resumes.
"""

import importlib.util
import os
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llmq_jax.atomic_files import AppendedFile, write_atomically
from llmq_jax.errors import BadInput, first_line
from llmq_jax.training.metrics import VALIDATION, Record

WANDB_ID = "wandb_id.txt"


class TensorBoard:
    """Event files in `folder`; events of steps after `resume_step`, from before a kill, are purged.

    tensorboardX provides the format only. Each of its own writers has a thread, which a full disk ends unnoticed; the
    run would then wait for it for ever.
    """

    def __init__(self, folder: str | Path, resume_step: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Also where a run killed before its first checkpoint starts again from step 0.
        purges = resume_step > 0 or any(folder.glob("events.*"))
        self._format = _tensorboard_format()
        self._file = AppendedFile(folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}")
        self._append(file_version="brain.Event:2")
        if purges:
            start = self._format.SessionLog(status=self._format.SessionLog.START)
            self._append(step=resume_step + 1, session_log=start)

    def write(self, record: Record) -> None:
        values = [
            self._format.Summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in record.items()
            if name != "step" and value is not None
        ]
        self._append(step=record["step"], summary=self._format.Summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _append(self, **fields: Any) -> None:
        """Append one event: its length, its bytes, and checksums of both."""
        event = self._format.Event(wall_time=time.time(), **fields).SerializeToString()
        length = len(event).to_bytes(8, "little")
        checks = [self._format.masked_crc32c(part).to_bytes(4, "little") for part in (length, event)]
        self._file.append(length + checks[0] + event + checks[1])


class WeightsAndBiases:
    """The run `name` of `project`. A resumed run sends some steps twice; W&B keeps the first, which are equal.
    BadInput where W&B does not know the user, or cannot be reached."""

    def __init__(self, project: str, folder: str | Path, name: str, config: dict[str, Any]):
        require_wandb()
        import wandb

        folder = Path(folder)
        id_file = folder / WANDB_ID
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex.encode())
        try:
            self._run = wandb.init(
                project=project, id=id_file.read_text(), name=name, dir=folder, config=config, resume="allow"
            )
        except wandb.Error as error:
            raise BadInput(
                f"W&B did not begin: {first_line(error).rstrip('.')}; set WANDB_MODE=offline to send the run later, or "
                "leave the wandb option out"
            ) from None

    def write(self, record: Record) -> None:
        figures = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._run.log(figures, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def require_wandb() -> None:
    """BadInput where W&B is asked for and not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise BadInput("wandb is not installed; pip install -e '.[wandb]', or leave the wandb option out")


def _tag(name: str) -> str:
    group = "validation" if name.startswith(VALIDATION) else "training"
    return f"{group}/{name.removeprefix(VALIDATION)}"


def _tensorboard_format() -> SimpleNamespace:
    """TensorBoard's messages and their checksum. On import tensorboardX loads PyTorch where there is one, for features
    unused here: a second of time and a second set of compute threads. Marked as absent, PyTorch stays out."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # which is how Python marks a module as absent
    try:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c
    finally:
        if hidden:
            del sys.modules["torch"]
    return SimpleNamespace(Event=Event, SessionLog=SessionLog, Summary=Summary, masked_crc32c=masked_crc32c)
