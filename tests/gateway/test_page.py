"""The web page, in headless Chromium against a real server with a real engine."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import DESK, NOISE, PHONE, ask, in_browser, quiet_console
from playwright.sync_api import Page, expect

import plait.gateway
from plait.engine import EngineOptions
from plait.gateway import GatewayOptions, hash_api_key
from plait.worker import AsyncEngine, LoadProgress

PAGE = Path(plait.gateway.__file__).parent / "page"


@in_browser
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_question_is_answered_in_a_growing_text(
    open_page: Callable[..., Page], origin: str, viewport: Any, theme: Any
) -> None:
    page = open_page("about:blank", settings=NOISE, color_scheme=theme, viewport=viewport)
    with quiet_console(page):
        page.goto(origin)
        expect(page.locator("#model-name")).to_have_text("tiny")
        page.evaluate("""() => {
            window.lengths = new Set();
            const messages = document.getElementById("messages");
            new MutationObserver(() => {
                window.lengths.add(messages.querySelector(".assistant .body")?.textContent.length);
            }).observe(messages, { childList: true, subtree: true });
        }""")
        ask(page, "What does json.dumps do?")
        expect(page.locator(".assistant .under")).to_contain_text(re.compile(r"\d+ tokens?"), timeout=60_000)
        assert page.evaluate("window.lengths.size") >= 4
        expect(page.locator(".user .body")).to_have_text("What does json.dumps do?")
        expect(page.locator(".assistant")).not_to_have_attribute("aria-busy", "true")
        expect(page.locator("#answer-tokens")).to_have_text(re.compile(r"\d+"))
        expect(page.locator("#first-token")).to_have_text(re.compile(r"\d+ ms|\d+\.\d s"))
        expect(page.locator("#running")).to_have_text("0")
        expect(page.locator("#kv-blocks")).to_have_text(re.compile(r"\d+ of [1-9]\d*"))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("document.querySelector('#scroll').scrollWidth <= window.innerWidth")


@in_browser
def test_a_chat_goes_on_and_a_new_one_starts_empty(open_page: Callable[..., Page], origin: str) -> None:
    page = open_page(origin)
    with quiet_console(page):
        for count in (1, 2):
            ask(page, "Who are you?")
            expect(page.locator(".assistant .under")).to_have_count(count, timeout=60_000)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".message")).to_have_count(0)
        expect(page.get_by_role("button", name="Who are you?")).to_be_visible()


@in_browser
@pytest.mark.parametrize("way", ["Escape", "button", "new chat"])
def test_stopping_ends_the_request_on_the_server(
    open_page: Callable[..., Page], site: Any, engine: AsyncEngine, origin: str, way: str
) -> None:
    page = open_page(origin, settings=NOISE)
    with quiet_console(page):
        ask(page, "Go on for ever")
        expect(page.locator(".assistant .body")).not_to_be_empty(timeout=60_000)
        if way == "Escape":
            page.keyboard.press("Escape")
        elif way == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.get_by_role("button", name="New chat").click()
        site.until(lambda: engine.status().running == 0)
        if way == "new chat":
            expect(page.locator(".message")).to_have_count(0)
        else:
            expect(page.locator(".assistant .under")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Send")).to_be_visible()


@in_browser
def test_an_error_is_a_sentence_with_a_way_on(open_page: Callable[..., Page], origin: str) -> None:
    page = open_page(origin)
    ask(page, "far too long " * 1000)
    alert = page.get_by_role("alert")
    expect(alert.locator("p")).to_have_text(re.compile(r"^[A-Z].*1024.*\.$"))
    expect(alert.get_by_role("button", name="Try again")).to_be_visible()
    expect(page.locator(".assistant")).to_have_count(0)
    # The question that was too long does not stay in the way.
    ask(page, "Who are you?")
    expect(page.locator(".assistant .under")).to_be_visible(timeout=60_000)
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)


@in_browser
def test_enter_sends_and_shift_enter_breaks_the_line(open_page: Callable[..., Page], origin: str) -> None:
    page = open_page(origin)
    question = page.get_by_label("Your message")
    expect(question).to_be_focused()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    question.type("one")
    page.keyboard.press("Shift+Enter")
    question.type("two")
    expect(question).to_have_value("one\ntwo")
    expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    page.keyboard.press("Enter")
    expect(page.locator(".user .body")).to_have_text("one\ntwo", use_inner_text=True)
    expect(question).to_have_value("")
    page.keyboard.press("Escape")


@in_browser
def test_settings_are_sent_and_remembered(open_page: Callable[..., Page], origin: str) -> None:
    page = open_page(origin)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer, in tokens").fill("3")
    page.get_by_label("Seed").fill("7")
    page.keyboard.press("Escape")
    page.reload()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Who are you?")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 3, 7)
    expect(page.locator(".assistant .under")).to_contain_text("3 tokens")
    expect(page.locator(".assistant .under")).to_contain_text("cut at the longest answer allowed")


@in_browser
def test_a_server_with_keys_asks_for_one_and_forgets_it_with_the_tab(
    open_page: Callable[..., Page], site: Any, engine: AsyncEngine
) -> None:
    origin = site.serve(engine, GatewayOptions(api_key_hashes=(hash_api_key("sk-right"),)))
    page = open_page(origin)
    key = page.get_by_label("API key")
    for given in ("sk-wrong", "sk-right"):
        expect(key).to_be_visible()
        key.fill(given)
        page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("tiny")
    expect(key).to_be_hidden()
    ask(page, "Who are you?")
    expect(page.locator(".assistant .under")).to_be_visible(timeout=60_000)
    assert page.evaluate("localStorage.getItem('plait-api-key')") is None
    assert page.evaluate("sessionStorage.getItem('plait-api-key')") == "sk-right"


@in_browser
def test_loading_shows_how_far_it_is_and_ends_by_itself(
    open_page: Callable[..., Page], site: Any, tiny_options: EngineOptions
) -> None:
    go_on = threading.Event()

    def choose(on_progress: Callable[[LoadProgress], None]) -> EngineOptions:
        on_progress(LoadProgress("downloading", 3 * 2**20, 12 * 2**20))
        assert go_on.wait(60)
        return tiny_options

    engine = site.engine(choose, settled=False)
    page = open_page(site.serve(engine))
    try:
        with quiet_console(page):
            expect(page.get_by_role("heading", name="Loading tiny")).to_be_visible()
            expect(page.locator("#loading-stage")).to_have_text("Downloading: 3.0 MiB of 12.0 MiB")
            expect(page.locator("#loading-progress")).to_have_js_property("value", 0.25)
            page.get_by_label("Your message").fill("Hello")
            expect(page.get_by_role("button", name="Send")).to_be_disabled()
            go_on.set()
            expect(page.locator("#model")).to_have_attribute("data-state", "ready", timeout=60_000)
            expect(page.locator("#loading")).to_be_hidden()
            expect(page.get_by_role("button", name="Send")).to_be_enabled()
    finally:
        go_on.set()


@in_browser
def test_what_a_model_writes_is_text_and_never_markup(open_page: Callable[..., Page], origin: str) -> None:
    page = open_page(origin)
    image = '<img src=x onerror="window.bad = 1">'
    written = f"See `<b>` and {image}\n\n```html\n<script>window.bad = 1</script>\n```\nend"
    shown = page.evaluate(
        """async (written) => {
            const { GrowingText } = await import("/markdown.js");
            const container = document.createElement("div");
            document.body.append(container);
            const text = new GrowingText(container);
            for (let length = 1; length <= written.length; length++) text.show(written.slice(0, length));
            await new Promise((resolve) => setTimeout(resolve));
            return {
                tags: [...container.querySelectorAll("*")].map((element) => element.localName),
                code: [...container.querySelectorAll("code")].map((element) => element.textContent),
                bad: window.bad ?? null,
            };
        }""",
        written,
    )
    assert shown["bad"] is None
    assert shown["code"] == ["<b>", "<script>window.bad = 1</script>"]
    assert shown["tags"] == ["p", "code", "div", "header", "span", "button", "pre", "code", "p"]


@in_browser
def test_on_a_phone_the_server_is_one_line_that_opens(open_page: Callable[..., Page], origin: str) -> None:
    page = open_page(origin, has_touch=True, viewport=PHONE)
    line = page.locator("#pulse")
    expect(line).to_contain_text("0 running")
    expect(page.locator("#rail")).to_be_hidden()
    line.click()
    expect(page.locator("#rail")).to_be_visible()
    expect(line).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#snippet")).to_contain_text(f"export OPENAI_BASE_URL={origin}/v1")
    line.click()
    expect(page.locator("#rail")).to_be_hidden()


def test_the_page_needs_nothing_from_elsewhere_and_nothing_inline() -> None:
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    linked = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert linked
    assert all((PAGE / name).is_file() for name in linked), linked
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|url\(['\"]?//", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), (
            path.name
        )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back"),
    [
        *[(front, back) for front in ("ink", "muted", "accent") for back in ("paper", "sheet", "sunken")],
        *[("ink", "accent-soft"), ("danger", "danger-soft"), ("accent-ink", "accent")],
    ],
)
def test_text_is_readable_in_both_themes(theme: str, front: str, back: str) -> None:
    # WCAG 2.2, success criterion 1.4.3: 4.5 to 1 for text.
    colours = _colours(theme)
    lighter, darker = sorted((_luminance(colours[front]), _luminance(colours[back])), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def _colours(theme: str) -> dict[str, str]:
    light, dark = re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL)
    return dict(re.findall(r"--([\w-]+): (#\w{6});", light if theme == "light" else dark))


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
