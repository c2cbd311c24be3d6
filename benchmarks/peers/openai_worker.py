"""Plain clients of chat completions in a process of their own: openai's, aiohttp's, and bare sockets.

Runs in the environment of `openai.txt`. Each keeps its connections for one load, which it opens with a load of its own.
"""

import asyncio
import importlib.metadata
import json
from typing import Any

import aiohttp
import openai

from benchmarks.peers.load import drive
from benchmarks.peers.protocol import serve

_PACKAGES = ("openai", "httpx2", "aiohttp")


def _fields(question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "m", "messages": messages, "temperature": 0.0, "max_tokens": 1024, "top_p": 1.0}


async def _openai(port: int, calls: int, in_flight: int) -> dict[str, float]:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:

        async def ask(question: str) -> str:
            completion = await client.chat.completions.create(**_fields(question))
            return completion.choices[0].message.content

        await drive(ask, in_flight, in_flight)
        return await drive(ask, calls, in_flight)


async def _aiohttp(port: int, calls: int, in_flight: int) -> dict[str, float]:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(question: str) -> str:
            async with session.post(url, json=_fields(question)) as response:
                response.raise_for_status()
                return (await response.json())["choices"][0]["message"]["content"]

        await drive(ask, in_flight, in_flight)
        return await drive(ask, calls, in_flight)


async def _bare(port: int, calls: int, in_flight: int) -> dict[str, float]:
    """What the server itself takes: bytes over kept connections, and the reply as JSON."""
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(in_flight)]

    async def ask(question: str) -> str:
        reader, writer = idle.pop()
        body = json.dumps(_fields(question)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        fields = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        length = next(int(field.split(":")[1]) for field in fields if field.startswith("Content-Length"))
        reply = json.loads(await reader.readexactly(length))
        idle.append((reader, writer))
        return reply["choices"][0]["message"]["content"]

    await drive(ask, in_flight, in_flight)
    try:
        return await drive(ask, calls, in_flight)
    finally:
        for _, writer in idle:
            writer.close()


_CLIENTS = {"openai": _openai, "aiohttp": _aiohttp, "bare": _bare}


class Peer:
    """What this process answers to."""

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in _PACKAGES}

    def run(self, client: str, **load: Any) -> dict[str, float]:
        """One load; see `load.drive`."""
        return asyncio.run(_CLIENTS[client](**load))


if __name__ == "__main__":
    serve(Peer())
