"""What leaks from a federation: the attacks that `fedistill audit` runs, one module each."""

from simulations.audits.attack import Attack

ATTACKS: dict[str, type[Attack]] = {}
