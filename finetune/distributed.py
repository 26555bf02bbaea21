"""Processes and strategies: who runs where, and how weights, gradients and moments are spread.

A strategy hides whether weights are whole on each rank (DDP) or in pieces (ZeRO) behind one idea: each rank
owns `Shard`s, float32 views of what its optimizer updates. Averaging, checkpoints and restores work on shards
and name whole parameters only in files, so that a file doesn't know which strategy wrote it.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune import UserError

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHER_ELEMENTS = 1 << 25  # 128 MiB of float32 on the device while parameters are gathered


# --- processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, number `local_rank` on its machine."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Run on rank 0 alone; every rank gets its result, or raises its error: nobody is left waiting."""
        result: T | None = None
        error: BaseException | None = None
        if self.is_main:
            try:
                result = function()
            except (UserError, OSError) as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            error.everywhere = True  # type: ignore[attr-defined] # one rank's line is enough
            raise error
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def start(device: str, *, uses_deepspeed: bool) -> World:
    """Join the other processes, and refuse to run unless every layer sees the same number of them.

    Args:
        device: `auto`, `cpu` or `cuda`.
        uses_deepspeed: the run's strategy is a ZeRO stage. It needs a process group even for one process.

    Raises:
        UserError: no such device; a launch that says nothing of ranks, or asks for DeepSpeed where the strategy
            doesn't; layers that disagree.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"train.device={device} is not known: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no GPU; use train.device=cpu or auto")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and not uses_deepspeed:
        raise UserError(
            "accelerate was launched with DeepSpeed, which strategy=ddp would ignore: add strategy=zero2 (or "
            "zero1, zero3), or launch with launchers/accelerate/one_machine.yaml"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed takes a GPU that we were told to leave alone
    launched = "RANK" in os.environ
    if not launched and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ:
        raise UserError(
            f"Slurm started {os.environ['SLURM_NTASKS']} tasks, but RANK is not set, so each would train alone; "
            "start through torchrun or accelerate launch, one task a node"
        )
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank}, but this machine has {torch.cuda.device_count()} GPUs; "
                "start one process a GPU"
            )
        torch.cuda.set_device(local_rank)
    torch_device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if (size > 1 or uses_deepspeed) and not dist.is_initialized():
        if not launched:
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(_free_port())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(minutes=30),
            device_id=torch_device if on_gpu else None,
        )
    world = World(rank, size, local_rank, torch_device)
    if size > 1:
        _agree(world)
    return world


def _agree(world: World) -> None:
    from accelerate import PartialState

    # Told of the CPU, Accelerate counts gloo's ranks; left to guess on a machine without a GPU it reports one.
    state = PartialState(cpu=world.device.type == "cpu")
    require_agreement(
        {
            "environment": (world.rank, world.size),
            "torch.distributed": (dist.get_rank(), dist.get_world_size()),
            "accelerate": (state.process_index, state.num_processes),
        }
    )


def require_agreement(layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a run whose layers disagree on (rank, world size): every rank would read the same data.

    Raises:
        UserError: with what each layer says.
    """
    if len(set(layers.values())) > 1:
        said = ", ".join(f"{name} says rank {rank} of {size}" for name, (rank, size) in layers.items())
        raise UserError(
            f"the layers disagree on who is who: {said}; start with a file of launchers/accelerate/ or torchrun"
        )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


_LEFT: list[Any] = []  # process groups, kept to the end of the process


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        # Were DDP's reducer the group's last owner, it would wait for gloo's thread with the GIL held, which that
        # thread may want for the last broadcast's tensors: seen once, after a whole run. Python's own reference
        # lets go of the GIL.
        _LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


# --- strategies -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParamGroup:
    """Trainable parameters with a learning rate of `lr_ratio` times the schedule's."""

    name: str
    parameters: dict[str, nn.Parameter]
    lr_ratio: float = 1.0


