"""Trainings that come before a run's own, in folders below it.

Iterative magnitude pruning (paper 0, Algorithm 1): train, prune, rewind, again. Each round is a training of
its own in RUN/round_N, cut short after some epochs of the run's own schedule; RUN/masks/round_N.safetensors
is what it leaves.

A round whose mask is there is not done again, one that was interrupted goes on: so the cycle resumes wherever
it stopped.

Distillation with `epochs` (paper 3): the student is distilled in RUN/distilled, the run goes on from it on
answers alone.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from finetune import masks
from finetune.build import build_model
from finetune.config import FinetuneConfig
from finetune.worker import FinetuneJob
from raylib import checkpoint
from raylib.distributed import world_size
from raylib.fileio import read_json, write_json
from raylib.launch import is_main_process, launch, open_run, run_folder
from raylib.models.base import read_weights
from raylib.runtime import Reporter


def find_mask(
    config: FinetuneConfig, language: str | None, reporter: Reporter | None = None
) -> tuple[FinetuneConfig, dict[str, Any]]:
    """The mask that `strategies.sparse` asks for.

    Returns:
        (the config of the training that follows: with the mask, and code-mixed where that is asked for,
        {"finished", "seconds", "steps" and "skipped_steps" of all rounds, "sparsity": of the prunable weights
        and of the whole model}).
    """
    sparse, mixing = config.strategies.sparse, config.strategies.code_mixing
    spent, mask_file = (
        {"seconds": 0.0, "steps": 0, "skipped_steps": 0},
        Path(sparse.mask) if sparse.mask else None,
    )
    for number in range(1, sparse.rounds + 1) if mask_file is None else ():
        part = _with(config, None, mixing and mixing.stages in ("rounds", "both"))
        part = part.model_copy(
            update={"name": f"round_{number}", "runs": str(run_folder(config)), "resume": "newest"}
        )
        coming = run_folder(config) / "masks" / f"round_{number}.safetensors"
        start = (
            None
            if sparse.rewind == "initial" or number == 1
            else checkpoint.newest(Path(part.runs) / f"round_{number - 1}")
        )
        told = reporter and reporter.after((number - 1) * sparse.epochs)
        result = _round(FinetuneJob(language, sparse.epochs, start), part, mask_file, told)
        spent = {
            name: value + result.get(name, 0) for name, value in spent.items()
        }  # an older part.json has no skipped_steps
        if not result["finished"]:
            return part, {**result, **spent}
        if is_main_process(config) and not coming.is_file():
            _prune(part, sparse.rate, mask_file, coming)
        if world_size() > 1:
            dist.barrier()  # the others read what the first has written
        mask_file = coming
    ready = _with(config, mask_file, mixing and mixing.stages in ("last", "both"))
    parameters = sum(p.numel() for p in build_model(config).parameters())
    return ready, {"finished": True, **spent, "sparsity": masks.sparsity(masks.read(mask_file), parameters)}


def distil_first(
    config: FinetuneConfig, language: str | None, reporter: Reporter | None = None
) -> tuple[FinetuneConfig, dict[str, Any], Path]:
    """The training that `strategies.distillation.epochs` asks for.

    Returns:
        (the config of the training that follows, {"finished", "seconds", "steps", "skipped_steps"}, the
        checkpoint that it starts from).
    """
    taught = config.strategies.distillation
    left_out = [
        "head_first",
        *([] if taught.task else ["prior"]),
    ]  # they are the answers', which this one does not train on
    only = {"distillation": taught.model_copy(update={"epochs": None}), **dict.fromkeys(left_out)}
    changed = {
        "strategies": config.strategies.model_copy(update=only),
        "epochs": taught.epochs,
        "select": "last",
        "name": "distilled",
        "runs": str(run_folder(config)),
        "resume": "newest",
    }
    part = config.model_copy(update=changed)
    result = _train_once(
        FinetuneJob(language, taught.epochs), part, part, reporter and reporter.after(0, taught.epochs)
    )
    ready = after_distillation(config)
    spent = {name: result.get(name, 0) for name in ("finished", "seconds", "steps", "skipped_steps")}
    return ready, spent, checkpoint.newest(run_folder(part))


def after_distillation(config: FinetuneConfig) -> FinetuneConfig:
    """The config of a run's own training, where distillation comes before it; else as it is."""
    taught = config.strategies.distillation
    if not taught or not taught.epochs:
        return config
    return config.model_copy(
        update={"strategies": config.strategies.model_copy(update={"distillation": None})}
    )


def _with(config: FinetuneConfig, mask: Path | None, mixed: bool) -> FinetuneConfig:
    """`config` with the mask, and without code-mixing unless it is `mixed`."""
    strategies = config.strategies
    sparse = strategies.sparse.model_copy(update={"mask": mask and str(mask)})
    changed = {"sparse": sparse, "code_mixing": strategies.code_mixing if mixed else None}
    return config.model_copy(update={"strategies": strategies.model_copy(update=changed)})


def _round(
    job: FinetuneJob, part: FinetuneConfig, mask: Path | None, reporter: Reporter | None
) -> dict[str, Any]:
    """Train a round under `mask`. The mask's place is no setting of the round: a run may move."""
    return _train_once(job, part, _with(part, mask, True), reporter)


def _train_once(
    job: FinetuneJob, part: FinetuneConfig, launched: FinetuneConfig, reporter: Reporter | None
) -> dict[str, Any]:
    """Train in the folder of `part`, or say what that came to before."""
    done = run_folder(part) / "part.json"
    if done.is_file():
        return read_json(done)
    if is_main_process(part):
        open_run(part)
    result = launch(job, launched, run_folder(part), reporter)
    if result["finished"] and is_main_process(part):
        write_json(done, result)
    return result


def _prune(part: FinetuneConfig, rate: float, before: Path | None, out: Path) -> None:
    """Prune what a round has trained, by the mask `before` it, into the mask `out`."""
    weights = read_weights(checkpoint.newest(run_folder(part)))
    prunable = {name: weights[name] for name in build_model(part).prunable()}
    masks.write(masks.prune(prunable, before and masks.read(before), rate), out)
