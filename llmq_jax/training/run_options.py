"""When a run logs, evaluates, samples and saves."""

import dataclasses
from typing import Any, Literal

from llmq_jax.errors import BadInput
from llmq_jax.field_types import check_fields
from llmq_jax.training.profile import profiled_steps

TIMES_A_RUN = 10

NEUTRAL_OPTIONS = (
    "evaluate_first",
    "sample_every",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "tensorboard",
    "wandb",
    "plot",
    "profile",
    "on_full_disk",
)
"""Options that change neither metrics of training nor weights."""

LEAST = {
    **dict.fromkeys(("steps", "keep_last", "patience"), 1),
    **dict.fromkeys(("log_every", "evaluate_every", "sample_every", "checkpoint_every"), 0),
}
"""{option: its least value}; 0 means never."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """An interval of N acts at every N-th step and at the last one; 0 means never, the end included. None: ten times in
    the run where there is something to do (a function that evaluates or samples, a folder to save in), else never."""

    steps: int
    """Updates in the whole run."""
    log_every: int = 10
    """Steps between two records in metrics.jsonl (the first step is logged too)."""
    evaluate_every: int | None = None
    evaluate_first: bool = False
    """Evaluate before the first step too: what a run from weights begins from. Neither patience nor the choice of the
    best step counts it."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a new best; None: never."""
    sample_every: int | None = None
    checkpoint_every: int | None = None
    keep_last: int = 3
    """How many of the newest checkpoints stay."""
    keep_best: bool = True
    """Keep the best checkpoint too, by what the run is judged by; a new best is saved even where no checkpoint is
    due."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    plot: bool = True
    """Draw losses.png, or curves.png of rewards, and write report.html at the end."""
    profile: str | None = None
    """Steps to trace, the first and the last: "10:15"."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """When the disk has no room for a checkpoint: stop, or warn and go on until the next one. Records then wait too."""
    branch_from: str | None = None
    """Checkpoint of another run, or that run's folder for its newest one. The run begins with all of its state:
    weights, moments, and the step, from which data and learning rates go on."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.on_full_disk not in ("stop", "continue"):
            raise BadInput(f"on_full_disk is {self.on_full_disk!r}; it must be stop or continue")
        if self.profile is not None:
            profiled_steps(self.profile, self.steps)

    def resolved(self, *, evaluates: bool, samples: bool, saves: bool) -> "RunOptions":
        """The options with a number for every interval. BadInput for an option that could do nothing."""
        intervals: dict[str, Any] = {}
        for name, able, lacking in (
            ("evaluate_every", evaluates, "evaluate function"),
            ("sample_every", samples, "sample function"),
            ("checkpoint_every", saves, "folder"),
        ):
            every = getattr(self, name)
            if every and not able:
                raise BadInput(f"{name} is {every}, but the run has no {lacking}; give it one, or leave it out")
            # Rounded up: rounded down, a run of 19 steps would save after each.
            usual = -(-self.steps // TIMES_A_RUN) if able else 0
            intervals[name] = usual if every is None else every
        if self.patience is not None and not intervals["evaluate_every"]:
            raise BadInput(f"patience is {self.patience}, but the run has no evaluations; give it some or leave it out")
        if self.evaluate_first and not intervals["evaluate_every"]:
            raise BadInput("evaluate_first is asked for, but the run has no evaluations; give it some or leave it out")
        for name in ("wandb", "profile"):
            if getattr(self, name) is not None and not saves:
                raise BadInput(f"{name} is asked for, but the run has no folder; give it one, or leave it out")
        return dataclasses.replace(self, **intervals)

    @property
    def neutral(self) -> tuple[str, ...]:
        """Options that may differ when a run is resumed: those that change neither its weights nor its metrics of
        training. Evaluations change neither, unless they decide where the run ends."""
        return NEUTRAL_OPTIONS if self.patience is not None else ("evaluate_every", *NEUTRAL_OPTIONS)

    def due(self, every: int | None, step: int) -> bool:
        """Whether what is done every `every` steps is done after this step."""
        return every is not None and every > 0 and step > 0 and (step % every == 0 or step == self.steps)
