"""The page at /, in headless Chromium, over the bundled model."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from other_threads import eventually
from serving import serving

from tilewright import Chat, GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect  # noqa: E402

from tilewright_serve import ServeSettings, create_app  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
expect.set_options(timeout=10_000)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

QUESTION = "How does the Declaration begin?"
NEW_TOKENS = 24
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", max_seq_len=2048, total_pages=512)
        engine.init_model("demo", DEMO_MODEL, runtime)
        yield engine


@contextmanager
def served(engine: LLMEngine, port: int = 0, **settings: object) -> Iterator[str]:
    """The address of a server of the engine's models."""
    app = create_app(engine, settings=ServeSettings(**settings))
    with serving(app, port) as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def address(engine: LLMEngine) -> Iterator[str]:
    with served(engine) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Opened]:
    """Opens the page with settings of the person's; no script of it may fail."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []

    def open(to: str = address, settings: dict | None = None, **options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda line: errors.append(line.text) if "Security Policy" in line.text else None,
        )
        page.goto(to)
        if settings is not None:
            kept = json.dumps(settings)
            page.evaluate("kept => localStorage.setItem('tilewright-settings', kept)", kept)
            page.reload()
        return page

    yield open
    for context in contexts:
        context.close()
    assert not errors


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def finished(page: Page) -> None:
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".busy")).to_have_count(0)


def answers(page: Page) -> list[str]:
    return page.locator(".assistant .text").evaluate_all("all => all.map(one => one.textContent)")


def tokens(page: Page) -> list[str]:
    return page.locator(".text span").evaluate_all("all => all.map(one => one.textContent)")


def events(*chunks: dict, done: bool = True) -> str:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


def token(found: bytes, logprob: float = -0.1, *top: tuple[bytes, float]) -> dict:
    def entry(found: bytes, logprob: float) -> dict:
        text = found.decode(errors="replace")
        return {"token": text, "bytes": list(found), "logprob": logprob}

    others = [entry(*one) for one in top]
    return {**entry(found, logprob), "top_logprobs": [entry(found, logprob), *others]}


def chunk(content: str = "", found: list[dict] | None = None, finish: str | None = None, **delta):
    logprobs = None if found is None else {"content": found}
    choice = {"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}
    return {"choices": [{**choice, "logprobs": logprobs}]}


def answer_with(page: Page, body: str, path: str = "chat/completions", **options: object) -> None:
    """Have the page get this in place of the server's answer."""

    def fulfil(route: Route) -> None:
        route.fulfill(
            **{"status": 200, "content_type": "text/event-stream", "body": body} | options
        )

    page.route(f"**/v1/{path}", fulfil)


def endless(page: Page) -> None:
    """Have the model's answers go on until they are stopped."""

    def go_on(route: Route) -> None:
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})

    page.route("**/v1/chat/completions", go_on)


def test_a_chat_shows_what_the_engine_says(opened: Opened, engine: LLMEngine) -> None:
    page = opened(settings=GREEDY)
    ask(page, QUESTION)
    finished(page)
    said = [{"role": "user", "content": QUESTION}]
    config = GenerateConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    first = engine.generate("demo", Chat(said), config)
    assert answers(page) == [first]
    assert "".join(tokens(page)) == first
    assert page.locator("#prompt").input_value() == ""

    ask(page, "And then?")
    finished(page)
    said += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert answers(page) == [first, engine.generate("demo", Chat(said), config)]


def test_a_raw_completion_goes_on_with_the_prompt(opened: Opened, engine: LLMEngine) -> None:
    page = opened(settings=GREEDY)
    page.click("text=Completion")
    ask(page, "We hold these truths")
    finished(page)
    config = GenerateConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    expected = engine.generate("demo", "We hold these truths", config)
    assert answers(page) == [expected]
    assert "".join(tokens(page)) == expected
    page.click("text=Chat")
    assert answers(page) == []


