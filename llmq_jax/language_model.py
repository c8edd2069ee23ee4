"""LanguageModel: config, model, variables and tokenizer together."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from llmq_jax.counts import counted
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.length_buckets import by_length, padded_rows
from llmq_jax.data.messages import refuse_answered
from llmq_jax.data.prompt_templates import refuse_left_out
from llmq_jax.data.records import is_blank
from llmq_jax.data.tokenizer_files import WRITE_JSON
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput
from llmq_jax.field_types import is_consumed, require_model, require_variables, whole
from llmq_jax.generation.generate import generate
from llmq_jax.generation.prompt_cache import PromptCache
from llmq_jax.generation.sampling import Sampler, takes_sampler
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.layers.axes import axis_sizes, replicated, target_platform
from llmq_jax.layers.expert_dispatch import LONGEST_PROMPT_APART, apart_pays
from llmq_jax.layers.experts_apart import by_expert
from llmq_jax.layers.linear import by_output, rounded
from llmq_jax.layers.lora import (
    LORA,
    LORA_FIXED,
    TIED,
    WHOLE,
    adapters,
    measured,
    spread,
    trained_numbers,
    without_adapters,
)
from llmq_jax.models import abstract_variables, build, override, parameter_count
from llmq_jax.models.decoder import Decoder, default_positions, of_a_script, slice_modules
from llmq_jax.models.deepseek3 import modules_ahead
from llmq_jax.models.heads import SCORE, shown
from llmq_jax.weight_type import weight_type

Integers = ArrayLike | Sequence[Any]


# Two tokenizers that agree on it are taken for the same.
PROBE = "The quick brown fox jumps over 13 lazy dogs.\n\tÀ bientôt, 東京!"


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A model and all that it takes to use it. Immutable: `lm.replace(variables=...)` gives another one."""

    config: Any
    model: Decoder
    variables: dict[str, Any]
    """Linen's variables: a dict of collections, "params" among them."""
    tokenizer: Tokenizer | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """The tokens that end, begin and pad a text. By default there are none, whatever the tokenizer: a model that is put
    together by hand ends its texts where GenerationConfig(eos_token_id=tokenizer.end_of_text) says so, or `stop`."""

    def __post_init__(self) -> None:
        if self.variables != {}:  # a recipe takes them over, and keeps the rest
            require_variables(self.variables)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, a tree of arrays by module: the collection that trains."""
        params: dict[str, Any] = self.variables["params"]
        return params

    def sliced(self, batch: int) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
        """(variables outside the layers, variables of each layer): what decoding reads, in the layout for this batch.

        Kept until another layout is asked for: it is as large as the model's layers, which `variables` keep stacked.
        """
        backend = target_platform()
        # On a mesh, joined kernels would be divided at other rows than apart.
        joined = not axis_sizes() and (backend == "cpu" or (backend == "gpu" and batch == 1))
        apart = not axis_sizes() and self._experts_apart(batch)
        unknown = of_a_script(self.model, *self.model.unbound_blocks().values())
        dtype = None if unknown else self.model.dtype
        if (joined, apart) not in self._sliced:

            def arrange(variables: dict[str, Any]) -> dict[str, Any]:
                if dtype is not None:
                    variables = rounded(variables, dtype, self.config.tie_word_embeddings)
                variables = by_output(variables) if joined else variables
                return by_expert(variables) if apart else variables

            self._sliced.clear()
            self._sliced[joined, apart] = self.model.slice_layers(self.variables, arrange)
        return self._sliced[joined, apart]

    def read_from(self, batch: int, tokens: int) -> tuple[dict[str, Any], tuple[dict[str, Any], ...] | None]:
        """(variables outside the layers, variables of each layer) that read prompts of so many tokens in all, before
        decoding of this batch; or (all variables, None).

        On a CPU a loop over stacked layers copies the weights of each out of the stack, which for short prompts takes
        longer than the products. With experts that lie apart, longer prompts are read from the stack.
        """
        if axis_sizes() or target_platform() != "cpu":
            return self.variables, None
        if self._experts_apart(batch) and tokens > LONGEST_PROMPT_APART:
            return self.variables, None
        return self.sliced(batch)

    def _experts_apart(self, batch: int) -> bool:
        """Whether decoding of this batch wants each expert's matrices as arrays of their own."""
        experts = self.model.experts
        return experts is not None and apart_pays(experts.dispatch, experts.num_experts, batch)

    @functools.cached_property
    def sliced_ahead(self) -> tuple[dict[str, Any], ...]:
        """Variables of each module of multi-token prediction: what drafting by them reads."""
        paths = self.model.all_layer_paths()[len(self.model.layer_paths()) :]
        return slice_modules(spread(self.variables), paths, measured)

    @functools.cached_property
    def _sliced(self) -> dict[tuple[bool, bool], tuple[dict[str, Any], tuple[dict[str, Any], ...]]]:
        return {}

    def require_tokenizer(self, source: str) -> Tokenizer:
        """The tokenizer; BadInput, which names the model's source, where there is none."""
        if self.tokenizer is None:
            raise BadInput(
                f"{source} holds no tokenizer, so text means nothing to it; put its tokenizer.json there, or "
                f"{WRITE_JSON}"
            )
        return self.tokenizer

    def require_same_vocabulary(self, other: "LanguageModel", name: str) -> None:
        """BadInput, which calls the other model by `name`, where its token ids mean something else than this one's."""
        theirs, ours = other.config.vocab_size, self.config.vocab_size
        if theirs != ours:
            raise BadInput(f"{name} has a vocabulary of {theirs} ids and the model one of {ours}; take one of the same")
        if other.tokenizer is None or self.tokenizer is None:
            return
        if other.tokenizer.encode(PROBE) != self.tokenizer.encode(PROBE):
            raise BadInput(f"{name}'s tokenizer gives other ids than the model's; take one of the same tokenizer")

    def require_chat_template(self, source: str, advice: str = "use generate with a plain prompt") -> ChatTemplate:
        """The tokenizer's chat template, likewise. `advice` is what to do without one."""
        template = self.require_tokenizer(source).chat_template
        if template is None:
            raise BadInput(f"{source} has no chat template, so it cannot converse; {advice}")
        return template

    def require_labels(self, source: str) -> tuple[str, ...]:
        """The names of a classifier's classes; BadInput for a language model."""
        labels: tuple[str, ...] | None = self.config.labels
        if labels is None:
            raise BadInput(
                f"{source} is a language model, which knows no classes; give it a head by lq.with_classifier(lm, "
                "labels), and train it: python -m train.classifier"
            )
        return labels

    def require_language_model(self, source: str) -> None:
        """BadInput for a classifier."""
        if self.config.labels is not None:
            raise BadInput(
                f"{source} is a classifier ({shown(self.config.labels)}) and gives no token; use llmq classify (in "
                "Python: lm.classify)"
            )

    def require_no_adapters(self, source: str) -> None:
        """BadInput for a model with adapters."""
        if LORA in self.variables:
            raise BadInput(
                f"{source} has adapters, beside which the weights do not train; merge them first: "
                f"python -m convert.to_hf {source} FOLDER"
            )

    @takes_sampler
    def chat(
        self,
        messages: Sequence[Any],
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        stop: Sequence[Any] | SupportsIndex | str | None = None,
        seed: int = 0,
        tools: Sequence[Any] | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> str:
        """The reply to messages, each {"role": "system", "user" or "assistant", "content": text}; calls of tools, and
        what these gave back, as data/messages.py has them. A call in the reply is text, as the template spells it.

        tools: those that the model may call, each an object that describes one by JSON Schema. The other arguments are
        those of `generate`; without `max_new_tokens` the reply has up to 256, or what the context has room for.
        BadInput: an unknown role, the model has no chat template, the template refuses the messages, leaves one out or
        has no place for the tools, the last message is the assistant's, or they and the new tokens exceed the model's
        context.
        """
        tokens = self.chat_tokens(messages, tools)
        if max_new_tokens is None:
            context = self.config.max_position_embeddings
            if len(tokens) >= context:
                raise BadInput(
                    f"the messages have {counted(len(tokens), 'token')}, which leave no room in the model's context of "
                    f"{context}; leave out the first of them"
                )
            max_new_tokens = min(256, context - len(tokens))
        options: dict[str, Any] = {"sampler": sampler, "stop": stop, "seed": seed, "prompt_cache": prompt_cache}
        reply = generate(self, [tokens], max_new_tokens=max_new_tokens, **options)
        assert reply.text is not None
        return reply.text[0]

    def chat_tokens(self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **variables: Any) -> list[int]:
        """Messages, the tools that may be called, and what else the model's chat template reads, as it writes them, up
        to where the reply begins.

        Special tokens that a message spells out become tokens, as in transformers.
        """
        template = self.require_chat_template("this model")
        variables |= {} if tools is None else {"tools": tools}
        text = template.render(messages, add_generation_prompt=True, **variables)
        refuse_left_out(messages, variables, template, text)
        refuse_answered(messages, "the conversation")
        return self.require_tokenizer("this model").encode(text, allow_special=True)

    def replace(self, **changes: Any) -> "LanguageModel":
        """The same with some fields changed; a new config brings its own model unless one is given. A field that does
        not exist is a TypeError. BadInput: a weight of the new config that is not there, or is of another shape;
        `with_config` makes such a model."""
        if "config" in changes and "model" not in changes:
            before = self.model  # another config may be that of another class of models
            how = {name: getattr(before, name) for name in ("dtype", "remat", "scan_layers", "attention")}
            changes["model"] = build(changes["config"], **how).clone(frozen_layers=before.frozen_layers)
            differing = differing_weight(changes.get("variables", self.variables), changes["config"], others=True)
            if differing is not None:
                raise BadInput(f"{differing}; lq.with_config(lm, config) takes over what fits")
        return dataclasses.replace(self, **changes)

    def logits(
        self,
        tokens: Integers,
        lengths: Integers | None = None,
        positions: Integers | None = None,
        segment_ids: Integers | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits in float32 for tokens [B, T]; compiled once for each shape.

        `lengths` [B] says how many tokens of each row are real, the rest being padding on the right. Padding elsewhere
        and packed documents are marked by `segment_ids` [B, T]: 0 is padding, documents are numbered 1, 2, ...
        `positions` [B, T] default to 0, 1, ... in each segment. Inputs are checked on the host, so this cannot be
        called under jit: transformations take `lm.model.apply`. BadInput: an id outside the vocabulary, a row too long.
        """
        self.require_language_model("this model")
        inputs = self._inputs(tokens, lengths, positions, segment_ids)
        logits: Array = _apply(self.model, self.variables, *inputs, None)
        return logits

    def hidden(
        self,
        tokens: Integers,
        lengths: Integers | None = None,
        positions: Integers | None = None,
        segment_ids: Integers | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states [B, T, D] after the final norm, in the type that the model computes in; arguments and errors as
        in `logits`."""
        inputs = self._inputs(tokens, lengths, positions, segment_ids)
        hidden: Array = _apply(self.model, self.variables, *inputs, "hidden")
        return hidden

    def mtp_logits(
        self,
        tokens: Integers,
        lengths: Integers | None = None,
        positions: Integers | None = None,
        segment_ids: Integers | None = None,
    ) -> tuple[Float[Array, "B _ V"], ...]:
        """Logits of the modules of multi-token prediction: those of the k-th, k = 1, 2, ..., are [B, T - k, V] in
        float32, and at position i predict token i + k + 1 (DeepSeek-V3, arXiv:2412.19437, section 2.2). Arguments as in
        `logits`, which is k = 0. BadInput: as there, a model without modules, or rows too short for them."""
        self.require_language_model("this model")
        depth = modules_ahead(self.config)
        if not depth:
            raise BadInput(
                f"this {self.config.model_type} has no modules of multi-token prediction; logits predicts "
                "the next token"
            )
        inputs = self._inputs(tokens, lengths, positions, segment_ids)
        if inputs[0].shape[1] <= depth:
            modules = f"{counted(depth, 'module')} of multi-token prediction"
            width = counted(inputs[0].shape[1], "token")
            raise BadInput(f"a row of {width} is too short for {modules}; give {depth + 1} or more")
        logits: tuple[Array, ...] = _apply(self.model, self.variables, *inputs, "mtp_logits")
        return logits

    def classify(
        self,
        tokens: Integers | str | Sequence[str],
        lengths: Integers | None = None,
        positions: Integers | None = None,
        segment_ids: Integers | None = None,
    ) -> Float[Array, "B C"] | Float[np.ndarray, "B C"]:
        """Logits [B, C] of a classifier's C classes for each row, in float32, at the row's last real token, wherever
        its padding is. Arguments as in `logits`, or one text or several, which `class_tokens` and `classify_rows` then
        take. BadInput: as there, a language model, no text or an empty one, several documents in a row."""
        self.require_labels("this model")
        if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "UO":
            tokens = tokens.tolist()
        if isinstance(tokens, str):
            tokens = [tokens]
        if isinstance(tokens, Sequence) and not tokens:
            raise BadInput("there is nothing to classify: give one text or row of tokens, or more")
        if isinstance(tokens, Sequence) and any(isinstance(text, str) for text in tokens):
            if not (lengths is None and positions is None and segment_ids is None):
                raise BadInput("lengths, positions and segment_ids are those of token ids; give texts alone")
            return self.classify_rows(self.class_tokens(tokens)[0])
        ids, places, segments = self._inputs(tokens, lengths, positions, segment_ids)
        if segments is not None:
            for number, row in enumerate(segments):
                documents = len(np.unique(row[row != 0]))
                if documents != 1:
                    what = f"holds {documents} documents" if documents else "is empty"
                    raise BadInput(f"row {number} {what}; a classifier takes one text a row")
        logits: Array = _apply(self.model, self.variables, ids, places, segments, "classify")
        return logits

    def class_tokens(self, texts: Sequence[Any], longest: int | None = None) -> tuple[list[list[int]], int]:
        """(token ids of texts for a classifier, how many were cut to `longest` tokens). The ids include the tokens that
        the tokenizer's own template adds, as in transformers with the exported model. Those are never cut off, only the
        end of the text itself.

        Special tokens that a text spells out stay text; transformers would make them tokens. BadInput: a text that is
        empty or no string, or a model without a tokenizer.
        """
        tokenizer = self.require_tokenizer("this model")
        rows, cut = [], 0
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise BadInput(f"text {number} must be a string, not {type(text).__name__}")
            if is_blank(text):
                raise BadInput(f"text {number} is empty; there is nothing to classify")
            row = tokenizer.encode(text, add_special_tokens=True)
            if longest is not None and len(row) > longest:
                row = _shortened(row, tokenizer.encode(text), longest)
                cut += 1
            rows.append(row)
        return rows, cut

    def classify_rows(
        self,
        rows: Sequence[Sequence[int]],
        batch_size: int = 16,
        watch: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
    ) -> Float[np.ndarray, "B C"]:
        """`classify` for any number of rows of any length, `batch_size` of similar length at a time. The batches do not
        change the results.

        `watch` is given the batches, as lists of row indices, and yields them again: it may show the progress.
        BadInput: a model that is no classifier, a row that is empty or longer than the context, a batch size below 1.
        """
        labels, longest = self.require_labels("this model"), self.config.max_position_embeddings
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size} and must be at least 1")
        for number, row in enumerate(rows):
            if not 0 < len(row) <= longest:
                raise BadInput(f"text {number} has {len(row)} tokens, and the model takes 1 to {longest}; cut it")
        logits = np.zeros((len(rows), len(labels)), np.float32)
        batch_size = min(batch_size, max(1, len(rows)))
        for places in watch(by_length([len(row) for row in rows], batch_size)):
            batch = padded_rows(rows, places, batch_size, longest)
            inputs = self._inputs(batch["tokens"], batch["lengths"], None, None)
            logits[places] = _apply(self.model, self.variables, *inputs, "classify")[: len(places)]
        return logits

    def _inputs(
        self, tokens: Integers, lengths: Integers | None, positions: Integers | None, segment_ids: Integers | None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        require_model(self)
        tokens = _integers("tokens", tokens, 2)
        vocab_size, longest = self.config.vocab_size, self.config.max_position_embeddings
        outside = np.argwhere((tokens < 0) | (tokens >= vocab_size))
        if len(outside):
            row, column = outside[0]
            raise BadInput(
                f"tokens[{row}, {column}] is {tokens[row, column]}, outside the vocabulary of {vocab_size} ids; "
                "encode text by this model's tokenizer"
            )
        if lengths is not None:
            if segment_ids is not None:
                raise BadInput("lengths and segment_ids both say what is padding; give one of them")
            lengths = _integers("lengths", lengths, 1, (len(tokens),))
            if lengths.min() < 0 or lengths.max() > tokens.shape[1]:
                raise BadInput(f"lengths must lie between 0 and {tokens.shape[1]}, the number of tokens in a row")
            segment_ids = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
        elif segment_ids is not None:
            segment_ids = _integers("segment_ids", segment_ids, 2, tokens.shape)
        if positions is None:
            segments = None if segment_ids is None else jnp.asarray(segment_ids)
            used = np.asarray(default_positions(jnp.asarray(tokens), segments))
        else:
            used = positions = _integers("positions", positions, 2, tokens.shape)
            _check_order(positions, np.ones_like(tokens) if segment_ids is None else segment_ids)
        if used.min() < 0 or used.max() >= longest:
            # Embeddings clamp an index that is too large, in silence.
            raise BadInput(
                f"position {used.max()} is outside the model's {longest} (max_position_embeddings); they begin at 0"
            )
        return tokens, positions, segment_ids

    def __repr__(self) -> str:
        count, dtype = parameter_count(self.params), weight_type(self.params)
        tokenizer = "no tokenizer" if self.tokenizer is None else f"tokenizer {self.tokenizer.name}"
        adapters, gone = "", ", weights gone in training" if is_consumed(self.variables) else ""
        if LORA in self.variables and not gone:
            adapters = f", adapters of {trained_numbers(self.variables):,}"
        return f"LanguageModel({self.config.model_type}, {count:,} parameters in {dtype}{adapters}, {tokenizer}{gone})"


def _shortened(row: list[int], content: list[int], longest: int) -> list[int]:
    """A row of at most `longest` tokens: its content is cut, and the tokens that a template put around it stay."""
    added = len(row) - len(content)
    if added >= longest:
        room = counted(longest, "token")
        raise BadInput(f"a text of at most {room} has no room beside the {added} that the tokenizer adds; take more")
    start = next(place for place in range(added + 1) if row[place : place + len(content)] == content)
    return [*row[:start], *content[: longest - added], *row[start + len(content) :]]


def with_classifier(lm: LanguageModel, labels: Sequence[str], seed: int = 0) -> LanguageModel:
    """The model with a fresh classifier head for these classes in place of its own head and its modules of multi-token
    prediction; all else stays. One label gives a scalar head, as reward models have.

    The head's kernel [D, C] is drawn by the seed, normal with the config's `initializer_range` as its standard
    deviation. BadInput: there are no labels, or they are not different, non-empty strings.
    """
    require_model(lm)
    if not isinstance(labels, Iterable):
        raise BadInput(f'labels={labels!r} must be the names of the classes, as ("ham", "spam")')
    config = override(lm.config, labels=labels if isinstance(labels, str) else tuple(labels))
    expected = abstract_variables(config)["params"]
    variables = {
        collection: {name: leaf for name, leaf in tree.items() if name in (*expected, TIED, WHOLE) and name != SCORE}
        for collection, tree in lm.variables.items()
    }
    if own := variables.get(LORA_FIXED, {}).get(WHOLE):  # a head that came with the adapters goes, too
        variables[LORA_FIXED][WHOLE] = {name: mark for name, mark in own.items() if name in expected}
    if not adapters(spread(variables)):  # those of the old head were all; empty collections would count as adapters
        variables = without_adapters(variables)
    kernel = expected[SCORE]["kernel"]
    fresh = config.initializer_range * jax.random.normal(
        jax.random.key(whole(seed, "seed")), kernel.shape, kernel.dtype
    )
    variables["params"][SCORE] = {"kernel": fresh.astype(weight_type(lm.params))}
    return lm.replace(config=config, variables=variables)


def differing_weight(variables: dict[str, Any], config: Any, others: bool = False) -> str | None:
    """How the first weight that does not fit a config differs; None where all fit. With `others`, weights that the
    config does not have are accepted."""
    pair = abstract_variables(config), without_adapters(variables)
    expected, found = (flatten_dict(tree, sep="/") for tree in pair)
    for name in sorted(expected.keys() | (set() if others else found.keys())):
        ours, theirs = (list(tree[name].shape) if name in tree else "absent" for tree in (expected, found))
        if ours != theirs:
            return f"{name} is {theirs}, and {ours} by the config that was given"
    return None


@functools.partial(jax.jit, static_argnums=(0, 5))
def _apply(
    model: Decoder, variables: dict[str, Any], tokens: Any, positions: Any, segment_ids: Any, method: str | None
) -> Any:
    output = model.apply(variables, tokens, positions, segment_ids, method=method)
    return replicated(output) if method == "classify" else output  # small, so that every process has all of it


def _integers(name: str, values: Integers, rank: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Integers [B, T] or [B] as int32; BadInput for what has another type, rank or shape."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise BadInput(f"{name} are rows of unequal length; pad them and say so in lengths") from error
    if array.dtype.kind == "U":
        raise BadInput(f"{name} must be integers, not text; lm.tokenizer.encode(text) gives the ids of a row")
    axes = "[B, T]" if rank == 2 else "[B]"
    if array.ndim != rank or array.size == 0:
        raise BadInput(f"{name} must be {axes} and not empty, but have the shape {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadInput(f"{name} must be integers, not {array.dtype}")
    if shape is not None and array.shape != shape:
        raise BadInput(f"{name} have the shape {list(array.shape)}, which does not fit tokens: {list(shape)}")
    limits = np.iinfo(np.int32)
    for value in (array.min(), array.max()):
        if not limits.min <= value <= limits.max:  # it would become another number in silence
            raise BadInput(
                f"{name} hold {value}, which is no id, length or position of any model; take out such numbers"
            )
    return array.astype(np.int32)


def _check_order(positions: np.ndarray, segment_ids: np.ndarray) -> None:
    """BadInput for positions that decrease within a document: attention skips the keys after a query in its row, so
    these must not be before it by position."""
    together = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    falls = np.argwhere(together & (np.diff(positions, axis=1) < 0))
    if len(falls):
        row, column = falls[0]
        raise BadInput(
            f"positions[{row}, {column + 1}] is {positions[row, column + 1]}, after {positions[row, column]} in the "
            "same document; give tokens in order, and number the documents of a row in segment_ids"
        )
