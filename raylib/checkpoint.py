"""Checkpoint folders: what is in one, whether it is whole, which ones a run has, which one it goes on from.

    runs/NAME/checkpoints/
        registry.json          {"checkpoints": ["step_000050", ...], "best": {"checkpoint", "score"} or null}
        step_000100/
            meta.json          step, workers, engine, score, seconds, losses
            model.safetensors, config.json   the model alone, for evaluation, export and other engines
            files-00000.json   size and sha256 of every file that worker 0 wrote; one such list a worker
            optimizer-00000.*  what is only there to train on, a part a worker (`raylib.engine_state`); none
                               after `keep_optimizer=false`

A checkpoint exists once it is *registered*, and the registry is written whole: whatever is killed at whatever
moment leaves the checkpoints that were there before, or these and the new one. A folder that is not
registered is the leftover of a crash: nobody reads it, and the run's next start removes it (`settle`).

Earlier versions kept a list in `registry.json`, Ray Train's snapshot beside it, and the best checkpoint in a
folder of its own, `runs/NAME/best`: they are read as they are; a run that goes on has them in its registry
from then on.
"""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field
from safetensors import safe_open

from raylib.errors import NotFinite, UserError, reading
from raylib.fileio import (
    atomic_file,
    read_json,
    read_json_object,
    remove_temporaries,
    sha256_file,
    sync_file,
    sync_folder,
    write_json,
)
from raylib.finite import is_finite, require_finite_values
from raylib.lock import require_owned
from raylib.processes import is_same_file, try_lock
from raylib.strict_json import Count, MemberName, PlainName, check_shape

# what engines of earlier versions wrote, pickled
OLD_OPTIMIZER = ("optimizer.pt", "zero", "latest", "zero_to_fp32.py", "zero_to_torch.py")
FOLDER, REGISTRY = "checkpoints", "registry.json"
AVERAGE = "average"  # the mean of a run's checkpoints (`raylib.averaging`)
ADVICE = "restore the file, or start from an older checkpoint with resume=step_NNNNNN"
SCORES = "scores.json"  # of a checkpoint that was saved without
# of earlier versions: the best checkpoint, where `rewind` had put the checkpoint to go on from, Ray Train's
OLD_BEST, OLD_START, OLD_SNAPSHOT = "best", "start.json", "checkpoint_manager_snapshot.json"


class StoredBest(BaseModel):
    """As a registry has it."""

    checkpoint: PlainName
    score: float


class StoredRegistry(BaseModel):
    """A registry as JSON has it."""

    checkpoints: list[PlainName]
    best: StoredBest | None
    aside: dict[PlainName, PlainName] = {}


class StoredScores(BaseModel):
    """`scores.json`, and the scores in `meta.json`."""

    score: float | None
    evaluation: dict[str, float] = {}
    evaluation_due: bool = False


class StoredInterval(BaseModel):
    """The state of `raylib.engine.IntervalSums`."""

    names: list[str]
    sums: list[float]
    count: Count


class StoredMeta(StoredScores):
    """`meta.json`, as far as this version goes by it."""

    step: Count
    workers: Annotated[int, Field(ge=1, lt=1 << 20)]
    times: dict[str, float] = {}
    losses: dict[str, float] = {}
    skipped_steps: Count = 0
    skipped_in_a_row: Count = 0
    samples_replaced: Count = 0
    interval: StoredInterval | None = None
    is_scheduled: bool = True
    total_steps: Count = 0


class StoredFile(BaseModel):
    """As a worker's list of its files has it."""

    bytes: Count
    sha256: str


class Best(NamedTuple):
    """The registered checkpoint with the highest score."""

    checkpoint: str
    score: float


class Registry(NamedTuple):
    """The checkpoints of a run, oldest first, with those that are kept as the best; and `aside`, those that
    `rewind` is moving away: {name: folder of the run}."""

    checkpoints: Sequence[str] = ()
    best: Best | None = None
    aside: Mapping[str, str] = {}


