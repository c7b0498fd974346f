"""Parameter-efficient tuning (paper 4, section 3.2): small modules inside the layers that a text passes,
trained with their layer norms and the heads while the rest stands still.

A backbone's `tuning` says what was put into it, {method: settings}; `save` of a model writes it down, and
`insert_stored` builds the same again. The small weights are files of their own, one a language: `save_tuned`,
`load_tuned` take nothing else of the model.

Every module keeps the name of what it takes the place of, so layers are found as before; LoRA's alone, which
are peft's, have `base_layer` in theirs.
"""

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from raylib.errors import UserError, reading, require
from raylib.fileio import atomic_file
from raylib.lock import make_folder
from raylib.models.attention import Block
from raylib.models.layers import TextEmbedding
from raylib.strict_json import parse_json
from raylib.weights import describe_misfit, read_safetensors

if TYPE_CHECKING:
    from raylib.models.base import Backbone

WORDS = {"activation": ("gelu", "relu"), "rule": ("shared", "own")}  # settings that are no numbers
MAX_SETTING = 1 << 24  # of a method: no vocabulary has more ids, and no layer is wider
NORMS = ("attention_norm", "cross_norm", "output_norm")  # of a block: tuned with every method


class Adapter(nn.Module):
    """O = x + f(x W_down) W_up (equation 10), f the GELU's tanh form; weights from N(0, 0.01), as OpenDelta
    has them."""

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, d)."""
        return x + self.up(F.gelu(self.down(x), approximate="tanh"))


class LowRankKronecker(nn.Module):
    """A linear map whose matrix is sum_i A_i (x) (s_i t_i), i = 1 ... n (equation 11). The A_i belong to all
    such layers of a model together, and are its parameter `kronecker` (`insert_compacter`), or to each
    layer."""

    def __init__(
        self, inputs: int, outputs: int, owner: nn.Module | None, n: int, rank: int, gain: float = 1.0
    ):
        """owner: the model with A, (n, n, n); None: this layer has its own. n must divide `inputs` and
        `outputs`. gain: of the first weights of s and t."""
        super().__init__()
        if owner is None:
            self.register_parameter("kronecker", new_rule(n))
        # in a list, so that it is no part of this layer; the model and not its parameter, which loading may
        # replace by another
        self._owner = [owner or self]
        self.left = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (self.left, self.right):
            for part in factor:
                nn.init.xavier_uniform_(part, gain)

    @property
    def rule(self) -> nn.Parameter:
        """A, (n, n, n)."""
        return cast(nn.Parameter, self._owner[0].get_parameter("kronecker"))

    def matrix(self) -> Tensor:
        """W, (inputs, outputs)."""
        rule = self.rule
        # the sum of kron(rule_i, left_i right_i) over i: until they are flattened, the axes of the rule stand
        # before those of the other factor, as Kronecker's order has them
        product = torch.einsum("iab,icd->acbd", rule, self.left @ self.right)
        return product.reshape(rule.shape[1] * self.left.shape[1], rule.shape[2] * self.right.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """(T, inputs) -> (T, outputs)."""
        return x @ self.matrix() + self.bias


class Compacter(nn.Module):
    """An `Adapter` whose two matrices are sums of Kronecker products (Karimi Mahabadi et al. 2021)."""

    def __init__(self, down: LowRankKronecker, up: LowRankKronecker, activation: str):
        super().__init__()
        self.down, self.up, self.activation = down, up, activation

    def forward(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, d)."""
        hidden = self.down(x)
        return x + self.up(
            F.relu(hidden) if self.activation == "relu" else F.gelu(hidden, approximate="tanh")
        )


def new_rule(n: int) -> nn.Parameter:
    """First factors of n Kronecker products, (n, n, n), as they start."""
    return nn.Parameter(torch.randn(n, n, n) * 0.01)


class AdaptedLinear(nn.Linear):
    """A linear layer with a small module behind it: before the residual and the layer norm (Houlsby et al.
    2019)."""

    def __init__(self, linear: nn.Linear, adapter: nn.Module):
        # on "meta": its own weights would only be thrown away
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.adapter = linear.weight, linear.bias, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(super().forward(x))


class PromptedEmbedding(nn.Embedding):
    """Word embeddings, and behind them those of a prompt: id V + i is its i-th token (Lester et al. 2021)."""

    def __init__(self, words: nn.Embedding, prompt: Tensor):
        super().__init__(words.num_embeddings, words.embedding_dim, device="meta")
        self.weight, self.prompt = words.weight, nn.Parameter(prompt)

    def forward(self, ids: Tensor) -> Tensor:
        # both tables are read at every id, and each id keeps what its own table says: no id waits for the CPU
        last = self.num_embeddings - 1
        words, prompt = (
            super().forward(ids.clamp(max=last)),
            F.embedding((ids - last - 1).clamp(min=0), self.prompt),
        )
        return torch.where((ids > last)[..., None], prompt, words)


