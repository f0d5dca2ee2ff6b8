"""What several commands have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from depthkv_edge.checks import check_number
from depthkv_edge.engine.budget import Budget, parse_size
from depthkv_edge.errors import DepthKVError

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}  # enum ggml_type
FLASH_ATTN = {"auto": None, "on": True, "off": False}
MEMORY_HELP = (
    "Weights, buffers and KV cache together stay under this: 512MiB, 2GB, ... Context and budget are chosen where they "
    "are neither given nor in the model file. What lies in a GPU's own memory has to fit there, and does not count."
)
GPU_LAYERS = click.option(
    "--gpu-layers", type=int, metavar="N", help="Layers on a GPU, if the build and the machine have one. Default: all."
)


def list_rules(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that names a rule: `help` lists those that the engine knows."""
    if value != "help":
        return value
    from depthkv_edge.engine.rules import ALLOC_RULES, SCORERS

    for rule in (ALLOC_RULES if option.name == "rule" else SCORERS).values():
        click.echo(f"{rule.name:14} {rule.desc}")
    context.exit()


@dataclass(frozen=True)
class Context:
    """Arguments of `Llama` that `--memory` may choose."""

    n_ctx: int
    n_ubatch: int
    kv_budget: Budget | str | None
    use_mmap: bool = True

    def arguments(self) -> dict[str, Any]:
        """By the names that `Llama` has for them."""
        return dict(vars(self))


def parse_memory(written: str | None) -> int | None:
    """Bytes of `--memory`.

    Raises:
        DepthKVError: not understood.
    """
    return None if written is None else parse_size(written)


def fitted(
    path: Path,
    memory: int | None,
    budget: Budget | None,
    n_ctx: int | None,
    n_ubatch: int,
    type_k: int,
    type_v: int,
    *,
    flash_attn: bool | None = None,
    scorer: str | None = None,
    rule: str | None = None,
    n_gpu_layers: int = 0,
) -> Context:
    """What was asked for, or, with `--memory` or the budget `auto`, what fits: that is said on standard error.

    Raises:
        DepthKVError: nothing fits, or the engine refuses the model.
    """
    if memory is None and not (budget is not None and budget.is_auto):
        return Context(n_ctx or 0, n_ubatch, budget)
    from depthkv_edge.engine.context import Options, flash_attn_type
    from depthkv_edge.engine.devices import Offload
    from depthkv_edge.sizing.fit import fit_memory, free_memory

    options = Options(
        n_ubatch=n_ubatch,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn_type(flash_attn),
        scorer=scorer,
        rule=rule,
    )
    memory, offload = free_memory() if memory is None else memory, Offload(n_gpu_layers)
    fit = fit_memory(path, memory, n_ctx, budget, options=options, offload=offload)
    for name, text in fit.rows:
        click.echo(f"{name:<10}{text}", err=True)
    return Context(fit.n_ctx, fit.n_ubatch, fit.kv_budget, use_mmap=False)


def check_gpu_layers(value: int | None) -> int:
    """`--gpu-layers` as the engine has it.

    Raises:
        DepthKVError: negative, or more than the engine can count.
    """
    return -1 if value is None else check_number("--gpu-layers", value, 0)


def check_positive(*options: tuple[str, int | None]) -> None:
    """Check options that count something.

    Raises:
        DepthKVError: one of them is below 1, or more than the engine can count; the message names it.
    """
    for name, value in options:
        if value is not None and value < 1:
            raise DepthKVError(f"{name} {value} is not above 0: give 1 or more")
        if value is not None:
            check_number(name, value, 1)


def check_temperature(value: float) -> None:
    """Check a temperature.

    Raises:
        DepthKVError: negative, or no number.
    """
    if not value >= 0:
        raise DepthKVError(f"--temp {value} is not a temperature: give 0 or more")


def check_seed(value: int | None) -> None:
    """Check `--seed`.

    Raises:
        DepthKVError: the engine has no such seed.
    """
    if value is not None:
        check_number("--seed", value, 0, 2**32 - 1)


class FileName(click.ParamType):
    """The name of a file or directory, which is not empty: an empty variable of a script is not the current folder."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            option = max(param.opts, key=len) if param and param.opts else "the name"
            raise DepthKVError(f"{option} is empty: give the name of a file, or leave it out")
        return str(value)


FILE = FileName()
