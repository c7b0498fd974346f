import importlib

import pytest
from pydantic import model_validator

from finetune.config import FinetuneConfig
from pretrain.recipes import RECIPES as PRETRAINING
from raylib.config import (
    Config,
    differing_paths,
    dump_config,
    load_config,
    load_user_class,
    load_user_file,
    lookup,
    override,
    read_stored_settings,
    setting_paths,
    validate,
)
from raylib.errors import UserError
from raylib.strict_yaml import parse_yaml


class Inner(Config):
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


class Outer(Config):
    inner: Inner = Inner()
    name: str = "x"
    limit: int | None = None


def test_override_sets_values_by_dotted_path():
    config = override(Outer(), ["inner.rate=1e-3", "name=3d", "limit=4", "inner.sizes=[5]"])
    assert config == Outer(inner=Inner(rate=1e-3, sizes=(5,)), name="3d", limit=4)
    assert override(config, ["limit=null"]).limit is None


class Lists(Config):
    languages: tuple[str, ...] = ()
    betas: tuple[float, float] | None = None
    layers: tuple[int, ...] = ()
    words: str = ""
    shots: int | str = 5


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("languages=de,ja", ("de", "ja")),
        ("languages=de", ("de",)),
        ("languages=", ()),
        ('languages=["de", "ja"]', ("de", "ja")),
        ("betas=0.9, 0.98", (0.9, 0.98)),
        ("betas=null", None),
        ("layers=3", (3,)),
        ("layers=1,2", (1, 2)),
        ("words=a photo, of", "a photo, of"),
        ("shots=5,10", "5,10"),
    ],
)
def test_override_lists_may_be_written_without_brackets(assignment, value):
    config = override(Lists(), [assignment])
    assert getattr(config, assignment.partition("=")[0]) == value


def test_override_value_of_a_part_says_how_its_settings_are_given():
    with pytest.raises(UserError, match=r"inner: it has settings of its own; give these"):
        override(Outer(), ["inner=true"])
    assert override(Outer(inner=Inner(rate=1)), ["inner={}"]).inner == Inner()


@pytest.mark.parametrize(
    ("assignment", "words"),
    [("layers=1,b", ["layers.1", "integer", "'b'"]), ("languages=true", ["languages", "tuple", "True"])],
)
def test_override_bad_lists_are_one_line(assignment, words):
    with pytest.raises(UserError) as e:
        override(Lists(), [assignment])
    assert all(word in str(e.value) for word in words)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("inner.rte=1", ["unknown setting 'inner.rte'", "inner.rate"]),
        ("rate=1", ["unknown setting 'rate'", "inner.rate"]),
        ("inner.rate=fast", ["inner.rate", "number", "'fast'"]),
        ("inner.rate", ["path=value"]),
        ("inner.rate.x=1", ["unknown setting"]),
    ],
)
def test_override_wrong_assignment_is_one_line_error(assignment, words):
    with pytest.raises(UserError) as e:
        override(Outer(), [assignment])
    assert all(word in str(e.value) for word in words)
    assert "\n" not in str(e.value)


def test_config_files_round_trip_and_report_mistakes(tmp_path):
    config = Outer(limit=7)
    (tmp_path / "c.json").write_text(dump_config(config), encoding="utf-8")
    assert load_config(Outer, tmp_path / "c.json") == config
    assert '"limit": 7' in dump_config(config)
    assert setting_paths(type(config)) == ["inner", "inner.rate", "inner.sizes", "name", "limit"]
    (tmp_path / "bad.json").write_text('{"nme": 1}')
    with pytest.raises(UserError, match=r"bad\.json: unknown setting 'nme'; did you mean name"):
        load_config(Outer, tmp_path / "bad.json")
    (tmp_path / "torn.json").write_text('{"na')
    with pytest.raises(UserError, match=r"not to be read as a JSON config file \(Unterminated"):
        load_config(Outer, tmp_path / "torn.json")
    with pytest.raises(UserError, match="no such config file"):
        load_config(Outer, tmp_path / "none.json")


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
MERGES = "- &a0 {x: 1}\n" + "".join(f"- &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(9))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"- a", "it has no settings"),
        (b"limit: 1\nlimit: 2", "line 2, column 1: 'limit' twice in one mapping"),
        (b"limit: 1\n\tname: a", "line 2, column 1: found character '\\t'"),
        (b"limit: 1\nname: 'a", "line 2, column 9: found unexpected end"),
        (b"name: \xe9", "unexpected end of data at 6"),
        (b"name: !!python/object/apply:os.system ['exit 3']", "line 1, column 7: could not determine a"),
        (b"name: !!python/name:os.system", "line 1, column 7: could not determine a"),
        (b"name: !!binary aGVsbG8=", "'name' is a bytes; put it in quotes"),
        (b"name: 2020-01-01", "'name' is a date; put it in quotes"),
        (b"on: 1", "the name True in the file is no string"),
        (b"name: &a [*a]", "an alias of what"),
        (BOMB.encode(), "its aliases expand to more than 100,000 values"),
        (MERGES.encode(), "it has no settings"),
        (b"[" * 10_000, "nested deeper than 100"),
        (b"name: " + b"[" * 200 + b"]" * 200, "nested deeper than 100"),
        (b"limit: " + b"9" * 10_000, "line 1, column 8: a number of 10,000 characters"),
        (b"limit: " + b"1:" * 9_000 + b"1", "line 1, column 8: a number of"),
        (b"limit: .inf", "'limit' is not finite"),
        (b'name: "\\ud800"', "half of a surrogate pair in 'name'"),
        (b"#" + b"a" * (1 << 20), "1,048,577 bytes, of which 1,048,576 may be"),
        (b"--- {limit: 1}\n--- {limit: 2}", "line 2, column 1: but found another document"),
        (b"name: \0", "special characters are not allowed at 6"),
        (b"PK\3\4rest", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git-lfs pointer"),
    ],
)
def test_config_yaml_that_is_damaged_or_hostile_is_a_line(content, reason, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError) as found:
        load_config(Outer, tmp_path / "c.yaml")
    line = str(found.value)
    assert line.startswith(f"{tmp_path}/c.yaml: not to be read as a YAML config file ({reason}")
    assert line.isprintable()


