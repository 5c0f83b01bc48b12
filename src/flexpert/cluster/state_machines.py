"""Every state and transition of coordinator and rank, as docs/state-machines.md shows them.

python -m flexpert.cluster.state_machines docs/state-machines.md   # writes them into the page
"""

from __future__ import annotations

import sys
from pathlib import Path

from flexpert.cluster.availability import availability_diagram
from flexpert.cluster.membership import diagram
from flexpert.cluster.reconciliation import activity_diagram
from flexpert.engine import rank_states

BEGIN = "<!-- generated: python -m flexpert.cluster.state_machines docs/state-machines.md -->"
END = "<!-- end of what is generated -->"

_MACHINES = (
    (
        "The change under way (`cluster/membership.py`)",
        "What a change of the ranks waits for. Actions are carried out by "
        "`cluster/change_actions.py`.",
        diagram,
    ),
    (
        "What begins next (`cluster/reconciliation.py`)",
        "Which change the head begins by itself, or because somebody asked. Actions are carried "
        "out by `cluster/reconciler.py`.",
        activity_diagram,
    ),
    (
        "What becomes of requests (`cluster/availability.py`)",
        "Whether requests are answered, wait or fail. Actions are carried out by "
        "`cluster/reconciler.py`.",
        availability_diagram,
    ),
    (
        "A rank (`engine/rank_states.py`)",
        "Whether it takes part in exchanges, and what has become of the plan of the next epoch; "
        "the two go on side by side. Actions are carried out by `engine/rank_engine.py`.",
        rank_states.diagram,
    ),
)


def machines() -> str:
    """The diagrams as Markdown, one section each."""
    return "\n\n".join(
        f"## {title}\n\n{text}\n\n```mermaid\n{draw()}\n```" for title, text, draw in _MACHINES
    )


def put_into(page: str) -> str:
    """A page with what stands between its two marks renewed. Raises: ValueError: it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page lacks the marks between which the diagrams stand")
    return f"{before}{BEGIN}\n\n{machines()}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(put_into(path.read_text(encoding="utf-8")), encoding="utf-8")
