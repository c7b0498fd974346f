"""The registry of a run's checkpoints: a kill at every single file operation, and folders of earlier
versions."""

import json
import os
import shutil
import sys
import time

import pytest

from raylib import checkpoint
from raylib.errors import NotFinite, UserError
from raylib.fileio import remove_temporaries, write_json
from raylib.lock import hold_run
from raylib.models.finetuned import hold_model
from raylib.saving import write_files

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
KILLED = 9
countdown: list[int] = []  # operations that this process may still begin


@sys.addaudithook
def _count(event, arguments):
    if countdown and event in OPERATIONS:
        # files that are only read change nothing
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        countdown[0] -= 1
        if countdown[0] < 0:
            os._exit(KILLED)


def killed_everywhere(tmp_path, action):
    """Yield copies of the folder `tmp_path`/"run", in each of which `action(copy)` was killed before another
    of its file operations, and last the one where it was not."""
    for number in range(200):
        run = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "run", run, symlinks=True)
        if (child := os.fork()) == 0:
            countdown.append(number)
            action(run)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED)
        yield run
        if code == 0:
            assert number > 3  # or nothing was counted
            return


NEW_FILES = ("model.safetensors", "optimizer-00000.safetensors", "optimizer-00000.json")
OLD_FILES = ("model.safetensors", "zero/a.pt", "zero/b.pt", "latest")


def write_checkpoint(run, step, score=None, name=None, files=NEW_FILES, **meta):
    """A small whole checkpoint that nobody has registered yet."""
    folder = run / checkpoint.FOLDER / (name or checkpoint.step_name(step))
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
    values = {"step": step, "workers": 1, "score": score, "skipped_steps": 0, **meta}
    contents = {name: f"{name} of step {step}".encode() for name in files}
    contents["meta.json"] = json.dumps(values).encode()
    write_json(folder / "files-00000.json", write_files(folder, contents))
    return folder


def make_run(run, scores, keep=2):
    for step, score in scores.items():
        write_checkpoint(run, step, score)
        checkpoint.register(run, checkpoint.step_name(step), keep)


def names(run):
    return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir() if path.is_dir())


def steps(*numbers):
    return [checkpoint.step_name(number) for number in numbers]


def test_register_keeps_newest_and_best(tmp_path):
    make_run(tmp_path, {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: None})
    assert checkpoint.read_registry(tmp_path) == (steps(2, 4, 5), ("step_000002", 0.9), {})
    assert names(tmp_path) == steps(2, 4, 5)
    assert checkpoint.find_newest(tmp_path).name == "step_000005"
    assert checkpoint.find_best(tmp_path) == checkpoint.find_trained(tmp_path, "best")
    assert checkpoint.find_trained(tmp_path, "last").name == "step_000005"
    assert json.loads((tmp_path / "checkpoints/registry.json").read_text()) == {
        "checkpoints": steps(2, 4, 5),
        "best": {"checkpoint": "step_000002", "score": 0.9},
    }


def test_register_of_a_notice_pushes_nothing_away(tmp_path):
    """What settings ask to keep is what it would be without it, then and in the end."""
    make_run(tmp_path, {2: 0.9, 4: 0.1, 6: 0.2})
    for step, kept in ((7, (2, 4, 6, 7)), (9, (2, 4, 6, 9))):
        write_checkpoint(tmp_path, step, None, is_scheduled=False)
        checkpoint.register(tmp_path, checkpoint.step_name(step), 2)
        assert names(tmp_path) == checkpoint.read_registry(tmp_path).checkpoints == steps(*kept)
        assert checkpoint.find_newest(tmp_path).name == checkpoint.step_name(step)
    make_run(tmp_path, {10: 0.3})
    assert names(tmp_path) == steps(2, 6, 10)


