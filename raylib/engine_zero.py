"""`DeepSpeedEngine` shards optimizer state and gradients over the workers (ZeRO stage 2)."""

import os
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from raylib.distributed import keep_to_loopback, world_size
from raylib.engine import BUCKET_MB, Engine, build_optimizer, set_rate, step_count
from raylib.engine_state import MOMENTS, EngineState, Piece, StoredState, make_state
from raylib.errors import UserError

MAX_OWNERS = 8  # of a bucket's parts that are reduced to each by itself


class DeepSpeedEngine(Engine):
    """ZeRO stage 2: each group of parameters is laid end to end, and each worker updates its part of it."""

    name = "deepspeed"
    waits = True

    def step(self, batch: dict, step: int, lr: float) -> dict[str, Tensor]:
        self.before_update()
        for i, (group, members) in enumerate(zip(self.optimizer.param_groups, self.members, strict=True)):
            if set_rate(group, members, self.rates, step, lr):
                # its moments are zero, but Adam has counted the frozen steps
                shard = self.optimizer.single_partition_of_fp32_groups[i]
                for value in self.optimizer.optimizer.state[shard].values():
                    if isinstance(value, Tensor):
                        value.zero_()
        if self.rates:
            self.objective.train()  # as of `TorchEngine.step`
        loss, terms = self.engine(batch)
        self.engine.backward(self.guard.check_loss(loss, terms))
        # float32 weights: nothing changes where the norm is not finite; it says infinite then
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        self.guard.count(step, norm)
        return {**terms, "grad_norm": norm}

    def state(self) -> EngineState:
        pieces, steps = [], {}
        for members, state in zip(self.members, self._group_states(), strict=True):
            if not state:  # no step has been taken
                continue
            count = int(state["step"])
            for parameter in members:
                name = self.names[parameter]
                steps[name] = count
                if (place := Fragment.of(parameter)) is not None:
                    pieces += [
                        Piece(kind, name, parameter.shape, place.start, state[kind][place.own])
                        for kind in MOMENTS
                    ]
        return make_state(chain(pieces, self._shared_pieces()), steps, world_size())

    def _build(self) -> None:
        deepspeed = _import_deepspeed(self.device)
        from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

        if not dist.is_initialized():  # one process, without Ray and torchrun: it wants a group all the same
            keep_to_loopback()
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                store=dist.HashStore(),
                rank=0,
                world_size=1,
            )
        os.environ.setdefault("LOCAL_RANK", "0")  # Ray and torchrun set it
        groups = self._groups()
        num_elements = sum(p.numel() for group in groups for p in group["params"])
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # unused: the objective divides by global counts itself
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.clip or 0.0,  # 0: none
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

    def _load_moments(self, stored: StoredState) -> None:
        shards = self.optimizer.single_partition_of_fp32_groups
        for members, shard in zip(self.members, shards, strict=True):
            named = [(p, self.names[p]) for p in members if self.names[p] in stored.steps]
            if not named:  # no step has been taken, or all have been frozen so far
                continue
            moments = {kind: torch.zeros_like(shard, requires_grad=False) for kind in MOMENTS}
            for parameter, name in named:
                if (place := Fragment.of(parameter)) is not None:
                    for kind, moment in moments.items():
                        values = stored.read(kind, name, parameter.shape, place.start, place.stop)
                        moment[place.own].copy_(values)
            # a group has one count here. Only where PyTorch's engine left out parameters that had no gradient
            # in some steps, which ZeRO takes for one of 0, have its parameters several
            count = max(stored.steps[name] for _, name in named)
            self.optimizer.optimizer.state[shard] = {"step": step_count(count, shard), **moments}

    def _group_states(self) -> list[dict[str, Tensor]]:
        """AdamW's state of this worker's part of each group; {} before the first step."""
        state = self.optimizer.optimizer.state
        return [state.get(shard, {}) for shard in self.optimizer.single_partition_of_fp32_groups]


class Fragment(NamedTuple):
    """The part of a parameter that this worker updates: its flat elements from `start` to `stop`, which are
    `own` of the worker's part of the group."""

    start: int
    stop: int
    own: slice

    @classmethod
    def of(cls, parameter: Any) -> "Fragment | None":
        """Return the fragment of a parameter; None: other workers have all of it."""
        mapping = parameter._hp_mapping  # DeepSpeed's, made when its optimizer is
        if mapping is None:
            return None
        whole, own = mapping.lp_fragment_address, mapping.hp_fragment_address
        return cls(whole.start, whole.start + whole.numel, slice(own.start, own.start + own.numel))


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
