"""The doctor's pieces against references."""

from __future__ import annotations

import itertools
import json
import mmap
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from finetune import build, loop
from finetune.config import Config, StrategyConfig, compose
from finetune.distributed import StopRequest, World
from finetune.doctor import files, hosts, launch, memory, network, saving, steps, table, weights
from finetune.doctor.board import Board
from finetune.doctor.context import Context
from finetune.doctor.table import FAIL, OK, SKIPPED, WARN, Row
from finetune.terminal import ranks_text

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8]


@given(st.sampled_from(DTYPES), st.integers(1, 300), st.data())
def test_a_checksum_sees_every_change(dtype, count, data):
    """A changed element, two that change places, and nothing else: not the layout of the same values."""
    tensor = torch.arange(count).to(dtype)
    other = tensor.clone()
    place = data.draw(st.integers(0, count - 1))
    other[place] += 1
    assert (weights.checksum(tensor) == weights.checksum(other)) == torch.equal(tensor, other)
    swapped = tensor.clone()
    a, b = place, data.draw(st.integers(0, count - 1))
    swapped[[a, b]] = tensor[[b, a]]
    assert (weights.checksum(tensor) == weights.checksum(swapped)) == torch.equal(tensor, swapped)


def test_a_checksum_in_pieces_is_that_of_the_whole(monkeypatch):
    tensor = torch.randn(1000)
    whole = weights.checksum(tensor)
    monkeypatch.setattr(weights, "_CHUNK", 7)
    assert weights.checksum(tensor) == whole
    weight = torch.randn(4, 3, 5, 5)
    assert weights.checksum(weight) == weights.checksum(weight.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_every_pair_of_machines_meets_once(count):
    rounds = network.rounds_of(count)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(count), 2))
    for pairs in rounds:  # nobody is in two places
        assert len({seat for pair in pairs for seat in pair}) == 2 * len(pairs)


def test_the_estimate_is_what_a_step_allocates(overrides, tmp_path):
    """Weights, gradients, moments and average of one process, against the tensors that a step leaves behind."""
    config, _ = compose("train", overrides, Config)
    (tmp_path / "run").mkdir()
    world = World(0, 1, 0, torch.device("cpu"))
    parts = build.build(config, world, tmp_path / "run")
    expected = memory.estimate(parts, 1)
    parameters = list(parts.strategy.module.parameters())

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    seen: dict[str, int] = {}
    real = parts.strategy.step

    def step(lr):
        seen["gradients"] = size(p.grad for p in parameters if p.grad is not None)
        return real(lr)

    parts.strategy.step = step
    probe = steps.Probe(parts, world, 1)
    progress = steps.Progress(step=0, images_seen=0, steps_taken=0)
    with pytest.raises(steps.EnoughError):
        loop.train(config, world, parts, probe, progress, StopRequest(0))
    moments = [tensor for kind in ("exp_avg", "exp_avg_sq") for tensor in parts.strategy.moments(kind)]
    seen |= {"weights": size(parameters), "moments": size(moments), "average": size(parts.average.tensors)}
    assert {name: count for name, count in expected.device.items() if count} == seen
    assert expected.host == {"checkpoint copy": seen["weights"] + seen["moments"] + seen["average"]}


ZERO3_OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("environment", "strategy", "result", "says"),
    [
        ({}, {"kind": "ddp"}, OK, "one process, no launcher"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"kind": "ddp"}, FAIL, "which strategy=ddp ignores"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            {"kind": "zero", "stage": 2},
            OK,
            "",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {"kind": "zero", "stage": 2},
            FAIL,
            "asks for stage=3, the run for 2",
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            },
            {"kind": "zero", "stage": 2},
            FAIL,
            "asks for offload_optimizer=cpu, the run for none",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "FILE"},
            {"kind": "zero", "stage": 2},
            FAIL,
            "asks for stage=3, the run for 2",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/none/ds.json"},
            {"kind": "zero", "stage": 2},
            FAIL,
            "/none/ds.json cannot be read",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, {"kind": "ddp"}, FAIL, "FSDP, which is ignored"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"kind": "ddp"}, WARN, "mixed_precision=fp16 is ignored"),
    ],
)
def test_what_a_launch_asks_for_in_vain(monkeypatch, tmp_path, environment, strategy, result, says):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": ZERO3_OFFLOAD}))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("FILE", str(file)))
    (row,) = launch.launch_rows(Config(strategy=StrategyConfig(**strategy)))
    assert row.result == result
    assert says in row.seen


def test_one_process_where_the_launch_looks_like_several(monkeypatch):
    assert launch.process_rows(1) == []
    monkeypatch.setenv("SLURM_NTASKS", "8")  # in a batch script: nothing was started by srun
    assert launch.process_rows(1) == []
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    (row,) = launch.process_rows(1)
    assert (row.result, row.seen[:14]) == (FAIL, "SLURM_NTASKS=8")
    monkeypatch.setenv("RANK", "0")  # torchrun in each task
    assert launch.process_rows(8) == []
    monkeypatch.setenv("SLURM_NNODES", "4")
    (row,) = launch.process_rows(2)
    assert "Slurm gave 4 nodes, and the run has 2 processes" in row.seen


