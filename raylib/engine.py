"""Two engines, one face: `step`, `save`, `load`. `TorchEngine` is plain PyTorch (DDP with several processes),
`DeepSpeedEngine` shards optimizer state and gradients over the workers (ZeRO-2)."""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylib.distributed import raise_together
from raylib.errors import UserError
from raylib.finite import StepGuard, is_finite
from raylib.optim import LayerRates, OptimConfig, build_optimizer, parameter_groups


class TorchEngine:
    """AdamW on full gradients; bf16 autocast where asked, float32 weights."""

    name = "torch"

    def __init__(
        self,
        objective: nn.Module,
        config: OptimConfig,
        device: torch.device,
        bf16: bool,
        start: Path | None,
        rates: LayerRates | None = None,
        guard: StepGuard | None = None,
    ):
        self.config, self.device, self.bf16, self.rates = config, device, bf16, rates
        self.guard = guard or StepGuard(device)
        self.objective = self.module = objective.to(device)
        self.optimizer = build_optimizer(_groups(objective, config, rates), config)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # layers that are frozen for now get no gradient either
            unused = objective.has_unused_parameters or rates is not None
            self.module = DistributedDataParallel(self.objective, find_unused_parameters=unused)
        if start:
            self._load(start)

    def step(self, batch: dict, step: int, lr: float) -> dict[str, Tensor]:
        """One optimizer step, `step` of the run; skipped where loss, a term or the gradient's norm is not
        finite. Returns the terms of the global batch and the norm, as tensors on the device."""
        for group in self.optimizer.param_groups:
            if set_rate(group, group["params"], self.rates, step, lr):
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, terms = self.module(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.check_loss(loss, terms).backward()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.clip)
        # as GradScaler does it: where `found_inf` is 1, fused AdamW changes nothing, not even its count of
        # steps, and no host has to wait for the device to know
        self.optimizer.found_inf = self.guard.count(step, norm)
        self.optimizer.step()
        return {**terms, "grad_norm": norm}

    def find_not_finite(self) -> str | None:
        """Name the first weight, or tensor of the optimizer, that is not finite on this worker."""
        names = {p: name for name, p in self.objective.named_parameters()}
        state = {
            f"the optimizer's {key} of {names[p]}": value
            for p, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        return _first_not_finite(self.objective.model.state_dict() | state)

    def save(self, folder: Path, rank: int) -> None:
        """Worker 0 writes: without ZeRO the others hold the same. The weights are in `model.safetensors`
        (`fit`)."""
        if rank == 0:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def _load(self, folder: Path) -> None:
        if not (folder / "optimizer.pt").is_file():
            raise UserError(
                f"{folder}: saved by DeepSpeed; resume with runtime=ray, or start a new run from its export"
            )
        self.objective.model.load_state_dict(load_file(folder / "model.safetensors", device=str(self.device)))
        self.optimizer.load_state_dict(
            torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        )
        _require_finite(self, folder)


class DeepSpeedEngine:
    """ZeRO stage 2. A checkpoint from another number of workers is converted (universal checkpoint) while
    loading."""

    name = "deepspeed"

    def __init__(
        self,
        objective: nn.Module,
        config: OptimConfig,
        device: torch.device,
        bf16: bool,
        start: Path | None,
        rates: LayerRates | None = None,
        guard: StepGuard | None = None,
    ):
        deepspeed = _import_deepspeed(device)
        if (
            not dist.is_initialized()
        ):  # one process, without Ray and torchrun: DeepSpeed wants a group all the same
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # Ray and torchrun set it
        self.objective, self.device, self.bf16, self.rates = objective.to(device), device, bf16, rates
        self.guard = guard or StepGuard(device)
        world = dist.get_world_size()
        convert = bool(start) and _saved_world(start) != world
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # unused: the objective divides by global counts itself
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.clip,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
            "steps_per_print": 10**9,
            "checkpoint": {"load_universal": convert},
        }
        groups = _groups(objective, config, rates)
        self.members = [list(group["params"]) for group in groups]  # ZeRO puts flat shards in their place
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.objective,
            optimizer=build_optimizer(groups, config),
            config=settings,
            dist_init_required=False,
        )
        if start:
            self._load(start, convert)

    def step(self, batch: dict, step: int, lr: float) -> dict[str, Tensor]:
        """As `TorchEngine.step`."""
        for i, (group, members) in enumerate(zip(self.optimizer.param_groups, self.members, strict=True)):
            if set_rate(group, members, self.rates, step, lr):
                # its moments are zero, but Adam has counted the frozen steps
                for value in self.optimizer.optimizer.state[
                    self.optimizer.single_partition_of_fp32_groups[i]
                ].values():
                    if isinstance(value, Tensor):
                        value.zero_()
        loss, terms = self.engine(batch)
        self.engine.backward(self.guard.check_loss(loss, terms))
        # float32 weights: nothing changes where the norm is not finite; it says infinite then
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        self.guard.count(step, norm)
        return {**terms, "grad_norm": norm}

    def find_not_finite(self) -> str | None:
        """As `TorchEngine.find_not_finite`, of this worker's shards."""
        inner, shards = self.optimizer.optimizer, self.optimizer.single_partition_of_fp32_groups
        state = {
            f"the optimizer's {key} of group {i}": value
            for i, shard in enumerate(shards)
            for key, value in inner.state.get(shard, {}).items()
        }
        return _first_not_finite(self.objective.model.state_dict() | state)

    def save(self, folder: Path, rank: int) -> None:
        """Every worker writes its own optimizer shard; worker 0 the module too."""
        # the client state is what the conversion to another number of workers asks for
        self.engine.save_checkpoint(str(folder), tag="zero", client_state={"universal_checkpoint_info": {}})

    def _load(self, folder: Path, convert: bool) -> None:
        if not (folder / "zero").is_dir():
            raise UserError(f"{folder}: saved without DeepSpeed; resume with runtime=local")
        if not convert:
            self.engine.load_checkpoint(str(folder), tag="zero")
            _require_finite(self, folder)
            return
        # every worker converts for itself: a shared place would need a lock, and a change of workers is rare
        with tempfile.TemporaryDirectory(prefix="polyglance-universal-") as scratch:
            universal = Path(scratch) / "zero_universal"
            command = [
                sys.executable,
                "-m",
                "deepspeed.checkpoint.ds_to_universal",
                "--input_folder",
                folder / "zero",
                "--output_folder",
                universal,
                "--num_extract_workers",
                "1",
                "--num_merge_workers",
                "1",
            ]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(
                    f"converting {folder} to {dist.get_world_size()} workers failed:\n{done.stderr[-2000:]}"
                )
            (Path(scratch) / "latest_universal").write_text("zero_universal")
            self.engine.load_checkpoint(scratch)
        dist.barrier()
        _require_finite(self, folder)


