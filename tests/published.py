"""Tiny checkpoints under the names that published single-stream models have, and what those models compute:
padded, slow and from the published parts, with token types and padding's positions as they are there."""

import json
import math

import torch
import torch.nn.functional as F

WORDS, WIDTH, HEADS, FEEDFORWARD, LAYERS, POSITIONS, FEATURES = 40, 16, 2, 24, 2, 30, 6
SLOTS = 100  # of regions, in M3P, whose positions number these too
PADDING = {"uc2": 1, "m3p": 1, "xuniter": 1, "muniter": 0}
POOLED = {"uc2": WIDTH, "m3p": WIDTH, "xuniter": 20, "muniter": 20}
TYPES = {"uc2": 2, "muniter": 2, "xuniter": 1, "m3p": 0}
LAYER = {
    "query": (WIDTH, WIDTH),
    "key": (WIDTH, WIDTH),
    "value": (WIDTH, WIDTH),
    "attended": (WIDTH, WIDTH),
    "attention_norm": (WIDTH,),
    "intermediate": (FEEDFORWARD, WIDTH),
    "output": (WIDTH, FEEDFORWARD),
    "output_norm": (WIDTH,),
}


def make_parts(kind: str) -> dict[str, torch.Tensor]:
    """Random weights of a published model, by our own names for its parts."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4

    shapes = {
        "norm": (WIDTH,),
        "feature": (WIDTH, FEATURES),
        "location": (WIDTH, 7 if kind == "uc2" else 5),
        "region_norm": (WIDTH,),
        "pooler": (POOLED[kind], WIDTH),
    }
    if kind != "m3p":
        shapes |= {"feature_norm": (WIDTH,), "location_norm": (WIDTH,)}
    if kind in ("xuniter", "muniter"):
        shapes["region_pooler"] = (POOLED[kind], WIDTH)
    shapes |= {f"{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER.items()}
    parts = {"word": draw(WORDS, WIDTH), "position": draw(POSITIONS + (SLOTS if kind == "m3p" else 0), WIDTH)}
    if TYPES[kind]:
        parts["type"] = draw(TYPES[kind], WIDTH)
    if kind == "xuniter":
        parts["region_type"] = draw(1, WIDTH)
    for name, shape in shapes.items():
        parts[f"{name}.weight"] = draw(*shape) + (1.0 if len(shape) == 1 else 0.0)
        parts[f"{name}.bias"] = draw(shape[0])
    return parts


def rename(parts: dict, names: dict[str, str], layer: dict[str, str]) -> dict:
    """`parts` under other names; those of a layer i with i, a = 2 i and f = 2 i + 1 put in."""
    names = {
        **names,
        **{
            f"{i}.{part}": name.format(i=i, a=2 * i, f=2 * i + 1)
            for part, name in layer.items()
            for i in range(LAYERS)
        },
    }
    found = {}
    for name, value in parts.items():
        part, end = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
        found[f"{names[part]}.{end}"] = value
    return found


def extra(names: dict[str, tuple[int, ...]]) -> dict:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in names.items()}


BERT_LAYER = {
    "query": "encoder.layer.{i}.attention.self.query",
    "key": "encoder.layer.{i}.attention.self.key",
    "value": "encoder.layer.{i}.attention.self.value",
    "attended": "encoder.layer.{i}.attention.output.dense",
    "attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "intermediate": "encoder.layer.{i}.intermediate.dense",
    "output": "encoder.layer.{i}.output.dense",
    "output_norm": "encoder.layer.{i}.output.LayerNorm",
}
VOLTA_LAYER = {
    "query": "encoder.layer.{a}.attention_self.query",
    "key": "encoder.layer.{a}.attention_self.key",
    "value": "encoder.layer.{a}.attention_self.value",
    "attended": "encoder.layer.{a}.attention_output.dense",
    "attention_norm": "encoder.layer.{a}.attention_output.LayerNorm",
    "intermediate": "encoder.layer.{f}.intermediate.dense",
    "output": "encoder.layer.{f}.output.dense",
    "output_norm": "encoder.layer.{f}.output.LayerNorm",
}


def as_uc2(parts: dict) -> dict:
    """UC2's own: a bare dict, with the heads of its pretraining."""
    e, i = "roberta.embeddings", "roberta.img_embeddings"
    names = {
        "word": f"{e}.word_embeddings",
        "position": f"{e}.position_embeddings",
        "type": f"{e}.new_token_type_embeddings",
        "norm": f"{e}.LayerNorm",
        "feature": f"{i}.img_linear",
        "location": f"{i}.pos_linear",
        "feature_norm": f"{i}.img_layer_norm",
        "location_norm": f"{i}.pos_layer_norm",
        "region_norm": f"{i}.LayerNorm",
        "pooler": "roberta.pooler.dense",
    }
    heads = {
        "roberta.img_embeddings.mask_embedding.weight": (2, FEATURES),
        "cls.bias": (WORDS,),
        "cls.dense.weight": (WIDTH, WIDTH),
        "cls.dense.bias": (WIDTH,),
        "cls.layer_norm.weight": (WIDTH,),
        "cls.layer_norm.bias": (WIDTH,),
        "cls.decoder.weight": (WORDS, WIDTH),
        "cls.decoder.bias": (WORDS,),
        "vis_cls.bias": (9,),
        "vis_cls.dense.weight": (WIDTH, WIDTH),
        "vis_cls.decoder.weight": (9, WIDTH),
        "feat_regress.weight": (WIDTH, FEATURES),
        "feat_regress.bias": (FEATURES,),
        "feat_regress.net.0.weight": (WIDTH, WIDTH),
        "feat_regress.net.2.weight": (WIDTH,),
        "region_classifier.net.0.weight": (WIDTH, WIDTH),
        "region_classifier.net.2.weight": (WIDTH,),
        "region_classifier.net.3.weight": (9, WIDTH),
        "itm_output.weight": (2, WIDTH),
        "itm_output.bias": (2,),
    }
    return rename(parts, names, {k: f"roberta.{v}" for k, v in BERT_LAYER.items()}) | extra(heads)


