"""Checkpoint folders: what is in one, whether it is whole, which one a run goes on from.

    runs/NAME/checkpoints/step_000100/
        meta.json              step, workers, engine, score, seconds, losses
        model.safetensors, config.json   the model alone, for evaluation, export and other engines
        files-00000.json       size and sha256 of every file that worker 0 wrote; one such list a worker
        ...                    the engine's own files, one shard a worker; none after `keep_optimizer=false`
    runs/NAME/best/            the checkpoint with the best score so far (hard links, where the disk allows)

A checkpoint exists once it is *registered*: in Ray Train's snapshot, or in `registry.json` without Ray. A
folder that is not registered is a leftover of a crash: it is ignored, and overwritten when its step comes
again.
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open

from raylib.errors import NotFinite, UserError
from raylib.fileio import read_json, sha256_file, write_json
from raylib.finite import is_finite, require_finite_values

OPTIMIZER = ("optimizer.pt", "zero", "latest", "zero_to_fp32.py")  # what engines write, to train on
FOLDER, BEST, REGISTRY, START = "checkpoints", "best", "registry.json", "start.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint: as text, names have the order of their steps."""
    return f"step_{step:06d}"


def write_file_list(folder: Path, rank: int) -> None:
    """List size and hash of every file in `folder`, all of them written by worker `rank`."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(filter(Path.is_file, folder.rglob("*")))
    }
    (folder / f"files-{rank:05d}.json").write_text(json.dumps(files, indent=1), encoding="utf-8")


def verify(folder: Path, names: Collection[str] | None = None) -> dict:
    """Compare every file of a checkpoint, or those of `names`, with the lists of its workers, and return its
    meta data.

    Raises:
        UserError: a file is missing, truncated or changed; it is named.
    """
    advice = "restore the file, or start from an older checkpoint with resume=step_NNNNNN"
    meta = read_meta(folder)
    for rank in range(meta["workers"]):
        listing = folder / f"files-{rank:05d}.json"
        if not listing.is_file():
            raise UserError(f"{listing}: missing, so this checkpoint is not whole; {advice}")
        for name, expected in read_json(listing).items():
            if names is not None and name not in names:
                continue
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: missing from the checkpoint; {advice}")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise UserError(f"{path}: {size} bytes instead of {expected['bytes']}; {advice}")
            if sha256_file(path) != expected["sha256"]:
                raise UserError(f"{path}: content changed since it was saved (sha256 differs); {advice}")
    return meta


def read_meta(folder: Path) -> dict:
    """Read `meta.json` of a checkpoint folder.

    Raises:
        UserError: there is none.
    """
    try:
        return read_json(folder / "meta.json")
    except FileNotFoundError:
        raise UserError(f"{folder}/meta.json: missing, so this is no whole checkpoint") from None


def find_newest(run: Path) -> Path | None:
    """Return the newest registered checkpoint of a run, else the one that `rewind` set, else None."""
    folder = run / FOLDER
    names: list[str] = []
    # a run may have parts with and without Ray: both registers are read
    if (folder / REGISTRY).is_file():
        names += read_json(folder / REGISTRY)
    if (folder / SNAPSHOT).is_file():
        latest = read_json(folder / SNAPSHOT)["latest_checkpoint_result"]
        names += [latest["checkpoint_dir_name"]] if latest else []
    if names:
        return folder / max(names)
    if (folder / START).is_file():
        return run / read_json(folder / START)
    return None


def hint_if_unsaved(run: Path) -> str:
    """Return the end of the error line of a run that cannot go on: where it has kept nothing, as while a
    user's file is being mended, its folder may go; else ""."""
    has_result = any(run.glob(f"**/{FOLDER}/step_*")) or any(run.glob("**/result.json"))
    return "" if has_result else "; or remove the folder: it holds no checkpoint yet"


def register(run: Path, name: str, keep: int) -> None:
    """Enter a folder that is now whole, without Ray; drop all but the newest `keep`."""
    registry = run / FOLDER / REGISTRY
    names = sorted({*(read_json(registry) if registry.is_file() else []), name})
    # the registry first: a crash between the two leaves folders that nobody looks at, never names without one
    write_json(registry, names[-keep:])
    for old in names[:-keep]:
        shutil.rmtree(run / FOLDER / old)


