"""Imports go down: each module of `finetune/` has a floor and imports only from floors below its own.

The map is the table in CONTRIBUTING.md. A new file must be given a floor here before the tests pass.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ASIDE = 4.5  # may use floors 0 to 4; only entry points (floors 6 to 8) may use it

# A name ending in "/" is a sub-package: all of its files share the floor and may import each other.
FLOORS: dict[str, float] = {
    "__init__": -1,
    "npy": -1,
    "data/__init__": -1,
    "config/": 0,
    "rng": 0,
    "diffusion": 0,
    "latents": 0,
    "pictures": 0,
    "lr": 0,
    "ema": 0,
    "batch": 0,
    "runs": 0,
    "memory": 0,
    "help": 1,
    "posthoc": 1,
    "terminal": 0,
    "data/order": 0,
    "data/shards/": 0,
    "data/loader/": 1,
    "models/": 1,
    "conditioning/": 1,
    "tasks/": 2,
    "objective": 2,
    "sampling": 2,
    "distributed/": 2,
    "components": 3,
    "step": 3,
    "checkpoint/": 3,
    "tracking": 3,
    "validation": 3,
    "loop": 4,
    "build/": 5,
    "asking": 4,
    "ranges": 4,
    "autoencoder/": ASIDE,
    "export/": ASIDE,
    "evaluation/": ASIDE,
    "doctor/": 6,
    "train": 6,
    "sample": 6,
    "sweep": 6,
    "demo": 6,
    "cli": 7,
    "__main__": 8,
}

DATA_TOOLS_MAY_IMPORT = ("finetune.data.shards", "finetune.latents", "finetune.models", "finetune.terminal")
LAUNCHERS_MAY_IMPORT = ("finetune.config", "finetune.build", "finetune.data.shards")
RUN_DATA_TOOLS = ("finetune/demo.py",)  # its command, as a user would


def unit(module: str) -> str | None:
    """The entry of FLOORS that `module` ("finetune.data.order") belongs to; None when it has none."""
    path = module.removeprefix("finetune").removeprefix(".").replace(".", "/") or "__init__"
    for name in (path, f"{path}/__init__"):
        if name in FLOORS:
            return name
    return next((name for name in FLOORS if name.endswith("/") and f"{path}/".startswith(name)), None)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, root: Path) -> list[tuple[int, str]]:
    """(line, module) of each import of our own packages, at the top or inside a function."""
    here = module_name(path, root).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from finetune.data import order` names a module; `from finetune.rng import normal` doesn't.
                full = f"{source}.{alias.name}"
                target = root.joinpath(*full.split("."))
                is_module = target.with_suffix(".py").exists() or target.is_dir()
                found.append((node.lineno, full if is_module else source))
    return [(line, name) for line, name in found if name.split(".")[0] in ("finetune", "data_tools", "launchers")]


def named_data_tools(path: Path) -> list[tuple[int, str]]:
    """(line, text) of each text that is the name of data_tools, of one of its modules, or of its command."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    texts = [(node.lineno, node.value) for node in nodes if isinstance(node, ast.Constant)]
    return [(line, t) for line, t in texts if isinstance(t, str) and re.fullmatch(r"data[_-]tools([./]\S*)?", t)]


