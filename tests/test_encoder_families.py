"""The features of models of transformers are those that their authors mean.

Each row of FAMILIES is a tiny random model, saved with its tokenizer or image processor, and its
authors' features by transformers' own calls. To add a family, add a row."""
import math
import re
import shutil

import pytest
import torch
from PIL import Image

import show_flickr8k_results
from src.encoder_sources import load_encoder
from src.encoders import Encoders
from src.gallery import photos_of_split
from src.runs import HISTORY, load_json
from src.utils.errors import UsageError
from src.utils.photo_store import open_photo
from tests.conftest import arguments, edit_json, main, word_tokenizer

pytestmark = pytest.mark.extra
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
VISION = SMALL | dict(image_size=32, patch_size=8)
TEXTS = ["a red circle", "a circle above a blue square"]
WORDS = 40  # ids, of which the tokenizer uses the first ones


def text_config(**more):
    return SMALL | dict(vocab_size=WORDS, max_position_embeddings=24, pad_token_id=0,
                        bos_token_id=1, eos_token_id=2) | more


def seq2seq_config(**more):
    return dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=WORDS,
                max_position_embeddings=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=2) | more


def embedding(output):
    """get_..._features of transformers 4 returns a tensor, that of 5 an output with a pooler."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def mean_over_tokens(model, tokens):
    mask = tokens["attention_mask"][:, :, None].float()
    return (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)


def projected(model, inputs):
    if isinstance(inputs, dict):
        return embedding(model.get_text_features(**inputs))
    return embedding(model.get_image_features(pixel_values=inputs))


def first_of_projected(model, inputs):
    return projected(model, inputs)[:, 0]


def pooled(model, images):
    return model(pixel_values=images).pooler_output.flatten(1)


def class_token(model, images):
    return model(pixel_values=images).last_hidden_state[:, 0]


def mean_over_places(model, images):
    hidden = model(pixel_values=images).last_hidden_state
    return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)


def siglip(model, inputs):
    if isinstance(inputs, dict):  # padded to its length, without a mask
        assert inputs.keys() == {"input_ids"} and inputs["input_ids"].shape[1] == 20
    return projected(model, inputs)


CONVNET = dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32)
WINDOWS = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
               window_size=4)
BLOCKS = dict(image_size=32, in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 3],
              strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 6], depthwise_padding=[],
              hidden_dim=12, num_hidden_layers=2, width_coefficient=1.0, depth_coefficient=1.0)

# For each: the class of the model, its configuration, and the features of texts and of photos.
FAMILIES = {
    "CLIP": ("CLIPModel", lambda t: t.CLIPConfig(
        text_config=text_config(projection_dim=12), vision_config=VISION | dict(projection_dim=12),
        projection_dim=12), projected, projected),
    "SigLIP": ("SiglipModel", lambda t: t.SiglipConfig(
        text_config=text_config(projection_size=16), vision_config=VISION), siglip, siglip),
    "SigLIP 2 with any shape of photo": ("Siglip2Model", lambda t: t.Siglip2Config(
        text_config=text_config(projection_size=16), vision_config=SMALL | dict(
            patch_size=8, num_patches=16)), siglip, None),
    "ALIGN": ("AlignModel", lambda t: t.AlignConfig(
        text_config=text_config(), projection_dim=24, vision_config=BLOCKS), projected, projected),
    "FLAVA": ("FlavaModel", lambda t: t.FlavaConfig(
        text_config=SMALL | dict(vocab_size=WORDS), image_config=VISION, multimodal_config=SMALL,
        hidden_size=16, projection_dim=12, image_codebook_config=dict(
            num_groups=1, hidden_size=8, num_blocks_per_group=1, vocab_size=16)),
        first_of_projected, first_of_projected),
    "AltCLIP": ("AltCLIPModel", lambda t: t.AltCLIPConfig(
        text_config=text_config(project_dim=16, max_position_embeddings=30), vision_config=VISION,
        projection_dim=12), projected, projected),
    "BLIP": ("BlipForImageTextRetrieval", lambda t: t.BlipConfig(
        text_config=text_config(encoder_hidden_size=16), vision_config=VISION,
        image_text_hidden_size=12),
        lambda model, tokens: model.text_proj(model.text_encoder(**tokens).last_hidden_state[:, 0]),
        lambda model, images: model.vision_proj(
            model.vision_model(pixel_values=images).last_hidden_state[:, 0])),
    "BLIP without its heads": ("BlipModel", lambda t: t.BlipConfig(
        text_config=text_config(encoder_hidden_size=16), vision_config=VISION, projection_dim=12),
        projected, projected),
    "CLIP's text half": ("CLIPTextModelWithProjection", lambda t: t.CLIPTextConfig(
        **text_config(projection_dim=12)), lambda model, tokens: model(**tokens).text_embeds, None),
    "CLIP's image half": ("CLIPVisionModelWithProjection", lambda t: t.CLIPVisionConfig(
        **VISION, projection_dim=12), None,
        lambda model, images: model(pixel_values=images).image_embeds),
    "BERT": ("BertModel", lambda t: t.BertConfig(**text_config()), mean_over_tokens, None),
    "DistilBERT": ("DistilBertModel", lambda t: t.DistilBertConfig(
        vocab_size=WORDS, dim=16, hidden_dim=32, n_layers=1, n_heads=2,
        max_position_embeddings=24), mean_over_tokens, None),
    "RoBERTa": ("RobertaModel", lambda t: t.RobertaConfig(**text_config()), mean_over_tokens, None),
    "BART": ("BartModel", lambda t: t.BartConfig(**seq2seq_config()),
             lambda model, tokens: mean_over_tokens(model.get_encoder(), tokens), None),
    "mBART": ("MBartModel", lambda t: t.MBartConfig(**seq2seq_config()),
              lambda model, tokens: mean_over_tokens(model.get_encoder(), tokens), None),
    "T5": ("T5Model", lambda t: t.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0),
        lambda model, tokens: mean_over_tokens(model.get_encoder(), tokens), None),
    "ViT": ("ViTModel", lambda t: t.ViTConfig(**VISION), None, pooled),
    "ViT with a classifier, without a pooler": (
        "ViTForImageClassification", lambda t: t.ViTConfig(**VISION), None,
        lambda model, images: class_token(model.vit, images)),
    "DINOv2": ("Dinov2Model", lambda t: t.Dinov2Config(**VISION), None, pooled),
    "ConvNeXt": ("ConvNextModel", lambda t: t.ConvNextConfig(**CONVNET), None, pooled),
    "ResNet": ("ResNetModel", lambda t: t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"), None, pooled),
    "MobileViT": ("MobileViTModel", lambda t: t.MobileViTConfig(
        image_size=32, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2), None, pooled),
    "Chinese-CLIP": ("ChineseCLIPModel", lambda t: t.ChineseCLIPConfig(
        text_config=text_config(), vision_config=VISION, projection_dim=12), projected, projected),
    "CLIPSeg": ("CLIPSegModel", lambda t: t.CLIPSegConfig(
        text_config=text_config(), vision_config=VISION, projection_dim=12), projected, projected),
    "GroupViT": ("GroupViTModel", lambda t: t.GroupViTConfig(
        text_config=text_config(), projection_dim=12, projection_intermediate_dim=16,
        vision_config=VISION | dict(depths=[1, 1], num_group_tokens=[4, 0],
                                    num_output_groups=[4, 4])), projected, projected),
    "OWL-ViT": ("OwlViTModel", lambda t: t.OwlViTConfig(
        text_config=text_config(), vision_config=VISION, projection_dim=12), projected, projected),
    "MetaCLIP 2": ("MetaClip2Model", lambda t: t.MetaClip2Config(
        text_config=text_config(), vision_config=VISION, projection_dim=12), projected, projected),
    "AIMv2": ("Aimv2Model", lambda t: t.Aimv2Config(
        text_config=text_config(), vision_config=VISION, projection_dim=12), projected, projected),
    "TIPSv2": ("Tipsv2Model", lambda t: t.Tipsv2Config(
        text_config=text_config(), vision_config=dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8)), projected, projected),
    "ViT and BERT": ("VisionTextDualEncoderModel",
        lambda t: t.VisionTextDualEncoderConfig.from_vision_text_configs(
            t.ViTConfig(**VISION), t.BertConfig(**text_config()), projection_dim=12),
        projected, projected),
    "SigLIP's image half": ("SiglipVisionModel", lambda t: t.SiglipVisionConfig(**VISION),
                            None, pooled),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", lambda t: t.Dinov2WithRegistersConfig(
        **VISION), None, pooled),
    "DINOv3": ("DINOv3ViTModel", lambda t: t.DINOv3ViTConfig(**VISION), None, pooled),
    "DINOv3, ConvNeXt": ("DINOv3ConvNextModel", lambda t: t.DINOv3ConvNextConfig(**CONVNET),
                         None, pooled),
    "DeiT": ("DeiTModel", lambda t: t.DeiTConfig(**VISION), None, pooled),
    "BEiT": ("BeitModel", lambda t: t.BeitConfig(**VISION, use_mean_pooling=True), None, pooled),
    "Data2Vec": ("Data2VecVisionModel", lambda t: t.Data2VecVisionConfig(**VISION), None,
                 lambda model, images: model(pixel_values=images).last_hidden_state[:, 1:].mean(1)),
    "Swin": ("SwinModel", lambda t: t.SwinConfig(**WINDOWS), None, pooled),
    "Swin 2": ("Swinv2Model", lambda t: t.Swinv2Config(**WINDOWS), None, pooled),
    "Hiera": ("HieraModel", lambda t: t.HieraConfig(
        embed_dim=8, image_size=[32, 32], depths=[1, 1], num_heads=[1, 2], num_query_pool=1,
        masked_unit_size=[4, 4], masked_unit_attention=[True, False]), None, pooled),
    "ViT-MSN": ("ViTMSNModel", lambda t: t.ViTMSNConfig(**VISION), None, class_token),
    "I-JEPA": ("IJepaModel", lambda t: t.IJepaConfig(**VISION), None, mean_over_places),
    "EfficientNet": ("EfficientNetModel", lambda t: t.EfficientNetConfig(
        **BLOCKS | dict(hidden_dim=1280)), None, pooled),
    "MobileNetV2": ("MobileNetV2Model", lambda t: t.MobileNetV2Config(
        image_size=32, depth_multiplier=0.25), None, pooled),
    "RegNet": ("RegNetModel", lambda t: t.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8), None, pooled),
    "ConvNeXt 2": ("ConvNextV2Model", lambda t: t.ConvNextV2Config(**CONVNET), None, pooled),
    "LeViT": ("LevitModel", lambda t: t.LevitConfig(
        image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
        key_dim=[8, 8, 8]), None, pooled),
    "PVT": ("PvtModel", lambda t: t.PvtConfig(
        image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2]), None, class_token),
    "CvT": ("CvtModel", lambda t: t.CvtConfig(
        embed_dim=[8, 8, 16], num_heads=[1, 1, 2], depth=[1, 2, 3]), None,
        lambda model, images: model(pixel_values=images).cls_token_value[:, 0]),
    "PoolFormer": ("PoolFormerModel", lambda t: t.PoolFormerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]), None, mean_over_places),
    "PVT 2": ("PvtV2Model", lambda t: t.PvtV2Config(
        image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2]), None, mean_over_places),
    "SegFormer": ("SegformerModel", lambda t: t.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2]),
        None, mean_over_places),
    "FocalNet": ("FocalNetModel", lambda t: t.FocalNetConfig(
        image_size=32, embed_dim=8, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
        None, pooled),
    "BiT": ("BitModel", lambda t: t.BitConfig(
        embedding_size=32, hidden_sizes=[128, 256], depths=[1, 1]), None, pooled),
    "MobileViT 2": ("MobileViTV2Model", lambda t: t.MobileViTV2Config(
        image_size=32, width_multiplier=0.25, output_stride=16), None, pooled),
    "CLIP's text half without its projection": (
        "CLIPTextModel", lambda t: t.CLIPTextConfig(**text_config()),
        lambda model, tokens: model(**tokens).pooler_output, None),
    "NomicBERT": ("NomicBertModel", lambda t: t.NomicBertConfig(
        **text_config()), mean_over_tokens, None),
    "MPNet": ("MPNetModel", lambda t: t.MPNetConfig(**text_config()), mean_over_tokens, None),
    "ELECTRA": ("ElectraModel", lambda t: t.ElectraConfig(
        **text_config(embedding_size=16)), mean_over_tokens, None),
    "DeBERTa": ("DebertaV2Model", lambda t: t.DebertaV2Config(
        **text_config(relative_attention=True, pos_att_type="p2c|c2p")), mean_over_tokens, None),
    "ALBERT": ("AlbertModel", lambda t: t.AlbertConfig(
        **text_config(embedding_size=16)), mean_over_tokens, None),
    "ModernBERT": ("ModernBertModel", lambda t: t.ModernBertConfig(
        **text_config()), mean_over_tokens, None),
    "XLM-RoBERTa": ("XLMRobertaModel", lambda t: t.XLMRobertaConfig(
        **text_config()), mean_over_tokens, None),
    "Qwen 3": ("Qwen3Model", lambda t: t.Qwen3Config(
        **text_config(num_key_value_heads=2, head_dim=8)), mean_over_tokens, None),
    "DPR": ("DPRQuestionEncoder", lambda t: t.DPRConfig(**text_config()),
            lambda model, tokens: model(**tokens).pooler_output, None),
}


def save(folder, class_name, make_config, spread=0.2):
    """Save a tiny random model, with a tokenizer and an image processor for any model. spread: the
    standard deviation of its weights."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    word_tokenizer(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    if not hasattr(transformers, class_name):
        pytest.skip(f"this version of transformers has no {class_name}")
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(make_config(transformers)).eval()
    for parameter in model.parameters():  # so that the features of two inputs differ clearly
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(folder)
    return model


