"""A row from end to end: same losses on all sides, times in rounds, a roofline, a report."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from bench import measure, report
from bench.products import Product, products_of, time_in_jax, time_in_torch
from bench.rows import ROWS, TrainStep, WindowedAttention, gpt2

pytestmark = pytest.mark.slow  # every side starts a process of its own

TINY = TrainStep(
    "tiny", gpt2(2, 2, 16, 8, 31), batch=2, context=8, sides=("ours", "transformers, eager", "plain torch, eager")
)


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


def test_rows_that_are_not_measured_stay_on_the_page(monkeypatch):
    monkeypatch.setattr(report, "ROWS", {"first": None, "second": None})
    start = "# Benchmarks\n\n| row | wanted | measured | |\n| --- | --- | --- | --- |\n"
    old = "| gone | a | b | reached |\n| second | c | d | **missed** |\n\n## gone\n\nX.\n\n## second\n\nY.\n"
    text = report.Report(rounds=5, page=start + old).markdown()
    assert "| second | c | d | **missed** |\n\n## second\n\nY.\n" in text and "gone" not in text


def test_windowed_attention_end_to_end():
    row = WindowedAttention("window", length=256, window=16, heads=2, width=8)
    result = measure.measure(row, rounds=1, seconds=0.01, report=lambda text: None)
    losses = result.sides["torch, masked"].facts["losses"]
    assert losses == pytest.approx(result.ours.facts["losses"], rel=1e-4)
    assert [wanted.split()[0] for wanted, *_ in report.verdicts(result)] == ["5", "at", "time"]
    header, rows = report.cells(result)
    assert "temporary memory" in header and len(rows) == len(row.sides)
    assert result.ours.facts["temporary_bytes"] < result.sides["ours, full"].facts["temporary_bytes"]


def test_sides_that_disagree_are_refused():
    def side(loss):
        return measure.Measured([1.0], {"losses": [3.0, loss]})

    result = measure.Result(TINY, {"ours": side(2.9), "plain torch, eager": side(2.9)}, load=0.0)
    measure.check_agreement(result)
    result.sides["plain torch, eager"] = side(2.8)
    with pytest.raises(RuntimeError, match="plain torch, eager"):
        measure.check_agreement(result)


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


@pytest.mark.parametrize("transposed", [False, True])
def test_products_run_in_both_worlds(transposed):
    products = [Product(2, 3, 4, 5, 6, transposed, not transposed), Product(1, 1, 4, 5, 6, transposed, transposed)]
    for timed in (time_in_jax(products), time_in_torch(products)):
        assert len(timed) == 2 and min(timed) > 0


def test_rows_have_names_and_ours_first():
    for name, row in ROWS.items():
        assert row.name == name and row.sides[0].startswith("ours") and row.about
        assert dataclasses.is_dataclass(row)
