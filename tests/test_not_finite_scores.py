"""Evaluations, results and reports refuse what is not finite; a run that diverges leaves no score."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.__main__ import main
from finetune.analysis.parallel import write_figure
from finetune.batches import encode_texts
from finetune.predict import evaluate, predict
from finetune.report import read_result
from finetune.tasks.ranking import retrieve
from pretrain.__main__ import main as pretrain_main
from pretrain.evaluate import ZeroShotRetrieval, write_result
from raylib.cache import precompute_features
from raylib.checkpoint import find_best
from raylib.display import open_pyplot
from raylib.errors import NotFinite, UserError
from raylib.metrics import recall_hits
from raylib.models.finetuned import FinetuneModel
from raylib.monitoring import MetricsLog, read_metrics
from raylib.text import Tokenizer
from tests.factories import make_model
from tests.test_decoder import ANSWERS
from tests.test_finetune import TOKENIZER, captions, pixels, questions, retriever, small_model
from tests.workers import run_workers

NAN = math.nan


def broken(model, name, value=NAN):
    """The model with one element of a parameter not finite."""
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    return model


@pytest.mark.parametrize("which", [0, 1])
def test_recall_of_non_finite_scores_is_refused(which):
    vectors = [torch.eye(4), torch.eye(4)]
    vectors[which][2, 1] = NAN
    with pytest.raises(NotFinite, match=f"embeddings of {('queries', 'keys')[which]}: not finite"):
        recall_hits(*vectors, torch.arange(4), torch.arange(4))


@pytest.mark.parametrize("candidates", [None, 5])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("image_projection.weight", "image embeddings: not finite"),
        ("text_projection.weight", "text embeddings: not finite"),
        ("vision.cls", "states of .*: not finite"),
        ("match_head.bias", "scores of the match head: not finite"),
    ],
)
def test_retrieval_non_finite_scores_are_named(scenes, tmp_path, name, words, candidates):
    model, items = broken(retriever(), name), captions(scenes)[:12]
    if name == "match_head.bias" and candidates is None:  # it is not asked
        assert (
            retrieve(model, items, pixels(scenes), Tokenizer.load(TOKENIZER), 40, None, tmp_path / "s")[
                "pairs"
            ]
            == 0
        )
        return
    with pytest.raises(NotFinite, match=words):
        retrieve(model, items, pixels(scenes), Tokenizer.load(TOKENIZER), 40, candidates, tmp_path / "s")


def test_cached_states_of_killed_evaluation_are_not_reused(scenes, tmp_path):
    """They are of another model, and were taken for this one's."""
    tokenizer, seen = Tokenizer.load(TOKENIZER), pixels(scenes)
    items, names = captions(scenes)[:12], [item.image for item in captions(scenes)[:12]]
    other = make_model(seed=1, dtype=torch.float32, vocabulary=12000, positions=64)
    precompute_features(other, seen, names, tmp_path / "s" / "images")
    found = retrieve(retriever(), items, seen, tokenizer, 40, 5, tmp_path / "s")
    assert found == retrieve(retriever(), items, seen, tokenizer, 40, 5, tmp_path / "fresh")
    examples = {"en": questions(scenes, "en")}
    precompute_features(
        other, seen, [name for e in examples["en"] for name in e.images], tmp_path / "p" / ".states"
    )
    for folder in ("p", "fresh"):
        evaluate(small_model(), examples, seen, tokenizer, 40, tmp_path / folder)
    assert (tmp_path / "p" / "en.jsonl").read_text() == (tmp_path / "fresh" / "en.jsonl").read_text()


class OneBad(torch.nn.Module):
    """Zeros, and one NaN for the example of one text; as a classifier, or as a decoder, whose -inf is no
    fault."""

    def __init__(self, ids, is_generative):
        super().__init__()
        self.weight, self.ids, self.is_generative, self.labels = (
            torch.nn.Parameter(torch.zeros(1)),
            ids,
            is_generative,
            ("no", "yes", "so"),
        )

    def forward(self, batch):
        scores = torch.zeros(len(batch["text"].lengths), 3)
        scores[:, 2] = -torch.inf if self.is_generative else 0
        for i, row in enumerate(batch["text"].values.split(batch["text"].lengths.tolist())):
            if self.ids is not None and row.equal(self.ids):
                scores[i, 1] = NAN
        return scores