def test_packages_out_of_bounds_are_named(monkeypatch):
    wanted = ["torch>=2.11", "deepspeed>=0.18; sys_platform == 'none'", "peft>=0.17", 'boto3>=1; extra == "dev"']
    monkeypatch.setattr(hosts.importlib.metadata, "requires", lambda _: wanted)
    installed = {"torch": "2.9.1+cpu", "deepspeed": "0.1", "peft": "-", "boto3": "-"}
    assert hosts._unfit(installed) == ["torch is 2.9.1+cpu, wanted is >=2.11", "peft is -, wanted is >=0.17"]


def test_what_was_skipped_for_one_reason_is_one_line():
    rows = [
        Row("a", OK, "x"),
        Row("b", SKIPPED, "no data"),
        Row("c", SKIPPED, "no data"),
        Row("d", SKIPPED, "other"),
    ]
    assert table.merged(rows) == [rows[0], Row("the rest", SKIPPED, "b, c: no data"), rows[3]]


def test_ranks_are_named_shortly():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([5, 0, 1, 2, 9, 8]) == "ranks 0-2, 5, 8-9"


def test_brackets_of_a_key_are_no_markup(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    table.show([Row("config", FAIL, "data.sources[bold] is [red]", "set [it]")], 1.0)
    out = capsys.readouterr().out
    assert "[red]" in out
    assert "[it]" in out


def test_code_is_compared_by_its_contents(monkeypatch, tmp_path):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "__init__.py").write_text("one = 1\n")
    monkeypatch.setattr(hosts.finetune, "__file__", str(tmp_path / "finetune" / "__init__.py"))
    first = hosts.code_sha256()
    (tmp_path / "finetune" / "new.py").write_text("")
    assert hosts.code_sha256() != first


def test_a_lock_that_is_held_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as held:
        files.fcntl.flock(held, files.fcntl.LOCK_EX)
        assert files._refused(path)
    assert not files._refused(path)


@pytest.mark.parametrize(
    ("every", "kept", "free", "result", "says"),
    [
        (0, None, 400, OK, "3 + 1 checkpoints of 100 MiB need 300 MiB more, 400 MiB are free"),
        (25, None, 600, WARN, "100 MiB and 9 snapshots of 30.0 MiB need 570 MiB more, 600 MiB are free"),
        (25, 2, 600, OK, "and 2 snapshots of 30.0 MiB need 360 MiB more"),
        (25, None, 500, FAIL, "570 MiB more, 500 MiB are free"),
    ],
)  # fmt: skip
def test_snapshots_need_space_as_checkpoints_do(tmp_path, monkeypatch, every, kept, free, result, says):
    """Of 210 steps the last one is kept too; 100 MiB lie in the run's folder already."""
    context = context_of("a")
    context.scratch, context.checkpoint_bytes, context.snapshot_bytes = tmp_path, 100 << 20, 30 << 20
    context.config.train.steps, context.config.checkpoint.keep = 210, 3
    context.config.ema.snapshot_every, context.config.ema.snapshot_keep = every, kept
    beside = (free - 100) << 20  # the doctor's own checkpoint lies there still
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": beside}))
    row = files.space_row(context, lambda: 100 << 20)
    assert row.result == result and says in row.seen, row
    assert ("ema.snapshot_keep" in row.remedy) == (result != OK)


def test_what_a_snapshot_shares_with_its_checkpoint_lies_there_once(tmp_path):
    run = tmp_path / "run"
    checkpoint, snapshot = run / "checkpoints/step-00000002", run / "snapshots/step-00000002"
    for folder in (checkpoint / "ema-power-0.1", snapshot / "power-0.1"):
        folder.mkdir(parents=True)
        (folder.parent / "trainer.json").write_text("{}")
    (checkpoint / "ema-power-0.1/model").write_bytes(bytes(1000))
    (snapshot / "power-0.1/model").hardlink_to(checkpoint / "ema-power-0.1/model")
    assert saving._kept_bytes(run) == 1000 + 2 * 2
    shutil.rmtree(checkpoint)
    assert saving._kept_bytes(run) == 1000 + 2


def context_of(*hosts: str, **settings: str) -> Context:
    """A context of ranks on these machines, which have told each other nothing."""
    board = Board(0, len(hosts), hosts[0], lambda row: None)
    board.hosts = list(hosts)
    config = Config()
    config.train.precision = settings.get("precision", "auto")
    return Context(config, OmegaConf.structured(config), board, 0, len(hosts), Path("run"))


def gpu(uuid: str, **changes: Any) -> dict[str, Any]:
    return {
        "host": "a",
        "device": "cuda",
        "gpus": 2,
        "driver": "570.1",
        "gpu": "H100",
        "uuid": uuid,
        "capability": (9, 0),
        "runs": True,
        "free": 79 << 30,
        "total": 80 << 30,
    } | changes


