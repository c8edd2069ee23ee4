"""Our sides: the library as its recipes use it, and the weights that the PyTorch sides start from."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import llmq_jax as lq
from bench.bandwidth import read_bandwidth
from bench.inputs import (
    attention_inputs,
    cross_entropy_inputs,
    experts_inputs,
    pairs_of_words,
    prompts,
    prompts_of_words,
    train_batch,
)
from bench.products import Product, products_of, time_in_jax
from bench.rows import ADAPTER, FULL, PROMPTS
from bench.worker import Side
from llmq_jax.data.prompts import Prompt, PromptBatches
from llmq_jax.generation.decoding import read_prompts
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.attention import Context, attention
from llmq_jax.layers.expert_dispatch import dispatch
from llmq_jax.layers.expert_weights import ExpertWeights
from llmq_jax.models import ARCHITECTURES, abstract_variables
from llmq_jax.objectives.cross_entropy import chunked_cross_entropy, token_losses
from llmq_jax.objectives.preference import pair_logprobs
from llmq_jax.rewards import Rewards
from llmq_jax.training.grpo import Loop
from llmq_jax.training.host_memory import keep_freed_memory
from llmq_jax.training.rollout_scores import TextRewards

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def row_config(row: Any) -> Any:
    return ARCHITECTURES[row.model_type].config_class(**row.fields)


def write_weights(variables: dict, config: Any, folder: Path) -> None:
    """Write the weights under the names of transformers, for the other sides, unless a side of ours has done so."""
    from safetensors.numpy import save_file

    if not (folder / CONFIG).exists():
        save_file(lq.interop.to_state_dict(variables, config), folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(lq.interop.config_to_hf(config)))


class OurSide(Side):
    KEEPS_FREED_MEMORY: ClassVar[bool] = True
    """Whether the C allocator keeps freed memory, as in our training loop and nowhere else."""

    def prepare(self) -> dict[str, Any]:
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # as `use_device` does
        if self.KEEPS_FREED_MEMORY:
            keep_freed_memory()
        facts = self.build()
        return {**facts, "compile_seconds": self.first_runs()}

    def build(self) -> dict[str, Any]:
        raise NotImplementedError

    def initialised(self) -> tuple[Any, dict]:
        """(the row's config, fresh variables), whose weights are written for the other sides."""
        config = row_config(self.row)
        variables = lq.init(config, seed=0)
        write_weights(variables, config, self.folder)
        return config, variables

    def words(self, draw: Callable[..., list]) -> tuple[lq.GPT2Tokenizer, list]:
        """(the tokenizer, what `draw` makes of the row and it), which are written for the other sides, too."""
        tokenizer = lq.GPT2Tokenizer()
        drawn = draw(self.row, tokenizer)
        if not (self.folder / PROMPTS).exists():
            tokenizer.save(self.folder)
            (self.folder / PROMPTS).write_text(json.dumps(drawn))
        return tokenizer, drawn

    def products(self) -> dict[str, Any]:
        """Shapes of the workload's matrix products and how long they take alone."""
        if not hasattr(self, "shapes"):
            self.shapes = self.find_products()
        return {"products": [vars(shape) for shape in self.shapes], "seconds": time_in_jax(self.shapes)}

    def find_products(self) -> list[Product]:
        raise NotImplementedError


class TrainStepSide(OurSide):
    def build(self) -> dict[str, Any]:
        config, variables = self.initialised()
        model = lq.build(config, scan_layers=self.name.endswith("scanned"), dtype=self.row.dtype)
        optimizer = lq.training.adamw(1e-3)
        self.step = lq.training.make_train_step(lq.objectives.NextToken(model), optimizer)
        trainable = "params"
        if self.row.adapters is not None:
            adapted = lq.lora(LanguageModel(config, model, variables), rank=self.row.adapters)
            if not (self.folder / ADAPTER).exists():
                lq.save_adapter(adapted, self.folder / ADAPTER)
            if FULL not in self.name:
                variables, trainable = adapted.variables, "lora"
        self.state = lq.training.create_state(variables, optimizer, trainable=trainable)
        self.batches = [train_batch(self.row, index) for index in range(4)]
        self.done, self.losses = 0, []
        return {}

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        same = self.row.adapters is None or FULL not in self.name
        return {**facts, "losses": [float(loss) for loss in self.losses[:3]]} if same else facts

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.state, metrics = self.step(self.state, self.batches[self.done % len(self.batches)])
            self.done += 1
            if self.done <= 3:
                self.losses.append(metrics["loss"])
        jax.block_until_ready((self.state, metrics))

    def find_products(self) -> list[Product]:
        """With experts, the products of a step in which each expert gets equally many tokens: how often the loops of
        the real step run is not known before they do."""
        step, config = self.step, row_config(self.row)
        experts = lq.build(config).experts
        if experts is not None:
            even = replace(config, experts=replace(experts, dispatch="capacity", capacity_factor=1.0))
            step = lq.training.make_train_step(lq.objectives.NextToken(lq.build(even)), lq.training.adamw(1e-3))
        return products_of(step, self.state, self.batches[0])


class CompilationSide(OurSide):
    def build(self) -> dict[str, Any]:
        config = replace(row_config(self.row), num_hidden_layers=self.row.layers_of(self.name))
        optimizer = lq.training.adamw(1e-3)
        step = lq.training.make_train_step(lq.objectives.NextToken(lq.build(config)), optimizer)
        state = jax.eval_shape(lambda: lq.training.create_state(lq.init(config), optimizer))
        self.step, self.arguments = step.program, (state, train_batch(self.row, 0))
        return {}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            jax.clear_caches()
            self.step.lower(*self.arguments).compile()

    def products(self) -> dict[str, Any]:
        return {"products": [], "seconds": []}


class GradientsSide(OurSide):
    """A compiled function of arrays, which gives a loss and its gradients. `function` has the matrix products."""

    compares = True
    """Whether the other sides compute the same."""

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        memory = self.compiled.lower(*self.arguments).compile().memory_analysis()
        facts["temporary_bytes"] = memory.temp_size_in_bytes
        # Not `peak_memory_in_bytes`: on the CPU it leaves the temporary buffers out.
        facts["whole_bytes"] = sum(
            (memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes)
        )
        if not self.compares:
            return facts
        value, gradients = self.last
        norms = [float(jnp.linalg.norm(leaf.ravel())) for leaf in jax.tree.leaves(gradients)]
        return {**facts, "losses": [float(value), *norms]}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.last = None  # as a training step would have consumed them
            self.last = jax.block_until_ready(self.compiled(*self.arguments))

    def find_products(self) -> list[Product]:
        return products_of(self.function, *self.arguments)


class CrossEntropySide(GradientsSide):
    def build(self) -> dict[str, Any]:
        head, hidden, targets = map(jnp.asarray, cross_entropy_inputs(self.row))
        mask = jnp.ones(targets.shape, jnp.float32)

        def unembed(head, rows):
            return jax.lax.dot_general(rows, head, (((1,), (1,)), ((), ())))

        def chunked(head, hidden):
            return chunked_cross_entropy(unembed, head, hidden, targets, mask) / targets.size

        def plain(head, hidden):
            rows = hidden.reshape(-1, hidden.shape[-1])
            return token_losses(unembed(head, rows), targets.reshape(-1)).mean()

        loss = plain if self.name.endswith("plain") else chunked
        self.function, self.arguments = jax.value_and_grad(loss, (0, 1)), (head, hidden)
        self.compiled = jax.jit(self.function)
        return {}


class WindowedAttentionSide(GradientsSide):
    def build(self) -> dict[str, Any]:
        length = self.row.length_of(self.name)
        context = Context(jnp.arange(length)[None])
        window = None if self.name.endswith("full") else self.row.window

        def loss(*inputs):
            mixed, _ = attention(*inputs, context, scale=self.row.width**-0.5, window=window)
            return jnp.square(mixed).mean()

        self.function = jax.value_and_grad(loss, (0, 1, 2))
        self.arguments = tuple(map(jnp.asarray, attention_inputs(self.row, length)))
        self.compiled = jax.jit(self.function)
        self.compares = self.name == "ours"  # the others have another computation, or another sequence
        return {}


def swiglu(parts: jax.Array) -> jax.Array:
    """[..., 2, F] to [..., F]."""
    return ACTIVATIONS["silu"](parts[..., 0, :]) * parts[..., 1, :]


def exact_experts(x: jax.Array, weights: jax.Array, experts: ExpertWeights) -> jax.Array:
    """Only the matrix products of a mixture of experts: each expert gets an equal part of `top_k` copies of the tokens,
    in batched products."""
    (tokens, width), top_k = x.shape, weights.shape[1]
    rows = jnp.tile(x, (top_k, 1)).reshape(len(experts.up), -1, width)
    down = jnp.einsum("ecf,efd->ecd", swiglu(jnp.einsum("ecd,edpf->ecpf", rows, experts.up)), experts.down)
    return (down.reshape(top_k, tokens, width) * weights.T[..., None]).sum(0)


class ExpertsSide(GradientsSide):
    def build(self) -> dict[str, Any]:
        x, ids, weights, up, down = map(jnp.asarray, experts_inputs(self.row, self.row.experts_of(self.name)))
        last = self.name.rpartition(" ")[2]
        implementation = last if last in ("ragged", "dense") else "blocks"

        def loss(x, weights, experts, ids):
            mixed, _ = dispatch(x, ids, weights, experts, swiglu, implementation)
            return jnp.square(mixed).mean()

        def exact(x, weights, experts, ids):
            return jnp.square(exact_experts(x, weights, experts)).mean()

        self.arguments = (x, weights, ExpertWeights(up, down), ids)
        self.function = jax.value_and_grad(exact, (0, 1, 2))
        is_exact = self.name.endswith("exact")
        self.compiled = jax.jit(self.function if is_exact else jax.value_and_grad(loss, (0, 1, 2)))
        self.compares = not is_exact and self.row.experts_of(self.name) == self.row.num_experts  # or other experts
        return {}


def chosen_experts_alone(row: Any) -> tuple[Any, dict]:
    """(a model with only as many experts as the tokens of one pass go through, if each goes through others; shapes of
    its variables): the work for one token of each row."""
    config = row_config(row)
    (field,) = {"n_routed_experts", "num_local_experts"} & row.fields.keys()
    count = min(row.fields[field], row.batch * row.fields["num_experts_per_tok"])
    groups = {"n_group": 1, "topk_group": 1} if "n_group" in row.fields else {}
    config = replace(config, **{field: count}, **groups)
    config = replace(config, experts=replace(lq.build(config).experts, dispatch="dense"))
    return lq.build(config), abstract_variables(config)


class GenerationSide(OurSide):
    KEEPS_FREED_MEMORY = False

    def build(self) -> dict[str, Any]:
        config, variables = self.initialised()
        self.lm = lq.LanguageModel(config, lq.build(config), variables)
        self.prompts = prompts(self.row)
        return {"bandwidth": read_bandwidth()}

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        return {**facts, "tokens": self.last.tokens.tolist()}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.last = lq.generate(
                self.lm,
                self.prompts,
                max_new_tokens=self.row.new_tokens,
                sampler=lq.Sampler(temperature=0.0),
            )

    def find_products(self) -> list[Product]:
        """The products of one decoding pass, times the number of new tokens; with one new token, those of the pass over
        the prompt."""
        batch, length = self.row.batch, self.row.prompt + self.row.new_tokens
        model = self.lm.model
        if model.experts is not None:
            model, variables = chosen_experts_alone(self.row)
            outside, layers = jax.eval_shape(model.slice_layers, variables)
        else:
            outside, layers = self.lm.sliced(batch)
        if self.row.new_tokens == 1:
            prompts, lengths = jnp.asarray(self.prompts), jnp.full(batch, self.row.prompt)
            read = partial(read_prompts, model, length=length, lookahead=0)
            read_from = self.lm.read_from(batch, prompts.size)
            return products_of(lambda *arguments: read(*arguments)[0].hidden, *read_from, prompts, lengths)
        caches = model.slice_caches(model.create_caches(batch, length, jnp.float32))
        caches = tuple(cache.replace(empty=False) for cache in caches)  # as after a prompt
        token = jnp.zeros((batch, 1), jnp.int32)

        def one_pass(outside, layers, caches):
            output = model.decode(outside, layers, token, token, caches)
            return model.apply(outside, output.hidden[:, 0], method="unembed"), output.caches

        return [
            replace(product, count=product.count * self.row.new_tokens)
            for product in products_of(one_pass, outside, layers, caches)
        ]


class RolloutSide(GenerationSide):
    KEEPS_FREED_MEMORY = True  # in the training loop of GRPO

    def prepare(self) -> dict[str, Any]:
        return OurSide.prepare(self)  # sampled tokens differ between sides

    def build(self) -> dict[str, Any]:
        facts = super().build()
        self.done = 0
        self.next_tokens = jax.jit(self._next_tokens, static_argnames="width")
        return facts

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.done += 1
            if self.name.endswith("without a cache"):
                self.read_again()
                continue
            lq.generate(
                self.lm,
                self.prompts,
                samples=self.row.group,
                max_new_tokens=self.row.new_tokens,
                sampler=lq.Sampler(),
                stop=(),
                seed=self.done,
            )

    def read_again(self) -> None:
        """Read the whole text anew for each token, padded to a multiple of 32, so that few programs are compiled."""
        rows, key = self.row.batch * self.row.group, jax.random.key(self.done)
        tokens = jnp.zeros((rows, self.row.prompt + self.row.new_tokens), jnp.int32)
        tokens = tokens.at[:, : self.row.prompt].set(jnp.repeat(jnp.asarray(self.prompts), self.row.group, axis=0))
        for length in range(self.row.prompt, tokens.shape[1]):
            tokens = self.next_tokens(self.lm.variables, tokens, length, key, width=-(-length // 32) * 32)
        tokens.block_until_ready()

    def _next_tokens(self, variables: dict, tokens: jax.Array, length: int, key: jax.Array, *, width: int) -> jax.Array:
        model = self.lm.model
        hidden = model.apply(variables, tokens[:, :width], method="hidden")
        last = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False)
        logits = model.apply(variables, last, method="unembed")
        drawn = jax.random.categorical(jax.random.fold_in(key, length), logits)
        return jax.lax.dynamic_update_index_in_dim(tokens, drawn.astype(jnp.int32), length, axis=1)

    def find_products(self) -> list[Product]:
        """The products of the decoding passes; those of the pass over the prompts are not counted."""
        answers = replace(self.row, batch=self.row.batch * self.row.group)
        side = GenerationSide(answers, self.folder, self.name)
        side.lm = self.lm
        return side.find_products()


class GRPOStepSide(RolloutSide):
    def build(self) -> dict[str, Any]:
        config, variables = self.initialised()
        tokenizer, texts = self.words(prompts_of_words)
        self.lm = lq.LanguageModel(config, lq.build(config, scan_layers=False), variables, tokenizer)
        optimizer = lq.training.adamw(1e-6)
        objective = lq.objectives.GRPO(self.lm.model, group_size=self.row.group)
        self.loop = Loop(
            lm=self.lm,
            objective=objective,
            update=lq.training.make_train_step(objective, optimizer),
            prompts=[Prompt(f"row {i}", text, tokenizer.encode(text), {}) for i, text in enumerate(texts)],
            score=TextRewards(Rewards(("length",), (length_of,), (1.0,))),
            group_size=self.row.group,
            max_new_tokens=self.row.new_tokens,
            sampler=lq.Sampler(),
        )
        self.state = self.loop.start(lq.training.create_state(variables, optimizer))
        self.batches, self.done = PromptBatches(self.row.batch, self.row.batch), 0
        return {"bandwidth": read_bandwidth()}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.state, _ = self.loop.step(self.state, self.batches[self.done])
            self.done += 1
        jax.block_until_ready(self.state.variables)

    def find_products(self) -> list[Product]:
        """The products of the decoding passes and of the update."""
        self.lm = self.loop.policy(self.state.variables)
        rollout, scores, _ = self.loop.answered(self.state, self.batches[0])
        rows = self.loop.rows(self.state, rollout, self.loop.advantages(scores))
        return super().find_products() + products_of(self.loop.update, self.state, rows)


class DPOStepSide(OurSide):
    def build(self) -> dict[str, Any]:
        config, variables = self.initialised()
        tokenizer, pairs = self.words(pairs_of_words)
        end = [tokenizer.end_of_text]
        rows = [
            [tokenizer.encode(pair["prompt"] + pair[side]) + end for side in ("chosen", "rejected")] for pair in pairs
        ]
        tokens = np.array(rows, np.int32)
        answers = np.arange(tokens.shape[2]) >= self.row.prompt
        batch = {
            "tokens": tokens,
            "lengths": np.full(tokens.shape[:2], tokens.shape[2], np.int32),
            "response_mask": np.broadcast_to(answers, tokens.shape).astype(np.float32),
            "mask": np.ones(len(pairs), np.float32),
        }
        model = lq.build(config, scan_layers=self.name.endswith("scanned"))
        logprobs, _ = jax.jit(lambda variables: pair_logprobs(model, variables, batch))(variables)
        self.batch = batch | {"reference_logprobs": np.asarray(logprobs)}
        optimizer = lq.training.adamw(1e-6)
        self.step = lq.training.make_train_step(lq.objectives.DPO(model), optimizer)
        self.state, self.losses = lq.training.create_state(variables, optimizer), []
        return {}

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        return {**facts, "losses": [float(loss) for loss in self.losses[:3]]}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.state, metrics = self.step(self.state, self.batch)
            if len(self.losses) < 3:
                self.losses.append(metrics["loss"])
        jax.block_until_ready((self.state, metrics))

    def find_products(self) -> list[Product]:
        return products_of(self.step, self.state, self.batch)


def length_of(completions: list[str], **_: Any) -> list[float]:
    """The reward of an answer: its number of characters, so that answers differ."""
    return [float(len(text)) for text in completions]


SIDES = {
    "rollout": RolloutSide,
    "grpo": GRPOStepSide,
    "dpo": DPOStepSide,
    "train": TrainStepSide,
    "compile": CompilationSide,
    "cross_entropy": CrossEntropySide,
    "attention": WindowedAttentionSide,
    "experts": ExpertsSide,
    "generate": GenerationSide,
}
