from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cggr_ray.data import store
from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.problems import problems
from cggr_ray.data.tokenizer import END_OF_TEXT, SHIPPED, SHIPPED_VOCABULARY, load_tokenizer, train_bpe

TEXTS = [f"{p.question}\n{p.solution}" for p in problems(3, 200)]


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerFast:
    return load_tokenizer(SHIPPED)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def arbitrary(seed: int) -> str:
    rng = random.Random(seed)
    pools = [(32, 127), (0, 0x24F), (0x370, 0x7FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0x10FFFF)]
    letters = [chr(rng.randint(*rng.choice(pools))) for _ in range(rng.randrange(1, 80))]
    return "".join(c for c in letters if not 0xD800 <= ord(c) <= 0xDFFF)


@pytest.mark.parametrize("seed", range(40))
def test_any_text_comes_back_as_it_was(shipped: PreTrainedTokenizerFast, seed: int) -> None:
    text = arbitrary(seed)
    assert shipped.decode(encode(shipped, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", ["", " ", "  a  b ", "\n\n\t x\r\n", "a ,b . c !", "e\u0301 vs \u00e9", TEXTS[0]])
def test_spaces_and_accents_survive(shipped: PreTrainedTokenizerFast, text: str) -> None:
    assert shipped.decode(encode(shipped, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("which", ["shipped", "trained"])
def test_every_digit_is_a_token_of_its_own(shipped: PreTrainedTokenizerFast, which: str, tmp_path: Path) -> None:
    if which == "trained":
        train_bpe(["77 777 1234567890 12 12.50%"] * 50, 300, tmp_path / "t.json")
        shipped = load_tokenizer(tmp_path / "t.json")
    for text in ("1234567890", "x=12.50%", " 7 77 777", "3/4+100", "a1b22"):
        pieces = [shipped.decode([i]) for i in encode(shipped, text)]
        assert "".join(pieces) == text
        assert [p.strip() for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]
        assert all(len(p) == 1 for p in pieces if any(c.isdigit() for c in p))


def test_the_shipped_one_has_the_size_it_claims(shipped: PreTrainedTokenizerFast) -> None:
    assert len(shipped) == SHIPPED_VOCABULARY
    assert shipped.decode([shipped.eos_token_id]) == END_OF_TEXT
    assert sum(len(encode(shipped, t)) for t in TEXTS) < 0.5 * sum(len(t) for t in TEXTS)


def test_training_is_deterministic_and_covers_all_bytes(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        train_bpe(iter(TEXTS), 400, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a.json")
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.decode(encode(tokenizer, "日本 \U0001f967")) == "日本 \U0001f967"


def test_a_hugging_face_folder_is_read(tmp_path: Path, shipped: PreTrainedTokenizerFast) -> None:
    shipped.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.eos_token_id == shipped.eos_token_id
    assert [encode(again, t) for t in TEXTS[:20]] == [encode(shipped, t) for t in TEXTS[:20]]


@pytest.mark.parametrize("kind", ["TokenizersBackend", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2"])
def test_beside_a_model_of_any_family_it_reads_as_it_did(
    tmp_path: Path, shipped: PreTrainedTokenizerFast, family: str, kind: str
) -> None:
    """By either name of the class, which transformers 5 has renamed."""
    shipped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    again, texts = load_tokenizer(tmp_path), [*TEXTS[:20], "two  spaces,\n\n  e\u0301"]
    assert [encode(again, t) for t in texts] == [encode(shipped, t) for t in texts]


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_texts_are_encoded_whole_and_alone_whatever_the_file_asks_for(
    tmp_path: Path, shipped: PreTrainedTokenizerFast, setting: str
) -> None:
    core = Tokenizer.from_str(shipped.backend_tokenizer.to_str())
    if setting == "truncation":
        core.enable_truncation(4)
    else:
        core.enable_padding()
    core.save(str(tmp_path / "tokenizer.json"))
    texts = ["a text of a few words", "b"]
    expected = [shipped(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert store.encode(load_tokenizer(tmp_path / "tokenizer.json"), texts) == expected


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, shipped: PreTrainedTokenizerFast) -> None:
    shipped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if "eos" not in k}))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no end-of-text token; accepted"):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        load_tokenizer(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", SHIPPED.read_text()[:500], "tokenizer.json: not JSON"),
        ("tokenizer.json", "[]", "tokenizer.json: a list; accepted: one object"),
        ("tokenizer.json", '{"a": 1}', "tokenizer.json: no 'model'; accepted: an object with model"),
        ("tokenizer_config.json", '{"eos_token": ', "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: a list; accepted: one object"),
    ],
)
def test_files_that_are_none_of_a_tokenizer_are_named_before_anything_begins(
    tmp_path: Path, shipped: PreTrainedTokenizerFast, name: str, content: str, said: str
) -> None:
    shipped.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    for where in (tmp_path, tmp_path / name)[: 1 + (name == "tokenizer.json")]:
        with pytest.raises(ValueError, match=said):
            DataSpec(tokenizer=str(where)).check()


def test_a_folder_without_a_tokenizer_is_named_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^tokenizer '.*' cannot be read: .*; accepted: a name on the Hugging Face hub"
    ):
        DataSpec(tokenizer=str(tmp_path)).check()


@pytest.mark.parametrize("tokenizer", ["shipped", "train"])
def test_a_word_is_no_folder(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / tokenizer).mkdir()
    DataSpec(tokenizer=tokenizer).check()
