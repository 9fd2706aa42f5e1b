"""What leaks from a federation: the attacks that `fedistill audit` runs, one module each."""

from simulations.audits.attack import Attack
from simulations.audits.client_canaries import ClientCanaries
from simulations.audits.example_canaries import ExampleCanaries
from simulations.audits.mechanism_canaries import MechanismCanaries
from simulations.audits.poisoning import Poisoning

ATTACKS: dict[str, type[Attack]] = {
    MechanismCanaries.name: MechanismCanaries,
    ExampleCanaries.name: ExampleCanaries,
    ClientCanaries.name: ClientCanaries,
    Poisoning.name: Poisoning,
}
