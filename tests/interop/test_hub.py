"""Models and tokenizers by the names that the Hugging Face hub has for them: what is fetched, and what is said."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

import llmq_jax as lq
from llmq_jax.data import load_tokenizer
from llmq_jax.errors import BadInput
from llmq_jax.model_files import load
from llmq_jax.models.gpt2 import GPT2Config
from tests.byte_fallback import fallback_tokenizer
from tests.interop.llama_cpp import make_model, write_llama
from tests.interop.refusals import refused
from tests.weights import draw_variables


@pytest.fixture
def folder(tmp_path):
    """A small model."""
    config = GPT2Config(
        vocab_size=37, max_position_embeddings=16, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
    )
    return lq.save_hf(lq.LanguageModel(config, lq.build(config), draw_variables(config)), tmp_path / "model")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_hub_id_without_a_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    unreached = "the Hugging Face hub could not be reached (no network, or offline)"
    assert refused(load, name) == f"{name}: there is no such file or folder, and {unreached}"


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/tiny", "org/tiny", None),
        ("org/tiny@v1.0", "org/tiny", "v1.0"),
        ("org/tiny@refs/pr/1", "org/tiny", "refs/pr/1"),
    ],
)
def test_the_hub_is_asked_for_a_revision_and_for_data_alone(folder, monkeypatch, name, repository, revision):
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision))
        there = [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "merges.txt",
            "chat_template.jinja",
        ]
        there += ["additional_chat_templates/tool_use.jinja", "modeling_tiny.py", "pytorch_model.bin", "x.pkl"]
        there += ["training_args.bin", "run.sh", "onnx/model.json", "onnx/model.safetensors", "other/template.jinja"]
        wanted = list(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        texts = ["tokenizer.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
        assert wanted == ["config.json", *(["model.safetensors"] if len(asked) > 1 else []), *texts]
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load(name)
    assert asked == [(repository, revision)] * 2  # texts first


def test_no_weights_are_fetched_of_a_model_whose_config_is_refused(folder, monkeypatch, tmp_path):
    """Unless another config takes its place."""
    fetched = []

    def snapshot_download(allow_patterns, **wanted):
        fetched.append("model*.safetensors" in allow_patterns)
        if fetched[-1]:
            shutil.copy(folder / "model.safetensors", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert f"{tmp_path / 'config.json'}: model_type 'mamba' is not supported" in refused(load, "org/tiny")
    assert "is not supported" in refused(load, "org/tiny", config={"vocab_size": 7})
    assert fetched == [False, False]
    load("org/tiny", config=load(folder).config)
    assert fetched[2:] == [False, True]


def test_what_the_hub_does_not_give_is_told_in_a_line(tmp_path, monkeypatch):
    def gguf_alone(**wanted):
        return str(tmp_path / "snapshots" / "0")  # which is not made where no file is fetched

    def dropped(**wanted):
        raise RuntimeError("peer closed connection\nwithout a word")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gguf_alone)
    assert "has no file on the Hugging Face hub that could be read" in refused(load, "org/tiny-GGUF")
    monkeypatch.setattr("huggingface_hub.snapshot_download", dropped)
    assert "the Hugging Face hub did not give it (peer closed connection)" in refused(load, "org/tiny")


def test_a_gguf_file_of_the_hub(tmp_path, monkeypatch):
    """By its name there, alone or with the other parts of its model."""
    there = ["README.md", "config.json", "m-Q8_0.gguf", "all/m-00001-of-00002.gguf", "all/m-00002-of-00002.gguf"]
    model = make_model()

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        assert (repo_id, revision) == ("org/tiny-GGUF", "v1")
        wanted = list(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        fetched.extend(wanted)
        (tmp_path / "all").mkdir(exist_ok=True)
        if "config.json" in wanted:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        if "m-Q8_0.gguf" in wanted:
            write_llama(tmp_path / "m-Q8_0.gguf", model)
        if len(wanted) == 2:
            write_llama(tmp_path / "all" / "m.gguf", model, split_max_tensors=len(model.state_dict()) - 3)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name, files in (("m-Q8_0.gguf", there[2:3]), ("all/m-00002-of-00002.gguf", there[3:])):
        fetched: list[str] = []
        lm = load(f"org/tiny-GGUF/{name}@v1")
        assert (lm.config.model_type, fetched) == ("llama", files)
        assert lm.tokenizer is None
        assert "this is a GGUF file without one" in refused(load_tokenizer, f"org/tiny-GGUF/{name}@v1")
    assert "the Hugging Face hub has org/tiny-GGUF, but no x.gguf in it" in refused(load, "org/tiny-GGUF/x.gguf@v1")
    assert refused(load, "org/tiny-GGUF/../m.gguf") == "org/tiny-GGUF/../m.gguf: there is no such file or folder"
    for path in tmp_path.glob("*.gguf"):
        path.unlink()
    assert "of GGUF files, name one: org/tiny-GGUF/FILE.gguf" in refused(load, "org/tiny-GGUF@v1")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (GatedRepoError, "is given to those who accept its licence: do so on https://huggingface.co/org/tiny, "),
        (RepositoryNotFoundError, "the Hugging Face hub shows you no such model; check the name, or, of a private"),
    ],
)
def test_what_the_hub_does_not_give_to_strangers(monkeypatch, kind, told):
    """For want of a network these are raised here as the hub's client raises them: the first line tells nothing."""

    def refusing(**wanted):
        answer = SimpleNamespace(headers={}, request=None, status_code=401)
        raise kind("401 Client Error.\n\nNo access.", response=answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refusing)
    message = refused(load, "org/tiny@v1.0")
    assert message.startswith("org/tiny@v1.0: ") and told in message
    assert "https://huggingface.co/org/tiny" in message and "by `hf auth login`, or set HF_TOKEN" in message


