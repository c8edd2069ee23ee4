"""Measure the perplexity of any model on any text, or its results on tasks of the evaluation harness.

    llmq evaluate runs/mine other.txt
    llmq evaluate gpt2 --tasks hellaswag,arc_easy --limit 100                      pip install -e '.[eval]'
    llmq evaluate runs/mine --tasks my_task --include-path my_tasks --out results.json

A text is read once, in consecutive windows of the model's context; every token but the first is predicted, from the
tokens before it in its window. Several documents in a file are joined by the end-of-text token. A folder counts as one
text; if it has several splits (train.jsonl beside test.jsonl), --split chooses one. Bits per byte are the bits of all
predicted tokens, divided by the bytes of the text.

Tasks are those of lm_eval (lm-evaluation-harness), which reads, prompts and scores them.
"""

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.commands.devices import DeviceOptions
from llmq_jax.commands.kept_lines import check_out
from llmq_jax.commands.progress import with_progress
from llmq_jax.commands.standard_input import text_of_input
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, Positional, default_is, refuse_idle, require_at_least

LONGEST = 2048
OF_TEXTS = ("text_field", "split")
OF_TASKS = ("limit", "num_fewshot", "include_path", "chat", "out")
"""Options that texts have no use for."""


@dataclass(frozen=True)
class EvaluationOptions:
    model: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, a hub id, or a GGUF file."""
    file: Annotated[Positional[str | None], default_is("none")] = None
    """The text: a text file, .json, .jsonl, .csv, .tsv or .parquet with a text field, or a folder of these;
    - is a text on standard input."""
    split: Annotated[Literal["train", "validation", "test"] | None, default_is("all files, which are of one")] = None
    """The split to read, in a folder whose file names tell several."""
    text_field: Annotated[str | None, default_is("text")] = None
    """Field or column that holds the text."""
    tasks: Annotated[str | None, default_is("none")] = None
    """Instead of a text: tasks or groups of the evaluation harness, separated by commas."""
    limit: Annotated[int | None, default_is("all")] = None
    """Number of questions of each task, taken from its beginning."""
    num_fewshot: Annotated[int | None, default_is("the task's own")] = None
    """Number of answered questions (shots) before each question."""
    include_path: Annotated[str | None, default_is("none")] = None
    """A folder with task files of your own, which may run Python."""
    chat: Flag = False
    """Write the tasks' questions by the model's chat template."""
    out: Annotated[str | None, default_is("none")] = None
    """A new .json file for all results of the harness."""
    context: Annotated[int | None, default_is(f"the model's; of a text at most {LONGEST}")] = None
    """Tokens that the model reads at a time; for a text, those in a window."""
    batch_size: int = 8
    """Windows or questions that go through the model at a time; it does not change the result."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, default_is("that of the file")] = None
    """Type to compute in and to hold the weights in."""
    json: Flag = False
    """Print the result as one line of JSON."""


@dataclass(frozen=True)
class Options(DeviceOptions, EvaluationOptions):  # the fields of the last class come first
    pass


def main(options: Options) -> None:
    if (options.file is None) == (options.tasks is None):
        raise BadInput("give a text, as llmq evaluate MODEL FILE, or tasks, as --tasks hellaswag,arc_easy, one of them")
    if options.tasks is not None:
        evaluate_tasks(options)
    else:
        evaluate_text(options)


def evaluate_text(options: Options) -> None:
    from llmq_jax.data import has_fields, read_documents

    assert options.file is not None
    refuse_idle(options, ((name, True, "on a text, only on --tasks") for name in OF_TASKS))
    no_fields = not has_fields(options.file), f"on {options.file}, which has no fields"
    refuse_idle(options, [("text_field", *no_fields)])
    if options.file == "-":
        refuse_idle(options, [("split", True, "on standard input, which is one text")])
        documents = [text_of_input("the name of a {} file")]
    else:
        documents = read_documents(one_text(options.file, options.split), options.text_field or "text")
    with options.on_devices(options.batch_size):
        result = figures(options, documents)
    print(json.dumps(result) if options.json else _table(result))


def one_text(path: str, split: str | None) -> Any:
    """What to read at a path: in a folder with several splits, the files of the one that is named. BadInput for a split
    that is not there, and where none is named, since a loss over several splits is that of none."""
    from llmq_jax.data.folders import FolderFiles
    from llmq_jax.data.sources import text_files
    from llmq_jax.data.split_names import files_by_split

    folder = Path(path)
    files = text_files(folder) if folder.is_dir() else []
    parts = files_by_split(folder, files)
    if split is not None and not parts:
        raise BadInput(f"--split has no effect on {path}, which is no folder of several splits; leave it out")
    if not folder.is_dir():
        return path
    if not parts:
        return FolderFiles(folder, tuple(files))
    if split not in parts:
        names = ", ".join(str(part.files[0].relative_to(folder)) for part in parts.values())
        fault = "files of several splits" if split is None else f"no {split} files, but others"
        raise BadInput(f"{path} holds {fault} ({names}): choose by --split {' or --split '.join(parts)}")
    return parts[split]


