"""Run a program that was written for `llama_cpp.Llama` with a KV budget, without changing it.

In a program of one's own, before or after its other imports:

    import depthkv_edge.compat.llama_cpp as compat
    compat.configure(kv_budget=0.4)          # or DEPTHKV_KV_BUDGET=0.4 in the environment

Around a program of somebody else's:

    DEPTHKV_KV_BUDGET=0.4 python -m depthkv_edge.compat.llama_cpp -m llama_cpp.server --model model.gguf
    python -m depthkv_edge.compat.llama_cpp --kv-budget 0.4 app.py ARGUMENTS...

Importing this module makes `llama_cpp.Llama` a subclass of itself that reads the budget. What took the class before
(`from llama_cpp import Llama`, a default argument, a field of another class) makes instances of the subclass too. Not
covered: instances that exist already, classes derived from `llama_cpp.Llama` before the import (a warning says so),
contexts made through the C bindings, and other processes that the program starts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import runpy
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from depthkv_edge import llama as _depthkv
from depthkv_edge.engine.budget import FORMS, Budget, parse_budget
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.context import is_quantised
from depthkv_edge.errors import DepthKVError

ENV_BUDGET = "DEPTHKV_KV_BUDGET"

_Stock = _depthkv.Llama.__base__  # not `llama_cpp.Llama`, which is ours when this module is loaded a second time


@dataclass(frozen=True)
class CompatSettings:
    """What every `Llama` gets that says nothing of its own. None: no budget, the model's rule, and so on."""

    kv_budget: Budget | None = None
    scorer: str | None = None
    rule: str | None = None
    n_sink: int | None = None
    n_recent: int | None = None


_configured: CompatSettings | None = None


def configure(
    kv_budget: Budget | float | str | None,
    *,
    scorer: str | None = None,
    rule: str | None = None,
    n_sink: int | None = None,
    n_recent: int | None = None,
) -> None:
    """Set what every later `Llama` gets, in place of the environment. `configure(None)` turns the budget off.

    Args:
        kv_budget, scorer, rule, n_sink, n_recent: as in `depthkv_edge.Llama`.

    Raises:
        DepthKVError: the budget is not understood.
    """
    global _configured
    budget = None if kv_budget is None else parse_budget(kv_budget)
    _configured = CompatSettings(budget, scorer, rule, n_sink, n_recent)


def settings() -> CompatSettings:
    """What `configure` has set, or else what the environment says.

    Raises:
        DepthKVError: the budget in the environment is not understood.
    """
    if _configured is not None:
        return _configured
    written = os.environ.get(ENV_BUDGET, "").strip()
    try:
        return CompatSettings(parse_budget(written) if written else None)
    except DepthKVError as error:
        raise DepthKVError(f"{ENV_BUDGET}: {error}") from None


def _merge(configured: CompatSettings, given: CompatSettings) -> CompatSettings:
    return replace(configured, **{name: value for name, value in vars(given).items() if value is not None})


class Llama(_depthkv.Llama):
    """`llama_cpp.Llama` with the configured budget: every keyword and default of it, and those of `depthkv_edge.Llama`.

    A budget of the program's own, in `kv_budget` or as `kv_overrides["depthkv.budget"]`, wins over all that is
    configured. Without any, and for `vocab_only=True`, the constructor is the one of `llama_cpp.Llama`.

    With a budget, `flash_attn=False` leaves the choice to the engine: it is what programs say that say nothing.

    Raises:
        DepthKVError: as `depthkv_edge.Llama`, or the budget in the environment is not understood.
    """

    def __init__(
        self,
        model_path: str,
        *,
        kv_budget: Budget | float | str | None = None,
        scorer: str | None = None,
        rule: str | None = None,
        n_sink: int | None = None,
        n_recent: int | None = None,
        **kwargs: Any,
    ):
        self._stack = contextlib.ExitStack()  # the base class closes it in __del__, even when __init__ stops early
        given = CompatSettings(None if kv_budget is None else parse_budget(kv_budget), scorer, rule, n_sink, n_recent)
        has_own = given.kv_budget is not None or _depthkv.KEY_BUDGET in (kwargs.get("kv_overrides") or {})
        if not has_own and not kwargs.get("vocab_only"):
            given = _merge(settings(), given)
        if not has_own and given == CompatSettings():
            self._init_stock(model_path, kwargs)
            return
        if given.kv_budget is not None and kwargs.get("embedding"):
            raise DepthKVError(
                "embedding=True cannot have a KV budget, since an embedding context evicts nothing: "
                f"unset {ENV_BUDGET}, or call configure(None) before this model and configure(...) after it"
            )
        kwargs["flash_attn"] = kwargs.get("flash_attn") or None
        super().__init__(
            model_path,
            kv_budget=given.kv_budget,
            scorer=given.scorer,
            rule=given.rule,
            n_sink=given.n_sink,
            n_recent=given.n_recent,
            **kwargs,
        )

    def _init_stock(self, model_path: str, kwargs: dict[str, Any]) -> None:
        # The file itself may carry a budget, and then the engine chooses here too. A quantised V without flash
        # attention is an error of stock llama.cpp, and stays one.
        needs_flash = kwargs.get("type_v") is not None and is_quantised(kwargs["type_v"])
        self._flash_attn = True if kwargs.get("flash_attn") else False if needs_flash else None
        _Stock.__init__(self, model_path, **kwargs)


