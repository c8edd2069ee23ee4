"""Continue a prompt with any model, or every prompt of a file.

A prompt file whose name ends in .jsonl, or any with --jsonl, holds one JSON object a line, with "prompt" (a text) or
"messages" (a conversation, [{"role": "user", "content": "..."}], for the model's chat template, which also reads fields
"tools" and "chat_template_kwargs"). The same objects come out, one a line, with "completion" (the new text) and
"tokens" (the number of new tokens) added. The first prompt is sampled with the seed, each later one with a seed that is
derived from it. The file that --out names is written at the end. If the command is stopped before, what is done stays
in FILE.partial, and the same command goes on from there.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from llmq_jax.commands.drawing import DrawingOptions, context_of
from llmq_jax.commands.kept_lines import check_out, kept_lines
from llmq_jax.commands.progress import with_progress
from llmq_jax.commands.standard_input import STANDARD_INPUT, first_record, whole_input, without_last_break
from llmq_jax.counts import counted
from llmq_jax.defaults import MTP
from llmq_jax.errors import BadInput, at_place
from llmq_jax.options import Flag, default_is, refuse_idle

NEW_TOKENS = 128
BATCH_SIZE = 8
ADDED = ("completion", "tokens")


@dataclass(frozen=True)
class PromptOptions:
    prompt: Annotated[str | None, default_is("that of --prompt-file")] = None
    """The text to continue; - reads it from standard input, as --prompt-file - does."""
    prompt_file: Annotated[str | None, default_is("none")] = None
    """A file with the text to continue (its final newline is left out), or a .jsonl file of many prompts; - is standard
    input."""
    jsonl: Flag = False
    """Read the prompt file as .jsonl whatever its name, also standard input."""
    chat: Flag = False
    """Take a prompt as a user's message, and have the model reply to it by its chat template."""
    batch_size: Annotated[int | None, default_is(f"{BATCH_SIZE}")] = None
    """Prompts of a .jsonl file that go through the model at a time."""
    out: Annotated[str | None, default_is("standard output")] = None
    """A new file for the results of a .jsonl file. Until all are done, lines are kept in FILE.partial, from which the
    same command goes on."""


@dataclass(frozen=True)
class Options(DrawingOptions, PromptOptions):  # the fields of the last class come first
    max_new_tokens: Annotated[int | None, default_is(f"{NEW_TOKENS}, or what the model's context has room for")] = None
    """Stop after this many tokens, if the text has not ended before."""

    @property
    def source(self) -> str:
        """The prompt file's name in error messages."""
        return STANDARD_INPUT if self.prompt_file == "-" else str(self.prompt_file)


def main(options: Options) -> None:
    if options.jsonl and options.prompt_file is None:
        raise BadInput("--jsonl reads the prompts of --prompt-file: name the file, or - for standard input")
    if (options.prompt is None) == (options.prompt_file is None):
        fault = "there is no prompt" if options.prompt is None else "two prompts were given"
        raise BadInput(f"{fault}: give either --prompt TEXT or --prompt-file FILE")
    options.check()
    from llmq_jax.data.sources import is_jsonl

    if options.jsonl or (options.prompt_file is not None and is_jsonl(options.prompt_file)):
        _continue_file(options)
    else:
        _continue_text(options)


def _continue_text(options: Options) -> None:
    refuse_idle(
        options,
        (
            *((name, True, "without a .jsonl file of prompts") for name in ("batch_size", "out")),
            ("chat_template_kwargs", not options.chat, "without --chat"),
        ),
    )
    options.check_one_row("one prompt")
    text = _text(options)
    with options.on_devices():
        _print_text(options, text)


def _print_text(options: Options, text: str) -> None:
    lm, drawing = options.load()
    if options.chat:
        lm.require_chat_template(options.model)
        tokens = lm.chat_tokens(_said(text))
        prompt, shown = tokens, ""
    else:
        tokens = lm.tokenizer.encode_prompt(text)
        prompt, shown = text, text
    drawing["max_new_tokens"] = _new_tokens(options, context_of(lm, drawing)[0], len(tokens))
    pieces = _stream(options, lm, prompt, len(tokens), drawing)
    start = time.perf_counter()
    print(shown, end="", flush=True)
    drafts = _print_pieces(pieces)
    print(flush=True)
    _tell_end(start, [] if drafts is None else [drafts])