def _first_not_finite(tensors: dict) -> str | None:
    return next(
        (name for name, value in tensors.items() if isinstance(value, Tensor) and not is_finite(value)), None
    )


def _require_finite(engine: "TorchEngine | DeepSpeedEngine", folder: Path) -> None:
    """Refuse a checkpoint, on all workers together, whose weights or optimizer state are not finite on
    one."""
    found = engine.find_not_finite()
    advice = "go on from an older checkpoint with resume=step_NNNNNN"
    raise_together(found and f"{folder}: {found} is not finite (NaN or infinite); {advice}", UserError)


def _groups(objective: nn.Module, config: OptimConfig, rates: LayerRates | None) -> list[dict]:
    """AdamW groups of the trainable parameters; with `rates` one or two a depth."""
    depth_of = rates and (lambda name: objective.model.depth_of(name.removeprefix("model.")))
    return parameter_groups(objective, config.weight_decay, depth_of)


def set_rate(
    group: dict, members: list[nn.Parameter], rates: LayerRates | None, step: int, lr: float
) -> bool:
    """Set the rate of an AdamW group for this step; at 0 its members get no gradient, and so no decay.
    Returns whether it thaws now, after a step in which it was frozen: its optimizer state must then start
    anew, as if it were new to training.

    Frozen is a factor of 0, never merely a rate of 0, at which warm-up starts: moments would fill all the
    same. All is a function of the step, so that a resumed run thaws as the uninterrupted one does.
    """
    factor = rates(group["depth"], step) if rates else 1.0
    group["lr"] = lr * factor
    if rates:
        for member in members:
            member.requires_grad_(factor > 0)
    return bool(rates and factor > 0 and step > 0 and rates(group["depth"], step - 1) == 0)


def _saved_world(folder: Path) -> int:
    return len(list((folder / "zero").glob("*zero_pp_rank_*_optim_states.pt")))


def _import_deepspeed(device: torch.device):
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "deepspeed is not installed; install the pinned requirements, or run with runtime=local"
        ) from None
    import deepspeed.ops

    # DeepSpeed 0.19.8 calls what torch 2.13 has renamed, once a step
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if device.type == "cpu":
        # its shared-memory extension compiles for 40 s and hangs on a stale lock; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
