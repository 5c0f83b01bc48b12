"""The flags of the settings tree, made from its fields so that the two cannot diverge."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from flexpert.config import Config, load_config, parse_bytes, parse_duration
from flexpert.errors import ConfigError
from flexpert.reading import shown

# what a field without a description of its own means
_HELP = {
    "model.dtype": "arithmetic and weights; auto: the checkpoint's",
    "server.host": "address to listen on",
    "server.log_level": "least severity that is logged",
}

# what no complaint repeats
_SECRET = frozenset({"server.api_key", "server.control_key", "server.tls_key_password"})

# further names, of vLLM
_ALIASES = {"server.tls_cert_file": "--ssl-certfile", "server.tls_key_file": "--ssl-keyfile"}


_LONGEST_CHOICES = 48  # characters: more of them are for the documentation


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting on the command line. path: in the tree, dotted."""

    path: str
    name: str
    help: str
    metavar: str
    default: str | None
    boolean: bool
    panel: str

    @property
    def parameter(self) -> str:
        return self.path.replace(".", "__")

    def option(self) -> Any:
        name = f"{self.name}/--no-{self.name[2:]}" if self.boolean else self.name
        alias = _ALIASES.get(self.path)
        return typer.Option(
            *((name, alias) if alias else (name,)),
            help=f"{self.help} (default: {self.default})" if self.default else self.help,
            metavar=None if self.boolean else self.metavar,
            show_default=False,
            rich_help_panel=self.panel,
        )


def flags() -> list[Flag]:
    """Every setting, in the tree's order.

    Raises:
        ConfigError: two sections have a setting of the same name, which would share a flag.
    """
    found: dict[str, Flag] = {}
    for section, outer in Config.model_fields.items():
        tree = outer.annotation
        if not (isinstance(tree, type) and issubclass(tree, BaseModel)):
            continue
        panel = (inspect.getdoc(tree) or section).splitlines()[0].rstrip(".")
        for name, field in tree.model_fields.items():
            flag = _flag(f"{section}.{name}", field, panel)
            if flag.name in found:
                raise ConfigError(f"{flag.path} and {found[flag.name].path} share {flag.name}")
            found[flag.name] = flag
    return list(found.values())


def _flag(path: str, field: FieldInfo, panel: str) -> Flag:
    kind = _plain_type(field.annotation)
    default = field.default
    readers = _readers(field)
    is_duration, is_size = parse_duration in readers, parse_bytes in readers
    if get_origin(kind) is Literal:
        choices = "|".join(map(str, get_args(kind)))
        metavar = choices if len(choices) <= _LONGEST_CHOICES else "NAME"
    elif is_size:
        metavar = "SIZE"
    elif is_duration:
        metavar = "DURATION"
    else:
        names = {int: "N", float: "NUMBER", Path: "FILE"}
        metavar = names.get(kind, "TEXT")
    if is_size and isinstance(default, int):
        shown: str | None = _size(default)
    elif is_duration:
        shown = f"{default:g}s"
    elif isinstance(default, bool):
        shown = "on" if default else "off"
    else:
        shown = None if default is None else f"{default:g}" if kind is float else str(default)
    return Flag(
        path=path,
        name="--" + path.split(".")[1].replace("_", "-"),
        help=field.description or _HELP.get(path, ""),
        metavar=metavar,
        default=shown,
        boolean=kind is bool,
        panel=panel,
    )


def _readers(field: FieldInfo) -> list[object]:
    """The functions that read a field's text; also those of `X | None`."""
    within = [item for arg in get_args(field.annotation) for item in get_args(arg)]
    return [item.func for item in (*field.metadata, *within) if isinstance(item, BeforeValidator)]


def _plain_type(annotation: Any) -> Any:
    """Without None and Annotated."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, UnionType):
            annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
        else:
            return annotation


def _size(size: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % 2**shift == 0:
            return f"{size >> shift}{unit}"
    return str(size)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for every setting, `--config FILE`, and the model as an argument,
    handed to it as `config`."""
    every = flags()
    own = inspect.signature(command, eval_str=True).parameters

    def wrapped(**values: Any) -> None:
        file, model = values.pop("config_file"), values.pop("model")
        overrides = {flag.path: values.pop(flag.parameter) for flag in every}
        if model is not None and overrides["model.model"] is not None:
            raise ConfigError("the model is named twice, by itself and with --model; leave one out")
        overrides["model.model"] = overrides["model.model"] if model is None else model
        command(config=settings(file, overrides), **values)

    parameters = [p for name, p in own.items() if name != "config"]
    argument = typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
    parameters.append(_parameter("model", str | None, argument))
    parameters.append(
        _parameter(
            "config_file",
            Path | None,
            typer.Option(
                "--config", metavar="FILE", help="YAML or JSON with the sections of the settings"
            ),
        )
    )
    for flag in every:
        kind = bool | None if flag.boolean else str | None
        parameters.append(_parameter(flag.parameter, kind, flag.option()))
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    return wrapped


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, option],
    )


def settings(file: Path | None, overrides: Mapping[str, Any]) -> Config:
    """`load_config`, whose complaints name the flags that were given rather than their paths.

    Raises:
        ConfigError
    """
    try:
        return load_config(file=file, overrides=overrides)
    except ConfigError as error:
        message = str(error)
        for path, value in overrides.items():
            if value is not None:
                flag = "--" + path.split(".")[1].replace("_", "-")
                given = flag if path in _SECRET else f"{flag} {shown(value)}"
                # not re.sub, which would read what was given for a pattern's replacement
                message = f"{given}:".join(re.split(rf"\b{re.escape(path)}:", message))
        raise ConfigError(message) from None
