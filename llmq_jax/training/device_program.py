"""The memory that a program takes on one device of a mesh, estimated from its trace: nothing is compiled or run.

`training.partitioner` finds how arrays are divided, and what is sent. Which arrays are live at the same time follows
from the order of the trace. The result of an element-wise operation takes no memory, unless a product, a loop or
another operation of `IN_MEMORY` reads it: the compiler fuses it into its readers. A loop's stacked results are
allocated from its first round on; what it carries is overwritten in place; a round's gradients are summed over devices
at its end, all together.

XLA's CPU backend works in this way: estimates are up to 27% below what it takes, in one case 31%, and hardly above it
(docs/plan.md; tests/training/test_plan.py). One thing that it does is not followed here: where a stack has a single
layer, it undoes recomputation. An accelerator's backend may fuse more, and sum in smaller groups.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.extend import core

from llmq_jax.training.partitioner import (
    BACKWARD,
    FORWARD,
    LOGITS,
    Operation,
    Partitioner,
    Spec,
    Value,
    constants_and_carry,
    size_of,
)

CALLS = ("jit", "custom_vjp_call", "custom_jvp_call", "remat2", "checkpoint", "closed_call", "eval_jaxpr")
LOOPS = ("scan", "while", "cond", "shard_map")
# Operations that read their operands from memory, ...
IN_MEMORY = (
    *(*LOOPS, "dot_general", "ragged_dot_general", "sort", "top_k", "scatter", "scatter-add", "all_to_all", "psum"),
    *("cumsum", "cummax", "pallas_call"),
)
# ... those that write their results there, ...
MADE = (*IN_MEMORY, "gather", "concatenate", "stack", "dynamic_update_slice", "argmax", "all-gather", "random_bits")
# ... those that are too costly to be made for each reader anew, ...
COSTLY = (
    *("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "erf_inv", "pow", "div", "rem", "sqrt"),
    *("rsqrt", "cbrt", "sin", "cos", "tan", "atan2"),
)
# ... and those whose results are the same bytes, or parts of them.
SAME = ("reshape", "squeeze", "transpose", "name", "reshard", "stop_gradient", "copy", "sharding_constraint")

GRADIENTS, KEPT, COPIES = "gradients", "activations kept for the backward pass", "weights in lower precision"
UNSUMMED, WORKING = "gradients of a layer before their sum", "working memory"
LOSS, UPDATE = "loss", "update"


class Device(Partitioner):
    """After `run`, `sent` holds what is exchanged. With `passes` = 2 the outermost loop goes over micro-batches."""

    def __init__(self, sizes: Mapping[str, int], weights: Sequence[tuple[Any, ...]], vocabulary: int, passes: int):
        super().__init__(sizes, weights, vocabulary)
        self.passes, self.depth = passes, 0

    def run(self, program: core.Jaxpr, specs: Sequence[Spec]) -> dict[str, Counter[str]]:
        """{part of the step: bytes by kind of array, beside the arguments, at the part's peak}. Results take the
        arguments' place."""
        inputs = [Value(v.aval, spec) for v, spec in zip(program.invars, specs, strict=True)]
        return self.scope(program, inputs)[1]

    def scope(self, program: core.Jaxpr, inputs: list[Value]) -> tuple[list[Value], dict[str, Counter[str]]]:
        """(results, {part of the step: bytes beside the inputs, at its peak}) of a program or of a loop's body."""
        given, outputs = flat(program, inputs)
        self.depth += 1
        operations: list[Operation] = []
        copies: dict[tuple[Any, ...], Value] = {}
        for operation in given:
            self.divide(operation, operations, copies)
            operations.append(operation)
        self.depth -= 1
        self.place_random_numbers(operations)
        return outputs, self.lives(operations, inputs, outputs)

    def place_random_numbers(self, operations: list[Operation]) -> None:
        """Divide random numbers as the arrays that they are combined with. Threefry keeps two words for each number,
        and copies of both."""
        for op in reversed(operations):
            for out in op.outputs:
                if out.spec is None:
                    alike = [v for v in op.inputs if v.aval.shape == out.aval.shape]
                    for v in alike:
                        v.wanted = v.wanted or out.wanted
            if op.name == "random_bits":
                bits = op.outputs[0]
                bits.spec = bits.wanted or ((),) * len(bits.aval.shape)
                bits.words = 2
                op.inside = {"": Counter({WORKING: self.bytes(bits)})}

    def lives(self, operations: list[Operation], inputs: list[Value], outputs: list[Value]) -> dict[str, Counter[str]]:
        place_in_memory(operations, inputs, outputs, overwritten=self.depth == 0)
        last = {root: i for i, op in enumerate(operations) for v in (*op.inputs, *op.outputs) for root in v.roots}
        ends = defaultdict(list)
        for root, i in last.items():
            ends[i].append(root)
        live: dict[Value, int] = {}
        unsummed = summed = 0
        most: dict[str, Counter[str]] = {}

        def measure(part: str, more: Counter[str]) -> None:
            found = Counter({UNSUMMED: unsummed} if unsummed else {}) + more
            for value, size in live.items():
                found[self.label(value, born.get(value), value in crossing)] += size
            if found.total() > most.get(part, Counter()).total():
                most[part] = found

        def drop(roots: Iterable[Value]) -> None:
            for root in roots:
                live.pop(root, None)

        parts = self.parts_of_step(operations)
        born = {v: part for op, part in zip(operations, parts, strict=True) for v in op.outputs}
        crossing = {root for root, i in last.items() if root in born and born[root] != parts[i]}
        for i, (op, part) in enumerate(zip(operations, parts, strict=True)):
            live.update({v: self.bytes(v) for v in op.inputs if v.sliced and v.made and v not in live})
            ending = [root for root in ends[i] if root not in op.outputs]
            # Results take the place of operands that are read for the last time: in element-wise operations, and of
            # what a loop carries.
            drop(ending if op.name not in IN_MEMORY else {r for v in carried(op) for r in v.roots} & set(ending))
            live.update({v: self.bytes(v) for v in op.outputs if v.made})
            if op.unsummed:
                unsummed, summed = unsummed + op.unsummed, summed + self.bytes(op.outputs[0])
            for inner, more in (op.inside or {"": Counter()}).items():
                measure(inner or part, more)
            drop([*ending, *(v for v in op.outputs if last.get(v, -1) <= i)])
            if self.depth < self.passes:
                unsummed = 0
        if unsummed:
            measure("", Counter({UNSUMMED: summed}))
        return most

    def label(self, value: Value, born: str | None, kept: bool) -> str:
        """The kind of array that a value counts as. `born`: the part of the step that makes it, None for an argument;
        `kept`: whether it is kept for another part."""
        if value.label:
            return value.label
        if self.is_weight(value) and self.depth < self.passes:
            lower = value.aval.dtype != "float32"
            # In the forward pass, an array of a weight's shape may be an activation: where a window has as many tokens
            # as the model has features.
            if born != FORWARD or (lower and value.source is not None and self.is_weight(value.source)):
                return COPIES if lower else GRADIENTS
        if value.aval.shape[-1:] == (self.vocabulary,) and not self.is_weight(value):
            return LOGITS
        return KEPT if kept else WORKING

    def parts_of_step(self, operations: list[Operation]) -> list[str]:
        """The part of the step that each operation belongs to, "" inside of loops."""
        if self.depth >= self.passes:
            return [""] * len(operations)
        losses = [i for i, op in enumerate(operations) if op.loss]
        first, end = (losses[0], losses[-1]) if losses else (-1, -1)
        loops = [i for i, op in enumerate(operations) if op.name == "scan"]
        # The backward pass ends with the last reversed loop over layers, or with the loop over micro-batches; the
        # update may have loops as well.
        backwards = [i for i in loops if operations[i].params["reverse"]] or loops[:1]
        final = backwards[-1] if loops and self.depth == 0 else len(operations)
        return [
            FORWARD if i < first else LOSS if i <= end and op.loss else UPDATE if i > final else BACKWARD
            for i, op in enumerate(operations)
        ]


def flat(program: core.Jaxpr, inputs: Sequence[Value]) -> tuple[list[Operation], list[Value]]:
    """(operations, results) of a program, with calls inlined."""
    operations: list[Operation] = []

    def call(program: core.Jaxpr, inputs: Sequence[Value]) -> list[Value]:
        values = dict(zip(program.invars, inputs, strict=True)) | {v: Value(v.aval) for v in program.constvars}

        def read(v: Any) -> Value:
            return Value(v.aval) if isinstance(v, core.Literal) else values[v]

        for equation in program.eqns:
            given, name = [read(v) for v in equation.invars], equation.primitive.name
            if name in CALLS:
                inner: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
                results = call(getattr(inner, "jaxpr", inner), given)
            else:
                results = [Value(v.aval) for v in equation.outvars]
                operations.append(Operation(name, given, results, equation.params))
            values.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in program.outvars]

    return operations, call(program, inputs)


