"""What every strategy is: how weights, gradients and moments are spread.

A strategy hides whether weights are whole on each rank (DDP) or in pieces (ZeRO) behind one idea: each rank
owns `Shard`s, float32 views of what its optimizer updates. Averaging, checkpoints and restores work on shards
and name whole parameters only in files, so that a file doesn't know which strategy wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune import UserError
from finetune.distributed import optimizers
from finetune.distributed.graphs import Graphs
from finetune.distributed.optimizers import OptimizerSettings
from finetune.distributed.world import World

_GATHER_ELEMENTS = 1 << 25  # 128 MiB of float32 on the device while parameters are put together or spread


@dataclass
class Shard:
    """What this rank's optimizer updates of one parameter.

    Attributes:
        name: of the parameter in the wrapped module; shape: of the whole parameter, as it is stored.
        start: first flat element that this rank owns.
        master: float32; the whole parameter in its own shape, or a flat view of `master.numel()` elements.
        key: the tensor that the optimizer files its state under; offset: where `master` lies in it.
        is_whole: every rank owns the whole parameter, and `master` has its shape.
        is_channels_last: it is stored as [O, kh, kw, I] and stands in files as [O, I, kh, kw].
    """

    name: str
    shape: torch.Size
    start: int
    master: Tensor
    key: Tensor
    offset: int
    is_whole: bool = False
    is_channels_last: bool = False

    @property
    def file_shape(self) -> torch.Size:
        """Of the whole parameter in files."""
        if not self.is_channels_last:
            return self.shape
        out, height, width, channels = self.shape
        return torch.Size((out, channels, height, width))

    def to_file(self, whole: Tensor) -> Tensor:
        """A whole tensor as stored (`shape`) to the form of files (`file_shape`), contiguous."""
        return (whole.permute(0, 3, 1, 2) if self.is_channels_last else whole).contiguous()

    def from_file(self, whole: Tensor) -> Tensor:
        """The reverse of `to_file`: `file_shape` to `shape`, contiguous."""
        return (whole.permute(0, 2, 3, 1) if self.is_channels_last else whole).contiguous()

    def piece_of(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor as stored, in the form of `master`."""
        if self.is_whole:
            return whole
        return whole.reshape(-1)[self.start : self.start + self.master.numel()]

    def view_of(self, like_key: Tensor) -> Tensor:
        """The part of a tensor shaped as `key` (a moment, say) that belongs to this parameter."""
        return like_key if self.is_whole else like_key.narrow(0, self.offset, self.master.numel())


@dataclass(frozen=True)
class Wanted:
    """`tensor`: this rank's part of shard number `index`, of its average or moment; `owner`: who gets the whole."""

    index: int
    tensor: Tensor
    owner: int


class Source(Protocol):
    """Whole parameters by name."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (dimension 0), float32 on the CPU; called by one thread at a time."""
        ...


@dataclass(frozen=True)
class StepStats:
    """`grad_norm`: before clipping, float32 scalar on the device; not finite when the step was skipped."""

    grad_norm: Tensor


