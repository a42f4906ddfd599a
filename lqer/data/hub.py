"""Whether the model hub can be asked at all. Without a network its client would ask six times, for 24 seconds."""

from __future__ import annotations

import functools
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


@functools.cache
def hub_out_of_reach() -> str | None:
    """Why no hub can be asked: its host has no address here. From then on its libraries read their caches alone.

    None where it has one, or where a proxy knows addresses.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if getproxies():
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        return f"no network: {host} has no address here, and nothing is cached"
    return None
