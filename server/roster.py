"""Who may take part, and who is there: the federation's folder held against what Flower's Control API says."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.edge import host_and_port
from common.errors import RunFailed

Keys = dict[int, ec.EllipticCurvePublicKey]  # by client number


@dataclass(frozen=True)
class Node:
    """A client as Flower knows it. ``status``: registered, online, offline or unregistered."""

    id: int
    status: str


class Roster:
    """A connection to the Control API of a SuperLink on this machine."""

    def __init__(self, host: str, port: int, ca_file: Path) -> None:
        self._client = ControlHttpClient.from_server_address(
            host_and_port(host, port),
            insecure=False,
            root_certificates=ca_file.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        self._online: set[int] = set()
        self._asked: set[int] = set()  # to be registered or unregistered, and not seen so yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def answers(self) -> bool:
        """Whether the SuperLink is up."""
        try:
            self._client.ListNodes(ListNodesRequest())
        except httpx.HTTPError:
            return False
        return True

    def nodes(self) -> dict[bytes, Node]:
        """All that were ever registered, by public key (PEM)."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {bytes(node.public_key): Node(node.node_id, node.status) for node in found}

    def homes(self, keys: Keys) -> dict[int, int]:
        """The node of each client with one of these keys, by client number.

        Raises:
            RunFailed: the SuperLink does not answer.
        """
        try:
            nodes = self.nodes()
        except httpx.HTTPError as error:
            raise _silent(error) from None
        found = {number: nodes.get(public_key_to_bytes(key)) for number, key in keys.items()}
        return {number: node.id for number, node in found.items() if node is not None}

    def update(self, keys: Keys, revoked: Keys) -> list[str]:
        """Register new keys, unregister revoked ones; returns a line for each thing that has happened since the last.

        Raises:
            RunFailed: the SuperLink does not answer, or refuses.
        """
        try:
            return self._update(keys, revoked)
        except httpx.HTTPError as error:
            raise _silent(error) from None

    def _update(self, keys: Keys, revoked: Keys) -> list[str]:
        nodes = self.nodes()
        found = {number: nodes.get(public_key_to_bytes(key)) for number, key in (keys | revoked).items()}
        there = {number: node for number, node in found.items() if node is not None}
        living = {number for number, node in there.items() if node.status != NodeStatus.UNREGISTERED}
        for number in sorted(keys.keys() - there.keys()):
            self._asked.add(number)
            key = public_key_to_bytes(keys[number])
            self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=f"client-{number}"))
        for number in sorted(revoked.keys() & living):
            self._asked.add(number)
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=there[number].id))
        # the answer to a request may be lost though it was carried out: what has happened is what the list says
        registered = self._asked & keys.keys() & there.keys()
        refused = (self._asked & revoked.keys()) - living
        online = {number for number in keys.keys() & living if there[number].status == NodeStatus.ONLINE}
        lines = [f"client {number} registered" for number in sorted(registered)]
        lines += [f"client {number} revoked: its key is refused from now on" for number in sorted(refused)]
        lines += [f"client {number} joined" for number in sorted(online - self._online)]
        lines += [f"client {number} left" for number in sorted(self._online - online - revoked.keys())]
        self._asked -= registered | refused
        self._online = online
        return lines


def _silent(error: httpx.HTTPError) -> RunFailed:
    return RunFailed(f"the SuperLink does not answer on its Control API ({type(error).__name__})")
