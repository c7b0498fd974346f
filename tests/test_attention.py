"""Packed attention and the encoders over it: both ways of planning against a dense masked reference, and,
where there is a GPU, its kernels against the CPU."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raylib.models.attention import Attention, VarlenPlan, plan_attention
from raylib.models.layers import Encoder, Memory
from raylib.models.peft import KeyValue
from raylib.packed import Ragged, first_tokens, upload

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDTH, HEADS = 32, 4


def test_attention_disables_cudnn_backend():
    """It builds a graph for every new shape, which is seconds a step with packed batches
    (benchmarks/results/gpu.jsonl)."""
    code = "import raylib.models.layers, torch; print(torch.backends.cuda.cudnn_sdp_enabled())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )


def attend(q: Tensor, key_value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of (R, d) over (C, 2d) where `visible` (R, C) says so; zeros where nothing is."""
    q_hre = q.unflatten(1, (HEADS, -1)).transpose(0, 1)
    k_hce, v_hce = key_value.unflatten(1, (2, HEADS, -1)).permute(1, 2, 0, 3)
    scores = q_hre @ k_hce.transpose(1, 2) / q_hre.shape[2] ** 0.5
    weights = scores.exp() * visible
    out = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v_hce
    return out.transpose(0, 1).flatten(1)


def varlen_reference(plan: VarlenPlan, queries: Tensor, key_value: Tensor, heads: int, dropout: float):
    """What the kernels of a GPU do with a plan, one row after the other."""
    assert plan.query_ends.dtype == plan.key_ends.dtype == torch.int32
    assert plan.query_ends[-1] == len(queries) and plan.key_ends[-1] == len(key_value)
    outputs, starts = [], zip(plan.query_ends[:-1], plan.key_ends[:-1], strict=True)
    for (q, k), q_end, k_end in zip(starts, plan.query_ends[1:], plan.key_ends[1:], strict=True):
        assert q_end - q <= plan.max_queries and k_end - k <= plan.max_keys
        visible = torch.ones(q_end - q, k_end - k, dtype=torch.bool)
        outputs.append(
            attend(queries[q:q_end], key_value[k:k_end], visible.tril() if plan.causal else visible)
        )
    return torch.cat(outputs)