def figures(options: Options, documents: list[str]) -> dict[str, Any]:
    """The figures that are printed for a text."""
    from llmq_jax.data import check_vocabulary, encode_documents, evaluation_batches
    from llmq_jax.objectives import NextToken
    from llmq_jax.training.step import evaluate, make_eval_step

    lm = options.load_model(options.model, options.dtype)
    lm.require_language_model(options.model)
    tokenizer = lm.require_tokenizer(options.model)
    limit = lm.config.max_position_embeddings
    context = min(limit, LONGEST) if options.context is None else options.context
    if context > limit:
        raise BadInput(f"--context {context} exceeds the model's context; choose at most {limit}")
    tokens = encode_documents(tokenizer, documents, append_end_of_text=len(documents) > 1)
    check_vocabulary(tokens, lm.config.vocab_size, str(options.file))
    # A tokenizer may have a token that only begins texts. No model predicts it after an end of text: documents are then
    # kept apart.
    begun = len(documents) > 1 and bool(tokenizer.beginning) and tokenizer.beginning != (tokenizer.end_of_text,)
    batches = evaluation_batches(
        tokens,
        context=context,
        batch_size=options.batch_size,
        end_of_text=tokenizer.end_of_text,
        separate_documents=begun,
    )
    loss = evaluate(make_eval_step(NextToken(lm.model)), lm.variables, with_progress(batches, "evaluating"))["loss"]

    predicted = sum(int(batch["mask"].sum()) for batch in batches)
    size = sum(len(document.encode()) for document in documents)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss * predicted / size / math.log(2),
        "tokens": predicted,
        "bytes": size,
        "context": context,
    }


def evaluate_tasks(options: Options) -> None:
    check_tasks(options)
    with options.on_devices(options.batch_size):
        results = results_of_tasks(options)
    from llmq_jax.atomic_files import write_atomically
    from llmq_jax.interop.evaluation_harness import results_json, results_table

    try:
        if options.out is not None:
            write_atomically(Path(options.out), results_json(results, indent=2).encode() + b"\n")
    finally:  # what took hours is not lost where the file cannot be written
        print(results_json(results["results"]) if options.json else results_table(results))


def results_of_tasks(options: Options) -> dict[str, Any]:
    """All results of the harness, as it returns them."""
    from llmq_jax.interop.evaluation_harness import HarnessModel, load_tasks, run_tasks

    assert options.tasks is not None
    # Most of its warnings are about how a task's authors wrote its file.
    logging.getLogger("lm_eval").setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "ERROR"))
    names = [name.strip() for name in options.tasks.split(",")]
    tasks, manager = load_tasks(names, options.include_path)
    model = HarnessModel(options.model, batch_size=options.batch_size, dtype=options.dtype)
    options.check_model(model.lm)
    if options.context is not None:
        if not 0 < options.context <= model.max_length:
            raise BadInput(
                f"--context {options.context} must lie between 1 and the model's context, {model.max_length}"
            )
        model.max_length = options.context
    if options.chat:
        model.lm.require_chat_template(options.model)
    return run_tasks(
        model, tasks, manager, num_fewshot=options.num_fewshot, limit=options.limit, apply_chat_template=options.chat
    )


def check_tasks(options: Options) -> None:
    """BadInput for options that cannot be, before the harness is imported, which takes seconds."""
    refuse_idle(options, ((name, True, "on --tasks, only on a text") for name in OF_TEXTS))
    require_at_least(options, limit=1, num_fewshot=0, batch_size=1)
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise BadInput(f"--include-path {options.include_path}: there is no such folder; name one with task files")
    if options.out is not None:
        if not options.out.endswith(".json"):
            raise BadInput(f"--out {options.out}: is written as JSON; give it a name ending in .json")
        check_out(Path(options.out))


def _table(result: dict[str, Any]) -> str:
    return "\n".join(
        (
            f"loss           {result['loss']:.4f} nats per token",
            f"perplexity     {result['perplexity']:.4g} per token",
            f"bits per byte  {result['bits_per_byte']:.4f}",
            f"tokens         {result['tokens']:,} predicted, in windows of {result['context']:,}",
            f"bytes          {result['bytes']:,}",
        )
    )
