"""Tokenise text once and keep the tokens on disk, for text that takes too long to tokenise at every start of a run.

    python -m train.prepare --data text/ --tokenizer gpt2 --out tokens
    python -m train.pretrain --data tokens --preset gpt2-124m --out runs/mine

The text is streamed: one block of it is in memory at a time, and all cores tokenise it. It is read three times: to
count the documents, to tokenise those that are learned, and to tokenise those that are held out. A run maps the tokens
into memory and has the same batches as from the text itself; processes on several machines may read the same folder.

    python -m train.prepare --data nanoGPT/data/openwebtext --tokenizer gpt2 --out openwebtext

Tokens that nanoGPT has made, train.bin and val.bin, are taken over unchanged.
"""

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from llmq_jax.command_line import run
from llmq_jax.errors import BadInput
from llmq_jax.options import default_is, refuse_idle
from train.options import VALIDATION_FRACTION, filled
from train.texts import Text, text_sources, texts


@dataclass(frozen=True)
class Options:
    data: str
    """Text: a text file; .json, .jsonl, .csv, .tsv or .parquet with a text field; or a folder of these, whose file
    names may tell the splits (train.jsonl, validation.jsonl). Or a folder with nanoGPT's tokens, train.bin and
    val.bin."""
    tokenizer: str
    """bytes, gpt2, a tokenizer.json, a folder, run or GGUF file with one, or org/name of a model on the hub.
    To train a pretrained model further, take its own."""
    out: str
    """A new folder for the tokens; it appears complete or not at all."""
    text_field: Annotated[str | None, default_is("text")] = None
    """Field or column of --data that holds the text."""
    validation_data: Annotated[str | None, default_is("the validation files of --data, or a part of it")] = None
    """Text to hold out for validation, all of it."""
    validation_fraction: Annotated[float | None, default_is(f"{VALIDATION_FRACTION}")] = None
    """Part of the data held out for validation: whole documents, or the end of a single text; 0 holds out nothing."""


def main(options: Options) -> None:
    from llmq_jax.commands.progress import with_progress
    from llmq_jax.data import encode_documents, encoded_blocks, has_fields, load_tokenizer, split_tokens
    from llmq_jax.data.nanogpt_tokens import is_nanogpt_folder
    from llmq_jax.data.token_files import check_new

    check_new(options.out)
    if is_nanogpt_folder(options.data):
        of_nanogpt(options)
        return
    files = [path for path in (options.data, options.validation_data) if path]
    refuse_idle(
        options,
        (
            ("text_field", not any(map(has_fields, files)), "on data without fields"),
            ("validation_fraction", options.validation_data, "beside --validation-data"),
        ),
    )
    options = filled(options, text_field="text")
    hold_out = options.validation_fraction != 0
    sources = text_sources(options, hold_out=hold_out)
    tokenizer = load_tokenizer(options.tokenizer)
    print(f"reading {options.data}", flush=True)
    text, held_out, fraction_at_end = texts(options, sources, hold_out=hold_out, streamed=True)

    def blocks(text: Text, title: str) -> Iterator[Any]:
        return encoded_blocks(
            tokenizer, with_progress(text, title, total=text.count), append_end_of_text=text.separated
        )

    training, validation = blocks(text, "text to learn"), None
    if fraction_at_end:  # a single text, which was read whole
        whole = encode_documents(tokenizer, text, append_end_of_text=False)
        training, validation = ([part] for part in split_tokens(whole, fraction_at_end))
    elif held_out is not None:
        validation = blocks(held_out, "text held out")
    sample = next((document for document in text if document and not document.isspace()), None)
    if sample is None:
        raise BadInput(f"{options.data} holds no text to learn, beside what is held out")
    write(options, tokenizer, training, validation, text.separated, sample, f"; documents to learn: {text.count:,}")


def of_nanogpt(options: Options) -> None:
    """Take over the tokens of a folder of nanoGPT's, with the tokenizer that made them."""
    from llmq_jax.commands.progress import with_progress
    from llmq_jax.data import load_tokenizer, split_tokens
    from llmq_jax.data.nanogpt_tokens import PIECE, TRAINING, VALIDATION, pieces, read_nanogpt_tokens

    found = read_nanogpt_tokens(options.data)
    refuse_idle(
        options,
        (
            ("text_field", True, f"on nanoGPT's {TRAINING}"),
            ("validation_data", True, f"on nanoGPT's {TRAINING}"),
            ("validation_fraction", found.validation is not None, f"beside {found.folder / VALIDATION}"),
        ),
    )
    tokenizer = load_tokenizer(options.tokenizer)
    sample = found.text_of_beginning(tokenizer)
    training, validation = found.training, found.validation
    fraction = VALIDATION_FRACTION if options.validation_fraction is None else options.validation_fraction
    if validation is None and fraction:
        training, validation = split_tokens(training, fraction)

    def checked(stream: Any, title: str) -> Iterator[Any]:
        for piece in with_progress(pieces(stream), title, total=-(-len(stream) // PIECE)):
            if piece.max() >= tokenizer.vocab_size:
                raise BadInput(f"{found.folder}: the token id {piece.max()} is none of {tokenizer.name}'s")
            yield piece

    held_out = None if validation is None else checked(validation, "tokens held out")
    write(options, tokenizer, checked(training, "tokens to learn"), held_out, found.separated(tokenizer), sample)


def write(
    options: Options, tokenizer: Any, training: Any, validation: Any, separated: bool, sample: str, more: str = ""
) -> None:
    """Write the folder, and print what it holds."""
    from llmq_jax.data import write_tokens

    about = {"options": dataclasses.asdict(options)}
    made = write_tokens(options.out, tokenizer, training, validation, separated=separated, sample=sample, about=about)
    idle = " --evaluate-every 0" if made.validation is None else ""
    print(
        f"{len(made.training):,} tokens to learn, {0 if made.validation is None else len(made.validation):,} held out "
        f"(tokenizer: {tokenizer.name}{more})\n\n"
        f"    python -m train.pretrain --data {shlex.quote(options.out)} --out runs/mine{idle}"
    )


if __name__ == "__main__":
    run(main)
