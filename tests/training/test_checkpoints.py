import errno
import json
import logging
import os
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training import checkpoints as module
from llmq_jax.training.checkpoints import Checkpoints, find_checkpoint, load_checkpoint_variables
from llmq_jax.training.manifest import CorruptCheckpoint, verify_manifest, write_manifest
from llmq_jax.training.state import create_state
from tests.training.old_checkpoints import in_format_1, save_as_format_3_began, save_in_format_2

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), {"a": True, "b": False}))


def new_state(seed=0, width=4):
    rng = np.random.default_rng(seed)
    params = {"a": jnp.asarray(rng.normal(size=(3, width)), jnp.float32), "b": jnp.zeros((), jnp.float32)}
    frozen = {
        "w": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
        "odd": jnp.array([np.nan, -0.0, 1e-45], jnp.float32),
    }
    state = create_state({"params": params, "frozen": frozen}, OPTIMIZER, seed=seed + 2**31)
    return state.replace(step=jnp.asarray(seed, jnp.int32))


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


class Tokenizer:
    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1, 2 and 3, evaluated to 0.5, 0.25 and 1.0."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step, loss in ((1, 0.5), (2, 0.25), (3, 1.0)):
        checkpoints.save(step, new_state(step), model_config={"width": 4}, value=loss, tokens=10 * step)
    return checkpoints


def test_restored_state_has_the_same_bits_types_and_structure(three):
    restored, info = three.restore(new_state(9))
    assert bits(restored) == bits(new_state(3))
    assert jax.tree.structure(restored) == jax.tree.structure(new_state(3))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored)} == {"float32", "bfloat16", "int32", "uint32"}
    assert (info.step, info.tokens, info.judged_by, info.value) == (3, 30, "loss", 1.0)
    assert bits(three.restore(new_state(9), step=1).state) == bits(new_state(1))


def test_restores_into_shapes_alone_and_onto_the_sharding_asked_for(three):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    leaves, structure = jax.tree.flatten(new_state(9))
    plain = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    placed = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf in leaves]
    # A dict: TrainState checks that its fields are arrays.
    names = [str(number) for number in range(len(leaves))]
    three.save(4, dict(zip(names, leaves, strict=True)))
    assert bits(three.restore(dict(zip(names, plain, strict=True))).state) != []
    restored = three.restore(dict(zip(names, placed, strict=True))).state
    assert bits(restored) == bits(dict(zip(names, leaves, strict=True)))
    assert all(leaf.sharding == sharding for leaf in restored.values())
    assert structure == jax.tree.structure(new_state(3))


def test_variables_load_without_the_optimizer(three, tmp_path):
    three.save(4, new_state(4), model_config={"width": 4}, tokenizer=Tokenizer())
    config, variables, tokenizer, info = load_checkpoint_variables(tmp_path)
    assert config == {"width": 4}
    assert variables.keys() == {"params", "frozen"} and bits(variables) == bits(new_state(4).variables)
    assert sorted(os.listdir(tokenizer)) == ["tokenizer.json"]
    assert (info.step, info.value) == (4, None)
    older = load_checkpoint_variables(three.path(2))
    assert older.info.step == 2 and older.tokenizer_folder is None
    assert bits(older.variables) == bits(new_state(2).variables)


def test_a_checkpoint_that_a_run_deletes_meanwhile_gives_way_to_a_newer_one(three, tmp_path, monkeypatch):
    from llmq_jax.training import checkpoints

    verify = checkpoints.verify_manifest

    def deleting(folder):
        if folder == three.path(3):
            three.save(4, new_state(4), model_config={"width": 4})
            shutil.rmtree(folder)
        verify(folder)

    monkeypatch.setattr(checkpoints, "verify_manifest", deleting)
    assert load_checkpoint_variables(tmp_path).info.step == 4


