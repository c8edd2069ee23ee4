"""PyTorch's own files: `pytorch_model.bin` (one, or shards with an index) and the `.pth` and `.pt` of training scripts.

Such a file is a pickle, which can hold code to run. PyTorch's restricted reader (`weights_only=True`) builds nothing
but tensors and plain containers; a file that needs more is refused. Reading takes PyTorch, the extra `torch`.

Files are mapped into memory: a tensor's bytes are read when it is asked for, and the system may free those pages at any
time. Files from before PyTorch 1.6 (2020) cannot be mapped and are read at once.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.interop.tables import LazyTensor
from llmq_jax.interop.tensor_files import TensorFiles, damaged, open_file_or_shards

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pth", ".pt")
WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Where training scripts put the state dict when they save the optimizer's beside it."""
PREFIXES = ("module.", "_orig_mod.", "module.")
"""What names begin with in a model that DistributedDataParallel has wrapped, or `torch.compile`, or one the other."""


def is_torch(path: Path) -> bool:
    """Whether a path is a PyTorch file by its suffix, or a folder with `pytorch_model.bin` or an index of shards."""
    if path.is_file():
        return path.suffix in SUFFIXES
    return (path / WEIGHTS).is_file() or (path / INDEX).is_file()


def open_torch(path: Path) -> TensorFiles:
    """The tensors of such a file or folder."""
    return open_file_or_shards(path, WEIGHTS, _read)


def saved_beside(path: Path, name: str) -> Any:
    """The entry `name` that a training script saved beside the state dict, in one dict; None where there is none."""
    content = _unpickle(path)
    return content.get(name) if isinstance(content, Mapping) else None


def _read(path: Path) -> dict[str, LazyTensor]:
    state = _unpickle(path)
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        raise BadInput(f"{path}: holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    if not state:
        raise BadInput(f"{path}: holds no tensors; save model.state_dict()")
    tensors = {name: _lazy(path, name, tensor) for name, tensor in state.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _unpickle(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise BadInput(
            f"{path}: only PyTorch reads this file, and it is not installed: pip install -e '.[torch]'"
        ) from error
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # older files are bare pickles
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other versions
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # of every type, depending on where a broken file stops making sense
        if found := re.search(r"(?:GLOBAL|global|class) ([\w.]+\.\w+)", str(error)):
            raise BadInput(
                f"{path}: is no plain state dict: it holds {found[1]}, which is not loaded because that could run any "
                "code; save model.state_dict() alone"
            ) from error
        raise damaged(path, "a file of PyTorch's", _reason(error)) from error


def _reason(error: Exception) -> str:
    """PyTorch's error message without its advice, which fills a page."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].split("\n")
    first = next((line for line in lines if line.strip()), type(error).__name__)
    return first.partition(". ")[0].strip()


def _lazy(path: Path, name: Any, tensor: Any) -> LazyTensor:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise BadInput(f"{path}: is no plain state dict: {name!r} is of the type {kind}, where only tensors belong")
    dtype = _numpy_type(tensor)
    if dtype is None:
        raise BadInput(
            f"{path}: {name} is of the type {tensor.dtype} ({tensor.layout}, {tensor.device}), which is not supported"
        )

    def read() -> np.ndarray:
        # By way of bytes, since NumPy has no bfloat16 of its own.
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return flat.numpy().view(dtype).reshape(tuple(tensor.shape))

    return LazyTensor(tuple(tensor.shape), dtype, read)


def _numpy_type(tensor: Any) -> np.dtype | None:
    """NumPy's type of the same name, ml_dtypes' where it has none; None for tensors that are no plain arrays."""
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta or str(tensor.layout) != "torch.strided":
        return None
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return None
