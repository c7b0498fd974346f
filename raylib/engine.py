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

from raylib.errors import UserError
from raylib.optim import OptimConfig, build_optimizer, parameter_groups


class TorchEngine:
    """AdamW on full gradients; bf16 autocast where asked, float32 weights."""

    name = "torch"

    def __init__(self, objective: nn.Module, config: OptimConfig, device: torch.device, bf16: bool, start: Path | None):
        self.config, self.device, self.bf16 = config, device, bf16
        self.objective = self.module = objective.to(device)
        self.optimizer = build_optimizer(parameter_groups(objective, config.weight_decay), config)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.module = DistributedDataParallel(self.objective, find_unused_parameters=objective.partial)
        if start:
            self._load(start)

    def step(self, batch: dict, lr: float) -> dict[str, Tensor]:
        """One optimizer step. Returns the terms of the global batch and the gradient's norm, as tensors on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, terms = self.module(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.clip)
        self.optimizer.step()
        return {**terms, "grad_norm": norm}

    def save(self, folder: Path, rank: int) -> None:
        """Worker 0 writes: without ZeRO the others hold the same. The weights are in `model.safetensors` (`fit`)."""
        if rank == 0:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def _load(self, folder: Path) -> None:
        if not (folder / "optimizer.pt").is_file():
            raise UserError(f"{folder}: saved by DeepSpeed; resume with runtime=ray, or start a new run from its export")
        self.objective.model.load_state_dict(load_file(folder / "model.safetensors", device=str(self.device)))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True))


class DeepSpeedEngine:
    """ZeRO stage 2. A checkpoint from another number of workers is converted (universal checkpoint) while loading."""

    name = "deepspeed"

    def __init__(self, objective: nn.Module, config: OptimConfig, device: torch.device, bf16: bool, start: Path | None):
        deepspeed = _import_deepspeed(device)
        self.objective, self.device = objective.to(device), device
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
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.objective,
            optimizer=build_optimizer(parameter_groups(objective, config.weight_decay), config),
            config=settings,
            dist_init_required=False,
        )
        if start:
            self._load(start, convert)

    def step(self, batch: dict, lr: float) -> dict[str, Tensor]:
        """As `TorchEngine.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, terms = self.engine(batch)
        self.engine.backward(loss)
        self.engine.step()
        return {**terms, "grad_norm": torch.as_tensor(self.engine.get_global_grad_norm())}

    def save(self, folder: Path, rank: int) -> None:
        """Every worker writes its own optimizer shard; worker 0 the module too."""
        # the client state is what the conversion to another number of workers asks for
        self.engine.save_checkpoint(str(folder), tag="zero", client_state={"universal_checkpoint_info": {}})

    def _load(self, folder: Path, convert: bool) -> None:
        if not (folder / "zero").is_dir():
            raise UserError(f"{folder}: saved without DeepSpeed; resume with runtime=local")
        if not convert:
            self.engine.load_checkpoint(str(folder), tag="zero")
            return
        # every worker converts for itself: a shared place would need a lock, and a change of workers is rare
        with tempfile.TemporaryDirectory(prefix="polyglance-universal-") as scratch:
            universal = Path(scratch) / "zero_universal"
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder / "zero",
                       "--output_folder", universal, "--num_extract_workers", "1", "--num_merge_workers", "1"]  # fmt: skip
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"converting {folder} to {dist.get_world_size()} workers failed:\n{done.stderr[-2000:]}")
            (Path(scratch) / "latest_universal").write_text("zero_universal")
            self.engine.load_checkpoint(scratch)
        dist.barrier()


def _saved_world(folder: Path) -> int:
    return len(list((folder / "zero").glob("*zero_pp_rank_*_optim_states.pt")))


def _import_deepspeed(device: torch.device):
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError("deepspeed is not installed; install the pinned requirements, or run with runtime=local") from None
    import deepspeed.ops

    # DeepSpeed 0.19.8 calls what torch 2.13 has renamed, once a step
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if device.type == "cpu":
        # its shared-memory extension compiles for 40 s and hangs on a stale lock; gloo serves (RAY.md)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
