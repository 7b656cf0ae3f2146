"""`gsm8k`, `format`, `overlong`, `file.py:function` or `package.module:function` -> the function.

User code never runs in the sampler's own process: there `find` looks only at files and names;
`load` imports in the killable worker (sampler/rewards/worker.py). Both run before any model loads,
and both say what is wrong as UserError.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from protocol.errors import UserError
from sampler.rewards import builtin

BUILTIN: dict[str, Callable] = {"gsm8k": builtin.gsm8k, "format": builtin.format, "overlong": builtin.overlong}
GIVEN = ("prompts", "completions", "completion_ids")
"""Lists of one value for each completion, as TRL gives them."""
NAMED = ("max_tokens",)
"""For functions that name it, where neither data nor options do. It is no list, so `**columns` does not hold it."""


def name_of(reference: str) -> str:
    """The function's own name, as metrics and errors show it."""
    return reference.rpartition(":")[2]


def find(reference: str) -> str:
    """The reference with a file's path made absolute, after a look that imports nothing.

    Raises UserError: neither a built-in nor `where:function`, no such file or package, a syntax
    error in the file.
    """
    if reference in BUILTIN:
        return reference
    where, colon, function = reference.rpartition(":")
    if not (colon and where and function.isidentifier()):
        raise UserError(
            f"reward {reference!r}: expected one of {', '.join(BUILTIN)}, or file.py:function, "
            "or package.module:function"
        )
    if where.endswith(".py"):
        return f"{_readable(reference, Path(where).expanduser())}:{function}"
    if not all(part.isidentifier() for part in where.split(".")):
        raise UserError(f"reward {reference!r}: {where!r} is neither a .py file nor a module's name")
    package, *_ = where.split(".")  # looking further would import it
    if PathFinder.find_spec(package, [os.getcwd(), *sys.path]) is None:
        raise UserError(f"reward {reference!r}: no package {package!r}; install it, or start where it lies")
    return reference


def load(reference: str, options: dict) -> Callable:
    """Imports and returns the function; only in a worker process.

    Raises UserError: the import fails (type, text and line of the reason), no such function, an
    unknown option.
    """
    function = BUILTIN.get(reference) or _import(reference)
    named = inspect.signature(function).parameters
    for option in options:
        if option not in named or option in GIVEN:
            known = [name for name in named if named[name].default is not inspect.Parameter.empty]
            raise UserError(
                f"reward {reference}: the function has no parameter for the option {option!r}; "
                f"it has: {', '.join(known) or 'none'}"
            )
    return function


def accepted(function: Callable, arguments: dict, named: dict) -> dict:
    """What the function takes: of `arguments` all with `**columns`, else those it names; of `named` those it names."""
    parameters = inspect.signature(function).parameters
    known = {name: value for name, value in (named | arguments).items() if name in parameters}
    takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    return arguments | known if takes_all else known


def required(function: Callable, options: dict) -> list[str]:
    """The columns without which a call must fail: parameters that have no default and no option."""
    return [
        name
        for name, item in inspect.signature(function).parameters.items()
        if item.default is item.empty
        and item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
        and name not in (*GIVEN, *NAMED, *options)
    ]


def file_of(reference: str) -> str:
    """The file that a loaded function was written in."""
    source = reference.rpartition(":")[0]
    module = sys.modules[source or builtin.__name__] if not source.endswith(".py") else None
    return source if module is None else module.__file__ or ""


def where(error: BaseException, file: str) -> str:
    """`Type: text (file.py:12)`: the last line in `file` on the way to the error, else the last."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{text} ({Path(place.filename).name}:{place.lineno})"


def _readable(reference: str, path: Path) -> Path:
    try:
        ast.parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"reward {reference!r}: cannot read {path.absolute()}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"reward {reference!r}: {path} is no valid Python: {error}") from None
    return path.resolve()


def _import(reference: str) -> Callable:
    source, _, name = reference.rpartition(":")
    file = source
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        file = module.__file__ or source
        function = vars(module).get(name)
    except (Exception, SystemExit) as error:  # whatever it does is one line for its author
        raise UserError(f"reward {reference}: the import fails: {where(error, file)}") from None
    if not callable(function):
        raise UserError(f"reward {reference}: {file} has no function {name!r}; {_functions(module)}")
    return function


def _from_file(path: Path) -> ModuleType:
    sys.path.append(str(path.parent))  # last, so that a neighbour named random.py hides nothing
    name = str(path).replace(".", "_")
    if name in sys.modules:  # two functions of one file share its state and its import
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    spec.loader.exec_module(module)
    return module


def _functions(module: ModuleType) -> str:
    own = [name for name, item in vars(module).items() if inspect.isfunction(item)]
    return f"it has: {', '.join(own)}" if own else "it has none"
