"""What the recipes that learn from preference pairs share: the options of the data, and how pairs are read and
tokenised."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.options import default_is, refuse_idle
from train.chat_templates import check_chat_template
from train.options import LONGEST_CONTEXT, VALIDATION_FRACTION, Range, check_ranges, split_of
from train.sources import RecordOptions, Sources
from train.what_trains import check_what_trains

EPOCHS = 1.0


@dataclass(frozen=True)
class DataAndModelOptions:
    data: str
    """Pairs of answers: a file or folder of .json, .jsonl, .csv, .tsv or .parquet. Records have chosen and rejected,
    and the prompt that they answer. In a folder, file names may tell the splits (train.jsonl, validation.jsonl)."""
    init_from: str
    """The model to start from, with its tokenizer: a run folder, a checkpoint, a Hugging Face folder, a GGUF file or a
    hub id."""
    out: str
    """Run folder: options, metrics, samples, loss curves and checkpoints."""
    validation_data: Annotated[str | None, default_is("the validation files of --data, or a part of it")] = None
    """Pairs to measure the validation loss and accuracy on; their prompts are not learned."""
    validation_fraction: Annotated[float | None, default_is(f"{VALIDATION_FRACTION}")] = None
    """Part of the prompts held out for validation, with all their pairs. With --evaluate-every 0 they are evaluated at
    the end only."""
    split_seed: Annotated[int | None, default_is("0")] = None
    """Seed for choosing what is held out."""
    evaluate_batches: Annotated[int | None, default_is("all that are held out")] = None
    """Batches that the validation loss is measured on during the run, of a fixed random part of the held-out pairs; at
    the end all are used."""
    epochs: Annotated[float | None, default_is(f"{EPOCHS:g}, without --steps")] = None
    """Number of passes over the pairs, instead of --steps."""


@dataclass(frozen=True)
class TemplateOptions:
    template: Annotated[
        Literal["alpaca", "chat", "plain"] | None,
        default_is(
            "chat with --chat-template or --chat-template-kwargs; "
            "plain for strings unless the model has an earlier run's style; else chat or, "
            "where there is none, alpaca"
        ),
    ] = None
    """How a pair becomes text: with Alpaca's headings (alpaca), by the model's chat template (chat), or prompt and
    answer as they are (plain)."""
    chat_template: Annotated[str | None, default_is("the model's own")] = None
    """A file with a Jinja chat template to use instead of the model's own; the run's tokenizer keeps it."""
    chat_template_kwargs: Annotated[str | None, default_is("none")] = None
    """Variables for the chat template, as JSON: {"enable_thinking": false} for Qwen 3; the run's tokenizer keeps
    them."""
    context: Annotated[int | None, default_is(f"the model's, at most {LONGEST_CONTEXT}")] = None
    """Greatest number of tokens in a prompt with its answer."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with a pair of which a text is longer than --context: keep the beginnings (truncate), leave the pair
    out (drop), or end with an error."""


@dataclass(frozen=True)
class PairOptions(TemplateOptions, RecordOptions, DataAndModelOptions):
    pass  # fields are collected from right to left


def check_preference_options(options: Any, *own: Range) -> None:
    """BadInput for options that cannot be, the recipe's `own` among them, or would have no effect."""
    check_ranges(options, ("context", lambda tokens: tokens >= 2, "be at least 2"), *own)
    check_what_trains(options)
    check_chat_template(options)
    refuse_idle(options, [("split_seed", options.validation_data, "beside --validation-data")])


def read_pairs(options: PairOptions, sources: Sources, left_out: list | None) -> tuple[list, list]:
    """(training, validation) pairs; prints what was found. No prompt is in both."""
    from llmq_jax.data import read_preferences, split_preferences

    everything = read_preferences(sources.training, left_out, options.field_names())
    equal = f"; {everything.equal:,} of two equal answers left out" if everything.equal else ""
    print(f"{counted(len(everything), 'pair')} in {sources.training}{equal}")
    if not sources.validation:
        return split_preferences(everything.pairs, *split_of(options))
    validation = read_preferences(sources.validation, left_out, options.field_names())
    prompts = {pair.prompt for pair in validation}
    training = [pair for pair in everything if pair.prompt not in prompts]
    if not training:
        raise BadInput(f"{sources.training}: every prompt is in {sources.validation} too; give others to learn")
    if len(training) < len(everything):
        print(f"not learned, since their prompts are held out too: {counted(len(everything) - len(training), 'pair')}")
    return training, validation.pairs


def pair_tokens(options: PairOptions, part: list, source: Any, left_out: list | None) -> Any:
    """Tokenised pairs. BadInput for a token outside the model's vocabulary."""
    from llmq_jax.data import check_vocabulary, tokenize_preferences

    found = tokenize_preferences(
        part,
        source.tokenizer,
        template=options.template,
        context=options.context,
        too_long=options.too_long,
        left_out=left_out,
    )
    for answer in found.answers:
        check_vocabulary(answer.tokens, source.config.vocab_size, answer.where)
    return found


def numbered(part: Any) -> Any:
    """All that is learned from the pairs as one array, to take a digest of."""
    import numpy as np

    texts = np.concatenate([np.stack([each.tokens, each.learned], axis=1).ravel() for each in part.answers])
    lengths = [len(answer.tokens) for answer in part.answers]
    margins = np.array([pair.margin or 0.0 for pair in part.pairs], np.float64).view(np.int64)
    return np.concatenate([texts.astype(np.int64), np.array(lengths, np.int64), margins])


def described(options: PairOptions, learned: Any, held_out: Any, steps_in_an_epoch: int) -> str:
    """Lines on how much there is to learn, and how much of it did not fit."""
    lines = [
        f"{counted(len(learned), 'pair')} to learn, {len(held_out):,} held out (template: {options.template}); "
        f"an epoch is {counted(steps_in_an_epoch, 'step')}"
    ]
    for name, part in (("to learn", learned), ("held out", held_out)):
        if part.truncated or part.dropped:
            lines.append(
                f"{name}, within the context of {options.context} tokens: {counted(part.truncated, 'pair')} truncated, "
                f"{part.dropped:,} left out (--context, --too-long)"
            )
    return "\n".join(lines)
