"""Polyglance as a library: `import polyglance`, which is what the distribution calls this package.

    import polyglance
    model = polyglance.load("runs/sample")
    model.similarity(["cat.jpg"], ["a cat", "ein Hund"])

In a checkout that is not installed it is `raylib.api`. Nothing heavy is imported before `load`.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# this file under its other name: one package under both, and one copy of each class
if __name__ == "polyglance":
    try:
        import raylib.api
    except ImportError as error:
        import raylib

        raise ImportError(
            f"polyglance has a package raylib of its own, and {raylib.__file__} is another project's, the "
            "game library's perhaps: uninstall that, or install polyglance into a fresh environment"
        ) from error
    sys.modules["polyglance"] = raylib.api
else:
    sys.modules["polyglance"] = sys.modules[__name__]

from raylib import __version__

if TYPE_CHECKING:
    import torch

    from raylib.api.model import Model


def load(
    path: "Path | str",
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | str | None" = None,
    *,
    language: str | None = None,
    backbone: str = "unified",
    vision: str | None = None,
    max_pixels: int | None = None,
) -> "Model":
    """Load a trained model.

    Args:
        path: a pretraining or fine-tuning run, an export, a checkpoint, or published weights that `backbone`
            can start from (`python -m finetune --help`), a file or a folder.
        device: None is a GPU if there is one.
        dtype: what is computed in, "float32" or "bfloat16"; None: what the model is evaluated in, on a GPU
            bfloat16 for a fine-tuned one.
        language: of a fine-tuning run that trained a model for each language, which one.
        backbone, vision: as the settings of fine-tuning have them: what published weights become, and the
            folder of their image encoder where that is another.
        max_pixels: most pixels of an image, a larger one is not decoded; None: as the run had it, else
            89,478,485.
    Raises:
        UserError: no such model, weights that do not fit or are not finite.
    """
    from raylib.api.loading import load_model

    return load_model(
        path,
        device,
        dtype,
        language=language,
        backbone=backbone,
        vision=vision,
        max_pixels=max_pixels,
    )


def main() -> int:
    """Run `polyglance COMMAND ...`."""
    from raylib.command import main as run

    return run()


def __getattr__(name: str) -> Any:
    if name in ("Model", "Answer", "Match"):
        from raylib.api import model

        return vars(model)[name]
    if name == "UserError":
        from raylib.errors import UserError

        return UserError
    raise AttributeError(f"module 'polyglance' has no attribute '{name}'")


class _OneCopy(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `polyglance.NAME` the module `raylib.api.NAME`: a second copy would have other classes."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        is_ours = name.startswith("polyglance.") and name != "polyglance.__main__"
        return importlib.util.spec_from_loader(name, self) if is_ours else None

    def create_module(self, spec: Any) -> ModuleType:
        module = importlib.import_module(f"raylib.api.{spec.name.partition('.')[2]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # its own again: importing it has given it this one


OURS, AUTO = "raylib.api.huggingface", "transformers.models.auto.configuration_auto"


class _TransformersFinder(importlib.abc.MetaPathFinder):
    """Sees modules of `transformers` being imported, and registers our classes with its Auto classes as soon
    as the import that brought these is over, by whichever name: importing ours takes seconds, and most users
    of this package never need them."""

    def __init__(self) -> None:
        self.lock, self.running = threading.Lock(), 0  # imports, within each other or of several threads

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != "transformers":
            return None
        # it stays: whoever asks for a spec may only want to know whether the package is there, an import may
        # fail, and be tried again
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._execute, loader.exec_module)
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        with self.lock:
            self.running += 1
        try:
            execute(module)
        finally:
            with self.lock:
                self.running -= 1
                is_last = not self.running
        if is_last:
            _register()


def _register() -> None:
    """Register our classes, unless the Auto classes are not there yet; ours do it when they are imported."""
    if AUTO in sys.modules and OURS not in sys.modules:
        importlib.import_module(OURS)


# `AutoModel` reads exports of ours after `import polyglance`, whichever is imported first
if __name__ != "polyglance":  # `raylib.api` has done it
    sys.meta_path[:0] = [_OneCopy(), _TransformersFinder()]
    _register()

__all__ = ["Answer", "Match", "Model", "UserError", "__version__", "load"]