@dataclass(frozen=True)
class AdamW:
    """AdamW's settings (Loshchilov & Hutter 2019, arXiv 1711.05101), without the learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2


@dataclass
class Shard:
    """What this rank's optimizer updates of one parameter.

    Attributes:
        name: of the parameter in the wrapped module; shape: of the whole parameter.
        start: first flat element that this rank owns.
        master: float32; the whole parameter in its own shape, or a flat view of `master.numel()` elements.
        key: the tensor that the optimizer files its state under; offset: where `master` lies in it.
        is_whole: every rank owns the whole parameter, and `master` has its shape.
    """

    name: str
    shape: torch.Size
    start: int
    master: Tensor
    key: Tensor
    offset: int
    is_whole: bool = False

    def view_of(self, like_key: Tensor) -> Tensor:
        """The part of a tensor shaped as `key` (a moment, say) that belongs to this parameter."""
        return like_key if self.is_whole else like_key.narrow(0, self.offset, self.master.numel())


@dataclass(frozen=True)
class StepStats:
    """`grad_norm`: before clipping, float32 scalar on the device; not finite when the step was skipped."""

    grad_norm: Tensor


class Strategy(ABC):
    """Runs forward and backward passes of one module and steps its optimizer, over all ranks."""

    world: World
    module: nn.Module  # the module as given: names of parameters are its own
    optimizer: torch.optim.Optimizer
    shards: list[Shard]

    @abstractmethod
    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            args: of the module's forward, which returns a loss for each sample.
            global_batch: samples in this step over all ranks and micro-batches; gradients become the mean.
            last: the step's last micro-batch, after which gradients are reduced.

        Returns:
            The sum of the samples' losses, float32, on the device.
        """

    @abstractmethod
    def step(self, lr: float) -> StepStats:
        """Clip, update unless a gradient anywhere is not finite, and zero the gradients."""

    @abstractmethod
    def refresh(self) -> None:
        """Carry changed masters into the weights that forward passes use. Collective."""

    @abstractmethod
    def __call__(self, *args: Any) -> Tensor:
        """A forward pass without gradients. Collective under ZeRO-3: all ranks call with equal shapes."""

    @abstractmethod
    def scaler_state(self) -> dict[str, float]:
        """State of the fp16 loss scale; empty for other precisions."""

    @abstractmethod
    def load_scaler_state(self, state: Mapping[str, float]) -> None: ...

    def moments(self, kind: str) -> list[Tensor]:
        """One of `MOMENTS` for each shard."""
        return [shard.view_of(self.optimizer.state[shard.key][kind]) for shard in self.shards]

    @property
    def steps_taken(self) -> int:
        """Optimizer steps so far; skipped ones don't count (AdamW's bias correction depends on it)."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    def set_steps_taken(self, steps: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)

    @contextlib.contextmanager
    def evaluating(self, average: Sequence[Tensor] | None) -> Iterator[None]:
        """Evaluation mode, with `average` (one tensor a shard) in place of the weights. Collective."""
        self._swap(average)
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            self._swap(average)

    def _swap(self, average: Sequence[Tensor] | None) -> None:
        if average is None:
            return
        with torch.no_grad():
            for shard, other in zip(self.shards, average, strict=True):
                kept = shard.master.clone()
                shard.master.copy_(other)
                other.copy_(kept)
        self.refresh()

    def gather(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole parameters by name from one tensor a shard: float32 on the CPU, on rank 0; elsewhere empty.

        Collective where a parameter lies in pieces; device memory stays bounded.
        """
        whole: dict[str, Tensor] = {}
        pieces: list[tuple[Shard, Tensor]] = []
        for shard, tensor in zip(self.shards, tensors, strict=True):
            if shard.is_whole:
                if self.world.is_main:
                    whole[shard.name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            else:
                pieces.append((shard, tensor))
        for group in _groups_of(pieces, _GATHER_ELEMENTS):
            sizes = [math.prod(shard.shape) for shard, _ in group]
            flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self.world.device)
            for (shard, tensor), part in zip(group, flat.split(sizes), strict=True):
                part[shard.start : shard.start + tensor.numel()].copy_(tensor)
            if self.world.size > 1:
                dist.reduce(flat, dst=0)  # each element is owned once: the others add zeros
            if self.world.is_main:
                host = flat.cpu()
                for (shard, _), part in zip(group, host.split(sizes), strict=True):
                    whole[shard.name] = part.view(shard.shape).clone()
        return whole

    @torch.no_grad()
    def scatter_(self, tensors: Sequence[Tensor], whole: Callable[[str], Tensor]) -> None:
        """Fill one tensor a shard from whole parameters: the reverse of `gather`, read on every rank."""
        for shard, tensor in zip(self.shards, tensors, strict=True):
            source = whole(shard.name)
            if source.shape != shard.shape:
                raise UserError(
                    f"{shard.name} is {list(source.shape)} in the checkpoint, {list(shard.shape)} in the model: "
                    "put model.* back as it was or choose another run.dir"
                )
            if not shard.is_whole:
                source = source.reshape(-1)[shard.start : shard.start + tensor.numel()]
            tensor.copy_(source)

    def _start_adamw(self, keys: Sequence[Tensor]) -> None:
        """Make AdamW's state now, so that fresh and resumed runs go the same way through its code."""
        for key in keys:
            # The fused optimizer, which `_make_adamw` makes, counts steps on the parameter's device.
            step = torch.zeros((), dtype=torch.float32, device=key.device)
            moments = {kind: torch.zeros_like(key.detach()) for kind in MOMENTS}
            self.optimizer.state[key] = {"step": step, **moments}

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]


def _groups_of(pieces: Sequence[tuple[Shard, Tensor]], limit: int) -> Iterator[list[tuple[Shard, Tensor]]]:
    group: list[tuple[Shard, Tensor]] = []
    elements = 0
    for shard, tensor in pieces:
        size = math.prod(shard.shape)
        if group and elements + size > limit:
            yield group
            group, elements = [], 0
        group.append((shard, tensor))
        elements += size
    if group:
        yield group


