"""The one training loop, for every recipe: step, log, evaluate, sample, checkpoint, resume.

    result = run(state, train_step, batches, RunOptions(steps=1000), folder="out/run", model_config=config)

JAX hands a step to the device and returns at once. The loop uses that: while the device computes step s, it builds the
batch of step s + 1 and reads the figures of step s - 1, so that the device never waits for Python.
"""

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.atomic_files import full_disk, json_bytes
from llmq_jax.errors import BadInput
from llmq_jax.training import processes
from llmq_jax.training.checkpoints import (
    Checkpoints,
    JudgedBy,
    config_dict,
    find_checkpoint,
    read_config,
    read_info,
    restore_checkpoint,
)
from llmq_jax.training.expert_plots import plot_experts
from llmq_jax.training.flops import token_utilisation
from llmq_jax.training.host_memory import keep_freed_memory
from llmq_jax.training.manifest import CorruptCheckpoint
from llmq_jax.training.metrics import METRICS, OWN_LOSSES, read_metrics, shown_loss
from llmq_jax.training.out_of_memory import ERRORS, OutOfMemory, shortage, usage
from llmq_jax.training.pace import Pace
from llmq_jax.training.plots import Points, curve, plot_losses, training_curve
from llmq_jax.training.profile import PROFILE, Profile, profiled_steps
from llmq_jax.training.progress import Status, TextOutput
from llmq_jax.training.recorder import Recorder
from llmq_jax.training.report import RunResult, device_memory_bytes, peak_memory_bytes, report_text
from llmq_jax.training.report_page import write_report_page
from llmq_jax.training.run_folder import CODE, FINISHED, RunFolder, code_digest, differences
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.sharding import row_share
from llmq_jax.training.signals import StoppedBySignal, StopSignals
from llmq_jax.training.time_spent import TimeSpent
from llmq_jax.training.trackers import require_wandb


class NonFiniteLoss(BadInput):
    """Training broke down. The message names the step and the checkpoint to go on from."""


class DiskFull(BadInput):
    """There is no room for a checkpoint or a record. The message names the checkpoint to go on from."""


