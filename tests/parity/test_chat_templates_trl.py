"""What is learned by well-known chat templates, as published, against the marks in TRL's training forms of them."""

from pathlib import Path

import pytest
import transformers

from llmq_jax.data import as_conversation, render
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.records import Record

trl = pytest.importorskip("trl")

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
ALIKE = ["cohere", "cohere2", "deepseekv3", "deepseek_r1_distill", "gemma", "gemma3", "lfm2", "llama3", "qwen2_5"]
ALIKE += ["qwen3_instruct_2507"]
# Write an answer in another way, or end it otherwise, once messages follow.
REWRITING = ["qwen3", "gptoss", "phi3"]


@pytest.mark.parametrize(
    ("name", "weight"), [*((name, 1) for name in ALIKE), *((name, 0) for name in (*ALIKE, *REWRITING))]
)
def test_answers_and_their_ends(name, weight):
    """Their marks may begin with a part of what opens an answer, which is given to a model that answers."""
    said = [("user", "Q 1"), ("assistant", "A 1"), ("user", "Q 2"), ("assistant", "A 2")]
    messages = [{"role": role, "content": text} for role, text in said]
    source = (TEMPLATES / f"{name}.jinja").read_text()
    marked, (spans,) = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[messages],
        chat_template=(TEMPLATES / f"{name}_training.jinja").read_text(),
        return_assistant_tokens_mask=True,
        **SPECIAL,
    )
    theirs = [marked[0][start:end] for start, end in spans]
    theirs = theirs if weight else ["".join(theirs[1:])]
    messages[1]["weight"] = weight
    template = ChatTemplate(source, SPECIAL)
    rendered = render(as_conversation(Record("row", {"messages": messages})), "chat", template)
    ours = [rendered.text[start:end] for start, end in rendered.chosen("response")]
    assert len(ours) == len(theirs) == 1 + weight
    for answer, mark in zip(ours, theirs, strict=True):
        assert "A " in answer and mark.endswith(answer)
        assert mark.removesuffix(answer) in template.render(messages[:3])
