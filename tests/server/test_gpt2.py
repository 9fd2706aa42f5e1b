"""A decoder as a teacher: tiny random GPT-2 through every step that an encoder goes through."""

import json
from contextlib import closing
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
from server.run import save_student
from server.run_folder import RunFolder
from server.teacher import find_teacher
from tests.conftest import FP32, WORDS, make_dataset, make_reviews, make_sentences, make_tokens, stir

PAD, END = "<|pad|>", "<|endoftext|>"


def make_gpt2(folder: Path, labels: int = 0, *, pad: bool = True) -> Path:
    """A tiny random GPT-2, 16 wide, 4 layers, with a byte-level tokenizer.

    ``pad``: with a padding piece; else as GPT-2 is published, with a last piece that ends texts.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Config, GPT2TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    raw = ByteLevelBPETokenizer()
    special = [END, PAD] if pad else []
    raw.train_from_iterator([" ".join(WORDS)] * 5, vocab_size=400, special_tokens=special)
    raw.save(str(folder / "raw.json"))
    tokenizer = GPT2TokenizerFast(tokenizer_file=str(folder / "raw.json"), **({"pad_token": PAD} if pad else {}))
    tokenizer.save_pretrained(folder)
    (folder / "raw.json").unlink()
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=66, n_embd=16, n_layer=4, n_head=2, num_labels=labels or 2,
        bos_token_id=end, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if labels else AutoModel
    kind.from_config(config).save_pretrained(folder)
    return folder


def test_a_decoder_is_found_with_its_layers_and_positions(tmp_path):
    bare, headed = find_teacher(str(make_gpt2(tmp_path / "a"))), find_teacher(str(make_gpt2(tmp_path / "b", 3)))
    assert (bare.head, bare.layers, bare.positions) == (0, 4, 66)
    assert headed.head == 3


def test_without_a_piece_to_pad_with_it_is_refused_in_one_line(tmp_path):
    folder = make_gpt2(tmp_path / "a", pad=False)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    with pytest.raises(InputError, match=r"teacher.model = .*neither pad_token nor eos_token; set pad_token") as it:
        find_teacher(str(folder))
    assert "\n" not in str(it.value)


def test_as_published_a_text_has_the_logits_of_itself_unpadded_in_any_company(tmp_path):
    """It is padded with the piece that ends a text, which may stand in one."""
    folder = make_gpt2(tmp_path, 2, pad=False)
    assert find_teacher(str(folder)).head == 2
    model, tokenizer = load_teacher(folder), load_tokenizer(folder)
    stir(model)
    texts = [*make_sentences(20, longest=20), f"good{END} film", f"{END} bad meal {END}{END} was", f"kind story{END}"]
    tokens, rows = make_tokens(folder, texts), np.arange(23)
    assert tokens.pad == tokenizer.eos_token_id == len(tokenizer) - 1
    found = predict(model, tokens, rows, FP32)
    with torch.no_grad():
        alone = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].numpy() for text in texts]
        model.config.pad_token_id = None  # as it is published, alone, it reads the last piece whatever that is
        before = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].numpy() for text in texts]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    np.testing.assert_allclose(found[:-1], before[:-1], atol=1e-5)
    assert np.abs(found[-1] - before[-1]).max() > 1e-3  # only a text that ends in it is read without


@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_as_published_it_leaves_a_student_that_plain_transformers_pads_alike(tmp_path, ratio, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "cache"))
    folder = make_gpt2(tmp_path / "gpt2", pad=False)
    config, _ = make_dataset(
        make_reviews(tmp_path / "a.csv", 150), folder, tmp_path / "cache", student__layers=2, client__precision="fp32",
        student__target_ratio=ratio,
    )  # fmt: skip
    federation = prepare(config, Silent())
    pupil, tokens = federation.pupil, federation.pupil.data.train.tokens
    with closing(RunFolder(tmp_path / "run", config)) as run:
        save_student(federation, run)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    rows = np.arange(20)
    inputs = tokenizer(pupil.data.train.texts[0].take(rows), padding=True, return_tensors="pt")
    assert not inputs["attention_mask"].all()
    assert student.config.pad_token_id == tokenizer.pad_token_id == tokens.pad == pupil.shape.pieces - 1
    with torch.no_grad():
        logits = student(**inputs).logits.numpy()
    np.testing.assert_allclose(logits, predict(pupil.model, tokens, rows, FP32), atol=1e-5)


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