def test_checkpoint_that_another_command_reads_goes_when_it_has_ended(tmp_path):
    """As a run under way drops older ones: its registry names it no more, its files stay for the time."""
    make_run(tmp_path, {1: None, 2: None}, keep=1)
    assert hold_model(tmp_path) == tmp_path and not checkpoint._held  # nobody trains: nothing goes
    with hold_run(tmp_path):
        held = hold_model(tmp_path)
        assert held == tmp_path / checkpoint.FOLDER / "step_000002" == hold_model(held)
        make_run(tmp_path, {3: None, 4: None}, keep=1)
        assert names(tmp_path) == steps(2, 4) and checkpoint.verify(held)
        assert checkpoint.read_registry(tmp_path).checkpoints == steps(4)
        assert hold_model(tmp_path).name == "step_000004"
    for descriptor in checkpoint._held.values():
        os.close(descriptor)
    checkpoint._held.clear()
    make_run(tmp_path, {5: None}, keep=1)
    assert names(tmp_path) == steps(5)
    assert not checkpoint.hold_checkpoint(held)  # too late


def test_checkpoints_have_the_order_of_steps_beyond_a_million(tmp_path):
    """Whose names come first as text: the newest would go, and each resume lose all since then."""
    make_run(tmp_path, {999_999: 0.1, 1_000_000: 0.1, 1_000_001: 0.1}, keep=2)
    late = ["step_1000000", "step_1000001"]
    assert checkpoint.read_registry(tmp_path).checkpoints == ["step_999999", *late]  # the best stays
    assert checkpoint.find_newest(tmp_path).name == late[1]
    checkpoint.settle(tmp_path)
    assert checkpoint.find_newest(tmp_path).name == late[1]
    assert checkpoint.rewind(tmp_path, late[0]).name == late[0]
    assert checkpoint.read_registry(tmp_path).checkpoints == ["step_999999", late[0]]


def test_register_refuses_score_that_is_not_finite(tmp_path):
    make_run(tmp_path, {1: 0.1})
    write_checkpoint(tmp_path, 2, float("nan"))
    with pytest.raises(NotFinite, match="step_000002/meta.json: score nan is not finite"):
        checkpoint.register(tmp_path, "step_000002", 1)
    assert checkpoint.read_registry(tmp_path) == (steps(1), ("step_000001", 0.1), {})


def test_register_killed_anywhere_leaves_old_or_new_registered(tmp_path):
    make_run(tmp_path / "run", {1: 0.5, 2: 0.1})
    write_checkpoint(tmp_path / "run", 3, 0.7)
    found = set()
    for run in killed_everywhere(tmp_path, lambda run: checkpoint.register(run, "step_000003", 1)):
        checkpoint.settle(run)
        registry = checkpoint.read_registry(run)
        assert registry in ((steps(1, 2), ("step_000001", 0.5), {}), (steps(3), ("step_000003", 0.7), {}))
        assert names(run) == registry.checkpoints and not list(run.rglob(".*"))
        assert checkpoint.verify(checkpoint.find_newest(run)) and checkpoint.verify(checkpoint.find_best(run))
        found.add(registry.best)
    assert len(found) == 2


@pytest.mark.parametrize("name", ["step_000002", "best"])
def test_rewind_killed_anywhere_deletes_nothing(tmp_path, name):
    make_run(tmp_path / "run", {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}, keep=9)
    for run in killed_everywhere(tmp_path, lambda run: checkpoint.rewind(run, name)):
        checkpoint.settle(run)
        if checkpoint.find_newest(run).name != "step_000002":
            assert checkpoint.read_registry(run) == (steps(1, 2, 3, 4), ("step_000002", 0.9), {})
        assert checkpoint.rewind(run, name) == checkpoint.find_newest(run) == run / "checkpoints/step_000002"
        assert checkpoint.read_registry(run) == (steps(1, 2), ("step_000002", 0.9), {})
        folders = sorted(path.name for path in run.glob("**/step_*"))
        assert folders == steps(1, 2, 3, 4) and len(list(run.glob("checkpoints.before-*/step_*"))) == 2


def test_rewind_sets_the_average_of_newer_checkpoints_aside(tmp_path):
    make_run(tmp_path, {1: 0.3, 2: 0.2}, keep=9)
    (tmp_path / "average").mkdir()
    checkpoint.rewind(tmp_path, "step_000002")
    assert checkpoint.find_trained(tmp_path, "average") == tmp_path / "average"
    checkpoint.rewind(tmp_path, "step_000001")
    assert checkpoint.find_trained(tmp_path, "average") == checkpoint.find_newest(tmp_path)
    assert (tmp_path / "checkpoints.before-1/average").is_dir()


