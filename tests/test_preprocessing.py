"""Preparation of images as published models want it: `preprocessor_config.json` against the image processors
of `transformers` (their Pillow versions), on images that are no squares."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import (
    BeitImageProcessorPil,
    CLIPImageProcessorPil,
    DeiTImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from finetune.config import FinetuneConfig
from finetune.stores.images import ImageSource, open_images
from pretrain.config import InitConfig, PretrainConfig
from pretrain.train import build_model
from raylib.config import dump_config, load_config
from raylib.data.images import preprocess_image, resize_image
from raylib.errors import UserError
from raylib.models.finetuned import load_backbone
from raylib.models.preprocessor import read_preprocessing
from raylib.models.vision import normalize_pixels
from raylib.settings import CLIP_MEAN, IMAGENET_MEAN, SQUEEZED, ModelConfig, PreprocessConfig
from tests.factories import CLIP_VISION, make_clip, xlmr_config

PHOTO = load_sample_image("china.jpg")  # 427 x 640
SHAPES = [
    PHOTO,
    PHOTO[:, :200],
    PHOTO[:60, :33],
    PHOTO[:10, :12],
    PHOTO[:300, :400],
    PHOTO[:225, :640],
    PHOTO[::2, ::2],
    PHOTO[:224, :224],
]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = [
    (CLIPImageProcessorPil, {}, 224),
    (CLIPImageProcessorPil, {"size": 336, "crop_size": 336}, 336),
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 200}}, 224),  # padded
    (CLIPImageProcessorPil, {"do_rescale": False}, 224),
    (CLIPImageProcessorPil, {"do_normalize": False}, 224),
    (CLIPImageProcessorPil, {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "resample": 1}, 224),
    (DeiTImageProcessorPil, IMAGENET, 224),
    (SiglipImageProcessorPil, {}, 224),
    (ViTImageProcessorPil, {}, 224),
    (ViTImageProcessorPil, {"size": {"height": 384, "width": 384}, "resample": 3, **IMAGENET}, 384),
    (BeitImageProcessorPil, {"do_center_crop": True, "size": 256}, 224),
]


def prepare(image, size, preprocessing):
    """As models see it: (3, size, size)."""
    pixels = torch.from_numpy(preprocess_image(np.ascontiguousarray(image), size, preprocessing.config))
    stats = preprocessing.pixel_mean, preprocessing.pixel_std
    return normalize_pixels(pixels, *stats, torch.float32).permute(2, 0, 1)


def write(folder, values, name="preprocessor_config.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


def expected(processor, image):
    found = processor(Image.fromarray(np.ascontiguousarray(image)), return_tensors="pt")
    return found["pixel_values"][0]


@pytest.mark.parametrize(
    ("kind", "settings", "size"), PROCESSORS, ids=lambda v: v.__name__ if isinstance(v, type) else None
)
def test_preprocessing_equals_the_image_processor_of_transformers(tmp_path, kind, settings, size):
    processor = kind(**settings)
    processor.save_pretrained(tmp_path)
    found = read_preprocessing(tmp_path, size, None)
    for image in SHAPES:
        torch.testing.assert_close(prepare(image, size, found), expected(processor, image), rtol=0, atol=1e-5)
    # a few fields alone mean the processor's defaults
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    few = {k: v for k, v in settings.items()} | {"image_processor_type": written["image_processor_type"]}
    assert read_preprocessing(write(tmp_path / "few", few), size, None) == found


def test_preprocessing_of_older_files_equals_that_of_transformers(tmp_path):
    old = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    for name, values in {
        "CLIP": {**old, "size": 224, "feature_extractor_type": "CLIPFeatureExtractor"},
        "DeiT": {**old, **IMAGENET, "size": 256, "feature_extractor_type": "DeiTFeatureExtractor"},
        "ViT": {"size": 224, "resample": 2, "feature_extractor_type": "ViTFeatureExtractor"},
        "Beit": {
            **{**old, "do_center_crop": False, "size": 224, "resample": 2},
            "image_processor_type": "BeitImageProcessor",
        },
        "clip": {**old, "size": 224},  # config.json says of which kind
    }.items():
        folder = write(tmp_path / name, values)
        write(folder, {"model_type": "clip"}, "config.json") if name == "clip" else None
        peer = getattr(transformers, f"{name.replace('clip', 'CLIP')}ImageProcessorPil")
        processor = peer.from_pretrained(folder)
        found = read_preprocessing(folder, 224, None)
        for image in SHAPES[:3]:
            torch.testing.assert_close(
                prepare(image, 224, found), expected(processor, image), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("CLIP", {"size": [224, 224]}),  # a list is height and width, whatever a number would be
        ("Siglip", {"size": [224, 224], "default_to_square": False}),
        ("DeiT", {"size": 224, "do_center_crop": None, "crop_size": None}),  # null: left out
        ("ViT", {"do_normalize": None, "image_mean": None, "image_std": None}),
        ("Beit", {"do_rescale": None, "rescale_factor": None, "do_center_crop": None}),
        ("CLIP", {"size": 240, "default_to_square": None}),
    ],
)
def test_preprocessing_of_lists_and_nulls_equals_that_of_transformers(tmp_path, name, values):
    write(tmp_path, {"image_processor_type": f"{name}ImageProcessor", **values})
    processor = getattr(transformers, f"{name}ImageProcessorPil").from_pretrained(tmp_path)
    found = read_preprocessing(tmp_path, 224, None)
    for image in SHAPES[:3]:
        torch.testing.assert_close(
            prepare(image, 224, found).double(), expected(processor, image).double(), rtol=0, atol=1e-5
        )


def test_preprocessing_is_that_of_the_file_which_transformers_reads_first(tmp_path):
    """A processor of images and texts, where it says how images are prepared, before the older file."""
    values = {"image_processor_type": "CLIPImageProcessor"}
    write(tmp_path, {**values, "resample": 2})
    write(tmp_path, {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert read_preprocessing(tmp_path, 224, None).config.resample == "bilinear"
    inside = {"processor_class": "CLIPProcessor", "image_processor": {**values, "resample": 1}}
    write(tmp_path, inside, "processor_config.json")
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    found = read_preprocessing(tmp_path, 224, None)
    torch.testing.assert_close(prepare(PHOTO, 224, found), expected(processor, PHOTO), rtol=0, atol=1e-5)
    write(tmp_path, {"image_processor": [1]}, "processor_config.json")
    with pytest.raises(UserError, match=r"processor_config\.json: image_processor is \[1\]"):
        read_preprocessing(tmp_path, 224, None)
    # a folder of CLIP's image tower alone, whose file names no processor
    tower = write(tmp_path / "tower", {"size": 224, "crop_size": 224})
    write(tower, {"model_type": "clip_vision_model"}, "config.json")
    assert read_preprocessing(tower, 224, None).pixel_mean == pytest.approx(CLIP_MEAN)


def test_preprocessing_of_a_processors_file_and_of_open_clip_is_read(tmp_path):
    processor = CLIPImageProcessorPil()
    inside = {"processor_class": "CLIPProcessor", "image_processor": processor.to_dict()}
    found = read_preprocessing(write(tmp_path / "a", inside, "processor_config.json"), 224, None)
    torch.testing.assert_close(prepare(PHOTO, 224, found), expected(processor, PHOTO), rtol=0, atol=1e-5)
    cfg = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "resize_mode": "squash",
        "interpolation": "bilinear",
        "size": [240, 240],
    }
    folder = write(tmp_path / "b", {"preprocess_cfg": cfg}, "open_clip_config.json")
    assert read_preprocessing(folder, 240, None) == (PreprocessConfig(resample="bilinear"), 127.5, 127.5)
    plain = read_preprocessing(write(tmp_path / "c", {"model_cfg": {}}, "open_clip_config.json"), 240, None)
    assert plain == (PreprocessConfig(resize="shortest_edge", resample="bicubic"), *found[1:])
    write(folder, {"preprocess_cfg": {"resize_mode": "longest"}}, "open_clip_config.json")
    with pytest.raises(UserError, match="preprocess_cfg.resize_mode is 'longest', which may change pixels"):
        read_preprocessing(folder, 240, None)
    assert read_preprocessing(tmp_path, 224, None) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_processor_type": "BlipImageProcessor"}, "'BlipImageProcessor' is none of CLIP, Siglip, ViT"),
        ({"do_pad": True}, "do_pad is True, which may change pixels, and is not computed here"),
        ({"crop_pct": 0.875}, "crop_pct is 0.875, which may change pixels"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
        ({"do_resize": False}, "do_resize is false, and images come in all sizes"),
        ({"size": {"height": 224, "width": 300}}, "a square of pixels is wanted"),
        ({"size": {"shortest_edge": 224, "longest_edge": 400}}, "a square of pixels is wanted"),
        ({"size": "large"}, "size is 'large'"),
        ({"size": {"shortest_edge": True}}, "where pixels are wanted"),
        ({"do_center_crop": False}, "without a crop makes images of all shapes"),
        ({"crop_size": 336}, "it makes images of 336 pixels, .* image_size=224"),
        ({"resample": 9}, "resample is 9, where a filter of Pillow's is wanted"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"resample": None}, "resample is None"),
        ({"size": None}, "size is None"),
        ({"image_mean": None}, "image_mean is None"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .* a number for each colour"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .* above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0, where a number above 0"),
        ({"do_rescale": "yes"}, "do_rescale is 'yes', where true or false is wanted"),
    ],
)
def test_preprocessing_that_is_not_computed_is_one_line(tmp_path, changes, words):
    values = {"image_processor_type": "CLIPImageProcessor", **changes}
    with pytest.raises(UserError, match=words) as error:
        read_preprocessing(write(tmp_path, values), 224, None)
    assert str(error.value).startswith(f"{tmp_path}/preprocessor_config.json: ") and "\n" not in str(
        error.value
    )
    fine = {"image_processor_type": "CLIPImageProcessor", "do_pad": None, "crop_pct": False}
    assert read_preprocessing(write(tmp_path, fine), 224, None)


def test_clip_sees_the_centre_of_images_as_transformers_does(tmp_path):
    """From a folder of images to vectors, with a `preprocessor_config.json` and without: CLIP's own."""
    torch.manual_seed(0)
    clip = make_clip()
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "images").mkdir()
    for i, image in enumerate(SHAPES[:4]):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "images" / f"{i}.png")
    for settings in ({}, {"size": {"shortest_edge": 20}, "resample": 2, **IMAGENET}):
        processor = CLIPImageProcessorPil(**{"size": 16, "crop_size": 16, **settings})
        if settings:
            processor.save_pretrained(tmp_path / "clip")
        model = load_backbone(tmp_path / "clip", "clip").eval()
        source = ImageSource(open_images(tmp_path / "images"), 16, preprocess=model.preprocess)
        pixels = torch.stack([expected(processor, image) for image in SHAPES[:4]])
        with torch.inference_mode():
            found = model.encode_images(source.read("0123")["images"]).values
            peer = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(found, peer, rtol=1e-4, atol=1e-5)
        # what is stored with the weights reads images the same
        model.save(tmp_path / f"own{len(settings)}")
        again = load_backbone(tmp_path / f"own{len(settings)}")
        assert again.describe_preprocessing() == model.describe_preprocessing()
    assert again.describe_preprocessing() == {
        "resize": "shortest_edge",
        "resize_to": 20,
        "resample": "bilinear",
        "crop": 16,
        "pixel_mean": pytest.approx(IMAGENET_MEAN),
        "pixel_std": pytest.approx([255 * v for v in IMAGENET["image_std"]]),
    }
    squeezed = load_backbone(tmp_path / "clip", "clip", preprocessing="opencv")
    assert squeezed.preprocess == squeezed.config.preprocess == SQUEEZED and squeezed.pixel_mean == CLIP_MEAN


