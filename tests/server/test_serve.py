"""`depthkv-edge serve` with the real server, spoken to through the official `openai` package."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.serve import INSTALL_OPENAI, Server, running, soak
from depthkv_edge import DepthKVError
from depthkv_edge.server.launch import server_binary

try:
    import openai
except ImportError:
    openai = None  # type: ignore[assignment]

N_CTX, PARALLEL, BUDGET = 2048, 4, 0.4
CELLS = BUDGET * N_CTX / PARALLEL  # of a conversation in a layer, on average
KEY = "the-key"
ARGUMENTS = ["--kv-budget", str(BUDGET), "-c", str(N_CTX)]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
THREADS = ["--", "-t", str(min(2, CORES))]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    if openai is None:
        pytest.fail(f"openai is not installed: run `{INSTALL_OPENAI}`")
    try:
        server_binary()
    except DepthKVError as error:
        pytest.fail(str(error))
    directory = tmp_path_factory.mktemp("serve")
    return lambda *arguments, **given: running("smollm2", *arguments, log=directory / "server.log", **given)


@pytest.fixture(scope="module")
def server(start: Callable[..., Any]) -> Iterator[Server]:
    """Four conversations, each with a quarter of 40 % of the cache, behind a key."""
    with start(*ARGUMENTS, "--parallel", str(PARALLEL), *THREADS, key=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def lives(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to it, the server answers afterwards, and no slot is taken."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        assert server.process.poll() is None, server.log.read_text()[-2000:]
        assert server.get("health") == {"status": "ok"}
        wait_until(lambda: server.busy() == 0)


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=server.url + "v1", api_key=KEY, max_retries=0, timeout=60)


def wait_until(condition: Callable[[], bool], timeout: float = 20) -> float:
    """Seconds until it is true."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout
        time.sleep(0.02)
    return time.monotonic() - started


def ask(text: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


# what an app does


def test_streaming_chat(client):
    stream = client.chat.completions.create(
        model="smollm2",
        messages=ask("Name three colours.", "You are brief."),
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=24,
        temperature=0,
    )
    said, reasons, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            said += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert len(said) > 10 and reasons in (["stop"], ["length"])
    assert usage.prompt_tokens > 10 and 0 < usage.completion_tokens <= 24


def test_models(client, smollm2):
    (model,) = client.models.list().data
    assert model.id == smollm2.stem, "its name, and not its path"


# SmolLM2's own template knows no tools; this one is that of its kin
TEMPLATE = """
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n\\nYou are provided with function signatures within ' }}
{{- '<tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n' }}
{{- '</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def test_tool_call(start, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome", "Bonn", "Oslo"]}},
                "required": ["city"],
            },
        },
    }
    with start(*ARGUMENTS, *THREADS, "--chat-template-file", str(tmp_path / "template.jinja"), key=KEY) as server:
        client = openai.OpenAI(base_url=server.url + "v1", api_key=KEY, max_retries=0, timeout=60)
        # upstream's grammar lets words precede a call, and so small a model finds no end of them unless it is shown how
        before: list[dict[str, Any]] = []
        for city in ("Paris", "Rome", "Bonn"):
            call = {"name": "get_weather", "arguments": json.dumps({"city": city})}
            before += ask(f"How is the weather in {city}?")
            before += [{"role": "assistant", "tool_calls": [{"id": city, "type": "function", "function": call}]}]
        answer = client.chat.completions.create(
            model="any",
            messages=before + ask("How is the weather in Oslo?"),
            tools=[tool],
            tool_choice="required",
            max_tokens=96,
            temperature=0,
        )
        pinned = server.get("slots")[0]["kv"]["pinned"]
    assert answer.choices[0].message.tool_calls, answer
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert pinned > 60, "what the model is told of its tools is pinned"


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="any",
        messages=ask("Ann is 31 years old."),
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        max_tokens=64,
    )
    found = json.loads(answer.choices[0].message.content)
    assert found.keys() == {"name", "age"} and found["name"] in ("Ann", "Bob") and 1 <= found["age"] <= 99


# what the cache holds


def test_slots(client, server, text):
    """After more tokens than cells, in a quarter of the cells; what the numbers mean is in test_server_native.py."""
    client.chat.completions.create(
        model="any",
        messages=ask(text[:3000], "You never forget the word azure."),
        max_tokens=2,
        extra_body={"id_slot": 1, "cache_prompt": False},
    )
    assert "strips" not in server.get("slots")[1]["kv"]
    slots = server.get("slots?strips=1")
    assert len(slots) == PARALLEL
    kv, n = slots[1]["kv"], slots[1]["n_prompt_tokens"]
    assert kv["active"] and kv["budget"] == pytest.approx(BUDGET) and kv["scorer"] == "attention"
    assert n > CELLS and len(kv["layers"]) == len(kv["strips"]) == 30
    assert all(layer["evicted"] > 0 for layer in kv["layers"])
    assert all(strip[0] == 1.0 for strip in kv["strips"]), "sinks and the pinned system prompt are at the front"
    assert 0.9 * CELLS < sum(layer["cells"] for layer in kv["layers"]) / 30 <= CELLS
    assert 5 < kv["pinned"] < 40
    assert sum(slot["kv"]["bytes"] for slot in slots) <= BUDGET * sum(slot["kv"]["bytes_full"] for slot in slots)


# several conversations


def test_nothing_of_another_conversation(server, text):
    """Bit for bit the same logits, whatever the other conversations hold. The prompt is longer than its cells."""

    def complete(slot: int, prompt: str, n: int) -> dict[str, Any]:
        body = {"prompt": prompt, "id_slot": slot, "n_predict": n, "n_probs": 5, "temperature": 0}
        return server.post("completion", body | {"cache_prompt": False})

    def answer() -> list[Any]:
        return complete(0, text[5000:6500] + " The secret is", 6)["completion_probabilities"]

    found = []
    for secret in ("azure", None):
        for slot in (1, 2, 3):
            complete(slot, f"The secret is {secret}. " * 25 if secret else text[:500], 1)
        found.append(answer())
    assert found[0] == found[1]


def test_parallel_with_disconnects(server):
    """Secrets of one conversation are never in another one's answer, and hanging up hurts nobody."""
    result = soak(server, seconds=6, n=PARALLEL, every=0.5)
    assert result.errors == [] and result.leaks == []
    assert result.n_answers > 0 and result.n_hung_up > 0
    assert result.freed < 3


def long_answer(server: Server, prompt: str, n: int) -> socket.socket:
    """A connection on which an answer is under way."""
    body = json.dumps({"messages": ask(prompt), "stream": True, "max_tokens": n, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1].strip("/"))), timeout=30)
    connection.sendall(head.encode() + body)
    return connection


