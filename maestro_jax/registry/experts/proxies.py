"""The proxy through which a server is reached, as the environment says: HTTP_PROXY, HTTPS_PROXY and NO_PROXY.

They are obeyed without a setting of ours: behind a company's proxy every other program does so, and without it no
hosted model is reached. A proxy leads out of a network. What is inside is reached directly, whatever the variables say:
this machine, private addresses, names without a dot such as a cluster's nodes have.
"""

import ipaddress
import urllib.parse
import urllib.request

from maestro_jax.errors import ConfigError


def proxy_of(url: str, with_key: bool) -> str | None:
    """The proxy's URL, with its password if the variable has one; None for what is reached directly.

    Args:
      with_key: whether requests to the server carry a key.

    Raises:
      ConfigError: the variable names no HTTP proxy (it is not quoted: it may hold a password), or the key would go to
        the proxy, too, which reads what is not encrypted.
    """
    parts = urllib.parse.urlsplit(url)
    host, scheme = parts.hostname or "", parts.scheme
    proxy = urllib.request.getproxies().get(scheme)
    if not proxy or _is_inside(host) or urllib.request.proxy_bypass(host):
        return None
    if with_key and scheme == "http":
        raise ConfigError(
            f"{url} would be reached through the proxy of HTTP_PROXY, which could read the key; "
            f"write the endpoint with https, or add {host} to NO_PROXY"
        )
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urllib.parse.urlsplit(proxy).scheme not in ("http", "https"):
        raise ConfigError(
            f"environment variable {scheme.upper()}_PROXY names no HTTP proxy, through which {host} would be reached; "
            f'write it as "http://HOST:PORT", or add {host} to NO_PROXY'
        )
    return proxy


def _is_inside(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(".localhost")
    return address.is_private
