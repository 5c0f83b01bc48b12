"""What a head that runs does when another one asks for its service: up to a point, nothing.

That point is `Holder.let_go`. Before it whatever fails is told to the other head, and this one goes
on; after it the service is whoever's that takes the ranks, which is a matter of milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from flexpert.cluster.handover import messages as hand
from flexpert.cluster.handover.head_socket import readable
from flexpert.cluster.handover.messages import Conversation

log = logging.getLogger("flexpert")

_CHANGE_S = 30.0  # for a change that is under way; then it begins again over there
_WORD_S = 1.0  # between two words to who waits
_LOOK_S = 0.02


class Holder(Protocol):
    """Who has the service."""

    @property
    def changing(self) -> str | None:
        """What is under way that had better end first, or None."""
        ...

    def refusal(self) -> str | None:
        """Why nobody could take over now, or None."""
        ...

    def welcome(self) -> tuple[hand.HeadWelcome, list[int]]:
        """With descriptors."""
        ...

    async def let_go(self) -> tuple[hand.Handed, list[int]]:
        """From here on all is another head's. With descriptors."""
        ...

    def has_let_go(self, pid: int) -> None:
        """The other head has been told."""
        ...


class HandingOver:
    """To one head at a time."""

    def __init__(self, owner: Holder) -> None:
        self._owner = owner
        self._busy = False

    async def on_ask(self, conversation: Conversation) -> None:
        """The other head has asked.

        Raises: ConversationEnded, TimeoutError, OSError: it has gone, and nothing has changed.
        """
        why = "another head is taking over already" if self._busy else self._owner.refusal()
        if why is not None:
            await asyncio.to_thread(conversation.send, hand.Declined(why))
            return
        self._busy = True
        try:
            welcome, given = self._owner.welcome()
            await asyncio.to_thread(conversation.send, welcome, *given)
            await readable(conversation.channel)  # it starts, which takes a while
            hand.decode_takeover(await asyncio.to_thread(conversation.receive))
            await self._wait_for_change(conversation)
            why = self._owner.refusal()
            if why is not None:
                await asyncio.to_thread(conversation.send, hand.Declined(why))
                return
            await self._let_go(conversation)
        finally:
            self._busy = False

    async def _wait_for_change(self, conversation: Conversation) -> None:
        began = told = time.monotonic()
        gone = readable(conversation.channel)  # it has nothing more to say
        try:
            await asyncio.sleep(0)
            while (change := self._owner.changing) is not None or gone.done():
                now = time.monotonic()
                if gone.done():
                    await asyncio.to_thread(conversation.receive)  # raises
                if now - began > _CHANGE_S:
                    log.warning("%s is not waited for any longer: it begins again", change)
                    return
                if now - told >= _WORD_S:
                    told = now
                    await asyncio.to_thread(conversation.send, hand.Wait(change or ""))
                await asyncio.sleep(_LOOK_S)
        finally:
            gone.cancel()

    async def _let_go(self, conversation: Conversation) -> None:
        pid, _ = hand.peer(conversation.channel)
        handed, given = await self._owner.let_go()
        try:
            await asyncio.to_thread(conversation.send, handed, *given)
        except OSError:
            log.error(
                "the head that was to take over has just ended, and the ranks wait for another: "
                "start one with --resume"
            )
        self._owner.has_let_go(pid)
