"""What people get wrong, command by command: exit code 2, one line that says what and where, nothing written.

Each recipe's own tests have the rarer faults; here is the table of those that every architecture, objective and format
must refuse from the command line.
"""

import json
import re
import shlex

import pytest

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.language_model import LanguageModel

PRETRAIN = "python -m train.pretrain --data text.txt --out run"
CLASSIFIER = "python -m train.classifier --init-from model --out run"
INSTRUCT = "python -m train.instruct --init-from model --out run"
DPO = "python -m train.dpo --data pairs.jsonl --init-from model --out run"
GRPO = "python -m train.grpo --init-from model --out run --max-new-tokens 8"

TABLE = [
    # Windows, heads
    (f"{PRETRAIN} --preset gemma3-10m --config sliding_window=-1", "sliding_window=-1 must be at least 1"),
    (f"{PRETRAIN} --preset gemma3-10m --config sliding_window=999", "must be at most --context 256"),
    (f"{PRETRAIN} --preset gemma3-10m --config 'layer_types=[\"full_attention\"]'", "layer_types"),
    (f"{PRETRAIN} --preset gemma3-10m --config head_dim=7", "head_dim=7 must be even: RoPE turns pairs of features"),
    (f"{PRETRAIN} --preset llama-10m --config num_key_value_heads=5", "must divide --num-attention-heads 6"),
    (f"{PRETRAIN} --preset llama-10m --config no_such_field=5", "no_such_field"),
    # Experts
    (f'{PRETRAIN} --preset llama-10m --config \'experts={{"num_experts": 4, "top_k": 8}}\'', "top_k=8 is more than"),
    (
        f"{PRETRAIN} --preset llama-10m --config "
        '\'experts={"num_experts": 4, "top_k": 2, "dispatch": "capacity", "capacity_factor": 0}\'',
        "capacity_factor=0.0 must be positive, or all is dropped",
    ),
    (
        f"{PRETRAIN} --preset llama-10m --config "
        '\'experts={"num_experts": 4, "top_k": 2, "balance": {"bias_rate": 0.001}}\'',
        "moves a bias that needs selection_bias=true",
    ),
    (f"{PRETRAIN} --preset deepseek-10m --config n_group=3", "n_group=3 must divide n_routed_experts=16"),
    # Latent attention, further tokens
    (f"{PRETRAIN} --preset deepseek-10m --config qk_rope_head_dim=3", "must be even and above 0"),
    (f"{PRETRAIN} --preset deepseek-10m --config q_lora_rank=0", "None makes queries without a latent"),
    (
        f"{PRETRAIN} --preset deepseek-10m --context 2 --config num_nextn_predict_layers=4",
        "must be below --context 2",
    ),
    (f"{PRETRAIN} --mtp-coefficient 0.3", "--mtp-coefficient has no effect"),
    # Training
    (f"{PRETRAIN} --data missing.txt", "there is no file or folder missing.txt"),
    (f"{PRETRAIN} --batch-size 6 --accumulate 4", "--accumulate is 4 and must divide --batch-size 6"),
    (f"{PRETRAIN} --betas 0.9 1.5", "must be at least 0 and below 1"),
    (f"{PRETRAIN} --moments bfloat16 --betas 0.9 0.999", "what one update changes is rounded away"),
    (f"{PRETRAIN} --learning-rte 1", "unknown option --learning-rte: did you mean --learning-rate?"),
    (f"{PRETRAIN} --n-layer 2", "unknown option --n-layer: here it is --num-hidden-layers; see"),
    (f"{PRETRAIN} --lr 1e-3", "unknown option --lr: here it is --learning-rate; see"),
    (f"{PRETRAIN} --bf16 true", "unknown option --bf16: here it is --dtype bfloat16; see"),
    (f"{PRETRAIN} --deepspeed zero3.json", "unknown option --deepspeed: here it is --mesh; see"),
    (f"{PRETRAIN} --report_to wandb", "unknown option --report-to: here it is --wandb; see"),
    ("llmq generate x --push-to-hub", "unknown option --push-to-hub: see"),
    (f"{PRETRAIN} --push_to_hub", "unknown option --push-to-hub: a run stays here; python -m convert.to_hf RUN FOLDER"),
    (
        f"{PRETRAIN} --num-key-value-heads 2",
        "unknown option --num-key-value-heads: as a field of the model's config it is given by --config "
        "num_key_value_heads=VALUE; see",
    ),
    (
        f"{INSTRUCT} --hidden-size 64",
        "unknown option --hidden-size: the model of --init-from brings its config, which is not changed here; leave it",
    ),
    (f"{CLASSIFIER} --n_layer 2", "unknown option --n-layer: the model of --init-from brings its config, which is not"),
    (
        f"{DPO} --model_type llama",
        "unknown option --model-type: the model of --init-from brings its config, which is not",
    ),
    (f"{PRETRAIN} --model-type llama", "unknown option --model-type: here it is --preset; see"),
    (f"{CLASSIFIER} --num_labels 2", "unknown option --num-labels: the classes are the labels that the data have; see"),
    (f"{INSTRUCT} --dropout 0.1", "unknown option --dropout: here it is --lora-dropout; see"),
    (f"{DPO} --dropout 0.1", "unknown option --dropout: see"),
    (f"{PRETRAIN} --gpus 2", "unknown option --gpus: here it is --mesh; see"),
    (f"{INSTRUCT} --use_peft", "unknown option --use-peft: here it is --train lora; see"),
    (f"{INSTRUCT} --use_dora true", "unknown option --use-dora: here it is --lora-variant dora; see"),
    (f"{CLASSIFIER} --context 64", "unknown option --context: here it is --max-length; see"),
    (f"{DPO} --config norm=dyt", "unknown option --config: the model of --init-from brings its config, which is not"),
    (f"{GRPO} --use_vllm true", "unknown option --use-vllm: the model that trains samples its answers itself"),
    (
        f"{GRPO} --importance_sampling_level sequence",
        "unknown option --importance-sampling-level: ratios of whole sequences are those of --loss gspo",
    ),
    (f"{PRETRAIN} --resume", "unknown option --resume: the same command again resumes a run; see"),
    (f"{PRETRAIN} --steps many", "--steps takes an integer, not 'many'"),
    (f"{PRETRAIN} --profile 9:1", "--profile is '9:1'"),
    ("python -m train.arithmetic --out run --steps 0", "--steps is 0 and must be at least 1"),
    ("python -m train.report model", "not the folder of a run"),
    # Devices
    (f"{PRETRAIN} --mesh data=300", "'data=300' is for 300 devices, and JAX has"),
    (f"{PRETRAIN} --mesh data=1,rows=2", "unknown axis 'rows': choose from data, fsdp, expert, tensor"),
    (f"{PRETRAIN} --pmap", "--pmap has no effect on one device; leave it out"),
    (f"{PRETRAIN} --pmap --mesh data=1", "--mesh has no effect with --pmap"),
    (f"{PRETRAIN} --coordinator nowhere:1", "--coordinator needs --processes, how many there are, and --process"),
    (
        "python -m train.plan --preset llama3.1-8b --mesh fsdp=7",
        r"fsdp=7 divides no parameter: params/\S+ \[.*choose a",
    ),
    # Labelled texts
    (
        f"{CLASSIFIER} --data labelled.csv --columns headline,label",
        "has no field 'text' .fields found: headline, label.",
    ),
    (f"{CLASSIFIER} --data one-class.csv", "every label is 'a', and a classifier tells classes apart"),
    # Conversations, adapters
    (f"{INSTRUCT} --data empty-answer.jsonl", "line 2: field 'completion': the response is empty"),
    (f"{INSTRUCT} --data role.jsonl", "the role 'usher': choose from system, developer, user, assistant, tool"),
    (f"{INSTRUCT} --data answers.jsonl --lora-targets nothing", "nothing"),
    (f"{INSTRUCT} --data answers.jsonl --lora-rank 1000", "--lora-rank 1000 is above that of"),
    (f"{INSTRUCT} --data answers.jsonl --optimizer muon", "--optimizer muon has no effect with --train lora, which"),
    (f"{INSTRUCT} --data answers.jsonl --init-from nowhere", "nowhere: there is no such file or folder"),
    # Pairs
    (
        "python -m train.reward --data prompts.jsonl --init-from model --out run",
        r"prompts.jsonl: line 1 is no preference pair \(fields found: prompt, answer\)",
    ),
    (f"{DPO} --label-smoothing 0.5", "--label-smoothing is 0.5 and must be at least 0 and below 0.5"),
    (f"{DPO} --loss ipo --label-smoothing 0.1", "--label-smoothing has no effect with --loss ipo"),
    (f"{DPO} --reference other", "has a vocabulary of 300 ids and the model one of 257"),
    # Rewards
    (f"{GRPO} --data prompts.jsonl --group-size 1", "an answer alone has no others to be better than"),
    (f"{GRPO} --data empty-prompts.jsonl", "empty"),
    (f"{GRPO} --data prompts.jsonl --loss cispo --clip-low 0.1", "--clip-low 0.1 has no effect with --loss cispo"),
    (f"{GRPO} --data prompts.jsonl --kl k1", "--kl k1 has no effect with --beta 0"),
    (f"{GRPO} --data prompts.jsonl --reward mine.py", "add the name of a function in it, as mine.py:reward"),
    (f"{GRPO} --data prompts.jsonl --max-new-tokens 64", "leaves no room in the model's context, 64"),
    # Converters
    ("python -m convert.to_hf model other", "other: is not empty; name another folder"),
    ("python -m convert.to_hf model run --adapter", "this model has no adapters to write"),
    ("python -m convert.from_hf nowhere run", "nowhere: there is no such file or folder"),
    ("python -m convert.parity nowhere", "nowhere: there is no such file or folder"),
    # llmq
    ("llmq generate model --prompt x --draft other", "the draft has a vocabulary of 300 ids and the model one of 257"),
    ("llmq generate model --prompt x --top-p 2", "--top-p is 2.0 and must be between 0 and 1"),
    ("llmq generate text.txt --prompt x", "text.txt: is a .txt file, not a model; give"),
    ("llmq chat model", "model has no chat template, so it cannot converse"),
    ("llmq classify model --text x", "model is a language model, which knows no classes"),
    ("llmq evaluate model missing.txt", "there is no file or folder missing.txt"),
    ("llmq compare model --out run.png", "no metrics.jsonl in model; give the folder of a run"),
    ("llmq models --nothing", "unknown option --nothing"),
    ("llmq generate --model x --prompt a", "unknown option --model: write MODEL without an option's name; see"),
    (
        "python -m convert.to_hf --model model --out x",
        "unknown option --model: write SOURCE TARGET without an option's",
    ),
    (
        "llmq chat x --prompt a",
        "unknown option --prompt: messages are typed or come from standard input; for one alone",
    ),
    (
        "llmq generate x --num_return_sequences 3",
        "unknown option --num-return-sequences: write the prompt so many times",
    ),
    ("llmq train --data a.txt", "unknown command 'train' for llmq: models are trained by python -m train.pretrain, "),
    ("llmq nothing", "unknown command 'nothing' for llmq: choose from generate, chat"),
]


