"""Who may connect: keys, and the address that is listened on."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

from depthkv_edge.errors import DepthKVError

KEY_VARIABLE = "LLAMA_API_KEY"  # read by the server, and not visible in a list of processes


def check_keys(api_key: str | None, api_key_file: Path | None) -> list[str]:
    """The API keys that are asked for.

    Raises:
        DepthKVError: a key or a file of keys would let everyone in, or no one.
    """
    keys = []
    if api_key is not None:
        keys.append(api_key)
        if not api_key:
            raise DepthKVError("--api-key is empty, which would let everyone in: give a key")
        # the server splits at commas, and a header holds nothing but visible ASCII
        if not all("!" <= character <= "~" and character not in ',"' for character in api_key):
            raise DepthKVError("--api-key must be visible ASCII without blanks, commas and quotes: choose another key")
    if api_key_file is not None:
        found = _read_keys(api_key_file)
        if not found:
            raise DepthKVError(
                f"--api-key-file {api_key_file} holds no key, which would let everyone in: add one"
            )
        keys += found
    return keys


def _read_keys(path: Path) -> list[str]:
    # The server opens it again. From a pipe it would read nothing then, and let everyone in.
    if path.exists() and not path.is_file():
        raise DepthKVError(f"--api-key-file {path} is not a regular file: give one, or the key in {KEY_VARIABLE}")
    # as common/arg.cpp does
    try:
        lines = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DepthKVError(
            f"--api-key-file {path} cannot be read: {why}; give a file with a key on each line"
        ) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    for key in keys:
        if key != key.strip():
            raise DepthKVError(
                f"--api-key-file {path} has a key that begins or ends with a blank or a carriage return, which no "
                "client would send: remove it"
            )
    return keys


def check_host(host: str, port: int, *, protected: bool) -> None:
    """Check an address to listen on.

    Args:
        protected: whether a key is asked for.

    Raises:
        DepthKVError: it is unknown or taken, or open to the network without a key.
    """
    try:
        found = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise DepthKVError(
            f"--host {host} is not an address or a name known here: give 127.0.0.1, or 0.0.0.0"
        ) from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    local = all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for _, address in addresses)
    if not local and not protected:
        raise DepthKVError(
            f"--host {host} lets other machines in, and without an API key everyone on them could use the model and "
            "read along: give --api-key or --api-key-file, or listen on 127.0.0.1"
        )
    errors = [error for family, address in addresses if (error := _try_port(family, address)) is not None]
    if any(error.errno == errno.EADDRINUSE for error in errors):
        raise DepthKVError(f"port {port} of {host} is taken: give another with --port")
    if len(errors) == len(addresses):  # a name may have an address of a family that the machine does not use
        raise DepthKVError(
            f"cannot listen on port {port} of {host}: {errors[0].strerror}; give another --host or --port"
        )


def _try_port(family: int, address: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":  # as the server does: a port is free while its old connections fade
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    return None
