"""Any number of workers: engines, the order of gradients, and whole runs, beside one process."""

import contextlib
import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.device import GPU
from benchmarks.dry import dry_run
from pretrain.evaluate import ZeroShotRetrieval
from pretrain.recipes import RECIPES
from raylib import checkpoint
from raylib.config import override
from raylib.data.loading import to_device
from raylib.engine import TorchEngine
from raylib.engine_zero import DeepSpeedEngine
from raylib.models import layers
from raylib.models.recompute import set_recomputation
from raylib.models.unified import UnifiedModel
from raylib.monitoring import read_metrics
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from raylib.sample import DATA
from raylib.settings import OptimConfig
from raylib.text import Tokenizer
from tests.factories import SMALL, make_batch, make_model, take_rows
from tests.test_pretrain import torchrun, without_rate
from tests.workers import run_workers

CPU = torch.device("cpu")
SIZES = (11, 8, 7)  # pairs, translations, mono, of which neither 2, 3 nor 5 workers have equal shares


def without_words(batch: dict, rows: int) -> dict:
    """The batch with masked words in the first sentences of plain text alone."""
    text = batch["text"]["text"]
    end = text.lengths[:rows].sum()
    kept = text.positions < end
    masked = torch.where(torch.arange(len(text.clean)) < end, text.masked, text.clean)
    text = text._replace(masked=masked, positions=text.positions[kept], labels=text.labels[kept])
    return {**batch, "text": {**batch["text"], "text": text}}


def train(engine_class, rank, world, streams, chunk):
    """The last terms of three steps of this worker's rows, and the weights after them."""
    layers.CHUNK = chunk
    model = make_model(dtype=torch.float32)
    engine = engine_class(
        UnifiedObjective(model, ObjectiveConfig(), streams), OptimConfig(), CPU, False, None
    )
    for step in range(3):
        batch = without_words(make_batch(step, *SIZES), 4)
        batch = {name: part for name, part in batch.items() if name in (*streams, "step")}
        terms = engine.step(take_rows(batch, rank, world), step, 1e-3)
    return terms, {name: value.detach().clone() for name, value in model.state_dict().items()}


ALL = ("image_text", "parallel", "text")
CASES = {
    "all streams": (ALL, 2**23),
    # the last workers have no masked word, and so no output of the unified encoder at all
    "a worker without words": (("text",), 2**23),
    # some workers' rows pass the encoders in several chunks, others' in one
    "chunks": (ALL, 40 * SMALL.feedforward),
}


