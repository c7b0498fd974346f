from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from raylib.distributed import clamp_parameter
from raylib.models import heads as vocabulary
from raylib.models.heads import (
    HEAD_ROWS,
    _cast_table,
    _gradients,
    _lean_gradients,
    head_rows,
    vocabulary_loss,
)
from raylib.objectives import draw_hard_negatives, info_nce
from raylib.runtime import set_deterministic

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_contrastive_loss_excludes_equal_content():
    torch.manual_seed(0)
    queries, keys = F.normalize(torch.randn(2, 4), dim=1), F.normalize(torch.randn(5, 4), dim=1)
    positive, excluded = torch.tensor([1, 4]), torch.zeros(2, 5)
    excluded[0, 3] = -torch.inf
    loss, logits = info_nce(queries, keys, positive, excluded, torch.tensor([0.2]))
    torch.testing.assert_close(logits, queries @ keys.T / 0.2 + excluded)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(queries, keys, positive, excluded, torch.tensor([0.2]))[0], loss)
    slow = 0.0
    for i, p, used in ((0, 1, [0, 1, 2, 4]), (1, 4, [0, 1, 2, 3, 4])):
        scores = queries[i] @ keys.T / 0.2
        slow += torch.log(sum(torch.exp(scores[j]) for j in used)) - scores[p]
    torch.testing.assert_close(loss, slow)


@pytest.mark.parametrize("rows", [0, 1, HEAD_ROWS, 2 * HEAD_ROWS + 3])
def test_masked_lm_loss_equals_plain_cross_entropy(rows):
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 6), torch.randn(9, 6), torch.randn(9)]
    labels, scale = torch.randint(0, 9, (rows,)), torch.rand(rows).double()
    ours, plain = ([x.clone().double().requires_grad_() for x in inputs] for _ in range(2))
    loss, losses = vocabulary_loss(*ours, labels, scale)
    slow = F.cross_entropy(F.linear(*plain), labels, reduction="none")
    torch.testing.assert_close(losses, slow.detach())
    torch.testing.assert_close(loss, (slow * scale).sum())
    (3 * loss).backward(), (3 * slow * scale).sum().backward()
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_masked_lm_loss_in_bf16_is_close():
    torch.manual_seed(0)
    inputs = [torch.randn(HEAD_ROWS + 7, 16), torch.randn(50, 16) * 0.3, torch.randn(50)]
    labels, scale = torch.randint(0, 50, (HEAD_ROWS + 7,)), torch.rand(HEAD_ROWS + 7)
    low, full = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        vocabulary_loss(*low, labels, scale)[0].backward()
    vocabulary_loss(*full, labels, scale)[0].backward()
    for x, y in zip(low, full, strict=True):
        assert x.grad.dtype == torch.float32
        assert (x.grad - y.grad).norm() < 0.02 * y.grad.norm()


def lean_loss(states, weight, bias, labels, scale, dtype=torch.bfloat16, needed=(True, True)):
    """Loss, losses and gradients as the GPU's way in bf16 has them, on this CPU."""
    losses, *grads = _lean_gradients(states, weight, bias, labels, scale, dtype, needed)
    return losses, grads


