"""The skeleton that all decoders share: embed, run the layers, final norm, unembed, thread the caches.

An architecture derives from `Decoder` and says what its embedding and head are and which blocks it has. Three terms:

- A block is the module of one layer, called as `block(x, context, cache) -> (x, cache, counts)`, with a method
  `create_cache`. `counts` are sums that the block reports to the training step: {"router": a RouterReport} with
  experts, an empty dict without.
- A pattern is one block or several in a row: in GPT-2 one, in Gemma 3 five local ones and a global one.
- A group is a pattern that repeats (`layer_groups.py`). Its parameters are stacked over the repetitions, on a leading
  axis, and it is run by `nn.scan`, so that the time to compile does not grow with depth. A layer's path says where its
  parameters are: layer 7 of Gemma 3, counted from 0, is `block_1` of `group_0` in repetition 1.

Decoding slices the layers once and runs them one after another (`decode`), which is up to 1.8 times as fast as scanning
inside the decoding loop.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from llmq_jax.errors import BadInput
from llmq_jax.field_types import refuse_consumed
from llmq_jax.layers.attention import Choice, Context, check_implementation, choose
from llmq_jax.layers.axes import constrain, target_platform
from llmq_jax.layers.embedding import Embedding
from llmq_jax.layers.linear import Linear, each_own_kernel
from llmq_jax.layers.lora import LORA, LORA_FIXED, measured, merge, spread
from llmq_jax.layers.moe import Experts
from llmq_jax.layers.norms import EmbeddingScale
from llmq_jax.layers.positions import Rope
from llmq_jax.layers.recomputation import POLICIES
from llmq_jax.models.heads import LM_HEAD, SCORE, last_hidden, shown
from llmq_jax.models.layer_groups import LayerGroup
from llmq_jax.weight_type import weight_type

# Ids, positions or segment ids, from the host or the device.
Tokens = Int[Array, "B T"] | Int[np.ndarray, "B T"]

PARAMS = "params"
"""The collection of trained parameters, as Linen calls it."""
SHAPES_ALONE = "shapes_alone"
"""A key of this name tells `init` that only the shapes of its variables are asked for."""


class Output(struct.PyTreeNode):
    """The result of a pass through the layers."""

    hidden: Float[Array, "B T D"]
    """Hidden states after the final norm."""
    before_norm: Float[Array, "B T stream"]
    """The residual stream before the final norm; a custom model may make it wider than D."""
    caches: Any = None
    """By group, then by block of its pattern: the caches of all repetitions, stacked. None if none were given."""
    counts: Any = None
    """By group, then by block of its pattern: the block's counts, stacked over repetitions."""


class Pattern(nn.Module):
    """One repetition of a group: its blocks, one after another."""

    blocks: tuple[Callable[..., nn.Module], ...]

    @nn.compact
    def __call__(self, x: Array, caches: Any, context: Context) -> tuple[Array, tuple[Any, dict[str, Any]]]:
        new_caches, counts = {}, {}
        for i, make in enumerate(self.blocks):
            name = f"block_{i}"
            cache = None if caches is None else caches[name]
            x, new_caches[name], counts[name] = make(name=name)(x, context, cache)
            x = constrain(x, "batch")
        return x, (None if caches is None else new_caches, counts)


