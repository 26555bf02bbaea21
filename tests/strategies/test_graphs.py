"""CUDA graphs of micro-batches, on a device that is played on the CPU: gradients are those of plain calls.

As on a GPU, what is captured is not computed: it leaves memory as it was, or unwritten; and a replay computes what
was captured from what lies in the captured inputs, and leaves it in the captured memory, without Python's doing.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import UserError, build, distributed
from finetune.config import Config, compose
from finetune.distributed import World
from finetune.distributed.graphs import Graphs
from finetune.step import optimizer_step
from tests.strategies.conftest import spawn


class Device:
    """Plays `torch.cuda`: graphs of calls of `passes`, which has to be `watch`ed."""

    def __init__(self) -> None:
        self.capturing: Graph | None = None
        self.captured: list[list[Tensor | None]] = []  # gradients of each graph
        self.replays = 0
        self.device_s = 0.0  # what kernels of one call take: none makes the host what is waited for
        self.fails: Callable[[], None] = lambda: None
        self.changed: Callable[[], list[Tensor]] = list  # what passes change besides gradients
        self.pools: list[str | None] = []  # that captures were given
        self.is_broken = False  # a capture can't be ended
        self.total_bytes = self.free_bytes = 1 << 40
        self.reserved_bytes = 0  # a graph takes 100

    def watch(self, passes: Callable[..., Tensor], parameters: list[nn.Parameter]) -> Callable[..., Tensor]:
        self.parameters = parameters

        def watched(*args: Any) -> Tensor:
            output = passes(*args)
            if self.capturing is not None:
                self.fails()  # in the midst of it: gradients are there already
                self.capturing.passes, self.capturing.args, self.capturing.output = passes, args, output
            return output

        return watched

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any = None, **_: Any) -> Iterator[None]:
        assert self.capturing is None
        self.pools.append(pool)
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        others = [(tensor, tensor.clone()) for tensor in self.changed()]
        self.capturing, drawn = graph, torch.get_rng_state()
        try:
            yield
        finally:
            self.capturing = None
            torch.set_rng_state(drawn)
            for tensor, values in others:
                tensor.copy_(values)
            for p, values in zip(self.parameters, before, strict=True):
                if values is not None:
                    p.grad.copy_(values)
                elif p.grad is not None:
                    p.grad.fill_(torch.nan)
            if self.is_broken:
                raise RuntimeError("operation failed due to a previous error during capture")
        if not hasattr(graph, "output"):
            return  # it has failed, and Graphs knows
        graph.adds = [values is not None for values in before]
        graph.gradients = [p.grad for p in self.parameters]
        graph.output.fill_(torch.nan)
        self.captured.append(graph.gradients)
        self.reserved_bytes += 100


class Graph:
    device: Device

    def __del__(self) -> None:
        if hasattr(self, "gradients"):
            self.device.reserved_bytes -= 100

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.device.replays += 1
        parameters = self.device.parameters
        kept = [p.grad for p in parameters]
        for p, adds, gradient in zip(parameters, self.adds, self.gradients, strict=True):
            p.grad = gradient.clone() if adds else None
        output = self.passes(*self.args)
        with torch.no_grad():
            self.output.copy_(output)
            for p, gradient in zip(parameters, self.gradients, strict=True):
                if gradient is not None:
                    gradient.copy_(p.grad)
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient


def play(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device in place of `torch.cuda`'s."""
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        record = synchronize = lambda self: None

        def elapsed_time(self, _: Event) -> float:
            return made.device_s * 1e3

    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Captured", (Graph,), {"device": made}))
    monkeypatch.setattr(torch.cuda, "graph", made.graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: made.reserved_bytes)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (made.free_bytes, made.total_bytes))
    return made


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return play(monkeypatch)


