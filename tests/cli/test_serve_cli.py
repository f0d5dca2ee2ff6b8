"""`depthkv-edge serve`: what is refused before a server starts, and what a server is started with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from support.outcome import refused, run_here
from support.tiny import write_llama, write_mamba

from depthkv_edge import DepthKVError
from depthkv_edge.engine import library
from depthkv_edge.engine.budget import parse_budget, parse_size
from depthkv_edge.modelfile.keys import KEY_BUDGET
from depthkv_edge.server import launch as serve
from depthkv_edge.server.launch import ServeSettings, prepare

STAND_IN = f"""#!{sys.executable}
import json, os, sys, time
if sys.argv[-1] == "--help":
    if "--no-such-flag" in sys.argv:
        sys.exit("warn: something\\nerror: invalid argument: --no-such-flag")
    if "--threads" in sys.argv:
        sys.exit('error while handling argument "--threads": stoi\\n\\nusage:\\n-t,    --threads N   ...')
    if "--silent" in sys.argv:
        sys.exit(3)
    sys.exit(0)
said = {{"argv": sys.argv[1:], "pid": os.getpid(), "key": os.environ.get("LLAMA_API_KEY")}}
print(json.dumps(said), flush=True)
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(7)
"""


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our library with a program beside it that says what it was started with, and exits with 7."""
    directory = tmp_path_factory.mktemp("bin")
    for path in library.library_dir().iterdir():
        if ".so" in path.name or path.suffix in (".dylib", ".dll"):
            shutil.copy(path, directory)
    program = directory / "llama-server"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return directory


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(cli: Callable[..., Outcome], stand_in: Path, free_port: int) -> Callable[..., Outcome]:
    """`depthkv-edge serve smollm2 ...` on a free port."""

    def run(*arguments: Any, model: Any = "smollm2", **environment: str) -> Outcome:
        options = ["--port", free_port] if "--port" not in arguments else []
        return cli("serve", model, *options, *arguments, DEPTHKV_LIB_PATH=str(stand_in), **environment)

    return run


