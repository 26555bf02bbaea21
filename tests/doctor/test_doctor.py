"""`finetune doctor`: healthy launches pass, each seeded fault fails its own row, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import UserError
from finetune.checkpoint import RunFolder
from finetune.doctor import command, examine, files, pieces
from finetune.doctor.table import Row
from tests.conftest import ROOT, environment, launch_command

FAULTS = Path(__file__).with_name("faults.py")

# Case -> what its rows say; these rows fail and no others.
CAUGHT: dict[str, dict[str, str]] = {
    "plugin": {
        "launch": "launched with a DeepSpeed plugin, which strategy=ddp ignores",
        "ranks": "finetune train would refuse to start",
    },
    "plugin-stage": {"launch": "asks for stage=3, the run for 2"},
    "plugin-inside": {"strategy": "the config asks for zero stage 2, what runs is ddp"},
    "accelerate-counts-one": {"ranks": "rank 1: .*Accelerate says rank 0 of 1"},
    "equal-data": {"samples": "rank 1 reads 8 of its 8 samples as rank 0 does"},
    "equal-rows": {"samples": "rank 1: 8 samples are not those of the plan"},
    "weights": {
        "weights": r"before the first step: rank 1 differs from rank 0 in 1 of \d+ tensors, first unet.conv_in",
        "resume": "rank 1 does not load what was saved",
    },
    "weights-zero2": {"weights": "before the first step: rank 1 differs from rank 0 in 1 of"},
    "master-zero2": {"weights": "rank 1: working weights are not the rounded masters in"},
    "piece-zero3": {"weights": "rank 1: working weights are not the rounded masters in"},
    "gather-zero3": {"weights": r"before the first step: rank 1 differs from rank 0 in [1-9]\d* of \d+ tensors"},
    "frozen": {"weights": "before the first step: rank 1 differs from rank 0 in 1 of"},
    "drift": {"weights": "^after 2 steps: rank 1 differs from rank 0", "resume": "rank 1 does not load"},
    "lr": {"learning rate": "step 1: 0.001 instead of 0.0005, 2 times"},
    "lr-scheduler": {"learning rate": "step 1: 0.001 instead of 0.0005, 2 times"},
    "folder": {"folder": "rank 1 cannot see what rank 0 wrote"},
    "mount": {"folder": "rank 1 cannot see what rank 0 wrote"},
    "locks": {"locks": "rank 0 held a lock and rank 1 got it as well"},
    "moments": {"resume": "moments, average or count of steps"},
    "memory": {
        "steps": "OutOfMemoryError",
        "memory": r"without activations: gradients \d.*, weights \d.*, moments \d",
    },
    "data": {"data": "rank 1: /data/latents holds no manifest.json"},
    "config": {"config": "seed is '0' on rank 0, '1' on rank 1"},
    "space": {"space": "are free"},
}
HEALTHY = ("healthy", "healthy-zero2", "healthy-zero3", "healthy-gather", "healthy-lora")
# Launched at once: processes take longer to start than to be examined.
EARLY = (
    "healthy",
    "healthy-zero2",
    "plugin",
    "equal-data",
    "weights",
    "lr",
    "folder",
    "moments",
    "data",
    "machines",
)


def run_faults(
    out: Path, cases: list[str], settings: list[str], pipeline: Path
) -> subprocess.CompletedProcess[str]:
    """All cases in one launch of two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, str(FAULTS), str(out), *cases, "--", *settings],
        env=environment() | {"PYTHONPATH": str(ROOT), "PIPELINE": str(pipeline)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def settings(latents: Path) -> list[str]:
    return [
        "experiment=smoke",
        f"data.shards={latents}",
        "tracker=none",
        "model.unet.block_out_channels=[16,32]",
        "model.unet.attention_head_dim=2",
    ]


class Verdicts:
    """What the doctor said of each case; each set of cases is launched once."""

    def __init__(self, folder: Path, settings: list[str], pipeline: Path) -> None:
        self.folder, self.settings, self.pipeline = folder, settings, pipeline
        self.sets: set[tuple[str, ...]] = set()

    def __call__(self, case: str) -> tuple[list[int], dict[str, dict[str, str]]]:
        """Exit codes by rank, and rows by name."""
        late = [name for name in (*CAUGHT, *HEALTHY) if name not in EARLY and (name != "mount" or may_mount())]
        half = len(late) // 2
        cases = next(group for group in ([*EARLY], late[:half], late[half:]) if case in group)
        if tuple(cases) not in self.sets:
            self.sets.add(tuple(cases))
            done = run_faults(self.folder, cases, self.settings, self.pipeline)
            assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
        rows = json.loads((self.folder / f"{case}.json").read_text())["rows"]
        codes = [int((self.folder / f"{case}.{rank}.code").read_text()) for rank in range(2)]
        assert not (self.folder / "run").exists() or not any((self.folder / "run").iterdir())
        return codes, {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def verdicts(settings: list[str], pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    return Verdicts(tmp_path_factory.mktemp("doctor"), settings, pipeline)


def may_mount() -> bool:
    """Whether a mount namespace can be made here."""
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def marked(names: tuple[str, ...]) -> list[Any]:
    return [name if name in EARLY else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("case", marked(HEALTHY))
def test_a_healthy_launch_passes(verdicts, case):
    codes, rows = verdicts(case)
    assert codes == [0, 0]
    assert {row["result"] for row in rows.values()} == {"ok", "skipped"}
    assert [name for name, row in rows.items() if row["result"] == "skipped"] == ["tracking"]
    assert rows["ranks"]["seen"].startswith("2 of 2; environment, torch.distributed, Accelerate agree")
    assert "the next step is the same bit for bit" in rows["resume"]["seen"]
    assert re.search(r"the steps moved [1-9]\d* of", rows["weights"]["seen"])


@pytest.mark.parametrize("case", marked(tuple(CAUGHT)))
def test_a_seeded_fault_fails_its_row(verdicts, case):
    if case == "mount" and not may_mount():
        pytest.skip("no mount namespace can be made here")
    codes, rows = verdicts(case)
    assert codes == [1, 1]
    failed = {name: row for name, row in rows.items() if row["result"] == "FAIL"}
    assert failed.keys() == CAUGHT[case].keys()
    for name, pattern in CAUGHT[case].items():
        assert re.search(pattern, failed[name]["seen"])
        assert failed[name]["remedy"]


def test_what_does_not_need_a_failed_check_goes_on(verdicts):
    _, rows = verdicts("folder")
    assert all(rows[name]["result"] == "ok" for name in ("samples", "weights", "learning rate", "steps", "reading"))
    _, rows = verdicts("data")
    assert all(rows[name]["result"] == "ok" for name in ("folder", "locks", "bandwidth", "versions"))


def test_clocks_apart_are_a_warning_and_pairs_of_machines_are_measured(verdicts):
    codes, rows = verdicts("machines")
    assert codes == [0, 0]
    assert rows["clocks"]["result"] == "warn"
    assert "rank 1 on node1 -60.0 s" in rows["clocks"]["seen"]
    assert rows["machines"]["seen"].startswith("pairs of 2 machines: ")


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("dies", "rank 1 on .* died"),
        pytest.param(
            "sleeps", r"took more than 6 s: rank 1 on .*faults.py:\d+ read|rank 1 on", marks=pytest.mark.slow
        ),
        pytest.param("defect", "rank 1 on .*: KeyError", marks=pytest.mark.slow),
        pytest.param("fails", "rank 1 on .*illegal memory access.*; the others wait", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_lost_ends_the_doctor_with_its_name(tmp_path, settings, pipeline, case, pattern):
    done = run_faults(tmp_path, [case], settings, pipeline)
    assert done.returncode != 0
    rows = json.loads((tmp_path / f"{case}.json").read_text())["rows"]
    (failed,) = (row for row in rows if row["result"] == "FAIL")
    assert failed["name"] == ("after strategy" if case == "defect" else "two steps")
    assert re.search(pattern, failed["seen"]), failed
    assert sum(row["result"] == "ok" for row in rows) > 10  # what came before is told as well
    assert not (tmp_path / "run").exists()


# --- one process -------------------------------------------------------------------------------------------------


@pytest.fixture
def examined(overrides, capsys, monkeypatch):
    """`examined("seed=1")`: exit code, rows by name and the text of a doctor in this process."""
    for owner, name, value in (
        (files, "_WRITE_BYTES", 1 << 20),
        (files, "_SLOW_MB_S", 0.0),
        (pieces, "_READ_SECONDS", 0.05),
        (pieces, "_MARGIN", 0.0),
    ):
        monkeypatch.setattr(owner, name, value)
    kept: list[Row] = []
    real = examine.show

    def show(rows: list[Row], seconds: float) -> None:
        kept[:] = rows
        real(rows, seconds)

    monkeypatch.setattr(examine, "show", show)

    def run(*more: str) -> tuple[int, dict[str, Row], str]:
        code = command.main([*overrides, *more])
        return code, {row.name: row for row in kept}, capsys.readouterr().out

    return run


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and contents."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_one_process_passes_and_leaves_nothing(examined, tmp_path):
    code, rows, text = examined(f"run.dir={tmp_path / 'deep' / 'er' / 'run'}", "validation.samples=0")
    assert code == 0
    assert {row.result for row in rows.values()} == {"ok", "skipped"}
    assert "\x1b" not in text
    assert re.search(r"^doctor: \d+ ok, 2 skipped \(\d+ s\)$", text, re.M)
    assert not (tmp_path / "deep").exists()


def test_a_run_does_not_notice_that_the_doctor_was_there(examined, command, overrides, tmp_path):
    run = tmp_path / "run"
    assert command("train", *overrides, "train.steps=2")[0] == 0
    before = tree(run)
    code, rows, _ = examined()
    assert (code, rows["run"].seen) == (0, "a run goes on from step 2 of 4")
    assert tree(run) == before
    code, rows, _ = examined("seed=5")
    assert (code, rows["run"].result) == (1, "FAIL")
    assert "seed was 0 and is 5 now" in rows["run"].seen
    code, rows, _ = examined("train.steps=2")
    assert (code, rows["run"].result) == (0, "warn")
    assert tree(run) == before
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoints", "tokenizer"]


def test_a_run_that_is_going_on_is_not_disturbed(examined, tmp_path):
    holder = RunFolder(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"is in use by process \d+ on .*must not disturb"):
        examined()
    assert tree(tmp_path) == before
    holder.close()
    assert examined()[0] == 0


def test_what_a_killed_doctor_left_is_cleared(examined, tmp_path):
    left = tmp_path / "run" / ".doctor" / "checkpoints" / "step-00000009"
    left.mkdir(parents=True)
    (left / "trainer.json").write_text("{}")
    assert examined()[0] == 0
    assert not (tmp_path / "run" / ".doctor").exists()


def test_a_mistake_in_the_settings_is_one_line(command):
    code, line = command("doctor", "experiment=smoke", "optm.lr=1")
    assert code == 2
    assert "did you mean 'optim.lr'?" in line
    code, line = command("doctor", "--fast")
    assert (code, line) == (2, "error: unknown option --fast: settings are KEY=VALUE, see finetune doctor --help")
    code, line = command("doctor", "experiment=smoke", "train.global_batch=0")
    assert code == 2
    assert "train.global_batch=0 must be greater than 0" in line


def test_missing_data_is_a_row_with_a_remedy(examined, tmp_path):
    code, rows, text = examined(f"data.shards={tmp_path / 'nothing'}")
    assert code == 1
    assert str(tmp_path / "nothing") in rows["data"].seen
    assert "remedy: every machine must reach the shards" in text
    assert not (tmp_path / "run").exists()


def test_a_store_that_is_away_is_a_row_with_its_own_remedy(examined):
    code, rows, _ = examined("data.shards=http://127.0.0.1:9/x")
    assert code == 1
    assert rows["data"].seen.startswith("cannot fetch http://127.0.0.1:9/x/manifest.json: ")
    assert rows["data"].remedy == "every machine must reach the address, with the same credentials"


@pytest.mark.parametrize("more", ["train.micro_batch=3", "train.micro_batch=5"])
def test_a_batch_that_cannot_be_shared_is_no_fault_of_the_data(examined, more):
    code, rows, text = examined(more, "train.global_batch=8")
    assert (code, rows["batch"].result) == (1, "FAIL")
    assert f"{more} does not divide the 8 samples of each rank" in rows["batch"].seen
    assert rows["batch"].remedy == "change train.global_batch, train.micro_batch or the number of processes"
    assert "every machine must reach" not in text
    assert rows["data"].seen == rows["steps"].seen == "the ranks cannot share the batch"


def test_what_a_run_would_refuse_has_its_own_remedy(examined, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, rows, _ = examined("train.device=cuda")
    assert code == 1 and "torch sees no GPU; use train.device=cpu or auto" in rows["ranks"].seen
    assert rows["ranks"].remedy == "see what it says"


def test_steps_that_move_nothing_fail(examined, monkeypatch):
    from finetune import loop

    monkeypatch.setattr(loop, "optimizer_step", without_update(loop.optimizer_step))
    code, rows, _ = examined()
    assert code == 1
    assert rows["weights"].seen == "the steps changed no weight"


def without_update(real: Any) -> Any:
    def step(strategy: Any, *arguments: Any, **settings: Any) -> Any:
        kept = [shard.master.clone() for shard in strategy.shards]
        result = real(strategy, *arguments, **settings)
        for shard, old in zip(strategy.shards, kept, strict=True):
            shard.master.copy_(old)
        return result

    return step


@pytest.mark.parametrize(("more", "made"), [([], 1), (["model.fast=false"], 0)], ids=["default", "off"])
def test_the_unet_is_made_fast_as_the_run_makes_it(examined, monkeypatch, more, made):
    """On a GPU, which is pretended here."""
    from finetune.models import fast

    made_fast: list[Any] = []
    monkeypatch.setattr(fast, "available", lambda device: True)
    monkeypatch.setattr(fast, "missing", lambda: None)
    monkeypatch.setattr(fast, "make_fast", lambda unet: made_fast.append(unet))
    code, rows, _ = examined(*more, "validation.samples=0")  # held out for nothing would be a note
    assert code == 0
    assert len(made_fast) == made
    assert "note" not in rows


def test_help_has_examples(capsys):
    assert command_main("--help") == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "torchrun --nproc-per-node 8 -m finetune.doctor" in out


def command_main(*argv: str) -> int:
    return command.main(list(argv))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_under_accelerate_with_the_committed_file(settings, tmp_path, strategy):
    words = launch_command(2, [*settings, f"strategy={strategy}", f"run.dir={tmp_path / 'run'}"])
    words[words.index("finetune.train")] = "finetune.doctor"
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "FAIL" not in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_accelerate_launched_with_deepspeed_for_ddp(settings, tmp_path):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "2"]
    words = [*accelerate, "--num_processes", "2", "--main_process_port", "0", "-m", "finetune.doctor", *settings]
    words += ["strategy=ddp", f"run.dir={tmp_path / 'run'}", "train.device=cpu"]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert "FAIL    launch         accelerate was launched with a DeepSpeed plugin" in done.stdout
