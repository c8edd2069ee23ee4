"""DeepSeek V3 against transformers' DeepseekV3ForCausalLM and MtpModel: all that decoders have in common, and the
modules of multi-token prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_layers import MtpModel

from llmq_jax.interop import config_from_hf, from_state_dict, to_state_dict
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import build, override
from llmq_jax.objectives.multi_token import MultiToken
from tests.parity.decoders import (
    LOGITS,
    LOSS,
    SameAsTransformers,
    assert_same_gradients_by_name,
    assert_same_logits,
    assert_same_loss_and_gradients,
    draw_tokens,
    make_pair,
    packed,
)
from tests.parity.references import assert_same_gradients, config_of_transformers, numpy_state, randomise

# Widths of experts are multiples of 8: torch multiplies the experts' matrices in bfloat16 only then.
SIZES = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_nextn_predict_layers": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}
PAIRS = {"compressed queries, groups, yarn": SIZES | {"rope_parameters": YARN}}
# Every field away from its default: direct queries, no groups.
OTHER = SIZES | {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 0.7,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 20,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    "rope_interleave": False,
    "attention_bias": True,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return make_pair("deepseek_v3", PAIRS[request.param])


class TestDeepSeek(SameAsTransformers):
    pass


@pytest.mark.parametrize(
    "fields",
    [OTHER, SIZES | {"first_k_dense_replace": 0, "num_hidden_layers": 2}],
    ids=["direct queries, no groups", "experts in every layer"],
)
def test_other_configs(fields):
    pair = make_pair("deepseek_v3", fields)
    assert_same_logits(pair)
    assert_same_loss_and_gradients(pair)


def test_the_bias_for_selection_is_read_and_matters(pair):
    _, ours = pair
    bias = jax.tree.leaves(ours.variables["router"])
    assert all(np.abs(leaf).max() > 0.01 for leaf in bias)
    plain = {**ours.variables, "router": jax.tree.map(jnp.zeros_like, ours.variables["router"])}
    tokens = draw_tokens(ours)
    assert np.abs(ours.replace(variables=plain).logits(tokens) - ours.logits(tokens)).max() > 100 * LOGITS


DEPTH, COEFFICIENT = 2, 0.5


@pytest.fixture(scope="module")
def with_modules():
    """(transformers' model, its MtpModel, ours with the weights of both)."""
    fields = SIZES | {"rope_parameters": YARN, "num_nextn_predict_layers": DEPTH}
    config = transformers.AutoConfig.for_model("deepseek_v3", **fields, bos_token_id=0, eos_token_id=0)
    main = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(main)
    modules = MtpModel(main, DEPTH).eval()
    randomise(modules.layers)
    ours = config_from_hf(config.to_dict())
    state = numpy_state(main) | saved_names(modules.layers.state_dict(), config.num_hidden_layers)
    return main, modules, LanguageModel(ours, build(ours), from_state_dict(state, ours))


def saved_names(tensors, first):
    """As checkpoints name them: modules are layers after the last."""
    names = {}
    for name, tensor in tensors.items():
        depth, _, rest = name.partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        names[f"model.layers.{first + int(depth)}.{rest}"] = tensor.numpy()
    return names


def their_mtp_logits(main, modules, tokens):
    """Of each depth, at all places that have a token to see."""
    ids = torch.tensor(tokens)
    hidden = main.base_model(input_ids=ids).last_hidden_state
    logits = []
    for k in range(1, DEPTH + 1):
        count = ids.shape[1] - k
        positions = torch.arange(k, ids.shape[1])[None].expand(len(ids), -1)
        hidden = modules.forward_layer(k - 1, hidden[:, :count], positions, None, input_ids=ids[:, k:])
        logits.append(main.lm_head(hidden))
    return logits


def test_mtp_logits(with_modules):
    main, modules, ours = with_modules
    tokens = draw_tokens(ours)
    with torch.no_grad():
        expected = their_mtp_logits(main, modules, tokens)
    found = ours.mtp_logits(tokens)
    assert [logits.shape for logits in found] == [(3, 40 - k, 101) for k in (1, 2)]
    for ours_at, theirs_at in zip(found, expected, strict=True):
        assert theirs_at.std() > 1
        np.testing.assert_allclose(ours_at, theirs_at.numpy(), rtol=0, atol=LOGITS)


def test_mtp_loss_and_gradients(with_modules):
    """Of the whole objective: transformers has no working loss of its modules, the formula is written out."""
    main, modules, ours = with_modules
    tokens = draw_tokens(ours)
    main.zero_grad()
    modules.zero_grad()
    ids = torch.tensor(tokens)

    def cross_entropy(logits, distance):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, distance + 1 :].flatten())

    ahead = their_mtp_logits(main, modules, tokens)
    terms = [cross_entropy(logits, k) for k, logits in enumerate(ahead, start=1)]
    expected = cross_entropy(main(input_ids=ids).logits, 0) + COEFFICIENT / DEPTH * sum(terms)
    expected.backward()

    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.roll(tokens, -1, axis=1), "mask": jnp.asarray(mask)}
    # Without the balance loss, which is ours alone.
    objective = MultiToken(build(override(ours.config, balance=None)), COEFFICIENT)
    weights = objective.weights(batch, 0)

    @jax.jit
    def loss_and_gradients(variables):
        compute = jax.value_and_grad(lambda v: objective.loss(v, batch, weights, jax.random.key(0))[:2], has_aux=True)
        return compute(variables)

    (loss, metrics), gradients = loss_and_gradients(ours.variables)
    assert abs(float(loss) - expected.item()) < LOSS
    for k, term in enumerate(terms, start=1):
        assert abs(float(metrics[f"mtp_{k}_loss"]) - term.item()) < LOSS
    # A gradient on every parameter of every module, and the same.
    first = ours.config.num_hidden_layers
    found = to_state_dict(gradients, ours.config)
    theirs = {name: parameter.grad for name, parameter in modules.layers.named_parameters()}
    theirs = split_experts(saved_names(theirs, first))
    of_modules = {name: found[name] for name in theirs}
    assert_same_gradients(of_modules, theirs)
    without = dict(gradients)
    without["params"] = {name: leaf for name, leaf in gradients["params"].items() if name != "mtp"}
    without["router"] = {name: leaf for name, leaf in gradients["router"].items() if name != "mtp"}
    assert_same_gradients_by_name(without, override(ours.config, num_nextn_predict_layers=0), main)