def test_config_yaml_may_have_aliases_merges_and_a_byte_order_mark(tmp_path):
    text = "inner: &i {rate: 0.5}\nname: é\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "c.yml").write_bytes(text.encode(encoding))
        assert load_config(Outer, tmp_path / "c.yml").name == "é"
    assert parse_yaml(b"a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\ne: *a") == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 3, "c": 2},
        "e": {"b": 1, "c": 2},
    }


def test_config_in_place_of_which_a_folder_lies_is_a_line(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: a folder, where a file is needed"):
        load_config(Outer, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a = (", ":1: SyntaxError: '(' was never closed"),
        (b"a = 1\n\tb = 2", ":2: IndentationError: unexpected indent"),
        (b"a = '\xe9'", ":1: SyntaxError: (unicode error) 'utf-8' codec can't decode"),
        (b"a = 1\nraise RuntimeError('two\\nlines')", ":2: RuntimeError: two lines"),
        (b"import sys\nsys.exit()", ":2: SystemExit"),
        (b"def f():\n    f()\nf()", ":2: RecursionError: maximum recursion depth exceeded"),
        (b"a = 1\0", "source code string cannot contain null bytes"),
        (b"(" * 300, ":1: SyntaxError: too many nested parentheses"),
        (b"\x1f\x8b\x08\0rest", "not to be read as a Python file (a gzip file); give"),
        (b"\0" * 100, "not to be read as a Python file (zeros: an unfinished download, or copy); download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git-lfs pointer, not the file"),
        (b"<!DOCTYPE html>\n<html>", "a web page, such as a server sends in place of a file"),
    ],
)
def test_users_file_that_does_not_run_is_a_line(content, said, tmp_path):
    path = tmp_path / "task.py"
    path.write_bytes(content)
    with pytest.raises(UserError) as found:
        load_user_file(path)
    line = str(found.value)
    assert line.startswith(str(path)) and said in line and "None" not in line
    assert "\n" not in line


def test_a_missing_setting_is_named_without_all_the_others(tmp_path):
    (tmp_path / "config.json").write_text('{"runs": "x", "workers": 2}')
    with pytest.raises(UserError, match=r"config.json: no setting 'task'; give one, or a run .* command's$"):
        load_config(FinetuneConfig, tmp_path / "config.json")


def test_registry_lookup_suggests_near_names():
    assert lookup("a", {"a": 1}, "thing") == 1
    with pytest.raises(UserError, match="unknown thing 'tny'; did you mean tiny"):
        lookup("tny", {"tiny": 1, "base": 2}, "thing")


def test_read_stored_settings_fills_in_defaults_and_keeps_unknown_settings():
    stored = read_stored_settings(Outer, {"name": "y", "inner": {"rate": 0.2, "gone": {"deep": 1}}})
    assert stored.config == Outer(name="y", inner=Inner(rate=0.2))
    assert stored.unknown == ("inner.gone",)
    inner = {"rate": 0.2, "sizes": [1, 2], "gone": {"deep": 1}}
    assert stored.values == {"name": "y", "inner": inner, "limit": None}
    assert differing_paths(stored.values, Outer().model_dump(mode="json")) == [
        "inner.gone",
        "inner.rate",
        "name",
    ]


def test_read_stored_settings_leaves_what_is_no_config_as_it_was_stored():
    class Whole(Outer):
        @model_validator(mode="after")
        def _check(self):
            raise ValueError("never")

    stored = read_stored_settings(Whole, {"name": "y"})
    assert (stored.values, stored.config) == ({"name": "y"}, None) and "never" in stored.problem


def test_build_error_names_where_the_value_came_from():
    with pytest.raises(UserError, match="here: limit: .*integer"):
        validate(Outer, {"limit": "many"}, "here")


USER_FILE = """from abc import ABC, abstractmethod
from raylib.config import Config
class Shape(Config, ABC):
    @abstractmethod
    def area(self): ...
class Square(Shape):
    side: int = 1
    def area(self): return self.side**2
"""


def test_load_user_class_finds_the_one_class(tmp_path):
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "shape.py").write_text(USER_FILE)
    found = load_user_class(tmp_path / "shape.py", Config)
    assert found.__name__ == "Square" and found(side=3).area() == 9
    assert load_user_class(tmp_path / "a/shape.py", Config) is found  # a copy is the same class
    assert load_user_class(tmp_path / "shape.py", Config, "Square") is found


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, None, "shape.py: no such file"),
        ("x = 1", None, "shape.py: no class derived from Config"),
        (USER_FILE, "Cube", "shape.py: no class Cube derived from Config; it has: Shape, Square"),
        (USER_FILE, "Shape", "shape.py: Shape has no area"),
        (
            USER_FILE + "class B(Config): ...",
            None,
            r"several classes \(Square, B\) .*say which: .*shape.py:Square",
        ),
        ("\nimport nowhere_at_all", None, "shape.py:2: ModuleNotFoundError: No module named"),
        ("\n\nx = (", None, r"shape.py:3: SyntaxError: '\(' was never closed"),
    ],
)
def test_load_user_class_says_in_one_line_what_is_wrong(tmp_path, source, name, message):
    path = tmp_path / "shape.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError, match=message) as e:
        load_user_class(path, Config, name)
    assert "\n" not in str(e.value)