def matches(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def violations(root: Path) -> list[str]:
    """One line for each import that goes up or sideways, and for each file without a floor."""
    problems: list[str] = []
    for path in sorted((root / "finetune").rglob("*.py")):
        me = unit(module_name(path, root))
        where = path.relative_to(root).as_posix()
        if me is None:
            problems.append(f"{where}: has no floor; add it to FLOORS and to CONTRIBUTING.md")
            continue
        for line, text in named_data_tools(path):  # for importlib, runpy, subprocess
            if text != "data-tools" or where not in RUN_DATA_TOOLS:
                problems.append(f"{where}:{line}: finetune/ must not use {text}")
        for line, target in imported_modules(path, root):
            if not target.startswith("finetune"):
                problems.append(f"{where}:{line}: finetune/ must not import {target}")
                continue
            them = unit(target)
            if them is None:
                problems.append(f"{where}:{line}: {target} has no floor")
            elif them == me:
                if not me.endswith("/") and target != module_name(path, root):
                    problems.append(f"{where}:{line}: imports {target} on its own floor")
            elif FLOORS[them] >= FLOORS[me]:
                problems.append(f"{where}:{line}: floor {FLOORS[me]:g} imports {target} on floor {FLOORS[them]:g}")
    for package, allowed, also in (
        ("data_tools", DATA_TOOLS_MAY_IMPORT, "data_tools"),
        ("launchers", LAUNCHERS_MAY_IMPORT, "launchers"),
    ):
        for path in sorted((root / package).rglob("*.py")):
            for line, target in imported_modules(path, root):
                if target != "finetune" and not matches(target, (*allowed, also)):
                    problems.append(f"{path.relative_to(root).as_posix()}:{line}: must not import {target}")
    return problems


def test_imports_go_down() -> None:
    assert violations(ROOT) == []


def test_the_map_in_contributing_names_every_module() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [name for name in FLOORS if f"`{name}`" not in table and name != "data/__init__"]
    assert missing == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("finetune/rng.py", "from finetune.step import go", "floor 0 imports finetune.step on floor 3"),
        ("finetune/rng.py", "def f():\n    import finetune.loop", "floor 0 imports finetune.loop on floor 4"),
        ("finetune/rng.py", "from . import config", "floor 0 imports finetune.config on floor 0"),
        ("finetune/data/order.py", "from ..data import shards", "imports finetune.data.shards on floor 0"),
        ("finetune/models/unet.py", "from finetune.conditioning import x", "on floor 1"),
        ("finetune/loop.py", "from finetune.autoencoder.loss import x", "on floor 4.5"),
        ("finetune/export/a.py", "import finetune.train", "on floor 6"),
        ("finetune/export/a.py", "from finetune.autoencoder import b", "on floor 4.5"),
        ("finetune/train.py", "from finetune.cli import entry", "on floor 7"),
        ("finetune/demo.py", "import data_tools.cli", "finetune/ must not import data_tools.cli"),
        ("finetune/demo.py", 'files("data_tools.emoji")', "finetune/ must not use data_tools.emoji"),
        ("finetune/sample.py", 'call(["data-tools", "verify"])', "finetune/ must not use data-tools"),
        ("finetune/novel.py", "", "has no floor"),
        ("data_tools/cli.py", "from finetune.data.loader import x", "must not import finetune.data.loader"),
        ("launchers/slurm.py", "from finetune import step", "must not import finetune.step"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, file: str, source: str, expected: str) -> None:
    write_tree(tmp_path, {file: source})
    (problem,) = violations(tmp_path)
    assert expected in problem


def test_right_imports_pass(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "finetune/data/loader/readers.py": "from finetune.data import order\nimport finetune.data.shards",
            "finetune/models/unet.py": "from finetune import UserError\nimport finetune.models.text",
            "finetune/demo.py": "print('data-tools', 'data-tools encode')",
            "finetune/cli.py": "from finetune.autoencoder.train import main\nimport finetune.train",
            "finetune/autoencoder/train.py": "import finetune.autoencoder.loss, finetune.config",
            "data_tools/cli.py": "from finetune.models.autoencoder import load\nimport data_tools.encode",
            "launchers/slurm.py": "import subprocess\nfrom finetune import UserError",
        },
    )
    assert violations(tmp_path) == []


def write_tree(root: Path, files: dict[str, str]) -> None:
    """A copy of the tree with empty modules, where `files` have the given source."""
    for name in FLOORS:
        path = root / "finetune" / (f"{name}__init__.py" if name.endswith("/") else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