def run(
    state: Any,
    train_step: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]],
    batches: Any,
    options: RunOptions,
    *,
    folder: str | Path | RunFolder | None = None,
    config: dict[str, Any] | None = None,
    may_change: Collection[str] = (),
    model_config: Any = None,
    tokenizer: Any = None,
    schedule: Callable[[Any], Any] | None = None,
    evaluate: Callable[[dict[str, Any]], dict[str, float]] | None = None,
    judged_by: JudgedBy = ("loss", "lowest"),
    sample: Callable[[dict[str, Any], int], str] | None = None,
    tokens_per_step: int | None = None,
    flops_per_token: float | None = None,
    show: Sequence[str] = (),
    next_commands: Sequence[str] = (),
    output: TextOutput | None = None,
) -> RunResult:
    """Train `state` (which is consumed) until `options.steps` updates are done, and return the result.

    * `train_step(state, batch) -> (state, metrics)`, from `make_train_step`. `batches[i]` is the batch of update i,
      counted from 0: a dict of numpy arrays, always the same one for the same i.
    * `folder`: where checkpoints, metrics, samples and plots go. If it holds this run, the run resumes from its newest
      whole checkpoint, and the result equals that of a run never interrupted, bit for bit. It is this run's if the
      options, the model config, the rates of `schedule` and `config` (a dict of whatever else defines the run, save for
      its fields named in `may_change`) are the same; a RunFolder, which has a config already, stays open. None: nothing
      is written.
    * `model_config` (a dict or config dataclass) and `tokenizer` are saved with every checkpoint.
    * `schedule(i)` is the learning rate of update i, here only for the log.
    * `evaluate(variables)` returns means by name, of which the one of `judged_by` tells the best step, by its lowest or
      its highest value; `sample(variables, step)` a text to show, the same one for the same arguments.
    * `tokens_per_step`, over all processes, is what `batches.count_tokens(i)` says where not given, or else counted
      from each batch, of which other processes are taken to have as many; a step that draws its own tokens tells how
      many by a metric `tokens`, which is no array of the device unless it may be waited for.
    * `flops_per_token`, from `token_flops`, is what the device's utilisation (MFU) is told by, if its peak is known.
    * `show` names metrics of a step that stand beside the loss on the console.
    * `next_commands`, for whoever has the checkpoints, are shown at the end if there are any; `output` is where
      progress goes (standard output).

    Under Linux the process's malloc is told to keep freed memory, for good: see host_memory.py.

    Raises BadInput before anything runs; NonFiniteLoss when training breaks down; OutOfMemory; DiskFull, unless
    the options have the run go on and the checkpoint without room is not its last; StoppedBySignal, which
    exits, after SIGTERM or SIGINT, once the state is saved (without checkpoints, both signals act as usual).
    """
    able = {"evaluates": evaluate is not None, "samples": sample is not None}
    options = options.resolved(**able, saves=folder is not None)
    if judged_by[1] not in ("lowest", "highest"):
        raise BadInput(f"judged_by is {judged_by!r}; it must be a mean that evaluate returns, and lowest or highest")
    if options.wandb:
        require_wandb()
    if config is not None and not isinstance(folder, str | Path):
        raise BadInput(
            "config has no effect: without a folder nothing is saved, and a RunFolder has its own; leave it out"
        )
    if options.on_full_disk == "continue" and jax.process_count() > 1:
        raise BadInput("on_full_disk is continue, which is for one process; leave it out")
    if tokenizer is not None and options.checkpoint_every:
        with tempfile.TemporaryDirectory() as trial:  # what cannot be saved is told now, not by the first checkpoint
            tokenizer.save(trial)
    shown_on: TextOutput = sys.stdout if output is None else output
    keep_freed_memory()

    # What fails before the first step leaves no folder behind, which another command would find taken. Several
    # processes open it first: that tells whether they agree, and if they did not they would wait for one another here.
    first_means = None
    if isinstance(folder, str | Path) and jax.process_count() == 1 and not Path(folder).exists():
        if options.branch_from is not None:
            branch_source(options)
        elif options.evaluate_first:
            assert evaluate is not None
            first_means = evaluate(state.variables)
    opened: contextlib.AbstractContextManager[RunFolder | None]
    if isinstance(folder, str | Path):
        opened = open_folder(folder, options, config=config, may_change=may_change, model_config=model_config, **able)
    else:
        opened = contextlib.nullcontext(folder)
    with opened as run_folder:
        loop = _Loop(
            state=state,
            train_step=train_step,
            batches=batches,
            options=options,
            folder=run_folder,
            model_config=model_config,
            tokenizer=tokenizer,
            learning_rates=None if schedule is None else _table(schedule, options.steps),
            evaluate=evaluate,
            judged_by=judged_by,
            sample=sample,
            tokens_per_step=tokens_per_step,
            flops_per_token=flops_per_token,
            show=show,
            first_means=first_means,
        )
        if run_folder is not None and run_folder.finished:
            result = loop.finished_before()
            print(f"{run_folder.path} is finished already; nothing to do", file=shown_on)
        else:
            with loop.full_disk_told():
                result = loop.train(shown_on)
        usable = loop.checkpoints is not None and loop.checkpoints.latest_step() is not None
        path = None if run_folder is None else run_folder.path
        further = "\n".join(filter(None, (loop.best_text(result), loop.profile.text())))
        report = report_text(result, path, further, next_commands if usable else ())
        print(report, file=shown_on, flush=True)
        return result


def branch_source(options: RunOptions) -> Path:
    """The checkpoint that `branch_from` names. BadInput where there is none, or none that leaves steps to do."""

    def find() -> str:
        source = str(options.branch_from)
        found = find_checkpoint(source)
        if found is None:
            raise BadInput(f"branch_from is {source}, where no checkpoint is; name one, or the folder of a run")
        step = read_info(found).step
        if step >= options.steps:
            raise BadInput(
                f"branch_from is {found}, the state after step {step}, and steps is {options.steps}, which counts from "
                "the other run's beginning; give more"
            )
        return str(found)

    return Path(processes.share(processes.together(lambda: find() if processes.first() else None)))


