"""One folder for everybody else: config, safetensors weights, tokenizer."""

import shutil
from pathlib import Path

from raylib import checkpoint
from raylib.errors import UserError
from raylib.models.base import find_model, find_tokenizer, read_weights


def export(run: Path | str, to: Path | str) -> Path:
    """Write the model of `run` (or of one of its checkpoints) and its tokenizer into `to`.

    Raises:
        UserError: no checkpoint there, a damaged one, one with weights that are not finite, or `to` is not
            empty.
    """
    source, to = find_model(run), Path(to)
    if to.is_dir() and any(to.iterdir()):
        raise UserError(f"{to}: not empty; give a new folder")
    if (source / "meta.json").is_file():
        checkpoint.verify(source)
    read_weights(source)
    to.mkdir(parents=True, exist_ok=True)
    tokenizer = find_tokenizer(source)
    for path in (source / "config.json", source / "model.safetensors", tokenizer):
        shutil.copy2(path, to / path.name)
    return to
