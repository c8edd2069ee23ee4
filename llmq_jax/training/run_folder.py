"""The folder of one run: whose it is, who trains in it, and whether it is finished.

    config.json    every option of the run; a command with the same options resumes it (run_config.py)
    run.lock       held (flock) by the process that trains here; holds its id and a number drawn for it
    checkpoints/   see checkpoints.py
    metrics.jsonl, samples.txt, losses.png, tensorboard/
    finished.json  the figures of the end report, once the run is finished

A folder that is not empty and not of this run is refused before anything is written into it, the lock included.
"""

import json
import os
import secrets
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llmq_jax.atomic_files import json_bytes, lock_file, naming, write_json_atomically
from llmq_jax.errors import BadInput
from llmq_jax.json_text import parse_json
from llmq_jax.training.checkpoints import CHECKPOINTS, find_checkpoint
from llmq_jax.training.metrics import METRICS, SAMPLES
from llmq_jax.training.processes import first, of_first, same, share, together
from llmq_jax.training.run_config import BRANCH, CODE, CONFIG, MARK, differences, read_run_config
from llmq_jax.training.trackers import WANDB_ID
from llmq_jax.whole_folders import refuse_no_permission

LOCK, FINISHED = "run.lock", "finished.json"
FORMAT = 1
SEEN_SECONDS = 60
"""Time within which every process must see what process 0 has written: a shared file system may take a moment."""


class RunFolder:
    """Open `path` for the run described by `config` (a dict that JSON can hold) and lock it.

    A new or empty folder becomes the folder of this run; one that has this config is resumed (`resumed`), or is
    `finished`. BadInput where the config differs, each differing field listed, unless no step of that run was recorded;
    where another process trains in it; and where the folder is anything else. Fields named in `may_change` ("device",
    or "options.keep_last" for nested ones) do not change results and may differ; config.json keeps what the run began
    with.

    With several processes (training.processes) all open it together: process 0 writes and locks. BadInput where one of
    them does not see that folder.

    Also a context manager, which unlocks at its end. A killed process leaves no lock behind.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], may_change: Collection[str] = ()):
        self.path = Path(path)
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.path.absolute())):  # bytes that are no text
            raise BadInput(f"{self.path}: checkpoints need a path in UTF-8; set LC_ALL=C.UTF-8, or take ASCII letters")
        self.config = {MARK: FORMAT, **json.loads(json_bytes(config))}
        self._lock: int | None = None
        self.resumed = False
        same(self.config, differences)
        # A number that no other lock has: in containers ids of processes recur.
        self._owner = owner = share(f"{os.getpid()}\n{secrets.token_hex(8)}\n")
        try:
            of_first(lambda: self._take(owner, may_change))
            self._require_shared(owner)
            of_first(lambda: self._begin(may_change))
        except BaseException:
            self.close()
            raise
        self.resumed = share(first() and self.resumed)

    def _take(self, owner: str, may_change: Collection[str]) -> None:
        self._check(may_change)
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock(owner)

    def _require_shared(self, owner: str) -> None:
        """BadInput where a process has another folder by this name than process 0, as on its machine's own disk: parts
        of every checkpoint would be written there, and the first save would wait for them without end."""

        def look() -> None:
            lock, until = self.path / LOCK, time.monotonic() + SEEN_SECONDS
            while not (lock.is_file() and lock.read_text(errors="replace") == owner):
                if time.monotonic() > until:
                    raise BadInput(
                        f"{self.path.absolute()} is not the folder that process 0 trains in; give all processes one "
                        "that they all see, on a file system that their machines share"
                    )
                time.sleep(0.1)

        together(lambda: None if first() else look())

    def _begin(self, may_change: Collection[str]) -> None:
        # Once more under the lock: another process may have begun here a moment ago.
        self.resumed = self._check(may_change)
        if not self.resumed:
            if (self.path / CONFIG).exists():
                print(f"{self.path} holds a run with other options that failed before its first step: begun anew")
                (self.path / WANDB_ID).unlink(missing_ok=True)  # W&B would keep what the failed one has sent
            write_json_atomically(self.path / CONFIG, self.config)

    def require_in_place(self) -> None:
        """BadInput where the folder was moved or deleted since this run opened it: a checkpoint would be written in a
        new folder of its name, or in that of a run which has begun there. All processes must ask together."""

        def look() -> None:
            lock = self.path / LOCK
            ours = not lock.exists() or lock.read_text(errors="replace") == self._owner
            if not (ours and (self.path / CONFIG).exists()):
                raise BadInput(
                    f"{self.path} was moved or deleted while this run trained in it; where it was moved, the same "
                    "command with its new name goes on from its newest checkpoint"
                )

        of_first(look)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; all processes must ask together."""
        return bool(share(first() and (self.path / FINISHED).is_file()))

    @property
    def code_changed(self) -> bool:
        """Whether the run began with other code, if that is known."""
        before = (read_run_config(self.path / CONFIG) or {}).get(CODE)
        return before is not None and before != self.config.get(CODE)

    def branched_from(self, source: str) -> str | None:
        """The checkpoint in `source` that this run began with, if `keep_branch` was told; for process 0 alone."""
        kept = (read_run_config(self.path / CONFIG) or {}).get(BRANCH)
        return kept if isinstance(kept, str) and Path(kept).is_relative_to(source) else None

    def keep_branch(self, checkpoint: str) -> None:
        """Keep the checkpoint that this run begins with: a folder names another one once its run has gone on. For
        process 0 alone."""
        config = read_run_config(self.path / CONFIG) or self.config
        write_json_atomically(self.path / CONFIG, {**config, BRANCH: checkpoint})

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / CHECKPOINTS

    def mark_finished(self, report: dict[str, Any]) -> None:
        """Write `finished.json`, whole or not at all."""
        write_json_atomically(self.path / FINISHED, report)

    def report(self) -> dict[str, Any]:
        """What `mark_finished` was given."""
        return read_finished(self.path)

    def close(self) -> None:
        """Unlock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _check(self, may_change: Collection[str]) -> bool:
        """False where the folder is free, True where it is this run's, BadInput where it is neither."""
        saved = config_of_run(self.path)
        if saved is None:
            return False
        if differing := differences(saved, self.config, (*may_change, BRANCH)):
            if not has_trained(self.path):
                return False
            branch = f", where branch_from={self.path} begins with this one's state, as for more steps"
            raise BadInput(
                f"{self.path} holds a run with other options: {', '.join(differing)}; with its own options and data it "
                f"goes on; for others name another folder{branch if any(self.checkpoints.glob('*')) else ''}"
            )
        return True

    def _take_lock(self, owner: str) -> None:
        try:
            self._lock = lock_file(self.path / LOCK)
        except BlockingIOError:
            other = (self.path / LOCK).read_text(errors="replace").partition("\n")[0] or "unknown"
            raise BadInput(
                f"another process (id {other}) is training in {self.path}; wait for it, or name another folder"
            ) from None
        with naming(self.path / LOCK):
            os.ftruncate(self._lock, 0)
            os.write(self._lock, owner.encode())
            os.fsync(self._lock)  # a file that stays open may be seen by other machines only then


