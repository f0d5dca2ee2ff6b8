"""llama.cpp's own server on our library: what it is started with, checked before it starts."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from depthkv_edge.checks import check_number, check_threads
from depthkv_edge.engine import library
from depthkv_edge.engine.budget import Budget
from depthkv_edge.errors import DepthKVError
from depthkv_edge.server.access import KEY_VARIABLE, check_host, check_keys

if TYPE_CHECKING:
    from depthkv_edge.server.cache import CachePlan

N_BATCH = N_UBATCH = 512
WEB = Path(__file__).parent / "web"

# What the server is told unless the user tells it otherwise, each with the spellings of common/arg.cpp.
_DEFAULTS = (
    # 8 GiB of prompts that were pushed out of their slot, where upstream assumes a workstation
    (("--cache-ram", "-cram"), ["--cache-ram", "0"]),
    # a disconnected client is noticed between two batches, and other conversations wait for one, too
    (("--batch-size", "-b"), ["--batch-size", str(N_BATCH)]),
    # upstream answers every web site that a browser on this machine shows
    (("--cors-origins",), ["--cors-origins", "localhost"]),
    (("--metrics",), ["--metrics"]),
    # what the plan counts on, whatever LLAMA_ARG_... or a config file of llama.cpp says
    (("--cache-type-k", "-ctk"), ["--cache-type-k", "f16"]),
    (("--cache-type-v", "-ctv"), ["--cache-type-v", "f16"]),
    (("--flash-attn", "-fa"), ["--flash-attn", "auto"]),
)

# The same where memory is limited.
_FITTED_DEFAULTS = (
    # a file that is mapped is resident beside what was repacked from it
    (("--load-mode", "-lm"), ["--load-mode", "none"]),
    # copies of sliding windows, for prompts that begin as an earlier one did
    (("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints"), ["--ctx-checkpoints", "0"]),
)

_UBATCH = ("--ubatch-size", "-ub")
_THREADS = (
    "-t --threads -tb --threads-batch --threads-http --spec-draft-threads -td --threads-draft "
    "--spec-draft-threads-batch -tbd --threads-batch-draft"
).split()
_THREAD_VARIABLES = {"LLAMA_ARG_THREADS": ("-t", "--threads"), "LLAMA_ARG_THREADS_HTTP": ("--threads-http",)}
_DRAFT_MODELS = "--spec-draft-model -md --model-draft --spec-draft-hf -hfd -hfrd --hf-repo-draft".split()

# What the user says before the `--`: the way to say it there, by every spelling of it.
_OURS = {
    flag: way_out
    for way_out, flags in {
        "MODEL": "-m --model -mu --model-url -hf -hfr --hf-repo -hff --hf-file -dr --docker-repo",
        "-c": "-c --ctx-size",
        "--kv-budget": "--kv-budget",
        "--host": "--host",
        "--port": "--port",
        "--api-key": "--api-key",
        "--api-key-file": "--api-key-file",
        "--parallel": "-np --parallel",
        "--no-pin": "--kv-pin --no-kv-pin",
    }.items()
    for flag in flags.split()
}


@dataclass(frozen=True)
class ServeSettings:
    """What the user asks for.

    Attributes:
        model: path of a GGUF.
        budget: None for the model's own, or the full cache.
        n_ctx: positions of a conversation; None for what the model was trained for.
        memory: bytes for the server as a whole: weights, buffers, KV cache; None: no limit.
        host: name or address to listen on.
        port: in 1 .. 65535.
        api_key: what clients must send; None: nothing, or what the file says.
        api_key_file: file with one key on a line.
        parallel: conversations at the same time, which share the KV cache.
        pin: never evict the system prompt of a conversation.
        extra: arguments of llama-server.
    """

    model: Path
    budget: Budget | None = None
    n_ctx: int | None = None
    memory: int | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    api_key_file: Path | None = None
    parallel: int = 1
    pin: bool = True
    extra: tuple[str, ...] = ()

    @property
    def fitted(self) -> bool:
        """Whether everything together has to stay under a size."""
        return self.memory is not None or (self.budget is not None and self.budget.is_auto)


@dataclass(frozen=True)
class Launch:
    """A server that is ready to start."""

    command: list[str]
    environment: dict[str, str]
    address: str
    cache: CachePlan


def prepare(settings: ServeSettings, environment: Mapping[str, str] = os.environ) -> Launch:
    """Check everything that can be wrong, and build the server's command. Loads no weights.

    Raises:
        DepthKVError: the server would not start, or would be open to the network.
    """
    _check_numbers(settings)
    _check_extra(settings.extra)
    _check_extra_threads(settings.extra, environment)
    _check_fitted(settings)
    keys = check_keys(settings.api_key, settings.api_key_file)
    check_host(settings.host, settings.port, protected=bool(keys))
    binary = server_binary()
    environment = dict(environment)
    if settings.api_key is not None:
        environment[KEY_VARIABLE] = settings.api_key
    command = [str(binary), "--model", str(settings.model)]
    options = _options(settings, unified=settings.parallel > 1, n_ubatch=N_UBATCH)
    _check_command([*command, *options], environment)
    cache = _plan(settings)
    command += ["--ctx-size", str(cache.n_ctx), "--kv-budget", cache.kv_budget]
    command += _options(settings, unified=cache.unified, n_ubatch=cache.n_ubatch)
    if cache.active:  # what does not go with a budget
        _check_command(command, environment)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return Launch(command, environment, f"http://{host}:{settings.port}/", cache)


def start(launch: Launch) -> NoReturn:
    """Become the server, so that signals and exit codes are its own; on Windows, wait for it and exit as it does.

    Raises:
        DepthKVError: the program cannot be run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if os.name == "posix":
            os.execve(launch.command[0], launch.command, launch.environment)
        process = subprocess.Popen(launch.command, env=launch.environment)
    except OSError as error:
        raise _cannot_run(launch.command[0], error.strerror or str(error)) from None
    while True:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:  # the server gets it, too, and finishes in its own time
            continue


