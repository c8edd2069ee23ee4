"""Everything runs on the CPU, without a network, with array shapes and types checked, from one compilation cache."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "NO"  # the layers of transformers as they are written, which 5.25 replaces by default
os.environ["TOKENIZERS_PARALLELISM"] = "false"
CACHE = Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# One of several workers has a core of its own: threads of XLA and PyTorch beside it would wait for each other, at a
# sixth of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
import subprocess
import sys

# A script that starts the tests in the background has them ignore Ctrl-C, and all processes that they start: tests of
# what it does would wait for it in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests compile thousands of programs and run each once or twice: what they wait for is the compiler. With these flags
# it takes a quarter of its time, for slower programs; on one core there is no gain in cutting a program into 32 pieces
# to compile. An XLA that does not know one of them does not start, so they are tried first.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
if "PYTEST_XDIST_WORKER" not in os.environ and os.environ.get("OPTIMIZED_TESTS") != "true":
    quick = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(command, env=quick, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = quick["XLA_FLAGS"]

from jaxtyping import config, install_import_hook

# Shapes and types are checked where shapes are annotated. Of all else mypy sees the types, and looking at them at each
# call as well took a third of the time.
PACKAGE = Path(__file__).parent.parent / "llmq_jax"
WITH_ARRAYS = [file.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("*.py") if "jaxtyping" in file.read_text()]
if not config.jaxtyping_disable:  # JAXTYPING_DISABLE=1
    install_import_hook([".".join(file.with_suffix("").parts) for file in WITH_ARRAYS], "beartype.beartype")

import pytest

# Tracing makes millions of objects and few cycles, and what was imported stays: looking through it all again and again
# took a tenth of the time. Cycles go at the end of each module.
gc.set_threshold(200_000, 50, 1000)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """JAX keeps each program with its MLIR context, and the more of them live, the slower a new one is made: after a
    thousand tests an addition takes seconds. (And Linux lets a process have 65,530 pieces of memory, of which a program
    takes several.) What is dropped here comes again from the cache on disk."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def program(capsys):
    """`program(name, *words)` -> (exit code, stdout, stderr) of `python -m NAME WORDS`, or of `llmq`, run here."""
    from tests.programs import ended

    return lambda name, *words: (ended(name, *words), *capsys.readouterr())


@pytest.hookimpl(tryfirst=True)  # before marks are selected by
def pytest_collection_modifyitems(items):
    """Of the cases of a test marked `product`, as few go with `make test` as have each value of each parameter once;
    the others are `exhaustive`. Tests of a module with `product("a name")` share their values: each is run once."""
    cases = {}
    for item in items:
        if mark := item.get_closest_marker("product"):
            test = item.nodeid.split("[")[0]
            values = {("test", test), *((name, id(value)) for name, value in item.callspec.params.items())}
            cases.setdefault((item.path, *mark.args) if mark.args else test, {})[item] = values
    for values_of in cases.values():
        missing = set().union(*values_of.values())
        while missing:
            shown = max(values_of, key=lambda item: len(values_of[item] & missing))
            missing -= values_of.pop(shown)
        for item in values_of:
            item.add_marker("exhaustive")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With CI=true nothing is skipped in silence: a parity test that did not run has not passed."""
    report = (yield).get_result()
    if not hasattr(report, "wasxfail"):
        fail_where_skipped(report)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """Nor are whole modules."""
    fail_where_skipped((yield).get_result())


def fail_where_skipped(report):
    if report.outcome == "skipped" and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which is not allowed where CI=true: {report.longrepr}"