def test_settings_are_sent_and_kept(opened: Opened) -> None:
    page = opened()
    answer_with(page, events(chunk("yes", finish="stop")))
    page.click("#settings-button")
    values = {"temperature": "0.5", "top_p": "0.9", "top_k": "7", "seed": "3", "max_tokens": "9"}
    for name, value in values.items():
        page.fill(f"#settings [name={name}]", value)
    page.fill("#system", "Be brief.")
    page.select_option("#settings [name=thinking]", "off")
    page.press("#system", "Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.reload()
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Hello")
    sent = request.value.post_data_json
    assert {name: sent[name] for name in values} == {n: float(v) for n, v in values.items()}
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert sent["logprobs"] is True
    assert [m["content"] for m in sent["messages"]] == ["Be brief.", "Hello"]


def test_escape_stops_an_answer_and_frees_its_pages(opened: Opened, engine: LLMEngine) -> None:
    page = opened(settings={"max_tokens": 1900})
    endless(page)
    ask(page, QUESTION)
    expect(page.locator(".text span").nth(3)).to_be_visible()
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(".note")).to_contain_text("stopped")
    assert answers(page) != [""]
    eventually(lambda: not engine.stats("demo").used_pages)
    page.click("text=Regenerate")
    expect(page.locator(".text span").nth(3)).to_be_visible()
    page.click("#stop")
    finished(page)
    expect(page.locator(".assistant")).to_have_count(1)


def test_shift_enter_begins_a_line(opened: Opened) -> None:
    page = opened()
    page.fill("#prompt", "one")
    page.press("#prompt", "Shift+Enter")
    page.keyboard.type("two")
    assert page.locator("#prompt").input_value() == "one\ntwo"
    expect(page.locator("article")).to_have_count(0)


def test_the_last_message_can_be_edited(opened: Opened) -> None:
    page = opened(settings=GREEDY)
    answer_with(page, events(chunk("yes", finish="stop")))
    ask(page, "first")
    finished(page)
    ask(page, "second")
    finished(page)
    expect(page.get_by_text("Edit")).to_have_count(1)
    page.click("text=Edit")
    page.keyboard.press("Escape")
    page.click("text=Edit")
    page.keyboard.press("End")
    page.keyboard.type(" try")
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.press("Enter")
    finished(page)
    sent = [message["content"] for message in request.value.post_data_json["messages"]]
    assert sent == ["first", "yes", "second try"]
    page.click("text=Copy >> nth=-1")
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "yes"
    page.click("text=New chat")
    expect(page.locator("article")).to_have_count(0)
    page.click("text=Undo")
    expect(page.locator("article")).to_have_count(4)


def test_a_conversation_survives_a_reload(opened: Opened) -> None:
    page = opened(settings=GREEDY)
    ask(page, QUESTION)
    finished(page)
    before = answers(page), tokens(page), page.locator(".note").text_content()
    page.reload()
    assert (answers(page), tokens(page), page.locator(".note").text_content()) == before
    page.locator(".text span").first.hover()
    expect(page.locator("#alternatives tr")).to_have_count(5)


def test_an_answer_that_a_reload_cuts_is_kept_as_far_as_it_came(
    opened: Opened, engine: LLMEngine
) -> None:
    page = opened(settings={"max_tokens": 1900})
    endless(page)
    ask(page, QUESTION)
    expect(page.locator(".text span").nth(3)).to_be_visible()
    page.reload()
    assert len(answers(page)[0]) > 3
    expect(page.locator(".note")).to_contain_text("stopped")
    eventually(lambda: not engine.stats("demo").used_pages)


