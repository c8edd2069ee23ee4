"""Tasks for the evaluation harness whose data are made here, without a network."""

import json
from pathlib import Path

import lm_eval.evaluator

TEXTS = [
    "The river runs through the old town, and the old town sleeps.",
    "Question: what is warm? Answer: the sun is warm in the morning.",
    "one two three four five six seven eight nine ten eleven twelve",
]
TASKS = {
    "local_choice": """
output_type: multiple_choice
fewshot_split: test
num_fewshot: 1
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "?"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}, {metric: chrf}]
""",
    "local_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: Path) -> Path:
    """The folder with a file for each task, and the records that they name."""
    choices = ["the sun", "the old town", "a river", "seven"]
    questions = [f"what is {word}?" for word in ("warm", "old", "asleep", "after six", "long", "bright", "small")]
    records = [
        {"question": question, "choices": choices, "answer": number % 4, "text": TEXTS[number % 3] * (number % 3 + 1)}
        for number, question in enumerate(questions)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, lines in TASKS.items():
        given = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
        head = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(given)}\n"
        (folder / f"{name}.yaml").write_text(head + lines.lstrip())
    return folder


def leave_out_what_takes_seconds(monkeypatch):
    """The harness asks pip and the graphics driver for its results, and forks for its errors."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
