"""The papers' claims on emoji scenes: experiments that exist, work in order, budget, verdicts."""

import json
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import claims, claims_report, claims_runs, claims_tasks, claims_work, scenes_base
from benchmarks.claims_report import Claim, judge, read_claims
from benchmarks.claims_runs import Outcome, settings_of
from benchmarks.claims_table import EXPERIMENTS, PRETRAININGS, space_of
from benchmarks.claims_work import TRIAL_SEED, Lab, Work, find, identity, num_seeds, tuner_of
from finetune.recipes import RECIPES, SCENES_BASE
from pretrain.recipes import RECIPES as PRETRAINING_RECIPES
from raylib.config import override
from raylib.errors import UserError
from raylib.fileio import append_jsonl, read_jsonl
from raylib.models.unified import UnifiedModel
from raylib.search.space import apply_changes, check_space, config_changes

ABOVE = Claim(
    "P", "a lies above b", "", "1.0 > 2.5", "targets", 1, ((1, "xgqa/prior"), (-1, "xgqa/baseline"))
)


@pytest.fixture
def lab(tmp_path):
    for name in ("scenes", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_text(name)
    identity.cache_clear()
    return Lab(tmp_path / "runs", tmp_path / "scenes", tmp_path / "model", tmp_path / "records.jsonl")


def record(lab, work, seconds=3600.0, **more):
    return {
        **work.key(),
        **identity(lab.model, lab.scenes),
        **{"cpu_seconds": seconds, "commit": "", "date": "", "precision": "float32", "chosen": {}, **more},
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_experiment_settings_fit_its_recipe_and_its_space(name):
    experiment = EXPERIMENTS[name]
    lab = Lab(Path("runs"), Path("scenes"), Path("model"))
    config = override(RECIPES[experiment.recipe](), settings_of(lab, name, 3))
    assert config.fit.seed == 3
    if tuner_of(name) == name:
        space = space_of(name)
        check_space(name, space, config)
        settings = space.grid_settings()
        assert len(settings) == claims_work.TRIALS
        for setting in settings:
            apply_changes(config, config_changes(space.knobs, setting))


def test_claims_terms_are_experiments_and_metrics():
    claimed = read_claims()
    assert {claim.paper for claim in claimed} == {"P0", "P1", "P2", "P3", "P4", "ours"}
    for claim in claimed:
        assert claim.untestable or claim.metric in claims_report.METRICS, claim.text
        assert all(name in EXPERIMENTS for _, name in claim.terms), claim.text
    assert all(space_of(name).recipe for name in EXPERIMENTS)
    used = {work.name for work in claims.plan(claimed) if work.kind == "run"}
    assert used == set(EXPERIMENTS), "an experiment decides nothing"


def test_claims_plan_does_what_is_needed_first_and_nothing_twice():
    order = claims.plan(read_claims())
    assert len(set(order)) == len(order)
    assert all(order.index(needed) < order.index(work) for work in order for needed in work.needs())
    # what the model can do comes first; then the first claim, before anything of another begins
    floors = [order.index(Work("run", name, num_seeds(name) - 1)) for name in claims_tasks.ROWS]
    first = [Work("choice", "xgqa/prior"), *(Work("run", "xgqa/prior", seed) for seed in range(5))]
    begin = max(floors) + 1
    assert order[begin : begin + len(first)] == first
    assert all(work.name in (*claims_tasks.ROWS, "xgqa/baseline") for work in order[:begin])
    papers = [claim.paper for claim in read_claims()]
    assert list(dict.fromkeys(papers)) == ["P0", "P1", "P4", "P2", "P3", "ours"]  # the order


def test_claims_record_of_other_model_scenes_or_settings_is_not_done(lab):
    work = Work("run", "xgqa/baseline", 1)
    append_jsonl(lab.records, record(lab, work))
    assert find(lab.read(), work)
    assert find(lab.read(), Work("run", "xgqa/baseline", 2)) is None
    assert find([record(lab, work) | {"config": "of other settings"}], work) is None
    (lab.model / "weights.safetensors").write_text("another")
    identity.cache_clear()
    assert find(lab.read(), work) is None


def test_claims_record_counts_while_its_recipe_choice_and_teacher_are_what_they_were(monkeypatch):
    """And no other experiment is touched by a changed number; nor any by a new setting that is off."""

    def hashes():
        claims_work.config_hash.cache_clear()
        return {work: work.key()["config"] for work in claims.plan(read_claims())}

    def changed(recipes, name, settings):
        before = hashes()
        with monkeypatch.context() as patch:
            recipe = override(recipes[name](), settings)
            patch.setitem(recipes, name, lambda: recipe)
            after = hashes()
        claims_work.config_hash.cache_clear()
        return {f"{work.kind} {work.name}" for work in before if before[work] != after[work]}

    assert changed(RECIPES, "transfer_student", ["batch=32"]) == {"run p3/augmentation"}
    assert changed(RECIPES, "scenes_marvl", ["optim.betas=[0.9,0.98]"]) == {
        *("choice marvl/baseline", "run marvl/baseline", "run marvl/after_xgqa")
    }
    # of xgqa: its searches, what goes on from its runs, and students of its model
    of_xgqa = changed(RECIPES, "scenes_xgqa", ["optim.weight_decay=0.01"])
    assert {"search xgqa/TPE, ASHA", "run marvl/after_xgqa", "run p3/distillation"} <= of_xgqa
    assert not any("xvnli" in name or "p4/" in name for name in of_xgqa)
    assert changed(PRETRAINING_RECIPES, "scenes_base", ["fit.save_every=999"]) == {
        f"{kind} {name}"
        for kind in ("pretraining", "run")
        for name in (PRETRAININGS if kind == "pretraining" else EXPERIMENTS)
        if kind == "pretraining" or EXPERIMENTS[name].pretraining
    }
    assert not changed(
        RECIPES, "scenes_xgqa", ["name=other", "model=elsewhere", "runs=there", "augment=null"]
    )


def do_quickly(done, fails=()):
    """`do` that records its work at an hour each; that of `fails` as failed."""
    lock = threading.Lock()

    def do(lab, work):
        with lock:
            done.append(work)
            kind = "failed" if work in fails else work.kind
            append_jsonl(lab.records, record(lab, work) | {"kind": kind})
        return work not in fails

    return do


def test_claims_go_on_where_they_stopped_within_their_budget(lab, monkeypatch):
    claimed = read_claims()[:2]
    order, done = claims.plan(claimed), []
    monkeypatch.setattr(claims, "do", do_quickly(done))
    claims.Team(lab, order, 3.0, 1).work()
    assert done == order[:3], "an hour each, of a budget of three"
    claims.Team(lab, order, 5.0, 1).work()
    assert done == order[:5], "three were done before"
    team = claims.Team(lab, order, 100.0, 2)
    threads = [threading.Thread(target=team.work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(order), "two at a time do nothing twice"
    line = claims.describe_progress(lab.read(), order, 100.0, 2)
    assert f"{len(order)} of {len(order)}" in line and "about 0.0 left" in line


def test_claims_failed_work_is_recorded_and_what_needs_it_left_out(lab, monkeypatch):
    order, done = claims.plan(read_claims()[:1]), []
    failing = Work("choice", "xgqa/prior")
    monkeypatch.setattr(claims, "do", do_quickly(done, [failing]))
    team = claims.Team(lab, order, 100.0, 1)
    team.work()
    assert team.failed == {failing}
    assert [w for w in done if w.name == "xgqa/prior"] == [failing], "its runs have no settings"
    assert len([w for w in done if w.name == "xgqa/baseline"]) == 6, "others go on: its choice, five seeds"
    assert [r["kind"] for r in read_jsonl(lab.records)].count("failed") == 1


def test_claims_what_is_gone_or_of_another_recipe_is_made_again(lab, monkeypatch):
    """Of a folder that an earlier recipe left a run would say "other settings", and end the command."""
    made, digest = [], ["a"]

    def pretrain(lab, work):
        made.append((work.label, digest[0]))
        claims_runs.exported(lab, work).mkdir(parents=True)
        (lab.folder / work.label).mkdir(exist_ok=True)
        return Outcome(0, 1.0, 1.0, {})

    monkeypatch.setattr(claims_work, "config_hash", lambda kind, name: digest[0])
    monkeypatch.setattr(claims_runs, "pretrain", pretrain)
    ablation = Work("run", "xvnli/pretrained_no_tlm", 1)
    for now in ("a", "a", "b", "b"):
        digest[0] = now
        claims_runs.make_needed(lab, ablation)
    assert made == [("pretraining_no_tlm_1", "a"), ("pretraining_no_tlm_1", "b")]
    claims_runs.exported(lab, Work("pretraining", "no_tlm", 1)).rmdir()  # as on a new machine
    claims_runs.make_needed(lab, ablation)
    assert len(made) == 3


def test_claims_charge_what_a_process_nobody_waits_for_has_used(tmp_path, monkeypatch):
    """As Ray's workers are; their parent, this command, sleeps."""
    monkeypatch.setattr(claims_runs, "LOOK_SECONDS", 0.2)
    (tmp_path / "driver.py").write_text(
        "import os, subprocess, sys, time\n"
        f"tired = {str(tmp_path / 'tired')!r}\n"
        "busy = f'import time\\nwhile time.process_time() < 1: 0\\nopen({tired!r}, \"w\")\\ntime.sleep(3)'\n"
        "subprocess.Popen([sys.executable, '-c', busy])\n"
        "while not os.path.exists(tired): time.sleep(0.1)\n"
        "time.sleep(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = claims_runs.spawn(tmp_path / "log", "driver")
    assert outcome.status == 0 and 1 <= outcome.cpu_seconds < 10


def test_claims_three_failures_in_a_row_end_the_command(lab, monkeypatch):
    """As of a full disk: whatever comes next fails too."""
    order, done = claims.plan(read_claims()), []
    monkeypatch.setattr(claims, "do", do_quickly(done, order))
    claims.Team(lab, order, 100.0, 1).work()
    assert len(done) == 3


def test_claims_estimate_follows_what_was_measured(lab):
    pending = [Work("run", "xgqa/baseline", 1), Work("run", "xgqa/prior_sparse", 0)]
    expected = [EXPERIMENTS[work.name].cost for work in pending]
    assert claims.account([], pending).left == pytest.approx(sum(expected) / 3600)
    measured = [record(lab, Work("run", "xgqa/baseline", 0), 2 * expected[0])]
    assert claims.account(measured, pending).left == pytest.approx(2 * sum(expected) / 3600)


def runs_with(lab, name, targets, **more):
    return [
        record(lab, Work("run", name, seed), scores={"en": 0.9, "de": score, "ru": score, "sw": 0.0}, **more)
        for seed, score in enumerate(targets)
    ]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.41, 0.52, 0.63], [0.40, 0.50, 0.60], "not seen (3 of 5 seeds)"),
        ([0.41, 0.51, 0.61], [0.40, 0.50, 0.60], "holds (3 of 5 seeds)"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.31, 0.4, 0.5, 0.6], "reversed"),
        ([0.41], [0.40, 0.50], "not run"),
    ],
)
def test_claims_verdict_is_by_interval_of_pairs(lab, a, b, verdict):
    runs = {
        "xgqa/prior": runs_with(lab, "xgqa/prior", a),
        "xgqa/baseline": runs_with(lab, "xgqa/baseline", b),
    }
    assert judge(ABOVE, runs).verdict == verdict
    assert judge(ABOVE._replace(terms=(), untestable="no tags"), runs).verdict == "not testable here: no tags"


