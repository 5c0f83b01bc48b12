"""How many files this service may have open: as many as the system lets it, and enough to start."""

from __future__ import annotations

import contextlib
import resource

from flexpert.errors import ConfigError

# beyond that, clients would be limited by memory, not by descriptors
MOST = 65536
# of the head: its own, a rank's or a helper's, and what it opens for a moment
BASE, EACH, BRIEFLY = 24, 2, 8
HELPERS = 2


def raise_limit(ranks: int) -> int:
    """Up to what may be had without asking anybody; children inherit it.

    Args:
        ranks: that are to be started.

    Returns: the limit.
    Raises: ConfigError: it is too low to serve with.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    desired = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < desired:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (desired, hard))
            soft = desired
    needed = BASE + EACH * (ranks + HELPERS) + BRIEFLY
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise ConfigError(
            f"{soft} files may be open at once (ulimit -n); {ranks} ranks and their clients need "
            f"{needed} or more: raise the limit"
        )
    return soft
