"""Fine-tuning methods: layer rates, masks and terms against slow references; engines agree; any two compose
and resume."""

import ast
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.strategies import NEEDS, STRATEGIES, Context, Strategies, StrategiesConfig, Strategy
from finetune.strategies.base import Outputs, Term, TrainingProgress
from finetune.strategies.prior import LinguisticPriorConfig
from finetune.strategies.pruning import apply_mask, prune_mask, read_mask, sparsity, write_mask
from finetune.strategies.tuning import LayerDecay, ScheduledUnfreezing, TopLayers
from raylib.config import validate
from raylib.engine import OptimConfig, TorchEngine, parameter_groups
from raylib.engine_state import state_files
from raylib.engine_zero import DeepSpeedEngine
from raylib.errors import UserError
from raylib.models import peft
from raylib.models.finetuned import FinetuneModel, freeze
from raylib.models.recompute import set_recomputation
from raylib.objectives.pretraining import UnifiedObjective
from raylib.saving import write_files
from raylib.settings import ObjectiveConfig, PartRates, TermWeights
from tests.factories import make_batch, make_model, take_rows
from tests.workers import run_workers

OPTIM = OptimConfig(lr=0.02, weight_decay=0.1, warmup=0.0, clip=1e9)
# the embedding at half the rate, the head, which is new, at 1.5 times twice the rate
OF_PARTS = OPTIM.model_copy(update={"rates": PartRates(text=0.01, head=0.03, new_factor=2)})
PART_FACTORS = {"embedding": 0.5, "head": 3.0}


class Stack(nn.Module):
    """An embedding, four layers, a head: a model with depths."""

    def __init__(self, layers: int = 4, width: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1)
        self.num_layers = layers

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)

    def depth_of(self, name: str) -> int | None:
        part = name.split(".")
        return {"embedding": 0, "head": None}[part[0]] if part[0] != "layers" else int(part[1]) + 1

    def part_names(self) -> dict[str, str]:
        parts = {"embedding": "text", "head": "head", "layers": "fusion"}
        return {name: parts[name.partition(".")[0]] for name, _ in self.named_parameters()}

    def new_parameters(self) -> frozenset[str]:
        return frozenset({"head.weight", "head.bias"})


class Squares(nn.Module):
    """The mean square error of `model` on this worker's share of the batch."""

    has_unused_parameters = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch):
        loss = ((self.model(batch["x"]) - batch["y"]) ** 2).mean()
        return loss, {"task": loss.detach()}


def batch_of(step: int, rank: int = 0, world: int = 1) -> dict:
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 6, generator=g), torch.randn(8, 1, generator=g)
    return {"x": x[rank::world], "y": y[rank::world]}


def train(
    engine_class, methods, steps, rank=0, world=1, mask=None, start=None, first=0, folder=None, optim=OPTIM
):
    """`steps` steps in epochs of 2 at a constant rate; returns the weights. Saves into `folder`."""
    model = Stack()
    if mask is not None:
        apply_mask(model, mask, "here")
    objective = Squares(model)
    rates = methods.layer_rates(model.num_layers, 2, 4)
    engine = engine_class(objective, optim, torch.device("cpu"), False, start, rates)
    for step in range(first, steps):
        engine.step(batch_of(step, rank, world), step, OPTIM.lr)
    if folder:
        folder.mkdir(exist_ok=True)
        write_files(folder, state_files(engine.state(), rank))
        if rank == 0:
            save_file(model.state_dict(), folder / "model.safetensors")
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def slow_reference(scale, steps, mask=None, part_factors=None) -> dict:
    """The same by hand: an optimizer for each parameter, made anew when it thaws, and a zeroed weight after
    each step. part_factors: of the rate, by the first part of a name."""
    model, optimizers = Stack(), {}
    for name, p in model.named_parameters():
        if mask and name in mask:
            p.data.mul_(mask[name])
    for step in range(steps):
        batch = batch_of(step)
        loss = ((model(batch["x"]) - batch["y"]) ** 2).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            factor = scale(model.depth_of(name), step)
            if factor == 0:
                optimizers.pop(name, None)
                continue
            if name not in optimizers:
                decay = OPTIM.weight_decay if p.ndim >= 2 else 0.0
                optimizers[name] = torch.optim.AdamW(
                    [p], betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=decay
                )
            part_factor = (part_factors or {}).get(name.partition(".")[0], 1.0)
            optimizers[name].param_groups[0]["lr"] = OPTIM.lr * factor * part_factor
            p.grad = gradient
            optimizers[name].step()
            if mask and name in mask:
                p.data.mul_(mask[name])
    return {name: p.detach() for name, p in model.named_parameters()}