def train_both_ways(rank, world):
    os.environ["LOCAL_RANK"] = str(rank)
    return {
        (name, engine.name): train(engine, rank, world, *case)
        for name, case in CASES.items()
        for engine in (TorchEngine, DeepSpeedEngine)
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize("world", [pytest.param(2, marks=SLOW), 3, pytest.param(5, marks=SLOW)])
def test_engines_on_any_number_of_workers_equal_one_process(world):
    found = run_workers(train_both_ways, world)
    for name, case in CASES.items():
        terms, weights = train(TorchEngine, 0, 1, *case)
        for engine in ("torch", "deepspeed"):
            for of_worker in found:
                others, moved = of_worker[name, engine]
                for key, value in terms.items():
                    assert float(others[key]) == pytest.approx(float(value), rel=1e-4), (name, engine, key)
                # AdamW moves a weight whose gradient is 0 but for rounding, as that of keys' biases
                used = [key for key in weights if not key.endswith("key_value.bias")]
                trained = [key for key in used if name != "a worker without words" or is_of_text(key)]
                errors = torch.cat([(moved[key] - weights[key]).flatten() for key in trained])
                assert float(errors.abs().mean()) < 1e-6, (name, engine)


def is_of_text(name: str) -> bool:
    """True of a parameter that a stream of plain text alone trains; ZeRO decays the others too."""
    return name.split(".")[0] in ("embedding", "text", "fusion", "masked_head") and ".cross_" not in name


def order_of_gradients(batch, chunk=2**23, recomputation=("none", 1), device=CPU, **config):
    """Names of the parameters, as backward reaches them."""
    layers.CHUNK = chunk
    if device == CPU:
        model = make_model()
    else:
        with torch.device("meta"):
            model = UnifiedModel(SMALL)
    model.to(device).train()
    set_recomputation(model, *recomputation)
    objective, found = UnifiedObjective(model, ObjectiveConfig(**config)), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
    objective(to_device(batch, device))[0].backward()
    return found


@pytest.mark.parametrize(
    ("device", "pieces", "config"),
    [
        (CPU, 1, {}),
        (CPU, 1, {"itm_text": "clean", "ucl_text": "masked", "fuse_every": 3}),
        (CPU, 3, {"itm_text": "clean"}),
        pytest.param(GPU, 3, {}, marks=SLOW),
    ],
)
def test_gradients_come_in_one_order_whatever_a_worker_has(monkeypatch, device, pieces, config):
    """ZeRO adds up what workers have in the order in which each has it, and no error says that it differs."""
    monkeypatch.setattr(layers, "CHUNK", layers.CHUNK)
    batches = [make_batch(0, *SIZES), make_batch(1, 3, 9, 4), without_words(make_batch(2, 9, 3, 3), 0)]
    chunks = [tokens * SMALL.feedforward for tokens in (10_000, 50, 20)]
    with dry_run() if device == GPU else contextlib.nullcontext():
        first, *others = [
            order_of_gradients(batch, chunk, ("none", pieces), device, **config)
            for batch in batches
            for chunk in (chunks if device == CPU else chunks[:1])
        ]
    assert len(first) == len(set(first)) > 50
    assert all(other == first for other in others)


SPY = """
import json, os
from raylib.objectives import LossPart, term

@term("image_text", reads=("embeddings",), trains=())
def spy(step):
    ids = step.batch["index"], step.batch["image_id"], step.captions.full.text_id
    with open(os.environ["SPY"] + os.environ.get("RANK", "0"), "a") as file:
        print(json.dumps([x.tolist() for x in ids]), file=file)
    return [LossPart(0.0 * step.contrast.left_to_right, 1)]
"""


def read_samples(folder: Path) -> list[list[list[int]]]:
    """[index, image, caption] of every sample of each step, as the processes of a run noted them. A step
    after which weights are kept comes twice, for its loss says whether they are sound."""
    processes = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.iterdir())
    ]
    steps = zip(*processes, strict=True)
    steps = [sorted(row for part in step for row in zip(*part, strict=True)) for step in steps]
    return [step for step, _ in itertools.groupby(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("sharding_alone", ["zero2", "none"])
def test_run_goes_on_with_one_and_three_workers_as_if_undisturbed(
    mini, tmp_path, monkeypatch, sharding_alone
):
    """2 -> 1 -> 3 processes, ZeRO-2 and DDP: each sample once, the same in the same step; losses and
    evaluations but for rounding."""
    (tmp_path / "spy.py").write_text(SPY)
    settings = [
        *("runtime=local", "fit.steps=9", "fit.save_every=3", "fit.eval_every=3", "data.dev=false"),
        *(f"objective.terms.spy={tmp_path / 'spy.py'}", "data.text.batch=10", "data.text.lanes=5"),
    ]
    samples, parts = {}, [(2, 3, "zero2"), (1, 6, sharding_alone), (3, 9, "zero2")]
    for name, starts in {"whole": [(1, 9, "none")], "parts": parts}.items():
        samples[name] = []
        for processes, end, sharding in starts:
            folder = tmp_path / f"{name}-{processes}"
            folder.mkdir()
            monkeypatch.setenv("SPY", f"{folder}/")
            torchrun(
                mini(f"name={name}", *settings, f"fit.stop_after={end}", f"fit.sharding={sharding}"),
                tmp_path,
                processes,
            )
            samples[name] += read_samples(folder)
            meta = checkpoint.read_meta(checkpoint.find_newest(tmp_path / name))
            assert (meta["step"], meta["workers"]) == (end, processes)
    assert len(samples["whole"]) == 9 and all(len({i for i, _, _ in step}) == 16 for step in samples["whole"])
    assert samples["parts"] == samples["whole"]
    whole, parts = ([*read_metrics(tmp_path / name)] for name in ("whole", "parts"))
    for one, other in zip(without_rate(whole), without_rate(parts), strict=True):
        assert other == pytest.approx(one, rel=5e-4)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")]
    assert results[1]["losses"] == pytest.approx(results[0]["losses"], rel=5e-4)


@pytest.mark.slow
def test_tiny_on_three_processes_equals_one(tmp_path, corpus):
    """The recipe as it is, ten steps of it."""
    lines = []
    for processes in (1, 3):
        config = override(
            RECIPES["tiny"](),
            [f"name=tiny{processes}", f"runs={tmp_path}", f"corpus={corpus}", "runtime=local", "fit.steps=10"]
            + ["fit.log_every=1", "fit.eval_every=0", "fit.save_every=10", "fit.bf16=false"],
        )
        torchrun(config, tmp_path, processes)
        lines.append(without_rate(read_metrics(tmp_path / f"tiny{processes}")))
    for one, three in zip(*lines, strict=True):
        assert three == pytest.approx(one, rel=1e-3)
    assert sum("loss/itm" in line for line in lines[0]) == 10


@pytest.mark.parametrize("world", [pytest.param(3, marks=SLOW), 5])
def test_zero_shot_retrieval_is_the_same_on_any_workers(retrieval_set, world):
    """Of five workers, two have no language of three."""
    alone = zero_shot_scores(0, 1, retrieval_set)
    assert all(found == alone for found in run_workers(zero_shot_scores, world, retrieval_set))


def zero_shot_scores(rank, world, folder):
    model = make_model(dtype=torch.float32, vocabulary=12000, positions=64).eval()
    with torch.inference_mode():
        return ZeroShotRetrieval(folder, Tokenizer.load(DATA / "tokenizer.model"), 16, 64)(model, bf16=False)
