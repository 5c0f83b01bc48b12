"""Numbers that kernels.c gives and takes, by name."""

from __future__ import annotations

from collections.abc import Mapping

from flexpert.comm.buffer import Point

LINK_SHIFT, MOST_LINK = 20, 0xFFF  # of a session

# how a wait ended
OK, TIMEOUT, INTERRUPTED, AGAIN, RUNG, LOST = range(6)

# what is waited for
DISPATCH, COMBINE, VOTE = range(3)
PHASES = ("dispatch", "combine", "vote")

# what was wrong with a dispatch, a combine, and with what a dispatch brought
NO_SUCH_EXPERT = 1
WRONG_MODE, WRITTEN_OVER = 1, 3
NO_MEMORY, WRONG_PAYLOAD = -2, -3

# points that are passed in an exchange that C walks, see native.c
AT_DISPATCH, AT_DISPATCH_WAIT, AT_COMBINE, AT_COMBINE_WAIT = 8, 9, 10, 11
POINTS: Mapping[int, Point] = {
    AT_DISPATCH: "dispatch_send",
    AT_DISPATCH_WAIT: "dispatch_wait",
    AT_COMBINE: "combine_send",
    AT_COMBINE_WAIT: "combine_wait",
}

# why waiting for a peer is in vain
ENDED, BROKEN_LINK, MASKED, RESTARTED = 1, 2, 3, 4
WHY = {
    ENDED: "process exited",
    BROKEN_LINK: "link broken",
    MASKED: "masked",
    RESTARTED: "started afresh",
}
