"""The swarm on the web page, in headless Chromium against real machines on one event loop."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsing import DESK, NOISE, PHONE, ask, in_browser, quiet_console
from playwright.sync_api import Page, Route, expect
from small_swarm import SmallSwarm

from plait.gateway import GatewayOptions, hash_api_key
from plait.worker import AsyncEngine

HOME = GatewayOptions(local_names_only=True)
HALVES = {"one": range(3), "two": range(3, 6)}
TICKET = re.compile(r"^plait join plait1[\w-]{100,}$")


@contextmanager
def running_swarm(site: Any, folder: Path) -> Iterator[SmallSwarm]:
    swarm = SmallSwarm(folder)
    site.run(swarm.__aenter__())
    try:
        for name, blocks in HALVES.items():
            site.run(swarm.join(name, blocks))
        site.run(swarm.wait_serving(*HALVES))
        yield swarm
    finally:
        site.run(swarm.__aexit__())


@pytest.fixture(scope="module")
def swarm(site: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallSwarm]:
    with running_swarm(site, tmp_path_factory.mktemp("rates")) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def swarm_origin(site: Any, swarm: SmallSwarm) -> str:
    return site.serve(swarm.gateway.engine, HOME, desk=swarm.gateway)


def row(page: Page, name: str) -> Any:
    return page.locator(".machine").filter(has=page.locator(".machine-name", has_text=name))


@in_browser
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_machines_their_blocks_and_the_route_are_shown(
    open_page: Callable[..., Page], swarm_origin: str, viewport: Any, theme: Any
) -> None:
    page = open_page("about:blank", color_scheme=theme, viewport=viewport)
    with quiet_console(page):
        page.goto(swarm_origin)
        if viewport is PHONE:
            page.locator("#pulse").click()
        expect(page.locator("#swarm-summary")).to_have_text(
            "6 blocks on 2 machines, 0 sessions", timeout=30_000
        )
        expect(page.locator(".machine-name")).to_have_text(["one", "two", "gateway (this server)"])
        expect(row(page, "one").locator(".machine-line")).to_have_text(
            re.compile(r"^blocks 0:3 · 0 sessions · [\d.]+ ms$")
        )
        expect(row(page, "two").locator(".span")).to_have_attribute("x", "3")
        expect(row(page, "two").locator(".span")).to_have_attribute("width", "3")
        row(page, "one").locator("summary").click()
        facts = row(page, "one").locator("dl")
        expect(facts).to_contain_text(re.compile(r"To two[\d.]+ ms"))
        expect(facts).to_contain_text(re.compile(r"Memory1\.0 GiB"))
        expect(facts).to_contain_text(re.compile(r"Context in use0 of \d+ tokens"))
        expect(page.locator("#route-chain")).to_have_text("one 0:3 → two 3:6", timeout=30_000)
        expect(page.locator("#front .dot-front")).to_have_count(1)
        expect(page.locator("#front .dot-chosen")).to_have_count(1)
        expect(page.locator("#front .dot-chosen title")).to_have_text("one 0:3 → two 3:6")
        expect(page.locator("#route-note")).to_contain_text("Mode load.")
        expect(page.locator("#kv-row")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate(
            "document.querySelector('#rail').scrollWidth <= document.querySelector('#rail').clientWidth"
        )


@in_browser
def test_tokens_and_sessions_of_each_machine_are_live(
    open_page: Callable[..., Page], swarm_origin: str, swarm: SmallSwarm
) -> None:
    page = open_page("about:blank", settings=NOISE)
    with quiet_console(page):
        page.goto(swarm_origin)
        expect(page.locator(".machine")).to_have_count(3, timeout=30_000)
        ask(page, "Go on for ever")
        expect(row(page, "two").locator(".machine-speed")).to_have_text(
            re.compile(r"\d tok/s"), timeout=30_000
        )
        expect(row(page, "gateway").locator(".machine-speed")).to_have_text("")
        expect(page.locator(".assistant .under")).to_be_visible(timeout=60_000)


@in_browser
def test_the_line_to_join_with_is_shown_when_asked_for_and_forgotten(
    open_page: Callable[..., Page], swarm_origin: str
) -> None:
    page = open_page(swarm_origin)
    line = page.locator("#join-line")
    expect(page.locator("#join")).to_be_hidden()
    page.get_by_role("button", name="Add a machine").click(timeout=30_000)
    expect(line).to_have_text(TICKET)
    expect(page.locator("#join-note")).to_contain_text("--swarm-listen")
    page.get_by_role("button", name="Add a machine").click()
    expect(page.locator("#join")).to_be_hidden()
    expect(line).to_have_text("")


@in_browser
def test_a_server_with_keys_shows_its_swarm_and_the_line_only_to_who_has_one(
    open_page: Callable[..., Page], site: Any, swarm: SmallSwarm
) -> None:
    keyed = GatewayOptions(api_key_hashes=(hash_api_key("sk-right"),))
    page = open_page(site.serve(swarm.gateway.engine, keyed, desk=swarm.gateway))
    expect(page.get_by_label("API key")).to_be_visible(timeout=30_000)
    expect(page.locator("#swarm")).to_be_hidden()
    page.get_by_label("API key").fill("sk-right")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Add a machine").click(timeout=30_000)
    expect(page.locator("#join-line")).to_have_text(TICKET)


@in_browser
def test_a_server_that_anybody_may_use_lets_nobody_in_by_its_page(
    open_page: Callable[..., Page], site: Any, swarm: SmallSwarm
) -> None:
    page = open_page(site.serve(swarm.gateway.engine, GatewayOptions(), desk=swarm.gateway))
    page.get_by_role("button", name="Add a machine").click(timeout=30_000)
    expect(page.locator("#join-line")).to_contain_text("--api-key")
    expect(page.locator("#key-form")).to_be_hidden()


@in_browser
def test_a_machine_that_joins_shows_how_far_it_is_and_one_that_dies_is_lost(
    open_page: Callable[..., Page], site: Any, tmp_path: Path
) -> None:
    go_on = threading.Event()
    with running_swarm(site, tmp_path) as swarm:
        page = open_page("about:blank")
        with quiet_console(page):
            page.goto(site.serve(swarm.gateway.engine, HOME, desk=swarm.gateway))
            try:
                site.run(swarm.join("spare", range(3, 6), load=go_on.wait))
                spare = row(page, "spare")
                expect(spare.locator(".machine-line")).to_have_text(
                    "Fetching weights: 3.0 MiB of 12.0 MiB", timeout=30_000
                )
                expect(spare.locator("progress")).to_have_js_property("value", 0.25)
                expect(spare).to_have_attribute("data-state", "joining")
            finally:
                go_on.set()
            site.run(swarm.wait_serving("spare"))
            expect(spare).to_have_attribute("data-state", "online", timeout=30_000)
            expect(spare.locator("progress")).to_be_hidden()
            site.run(swarm.kill("one"))
            expect(page.locator("#swarm-lack")).to_have_text(
                "No machine serves blocks 0:3. One that joins will.", timeout=30_000
            )
            expect(page.locator("#route")).to_be_hidden()


@in_browser
def test_a_server_that_is_no_swarm_shows_none(
    open_page: Callable[..., Page], origin: str, engine: AsyncEngine
) -> None:
    page = open_page("about:blank")
    with quiet_console(page):
        page.goto(origin)
        expect(page.locator("#kv-blocks")).to_have_text(re.compile(r"\d+ of [1-9]\d*"), timeout=30_000)
        expect(page.locator("#swarm")).to_be_hidden()


@in_browser
def test_what_machines_call_themselves_is_text(
    open_page: Callable[..., Page], site: Any, tmp_path: Path
) -> None:
    with running_swarm(site, tmp_path) as swarm:
        name = '<img src=x onerror="window.bad = 1">'
        site.run(swarm.join(name, range(6)))
        page = open_page(site.serve(swarm.gateway.engine, HOME, desk=swarm.gateway))
        expect(page.locator(".machine-name", has_text=name)).to_be_visible(timeout=30_000)
        assert page.locator("#swarm img").count() == 0 and page.evaluate("window.bad ?? null") is None


@in_browser
def test_a_swarm_of_many_machines_is_cut_to_a_list_that_can_be_read(
    open_page: Callable[..., Page], swarm_origin: str, swarm: SmallSwarm
) -> None:
    status = dict(swarm.gateway.status())
    machines: list[dict[str, Any]] = status["machines"]
    one = next(machine for machine in machines if machine["name"] == "one")
    many = [{**one, "peer": f"{number:064x}", "name": f"m{number:03}"} for number in range(150)]
    body = json.dumps({**status, "machines": many, "links": [], "tokens_per_s": 0})
    asked: list[str] = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(body=body, content_type="application/json")

    page = open_page("about:blank")
    page.route("**/swarm/status*", answer)
    page.goto(swarm_origin)
    expect(page.locator(".machine")).to_have_count(100, timeout=30_000)
    expect(page.locator("#machines-more")).to_have_text("and 50 more; plait status lists them all")
    expect(page.locator("#swarm-summary")).to_contain_text("6 blocks on 150 machines")
    page.wait_for_timeout(3000)  # looks that it would have taken at a small swarm
    assert len(asked) <= 2 and all("max_links=8" in url for url in asked)
