"""How a program's arrays are divided among the devices of a mesh, and how much these exchange: read off its trace.

A trace (`jax.make_jaxpr`) has global shapes. Like the compiler's partitioner, `Partitioner` propagates the shardings of
the arguments from operation to operation. Of an array of S bytes, over n devices, each device sends:

- all-gather, S (n-1)/n: where one mesh axis divides different dimensions of two operands, one operand is gathered, such
  as weights under "fsdp", whose axis divides rows too;
- all-reduce, 2 S (n-1)/n: a sum over a divided dimension is partial on each device, and these are added up; partial
  sums that are added to each other, together. For a gradient that stays divided by "fsdp" it is a reduce-scatter along
  that axis, S (n-1)/n, and an all-reduce of the remaining part along the others;
- all-to-all, S (n-1)/n: an array is constrained to be divided along another dimension than before;
- in `shard_map` the program names its exchanges itself: all-to-all, S (n-1)/n, and sums.

Ring algorithms send that much; a device receives as much as it sends. Exchanges in a loop count once per round.
Weights and their gradients are recognised by their shapes.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend import core
from jax.sharding import PartitionSpec

from llmq_jax.layers.axes import DATA, FSDP, TENSOR

# For each dimension the mesh axes that divide it. None: computed from constants alone, which each device makes itself
# in the division that is needed.
Spec = tuple[tuple[str, ...], ...] | None

CONSTANTS = ("iota", "random_bits", "random_wrap", "random_unwrap", "random_split", "random_fold_in", "random_clone")
# Operations through which a sum over devices may be put off.
FOLLOWED = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "sharding_constraint")
FORWARD, BACKWARD = "forward", "backward"
GATHERED, LOGITS = "gathered weights", "logits of a chunk"


@dataclass(eq=False)
class Value:
    """An array of the program."""

    aval: Any
    spec: Any = None
    """How it is divided: a Spec."""
    label: str | None = None
    sliced: bool = False
    """Whether it is one round's slice of an array that a loop iterates over."""
    wanted: Spec = None
    """For a constant, the division of the arrays that it is combined with."""
    gradient: bool = False
    source: Any = None
    """The value of which this is a copy, in another type."""
    words: int = 1
    """How many arrays of its size it takes in memory."""
    made: bool = False
    """Whether it takes memory of its own beside the arguments; otherwise it is computed where it is read."""
    roots: frozenset[Any] = frozenset()
    """The values with memory of their own that it is computed from; itself if `made`."""


@dataclass(eq=False)
class Operation:
    name: str
    inputs: list[Value]
    outputs: list[Value]
    params: Mapping[str, Any] = field(default_factory=dict)
    inside: dict[str, Counter[str]] = field(default_factory=dict)
    """Bytes that a loop needs inside, by part of the step."""
    unsummed: int = 0
    """Bytes of a gradient's partial sum, before it is added up over devices."""
    loss: bool = False
    """Whether it computes logits, or is a loop that does."""


