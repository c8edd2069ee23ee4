"""A row from end to end: same losses on all sides, times in rounds, a roofline, a report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from bench import measure, report, worker
from bench.products import Product, products_of, time_in_jax, time_in_torch
from bench.rows import (
    CACHED_SIDES,
    MIXTRAL,
    ROWS,
    SMOLLM2,
    Compilation,
    DPOStep,
    ExpertNetworks,
    GRPOStep,
    Rollout,
    TrainStep,
    WindowedAttention,
    gpt2,
)
from llmq_jax.objectives.cross_entropy import chunked_cross_entropy

TINY = TrainStep(
    "tiny", gpt2(2, 2, 16, 8, 31), batch=2, context=8, sides=("ours", "transformers, eager", "plain torch, eager")
)


class SideOfThisProcess:
    """In the place of `measure.Worker`: the same side, and no process that imports all again to hold it."""

    def __init__(self, row, folder, name):
        self.side, self.idle = worker.create_side(row, folder, name), 0.0

    def ask(self, call, **arguments):
        return json.loads(json.dumps(getattr(self.side, call)(**json.loads(json.dumps(arguments)))))

    def close(self):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(measure, "Worker", SideOfThisProcess)


@pytest.mark.slow
def test_a_row_end_to_end(monkeypatch):
    result = measure.measure(TINY, rounds=2, seconds=0.01, report=lambda text: None)
    losses = [side.facts["losses"] for side in result.sides.values()]
    assert len(losses) == 3 and all(len(each) == 3 for each in losses)
    for theirs in losses[1:]:
        assert theirs == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != losses[0][1]
    assert all(len(side.seconds) == 2 and min(side.seconds) > 0 for side in result.sides.values())
    assert result.ratio(result.best_peer)[0] > 0 and result.floor > 0 and result.ours.peak_memory > 2**20

    monkeypatch.setattr(report, "ROWS", {"tiny": TINY})
    page = report.Report(rounds=2)
    page.add(result)
    text = page.markdown()
    assert "## tiny" in text and "plain torch, eager" in text and "of the roofline" in text
    assert "in 2 rounds of about 1 s" in text and "| tiny | 1.15 times the best PyTorch" in text


@pytest.mark.slow
def test_rows_that_are_not_measured_stay_on_the_page(monkeypatch):
    monkeypatch.setattr(report, "ROWS", {"first": None, "second": None})
    start = "# Benchmarks\n\n| row | wanted | measured | |\n| --- | --- | --- | --- |\n"
    old = "| gone | a | b | reached |\n| second | c | d | **missed** |\n\n## gone\n\nX.\n\n## second\n\nY.\n"
    text = report.Report(rounds=5, page=start + old).markdown()
    assert "| second | c | d | **missed** |\n\n## second\n\nY.\n" in text and "gone" not in text


@pytest.mark.slow
def test_windowed_attention_end_to_end(in_this_process):
    row = WindowedAttention("window", length=256, window=16, heads=2, width=8)
    result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
    losses = result.sides["torch, masked"].facts["losses"]
    assert losses == pytest.approx(result.ours.facts["losses"], rel=1e-4)
    assert [wanted.split()[0] for wanted, *_ in report.verdicts(result)] == ["5", "at", "time"]
    header, rows = report.cells(result)
    assert "temporary memory" in header and len(rows) == len(row.sides)
    assert result.ours.facts["temporary_bytes"] < result.sides["ours, full"].facts["temporary_bytes"]


@pytest.mark.slow
def test_experts_end_to_end(in_this_process):
    row = ExpertNetworks("experts", tokens=64, width=8, intermediate_size=16, num_experts=4, many=16)
    result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
    losses = {name: side.facts["losses"] for name, side in result.sides.items() if "losses" in side.facts}
    assert list(losses) == ["ours", "ours, ragged", "ours, dense", "torch, loop"]
    for theirs in losses.values():  # a value, and the norms of four gradients
        assert len(theirs) == 5 and theirs == pytest.approx(losses["ours"], rel=1e-4)
    # One pass forward and two back through three matrices of 8 x 16, for two experts a token.
    assert sum(product.flops for product in result.products) == 3 * 2 * 64 * 2 * 3 * 8 * 16
    wanted = [wanted for wanted, *_ in report.verdicts(result)]
    assert wanted[0] == "at most 2 times the batched products alone (goal: 1.7)"
    assert wanted[-1] == "with 16 experts at most 1.3 times as long as with 4" and len(wanted) == 4
    assert any(
        "with 16 experts as with 4, whose weights are 4 times as many" in line for line in report.remarks(result)
    )
    header, rows = report.cells(result)
    shares = {name: cells[header.index("of the roofline") - 1] for name, *cells in rows}
    assert shares["ours, exact"] and not shares["ours, 16 experts"] and not shares["ours, 16 exact"]


@pytest.mark.slow
def test_a_step_of_a_model_with_experts(in_this_process):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 8, "vocab_size": 31}
    fields = MIXTRAL | sizes | {"num_hidden_layers": 2, "num_local_experts": 4}
    row = TrainStep("mixtral", fields, 2, 8, "mixtral", sides=("ours", "transformers, eager"))
    assert "2 of 4 experts" in row.about
    result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
    theirs = result.sides["transformers, eager"].facts["losses"]
    assert theirs == pytest.approx(result.ours.facts["losses"], rel=1e-4)
    # Forward, of each layer's experts: what goes in and what comes out, each having 2 * 16 / 4 tokens.
    shapes = {(product.batch, product.m, product.k, product.n) for product in result.products}
    assert {(4, 8, 16, 48), (4, 8, 24, 16)} <= shapes


@pytest.mark.slow
def test_a_step_of_adapters(in_this_process):
    sides = ("ours, scanned", "ours, full, scanned", "PEFT, eager")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    fields = SMOLLM2 | sizes | {"num_hidden_layers": 2, "vocab_size": 31}
    row = TrainStep("lora", fields, 2, 8, "llama", sides=sides, at_least=1.3, adapters=4)
    assert "AdamW of adapters of rank 4" in row.about
    result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
    theirs = result.sides["PEFT, eager"].facts["losses"]
    assert theirs == pytest.approx(result.ours.facts["losses"], rel=1e-4)
    assert "losses" not in result.sides["ours, full, scanned"].facts
    assert [wanted for wanted, *_ in report.verdicts(result)] == ["1.3 times PEFT"]


@pytest.mark.slow
def test_rollouts_and_a_step_on_them():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    fields = SMOLLM2 | sizes | {"num_hidden_layers": 1, "vocab_size": 50257}
    for kind, sides in ((Rollout, CACHED_SIDES), (GRPOStep, ("ours", "TRL"))):
        row = kind("tiny", fields, batch=1, group=2, prompt=8, new_tokens=4, sides=sides)
        assert "2 answers of 4 tokens to each of 1 prompts of 8" in row.about
        result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
        ((wanted, *_),) = report.verdicts(result)
        assert wanted.endswith(sides[1])
        assert result.floor > 0


@pytest.mark.slow
def test_a_step_of_dpo():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    row = DPOStep("tiny", SMOLLM2 | sizes | {"num_hidden_layers": 1, "vocab_size": 50257}, prompt=6)
    result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
    losses = {name: side.facts["losses"] for name, side in result.sides.items()}
    assert losses["TRL"] == pytest.approx(losses["ours"], rel=1e-4) and losses["ours"][0] == pytest.approx(
        0.6931, abs=1e-3
    )
    ((wanted, *_),) = report.verdicts(result)
    assert wanted == "1.15 times TRL" and result.floor > 0


@pytest.mark.slow
def test_compilation_of_more_layers():
    row = Compilation("compile", gpt2(1, 1, 8, 8, 31), batch=1, context=8)
    result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
    ((wanted, measured, _),) = report.verdicts(result)
    assert wanted == "4 layers at most 1.3 times as long as 1" and measured.endswith("times")
    assert min(result.ours.seconds) > 0.05  # compiled anew each time
    assert report.cells(result)[0][:3] == ["", "time a compilation", "ratio"]


def test_sides_that_disagree_are_refused():
    def side(loss, first=3.0):
        return measure.Measured([1.0], {"losses": [first, loss]})

    result = measure.Result(TINY, {"ours": side(2.9), "plain torch, eager": side(2.9)}, load=0.0)
    measure.check_agreement(result)
    for other in (side(2.8), side(2.9, first=3.001)):  # the first step's loss has no error of Adam's
        result.sides["plain torch, eager"] = other
        with pytest.raises(RuntimeError, match="plain torch, eager"):
            measure.check_agreement(result)


def test_sides_that_draw_other_tokens_are_refused():
    """Half of them may differ: after a near-tie all later ones do."""

    def result_of(theirs):
        tokens = {"ours": [[1, 2, 3, 4], [5, 6, 7, 8]], "torch": theirs}
        sides = {name: measure.Measured([1.0], {"tokens": rows}) for name, rows in tokens.items()}
        return measure.Result(TINY, sides, load=0.0)

    measure.check_agreement(result_of([[1, 2, 3, 4], [0, 0, 0, 0]]))
    with pytest.raises(RuntimeError, match="'torch' agrees in only 3 of 8 tokens"):
        measure.check_agreement(result_of([[1, 2, 3, 0], [0, 0, 0, 0]]))


def test_ratios_are_those_of_rounds():
    sides = {"ours": measure.Measured([1.0, 2.0, 4.0]), "torch": measure.Measured([2.0, 2.0, 12.0])}
    result = measure.Result(TINY, sides, load=0.0)
    assert result.ratio("torch") == (2.0, 1.0, 3.0)


def test_products_of_a_program_with_loops():
    def program(x, w):
        step = lambda carry, _: (jnp.tanh(carry @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=3)[0].sum()

    found = products_of(jax.grad(program, (0, 1)), jnp.ones((5, 4)), jnp.ones((4, 4)))
    assert sum(product.count for product in found) == 9  # forward, and two gradients of each
    assert sum(product.flops for product in found) == 9 * 2 * 5 * 4 * 4
    assert any(product.left_transposed for product in found)


def test_products_of_a_loop_within_a_loop():
    def program(x, w):
        inner = lambda carry, _: (carry @ w, None)  # noqa: E731
        outer = lambda carry, _: (jax.lax.scan(inner, carry, None, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=2)[0]

    assert products_of(program, jnp.ones((5, 4)), jnp.ones((4, 4))) == [Product(6, 1, 5, 4, 4, False, False)]
    (product,) = products_of(lambda x, w: jnp.einsum("mk,nk->mn", x, w), jnp.ones((5, 4)), jnp.ones((6, 4)))
    assert product == Product(1, 1, 5, 4, 6, False, True)
    assert (product.left, product.right) == ((5, 4), (6, 4))


def test_products_of_a_loss_in_chunks():
    def loss(head, hidden):
        tokens = jnp.zeros((2, 6), jnp.int32)
        return chunked_cross_entropy(
            lambda head, rows: rows @ head["w"], head, hidden, tokens, tokens + 1.0, chunk_size=4
        )

    found = products_of(jax.grad(loss, (0, 1)), {"w": jnp.ones((4, 5))}, jnp.ones((2, 6, 4)))
    assert [product.count for product in found] == [3, 3, 3]  # chunks: forward, and two gradients
    assert sum(product.flops for product in found) == 3 * 2 * 12 * 4 * 5


def test_products_of_a_loop_of_unknown_length_are_refused():
    def program(x, length):
        return jax.lax.fori_loop(0, length, lambda _, x: x @ x, x)

    with pytest.raises(ValueError, match="length"):
        products_of(program, jnp.ones((3, 3)), 2)


def test_outer_products_are_elementwise():
    assert products_of(lambda x, y: jnp.einsum("mk,md->mkd", x, y), jnp.ones((2, 3)), jnp.ones((2, 4))) == []


@pytest.mark.parametrize("transposed", [False, True])
def test_products_run_in_both_worlds(transposed):
    products = [Product(2, 3, 4, 5, 6, transposed, not transposed), Product(1, 1, 4, 5, 6, transposed, transposed)]
    for timed in (time_in_jax(products), time_in_torch(products)):
        assert len(timed) == 2 and min(timed) > 0


def test_rows_have_names_and_ours_first():
    for name, row in ROWS.items():
        assert row.name == name and row.sides[0].startswith("ours") and row.about
        assert dataclasses.is_dataclass(row)


@pytest.mark.slow
def test_a_side_that_died_while_it_waited_is_named(tmp_path):
    worker = measure.Worker(None, tmp_path, "plain torch, eager")
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match="the process of 'plain torch, eager' died in prepare"):
        worker.ask("prepare")
    worker.close()