def test_the_key_is_asked_for_and_kept(opened: Opened, engine: LLMEngine) -> None:
    with served(engine, api_key="secret") as address:
        page = opened(address, GREEDY)
        form = page.locator("#key")
        expect(form).to_contain_text("expected Authorization: Bearer KEY")
        page.fill("#key-field", "wrong")
        page.press("#key-field", "Enter")
        expect(form).to_contain_text("found another one")
        page.fill("#key-field", "secret")
        page.press("#key-field", "Enter")
        expect(form).to_be_hidden()
        page.reload()
        expect(page.locator("#model")).to_have_value("demo")
        ask(page, QUESTION)
        finished(page)
        assert answers(page) != [""]
        expect(form).to_be_hidden()

        # A key that is no longer right: the answer that failed is asked for again.
        page.evaluate("sessionStorage.setItem('tilewright-key', 'old')")
        ask(page, "Again")
        expect(page.locator(".error:visible")).to_contain_text("Bearer KEY")
        page.fill("#key-field", "secret")
        page.press("#key-field", "Enter")
        expect(form).to_be_hidden()
        finished(page)
        expect(page.locator(".error:visible")).to_have_count(0)
        assert len(answers(page)) == 2


def test_a_full_server_is_told_in_place(opened: Opened) -> None:
    page = opened(settings=GREEDY)
    body = json.dumps({"error": {"message": "The queue is full.", "code": "queue_full"}})
    options = {"status": 503, "content_type": "application/json", "headers": {"Retry-After": "2"}}
    answer_with(page, body, **options)
    ask(page, QUESTION)
    expect(page.locator(".error")).to_have_text("The queue is full. (It asks to wait for 2 s.)")
    page.unroute("**/v1/chat/completions")
    page.click("text=Try again")
    expect(page.locator(".note")).to_contain_text(f"{NEW_TOKENS} tokens")
    expect(page.locator(".error")).to_be_hidden()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ({"error": {"message": "The executor died.", "code": 500}}, "The executor died."),
        (None, "The connection broke before the end of the answer."),
    ],
)
def test_an_error_after_the_start_keeps_the_text(
    opened: Opened, end: dict | None, message: str
) -> None:
    page = opened()
    answer_with(page, events(chunk("so far"), *([end] if end else []), done=False))
    ask(page, QUESTION)
    expect(page.locator(".error")).to_have_text(message)
    assert answers(page) == ["so far"]


def test_the_page_says_that_the_server_is_gone_and_finds_it_again(
    opened: Opened, engine: LLMEngine
) -> None:
    with served(engine) as address:
        page = opened(address, GREEDY)
        expect(page.locator("#figures")).to_contain_text("0 running")
    ask(page, QUESTION)
    expect(page.locator(".error")).to_have_text("The server does not answer.")
    expect(page.locator("#figures")).to_contain_text("has not answered since")
    with (
        page.expect_request("**/v1/models"),
        served(engine, port=httpx.URL(address).port),
    ):
        expect(page.locator("#figures")).to_contain_text("0 running")
        page.click("text=Try again")
        expect(page.locator(".note")).to_contain_text(f"{NEW_TOKENS} tokens")
        page.close()


def test_html_of_a_model_is_text(opened: Opened) -> None:
    page = opened()
    text = "<img src=x onerror='document.title=1'><script>document.title=2</script>&amp; **b**"
    answer_with(page, events(chunk(text, [token(text.encode())], "stop")))
    ask(page, text)
    finished(page)
    assert answers(page) == [text]
    page.locator(".text span").hover()
    assert page.title() == "Tilewright"
    for place in ("#conversation", "#alternatives"):
        assert page.locator(f"{place} :is(img, script, b)").count() == 0


@pytest.mark.parametrize("together", [False, True])
def test_tokens_that_are_parts_of_characters_are_shown_as_characters(
    opened: Opened, together: bool
) -> None:
    page = opened()
    euro, smile = "€".encode(), "🙂".encode()
    parts = [b"a", *(euro[i : i + 1] for i in range(3)), smile[:2], smile[2:], b"z"]
    chunks = []
    known = b""
    for number, part in enumerate(parts):
        known += part
        try:
            text, known = known.decode(), b""
        except UnicodeDecodeError:
            text = ""
        chunks.append(chunk(text, [token(part, -1 - number)]))
    if together:
        chunks = [chunk("a€🙂z", [token(part) for part in parts])]
    answer_with(page, events(*chunks, chunk(finish="stop")))
    ask(page, QUESTION)
    finished(page)
    assert tokens(page) == ["a", "€", "🙂", "z"]
    page.locator(".text span", has_text="🙂").hover()
    expect(page.locator("#alternatives")).to_contain_text("0xF0 0x9F")