def test_rewind_finds_a_place_after_the_user_removed_an_older_one(tmp_path):
    make_run(tmp_path, {1: 0.3, 2: 0.2, 3: 0.1}, keep=9)
    checkpoint.rewind(tmp_path, "step_000002")
    checkpoint.rewind(tmp_path, "step_000001")
    shutil.rmtree(tmp_path / "checkpoints.before-1")
    make_run(tmp_path, {2: 0.4})
    checkpoint.rewind(tmp_path, "step_000001")
    assert len(list(tmp_path.glob("checkpoints.before-*/step_000002"))) == 2


def test_rewind_behind_the_best_chooses_another(tmp_path):
    make_run(tmp_path, {1: 0.3, 2: 0.2, 3: 0.9}, keep=9)
    checkpoint.rewind(tmp_path, "step_000002")
    assert checkpoint.read_registry(tmp_path).best == ("step_000001", 0.3)
    with pytest.raises(
        UserError, match="no checkpoint 'step_000003'; there are: step_000001, step_000002, best"
    ):
        checkpoint.rewind(tmp_path, "step_000003")


def test_drop_optimizers_killed_anywhere_leaves_whole_checkpoints(tmp_path):
    for step, files in ((1, OLD_FILES), (2, NEW_FILES)):
        write_checkpoint(tmp_path / "run", step, files=files)
        checkpoint.register(tmp_path / "run", checkpoint.step_name(step), 2)
    for run in killed_everywhere(tmp_path, checkpoint.drop_optimizers):
        for name, files in zip(steps(1, 2), (OLD_FILES, NEW_FILES), strict=True):
            folder = run / checkpoint.FOLDER / name
            checkpoint.verify(folder)
            if checkpoint.has_optimizer(folder):  # all of it
                assert all((folder / file).is_file() for file in files)
        checkpoint.settle(run)
        checkpoint.drop_optimizers(run)
        for name in steps(1, 2):
            left = sorted(path.name for path in (run / checkpoint.FOLDER / name).iterdir())
            assert left == ["files-00000.json", "meta.json", "model.safetensors"]
            checkpoint.verify(run / checkpoint.FOLDER / name)


def test_copy_from_killed_anywhere_is_done_by_the_next(tmp_path):
    make_run(tmp_path / "run", {1: 0.9, 2: 0.1})
    source = write_checkpoint(tmp_path / "other", 2, 0.4, loss=1)
    for run in killed_everywhere(tmp_path, lambda run: checkpoint.copy_from(run, source)):
        if newest := checkpoint.find_newest(run):
            checkpoint.verify(newest)
        checkpoint.copy_from(run, source)
        assert checkpoint.read_registry(run) == (steps(2), ("step_000002", 0.4), {})
        assert checkpoint.read_meta(checkpoint.find_newest(run))["loss"] == 1
        assert names(run) == steps(2)


def make_old_run(run, with_ray):
    """A run of an earlier version: with a list or Ray Train's snapshot, and the best in its own folder."""
    for step in (3, 4):
        write_checkpoint(run, step, 0.1)
    if with_ray:
        results = [{"checkpoint_dir_name": name, "metrics": {}} for name in steps(3, 4)]
        snapshot = {"checkpoint_results": results, "latest_checkpoint_result": results[-1]}
        write_json(run / "checkpoints/checkpoint_manager_snapshot.json", snapshot)
    else:
        write_json(run / "checkpoints/registry.json", steps(3, 4))
    write_checkpoint(run, 2, 0.8).rename(run / "best")