def photos():
    return [Image.effect_noise(size, 80).convert("RGB") for size in ((80, 60), (40, 50))]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_that_the_authors_mean(family, tmp_path):
    class_name, make_config, text_features, image_features = FAMILIES[family]
    model = save(tmp_path / "model", class_name, make_config)
    for inner_layers in (False, True):
        if text_features is not None:
            encoder = load_encoder(str(tmp_path / "model"), "text", inner_layers)
            tokens = encoder.prepare(TEXTS)
            expected = text_features(model, tokens)
            check(encoder, tokens, expected, inner_layers)
            check(encoder, encoder.prepare(TEXTS[:1]), expected[:1], inner_layers)
            assert not torch.allclose(expected[0], expected[1], atol=1e-3)
        if image_features is not None:
            encoder = load_encoder(str(tmp_path / "model"), "image", inner_layers)
            images = torch.stack([encoder.prepare(photo) for photo in photos()])
            check(encoder, images, image_features(model, images), inner_layers)


def check(encoder, inputs, expected, inner_layers):
    """Compare the features, or those that stand before the features of inner layers."""
    features = encoder(inputs)
    inner = getattr(encoder.module, "layers", None) or getattr(encoder.module, "layer", None)
    assert features.shape == (len(expected), encoder.width)
    assert (encoder.width > expected.shape[1]) == bool(inner)
    assert inner_layers or encoder.width == expected.shape[1]
    assert torch.allclose(features[:, :expected.shape[1]], expected, atol=1e-4)


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if None not in row])
def test_both_encoders_of_a_contrastive_model_are_a_pair(family, tmp_path):
    class_name, make_config, *_ = FAMILIES[family]
    model = save(tmp_path / "model", class_name, make_config)
    encoders = Encoders(*(load_encoder(str(tmp_path / "model"), modality)
                          for modality in ("image", "text")))
    assert encoders.is_contrastive_pair
    (tmp_path / "link").symlink_to(tmp_path / "model")
    again = load_encoder(f"{tmp_path}/./link/", "text")
    assert Encoders(encoders.image, again).is_contrastive_pair
    scale = 1 / model.temperature if hasattr(model, "temperature") else (
        torch.tensor(1 / 0.07) if family == "BLIP" else model.logit_scale.exp())
    assert encoders.image.logit_scale == pytest.approx(math.log(scale.item()), abs=1e-5)