@pytest.mark.parametrize(
    ("content", "found", "expected"),
    [
        # A special token is not in the text, a stop string ends it within a token.
        ("one tw", [b"one", b"<|x|>", b" two"], ["one", " tw"]),
        # Sentencepiece's first space is not in the text.
        ("one two", [b" one", b" two"], ["one", " two"]),
    ],
)
def test_the_text_is_the_servers_whatever_its_tokens(
    opened: Opened, content: str, found: list[bytes], expected: list[str]
) -> None:
    page = opened()
    answer_with(page, events(chunk(content, [token(one) for one in found], "stop")))
    ask(page, QUESTION)
    finished(page)
    assert answers(page) == [content]
    assert tokens(page) == expected


def test_events_are_read_however_they_are_split(opened: Opened) -> None:
    page = opened()
    body = 'data: {"a":"é\\n"}\r\n\r\n: comment\n\ndata:two\r\ndata: lines\n\n'
    body += "\revent: x\rdata: 🙂\r\r\n"
    found = page.evaluate(
        """async (body) => {
          const { events } = await import('/page/server.js');
          const bytes = new TextEncoder().encode(body);
          const read = async (cuts) => {
            const parts = cuts.map((cut, i) => bytes.slice(cuts[i - 1] ?? 0, cut));
            const stream = new ReadableStream({
              start(to) { parts.forEach((part) => to.enqueue(part)); to.close(); }
            });
            const all = [];
            for await (const data of events(stream)) all.push(data);
            return all;
          };
          const every = [...bytes.keys()].slice(1);
          const found = [await read([...every, bytes.length])];
          for (const cut of every) found.push(await read([cut, bytes.length]));
          return found;
        }""",
        body,
    )
    assert all(one == ['{"a":"é\\n"}', "two\nlines", "🙂"] for one in found)


def test_a_hundred_kilobytes_are_shown_and_kept(opened: Opened) -> None:
    page = opened()
    words = [f" word{i}" * 4 if i % 5 else f"\nline{i}" for i in range(3500)]
    text = "".join(words)
    others = ((b" other", -2.0), (b" another", -3.0), (b" more", -4.0), (b" last", -5.0))
    chunks = [chunk(w, [token(w.encode(), -0.5, *others)]) for w in words]
    answer_with(page, events(*chunks, chunk(finish="stop")))
    ask(page, QUESTION)
    finished(page)
    assert len(text) > 100_000
    assert answers(page) == [text]
    assert len(tokens(page)) == len(words)
    page.reload()
    assert answers(page) == [text]


def test_the_alternatives_of_a_token_by_keyboard(opened: Opened, address: str) -> None:
    page = opened(settings=GREEDY)
    ask(page, QUESTION)
    finished(page)
    body = {"messages": [{"role": "user", "content": QUESTION}], **GREEDY}
    body |= {"model": "demo", "logprobs": True, "top_logprobs": 5}
    choice = httpx.post(f"{address}v1/chat/completions", json=body).json()["choices"][0]
    third = choice["logprobs"]["content"][2]

    for _ in range(20):  # to the answer, which is one stop, backwards from the message
        page.keyboard.press("Shift+Tab")
        if page.evaluate("Boolean(document.activeElement.closest('.tokens'))"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    rows = page.locator("#alternatives tr")
    expect(rows).to_have_count(5)
    shares = [f"{2.718281828 ** one['logprob'] * 100:.1f}%" for one in third["top_logprobs"]]
    shown = rows.evaluate_all("rows => rows.map(row => row.cells[2].textContent)")
    assert [s if s != "< 0.1%" else "0.0%" for s in shown] == shares
    assert page.evaluate("document.activeElement.textContent") == third["token"]
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')")
    page.keyboard.press("Escape")
    expect(page.locator("#alternatives")).to_be_hidden()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == tokens(page)[-1]


def test_shades_follow_the_probability_and_can_be_turned_off(opened: Opened) -> None:
    page = opened()
    logprobs = [-0.01, -0.2, -0.5, -1.0, -3.0]
    found = [token(b"x", logprob) for logprob in logprobs]
    answer_with(page, events(chunk("xxxxx", found, "stop")))
    ask(page, QUESTION)
    finished(page)
    spans = page.locator(".text span")
    colours = spans.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(colours)) == 5
    page.click("#settings-button")
    page.uncheck("#settings [name=probabilities]")
    expect(spans).to_have_count(0)
    assert answers(page) == ["xxxxx"]
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, QUESTION)
    assert "logprobs" not in request.value.post_data_json
    page.check("#settings [name=probabilities]")
    expect(spans).to_have_count(10)


