"""The one training loop, for every recipe: step, log, evaluate, sample, checkpoint.

    result = run(state, train_step, batches, RunOptions(steps=1000), folder="out/run", model_config=config)

JAX hands a step to the device and returns at once. The loop uses that: while the device computes step s, it builds the
batch of step s + 1 and reads the figures of step s - 1, so that the device never waits for Python.

The loop itself is `_Loop.loop`. The other parts of a run have files of their own: where its state comes from
(resuming.py), which step is the best (validation.py), how it fails (failures.py), and what it logs (recorder.py).
"""

import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.atomic_files import full_disk
from llmq_jax.data.batching import count_tokens
from llmq_jax.errors import BadInput
from llmq_jax.host_copies import to_host
from llmq_jax.training import processes
from llmq_jax.training.checkpoints import Checkpoints, JudgedBy
from llmq_jax.training.expert_plots import plot_experts
from llmq_jax.training.failures import disk_full, newest_text, out_of_memory, require_finite, require_finite_update
from llmq_jax.training.flops import token_utilisation
from llmq_jax.training.host_memory import keep_freed_memory
from llmq_jax.training.metrics import OWN_LOSSES, VALIDATION, shown_loss
from llmq_jax.training.out_of_memory import ERRORS
from llmq_jax.training.pace import Pace
from llmq_jax.training.plots import is_rewarded, plot_losses, plot_rewards, read_records
from llmq_jax.training.profile import PROFILE, Profile, profiled_steps
from llmq_jax.training.progress import TextOutput
from llmq_jax.training.recorder import Recorder, Step
from llmq_jax.training.report import RunResult, peak_memory_bytes, report_text
from llmq_jax.training.report_page import write_report_page
from llmq_jax.training.resuming import branch, branch_source, finished_result, open_folder, resume
from llmq_jax.training.run_folder import FINISHED, RunFolder
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.sharding import row_share
from llmq_jax.training.signals import StoppedBySignal, StopSignals
from llmq_jax.training.state import refuse_consumed_state, require_state
from llmq_jax.training.time_spent import TimeSpent, is_under_way
from llmq_jax.training.trackers import require_wandb
from llmq_jax.training.validation import LOSS, Validation


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
    updates_per_step: int | None = None,
    evaluate: Callable[[dict[str, Any]], dict[str, float]] | None = None,
    judged_by: JudgedBy = ("loss", "lowest"),
    sample: Callable[[dict[str, Any], int], str] | None = None,
    tokens_per_step: int | None = None,
    flops_per_token: float | None = None,
    show: Sequence[str] = (),
    conclude: Callable[[RunResult], str] | None = None,
    next_commands: Sequence[str] = (),
    output: TextOutput | None = None,
) -> RunResult:
    """Train `state` (which is consumed) until `options.steps` updates are done, and return the result.

    * `train_step(state, batch) -> (state, metrics)`, from `make_train_step`. `batches[i]` is the batch of update i,
      counted from 0: a dict of numpy arrays, always the same one for the same i.
    * `folder`: where checkpoints, metrics, samples and plots go. If it holds this run, the run resumes from its newest
      whole checkpoint, and the result equals that of a run never interrupted, bit for bit. It is this run's folder if
      the options, the model config, the rates of `schedule` and `config` (a dict of whatever else defines the run,
      except for its fields named in `may_change`) are the same; a RunFolder, which has a config already, stays open.
      None: nothing is written.
    * `model_config` (a dict or config dataclass) and `tokenizer` are saved with every checkpoint.
    * `schedule(i)` is the learning rate of update i, here only for the log.
    * `updates_per_step`: how many updates of the optimizer a call of `train_step` makes, which counts as one here. So
      a branch of a run that made another number goes on with the learning rate of its step; None keeps the state's.
    * `evaluate(variables)` returns means by name, of which `judged_by` names the one whose lowest or highest value
      marks the best step; `sample(variables, step)` returns a text to show, the same one for the same arguments.
    * `tokens_per_step` is the number over all processes. By default it is `batches.count_tokens(i)` if there is that
      method, or else counted from each batch, assuming that every process has equally many. A step that draws its own
      tokens reports their number as a metric `tokens`; for an array of the device the loop would wait at once.
    * `flops_per_token`, from `token_flops`, gives the device's utilisation (MFU), if its peak is known.
    * `show` names metrics that the console shows beside the loss, for steps and for evaluations; without it, an
      evaluation shows all its means.
    * `conclude(result)` returns a text on the result, such as figures on what was held out, shown before the commands.
      It is not called where the result has no state.
    * `next_commands` are commands for the checkpoints, shown at the end if there are any checkpoints; `output` is where
      progress goes (standard output by default).

    Under Linux the process's malloc is told to keep freed memory, for good: see host_memory.py.

    Raises BadInput before anything runs, or at the first evaluation if that lacks the mean of `judged_by`;
    NonFiniteLoss when training breaks down; OutOfMemory; DiskFull, unless the options let the run go on and the
    checkpoint without room is not its last; StoppedBySignal, which exits, after SIGTERM or SIGINT, once the state is
    saved (without checkpoints, both signals act as usual).
    """
    if not isinstance(options, RunOptions):
        raise BadInput(f"options={options!r:.60} says not how to run; give lq.training.RunOptions(steps=...)")
    require_state(state)
    options = options.resolved(evaluates=evaluate is not None, samples=sample is not None, saves=folder is not None)
    refuse_consumed_state(state)
    validation = Validation(judged_by, options.patience, start=int(state.step))
    if options.wandb:
        require_wandb()
    if config is not None and not isinstance(folder, str | Path):
        raise BadInput(
            "config has no effect: without a folder nothing is saved, and a RunFolder has its own; leave it out"
        )
    if options.on_full_disk == "continue" and jax.process_count() > 1:
        raise BadInput("on_full_disk is continue, which is for one process; leave it out")
    if tokenizer is not None and options.checkpoint_every:
        with tempfile.TemporaryDirectory() as trial:  # a tokenizer that cannot be saved fails now
            tokenizer.save(trial)
    output = sys.stdout if output is None else output
    keep_freed_memory()
    first_means = _before_folder(state, options, folder, evaluate, validation)
    opened: contextlib.AbstractContextManager[RunFolder | None]
    if isinstance(folder, str | Path):
        opened = open_folder(folder, options, config=config, may_change=may_change, model_config=model_config)
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
            updates_per_step=updates_per_step,
            evaluate=evaluate,
            validation=validation,
            sample=sample,
            tokens_per_step=tokens_per_step,
            flops_per_token=flops_per_token,
            show=show,
            first_means=first_means,
        )
        if run_folder is not None and run_folder.finished:
            assert loop.checkpoints is not None
            result = finished_result(run_folder, loop.checkpoints, state, validation, loop.learning_rates)
            more = f"for more steps: another run with --branch-from {run_folder.path}, in Python branch_from"
            if loop.checkpoints.latest_step() is None:
                more = f"it has no checkpoint: to train it anew, remove {run_folder.path / FINISHED} first"
            print(f"{run_folder.path} is finished already; nothing to do ({more})", file=output)
        else:
            result = loop.train(output)
        usable = loop.checkpoints is not None and loop.checkpoints.latest_step() is not None
        path = None if run_folder is None else run_folder.path
        is_told = validation.name == LOSS and result.validation_loss is not None  # by report_text
        further = "\n".join(filter(None, ("" if is_told else validation.text(result.step), loop.profile.text())))
        print(report_text(result, path, further), file=output, flush=True)
        conclusion = "" if conclude is None or result.state is None else conclude(result)
        if conclusion:
            print(f"\n{conclusion}", file=output, flush=True)
        if usable and next_commands:
            print("next:", *(f"  {command}" for command in next_commands), sep="\n", file=output, flush=True)
        return result


