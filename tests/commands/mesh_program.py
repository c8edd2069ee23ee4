"""Runs `llmq` on 8 virtual devices. A process must ask for them before JAX starts, hence a program of its own.

    python -m tests.commands.mesh_program < calls.jsonl

A line of standard input is {"words": [...], "stdin": "..."}; one of standard output is [exit code, stdout, stderr].
"""

import contextlib
import io
import json
import sys

import pytest

from tests import programs


def ended(words: list[str], stdin: str) -> tuple[int, str, str]:
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = programs.ended("llmq", *words)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    calls = [json.loads(line) for line in sys.stdin]
    if any("--tasks" in call["words"] for call in calls):
        import datasets

        from tests.harness_tasks import leave_out_what_takes_seconds  # with the harness, which takes seconds itself

        leave_out_what_takes_seconds(pytest.MonkeyPatch())
        datasets.disable_progress_bars()  # which are drawn where data is read for the first time
    for call in calls:
        print(json.dumps(ended(call["words"], call.get("stdin", ""))), flush=True)
