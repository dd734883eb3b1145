"""Contrastive losses between photos and captions."""
import torch
import torch.nn.functional as F


def info_nce_loss(image_latents, text_latents, logit_scale, photo_ids=None):
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021) over B pairs, a scalar.

    image_latents, text_latents: (B, D), of any length, pair i in row i. logit_scale: scalar, the logarithm of the
    inverse temperature. photo_ids: (B,) integers; two pairs with the same id hold the same photo, so their captions
    are taken out of each other's negatives (and so are the photos). Computed in float32 whatever the autocast.
    """
    image_latents = F.normalize(image_latents.float(), dim=-1)
    text_latents = F.normalize(text_latents.float(), dim=-1)
    with torch.autocast(image_latents.device.type, enabled=False):
        logits = logit_scale.float().exp() * image_latents @ text_latents.T
    labels = torch.arange(len(logits), device=logits.device)
    if photo_ids is not None:
        same_photo = photo_ids[:, None] == photo_ids[None, :]
        same_photo.fill_diagonal_(False)
        logits = logits.masked_fill(same_photo, float("-inf"))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