def count_tokens(batch: dict[str, Any]) -> int:
    """Tokens that are no padding: as many as `lengths` say, or those of `segment_ids`; without, the ones in `mask` or,
    in batches of several parts, in every `..._mask`."""
    if "lengths" in batch:
        return int(np.sum(batch["lengths"]))
    if "segment_ids" in batch:
        return int(np.count_nonzero(batch["segment_ids"]))
    masks = [array for name, array in batch.items() if name == "mask" or name.endswith("_mask")]
    return sum(int(np.count_nonzero(mask)) for mask in masks) if masks else int(np.size(batch.get("tokens", ())))


class _Step(NamedTuple):
    step: int
    tokens: int
    metrics: dict[str, Any]


@dataclasses.dataclass
class _Loop:
    """A run under way: `step` updates are handed to the device, on `tokens` tokens."""

    state: Any
    train_step: Callable[..., Any]
    batches: Any
    options: RunOptions
    folder: RunFolder | None
    model_config: Any
    tokenizer: Any
    learning_rates: np.ndarray | None
    evaluate: Callable[..., Any] | None
    judged_by: JudgedBy
    sample: Callable[..., Any] | None
    tokens_per_step: int | None
    flops_per_token: float | None = None
    show: Sequence[str] = ()
    first_means: dict[str, float] | None = None
    """Of the evaluation before the first step, where that is made already."""
    step: int = 0
    tokens: int = 0
    batch: Any = None
    """Of the step that is handed over next."""
    loss: float | None = None
    validation: dict[int, float] = dataclasses.field(default_factory=dict)
    """What the run is judged by, by step."""
    validation_losses: dict[int, float] = dataclasses.field(default_factory=dict)
    saved: int | None = None
    """Step of the newest checkpoint."""

    def __post_init__(self) -> None:
        self.step = self.start = int(self.state.step)
        self.judged = f"validation_{self.judged_by[0]}"
        self.shares = row_share()["process_count"]  # of a batch; this process counts the tokens of its own
        self.utilisation = token_utilisation(self.flops_per_token, self.state, getattr(self.train_step, "replicas", 1))
        self.pace = Pace(self.options.steps)
        self.time = TimeSpent()
        self.profile = Profile()
        self.checkpoints: Checkpoints | None = None
        if self.folder is not None:
            self.checkpoints = Checkpoints(self.folder.checkpoints, self.options.keep_last, self.options.keep_best)

    def train(self, output: TextOutput) -> RunResult:
        """All steps that are left, then the end of the run."""

        def say(text: str) -> None:
            print(text, file=output, flush=True)

        asked = self.options.profile
        profiled = None if asked is None else profiled_steps(asked, self.options.steps)
        if self.folder is None:
            self.branch(say)
        else:
            self.resume(say)
        first = processes.first()
        folder = self.folder if first else None
        self.recorder = Recorder(folder, self.options, self.step, output, anew=self.saved is None)
        if profiled and first:
            assert self.folder is not None
            self.profile = Profile(profiled, self.folder.path / PROFILE, self.step)
            if profiled[1] <= self.step:
                self.recorder.message(f"no profile: steps {asked} were before the run was resumed")
        self.time = TimeSpent()
        try:
            with processes.stop_signals(saves=bool(self.options.checkpoint_every)) as stop:
                if self.saved is not None and self.options.due(self.options.sample_every, self.step):
                    # The checkpoint resumed from came before its step's sample, which may be missing or torn.
                    self.write_sample()
                self.loop(stop)
            if self.profile.running:  # in the steps that an early stop leaves out
                self.profile.last = self.step
            elif self.step < self.profile.first <= self.profile.last:
                self.recorder.message(f"no profile: the run stopped before step {self.profile.first}")
            self.recorder.sync()
        except ERRORS as error:
            if shortage(error) is None:
                raise
            raise self.out_of_memory(error) from error
        finally:
            with self.pace.pause():  # W&B's client uploads for seconds
                self.profile.close()
                self.recorder.close()
        result = self.result()
        if self.folder is not None and first:
            if self.options.plot and (self.options.log_every or self.validation_losses):
                plot_losses(self.folder.path)
                plot_experts(self.folder.path)
            self.folder.mark_finished(result.figures())
            if self.options.plot:
                write_report_page(self.folder.path)
        return result

    def resume(self, say: Callable[[str], None]) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        assert self.checkpoints is not None and self.folder is not None
        self.checkpoints.remove_leftovers()
        if processes.share(self.checkpoints.latest_step() if processes.first() else None) is None:
            if self.folder.resumed:
                say(f"no checkpoint in {self.folder.path} yet: starting from the beginning")
            self.branch(say)
            return
        restored = self.checkpoints.restore(_released(self.state), warn=say)
        assert restored is not None
        self.state, info = restored
        self.step = self.saved = info.step
        self.tokens = info.tokens
        self.check_rates(self.read_back(info.step))
        self.checkpoints.set_aside_after(info.step)
        self.checkpoints.delete_old()  # the process that saved this one may have been killed before it did
        say(f"resuming {self.folder.path} from step {self.step}")
        if processes.first() and self.folder.code_changed:
            say("the code has changed since this run began; results from here on may differ")
        self.stop_early(say)

    def branch(self, say: Callable[[str], None]) -> None:
        """Begin with the state of a checkpoint of another run, if the options name one."""
        if self.options.branch_from is None:
            return
        found = branch_source(self.options)
        restored = restore_checkpoint(found, _released(self.state))
        self.state, self.step, self.tokens = restored.state, restored.info.step, restored.info.tokens
        say(f"beginning with the state of {found}, after step {self.step}")
        model = json.loads(json_bytes(config_dict(self.model_config)))
        if model and (differing := differences(read_config(found), model)):
            say(f"the model is configured otherwise than it was: {', '.join(differing)}")

    def read_back(self, step: int) -> Points:
        """Take up the figures up to a step, and return the learning rates. One process reads them for all, which must
        come to the same decisions."""
        assert self.folder is not None
        path = self.folder.path / METRICS

        def read() -> tuple[float | None, Points, Points, Points]:
            records = [record for record in (read_metrics(path) if path.exists() else []) if record["step"] <= step]
            losses = training_curve(records)
            judged, validation, rates = (curve(records, n) for n in (self.judged, "validation_loss", "learning_rate"))
            judged = [(step, value) for step, value in judged if step > self.start]
            return losses[-1][1] if losses else None, judged, validation, rates

        found = processes.share(processes.together(lambda: read() if processes.first() else None))
        self.loss, self.validation, self.validation_losses = found[0], dict(found[1]), dict(found[2])
        rates: Points = found[3]
        return rates

    def check_rates(self, recorded: Points) -> None:
        """A script may have another schedule than when it began the run, and not say so in `config`."""
        if self.learning_rates is None:
            return
        assert self.folder is not None
        for step, rate in recorded:
            now = float(self.learning_rates[step - 1])
            if not math.isclose(rate, now, rel_tol=1e-4, abs_tol=1e-12):
                raise BadInput(
                    f"{self.folder.path} holds a run with another learning rate: {rate:.6g} in step {step}, where it "
                    f"would be {now:.6g}; give that schedule, or another folder"
                )

    def loop(self, stop: StopSignals) -> None:
        options = self.options
        pending = None
        if self.step < options.steps:
            self.make_batch()
        if self.saved is None and options.evaluate_first and options.branch_from is None:
            self.evaluation(self.first_means)
        while self.step < self.options.steps:  # which an early stop lowers
            if self.profile.begins_with(self.step + 1):
                jax.block_until_ready(self.state)
                self.profile.start()
            with self.time.on("step", self.step + 1), self.profile.mark(self.step + 1):
                self.state, metrics = self.train_step(self.state, self.batch)
            self.step += 1
            stop.after(self.step)
            self.tokens += self.tokens_of(self.step - 1, metrics.pop("tokens", None))
            previous, pending = pending, _Step(self.step, self.tokens, metrics)
            if self.profile.ends_with(self.step):
                jax.block_until_ready(self.state)
                with self.pace.pause():
                    self.recorder.message(self.profile.stop())
            # The device is at work. Meanwhile: the next batch, and the figures of the step before.
            if self.step < options.steps:
                self.make_batch(metrics["loss"])
            if previous:
                self.read(previous)
            intervals = (options.evaluate_every, options.sample_every, options.checkpoint_every)
            if stop.received or any(options.due(every, self.step) for every in intervals):
                self.read(pending)
                pending = None
                with self.pace.pause():
                    self.pause(stop)
        if pending:
            self.read(pending)

    def tokens_of(self, index: int, drawn: Any) -> int:
        """Of update `index`, over all processes: those that it drew itself, or those of its batch."""
        if drawn is not None:
            return int(drawn)
        if self.tokens_per_step is not None:
            return self.tokens_per_step
        of_batch = getattr(self.batches, "count_tokens", None)
        return count_tokens(self.batch) * self.shares if of_batch is None else int(of_batch(index))

    def make_batch(self, under_way: Any = None) -> None:
        with self.time.on("input", self.step + 1, under_way):
            self.batch = self.batches[self.step]

    def read(self, done: _Step) -> None:
        """Wait for a step, check it, and log it where that is due."""
        options = self.options
        names = [name for name in ("loss", *OWN_LOSSES, "grad_norm", *self.show) if name in done.metrics]
        with self.time.on("step", done.step):
            values = jax.device_get([done.metrics[name] for name in names])
        self.time.started()
        checked = {name: value.item() for name, value in zip(names, values, strict=True)}
        for name, value in checked.items():
            if not math.isfinite(value):
                raise self.broken(done.step, f"{name.replace('_', ' ')} is {value}")
        self.loss = shown = shown_loss(checked)
        assert shown is not None
        self.pace.finished(done.step, done.tokens)
        rate = {} if self.learning_rates is None else {"learning_rate": float(self.learning_rates[done.step - 1])}
        record = None
        # With patience an evaluation may turn out to be the end, whose figures are logged.
        last = options.patience is not None and options.due(options.evaluate_every, done.step)
        if options.log_every and (done.step == 1 or last or options.due(options.log_every, done.step)):
            others = jax.device_get({name: value for name, value in done.metrics.items() if name not in checked})
            speed = self.pace.since_mark()
            of_device = {"mfu": self.mfu(speed), "memory_bytes": device_memory_bytes()}
            record = {
                "step": done.step,
                "tokens": done.tokens,
                "loss": checked["loss"],
                **rate,
                **checked,
                "tokens_per_second": speed,
                **{name: value for name, value in of_device.items() if value is not None},
                **self.time.since_mark(),
                **others,
            }
        mean_speed = self.pace.tokens_per_second()
        status = Status(
            step=done.step,
            loss=shown,
            learning_rate=rate.get("learning_rate"),
            tokens_per_second=mean_speed,
            mfu=self.mfu(mean_speed),
            seconds_left=self.pace.seconds_left(),
            shown=tuple((name, checked[name]) for name in self.show if name in checked),
        )
        self.recorder.step(status, record)

    def mfu(self, tokens_per_second: float | None) -> float | None:
        if self.utilisation is None or tokens_per_second is None:
            return None
        return self.utilisation * tokens_per_second

    def pause(self, stop: StopSignals) -> None:
        """What is due between this step and the next. A checkpoint comes after its validation loss, which it knows, and
        before a sample, which may fail."""
        options, step = self.options, self.step
        best_to_keep = False
        if options.due(options.evaluate_every, step):
            self.evaluation()
            best_to_keep = step in self.validation and self.best_to_keep()
            self.stop_early(self.recorder.message)
            options = self.options
        if options.due(options.checkpoint_every, step) or best_to_keep or stop.received:
            goes_on = options.on_full_disk == "continue" and step < options.steps and not stop.received
            with self.time.on("checkpoints", step):
                why = self.save(goes_on)
            said = f"warning: {why}; going on" if why else f"step {step}: checkpoint saved"
            self.recorder.message(said)
        if stop.received and step < options.steps:
            self.recorder.message(
                f"stopped by {stop.received.name} after step {step}, which is saved; "
                f"the same command goes on from there"
            )
            raise StoppedBySignal(128 + stop.received)  # a sample that is due is made on resuming
        if options.due(options.sample_every, step):
            self.write_sample()

    def evaluation(self, found: dict[str, float] | None = None) -> None:
        """Evaluate this step, unless these means of it are found already, and record it."""
        patience = self.options.patience
        with self.time.on("evaluation", self.step):
            assert self.evaluate is not None
            found = self.evaluate(self.state.variables) if found is None else found
            # All processes go by the figures of one: they must save, and stop, at the same steps.
            means = processes.share({f"validation_{name}": float(value) for name, value in found.items()})
        if "validation_loss" in means:
            self.validation_losses[self.step] = means["validation_loss"]
        if self.judged in means:
            self.validated(means[self.judged])
        elif patience is not None:
            raise BadInput(
                f"patience is {patience}, but evaluate returns no {self.judged_by[0]} to judge the run by; "
                "return it, or leave patience out"
            )
        self.recorder.evaluation({"step": self.step, "tokens": self.tokens, **means})

    def validated(self, value: float) -> None:
        """Note what this step is judged by. What a run begins from is no step of its own, and has no checkpoint."""
        if not math.isfinite(value):
            raise self.broken(self.step, f"{self.judged.replace('_', ' ')} is {value}", look_at="the validation data")
        if self.step > self.start:
            self.validation[self.step] = value

    def best_to_keep(self) -> bool:
        """Whether this step is better than every checkpoint. The best step so far may have none: it was damaged, or
        found no room."""
        if self.checkpoints is None or not (self.options.keep_best and self.options.checkpoint_every):
            return False
        kept = processes.share(self.checkpoints.best_step() if processes.first() else None)
        return kept is None or kept not in self.validation or self.cost(self.step) < self.cost(kept)

    def best(self) -> int | None:
        """The best step, the earliest on a tie."""
        return min(self.validation, key=self.cost, default=None)

    def cost(self, step: int) -> float:
        """What a step is judged by, so that lower is better."""
        return self.validation[step] if self.judged_by[1] == "lowest" else -self.validation[step]

    def stop_early(self, say: Callable[[str], None]) -> None:
        """Make this step the run's last one, with all that is due then, if the best step is that long ago."""
        best, patience = self.best(), self.options.patience
        if best is None or patience is None or self.step == self.options.steps:
            return
        if sum(step > best for step in self.validation) >= patience:
            count = "1 evaluation" if patience == 1 else f"{patience} evaluations in a row"
            say(f"stopped early after step {self.step}: {count} without a new best; best: {self.told(best)}")
            # The steps to profile may lie behind the new end.
            self.options = dataclasses.replace(self.options, steps=self.step, profile=None)

    def told(self, step: int) -> str:
        return f"{self.judged.replace('_', ' ')} {self.validation[step]:.4f} at step {step:,}"

    def best_text(self, result: RunResult) -> str:
        """What the end says of the best step; "" where it stands beside the last validation loss, or there is none."""
        best = self.best()
        stands_there = self.judged == "validation_loss" and result.validation_loss is not None
        return "" if best is None or stands_there else f"best: {self.told(best)}"

    def write_sample(self) -> None:
        with self.time.on("samples", self.step):
            assert self.sample is not None
            text = self.sample(self.state.variables, self.step)
        self.recorder.sample(self.step, text)

    def save(self, goes_on: bool) -> str | None:
        """Save the checkpoint of this step. Where there is no room and the run `goes_on`: what to say."""
        if not all_finite(self.state.variables):
            raise self.broken(self.step, "the update made parameters that are not finite")
        try:
            # The checkpoint promises all records up to its step.
            self.recorder.sync()
            assert self.checkpoints is not None
            self.checkpoints.save(
                self.step,
                self.state,
                model_config=self.model_config,
                tokenizer=self.tokenizer,
                judged_by=self.judged_by,
                value=self.validation.get(self.step),
                tokens=self.tokens,
            )
        except Exception as error:
            why = full_disk(error)
            if why is None or not goes_on:
                raise
            return f"step {self.step}: checkpoint not saved: {why}; {self.last_saved('good checkpoint')}"
        self.saved = self.step
        return None

    @contextlib.contextmanager
    def full_disk_told(self) -> Iterator[None]:
        """DiskFull for whatever found no room."""
        try:
            yield
        except Exception as error:
            why = full_disk(error)
            if why is None or isinstance(error, BadInput):
                raise
            saved = self.last_saved("good checkpoint")
            raise DiskFull(
                f"stopped at {self.time.place}: {why}; {saved}; make room, and give the same command again"
            ) from error

    def broken(self, step: int, what: str, look_at: str = "the batch of this step") -> NonFiniteLoss:
        advice = f"lower the learning rate or look at {look_at}"
        return NonFiniteLoss(f"stopped at step {step}: {what}; {self.last_saved('good checkpoint')}; {advice}")

    def out_of_memory(self, error: BaseException) -> OutOfMemory:
        # What could not be compiled is not tried again.
        needed = usage(self.state, self.batch, self.train_step, compiled="compil" not in str(error).lower())
        saved = self.last_saved()
        if self.saved is None and self.folder is not None:
            saved += f", so remove {self.folder.path} before you run it with options that change results"
        return OutOfMemory(f"out of memory in {self.time.place} ({shortage(error)}): {needed}; {saved}")

    def last_saved(self, name: str = "checkpoint") -> str:
        if self.saved is None or self.checkpoints is None:
            return "no checkpoint was saved before it"
        return f"the last {name} is {self.checkpoints.path(self.saved)}"

    def result(self) -> RunResult:
        best = self.best()
        lowest = best if self.judged == "validation_loss" else None
        mean_speed = self.pace.tokens_per_second()
        return RunResult(
            state=self.state,
            step=self.step,
            tokens=self.tokens,
            loss=self.loss,
            validation_loss=self.validation_losses.get(self.step),
            best_validation_loss=None if lowest is None else self.validation_losses[lowest],
            best_step=best,
            seconds=self.pace.seconds(),
            time=self.time.total(),
            tokens_per_second=mean_speed,
            mfu=self.mfu(mean_speed),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def finished_before(self) -> RunResult:
        """The result of a run that was finished by an earlier process. Never with the state of an earlier step."""
        assert self.checkpoints is not None and self.folder is not None
        report = self.folder.report()
        rates: Points = []
        with contextlib.suppress(BadInput):  # of its records it needs none
            rates = self.read_back(report["step"])
        self.check_rates(rates)
        if report["step"] not in self.checkpoints.steps():
            return RunResult(state=None, **report)
        try:
            restored = self.checkpoints.restore(_released(self.state), report["step"])
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(
                f"{self.folder.path} is finished, but {error}; or remove {self.folder.path / FINISHED}, and the same "
                f"command goes on from the newest whole one"
            ) from None
        assert restored is not None
        return RunResult(state=restored.state, **report)


def open_folder(
    folder: str | Path,
    options: RunOptions,
    *,
    config: dict[str, Any] | None = None,
    may_change: Collection[str] = (),
    model_config: Any = None,
    evaluates: bool = True,
    samples: bool = True,
) -> RunFolder:
    """The folder of a run, for those who have something to do there before `run`, which takes it in place of its path;
    arguments are those of `run`, and whether it is given the two functions."""
    options = options.resolved(evaluates=evaluates, samples=samples, saves=True)
    described = {**(config or {}), "model": config_dict(model_config), "options": dataclasses.asdict(options)}
    described[CODE] = code_digest()
    may_change = [*may_change, CODE, *(f"options.{name}" for name in options.neutral)]
    return RunFolder(folder, described, may_change=may_change)


def _table(schedule: Callable[..., Any], steps: int) -> np.ndarray:
    """The learning rate of every step at once: asked for in the loop, it would queue behind the step under way."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(steps)))


def _released(state: Any) -> Any:
    """The shapes and places of a state whose arrays are freed: what is restored in its place need not fit beside it."""

    def described(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    example = jax.tree.map(described, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return example


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of every array is."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in floating]))
