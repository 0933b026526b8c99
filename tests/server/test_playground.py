"""The playground in a browser, against a server that says exactly what it is told to."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import pytest

from chordal.server.playground import playground_page

NASTY = "</script><script>document.title = 'hit'</script><img src=x onerror=alert(1)>"

SETTINGS = [
    {"name": "num_draft", "type": "integer", "choices": None, "default": 8, "help": "Of a round."},
    {"name": "match", "type": "string", "choices": ["first", "last"], "default": "first", "help": ""},
    {"name": "limit", "type": "number|null", "choices": None, "default": 0.5, "help": "None is no limit."},
    {"name": "length", "type": "integer|string", "choices": ["canvas"], "default": 4, "help": ""},
    {"name": "is_greedy", "type": "boolean", "choices": None, "default": False, "help": ""},
]


def decoder(name, family="autoregressive", promise="exact", settings=()):
    return {
        "name": name,
        "promise": promise,
        "exact_when": "",
        "paper": "arXiv 2304.04487",
        "family": family,
        "settings": list(settings),
    }


def event(kind, forward, positions, texts, *, confidence=None, kept=None, parents=None, tokens=None):
    return {
        "kind": kind,
        "forward": forward,
        "positions": positions,
        "tokens": tokens or [100 + sum(map(ord, text)) for text in texts],
        "texts": texts,
        "confidence": confidence,
        "kept": kept,
        "parents": parents,
    }


def chunk(*events, text="", finish=None, counts=None, decoder="prompt_lookup", usage=None):
    """A chunk of a chat; `counts` come with the one that finishes."""
    chordal = {}
    if events:
        chordal["events"] = list(events)
    if counts:
        chordal |= {"decoder": decoder, "promise": "exact", "counts": counts}
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    if chordal:
        choice["chordal"] = chordal
    return {"object": "chat.completion.chunk", "choices": [choice], "usage": usage}


def counts(forwards, tokens, drafted=0, kept=0, wall_s=0.5):
    return {
        "forwards": forwards,
        "committed_tokens": tokens,
        "tokens_per_forward": round(tokens / forwards, 4),
        "draft_tokens": drafted,
        "accepted_tokens": kept,
        "wall_s": wall_s,
        "queue_s": 0.0,
    }


def refuse(message, param=None):
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


class Script:
    """What the server does for one request: chunks, raw bytes, pauses for a gate, and then an end."""

    def __init__(self, *steps, status=200, headers=None, done=True):
        self.steps, self.status, self.headers, self.done = steps, status, headers or {}, done


# A chain: one token, then two of four drafts kept, then a draft that is rejected.
CHAIN = (
    chunk(event("commit", 1, [0], ["Ana"], confidence=[0.75]), text="Ana"),
    chunk(
        event("draft", 2, [1, 2, 3, 4], [" Ben", " Cleo", " Eva", " Mia"], kept=[0, 1]),
        event("commit", 2, [1, 2, 3], [" Ben", " Cleo", "\n"]),
        text=" Ben Cleo\n",
    ),
    chunk(
        event("draft", 3, [4], [" Kim"], kept=[]),
        event("commit", 3, [4, 5], [" Dan", "<|end|>"]),
        text=" Dan",
    ),
    chunk(finish="stop", counts=counts(3, 6, 5, 2)),
)
# A tree whose second branch is kept, and on it the first of two children.
TREE = (
    chunk(event("commit", 1, [0], ["Ana"])),
    chunk(
        event(
            "draft",
            2,
            [1, 1, 2, 2, 3],
            [" no", " Ben", " Cleo", " never", " Eva"],
            kept=[1, 2],
            parents=[-1, -1, 1, 1, 2],
        ),
        event("commit", 2, [1, 2, 3], [" Ben", " Cleo", " Dan"]),
        text="Ana Ben Cleo Dan",
    ),
    chunk(finish="length", counts=counts(2, 4, 5, 2)),
)
# A canvas of six: out of order, with guesses, and two cells behind the end of the text.
CANVAS = (
    chunk(
        event("commit", 1, [2], [" Cleo"], confidence=[0.9]),
        event("guess", 1, [0, 1], ["Eva", " Mia"], confidence=[0.4, 0.3]),
    ),
    chunk(event("commit", 2, [3, 4, 5], ["<|end|>", "<|end|>", "<|end|>"]), event("guess", 2, [0], ["Ana"])),
    chunk(event("commit", 3, [0, 1], ["Ana", " Ben"]), text="Ana Ben Cleo"),
    chunk(finish="stop", counts=counts(3, 4), decoder="threshold"),
)


class Fake:
    """A server of two models; `scripts` holds what it does for each decoder, by name."""

    def __init__(self):
        self.scripts = {}
        self.requests = []
        self.headers = []
        self.gate = threading.Semaphore(0)
        self.gone = threading.Event()
        self.key = None
        self.default_decoders = {"tiny-ar": "autoregressive", "tiny-mdm": "low_confidence"}
        self.is_loading = False
        self.decoders = {
            "tiny-ar": [decoder("autoregressive"), decoder("prompt_lookup", settings=SETTINGS)],
            "tiny-mdm": [decoder("low_confidence", "diffusion"), decoder("threshold", "diffusion")],
        }

    def app(self):
        from starlette.applications import Starlette
        from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
        from starlette.routing import Route

        def refusal(request):
            if self.is_loading:
                return error(503, "The models are still loading.", headers={"Retry-After": "1"})
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return error(401, "This server needs an API key.")
            return None

        def error(status, message, param=None, headers=None):
            return JSONResponse(refuse(message, param), status, headers)

        async def models(request):
            data = [
                {"id": name, "chordal": {"default_decoder": name_of_default, "has_chat_template": True}}
                for name, name_of_default in self.default_decoders.items()
            ]
            return refusal(request) or JSONResponse({"object": "list", "data": data})

        async def decoders(request):
            return refusal(request) or JSONResponse({"data": self.decoders[request.query_params["model"]]})

        async def complete(request):
            import anyio

            body = await request.json()
            self.requests.append((request.url.path, body))
            self.headers.append(dict(request.headers))
            if refused := refusal(request):
                return refused
            script = self.scripts[body["chordal"].get("decoder")]
            if script.status != 200:
                return JSONResponse(script.steps[0], script.status, script.headers)

            async def stream():
                is_whole = False
                try:
                    yield b": ping\n\n"
                    for step in script.steps:
                        if step == "gate":
                            while not self.gate.acquire(blocking=False):
                                await anyio.sleep(0.01)
                        elif isinstance(step, float):
                            await anyio.sleep(step)
                        elif isinstance(step, bytes):
                            yield step
                        else:
                            yield b"data: " + json.dumps(step).encode() + b"\n\n"
                    if script.done:
                        yield b"data: [DONE]\n\n"
                    is_whole = True
                finally:
                    if not is_whole:
                        self.gone.set()

            return StreamingResponse(stream(), media_type="text/event-stream")

        routes = [
            Route("/", lambda request: HTMLResponse(playground_page())),
            Route("/v1/models", models),
            Route("/v1/decoders", decoders),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ]
        return Starlette(routes=routes)


@pytest.fixture
def fake():
    """A fake server in a thread of its own; `fake.url` is where."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
    fake = Fake()
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(fake.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    fake.shut = lambda: (setattr(running, "should_exit", True), thread.join(10))
    yield fake
    fake.gate.release(100)
    fake.shut()
    listener.close()


class Shown:
    """A page of the playground and what went wrong in it."""

    def __init__(self, context, url, *, expected=()):
        self.url, self.page, self.faults, self.expected = url, context.new_page(), [], list(expected)
        self.page.set_default_timeout(10_000)
        self.page.on("pageerror", lambda error: self.faults.append(f"threw {error}"))
        self.page.on("console", self._log)
        self.page.on("request", self._ask)
        self.page.on("dialog", lambda dialog: self.faults.append("dialog"))

    def _log(self, line):
        # The browser itself logs what a server refuses.
        if line.type in ("warning", "error") and not any(one in line.text for one in self.expected):
            self.faults.append(line.text)

    def _ask(self, request):
        if not request.url.startswith((self.url, "data:")):
            self.faults.append(f"asked for {request.url}")

    def until(self, expression):
        """Wait until an expression holds; the page's policy forbids the driver's own way."""
        for _ in range(500):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never became true: {expression}")

    def open(self):
        self.page.goto(self.url)
        self.page.wait_for_selector("#run:enabled")
        self.until("document.querySelector('.decoder')?.value")
        return self.page

    def run(self):
        self.page.keyboard.press("Control+Enter")
        self.wait()

    def wait(self):
        self.page.wait_for_selector("#run:enabled")
        self.until("!panels.some((panel) => panel.isAsked)")

    def choose(self, decoder, model=None, panel=0):
        root = self.page.locator(".panel").nth(panel)
        if model:
            root.locator(".model").select_option(model)
        root.locator(f".decoder option[value={decoder}]").wait_for(state="attached")
        root.locator(".decoder").select_option(decoder)

    def cells(self, panel=0):
        """Give classes but "tok", pass and text of each cell; what the style writes stands in brackets."""
        return [
            (" ".join(sorted(set(classes.split()) - {"tok", "new"})), forward, text)
            for classes, forward, text in self.page.locator(".canvas")
            .nth(panel)
            .evaluate(
                """(canvas) => [...canvas.children].map((cell) => [cell.className, cell.dataset.forward,
                [...cell.childNodes].filter((node) => !node.classList?.contains("number"))
                    .map((node) => node.dataset ? `[${node.dataset.name}]` : node.data).join("")])"""
            )
        ]

    def count(self, name, panel=0):
        return self.page.locator(f".panel >> nth={panel} >> [data-count={name}] dd").inner_text()


@pytest.fixture
def make_shown(browser, fake):
    """Open a context for the playground; what the page logs, throws or asks others for fails the test."""
    opened = []

    def make(*, expected=(), url=fake.url, **settings):
        settings = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | settings
        context = browser.new_context(**settings)
        shown = Shown(context, url, expected=expected)
        opened.append((context, shown))
        return shown

    yield make
    for context, shown in opened:
        context.close()
        assert not shown.faults


@pytest.fixture
def shown(make_shown):
    shown = make_shown()
    shown.open()
    return shown


def test_what_the_page_holds_is_its_own_and_its_policy_lets_it_ask_its_server_only():
    page = playground_page()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none';")
    assert "connect-src 'self'" in policy
    assert "unsafe-eval" not in policy
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    assert page.count("<script") == page.count("</script>") == 2


@pytest.mark.browser
def test_a_chain_shows_which_pass_committed_each_token_and_what_it_kept(shown, fake):
    fake.scripts["prompt_lookup"] = Script(*CHAIN)
    shown.run()
    assert shown.cells() == [
        ("", "1", "Ana"),
        ("kept", "2", " Ben"),
        ("kept", "2", " Cleo"),
        ("", "2", "[\\n]\n"),
        ("", "3", " Dan"),
        ("name", "3", "[<|end|>]"),
        ("ghost", "3", " Kim"),
    ]
    rows = shown.page.locator(".lane li").all_inner_texts()
    assert [row.split("\n")[0] for row in rows] == ["pass 2: 2 of 4", "pass 3: 0 of 1"]
    assert shown.page.locator(".chip.kept").all_inner_texts() == [" Ben", " Cleo"]
    assert shown.page.locator(".chip.rejected").all_inner_texts() == [" Eva", " Mia", " Kim"]
    assert "2 of 5, 3 rejected" in shown.page.locator(".drafts h3").inner_text()


@pytest.mark.browser
def test_each_pass_has_a_colour_of_its_own_that_gets_darker(shown, fake):
    fake.scripts["prompt_lookup"] = Script(*CHAIN)
    shown.run()
    lightness = shown.page.evaluate(
        """() => [...document.querySelectorAll(".canvas .tok:not(.ghost)")].map((cell) =>
            Number(getComputedStyle(cell).backgroundColor.match(/oklch\\(([0-9.]+)/)[1]))"""
    )
    by_pass = [lightness[0], lightness[1], lightness[4]]
    assert lightness == [by_pass[0], *[by_pass[1]] * 3, *[by_pass[2]] * 2]
    assert by_pass[0] - by_pass[1] > 0.05 < by_pass[1] - by_pass[2]


@pytest.mark.browser
def test_a_tree_shows_its_kept_path_and_counts_the_rest(shown, fake):
    fake.scripts["prompt_lookup"] = Script(*TREE)
    shown.run()
    assert shown.cells() == [
        ("", "1", "Ana"),
        ("kept", "2", " Ben"),
        ("kept", "2", " Cleo"),
        ("", "2", " Dan"),
        ("ghost", "2", " Eva"),
    ]
    assert shown.page.locator(".chip").all_inner_texts() == [" Ben", " Cleo", " Eva", "+2 on other branches"]
    shown.page.locator(".chip.rest").hover()
    assert shown.page.locator("#tip").inner_text() == "Rejected: no, never"


@pytest.mark.browser
def test_a_canvas_is_empty_ahead_and_fills_in_any_order(shown, fake):
    fake.scripts["threshold"] = Script(CANVAS[0], "gate", CANVAS[1], "gate", CANVAS[2], "gate", *CANVAS[3:])
    shown.choose("threshold", "tiny-mdm")
    page = shown.page
    page.locator("#sampling summary").click()
    page.get_by_label("max_tokens").fill("7")
    page.keyboard.press("Control+Enter")
    mask = ("mask", "", "")
    page.wait_for_selector(".canvas .guess")
    assert shown.cells() == [
        ("guess", "1", "Eva"), ("guess", "1", " Mia"), ("", "1", " Cleo"), mask, mask, mask, mask,
    ]  # fmt: skip
    fake.gate.release()
    page.wait_for_selector(".canvas [data-forward='2']:not(.guess)")
    # The second guess stands in place of the first.
    ends = [("name", "2", "[<|end|>]"), ("again name", "2", ""), ("again name", "2", "")]
    assert shown.cells() == [("guess", "2", "Ana"), mask, ("", "1", " Cleo"), *ends, mask]
    fake.gate.release()
    page.wait_for_selector(".canvas [data-forward='3']")
    assert shown.cells()[:3] == [("", "3", "Ana"), ("", "3", " Ben"), ("", "1", " Cleo")]
    fake.gate.release()
    shown.wait()
    # Only now is it known where the text ends.
    beyond = [("again beyond name", "2", "")] * 2 + [("beyond mask", "", "")]
    assert shown.cells()[3:] == [("name", "2", "[<|end|>]"), *beyond]
    assert shown.count("tokens") == "4"


@pytest.mark.browser
def test_counters_live_are_the_pages_and_at_the_end_the_servers(shown, fake):
    # The server counts passes that no event tells of.
    fake.scripts["prompt_lookup"] = Script(
        *CHAIN[:2], "gate", CHAIN[2], chunk(finish="stop", counts=counts(8, 6, 9, 3))
    )
    page = shown.page
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".canvas [data-forward='2']")
    assert [shown.count(name) for name in ("forwards", "tokens", "per-forward", "drafted")] == [
        "2",
        "4",
        "2.00",
        "2 of 4",
    ]
    assert page.locator(".counters").get_attribute("data-from") == "page"
    assert float(shown.count("rate")) > 0
    fake.gate.release()
    shown.wait()
    assert [shown.count(name) for name in ("forwards", "tokens", "per-forward", "drafted")] == [
        "8",
        "6",
        "0.75",
        "3 of 9",
    ]
    assert shown.count("rate") == "12.0"  # 6 tokens in the half second that the server took
    assert page.locator(".counters").get_attribute("data-from") == "server"
    assert page.locator("#status").inner_text() == "Done: 6 tokens in 8 forward passes, 500 ms."


