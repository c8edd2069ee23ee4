"""The prompts of `train.grpo`: which are learned from, which are held out, and what their digest is taken of."""

import json
from collections.abc import Sequence
from typing import Any

from llmq_jax.counts import counted
from train.sources import Sources, held_out_apart, tell_left_out


def prompts_of(options: Any, sources: Sources, source: Any) -> tuple[list, list]:
    """(training, validation) prompts, none of which is in both."""
    from llmq_jax.data import check_vocabulary
    from llmq_jax.data.prompts import read_prompts

    left_out = options.left_out()

    def read(path):
        found, dropped = read_prompts(
            path,
            source.tokenizer,
            template=options.template,
            prompt_format=options.prompt_format,
            longest=options.max_prompt,
            left_out=left_out,
            fields=options.field_names(),
        )
        if dropped:
            print(f"{path}: {counted(dropped, 'prompt')} longer than --max-prompt {options.max_prompt} left out")
        for prompt in found:
            check_vocabulary(prompt.tokens, source.config.vocab_size, prompt.where)
        return found

    training, validation = held_out_apart(options, sources, read, lambda prompt: prompt.text, "prompt")
    tell_left_out(left_out)
    return training, validation[: options.validation_prompts]


def numbered(prompts: Sequence[Any]) -> Any:
    """All prompts, and the fields of their records that rewards read, as one array, to take a digest of."""
    import numpy as np

    columns = json.dumps([prompt.columns for prompt in prompts], default=str).encode()
    rows = [np.asarray([len(prompt.tokens), *prompt.tokens], np.int64) for prompt in prompts]
    return np.concatenate([*rows, np.frombuffer(columns, np.uint8).astype(np.int64)])