def methods_of(**chosen) -> Strategies:
    context = Context(None, None, ("en", "de"), ("yes", "no"), None, None, print)
    return Strategies(validate(StrategiesConfig, chosen, "here"), context)


CASES = {
    "unfreezing": {"unfreezing": {"layers": 1}},
    "decay": {"layer_decay": {"factor": 0.5}},
    "both": {"unfreezing": {"layers": 2}, "layer_decay": {"factor": 0.8}},
}
MASK = {
    f"layers.{i}.weight": torch.rand(6, 6, generator=torch.Generator().manual_seed(i)) > 0.4 for i in range(4)
}


def close(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "masked"])
def test_layer_rates_in_plain_torch_equal_reference(case, mask):
    methods = methods_of(**CASES[case])
    close(train(TorchEngine, methods, 8, mask=mask), slow_reference(methods.layer_rates(4, 2, 4), 8, mask))


def zero_and_resume(rank, world, folder):
    """Every case under ZeRO-2, whole and stopped in mid-phase, after 3 of 8 steps."""
    os.environ["LOCAL_RANK"], out = str(rank), {}
    for case, chosen in CASES.items():
        for mask in (None, MASK):
            methods = methods_of(**chosen)
            whole = train(DeepSpeedEngine, methods, 8, rank, world, mask)
            place = folder / f"{case}{world}{mask is None}"
            train(DeepSpeedEngine, methods, 3, rank, world, mask, folder=place)
            torch.distributed.barrier()
            parts = train(DeepSpeedEngine, methods, 8, rank, world, mask, start=place, first=3)
            out[case, mask is None] = whole, parts
    return out


def torch_workers(rank, world):
    """Every case in plain PyTorch under DDP."""
    return {
        (case, mask is None): train(TorchEngine, methods_of(**chosen), 8, rank, world, mask)
        for case, chosen in CASES.items()
        for mask in (None, MASK)
    }


def test_layer_rates_on_two_torch_workers_equal_reference():
    for results in run_workers(torch_workers, 2):
        for (case, dense), found in results.items():
            close(
                found,
                slow_reference(methods_of(**CASES[case]).layer_rates(4, 2, 4), 8, None if dense else MASK),
            )


@pytest.mark.parametrize("world", [1, 2])
def test_layer_rates_under_zero_2_equal_reference_after_resume(world, tmp_path):
    for results in run_workers(zero_and_resume, world, tmp_path):
        for (case, dense), (whole, parts) in results.items():
            close(
                whole,
                slow_reference(methods_of(**CASES[case]).layer_rates(4, 2, 4), 8, None if dense else MASK),
            )
            for name, value in whole.items():
                assert value.equal(parts[name]), (case, dense, name)
            if not dense:
                for name, kept in MASK.items():
                    assert not parts[name][~kept].any() and whole[name][kept].all()


def rates_of_parts(rank, world, folder):
    """Rates of parts by themselves and with rates of layers, in both engines; ZeRO-2 also stopped after 3 of
    8 steps."""
    os.environ["LOCAL_RANK"], out = str(rank), {}
    for case, chosen in {"alone": {}, **CASES}.items():
        methods = methods_of(**chosen)
        train_parts = partial(train, methods=methods, rank=rank, world=world, optim=OF_PARTS)
        train_parts(DeepSpeedEngine, steps=3, folder=folder / case)
        torch.distributed.barrier()
        parts = train_parts(DeepSpeedEngine, steps=8, start=folder / case, first=3)
        out[case] = train_parts(TorchEngine, steps=8), train_parts(DeepSpeedEngine, steps=8), parts
    return out


def test_rates_of_parts_equal_reference_in_every_engine_and_after_resume(tmp_path):
    for results in run_workers(rates_of_parts, 2, tmp_path):
        for case, found in results.items():
            scale = methods_of(**CASES.get(case, {})).layer_rates(4, 2, 4) or (lambda depth, step: 1.0)
            for weights in found:
                close(weights, slow_reference(scale, 8, part_factors=PART_FACTORS))
            assert all(value.equal(found[2][name]) for name, value in found[1].items()), case