def test_config_dataclass_is_saved_with_its_model_type(tmp_path):
    from llmq_jax.models.gpt2 import GPT2Config

    config = GPT2Config(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    path = Checkpoints(tmp_path).save(1, new_state(), model_config=config)
    saved = json.loads((path / "config.json").read_text())
    assert (saved["model_type"], saved["vocab_size"], saved["hidden_size"]) == ("gpt2", 5, 8)


def test_find_checkpoint(three, tmp_path):
    newest = three.path(3)
    assert find_checkpoint(tmp_path) == find_checkpoint(three.folder) == find_checkpoint(newest) == newest
    assert find_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "other" / "20240101").mkdir(parents=True)  # a date, say
    assert find_checkpoint(tmp_path / "other") is None
    with pytest.raises(BadInput, match=r"no checkpoint in .*other; give a run folder"):
        load_checkpoint_variables(tmp_path / "other")


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 6):
        path = checkpoints.save(step, new_state(step), value=float("nan"), best_step=min(step, 2))
    assert (checkpoints.steps(), checkpoints.latest_step()) == ([2, 4, 5], 5)
    saved = json.loads((path / "checkpoint.json").read_text())
    assert saved == {"step": 5, "tokens": 0, "judged_by": "loss", "best": "lowest", "value": None, "version": 3}
    Checkpoints(tmp_path, keep_last=1).save(7, new_state(7))
    assert sorted(os.listdir(tmp_path)) == ["00000007"]


def test_a_folder_that_is_named_otherwise_is_no_checkpoint(three):
    shutil.copytree(three.path(3), three.folder / "4")  # which a user has set aside
    (three.folder / "2024").mkdir()
    assert three.steps() == [1, 2, 3]
    assert find_checkpoint(three.folder) == three.path(3)
    assert three.restore(new_state()).info.step == 3


def test_checkpoints_of_format_1_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    in_format_1(checkpoints.save(3, new_state(3), judged_by=("reward", "highest"), value=0.75))
    info = load_checkpoint_variables(checkpoints.path(3)).info
    assert (info.judged_by, info.best, info.value) == (None, "lowest", -0.75)
    assert bits(checkpoints.restore(new_state()).state) == bits(new_state(3))


@pytest.mark.parametrize("keep_last", [0, -1])
def test_something_must_be_kept(keep_last, tmp_path):
    with pytest.raises(BadInput, match="keep_last is"):
        Checkpoints(tmp_path, keep_last=keep_last)


def every_file(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def test_any_flipped_bit_truncation_loss_or_addition_is_found_and_named(three):
    for path in every_file(three.path(3)):
        whole = path.read_bytes()
        name = path.relative_to(three.path(3)).as_posix()
        for fault, damaged in (
            ("SHA-256 differs", bytes([*whole[:-1], whole[-1] ^ 1]) if whole else b""),
            (f"has {len(whole) - 1:,} bytes", whole[:-1]),
        ):
            if damaged != whole:
                path.write_bytes(damaged)
                with pytest.raises(CorruptCheckpoint, match=f"{name} .*{fault}"):
                    three.restore(new_state(), step=3)
        path.unlink()
        with pytest.raises(CorruptCheckpoint, match=f"{name} is missing"):
            load_checkpoint_variables(three.path(3)) if name != "checkpoint.json" else three.restore(
                new_state(), step=3
            )
        path.write_bytes(whole)
    (three.path(3) / "state" / "added").touch()
    with pytest.raises(CorruptCheckpoint, match="state/added was not there"):
        three.restore(new_state(), step=3)
    (three.path(3) / "state" / "added").unlink()
    verify_manifest(three.path(3))


BROKEN = [b'{"files": []}', b'{"files": {"a": 1}}', b'{"files": {"a": {"size": 1e999, "sha256": ""}}}']


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", *BROKEN])
def test_lost_or_broken_manifest_is_damage(content, three):
    manifest = three.path(3) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"manifest.json (is missing|cannot be read)"):
        three.restore(new_state(), step=3)


