"""A loopback HTTP server in a process of its own: experts that take their time, and a scripted language model.

    python -m benchmarks.expert_server        # writes its port on standard output, ends with standard input

| request | reply |
|---|---|
| POST /replay {"latencies": {call: seconds}} | {}; what was served before is forgotten |
| POST /script {"step_seconds": seconds, and the arguments of `Script`} | {} |
| POST /expert {"call": call} | {"text": ...} after the call's seconds |
| POST /v1/completions {"prompt": [ids], ...} | vLLM's reply after step_seconds a token; without a script, none |
| POST /v1/chat/completions {"messages": [...], ...} | a chat completion, at once |
| POST /served {} | {"calls": [...]}, in the order of their requests |

Nothing limits how many requests wait side by side. Standard library only, because peers import the clients in
environments of their own.
"""

import asyncio
import http.client
import json
import os
import re
import selectors
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

OBSERVATION = "the figure shows" + " the figure" * 10  # what every expert says
COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": OBSERVATION}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 300, "completion_tokens": 24, "total_tokens": 324},
}


class Script:
    """Looks up the turn that a scripted language model writes next.

    The last name in a prompt (the task's, or that of the latest call) tells which turn that is. Names are found among
    ids, as text in which every id is one character, so that no tokenizer is needed here.

    Args:
      opening: ids in front of every name.
      width: ids of a name.
      turns: completions by name, as such text; members of a group, whose prompts are equal, take theirs in order.
    """

    def __init__(self, opening: list[int], width: int, turns: Mapping[str, list[list[int]]]):
        self._pattern = re.compile(f"{re.escape(as_text(opening))}(.{{{width}}})", re.DOTALL)
        self._left = {name: list(completions) for name, completions in turns.items()}

    def next_turn(self, prompt: list[int]) -> list[int] | None:
        """Ids of the completion; None where the script has none left."""
        *_, last = self._pattern.findall(as_text(prompt))
        left = self._left.get(last)
        return left.pop(0) if left else None


def as_text(ids: list[int]) -> str:
    """Ids as characters, one each."""
    return "".join(map(chr, ids))


# ---- the server ----------------------------------------------------------------------------------------------


class ExpertServer:
    """Answers requests on as many connections as are made."""

    def __init__(self) -> None:
        self._latencies: dict[str, float] = {}
        self._script = Script([], 0, {})
        self._step_seconds = 0.0
        self._served: list[str] = []
        self._routes: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]] = {
            "/replay": self._replay,
            "/script": self._take_script,
            "/expert": self._expert,
            "/v1/completions": self._complete,
            "/v1/chat/completions": self._chat,
            "/served": self._tell_served,
        }

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept until the client closes it."""
        try:
            while True:
                start, body = await _read_message(reader)
                _, path, _ = start.split(" ", 2)
                reply = await self._routes[path](json.loads(body))
                if reply is None:
                    await reader.read()  # no reply, until the client has gone
                    return
                content = json.dumps(reply).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                writer.write(head.encode() + content)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _replay(self, request: dict[str, Any]) -> dict[str, Any]:
        self._latencies, self._served = request["latencies"], []
        return {}

    async def _take_script(self, request: dict[str, Any]) -> dict[str, Any]:
        self._step_seconds = request.pop("step_seconds")
        self._script = Script(**request)
        return {}

    async def _expert(self, request: dict[str, Any]) -> dict[str, Any]:
        self._served.append(request["call"])
        await asyncio.sleep(self._latencies[request["call"]])
        return {"text": OBSERVATION}

    async def _complete(self, request: dict[str, Any]) -> dict[str, Any] | None:
        ids = self._script.next_turn(request["prompt"])
        if ids is None:
            return None
        await asyncio.sleep(len(ids) * self._step_seconds)
        return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [0.0] * len(ids)}}]}

    async def _chat(self, request: dict[str, Any]) -> dict[str, Any]:
        return COMPLETION | {"model": request["model"]}

    async def _tell_served(self, request: dict[str, Any]) -> dict[str, Any]:
        del request
        return {"calls": self._served}


async def _read_message(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """First line and body of a request or reply."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    start, *fields = head.splitlines()
    length = next(int(f.split(":", 1)[1]) for f in fields if f.lower().startswith("content-length:"))
    return start, await reader.readexactly(length)


async def _serve() -> None:
    server = await asyncio.start_server(ExpertServer().converse, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # with all connections that are still held


class ServerProcess:
    """The server, from the end of the benchmark; ends with the block.

    Attributes:
      port: on 127.0.0.1.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.expert_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._client = ExpertClient(self.port)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        self._process.communicate()

    def replay(self, latencies: Mapping[str, float]) -> None:
        """Makes the experts take these seconds by name of the call."""
        self._client.post("/replay", {"latencies": latencies})

    def served(self) -> list[str]:
        """Calls since `replay`."""
        return self._client.post("/served", {})["calls"]


# ---- clients -------------------------------------------------------------------------------------------------


class ExpertClient:
    """One kept connection; blocks."""

    def __init__(self, port: int):
        self._connection = http.client.HTTPConnection("127.0.0.1", port)

    def post(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
        return json.loads(self._connection.getresponse().read())

    def ask(self, call: str) -> str:
        """What the expert says."""
        return self.post("/expert", {"call": call})["text"]

    def close(self) -> None:
        self._connection.close()


class AsyncExpertClient:
    """Kept connections, as many as there are requests at a time; of one event loop."""

    def __init__(self, port: int):
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def connect(self, count: int) -> None:
        """Opens connections ahead of the requests."""
        self._idle += [await asyncio.open_connection("127.0.0.1", self._port) for _ in range(count)]

    async def ask(self, call: str) -> str:
        """What the expert says."""
        if not self._idle:
            await self.connect(1)
        reader, writer = self._idle.pop()
        body = json.dumps({"call": call}).encode()
        writer.write(f"POST /expert HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        _, reply = await _read_message(reader)
        self._idle.append((reader, writer))
        return json.loads(reply)["text"]

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


if __name__ == "__main__":
    # Timers of epoll, the default, are rounded up to whole milliseconds; a step of the model is shorter.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve())
