"""The filters and the penalty on repetition against transformers' logits processors, in transformers' order."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmq_jax.generation import Sampler, generate
from tests.parity.decoders import make_pair


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.7, 20, 0.9, 0.05),
        (1.3, 0, 0.8, 0.0),
        (1.0, 5, 1.0, 0.2),
        (2.0, 50, 0.95, 0.1),
        (0.5, 0, 1.0, 0.3),
        (0.8, 0, 0.0, 0.0),
    ],
)
def test_filters_equal_transformers(temperature, top_k, top_p, min_p):
    logits = (3 * np.random.default_rng(0).normal(size=(16, 101))).astype(np.float32)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    theirs = LogitsProcessorList(warpers)(None, torch.tensor(logits)).numpy()
    ours = np.asarray(Sampler(temperature, top_k, top_p, min_p).filter(jnp.asarray(logits)))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_on_repetition_equals_transformers(penalty):
    rng = np.random.default_rng(1)
    logits = (3 * rng.normal(size=(16, 401))).astype(np.float32)
    logits[:, ::7] = 0.0
    text = rng.integers(0, 401, (16, 300))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, text, True, axis=1)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(text), torch.tensor(logits)).numpy()
    ours = Sampler(repetition_penalty=penalty).penalise(jnp.asarray(logits), jnp.asarray(seen))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


SIZES = {
    "gpt2": {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {
        "max_position_embeddings": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 56,
    },
}


@pytest.fixture(scope="module", params=SIZES)
def pair(request):
    return make_pair(request.param, {"vocab_size": 301, **SIZES[request.param]})


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_tokens_with_a_penalty_equal_transformers(pair, penalty):
    """Each prompt of a batch, as transformers continues it alone: there, padding counts as a token that was said."""
    theirs, ours = pair
    tokens = np.random.default_rng(2).integers(0, 301, 60).tolist()
    prompts = [tokens[:9], tokens[9:10], tokens[10:50]]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = generate(ours, prompts, 40, Sampler(temperature=0.0), stop=()).tokens
    found = generate(ours, prompts, 40, Sampler(temperature=0.0, repetition_penalty=penalty), stop=()).tokens
    for row, prompt in enumerate(prompts):
        said = theirs.generate(torch.tensor([prompt]), repetition_penalty=penalty, **options)
        np.testing.assert_array_equal(found[row], said[0, len(prompt) :].numpy())
    assert (found != plain).any()
