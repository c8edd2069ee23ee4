"""The evaluation harness with our models and with its own backend for transformers: the same answers and metrics."""

import warnings

import lm_eval
import pytest
import tokenizers
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import llmq_jax as lq
from llmq_jax.interop import evaluation_harness
from llmq_jax.interop.evaluation_harness import HarnessModel, load_tasks
from tests.harness_tasks import TASKS, TEXTS, leave_out_what_takes_seconds, write_tasks
from tests.parity.references import randomise

CONTEXT = 48
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{%- if message.role == "system" and message.content == "refused" -%}{{ raise_exception("no system") }}{%- endif -%}
<|{{ message.role }}|>{{ message.content | trim if message.role == "user" else message.content }}</s>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Llama, whose tokenizer puts <s> before every text, and has a chat template."""
    folder = tmp_path_factory.mktemp("harness") / "llama"
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    words.train_from_iterator(TEXTS, trainer)
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        bos_token_id=0,
        eos_token_id=1,
    )
    return saved(transformers.LlamaForCausalLM(config), folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """GPT-2 on bytes: nothing is put before a text, and there is no bos_token."""
    folder = tmp_path_factory.mktemp("harness") / "gpt2"
    lq.ByteTokenizer().save(folder)
    sizes = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(vocab_size=257, **sizes, bos_token_id=256, eos_token_id=256)
    return saved(transformers.GPT2LMHeadModel(config), folder)


def saved(model, folder):
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request):
    """(the harness's own model, ours)."""
    folder = request.getfixturevalue(request.param)
    return HFLM(str(folder), device="cpu", batch_size=3), HarnessModel(folder, batch_size=4)


@pytest.fixture(scope="module")
def llama_pair(llama):
    return HFLM(str(llama), device="cpu", batch_size=1), HarnessModel(lq.load(llama))


def requests(kind, arguments):
    return [Instance(kind, {}, each if isinstance(each, tuple) else (each,), 0) for each in arguments]


PAIRS = {
    "plain": ("The river", " runs"),
    "several tokens": ("The river runs", " through the old town."),
    "one space at the end": ("The river ", "runs"),
    "spaces at the end": ("one two \n ", "three four"),
    "empty context": ("", "The old town"),
    "empty context before the first token itself": ("", "<s>The old town"),
    "begins as the template does": ("<s>one two", " three"),
    "special token in the text": ("one two</s>one", " three<|endoftext|>"),
    "other letters": ("Straße 東京", " à bientôt 😀"),
    "context too long": (" ".join(TEXTS), " sleeps"),
    "just fits": ("a" * (CONTEXT // 2), "bcd"),
    "a letter": ("Question: what is warm? Answer:", " A"),
    "another letter": ("Question: what is warm? Answer:", " B"),
    "and another": ("Question: what is warm? Answer:", " C"),
    "that and more": ("Question: what is warm? Answer:", " C C"),
    "longer than the context with it": (TEXTS[0], " zyxwvutsrqponmlkjihgfedcba" + "zyxwvuts"),
}


def test_loglikelihoods(pair):
    """Several batches, in an order of our own; every answer at its place."""
    theirs, ours = pair
    asked = list(PAIRS.values())
    expected = theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in expected]


def test_what_differs_in_the_last_token_is_read_once(gpt2, monkeypatch):
    ours = HarnessModel(gpt2, batch_size=2)
    asked = [("one two", f" {letter}") for letter in "ABCDE"] + [("one", " two")]
    alone = [ours.loglikelihood(requests("loglikelihood", [each]), disable_tqdm=True)[0] for each in asked]
    shapes, continuations = [], evaluation_harness._continuations

    def noted(model, variables, tokens, lengths, targets, *others):
        shapes.append((tokens.shape, targets.shape))
        return continuations(model, variables, tokens, lengths, targets, *others)

    monkeypatch.setattr(evaluation_harness, "_continuations", noted)
    together = ours.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert shapes == [((2, 32), (8, 32))]
    assert [each[0] for each in together] == pytest.approx([each[0] for each in alone], abs=1e-5)


BAD = {
    "model": (lambda folder: HarnessModel("nowhere"), "nowhere"),
    "batch size": (lambda folder: HarnessModel(folder, batch_size=0), "batch_size=0 must be at least 1"),
    "max_length": (lambda folder: HarnessModel(folder, max_length=CONTEXT + 1), "max_length=49 must lie between 1"),
    "dtype": (lambda folder: HarnessModel(lq.load(folder), dtype="bfloat16"), "no effect on a model that is loaded"),
    "continuation": (lambda folder: asked(folder, "loglikelihood", ("a", "b" * 49)), "has 49 tokens, and the model"),
    "no continuation": (lambda folder: asked(folder, "loglikelihood", ("a", "")), "has 0 tokens, and the model"),
    "answer": (lambda folder: asked(folder, "generate_until", ("a", {"until": []})), "answers of 256 tokens"),
    "argument": (
        lambda folder: asked(folder, "generate_until", ("a", {"num_beams": 2, "max_gen_toks": 2})),
        "num_beams=2, which is not supported",
    ),
    "no template": (lambda folder: HarnessModel(folder).apply_chat_template(MESSAGES), "has no chat template"),
}


def asked(folder, kind, arguments):
    return getattr(HarnessModel(folder), kind)(requests(kind, [arguments]), disable_tqdm=True)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(gpt2, case):
    """The harness's own backend asserts, or says nothing."""
    call, message = BAD[case]
    with pytest.raises(lq.BadInput, match=message):
        call(gpt2)


def test_spaces_are_no_context(gpt2):
    """The harness's own backend stops here, unless the tokenizer puts a token before every text."""
    ours = HarnessModel(gpt2)
    spaces, empty = ours.loglikelihood(requests("loglikelihood", [(" ", "town"), ("", " town")]), disable_tqdm=True)
    assert spaces == empty


def test_greedy_continuations_are_told(pair):
    """What the model itself says, of one token and of several, and the same but for its last character."""
    theirs, ours = pair
    asked = []
    for context in ("The river", "Question: what", "one two three"):
        tokens = ours.tok_encode(context)
        for count in (1, 4):
            new = lq.generate(ours.lm, [tokens], max_new_tokens=count, sampler=lq.Sampler(temperature=0.0), stop=())
            asked.append((None, tokens, new.tokens[0].tolist()))
            asked.append((None, tokens, [*new.tokens[0, :-1].tolist(), 7]))
    expected = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    found = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [each[1] for each in found] == [each[1] for each in expected] == [True, False] * 6
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)


def test_rolling_loglikelihoods(pair):
    """Of texts of one window, of several, and of none at all."""
    theirs, ours = pair
    asked = ["one", TEXTS[1], " ".join(TEXTS) * 2, "", "<s>one two"]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_answers(pair):
    """Stop strings, several arguments, and a context of which only the end fits."""
    theirs, ours = pair
    asked = []
    for context in ("The river", TEXTS[0] + TEXTS[1], "<s>one two", "a"):
        asked += [
            (context, {"until": ["\n"], "max_gen_toks": 20}),
            (context, {"until": [" the", "e", "z"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
            (context, {"until": "</s>", "max_new_tokens": 5}),
        ]
    theirs.batch_size_per_gpu = 1  # what it pads on the left shifts its logits a little
    expected = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    theirs.batch_size_per_gpu = 3
    found = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == expected
    assert any(expected)


def test_answers_with_a_penalty_on_repetition(pair, monkeypatch, tmp_path):
    """A task's own, and where it says nothing that of generation_config.json."""
    theirs, ours = pair
    monkeypatch.setattr(theirs.model.generation_config, "repetition_penalty", 1.5)
    generation = ours.lm.generation.replace(other={"repetition_penalty": 1.5})
    monkeypatch.setattr(theirs, "batch_size_per_gpu", 1)  # what it pads on the left counts as said there
    asked = [{"until": [], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 20, "repetition_penalty": 0.8}]
    asked = requests("generate_until", [("The river", each) for each in asked])
    plain = ours.generate_until(asked[:1], disable_tqdm=True)
    monkeypatch.setattr(ours, "lm", ours.lm.replace(generation=generation))
    found = ours.generate_until(asked, disable_tqdm=True)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert len({*found, *plain}) == 3
    with warnings.catch_warnings():  # as loading has elsewhere, where nothing applies the file's
        warnings.simplefilter("error")
        loaded = HarnessModel(lq.save_hf(ours.lm, tmp_path / "model"))
    assert loaded.generate_until(asked, disable_tqdm=True) == found


def test_answers_end_where_a_string_spells_a_special_token(llama_pair):
    """Which is not shown; and stop strings that the model is bound to write."""
    theirs, ours = llama_pair
    (said,) = ours.generate_until(requests("generate_until", [("one", {"until": [], "max_gen_toks": 16})]))
    assert len(said) > 5
    tokens = ours.tok_encode("one")
    drawn = lq.generate(ours.lm, [tokens], max_new_tokens=16, sampler=lq.Sampler(temperature=0.0), stop=())
    assert drawn.lengths[0] == 16
    until = [[said[3:5]], [said[4:6], said[1:3]], ["<|user|>"], [said[5], "<|assistant|>"]]
    asked = [("one", {"until": each, "max_gen_toks": 16}) for each in until]
    expected = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", asked), disable_tqdm=True) == expected
    assert 5 > len(expected[0]) > len(expected[1])
    assert ours._stop(["<|user|>", "\n", "", "</s>"]) == [1, "<|user|>", "\n", "</s>"]


def test_draws_follow_seeds_and_places(llama_pair):
    _, ours = llama_pair
    asked = requests("generate_until", [("one", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12})] * 3)
    answers = ours.generate_until(asked, disable_tqdm=True)
    assert len(set(answers)) == 3 and ours.generate_until(asked, disable_tqdm=True) == answers
    assert not set(HarnessModel(ours.lm, seed=ours.seed + 1).generate_until(asked, disable_tqdm=True)) & set(answers)


MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": " what is warm? "}]
CHATS = {
    "question": (MESSAGES, True),
    "system refused": ([{"role": "system", "content": "refused"}, MESSAGES[1]], True),
    "answer begun": ([*MESSAGES, {"role": "assistant", "content": "The sun "}], False),
    "question begun, which the template trims": (MESSAGES, False),
}


@pytest.mark.parametrize("case", CHATS)
def test_chat_template(llama_pair, case):
    messages, prompt = CHATS[case]
    theirs, ours = llama_pair
    text = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
    assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == text
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.tok_encode(text).count(0) == 1  # no second <s>


def test_what_the_harness_asks_of_a_model(pair):
    theirs, ours = pair
    for name in ("eot_token_id", "prefix_token_id", "max_length", "rank", "world_size", "chat_template"):
        values = [getattr(model, name) for model in pair]
        assert values[0] == values[1] or callable(values[0]), name
    assert ours.chat_template(False) is None
    assert "/" not in ours.tokenizer_name
    info = ours.get_model_info()
    assert info["model_num_parameters"] == theirs.get_model_info()["model_num_parameters"]
    assert info["model_dtype"] == "float32"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def evaluated(model, task_folder, **options):
    tasks, manager = load_tasks(list(TASKS), task_folder)
    return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=10, **options)


@pytest.mark.parametrize("chat", [False, True])
def test_local_tasks(llama_pair, gpt2, task_folder, monkeypatch, chat):
    """The whole way: the same metrics and their errors, of the same answers to the same prompts."""
    leave_out_what_takes_seconds(monkeypatch)
    theirs, ours = llama_pair
    if not chat:
        theirs, ours = HFLM(str(gpt2), device="cpu", batch_size=1), HarnessModel(gpt2, batch_size=3)
    expected = evaluated(theirs, task_folder, apply_chat_template=chat)
    found = evaluated(ours, task_folder, apply_chat_template=chat)
    for name in TASKS:
        theirs_by_metric, ours_by_metric = expected["results"][name], found["results"][name]
        assert ours_by_metric.keys() == theirs_by_metric.keys()
        for metric, value in theirs_by_metric.items():
            assert ours_by_metric[metric] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5))
        for one, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for answer, wanted in zip(one["resps"], other["resps"], strict=True):
                assert answer == wanted if isinstance(wanted[0], str) else close(answer, wanted)


def close(answer, wanted):
    """A log-probability, with or without its flag."""
    (answer,), (wanted,) = answer, wanted
    if isinstance(wanted, tuple):
        return abs(answer[0] - wanted[0]) < 1e-4 and answer[1] == wanted[1]
    return answer == pytest.approx(wanted, abs=1e-4, rel=1e-6)
