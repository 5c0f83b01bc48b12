"""Promises of the page at `/` in a browser. Skipped without Playwright's package and a Chromium."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from support.large_head import EXPERTS, LAYERS, RANKS, LargeHead
from support.served import Served, served
from support.served_head import Running

from flexpert.config import ServerConfig

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="Playwright's package is not there", exc_type=ImportError
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
sync_api.expect.set_options(timeout=20_000)

# of the map's geometry in heatmap.js: whether the middle of each cell is drawn otherwise than that
# of a cell where nothing is
HELD = """([ranks, experts, soft]) => {
  const canvas = document.getElementById("heat");
  const scale = devicePixelRatio;
  const wide = (canvas.clientWidth - 34) / experts;
  const high = (canvas.clientHeight - 22) / ranks.length;
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const found = {};
  ranks.forEach((rank, row) => {
    found[rank] = [];
    for (let expert = 0; expert < experts; expert += 1) {
      const x = (34 + (expert + 0.4) * wide) * scale;
      const y = (22 + (row + 0.4) * high) * scale;
      const [r, g, b] = context.getImageData(x, y, 1, 1).data;
      if (`rgb(${r}, ${g}, ${b})` !== soft) found[rank].push(expert);
    }
  });
  return found;
}"""
SOFT = """() => {
  const place = document.body.appendChild(document.createElement("i"));
  place.style.color = "var(--soft)";
  const found = getComputedStyle(place).color;
  place.remove();
  return found;
}"""
FOCUSED = """() => {
  const { id, tagName, textContent, type } = document.activeElement;
  const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
  const label = document.activeElement.getAttribute("aria-label");
  const shown = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
  return [id || label || textContent.trim(), shown];
}"""
# how many rows of the table are written within so many milliseconds
WRITTEN = """(ms) => new Promise((done) => {
  const rows = new Set();
  const observer = new MutationObserver((found) => {
    for (const one of found) {
      const node = one.target.nodeType === 1 ? one.target : one.target.parentElement;
      rows.add(node.closest("tr"));
    }
  });
  const all = { attributes: true, characterData: true, childList: true, subtree: true };
  observer.observe(document.getElementById("ranks"), all);
  setTimeout(() => { observer.disconnect(); done(rows.size); }, ms);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def large() -> Iterator[Running]:
    running = Running(ServerConfig(), head=LargeHead)
    running.call(lambda: running.head.tell_past_changes(24))
    yield running
    running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """One whose console must stay empty; `allowed` may name what may be written there."""
    made = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text))
    made.on("pageerror", lambda error: said.append(str(error)))
    made.allowed, made.said = "", said
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


def test_everything_is_reached_with_the_tab_key_and_seen_to_have_the_focus(
    server: Running, page: Any
) -> None:
    page.goto(server.url)
    expect(page.locator("#ranks tr")).to_have_count(2)
    order = [
        *("Skip to the ranks", "theme", "less", "target", "more", "Preview", "rebalance"),
        *("Table of ranks", "Select rank 0", "Select rank 1", "operations", "layer", "heat"),
    ]
    for name in order:
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == [name, True]
    page.reload()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED)[0] == "less", "the link skips what is above the ranks"


