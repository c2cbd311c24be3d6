"""Starts the servers of a registry's experts, or says which of them answer.

    python -m maestro_jax.experts up --config configs/qwen3_vl_4b.py [--logs experts_logs] [--publish DIR [--host NAME]]
    python -m maestro_jax.experts status --config configs/qwen3_vl_4b.py

`up` starts every expert's `serve` command, once for each of its endpoints, waits until they answer, starts those that
die again, and stops all of them on SIGTERM, SIGINT or SIGHUP (a closed terminal). `status` ends with 0 if all endpoints
answer, else with 1.

With --publish the servers listen to other machines, and once all of them answer, their URLs are written to a directory
that a run reads with --config.registry.endpoints_from=DIR. The file goes when `up` ends.
"""

import asyncio
import dataclasses
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from maestro_jax import command
from maestro_jax.config import complete
from maestro_jax.errors import ConfigError
from maestro_jax.fleet.serving import Server, Supervisor, problem_of, servers_of
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.description.published import heard_by_all, publish, withdraw
from maestro_jax.registry.description.reading import parse_registry

CONFIG = command.config_flag(complete)
LOGS = flags.DEFINE_string("logs", "experts_logs", "Directory for what the servers print.")
PUBLISH = flags.DEFINE_string("publish", "", "Directory to write the servers' URLs to, for runs on other machines.")
HOST = flags.DEFINE_string("host", socket.gethostname(), "What other machines call this one.")

ACTIONS = ("up", "status")
EXIT_NOT_READY = 1


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2 or argv[1] not in ACTIONS:
        raise ConfigError(f"say what to do, one of {', '.join(ACTIONS)}: python -m maestro_jax.experts up --config ...")
    registry = parse_registry(CONFIG.value.get("registry", {}))
    servers = servers_of(registry)
    if argv[1] == "status":
        if not asyncio.run(all_ready(servers)):
            sys.exit(EXIT_NOT_READY)
        return
    started_here = [server for server in servers if server.command]
    if not started_here:
        raise ConfigError("no expert of the registry has a serve command; add one to those whose servers run here")
    if PUBLISH.value:
        up_for_others(registry, Path(PUBLISH.value), HOST.value)
    else:
        asyncio.run(up(started_here, lambda: None))


def up_for_others(registry: RegistryConfig, directory: Path, host: str) -> None:
    """Until they are stopped, the servers are where runs on other machines find them."""
    experts = heard_by_all(registry.experts)
    servers = servers_of(dataclasses.replace(registry, experts=experts))
    try:
        asyncio.run(up(servers, lambda: say(f"published in {publish(directory, host, experts)}")))
    finally:
        withdraw(directory, host)


async def up(servers: Sequence[Server], when_ready: Callable[[], None]) -> None:
    supervisor = Supervisor(servers, Path(LOGS.value), say, when_ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            loop.add_signal_handler(number, supervisor.stop)
    await supervisor.run()
    say("all servers have ended")


async def all_ready(servers: Sequence[Server]) -> bool:
    """Says of every endpoint whether it answers."""
    problems = await asyncio.gather(*map(problem_of, servers))
    for server, problem in zip(servers, problems, strict=True):
        say(f"{server.name}: {problem or 'ready'}")
    return not any(problems)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    command.run(main, required=("config",), arguments=1)
