"""GPT-2's layouts: names and shapes, there and back, absent biases, heads, configs from shapes, the closest layout."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from llmq_jax.interop import config_from_state_dict, from_state_dict, to_state_dict
from llmq_jax.interop.architectures import resolve_config
from llmq_jax.interop.gpt2 import LAYOUTS
from llmq_jax.model_files import load
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.models.llama3 import Llama3Config
from tests.interop.refusals import refused
from tests.weights import assert_equal_trees, draw_variables

TIED = GPT2Config(vocab_size=11, max_position_embeddings=7, hidden_size=6, num_hidden_layers=2, num_attention_heads=3)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False, intermediate_size=5)
APART = ("book", "original")

# {name in a block: shape}, V 11, P 7, D 6, F 24.
ORIGINAL_BLOCK = {
    "ln_1.scale": (6,),
    "ln_1.shift": (6,),
    "att.w_queries.weight": (6, 6),
    "att.w_keys.weight": (6, 6),
    "att.w_values.weight": (6, 6),
    "att.w_queries.bias": (6,),
    "att.w_keys.bias": (6,),
    "att.w_values.bias": (6,),
    "att.out_proj.weight": (6, 6),
    "att.out_proj.bias": (6,),
    "ln_2.scale": (6,),
    "ln_2.shift": (6,),
    "ffn.layers.0.weight": (24, 6),
    "ffn.layers.0.bias": (24,),
    "ffn.layers.2.weight": (6, 24),
    "ffn.layers.2.bias": (6,),
}
BOOK_NAMES = {
    "emb_dict": "tok_emb",
    "pos_emb_dict": "pos_emb",
    "w_queries": "W_query",
    "w_keys": "W_key",
    "w_values": "W_value",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "ffn": "ff",
    "final_ln": "final_norm",
    "out": "out_head",
}


def book_name(name):
    return ".".join(BOOK_NAMES.get(part, part) for part in name.split("."))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back(layout, dtype):
    for config in (TIED, UNTIED):
        if layout == "openai" and not config.tie_word_embeddings:
            continue
        variables = draw_variables(config, dtype=dtype)
        state = to_state_dict(variables, config, layout)
        assert_equal_trees(from_state_dict(state, config, layout), variables)


def test_a_head_that_a_layout_has_no_name_for():
    message = refused(to_state_dict, draw_variables(UNTIED), UNTIED, "openai")
    assert "1 without a place in this layout (params/lm_head/kernel)" in message


def test_names_and_shapes_of_original_and_book():
    shapes = {"emb_dict.weight": (11, 6), "pos_emb_dict.weight": (7, 6)}
    shapes |= {f"trf_blocks.{layer}.{name}": shape for layer in range(2) for name, shape in ORIGINAL_BLOCK.items()}
    shapes |= {"final_ln.scale": (6,), "final_ln.shift": (6,), "out.weight": (11, 6)}
    variables = draw_variables(TIED)
    original, book = (to_state_dict(variables, TIED, layout) for layout in ("original", "book"))
    assert {name: array.shape for name, array in original.items()} == shapes
    assert list(book) == [book_name(name) for name in original]
    for name, array in original.items():
        np.testing.assert_array_equal(book[book_name(name)], array)


def test_where_queries_keys_and_values_end_up():
    state = to_state_dict(draw_variables(TIED), TIED, "original")
    qkv = from_state_dict(state, TIED, "original")["params"]["group_0"]["block_0"]["attention"]["qkv"]
    for layer in range(2):
        for part, name in enumerate(("w_queries", "w_keys", "w_values")):
            ours = qkv["kernel"][layer][:, part].reshape(6, 6)  # [in, heads, head width] to (in, out)
            np.testing.assert_array_equal(ours.T, state[f"trf_blocks.{layer}.att.{name}.weight"])
            np.testing.assert_array_equal(
                qkv["bias"][layer][part].ravel(), state[f"trf_blocks.{layer}.att.{name}.bias"]
            )


@pytest.mark.parametrize("layout", APART)
def test_absent_biases_are_zeros(layout):
    state = to_state_dict(draw_variables(TIED, dtype=ml_dtypes.bfloat16), TIED, layout)
    parts = ("w_queries", "w_keys", "w_values", "W_query", "W_key", "W_value")
    biases = [name for name in state if name.endswith(".bias") and name.split(".")[-2] in parts]
    assert len(biases) == 6
    bare = {name: array for name, array in state.items() if name not in biases}
    variables = from_state_dict(bare, TIED, layout)
    bias = variables["params"]["group_0"]["block_0"]["attention"]["qkv"]["bias"]
    assert bias.dtype == ml_dtypes.bfloat16
    assert not np.asarray(bias).any()
    assert from_state_dict(bare, TIED, layout, np.float32)["params"]["final_norm"]["bias"].dtype == np.float32
    # A model without them is written as one whose biases are zero.
    zeros = {name: np.zeros_like(state[name]) for name in biases}
    back = to_state_dict(variables, TIED, layout)
    assert back.keys() == state.keys()
    for name, array in {**state, **zeros}.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("layout", APART)
def test_some_biases_are_not_enough(layout):
    state = to_state_dict(draw_variables(TIED), TIED, layout)
    gone = [name for name in state if name.endswith((".w_keys.bias", ".W_key.bias"))]
    for name in gone:
        del state[name]
    assert f"2 missing ({', '.join(gone)})" in refused(from_state_dict, state, TIED, layout)


@pytest.mark.parametrize("layout", APART)
def test_masks_are_passed_over(layout):
    variables = draw_variables(TIED)
    state = to_state_dict(variables, TIED, layout)
    masks = {f"trf_blocks.{layer}.att.mask": np.triu(np.ones((7, 7), np.float32), 1) for layer in range(2)}
    assert_equal_trees(from_state_dict({**masks, **state}, TIED, layout), variables)


@pytest.mark.parametrize(
    ("layout", "head", "source"), [("book", "out_head", "tok_emb"), ("original", "out", "emb_dict")]
)
def test_heads(layout, head, source):
    head, source = f"{head}.weight", f"{source}.weight"
    tied = to_state_dict(draw_variables(TIED), TIED, layout)
    np.testing.assert_array_equal(tied[head], tied[source])
    assert config_from_state_dict(tied, layout, num_attention_heads=3).tie_word_embeddings
    other = {**tied, head: tied[head] + 1}
    assert f"{head} differs from {source} although tie_word_embeddings is true" in refused(
        from_state_dict, other, TIED, layout
    )
    config = config_from_state_dict(other, layout, num_attention_heads=3)
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(
        to_state_dict(from_state_dict(other, config, layout), config, layout)[head], other[head]
    )
    # A file may keep the shared tensor by the head's name alone, as safetensors' `save_model` does.
    alone = {name: array for name, array in tied.items() if name != source}
    assert_equal_trees(from_state_dict(alone, TIED, layout), from_state_dict(tied, TIED, layout))
    # A head that begins equal may be told to go its own way.
    config = config_from_state_dict(tied, layout, num_attention_heads=3, tie_word_embeddings=False)
    assert "lm_head" in from_state_dict(tied, config, layout)["params"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_config_from_shapes(layout):
    for config in (TIED, UNTIED):
        if layout == "openai" and not config.tie_word_embeddings:
            continue
        state = to_state_dict(draw_variables(config), config, layout)
        exact = layout in ("original", "nanogpt")
        expected = dataclasses.replace(config, activation_function="gelu" if exact else "gelu_new")
        assert config_from_state_dict(state, layout, num_attention_heads=3) == expected
    given = {"num_attention_heads": 2, "activation_function": "gelu", "embd_pdrop": 0.0}
    assert dataclasses.asdict(config_from_state_dict(state, layout, **given)).items() >= given.items()


def test_the_config_from_names_without_their_prefix():
    state = to_state_dict(draw_variables(UNTIED), UNTIED)
    bare = {name.removeprefix("transformer."): array for name, array in state.items()}
    assert config_from_state_dict(bare, num_attention_heads=3) == UNTIED


def test_what_shapes_do_not_tell():
    state = to_state_dict(draw_variables(TIED), TIED, "book")
    assert refused(config_from_state_dict, state, "book") == (
        "the shapes of weights do not tell num_attention_heads; give it in the config"
    )
    assert "num_attention_heads" in refused(config_from_state_dict, state, "book", num_attention_heads=4)
    assert "GPT2Config has no field 'heads'" in refused(
        config_from_state_dict, state, "book", num_attention_heads=3, heads=3
    )
    assert "no architecture has the layout 'keras'; there are hf, " in refused(config_from_state_dict, state, "keras")
    del state["tok_emb.weight"]
    assert "not those of gpt2 in the layout 'book'" in refused(
        config_from_state_dict, state, "book", num_attention_heads=3
    )
    assert "not those of gpt2" in refused(config_from_state_dict, {}, "book", num_attention_heads=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tried", LAYOUTS)
def test_the_closest_layout_is_named(layout, tried):
    if layout == tried or {layout, tried} == {"hf", "nanogpt"}:
        return
    state = to_state_dict(draw_variables(TIED), TIED, layout)
    named = "hf" if layout == "nanogpt" else layout  # which have the same names, and other shapes
    expected = f"of {len(state)} names are those of layout={tried!r}, and {len(state)} those of layout={named!r}; pass"
    assert expected in refused(from_state_dict, state, TIED, tried)
    assert expected in refused(config_from_state_dict, state, tried, num_attention_heads=3)


@pytest.mark.parametrize(("layout", "tried"), [("nanogpt", "hf"), ("hf", "nanogpt")])
def test_of_layouts_with_the_same_names_the_shapes_tell(layout, tried):
    state = to_state_dict(draw_variables(TIED), TIED, layout)
    state.pop("lm_head.weight", None)
    message = refused(from_state_dict, state, TIED, tried)
    assert message.startswith(f"the shapes are those of layout={layout!r}; pass that (--layout {layout}); the weights ")
    state["transformer.ln_f.weight"] = np.ones(5, np.float32)
    assert "pass that" not in refused(from_state_dict, state, TIED, tried)


def test_names_of_no_architecture_are_shown():
    state = {f"encoder.{name}.weight": np.ones((2, 2), np.float32) for name in "abcd"}
    assert refused(resolve_config, None, None, state, "hf") == (
        "none of the 4 names is that of an architecture here: encoder.a.weight, encoder.b.weight, encoder.c.weight ..."
    )


@pytest.mark.parametrize("layout", ["original", "gguf"])
def test_the_closest_layout_may_be_another_architectures(layout):
    """All names of Llama's layouts are unknown to `hf`; GPT-2 shares some of `original`, and has no `gguf`."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1}
    config = Llama3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    state = to_state_dict(draw_variables(config), config, layout)
    assert f"pass that (--layout {layout})" in refused(resolve_config, None, None, state, "hf")


