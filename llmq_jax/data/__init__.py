"""Text to batches: tokenizers, readers of files, splits, windows over a stream of tokens, padding and packing;
labelled texts, conversations and preference pairs for fine-tuning."""

from llmq_jax.data.batching import multi_token_rows, pack, packed_rows, pad
from llmq_jax.data.chat_style import as_chat_template
from llmq_jax.data.conversations import Conversation, as_conversation, read_conversations
from llmq_jax.data.instruction_batches import (
    Example,
    Examples,
    InstructionBatches,
    instruction_batches,
    tokenize,
    tokenize_conversations,
)
from llmq_jax.data.labelled import (
    Deduplicated,
    LabelledRow,
    LabelledTexts,
    class_names,
    labelled_texts,
    read_labelled,
    read_rows,
    text_to_classify,
)
from llmq_jax.data.preference_batches import PreferenceBatches, PreferenceEvaluation
from llmq_jax.data.preferences import (
    Preference,
    PreferenceExample,
    PreferenceExamples,
    Preferences,
    chat_ending,
    read_preferences,
    split_preferences,
    tokenize_preferences,
    without_padding,
)
from llmq_jax.data.prompt_templates import Rendered, alpaca_prompt, default_template, render
from llmq_jax.data.prompts import Prompt, PromptBatches, read_prompts
from llmq_jax.data.python_library import python_library_documents, split_modules
from llmq_jax.data.records import Record, is_table, read_records
from llmq_jax.data.some_batches import SomeBatches
from llmq_jax.data.sources import Documents, has_fields, iterate_documents, read_documents
from llmq_jax.data.splits import are_held_out, split_documents, split_tokens
from llmq_jax.data.text_stream import TextStream
from llmq_jax.data.token_files import TokenFiles, is_token_folder, read_tokens, write_tokens
from llmq_jax.data.token_stream import encode_documents, encoded_blocks
from llmq_jax.data.tokenizer_loading import load_tokenizer, tokenizer_in
from llmq_jax.data.tokenizers import ByteTokenizer, FileTokenizer, GPT2Tokenizer, Tokenizer
from llmq_jax.data.windows import (
    Batch,
    EvaluationBatches,
    TrainingBatches,
    check_vocabulary,
    evaluation_batches,
    training_batches,
)

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Conversation",
    "Deduplicated",
    "Documents",
    "EvaluationBatches",
    "Example",
    "Examples",
    "FileTokenizer",
    "GPT2Tokenizer",
    "InstructionBatches",
    "LabelledRow",
    "LabelledTexts",
    "Preference",
    "PreferenceBatches",
    "PreferenceEvaluation",
    "PreferenceExample",
    "PreferenceExamples",
    "Preferences",
    "Prompt",
    "PromptBatches",
    "Record",
    "Rendered",
    "SomeBatches",
    "TextStream",
    "TokenFiles",
    "Tokenizer",
    "TrainingBatches",
    "alpaca_prompt",
    "are_held_out",
    "as_chat_template",
    "as_conversation",
    "chat_ending",
    "check_vocabulary",
    "class_names",
    "default_template",
    "encode_documents",
    "encoded_blocks",
    "evaluation_batches",
    "has_fields",
    "instruction_batches",
    "is_table",
    "is_token_folder",
    "iterate_documents",
    "labelled_texts",
    "load_tokenizer",
    "multi_token_rows",
    "pack",
    "packed_rows",
    "pad",
    "python_library_documents",
    "read_conversations",
    "read_documents",
    "read_labelled",
    "read_preferences",
    "read_prompts",
    "read_records",
    "read_rows",
    "read_tokens",
    "render",
    "split_documents",
    "split_modules",
    "split_preferences",
    "split_tokens",
    "text_to_classify",
    "tokenize",
    "tokenize_conversations",
    "tokenize_preferences",
    "tokenizer_in",
    "training_batches",
    "without_padding",
    "write_tokens",
]


def __dir__() -> list[str]:
    return __all__
