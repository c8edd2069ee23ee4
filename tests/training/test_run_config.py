import sys
from types import SimpleNamespace

from llmq_jax.training import run_config
from llmq_jax.training.run_config import alike_but_for, differences, read_run_config, run_below, what_differs
from llmq_jax.training.run_folder import RunFolder


def test_numbers_are_told_without_what_a_division_leaves_in_their_last_digits(tmp_path):
    """Unless they differ by it alone."""
    before, after = {"rate": 3e-3 / 10, "betas": [0.1 + 0.2, 1]}, {"rate": 1e-3, "betas": [0.4, 1]}
    assert differences(before, after) == ["rate 0.0003 -> 0.001", "betas [0.3, 1] -> [0.4, 1]"]
    assert differences({"clip": float("nan")}, {"clip": float("nan"), "rate": None}) == []
    assert differences({"rate": 0.3}, {"rate": 0.1 + 0.2}) == ["rate 0.3 -> 0.30000000000000004"]
    one, other = "1" * 64, "1" * 12 + "2" * 52
    assert differences({"sha256": "0" * 64}, {"sha256": one}) == [
        f'sha256 "{"0" * 12}" -> "{one[:12]}" (other contents)'
    ]
    assert differences({"sha256": one}, {"sha256": other}) == [f'sha256 "{one}" -> "{other}" (other contents)']
    folders = [tmp_path / name for name in "ab"]
    for folder, rate in zip(folders, (0.3, 0.1 + 0.2), strict=True):
        RunFolder(folder, {"rate": rate, "minimum": rate / 10 if rate == 0.3 else 0.04}).close()
    found = what_differs(folders)
    assert (found["rate"], found["minimum"]) == (["0.3", "0.30000000000000004"], ["0.03", "0.04"])


def test_an_option_of_the_engine_has_its_plain_name(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, (steps, lr) in zip(folders, [(8, 0.1), (9, 0.1), (8, 0.2)], strict=True):
        RunFolder(folder, {"lr": lr, "options": {"steps": steps}}).close()
    assert alike_but_for("steps", folders) == [folders[:2], folders[2:]]
    assert alike_but_for("lr", folders) == [folders[::2], folders[1:2]]


def test_the_digest_of_the_code_is_that_of_files_and_names_wherever_they_stand(tmp_path, monkeypatch):
    library, scripts = tmp_path / "m" / "library", [tmp_path / name / "train.py" for name in ("a", "z")]
    for file in (library / "training" / "run_config.py", library / "step.py", *scripts):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {file.name}\n")
    monkeypatch.setattr(run_config, "__file__", str(library / "training" / "run_config.py"))

    def digest(script, package=""):
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(script), __package__=package))
        return run_config.code_digest.__wrapped__()

    before = digest(scripts[0])
    assert digest(scripts[1]) == before
    (library / "step.py").rename(library / "steps.py")
    assert digest(scripts[0]) != before
    (library / "steps.py").rename(library / "step.py")
    scripts[0].write_text("# another\n")
    assert digest(scripts[0]) != before
    assert digest("<stdin>") != before  # of a script that is piped into Python, which is no file
    alone, as_module = digest(scripts[1]), digest(scripts[1], "train")
    (scripts[1].parent / "beside.py").write_text("")
    assert digest(scripts[1]) == alone and digest(scripts[1], "train") != as_module


def test_no_more_runs_are_read_than_are_named(tmp_path, monkeypatch):
    for number in range(9):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "config.json").write_text("{" if number == 1 else '{"run_format": 1}')
    read = []
    monkeypatch.setattr(run_config, "read_run_config", lambda path: read.append(path) or read_run_config(path))
    assert run_below(tmp_path) == f", such as {tmp_path}/run0 or {tmp_path}/run2 or {tmp_path}/run3"
    assert [path.parent.name for path in read] == ["run0", "run1", "run2", "run3"]