def save_model(folder, **fields):
    tokenizer = ByteTokenizer()
    config = lq.Llama3Config(
        max_position_embeddings=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **fields
    )
    ends = lq.GenerationConfig(eos_token_id=(tokenizer.end_of_text,))
    lq.save(LanguageModel(config, lq.build(config), lq.init(config), tokenizer, ends), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    save_model(folder / "model", vocab_size=257)
    save_model(folder / "other", vocab_size=300)

    def write(name, records):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    (folder / "text.txt").write_text("to be or not to be\n" * 200)
    (folder / "labelled.csv").write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(20)))
    (folder / "one-class.csv").write_text("text,label\n" + "".join(f"t{i},a\n" for i in range(20)))
    write("answers.jsonl", [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(12)])
    write("empty-answer.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    write("role.jsonl", [{"messages": [{"role": role, "content": "x"} for role in ("usher", "assistant")]}])
    write("pairs.jsonl", [{"prompt": f"{i}:", "chosen": " yes", "rejected": " no"} for i in range(12)])
    write("prompts.jsonl", [{"prompt": f"{i}:", "answer": str(i)} for i in range(12)])
    write("empty-prompts.jsonl", [{"prompt": "", "answer": "1"}] * 12)
    return folder


@pytest.mark.parametrize(("command", "message"), TABLE, ids=[command[:110] for command, _ in TABLE])
def test_one_line_and_nothing_written(folder, monkeypatch, program, command, message):
    monkeypatch.chdir(folder)
    before = sorted(path for path in folder.rglob("*"))
    code, _, error = program(*shlex.split(command.removeprefix("python -m ")))
    assert code == 2
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
    assert re.search(message, error), error
    assert sorted(path for path in folder.rglob("*")) == before
