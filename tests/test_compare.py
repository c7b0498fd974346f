"""`compare` on run folders: which runs are one row, which settings are columns, intervals, differences,
files."""

import csv
import json
import re
import statistics

import pytest

from finetune.__main__ import main
from finetune.compare import compare_runs, to_markdown
from finetune.config import FinetuneConfig
from finetune.lineage import method_of, read_lineage, varying_paths
from raylib.config import dump_config, override
from raylib.display import escape_latex

T = {2: 12.7062, 3: 4.3027, 4: 3.1824}  # Student's t at 0.975, by number of seeds, from a printed table


@pytest.fixture
def runs(tmp_path):
    """`runs(name, score, *settings)` -> the folder of a finished run, as training leaves it."""

    def write(name: str, score: float, *settings: str, **changes):
        config = override(
            FinetuneConfig(task="xvnli", model=str(tmp_path / "export"), data="data"),
            [f"name={name}", f"runs={tmp_path}", *settings],
        )
        scores = {"en": score, "de": score - 0.1, "ru": score - 0.3}
        result = {
            "run": name,
            "task": config.task,
            "setting": config.setting,
            "split": "test",
            "method": "as recorded",
            "seed": config.fit.seed,
            "model": config.model,
            "params": 100,
            "trainable": 90,
            "finished": True,
            "steps": 8 if config.trains else 0,
            "seconds": 1.0,
            "accuracy": scores,
            "mean_targets": score - 0.2,
            "gap": 0.2,
            "by_type": {},
            "disparity": {"std": 0.15, "range": 0.3},
            **changes,
        }
        if config.task == "xflickrco":
            result["retrieval"] = {
                code: {"mean_recall": value} for code, value in result.pop("accuracy").items()
            }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(dump_config(config))
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    (tmp_path / "export").mkdir()
    return write


