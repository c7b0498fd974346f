"""Each term, and its gradient, against the slow reference; on odd sizes, unequal lengths, every switch."""

import itertools
import warnings

import pytest
import torch

from benchmarks.device import GPU
from benchmarks.dry import dry_run
from raylib.config import override
from raylib.data.loading import to_device
from raylib.engine import TorchEngine
from raylib.errors import UserError
from raylib.models.unified import UnifiedModel
from raylib.objectives import FrozenTextCache
from raylib.objectives.pretraining import ObjectiveConfig, TermWeights, UnifiedObjective
from raylib.packed import Ragged, first_tokens
from raylib.settings import OptimConfig
from tests.factories import SMALL, make_batch, make_model, make_sentences
from tests.reference import slow_terms

TERMS = list(TermWeights.model_fields)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIGS = {
    "paper": {},
    "masked ucl": {"ucl_text": "masked"},
    "masked itm": {"itm_text": "masked"},
    "masked source": {"tlm_source": "masked"},
    "public code": {"follow": "code", "contrast_groups": 2},
    "mean": {"directions": "mean"},
    "mean of tlm": {"tlm_directions": "mean"},
    "itm pairs": {"itm_weighting": "pairs", "itm_text": "masked"},
    "three groups": {"contrast_groups": 3},
    "two groups, every second": {"contrast_groups": 2, "fuse_every": 2},
    "every second": {"fuse_every": 2},
    "every third, masked": {"fuse_every": 3, "ucl_text": "masked"},
    "every third, clean": {"fuse_every": 3, "tlm_source": "masked"},
    "every third, masked itm": {"fuse_every": 3, "itm_text": "masked", "tlm_source": "masked"},
}


def compare(model, batch, config, true=frozenset()):
    objective = UnifiedObjective(model, config)
    loss, terms = objective(batch)
    weights = config.weights.model_dump()
    expected = {
        k: v
        for k, v in slow_terms(model, batch, config, true).items()
        if weights["itm" if k == "itm_accuracy" else k]
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value.detach(), rtol=2e-6, atol=2e-6, msg=name)
    slow = sum(weights[name] * value for name, value in expected.items() if name != "itm_accuracy")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    slow_gradients = torch.autograd.grad(slow, list(trained.values()), allow_unused=True)
    for (name, p), a, b in zip(trained.items(), ours, slow_gradients, strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b, rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("fusion", ["cross", "entangled"])
@pytest.mark.parametrize("switches", CONFIGS.values(), ids=CONFIGS)
def test_objective_terms_and_gradients_equal_slow_reference(switches, fusion):
    compare(make_model(fusion=fusion), make_batch(), ObjectiveConfig(**switches))


@pytest.mark.parametrize("left_out", TERMS)
def test_objective_term_of_weight_zero_is_omitted(left_out):
    compare(make_model(), make_batch(1), ObjectiveConfig(weights=TermWeights(**{left_out: 0.0})))


@pytest.mark.parametrize("alone", TERMS)
def test_objective_computes_one_term_alone(alone):
    weights = {name: 2.0 if name == alone else 0.0 for name in TERMS}
    compare(make_model(), make_batch(2), ObjectiveConfig(weights=TermWeights(**weights)))


@pytest.mark.parametrize("absent", ["image_text", "parallel", "text"])
def test_objective_stream_may_be_absent(absent):
    batch = make_batch(3)
    del batch[absent]
    compare(make_model(), batch, ObjectiveConfig())


def test_objective_equal_images_and_captions_are_no_negatives():
    batch = make_batch(4, pairs=4)
    batch["image_text"]["image_id"][1] = batch["image_text"]["image_id"][0]
    batch["image_text"]["text"].text_id[3] = batch["image_text"]["text"].text_id[2]
    compare(make_model(), batch, ObjectiveConfig())


def test_objective_without_negatives_equals_slow_reference():
    batch = make_batch(5, pairs=3)
    batch["image_text"]["image_id"][:] = 1
    compare(make_model(), batch, ObjectiveConfig())


def test_objective_of_one_row_per_stream_equals_slow_reference():
    compare(make_model(), make_batch(6, 1, 1, 1), ObjectiveConfig())


def test_objective_without_masked_tokens_equals_slow_reference():
    batch = make_batch(7)
    text = batch["text"]["text"]
    batch["text"]["text"] = text._replace(
        masked=text.clean, positions=text.positions[:0], labels=text.labels[:0]
    )
    compare(make_model(), batch, ObjectiveConfig())


def test_objective_frozen_vision_gets_no_gradient():
    model = make_model()
    loss, _ = UnifiedObjective(model, ObjectiveConfig(train_vision=False))(make_batch())
    loss.backward()
    assert all(p.grad is None for p in model.vision.parameters())
    assert model.image_projection.weight.grad is not None


def test_objective_frozen_embeddings_get_no_gradient():
    """Also as the decoder of masked words; what they decode trains."""
    model = make_model()
    loss, _ = UnifiedObjective(model, ObjectiveConfig(train_embeddings=False))(make_batch())
    loss.backward()
    assert all(p.grad is None for p in model.embedding.parameters())
    assert all(p.grad is not None for p in model.masked_head.parameters())


def test_objective_frozen_text_layers_get_no_gradient():
    """The lowest ones, as many as asked; those above them train."""
    model = make_model()
    loss, _ = UnifiedObjective(model, ObjectiveConfig(frozen_text_layers=1))(make_batch())
    loss.backward()
    frozen, *above = model.text.blocks
    assert above and all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for block in above for p in block.parameters())