def test_claims_pairs_are_of_one_number_format(lab):
    half = runs_with(lab, "xgqa/baseline", [0.4, 0.5], precision="bfloat16")
    runs = {"xgqa/prior": runs_with(lab, "xgqa/prior", [0.41, 0.51]), "xgqa/baseline": half}
    assert judge(ABOVE, runs).verdict == "not run"


def test_claims_not_below_is_within_a_point(lab):
    claim = ABOVE._replace(direction=0)

    def verdict(loss):
        lower = [score - loss for score in (0.5, 0.6, 0.7, 0.8, 0.9)]
        runs = {
            "xgqa/prior": runs_with(lab, "xgqa/prior", lower),
            "xgqa/baseline": runs_with(lab, "xgqa/baseline", [0.5, 0.6, 0.7, 0.8, 0.9]),
        }
        return judge(claim, runs).verdict

    assert verdict(0.005) == "holds" and verdict(0.02) == "reversed"


def test_claims_metrics_by_hand():
    run = {
        "scores": {"en": 0.9, "de": 0.5, "ru": 0.3, "zh": 0.1, "sw": 0.0},
        "r1": {"de": 0.5, "ru": 0.3, "sw": 0.1},
        "epochs": {
            "similarity": {"mean": [0.1, 0.2], "de": [0, 0.9], "ru": [0, 0.7], "zh": [0, 0.5], "sw": [0, 0]},
            "score": {
                **{"en": [0.5, 0.6, 0.9], "de": [0.1, 0.6, 0.5], "ru": [0.1, 0.4, 0.3]},
                **{"zh": [0.2, 0.2, 0.1], "sw": [0, 1, 0]},
            },
        },
    }
    metrics = {name: metric(run, [run]) for name, metric in claims_report.METRICS.items()}
    assert metrics == {
        "targets": pytest.approx(0.3),
        "english": 0.9,
        "r1": pytest.approx(0.4),
        "r1_sw": 0.1,
        "std": pytest.approx(0.2),
        "spread": 0.0,
        "similarity": pytest.approx(0.7),
        "similarity_r": pytest.approx(1.0),
        "early": pytest.approx(0.1),
    }
    others = [{"scores": {"en": 0, "de": de, "sw": 0}} for de in (0.1, 0.2, 0.6)]
    assert claims_report.METRICS["spread"](others[2], others) == pytest.approx(0.4)