def test_rate_of_a_part_that_the_model_lacks_is_an_error():
    optim = OPTIM.model_copy(update={"rates": PartRates(vision=1e-5)})
    with pytest.raises(UserError, match="optim.rates.vision: .* has: fusion, head, text$"):
        train(TorchEngine, methods_of(), 1, optim=optim)


def test_unfreezing_bottom_layers_never_train_in_five_epochs():
    """Paper 1: 3 layers an epoch of CCLM's 18, 5 epochs of xGQA."""
    method, steps = ScheduledUnfreezing(layers=3), 10
    trained = {
        depth: [method.lr_scale(depth, 18, TrainingProgress(e * steps, 5 * steps, e, 5)) for e in range(5)]
        for depth in range(19)
    }
    assert [depth for depth, scales in trained.items() if not any(scales)] == [1, 2, 3]
    assert (
        trained[18] == trained[16] == trained[0] == [1] * 5
        and trained[15] == [0, 1, 1, 1, 1]
        and trained[4] == [0] * 4 + [1]
    )
    assert method.lr_scale(None, 18, TrainingProgress(0, 50, 0, 5)) == 1


def test_layer_decay_has_published_rates():
    """l d^(N - i): of 18 layers the bottom one has 70 % of the top one's rate at d = 0.98, 0.5 to 0.8 % at
    0.75."""
    now = TrainingProgress(0, 1, 0, 1)
    for factor in (0.98, 0.95, 0.88, 0.75):
        rates = [LayerDecay(factor=factor).lr_scale(i, 18, now) for i in range(19)]
        assert rates == pytest.approx([factor ** (18 - i) for i in range(19)]) and rates[18] == 1
    assert LayerDecay(factor=0.98).lr_scale(1, 18, now) == pytest.approx(0.709, abs=1e-3)
    assert LayerDecay(factor=0.75).lr_scale(1, 18, now) == pytest.approx(0.0075, abs=1e-4)
    assert LayerDecay(0.88).lr_scale(None, 18, now) == 1