def predict_one_bad(rank, world, scenes, folder, is_generative, bad=17):
    """Examples in several batches, of which one alone is not finite: what each worker hears."""
    tokenizer, examples = Tokenizer.load(TOKENIZER), questions(scenes, "en") * 3
    examples = [
        e._replace(id=f"q{i}", texts=(f"{e.texts[0]} {i}",), images=()) for i, e in enumerate(examples)
    ]
    ids = None if bad is None else encode_texts([examples[bad].texts[0]], tokenizer, 40).values
    try:
        return predict(OneBad(ids, is_generative), examples, None, tokenizer, 40, folder / "p.jsonl"), len(
            examples
        )
    except NotFinite as e:
        return str(e)


@pytest.mark.parametrize("is_generative", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_classification_non_finite_score_names_example_on_every_worker(
    scenes, tmp_path, is_generative, world
):
    heard = run_workers(predict_one_bad, world, scenes, tmp_path, is_generative)
    assert heard == ["scores of example q17: not finite (NaN or infinite)"] * world
    assert not (tmp_path / "p.jsonl").exists()
    count, there = predict_one_bad(0, 1, scenes, tmp_path, is_generative, None)
    assert count == there


def test_decoder_non_finite_scores_are_refused(scenes, tmp_path):
    backbone = make_model(dtype=torch.float32, vocabulary=12000, positions=64)
    model = FinetuneModel(backbone, tuple("abcdef"), 1, 0.0, answers=ANSWERS)
    examples, tokenizer = questions(scenes, "en"), Tokenizer.load(TOKENIZER)
    assert predict(model, examples, pixels(scenes), tokenizer, 40, tmp_path / "p.jsonl") == len(examples)
    with pytest.raises(NotFinite, match=f"scores of example {examples[0].id}: not finite"):
        predict(
            broken(model, "backbone.masked_head.bias"),
            examples,
            pixels(scenes),
            tokenizer,
            40,
            tmp_path / "p.jsonl",
        )


def zero_shot(rank, world, folder, name):
    """A pretrained model whose Chinese alone is not finite, or its images: what each worker hears."""
    tokenizer = Tokenizer.load(TOKENIZER)
    model, retrieval = (
        make_model(dtype=torch.float32, vocabulary=12000, positions=64),
        ZeroShotRetrieval(folder, tokenizer, 16, 64),
    )
    model.eval()
    with torch.no_grad():
        if name == "zh":
            others = {int(i) for code in ("en", "de") for i in retrieval.ids[code].values}
            own = {int(i) for i in retrieval.ids["zh"].values} - others
            model.embedding.word.weight[min(own)] = NAN
        elif name:
            broken(model, name)
    try:
        with torch.inference_mode():
            return sorted(retrieval(model, bf16=False)["retrieval"])
    except NotFinite as e:
        return str(e)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "heard"),
    [
        (None, ["de", "en", "zh"]),
        ("image_projection.weight", "image embeddings: not finite (NaN or infinite)"),
        ("zh", "text embeddings in zh: not finite (NaN or infinite)"),
    ],
)
def test_retrieval_zero_shot_non_finite_is_named_on_every_worker(retrieval_set, world, name, heard):
    assert run_workers(zero_shot, world, retrieval_set, name) == [heard] * world


# ---- results


def test_non_finite_results_are_not_written(tmp_path):
    with pytest.raises(NotFinite, match=r"r.json: retrieval.de.i2t_r1 not finite"):
        write_result(tmp_path / "r.json", {"retrieval": {"de": {"i2t_r1": NAN}}})
    with pytest.raises(NotFinite, match=r"f.json: mean not finite"):
        write_figure(open_pyplot().figure(), {"mean": math.inf}, tmp_path / "f")
    tracker = MetricsLog(tmp_path, 0)
    with pytest.raises(ValueError, match="JSON compliant"):
        tracker.log(1, {"loss/a": NAN})
    assert (
        not (tmp_path / "r.json").exists()
        and not (tmp_path / "f.png").exists()
        and read_metrics(tmp_path) == []
    )


def test_non_finite_stored_result_is_not_compared(tmp_path):
    (tmp_path / "result.json").write_text('{"accuracy": {"en": NaN}}')
    with pytest.raises(UserError, match=r"result.json: accuracy.en not finite"):
        read_result(tmp_path)


# ---- whole runs


def last_line(printed):
    return printed.strip().splitlines()[-1]


@pytest.mark.parametrize("recipe", ["scenes_xflickrco", "scenes_xvnli"])
@pytest.mark.parametrize("select", ["best", "last"])
def test_diverging_learning_rate_ends_in_one_line_error(finetune, tmp_path, recipe, select):
    code, printed = finetune(recipe, "name=nan", "optim.lr=1e30", f"select={select}", "fit.log_every=1000")
    assert code == 2 and last_line(printed).startswith("error: step "), printed
    assert "not finite" in last_line(printed) and "lower optim.lr" in last_line(printed)
    assert "100.0" not in printed and not (tmp_path / "nan" / "result.json").exists()
    assert not list((tmp_path / "nan" / "checkpoints").glob("step_*"))
    assert main(["evaluate", str(tmp_path / "nan")]) == 2


