"""Chat templates in the recipes that read conversations, pairs or prompts: the options of --chat-template, and the chat
template that a run without one leaves behind."""

import dataclasses
import hashlib
from typing import Any

from llmq_jax.options import refuse_idle
from train.options import context_of

KWARGS = "--chat-template-kwargs"
WITHOUT_CHAT_TEMPLATE = "give one with --chat-template FILE, or choose another --template"


def check_chat_template(options: Any) -> None:
    """BadInput for a --chat-template or --chat-template-kwargs that cannot be read, or would have no effect."""
    from llmq_jax.data.chat_template import parse_variables, read_chat_template

    otherwise = options.template not in (None, "chat"), f"with --template {options.template}"
    refuse_idle(options, [("chat_template", *otherwise), ("chat_template_kwargs", *otherwise)])
    if options.chat_template_kwargs is not None:
        parse_variables(options.chat_template_kwargs, KWARGS)
    if options.chat_template is not None:
        read_chat_template(options.chat_template)


def with_text_options(options: Any, conversations: list, lm: Any) -> tuple[Any, Any]:
    """(the options with --template and --context filled in, the model with the template of --chat-template); prints a
    line where the model has a chat template by which the records are not written. BadInput where the model lacks a
    tokenizer or a chat template that is needed."""
    from llmq_jax.data import default_template

    lm = with_chat_template(options, lm)
    by_chat = options.chat_template or options.chat_template_kwargs
    template = options.template or ("chat" if by_chat else default_template(conversations, lm.tokenizer))
    if template == "chat":
        lm.require_chat_template(options.init_from, WITHOUT_CHAT_TEMPLATE)
    elif options.template is None and conversations[0].form == "prompt" and lm.tokenizer.chat_template is not None:
        print("answers that are texts are taken as they are; --template chat writes them as the model chats")
    return dataclasses.replace(options, context=context_of(options, lm.config), template=template), lm


def with_chat_template(options: Any, lm: Any) -> Any:
    """The model with the template of --chat-template in place of its own, if one is given, and with the variables of
    --chat-template-kwargs. BadInput where it has no tokenizer, or no chat template for the variables."""
    from llmq_jax.data.chat_template import parse_variables, read_chat_template

    tokenizer = lm.require_tokenizer(options.init_from)
    if options.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(read_chat_template(options.chat_template))
    if options.chat_template_kwargs is not None:
        lm.replace(tokenizer=tokenizer).require_chat_template(options.init_from, WITHOUT_CHAT_TEMPLATE)
        tokenizer = tokenizer.with_chat_variables(parse_variables(options.chat_template_kwargs, KWARGS))
    return lm.replace(tokenizer=tokenizer)


def chat_template_digest(options: Any, tokenizer: Any) -> dict[str, str]:
    """{name: SHA-256} of the template in --chat-template, which must be unchanged when a run resumes; empty without
    one."""
    if options.chat_template is None:
        return {}
    return {"chat_template_sha256": hashlib.sha256(tokenizer.chat_template.source.encode()).hexdigest()}


def in_style(options: Any, conversations: list, tokenizer: Any) -> Any:
    """The tokenizer that the run keeps. Where answers are learned in a style that is not that of the tokenizer's own
    chat template, this style becomes its chat template, so that the model is asked as it learned; prints a line where
    that replaces another one, or is not possible."""
    from llmq_jax.data import as_chat_template
    from llmq_jax.data.prompt_templates import style_of

    style, own = options.template, tokenizer.chat_template
    if style == "chat" or conversations[0].form == "text" or style_of(own) == style:
        return tokenizer
    source = as_chat_template(style, tokenizer)
    if source is None:
        kept = "it has none" if own is None else "it keeps the model's own, by which it did not learn"
        print(f"the tokenizer's beginning or end cannot be spelled out for a chat template of the run's style: {kept}")
        return tokenizer
    if own is not None:
        print(
            f"the run answers in the style {style}, which is its chat template from now on; the model's own stays with "
            f"{options.init_from}"
        )
    return tokenizer.with_chat_template(source)


def tell_of_no_end(options: Any, end: int | None) -> None:
    """Print a warning where --chat-template ends no answer with a token at which generation stops."""
    if options.chat_template is not None and end is None:
        print(
            f"{options.chat_template} ends no answer with a special token of the tokenizer, so that the model will not "
            "learn to stop: write {{ eos_token }} there"
        )