def server_binary() -> Path:
    """The `llama-server` that was built with our library.

    Raises:
        DepthKVError: the library or the program is not there.
    """
    path = library.library_dir() / ("llama-server.exe" if os.name == "nt" else "llama-server")
    if not path.is_file():
        raise DepthKVError(f"no {path.name} in {path.parent}: build it with scripts/setup.sh in the source tree")
    return path


# what is asked for


def _check_numbers(settings: ServeSettings) -> None:
    for name, value in (("-c", settings.n_ctx), ("--parallel", settings.parallel)):
        if value is not None and value < 1:
            raise DepthKVError(f"{name} {value} is not above 0: give 1 or more")
        if value is not None:
            check_number(name, value)
    if not 1 <= settings.port <= 65535:
        raise DepthKVError(f"--port {settings.port} is not a port: give 1 to 65535")


def _check_extra(extra: tuple[str, ...]) -> None:
    for flag, value in itertools.zip_longest(extra, extra[1:], fillvalue=""):
        name = _spelled(flag)
        if name in _OURS:
            raise DepthKVError(
                f"{flag} after -- contradicts what the server is started with: use {_OURS[name]} before it"
            )
        if name == "--override-kv" and "depthkv.budget=" in value:
            raise DepthKVError(f"{flag} {value} after -- is a second KV budget: use --kv-budget before it")


def _check_extra_threads(extra: tuple[str, ...], environment: Mapping[str, str]) -> None:
    given = [(f"{flag} after --:", value) for flag, value in itertools.pairwise(extra) if _spelled(flag) in _THREADS]
    for variable, flags in _THREAD_VARIABLES.items():
        if variable in environment and not _given(extra, *flags):  # an argument wins
            given.append((variable, environment[variable]))
    for name, value in given:
        # what is no number is for the server to refuse; below 1 is its word for all cores
        number = re.match(r"\s*\+?([0-9]{1,20})", value)  # as common/arg.cpp does, which stops at what is no digit
        if number and int(number[1]) > 0:
            check_threads(name, int(number[1]))


def _check_fitted(settings: ServeSettings) -> None:
    drafts = [flag for flag in settings.extra if _spelled(flag) in _DRAFT_MODELS]
    if settings.fitted and drafts:
        raise DepthKVError(
            f"{drafts[0]} after -- brings a second model, which --memory and --kv-budget auto do not count: "
            "give --kv-budget as a share or in bytes"
        )


def _spelled(flag: str) -> str:
    # as common/arg.cpp does
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _given(extra: tuple[str, ...], *names: str) -> bool:
    return any(_spelled(flag) in names for flag in extra)


def _value(extra: tuple[str, ...], *names: str) -> str | None:
    found = [value for flag, value in zip(extra, extra[1:], strict=False) if _spelled(flag) in names]
    return found[-1] if found else None