@pytest.mark.parametrize("with_ray", [True, False])
def test_old_run_is_read_and_settled_killed_anywhere(tmp_path, with_ray):
    make_old_run(tmp_path / "run", with_ray)
    assert checkpoint.find_newest(tmp_path / "run").name == "step_000004"
    assert checkpoint.find_best(tmp_path / "run") == tmp_path / "run/best"
    for run in killed_everywhere(tmp_path, checkpoint.settle):
        assert checkpoint.verify(checkpoint.find_best(run))["step"] == 2
        assert checkpoint.verify(checkpoint.find_newest(run))["step"] == 4
        checkpoint.settle(run)
        assert checkpoint.read_registry(run) == (steps(2, 3, 4), ("step_000002", 0.8), {})
        assert names(run) == steps(2, 3, 4) and not (run / "best").exists()


def test_settle_removes_leftovers_and_nothing_else(tmp_path):
    make_run(tmp_path, {1: 0.5})
    leftovers = [
        write_checkpoint(tmp_path, 7),  # never registered
        write_checkpoint(tmp_path, 8, name=".step_000008.partial"),
        write_checkpoint(tmp_path, 5, name=".step_000005.removed"),
    ]
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host, other = os.uname().nodename, "pod-x7.cluster"
    gone = [f".result.json.{host}.{dead}", f"part/.metrics.jsonl.{host}.{dead}", f".config.json.{other}.3"]
    kept = [
        f".result.json.{host}.{os.getpid()}",
        f".part.json.{other}.4",
        ".notes.2024",
        ".old.json",
        "a.json.3",
    ]
    (tmp_path / "part").mkdir()
    for name in (*gone, *kept):
        (tmp_path / name).write_text("x")
        if name != f".part.json.{other}.4":
            os.utime(tmp_path / name, (time.time() - 1e6,) * 2)
    checkpoint.settle(tmp_path)
    assert not [path for path in leftovers if path.exists()]
    assert sorted(
        path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"
    )
    assert not [name for name in gone if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)
    remove_temporaries(tmp_path)
    assert checkpoint.verify(checkpoint.find_newest(tmp_path))["step"] == 1


def test_settle_registers_again_what_a_lost_registry_had(tmp_path, capsys):
    make_run(tmp_path, {1: 0.5, 2: 0.1})
    (tmp_path / "checkpoints/registry.json").unlink()
    checkpoint.settle(tmp_path)
    assert "registry.json was gone; registered again: step_000001, step_000002" in capsys.readouterr().out
    assert checkpoint.read_registry(tmp_path) == (steps(1, 2), ("step_000001", 0.5), {})


@pytest.mark.parametrize("content", [b"", b"garbage{", b"\xff\xfe", b"{}", b"3", b'{"checkpoints": 3}'])
@pytest.mark.parametrize("name", ["registry.json", "step_000002/meta.json", "step_000002/files-00000.json"])
def test_damaged_json_is_named_and_an_older_checkpoint_goes_on(tmp_path, capsys, name, content):
    make_run(tmp_path, {1: 0.1, 2: 0.5})
    (tmp_path / "checkpoints" / name).write_bytes(content)

    def start():
        checkpoint.settle(tmp_path)
        checkpoint.verify(checkpoint.find_newest(tmp_path))

    if name.endswith("files-00000.json") and content.startswith(b"{"):
        return  # a list, of other files
    with pytest.raises(UserError, match=f"{tmp_path}/checkpoints/{name}: .*restore"):
        start()
    if name == "registry.json":  # as the line says
        (tmp_path / "checkpoints" / name).unlink()
        start()
        assert "registered again: step_000001, step_000002" in capsys.readouterr().out
    else:
        checkpoint.settle(tmp_path)
        assert checkpoint.rewind(tmp_path, "step_000001").name == "step_000001"
        set_aside = tmp_path / "checkpoints.before-1" / name
        assert set_aside.read_bytes() == content


def test_damaged_older_checkpoint_is_told_and_cannot_be_the_best(tmp_path, capsys):
    make_run(tmp_path, {1: 0.9, 2: 0.5})
    (tmp_path / "checkpoints/step_000001/meta.json").write_text("{")
    checkpoint.settle(tmp_path)
    assert checkpoint.find_best(tmp_path).name == "step_000002"
    assert "cannot be the best one: " in capsys.readouterr().out and names(tmp_path) == steps(1, 2)