def _make_adamw(groups: Sequence[ParamGroup], settings: AdamW) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "lr_ratio": group.lr_ratio} for group in groups],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class DataParallel(Strategy):
    """Whole weights on every rank, in float32; gradients are averaged by torch's DDP, passes run in autocast."""

    def __init__(
        self,
        world: World,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        adamw: AdamW,
        max_grad_norm: float,
        precision: str,
    ) -> None:
        self.world, self.module, self.max_grad_norm = world, module, max_grad_norm
        module.to(world.device)
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.wrapped: nn.Module = module
        if world.size > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(
                module,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.optimizer = _make_adamw(groups, adamw)
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self._start_adamw(list(self.parameters.values()))
        self.shards = [Shard(n, p.shape, 0, p.data, p, 0, is_whole=True) for n, p in self.parameters.items()]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        synced = last or self.world.size == 1
        with contextlib.nullcontext() if synced else self.wrapped.no_sync():  # type: ignore[operator]
            with self._autocast():
                loss_B = self.wrapped(*args)
            total = loss_B.float().sum()
            # DDP averages over ranks; what is wanted is the sum over all samples by their number.
            self.scaler.scale(total * (self.world.size / global_batch)).backward()
        return total.detach()

    def step(self, lr: float) -> StepStats:
        self._set_lr(lr)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused kernel skips the update where this flag is set, without asking the host. The norm is of
            # reduced gradients, so all ranks see the same one.
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(norm.float())

    def refresh(self) -> None:
        """Masters are the weights: nothing to do."""

    @torch.no_grad()
    def __call__(self, *args: Any) -> Tensor:
        with self._autocast():
            return self.module(*args)

    def scaler_state(self) -> dict[str, float]:
        return dict(self.scaler.state_dict())

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))


class ZeRO(Strategy):
    """DeepSpeed's ZeRO stages 1 to 3 (Rajbhandari et al. 2020, arXiv 1910.02054).

    Weights are kept in the working precision, with float32 masters and moments in pieces over the ranks.
    DeepSpeed moves and steps; which part of which parameter a rank holds is read from its mappings, so that
    files and averages need none of its own formats.
    """

    def __init__(
        self,
        world: World,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        adamw: AdamW,
        max_grad_norm: float,
        precision: str,
        stage: int,
        offload_optimizer: bool,
        offload_parameters: bool,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        self.world, self.module, self.stage = world, module, stage
        on_gpu = world.device.type == "cuda"
        names = {id(p): name for group in groups for name, p in group.parameters.items()}
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
        }
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its extension would be compiled at the first start
            "steps_per_print": 1 << 62,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which of its extensions was built
            self.engine, _, _, _ = deepspeed.initialize(
                model=module, optimizer=_make_adamw(groups, adamw), config=config, dist_init_required=False
            )
        require_agreement(
            {
                "torch.distributed": (world.rank, world.size),
                "DeepSpeed": (self.engine.global_rank, self.engine.dp_world_size),
            }
        )
        self.zero = self.engine.optimizer
        self.optimizer = self.zero.optimizer
        keys = self.zero.fp32_partitioned_groups_flat if stage == 3 else self.zero.single_partition_of_fp32_groups
        self._start_adamw(keys)
        parameters = {names[id(p)]: p for p in module.parameters() if id(p) in names}
        self.shards = [
            self._stage3_shard(name, p) if stage == 3 else self._stage12_shard(name, p)
            for name, p in parameters.items()
        ]

    def _stage12_shard(self, name: str, parameter: Any) -> Shard:
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank owns nothing of it
            nothing = torch.empty(0, dtype=torch.float32, device=self.world.device)
            return Shard(name, parameter.shape, 0, nothing, self.zero.single_partition_of_fp32_groups[0], 0)
        key = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        where = mapping.hp_fragment_address
        return Shard(
            name,
            parameter.shape,
            mapping.lp_fragment_address.start,
            key.data.narrow(0, where.start, where.numel),
            key,
            where.start,
        )

    def _stage3_shard(self, name: str, parameter: Any) -> Shard:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        key = self.zero.fp32_partitioned_groups_flat[group]
        piece = parameter.partition_numel()
        start = min(self.world.rank * piece, parameter.ds_numel)
        length = min(piece, parameter.ds_numel - start)  # the last pieces may be padding
        return Shard(name, parameter.ds_shape, start, key.data.narrow(0, offset, length), key, offset)

    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss_B = self.engine(*args)
        total = loss_B.float().sum()
        self.engine.backward(total * (self.world.size / global_batch), scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch
        return total.detach()

    def step(self, lr: float) -> StepStats:
        self._set_lr(lr)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepStats(torch.as_tensor(norm, dtype=torch.float32, device=self.world.device))

    @torch.no_grad()
    def refresh(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for index in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        if self.zero.persistent_parameters:
            # Small parameters stay gathered between steps: drop the old values, or they would be kept.
            self.zero._partition_all_parameters()
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @torch.no_grad()
    def __call__(self, *args: Any) -> Tensor:
        return self.engine(*args)

    def scaler_state(self) -> dict[str, float]:
        scaler = self.zero.loss_scaler
        if not scaler.dynamic:
            return {}
        fields = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in fields}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        for name, value in state.items():
            if hasattr(self.zero.loss_scaler, name):
                setattr(self.zero.loss_scaler, name, value)
