"""Documents as one stream of tokens, the form that pretraining reads."""

from collections.abc import Iterable, Iterator

import numpy as np

from llmq_jax.data.long_documents import in_blocks
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str], *, append_end_of_text: bool = True) -> np.ndarray:
    """All documents as one stream of tokens `[N]`, uint16 or uint32: the tokenizer's `beginning` (often empty) before
    each, the end-of-text token after it.

    Documents may come from a generator: only a block of them is held at a time. append_end_of_text=False leaves out the
    end-of-text tokens (for one single text).
    """
    # A bytearray grows in place, so the stream is never held twice.
    stream = bytearray()
    for piece in encoded_blocks(tokenizer, documents, append_end_of_text=append_end_of_text):
        stream += piece.tobytes()
    return np.frombuffer(stream, tokenizer.dtype)


def encoded_blocks(
    tokenizer: Tokenizer, documents: Iterable[str], *, append_end_of_text: bool = True
) -> Iterator[np.ndarray]:
    """The stream of `encode_documents` in pieces `[n]`, each of about BLOCK_CHARACTERS of text. BadInput: the
    tokenizer has no end-of-text token to append, or `documents` is one text, whose characters would be documents."""
    if not hasattr(tokenizer, "encode_arrays"):
        raise BadInput(f"{tokenizer!r:.60} is no tokenizer; give one, as lq.load_tokenizer returns it, or lm.tokenizer")
    if isinstance(documents, str):
        raise BadInput("documents must be a list of texts, not one text: write [text]")
    if append_end_of_text and tokenizer.end_of_text is None:
        raise BadInput(
            f"tokenizer {tokenizer.name} has no end-of-text token to separate documents with: name one as eos_token in "
            "tokenizer_config.json, beside its tokenizer.json, or train it with a special token <|endoftext|>"
        )
    end = np.array([tokenizer.end_of_text] if append_end_of_text else [], tokenizer.dtype)
    start = np.array(tokenizer.beginning, tokenizer.dtype)
    # A token that both begins and ends texts stands once between them.
    between = start[:0] if np.array_equal(start, end) else start
    begun = False
    for block in in_blocks(documents):
        pieces = []
        for ids in tokenizer.encode_arrays(block):
            pieces += [between if begun else start, ids.astype(tokenizer.dtype, copy=False), end]
            begun = True
        yield np.concatenate(pieces)
