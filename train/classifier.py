"""Train a classifier: a language model learns to tell the classes of labelled texts apart.

    python -m train.classifier --data spam.tsv --columns label,text --init-from gpt2 --out runs/spam
    python -m train.classifier --data reviews.csv --init-from model.gguf --out runs/reviews --class-weights
    python -m train.classifier --data a.jsonl --test-data b.jsonl --init-from gpt2 --out runs/mine --train all

Duplicates are removed, then the texts are split into training, validation and test sets, each class by the same
fractions. At the end the test set is classified: test.json, confusion.png, errors.jsonl. The same command again resumes
a run that was stopped.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from llmq_jax.command_line import run
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, default_is, no_option, refuse_idle
from train.devices import on_devices
from train.exports import export_commands, registering
from train.options import (
    MAY_CHANGE,
    VALIDATION_FRACTION,
    check_ranges,
    filled,
    optimizer_of,
    own_options,
    run_options,
    train_step_of,
    with_steps,
)
from train.sources import RecordOptions, Sources, sources_of, tell_left_out
from train.texts import digests_of
from train.what_trains import FineTuningOptions, TuningOptions, check_what_trains, flops_of, learner_of, load_to_train

EPOCHS = 3.0
TEST_FRACTION = 0.2
SAMPLES = 3


@dataclass(frozen=True)
class DataAndModelOptions:
    data: str
    """Texts with a label each: a file or folder of .csv, .tsv, .json, .jsonl or .parquet. In a folder, file names may
    tell the splits (train.csv, validation.csv, test.csv)."""
    init_from: str
    """The model to start from, with its tokenizer: a run folder, a checkpoint, a Hugging Face folder, a GGUF file or a
    hub id."""
    out: str
    """Run folder: options, metrics, samples, loss curves, checkpoints and test results."""
    columns: Annotated[str | None, default_is("those of the header")] = None
    """Names of the columns of .csv and .tsv files without a header, separated by commas: label,text."""
    text_field: str = "text"
    """Field or column that holds the text."""
    label_field: str = "label"
    """Field or column that holds the label, a string or a whole number."""
    validation_data: Annotated[str | None, default_is("the validation files of --data, or a part of it")] = None
    """Texts to measure the validation loss and accuracy on."""
    test_data: Annotated[str | None, default_is("the test files of --data, or a part of it")] = None
    """Texts to test on, once, at the end."""
    validation_fraction: Annotated[float | None, default_is(f"{VALIDATION_FRACTION}")] = None
    """Part of each class held out for validation, also with --evaluate-every 0."""
    test_fraction: Annotated[float | None, default_is(f"{TEST_FRACTION}")] = None
    """Part of each class held out for the test."""
    split_seed: Annotated[int | None, default_is("0")] = None
    """Seed for choosing what is held out, and what --balance keeps."""
    balance: Flag = False
    """Keep as many texts of each class as the smallest class has, before anything is held out."""
    class_weights: Flag = False
    """Weight each class by how rare it is, in the training and the validation loss."""
    max_length: Annotated[int | None, default_is("the model's context")] = None
    """Greatest number of tokens in a text; longer texts are cut."""
    epochs: Annotated[float | None, default_is(f"{EPOCHS:g}, without --steps")] = None
    """Number of passes over the texts, instead of --steps."""


@dataclass(frozen=True)
class Options(FineTuningOptions, TuningOptions, RecordOptions, DataAndModelOptions):
    # Dataclasses collect the fields of their bases from right to left.
    batch_size: int = 8
    """Texts in a batch."""
    learning_rate: float = 1e-4
    """The peak learning rate, reached after the warm-up."""
    weight_decay: float = 0.01
    """Weight decay of kernels and embeddings (not of norms and biases), multiplied by the learning rate."""
    sample_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two samples, which are predictions for a few texts; 0: never."""
    sample_prompt: Annotated[str | None, default_is("the first that are held out")] = None
    """A text to classify in the samples."""
    fields: None = no_option("in classification, which reads --text-field and --label-field")


