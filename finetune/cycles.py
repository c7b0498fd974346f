"""Iterative magnitude pruning (paper 0, Algorithm 1): train, prune, rewind, again. Each round is a training of its own in
RUN/round_N, cut short after some epochs of the run's own schedule; RUN/masks/round_N.safetensors is what it leaves.

A round whose mask is there is not done again, one that was interrupted goes on: so the cycle resumes wherever it stopped.
"""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from finetune import masks
from finetune.build import build_model
from finetune.config import FinetuneConfig
from finetune.worker import Work
from raylib import checkpoint
from raylib.collective import world_size
from raylib.launch import launch, leads, open_run, run_folder
from raylib.model.folder import read_weights
from raylib.tune.reporter import Reporter


def find_mask(
    config: FinetuneConfig, language: str | None, reporter: Reporter | None = None
) -> tuple[FinetuneConfig, dict[str, Any]]:
    """The mask that `strategies.sparse` asks for.

    Returns:
        (the config of the training that follows: with the mask, and code-mixed where that is asked for,
        {"finished", "seconds", "steps" and "skipped_steps" of all rounds, "sparsity": of the prunable weights and of the whole
        model}).
    """
    sparse, mixing = config.strategies.sparse, config.strategies.code_mixing
    spent, mask_file = {"seconds": 0.0, "steps": 0, "skipped_steps": 0}, Path(sparse.mask) if sparse.mask else None
    for number in range(1, sparse.rounds + 1) if mask_file is None else ():
        part = _with(config, None, mixing and mixing.stages in ("rounds", "both"))
        part = part.model_copy(update={"name": f"round_{number}", "runs": str(run_folder(config)), "resume": "newest"})
        coming = run_folder(config) / "masks" / f"round_{number}.safetensors"
        start = None if sparse.rewind == "initial" or number == 1 else checkpoint.newest(Path(part.runs) / f"round_{number - 1}")
        told = reporter and reporter.after((number - 1) * sparse.epochs)
        result = _round(Work(language, sparse.epochs, start), part, mask_file, told)
        spent = {name: value + result.get(name, 0) for name, value in spent.items()}  # an older part.json has no skipped_steps
        if not result["finished"]:
            return part, {**result, **spent}
        if leads(config) and not coming.is_file():
            _prune(part, sparse.rate, mask_file, coming)
        if world_size() > 1:
            dist.barrier()  # the others read what the first has written
        mask_file = coming
    ready = _with(config, mask_file, mixing and mixing.stages in ("last", "both"))
    parameters = sum(p.numel() for p in build_model(config).parameters())
    return ready, {"finished": True, **spent, "sparsity": masks.sparsity(masks.read(mask_file), parameters)}


def _with(config: FinetuneConfig, mask: Path | None, mixed: bool) -> FinetuneConfig:
    """`config` with the mask, and without code-mixing unless it is `mixed`."""
    strategies = config.strategies
    sparse = strategies.sparse.model_copy(update={"mask": mask and str(mask)})
    changed = {"sparse": sparse, "code_mixing": strategies.code_mixing if mixed else None}
    return config.model_copy(update={"strategies": strategies.model_copy(update=changed)})


def _round(work: Work, part: FinetuneConfig, mask: Path | None, reporter: Reporter | None) -> dict[str, Any]:
    """Train a round under `mask`, or say what it came to before. The mask's place is no setting of the round: a run may move."""
    done = run_folder(part) / "part.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    if leads(part):
        open_run(part)
    result = launch(work, _with(part, mask, True), run_folder(part), reporter)
    if result["finished"] and leads(part):
        checkpoint.write_atomically(done, json.dumps(result, allow_nan=False))
    return result


def _prune(part: FinetuneConfig, rate: float, before: Path | None, out: Path) -> None:
    """Prune what a round has trained, by the mask `before` it, into the mask `out`."""
    weights = read_weights(checkpoint.newest(run_folder(part)))
    prunable = {name: weights[name] for name in build_model(part).prunable()}
    masks.write(masks.prune(prunable, before and masks.read(before), rate), out)