def test_newest_whole_checkpoint_is_taken_with_a_warning_for_each_damaged_one(three):
    warnings = []
    for step in (3, 2):
        (three.path(step) / "config.json").write_text("{ }")
    assert three.restore(new_state(), warn=warnings.append).info.step == 1
    assert ["00000003" in warnings[0], "00000002" in warnings[1], len(warnings)] == [True, True, 2]
    assert all(warning.startswith("warning: ") and "\n" not in warning for warning in warnings)
    (three.path(1) / "config.json").write_text("{ }")
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint in .* is whole"):
        three.restore(new_state(), warn=warnings.append)


def test_nothing_saved_is_none_and_a_step_that_is_not_there_is_named(three, tmp_path):
    assert Checkpoints(tmp_path / "none").restore(new_state()) is None
    with pytest.raises(BadInput, match=r"no checkpoint of step 7 in .*; steps there: 1, 2, 3"):
        three.restore(new_state(), step=7)


def test_checkpoint_of_another_model_or_optimizer_is_refused(three):
    with pytest.raises(BadInput, match=r"params/a is float32\[3, 4\] in it and float32\[3, 5\] here") as error:
        three.restore(new_state(width=5))
    assert "(and 2 more)" in str(error.value)  # Adam's two moments
    state = new_state()
    params = {**state.variables["params"], "a": state.variables["params"]["a"].astype(jnp.bfloat16)}
    with pytest.raises(BadInput, match=r"float32\[3, 4\] in it and bfloat16\[3, 4\] here"):
        three.restore(state.replace(variables={**state.variables, "params": params}))
    with pytest.raises(BadInput, match=r"optimizer_state/.* is unknown here"):
        three.restore(state.replace(optimizer_state=optax.sgd(0.1).init({})))


def test_format_of_the_future_is_refused(three):
    info = three.path(3) / "checkpoint.json"
    info.write_text(info.read_text().replace('"version": 3', '"version": 4'))
    (three.path(3) / "manifest.json").unlink()
    write_manifest(three.path(3))
    with pytest.raises(BadInput, match="has format 4; this llmq_jax reads formats 1 to 3"):
        three.restore(new_state())


# What need not change from step to step.


def later(seed):
    """A state whose frozen arrays are those of `new_state(3)`."""
    return new_state(seed).replace(variables=new_state(3).variables | {"params": new_state(seed).variables["params"]})


def frozen_files(folder):
    return {path.relative_to(folder).as_posix(): path.stat() for path in folder.glob("frozen-*/**/*") if path.is_file()}


def test_what_does_not_train_is_written_once_and_each_checkpoint_is_whole(three, tmp_path):
    written = frozen_files(three.path(3))
    three.save(4, later(4))
    three.save(5, later(5))
    for step in (4, 5):
        assert {name: stat.st_ino for name, stat in frozen_files(three.path(step)).items()} == {
            name: stat.st_ino for name, stat in written.items()
        }
    shutil.rmtree(three.path(3))
    shutil.copytree(three.path(5), tmp_path / "elsewhere")
    for folder, step in ((three.path(4), 4), (tmp_path / "elsewhere", 5)):
        assert bits(load_checkpoint_variables(folder).variables) == bits(later(step).variables)
    assert bits(three.restore(new_state()).state) == bits(later(5))


