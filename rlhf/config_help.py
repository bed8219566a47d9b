"""Every setting by name: its type and bounds in words, and the reference that lists them all."""

from __future__ import annotations

import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf.config import RunConfig
from rlhf.config_base import Section
from rlhf.config_offline import OfflineConfig
from rlhf.config_yaml import KeyPath, show

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe() -> str:
    """Every setting in Markdown: key, type and bounds, default, and the reason for it."""
    lines = ["# Settings", "", _words(RunConfig.__doc__)]
    for name, info in RunConfig.model_fields.items():
        lines += _describe_section(name, info)
    return "\n".join([*lines, *_describe_offline()]) + "\n"


def _describe_offline() -> list[str]:
    """What `dpo` and `sweep` take: the sections that they share with a run by name alone."""
    shared = [name for name in OfflineConfig.model_fields if name in RunConfig.model_fields]
    named = ", ".join(f"`{name}`" for name in shared)
    lines = ["", "# Settings of `pairloop dpo` and `pairloop sweep`", ""]
    lines.append(f"{_words(OfflineConfig.__doc__)} {named} are as above, but for what stands here.")
    for name, info in OfflineConfig.model_fields.items():
        if name not in shared:
            lines += _describe_section(name, info)
            continue
        (section,), (in_a_run,) = _inside(info)[0], _inside(RunConfig.model_fields[name])[0]
        for key, inner in section.model_fields.items():
            known = in_a_run.model_fields[key]
            described = _describe_setting(f"{name}.{key}", inner)
            if not _inside(inner)[0] and described != _describe_setting(f"{name}.{key}", known):
                lines += ["", f"## {name}", "", *described]
    return lines


def _describe_section(path: str, info: FieldInfo) -> list[str]:
    sections, mark = _inside(info)
    need = ", required" if info.is_required() else ""
    lines: list[str] = []
    if len(sections) > 1:
        lines += ["", f"## {path}{mark}{need}", "", _words(info.description)]
        need = ""
    for section in sections:
        of_kind = f" of kind {_kind(section)}" if len(sections) > 1 else ""
        about = section.__doc__ if of_kind else info.description or section.__doc__
        lines += ["", f"## {path}{mark}{of_kind}{need}", "", _words(about), ""]
        nested: list[str] = []
        for name, inner in section.model_fields.items():
            if _inside(inner)[0]:
                nested += _describe_section(f"{path}{mark}.{name}", inner)
            else:
                lines += _describe_setting(f"{path}{mark}.{name}", inner)
        lines += nested
    return lines


def _describe_setting(path: str, info: FieldInfo) -> list[str]:
    default = "required"
    if not info.is_required():
        default = f"default {show(info.get_default(call_default_factory=True))}"
    line = f"- `{path}`: {rule(_annotated(info))}; {default}."
    return [line, f"  {_words(info.description)}"] if info.description else [line]


def kinds(annotation: Any) -> tuple[str, ...]:
    """The values of `kind` that a union of sections tells apart."""
    return tuple(map(_kind, alternatives(annotation)))


def _kind(section: type[Section]) -> str:
    (kind,) = get_args(section.model_fields["kind"].annotation)
    return str(kind)


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def leaves(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting; settings of list items stand under `name[]`, those that
    several kinds of item share once for each."""
    for name, info in section.model_fields.items():
        inside, mark = _inside(info)
        if not inside:
            yield f"{prefix}{name}"
        for inner in inside:
            yield from leaves(inner, f"{prefix}{name}{mark}.")


def suggest(name: str, root: type[Section] = RunConfig) -> list[str]:
    """The settings of `root` whose last part is, or is most like, `name`: `temprature` -> its full
    key."""
    found = [(leaf, leaf.rsplit(".", 1)[-1]) for leaf in leaves(root) if "[]" not in leaf]
    near = get_close_matches(name.replace("-", "_"), [last for _, last in found], n=1, cutoff=0.75)
    return [leaf for leaf, last in found if last in near]


def _inside(info: FieldInfo) -> tuple[list[type[Section]], str]:
    """The sections that a field may hold, with `[]` if it is a list of them."""
    base, mark = alternatives(info.annotation), ""
    if get_origin(base[0]) is list:
        base, mark = alternatives(get_args(base[0])[0]), "[]"
    return [b for b in base if isinstance(b, type) and issubclass(b, Section)], mark


def alternatives(annotation: Any) -> list[Any]:
    """What a union allows, bare of Annotated; one entry for anything else."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for option in get_args(annotation) for inner in alternatives(option)]
    return [annotation]


def locate(path: KeyPath, root: type[Section] = RunConfig) -> tuple[KeyPath, Any, FieldInfo | None]:
    """How much of `path` the config `root` knows, with the type and, for a setting, field there.

    Where an entry may be of several kinds, a part that names one of them (as in pydantic's own
    paths) says which and is left out of the answer; without it, the first kind that has the
    setting is meant.
    """
    known: KeyPath = ()
    annotation: Any = root
    info: FieldInfo | None = None
    for part in path:
        inner = [o for o in alternatives(annotation) if o is not type(None)]
        sections = [o for o in inner if isinstance(o, type) and issubclass(o, Section)]
        base = inner[0] if len(inner) == 1 else None
        having = next((s for s in sections if part in s.model_fields), None)
        if len(sections) > 1 and (named := [s for s in sections if _kind(s) == part]):
            annotation, info = named[0], None
            continue
        if having is not None:
            info = having.model_fields[str(part)]
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


def rule(annotation: Any) -> str:
    """A type and its bounds in words: `a number > 0 and <= 2`."""
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
        flat = [m for item in metadata for m in getattr(item, "metadata", [item])]
        return f"{rule(base)} {' and '.join(filter(None, map(_bound, flat)))}".strip()
    options = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(rule, options)))
    if get_origin(annotation) is Literal:
        return f"{'one of ' if len(options) > 1 else ''}{', '.join(map(str, options))}"
    if get_origin(annotation) is list:
        return f"a list, each {rule(options[0])}"
    if get_origin(annotation) is dict:
        return f"a mapping of names, each to {rule(options[1])}"
    return _WORDS.get(annotation, "a mapping of settings")


def _bound(metadata: Any) -> str:
    for name, sign in _SIGNS.items():
        if hasattr(metadata, name):
            return f"{sign} {getattr(metadata, name)}"
    if hasattr(metadata, "min_length"):
        return f"(at least {metadata.min_length} long)"
    pattern = getattr(metadata, "pattern", None)
    return f"matching {pattern}" if pattern else ""
