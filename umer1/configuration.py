"""Dataclasses to command line and YAML: defaults < YAML file < flags, every problem reported at once.

A configuration is a dataclass of sections, each section a dataclass beside the code it configures.  The string under
a field is its help text.  Field names are unique over the sections, so a YAML file may be flat or grouped by section,
and a flag is the field's name with dashes: `tensor_model_parallel_size` <-> `--tensor-model-parallel-size`.

A field may be a list of a further dataclass: a list of maps in YAML, and the same on one line as a flag,
`--rewards '[{name: format, weight: 1.0}]'`.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from umer1.errors import ConfigError, UserError
from umer1.rules import cannot_be_looked_at

C = TypeVar("C")

# A boolean whose two states have names of their own: negative flag -> field.
NEGATIVE_FLAGS = {"freeze-vision": "train_vision"}


def field_help(section: type) -> dict[str, str]:
    """Help text of each field: the string literal that follows it in the class body."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    texts = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def sections(config_class: type) -> dict[str, type]:
    """Section name -> section dataclass."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def field_types(config_class: type) -> dict[str, tuple[str, Any]]:
    """Field name -> (section, type); a name may stand in one section only."""
    found: dict[str, tuple[str, Any]] = {}
    for section_name, section in sections(config_class).items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            assert field.name not in found, f"{field.name} stands in two sections"
            found[field.name] = (section_name, hints[field.name])
    return found


def convert(name: str, value: Any, wanted: Any) -> Any:
    """`value` (a YAML value or a flag's text) as `wanted`; ValueError, an argument for each fault, if it is not."""
    if _is_words(wanted):
        return _convert_words(name, value)
    if typing.get_origin(wanted) is list:
        return _convert_list(name, value, typing.get_args(wanted)[0])
    options = [wanted]
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        options = list(typing.get_args(wanted))
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in options:
            return None
        raise ValueError(f"{name} must not be empty")
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        legal = typing.get_args(kind)
        if value not in legal:
            raise ValueError(f"{name}={value!r} is not legal; use {' or '.join(map(str, legal))}")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(f"{name}={value!r} must be true or false")
    if kind is int:
        try:
            if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
                value = int(value)  # a float has not enough digits for every seed
            number = float(value) if not isinstance(value, bool) else float("nan")
            if number != int(number):
                raise ValueError
            return value if isinstance(value, int) else int(number)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name}={value!r} must be a whole number") from None
    if kind is float:
        # PyYAML reads 1e-4 as a string (YAML 1.1 wants 1.0e-4), so the field's type decides.
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}={value!r} must be a number") from None
    if kind is str:
        if isinstance(value, (dict, list)):
            raise ValueError(f"{name}={value!r} must be text")
        if not str(value).strip():  # an unset shell variable must not mean the default
            raise ValueError(f"{name} must not be empty")
        return _without_nul(name, str(value))
    raise AssertionError(f"{name}: no rule for {wanted}")


def _is_bool(wanted: Any) -> bool:
    """Whether a field is true or false, or left open."""
    return bool in (wanted, *typing.get_args(wanted))


def _is_words(wanted: Any) -> bool:
    """Whether a field takes several words: `list[str]`, or None."""
    return list[str] in (wanted, *typing.get_args(wanted))


def _convert_words(name: str, value: Any) -> list[str] | None:
    """A YAML list or one value, or the words that follow a flag."""
    if value is None or value in ("none", "null"):
        return None
    words = value if isinstance(value, list) else [value]
    if not words or any(isinstance(word, (dict, list, type(None))) or not str(word).strip() for word in words):
        raise ValueError(f"{name}={value!r} must be a word or a list of words, none of them empty")
    return [_without_nul(name, str(word)) for word in words]


def _without_nul(name: str, text: str) -> str:
    """YAML can spell the one character that no path and no argument of a program may hold."""
    if "\0" in text:
        raise ValueError(f"{name}={text!r} must not hold a NUL character")
    return text


