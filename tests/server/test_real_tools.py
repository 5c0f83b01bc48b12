"""Calls that a request dictates, by real ranks, while those change and die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest
from openai import AsyncOpenAI

from flexpert.bench.load import call
from flexpert.bench.service import own_service

pytestmark = pytest.mark.slow

SERVE = ("--ranks", "2", "--max-ranks", "4", "--deterministic", "--kv-memory", "32MiB")
TEMPLATE = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "psalm",
            "parameters": {
                "type": "object",
                "properties": {
                    "number": {"type": "integer", "minimum": 1, "maximum": 150},
                    "mood": {"enum": ["joy", "lament"]},
                },
                "required": ["number", "mood"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
NAMED: Any = {"type": "function", "function": {"name": "psalm"}}


def is_psalm(arguments: str) -> bool:
    value = json.loads(arguments)
    in_range = 1 <= value["number"] <= 150
    return set(value) == {"number", "mood"} and in_range and value["mood"] in ("joy", "lament")


def test_dictated_calls_are_valid_and_the_same_through_ten_changes_and_five_kills() -> None:
    async def scenario() -> None:
        serve = (*SERVE, "--trust-request-chat-template")
        async with own_service(serve, report=lambda line: None) as service:
            url = f"http://{service.target.host}:{service.target.port}/v1"
            client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

            async def called(number: int) -> list[tuple[str, str]]:
                found: list[tuple[str, str]] = []
                stream = await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": f"Tell me of Psalm {number}."}],
                    tools=TOOLS,
                    tool_choice=NAMED if number % 2 else "required",
                    parallel_tool_calls=False,
                    max_tokens=120,
                    temperature=0.9,
                    seed=number,
                    stream=True,
                    extra_body={"chat_template": TEMPLATE},
                )
                finish = None
                async for chunk in stream:
                    (choice,) = chunk.choices
                    assert not choice.delta.content
                    finish = choice.finish_reason or finish
                    for piece in choice.delta.tool_calls or ():
                        assert piece.function is not None
                        if piece.function.name:
                            found.append((piece.function.name, ""))
                        name, before = found[-1]
                        found[-1] = (name, before + (piece.function.arguments or ""))
                assert finish == "tool_calls"
                return found

            async def change(target: dict[str, Any]) -> None:
                path = "/cluster/operations"
                status, operation = await call(service.target, "POST", path, target)
                assert status == 202
                while operation["state"] in ("preparing", "committing"):
                    await asyncio.sleep(0.02)
                    _, operation = await call(
                        service.target, "GET", f"{path}/{operation['id']}", None
                    )
                assert operation["state"] == "done"

            killed: list[int] = []

            async def kill_one() -> None:
                _, cluster = await call(service.target, "GET", "/cluster", None)
                killed.append(cluster["ranks"][len(killed) % 2]["pid"])
                os.kill(killed[-1], signal.SIGKILL)

            async def whole_again(ranks: int) -> None:
                while True:
                    await asyncio.sleep(0.05)
                    _, cluster = await call(service.target, "GET", "/cluster", None)
                    up = [r["pid"] for r in cluster["ranks"] if r["state"] == "active"]
                    if len(up) == ranks and not cluster["operation"] and killed[-1] not in up:
                        return

            quiet = await asyncio.gather(*(called(number) for number in range(16)))
            for number, found in enumerate(quiet):
                assert len(found) == 1
                ((name, arguments),) = found
                assert name == "psalm" if number % 2 else name in ("psalm", "now")
                assert is_psalm(arguments) if name == "psalm" else arguments == "{}"
            over = False

            async def traffic() -> int:
                rounds = 0
                while not over:
                    assert await asyncio.gather(*(called(n) for n in range(16))) == quiet
                    rounds += 1
                return rounds

            running = asyncio.create_task(traffic())
            for number in range(5):
                for ranks in (4, 2) if number % 2 else (3, 2):
                    await change({"ranks": ranks})
                    await asyncio.sleep(0.1)
                await kill_one()
                await whole_again(2)
            over = True
            assert await running >= 1
            await client.close()

    asyncio.run(scenario())
