"""Find what a configuration names: a user's function, a file inside an installed package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import InputError

_FORMS = "`module:function` or `path/to/file.py:function`"


def load_function(spec: str, field: str) -> Callable[..., Any]:
    """The function that `spec` names: `module:function` or `path/to/file.py:function`.

    A file is looked up from the working directory and loaded once, whatever the number of
    functions taken from it. `field` is the configuration field, for the message.

    Raises InputError where the module or function is missing, importing fails, or what is named
    can't be called.

    >>> load_function("math:floor", "judges.panel[0].function")(1.5)
    1
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"{field} must be {_FORMS}, got {spec!r}")
    module = _load_file(source, field) if source.endswith(".py") else _load_module(source, field)
    try:
        found = getattr(module, name)
    except AttributeError:
        near = get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{field}: {source} has no function {name!r}{hint}") from None
    if not callable(found):
        raise InputError(
            f"{field} must name a function, but {spec!r} is of type {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]


def resolve_path(spec: str) -> Path:
    """`package:NAME/FILE` as the file's path inside the installed package, else `spec` as a path.

    The package is located without being imported: a package that only carries data may well
    import things that are not installed.

    Raises InputError where the package or its file is missing.
    """
    if not spec.startswith("package:"):
        return Path(spec)
    name, _, inside = spec.removeprefix("package:").partition("/")
    if not name or not inside:
        raise InputError(f"a path inside a package must be `package:NAME/FILE`, got {spec!r}")
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"{spec}: the Python package {name!r} is not installed; install it "
            f"(pip install --no-deps {name.replace('_', '-')}), or give a path"
        )
    folders = [Path(folder) for folder in found.submodule_search_locations]
    for folder in folders:
        if (folder / inside).exists():
            return folder / inside
    held = sorted(p.name for folder in folders if folder.is_dir() for p in folder.iterdir())
    near = get_close_matches(inside, held, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{spec}: the package {name!r} holds no {inside!r}{hint}")


def _load_module(name: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"{field}: there is no module {error.name!r}; install its package, or name a file "
                "as path/to/file.py:function"
            ) from None
        raise InputError(f"{field}: importing {name} raised {_told(error)}") from error
    # Importing runs foreign code, which may raise anything; a script without a main guard exits.
    except (Exception, SystemExit) as error:
        raise InputError(f"{field}: importing {name} raised {_told(error)}") from error


def _load_file(source: str, field: str) -> ModuleType:
    path = Path(source).resolve()
    if not path.is_file():
        raise InputError(
            f"{field}: there is no file {source} in the working directory {Path.cwd()}"
        )
    # The whole path is in the name, so that two files called verifiers.py stay two modules.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"pairloop_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up while its body runs
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{field}: importing {source} raised {_told(error)}") from error
    return module


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
