"""What was measured, as tables for the terminal and as one Markdown page."""

import os
import platform
import time
from importlib.metadata import version
from typing import Any

from bench.measure import Measured, Result
from bench.rows import FULL, ROWS

SHARE = 0.8
"""Share of the roofline with which a row meets its target whatever the ratio, since little more is possible."""
REACHED, MISSED = "reached", "**missed**"
HAVE_TEMPORARY_MEMORY = ("cross_entropy", "attention", "experts")
PACKAGES = ("jax", "flax", "optax", "torch", "transformers")
METHOD = """\
Each row compares several implementations, its sides. Every side runs in a process of its own, one at a time: all others
wait in a blocking read. A round gives each side one turn, after a run that is not counted; each row says how many
rounds there were, when and on which machine. Times are medians over the rounds. Ratios are medians of the rounds'
ratios, with the least and the greatest in brackets; above 1 we are faster. Weights and batches are the same on all
sides (exported through `lq.interop.to_state_dict`); if losses or tokens disagree, a row ends in an error.

All sides compute in float32 and without dropout, except for a row in bfloat16: there PyTorch uses autocast, which keeps
the residual stream in float32, and ours is in bfloat16. PyTorch uses fused AdamW and fused attention, and its defaults
otherwise. Our training loop sets the C allocator to keep freed memory, in large pages (`training/host_memory.py`). The
sides "our allocator" show what that does for PyTorch; no target is measured against them. Training goes through
`lq.training.make_train_step` with `scan_layers=False`; "ours, scanned" has `scan_layers=True`, and so have the rows
with adapters, which train as fast with either. Peak memory is that of the whole process, libraries included. Temporary
memory is what our compiled program allocates in addition to its arguments and results. *compile* is the time that the
first run took beyond a later one, without any cache. Starts are those of whole processes: *cold* with an empty
compilation cache, *cached* with JAX's persistent cache, which our commands keep, filled by an earlier start.

The roofline of a row is the time that its own matrix products take alone. Each product is timed in the same rounds,
with the shape and the order of axes that it has in our program, in JAX and in PyTorch; the faster of the two counts.
The share says how close our whole program comes to the roofline. In rows with experts, the products are batched, as if
every expert had the same number of tokens; the sides "exact" run these products alone, without bringing tokens to their
experts. The sides "plain torch" are models written by hand (`bench/plain_gpt.py`, `bench/plain_llama.py`), the stronger
peer on a CPU.

Processors of the same name may differ, and the rates in the roofline's line tell them apart. On family 26, model 2
(`llmq env` shows it), JAX's products run at 220 to 420 GFLOP/s, and PyTorch's at 160 to 200. On family 25, model 17,
both run at 150 to 190, and whatever is limited by products is hardly faster on one side than on the other: there
mixtral-step-1024 measured 0.91, deepseek-step-1024 0.83, smollm2-lora-step-512 1.05, smollm2-generate-8 1.81, and 64
experts took 1.41 times as long as 8. On an Intel processor of family 6, model 167, where PyTorch's products are faster,
smollm2-bfloat16-step-2048 measured 0.80, mixtral-step-1024 0.79, smollm2-generate-1 1.36 and smollm2-generate-8 1.22.
On family 26, model 2, with a busy host, deepseek-step-1024 measured 1.27 and 1.24 (JAX's products at 148 and 160
GFLOP/s) and mixtral-step-1024 1.48 (at 222).
"""