def _print_pieces(pieces: Iterator[str]) -> Any:
    """Print a text as it comes; returns its `Generation.drafts`."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value


def _text(options: Options) -> str:
    from llmq_jax.data.records import read_text

    if options.prompt is not None and options.prompt != "-":
        return options.prompt
    text = whole_input() if "-" in (options.prompt, options.prompt_file) else read_text(options.source)
    if (record := first_record(text)) is not None:  # it may be a prompt all the same, so this is only told
        how = f"--prompt-file {options.prompt_file or options.prompt} --jsonl"
        named = "" if {"prompt", "messages"} & record.keys() else f" with a field prompt (found: {', '.join(record)})"
        print(f"note: these lines of JSON are taken as one prompt; for a prompt each, {how}{named}", file=sys.stderr)
    return without_last_break(text)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _new_tokens(options: Options, context: int, longest: int) -> int:
    """The new tokens of a prompt of this length; an empty one starts from the end-of-text token."""
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    return max(1, min(NEW_TOKENS, context - max(1, longest)))


def _stream(options: Options, lm: Any, prompt: Any, tokens: int, drawing: dict[str, Any]) -> Iterator[str]:
    """The pieces of a text, computed as they are asked for; errors are raised at once. `tokens` is the prompt's number
    of tokens."""
    import llmq_jax as lq

    length, (context, whose) = max(1, tokens), context_of(lm, drawing)
    if length + drawing["max_new_tokens"] > context:
        if options.max_new_tokens is None:
            raise BadInput(
                f"the prompt has {counted(length, 'token')}, which leave no room in the {whose}'s context of {context};"
                " shorten it"
            )
        raise BadInput(
            f"the prompt has {counted(length, 'token')}, which with --max-new-tokens {options.max_new_tokens} exceed "
            f"the {whose}'s context of {context}; shorten it or ask for fewer"
        )
    try:
        return lq.stream(lm, prompt, seed=options.seed_of(0), **drawing)
    except BadInput as error:
        raise BadInput(str(error).replace("prompt 0", "the prompt")) from None


def _tell_end(start: float, drafts: list[Any]) -> None:
    """Tell a terminal the time, and how many of the `drafts` ([rows, 2], as in `Generation`) were accepted."""
    if not sys.stderr.isatty():
        return
    told = f"{time.perf_counter() - start:.1f} s, compilation included"
    drafted, accepted = sum(rows.sum(axis=0) for rows in drafts) if drafts else (0, 0)
    if drafted:
        told += f"; {accepted:,} of {drafted:,} drafted tokens accepted ({accepted / drafted:.0%})"
    print(told, file=sys.stderr)


def _continue_file(options: Options) -> None:
    """Everything is checked before anything is generated."""
    size = BATCH_SIZE if options.batch_size is None else options.batch_size
    if size < 1:
        raise BadInput(f"--batch-size {size} must be at least 1")
    if options.out is not None:
        check_out(Path(options.out))
    numbers, records = _read_records(options)
    by_template = options.chat or any("messages" in record for record in records)
    refuse_idle(options, [("chat_template_kwargs", not by_template, "on texts without --chat")])
    if options.chat and not any("prompt" in record for record in records):
        raise BadInput(f"--chat has no effect on {options.source}, where all are messages already; leave it out")
    with options.on_devices(size):
        _print_records(options, numbers, records, size)


def _print_records(options: Options, numbers: list[int], records: list[dict[str, Any]], size: int) -> None:
    lm, drawing = options.load()
    prompts = _prompts(options, lm, numbers, records)
    lengths = [len(prompt) for prompt in prompts]
    context, whose = context_of(lm, drawing)
    drawing["max_new_tokens"] = _new_tokens(options, context, max(lengths))
    _stream(options, lm, [0], 1, drawing)  # computes nothing, and checks: here the options, then each prompt
    for number, prompt in zip(numbers, prompts, strict=True):
        with at_place(f"{options.source}: line {number}"):
            _stream(options, lm, prompt, len(prompt), drawing)
    if (count := drawing["max_new_tokens"]) < _new_tokens(options, context, min(lengths)):
        longest = max(lengths)
        number = numbers[lengths.index(longest)]
        print(
            f"note: {options.source}: line {number} has {counted(longest, 'token')} and leaves "
            f"room for {count} new ones in the {whose}'s context of {context}, which are all that any prompt gets; "
            f"shorten it, or say so by --max-new-tokens {count}",
            file=sys.stderr,
        )

    start = time.perf_counter()
    drafts: list[Any] = []
    size = min(size, options.rows_of(len(prompts)))
    with _kept_lines(options, records, prompts, lm, drawing) as kept:
        begin = 0 if kept is None else len(kept.lines)
        batches = range(begin, len(prompts), size)
        for first in batches if kept is None else with_progress(batches, "generating"):
            lines, of_batch = _batch(options, lm, records, prompts, range(first, first + size), drawing)
            drafts += of_batch
            if kept is None:
                print(*lines, sep="\n", flush=True)
            else:
                kept.add(lines)
    _tell_end(start, drafts)


def _prompts(options: Options, lm: Any, numbers: list[int], records: list[dict[str, Any]]) -> list[Any]:
    """The token ids of each record's prompt."""
    from llmq_jax.data.conversations import LOST
    from llmq_jax.data.messages import refuse_lost, template_variables
    from llmq_jax.data.records import Record

    prompts = []
    for number, record in zip(numbers, records, strict=True):
        where = f"{options.source}: line {number}"
        if not _by_template(options, record):
            refuse_lost(record, ("tools", "chat_template_kwargs", "system"), where, "without --chat")
            with at_place(where):
                prompts.append(lm.tokenizer.encode_prompt(record["prompt"]))
            continue
        variables = template_variables(Record(where, record))
        refuse_lost(record, LOST["prompt" if "prompt" in record else "messages"], where)
        with at_place(where):
            messages = record["messages"] if "messages" in record else _said(record["prompt"])
            prompts.append(lm.chat_tokens(messages, **variables))
    return prompts