def _merged_signature() -> inspect.Signature:
    # programs look here for the keywords that they may pass
    ours, stock = inspect.signature(Llama.__init__).parameters, inspect.signature(_Stock.__init__)
    *parameters, rest = stock.parameters.values()
    return stock.replace(parameters=[*parameters, *(ours[name] for name in ours if name not in stock.parameters), rest])


Llama.__init__.__signature__ = _merged_signature()  # type: ignore[attr-defined]


@functools.wraps(_Stock.__init__)
def _new(cls: type, *args: Any, **kwargs: Any) -> Any:
    # Whoever took the class before this module was imported holds the base class. Python calls __init__ of what is
    # returned here, so that a call of the base class is a call of ours.
    if cls is _Stock:
        cls = Llama
    elif not issubclass(cls, _depthkv.Llama) and settings().kv_budget is not None:
        warnings.warn(
            f"{cls.__qualname__} was derived from llama_cpp.Llama before depthkv_edge.compat.llama_cpp was imported, "
            "and has no KV budget: import depthkv_edge.compat.llama_cpp first",
            stacklevel=2,
        )
    return object.__new__(cls)


def _install() -> None:
    llama_cpp.Llama = llama_cpp.llama.Llama = Llama
    _Stock.__new__ = staticmethod(_new)


@dataclass(frozen=True)
class _Program:
    name: str
    is_module: bool
    arguments: tuple[str, ...]


@click.command(
    "python -m depthkv_edge.compat.llama_cpp",
    context_settings={"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]},
    options_metavar="[--kv-budget BUDGET] [-m]",
    epilog=f"Without --kv-budget, {ENV_BUDGET} in the environment counts.",
)
@click.option("--kv-budget", metavar="BUDGET", help=f"KV cache: {FORMS}.")
@click.option("-m", "is_module", is_flag=True, help="PROGRAM is a module, as in python -m.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def _parse(kv_budget: str | None, is_module: bool, program: str, arguments: tuple[str, ...]) -> _Program:
    """Run a Python program that was written for llama_cpp.Llama with a KV budget."""
    if kv_budget is not None:
        configure(kv_budget)
    settings()  # what is wrong with the environment is said before the program starts
    if is_module:
        _check_module(program)
    elif not Path(program).is_file():
        raise DepthKVError(f"program {program} does not exist: give the path of a Python file, or -m and a module")
    return _Program(program, is_module, arguments)


def _check_module(name: str) -> None:
    try:
        spec = importlib.util.find_spec(name)  # imports the packages that it is in, as runpy will
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except DepthKVError:
        raise
    except Exception as error:  # whatever a package may do while it is imported
        why = f"{type(error).__name__}: {error}"
        raise DepthKVError(f"module {name} cannot be had ({why}): give one that python -m would run") from None
    if spec is None:
        raise DepthKVError(f"module {name} does not exist: give one that python -m would run, or the path of a file")


def _run(program: _Program) -> None:
    sys.argv = [program.name, *program.arguments]
    if program.is_module:
        runpy.run_module(program.name, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program.name).resolve().parent))
        runpy.run_path(program.name, run_name="__main__")


def main() -> None:
    """Entry point: what a user can get wrong is one line on standard error, and exit code 2."""
    try:
        program = _parse(standalone_mode=False)
        if isinstance(program, _Program):  # not after --help
            _run(program)
    except (click.ClickException, DepthKVError) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo("depthkv-edge: " + " ".join(text.split()), err=True)
        sys.exit(2)


if __name__ == "__main__":
    # a program run so will import this file a second time, under its real name: that is the one to install
    from depthkv_edge.compat.llama_cpp import main as _main

    _main()
else:
    _install()
