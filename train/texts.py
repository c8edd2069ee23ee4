"""The text of a run: which documents are learned, which are held out, as two streams of tokens."""

import hashlib
from typing import Any

from llmq_jax.errors import BadInput

LIBRARY_FRACTION = 0.04  # 16 modules with 345 kB of Python 3.11's 507


def token_streams(options: Any, tokenizer: Any, config: Any) -> tuple[Any, Any]:
    """(training, validation) tokens; the documents of each joined by the end-of-text token. Where nothing is ever
    evaluated all is learned, and validation is None."""
    from llmq_jax.data import (
        check_vocabulary,
        encode_documents,
        python_library_documents,
        read_documents,
        split_documents,
        split_modules,
        split_tokens,
    )

    text = options.data or "Python's standard library"

    def encode(documents, several, where=text):
        tokens = encode_documents(tokenizer, documents, append_end_of_text=several)
        check_vocabulary(tokens, config.vocab_size, where)
        return tokens

    if options.data is None:
        modules = python_library_documents()
        documents = [source for _, source in modules]
    else:
        documents = read_documents(options.data, options.text_field)
    several = len(documents) > 1
    if options.evaluate_every == 0:
        return encode(documents, several), None
    fraction = LIBRARY_FRACTION if options.data is None else 0.1
    if options.validation_fraction is not None:
        fraction = options.validation_fraction
        if not 0 < fraction < 1:
            raise BadInput(f"--validation-fraction is {fraction} and must lie between 0 and 1")
    if options.validation_data:
        held_out = read_documents(options.validation_data, options.text_field)
        return encode(documents, several), encode(held_out, len(held_out) > 1, options.validation_data)
    if not several:  # the end of the text is held out
        return split_tokens(encode(documents, several), fraction)
    if options.data is None:  # whole modules and packages are
        parts = split_modules(modules, fraction)
        parts = [[source for _, source in part] for part in parts]
    else:  # whole documents are
        parts = split_documents(documents, fraction)
    return tuple(encode(part, several) for part in parts)


def fingerprint(tokens: Any) -> str:
    """SHA-256 of a stream of tokens: what tells a run's data from data that has changed since."""
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
