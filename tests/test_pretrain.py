"""The command line on real input, in this process: train, stop, resume, export, evaluate; and what goes
wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.__main__ import main
from pretrain.evaluate import ZeroShotRetrieval, compare_test_sets, recall_table, summarize_recall
from pretrain.recipes import ABLATIONS, RECIPES
from pretrain.train import PretrainConfig, build_model, run
from raylib import checkpoint
from raylib.config import dump_config, load_config, override
from raylib.errors import UserError
from raylib.metrics import mean_recall_at_1
from raylib.models.unified import UnifiedModel
from raylib.monitoring import read_metrics

LOCAL = ("runtime=local", "workers=1")
FIGURES = {"chance_r1", "n", *(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))}


def lines(config):
    return [r for r in read_metrics(Path(config.runs) / config.name) if "lr" in r]


def without_rate(records):
    return [{k: v for k, v in r.items() if k.startswith(("step", "lr", "epoch", "loss/"))} for r in records]


def test_pretrain_run_writes_documented_files(mini, retrieval_set, tmp_path, capsys):
    config = mini("name=first", *LOCAL, "fit.eval_every=3", 'fit.track=["tensorboard"]')
    run(config)
    folder = tmp_path / "first"
    result = json.loads((folder / "result.json").read_text())
    assert {"run", "steps", "seconds", "workers", "git", "losses", "retrieval"} <= set(result)
    assert set(result["losses"]) >= {"ucl_image", "ucl_translation", "vlm", "tlm", "xmlm", "itm"}
    assert set(result["retrieval"]) == {"en", "de", "zh"}
    assert all(set(figures) == FIGURES for figures in result["retrieval"].values())
    assert result["retrieval"]["de"]["n"] == 19  # one image has no German caption
    for language, (low, high) in result["interval"].items():
        assert low <= mean_recall_at_1(result["retrieval"][language]) <= high and low < high
    assert set(result["interval"]) == {"en", "de", "zh"}
    assert result["retrieval"]["de"]["chance_r1"] == pytest.approx(1 / 19)
    assert sum(result["times"].values()) == pytest.approx(result["seconds"])
    assert (folder / "curve.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").iterdir())
    printed = capsys.readouterr().out
    assert "| en |" in printed
    assert "peak memory" in printed
    run(config)
    assert "is complete" in capsys.readouterr().out
    assert main(["export", str(folder), str(tmp_path / "model")]) == 0
    assert (
        main(["evaluate", str(tmp_path / "model"), str(retrieval_set), "--json", str(tmp_path / "e.json")])
        == 0
    )
    exported = json.loads((tmp_path / "e.json").read_text())
    assert (exported["retrieval"], exported["interval"]) == (result["retrieval"], result["interval"])
    weights = UnifiedModel.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_pretrain_scores_test_sets_once_and_shows_held_out_languages_apart(
    mini, retrieval_set, tmp_path, capsys, monkeypatch
):
    other = tmp_path / "other"
    shutil.copytree(retrieval_set, other)
    records = json.loads((other / "captions.json").read_text())
    for record in records:
        record["heldout_languages"] = ["zh"]
    (other / "captions.json").write_text(json.dumps(records))
    calls = []
    score = ZeroShotRetrieval.__call__
    monkeypatch.setattr(
        ZeroShotRetrieval, "__call__", lambda *args: calls.append(args[0].heldout_languages) or score(*args)
    )
    sets = json.dumps({"drawn": str(other)})
    run(mini("name=tested", *LOCAL, "fit.eval_every=3", f"data.test_sets={sets}"))
    assert calls == [[], [], ["zh"]]  # two evaluations, and the end
    result = json.loads((tmp_path / "tested" / "result.json").read_text())
    tested = result["test_sets"]["drawn"]
    assert tested["retrieval"] == result["retrieval"] and tested["heldout_languages"] == ["zh"]
    whole, apart = summarize_recall(result), summarize_recall(tested)
    recall = {code: mean_recall_at_1(figures) for code, figures in result["retrieval"].items()}
    assert whole["others_r1"] == pytest.approx((recall["de"] + recall["zh"]) / 2)
    assert apart["others_r1"] == recall["de"] and apart["heldout_language_r1"] == recall["zh"]
    assert apart["score"] == pytest.approx((recall["en"] + recall["de"]) / 2)
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| drawn |")]
    cells = [f"{100 * r:.1f} | {20 * r:.0f}" for r in (recall["en"], recall["de"], recall["zh"])]
    assert row == [f"| drawn | 20 | {' | '.join(cells)} |"]
    table = recall_table(tested)
    assert "| zh, in no training text |" in table and "mean of the other" not in table
    assert "| mean of the other 2 |" in recall_table(result)
    # of a run without a development set the test sets alone
    lone = compare_test_sets({"retrieval": {}, "heldout": {}, "test_sets": {"drawn": tested}})
    assert row == lone.splitlines()[2:]
    more = {**tested, "heldout_languages": ["zh", "de"]}
    held_out = [line.split(",")[0] for line in recall_table(more).splitlines() if "no training" in line]
    assert held_out == ["| de", "| zh"]
    # a record that is wrong
    (other / "captions.json").write_text(json.dumps([records[0] | {"heldout_languages": "zh"}]))
    assert main(["evaluate", str(tmp_path / "tested"), str(other)]) == 2
    assert 'record 0: "heldout_languages" is no list of language codes' in capsys.readouterr().err


def test_pretrain_stopped_run_resumes_without_ray(mini):
    whole, parts = mini("name=whole", *LOCAL), mini("name=parts", *LOCAL)
    run(whole)
    run(mini("name=parts", *LOCAL, "fit.stop_after=3"))
    run(parts)
    assert without_rate(lines(whole)) == without_rate(lines(parts))
    ends = [Path(c.runs) / c.name / "checkpoints" / "step_000006" for c in (whole, parts)]
    for name in ("optimizer-00000.safetensors", "optimizer-00000.json", "model.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


@pytest.mark.parametrize("sharding", ["none", "zero2"])
def test_pretrain_run_without_optimizer_is_exported_and_not_trained_on(mini, tmp_path, capsys, sharding):
    def settings(*more):
        return mini("name=small", *LOCAL, "fit.steps=4", f"fit.sharding={sharding}", *more)

    run(settings("fit.stop_after=2", "keep_optimizer=false"))
    folder = tmp_path / "small"
    assert checkpoint.has_optimizer(checkpoint.find_newest(folder))  # it has not ended
    run(settings())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert main(["export", str(folder), str(tmp_path / "before")]) == 0
    run(settings("keep_optimizer=false"))  # the run has ended already
    assert not list(folder.rglob("optimizer-*")) and "is complete" in capsys.readouterr().out
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 0.6 * size
    for step in (folder / "checkpoints").glob("step_*"):
        assert checkpoint.verify(step)["step"] == int(step.name[5:])
    assert main(["export", str(folder), str(tmp_path / "after")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)
    for more in (["resume=step_000002"], []):
        (folder / "result.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match="no optimizer state, .*keep_optimizer=false.* new run from its"):
            run(settings(*more))
    assert not list(folder.glob("checkpoints.before-*"))


USER_TERM = """
from raylib.objectives import LossPart, term

