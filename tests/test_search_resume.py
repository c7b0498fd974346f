"""A search that is killed at every one of its writes goes on to what it would have come to: a driver without
Ray, over a stage that computes its score; damaged files; what is read of them."""

import errno
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import optuna
import pytest

from raylib.config import Config
from raylib.errors import MachineError, UserError, error_line
from raylib.fileio import read_jsonl
from raylib.search import optuna as study_module
from raylib.search.config import SearchConfig
from raylib.search.generator import GeneratorOptions, build_generator
from raylib.search.optuna import JOURNAL, STATES, load_evidence, trial_state
from raylib.search.schedulers import build_scheduler
from raylib.search.space import Float, Int, OneOf, SettingKey, Space
from raylib.search.trial import REPEAT_OF, append_report
from raylib.search.trial_log import TRIALS, TrialLog

EPOCHS = 3
SPACE = Space(
    "",
    "",
    {"x": Float(0, 1), "way": OneOf(a={}, b={"n": Int(1, 3)})},
    published=({"x": 0.3, "way": "b", "n": 2}, {"x": 0.9, "way": "a"}),
    grid={"x": (0.2, 0.4, 0.2), "way": ("a",)},
)


class Point(Config):
    x: float = 0.5
    way: str = ""
    n: int = 1


class Killed(BaseException):
    """SIGKILL: nothing of the process runs after it."""


class Driver:
    """What Tune does with a search, one trial at a time, without its processes."""

    def __init__(self, folder, algorithm="random", num_trials=5, stop="asha"):
        self.folder, self.stop = folder, stop
        config = SearchConfig(recipe="", name="s", algorithm=algorithm, num_trials=num_trials, metric="score")
        num_trials = len(SPACE.grid_settings()) if algorithm == "grid" else num_trials
        options = GeneratorOptions(num_trials, SettingKey(SPACE.knobs, Point()), max_concurrent=1)
        self.log = TrialLog(folder)
        self.found = build_generator(config, SPACE, self.log, options)
        self.log.restore_from_folders(folder / "tune")
        self.rule = build_scheduler(stop, ["score"], 1, 2.0, 9)
        self.found.go_on((self.rule.replay(self.log) if self.rule else set()).__contains__)

    def run(self):
        while not self.found.is_finished():
            name = self.found.next_name()
            self.run_trial(name, self.log.settings[name])
        return self

    def run_trial(self, name, setting):
        trial, run = SimpleNamespace(trial_id=name), self.log.runs / name
        if self.rule:
            self.rule.on_trial_add(None, trial)
        last = {REPEAT_OF: setting.get(REPEAT_OF), "finished": False}
        if REPEAT_OF not in setting:
            run.mkdir(parents=True, exist_ok=True)
            last = (read_jsonl(run / "told.jsonl") or [{"epoch": 0}])[-1]  # each report is of a checkpoint
            for epoch in range(1 + last["epoch"], EPOCHS + 1):
                last = {"epoch": epoch, "epochs": EPOCHS, "age": epoch, "judged": epoch < EPOCHS}
                last |= {"score": setting["x"] * epoch + setting.get("n", 0), "finished": False, "spent": 0.0}
                append_report(run, last)
                self.found.on_trial_result(name, last)
                if self.rule and self.rule.on_trial_result(None, trial, last) == "STOP":
                    break
            else:
                last = {**last, "finished": True}
                append_report(run, last)
        # in Tune's order: first the source of trials, then callbacks
        self.found.on_trial_complete(name, last)
        self.log.end(name, STATES[trial_state(last, False, ["score"])])

    def outcome(self):
        """What the search came to: settings, states, scores, and the same as Optuna knows it."""
        rows = [(r.setting, r.state, r.scores, r.epoch, r.id) for r in self.log.results(("score",))]
        of_study = [
            (t.params, t.state, t.values, t.intermediate_values)
            for t in self.found.study.get_trials(deepcopy=False)
        ]
        return rows, of_study


@pytest.fixture
def kill(monkeypatch):
    """`kill(n, cut)`: the process dies in its n-th write from now on, of which `cut` bytes are lost; or it
    meets `error`. Every write of a search's logs ends in an fsync."""
    fsync, state = os.fsync, {"left": -1, "cut": 0, "error": Killed()}

    def counting(descriptor):
        state["left"] -= 1
        if state["left"] == 0:
            size = os.fstat(descriptor).st_size
            os.truncate(os.readlink(f"/proc/self/fd/{descriptor}"), max(0, size - state["cut"]))
            raise state["error"]
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counting)
    return lambda n, cut=0, error=Killed(): state.update(left=n, cut=cut, error=error)  # noqa: B008