def _number(extra: tuple[str, ...], *names: str, default: int) -> int:
    written = _value(extra, *names)
    try:
        number = default if written is None else int(written)
    except ValueError:
        number = 0
    if number < 1:
        raise DepthKVError(f"{names[0]} {written} after -- is not a number above 0: give 1 or more")
    return number


def _options(settings: ServeSettings, *, unified: bool, n_ubatch: int) -> list[str]:
    options = ["--host", settings.host, "--port", str(settings.port), "--path", str(WEB)]
    options += ["--parallel", str(settings.parallel)]
    if not _says_unified(settings.extra):
        options += ["--kv-unified" if unified else "--no-kv-unified"]
    if not settings.pin:
        options += ["--no-kv-pin"]
    if not _given(settings.extra, "-a", "--alias"):
        options += ["--alias", settings.model.stem]  # rather than the path, which is nobody's business
    if settings.api_key_file is not None:
        options += ["--api-key-file", str(settings.api_key_file)]
    for names, arguments in (*_DEFAULTS, *(_FITTED_DEFAULTS if settings.fitted else ())):
        if not _given(settings.extra, *names):
            options += arguments
    ubatch = ["--ubatch-size", str(n_ubatch)]
    if _given(settings.extra, *_UBATCH):  # the most that the user wants, of which less may fit
        return [*options, *settings.extra, *ubatch]
    return [*options, *ubatch, *settings.extra]


def _says_unified(extra: tuple[str, ...]) -> bool:
    return _given(extra, "-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified")


# what the server says of its arguments


def _check_command(command: list[str], environment: Mapping[str, str]) -> None:
    # the server ends after this flag when all others are understood, before it loads anything
    try:
        done = subprocess.run(
            [*command, "--help"], env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _cannot_run(command[0], getattr(error, "strerror", None) or "it does not answer") from None
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines[-1:]
    if not told:
        raise _cannot_run(command[0], f"exit code {done.returncode}")
    raise DepthKVError(f"llama-server refuses: {told[0].removeprefix('error: ')}; see {command[0]} --help")


def _cannot_run(program: str, why: str) -> DepthKVError:
    return DepthKVError(f"{program} cannot be run: {why}; build it again with scripts/setup.sh in the source tree")


# what the cache will be


def _gpu_layers(extra: tuple[str, ...]) -> int:
    written = _value(extra, "-ngl", "--gpu-layers", "--n-gpu-layers")
    return int(written) if written is not None and re.fullmatch(r"\d{1,9}", written) else -1  # all, auto, or refused


def _plan(settings: ServeSettings) -> CachePlan:
    if _says_unified(settings.extra):
        return _plan_as(settings, unified=_given(settings.extra, "-kvu", "--kv-unified"))
    # Split, four conversations would have a quarter of the positions each. Unified, each may use all of them: what they
    # share is cells, and a conversation that runs out of its cells evicts. The full cache cannot evict: unified, a
    # conversation would find no room in the middle of an answer, and fail.
    plan = _plan_as(settings, unified=settings.parallel > 1)
    return plan if plan.active or not plan.unified else _plan_as(settings, unified=False)


def _plan_as(settings: ServeSettings, *, unified: bool) -> CachePlan:
    # imported here, so that what is wrong so far is said at once, and --help needs no library
    from depthkv_edge.engine.context import Options
    from depthkv_edge.engine.devices import Offload
    from depthkv_edge.server.cache import FLASH_ATTN, ggml_type, plan_cache

    extra = settings.extra
    n_batch = _number(extra, "--batch-size", "-b", default=N_BATCH)
    options = Options(
        n_ctx=settings.n_ctx or 0,
        n_batch=n_batch,
        n_ubatch=min(n_batch, _number(extra, *_UBATCH, default=N_UBATCH)),
        n_seq=settings.parallel,
        unified=unified,
        type_k=ggml_type(_value(extra, "-ctk", "--cache-type-k") or "f16"),
        type_v=ggml_type(_value(extra, "-ctv", "--cache-type-v") or "f16"),
        flash_attn=FLASH_ATTN.get(_value(extra, "-fa", "--flash-attn") or "auto"),
        swa_full=_given(extra, "--swa-full"),
        offload_kqv=not _given(extra, "-nkvo", "--no-kv-offload"),
    )
    return plan_cache(settings.model, settings.budget, options, settings.memory, Offload(_gpu_layers(extra)))
