"""What a head does so that another may go on with its service: a directory, a database in it, and
answers that clients come back for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from flexpert.cluster import state_store
from flexpert.cluster.journal import TokenStream
from flexpert.cluster.kept_counters import KeptSample
from flexpert.cluster.processes.early_fork_server import for_children
from flexpert.cluster.saved_state import (
    SavedCluster,
    SavedHost,
    SavedOperation,
    SavedRun,
    SavedState,
)
from flexpert.cluster.state_directory import StateDirectory
from flexpert.cluster.state_store import StateStore
from flexpert.config import Config
from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.errors import ConfigError, RequestError

log = logging.getLogger("flexpert")

_LOOK_S = 1.0
_COUNTERS_EVERY = 5  # looks: to go through all metrics takes milliseconds of the loop
# What ranks go by; another head may have other settings but these.
_OF_RANKS = ("max_ranks", "exchange_timeout", "stall_timeout", "orphan_timeout", "state_dir")

Everything = tuple[list[SavedOperation], list[tuple[RequestSequence, SavedRun]]]


def settings_of_ranks(config: Config) -> dict[str, object]:
    """Those that must be equal for a head to take ranks over, by their paths."""
    tree = msgspec.json.decode(for_children(config), type=dict[str, dict[str, object]])
    parts = {section: tree[section] for section in ("model", "engine")}
    parts["cluster"] = {name: tree["cluster"][name] for name in _OF_RANKS}
    return {
        f"{section}.{name}": value
        for section, part in parts.items()
        for name, value in part.items()
    }


class HeadState:
    """Of a head with `--state-dir`; used on its event loop.

    saved: what is taken over; None: the service begins anew.

    Raises:
        ConfigError: the directory cannot be used, or its ranks must not be taken over like this.
        ModelError: what is in it cannot be read.
    """

    def __init__(self, config: Config, directory: StateDirectory | None = None) -> None:
        assert config.cluster.state_dir is not None
        self.directory = directory or StateDirectory(config.cluster.state_dir)
        try:
            settings = settings_of_ranks(config)
            self.saved = self._look(config, settings)
        except BaseException:
            self.directory.close()
            raise
        self.store = StateStore(
            self.directory.database, msgspec.json.encode(settings).decode(), self._written
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._on_written: Callable[[int, int], None] = lambda rank, count: None
        self._everything: Callable[[], Everything] = lambda: ([], [])
        self._warn: Callable[[str], None] = lambda text: None
        self._counters: Callable[[], list[KeptSample]] = list
        self._counted: list[KeptSample] = []
        self._looks = 0
        self._cluster: SavedCluster | None = None
        self._hosts: list[SavedHost] = self.saved.hosts if self.saved else []
        self._warned = False

    def _look(self, config: Config, settings: dict[str, object]) -> SavedState | None:
        directory = self.directory
        if not (config.cluster.resume or config.cluster.takeover):
            if directory.ranks_wait:
                raise ConfigError(
                    f"in cluster.state_dir {str(directory.path)!r} ranks wait for a head: take "
                    "them over with --resume, or wait until they end (--orphan-timeout)"
                )
            return None
        saved = state_store.load(directory.database)
        if saved is None or saved.cluster is None:
            return None
        theirs = msgspec.json.decode(saved.settings or "{}", type=dict[str, object])
        for name in sorted(settings.keys() | theirs.keys()):
            if settings.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{name}: the ranks in cluster.state_dir {str(directory.path)!r} run with "
                    f"{theirs.get(name)!r}, not {settings.get(name)!r}; resume with the same "
                    "settings, and change them afterwards"
                )
        return saved

    def start(
        self,
        on_written: Callable[[int, int], None],
        everything: Callable[[], Everything],
        warn: Callable[[str], None],
        counters: Callable[[], list[KeptSample]],
    ) -> None:
        """Write down from now on. on_written(rank, count): what a rank has published up to that
        number need not be kept by it. everything: all there is, after a failure. warn: people.
        counters: of metrics, which are written down now and then."""
        self._loop = asyncio.get_running_loop()
        self._on_written, self._everything, self._warn = on_written, everything, warn
        self._counters = counters
        self.store.start(keep=self.saved is not None)
        self._look_again()

    def save_cluster(self, record: SavedCluster, *, urgent: bool) -> None:
        self._cluster = record
        self.store.cluster(record, urgent=urgent)

    def save_hosts(self, records: list[SavedHost]) -> None:
        self._hosts = records
        self.store.hosts(records)

    def finish(self) -> None:
        """All that was noted is written; nothing more is. Waits for that."""
        self._save_counters()
        self.store.close(remove=False)

    def close(self, *, remove: bool) -> None:
        """remove: there is nothing left that could be resumed."""
        if self._timer is not None:
            self._timer.cancel()
        self.store.close(remove=remove)
        self.directory.close()

    def _save_counters(self) -> None:
        if (counted := self._counters()) != self._counted:
            self._counted = counted
            self.store.counters(counted)

    def _written(self, marks: dict[int, int]) -> None:
        """From the store's thread."""

        def tell() -> None:
            for rank, count in marks.items():
                self._on_written(rank, count)

        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)

    def _look_again(self) -> None:
        assert self._loop is not None
        failure = self.store.failure
        if failure is not None and not self._warned:
            self._warn(
                f"the state cannot be written down, the head could not be resumed: {failure}"
            )
        elif failure is None and self._warned:
            self._warn("the state is written down again, the head could be resumed")
        self._warned = failure is not None
        if self._cluster is not None and self.store.wants_all:
            self.store.begin_again(self._cluster, self._hosts, *self._everything())
            self._counted = []
        elif self._looks % _COUNTERS_EVERY == 0:
            self._save_counters()
        self._looks += 1
        self._timer = self._loop.call_later(_LOOK_S, self._look_again)


class UnclaimedAnswers:
    """Answers of another head's requests, complete or not: for clients, by the id that each gave,
    and for a head that was taken over, by the sequence's."""

    def __init__(self, forget: Callable[[str], None]) -> None:
        self._forget = forget
        self._found: dict[str, tuple[TokenStream, list[int], SamplingParams]] = {}
        self._sequences: dict[str, str] = {}  # request → its latest sequence

    def add(self, stream: TokenStream, prompt: list[int], params: SamplingParams) -> None:
        """stream: all of the answer, from its beginning."""
        self._found[stream.id] = stream, prompt, params
        self._sequences[stream.id.rpartition("-")[0]] = stream.id

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._found

    def take(self, sequence_id: str) -> TokenStream | None:
        """The answer of a sequence; None: it is not here."""
        found = self._found.pop(sequence_id, None)
        request_id = sequence_id.rpartition("-")[0]
        if self._sequences.get(request_id) == sequence_id:
            del self._sequences[request_id]
        return found and found[0]

    def claim(
        self, request_id: str, prompt: list[int], params: SamplingParams
    ) -> TokenStream | None:
        """The answer to a request that is asked again; None: there is none.

        Raises: RequestError: it is another request.
        """
        sequence_id = self._sequences.get(request_id)
        if sequence_id is None:
            return None
        stream, asked, how = self._found[sequence_id]
        seedless = msgspec.structs.replace(how, seed=params.seed)
        if asked != prompt or seedless != params:
            raise RequestError(
                f"request {request_id} was asked with another prompt or other parameters before "
                "the head was started again; ask the same, or with another X-Request-Id"
            )
        self.take(sequence_id)
        return stream

    def expire(self) -> None:
        """Nobody has come for what is left."""
        for stream, _, _ in self._found.values():
            stream.cancel()
            self._forget(stream.id)
        self._found.clear()
        self._sequences.clear()
