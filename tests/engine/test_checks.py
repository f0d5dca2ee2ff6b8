"""Numbers and models that the engine would crash on, or take for others, are refused by name."""

from __future__ import annotations

import sys
import time
from fractions import Fraction

import click
import numpy as np
import pytest
from conftest import run_python
from hypothesis import given
from hypothesis import strategies as st

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.checks import INT32_MAX, MAX_THREADS, check_number, check_threads, default_threads
from depthkv_edge.cli.main import cli as command
from depthkv_edge.cli.main import main

OUTSIDE = st.one_of(
    st.integers(max_value=-2),
    st.integers(min_value=INT32_MAX + 1),
    st.floats(),
    st.none(),
    st.text(max_size=3),
    st.just(Fraction(1, 2)),
)


@given(st.integers(), st.integers(-10, 10), st.integers(0, 10))
def test_a_number_in_a_range(value, least, width):
    if least <= value <= least + width:
        assert check_number("n", value, least, least + width) == value
    else:
        with pytest.raises(DepthKVError, match=rf"^n .* is out of range: give {least} to {least + width}$"):
            check_number("n", value, least, least + width)


def test_numbers_of_numpy_are_numbers():
    assert check_number("n", np.int64(3)) == 3 and check_number("n", np.uint8(3)) == 3


@given(OUTSIDE)
def test_threads(value):
    with pytest.raises(DepthKVError, match="^n_threads "):
        check_threads("n_threads", value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0.5, "0.5 is not a whole number"),
        ("4", "'4' is not a whole number"),
        (0, "0 is out of range"),
        (-1, "-1 is out of range"),
        (65, "65 is far above the 2 cores of this machine"),
        (10**19, f"{10**19} is far above the 2 cores of this machine"),
        (10**40, "of more than 30 digits is far above the 2 cores of this machine"),
    ],
)
def test_how_many_threads_there_may_be(monkeypatch, value, why):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(DepthKVError, match=rf"^n_threads {why}: give 1 to 64$"):
        check_threads("n_threads", value)


def test_more_cores_than_the_engine_has_room_for(monkeypatch, smollm2):
    monkeypatch.setattr("os.cpu_count", lambda: 1100)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 1100)
    assert check_threads("--threads", default_threads()) == MAX_THREADS
    for threads in ({}, {"n_threads": None, "n_threads_batch": 0}):
        llama = Llama(smollm2, n_ctx=64, verbose=False, **threads)
        params = llama.context_params
        llama.close()
        assert (params.n_threads, params.n_threads_batch) == (MAX_THREADS, MAX_THREADS)
    llama = Llama(smollm2, n_ctx=64, verbose=False, n_threads=3)
    llama.close()
    assert (llama.context_params.n_threads, llama.context_params.n_threads_batch) == (3, MAX_THREADS)


@pytest.fixture(scope="module")
def llama(smollm2):
    with_budget = Llama(smollm2, n_ctx=256, kv_budget=0.5, verbose=False)
    yield with_budget
    with_budget.close()


@given(value=OUTSIDE)
def test_what_no_position_layer_or_sequence_is(llama, value):
    before = llama.kv_stats()
    for call in (
        lambda: llama.pin(value, 8),
        lambda: llama.pin(0, value),
        lambda: llama.pin(0, 8, seq_id=value),
        lambda: llama.unpin(seq_id=value),
        lambda: llama.kv_positions(value),
        lambda: llama.kv_positions(0, seq_id=value),
        lambda: llama.kv_stats(seq_id=value),
    ):
        with pytest.raises(DepthKVError):
            call()
    assert llama.kv_stats() == before


@given(layer=st.integers(0, INT32_MAX))
def test_layers(llama, layer):
    n_layers = len(llama.kv_stats().layers)
    if layer < n_layers:
        assert llama.kv_positions(layer) == []
    else:
        with pytest.raises(DepthKVError, match=f"layer index {layer} is out of range: {n_layers} layers"):
            llama.kv_positions(layer)


@pytest.mark.parametrize("name", ["n_ctx", "n_batch", "n_ubatch", "n_sink", "n_recent", "n_threads", "type_k"])
@given(
    value=st.one_of(
        st.integers(max_value=-1),
        st.integers(min_value=INT32_MAX + 1),
        st.just(0.5),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
        st.just("512"),
    )
)
def test_arguments(smollm2, name, value):
    with pytest.raises(DepthKVError, match=name):
        Llama(smollm2, verbose=False, **{name: value})


@pytest.mark.parametrize("name", ["n_ctx", "n_batch", "n_ubatch"])
def test_arguments_that_have_to_be_there(smollm2, name):
    """The base class has no other meaning for None than for a number."""
    with pytest.raises(DepthKVError, match=f"{name} None is not a whole number"):
        Llama(smollm2, verbose=False, **{name: None})


@pytest.mark.parametrize("value", [4, 9, 15, 31, 39, 999])
def test_types_that_no_cache_has(smollm2, value):
    with pytest.raises(DepthKVError, match=f"type_v {value} is no type of a KV cache"):
        Llama(smollm2, type_v=value, verbose=False)


def test_a_model_that_has_been_closed(smollm2):
    llama = Llama(smollm2, n_ctx=256, kv_budget=0.5, verbose=False)
    llama.close()
    llama.close()
    for call in (
        llama.kv_stats,
        lambda: llama.kv_positions(0),
        lambda: llama.pin(0, 4),
        llama.unpin,
        llama.n_ctx,
        llama.n_vocab,
        llama.token_eos,
        lambda: llama.ctx,
        lambda: llama.tokenize(b"Hello"),
        lambda: llama.detokenize([1]),
        lambda: llama.eval([1]),
        lambda: llama("Hello"),
        lambda: llama.create_chat_completion([{"role": "user", "content": "Hello"}]),
        llama.save_state,
    ):
        with pytest.raises(DepthKVError, match=r"\.gguf has been closed: load it again"):
            call()


