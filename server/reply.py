"""What can be said of a node's reply before its content is looked at."""

from flwr.app import Message


def reason_of(reply: Message) -> str:
    """A node's error in a few words: Flower wraps what the ClientApp raised in two texts of its own."""
    # what is not printable could play with the terminal that shows it
    words = " ".join("".join(one if one.isprintable() else " " for one in reply.error.reason or "").split())
    if "ActorDied" in words or "ActorUnavailable" in words or "WorkerCrashed" in words:
        return "its worker process died"
    return words.rsplit(":<'", 1)[-1].rsplit("Message: ", 1)[-1].removesuffix("'>").strip()[:120] or "no reason given"
