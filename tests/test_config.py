import pytest

from raylib.config import Config, build, choose, dump, load, override, paths, save
from raylib.errors import UserError


class Inner(Config):
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


class Outer(Config):
    inner: Inner = Inner()
    name: str = "x"
    limit: int | None = None


def test_override_by_dotted_path():
    config = override(Outer(), ["inner.rate=1e-3", "name=3d", "limit=4", "inner.sizes=[5]"])
    assert config == Outer(inner=Inner(rate=1e-3, sizes=(5,)), name="3d", limit=4)
    assert override(config, ["limit=null"]).limit is None


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
def test_mistakes_are_one_line(assignment, words):
    with pytest.raises(UserError) as e:
        override(Outer(), [assignment])
    assert all(word in str(e.value) for word in words)
    assert "\n" not in str(e.value)


def test_files(tmp_path):
    config = Outer(limit=7)
    save(config, tmp_path / "c.json")
    assert load(Outer, tmp_path / "c.json") == config
    assert '"limit": 7' in dump(config)
    assert paths(type(config)) == ["inner", "inner.rate", "inner.sizes", "name", "limit"]
    (tmp_path / "bad.json").write_text('{"nme": 1}')
    with pytest.raises(UserError, match=r"bad\.json: unknown setting 'nme'; did you mean name"):
        load(Outer, tmp_path / "bad.json")
    (tmp_path / "torn.json").write_text('{"na')
    with pytest.raises(UserError, match="not a JSON config file"):
        load(Outer, tmp_path / "torn.json")
    with pytest.raises(UserError, match="no such config file"):
        load(Outer, tmp_path / "none.json")


def test_choose():
    assert choose("a", {"a": 1}, "thing") == 1
    with pytest.raises(UserError, match="unknown thing 'tny'; did you mean tiny"):
        choose("tny", {"tiny": 1, "base": 2}, "thing")


def test_build_names_the_place():
    with pytest.raises(UserError, match="here: limit: .*integer"):
        build(Outer, {"limit": "many"}, "here")
