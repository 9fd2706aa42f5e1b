"""A decoder as a teacher: tiny random GPT-2 through every step that an encoder goes through."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.dataset import load_tokenizer
from common.errors import InputError
from common.inference import predict
from common.models import load_teacher
from common.progress import Silent
from common.slim import widen
from server.lesson import prepare_lesson
from server.preparation import prepare
from server.teacher import find_teacher
from tests.conftest import FP32, WORDS, make_dataset, make_reviews, make_sentences, make_tokens

PAD = "<|pad|>"


def make_gpt2(folder: Path, labels: int = 0, *, pad: bool = True) -> Path:
    """A tiny random GPT-2, 16 wide, 4 layers, with a byte-level tokenizer; ``pad``: with a padding piece."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Config, GPT2TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator([" ".join(WORDS)] * 5, vocab_size=400, special_tokens=["<|endoftext|>", PAD])
    raw.save(str(folder / "raw.json"))
    tokenizer = GPT2TokenizerFast(tokenizer_file=str(folder / "raw.json"), **({"pad_token": PAD} if pad else {}))
    tokenizer.save_pretrained(folder)
    (folder / "raw.json").unlink()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=66, n_embd=16, n_layer=4, n_head=2, num_labels=labels or 2,
        bos_token_id=0, eos_token_id=0, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if labels else AutoModel
    kind.from_config(config).save_pretrained(folder)
    return folder


def test_a_decoder_is_found_with_its_layers_and_positions(tmp_path):
    bare, headed = find_teacher(str(make_gpt2(tmp_path / "a"))), find_teacher(str(make_gpt2(tmp_path / "b", 3)))
    assert (bare.head, bare.layers, bare.positions) == (0, 4, 66)
    assert headed.head == 3


def test_without_a_padding_piece_it_is_refused_in_one_line(tmp_path):
    folder = make_gpt2(tmp_path / "a", pad=False)
    with pytest.raises(InputError, match=r"teacher.model = .*its tokenizer has no padding piece; set pad_token") as it:
        find_teacher(str(folder))
    assert "\n" not in str(it.value)
    with pytest.raises(InputError, match="no padding piece"):
        load_tokenizer(folder)


@pytest.mark.parametrize("pad", [None, 7])
def test_a_configuration_with_another_padding_piece_than_the_tokenizer_is_refused(tmp_path, pad):
    # the head reads the last piece that is not the configuration's padding
    path = make_gpt2(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": pad}))
    with pytest.raises(InputError, match=rf"config.json has pad_token_id = {pad}, its tokenizer 1; give both"):
        find_teacher(str(tmp_path))


def test_the_head_reads_the_last_real_piece_in_any_company(tmp_path):
    folder = make_gpt2(tmp_path, 2)
    model, texts = load_teacher(folder), make_sentences(40, longest=20)
    tokens = make_tokens(folder, texts)
    rows = np.arange(40)
    found = predict(model, tokens, rows, FP32)
    assert np.array_equal(predict(model, tokens, rows[7:9], FP32), found[7:9])
    tokenizer = load_tokenizer(folder)
    for row in (0, 13, 39):
        with torch.no_grad():
            alone = model(torch.tensor([tokenizer(texts[row])["input_ids"]])).logits[0].numpy()
        np.testing.assert_allclose(found[row], alone, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_it_is_fine_tuned_and_a_student_cut_and_warmed_up(tmp_path, ratio, monkeypatch):
    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "cache"))
    folder = make_gpt2(tmp_path / "gpt2")
    config, _ = make_dataset(
        make_reviews(tmp_path / "a.csv", 150), folder, tmp_path / "cache", teacher__lr=0.01, teacher__token_budget=256,
        student__layers=2, student__target_ratio=ratio, student__warm_epochs=1, distill__relation_weight=0.1,
        distill__hidden_weight=0.1, client__precision="fp32",
    )  # fmt: skip
    lesson = prepare_lesson(config, find_teacher(str(folder)), Silent())
    assert lesson.teacher.fine_tuned_on > 0
    federation = prepare(config, Silent())
    pupil = federation.pupil
    assert (pupil.taught is not None) == (ratio > 0)  # a trimmed vocabulary cuts text in other pieces
    tokens = pupil.data.train.tokens
    rows = np.arange(20)
    plain = widen(pupil.model, pupil.shape)
    np.testing.assert_allclose(predict(plain, tokens, rows, FP32), predict(pupil.model, tokens, rows, FP32), atol=1e-5)
    assert plain.config.pad_token_id == tokens.pad
    # what the configuration calls dropout differs between families
    assert all(module.p == 0 for module in pupil.model.modules() if isinstance(module, torch.nn.Dropout))


def test_first_pieces_that_have_read_nothing_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "cache"))
    folder = make_gpt2(tmp_path / "gpt2")
    config, _ = make_dataset(
        make_reviews(tmp_path / "a.csv", 150), folder, tmp_path / "cache", student__layers=2, distill__cls_weight=1.0,
        client__precision="fp32",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"distill.cls-weight = 1.0: this teacher reads from left to right"):
        prepare(config, Silent())


def test_an_empty_text_has_an_answer_alone_and_beside_others(tmp_path):
    """A decoder's tokenizer finds no piece at all in it."""
    folder = make_gpt2(tmp_path / "a", labels=2)
    tokens, teacher = make_tokens(folder, ["", "", "good film"]), load_teacher(folder)
    for rows in ([0, 1], [0, 2]):
        assert np.isfinite(predict(teacher, tokens, np.array(rows), FP32)).all()