NAME, URL = "give the name of one folder: ", "a path of this machine, no URL: "


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        *((f"name={name}", NAME) for name in ("..", ".", "", "a/b", "/a", "a\nb", "a\0b", "a b", "ä" * 101)),
        *((f"{path}=s3://bucket/a", URL) for path in ("runs", "corpus", "init.model", "data.tokenizer")),
        *((f"{path}=hf://a/b", URL) for path in ("data.retrieval", "data.dev", "data.cache", "init.vision")),
        ("corpus=s3:/bucket", URL),
        ("runs=a\0b", "no path has a NUL character"),
    ],
)
def test_override_refuses_names_and_paths_that_are_none(assignment, words):
    with pytest.raises(UserError) as caught:
        override(PRETRAINING["tiny"](), [assignment])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_override_takes_urls_where_they_are_read_and_names_of_any_alphabet():
    config = override(
        PRETRAINING["tiny"](), ["data.text.folder=s3://bucket/a", "name=пример.2_a-b", "runs=C:/a"]
    )
    assert config.data.text.folder == "s3://bucket/a" and config.name == "пример.2_a-b"


@pytest.mark.parametrize("path", ["model", "data", "images", "regions", "wordnet", "runs"])
def test_override_refuses_urls_in_paths_of_fine_tuning(path):
    from finetune.recipes import RECIPES

    with pytest.raises(UserError, match=URL):
        override(RECIPES["scenes_xvnli"](), [f"{path}=gs://bucket/a"])


def test_override_refuses_languages_that_are_no_names():
    from finetune.recipes import RECIPES

    with pytest.raises(UserError, match=NAME):
        override(RECIPES["scenes_xvnli"](), ["languages=../ru"])


def test_override_refuses_names_of_searches_that_are_none():
    from raylib.search.config import SearchConfig

    assert override(SearchConfig(recipe="a"), ["name="]).name == ""
    for assignment, words in (("name=..", NAME), ("runs=s3://a", URL), ("warm_start=s3://a", URL)):
        with pytest.raises(UserError, match=words):
            override(SearchConfig(recipe="a"), [assignment])


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "evaluate", "s3://a/model", "data"],
        ["pretrain", "export", "model", "s3://a/out"],
        ["finetune", "evaluate", "hf://a/b"],
        ["raylib.api.predict", "hf://a/b", "--texts", "a.txt"],
        ["pretrain.corpora", "s3://a", "--tokenizer", "t"],
        ["raylib.data.shards", "https://a/b", "text"],
    ],
)
def test_command_refuses_urls_in_paths(arguments, tmp_path, monkeypatch, capsys):
    module, *rest = arguments
    package = module if "." in module else f"{module}.__main__"
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(package).main(rest) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    err = capsys.readouterr().err
    assert URL in err and err.count("\n") == 1


def test_config_with_a_dict_among_its_settings_is_hashable():
    """Tasks remember their answers by the run's config (`Classification.label_names`)."""
    from finetune.recipes import RECIPES

    config = RECIPES["p2_xvnli"]()
    named = config.model_copy(update={"deviations": {"batch": {"ours": 8}}})
    assert hash(named) == hash(named.model_copy()) != hash(config)