@pytest.mark.browser
def test_the_passes_can_be_scrubbed_and_played_again(shown, fake):
    fake.scripts["prompt_lookup"] = Script(*CHAIN)
    shown.run()
    page = shown.page
    scrub = page.get_by_role("slider", name="Forward pass of A")
    scrub.focus()
    page.keyboard.press("ArrowLeft")
    assert shown.cells()[-2:] == [("ghost", "2", " Eva"), ("ghost", "2", " Mia")]
    assert [shown.count(name) for name in ("forwards", "tokens", "drafted")] == ["2", "4", "2 of 4"]
    assert "Forward pass 2 of 3: 3 tokens" in scrub.get_attribute("aria-valuetext")
    page.keyboard.press("Home")
    assert shown.cells() == []
    page.get_by_label("Speed").select_option("15")
    page.get_by_role("button", name="Play again").press("Enter")
    shown.until("document.querySelector('.scrub').value === '3'")
    assert len(shown.cells()) == 7
    assert page.get_by_role("button", name="Play again").is_visible()


@pytest.mark.browser
def test_played_as_it_came_it_takes_the_time_it_took(shown, fake):
    fake.scripts["prompt_lookup"] = Script(CHAIN[0], 0.4, CHAIN[1], 0.3, *CHAIN[2:])
    shown.run()
    shown.page.get_by_label("Speed").select_option("0")
    begin = time.monotonic()
    shown.page.get_by_role("button", name="Play again").click()
    shown.until("document.querySelector('.scrub').value === '0'")
    shown.until("document.querySelector('.scrub').value === '3'")
    assert time.monotonic() - begin > 0.6


