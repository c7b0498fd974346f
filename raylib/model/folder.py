"""Where a model and its tokenizer lie: in an export, a checkpoint or a run."""

from pathlib import Path

from raylib import checkpoint
from raylib.errors import UserError
from raylib.text import FILES


def find_model(path: Path | str) -> Path:
    """The model folder meant by `path`: an export, a checkpoint, or a run (its newest checkpoint)."""
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return path
    if (path / checkpoint.FOLDER).is_dir():
        newest = checkpoint.newest(path)
        if newest is None:
            raise UserError(f"{path}: this run has no checkpoint yet")
        return newest
    raise UserError(f"{path}: neither a model folder nor a run; give runs/NAME, or a folder written by export")


def find_tokenizer(model: Path) -> Path:
    """The tokenizer of a model folder: beside its weights, or in the run that the checkpoint belongs to."""
    for folder in (model, model.parent, model.parent.parent):
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"{model}: no tokenizer with this model; one of {', '.join(FILES)} is looked for")