def test_register_after_the_registry_was_removed_loses_no_checkpoint(tmp_path, capsys):
    make_run(tmp_path, {1: 0.9, 2: 0.5})
    (tmp_path / "checkpoints/registry.json").unlink()
    write_checkpoint(tmp_path, 3, 0.1)
    checkpoint.register(tmp_path, "step_000003", 2)
    assert checkpoint.read_registry(tmp_path) == (steps(1, 2, 3), ("step_000001", 0.9), {})
    assert "registry.json was gone; registered again: step_000001, step_000002" in capsys.readouterr().out


OUTSIDE = ["../../victim", "/tmp/victim", "..", ".", "", "step_1/../../../victim", "a\0b", "a\nb", 7, None]


@pytest.mark.parametrize("name", OUTSIDE)
def test_registry_names_lead_nowhere_else(name, tmp_path):
    """A registry of a stranger's run would have other folders removed: each start drops what is not kept."""
    run = tmp_path / "run"
    make_run(run, {10: 0.5, 20: 0.25})
    (tmp_path / "victim").mkdir()
    path = run / checkpoint.FOLDER / checkpoint.REGISTRY
    whole = json.loads(path.read_text())
    for damaged in (
        {**whole, "checkpoints": [name, *steps(10, 20)]},
        {**whole, "best": {"checkpoint": name, "score": 0.5}},
        {**whole, "aside": {"step_000010": name}},
        [name, *steps(10, 20)],
        *([{**whole, "aside": {name: "checkpoints.before-1"}}] if isinstance(name, str) else []),
    ):
        path.write_text(json.dumps(damaged))
        for action in (checkpoint.settle, checkpoint.find_newest, checkpoint.find_best):
            with pytest.raises(UserError, match="registry.json: not to be read as a register "):
                action(run)
    assert (tmp_path / "victim").is_dir() and names(run) == steps(10, 20)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if isinstance(name, str)])
def test_list_of_a_checkpoints_files_leads_nowhere_else(name, tmp_path):
    folder = write_checkpoint(tmp_path / "run", 10)
    listing = json.loads((folder / "files-00000.json").read_text())
    write_json(folder / "files-00000.json", {**listing, name: listing["model.safetensors"]})
    with pytest.raises(UserError, match="files-00000.json: not to be read as a list of files"):
        checkpoint.verify(folder)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"step": -1}, "step: should be greater than or equal to 0, not -1"),
        ({"step": "7"}, "step: should be a valid integer, not '7'"),
        ({"step": 10**30}, "step: should be less than"),
        ({"workers": 0}, "workers: should be greater than or equal to 1, not 0"),
        ({"workers": 10**9}, "workers: should be less than"),
        ({"score": "0.5"}, "score: should be a valid number, not '0.5'"),
        ({"score": True}, "score: should be a valid number, not True"),
        ({"times": [1]}, "times: should be a valid dictionary"),
        ({"evaluation": {"dev": None}}, "evaluation.dev: should be a valid number, not None"),
        ({"skipped_steps": -3}, "skipped_steps: should be greater"),
        ({"interval": {"names": [], "sums": []}}, "interval.count: field required"),
    ],
)
def test_meta_of_other_types_is_a_line(values, reason, tmp_path):
    folder = write_checkpoint(tmp_path / "run", 10)
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UserError) as found:
        checkpoint.read_meta(folder)
    line = str(found.value)
    assert line.startswith(f"{folder}/meta.json: not to be read as a checkpoint's record ({reason}")
    assert line.endswith(checkpoint.ADVICE)


def test_checkpoint_whose_folder_is_gone_is_told_with_what_to_do(tmp_path):
    run = tmp_path / "run"
    make_run(run, {10: 0.5, 20: 0.25})
    newest = checkpoint.find_newest(run)
    shutil.rmtree(newest)
    with pytest.raises(UserError, match=f"{newest}: gone, .*go on from an older one: resume=step_000010$"):
        checkpoint.verify(newest)
    shutil.rmtree(run / checkpoint.FOLDER / "step_000010")
    with pytest.raises(UserError, match="gone, .*there is no other"):
        checkpoint.verify(newest)
