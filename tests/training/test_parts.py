"""Training a part of a model: the same gradients as of the whole there, nothing elsewhere, and one model in the end."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.layers.fresh_adapters import add_adapters
from llmq_jax.layers.lora import LoRA
from llmq_jax.model_files import load
from llmq_jax.models import Gemma3Config, GPT2Config, Llama3Config, build, init
from llmq_jax.objectives import NextToken
from llmq_jax.training.checkpoints import Checkpoints
from llmq_jax.training.parts import FROZEN, as_read, freeze_all_but, train_adapters, whole
from llmq_jax.training.state import create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.models.compiled import apply
from tests.weights import draw_variables

SIZES = {
    "vocab_size": 29,
    "max_position_embeddings": 16,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
GEMMA = Gemma3Config(
    **SIZES,
    num_key_value_heads=1,
    head_dim=8,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention") * 2,
)
CASES = {
    "gpt2": (GPT2Config(**SIZES | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}), 1),
    "llama": (Llama3Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=False), 3),
    "all blocks": (Llama3Config(**SIZES, num_key_value_heads=1), 4),
    "the head alone": (Llama3Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=False), 0),
    "a pattern": (GEMMA, 2),
    "dense layers, then experts": (
        Llama3Config(**SIZES, num_key_value_heads=1, experts={"num_experts": 4, "first_layer": 1}),
        2,
    ),
}


def batch():
    tokens = np.random.default_rng(0).integers(0, 29, (2, 9)).astype(np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "mask": np.ones((2, 9), np.float32)}


@pytest.fixture(params=CASES)
def case(request):
    config, blocks = CASES[request.param]
    return build(config), draw_variables(config), blocks


def test_what_trains_gets_the_gradient_that_it_gets_in_the_whole_model(case):
    model, variables, blocks = case
    parted_model, parted = freeze_all_but(model, variables, blocks, ("lm_head",))
    jax.tree.map(np.testing.assert_array_equal, whole(parted), variables)

    objective, parted_objective = NextToken(model), NextToken(parted_model)
    rows = jax.tree.map(jnp.asarray, batch())

    def gradients(objective, variables):
        def loss(trained):
            read = as_read({**variables, "params": trained})
            return objective.loss(read, rows, objective.weights(rows), None)[0]

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    value, expected = gradients(objective, variables)
    parted_value, found = gradients(parted_objective, parted)
    np.testing.assert_allclose(parted_value, value, rtol=1e-6)
    layers = model.layer_paths()
    assert found.keys() & {"token_embedding", "position_embedding"} == set()
    assert ("final_norm" in found) == (blocks > 0)
    for name, gradient in found.items():
        group = name.removesuffix("_upper")
        below = sum(block[0] == group for block, _ in layers[: len(layers) - blocks])
        patterns = len({block for block, _ in layers if block[0] == group}) or 1
        reference = jax.tree.map(lambda x, n=below // patterns: x[n:], expected[group]) if below else expected[name]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, reference)


@pytest.mark.exhaustive
def test_the_rest_stays_as_it_is_and_the_checkpoint_is_one_model(case, tmp_path):
    model, variables, blocks = case
    parted_model, parted = freeze_all_but(model, variables, blocks, ("lm_head",))
    if not parted["params"]:
        pytest.skip("this model's head is its embedding")
    step = make_train_step(NextToken(parted_model), optax.sgd(0.1))
    before = jax.tree.map(np.array, parted[FROZEN])
    state, _ = step(create_state(parted, optax.sgd(0.1)), batch())
    jax.tree.map(np.testing.assert_array_equal, state.variables[FROZEN], before)
    moved = whole(state.variables)
    assert jax.tree.structure(moved) == jax.tree.structure(variables)

    # Evaluation is of the parted model, and the same as that of the whole one.
    parted_loss = evaluate(make_eval_step(NextToken(parted_model)), state.variables, [batch()])["loss"]
    loss = evaluate(make_eval_step(NextToken(model)), moved, [batch()])["loss"]
    np.testing.assert_allclose(parted_loss, loss, rtol=1e-6)

    Checkpoints(tmp_path / "checkpoints").save(1, state, model_config=model.config)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path).variables, moved)


def test_no_time_goes_to_the_layers_below():
    """Of the gradient's program for one block of many: no loop over the others but the forward one."""
    config = Llama3Config(**SIZES | {"num_hidden_layers": 8}, num_key_value_heads=1)
    model, variables = freeze_all_but(build(config), draw_variables(config), 1, ())
    objective, rows = NextToken(model), jax.tree.map(jnp.asarray, batch())

    def loss(trained):
        read = as_read({**variables, "params": trained})
        return objective.loss(read, rows, objective.weights(rows), None)[0]

    lengths = [
        equation.params["length"]
        for equation in jax.make_jaxpr(jax.grad(loss))(variables["params"]).jaxpr.eqns
        if equation.primitive.name == "scan"
    ]
    assert lengths.count(7) == 1
    assert lengths.count(1) >= 2


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "layers"), [("llama", (2, 3)), ("a pattern", (3,)), ("gpt2", (0, 2))])
def test_adapters_of_the_last_layers_train_as_in_the_whole_model(name, layers):
    config, _ = CASES[name]
    model = build(config)
    adapted = add_adapters(draw_variables(config), model.layer_paths(), LoRA(rank=2, layers=layers))
    noise = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapted["lora"])
    adapted = {**adapted, "lora": noise}
    parted_model, parted, trainable = train_adapters(model, adapted)
    assert trainable == ("lora",)
    rows = jax.tree.map(jnp.asarray, batch())

    def gradients(model, variables):
        objective = NextToken(model)

        def loss(trained):
            read = as_read({**variables, "lora": trained})
            return objective.loss(read, rows, objective.weights(rows), None)[0]

        return jax.jit(jax.value_and_grad(loss))(variables["lora"])

    value, expected = gradients(model, adapted)
    parted_value, found = gradients(parted_model, parted)
    np.testing.assert_allclose(parted_value, value, rtol=1e-6)
    # Layers below the first adapter have neither adapters nor a backward pass.
    assert ("group_0_upper" in found) == (min(layers) > 0)
    for stack, tree in found.items():
        count = len(jax.tree.leaves(tree)[0])
        reference = jax.tree.map(lambda x, n=count: x[-n:], expected[stack.removesuffix("_upper")])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tree, reference)
    again = whole(parted)
    jax.tree.map(np.testing.assert_array_equal, again["params"], adapted["params"])
    tokens = batch()["tokens"]
    np.testing.assert_allclose(apply(model, again, tokens), apply(model, adapted, tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "heads", "frozen"), [("llama", (), 3), ("llama", ("token_embedding",), 0), ("a pattern", (), 2)]
)
def test_layers_below_adapters_have_no_gradients_but_on_the_way_to_an_embedding(name, heads, frozen):
    model = build(CASES[name][0])
    adapted = add_adapters(draw_variables(model.config), model.layer_paths(), LoRA(rank=2, layers=(3,)))
    assert train_adapters(model, adapted, heads)[0].frozen_layers == frozen