def test_deit_folder_is_normalised_as_its_file_says(tmp_path):
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=96)
    vit = transformers.ViTModel(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False
    ).eval()
    vit.save_pretrained(tmp_path / "vit")
    processor = DeiTImageProcessorPil(size=36, crop_size=32, **IMAGENET)
    processor.save_pretrained(tmp_path / "vit")
    transformers.XLMRobertaModel(xlmr_config()).save_pretrained(tmp_path / "text")
    model = load_backbone(tmp_path / "text", "unified", str(tmp_path / "vit")).eval()
    pixels = preprocess_image(PHOTO, 32, model.preprocess)
    with torch.inference_mode():
        found = model.encode_images(torch.from_numpy(pixels[None])).values
        peer = vit(pixel_values=expected(processor, PHOTO)[None]).last_hidden_state[0]
    torch.testing.assert_close(found, peer, rtol=1e-4, atol=1e-5)
    model.resize_images(48)  # the crop keeps its share
    assert model.describe_preprocessing()["resize_to"] == 54
    assert model.config.preprocess == model.preprocess


def test_stored_settings_and_models_without_preprocessing_squeeze_images(tmp_path):
    config = FinetuneConfig(task="xvnli")
    (tmp_path / "config.json").write_text(dump_config(config))
    assert load_config(FinetuneConfig, tmp_path / "config.json").preprocessing == "model"
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["preprocessing"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_config(FinetuneConfig, tmp_path / "config.json").preprocessing == "opencv"
    (tmp_path / "mine.yaml").write_text("task: xvnli\nbatch: 8\n")
    assert load_config(FinetuneConfig, tmp_path / "mine.yaml").preprocessing == "model"
    make_clip().save_pretrained(tmp_path / "clip")
    load_backbone(tmp_path / "clip", "clip").save(tmp_path / "own")
    described = json.loads((tmp_path / "own" / "config.json").read_text())
    assert described.pop("preprocess")["resize"] == "shortest_edge"
    del described["pixel_mean"], described["pixel_std"]
    (tmp_path / "own" / "config.json").write_text(json.dumps(described))
    old = load_backbone(tmp_path / "own")
    assert old.preprocess == SQUEEZED and old.pixel_mean == CLIP_MEAN
    assert np.array_equal(preprocess_image(PHOTO, 16, old.preprocess), resize_image(PHOTO, 16))
    assert CLIP_VISION["image_size"] == old.image_size


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "processor_config.json", "open_clip_config.json"]
)
def test_preprocessing_file_that_cannot_be_read_is_no_missing_one(name, tmp_path):
    """A link to what no download has brought, a folder: the default would be other numbers without a word."""
    (tmp_path / name).symlink_to(tmp_path / "blobs" / "0")
    with pytest.raises(UserError, match=name):
        read_preprocessing(tmp_path, 224, None)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=name):
        read_preprocessing(tmp_path, 224, None)