def has_trained(folder: Path) -> bool:
    """Whether anything that a step left is there. Nothing is where a run failed before: at a reward that raises, or for
    want of memory. It is begun again with an option or a file mended."""
    if (folder / FINISHED).exists() or any((folder / CHECKPOINTS).glob("*")):
        return True
    if (folder / SAMPLES).is_file() and (folder / SAMPLES).stat().st_size > 0:
        return True
    path = folder / METRICS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return any(not line.startswith(b'{"step": 0,') for line in lines)


def read_finished(folder: Path) -> dict[str, Any]:
    """The figures of a finished run's end; BadInput where the file is damaged."""
    try:
        report = parse_json((folder / FINISHED).read_bytes())
    except ValueError as error:
        raise BadInput(f"{folder / FINISHED} is damaged ({error}); remove it and run the same again") from None
    if not isinstance(report, dict):
        raise BadInput(f"{folder / FINISHED} is damaged (no JSON object); remove it and run the same again")
    return report


def config_of_run(folder: Path) -> dict[str, Any] | None:
    """The config of the run in this folder; None where the folder is free. BadInput where it is neither, or where
    nothing can be written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"{there} is a file; a run needs a folder: name another one")
    refuse_no_permission(folder, there)
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    # A process killed while it began leaves the lock, and perhaps a part of the config.
    if names <= {LOCK, f".{CONFIG}.partial"}:
        return None
    saved = read_run_config(folder / CONFIG)
    if saved is None and names >= {CONFIG, METRICS}:
        weights = f"go on from its weights in a new folder: --init-from {folder}"
        instead = weights if find_checkpoint(folder) else "name a new folder"
        raise BadInput(
            f"{folder / CONFIG} is damaged, so that the run there does not resume; put it back, or {instead}"
        )
    if saved is None:
        raise BadInput(f"{folder} is not empty and not the folder of a run; name a new or empty folder")
    return saved