def test_a_dialog_keeps_the_focus_and_gives_it_back(server: Running, page: Any) -> None:
    page.goto(server.url)
    expect(page.locator("#ranks tr")).to_have_count(2)
    page.locator("#target").focus()
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    expect(page.locator("#preview-go")).to_be_enabled()
    assert page.evaluate("document.getElementById('preview').contains(document.activeElement)")
    page.keyboard.press("Escape")
    expect(page.locator("#preview")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "target"
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


def test_what_64_ranks_cost_the_page_is_bounded(large: Running, page: Any) -> None:
    page.goto(large.url)
    expect(page.locator("#ranks tr")).to_have_count(RANKS)
    expect(page.locator("#heat-note")).to_contain_text("320 replicas of 256 experts on 64 ranks")
    expect(page.locator("#now-tokens")).not_to_have_text("–")
    count = "document.querySelectorAll('*').length"
    elements = page.evaluate(count)
    assert elements < 400 + 30 * RANKS < RANKS * EXPERTS / 4
    assert page.locator("#layer").get_attribute("max") == str(LAYERS - 1)
    # of the table only what is in sight is written; the last row as soon as it comes into sight
    assert 0 < page.evaluate(WRITTEN, 2500) < RANKS / 2
    assert page.evaluate(count) <= elements + 10
    last = page.locator("#ranks tr").last
    last.scroll_into_view_if_needed()
    before = last.inner_text()
    expect(last).not_to_have_text(before, use_inner_text=True)
    # the pointer moves an outline, and the map is not drawn again
    page.evaluate("document.getElementById('heat').getContext('2d').clearRect(0, 0, 9999, 9999)")
    page.locator("#heat").hover(position={"x": 400, "y": 100})
    expect(page.locator("#heat-cursor")).to_be_visible()
    drawn = "document.getElementById('heat').getContext('2d').getImageData(400, 100, 1, 1).data[3]"
    assert page.evaluate(drawn) == 0


@pytest.mark.parametrize("width", [400, 900, 1440])
def test_nothing_is_cut_off_in_a_narrow_window(large: Running, page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(large.url)
    expect(page.locator("#ranks tr")).to_have_count(RANKS)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = """() => [...document.querySelectorAll(".tile *, .top *, .head *, .legend *")]
      .filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 2)
      .map((one) => one.id || one.textContent)"""
    assert page.evaluate(cut) == []


# ---- with a real service ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served(environment={"FLEXPERT_SERVER__CONTROL_KEY": "control"}, key="control") as found:
        yield found


@pytest.fixture
def watched(service: Served, page: Any) -> Any:
    """The page of the real service, after its key was asked for and given."""
    page.allowed = "401"
    page.goto(service.url)
    page.locator("#key").fill("control")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("serving")
    page.allowed = ""
    page.said.clear()
    return page


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def placement_drawn(page: Any, service: Served) -> None:
    """The heat map of each layer is `/cluster/placement`, and all together are `/cluster`."""
    page.reload()
    expect(page.locator("#heat-note")).to_contain_text("replicas of 16 experts")
    soft = page.evaluate(SOFT)
    ranks = sorted(service.ranks())
    each = dict.fromkeys(map(str, ranks), 0)
    page.locator("#layer").focus()
    for layer in range(4):
        if layer:
            with page.expect_response(f"**/cluster/placement?layer={layer}"):
                page.keyboard.press("ArrowRight")
        page.wait_for_timeout(100)  # it is drawn when the answer is read
        placement = service.http("GET", f"/cluster/placement?layer={layer}").json()
        held = {rank: sorted(experts) for rank, experts in placement["held"].items()}
        assert page.evaluate(HELD, [ranks, 16, soft]) == held
        for rank, experts in held.items():
            each[rank] += len(experts)
    assert each == service.http("GET", "/cluster").json()["placement"]["experts_per_rank"]


def test_a_real_service_is_seen_and_changed(service: Served, watched: Any) -> None:
    page = watched
    expect(page.locator("#ranks tr")).to_have_count(2)
    service.answer()
    expect(page.locator("#now-tokens")).not_to_have_text("0")
    expect(page.locator("#now-first")).not_to_have_text("–")
    page.get_by_label("One rank more").click()
    page.get_by_role("button", name="Preview").click()
    page.locator("#preview-go").click()
    expect(page.locator("#operations li").filter(has_text="Rank 2 joins")).to_contain_text("done")
    expect(page.locator("#ranks tr")).to_have_count(3)
    assert sorted(service.ranks()) == [0, 1, 2]
    placement_drawn(page, service)
    page.get_by_label("Select rank 1").check()
    page.locator("#remove").click()
    expect(page.locator("#preview-title")).to_have_text("Remove rank 1")
    page.locator("#preview-go").click()
    expect(page.locator("#operations li").filter(has_text="Rank 1 leaves")).to_contain_text("done")
    expect(page.locator("#ranks tr")).to_have_count(2)
    assert sorted(service.ranks()) == [0, 2]
    placement_drawn(page, service)


def test_a_change_of_a_real_service_is_cancelled(service: Served, watched: Any) -> None:
    page = watched
    before = service.ranks()
    page.locator("#target").fill("4")
    page.get_by_role("button", name="Preview").click()
    fork_server = psutil.Process(service.process.pid).children()[0]
    with stopped(fork_server):  # no rank comes before the change is cancelled
        page.locator("#preview-go").click()
        page.get_by_role("button", name="Cancel: ").click()
        expect(page.locator("#preview-title")).to_have_text("Cancel this change")
        page.locator("#preview-go").click()
        expect(page.locator("#preview")).to_be_hidden()
    expect(page.locator("#operations li").first).to_contain_text("cancelled")
    expect(page.locator("#state")).to_have_text("serving")
    assert service.ranks() == before
    service.answer()