def test_preprocessing_of_a_kind_whose_config_cannot_be_read_is_refused(tmp_path):
    write(tmp_path, {"size": 224, "default_to_square": True})
    (tmp_path / "config.json").symlink_to(tmp_path / "blobs" / "0")
    with pytest.raises(UserError, match="/config.json"):
        read_preprocessing(tmp_path, 224, None)


def test_pretraining_is_not_stopped_by_a_preprocessing_that_it_does_not_use(tmp_path, capsys):
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=96)
    vit = transformers.ViTModel(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False
    )
    vit.save_pretrained(tmp_path)
    write(tmp_path, {"image_processor_type": "BitImageProcessor", "size": 32})
    small = dict(vocabulary=40, width=64, heads=1, feedforward=96, image_size=32, patch=16)
    model = ModelConfig(**small, text_layers=1, fusion_layers=1, vision_layers=1)
    config = PretrainConfig(
        model=model, init=InitConfig(vision=str(tmp_path)), data={"tokenizer": "x"}, fit={"steps": 1}
    )
    build_model(config)
    told = capsys.readouterr().out
    assert f"note: {tmp_path}: its preprocessor_config.json prepares images otherwise (" in told
    assert "'BitImageProcessor' is none of CLIP" in told and "model.pixel_mean=" in told
