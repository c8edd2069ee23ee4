"""The roofline: how fast this machine does the matrix products of a workload, and nothing else.

The products are read from the workload's own jaxpr, with the shapes and the order of axes that they have there
(attention in its blocks, cross-entropy in its chunks). Each is timed alone, in JAX and in PyTorch, and the better of
the two times counts. Their sum is the time that a perfect program would take, one whose other work is free.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

OPERAND_BYTES = 2**26
"""A product that occurs in several layers is timed on several operands, up to this size in all, as in a model."""
MOST_COPIES = 16
BYTES = {"float32": 4, "bfloat16": 2}
TIMED_SECONDS = 0.02


@dataclass(frozen=True)
class Product:
    """`batch` products [m, k] x [k, n], done `count` times. A transposed operand is stored with its axes swapped."""

    count: int
    batch: int
    m: int
    k: int
    n: int
    left_transposed: bool
    right_transposed: bool
    dtype: str = "float32"

    @property
    def flops(self) -> int:
        return 2 * self.count * self.batch * self.m * self.k * self.n

    @property
    def bytes_moved(self) -> int:
        """Every operand read once and the result written once."""
        elements = self.m * self.k + self.k * self.n + self.m * self.n
        return BYTES[self.dtype] * self.count * self.batch * elements

    @property
    def copies(self) -> int:
        return max(1, min(self.count, MOST_COPIES, OPERAND_BYTES * self.count // self.bytes_moved))

    @property
    def left(self) -> tuple[int, ...]:
        return self._shape(self.m, self.k, self.left_transposed)

    @property
    def right(self) -> tuple[int, ...]:
        return self._shape(self.k, self.n, self.right_transposed)

    def _shape(self, rows: int, columns: int, transposed: bool) -> tuple[int, ...]:
        shape = (columns, rows) if transposed else (rows, columns)
        return shape if self.batch == 1 else (self.batch, *shape)


def products_of(function: Callable, *arguments: Any) -> list[Product]:
    """All matrix products in a function, those in a loop as often as it runs. ValueError: that is not known in
    advance."""
    import jax

    found = Counter(_products(jax.make_jaxpr(function)(*arguments).jaxpr, 1))
    totals = Counter()
    for (times, *shape), occurrences in found.items():
        totals[tuple(shape)] += times * occurrences
    return [Product(count, *shape) for shape, count in totals.items()]


def _products(jaxpr: Any, times: int) -> Iterator[tuple]:
    for equation in jaxpr.eqns:
        # Without a contracted axis it is only a multiplication.
        if equation.primitive.name == "dot_general" and any(equation.params["dimension_numbers"][0]):
            yield (times, *_shape(equation))
        inside = times * equation.params["length"] if equation.primitive.name == "scan" else times
        if equation.primitive.name == "while" and next(_products(equation.params["body_jaxpr"].jaxpr, 1), None):
            from llmq_jax.training.partitioner import most_rounds  # with JAX, which PyTorch's sides do without

            # The loop over chunks of tokens has a bound, and reaches it where all tokens count.
            rounds = most_rounds(equation.params["cond_jaxpr"].jaxpr)
            if rounds == 1:
                raise ValueError("a loop whose length is known only while it runs holds matrix products")
            inside = times * rounds
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)  # of a closed jaxpr
                if hasattr(part, "eqns"):
                    yield from _products(part, inside)


def _shape(equation: Any) -> tuple:
    """(batch, m, k, n, left transposed, right transposed, type) of a dot_general."""
    (left_contracted, right_contracted), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars)
    left_free = [i for i in range(len(left)) if i not in (*left_contracted, *left_batch)]
    right_free = [i for i in range(len(right)) if i not in (*right_contracted, *right_batch)]

    def size(shape, axes):
        return math.prod(shape[i] for i in axes)

    return (
        size(left, left_batch),
        size(left, left_free),
        size(left, left_contracted),
        size(right, right_free),
        bool(left_free) and max(left_contracted) < max(left_free),
        bool(right_free) and max(right_contracted) > max(right_free),
        equation.invars[0].aval.dtype.name,
    )


def time_in_jax(products: list[Product]) -> list[float]:
    """Seconds of each product, all its repetitions together."""
    import jax

    def program(product: Product) -> Callable:
        axes = tuple(range(product.batch > 1))
        left_axis, right_axis = (int(product.left_transposed), int(product.right_transposed))
        contracted = ((len(axes) + 1 - left_axis,), (len(axes) + right_axis,))
        run = jax.jit(
            lambda pairs: [jax.lax.dot_general(left, right, (contracted, (axes, axes))) for left, right in pairs]
        )
        keys = jax.random.split(jax.random.key(0), 2 * product.copies)
        pairs = [
            tuple(
                jax.random.normal(key, shape, product.dtype)
                for key, shape in zip(keys[2 * i : 2 * i + 2], (product.left, product.right), strict=True)
            )
            for i in range(product.copies)
        ]
        return lambda: jax.block_until_ready(run(pairs))

    return [_seconds(program(product)) * product.count / product.copies for product in products]


def time_in_torch(products: list[Product]) -> list[float]:
    """The same in PyTorch."""
    import torch

    def program(product: Product) -> Callable:
        normal = partial(torch.randn, dtype=getattr(torch, product.dtype))
        pairs = [(normal(product.left), normal(product.right)) for _ in range(product.copies)]
        pairs = [
            (left.mT if product.left_transposed else left, right.mT if product.right_transposed else right)
            for left, right in pairs
        ]
        return lambda: [torch.matmul(left, right) for left, right in pairs]

    with torch.no_grad():
        return [_seconds(program(product)) * product.count / product.copies for product in products]


def _seconds(run: Callable) -> float:
    """The fastest of a few runs, after one that is not counted: a ceiling is wanted."""
    run()
    fastest, spent = math.inf, 0.0
    while spent < TIMED_SECONDS or fastest == math.inf:
        started = time.perf_counter()
        run()
        elapsed = time.perf_counter() - started
        fastest, spent = min(fastest, elapsed), spent + elapsed
    return fastest
