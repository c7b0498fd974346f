"""Parameter-efficient tuning (paper 4) against explicit matrices, the paper's shares, and itself after a
round trip."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune.strategies import Context, Strategies, StrategiesConfig
from finetune.strategies.tuning import (
    AdapterConfig,
    CompacterConfig,
    HardPrompt,
    HardPromptConfig,
    LoraConfig,
    SoftPromptConfig,
)
from finetune.tasks.classification import ClassificationObjective
from raylib.config import validate
from raylib.engine import OptimConfig, TorchEngine
from raylib.engine_state import state_files
from raylib.engine_zero import DeepSpeedEngine
from raylib.errors import UserError
from raylib.models import BACKBONES, peft
from raylib.models.attention import Block
from raylib.models.finetuned import FinetuneModel
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.packed import Ragged
from raylib.saving import write_files
from raylib.text import PromptedTokenizer, Tokenizer
from tests.factories import make_model
from tests.workers import run_workers

METHODS = {
    "lora": LoraConfig(rank=2),
    "adapter": AdapterConfig(bottleneck=3),
    "compacter": CompacterConfig(n=2, reduction=4),
}
CONTEXT = Context(*[None] * 6, print)


def make_tuned(*methods) -> FinetuneModel:
    torch.manual_seed(0)
    model = FinetuneModel(make_model(dropout=0.0), ("no", "yes"), 1, 0.0).double()
    for method in methods:
        method.build(CONTEXT).adapt(model)
    return model.eval()


def make_batch() -> dict:
    text = Ragged(torch.tensor([0, 9, 8, 2, 0, 7, 2]), torch.tensor([4, 3]))
    states = torch.randn(
        6, make_tuned().backbone.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return {"text": text, "states": Ragged(states, torch.tensor([3, 3]))}


def shake(model) -> None:
    """Give every trainable parameter another value, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))


def test_compacter_equals_explicit_kronecker_sum():
    torch.manual_seed(0)
    owner = torch.nn.Module()
    owner.kronecker = rule = torch.nn.Parameter(torch.randn(4, 4, 4))
    layer = peft.LowRankKronecker(12, 8, owner, 4, rank=2)
    explicit = sum(torch.kron(rule[i], layer.left[i] @ layer.right[i]) for i in range(4))
    torch.testing.assert_close(layer.matrix(), explicit)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), x @ explicit + layer.bias)


def test_compacter_layers_share_one_rule():
    model = make_tuned(METHODS["compacter"])
    layers = [m for m in model.modules() if isinstance(m, peft.LowRankKronecker)]
    assert len(layers) == 2 * 2 * sum(isinstance(m, Block) for m in model.modules())
    assert all(layer.rule is model.backbone.kronecker for layer in layers)
    model(make_batch()).sum().backward()
    assert model.backbone.kronecker.grad.abs().sum() > 0


def test_adapter_equals_explicit_bottleneck():
    torch.manual_seed(0)
    linear, adapter = torch.nn.Linear(6, 6), peft.Adapter(6, 2)
    shake(adapter)
    out = peft.AdaptedLinear(linear, adapter)
    x = torch.randn(3, 6)
    inner = x @ linear.weight.T + linear.bias
    down = inner @ adapter.down.weight.T + adapter.down.bias
    curved = 0.5 * down * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (down + 0.044715 * down**3)))
    torch.testing.assert_close(out(x), inner + curved @ adapter.up.weight.T + adapter.up.bias)


def test_lora_equals_explicit_sum_and_merges():
    """W + (alpha / r) B A in the query map and the value half; keys stay as they were; merged, the outputs
    are the same."""
    plain, model = make_tuned(), make_tuned(LoraConfig(rank=2, alpha=6))
    shake(model)
    logits = model(make_batch())
    layer = model.backbone.text.blocks[0].attention
    deltas = {}
    for name, changed in (("query", layer.query), ("value", layer.key_value.value)):
        deltas[name] = 3 * changed.lora_B["default"].weight @ changed.lora_A["default"].weight
    width = plain.backbone.width
    before = plain.backbone.text.blocks[0].attention
    peft.merge_lora(model)
    torch.testing.assert_close(layer.query.weight, before.query.weight + deltas["query"])
    torch.testing.assert_close(layer.key_value.weight[:width], before.key_value.weight[:width])
    torch.testing.assert_close(
        layer.key_value.weight[width:], before.key_value.weight[width:] + deltas["value"]
    )
    torch.testing.assert_close(model(make_batch()), logits)
    assert model.backbone.tuning == {} and [n for n, _ in model.named_parameters()] == [
        n for n, _ in plain.named_parameters()
    ]