@pytest.mark.parametrize(
    "setting", ["optim.lr=inf", "optim.lr=Infinity", "optim.eps=nan", "optim.betas=[0.9,NaN]"]
)
def test_non_finite_setting_is_refused(finetune, setting):
    code, printed = finetune("scenes_xvnli", "name=bad", setting)
    assert code == 2 and last_line(printed).startswith(f"error: the command line: {setting.split('=')[0]}"), (
        printed
    )


def test_max_skipped_may_be_raised_on_resume(finetune, tmp_path):
    """As the report advises; and folders of runs from before the setting go on."""
    assert finetune("scenes_xvnli", "name=x", "fit.stop_after=3")[0] == 0
    stored = json.loads((tmp_path / "x" / "config.json").read_text())
    assert stored["fit"].pop("max_skipped") == 10
    (tmp_path / "x" / "config.json").write_text(json.dumps(stored))
    assert finetune("scenes_xvnli", "name=x", "fit.stop_after=4", "fit.max_skipped=20")[0] == 0
    assert finetune("scenes_xvnli", "name=x", "fit.max_skipped=3")[0] == 0


def poison(folder, name=None):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = name or next(key for key in weights if key.endswith("fusion.blocks.0.output.weight"))
    weights[name].view(-1)[3] = NAN
    save_file(weights, path)
    return name


def test_non_finite_finetune_model_is_refused_everywhere(finetune, tmp_path, capsys):
    """As runs of earlier versions left it: complete, with a score of 100 %, and NaN in its weights."""
    assert finetune("scenes_xflickrco", "name=old")[0] == 0
    assert finetune("scenes_xvnli", "name=english")[0] == 0
    for run in ("old", "english"):
        for folder in (tmp_path / run / "checkpoints").glob("step_*"):
            name = poison(folder)
    best = {run: f"{find_best(tmp_path / run)}/model.safetensors" for run in ("old", "english")}
    before = (tmp_path / "old" / "result.json").read_text()
    for command in (["evaluate"], ["analyse"]):
        assert main([*command, str(tmp_path / "old")]) == 2
        line = last_line(capsys.readouterr().err)
        assert f"{best['old']}: tensor fusion.blocks.0.output.weight is not finite" in line, line
    assert (tmp_path / "old" / "result.json").read_text() == before
    code, printed = finetune(
        "scenes_xvnli",
        "name=few",
        "setting=few_shot",
        "shots=5",
        f"model={tmp_path / 'english'}",
        'languages=["ru"]',
        "batch=4",
    )
    assert code == 2 and f"{best['english']}: tensor {name} is not finite" in last_line(printed), printed
    code, printed = finetune("scenes_xflickrco", "name=next", f"model={tmp_path / 'old'}")
    assert code == 2 and f"{best['old']}: tensor" in last_line(printed), printed


def test_non_finite_pretrained_weights_are_refused_everywhere(model, retrieval_set, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    poison(tmp_path / "model", "vision.cls")
    for command, other in (("evaluate", retrieval_set), ("export", tmp_path / "export")):
        assert pretrain_main([command, str(tmp_path / "model"), str(other)]) == 2
        line = last_line(capsys.readouterr().err)
        assert line.startswith(
            f"error: {tmp_path}/model/model.safetensors: tensor vision.cls is not finite"
        ), line


def test_pruning_rounds_that_diverge_give_no_mask(finetune, tmp_path):
    sparse = ["strategies.sparse.rounds=2", "strategies.sparse.epochs=2"]
    code, printed = finetune(
        "scenes_xvnli", "name=sparse", *sparse, "epochs=2", "optim.lr=1e30", "fit.log_every=1000"
    )
    assert code == 2 and "not finite" in last_line(printed), printed
    assert not list((tmp_path / "sparse" / "round_1" / "checkpoints").glob("step_*"))
    assert not (tmp_path / "sparse" / "masks").exists() and not (tmp_path / "sparse" / "result.json").exists()


def test_finetune_result_counts_skipped_steps(finetune, tmp_path):
    sparse = ["strategies.sparse.rounds=1", "strategies.sparse.epochs=1"]
    assert finetune("scenes_xvnli", "name=sparse", *sparse, "epochs=1")[0] == 0
    assert json.loads((tmp_path / "sparse" / "result.json").read_text())["skipped_steps"] == 0
