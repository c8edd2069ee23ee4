"""metrics.jsonl and samples.txt: what a run writes down, line by line, so that a kill at any moment leaves both
readable.

A record of training has `step`, `tokens` (seen so far), `loss`, `learning_rate`, `grad_norm`, `tokens_per_second`, the
objective's own figures, and what the time since the last one went to (`step_seconds`, `input_seconds`, ...: see
time_spent.py); where they are known `mfu` (see flops.py) and `memory_bytes`, the most that the device has held so far.
A record of evaluation has `step`, `tokens`, `validation_loss` and further `validation_...`.
Equal runs write equal records, `TIME_FIELDS` apart. After a kill both files are cut back to the checkpoint's step.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from llmq_jax.atomic_files import AppendedFile, write_atomically
from llmq_jax.errors import BadInput, is_text
from llmq_jax.field_types import LARGEST_FLOAT
from llmq_jax.json_text import parse_json
from llmq_jax.training.time_spent import SECONDS

METRICS, SAMPLES = "metrics.jsonl", "samples.txt"
VALIDATION = "validation_"
"""Prefix of an evaluation's means in records."""
OWN_LOSSES = ("next_token_loss", "classification_loss", "reward_loss", "preference_loss", "policy_loss")
"""Names of the plain loss, without what an objective adds to it in training: balance losses of experts, further
tokens."""
TIME_FIELDS = (
    "tokens_per_second",
    "mfu",
    "memory_bytes",
    *SECONDS.values(),
    "rollout_seconds",
    "scoring_seconds",
    "update_seconds",
    "reward_model_seconds",
)
"""Fields that may differ between equal runs."""

Record = dict[str, Any]


def shown_loss(record: Record) -> float | None:
    """The training loss that people are shown, which compares with the validation loss and between runs; `loss` itself
    is what is minimised."""
    return figure(record, next((name for name in OWN_LOSSES if name in record), "loss"))


def figure(record: Record, name: str) -> float | None:
    """A figure of a record; None where it has none. BadInput: it is no number."""
    value = record.get(name)
    if value is not None and (not isinstance(value, int | float) or not abs(value) < LARGEST_FLOAT):
        raise BadInput(f"{METRICS}: {name} of step {record['step']} is {value!r:.40}, no number; restore the file")
    return None if value is None else float(value)


class MetricsFile(AppendedFile):
    """Append records to `path`, one JSON object a line. A last line that a kill tore is cut off first."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.cut_torn_line()

    def write(self, record: Record) -> None:
        """A figure that is not finite becomes null, which every JSON reader takes."""
        self.append(json.dumps({name: _plain(value) for name, value in record.items()}).encode() + b"\n")


def read_metrics(path: str | Path) -> list[Record]:
    """All records, in order. A last line that a kill tore is left out; BadInput names a broken line before it."""
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            if not all(type(record[name]) is int for name in ("step", "tokens") if name == "step" or name in record):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise BadInput(
                f"{path} line {number} is not a metrics record; restore the file or remove the line"
            ) from None
        records.append(record)
    return records


def drop_metrics_after(path: str | Path, step: int) -> None:
    """Cut the file back to records of `step` and before, atomically."""
    path = Path(path)
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_atomically(path, b"".join(json.dumps(record).encode() + b"\n" for record in kept))


class SamplesFile(AppendedFile):
    """Append samples to `path`: a heading for each, and the text indented below it, so that no text looks like one."""

    def write(self, step: int, text: str) -> None:
        body = "".join(f"  {line}\n" for line in printable(text).split("\n"))
        self.append(f"step {step}\n{body}\n".encode())


def read_samples(path: str | Path) -> list[tuple[int, str]]:
    """All (step, text), in order; what a kill tore is left out."""
    data = Path(path).read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^step (\d+)\n((?:  .*\n)+)\n", data, re.MULTILINE)
    return [(int(step), re.sub(r"^  ", "", body, flags=re.MULTILINE).removesuffix("\n")) for step, body in found]


def drop_samples_after(path: str | Path, step: int) -> None:
    """Cut the file back to samples of `step` and before, atomically."""
    path = Path(path)
    if path.exists():
        data = path.read_bytes()
        for line in re.finditer(rb"^\S.*\n?", data, re.MULTILINE):
            heading = re.fullmatch(rb"step (\d+)\n", line[0])
            if heading is None or int(heading[1]) > step:  # None: a heading that a kill tore
                data = data[: line.start()]
                break
        write_atomically(path, data)


def printable(text: str) -> str:
    """The text with control characters, which an untrained model writes and a terminal obeys, shown as U+FFFD."""
    return "".join(character if is_text(character) or character in "\n\t" else "\ufffd" for character in text)


def sample_text(step: int, text: str) -> str:
    """A sample as a run shows it."""
    indented = printable(text).replace("\n", "\n  ")
    return f"step {step}: sample\n  {indented}"


def one_line(text: str, width: int) -> str:
    """A text on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _plain(value: Any) -> Any:
    """A JSON value: arrays become lists, those of one number that number, exactly."""
    if hasattr(value, "tolist"):
        value = value.item() if value.size == 1 else value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value
