"""RunConfig from YAML files and overrides, and back to text. Nothing else reads a config file.

Every value keeps the file and line it came from until it has passed, so that a mistake can be
shown where it was made; all mistakes are reported together, one a line. Text never becomes a
number, nor `true` a 1: YAML's own types must fit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlhf.config import RunConfig
from rlhf.config_base import Section
from rlhf.config_help import alternatives, kinds, locate, rule, suggest
from rlhf.config_offline import Trains
from rlhf.config_selection import STANDARD_FLOORS, STANDARD_PROTECTED, STANDARD_WEIGHTS
from rlhf.config_yaml import INTEGER, NUMBER, KeyPath, Node, Reader, dotted, read_file, show
from rlhf.errors import InputError
from rlhf.redaction import names_secret

S = TypeVar("S", bound=Section)

NEUTRAL = (
    "run.name",
    "run.directory",
    "rollout.memory_gib",
    "rollout.gpu_memory_share",
    "rollout.transfer",
    "judges.cache",
    "judges.uncertified",
    "judges.max_abstention",
    "selection.on_inversion",
    "learner.checkpoint_steps",
    "judges.panel[].traffic",
    "judges.audit[].traffic",
    "judges.panel[].members[].traffic",
    "judges.audit[].members[].traffic",
    "rounds.count",
    "placement.kind",
    "placement.zero",
    "placement.offload",
    "placement.generators",
    "placement.tensor_parallel",
    "placement.colocate",
    "calibration",
    "tracking",
)
"""Settings (a section stands for all its keys) that can't change what a round holds, so a run may
be resumed with others. `rounds.count` is one: no round looks at how many follow it, so another
count only lengthens or shortens the run; who does the work adds numbers up in another order, no
more. `rollout.max_concurrency` is none: what is decoded
together changes an engine's rounding, and with it the samples."""


