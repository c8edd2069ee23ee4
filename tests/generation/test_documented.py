"""The lines of docs/generation.md do as they say."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import llmq_jax as lq

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
MARK = "<!-- executed by tests/generation/test_documented.py -->"


def test_the_page(capsys):
    config = lq.GPT2Config(
        vocab_size=257, max_position_embeddings=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config), lq.ByteTokenizer())
    first, sampler = re.findall(rf"{re.escape(MARK)}\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope = {"lm": lm}
    exec(compile(first, PAGE.name, "exec"), scope)
    made, logits, lengths = scope["made"], np.asarray(scope["logits"]), scope["lengths"]
    assert made.tokens.shape == (8, 16) and scope["hidden"].shape == (2, 11, 16)
    (other,) = lq.generate(
        lm, ["Once upon"], max_new_tokens=16, sampler=scope["sampler"], stop=["\n"], seed=[lq.generation.row_seed(3, 2)]
    ).tokens  # the third sample of the first prompt, alone
    np.testing.assert_array_equal(made.tokens[2], other)
    expected = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits[:, :-1])), np.asarray(scope["tokens"])[:, 1:, None], axis=-1
    )[..., 0]
    expected *= np.arange(1, 11) < np.asarray(lengths)[:, None]
    np.testing.assert_allclose(scope["logprobs"], expected, atol=1e-5)
    assert capsys.readouterr().out

    exec(compile(sampler, PAGE.name, "exec"), scope)
    kept = scope["MinPFirst"](temperature=3.0, min_p=0.5).filter(jnp.log(jnp.array([[0.5, 0.3, 0.2]])))
    np.testing.assert_allclose(kept, [[np.log(0.5) / 3, np.log(0.3) / 3, -np.inf]], rtol=1e-5)
    assert scope["made"].tokens.shape == (1, 16)