@pytest.fixture
def here(
    stand_in: Path, smollm2: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """`prepare` in this process."""
    monkeypatch.setattr(serve, "server_binary", lambda: stand_in / "llama-server")

    def run(**given: Any) -> serve.Launch:
        defaults = {"model": smollm2, "port": free_port, "n_ctx": 2048}
        return prepare(ServeSettings(**(defaults | given)), {"PATH": os.environ["PATH"]})

    yield run


@pytest.fixture
def refuse(
    stand_in: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The same in this process, for what starts no server: the one line that is said."""
    monkeypatch.setattr(serve, "server_binary", lambda: stand_in / "llama-server")

    def run(*arguments: Any, model: Any = "smollm2") -> str:
        options = ["--port", free_port] if "--port" not in arguments else []
        return refused(run_here(capfd, "serve", model, *options, *arguments))

    return run


def started(outcome: Outcome) -> list[str]:
    assert outcome.code == 7, outcome
    return json.loads(outcome.out)["argv"]


def value(argv: list[str], flag: str) -> str:
    assert argv.count(flag) == 1, argv
    return argv[argv.index(flag) + 1]


# what a server is started with


def test_started(start, smollm2, free_port):
    outcome = start("--kv-budget", "30%", "-c", 4096, "--parallel", 4, "--", "--threads-http", "3")
    argv = started(outcome)
    assert value(argv, "--model") == str(smollm2)
    assert value(argv, "--kv-budget") == "30%" and value(argv, "--ctx-size") == "4096"
    assert value(argv, "--parallel") == "4" and "--kv-unified" in argv
    assert value(argv, "--host") == "127.0.0.1" and value(argv, "--port") == str(free_port)
    assert (Path(value(argv, "--path")) / "index.html").is_file()
    assert value(argv, "--cache-ram") == "0", "no prompts outside of the budget"
    assert value(argv, "--cors-origins") == "localhost" and "--metrics" in argv
    assert value(argv, "--alias") == smollm2.stem
    assert "--no-kv-pin" not in argv and not any("api-key" in each for each in argv)
    assert argv[-2:] == ["--threads-http", "3"]
    assert outcome.err.splitlines() == [
        f"address   http://127.0.0.1:{free_port}/",
        "KV cache  27.0 MiB of 90.0 MiB (30%)",
        "context   4096 tokens for each of 4 conversations",
        "held      307 tokens in a layer on average for each of 4 conversations",
    ]


def test_defaults(start):
    """One conversation, the full cache, the context that the model was trained for."""
    outcome = start()
    argv = started(outcome)
    assert value(argv, "--kv-budget") == "1.0" and "--no-kv-unified" in argv
    assert value(argv, "--cache-type-k") == value(argv, "--cache-type-v") == "f16"
    assert value(argv, "--ctx-size") == "8192" and value(argv, "--parallel") == "1"
    assert outcome.err.splitlines()[1:] == ["KV cache  180.0 MiB of 180.0 MiB (100%)", "context   8192 tokens"]


def test_budget_in_bytes_is_kept(here):
    """Whatever the number of conversations."""
    for parallel in (1, 2, 3):
        launch = here(budget=parse_budget("20MiB"), n_ctx=4096, parallel=parallel)
        assert 0.9 * 20 * 2**20 < launch.cache.bytes <= 20 * 2**20


def test_budget_of_the_model(here, smollm2, tmp_path):
    """A budget in the file counts, shows in what is said, and is told to the server: nothing else may overrule it."""
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_float32(KEY_BUDGET, 0.5))
    launch = here(model=path, n_ctx=None)
    assert value(launch.command, "--kv-budget") == "0.5"
    assert launch.cache.active and launch.cache.bytes <= launch.cache.bytes_full / 2


def test_conversations_share(here):
    """Each may use every position, and has its part of the cells; split by hand, it has its part of both."""
    alone, shared = here(budget=parse_budget("0.5")), here(budget=parse_budget("0.5"), parallel=4)
    assert shared.cache.bytes <= alone.cache.bytes and shared.cache.n_ctx_seq == alone.cache.n_ctx_seq == 2048
    assert shared.cache.cells == alone.cache.cells // 4 // 32 * 32
    assert "--kv-unified" in shared.command
    full = here(parallel=4)
    assert full.cache.n_ctx_seq == 512 and "--kv-unified" not in full.command, "what cannot evict is split"
    assert here(parallel=4, extra=("-kvu",)).cache.n_ctx_seq == 2048
    split = here(budget=parse_budget("0.5"), parallel=4, extra=("--no-kv-unified",))
    assert split.cache.n_ctx_seq == 512 and "--kv-unified" not in split.command


def test_cache_types(here):
    """Types given to the server count for bytes."""
    launch = here(budget=parse_budget("0.5"), extra=("-ctk", "q8_0", "--cache-type-v", "q8_0"))
    assert launch.cache.bytes_full == 45 * 2**20 * 34 // 64


def test_defaults_give_way(here):
    for flag in ("--cache-ram", "-cram", "--cache_ram"):
        command = here(extra=(flag, "64")).command
        assert command[-2:] == [flag, "64"] and sum("ram" in each for each in command) == 1


def test_memory(start, here):
    """Context and budget are chosen and said, and the sum of what is needed stays below."""
    outcome = start("--memory", "224MiB")
    argv = started(outcome)
    assert 0.2 <= float(value(argv, "--kv-budget")) <= 1 and 512 <= int(value(argv, "--ctx-size")) <= 8192
    assert int(value(argv, "--ubatch-size")) <= 512
    rows = {line[:10].strip(): line[10:] for line in outcome.err.splitlines()}
    assert {"memory", "budget", "address", "KV cache"} <= rows.keys()
    assert "of 224.0 MiB" in rows["memory"]
    given = here(memory=256 * 2**20, n_ctx=4096, budget=parse_budget("0.3"))
    assert value(given.command, "--kv-budget") == "0.3" and value(given.command, "--ctx-size") == "4096"
    largest = here(budget=parse_budget("auto")).cache
    assert (largest.n_ctx, largest.budget) == (2048, 1.0), "the largest budget that fits free memory"


def test_memory_counts_what_it_says(here):
    """Weights once, and no copies of windows; a second model is not counted, and refused."""
    command = here(memory=256 * 2**20).command
    assert value(command, "--load-mode") == "none" and value(command, "--ctx-checkpoints") == "0"
    command = here(memory=256 * 2**20, extra=("-ctxcp", "2", "-lm", "mmap")).command
    assert "--ctx-checkpoints" not in command and "--load-mode" not in command
    with pytest.raises(DepthKVError, match="would do is") as caught:
        here(memory=100 * 2**20, n_ctx=8192)
    least = parse_size(str(caught.value).partition("would do is ")[2].partition(",")[0])
    command = here(memory=least + 2**20, n_ctx=8192, extra=("-ub", "512")).command
    assert command[-2] == "--ubatch-size" and int(command[-1]) < 512, "the last one counts"
    given: dict[str, Any]
    for given in ({"memory": 256 * 2**20}, {"budget": parse_budget("auto")}):
        with pytest.raises(DepthKVError, match="-md after -- brings a second model"):
            here(extra=("-md", "draft.gguf"), **given)
    assert "-md" in here(extra=("-md", "draft.gguf")).command


def test_the_environment(start):
    """What upstream reads from it does not contradict what was planned."""
    argv = started(start("-c", 2048, LLAMA_ARG_KV_BUDGET="0.5", LLAMA_ARG_UBATCH="64"))
    assert value(argv, "--kv-budget") == "0.5" and value(argv, "--ubatch-size") == "512"


@pytest.mark.parametrize(("flag", "written"), [("-b", "512x"), ("--ubatch-size", "0")])
def test_numbers_after_the_dashes(here, flag, written):
    with pytest.raises(DepthKVError, match=f"{written} after -- is not a number above 0"):
        here(extra=(flag, written))


def test_no_pin(here):
    assert "--no-kv-pin" in here(pin=False).command


def test_key_is_not_in_the_process_list(start):
    """Neither in the arguments of the server nor in what is said."""
    for outcome in (start("--api-key", "s3cret"), start(LLAMA_API_KEY="s3cret")):
        assert outcome.code == 7 and json.loads(outcome.out)["key"] == "s3cret"
        assert "s3cret" not in " ".join(started(outcome)) and "s3cret" not in outcome.err


def test_key_file(here, tmp_path):
    path = tmp_path / "keys"
    path.write_text("# clients\n\nkey-1\nkey-2\n")
    assert value(here(api_key_file=path, host="0.0.0.0").command, "--api-key-file") == str(path)


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="a file that can be read once")
def test_a_key_file_that_can_be_read_once(here):
    """The server would find it empty, and let everyone in."""
    read, write = os.pipe()
    os.write(write, b"key-1\n")
    os.close(write)
    try:
        with pytest.raises(DepthKVError, match="is not a regular file"):
            here(api_key_file=Path(f"/dev/fd/{read}"), host="0.0.0.0")
    finally:
        os.close(read)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no exec")
def test_it_becomes_the_server(stand_in, free_port):
    """The same process: its signals and its exit code are the server's."""
    command = [sys.executable, "-m", "depthkv_edge", "serve", "smollm2", "-c", "512"]
    command += ["--port", str(free_port), "--", "--wait"]
    environment = os.environ | {"DEPTHKV_LIB_PATH": str(stand_in)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        said = json.loads(process.stdout.readline())
        assert said["pid"] == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


# what is refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--kv-budget", "2"], ["KV budget 2", "(0, 1]"]),
        (["--kv-budget", "0.01", "-c", "2048"], ["below the floor", "--kv-budget"]),
        (["--kv-budget", "0.1", "-c", "2048", "--parallel", "4"], ["below the floor", "lower --parallel"]),
        (["--memory", "64MiB"], ["64.0 MiB is too little memory", "the least that would do"]),
        (["-c", "9000"], ["-c 9000", "8192"]),
        (["--port", "0"], ["--port 0", "65535"]),
        (["--port", "65536"], ["--port 65536", "65535"]),
        (["--host", "0.0.0.0"], ["--host 0.0.0.0", "other machines", "--api-key"]),
        (["--host", "::"], ["--host ::", "--api-key"]),
        (["--host", "no-such-host.invalid"], ["no-such-host.invalid", "127.0.0.1"]),
        (["--host", ""], ["--host"]),
        (["--api-key", ""], ["--api-key is empty"]),
        (["--api-key", "a,b"], ["--api-key", "commas"]),
        (["--api-key-file", "no-such-file"], ["no-such-file", "cannot be read"]),
        (["--", "--ctx-size", "32"], ["--ctx-size after --", "use -c before it"]),
        (["--", "--override-kv", "depthkv.budget=float:0.5"], ["second KV budget"]),
        (["--", "--no-such-flag"], ["llama-server refuses: invalid argument: --no-such-flag"]),
        (["--", "--threads", "many"], ["llama-server refuses", '"--threads": stoi']),
        (["--", "--silent"], ["llama-server", "exit code 3"]),
        (["--", "--cache-type-k", "q3"], ["q3", "q8_0"]),
    ],
)
def test_refused(refuse, arguments, parts):
    line = refuse(*arguments)
    assert all(part in line for part in parts), line


OURS = (
    "-m --model --model-url -hf --hf_repo -c --ctx_size --kv-budget --host --port --api-key --api_key_file -np "
    "--parallel --no-kv-pin"
).split()


@pytest.mark.parametrize("flag", OURS)
def test_ours_are_refused_wherever_they_stand(here, flag):
    with pytest.raises(DepthKVError, match=f"{flag} after -- contradicts what the server is started with: use "):
        here(extra=("--jinja", flag, "x", "--no-mmap"))


def test_wrong_models(refuse, tmp_path):
    path = tmp_path / "m.gguf"
    assert "does not exist" in refuse(model=path)
    path.write_bytes(b"GGUF" + bytes(99))
    assert "m.gguf: " in refuse(model=path)
    assert "'mamba'" in refuse("--kv-budget", "0.5", model=write_mamba(path))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_port_taken(refuse, host):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refuse("--host", host, "--port", port)
    assert f"port {port} of {host} is taken" in line and "--port" in line


def test_port_just_left(here, free_port):
    """Connections of an earlier server that still fade do not take the port."""
    with (
        socket.create_server(("127.0.0.1", free_port)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        server.accept()[0].close()  # who closes first has to wait
        client.recv(1)
    assert here().address == f"http://127.0.0.1:{free_port}/"


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "holds no key"), (b"# nothing\n\n", "holds no key"), (b"key\r\n", "carriage return")]
)
def test_key_file_without_keys(refuse, tmp_path, content, says):
    """The server would take it for no key at all, and let everyone in, or for a key that nobody has."""
    (tmp_path / "keys").write_bytes(content)
    assert says in refuse("--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")


def test_server_not_built(cli, stand_in, tmp_path, free_port):
    for path in stand_in.iterdir():
        if path.name != "llama-server":
            shutil.copy(path, tmp_path)
    line = refused(cli("serve", "smollm2", "--port", free_port, DEPTHKV_LIB_PATH=str(tmp_path)))
    assert f"no llama-server in {tmp_path}" in line and "scripts/setup.sh" in line
    (tmp_path / "llama-server").write_text("not a program")
    line = refused(cli("serve", "smollm2", "--port", free_port, DEPTHKV_LIB_PATH=str(tmp_path)))
    assert "cannot be run" in line and "scripts/setup.sh" in line
