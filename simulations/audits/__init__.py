"""What leaks from a federation: the attacks that `fedistill audit` runs, one module each."""

from simulations.audits.attack import Attack
from simulations.audits.client_canaries import ClientCanaries
from simulations.audits.example_canaries import ExampleCanaries
from simulations.audits.fedmia import FedMia
from simulations.audits.inversion import Inversion
from simulations.audits.lira import Lira
from simulations.audits.loss_threshold import LossThreshold
from simulations.audits.mechanism_canaries import MechanismCanaries
from simulations.audits.poisoning import Poisoning
from simulations.audits.rmia import Rmia
from simulations.audits.teacher_membership import TeacherMembership
from simulations.audits.utility import Utility
from simulations.audits.votes import Votes

ATTACKS: dict[str, type[Attack]] = {
    Utility.name: Utility,
    TeacherMembership.name: TeacherMembership,
    LossThreshold.name: LossThreshold,
    Lira.name: Lira,
    Rmia.name: Rmia,
    FedMia.name: FedMia,
    Votes.name: Votes,
    Inversion.name: Inversion,
    MechanismCanaries.name: MechanismCanaries,
    ExampleCanaries.name: ExampleCanaries,
    ClientCanaries.name: ClientCanaries,
    Poisoning.name: Poisoning,
}