class KeyValue(nn.Module):
    """The two halves of an attention's `key_value` as layers of their own."""

    def __init__(self, joint: nn.Linear):
        super().__init__()
        width = joint.in_features
        self.key, self.value = (nn.Linear(width, width, device="meta") for _ in range(2))
        for half, weight, bias in zip(
            (self.key, self.value), joint.weight.chunk(2), joint.bias.chunk(2), strict=True
        ):
            half.weight, half.bias = (
                nn.Parameter(p.detach().clone(), joint.weight.requires_grad) for p in (weight, bias)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.key(x), self.value(x)], 1)


def insert_lora(model: nn.Module, rank: int = 8, alpha: float = 16.0) -> None:
    """W + (alpha / rank) B A in the query and value maps of self-attention (equation 12; Hu et al. 2021),
    through peft."""
    peft = require("peft", "transfer")
    targets, trainable = [], [p for p in model.parameters() if p.requires_grad]
    for name, block in _blocks(model):
        # the paper changes queries and values, not keys: the map that makes keys and values at once is cut
        if not isinstance(block.attention.key_value, KeyValue):
            block.attention.key_value = KeyValue(cast(nn.Linear, block.attention.key_value))
        targets += [f"{name}.attention.query", f"{name}.attention.key_value.value"]
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets), model
    )
    # peft has frozen all but its own; what else stands still is decided elsewhere (`freeze_pretrained`)
    for parameter in trainable:
        parameter.requires_grad_(True)


def insert_adapter(model: nn.Module, bottleneck: int = 24) -> None:
    """An `Adapter` after the output of attention and of the feed-forward layers of every block."""
    _behind_outputs(model, lambda width: Adapter(width, bottleneck))


def insert_compacter(
    model: nn.Module,
    n: int = 4,
    reduction: int = 16,
    rank: int = 1,
    activation: str = "gelu",
    rule: str = "shared",
    gain: float = 1.0,
) -> None:
    """A `Compacter` in the same places, its bottleneck 1 / `reduction` of the width."""
    width = next(block.attention.query.in_features for _, block in _blocks(model))
    if width % reduction or (width // reduction) % n:
        raise UserError(
            f"strategies.compacter: width {width} / reduction {reduction} is no multiple of n {n}; choose "
            "others"
        )
    if rule == "shared":
        # one for all layers, so it belongs to the model: a layer's own copy would be trained apart
        model.register_parameter("kronecker", new_rule(n))
    owner = model if rule == "shared" else None

    def make(width: int) -> Compacter:
        narrow = width // reduction
        down = LowRankKronecker(width, narrow, owner, n, rank, gain)
        return Compacter(down, LowRankKronecker(narrow, width, owner, n, rank, gain), activation)

    _behind_outputs(model, make)


def insert_soft_prompt(model: nn.Module, start: Sequence[int] = (), tokens: int = 20) -> None:
    """Trainable tokens: those of the ids `start` to begin with, or else so many from N(0, 0.02). Their ids
    come after the vocabulary's."""
    embedding = text_embedding(model)
    words = embedding.word
    prompt = (
        words.weight[list(start)].detach().clone()
        if start
        else 0.02 * torch.randn(tokens, words.embedding_dim)
    )
    embedding.word = PromptedEmbedding(words, prompt)


INSERT: dict[str, Callable[..., None]] = {
    "lora": insert_lora,
    "adapter": insert_adapter,
    "compacter": insert_compacter,
    "soft_prompt": insert_soft_prompt,
}


def insert(model: nn.Module, method: str, settings: Mapping[str, Any]) -> None:
    """Put `method` into the model, and note it in its backbone's `tuning`. New modules start where the model
    is.

    Raises:
        UserError: a backbone whose layers are not ours (CLIP).
    """
    backbone = _backbone(model)
    if not _blocks(backbone):
        raise UserError(
            f"strategies.{method}: {backbone.kind} has no layers of ours to put it into; leave it out"
        )
    # new modules are made in float32 on the CPU: the first of its weights says where the model is by now
    weight = next(backbone.parameters())
    INSERT[method](backbone, **settings)
    backbone.to(weight)
    backbone.tuning = {**backbone.tuning, method: _all_settings(method, settings)}


def _all_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the defaults of those that earlier versions did not store."""
    call = inspect.signature(INSERT[method]).bind(None, **settings)
    call.apply_defaults()
    return {name: value for name, value in call.arguments.items() if name != "model"}


def check_stored(description: Any, where: Path | str) -> dict[str, dict[str, Any]]:
    """Return what a stored model says was inserted, {method: settings}; {} of None.

    where: it is said.
    Raises:
        UserError: no such methods, or settings.
    """
    with reading(where, "a model's tuning, {method: settings}"):
        found = {method: _all_settings(method, given) for method, given in (description or {}).items()}
        for method, settings in found.items():
            for name, value in settings.items():
                numbers = [*value] if type(value) in (list, tuple) else [value]
                is_valid = all(type(n) in (int, float) and 0 <= n <= MAX_SETTING for n in numbers)
                if not (value in WORDS[name] if name in WORDS else is_valid):
                    raise ValueError(f"{method}: {settings}")
    return found


def insert_stored(model: nn.Module, description: Mapping[str, Mapping[str, Any]]) -> None:
    """Insert what a stored model says was inserted, so that its weights fit."""
    for method, settings in description.items():
        insert(model, method, settings)


def is_inserted(name: str) -> bool:
    """Return whether the parameter is one of those that tuning has put in."""
    parts = name.split(".")
    return parts[-1] in ("prompt", "kronecker") or any(p == "adapter" or p.startswith("lora_") for p in parts)


def freeze_pretrained(model: nn.Module, projection: bool = True, norms: bool = True) -> None:
    """Take out of training all but the small modules, the layer norms of the blocks, and the heads; without
    `projection` also the map from a text's state to where it meets images, without `norms` also the layer
    norms. What was out of training stays out."""
    for name, parameter in model.named_parameters():
        if not (is_inserted(name) or _stays(model, name, projection, norms)):
            parameter.requires_grad_(False)


def _stays(model: Any, name: str, projection: bool, norms: bool) -> bool:
    if model.depth_of(name) is not None:
        return norms and any(part in NORMS for part in name.split("."))
    if "text_projection" in name:
        return projection
    return not any(part in ("vision", "image_projection") for part in name.split("."))


def trainable_shares(model: Any) -> tuple[float, float]:
    """Trainable parameters as a share of the text encoder's own: (without what lies outside of its layers,
    with it)."""
    whole = tuned = head = 0
    for name, parameter in model.named_parameters():
        inside = model.depth_of(name) is not None or is_inserted(name)
        whole += parameter.numel() * (inside and not is_inserted(name))
        tuned += parameter.numel() * (inside and parameter.requires_grad)
        head += parameter.numel() * (not inside and parameter.requires_grad)
    return tuned / whole, (tuned + head) / whole


def merge_lora(model: nn.Module) -> None:
    """Add LoRA's product to the weights; its modules are gone, the outputs are the same."""
    lora = require("peft.tuners.lora", "transfer")
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)]:
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    for _, block in _blocks(model):
        halves = block.attention.key_value
        if isinstance(halves, KeyValue):
            # back to the one map, so that a merged model has the parameters of one that was never tuned
            width = halves.key.in_features
            joint = nn.Linear(width, 2 * width, device="meta")
            for part in ("weight", "bias"):
                both = torch.cat([getattr(halves.key, part), getattr(halves.value, part)]).detach()
                setattr(joint, part, nn.Parameter(both))
            block.attention.key_value = joint
    backbone = _backbone(model)
    backbone.tuning = {method: settings for method, settings in backbone.tuning.items() if method != "lora"}


