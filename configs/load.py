"""Read a cluster file. The only door of YAML.

Promises: a value of the schema, or one InvalidConfig that names the key, the line, the reason and
the remedy. Nothing is guessed: an unknown or repeated key is an error, and no value is converted
beyond a whole number given for a number and a size given with its unit.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .errors import InvalidConfig
from .plan_schema import PlanConfig
from .rules import check_rules
from .schema import ClusterConfig
from .values import check_value

MAX_DEPTH = 8  # no schema is deeper; a YAML alias to its own parent is

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar or list, and where it was written."""

    value: object
    at: str


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping, and where it was written."""

    entries: dict[str, Leaf | Section]
    at: str


def load_cluster(path: Path | str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The cluster file at `path` with each "key.path=value" of `overrides` set over it.

    Paths in the file are relative to the file, paths in overrides to the working directory.
    """
    config = load_file(ClusterConfig, Path(path), overrides)
    check_rules(config)
    return config


def load_plan(path: Path | str, overrides: Sequence[str] = ()) -> PlanConfig:
    """The plan file at `path`, in the same way. Contradictions are found by the planner."""
    return load_file(PlanConfig, Path(path), overrides)


def section_names(path: Path | str) -> frozenset[str]:
    """What stands at the top of a YAML file, known or not."""
    path = Path(path)
    return frozenset(_parse(_read(path), path.name).entries)


def dump(sections: Mapping[str, Mapping[str, Any]], heading: str = "") -> str:
    """A cluster file: a line a section, as in the examples, below `heading` as comments."""
    comments = "".join(f"# {line}".rstrip() + "\n" for line in heading.splitlines())
    width = max(map(len, sections)) + 1
    lines = []
    for name, values in sections.items():
        flow = yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=10_000)
        lines.append(f"{name + ':':<{width}} {flow.strip()}\n")
    return comments + "".join(lines)


