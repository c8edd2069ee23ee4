"""The files of a tokenizer as Hugging Face folders have them: a `tokenizer.json` and files that accompany it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers as hf_tokenizers

from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.errors import BadInput, at_place
from llmq_jax.json_text import parse_json

COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
"""Files that may accompany a tokenizer.json in a Hugging Face folder; kept and written back unchanged."""

UNREAD = ("tokenizer.model", "spiece.model", "tiktoken.model")
"""Files of SentencePiece and of tiktoken, from which transformers makes a tokenizer.json."""
WRITE_JSON = "have transformers write a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...))"

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that transformers has names for."""


def unread_file(folder: Path) -> str | None:
    """The name of the file that a folder has for a tokenizer in place of those that are read; None without one."""
    return next((name for name in UNREAD if (folder / name).is_file()), None)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer.json and its companions, by name."""

    contents: dict[str, bytes]
    source: str | Path
    """Where the files are from, for messages."""
    file: str = "tokenizer.json"
    """What the tokenizer.json is called there, for messages."""

    @classmethod
    def read(cls, file: Path) -> "TokenizerFiles":
        """The tokenizer.json `file`, which may have another name, and the companions in its folder."""
        return cls(
            {"tokenizer.json": file.read_bytes(), **cls.companions(file.parent).contents}, file.parent, file.name
        )

    @classmethod
    def companions(cls, folder: Path) -> "TokenizerFiles":
        """The files of a folder that may accompany a tokenizer.json."""
        paths = {name: folder / name for name in COMPANION_FILES}
        files = cls({name: path.read_bytes() for name, path in paths.items() if path.is_file()}, folder)
        default, tool_use = paths["chat_template.jinja"], folder / "additional_chat_templates" / "tool_use.jinja"
        if default.is_file() and tool_use.is_file():  # where newer transformers has what was in tokenizer_config.json
            both = (path.read_text("utf-8", errors="replace") for path in (default, tool_use))
            files = files.with_chat_template(*both)
        return files

    def config(self) -> dict[str, Any]:
        """What is in tokenizer_config.json."""
        return self._json("tokenizer_config.json")

    def named_tokens(self) -> dict[str, str]:
        """{"eos_token": "</s>", ...}. As in transformers, special_tokens_map.json takes precedence, but is not read
        where tokenizer_config.json has the newer form, with `added_tokens_decoder`."""
        config, named = self.config(), {}
        others = {} if "added_tokens_decoder" in config else self._json("special_tokens_map.json")
        for values in (config, others):
            for name, token in values.items():
                content = token.get("content") if isinstance(token, dict) else token  # an AddedToken written out
                if name in NAMED_TOKENS and isinstance(content, str):
                    named[name] = content
        return named

    def naming(self, name: str, token: str) -> dict[str, bytes]:
        """{file: content} of the files that change when `token` gets this name, one of NAMED_TOKENS."""
        changed = {"tokenizer_config.json": self._json("tokenizer_config.json") | {name: token}}
        others = self._json("special_tokens_map.json")
        if name in others:
            changed["special_tokens_map.json"] = others | {name: token}
        return {file: json_file(values) for file, values in changed.items()}

    def token_id(self, token: str | None) -> int | None:
        """The id of a token by its spelling in tokenizer.json; None where there is none."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def token(self, number: int) -> str | None:
        """The spelling of a token by its id; None where there is none."""
        return self._tokenizer.id_to_token(number)

    @cached_property
    def _tokenizer(self) -> hf_tokenizers.Tokenizer:
        return hf_tokenizers.Tokenizer.from_buffer(self.contents["tokenizer.json"])

    def chat_template(self) -> ChatTemplate | None:
        """The template of `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, the first that has
        one; None where none has. Of several named ones it is "default", with "tool_use" for when tools are given."""
        source: Any = self.contents.get("chat_template.jinja", b"").decode(errors="replace")
        for file in ("chat_template.json", "tokenizer_config.json"):
            source = source or self._json(file).get("chat_template")
        tool_use = None
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source, tool_use = named.get("default"), named.get("tool_use")
        if not isinstance(source, str):
            return None
        with at_place(self.source):
            return ChatTemplate(source, self.named_tokens(), tool_use if isinstance(tool_use, str) else None)

    def with_chat_template(self, source: str, tool_use: str | None = None) -> "TokenizerFiles":
        """The files with this chat template, and `tool_use` for when tools are given, in place of any others."""
        files = ("chat_template.json", "chat_template.jinja")
        contents = {name: content for name, content in self.contents.items() if name not in files}
        config = self.config()
        before = config.pop("chat_template", None)
        if tool_use is None:
            contents["chat_template.jinja"] = source.encode()
        else:
            named = {"default": source, "tool_use": tool_use}
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        if before is not None or tool_use is not None:
            contents["tokenizer_config.json"] = json_file(config)
        return TokenizerFiles(contents, self.source)

    def with_tokens(self, tokens: Sequence[str], special: bool) -> "TokenizerFiles":
        """The files with these tokens added; themselves where nothing changes. One that was added before stays as it is
        or, if it is to be `special`, becomes so."""
        tokenizer = hf_tokenizers.Tokenizer.from_buffer(self.contents["tokenizer.json"])
        there = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        new = [there.get(token, token) for token in tokens if token not in there or special > there[token].special]
        if not new:
            return self
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(new)
        content, config = tokenizer.to_str(pretty=True).encode(), self.config()
        contents = self.contents | {"tokenizer.json": content}
        if isinstance(listed := config.get("added_tokens_decoder"), dict):  # transformers lets it overrule the other
            added = {str(token.pop("id")): token for token in parse_json(content)["added_tokens"]}
            listed |= {number: token for number, token in added.items() if token["content"] in tokens}
            contents["tokenizer_config.json"] = json_file(config)
        elif "tokenizer.model" in contents:  # llama.cpp's converter reads it in place of tokenizer.json
            ids = {token: tokenizer.token_to_id(token) for token in tokens if token not in there}
            contents["added_tokens.json"] = json_file(self._json("added_tokens.json") | ids)
        return TokenizerFiles(contents, self.source)

    def _json(self, name: str) -> dict[str, Any]:
        """The JSON object in one of the files, {} where there is no such file."""
        try:
            content = parse_json(self.contents.get(name, b"{}"))
        except ValueError as error:
            raise BadInput(f"{self.source}: {name} is not a JSON object ({error})") from None
        if not isinstance(content, dict):
            raise BadInput(f"{self.source}: {name} is not a JSON object")
        return content


def json_file(values: dict[str, Any], indent: int | None = 2) -> bytes:
    return (json.dumps(values, indent=indent, ensure_ascii=False) + "\n").encode()