def load(paths: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """The config that these files and overrides make, merged left to right.

    Mappings merge key by key, everything else replaces. An override is a dotted key and a YAML
    value: `("rollout.temperature", "0.7")`, `("judges.panel.0.name", "house")`; where the setting
    is text, the value is taken as it stands.

    Raises InputError with all that is wrong, one a line: field, rule, value, place, remedy.
    """
    return load_as(RunConfig, paths, overrides)


def load_as(kind: type[S], paths: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()) -> S:
    """`load` for another kind of config."""
    root, problems = _gather(paths, overrides, kind)
    return _validated(kind, _Root(kind, ()), root, problems)


def load_section(name: str, section: type[S], overrides: Sequence[tuple[str, str]]) -> S:
    """One section of a config from overrides alone, for a command that needs no whole run.

    Raises InputError as `load` does.
    """
    root, problems = _gather((), overrides, RunConfig)
    root = _put(root, [name], Node({}, root.place))
    return _validated(section, _Root(RunConfig, (name,)), root, problems)


@dataclass(frozen=True, slots=True)
class _Root:
    """Where settings are: in which kind of config, and under which key of it."""

    kind: type[Section]
    path: KeyPath


def _gather(
    paths: Sequence[Path], overrides: Sequence[tuple[str, str]], kind: type[Section]
) -> tuple[Node, list[str]]:
    """All that is set, merged, and what is wrong with values taken by themselves."""
    root = Node({}, ", ".join(map(str, paths)) or "command line")
    problems: list[str] = []
    unreadable = False
    for path in paths:
        reader = Reader(lambda line, path=path: f"{path}:{line}")  # type: ignore[misc]
        node = read_file(path, reader)
        problems += reader.problems
        if node is None:
            unreadable = True
        else:
            root = _merge(root, replace(node, place=root.place))
    for key, text in overrides:
        reader = Reader(lambda line, key=key: f"command line: --{key}")  # type: ignore[misc]
        node = _override(key, text, reader, kind)
        problems += reader.problems
        if node is None:
            unreadable = True
        else:
            root = replace(_put(root, key.split("."), node), place=root.place)
    if unreadable:
        # What a missing file would have set can't be judged, so it isn't reported as missing.
        raise InputError("\n".join(problems))
    return root, problems


def _validated(section: type[S], at: _Root, root: Node, problems: Sequence[str]) -> S:
    """The section `at` its place as settings. Raises InputError with `problems` and its own."""
    found = list(problems)
    try:
        config = section.model_validate(root.at(at.path).plain, strict=True)
    except ValidationError as error:
        found += [
            _explain({**detail, "loc": (*at.path, *detail["loc"])}, root, at.kind)
            for detail in error.errors()
        ]
    if found:
        raise InputError("\n".join(dict.fromkeys(found)))
    return config


def _override(key: str, text: str, reader: Reader, kind: type[Section]) -> Node | None:
    path = tuple(key.split("."))
    known, annotation, _ = locate(path, kind)
    options = alternatives(annotation)
    if len(known) == len(path) and str in options:
        if type(None) in options and text in ("null", "~"):
            return Node(None, reader.place(1))
        return Node(text, reader.place(1))
    before = len(reader.problems)
    node = reader.read(text, path)
    if node is None and len(reader.problems) == before:
        return Node(None, reader.place(1))
    return node


def _merge(old: Node, new: Node) -> Node:
    if not (isinstance(old.value, dict) and isinstance(new.value, dict)):
        return new
    merged = {
        key: _merge(old.value[key], child) if key in old.value else child
        for key, child in new.value.items()
    }
    return Node({**old.value, **merged}, new.place)


def _put(tree: Node, path: Sequence[str], new: Node) -> Node:
    """`tree` with `new` merged in at `path`; a number on the way is an index into a list."""
    if not path:
        return _merge(tree, new)
    head, rest = path[0], path[1:]
    if isinstance(tree.value, list) and head.isdecimal() and int(head) < len(tree.value):
        items = list(tree.value)
        items[int(head)] = _put(items[int(head)], rest, new)
        return replace(tree, value=items)
    children = tree.value if isinstance(tree.value, dict) else {}
    child = _put(children.get(head, Node({}, new.place)), rest, new)
    return Node({**children, head: child}, new.place)


def _explain(detail: ErrorDetails, root: Node, kind: type[Section]) -> str:
    """One line for one pydantic error: field, rule, value found, place, remedy."""
    known, annotation, info = locate(detail["loc"], kind)
    if detail["type"].startswith("union_tag") and isinstance(root.at(known).value, dict):
        annotation = Literal[kinds(annotation)]
        known = (*known, "kind")
    node = root.at(known)
    if detail["type"] == "extra_forbidden":
        return _unknown((*known, str(detail["loc"][-1])), annotation, root, kind)
    if detail["type"] == "missing":
        return (
            f"{dotted(known)} is missing ({root.at(known[:-1]).place}); "
            f"it must be {rule(annotation)}"
        )
    if detail["type"] == "value_error":
        return _broken_rule(known, str(detail["ctx"]["error"]), root, kind)
    remedy = _remedy(node.plain, annotation, info)
    return (
        f"{dotted(known)} must be {rule(annotation)}, found {show(node.plain)} "
        f"({node.place}); {remedy}"
    )


def _unknown(path: KeyPath, annotation: type[Section], root: Node, kind: type[Section]) -> str:
    key = str(path[-1])
    secret = names_secret(key)
    near = get_close_matches(key, annotation.model_fields, n=1, cutoff=0.8 if secret else 0.6)
    homes = suggest(key, kind)
    if secret and not near:
        remedy = (
            "secrets such as WANDB_API_KEY and HF_TOKEN come from the environment, never from a "
            "config: leave it out"
        )
    elif near:
        remedy = f"did you mean {near[0]}?"
    elif homes:
        remedy = f"did you mean {' or '.join(homes)}?"
    else:
        remedy = f"known here: {', '.join(annotation.model_fields)}"
    return f"unknown key {dotted(path)} ({root.at(path).place}); {remedy}"


def _broken_rule(section: KeyPath, message: str, root: Node, kind: type[Section]) -> str:
    """A section's own rule; where its message opens with a setting, that setting's place."""
    opening = message.split(" ", 1)[0].split(".")
    for path in ((*section, *opening), tuple(opening)):
        if len(locate(path, kind)[0]) == len(path):
            rest = message.split(" ", 1)[1]
            return f"{dotted(path)} {rest} ({root.at(path).place})"
    return f"{dotted(section)}: {message} ({root.at(section).place})"


def _remedy(value: Any, annotation: Any, info: FieldInfo | None) -> str:
    options = alternatives(annotation)
    choices = [str(c) for o in options if get_origin(o) is Literal for c in get_args(o)]
    near = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    if near:
        return f"did you mean {near[0]}?"
    if isinstance(value, bool | int | float) and str in options:
        return "put it in quotes if it is meant as text"
    if isinstance(value, str) and re.fullmatch(rf"{NUMBER}|{INTEGER}", value):
        return "write it without quotes, as a finite number"
    if value in ("true", "false"):
        return "write it without quotes"
    if info is not None and not info.is_required():
        default = info.get_default(call_default_factory=True)
        defaults = "defaults" if isinstance(default, Section) else f"default, {show(default)}"
        return f"leave it out for the {defaults}"
    return "`pairloop config` lists every setting"


def resolved(config: Trains) -> dict[str, Any]:
    """The config as JSON-ready data in field order, defaults that depend on others filled in.

    Loading it gives a config that behaves the same.
    """
    data = config.model_dump(mode="json")
    data["learner"]["learning_rate"] = config.learning_rate
    if not isinstance(config, RunConfig):
        return data
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


def dump(config: Trains) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=100)


def config_hash(config: Trains) -> str:
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
        f"{key}: {' -> '.join('(absent)' if v is absent else show(v) for v in (a, b))}"
        for key, a, b in pairs
        if a is absent or b is absent or a != b
    ]


def _relevant(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in _flat(data, "") if not _neutral(k)}


def _neutral(key: str) -> bool:
    setting = re.sub(r"\.\d+(?=\.)", "[]", key)
    return any(f"{setting}.".startswith(f"{name}.") for name in NEUTRAL)


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
