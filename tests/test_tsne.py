"""Words and regions in one image: where objects stand, their states and what is near what, against slow
references."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from finetune.__main__ import main
from finetune.analysis import FinishedRun, Options, load_finished_run, words_and_regions
from finetune.analysis.parallel import Inapplicable, Mention, Parallel, SceneObject, read_parallel
from finetune.analysis.tsne import (
    Point,
    box_weights,
    collect_states,
    find_boxes,
    find_patches,
    find_regions,
    nearest_region_shares,
    project,
    select_mentions,
)
from finetune.batches import encode_tagged, encode_texts
from finetune.formats import Example
from finetune.recipes import RECIPES
from finetune.stores import Regions
from finetune.stores.images import RegionFeatures, open_visual
from raylib.config import override
from raylib.models.attention import BucketPlan
from raylib.models.dual_encoder import MClip
from raylib.models.finetuned import FinetuneModel
from raylib.models.oscar import TINY, Oscar
from raylib.models.single_stream import M3P, UC2, MUniter, SingleStream
from raylib.packed import Ragged
from raylib.sample import DATA
from raylib.text import Tokenizer
from tests.factories import make_model

CODES = ("en", "de")
TEXTS = [
    ("Is there a dog?", "Gibt es einen Hund?"),
    ("cat", "Katze"),
    ("Is the dog brown?", "Ist der Hund braun?"),
]
WORDS = [{"en": "dog", "de": "Hund"}, {"en": "cat", "de": "Katze"}, {"en": "dog", "de": "Hund"}]
TAGS = ["dog", "cat"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DATA)


class Drawings:
    """Random images by name."""

    def read(self, names, draws=None):
        every = torch.randint(
            0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        return {"images": every[[int(name) for name in names]]}


class Store:
    """Random regions by name, of different number."""

    def __init__(self, tags=()):
        self.tags = tags

    def read(self, name):
        n = 2 + int(name)
        draw = np.random.default_rng(n)
        boxes = np.concatenate([draw.uniform(0, 30, (n, 2)), draw.uniform(31, 64, (n, 2))], 1)
        return Regions(draw.normal(size=(n, 6)).astype(np.float32), boxes, 64, 64, tuple(self.tags))


def blocks_of(encoder, row):
    """A row (n, d) through blocks, one after the other."""
    for block in encoder.blocks:
        row = block(row, BucketPlan([(1, len(row), len(row))], None, None))
    return row


def slow_cross(model, text, image, weights):
    """Return what is added to a word that has one thing to look at, which is so its whole attention: the
    first word here."""
    unified = model.backbone.fused_states(text, image).values
    attention = model.backbone.fusion.blocks[-1].cross_attention
    region = (torch.from_numpy(weights).float()[:, None] * image.values).sum(0, keepdim=True)
    added = attention(
        torch.randn(1, region.shape[1]), attention.key_value(region), BucketPlan([(1, 1, 1)], None, None)
    )
    return unified, added[0]


def slow_row(model, text, image, weights):
    """Text and image as one row, by hand."""
    backbone = model.backbone
    if isinstance(backbone, Oscar):
        states, places = backbone.hidden_states(text, image, [backbone.num_layers])
        words, regions = (states[0].values[part.values] for part in (places.text, places.regions))
    elif isinstance(backbone, SingleStream):
        words, regions = backbone.encode_text(text), image.values
        numbers = len(words), len(regions)
        row = torch.cat([regions, words] if backbone.config.first == "regions" else [words, regions])
        if backbone.config.number_regions:
            row = backbone.embedding.add_positions(Ragged(row, torch.tensor([len(row)])))
        row = blocks_of(backbone.encoder, row)
        words, regions = (
            row.split(numbers) if backbone.config.first == "text" else reversed(row.split(numbers[::-1]))
        )
        regions = regions[1:] if backbone.config.whole_image else regions
    else:
        words = backbone.encode_text(text)
        words, regions = blocks_of(backbone.fusion, torch.cat([words, image.values])).split(
            [len(words), len(image.values)]
        )
    return words, sum(share * state for share, state in zip(weights.tolist(), regions, strict=True))


BACKBONES = {
    "unified": (lambda: make_model(vocabulary=12000, positions=64), slow_cross),
    "unified on regions": (lambda: make_model(vocabulary=12000, positions=64), slow_cross),
    "entangled": (lambda: make_model(vocabulary=12000, positions=64, fusion="entangled"), slow_row),
    **{kind.kind: (lambda kind=kind: kind(kind.sizes["tiny"]), slow_row) for kind in (UC2, M3P, MUniter)},
    "oscar": (lambda: Oscar(TINY), slow_row),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_tsne_states_equal_slow_reference(tokenizer, name):
    """One text and one image at a time, by hand."""
    build, slow = BACKBONES[name]
    torch.manual_seed(0)
    backbone = build().float()
    for parameter in backbone.parameters():  # no layer norm or bias that is nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    seen = name in ("unified", "entangled")
    model = FinetuneModel(backbone, ("no", "yes"), 1, 0.0, None if seen else 6).eval()
    images = Drawings() if seen else RegionFeatures(Store(TAGS), has_tags=name == "oscar")
    sizes, draw = {"0": 5 if seen else 2, "1": 5 if seen else 3}, np.random.default_rng(1)
    where = {
        image: {label: draw.dirichlet(np.ones(n)) for label in ("cat", "dog", "tree")}
        for image, n in sizes.items()
    }
    items = [tuple(Example(f"q{i}", (text,), ("0", "1"), {}) for text in row) for i, row in enumerate(TEXTS)]
    mentions = [
        Mention(row, str(i % 2), WORDS[i], SceneObject("cat" if i == 1 else "dog"))
        for i, row in enumerate(items)
    ]
    points, states = collect_states(model, mentions, where, CODES, images, tokenizer, 12)
    got = dict(zip(points, states, strict=True))
    assert len(points) == len(got) == 3 * 2 + 2 * 2 and states.dtype == np.float32
    for i, item in enumerate(mentions):
        for j, code in enumerate(CODES):
            text = encode_texts([TEXTS[i][j]], tokenizer, 12)
            read = images.read([item.image])
            if name == "oscar":
                read |= {"tags": encode_tagged(TEXTS[i][:1], [" ".join(TAGS)], tokenizer, 12)["tags"]}
            pieces = tokenizer.pieces(text.values)
            spoken = item.words[code]
            at = next(
                [k for k in range(a, b)]
                for a in range(1, len(pieces))
                for b in range(a + 1, len(pieces))
                if "".join(pieces[a:b]).strip("▁?") == spoken
            )
            with torch.inference_mode():
                for label in ("cat", "dog"):
                    words, region = slow(model, text, model.memory(read), where[item.image][label])
                    point = Point(item.label, code, f"q{i}", item.image)
                    torch.testing.assert_close(
                        torch.from_numpy(got[point]), words[at].mean(0), atol=1e-5, rtol=1e-4
                    )
                    if i < 2 and code == "en":
                        point = Point(label, "", item.image, item.image)
                        torch.testing.assert_close(torch.from_numpy(got[point]), region, atol=1e-5, rtol=1e-4)


def test_tsne_word_beyond_the_length_is_omitted(tokenizer):
    model = FinetuneModel(make_model(vocabulary=12000, positions=64).float(), ("no",), 1, 0.0).eval()
    row = tuple(Example("q", (f"{n * 'and '}dog",), ("0",), {}) for n in (0, 9))
    item = Mention(row, "0", dict.fromkeys(CODES, "dog"), SceneObject("dog"))
    points, _ = collect_states(model, [item], {"0": {"dog": np.eye(5)[2]}}, CODES, Drawings(), tokenizer, 8)
    assert points == [Point("dog", "en", "q", "0"), Point("dog", "", "0", "0")]


@pytest.mark.parametrize(
    ("windows", "changes"), [(0, {}), (4, {"patch": 4, "vision_window": 8})], ids=["whole", "windows"]
)
def test_tsne_boxes_cover_patches_pixel_by_pixel(scenes, windows, changes):
    config = override(RECIPES["scenes_xgqa"](), [f"data={scenes}"])
    backbone, images = make_model(**changes).float(), open_visual(config, 16)
    parallel = read_parallel(config, CODES, 12)
    where = find_boxes(parallel, scenes / "scenes.jsonl", images, backbone)
    truth = {
        r["id"]: r["objects"] for r in map(json.loads, (scenes / "scenes.jsonl").read_text().splitlines())
    }
    assert where.keys() == {row[0].images[0] for row in parallel.items}
    side = 4 if windows else 2  # patches in a row
    raster = [(i, j) for i in range(side) for j in range(side)]
    raster.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2) if windows else ())  # window after window
    for image, found in where.items():
        assert found.keys() == {o["label"] for o in truth[image]}
        for o in truth[image]:
            inside = np.zeros((64, 64))
            inside[o["top"] : o["top"] + o["size"], o["left"] : o["left"] + o["size"]] = 1
            step = 64 // side
            counts = [inside[i * step : (i + 1) * step, j * step : (j + 1) * step].sum() for i, j in raster]
            np.testing.assert_allclose(
                found[o["label"]], np.array([0] * (1 + windows) + counts) / o["size"] ** 2
            )
    cells = find_patches(backbone, torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    assert box_weights(cells, 0, 0, 1)[1 + windows :] == pytest.approx(1 / side**2)


def test_tsne_objects_are_regions_of_that_name():
    row = (Example("a", ("a dog",), ("1",), {}),)
    parallel = Parallel(("en",), [row], 1, {"en": 0})
    found = find_regions(parallel, RegionFeatures(Store(("dog", "sky", "dog"))))["1"]
    assert found["dog"].tolist() == [0.5, 0, 0.5] and found["sky"].tolist() == [0, 1, 0]
    own = parallel._replace(items=[(row[0]._replace(tags=("cat", "cat", "dog")),)])
    assert find_regions(own, RegionFeatures(Store(("dog", "sky"))))["1"].keys() == {"cat", "dog"}
    with pytest.raises(Inapplicable, match="its regions have no name each"):
        find_regions(parallel, RegionFeatures(Store(("dog", "sky"))))  # of three regions


def test_tsne_objects_are_selected_by_images_in_turn():
    rows, where = [], {}
    for label, images in {"dog": "aaabb", "cat": "cde", "horse": "fff", "tiger": "gh"}.items():
        for i, image in enumerate(images):
            rows.append((Example(f"{label}{i}", (f"one {label} in the sky",), (image,), {}),))
            where.setdefault(image, {"sky": 1})[label] = 1  # nobody here knows what a sky is called elsewhere
    parallel = Parallel(("en",), rows, len(rows), {"en": 0})
    found = [n.item[0].id for n in select_mentions(parallel, where, 6)]
    assert found == ["dog0", "cat0", "tiger0", "dog1", "cat1", "tiger1"]  # a horse is in one image alone
    with pytest.raises(Inapplicable, match="the 8 parallel items do not name two objects in two images each"):
        select_mentions(parallel._replace(items=[row for row in rows if row[0].id[0] in "dh"]), where, 6)


def test_tsne_nearest_neighbours_equal_slow_loop():
    draw = np.random.default_rng(0)
    points = [
        Point(
            str(draw.choice(["a", "b", "c"])),
            str(draw.choice(["", "en", "de"])),
            f"q{i}",
            str(draw.integers(9)),
        )
        for i in range(60)
    ]
    states = draw.normal(size=(60, 5)).astype(np.float32) * draw.uniform(0.1, 9, (60, 1))
    hits, chances = {"all": [], "en": [], "de": []}, {"all": [], "en": [], "de": []}
    for p, x in zip(points, states, strict=True):
        if p.language:
            others = [
                (q, y) for q, y in zip(points, states, strict=True) if not q.language and q.image != p.image
            ]
            best, _ = max(
                others, key=lambda other: float(x @ other[1] / np.linalg.norm(x) / np.linalg.norm(other[1]))
            )
            for code in ("all", p.language):
                hits[code].append(best.label == p.label)
                chances[code].append(np.mean([q.label == p.label for q, _ in others]))
    found = nearest_region_shares(points, states)
    assert found.keys() == hits.keys() and len(hits["all"]) > 30
    for code, values in found.items():
        assert values == {
            "share": pytest.approx(np.mean(hits[code])),
            "chance": pytest.approx(np.mean(chances[code])),
        }
    ideal = np.array([np.eye(3)["abc".index(p.label)] for p in points])
    assert (
        nearest_region_shares(points, ideal)["all"]["share"]
        == 1
        > nearest_region_shares(points, ideal)["all"]["chance"]
    )


def test_tsne_of_few_points_is_spread_and_deterministic(monkeypatch):
    states = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    found = project(states)
    assert found.shape == (5, 2) and np.isfinite(found).all() and np.array_equal(found, project(states))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(Inapplicable, match=r"sklearn is not installed: pip install -e .\[analysis\]"):
        project(states)


def section(run):
    """Return what `analyse` says of words and regions, without the other figures."""
    return "\n".join(words_and_regions(load_finished_run(run, Options(limit=12))))


def read_points(run):
    with open(run / "analysis/tsne.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tsne_of_a_run_is_drawn_and_reproducible(finetune, scenes, tmp_path, capsys):
    shutil.copytree(scenes, tmp_path / "data")
    assert finetune("scenes_xgqa", "name=run", f"data={tmp_path / 'data'}", "epochs=1")[0] == 0
    run = tmp_path / "run"
    assert main(["analyse", str(run), "--limit", "12"]) == 0
    printed = capsys.readouterr().out
    files = {name: (run / f"analysis/tsne.{name}").read_bytes() for name in ("png", "csv", "json")}
    values, points = json.loads(files["json"]), read_points(run)
    assert len(files["png"]) > 5000 and len(points) == values["words"] + values["regions"] > 8
    assert list(points[0]) == ["class", "kind", "language", "item", "x", "y"] and set(values["classes"]) >= {
        "coat",
        "cucumber",
    }
    assert {(p["kind"], p["language"]) for p in points} == {("word", "en"), ("word", "ru"), ("region", "")}
    assert all(p["class"] in values["classes"] and np.isfinite(float(p["x"])) for p in points)
    assert sum(p["kind"] == "word" for p in points) == values["words"]
    share = 100 * values["nearest_region"]["all"]["share"]
    assert f"| all | {share:.1f} |" in printed and "what its cross-attention adds to a word" in printed
    assert section(run) in printed
    assert files == {name: (run / f"analysis/tsne.{name}").read_bytes() for name in files}
    (tmp_path / "data/scenes.jsonl").unlink()
    with pytest.raises(
        Inapplicable, match=r"nothing says where in an image an object stands: .*scenes.jsonl is not there"
    ):
        section(run)


def test_tsne_of_named_regions_and_without_names(finetune, scenes, tmp_path):
    """Detections that are the truth: a region a thing, by name; then without names."""
    (tmp_path / "regions").mkdir()
    for scene in map(json.loads, (scenes / "scenes.jsonl").read_text().splitlines()):
        things, draw = scene["objects"], np.random.default_rng(len(scene["id"]))
        corners = np.array(
            [(o["left"], o["top"], o["left"] + o["size"], o["top"] + o["size"]) for o in things]
        )
        np.savez(
            tmp_path / f"regions/{scene['id']}.npz",
            features=draw.normal(size=(len(things), 6)),
            boxes=corners,
            img_h=64,
            img_w=64,
            tags=[o["label"] for o in things],
        )
    FinetuneModel(UC2(UC2.sizes["tiny"]), ("?",), 1, 0.1, 6).save(tmp_path / "uc2")
    shutil.copy2(DATA / "tokenizer.model", tmp_path / "uc2")
    fixed = (
        f"model={tmp_path / 'uc2'}",
        f"regions={tmp_path / 'regions'}",
        "image_size=null",
        "epochs=1",
        "name=run",
    )
    code, printed = finetune("scenes_xgqa", *fixed)
    assert code == 0, printed
    (tmp_path / "run/analysis").mkdir()
    assert "States of both after the last layer" in section(tmp_path / "run")
    assert {p["kind"] for p in read_points(tmp_path / "run")} == {"word", "region"}
    for path in (tmp_path / "regions").iterdir():
        with np.load(path) as arrays:
            record = dict(arrays)
        del record["tags"]
        np.savez(path, **record)
    with pytest.raises(
        Inapplicable, match="nothing says where in an image an object stands: its regions have no name each"
    ):
        section(tmp_path / "run")


def test_tsne_of_dual_encoder_says_it_does_not_apply(scenes, tokenizer):
    config = override(RECIPES["scenes_xflickrco"](), [f"data={scenes}"])
    model = MClip(MClip.sizes["tiny"])
    with pytest.raises(
        Inapplicable, match="backbone 'mclip' reads no text of xflickrco together with an image"
    ):
        words_and_regions(FinishedRun(scenes, config, {}, model, tokenizer, False, Options()))