def test_disconnect_during_the_prompt(server, text):
    """Before the first token: what is left of the prompt is not read."""
    connection = long_answer(server, text[10_000:16_500], 100)
    wait_until(lambda: server.busy() == 1)
    connection.close()
    taken = next(slot["id_task"] for slot in server.get("slots") if slot["is_processing"])
    wait_until(lambda: server.busy() == 0)
    (slot,) = (slot for slot in server.get("slots") if slot.get("id_task") == taken)
    assert slot["n_prompt_tokens"] < 1400, "a batch or two of about 1,600 tokens"
    assert slot["next_token"][0]["n_decoded"] == 0


def test_hundred_disconnects(server):
    """No leak of slots, of connections or of memory."""

    def hang_up(i: int) -> None:
        connection = long_answer(server, f"Story number {i}.", 200)
        if i % 2:
            connection.recv(1024)
        if i % 3 == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
        connection.close()

    hang_up(0)
    wait_until(lambda: server.busy() == 0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hang_up, range(20)))
    wait_until(lambda: server.busy() == 0)
    before = server.rss()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hang_up, range(80)))
    wait_until(lambda: server.busy() == 0)
    assert server.rss() - before < 4 * 2**20
    assert "llamacpp:requests_processing 0" in server.get("metrics")


# bad input


