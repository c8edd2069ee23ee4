"""Classify texts with a trained classifier: the probability of each class.

    llmq classify runs/spam --text "You have won a prize" --text "See you at noon"
    llmq classify runs/spam --data messages.csv --out classified.jsonl
    llmq classify runs/spam --data messages.tsv --columns id,text --out classified.jsonl           without a header

With --out or --json, the records come out again as JSON, one a line, with "label" (the likeliest class) and
"probabilities" added, or "scores" for a model with a single label, which gives a number. A label that the data have
comes out as "given_label". The file that --out names is written at the end. If the command is stopped before, what is
done stays in FILE.partial, and the same command goes on from there.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.commands.devices import DeviceOptions
from llmq_jax.commands.kept_lines import check_out, kept_lines
from llmq_jax.commands.progress import with_progress
from llmq_jax.commands.standard_input import STANDARD_INPUT, text_of_input, without_last_break
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, Positional, Repeated, default_is, refuse_idle, require_at_least

GIVEN = "given_"
"""What is put before the name of a record's field where the prediction has one of that name."""


@dataclass(frozen=True)
class TextOptions:
    model: Positional[str]
    """The classifier: a run folder or checkpoint of this project, a Hugging Face folder or a hub id."""
    text: Repeated = ()
    """A text to classify; may be given several times. - reads one text from standard input."""
    data: Annotated[str | None, default_is("none")] = None
    """Texts: .json, .jsonl, .csv, .tsv or .parquet with a text field, a text file, which is one text, or a folder."""
    text_field: Annotated[str | None, default_is("text")] = None
    """Field or column of --data that holds the text."""
    columns: Annotated[str | None, default_is("those of the header")] = None
    """Names of the columns of a .csv or .tsv file without a header, separated by commas: id,text."""
    out: Annotated[str | None, default_is("the terminal")] = None
    """A new .jsonl file, with a line of JSON for each text. Until all are done, lines are kept in FILE.partial, from
    which the same command goes on."""
    max_length: Annotated[int | None, default_is("the model's context")] = None
    """Greatest number of tokens in a text; longer texts are cut, and a line says how many."""
    batch_size: int = 16
    """Texts that go through the model at a time; it does not change the result."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the file")] = None
    """Type to compute in and to hold the weights in."""
    json: Flag = False
    """Print a line of JSON for each text."""


@dataclass(frozen=True)
class Options(DeviceOptions, TextOptions):  # the fields of the last class come first
    pass


def main(options: Options) -> None:
    check(options)
    records = read(options)
    with options.on_devices(options.batch_size):
        labels, results = classified(options, records)
    if options.out is not None:
        print(f"written: {options.out}, {summary(labels, records, results)}")
    elif options.json:
        print("\n".join(map(line, records, results)))
    else:
        from llmq_jax.training.classification_report import prediction_line

        for record, said in zip(records, results, strict=True):
            print(prediction_line(record.fields[options.text_field or "text"], said))


def classified(options: Options, records: list[Any]) -> tuple[Sequence[str], list[dict[str, Any]]]:
    """(the classes, the prediction for each record). With --out, the records' lines are kept as they are done."""
    from llmq_jax.data.length_buckets import POOL
    from llmq_jax.training.classification_report import prediction

    lm = options.load_model(options.model, options.dtype)
    labels = lm.require_labels(options.model)
    lm.require_tokenizer(options.model)
    rows = _rows(options, lm, labels, records)
    # Fewer texts than a batch are one smaller batch, of a size that the mesh divides too.
    size = min(options.batch_size, options.rows_of(len(rows)))
    with _kept_lines(options, lm, records, rows) as kept:
        found = [] if kept is None else [json.loads(each) for each in kept.lines]
        results, begin = [{name: record[name] for name in added(labels)} for record in found], len(found)
        with contextlib.closing(with_progress(range(begin, len(rows), size), "classifying")) as bar:
            # Lines are kept in the order of the texts, a stretch at a time; within a stretch, texts of similar length
            # share a batch.
            for first in range(begin, len(rows), POOL * size):
                places = range(first, min(first + POOL * size, len(rows)))
                stretch = [rows[place] for place in places] + [rows[-1]] * (size - len(places))
                logits = lm.classify_rows(
                    stretch, size, watch=lambda batches: (batch for batch, _ in zip(batches, bar, strict=False))
                )
                results += [prediction(labels, row) for row in logits[: len(places)]]
                if kept is not None:
                    kept.add([line(records[place], results[place]) for place in places])
    return labels, results


def _kept_lines(
    options: Options, lm: Any, records: list[Any], rows: list[list[int]]
) -> contextlib.AbstractContextManager[Any]:
    """The `KeptLines` of --out; None where lines are printed."""
    if options.out is None:
        return contextlib.nullcontext()
    from llmq_jax.weight_digest import weight_digest

    names = added(lm.config.labels)
    fields, digest = [json.loads(as_json(given(record, names))) for record in records], hashlib.sha256()
    for each in zip(fields, rows, strict=True):
        digest.update(json.dumps(each).encode())
    command = {name: getattr(options, name) for name in ("text_field", "columns", "max_length")}
    command["model"] = [repr(lm.config), weight_digest(lm.variables)]
    command["text" if options.data is None else "data"] = digest.hexdigest()
    return kept_lines(Path(options.out), command, fields)


