"""The official `openai` client against `flexpert serve` with real ranks, while they change."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI

from flexpert.bench.load import call
from flexpert.bench.service import own_service

pytestmark = pytest.mark.slow

SERVE = ("--ranks", "2", "--max-ranks", "4", "--deterministic", "--kv-memory", "32MiB")


def test_the_openai_client_streams_the_same_answers_while_ranks_change() -> None:
    async def scenario() -> None:
        async with own_service(SERVE, report=lambda line: None) as service:
            url = f"http://{service.target.host}:{service.target.port}/v1"
            client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

            async def streamed(number: int) -> str:
                text = ""
                stream = await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": f"Tell me of Psalm {number}."}],
                    max_tokens=80,
                    temperature=0.7,
                    seed=number,
                    stream=True,
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            async def whole(number: int) -> str:
                answer = await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": f"Tell me of Psalm {number}."}],
                    max_tokens=80,
                    temperature=0.7,
                    seed=number,
                )
                assert answer.usage
                assert answer.usage.completion_tokens > 0
                return answer.choices[0].message.content or ""

            quiet = await asyncio.gather(*(whole(number) for number in range(12)))
            assert all(quiet)
            traffic = asyncio.gather(*(streamed(number) for number in range(12)))
            for target in ({"ranks": 4}, {"remove": [0, 2]}):
                status, operation = await call(
                    service.target, "POST", "/cluster/operations", target
                )
                assert status == 202
                while operation["state"] in ("preparing", "committing"):
                    await asyncio.sleep(0.02)
                    path = f"/cluster/operations/{operation['id']}"
                    _, operation = await call(service.target, "GET", path)
                assert operation["state"] == "done"
            assert await traffic == quiet
            await client.close()

    asyncio.run(scenario())