def test_reasoning_is_folded_and_calls_are_text(opened: Opened) -> None:
    page = opened()
    call = {"index": 0, "id": "1", "function": {"name": "look", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"at": 1}'}}
    chunks = [
        chunk(reasoning_content="Let me "),
        chunk(reasoning_content="see."),
        chunk("Yes."),
        chunk(tool_calls=[call]),
        chunk(tool_calls=[rest], finish="tool_calls"),
    ]
    answer_with(page, events(*chunks))
    ask(page, QUESTION)
    finished(page)
    expect(page.locator(".reasoning .plain")).to_be_hidden()
    page.click("summary:visible")
    expect(page.locator(".reasoning .plain")).to_have_text("Let me see.")
    expect(page.locator(".calls")).to_have_text('look({"at": 1})')
    assert answers(page) == ["Yes."]


def test_compare_marks_the_first_difference(opened: Opened, address: str) -> None:
    page = opened()
    page.click("text=Compare")
    page.fill("#shared [name=max_tokens]", str(NEW_TOKENS))
    other = page.get_by_role("region", name="B", exact=True)
    other.locator("[name=temperature]").fill("2")
    other.get_by_text("More settings").click()
    other.locator("[name=seed]").fill("4")
    ask(page, QUESTION)
    expect(page.locator("#verdict")).to_contain_text("They first differ at token")
    finished(page)

    body = {"messages": [{"role": "user", "content": QUESTION}], "model": "demo"}
    body |= {"logprobs": True, "top_logprobs": 5, "max_tokens": NEW_TOKENS}
    sides = [
        httpx.post(f"{address}v1/chat/completions", json=body | settings).json()["choices"][0]
        for settings in ({"temperature": 0}, {"temperature": 2, "seed": 4})
    ]
    a, b = [side["logprobs"]["content"] for side in sides]
    at = next(i for i in range(NEW_TOKENS) if a[i]["bytes"] != b[i]["bytes"])
    expect(page.locator("#verdict")).to_contain_text(f"token {at + 1}.")
    for side, found in zip("AB", (a, b), strict=True):
        spans = page.get_by_role("region", name=side, exact=True).locator(".text span")
        marked = spans.evaluate_all(
            "all => all.flatMap((s, i) => s.matches('.differs') ? [i] : [])"
        )
        assert marked == [at]
        expect(spans.nth(at)).to_have_text(found[at]["token"], use_inner_text=False)


def test_compare_tells_what_each_gave_to_the_other(opened: Opened) -> None:
    page = opened()
    page.click("text=Compare")
    sides = [
        events(chunk("a b", [token(b"a"), token(b" b", -0.6931, (b" c", -1.3863))], "stop")),
        events(chunk("a c", [token(b"a"), token(b" c", -0.2877, (b" d", -2.0))], "stop")),
    ]
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=sides.pop(0)),
    )
    ask(page, QUESTION)
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("They first differ at token 2.")
    expect(verdict).to_contain_text("A wrote ␣b (50.0%) and gave B’s ␣c 25.0%.")
    expect(verdict).to_contain_text("B wrote ␣c (75.0%); A’s ␣b is not among its 2 likeliest.")


