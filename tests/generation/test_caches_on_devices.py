import json
import subprocess
import sys
from pathlib import Path

from tests.devices import with_devices


def test_caches_are_divided_by_rows_and_heads():
    """Of all rows, each device would need the room that one device does; latents have no heads."""
    program = Path(__file__).parent / "cache_program.py"
    line = [sys.executable, str(program)]
    done = subprocess.run(line, env=with_devices(8), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {"llama", "gemma", "deepseek"}
    for name, result in found.items():
        assert result["equal"], name
        assert set(result["parts"]) == {4 if name == "deepseek" else 8}, name
        assert result["gathered"] == [], "a token is written where its row lies"
