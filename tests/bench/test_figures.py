"""The figures that the docs draw of a model and of formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from bench import figures

TINY = dict.fromkeys(("vocab_size", "max_position_embeddings"), 32) | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}


def model(config):
    return lq.LanguageModel(config, lq.build(config), lq.init(config))


def test_maps_are_the_weights_that_attention_mixes_with(monkeypatch):
    lm = model(lq.Llama3Config(**TINY, initializer_range=0.5))
    tokens = [3, 1, 4, 1, 5, 9]
    mixed = []

    def seen(query, key, value, mask, scale, softcap=None):
        groups = query.reshape(1, 2, 2, *query.shape[2:])
        scores = jnp.where(mask[:, None, None], jnp.einsum("bkgth,bksh->bkgts", groups, key) * scale, -jnp.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append((weights / weights.sum(-1, keepdims=True)).reshape(4, 6, 6))
        return original(query, key, value, mask, scale, softcap)

    from llmq_jax.layers import attention

    original = attention.lean_attend
    monkeypatch.setattr(attention, "lean_attend", seen)
    outside, layers = lm.model.slice_layers(lm.variables)
    places = jnp.arange(6)[None]
    x = lm.model.apply(outside, jnp.array([tokens]), places, method="embed")
    block = lm.model.layer_groups()[0].blocks[0](parent=None)
    context = lm.model.context(places).replace(implementation="masked")
    for layer in layers:
        x = block.apply(layer, x, context)[0]
    monkeypatch.undo()
    maps = figures.attention_maps(lm, tokens)
    assert maps.shape == (2, 4, 6, 6)
    np.testing.assert_allclose(maps, np.stack(mixed), atol=1e-5)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    assert not np.triu(maps, 1).any()


def test_maps_of_another_architecture_are_refused():
    lm = model(lq.GPT2Config(vocab_size=32, max_position_embeddings=32, hidden_size=24, num_hidden_layers=1))
    with pytest.raises(lq.BadInput, match="gpt2"):
        figures.attention_maps(lm, [1, 2])


def test_rope(tmp_path, capsys):
    path = tmp_path / "rope.png"
    figures.main(figures.Options("rope", str(path)))
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in capsys.readouterr().out


def test_windows(tmp_path, capsys):
    path = tmp_path / "windows.png"
    figures.main(figures.Options("windows", str(path)))
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in capsys.readouterr().out


def test_what_local_layers_carry_on():
    """Each carries it on by the keys beside a query's own, a global one all the way; nothing comes from later."""
    found = figures.layers_until_seen(12, 3, (True, True, True, False))
    for query in range(12):
        for key in range(12):
            steps = max(1, -(-(query - key) // 2))
            assert found[query, key] == (0 if key > query else min(steps, 4))
    assert not figures.layers_until_seen(12, 3, (True, True, True))[11, :5].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("rope", "rope.svg"), "PNG"),
        (("rope", "nowhere/rope.png"), "no folder nowhere"),
        (("rope", "rope.png", "gpt2"), "--model has no effect on rope"),
        (("windows", "windows.png", "gpt2"), "--model has no effect on windows"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(lq.BadInput, match=message):
        figures.main(figures.Options(*options))