@on_devices
def main(options: Options) -> Any:
    """The whole recipe; returns the engine's RunResult."""
    check(options)

    # JAX has its device now: modules that import JAX may follow.
    from llmq_jax.data.length_buckets import LabelledBatches, LabelledEvaluation
    from llmq_jax.model_files import TextFiles
    from llmq_jax.objectives.classification import Classification
    from llmq_jax.training import engine, step
    from llmq_jax.training.classification_report import prediction, prediction_line
    from llmq_jax.training.parts import whole
    from llmq_jax.training.sharding import own_rows, row_share

    # The texts, split, and the model with a head for their classes.
    sources = sources_of(options)
    found = read_data(options, sources)
    source = load_to_train(options)
    source.require_tokenizer(options.init_from)
    options, parts = split_data(options, sources, found, source.config.labels)
    source, head = with_head(source, parts["training"].names, options.seed)
    config = source.config
    context = config.max_position_embeddings
    options = filled(options, max_length=context)
    if options.max_length > context:
        raise BadInput(
            f"--max-length {options.max_length} exceeds the model's context, {context}; choose a shorter one"
        )
    rows = {name: token_rows(options, source, sources, name, part.texts) for name, part in parts.items()}

    # Batches of texts of similar length.
    size, longest = options.batch_size, options.max_length
    training, validation = parts["training"], parts["validation"]
    batches = LabelledBatches(rows["training"], training.labels, size, longest, options.seed, **row_share())
    held_out = LabelledEvaluation(rows["validation"], validation.labels, size, longest)
    options = with_steps(options, batches.per_epoch, EPOCHS)

    # The model, computing as the options say, and the part of it that trains.
    source, learner = learner_of(source, options, options.batch_size)

    schedule, optimizer = optimizer_of(options)
    weights = tuple(training.class_weights().tolist()) if options.class_weights else None
    objective = Classification(learner.model, weights)
    train_step = train_step_of(options, objective, optimizer)
    eval_step = step.make_eval_step(objective)

    def evaluate(variables):
        return step.evaluate(eval_step, variables, map(own_rows, held_out))

    samples = validation.texts[:SAMPLES] if options.sample_prompt is None else [options.sample_prompt]
    sample_rows = token_rows(options, source, sources, None, samples)

    def sample(variables, at_step):
        logits = source.replace(variables=whole(variables)).classify_rows(sample_rows)
        pairs = zip(samples, logits, strict=True)
        return "\n".join(prediction_line(text, prediction(config.labels, row)) for text, row in pairs)

    if weights is not None:
        each = ", ".join(f"{label} {weight:.3g}" for label, weight in zip(config.labels, weights, strict=True))
        head += f"\nclass weights: {each}; losses are weighted by them, in training and validation"
    print(f"{head}\n{learner.described}\n{source.model.attention_choice(training=True)}", flush=True)
    digests = digests_of({name: (rows[name], part.labels) for name, part in parts.items()}, numbered)

    def conclude(result):
        learned = source.replace(variables=whole(result.state.variables))
        return test(options, learned, result.step, parts["test"], rows["test"])

    return engine.run(
        learner.state(optimizer, options.seed),
        train_step,
        batches,
        run_options(options),
        folder=options.out,
        config={"recipe": "train.classifier", **own_options(options), **digests},
        may_change=MAY_CHANGE,
        model_config=config,
        tokenizer=TextFiles(source.tokenizer, source.generation),
        schedule=schedule,
        evaluate=evaluate,
        sample=sample,
        flops_per_token=flops_of(options, learner, [min(len(row), longest) for row in rows["training"]]),
        conclude=conclude,
        next_commands=next_commands(options, config),
    )


