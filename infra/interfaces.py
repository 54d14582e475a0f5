"""Which network interface reaches the other nodes, where the host's own name does not tell: many distributions map it to the loopback."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
"""The ioctl for an interface's IPv4 address, from Linux's sockios.h."""


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of ``host:port``. An IPv6 address is written in brackets there, and returned without them."""
    host, _, port = endpoint.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def endpoint(host: str, port: int) -> str:
    """The opposite of ``split``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(name: str) -> bool:
    """Whether a name resolves to this node's loopback only. A name that does not resolve counts, too, because libraries then fall back to the loopback."""
    try:
        found = {str(address[4][0]).partition("%")[0] for address in socket.getaddrinfo(name, None)}
    except OSError:
        return True
    return all(ipaddress.ip_address(each).is_loopback for each in found)


def towards(host: str) -> str:
    """Name of the interface through which this node reaches a host (if the host is this node, the interface with its address); '' if that cannot be found out."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                mine = str(probe.getsockname()[0]).partition("%")[0]
            for _, name in socket.if_nameindex():
                if mine in _addresses(name):
                    return name
    return ""


def _addresses(name: str) -> set[str]:
    """Addresses of an interface: its first IPv4 address and all of its IPv6 addresses."""
    found = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        found.add(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))[20:24]))
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        found |= {socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0])) for line in lines if line[-1] == name}
    return found