class Decoder(nn.Module):
    """A decoder-only language model, or a classifier made of one. Pure: `model.apply(variables, tokens) -> logits`.

    Dropout acts when, and only when, a "dropout" key is passed in `rngs`.
    """

    config: Any
    dtype: Dtype | None = None
    """Type to compute in; None computes in the parameters' own type. Norms and softmax always run in float32."""
    remat: str = "none"
    """What the backward pass recomputes: "none" (elementwise operations alone), "dots" (all but products with weights)
    or "full"."""
    scan_layers: bool = True
    """Run a group's layers as a compiled loop; False writes them out (longer to compile, at times faster)."""
    attention: str = "auto"
    """How self-attention is computed: "plain", "masked", "blocked", "fused", or "auto", which suits the backend."""
    frozen_layers: int = 0
    """How many of the lowest layers are frozen. A group that this cuts runs as two: see `training.parts`."""

    @nn.nowrap
    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """flax's `apply`; TinyLoRA's shared v is first repeated at each matrix (`lora.spread`). BadInput for variables
        that a training step has consumed."""
        refuse_consumed(variables)
        return super().apply(spread(dict(variables)), *args, **kwargs)

    # What an architecture provides.

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Its layers from the first to the last, in groups of a repeating pattern."""
        raise NotImplementedError

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The input of the first layer."""
        return self.scale_embedded(self.token_embedding(tokens))

    @nn.nowrap
    def context(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Context:
        """Positions, segments and rotations of the tokens, the same for all layers."""
        return Context(positions, segment_ids)

    @property
    def experts(self) -> Experts | None:
        """The experts of the layers that have them: those of the config's `experts` or, in architectures whose other
        fields describe some, `usual_experts`."""
        given: Experts | None = self.config.experts
        return getattr(self.config, "usual_experts", None) if given is None else given

    @property
    def rotates_by_length(self) -> bool:
        """Whether the rotation of a token depends on the length of its document (RoPE scaled by it)."""
        ropes = (getattr(self.config, name, None) for name in ("rope_parameters", "local_rope_parameters"))
        return any(isinstance(rope, Rope) and rope.depends_on_length for rope in ropes)

    # The pass.

    def forward(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        segment_ids: Tokens | None = None,
        caches: Any = None,
        *,
        lengths: Int[Array, " B"] | Int[np.ndarray, " B"] | None = None,
    ) -> Output:
        """One pass. Positions default to 0, 1, ... in each segment. BadInput: there is no token,
        or lengths and segment ids.

        `lengths`, in place of `segment_ids`, are those of rows with one document each, padded on the right: the fused
        kernel then needs no mask.
        """
        tokens, segment_ids = jnp.asarray(tokens), None if segment_ids is None else jnp.asarray(segment_ids)
        if tokens.size == 0:
            raise BadInput(f"tokens of the shape {tokens.shape} are none; give one row or more, of one token or more")
        if lengths is not None:
            if segment_ids is not None:
                raise BadInput("lengths and segment_ids both say what is padding; give one of them")
            segment_ids = segments_of(lengths, tokens.shape[1])
        positions = default_positions(tokens, segment_ids) if positions is None else jnp.asarray(positions)
        context = self.context(positions, segment_ids)
        context = context.replace(implementation=self.attention, padded_on_the_right=lengths is not None)
        x = constrain(self.embed(tokens, positions), "batch")
        new_caches, counts = {}, {}
        for name in self.groups():  # the loops over layers that `set_groups` made: self.group_0, ...
            cache = None if caches is None else caches[name]
            x, (new_caches[name], counts[name]) = getattr(self, name)(x, cache, context)
        return Output(self.normalise(x), x, None if caches is None else new_caches, counts)

    def hidden(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        segment_ids: Tokens | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm."""
        return self.forward(tokens, positions, segment_ids).hidden

    def __call__(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        segment_ids: Tokens | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        """Logits in float32, of tokens or of a classifier's classes. A training loss should call `hidden` instead, and
        unembed in chunks."""
        if self.config.labels is not None:
            return self.classify(tokens, positions, segment_ids)
        return self.unembed(self.hidden(tokens, positions, segment_ids))

    def classify(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        segment_ids: Tokens | None = None,
    ) -> Float[Array, "B C"]:
        """Logits of the classes of each row, by its last token that is not padding (segment 0), in float32."""
        hidden = self.hidden(tokens, positions, segment_ids)
        return self.class_logits(last_hidden(hidden, None if segment_ids is None else jnp.asarray(segment_ids)))

    # What all architectures share. It reads the modules `token_embedding`, `final_norm` and a head: `lm_head`, unless
    # it is tied, or the `score` of a classifier.

    @nn.nowrap
    def set_embedding(self, factor: float | None = None) -> None:
        """Create the table of token embeddings in `setup`. What is looked up is multiplied by `factor`; in models with
        Dynamic Tanh by a learned factor in its place (`scale_embedded`)."""
        c = self.config
        if c.norm == "dyt":
            factor, self.embedding_scale = None, EmbeddingScale()
        normal = nn.initializers.normal(c.initializer_range)
        self.token_embedding = Embedding(c.vocab_size, c.hidden_size, normal, self.dtype, factor)

    @nn.nowrap
    def set_groups(self) -> None:
        """Create the layers in `setup`: `self.group_0`, ..., one loop for each of `groups`."""
        check_implementation(self.attention)
        for name, group in self.groups().items():
            setattr(self, name, self.scanned(Pattern, group.repeats)(group.blocks))

    @nn.nowrap
    def set_head(self) -> None:
        """Create the head in `setup`, unless it is tied."""
        c = self.config
        head = partial(Linear, use_bias=False, kernel_init=nn.initializers.normal(c.initializer_range))
        if c.labels is not None:
            self.score = head(len(c.labels), dtype=self.dtype)
        elif not c.tie_word_embeddings:
            self.lm_head = head(c.vocab_size, dtype=self.dtype)

    @nn.nowrap
    def scale_embedded(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Embeddings times Dynamic Tanh's learned factor, in models that have it for norms."""
        return self.embedding_scale(x) if self.config.norm == "dyt" else x

    def normalise(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The norm after the last layer."""
        normalised: Array = self.final_norm(x)
        return normalised

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits of a language model, in float32. BadInput: the model is a classifier."""
        labels, tied = self.config.labels, self.config.tie_word_embeddings
        if labels is not None:
            raise BadInput(f"this model is a classifier ({shown(labels)}) and gives no token; classify with it")
        logits = self.token_embedding.logits(hidden) if tied else self.lm_head(hidden)
        return logits.astype(jnp.float32)

    def class_logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """Logits of a classifier's classes, in float32. BadInput: the model is a language model."""
        if self.config.labels is None:
            raise BadInput("this model is a language model and knows no classes; give it a head by with_classifier")
        return self.score(hidden).astype(jnp.float32)

    @nn.nowrap
    def head_variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The part of the variables that `unembed` or `class_logits` reads."""
        head = "token_embedding" if self.config.tie_word_embeddings else LM_HEAD
        head = head if self.config.labels is None else SCORE
        return {name: {head: tree[head]} for name, tree in spread(variables).items() if head in tree}

    @nn.nowrap
    def groups(self) -> dict[str, LayerGroup]:
        """`layer_groups` by name, as they run: a group that `frozen_layers` cuts is two, group_0 and group_0_upper."""
        groups = {}
        below = self.frozen_layers
        for i, group in enumerate(self.layer_groups()):
            name, repeats = f"group_{i}", max(below, 0) // len(group.blocks)
            below -= group.repeats * len(group.blocks)
            if 0 < repeats < group.repeats:
                groups[name] = LayerGroup(group.blocks, repeats)
                groups[upper_part(name)] = LayerGroup(group.blocks, group.repeats - repeats)
            else:
                groups[name] = group
        return groups

    @nn.nowrap
    def scanned(self, module: type[nn.Module], repeats: int) -> Callable[..., nn.Module]:
        """The constructor of a loop over `repeats` modules, called as `(x, inputs of each module, inputs of all)`."""
        if self.remat not in POLICIES:
            raise BadInput(f"remat={self.remat!r} is unknown; use one of {', '.join(POLICIES)}")
        if self.scan_layers or self.remat != "none":  # else XLA, which then sees both passes, decides what to keep
            module = nn.remat(module, policy=POLICIES[self.remat], prevent_cse=not self.scan_layers)
        return nn.scan(
            module,
            variable_axes={PARAMS: 0, "router": 0, LORA: 0, LORA_FIXED: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=repeats,
            unroll=1 if self.scan_layers else repeats,
            # True traces the module once more, for a check that we do not need; `init` keeps it, so that a seed still
            # gives the weights that it always gave.
            check_constancy_invariants=self.is_initializing() and not self.has_rng(SHAPES_ALONE),
        )

    # Decoding: layers sliced once, run one after another.

    @nn.nowrap
    def layer_paths(self) -> tuple[tuple[tuple[str, str], int], ...]:
        """Where the parameters of each layer are, from the first to the last: ((group, block), repetition)."""
        return tuple(
            ((f"group_{g}", f"block_{b}"), repeat)
            for g, group in enumerate(self.layer_groups())
            for repeat in range(group.repeats)
            for b in range(len(group.blocks))
        )

    @nn.nowrap
    def all_layer_paths(self) -> tuple[tuple[tuple[str, str], int], ...]:
        """The same for all that checkpoints number as layers, modules of multi-token prediction included."""
        return self.layer_paths()

    @nn.nowrap
    def unbound_blocks(self) -> dict[tuple[str, str], Any]:
        """The modules of each group's pattern by (group, block), to be applied to the variables of one layer."""
        return {
            (f"group_{g}", f"block_{b}"): make(parent=None)
            for g, group in enumerate(self.layer_groups())
            for b, make in enumerate(group.blocks)
        }

    @nn.nowrap
    def compute_dtype(self, variables: Mapping[str, Any], layers: Sequence[Mapping[str, Any]] = ()) -> Dtype:
        """The type to compute in, and of caches: `dtype`, or where that is None the type of most weights. With `layers`
        the variables are those outside the layers, as from `slice_layers`."""
        params = [tree.get("params", {}) for tree in (variables, *layers)]
        return self.dtype or weight_type(each_own_kernel(params))

    @nn.nowrap
    def create_caches(self, batch: int, length: int, dtype: Dtype, lookahead: int = 0) -> dict[str, Any]:
        """Empty caches for `length` positions in all layers, in the structure of `Output.caches`.

        `lookahead` is the number of tokens that may be rolled back, by writing at an earlier position.
        """
        return {
            f"group_{g}": {
                f"block_{b}": jax.tree.map(
                    lambda leaf, n=group.repeats: jnp.broadcast_to(leaf, (n, *leaf.shape)),
                    make(parent=None).create_cache(batch, length, dtype, lookahead),
                )
                for b, make in enumerate(group.blocks)
            }
            for g, group in enumerate(self.layer_groups())
        }

    @nn.nowrap
    def attention_choices(self, training: bool = False) -> dict[int | None, Choice]:
        """Which implementation `attention` means on this machine, for each window of the layers; None is no window. A
        `dtype` of None counts as float32. BadInput: an implementation that is asked for by name cannot run here."""
        c, dtype = self.config, self.dtype or jnp.float32
        dropout = getattr(c, "attention_dropout", 0.0) or getattr(c, "attn_pdrop", 0.0)
        softcap = getattr(c, "attn_logit_softcapping", None)
        heads = c.num_attention_heads, getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        choices = {}
        for block in self.unbound_blocks().values():
            cache = block.create_cache(1, 1, dtype)
            window = getattr(cache, "window", None)  # blocks need not have it, caches with a window do
            facts: dict[str, Any] = {"widths": self.head_widths(cache), "heads": heads, "dtype": dtype}
            facts |= {"softcap": softcap, "dropout": training and dropout > 0}
            choices[window] = choose(self.attention, window=window, **facts)
        return choices

    @nn.nowrap
    def attention_choice(self, training: bool = False) -> str:
        """`attention_choices` and, if "auto" would take the fused kernel but cannot, why: one line, to be shown
        once."""
        choices = self.attention_choices(training)
        parts = [f"{choice.name} in windows of {window}" for window, choice in choices.items() if window is not None]
        if None in choices:
            parts.append(f"{choices[None].name} elsewhere" if parts else choices[None].name)
        obstacle = next((choice.obstacle for choice in choices.values() if choice.obstacle), None)
        why = f"; the fused kernel cannot run: {obstacle}" if obstacle else ""
        scripts = of_a_script(*self.unbound_blocks().values())  # whose blocks may call `attention` with a `formula`
        own = "; plain where a layer has a formula of its own" if scripts and self.attention == "auto" else ""
        return f"attention: {', '.join(parts)}{why}{own}"

    @nn.nowrap
    def head_widths(self, cache: Any) -> tuple[int, int]:
        """Features of a head's queries and keys, and of its values, in the layer that has such a cache."""
        return cache.keys.shape[-2], cache.values.shape[-1]

    @nn.nowrap
    def slice_layers(
        self, variables: dict[str, Any], arrange: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree
    ) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
        """(variables outside of all that `all_layer_paths` lists, variables of each layer in order), passed through
        `arrange`. Adapters are merged first where that rounds nothing away (`computes_in_float32`), else they stay
        beside the matrices, `measured`. BadInput for variables that a training step has consumed.
        """
        refuse_consumed(variables)
        variables = spread(variables)
        if self.computes_in_float32(variables):
            variables = merge(variables)  # in whole groups: a few large products instead of several per layer
        groups = {group for (group, _), _ in self.all_layer_paths()}
        outside = {
            collection: {name: leaf for name, leaf in tree.items() if name not in groups}
            for collection, tree in variables.items()
        }

        def prepared(tree: dict[str, Any]) -> dict[str, Any]:
            return arrange(measured(tree))

        return prepared(outside), slice_modules(variables, self.layer_paths(), prepared)

    @nn.nowrap
    def computes_in_float32(self, variables: Mapping[str, Any]) -> bool:
        """Whether weights and products are in float32, which a GPU rounds to TF32. In fewer bits drawing rounds
        otherwise than learning, and merging, to W + s A B, rounds a small update away: what answers would not be the
        policy that learns."""
        types = {np.dtype(self.compute_dtype(variables)), weight_type(variables["params"])}
        return types == {np.dtype(np.float32)} and target_platform() == "cpu"

    @nn.nowrap
    def slice_caches(self, caches: dict[str, Any]) -> tuple[Any, ...]:
        """One cache per layer, from the stacked caches that `forward` returns."""
        return tuple(
            jax.tree.map(lambda leaf, i=repeat: leaf[i], caches[group][block])
            for (group, block), repeat in self.layer_paths()
        )

    @nn.nowrap
    def stack_caches(self, caches: Sequence[Any]) -> dict[str, Any]:
        """The stacked caches that `forward` takes, from one per layer."""
        held: dict[str, dict[str, list[Any]]] = {}
        for ((group, block), _), cache in zip(self.layer_paths(), caches, strict=True):
            held.setdefault(group, {}).setdefault(block, []).append(cache)
        return {
            group: {block: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) for block, layers in blocks.items()}
            for group, blocks in held.items()
        }

    @nn.nowrap
    def decode(
        self,
        outside: dict[str, Any],
        layers: tuple[dict[str, Any], ...],
        tokens: Tokens,
        positions: Tokens,
        caches: tuple[Any, ...],
        lengths: Int[Array, " B"] | None = None,
    ) -> Output:
        """A pass over sliced layers; `caches`, and those of the output, are one per layer. `lengths` as in `forward`:
        of prompts."""
        tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
        if lengths is not None:
            context = self.context(positions, segments_of(lengths, tokens.shape[1])).replace(padded_on_the_right=True)
        else:
            # Some scalings of RoPE depend on the document's length. Here that is each token's position + 1, as if it
            # were a segment of its own: its rotation must not depend on drafts that follow it in the same pass.
            alone = jnp.broadcast_to(jnp.arange(1, tokens.shape[1] + 1), tokens.shape)
            context = self.context(positions, alone).replace(segment_ids=None)
        context = context.replace(implementation=self.attention)
        x = self.apply(outside, tokens, positions, method="embed")
        blocks = self.unbound_blocks()
        new_caches = []
        for (path, _), layer, cache in zip(self.layer_paths(), layers, caches, strict=True):
            given: Any = blocks[path].apply(layer, x, context, cache)
            x, cache, _ = given
            new_caches.append(cache)
        return Output(self.apply(outside, x, method="normalise"), x, tuple(new_caches))


def slice_modules(
    variables: dict[str, Any],
    paths: Sequence[tuple[tuple[str, str], int]],
    arrange: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree,
) -> tuple[dict[str, Any], ...]:
    """The variables of the module at each path, passed through `arrange`."""
    modules = []
    for (group, name), repeat in paths:
        stack = {collection: tree[group][name] for collection, tree in variables.items() if name in tree.get(group, {})}
        modules.append(arrange(_slice_of(stack, repeat)))
    return tuple(modules)


# One program for all layers: slices taken one leaf at a time take three times as long.
@jax.jit
def _slice_of(stack: dict[str, Any], index: Int[Array, ""]) -> dict[str, Any]:
    sliced: dict[str, Any] = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)
    return sliced


def of_a_script(*modules: nn.Module) -> bool:
    """Whether one of these is written elsewhere, and so may compute in other ways."""
    return any(type(module).__module__.partition(".")[0] != "llmq_jax" for module in modules)


def upper_part(group: str) -> str:
    """The name of the upper part of a group that `frozen_layers` cuts in two."""
    return f"{group}_upper"


def default_positions(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """0, 1, ... along each row, starting again where the segment changes."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def segments_of(lengths: Int[Array, " B"] | Int[np.ndarray, " B"], width: int) -> Int[Array, "B T"]:
    """Segment ids of rows with one document each: 1 on its `lengths` tokens, 0 on the padding after them."""
    return (jnp.arange(width) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
