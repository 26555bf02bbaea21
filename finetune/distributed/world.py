"""The processes of a run: who is who, and what they tell each other from the host."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from finetune import PeerLostError, UserError, by_all, first_line, is_by_all, memory
from finetune.distributed.watch import Bounds, Watch

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, number `local_rank` on its machine.

    `timeout`: of a collective; `watch`: told where this rank is, and of its end.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(minutes=30)
    watch: Watch = field(default_factory=Watch, repr=False, compare=False)

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
            raise by_all(error)
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place, which has to be contiguous."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def is_same(self, text: str) -> bool:
        """Whether all ranks give the same text."""
        if self.size == 1:
            return True
        value = zlib.crc32(text.encode())
        both = torch.tensor([value, -value])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return int(both[0]) == -int(both[1])

    def require_same(self, text: str, message: str) -> None:
        """Refuse ranks that give different texts. Collective.

        Raises:
            UserError: with this message, on all ranks.
        """
        if not self.is_same(text):
            raise by_all(UserError(message))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each over ranks, in place, as one collective: flat tensors of one type."""
        if self.size > 1:
            group, options = dist.group.WORLD, dist.AllreduceCoalescedOptions()
            assert group is not None
            options.asyncOp = False  # on the current stream, as `dist.all_reduce`
            work = group.allreduce_coalesced(list(tensors), options)  # `dist.all_reduce_coalesced` warns of its end
            if work is not None:
                work.wait()

    def sum_at_(self, parts: Iterable[tuple[int, Tensor]]) -> None:
        """Sum each over ranks, in place, at the rank beside it, as one collective; on other ranks it is lost."""
        if self.size > 1:
            with self._as_one():
                for rank, tensor in parts:
                    dist.reduce(tensor, rank)

    def spread_(self, parts: Iterable[tuple[int, Tensor]]) -> None:
        """Give all ranks each tensor's values, in place, from the rank beside it, as one collective."""
        if self.size > 1:
            with self._as_one():
                for rank, tensor in parts:
                    dist.broadcast(tensor, rank)

    def _as_one(self) -> contextlib.AbstractContextManager[Any]:
        on_gpu = self.device.type == "cuda"
        return _coalescing_manager(device=self.device) if on_gpu else contextlib.nullcontext()


def start(device: str, *, uses_deepspeed: bool, bounds: Bounds | None = None) -> World:
    """Join the other processes, and refuse to run unless every layer sees the same number of them.

    With `bounds` the ranks watch each other from here on, and a process whose peers don't come, die or hang ends
    with exit code 69.

    Args:
        device: `auto`, `cpu` or `cuda`.
        uses_deepspeed: the run's strategy is a ZeRO stage. It needs a process group even for one process.

    Raises:
        UserError: no such device; a launch that says nothing of ranks, or asks for DeepSpeed where the strategy
            doesn't; layers that disagree.
    """
    _require_launch(device, uses_deepspeed)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed takes a GPU that we were told to leave alone
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu:
        _take_gpu(local_rank)
    torch_device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    world = World(rank, size, local_rank, torch_device)
    if bounds is not None and not dist.is_initialized():
        world = replace(world, timeout=bounds.collective, watch=Watch(rank, size, bounds=bounds))
        # torchrun's default lets NCCL's own watchdog abort the process with pages of stack; ours names the rank.
        if bounds.lost_s > 0 and os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1") == "1":
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    if (size > 1 or uses_deepspeed) and not dist.is_initialized():
        world = _meet(world, bounds)
    elif bounds is not None:
        world.watch.start()
    if size > 1:
        _agree(world)
    return world


def _require_launch(device: str, uses_deepspeed: bool) -> None:
    """Refuse a device that is not there, and a launch that means something else (see `start`)."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"train.device={device} is not known: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no GPU; use train.device=cpu or auto")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and not uses_deepspeed:
        raise UserError(
            "accelerate was launched with DeepSpeed, which strategy=ddp would ignore: add strategy=zero2 (or "
            "zero1, zero3), or launch with launchers/accelerate/one_machine.yaml"
        )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and int(tasks) > 1 and "SLURM_STEP_ID" in os.environ:
        raise UserError(
            f"Slurm started {tasks} tasks, but RANK is not set, so each would train alone; "
            "start through torchrun or accelerate launch, one task a node"
        )


def _take_gpu(local_rank: int) -> None:
    """Make this rank's own GPU the current one."""
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank}, but this machine has {torch.cuda.device_count()} GPUs; "
            "start one process a GPU"
        )
    torch.cuda.set_device(local_rank)
    # Buffers in CUDA graphs are torch's to give back: NCCL shall not hold on to them.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