class Strategy(ABC):
    """Runs forward and backward passes of one module and steps its optimizer, over all ranks."""

    world: World
    module: nn.Module  # the module as given: names of parameters are its own
    optimizer: torch.optim.Optimizer
    settings: OptimizerSettings
    shards: list[Shard]
    graphs: Graphs | None = None

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

    def settle(self) -> None:  # noqa: B027  # most have nothing to wait for
        """Let the device wait for weights that are still on their way: before anything but passes reads them."""

    @abstractmethod
    def __call__(self, *args: Any) -> Any:
        """A forward pass without gradients. Collective under ZeRO-3: all ranks call with equal shapes."""

    @abstractmethod
    def scaler_state(self) -> dict[str, float]:
        """Of fp16: the loss `scale`, `good_steps` since it last fell, under ZeRO `hysteresis`; else empty.

        A run under another strategy goes on with the same scale.
        """

    @abstractmethod
    def load_scaler_state(self, state: Mapping[str, float]) -> None: ...

    def weights(self) -> list[Tensor]:
        """For each shard what training has come to, for files and evaluation: masters, but under schedule_free.

        There gradients are of y, between the average x of all steps and their end z (arXiv 2405.15682, eq. 1 to 3):
        x = y + (1 - 1 / beta1) (z - y), new tensors.
        """
        masters = [shard.master for shard in self.shards]
        if self.settings.kind != "schedule_free" or not masters:
            return masters
        weight = 1 - 1 / self.settings.beta1
        with torch.no_grad():
            return list(torch._foreach_lerp(masters, self.moments("z"), weight))

    def moments(self, kind: str) -> list[Tensor]:
        """For each shard a tensor of its optimizer, one number a weight: one of `settings.of_a_weight`."""
        if kind == "y":
            return [shard.master for shard in self.shards]
        return [shard.view_of(self.optimizer.state[shard.key][kind]) for shard in self.shards]

    def own_state(self) -> list[dict[str, Tensor]]:
        """For each shard what its optimizer keeps in other shapes, by name; every rank has the same."""
        return [optimizers.own_state(self.optimizer, shard.key, self.settings) for shard in self.shards]

    @property
    def steps_taken(self) -> int:
        """Optimizer steps so far; skipped ones don't count (AdamW's bias correction depends on it)."""
        return optimizers.steps_taken(self.optimizer, self.settings)

    def set_steps_taken(self, steps: int) -> None:
        optimizers.set_steps_taken(self.optimizer, self.settings, steps)

    def counts(self) -> list[dict[str, float]]:
        """What the optimizer counts beside steps, for each of its groups of parameters; the same on every rank."""
        return optimizers.counts(self.optimizer, self.settings)

    def load_counts(self, saved: Sequence[Mapping[str, float]]) -> None:
        optimizers.load_counts(self.optimizer, self.settings, saved)

    def is_finite(self) -> bool:
        """Whether weights and moments are finite numbers on all ranks. Collective, and waits for the device."""
        kinds = [[shard.master for shard in self.shards]]
        kinds += [self.moments(kind) for kind in self.settings.of_a_weight]
        return all(self.world.gather(all(bool(tensor.isfinite().all()) for kind in kinds for tensor in kind)))

    @contextlib.contextmanager
    def evaluating(self, average: Sequence[Tensor] | None) -> Iterator[None]:
        """Evaluation mode, with `average` (one tensor a shard) in place of the weights. Collective.

        Without one, with `weights`.
        """
        if self.graphs is not None:
            self.graphs.step_aside()
        if average is None and self.settings.kind == "schedule_free":
            average = self.weights()
        self._swap(average)
        self.module.eval()
        with torch.no_grad():
            yield
        # Not after an error, which ends the run: other ranks may be in another collective.
        self.module.train()
        self._swap(average)

    def _swap(self, average: Sequence[Tensor] | None) -> None:
        if average is None:
            return
        self.before_change()
        with torch.no_grad():
            for shard, other in zip(self.shards, average, strict=True):
                kept = shard.master.clone()
                shard.master.copy_(other)
                other.copy_(kept)
        self.refresh()

    def holders(self) -> list[int | None]:
        """For each shard the rank that holds more than half of it; None where none does, or all hold the whole."""
        holders: list[int | None] = []
        for index, shard in enumerate(self.shards):
            of_ranks = [of_rank[index][1] for of_rank in self._held]
            most = max(range(len(of_ranks)), key=of_ranks.__getitem__)
            holders.append(most if not shard.is_whole and 2 * of_ranks[most] > math.prod(shard.shape) else None)
        return holders

    @functools.cached_property
    def _held(self) -> list[list[tuple[int, int]]]:
        """By rank, for each shard: first flat element and number of elements. Collective at the first use."""
        return self.world.gather([(shard.start, shard.master.numel()) for shard in self.shards])

    def prepare_collect(self) -> None:
        """Let ranks connect as `collect` needs it. Collective.

        NCCL connects each pair when they first send to each other: training would wait for it at the first save.
        """
        if self.world.size > 1 and not all(shard.is_whole for shard in self.shards):
            one_each = torch.zeros(self.world.size, device=self.world.device)
            dist.all_to_all_single(torch.empty_like(one_each), one_each)

    @torch.no_grad()
    def collect(self, wanted: Sequence[Wanted], put: Callable[[int, Tensor], None]) -> Callable[[], None]:
        """Bring tensors whole to their owners. Collective: every rank wants the same, in the same order.

        On a GPU this goes on beside the next forward and backward passes, on a stream of its own; `before_change`
        waits for it. Device memory stays bounded.

        Args:
            put: called on the owner with the number in `wanted` and the tensor in the file's shape, float32, on any
                device. A copy that it starts must be on the current stream, and may go on when it returns.

        Returns:
            A function that waits, in any thread, until all copies have arrived.
        """
        if self.world.device.type != "cuda":
            self._collect(wanted, put)
            return lambda: None
        self._copying = self._copying or torch.cuda.Stream(self.world.device)
        self._copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copying):
            self._collect(wanted, put)
            self._copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            self._copied.record()
        self._being_copied = wanted  # their memory may be used for others' when they are gone
        return self._copied.synchronize

    _copying: torch.cuda.Stream | None = None
    _copied: torch.cuda.Event | None = None
    _being_copied: Sequence[Wanted] = ()

    def before_change(self) -> None:
        """Let the device wait for `collect`'s copies: call before masters, moments or the average change."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied, self._being_copied = None, ()

    def _collect(self, wanted: Sequence[Wanted], put: Callable[[int, Tensor], None]) -> None:
        queues: dict[int, list[tuple[int, Wanted]]] = {}  # by owner: what must be put together there
        for number, want in enumerate(wanted):
            shard = self.shards[want.index]
            if not shard.is_whole and self._held[want.owner][want.index] != (0, math.prod(shard.shape)):
                queues.setdefault(want.owner, []).append((number, want))
            elif want.owner == self.world.rank:
                tensor = want.tensor.detach()
                put(number, tensor if shard.is_whole else shard.to_file(tensor.view(shard.shape)))
        # One batch of each owner's at a time: all links are in use, and every rank's memory is bounded.
        batches = [self._batches(queue, _GATHER_ELEMENTS // self.world.size) for queue in queues.values()]
        for turn in itertools.zip_longest(*batches, fillvalue=()):
            self._exchange([item for batch in turn for item in batch], put)

    def _batches(self, queue: Sequence[tuple[int, Wanted]], limit: int) -> list[list[tuple[int, Wanted]]]:
        batches: list[list[tuple[int, Wanted]]] = []
        elements = 0
        for number, want in queue:
            size = math.prod(self.shards[want.index].shape)
            if not batches or elements + size > limit:
                batches.append([])
                elements = 0
            batches[-1].append((number, want))
            elements += size
        return batches

    def _exchange(self, items: Sequence[tuple[int, Wanted]], put: Callable[[int, Tensor], None]) -> None:
        """Send this rank's pieces to their owners, and put together what it owns."""
        rank, device = self.world.rank, self.world.device
        ranks = range(self.world.size)
        outgoing: list[list[Tensor]] = [[] for _ in ranks]
        for _, want in items:
            outgoing[want.owner].append(want.tensor.detach().reshape(-1).to(device))
        mine = [(number, want) for number, want in items if want.owner == rank]
        sent = torch.cat([piece for to_rank in outgoing for piece in to_rank])
        counts = [sum(self._held[sender][want.index][1] for _, want in mine) for sender in ranks]
        received = torch.empty(sum(counts), dtype=torch.float32, device=device)
        sizes = [sum(piece.numel() for piece in to_rank) for to_rank in outgoing]
        dist.all_to_all_single(received, sent, counts, sizes)
        from_ranks = list(received.split(counts))
        taken = [0] * len(counts)
        for number, want in mine:
            shard = self.shards[want.index]
            pieces = torch.empty(math.prod(shard.shape), dtype=torch.float32, device=device)
            for sender in ranks:
                start, count = self._held[sender][want.index]
                pieces[start : start + count] = from_ranks[sender][taken[sender] : taken[sender] + count]
                taken[sender] += count
            put(number, shard.to_file(pieces.view(shard.shape)))

    @torch.no_grad()
    def scatter_(self, tensors: Sequence[Tensor], source: Source) -> None:
        """Fill one tensor a shard from a source of whole parameters: the reverse of `collect`. Collective.

        A rank reads the rows that its piece lies in. What every rank has whole, one reads for all.

        Raises:
            UserError: a parameter is missing or has another shape.
        """
        whole: list[tuple[Shard, Tensor]] = []
        for shard in self.shards:
            if (shape := source.shape(shard.name)) != tuple(shard.file_shape):
                raise UserError(
                    f"{shard.name} is {list(shape)} in the checkpoint, {list(shard.file_shape)} in the model: "
                    "put model.* back as it was or choose another run.dir"
                )
        for shard, tensor in zip(self.shards, tensors, strict=True):
            if shard.is_whole:
                whole.append((shard, tensor))
            elif tensor.numel():
                row = math.prod(shard.shape[1:])
                first, last = shard.start // row, -(-(shard.start + tensor.numel()) // row)
                rows = shard.from_file(source.rows(shard.name, first, last)).reshape(-1)
                tensor.copy_(rows.narrow(0, shard.start - first * row, tensor.numel()))
        if self.world.size == 1:
            for shard, tensor in whole:
                tensor.copy_(source.rows(shard.name, 0, _rows(shard)))
        else:
            self._scatter_whole(whole, source)

    def _scatter_whole(self, whole: Sequence[tuple[Shard, Tensor]], source: Source) -> None:
        """Ranks take turns to read a group of parameters and send it to all; each reads ahead for its next turn."""
        world = self.world
        groups = list(_groups_of(whole, _GATHER_ELEMENTS))

        def read(number: int) -> Tensor:
            return torch.cat([source.rows(s.name, 0, _rows(s)).reshape(-1) for s, _ in groups[number]])

        with ThreadPoolExecutor(1) as ahead:
            mine = iter(range(world.rank, len(groups), world.size))
            coming = (ahead.submit(read, number) for number in mine)
            next_one = next(coming, None)
            for number, group in enumerate(groups):
                sizes = [tensor.numel() for _, tensor in group]
                if number % world.size == world.rank:
                    assert next_one is not None
                    flat, next_one = next_one.result().to(world.device), next(coming, None)
                else:
                    flat = torch.empty(sum(sizes), dtype=torch.float32, device=world.device)
                dist.broadcast(flat, src=number % world.size)
                for (shard, tensor), part in zip(group, flat.split(sizes), strict=True):
                    tensor.copy_(part.view(shard.shape))

    def _clip_and_skip(self, norm: Tensor, max_grad_norm: float) -> None:
        """Tell the optimizer what its next step does to gradients of this norm, without asking the host.

        It divides them by `grad_scale`, AdamW's fused kernel on the way, which saves a pass over them, and updates
        nothing where `found_inf` is set. The norm is of reduced gradients, so all ranks see the same one.
        """
        # max(x, 1) of NaN is NaN: what isn't finite is skipped, whatever it is divided by.
        scale = torch.clamp((norm + 1e-6) / max_grad_norm, min=1.0) if max_grad_norm > 0 else None
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]

    def _set_lr(self, lr: float) -> None:
        """Call once before each update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        optimizers.begin_update(self.optimizer, self.settings)


def _rows(shard: Shard) -> int:
    return shard.shape[0] if shard.shape else 1


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