def test_compare_says_when_nothing_differs(opened: Opened) -> None:
    page = opened()
    page.click("text=Compare")
    page.fill("#shared [name=max_tokens]", "8")
    page.check("#shared [name=raw]")
    ask(page, "We hold these truths")
    expect(page.locator("#verdict")).to_have_text("The two answers are the same.")
    expect(page.locator(".differs")).to_have_count(0)


def test_figures_are_the_engines(opened: Opened, engine: LLMEngine) -> None:
    page = opened(settings={"max_tokens": 1900})
    endless(page)
    ask(page, QUESTION)
    figures = page.locator("#figures")
    expect(figures).to_contain_text("1 running")
    expect(figures).to_contain_text(f"of {engine.stats('demo').total_pages} pages")
    expect(figures).to_contain_text("tokens/s")
    page.click("#stop")
    expect(figures).to_contain_text("0 running")


@pytest.mark.parametrize("mode", ["Chat", "Completion", "Compare"])
def test_a_narrow_screen_needs_no_scrolling_to_the_side(opened: Opened, mode: str) -> None:
    page = opened(settings=GREEDY, viewport={"width": 320, "height": 560})
    page.click(f"nav >> text={mode}")
    ask(page, "a" * 200)
    finished(page)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 320
    page.locator(".text span").first.hover()
    assert page.evaluate(width) <= 320
    box = page.locator("#alternatives").bounding_box()
    assert box is not None
    assert 0 <= box["x"] <= 320 - box["width"]
    page.click("#settings-button")
    assert page.evaluate(width) <= 320


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(opened: Opened, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    names = [
        "paper",
        "ink",
        "faint",
        "accent",
        "on-accent",
        "wrong",
        "soft",
        "p1",
        "p2",
        "p3",
        "p4",
    ]
    found = page.evaluate(
        """(names) => names.map((name) => {
          document.body.style.color = `var(--${name})`;
          return getComputedStyle(document.body).color.match(/[0-9.]+/g).map(Number);
        })""",
        names,
    )
    # https://www.w3.org/TR/WCAG22/#dfn-relative-luminance
    linear = {
        name: [
            v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4
            for v in rgb
        ]
        for name, rgb in zip(names, found, strict=True)
    }
    luminance = {n: 0.2126 * r + 0.7152 * g + 0.0722 * b for n, (r, g, b) in linear.items()}
    assert (luminance["paper"] < 0.1) == (scheme == "dark")
    pairs = [("ink", p) for p in ("paper", "soft", "p1", "p2", "p3", "p4")]
    pairs += [("faint", "paper"), ("wrong", "paper"), ("accent", "on-accent")]
    for one, other in pairs:
        high, low = sorted((luminance[one], luminance[other]), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (one, other)


def test_everything_is_reached_by_tab_and_shows_its_focus(opened: Opened) -> None:
    page = opened(settings=GREEDY)
    ask(page, QUESTION)
    finished(page)
    page.click("#settings-button")
    wanted = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, summary, a')]
          .filter((one) => one.checkVisibility() && !one.disabled).length + 1"""  # and the tokens
    )
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(wanted + 3):
        page.keyboard.press("Tab")
        outline = page.evaluate(
            """() => {
              const on = document.activeElement;
              if (on === document.body) return null;
              on.dataset.seen ??= String(document.querySelectorAll('[data-seen]').length);
              return [on.dataset.seen, getComputedStyle(on).outlineStyle];
            }"""
        )
        if outline:
            reached.add(outline[0])
            assert outline[1] == "solid"
    assert len(reached) == wanted


def test_answers_are_told_to_screen_readers(opened: Opened) -> None:
    page = opened()
    answer_with(page, events(chunk("It is so.", finish="stop")))
    ask(page, QUESTION)
    expect(page.locator("[aria-live=polite]")).to_have_text("It is so.")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
