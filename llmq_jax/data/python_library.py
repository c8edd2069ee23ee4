"""The source of the running interpreter's standard library: real text that every machine already has."""

import hashlib
import sysconfig
import tokenize
from pathlib import Path

from llmq_jax.errors import BadInput

# Tests and the generated or bundled: they would be half of the text and teach little.
_LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "pydoc_data", "ensurepip"}


def python_library_documents() -> list[tuple[str, str]]:
    """(module name, source) of the standard library's pure Python modules, sorted by name.

    Left out: tests, idlelib, lib2to3, turtledemo, bundled and generated data (the character tables in `encodings`), and
    files that do not decode. The texts differ between Python versions, the choice of modules hardly.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        # site-packages, lib-dynload and config-3.x are no identifiers, and so no packages of the library.
        if not all(part.isidentifier() for part in parts) or _LEFT_OUT.intersection(parts):
            continue
        if parts[0].startswith("_sysconfigdata"):  # generated, holds this machine's paths
            continue
        try:
            with tokenize.open(path) as file:  # honours the encoding declared in the file
                source = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if source.strip() and "gencodec.py" not in source[:500]:
            documents.append((".".join(parts).removesuffix(".__init__"), source))
    if not documents:
        raise BadInput(f"this Python has no library source at {root}: give a text to train on with --data")
    return sorted(documents)


def split_modules(
    documents: list[tuple[str, str]], fraction: float = 0.07
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) modules. A top-level module or package goes as a whole, by a hash of its name; the default
    fraction holds out about 8% of the text.

    Modules of one package resemble each other: holding out just some of them would flatter the held-out loss. The hash
    of the name gives the same choice on every machine and in every version of Python.
    """
    training: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for name, source in documents:
        digest = hashlib.sha256(name.partition(".")[0].encode()).digest()
        chosen = int.from_bytes(digest[:4], "big") < fraction * 2**32
        (held_out if chosen else training).append((name, source))
    return training, held_out