def save_tuned(model: nn.Module, names: Collection[str], path: Path) -> None:
    """The parameters `names`, those that were trained, with what was put in, as a safetensors file."""
    make_folder(path.parent)
    small = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters() if name in names}
    with atomic_file(path) as temporary:
        save_file(small, temporary, {"tuning": json.dumps(_backbone(model).tuning)})


def load_tuned(model: nn.Module, path: Path) -> None:
    """Give the model the small weights of `path`, made for the same model with the same methods put in;
    others that it has trained in the same places are gone.

    Raises:
        UserError: no such file, no file of ours, other methods or sizes, or a tensor that is not finite.
    """
    what, advice = "weights of a tuned language (safetensors)", "give the tuned.safetensors of a run"
    small, metadata = read_safetensors(path, what, advice)
    with reading(path, what, advice):
        stored = json.loads(json.dumps(check_stored(parse_json(metadata["tuning"]), path)))
    tuning = _backbone(model).tuning
    # by way of JSON, in which tuples are lists
    if stored != json.loads(json.dumps(tuning)):
        raise UserError(
            f"{path}: tuned with {stored}, this model has {tuning}; put the same methods in first"
        )
    parameters = dict(model.named_parameters())
    misfits = [
        name
        for name, value in small.items()
        if name not in parameters or describe_misfit(name, value, parameters[name])
    ]
    if misfits:
        raise UserError(
            f"{path}: weights of another model ({len(misfits)} tensors do not fit, such as {misfits[0]})"
        )
    with torch.no_grad():
        for name, value in small.items():
            parameters[name].copy_(value)


def _blocks(model: nn.Module) -> list[tuple[str, Block]]:
    """The layers that a text passes, by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Block)]


def _behind_outputs(model: nn.Module, make: Callable[[int], nn.Module]) -> None:
    for _, block in _blocks(model):
        for parent in (block.attention, block):
            if isinstance(parent.output, AdaptedLinear):
                raise UserError("adapter and compacter want the same places; a model takes one of them")
            parent.output = AdaptedLinear(parent.output, make(parent.output.out_features))


def text_embedding(model: nn.Module) -> TextEmbedding:
    """Return the embeddings that a text enters by."""
    return cast(TextEmbedding, _backbone(model).embedding)


def _backbone(model: nn.Module) -> "Backbone":
    """Return the pretrained part of a model, which may be the whole of it."""
    return cast("Backbone", model.backbone)
