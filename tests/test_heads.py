"""Heads, their losses and small modules equal those of public code, whose numbers tests/public_heads.py
stored; defaults that follow from other settings."""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.config import FinetuneConfig, public_head
from finetune.recipes import RECIPES
from finetune.strategies import Context
from finetune.strategies.tuning import CompacterConfig, LoraConfig, PeftModules
from finetune.tasks.classification import task_loss
from raylib.config import Config, override
from raylib.errors import UserError
from raylib.models import peft
from raylib.models.decoder import AnswerDecoder
from raylib.models.finetuned import FinetuneModel
from raylib.models.heads import Classifier
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged
from raylib.settings import ClassifierConfig, DecoderConfig
from tests.factories import make_model

WIDTH, LABELS = 12, 7  # of tests/public_heads.py
PUBLIC_WIDTH = {"muniter": 1024, "xuniter": 1024}
NUM_LABELS = {"uc2": 1842, "m3p": 1842, "muniter": 1842, "xuniter": 1842, "mvlp": 1853}
BACKBONES = {"mvlp": "unified"}
LOSSES = {("uc2", "xgqa"): "bce", ("uc2", "xvnli"): "bce_mean", ("uc2", "marvl"): "bce_mean"}
HEADS = [
    *(
        (kind, task)
        for kind in ("uc2", "m3p", "muniter", "xuniter", "mvlp")
        for task in ("xgqa", "xvnli", "marvl")
    ),
    ("cclm", "xvnli"),
    ("cclm", "marvl"),
]
# parts of a head: the name here -> by which the public code has it, of VOLTA, mVLP and CCLM
NAMES = {
    "hidden": ("logit_fc.0", "transform.dense", "0"),
    "norm": ("logit_fc.2", "transform.LayerNorm", "1"),
    "output": ("logit_fc.3", "decoder", "2", "3", ""),
}


@cache
def stored() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data/public_heads.npz") as file:
        return dict(file)


def tensors(name: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}/"): torch.from_numpy(a)
        for key, a in stored().items()
        if key.startswith(f"{name}/")
    }


def make_head(kind: str, task: str, width: int, labels: int) -> Classifier:
    """As a run with `classifier.follow=code` makes it."""
    config = FinetuneConfig(task=task, backbone=BACKBONES.get(kind, kind), classifier={"follow": "code"})
    inputs = width * (2 if task == "marvl" else 1)
    return Classifier(inputs, width, labels, config.classifier, config.head_dropout)


def fill(head: Classifier, arrays: dict[str, Tensor]) -> None:
    """Public weights, by their own names."""
    for name, module in head.named_children():
        for end, parameter in module.named_parameters():
            found = [arrays[key] for other in NAMES[name] if (key := f"{other}.{end}".strip(".")) in arrays]
            parameter.data = next(x for x in found if x.shape == parameter.shape).clone()


@pytest.mark.parametrize(("kind", "task"), HEADS)
def test_head_logits_loss_and_gradient_equal_public_code(kind, task):
    arrays = tensors(f"{kind}/{task}")
    labels = {"xgqa": LABELS, "xvnli": 3, "marvl": 2}[task]
    head = make_head(kind, task, WIDTH, labels).eval()
    fill(head, arrays)
    x = arrays["x"].requires_grad_(True)
    logits = head(x)
    assert torch.allclose(logits, arrays["y"], rtol=0, atol=1e-5)
    one_hot = nn.functional.one_hot(arrays["target"], labels).float()
    volta = kind not in ("mvlp", "cclm")
    loss = {"xgqa": "bce", "xvnli": "bce_mean", "marvl": "bce_mean"}[task] if volta else "ce"
    mean = task_loss(logits, {"scores": one_hot, "answer": arrays["target"]}, loss) / len(x)
    mean.backward()
    assert torch.allclose(mean, arrays["loss"], rtol=1e-5)
    assert torch.allclose(x.grad, arrays["grad/x"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "task"), HEADS)
