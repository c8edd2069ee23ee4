"""Finding a tokenizer: by name, in a folder, on the Hugging Face hub."""

import hashlib
import json
from pathlib import Path

from llmq_jax.data.gpt2_vocabulary import PUBLISHED_SHA256, vocabulary_files
from llmq_jax.data.tokenizer_files import WRITE_JSON, TokenizerFiles, json_file, unread_file
from llmq_jax.data.tokenizers import GPT2_NAMED_TOKENS, ByteTokenizer, FileTokenizer, GPT2Tokenizer, Tokenizer
from llmq_jax.errors import BadInput, warn


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer by name ("bytes", "gpt2"), from a tokenizer.json, or of anything that `load` takes: a folder, a GGUF
    file, a run, or a model on the Hugging Face hub, whose weights are not fetched ("org/name", but all of
    "org/name/file.gguf"). BadInput: there is none of these, it has no tokenizer, or that is damaged."""
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    if str(name_or_path) == "gpt2":
        return GPT2Tokenizer()
    path, name = Path(name_or_path).expanduser(), None
    if "/" in str(name_or_path) and not path.exists():
        from llmq_jax.interop.huggingface import find  # which imports JAX

        path, name = find(name_or_path, tokenizer=True), str(name_or_path)
    if path.is_file() and path.suffix != ".gguf":
        return _own_tokenizer(TokenizerFiles.read(path).contents) or FileTokenizer(path)
    found = _tokenizer_in(path, name) or _model_tokenizer(path)
    if found is None:
        what = "a folder without tokenizer.json or vocab.json and merges.txt" if path.is_dir() else "none of these"
        what = "a GGUF file without one" if path.is_file() else what
        what = f"a folder with {unread}, which is not read: {WRITE_JSON}" if (unread := unread_file(path)) else what
        raise BadInput(
            f"no tokenizer {str(name_or_path)!r}: expected bytes, gpt2, a tokenizer.json, a folder, run or GGUF file "
            f"with a tokenizer, or the org/name of a model on the Hugging Face hub; this is {what}"
        )
    return found


def _model_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer within a run, a checkpoint or a GGUF file; None where there is none."""
    from llmq_jax.interop.gguf import is_gguf, read_tokenizer  # which imports JAX
    from llmq_jax.training.checkpoints import TOKENIZER, find_checkpoint

    if (checkpoint := find_checkpoint(path)) is not None:
        return _tokenizer_in(checkpoint / TOKENIZER, path.resolve().name)
    return read_tokenizer(path) if is_gguf(path) else None


def tokenizer_in(
    folder: str | Path, name: str | None = None, without: str = "is loaded without a tokenizer"
) -> Tokenizer | None:
    """The tokenizer whose files are in a folder, or None where there are none, or, with a warning, where transformers
    alone reads them.

    It is a ByteTokenizer or GPT2Tokenizer, which are faster, where that would write exactly these files; else a
    FileTokenizer. name: see there. `without` is what the warning says of the model.
    """
    found = _tokenizer_in(Path(folder), name)
    if found is None and (unread := unread_file(Path(folder))):
        warn(f"{folder}: {without}, since {unread} is not read: {WRITE_JSON}")
    return found


def _tokenizer_in(folder: Path, name: str | None) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return _own_tokenizer(TokenizerFiles.read(folder / "tokenizer.json").contents) or FileTokenizer(folder, name)
    if vocabulary_files(folder):
        return _with_companions(GPT2Tokenizer(folder, name), folder)
    return None


def _with_companions(tokenizer: GPT2Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer with what other files of its folder add: its class, its end token, its chat template."""
    companions = TokenizerFiles.companions(folder)
    config = companions.config()
    kind = config.get("tokenizer_class") or "GPT2Tokenizer"
    flag = next((name for name in ("add_prefix_space", "add_bos_token", "add_eos_token") if config.get(name)), None)
    if str(kind).removesuffix("Fast") != "GPT2Tokenizer" or flag:
        what = flag or f"a {kind}"
        raise BadInput(
            f"{folder}: tokenizer_config.json names {what}, and vocab.json with merges.txt is read as plain "
            "GPT2Tokenizer alone: have transformers write a tokenizer.json (AutoTokenizer's save_pretrained)"
        )
    named = companions.named_tokens()
    if companions.chat_template() is None and named.items() <= GPT2_NAMED_TOKENS.items():
        return tokenizer
    files = tokenizer.files()
    own = json.loads(files["tokenizer_config.json"]) | named  # kept where the folder has no tokenizer_config.json
    files["tokenizer_config.json"] = json_file(own)
    return FileTokenizer.from_files({**files, **companions.contents}, tokenizer.name)


def _own_tokenizer(files: dict[str, bytes]) -> Tokenizer | None:
    """The GPT2Tokenizer or ByteTokenizer that writes exactly these files; None where neither does."""
    is_gpt2 = hashlib.sha256(files.get("merges.txt", b"")).hexdigest() == PUBLISHED_SHA256["vocab.bpe"]
    try:
        tokenizer = GPT2Tokenizer() if is_gpt2 else ByteTokenizer()
    except BadInput:  # GPT-2's vocabulary is not installed, and not needed either
        return None
    return tokenizer if tokenizer.files() == files else None
