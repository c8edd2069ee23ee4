"""The templates "alpaca" and "plain" as chat templates in Jinja, which write the same text.

A model that was tuned with one of them expects that text. With the style as the chat template of its tokenizer,
`llmq chat`, `lm.chat`, further recipes and transformers' `apply_chat_template` all write it.
"""

from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.conversations import Conversation
from llmq_jax.data.instruction_batches import tokenize
from llmq_jax.data.prompt_templates import STYLES, render, set_in_jinja
from llmq_jax.data.tokenizers import Tokenizer

PROBE = ({"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."})


def as_chat_template(style: str, tokenizer: Tokenizer) -> str | None:
    """The chat template, in Jinja, of one of STYLES: "alpaca" or "plain". It writes one message of the user and one
    answer, with the beginning and end that texts of this tokenizer have in training, and raises for any other messages.
    Alpaca's input is the key `input` of the message.

    None where no text is encoded as the tokenizer's beginning or end tokens.
    """
    rendered = render(Conversation("a probe", "prompt", PROBE, given=1), style)
    tokens = tokenize(rendered, tokenizer).tokens.tolist()
    start = len(tokenizer.beginning)
    end = tokenizer.decode(tokens[start + len(tokenizer.encode(rendered.text)) :])
    # Some tokenizers put a space before the first word of a text, but not behind a beginning that is spelled out.
    for space in ("", " "):
        beginning = tokenizer.decode(tokens[:start]) + space
        source = set_in_jinja(beginning=beginning, end=end) + STYLES[style]
        text = ChatTemplate(source).render(PROBE, add_generation_prompt=False)
        if tokenizer.encode(text, allow_special=True) == tokens:
            return source
    return None
