"""Recipes against the papers' hyper-parameters, which are data (tests/data/published): a setting is as
published, or a deviation that the recipe names with its reason."""

import csv
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

from finetune.__main__ import main as finetune
from finetune.recipes import RECIPES as FINETUNE
from pretrain.__main__ import main as pretrain
from pretrain.recipes import RECIPES as PRETRAIN
from raylib.config import is_setting, override
from raylib.settings import deviates, same_value, setting_value, update_deviations

FOLDER = Path(__file__).parent / "data" / "published"
OURS = ("tiny", "emoji_e5", "small", "scenes_", "transfer_")  # beginnings of recipes that no paper has
RECIPES = {name: recipe for name, recipe in {**PRETRAIN, **FINETUNE}.items() if not name.startswith(OURS)}
OPTIMIZER = tuple(
    f"optim.{name}" for name in ("lr", "warmup", "decay", "weight_decay", "betas", "eps", "clip")
)
# settings that each recipe which trains has a record of, and be it that nothing is said
PRETRAINED = (
    *OPTIMIZER,
    "fit.steps",
    *(
        f"data.{stream}.{name}"
        for stream in ("image_text", "parallel", "text")
        for name in ("batch", "length")
    ),
    *(f"data.{stream}.alpha" for stream in ("parallel", "text")),
    "data.mask_probability",
    *(f"model.{name}" for name in ("width", "heads", "feedforward", "text_layers", "fusion_layers")),
    *(
        f"model.{name}"
        for name in ("vision_layers", "image_size", "patch", "dropout", "embedding", "temperature")
    ),
)
FINETUNED = (
    *OPTIMIZER,
    *("batch", "last_batch", "epochs", "length", "head_dropout", "loss", "freeze", "augment", "select"),
)


class Record(NamedTuple):
    recipes: str
    setting: str
    value: str
    by: str
    where: str

    def matches(self, name: str) -> bool:
        patterns = self.recipes.split()
        kept = [pattern for pattern in patterns if not pattern.startswith("!")]
        return any(fnmatchcase(name, pattern) for pattern in kept) and not any(
            fnmatchcase(name, pattern[1:]) for pattern in patterns if pattern.startswith("!")
        )