def test_head_has_published_parameter_count_and_first_weights(kind, task):
    width = PUBLIC_WIDTH.get(kind, 768)
    labels = NUM_LABELS.get(kind) if task == "xgqa" else {"xvnli": 3, "marvl": 2}[task]
    torch.manual_seed(0)
    head = make_head(kind, task, width, labels)
    assert sum(p.numel() for p in head.parameters()) == stored()[f"params/{kind}/{task}"]
    deviations = {k: float(v) for k, v in tensors(f"std/{kind}/{task}").items()}
    for name, module in (item for item in head.named_children() if item[0] in ("hidden", "output")):
        found = [
            v for other in NAMES[name] if (v := deviations.get(f"{other}.weight".strip("."))) is not None
        ]
        # the smallest has 1,536 weights
        assert any(abs(float(module.weight.std()) / std - 1) < 0.1 for std in found), (name, found)
    assert head.pooled_dropout.p == (0.0 if kind in ("mvlp", "cclm") else 0.1)


def test_heads_of_two_tasks_have_numbers_of_the_papers():
    assert sum(p.numel() for p in make_head("uc2", "xvnli", 768, 3).parameters()) == 2307
    assert round(sum(p.numel() for p in make_head("uc2", "xgqa", 768, 1842).parameters()) / 1e6, 2) == 2.01


def test_dropout_on_the_pooled_state_is_all_that_volta_drops():
    head = make_head("uc2", "xgqa", WIDTH, LABELS).train()
    assert head.dropout.p == 0.0
    x = torch.ones(2000, WIDTH)
    kept = head.pooled_dropout(x)
    assert 0.08 < float((kept == 0).float().mean()) < 0.12 and not torch.equal(head(x), head.eval()(x))