class Model(nn.Module):
    """A layer that is not called has no gradient, as a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(2, 2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def passes(self, given: dict[str, Any], factor: int) -> Tensor:
        """Takes tensors in any nesting, one of which may be None."""
        x, (y, weight) = given["x"], given["rest"]
        loss = (self.second(F.silu(self.first(x))) - y).square().sum() / factor
        loss = loss if weight is None else loss * weight.mean()
        if "further" in given:
            loss = loss + self.never(given["further"]).square().sum()
        loss.backward()
        return loss.detach()


class Pair:
    """Two models with the same weights: one called through graphs, one plainly."""

    def __init__(self, device: Device) -> None:
        self.device, self.ours, self.plain = device, Model(), Model()
        parameters = list(self.ours.parameters())
        self.graphs = Graphs(device.watch(self.ours.passes, parameters), parameters)
        self.draws = torch.Generator().manual_seed(1)
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def draw(self, rows: int, weighted: bool = False) -> dict[str, Any]:
        x, y, w = (torch.randn(rows, width, generator=self.draws) for width in (6, 3, 1))
        return {"x": x, "rest": (y, w if weighted else None)}

    def call(self, rows: int = 4, factor: int = 8, weighted: bool = False) -> None:
        given = self.draw(rows, weighted)
        before = given["x"].clone()
        self.outputs.append((self.graphs(given, factor), self.plain.passes(given, factor)))
        assert torch.equal(given["x"], before)
        self.compare()

    def compare(self) -> None:
        for one, other in zip(self.ours.parameters(), self.plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)

    def step(self) -> None:
        """As an optimizer: gradients are clipped where they lie, weights change, gradients are dropped."""
        for model in (self.ours, self.plain):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
                    parameter.data.sub_(0.01 * parameter.grad)
                    parameter.grad = None

    def finish(self) -> None:
        """Outputs are still what they were: a graph's own memory has been written since."""
        for one, other in self.outputs:
            assert torch.equal(one, other)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_gradients_are_those_of_plain_calls(device, accumulation):
    pair = Pair(device)
    for _ in range(12):
        for _ in range(accumulation):
            pair.call()
        pair.step()
    pair.finish()
    assert len(device.captured) == min(accumulation, 2)  # a first micro-batch, and one that adds
    plain = 4 + (-4) % accumulation  # three that warm up and one that is timed, and what is left of that step
    assert device.replays == 12 * accumulation - plain


@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_shapes_by_turns_have_graphs_of_their_own_and_one_memory_of_gradients(device, accumulation):
    pair = Pair(device)
    for step in range(20):
        for _ in range(accumulation):
            pair.call(rows=(4, 7)[step % 2])
        pair.step()
    pair.finish()
    # The other shape's adds to zeros at the first micro-batch too.
    assert len(device.captured) == min(accumulation, 2) + 1
    assert device.pools == [None] + ["pool"] * min(accumulation, 2)
    first, *others = ([g for g in gradients if g is not None] for gradients in device.captured)
    assert all(one is other for each in others for one, other in zip(first, each, strict=True))
    assert device.replays >= 20 * accumulation - 2 * (4 + accumulation)


def test_two_shapes_within_a_step(device):
    """What a graph adds to is its own; a step that another shape began goes on plainly."""
    pair = Pair(device)
    for rows in [(4, 4)] * 4 + [(7, 7)] * 4 + [(4, 7, 4), (7, 4), (4, 4, 7), (7, 7), (4, 4)] * 2:
        for count in rows:
            pair.call(count)
        pair.step()
    pair.finish()
    assert len(device.captured) == 3


