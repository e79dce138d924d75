"""Which network a member uses."""

import os
import socket
import struct
from contextlib import suppress

LOCALHOST = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def bind_gloo_to(address: str) -> None:
    """Let gloo and NCCL use the interface that has this address, unless they were told otherwise.

    By default gloo takes what the machine's own name resolves to, which may reach nobody.
    """
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The interface with this IPv4 address; None where there is none, or it cannot be found out."""
    with suppress(ImportError, OSError):
        import fcntl

        wanted = socket.inet_aton(socket.gethostbyname(address))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            for _, name in socket.if_nameindex():
                with suppress(OSError):
                    asked = struct.pack("256s", name[:15].encode())
                    if fcntl.ioctl(link.fileno(), _SIOCGIFADDR, asked)[20:24] == wanted:
                        return name
    return None
