"""Fine-tuning runs of single-stream backbones from the command line, on region features."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.__main__ import main
from raylib.checkpoint import find_best
from raylib.sample import DATA
from tests import published
from tests.test_finetune_models import error, regions_of, text_folder, write_regions


@pytest.fixture
def finetune(tmp_path, scenes, capsys):
    """`finetune(task, *settings)` -> (result.json or None, what was printed)."""

    def run(task, *settings):
        own = [
            f"data={scenes}",
            f"runs={tmp_path}",
            "name=run",
            "batch=16",
            "epochs=2",
            'languages=["en","ru"]',
            "fit.bf16=false",
            "fit.loader_workers=0",
            "extra_tests={}",  # whose images are others
        ]
        code = main([f"scenes_{task}", *own, *settings])
        captured = capsys.readouterr()
        result = json.loads((tmp_path / "run" / "result.json").read_text()) if code == 0 else None
        return result, captured.out + captured.err

    return run


@pytest.mark.parametrize(
    ("backbone", "kind", "store", "task"),
    [("uc2", "xlmr", "lmdb", "xgqa"), ("muniter", "bert", "h5", "marvl"), ("m3p", "xlmr", "npz", "xvnli")],
)
def test_single_stream_from_text_folder_runs_end_to_end(
    finetune, tmp_path, scenes, backbone, kind, store, task
):
    """Trained, evaluated, read again and gone on from."""
    text = text_folder(tmp_path / "text", kind)
    path = write_regions(tmp_path, store, regions_of(scenes, task))
    settings = [f"regions={path}", f"backbone={backbone}"]
    found, printed = finetune(task, f"model={text}", *settings, 'freeze=["embeddings"]')
    assert found, printed
    assert set(found["accuracy"]) == {"en", "ru"} and found["trainable"] < found["params"]
    weights = load_file(find_best(tmp_path / "run") / "model.safetensors")
    assert weights["backbone.regions.feature.weight"].shape[1] == 6 and not any(
        name.startswith("regions.") for name in weights
    )
    word = load_file(text / "model.safetensors")
    word = next(value for name, value in word.items() if name.endswith("word_embeddings.weight"))
    assert weights["backbone.embedding.word.weight"].equal(word)  # frozen: as it was read
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"] == found["accuracy"]


def test_single_stream_from_published_weights_runs_with_strategies(finetune, tmp_path, scenes):
    """UC2's own file with a tokenizer beside it; in bf16, pruned by one round, and unfrozen layer by
    layer."""
    parts = published.make_parts("uc2")
    parts["word"], parts["position"] = torch.randn(12000, published.WIDTH), torch.randn(66, published.WIDTH)
    file = published.write(tmp_path / "uc2", {k: v.float() for k, v in published.as_uc2(parts).items()})
    shutil.copy2(DATA / "tokenizer.model", file.parent)
    path = write_regions(tmp_path, "npz", regions_of(scenes, "xgqa"))
    found, printed = finetune(
        "xgqa",
        f"model={file}",
        "backbone=uc2",
        f"regions={path}",
        "freeze=[]",
        "strategies.sparse.rounds=1",
        "strategies.unfreezing.layers=1",
        "fit.bf16=true",
    )
    assert found, printed
    assert found["sparsity_prunable"] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("xgqa", [], "regions= is missing: uc2 sees region features, not images"),
        (
            "xgqa",
            ['extra_tests={"style": "test_style"}'],
            "extra_tests.style=test_style: it has images of its own",
        ),
        ("xflickrco", [], "retrieval encodes texts and images apart; uc2 reads them together"),
        ("xgqa", ['freeze=["vision"]'], "uc2 has no part 'vision'; it has: embeddings"),
        ("xgqa", ["vision=/nowhere"], "vision= is for backbones with an image encoder"),
    ],
)
def test_single_stream_wrong_settings_are_one_line_errors(finetune, tmp_path, scenes, task, settings, words):
    text = text_folder(tmp_path / "text", "xlmr")
    if settings:
        settings = [*settings, f"regions={write_regions(tmp_path, 'npz', regions_of(scenes, 'xgqa'))}"]
    found, printed = finetune(task, f"model={text}", "backbone=uc2", *settings)
    assert found is None and words in error(printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind", "task"),
    [
        ("uc2", "xlmr", "xgqa"),
        ("xuniter", "xlmr", "xvnli"),
        ("muniter", "bert", "marvl"),
        ("m3p", "xlmr", "xgqa"),
    ],
)
def test_rows_of_iglue_run_one_after_the_other(tmp_path, scenes, model, kind, task):
    """Trained on English; from there few-shot, and tested on translations into English."""
    text = text_folder(tmp_path / "text", kind)
    shots = 4 if task == "marvl" else 5
    more = [("shots", "ru"), *([("shots_dev", "ru")] if task == "xgqa" else [])]
    records = regions_of(scenes, task, more, f"shots={shots}")
    path = write_regions(tmp_path, "h5", records)
    own = [
        *(f"data={scenes}", f"regions={path}", f"runs={tmp_path}", "runtime=local", "epochs=1", "batch=16"),
        *("fit.bf16=false", "fit.loader_workers=0"),
    ]
    chain = {
        f"iglue_{model}_{task}": [f"model={text}", "languages=en,ru"],
        f"iglue_{model}_few_shot_{task}": [f"model={tmp_path / 'english'}", "languages=ru", f"shots={shots}"],
        f"iglue_{model}_translate_test_{task}": [f"model={tmp_path / 'english'}", "languages=en,ru"],
    }
    found = {}
    for recipe, settings in chain.items():
        name = "english" if not found else recipe
        assert main([recipe, *own, f"name={name}", *settings]) == 0
        found[recipe] = json.loads((tmp_path / name / "result.json").read_text())
    english, few, translated = found.values()
    assert few["setting"] == "few_shot" and set(few["accuracy"]) == {"ru"} and few["steps"] > 0
    assert translated["setting"] == "translate_test" and translated["steps"] == 0
    assert translated["accuracy"]["en"] == english["accuracy"]["en"]