def test_a_shape_that_reaches_further_parameters_is_called_plainly(device):
    """Graphs share one memory of gradients: what has none in the first graph has no place in the others."""
    pair = Pair(device)
    for step in range(16):
        given = pair.draw(5)
        if step % 2:
            given["further"] = torch.ones(3, 2)
        pair.plain.passes(given, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair.graphs(given, 3)
        assert (pair.ours.never.weight.grad is not None) == bool(step % 2)
        pair.step()
    for one, other in zip(pair.ours.parameters(), pair.plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(device.captured) == 2 and device.replays == 8 - 4  # what was captured last was given up


def test_gradients_from_elsewhere_are_added_to(device):
    """A step that begins before there is a graph, and gradients that something else left."""
    pair = Pair(device)
    for _ in range(6):
        given = pair.draw(5)
        for model in (pair.ours, pair.plain):
            model.passes(given, 3)
        pair.call()
        pair.call()
        pair.step()
    assert not device.captured
    for _ in range(2):
        pair.call()
        pair.call()
        pair.step()
    for one, other in zip(pair.ours.parameters(), pair.plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(device.captured) == 2 and device.replays == 4


@pytest.mark.parametrize("adds", [False, True])
def test_what_fails_in_a_capture_is_called_plainly_from_then_on(device, adds):
    pair = Pair(device)

    def fail() -> None:
        if adds == bool(device.captured):
            raise RuntimeError("no such kernel\nand more")

    device.fails = fail
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(8):
            for _ in range(2):
                pair.call()
            pair.step()
    pair.finish()
    (warning,) = [one for one in seen if "CUDA graph" in str(one.message)]
    assert str(warning.message) == "this micro-batch gets no CUDA graph: no such kernel"
    assert device.replays == adds and len(device.captured) == adds
    # Another shape has its own chance.
    device.fails = lambda: None
    for _ in range(6):
        pair.call(rows=3)
        pair.step()
    assert len(device.captured) == adds + 1
    pair.finish()


@pytest.mark.parametrize("adds", [False, True])
def test_without_memory_for_a_graph_there_are_none_any_more(device, adds):
    """Those that were there give theirs back: a plain pass needs as much. So do activations of the failed one."""
    pair = Pair(device)
    alive = []

    def fail() -> None:
        if adds == bool(device.captured):
            frame = inspect.currentframe().f_back  # of `watched`, whose output stands for all activations
            alive.append(weakref.ref(frame.f_locals["output"]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    plain = pair.graphs.plain

    def watched(*args: Any) -> Tensor:
        assert not any(one() is not None for one in alive)
        assert not alive or pair.graphs.pool is None
        return plain(*args)

    pair.graphs.plain = watched
    device.fails = fail
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for rows in [4] * 8 + [3] * 8:
            for _ in range(2):
                pair.call(rows)
            pair.step()
    pair.finish()
    (warning,) = [one for one in seen if "CUDA graph" in str(one.message)]
    assert str(warning.message).startswith("micro-batches get no CUDA graphs: CUDA out of memory.")
    assert len(alive) == 1 and device.replays == len(device.captured) == adds


def test_a_capture_that_cannot_be_ended_ends_the_run(device):
    """torch would go on as in a capture: with less memory each step, and without random numbers."""
    pair = Pair(device)
    for _ in range(4):
        pair.call()
        pair.step()

    def fail() -> None:
        device.is_broken = True
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    device.fails = fail
    says = r"no CUDA graph can be made of these passes \(operation not permitted when stream is capturing\): .*"
    with pytest.raises(UserError, match=says + r"again with model\.graphs=false"):
        pair.call()
    assert all(p.grad is None for p in pair.ours.parameters())


@pytest.mark.parametrize("free_bytes", [499, 500])
def test_graphs_step_aside_where_memory_is_short_and_are_made_anew(device, free_bytes):
    pair = Pair(device)
    device.free_bytes, device.total_bytes = free_bytes, 1000
    is_short = free_bytes < 500
    for number in range(20):
        for _ in range(2):
            pair.call()
        pair.step()
        if number % 8 == 7:
            assert pair.graphs.count == 2
            pair.graphs.step_aside()
            assert pair.graphs.count == (0 if is_short else 2)
            assert (pair.graphs.pool is None) == (not pair.graphs.gradients) == is_short
    pair.finish()
    assert device.pools == [None, "pool"] * (3 if is_short else 1) and device.replays == 2 * 20 - 4


@pytest.mark.parametrize("free_bytes", [99, 100])
def test_other_shapes_get_the_memory_of_graphs_where_it_is_short(device, free_bytes):
    """While they warm up. One that has no graph of its own then takes it for good."""
    pair = Pair(device)
    device.free_bytes = free_bytes
    for rows in [4] * 5 + [7] * 4 + [4, 7, 4]:
        pair.call(rows)
        pair.step()
    is_short = free_bytes < 100
    assert len(device.captured) == 3 if is_short else 2
    replays = device.replays
    device.device_s = 1e3
    for rows in [9] * 4 + [4, 9, 4]:
        pair.call(rows)
        pair.step()
    pair.finish()
    assert device.replays - replays == (1 if is_short else 2)


def test_an_interruption_leaves_gradients_as_they_were(device):
    pair = Pair(device)
    for _ in range(4):
        pair.call()
        pair.step()

    def interrupt() -> None:
        raise KeyboardInterrupt

    device.fails = interrupt
    with pytest.raises(KeyboardInterrupt):
        pair.call()
    assert all(p.grad is None for p in pair.ours.parameters())


def test_what_is_no_tensor_is_part_of_the_shape(device):
    """A graph holds the values that it was captured with."""
    pair = Pair(device)
    for factor in [8] * 6 + [5] * 6 + [8, 5] * 2:
        pair.call(factor=factor)
        pair.step()
    for weighted in [True] * 6 + [False, True]:
        pair.call(weighted=weighted)
        pair.step()
    pair.finish()
    assert len(device.captured) == 3
    assert device.replays == 3 * 2 + 4 + 2


@pytest.mark.parametrize("of", ["x", "y"])
def test_types_of_tensors_are_part_of_the_shape(device, of):
    pair = Pair(device)
    parameters = list(pair.ours.parameters())
    pair.graphs = Graphs(
        device.watch(lambda x, y: pair.ours.passes({"x": x.float(), "rest": (y.float(), None)}, 1), parameters),
        parameters,
    )
    for index in range(14):
        x, y = torch.randn(4, 6), torch.randn(4, 3)
        if index >= 7:
            x, y = (x.half(), y) if of == "x" else (x, y.half())
        pair.graphs(x, y)
        pair.plain.passes({"x": x.float(), "rest": (y.float(), None)}, 1)
        pair.compare()
        pair.step()
    assert len(device.captured) == 2


def test_no_graph_where_the_device_is_what_is_waited_for(device):
    """Large micro-batches: graphs would only take memory."""
    pair = Pair(device)
    device.device_s = 1e3
    for _ in range(10):
        pair.call()
        pair.step()
    pair.finish()
    assert not device.captured and device.replays == 0
    device.device_s = 0.0
    for _ in range(6):  # smaller ones
        pair.call(rows=1)
        pair.step()
    assert len(device.captured) == 1 and device.replays == 2


# --- passes with collectives: all ranks by a graph, or none -----------------------------------------


class Peer:
    """The world of two ranks, of which the other says what is wanted of it."""

    size = 2

    def __init__(self) -> None:
        self.says = False  # that it has no memory, that its host is waited for, that it can't capture
        self.has_other_shapes = False
        self.asked = 0

    def gather(self, here: bool) -> list[bool]:
        self.asked += 1
        return [here, self.says]

    def is_same(self, key: str) -> bool:
        assert "torch.Size" in key
        return not self.has_other_shapes


@pytest.fixture
def peer(device):
    """A pair whose graphs hold collectives: gradients are taken away within passes, as sums."""
    pair = Pair(device)
    sums = [torch.zeros_like(p) for p in pair.ours.parameters()]

    def passes(*args: Any) -> Tensor:
        output = pair.ours.passes(*args)
        for total, parameter in zip(sums, pair.ours.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None
        return output

    def step() -> None:
        for total, parameter in zip(sums, pair.ours.parameters(), strict=True):
            parameter.grad = total.clone()
            total.zero_()
        for parameter in pair.plain.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        pair.compare = real
        pair.compare()
        pair.step()
        pair.compare = lambda: None

    real, pair.compare = pair.compare, lambda: None
    pair.sum_step = step
    device.changed = lambda: sums
    pair.world = Peer()
    pair.graphs = Graphs(device.watch(passes, []), [], world=pair.world)
    return pair


def test_one_rank_that_waits_for_its_host_gives_all_graphs(peer, device):
    device.device_s = 1e3
    peer.world.says = True
    for _ in range(4):
        peer.call()
        peer.sum_step()
    peer.world.says = False
    for _ in range(4):
        peer.call()
        peer.call()
        peer.sum_step()
    peer.finish()
    assert len(device.captured) == 1 and device.replays == 8


def test_what_another_rank_cannot_capture_no_rank_does(peer, device):
    for _ in range(4):
        peer.call()
        peer.sum_step()
    peer.world.says = True
    with pytest.warns(UserWarning, match="no CUDA graphs: another rank can make none"):
        peer.call()
    peer.sum_step()
    asked = peer.world.asked
    for _ in range(6):
        peer.call()
        peer.sum_step()
    peer.finish()
    assert device.replays == 0 and peer.graphs.count == 0 and peer.world.asked == asked


def test_a_call_whose_shape_differs_between_ranks_is_plain(peer, device):
    for number in range(16):
        peer.world.has_other_shapes = number % 3 == 1
        peer.call(rows=4)
        peer.sum_step()
    peer.finish()
    assert len(device.captured) == 1 and device.replays == 11 - 4


def test_graphs_step_aside_where_another_rank_has_no_memory(peer, device):
    for _ in range(5):
        peer.call()
        peer.sum_step()
    peer.graphs.step_aside()
    assert peer.graphs.count == 1
    peer.world.says = True
    peer.graphs.step_aside()
    assert peer.graphs.count == 0


def test_graphs_with_collectives_are_given_up_before_the_group_is_left(peer):
    """NCCL would wait for them."""
    for _ in range(5):
        peer.call()
        peer.sum_step()
    assert peer.graphs.count == 1
    distributed.stop()
    assert peer.graphs.count == 0


# --- in a run ---------------------------------------------------------------------------------------


def losses_of(overrides: list[str], device: Device | None, steps: int = 7) -> tuple[list[float], list[Tensor]]:
    """Of each step, and the weights at the end."""
    config, _ = compose("train", overrides, Config)
    run = Path(config.run.dir)
    run.mkdir(parents=True)
    parts = build.build(config, World(0, 1, 0, torch.device("cpu")), run)
    strategy = parts.strategy
    assert strategy.graphs is None  # on a CPU
    if device is not None:
        parameters = list(strategy.parameters.values())
        strategy.graphs = Graphs(device.watch(strategy._passes, parameters), parameters)
    loader = parts.data.loader(seed=config.seed, micro_batch=parts.micro_batch, rank=0, world_size=1)
    batches = iter(loader)
    losses = []
    for step in range(steps):
        done = optimizer_step(
            strategy,
            parts.model.conditioner,
            batches,
            micro_batches=parts.accumulation,
            global_batch=config.train.global_batch,
            lr=1e-3,
            dropout=config.task.dropout,
            seed=config.seed,
            averages=[],
            images_seen=(step + 1) * config.train.global_batch,
        )
        losses.append(float(done.loss_sum))
    batches.close()
    loader.close()
    return losses, [shard.master.clone() for shard in strategy.shards]


@pytest.mark.parametrize(
    "settings",
    [
        ["train.micro_batch=8"],
        ["train.micro_batch=2", "train.precision=bf16", "model.unet.dropout=0.2"],
        pytest.param(
            ["train.micro_batch=4", "train.precision=fp16", "model.gradient_checkpointing=true"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fp32", "bf16", "fp16"],
)
def test_a_training_is_the_same_bit_for_bit(overrides, tmp_path, device, settings):
    plain, weights = losses_of([*overrides, *settings, f"run.dir={tmp_path / 'plain'}"], None)
    found, others = losses_of([*overrides, *settings, f"run.dir={tmp_path / 'graphs'}"], device)
    assert device.replays > 0
    assert found == plain
    assert all(torch.equal(one, other) for one, other in zip(others, weights, strict=True))


# --- over ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_graph_has_left_is_reduced(processes):
    """All ranks by graphs, or one of them alone: to the bits of plain passes, with as many collectives."""
    lines = spawn(processes, Path(__file__).parent / "graphing.py").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(row["strategy"], row["who"]) for row in rows] == [
        (kind, who)
        for kind in ("ddp", "ddp_once", "ddp_bf16", "zero1", "zero2", "zero3")
        for who in ("all", "first")
    ]
    for row in rows:
        assert row["same"] == [True] * processes
        assert row["nodes"] == [0] * processes
        assert row["begin alike"] == [True] * processes
        are_alike = row["who"] == "all" or row["strategy"] == "zero3"
        wanted = [True] * processes if are_alike else [True] + [False] * (processes - 1)
        assert [replays > 0 for replays in row["replays"]] == wanted