@pytest.mark.browser
def test_two_decoders_run_at_once_and_are_compared(shown, fake):
    # Each waits for the other: one after the other they would never end.
    fake.scripts["prompt_lookup"] = Script(CHAIN[0], "gate", *CHAIN[1:])
    plain = [
        chunk(event("commit", at + 1, [at], [text]), text=text) for at, text in enumerate(["Ana", " Ben"])
    ]
    fake.scripts["autoregressive"] = Script(
        *plain, "gate", chunk(finish="length", counts=counts(2, 2, wall_s=2.0))
    )
    page = shown.page
    page.get_by_role("button", name="Compare with another decoder").click()
    shown.choose("autoregressive", panel=1)
    page.keyboard.press("Control+Enter")
    shown.until("document.querySelectorAll('.canvas')[1].children.length === 2")
    shown.until("document.querySelectorAll('.canvas')[0].children.length === 1")
    assert len(fake.requests) == 2
    fake.gate.release(2)
    shown.wait()
    assert page.locator("#comparison").inner_text().split(" \u00b7 ") == [
        "A 2.00, B 1.00 tokens per forward (2.0x)",
        "A 500 ms, B 2.00 s (4.0x)",
        "texts differ from character 8",
    ]
    left, right = (page.locator(".panel").nth(at).bounding_box() for at in (0, 1))
    assert left["y"] == right["y"] and left["x"] < right["x"]
    assert len({page.locator(".counters").nth(at).bounding_box()["y"] for at in (0, 1)}) == 1
    page.set_viewport_size({"width": 390, "height": 844})
    top, bottom = (page.locator(".panel").nth(at).bounding_box() for at in (0, 1))
    assert top["x"] == bottom["x"] and top["y"] + top["height"] <= bottom["y"]