def post(server: Server, body: bytes, path: str = "v1/chat/completions", key: str = KEY) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(server.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


HELLO = ask("Hello")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def look_at(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def follow(schema: dict[str, Any]) -> dict[str, Any]:
    return {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


BAD: dict[str, Any] = {
    "empty": b"",
    "trailing": b'{"messages": []} {}',
    "not utf-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "an array": [],
    "no messages": {},
    "messages a string": {"messages": "hello"},
    "message without role": {"messages": [{"content": "hello"}]},
    "part of unknown type": {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
    "image": look_at("data:image/png;base64,AAAA"),
    "file": look_at("file:///etc/passwd"),
    "negative max_tokens": {"messages": HELLO, "max_tokens": -5},
    "too many answers": {"messages": HELLO, "n": 99},
    "temperature a string": {"messages": HELLO, "temperature": "hot"},
    "unknown format": {"messages": HELLO, "response_format": {"type": "xml"}},
    "bad schema": follow({"type": "nonsense"}),
    "bad reference": follow({"$ref": "#/nowhere"}),
    "bad grammar": {"messages": HELLO, "grammar": "root ::= ("},
    "tool without function": {"messages": HELLO, "tools": [{"type": "function"}]},
    "unknown tool choice": {"messages": HELLO, "tools": [TOOL], "tool_choice": "perhaps"},
    "ten thousand messages": {"messages": [{"role": "user", "content": f"message {i}"} for i in range(10_000)]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server, name):
    """The fault of the client, said as OpenAI says it."""
    body = BAD[name] if isinstance(BAD[name], bytes) else json.dumps(BAD[name]).encode()
    status, answer = post(server, body)
    assert 400 <= status < 500, answer
    error = json.loads(answer)["error"]
    assert error["code"] == status and error["message"] and error["type"]


def test_too_long_says_how_long(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=ask("word " * 5000), stream=True)
    assert caught.value.type == "exceed_context_size_error"
    assert caught.value.body["n_ctx"] == N_CTX and caught.value.body["n_prompt_tokens"] > 5000


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deep_nesting(server, depth):
    """Of a body, of a message, of a schema: refused or ignored, but never the end of the process."""
    deep = "[" * depth + "]" * depth
    schema = '{"type": "array", "items": ' * depth + '{"type": "string"}' + "}" * depth
    form = '{"type": "json_schema", "json_schema": {"schema": ' + schema + "}}"
    hello = '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, '
    for body in (
        deep,
        '{"messages": ' + deep + "}",
        '{"messages": [{"role": "user", "content": ' + deep + "}]}",
        hello + '"logit_bias": ' + deep + "}",
        hello + '"response_format": ' + form + "}",
        hello + '"tools": ' + deep + "}",
    ):
        try:
            status, _ = post(server, body.encode())
        except (http.client.HTTPException, OSError) as error:
            pytest.fail(f"no answer to {body[:60]}...: {error!r}\n{server.log.read_text()[-500:]}")
        assert status < 500, body[:60]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(
        [0, 1, -1, -7, 2**31, -(2**31), 2**63, 10**30, 0.5, -0.5, 1e300, "", "auto", "x", "\u0000", "\U0001f600"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "content", "role", "name", "0"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = (
    "messages stream stream_options n stop seed temperature top_p top_k min_p logprobs top_logprobs "
    "logit_bias tools tool_choice parallel_tool_calls response_format json_schema grammar id_slot "
    "cache_prompt samplers lora repeat_last_n penalty_prompt dry_sequence_breakers mirostat n_keep n_discard "
    "n_probs min_keep ignore_eos chat_template_kwargs reasoning_format reasoning_effort return_progress "
    "timings_per_token t_max_predict_ms response_fields add_generation_prompt continue_final_message "
    "max_tokens max_completion_tokens n_predict verbose return_tokens"
).split()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
def test_random_fields(server, fields):
    """Whatever stands in a field, the answer is an answer or the client's fault, and the server lives."""
    body = {"messages": HELLO, "max_tokens": 1} | fields
    if any(name in fields for name in ("max_tokens", "n_predict", "max_completion_tokens")):
        body["stop"] = ["e", "a", "o", " "]  # it may have become endless
    status, said = post(server, json.dumps(body).encode())
    assert status == 200 or (status < 500 and json.loads(said)["error"]["message"]), said


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1]])
def test_wrong_key(server, key):
    for path in ("v1/chat/completions", "completion", "tokenize"):
        status, answer = post(server, json.dumps({"messages": HELLO}).encode(), path, key)
        assert status == 401 and json.loads(answer)["error"]["type"] == "authentication_error"
    for path in ("slots", "metrics", "props", "v1/models"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.get(path, Authorization=f"Bearer {key}")
        assert caught.value.code == 401


def test_unknown_path(server):
    for path in ("v2/chat", "index.html/x", "../secrets", "..%2f..%2fetc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.get(path)
        assert 400 <= caught.value.code < 500


# the page


def test_page(server):
    """At the root, without a key, and nothing else of the disk."""
    with urllib.request.urlopen(server.url, timeout=10) as response:
        page = response.read().decode()
        assert response.headers["Content-Type"].startswith("text/html")
    assert "<title>DepthKV Edge</title>" in page and "Content-Security-Policy" in page


def test_other_sites(server):
    """A page of another origin cannot read what the server says to the reader's browser; a local app can."""

    def allowed(origin: str) -> str | None:
        request = urllib.request.Request(server.url + "health", headers={"Origin": origin})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.headers["Access-Control-Allow-Origin"]

    assert allowed("https://other.example") is None
    assert allowed("http://localhost:3000") == "http://localhost:3000"


# the process


def test_signals(start):
    """It ends as llama-server does: at once when it is idle, at the second signal when a client stays connected."""
    with start("-c", "512", *THREADS) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
    port = int(server.url.rsplit(":", 1)[1].strip("/"))
    with (
        start("-c", "512", *THREADS, key=KEY, port=port) as server,
        long_answer(server, "A long story.", 400) as client,
    ):
        client.recv(100)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) in (0, 1)


def test_memory(start, smollm2):
    """The process stays under what it was given when four conversations have filled their cells."""
    limit = 190 * 2**20
    with start("--memory", "190MiB", "-c", "2048", "--parallel", "4", *THREADS) as server:
        body = {"n_predict": 8, "prompt": "word " * 500, "cache_prompt": False}
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda slot: server.post("completion", body | {"id_slot": slot}), range(4)))
        status = Path(f"/proc/{server.pid}/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        assert peak <= limit
