"""Embeddings and heads that adapters bring whole, against PEFT, on disk both ways."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.interop import config_from_hf, from_state_dict
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers import lora
from llmq_jax.models import build
from llmq_jax.objectives import NextToken
from llmq_jax.training import adamw, create_state, make_train_step
from llmq_jax.training.parts import as_read, train_adapters, whole
from tests.parity.adapters import FIELDS, adapted_by, base_pair, changed
from tests.parity.decoders import LOGITS, LOSS, draw_tokens, make_pair, their_logits
from tests.parity.references import numpy_state, randomise


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    return functools.cache(lambda model_type: base_pair(model_type, tmp_path_factory.mktemp("base")))


@pytest.mark.filterwarnings("ignore")
def test_a_classifiers_head_goes_along(tmp_path):
    fields = FIELDS["llama"] | {"num_labels": 3, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model("llama", **fields)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "base")
    our_config = config_from_hf(config.to_dict() | {"architectures": ["LlamaForSequenceClassification"]})
    lm = LanguageModel(our_config, build(our_config), from_state_dict(numpy_state(theirs), our_config))
    spec = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    adapted = adapted_by(theirs, spec)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(1, 61, (3, 9))
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor(tokens)).logits.numpy()
    ours = lq.load_adapter(lm, tmp_path / "theirs")
    np.testing.assert_allclose(ours.classify(tokens), expected, atol=LOGITS, rtol=0)
    written = json.loads((lq.save_adapter(ours, tmp_path / "ours") / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["score"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(input_ids=torch.tensor(tokens)).logits, expected, atol=LOGITS, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_at_the_head_comes_with_its_matrix(pair_of, tmp_path):
    """PEFT writes it beside the adapter, and puts it in the place of the base's."""
    anew, lm = pair_of("llama")
    spec = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = adapted_by(anew(), spec)
    tokens = draw_tokens(lm)
    for name, factor in (("same", 1.0), ("other", 1.25)):
        with torch.no_grad():
            adapted.base_model.model.lm_head.base_layer.weight.mul_(factor)
        adapted.save_pretrained(tmp_path / name)
        back = peft.PeftModel.from_pretrained(anew(), tmp_path / name).eval()
        expected = their_logits(back, tokens)
        np.testing.assert_allclose(their_logits(adapted, tokens), expected, atol=1e-6, rtol=0)
        ours = lq.load_adapter(lm, tmp_path / name)
        np.testing.assert_allclose(ours.logits(tokens), expected, atol=LOGITS, rtol=0)
        lq.save_adapter(ours, tmp_path / f"ours {name}")
        back = peft.PeftModel.from_pretrained(anew(), tmp_path / f"ours {name}").eval()
        np.testing.assert_allclose(their_logits(back, tokens), expected, atol=LOGITS, rtol=0)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.25 is left out at lm_head"):
        ours = lq.load_adapter(lm, changed(tmp_path / "same", tmp_path / "dropping", {"lora_dropout": 0.25}))
    at = {path[0] for path, (_, fixed) in lora.adapters(ours.variables).items() if "dropout" in fixed}
    assert at == {"group_0"}