def read_registry(run: Path) -> Registry:
    """Return what the run has registered, also where an earlier version did it.

    Raises:
        UserError: the file is damaged.
    """
    path, snapshot = run / FOLDER / REGISTRY, run / FOLDER / OLD_SNAPSHOT
    advice = "restore it, or remove it: the next start registers the checkpoints that are there"
    what, stored = "a register of checkpoints", []
    if os.path.lexists(path):
        shape = StoredRegistry | list[PlainName]
        stored = read_json(path, what, advice, finite=False, shape=shape)
    if isinstance(stored, dict):
        best = Best(stored["best"]["checkpoint"], stored["best"]["score"]) if stored["best"] else None
        return Registry(stored["checkpoints"], best, stored.get("aside", {}))
    # a run of an earlier version may have parts with and without Ray: both registers count
    if os.path.lexists(snapshot):
        values = read_json(snapshot, what, advice, finite=False)
        with reading(snapshot, what, advice):
            results = [*values["checkpoint_results"], values["latest_checkpoint_result"]]
            names = [result["checkpoint_dir_name"] for result in results if result]
            check_shape(names, list[PlainName])
        stored = [*stored, *names]
    return Registry(in_order(set(stored)))


def _write_registry(run: Path, registry: Registry) -> None:
    values: dict[str, Any] = {
        "checkpoints": list(registry.checkpoints),
        "best": registry.best and registry.best._asdict(),
    }
    if registry.aside:
        values["aside"] = dict(registry.aside)
    with atomic_file(run / FOLDER / REGISTRY) as temporary:
        temporary.write_text(json.dumps(values, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        sync_file(temporary)  # which takes a while: now nothing lies between the look and the rename
        require_owned(run)


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint; see `in_order`."""
    return f"step_{step:06d}"


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of checkpoints by their steps; from a million on these have a digit more."""
    return sorted(names, key=lambda name: (len(name), name))


def verify(folder: Path, names: Collection[str] | None = None) -> dict:
    """Compare every file of a checkpoint, or those of `names`, with the lists of its workers, and return its
    meta data.

    Raises:
        UserError: a file is missing, truncated or changed; it is named.
    """
    meta = read_meta(folder)
    for rank in range(meta["workers"]):
        listing = folder / f"files-{rank:05d}.json"
        if not listing.is_file():
            raise UserError(f"{listing}: missing, so this checkpoint is not whole; {ADVICE}")
        for name, expected in _read_listing(listing).items():
            if names is not None and name not in names:
                continue
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: missing from the checkpoint; {ADVICE}")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise UserError(f"{path}: {size} bytes instead of {expected['bytes']}; {ADVICE}")
            if sha256_file(path) != expected["sha256"]:
                raise UserError(f"{path}: content changed since it was saved (sha256 differs); {ADVICE}")
    return meta


def read_meta(folder: Path) -> dict:
    """Read `meta.json` of a checkpoint folder, and the scores that it got later.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path, scores = folder / "meta.json", folder / SCORES
    if not folder.exists():
        raise UserError(f"{folder}: gone, a checkpoint of its run; {_advice_of_lost(folder)}")
    if not path.exists():
        raise UserError(f"{path}: missing, so this is no whole checkpoint; {ADVICE}")
    # earlier versions wrote scores that are not finite
    meta = read_json_object(path, (), "a checkpoint's record", ADVICE, finite=False, shape=StoredMeta)
    if meta.get("evaluation_due") and os.path.lexists(scores):
        what = "a checkpoint's scores"
        meta |= read_json_object(scores, (), what, ADVICE, finite=False, shape=StoredScores)
    return {"times": {}, "losses": {}, "evaluation": {}, **meta}


def _advice_of_lost(folder: Path) -> str:
    """Return what to do about a checkpoint whose folder is gone."""
    older = in_order(path.parent.name for path in folder.parent.glob("step_*/meta.json"))
    if older:
        return f"restore it, or go on from an older one: resume={older[-1]}"
    return (
        f"restore it; there is no other: to begin anew, remove {folder.parent.parent}, or give another name="
    )


def _read_listing(path: Path) -> dict[str, Any]:
    """Read a worker's list of its files."""
    return read_json_object(path, (), "a list of files", ADVICE, shape=dict[MemberName, StoredFile])


def add_scores(folder: Path, step: int, scores: dict[str, float], is_judged: bool) -> None:
    """Store the scores of the checkpoint of `step`, which a notice had saved without them; is_judged: `best`
    goes by them.

    In a file of its own, written whole: a kill leaves the checkpoint with its scores or without, and its list
    of files true.
    """
    score = scores.get("score") if is_judged else None
    write_json(
        folder / SCORES,
        {"evaluation_due": False, "evaluation": scores, "evaluation_step": step, "score": score},
    )


def find_newest(run: Path) -> Path | None:
    """Return the newest registered checkpoint of a run; None: there is none yet."""
    folder = run / FOLDER
    if names := read_registry(run).checkpoints:
        return folder / names[-1]
    if (folder / OLD_START).is_file():
        return run / read_json(folder / OLD_START, "a checkpoint's name", ADVICE, shape=MemberName)
    return None


def find_best(run: Path) -> Path | None:
    """Return the checkpoint of a run that has the best score; None: none has a score."""
    best = read_registry(run).best
    if best and (found := run / FOLDER / best.checkpoint).is_dir():
        return found
    return run / OLD_BEST if (run / OLD_BEST).is_dir() else None


def find_trained(run: Path, select: str) -> Path:
    """Find the checkpoint that results come from: with `select` "best", the best on the dev set if there is
    one; with "average" the mean of all, once it is there; else the newest.

    Raises:
        UserError: there is none yet.
    """
    if select == AVERAGE and (run / AVERAGE).is_dir():
        return run / AVERAGE
    source = (find_best(run) if select == "best" else None) or find_newest(run)
    if source is None:
        raise UserError(f"{run}: no checkpoint to evaluate; finish the run first")
    return source


def hint_if_unsaved(run: Path) -> str:
    """Return the end of the error line of a run that cannot go on: where it has kept nothing, as while a
    user's file is being mended, its folder may go; else ""."""
    has_result = any(run.glob(f"**/{FOLDER}/step_*")) or any(run.glob("**/result.json"))
    return "" if has_result else "; or remove the folder: it holds no checkpoint yet"


def register(run: Path, name: str, keep: int) -> None:
    """Enter a folder that is now whole on the disk; then drop all but the newest `keep` and the best one. One
    that a notice, and no setting, had saved counts among none of these, and stays until a newer one is there.

    Raises:
        NotFinite: the score of this checkpoint; it is not entered.
    """
    source = run / FOLDER / name
    score = read_meta(source)["score"]
    if score is not None and not is_finite(score):
        raise NotFinite(
            f"{source}/meta.json: score {score} is not finite (NaN or infinite), and cannot be compared"
        )
    names = in_order({*read_registry(run).checkpoints, *_find_unlisted(run, name), name})
    best = _best_of(run, names)
    stay = {*[each for each in names if _is_scheduled(run, each)][-keep:], names[-1]}
    kept = [each for each in names if each in stay or (best and each == best.checkpoint)]
    # the registry first: a crash between the two leaves folders that nobody looks at, never names without one
    _write_registry(run, Registry(kept, best))
    # those too that an earlier call has left to a command that was reading them
    for folder in (run / FOLDER).glob("step_*"):
        if folder.name not in kept:
            _remove_unless_held(folder)


def _is_scheduled(run: Path, name: str) -> bool:
    try:
        return read_meta(run / FOLDER / name).get("is_scheduled", True)
    except UserError:  # damaged: `settle` has said so
        return True


def _find_unlisted(run: Path, new: str = "") -> set[str]:
    """Return the checkpoints, but for the `new` one, of a run whose registry was lost."""
    folder = run / FOLDER
    if any((folder / each).is_file() for each in (REGISTRY, OLD_SNAPSHOT, OLD_START)):
        return set()
    # a folder has its name only since it was whole
    names = {path.name for path in folder.glob("step_*") if (path / "meta.json").is_file()} - {new}
    if names:
        print(f"{folder}/{REGISTRY} was gone; registered again: {', '.join(in_order(names))}", flush=True)
    return names


def _best_of(run: Path, names: Sequence[str]) -> Best | None:
    """The checkpoint with the highest score of `names`; of equal ones the first, or the last if its meta data
    say "ties": "last". One that is not finite, as earlier versions kept it, is passed over."""
    # read again each time, so that it is the same after a kill at any moment: the best so far is among them
    best: Best | None = None
    for name in names:
        folder = run / FOLDER / name
        try:
            meta = read_meta(folder)
            score = meta["score"]
            if score is None or _not_finite_of(folder):
                continue
        except UserError:
            continue  # removed by the user, or damaged: `settle` has said so
        if best is None or score > best.score or (score == best.score and meta.get("ties") == "last"):
            best = Best(name, score)
    return best


def settle(run: Path) -> None:
    """Bring a run's checkpoints in order, before it starts: finish what a killed start left half done, remove
    what it left behind, choose the best one anew. One process at a time calls it."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for each in (run, run.parent):
        sync_folder(each)
    registry = read_registry(run)
    for name, place in registry.aside.items():
        _set_aside(folder / name, run / place)
    names = set(registry.checkpoints) | _find_unlisted(run)
    for path in (*folder.glob("step_*"), *folder.glob(".step_*"), run / f".{OLD_BEST}.new"):
        if path.name not in names:
            remove_folder(path)
    remove_temporaries(run)
    ordered = in_order(names | _adopt_best(run, in_order(names)))
    for name in ordered[:-1]:  # the newest is looked at as a whole (`verify`)
        try:
            if read_meta(folder / name)["score"] is not None:
                _not_finite_of(folder / name)
        except UserError as e:
            print(f"note: it cannot be the best one: {e}", flush=True)
    _write_registry(run, Registry(ordered, _best_of(run, ordered)))


def _adopt_best(run: Path, names: Sequence[str]) -> set[str]:
    """Make the folder `best` of an earlier version one of the run's checkpoints; returns its name. One that
    is newer than all of them, from before the run was rewound, stays where it is."""
    best = run / OLD_BEST
    if not best.is_dir() or not names:
        return set()
    meta = read_meta(best)
    name = step_name(meta["step"])
    if name not in names and in_order([*names, name])[-1] == name:
        return set()
    if bad := _not_finite_of(best):
        print(f"{best}: {bad} is not finite (NaN or infinite); it is not kept", flush=True)
        remove_folder(best)
        return set()
    # entered before it is moved: a crash between the two leaves a name whose folder is still `best`, which
    # `find_best` and the next start look for
    _write_registry(run, Registry(in_order({*names, name}), Best(name, meta["score"])))
    if (run / FOLDER / name).is_dir():
        remove_folder(best)  # the same files, under two names
    else:
        best.rename(run / FOLDER / name)
        sync_folder(run / FOLDER)
    return {name}


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint, or a leftover of one, if it is there: under a name that nobody looks for, since it
    takes a while."""
    trash = folder
    if folder.is_dir() and folder.suffix != ".removed":
        trash = folder.with_name(f".{folder.name.removeprefix('.')}.removed")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
    if trash.is_dir():
        shutil.rmtree(trash)


_held: dict[Path, int] = {}  # open files of checkpoints that this process reads, which others may remove


def hold_checkpoint(folder: Path) -> bool:
    """Let a run that is under way leave a checkpoint in its place until this process ends; returns whether it
    is still there."""
    path = folder / "meta.json"
    if folder in _held and is_same_file(_held[folder], path):
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    if try_lock(descriptor, fcntl.LOCK_SH) is False or not is_same_file(descriptor, path):
        os.close(descriptor)  # it is being removed
        return False
    _held[folder] = descriptor
    return True


def _remove_unless_held(folder: Path) -> None:
    try:
        descriptor = os.open(folder / "meta.json", os.O_RDWR)  # NFS wants it so for such a lock
    except OSError:
        remove_folder(folder)
        return
    try:
        if try_lock(descriptor) is not False:
            remove_folder(folder)
    finally:
        os.close(descriptor)


def _not_finite_of(folder: Path) -> str | None:
    """Name what is not finite of a checkpoint with a score."""
    meta = read_meta(folder)
    if not is_finite(meta["score"]):
        return f"its score {meta['score']}"
    if "skipped_steps" in meta:  # saved by a version that keeps finite weights alone
        return None
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: missing from the checkpoint; {ADVICE}")
    with reading(path, "weights (safetensors)", ADVICE), safe_open(path, "pt") as file:
        names: list[str] = file.keys()
        return next((f"tensor {name}" for name in names if not is_finite(file.get_tensor(name))), None)


def rewind(run: Path, name: str) -> Path:
    """Let the run go on from `name` ("step_000050" or "best"): newer checkpoints are set aside. Nothing is
    deleted.

    Raises:
        UserError: there is no such checkpoint (names those there are); it is not whole, or has weights alone.
    """
    names, best, _ = read_registry(run)
    target = best.checkpoint if best and name == "best" else name
    if target not in names:
        known = ", ".join([*names, *(["best"] if best else [])])
        raise UserError(f"{run}: no checkpoint '{name}'; there are: {known or 'none'}")
    verify(run / FOLDER / target)
    require_optimizer(run / FOLDER / target)
    end = names.index(target) + 1
    older, newer = names[:end], names[end:]
    if newer:
        # whatever is newer must not be found again, and steps that come again need its names. The registry
        # says first what is moved where: after a crash in between, the next start moves the rest
        places = (f"{FOLDER}.before-{number}" for number in itertools.count(1))
        place = next(each for each in places if not (run / each).exists())
        (run / place).mkdir()
        aside = dict.fromkeys(newer, place)
        _write_registry(run, Registry(older, _best_of(run, older), aside))
        for each in newer:
            _set_aside(run / FOLDER / each, run / place)
        _set_aside(run / AVERAGE, run / place)  # of checkpoints that are no longer the run's
    _write_registry(run, Registry(older, _best_of(run, older)))
    return run / FOLDER / target


def _set_aside(folder: Path, place: Path) -> None:
    place.mkdir(exist_ok=True)
    if folder.is_dir():
        folder.rename(place / folder.name)


def is_for_training(name: str) -> bool:
    """Return whether a file of a checkpoint, by its path in there, is of use to train on alone."""
    first = Path(name).parts[0]
    return first.startswith("optimizer-") or first in OLD_OPTIMIZER


def has_optimizer(folder: Path) -> bool:
    """Return whether training can go on from a checkpoint."""
    return any(name.startswith("optimizer-") for name in _listed_files(folder))


def has_old_optimizer(folder: Path) -> bool:
    """Return whether an earlier version has pickled there what training goes on from."""
    return any(is_for_training(name) for name in _listed_files(folder)) and not has_optimizer(folder)


def _listed_files(folder: Path) -> Collection[str]:
    listing = folder / "files-00000.json"
    # by the list and not by the files: `drop_optimizers` shortens it first
    return _read_listing(listing) if listing.is_file() else [path.name for path in folder.iterdir()]


def require_optimizer(folder: Path) -> None:
    """Refuse to train on from a checkpoint that has weights alone, or an optimizer's state of an earlier
    version.

    Raises:
        UserError: it has.
    """
    if has_optimizer(folder):
        return
    if has_old_optimizer(folder):
        run = folder.parent if folder.name == OLD_BEST else folder.parent.parent
        while (run.parent / "config.json").is_file():  # it is a part of a run
            run = run.parent
        raise UserError(
            f"{folder}: its optimizer state was pickled by an earlier version, and is not loaded; "
            f"python -m pretrain convert {run} writes it anew, if the run is your own"
        )
    raise UserError(
        f"{folder}: no optimizer state, as of a run that ended with keep_optimizer=false: it can be "
        "evaluated and exported, but not trained on; start a new run from its weights (model= in "
        "fine-tuning, init.model= in pretraining)"
    )


def drop_optimizers(run: Path) -> None:
    """Remove what only training needs from the checkpoints of a finished run and of its parts; the weights
    stay. Those that `rewind` set aside stay as they are."""
    steps = [step for folder in run.rglob(FOLDER) for step in folder.glob("step_*")]
    for folder in (*steps, *run.rglob(OLD_BEST)):
        # the lists first: a crash between leaves files that no list has, never a list of what is not there
        for listing in sorted(folder.glob("files-*.json")):
            files = {k: v for k, v in _read_listing(listing).items() if not is_for_training(k)}
            write_json(listing, files)
        for path in list(folder.iterdir()):
            if is_for_training(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy_from(run: Path, source: Path) -> None:
    """Make `source`, a checkpoint of another run, the one that `run` goes on from; what `run` had is gone.

    Raises:
        UserError: `source` is not whole.
    """
    name = step_name(verify(source)["step"])
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _write_registry(run, Registry())
    settle(run)
    partial = folder / f".{name}.partial"
    shutil.copytree(source, partial)
    for path in (*filter(Path.is_file, partial.rglob("*")), partial):
        sync_folder(path) if path.is_dir() else sync_file(path)
    partial.rename(folder / name)
    sync_folder(folder)
    register(run, name, 1)


def read_evaluation(folder: Path) -> dict[str, float]:
    """Return the scores that a checkpoint was judged by.

    Raises:
        NotFinite: one is not finite.
    """
    values = read_meta(folder)["evaluation"]
    require_finite_values(f"{folder}/meta.json", values)
    return values