def test_encoders_of_two_models_are_no_pair(tmp_path):
    class_name, make_config, *_ = FAMILIES["CLIP"]
    for name in ("one", "other"):
        model = save(tmp_path / name, class_name, make_config)
    torch.nn.init.normal_(model.text_projection.weight)
    model.save_pretrained(tmp_path / "other")
    image, text = load_encoder(str(tmp_path / "one"), "image"), load_encoder(
        str(tmp_path / "other"), "text")
    assert not Encoders(image, text).is_contrastive_pair


def save_halves(folder, class_name, make_config, halves):
    """Save a model, and its halves of these classes in the folders "image" and "text"."""
    transformers = pytest.importorskip("transformers")
    if "siglip_text_model" not in transformers.CONFIG_MAPPING and class_name == "SiglipModel":
        pytest.skip("this version of transformers cannot load SigLIP's text half by its type")
    save(folder / "whole", class_name, make_config)
    for modality, half in zip(("image", "text"), halves):
        half = getattr(transformers, half).from_pretrained(folder / "whole")
        half.save_pretrained(shutil.copytree(folder / "whole", folder / modality))


@pytest.mark.parametrize("whole, halves, model_type", [
    ("CLIP", ("CLIPVisionModelWithProjection", "CLIPTextModelWithProjection"), "clip"),
    ("SigLIP", ("SiglipVisionModel", "SiglipTextModel"), "siglip")])
