"""Makes what ranks report, and the exits of their processes, into events of the change's table."""

from __future__ import annotations

import logging
import signal
import time

from flexpert.cluster.availability import Availability
from flexpert.cluster.balance_policy import loads_by_layer
from flexpert.cluster.broken_links import GATHER_S, accusations, whom_to_give_up
from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.formatting import ids
from flexpert.cluster.membership import EventKind, MembershipEvent, Phase
from flexpert.cluster.rank_state import RankState
from flexpert.cluster.saved_state import Purpose
from flexpert.cluster.slow_ranks import WaitedFor
from flexpert.cluster.views import GoneRank
from flexpert.engine import rank_protocol as msg
from flexpert.engine.load_report import decode_load
from flexpert.engine.request import HeldKV
from flexpert.engine.stopwatch import in_words
from flexpert.models.fusion_verdicts import MOST_BYTES

log = logging.getLogger("flexpert")

LIVES = ("preparing", "ready", "active")
# Signals that a process brings upon itself.
_FAULTS = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}


class RankReports:
    """Keeps what they say of the rank and of the running operation, and posts the event."""

    def __init__(self, cluster: ClusterState) -> None:
        self._cluster = cluster

    def on_report(self, rank: int, report: msg.Report) -> None:
        """Raises: Contradiction: it cannot be true."""
        cluster = self._cluster
        rank_state = cluster.ranks.get(rank)
        if rank_state is None:
            return
        epoch = cluster.membership.change.epoch if cluster.membership.change else 0
        running = cluster.operation
        cluster.watch.heard(rank_state)
        match report:
            case msg.Alive(stuck_s, used, wire_bytes, load, exchanges):
                rank_state.used, rank_state.wire_bytes = used, wire_bytes
                rank_state.exchanges = exchanges
                if load is not None:
                    tracker = cluster.loads
                    choices = decode_load(load, tracker.layers, tracker.experts)
                    tracker.add(choices, load.compute_s, cluster.head.now())
                cluster.watch.stuck(rank, stuck_s)
                self._look_for_slow()
            case msg.Published(_, load):
                rank_state.load = load
            case msg.Hello():
                self._hello(rank_state, report)
            case msg.Unable(error):
                if rank_state.state != "starting":
                    raise msg.Contradiction(f"it cannot come up, and is {rank_state.state} already")
                rank_state.error = error
                cluster.head.send(rank, msg.Stop())
            case msg.Progress(of, share) if of == epoch and running:
                running.shares[rank] = share
            case msg.Prepared() if report.epoch == epoch:
                self._prepared(rank_state, report)
            case msg.Failed(of, error):
                rank_state.error = error
                if of == epoch:
                    self._post(EventKind.FAILED, rank, f"rank {rank}: {error}")
            case msg.Switched() if report.epoch == epoch:
                self._switched(rank_state, report)
            case msg.Offered(of) if of == epoch and cluster.membership.phase is Phase.MIGRATE:
                if cluster.migrations.offered(epoch, rank, report, cluster.destinations):
                    self._post(EventKind.MIGRATED, rank)
            case msg.Fetched(of, source, size, _, cached) if of == epoch:
                if running:
                    running.moved_kv_bytes += size
                    running.moved_cached_bytes += cached
                if cluster.migrations.fetched(source, rank):
                    self._post(EventKind.MIGRATED, source)
            case msg.HandedOver(of, held):
                if rank in cluster.staying:
                    raise msg.Contradiction("it has left, and was not asked to")
                self._hand_over(rank, held if of == epoch else [])
                rank_state.state = "leaving"
                if of == epoch:
                    self._post(EventKind.HANDED_OVER, rank)
            case msg.Adopted():
                self._adopted(rank, report)
            case msg.Halted(of) if of == epoch:
                self._post(EventKind.HALTED, rank)
            case msg.Broken(of, silent, error) if of in (epoch, cluster.membership.epoch):
                self._accuse(rank, silent)
                log.warning("rank %d: %s", rank, error, extra={"rank": rank, "epoch": of})
                cluster.notices.publish("warning", {"rank": rank, "error": error})
                self._post(EventKind.BROKEN, rank, f"rank {rank}: {error}")

    def _look_for_slow(self) -> None:
        """Tell of a rank that holds the others up, and when it does not any more."""
        cluster = self._cluster
        ranks = [found for found in cluster.ranks.values() if found.state == "active"]
        seen = {
            found.id: WaitedFor(found.instance, found.exchanges.peer_s, found.load.running)
            for found in ranks
        }
        for change in cluster.slow_ranks.look(cluster.head.now(), seen):
            if change.rank in cluster.ranks:
                cluster.ranks[change.rank].slow = change.slow
            log.log(
                logging.WARNING if change.slow else logging.INFO,
                "%s",
                change.text,
                extra={"rank": change.rank},
            )
            found: dict[str, object] = {
                "rank": change.rank,
                "slow": change.slow,
                "waited_share": round(change.share, 3),
                "error": change.text,
            }
            cluster.notices.publish("warning", found)

    def _accuse(self, rank: int, silent: list[int]) -> None:
        """Others behind a link do not answer: if they live, one has to go."""
        cluster = self._cluster
        new = accusations(rank, silent, cluster.machines(cluster.ranks))
        if new and not cluster.broken:
            cluster.head.call_later(GATHER_S, self._give_up)
        cluster.broken |= new

    def _give_up(self) -> None:
        cluster = self._cluster
        pairs, cluster.broken = cluster.broken, set()
        up = [found for found in cluster.ranks.values() if found.state in LIVES]
        living = {found.id for found in up if not found.ended}
        pairs = {pair for pair in pairs if living.issuperset(pair)}
        victim = whom_to_give_up(pairs)
        if victim is not None:
            others = {rank for pair in pairs if victim in pair for rank in pair} - {victim}
            cluster.watch.terminate(
                [victim], f"and rank {ids(sorted(others))} do not reach each other"
            )

    def on_disconnected(self, rank: int) -> None:
        """A rank's connection has ended by itself: so does its process, which is not gone yet.

        Now it is known that it is lost unasked, whatever becomes of the change under way until
        `on_exit`, with which come its status, and that its id is free.
        """
        cluster = self._cluster
        rank_state = cluster.ranks.get(rank)
        if rank_state is None or rank_state.ended or rank_state.state == "starting":
            return
        if rank_state.blameless or self._was_asked_to(rank):
            return
        rank_state.ended = True
        rank_state.found_lost(cluster.head.now())
        log.debug("rank %d has closed its connection", rank)
        reason = f"rank {rank} exited"
        if rank_state.error:
            reason += f": {rank_state.error}"
        self._post(EventKind.DISCONNECTED, rank, reason)

    def on_exit(self, rank: int, status: int, why: str = "") -> None:
        """A rank's process is certainly gone. why: what is known beyond the status."""
        cluster = self._cluster
        rank_state = cluster.ranks.get(rank)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        reason = f"rank {rank} exited ({how})"
        if error := why or (rank_state.error if rank_state else ""):
            reason += f": {error}"
        stalled = rank_state is not None and rank_state.state == "stalled"
        blameless = rank_state is not None and rank_state.blameless
        lost = rank_state is not None and rank_state.ended  # that was known before
        asked = not lost and (blameless or self._was_asked_to(rank))
        if rank_state is not None:
            rank_state.found_lost(cluster.head.now())
        gone: dict[str, object] = {
            "id": rank,
            "instance": rank_state.instance if rank_state else "",
            "state": "gone",
            "pid": rank_state.pid if rank_state else 0,
            "status": status,
            "evicted": stalled,
            "asked": asked,
            "silent_s": rank_state.silent_s if rank_state else None,
            "reason": reason,
        }
        cluster.notices.publish("rank", gone)
        cluster.ranks.pop(rank, None)
        about = {
            "rank": rank,
            "epoch": cluster.membership.epoch,
            "pid": rank_state.pid if rank_state else None,
            "host": rank_state.host if rank_state else None,
        }
        log.log(logging.INFO if asked else logging.WARNING, "%s", reason, extra=about)
        if rank_state is not None:
            ended = GoneRank(
                id=rank,
                instance=rank_state.instance,
                status=status,
                asked=asked,
                time=time.time(),
            )
            cluster.gone.append(ended)
        if asked:
            cluster.restart_policy.left(rank)
        else:
            cluster.restart_policy.exited(rank, status, cluster.head.now())
        self._post(EventKind.EXITED, rank, reason)
        cluster.migrations.lost(rank)
        if not asked:
            cluster.head.rank_exited(rank, not stalled and (status > 0 or -status in _FAULTS))
        # only now: admission must not choose the lost rank again
        self._hand_over(rank, [])
        if not cluster.ranks and cluster.availability.state is Availability.LOST:
            self._post(EventKind.ALL_EXITED)

    def _post(self, kind: EventKind, rank: int | None = None, reason: str = "") -> None:
        self._cluster.events.post(MembershipEvent(kind, rank, reason))

    def _hello(self, rank_state: RankState, report: msg.Hello) -> None:
        if rank_state.state != "starting":
            raise msg.Contradiction(f"it says hello, and is {rank_state.state} already")
        rank_state.introduce(report)
        if not self._cluster.verdicts and len(report.verdicts) <= MOST_BYTES:
            self._cluster.verdicts = report.verdicts
        log.debug("rank %d came up: %s", rank_state.id, in_words(report.laps))
        rank_state.state = "preparing"
        self._post(EventKind.HELLO, rank_state.id)

    def _prepared(self, rank_state: RankState, report: msg.Prepared) -> None:
        rank_state.memory, rank_state.device_memory = report.memory, report.device_memory
        rank_state.used = report.used
        if report.device_memory:
            self._cluster.memory_budget.learn(report.device_memory)
        log.debug("rank %d is prepared: %s", rank_state.id, in_words(report.laps))
        running = self._cluster.operation
        if running:
            running.copied_experts += report.copied
            if running.purpose is Purpose.REBALANCE:
                self._learn_cost(rank_state.id, report.laps)
        if rank_state.state == "preparing":
            rank_state.state = "ready"
        self._post(EventKind.PREPARED, rank_state.id)

    def _learn_cost(self, rank: int, laps: dict[str, float]) -> None:
        """What moving experts takes of a rank's time, the waiting left out."""
        cluster = self._cluster
        if cluster.placement is None or cluster.planned is None:
            return
        layers = loads_by_layer(cluster.placement, cluster.planned)
        moved = sum(layer.get(rank, 0) for layer in layers)
        cluster.move_costs.moved(moved, laps.get("experts", 0.0) - laps.get("held back", 0.0))

    def _switched(self, rank_state: RankState, report: msg.Switched) -> None:
        cluster, running = self._cluster, self._cluster.operation
        rank_state.state, rank_state.load = "active", report.load
        rank_state.over_nixl = self._peers(rank_state.id, report.over_nixl)
        pause = "" if report.pause_ms is None else f"pause {report.pause_ms:.1f} ms, of which "
        log.debug("rank %d has switched: %s%s", rank_state.id, pause, in_words(report.laps))
        cluster.restart_policy.active(rank_state.id, cluster.head.now())
        if report.pause_ms is not None and running:
            running.pause_ms = max(report.pause_ms, running.pause_ms or 0.0)
        self._post(EventKind.SWITCHED, rank_state.id)

    def _peers(self, rank: int, told: list[int]) -> list[int]:
        """Those it may reach. Raises: Contradiction: others are among them, or one is twice."""
        change = self._cluster.membership.change
        peers = (change.after if change else frozenset()) - {rank}
        if len(set(told)) != len(told) or not peers.issuperset(told):
            raise msg.Contradiction("it tells of links to ranks that are no peers of it")
        return sorted(told)

    def _adopted(self, rank: int, report: msg.Adopted) -> None:
        cluster, running = self._cluster, self._cluster.operation
        if running:
            running.moved_with_kv += report.moved
            running.moved_kv_bytes += report.size
            running.recomputed_tokens += report.recomputed
        change = cluster.membership.change
        last = cluster.migrations.adopted(report.source, rank)
        if last and cluster.membership.phase is Phase.RELEASE and change:
            cluster.tell({report.source} & change.leaving, msg.Stop())

    def _hand_over(self, rank: int, held: list[HeldKV]) -> None:
        """A rank has left or is lost: others go on with its sequences."""
        cluster = self._cluster
        leaves = cluster.membership.phase is Phase.COMMIT and bool(held)
        destinations = cluster.destinations if leaves else cluster.admitting
        moved = cluster.migrations.hand_over(rank, held, destinations)
        if cluster.operation:
            cluster.operation.moved_requests += moved

    def _was_asked_to(self, rank: int) -> bool:
        """Whether it has left by the change under way, or joins by one that is withdrawn.

        Until a leaver has handed over it serves like any other.
        """
        change, phase = self._cluster.membership.change, self._cluster.membership.phase
        rank_state = self._cluster.ranks.get(rank)
        if change is None or phase is Phase.IDLE:
            return False
        if phase is Phase.UNDO:
            return change.cancelled and rank in change.joining
        left = phase is Phase.RELEASE or (rank_state is not None and rank_state.state == "leaving")
        return left and rank in change.leaving
