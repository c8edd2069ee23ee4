"""From the seconds of rounds to the figures of the page: results are made up, nothing is measured."""

import pytest

from bench import measure, products, report
from bench.measure import Measured, Result
from bench.products import Product
from bench.rows import CrossEntropy, ExpertNetworks, Generation, Start, TrainStep, WindowedAttention, gpt2

MODEL = gpt2(2, 2, 16, 8, 31)
PEER, PLAIN = "transformers, eager", "plain torch, eager"
PRODUCTS = {  # 0.75 s alone, in the faster of both
    "products": [Product(2, 1, 100_000, 1000, 500, False, False), Product(2, 1, 100_000, 1000, 500, False, True)],
    "product_seconds": [(0.5, 0.75), (1.0, 0.25)],
}


def made_up(row, seconds, facts=None, **given):
    """A result with the seconds of each side's rounds, or of its only one."""
    facts = facts or {}
    sides = {
        name: Measured(
            each if isinstance(each, list) else [each], {"compile_seconds": 1.5, **facts.get(name, {})}, 2**21
        )
        for name, each in seconds.items()
    }
    return Result(row, sides, load=0.5, idle=0.25, **given)


def test_a_training_step():
    # What has our allocator is faster than any PyTorch as it comes, and no peer.
    seconds = {
        "ours": [1.0, 2.0, 4.0],
        PEER: [2.0, 2.0, 12.0],
        PLAIN: [3.0] * 3,
        "plain torch, our allocator": [0.5] * 3,
    }
    result = made_up(TrainStep("tiny", MODEL, batch=2, context=8), seconds, **PRODUCTS)
    assert report.verdicts(result) == [
        (
            "1.15 times the best PyTorch, or 80% of the roofline",
            "2.00 (1.00 to 3.00) times transformers, eager, 38% of the roofline",
            True,
        )
    ]
    header, rows = report.cells(result)
    assert header == ["", "time a step", "ratio", "tokens/s", "of the roofline", "peak memory", "compile"]
    assert rows[0] == ["ours", "2.00 s", "", "8", "38%", "2 MiB", "1.5 s"]
    assert rows[1] == [PEER, "2.00 s", "2.00 (1.00 to 3.00)", "8", "38%", "2 MiB", ""]
    assert report.remarks(result)[1:] == [
        "roofline: 400.0 GFLOP of matrix products a step take 750.0 ms alone, at 533 GFLOP/s (JAX 267, PyTorch 400); "
        "we reach 38% of it",
        "waiting workers used 25.0% of a core; load average before: 0.50",
    ]
    for at_least, alone, reached in ((2.5, 0.5, False), (2.5, 1.5, True), (2.0, 0.5, True)):
        row = TrainStep("tiny", MODEL, batch=2, context=8, at_least=at_least)
        ((*_, found),) = report.verdicts(made_up(row, seconds, product_seconds=[(0.2, 0.1), (alone, 9.0)]))
        assert found == reached


def test_generation():
    row = Generation("tiny", MODEL, 1, new_tokens=4, at_least=2.0)
    result = made_up(row, {"ours": 2.0, PEER: 3.0}, {"ours": {"bandwidth": 4e9}}, **PRODUCTS)
    assert [reached for *_, reached in report.verdicts(result)] == [False, True]
    assert report.remarks(result)[3] == (
        "they move 574 MiB for each new token of all rows (weights, caches): the products alone at 3.2 GB/s, the whole "
        "at 1.2 GB/s, 30% of the 4.0 GB/s at which this machine reads memory"
    )


def test_attention_in_a_window():
    row = WindowedAttention("tiny", length=100, window=8)
    seconds = {"ours": 2.0, "ours, full": 12.0, "ours, half": 0.8, "ours, twice": 4.4, "torch, masked": 9.0}
    memory = {"ours": {"temporary_bytes": 2**20}, "ours, full": {"temporary_bytes": 2**23}}
    assert report.verdicts(made_up(row, seconds, memory)) == [
        ("5 times full attention", "6.00 (6.00 to 6.00) times", True),
        ("at most 0.2 of its temporary memory", "0.125", True),
        ("time a token within 20% from 50 to 200 tokens", "38%", False),
    ]


def test_experts():
    row = ExpertNetworks("tiny", 8, 4, 4, many=16)
    times = dict(zip(row.sides, (2.1, 1.0, 8.4, 42.0, 3.15, 1.25, 21.0), strict=True))
    result = made_up(row, times, **PRODUCTS)
    assert [(measured[:4], reached) for _, measured, reached in report.verdicts(result)] == [
        ("2.10", False),
        ("0.25", True),
        ("0.05", True),
        ("1.50", False),
    ]
    assert (
        "the products alone take 1.25 times as long with 16 experts as with 8, whose weights are 2 times as many; "
        "beside that growth ours is 1.20"
    ) in report.remarks(result)


def test_cross_entropy():
    row = CrossEntropy("tiny", 31, 8, 16)
    memory = {
        "ours, chunked": {"temporary_bytes": 1, "whole_bytes": 3},
        "ours, plain": {"temporary_bytes": 8, "whole_bytes": 4},
    }
    found = report.verdicts(made_up(row, {"ours, chunked": 5.0, "ours, plain": 4.0}, memory))
    assert [each[1:] for each in found] == [("0.125", True), ("0.750", False), ("1.25", False)]


def test_other_weights_have_another_roofline():
    row = TrainStep("tiny", MODEL, batch=2, context=8, sides=("ours", "ours, full", "PEFT, eager"), adapters=4)
    _, rows = report.cells(made_up(row, dict.fromkeys(row.sides, 1.5), **PRODUCTS))
    assert [cells[4] for cells in rows] == ["50%", "", "50%"]


def test_starts_with_and_without_a_cache(monkeypatch, tmp_path):
    """The first round is not counted, and a cold start finds none of what an earlier one has kept."""
    found, rounds = [], iter(range(100))

    def start(arguments, variables):
        cache = variables.get("JAX_COMPILATION_CACHE_DIR")
        if cache is not None:
            found.append(len(list(tmp_path.glob(f"{cache.removeprefix(f'{tmp_path}/')}/*"))))
            measure.Path(cache).mkdir(exist_ok=True)
            measure.Path(cache, str(len(found))).touch()
        return next(rounds)

    monkeypatch.setattr(measure, "_run_start", start)
    row = Start("tiny", "step", MODEL)
    result = measure._measure_start(row, 2, tmp_path, lambda text: None)
    assert {name: side.seconds for name, side in result.sides.items()} == {
        "ours, cached": [4, 7],
        "ours, cold": [5, 8],
        PEER: [6, 9],
    }
    assert found == [0, 0, 1, 0, 2, 0]


@pytest.mark.parametrize("timed", [products.time_in_jax, products.time_in_torch])
def test_a_product_counts_as_often_as_it_is_done(timed, monkeypatch):
    """40 of them are timed on 16 operands."""
    monkeypatch.setattr(products, "_seconds", lambda run: 1.0)
    assert timed([Product(40, 1, 2, 3, 4, False, False)]) == [2.5]
