"""Any model as a model of the Language Model Evaluation Harness (lm_eval), for its tasks, prompts and metrics.

    import lm_eval
    from llmq_jax.interop.evaluation_harness import HarnessModel

    results = lm_eval.simple_evaluate(HarnessModel("gpt2"), tasks=["hellaswag"])

Published figures mostly come from the harness's own backend for transformers (`HFLM`). Whatever affects the figures is
done as there: where a text is cut into context and continuation, which token stands before a text without a context,
what is left out of a text that is too long, where an answer ends.
"""

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.data.batching import pad
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.length_buckets import by_length, padded_rows, power_of_two
from llmq_jax.data.tokenizer_files import TokenizerFiles
from llmq_jax.errors import BadInput, PythonAdvice, close_names
from llmq_jax.generation import Sampler, generate, row_seed
from llmq_jax.host_copies import to_host
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.axes import axis_sizes, replicated, row_devices
from llmq_jax.model_files import load
from llmq_jax.models import parameter_count
from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.logprobs import greedy_logprobs
from llmq_jax.weight_type import weight_type

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
    from tqdm import tqdm
except ImportError as error:
    raise BadInput(
        f"the evaluation harness is not installed, or too old ({error}); pip install -e '.[eval]'"
    ) from error

# The most tokens of an answer, unless a task says otherwise.
ANSWER_TOKENS = 256
# transformers' default.
TOP_K = 50
# Arguments of transformers' generation that tasks give, with the values that change nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}
# The marker that transformers uses: chat templates get to see it.
END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A language model, or the name of one as `lq.load` takes it, for `lm_eval.simple_evaluate`.

    `batch_size` texts of similar length go through the model at a time. `max_length` is how many tokens it reads, by
    default as many as it can; `dtype`, for a name, that of `lq.load`. Where a task draws its answers, the request at
    place i draws from `row_seed(seed, i)`. It computes on the mesh that is set (`jax.set_mesh`), if one is.
    """

    def __init__(
        self,
        model: LanguageModel | str | os.PathLike[str],
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        dtype: Any = None,
        seed: int = 0,
    ):
        super().__init__()
        loaded = model if isinstance(model, LanguageModel) else None
        if loaded is not None and dtype is not None:
            raise BadInput(f"dtype={dtype!r} has no effect on a model that is loaded; give it to lq.load")
        self.source = str(model) if loaded is None else "this model"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PythonAdvice)  # on a penalty on repetition, which is applied here
            self.lm = load(self.source, dtype=dtype) if loaded is None else loaded
        self.lm.require_language_model(self.source)
        self.tokenizer = self.lm.require_tokenizer(self.source)
        longest = self.lm.config.max_position_embeddings
        self.max_length = longest if max_length is None else max_length
        if not 0 < self.max_length <= longest:
            raise BadInput(f"max_length={max_length} must lie between 1 and the model's context of {longest}")
        if batch_size < 1:
            raise BadInput(f"batch_size={batch_size} must be at least 1")
        self.batch_size = batch_size
        self.seed = seed
        files = TokenizerFiles(self.tokenizer.files(), self.source)
        beginning = files.token_id(files.named_tokens().get("bos_token"))
        self._prefix = self.tokenizer.end_of_text if beginning is None else beginning
        self._prefix_text = None if self._prefix is None else self.tokenizer.decode([self._prefix])

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context: the beginning or, without one, the end of text."""
        if self._prefix is None:
            raise BadInput(
                f"{self.source} has a tokenizer with neither bos_token nor eos_token, so nothing can stand before a "
                "text without a context; name one in its tokenizer_config.json"
            )
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a text. As in transformers, special tokens that it spells out become tokens, and those of the
        tokenizer's template are added, unless the text begins with the beginning token already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._prefix_text)
        ids = self.tokenizer.encode(string, allow_special=True, add_special_tokens=add_special_tokens)
        vocab_size = self.lm.config.vocab_size
        if ids and max(ids) >= vocab_size:
            raise BadInput(
                f"{self.source}: its tokenizer gives token id {max(ids)}, outside the model's vocabulary of "
                f"{vocab_size}; use the model's own tokenizer"
            )
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy one) of each continuation; requests are (texts, tokens of the
        context, tokens of the continuation). A request that is too long loses the beginning of its context. Requests
        that differ in their last token alone, such as answers of one letter, go through the model once."""
        rows, counts = [], []
        together: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise BadInput(
                    f"a continuation has {len(continuation)} tokens, and the model takes 1 to {self.max_length}; leave "
                    "this task out, or give the model a longer context"
                )
            # Spaces alone are no context either: the harness counts them to the continuation.
            context = context or [self.prefix_token_id]
            row = (context + continuation)[-(self.max_length + 1) :]
            rows.append(row)
            counts.append(len(continuation))
            together.setdefault(tuple(row[:-1]), []).append(place)
        inputs = list(together)
        answers: list[Any] = [None] * len(requests)
        for numbers, size in self._batches(inputs, "log-likelihoods", disable_tqdm):
            batch = padded_rows(inputs, numbers, size, self.max_length)
            owners = [(row, place) for row, number in enumerate(numbers) for place in together[inputs[number]]]
            more = size * power_of_two(-(-len(owners) // size)) - len(owners)  # few numbers of rows, few programs
            targets, _ = pad([rows[place][1:] for _, place in owners] + [()] * more, batch["tokens"].shape[1])
            of_targets = [(row, counts[place]) for row, place in owners] + [(0, 0)] * more
            arrays = batch["tokens"], batch["lengths"], targets, *np.array(of_targets, np.int32).T
            logprobs, greedy = to_host(_continuations(self.lm.model, self.lm.variables, *arrays))
            for number, (_, place) in enumerate(owners):
                answers[place] = float(logprobs[number]), bool(greedy[number])
                if (texts := requests[place][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[place])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows of `max_length` tokens that predict every token once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to the first stop string; requests with equal arguments share batches."""
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        answers = [""] * len(requests)
        for places in alike.values():
            contexts = [requests[place].args[0] for place in places]
            arguments = requests[places[0]].args[1]
            for number, answer in self._answers(contexts, places, arguments, disable_tqdm):
                answers[places[number]] = answer
                self.cache_hook.add_partial("generate_until", (contexts[number], arguments), answer)
        return answers

    def _answers(
        self, contexts: Sequence[str], places: Sequence[int], arguments: dict[str, Any], disable_tqdm: bool
    ) -> Iterator[tuple[int, str]]:
        """(number of the context, its answer)."""
        given = dict(normalize_gen_kwargs(arguments, ANSWER_TOKENS))
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        until, count = handle_stop_sequences(given.pop("until"), eos=end), given.pop("max_gen_toks")
        sampler = _sampler(given, self.lm.generation)
        room = self.max_length - count
        if room < 1:
            raise BadInput(
                f"a task asks for answers of {count} tokens, which leave nothing for the question in the model's "
                f"{self.max_length}; leave it out, or set a smaller max_gen_toks"
            )
        rows = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts]
        stop = self._stop(until)
        for numbers, size in self._batches(rows, "answers", disable_tqdm):
            filled = numbers + numbers[-1:] * (size - len(numbers))  # a batch of fewer rows would compile anew
            generation = generate(
                self.lm,
                [rows[number] for number in filled],
                max_new_tokens=count,
                sampler=sampler,
                stop=stop,
                seed=[row_seed(self.seed, places[number]) for number in filled],
            )
            for row, number in enumerate(numbers):
                tokens = generation.tokens[row, : generation.lengths[row]]
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                yield number, postprocess_generated_text(text, until, None)

    def _stop(self, until: Sequence[str]) -> list[int | str]:
        """Where generation ends: the model's end tokens, and the strings."""
        return [*self.lm.generation.eos_token_id, *(string for string in dict.fromkeys(until) if string)]

    def _batches(
        self, rows: Sequence[Sequence[int]], title: str, disable_tqdm: bool
    ) -> Iterator[tuple[list[int], int]]:
        """(indices of rows of similar length, the number of rows to fill up to), the longest rows first: if memory runs
        out, it does so at once.

        The progress bar is shown on a terminal."""
        devices = row_devices(sizes) if (sizes := axis_sizes()) else 1
        size = min(self.batch_size, -(-max(1, len(rows)) // devices) * devices)
        with tqdm(total=len(rows), desc=title, disable=disable_tqdm or None) as bar:
            for places in reversed(by_length([len(row) for row in rows], size)):
                yield places, size
                bar.update(len(places))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text, up to where the answer begins, or where the last message may be continued. If the template
        refuses them, they are written without system messages."""
        template = self.lm.require_chat_template(self.source)
        try:
            return _conversation(template, chat_history, add_generation_prompt)
        except BadInput:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return _conversation(template, without, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness keeps with its results."""
        return self.lm.require_chat_template(self.source).source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness's cache of requests tells models apart."""
        return f"{self.source}-{self.tokenizer.name}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """The facts about the model that the harness writes into its results."""
        count, dtype = parameter_count(self.lm.params), str(weight_type(self.lm.params))
        return {"model": self.source, "model_num_parameters": count, "model_dtype": dtype}


def load_tasks(
    names: Sequence[str], include_path: str | os.PathLike[str] | None = None
) -> tuple[list[Any], TaskManager]:
    """(tasks and groups of the harness, the manager that found them): what `simple_evaluate` takes. BadInput for tasks
    that the harness does not have or cannot load.

    `include_path` is a folder with a user's own task files, which may contain code. A task that runs code written by
    the model is refused.
    """
    manager = _task_manager(names, include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = close_names(name, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them all"
            raise BadInput(f"the evaluation harness has no task {name!r}: {hint}")
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load(name)
        except Exception as error:  # task files and data sets can raise anything
            raise BadInput(f"task {name} cannot be loaded: {type(error).__name__}: {error}") from error
        for task_name, task in found["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise BadInput(f"task {task_name} runs programs that the model writes; use lm_eval's own command")
            if getattr(task, "MULTIMODAL", False):
                raise BadInput(f"task {task_name} shows images, which the model does not see; leave it out")
        group = found.get("groups", {}).get(name)
        loaded += list(found["tasks"].values()) if group is None else [group]
    return loaded, manager


def _task_manager(names: Sequence[str], include_path: str | os.PathLike[str] | None) -> TaskManager:
    """Reading the harness's own thousands of tasks takes seconds: it is skipped where all are the user's own."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def run_tasks(model: HarnessModel, tasks: Sequence[Any], manager: TaskManager, **options: Any) -> dict[str, Any]:
    """The results of `simple_evaluate`, without a record of every question; its messages go to stderr."""
    # It would fork processes to compute standard errors, which may hang beside JAX's threads; the results are the same.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr):
        results: dict[str, Any] = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            batch_size=model.batch_size,
            log_samples=False,
            **options,
        )
    return results


def results_table(results: dict[str, Any]) -> str:
    """The harness's own tables: of tasks, then of groups."""
    tables = [make_table(results, column) for column in ("results", "groups") if column in results]
    return "\n\n".join(table.rstrip() for table in tables)


def results_json(results: dict[str, Any], indent: int | None = None) -> str:
    """The results in JSON as the harness writes them; it can represent functions too."""
    return json.dumps(results, indent=indent, default=handle_non_serializable, ensure_ascii=False)


@functools.partial(jax.jit, static_argnums=0)
def _continuations(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    targets: Int[Array, "N T"],
    rows: Int[Array, " N"],
    counts: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """(log-probability, whether every token is the likeliest) of the last `counts[n]` targets of each continuation n,
    whose inputs are row `rows[n]` of `tokens`."""
    places, ends = jnp.arange(tokens.shape[1]), lengths[rows][:, None]
    scored = (places < ends) & (places >= ends - counts[:, None])
    logprobs, greedy = greedy_logprobs(model, variables, tokens, lengths, rows, targets, scored)
    return replicated(logprobs.sum(axis=1)), replicated((greedy | ~scored).all(axis=1))


def _sampler(given: dict[str, Any], generation: GenerationConfig) -> Sampler:
    """The sampler that transformers would use, given these arguments and the model's `generation_config.json`."""
    drawn, temperature = given.pop("do_sample"), float(given.pop("temperature", 0.0))
    filters: dict[str, Any] = {"top_k": TOP_K, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    for values in (generation.other, given):
        filters |= {name: values[name] for name in filters if values.get(name) is not None}
    for name, value in given.items():
        if name not in filters and NEUTRAL.get(name) != value:
            raise BadInput(
                f"a task's generation_kwargs have {name}={value!r}, which is not supported; known are until, "
                "max_gen_toks, do_sample, temperature, top_k, top_p, min_p and repetition_penalty"
            )
    if not drawn or not temperature:
        return Sampler(0.0, repetition_penalty=filters["repetition_penalty"])
    return Sampler(temperature, **filters)


def _conversation(template: ChatTemplate, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Messages as text. Without `add_generation_prompt` the last message is left open, as in transformers."""
    if add_generation_prompt:
        return template.render(messages)
    *before, last = messages
    marked = {**last, "content": last["content"] + END_OF_MESSAGE}
    text = template.render([*before, marked], add_generation_prompt=False)
    end = text.rfind(END_OF_MESSAGE.strip())
    if end < 0:
        raise BadInput("the chat template leaves out the last message, which the task wants to go on")
    kept = text.startswith(END_OF_MESSAGE, end)
    return text[:end] if kept else text[:end].rstrip()