def test_unified_model_depths_order_the_layers():
    model = make_model()
    depths = {model.depth_of(name) for name, _ in model.named_parameters()}
    assert depths == {None, 0, 1, 2, 3, 4} and model.num_layers == 4 and model.num_fusion_layers == 2
    assert (
        model.depth_of("text.blocks.0.output.weight") == 1
        and model.depth_of("fusion.blocks.1.output.weight") == 4
    )
    assert model.depth_of("vision.cls") is None and model.depth_of("embedding.word.weight") == 0
    groups = parameter_groups(model, 0.1, model.depth_of)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert [g["depth"] for g in groups] == [None, None, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_top_layers_freeze_everything_below():
    model = make_model()
    TopLayers().adapt(model)
    trained = {model.depth_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {None, 3, 4}
    with pytest.raises(UserError, match=r"top_layers.layers=5, but the model has 4 layers"):
        TopLayers(layers=5).adapt(make_model())
    with pytest.raises(UserError, match=r"unfreezing.layers=9, but the model has 4 layers; give at most 4"):
        ScheduledUnfreezing(layers=9).adapt(make_model())


def test_pruning_five_rounds_leave_59_percent():
    """Paper 0: 10 % of what remains, five times: 40.95 % sparsity. Against sorting all weights by hand."""
    g = torch.Generator().manual_seed(1)
    weights = {"a": torch.randn(100, 100, generator=g), "b": torch.randn(50, 200, generator=g)}
    mask = None
    for _ in range(5):
        mask = prune_mask(weights, mask, 0.1)
    found = sparsity(mask, 40_000)
    assert found == {"prunable": pytest.approx(0.4095, abs=1e-4), "whole": pytest.approx(0.20476, abs=1e-4)}
    every = sorted((abs(float(w)), name, i) for name, m in weights.items() for i, w in enumerate(m.flatten()))
    left = 20_000
    for _ in range(5):
        left -= round(0.1 * left)
    expected = {(name, i) for _, name, i in every[len(every) - left :]}
    assert {(name, i) for name, m in mask.items() for i, kept in enumerate(m.flatten()) if kept} == expected


def test_pruning_of_equal_weights_removes_exact_share():
    mask = prune_mask({"a": torch.ones(4, 5)}, None, 0.25)
    assert int(mask["a"].sum()) == 15
    assert prune_mask({"a": torch.ones(4, 5)}, mask, 0.01)["a"].equal(mask["a"])


def test_pruning_mask_files_round_trip_and_name_mistakes(tmp_path):
    mask = {"a.weight": torch.rand(7, 5) > 0.5, "b": torch.rand(3) > 0.5}
    write_mask(mask, tmp_path / "masks" / "m.safetensors")
    read = read_mask(tmp_path / "masks" / "m.safetensors")
    assert read.keys() == mask.keys() and all(read[name].equal(kept) for name, kept in mask.items())
    with pytest.raises(
        UserError,
        match=r"m\.safetensors: the mask of another model \(2 tensors do not fit, such as a\.weight\)",
    ):
        apply_mask(Stack(), read, str(tmp_path / "m.safetensors"))
    (tmp_path / "no").write_text("mask")
    for name in ("no", "none"):
        with pytest.raises(
            UserError, match="not to be read as a pruning mask|no such file; wanted a pruning mask"
        ):
            read_mask(tmp_path / name)


def test_strategy_terms_with_one_name_are_refused():
    class Other(Strategy):
        def terms(self, model):
            return {"prior": Term(1.0, lambda outputs, part: outputs.logits[:, 0])}

    methods = methods_of(layer_decay={}, unfreezing={})
    methods.built = {"unfreezing": Other(), "layer_decay": Other()}
    with pytest.raises(UserError, match="strategies.layer_decay: another strategy has a term 'prior'"):
        methods.loss_terms(nn.Linear(1, 1))


def test_linguistic_prior_term_equals_worked_distances(tmp_path):
    """d(dog, poodle) and the rest from the vectors' angles; the term is the mean over the k most probable
    answers."""
    (tmp_path / "vectors.txt").write_text("dog 1 0\npoodle 1 1\nbus 0 1\n")
    said = []
    context = Context(
        tmp_path,
        tmp_path,
        ("en",),
        ("dog", "poodle", "bus", "unheard"),
        None,
        tmp_path / "cache",
        said.append,
    )
    prior = LinguisticPriorConfig(k=2, alpha=3).build(context)
    assert "unheard" in said[0]
    logits, answer = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 0.0, 5.0, 4.0]]), torch.tensor([0, 2])
    term = prior.terms(nn.Linear(1, 1))["prior"]
    p = logits.softmax(1)
    near = 1 - math.sqrt(0.5)
    expected = [float(p[0, 1]) * near, float(p[1, 3]) * 1.0]
    found = term.values(Outputs(logits=logits), {"answer": answer})
    assert term.weight == 3 and found.tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match=r"prior.k=10, but there are 4 answers"):
        LinguisticPriorConfig().build(context)


def test_strategies_are_named_in_their_own_files_alone():
    """A strategy declares what runs, tasks and searches need of it."""
    root = Path(__file__).parent.parent
    files = [root / "tune_spaces" / "jobs.py", root / "raylib" / "models" / "finetuned.py"]
    files += (root / "finetune" / "tasks").glob("*.py")
    files += [root / "finetune" / f"{name}.py" for name in ("config", "train", "worker", "build", "batches")]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword | ast.arg)}
        assert not names & STRATEGIES.keys(), file


def test_strategies_declare_known_needs_and_own_types():
    """Every need is one of `NEEDS`; each strategy is a field with a type of its own."""
    assert {need for kind in STRATEGIES.values() for need in kind.needs} <= NEEDS.keys()
    assert len(set(STRATEGIES.values())) == len(STRATEGIES) == len(StrategiesConfig.model_fields)


# ---- what is frozen is in evaluation mode


def training_flags(model):
    """{part: whether all of its modules are in training mode}; None: some are."""
    flags = {}
    for name, part in model.freezable_parts().items():
        modes = {module.training for module in part.modules()}
        flags[name] = modes.pop() if len(modes) == 1 else None
    return flags


FREEZES = {
    "vision": {"train_vision": False},
    "image_projection": {"train_image_projection": False},
    "embeddings": {"train_embeddings": False},
    "text": {"frozen_text_layers": 2},
}