def as_volta(parts: dict, kind: str) -> dict:
    """VOLTA's, where what text and regions share has two names; with the heads of pretraining and a task."""
    e = "bert.embeddings"
    own = "new_token_type_embeddings" if kind == "uc2" else "token_type_embeddings"
    names = {
        "word": f"{e}.word_embeddings",
        "position": f"{e}.position_embeddings",
        "type": f"{e}.{own}",
        "region_type": f"{e}.image_token_type_embeddings",
        "norm": f"{e}.LayerNorm",
        "feature": f"{e}.image_embeddings",
        "location": f"{e}.image_location_embeddings",
        "feature_norm": f"{e}.image_layer_norm",
        "location_norm": f"{e}.image_location_layer_norm",
        "region_norm": f"{e}.v_LayerNorm",
        "pooler": "bert.t_pooler.dense",
        "region_pooler": "bert.v_pooler.dense",
    }
    weights = rename(parts, names, {k: f"bert.{v}" for k, v in VOLTA_LAYER.items()})
    for name in list(weights):
        *at, part, end = name.split(".")
        if at[:3] == ["bert", "encoder", "layer"]:
            weights[".".join([*at, f"v_{part}", end])] = weights[name]
    if kind in ("uc2", "muniter"):
        weights[f"{e}.image_token_type_embeddings.weight"] = parts["type"]
    heads = {
        "cls.predictions.bias": (WORDS,),
        "cls.predictions.transform.dense.weight": (WIDTH, WIDTH),
        "cls.predictions.decoder.weight": (WORDS, WIDTH),
        "cls.bi_seq_relationship.weight": (2, POOLED[kind]),
        "cls.imagePredictions.transform.dense.weight": (WIDTH, WIDTH),
        "clfs_dict.TASK15.logit_fc.0.weight": (WIDTH, WIDTH),
        "clfs_dict.TASK15.logit_fc.2.weight": (WIDTH,),
        "clfs_dict.TASK15.logit_fc.3.weight": (9, WIDTH),
    }
    return weights | extra(heads)


def as_m3p(parts: dict, at: str = "module.") -> dict:
    """M3P's own names after `at`, with all that it has and fine-tuning does not use."""
    layer = {
        "query": "attentions.{i}.q_lin",
        "key": "attentions.{i}.k_lin",
        "value": "attentions.{i}.v_lin",
        "attended": "attentions.{i}.out_lin",
        "attention_norm": "layer_norm1.{i}",
        "intermediate": "ffns.{i}.lin1",
        "output": "ffns.{i}.lin2",
        "output_norm": "layer_norm2.{i}",
    }
    names = {
        "word": "embeddings",
        "position": "position_embeddings",
        "norm": "layer_norm_emb",
        "feature": "image_embeddings.image_embeddings",
        "location": "image_embeddings.image_location_embeddings",
        "region_norm": "image_embeddings.LayerNorm",
        "pooler": "pooled_layer.dense",
    }
    square = (WIDTH, WIDTH)
    rest = {
        "cross_lang_embeddings.weight": (3, WIDTH),
        "image_embeddings.image_distbution_embeddings.weight": (WIDTH, 9),
        "refine_embeddings.layers.0.self_attn.linears.0.weight": square,
        "refine_embeddings.norm.weight": (WIDTH,),
        "cross_alignment.att_weight_c.weight": (1, WIDTH),
        "latent_transforms.0.x_to_mu.weight": square,
        "original_transforms.1.dense_mu.weight": square,
        "pooled_layer2.dense.weight": square,
        "seq_relationship.weight": (1, WIDTH),
        "seq_relationship2.weight": (1, WIDTH),
        "mrfr_dense.weight": (FEATURES, WIDTH),
        "transformer_obj.dense.weight": square,
        "pred_layer.proj.weight": (WORDS, WIDTH),
        "pred_obj_layer.proj.weight": (9, WIDTH),
    }
    rest |= {f"encoder_attn.{i}.q_lin.weight": square for i in range(LAYERS)}
    rest |= {f"layer_norm15.{i}.weight": (WIDTH,) for i in range(LAYERS)}
    weights = {f"{at}{name}": value for name, value in (rename(parts, names, layer) | extra(rest)).items()}
    return (
        weights
        if at == "module."
        else weights | extra({"bert.pooler.dense.weight": square, "bert.pooler.dense.bias": (WIDTH,)})
    )