def _meet(world: World, bounds: Bounds | None) -> World:
    """Make the process group, and have its ranks watched from before it is there."""
    rank, size, on_gpu = world.rank, world.size, world.device.type == "cuda"
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = str(_free_port())
        os.environ |= alone
        _SET.update(alone)
    store = _store(rank, world.timeout if bounds is None else datetime.timedelta(seconds=bounds.start_s))
    if bounds is not None and size > 1:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        world = replace(world, watch=Watch(rank, size, dist.PrefixStore("watch", store), address, bounds))
    world.watch.start()
    atexit.unregister(_wait_for_threads)  # one will do
    atexit.register(_wait_for_threads)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=world.timeout,
            device_id=world.device if on_gpu else None,
        )
    except BaseException as error:
        world.watch.judge(error)
        raise
    return world


@contextlib.contextmanager
def joined(device: str, bounds: Bounds, *, uses_deepspeed: bool, when_full: str) -> Iterator[World]:
    """A run's time among the other processes, from `start` to `stop`. They are told of what ends this one.

    Args:
        when_full: what to do where memory is short.

    Raises:
        UserError: as `start` does; memory is short.
    """
    world = start(device, uses_deepspeed=uses_deepspeed, bounds=bounds)
    try:
        with memory.shortage_told():
            yield world
        world.watch.leave()
        stop()
    except BaseException as error:
        world.watch.judge(error)
        # Leaving a group whose members are gone may take forever; the process is about to end anyway.
        if world.size == 1 or is_by_all(error):
            stop()
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"the device's memory is full ({first_line(error)}): {when_full}") from error
        raise


def _store(rank: int, timeout: datetime.timedelta) -> dist.Store:
    """The store of this attempt to run, where ranks find each other: torchrun's, else one that rank 0 opens.

    Raises:
        UserError: rank 0 can't open it.
        PeerLostError: the others don't reach it, or it ends while they do.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + timeout.total_seconds()
    while not opens_it:  # torch's client fills the screen with its stack when nobody answers yet
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"no answer from rank 0's store at {host}:{port} within {timeout.total_seconds():.0f} s "
                    f"({error}): is that machine up, and can this one reach it?"
                ) from None
            time.sleep(0.5)
    try:
        store = dist.TCPStore(
            host, port, None, opens_it, timeout=timeout, wait_for_workers=False, multi_tenant=opens_it
        )
    except RuntimeError as error:
        if not opens_it:
            raise PeerLostError(f"rank 0's store at {host}:{port} ended ({first_line(error)})") from None
        raise UserError(
            f"rank {rank} has no store at {host}:{port} ({first_line(error)}); choose another port"
        ) from None
    attempt = os.environ.get("LAUNCHERS_ROUND") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt-{attempt}", store)


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


def require_same_layout(world: World, parameters: Mapping[str, Tensor]) -> None:
    """Refuse ranks whose trained weights differ in name, shape, type or place in memory. Collective.

    Gradients travel in the order of memory: sums would be of other weights' gradients.

    Raises:
        UserError: on all ranks.
    """
    world.require_same(
        repr([(name, p.shape, p.stride(), p.dtype) for name, p in parameters.items()]),
        "the processes lay out the trained weights differently: are GPUs, packages and settings the same on all "
        "machines? `finetune doctor` compares them",
    )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


_LEFT: list[Any] = []  # process groups, kept to the end of the process
_RELEASED: weakref.WeakSet[Any] = weakref.WeakSet()  # before the group is left
_SET: set[str] = set()  # variables of the environment that a launcher would have set


def release_at_stop(graphs: Any) -> None:
    """Let `stop` call `graphs.release()`: NCCL waits there for CUDA graphs that hold a collective."""
    _RELEASED.add(graphs)


def stop() -> None:
    """Leave the process group."""
    for graphs in list(_RELEASED):
        graphs.release()
    _RELEASED.clear()
    while _SET:  # another run of this process would take them for a launcher's
        os.environ.pop(_SET.pop(), None)
    if dist.is_initialized():
        # Were a reducer of torch's DDP the group's last owner, it would wait for gloo's thread with the GIL held,
        # which that thread may want for the last broadcast's tensors: seen once, after a whole run. Python's own
        # reference lets go of the GIL.
        _LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


def _wait_for_threads(seconds: float = 2) -> None:
    """Before the interpreter ends, wait until torch's threads are idle, or time is over.

    A thread of gloo's lets go of a collective's tensors a moment after the collective, and wants the GIL for that.
    When the interpreter ends in that moment, Python ends the thread inside C++: the process aborts, all done.
    """
    deadline, before = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        time.sleep(0.01)  # without the GIL
        now = _torch_threads()
        if now == before and all("S (sleeping)" in thread for thread in now):
            return
        before = now


def _torch_threads() -> list[list[str]]:
    """Of each thread that torch has named: name, id, state, how often it has run. None where there is no /proc."""
    wanted = ("Name:", "Pid:", "State:", "voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:")
    threads = []
    for file in sorted(Path("/proc/self/task").glob("*/status")):
        with contextlib.suppress(OSError):  # it has ended
            fields = [line.split(maxsplit=1) for line in file.read_text(errors="replace").splitlines()]
            values = [field[1] for field in fields if len(field) == 2 and field[0] in wanted]
            if values and values[0].startswith("pt_"):
                threads.append(values)
    return threads