def test_a_state_is_shown_without_its_arrays():
    state = create_state(
        {"params": {"a": np.ones((2, 3))}, "lora": {"b": np.ones(4)}}, optax.sgd(0.1), trainable="lora"
    )
    assert repr(state) == "TrainState(step=0; values: params 6, lora 4; training: lora)"
    state.step.delete()
    assert repr(state) == "TrainState(consumed by a step; values: params 6, lora 4; training: lora)"
    # What stands for arrays is shown: a tree of other things, or a prefix.
    shown = repr(jax.tree.map(lambda leaf: "here", state))
    assert shown.startswith("TrainState(step='here', variables={'lora': {'b': 'here'}, 'params': {'a': 'here'}}, ")
    assert repr(state.replace(step=0, variables=None)).startswith("TrainState(step=0, variables=None, ")


def test_a_matrix_that_is_to_train_whole_is_not_left_in_silence():
    model = build(CASES["llama"][0])
    spec = LoRA(rank=1, targets="query", whole="token_embedding")
    adapted = add_adapters(draw_variables(model.config), model.layer_paths(), spec)
    with pytest.warns(
        UserWarning, match=r"^token_embedding: trains whole beside the adapters, but stays as it is with"
    ):
        create_state(adapted, optax.sgd(0.1), trainable="lora")
    _, variables, trainable = train_adapters(model, adapted)
    with warnings.catch_warnings(action="error"):
        create_state(variables, optax.sgd(0.1), trainable=trainable)


@pytest.mark.exhaustive
@pytest.mark.parametrize("train", ["lora", "blocks", "all"])
def test_the_bias_of_a_router_moves_where_the_router_trains(train):
    experts = {"num_experts": 4, "selection_bias": True, "balance": {"bias_rate": 0.1}}
    config = Llama3Config(**SIZES, num_key_value_heads=1, experts=experts)
    model, variables = build(config), init(config)  # whose bias is 0
    trainable = ("params",)
    if train == "lora":
        adapted = add_adapters(variables, model.layer_paths(), LoRA(rank=2, targets="attention"))
        model, variables, trainable = train_adapters(model, adapted)
    elif train == "blocks":
        model, variables = freeze_all_but(model, variables, 1, ())
    state = create_state(variables, optax.sgd(0.1), trainable=trainable)
    state, _ = make_train_step(NextToken(model), optax.sgd(0.1))(state, batch())
    biases = whole(state.variables)["router"]["group_0"]["block_0"]["moe"]["bias"]
    moved = [bool(np.any(bias)) for bias in biases]
    assert moved == {"lora": [False] * 4, "blocks": [False] * 3 + [True], "all": [True] * 4}[train]


def test_parameters_in_half_precision_need_a_type_to_compute_in():
    config = Llama3Config(**SIZES, num_key_value_heads=1)
    half = {"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw_variables(config)["params"])}
    with pytest.raises(BadInput, match=r"parameters in bfloat16 stay so .* lq\.build\(config, dtype=\.\.\.\)"):
        freeze_all_but(build(config), half, 1, ())
    model, parted = freeze_all_but(build(config, dtype="bfloat16"), half, 1, ())
    _, metrics = make_train_step(NextToken(model), optax.sgd(0.1))(create_state(parted, optax.sgd(0.1)), batch())
    assert np.isfinite(metrics["loss"])


def test_bad_numbers_of_blocks():
    model, variables = build(GEMMA), draw_variables(GEMMA)
    with pytest.raises(BadInput, match="the model has 4"):
        freeze_all_but(model, variables, 5, ())
    with pytest.raises(BadInput, match="cut through a pattern of 2 layers"):
        freeze_all_but(model, variables, 1, ())