def test_each_entry_that_is_carried_is_written_where_it_changed(three, monkeypatch):
    """As GRPO's reference and reward model; and so a collection that a step of one's own changes. What the checkpoints
    that are deleted on the way have in common with others stays."""

    state = later(4)
    frozen, carried = state.variables["frozen"], {"reference": {"a": jnp.ones(3)}, "learner": new_state(5)}
    changes = (
        (2, {"carried": carried}),
        (0, {"key": state.key + 1}),
        (1, {"carried": carried | {"learner": new_state(6)}}),
        (1, {"variables": state.variables | {"frozen": frozen | {"odd": -frozen["odd"]}}}),
    )
    read, read_manifest = [], module.read_manifest
    monkeypatch.setattr(module, "read_manifest", lambda folder: read.append(folder) or read_manifest(folder))
    for step, (count, change) in enumerate(changes, start=4):
        state = state.replace(**change)
        three.save(step, state)
        written = {name.split("/")[0] for name, file in frozen_files(three.path(step)).items() if file.st_nlink == 1}
        assert len(written) == count
        assert read == [three.path(step - 1)], "once for all parts"
        assert bits(three.restore(state).state) == bits(state)
        read.clear()
    assert three.steps() == [5, 6, 7]


def test_a_file_system_without_hard_links_gets_copies_for_which_room_is_counted(three, monkeypatch):
    def none(*_):
        raise PermissionError(1, "Operation not permitted")

    counted = []
    monkeypatch.setattr(module, "_check_room", lambda folder, parts: counted.append([part[:6] for part in parts]))
    three.save(4, later(4))
    monkeypatch.setattr(module.os, "link", none)
    three.save(5, later(5))
    assert counted == [["state"], ["state", "frozen"]]
    assert {file.st_nlink for file in frozen_files(three.path(5)).values()} == {1}
    assert bits(three.restore(new_state()).state) == bits(later(5))


def damaged_base(folder, content):
    name = max((files := frozen_files(folder)), key=lambda name: files[name].st_size)
    (folder / name).write_bytes(content((folder / name).read_bytes()))
    return name


def test_a_base_that_is_damaged_is_found_in_every_checkpoint_with_it(three):
    three.save(4, later(4))
    name = damaged_base(three.path(4), lambda whole: bytes([*whole[:-1], whole[-1] ^ 1]))
    three.save(5, later(5))
    for step in (3, 4, 5):
        with pytest.raises(CorruptCheckpoint, match=rf"0000000{step} is damaged: {name} has changed since"):
            three.restore(new_state(), step)


@pytest.mark.parametrize("damage", ["truncated", "lost", "without manifest"])
def test_a_base_that_is_seen_to_be_damaged_is_written_anew(damage, three):
    if damage == "truncated":
        damaged_base(three.path(3), lambda whole: whole[:-1])
    else:
        name = next(iter(frozen_files(three.path(3)))) if damage == "lost" else "manifest.json"
        (three.path(3) / name).unlink()
    three.save(4, later(4))
    assert bits(three.restore(new_state()).state) == bits(later(4))


