"""Fixtures: the sample corpus, and settings of a run small enough to repeat many times."""

import json
import os
import shutil
import signal

import pytest

# before Ray is imported: poll reports often, so that a checkpoint costs 0.2 s and not 2
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# of clusters that tests start by themselves; the product gives it to its own (`raylib.ray_cluster.RAY_ENV`)
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

MINI = [
    "model.width=32",
    "model.heads=2",
    "model.feedforward=64",
    "model.text_layers=1",
    "model.vision_layers=1",
    "model.image_size=16",
    "model.patch=8",
    "data.image_text.batch=16",
    "data.test_sets={}",
    "data.parallel.batch=16",
    "data.text.batch=8",
    "objective.fuse_every=2",
    "fit.steps=6",
    "fit.log_every=1",
    "fit.save_every=2",
    "fit.eval_every=0",
    "fit.keep=9",
    "fit.bf16=false",
    "fit.loader_workers=0",
    "optim.lr=0.01",
]

QUICK = [
    "batch=16",
    "image_size=16",
    "fit.bf16=false",
    "fit.loader_workers=0",
    "fit.log_every=1",
    "freeze=[]",
    "extra_tests={}",
    "shuffled_images=false",
]


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(items):
    """Keep each file's tests on one worker of `pytest -n`, for their fixtures, and all clusters on one, which
    begins with them: they take longest, and two at once would not have the cores that they count on."""
    for item in items:
        if any(mark.kwargs.get("reason") == "needs a GPU" for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("ray",))


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}


@pytest.fixture(autouse=True)
def signal_handlers():
    """Those that Ray and Tune leave in the process go, also where a module's fixture has started them: a
    child that another test forks would meet them, and may outlive SIGTERM."""
    _restore_handlers()
    yield
    _restore_handlers()


def _restore_handlers():
    for number, handler in HANDLERS.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder of the runs that an earlier version stored (`test_stored_runs` says which)."""
    from tests.factories import extract_stored_runs

    folder = tmp_path_factory.mktemp("stored")
    extract_stored_runs(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The sample corpus, built once."""
    from pretrain.corpora import build_sample_corpus

    return build_sample_corpus(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def retrieval_set(tmp_path_factory):
    """Twenty drawings with captions.json in three languages, one image without German."""
    from raylib.sample import read_concept_captions, read_images

    folder = tmp_path_factory.mktemp("retrieval")
    records = []
    for i, (key, image) in enumerate(list(read_images("fluent").items())[:20]):
        (folder / f"{key}.png").write_bytes(image)
        captions = {language: read_concept_captions(language)[key].name for language in ("en", "de", "zh")}
        if i == 3:
            del captions["de"]
        records.append({"image": f"{key}.png", "captions": captions})
    (folder / "captions.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture
def mini(tmp_path, corpus, retrieval_set):
    """`mini(*settings)` -> a config of a few steps, float32, dropout 0, in this test's own folder; of `tiny`,
    or of one of its variants."""
    from pretrain.recipes import RECIPES
    from raylib.config import override

    def build(*settings, recipe="tiny"):
        own = [f"runs={tmp_path}", f"corpus={corpus}", f"data.retrieval={retrieval_set}"]
        return override(RECIPES[recipe](), [*MINI, *own, *settings])

    return build


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small miniature IGLUE."""
    from raylib.sample.scenes.writer import ScenesConfig, write_scenes

    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, ScenesConfig(train=60, dev=12, test=60, shots=5))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small random model, exported."""
    from raylib.sample import DATA
    from tests.factories import make_model

    folder = tmp_path_factory.mktemp("model") / "export"
    make_model(vocabulary=12000, positions=64, dropout=0.1).float().save(folder)
    shutil.copy2(DATA / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def library(tmp_path_factory, model):
    """A folder as users of the library have it: runs/sample (stored by an earlier version, as are its export
    sample_model, sample_xvnli, sample_xflickrco and sample_few_shot), random models fine-tuned on questions
    (sample_xgqa, of a decoder sample_decoder) and on two images (sample_marvl); images/, cat.png, dog.png."""
    from raylib.models.decoder import encode_answers
    from raylib.models.finetuned import FinetuneModel
    from raylib.sample import read_concept_captions, read_images
    from raylib.text import Tokenizer
    from tests.factories import extract_stored_runs, make_model

    folder = tmp_path_factory.mktemp("library")
    extract_stored_runs(folder)
    runs = folder / "runs"
    (folder / "model").rename(runs / "sample_model")
    names = {"pretrained": "sample", "classified": "sample_xvnli", "retrieved": "sample_xflickrco"}
    for old, new in {**names, "few_shot": "sample_few_shot"}.items():
        (runs / old).rename(runs / new)
    answers, tokenizer = ("red", "blue", "a cat", "yes", "no"), Tokenizer.load(model)
    for name, labels, images, ids in (
        ("xgqa", answers, 1, None),
        ("decoder", answers, 1, encode_answers(answers, tokenizer)),
        ("marvl", ("False", "True"), 2, None),
    ):
        backbone = make_model(vocabulary=12000, positions=64).float()
        FinetuneModel(backbone, labels, images, 0.1, answers=ids).eval().save(runs / f"sample_{name}")
        shutil.copy2(tokenizer.path, runs / f"sample_{name}")
    (folder / "images").mkdir()
    captions = read_concept_captions("en")
    for key, image in list(read_images("fluent").items())[:8]:
        (folder / "images" / f"{key}.png").write_bytes(image)
    drawings = {captions[key].name: image for key, image in read_images("fluent").items()}
    for name in ("cat", "dog", "house"):
        (folder / f"{name}.png").write_bytes(drawings[name])
    return folder


@pytest.fixture
def finetune(tmp_path, model, scenes, capsys):
    """`finetune(recipe, *settings)` -> (exit code, what was printed), of a few steps in this test's own
    folder."""
    from finetune.__main__ import main

    own = [
        f"model={model}",
        f"data={scenes}",
        f"runs={tmp_path}",
        "epochs=2",
        'languages=["en","ru"]',
        *QUICK,
    ]

    def run(recipe, *settings):
        code = main([recipe, *own, *settings])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run