@pytest.mark.parametrize("task", ["xgqa", "xvnli", "marvl"])
def test_finetuned_model_keeps_its_head_through_a_folder(tmp_path, task):
    torch.manual_seed(0)
    settings = ClassifierConfig(**public_head("volta", "uc2", task))
    images = 2 if task == "marvl" else 1
    model = FinetuneModel(make_model(), ("a", "b", "c"), images, 0.0, classifier=settings)
    model.save(tmp_path)
    again = FinetuneModel.from_pretrained(tmp_path)
    assert isinstance(again.head, Classifier) and again.head.config == settings
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_stored_model_without_classifier_settings_has_the_head_of_its_time(tmp_path):
    model = FinetuneModel(make_model(), ("a", "b"), 1, 0.1)
    model.save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["classifier"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    head = FinetuneModel.from_pretrained(tmp_path).head
    assert (
        head.hidden.out_features == 2 * model.backbone.width
        and head.norm.eps == 1e-5
        and head.dropout.p == 0.1
    )


# ---- settings


def test_recipes_have_the_heads_of_their_public_code():
    def head(recipe: str, *changes: str) -> ClassifierConfig:
        return override(RECIPES[recipe](), list(changes)).classifier

    assert head("iglue_xvnli", "backbone=uc2").layers == 1 and head("iglue_xvnli").init == "normal"
    assert head("iglue_xgqa", "backbone=uc2").hidden_ratio == 1.0
    assert head("iglue_xgqa", "backbone=xuniter").hidden_ratio == 1.5
    assert head("p0_uc2_prior_em").eps == 1e-5 and head("p0_m3p_prior_em").eps == 1e-12
    assert head("p1_uc2_suf_xvnli").layers == 1 and head("p1_uc2_suf_xgqa").pooled_dropout == 0.1
    assert head("p1_cclm_suf_xvnli").norm == "before"
    assert (
        head("p2_marvl").activation == "relu"
        and head("p2_xvnli").layers == 1
        and head("p2_xgqa").init == "uniform"
    )
    # recorded runs
    assert head("scenes_xgqa") == head("transfer_teacher") == ClassifierConfig()
    assert override(RECIPES["scenes_xgqa"](), []).head_dropout == 0.1


def test_follow_changes_what_is_still_derived_and_nothing_else():
    config = FinetuneConfig(task="xgqa", backbone="uc2")
    assert config.classifier == ClassifierConfig() and config.head_dropout == 0.1
    follows = override(config, ["classifier.follow=code"])
    assert follows.classifier.hidden_ratio == 1.0 and follows.head_dropout == 0.0
    # given ones stay, through this command and the next
    given = override(follows, ["classifier.eps=0.5", "head_dropout=0.3"])
    moved = override(given, ["backbone=m3p", "task=xvnli"])
    assert moved.classifier.eps == 0.5 and moved.head_dropout == 0.3
    assert moved.classifier.layers == 1 and moved.classifier.hidden_ratio == 2.0
    assert override(follows, ["classifier.follow=paper"]) == config
    # stored whole, it is read as it was
    assert FinetuneConfig.model_validate(moved.model_dump()) == moved


class Part(Config):
    follow: Literal["paper", "code"] = "paper"
    times: int = 1

    @classmethod
    def derived_defaults(cls, values: Any) -> dict[str, Any]:
        return {"times": 5 if values.get("follow") == "code" else 1}


class Whole(Config):
    part: Part = Part()
    other: Part | None = None


def test_derived_defaults_reach_parts_of_parts():
    assert override(Whole(), ["part.follow=code"]).part.times == 5
    assert override(Whole(), ["part.follow=code", "part.times=1"]).part.times == 1
    assert override(Whole(), ["part.times=7", "part.follow=code"]).part.times == 7
    on = override(Whole(), ["other.follow=code"])
    assert on.other == Part(follow="code", times=5)
    assert override(on, ["other.follow=paper"]).other.times == 1
    assert override(on, ["other=null"]).other is None


# ---- OpenDelta's modules


class Places(nn.Module):
    """Two linear layers as they stand in tests/public_heads.py, with our modules behind or in them."""

    def __init__(self, arrays: dict[str, Tensor], modules: list[nn.Module]):
        super().__init__()
        layers = []
        for place in ("first", "second"):
            layer = nn.Linear(32, 32)
            layer.weight.data, layer.bias.data = (
                arrays[f"{place}.dense.{end}"] for end in ("weight", "bias")
            )
            layers.append(layer)
        self.layers = nn.ModuleList(peft.AdaptedLinear(*pair) for pair in zip(layers, modules, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return second(torch.tanh(first(x)))


def equals_opendelta(model: nn.Module, arrays: dict[str, Tensor]) -> None:
    x = arrays["x"].requires_grad_(True)
    y = model(x)
    y.square().sum().backward()
    assert torch.allclose(y, arrays["y"], rtol=1e-5, atol=1e-5)
    assert torch.allclose(x.grad, arrays["grad/x"], rtol=1e-5, atol=1e-4)


def test_compacter_that_follows_code_equals_opendelta():
    arrays, settings = tensors("delta/compacter"), CompacterConfig(follow="code", reduction=4)
    backbone = make_model(width=32)
    PeftModules("compacter", settings.model_dump(exclude={"follow", "projection", "norms"})).adapt(
        FinetuneModel(backbone, ("a", "b"), 1, 0.0)
    )
    ours = [m for m in backbone.modules() if isinstance(m, peft.Compacter)][:2]
    torch.manual_seed(1)
    assert sum(p.numel() for m in ours for p in m.parameters()) == stored()["params/delta/compacter"]
    for place, module in zip(("first", "second"), ours, strict=True):
        for layer, at in ((module.down, "down_sampler"), (module.up, "up_sampler")):
            parts = {"kronecker": "phm_rule", "left": "W_left", "right": "W_right", "bias": "b"}
            for name, other in parts.items():
                getattr(layer, name).data = arrays[f"{place}.dense.compactor.{at}.{other}"]
    equals_opendelta(Places(arrays, ours), arrays)


def test_compacter_starts_as_opendelta_does():
    """Xavier-uniform with gain sqrt 2: bound sqrt 2 sqrt(6 / (inputs + outputs)) of a factor."""
    config = CompacterConfig(follow="code")
    torch.manual_seed(0)
    layer = peft.LowRankKronecker(256, 64, None, config.n, config.rank, config.gain)
    bound = (2 * 6 / (64 + 1)) ** 0.5
    assert 0.95 * bound < float(layer.left.abs().max()) <= bound
    assert 0.005 < float(layer.kronecker.std()) < 0.015
    gains = stored()["std/delta/compacter/first.dense.compactor.down_sampler.W_left"]
    assert abs(gains / ((2 * 6 / 9) ** 0.5 / 3**0.5) - 1) < 0.25  # uniform: bound / sqrt 3; 32 numbers


def test_compacter_of_the_paper_shares_its_rule_and_uses_gelu():
    model = FinetuneModel(make_model(width=32), ("a", "b"), 1, 0.0)
    CompacterConfig(reduction=4).build(Context(*[None] * 6, print)).adapt(model)
    names = [name for name, _ in model.named_parameters() if "kronecker" in name]
    assert names == ["backbone.kronecker"]
    own = FinetuneModel(make_model(width=32), ("a", "b"), 1, 0.0)
    CompacterConfig(reduction=4, follow="code").build(Context(*[None] * 6, print)).adapt(own)
    rules = [name for name, _ in own.named_parameters() if "kronecker" in name]
    assert len(rules) == 2 * len([m for m in own.modules() if isinstance(m, peft.Compacter)])
    # each rule is trained, and a stored model has them again
    assert all(dict(own.named_parameters())[name].requires_grad for name in rules)


def test_adapter_and_lora_equal_opendelta():
    arrays = tensors("delta/adapter")
    modules = [peft.Adapter(32, 6), peft.Adapter(32, 6)]
    for place, module in zip(("first", "second"), modules, strict=True):
        for layer, other in ((module.down, "down_proj"), (module.up, "up_proj")):
            at = f"{place}.dense.adapter.modulelist.{other}"
            layer.weight.data, layer.bias.data = arrays[f"{at}.weight"], arrays[f"{at}.bias"]
    assert sum(p.numel() for m in modules for p in m.parameters()) == stored()["params/delta/adapter"]
    equals_opendelta(Places(arrays, modules), arrays)

    # LoRA's product added to the weights, at our scale alpha / rank
    arrays, scale = tensors("delta/lora"), LoraConfig(rank=2).alpha / 2
    for place in ("first", "second"):
        at = f"{place}.dense"
        arrays[f"{at}.weight"] = arrays[f"{at}.weight"] + scale * (
            arrays[f"{at}.lora.lora_B"] @ arrays[f"{at}.lora.lora_A"]
        )
    equals_opendelta(Places(arrays, [nn.Identity(), nn.Identity()]), arrays)


def test_modules_that_follow_code_leave_the_projection_and_say_so():
    assert LoraConfig().projection and not LoraConfig(follow="code").projection
    assert CompacterConfig(follow="code").display_name("compacter") == "compacter (follow code)"
    changed = override(FinetuneConfig(task="xtd"), ["strategies.compacter.follow=code"])
    found = changed.strategies.compacter
    assert (found.activation, found.rule, found.projection) == ("relu", "own", False)


def test_model_tuned_before_compacter_had_its_settings_loads(tmp_path):
    model = FinetuneModel(make_model(width=32), ("a", "b"), 1, 0.0)
    CompacterConfig(reduction=4).build(Context(*[None] * 6, print)).adapt(model)
    model.save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("activation", "rule", "gain"):
        del values["tuning"]["compacter"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    again = FinetuneModel.from_pretrained(tmp_path)
    # and goes on, with the settings of today
    CompacterConfig(reduction=4).build(Context(*[None] * 6, print)).adapt(again)
    with pytest.raises(UserError, match="tuned with"):
        CompacterConfig(reduction=4, follow="code").build(Context(*[None] * 6, print)).adapt(again)
    values["tuning"]["compacter"]["rule"] = "other"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="tuning"):
        FinetuneModel.from_pretrained(tmp_path)


# ---- CCLM's matching head and decoder


def test_match_head_of_cclm_equals_public_code():
    arrays = tensors("cclm/itm")
    torch.manual_seed(0)
    model = UnifiedModel(make_model(width=WIDTH, heads=2, match_head="mlp").config).eval()
    assert isinstance(model.match_head, Classifier)
    fill(model.match_head, arrays)
    x = arrays["x"].requires_grad_(True)
    logits = model.match_logits(x)
    assert torch.allclose(logits, arrays["y"], rtol=0, atol=1e-5)
    nn.functional.cross_entropy(logits, arrays["target"]).backward()
    assert torch.allclose(x.grad, arrays["grad/x"], rtol=1e-5, atol=1e-6)
    big = Classifier(768, 768, 2, model.match_head.config)
    assert sum(p.numel() for p in big.parameters()) == stored()["params/cclm/itm"]


def decoder_from(arrays: dict[str, Tensor], embeddings: str) -> tuple[AnswerDecoder, UnifiedModel]:
    """Ours with the public decoder's weights; the backbone has others where the decoder has its own."""
    answers = [[token for token in row if token != 1] for row in arrays["answers"].tolist()]
    sizes = dict(vocabulary=19, width=WIDTH, heads=2, feedforward=20, positions=8, fusion_layers=2, eps=1e-12)
    backbone = make_model(dtype=torch.float32, **sizes, fusion_eps=1e-12)
    config = DecoderConfig(embeddings=embeddings, count_first_twice=True)
    decoder = AnswerDecoder(backbone, answers, config).eval()
    embedding, head = decoder._words(backbone)

    def copy(layer: nn.Module, *names: str) -> None:
        for end, parameter in layer.named_parameters():
            parameter.data = torch.cat([arrays[f"{name}.{end}"] for name in names]).clone()

    at = "bert.embeddings"
    embedding.word.weight.data = arrays[f"{at}.word_embeddings.weight"].clone()
    positions = arrays[f"{at}.position_embeddings.weight"] + arrays[f"{at}.token_type_embeddings.weight"]
    embedding.position.weight.data = positions
    copy(embedding.norm, f"{at}.LayerNorm")
    copy(head.dense, "cls.predictions.transform.dense")
    copy(head.norm, "cls.predictions.transform.LayerNorm")
    head.bias.data = arrays["cls.predictions.bias"].clone()
    for n, block in enumerate(decoder.layers.blocks):
        at = f"bert.encoder.layer.{n}"
        for attention, norm, name in (
            (block.attention, block.attention_norm, "attention"),
            (block.cross_attention, block.cross_norm, "crossattention"),
        ):
            copy(attention.query, f"{at}.{name}.self.query")
            copy(attention.key_value, f"{at}.{name}.self.key", f"{at}.{name}.self.value")
            copy(attention.output, f"{at}.{name}.output.dense")
            copy(norm, f"{at}.{name}.output.LayerNorm")
        copy(block.intermediate, f"{at}.intermediate.dense")
        copy(block.output, f"{at}.output.dense")
        copy(block.output_norm, f"{at}.output.LayerNorm")
    return decoder, backbone


@pytest.mark.parametrize("embeddings", ["shared", "own", "random"])
def test_decoder_equals_that_of_x2vlm(embeddings):
    arrays = tensors("decoder")
    assert bool(stored()["decoder/is_tied"])  # its way to the vocabulary is its own word embedding
    decoder, backbone = decoder_from(arrays, embeddings)
    lengths, states = arrays["lengths"], arrays["states"].requires_grad_(True)
    flat = torch.cat([row[:n] for row, n in zip(states, lengths.tolist(), strict=True)])
    question = Ragged(flat, lengths)
    # of question 0 answer 1 at weight 1, of question 1 answers 0 and 3 at 0.7 and 0.3
    scores = torch.tensor([[0, 1.0, 0, 0], [0.7, 0, 0, 0.3]])
    loss = decoder.loss(backbone, question, scores) / 2
    loss.backward()
    assert torch.allclose(loss, arrays["loss"], rtol=1e-5)
    assert torch.allclose(states.grad, arrays["grad/states"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(decoder.rank(backbone, question), arrays["scores"], rtol=1e-5)
    # what is its own is trained apart
    assert (backbone.embedding.word.weight.grad is None) == (embeddings != "shared")


def test_decoder_embeddings_begin_as_their_setting_says():
    backbone = make_model(dtype=torch.float32)
    own = AnswerDecoder(backbone, [[0, 5, 2]], DecoderConfig(embeddings="own"))
    assert own.embedding.word.weight.equal(backbone.embedding.word.weight)
    assert own.embedding.word.weight is not backbone.embedding.word.weight
    new = AnswerDecoder(backbone, [[0, 5, 2]], DecoderConfig(embeddings="random"))
    assert not new.embedding.word.weight.equal(backbone.embedding.word.weight)
    assert new.embedding.norm.weight.eq(1).all() and not new.masked_head.bias.any()
    assert AnswerDecoder(backbone, [[0, 5, 2]], DecoderConfig()).embedding is None
    assert RECIPES["p1_cclm_suf_xgqa"]().decoder == DecoderConfig(embeddings="random", count_first_twice=True)


@pytest.mark.parametrize("embeddings", ["own", "random"])
def test_finetuned_decoder_keeps_its_embeddings_through_a_folder(tmp_path, embeddings):
    decoder = DecoderConfig(embeddings=embeddings)
    model = FinetuneModel(
        make_model(dtype=torch.float32), ("a",), 1, 0.0, answers=[[0, 5, 2]], decoder=decoder
    )
    model.save(tmp_path)
    again = FinetuneModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
