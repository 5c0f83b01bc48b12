"""The head that runs, as the one that is to take over from it sees it.

Nothing that it does changes anything there before `take`; and up to the answer to that it may end
at any time, and the running head goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from flexpert.cluster.handover import messages as hand
from flexpert.cluster.handover.messages import Conversation, ConversationEnded
from flexpert.cluster.state_directory import StateDirectory
from flexpert.cluster.views import ClusterEvent
from flexpert.errors import ConfigError, FlexpertError
from flexpert.forking.framing import BadFrame

_PATIENCE_S = 5.0  # for a head that lives to say something; it says every second that it waits


@dataclass(frozen=True, slots=True)
class TakenService:
    """directory: locked by us from now on. events: see `messages.Handed`."""

    directory: StateDirectory
    latest: int
    events: list[ClusterEvent]


class RunningHead:
    """listener: the socket on which it listens for HTTP; None: it does not.

    Args:
        path: the state directory. settings: of the ranks, as this head has them. state_format: of
            the state that it reads.

    Raises:
        ConfigError: there is none, it does not answer, or this head cannot go on with its ranks.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], state_format: int) -> None:
        self._path = path.absolute()
        self._conversation = self._connect()
        try:
            self.welcome = self._greet()
            self._check(settings, state_format)
        except BaseException:
            self.close()
            raise
        given = self._conversation.descriptor()
        self.listener = None if given is None else socket.socket(fileno=given)

    def _connect(self) -> Conversation:
        if not StateDirectory.is_held(self._path):
            raise ConfigError(
                f"no head runs with cluster.state_dir {str(self._path)!r}: there is nothing to "
                "take over; start with --resume, which goes on with what one has left, if any has"
            )
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.settimeout(_PATIENCE_S)
        try:
            channel.connect(str(self._path / hand.HEAD_SOCKET))
            if not hand.same_user(channel):
                raise ConfigError(f"{channel.getpeername()} is another user's")
        except OSError as error:
            channel.close()
            raise ConfigError(
                f"the head with cluster.state_dir {str(self._path)!r} cannot be asked to hand over "
                f"({error.strerror or error}): it starts, stops or hangs; try again, or end it and "
                "start with --resume"
            ) from None
        except ConfigError:
            channel.close()
            raise
        return Conversation(channel, _PATIENCE_S)

    def _greet(self) -> hand.HeadWelcome:
        try:
            self._conversation.send(hand.our_ask())
            answer = hand.decode_takeover(self._conversation.receive())
        except TimeoutError:
            raise ConfigError(
                f"the head with cluster.state_dir {str(self._path)!r} does not answer: it hangs; "
                "end it (SIGKILL), and start with --resume"
            ) from None
        except (ConversationEnded, OSError):
            raise ConfigError(
                f"the head with cluster.state_dir {str(self._path)!r} has just ended; start with "
                "--resume"
            ) from None
        except (BadFrame, msgspec.MsgspecError) as error:
            raise ConfigError(f"the running head cannot be taken over: {error}") from None
        if isinstance(answer, hand.Declined):
            raise ConfigError(f"the running head does not hand over: {answer.why}")
        if not isinstance(answer, hand.HeadWelcome):
            raise ConfigError("the running head cannot be understood; it is left as it is")
        return answer

    def _check(self, settings: Mapping[str, object], state_format: int) -> None:
        theirs = self.welcome
        if theirs.format != state_format:
            raise ConfigError(
                f"the running head (flexpert {theirs.version}) writes its state in format "
                f"{theirs.format}, and this flexpert reads {state_format}: take over with a "
                "version that reads it"
            )
        for name in sorted(settings.keys() | theirs.settings.keys()):
            ours, running = settings.get(name), theirs.settings.get(name)
            if ours != running:
                raise ConfigError(
                    f"{name}: the running ranks have {running!r}, not {ours!r}; take over with the "
                    "same settings of model and engine, and change them afterwards"
                )

    def take(self, tell: Callable[[str], None]) -> TakenService:
        """It lets the service go; waits for that.

        Raises:
            FlexpertError: it did not, and goes on.
        """
        conversation = self._conversation
        try:
            conversation.send(hand.Go())
            while True:
                answer = hand.decode_takeover(conversation.receive())
                if not isinstance(answer, hand.Wait):
                    break
                tell(f"the running head waits: {answer.why}")
        except TimeoutError:
            raise FlexpertError(
                "the running head does not hand over: it hangs; end it (SIGKILL), and start with "
                "--resume"
            ) from None
        except (ConversationEnded, OSError):
            raise FlexpertError(
                "the running head has ended before it has handed over; start with --resume"
            ) from None
        if isinstance(answer, hand.Declined):
            raise FlexpertError(f"the running head does not hand over: {answer.why}")
        lock = conversation.descriptor()
        if not isinstance(answer, hand.Handed) or lock is None:
            raise FlexpertError("the running head cannot be understood; start with --resume")
        return TakenService(StateDirectory(self._path, lock=lock), answer.latest, answer.events)

    def is_on(self, host: str, port: int) -> bool:
        """Whether it listens where these settings say."""
        there = self.welcome
        return self.listener is not None and (there.host, there.port) == (host, port)

    def give_up(self) -> None:
        """From another thread than that of `take`, which ends."""
        self._conversation.shutdown()

    def close(self) -> None:
        """Idempotent."""
        self._conversation.close()
