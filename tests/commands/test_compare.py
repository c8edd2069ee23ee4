import json

import pytest


@pytest.fixture
def run(tmp_path):
    """`run(name, *losses)` makes a run folder with a validation loss, or another figure, every 10 steps."""

    def make(name, *validation, training=2.5, speed=1000.0, figure="validation_loss"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        records = [{"step": 10, "tokens": 320, "loss": training, "tokens_per_second": speed}]
        records += [
            {"step": 10 * step, "tokens": 320 * step, figure: loss} for step, loss in enumerate(validation, start=1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "finished.json").write_text("{}")
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
    assert rows[1] == ["first", "30", "2.5000", "loss", "2.2500", "2.0000", "20", "1,000"]
    assert rows[2] == ["second", "10", "2.5000", "loss", "2.5000", "2.5000", "10"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3.0, 2.0, 2.25], [2.5]]
    assert axes.get_title(loc="left") == "validation loss" and axes.get_xlim() == (0, 30)


def test_a_narrow_terminal_costs_no_figures(llmq, run, monkeypatch):
    folders = [run(f"a run of a name that takes some room, {number}", 3.0, 2.0) for number in range(2)]
    _, wide, _ = llmq("compare", *folders)
    monkeypatch.setenv("COLUMNS", "40")
    code, narrow, err = llmq("compare", *folders)
    assert (code, err) == (0, "") and "…" not in narrow
    assert [line.split() for line in narrow.splitlines()] == [line.split() for line in wide.splitlines()]


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


def judged(folder, name, best):
    """A run folder whose checkpoint says what it is judged by."""
    checkpoint = folder / "checkpoints" / "00000010"
    checkpoint.mkdir(parents=True)
    info = {"step": 10, "judged_by": name, "best": best, "value": 0.5, "version": 2}
    (checkpoint / "checkpoint.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_each_run_shows_what_it_is_judged_by(llmq, run, tmp_path, drawn):
    """Rewards are best where they are highest; of runs that agree on one it is drawn, not the loss, as it was in
    validation. What more of them have is drawn, wherever they stand."""
    reward = "validation_reward"
    one = judged(run("one", 0.25, 0.75, 0.5, figure=reward), "reward", "highest")
    two = judged(run("two", 0.0, figure=reward), "reward", "highest")
    other = judged(run("other", 3.0, 2.0), "loss", "lowest")
    code, out, err = llmq("compare", one, two, other, "--out", tmp_path / "x.png")
    assert (code, err) == (0, "left out of the plot, as not judged by the reward: other; give a --metric to draw all\n")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["run", "steps", "training", "judged", "by", "validation", "best", "at", "step", "tokens/s"]
    assert rows[1] == ["one", "30", "reward", "0.5000", "0.7500", "20", "1,000"]
    assert rows[2] == ["two", "10", "reward", "0.0000", "0.0000", "10", "1,000"]
    assert rows[3] == ["other", "20", "2.5000", "loss", "2.0000", "2.0000", "20", "1,000"]
    for folder in (one, two):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 40, "tokens": 1280, "reward": 0.125}\n')
    assert llmq("compare", one, two, "--out", tmp_path / "x.png")[0] == 0
    assert llmq("compare", other, one, two, "--out", tmp_path / "x.png")[0] == 0
    assert len(drawn) == 3
    for figure in drawn:
        (axes,) = figure.axes
        assert (axes.get_title(loc="left"), axes.get_ylabel()) == (reward, reward)
        assert [line.get_ydata().tolist() for line in axes.lines] == [[0.25, 0.75, 0.5], [0.0]]


def test_the_run_below_a_folder_is_named(llmq, run, tmp_path):
    below = run("run", 3.0, 2.0)
    (below / "config.json").write_text('{"run_format": 1}')
    code, out, err = llmq("compare", below.parent)
    assert (code, out) == (2, "")
    assert err == f"error: no metrics.jsonl in {below.parent}; give the folder of a run, such as {below}\n"


def test_rewards_are_not_drawn_beside_losses(llmq, run, tmp_path, drawn):
    (begun := tmp_path / "begun").mkdir()
    (begun / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "validation_reward": 0.25}\n')
    (tmp_path / "empty").mkdir()
    code, out, err = llmq("compare", tmp_path / "empty", run("a", 3.0, 2.0), begun, "--out", tmp_path / "x.png")
    assert code == 0 and out.splitlines()[2].split() == ["begun", "0", "reward", "0.2500"]
    assert err.splitlines() == [
        f"left out: no metrics.jsonl in {tmp_path / 'empty'}; give the folder of a run",
        "left out of the plot, as judged by the reward: begun; give a --metric to draw all",
    ]
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == "validation loss"
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3.0, 2.0]]


