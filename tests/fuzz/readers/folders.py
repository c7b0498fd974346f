"""Readers of published folders: what their small files say of a model (M-CLIP's towers, translation models,
the preparation of images), and Japanese VQA as its one published file."""

import json
import pickle
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import load_json, write_files, zip_of
from tests.fuzz.reader import Reader
from tests.fuzz.readers.formats import ja_vqa
from tests.fuzz.readers.weights import MEMORY, import_torch, import_transformers, load_torch, same_tensors

MCLIP = "raylib.models.mclip_weights"
BASE = {
    "model_type": "xlm-roberta",
    "vocab_size": 12,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 4,
    "max_position_embeddings": 10,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "hidden_act": "gelu",
}
DISTIL = {
    "model_type": "distilbert",
    "vocab_size": 12,
    "dim": 8,
    "n_heads": 2,
    "n_layers": 1,
    "hidden_dim": 4,
    "max_position_embeddings": 10,
}
QUESTIONS = ("何が見えますか?", "どこ?", "犬は何匹ですか?")


# ---- M-CLIP


def text_tensors() -> dict[str, Any]:
    import torch

    shapes = {
        "embeddings.word_embeddings.weight": (12, 8),
        "embeddings.position_embeddings.weight": (10, 8),
        "encoder.layer.0.intermediate.dense.bias": (4,),
    }
    return {name: torch.arange(float(torch.Size(n).numel())).reshape(n) for name, n in shapes.items()}


def example_mclip(folder: Path) -> Path:
    import torch

    data = folder / "model"
    data.mkdir()
    tensors = {f"transformer.{name}": value for name, value in text_tensors().items()}
    torch.save({**tensors, "LinearTransformation.weight": torch.ones(6, 8)}, data / "pytorch_model.bin")
    (data / "config.json").write_text(json.dumps({"model_type": "M-CLIP", "numDims": 6}))
    (data / "base_config.json").write_text(json.dumps(BASE))
    return data


def read_mclip(path: Path) -> Any:
    from raylib.models.mclip_weights import read_text_tower

    tower = read_text_tower(path)
    return tower.weights, tower.sizes["heads"], tower.sizes["eps"], tower.first


def load_mclip(path: Path) -> Any:
    tensors = load_torch(path / "pytorch_model.bin")
    own, base = load_json(path / "config.json"), load_json(path / "base_config.json")
    values = {**base, **{key: value for key, value in own.items() if key in BASE and value is not None}}
    heads, padding = values["num_attention_heads"], values.get("pad_token_id")
    assert type(heads) is int and heads > 0
    is_bert = values.get("model_type") == "bert"
    first = 0 if is_bert else 2 if padding is None else padding + 1
    weights = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    return weights, heads, values["layer_norm_eps"], first


def same_tower(values: Any, expected: Any) -> bool:
    return same_tensors(values[0], expected[0]) and tuple(values[1:]) == tuple(expected[1:])


def example_pickled_map(folder: Path) -> Path:
    import numpy as np
    import torch

    data = folder / "model"
    data.mkdir()
    torch.save({f"distilbert.{name}": value for name, value in text_tensors().items()}, data / "model.bin")
    (data / "model.bin").rename(data / "pytorch_model.bin")
    (data / "config.json").write_text(json.dumps(DISTIL))
    matrix, bias = np.arange(48, dtype=np.float32).reshape(8, 6), np.ones(6, np.float32)
    (data / "head.pkl").write_bytes(pickle.dumps([matrix, bias], protocol=4))
    return data


def read_pickled_map(path: Path) -> Any:
    from raylib.models.mclip_weights import read_text_tower

    tower = read_text_tower(path)
    weight, bias = (tower.weights[f"LinearTransformation.{part}"] for part in ("weight", "bias"))
    return weight.T.numpy().copy(), bias.numpy(), tower.sizes["heads"]


def load_pickled_map(path: Path) -> Any:
    import numpy as np

    # of a file that the product has accepted: it holds plain values alone
    value = pickle.loads((path / "head.pkl").read_bytes())
    matrix, bias = (np.asarray(part, np.float32) for part in value)
    assert np.isfinite(matrix).all() and np.isfinite(bias).all()
    return matrix, bias, load_json(path / "config.json")["n_heads"]


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 6,
        "vision_cfg": {"layers": 1, "width": 8, "head_width": 4, "patch_size": 4, "image_size": 8},
    },
    "preprocess_cfg": {"resize_mode": "shortest", "interpolation": "bicubic"},
}


