"""The hosts of experts: what a base URL is, and where an API key may go.

In: URLs, some of them from others than the config. A key goes to the hosts of the expert's own endpoints, at any port,
and to those that its `key_hosts` names:

    "gpu1.example", "10.0.0.7", "::1"     this host
    "gpu-*.example", "gpu*", "10.0.0.*"   `*` stands for a part of a name between dots, or for a number of an address
    "*.internal"                          all hosts below a domain

Names are compared as they are written, small and large letters alike. "gpu1." and "gpu1" are two names: a resolver may
find two machines.
"""

import ipaddress
import re
import urllib.parse

import yarl

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig

_PATTERN = re.compile(r"(\*\.)?[a-z0-9*_-]+(\.[a-z0-9*_-]+)*")
_ADDRESSES = re.compile(r"[0-9.*]+")


def check_url(url: str, where: str) -> None:
    """Raises ConfigError unless it is the base URL of a server, without a password."""
    if "@" in url:  # not quoted: what stands before it is a password
        raise ConfigError(f"{where}: an endpoint holds a password; name an environment variable in `key` instead")
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and _host(url)
    except ValueError:  # such as a port that is no number
        good = False
    if not good or parts.query or parts.fragment or any(c.isspace() for c in url):
        raise ConfigError(f'{where}: endpoint "{url}" is no base URL; write it as "http://127.0.0.1:8000/v1"')


def check_key_hosts(expert: ExpertConfig) -> None:
    """Raises ConfigError for a pattern that names no hosts, or more than anybody means."""
    where = f'expert "{expert.name}": key_hosts'
    if expert.key_hosts and not expert.key:
        raise ConfigError(f"{where} says where the key may go, and there is no key; remove it")
    for pattern in expert.key_hosts:
        if not _is_pattern(pattern.lower()):
            raise ConfigError(
                f'{where} has "{pattern}"; write hosts such as "gpu1.example", "*.internal", "gpu*" or "10.0.0.*"'
            )


def check_key_goes(expert: ExpertConfig, url: str, where: str) -> None:
    """Raises ConfigError if the expert has a key that must not go to `url`, which somebody else than the config says.

    Args:
      where: who says it.
    """
    if not expert.key:
        return
    host, named = _host(url), [_host(own) for own in expert.endpoints]
    what = f'{where}: expert "{expert.name}" is published at {url}, and its key ({expert.key})'
    if host not in named and not any(_fits(host, pattern.lower()) for pattern in expert.key_hosts):
        raise ConfigError(
            f'{what} goes only to hosts that the config names; add "{host}" to its key_hosts if the key may go there, '
            "else remove the file"
        )
    if url.lower().startswith("http:") and all(own.lower().startswith("https:") for own in expert.endpoints):
        raise ConfigError(f"{what} would go there in clear; publish it with https, as the config has it")


def _host(url: str) -> str:
    """As aiohttp reads it, which connects there: others may read the same URL in another way."""
    return yarl.URL(url).raw_host or ""


def _is_pattern(pattern: str) -> bool:
    if "*" not in pattern:
        return _is_address(pattern) or bool(_PATTERN.fullmatch(pattern))
    labels = pattern.split(".")
    if _ADDRESSES.fullmatch(pattern):  # "10.0.0.*" must not be the beginning of a name such as 10.0.0.example
        return len(labels) == 4 and pattern != "*.*.*.*" and all(part == "*" or part.isdigit() for part in labels)
    return bool(_PATTERN.fullmatch(pattern)) and (len(labels) == 1 or "*" not in labels[-1])


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _fits(host: str, pattern: str) -> bool:
    if "*" not in pattern:
        return host == pattern
    part = "[0-9]{1,3}" if _ADDRESSES.fullmatch(pattern) else "[a-z0-9_-]*"
    below = "" if _ADDRESSES.fullmatch(pattern) or not pattern.startswith("*.") else r"([a-z0-9_-]+\.)+"
    rest = pattern.removeprefix("*.") if below else pattern
    return bool(re.fullmatch(below + re.escape(rest).replace(r"\*", part), host))