class Partitioner:
    """`sizes` are those of the mesh's axes; `weights` are pairs (shape of a parameter, its Spec)."""

    def __init__(self, sizes: Mapping[str, int], weights: Sequence[tuple[Any, ...]], vocabulary: int):
        self.sizes, self.vocabulary = sizes, vocabulary
        # By a weight's shape, sorted because of transposes: the size of the dimension that fsdp divides.
        self.weights: dict[tuple[Any, ...], int | None] = {}
        for shape, spec in weights:
            for front in range(min(2, len(shape))):  # with and without the axis of stacked layers
                divided = [n for n, axes in zip(shape[front:], spec[front:], strict=True) if FSDP in axes]
                self.weights.setdefault(tuple(sorted(shape[front:])), divided[0] if divided else None)
        self.sent: dict[tuple[str, str], float] = defaultdict(float)
        """Bytes that a device sends, by (kind of exchange, axes)."""
        self.partial: dict[Value, tuple[str, tuple[str, ...], int]] = {}
        """Sums over devices: what was sent for each."""
        self.rounds, self.backward = 1, False

    def scope(self, program: core.Jaxpr, inputs: list[Value]) -> tuple[list[Value], dict[str, Counter[str]]]:
        """(results, bytes that are live inside) of a loop's body: see `Device`."""
        raise NotImplementedError

    def bytes(self, value: Value, spec: Spec = None) -> int:
        """Bytes of one device's part, by the value's division or by `spec`."""
        return size_of(value.aval) * value.words // self.parts(axes_in(spec or value.spec))

    def parts(self, axes: Sequence[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def send(self, kind: str, axes: Sequence[str], whole: int | float) -> None:
        """Count `whole` (n-1)/n bytes as sent, in each round of the loops around."""
        n = self.parts(axes)
        if n > 1:
            names = "+".join(axis for axis in self.sizes if axis in axes)
            self.sent[kind, names] += whole * (n - 1) / n * self.rounds

    def is_weight(self, value: Value) -> bool:
        return tuple(sorted(value.aval.shape)) in self.weights

    def divide(self, op: Operation, before: list[Operation], copies: dict[tuple[Any, ...], Value]) -> None:
        """Set the specs of the operation's results. Inputs that must be gathered are gathered by operations that are
        appended to `before`."""
        rule = getattr(self, "rule_" + op.name.replace("-", "_"), None)
        if rule is not None:
            wanted = rule(op) or {}
            for k, spec in wanted.items():
                op.inputs[k] = self.gathered(op.inputs[k], spec, before, copies)
        elif op.name in CONSTANTS or all(v.spec is None for v in op.inputs):
            pass  # constants: they have no spec of their own
        elif (op.name.startswith("reduce_") and op.name != "reduce_precision") or op.name == "argmax":
            self.reduce(op)
        else:
            self.element_by_element(op)
        self.summed_first(op)
        if op.name in ("convert_element_type", "name", "copy"):
            op.outputs[0].source = op.inputs[0].source or op.inputs[0]

    def gathered(
        self, value: Value, spec: Spec, before: list[Operation], copies: dict[tuple[Any, ...], Value]
    ) -> Value:
        """A copy that is divided by `spec` alone, and shared by all operations that read it."""
        key = value.source or value, str(value.aval.dtype), value.aval.shape, spec
        if key not in copies:
            axes = [axis for axis in axes_in(value.spec) if axis not in axes_in(spec)]
            weight = self.is_weight(value) and bool({FSDP, TENSOR} & set(axes))  # data divides only updates
            label = GATHERED if weight and not value.gradient else None
            whole = Value(value.aval, spec, label)
            if value.gradient:
                of = "gradients"
            elif weight:
                of = f"weights, {BACKWARD if self.backward else FORWARD}"
            else:
                of = "updates" if self.is_weight(value) else "activations"
            self.send(f"all-gather of {of}", axes, self.bytes(whole))
            before.append(Operation("all-gather", [value], [whole]))
            copies[key] = whole
        return copies[key]

    def summed(self, op: Operation, out: Value, axes: Sequence[str]) -> None:
        """Partial sums over these axes are added up. A gradient is then divided as its weight is."""
        if not axes:
            return
        whole = now = self.bytes(out)
        of_rows = list(axes) != [TENSOR]  # tensor divides no rows: sums over it are activations, not gradients
        of_lookup = op.name == "scatter-add"  # its vectors may be divided into columns, as the table is
        divided = {DATA, FSDP} & set(axes_in(out.spec))
        out.gradient = self.is_weight(out) and of_rows and (of_lookup or not divided)
        if out.gradient:
            if not divided:
                self.divide_as_weight(out)
            if FSDP in axes and FSDP in axes_in(out.spec):
                self.send("reduce-scatter of gradients", (FSDP,), whole)
                now, axes = self.bytes(out), [axis for axis in axes if axis != FSDP]
                op.unsummed = whole
            elif axes and len(out.aval.shape) > 1:
                op.unsummed = whole
        of = f"all-reduce of {'gradients' if out.gradient else 'activations'}"
        self.partial[out] = (of, tuple(axes), 2 * now)
        self.send(of, axes, 2 * now)

    def summed_first(self, op: Operation) -> None:
        """Partial sums that are added to each other are added up over devices together, once: so it is with the
        gradients that query, key and value give their input."""
        sums = [self.partial[v] for v in op.inputs if v in self.partial]
        if op.name in FOLLOWED and sums:
            self.partial[op.outputs[0]] = sums[0]
        elif op.name in ("add", "add_any") and len(sums) == 2 and sums[0] == sums[1]:
            self.partial[op.outputs[0]] = sums[0]
            of, axes, whole = sums[0]
            self.send(of, axes, -whole)

    def divide_as_weight(self, out: Value) -> None:
        size = self.weights[tuple(sorted(out.aval.shape))]
        k = next((k for k, n in enumerate(out.aval.shape) if n == size and not out.spec[k]), None)
        if k is not None:
            out.spec = (*out.spec[:k], (FSDP,), *out.spec[k + 1 :])

    def element_by_element(self, op: Operation) -> None:
        for out in op.outputs:
            rank = len(out.aval.shape)
            near = [fitted(v, out.aval.shape) for v in op.inputs if v.spec is not None and len(v.aval.shape) == rank]
            out.spec = merged(near, rank)
            for v in op.inputs:
                if v.spec is None and v.aval.shape == out.aval.shape:
                    v.wanted = v.wanted or out.spec

    def reduce(self, op: Operation) -> None:
        over = op.params["axes"]
        for x, out in zip(op.inputs, op.outputs, strict=True):
            out.spec = tuple(axes for i, axes in enumerate(x.spec) if i not in over)
            self.summed(op, out, [axis for i in over for axis in x.spec[i]])

    def rule_broadcast_in_dim(self, op: Operation) -> None:
        x, out = op.inputs[0], op.outputs[0]
        if x.spec is None or not x.aval.shape:
            return
        spec: list[tuple[str, ...]] = [()] * len(out.aval.shape)
        for i, j in enumerate(op.params["broadcast_dimensions"]):
            spec[j] = x.spec[i] if x.aval.shape[i] == out.aval.shape[j] else ()
        out.spec = tuple(spec)

    def rule_reshape(self, op: Operation) -> None:
        """A run of dimensions becomes another: each of its dimensions takes the axes, in order, that divide it
        evenly."""
        x, out = op.inputs[0], op.outputs[0]
        if x.spec is None:
            return
        spec: list[tuple[str, ...]] = [()] * len(out.aval.shape)
        for old, new in groups(x.aval.shape, out.aval.shape):
            axes = [axis for i in old for axis in x.spec[i]]
            for j in new:
                while axes and out.aval.shape[j] % self.parts((*spec[j], axes[0])) == 0:
                    spec[j] = (*spec[j], axes.pop(0))
        out.spec = tuple(spec)

    def rule_squeeze(self, op: Operation) -> None:
        x = op.inputs[0]
        op.outputs[0].spec = without(x.spec, op.params["dimensions"])

    def rule_transpose(self, op: Operation) -> None:
        x = op.inputs[0]
        op.outputs[0].spec = None if x.spec is None else tuple(x.spec[i] for i in op.params["permutation"])

    def rule_stack(self, op: Operation) -> None:
        axis, known = op.params["axis"], [v.spec for v in op.inputs if v.spec is not None]
        if known:
            spec: Any = merged(known, len(known[0]))
            op.outputs[0].spec = (*spec[:axis], (), *spec[axis:])

    def rule_unstack(self, op: Operation) -> None:
        for out in op.outputs:
            out.spec = without(op.inputs[0].spec, (op.params["axis"],))

    def rule_dot_general(self, op: Operation) -> dict[int, Spec]:
        (over, over_b), (batch, batch_b) = op.params["dimension_numbers"]
        a, b = op.inputs
        specs = [list(v.spec or [()] * len(v.aval.shape)) for v in (a, b)]
        out = op.outputs[0]

        def stays(k: int) -> int:
            """Bytes that stay divided if operand k does: its own, and the result's if that keeps the dimension."""
            others = set(axes_in(specs[1 - k]))
            free = (axes for i, axes in enumerate(specs[k]) if i not in (over, over_b)[k])
            return size_of((a, b)[k].aval) + size_of(out.aval) * any(others & set(axes) for axes in free)

        # Where an axis divides different dimensions of the two, the operand with fewer such bytes is gathered.
        less = 0 if stays(0) < stays(1) else 1
        pairs = dict(zip((*over, *batch), (*over_b, *batch_b), strict=True))
        partner = pairs if less == 0 else {j: i for i, j in pairs.items()}
        before = tuple(specs[less])
        for k, axes in enumerate(before):
            elsewhere = axes_in([other for m, other in enumerate(specs[1 - less]) if m != partner.get(k)])
            specs[less][k] = tuple(axis for axis in axes if axis not in elsewhere)
        first, second = specs
        out.spec = (
            *(first[i] or second[j] for i, j in zip(batch, batch_b, strict=True)),
            *(axes for i, axes in enumerate(first) if i not in (*over, *batch)),
            *(axes for j, axes in enumerate(second) if j not in (*over_b, *batch_b)),
        )
        partial = [axis for i, j in zip(over, over_b, strict=True) for axis in dict.fromkeys((*first[i], *second[j]))]
        self.summed(op, out, partial)
        op.loss = out.aval.shape[-1:] == (self.vocabulary,) and not self.is_weight(out)
        after = tuple(specs[less])
        return {} if after == before else {less: after}

    def rule_gather(self, op: Operation) -> None:
        x, index = op.inputs
        if x.spec is None and index.spec is None:
            return
        numbers, out = op.params["dimension_numbers"], op.outputs[0]
        spec: list[tuple[str, ...]] = [()] * len(out.aval.shape)
        rows = [k for k in range(len(spec)) if k not in numbers.offset_dims]
        for k, axes in zip(rows, (index.spec or [()] * len(index.aval.shape))[:-1], strict=True):
            spec[k] = axes
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        taken = [k for k in range(len(x.aval.shape)) if k not in gone]
        for k, m in zip(taken, numbers.offset_dims, strict=True):
            if x.spec is not None and op.params["slice_sizes"][k] == x.aval.shape[k]:
                spec[m] = tuple(axis for axis in x.spec[k] if axis not in axes_in(spec))
        out.spec = tuple(spec)
        # If looked-up rows are divided, each device looks up those that it has, and the results are added up.
        if x.spec is not None:
            self.summed(op, out, axes_in([x.spec[k] for k in numbers.collapsed_slice_dims]))

    def rule_scatter_add(self, op: Operation) -> None:
        x, _, updates = op.inputs
        numbers, out = op.params["dimension_numbers"], op.outputs[0]
        spec = list(x.spec or [()] * len(out.aval.shape))
        inserted = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        windows = [k for k in range(len(spec)) if k not in inserted]
        for k, j in zip(windows, numbers.update_window_dims, strict=True):
            whole = out.aval.shape[k] == updates.aval.shape[j]
            spec[k] = spec[k] or (updates.spec[j] if updates.spec and whole else ())
        out.spec = tuple(spec)
        if updates.spec is not None and not numbers.operand_batching_dims:
            self.summed(op, out, axes_in(without(updates.spec, numbers.update_window_dims)))

    def rule_sharding_constraint(self, op: Operation) -> dict[int, Spec]:
        x, out = op.inputs[0], op.outputs[0]
        out.spec = spec_of(op.params["sharding"].spec, len(out.aval.shape), self.sizes)
        if x.spec is None:
            return {}
        for axis in axes_in(out.spec):
            before, after = ([k for k, axes in enumerate(spec) if axis in axes] for spec in (x.spec, out.spec))
            if before and before != after:
                # Muon exchanges parts of all layers, which are stacked first, for some whole layers; a lookup of ids
                # exchanges columns for whole vectors.
                of = "layers" if 0 in (*before, *after) else "embeddings"
                self.send(f"all-to-all of {of}", (axis,), self.bytes(x))
        return {0: out.spec} if set(axes_in(x.spec)) - set(axes_in(out.spec)) else {}

    # Loops, and programs of one device.

    def rule_scan(self, op: Operation) -> None:
        body = op.params["jaxpr"].jaxpr
        consts, count = constants_and_carry(op)
        outside = self.rounds, self.backward
        self.rounds, self.backward = self.rounds * op.params["length"], self.backward or op.params["reverse"]
        for v in op.inputs[consts + count :]:
            if v.spec:  # a round's slice is on the devices that hold that layer, and all need it
                self.send("all-gather of activations", v.spec[0], self.bytes(v, ((), *v.spec[1:])) / v.aval.shape[0])
        carry: list[Any] = [v.spec for v in op.inputs[consts : consts + count]]
        settled = False
        while not settled:
            sent = self.sent.copy()
            given = [v.spec for v in op.inputs[:consts]] + carry
            given += [v.spec and v.spec[1:] for v in op.inputs[consts + count :]]
            inner = [Value(v.aval, spec) for v, spec in zip(body.invars, given, strict=True)]
            for v in inner[consts + count :]:
                v.sliced = True
            results, lives = self.scope(body, inner)
            found = [
                spec if out.spec is None else merged([s for s in (spec, out.spec) if s is not None], len(out.spec))
                for spec, out in zip(carry, results, strict=False)
            ]
            settled = found == carry
            if not settled:
                carry, self.sent = found, sent
        self.rounds, self.backward = outside
        stacked = [((), *(out.spec or out.wanted or ((),) * len(out.aval.shape))) for out in results[count:]]
        slices = dict(zip(inner, op.inputs, strict=True))
        for each, out in zip(results[count:], op.outputs[count:], strict=True):
            out.source = slices.get(each.source)
        self.close(op, [*carry, *stacked], lives)

    def rule_while(self, op: Operation) -> None:
        body, skipped = op.params["body_jaxpr"].jaxpr, op.params["cond_nconsts"]
        inner = [Value(v.aval, o.spec) for v, o in zip(body.invars, op.inputs[skipped:], strict=True)]
        outside = self.rounds
        self.rounds *= most_rounds(op.params["cond_jaxpr"].jaxpr)
        results, lives = self.scope(body, inner)
        self.rounds = outside
        self.close(op, [v.spec for v in results], lives)

    def rule_cond(self, op: Operation) -> None:
        ends = []
        for branch in op.params["branches"]:
            inner = [Value(v.aval, o.spec) for v, o in zip(branch.jaxpr.invars, op.inputs[1:], strict=True)]
            ends.append(self.scope(branch.jaxpr, inner))
        results, lives = max(ends, key=lambda end: sum(found.total() for found in end[1].values()))
        self.close(op, [v.spec for v in results], lives)

    def rule_shard_map(self, op: Operation) -> dict[int, Spec]:
        specs, given = (
            [spec_of(s, len(v.aval.shape), self.sizes) for s, v in zip(op.params[name], values, strict=True)]
            for name, values in (("in_specs", op.inputs), ("out_specs", op.outputs))
        )
        body = op.params["jaxpr"]
        results, lives = self.scope(body, [Value(v.aval, ((),) * len(v.aval.shape)) for v in body.invars])
        self.close(op, given, lives)
        for inner, out in zip(results, op.outputs, strict=True):
            if inner.spec is None:
                out.spec = None  # a constant: zeros
            elif self.is_weight(out) and FSDP not in axes_in(out.spec):
                op.unsummed += self.bytes(out)  # a gradient, of which each device keeps its part
                self.divide_as_weight(out)
        pairs = enumerate(zip(op.inputs, specs, strict=True))
        return {k: spec for k, (v, spec) in pairs if v.spec is not None and set(axes_in(v.spec)) - set(axes_in(spec))}

    def close(self, op: Operation, specs: Sequence[Spec], lives: dict[str, Counter[str]]) -> None:
        """Set what is known of a loop: its results have these specs and are in memory."""
        for out, spec in zip(op.outputs, specs, strict=True):
            out.spec = ((),) * len(out.aval.shape) if spec is None else spec
        op.loss = any(LOGITS in found for found in lives.values())
        op.inside = lives

    def rule_psum(self, op: Operation) -> None:
        self.element_by_element(op)
        axes = [axis for axis in op.params["axes"] if self.sizes[axis] > 1]
        whole = sum(size_of(v.aval) for v in op.inputs)
        if axes == [FSDP]:  # each device keeps its part; over several axes at once, the compiler sums all of it
            self.send("reduce-scatter of gradients", axes, whole)
        else:
            self.send(f"all-reduce of {'activations' if axes == [TENSOR] else 'gradients'}", axes, 2 * whole)

    def rule_all_to_all(self, op: Operation) -> None:
        self.element_by_element(op)
        names = op.params["axis_name"]
        self.send("all-to-all of tokens", (names,) if isinstance(names, str) else names, size_of(op.inputs[0].aval))


def constants_and_carry(scan: Operation) -> tuple[int, int]:
    """How many of a loop's operands are constants, and how many of those after them it carries. Names of parameters
    differ among versions of JAX: what is iterated over, or stacked, has one dimension fewer inside."""
    body = scan.params["jaxpr"].jaxpr
    operands, results = (
        sum(len(o.aval.shape) == len(i.aval.shape) for o, i in zip(outside, inside, strict=True))
        for outside, inside in ((scan.inputs, body.invars), (scan.outputs, body.outvars))
    )
    return operands - results, results


def spec_of(partition: PartitionSpec, rank: int, sizes: Mapping[str, int]) -> Spec:
    """The Spec of a PartitionSpec, without axes of one device."""
    names = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in partition]
    return tuple(tuple(a for a in axes if sizes[a] > 1) for axes in [*names, *[()] * (rank - len(names))])


def size_of(aval: Any) -> int:
    """Bytes of a whole array; a random key is two words, 8 bytes."""
    return int(aval.size * getattr(aval.dtype, "itemsize", 8))


def axes_in(spec: Any) -> list[str]:
    return [axis for axes in spec or () for axis in axes]


def without(spec: Any, gone: Sequence[int]) -> Spec:
    return None if spec is None else tuple(axes for i, axes in enumerate(spec) if i not in gone)


def fitted(value: Value, shape: Sequence[int]) -> Spec:
    """A value's division in an elementwise result: broadcast dimensions, whose lengths differ, are not divided."""
    return tuple(axes if n == m else () for axes, n, m in zip(value.spec, value.aval.shape, shape, strict=True))


def merged(specs: Sequence[Any], rank: int) -> Spec:
    """The division of an elementwise result: for each dimension that of the first operand that divides it, with no axis
    used twice."""
    result: list[tuple[str, ...]] = [()] * rank
    for spec in specs:
        for k, axes in enumerate(spec):
            if axes and not result[k] and not set(axes) & set(axes_in(result)):
                result[k] = axes
    return tuple(result)


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The shortest runs of dimensions, from the first on, that a reshape turns into each other: [(old, new)]."""
    runs, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        first, second, a, b = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
        runs.append((range(first, i), range(second, j)))
    return runs


def most_rounds(condition: core.Jaxpr) -> int:
    """The most rounds of a loop that compares its counter, from 0 on, with a number; 1 if it does not."""
    bounds = [equation.invars[1] for equation in condition.eqns if equation.primitive.name == "lt"]
    literals = [np.asarray(v.val) for v in bounds if isinstance(v, core.Literal)]
    numbers = [int(value) for value in literals if value.dtype.kind == "i"]
    return max([1, *numbers])