def test_a_run_without_losses_is_compared_by_what_it_has(llmq, tmp_path):
    """As GRPO's with --log-every 0, which is judged by its reward."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 4, "tokens": 8, "validation_reward": 0.5}\n')
    code, out, _ = llmq("compare", judged(tmp_path / "run", "reward", "highest"))
    assert (code, out.splitlines()[1].split()) == (0, ["run", "4", "reward", "0.5000", "0.5000", "4"])


def test_what_a_run_began_from_is_not_its_best_step(llmq, run):
    folder = run("run", 3.0, 2.5)
    records = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "validation_loss": 1.0}\n' + records)
    assert llmq("compare", folder)[1].splitlines()[1].split()[-4:] == ["2.5000", "2.5000", "20", "1,000"]
    assert llmq("compare", folder, "--metric", "validation_loss")[1].splitlines()[2].split()[3:5] == ["1.0000", "0"]


def test_the_plain_loss_the_first_of_equal_best_steps_and_the_median_speed(llmq, run):
    folder = run("run", 2.0, 3.0, 2.0)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, speed in ((31, 10.0), (32, 1200.0)):
            record = {"step": step, "tokens": 960, "loss": 2.5, "next_token_loss": 2.25, "tokens_per_second": speed}
            file.write(json.dumps(record) + "\n")
    row = llmq("compare", folder)[1].splitlines()[1].split()
    assert row == ["run", "32", "2.2500", "loss", "2.0000", "2.0000", "10", "1,000"]


def test_any_metric_is_shown_and_drawn(llmq, run, tmp_path, drawn):
    accuracy = "validation_rewards/accuracies"
    runs = [run("a", 0.5, 0.75, 0.25, figure=accuracy), run("b", 0.00001, figure=accuracy)]
    code, out, err = llmq("compare", *runs, "--metric", accuracy, "--out", tmp_path / "x.png")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == [accuracy]
    assert rows[1] == ["run", "steps", "last", "lowest", "at", "step", "highest", "at", "step", "tokens/s"]
    assert rows[2] == ["a", "30", "0.2500", "0.2500", "30", "0.7500", "20", "1,000"]
    assert rows[3] == ["b", "10", "1e-05", "1e-05", "10", "1e-05", "10", "1,000"]
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == accuracy
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.75, 0.25], [0.00001]]


def test_the_plot_is_over_tokens_or_seconds_of_training(llmq, tmp_path, drawn):
    """Seconds are tokens by the speed that was measured over them; the first step's, of which none is known, by that of
    the record after it, and those of a tail without a record by the last one."""
    (tmp_path / "run").mkdir()
    records = [
        {"step": 0, "tokens": 0, "validation_loss": 4.0},
        {"step": 1, "tokens": 100, "loss": 3.5, "tokens_per_second": None},
        {"step": 4, "tokens": 400, "loss": 3.0, "tokens_per_second": 50.0},
        {"step": 6, "tokens": 600, "validation_loss": 2.5},
        {"step": 8, "tokens": 800, "loss": 2.0, "tokens_per_second": 100.0},
        {"step": 9, "tokens": 900, "validation_loss": 1.5},
    ]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for x, label, validated, trained in (
        ("step", "steps", [0, 6, 9], [1, 4, 8]),
        ("tokens", "tokens seen", [0, 600, 900], [100, 400, 800]),
        ("seconds", "seconds of training", [0, 10, 13], [2, 8, 12]),
    ):
        for metric, expected in (("validation_loss", validated), ("loss", trained)):
            arguments = ["--metric", metric, "--x", x, "--out", tmp_path / "x.png"]
            assert llmq("compare", tmp_path / "run", *arguments)[0] == 0
            (axes,) = drawn[-1].axes
            assert axes.lines[0].get_xdata() == pytest.approx(expected) and axes.get_xlabel() == label
            assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] >= expected[-1]
            assert axes.get_legend().get_texts()[0].get_text().endswith(f"at step {9 if expected is validated else 8}")


def test_runs_of_one_name_and_what_they_differ_in(llmq, run, tmp_path):
    folders = []
    for rate in (0.001, 0.003):
        (tmp_path / f"lr-{rate}").mkdir()
        folders.append(run(f"lr-{rate}/run", 3.0))
        config = {"run_format": 1, "learning_rate": rate, "seed": 0, "model": {"name": "x" * 30 + str(rate)}}
        config |= {"name": rate, "dropout": None if rate == 0.001 else 0.1}  # the model's field says what `name` is
        config["sample_prompt"] = f"\n{rate}"
        (folders[-1] / "config.json").write_text(json.dumps(config))
    code, out, err = llmq("compare", *folders, run("bare", 2.0))
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[1:4]] == ["lr-0.001/run", "lr-0.003/run", "bare"]
    assert lines[5] == ["differing", "in", "lr-0.001/run", "lr-0.003/run", "bare"]
    assert lines[6:] == [
        ["learning_rate", "0.001", "0.003"],
        ["model.name", *["x" * 20 + "…"] * 2],
        ["dropout", "–", "0.1"],
        ["sample_prompt", r"\n0.001", r"\n0.003"],
    ]


def test_a_run_that_cannot_be_compared_is_left_out(llmq, run, tmp_path, drawn):
    (begun := tmp_path / "begun").mkdir()
    (begun / "config.json").write_text('{"run_format": 1}')
    damaged, other = run("damaged", 3.0), run("other", 3.0, figure="validation_reward")
    (damaged / "metrics.jsonl").write_text("{\n")
    options = ("--metric", "validation_loss", "--out", tmp_path / "x.png")
    code, out, err = llmq("compare", begun, run("a", 3.0), damaged, other, *options)
    assert code == 0 and [line.split()[0] for line in out.splitlines()[2:]] == ["a", "drawn:"]
    assert len(drawn[0].axes[0].lines) == 1
    assert [line.partition(";")[0] for line in err.splitlines()] == [
        f"left out: {begun / 'metrics.jsonl'} has no records yet",
        f"left out: {damaged / 'metrics.jsonl'} line 1 is not a metrics record",
        "left out: other has no 'validation_loss' in its metrics.jsonl",
    ]


def test_of_grpo_the_reward_is_shown_and_drawn(llmq, run, tmp_path, drawn):
    """Its loss is about 0 whatever the policy; one of these runs holds out no prompts, and one has no checkpoint. Of
    equal curves the lower one is seen between the dashes of the upper."""
    one = judged(run("one", 0.25, 0.5, figure="reward", training=1e-8), "reward", "highest")
    two = run("two", 0.25, 0.5, figure="reward")
    with (two / "metrics.jsonl").open("a") as file:  # what only one has is not drawn
        file.write('{"step": 20, "tokens": 640, "validation_reward": 0.75}\n')
    code, out, _ = llmq("compare", one, two, "--out", tmp_path / "x.png")
    assert code == 0 and out.splitlines()[1].split() == ["one", "20", "0.5000", "reward", "1,000"]
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == "reward" and axes.lines[1].get_ydata().tolist() == [0.25, 0.5]
    assert [line.is_dashed() for line in axes.lines] == [False, True]


def test_a_loop_of_grpo_that_evaluates_nothing_is_compared_by_its_reward(llmq, run, tmp_path, drawn):
    """As of docs/grpo.md from Python: its checkpoints name the loss, by which a run is judged unless told otherwise."""
    one, two = (judged(run(name, 0.25, 0.5, figure="reward", training=1e-8), "loss", "lowest") for name in ("a", "b"))
    code, out, _ = llmq("compare", one, two, "--out", tmp_path / "x.png")
    assert code == 0 and out.splitlines()[1].split() == ["a", "20", "0.5000", "reward", "1,000"]
    assert drawn[0].axes[0].get_title(loc="left") == "reward"


@pytest.fixture
def seeds(run):
    """`seeds(name, rate, seed, *losses)` makes a run folder with a config too."""

    def make(name, rate, seed, *validation, **options):
        folder = run(name, *validation, **options)
        config = {"run_format": 1, "learning_rate": rate, "options": {"steps": 30}, "seed": seed}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def test_the_mean_over_an_option(llmq, seeds, run, tmp_path, drawn):
    slow = [seeds("slow-1", 1e-3, 1, 3.0, 2.0, 2.25), seeds("slow-12", 1e-3, 12, 4.0, 2.5, training=3.5, speed=999.6)]
    fast, bare = seeds("fast", 3e-3, 1, 2.5), run("bare", 2.0)
    arguments = [slow[0], fast, slow[1], bare, "--mean-over", "seed"]
    code, out, err = llmq("compare", *arguments, "--out", tmp_path / "x.png")
    assert (code, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    rows = [[cell.strip() for cell in line if cell] for line in lines]
    mean, best = "2.3750 ± 0.18", "2.2500 ± 0.35"
    assert rows[1] == ["slow (2 runs)", "20–30", "3.0000 ± 0.71", "loss", mean, best, "20", "1,000"]
    assert rows[2] == ["fast", "10", "2.5000", "loss", "2.5000", "2.5000", "10", "1,000"]
    assert rows[5] == ["differing in", "slow (2 runs)", "fast", "bare"]
    assert rows[6] == ["learning_rate", "0.001", "0.003"] and len(rows) == 8
    (axes,) = drawn[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3.5, 2.25], [2.5], [2.0]]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[10, 20], [10], [10]]
    (band,) = axes.collections
    heights = {(x, round(y, 4)) for x, y in band.get_paths()[0].vertices.tolist()}
    assert heights == {(10, 4.2071), (10, 2.7929), (20, 2.6036), (20, 1.8964)}
    assert axes.get_legend().get_texts()[0].get_text() == "slow (2 runs), 2.2500 ± 0.35 at step 20"


def test_the_mean_of_a_metric_over_seconds(llmq, seeds, tmp_path, drawn):
    runs = [seeds("seed0/run", 1e-3, 0, 3.0, 2.0, speed=32.0), seeds("seed1/run", 1e-3, 1, 3.0, 2.0, speed=16.0)]
    options = ["--mean-over", "seed", "--metric", "validation_loss", "--x", "seconds", "--out", tmp_path / "x.png"]
    _, out, _ = llmq("compare", *runs, *options)
    row = [cell.strip() for cell in out.splitlines()[2].split("  ") if cell]
    assert row == ["seed0/run, seed1/run", "20", *("2.0000 ± 0", "2.0000 ± 0", "20", "3.0000 ± 0", "10"), "16–32"]
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [15, 30]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1", "2", "3", "4"], ["1, 2", "3, 4"]),
        (["a1", "a2", "b1", "b2"], ["a (2 runs)", "b (2 runs)"]),
        (["a-seed1", "a-seed2", "seed3", "b-seed4"], ["a (2 runs)", "seed3, b-seed4"]),
        (["x-1", "x-2", "x-3", "x-4"], ["x-1, x-2", "x-3, x-4"]),
    ],
)
def test_names_of_means(llmq, seeds, names, expected):
    runs = [seeds(name, 1e-3 if index < 2 else 3e-3, index % 2, 3.0) for index, name in enumerate(names)]
    _, out, _ = llmq("compare", *runs, "--mean-over", "seed")
    assert [line.split("  ")[0] for line in out.splitlines()[1:3]] == expected


def row_of(out, number=1):
    return [cell.strip() for cell in out.splitlines()[number].split("  ") if cell]


def test_the_mean_over_seeds_of_which_one_diverged_or_was_not_evaluated(llmq, seeds):
    """A figure that is not finite is null in the file; the last finite one is not the run's result."""
    good, bad, bare = (seeds(f"a-seed{number}", 1e-3, number, 3.0) for number in range(3))
    with (bad / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "tokens": 640, "loss": null}\n')
    (bad / "finished.json").unlink()
    (bare / "metrics.jsonl").write_text('{"step": 10, "tokens": 320, "loss": 2.5, "tokens_per_second": 1000}\n')
    code, out, err = llmq("compare", good, bad, "--mean-over", "seed")
    assert (code, err) == (0, "not finished (stopped, or still training): a-seed1, at step 20\n")
    assert row_of(out) == ["a (2 runs)", "10–20", "nan", "loss", "3.0000 ± 0", "3.0000 ± 0", "10", "1,000"]
    assert row_of(llmq("compare", bad)[1])[2] == "nan"
    assert row_of(llmq("compare", good, bad, "--mean-over", "seed", "--metric", "loss")[1], 2)[2] == "nan"
    assert row_of(llmq("compare", good, bare, "--mean-over", "seed")[1])[2:] == ["2.5000 ± 0", "loss", "1,000"]