@pytest.mark.parametrize("name", METHODS)
def test_peft_trains_small_modules_norms_and_head_only(name):
    """The small modules, the norms of the blocks, the head; nothing else, and `projection` decides about the
    map."""
    model = make_tuned(METHODS[name])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained:
        ours = peft.is_inserted(parameter) or "norm" in parameter or parameter.startswith("head.")
        assert ours and "embedding" not in parameter and "vision" not in parameter, parameter
    assert any(map(peft.is_inserted, trained)) and "head.output.weight" in trained
    assert "backbone.text.blocks.0.output_norm.weight" in trained
    for projection in (True, False):
        dual = make_model()
        METHODS[name].model_copy(update={"projection": projection}).build(CONTEXT).adapt(dual)
        assert (
            dual.text_projection.weight.requires_grad == projection
            and not dual.image_projection.weight.requires_grad
        )


@pytest.mark.parametrize(
    ("method", "percent", "paper"),
    [
        (LoraConfig(rank=8), 0.158, 0.16),
        (AdapterConfig(bottleneck=24), 0.449, 0.45),
        (CompacterConfig(n=4, reduction=16), 0.046, 0.05),
    ],
)
def test_peft_has_published_parameter_shares(method, percent, paper):
    """Of XLM-R-large (M-CLIP's text encoder), counted without the projection: within 0.01 points of paper
    4's."""
    sizes = ModelConfig(
        width=1024,
        heads=16,
        feedforward=4096,
        text_layers=24,
        fusion_layers=0,
        vision_layers=1,
        positions=514,
    )
    with torch.device("meta"):
        model = UnifiedModel(sizes)
        method.build(CONTEXT).adapt(model)
    share, with_head = peft.trainable_shares(model)
    assert 100 * share == pytest.approx(percent, abs=0.0006) and 100 * share == pytest.approx(paper, abs=0.01)
    assert with_head > share


@pytest.mark.parametrize("name", METHODS)
def test_peft_tuned_weights_can_be_swapped_per_language(name, tmp_path):
    """Two languages' files, read into one model in turn, each give what their own model gives; files are
    small."""
    languages = {}
    for seed, code in enumerate(("de", "ru")):
        model = make_tuned(METHODS[name])
        torch.manual_seed(seed)
        shake(model)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        peft.save_tuned(model, trained, tmp_path / f"{code}.safetensors")
        languages[code] = model(make_batch())
    one = make_tuned(METHODS[name])
    for code in ("de", "ru", "de"):
        peft.load_tuned(one, tmp_path / f"{code}.safetensors")
        torch.testing.assert_close(one(make_batch()), languages[code])
    assert not torch.allclose(languages["de"], languages["ru"])
    with safe_open(tmp_path / "de.safetensors", "pt") as file:
        assert not any("embedding" in n or "vision" in n for n in file.keys())  # noqa: SIM118
        assert name in json.loads(file.metadata()["tuning"])


@pytest.mark.parametrize("methods", [["lora", "adapter"], ["compacter"], ["lora", "soft_prompt"]])
def test_peft_model_saves_and_loads(methods, tmp_path):
    every = {**METHODS, "soft_prompt": SoftPromptConfig(words="", tokens=2)}
    model = make_tuned(*(every[name] for name in methods)).float()
    shake(model)
    model.save(tmp_path)
    back = FinetuneModel.from_pretrained(tmp_path).eval()
    batch = make_batch()
    batch["states"] = batch["states"].with_values(batch["states"].values.float())
    torch.testing.assert_close(back(batch), model(batch), rtol=0, atol=0)
    assert back.backbone.tuning == model.backbone.tuning and set(back.backbone.tuning) == set(methods)


def test_prompts_are_inserted_after_the_first_token(model):
    tokenizer = Tokenizer.load(model)
    words = tokenizer.encode(["a photo of"])[0].tolist()
    assert PromptedTokenizer(tokenizer, ids=(70, 71)).encode(["a dog"])[0].tolist() == [
        70,
        71,
        *tokenizer.encode(["a dog"])[0],
    ]
    prompted = HardPrompt("a photo of").wrap_tokenizer(tokenizer, None)
    assert prompted.encode(["dog"])[0].tolist() == tokenizer.encode(["a photo of dog"])[0].tolist()
    words_of = {"de": "ein Foto von", "zh": "一张照片："}
    config = HardPromptConfig(by_language=words_of)
    every = pickle.loads(
        pickle.dumps(config.build(CONTEXT._replace(languages=())).wrap_tokenizer(tokenizer, None))
    )
    for code, start in {**words_of, "ru": "a photo of"}.items():
        said = every.for_language(code).encode(["Hund"])[0].tolist()
        assert said == tokenizer.encode([f"{start} Hund"])[0].tolist()
    german = config.build(CONTEXT._replace(languages=("de",))).wrap_tokenizer(tokenizer, None)
    assert german.encode(["Hund"])[0].tolist() == tokenizer.encode(["ein Foto von Hund"])[0].tolist()
    assert tokenizer.for_language("de") is tokenizer
    small = UnifiedModel.from_pretrained(model)
    prompt = SoftPromptConfig().build(CONTEXT._replace(tokenizer=model))
    prompt.adapt(small)
    soft = prompt.wrap_tokenizer(tokenizer, small)
    before = small.embedding.word.num_embeddings
    assert soft.encode(["dog"])[0].tolist()[: len(words)] == list(range(before, before + len(words)))
    ids = torch.tensor([0, before, before + 1, 5])
    expected = small.embedding.word.weight[torch.tensor([0, words[0], words[1], 5])]
    torch.testing.assert_close(small.embedding.word(ids), expected)
    with pytest.raises(UserError, match="give the same settings"):
        SoftPromptConfig(words="", tokens=3).build(CONTEXT).adapt(small)


