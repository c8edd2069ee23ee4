"""LanguageModel: what it accepts, what it refuses, and what can be loaded."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.data.tokenizers import ByteTokenizer
from llmq_jax.errors import BadInput
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load, save
from llmq_jax.models import build
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.objectives import NextToken
from llmq_jax.training import RunOptions, create_state, make_eval_step, make_train_step, run
from llmq_jax.training.checkpoints import Checkpoints
from llmq_jax.training.run_folder import RunFolder
from llmq_jax.weight_digest import weight_digest
from tests.interop.refusals import refused
from tests.weights import draw_variables

CONFIG = GPT2Config(
    vocab_size=257, max_position_embeddings=8, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
)


@pytest.fixture(scope="module")
def lm():
    generation = GenerationConfig(eos_token_id=(256, 10), pad_token_id=0, other={"top_k": 5})
    return LanguageModel(CONFIG, build(CONFIG), draw_variables(CONFIG, seed=1), ByteTokenizer(), generation)


@pytest.mark.parametrize(
    "function",
    [
        "lora",
        "merge",
        "load_adapter",
        "save",
        "save_hf",
        "save_adapter",
        "with_classifier",
        "with_config",
        "add_tokens",
    ],
)
def test_a_name_where_a_model_is_wanted_is_told_how_to_load_it(function, tmp_path):
    arguments = () if function in ("lora", "merge") else (tmp_path / "new",)
    with pytest.raises(
        BadInput, match=r"'gpt2' stands where a loaded model is wanted; give what lq.load\('gpt2'\) ret"
    ):
        inspect.unwrap(getattr(lq, function))("gpt2", *arguments)
    assert not (tmp_path / "new").exists()


USES = {
    "logits": lambda lm, folder: lm.logits([[1, 2]]),
    "generate": lambda lm, folder: lq.generate(lm, "a", 2),
    "a draft": lambda lm, folder: lq.generate(load_copy(lm), "a", 2, draft=lm),
    "save": lambda lm, folder: save(lm, folder),
    "save_hf": lambda lm, folder: save_hf(lm, folder),
    "lora": lambda lm, folder: lq.lora(lm, rank=2),
    "merge": lambda lm, folder: lq.merge(lm),
    "unmerge": lambda lm, folder: lq.unmerge(lm, lq.lora(load_copy(lm), rank=2)),
    "to_state_dict": lambda lm, folder: lq.interop.to_state_dict(lm.variables, lm.config),
    "create_state": lambda lm, folder: create_state(lm.variables, optax.sgd(0.1)),
    "apply": lambda lm, folder: lm.model.apply(lm.variables, jnp.ones((1, 2), int)),
    "sliced": lambda lm, folder: lm.sliced(1),
    "weight_digest": lambda lm, folder: weight_digest(lm.variables),
    "evaluate": lambda lm, folder: make_eval_step(NextToken(lm.model))(lm.variables, BATCH),
}
IDS = jnp.array([[1, 2, 3]])
BATCH = {"tokens": IDS, "targets": IDS, "mask": jnp.ones(IDS.shape)}


def load_copy(lm):
    return lm.replace(variables=draw_variables(lm.config, seed=1))


@pytest.fixture(scope="module")
def trained(lm):
    """(the model that a step was made from, the state that it returned)."""
    consumed, optimizer = load_copy(lm), optax.sgd(0.1)
    step = make_train_step(NextToken(consumed.model), optimizer)
    return consumed, step(create_state(consumed.variables, optimizer), BATCH)[0]


@pytest.mark.parametrize("use", USES)
def test_a_model_whose_weights_a_step_has_consumed_says_so(trained, use, tmp_path):
    consumed, state = trained
    with pytest.raises(
        BadInput, match=r"(this model|the draft)'s weights are gone: .*; go on with .*variables=state\.variables"
    ):
        USES[use](consumed, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    USES[use](consumed.replace(variables=jax.tree.map(jnp.copy, state.variables)), tmp_path / "new")


def test_a_model_with_adapters_whose_weights_are_gone_can_be_shown(lm):
    plain, adapted = repr(lm), lq.lora(load_copy(lm), rank=2)
    assert "adapters of" in repr(adapted)
    jax.tree.map(lambda leaf: leaf.delete(), adapted.variables)
    assert repr(adapted) == f"{plain[:-1]}, weights gone in training)"


def test_a_state_that_a_step_has_consumed_says_so(lm):
    optimizer = optax.sgd(0.1)
    step, state = make_train_step(NextToken(lm.model), optimizer), create_state(load_copy(lm).variables, optimizer)
    step(state, BATCH)
    for use in (step, lambda state, batch: run(state, step, [batch], RunOptions(steps=1))):
        with pytest.raises(BadInput, match=r"has consumed this state.*: state, metrics = train_step\(state, batch\)$"):
            use(state, BATCH)


def assert_same_variables(left, right):
    jax.tree.map(np.testing.assert_array_equal, left.variables, right.variables)


def test_logits_are_those_of_the_model(lm):
    tokens = [[1, 2, 3, 4], [5, 6, 7, 8]]
    logits = lm.logits(tokens)
    assert logits.shape == (2, 4, 257)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, lm.model.apply(lm.variables, jnp.array(tokens)), atol=1e-6)
    np.testing.assert_array_equal(lm.logits(np.array(tokens, np.uint16)), logits)
    np.testing.assert_array_equal(lm.logits(jnp.array(tokens)), logits)
    assert lm.hidden(tokens).shape == (2, 4, 12)


def test_lengths_hide_what_follows(lm):
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    other = np.array([[1, 2, 9, 9], [5, 6, 7, 8]])
    np.testing.assert_array_equal(lm.logits(tokens, lengths=[2, 4])[0, :2], lm.logits(other, lengths=[2, 4])[0, :2])
    np.testing.assert_allclose(lm.logits(tokens, lengths=[2, 4])[1], lm.logits(tokens)[1], atol=1e-6)


def test_compiled_once_for_each_shape(lm):
    from llmq_jax.language_model import _apply

    lm.logits([[1, 2, 3]])
    before = _apply._cache_size()
    lm.logits([[4, 5, 6]])
    lm.replace(variables=jax.tree.map(jnp.zeros_like, lm.variables)).logits([[4, 5, 6]])
    assert _apply._cache_size() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [[1, 2], [3, 257]]}, "tokens[1, 1] is 257, outside the vocabulary of 257 ids"),
        ({"tokens": [[-1]]}, "tokens[0, 0] is -1, outside the vocabulary"),
        ({"tokens": np.array([[2**32 + 1]])}, "tokens hold 4294967297, which is no id, length or position"),
        ({"tokens": np.array([[2**63]], np.uint64)}, "tokens hold 9223372036854775808, which is no id"),
        ({"tokens": [[1]], "segment_ids": [[2**32]]}, "segment_ids hold 4294967296"),
        ({"tokens": [1, 2]}, "tokens must be [B, T] and not empty, but have the shape [2]"),
        ({"tokens": "text"}, "tokens must be integers, not text; lm.tokenizer.encode(text) gives the ids of a row"),
        ({"tokens": ["text"]}, "tokens must be integers, not text;"),
        ({"tokens": [[]]}, "tokens must be [B, T] and not empty"),
        ({"tokens": [[1, 2], [3]]}, "tokens are rows of unequal length"),
        ({"tokens": [[1.0]]}, "tokens must be integers, not float64"),
        ({"tokens": [[0] * 9]}, "position 8 is outside the model's 8 (max_position_embeddings)"),
        ({"tokens": [[1]], "positions": [[8]]}, "position 8 is outside the model's 8"),
        ({"tokens": [[1]], "positions": [[-1]]}, "position -1 is outside the model's 8"),
        (
            {"tokens": [[1, 2]], "positions": [[0]]},
            "positions have the shape [1, 1], which does not fit tokens: [1, 2]",
        ),
        ({"tokens": [[1, 2]], "lengths": [3]}, "lengths must lie between 0 and 2"),
        ({"tokens": [[1, 2]], "lengths": [-1]}, "lengths must lie between 0 and 2"),
        ({"tokens": [[1, 2]], "lengths": [1, 1]}, "lengths have the shape [2], which does not fit tokens: [1]"),
        ({"tokens": [[1, 2]], "lengths": [1], "segment_ids": [[1, 0]]}, "give one of them"),
        ({"tokens": [[0] * 12], "segment_ids": [[1] * 9 + [2] * 3]}, "position 8 is outside the model's 8"),
    ],
)
def test_bad_input(lm, arguments, message):
    assert message in refused(lm.logits, **arguments)


def test_a_row_may_be_longer_than_the_context_when_its_documents_are_not(lm):
    tokens = np.arange(12)[None]
    packed = lm.logits(tokens, segment_ids=[[1] * 7 + [2] * 5])
    np.testing.assert_allclose(packed[:, 7:], lm.logits(tokens[:, 7:]), atol=1e-5)


def test_positions_go_forward_in_a_document(lm):
    tokens = [[1, 2, 3, 4, 5]]
    apart = lm.logits(tokens, positions=[[0, 1, 0, 1, 2]], segment_ids=[[1, 1, 2, 2, 2]])
    np.testing.assert_allclose(apart[0, 2:], lm.logits([[3, 4, 5]])[0], atol=1e-5)
    # Those of padding may be any, and a document's may stay.
    padded = lm.logits([[9, 9, 3, 4, 5]], positions=[[1, 0, 0, 0, 1]], segment_ids=[[0, 0, 1, 1, 1]])
    np.testing.assert_allclose(padded[0, 2:], lm.logits([[3, 4, 5]], positions=[[0, 0, 1]])[0], atol=1e-5)
    with pytest.raises(BadInput, match=r"positions\[0, 2\] is 0, after 1 in the same document; .* segment_ids"):
        lm.logits(tokens, positions=[[0, 1, 0, 1, 2]])


def test_replace(lm):
    zeros = lm.replace(variables=jax.tree.map(jnp.zeros_like, lm.variables))
    assert not zeros.logits([[1]]).any()
    assert lm.logits([[1]]).any()
    exact = dataclasses.replace(CONFIG, activation_function="gelu")
    assert lm.replace(config=exact).model.config == exact
    assert lm.params is lm.variables["params"]


def test_a_config_that_the_weights_do_not_fit(lm):
    wider = dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + 3)
    message = (
        rf"^params/token_embedding/embedding is \[{CONFIG.vocab_size}, {CONFIG.hidden_size}\], and "
        rf"\[{wider.vocab_size}, {CONFIG.hidden_size}\] by the config that was given; lq.with_config\(lm, config\) "
    )
    with pytest.raises(BadInput, match=message):
        lm.replace(config=wider)
    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    with pytest.raises(BadInput, match=r"params/lm_head/kernel is absent, and \["):
        lm.replace(config=untied)
    assert lm.replace(config=wider, variables=draw_variables(wider)).config == wider


def test_a_representation_that_fits_on_a_line(lm):
    count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    assert repr(lm) == f"LanguageModel(gpt2, {count:,} parameters in float32, tokenizer bytes)"


def test_save_and_load(lm, tmp_path):
    folder = save(lm, tmp_path / "saved")
    loaded = load(folder)
    assert_same_variables(loaded, lm)
    assert loaded.config == lm.config
    assert loaded.generation == lm.generation
    assert loaded.tokenizer.encode("é") == [0xC3, 0xA9]
    with pytest.raises(BadInput, match="is not empty; name another folder, or replace"):
        save(lm, folder)
    bare = load(save(lm.replace(tokenizer=None), tmp_path / "bare"))
    assert bare.tokenizer is None
    assert bare.generation == lm.generation


def test_a_save_replaces_an_earlier_one_and_nothing_else(lm, tmp_path):
    folder = save(lm, tmp_path / "saved")
    doubled = lm.replace(variables=jax.tree.map(lambda x: 2 * x, lm.variables))
    assert_same_variables(load(save(doubled, folder, overwrite=True)), doubled)
    (folder / "checkpoints" / "00000100").mkdir()
    with pytest.raises(BadInput, match="checkpoints: holds 00000100, so it is no earlier export"):
        save(lm, folder, overwrite=True)
    (folder / "checkpoints" / "00000100").rename(folder / "notes")
    with pytest.raises(BadInput, match="saved: holds notes, so it is no earlier export"):
        save(lm, folder, overwrite=True)
    assert_same_variables(load(folder), doubled)


def test_nothing_is_left_of_a_save_that_failed(lm, tmp_path, monkeypatch):
    class Full(ByteTokenizer):
        def files(self):
            raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    for name in ("saved", "empty"):
        with pytest.raises(OSError, match="No space left"):
            save(lm.replace(tokenizer=Full()), tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    assert load(save(lm, tmp_path / "saved")).config == lm.config


@pytest.mark.parametrize("write", [save, save_hf])
def test_the_tokenizer_is_known_again(lm, tmp_path, write):
    loaded = load(write(lm, tmp_path / "mine")).tokenizer
    assert (type(loaded), loaded.name) == (ByteTokenizer, "bytes")


def test_a_tokenizer_of_others_is_named_by_its_folder(lm, tmp_path):
    first = save_hf(lm, tmp_path / "first")
    (first / "chat_template.jinja").write_text("{{ messages }}")
    assert repr(load(first)).endswith("tokenizer first)")
    ours = save(load(first), tmp_path / "ours")
    assert repr(load(ours)).endswith("tokenizer ours)")
    assert (save_hf(load(ours), tmp_path / "again") / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_run_stands_for_its_newest_checkpoint(lm, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    newer = jax.tree.map(lambda leaf: leaf + 1, lm.variables)
    for step, variables in ((10, lm.variables), (20, newer)):
        state = {"step": jnp.int32(step), "variables": variables, "optimizer_state": {"count": jnp.int32(step)}}
        checkpoints.save(step, state, model_config=CONFIG, tokenizer=lm.tokenizer)
    assert_same_variables(load(tmp_path), lm.replace(variables=newer))
    assert_same_variables(load(checkpoints.path(10)), lm)
    # Its texts end where its tokenizer says.
    assert load(tmp_path).generation == GenerationConfig(eos_token_id=(256,))


def test_types(lm, tmp_path):
    save(lm, tmp_path / "saved")
    assert load(tmp_path / "saved", dtype="bfloat16").params["final_norm"]["bias"].dtype == ml_dtypes.bfloat16
    narrow = save(load(tmp_path / "saved", dtype=jnp.bfloat16), tmp_path / "narrow")
    assert load(narrow).params["final_norm"]["bias"].dtype == ml_dtypes.bfloat16
    for kind in ("int32", "float8_e4m3fn"):  # weights in float8 would want scales beside them
        with pytest.raises(BadInput, match=f"dtype='{kind}' is not a floating type of 2 bytes or more"):
            load(tmp_path / "saved", dtype=kind)
        with pytest.raises(BadInput, match=f"dtype='{kind}' is not a floating type of 2 bytes or more"):
            save_hf(lm, tmp_path / "float8", dtype=kind)


def test_a_given_config_takes_the_place_of_the_checkpoint_s(lm, tmp_path):
    save(lm, tmp_path)
    exact = dataclasses.replace(CONFIG, activation_function="gelu")
    assert load(tmp_path, config=exact).config == exact
    assert load(tmp_path, config={"activation_function": "gelu"}).config == exact
    with pytest.raises(
        BadInput, match=r"params/token_embedding/embedding is \[257, 12\], and \[99, 12\] by the config"
    ):
        load(tmp_path, config=dataclasses.replace(CONFIG, vocab_size=99))
    with pytest.raises(BadInput, match=r"params/lm_head/kernel is absent, and \[12, 257\] by the config"):
        load(tmp_path, config=dataclasses.replace(CONFIG, tie_word_embeddings=False))


def test_an_option_without_effect(lm, tmp_path):
    with pytest.raises(BadInput, match="layout='book' would have no effect"):
        load(save(lm, tmp_path / "saved"), layout="book")


def test_what_cannot_be_loaded_is_described(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for name in "abcdef":
        (tmp_path / "other" / f"{name}.txt").write_text("")
    RunFolder(tmp_path / "run", {"lr": 1}).close()
    for path, found in (
        (tmp_path / "run", "the folder of a run without a checkpoint"),
        (tmp_path / "empty", "an empty folder"),
        (tmp_path / "other", "a folder with a.txt, b.txt, c.txt, d.txt and 2 more"),
        (tmp_path / "other" / "a.txt", "a .txt file"),
    ):
        assert refused(load, path).startswith(f"{path}: is {found}, not a model; give a Hugging Face folder")


def test_a_preset_is_no_model():
    with pytest.raises(BadInput, match="gpt2-124m: is a preset"):
        load("gpt2-124m")


def test_a_checkpoint_of_another_version(lm, tmp_path):
    Checkpoints(tmp_path / "checkpoints").save(
        0, {"variables": lm.variables}, model_config={"model_type": "gpt2", "zap": 1}
    )
    with pytest.raises(BadInput, match=r"or names what a script registers .*'zap'.*own_model\.md"):
        load(tmp_path)
    scored = {"model_type": "gpt2", "experts": {"score": "zap"}}
    Checkpoints(tmp_path / "a" / "checkpoints").save(0, {"variables": lm.variables}, model_config=scored)
    with pytest.raises(BadInput, match=r"what a script registers .*'zap' is none of softmax, sigmoid.*own_model\.md"):
        load(tmp_path / "a")
    Checkpoints(tmp_path / "b" / "checkpoints").save(0, {"variables": lm.variables}, model_config={"model_type": "zap"})
    with pytest.raises(BadInput, match=r"model_type 'zap' is none of gpt2.*own_model\.md"):
        load(tmp_path / "b")


def test_from_hugging_face_and_back_through_our_own_format(lm, tmp_path):
    first = save_hf(lm, tmp_path / "first")
    second = save_hf(load(save(load(first), tmp_path / "ours")), tmp_path / "second")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert json.loads((second / "generation_config.json").read_text())["eos_token_id"] == [256, 10]
