"""A student of every family answers in onnxruntime as in torch, with any number of texts of any length."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clients.export import largest_difference, quantise, write_onnx
from clients.exported import Exported, Spec
from common.dataset import load_tokenizer
from common.families import FAMILIES
from common.inference import predict
from common.models import load_teacher
from common.slim import FactoredEmbedding, Shape, cut_student
from common.tokens import tokenize
from tests.conftest import FP32, make_sentences, make_teacher, stir

LENGTH = 32
SPEC = Spec("text", "classes", ("a", "b", "c"), ("text",), LENGTH, 1, 0, "right", 0, token_types=False)
TEXTS = ["a", *make_sentences(60, longest=60)]


class Made:
    """A slim student of a family: 2 of 4 layers, one of two heads, 20 of 32 neurons, factored embedding."""

    def __init__(self, family, folder):
        teacher = load_teacher(make_teacher(folder, family, labels=3))
        shape = Shape.whole(teacher.config, (0, 2))
        narrow = {"heads": ((1,), (0,)), "neurons": (tuple(range(5, 25)),) * 2, "rank": 4 if family == "bert" else 0}
        self.student = cut_student(teacher, replace(shape, **narrow))
        stir(self.student)
        self.tokenizer = load_tokenizer(folder)
        names = self.tokenizer.model_input_names
        self.spec = replace(SPEC, padding=self.tokenizer.pad_token_id, token_types="token_type_ids" in names)
        self.fp32, self.int8 = folder / "fp32.onnx", folder / "int8.onnx"
        write_onnx(self.student, self.spec, self.fp32)
        quantise(self.fp32, self.int8)

    def open(self, path, **given):
        return Exported(
            replace(self.spec, **given), self.tokenizer.backend_tokenizer.to_str(), path.read_bytes(), threads=1
        )

    def torch(self, *columns, **given):
        """What the student says in torch of texts that training has cut into pieces."""
        tokens = tokenize(columns, self.tokenizer, LENGTH, lambda amount: None, **given)
        return predict(self.student, tokens, np.arange(len(tokens)), FP32)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return Made("bert", tmp_path_factory.mktemp("bert"))


def test_logits_are_torchs_alone_and_in_any_batch(made):
    wanted = made.torch(TEXTS)
    assert wanted.std() > 0.3  # so that the bound says something
    assert largest_difference(made.open(made.fp32), (TEXTS,), wanted) < 1e-4


def test_eight_bit_weights_stay_near_and_batches_do_not_matter(made):
    wanted, exported = made.torch(TEXTS), made.open(made.int8)
    alone = exported.logits((TEXTS,), 0)
    assert np.abs(alone - wanted).max() < 0.2 * wanted.std()
    assert np.abs(alone - exported.logits((TEXTS,), 4000)).max() < 1e-4


def test_pairs_and_windows_are_cut_as_in_training(bert):
    short, long = make_sentences(30, longest=8), make_sentences(30, seed=1, longest=60)
    pairs = bert.open(bert.fp32, columns=("one", "two"))
    assert np.abs(pairs.logits((short, long)) - bert.torch(short, long)).max() < 1e-4
    windows = bert.open(bert.fp32, windows=3, stride=5)
    assert max(len(each) for each in windows.windows((long,))) == 3
    wanted = bert.torch(long, windows=3, stride=5)
    assert np.abs(windows.logits((long,)) - wanted).max() < 1e-4
    assert np.abs(bert.open(bert.fp32).logits((long,)) - wanted).max() > 1e-4  # the rest of a text matters


def test_a_text_without_any_piece_is_read(made):
    found = made.open(made.fp32).logits((["", "good"],), 1000)
    assert np.isfinite(found).all()
    assert np.abs(found[1:] - made.torch(["good"])).max() < 1e-4


def test_every_row_of_an_embedding_has_a_scale_of_its_own(bert):
    words = bert.student.get_input_embeddings()
    assert isinstance(words, FactoredEmbedding)
    arrays = {each.name: numpy_helper.to_array(each) for each in onnx.load(bert.int8).graph.initializer}
    (name,) = (name for name in arrays if name.endswith("word_embeddings.weight.bytes"))
    table, scales = arrays[name], arrays[name.replace("bytes", "scales")]
    weight = words.weight.detach().numpy()
    assert table.dtype == np.int8
    assert scales.shape == (len(weight), 1)
    assert np.abs(table).max(axis=1).tolist() == [127 if row.any() else 0 for row in weight]
    assert (np.abs(table * scales - weight) <= 0.5001 * scales).all()


def test_no_weight_stays_wide_and_no_path_of_ours_travels(bert):
    arrays = {each.name: numpy_helper.to_array(each) for each in onnx.load(bert.int8).graph.initializer}
    assert [name for name, array in arrays.items() if array.dtype == np.float32 and array.squeeze().ndim > 1] == []
    for path in (bert.fp32, bert.int8):
        assert b".py" not in path.read_bytes()


def test_a_difference_that_is_no_number_is_not_lost(bert):
    wanted = bert.torch(TEXTS)
    wanted[3, 1] = math.nan
    assert math.isnan(largest_difference(bert.open(bert.fp32), (TEXTS,), wanted))
