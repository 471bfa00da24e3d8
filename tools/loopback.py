"""Switch the loopback on where it is off, as in a network namespace that has just been made (`unshare -rn make test`).

Some tests and one notebook talk to a server on this machine, and two processes that train together talk to each other.
Nothing is done where the loopback is on, or where the system does not allow it.
"""

import contextlib
import fcntl
import socket
import struct
import sys

GET, SET, UP = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP of Linux


def main() -> None:
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(link, GET, request), 16)
        if not flags & UP:
            fcntl.ioctl(link, SET, struct.pack("16sH14x", b"lo", flags | UP))
            print("loopback switched on")


if __name__ == "__main__":
    main()
