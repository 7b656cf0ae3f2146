"""The name of a built-in, `file.py:function` or `package.module:function` -> the function, in TRL's form.

User code never runs in the sampler's own process: there `find` looks only at files and names;
`load` imports in the killable worker (sampler/rewards/worker.py). Both run before any model loads,
and both say what is wrong as UserError.
"""

import ast
import contextlib
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
from sampler.rewards.signature import GIVEN, in_trl_form

BUILTIN = {
    "gsm8k": "sampler.rewards.builtin",
    "format_think_answer": "sampler.rewards.builtin",
    "tag_count": "sampler.rewards.builtin",
    "ends_properly": "sampler.rewards.builtin",
    "overlong": "sampler.rewards.builtin",
    "repetition": "sampler.rewards.builtin",
    "length_target": "sampler.rewards.builtin",
    "countdown": "sampler.rewards.countdown",
    "math_verify": "sampler.rewards.symbolic",
}
"""By name, the module. docs/rewards.md describes them."""
NAMED = ("max_tokens",)
"""For functions that name it, where neither data nor options do. It is no list, so `**columns` does not hold it."""


def name_of(reference: str) -> str:
    """The function's own name, as metrics and errors show it."""
    return reference.rpartition(":")[2]


def find(reference: str) -> str:
    """The reference with a file's path made absolute, after a look that imports nothing.

    Raises UserError: neither a built-in nor `where:function`, no such file or package, a syntax
    error in the file, a library that is missing.
    """
    if reference in BUILTIN:
        if reference == "math_verify" and PathFinder.find_spec("math_verify", sys.path) is None:
            raise UserError("reward 'math_verify' needs the library math-verify: pip install '.[math]'")
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
    """Imports and returns the function, in TRL's form; only in a worker process.

    Raises UserError: the import fails (type, text and line of the reason), no such function, a
    signature that is none of those known, an unknown option, one that a built-in has no meaning for.
    """
    function = in_trl_form(reference, _import(_full(reference)), options)
    if reference in BUILTIN:
        _check_values(reference, function, options)
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
    source = _full(reference).rpartition(":")[0]
    return source if source.endswith(".py") else sys.modules[source].__file__ or ""


def where(error: BaseException, file: str) -> str:
    """`Type: text (file.py:12)`: the last line in `file` on the way to the error, else the last."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{text} ({Path(place.filename).name}:{place.lineno})"


def _check_values(reference: str, function: Callable, options: dict) -> None:
    """The built-ins look at their options first, so that a call without completions is enough."""
    nothing = {name: [] for name in (*GIVEN, *required(function, options))}
    with contextlib.suppress(TypeError):  # it needs an option, which is said where the columns are known
        try:
            function(**accepted(function, nothing | options, {}))
        except ValueError as error:
            raise UserError(f"reward {reference}: {error}") from None


def _full(reference: str) -> str:
    return f"{BUILTIN[reference]}:{reference}" if reference in BUILTIN else reference


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