def dense_states(encoder: Encoder, x: Tensor, lengths: Tensor, mask: Tensor | None, memory: Memory | None):
    """An encoder's states by dense masked attention over all tokens of all rows."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    states, output = None, torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    if memory is not None:
        states = memory.states.values
        memory_row = torch.arange(len(memory.states.lengths)).repeat_interleave(memory.states.lengths)
        sees_memory = memory.rows[row][:, None] == memory_row
        if not encoder.cross:
            # one row for each text row that attends to a memory row, each with a copy of it
            copies = memory.states.select_rows(memory.rows)
            x = torch.cat([x, copies.values])
            row = torch.cat([row, torch.arange(len(lengths)).repeat_interleave(copies.lengths)])
    visible = row[:, None] == row
    if encoder.causal:
        visible = visible & torch.ones_like(visible).tril()
    for block in encoder.blocks:
        out = attend(block.attention.query(x), block.attention.key_value(x), visible)
        x = block.attention_norm(x + block.attention.output(out))
        if states is not None and encoder.cross:
            cross = block.cross_attention
            x = block.cross_norm(
                x + cross.output(attend(cross.query(x), cross.key_value(states), sees_memory))
            )
        x = block.output_norm(x + block.output(F.gelu(block.intermediate(x))))
    return x[: len(output)][output]


class Case:
    """An encoder over rows of all lengths from 1 on, in float64, and what it is to see and to put out."""

    def __init__(
        self, kind: str, outputs: str, device: torch.device = CPU, dtype: torch.dtype = torch.float64
    ):
        g = torch.Generator().manual_seed(3)
        torch.manual_seed(0)
        self.encoder = Encoder(2, WIDTH, HEADS, 48, 0.0, 1e-12, kind in ("cross", "causal")).to(device, dtype)
        self.encoder.causal = kind == "causal"
        self.lengths = torch.tensor([5, 1, 3, 3, 1, 9, 2, 3, 5])
        memory_lengths = torch.tensor([4, 1, 6, 4, 2])
        x, states = (
            torch.randn(int(n.sum()), WIDTH, generator=g, dtype=dtype) for n in (self.lengths, memory_lengths)
        )
        self.x, self.states = (t.to(device).requires_grad_() for t in (x, states))
        # some rows are attended to by several texts, out of order, and one by none
        rows = torch.tensor([2, 0, 3, 0, 2, 1, 0, 3, 1])
        self.memory = None if kind == "self" else Memory(Ragged(self.states, memory_lengths), rows)
        some = torch.rand(len(x), generator=g) < 0.3
        some[:6] = False  # of the first row nothing, of the second its only token
        some[5] = True
        self.mask = {"all": None, "first": first_tokens(self.lengths), "some": some}[outputs]
        self.weight = torch.randn(len(x), WIDTH, generator=g, dtype=dtype).to(device)

    def results(self, states: Tensor) -> list[Tensor]:
        """Outputs, and the gradients of all that they depend on."""
        inputs = [self.x, *self.encoder.parameters(), *([self.states] if self.memory else [])]
        loss = (states * self.weight[: len(states)]).sum()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [states.detach(), *(g for g in gradients if g is not None)]

    def packed(self) -> list[Tensor]:
        return self.results(self.encoder(Ragged(self.x, self.lengths), self.mask, self.memory))


CASES = [
    (kind, outputs)
    for kind in ("self", "cross", "joined", "causal")
    for outputs in ("all", "first", "some")
    if kind != "causal" or outputs == "all"
]


@pytest.mark.parametrize(("kind", "outputs"), CASES)
def test_attention_of_both_plans_equals_dense_attention(kind, outputs, monkeypatch):
    """In float64, to 1e-10: outputs and gradients. A GPU's plan is followed on the CPU: a slow function
    stands for its kernels."""
    case = Case(kind, outputs)
    dense = case.results(dense_states(case.encoder, case.x, case.lengths, case.mask, case.memory))
    monkeypatch.setattr(VarlenPlan, "attend", varlen_reference)
    plan = case.encoder.plan(case.lengths, META, case.mask, case.memory and case.memory.layout)
    states = case.encoder.run(case.x, plan, case.memory and case.states)
    for results in (case.packed(), case.results(states)):
        assert len(results) == len(dense)
        for ours, theirs in zip(results, dense, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("device", [CPU, META])
def test_attention_of_rows_beside_others(device, monkeypatch):
    """`cross_row`: a token that attends to a row and is no part of it; and a row without keys: zeros."""
    monkeypatch.setattr(VarlenPlan, "attend", varlen_reference)
    case = Case("self", "all")
    block, rows = case.encoder.blocks[0], Ragged(case.x, case.lengths)
    slots = torch.randn(len(case.lengths), WIDTH, dtype=torch.float64)
    row = torch.arange(len(case.lengths)).repeat_interleave(case.lengths)
    visible = torch.arange(len(case.lengths))[:, None] == row
    out = attend(block.attention.query(slots), block.attention.key_value(case.x), visible)
    x = block.attention_norm(slots + block.attention.output(out))
    expected = block.output_norm(x + block.output(F.gelu(block.intermediate(x))))
    torch.testing.assert_close(block.cross_row(slots, rows), expected, rtol=0, atol=1e-10)
    plan = plan_attention(torch.tensor([0, 2]), torch.tensor([1, 1]), device)
    out = plan.attend(torch.randn(2, WIDTH).double(), torch.randn(2, 2 * WIDTH).double(), HEADS, 0.0)
    assert not out[0].any() and out[1].all()


class OpCounter(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("dtype", "width", "kernel"),
    [
        (torch.bfloat16, 8, "_flash_attention"),
        (torch.bfloat16, 12, "_efficient_attention"),  # no multiple of 8
        (torch.float32, 8, "_efficient_attention"),
    ],
)
def test_attention_on_a_gpu_is_one_call_a_layer_and_kind(training, dtype, width, kernel):
    """On meta tensors in its place: forward and backward, whatever the number of lengths."""
    layers, lengths = 3, torch.arange(1, 9)
    encoder = Encoder(layers, HEADS * width, HEADS, 16, 0.1, 1e-12, True).to(META, dtype).train(training)
    x = torch.empty(int(lengths.sum()), HEADS * width, dtype=dtype, device=META, requires_grad=True)
    states = torch.empty(10, HEADS * width, dtype=dtype, device=META, requires_grad=True)
    memory = Memory(Ragged(states, torch.tensor([6, 4])), torch.arange(8) % 2)
    with OpCounter() as counter:
        out = encoder(Ragged(x, lengths), first_tokens(lengths), memory)
        assert out.shape == (8, HEADS * width)
        out.sum().backward()
    calls = {name: n for name, n in counter.counts.items() if "attention" in name}
    assert calls == {f"{kernel}_forward": 2 * layers, f"{kernel}_backward": 2 * layers}
    assert x.grad.shape == x.shape and states.grad.shape == states.shape


def test_attention_plans_travel_in_one_copy():
    encoder = Encoder(2, WIDTH, HEADS, 16, 0.0, 1e-12, True)
    lengths = torch.arange(1, 9)
    memory = Memory(Ragged(torch.empty(0), torch.tensor([6, 4])), torch.arange(8) % 2)
    plan = encoder.plan(lengths, META, first_tokens(lengths), memory.layout)
    with OpCounter() as counter:
        on_device = upload(plan, META)
    assert counter.counts["_to_copy"] == 1
    assert on_device.order.shape == plan.order.shape and on_device.order.device == META
    chunk = on_device.chunks[0]
    assert chunk.cross[0].query_ends.dtype == torch.int32 and chunk.cross[0].max_keys == 6
    assert upload(plan, CPU) is plan


@needs_gpu
@pytest.mark.parametrize(("kind", "outputs"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_attention_on_cuda_equals_that_of_the_cpu(kind, outputs, dtype, tolerance):
    for ours, theirs in zip(
        Case(kind, outputs, CUDA, dtype).packed(), Case(kind, outputs, CPU, dtype).packed(), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_kernels_equal_dense_attention(causal, dtype):
    """Outputs and gradients of one call, rows without queries among them, against float64."""
    keys = torch.tensor([3, 1, 40, 7, 130])
    queries = keys if causal else torch.tensor([2, 1, 0, 9, 70])
    plan = upload(plan_attention(keys, queries, CUDA, causal=causal), CUDA)
    q, kv = (torch.randn(int(n.sum()), w, device=CUDA) for n, w in ((queries, WIDTH), (keys, 2 * WIDTH)))
    grad = torch.randn_like(q)
    results = []
    for kind in (dtype, torch.float64):
        inputs = [t.to(dtype).to(kind).requires_grad_() for t in (q, kv)]
        out = plan.attend(*inputs, HEADS, 0.0)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))])
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_dropout_on_cuda_drops_its_share(dtype):
    """Values of ones come out as the share of weights that is kept, over its expectation: 1 in the mean, not
    1 everywhere; the seed decides."""
    lengths = torch.full((64,), 50)
    plan = upload(plan_attention(lengths, lengths, CUDA), CUDA)
    torch.manual_seed(0)
    q = torch.randn(3200, WIDTH, device=CUDA, dtype=dtype)
    kv = torch.cat([torch.randn_like(q), torch.ones_like(q)], 1)
    torch.manual_seed(1)
    out = plan.attend(q, kv, HEADS, 0.3).float()
    assert abs(out.mean() - 1) < 0.02 and 0.05 < out.std() < 0.5
    torch.manual_seed(1)
    assert plan.attend(q, kv, HEADS, 0.3).float().equal(out)
    assert (plan.attend(q, kv, HEADS, 0.0).float() - 1).abs().max() < 0.02


def test_attention_drops_out_in_training_alone():
    attention = Attention(WIDTH, HEADS, 0.5)
    x, plan = torch.randn(6, WIDTH), plan_attention(torch.tensor([2, 4]), torch.tensor([2, 4]), CPU)
    runs = [attention(x, attention.key_value(x), plan) for _ in range(2)]
    assert not runs[0].equal(runs[1])
    attention.eval()
    assert attention(x, attention.key_value(x), plan).equal(attention(x, attention.key_value(x), plan))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_one_projection_equals_that_with_two(causal):
    torch.manual_seed(0)
    attention, x = Attention(WIDTH, HEADS, 0.0).double(), torch.randn(9, WIDTH).double().requires_grad_()
    lengths = torch.tensor([2, 3, 4])
    plan = plan_attention(lengths, lengths, torch.device("cpu"), causal=causal)
    found, mixed = [], torch.randn(9, WIDTH).double()
    for together in (False, True):
        attention.zero_grad(set_to_none=True)
        x.grad = None
        heads = attention.project_together(x) if together else None
        out = attention.output(plan.attend_heads(*heads, 0.0)) if together else attention(x, None, plan)
        (out * mixed).sum().backward()
        found.append([out, x.grad, *(p.grad for p in attention.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_one_projection_is_for_plain_layers_alone():
    attention = Attention(WIDTH, HEADS, 0.0)
    assert attention._is_plain()
    attention.key_value = KeyValue(attention.key_value)
    assert not attention._is_plain()
    three = torch.tensor([3])
    assert attention(torch.randn(3, WIDTH), None, plan_attention(three, three, CPU)).isfinite().all()


def test_frozen_projection_gets_no_gradient_of_the_joint_one():
    attention, x = Attention(WIDTH, HEADS, 0.0), torch.randn(3, WIDTH)
    attention.query.requires_grad_(False)
    sum(part.sum() for part in attention.project_together(x)).backward()
    assert attention.query.weight.grad is None
    assert attention.key_value.weight.grad.abs().sum() > 0
