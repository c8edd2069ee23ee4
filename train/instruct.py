"""Instruction tuning: teach a model to answer, from conversations; only the answers are learned.

    python -m train.instruct --data alpaca.json --init-from gpt2 --out runs/mine             Alpaca's instructions
    python -m train.instruct --data chats.jsonl --init-from model.gguf --out runs/chat       a chat model's own template
    python -m train.instruct --data chats.jsonl --init-from model.gguf --preview             look at a batch first

Records have instruction, input and output; or messages; or ShareGPT's conversations; or prompt and completion; or
question and answer. The same command again resumes a run that was stopped, and says so when it is finished.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import run
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, default_is, refuse_idle
from train.answers import end_of_answer, questioner
from train.chat_templates import chat_template_digest, check_chat_template, in_style, tell_of_no_end, with_text_options
from train.devices import on_devices
from train.exports import next_commands
from train.options import (
    LONGEST_CONTEXT,
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
from train.sources import RecordOptions, held_out_apart, sources_of, tell_left_out
from train.texts import digests_of
from train.what_trains import FineTuningOptions, TuningOptions, check_what_trains, flops_of, learner_of, load_to_train

EPOCHS = 3.0
OF_VALIDATION = ("validation_data", "validation_fraction", "split_seed")
LORA_RATE, FULL_RATE = 2e-4, 2e-5


@dataclass(frozen=True)
class DataAndModelOptions:
    data: str
    """Conversations: a file or folder of .json, .jsonl, .csv, .tsv or .parquet. Records have instruction and output,
    messages, conversations (ShareGPT's), prompt and completion, or question and answer. In a folder, file names may
    tell the splits (train.jsonl, validation.jsonl)."""
    init_from: str
    """The model to start from, with its tokenizer: a run folder, a checkpoint, a Hugging Face folder, a GGUF file or a
    hub id."""
    out: Annotated[str | None, default_is("none, for --preview alone")] = None
    """Run folder: options, metrics, samples, loss curves and checkpoints."""
    validation_data: Annotated[str | None, default_is("the validation files of --data, or a part of it")] = None
    """Conversations to measure the validation loss on, over the tokens that --train-on names."""
    validation_fraction: Annotated[float | None, default_is(f"{VALIDATION_FRACTION}")] = None
    """Part of the conversations held out for validation; conversations equal to a held-out one are not learned either.
    With --evaluate-every 0 nothing is held out."""
    split_seed: Annotated[int | None, default_is("0")] = None
    """Seed for choosing what is held out."""
    evaluate_batches: Annotated[int | None, default_is("all that are held out")] = None
    """Batches that the validation loss is measured on, spread evenly over what is held out."""


@dataclass(frozen=True)
class TemplateOptions:
    template: Annotated[
        Literal["alpaca", "chat", "plain"] | None,
        default_is(
            "chat with --chat-template or --chat-template-kwargs; "
            "plain for texts, and for prompts unless the model has an earlier run's style; "
            "else chat or, where there is none, alpaca"
        ),
    ] = None
    """How a conversation becomes text: with Alpaca's headings (alpaca), by the model's chat template (chat), or prompt
    and completion as they are (plain). The run's tokenizer keeps this form as its chat template."""
    chat_template: Annotated[str | None, default_is("the model's own")] = None
    """A file with a Jinja chat template to use instead of the model's own; the run's tokenizer keeps it."""
    chat_template_kwargs: Annotated[str | None, default_is("none")] = None
    """Variables for the chat template, as JSON: {"enable_thinking": false} for Qwen 3; the run's tokenizer keeps
    them."""
    train_on: str = "response"
    """What is learned: every answer (response), the last one (last), prompts too (all), or answers by their numbers,
    counted from 0: 0,2. Answers of weight 0 in the data are not."""
    pack: bool = True
    """Put several conversations into a row, without attention between them. With --no-pack each has a padded row of its
    own."""
    context: Annotated[int | None, default_is(f"the model's, at most {LONGEST_CONTEXT}")] = None
    """Tokens in a row, and in the longest conversation."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with a conversation longer than --context: keep its beginning (truncate), leave it out (drop), or end
    with an error."""
    epochs: Annotated[float | None, default_is(f"{EPOCHS:g}, without --steps")] = None
    """Number of passes over the conversations, instead of --steps."""
    preview: Flag = False
    """Show a batch with the learned tokens marked, and exit; no model is trained."""


@dataclass(frozen=True)
class Options(FineTuningOptions, TuningOptions, TemplateOptions, RecordOptions, DataAndModelOptions):
    # Dataclasses collect the fields of their bases from right to left.
    batch_size: int = 8
    """Rows in a batch."""
    learning_rate: Annotated[float | None, default_is(f"{LORA_RATE:g} for adapters, else {FULL_RATE:g}")] = None
    """The peak learning rate, reached after the warm-up."""
    sample_prompt: Annotated[str | None, default_is("the first that is held out, or else learned")] = None
    """An instruction for the samples to answer."""


@on_devices
def main(options: Options) -> Any:
    """The whole recipe; returns the engine's RunResult, None for a preview."""
    check(options)
    options = filled(options, learning_rate=LORA_RATE if options.train == "lora" else FULL_RATE)

    # JAX has its device now: modules that import JAX may follow.
    from llmq_jax.data import SomeBatches, instruction_batches, read_conversations
    from llmq_jax.model_files import TextFiles, load
    from llmq_jax.objectives.next_token import NextToken
    from llmq_jax.training import engine, step
    from llmq_jax.training.metrics import sample_text
    from llmq_jax.training.processes import of_first, same
    from llmq_jax.training.run_config import differences
    from llmq_jax.training.run_folder import config_of_run
    from llmq_jax.training.sharding import row_share

    # The conversations, some of them held out, and the model.
    sources = sources_of(options, hold_out=options.evaluate_every != 0)
    left_out = options.left_out()
    read = functools.partial(read_conversations, left_out=left_out, fields=options.field_names())
    training, validation = held_out_apart(options, sources, read, said, "conversation")
    source = load(options.init_from) if options.preview else load_to_train(options)
    source.require_language_model(options.init_from)
    options, source = with_text_options(options, training, source)
    tokenizer, config = source.tokenizer, source.config
    if not sources.validation and options.evaluate_every != 0:
        options = filled(options, split_seed=0)
    learned = examples(options, training, tokenizer, config, left_out)
    held_out = examples(options, validation, tokenizer, config, left_out) if validation else None
    tell_left_out(left_out)

    # Rows of several conversations, or of one. Training takes them shuffled, validation in order.
    rows = {"context": options.context, "batch_size": options.batch_size, "packing": options.pack, **row_share()}
    batches = instruction_batches(learned.examples, **rows, seed=options.seed)
    if held_out is not None:
        held_out_batches = SomeBatches(
            instruction_batches(held_out.examples, **rows, seed=None), options.evaluate_batches
        )
    end = end_of_answer(learned.examples, tokenizer)
    tell_of_no_end(options, end)
    if options.preview:
        print(described(options, learned, held_out, len(batches), config))
        print("a preview: no model is trained")
        return show(batches[0], tokenizer)
    options = with_steps(options, len(batches), EPOCHS)

    # The model, computing as the options say and stopping at the end of an answer, and the part of it that trains.
    source = source.replace(generation=source.generation.with_end(end))
    source, learner = learner_of(source, options, options.batch_size)

    schedule, optimizer = optimizer_of(options)
    objective = NextToken(learner.model)
    train_step = train_step_of(options, objective, optimizer)
    eval_step = step.make_eval_step(objective)

    def evaluate(variables):
        return step.evaluate(eval_step, variables, held_out_batches)

    ask = questioner(options, source, validation or training)

    print(
        f"{learner.described}\n{described(options, learned, held_out, len(batches), config)}\n"
        f"{source.model.attention_choice(training=True)}",
        flush=True,
    )
    parts = {"training": learned} | ({} if held_out is None else {"validation": held_out})
    digests = digests_of(parts, numbered) | chat_template_digest(options, tokenizer)
    same(digests, differences)  # of other data processes would take other prompts, and wait for one another
    # A new run: what it starts from. Process 0 decides for all, since every process must answer where one does.
    if options.sample_every != 0 and of_first(lambda: config_of_run(Path(options.out)) is None):
        print(sample_text(0, ask(learner.variables)), flush=True)
    kept = in_style(options, training, tokenizer)
    lengths = [len(example.tokens) for example in learned.examples]
    return engine.run(
        learner.state(optimizer, options.seed),
        train_step,
        batches,
        run_options(options),
        folder=options.out,
        config={"recipe": "train.instruct", **own_options(options, "preview"), **digests},
        may_change=MAY_CHANGE,
        model_config=config,
        tokenizer=TextFiles(kept, source.generation),
        schedule=schedule,
        evaluate=None if held_out is None else evaluate,
        sample=ask,
        flops_per_token=flops_of(options, learner, lengths, learned.learned_tokens / sum(lengths)),
        next_commands=next_commands(options.out, config, training[0].form != "text" and kept.chat_template),
    )


def check(options: Options) -> None:
    """BadInput for options that cannot be, or have no effect, before anything is written or a model is loaded."""
    if options.out is None and not options.preview:
        raise BadInput("missing --out: name a folder for the run, or look at a batch first with --preview")
    train_on(options)
    check_chat_template(options)
    check_what_trains(options)
    check_ranges(options, ("context", lambda tokens: tokens >= 2, "be at least 2"))
    refuse_idle(
        options,
        (
            ("split_seed", options.validation_data, "beside --validation-data"),
            *((name, options.evaluate_every == 0, "with --evaluate-every 0") for name in OF_VALIDATION),
        ),
    )


def train_on(options: Options) -> str | tuple[int, ...]:
    """--train-on in the form that `tokenize_conversations` takes: a name, or numbers of answers."""
    from llmq_jax.data.prompt_templates import TRAIN_ON

    if options.train_on in TRAIN_ON:
        return options.train_on
    try:
        return tuple(int(number) for number in options.train_on.split(","))
    except ValueError:
        raise BadInput(
            f"--train-on is {options.train_on!r} and must be {', '.join(TRAIN_ON)} or numbers of answers, such as 0,2"
        ) from None


def said(conversation: Any) -> str:
    """Equal for conversations that are equal in all that a template writes."""
    return json.dumps([conversation.messages, conversation.given, conversation.input, conversation.variables])


def examples(options: Options, part: list, tokenizer: Any, config: Any, left_out: list | None) -> Any:
    """Tokenised conversations. BadInput for a token outside the model's vocabulary."""
    from llmq_jax.data import check_vocabulary, tokenize_conversations

    result = tokenize_conversations(
        part,
        tokenizer,
        template=options.template,
        context=options.context,
        train_on=train_on(options),
        too_long=options.too_long,
        left_out=left_out,
    )
    for example in result.examples:
        check_vocabulary(example.tokens, config.vocab_size, example.where)
    return result


def numbered(part: Any) -> Any:
    """All that is learned as one array, to take a digest of."""
    import numpy as np

    return np.concatenate([np.stack([example.tokens, example.learned], axis=1) for example in part.examples])


def described(options: Options, learned: Any, held_out: Any, steps_in_an_epoch: int, config: Any) -> str:
    """Lines on how much there is to learn, and how much of it did not fit."""
    kind = f"packed into rows of {options.context} tokens" if options.pack else "one in a row"
    lines = [
        f"{counted(len(learned), 'conversation')} to learn, {0 if held_out is None else len(held_out):,} held out "
        f"(template: {options.template})",
        f"{learned.learned_tokens:,} of {learned.tokens:,} tokens are learned; {kind}, an epoch is "
        f"{counted(steps_in_an_epoch, 'step')}",
    ]
    longer = options.context < config.max_position_embeddings
    advice = "choose a longer --context for all of them" if longer else "--too-long says what becomes of them"
    for name, part in (("to learn", learned), ("held out", held_out)):
        if part is not None and (part.truncated or part.dropped):
            lines.append(
                f"{name}, longer than the context of {options.context} tokens: {part.truncated:,} truncated, "
                f"{part.dropped:,} left out; {advice}"
            )
    return "\n".join(lines)


def show(batch: dict, tokenizer: Any) -> None:
    """Print a batch: learned tokens in colour or, where the output has none, in brackets."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    how = "in colour" if console.is_terminal else "between ⟦ and ⟧"
    console.print(f"a batch of {counted(len(batch['tokens']), 'row')}; what is learned stands {how}")
    for row, (tokens, segments, mask) in enumerate(
        zip(batch["tokens"], batch["segment_ids"], batch["mask"], strict=True), start=1
    ):
        for segment in range(1, segments.max() + 1):
            (places,) = (segments == segment).nonzero()
            learned = [False, *(mask[places[:-1]] > 0)]
            console.print(f"\nrow {row}, conversation {segment}: {sum(learned)} of {len(places)} tokens are learned")
            text = Text()
            for ids, is_learned in runs(tokens[places], learned):
                piece = tokenizer.decode(ids)
                if not console.is_terminal:
                    piece = f"⟦{piece}⟧" if is_learned else piece
                text.append(piece, style="bold green" if is_learned else "")
            console.print(text)


def runs(tokens: Any, learned: list[bool]) -> Iterator[tuple[list[int], bool]]:
    """(tokens, whether they are learned) for each stretch of neighbouring tokens that are treated alike."""
    for fate, group in itertools.groupby(zip(tokens, learned, strict=True), key=lambda pair: bool(pair[1])):
        yield [int(token) for token, _ in group], fate


if __name__ == "__main__":
    run(main)