def with_whole(anew, fields, more_tokens=0):
    """(a function that gives the base as the adapter knows it, PEFT's model), whose whole matrices differ, too."""

    def resized():
        base = anew()
        if more_tokens:
            base.resize_token_embeddings(base.config.vocab_size + more_tokens, mean_resizing=False)
        return base

    torch.manual_seed(0)
    base = resized()
    with torch.no_grad():
        spec = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
        adapted = adapted_by(base, peft.LoraConfig(**(spec | fields)))
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "lora_embedding_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return resized, adapted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "fields", "more_tokens", "whole", "tied"),
    [
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, 3, ["lm_head", "token_embedding"], False),
        ("gemma2", {}, 3, ["token_embedding"], True),
        pytest.param(
            "gemma2", {"modules_to_save": ["embed_tokens"]}, 0, ["token_embedding"], False, marks=pytest.mark.exhaustive
        ),
        ("gemma2", {"modules_to_save": ["lm_head"]}, -3, ["lm_head", "token_embedding"], False),
        pytest.param(
            "gemma2",
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            0,
            ["token_embedding"],
            True,
            marks=pytest.mark.exhaustive,
        ),
        ("gemma2", {"target_modules": ["q_proj", "embed_tokens"]}, 0, ["token_embedding"], False),
        pytest.param("gemma2", {"target_modules": ["q_proj", "lm_head"]}, 0, [], False, marks=pytest.mark.exhaustive),
    ],
)
def test_embeddings_and_heads_that_come_whole(pair_of, tmp_path, model_type, fields, more_tokens, whole, tied):
    """Of a tied base PEFT trains the one and leaves the other, so that they are two; unless it is told not to."""
    anew, lm = pair_of(model_type)
    resized, adapted = with_whole(anew, fields, more_tokens)
    resized().save_pretrained(tmp_path / "resized")
    anew().save_pretrained(tmp_path / "base")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")  # PEFT looks at its vocabulary
    adapted.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size + more_tokens, (2, 9))
    expected = their_logits(peft.PeftModel.from_pretrained(resized(), tmp_path / "theirs").eval(), tokens)
    np.testing.assert_array_equal(expected, their_logits(adapted, tokens))
    ours = lq.load_adapter(lm, tmp_path / "theirs")
    assert ours.config.vocab_size == lm.config.vocab_size + more_tokens
    assert sorted(ours.variables["lora_fixed"].get("whole", {})) == whole
    assert ours.config.tie_word_embeddings == tied
    names = {"embed_tokens": "token_embedding", "lm_head": "lm_head"}
    assert lora.trained_whole(ours.variables) == {
        names[module.split(".")[-1]] for module in fields.get("modules_to_save", ())
    }
    np.testing.assert_allclose(ours.logits(tokens), expected, atol=LOGITS, rtol=0)

    # A run, and a folder of ours, keep what came with the adapters.
    kept = lq.load(lq.model_files.save(ours, tmp_path / "own"))
    lq.save_adapter(kept, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(resized(), tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(back, tokens), expected, atol=LOGITS, rtol=0)
    again = lq.load_adapter(lm, tmp_path / "ours")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    assert "lora_fixed" not in lq.merge(ours).variables


@pytest.mark.filterwarnings("ignore")
def test_copies_that_have_not_learned_yet_train_on(pair_of, tmp_path):
    """Those of an adapter that was saved before its first step equal the base's."""
    anew, lm = pair_of("llama")
    spec = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted_by(anew(), spec).save_pretrained(tmp_path / "theirs")
    ours = lq.load_adapter(lm, tmp_path / "theirs")
    assert lora.trained_whole(ours.variables) == {"token_embedding", "lm_head"}
    jax.tree.map(np.testing.assert_array_equal, ours.params, lm.params)


def next_tokens(tokens):
    """The batch in which each token but the first is learned."""
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "mask": np.ones(tokens.shape, np.float32)}
    batch["mask"][:, -1] = 0
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["embed_tokens", pytest.param("lm_head", marks=pytest.mark.exhaustive)])
def test_copies_train_on_with_their_adapters(pair_of, tmp_path, module):
    """With PEFT's gradients; those of an embedding go through the layers below the adapters."""
    anew, lm = pair_of("gemma2")
    _, adapted = with_whole(anew, {"modules_to_save": [module], "layers_to_transform": [2]})
    adapted.save_pretrained(tmp_path / "theirs")
    tokens = np.maximum(draw_tokens(lm), 1)  # PyTorch gives the row of 0, which pads, no gradient
    loss = adapted(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens), use_cache=False).loss
    loss.backward()
    ours = lq.load_adapter(lm, tmp_path / "theirs")
    model, variables, trainable = train_adapters(ours.model, ours.variables)
    assert trainable == ("params", "lora")
    batch = next_tokens(tokens)
    objective = NextToken(model)

    def our_loss(trained):
        return objective.loss(as_read({**variables, **trained}), batch, objective.weights(batch), None)[0]

    value, gradients = jax.jit(jax.value_and_grad(our_loss))({name: variables[name] for name in trainable})
    np.testing.assert_allclose(value, loss.item(), atol=LOSS, rtol=0)
    ((name, leaves),) = gradients["params"].items()
    (found,) = leaves.values()
    (expected,) = (p.grad.numpy() for name, p in adapted.named_parameters() if "modules_to_save" in name)
    found = found if name == "token_embedding" else found.T
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert np.abs(expected).max() > 1e-3