@pytest.mark.browser
def test_equal_texts_are_said_to_be_the_same(shown, fake):
    fake.scripts["prompt_lookup"] = fake.scripts["autoregressive"] = Script(*CHAIN)
    shown.page.get_by_role("button", name="Compare with another decoder").click()
    shown.choose("autoregressive", panel=1)
    shown.run()
    assert shown.page.locator("#comparison").inner_text().endswith("same text")
    shown.page.get_by_role("button", name="Remove decoder A").click()
    assert shown.page.locator(".panel").count() == 1
    assert shown.page.locator(".decoder").input_value() == "autoregressive"


@pytest.mark.browser
@pytest.mark.parametrize("way", ["button", "escape", "page"])
def test_stopping_ends_the_work_on_the_server(shown, fake, way):
    fake.scripts["prompt_lookup"] = Script(CHAIN[0], "gate", *CHAIN[1:])
    page = shown.page
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".canvas .tok")
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    elif way == "escape":
        page.keyboard.press("Escape")
    else:
        page.goto("about:blank")
    assert fake.gone.wait(10)
    if way == "page":
        return
    shown.wait()
    assert page.locator("#status").inner_text().startswith("Stopped: 1 token in 1 forward pass")
    assert shown.cells() == [("", "1", "Ana")]
    assert page.locator(".fault:visible").count() == 0


