"""`DeepSpeedEngine` shards optimizer state and gradients over the workers (ZeRO stage 2)."""

import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylib.distributed import world_size
from raylib.engine import BUCKET_MB, Engine, build_optimizer, set_rate
from raylib.errors import UserError

MAX_OWNERS = 8  # of a bucket's parts that are reduced to each by itself


class DeepSpeedEngine(Engine):
    """ZeRO stage 2. A checkpoint from another number of workers is converted (universal checkpoint) while
    loading."""

    name = "deepspeed"
    waits = True

    def step(self, batch: dict, step: int, lr: float) -> dict[str, Tensor]:
        for i, (group, members) in enumerate(zip(self.optimizer.param_groups, self.members, strict=True)):
            if set_rate(group, members, self.rates, step, lr):
                # its moments are zero, but Adam has counted the frozen steps
                shard = self.optimizer.single_partition_of_fp32_groups[i]
                for value in self.optimizer.optimizer.state[shard].values():
                    if isinstance(value, Tensor):
                        value.zero_()
        loss, terms = self.engine(batch)
        self.engine.backward(self.guard.check_loss(loss, terms))
        # float32 weights: nothing changes where the norm is not finite; it says infinite then
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        self.guard.count(step, norm)
        return {**terms, "grad_norm": norm}

    def save(self, folder: Path, rank: int) -> None:
        # the client state is what the conversion to another number of workers asks for
        self.engine.save_checkpoint(str(folder), tag="zero", client_state={"universal_checkpoint_info": {}})

    def _build(self, start: Path | None) -> None:
        deepspeed = _import_deepspeed(self.device)
        from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

        if not dist.is_initialized():  # one process, without Ray and torchrun: it wants a group all the same
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                store=dist.HashStore(),
                rank=0,
                world_size=1,
            )
        os.environ.setdefault("LOCAL_RANK", "0")  # Ray and torchrun set it
        # ZeRO's shards lie in files of (worker, part); another number of workers cuts them elsewhere, which
        # DeepSpeed must know before it is built
        states = "zero/*zero_pp_rank_*_optim_states.pt"  # one a worker
        self.convert = start is not None and len(list(start.glob(states))) != world_size()
        groups = self._groups()
        num_elements = sum(p.numel() for group in groups for p in group["params"])
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # unused: the objective divides by global counts itself
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.clip,
            "zero_optimization": zero_settings(num_elements, world_size()),
            "communication_data_type": "bf16" if self.gradient_dtype == "bfloat16" else "fp32",
            "zero_allow_untested_optimizer": True,
            # linear layers' gradients would travel in bf16 under autocast, whatever `communication_data_type`
            "torch_autocast": {
                "enabled": self.bf16,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 10**9,
            "checkpoint": {"load_universal": self.convert},
        }
        self.members = [list(group["params"]) for group in groups]  # ZeRO puts flat shards in their place
        if self.gradient_dtype == "bfloat16":
            for parameter in chain(*self.members):
                setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)  # read under autocast
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.objective,
            # PyTorch's own: DeepSpeed warns of any class that it does not list
            optimizer=build_optimizer(groups, self.config, torch.optim.AdamW),
            config=settings,
            dist_init_required=False,
        )

    def _load(self, folder: Path) -> None:
        if not (folder / "zero").is_dir():
            raise UserError(f"{folder}: saved without DeepSpeed; resume with runtime=local")
        if not self.convert:
            self.engine.load_checkpoint(str(folder), tag="zero")
            return
        # every worker converts for itself: a shared place would need a lock, and a change of workers is rare
        with tempfile.TemporaryDirectory(prefix="polyglance-universal-") as scratch:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += [f"--input_folder={folder / 'zero'}", f"--output_folder={scratch}/zero_universal"]
            command += ["--num_extract_workers=1", "--num_merge_workers=1"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(
                    f"converting {folder} to {world_size()} workers failed:\n{done.stderr[-2000:]}"
                )
            Path(scratch, "latest_universal").write_text("zero_universal")
            self.engine.load_checkpoint(scratch)
        dist.barrier()

    def _named_state(self) -> dict[str, Any]:
        inner, shards = self.optimizer.optimizer, self.optimizer.single_partition_of_fp32_groups
        return {
            f"the optimizer's {key} of group {i}": value
            for i, shard in enumerate(shards)
            for key, value in inner.state.get(shard, {}).items()
        }


def zero_settings(num_elements: int, workers: int) -> dict[str, Any]:
    """Return DeepSpeed's "zero_optimization" for so many trainable parameters. Its own buckets of 5e8
    elements would hold any model of ours whole: nothing would travel before backward has ended, and each of
    its buffers would take 2 GB."""
    bucket = min(BUCKET_MB * 2**20 // 4, num_elements)
    return {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": num_elements + num_elements % 2,  # it wants an even number
        # one reduction for the owner of each part of a bucket moves half of what an all-reduce does, in as
        # many calls as a bucket has owners
        "use_multi_rank_bucket_allreduce": bucket * workers > MAX_OWNERS * num_elements,
    }


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "deepspeed is not installed; install the pinned requirements, or run with runtime=local"
        ) from None
    import deepspeed.ops

    if device.type == "cpu":
        # its shared-memory extension compiles for 40 s and hangs on a stale lock; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
