"""Metrics for the eyes of others: TensorBoard event files, and Weights & Biases on request.

Both are copies. What counts is metrics.jsonl, which alone is cut back exactly when a killed run resumes.
"""

import importlib.util
import sys
from pathlib import Path

from llmq_jax.errors import BadInput
from llmq_jax.training.metrics import Record


class TensorBoard:
    """Event files in `folder`; events of steps after `resume_step`, from before a kill, are purged."""

    def __init__(self, folder: str | Path, resume_step: int = 0):
        # Also where a run killed before its first checkpoint starts again from step 0.
        purges = resume_step > 0 or any(Path(folder).glob("events.*"))
        self._writer = _summary_writer()(str(folder), purge_step=resume_step + 1 if purges else None)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                group = "validation" if name.startswith("validation_") else "training"
                self._writer.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The run `name` of `project`. A resumed run sends some steps twice; W&B keeps the first, which are equal."""

    def __init__(self, project: str, folder: str | Path, name: str, config: dict):
        require_wandb()
        import wandb

        folder = Path(folder)
        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=project, id=id_file.read_text(), name=name, dir=folder, config=config, resume="allow"
        )

    def write(self, record: Record) -> None:
        figures = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._run.log(figures, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def require_wandb() -> None:
    """BadInput where W&B is asked for and not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise BadInput("wandb is not installed; pip install 'llmq_jax[wandb]', or leave the wandb option out")


def _summary_writer() -> type:
    """tensorboardX's writer. On import it loads PyTorch where there is one, for features unused here: a second of time
    and a second set of compute threads. Marked as absent, PyTorch stays out."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter
