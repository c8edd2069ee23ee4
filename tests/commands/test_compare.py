import json

import pytest


@pytest.fixture
def run(tmp_path):
    """`run(name, *losses)` makes a run folder with a validation loss every 10 steps."""

    def make(name, *validation, training=2.5, speed=1000.0):
        folder = tmp_path / name
        folder.mkdir()
        records = [{"step": 10, "tokens": 320, "loss": training, "tokens_per_second": speed}]
        records += [
            {"step": 10 * step, "tokens": 320 * step, "validation_loss": loss}
            for step, loss in enumerate(validation, start=1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return make


def test_table_and_plot(llmq, run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    first, second = run("first", 3.0, 2.0, 2.25), run("second", 2.5, speed=None)
    code, out, err = llmq("compare", first, second, "--out", tmp_path / "both.png")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[1] == ["first", "30", "2.5000", "2.2500", "2.0000", "20", "1,000"]
    assert rows[2] == ["second", "10", "2.5000", "2.5000", "2.5000", "10"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3.0, 2.0, 2.25], [2.5]]
    assert axes.get_title(loc="left") == "validation loss" and axes.get_xlim() == (0, 30)


def test_training_losses_where_a_run_has_no_others(llmq, run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    assert llmq("compare", run("a", 3.0), run("b", training=4.0), "--out", tmp_path / "x.png")[0] == 0
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "training loss"
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2.5], [4.0]]


def test_names_are_names_whatever_they_look_like(llmq, run, tmp_path, monkeypatch):
    """Neither formulas nor styles nor hidden."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    names = ["a$_$", "_b", "c[lr=1]"]
    code, out, err = llmq("compare", *(run(name, 3.0) for name in names), "--out", tmp_path / "x.png")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:4]] == names
    shown = [text.get_text().split(",")[0].strip() for text in figures[0].axes[0].get_legend().get_texts()]
    assert shown == names


def test_runs_of_one_name_and_what_they_differ_in(llmq, run, tmp_path):
    folders = []
    for rate in (0.001, 0.003):
        (tmp_path / f"lr-{rate}").mkdir()
        folders.append(run(f"lr-{rate}/run", 3.0))
        config = {"run_format": 1, "learning_rate": rate, "seed": 0, "model": {"name": "x" * 30 + str(rate)}}
        (folders[-1] / "config.json").write_text(json.dumps(config))
    code, out, err = llmq("compare", *folders, run("bare", 2.0))
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[1:4]] == ["lr-0.001/run", "lr-0.003/run", "bare"]
    assert lines[5] == ["differing", "in", "lr-0.001/run", "lr-0.003/run", "bare"]
    assert lines[6:] == [["learning_rate", "0.001", "0.003"], ["model.name", *["x" * 20 + "…"] * 2]]


def test_bad_input(llmq, run, tmp_path):
    folder = run("a", 3.0)
    apart = tmp_path / "validated"
    apart.mkdir()
    (apart / "metrics.jsonl").write_text('{"step": 1, "tokens": 3, "validation_loss": 2.0}\n')
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "missing RUN"),
        ([tmp_path / "empty"], "no metrics.jsonl in"),
        ([folder, folder], "a is given twice; name each run once"),
        ([run("b"), apart, "--out", tmp_path / "x.png"], "validated has validation losses alone"),
        ([folder, "--out", "a.jpg"], "give it a name that ends in .png"),
        ([folder, "--out", tmp_path / "no" / "a.png"], "there is no folder"),
    ):
        code, _, err = llmq("compare", *arguments)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
