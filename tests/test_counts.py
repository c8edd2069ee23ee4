from llmq_jax.counts import counted


def test_one_is_singular():
    assert [counted(count, "pair") for count in (0, 1, 2000)] == ["0 pairs", "1 pair", "2,000 pairs"]
    assert [counted(2, noun) for noun in ("batch", "class", "answer")] == ["2 batches", "2 classes", "2 answers"]