@pytest.mark.parametrize("chunk", [7, 4096])
def test_lean_masked_lm_loss_is_as_close_as_the_one_of_the_cpu(monkeypatch, chunk):
    torch.manual_seed(0)
    rows, width, words = 600, 32, 1000
    states, weight, bias = torch.randn(rows, width), torch.randn(words, width) * 0.5, torch.randn(words)
    labels, scale = torch.randint(0, words, (rows,)), torch.rand(rows) / rows
    # one in three knows its word, and one in three is quite wrong
    states[::3] = 4 * weight[labels[::3]]
    states[1::3] = -8 * weight[labels[1::3]]
    monkeypatch.setattr(vocabulary, "head_rows", lambda *_: chunk)
    full = [x.double().requires_grad_() for x in (states, weight, bias)]
    expected = F.cross_entropy(F.linear(*full), labels, reduction="none")
    (expected * scale).sum().backward()
    low = [x.clone().requires_grad_() for x in (states, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, losses = vocabulary_loss(*low, labels, scale)
    loss.backward()
    lean_losses, grads = lean_loss(states, weight, bias, labels, scale)
    for found, x, y in zip(grads, low, full, strict=True):
        ours, theirs = ((g - y.grad).norm() / y.grad.norm() for g in (found, x.grad))
        assert ours < 1.5 * theirs + 1e-3, (x.shape, float(ours), float(theirs))
    assert expected.max() > 100
    ours, theirs = ((x - expected).abs() for x in (lean_losses, losses))
    assert ours.max() < theirs.max() + 0.02
    assert (lean_losses - losses).mean().abs() < 1e-3  # bf16 chances err to both sides
    sure = expected < 0.1
    assert sure.sum() > 50
    torch.testing.assert_close(lean_losses[sure], losses[sure], rtol=0.02, atol=1e-4)


def test_lean_masked_lm_loss_in_float32_equals_cross_entropy():
    torch.manual_seed(0)
    inputs = [torch.randn(50, 8), torch.randn(90, 8), torch.randn(90)]
    labels, scale = torch.randint(0, 90, (50,)), torch.rand(50)
    plain = [x.clone().requires_grad_() for x in inputs]
    expected = F.cross_entropy(F.linear(*plain), labels, reduction="none")
    (expected * scale).sum().backward()
    losses, grads = lean_loss(*inputs, labels, scale, torch.float32)
    torch.testing.assert_close(losses, expected.detach())
    for found, x in zip(grads, plain, strict=True):
        torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("is_lean", [False, True])
def test_masked_lm_loss_computes_no_gradient_that_is_not_needed(is_lean):
    torch.manual_seed(0)
    inputs = [torch.randn(50, 8), torch.randn(90, 8), torch.randn(90)]
    labels, scale = torch.randint(0, 90, (50,)), torch.rand(50)
    function = _lean_gradients if is_lean else _gradients
    whole, frozen, none = (
        function(*inputs, labels, scale, torch.float32, needed)
        for needed in ((True, True), (True, False), (False, False))
    )
    assert whole[0].equal(frozen[0]) and whole[0].equal(none[0])
    assert whole[1].equal(frozen[1])
    torch.testing.assert_close(whole[3], frozen[3])
    assert frozen[2] is None and none[2] is None
    inputs[0].requires_grad_()
    with torch.no_grad():
        assert vocabulary_loss(*inputs, labels, scale)[1].equal(
            _gradients(*inputs, labels, scale, torch.float32, (False, False))[0]
        )
    vocabulary_loss(*inputs, labels, scale)[0].backward()
    torch.testing.assert_close(inputs[0].grad, whole[1])


@needs_gpu
@pytest.mark.parametrize("rows", [1, 700, 3300])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_masked_lm_loss_on_cuda_is_that_of_the_cpu(rows, is_bf16, monkeypatch):
    """With a vocabulary to be padded, in one chunk and in several."""
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 64), torch.randn(5002, 64) * 0.3, torch.randn(5002)]
    labels, scale = torch.randint(0, 5002, (rows,)), torch.rand(rows) / rows
    full = [x.double().requires_grad_() for x in inputs]
    expected = F.cross_entropy(F.linear(*full), labels, reduction="none")
    (3 * expected * scale).sum().backward()
    for size in (head_rows(torch.device("cuda"), 5002, 4), 256):
        monkeypatch.setattr(vocabulary, "head_rows", lambda *_, size=size: size)
        found = [x.cuda().requires_grad_() for x in inputs]
        with torch.autocast("cuda", torch.bfloat16, enabled=is_bf16):
            states = found[0].to(torch.bfloat16) if is_bf16 else found[0]
            loss, losses = vocabulary_loss(states, *found[1:], labels.cuda(), scale.cuda())
        (3 * loss).backward()
        tolerance = 0.02 if is_bf16 else 1e-4
        torch.testing.assert_close(losses.cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
        for x, y in zip(found, full, strict=True):
            assert x.grad.dtype == torch.float32 and x.grad.is_contiguous()
            assert (x.grad.cpu() - y.grad).norm() < tolerance * y.grad.norm()


def test_vocabulary_is_padded_in_memory_off_the_cpu_alone(monkeypatch):
    weight, bias = torch.empty(250002, 8, device="meta"), torch.empty(250002, device="meta")
    table, shift = _cast_table(weight, bias, torch.bfloat16)
    assert table.shape == (250048, 8) and shift.shape == (250048,) and table.dtype == torch.bfloat16
    assert len(_cast_table(torch.ones(9, 2), torch.ones(9), torch.float32)[0]) == 9
    assert head_rows(torch.device("cpu"), 250002, 8) == HEAD_ROWS
    memory = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert head_rows(torch.device("cuda"), 250048, 4) == 3999


def test_draw_hard_negatives_follow_the_similarities():
    torch.manual_seed(0)
    scores = torch.randn(1, 6)
    forbidden = torch.tensor([[False, True, False, False, True, False]])
    draws = (torch.arange(20000) + 0.5) / 20000
    index, exists = draw_hard_negatives(scores.expand(20000, -1), forbidden.expand(20000, -1), draws)
    assert exists.all()
    share = torch.bincount(index, minlength=6) / 20000
    torch.testing.assert_close(
        share, scores.masked_fill(forbidden, -torch.inf).softmax(1)[0], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_draw_hard_negatives_tolerate_non_finite_scores(bad):
    scores = torch.full((4, 4), bad)
    index, exists = draw_hard_negatives(scores, torch.eye(4).bool(), torch.tensor([0.0, 0.3, 0.7, 0.999999]))
    assert exists.all()
    assert (index != torch.arange(4)).all()


def test_draw_hard_negatives_are_the_same_without_order_of_sums():
    torch.manual_seed(0)
    given = torch.randn(200, 50), torch.rand(200, 50) < 0.3, torch.rand(200)
    plain, _ = draw_hard_negatives(*given)
    set_deterministic(True)
    try:
        ordered, _ = draw_hard_negatives(*given)
    finally:
        set_deterministic(False)
    assert torch.equal(plain, ordered)


def test_draw_hard_negatives_never_draw_excluded_pairs():
    torch.manual_seed(0)
    scores = torch.randn(500, 30) * 40  # so sharp that most chances are 0 in float32
    forbidden = torch.rand(500, 30) < 0.5
    forbidden[7] = True
    for draw in (0.0, 0.5, 0.99999994):
        index, exists = draw_hard_negatives(scores, forbidden, torch.full((500,), draw))
        assert exists.tolist() == [i != 7 for i in range(500)]
        assert not forbidden[torch.arange(500), index][exists].any()


def test_temperature_clamp_lets_the_parameter_return():
    for start, pull, moves in (
        (0.9, 0.2, True),
        (0.9, 2.0, False),
        (0.0001, 0.2, True),
        (0.0001, -1.0, False),
        (0.1, 0.2, True),
    ):
        x = torch.tensor(start, requires_grad=True)
        ((clamp_parameter(x, 0.001, 0.5) - pull) ** 2).backward()
        assert bool(x.grad != 0) == moves
        assert 0.001 <= float(clamp_parameter(x.detach(), 0.001, 0.5)) <= 0.5