def keep_best(run: Path, name: str) -> None:
    """Make `best/` this checkpoint if its score is the highest so far; as high as `best/`'s only if its meta
    data say "ties": "last". One that is there, but not finite, as earlier versions kept it, gives way, and a
    line says so.

    Raises:
        NotFinite: the score of this checkpoint.
    """
    source, best = run / FOLDER / name, run / BEST
    meta = read_meta(source)
    score = meta["score"]
    if score is None:
        return
    if not is_finite(score):
        raise NotFinite(
            f"{source}/meta.json: score {score} is not finite (NaN or infinite), and cannot become {best}"
        )
    if best.is_dir():
        if bad := _not_finite_of(best):
            print(f"{best}: {bad} is not finite (NaN or infinite); {name} takes its place", flush=True)
        elif (highest := read_meta(best)["score"]) > score or (
            highest == score and meta.get("ties") != "last"
        ):
            return
    # copied beside, then renamed: a crash leaves the old best, the new one or only the copy, never a half
    fresh = run / f".{BEST}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh, copy_function=_link)
    if best.is_dir():
        shutil.rmtree(best)
    fresh.rename(best)


def _not_finite_of(best: Path) -> str | None:
    """Name what is not finite of the best checkpoint so far."""
    meta = read_meta(best)
    if not is_finite(meta["score"]):
        return f"its score {meta['score']}"
    if "skipped_steps" in meta:  # saved by a version that keeps finite weights alone
        return None
    with safe_open(best / "model.safetensors", "pt") as file:
        names: list[str] = file.keys()
        return next((f"tensor {name}" for name in names if not is_finite(file.get_tensor(name))), None)


def _link(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:  # a file system without hard links
        shutil.copy2(source, to)


def rewind(run: Path, name: str) -> Path:
    """Set all checkpoints aside and let the run go on from `name` ("step_000050" or "best"). Nothing is
    deleted.

    Raises:
        UserError: there is no such checkpoint (names those there are); it is not whole, or has weights alone.
    """
    folder = run / FOLDER
    target = run / BEST if name == BEST else folder / name
    if not target.is_dir():
        names = sorted(p.name for p in folder.glob("step_*")) + ([BEST] if (run / BEST).is_dir() else [])
        raise UserError(f"{run}: no checkpoint '{name}'; there are: {', '.join(names) or 'none'}")
    verify(target)
    require_optimizer(target)
    # whatever is newer than the target must not be found again, and steps that come again need their names
    old_folder = run / f"{FOLDER}.before-{len(list(run.glob(f'{FOLDER}.before-*'))) + 1}"
    folder.rename(old_folder)
    folder.mkdir()
    start = target if name == BEST else old_folder / name
    write_json(folder / START, str(start.relative_to(run)))
    return start


def has_optimizer(folder: Path) -> bool:
    """Return whether training can go on from a checkpoint."""
    return any((folder / name).exists() for name in OPTIMIZER[:2])


def require_optimizer(folder: Path) -> None:
    """Refuse to train on from a checkpoint that has weights alone.

    Raises:
        UserError: it has.
    """
    if not has_optimizer(folder):
        raise UserError(
            f"{folder}: no optimizer state, as of a run that ended with keep_optimizer=false: it can be "
            "evaluated and exported, but not trained on; start a new run from its weights (model= in "
            "fine-tuning, init.model= in pretraining)"
        )


def drop_optimizers(run: Path) -> None:
    """Remove what only training needs from the checkpoints of a finished run and of its parts; the weights
    stay. Those that `rewind` set aside stay as they are."""
    steps = [step for folder in run.rglob(FOLDER) for step in folder.glob("step_*")]
    for folder in (*steps, *run.rglob(BEST)):
        # the lists first: a crash between leaves files that no list has, never a list of what is not there
        for listing in folder.glob("files-*.json"):
            files = {k: v for k, v in read_json(listing).items() if Path(k).parts[0] not in OPTIMIZER}
            write_json(listing, files)
        for name in OPTIMIZER:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def copy_from(run: Path, source: Path) -> None:
    """Make `source`, a checkpoint of another run, the one that `run` goes on from; what `run` had is gone.

    Raises:
        UserError: `source` is not whole.
    """
    name = step_name(verify(source)["step"])
    for part in (FOLDER, BEST):
        shutil.rmtree(run / part, ignore_errors=True)
    shutil.copytree(source, run / FOLDER / name)
    register(run, name, 1)


def read_evaluation(folder: Path) -> dict[str, float]:
    """Return the scores that a checkpoint was judged by.

    Raises:
        NotFinite: one is not finite.
    """
    values = read_meta(folder)["evaluation"]
    require_finite_values(f"{folder}/meta.json", values)
    return values


def find_trained(run: Path, select: str, newest: Path | None) -> Path:
    """Find the checkpoint that results come from: with `select` "best", the best on the dev set if there is
    one, else the newest.

    Raises:
        UserError: there is none yet.
    """
    best = run / BEST
    source = best if select == "best" and best.is_dir() else newest
    if source is None:
        raise UserError(f"{run}: no checkpoint to evaluate; finish the run first")
    return source
