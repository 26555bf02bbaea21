"""The wheel carries what the code reads at run time, and works from any directory."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("finetune", "data_tools", "launchers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build(out, "wheel")
    (path,) = out.glob("*.whl")
    return path


def build(out: Path, kind: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def tracked(*patterns: str) -> list[str]:
    """Files under version control, or those on disk where there is no git (an unpacked sdist)."""
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]
    files = (path for pattern in patterns for path in (ROOT / pattern).rglob("*"))
    return [path.relative_to(ROOT).as_posix() for path in files if path.is_file() and path.suffix != ".pyc"]


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = set(tracked(*PACKAGES))
    expected |= {f"finetune/{name}" for name in tracked("conf")}
    assert sorted(expected - inside) == []


def test_wheel_tells_that_its_packages_are_typed(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= inside


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what belongs to the repository, git knows")
def test_sdist_holds_every_file(tmp_path: Path) -> None:
    """The tests import benchmarks/, and the Makefile stands beside what CI calls."""
    build(tmp_path, "sdist")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(set(tracked(".")) - inside) == []


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    inside = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in inside if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert [name for name in inside if "__pycache__" in name] == []


def test_wheel_carries_licence_notice_and_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    by_name = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert archive.read(by_name["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert archive.read(by_name["licenses/NOTICE"]) == (ROOT / "NOTICE").read_bytes()
    commands = archive.read(by_name["entry_points.txt"]).decode()
    assert "finetune = finetune.cli:entry" in commands
    assert "data-tools = data_tools.cli:entry" in commands


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    always, optional = (
        {canonicalize_name(Requirement(text).name) for text in texts}
        for texts in (
            project["dependencies"],
            [text for extra in extras if extra != "dev" for text in extras[extra]],
        )
    )
    distributions = packages_distributions()
    imported = {
        canonicalize_name(distribution)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for module in imported_modules(path) - sys.stdlib_module_names - set(PACKAGES)
        for distribution in distributions.get(module, [module])
    }
    assert imported - always - optional == {"triton"}  # torch's builds for GPUs bring it
    assert always - imported == {"webdataset"}


def imported_modules(path: Path) -> set[str]:
    """The first names of the modules that a file imports, at the top or inside a function."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}


def test_lock_pins_every_dependency_once_and_within_bounds() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] not in ("#", "")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    outside = [
        str(need)
        for need in wanted
        if not need.specifier.contains(Version(pins.get(canonicalize_name(need.name), "0")), prereleases=True)
    ]
    assert outside == []


@pytest.mark.slow
def test_installed_wheel_composes_a_config_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    program = (
        "import finetune, finetune.autoencoder.config as c\n"
        "print(finetune.__file__)\n"
        "print(c.load(['data.shards=here', 'model=kl_f8'])[0].model.block_out_channels)\n"
    )
    # PYTHONPATH comes before site-packages, so this clone's editable install doesn't shadow the wheel.
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=elsewhere, env=env, capture_output=True, text=True, check=True
    )
    where, channels = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert len(channels.strip("[]()").split(",")) == 4