def place_in_memory(operations: list[Operation], inputs: list[Value], outputs: list[Value], overwritten: bool) -> None:
    """Decide which values have memory of their own (`made`), and which are computed where they are read. `overwritten`:
    the results take the arguments' place."""
    numbers = set(range(len(outputs)))  # of the results
    needed: set[Value] = set()  # in memory, by what reads it
    readers: dict[Value, set[Any]] = defaultdict(set)  # what reads it in the end
    for i, v in enumerate(outputs):
        readers[v].add(i)
    for op in reversed(operations):
        reshaped = op.name == "broadcast_in_dim" and size_of(op.outputs[0].aval) == size_of(op.inputs[0].aval)
        same = op.name in SAME or reshaped
        makes = op.name in MADE or op.name.startswith("reduce_")
        for v in op.outputs:
            large = {x for x in op.inputs if x.spec is not None and size_of(x.aval) >= size_of(v.aval)}
            shared = len(readers[v]) > 1 and not same and (op.name in COSTLY or len(large) > 1)
            v.made = v.spec is not None and (makes or shared or (v in needed and not same))
            if overwritten and op.name not in MADE:  # what serves only results is computed leaf by leaf
                v.made &= not readers[v] <= numbers
        if op.name in IN_MEMORY or (same and op.outputs[0] in needed):
            needed.update(op.inputs)
        for v in op.inputs:
            readers[v].update({op} if makes or any(out.made for out in op.outputs) else readers[op.outputs[0]])
    for v in inputs:
        v.made = v.sliced and v in needed
        v.roots = frozenset([v] if v.made else [])
    last = {v: op for op in operations for v in op.inputs}
    for op in operations:
        written_over = operands_written_over(op, last) if op.name == "cond" else {}
        for v in op.outputs:
            v.made &= v not in written_over
            sources = [written_over[v]] if v in written_over else op.inputs
            v.roots = frozenset([v]) if v.made else frozenset().union(*(x.roots for x in sources))


def operands_written_over(op: Operation, last: Mapping[Value, Operation]) -> dict[Value, Value]:
    """{result: operand} for the results of a `cond` whose branches write them in place: each over an operand of its
    shape and type that nothing reads later."""
    free = [v for v in op.inputs[1:] if last[v] is op]
    found: dict[Value, Value] = {}
    for result in op.outputs:
        operand = next((v for v in free if v.aval == result.aval and v.spec == result.spec), None)
        if operand is not None:
            free.remove(operand)
            found[result] = operand
    return found


def carried(op: Operation) -> list[Value]:
    """The values that a loop carries, and overwrites."""
    if op.name == "scan":
        constants, count = constants_and_carry(op)
        return op.inputs[constants:][:count]
    return op.inputs[op.params["cond_nconsts"] + op.params["body_nconsts"] :] if op.name == "while" else []
