import collections

import pytest

from src.experiments import scale
from src.settings import make_settings
from src.utils import photo_store
from src.utils.splits import open_split
from src.utils.tokenizers import CharTokenizer


def test_a_large_dataset_has_its_store_and_flickr8ks_words(tmp_path, monkeypatch):
    sizes = {"train": 9, "val": 10, "test": 10}
    scale.write_large(tmp_path, 12_000, sizes)
    monkeypatch.setattr(photo_store, "open_photo", None)  # no photo file is opened
    train, val = (open_split(tmp_path, split, sizes[split], CharTokenizer())
                  for split in ("train", "val"))
    assert len(train) == 12_000 and train.photos.shape == (2400, 3, 9, 9) and len(val) == 5000
    assert len({digest.tobytes() for digest in train.digests}) == 2400
    noise = train.photos[:20].float()
    assert noise[:10].std() > 60 and not noise[10:].any()
    words = [caption.split() for caption in train.captions]
    assert 11 < sum(map(len, words)) / 12_000 < 12.5
    counts = collections.Counter(word for caption in words for word in caption)
    assert 4000 < len(counts) <= 8424
    # The most common word is as frequent as the most common one of Flickr8k.
    assert 0.1 < counts.most_common(1)[0][1] / counts.total() < 0.13


def test_two_sizes_are_compared(monkeypatch):
    monkeypatch.setattr(scale, "ROUNDS", 1)
    settings = make_settings(model="tiny", tokenizer="char", device="cpu")
    results = scale.compare(settings, (2000, 20_000), steps=1)
    assert list(results) == [2000, 20_000]
    for row in results.values():
        assert 0 < row["order seconds"] < row["start-up seconds"] and row["step seconds"] > 0
    # Names, captions, tokens and everything else that Python holds is far less than 1 kB per pair.
    assert results[20_000]["data bytes"] - results[2000]["data bytes"] < 2e7
    assert "      20,000" in scale.table(results)[2]


def test_wrong_arguments():
    with pytest.raises(SystemExit) as stopped:
        scale.main(["--pairs", "3"])
    assert stopped.value.code == 2
