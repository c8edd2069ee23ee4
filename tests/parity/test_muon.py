"""Updates by Muon equal those of torch.optim.Muon and AdamW on the tensors of the PyTorch model, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from llmq_jax.interop import to_state_dict
from llmq_jax.training.optimizer import muon
from tests.mesh_program import CONFIGS, drawn

RATE, DECAY, CLIP, STEPS = 2e-2, 0.1, 1.0, 4


def matrices(name, array):
    """The matrices that a tensor of a file consists of; [] where it is none that Muon updates."""
    if array.ndim < 2 or any(word in name for word in ("embed", "wte", "wpe", "lm_head", "score")):
        return []
    if "c_attn" in name:
        return np.split(array, 3, axis=1)
    assert array.ndim == 2, name
    return [array]


def after_torch(start, gradients):
    """Every tensor after the updates, by name."""
    parts = {name: matrices(name, array) or [array] for name, array in start.items()}
    parameters = {name: [torch.nn.Parameter(torch.tensor(part)) for part in found] for name, found in parts.items()}
    groups = {"muon": [], "decayed": [], "plain": []}
    for name, array in start.items():
        kind = "muon" if matrices(name, array) else "decayed" if array.ndim > 1 else "plain"
        groups[kind] += parameters[name]
    muon = torch.optim.Muon(groups["muon"], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": groups["decayed"], "weight_decay": DECAY}, {"params": groups["plain"], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.95))
    for gradient in gradients:
        for name, found in parameters.items():
            pieces = matrices(name, gradient[name]) or [gradient[name]]
            for parameter, piece in zip(found, pieces, strict=True):
                parameter.grad = torch.tensor(np.ascontiguousarray(piece))
        torch.nn.utils.clip_grad_norm_([one for found in parameters.values() for one in found], CLIP)
        muon.step()
        adamw.step()
    return {name: np.concatenate([one.detach() for one in found], axis=-1) for name, found in parameters.items()}


@pytest.fixture(scope="module", params=["gpt2", "qwen3-moe", "deepseek3"])  # the others' matrices are among theirs
def trained(request):
    """(names of tensors -> arrays at the start, their gradients, ours after the updates)."""
    config = CONFIGS[request.param]()
    variables = drawn(config)
    params = variables["params"]
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), params) for _ in range(STEPS)]
    optimizer = muon(RATE, b2=0.95, weight_decay=DECAY, clip=CLIP)
    ours, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        ours, state = step(ours, state, gradient)

    def named(tree):
        tensors = to_state_dict({**variables, "params": tree}, config)
        return {name: tensor for name, tensor in tensors.items() if "correction_bias" not in name}  # no parameter

    return named(params), [named(gradient) for gradient in gradients], named(ours)


def test_updates_equal_torch_where_its_products_are_float32(trained, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)  # since 2.15 a type that it converts to
    start, gradients, ours = trained
    for name, expected in after_torch(start, gradients).items():
        assert np.abs(expected - start[name]).max() > RATE / 10, name  # it moved
        np.testing.assert_allclose(ours[name], expected, atol=2e-6, err_msg=name)


def test_updates_are_near_those_of_torch_as_it_is(trained):
    start, gradients, ours = trained
    for name, expected in after_torch(start, gradients).items():
        error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected - start[name])
        assert error < 0.05, name  # of its products in bfloat16, five times in a row
