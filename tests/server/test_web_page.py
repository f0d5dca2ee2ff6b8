"""The page of the server, in a browser, against a stand-in for llama-server."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from playwright.sync_api import ConsoleMessage, sync_playwright
from support.web_stand_in import CELLS, N_LAYERS, PAGE, StandIn, serve

SOURCE = PAGE.read_text("utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH to render with"
)


# the source


def part(tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", SOURCE, re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_nothing_from_outside():
    """The policy lets in this page's script and style and nothing else, not even a second script of its own."""

    def allowed(tag: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(part(tag).encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src '{allowed('script')}'; style-src '{allowed('style')}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in SOURCE
    assert SOURCE.index("Content-Security-Policy") < SOURCE.index("<style>")
    assert "//" not in re.sub(r"^\s*//.*|\s//.*", "", SOURCE, flags=re.MULTILINE), "no address of another server"
    assert not re.findall(r"\s(?:style|on\w+)=", SOURCE)


def test_text_only():
    """What a model says is never read as HTML or as a program."""
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in SOURCE


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.all: list[tuple[str, dict[str, str]]] = []
        self.feed(SOURCE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.all.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []


def test_names():
    """Every field has a label, every reference a target."""
    elements = Elements()
    assert len(elements.ids) == len(set(elements.ids))
    labelled = {attributes["for"] for tag, attributes in elements.all if tag == "label"}
    for tag, attributes in elements.all:
        if tag in ("input", "textarea"):
            assert attributes["id"] in labelled
        for name in ("for", "aria-describedby", "aria-labelledby"):
            assert attributes.get(name) in (None, *elements.ids)
    assert set(re.findall(r'\$\("([\w-]+)"\)', SOURCE)) <= set(elements.ids)


def colours() -> tuple[dict[str, str], dict[str, str]]:
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", SOURCE, re.S)
    )
    return light, dark


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(p * w for p, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    low, high = sorted(luminance(colour) + 0.05 for colour in (one, other))
    return high / low


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    """WCAG 2, level AA: text 4.5, edges of fields and what a drawing tells by lightness 3."""
    found = colours()[theme]
    assert found.keys() == colours()[0].keys()
    for name in ("ink", "muted", "blue", "orange"):
        assert contrast(found[name], found["paper"]) >= 4.5
    assert contrast(found["edge"], found["paper"]) >= 3
    for name in ("blue", "orange"):
        assert contrast(found[name], found["band"]) >= 3, "held differs from evicted without colour"


# a browser


class Browser:
    """One page of a headless Chromium."""

    def __init__(self) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        self._page = self._browser.new_page()
        # Playwright's own way to run a script is one that the page's policy forbids
        self.call = self._page.context.new_cdp_session(self._page).send
        self._complaints: list[str] = []
        self._requested: set[str] = set()
        self._page.on("pageerror", lambda error: self._complaints.append(str(error)))
        self._page.on("console", self._on_console)
        self._page.on("request", lambda request: self._requested.add(request.url.partition("?")[0]))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self._complaints.append(message.text)

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def open(self, url: str, *, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        self.look(width=width, height=height, dark=dark)
        self._page.goto("about:blank")
        self._complaints.clear()
        self._requested.clear()
        self._page.goto(url)

    def look(self, *, width: int, height: int, dark: bool = False) -> None:
        self._page.set_viewport_size({"width": width, "height": height})
        self._page.emulate_media(color_scheme="dark" if dark else "light", reduced_motion="reduce")

    def run(self, script: str) -> Any:
        arguments = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", arguments)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, timeout: float = 10) -> None:
        end = time.monotonic() + timeout
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}\n{self.run('document.body.innerText')}"
            self._page.wait_for_timeout(20)

    def type(self, text: str) -> None:
        self._page.keyboard.insert_text(text)

    def press(self, key: str, *, shift: bool = False) -> None:
        self._page.keyboard.press(f"Shift+{key}" if shift else key)

    def said(self, id: str) -> str:
        return str(self.run(f"document.getElementById({id!r}).innerText")).replace("\u00a0", " ").replace("\u202f", " ")

    def complaints(self) -> list[str]:
        """What went wrong in the page: exceptions, and what its policy refused."""
        return self._complaints

    def requested(self) -> set[str]:
        return self._requested


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def says() -> Iterator[StandIn]:
    with serve(StandIn()) as stand_in:
        yield stand_in


def ask(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('input').focus()")
    browser.type(text)
    browser.press("Enter")


IDLE = "document.getElementById('log').getAttribute('aria-busy') == 'false'"
TURNS = "[...document.querySelectorAll('.turn .text')].map((e) => e.textContent)"


@in_a_browser
def test_chat(browser, says):
    browser.open(says.url)
    browser.wait("document.getElementById('model').textContent == 'SmolLM2-135M-Instruct.Q4_1'")
    browser.run("document.getElementById('settings').open = true; document.getElementById('system').focus()")
    browser.type("Be brief.")
    assert browser.run("document.getElementById('key-row').getClientRects().length") == 0, "no key is asked for"
    ask(browser, "How many words?")
    browser.wait(IDLE)
    assert browser.run(TURNS) == ["How many words?", "Four words of answer."]
    assert browser.said("status") == "Answered. 41.0 tokens/s; 1 000 tokens read, 2 000 kept."
    assert browser.run("document.activeElement.id") == "input" and browser.run("document.activeElement.value") == ""
    ask(browser, "And now?")
    browser.wait(f"{IDLE} && {TURNS}.length == 4")
    first, second = says.chats
    system = {"role": "system", "content": "Be brief."}
    assert first["messages"] == [system, {"role": "user", "content": "How many words?"}]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": "Four words of answer."},
        {"role": "user", "content": "And now?"},
    ]
    assert first["stream"] is True and first["seed"] != second["seed"]
    origin = says.url
    assert browser.requested() == {origin, origin + "props", origin + "slots", origin + "v1/chat/completions"}
    assert browser.complaints() == []


@in_a_browser
def test_view_of_the_cache(browser, says):
    """While an answer is under way: what our slot holds, as a drawing, in words and as a table."""
    browser.open(says.url)
    browser.wait("!document.getElementById('cache-facts').hidden")
    assert browser.said("fact-slot") == "none of 4 yet" and "nothing yet" in browser.said("fact-held")
    assert browser.run("document.getElementById('figure').hidden"), "another conversation is not shown as ours"
    says.gate.clear()
    ask(browser, "Hello")
    browser.wait("!document.getElementById('figure').hidden")
    assert browser.run(IDLE) is False
    assert browser.said("cache-note") == "40 % of the full cache, scored by attention, optimal layers."
    assert browser.said("fact-memory") == "30.0 MiB of 75.0 MiB (40 %) for each conversation"
    assert browser.said("fact-held") == "1 200 of 3 000 tokens in a layer on average, 1 345 cells"
    assert browser.said("fact-evicted") == "1 800 tokens in a layer on average"
    why = "4 sinks, 296 pinned, 32 recent, 868 chosen for their scores, in a layer on average"
    assert browser.said("fact-why") == why
    assert browser.said("fact-pinned") == "the first 300 tokens"
    assert browser.said("fact-slot") == "3 of 4"
    label = browser.run("document.getElementById('strips').getAttribute('aria-label')").replace("\u00a0", " ")
    assert re.fullmatch(
        r"30 layers hold \d+ % of 3.000 tokens on average, layer 0 the least with \d+ %, layer (2[0-9]) the most with "
        r"\d+ %\. The first 300 are pinned\.",
        label,
    ), label
    looks = sum("/slots?strips=1" in path for path in says.paths)
    says.n_tokens = 4000
    browser.wait("document.getElementById('fact-evicted').textContent.startsWith('2')")
    assert "2 800" in browser.said("fact-evicted")
    time.sleep(1.2)
    assert looks + 1 <= sum("/slots?strips=1" in path for path in says.paths) <= looks + 5, (
        "a few times a second at most"
    )
    says.gate.set()
    browser.wait(IDLE)
    browser.run("document.querySelector('.cache details').open = true")
    rows = browser.run(
        "[...document.querySelectorAll('#layers tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert len(rows) == N_LAYERS
    expected = ["3", str(CELLS + 30), "1200", "4", "296", "32", "868", "2800", "1.00"]
    assert [cell.replace("\u202f", "") for cell in rows[3]] == expected
    time.sleep(0.7)
    looks = len(says.paths)
    time.sleep(0.7)
    assert len(says.paths) == looks, "an idle page leaves the server alone"


@in_a_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_drawing(browser, says, dark):
    """Held parts are blue, pinned ones orange under a bracket, evicted ones pale, in the reader's theme."""
    browser.open(says.url, dark=dark)
    ask(browser, "Hello")
    browser.wait(f"{IDLE} && document.getElementById('strips').width > 100")
    pixel = (
        "(x, y) => [...document.getElementById('strips').getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)"
    )
    width, height = browser.run("[document.getElementById('strips').width, document.getElementById('strips').height]")
    found = colours()[dark]

    def at(x: float, y: float) -> list[int]:
        return browser.run(f"({pixel})({int(x * width)}, {int(y)})")

    def rgb(name: str) -> list[int]:
        return [int(found[name][i : i + 2], 16) for i in (1, 3, 5)]

    assert at(0.05, 10) == rgb("orange") and at(0.99, 10) == rgb("blue")
    assert at(0.05, 2) == rgb("ink") and at(0.5, 2) != rgb("ink"), "the bracket ends where pins do"
    blue, band = rgb("blue"), rgb("band")
    for x, y in itertools.product((0.2, 0.4, 0.6, 0.8), (10, height - 3)):
        between = [(value - low) / (high - low) for value, low, high in zip(at(x, y), band, blue, strict=True)]
        assert all(0.05 < share < 0.95 for share in between) and max(between) - min(between) < 0.05


@in_a_browser
def test_stop(browser, says):
    """The stop button and the Escape key end an answer, the server notices, and the conversation goes on."""
    browser.open(says.url)
    for i, stop in enumerate(("button", "key")):
        says.gate.clear()
        says.hung_up.clear()
        ask(browser, "Go on")
        browser.wait(f"{TURNS}.at(-1) == 'Four '")
        assert browser.said("status") == "Answering."
        if stop == "button":
            browser.run("document.getElementById('stop').click()")
        else:
            browser.press("Escape")
        browser.wait(IDLE)
        assert says.hung_up.wait(5)
        assert browser.said("status") == "Stopped." and len(browser.run(TURNS)) == 2 * (i + 1)
    says.gate.set()
    ask(browser, "More")
    browser.wait(f"{IDLE} && {TURNS}.length == 6")
    assert [message["content"] for message in says.chats[2]["messages"]] == ["Go on", "Four ", "Go on", "Four ", "More"]
    assert not browser.run("document.querySelector('.problem')")


@in_a_browser
def test_one_at_a_time(browser, says):
    browser.open(says.url)
    says.gate.clear()
    ask(browser, "One")
    browser.wait(f"{TURNS}.at(-1) == 'Four '")
    ask(browser, "Two")
    assert browser.run("document.getElementById('input').value") == "Two" and len(says.chats) == 1
    assert browser.run("document.getElementById('send').getAttribute('aria-disabled')") == "true"


@in_a_browser
def test_new_chat(browser, says):
    """Also in the middle of an answer, of which nothing comes back."""
    browser.open(says.url)
    says.gate.clear()
    ask(browser, "Old")
    browser.wait(f"{TURNS}.at(-1) == 'Four '")
    browser.run("document.getElementById('new').click()")
    assert says.hung_up.wait(5)
    assert browser.run(TURNS) == [] and not browser.run("document.getElementById('empty').hidden")
    browser.wait("document.getElementById('fact-slot').textContent.startsWith('none')")
    says.gate.set()
    ask(browser, "New")
    browser.wait(f"{IDLE} && {TURNS}.length == 2")
    assert [message["content"] for message in says.chats[1]["messages"]] == ["New"]


@in_a_browser
def test_no_html(browser, says):
    """What the model says is shown as it is, and so is what the user and the server say."""
    bad = "<img src=x onerror=alert(1)><script>alert(2)</script> <b>&amp;</b>"
    says.words = ["<img src=x ", "onerror=alert(1)><script>alert(2)</script> <b>&amp;</b>"]
    browser.open(says.url)
    ask(browser, bad)
    browser.wait(IDLE)
    assert browser.run(TURNS) == [bad, bad]
    says.fail = 400, {"message": bad, "type": "invalid_request_error"}
    ask(browser, "Again")
    browser.wait("document.querySelector('.problem')")
    assert browser.run("document.querySelector('.problem').textContent") == f"The server refused: {bad}."
    assert browser.run("document.querySelectorAll('#log img, #log script, #log b').length") == 0
    assert browser.complaints() == []


@in_a_browser
@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (
            (400, {"message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": 9000, "n_ctx": 8192}),
            "The conversation is longer than the context (9 000 of 8 192 tokens). Begin a new chat, or send less.",
        ),
        (
            (400, {"message": "bad", "type": "exceed_context_size_error"}),
            "The conversation is longer than the context.",
        ),
        ((503, {"message": "Loading model", "type": "unavailable_error"}), "The server is not ready: the model is"),
        ((500, {"message": "Compute error.", "type": "server_error"}), "The server refused: Compute error.."),
        ((500, {}), "The server refused: status 500."),
        ("drop", "The server cannot be reached, or it closed the connection."),
        ({"code": 500, "message": "Compute error", "type": "server_error"}, "The server refused: Compute error."),
    ],
    ids=["too long", "too long, no numbers", "loading", "failed", "failed without words", "drop", "error within"],
)
def test_errors_in_words(browser, says, fail, words):
    """What was asked is not lost, and the next request is well formed."""
    browser.open(says.url)
    within = not isinstance(fail, tuple)
    if within:
        says.fail_within = fail
    else:
        says.fail = fail
    ask(browser, "Important question")
    browser.wait("document.querySelector('.problem')")
    problem = browser.run("document.querySelector('.problem').textContent").replace("\u202f", " ")
    assert problem.startswith(words.removesuffix(".")), problem
    assert browser.run("document.querySelector('.problem').getAttribute('role')") == "alert"
    assert browser.run(IDLE)
    if within:
        assert browser.run(TURNS) == ["Important question", "Four words "]
    else:
        assert browser.run(TURNS) == []
        assert browser.run("document.getElementById('input').value") == "Important question"
    browser.run("document.getElementById('input').value = ''")
    ask(browser, "Next")
    browser.wait(f"{IDLE} && !document.querySelector('.problem')")
    roles = [message["role"] for message in says.chats[1]["messages"]]
    assert roles == (["user", "assistant", "user"] if within else ["user"])


@in_a_browser
def test_server_gone(browser):
    with serve(StandIn()) as says:
        browser.open(says.url)
        browser.wait("document.getElementById('model').textContent.startsWith('Smol')")
    ask(browser, "Hello?")
    browser.wait("document.querySelector('.problem')")
    assert browser.run("document.querySelector('.problem').textContent").startswith("The server cannot be reached")


@in_a_browser
def test_loading(browser, says):
    says.loading = True
    browser.open(says.url)
    browser.wait("document.getElementById('model').textContent == 'The model is loading.'")
    says.loading = False
    browser.wait("document.getElementById('model').textContent == 'SmolLM2-135M-Instruct.Q4_1'")


@in_a_browser
def test_api_key(browser, says):
    """Asked for only if the server wants one, kept for the tab and nowhere else."""
    says.key = "secret-key"
    browser.open(says.url)
    browser.wait("!document.getElementById('key-row').hidden")
    assert (
        browser.run("document.activeElement.id") == "key" and browser.run("document.activeElement.type") == "password"
    )
    assert browser.said("model") == "The server asks for an API key."
    browser.type("wrong")
    browser.press("Enter")
    browser.wait("document.getElementById('model').textContent == 'The server does not accept this API key.'")
    browser.run("document.getElementById('key').focus()")
    browser.type("secret-key")
    browser.press("Enter")
    browser.wait("document.getElementById('key-row').hidden")
    assert browser.said("model") == "SmolLM2-135M-Instruct.Q4_1"
    ask(browser, "Hello")
    browser.wait(f"{IDLE} && {TURNS}.length == 2")
    assert browser.run("Object.values(sessionStorage)") == ["secret-key"]
    assert browser.run("localStorage.length") == 0 and browser.run("document.cookie") == ""
    browser.run("location.reload()")
    browser.wait("document.getElementById('model')?.textContent == 'SmolLM2-135M-Instruct.Q4_1'")
    browser.run("sessionStorage.clear()")


@in_a_browser
def test_keyboard(browser, says):
    """Everything is reached in the order it is seen, nothing holds the focus, and the focus is visible."""
    browser.open(says.url)
    browser.wait("!document.getElementById('cache-facts').hidden")
    browser.run("document.body.focus()")
    active, reached = "document.activeElement", []
    for _ in range(9):
        browser.press("Tab")
        reached.append(browser.run(f"{active}.id || {active}.tagName + {active}.className"))
        if reached[-1] != "BODY":
            style = f"getComputedStyle({active})"
            assert browser.run(f"{style}.outlineStyle") == "solid"
            assert browser.run(f"parseFloat({style}.outlineWidth)") >= 2
    assert reached[:7] == ["new", "SUMMARY", "log", "input", "stop", "send", "SUMMARY"], reached
    assert "BODY" in reached or "new" in reached[7:], "the way leads out of the page"
    browser.run("document.getElementById('input').focus()")
    browser.type("one")
    browser.press("Enter", shift=True)
    browser.type("two")
    assert browser.run("document.getElementById('input').value") == "one\ntwo" and says.chats == []
    browser.press("Tab")
    browser.press("Tab")
    browser.press(" ")
    browser.wait(f"{IDLE} && {TURNS}.length == 2")
    assert says.chats[0]["messages"][0]["content"] == "one\ntwo"
    assert browser.run("document.activeElement.id") == "send", "the focus stays where it was"


MEASURE = """
(() => {
  const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility == 'visible';
  const texts = [...document.querySelectorAll('body *')].filter(
    (e) => shown(e) && e.tagName != 'SCRIPT' && [...e.childNodes].some((n) => n.nodeType == 3 && n.data.trim()));
  const controls = [...document.querySelectorAll('button, input, textarea, summary')].filter(shown);
  const root = document.documentElement;
  return {
    width: root.scrollWidth, visible: root.clientWidth,
    fonts: texts.map((e) => parseFloat(getComputedStyle(e).fontSize)),
    outside: texts.concat(controls).filter((e) => {
      const r = e.getBoundingClientRect();
      return !e.closest('.scroll') && (r.left < -0.5 || r.right > root.clientWidth + 0.5);
    }).map((e) => e.outerHTML.slice(0, 80)),
    controls: controls.map((e) => [e.id || e.textContent, e.getBoundingClientRect().height]),
    background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    composer: document.getElementById('composer').getBoundingClientRect().bottom,
    cache: document.getElementById('cache-title').getBoundingClientRect().bottom,
    strips: document.getElementById('strips').getBoundingClientRect().top,
    below: document.querySelector('.cache').getBoundingClientRect().top,
  };
})()
"""


@in_a_browser
@pytest.mark.parametrize(("width", "dark"), [(320, False), (360, True), (768, False), (1200, True)])
def test_widths(browser, says, width, dark):
    """On a phone, a tablet and a desktop, before, during and after an answer with a long word in it."""
    says.words = ["A ", "word" * 60, "\n", "and " * 300]
    browser.open(says.url, width=width, height=740, dark=dark)
    browser.wait("!document.getElementById('cache-facts').hidden")
    steps = ["idle", "answering", "answered"]
    for step in steps:
        if step == "answering":
            says.gate.clear()
            ask(browser, "A question " + "of many words " * 20)
            browser.wait("document.getElementById('strips').width > 100")
        if step == "answered":
            says.gate.set()
            browser.wait(IDLE)
            browser.run("for (const e of document.querySelectorAll('details')) e.open = true")
        found = browser.run(MEASURE)
        assert found["width"] == found["visible"] == width and found["outside"] == []
        assert min(found["fonts"]) >= 15
        assert min(height for _, height in found["controls"]) >= 44, found["controls"]
        if step != "answered":
            assert found["composer"] <= 740 and found["cache"] <= 740, "both are seen without scrolling"
        assert width > 960 or found["composer"] <= found["below"], "one does not cover the other"
        if step == "answering":
            assert found["strips"] <= 740 - 120, "and most of the strips"
    css = [
        "rgb({}, {}, {})".format(*(int(colours()[dark][n][i : i + 2], 16) for i in (1, 3, 5))) for n in ("paper", "ink")
    ]
    assert [found["background"], found["ink"]] == css


@in_a_browser
def test_spoken(browser, says):
    """The answer is announced when it is whole, not word by word, and the drawing has a name."""
    browser.open(says.url)
    says.gate.clear()
    ask(browser, "Hello")
    browser.wait("!document.getElementById('figure').hidden")
    log = "document.getElementById('log')"
    assert browser.run(f"[{log}.getAttribute('role'), {log}.getAttribute('aria-busy')]") == ["log", "true"]
    says.gate.set()
    browser.wait(IDLE)
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]}
    browser.call("Accessibility.disable")
    assert {("log", "Conversation"), ("button", "Send"), ("button", "Stop"), ("button", "New chat")} <= named
    assert any(role == "textbox" and name.startswith("Message") for role, name in named)
    assert any(role in ("image", "img") and "layers hold" in name for role, name in named)


@in_a_browser
@pytest.mark.parametrize("how", ["no kv", "full", "one slot"])
def test_other_servers(browser, says, how, monkeypatch):
    """A server without facts of its cache, one without a budget, one with a single slot."""
    if how == "no kv":
        monkeypatch.setattr(says, "slots", lambda: [{"id": 0, "n_ctx": 512}])
    says.active = how != "full"
    says.n_slots = 1 if how == "one slot" else 4
    browser.open(says.url)
    ask(browser, "Hello")
    browser.wait(f"{IDLE} && {TURNS}.length == 2")
    browser.wait("!document.getElementById('cache-note').textContent.startsWith('Nothing')")
    expected = {
        "no kv": "The server does not say what its cache holds.",
        "full": "All of it: nothing is evicted.",
        "one slot": "40 % of the full cache, scored by attention, optimal layers.",
    }
    assert browser.said("cache-note") == expected[how]
    if how == "one slot":
        assert browser.said("fact-slot") == "the only one"
    if how == "full":
        browser.wait("document.getElementById('fact-why').textContent == 'all are held'")
    assert browser.complaints() == []
