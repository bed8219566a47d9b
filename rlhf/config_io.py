"""RunConfig from YAML files and overrides, and back to text. Nothing else reads a config file.

Every value keeps the file and line it came from until it has passed, so that a mistake can be
shown where it was made; all mistakes are reported together, one a line. Text never becomes a
number, nor `true` a 1: YAML's own types must fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError

from rlhf.config import (
    STANDARD_FLOORS,
    STANDARD_PROTECTED,
    STANDARD_WEIGHTS,
    RunConfig,
    Section,
)
from rlhf.errors import InputError

NEUTRAL = (
    "run.name",
    "run.directory",
    "rollout.memory_gib",
    "rollout.gpu_memory_share",
    "learner.checkpoint_steps",
    "rounds.count",
    "tracking",
)
"""Settings (a section stands for all its keys) that can't change what a round holds, so a run may
be resumed with others. `rounds.count` is one: no round looks at how many follow it, so another
count only lengthens or shortens the run. `rollout.max_concurrency` is none: what is decoded
together changes an engine's rounding, and with it the samples."""

Path_ = tuple[str | int, ...]
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True, slots=True)
class _Node:
    """A YAML value that knows its place: `configs/demo.yaml:12` or `command line: --a.b`."""

    value: Any
    """A scalar, a list of nodes, or a dict of nodes."""
    place: str

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain for child in self.value]
        return self.value

    def at(self, path: Path_) -> _Node:
        """The node at `path`, or the deepest one on the way there that exists."""
        node = self
        for part in path:
            inside = (isinstance(node.value, dict) and part in node.value) or (
                isinstance(node.value, list) and isinstance(part, int) and part < len(node.value)
            )
            if not inside:
                break
            node = node.value[part]
        return node


class _Loader(yaml.SafeLoader):
    """YAML 1.1 less its surprises: no dates, octals or base 60; `5e-6` is a number."""


_Loader.yaml_implicit_resolvers = {}
_INTEGER = r"[-+]?(?:0|[1-9][0-9_]*)"
_NUMBER = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    ("int", _INTEGER, list("-+0123456789")),
    ("float", rf"{_NUMBER}|[-+]?\.(?i:inf)|\.(?i:nan)", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


@dataclass
class _Reader:
    """Turns one YAML text into nodes; what is wrong with it goes to `problems`."""

    place: Callable[[int], str]
    """Line from 1 -> place."""
    problems: list[str] = field(default_factory=list)

    def read(self, text: str, path: Path_ = ()) -> _Node | None:
        """The text's only document; None if it isn't YAML. Empty text is an empty document."""
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
                return None if root is None else self._node(loader, root, path, None, ())
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            self.problems.append(f"invalid YAML ({self.place(line)}): {error.problem}; correct it")
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.problems.append(f"invalid YAML ({self.place(1)}): {reason}; correct it")
        return None

    def _node(
        self,
        loader: _Loader,
        node: yaml.Node,
        path: Path_,
        line: int | None,
        above: tuple[int, ...],
    ) -> _Node:
        place = self.place((node.start_mark.line if line is None else line) + 1)
        if id(node) in above:
            problem = f"{dotted(path)} is an alias to itself"
            raise ComposerError(None, None, problem, node.start_mark)
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            children: dict[str, _Node] = {}
            for key_node, value in node.value:
                # Keys are names, also where YAML would read a number or a truth value into them.
                key, start = str(key_node.value), key_node.start_mark.line
                child = self._node(loader, value, (*path, key), start, above)
                if key in children:
                    self.problems.append(
                        f"{dotted((*path, key))} is given twice ({children[key].place} and "
                        f"{child.place}); keep one"
                    )
                children[key] = child
            return _Node(children, place)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self._node(loader, item, (*path, i), None, above)
                for i, item in enumerate(node.value)
            ]
            return _Node(items, place)
        value = loader.construct_object(node)
        if isinstance(value, float) and not math.isfinite(value):
            # No setting may be infinite or NaN: left as text, it fails as a number must.
            value = str(node.value)
        return _Node(value, place)


