"""The head that spells answers token by token, against slow references, and a run with it."""

import json
import shutil

import pytest
import torch

from finetune.__main__ import main
from finetune.tasks.classification import AnswerObjective
from raylib.checkpoint import find_trained
from raylib.errors import UserError
from raylib.models.decoder import DecoderConfig, encode_answers
from raylib.models.finetuned import FinetuneModel
from raylib.models.unified import UnifiedModel
from raylib.monitoring import read_metrics
from raylib.packed import Ragged
from raylib.sample import DATA
from raylib.text import Tokenizer
from tests import reference
from tests.factories import make_model
from tests.test_cclm import images, swin_config

ANSWERS = [[0, 7, 2], [0, 7, 9, 2], [0, 11, 12, 13, 2], [0, 14, 2], [0, 11, 2], [0, 7, 30, 2]]
LABELS = tuple("abcdef")


def spelling(config=None, dtype=torch.float64) -> FinetuneModel:
    model = FinetuneModel(make_model(dtype=torch.float32), LABELS, 1, 0.0, answers=ANSWERS, decoder=config)
    with torch.no_grad():  # its layers are copies; now they are not
        for p in model.head.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(8)) * 0.1)
    return model.to(dtype).eval()


def asked(scores=None) -> dict:
    g = torch.Generator().manual_seed(6)
    batch = {
        "text": Ragged(torch.randint(5, 60, (9,), generator=g), torch.tensor([5, 1, 3])),
        "images": images(3),
    }
    return batch if scores is None else batch | {"scores": scores}


def slow_logs(model, question, tokens):
    """log p over the vocabulary after each of `tokens`, one position at a time: (n, V)."""
    b = model.backbone
    x = reference.norm(
        b.embedding.norm, b.embedding.word.weight[tokens] + b.embedding.position.weight[: len(tokens)]
    )
    for layer in model.head.layers.blocks:
        seen = torch.cat(
            [reference.attend(layer.attention, x[t : t + 1], x[: t + 1]) for t in range(len(tokens))]
        )
        x = reference.norm(layer.attention_norm, x + seen)
        x = reference.norm(layer.cross_norm, x + reference.attend(layer.cross_attention, x, question))
        x = reference.norm(layer.output_norm, x + reference.feed(layer, x))
    head = b.masked_head
    hidden = reference.norm(head.norm, torch.nn.functional.gelu(x @ head.dense.weight.T + head.dense.bias))
    return (hidden @ b.embedding.word.weight.T + head.bias).log_softmax(1)


def slow_table(model, batch):
    """(b, C) log p of the whole answer, and of its first token."""
    u, whole, first = model.backbone, [], []
    for text, image in zip(
        batch["text"].values.split(batch["text"].lengths.tolist()), batch["images"], strict=True
    ):
        question = reference.fused_states(u, reference.text_states(u, text), reference.image_states(u, image))
        logs = [slow_logs(model, question, torch.tensor(ids[:-1])) for ids in ANSWERS]
        each = [
            [table[t, token] for t, token in enumerate(ids[1:])]
            for table, ids in zip(logs, ANSWERS, strict=True)
        ]
        whole.append(torch.stack([torch.stack(values).sum() for values in each]))
        first.append(torch.stack([values[0] for values in each]))
    return torch.stack(whole), torch.stack(first)


def test_decoder_starts_as_copy_of_fusion_layers():
    model = FinetuneModel(make_model(), LABELS, 1, 0.0, answers=ANSWERS)
    for name, value in model.backbone.fusion.state_dict().items():
        assert value.equal(model.head.layers.state_dict()[name])
    assert model.head.layers.causal and not model.backbone.fusion.causal
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"backbone.masked_head.bias", "head.layers.blocks.0.cross_attention.query.weight"} <= trained
    assert not any(name.startswith("backbone.match_head") for name in trained)
    assert all(model.depth_of(name) is None for name, _ in model.head.named_parameters(prefix="head"))
    assert not any(name.startswith("head") for name in model.prunable())


def test_decoder_loss_equals_slow_reference():
    scores = torch.tensor(
        [[1, 0, 0.3, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0.6, 0, 0, 0.9, 0]], dtype=torch.float64
    )
    model, slow = spelling(), spelling()
    loss, terms = AnswerObjective(model)({"examples": asked(scores)})
    expected = -(scores * slow_table(slow, asked())[0]).sum() / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["task"], expected.detach())
    loss.backward()
    expected.backward()
    compared = 0
    for (name, ours), (_, reference_parameter) in zip(
        model.named_parameters(), slow.named_parameters(), strict=True
    ):
        if reference_parameter.grad is not None and ours.requires_grad:
            torch.testing.assert_close(
                ours.grad, reference_parameter.grad, msg=lambda text, name=name: f"{name}: {text}"
            )
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("twice", [False, True])
def test_decoder_ranking_all_answers_equals_scoring_each(twice):
    model = spelling(DecoderConfig(candidates=6, count_first_twice=twice))
    whole, first = slow_table(model, asked())
    with torch.inference_mode():
        torch.testing.assert_close(model(asked()), whole + first if twice else whole)
        torch.testing.assert_close(
            spelling(DecoderConfig(candidates=99, count_first_twice=twice))(asked()), model(asked())
        )