def kill_at_every_write(kill, tmp_path, every, cuts, **settings):
    """Return how many kills there were; each search ends as the undisturbed one."""
    kill(-1)
    whole = Driver(tmp_path / "whole", **settings).run().outcome()
    for n in range(1, 1000, every):
        for cut in cuts:
            folder = tmp_path / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            kill(n, cut)
            try:
                Driver(folder, **settings).run()
            except Killed:
                kill(-1)
                again = Driver(folder, **settings)
                lost = [note for note in again.log.notes if "cut off by a crash and is dropped" in note]
                assert len(lost) == (cut > 1), (n, cut, again.log.notes)
                assert again.run().outcome() == whole, (n, cut)
                assert len(again.log.settings) == len(whole[0])
                assert Driver(folder, **settings).found.is_finished()
            else:
                return n - 1
    raise AssertionError("it was never left alone")


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    (tmp_path / "whole").mkdir()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    ("algorithm", "stop", "every"), [("random", "asha", 7), ("grid", "none", 9), ("tpe", "median", 23)]
)
def test_search_killed_at_its_writes_comes_to_the_same(kill, tmp_path, algorithm, stop, every):
    """After a write; with its last byte lost, a newline; with nine bytes lost. At every write: below."""
    number = kill_at_every_write(kill, tmp_path, every, (0, 1, 9), algorithm=algorithm, stop=stop)
    assert number > 20


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "stop"), [("tpe", "asha"), ("priorband", "median"), ("cmaes", "none")])
def test_search_killed_at_every_write_comes_to_the_same(kill, tmp_path, algorithm, stop, monkeypatch):
    if algorithm == "cmaes":
        numbers = Space("", "", {"x": Float(0, 1), "n": Int(1, 3)})
        monkeypatch.setitem(globals(), "SPACE", numbers)
    kill_at_every_write(kill, tmp_path, 1, (0, 9), algorithm=algorithm, stop=stop, num_trials=8)


def test_search_on_a_full_disk_goes_on_and_counts_no_trial_as_failed(kill, tmp_path):
    whole = Driver(tmp_path / "whole", "tpe").run().outcome()
    for n in range(3, 60, 8):
        folder = tmp_path / f"full {n}"
        folder.mkdir()
        kill(n, 9, OSError(errno.ENOSPC, "No space left on device", "a file"))
        with pytest.raises((OSError, MachineError)) as full:
            Driver(folder, "tpe").run()
        assert "no space left on the disk" in str(error_line(full.value))
        kill(-1)
        again = Driver(folder, "tpe").run()
        assert again.outcome() == whole and "failed" not in {row[1] for row in whole[0]}


def interrupted(folder, kill, n=80):
    """A search that died in its n-th write; what it would have come to."""
    whole = Driver(folder.parent / "whole", "tpe", 8).run().outcome()
    folder.mkdir()
    kill(n)
    with pytest.raises(Killed):
        Driver(folder, "tpe", 8).run()
    kill(-1)
    return whole


def settings_of(outcome):
    return [(row[0], row[1], row[2]) for row in outcome[0]]


def test_search_goes_on_without_its_journal(kill, tmp_path):
    folder = tmp_path / "killed"
    whole = interrupted(folder, kill)
    begun = len(TrialLog(folder).settings)
    (folder / JOURNAL).unlink()
    again = Driver(folder, "tpe", 8)
    assert sum("lacks trial" in note and "entered again" in note for note in again.log.notes) == begun
    rows = settings_of(again.run().outcome())
    assert rows[:begun] == settings_of(whole)[:begun] and len(rows) == 8
    assert len(again.found.study.trials) == 8


def test_search_goes_on_without_its_log(kill, tmp_path):
    folder = tmp_path / "killed"
    whole = interrupted(folder, kill)
    begun = len(TrialLog(folder).settings)
    (folder / TRIALS).unlink()
    again = Driver(folder, "tpe", 8)
    assert sum("which is restored from optuna.journal" in note for note in again.log.notes) == begun
    assert again.run().outcome() == whole