@torch.no_grad()
def test_two_halves_of_a_contrastive_model_are_a_pair(whole, halves, model_type, tmp_path):
    class_name, make_config, *_ = FAMILIES[whole]
    save_halves(tmp_path, class_name, make_config, halves)
    image, text = (load_encoder(str(tmp_path / modality), modality)
                   for modality in ("image", "text"))
    pair, two = Encoders(image, text), Encoders(*(
        load_encoder(str(tmp_path / "whole"), modality) for modality in ("image", "text")))
    assert pair.is_contrastive_pair and pair.are_two_halves and image.half_of == model_type
    assert image.logit_scale == math.log(100)
    assert two.is_contrastive_pair and not two.are_two_halves
    # The half has some of the weights of the whole.
    assert Encoders(image, two.text).is_contrastive_pair
    assert Encoders(two.image, text).is_contrastive_pair
    photo, texts = image.prepare(photos()[0])[None], text.prepare(TEXTS)
    assert torch.allclose(image(photo), two.image(photo), atol=1e-5)
    assert torch.allclose(text(texts), two.text(texts), atol=1e-5)


def test_halves_that_do_not_fit_are_no_pair(tmp_path):
    save(tmp_path / "clip", *FAMILIES["CLIP"][:2])
    save(tmp_path / "image", *FAMILIES["CLIP's image half"][:2])
    save(tmp_path / "narrow", "CLIPTextModelWithProjection", lambda t: t.CLIPTextConfig(
        **text_config(projection_dim=8)))
    image = load_encoder(str(tmp_path / "image"), "image")
    narrow, whole = (load_encoder(str(tmp_path / name), "text") for name in ("narrow", "clip"))
    assert not Encoders(image, narrow).is_contrastive_pair
    assert not Encoders(image, whole).is_contrastive_pair  # of another model
    assert not Encoders(text=narrow).is_contrastive_pair


