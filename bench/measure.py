"""Starts the sides' processes, lets one work at a time, round after round, and gathers their times."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.products import Product
from bench.rows import OUR_ALLOCATOR, Row, Start

LOSS_TOLERANCE = 1e-3
"""Relative, after a few steps of Adam, which magnifies rounding; the first loss must agree within a tenth of it."""
SAME_TOKENS = 0.5
"""Least share of equal tokens in greedy decoding: one near-tie decided otherwise makes all later tokens differ."""


@dataclass
class Measured:
    """The measurements of one side: seconds of each round, and facts that it reported."""

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass
class Result:
    """The measurements of one row."""

    row: Row
    sides: dict[str, Measured]
    load: float
    """Average number of running processes over the minute before."""
    idle: float = 0.0
    """Processor time of waiting workers, as a share of one core."""
    products: list[Product] = field(default_factory=list)
    product_seconds: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of each product in (JAX, PyTorch), medians over the rounds."""

    @property
    def ours(self) -> Measured:
        return next(iter(self.sides.values()))

    @property
    def peers(self) -> dict[str, Measured]:
        return {name: side for name, side in self.sides.items() if not name.startswith("ours")}

    def ratio(self, name: str, beside: str | None = None) -> tuple[float, float, float]:
        """How many times as fast as the side `name` we are, or `beside` is: (median, least, most) over the rounds."""
        other = self.ours if beside is None else self.sides[beside]
        ratios = [theirs / others for theirs, others in zip(self.sides[name].seconds, other.seconds, strict=True)]
        return median(ratios), min(ratios), max(ratios)

    @property
    def best_peer(self) -> str | None:
        """The fastest side of PyTorch as it comes: no user of PyTorch has our allocator's setting."""
        peers = [name for name in self.peers if OUR_ALLOCATOR not in name]
        return min(peers, key=lambda name: self.peers[name].median, default=None)

    @property
    def floor(self) -> float | None:
        """Seconds that the matrix products take alone, each in the faster of JAX and PyTorch; None without products."""
        return sum(map(min, self.product_seconds)) if self.product_seconds else None


class Worker:
    """A side's process: asleep unless asked."""

    def __init__(self, row: Row, folder: Path, name: str):
        self.name = name
        self.idle = 0.0
        self.log = open(folder / f"{_file_name(name)}.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", str(folder), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(folder, name),
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        try:
            self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:  # it died while it waited: often memory was lacking for all sides together
            line = ""
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the process of {self.name!r} died in {call}:\n{self.log.read()[-4000:]}")
        answer = json.loads(line)
        self.idle += answer["idle"]
        return answer["answer"]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def environment(folder: Path, name: str) -> dict[str, str]:
    """The environment variables of a side's process: the CPU, no network, and empty compilation caches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / _file_name(name)),
    }


def _file_name(side: str) -> str:
    """A side's name without comma and spaces, at which PyTorch's call of the C++ compiler would split it."""
    return side.replace(", ", "-").replace(" ", "-")


def measure(row: Row, rounds: int, seconds: float, report: Callable[[str], None]) -> Result:
    """Run a row's sides in turn. A side's turn is about `seconds` long, after a run that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(row, Start):
            return _measure_start(row, rounds, Path(folder), report)
        return _measure_workers(row, rounds, seconds, Path(folder), report)


def _measure_workers(row: Row, rounds: int, seconds: float, folder: Path, report: Callable) -> Result:
    with open(folder / "row.pickle", "wb") as file:
        pickle.dump(row, file)
    result = Result(row, {name: Measured() for name in row.sides}, os.getloadavg()[0])
    workers: dict[str, Worker] = {}
    try:
        for name in row.sides:
            report(f"{row.name}: preparing {name}")
            workers[name] = Worker(row, folder, name)
            result.sides[name].facts = workers[name].ask("prepare")
        check_agreement(result)
        started, before = time.perf_counter(), sum(worker.idle for worker in workers.values())
        product_times = []
        for turn in range(rounds):
            report(f"{row.name}: round {turn + 1} of {rounds}")
            for name, worker in workers.items():
                result.sides[name].seconds.append(worker.ask("measure", at_least=seconds)["seconds"])
                if turn == 0:  # before the products' operands are allocated
                    result.sides[name].peak_memory = worker.ask("peak_memory")
            product_times.append(_time_products(result, workers))
        result.product_seconds = [
            tuple(map(median, zip(*times, strict=True))) for times in zip(*product_times, strict=True)
        ]
        elapsed = time.perf_counter() - started
        result.idle = (sum(worker.idle for worker in workers.values()) - before) / elapsed
    finally:
        for worker in workers.values():
            worker.close()
    return result


def _time_products(result: Result, workers: dict[str, Worker]) -> list[tuple[float, float]]:
    """Seconds of each product in (JAX, PyTorch)."""
    answer = next(iter(workers.values())).ask("products")
    result.products = [Product(**product) for product in answer["products"]]
    if not result.products:
        return []
    peer = next(worker for name, worker in workers.items() if not name.startswith("ours"))
    return list(zip(answer["seconds"], peer.ask("time_products", products=answer["products"]), strict=True))


def check_agreement(result: Result) -> None:
    """RuntimeError unless the sides computed the same thing."""
    expected = result.ours.facts
    for name, side in result.sides.items():
        if name.startswith("ours") and "losses" not in side.facts:
            continue  # a side that computes something else
        for index, (ours, theirs) in enumerate(
            zip(expected.get("losses", ()), side.facts.get("losses", ()), strict=True)
        ):
            if abs(ours - theirs) > abs(ours) * LOSS_TOLERANCE * (1 if index else 0.1):
                raise RuntimeError(f"{result.row.name}: {name!r} has loss {theirs} where ours is {ours} (run {index})")
        rows = list(zip(expected.get("tokens", ()), side.facts.get("tokens", ()), strict=True))
        same = [a == b for ours, theirs in rows for a, b in zip(ours, theirs, strict=True)]
        if same and sum(same) < SAME_TOKENS * len(same):
            raise RuntimeError(f"{result.row.name}: {name!r} agrees in only {sum(same)} of {len(same)} tokens")


def _measure_start(row: Start, rounds: int, folder: Path, report: Callable) -> Result:
    """Time processes from their start to the first result. A round that is not counted fills the operating system's
    file cache."""
    (folder / "fields.json").write_text(json.dumps({"model_type": row.model_type, **row.fields}))
    report(f"{row.name}: preparing")
    _run_start(["ours", "folder", str(folder)], environment(folder, "ours"))
    result = Result(row, {name: Measured() for name in row.sides}, os.getloadavg()[0])
    shape = [str(row.batch), str(row.context)] if row.what == "step" else []
    for turn in range(rounds + 1):
        report(f"{row.name}: round {turn} of {rounds}")
        for name, side in result.sides.items():
            variables = environment(folder, name)
            if name.startswith("ours"):
                cache = folder / name
                if name.endswith("cold"):
                    shutil.rmtree(cache, ignore_errors=True)
                variables |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
            elapsed = _run_start([name.partition(",")[0], row.what, str(folder), *shape], variables)
            if turn:
                side.seconds.append(elapsed)
    return result


def _run_start(arguments: list[str], variables: dict[str, str]) -> float:
    """Seconds from the start of the process to its `done`."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.start", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )
    said = next((line for line in process.stdout if line.strip() == "done"), None)
    elapsed = time.perf_counter() - started
    _, errors = process.communicate()
    if said is None:
        raise RuntimeError(f"bench.start {' '.join(arguments)} failed:\n{errors[-4000:]}")
    return elapsed