def read_records() -> list[Record]:
    records = []
    for file in sorted(FOLDER.glob("*.tsv")):
        header, *rows = csv.reader(file.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
        assert tuple(header) == Record._fields, file
        for line, row in enumerate(rows, 2):
            assert len(row) == len(header) and all(row[i] for i in (0, 1, 3, 4)), f"{file.name}:{line}: {row}"
            records.append(Record(*row))
    return records


RECORDS = read_records()


def find_problems(name, config, records):
    """Say what is wrong between a recipe's config and the records, a line each."""
    problems, published = [], {}
    values, deviations = config.model_dump(mode="json"), dict(config.deviations)
    for record in (r for r in records if r.matches(name)):
        if not is_setting(type(config), record.setting):
            problems.append(f"{record.setting}: no such setting ({record.where})")
        elif (record.setting, record.by) in published:
            problems.append(f"{record.setting}: two records of the {record.by}")
        else:
            published[record.setting, record.by] = record
    if getattr(config, "trains", True):
        required = PRETRAINED if name in PRETRAIN else FINETUNED
        known = {part for setting, _ in published for part in (setting, setting.partition(".")[0])}
        missing = set(required) - known
        problems += [f"{setting}: no record" for setting in sorted(missing)]
    for setting in dict.fromkeys(setting for setting, _ in published):
        record = published.get((setting, "paper")) or published.get((setting, "code"))
        if record is None:
            continue
        ours, theirs = setting_value(values, setting), json.loads(record.value)
        entry = deviations.pop(setting, None)
        if entry is None and not same_value(ours, theirs):
            problems.append(f"{setting}: {ours!r}, {record.by} {theirs!r} ({record.where}): mend or name it")
        elif entry and same_value(ours, theirs):
            problems.append(f"{setting}: {ours!r} does not deviate, but is named")
        elif entry and entry["published"] != theirs:
            problems.append(f"{setting}: named against {entry['published']!r}, {record.by} {theirs!r}")
        elif entry and not entry["reason"].strip():
            problems.append(f"{setting}: named without a reason")
    return problems + [f"{setting}: named, but no record says what is published" for setting in deviations]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_published_settings_or_names_its_deviations(name):
    problems = find_problems(name, RECIPES[name](), RECORDS)
    assert not problems, "\n".join([name, *problems])


def test_objective_that_follows_code_has_its_values():
    """`objective.follow=code` sets everything in which the public code is known to differ from paper 2."""
    values = override(PRETRAIN["base"](), ["objective.follow=code"]).model_dump(mode="json")
    for record in RECORDS:
        if record.by == "code" and record.matches("base"):
            assert same_value(setting_value(values, record.setting), json.loads(record.value)), record


def test_records_are_of_recipes():
    """A pattern that no recipe has is a typing error, or of one that was renamed."""
    for record in RECORDS:
        assert record.by in ("paper", "code", "unsaid"), record
        assert (record.by == "unsaid") == (record.value == ""), record
        for pattern in record.recipes.split():
            assert any(fnmatchcase(name, pattern.removeprefix("!")) for name in RECIPES), record


def test_problems_are_found():
    """The comparison itself: each of its complaints, one change away from a recipe that has none."""
    config = FINETUNE["p2_xvnli"]()
    config = config.model_copy(update={"deviations": {}})
    values = config.model_dump(mode="json")
    records = [Record("p2_*", s, json.dumps(setting_value(values, s)), "paper", "table 7") for s in FINETUNED]
    assert find_problems("p2_xvnli", config, records) == []
    assert find_problems("p0_uc2_baseline", config, records) != []  # no record is of this one
    assert "optim.clip: no record" in find_problems(
        "p2_xvnli", config, [r for r in records if r.setting != "optim.clip"]
    )
    (unknown,) = find_problems(
        "p2_xvnli", config, [*records, Record("p2_*", "optim.rate", "1", "paper", "x")]
    )
    assert "no such setting" in unknown
    (twice,) = find_problems("p2_xvnli", config, [*records, records[0]])
    assert "two records" in twice

    other = override(config, ["optim.clip=3"])
    (unnamed,) = find_problems("p2_xvnli", other, records)
    assert "optim.clip: 3.0, paper 1.0" in unnamed

    def named(config, published, reason="why"):
        entry = {"optim.clip": deviates(published, reason)}
        return find_problems("p2_xvnli", config.model_copy(update={"deviations": entry}), records)

    assert named(other, 1.0) == []
    assert "does not deviate" in named(config, 1.0)[0]
    assert "named against 2.0" in named(other, 2.0)[0]
    assert "without a reason" in named(other, 1.0, " ")[0]
    foreign = config.model_copy(update={"deviations": {"seed": deviates(1, "why")}})
    assert "no record says" in find_problems("p2_xvnli", foreign, records)[0]

    # the code's value counts where the paper is silent
    code = [*(r for r in records if r.setting != "optim.clip"), records[6]._replace(by="code", value="3.0")]
    assert find_problems("p2_xvnli", other, code) == [] != find_problems("p2_xvnli", config, code)
    assert find_problems("p2_xvnli", config, [*records, code[-1]]) == []


def test_print_config_shows_deviations(capsys, monkeypatch):
    """Each with the value here, the paper's and the reason; one that the command line ends is gone."""
    config = FINETUNE["p2_xvnli"]()
    entries = {"batch": deviates(8, "memory"), "epochs": deviates(3, "a trial")}
    monkeypatch.setitem(FINETUNE, "p2_xvnli", lambda: config.model_copy(update={"deviations": entries}))
    assert finetune(["p2_xvnli", "--print-config", "epochs=3"]) == 0
    shown = json.loads(capsys.readouterr().out)["deviations"]
    assert shown == {"batch": {"ours": config.batch, "published": 8, "reason": "memory"}}
    for main, recipes in ((pretrain, PRETRAIN), (finetune, FINETUNE)):
        for name, recipe in recipes.items():
            if not (deviations := recipe().deviations):
                continue
            assert main([name, "--print-config"]) == 0
            shown = json.loads(capsys.readouterr().out)
            assert shown["deviations"] == {
                path: {"ours": setting_value(shown, path), **entry} for path, entry in deviations.items()
            }


def test_update_deviations_drops_what_has_ended():
    entries = {"optim.lr": deviates({"one_of": [1e-4, 3e-4]}, "why"), "batch": deviates(8, "why")}
    config = override(FINETUNE["p2_xvnli"]().model_copy(update={"deviations": entries}), ["batch=16"])
    assert update_deviations(config).deviations["batch"] == {"ours": 16, "published": 8, "reason": "why"}
    assert update_deviations(override(config, ["batch=8"])).deviations.keys() == {"optim.lr"}
    assert update_deviations(override(config, ["optim.lr=3e-4"])).deviations.keys() == {"batch"}
