"""Headless Chromium for tests of the web page."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

ARTIFACTS = Path(__file__).parents[2] / "artifacts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
DESK = {"width": 1440, "height": 900}
PHONE = {"width": 360, "height": 740}
NOISE = {"temperature": "2", "seed": "1"}
"""Settings for which the pages of this test also ask the server to ignore the end token: answers are long."""

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Callable[..., Page]]:
    """Opens pages of their own browser context; keeps a screenshot of each if the test fails."""
    contexts: list[BrowserContext] = []
    failed_before = request.session.testsfailed

    def open_page(url: str, *, settings: dict[str, str] | None = None, **context_options: Any) -> Page:
        contexts.append(browser.new_context(**{"viewport": DESK} | context_options))
        if settings is not None:
            kept = json.dumps(json.dumps(settings))
            contexts[-1].add_init_script(f"localStorage.setItem('plait-settings', {kept})")
        if settings is NOISE:
            contexts[-1].route("**/v1/chat/completions", _without_end)
        page = contexts[-1].new_page()
        page.goto(url)
        return page

    yield open_page
    for number, context in enumerate(contexts):
        if request.session.testsfailed > failed_before:
            name = re.sub(r"\W+", "-", request.node.name)
            context.pages[0].screenshot(path=ARTIFACTS / f"{name}-{number}.png")
        context.close()


def _without_end(route: Route) -> None:
    body = json.loads(route.request.post_data or "{}")
    route.continue_(post_data=json.dumps(body | {"ignore_eos": True}))


@contextmanager
def quiet_console(page: Page) -> Iterator[None]:
    """Fails if the page logs an error or a warning, or a script of it throws, meanwhile."""
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield
    assert complaints == []


def ask(page: Page, text: str) -> None:
    expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
