"""Lets the tests import tiny_run.py, which is a script too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