def load(paths: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """The config that these files and overrides make, merged left to right.

    Mappings merge key by key, everything else replaces. An override is a dotted key and a YAML
    value: `("rollout.temperature", "0.7")`, `("judges.panel.0.name", "house")`; where the setting
    is text, the value is taken as it stands.

    Raises InputError with all that is wrong, one a line: field, rule, value, place, remedy.
    """
    root = _Node({}, ", ".join(map(str, paths)) or "command line")
    problems: list[str] = []
    unreadable = False
    for path in paths:
        reader = _Reader(lambda line, path=path: f"{path}:{line}")  # type: ignore[misc]
        node = _file(path, reader)
        problems += reader.problems
        if node is None:
            unreadable = True
        else:
            root = _merge(root, replace(node, place=root.place))
    for key, text in overrides:
        reader = _Reader(lambda line, key=key: f"command line: --{key}")  # type: ignore[misc]
        node = _override(key, text, reader)
        problems += reader.problems
        if node is None:
            unreadable = True
        else:
            root = replace(_put(root, key.split("."), node), place=root.place)
    if unreadable:
        # What a missing file would have set can't be judged, so it isn't reported as missing.
        raise InputError("\n".join(problems))
    try:
        config = RunConfig.model_validate(root.plain, strict=True)
    except ValidationError as error:
        problems += [_explain(detail, root) for detail in error.errors()]
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return config


def _file(path: Path, reader: _Reader) -> _Node | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        reader.problems.append(f"config file {path} does not exist; check the path")
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        reader.problems.append(f"config file {path} can't be read: {reason}; give a YAML file")
        return None
    before = len(reader.problems)
    node = reader.read(text)
    if node is None and len(reader.problems) > before:
        return None
    if node is None or node.value is None:
        return _Node({}, str(path))
    if not isinstance(node.value, dict):
        reader.problems.append(
            f"config file {path} must hold a mapping of sections, found {_show(node.plain)} "
            f"({node.place}); start it with a section such as `model:`"
        )
        return None
    return node


def _override(key: str, text: str, reader: _Reader) -> _Node | None:
    path = tuple(key.split("."))
    known, annotation, _ = _resolve(path)
    options = _options(annotation)
    if len(known) == len(path) and str in options:
        if type(None) in options and text in ("null", "~"):
            return _Node(None, reader.place(1))
        return _Node(text, reader.place(1))
    before = len(reader.problems)
    node = reader.read(text, path)
    if node is None and len(reader.problems) == before:
        return _Node(None, reader.place(1))
    return node


def _merge(old: _Node, new: _Node) -> _Node:
    if not (isinstance(old.value, dict) and isinstance(new.value, dict)):
        return new
    merged = {
        key: _merge(old.value[key], child) if key in old.value else child
        for key, child in new.value.items()
    }
    return _Node({**old.value, **merged}, new.place)


def _put(tree: _Node, path: Sequence[str], new: _Node) -> _Node:
    """`tree` with `new` merged in at `path`; a number on the way is an index into a list."""
    if not path:
        return _merge(tree, new)
    head, rest = path[0], path[1:]
    if isinstance(tree.value, list) and head.isdecimal() and int(head) < len(tree.value):
        items = list(tree.value)
        items[int(head)] = _put(items[int(head)], rest, new)
        return replace(tree, value=items)
    children = tree.value if isinstance(tree.value, dict) else {}
    child = _put(children.get(head, _Node({}, new.place)), rest, new)
    return _Node({**children, head: child}, new.place)


def dotted(path: Path_) -> str:
    """`("judges", "panel", 0, "name")` -> `judges.panel.0.name`; the root is `the config`."""
    return ".".join(map(str, path)) or "the config"


def _options(annotation: Any) -> list[Any]:
    """What a union allows, bare of Annotated; one entry for anything else."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for option in get_args(annotation) for inner in _options(option)]
    return [annotation]


def _resolve(path: Path_) -> tuple[Path_, Any, FieldInfo | None]:
    """How much of `path` the config knows, with the type and, if it is a setting, field there."""
    known: Path_ = ()
    annotation: Any = RunConfig
    info: FieldInfo | None = None
    for part in path:
        inner = [o for o in _options(annotation) if o is not type(None)]
        base = inner[0] if len(inner) == 1 else None
        if isinstance(base, type) and issubclass(base, Section) and part in base.model_fields:
            info = base.model_fields[str(part)]
            annotation = _annotated(info)
        elif get_origin(base) is list and str(part).isdecimal():
            annotation, info = get_args(base)[0], None
        elif get_origin(base) is dict and not str(part).startswith("["):
            annotation, info = get_args(base)[1], None
        else:
            break
        known = (*known, part)
    return known, annotation, info


def _annotated(info: FieldInfo) -> Any:
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _rule(annotation: Any) -> str:
    """A type and its bounds in words: `a number > 0 and <= 2`."""
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
        flat = [m for item in metadata for m in getattr(item, "metadata", [item])]
        return f"{_rule(base)} {' and '.join(filter(None, map(_bound, flat)))}".strip()
    options = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(_rule, options))
    if get_origin(annotation) is Literal:
        return f"{'one of ' if len(options) > 1 else ''}{', '.join(map(str, options))}"
    if get_origin(annotation) is list:
        return f"a list, each {_rule(options[0])}"
    if get_origin(annotation) is dict:
        return f"a mapping of names, each to {_rule(options[1])}"
    if annotation is type(None):
        return "null"
    return _WORDS.get(annotation, "a mapping of settings")


def _bound(metadata: Any) -> str:
    for name, sign in _SIGNS.items():
        if hasattr(metadata, name):
            return f"{sign} {getattr(metadata, name)}"
    if hasattr(metadata, "min_length"):
        return f"(at least {metadata.min_length} long)"
    pattern = getattr(metadata, "pattern", None)
    return f"matching {pattern}" if pattern else ""


def _explain(detail: ErrorDetails, root: _Node) -> str:
    """One line for one pydantic error: field, rule, value found, place, remedy."""
    known, annotation, info = _resolve(detail["loc"])
    node = root.at(known)
    if detail["type"] == "extra_forbidden":
        return _unknown(known, str(detail["loc"][-1]), annotation, root)
    if detail["type"] == "missing":
        return (
            f"{dotted(known)} is missing ({root.at(known[:-1]).place}); "
            f"it must be {_rule(annotation)}"
        )
    if detail["type"] == "value_error":
        return _broken_rule(known, str(detail["ctx"]["error"]), root)
    remedy = _remedy(node.plain, annotation, info)
    return (
        f"{dotted(known)} must be {_rule(annotation)}, found {_show(node.plain)} "
        f"({node.place}); {remedy}"
    )


def _unknown(section: Path_, key: str, annotation: type[Section], root: _Node) -> str:
    path = (*section, key)
    near = get_close_matches(key, annotation.model_fields, n=1)
    homes = suggest(key)
    if near:
        remedy = f"did you mean {near[0]}?"
    elif homes:
        remedy = f"did you mean {' or '.join(homes)}?"
    else:
        remedy = f"known here: {', '.join(annotation.model_fields)}"
    return f"unknown key {dotted(path)} ({root.at(path).place}); {remedy}"


def _broken_rule(section: Path_, message: str, root: _Node) -> str:
    """A section's own rule; where its message opens with a setting, that setting's place."""
    opening = message.split(" ", 1)[0].split(".")
    for path in ((*section, *opening), tuple(opening)):
        if len(_resolve(path)[0]) == len(path):
            rest = message.split(" ", 1)[1]
            return f"{dotted(path)} {rest} ({root.at(path).place})"
    return f"{dotted(section)}: {message} ({root.at(section).place})"


def _remedy(value: Any, annotation: Any, info: FieldInfo | None) -> str:
    options = _options(annotation)
    choices = [str(c) for o in options if get_origin(o) is Literal for c in get_args(o)]
    near = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    if near:
        return f"did you mean {near[0]}?"
    if isinstance(value, bool | int | float) and str in options:
        return "put it in quotes if it is meant as text"
    if isinstance(value, str) and re.fullmatch(rf"{_NUMBER}|{_INTEGER}", value):
        return "write it without quotes, as a finite number"
    if value in ("true", "false"):
        return "write it without quotes"
    if info is not None and not info.is_required():
        default = info.get_default(call_default_factory=True)
        if not isinstance(default, Section):
            return f"leave it out for the default, {_show(default)}"
        return "leave it out for the defaults"
    return "`pairloop config` lists every setting"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def leaves(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting; settings of list items stand under `name[]`."""
    for name, info in section.model_fields.items():
        inner, mark = _inside(info)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from leaves(inner, f"{prefix}{name}{mark}.")


def suggest(name: str) -> list[str]:
    """The settings whose last part is, or is most like, `name`: `temprature` -> its full key."""
    found = [(leaf, leaf.rsplit(".", 1)[-1]) for leaf in leaves() if "[]" not in leaf]
    near = get_close_matches(name.replace("-", "_"), [last for _, last in found], n=1, cutoff=0.75)
    return [leaf for leaf, last in found if last in near]


def _inside(info: FieldInfo) -> tuple[type[Section] | None, str]:
    """The section that a field holds, with `[]` if it is a list of them."""
    base, mark = _options(info.annotation)[0], ""
    if get_origin(base) is list:
        base, mark = _options(get_args(base)[0])[0], "[]"
    return (base, mark) if isinstance(base, type) and issubclass(base, Section) else (None, "")


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config as JSON-ready data in field order, defaults that depend on others filled in.

    Loading it gives a config that behaves the same.
    """
    data = config.model_dump(mode="json")
    data["learner"]["learning_rate"] = config.learning_rate
    standard = (
        ("weights", STANDARD_WEIGHTS),
        ("floors", STANDARD_FLOORS),
        ("protected", STANDARD_PROTECTED),
    )
    for name, values in standard:
        if data["selection"][name] is None:
            scored = config.judges.dimensions
            data["selection"][name] = {d: v for d, v in values.items() if d in scored}
    data["gates"]["dimensions"] = list(config.gated)
    return data


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=100)


def config_hash(config: RunConfig) -> str:
    """SHA-256 (hex) of the canonical JSON of every setting that may change results."""
    relevant = sorted(_relevant(resolved(config)).items())
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`field: old -> new` for every setting that may change results and differs.

    Both are `resolved` configs (or `dump`s of one, read back).
    """
    before, after = _relevant(old), _relevant(new)
    absent = object()
    pairs = ((k, before.get(k, absent), after.get(k, absent)) for k in sorted({*before, *after}))
    return [
        f"{key}: {' -> '.join('(absent)' if v is absent else _show(v) for v in (a, b))}"
        for key, a, b in pairs
        if a is absent or b is absent or a != b
    ]


def _relevant(data: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(_flat(data, ""))
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{n}.") for n in NEUTRAL)}


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    entries: list[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        entries = list(enumerate(value))
    if not entries:
        yield prefix, value
        return
    for key, child in entries:
        yield from _flat(child, f"{prefix}.{key}" if prefix else str(key))


def describe() -> str:
    """Every setting in Markdown: key, type and bounds, default, and the reason for it."""
    lines = ["# Settings", "", _words(RunConfig.__doc__)]
    for name, info in RunConfig.model_fields.items():
        lines += _describe_section(name, info)
    return "\n".join(lines) + "\n"


def _describe_section(path: str, info: FieldInfo) -> list[str]:
    section, mark = _inside(info)
    assert section is not None, f"{path} is no section"
    need = ", required" if info.is_required() else ""
    lines = ["", f"## {path}{mark}{need}", "", _words(info.description or section.__doc__), ""]
    nested: list[str] = []
    for name, inner in section.model_fields.items():
        if _inside(inner)[0] is not None:
            nested += _describe_section(f"{path}{mark}.{name}", inner)
            continue
        if inner.is_required():
            default = "required"
        else:
            default = f"default {_show(inner.get_default(call_default_factory=True))}"
        lines.append(f"- `{path}{mark}.{name}`: {_rule(_annotated(inner))}; {default}.")
        if inner.description:
            lines.append(f"  {_words(inner.description)}")
    return [*lines, *nested]


def _words(text: str | None) -> str:
    return " ".join((text or "").split())
