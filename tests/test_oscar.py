"""The backbone `oscar`: a slow, padded restatement over published names, `transformers` as a peer, published
counts, folders; tags and OSCAR's region files on their way to it."""

import base64
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from finetune.batches import encode_tagged, read_inputs
from finetune.formats import Example
from finetune.stores import to_regions
from finetune.stores.images import RegionFeatures
from finetune.stores.regions import open_regions
from raylib.errors import UserError
from raylib.models import BACKBONES
from raylib.models.finetuned import FinetuneModel, freeze, load_backbone
from raylib.models.oscar import TINY, Oscar, OscarConfig, TaggedRegions
from raylib.packed import Ragged, find_segments
from raylib.sample import DATA
from raylib.text import Tokenizer
from tests.published import BERT_LAYER, FEATURES, FEEDFORWARD, HEADS, LAYER, LAYERS, POSITIONS, WIDTH, WORDS
from tests.test_load import our_rows, peer_text

EPS = {"layer_norm_eps": 1e-3, "img_layer_norm_eps": 1e-2}  # so large that a wrong one shows
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FEEDFORWARD,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": POSITIONS,
    "img_feature_dim": FEATURES + 6,
}


@pytest.fixture
def double():
    """Weights are read and kept as float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_weights(norm=True):
    """Random weights under OSCAR+'s names, with the heads of pretraining and of VQA."""
    g = torch.Generator().manual_seed(7)
    at = "bert.embeddings"
    layers = {
        "bert.embeddings.LayerNorm": (WIDTH,),
        "bert.img_embedding": (WIDTH, FEATURES + 6),
        "bert.pooler.dense": (WIDTH, WIDTH),
        "cls.predictions.transform.dense": (WIDTH, WIDTH),
        "cls.seq_relationship": (3, WIDTH),
        "classifier.0": (48, WIDTH),
        "classifier.2": (9, 48),
    }
    layers |= {"bert.LayerNorm": (WIDTH,)} if norm else {}
    layers |= {
        f"bert.{BERT_LAYER[part].format(i=i)}": shape for part, shape in LAYER.items() for i in range(LAYERS)
    }
    shapes = {
        f"{at}.word_embeddings.weight": (WORDS, WIDTH),
        f"{at}.position_embeddings.weight": (POSITIONS, WIDTH),
        f"{at}.token_type_embeddings.weight": (2, WIDTH),
        "cls.predictions.bias": (WORDS,),
        "cls.predictions.decoder.weight": (WORDS, WIDTH),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {
        name: torch.randn(shape, generator=g, dtype=torch.float64) * 0.4 for name, shape in shapes.items()
    }
    return {name: value + 1 if name.endswith("Norm.weight") else value for name, value in weights.items()}


def write(folder, weights, safe=False, **changes):
    """An OSCAR+ folder, whose config.json names no architecture, as theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    norm = {"use_img_layernorm": 1} if "bert.LayerNorm.weight" in weights else {}
    (folder / "config.json").write_text(json.dumps({**SIZES, **EPS, **norm, **changes}))
    if safe:
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


def slow(weights, texts, tags, regions, norm=True):
    """Padded and masked, as the public code does it: states after each layer (n, longest + most, d), pooled
    (n, d), and how many places words have, behind which regions begin."""
    w = weights
    longest, most = (
        max(len(a) + len(b) for a, b in zip(texts, tags, strict=True)) + 2,
        max(map(len, regions)) + 1,
    )

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def layer_norm(x, name, eps=EPS["layer_norm_eps"]):
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred**2).mean(-1, keepdim=True)
        return w[f"{name}.weight"] * centred / torch.sqrt(spread + eps) + w[f"{name}.bias"]

    ids, types = torch.zeros(2, len(texts), longest, dtype=torch.int64)
    mask = torch.zeros(len(texts), longest + most, dtype=torch.bool)
    features = torch.zeros(len(texts), most, FEATURES + 6, dtype=torch.float64)
    for i, (text, tag, seen) in enumerate(zip(texts, tags, regions, strict=True)):
        both = len(text) + len(tag)
        ids[i, :both], types[i, len(text) : both] = torch.cat([text, tag]), 1
        features[i, : len(seen)] = seen[:, : FEATURES + 6]
        mask[i, :both] = mask[i, longest : longest + len(seen)] = True
    at = "bert.embeddings"
    words = (
        w[f"{at}.word_embeddings.weight"][ids] + w[f"{at}.position_embeddings.weight"][torch.arange(longest)]
    )
    words = layer_norm(words + w[f"{at}.token_type_embeddings.weight"][types], f"{at}.LayerNorm")
    seen = linear(features, "bert.img_embedding")
    x = torch.cat([words, layer_norm(seen, "bert.LayerNorm", EPS["img_layer_norm_eps"]) if norm else seen], 1)
    hidden, states = torch.where(mask, 0.0, -math.inf)[:, None, None], []
    for i in range(LAYERS):
        at = f"bert.encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{n}").unflatten(2, (HEADS, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        shares = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + hidden).softmax(-1)
        attended = linear((shares @ v).transpose(1, 2).flatten(2), f"{at}.attention.output.dense")
        x = layer_norm(x + attended, f"{at}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = layer_norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        states.append(x)
    return states, linear(x[:, 0], "bert.pooler.dense").tanh(), longest


def make_rows(words=WORDS):
    """Four texts, tags of two of them, their regions: of unequal length. The third has neither tags nor
    regions."""
    g = torch.Generator().manual_seed(3)
    texts, tags = (
        [torch.randint(5, words, (n,), generator=g) for n in counts]
        for counts in ((7, 3, 5, 4), (4, 0, 0, 6))
    )
    regions = []
    for count in (4, 2, 0, 5):
        x1, y1, wide, high = torch.rand(4, count, generator=g, dtype=torch.float64) / 2
        where = torch.stack([x1, y1, x1 + wide, y1 + high, wide, high, wide * high], 1)
        regions.append(torch.cat([torch.randn(count, FEATURES, generator=g, dtype=torch.float64), where], 1))
    return texts, tags, regions


def shaken(model):
    """As if trained: no parameter is zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_oscar_published_weights_equal_slow_reference(tmp_path, double, norm, safe):
    """Loaded, folded, without padding: the pooled CLS and the states of every part after every layer."""
    weights = make_weights(norm)
    model = Oscar.import_weights(write(tmp_path, weights, safe)).eval()
    texts, tags, regions = make_rows()
    layers, pooled, begin = slow(weights, texts, tags, regions, norm)
    seen = model.embed_regions(our_rows(regions), our_rows(tags))
    torch.testing.assert_close(model.fused_cls(our_rows(texts), seen), pooled, rtol=1e-9, atol=1e-12)
    found, places = model.hidden_states(our_rows(texts), seen, (1, 2))
    assert len(found) == len(layers) == 2
    for mine, reference_states in zip(found, layers, strict=True):
        assert mine.lengths.tolist() == [
            len(a) + len(b) + len(c) for a, b, c in zip(texts, tags, regions, strict=True)
        ]
        expected = {
            "text": [row[: len(text)] for row, text in zip(reference_states, texts, strict=True)],
            "tags": [
                row[len(a) :][: len(b)] for row, a, b in zip(reference_states, texts, tags, strict=True)
            ],
            "regions": [row[begin:][: len(c)] for row, c in zip(reference_states, regions, strict=True)],
        }
        for part, rows in expected.items():
            place = getattr(places, part)
            assert place.lengths.tolist() == [len(row) for row in rows]
            torch.testing.assert_close(mine.values[place.values], torch.cat(rows), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.values[places.cls], reference_states[:, 0], rtol=1e-9, atol=1e-12)
    padded, places = model.hidden_states(our_rows(texts), seen, (1, 2), empty=True)
    for mine, plain, reference_states in zip(
        padded, found, layers, strict=True
    ):  # the reference pads to one slot more than any row has
        torch.testing.assert_close(mine.values[places.empty], reference_states[:, -1], rtol=1e-9, atol=1e-12)
        assert mine.values[places.text.values].equal(
            plain.values[find_segments(*(p.lengths for p in places[1:4])).text.values]
        )
    lowest = model.hidden_states(our_rows(texts), seen, [1])[0]
    assert len(lowest) == 1 and lowest[0].values.equal(found[0].values)


def test_oscar_segments_equal_worked_example():
    """CLS SEP tag SEP region; CLS word SEP; CLS SEP region region."""
    places = find_segments(torch.tensor([2, 3, 2]), torch.tensor([2, 0, 0]), torch.tensor([1, 0, 2]))
    assert places.cls.tolist() == [0, 5, 8]
    assert places.text.values.tolist() == [0, 1, 5, 6, 7, 8, 9] and places.text.lengths.tolist() == [2, 3, 2]
    assert places.tags.values.tolist() == [2, 3] and places.tags.lengths.tolist() == [2, 0, 0]
    assert places.regions.values.tolist() == [4, 10, 11] and places.regions.lengths.tolist() == [1, 0, 2]
    assert places.empty.tolist() == []
    places = find_segments(torch.tensor([2, 3]), torch.tensor([2, 0]), torch.tensor([1, 0]), True)
    assert (
        places.cls.tolist() == [0, 6]
        and places.empty.tolist() == [5, 9]
        and places.regions.values.tolist() == [4]
    )


@pytest.mark.parametrize("kind", ["bert", "xlmr"])
@pytest.mark.parametrize("bare", [True, False])
def test_oscar_text_folder_fills_the_text_part(tmp_path, kind, bare):
    """As transformers computes it: BERT's positions from 0, tags of its second type; XLM-R's from 2, its only
    type. Regions are new."""
    peer = peer_text(kind, 3, 30)
    body = peer.base_model
    if bare and kind == "bert":
        body = peer = shaken(BertModel(peer.config))  # with a pooler
    if kind == "xlmr":
        body.embeddings.token_type_embeddings = torch.nn.Embedding(
            1, 16
        )  # as published; its default config has 2
    (body if bare else peer).save_pretrained(tmp_path)
    shutil.copy2(DATA / "tokenizer.model", tmp_path)
    model = load_backbone(tmp_path, "oscar").eval()
    assert (model.kind, model.num_layers, model.num_fusion_layers, model.config.features) == (
        "oscar",
        3,
        0,
        None,
    )
    assert model.config.positions == (30 if kind == "bert" else 28)
    model.set_region_dim(FEATURES)
    texts, tags, regions = make_rows(60)
    regions = [rows.float() for rows in regions]
    seen = model.embed_regions(our_rows(regions), our_rows(tags))
    (last,), _ = model.hidden_states(our_rows(texts), seen, [3])
    pooled = model.fused_cls(our_rows(texts), seen)
    for i, (text, tag) in enumerate(zip(texts, tags, strict=True)):
        types = torch.tensor([0] * len(text) + [kind == "bert"] * len(tag))[None]
        x = torch.cat(
            [body.embeddings(torch.cat([text, tag])[None], types)[0], model.regions(regions[i][:, :-1])]
        )
        expected = body.encoder(x[None]).last_hidden_state[0]
        torch.testing.assert_close(last.select_rows(torch.tensor([i])).values, expected, atol=1e-5, rtol=0)
        if bare and kind == "bert":
            torch.testing.assert_close(pooled[i], body.pooler(expected[None])[0], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="9 wide, this oscar was trained on 6"):
        model.set_region_dim(9)


def test_oscar_loads_gamma_and_beta_norms(tmp_path):
    """bert-base-multilingual-uncased has gamma and beta, and OSCAR+ was trained on from such a one."""
    weights = make_weights()
    old = {
        k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in weights.items()
    }
    one, other = (
        Oscar.import_weights(write(tmp_path / name, w, use_img_layernorm=1))
        for name, w in (("new", weights), ("old", old))
    )
    assert old.keys() != weights.keys()
    assert all(value.equal(other.state_dict()[name]) for name, value in one.state_dict().items())


def test_oscar_fuse_uses_tags_and_image_pairs():
    model = shaken(Oscar(TINY))
    texts, tags, regions = make_rows()
    text, regions = our_rows(texts), our_rows([rows.float() for rows in regions])
    plain = model.fused_cls(text, model.embed_regions(regions))
    tagged = model.fused_cls(text, model.embed_regions(regions, our_rows(tags)))
    same = (plain - tagged).abs().amax(1) < 1e-6
    assert same.tolist() == [False, True, True, False]  # those without tags
    # two images a text
    pairs = model.embed_regions(regions.select_rows(torch.tensor([0, 3, 1, 0, 2, 1, 3, 3])))
    rows = [
        model.fused_cls(text, TaggedRegions(*(part.select_rows(torch.arange(i, 8, 2)) for part in pairs)))
        for i in (0, 1)
    ]
    torch.testing.assert_close(
        model.fused_cls(text, pairs, 2), torch.stack(rows, 1).flatten(0, 1), atol=1e-6, rtol=0
    )
    # a premise is read in the place of tags
    premise = our_rows([torch.tensor([0, 9, 2]), torch.tensor([0, 8, 7, 2]), *tags[:1], *tags[3:]])
    nothing = Ragged(regions.values[:0], torch.zeros(4, dtype=torch.int64))
    states = premise.with_values(model.encode_text(premise))
    torch.testing.assert_close(
        model.fused_cls(text, states), model.fused_cls(text, model.embed_regions(nothing, premise))
    )
    read = torch.tensor([True, False] * 9)[: len(premise.values)]
    assert model.encode_text(premise, read).equal(states.values[read])


def test_oscar_depths_cover_all_parameters_and_save_keeps_all(tmp_path):
    model = FinetuneModel(Oscar(TINY), ("no", "yes"), 2, 0.0, 6)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert {name.split(".")[1] for name, depth in depths.items() if depth == 0} == {"embedding", "regions"}
    assert {name.split(".")[1] for name, depth in depths.items() if depth} == {"encoder"}
    assert (
        sorted({depth for depth in depths.values() if depth is not None}) == [0, 1, 2]
        and model.regions is None
    )
    assert all(depth == 1 + int(name.split(".")[3]) for name, depth in depths.items() if depth)
    outside = {
        name.split(".")[1] for name, depth in depths.items() if depth is None and name.startswith("backbone")
    }
    assert outside == {"pooler"}
    matrices = {
        name for name, p in model.named_parameters() if p.ndim == 2 and (depths[name] or "pooler" in name)
    }
    assert set(model.prunable()) == matrices
    shaken(model).save(tmp_path)
    again = load_backbone(tmp_path)
    assert again.kind == "oscar" and again.config == TINY
    assert all(value.equal(again.state_dict()[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("bf16", [False, True])
def test_oscar_every_used_parameter_gets_a_gradient(bf16):
    """A classifier over two images a text, through a batch as it is today, without tags; then with them."""
    model = FinetuneModel(shaken(Oscar(TINY)), ("no", "yes"), 2, 0.0, FEATURES)
    texts, tags, regions = make_rows()
    batch = {"text": our_rows(texts[:2]), "regions": our_rows([rows.float() for rows in regions])}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert model(batch).shape == (2, 2)
        seen = model.backbone.embed_regions(batch["regions"], our_rows(tags))
        model.head(model.fused_cls(batch["text"], seen)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


@pytest.mark.parametrize(
    ("vocabulary", "region_eps", "bert", "whole"),
    [(30522, 1e-12, 109_482_240, 111_062_016), (105879, None, 167_356_416, 168_934_656)],
    ids=["oscar+", "student"],
)
def test_oscar_has_published_parameter_counts(vocabulary, region_eps, bert, whole):
    """BERT-base, uncased or multilingual uncased, and the map of 2054 numbers, with OSCAR+'s layer norm or,
    as in the public code of cViL, without. Ours lacks one vector: the two token types are folded into one and
    the positions."""
    norm = 2 * 768
    layer = 4 * linear(768, 768) + norm + linear(768, 3072) + linear(3072, 768) + norm
    assert layer == 7_087_872
    embeddings = (vocabulary + 512 + 2) * 768 + norm
    assert embeddings + 12 * layer + linear(768, 768) == bert
    assert bert + linear(2054, 768) + (norm if region_eps else 0) == whole
    with torch.device("meta"):
        peer = BertModel(BertConfig(vocab_size=vocabulary))
        model = Oscar(OscarConfig(vocabulary=vocabulary, region_eps=region_eps))
    assert sum(p.numel() for p in peer.parameters()) == bert
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) + 768 == whole
    assert sum(p.numel() for name, p in parameters.items() if name.startswith("encoder.blocks.3.")) == layer
    assert (
        sum(parameters[name].numel() for name in model.prunable())
        == 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2
    )
    assert parameters["regions.map.weight"].shape == (768, 2054)
    assert BACKBONES["oscar"].sizes["base"] == OscarConfig() and OscarConfig().vocabulary == 30522


def test_oscar_missing_unused_and_misshapen_tensors_are_listed(tmp_path):
    weights = make_weights()
    del weights["bert.encoder.layer.1.attention.self.key.bias"]
    weights["bert.pooler.dense.bias"], weights["bert.code_embeddings.weight"] = torch.zeros(3), torch.zeros(2)
    with pytest.raises(UserError) as e:
        Oscar.import_weights(
            write(tmp_path, weights, use_img_layernorm=0, max_position_embeddings=POSITIONS - 1)
        )
    message = str(e.value)
    for part in (
        "missing encoder.layer.1.attention.self.key.bias",
        "pooler.dense.bias is (3,), wanted (16,)",
        "unused code_embeddings.weight",
        "unused LayerNorm.weight",
        "embeddings.position_embeddings.weight is (30, 16), wanted (29, 16)",
        str(tmp_path),
    ):
        assert part in message
    assert "\n" not in message and "classifier" not in message and "cls." not in message
    weights = make_weights()
    del weights["bert.pooler.dense.weight"], weights["bert.pooler.dense.bias"]
    with pytest.raises(UserError, match="missing pooler.dense.weight; missing pooler.dense.bias$"):
        Oscar.import_weights(write(tmp_path, weights))
    weights = make_weights()
    del weights["bert.embeddings.token_type_embeddings.weight"]
    with pytest.raises(UserError, match="tensor 'embeddings.token_type_embeddings.weight' is missing"):
        Oscar.import_weights(write(tmp_path, weights))


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_oscar_wrong_folders_are_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "good", make_weights())
    with pytest.raises(UserError, match="vision= is for backbones with an image encoder"):
        Oscar.import_weights(folder, tmp_path)
    for path in (tmp_path / "nowhere", folder / "pytorch_model.bin"):
        with pytest.raises(UserError, match="no config.json"):
            Oscar.import_weights(path)
    monkeypatch.chdir(tmp_path)
    write(folder, {"bert.x": Code()})
    with pytest.raises(UserError, match="pytorch_model.bin: not to be read .*it wants posix.mkdir"):
        Oscar.import_weights(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        Oscar.import_weights(folder)
    with pytest.raises(UserError, match="width 16 is not a multiple of heads 3"):
        Oscar.import_weights(write(folder, make_weights(), num_attention_heads=3))
    with pytest.raises(
        UserError, match=r"token_type_embeddings.weight is \(2, 16\) of float64, wanted \(any, 32\)"
    ):
        Oscar.import_weights(write(folder, make_weights(), hidden_size=32))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no hidden_size, .*; give an OSCAR, BERT or XLM-R folder"):
        Oscar.import_weights(folder)


def test_oscar_bad_input_is_named():
    model = Oscar(TINY.model_copy(update={"positions": 9}))
    texts, tags, regions = make_rows()
    text, regions = our_rows(texts), our_rows([rows.float() for rows in regions])
    assert len(model.fused_cls(text, model.embed_regions(regions))) == 4  # regions have no positions
    for run in (model.fused_cls, lambda *rows: model.hidden_states(*rows, [1])):
        with pytest.raises(
            UserError, match="a row of 11 tokens and tags, but oscar has 9 positions; lower length="
        ):
            run(text, model.embed_regions(regions, our_rows(tags)))
    for layers in ([], [0, 1], [2, 1], [1, 1], [1, 3]):
        with pytest.raises(UserError, match="oscar has layers 1 to 2; name some, each once, rising"):
            model.hidden_states(text, model.embed_regions(regions), layers)
    with pytest.raises(UserError, match="7 wide, this oscar was trained on 6"):
        model.set_region_dim(7)


def test_oscar_parts_can_be_frozen():
    model = Oscar(TINY)
    freeze(model, ("embeddings",))
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {
        "embedding"
    }
    with pytest.raises(UserError, match="freeze: oscar has no part 'vision'; it has: embeddings"):
        freeze(model, ("vision",))


def write_oscar_tsv(path, images):
    """VinVL's: id, number of regions, base64 of float32 (R, features + 6)."""
    lines = []
    for name, rows in images.items():
        x = np.asarray(rows, np.float32)
        lines.append(f"{name}\t{len(x)}\t{base64.b64encode(x.tobytes()).decode()}\n")
    path.write_text("".join(lines))
    return path


def test_oscar_region_files_and_tags_reach_the_model(tmp_path):
    """A row is what the model was given by hand: features, six numbers of the place, the area; words, tags,
    regions."""
    _, _, regions = make_rows()
    store = open_regions(
        write_oscar_tsv(tmp_path / "feats.tsv", {"7": regions[0][:, :-1], "8": regions[1][:, :-1]})
    )
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    examples = [
        Example("a", ("a dog",), ("7",), {}, tags=("dog", "polar bear")),
        Example("b", ("two cats",), ("8",), {}),
    ]
    inputs = read_inputs(examples, RegionFeatures(store, has_tags=True), tokenizer, 40)
    assert inputs["regions"].lengths.tolist() == [4, 2] and inputs["tags"].lengths[1] == 0
    torch.testing.assert_close(
        inputs["regions"].values[:, :-1].double(), torch.cat(regions[:2])[:, :-1], rtol=0, atol=1e-6
    )
    assert inputs["tags"].values.tolist() == [*tokenizer.encode(["dog polar bear"])[0], tokenizer.sep]
    model = FinetuneModel(shaken(Oscar(TINY)), ("no", "yes"), 1, 0.0, FEATURES).eval()
    seen = model.backbone.embed_regions(inputs["regions"], inputs["tags"])
    assert model(inputs).equal(model.head(model.fused_cls(inputs["text"], seen)))
    assert not model(inputs)[0].allclose(model({k: v for k, v in inputs.items() if k != "tags"})[0])
    assert "tags" not in read_inputs(
        examples, RegionFeatures(store), tokenizer, 40
    )  # of a model that reads none
    arrays = {"features": np.ones((1, 3)), "boxes": np.ones((1, 4)), "img_h": 1, "img_w": 1}
    kept = to_regions({**arrays, "tags": [b"dog", "cat"]}, "")
    assert kept.tags == ("dog", "cat")
    (tmp_path / "bad.tsv").write_text(
        "7\t3\t" + base64.b64encode(np.zeros(20, np.float32).tobytes()).decode() + "\n"
    )
    with pytest.raises(UserError, match="bad.tsv, 7: 20 values for 3 regions"):
        open_regions(tmp_path / "bad.tsv").read("7")


@pytest.mark.parametrize(
    ("length", "kept"), [(99, (6, 4)), (12, (5, 4)), (11, (4, 4)), (10, (4, 3)), (5, (1, 1))]
)
def test_oscar_text_and_tags_share_the_length(length, kept):
    """As BERT cuts pairs: one token at a time off the longer, off the second of two equal ones."""
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    tokenizer._encode = lambda texts: [[int(word) for word in text.split()] for text in texts]
    found = encode_tagged(["10 11 12 13 14 15", "10 11 12"], ["20 21 22 23", ""], tokenizer, length)
    assert [n - 2 for n in found["text"].lengths.tolist()] == [kept[0], min(3, length - 2)]
    assert [max(n - 1, 0) for n in found["tags"].lengths.tolist()] == [kept[1], 0]
    pair = found["text"].values[: kept[0] + 2].tolist(), found["tags"].values.tolist()
    assert pair == ([0, *range(10, 10 + kept[0]), 2], [*range(20, 20 + kept[1]), 2])