def test_the_mean_over_an_option_that_sets_fields_of_the_model(llmq, run):
    folders = []
    for rate in (None, 0.2, 0.3):
        folders.append(run(f"dropout{rate}", 3.0))
        set_to = 0.1 if rate is None else rate
        config = {"run_format": 1, "dropout": rate, "model": {"attn_pdrop": set_to, "embd_pdrop": set_to, "width": 8}}
        (folders[-1] / "config.json").write_text(json.dumps(config))
    code, out, err = llmq("compare", *folders, "--mean-over", "dropout")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    assert row_of(out)[0] == "dropoutNone, dropout0.2, dropout0.3"
    config["model"]["width"] = 16
    (folders[-1] / "config.json").write_text(json.dumps(config))
    assert llmq("compare", *folders[1:], "--mean-over", "dropout")[2].endswith(": they differ in model.width too\n")


def test_bad_input(llmq, seeds, run, tmp_path):
    folder = run("a", 3.0)
    one, other = seeds("one", 1e-3, 0, 3.0), seeds("other", 3e-3, 1, 3.0)
    few, late = seeds("few", 1e-3, 0, 3.0), seeds("late", 1e-3, 1)
    (late / "metrics.jsonl").write_text('{"step": 7, "tokens": 3, "validation_loss": 2.0}\n')
    apart = tmp_path / "validated"
    apart.mkdir()
    (apart / "metrics.jsonl").write_text('{"step": 1, "tokens": 3, "validation_loss": 2.0}\n')
    (spoilt := tmp_path / "spoilt").mkdir()
    (spoilt / "metrics.jsonl").write_text('{"step": 1, "tokens": 3, "loss": NaN}\n')
    (tmp_path / "empty").mkdir()
    (begun := tmp_path / "begun").mkdir()
    (begun / "config.json").write_text('{"run_format": 1}')
    for arguments, message in (
        ([], "missing RUN"),
        ([tmp_path / "empty"], "no metrics.jsonl in"),
        ([folder, folder], "a is given twice; name each run once"),
        (
            [run("b"), apart, "--out", tmp_path / "x.png"],
            "validated has no training losses, and one of the others no validation losses",
        ),
        ([folder, "--out", "a.jpg"], "give it a name that ends in .png"),
        ([folder, "--out", tmp_path / "no" / "a.png"], "there is no folder"),
        ([folder, "--x", "tokens"], "--x has no effect without --out"),
        (
            [folder, "--metric", "acc"],
            "a has no 'acc' in its metrics.jsonl; choose from tokens, loss, tokens_per_second, ",
        ),
        ([folder, tmp_path / "mistyped"], "mistyped: there is no such file or folder"),
        ([folder, tmp_path / "beguN"], f"beguN: there is no such file or folder; did you mean {begun}?"),
        ([begun, tmp_path / "empty"], f"{begun / 'metrics.jsonl'} has no records yet"),
        ([begun], f"{begun / 'metrics.jsonl'} has no records yet"),
        ([one, other, "--mean-over", "sed"], "no run has an option 'sed'; did you mean seed?"),
        ([one, other, "--mean-over", "xyz"], "no run has an option 'xyz'; choose from learning_rate, seed, steps"),
        ([one, other, "--mean-over", "options.steps"], "no two of the runs differ in steps alone"),
        ([spoilt], "metrics.jsonl: loss of step 1 is nan, no number; restore the file"),
        ([one, other, "--mean-over", "learning-rate"], "differ in learning_rate alone, so that there is nothing to av"),
        ([one, other, "--mean-over", "seed"], "nothing to average: they differ in learning_rate too"),
        (
            [few, late, "--mean-over", "seed", "--out", tmp_path / "x.png"],
            "few, late: measured at no step in common, so that they have no mean",
        ),
        ([apart, "--x", "seconds", "--out", tmp_path / "x.png"], "validated has no tokens_per_second in its metrics"),
    ):
        code, _, err = llmq("compare", *arguments)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