def test_decoder_scores_only_answers_with_likely_first_token():
    whole, first = slow_table(spelling(), asked())
    with torch.inference_mode():
        scores = spelling(DecoderConfig(candidates=4))(asked())
    for row in range(3):
        kept = scores[row] > -torch.inf
        assert kept.sum() == 4 and first[row][kept].min() >= first[row][~kept].max() - 1e-12
        torch.testing.assert_close(scores[row][kept], whole[row][kept].detach())
        assert kept[scores[row].argmax()]


def test_decoder_is_causal():
    model = spelling()
    question = model.backbone.fused_states(asked()["text"], model.memory(asked()))
    rows, answers = torch.tensor([0, 2, 1]), torch.tensor([2, 1, 0])
    states = model.head._states(model.backbone, question, rows, answers)  # 4, 3 and 2 tokens given
    with torch.no_grad():
        model.head.input_ids[model.head.lengths[:2].sum() + 2] = 40  # the third token of answer 2
    changed = model.head._states(model.backbone, question, rows, answers)
    moved = (states - changed).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, False, True, True] + [False] * 5


def test_decoder_model_saves_and_loads(tmp_path):
    model = spelling(DecoderConfig(candidates=3, count_first_twice=True), torch.float32)
    model.save(tmp_path)
    again = FinetuneModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(asked()), model(asked()))
    assert again.head.config == model.head.config and again.labels == LABELS


def test_decoder_refuses_models_and_answers_it_cannot_generate(caplog):
    entangled = make_model(fusion="entangled")
    with pytest.raises(UserError, match="no layers with cross-attention"):
        FinetuneModel(entangled, LABELS, 1, 0.0, answers=ANSWERS)
    with pytest.raises(UserError, match="an answer has 17 tokens, the model 16 positions"):
        FinetuneModel(make_model(), ("a",), 1, 0.0, answers=[[0] * 18])
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    first, second, third = encode_answers(["red", "red ", "blue"], tokenizer)
    assert first == second != third and first[0] == tokenizer.cls and first[-1] == tokenizer.sep
    assert "answers 'red' and 'red ' are the same tokens" in caplog.text


RUN = [
    "scenes_xgqa",
    "batch=16",
    "image_size=16",
    "fit.bf16=false",
    "fit.loader_workers=0",
    "fit.log_every=1",
    "epochs=2",
    'languages=["en","ru"]',
    "freeze=[]",
    "extra_tests={}",
    "shuffled_images=false",
]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A small random model with a Swin, exported."""
    folder = tmp_path_factory.mktemp("model") / "export"
    torch.manual_seed(0)
    UnifiedModel(swin_config(vocabulary=12000, positions=64, dropout=0.1)).save(folder)
    shutil.copy2(DATA / "tokenizer.model", folder)
    return folder


def test_decoder_fine_tuning_run_end_to_end(tmp_path, export, scenes, capsys):
    own = [f"model={export}", f"data={scenes}", f"runs={tmp_path}"]
    settings = [
        "head=decoder",
        "decoder.candidates=20",
        "strategies.unfreezing.layers=2",
        'freeze=["vision"]',
    ]
    code = main([*RUN, *own, *settings, "name=spelt"])
    printed = "".join(capsys.readouterr())
    assert code == 0, printed
    result = json.loads((tmp_path / "spelt/result.json").read_text())
    assert set(result["accuracy"]) == {"en", "ru"} and list((tmp_path / "encoded").iterdir())
    losses = [line["loss/task"] for line in read_metrics(tmp_path / "spelt") if "loss/task" in line]
    assert losses[-1] < losses[0]
    predictions = (tmp_path / "spelt/predictions/en.jsonl").read_text()
    assert main(["evaluate", str(tmp_path / "spelt")]) == 0
    assert json.loads((tmp_path / "spelt/result.json").read_text())["accuracy"] == result["accuracy"]
    assert (tmp_path / "spelt/predictions/en.jsonl").read_text() == predictions
    few = [*RUN, *own, "setting=few_shot", f"model={tmp_path / 'spelt'}", 'languages=["ru"]', "epochs=1"]
    assert (
        main([*few, "name=few"]) == 2 and "its head is a decoder; set head=decoder" in capsys.readouterr().err
    )
    assert main([*few, "name=spelt_on", "head=decoder"]) == 0
    model = FinetuneModel.from_pretrained(find_trained(tmp_path / "spelt", "best"))
    assert model.is_generative and model.head.config.candidates == 20 and model.backbone.config.swin


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["task=xvnli"], "head=decoder generates answers of an open set; xvnli has none"),
        (["loss=bce"], "leave out loss=bce"),
        (["strategies.prior.alpha=4"], "needs a classifier's logits that are trained"),
        (["decoder.candidates=0"], "decoder.candidates"),
    ],
)
def test_decoder_wrong_settings_are_one_line_errors(tmp_path, export, scenes, capsys, settings, words):
    code = main(
        [*RUN, f"model={export}", f"data={scenes}", f"runs={tmp_path}", "name=bad", "head=decoder", *settings]
    )
    printed = "".join(capsys.readouterr()).strip().splitlines()[-1]
    assert code == 2 and printed.startswith("error: ") and words in printed, printed