def test_siglip_reads_texts_in_lower_case(tmp_path):
    class_name, make_config, *_ = FAMILIES["SigLIP"]
    save(tmp_path / "model", class_name, make_config)
    encoder = load_encoder(str(tmp_path / "model"), "text")
    tokens = [encoder.prepare([text])["input_ids"] for text in ("A Red CIRCLE", "a red circle")]
    assert torch.equal(*tokens)


def test_a_model_that_is_random_is_refused(tmp_path):
    save(tmp_path / "mae", "ViTMAEModel", lambda t: t.ViTMAEConfig(**VISION | {"patch_size": 4}))
    with pytest.raises(UsageError, match="draws random numbers"):
        load_encoder(str(tmp_path / "mae"), "image")


def test_a_text_model_whose_features_depend_on_the_batch_is_refused(tmp_path):
    save(tmp_path / "gpt2", "GPT2Model", lambda t: t.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=24, vocab_size=WORDS))
    assert load_encoder(str(tmp_path / "gpt2"), "text").width == 16
    edit_json(tmp_path / "gpt2" / "tokenizer_config.json", padding_side="left")
    with pytest.raises(UsageError, match="of a text alone than beside a longer one"):
        load_encoder(str(tmp_path / "gpt2"), "text")


def test_a_text_model_without_a_mask_is_refused(tmp_path):
    """FNet mixes the padding with the tokens."""
    save(tmp_path / "fnet", "FNetModel", lambda t: t.FNetConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, intermediate_size=32,
        max_position_embeddings=24, tpu_short_seq_length=24))
    with pytest.raises(UsageError, match="of a text alone than beside a longer one"):
        load_encoder(str(tmp_path / "fnet"), "text")


