"""The words of a command line, KEY=VALUE: read, quoted, and which keys a schema has."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from finetune import UserError


def parse_override(text: str) -> tuple[Override, str]:
    """An override as Hydra reads it, and its text, quoted where a path's signs (~, =, umlauts) ask for it.

    Raises:
        UserError: it can't be read.
    """
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text), text
    except HydraException:
        key, equals, value = text.partition("=")
        example = quoted_list(key, value) if value.startswith("[") else f"'{key}=\"...\"'"
        quotes = f"quote what has other signs than letters, digits and /-_.: {example}"
        if not equals or not value or value[0] in "[{":
            hint = quotes if equals and value else "an override is KEY=VALUE"
            raise UserError(f"cannot read the override '{text}': {hint}") from None
    text_quoted = f"{key}={quoted(value)}"
    try:
        return parser.parse_override(text_quoted), text_quoted
    except HydraException:
        raise UserError(f"cannot read the override '{text}': {quotes}") from None


def quoted(value: str) -> str:
    """A text as an override says it, whatever is in it; an interpolation (`${run.name}`) stays one."""
    return QuotedString(value, Quote.double).with_quotes()


def quoted_list(key: str, value: str) -> str:
    """An override of a list of texts as the shell takes it, of a value that may lack brackets and quotes."""
    texts = [each.strip() for each in value.removeprefix("[").removesuffix("]").split(",")]
    items = [each if re.fullmatch(r'"[^"]*"' + r"|'[^']*'", each) else quoted(each) for each in texts]
    return shlex.quote(f"{key}=[{','.join(items)}]")


def nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything, sections included."""
    for name in map(str, config):
        node = "???" if OmegaConf.is_missing(config, name) else config._get_node(name)
        yield f"{prefix}{name}", node
        if is_section(node):
            yield from nodes(node, f"{prefix}{name}.")


def is_section(node: Any) -> bool:
    """Whether a node is a dataclass of the schema, not a value (free-form dictionaries are values)."""
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict


def written(value: Any) -> str:
    """A default as an override says it: `null`, `true`, `[1,2]`."""
    if isinstance(value, str):
        return value
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value._value()
    return plain if isinstance(plain, str) else json.dumps(plain, separators=(",", ":")).replace('"', "")


def is_free_form(key: str, schema: type) -> bool:
    """Whether a dotted key is, or is inside, a dictionary of the schema that takes any key (`model.unet.*`)."""
    there = nodes(OmegaConf.structured(schema))
    free = [name for name, node in there if isinstance(node, DictConfig) and not is_section(node)]
    return any(key == name or key.startswith(f"{name}.") for name in free)
