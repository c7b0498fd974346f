"""Figures of a finished run, and the numbers behind them, against slow references."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.__main__ import main
from finetune.analysis import attention, languages
from finetune.analysis.attention import (
    attention_weights,
    find_fonts,
    quadrant_shares,
    select_layer,
    to_grid,
    word_maps,
)
from finetune.analysis.languages import compare_states, correlate, measure_similarity, parallel_states
from finetune.analysis.parallel import (
    Inapplicable,
    Parallel,
    SceneObject,
    find_named,
    find_scene_mentions,
    find_tokens,
    find_word,
    letter_spans,
    read_parallel,
)
from finetune.batches import encode_texts
from finetune.build import read_split
from finetune.formats import Example
from finetune.recipes import RECIPES
from finetune.stores.images import open_visual
from raylib.config import override
from raylib.models import BACKBONES
from raylib.models.finetuned import FinetuneModel
from raylib.models.layers import Memory
from raylib.models.single_stream import UC2
from raylib.packed import Ragged
from raylib.sample import DATA
from raylib.sample.scenes import translate_name
from raylib.text import PromptedTokenizer, Tokenizer
from tests.factories import SMALL, make_model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DATA)


@pytest.fixture(scope="module")
def train(tmp_path_factory, model, scenes):
    """`train(task, name, *settings)` -> the folder of a finished run of two epochs; made once."""
    runs = tmp_path_factory.mktemp("runs")

    def run(task, name, *settings):
        own = [
            f"model={model}",
            f"data={scenes}",
            f"runs={runs}",
            f"name={name}",
            "epochs=2",
            "batch=16",
            "image_size=16",
            "fit.bf16=false",
            "fit.loader_workers=0",
            "test_limit=30",
            "freeze=[]",
            "extra_tests={}",
            "shuffled_images=false",
        ]
        assert main([f"scenes_{task}", *own, *settings]) == 0
        return runs / name

    return run


class Drawings:
    """Random images by name."""

    draws = 0

    def read(self, names, draws=None):
        g = torch.Generator().manual_seed(0)
        every = torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8, generator=g)
        return {"images": every[[int(name) for name in names]]}


class Regions:
    """Random regions by name, of different number."""

    draws = 0

    def read(self, names, draws=None):
        lengths = torch.tensor([2 + int(name) for name in names])
        values = [
            torch.rand(n, 13, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            for n in lengths.tolist()
        ]
        return {"regions": Ragged(torch.cat(values), lengths)}


def parallel_of(texts):
    items = [tuple(Example(f"q{i}", (text,), (str(i),), {}) for text in row) for i, row in enumerate(texts)]
    return Parallel(("en", "de", "ru"), items, len(items), dict.fromkeys(("en", "de", "ru"), 0))


TEXTS = [
    ("Is there a dog?", "Gibt es einen Hund?", "Есть ли собака?"),
    ("cat", "Katze", "Есть ли кошка или хлеб?"),
    ("Which is larger?", "Was ist größer, Apfel oder Brot?", "Что?"),
    ("bread", "Brot", "хлеб"),
]


@pytest.mark.parametrize(
    ("build", "images"),
    [
        (lambda: make_model(vocabulary=12000, positions=64), Drawings()),
        (lambda: UC2(UC2.sizes["tiny"]).double(), Regions()),
    ],
    ids=["unified", "uc2"],
)
def test_parallel_states_are_those_the_head_reads(tokenizer, build, images):
    backbone, read = build(), []
    model = FinetuneModel(backbone, ("no", "yes"), 1, 0.1).double().eval()
    model.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    got = parallel_states(model, parallel_of(TEXTS), images, tokenizer, 12)
    assert got.shape == (3, 4, backbone.width) and backbone.has_cross_attention == isinstance(
        images, Drawings
    )
    for i, row in enumerate(TEXTS):
        for j, text in enumerate(row):
            model({"text": encode_texts([text], tokenizer, 12), **images.read([str(i)])})
            torch.testing.assert_close(got[j, i].double(), F.normalize(read[-1][0], dim=0), atol=1e-6, rtol=0)


def mclip():
    made = BACKBONES["mclip"]
    return made(made.sizes["tiny"].model_copy(update={"vocabulary": 12000})).double()


@pytest.mark.parametrize("build", [lambda: make_model(vocabulary=12000, positions=64), mclip])
def test_parallel_states_of_retrieval_models_are_their_embeddings(tokenizer, build):
    model = build().eval()
    got = parallel_states(model, parallel_of(TEXTS), None, tokenizer, 12)
    for i, row in enumerate(TEXTS):
        for j, text in enumerate(row):
            expected = F.normalize(
                model.embed_text(encode_texts([text], tokenizer, 12), normalize=False)[0], dim=0
            )
            torch.testing.assert_close(got[j, i].double(), expected.detach(), atol=1e-6, rtol=0)


def test_similarity_equals_slow_loop_and_control_has_no_parallel_pair():
    states = F.normalize(torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)), dim=-1)
    matrix, unpaired = compare_states(states)
    others = []
    for a in range(3):
        for b in range(3):
            pairs = [float(states[a, i].double() @ states[b, i].double()) for i in range(5)]
            assert matrix[a, b] == pytest.approx(np.mean(pairs))
            others += [
                float(states[a, i].double() @ states[b, j].double())
                for i in range(5)
                for j in range(5)
                if i != j
            ]
    assert unpaired == pytest.approx(np.mean(others))
    together = torch.eye(5)[None].repeat(
        3, 1, 1
    )  # the same in each language, nothing in common between items
    matrix, unpaired = compare_states(together)
    assert np.allclose(matrix, 1) and unpaired == pytest.approx(0, abs=1e-12)
    assert compare_states(states[:, :1])[1] is None


def test_correlation_equals_numpy():
    near, scores = (
        {"de": 0.9, "ko": 0.2, "ru": 0.5, "zh": 0.3},
        {"en": 0.9, "de": 0.7, "ko": 0.1, "ru": 0.6, "zh": 0.4},
    )
    expected = np.corrcoef([near[c] for c in near], [scores[c] for c in near])[0, 1]
    assert correlate(near, scores) == pytest.approx(expected)
    assert correlate({"de": 0.9, "ko": 0.2}, scores) is None  # a line fits any two
    assert correlate(near, dict.fromkeys(near, 0.5)) is None and correlate({}, scores) is None
    states = F.normalize(torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)), dim=-1)
    values = measure_similarity(parallel_of(TEXTS), states, {"en": 0.9, "de": 0.5, "ru": 0.4})
    assert values["to_english"] == {"de": values["similarity"][0][1], "ru": values["similarity"][0][2]}
    assert values["mean"] == pytest.approx(
        np.mean([values["similarity"][i][j] for i in range(3) for j in range(3) if i != j])
    )


def test_attention_weights_reproduce_module_output():
    backbone = make_model().eval()
    lengths = torch.tensor([7, 3, 5, 3])
    g = torch.Generator().manual_seed(3)
    text = Ragged(torch.randint(5, SMALL.vocabulary, (18,), generator=g), lengths)
    image = backbone.encode_images(torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=g))
    weights = attention_weights(backbone, text, image)
    assert weights.shape == (2, 18, 2, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 18, 2, dtype=torch.float64))
    assert not any(block.cross_attention._forward_pre_hooks for block in backbone.fusion.blocks)
    with torch.inference_mode():
        for row, start in zip(
            range(4), text.starts.tolist(), strict=True
        ):  # one text at a time, its outputs noted
            one, outputs = text.select_rows(torch.tensor([row])), []
            handles = [
                block.cross_attention.register_forward_hook(
                    lambda _, inputs, out, to=outputs: to.append((inputs, out))
                )
                for block in backbone.fusion.blocks
            ]
            states = one.with_values(backbone.encode_text(one))
            backbone.fuse(states, memory=Memory(image, torch.zeros(1, dtype=torch.int64)))
            for handle in handles:
                handle.remove()
            for layer, ((_, key_value, _), out) in enumerate(outputs):
                values = key_value[:, 16:].view(5, 2, 8)
                own = weights[layer, start : start + len(one.values)]
                mixed = torch.einsum("ths,she->the", own, values).reshape(-1, 16)
                torch.testing.assert_close(backbone.fusion.blocks[layer].cross_attention.output(mixed), out)


def test_attention_maps_are_means_and_quadrants_sum_to_one():
    weights = torch.rand(3, 9, 2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text = Ragged(torch.zeros(9), torch.tensor([5, 4]))
    found = word_maps(weights, text, [[1, 2], [3]])
    assert found.shape == (2, 3, 10)
    assert np.allclose(found[0, 1], weights[1, 1:3].mean((0, 1))) and np.allclose(
        found[1, 2], weights[2, 8].mean(0)
    )
    assert np.array_equal(select_layer(found, "last"), found[:, 2]) and np.array_equal(
        select_layer(found, "1"), found[:, 0]
    )
    assert np.allclose(select_layer(found, "mean"), found.mean(1))
    grid = to_grid(found[0, 0])
    assert grid.shape == (3, 3) and grid.sum() == pytest.approx(1)
    assert grid[0, 1] == pytest.approx(found[0, 0, 2] / found[0, 0, 1:].sum())
    shares = quadrant_shares(grid)
    assert shares.sum() == pytest.approx(1)
    assert shares[1] == pytest.approx(grid[0, 2] + grid[0, 1] / 2 + grid[1, 2] / 2 + grid[1, 1] / 4)
    even = np.arange(16.0).reshape(1, 4, 4) / 120
    halves = (slice(0, 2), slice(2, 4))
    assert np.allclose(
        quadrant_shares(even)[0], [even[0, rows, columns].sum() for rows in halves for columns in halves]
    )


SENTENCES = [
    "Is there a hot  dog?",
    "그림에 개가 있나요?",
    "图片里有熊猫吗？",
    "ছবিতে কি কুকুর আছে?",
    "Groß: Äpfel",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_spans_cover_the_letters_of_each_token(tokenizer, text):
    found = letter_spans(tokenizer, text)
    assert len(found) == len(tokenizer.encode([text])[0]) and found[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))


def test_spans_work_with_tokenizer_json_and_prompts(tmp_path):
    from tokenizers import Tokenizer as Json
    from tokenizers import models, pre_tokenizers

    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", "a", "hun", "##d", "bellt"]
    model = Json(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    made = Tokenizer.load(tmp_path)
    assert find_tokens(made, "a hund bellt", find_word("Hund", "a hund bellt"), 40) == [2, 3]
    assert find_tokens(made, "a hund bellt", (2, 6), 4) == [2]  # <s> a hun </s>
    for prompted in (PromptedTokenizer(made, words="a hund"), PromptedTokenizer(made, ids=(7, 8, 9))):
        shift = len(prompted.encode(["a hund bellt"])[0]) - len(made.encode(["a hund bellt"])[0])
        assert shift == 3 and find_tokens(prompted, "a hund bellt", (2, 6), 40) == [5, 6]


def test_find_word_matches_whole_words_once():
    assert find_word("dog", "A hotdog and a Dog.") == (15, 18) and find_word("개", "그림에 개가") == (4, 5)
    assert find_word("dog", "a cat") is None
    things = [SceneObject("dog", 0), SceneObject("hot dog", 2)]
    text = {code: translate_name("hot dog", code) for code in ("en", "de")}
    row = tuple(Example("q", (f"{word}?",), ("p",), {}) for word in text.values())
    assert find_named(row, ("en", "de"), things) == (SceneObject("hot dog", 2), text)
    assert find_named(row, ("en", "de"), things[:1]) is None
    twice = (row[0], row[1]._replace(texts=(f"{text['de']} {text['de']}",)))
    assert find_named(twice, ("en", "de"), things) is None


def test_fonts_report_characters_they_cannot_draw():
    families, undrawable = find_fonts(["dog", "größer", "собака", "\U0010fffd"])
    assert families[0] == "DejaVu Sans" and undrawable == {"\U0010fffd"}  # private use: in no font but boxes


def test_curves_are_read_from_metrics_and_drawn(tmp_path):
    epochs = [(0.5, 0.3, 0.1, 0.6, 0.4), (0.7, 0.2, 0.3, 0.8, 0.2)]
    lines = [{"step": 1, "loss/task": 3.0}]
    for i, (en, de, ko, verify, query) in enumerate(epochs):
        values = {
            "en": en,
            "de": de,
            "ko": ko,
            "en/verify": 1.0,
            "de/verify": verify,
            "ko/verify": verify - 0.2,
        }
        recorded = {f"eval/test/{name}": value for name, value in {**values, "ko/query": query}.items()}
        lines.append({"step": 10 * (i + 1), "eval/score": 0.1, **recorded})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = languages.read_curves([tmp_path])
    assert values["score"] == {"en": [0.5, 0.7], "de": [0.3, 0.2], "ko": [0.1, 0.3]}
    assert values["by_type_mean"]["verify"] == pytest.approx([0.5, 0.7]) and values["by_type_mean"][
        "query"
    ] == [0.4, 0.2]
    languages.draw_curves(values, "a run", "accuracy", tmp_path / "curves")
    assert (tmp_path / "curves.png").stat().st_size > 5000 and json.loads(
        (tmp_path / "curves.json").read_text()
    ) == values
    assert "| de | 30.0 | 30.0 (1.) | 20.0 |" in languages.curve_table(values)
    with pytest.raises(Inapplicable, match="eval_each_epoch=true"):
        languages.read_curves([tmp_path / "elsewhere"])


@pytest.mark.parametrize(("task", "shared"), [("xgqa", 60), ("xvnli", 60), ("xflickrco", 60), ("marvl", 0)])
def test_read_parallel_matches_scenes_by_id(scenes, task, shared):
    config = override(RECIPES[f"scenes_{task}"](), [f"data={scenes}"])
    found = read_parallel(config, ("en", "ru"), 10)
    assert found.num_common == shared and len(found.items) == min(10, shared)
    assert found.num_missing == dict.fromkeys(
        ("en", "ru"), 60 - shared
    )  # MaRVL's items have ids of their own
    assert all(en.images == ru.images and en.texts != ru.texts for en, ru in found.items)
    assert read_parallel(config, ("en", "ru"), 10) == found


def test_read_parallel_counts_items_missing_in_a_language(scenes, tmp_path):
    shutil.copytree(scenes / "XVNLI", tmp_path / "XVNLI")
    path = tmp_path / "XVNLI/annotations/ru/test.jsonl"
    lines = path.read_text().splitlines()
    other = json.loads(lines[5])
    lines[5] = json.dumps({**other, "Flikr30kID": "another"})  # the same id, of another image
    path.write_text("\n".join(lines[:50]) + "\n")
    found = read_parallel(override(RECIPES["scenes_xvnli"](), [f"data={tmp_path}"]), ("en", "ru"), 100)
    assert found.num_common == len(found.items) == 49 and found.num_missing == {"en": 11, "ru": 1}
    assert other["pairID"] not in {en.id for en, _ in found.items}


def test_analyse_xgqa_run_writes_every_figure(train, scenes, capsys, recwarn):
    epochs = ["eval_each_epoch=true", "similarity_items=20", "select=last"]
    run = train("xgqa", "whole", "test_limit=60", *epochs)
    capsys.readouterr()
    recwarn.clear()
    assert main(["analyse", str(run), "--limit", "20"]) == 0
    printed = capsys.readouterr().out
    assert "Not made" not in printed and (run / "analysis" / "summary.md").read_text().strip() in printed
    assert not [w for w in recwarn if "lyph" in str(w.message)]
    values = {}
    for name in ("similarity", "curves", "confusions", "attention", "tsne"):
        assert (run / "analysis" / f"{name}.png").stat().st_size > 5000
        values[name] = json.loads((run / "analysis" / f"{name}.json").read_text())
    codes = ["en", "bn", "de", "id", "ko", "pt", "ru", "sw", "zh"]
    assert values["similarity"]["languages"] == codes and values["similarity"]["items"] == 20
    result = json.loads((run / "result.json").read_text())
    assert values["similarity"]["score"] == result["accuracy"]
    # the run has recorded the same after each epoch
    similarity = result["epochs"]["similarity"]
    assert {len(points) for points in similarity.values()} == {2} and set(similarity) == {
        "mean",
        "unpaired",
        *codes[1:],
    }
    assert similarity["mean"][-1] == pytest.approx(values["similarity"]["mean"], abs=1e-6)
    assert similarity["ru"][-1] == pytest.approx(values["similarity"]["to_english"]["ru"], abs=1e-6)
    assert result["epochs"]["score"] == values["curves"]["score"]
    assert "| epoch | en |" in (run / "result.md").read_text()
    assert {code: len(points) for code, points in values["curves"]["score"].items()} == dict.fromkeys(
        codes, 2
    )
    kinds = {"verify", "query", "choose", "logical", "compare", "count"}
    assert set(values["curves"]["by_type_mean"]) == kinds
    for code in codes:
        assert values["confusions"][code]["accuracy"] == result["accuracy"][code]
        assert values["confusions"][code]["accuracy_with_synonyms"] >= result["accuracy"][code]
    seen = values["attention"]
    assert set(seen["own_quadrant"]) == set(codes) and all(
        0 < share < 1 for share in seen["own_quadrant"].values()
    )
    truth = {
        r["id"]: r["objects"] for r in map(json.loads, (scenes / "scenes.jsonl").read_text().splitlines())
    }
    for record in seen["drawn"]:
        named = next(o["label"] for o in truth[record["image"]] if o["quadrant"] == record["quadrant"])
        assert record["word"] == {code: translate_name(named, code) for code in codes}
        assert all(np.sum(grid) == pytest.approx(1) for grid in record["map"].values())
    item = seen["drawn"][0]
    words = [f"{code}={item['word'][code]}" for code in ("en", "ru")]
    assert (
        main(
            ["analyse", str(run), "--limit", "20", "--item", item["id"], "--layer", "mean", "--words", *words]
        )
        == 0
    )
    chosen = json.loads((run / "analysis" / "attention.json").read_text())
    assert (
        chosen["items"] == 1 and chosen["layer"] == "mean" and set(chosen["drawn"][0]["map"]) == {"en", "ru"}
    )
    assert "own_quadrant" not in chosen  # of words that are given, nobody knows what they name


def test_analyse_retrieval_run_without_curves(train, capsys):
    run = train("xflickrco", "retrieval", 'languages=["en","de","ru"]', "epochs=1")
    assert main(["analyse", str(run), "--limit", "20"]) == 0
    printed = capsys.readouterr().out
    assert "eval_each_epoch=true" in printed and "xflickrco are no open set" in printed
    assert {p.name for p in (run / "analysis").glob("*.png")} == {
        "similarity.png",
        "attention.png",
        "tsne.png",
    }
    values = json.loads((run / "analysis" / "similarity.json").read_text())
    assert values["pearson"] is None and set(values["to_english"]) == {"de", "ru"}  # a line fits any two


def test_analyse_says_what_cannot_be_drawn(train, tmp_path, capsys):
    run = train("marvl", "pairs", 'languages=["en","ru"]', "epochs=1")
    capsys.readouterr()
    assert main(["analyse", str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not translations of each other") == 3 and printed.count("Not made") == 5
    assert not list((run / "analysis").glob("*.png"))


def test_analyse_few_shot_run_has_one_model_per_language(train, capsys):
    english = train("xgqa", "short", 'languages=["en","ru"]', "epochs=1")
    shots = ("setting=few_shot", "shots=5", 'languages=["de","ru"]', "batch=4", f"model={english}")
    run = train("xgqa", "shots", "eval_each_epoch=true", *shots)
    assert main(["analyse", str(run)]) == 0
    assert (
        capsys.readouterr().out.count(
            "Not made: compares languages within one model; setting=few_shot trains one"
        )
        == 3
    )
    values = {
        name: json.loads((run / "analysis" / f"{name}.json").read_text()) for name in ("curves", "confusions")
    }
    assert {code: len(points) for code, points in values["curves"]["score"].items()} == {"de": 2, "ru": 2}
    accuracy = json.loads((run / "result.json").read_text())["accuracy"]
    assert {code: found["accuracy"] for code, found in values["confusions"].items()} == accuracy


def test_analyse_model_without_cross_attention_skips_maps(train, tmp_path, capsys):
    make_model(vocabulary=12000, positions=64, fusion="entangled").float().save(tmp_path)
    shutil.copy2(DATA / "tokenizer.model", tmp_path)
    run = train("xvnli", "entangled", f"model={tmp_path}", "epochs=1", "test_limit=60")
    assert main(["analyse", str(run)]) == 0
    assert "has no cross-attention to images" in capsys.readouterr().out
    assert {p.name for p in (run / "analysis").glob("*.png")} == {"similarity.png", "tsne.png"}


def test_analyse_without_wordnet_says_so(train, scenes, tmp_path, capsys):
    shutil.copytree(scenes, tmp_path / "data", ignore=shutil.ignore_patterns("wordnet"))
    run = train("xgqa", "wordless", 'languages=["en","ru"]', "epochs=1", f"data={tmp_path / 'data'}")
    assert main(["analyse", str(run), "--limit", "8"]) == 0
    assert f"no WordNet at {tmp_path / 'data' / 'wordnet'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--words", "en=dog", "de"], ["--words en=dog de", "en=dog de=Hund"]),
        (["--words", "en=qwerty"], ["--words en=qwerty: in none of 8 parallel items"]),
        (["--item", "none"], ["--item none: no test item"]),
        (["--layer", "9"], ["--layer 9", "from 1 to 2"]),
    ],
)
def test_analyse_wrong_arguments_are_one_line_errors(train, capsys, settings, words):
    run = train("xgqa", "short", 'languages=["en","ru"]', "epochs=1")
    capsys.readouterr()
    assert main(["analyse", str(run), "--limit", "8", *settings]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and all(word in error for word in words), error


def test_analyse_unfinished_run_is_one_line_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["analyse", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "no such file; give finished runs" in error and "\n" not in error


def test_attention_shares_of_items_equal_mean_of_each_alone(tokenizer, scenes):
    """`measure` over several items is the mean of each item by itself."""
    config = override(RECIPES["scenes_xgqa"](), [f"data={scenes}", "image_size=16"])
    backbone = make_model(vocabulary=12000, positions=64).float().eval()
    images, codes = open_visual(config, 16), ("en", "ko", "zh")
    looks = find_scene_mentions(read_parallel(config, codes, 60), scenes / "scenes.jsonl")
    assert len(looks) > 3 and all(look_.object.quadrant not in look_.other_quadrants for look_ in looks)
    texts = {e.id: e.texts[-1] for e in read_split(config, "test", "ko")}
    together = attention.measure_attention(backbone, looks, codes, images, tokenizer, 40, "last", 2)
    alone = [
        attention.measure_attention(backbone, [one], codes, images, tokenizer, 40, "last", 2) for one in looks
    ]
    for code in codes:
        shares = [values["own_quadrant"][code] for values in alone]
        assert together["own_quadrant"][code] == pytest.approx(np.mean(shares))
        assert together["standard_error"][code] == pytest.approx(
            np.std(shares, ddof=1) / math.sqrt(len(shares))
        )
        assert together["own_by_layer"][code][-1] == pytest.approx(together["own_quadrant"][code])
    assert len({r["image"] for r in together["drawn"]}) == len(together["drawn"]) == 2
    assert all(record["text"]["ko"] == texts[record["id"]] for record in together["drawn"])


def test_attention_grid_restores_window_order():
    """Four windows of 2 x 2 patches behind the mean, their CLS states and then the patches, window after
    window."""
    raster = np.arange(16.0).reshape(4, 4)
    windows = [raster[top : top + 2, left : left + 2].ravel() for top in (0, 2) for left in (0, 2)]
    weights = np.concatenate([[99.0], np.full(4, 77.0), *windows])
    np.testing.assert_allclose(to_grid(weights, 4), raster / raster.sum())
    assert quadrant_shares(to_grid(weights, 4)) == pytest.approx([10 / 120, 18 / 120, 42 / 120, 50 / 120])
