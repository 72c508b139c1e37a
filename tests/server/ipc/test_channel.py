"""Channels: order, a reader that is slow, and both ways in which the other end disappears."""

import asyncio
import socket
import threading

from jet_export.server.ipc.channel import Channel, Frames


def test_frames_from_another_thread_arrive_in_order_though_the_reader_is_slow() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        b.setblocking(False)
        sender, loop = Channel(a, lambda *_: None, lambda: None), asyncio.get_running_loop()
        sender.open()
        frames = [(i % 8, bytes([i]) * 50_000) for i in range(100)]  # more than sockets hold

        def send() -> None:
            for frame in frames:
                sender.send(*frame)

        thread = threading.Thread(target=send)
        thread.start()
        await asyncio.to_thread(thread.join)  # it does not wait for the reader
        reader = Frames()
        got: list[tuple[int, bytes]] = []
        got += reader.feed(b.recv(100_000))  # now there is room again, but not at the front of the queue
        sender.send(9, b"last")
        while not got or got[-1][0] != 9:
            got += reader.feed(await asyncio.wait_for(loop.sock_recv(b, 100_000), 30))
        assert got == [*frames, (9, b"last")]
        sender.close()
        b.close()

    asyncio.run(main())


def test_the_other_end_goes_away() -> None:
    async def main() -> None:
        for end in ("closes", "sends nonsense"):
            a, b = socket.socketpair()
            lost = asyncio.Event()
            channel = Channel(a, lambda *_: None, lost.set)
            channel.open()
            if end == "closes":
                b.close()
            else:
                b.sendall(b"\xff" * 100)
            await asyncio.wait_for(lost.wait(), 10)
            assert channel.closed
            channel.send(1, b"to nobody")
            b.close()

    asyncio.run(main())
