"""The filters against transformers' logits processors, in transformers' order."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmq_jax.generation import Sampler


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.7, 20, 0.9, 0.05), (1.3, 0, 0.8, 0.0), (1.0, 5, 1.0, 0.2), (2.0, 50, 0.95, 0.1), (0.5, 0, 1.0, 0.3)],
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