def check(options: Options) -> None:
    """BadInput for options that cannot be, or have no effect, before anything is written or a model is loaded."""
    check_ranges(options, ("max_length", lambda tokens: tokens >= 1, "be at least 1"))
    check_what_trains(options)
    if options.balance and options.class_weights:
        raise BadInput("--class-weights has no effect beside --balance, which makes all classes equal; leave one out")
    if options.sample_prompt is not None and not options.sample_prompt.strip():
        raise BadInput("--sample-prompt holds no text; give one to classify, or leave it out")
    files = options.validation_data and options.test_data
    paths = [path for path in (options.data, options.validation_data, options.test_data) if path]
    refuse_idle(
        options,
        (
            ("columns", not any(map(may_lack_names, paths)), "without a .csv or .tsv file"),
            ("test_fraction", options.test_data, "beside --test-data"),
            ("split_seed", files and not options.balance, "beside --validation-data and --test-data"),
            ("validation_data", options.evaluate_every == 0, "with --evaluate-every 0"),
        ),
    )


def may_lack_names(path: Any) -> bool:
    """Whether --columns are for what is there: a table, or a folder with some."""
    from llmq_jax.data import is_table
    from llmq_jax.data.records import record_files

    return any(map(is_table, record_files(path)))


def read_data(options: Options, sources: Sources) -> dict[str, list]:
    """{"training" and, where they have files of their own, "validation" and "test": rows of a text and a label}."""
    from llmq_jax.data import class_names, read_rows

    columns = None if options.columns is None else tuple(name.strip() for name in options.columns.split(","))
    left_out = options.left_out()

    def read(path: Any) -> list:
        names = columns if may_lack_names(path) else None
        return read_rows(path, options.text_field, options.label_field, names, left_out)

    rows = {name: read(path) for name, path in sources._asdict().items() if path}
    tell_left_out(left_out)
    class_names(rows["training"], sources.training)
    return rows


def split_data(
    options: Options, sources: Sources, rows: dict[str, list], known: Sequence[str] | None
) -> tuple[Options, dict[str, Any]]:
    """(the options with their defaults filled in, {"training", "validation" and "test": labelled texts}); prints what
    was found. No text is in two parts, or twice in one. `known` are the classes of a loaded classifier: unless the data
    have other ones, they are kept, in their order."""
    from llmq_jax.data import class_names

    found = class_names(rows["training"], sources.training)
    names = tuple(known) if known is not None and set(found) <= set(known) else found
    options = completed_fractions(options, sources)
    parts, elsewhere = {}, set()
    for name, path in (("test", sources.test), ("validation", sources.validation)):
        if path:
            parts[name] = distinct(path, rows[name], names, elsewhere)
            elsewhere |= {row.text for row in rows[name]}
    kept = distinct(sources.training, rows["training"], names, elsewhere)
    left = dict(zip(names, kept.counts(), strict=True))
    if gone := [label for label in found if not left[label]]:
        raise BadInput(f"{sources.training}: no text of class {gone[0]!r} is left to learn; give some, or leave it out")
    if options.balance:
        kept = kept.balanced(options.split_seed)
        print(f"balanced to {len(kept):,}")

    fractions = {name: getattr(options, f"{name}_fraction") for name in ("validation", "test") if name not in parts}
    shares = (1.0 - sum(fractions.values()), *fractions.values())
    parts |= dict(zip(("training", *fractions), kept.stratified_split(shares, options.split_seed), strict=True))
    for name in ("training", "validation", "test"):
        counts = ", ".join(f"{count:,} {label}" for label, count in zip(names, parts[name].counts(), strict=True))
        print(f"{name + ':':12}{counted(len(parts[name]), 'text')} ({counts})")
    return options, parts


def distinct(path: Any, rows: list, names: Sequence[str], elsewhere: set[str]) -> Any:
    """The texts of a file, each once, without those `elsewhere`; prints how many were removed."""
    from llmq_jax.data import labelled_texts

    kept, repeated, contradictory = labelled_texts(rows, names).without_duplicates()
    apart = kept.without(elsewhere)
    counts = (
        (repeated, counted(repeated, "duplicate")),
        (contradictory, f"{contradictory:,} under several labels"),
        (len(kept) - len(apart), f"{len(kept) - len(apart):,} that are in the other files"),
    )
    print(
        "; ".join([f"{counted(len(rows), 'text')} in {path}", *(f"{told} removed" for count, told in counts if count)])
    )
    if not len(apart):
        raise BadInput(f"{path}: no text is left; give texts that are not in the other files, under one label each")
    return apart