def test_what_is_wrong_within_the_right_layout_is_named():
    state = to_state_dict(draw_variables(TIED), TIED, "original")
    state["final_ln.scale"] = state["final_ln.scale"][:5]
    assert "final_ln.scale is [5] instead of [6]" in refused(from_state_dict, state, TIED, "original")


def test_the_originals_classifiers_are_refused():
    """Their head has a row for each class, and a bias, for which there is no place here."""
    state = to_state_dict(draw_variables(TIED), TIED, "original")
    state |= {"out.weight": np.ones((2, 6), np.float32), "out.bias": np.ones(2, np.float32)}
    for config in (TIED, config_from_state_dict(state, "original", num_attention_heads=3)):
        message = refused(from_state_dict, state, config, "original")
        assert "1 unread (out.bias)" in message and "out.weight" in message


# Files of training scripts.


@pytest.fixture(params=APART)
def checkpoint(request, tmp_path):
    """(path, layout, variables, config): a .pth file as the training scripts of both write it."""
    layout = request.param
    config = dataclasses.replace(UNTIED, activation_function="gelu" if layout == "original" else "gelu_new")
    variables = draw_variables(config)
    state = {name: torch.tensor(array) for name, array in to_state_dict(variables, config, layout).items()}
    state |= {f"trf_blocks.{layer}.att.mask": torch.ones(7, 7).triu(1) for layer in range(2)}
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / "model_and_optim_save.pth")
    return tmp_path / "model_and_optim_save.pth", layout, variables, config


def test_a_training_checkpoint(checkpoint):
    path, layout, variables, config = checkpoint
    lm = load(path, layout=layout, config={"num_attention_heads": 3})
    assert lm.config == config
    assert_equal_trees(lm.variables, variables)
    assert lm.tokenizer is None
    assert_equal_trees(load(path, layout=layout, config=config).variables, variables)


def test_a_training_checkpoint_without_what_is_needed(checkpoint):
    path, layout, _, config = checkpoint
    assert refused(load, path, layout=layout) == (
        f"{path}: has weights but no config, and their shapes do not tell num_attention_heads; "
        "put the model's config.json beside them, or pass config={'num_attention_heads': ...} in Python or, to "
        "convert.from_hf, --config num_attention_heads=..."
    )
    for given in (None, config, {"num_attention_heads": 3}):
        message = refused(load, path, config=given)
        assert message.startswith(f"{path}: 0 of 39 names are those of layout='hf', and 39 those of layout={layout!r}")