@contextlib.contextmanager
def a_hub(folder, repository, revision):
    """The address of a server that answers, as the hub does, what its client asks of one repository."""
    commit = "0" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            api, files = f"/api/models/{repository}/", f"/{repository}/resolve/{commit}/"
            here = self.path.split("?")[0]
            names = sorted(path.name for path in folder.iterdir())
            if here in (f"{api}revision/{revision}", f"{api}revision/{commit}"):
                self.answer({"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names]})
            elif here == f"{api}tree/{commit}":
                sizes = {name: (folder / name).stat().st_size for name in names}
                self.answer([{"type": "file", "path": name, "size": sizes[name], "oid": name} for name in names])
            elif here.startswith(files):
                asked.append(here.removeprefix(files))
                self.answer((folder / asked[-1]).read_bytes())
            else:
                self.answer({}, 404, "RevisionNotFound" if here.startswith(api) else "RepoNotFound")

        do_HEAD = do_GET

        def answer(self, body, status=200, error=""):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            tag = hashlib.sha256(body).hexdigest()
            headers = {"Content-Length": len(body), "ETag": f'"{tag}"', "X-Repo-Commit": commit, "X-Error-Code": error}
            for name, value in headers.items():
                if value != "":
                    self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def log_message(self, *told):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.exhaustive
def test_the_hubs_own_client_fetches_a_model_without_its_code(folder, tmp_path):
    """In a process of its own: the client reads its variables once."""
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of the model was run')")
    write_llama(folder / "m.gguf", make_model())
    code = (
        "import sys, llmq_jax as lq\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(lq.load(name).logits([[1, 2]]).shape)\n"
        "    except lq.BadInput as error: print(error)\n"
    )
    names = ["org/tiny@v1", "org/tiny@v2", "org/other", "org/tiny/m.gguf@v1"]
    with a_hub(folder, "org/tiny", "v1") as (address, asked):
        variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=300)
    shape, revision, repository, of_gguf = done.stdout.splitlines() or [done.stderr] * 4
    assert (shape, of_gguf) == ("(1, 2, 37)", "(1, 2, 300)")
    assert "has org/tiny, but no branch, tag or commit 'v2' of it" in revision
    assert "shows you no such model" in repository
    assert {"config.json", "model.safetensors"} <= set(asked) and "modeling_tiny.py" not in asked


def test_a_revision_that_the_hub_has_not(monkeypatch):
    def refusing(**wanted):
        raise RevisionNotFoundError("404 Client Error.", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refusing)
    told = "the Hugging Face hub has org/tiny, but no branch, tag or commit 'v2' of it"
    assert refused(load, "org/tiny@v2") == f"org/tiny@v2: {told}"


def test_a_name_with_a_revision_that_is_none():
    for name in ("org/tiny@", "org/tiny@a b", "@v1", "org/tiny@v1@v2"):
        assert refused(load, name) == f"{name}: there is no such file or folder"


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert refused(load, "runs/min") == "runs/min: there is no such file or folder; did you mean runs/mine?"
    assert refused(load, "runs/other") == "runs/other: there is no such file or folder"


@pytest.mark.parametrize("name", ["./gpt2", "/no/such/folder", "a/b/c", "what is this"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    assert refused(load, name) == f"{name}: there is no such file or folder"


def test_a_hub_model_in_the_cache(folder, tmp_path, monkeypatch):
    """Files of the hub's cache are links that leave their folder."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    for path in folder.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    lm = load("org/tiny")
    tokens = np.arange(9)[None]
    np.testing.assert_array_equal(lm.logits(tokens), load(folder).logits(tokens))


def test_a_tokenizer_of_the_hub_comes_without_weights(monkeypatch, tmp_path):
    there = ["config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "run.py", "a/b.json"]
    there += ["additional_chat_templates/tool_use.jinja", "original/tokenizer.model", "onnx/merges.txt"]

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        wanted = list(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert (repo_id, revision) == ("org/tiny", "v1")
        assert wanted == [
            "config.json",
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "additional_chat_templates/tool_use.jinja",
        ]
        fallback_tokenizer().save(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tokenizer = load_tokenizer("org/tiny@v1")
    assert tokenizer.name == "org/tiny@v1" and tokenizer.encode("hi") == fallback_tokenizer().encode("hi")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda **wanted: str(tmp_path / "none"))
    with pytest.raises(BadInput, match=r"org/tiny: has no file on the Hugging Face hub"):
        load_tokenizer("org/tiny")
