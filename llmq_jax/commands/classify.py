"""Classify texts with a trained classifier: the probability of each class.

llmq classify runs/spam --text "You have won a prize" --text "See you at noon"
llmq classify runs/spam --data messages.csv --output classified.jsonl
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import Flag, Positional, Repeated, default_is, use_device
from llmq_jax.commands.progress import with_progress
from llmq_jax.errors import BadInput


@dataclass(frozen=True)
class Options:
    model: Positional[str]
    """The classifier: a run folder or checkpoint of this project, a Hugging Face folder or a hub id."""
    text: Repeated = ()
    """A text; may be given several times."""
    data: Annotated[str | None, default_is("none")] = None
    """Texts: .json, .jsonl, .csv, .tsv or .parquet with a text field, or a text file, which is one text."""
    text_field: Annotated[str | None, default_is("text")] = None
    """Field or column of --data that holds the text."""
    output: Annotated[str | None, default_is("the terminal")] = None
    """File to write, a line of JSON for each text: .jsonl."""
    max_length: Annotated[int | None, default_is("the model's context")] = None
    """Tokens of a text that are read; what is longer is cut, and counted."""
    batch_size: int = 16
    """Texts that go through the model at a time; it does not change the result."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the file")] = None
    """Type to compute in and to hold the weights in."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""
    json: Flag = False
    """Print a line of JSON for each text."""


def main(options: Options) -> None:
    check(options)
    from llmq_jax.data import read_documents

    texts = list(options.text)
    if options.data is not None:
        texts = read_documents(options.data, options.text_field or "text")
    use_device(options.device)
    import llmq_jax as lq
    from llmq_jax.training.classification_report import prediction, prediction_line

    lm = lq.load(options.model, dtype=options.dtype)
    labels = lm.require_labels(options.model)
    lm.require_tokenizer(options.model)
    longest = lm.config.max_position_embeddings
    if options.max_length is not None and not 0 < options.max_length <= longest:
        raise BadInput(f"--max-length {options.max_length} must lie between 1 and the model's {longest}")
    rows = lm.class_tokens(texts)
    wanted = options.max_length or longest
    cut = sum(len(row) > wanted for row in rows)
    if cut:
        print(f"{cut} of {len(rows)} texts are cut to {wanted} tokens", file=sys.stderr)
    logits = lm.classify_rows(
        [row[:wanted] for row in rows],
        options.batch_size,
        watch=lambda batches: with_progress(batches, "classifying"),
    )

    results = [prediction(labels, text, row) for text, row in zip(texts, logits, strict=True)]
    if options.output is not None:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in results)
        Path(options.output).write_text(lines, encoding="utf-8")
        print(f"written: {options.output}, {summary(labels, results)}")
    elif options.json:
        for each in results:
            print(json.dumps(each, ensure_ascii=False))
    else:
        for each in results:
            print(prediction_line(each))


def check(options: Options) -> None:
    """Refuse what cannot be, or would have no effect, before anything is read."""
    from llmq_jax.data import has_fields

    if bool(options.text) == (options.data is not None):
        raise BadInput("give texts: --text TEXT, once or several times, or --data FILE, one of the two")
    if options.text_field is not None and (options.data is None or not has_fields(options.data)):
        where = "without --data" if options.data is None else f"on {options.data}, which has no fields"
        raise BadInput(f"--text-field has no effect {where}; leave it out")
    if options.batch_size < 1:
        raise BadInput(f"--batch-size is {options.batch_size} and must be at least 1")
    if options.output is None:
        return
    if options.json:
        raise BadInput("--json has no effect beside --output, which is JSON; leave it out")
    if not options.output.endswith(".jsonl"):
        raise BadInput(f"--output {options.output}: has a line of JSON for each text; give it a name ending in .jsonl")
    if not Path(options.output).absolute().parent.is_dir():
        raise BadInput(f"--output {options.output}: there is no folder {Path(options.output).parent}; make it first")


def summary(labels: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """How many texts got each label."""
    if len(labels) == 1:
        return f"{len(results):,} scores"
    found = [each["label"] for each in results]
    counts = ", ".join(f"{found.count(label):,} {label}" for label in labels if label in found)
    return f"{len(results):,} texts: {counts}"
