"""Parts of a search, without a cluster: who is stopped, what Optuna is told, what the report
reckons."""

import errno
import shutil
import statistics
import subprocess
import sys
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import TrialScheduler

from finetune.recipes import RECIPES
from raylib.config import Config, override
from raylib.errors import MachineError, UserError
from raylib.fileio import write_json
from raylib.search import display, report, space, tuner
from raylib.search.config import SearchConfig
from raylib.search.final_runs import Finalist
from raylib.search.generator import GeneratorOptions, build_generator
from raylib.search.optuna import trial_state
from raylib.search.schedulers import (
    Asha,
    ClampToSpace,
    Median,
    build_population,
    build_scheduler,
    check_mutable,
    describe_agreements,
    rank_agreements,
)
from raylib.search.space import Choice, Float, Int, OneOf, Space
from raylib.search.trial import (
    MACHINE_ERROR,
    REPEAT_OF,
    SETTING,
    TrialResult,
    append_report,
    model_epochs,
    trial_progress,
)
from raylib.search.trial_log import TrialLog
from tune_spaces.jobs import FinetuneSearchJob


class Point(Config):
    x: float = 0.0
    n: int = 0


CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


class Trial:
    """A trial as a scheduler sees it."""

    def __init__(self, name: str):
        self.trial_id, self.status = name, "RUNNING"


