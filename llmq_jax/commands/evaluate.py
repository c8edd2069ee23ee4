"""Measure the perplexity of any model on any text.

The text goes by once, in consecutive windows of the model's context; every token but the first is predicted, from what
stands before it in its window. The documents of a file with several of them are joined by the end-of-text token.
Bits per byte are those of all predicted tokens, over all bytes of the text.
"""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from llmq_jax.command_line import Flag, Positional, default_is, use_device
from llmq_jax.commands.progress import with_progress
from llmq_jax.errors import BadInput

LONGEST = 2048


@dataclass(frozen=True)
class Options:
    model: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, a hub id, or a GGUF file."""
    file: Positional[str]
    """The text: a text file, .json, .jsonl, .csv, .tsv or .parquet with a text field, or a folder of these."""
    text_field: Annotated[str | None, default_is("text")] = None
    """Field or column that holds the text."""
    context: Annotated[int | None, default_is(f"the model's, at most {LONGEST}")] = None
    """Tokens in a window."""
    batch_size: int = 8
    """Windows that go through the model at a time; it does not change the result."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the file")] = None
    """Type to compute in and to hold the weights in."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""
    json: Flag = False
    """Print the result as one line of JSON."""


def main(options: Options) -> None:
    from llmq_jax.data import check_vocabulary, encode_documents, evaluation_batches, has_fields, read_documents

    if options.text_field is not None and not has_fields(options.file):
        raise BadInput(f"--text-field has no effect on {options.file}, which has no fields; leave it out")
    documents = read_documents(options.file, options.text_field or "text")
    use_device(options.device)
    import llmq_jax as lq
    from llmq_jax.objectives import NextToken
    from llmq_jax.training.step import evaluate, make_eval_step

    lm = lq.load(options.model, dtype=options.dtype)
    lm.require_language_model(options.model)
    tokenizer = lm.require_tokenizer(options.model)
    limit = lm.config.max_position_embeddings
    context = min(limit, LONGEST) if options.context is None else options.context
    if context > limit:
        raise BadInput(f"--context {context} exceeds the model's context; choose at most {limit}")
    tokens = encode_documents(tokenizer, documents, append_end_of_text=len(documents) > 1)
    check_vocabulary(tokens, lm.config.vocab_size, options.file)
    batches = evaluation_batches(tokens, context=context, batch_size=options.batch_size)
    loss = evaluate(make_eval_step(NextToken(lm.model)), lm.variables, with_progress(batches, "evaluating"))["loss"]

    predicted = len(tokens) - 1
    size = sum(len(document.encode()) for document in documents)
    result = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss * predicted / size / math.log(2),
        "tokens": predicted,
        "bytes": size,
        "context": context,
    }
    print(json.dumps(result) if options.json else _table(result))


def _table(result: dict) -> str:
    return "\n".join(
        (
            f"loss           {result['loss']:.4f} nats per token",
            f"perplexity     {result['perplexity']:.4g} per token",
            f"bits per byte  {result['bits_per_byte']:.4f}",
            f"tokens         {result['tokens']:,} predicted, in windows of {result['context']:,}",
            f"bytes          {result['bytes']:,}",
        )
    )