def load_file(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The file at `path` as the dataclass `cls`, whose sections are dataclasses."""
    tree = _parse(_read(path), path.name)
    for override in overrides:
        key, value = _parse_override(override)
        _put(tree, key.split("."), value, key)
    return _build(cls, cls, tree, "", path.resolve().parent)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidConfig(str(path), "no such file", "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(str(path), f"cannot be read: {error}", "check the file") from error


def _parse(text: str, name: str) -> Section:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "cannot be parsed"
        line = "" if mark is None else f"{name} line {mark.line + 1}"
        raise InvalidConfig(name, f"is not YAML: {reason}", "mend the line", at=line) from None
    if not isinstance(node, MappingNode):
        raise InvalidConfig(name, "holds no keys", 'start with "model: {path: FOLDER}"')
    tree = _tree(node, "", name)
    assert isinstance(tree, Section)
    return tree


def _tree(node: Node, key: str, name: str) -> Leaf | Section:
    """A node with its lines; repeated keys are refused, which YAML's own loader lets pass."""
    at = _place(name, node)
    if key.count(".") > MAX_DEPTH:
        raise InvalidConfig(key[:60], "is nested too deeply", "remove it", at=at)
    if not isinstance(node, MappingNode):
        return Leaf(_scalar(node, key, at), at)
    entries: dict[str, Leaf | Section] = {}
    for key_node, value_node in node.value:
        line = _place(name, key_node)
        word = _scalar(key_node, key, line)
        path = _join(key, str(word))
        if not isinstance(word, str):
            raise InvalidConfig(path, "a key is a word", "write a word of the schema", at=line)
        if word in entries:
            raise InvalidConfig(path, "is given twice", "keep one of the two", at=line)
        entries[word] = _tree(value_node, path, name)
    return Section(entries, at)


def _place(name: str, node: Node) -> str:
    return name if name == "--set" else f"{name} line {node.start_mark.line + 1}"


def _scalar(node: Node, key: str, at: str) -> object:
    """Raises InvalidConfig for a list or for a tag that plain YAML does not know."""
    if isinstance(node, ScalarNode):
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            problem = getattr(error, "problem", None) or str(error)
            raise InvalidConfig(key, problem, "write a plain value", at=at) from None
        finally:
            loader.dispose()
    what = "a list" if isinstance(node, SequenceNode) else "a mapping"
    raise InvalidConfig(key, f"{what} stands where one value belongs", "give one value", at=at)


def _parse_override(text: str) -> tuple[str, Leaf | Section]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InvalidConfig(f"--set {text}", "is not key.path=value", "as in --set kv.memory=1GiB")
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        reason = f"{value!r} is not a YAML value"
        raise InvalidConfig(key, reason, "quote it", at="--set") from error
    if node is None:
        return key, Leaf(None, "--set")
    return key, _tree(node, key, "--set")


def _put(tree: Section, path: list[str], value: Leaf | Section, key: str) -> None:
    for word in path[:-1]:
        below = tree.entries.setdefault(word, Section({}, "--set"))
        if isinstance(below, Leaf):
            if below.value is not None:
                raise InvalidConfig(key, f"{word} is no section", "check the key", at="--set")
            below = tree.entries[word] = Section({}, "--set")
        tree = below
    tree.entries[path[-1]] = value


def _build(root: Any, cls: Any, section: Section, key: str, folder: Path) -> Any:
    hints = get_type_hints(cls, include_extras=True)
    for word, entry in section.entries.items():
        if word not in hints:
            raise _unknown(root, cls, _join(key, word), entry.at)
    values = {}
    for field in dataclasses.fields(cls):
        path = _join(key, field.name)
        if field.name in section.entries:
            entry = section.entries[field.name]
            values[field.name] = _value(root, hints[field.name], entry, path, folder)
        elif dataclasses.is_dataclass(hints[field.name]) and not _has_default(field):
            empty = Section({}, section.at)
            values[field.name] = _build(root, hints[field.name], empty, path, folder)
        elif not _has_default(field):
            raise InvalidConfig(path, "is missing", "give it a value", at=section.at)
    return cls(**values)


def _value(root: Any, hint: Any, entry: Leaf | Section, key: str, folder: Path) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(entry, Leaf) and entry.value is None:
            entry = Section({}, entry.at)  # "kv:" with nothing behind it
        if isinstance(entry, Leaf):
            words = ", ".join(field.name for field in dataclasses.fields(hint))
            raise InvalidConfig(key, "is a section", f"give keys below it: {words}", at=entry.at)
        return _build(root, hint, entry, key, folder)
    if get_origin(hint) is Mapping:
        return _named(root, get_args(hint)[1], entry, key, folder)
    if isinstance(entry, Section):
        raise InvalidConfig(key, "is one value, not a section", "give one value", at=entry.at)
    base = Path.cwd() if entry.at == "--set" else folder
    return check_value(hint, entry.value, key, at=entry.at, folder=base)


def _named(root: Any, hint: Any, entry: Leaf | Section, key: str, folder: Path) -> dict[str, Any]:
    """A section whose keys are names of the writer's own; `Any`: checked by who understands it."""
    if isinstance(entry, Leaf) or not entry.entries:
        raise InvalidConfig(key, "is a section", "give keys below it", at=entry.at)
    if hint is Any:
        return _plain(entry)
    return {
        name: _value(root, hint, below, _join(key, name), folder)
        for name, below in entry.entries.items()
    }


def _plain(section: Section) -> dict[str, Any]:
    return {
        name: below.value if isinstance(below, Leaf) else _plain(below)
        for name, below in section.entries.items()
    }


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _unknown(root: Any, cls: Any, key: str, at: str) -> InvalidConfig:
    """The nearest key of the same section, else the nearest anywhere, by spelling."""
    prefix, _, word = key.rpartition(".")
    siblings = [field.name for field in dataclasses.fields(cls)]
    near = [_join(prefix, name) for name in difflib.get_close_matches(word, siblings, 1, 0.6)]
    everywhere = list(key_paths(root))
    near += [path for path in everywhere if path.rpartition(".")[2] == word]
    near += difflib.get_close_matches(key, everywhere, 1, 0.0)
    return InvalidConfig(
        key, "unknown key", f"the nearest valid key is {near[0]}", at=at, nearest=near[0]
    )


def key_paths(cls: Any, prefix: str = "") -> Iterator[str]:
    """Every key path of a schema, sections before what they hold."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        path = _join(prefix, name)
        yield path
        below = get_args(hint)[1] if get_origin(hint) is Mapping else hint
        if dataclasses.is_dataclass(below):
            yield from key_paths(below, path if below is hint else f"{path}.NAME")


def _join(prefix: str, word: str) -> str:
    return f"{prefix}.{word}" if prefix else word
