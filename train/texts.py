"""The text of a run: which documents are learned, which are held out, as two streams of tokens."""

import hashlib
import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmq_jax.errors import BadInput
from train.options import VALIDATION_FRACTION
from train.sources import Sources, one_split, sources_of

LIBRARY = "Python's standard library"
LIBRARY_FRACTION = 0.04  # 16 modules with 345 kB of Python 3.11's 507


@dataclass(frozen=True)
class Text:
    """Documents that become one stream of tokens; they can be iterated over more than once."""

    documents: Iterable[str]
    count: int
    separated: bool
    """Whether the end-of-text token follows each document."""
    source: str
    """Its name in error messages."""
    chosen: Any = None
    """[count] True for those of `documents` that belong to it; None: all."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents) if self.chosen is None else itertools.compress(self.documents, self.chosen)

    def only(self, chosen: Any) -> "Text":
        return replace(self, chosen=chosen, count=int(chosen.sum()))


class Texts(NamedTuple):
    """The text of a run. Nothing is held out where neither `held_out` nor `fraction_at_end` is given."""

    learned: Text
    held_out: Text | None = None
    fraction_at_end: float = 0.0
    """Where the data are a single text: the part of its tokens, at the end, that is held out."""


@dataclass(frozen=True)
class Streams:
    """Tokens to learn and tokens held out, which are None where nothing is evaluated."""

    training: Any
    validation: Any
    separated: bool
    """Whether documents to learn end with the end-of-text token."""
    sha256: dict[str, str]
    """{stream: its SHA-256}, which tells whether the data has changed when a run resumes."""

    def record(self) -> dict[str, Any]:
        """What the run's config says of them: their lengths and SHA-256."""
        counts = {f"{name}_tokens": len(getattr(self, name)) for name in self.sha256}
        return counts | {f"{name}_sha256": digest for name, digest in self.sha256.items()}


def text_sources(options: Any, *, hold_out: bool, prepared: bool = False) -> Sources:
    """Where the text of a run is; with `prepared` tokens to learn, only the text that is held out."""
    from llmq_jax.data import is_token_folder
    from llmq_jax.data.nanogpt_tokens import is_nanogpt_folder
    from llmq_jax.data.sources import text_files

    def files_of(folder: str) -> list[Path]:
        if is_token_folder(folder):
            raise BadInput(f"{folder} holds tokens where text is read; give the text that they were made of")
        if is_nanogpt_folder(folder):
            raise BadInput(
                f"{folder} holds nanoGPT's tokens where text is read; name its text file, or take the tokens over: "
                f"python -m train.prepare --data {shlex.quote(folder)} --tokenizer gpt2 --out tokens"
            )
        return text_files(folder)

    fraction = options.validation_fraction
    if hold_out and fraction is not None and not 0 < fraction < 1:
        raise BadInput(f"--validation-fraction is {fraction} and must lie between 0 and 1")
    if prepared:
        return Sources(None, one_split(options.validation_data, "validation", files_of))
    return sources_of(options, files_of, hold_out)


def texts(options: Any, sources: Sources, *, hold_out: bool, streamed: bool = False) -> Texts:
    """The text that the options name. `streamed`: it is read again at every iteration, and never all in memory."""
    from llmq_jax.data import are_held_out

    fraction = LIBRARY_FRACTION if options.data is None else VALIDATION_FRACTION
    if hold_out and options.validation_fraction is not None:
        fraction = options.validation_fraction
    if options.data is None:
        whole, held_out = _library(fraction)
    else:
        whole, held_out = _read(sources.training, options.text_field, streamed), None
    if not hold_out:
        return Texts(whole)
    if sources.validation:
        return Texts(whole, _read(sources.validation, options.text_field, streamed))
    if not whole.separated:
        return Texts(whole, fraction_at_end=fraction)
    if held_out is None:
        held_out = are_held_out(whole.count, fraction)
    return Texts(whole.only(~held_out), whole.only(held_out))


def _read(path: Any, text_field: str, streamed: bool = False) -> Text:
    from llmq_jax.data import Documents, read_documents

    documents = Documents(path, text_field)
    # A pipe can be read only once.
    if streamed and all(file.is_file() for file in documents.files):
        return Text(documents, count := documents.count(), count > 1, str(path))
    held = read_documents(path, text_field)
    return Text(held, len(held), len(held) > 1, str(path))


def _library(fraction: float) -> tuple[Text, Any]:
    """(the standard library, which modules are held out)."""
    import numpy as np

    from llmq_jax.data import python_library_documents, split_modules

    modules = python_library_documents()
    held_out = {name for name, _ in split_modules(modules, fraction)[1]}
    sources = [source for _, source in modules]
    chosen = np.array([name in held_out for name, _ in modules])
    return Text(sources, len(sources), len(sources) > 1, LIBRARY), chosen


def token_streams(options: Any, sources: Sources, tokenizer: Any, config: Any, prepared: Any = None) -> Streams:
    """The streams of a run, from its text or from `prepared` tokens (a `TokenFiles`). With --evaluate-every 0 all text
    is learned."""
    from llmq_jax.data import check_vocabulary, encode_documents, split_tokens

    def encode(text: Text) -> Any:
        tokens = encode_documents(tokenizer, text, append_end_of_text=text.separated)
        check_vocabulary(tokens, config.vocab_size, text.source)
        return tokens

    if prepared is not None:
        return _prepared_streams(options, sources, tokenizer, config, prepared, encode)
    text, held_out, fraction_at_end = texts(options, sources, hold_out=options.evaluate_every != 0)
    training, validation = encode(text), None if held_out is None else encode(held_out)
    if fraction_at_end:
        training, validation = split_tokens(training, fraction_at_end)
    sha256 = {"training": array_digest(training)}
    if validation is not None:
        sha256["validation"] = array_digest(validation)
    return Streams(training, validation, text.separated, sha256)


def _prepared_streams(
    options: Any, sources: Sources, tokenizer: Any, config: Any, prepared: Any, encode: Callable[[Text], Any]
) -> Streams:
    prepared.check_tokenizer(tokenizer)
    if prepared.largest_id >= config.vocab_size:
        raise BadInput(
            f"{prepared.folder} holds the token id {prepared.largest_id}, outside the vocabulary of "
            f"{config.vocab_size} tokens: use the model's own tokenizer"
        )
    validation, sha256 = None, {"training": prepared.streams["training"].sha256}
    if sources.validation:
        if prepared.validation is not None:
            raise BadInput(f"{prepared.folder} has tokens held out already; leave --validation-data out")
        validation = encode(_read(sources.validation, options.text_field))
        sha256["validation"] = array_digest(validation)
    elif options.evaluate_every != 0:
        if prepared.validation is None:
            raise BadInput(f"{prepared.folder} has no tokens held out; give --validation-data, or --evaluate-every 0")
        validation, sha256["validation"] = prepared.validation, prepared.streams["validation"].sha256
    return Streams(prepared.training, validation, prepared.facts.separated, sha256)


def array_digest(array: Any) -> str:
    """SHA-256 of the numbers of an array, such as a stream of tokens."""
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def digests_of(parts: dict[str, Any], numbered: Callable[[Any], Any]) -> dict[str, str]:
    """{"training_sha256": SHA-256 of what `numbered` makes of the part "training"}, and so on, for a run's config."""
    return {f"{name}_sha256": array_digest(numbered(part)) for name, part in parts.items()}
