"""The sigmoid contrast against the plain B x B formula and `transformers`, and how much it holds."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from raylib.distributed import count_rows, worker_rows
from raylib.models.unified import UnifiedModel
from raylib.objectives import sigmoid
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from raylib.objectives.sigmoid import sigmoid_contrast
from tests.factories import make_batch, make_model
from tests.workers import run_workers

SIZE, WIDTH = 12, 5
# pairs 0 and 7 have one image, 3 and 4 one caption, 9 the image of 10 and the caption of 11
LEFT_IDS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 8, 9, 9, 11])
RIGHT_IDS = torch.tensor([0, 1, 2, 3, 3, 5, 6, 7, 8, 11, 10, 11])


def make_sides():
    torch.manual_seed(0)
    left, right = (F.normalize(torch.randn(SIZE, WIDTH, dtype=torch.float64), dim=1) for _ in range(2))
    return left, right, torch.tensor([0.3], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)


def plain_loss(left, right, temperature, bias):
    """The formula as it stands in the paper, with a B x B table, and without pairs of equal content."""
    own = torch.eye(SIZE, dtype=torch.bool)
    equal = (LEFT_IDS[:, None] == LEFT_IDS) | (RIGHT_IDS[:, None] == RIGHT_IDS)
    z = torch.where(own, 1.0, -1.0)
    losses = -F.logsigmoid(z * (left @ right.T / temperature + bias))
    return losses[own | ~equal].sum()


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def on_share(rank, world, block_rows):
    sigmoid.ROWS = block_rows
    left, right, temperature, bias = make_sides()
    mine = list(worker_rows(SIZE, rank, world))
    rows = [x[mine].clone().requires_grad_() for x in (left, right)]
    ids = torch.stack([LEFT_IDS, RIGHT_IDS], 1)[mine]
    scalars = [x.requires_grad_() for x in (temperature, bias)]
    with LargestTensor() as largest:
        loss = sigmoid_contrast(*rows, ids, count_rows(SIZE), *scalars)
        (loss * 0.25).backward()
    return loss.detach(), [x.grad for x in (*rows, *scalars)], largest.size


@pytest.mark.parametrize(("world", "block_rows"), [(1, 4096), (1, 5), (2, 4096), (3, 3), (5, 2)])
def test_sigmoid_contrast_equals_plain_formula_on_any_workers(world, block_rows):
    sides = [x.requires_grad_() for x in make_sides()]
    expected = plain_loss(*sides)
    gradients = torch.autograd.grad(expected * 0.25, sides)
    results = run_workers(on_share, world, block_rows)
    torch.testing.assert_close(sum(loss for loss, _, _ in results), expected.detach(), rtol=0, atol=1e-10)
    for rank, (_, (left, right, *_), _) in enumerate(results):
        mine = list(worker_rows(SIZE, rank, world))
        torch.testing.assert_close(left, gradients[0][mine], rtol=0, atol=1e-10)
        torch.testing.assert_close(right, gradients[1][mine], rtol=0, atol=1e-10)
    for i in (2, 3):  # scalars: a worker has its rows' share
        total = sum(found[i] for _, found, _ in results)
        torch.testing.assert_close(total, gradients[i], rtol=0, atol=1e-10)
    rows = -(-SIZE // world)
    # a comparison of two ids a pair is the largest; b x e, and the ids of all, are no tables of pairs
    limit = max(2 * rows * min(rows, block_rows), rows * WIDTH, 2 * rows * world)
    assert max(size for _, _, size in results) <= limit


def test_sigmoid_contrast_equals_siglip_of_transformers():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(
        text_config=dict(sizes, vocab_size=30, max_position_embeddings=8, projection_size=16),
        vision_config=dict(sizes, image_size=16, patch_size=8),
    )
    siglip = transformers.SiglipModel(config).double().eval()
    with torch.no_grad():
        siglip.logit_scale.fill_(1.3)
        siglip.logit_bias.fill_(-2.0)
    out = siglip(
        input_ids=torch.randint(3, 30, (6, 8)),
        pixel_values=torch.randn(6, 3, 16, 16, dtype=torch.float64),
        return_loss=True,
    )
    temperature, bias = (-siglip.logit_scale).exp(), siglip.logit_bias
    ids = torch.arange(6)[:, None].expand(-1, 2)
    loss = sigmoid_contrast(out.image_embeds, out.text_embeds, ids, [6], temperature, bias) / 6
    torch.testing.assert_close(loss, out.loss, rtol=0, atol=1e-10)
    parameters = [p for p in siglip.parameters() if p.requires_grad]
    expected = torch.autograd.grad(out.loss, parameters, retain_graph=True, allow_unused=True)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters, allow_unused=True), expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_sigmoid_bias_is_a_parameter_where_it_is_used_and_is_stored(tmp_path):
    plain, model = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    assert "contrast_bias" not in plain.state_dict()
    objective = UnifiedObjective(model, ObjectiveConfig(contrast="sigmoid"))
    loss, terms = objective(make_batch())
    loss.backward()
    assert model.contrast_bias.grad.abs() > 0 and not objective.has_unused_parameters
    with torch.no_grad():
        model.contrast_bias.fill_(-3.0)
    model.save(tmp_path)
    again = UnifiedModel.from_pretrained(tmp_path)
    assert again.contrast_bias.item() == -3.0
    softmax = UnifiedObjective(again, ObjectiveConfig())
    assert not softmax.has_unused_parameters and not again.contrast_bias.requires_grad
    # contrast alone changes: hard negatives are drawn from the same similarities
    _, others = UnifiedObjective(plain, ObjectiveConfig())(make_batch())
    for name in ("itm", "vlm", "tlm", "xmlm"):
        torch.testing.assert_close(terms[name], others[name])
    assert terms["ucl_image"] != others["ucl_image"]