@pytest.mark.parametrize(
    ("seen", "result", "says"),
    [
        ([gpu("1"), gpu("2")], OK, "2 x H100, 1 machine, 80.0 GiB each, driver 570.1"),
        ([gpu("1"), gpu("1")], FAIL, "ranks 0-1 are on GPU 1"),
        ([gpu("1"), gpu("2", gpu="A100", host="b")], WARN, "rank 1 on b: A100"),
        ([gpu("1"), gpu("2", driver="550.2", host="b")], WARN, "driver 550.2"),
        ([gpu("1"), gpu("2", device="cpu", host="b")], FAIL, "rank 1 on b: cpu"),
        ([gpu("1"), gpu("2", runs=False)], FAIL, "was not built for H100"),
        ([gpu("1"), gpu("2", free=40 << 30)], WARN, "rank 1: only 40.0 GiB free"),
        ([gpu("1")], WARN, "2 GPUs here, and one process uses one of them"),
        ([gpu("", device="cpu", gpus=0), gpu("", device="cpu", gpus=0)], FAIL, "sees none"),
        ([gpu("", device="cpu", gpus=0, driver="")], OK, "1 on CPU"),
    ],
)
def test_devices_that_do_not_fit(seen, result, says):
    row = hosts._device_row(context_of(*(each["host"] for each in seen)), seen)
    assert (row.result, says in row.seen) == (result, True), row


@pytest.mark.parametrize(
    ("peak", "capacity", "result"),
    [(50, 80, OK), (73, 80, WARN), (81, 80, FAIL)],
    ids=["fits", "tight", "too much"],
)
def test_memory_against_what_is_there(peak, capacity, result):
    one = {
        "text": "weights",
        "device": 20 << 30,
        "peak": 10 << 30,
        "reserved": 12 << 30,
        "capacity": capacity << 30,
    }
    row = memory._device_row(context_of("a", "b"), [one, one | {"peak": peak << 30, "reserved": peak << 30}])
    assert row.result == result
    assert "on rank 1 on b" in row.seen
    assert bool(row.remedy) == (result != OK)


def test_memory_that_did_not_do_fails_though_the_peak_is_below_what_is_there():
    one = {"text": "weights", "device": 20 << 30, "peak": 70 << 30, "reserved": 78 << 30, "capacity": 80 << 30}
    context = context_of("a")
    context.is_full = True
    row = memory._device_row(context, [one])
    assert (row.result, row.remedy) == (FAIL, build.OUT_OF_MEMORY)
    assert row.seen.startswith("estimated 20.0 GiB a GPU") and row.seen.endswith("when the steps found no more")


def test_ranks_of_a_machine_share_its_memory():
    """Each rank fits alone; four of them with the copies for a checkpoint don't."""
    one = {"host_now": 20, "copy": 10, "host_capacity": 100}
    assert memory._host_row(context_of("a", "b", "a", "b"), [one] * 4).result == OK
    row = memory._host_row(context_of("b", "a", "a", "a", "a"), [one] * 5)
    assert (row.result, row.seen[:15]) == (FAIL, "4 rank(s) on a ")


def test_pages_of_files_are_not_held(tmp_path):
    """Weights that all ranks map were counted once for each."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before, _ = memory.host_memory()
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        mapped_more = memory.host_memory()[0] - before
        kept = bytearray(64 << 20)
        kept[:: mmap.PAGESIZE] = b"1" * len(kept[:: mmap.PAGESIZE])
        held_more = memory.host_memory()[0] - before
    assert mapped_more < 16 << 20 and held_more > 48 << 20


def test_what_a_run_begins_from_is_looked_at(tmp_path):
    context = context_of("a")
    context.run, context.parts = tmp_path / "run", SimpleNamespace(checkpoints=None)
    assert saving.run_rows(context)[0].seen.endswith("has no checkpoint: a run starts anew")
    context.config.checkpoint.resume = str(tmp_path / "step-00000005")
    (row,) = saving.run_rows(context)
    assert row.result == FAIL and "step-00000005 is no whole checkpoint: there is no such folder" in row.seen


def test_a_step_of_many_micro_batches_has_more_time():
    context = context_of("a")
    context.parts = SimpleNamespace(accumulation=8)
    for kind, limit_s in (("steps", 4800.0), ("save", 1200.0)):
        context.exchange(kind, kind, lambda: None)
        assert context.board._phase.limit_s == limit_s


def test_versions_that_differ_are_named_with_their_ranks():
    ours = {"torch": "2.13.0", "peft": "0.17"}
    seen = [{"versions": ours}, {"versions": ours}, {"versions": ours | {"torch": "2.11.0"}}]
    row = hosts._version_row(context_of("a", "a", "b"), seen)
    assert (row.result, row.seen) == (FAIL, "torch: 2.13.0 on rank 0 on a, rank 1 on a, 2.11.0 on rank 2 on b")