def _before_folder(
    state: Any, options: RunOptions, folder: Any, evaluate: Callable[..., Any] | None, validation: Validation
) -> dict[str, float] | None:
    """Do what can fail before the first step, before the folder exists: a folder left behind would count as taken by
    the next command. Returns the means of the evaluation before the first step, if that is done here.

    Several processes open the folder first, because that checks that they agree: if they did not, they would wait for
    one another here.
    """
    if not isinstance(folder, str | Path) or jax.process_count() > 1 or Path(folder).exists():
        return None
    if options.branch_from is not None:
        branch_source(options)
    elif options.evaluate_first:
        assert evaluate is not None
        first_means: dict[str, float] = evaluate(state.variables)
        validation.require_judged(first_means)
        return first_means
    return None


@dataclasses.dataclass
class _Loop:
    """A run under way: `step` updates, on `tokens` tokens, have been handed to the device."""

    state: Any
    train_step: Callable[..., Any]
    batches: Any
    options: RunOptions
    folder: RunFolder | None
    model_config: Any
    tokenizer: Any
    learning_rates: np.ndarray | None
    updates_per_step: int | None
    evaluate: Callable[..., Any] | None
    validation: Validation
    sample: Callable[..., Any] | None
    tokens_per_step: int | None
    flops_per_token: float | None
    show: Sequence[str]
    first_means: dict[str, float] | None
    """The means of the evaluation before the first step, if that is done already."""
    tokens: int = 0
    batch: Any = None
    """The batch of the step that is handed over next."""
    loss: float | None = None
    reward: float | None = None
    newest: Path | None = None
    """The newest checkpoint."""

    def __post_init__(self) -> None:
        self.step = int(self.state.step)
        self.shares = row_share()["process_count"]  # equal parts of a batch, of which this process counts its own
        utilisation = token_utilisation(self.flops_per_token, self.state, getattr(self.train_step, "replicas", 1))
        self.pace = Pace(self.options.steps, utilisation=utilisation)
        self.time = TimeSpent()
        self.profile = Profile()
        self.unread: list[Step] = []
        self.checkpoints: Checkpoints | None = None
        if self.folder is not None:
            self.checkpoints = Checkpoints(self.folder.checkpoints, self.options.keep_last)

    def train(self, output: TextOutput) -> RunResult:
        """The whole run: its beginning, the steps that are left, and its end."""
        try:
            self.begin(output)
            try:
                with processes.stop_signals(saves=bool(self.options.checkpoint_every)) as stop:
                    try:
                        self.loop(stop)
                    except Exception:
                        self.read_before_leaving()
                        raise
                if said := self.profile.ended(self.step):
                    self.recorder.message(said)
                self.recorder.sync()
            except ERRORS as error:
                folder = None if self.folder is None else self.folder.path
                step = self.state, self.batch, self.train_step
                shortage = out_of_memory(error, self.time.place, self.newest, folder, *step)
                if shortage is None:
                    raise
                raise shortage from error
            finally:
                with self.pace.pause():  # W&B's client uploads for seconds
                    self.profile.close()
                    self.recorder.close()
            return self.end()
        except Exception as error:
            full = disk_full(error, self.time.place, self.newest)
            if full is None:
                raise
            raise full from error

    def begin(self, output: TextOutput) -> None:
        """Go on from the newest checkpoint of this run; without one, from that of another run which the options name,
        or from the state that is given."""
        say = functools.partial(print, file=output, flush=True)
        profiled = self.options.profile  # read first: `stop_early`, on resuming, removes it from the options
        resumed = None
        if self.folder is not None:
            assert self.checkpoints is not None
            resumed = resume(self.folder, self.checkpoints, self.state, self.validation, self.learning_rates, say)
        if resumed is not None:
            assert self.checkpoints is not None
            self.state, info, self.loss, self.reward = resumed
            self.step, self.tokens, self.newest = info.step, info.tokens, self.checkpoints.path(info.step)
            self.checkpoints.delete_old(self.best_to_keep())  # the save before may have been killed before it did
            if early := self.stop_early():
                say(early)
        elif self.options.branch_from is not None:
            how = self.options, self.folder, self.state, self.model_config, self.updates_per_step
            self.state, info = branch(*how, say)
            self.step, self.tokens = info.step, info.tokens
        folder = self.folder if processes.first() else None
        self.recorder = Recorder(
            folder,
            self.options,
            self.step,
            output,
            anew=self.newest is None,
            learning_rates=self.learning_rates,
            show=self.show,
        )
        if profiled is not None and folder is not None:
            self.profile = Profile(profiled_steps(profiled, None), folder.path / PROFILE, self.step)
            if self.profile.last <= self.step:
                self.recorder.message(f"no profile: steps {profiled} were before the run was resumed")
        self.time = TimeSpent()

    def loop(self, stop: StopSignals) -> None:
        """Step after step, with a pause wherever something is due between two of them."""
        options = self.options
        if self.newest is not None and options.due(options.sample_every, self.step):
            # The checkpoint resumed from came before its step's sample, which may be missing or torn.
            self.write_sample()
        if self.step < options.steps:
            self.make_batch()
        if self.newest is None and options.evaluate_first and options.branch_from is None:
            self.recorder.message(f"step {self.step}: {self.evaluation(self.first_means)}")
        shapes = set()
        while self.step < self.options.steps:  # which an early stop lowers
            shape = tuple((name, np.shape(array)) for name, array in self.batch.items())
            if shape not in shapes:
                # The step is compiled anew. The step before is read first, or compilation would count as its time.
                self.read_all()
            shapes.add(shape)
            self.profile.begin(self.step + 1, self.state)
            with self.pace.handing_over(), self.time.on("step", self.step + 1), self.profile.mark(self.step + 1):
                self.state, metrics = self.train_step(self.state, self.batch)
            self.step += 1
            stop.after(self.step)
            self.tokens += self.tokens_of(self.step - 1, metrics.pop("tokens", None))
            self.unread.append(Step(self.step, self.tokens, metrics))
            if self.profile.ends_with(self.step):
                jax.block_until_ready(self.state)
                with self.pace.pause():
                    self.recorder.message(self.profile.stop())
            # While the device works: make the next batch, and read the figures of the step before.
            if self.step < options.steps:
                self.make_batch(metrics["loss"])
            self.read_all(but=1)
            intervals = (options.evaluate_every, options.sample_every, options.checkpoint_every)
            pauses = stop.received or any(options.due(every, self.step) for every in intervals)
            if pauses or not is_under_way(metrics["loss"]):
                self.read_all()
            if pauses:
                with self.pace.pause():
                    self.pause(stop)
        self.read_all()

    def make_batch(self, under_way: Any = None) -> None:
        with self.time.on("input", self.step + 1, under_way):
            self.batch = self.batches[self.step]

    def tokens_of(self, index: int, drawn: Any) -> int:
        """Tokens of update `index` over all processes: those that the step drew itself, or those of its batch."""
        if drawn is not None:
            return int(drawn)
        if self.tokens_per_step is not None:
            return self.tokens_per_step
        of_batch = getattr(self.batches, "count_tokens", None)
        return count_tokens(self.batch) * self.shares if of_batch is None else int(of_batch(index))

    def read_all(self, but: int = 0) -> None:
        """Read the steps that were handed over, but for the newest ones."""
        while len(self.unread) > but:
            (first, *others), self.unread = self.unread, []  # nothing is recorded after a step that failed
            self.read(first)
            self.unread = others

    def read_before_leaving(self) -> None:
        """After an error: record the steps that were handed over before it."""
        place = self.time.place  # the error's
        with contextlib.suppress(Exception):  # the first error is the one to tell of
            self.read_all()
        self.time.place = place

    def read(self, done: Step) -> None:
        """Wait for a step, check its figures and show them, and log them where that is due."""
        names = [name for name in ("loss", *OWN_LOSSES, "grad_norm", *self.show) if name in done.metrics]
        with self.time.on("step", done.step):
            values = to_host([done.metrics[name] for name in names])
        figures = {name: value.item() for name, value in zip(names, values, strict=True)}
        for name, value in figures.items():
            require_finite(name, value, done.step, self.newest)
        self.loss, self.reward = shown_loss(figures), figures.get("reward")
        self.pace.finished(done.step, done.tokens)
        self.recorder.step(done, figures, self.pace, self.time)

    def pause(self, stop: StopSignals) -> None:
        """Do what is due between this step and the next. A checkpoint comes after the evaluation, whose loss it stores,
        and before a sample, which may fail."""
        is_best, early = False, None
        with self.one_line() as said:  # an evaluation and the checkpoint that mostly follows it
            if self.options.due(self.options.evaluate_every, self.step):
                said.append(self.evaluation())
                is_best = bool(self.options.checkpoint_every) and self.best_to_keep() == self.step
                early = self.stop_early()
            options, step = self.options, self.step
            if options.due(options.checkpoint_every, step) or is_best or stop.received:
                with self.time.on("checkpoints", step):
                    said += self.save(needed=step == options.steps or stop.received is not None)
        if early:
            self.recorder.message(early)
        if stop.received and step < options.steps:
            self.recorder.message(
                f"stopped by {stop.received.name} after step {step}, which is saved; "
                f"the same command goes on from there"
            )
            raise StoppedBySignal(128 + stop.received)  # a sample that is due is made on resuming
        if options.due(options.sample_every, step):
            self.write_sample()

    @contextlib.contextmanager
    def one_line(self) -> Iterator[list[str]]:
        """Print what was said of this step as one line, in the end, also after an error."""
        said: list[str] = []
        try:
            yield said
        finally:
            if said:
                self.recorder.message(f"step {self.step}: {'; '.join(said)}")

    def evaluation(self, found: dict[str, float] | None = None) -> str:
        """Evaluate this step, unless `found` has its means already, and record them. Returns what to say of it."""
        with self.time.on("evaluation", self.step):
            assert self.evaluate is not None
            found = self.evaluate(self.state.variables) if found is None else found
            if not isinstance(found, Mapping):
                raise BadInput(f"evaluate returned {found!r:.60}; it must return means by name, as a dict")
            found = {name: to_host(value) for name, value in found.items()}  # in their order
            # All processes use the figures of one, because they must save, and stop, at the same steps.
            means = processes.share({VALIDATION + name: float(value) for name, value in found.items()})
        judged = self.validation.name
        if judged in means:
            require_finite(judged, means[judged], self.step, self.newest, look_at="the validation data")
        self.validation.add(self.step, means)
        record = {"step": self.step, "tokens": self.tokens, **means}
        return self.recorder.evaluation(record, self.validation.judged_by[0])

    def best_to_keep(self) -> int | None:
        """The best of this step and of those that have a checkpoint, if the best is to be kept. It need not be the best
        so far, whose checkpoint may have been damaged or found no room."""
        if self.checkpoints is None or not self.options.keep_best:
            return None
        return self.validation.best_step({*processes.of_first(self.checkpoints.steps), self.step})

    def stop_early(self) -> str | None:
        """Make this step the run's last one, with all that is due then, if the options' patience since the best step
        has run out. Returns what to say of it then."""
        if self.step == self.options.steps or not self.validation.patience_is_out():
            return None
        # The steps to profile may lie after the new end.
        self.options = dataclasses.replace(self.options, steps=self.step, profile=None)
        return f"stopped early after step {self.step}: {self.validation.patience_text()}"

    def write_sample(self) -> None:
        with self.time.on("samples", self.step):
            assert self.sample is not None
            text = self.sample(self.state.variables, self.step)
        self.recorder.sample(self.step, text)

    def save(self, needed: bool) -> list[str]:
        """Save the checkpoint of this step, and return what to say of it. If it is not `needed` and finds no room, the
        run goes on where the options say so."""
        require_finite_update(self.state.variables, self.step, self.newest)
        assert self.folder is not None and self.checkpoints is not None
        self.folder.require_in_place()
        try:
            # A checkpoint implies that all records up to its step are on disk.
            self.recorder.sync()
            self.newest = self.checkpoints.save(
                self.step,
                self.state,
                model_config=self.model_config,
                tokenizer=self.tokenizer,
                judged_by=self.validation.judged_by,
                value=self.validation.values.get(self.step),
                tokens=self.tokens,
                best_step=self.best_to_keep(),
            )
        except Exception as error:
            why = full_disk(error)
            if why is None or needed or self.options.on_full_disk == "stop":
                raise
            saved = newest_text(self.newest, "good checkpoint")
            self.recorder.message(f"warning: step {self.step}: checkpoint not saved: {why}; {saved}; going on")
            return []
        return ["checkpoint saved"]

    def end(self) -> RunResult:
        """The result, and the files that a run leaves at its end."""
        mean_speed = self.pace.tokens_per_second()
        result = RunResult(
            state=self.state,
            step=self.step,
            tokens=self.tokens,
            loss=self.loss,
            reward=self.reward,
            validation_loss=self.validation.losses.get(self.step),
            best_validation_loss=self.validation.best_loss(),
            best_step=self.validation.best_step(),
            seconds=self.pace.seconds(),
            time=self.time.total(),
            tokens_per_second=mean_speed,
            mfu=self.pace.mfu(mean_speed),
            peak_memory_bytes=peak_memory_bytes(),
        )
        if self.folder is not None:
            self.folder.require_in_place()
        if self.folder is not None and processes.first():
            if self.options.plot and (self.options.log_every or self.validation.losses):
                if is_rewarded(read_records(self.folder.path)):
                    plot_rewards(self.folder.path)
                else:
                    plot_losses(self.folder.path)
                plot_experts(self.folder.path)
            if self.options.plot:
                write_report_page(self.folder.path, result.figures())
            self.folder.mark_finished(result.figures())  # the last: a run that is killed before it comes here again
        return result


def _table(schedule: Callable[..., Any], steps: int) -> np.ndarray:
    """The learning rates of all steps, computed at once: in the loop each would queue behind the step under way."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(steps)))