def test_no_model():
    with pytest.raises(DepthKVError, match="no model is named"):
        Llama("")


# --- the command line -------------------------------------------------------------------------------------------------

# where so large or so small a number is allowed
ALLOWED = {("calibrate", "--seed"), ("serve", "--port")}
HUGE = "9" * 30

NUMBERS = [
    (name, tuple(option.opts), value)
    for name, sub in command.commands.items()
    for option in sub.params
    if isinstance(option, click.Option) and isinstance(option.type, click.types.IntParamType)
    for value in (HUGE, f"-{HUGE}", "-1", "0.5", "", " ")
    if (name, option.opts[0]) not in ALLOWED
]
FILES = [
    (name, max(option.opts, key=len))
    for name, sub in command.commands.items()
    for option in sub.params
    if isinstance(option, click.Option) and option.metavar and option.metavar.startswith(("FILE", "DIR"))
]
REQUIRED = {"run": ["-p", "Hello"], "calibrate": ["-o", "out.gguf"]}


def refusal(monkeypatch, capsys, *arguments: str) -> str:
    """The one line, with which a command ends at once."""
    monkeypatch.setattr(sys, "argv", ["depthkv-edge", *arguments])
    started = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        main()
    assert time.monotonic() - started < 60  # what would take hours did not begin
    written = capsys.readouterr()
    assert caught.value.code == 2 and written.out == ""
    assert written.err.startswith("depthkv-edge: ") and written.err.count("\n") == 1
    return written.err


@pytest.mark.parametrize(("name", "spellings", "value"), NUMBERS)
def test_every_number_of_every_command(monkeypatch, capsys, name, spellings, value):
    given = f"{max(spellings, key=len)}={value}"
    line = refusal(monkeypatch, capsys, name, "smollm2", *REQUIRED.get(name, []), given)
    assert any(spelling in line for spelling in spellings)


@pytest.mark.parametrize(("name", "option"), FILES)
def test_every_file_of_every_command(monkeypatch, capsys, name, option):
    line = refusal(monkeypatch, capsys, name, "smollm2", *REQUIRED.get(name, []), f"{option}=")
    assert f"{option} is empty" in line


@pytest.mark.parametrize("name", sorted(command.commands))
def test_every_model_of_every_command(monkeypatch, capsys, name):
    assert "no model is named" in refusal(monkeypatch, capsys, name, "", *REQUIRED.get(name, []))


@pytest.mark.parametrize("name", ["run", "chat", "bench", "eval"])
@pytest.mark.parametrize("value", ["1000", "100000", "0"])
def test_more_threads_than_do_any_good(monkeypatch, capsys, name, value):
    line = refusal(monkeypatch, capsys, name, "smollm2", *REQUIRED.get(name, []), "--threads", value)
    assert f"--threads {value} " in line


SERVER_THREADS = (
    "-t --threads -tb --threads-batch --threads_batch --threads-http --spec-draft-threads -td --threads-draft "
    "--spec-draft-threads-batch -tbd --threads-batch-draft"
).split()


@pytest.mark.parametrize("flag", SERVER_THREADS)
@pytest.mark.parametrize("value", ["100000", "+100000", " 100000", "100000x", HUGE])
def test_more_threads_than_do_any_good_in_the_server(monkeypatch, capsys, flag, value):
    line = refusal(monkeypatch, capsys, "serve", "smollm2", "--", flag, value)
    assert f"{flag} after --: " in line and "is far above" in line


@pytest.mark.parametrize(
    ("variable", "flag"), [("LLAMA_ARG_THREADS", "-t"), ("LLAMA_ARG_THREADS_HTTP", "--threads-http")]
)
def test_more_threads_than_do_any_good_in_the_environment(monkeypatch, capsys, variable, flag):
    monkeypatch.setenv(variable, "100000")
    assert f"{variable} 100000 is far above" in refusal(monkeypatch, capsys, "serve", "smollm2")
    # an argument wins over the variable
    assert variable not in refusal(monkeypatch, capsys, "serve", "smollm2", "--", flag, "2", "--no-such-flag")


@pytest.mark.parametrize(
    ("budget", "reason"), [([], "the KV cache takes"), (["--kv-budget", "0.9"], "longer than the 16777216 positions")]
)
def test_a_context_that_no_machine_holds(cli, smollm2, budget, reason):
    """Refused before its cells are counted out, which would take most of a minute."""
    started = time.monotonic()
    outcome = cli("run", "smollm2", "-p", "hi", "-c", 2**31 - 1, *budget)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert reason in outcome.err and "give a smaller" in outcome.err
    assert time.monotonic() - started < 30


def test_a_context_beyond_the_positions(cli, tmp_path):
    """The cache would be small, its positions are more than are computed with."""
    code = (
        "from depthkv_edge import Llama\n"
        "from depthkv_edge.engine import capi\n"
        "from depthkv_edge.modelfile.packaged import resolve_model\n"
        "Llama._check_memory = lambda *arguments: None\n"
        "Llama(resolve_model('smollm2'), n_ctx=2**25, kv_budget=0.01, verbose=False)\n"
    )
    assert "a context of 33554432 tokens is longer than the 16777216 positions" in run_python("-c", code).err
