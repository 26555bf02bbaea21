"""Files of `conf/` and overrides -> a typed config; every mistake in them -> one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune import UserError
from finetune.config.overrides import is_free_form, nodes, parse_override, quoted_list
from finetune.config.schema import ModelConfig

T = TypeVar("T")


def conf_dir() -> Path:
    """The folder of Hydra groups: inside the package in a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(config_name: str, overrides: Sequence[str], schema: type[T], folder: str = "") -> tuple[T, DictConfig]:
    """Compose `conf/<folder>/<config_name>.yaml` with Hydra overrides, typed by `schema`.

    Returns:
        The typed config and the same, resolved, as a `DictConfig` for saving.

    Raises:
        UserError: an unknown key or choice (with the nearest known ones), a value of the wrong type, a missing
            mandatory value.
    """
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    GlobalHydra.instance().clear()
    choices = groups(config_name, folder)
    with initialize_config_dir(str(conf_dir() / folder), version_base="1.3", job_name=config_name):
        checked = _check_keys(config_name, overrides, schema, choices)
        try:
            composed = hydra_compose(config_name, checked)
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise UserError(f"no value for {', '.join(missing)}: give {missing[0]}=...")
            OmegaConf.resolve(composed)
            for key, node in list(nodes(composed)):
                if not str(node).strip():  # as a path it would be the current folder
                    raise UserError(
                        f"{key} is empty (a shell variable that is not set?): give a value or leave it out"
                    )
                if str(node).startswith("~/"):  # the shell expands it at the start of a word alone
                    OmegaConf.update(composed, key, str(Path(str(node)).expanduser()))
            typed = OmegaConf.to_object(composed)
        except MissingConfigException as error:
            raise UserError(_missing_choice(error, choices)) from None
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_first_lines(error)) from None
    assert isinstance(typed, schema)
    model = getattr(typed, "model", None)
    if isinstance(model, ModelConfig) and model.pretrained is not None:
        composed.model.unet = model.unet = _of_pretrained(model.unet, overrides)
    return typed, composed


def _of_pretrained(unet: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What the overrides ask of a pretrained U-Net; what a choice says (the default is model=tiny) builds one anew.

    Raises:
        UserError: they ask something of the text encoder, which is not built either.
    """
    asked: list[str] = []
    for override in (parse_override(text)[0] for text in overrides):
        key, value = override.key_or_group, override.value()
        if key == "model.text_encoder" or key.startswith("model.text_encoder."):
            raise UserError(
                f"{key}={override.get_value_element_as_str()} has no effect: it is of a text encoder that is built "
                "anew, and model.pretrained has its own; leave it out"
            )
        if key == "model.unet":
            asked = list(value) if isinstance(value, dict) else []
        elif key.startswith("model.unet."):
            asked.append(key.split(".")[2])
    return {name: unet[name] for name in asked if name in unet}


def groups(config_name: str = "train", folder: str = "") -> dict[str, list[str]]:
    """Config groups of a root file and their choices: those that its defaults list names."""
    root = conf_dir() / folder
    listed = OmegaConf.load(root / f"{config_name}.yaml").defaults
    names = [str(name) for entry in listed if isinstance(entry, DictConfig) for name in entry]
    return {name: sorted(path.stem for path in (root / name).glob("*.yaml")) for name in names}


def _check_keys(
    config_name: str, overrides: Sequence[str], schema: type, choices: Mapping[str, list[str]]
) -> list[str]:
    """Refuse an override that names nothing, with the nearest name that does.

    Returns:
        The overrides, where those of free-form keys (`model.unet.*`) may add what is not there yet.
    """
    there = dict(nodes(OmegaConf.structured(schema)))
    names = {*there, *choices}
    checked = []
    for text in overrides:
        override, text = parse_override(text)
        key = override.key_or_group
        if override.is_sweep_override() or (key in choices and isinstance(override.value(), list)):
            raise UserError(f"'{text}' names several values: a run takes one")
        value = override.value()
        if isinstance(there.get(key), ListConfig) and isinstance(value, int | float):
            raise UserError(f"{key}={value} must be a list: '{key}=[{value}]'")
        if isinstance(there.get(key), ListConfig) and isinstance(value, str) and not value.startswith("${"):
            raise UserError(f"{key}={value} must be a list: {quoted_list(key, value)}")
        if override.is_delete() and key in names:
            raise UserError(
                f"'{text}' has no effect, what is left out has its defaults: give {key}=... another value instead"
            )
        free = is_free_form(key, schema)
        checked.append(f"++{text}" if free and text.startswith(key) else text)
        if key in names or free:
            continue
        nearest = difflib.get_close_matches(key, names, n=1) or [
            name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
        ]
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"`finetune {config_name} --help` lists the keys"
        raise UserError(f"unknown override '{key}': {hint}")
    return checked


def _missing_choice(error: MissingConfigException, known: Mapping[str, list[str]]) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if choices := known.get(group):
        nearest = difflib.get_close_matches(choice, choices, n=1)
        listed = f"choose one of {', '.join(choices)}"
        if nearest:  # a long list would hide the name that is meant
            listed = f"did you mean {nearest[0]}? " + (listed if len(listed) < 200 else "--help lists all of them")
        return f"{group}={choice} is not known: {listed}"
    return _first_lines(error)


# What OmegaConf says of a value of the wrong type: what it may be.
_TYPES = {
    r"could not be converted to Integer": "must be a whole number",
    r"could not be converted to Float": "must be a number",
    r"is not a valid bool": "must be true or false",
    r"is not Optional": "must have a value: leave it out for its default",
}


def _first_lines(error: Exception) -> str:
    """The message of a Hydra or OmegaConf error without its dump of types and environment hints."""
    told, text = error.__cause__ or error, str(error.__cause__ or error)
    key = getattr(told, "full_key", None)
    if key and re.search(r"Cannot assign \w+ to Dict|Cannot merge DictConfig with ListConfig", text):
        return f"{key} holds values by name: give {key}.NAME=VALUE"
    if key and "Cannot convert 'list'" in text:
        return f"{key} takes one value, no list"
    may_be = next((words for pattern, words in _TYPES.items() if pattern in text), None)
    if key and may_be:
        value = re.search(r"Value '(.*?)'", text)
        return f"{key}={value[1] if value else 'null'} {may_be}"
    cause = error.__cause__ if error.__cause__ and str(error.__cause__) != "None" else error
    noise = ("object_type", "reference_type", "Set the environment", "See https")
    lines = [line.strip() for line in str(cause).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(noise)).replace("full_key:", "key")
