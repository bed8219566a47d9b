"""YAML text -> nodes, values that know the file and line they came from.

What this finds wrong goes to a reader's `problems`, one sentence each; nothing is raised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from rlhf.redaction import mask

KeyPath = tuple[str | int, ...]
"""Keys and, in lists, indices from the root down."""


@dataclass(frozen=True, slots=True)
class Node:
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

    def at(self, path: KeyPath) -> Node:
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
INTEGER = r"[-+]?(?:0|[1-9][0-9_]*)"
NUMBER = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    ("int", INTEGER, list("-+0123456789")),
    ("float", rf"{NUMBER}|[-+]?\.(?i:inf)|\.(?i:nan)", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


@dataclass
class Reader:
    """Turns one YAML text into nodes; what is wrong with it goes to `problems`."""

    place: Callable[[int], str]
    """Line from 1 -> place."""
    problems: list[str] = field(default_factory=list)

    def read(self, text: str, path: KeyPath = ()) -> Node | None:
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
        path: KeyPath,
        line: int | None,
        above: tuple[int, ...],
    ) -> Node:
        place = self.place((node.start_mark.line if line is None else line) + 1)
        if id(node) in above:
            problem = f"{dotted(path)} is an alias to itself"
            raise ComposerError(None, None, problem, node.start_mark)
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            children: dict[str, Node] = {}
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
            return Node(children, place)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self._node(loader, item, (*path, i), None, above)
                for i, item in enumerate(node.value)
            ]
            return Node(items, place)
        value = loader.construct_object(node)
        if isinstance(value, float) and not math.isfinite(value):
            # No setting may be infinite or NaN: left as text, it fails as a number must.
            value = str(node.value)
        return Node(value, place)


def read_file(path: Path, reader: Reader) -> Node | None:
    """The file's mapping, empty for an empty file; None if it can't be read or is none."""
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
        return Node({}, str(path))
    if not isinstance(node.value, dict):
        reader.problems.append(
            f"config file {path} must hold a mapping of sections, found {show(node.plain)} "
            f"({node.place}); start it with a section such as `model:`"
        )
        return None
    return node


def dotted(path: KeyPath) -> str:
    """`("judges", "panel", 0, "name")` -> `judges.panel.0.name`; the root is `the config`."""
    return ".".join(map(str, path)) or "the config"


def show(value: Any) -> str:
    """The value as JSON, at most 80 characters of it, and nothing of a secret."""
    text = mask(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."
