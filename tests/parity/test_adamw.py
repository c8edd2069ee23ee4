"""Ten updates with warm-up, cosine and decay equal torch.optim.AdamW's to 1e-6."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from llmq_jax.training.optimizer import adamw, warmup_schedule


def test_ten_steps_equal_torch():
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(2, 4, 3)), "scale": rng.normal(size=(2, 3)), "bias": rng.normal(size=(2, 3))}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    gradients = [
        {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()} for _ in range(10)
    ]
    rate = warmup_schedule(peak=1e-2, steps=10, warmup_steps=3, initial=1e-3, minimum=1e-4)

    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["kernel"]], "weight_decay": 0.1},
            {"params": [theirs["scale"], theirs["bias"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    optimizer = adamw(rate, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip=1.0)
    ours = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(ours)
    for step, gradient in enumerate(gradients):
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in torch_optimizer.param_groups:
            group["lr"] = float(rate(step))
        torch_optimizer.step()
        updates, state = optimizer.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name].detach(), atol=1e-6)