@pytest.mark.browser
def test_only_what_was_changed_is_sent(shown, fake):
    fake.scripts["prompt_lookup"] = Script(*CHAIN)
    page = shown.page
    shown.run()
    path, body = fake.requests[-1]
    assert path == "/v1/chat/completions"
    prompt = body["messages"][0].pop("content")
    assert prompt.startswith("rename result to count:\n")
    assert body == {
        "model": "tiny-ar",
        "messages": [{"role": "user"}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chordal": {"counts": True, "events": True, "decoder": "prompt_lookup", "settings": {}},
    }
    page.get_by_role("combobox", name="As", exact=True).select_option("plain")
    page.get_by_label("Prompt", exact=True).fill("once")
    page.locator("#sampling summary").click()
    for name, text in {"max_tokens": "", "temperature": "0.5", "seed": "7", "stop": "a\\n\nb"}.items():
        page.get_by_label(name, exact=True).fill(text)
    page.locator(".settings summary").click()
    for name, text in {"num_draft": "3", "limit": "none", "length": "canvas"}.items():
        page.get_by_label(name, exact=True).fill(text)
    page.get_by_label("match").select_option(label="last")
    page.get_by_label("is_greedy").select_option(label="yes")
    shown.run()
    path, body = fake.requests[-1]
    assert path == "/v1/completions"
    assert body["prompt"] == "once"
    assert {name: body.get(name) for name in ("temperature", "seed", "stop", "max_tokens")} == {
        "temperature": 0.5,
        "seed": 7,
        "stop": ["a\n", "b"],
        "max_tokens": None,
    }
    assert body["chordal"]["settings"] == {
        "num_draft": 3,
        "match": "last",
        "limit": None,
        "length": "canvas",
        "is_greedy": True,
    }


@pytest.mark.browser
def test_a_decoder_the_server_was_started_with_is_its_choice(make_shown, fake):
    fake.default_decoders["tiny-ar"] = "my_decoder"
    fake.scripts[None] = Script(*CHAIN)
    shown = make_shown()
    shown.page.goto(fake.url)
    shown.page.wait_for_selector("#run:enabled")
    assert shown.page.locator(".decoder option:checked").inner_text() == "server's choice: my_decoder"
    shown.run()
    assert fake.requests[-1][1]["chordal"] == {"counts": True, "events": True}
    assert "prompt_lookup" in shown.page.locator(".about").inner_text()  # what the server says it took


@pytest.mark.browser
def test_a_setting_that_cannot_be_read_is_not_sent(shown, fake):
    page = shown.page
    page.locator(".settings summary").click()
    page.get_by_label("num_draft").fill("many")
    page.locator(".settings summary").click()
    page.keyboard.press("Control+Enter")
    field = page.get_by_label("num_draft")
    assert field.is_visible()
    assert field.get_attribute("aria-invalid") == "true"
    assert "This must be a whole number; got many." in page.locator(".settings").inner_text()
    assert page.evaluate("document.activeElement.id") == field.get_attribute("id")
    assert fake.requests == []
    field.fill("4")
    assert field.get_attribute("aria-invalid") is None


@pytest.mark.browser
@pytest.mark.parametrize(
    ("param", "label"),
    [
        ("temperature", "temperature"),
        ("stop.0", "stop"),
        ("messages.0.content", "Prompt"),
        ("model", "Model"),
        ("chordal.decoder", "Decoder"),
        ("chordal.settings.num_draft", "num_draft"),
    ],
)
def test_a_refusal_stands_at_the_field_that_it_names(make_shown, fake, param, label):
    message = f"{NASTY} is not allowed."
    fake.scripts["prompt_lookup"] = Script(refuse(message, param), status=400)
    shown = make_shown(expected=["status of 400"])
    page = shown.open()
    shown.run()
    role = "combobox" if label in ("Model", "Decoder") else "textbox"
    field = page.get_by_role(role, name=label, exact=True)
    assert field.is_visible()
    assert field.get_attribute("aria-invalid") == "true"
    described = field.get_attribute("aria-describedby").split()
    assert message in [page.locator(f"#{one}").inner_text() for one in described]
    assert page.locator("#status").inner_text().startswith("Failed")
    fake.scripts["prompt_lookup"] = Script(*CHAIN)
    shown.run()
    assert page.locator(".fault:visible").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            Script(refuse("The queue is full."), status=429, headers={"Retry-After": "3"}),
            "The queue is full. Try again in 3 seconds.",
        ),
        (Script(refuse("x may not be y.", "unheard_of"), status=400), "x may not be y."),
        (Script({"error": None}, status=502), "The server answered 502"),
        (Script(CHAIN[0], refuse("The engine died.")), "The engine died."),
        (Script(CHAIN[0], done=False), "The connection broke before the text was whole."),
        (Script(CHAIN[0], b"data: {half\n\n"), "The connection broke before the text was whole."),
    ],
)
def test_other_faults_are_said_in_the_panel(make_shown, fake, script, says):
    fake.scripts["prompt_lookup"] = script
    shown = make_shown(expected=["status of 4", "status of 5"])
    page = shown.open()
    shown.run()
    problem = page.locator(".panel > .fault")
    assert problem.inner_text().startswith(says)
    assert problem.get_attribute("role") == "alert"
    # What came before stays.
    assert len(shown.cells()) == (1 if script.status == 200 else 0)
    assert page.locator("#run").is_enabled()


