"""Which network a member uses."""

import os
import socket
import struct
from contextlib import suppress

from demoreset_api.errors import TryAgain, UserError
from demoreset_api.names import ENV_ADDRESS

LOCALHOST = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def listen(address: str) -> socket.socket:
    """Listen on this address of the machine, at a free port.

    Raises:
        UserError: it is not one of the machine's, nor a name of one.
        TryAgain: the name service does not answer.
    """
    try:
        (family, *_, place), *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
        return socket.create_server(place, family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        unknown = isinstance(error, socket.gaierror)
        reason = error.strerror if unknown else os.strerror(error.errno or 0)
        why = f"--address (or {ENV_ADDRESS}) {address}: cannot listen there ({reason})"
        if unknown and error.errno == socket.EAI_AGAIN:
            raise TryAgain(why) from error
        raise UserError(
            f"{why}; it is the address of this machine, or pod, by which the others reach it"
        ) from error


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
