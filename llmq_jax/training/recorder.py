"""Everything a run tells the world: files in its folder, trackers, and the terminal."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmq_jax.atomic_files import full_disk
from llmq_jax.host_copies import to_host
from llmq_jax.training.metrics import (
    METRICS,
    SAMPLES,
    VALIDATION,
    MetricsFile,
    Record,
    SamplesFile,
    drop_metrics_after,
    drop_samples_after,
    sample_text,
    shown_loss,
)
from llmq_jax.training.pace import Pace
from llmq_jax.training.progress import Status, TextOutput, make_progress
from llmq_jax.training.report import device_memory_bytes
from llmq_jax.training.run_folder import RunFolder
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.time_spent import TimeSpent
from llmq_jax.training.trackers import TensorBoard, WeightsAndBiases


class Step(NamedTuple):
    """A step that was handed to the device, whose metrics may not be there yet."""

    step: int
    tokens: int
    """Tokens of the whole run, up to this step."""
    metrics: dict[str, Any]


class Recorder:
    """Writes metrics and samples to the files and trackers that the options ask for, and to the terminal; without a
    folder, to the terminal alone. Files are cut back to the step that the run starts from; to nothing where it begins
    `anew`, without a checkpoint of its own. A sample that is due at that step comes after its checkpoint, and is
    written once more. On the terminal, the metrics in `show` are printed beside the loss."""

    def __init__(
        self,
        folder: RunFolder | None,
        options: RunOptions,
        start: int,
        output: TextOutput,
        *,
        anew: bool = False,
        learning_rates: np.ndarray | None = None,
        show: Sequence[str] = (),
    ):
        self._options, self._learning_rates, self._show = options, learning_rates, show
        self._metrics = self._samples = None
        self._goes_on = options.on_full_disk == "continue"
        self._told = False
        self._trackers: list[TensorBoard | WeightsAndBiases] = []
        if folder is not None:
            recorded = -1 if anew else start
            drop_metrics_after(folder.path / METRICS, recorded)
            sampled = recorded - options.due(options.sample_every, recorded)
            drop_samples_after(folder.path / SAMPLES, sampled)
            self._metrics = MetricsFile(folder.path / METRICS)
            if options.sample_every:
                self._samples = SamplesFile(folder.path / SAMPLES)
            if options.tensorboard:
                self._trackers.append(TensorBoard(folder.path / "tensorboard", recorded))
            if options.wandb:
                config = {**folder.config, "options": dataclasses.asdict(options)}
                name = folder.path.absolute().name
                self._trackers.append(WeightsAndBiases(options.wandb, folder.path, name, config))
        self._progress = make_progress(options.steps, output, start)

    def step(self, done: Step, figures: dict[str, float], pace: Pace, time: TimeSpent) -> None:
        """Show a finished step, and log it where that is due. `figures` are those of its metrics that are read
        already."""
        rate = None if self._learning_rates is None else float(self._learning_rates[done.step - 1])
        record = self._record(done, figures, rate, pace, time) if self._is_logged(done.step) else None
        mean_speed = pace.tokens_per_second()
        loss = shown_loss(figures)
        assert loss is not None
        status = Status(
            step=done.step,
            loss=loss,
            learning_rate=rate,
            tokens_per_second=mean_speed,
            mfu=pace.mfu(mean_speed),
            seconds_left=pace.seconds_left(),
            shown=tuple((name, figures[name]) for name in self._show if name in figures),
        )
        self._progress.update(status, logged=record is not None)
        if record is not None:
            self._write(record)

    def evaluation(self, record: Record, judged_by: str) -> str:
        """Write an evaluation; returns it as a text for people, which begins with what the run is judged by."""
        self._write(record)
        means = {name.removeprefix(VALIDATION): value for name, value in record.items() if name.startswith(VALIDATION)}
        shown = dict.fromkeys((judged_by, "loss", *(self._show or means)))
        figures = ", ".join(f"{name.replace('_', ' ')} {means[name]:z.4f}" for name in shown if name in means)
        return f"validation {figures}"

    def sample(self, step: int, text: str) -> None:
        self._progress.message(sample_text(step, text))
        if self._samples:
            self._keep(self._samples.write, step, text)

    def message(self, text: str) -> None:
        self._progress.message(text)

    def sync(self) -> None:
        """Put metrics and samples on the disk, including those for which it had no room before."""
        for file in (self._metrics, self._samples):
            if file:
                file.sync()
        self._told = False

    def close(self) -> None:
        self._progress.close()
        closing: list[Any] = [self._metrics, self._samples, *self._trackers]
        for each in closing:
            if each:
                each.close()

    def _is_logged(self, step: int) -> bool:
        options = self._options
        # With patience, this evaluation may end the run, whose last step is logged.
        may_be_last = options.patience is not None and options.due(options.evaluate_every, step)
        return bool(options.log_every) and (step == 1 or may_be_last or options.due(options.log_every, step))

    def _record(self, done: Step, figures: dict[str, float], rate: float | None, pace: Pace, time: TimeSpent) -> Record:
        others = to_host({name: value for name, value in done.metrics.items() if name not in figures})
        speed = pace.since_mark()
        of_device = {"mfu": pace.mfu(speed), "memory_bytes": device_memory_bytes()}
        return {
            "step": done.step,
            "tokens": done.tokens,
            "loss": figures["loss"],
            **({} if rate is None else {"learning_rate": rate}),
            **figures,
            "tokens_per_second": speed,
            **{name: value for name, value in of_device.items() if value is not None},
            **time.since_mark(),
            **others,
        }

    def _write(self, record: Record) -> None:
        if self._metrics:
            self._keep(self._metrics.write, record)
        figures = {name: value for name, value in record.items() if np.ndim(value) == 0}
        for tracker in self._trackers:
            self._keep(tracker.write, figures)

    def _keep(self, write: Callable[..., None], *what: Any) -> None:
        """Write. Where the disk is full and the run is to go on, warn once; what is written meanwhile is kept until
        there is room."""
        try:
            write(*what)
        except OSError as error:
            why = full_disk(error)
            if why is None or not self._goes_on:
                raise
            if not self._told:
                self._progress.message(f"warning: {why}; going on, and writing it later")
            self._told = True