@pytest.mark.browser
def test_a_server_that_is_gone_is_said_to_be(make_shown, fake):
    shown = make_shown(expected=["ERR_"])
    page = shown.open()
    fake.shut()
    shown.run()
    assert page.locator(".panel > .fault").inner_text() == "The server does not answer. Is it still running?"


@pytest.mark.browser
def test_the_page_waits_for_a_server_that_loads(make_shown, fake):
    fake.is_loading = True
    shown = make_shown(expected=["status of 503"])
    page = shown.page
    page.goto(fake.url)
    assert page.get_by_text("The models are still loading.").is_visible()
    fake.is_loading = False
    page.wait_for_selector("#run:enabled")
    assert page.get_by_text("The models are still loading.").is_hidden()


@pytest.mark.browser
def test_a_key_is_asked_for_sent_and_kept_nowhere(make_shown, fake):
    fake.key = "secret-key"
    fake.scripts["prompt_lookup"] = Script(*CHAIN)
    shown = make_shown(expected=["status of 401"])
    page = shown.page
    page.goto(fake.url)
    field = page.get_by_label("API key")
    field.wait_for()
    assert page.locator("#run").is_disabled()
    field.fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("The server does not take this key.").wait_for()
    field.fill("secret-key")
    page.keyboard.press("Enter")
    shown.until("document.querySelector('.decoder')?.value === 'prompt_lookup'")
    assert field.is_hidden()
    shown.run()
    assert fake.headers[-1]["authorization"] == "Bearer secret-key"
    assert shown.count("tokens") == "6"
    assert "secret-key" not in page.content()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


