"""What `--help` says of settings: groups, keys, defaults, and what the schema's comments say of each."""

from __future__ import annotations

import ast
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from omegaconf import OmegaConf

from finetune.config import groups, is_section, nodes, written

_WIDTH = 116


def describe(config_name: str, schema: type, folder: str = "") -> str:
    """Config groups with their choices, and each key with its default and meaning."""
    choices = groups(config_name, folder)
    width = max(map(len, choices))
    lines = ["config groups (GROUP=CHOICE):"]
    for name, names in choices.items():
        lines += _wrapped(f"  {name:<{width}}  ", ", ".join(names), width + 4)
    lines += ["", "keys and their defaults (KEY=VALUE; ??? must be given):"]
    said = meanings(schema)
    for key, default in defaults(schema):
        section = key.rpartition(".")[0]
        if section in said:
            lines += ["", *_wrapped(f"{section}: ", said.pop(section), 2)]
        line = f"  {key}={default}"
        meaning = said.get(key, "")
        if len(line) + len(meaning) + 4 <= _WIDTH:
            lines.append(f"{line}  # {meaning}" if meaning else line)
        else:
            lines += [line, *_wrapped("      # ", meaning, 8)]
    return "\n".join(lines)


def describe_tasks() -> str:
    """Each task, what it is, and its own keys with their defaults, as its source says."""
    lines = ["tasks (task=NAME) and their keys (task.options.KEY=VALUE):"]
    for path in sorted((Path(__file__).parent / "tasks").glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        (options,) = [each for each in module.body if isinstance(each, ast.ClassDef) and each.name == "Options"]
        keys = [
            f"{ast.unparse(each.target)}={json.dumps(ast.literal_eval(each.value))}"
            for each in options.body
            if isinstance(each, ast.AnnAssign) and each.value is not None
        ]
        said = (ast.get_docstring(module) or "").splitlines()[0]
        lines += [f"  {path.stem}: {said}", *([f"      {'  '.join(keys)}"] if keys else [])]
    return "\n".join(lines)


def defaults(schema: type) -> list[tuple[str, str]]:
    """(dotted key, default as it is written on the command line) of every value."""
    return [(key, written(value)) for key, value in nodes(OmegaConf.structured(schema)) if not is_section(value)]


def meanings(schema: type, prefix: str = "") -> dict[str, str]:
    """By dotted key what the schema says: docstrings of its sections, comments on or above its fields."""
    said: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            said |= {prefix + name: text for name, text in _comments(base)}
    for field in fields(schema):
        section = field.default_factory() if callable(field.default_factory) else None
        if is_dataclass(section):
            key = prefix + field.name
            if (text := " ".join((type(section).__doc__ or "").split())) and not text.startswith(
                type(section).__name__
            ):
                said[key] = text
            said |= meanings(type(section), f"{key}.")
    return said


def _comments(schema: type) -> Iterator[tuple[str, str]]:
    """(field, comment) of one class: the lines above a field and the end of its own, as one."""
    source = textwrap.dedent(inspect.getsource(schema))
    name, above, comment = "", [], []  # type: tuple[str, list[str], list[str]]
    starts_line = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (above if starts_line else comment).append(token.string.lstrip("# "))
        elif token.type == tokenize.NEWLINE:
            if name and (text := " ".join([*above, *comment])):
                yield name, text
            name, above, comment, starts_line = "", [], [], True
        elif token.type == tokenize.NAME and starts_line:
            name, starts_line = token.string, False
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            starts_line = False


def _wrapped(first: str, text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
    ) or [first.rstrip()]
