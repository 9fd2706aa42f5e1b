"""The example of paper abstracts with the encoder that its preset names by default."""

from common.config import load_config
from common.dataset import prepare_dataset
from common.progress import Silent
from server.teacher import find_teacher
from tests.simulations.test_examples import make
from tests.simulations.test_presets import ROOT


def test_the_preset_reads_every_abstract_to_its_end(tmp_path):
    """What tells its field comes late."""
    path = make(tmp_path / "abstracts.csv")
    preset, folder = ROOT / "simulations" / "presets" / "abstracts.toml", find_teacher("minilm").folder
    told = [
        prepare_dataset(load_config(preset, [f"data.source={path}", *fewer]), folder, tmp_path, Silent()).told_of_ends()
        for fewer in ([], ["data.windows=4"])
    ]
    assert told[0] == ""
    assert told[1].startswith("167 of 200 examples are longer than data.windows = 4 of data.max-length = 64 pieces")
