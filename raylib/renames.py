"""Settings that have been renamed since a config was stored: one table, and the function through which every
reader of a stored config passes its values.

A renamed setting is one line here. On the command line the old name is unknown, the error tells the new one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

# old dotted path -> new dotted path, by the kind of the stored config, in the order of application:
# a part that has moved as a whole comes before the settings in it.
#   pretrain, finetune, search   the config.json of a run, a --config file, search.json
#   finetuned                    the config.json of a fine-tuned model's folder, but for its backbone's sizes
#   unified, cclm, mclip, ...    the sizes of a backbone of `raylib.models.BACKBONES`, wherever stored,
#                                but for a pretraining run's config.json: there they are `model.X` of pretrain
RENAMED: dict[str, dict[str, str]] = {
    "pretrain": {
        "optim.horizon": "optim.schedule_factor",
        "fit.zero": "fit.sharding",
    },
    "finetune": {
        "tests": "run_test",
        "curves": "eval_each_epoch",
        "encoded": "cache_image_states",
        "matching": "use_itm_head",
        "optim.horizon": "optim.schedule_factor",
        "fit.zero": "fit.sharding",
    },
    "search": {
        "trials": "num_trials",
        "search": "algorithm",
        "stop": "early_stopping",
        "select": "dev_sets",
        "workers": "workers_per_trial",
        "concurrent": "max_concurrent",
        "grace": "min_epochs",
        "reduction": "reduction_factor",
        "perturb": "perturb_every",
        "top": "num_finalists",
        "seeds": "final_seeds",
    },
    "finetuned": {
        "pictures": "num_images",
    },
    **{kind: {"whole_picture": "whole_image"} for kind in ("uc2", "m3p", "muniter", "xuniter")},
}

# new dotted path -> what a value stored under the old name, as a string, is now
VALUES: dict[str, dict[str, Any]] = {
    "fit.sharding": {"True": "zero2", "False": "none"},
}


class Like(NamedTuple):
    """A setting that is what another of its part is, in a part stored before there was a `follow`."""

    setting: str


# settings that changed what is done where they are not given -> what configs that were stored before mean
ADDED: dict[str, dict[str, Any]] = {
    "finetune": {"strategies.distillation.words": "spaces", "preprocessing": "opencv"},
    "pretrain": {
        "model.vision_dropout": Like("dropout"),
        "objective.tlm_directions": Like("directions"),
    },
    **{kind: {"vision_dropout": Like("dropout")} for kind in ("unified", "cclm")},
}
# settings by which a stored config, which is whole, is told from a file of a few that a user has written
WHOLE = {"finetune": ("task", "strategies", "optim", "fit", "batch")}

# modules that users' files in stored runs import names from -> where these are now
MODULES = {
    "finetune.formats.jsonl": "finetune.formats",
    "finetune.formats.stream": "finetune.formats",
    "raylib.objectives.terms": "raylib.objectives",
}


def rename_settings(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the stored settings `values` by the names that they have now.

    A path that leads through a list means each of its elements. A setting that already has its new name
    keeps its value.
    """
    renamed = _copy(values)
    for old, new in RENAMED.get(kind, {}).items():
        _move(renamed, old.split("."), new.split("."), VALUES.get(new, {}))
    is_whole = all(name in renamed for name in WHOLE.get(kind, ()))
    for path, value in ADDED.get(kind, {}).items():
        *parts, name = path.split(".")
        nodes = [renamed] if parts or is_whole else []
        for part in parts:
            nodes = [below for node in nodes for below in _nodes(node.get(part))]
        for node in nodes:
            if not isinstance(value, Like):
                node.setdefault(name, value)
            elif value.setting in node and "follow" not in node:
                node.setdefault(name, node[value.setting])
    return renamed


def rename_path(kind: str, path: str) -> str:
    """Return the dotted `path` of a setting, as a search space names it, by the name that it has now."""
    for old, new in RENAMED.get(kind, {}).items():
        if path == old or path.startswith(f"{old}."):
            path = new + path[len(old) :]
    return path


def model_kind(description: dict[str, Any]) -> str:
    """Return the kind of a model folder's config.json; another program's is no key of `RENAMED`."""
    return str(description.get("model_type", "")).removeprefix("polyglance-")


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _copy(value) for name, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _move(values: dict[str, Any], old: list[str], new: list[str], changed: dict[str, Any]) -> None:
    # what both paths begin with stays: below it, either may lead through a list
    if len(old) > 1 and len(new) > 1 and old[0] == new[0]:
        for node in _nodes(values.get(old[0])):
            _move(node, old[1:], new[1:], changed)
        return
    parents = [values]
    for name in old[:-1]:
        parents = [below for node in parents for below in _nodes(node.get(name))]
    for parent in parents:
        if old[-1] in parent:
            value, target = parent.pop(old[-1]), values
            for name in new[:-1]:
                # a part that was off (None) is on now
                target[name] = target = target[name] if isinstance(target.get(name), dict) else {}
            target.setdefault(new[-1], changed.get(str(value), value))


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """The settings in a part: one of a nested config, one an element of a list, none of anything else."""
    yield from (node for node in (value if isinstance(value, list) else [value]) if isinstance(node, dict))
