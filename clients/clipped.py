"""A client's update where its presence is hidden: clipped, and of weight 1 whatever the client has."""

from clients.distillation import ClientUpdate
from common.clipping import below, clip


class ClippedUpdate(ClientUpdate):
    """An update that counts as one."""

    @property
    def weight(self) -> int:
        return 1


def clipped(update: ClientUpdate, bound: float, *, adaptive: bool) -> ClippedUpdate:
    """The update with a norm of at most ``bound``; see `common.clipping`.

    Args:
        adaptive: it also says whether it had to be clipped.
    """
    arrays, norm = clip(update.arrays, bound)
    return ClippedUpdate(arrays | (below(norm, bound) if adaptive else {}), update.examples, update.losses)