@term("parallel", reads=("embeddings",), trains=("text_projection",))
def norm(step):
    states = step.model.embed_text_states(step.source.cls(), normalize=False)
    return [LossPart(states.square().sum(), len(states))]
"""


def test_pretrain_run_keeps_a_copy_of_a_users_term(mini, tmp_path):
    """Of what ran: by its stored config a run goes on when the file is gone."""
    file = tmp_path / "my_term.py"
    file.write_text(USER_TERM)
    run(mini("name=first", *LOCAL, f"objective.terms.mine={file}", "fit.steps=2", "fit.stop_after=1"))
    copy = tmp_path / "first" / "my_term.py"
    assert copy.read_text() == USER_TERM
    file.unlink()
    stored = load_config(PretrainConfig, tmp_path / "first" / "config.json")
    assert run(override(stored, ["fit.stop_after=null"]))["finished"]
    assert "mine" in lines(stored)[-1] or "loss/mine" in lines(stored)[-1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "my_term.py").write_text(USER_TERM)
    file.write_text(USER_TERM + "norms = norm\n")
    two = [f"objective.terms.one={file}:norm", f"objective.terms.two={tmp_path}/other/my_term.py"]
    with pytest.raises(UserError, match="two files of one name"):
        run(mini("name=two", *LOCAL, *two))


def test_pretrain_second_stage_with_other_layers(mini, tmp_path):
    run(mini("name=first", *LOCAL, "fit.steps=2"))
    start, before = f"init.model={tmp_path / 'first'}", build_model(mini(f"init.model={tmp_path / 'first'}"))
    sizes = before.config.text_layers, before.config.fusion_layers
    deeper = ["model.text_layers=3", "model.fusion_layers=2"]
    assert sizes == (1, 1)
    made = build_model(mini(start, *deeper, "init.layers=[0,0,0,1,1]"))
    stored, weights = before.state_dict(), made.state_dict()
    for name, value in weights.items():
        assert value.equal(stored[re.sub(r"blocks\.\d+", "blocks.0", name) if "vision" not in name else name])
    assert len({block.attention.query.weight.data_ptr() for block in made.text.blocks}) == 3
    for layers in ("[0,0,0,1]", "[0,0,1,1,1]", "[0,0,0,0,1]", "[0,0,0,1,2]"):
        with pytest.raises(UserError, match=r"has text layers 0 to 0, fusion layers 1 to 1; give 3 of the"):
            build_model(mini(start, *deeper, f"init.layers={layers}"))
    with pytest.raises(UserError, match=r"set model\.text_layers=1 model\.fusion_layers=1 or init\.layers$"):
        build_model(mini(start, *deeper))
    entangled = build_model(mini(start, "model.fusion=entangled")).state_dict()
    assert all(value.equal(stored[name]) for name, value in entangled.items())
    assert {name.split(".")[3] for name in stored.keys() - entangled} == {"cross_attention", "cross_norm"}


def test_pretrain_second_stage_starts_from_run_or_export(mini, tmp_path):
    first = mini("name=first", *LOCAL, "fit.steps=2")
    run(first)
    assert main(["export", str(tmp_path / "first"), str(tmp_path / "model")]) == 0
    expected = UnifiedModel.from_pretrained(tmp_path / "model").state_dict()
    for start in ("first", "model"):
        made = build_model(
            mini(f"init.model={tmp_path / start}", "fit.seed=7", "model.dropout=0.1")
        ).state_dict()
        assert made.keys() == expected.keys() and all(torch.equal(made[k], expected[k]) for k in expected)
    with pytest.raises(UserError, match=r"model is another model: set model\.heads=2$"):
        build_model(mini(f"init.model={tmp_path / 'model'}", "model.heads=4"))
    with pytest.raises(UserError, match=r"init.model has all weights; leave init.text"):
        mini("init.model=a", "init.text=b")
    larger = build_model(mini(f"init.model={tmp_path / 'model'}", "model.image_size=32")).state_dict()
    assert larger["vision.position"].shape[0] == 1 + 16 and larger["vision.position"][0].equal(
        expected["vision.position"][0]
    )
    windows = build_model(
        mini(f"init.model={tmp_path / 'model'}", "model.image_size=32", "model.vision_window=16")
    ).state_dict()
    assert windows["vision.place"].shape[0] == 4  # and each at a place of its own
    assert (windows["vision.place"][1:] - windows["vision.place"][0]).norm(dim=1).min() > 0.03
    assert all(torch.equal(windows[k], expected[k]) for k in expected)
    with pytest.raises(UserError, match=r"is another model: set model\.vision_window=None"):
        build_model(mini(f"init.model={tmp_path / 'model'}", "model.image_size=32", "model.vision_window=8"))


def torchrun(config, tmp_path, processes=2) -> str:
    """Run `config` in so many processes; what they print."""
    (tmp_path / "two.json").write_text(dump_config(config), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "pretrain",
    ]
    completed = subprocess.run(
        [*command, "--config", tmp_path / "two.json", "allow_code=true"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    return completed.stdout


def assert_close(one, two):
    """Assert that two runs logged the same losses, rates aside."""
    assert len(one) == len(two) == 6
    for a, b in zip(without_rate(one), without_rate(two), strict=True):
        assert b == pytest.approx(a, rel=2e-4)


@pytest.mark.parametrize(
    ("without", "sharding", "processes"),
    [
        ((), "zero2", 3),
        pytest.param((), "none", 3, marks=pytest.mark.slow),
        pytest.param(("data.image_text.batch=0",), "none", 2, marks=pytest.mark.slow),
    ],
)  # three do not divide the batches, nor the lanes; the last leaves the image encoder unused
def test_pretrain_torchrun_equals_one_process(mini, tmp_path, without, sharding, processes):
    run(mini("name=one", *LOCAL, *without))
    config = mini("name=two", *LOCAL, *without, f"fit.sharding={sharding}")
    assert torchrun(config, tmp_path, processes).count("| en |") == 1  # one process speaks
    assert_close(lines(mini("name=one", *without)), lines(config))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_pretrain_torchrun_with_zero_resumes_bit_exactly(mini, tmp_path, processes):
    """Through checkpoints, a resume and the choice of the best one."""
    settings = (*LOCAL, "fit.sharding=zero2", "fit.eval_every=2")
    whole, parts = (mini(f"name={name}", *settings) for name in ("whole", "parts"))
    torchrun(whole, tmp_path, processes)
    torchrun(mini("name=parts", *settings, "fit.stop_after=3"), tmp_path, processes)
    torchrun(parts, tmp_path, processes)
    assert without_rate(lines(whole)) == without_rate(lines(parts))
    folders = [tmp_path / name for name in ("whole", "parts")]
    registries = [checkpoint.read_registry(folder) for folder in folders]
    assert registries[0].best == registries[1].best is not None
    ends = [checkpoint.find_newest(folder) for folder in folders]
    for path in sorted([*ends[0].glob("optimizer-*"), ends[0] / "model.safetensors"]):
        assert path.read_bytes() == (ends[1] / path.name).read_bytes()
    assert len(list(ends[0].glob("optimizer-*"))) == 2 * processes
    assert checkpoint.read_meta(ends[0])["engine"] == "deepspeed"
    assert json.loads((folders[0] / "result.json").read_text())["retrieval"]
    run(mini("name=one", *LOCAL, "fit.eval_every=2"))
    assert_close(lines(mini("name=one")), lines(whole))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith("tiny")])
def test_pretrain_variants_resume_bit_exactly_and_on_two_workers(mini, tmp_path, recipe):
    whole, parts, two = (mini(f"name={name}", *LOCAL, recipe=recipe) for name in ("whole", "parts", "two"))
    run(whole)
    run(mini("name=parts", *LOCAL, "fit.stop_after=3", recipe=recipe))
    run(parts)
    assert without_rate(lines(whole)) == without_rate(lines(parts))
    torchrun(two, tmp_path)
    assert_close(lines(whole), lines(two))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pretrain_deterministic_on_a_gpu_is_equal_to_the_bit(mini, tmp_path):
    """Two runs, and a resumed one, each in processes of its own: cuBLAS reads its setting once a process."""
    folders = []
    for name, stops in (("one", [6]), ("two", [6]), ("parts", [3, 6])):
        for stop in stops:
            config = mini(f"name={name}", *LOCAL, "fit.deterministic=true", f"fit.stop_after={stop}")
            (tmp_path / "run.json").write_text(dump_config(config), encoding="utf-8")
            command = [sys.executable, "-m", "pretrain", "--config", str(tmp_path / "run.json")]
            assert subprocess.run(command, cwd=Path(__file__).parent.parent).returncode == 0
        folders.append(Path(config.runs) / name)
    first, *others = (load_file(folder / "checkpoints/step_000006/model.safetensors") for folder in folders)
    losses, *more = (
        [{k: v for k, v in json.loads(line).items() if k.startswith("loss/")} for line in text.splitlines()]
        for text in ((folder / "metrics.jsonl").read_text() for folder in folders)
    )
    assert all(found == losses for found in more)
    for weights in others:
        assert all(torch.equal(value, weights[name]) for name, value in first.items())


def test_pretrain_zero_in_one_process_needs_no_launcher(mini, tmp_path):
    for more in (
        ["fit.stop_after=3"],
        [],
    ):  # a process of its own, as on a command line; it resumes its own checkpoint
        (tmp_path / "zero.json").write_text(
            dump_config(mini("name=zero", *LOCAL, "fit.sharding=zero2", *more)), encoding="utf-8"
        )
        command = [sys.executable, "-m", "pretrain", "--config", str(tmp_path / "zero.json")]
        assert subprocess.run(command, cwd=Path(__file__).parent.parent).returncode == 0
    run(mini("name=plain", *LOCAL))
    losses = [
        [
            {k: v for k, v in line.items() if k.startswith("loss/")}
            for line in lines(mini(f"name={name}", *LOCAL))
        ]
        for name in ("zero", "plain")
    ]
    assert len(losses[0]) == len(losses[1]) == 6
    for zero, plain in zip(*losses, strict=True):
        assert zero == pytest.approx(plain, rel=1e-4)


def test_pretrain_loader_processes_change_nothing(mini):
    run(mini("name=none", *LOCAL))
    run(mini("name=two", *LOCAL, "fit.loader_workers=2"))
    assert without_rate(lines(mini("name=none"))) == without_rate(lines(mini("name=two")))


def test_pretrain_keeps_best_and_newest_checkpoints(mini, tmp_path):
    run(mini("name=kept", *LOCAL, "fit.keep=2", "fit.save_every=1", "fit.eval_every=1"))
    kept = sorted(p.name for p in (tmp_path / "kept" / "checkpoints").glob("step_*"))
    scores = {r["step"]: r["eval/score"] for r in read_metrics(tmp_path / "kept") if "eval/score" in r}
    best = checkpoint.verify(checkpoint.find_best(tmp_path / "kept"))
    assert best["score"] == max(scores.values()) == scores[best["step"]]
    assert kept == sorted({"step_000005", "step_000006", checkpoint.step_name(best["step"])})


def test_pretrain_skips_damaged_checkpoints_without_ray(mini, tmp_path):
    config = mini("name=hurt", *LOCAL, "fit.stop_after=4")
    run(config)
    folder = tmp_path / "hurt"
    weights = folder / "checkpoints" / "step_000004" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors: content changed .* resume=step_NNNNNN"):
        run(mini("name=hurt", *LOCAL))
    (folder / "checkpoints" / "step_000004" / "files-00000.json").unlink()
    with pytest.raises(UserError, match="files-00000.json: missing"):
        run(mini("name=hurt", *LOCAL))
    shutil.copytree(folder / "checkpoints" / "step_000002", folder / "checkpoints" / "step_000005")
    assert checkpoint.find_newest(folder).name == "step_000004"
    assert run(mini("name=hurt", *LOCAL, "resume=step_000002"))["finished"]


def test_pretrain_changed_settings_need_another_name(mini):
    run(mini("name=set", *LOCAL, "fit.stop_after=2"))
    with pytest.raises(UserError, match=r"other settings \(optim.lr\); give this one another name="):
        run(mini("name=set", *LOCAL, "optim.lr=0.5"))


@pytest.fixture(scope="module")
def built() -> set[str]:
    """Model configs that have been built."""
    return set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_pretrain_every_recipe_builds(recipe, built):
    config = RECIPES[recipe]()
    assert config.name == recipe
    assert RECIPES[recipe].__doc__
    if (model := config.model.model_dump_json()) not in built:
        with torch.device("meta"):
            UnifiedModel(config.model)
        built.add(model)
    again = PretrainConfig.model_validate(config.model_dump())
    assert again == config


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_pretrain_ablations_train_without_the_term(mini, ablation):
    weights = RECIPES[f"tiny_{ablation}"]().objective.weights
    config = mini(f"name={ablation}", *LOCAL, "fit.steps=1")
    objective = config.objective.model_copy(update={"weights": weights})
    run(config.model_copy(update={"objective": objective}))
    terms = {k.removeprefix("loss/") for k in lines(config)[0] if k.startswith("loss/")}
    assert not terms & {name for name, weight in weights.model_dump().items() if weight == 0}


def test_pretrain_base_has_published_parameter_count():
    with torch.device("meta"):
        model = UnifiedModel(RECIPES["base"]().model)
    layers = (
        6 * 7.09 + 6 * (7.09 + 2.36) + 12 * 7.09
    )  # text, unified with cross-attention, image; in millions
    words = 250002 * 768 / 1e6
    heads = 768 * 256 * 2 / 1e6 + 0.59 + 0.25
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        layers + words + heads + 1.2, rel=0.01
    )


def test_pretrain_seed_determines_the_model(mini):
    first, same, other = (build_model(mini(f"fit.seed={seed}")) for seed in (1, 1, 2))
    assert torch.equal(first.embedding.word.weight, same.embedding.word.weight)
    assert not torch.equal(first.embedding.word.weight, other.embedding.word.weight)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tny"], "unknown recipe or command 'tny'; the nearest: tiny"),
        (["tiny", "optim.rl=1"], "unknown setting 'optim.rl'; did you mean optim.lr"),
        (["tiny", "optim.lr=fast"], "optim.lr: Input should be a valid number"),
        (["tiny", "optim.lr"], "not of the form path=value"),
        (["tiny", "model.heads=3"], "width 128 is not a multiple of heads 3"),
        (["tiny", "data.text.length=900"], "model.positions=64 is less than the longest data length 900"),
        (
            ["tiny", "objective.fuse_every=700"],
            "fuse_every=700 is more than data.image_text.batch=512; set it",
        ),
        (["evaluate", "nowhere", "data"], "nowhere: neither a model folder nor a run"),
        (["export", "nowhere", "to"], "nowhere: neither a model folder nor a run"),
        (["--config", "nowhere.json"], "nowhere.json: no such config file"),
    ],
)
def test_pretrain_wrong_settings_are_one_line_errors(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('data.text.languages=["xx"]', "no data in language 'xx'"),
        ("data.text.lanes=3", "lanes"),
        ("model.vocabulary=100", "set model.vocabulary=12000"),
        ("data.image_text.folder=nowhere", "nowhere"),
        (
            "workers=9",
            r"9 workers and data.image_text.batch=16, of which one in 2 is fused .* set workers=8 or fewer",
        ),
    ],
)
def test_pretrain_bad_data_is_found_before_start(mini, setting, words):
    with pytest.raises(UserError, match=words) as e:
        run(mini("name=bad", "runtime=ray", setting))
    assert "\n" not in str(e.value)


def test_pretrain_batch_too_large_for_memory_is_one_line_error(mini, tmp_path):
    """In a process whose address space ends 1 GB above what it has after its imports."""
    (tmp_path / "large.json").write_text(
        dump_config(mini("name=large", *LOCAL, "data.image_text.batch=16384")), encoding="utf-8"
    )
    limited = (
        "import resource, sys, pretrain.train; from pathlib import Path; from pretrain.__main__ import main; "
        "pages = int(Path('/proc/self/statm').read_text().split()[0]); limit = pages * "
        "resource.getpagesize() + 2**30; resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "--config", tmp_path / "large.json"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 2, completed.stderr[-2000:]
    assert (
        "error: step 0: a worker's part of the batch (image_text 16384, parallel 16, text 8) does not fit"
        in completed.stderr
    )
    assert "more than workers=1" in completed.stderr


def test_pretrain_print_config_shows_resolved_config(capsys):
    assert main(["tiny", "--print-config", "optim.lr=0.25"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 0.25
    assert override(RECIPES["tiny"](), ["optim.lr=0.25", "recipe=tiny"]) == PretrainConfig.model_validate(
        printed
    )


def test_pretrain_evaluate_refuses_folder_without_retrieval_set(mini, tmp_path, capsys):
    run(mini("name=model", *LOCAL, "fit.steps=1"))
    folder = tmp_path / "set"
    folder.mkdir()
    for text, words in (
        (None, "no retrieval set"),
        ("{", "not to be read as JSON"),
        ('[{"captions": {"en": "a"}}]', "record 0: wanted"),
        ('[{"image": "none.png", "captions": {"en": "a"}}]', "record 0: no image 'none.png' in that folder"),
        ('[{"image": "captions.json", "captions": {"en": ""}}]', "an empty caption in 'en'"),
        ('[{"image": "captions.json", "captions": {"en": "a"}}]', "does not decode"),
        ("[]", "no list of images and captions"),
    ):
        if text is not None:
            (folder / "captions.json").write_text(text)
        assert main(["evaluate", str(tmp_path / "model"), str(folder)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
