"""Polyglance as a library: `import polyglance`, which is what the distribution calls this package.

    import polyglance
    model = polyglance.load("runs/sample")
    model.similarity(["cat.jpg"], ["a cat", "ein Hund"])

In a checkout that is not installed it is `raylib.api`. Nothing heavy is imported before `load`.
"""

import importlib
import importlib.abc
import importlib.util
import sys
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
    Raises:
        UserError: no such model, weights that do not fit or are not finite.
    """
    from raylib.api.loading import load_model

    return load_model(path, device, dtype, language=language, backbone=backbone, vision=vision)


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


class _Registering(ModuleType):
    """`transformers`, until somebody asks it for a class that must know ours: importing all of it takes
    seconds, and most users of this package never do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("Auto") or name == "pipeline":
            self.__class__ = self.__dict__["_polyglance_class"]
            _register()
            return getattr(self, name)
        return self.__dict__["_polyglance_class"].__getattr__(self, name)


class _TransformersFinder(importlib.abc.MetaPathFinder):
    """Sees `transformers` being imported, once."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_watch(module: ModuleType) -> None:
                execute(module)
                _watch(sys.modules[name])

            spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from raylib.api.huggingface import register

    register()


def _watch(transformers: Any) -> None:
    if "transformers.models.auto.configuration_auto" in sys.modules:
        _register()
    elif not isinstance(transformers, _Registering):
        lazy = type(transformers)
        transformers.__dict__["_polyglance_class"] = lazy
        transformers.__class__ = type(lazy.__name__, (_Registering, lazy), {})


# `AutoModel` reads exports of ours after `import polyglance`, whichever is imported first
if __name__ != "polyglance":  # `raylib.api` has done it
    sys.meta_path.insert(0, _OneCopy())
    if "transformers" in sys.modules:
        _watch(sys.modules["transformers"])
    else:
        sys.meta_path.insert(0, _TransformersFinder())

__all__ = ["Answer", "Match", "Model", "UserError", "__version__", "load"]