def test_a_model_saved_in_bfloat16_computes_in_float32(tmp_path):
    features = []
    model = save(tmp_path / "swin", "Swinv2Model", lambda t: t.Swinv2Config(**WINDOWS))
    for dtype in (torch.bfloat16, torch.float32):  # with the same weights
        model.to(torch.bfloat16).to(dtype).save_pretrained(tmp_path / "swin")
        encoder = load_encoder(str(tmp_path / "swin"), "image")
        features.append(encoder(encoder.example_input()))
    assert torch.equal(*features)


@pytest.mark.parametrize("class_name, modality, make_config, message", [
    ("Blip2ForImageTextRetrieval", "image", lambda t: tiny_blip_2(t), "by many vectors"),
    ("Blip2ForImageTextRetrieval", "text", lambda t: tiny_blip_2(t), "by many vectors"),
    ("Blip2Model", "text", lambda t: tiny_blip_2(t), "by many vectors"),
    ("XCLIPModel", "image", lambda t: t.XCLIPConfig(
        text_config=text_config(), projection_dim=12, vision_config=VISION | dict(
            mit_hidden_size=16, mit_intermediate_size=16, mit_num_attention_heads=2)), "videos"),
    ("DetrModel", "image", lambda t: t.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                       layer_type="basic", out_features=["stage2"]),
        num_queries=3, **{name: size for name, size in seq2seq_config().items()
                          if name != "vocab_size"}), "finds objects"),
    ("VideoMAEModel", "image", lambda t: t.VideoMAEConfig(**VISION), "videos"),
    ("Siglip2Model", "image", lambda t: t.Siglip2Config(
        text_config=text_config(projection_size=16), vision_config=SMALL | dict(
            patch_size=8, num_patches=16)), "fixed resolution")])
def test_a_model_without_one_vector_of_a_photo_is_refused(
        class_name, modality, make_config, message, tmp_path):
    save(tmp_path / "model", class_name, make_config)
    with pytest.raises(UsageError, match=message) as caught:
        load_encoder(str(tmp_path / "model"), modality)
    assert "\n" not in str(caught.value)


def tiny_blip_2(t):
    return t.Blip2Config(
        vision_config=VISION, num_query_tokens=4, image_text_hidden_size=12,
        qformer_config=text_config(encoder_hidden_size=16, use_qformer_text_input=True),
        text_config=dict(model_type="opt", ffn_dim=32, word_embed_proj_dim=16) | text_config())