@pytest.mark.parametrize("part", FREEZES)
def test_frozen_part_of_pretraining_is_in_evaluation_mode(part):
    model = make_model(dropout=0.5, vision_dropout=0.5)
    objective = UnifiedObjective(model, ObjectiveConfig(**FREEZES[part])).train()
    assert training_flags(model) == {name: name != part for name in model.freezable_parts()}
    assert not objective.eval().model.fusion.training
    # as the loop does it in each step, DDP and ZeRO around it too
    nn.Sequential(objective).train()
    assert training_flags(model)[part] is False and model.fusion.training


@pytest.mark.parametrize("part", ["embeddings", "text", "vision", "image_projection", "fusion"])
def test_frozen_part_of_fine_tuning_is_in_evaluation_mode(part):
    model = FinetuneModel(make_model(dropout=0.5, vision_dropout=0.5), ("a", "b"), 1, 0.1)
    freeze(model.backbone, (part,))
    model.train()
    flags = training_flags(model.backbone)
    assert flags[part] is False and model.head.training
    assert all(flags[name] for name in flags.keys() - {part, "image_projection"})


def test_lower_layers_alone_are_in_evaluation_mode():
    model = make_model(dropout=0.5)
    UnifiedObjective(model, ObjectiveConfig(frozen_text_layers=1)).train()
    assert [block.training for block in model.text.blocks] == [False, True]
    assert not model.text.blocks[0].dropout.training and model.text.blocks[1].dropout.training


def test_frozen_image_encoder_gives_one_answer_in_training():
    images = make_batch()["image_text"]["images"]
    model = make_model(vision_dropout=0.5)
    model.train()
    assert not model.encode_images(images).values.equal(model.encode_images(images).values)
    model.vision.requires_grad_(False)
    model.train()
    assert model.encode_images(images).values.equal(model.encode_images(images).values)


def test_model_with_small_modules_trains_with_dropout_but_of_its_image_encoder():
    model = make_model(dropout=0.5, vision_dropout=0.5)
    peft.insert(model, "lora", {"rank": 2, "alpha": 4.0})
    peft.freeze_pretrained(model, True)
    model.train()
    flags = training_flags(model)
    assert flags["vision"] is False and flags["embeddings"] and flags["text"] and flags["fusion"]


def thaw(rank, world):
    """Training mode of each layer in each of six steps, in epochs of two, one more layer an epoch."""
    os.environ["LOCAL_RANK"], found = str(rank), []
    for engine_class in (TorchEngine, DeepSpeedEngine):
        for recompute in ("none", "blocks"):
            model = make_model(dropout=0.5, dtype=torch.float32)
            set_recomputation(model, recompute, 1)
            objective = UnifiedObjective(model, ObjectiveConfig(weights=TermWeights()))
            rates = methods_of(unfreezing={"layers": 1}).layer_rates(model.num_layers, 2, 4)
            engine = engine_class(objective, OPTIM, torch.device("cpu"), False, None, rates)
            modes = []
            for step in range(6):
                objective.train()  # as the loop begins a step
                engine.step(take_rows(make_batch(step, 4, 4, 4), rank, world), step, OPTIM.lr)
                layers = [*model.text.blocks, *model.fusion.blocks]
                modes.append([layer.training and layer.dropout.training for layer in layers])
            found.append(modes)
    return found


def test_thawed_layers_are_in_training_mode_again_in_every_engine():
    epochs = [[False, False, False, True], [False, False, True, True], [False, True, True, True]]
    expected = [mode for mode in epochs for _ in range(2)]
    for results in run_workers(thaw, 2):
        assert all(modes == expected for modes in results)


def test_new_parameters_are_those_of_a_classifier_that_no_weights_have(tmp_path):
    model = FinetuneModel(make_model(), ("a", "b"), 1, 0.1)
    parts, new = model.part_names(), model.new_parameters()
    assert new and all(name.startswith("head.") for name in new)
    assert {parts[name] for name in new} == {"head"}
    of = {"vision": "vision", "embedding": "text", "text": "text", "fusion": "fusion", "match_head": "head"}
    for name in dict(model.backbone.named_parameters()):
        assert parts[f"backbone.{name}"] == of.get(name.partition(".")[0], "head"), name
    model.save(tmp_path)
    assert not FinetuneModel.from_pretrained(tmp_path).new_parameters()
    # a decoder's layers are copies of the backbone's (CCLM's code has no larger rate for them either)
    assert not FinetuneModel(
        make_model(), ("a", "b"), 1, 0.1, answers=[[0, 5, 2], [0, 6, 2]]
    ).new_parameters()
