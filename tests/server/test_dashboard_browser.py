"""Promises of the page at `/` in a browser. Skipped without Playwright's package and a Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.served_head import Running

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """One whose console must stay empty; `allowed` may name what may be written there."""
    made = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text))
    made.on("pageerror", lambda error: said.append(str(error)))
    made.allowed = ""
    yield made
    made.close()
    assert [text for text in said if not made.allowed or made.allowed not in text] == []


def expect(place: Any) -> Any:
    return sync_api.expect(place)


def test_the_page_shows_what_there_is_and_scales_it(server: Running, page: Any) -> None:
    page.goto(server.url)
    expect(page.locator("#ranks tr")).to_have_count(2)
    expect(page.locator("#state")).to_have_text("serving")
    page.get_by_label("One rank more").click()
    page.get_by_role("button", name="Preview").click()
    facts = page.locator("#preview-facts")
    expect(facts).to_contain_text("Join")
    expect(facts).to_contain_text("8, 7.8 KiB")
    page.locator("#preview-go").click()
    expect(page.locator("#ranks tr")).to_have_count(3)
    expect(page.locator("#operations li").first).to_contain_text("Rank 2 joins")
    expect(page.locator("#operations li").first).to_contain_text("pause 3.0 ms")
    assert len(httpx.get(f"{server.url}/cluster").json()["ranks"]) == 3


def test_ranks_are_chosen_and_removed_with_the_keyboard_alone(server: Running, page: Any) -> None:
    page.goto(server.url)
    expect(page.locator("#ranks tr")).to_have_count(2)
    page.get_by_label("Select rank 1").focus()
    page.keyboard.press("Space")
    page.locator("#remove").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#preview-title")).to_have_text("Remove rank 1")
    expect(page.locator("#preview-go")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.locator("#preview")).to_be_hidden()
    assert len(server.head.ranks) == 2


def test_the_heat_map_is_the_placement(server: Running, page: Any) -> None:
    page.goto(server.url)
    expect(page.locator("#heat-note")).to_contain_text("16 replicas of 16 experts on 2 ranks")
    held = httpx.get(f"{server.url}/cluster/placement").json()["held"]
    page.locator("#heat").focus()
    page.keyboard.press("ArrowRight")  # to the first cell
    found: dict[str, list[int]] = {"0": [], "1": []}
    for rank, way in (("0", "ArrowRight"), ("1", "ArrowLeft")):
        experts = range(16) if rank == "0" else reversed(range(16))
        for expert in experts:
            text = page.locator("#heat-cell").inner_text()
            assert text.startswith(f"Rank {rank} ")
            if f"holds expert {expert} " in text:
                found[rank].append(expert)
            page.keyboard.press(way)
        page.keyboard.press("ArrowDown")
    assert {rank: sorted(experts) for rank, experts in found.items()} == held


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_systems_until_it_is_switched(
    server: Running, page: Any, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(server.url)
    script = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(244, 245, 248)", "rgb(13, 16, 21)"
    assert page.evaluate(script) == {"light": light, "dark": dark}[scheme]
    page.locator("#theme").click()
    assert page.evaluate(script) == light
    page.locator("#theme").click()
    page.reload()
    assert page.evaluate(script) == dark


def test_the_key_is_asked_for_and_kept_in_the_tab(closed_server: Running, page: Any) -> None:
    page.allowed = "401"
    page.goto(closed_server.url)
    expect(page.locator("#ask")).to_be_visible()
    assert page.locator("#ranks tr").count() == 0
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#ask-error")).to_contain_text("not the right one")
    page.locator("#key").fill(closed_server.head.config.server.control_key.get_secret_value())
    page.keyboard.press("Enter")
    expect(page.locator("#ranks tr")).to_have_count(2)
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