def test_a_dual_encoder_whose_poolers_are_random_is_refused(tmp_path):
    """transformers makes one of a text model without a pooler, and gives it a random one."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs
    save(tmp_path / "dual", "VisionTextDualEncoderModel", lambda t: config(
        t.ViTConfig(**VISION), t.BertConfig(**text_config()), projection_dim=12))
    file = tmp_path / "dual" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items()
               if "text_model.pooler" not in name}, file, metadata={"format": "pt"})
    for modality in ("image", "text"):
        with pytest.raises(UsageError, match="lacks weights, such as text_model.pooler"):
            load_encoder(str(tmp_path / "dual"), modality)


@torch.no_grad()
def scores_of_its_own(model, folder, photos, texts):
    """Return what the model itself says of photos and texts, (photos, texts), in one pass."""
    import transformers
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = processor(images=[open_photo(photo, 64) for photo in photos], return_tensors="pt")
    padding, options = True, {}
    if "Siglip" in type(model).__name__:  # as its authors say
        padding, texts = "max_length", [text.lower() for text in texts]
    if "Blip" in type(model).__name__:
        options["use_itm_head"] = False
    tokens = tokenizer(texts, padding=padding, return_token_type_ids=False, return_tensors="pt")
    if padding == "max_length":
        del tokens["attention_mask"]
    output = model(**images, **tokens, **options)
    return output.itm_score if "Blip" in type(model).__name__ else output.logits_per_image


def hits_at_k(scores, owners, k):
    """Return the percentages of photos and of texts whose rank is at most k, one by one."""
    photos = texts = 0
    for photo, row in enumerate(scores):
        best = row[owners == photo].max()
        photos += int((row[owners != photo] >= best).sum()) < k
    for text, column in enumerate(scores.T):
        mine = column[owners[text]]
        others = torch.arange(len(column)) != owners[text]
        texts += int((column[others] >= mine).sum()) < k
    return 100 * photos / len(scores), 100 * texts / scores.shape[1]


@pytest.mark.parametrize("family", ["CLIP", "ALIGN", "BLIP", "SigLIP", "SigLIP 2"])
def test_a_pair_ranks_as_the_model_itself_does_in_epoch_0_and_without_a_run(
        family, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    model = save(folder, *FAMILIES[family.removesuffix(" 2")][:2], spread=0.5)
    words = "tiny two three there are picture of orange purple cross crosses at bottom top and"
    capitals = " A There" if family == "SigLIP 2" else ""  # of a fixed resolution
    word_tokenizer(folder, words + capitals)
    names = ["--image_encoder", folder, "--text_encoder", folder, "--no-amp"]
    assert main(*arguments(shapes, tmp_path / "run", *names, epochs=1)) == 0
    zero_shot = load_json(tmp_path / "run" / HISTORY)[0]
    photos, captions = photos_of_split(shapes, "val")
    owners = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    scores = scores_of_its_own(model, folder, photos, sum(captions, []))
    assert zero_shot["epoch"] == 0 and len(set(scores.argmax(0).tolist())) > 1
    for k in (1, 5, 10):
        assert [zero_shot["val"][f"{way}_r{k}"] for way in ("i2t", "t2i")] == pytest.approx(
            hits_at_k(scores, owners, k))
    capsys.readouterr()
    given = ["--image_encoder", str(folder), "--evaluate", str(shapes), "--split", "val"]
    assert show_flickr8k_results.main(given) == 0
    printed = re.findall(r"R@(\d+) \(%\) +([\d.]+)", capsys.readouterr().out)
    expected = [*(f"{hits_at_k(scores, owners, k)[0]:.2f}" for k in (1, 5, 10)),
                *(f"{hits_at_k(scores, owners, k)[1]:.2f}" for k in (1, 5, 10))]
    assert [value for _, value in printed[:6]] == expected