def test_objective_frozen_encoder_encodes_each_sentence_once():
    """With every text layer frozen, losses and gradients are those of encoding each time, a second step
    encodes nothing new."""
    config = ObjectiveConfig(
        train_embeddings=False, frozen_text_layers=2, weights=TermWeights(tlm=0, xmlm=0), fuse_every=2
    )
    batch, found = make_batch(pairs=6), []
    for remembers in (True, False):
        model = make_model()
        objective = UnifiedObjective(model, config)
        assert objective.frozen_texts is not None
        objective.frozen_texts = objective.frozen_texts if remembers else None
        calls, plan = [], model.text.plan
        model.text.plan = lambda lengths, *more, calls=calls, plan=plan: (
            calls.append(len(lengths)) or plan(lengths, *more)
        )
        for _ in range(2):
            model.zero_grad()
            loss, terms = objective(batch)
            loss.backward()
        found.append(
            (terms, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls)
        )
    (terms, gradients, calls), (slow_terms, slow_gradients, slow_calls) = found
    for name, value in terms.items():
        torch.testing.assert_close(value, slow_terms[name])
    assert gradients.keys() == slow_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, slow_gradients[name])
    assert sum(calls) < sum(slow_calls) and len(slow_calls) == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_objective_frozen_states_do_not_depend_on_the_batch(device):
    """A resumed run computes a sentence's state among others than before: to the bit the same."""
    model = make_model(dtype=torch.float32, width=64, feedforward=256).to(device)
    objective = UnifiedObjective(model, ObjectiveConfig(train_embeddings=False, frozen_text_layers=2))
    sentences = make_sentences(torch.arange(40) % 9 + 3, torch.Generator().manual_seed(0))
    rows = Ragged(sentences.clean.to(device), sentences.lengths)
    whole = objective._encode_cls(rows, torch.arange(40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for part in order.split([1, 7, 32]):
        assert objective._encode_cls(rows, part).equal(whole[part.to(device)])
    together = model.encode_text(rows, first_tokens(rows.lengths))
    torch.testing.assert_close(whole, together, rtol=1e-4, atol=1e-5)


def test_frozen_text_cache_respects_its_limit():
    known, made = FrozenTextCache(), []
    known.LIMIT = 4

    def encode(rows):
        made.append(len(rows))
        return 10.0 * rows[:, None]

    def ask(*texts):
        return (
            known.cls(torch.tensor(texts), lambda rows: encode(torch.tensor(texts)[rows])).squeeze(1).tolist()
        )

    assert ask(5, 6, 5) == [50, 60, 50] and ask(6, 7) == [60, 70] and made == [2, 1]
    assert ask(8, 9) == [80, 90] and ask(5) == [50] and made == [2, 1, 2, 1]  # full: it starts anew


def test_vision_windows_are_encoded_like_images_of_their_own():
    """The states: the mean of the windows' CLS, these, then their patches, each with its window's place; what
    one window shows changes no other."""
    whole, windowed = make_model(), make_model(image_size=32, vision_window=16)
    weights = {name: value.clone() for name, value in whole.vision.state_dict().items()}
    weights["place"] = 0.1 * torch.randn(4, 16, dtype=torch.float64)
    windowed.vision.load_state_dict(weights)
    image = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    found = windowed.encode_images(image)
    assert found.lengths.tolist() == [1 + 4 + 16]
    mean = 0
    for i in range(4):
        top, left = 16 * (i // 2), 16 * (i % 2)
        norm, place = whole.vision.norm, weights["place"][i]
        norm.forward = lambda x: x
        raw = whole.encode_images(image[:, top : top + 16, left : left + 16]).values
        mean = mean + raw[0] / 4
        del norm.forward
        torch.testing.assert_close(found.values[1 + i], norm(raw[0]) + place)
        torch.testing.assert_close(found.values[5 + 4 * i : 9 + 4 * i], norm(raw[1:]) + place)
    torch.testing.assert_close(found.values[0], norm(mean))
    windowed.vision.resize(48)
    assert windowed.vision.place.shape == (9, 16)


@pytest.mark.parametrize("off", [c for n in range(1, len(TERMS)) for c in itertools.combinations(TERMS, n)])
def test_objective_declares_which_parameters_no_term_trains(off):
    model = make_model()
    objective = UnifiedObjective(model, ObjectiveConfig(weights=TermWeights(**dict.fromkeys(off, 0.0))))
    objective(make_batch())[0].backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert objective.has_unused_parameters == bool(unused), unused


MY_TERM = """
from raylib.objectives import LossPart, term

@term("parallel", reads=("embeddings",), trains=("text_projection",))
def alignment(step):
    apart, other = (
        step.model.embed_text_states(text.cls(), normalize=True) for text in (step.source, step.target)
    )
    apart = apart - other
    return [LossPart(apart.square().sum(), len(apart))]
"""


def test_objective_takes_a_term_of_a_users_file(tmp_path):
    """Its loss adds up, weighted; of weight 0 it changes nothing, whether parameters go unused neither."""
    (tmp_path / "my_term.py").write_text(MY_TERM)
    file, model, batch = f"{tmp_path}/my_term.py:alignment", make_model(), make_batch()
    objective, off = (
        UnifiedObjective(model, ObjectiveConfig(terms={"mine": {"file": file, "weight": weight}}))
        for weight in (0.5, 0.0)
    )
    loss, terms = objective(batch)
    plain, plain_terms = UnifiedObjective(model, ObjectiveConfig())(batch)
    assert set(terms) - set(plain_terms) == {"mine"} and terms["mine"] > 0
    torch.testing.assert_close(loss, plain + 0.5 * terms["mine"])
    assert torch.equal(off(batch)[0], plain) and not off.has_unused_parameters
    with pytest.raises(UserError, match="unknown term of .*my_term.py 'aligned'; did you mean alignment"):
        UnifiedObjective(
            model, ObjectiveConfig(terms={"mine": {"file": file.replace("alignment", "aligned")}})
        )
    with pytest.raises(UserError, match="vlm is a term already; give yours another name"):
        override(ObjectiveConfig(), [f"terms.vlm={file}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('term("parallel"', 'term("pairs"'),
            r"my_term.py:4: ValueError: @term: 'pairs' is none of image_text,",
        ),
        (('("embeddings",)', '("embedding",)'), "@term: 'embedding' is none of embeddings, masked, matches"),
        (
            ("text_projection", "text_proj"),
            r"objective.terms.mine trains: 'text_proj'; did you mean text_proj",
        ),
        (
            ("[LossPart(apart.square().sum(), len(apart))]", "apart"),
            "mine returned Tensor; wanted a list of Loss",
        ),
        ((".sum(), len", ".sum(1), len"), r"mine: a LossPart has a value of shape \(\d+,\); wanted a sum"),
        (("@term", "# @term"), "no function in it is a term; @term above"),
    ],
    ids=["stream", "reads", "trains", "no parts", "no sum", "no term"],
)
def test_objective_user_term_mistakes_are_one_line(tmp_path, change, message):
    assert change[0] in MY_TERM
    (tmp_path / "my_term.py").write_text(MY_TERM.replace(*change))
    config = ObjectiveConfig(terms={"mine": {"file": f"{tmp_path}/my_term.py"}})
    with pytest.raises(UserError, match=message):
        UnifiedObjective(make_model(), config)(make_batch())


@pytest.mark.parametrize("name", ["paper", "every third, clean"])
def test_objective_waits_once_for_a_gpu(name):
    """For the choice of negatives, in a whole step, optimizer and guard too; all that is planned travels in
    two copies, before and after it, and the counts in a third."""
    with torch.device("meta"):
        model = UnifiedModel(SMALL)
    batch = make_batch(pairs=6)
    with dry_run() as counter:
        objective = UnifiedObjective(model.to(GPU).train(), ObjectiveConfig(**CONFIGS[name]))
        engine, on_device = TorchEngine(objective, OptimConfig(), GPU, True, None), to_device(batch, GPU)
        counter.clear()
        engine.step(on_device, 0, 1e-4)
    figures = counter.summary()
    assert figures["device_to_host"]["copies"] == 1
    assert list(figures["waits"].values()) == [1], figures["waits"]
    assert figures["host_to_device"]["copies"] <= 3
    layers = model.config.text_layers + 2 * 3 * model.config.fusion_layers + model.config.vision_layers
    # fusion with images and with translations: by self-attention and by cross-attention; of plain text: by
    # self-attention alone; forward and backward
    assert figures["attention_calls"] == 2 * (layers - model.config.fusion_layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_objective_on_cuda_waits_once():
    """The losses of the CPU; and in a whole step, optimizer and guard too, one wait by CUDA's own account."""
    model, batch, device = make_model(dtype=torch.float32), make_batch(pairs=6), torch.device("cuda")
    _, expected = UnifiedObjective(model, ObjectiveConfig())(batch)
    objective, on_device = UnifiedObjective(model.to(device), ObjectiveConfig()), to_device(batch, device)
    for name, value in objective(on_device)[1].items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-3, atol=1e-3, msg=name)
    engine = TorchEngine(objective, OptimConfig(), device, True, None)
    for step in range(2):  # kernels are loaded, the optimizer's state is made
        engine.step(on_device, step, 1e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.step(on_device, 2, 1e-4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) == 1, waits
