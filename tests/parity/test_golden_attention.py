"""The steps to attention in docs/from_gpt.md, run as they stand there, give what the original's variants computed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.layers.attention import Context, attention
from tests.parity.golden import read_golden

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from_gpt.md").read_text()
STEPS: dict = {}
MARK = "<!-- executed by tests/parity/test_golden_attention.py -->"
exec("\n".join(re.findall(rf"{re.escape(MARK)}\n```python\n(.*?)```", PAGE, re.DOTALL)), STEPS)
NAMES = {"w_queries": "query", "w_keys": "key", "w_values": "value", "out_proj": "out"}


@pytest.fixture(scope="module")
def golden():
    arrays, meta = read_golden("attention_variants")
    assert meta["heads"] == 2
    return arrays


def tree(golden, kind, variant):
    """Parameters or gradients by the names of the page: kernels have rows of inputs."""
    found: dict = {}
    for name, array in golden.items():
        if not name.startswith(f"{kind}/{variant}/") or name.endswith("mask"):
            continue
        *path, last = name.removeprefix(f"{kind}/{variant}/").split(".")
        if path[:1] == ["multi_context"]:
            path = ["heads", path[1], *path[2:]]
        place = found
        for part in path:
            place = place.setdefault(NAMES.get(part, part), {})
        place[{"weight": "kernel"}.get(last, last)] = array.T if last == "weight" else array
    if "heads" in found:
        found["heads"] = [found["heads"][str(i)] for i in range(len(found["heads"]))]
    return found


def by_the_library(params, x, num_heads):
    """The page's last step: the function that all models call."""
    query, key, value = (
        STEPS["linear"](params[name], x).reshape(*x.shape[:2], num_heads, -1) for name in ("query", "key", "value")
    )
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    mixed, _ = attention(query, key, value, Context(positions), None, scale=query.shape[-1] ** -0.5)
    return STEPS["linear"](params["out"], mixed.reshape(*x.shape[:2], -1))


CASES = {
    "one head": ("v1", lambda p, x: STEPS["one_head"](x, p["w_queries"], p["w_keys"], p["w_values"])),
    "with biases": ("v2", lambda p, x: STEPS["one_biased_head"](p, x)),
    "causal": ("v3", lambda p, x: STEPS["causal_head"](p, x)),
    "several heads": ("wrapper", lambda p, x: STEPS["heads_side_by_side"](p, x)),
    "in one product": ("mha", lambda p, x: STEPS["multi_head"](p, x, 2)),
    "the library's": ("mha", lambda p, x: by_the_library(p, x, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_gives_what_the_original_gave(golden, case):
    variant, step = CASES[case]
    x = golden["in/x_unbatched" if variant in ("v1", "v2") else "in/x"]
    if variant == "v1":
        params, wanted = (
            {name: golden[f"{kind}/v1/{name}"] for name in ("w_queries", "w_keys", "w_values")}
            for kind in ("param", "grad")
        )
    else:
        params, wanted = tree(golden, "param", variant), tree(golden, "grad", variant)
    np.testing.assert_allclose(jax.jit(step)(params, x), golden[f"out/{variant}"], atol=1e-6, rtol=1e-6)
    cotangent = golden[f"in/cotangent/{variant}"]
    found = jax.jit(jax.grad(lambda params: jnp.sum(step(params, x) * cotangent)))(params)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PAGE))))
def test_linked_files_exist(link):
    assert (ROOT / "docs" / link).exists()
