"""A run as one HTML page: all of it inside, nothing of it live, and readable in a real browser."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training.metrics import SamplesFile, read_samples
from llmq_jax.training.report_page import write_report_page
from tests.training import tiny_run

BROWSER = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), None
)
HOSTILE = "<script>alert(1)</script> & <img src=http://example.org/x.png>"


class Reader(HTMLParser):
    """What a browser would see: text outside of style, tags, and what it would fetch."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.fetched, self._open = "", [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "my run"
    tiny_run.run(folder, drawn=True)
    samples = SamplesFile(folder / "samples.txt")
    samples.write(20, HOSTILE)
    samples.close()
    return folder


def test_a_run_writes_its_page_at_its_end(folder):
    page = (folder / "report.html").read_text()
    assert "finished after 20 steps" in page and "validation loss" in page


def test_everything_is_inside_and_nothing_is_live(folder):
    page = write_report_page(folder).read_text()
    found = Reader(page)
    assert "script" not in found.tags and "link" not in found.tags
    assert found.fetched and all(value.startswith("data:image/png;base64,") for value in found.fetched)
    assert not re.search(r"url\(|@import", page)
    assert HOSTILE in found.text  # as text
    for part in ("Loss", "Everything measured", "Where the time went", "Checkpoints", "checkpoint_every"):
        assert part in found.text, part


def test_a_run_under_way_has_a_page_too(folder, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(folder / name, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:10])  # torn
    step = json.loads(lines[2])["step"]
    page = write_report_page(tmp_path).read_text()
    assert f"not finished: step {step}" in Reader(page).text and "<h2>Loss</h2>\n<img" in page
    assert not (tmp_path / "losses.png").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"minimum_learning_rate": 0.1 + 0.2}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0, "reward": 0.5}\n')
    shutil.copy(folder / "losses.png", tmp_path)  # as GRPO once drew it, whose loss tells nothing
    page = write_report_page(tmp_path).read_text()
    assert re.findall("<dt>(.*?)</dt>|<h2>(.*?)</h2>", page)[1:] == [
        ("reward", ""),
        ("", "What it learned"),
        ("", "Options"),
    ]
    (tmp_path / "metrics.jsonl").unlink()
    page = write_report_page(tmp_path).read_text()
    assert "<td>minimum_learning_rate</td><td>0.3</td>" in page
    assert "nothing measured yet" in page


@pytest.mark.parametrize("config", [None, "{", "[]", '{"model_type": "gpt2"}'])
def test_what_is_no_run(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match="not the folder of a run"):
        write_report_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(BadInput, match=r"/run: there is no such file or folder$"):
        write_report_page(tmp_path / "run")


def test_the_run_below_a_folder_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "run" / "config.json").write_text('{"run_format": 1}')
    with pytest.raises(BadInput, match=rf"give one that a recipe has trained in, such as {tmp_path}/run$"):
        write_report_page(tmp_path)


@pytest.mark.parametrize("config", [None, "{"])
def test_a_run_whose_config_is_lost(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match=r"config.json is missing or damaged; restore it from a copy"):
        write_report_page(tmp_path)


def test_a_run_that_may_only_be_read_is_told_so(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = (
        f"{folder / 'report.html'}: this user may not write in {folder}; copy the run to another folder, or change "
    )
    with pytest.raises(BadInput, match=f"^{re.escape(message)}its permissions$"):
        write_report_page(folder)


@pytest.mark.parametrize("content", ['{"step": 2', "[1]"])
def test_a_damaged_end_is_told(content, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "finished.json").write_text(content)
    with pytest.raises(BadInput, match=r"finished.json is damaged .*; remove it and run the same again"):
        write_report_page(tmp_path / "run")


def test_samples_are_read_as_they_were_written(tmp_path):
    texts = [(4, "one\n\n  two\n"), (8, ""), (12, "step 3\n")]
    file = SamplesFile(tmp_path / "samples.txt")
    for step, text in texts:
        file.write(step, text)
    file.close()
    whole = (tmp_path / "samples.txt").read_bytes()
    assert read_samples(tmp_path / "samples.txt") == texts
    (tmp_path / "samples.txt").write_bytes(whole[:-3])
    assert read_samples(tmp_path / "samples.txt") == texts[:2]


@pytest.mark.exhaustive
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_real_browser(folder, tmp_path):
    """Without a network; what it shows is what it was given, and its pictures are drawn."""
    path = write_report_page(folder)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    drawn = "[...document.images].map(i => i.naturalWidth > 100 && i.complete).join()"
    script = f"<script>addEventListener('load', () => document.title = {drawn})</script>"  # once all have been decoded
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text().replace("</body>", f"<img src=data:broken>{script}</body>"))
    done = subprocess.run([*command, probed.absolute().as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1].split(",")
    assert title == ["true", "true", "false"]  # the last one is broken on purpose
    assert "Everything measured" in Reader(done.stdout).text


def test_the_command(folder, program):
    (folder / "report.html").unlink()
    code, out, _ = program("train.report", folder)
    assert code == 0 and Path(out.strip()) == folder / "report.html"
    assert (folder / "report.html").is_file()
