"""Proxies that let through so many bytes a second each, both ways together: a store that caps every worker's rate.

They copy what goes by and look at nothing, so they cost little. Run as a program; the first line it prints are its
ports.
"""

import argparse
import asyncio
import time
from contextlib import suppress

CHUNK_BYTES = 1 << 14
BURST_S = 0.1
"""how long a proxy may have saved up"""


class Bucket:
    """Grants bytes at a steady rate."""

    def __init__(self, bytes_per_s: float) -> None:
        """Begin empty."""
        self._rate = bytes_per_s
        self._free_at = time.monotonic()

    async def take(self, num_bytes: int) -> None:
        """Wait until so many bytes may go by."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now - BURST_S) + num_bytes / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bucket: Bucket) -> None:
    """Copy until one side ends."""
    with suppress(ConnectionError):
        while chunk := await reader.read(CHUNK_BYTES):
            await bucket.take(len(chunk))
            writer.write(chunk)
            await writer.drain()
    with suppress(ConnectionError, RuntimeError):
        writer.close()


async def serve(upstream: tuple[str, int], num_proxies: int, bytes_per_s: float) -> None:
    """Run the proxies for ever."""

    async def start() -> asyncio.Server:
        bucket = Bucket(bytes_per_s)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            up_reader, up_writer = await asyncio.open_connection(*upstream, limit=CHUNK_BYTES)
            await asyncio.gather(pump(reader, up_writer, bucket), pump(up_reader, writer, bucket))

        return await asyncio.start_server(connected, "127.0.0.1", 0, limit=CHUNK_BYTES)

    servers = [await start() for _ in range(num_proxies)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream", help="HOST:PORT")
    parser.add_argument("--proxies", type=int, required=True)
    parser.add_argument("--bytes-per-s", type=float, required=True)
    arguments = parser.parse_args()
    host, _, port = arguments.upstream.rpartition(":")
    asyncio.run(serve((host, int(port)), arguments.proxies, arguments.bytes_per_s))


if __name__ == "__main__":
    main()
