"""What is made of the result of `flexpert bench elastic`: events, a page that needs nothing else, a
picture."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.fake_service import DONE

from flexpert.bench.comm.plot import check_plot
from flexpert.bench.elastic import ElasticReport, ElasticSteady
from flexpert.bench.elastic_events import (
    ElasticEvent,
    ElasticTimeline,
    change_event,
    loss_event,
)
from flexpert.bench.elastic_page import COLUMNS, elastic_page
from flexpert.bench.elastic_plot import draw_elastic
from flexpert.bench.load_timeline import TimelinePoint
from flexpert.bench.machine import this_machine
from flexpert.bench.timed_events import EventOutcome
from flexpert.cluster.views import OperationView
from flexpert.errors import ConfigError


def view(**more: Any) -> OperationView:
    return msgspec.convert(DONE | more, OperationView)


JOIN = change_event("up", 3.0, 0.9, 0.04, view())
KILL = loss_event(
    "kill",
    6.0,
    1.5,
    0.2,
    EventOutcome(
        at_s=0.0,
        what="kill",
        state="done",
        begun_s=0.0,
        detected_s=0.02,
        operations=[
            view(
                purpose="recovery",
                phases={"recover": 0.05, "commit": 0.002},
                pause_ms=60.0,
                moved_requests=5,
            ),
            view(
                purpose="restart",
                phases={"spawn": 0.3, "load": 0.4, "commit": 0.004, "release": 9.0},
                moved_requests=0,
                moved_kv_bytes=0,
            ),
        ],
    ),
)


def test_a_planned_change_has_neither_detection_nor_agreement() -> None:
    assert (JOIN.detect_s, JOIN.agree_s) == (None, None)
    assert JOIN.prepare_s == pytest.approx(0.75)  # spawn and load
    assert (JOIN.commit_s, JOIN.pause_ms, JOIN.full_s) == (0.01, 4.25, 0.9)
    assert (JOIN.moved_requests, JOIN.moved_bytes) == (3, 3 << 20)
    assert change_event("up", 3.0, 0.9, 0.04, view(state="failed")).full_s is None


def test_a_loss_is_what_the_service_did_about_it() -> None:
    assert (KILL.detect_s, KILL.agree_s, KILL.commit_s) == (0.02, 0.05, 0.004)
    assert KILL.prepare_s == pytest.approx(0.7)
    assert (KILL.pause_ms, KILL.full_s, KILL.ranks) == (60.0, 1.5, 4)
    assert (KILL.moved_requests, KILL.moved_bytes) == (5, 3 << 20)


def report(events: list[ElasticEvent], **more: Any) -> ElasticReport:
    points = [
        TimelinePoint(
            at_s=0.5 * n,
            tokens_per_s=100.0 + n,
            first_token_ms=20.0 if n % 2 else None,
            inter_token_ms=5.0,
        )
        for n in range(20)
    ]
    steady = ElasticSteady(ranks=1, tokens_per_s=101.0, median_gap_ms=5.0, longest_gap_ms=9.0)
    given = {
        "start_s": 1.0,
        "steady": [steady],
        "changes": [],
        "kills": [],
        "answers": 12345,
        "lost": ["gone"],
        "altered": None,
        "timeline": ElasticTimeline(
            step_s=0.5, points=points, undisturbed=[(0.0, 2.0)], events=events
        ),
        "memory_mib": {},
        "log": [],
        "flags": ["--model", "<script>alert(1)</script>"],
        "clients": 7,
        "machine": this_machine(),
    }
    return ElasticReport(**given | more)


class Page(HTMLParser):
    """What stands in which element."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.cells.append([])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_the_page_is_whole_and_holds_the_data() -> None:
    text = elastic_page(report([JOIN, KILL]))
    page = Page(text)
    assert page.open == []
    heads, join, kill = page.cells
    assert tuple(heads) == COLUMNS
    assert dict(zip(heads, join, strict=True)) == {
        **{"at": "3.0 s", "event": "up", "ranks after": "4", "detect": "–", "agree": "–"},
        **{"prepare": "750.0 ms", "commit": "10.0 ms", "pause": "4.2 ms"},
        **{"longest token gap": "40.0 ms", "full capacity": "900.0 ms"},
        **{"requests moved": "3", "KV moved": "3.0 MiB", "state": "done"},
    }
    assert dict(zip(heads, kill, strict=True))["detect"] == "20.0 ms"
    data = json.loads(page.scripts[0])
    assert data["series"][0][:3] == [0.0, 0.5, 1.0]
    assert data["series"][1][:2] == [100.0, 101.0]
    assert data["series"][2][:2] == [None, 20.0]
    assert data["baseline"] == [101.5, 20.0, 5.0]  # of the first four points
    assert data["events"] == [[3.0, "up", "up → 4"], [6.0, "kill", "kill"]]
    for words in ("12,345", "not compared", "undisturbed on 1", "MIT License"):
        assert words in text


def test_the_page_refers_to_nothing_outside_and_runs_nothing_of_the_data() -> None:
    text = elastic_page(report([msgspec.structs.replace(KILL, state="</script><b>")]))
    page = Page(text)
    assert len(page.scripts) == 3
    assert not [a for a in page.attributes if a[1] in ("src", "href", "action")]
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "fetch(" not in text
    assert page.cells[1][-1] == "</script><b>"  # as text
    assert "<script>alert(1)</script>" not in text


def test_the_page_knows_light_and_dark() -> None:
    text = elastic_page(report([]))
    assert "color-scheme: light dark" in text
    assert "@media (prefers-color-scheme: dark)" in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "elastic.png"
    draw_elastic(report([JOIN, KILL], altered=0), file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"--plot needs matplotlib: pip install"):
        check_plot(Path("elastic.png"))