def _by_template(options: Options, record: dict[str, Any]) -> bool:
    """Whether the chat template writes the prompt."""
    return options.chat or "messages" in record


def _batch(
    options: Options, lm: Any, records: list[dict[str, Any]], prompts: list[Any], rows: range, drawing: dict[str, Any]
) -> tuple[list[str], list[Any]]:
    """The lines of these rows, and their `Generation.drafts`, where there is a draft."""
    import llmq_jax as lq

    # The last batch is filled up with its last prompt: another shape would be compiled anew.
    filled = [min(row, len(prompts) - 1) for row in rows]
    seeds = [options.seed_of(row) for row in filled]
    # A text is given as a text, so that the new tokens are decoded as its continuation.
    given = [prompts[row] if _by_template(options, records[row]) else records[row]["prompt"] for row in filled]
    generation = lq.generate(lm, given, seed=seeds, **drawing)
    assert generation.text is not None
    lines = []
    for i, record in enumerate(records[rows.start : rows.stop]):
        added = {"completion": generation.text[i], "tokens": int(generation.lengths[i])}
        lines.append(json.dumps({**record, **added}, ensure_ascii=False))
    return lines, [] if generation.drafts is None else [generation.drafts[: len(lines)]]


def _kept_lines(
    options: Options, records: list[dict[str, Any]], prompts: list[Any], lm: Any, drawing: dict[str, Any]
) -> contextlib.AbstractContextManager[Any]:
    """The `KeptLines` of --out; None where lines are printed."""
    if options.out is None:
        return contextlib.nullcontext()
    from llmq_jax.weight_digest import weight_digest

    command = asdict(options)
    for name in ("out", "jsonl", "batch_size", "device", "mesh"):  # they do not change a line
        del command[name]
    # What a name stands for may change (a run that trains on), and so may an option's default.
    del command["dtype"]  # weights of another type have another digest
    models = {"model": lm} | ({} if options.draft in (None, MTP) else {"draft": drawing["draft"]})
    for name, model in models.items():
        command[name] = [repr(model.config), repr(model.generation), weight_digest(model.variables)]
    command["max_new_tokens"] = drawing["max_new_tokens"]
    tokens = [[int(token) for token in prompt] for prompt in prompts]
    command["prompt_file"] = hashlib.sha256(json.dumps([records, tokens]).encode()).hexdigest()
    return kept_lines(Path(options.out), command, records)


def _read_records(options: Options) -> tuple[list[int], list[dict[str, Any]]]:
    """(line numbers, objects) of a .jsonl file of prompts."""
    from llmq_jax.data.records import checked_text

    numbers, records = [], []
    for number, record in _json_lines(options):
        if fault := _fault(record):
            raise BadInput(f"{options.source}: line {number} {fault}")
        checked_text(json.dumps(record, ensure_ascii=False), f"{options.source}: line {number}")
        numbers.append(number)
        records.append(record)
    if not records:
        raise BadInput(f"{options.source} holds no prompts; write one JSON object a line")
    return numbers, records


def _json_lines(options: Options) -> Iterator[tuple[int, Any]]:
    from llmq_jax.data.records import decoded_lines, json_lines, json_values

    if options.prompt_file != "-":
        return json_lines(options.source)
    return json_values(decoded_lines(sys.stdin.buffer, STANDARD_INPUT), STANDARD_INPUT)


def _fault(record: Any) -> str | None:
    """What is wrong with a line of a .jsonl file of prompts."""
    if not isinstance(record, dict):
        return 'must be an object with "prompt" or "messages"'
    if "prompt" in record and "messages" in record:
        return 'has both "prompt" and "messages"; keep one of them'
    if "prompt" not in record and "messages" not in record:
        names = ", ".join(map(repr, record)) or "none"
        return f'has neither "prompt" nor "messages" (fields found: {names})'
    if not isinstance(record.get("prompt", ""), str):
        return 'has a "prompt" that is not a string'
    if taken := [name for name in ADDED if name in record]:
        return f'has a field "{taken[0]}" already, which the result would replace; rename it'
    return None
