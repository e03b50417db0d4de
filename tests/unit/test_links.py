"""What workers send is received so that it can be kept."""

from __future__ import annotations

import zmq

from gpuctld import messages
from gpuctld.links import READ_BYTES, Links


def test_a_small_frame_does_not_keep_what_it_was_read_with(tmp_path):
    with zmq.Context() as context, context.socket(zmq.DEALER) as worker:
        worker.linger = 0
        worker.bind(f"ipc://{tmp_path}/worker.sock")
        links = Links(context, {0: f"ipc://{tmp_path}/worker.sock"})
        links.open(0)
        small, large = b"s" * READ_BYTES, b"l" * (READ_BYTES + 1)
        worker.send_multipart(messages.encode(messages.Done(task="t", result={}), [small, large]))
        [connection] = links.sockets()
        assert connection.poll(5_000)
        [(message, blobs)] = links.receive(0)
        links.close_all()
    assert message.task == "t"
    assert blobs[0] == small, "a copy of its own"
    assert blobs[1].bytes == large, "still where it was received"