def test_claims_table_tells_of_what_is_there(lab):
    runs = {
        "xgqa/prior": runs_with(lab, "xgqa/prior", [0.41, 0.51, 0.61, 0.71, 0.81]),
        "xgqa/baseline": runs_with(lab, "xgqa/baseline", [0.40, 0.50, 0.60, 0.70, 0.80]),
    }
    table = claims_report.claims_table([ABOVE], runs)
    assert "| a lies above b | P |  | holds | +1.50 (1.0 to 2.5) | +1.0 ± 0.0 (60.0 to 61.0) | 5 |" in table
    assert "| xgqa/prior |  | 5 | 90.0 ± 0.0 | 61.0 ± 15.8 | 0.0 ± 0.0 |" in claims_report.experiments_table(
        runs
    )
    old = [record(lab, Work("run", "xgqa/prior", 0)) | {"config": "another"}]
    old.append(record(lab, Work("run", "xgqa/prior", TRIAL_SEED)))
    assert not claims_report.current_runs(old), "changed since, or the teacher of a trial"


def test_claims_floors_are_met_or_missed_and_tasks_told():
    """Two seeds, by hand."""
    seeds = [
        {
            "seed": seed,
            "scores": {"en": 0.8 + seed / 10, "de": 0.5, "zh": 0.4, "sw": 0.2},
            "shuffled_images": {"en": 0.3, "de": 0.3, "zh": 0.32, "sw": 0.2},
            "test_style": {"en": 0.7, "de": 0.4, "zh": 0.3, "sw": 0.1},
            "by_type": {"en": {"verify": 0.9, "choose": 0.96, "query": 0.6}, "zh": {"verify": 0.1}},
            "shuffled_by_type": {"en": {"verify": 0.5}},
            "marks": {"zh": "‡"} if seed else {},
            "baselines": {"en": {"text": 0.41, "image": 0.2, "majority": 0.25}},
        }
        for seed in range(2)
    ]
    runs = {"xgqa/baseline": seeds}
    assert claims_tasks.by_images(seeds) == pytest.approx({"de": 0.2, "zh": 0.08})
    floors = claims_tasks.floors_table(runs)
    assert "| English | xgqa | 80.0 | 85.0 | 2 | met |" in floors
    assert "| English, verify | xgqa | 95.0 | 90.0 | 2 | missed by 5.0 |" in floors
    assert "| xgqa | 10.0 | 8.0 | 2 | missed by 2.0 |" in floors
    assert "| xgqa | 100.0 | 87.5 | 2 | missed by 12.5 |" in floors
    assert "| xvnli | 85.0 |  |  | not run |" in floors
    row = next(line for line in claims_tasks.tasks_table(runs).splitlines() if line.startswith("| xgqa"))
    cells = row.strip("| ").split(" | ")
    assert cells[1:4] == ["2", "85.0 ± 7.1", "30.0 ± 0.0"] and cells[4].startswith("+55.0 ± ")
    assert cells[6:9] == ["41.0", "20.0", "25.0"] and cells[9] == "45.0 ± 0.0"
    assert "| verify | 90.0 ± 0.0 | 50.0 ± 0.0 | 10.0 ± 0.0 |  |" in claims_tasks.kinds_table(runs)
    assert claims_tasks.marks_line(runs).endswith("things as answers: xgqa, zh (seed 1).")
    assert claims_tasks.tables({}).count("not run") == len(claims_tasks.FLOORS) + len(claims_tasks.ROWS)