def write(folder, weights, heads=HEADS):
    """A file of weights in a folder; the number of heads beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "weights.bin")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    return folder / "weights.bin"


def slow(
    kind: str, parts: dict, texts: list, regions: list, activation=torch.tanh, eps=1e-12, embedding_eps=1e-12
):
    """Pooled states (n, pooled) of texts (ids) and regions (R, f + 7), all rows padded to the longest and
    masked."""
    p = parts
    most, longest = max(map(len, regions)), max(map(len, texts))
    padding, lengths = PADDING[kind], [len(text) for text in texts]
    ids = torch.full((len(texts), longest), padding)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x, name, eps=embedding_eps):
        spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (
            p[f"{name}.weight"] * (x - x.mean(-1, keepdim=True)) / torch.sqrt(spread + eps)
            + p[f"{name}.bias"]
        )

    images = []
    for rows in regions:
        features, (x1, y1, x2, y2, w, h, area) = rows[:, :FEATURES], rows[:, FEATURES:].T
        where = torch.stack([x1, y1, x2, y2, w, h, area] if kind == "uc2" else [x1, y1, x2, y2, area], 1)
        if kind == "m3p":
            features = features / (features**2).sum(1, keepdim=True).sqrt()
            where = where / (where**2).sum(1, keepdim=True).sqrt()
            features, where = (F.pad(part, (0, 0, 0, SLOTS - len(rows))) for part in (features, where))
        if kind in ("xuniter", "muniter"):
            features = torch.cat([features.mean(0, keepdim=True), features])
            where = torch.cat([torch.tensor([[0.0, 0, 1, 1, 1]], dtype=where.dtype), where])
        if kind == "m3p":
            embedded = linear(features, "feature") + linear(where, "location")
        else:
            kinds = p["region_type"][0] if kind == "xuniter" else p["type"][1]
            parts_of = norm(linear(features, "feature"), "feature_norm") + norm(
                linear(where, "location"), "location_norm"
            )
            embedded = parts_of + kinds
        images.append(norm(embedded, "region_norm"))
    most = max(map(len, images))
    seen = torch.zeros(len(texts), longest + most, dtype=torch.bool)
    x = torch.zeros(len(texts), longest + most, WIDTH, dtype=torch.float64)
    if kind == "m3p":
        for row, (text, image) in enumerate(zip(texts, images, strict=True)):
            whole = torch.cat([image, p["word"][text]])
            x[row, : len(whole)] = norm(whole + p["position"][: len(whole)], "norm")
            seen[row, : len(whole)] = True
    else:
        there = (ids != padding).long() if kind != "muniter" else torch.ones_like(ids)
        places = (
            there.cumsum(1) * there + padding if kind != "muniter" else torch.arange(longest).expand_as(ids)
        )
        x[:, :longest] = norm(p["word"][ids] + p["position"][places] + p["type"][0], "norm")
        for row, image in enumerate(images):
            x[row, longest : longest + len(image)] = image
            seen[row, : lengths[row]] = seen[row, longest : longest + len(image)] = True
    hidden = torch.where(seen, 0.0, -math.inf)[:, None, None]
    for i in range(LAYERS):
        q, k, v = (
            linear(x, f"{i}.{n}").unflatten(2, (HEADS, -1)).transpose(1, 2) for n in ("query", "key", "value")
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + hidden).softmax(-1)
        x = norm(
            x + linear((weights @ v).transpose(1, 2).flatten(2), f"{i}.attended"), f"{i}.attention_norm", eps
        )
        x = norm(x + linear(F.gelu(linear(x, f"{i}.intermediate")), f"{i}.output"), f"{i}.output_norm", eps)
    pooled = activation(linear(x[:, 0], "pooler"))
    return (
        pooled * activation(linear(x[:, longest], "region_pooler")) if "region_pooler.weight" in p else pooled
    )
