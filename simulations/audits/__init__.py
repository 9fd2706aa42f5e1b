"""What leaks from a federation: the attacks that `fedistill audit` runs, one module each."""

from simulations.audits.attack import Attack
from simulations.audits.poisoning import Poisoning

ATTACKS: dict[str, type[Attack]] = {
    Poisoning.name: Poisoning,
}
