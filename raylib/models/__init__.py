"""`BACKBONES`: every backbone of ours by its kind; and where models and their tokenizers lie."""

import filecmp
from pathlib import Path
from typing import Any

from raylib import checkpoint
from raylib.config import UserFile, load_user_class, lookup, user_files
from raylib.errors import UserError, hub_hint
from raylib.models.base import CODE_KEY, Backbone, read_description
from raylib.models.cclm import Cclm, CclmSwin
from raylib.models.dual_encoder import Clip, MClip
from raylib.models.oscar import Oscar
from raylib.models.single_stream import M3P, UC2, MUniter, XUniter
from raylib.models.unified import UnifiedModel
from raylib.renames import model_kind
from raylib.text import TOKENIZER_FILES, tokenizer_file

BACKBONES: dict[str, type[Backbone]] = {
    "unified": UnifiedModel,
    "cclm": Cclm,
    "cclm_swin": CclmSwin,
    "uc2": UC2,
    "m3p": M3P,
    "muniter": MUniter,
    "xuniter": XUniter,
    "oscar": Oscar,
    "mclip": MClip,
    "clip": Clip,
}


def find_backbone(name: str) -> type[Backbone]:
    """The backbone of a kind, or the one that a file of the user's defines: FILE.py, or FILE.py:CLASS.

    Raises:
        UserError: no such kind; a file without a backbone, or with one whose kind is taken.
    """
    if not (files := user_files(name)):
        return lookup(name, BACKBONES, "backbone")
    path, class_name = files[0], name.partition(".py:")[2]
    found = load_user_class(path, Backbone, class_name or None)  # type: ignore[type-abstract]
    missing = [
        part for part in ("kind", "config_class", "layer_names", "embedding_names") if part not in dir(found)
    ]
    if missing:
        raise UserError(f"{path}: {found.__name__} does not declare {', '.join(missing)}")
    # the kind is what a stored model is known by
    if found.kind in BACKBONES:
        raise UserError(f"{path}: there is a backbone of kind '{found.kind}'; give {found.__name__} another")
    return found


def stored_code(folder: Path) -> list[Path]:
    """The user's file that defines the backbone of the model in `folder`; none of one of ours."""
    code = read_description(folder).get(CODE_KEY)
    return [folder / Path(code.partition(":")[0]).name] if code else []


def stored_backbone(description: dict[str, Any], folder: Path, name: str = "") -> type[Backbone]:
    """The backbone of the model in `folder` whose config.json holds `description`; `name`: the user's
    `backbone=`.

    Raises:
        UserError: no such backbone; the user's file that defined it is gone, or nobody named it.
    """
    # the code that a model was trained with lies beside it; the user's file may have changed since
    if CODE_KEY not in description:
        kind = str(description.get("backbone", model_kind(description)))
        return lookup(kind, BACKBONES, f"backbone in {folder}/config.json:")
    code = Path(str(description[CODE_KEY])).name  # never a path out of the folder
    file = folder / code.partition(":")[0]
    if not file.is_file():
        raise UserError(
            f"{folder}: {file.name}, which defines its backbone, is gone; put it back beside config.json"
        )
    # a folder may come from a stranger: its code runs if the user has named it, now or for the run it lies in
    named = any(given.is_file() and filecmp.cmp(given, file, shallow=False) for given in user_files(name))
    if not named and not any(_run_names(run, file.name) for run in folder.absolute().parents[:2]):
        raise UserError(
            f"{folder} holds code ({file.name}) that would be run: read it, then name it: backbone={file}"
        )
    if not named:
        UserFile.named(file.name, folder).tell()
    return find_backbone(f"{folder / code}")


def _run_names(folder: Path, file: str) -> bool:
    """Return whether `folder` is a run's, with `file` as its `backbone=`."""
    settings = read_description(folder) if (folder / "config.json").is_file() else {}
    return "fit" in settings and any(named.name == file for named in user_files(settings.get("backbone", "")))


def find_model(path: Path | str) -> Path:
    """The model folder meant by `path`: an export, a checkpoint, a run (its newest checkpoint), RUN/best."""
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return path
    if path.name == "best" and (best := checkpoint.find_best(path.parent)):
        return best
    if (path / checkpoint.FOLDER).is_dir():
        newest = checkpoint.find_newest(path)
        if newest is None:
            raise UserError(f"{path}: this run has no checkpoint yet")
        return newest
    raise UserError(
        f"{path}: neither a model folder nor a run; give runs/NAME, or a folder written by "
        f"export{hub_hint(path)}"
    )


def find_tokenizer(model: Path) -> Path:
    """The tokenizer of a model folder or a corpus: beside its files, or in the run that a checkpoint is of.

    Raises:
        UserError: no such folder, or no tokenizer.
    """
    if not model.exists():
        raise UserError(f"{model}: no such file or folder{hub_hint(model)}")
    for folder in (model, model.parent, model.parent.parent):
        if found := tokenizer_file(folder):
            return found
    raise UserError(
        f"{model}: no tokenizer in it; one of {', '.join(TOKENIZER_FILES)} is looked for{hub_hint(model)}"
    )