def example_open_clip(folder: Path) -> Path:
    import torch

    data = folder / "model"
    data.mkdir()
    (data / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    block = "visual.transformer.resblocks.0.attn"
    tensors = {f"{block}.in_proj_bias": torch.arange(24.0), f"{block}.out_proj.bias": torch.ones(8)}
    torch.save({**tensors, "visual.proj": torch.ones(8, 6)}, data / "open_clip_pytorch_model.bin")
    return data


def read_open_clip(path: Path) -> Any:
    from raylib.models.mclip_weights import read_image_tower

    sizes, weights = read_image_tower(path)
    layer = "vision_model.encoder.layers.0.self_attn"
    parts = [weights[f"{layer}.{part}_proj.bias"] for part in ("q", "k", "v", "out")]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    return [*parts, weights["visual_projection.weight"]], [sizes[n] for n in (*names, "projection_dim")]


def load_open_clip(path: Path) -> Any:
    described = load_json(path / "open_clip_config.json")
    model = described.get("model_cfg", described)
    v = {"head_width": 64, **model["vision_cfg"]}
    sizes = [v["width"], v["layers"], v["width"] // v["head_width"], v["patch_size"], v["image_size"]]
    assert all(type(n) is int and n > 0 for n in (*sizes, model["embed_dim"]))
    tensors = load_torch(path / "open_clip_pytorch_model.bin")
    block = "visual.transformer.resblocks.0.attn"
    thirds = list(tensors[f"{block}.in_proj_bias"].chunk(3))
    return [*thirds, tensors[f"{block}.out_proj.bias"], tensors["visual.proj"].T.contiguous()], [
        *sizes,
        model["embed_dim"],
    ]


# ---- images as their model wants them


@cache
def some_image() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (11, 16, 3), np.uint8)


def read_prepared(path: Path) -> Any:
    import torch

    from raylib.data.images import preprocess_image
    from raylib.models.preprocessor import read_preprocessing
    from raylib.models.vision import normalize_pixels

    found = read_preprocessing(path, 8, None)
    if found is None:
        return None
    pixels = torch.from_numpy(preprocess_image(some_image(), 8, found.config))
    return normalize_pixels(pixels, found.pixel_mean, found.pixel_std, torch.float32).permute(2, 0, 1)


def load_prepared(path: Path) -> Any:
    """The image processor of `transformers` on the same image."""
    import transformers
    from PIL import Image

    values = load_json(path / "preprocessor_config.json")
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    if name is None:
        model_type = load_json(path / "config.json").get("model_type")
        kinds = {"clip": "CLIP", "siglip": "Siglip", "deit": "DeiT", "beit": "Beit"}
        name = kinds.get(str(model_type), "ViT")
    kind = re.match("CLIP|Siglip|ViT|DeiT|Beit", name)
    assert kind
    processor = getattr(transformers, f"{kind[0]}ImageProcessorPil").from_dict(values)
    return processor(Image.fromarray(some_image()), return_tensors="pt")["pixel_values"][0]


def is_close(values: Any, expected: Any) -> bool:
    import torch

    # a small deviation makes large numbers, which float32 has to seven digits
    return values.shape == expected.shape and torch.allclose(values, expected, rtol=1e-4, atol=1e-4)


def read_open_clip_prepared(path: Path) -> Any:
    from raylib.models.preprocessor import read_preprocessing

    found = read_preprocessing(path, 8, None)
    if found is None:
        return None
    return found.config.resize, found.config.resample, found.pixel_mean, found.pixel_std


def load_open_clip_prepared(path: Path) -> Any:
    values = load_json(path / "open_clip_config.json").get("preprocess_cfg") or {}
    # OpenAI's numbers, where the file has none
    mean = values.get("mean", (0.48145466, 0.4578275, 0.40821073))
    std = values.get("std", (0.26862954, 0.26130258, 0.27577711))
    colours = []
    for value in (mean, std):
        scaled = [255 * number for number in (value if isinstance(value, list | tuple) else [value] * 3)]
        colours.append(scaled[0] if len(set(scaled)) == 1 else scaled)
    is_square = values.get("resize_mode") == "squash"
    return "square" if is_square else "shortest_edge", values.get("interpolation", "bicubic"), *colours


def prepared_setup() -> None:
    import transformers

    import_torch()
    assert transformers.CLIPImageProcessorPil and transformers.ViTImageProcessorPil
    assert transformers.SiglipImageProcessorPil and transformers.DeiTImageProcessorPil
    assert transformers.BeitImageProcessorPil


# ---- languages of translation models


def example_languages(*marks: str, **config: Any) -> Callable[[Path], Path]:
    def example(folder: Path) -> Path:
        import transformers
        from tokenizers import Tokenizer, models

        words = ["<pad>", "</s>", "<unk>", *"abc", *marks]
        model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **names)
        fast.add_tokens(list(marks), special_tokens=True)
        fast.save_pretrained(folder / "model")
        (folder / "model" / "config.json").write_text(json.dumps({"model_type": "t5", **config}))
        return folder / "model"

    return example


def read_languages(path: Path) -> Any:
    from finetune.translator import load_tokenizer

    found = load_tokenizer(path)[1]
    return found.told_by, dict(found.tokens), dict(found.ids), sorted(found.prefixes.items())