def _convert_list(name: str, value: Any, item: type) -> list:
    """A list of maps, or its YAML text, as instances of the dataclass `item`."""
    fields = {field.name: field for field in dataclasses.fields(item)}
    rule = f"{name} must be a list of maps like [{{{', '.join(f'{key}: ...' for key in fields)}}}]"
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ValueError(f"{rule}; {value!r} is not valid YAML") from None
    if not isinstance(value, list):
        raise ValueError(f"{rule}; {value!r} is no list")
    hints = typing.get_type_hints(item)
    problems: list[str] = []
    items = []
    for number, entry in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(entry, dict):
            problems.append(f"{rule}; {where}={entry!r} is no map")
            continue
        known = {}
        for key, part in entry.items():
            if key not in fields:
                problems.append(f"unknown setting {where}.{key}; legal are {', '.join(fields)}")
                continue
            try:
                known[key] = convert(f"{where}.{key}", part, hints[key])
            except ValueError as error:
                problems += error.args
        absent = [key for key, field in fields.items() if _required(field) and key not in entry]
        problems += [f"{where}.{key} is missing" for key in absent]
        if not problems:
            items.append(item(**known))
    if problems:
        raise ValueError(*problems)
    return items


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _nearest(name: str, legal: list[str]) -> str:
    close = difflib.get_close_matches(name, legal, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; --help lists all"


def read_yaml(path: str | Path, config_class: type, problems: list[str]) -> dict[str, Any]:
    """Field -> raw value from a flat or sectioned YAML file; unknown keys go to `problems`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); give the path of a YAML file") from None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of no calendar; brackets without end
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected `name: value` lines, found a {type(content).__name__}")
    known, groups = field_types(config_class), sections(config_class)
    values: dict[str, Any] = {}

    def take(key: Any, value: Any, where: str) -> None:
        name = str(key).replace("-", "_")
        if name in known:
            values[name] = value
        elif name in (negative.replace("-", "_") for negative in NEGATIVE_FLAGS) and isinstance(value, bool):
            values[NEGATIVE_FLAGS[name.replace("_", "-")]] = not value
        else:
            problems.append(f"{path}: unknown setting {where}{key}{_nearest(name, list(known))}")

    for key, value in content.items():
        if key in groups and isinstance(value, dict):
            for inner, inner_value in value.items():
                if str(inner) in known and known[str(inner)][0] != key:
                    problems.append(f"{path}: {inner} belongs to section {known[str(inner)][0]}, not {key}")
                else:
                    take(inner, inner_value, f"{key}.")
        else:
            take(key, value, "")
    return values


def read_flags(argv: list[str], config_class: type, problems: list[str]) -> tuple[dict[str, Any], str | None]:
    """(field -> raw value, path given by --config); unknown or incomplete flags go to `problems`."""
    known = field_types(config_class)
    values: dict[str, Any] = {}
    config_path = None
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not token.startswith("--") or token == "--":
            problems.append(f"unexpected word {token!r}; settings are given as --name value")
            continue
        flag, has_value, inline = token[2:].partition("=")
        name = flag.replace("-", "_")
        negative = None
        if name not in known:
            if flag in NEGATIVE_FLAGS:
                negative = NEGATIVE_FLAGS[flag]
            elif name.startswith("no_") and name[3:] in known and _is_bool(known[name[3:]][1]):
                negative = name[3:]
        is_bool = name in known and _is_bool(known[name][1])
        if negative or (is_bool and not has_value):
            if negative and has_value:
                problems.append(f"--{flag} takes no value")
            values[negative or name] = not negative
            continue
        if name != "config" and name not in known:
            legal = [known_name.replace("_", "-") for known_name in (*known, "config")] + list(NEGATIVE_FLAGS)
            close = difflib.get_close_matches(flag, legal, n=1, cutoff=0.6)
            problems.append(f"unknown flag --{flag}" + (f"; did you mean --{close[0]}?" if close else "; see --help"))
            if not has_value and position < len(argv) and not argv[position].startswith("--"):
                position += 1
            continue
        if has_value:
            value = inline
        elif position < len(argv) and not argv[position].startswith("--"):
            value = argv[position]
            position += 1
            if name in known and _is_words(known[name][1]):
                value = [value]
                while position < len(argv) and not argv[position].startswith("--"):
                    value.append(argv[position])
                    position += 1
        else:
            problems.append(f"--{flag} needs a value")
            continue
        if name == "config":
            config_path = value
        else:
            values[name] = value
    return values, config_path


def load_config(
    config_class: type[C],
    argv: list[str],
    default_config: str | Path | None = None,
    further: Callable[[C], list[str]] = lambda config: [],
) -> C:
    """Defaults < YAML (`--config`, or `default_config` when no flag says where data or model are) < flags.

    further: rules that need files, asked once the values are known.
    Raises ConfigError with every unknown name, wrong type and failed rule at once.
    """
    problems: list[str] = []
    flags, config_path = read_flags(argv, config_class, problems)
    if config_path is None and default_config is not None and not {"data_path", "hf_model"} & set(flags):
        config_path = str(default_config)
    raw = read_yaml(config_path, config_class, problems) if config_path else {}
    raw |= flags
    grouped: dict[str, dict[str, Any]] = {name: {} for name in sections(config_class)}
    for name, value in raw.items():
        section, wanted = field_types(config_class)[name]
        try:
            grouped[section][name] = convert(name, value, wanted)
        except ValueError as error:
            problems += error.args
    config = config_class()  # its defaults: a stage may have other ones than its sections
    for name, given in grouped.items():
        setattr(config, name, dataclasses.replace(getattr(config, name), **given))
    problems += _broken(config.violations)
    problems += [problem for problem in _broken(lambda: further(config)) if problem not in problems]
    if problems:
        raise ConfigError(problems)
    return config


def _broken(rules: Callable[[], list[str]]) -> list[str]:
    """What they say; what the system refused to a rule that expected no refusal is a problem too."""
    try:
        return rules()
    except OSError as error:
        return [cannot_be_looked_at(error.filename or "a path", error)]


def to_yaml(config: Any) -> str:
    """The resolved configuration, grouped by section; `read_yaml` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _shown(value: Any) -> str:
    """A default as one would type it."""
    if not isinstance(value, list) or not all(map(dataclasses.is_dataclass, value)):
        return " ".join(value) if isinstance(value, list) else str(value)
    return yaml.safe_dump(
        list(map(dataclasses.asdict, value)), default_flow_style=True, sort_keys=False, width=10**6
    ).strip()


def _legal_values(hint: Any) -> tuple:
    """Of a Literal, or a Literal or None; () of any other type."""
    literals = [option for option in (hint, *typing.get_args(hint)) if typing.get_origin(option) is typing.Literal]
    return typing.get_args(literals[0]) if literals else ()


def help_text(config_class: type, intro: str) -> str:
    """`--help`: the intro, then each section's flags with legal values where they are few, default and meaning."""
    lines = [intro.strip(), "", "Settings: --name value, or a YAML file of `name: value` lines given by --config.", ""]
    for section_name, section in sections(config_class).items():
        lines.append(f"{section_name}: {(section.__doc__ or '').strip().splitlines()[0]}")
        texts = field_help(section)
        hints = typing.get_type_hints(section)
        defaults = getattr(config_class(), section_name)
        for field in dataclasses.fields(section):
            flag = "--" + field.name.replace("_", "-")
            if _is_bool(hints[field.name]):
                negative = next((n for n, f in NEGATIVE_FLAGS.items() if f == field.name), f"no-{flag[2:]}")
                flag = f"{flag} / --{negative}"
            if legal := _legal_values(hints[field.name]):
                flag = f"{flag} {'|'.join(map(str, legal))}"
            lines.append(f"  {flag}  (default: {_shown(getattr(defaults, field.name))})")
            lines += textwrap.wrap(texts.get(field.name, ""), 110, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines)
