"""How smoothly the page at `/` shows 64 ranks with 256 experts in each of 60 layers.

python tools/page_frames.py --seconds 10

A fake head gives the page live figures of a service of that size, and Chromium (Debian's package,
driven by Playwright's) measures: the time from each frame to the next, and every task that keeps
the page from answering for 50 ms and more. First nobody touches the page, then the pointer goes
over the heat map, then the layer is dragged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from playwright.sync_api import sync_playwright
from support.large_head import EXPERTS, LAYERS, RANKS, LargeHead
from support.served_head import Running

from flexpert.bench.machine import this_machine
from flexpert.bench.statistics import percentile
from flexpert.config import ServerConfig

WATCH = """() => {
  window.frames_ = [];
  window.tasks_ = [];
  new PerformanceObserver((list) => {
    for (const one of list.getEntries()) window.tasks_.push(one.duration);
  }).observe({ type: "longtask" });
  let before = performance.now();
  const frame = (now) => {
    window.frames_.push(now - before);
    before = now;
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}"""
TAKE = """() => {
  const found = { frames: window.frames_.slice(1), tasks: window.tasks_ };
  window.frames_ = [];
  window.tasks_ = [];
  return found;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part (default: 10)")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    options = parser.parse_args()
    if not options.chromium:
        parser.error("there is no chromium; on Debian: apt install chromium")
    running = Running(ServerConfig(), head=LargeHead)
    try:
        running.call(lambda: running.head.tell_past_changes(60))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=options.chromium, args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            _measure(page, running.url, options.seconds)
            browser.close()
    finally:
        running.close()
    print(f"{this_machine().line()}, load average {os.getloadavg()[0]:.1f}")


def _measure(page: Any, url: str, seconds: float) -> None:
    page.goto(url)
    page.locator("#ranks tr").nth(RANKS - 1).wait_for(state="attached")
    page.wait_for_timeout(2000)  # what is done once is not what is measured
    nodes = page.evaluate("document.querySelectorAll('*').length")
    print(f"{RANKS} ranks x {EXPERTS} experts x {LAYERS} layers, {nodes} elements")
    page.evaluate(WATCH)
    box = page.locator("#heat").bounding_box()
    for name, act in (
        ("untouched", lambda _: page.wait_for_timeout(50)),
        ("pointer over the heat map", lambda step: _point(page, box, step)),
        ("layer dragged", lambda step: _drag(page, step)),
    ):
        page.evaluate(TAKE)
        _for(seconds, act)
        _print(name, page.evaluate(TAKE))


def _for(seconds: float, act: Callable[[int], None]) -> None:
    end = time.monotonic() + seconds
    step = 0
    while time.monotonic() < end:
        act(step)
        step += 1


def _point(page: Any, box: dict[str, float], step: int) -> None:
    if step == 0:
        page.locator("#heat").scroll_into_view_if_needed()
        box.update(page.locator("#heat").bounding_box())
    page.mouse.move(
        box["x"] + 40 + step * 7 % (box["width"] - 50),
        box["y"] + 30 + step * 3 % (box["height"] - 40),
    )
    page.wait_for_timeout(16)


def _drag(page: Any, step: int) -> None:
    page.evaluate(
        """(value) => {
          const slider = document.getElementById("layer");
          slider.value = value;
          slider.dispatchEvent(new Event("input"));
        }""",
        step % LAYERS,
    )
    page.wait_for_timeout(100)


def _print(name: str, found: dict[str, list[float]]) -> None:
    frames, tasks = sorted(found["frames"]), found["tasks"]
    longest = f"{max(tasks):.0f} ms" if tasks else "below 50 ms"
    print(
        f"{name}: {len(frames)} frames, median {percentile(frames, 0.5):.1f} ms, "
        f"p99 {percentile(frames, 0.99):.1f} ms, longest {frames[-1]:.1f} ms; "
        f"{len(tasks)} tasks of 50 ms and more, the longest {longest}"
    )


if __name__ == "__main__":
    main()