def load_languages(path: Path) -> Any:
    values, config = load_json(path / "tokenizer.json"), load_json(path / "config.json")
    ids = {**values["model"]["vocab"], **{t["content"]: t["id"] for t in values["added_tokens"]}}
    unknown = json.loads((path / "tokenizer_config.json").read_bytes()).get("unk_token")
    marks = {}
    for pattern in ("<2(.+)>", ">>(.+)<<"):
        found = {m[1]: word for word in ids if word != unknown and (m := re.fullmatch(pattern, word))}
        marks = marks or found
    if marks:
        return "mark", marks, {code: ids[word] for code, word in marks.items()}, []
    tasks = config.get("task_specific_params")
    prefixes = {}
    for name, task in tasks.items() if isinstance(tasks, dict) else ():
        if match := re.fullmatch("translation_(.+)_to_(.+)", name):
            words = task.get("prefix", "") if isinstance(task, dict) else ""
            prefixes[match[1], match[2]] = words
    return "words" if prefixes else "", {}, {}, sorted(prefixes.items())


# ---- Japanese VQA


def read_ja_vqa_parts(path: Path) -> Any:
    from finetune.formats.answers import read_ja_vqa

    return {part: list(read_ja_vqa(path, part)) for part in ("train", "dev", "test")}


def load_ja_vqa_parts(path: Path) -> Any:
    return list(ja_vqa(path))


def same_dealt(values: Any, expected: Any) -> bool:
    """Each question is in one part, each image's in the same, and parts have the published shares."""
    rows = [tuple(example) for part in values.values() for example in part]
    images = {part: {example.images[0] for example in each} for part, each in values.items()}
    every = set().union(*images.values())
    is_dealt = len(every) == sum(map(len, images.values()))
    return is_dealt and sorted(map(repr, rows)) == sorted(repr(tuple(row)) for row in expected)


JA_VQA = [
    {"id": i, "qas": [{"qa_id": 8 * i + n, "question": QUESTIONS[n], "answer": "猫"} for n in range(3)]}
    for i in range(1, 6)
]
PREPARED = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 10},
    "crop_size": {"height": 8, "width": 8},
    "do_center_crop": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 0.2],
}
PREPROCESSOR = "raylib.models.preprocessor"
READERS = [
    Reader(
        name="mclip_text",
        example=example_mclip,
        read=read_mclip,
        oracle=load_mclip,
        agree=same_tower,
        compares="weights, heads, epsilon, where positions begin",
        covers=(f"{MCLIP}:read_text_tower", f"{MCLIP}:_base_config"),
        setup=import_torch,
    ),
    Reader(
        name="mclip_map",
        example=example_pickled_map,
        read=read_pickled_map,
        oracle=load_pickled_map,
        targets=("head.pkl", "config.json"),
        compares="the linear map, heads",
        covers=(f"{MCLIP}:_read_map",),
        setup=import_torch,
    ),
    Reader(
        name="mclip_open_clip",
        example=example_open_clip,
        read=read_open_clip,
        oracle=load_open_clip,
        targets=("open_clip_config.json",),
        compares="some weights, sizes",
        covers=(f"{MCLIP}:_read_open_clip",),
        setup=import_torch,
    ),
    *(
        Reader(
            name=f"preprocessor{name}",
            example=write_files({"preprocessor_config.json": json.dumps(values), "config.json": config}),
            read=read_prepared,
            oracle=load_prepared,
            agree=is_close,
            compares="an image",
            covers=(f"{PREPROCESSOR}:read_preprocessing", f"{PREPROCESSOR}:_find_kind"),
            setup=prepared_setup,
            memory=MEMORY,
        )
        for name, values, config in (
            ("", PREPARED, "{}"),
            ("_by_config", {"size": 8, "resample": 2}, json.dumps({"model_type": "beit"})),
        )
    ),
    Reader(
        name="preprocessor_open_clip",
        example=write_files({"open_clip_config.json": json.dumps(OPEN_CLIP), "note.txt": "x"}),
        read=read_open_clip_prepared,
        oracle=load_open_clip_prepared,
        targets=("open_clip_config.json",),
        covers=(f"{PREPROCESSOR}:_read_open_clip",),
    ),
    *(
        Reader(
            name=f"translator_{name}",
            example=example,
            read=read_languages,
            oracle=load_languages,
            covers=("finetune.translator:load_tokenizer", "finetune.translator:_languages"),
            setup=import_transformers,
            memory=MEMORY,
        )
        for name, example in (
            ("marks", example_languages("<2de>", "<2en>", ">>x<<")),
            ("words", example_languages(task_specific_params={"translation_en_to_de": {"prefix": "to: "}})),
        )
    ),
    Reader(
        name="ja_vqa_parts",
        example=write_files({"question_answers.json.zip": zip_of("a.json", json.dumps(JA_VQA))}),
        read=read_ja_vqa_parts,
        oracle=load_ja_vqa_parts,
        agree=same_dealt,
        compares="the questions of all parts together",
        covers=("finetune.formats.answers:_images_of_part", "finetune.formats.answers:read_ja_vqa"),
    ),
]
