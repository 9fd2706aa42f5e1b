"""What leaks from a federation: the attacks that `fedistill audit` runs, one module each."""

from simulations.audits.attack import Attack
from simulations.audits.inversion import Inversion
from simulations.audits.lira import Lira
from simulations.audits.loss_threshold import LossThreshold
from simulations.audits.rmia import Rmia
from simulations.audits.utility import Utility

ATTACKS: dict[str, type[Attack]] = {
    Utility.name: Utility,
    LossThreshold.name: LossThreshold,
    Lira.name: Lira,
    Rmia.name: Rmia,
    Inversion.name: Inversion,
}
