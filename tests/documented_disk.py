"""What the documented commands read, tiny, under the names that they use: a user's disk.

Runs that a page takes for granted are made by other pages' commands.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer, FileTokenizer
from llmq_jax.data.gpt2_vocabulary import byte_characters
from tests.documented import ROOT
from tests.interop.llama_cpp import make_model, write_llama
from tests.weights import draw_variables

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
LENGTH = 256
LLAMA = {
    "max_position_embeddings": LENGTH,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
}
GPT2 = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {**LLAMA, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
WORDS = ["ab", "ba", "aa", "bb", "abab", "a", "b", "bab", "aba", "bba", "aab", "abb"]
MADE = (
    (
        "train.pretrain --data my.txt --out runs/other --steps 2 --batch-size 2 --hidden-size 32"
        " --num-attention-heads 2 --num-hidden-layers 2 --context 16",
        ("gpt2-layer_norm", "llama-rms_norm", "runs/baseline", "runs/capped"),
    ),
    (
        "train.instruct --data data.json --init-from HuggingFaceTB/SmolLM2-135M-Instruct --out runs/sft",
        ("runs/mine", "runs/chat"),
    ),
    ("train.reward --data prefs.json --init-from runs/sft --out runs/reward", ()),
)
"""Runs: a command, and further names for what it made."""


def write_disk(disk: Path) -> None:
    """All but the runs."""
    write_data(disk)
    write_tasks(disk)
    write_models(disk)
    write_gguf(disk / "model.gguf")
    shutil.copy(disk / "model.gguf", disk / "SmolLM2-135M-Instruct.Q4_1.gguf")
    (code,) = re.findall(r"```python\n(# my_rewards.py\n.*?)```", (ROOT / "docs" / "grpo.md").read_text(), re.DOTALL)
    (disk / "my_rewards.py").write_text(code)


def write_data(disk: Path) -> None:
    verse = "To be, or not to be, that is the question.\n"
    for name in ("my.txt", "tinyshakespeare.txt", "docs/text.txt", "text/a.txt", "text/b.txt"):
        write(disk / name, verse * 60)
    write(disk / "other.txt", "Whether 'tis nobler in the mind to suffer.\n" * 5)
    write(disk / "story.txt", "Once upon a time")
    openwebtext = disk / "nanoGPT/data/openwebtext"
    openwebtext.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.array(lq.GPT2Tokenizer().encode(verse * 60), np.uint16).tofile(openwebtext / name)
    write(disk / "questions.txt", "Why is the sky blue?\nAnd at night?\n")

    write_options(disk)

    spam = [("spam", f"You have won {word}!") for word in WORDS] + [("ham", f"See you at {word}.") for word in WORDS]
    for name in ("spam.tsv", "SMSSpamCollection.tsv"):
        write(disk / name, "".join(f"{label}\t{text}\n" for label, text in spam))
    write(disk / "reviews.csv", "label,text\n" + "".join(f"{label},{text}\n" for label, text in spam))
    write(disk / "messages.csv", "text\nYou have won!\nSee you.\n")
    labelled = [{"label": label, "text": text} for label, text in spam]

    alpaca = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in WORDS]
    pairs = [{"instruction": f"Say {word}.", "input": "", "chosen": word, "rejected": "No."} for word in WORDS]
    asked = [[{"role": "user", "content": f"Say {word}."}] for word in WORDS]
    said = [[{"role": "assistant", "content": text}] for text in [*WORDS, "No."]]
    no = said[-1]
    for name, records in (
        ("other.jsonl", [{"text": verse}] * 3),
        ("a.jsonl", labelled),
        ("b.jsonl", [{"label": label, "text": f"{text} Now."} for label, text in spam[::4]]),
        ("data.json", alpaca),
        ("alpaca.json", alpaca),
        ("instruction-data.json", alpaca),
        ("prefs.json", pairs),
        ("instruction-data-with-preference.json", pairs),
        ("prompts.jsonl", [{"prompt": f"Count to {i}.", "solution": str(i)} for i in range(12)]),
        ("sums.jsonl", [{"prompt": f"1+{i}=", "answer": str(1 + i)} for i in range(12)]),
        ("gsm8k_train.jsonl", [{"question": f"What is 1 + {i}?", "answer": f"It is\n#### {1 + i}"} for i in range(12)]),
        # Both are chats.jsonl to the docs: to train.instruct conversations, to others pairs.
        ("conversations.jsonl", [{"messages": [*x, *y]} for x, y in zip(asked, said, strict=False)]),
        ("pairs.jsonl", [{"prompt": x, "chosen": y, "rejected": no} for x, y in zip(asked, said, strict=False)]),
    ):
        lines = name.endswith(".jsonl")
        write(disk / name, "".join(json.dumps(x) + "\n" for x in records) if lines else json.dumps(records))


def write_options(disk: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    (options,) = re.findall(r"```yaml\n# small.yaml\n(.*?)```", page, re.DOTALL)
    write(disk / "small.yaml", options)


def write_tasks(disk: Path) -> None:
    """`my_task` as docs/evaluate.md shows it, and in its form those whose data would come from the hub."""
    page = (ROOT / "docs" / "evaluate.md").read_text()
    (task,) = re.findall(r"```yaml\n# my_tasks/my_task.yaml\n(.*?)```", page, re.DOTALL)
    (record,) = re.findall(r"lines such as `(\{.*?\})`", page)
    write(disk / "my_tasks" / "my_task.yaml", task)
    questions = "".join(f"{record}\n".replace("warm", word) for word in WORDS)  # few shots are other ones
    write(disk / "my_tasks" / "questions.jsonl", questions)
    for name in ("hellaswag", "arc_easy", "mmlu", "gsm8k"):
        changed = task.replace("task: my_task", f"task: {name}\nfewshot_split: test")
        write(disk / "tasks_of_the_hub" / f"{name}.yaml", changed)


def write_models(disk: Path) -> None:
    plain, chat = ByteTokenizer(), chat_tokenizer()
    for name, kind, fields, tokenizer in (
        ("gpt2", lq.GPT2Config, {**GPT2, "max_position_embeddings": 2 * LENGTH}, plain),
        ("gpt2-chat", lq.GPT2Config, {**GPT2, "max_position_embeddings": 2 * LENGTH}, chat),
        ("HuggingFaceTB/SmolLM2-135M", lq.Llama3Config, LLAMA, plain),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", lq.Llama3Config, LLAMA, chat),
        ("MODEL", lq.Llama3Config, LLAMA, chat),
        ("google/gemma-3-270m", lq.Gemma3Config, GEMMA, plain),
    ):
        config = kind(vocab_size=tokenizer.vocab_size, **fields)
        ends = lq.GenerationConfig(eos_token_id=(tokenizer.vocab_size - 1,))
        lm = lq.LanguageModel(config, lq.build(config), draw_variables(config), tokenizer, ends)
        (disk / name).parent.mkdir(exist_ok=True)
        lq.save_hf(lm, disk / name)
    for name in ("org/name@5f4c9a1", "HF_FOLDER", "FOLDER"):
        shutil.copytree(disk / "HuggingFaceTB" / "SmolLM2-135M", disk / name)
    shutil.copytree(ROOT / "tests" / "interop" / "data" / "openai_gpt2", disk / "models" / "124M")

    book = {**GPT2, "hidden_size": 24, "num_attention_heads": 12}
    config = lq.GPT2Config(vocab_size=50257, max_position_embeddings=32, **book)
    state = lq.interop.to_state_dict(draw_variables(config), config, layout="book")
    torch.save({name: torch.from_numpy(array.copy()) for name, array in state.items()}, disk / "gpt2.pth")


def chat_tokenizer() -> FileTokenizer:
    """Bytes, with the template of ChatML and its two tokens."""
    return ByteTokenizer().with_tokens(CHAT_TOKENS).with_chat_template(CHATML)


def write_gguf(path: Path) -> None:
    """A Llama in Q4_1, with bytes and ChatML."""
    tokens = [*byte_characters(), "Ġa", "<|endoftext|>", *CHAT_TOKENS]

    def add_tokenizer(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 257 + [3] * 3)
        writer.add_token_merges(["Ġ a"])
        writer.add_bos_token_id(tokens.index("<|im_start|>"))
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_chat_template(CHATML)

    sizes = {"vocab_size": len(tokens), "intermediate_size": 64, "max_position_embeddings": LENGTH}
    write_llama(path, make_model(**sizes, tie_word_embeddings=True), add_tokenizer, kind="Q4_1")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