def completed_fractions(options: Options, sources: Sources) -> Options:
    """The options with the fractions' defaults filled in. BadInput where the fractions leave nothing to learn."""
    fractions = {"validation": VALIDATION_FRACTION, "test": TEST_FRACTION}
    missing = {f"{name}_fraction": part for name, part in fractions.items() if not getattr(sources, name)}
    options = filled(options, **missing, split_seed=0)
    validation, test = options.validation_fraction or 0, options.test_fraction or 0
    if validation + test >= 1:
        raise BadInput(
            f"--validation-fraction {validation} and --test-fraction {test} leave no texts to learn; give less"
        )
    return options


def with_head(source: Any, names: tuple[str, ...], seed: int) -> tuple[Any, str]:
    """(the model with a head for these classes, a description of the head): its own, if that is for exactly these, else
    a fresh one."""
    from llmq_jax.language_model import with_classifier
    from llmq_jax.models.heads import shown

    known = source.config.labels
    if known == names:
        return source, f"classes: {shown(names)}; the head goes on"
    instead = "" if known is None else f"; the one for {shown(known)} is discarded"
    return with_classifier(source, names, seed), f"classes: {shown(names)}; the head is fresh{instead}"


def token_rows(
    options: Options, source: Any, sources: Sources, part: str | None, texts: Sequence[str]
) -> list[list[int]]:
    """Token ids of the texts of a part, cut to --max-length; prints how many were cut. `part` None: of the samples'
    texts."""
    from llmq_jax.data import check_vocabulary

    where = "--sample-prompt" if part is None else str(getattr(sources, part) or sources.training)
    rows, cut = source.class_tokens(texts, options.max_length)
    if part is not None and cut:
        print(f"{part}: {cut:,} of {counted(len(rows), 'text')} cut to --max-length {options.max_length}")
    for row in rows:
        check_vocabulary(row, source.config.vocab_size, where)
    return rows


def numbered(part: tuple[Sequence[list[int]], Sequence[int]]) -> Any:
    """Token rows and their labels as one array, to take a digest of."""
    import numpy as np

    return np.concatenate([[len(row), label, *row] for row, label in zip(*part, strict=True)]).astype(np.int64)


def test(options: Options, lm: Any, step: int, part: Any, rows: Sequence[list[int]]) -> str:
    """Classify the test set by the model after this step, and write the results into the run folder; returns them as
    text."""
    from llmq_jax.atomic_files import write_atomically, write_json_atomically
    from llmq_jax.training.classification_report import classification_report, plot_confusion, worst_errors
    from llmq_jax.training.processes import first
    from llmq_jax.training.report_page import write_report_page

    logits = lm.classify_rows(rows, options.batch_size)
    if not first():
        return ""
    report = classification_report(part.names, logits, part.labels)
    errors = worst_errors(part.names, part.texts, logits, part.labels)
    folder = Path(options.out)
    lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
    write_atomically(folder / "errors.jsonl", lines.encode())
    write_json_atomically(folder / "test.json", {"step": step, **report.to_json()})
    plot_confusion(report, folder / "confusion.png")
    write_report_page(folder)
    worst = f"{'the worst ' if errors else ''}{counted(len(errors), 'error')}"
    return (
        f"test after step {step:,} on {counted(len(part), 'text')}: {report.text()}\n\n"
        f"written to {folder}: test.json, confusion.png, errors.jsonl ({worst})"
    )


def next_commands(options: Options, config: Any) -> list[str]:
    cut = "" if options.max_length == config.max_position_embeddings else f" --max-length {options.max_length}"
    classify = f"llmq classify {shlex.quote(options.out)}{cut}"
    commands = [f'{classify} --text "..."', f"{classify} --data FILE --out classified.jsonl"]
    commands = [command + registering(config) for command in commands]
    return commands + export_commands(options.out, config)


if __name__ == "__main__":
    run(main)
