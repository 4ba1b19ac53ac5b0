"""Configuration: frozen dataclasses, read from strict YAML whose errors carry file and line,
written back as YAML.

    loss.yaml:5: unknown key 'loss.temprature'. Did you mean 'loss.temperature'?

YAML 1.1 reads `1e-4` as a string and `no` as False; here the field's type decides, so both mean
what they look like. Precedence is flags over YAML over defaults; a default is written once, in its
dataclass.
"""

import dataclasses
import difflib
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from xinslm.display import hide_passwords
from xinslm.errors import UsageError
from xinslm.hints import alternatives, to_value

HEADER = "# Resolved configuration."
"""How a file that `to_yaml` wrote begins."""


def from_yaml(cls: type, paths: list[Path], missing: Any) -> Any:
    """Read YAML files, later over earlier, into an instance of dataclass `cls`.

    Fields that no file gives keep their defaults; those without a default become `missing`. All
    errors of all files are collected and raised as one UsageError, a line each.
    """
    errors: list[str] = []
    values: dict[str, Any] = {}
    for path in paths:
        node = _compose(path)
        if node is not None:
            _read_mapping(cls, node, "", path, errors, values)
    if errors:
        raise UsageError("\n".join(errors))
    return _build(cls, values, missing)


def _compose(path: Path) -> yaml.Node | None:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path}: not UTF-8 text") from None
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None


def _read_mapping(
    cls: type, node: yaml.Node, prefix: str, path: Path, errors: list[str], values: dict[str, Any]
) -> None:
    """Read a YAML mapping into `values`, the fields of dataclass `cls` by name, nested as the
    classes are.
    """
    if not isinstance(node, yaml.MappingNode):
        errors.append(
            f"{path}:{node.start_mark.line + 1}: {prefix or 'the file'} must be keys and values"
        )
        return
    hints = typing.get_type_hints(cls)
    seen: set[str] = set()
    for key_node, value_node in node.value:
        name = str(key_node.value)
        key, where = name.replace("-", "_"), f"{path}:{key_node.start_mark.line + 1}"
        full = f"{prefix}.{name}" if prefix else name
        if key not in hints:
            errors.append(f"{where}: unknown key '{full}'.{_suggest(key, prefix, cls)}")
        elif key in seen:
            errors.append(f"{where}: key '{full}' stands twice")
        elif is_dataclass(hints[key]):
            _read_mapping(hints[key], value_node, full, path, errors, values.setdefault(key, {}))
        else:
            try:
                values[key] = _convert(hints[key], value_node)
            except ValueError as error:
                errors.append(f"{path}:{value_node.start_mark.line + 1}: '{full}' {error}")
        seen.add(key)


def _suggest(key: str, prefix: str, cls: type) -> str:
    """Name the nearest existing key, in this section or, failing that, a key of that name in a
    deeper one.
    """
    near = difflib.get_close_matches(key, [f.name for f in fields(cls)], n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{prefix + '.' if prefix else ''}{near[0]}'?"
    for section, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and is_dataclass(hint):
            inner = difflib.get_close_matches(key, [f.name for f in fields(hint)], n=1, cutoff=0.8)
            if inner:
                return f" Did you mean '{prefix + '.' if prefix else ''}{section}.{inner[0]}'?"
    return f" Known keys: {', '.join(f.name for f in fields(cls))}"


def _convert(hint: Any, node: yaml.Node) -> Any:
    """Turn a YAML value into the type `hint` asks for, or raise ValueError saying what it must
    be.
    """
    options, is_scalar = alternatives(hint), isinstance(node, yaml.ScalarNode)
    is_null = is_scalar and node.tag.endswith(":null")
    if is_null and type(None) in options:
        return None
    (hint,) = (option for option in options if option is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError("must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item) for item in node.value)
    if not is_scalar:
        raise ValueError("must be a single value")
    if is_null and hint is not str and typing.get_origin(hint) is not Literal:
        raise ValueError("has no value")
    return to_value(hint, node.value)


def _build(cls: type, values: dict[str, Any], missing: Any, base: Any = None) -> Any:
    """Make the dataclass from nested dicts, over the values of `base`; what neither a file nor a
    default gives becomes `missing`.
    """
    hints, arguments = typing.get_type_hints(cls), {}
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            inner = None if base is None else getattr(base, field.name)
            if base is None and field.default_factory is not MISSING:
                inner = field.default_factory()
            arguments[field.name] = _build(
                typing.cast(type, hint), values.get(field.name, {}), missing, inner
            )
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif base is not None:
            arguments[field.name] = getattr(base, field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            arguments[field.name] = missing
    return cls(**arguments)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain JSON-able values: paths become strings, tuples lists.

    Passwords in URLs are hidden: what is returned is stored in manifests and run folders.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, str):
            return hide_passwords(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def to_yaml(config: Any, command: str) -> str:
    """Write a configuration as YAML that `xinslm COMMAND --config FILE` reads back to an equal
    one.
    """
    body = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    return f"{HEADER} Run it again with: xinslm {command} --config THIS_FILE\n{body}"
