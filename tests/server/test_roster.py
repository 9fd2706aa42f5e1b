"""The folder held against what the SuperLink lists, when an answer is lost on its way; the rest runs for real."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo

from common.errors import RunFailed
from server.edge_folder import EdgeFolder, init
from server.roster import Keys, Roster


class Link:
    """A SuperLink's Control API, which does what it is asked; the answers of `deaf` requests do not come back."""

    def __init__(self) -> None:
        self.listed: list[NodeInfo] = []
        self.deaf = 0

    def ListNodes(self, request: ListNodesRequest) -> ListNodesResponse:
        return ListNodesResponse(nodes_info=self.listed)

    def RegisterNode(self, request: RegisterNodeRequest) -> None:
        self.listed.append(NodeInfo(node_id=7, public_key=request.public_key, status="registered"))
        self._answer()

    def UnregisterNode(self, request: UnregisterNodeRequest) -> None:
        next(node for node in self.listed if node.node_id == request.node_id).status = "unregistered"
        self._answer()

    def _answer(self) -> None:
        if self.deaf:
            self.deaf -= 1
            raise httpx.ReadTimeout("no answer")


@pytest.fixture
def folder(tmp_path: Path) -> EdgeFolder:
    return init(tmp_path / "fed", "127.0.0.1", 1, 9092)


def watch(link: Link, folder: EdgeFolder) -> Callable[[Keys, Keys], list[str]]:
    roster = Roster("127.0.0.1", 9093, folder.ca_file)
    roster._client = link  # type: ignore[assignment]
    return roster.update


def test_what_a_lost_answer_was_to_is_said_once_when_it_is_seen(folder):
    link, keys = Link(), folder.admitted()
    update = watch(link, folder)
    link.deaf = 1
    with pytest.raises(RunFailed, match="does not answer on its Control API"):
        update(keys, {})
    assert update(keys, {}) == ["client 0 registered"]
    assert update(keys, {}) == []
    link.listed[0].status = "online"
    assert update(keys, {}) == ["client 0 joined"]

    link.deaf = 1
    with pytest.raises(RunFailed):
        update({}, keys)
    assert update({}, keys) == ["client 0 revoked: its key is refused from now on"]
    assert update({}, keys) == []


def test_who_is_listed_already_is_not_news(folder):
    link, keys = Link(), folder.admitted()
    update = watch(link, folder)
    assert [*update(keys, {}), *update(keys, {})] == ["client 0 registered"]
    assert watch(link, folder)(keys, {}) == []  # a server that comes back
    assert len(link.listed) == 1