def their_matrix(adapted, module):
    (found,) = (p for name, p in adapted.named_parameters() if f"{module}.modules_to_save" in name)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "modules"),
    [(False, ["embed_tokens", "lm_head"]), (True, ["embed_tokens"]), (False, ["lm_head"]), (False, ["embed_tokens"])],
)
def test_fresh_adapters_with_whole_matrices_learn_as_there(tmp_path, tied, modules):
    """The gradients of one batch and five steps of AdamW, and what these made goes there and back. A model that has one
    matrix for embedding and head keeps it, as with ensure_weight_tying there."""
    theirs, lm = make_pair("llama", FIELDS["llama"] | {"tie_word_embeddings": tied})
    theirs.save_pretrained(tmp_path / "base")
    ours = lq.lora(lm, rank=2, targets="q_proj", layers=(1,), whole=tuple(modules))
    names = {"embed_tokens": "token_embedding", "lm_head": "lm_head"}
    assert lora.trained_whole(ours.variables) == {names[module] for module in modules}
    lq.save_adapter(ours, tmp_path / "fresh", base=str(tmp_path / "base"))
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [1], "lora_alpha": 4, "ensure_weight_tying": tied}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, modules_to_save=list(modules), **fields)).eval()
    peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(tmp_path / "fresh"))

    model, variables, trainable = train_adapters(ours.model, ours.variables)
    assert trainable == ("params", "lora")
    # Decay rates that float32 holds exactly: optax takes the powers of 0.999 in float32, whose first steps are then too
    # short by 6e-6 of themselves. Of losses that fall by 1 in a step, that is 1e-5 after five.
    optimizer = adamw(1e-2, b1=0.875, b2=1 - 2**-10, weight_decay=0.0, clip=None)
    theirs_trains = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    their_optimizer = torch.optim.AdamW(theirs_trains, lr=1e-2, betas=(0.875, 1 - 2**-10), weight_decay=0.0)
    objective, tokens = NextToken(model), draw_tokens(lm)
    batch, state = next_tokens(tokens), create_state(jax.tree.map(jnp.copy, variables), optimizer, trainable=trainable)

    def our_loss(trained):
        return objective.loss(as_read({**state.variables, **trained}), batch, objective.weights(batch), None)[0]

    gradients = jax.device_get(jax.jit(jax.grad(our_loss))(state.trained))["params"]
    step = make_train_step(objective, optimizer)
    for number in range(5):
        loss = adapted(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens), use_cache=False).loss
        their_optimizer.zero_grad()
        loss.backward()
        if number == 0:
            for module in modules:
                (found,) = gradients[names[module]].values()
                expected = their_matrix(adapted, module).grad.numpy()
                found = found if module == "embed_tokens" else found.T
                np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
        their_optimizer.step()
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss.item(), atol=LOSS, rtol=0)
    learned = ours.replace(variables=whole(state.variables))
    for module in modules:
        (found,) = learned.params[names[module]].values()
        expected = their_matrix(adapted, module).detach().numpy()
        np.testing.assert_allclose(found if module == "embed_tokens" else found.T, expected, atol=1e-4, rtol=0)
    assert np.abs(np.asarray(learned.logits(tokens)) - np.asarray(lm.logits(tokens))).max() > 0.1

    expected = learned.logits(tokens)
    np.testing.assert_allclose(their_logits(adapted, tokens), expected, atol=1e-3, rtol=0)
    lq.save_adapter(learned, tmp_path / "learned", base=str(tmp_path / "base"))
    back = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "learned").eval()
    np.testing.assert_allclose(their_logits(back, tokens), expected, atol=LOGITS, rtol=0)
    adapted.save_pretrained(tmp_path / "theirs")
    for folder, same in (("learned", LOGITS), ("theirs", 1e-3)):
        again = lq.load_adapter(lm, tmp_path / folder)
        assert again.config == lm.config
        np.testing.assert_allclose(again.logits(tokens), expected, atol=same, rtol=0)
    merged = lq.merge(learned)
    assert not merged.variables.keys() & {"lora", "lora_fixed"}
    np.testing.assert_allclose(merged.logits(tokens), expected, atol=LOGITS, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_whole_matrices_belong_to_their_adapters(pair_of, tmp_path):
    anew, lm = pair_of("llama")
    _, adapted = with_whole(anew, {"modules_to_save": ["embed_tokens"]})
    adapted.save_pretrained(tmp_path / "theirs")
    ours = lq.load_adapter(lm, tmp_path / "theirs")
    with pytest.raises(BadInput, match="has the embedding or the head of other adapters in place of its base's"):
        lq.load_adapter(ours, tmp_path / "theirs")
    with_whole(anew, {"modules_to_save": ["embed_tokens", "lm_head"]})[1].save_pretrained(tmp_path / "both")
    for number, adapter in enumerate((ours, lq.load_adapter(lm, tmp_path / "both"))):
        classifier = lq.with_classifier(adapter, ("a", "b"))
        lq.save_adapter(classifier, tmp_path / f"classifier {number}")
        of_base = lq.load_adapter(lq.with_classifier(lm, ("a", "b")), tmp_path / f"classifier {number}")
        jax.tree.map(np.testing.assert_array_equal, of_base.params, classifier.params)
    more = {name: np.ones((64, 32), np.float32) for name in ("model.embed_tokens", "lm_head")}
    more = {f"base_model.model.{name}.weight": matrix for name, matrix in more.items()}
    changed(tmp_path / "both", tmp_path / "longer", {}, lambda state: state | more)
    with pytest.raises(BadInput, match="a language model's head, and this is a classifier: load it onto the language"):
        lq.load_adapter(lq.with_classifier(lm, ("a", "b")), tmp_path / "both")
    longer = lq.load_adapter(lm, tmp_path / "longer")
    with pytest.raises(BadInput, match=r"a token_embedding .*\(64, 32\)}, where this model has .*\(61, 32\)"):
        lq.unmerge(lm, longer)
    back = lq.unmerge(lq.merge(ours), ours)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=0), back.variables, ours.variables)
    name = "base_model.model.model.embed_tokens.weight"
    for size, message in (
        ((61, 16), r"is \[61, 16\] instead of \[v, 32\]"),
        ((64, 32), "a head of 61; save the adapter"),
    ):
        wrong = changed(tmp_path / "theirs", tmp_path / f"{size}", {}, lambda s, size=size: s | {name: np.zeros(size)})
        with pytest.raises(BadInput, match=message):
            lq.load_adapter(lm, wrong)