@pytest.mark.parametrize(("save", "version", "folders"), [(save_in_format_2, 2, 0), (save_as_format_3_began, 3, 1)])
def test_a_run_goes_on_from_a_checkpoint_that_an_older_version_wrote(save, version, folders, tmp_path):
    def state(seed):
        there = later(seed)
        fixed = {"fixed": {"a": jnp.ones(2)}}
        return there.replace(variables=there.variables | fixed, carried={"reference": {"a": jnp.ones(3)}})

    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3, state(3))
    assert len(list(checkpoints.path(3).glob("frozen-*"))) == folders
    restored = checkpoints.restore(state(0))
    assert bits(restored.state) == bits(state(3)) and restored.info.version == version
    checkpoints.save(4, state(4))
    assert len(list(checkpoints.path(4).glob("frozen-*"))) == 3
    assert bits(checkpoints.restore(state(0)).state) == bits(state(4))


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing in the library may catch it."""


@pytest.mark.parametrize("point", ["write_manifest", "os.rename", "sync_folder"])
def test_save_killed_at_any_point_leaves_whole_checkpoints_only(point, three, monkeypatch):
    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module.os if point == "os.rename" else module, point.removeprefix("os."), kill)
        with pytest.raises(Killed):
            three.save(4, new_state(4))
    committed = point == "sync_folder"
    assert three.latest_step() == (4 if committed else 3)
    assert three.restore(new_state()).info.step == (4 if committed else 3)
    assert (three.folder / ".saving-00000004").exists() != committed
    three.remove_leftovers()
    assert all(name.isdigit() for name in os.listdir(three.folder))
    three.save(4, new_state(4))
    assert bits(three.restore(new_state()).state) == bits(new_state(4))


def test_a_save_that_fails_leaves_nothing_behind(three, monkeypatch):
    class Full:
        def save(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        three.save(4, new_state(4), tokenizer=Full())
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(new_state(4)))
    short = SimpleNamespace(free=arrays + 2**20 - 1)  # they are not all that it writes
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: short)
    with pytest.raises(OSError, match="No space left"):
        three.save(4, new_state(4))
    assert sorted(os.listdir(three.folder)) == ["00000001", "00000002", "00000003"]


def test_hidden_files_that_were_added_are_no_damage(three):
    (three.path(3) / ".DS_Store").write_text("a file manager was here")
    (three.path(3) / "state" / "._d").touch()
    assert three.restore(new_state()).info.step == 3


def test_deletion_killed_half_way_leaves_no_half_checkpoint(three, monkeypatch):
    rmtree = shutil.rmtree

    def half(path, **options):
        if ".deleting-" in str(path):
            (path / "00000001/manifest.json").unlink()
            raise Killed
        rmtree(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", half)
        with pytest.raises(Killed):
            three.save(4, new_state(4))
    assert three.steps() == [2, 3, 4]
    three.remove_leftovers()
    assert sorted(os.listdir(three.folder)) == ["00000002", "00000003", "00000004"]


def test_a_deletion_that_fails_stops_nothing(three, monkeypatch):
    """As on NFS, where another process has a file of the checkpoint open."""
    rmtree = shutil.rmtree

    def held(path, ignore_errors=False):
        if ".deleting-" not in str(path):
            rmtree(path, ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", held)
        three.save(4, new_state(4))
        three.remove_leftovers()
    assert three.steps() == [2, 3, 4]
    assert len([*three.folder.glob(".deleting-*/00000001/manifest.json")]) == 1
    three.save(1, new_state(1))  # which is the oldest at once
    three.remove_leftovers()
    assert sorted(os.listdir(three.folder)) == ["00000002", "00000003", "00000004"]


def test_manifest_is_on_the_disk_before_the_commit(three, monkeypatch):
    order = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (order.append(f"to {new}"), rename(old, new)))
    target = three.save(4, new_state(4))
    commit = order.index(f"to {target}")
    before = {path.split(".saving-00000004/")[-1] for path in order[:commit]}
    names = {path.relative_to(target).as_posix() for path in target.rglob("*")}  # of folders too, which hold names
    assert names | {str(target.with_name(".saving-00000004"))} <= before
    assert order[commit + 1] == str(three.folder)


def test_steps_after_are_set_aside_and_saved_anew(three):
    three.set_aside_after(1)
    assert three.steps() == [1]
    assert {"damaged-00000002", "damaged-00000003"} <= set(os.listdir(three.folder))
    three.save(2, new_state(7))
    assert bits(three.restore(new_state()).state) == bits(new_state(7))
    three.set_aside_after(1)  # where one of that step was set aside already
    assert three.steps() == [1]


def test_what_steps_are_judged_by_is_what_the_newest_says(three):
    for step, best, value in ((4, "lowest", 0.5), (5, "highest", 0.75)):
        three.save(step, new_state(step), judged_by=("reward", best), value=value)
    assert three.judged_by() == ("reward", "highest")
    assert three.values(("reward", "highest")) == [(5, 0.75)]


def test_saving_is_silent_and_leaves_no_thread(tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO):
        Checkpoints(tmp_path).save(1, new_state())
        Checkpoints(tmp_path).restore(new_state())
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [thread for thread in threading.enumerate() if "orbax" in thread.name.lower()] == []
