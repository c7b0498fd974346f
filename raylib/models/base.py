"""Where a model and its tokenizer lie: in an export, a checkpoint or a run.

Where in rows of text and of what grounds it which tokens are."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raylib import checkpoint
from raylib.errors import UserError
from raylib.finite import require_finite_file
from raylib.packed import Ragged, first_tokens
from raylib.text import TOKENIZER_FILES


def find_model(path: Path | str) -> Path:
    """The model folder meant by `path`: an export, a checkpoint, or a run (its newest checkpoint)."""
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return path
    if (path / checkpoint.FOLDER).is_dir():
        newest = checkpoint.find_newest(path)
        if newest is None:
            raise UserError(f"{path}: this run has no checkpoint yet")
        return newest
    raise UserError(
        f"{path}: neither a model folder nor a run; give runs/NAME, or a folder written by export"
    )


def find_tokenizer(model: Path) -> Path:
    """The tokenizer of a model folder: beside its weights, or in the run that the checkpoint belongs to."""
    for folder in (model, model.parent, model.parent.parent):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"{model}: no tokenizer with this model; one of {', '.join(TOKENIZER_FILES)} is looked for"
    )


def save_model(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    """Write `config.json`, the description, and `model.safetensors`.

    Raises:
        UserError: a weight is not finite; it is named, and nothing written.
    """
    weights = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
    require_finite_file(folder / "model.safetensors", weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    save_file(weights, folder / "model.safetensors")


def fill(model: nn.Module, folder: Path) -> nn.Module:
    """Load `folder`/model.safetensors into `model`.

    Raises:
        UserError: a key is missing, left over, of another shape or not finite; it is named.
    """
    weights = read_weights(folder)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(
            f"{folder}/model.safetensors does not fit the model: {' '.join(str(e).split())}"
        ) from None
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `folder`/model.safetensors.

    Raises:
        UserError: one is not finite; it is named.
    """
    weights = load_file(folder / "model.safetensors")
    require_finite_file(folder / "model.safetensors", weights)
    return weights


class TokenSegments(NamedTuple):
    """Which of the T tokens of n rows are what: positions in the flat rows, int64 on the CPU, in the order in
    which words, tags and regions came, which is that of their own rows.

    cls: (n,). text: n rows (W,), from CLS to SEP. tags: n rows (G,), their SEP last. regions: n rows (R,).
    empty: (n,) the last tokens of the rows, if these are slots without a region; else (0,).
    """

    cls: Tensor
    text: Ragged
    tags: Ragged
    regions: Ragged
    empty: Tensor


def find_segments(text: Tensor, tags: Tensor, regions: Tensor, empty: bool = False) -> TokenSegments:
    """The places in rows of so many tokens each: three times (n,), on the CPU. `empty`: and one more in each
    row."""
    lengths = torch.stack([text, tags, regions, torch.full_like(text, int(empty))], 1)
    part = (
        torch.arange(4).repeat(len(text)).repeat_interleave(lengths.flatten())
    )  # (T,): 0 text, 1 tags, 2 regions, 3 empty
    cls = first_tokens(lengths.sum(1)).nonzero().squeeze(1)
    *rows, last = ((part == i).nonzero().squeeze(1) for i in range(4))
    return TokenSegments(cls, *(Ragged(values, lengths[:, i]) for i, values in enumerate(rows)), last)