def split_experts(names):
    """Fused experts as files hold them."""
    split = {}
    for name, tensor in names.items():
        prefix, fused, kind = name.partition(".experts.")
        if not fused or "shared" in prefix:
            split[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down": matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate", "up"), np.split(matrix, 2), strict=True))
            for part, value in parts.items():
                split[f"{prefix}.experts.{expert}.{part}_proj.weight"] = value
    return split


def test_modules_see_no_further_than_their_document(with_modules):
    """What a packed row gives is what its documents give alone."""
    _, _, ours = with_modules
    tokens, segment_ids, _ = packed(ours)
    whole = ours.mtp_logits(tokens, segment_ids=segment_ids)
    # With padding after it: one program for both.
    first = np.roll(tokens, -5, axis=1)
    alone = ours.mtp_logits(first, lengths=[20] * len(first))
    for k, (row, document) in enumerate(zip(whole, alone, strict=True), start=1):
        expected = np.asarray(document)[1, : 20 - k]
        np.testing.assert_allclose(np.asarray(row)[1, 5 : 25 - k], expected, rtol=0, atol=LOGITS)


def test_hidden_states_before_the_norm(with_modules):
    """transformers' modules, fed by hand with what stands before each norm."""
    main, modules, ours = with_modules
    tokens = draw_tokens(ours)
    ids, before = torch.tensor(tokens), []
    norms = [main.base_model.norm, *(layer.post_norm for layer in modules.layers)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0])) for norm in norms]
    with torch.no_grad():
        main.base_model(input_ids=ids)
        expected = []
        for k in range(1, DEPTH + 1):
            count = ids.shape[1] - k
            positions = torch.arange(k, ids.shape[1])[None].expand(len(ids), -1)
            fed = before[-1][:, :count]
            expected.append(main.lm_head(modules.forward_layer(k - 1, fed, positions, None, input_ids=ids[:, k:])))
    for hook in hooks:
        hook.remove()
    other = ours.replace(config=override(ours.config, mtp_hidden="before_norm"))
    np.testing.assert_array_equal(other.logits(tokens), ours.logits(tokens))
    for found, theirs in zip(other.mtp_logits(tokens), expected, strict=True):
        np.testing.assert_allclose(found, theirs.numpy(), rtol=0, atol=LOGITS)
    assert np.abs(other.mtp_logits(tokens)[0] - ours.mtp_logits(tokens)[0]).max() > 100 * LOGITS


def test_exported_config_is_understood_by_transformers():
    ours = config_from_hf({"model_type": "deepseek_v3"} | OTHER)
    ours = override(ours, num_nextn_predict_layers=2, attention_dropout=0.25, initializer_range=0.5, balance=None)
    again = config_from_hf(config_of_transformers(ours, "num_nextn_predict_layers").to_dict())
    assert override(again, balance=None) == ours