def _rows(options: Options, lm: Any, labels: Sequence[str], records: list[Any]) -> list[list[int]]:
    """The token ids of each text."""
    longest = lm.config.max_position_embeddings
    if options.max_length is not None and not 0 < options.max_length <= longest:
        raise BadInput(f"--max-length {options.max_length} must lie between 1 and the model's {longest}")
    for record in records:
        taken = [name for name in added(labels) if {name, GIVEN + name} <= set(record.fields)]
        if taken and (options.json or options.out is not None):
            raise BadInput(
                f"{record.where} has fields {taken[0]!r} and {GIVEN + taken[0]!r}, the name under which the first "
                "would come out; rename one"
            )
    wanted = options.max_length or longest
    texts = [record.fields[options.text_field or "text"] for record in records]
    rows: list[list[int]]
    rows, cut = lm.class_tokens(texts, wanted)
    if cut:
        print(f"{cut} of {counted(len(rows), 'text')} cut to {counted(wanted, 'token')}", file=sys.stderr)
    return rows


def check(options: Options) -> None:
    """Refuse what cannot be, or would have no effect, before anything is read."""
    from llmq_jax.data import has_fields, is_table

    if bool(options.text) == (options.data is not None):
        raise BadInput("give texts: --text TEXT, once or several times, or --data FILE, one of the two")
    refuse_idle(options, ((name, options.data is None, "without --data") for name in ("text_field", "columns")))
    if options.data == "-":
        raise BadInput("--data takes a file or a folder; for a text on standard input give --text -")
    if options.text.count("-") > 1:
        raise BadInput("--text - is given twice, and standard input is one text; give it once")
    if options.data is not None:
        no_fields, no_table = not has_fields(options.data), not is_table(options.data)
        refuse_idle(options, [("text_field", no_fields, f"on {options.data}, which has no fields")])
        refuse_idle(options, [("columns", no_table, f"on {options.data}, which is no .csv or .tsv file")])
    require_at_least(options, batch_size=1)
    if options.out is None:
        return
    if options.json:
        raise BadInput("--json has no effect beside --out, which is JSON; leave it out")
    if not options.out.endswith(".jsonl"):
        raise BadInput(f"--out {options.out}: has a line of JSON for each text; give it a name ending in .jsonl")
    check_out(Path(options.out))


def read(options: Options) -> list[Any]:
    """The records with the texts, none of which is empty."""
    from llmq_jax.data import Record, text_to_classify
    from llmq_jax.data.records import checked_text, holds_records, is_blank, iterate_records, read_text
    from llmq_jax.data.sources import text_files

    name, records = options.text_field or "text", []
    columns = None if options.columns is None else [column.strip() for column in options.columns.split(",")]
    for number, text in enumerate(options.text, start=1):
        where = f"--text number {number}"
        if text == "-":
            where, text = STANDARD_INPUT, without_last_break(text_of_input("--data FILE{}"))
        records.append(Record(where, {name: text}))
    for file in [] if options.data is None else text_files(options.data):
        if holds_records(file):
            records += iterate_records(file, columns, needed={name: "--text-field"}, string_field=name)
        else:
            text = read_text(file)
            if is_blank(text):
                raise BadInput(f"{file} holds no text; remove it, or fill it in")
            records.append(Record(str(file), {name: text}))
    if not records:
        raise BadInput(f"{options.data} holds no record")
    for record in records:
        text_to_classify(record, name)
        checked_text(as_json(record.fields), record.where)
    return records


def added(labels: Sequence[str]) -> tuple[str, ...]:
    """The fields that are added to a record."""
    return ("scores",) if len(labels) == 1 else ("label", "probabilities")


def given(record: Any, names: Collection[str]) -> dict[str, Any]:
    """A record's fields, those of these names under other ones."""
    return {GIVEN + name if name in names else name: value for name, value in record.fields.items()}


def line(record: Any, said: dict[str, Any]) -> str:
    """A record with its prediction, as a line of JSON."""
    return as_json({**given(record, said), **said})


def as_json(fields: dict[str, Any]) -> str:
    """One line; what JSON has no form for, such as Parquet's dates, is written as text."""
    return json.dumps(fields, ensure_ascii=False, default=str)


def summary(labels: Sequence[str], records: Sequence[Any], results: Sequence[dict[str, Any]]) -> str:
    """How many texts got each label, and how many of those that had one before got the same."""
    if len(labels) == 1:
        return counted(len(results), "score")
    found = [each["label"] for each in results]
    counts = ", ".join(f"{found.count(label):,} {label}" for label in labels if label in found)
    told = [
        str(record.fields["label"]) == each["label"]
        for record, each in zip(records, results, strict=True)
        if "label" in record.fields
    ]
    agreed = f"; {sum(told):,} of {len(told):,} as labelled" if told else ""
    return f"{counted(len(results), 'text')}: {counts}{agreed}"