class Member(Trial):
    """A trial as a population sees it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.experiment_tag, self.config, self.evaluated_params = name, {"optim.lr": 5e-4}, {}
        self.run_metadata = SimpleNamespace(
            checkpoint_manager=SimpleNamespace(checkpoint_config=tune.CheckpointConfig())
        )

    def is_finished(self) -> bool:
        return False

    def set_config(self, config) -> None:
        self.config = config


class Controller:
    def __init__(self, trials):
        self.get_trials = self.get_live_trials = lambda: trials


def make_report(age: int, score: float, judged: bool = True) -> dict:
    return {"age": age, "score": score, "judged": judged}


def test_asha_stops_trials_behind_at_a_rung(tmp_path):
    trials = [Trial(str(i)) for i in range(5)]
    rule, controller = (
        build_scheduler("asha", ["score"], min_epochs=1, reduction_factor=2.0, max_epochs=9),
        Controller(trials),
    )
    for trial in trials:
        rule.on_trial_add(controller, trial)
    assert isinstance(rule, Asha)
    assert rule.on_trial_result(controller, trials[0], make_report(1, 0.5)) == CONTINUE
    assert rule.on_trial_result(controller, trials[1], make_report(1, 0.4)) == STOP
    assert (
        rule.on_trial_result(controller, trials[2], make_report(1, 0.1, judged=False)) == CONTINUE
    )  # its layers are frozen yet
    assert rule.on_trial_result(controller, trials[2], make_report(2, 0.1, judged=False)) == CONTINUE
    assert rule.on_trial_result(controller, trials[3], make_report(1, 0.6)) == CONTINUE
    assert rule.on_trial_result(controller, trials[0], make_report(2, 0.7)) == CONTINUE
    assert (
        rule.on_trial_result(controller, trials[2], make_report(3, 0.2)) == STOP
    )  # now it is what it will be, and at the rung of 2
    assert (
        rule.on_trial_result(controller, trials[4], {"age": 0, "judged": True}) == CONTINUE
    )  # a pruning round has no score


def log_of(folder, trials):
    """A log of trials that have begun, with these reports."""
    log = TrialLog(folder)
    for name, reports in trials.items():
        log.begin(name, {})
        (log.runs / name).mkdir(parents=True)
        for each in reports:
            append_report(log.runs / name, each)
    return log


def test_trial_whose_folder_is_gone_is_one_line(tmp_path):
    """Its scores are gone with it: another would be the best one."""
    log = log_of(tmp_path, {name: [{"epoch": 1, "score": 0.5}] for name in ("done", "stopped", "failed")})
    log.begin("repeat", {REPEAT_OF: "done"})
    for name, state in (("done", "finished"), ("stopped", "stopped"), ("failed", "failed")):
        log.end(name, state)
    log.end("repeat", "finished")
    shutil.rmtree(log.runs / "failed")
    assert [result.scores for result in log.results(("score",))][::3] == [{"score": 0.5}] * 2
    for name, state in (("done", "finished"), ("stopped", "stopped")):
        (log.runs / name).rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"trials/{name}: the folder of a trial that has {state} is gone"):
            log.results(("score",))
        (tmp_path / "away").rename(log.runs / name)


@pytest.mark.parametrize("stop", ["asha", "median"])
@pytest.mark.parametrize("restarted", [True, False])
def test_schedulers_restore_scores_after_restart(tmp_path, stop, restarted):
    """Some of the trials before have ended, one goes on: it has been at its first rung."""
    log = log_of(tmp_path, {str(i): [make_report(1, 0.8), make_report(2, 0.9)] for i in range(4)})
    with open(log.runs / "0" / "told.jsonl", "a") as file:
        file.write('{"ag')  # cut off
    before, fresh = Trial("0"), Trial("fresh")
    rule, controller = build_scheduler(stop, ["score"], 1, 2.0, 9), Controller([before, fresh])
    for trial in (before, fresh):
        rule.on_trial_add(controller, trial)
    assert isinstance(rule, Asha | Median)
    if restarted:
        assert rule.replay(log) == set()
    assert rule.on_trial_result(controller, fresh, make_report(1, 0.3)) == (STOP if restarted else CONTINUE)
    if restarted:  # what it told before comes again
        assert rule.on_trial_result(controller, before, make_report(2, 0.1)) == CONTINUE


@pytest.mark.parametrize("stop", ["asha", "median"])
def test_schedulers_stop_a_trial_at_the_report_that_a_driver_was_killed_in(tmp_path, stop):
    good = {str(i): [make_report(1, 0.8 - i / 100)] for i in range(4)}
    log = log_of(tmp_path, {**good, "bad": [make_report(1, 0.3)]})
    assert "bad" in build_scheduler(stop, ["score"], 1, 2.0, 9).replay(log)


def test_schedulers_ignore_epochs_of_other_stages():
    job = FinetuneSearchJob()

    def config(*settings):
        config = override(RECIPES["scenes_xgqa"](), ["model=M", "data=D", "epochs=6", *settings])
        job.num_layers["M"] = 8
        return config

    assert (job.warmup_epochs(config()), job.epochs_per_run(config())) == (1, 6)
    assert (
        job.warmup_epochs(config("strategies.unfreezing.layers=3")) == 3
    )  # 3, 6, then all 8 layers are trained
    sparse = config("strategies.sparse.rounds=4", "strategies.sparse.epochs=2")
    assert (job.warmup_epochs(sparse), job.epochs_per_run(sparse), job.stage_epochs(sparse)) == (9, 14, 8)
    both = config(
        "strategies.sparse.rounds=4", "strategies.sparse.epochs=2", "strategies.unfreezing.layers=4"
    )
    assert job.warmup_epochs(both) == 10
    assert job.warmup_epochs(config("strategies.head_first.epochs=2")) == 3
    few = config("setting=few_shot", 'languages=["en","de","ru"]')
    assert (job.epochs_per_run(few), job.num_runs(few)) == (6, 2)


def test_trials_are_chosen_by_no_language_held_out_of_pretraining():
    settings = ["model=M", "data=D", 'languages=["en","sw","ar"]', 'held_out_languages=["sw"]']
    trial = FinetuneSearchJob().trial_config(override(RECIPES["scenes_xvnli"](), settings), "both")
    assert trial.dev_languages == ("ar",)


def test_memory_of_a_trial_goes_back_to_the_system():
    """In a process of its own, whose heap no other test has used. What lies above the freed arrays keeps
    them in the heap, and so do cycles, which only a collection finds."""
    code = """if True:
        import gc, numpy as np
        from raylib.runtime import release_memory
        def anonymous():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        gc.disable()
        before = anonymous()
        trial = [np.ones(8_000) for _ in range(3_000)]  # 64 KB each, which the heap holds
        trial.append(trial)
        above = np.ones(8_000)
        peak = anonymous()
        del trial
        release_memory()
        print(peak - before, anonymous() - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, left = map(int, done.stdout.split())
    assert used > 150_000 and left < 20_000, (used, left)  # KB


def test_trial_state_follows_from_result_and_error():
    assert trial_state({"finished": True}, False) == TrialState.COMPLETE
    assert trial_state({"finished": False}, False) == TrialState.PRUNED
    for result, error in (
        ({"finished": True}, True),
        (None, False),
        ({"finished": False, "trouble": "not finite"}, False),
    ):
        assert trial_state(result, error) == TrialState.FAIL


def test_searcher_proposes_published_settings_first_and_reports_to_optuna(tmp_path):
    chosen = Space(
        "", "", {"x": Float(0, 1), "way": OneOf(a={}, b={"n": Int(1, 3)})}, ({"x": 0.25, "way": "b", "n": 2},)
    )

    def build(name, algorithm="tpe", **settings):
        config = SearchConfig(recipe="", name=name, algorithm=algorithm, **(settings or {"metric": "one"}))
        options = GeneratorOptions(8, space.SettingKey(chosen.knobs, Point()))
        (tmp_path / name).mkdir(exist_ok=True)
        found = build_generator(config, chosen, TrialLog(tmp_path / name), options)
        found.go_on(lambda name: False)
        return found

    for algorithm in ("tpe", "nsga2", "random", "cmaes"):
        found = build(algorithm, algorithm, **({"dev_sets": "both"} if algorithm == "nsga2" else {}))
        first = found.suggest("first")
        assert (first == {"x": 0.25, "way": "b", "n": 2}) == (algorithm != "random")
        space.config_changes(chosen.knobs, found.suggest("second"))
    one = build("truth")
    for name in ("finished", "stopped", "crashed"):
        one.suggest(name)
        one.on_trial_result(name, {"one": 0.5, "epoch": 1})
    one.on_trial_complete("finished", {"one": 0.75, "epoch": 2, "finished": True})
    one.on_trial_complete(
        "stopped", {"one": 0.625, "epoch": 3, "finished": False}
    )  # Tune tells no more of this epoch
    one.on_trial_complete("crashed", {"one": 0.5, "epoch": 1, "finished": False}, error=True)
    assert [(t.state, t.value) for t in one.study.trials] == [
        (TrialState.COMPLETE, 0.75),
        (TrialState.PRUNED, 0.625),
        (TrialState.FAIL, None),
    ]
    assert one.study.trials[1].intermediate_values == {1: 0.5, 3: 0.625}
    (tmp_path / "truth" / "trials.jsonl").write_text("")
    again = build("truth")
    assert {name: outcome.state for name, outcome in again.log.outcomes.items()} == {
        "finished": "finished",
        "stopped": "stopped",
        "crashed": "failed",
    }
    assert (
        len(again.log.notes) == 3 and "it lacks trial finished, which is restored from" in again.log.notes[0]
    )


def test_population_stays_in_range_and_refuses_fixed_settings(tmp_path):
    knobs = {
        "optim.lr": Float(1e-4, 1e-3, log=True),
        "strategies.prior.k": Int(2, 10),
        "way": Choice("a", "b"),
    }
    moved = ClampToSpace(knobs)({"optim.lr": 1.2e-3, "strategies.prior.k": 1, "way": "b"})
    assert moved == {"optim.lr": 1e-3, "strategies.prior.k": 2, "way": "b"}
    check_mutable({**knobs, "batch": 32}, ("optim.lr", "strategies.prior.k", "way"))
    rule = build_population({**knobs, "batch": 32}, "one", 1, 0, TrialLog(tmp_path))
    assert set(rule._hyperparam_mutations) == set(knobs)  # what is always the same moves nowhere
    assert (
        rule.on_trial_result(Controller([]), None, {"epoch": 4, "epochs": 4}) == CONTINUE
    )  # it is at its end
    with pytest.raises(UserError, match="batch cannot change in mid-run"):
        check_mutable({"batch": Choice(15, 30)}, ("optim.lr",))
    with pytest.raises(UserError, match="way cannot change in mid-run"):
        check_mutable({"way": OneOf(a={}, b={})}, ("way",))


def test_population_restores_ranks_and_settings_after_restart(tmp_path):
    members = [Member(str(i)) for i in range(4)]
    log = log_of(tmp_path, {str(i): [{"epoch": 3.0, "epochs": 9, "score": i / 10}] for i in range(4)})
    write_json(log.runs / "2" / SETTING, {"optim.lr": 7e-4})  # it has moved
    for member in members:
        log.settings[member.trial_id] = {"optim.lr": 5e-4}
    rule, controller = (
        build_population({"optim.lr": Float(1e-4, 1e-3)}, "score", 2, 0, log),
        Controller(members),
    )
    controller.search_alg = None
    for member in members:
        rule.on_trial_add(controller, member)
    assert [member.config["optim.lr"] for member in members] == [5e-4, 5e-4, 7e-4, 5e-4]
    exploits = []
    rule._exploit = lambda controller, trial, other: exploits.append((trial, other))
    rule._trial_state[members[3]].last_checkpoint = "its checkpoint"
    # the interval of two epochs is counted from the last multiple of it, not from the restart
    assert (
        rule.on_trial_result(controller, members[0], {"epoch": 3.5, "epochs": 9, "score": 0.0}) == CONTINUE
        and not exploits
    )
    rule.on_trial_result(controller, members[0], {"epoch": 4.0, "epochs": 9, "score": 0.0})
    assert exploits == [(members[0], members[3])]  # the worst takes the best's checkpoint


def test_population_draws_for_members_to_come_as_without_the_restart(tmp_path):
    def add(log):
        members = [Member(str(i)) for i in range(3)]
        for member in members:
            member.config = {}
        rule, controller = (
            build_population({"optim.lr": Float(1e-4, 1e-3)}, "score", 2, 0, log),
            Controller(members),
        )
        controller.search_alg = None
        for member in members:
            rule.on_trial_add(controller, member)
        return [member.config["optim.lr"] for member in members]

    (tmp_path / "killed").mkdir()
    whole, log = add(TrialLog(tmp_path)), TrialLog(tmp_path / "killed")
    log.begin("0", {"optim.lr": whole[0]})
    assert add(TrialLog(tmp_path / "killed")) == whole


def rows(values, state="finished"):
    """Trials whose score is x, whatever y is; half of them chose the alternative that has z."""
    return [
        TrialResult(
            str(i),
            state,
            {"x": x, "y": y, "way": "a" if i % 2 else "b", **({"z": z} if i % 2 else {})},
            {"one": x},
            4,
            4,
            10,
            1,
            None,
        )
        for i, (x, y, z) in enumerate(values)
    ]


def test_importance_finds_the_decisive_setting():
    import random

    dice = random.Random(0)
    knobs = {"x": Float(0, 1), "y": Float(0, 1), "way": OneOf(a={"z": Float(0, 1)}, b={})}
    found = display.importances(
        knobs, rows([(dice.random(), dice.random(), dice.random()) for _ in range(60)]), "one", 0
    )
    assert found["x"] > 0.9 and found["y"] < 0.05 and found["way"] < 0.05
    assert found["z (way=a)"] < 0.3
    same = [
        row._replace(scores={"one": 0.5})
        for row in rows([(0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (0.2, 0.9, 0.1), (0.3, 0.3, 0)])
    ]
    assert display.importances(knobs, same, "one", 0) == {}  # nothing to explain


def test_search_cost_counts_trained_and_saved_epochs():
    completed = [TrialResult("0", "finished", {}, {"one": 0.5}, 8, 8, 3600, 1, None)] * 2
    stopped = [
        TrialResult("1", "stopped", {}, {"one": 0.2}, 2, 8, 900, 1, None)
    ]  # at its speed the other 6 would take 2700 s
    text = report.cost_table([*completed, *stopped])
    assert (
        "| trained | 3 | 18 | 2.2 h |" in text
        and "| 1 | 6 | 45.0 min |" in text
        and "25 % of the epochs" in text
    )


def test_search_report_correlates_early_and_final_scores(tmp_path):
    # after one epoch the trials rank the wrong way round, after three the right way; a pruning round is no
    # score
    finals = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
    for i, last in enumerate(finals):
        (tmp_path / str(i)).mkdir()
        for age, score in ((1, 1 - last), (2, 0.5), (3, last / 2), (4, last)):
            append_report(tmp_path / str(i), {**make_report(age, score), "one": score})
        append_report(tmp_path / str(i), {**make_report(1, 0.9, judged=False), "one": 0.9})
    last = {str(i): score for i, score in enumerate(finals)}
    found = rank_agreements(tmp_path, last, "one", 1, 3.0)
    assert found == [(1, pytest.approx(-1), 8), (3, pytest.approx(1), 8)]
    assert [a.epoch for a in rank_agreements(tmp_path, last, "one", 2, 2.0)] == [
        1,
        4,
    ]  # after two epochs all scored alike
    assert "| 1 | -1.00 | 8 |" in describe_agreements(
        found, 1
    ) and "try `min_epochs=3`" in describe_agreements(found, 1)
    assert "try" not in describe_agreements(found, 3) and "try" not in describe_agreements(found, None)
    assert "try `early_stopping=none`" in describe_agreements(found[:1], 1)
    some = dict(list(last.items())[:4])
    assert "try" not in describe_agreements(
        rank_agreements(tmp_path, some, "one", 1, 3.0), 1
    )  # too few to go by
    few = dict(list(last.items())[:3])
    alike = dict.fromkeys(last, 0.5)
    assert (
        rank_agreements(tmp_path, few, "one", 1, 3.0) == rank_agreements(tmp_path, alike, "one", 1, 3.0) == []
    )
    assert describe_agreements([], 1) == ""


def test_effective_epoch_of_few_shot_trial_is_that_of_its_language():
    job = FinetuneSearchJob()
    job.num_layers["M"] = 8
    own = ["model=M", "data=D", "epochs=4", "setting=few_shot", 'languages=["en","de","ru"]']
    config = override(RECIPES["scenes_xgqa"](), [*own, "strategies.unfreezing.layers=4"])
    # each language's layers thaw anew: its first epoch is not judged
    assert [trial_progress(job, config, e) for e in (1, 2, 4, 5, 6, 8)] == [
        (1, False),
        (2, True),
        (4, True),
        (5, False),
        (6, True),
        (8, True),
    ]
    sparse = override(RECIPES["scenes_xgqa"](), [*own, "strategies.sparse.rounds=2"])
    assert [trial_progress(job, sparse, e) for e in (1, 2, 3, 6, 7, 8, 9)] == [
        (0, False),
        (0, False),
        (1, True),
        (4, True),
        (4, False),
        (4, False),
        (5, True),
    ]
    assert model_epochs(job, sparse) == 8 and model_epochs(job, config) == 8


def test_search_failed_final_runs_are_reported_and_do_not_win():
    best = Finalist("1", {"x": 1}, {}, {}, 3)
    assert "No final run finished" in report.verdict(SearchConfig(recipe="r"), [best])
    assert "final_seeds=0" in report.verdict(SearchConfig(recipe="r", final_seeds=0), [best])


def test_search_final_comparison_is_paired_by_seed():
    config = SearchConfig(recipe="r")
    scores = {seed: {"english_dev": 0.5 + 0.1 * seed} for seed in (1, 2, 3)}
    best = Finalist(
        "1",
        {"x": 1},
        {s: {"english_dev": v["english_dev"] + 0.05 + 0.001 * s} for s, v in scores.items()},
        {s: {"English": 0.4, "targets": 0.3 + 0.1 * s} for s in scores},
        0,
    )
    published = Finalist(
        "published", {"x": 2}, scores, {s: {"English": 0.4, "targets": 0.3} for s in scores}, 0
    )
    text = report.verdict(config, [best, published])
    # differences 0.051, 0.052, 0.053: their spread is far below that of the seeds
    half = 100 * 4.302653 * statistics.stdev([0.051, 0.052, 0.053]) / 3**0.5
    assert (
        "english_dev, which it was chosen by: the best beats the published setting, by 5.2 points ± "
        f"{half:.1f}" in text
    )
    assert "targets, test sets: no difference that 3 seeds could show, 20.0 points" in text
    assert "does not beat it" in report.verdict(config, [published])


def test_optuna_study_keeps_conditional_settings():
    knobs = {"way": OneOf(a={"z": Float(0, 1)}, b={}), "x": Float(0, 1), "y": Float(0, 1)}
    study = display.to_study(knobs, rows([(0.1, 0.2, 0.3), (0.5, 0.6, 0.7)]), ["one"])
    assert [set(trial.params) for trial in study.trials] == [{"x", "y", "way"}, {"x", "y", "way", "z"}]
    assert isinstance(study, optuna.Study)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "it defines no function callbacks()"),
        ("def callbacks():\n    return [1]", "callbacks() returns int, no callback of Ray Tune"),
        ("def callbacks():\n    return 1 / 0", ":2: ZeroDivisionError: division by zero"),
    ],
)
def test_search_wrong_callbacks_are_one_line(text, words, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        tuner.load_callbacks(str(tmp_path / "mine.py"))
    assert words in str(error.value)


def test_search_ends_with_the_line_of_a_full_disk_that_tune_makes_a_traceback_of(tmp_path, monkeypatch):
    def run(*arguments, **options):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "runs/x/optuna.journal")
        except OSError:
            raise TuneError("Traceback (most recent call last): ...")  # noqa: B904

    monkeypatch.setattr(tuner.tune, "run", run)
    table = display.SearchTable("x", ["score"], 1)
    with pytest.raises(MachineError, match="^runs/x/optuna.journal: no space left on the disk"):
        tuner.run_tuner(tmp_path, print, ("score",), None, table)
    trial, result = SimpleNamespace(trial_id="a"), {MACHINE_ERROR: "no space left"}
    with pytest.raises(MachineError, match="no space left"):
        tuner.EndSearch(tmp_path).on_trial_result(1, [], trial, result)