def table(text: str, number: int = 0) -> list[dict[str, str]]:
    """The rows of the `number`-th Markdown table, by head."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in blocks[number])
    return [dict(zip(head, row, strict=True)) for row in rows]


def shown(*folders, **options) -> str:
    comparisons, lines = compare_runs(folders, **options)
    return "\n\n".join([to_markdown(comparisons), *lines])


def test_compare_learning_rates_are_separate_rows(runs):
    folders = [
        runs(f"lr{lr}_seed{seed}", 0.5 + lr + seed / 100, f"optim.lr={lr}", f"fit.seed={seed}")
        for lr in (1e-3, 1e-4)
        for seed in (0, 1, 2)
    ]
    rows = table(shown(*folders))
    assert [(row["optim.lr"], row["seeds"]) for row in rows] == [("0.001", "3"), ("0.0001", "3")]
    assert set(rows[0]) == {
        "method",
        "optim.lr",
        "seeds",
        "en, accuracy",
        "de, accuracy",
        "ru, accuracy",
        "mean of the targets, accuracy",
        "gap, accuracy",
        "std of languages, accuracy",
        "range of languages, accuracy",
        "trained, % of parameters",
    }


def test_compare_evaluated_splits_are_separate_rows(runs):
    """Of xGQA, "test" was the testdev in earlier versions: the same setting, other questions."""
    old = runs("old", 0.5, "task=xgqa")
    new = runs("new", 0.5, "task=xgqa", "fit.seed=1", split="few_shot_test")
    rows = table(shown(old, new))
    assert [row["split"] for row in rows] == ["test", "few_shot_test"] and {row["seeds"] for row in rows} == {
        "1 (no interval)"
    }


def test_compare_settings_without_effect_make_no_row(runs):
    folders = [
        runs("a", 0.5, "workers=1", "fit.seed=0"),
        runs(
            "b",
            0.6,
            "workers=4",
            "runtime=local",
            "fit.log_every=3",
            "eval_each_epoch=true",
            "fit.seed=1",
            "fit.keep=9",
            "method=mine",
        ),
    ]
    (row, other) = table(shown(*folders))  # by its name alone
    assert (row["method"], other["method"]) == ("full fine-tuning", "mine") and "workers" not in row
    (row,) = table(shown(folders[0], runs("c", 0.6, "workers=3", "max_failures=1", "fit.seed=1")))
    assert row["seeds"] == "2"


def test_compare_means_and_intervals_equal_worked_example(runs):
    values = [0.50, 0.53, 0.47, 0.56]
    folders = [runs(f"seed{seed}", value, f"fit.seed={seed}") for seed, value in enumerate(values)]
    (row,) = table(shown(*folders))
    half = T[4] * statistics.stdev(values) / 2
    assert row["en, accuracy"] == f"{100 * statistics.fmean(values):.1f} ± {100 * half:.1f}"
    (alone,) = table(shown(folders[0]))
    assert alone["en, accuracy"] == "50.0" and alone["seeds"] == "1 (no interval)"


def test_compare_differences_are_paired_by_seed(runs):
    """Seeds move both rows far more than they differ by."""
    base, gain = {0: 0.3, 1: 0.5, 2: 0.6, 3: 0.4}, {1: 0.02, 2: 0.01, 3: 0.03, 7: 0.5}
    first = [runs(f"a{seed}", value, f"fit.seed={seed}") for seed, value in base.items()]
    second = [
        runs(f"b{seed}", base.get(seed, 0.0) + more, f"fit.seed={seed}", "epochs=3")
        for seed, more in gain.items()
    ]
    (row,) = table(shown(*first, *second), 1)
    half = T[3] * statistics.stdev([0.02, 0.01, 0.03]) / 3**0.5
    assert row["seeds in common"] == "3" and row["epochs"] == "3"
    assert row["en, accuracy"] == f"+2.0 ± {100 * half:.1f}" and row["gap, accuracy"] == "0.0 ± 0.0"
    (row,) = table(shown(*first, *second, baseline=second[2]), 1)
    assert row["en, accuracy"].startswith("-2.0 ±") and row["epochs"] == "10"
    text = shown(first[0], second[3])
    assert table(text, 1)[0]["seeds in common"] == "0" and table(text, 1)[0]["en, accuracy"] == ""
    assert table(shown(first[1], second[0]), 1)[0]["en, accuracy"] == "+2.0"


def test_compare_repeated_seed_is_not_a_second_seed(runs):
    folders = [
        runs("a", 0.5, "fit.seed=1"),
        runs("b", 0.6, "fit.seed=1", "workers=7"),
        runs("c", 0.7, "fit.seed=2"),
    ]
    text = shown(*folders)
    (row,) = table(text)
    assert row["seeds"] == "2" and row["en, accuracy"].startswith("60.0 ±")
    assert text.endswith(f"{folders[1]} repeats {folders[0]}: the same settings, seed 1; left out")
    assert table(shown(folders[0], folders[0]))[0]["seeds"] == "1 (no interval)"
    assert table(shown(*folders, runs("d", 0.1, "epochs=2"), baseline=folders[1]), 1)[0]["epochs"] == "2"


def test_compare_few_shot_rows_differ_by_their_english_run(runs, tmp_path):
    folders = []
    for backbone in ("uc2", "cclm"):
        for seed in (0, 1, 2):
            english = runs(
                f"{backbone}{seed}",
                0.5,
                f"backbone={backbone}",
                f"fit.seed={seed}",
                f"model={tmp_path}/{backbone}.pt",
            )
            folders.append(
                runs(f"few_{backbone}{seed}", 0.6, f"model={english}", "setting=few_shot", f"fit.seed={seed}")
            )
    rows = table(shown(*folders))
    assert [(row["model.backbone"], row["seeds"]) for row in rows] == [("uc2", "3"), ("cclm", "3")]
    assert [row["model.model"] for row in rows] == [f"{tmp_path}/uc2.pt", f"{tmp_path}/cclm.pt"]
    assert table(shown(*folders), 1)[0]["seeds in common"] == "3"
    (row,) = table(shown(*folders[:3]))
    assert not [head for head in row if head.startswith("model")]


def test_compare_seed_of_previous_run_is_a_seed(runs):
    english = [runs(f"en{seed}", 0.5, f"fit.seed={seed}") for seed in (0, 1)]
    tests = [
        runs(f"test{i}", 0.5 + i / 10, f"model={run}", "setting=translate_test")
        for i, run in enumerate(english)
    ]
    (row,) = table(shown(*tests))  # all of seed 0, which decides nothing there
    assert (
        row["seeds"] == "2"
        and row["method"] == "full fine-tuning"
        and row["en, accuracy"].startswith("55.0 ±")
    )
    assert read_lineage(tests[1]).seeds == (1,)
    again = runs("again", 0.5, f"model={english[0]}", "setting=translate_test", "fit.seed=5")
    assert "repeats" in shown(tests[0], again)


def test_compare_follows_chain_of_three_runs_and_teacher(runs, tmp_path):
    """Pretraining, English, few-shot; the teacher is a run too. What is gone is its path, and a run in itself
    ends."""
    folders = []
    for seed in (0, 1):
        pretrained = tmp_path / f"pre{seed}"
        pretrained.mkdir()
        (pretrained / "config.json").write_text(
            json.dumps({"name": f"pre{seed}", "fit": {"seed": seed, "steps": 9}, "corpus": "x"})
        )
        english = runs(f"en{seed}", 0.5, f"model={pretrained}", f"fit.seed={seed}")
        folders.append(
            runs(
                f"few{seed}",
                0.5,
                f"model={english}",
                "setting=few_shot",
                f"fit.seed={seed}",
                f"strategies.distillation.teacher={english}",
                "select=last",
            )
        )
    lineage = read_lineage(folders[1])
    assert lineage.seeds == (1, 1, 1, 1, 1) and lineage.settings["model"]["model"] == {
        "fit": {"steps": 9},
        "corpus": "x",
    }
    (row,) = table(shown(*folders))
    assert row["seeds"] == "2"
    gone = [runs(f"gone{i}", 0.5, f"model=runs/gone{i}", f"fit.seed={i}") for i in (0, 1)]
    assert [row["model"] for row in table(shown(*gone))] == ["runs/gone0", "runs/gone1"]
    itself = runs("itself", 0.5, f"model={tmp_path / 'itself'}")
    assert read_lineage(itself).settings["model"] == str(itself)


def test_compare_finds_moved_runs_beside_each_other(runs, tmp_path):
    english = runs("en", 0.5, f"runs={tmp_path}/was")
    config = json.loads((english / "config.json").read_text())
    few = runs("few", 0.5, "setting=few_shot", f"runs={tmp_path}/was", f"model={tmp_path}/was/en")
    assert read_lineage(few).settings["model"]["epochs"] == config["epochs"]
    checkpoint = english / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    part = runs("part", 0.5, f"model={checkpoint}")
    assert read_lineage(part).settings["model"]["path"] == "checkpoints/step_000003"


def test_compare_shows_strategies_enabled_in_some_rows(runs):
    baseline, weak, strong = (
        runs(f"r{i}", 0.5, *settings)
        for i, settings in enumerate(([], ["strategies.prior.alpha=4"], ["strategies.prior.alpha=10"]))
    )
    rows = table(shown(baseline, weak, strong))
    assert [row["strategies.prior.alpha"] for row in rows] == [
        "",
        "4.0",
        "10.0",
    ] and "strategies.prior" not in rows[0]
    assert [row["strategies.prior"] for row in table(shown(baseline, weak))] == ["", "on"]
    sized = runs("sized", 0.5, "image_size=64")
    assert [row["image_size"] for row in table(shown(baseline, sized))] == ["none", "64"]
    assert [row["method"] for row in rows] == [
        "full fine-tuning",
        "prior (vectors, alpha 4.0)",
        "prior (vectors)",
    ]


def test_compare_columns_are_the_differing_settings():
    a, b, c = {"x": 1, "part": {"y": 1, "z": 2}}, {"x": 1, "part": {"y": 2, "z": 2}}, {"x": 1, "part": None}
    assert (
        varying_paths([a, a]) == []
        and varying_paths([a, b]) == ["part.y"]
        and varying_paths([a, b, c]) == ["part.y"]
    )
    assert varying_paths([a, c]) == ["part"] and varying_paths([a, b, {**c, "part": "else"}]) == [
        "part",
        "part.y",
    ]


def test_compare_old_runs_get_defaults_and_unknown_settings_are_reported(runs):
    old, new = runs("old", 0.5), runs("new", 0.6, "fit.seed=1")
    config = json.loads((old / "config.json").read_text())
    for missing in ("temperature", "split", "candidates"):
        del config[missing]
    del config["optim"]["warmup"], config["fit"]["keep"]
    config["optim"]["warmup"] = 0.0
    (old / "config.json").write_text(json.dumps(config))
    text = shown(old, new)
    assert table(text)[0]["seeds"] == "2" and "version" not in text
    config["strategies"]["magic"] = {"power": 3}
    config["loss"] = "squared"
    (old / "config.json").write_text(json.dumps(config))
    text = shown(old, new)
    rows = table(text)
    assert [row["loss"] for row in rows] == ["squared", "ce"] and [
        row["strategies.magic"] for row in rows
    ] == ["on", ""]
    assert (
        f"{old}: setting loss is none of this version" in text and "setting strategies.magic is none" in text
    )
    config["candidates"], config["strategies"]["alignment"] = (
        16,
        {"routine": 3},
    )  # which use_itm_head=true forbids
    (old / "config.json").write_text(json.dumps(config))
    assert len(table(shown(old, new))) == 2


def test_compare_tasks_are_separate_tables(runs):
    nli, retrieval = runs("nli", 0.5), runs("retrieval", 0.3, "task=xflickrco")
    text = shown(nli, retrieval, runs("retrieval2", 0.3, "task=xflickrco", "epochs=3"))
    assert "en, accuracy" in table(text)[0]
    rows = table(text, 1)
    assert len(rows) == 2 and "en, mean recall" in rows[0] and "range of languages, R@1" in rows[0]
    assert "mean of the targets, mean recall" in rows[0] and not [
        head for head in rows[0] if "accuracy" in head
    ]


def test_compare_untrained_model_is_named_as_it_is(runs, tmp_path):
    english = runs("en", 0.5, "strategies.layer_decay={}")
    export = str(tmp_path / "export")
    for setting, model, name in (
        ("untrained", export, "as it is"),
        ("translate_test", export, "as it is"),
        ("translate_test", english, "layer decay (factor 0.88)"),
        ("untrained", english, "as it is, after layer decay (factor 0.88)"),
        ("few_shot", english, "full fine-tuning"),
        ("zero_shot", export, "full fine-tuning"),
    ):
        config = FinetuneConfig(task="xvnli", model=str(model), setting=setting)
        assert method_of(config) == name
        assert setting not in ("untrained", "translate_test") or config.display_name == "as it is"
    frozen = FinetuneConfig(task="xvnli", setting="untrained", freeze=("embeddings", "text", "vision"))
    assert frozen.display_name == "as it is"
    prompted = override(frozen, ['strategies.hard_prompt.words="a photo of"'])
    assert prompted.display_name.startswith("as it is + hard prompt")
    rows = table(
        shown(
            runs("plain", 0.5),
            runs("raw", 0.4, "setting=untrained"),
            runs("stopped", 0.3, steps=3, finished=False),
            runs("none", 0.2, steps=0),
        )
    )
    assert [row["method"] for row in rows] == [
        "full fine-tuning",
        "as it is",
        "full fine-tuning (stopped at step 3)",
        "as it is (no step recorded)",
    ]
    assert [row["trained, % of parameters"] for row in rows] == ["90.00", "", "90.00", ""]
    assert rows[1]["seeds"] == "none (nothing trained)"


def test_compare_untrained_model_is_compared_with_every_seed(runs):
    raw = runs("raw", 0.4, "setting=untrained")
    tuned = [runs(f"t{seed}", 0.5 + seed / 100, f"fit.seed={seed}") for seed in (0, 1, 2)]
    half = T[3] * 0.01 / 3**0.5
    for folders, sign in (([raw, *tuned], "+"), ([*tuned, raw], "-")):
        (row,) = table(shown(*folders), 1)
        assert row["seeds in common"] == "3" and row["en, accuracy"] == f"{sign}11.0 ± {100 * half:.1f}"


def test_compare_writes_files_for_papers_and_programs(runs, tmp_path, capsys):
    folders = [runs(f"a{seed}", 0.5 + seed / 50, f"fit.seed={seed}") for seed in (0, 1, 2)]
    folders += [
        runs(f"b{seed}", 0.6, f"fit.seed={seed}", 'strategies.hard_prompt.words="50 % _of_ R&D | #1"')
        for seed in (0, 1)
    ]
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "latex")}
    arguments = [*map(str, folders), "--csv", str(files["csv"]), "--latex", str(files["latex"])]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr().out
    assert r"50 % _of_ R&D \| #1" in printed
    lines = {(line["method"], line["score"]): line for line in csv.DictReader(files["csv"].open())}
    line = lines["full fine-tuning", "en, accuracy"]
    half = T[3] * statistics.stdev([0.5, 0.52, 0.54]) / 3**0.5
    assert float(line["mean"]) == pytest.approx(0.52) and line["seeds"] == "3" and line["difference"] == ""
    assert [float(line[end]) for end in ("low", "high")] == pytest.approx(
        [0.52 - half, 0.52 + half], abs=1e-6
    )
    (other,) = (
        line for (method, score), line in lines.items() if "prompt" in method and score == "en, accuracy"
    )
    assert float(other["difference"]) == pytest.approx(0.09) and other["seeds in common"] == "2"
    assert other["difference low"] and other["runs"] == f"{folders[3]} {folders[4]}"
    text = files["latex"].read_text()
    assert (
        r"50 \% \_of\_ R\&D \textbar{} \#1" in text
        and text.count(r"\begin{tabular}") == text.count(r"\end{table}") == 2
    )
    for columns, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.S):
        rows = [row for row in body.splitlines() if row.endswith(r"\\")]
        assert len(rows) > 1 and all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert "±" not in text


def test_compare_latex_escapes_special_characters():
    assert escape_latex(r"a\b{c}_$&%#~^<>|") == (
        r"a\textbackslash{}b\{c\}\_\$\&\%\#\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"
    )
    assert escape_latex("-1.2 ± 3") == r"$-$1.2 $\pm$ 3" and escape_latex("zero-shot") == "zero-shot"


def test_compare_run_with_every_step_skipped_is_untrained(runs):
    """Fewer than `fit.max_skipped` in a row end no run, and so a short one may finish without a step."""
    rows = table(shown(runs("plain", 0.5, skipped_steps=7), runs("skipped", 0.3, skipped_steps=8)))
    assert [row["method"] for row in rows] == ["full fine-tuning", "as it is (all 8 steps skipped)"]
    assert [row["trained, % of parameters"] for row in rows] == ["90.00", ""]


def test_compare_runs_with_other_data_or_code_are_reported(runs):
    """The same settings, and so one row: neither the content of a file nor the code is among them."""
    codes = ("abc source 1", "abc source 1", "abc source 2")
    folders = [runs(f"s{seed}", 0.5, f"fit.seed={seed}", code=code) for seed, code in enumerate(codes)]
    folders.append(runs("old", 0.5, "fit.seed=3"))  # of a version that recorded neither
    for folder, content in zip(folders[:3], ("a", "b", "a"), strict=True):
        entry = {"stamp": content, "bytes": 9, "sha256": content}
        record = {
            "code": [],
            "data": {"/data/test.jsonl": entry, f"/runs/{folder.name}/model.safetensors": entry},
        }
        (folder / "identity.json").write_text(json.dumps(record))
    (comparison,), lines = compare_runs(folders)
    assert len(comparison.rows) == 1 and lines == [
        f"{folders[1]} and {folders[0]} were made from different data: /data/test.jsonl (other content)",
        f"xvnli: runs made by 2 versions of the code: abc source 1 (2, such as {folders[0]}); "
        f"abc source 2 (1, such as {folders[2]})",
    ]


def test_compare_scores_over_other_languages_are_not_subtracted(runs):
    """A mean over one target, and the spread of a single language, which is none."""
    every = runs("every", 0.5)
    figures = {"mean_targets": 0.3, "gap": None, "disparity": {"std": 0.0, "range": 0.0}}
    text = shown(every, runs("one", 0.5, 'languages=["ru"]', accuracy={"ru": 0.3}, **figures))
    first, second = table(text)
    assert second["mean of the targets, accuracy"] == "30.0" and first["std of languages, accuracy"] == "15.0"
    assert second["std of languages, accuracy"] == second["range of languages, accuracy"] == ""
    (row,) = table(text, 1)
    assert row["ru, accuracy"] == "+10.0" and {
        row[head] for head in row if "of" in head and "accuracy" in head
    } == {""}


def test_compare_scores_over_the_same_languages_in_another_order_are_subtracted(runs):
    """And those of a run that was tested in a language more, held out of pretraining, but not those of one
    without English, of which its spread is not."""
    every = runs("every", 0.5)
    scores = {"ru": 0.3, "de": 0.5, "en": 0.6}
    other = runs("other", 0.6, "optim.lr=1e-6", accuracy=scores)
    more = runs("more", 0.6, "optim.lr=1e-3", accuracy={**scores, "sw": 0.1}, held_out_languages=["sw"])
    lone = runs("lone", 0.6, "optim.lr=1e-5", accuracy={"de": 0.5, "ru": 0.3})
    rows = table(shown(every, other, more, lone), 1)
    assert [row["mean of the targets, accuracy"] for row in rows] == ["+10.0", "+10.0", ""]
    assert [row["std of languages, accuracy"] for row in rows] == ["0.0", "0.0", ""]


def test_compare_folder_without_result_is_one_line_error(runs, tmp_path, capsys):
    run = runs("run", 0.5)
    for name, content, words in (
        ("list", "[1]", "not to be read as the result of a run (list in place of an object); give"),
        ("pretraining", '{"run": "p", "steps": 8}', "no result of fine-tuning"),
    ):
        other = runs(name, 0.5)
        (other / "result.json").write_text(content)
        assert main(["compare", str(run), str(other)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {other}/result.json: {words}") and error.count("\n") == 1


def test_compare_wrong_arguments_are_one_line_errors(runs, tmp_path, capsys):
    run, bare = runs("run", 0.5), runs("bare", 0.5)
    (bare / "config.json").unlink()
    for arguments, words in (
        ([run, tmp_path / "nothing"], "nothing/result.json: no such file; give finished runs"),
        ([run, bare], f"{bare}/config.json: no settings of a run"),
        ([run, "--baseline", tmp_path / "rum"], "not among the runs that are compared; did you mean"),
        ([run, "--csv", tmp_path / "no" / "file"], "not written (No such file or directory)"),
        ([run, "--latex", tmp_path], "not written (Is a directory)"),
    ):
        assert main(["compare", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
