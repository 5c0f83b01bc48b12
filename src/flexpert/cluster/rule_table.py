"""Tables of rules, which are what a state machine here is made of (pure).

In this state, on this event, if that holds: do these actions and go on in that state. The first
rule that fits wins; an event without a rule is ignored. What a machine keeps besides its state it
hands to the guards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

State = TypeVar("State", bound=Enum)
Kind = TypeVar("Kind", bound=Enum)
Action = TypeVar("Action", bound=Enum)

Guard = Callable[..., bool]


def always(*_: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Rule(Generic[State, Kind, Action]):
    """In `state`, on `event`, if `when` holds: `do` in this order, and go to `then`."""

    state: State
    event: Kind
    then: State
    do: tuple[Action, ...] = ()
    when: Guard = always


class RuleTable(Generic[State, Kind, Action]):
    """The rules of one state machine, in the order in which they are tried."""

    def __init__(self, rules: Iterable[Rule[State, Kind, Action]]) -> None:
        self._rules = tuple(rules)
        self._by_event: dict[tuple[State, Kind], list[Rule[State, Kind, Action]]] = {}
        for rule in self._rules:
            self._by_event.setdefault((rule.state, rule.event), []).append(rule)

    def __iter__(self) -> Iterator[Rule[State, Kind, Action]]:
        return iter(self._rules)

    def find(self, state: State, event: Kind, *known: Any) -> Rule[State, Kind, Action] | None:
        """The first rule that fits. known: what its guards are called with."""
        for rule in self._by_event.get((state, event), ()):
            if rule.when(*known):
                return rule
        return None

    def diagram(self, initial: State) -> str:
        """As a Mermaid state diagram. Rules that change nothing are left out."""
        lines = ["stateDiagram-v2", f"    [*] --> {_name(initial)}"]
        for rule in self._rules:
            if rule.then is rule.state and not rule.do:
                continue
            guard = "" if rule.when is always else f" [{rule.when.__name__.strip('_')}]"
            do = f" / {', '.join(action.value for action in rule.do)}" if rule.do else ""
            label = f"{rule.event.value}{guard}{do}".replace("_", " ")
            lines.append(f"    {_name(rule.state)} --> {_name(rule.then)}: {label}")
        return "\n".join(lines)


def _name(state: Enum) -> str:
    return str(state.value)
