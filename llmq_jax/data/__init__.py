"""Text to batches: tokenizers, readers of files, splits, windows over a stream of tokens, padding and packing."""

from llmq_jax.data.batching import multi_token_rows, pack, packed_rows, pad
from llmq_jax.data.python_library import python_library_documents, split_modules
from llmq_jax.data.sources import has_fields, iterate_documents, read_documents
from llmq_jax.data.splits import split_documents, split_tokens
from llmq_jax.data.text_stream import TextStream
from llmq_jax.data.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    encode_documents,
    load_tokenizer,
    tokenizer_in,
)
from llmq_jax.data.windows import (
    Batch,
    EvaluationBatches,
    TrainingBatches,
    check_vocabulary,
    evaluation_batches,
    training_batches,
)

__all__ = [
    "Batch",
    "ByteTokenizer",
    "EvaluationBatches",
    "FileTokenizer",
    "GPT2Tokenizer",
    "TextStream",
    "Tokenizer",
    "TrainingBatches",
    "check_vocabulary",
    "encode_documents",
    "evaluation_batches",
    "has_fields",
    "iterate_documents",
    "load_tokenizer",
    "multi_token_rows",
    "pack",
    "packed_rows",
    "pad",
    "python_library_documents",
    "read_documents",
    "split_documents",
    "split_modules",
    "split_tokens",
    "tokenizer_in",
    "training_batches",
]
