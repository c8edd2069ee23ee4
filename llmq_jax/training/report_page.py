"""A run as one self-contained HTML page: figures, curves, experts, samples, times, checkpoints and options.

    write_report_page("runs/mine")  # runs/mine/report.html

Pictures are inside it, no script runs and nothing is fetched, so that it can be mailed, and read in ten years.
"""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmq_jax.atomic_files import write_atomically
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput, no_such_path
from llmq_jax.training.checkpoints import CHECKPOINTS, Checkpoints
from llmq_jax.training.metrics import METRICS, SAMPLES, VALIDATION, Record, printable, read_metrics, read_samples
from llmq_jax.training.plots import curve, draw_losses, draw_panels, draw_rewards, is_rewarded
from llmq_jax.training.progress import clock
from llmq_jax.training.run_config import CONFIG, MARK, read_run_config, run_below, text_of
from llmq_jax.training.run_folder import FINISHED, read_finished
from llmq_jax.whole_folders import refuse_no_permission

PAGE = "report.html"
SHOWN_SAMPLES = 5
PICTURES = {
    "confusion.png": "Confusion on the test",
    "expert-load.png": "Load of the experts",
    "balance.png": "Balance of the experts",
}
"""{picture that a run may have drawn at its end: the heading above it}. Before them comes what it learned."""
BESIDE = ("step", "tokens", "loss", "validation_loss")
"""Fields of records that get no curve of their own: the picture of the losses shows them."""
STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #667085; --line: #d9dee5; --paper: #fff; --bar: #2f6fb0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ec; --soft: #94a0b0; --line: #384250; --paper: #14181d; --bar: #5b9bd8 }
}
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 2.4rem 0 .8rem; font-size: 1.15rem }
p.about { margin: .2rem 0 1.6rem; color: var(--soft) }
dl.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; margin: 0 }
dl.figures div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
dl.figures dt { color: var(--soft); font-size: .82rem } dl.figures dd { margin: 0; font-size: 1.15rem }
img { max-width: 100%; border-radius: .5rem; background: #fff }
pre { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere } th { color: var(--soft); font-weight: 500 }
.bar { display: inline-block; height: .7rem; background: var(--bar); border-radius: .2rem }
summary { cursor: pointer; color: var(--soft) }
"""


def write_report_page(folder: str | Path, ending: dict[str, Any] | None = None) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path. `ending` holds the figures of
    a run that is about to be marked as finished. BadInput where the folder is no run's, or may not be written into."""
    folder = Path(folder)
    path = folder / PAGE
    page = report_page(folder, ending)
    refuse_no_permission(path, folder, "copy the run to another folder")
    write_atomically(path, page.encode())
    return path


def report_page(folder: Path, ending: dict[str, Any] | None = None) -> str:
    """The page, as text."""
    if not folder.exists():
        raise BadInput(no_such_path(folder))
    config = read_run_config(folder / CONFIG)
    if config is None and (folder / METRICS).is_file():
        raise BadInput(f"{folder / CONFIG} is missing or damaged; restore it from a copy")
    if config is None:
        fault = f"{folder} is not the folder of a run; give one that a recipe has trained in"
        raise BadInput(fault + run_below(folder))
    records = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    finished = read_finished(folder) if ending is None and (folder / FINISHED).is_file() else ending
    name = folder.absolute().name
    step = (finished or {}).get("step")
    done = f"finished after {counted(step, 'step')}" if isinstance(step, int) else f"not finished: {_reached(records)}"
    about = " · ".join(filter(None, (str(config.get("recipe", "")), _model_name(config), done)))
    parts = [
        f"<h1>{html.escape(name)}</h1>\n<p class=about>{html.escape(about)}</p>",
        _figures(finished or {}, records),
        *_learned(folder, records, finished is not None),
        *(_section(title, _picture(folder / file)) for file, title in PICTURES.items() if (folder / file).is_file()),
        *_curves(records),
        *_samples(folder / SAMPLES),
        *_times((finished or {}).get("time")),
        *_checkpoints(Checkpoints(folder / CHECKPOINTS), records),
        _section("Options", _options(config)),
    ]
    title = html.escape(name)
    return (
        f'<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<meta name=viewport content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _reached(records: Sequence[Mapping[str, Any]]) -> str:
    return f"step {records[-1]['step']:,} is the last that it told of" if records else "nothing measured yet"


def _model_name(config: dict[str, Any]) -> str:
    model = config.get("model")
    return str(model.get("model_type", "")) if isinstance(model, dict) else ""


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{body}"


def _figures(finished: dict[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    last = {name: value for record in records for name, value in record.items() if isinstance(value, int | float)}
    found = {**last, **{name: value for name, value in finished.items() if value is not None}}
    shown = {
        "steps": _number(found.get("step")),
        "tokens": _number(found.get("tokens")),
        "reward": _number(found.get("reward")),
        "validation reward": _number(found.get("validation_reward")),
        "loss": None if is_rewarded(records) else _number(found.get("loss")),
        "validation loss": _number(found.get("validation_loss")),
        "best validation loss": _number(found.get("best_validation_loss")),
        "accuracy": _number(found.get("validation_accuracy")),
        "training": clock(found["seconds"]) if "seconds" in found else None,
        "tokens/s": _number(found.get("tokens_per_second"), "{:,.0f}"),
        "MFU": _number(found.get("mfu"), "{:.1%}"),
        "peak memory": _number(found.get("peak_memory_bytes", 0) / 2**20 or None, "{:,.0f} MiB"),
    }
    boxes = (f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in shown.items() if text is not None)
    return f"<dl class=figures>{''.join(boxes)}</dl>"


def _number(value: Any, form: str = "") -> str | None:
    if value is None:
        return None
    return form.format(value) if form else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _learned(folder: Path, records: list[Record], finished: bool) -> Iterator[str]:
    """The losses, or the curves of a run that learns from rewards: as drawn at its end, or else so far."""
    file, title, draw = "losses.png", "Loss", draw_losses
    if is_rewarded(records):
        file, title, draw = "curves.png", "What it learned", draw_rewards
    elif not any(curve(records, name) for name in ("loss", "validation_loss")):
        return
    if finished and (folder / file).is_file():
        yield _section(title, _picture(folder / file))
    else:
        yield _section(title, _drawn(draw(folder), Path(file).stem))


def _drawn(figure: Any, name: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return _image(png.getvalue(), name)


def _picture(path: Path) -> str:
    return _image(path.read_bytes(), path.stem)


def _image(png: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _curves(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A panel for each number that was measured at more than one step."""
    names = dict.fromkeys(name for record in records for name in record if name not in BESIDE)
    found = {
        name: [(r["step"], float(r[name])) for r in records if isinstance(r.get(name), int | float)] for name in names
    }
    panels = [(name, {name: points}) for name, points in found.items() if len(points) > 1]
    if panels:
        yield _section("Everything measured", _drawn(draw_panels(panels, columns=3), "metrics"))


def _samples(path: Path) -> Iterator[str]:
    samples = read_samples(path) if path.is_file() else []
    if not samples:
        return
    texts = [f"<p>Step {step:,}</p>\n<pre>{html.escape(printable(text))}</pre>" for step, text in samples]
    body = "\n".join(reversed(texts[-SHOWN_SAMPLES:]))
    if earlier := texts[:-SHOWN_SAMPLES]:
        folded = "\n".join(reversed(earlier))
        body += f"\n<details><summary>{len(earlier)} earlier</summary>\n{folded}\n</details>"
    yield _section("Samples, the newest first", body)


def _times(times: Mapping[str, float] | None) -> Iterator[str]:
    total = sum((times or {}).values())
    if not times or not total:
        return
    rows = []
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        bar = f'<span class=bar style="width: {20 * seconds / total:.2f}rem"></span>'
        rows.append((name, clock(seconds), f"{seconds / total:.1%}", bar))
    yield _section("Where the time went", _table(("part", "time", "share", ""), rows, ready=(3,)))


def _checkpoints(checkpoints: Checkpoints, records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    judge, _ = checkpoints.judged_by() or ("loss", "lowest")
    name = VALIDATION + judge
    values = {record["step"]: record[name] for record in records if name in record}
    rows = [
        (f"{step:,}", _number(values.get(step)) or "", f"{_bytes_in(checkpoints.path(step)) / 2**20:,.1f} MiB")
        for step in checkpoints.steps()
    ]
    if rows:
        yield _section("Checkpoints", _table(("step", name.replace("_", " "), "size"), rows))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _options(config: dict[str, Any]) -> str:
    """The recipe's options, then, folded, those of the training loop and the model's config."""
    own = {name: value for name, value in config.items() if not isinstance(value, dict) and name != MARK}
    body = _table(("option", "value"), _pairs(own))
    for name in (name for name, value in config.items() if isinstance(value, dict)):
        table = _table((name, "value"), _pairs(config[name]))
        body += f"\n<details><summary>{html.escape(name)}</summary>{table}</details>"
    return body


def _pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if value is not None:
            yield name, value if isinstance(value, str) else text_of(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], ready: Sequence[int] = ()) -> str:
    """Cells as text, but for the columns in `ready`, which are HTML."""
    first = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = (
        "".join(f"<td>{cell if i in ready else html.escape(cell)}</td>" for i, cell in enumerate(row)) for row in rows
    )
    return f"<table><tr>{first}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