def test_scenes_base_record_has_stages_and_tries_and_no_test_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes_base, "FILE", tmp_path / "records.jsonl")
    results = {
        "stage": {
            **{"run": "stage", "steps": 9, "seconds": 120.0, "evaluation_precision": "float32"},
            "evaluation": {
                "en_r1": 0.5,
                "others_r1": 0.25,
                "dev_loss/vlm": 1.0,
                "dev_loss/vlm_wrong_image": 2.0,
            },
            "retrieval": {"en": {}},
        },
        "tuned": {
            "run": "tuned",
            "seconds": 60.0,
            "evaluation_precision": "float32",
            "dev": {"en": 0.8, "de": 0.4},
        },
        "tested": {"run": "tested", "seconds": 60.0, "evaluation_precision": "float32"},
        "other_seed": {
            "run": "other_seed",
            "seconds": 60.0,
            "evaluation_precision": "float32",
            "accuracy": {"en": 0.7, "de": 0.2, "sw": 0.0},
        },
    }
    for name, result in results.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        scenes = {"task": "xgqa", "data": str(tmp_path / f"scenes_of_{name}")}
        settings = {"recipe": f"of_{name}"} | ({} if name == "stage" else scenes)
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    for name, seed in {"tested": 0, "other_seed": 1}.items():
        (tmp_path / f"scenes_of_{name}").mkdir()
        (tmp_path / f"scenes_of_{name}" / "settings.json").write_text(json.dumps({"seed": seed}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    scenes_base.main([str(tmp_path), str(tmp_path / "stage")])
    scenes_base.main(["--try", "twice as long", str(tmp_path / "tuned")])
    scenes_base.main(["--try", "other scenes", str(tmp_path / "other_seed")])
    with pytest.raises(UserError, match="tested: it was tested"):
        scenes_base.main(["--try", "no", str(tmp_path / "tested")])
    weights = scenes_base.hash_files(tmp_path, "*.safetensors")
    assert f"weights {weights}" in capsys.readouterr().out
    found = scenes_base.tables()
    assert (
        "| `of_stage` | 9 | 2 | 50.0 | 25.0 |  | 1.00 | 2.00 |" in found["stages"]
        and weights in found["stages"]
    )
    assert "| twice as long | `of_tuned` | 1.0 | 80.0 | 40.0 |" in found["tries"]
    assert "| other scenes | `of_other_seed` | 1.0 | 70.0 | 20.0 |" in found["tries"], "without sw"


@pytest.mark.skipif(not SCENES_BASE.is_dir(), reason="no model is shipped yet")
def test_shipped_model_is_small_is_read_and_is_the_one_recorded():
    import raylib.api as polyglance

    assert sum(path.stat().st_size for path in SCENES_BASE.iterdir()) < 8e6
    recorded = [r["weights"] for r in read_jsonl(scenes_base.FILE) if "weights" in r]
    assert scenes_base.hash_files(SCENES_BASE, "*.safetensors") == recorded[-1]
    model = polyglance.load(SCENES_BASE, "cpu")
    assert all(p.dtype == torch.float32 for p in model.network.parameters())
    assert model.encode_text(["a cat", "eine Katze"]).shape[0] == 2


def test_claims_seeds_are_five_of_xgqa_and_more_of_what_varies():
    assert num_seeds("xgqa/prior") == 5 and num_seeds("xvnli/mixing") == 8
    assert num_seeds("p4/zero_shot") == 1 and num_seeds("xvnli/pretrained_all") == 3


def test_claims_model_without_fusion_keeps_all_else(lab, model):
    lab = lab._replace(model=model)
    start, new = UnifiedModel.from_pretrained(model), claims_runs.unfused_model(lab)
    kept, other = start.state_dict(), UnifiedModel.from_pretrained(new).state_dict()
    changed = {name.split(".")[0] for name in kept if not torch.equal(kept[name], other[name])}
    assert changed == {"fusion", "match_head"}
    assert claims_runs.unfused_model(lab) == new, "made once"


@pytest.mark.slow
def test_claims_run_end_to_end_and_go_on(model, scenes, tmp_path, capsys):
    """A choice by four trials, the seeds, tested; a second start finds all done."""
    place = [f"--model={model}", f"--scenes={scenes}", f"--folder={tmp_path}", "--quick", "--processes=1"]
    assert claims.main([*place, "--only=xvnli/baseline"]) == 0
    records = read_jsonl(tmp_path / "quick.jsonl")
    assert [r["kind"] for r in records] == ["choice", *["run"] * 8]
    assert len(records[0]["trials"]) == 4
    for run in records[1:]:
        assert run["chosen"] == records[0]["chosen"] and set(run["scores"]) > {"en", "ru"}
        assert run["cpu_seconds"] > 0 and run["precision"] and run["code"]
    assert claims.main([*place, "--only=xvnli/baseline"]) == 0
    assert len(read_jsonl(tmp_path / "quick.jsonl")) == 9
    assert "9 of 9 pieces of work done" in capsys.readouterr().out
    assert json.loads((tmp_path / "xvnli_baseline_seed0" / "result.json").read_text())["finished"]