def test_peft_wrong_settings_and_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="no multiple of n 3"):
        make_tuned(CompacterConfig(n=3, reduction=4))
    with pytest.raises(UserError, match="a model takes one of them"):
        make_tuned(METHODS["adapter"], METHODS["compacter"])
    model = make_tuned(METHODS["lora"])
    peft.save_tuned(model, ["head.output.weight"], tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="put the same methods in first"):
        peft.load_tuned(make_tuned(METHODS["adapter"]), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="none.safetensors: no such file"):
        peft.load_tuned(model, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="weights of another model"):
        peft.load_tuned(FinetuneModel(model.backbone, ("a", "b", "c"), 1, 0.0), tmp_path / "a.safetensors")


def test_peft_applies_to_every_backbone():
    for name, backbone in BACKBONES.items():
        for method in METHODS.values():
            small = backbone(backbone.sizes["tiny"])
            if name == "clip":
                with pytest.raises(UserError, match="no layers of ours"):
                    method.build(CONTEXT).adapt(small)
                continue
            method.build(CONTEXT).adapt(small)
            assert any(peft.is_inserted(n) for n, _ in small.named_parameters()), name


TUNED = (LoraConfig(rank=2), AdapterConfig(bottleneck=3), CompacterConfig(n=2, reduction=4))


def train_tuned(
    engine_class, method, rank=0, world=1, start=None, first=0, folder=None
) -> dict[str, torch.Tensor]:
    """Four steps of a tuned classifier, two of its four layers unfrozen from the second epoch on: the weights
    that change."""
    model = make_tuned(method).float()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    rates = Strategies(
        validate(StrategiesConfig, {"unfreezing": {"layers": 2}}, "here"), CONTEXT
    ).layer_rates(4, 2, 2)
    optim = OptimConfig(lr=0.01, weight_decay=0.1, clip=1e9)
    engine = engine_class(
        ClassificationObjective(model, "ce"), optim, torch.device("cpu"), False, start, rates
    )
    rows = torch.arange(rank, 2, world)
    for step in range(first, 4 if folder is None else 3):
        batch = make_batch()
        part = {
            "text": batch["text"].select_rows(rows),
            "states": batch["states"].select_rows(rows),
            "answer": torch.tensor([0, 1])[rows],
        }
        engine.step({"examples": part}, step, optim.lr)
    if folder:
        folder.mkdir(exist_ok=True)
        write_files(folder, state_files(engine.state(), rank))
        if rank == 0:
            save_file(model.state_dict(), folder / "model.safetensors")
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in trained}


def tuned_workers(rank, world, folder):
    """Each method under ZeRO-2, whole and stopped after 3 of 4 steps, in mid-phase, to go on under ZeRO-2 and
    under DDP; and under DDP alone."""
    os.environ["LOCAL_RANK"], out = str(rank), []
    for i, method in enumerate(TUNED):
        whole = train_tuned(DeepSpeedEngine, method, rank, world)
        train_tuned(DeepSpeedEngine, method, rank, world, folder=folder / f"{world}{i}")
        torch.distributed.barrier()
        parts = train_tuned(DeepSpeedEngine, method, rank, world, start=folder / f"{world}{i}", first=3)
        other = train_tuned(TorchEngine, method, rank, world, start=folder / f"{world}{i}", first=3)
        out.append((whole, parts, other, train_tuned(TorchEngine, method, rank, world)))
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_peft_tuned_weights_agree_between_engines_and_after_resume(world, tmp_path):
    expected = [train_tuned(TorchEngine, method) for method in TUNED]
    for results in run_workers(tuned_workers, world, tmp_path):
        for (whole, parts, other, plain), wanted in zip(results, expected, strict=True):
            for name, value in wanted.items():
                torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-5, msg=name)
                torch.testing.assert_close(plain[name], value, rtol=1e-4, atol=1e-5, msg=name)
                torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)
                assert parts[name].equal(whole[name]), name


@pytest.mark.parametrize("strategy", ["lora", "soft_prompt"])
def test_tuned_run_is_evaluated_by_its_checkpoint_alone(finetune, tmp_path, model, strategy):
    from finetune.__main__ import main

    shutil.copytree(model, tmp_path / "start")
    settings = [f"model={tmp_path / 'start'}", f"strategies.{strategy}.projection=true", "epochs=1"]
    code, printed = finetune("scenes_xvnli", "name=run", *settings, "train_limit=16", "test_limit=8")
    assert code == 0, printed
    shutil.rmtree(tmp_path / "start")
    before = json.loads((tmp_path / "run/result.json").read_text())["accuracy"]
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["accuracy"] == before