def test_search_without_log_and_journal_reads_the_folders_or_says_that_it_cannot(kill, tmp_path):
    folder = tmp_path / "killed"
    whole = interrupted(folder, kill)
    settings = TrialLog(folder).settings
    for name in (TRIALS, JOURNAL):
        (folder / name).unlink()
    with pytest.raises(UserError, match="a trial that has trained, . reports, and whose setting neither"):
        Driver(folder, "tpe", 8)
    for name, setting in settings.items():
        if (folder / "trials" / name).is_dir():
            (folder / "trials" / name / "setting.json").write_text(json.dumps(setting))
    again = Driver(folder, "tpe", 8)
    assert all(row in settings_of(again.run().outcome()) for row in settings_of(whole)[:2])


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_search_journal_that_lacks_what_the_log_has_and_the_reverse(kill, tmp_path, lost):
    for name in (JOURNAL, TRIALS):
        folder = tmp_path / f"without {name}"
        shutil.rmtree(tmp_path / "whole")
        (tmp_path / "whole").mkdir()
        whole = interrupted(folder, kill)
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(lines[:-lost]))
        rows = settings_of(Driver(folder, "tpe", 8).run().outcome())
        num_begun = 3
        assert rows[:num_begun] == settings_of(whole)[:num_begun] and len(rows) == 8


def test_search_journal_with_zero_bytes_and_glued_lines_goes_on(kill, tmp_path):
    folder = tmp_path / "killed"
    whole = interrupted(folder, kill)
    with open(folder / JOURNAL, "ab") as file:
        file.write(b"\0" * 4096)
    again = Driver(folder, "tpe", 8)
    assert [note for note in again.log.notes if JOURNAL in note] == [
        f"{folder / JOURNAL}: its last line was cut off by a crash and is dropped"
    ]
    assert again.run().outcome() == whole
    # of an earlier version, which wrote on behind what was cut off
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[:-1]) + lines[-2][:20] + lines[-1])
    again = Driver(folder, "tpe", 8)
    assert any("the beginning of line" in note for note in again.log.notes)
    assert again.run().outcome() == whole


def test_search_journal_that_contradicts_the_log_is_made_anew(kill, tmp_path):
    folder = tmp_path / "killed"
    whole = interrupted(folder, kill)
    lines = (folder / JOURNAL).read_text().splitlines(keepends=True)
    values = [i for i, line in enumerate(lines) if '"param_value_internal"' in line]
    record = json.loads(lines[values[-3]])
    record["param_value_internal"] = 0.125 if record["param_name"] == "x" else 1
    lines[values[-3]] = json.dumps(record) + "\n"
    (folder / JOURNAL).write_text("".join(lines))
    before = TrialLog(folder).settings
    again = Driver(folder, "tpe", 8)
    if any("contradicts" in note for note in again.log.notes):
        assert (folder / f"{JOURNAL}.damaged-1").is_file()
    again.run()
    assert list(again.log.settings)[: len(before)] == list(before)
    assert settings_of(again.outcome())[:3] == settings_of(whole)[:3]


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.mark),)


def test_search_goes_on_without_reading_a_pickle(kill, tmp_path):
    """Tune's pickles by all of their names, and those in its JSON, leave no mark."""
    folder = tmp_path / "killed"
    whole = interrupted(folder, kill)
    Bomb.mark = tmp_path / "went off"
    data = pickle.dumps(Bomb())
    names = ("searcher-state-1.pkl", "search_gen_state-1.json", "basic-variant-state-1.json", "tuner.pkl")
    for name in (*names, "trainable.pkl", ".kept/searcher-state-1.pkl", "t/params.pkl", "t/error.pkl"):
        (folder / "tune" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tune" / name).write_bytes(data)
    (folder / "tune" / "experiment_state-1.json").write_text(json.dumps({"trial_data": [data.hex()]}))
    assert Driver(folder, "tpe", 8).run().outcome() == whole
    load_evidence(folder, "s", SPACE.knobs)
    assert not Bomb.mark.exists()


def test_search_warm_start_reads_another_journal_and_writes_nothing(kill, tmp_path):
    folder = tmp_path / "killed"
    interrupted(folder, kill)
    with open(folder / JOURNAL, "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    evidence, _ = load_evidence(folder, "s", SPACE.knobs)
    assert evidence and {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_search_does_not_wait_for_the_lock_of_a_killed_driver(kill, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    whole = interrupted(folder, kill)
    (folder / f"{JOURNAL}.lock").symlink_to(folder / JOURNAL)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits"))
    assert Driver(folder, "tpe", 8).run().outcome() == whole
    assert not list(folder.glob(f"{study_module.JOURNAL}.lock*"))


def test_search_with_cmaes_refuses_the_journal_of_another_user(tmp_path, monkeypatch):
    numbers = Space("", "", {"x": Float(0, 1), "n": Int(1, 3)})
    monkeypatch.setitem(globals(), "SPACE", numbers)
    Driver(tmp_path / "whole", "cmaes").run()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="optuna.journal: another user's, with pickles of Optuna's CMA-ES"):
        Driver(tmp_path / "whole", "cmaes")