class Report:
    """The page of results: each row that is measured replaces the row of the same name on the earlier page."""

    def __init__(self, rounds: int, seconds: float = 1.0, page: str = ""):
        self.measured = f"Measured {time.strftime('%Y-%m-%d %H:%M')} in {rounds} rounds of about {seconds:g} s"
        self.verdicts: dict[str, list[str]] = {}
        self.sections: dict[str, str] = {}
        for line in page.splitlines():
            if line.startswith("| ") and line.endswith((f"| {REACHED} |", f"| {MISSED} |")):
                self.verdicts.setdefault(line.split(" | ")[0].removeprefix("| "), []).append(line)
        for section in page.split("\n## ")[1:]:
            self.sections[section.split("\n")[0]] = f"## {section.rstrip()}"

    def add(self, result: Result) -> None:
        name, about = result.row.name, result.row.about
        self.verdicts[name] = [
            _line([name, wanted, measured, REACHED if reached else MISSED])
            for wanted, measured, reached in verdicts(result)
        ]
        header, rows = cells(result)
        packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        lines = [f"## {name}", "", f"{about[0].upper()}{about[1:]}.", ""]
        lines += [_line(header), _line(["---", *["---:"] * (len(header) - 1)]), *map(_line, rows), ""]
        lines += [f"- {remark}" for remark in remarks(result)]
        lines += [f"- {self.measured} on {machine()}. Python {platform.python_version()}, {packages}"]
        self.sections[name] = "\n".join(lines)

    def table(self, result: Result) -> Any:
        """A row's table for the terminal."""
        from rich.table import Table

        header, rows = cells(result)
        table = Table(title=f"{result.row.name}: {result.row.about}", title_justify="left", title_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The page with all that has been measured so far; rows that are no longer in ROWS are left out."""
        names = [name for name in ROWS if name in self.sections]
        lines = [
            "# Benchmarks",
            "",
            "Written by `make bench` (`python -m bench.run --write docs/benchmarks.md`); not edited by hand.",
            "",
            METHOD,
            "| row | wanted | measured | |",
            "| --- | --- | --- | --- |",
            *(line for name in names for line in self.verdicts.get(name, [])),
        ]
        return "\n".join(lines) + "\n\n" + "\n\n".join(self.sections[name] for name in names) + "\n"


def _line(row: list[str]) -> str:
    return "| " + " | ".join(row) + " |"


def machine() -> str:
    from llmq_jax.commands.env import memory, processor

    return f"{processor()}, {os.cpu_count()} cores, {memory()}, {platform.system()} {platform.release()}"


def cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each side)."""
    header = ["", f"time a {result.row.unit}", "ratio"]
    header += ["tokens/s"] if _tokens(result.row, "ours") else []
    header += ["of the roofline"] if result.floor else []
    header += ["temporary memory"] if result.row.kind in HAVE_TEMPORARY_MEMORY else []
    header += ["peak memory", "compile"] if result.row.kind != "start" else []
    rows = []
    for name, side in result.sides.items():
        row = [name, duration(side.median), "" if side is result.ours else _times(result.ratio(name))]
        tokens = _tokens(result.row, name)
        row += [f"{tokens / side.median:,.0f}"] if tokens else []
        if result.floor:
            row.append(f"{result.floor / side.median:.0%}" if _has_our_products(result.row, name) else "")
        if result.row.kind in HAVE_TEMPORARY_MEMORY:
            row.append(_mebibytes(side.facts.get("temporary_bytes")))
        if result.row.kind != "start":
            row += [_mebibytes(side.peak_memory), _compile_time(name, side)]
        rows.append(row)
    return header, rows


def remarks(result: Result) -> list[str]:
    """Further remarks on a row, a line each."""
    lines = [f"{'reached' if good else 'missed'}: {wanted}: {measured}" for wanted, measured, good in verdicts(result)]
    if result.floor:
        flops, moved = (sum(getattr(p, name) for p in result.products) for name in ("flops", "bytes_moved"))
        jax, torch = (sum(times) for times in zip(*result.product_seconds, strict=True))
        share, unit = result.floor / result.ours.median, result.row.unit
        lines.append(
            f"roofline: {flops / 1e9:,.1f} GFLOP of matrix products a {unit} take {duration(result.floor)} alone, at "
            f"{flops / result.floor / 1e9:,.0f} GFLOP/s (JAX {flops / jax / 1e9:,.0f}, PyTorch "
            f"{flops / torch / 1e9:,.0f}); we reach {share:.0%} of it"
        )
        if result.row.kind == "generate" and result.row.new_tokens > 1:
            rate, bandwidth = moved / result.ours.median, result.ours.facts["bandwidth"]
            lines.append(
                f"they move {moved / 2**20 / result.row.new_tokens:,.0f} MiB for each new token of all rows (weights, "
                f"caches): the products alone at {moved / result.floor / 1e9:,.1f} GB/s, the whole at "
                f"{rate / 1e9:,.1f} GB/s, {rate / bandwidth:.0%} of the {bandwidth / 1e9:,.1f} GB/s at which this "
                "machine reads memory"
            )
    if result.row.kind == "experts":
        few, many = result.row.num_experts, result.row.many
        ours = result.ratio(f"ours, {many} experts")[0]
        exact = result.ratio(f"ours, {many} exact", "ours, exact")[0]
        lines.append(
            f"the products alone take {exact:.2f} times as long with {many} experts as with {few}, whose weights are "
            f"{many / few:g} times as many; beside that growth ours is {ours / exact:.2f}"
        )
    if result.row.kind != "start":
        lines.append(f"waiting workers used {result.idle:.1%} of a core; load average before: {result.load:.2f}")
    else:
        lines.append(f"the files were in the operating system's cache; load average before: {result.load:.2f}")
    return lines


def verdicts(result: Result) -> list[tuple[str, str, bool]]:
    """(what is wanted, what was measured, reached) for each target of a row."""
    row = result.row
    if row.kind == "train" and result.best_peer:
        ratio = result.ratio(result.best_peer)
        if row.adapters is not None:
            measured = f"{_times(ratio)} times {result.best_peer}"
            return [(f"{row.at_least:g} times PEFT", measured, ratio[0] >= row.at_least)]
        share = result.floor / result.ours.median if result.floor else 0.0
        wanted = f"{row.at_least:g} times the best PyTorch, or {SHARE:.0%} of the roofline"
        measured = f"{_times(ratio)} times {result.best_peer}, {share:.0%} of the roofline"
        return [(wanted, measured, ratio[0] >= row.at_least or share >= SHARE)]
    if row.kind == "cross_entropy" and "ours, plain" in result.sides:
        plain = result.sides["ours, plain"]
        bounds = (
            ("temporary_bytes", "temporary memory"),
            ("whole_bytes", "memory with head and gradients, which both forms hold"),
        )
        memory = [
            (f"{row.at_most_memory:g} of the plain form's {name}", result.ours.facts[key] / plain.facts[key])
            for key, name in bounds
        ]
        time_ratio = 1 / result.ratio("ours, plain")[0]
        return [
            *((f"at most {wanted}", f"{ratio:.3f}", ratio <= row.at_most_memory) for wanted, ratio in memory),
            (f"at most {row.at_most_time:g} of its time", f"{time_ratio:.2f}", time_ratio <= row.at_most_time),
        ]
    if row.kind == "attention":
        full = result.sides["ours, full"]
        ratio = result.ratio("ours, full")
        memory = result.ours.facts["temporary_bytes"] / full.facts["temporary_bytes"]
        lengths = {name: row.length_of(name) for name in ("ours, half", "ours", "ours, twice")}
        each = [result.sides[name].median / length for name, length in lengths.items()]
        shortest, _, longest = (f"{length:,}" for length in lengths.values())
        spread = max(each) / min(each) - 1
        return [
            (f"{row.at_least:g} times full attention", f"{_times(ratio)} times", ratio[0] >= row.at_least),
            (f"at most {row.at_most_memory:g} of its temporary memory", f"{memory:.3f}", memory <= row.at_most_memory),
            (
                f"time a token within {row.within:.0%} from {shortest} to {longest} tokens",
                f"{spread:.0%}",
                spread <= row.within,
            ),
        ]
    if row.kind == "experts":
        exact, many = result.ratio("ours", "ours, exact"), result.ratio(f"ours, {row.many} experts")
        others = ((name, result.ratio("ours", f"ours, {name}")) for name in ("ragged", "dense"))
        return [
            (
                f"at most {row.at_most_exact:g} times the batched products alone (goal: {row.goal_exact:g})",
                f"{_times(exact)} times",
                exact[0] <= row.at_most_exact,
            ),
            *(
                (f"at most {row.at_most_others:g} of the time of {name}", _times(ratio), ratio[0] <= row.at_most_others)
                for name, ratio in others
            ),
            (
                f"with {row.many} experts at most {row.at_most_many:g} times as long as with {row.num_experts}",
                f"{_times(many)} times",
                many[0] <= row.at_most_many,
            ),
        ]
    if row.kind == "generate" and row.at_least is not None:
        ratio, seconds = result.ratio("transformers, eager"), result.ours.facts["compile_seconds"]
        return [
            (f"{row.at_least:g} times transformers", f"{_times(ratio)} times", ratio[0] >= row.at_least),
            (f"compiled in {row.compile_below:g} s", f"{seconds:.1f} s", seconds < row.compile_below),
        ]
    if row.kind == "compile":
        ratio = result.ratio(row.deeper)
        wanted = f"{row.layers_of(row.deeper)} layers at most {row.at_most:g} times as long as {row.layers_of('ours')}"
        return [(wanted, f"{_times(ratio)} times", ratio[0] <= row.at_most)]
    if row.kind in ("rollout", "grpo", "dpo"):
        other = row.sides[1]
        ratio = result.ratio(other)
        return [(f"{row.at_least:g} times {other}", f"{_times(ratio)} times", ratio[0] >= row.at_least)]
    if row.kind == "start" and row.below_seconds is not None:
        median = result.ours.median
        return [(f"a second start below {row.below_seconds:g} s", f"{median:.1f} s", median < row.below_seconds)]
    return []


def duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def _times(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def _tokens(row: Any, name: str) -> int | None:
    """Tokens of a side's run."""
    return row.length_of(name) if row.kind == "attention" else getattr(row, "tokens", None)


def _has_our_products(row: Any, name: str) -> bool:
    """Whether the row's roofline is that of this side too, because it has as many tokens and weights as ours."""
    if row.kind == "train" and row.adapters is not None and FULL in name:
        return False
    if row.kind == "experts" and row.experts_of(name) != row.num_experts:
        return False
    return _tokens(row, name) == _tokens(row, "ours")


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def _compile_time(name: str, side: Measured) -> str:
    """Empty for eager PyTorch, which compiles nothing: its first run takes longer because of warm-up."""
    return "" if name.endswith(("eager", "loop")) else f"{side.facts['compile_seconds']:.1f} s"
