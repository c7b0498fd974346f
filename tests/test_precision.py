"""Number formats: residual stream, TF32, products that stay exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.step import make_batch
from raylib import precision
from raylib.data.loading import to_device
from raylib.errors import UserError
from raylib.models.heads import _softmax_gradient
from raylib.models.swin import SwinSizes
from raylib.models.unified import TINY, UnifiedModel
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from raylib.precision import LayerNorm, _ExactAddmm, exact_linear, set_compiler, set_residual, set_tf32
from raylib.runtime import describe_precision, has_bf16
from raylib.settings import FitConfig

CONFIG = TINY.model_copy(update={"vocabulary": 500, "dropout": 0.0})
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model_of(config=CONFIG) -> UnifiedModel:
    torch.manual_seed(0)
    return UnifiedModel(config).train()


def step(
    model: UnifiedModel, bf16: bool = True, seed: int = 0
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Terms of a step of `model`, and the gradients."""
    model.zero_grad(set_to_none=True)
    device = model.temperature.device
    batch = to_device(make_batch(model.config, (6, 12, 12), seed), device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss, terms = UnifiedObjective(model, ObjectiveConfig())(batch)
    loss.backward()
    return {k: float(v) for k, v in terms.items()}, {n: p.grad for n, p in model.named_parameters()}


@pytest.fixture
def compiler():
    """Choose a backend of torch.compile for a test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield set_compiler
    set_compiler(None)
    torch._dynamo.reset()


def outputs_of_norms(model: nn.Module) -> set[torch.dtype]:
    """The dtypes that layer norms of the streams return, as steps go on."""
    found: set[torch.dtype] = set()
    for name, module in model.named_modules():
        # a CPU's autocast leaves norms alone, and the head's follows a linear layer
        if isinstance(module, nn.LayerNorm) and not name.startswith("masked_head"):
            module.register_forward_hook(lambda m, x, y: found.update((y.dtype,)))
    return found


@pytest.mark.parametrize(("residual", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_residual_stream_has_the_dtype_of_the_setting(residual, dtype):
    model = model_of()
    set_residual(model, residual)
    inputs: set[torch.dtype] = set()
    for block in (*model.vision.blocks, *model.text.blocks, *model.fusion.blocks):
        block.register_forward_pre_hook(lambda m, args: inputs.add(args[0].dtype))
    outputs = outputs_of_norms(model)
    step(model)
    assert inputs == outputs == {dtype}
    inputs.clear(), outputs.clear()
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.encode_images(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    assert inputs == outputs == {dtype}
    outputs.clear()
    step(model, bf16=False)
    assert outputs == {torch.float32}


def test_residual_stream_in_bf16_agrees_with_float32():
    terms, gradients = step(model_of(), bf16=False)
    errors = {}
    for residual in ("float32", "bfloat16"):
        model = model_of()
        set_residual(model, residual)
        others, grads = step(model)
        for name, value in terms.items():
            assert others[name] == pytest.approx(value, rel=0.01), (residual, name)
        assert all(g.dtype == torch.float32 for g in grads.values())
        whole = torch.cat([(grads[n] - g).flatten() for n, g in gradients.items()]).norm()
        errors[residual] = float(whole / torch.cat([g.flatten() for g in gradients.values()]).norm())
    # as far from float32 as autocast alone, to a factor of two
    assert errors["bfloat16"] < 2 * errors["float32"] < 0.1


def test_swin_norms_follow_the_setting_under_the_names_of_its_weights():
    sizes = SwinSizes(width=16, layers=(2, 2), heads=(2, 2))
    model = model_of(CONFIG.model_copy(update={"swin": sizes, "patch": 2}))
    assert all(type(m) is not nn.LayerNorm for m in model.vision.modules())
    assert "vision.swin.encoder.layers.0.blocks.0.layernorm_before.weight" in model.state_dict()
    set_residual(model, "bfloat16")
    outputs = outputs_of_norms(model.vision)
    step(model)
    assert outputs == {torch.bfloat16}


def test_layer_norm_without_autocast_is_that_of_pytorch():
    torch.manual_seed(0)
    ours, x = LayerNorm(8), torch.randn(3, 8)
    assert torch.equal(ours(x), F.layer_norm(x, (8,), ours.weight, ours.bias))
    ours.residual = torch.bfloat16
    assert torch.equal(ours(x), F.layer_norm(x, (8,), ours.weight, ours.bias))


def test_exact_addmm_has_the_gradient_of_addmm():
    torch.manual_seed(0)
    shapes = ((3, 5), (3, 4), (4, 5))
    ours, plain = ([torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes] for _ in range(2))
    for x, y in zip(ours, plain, strict=True):
        y.data.copy_(x.data)
    weights = torch.randn(3, 5, dtype=torch.float64)
    (_ExactAddmm.apply(*ours) * weights).sum().backward()
    (torch.addmm(*plain) * weights).sum().backward()
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_ExactAddmm.apply, (bias, ours[1], ours[2]))


def test_exact_addmm_restores_the_precision_of_products():
    seen = []
    a = torch.randn(2, 2, requires_grad=True)
    a.register_hook(lambda grad: seen.append(torch.get_float32_matmul_precision()))
    set_tf32(True)
    try:
        _ExactAddmm.apply(torch.zeros(2), a, torch.eye(2)).sum().backward()
        assert [*seen, torch.get_float32_matmul_precision()] == ["high", "high"]
    finally:
        set_tf32(False)


def steps_of_fresh_lengths(
    compiler, backend: str, bf16: bool, tolerance: float, device: torch.device = CPU
) -> int:
    """Compare compiled steps with eager ones; return the number of graphs, of which none may be new after
    the first step."""
    model, graphs = model_of().to(device), 0
    counters = torch._dynamo.utils.counters
    for seed in range(4):
        found = []
        for chosen in (None, backend):
            compiler(chosen)
            torch._dynamo.config.error_on_recompile = bool(seed)
            found.append(step(model, bf16, seed))
        torch._dynamo.config.error_on_recompile = False
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
        (terms, gradients), (others, fused) = found
        assert others == pytest.approx(terms, rel=tolerance)
        for name, gradient in gradients.items():
            assert (fused[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name
    return graphs


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_compiled_steps_equal_eager_ones_and_compile_once(compiler, bf16, tolerance):
    """Through dynamo and autograd alone ("aot_eager"), which need no C++ compiler."""
    assert steps_of_fresh_lengths(compiler, "aot_eager", bf16, tolerance) == 3


@pytest.mark.slow
def test_steps_compiled_by_inductor_equal_eager_ones_and_compile_once(compiler):
    assert steps_of_fresh_lengths(compiler, "inductor", False, 1e-4) == 3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_softmax_gradient_compiles_once_for_any_number_of_rows(compiler, backend):
    torch.manual_seed(0)
    for rows in (30, 40, 50):
        logits, targets = 4 * torch.randn(rows, 200), torch.randint(0, 200, (rows, 1))
        compiler(None)
        expected = _softmax_gradient(logits.clone(), targets)
        compiler(backend)
        for ours, theirs in zip(_softmax_gradient(logits, targets), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("name", "capability", "is_native"), [("Tesla V100", (7, 0), False), ("A100", (8, 0), True)]
)
def test_bf16_is_used_where_a_gpu_multiplies_it(monkeypatch, name, capability, is_native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert FitConfig().uses_bf16(GPU) == is_native and FitConfig(bf16=True).uses_bf16(GPU)
    lines = {bf16: describe_precision(GPU, bf16, None, True) for bf16 in (False, True)}
    assert lines[is_native] in (
        "precision: bf16 autocast, residual stream bfloat16, TF32 on",
        "precision: float32 (Tesla V100 multiplies no bf16), TF32 on",
    )
    assert ("warning: Tesla V100 emulates bf16" in lines[True]) == (not is_native)
    assert lines[False].startswith("precision: float32")


def test_fit_sets_the_precision_of_the_process(compiler):
    model = model_of()
    assert FitConfig(residual="bfloat16", compile=True).set_precision(model, torch.device("cpu")) == ""
    assert model.text.blocks[0].output_norm.residual == torch.bfloat16
    assert precision._compiler == "inductor"
    FitConfig().set_precision(model, torch.device("cpu"))
    assert model.text.blocks[0].output_norm.residual is None and precision._compiler is None


def test_compiling_without_a_compiler_is_one_line(compiler, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        FitConfig(compile=True).set_precision(model_of(), CPU)


@needs_gpu
def test_step_on_a_gpu_has_a_bf16_stream_and_the_losses_of_the_cpu():
    model = model_of()
    expected, gradients = step(model, bf16=False)
    model = model_of().cuda()
    outputs = outputs_of_norms(model)
    terms, found = step(model)
    assert outputs == {torch.bfloat16}
    assert terms == pytest.approx(expected, rel=0.02)
    errors = torch.cat([(found[n].cpu() - g).flatten() for n, g in gradients.items()])
    assert errors.norm() < 0.1 * torch.cat([g.flatten() for g in gradients.values()]).norm()


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.05)])
def test_steps_compiled_on_a_gpu_equal_eager_ones_and_compile_once(compiler, bf16, tolerance):
    # of norms, text's and images' feed-forward layers, and in bf16 the head's softmax
    assert steps_of_fresh_lengths(compiler, "inductor", bf16, tolerance, GPU) == 3 + bf16


@needs_gpu
def test_exact_linear_is_exact_beside_tf32():
    torch.manual_seed(0)
    layer = nn.Linear(512, 512)
    x = torch.randn(256, 512)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    layer, x = layer.cuda(), x.cuda()
    set_tf32(has_bf16(x.device))
    try:
        with torch.autocast("cuda", torch.bfloat16):
            exact = exact_linear(layer, x)
        rounded = layer(x)
    finally:
        set_tf32(False)
    assert (exact.cpu() - expected).abs().max() < 1e-5
    if has_bf16(x.device) and not torch.version.hip:
        assert (rounded.cpu() - expected).abs().max() > 1e-4