@pytest.mark.browser
def test_what_a_model_writes_is_shown_and_never_run(shown, fake):
    nasty = [NASTY, "<b>bold</b>", "a\tb\r\u0000\u202e\u200b", "\U0001f469\u200d\U0001f680"]
    fake.scripts["prompt_lookup"] = Script(
        chunk(
            event("draft", 1, [0, 1, 2, 3, 4], [*nasty, NASTY], kept=[0, 1, 2, 3]),
            event("commit", 1, [0, 1, 2, 3], nasty),
            text="".join(nasty),
        ),
        chunk(finish=NASTY, counts=counts(1, 4, 5, 4) | {NASTY: NASTY}, decoder=NASTY),
    )
    shown.run()
    page = shown.page
    assert [text for _, _, text in shown.cells()] == [
        NASTY,
        "<b>bold</b>",
        "a[\\t]b[\\r][\\u{0}][\\u{202e}][\\u{200b}]",
        nasty[3],
        NASTY,
    ]
    page.locator(".more summary").click()
    assert page.locator(".plain").evaluate("(plain) => plain.textContent") == "".join(nasty)
    assert page.title() == "Chordal playground"
    assert page.locator("main img, main script, main b:not(.letter)").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("size", [1, 7])
def test_a_stream_may_be_cut_anywhere(shown, fake, size):
    text = "caf\u00e9 \U0001f600"
    pieces = [
        b": a comment\r\n\r\n",
        b"event: message\r\ndata: ",
        json.dumps(chunk(event("commit", 1, [0], [text]), text=text), ensure_ascii=False).encode(),
        b"\r\n\r\ndata:",
        # One event over two lines.
        json.dumps(chunk(finish="stop", counts=counts(1, 1)), indent=1).replace("\n", "\r\ndata: ").encode(),
        b"\r\rdata: [DONE]\n\n",
    ]
    whole = b"".join(pieces)
    fake.scripts["prompt_lookup"] = Script(
        *(part for at in range(0, len(whole), size) for part in (whole[at : at + size], 0.0005)), done=False
    )
    shown.run()
    assert shown.cells() == [("", "1", text)]
    assert page_faults(shown) == []
    assert shown.count("tokens") == "1"


def page_faults(shown):
    return shown.page.locator(".fault:visible").all_inner_texts()


