"""Several servers behind one address."""

import contextlib
import socket
import threading

import pytest
from live import FINGERPRINT, live

from reinforce.rm_client import RewardClient
from reinforce.rm_connection import RewardError


class Balancer:
    """A TCP balancer: each connection goes to the next address that takes it."""

    def __init__(self, *ports):
        self.ports, self.turn = list(ports), 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.socket.accept()[0]
                for _ in self.ports:
                    self.turn += 1
                    with contextlib.suppress(OSError):
                        replica = socket.create_connection(("127.0.0.1", self.ports[self.turn % len(self.ports)]))
                        threading.Thread(target=self._pump, args=(client, replica), daemon=True).start()
                        threading.Thread(target=self._pump, args=(replica, client), daemon=True).start()
                        break
                else:
                    client.close()

    @staticmethod
    def _pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_two_replicas_behind_a_balancer_serve_one_run_and_the_loss_of_one_is_survived():
    with live() as first, contextlib.ExitStack() as stack:
        second = stack.enter_context(live())
        balancer = Balancer(first.server_port, second.server_port)
        clients = [RewardClient("127.0.0.1", balancer.port, deadline=20) for _ in range(4)]
        for client in clients:
            assert client.rewards(query=["a", "bb"]) == [1.0, 2.0]
        assert first.replies[200] > 0 and second.replies[200] > 0
        stack.close()
        for client in clients:
            assert client.rewards(query=["ccc"]) == [3.0]
        balancer.socket.close()


def test_a_replica_with_another_model_is_never_believed():
    with live() as first, live(fingerprint="d" * 64) as second:
        balancer = Balancer(second.server_port, first.server_port)
        client = RewardClient("127.0.0.1", balancer.port, deadline=5)
        assert client.rewards(query=["a"]) == [1.0] and client.fingerprint == FINGERPRINT
        client._connection._close()
        with pytest.raises(RewardError, match="another model"):
            client.rewards(query=["a"])
        assert second.service.batcher.counts.texts == 0
        balancer.socket.close()