@pytest.mark.browser
def test_everything_can_be_done_with_the_keyboard(shown, fake):
    fake.scripts["autoregressive"] = Script(*CHAIN)
    page = shown.page

    def tab_to(name):
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                """() => { const one = document.activeElement;
                return one.getAttribute("aria-label") ?? one.labels?.[0]?.textContent ?? one.textContent; }"""
            )
            if name in focused:
                # Focus can be seen.
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                return
        raise AssertionError(f"no Tab leads to {name}")

    tab_to("Prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("reverse: Ana Ben")
    tab_to("Decoder")
    page.keyboard.press("a")  # a list takes the first letter
    assert page.locator(".decoder").input_value() == "autoregressive"
    page.keyboard.press("Control+Enter")
    shown.wait()
    assert fake.requests[-1][1]["messages"][0]["content"] == "reverse: Ana Ben"
    tab_to("Ana")
    tip = page.locator("#tip")
    assert tip.inner_text() == '"Ana"\nforward pass 1\nconfidence 0.750\nid 372, position 0'
    page.keyboard.press("ArrowRight")
    assert "forward pass 2, drafted and kept" in tip.inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert tip.inner_text().startswith('" Dan"')
    page.keyboard.press("End")
    assert "rejected" in tip.inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    tab_to("Forward pass of A")
    page.keyboard.press("Home")
    assert shown.cells() == []
    # The focus goes along with what can be done next.
    fake.scripts["autoregressive"] = Script(CHAIN[0], "gate")
    page.locator("#run").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Enter")
    shown.wait()
    assert page.evaluate("document.activeElement.id") == "run"


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_never_scrolls_sideways(make_shown, fake, width):
    long = "w" * 300
    fake.scripts["prompt_lookup"] = Script(
        chunk(event("draft", 1, [0, 1], [long, long], kept=[0]), event("commit", 1, [0], [long]), text=long),
        *CHAIN[1:],
    )
    fake.scripts["autoregressive"] = Script(refuse(long), status=400)
    shown = make_shown(viewport={"width": width, "height": 844}, has_touch=True, expected=["status of 400"])
    page = shown.open()
    page.get_by_role("button", name="Compare with another decoder").click()
    shown.choose("autoregressive", panel=1)
    shown.run()
    for summary in page.locator("summary:visible").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.browser
def test_controls_are_large_enough_for_a_finger(make_shown, fake):
    fake.scripts["prompt_lookup"] = Script(*CHAIN)
    shown = make_shown(viewport={"width": 390, "height": 844}, has_touch=True)
    page = shown.open()
    shown.run()
    for summary in page.locator("summary:visible").all():
        summary.click()
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, textarea, summary")]
            .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 40)
            .map((one) => one.outerHTML)"""
    )
    assert small == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_can_be_read_on_every_colour(make_shown, fake, scheme):
    passes = 12
    steps = [chunk(event("commit", at + 1, [at], [" word"])) for at in range(passes)]
    fake.scripts["prompt_lookup"] = Script(*steps, chunk(finish="stop", counts=counts(passes, passes)))
    shown = make_shown(color_scheme=scheme)
    page = shown.open()
    shown.run()
    # A canvas gives any colour as the bytes that are seen.
    contrasts = page.evaluate(
        """() => {
            const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            const luminance = (colour) => {
                context.fillStyle = colour;
                context.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((part) => part / 255)
                    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            return [...document.querySelectorAll(".canvas .tok")].map((cell) => {
                const style = getComputedStyle(cell);
                const [low, high] = [style.color, style.backgroundColor].map(luminance).sort((a, b) => a - b);
                return (high + 0.05) / (low + 0.05);
            });
        }"""
    )
    assert len(contrasts) == passes
    assert min(contrasts) >= 4.5


@pytest.mark.browser
@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm", "tiny-block"])
def test_every_decoder_of_the_real_server_is_shown_as_it_was(make_shown, server, model):
    shown = make_shown(url=f"{server.base_url}/")
    page = shown.open()
    page.get_by_label("Example").select_option(label="Reverse a list")
    page.locator(".model").select_option(model)
    described = server.client.get("/v1/decoders", params={"model": model}).json()["data"]
    assert described
    for one in described:
        shown.choose(one["name"])
        shown.run()
        assert page.locator("#status").inner_text().startswith("Done: "), one["name"]
        text = page.locator(".plain").evaluate("(plain) => plain.textContent")
        # What the tokens of the text say is the text, but for the blank that it does not begin with.
        said = [
            text
            for classes, _, text in shown.cells()
            if not {"ghost", "beyond", "name", "mask"} & set(classes.split())
        ]
        assert "".join(said).lstrip() == text == "Dan Cleo Ben Ana", one["name"]
        assert page.locator(".settings .field").count() == len(one["settings"])


@pytest.mark.browser
def test_a_real_refusal_stands_at_its_setting(make_shown, server):
    shown = make_shown(url=f"{server.base_url}/", expected=["status of 400"])
    page = shown.open()
    shown.choose("prompt_lookup")
    page.locator(".settings summary").click()
    page.get_by_label("max_ngram").fill("0")
    shown.run()
    assert page.get_by_label("max_ngram").get_attribute("aria-invalid") == "true"
    assert page_faults(shown)


@pytest.mark.browser
def test_a_browser_that_gave_the_key_by_itself_is_not_asked_again(make_shown, make_server, models):
    with make_server(models, api_keys=("a-long-secret-key",)) as server:
        url = f"{server.base_url}/"
        credentials = {"username": "anyone", "password": "a-long-secret-key"}
        shown = make_shown(url=url, http_credentials=credentials, expected=["status of 401"])
        page = shown.open()
        shown.run()
        assert page.locator("#keying").is_hidden()
        assert page.locator("#status").inner_text().startswith("Done: ")
