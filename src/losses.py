"""The contrastive loss between photos and captions."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from src.model import PHOTO_WEIGHT

COMBINED_WEIGHT = 0.2  # of the loss of a photo combined with one of its captions
EXCLUDED = -1e9  # the logit of what is no candidate; -inf would give NaN if nothing is left


def gather(rows):
    """Rows (B, ...) of this process -> those of all processes, in the order of their ranks. B must
    be the same everywhere.

    Only a process's own rows receive a gradient. It is multiplied by the number of processes, as
    DistributedDataParallel averages the gradients of all processes afterwards."""
    if not dist.is_initialized():
        return rows
    world = dist.get_world_size()
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.detach().contiguous())
    local = rows.view_as(rows)
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient * world)
    parts[dist.get_rank()] = local
    return torch.cat(parts)


def find_correct_captions(photo_ids, photo_of_pair, text_ids, texts_of_photo):
    """Return which captions (columns) are right for the photo of each row, (P, B), and which are
    equal to the caption of each row, (B, B). The arguments are those of `info_nce_loss`."""
    if text_ids is None:
        captions = torch.arange(len(photo_of_pair), device=photo_of_pair.device)
        return photo_ids[:, None] == photo_ids[photo_of_pair], captions[:, None] == captions
    is_correct = torch.zeros(len(photo_ids), len(text_ids), dtype=torch.bool,
                             device=text_ids.device)
    for column in texts_of_photo.T:
        is_correct |= column[:, None] == text_ids
    return is_correct, text_ids[:, None] == text_ids


def info_nce_loss(image_latents, text_latents, logit_scale, photo_ids=None, text_ids=None,
                  texts_of_photo=None, photo_of_pair=None):
    """The contrastive loss of a batch of pairs, a scalar in float32, over all processes.

    It is the symmetric InfoNCE loss (van den Oord et al. 2018; CLIP, Radford et al. 2021). Where a
    photo comes with several captions, COMBINED_WEIGHT times a second term is added: the photo
    combined with each of its captions must find the photo's other captions (supervised contrastive
    learning, Khosla et al. 2020).

    image_latents: (P, D) and text_latents: (B, D), which need not be normalised. photo_of_pair:
    (B,) the row of each caption's photo, by default 0 to B - 1. logit_scale: scalar, the logarithm
    of the inverse temperature. photo_ids: (P,) integers. Rows with the same id hold the same photo,
    whose captions are not its negatives; by default all photos differ.

    text_ids: (B,) positive integers, equal for equal captions, and texts_of_photo: (P, C), those of
    all captions that each photo has, padded with 0. They are given where photos share captions;
    then a caption is not a negative of any photo that has it."""
    images = F.normalize(image_latents.float(), dim=-1)
    texts = F.normalize(text_latents.float(), dim=-1)
    if photo_of_pair is None:
        photo_of_pair = torch.arange(len(texts), device=texts.device)
    if dist.is_initialized():
        # The processes have equally many pairs, but not always equally many photos.
        images, texts = gather(images[photo_of_pair]), gather(texts)
        photo_ids = None if photo_ids is None else gather(photo_ids[photo_of_pair])
        if text_ids is not None:
            text_ids, texts_of_photo = gather(text_ids), gather(texts_of_photo[photo_of_pair])
        photo_of_pair = torch.arange(len(texts), device=texts.device)
    photos = torch.arange(len(images), device=images.device)
    photo_ids = photos if photo_ids is None else photo_ids
    is_correct, is_equal = find_correct_captions(photo_ids, photo_of_pair, text_ids, texts_of_photo)
    # The query of the second term: a photo combined with a caption.
    combined = F.normalize(torch.lerp(texts, images[photo_of_pair], PHOTO_WEIGHT), dim=-1)
    with torch.autocast(images.device.type, enabled=False):
        scale = logit_scale.float().exp()
        logits = (scale * images) @ texts.T  # (P, B)
        logits_of_combined = (scale * combined) @ texts.T  # (B, B)

    # A pair's own logit competes with those of the other captions for its photo, and of the other
    # photos for its caption. There a photo counts once for each of its pairs.
    own_logits = logits.gather(0, photo_of_pair[None])[0]
    negatives = logits.masked_fill(is_correct, EXCLUDED)
    pairs_of_photo = (photos[:, None] == photo_of_pair).sum(1, keepdim=True)
    other_captions = negatives.logsumexp(1)[photo_of_pair]
    other_photos = (negatives + pairs_of_photo.log()).logsumexp(0)
    # softplus(b - a) is log(exp(a) + exp(b)) - a, the cross-entropy of a.
    loss = (F.softplus(other_captions - own_logits) + F.softplus(other_photos - own_logits)) / 2

    # The caption that is part of the query is neither a positive nor a negative. The positives
    # share the target probability; where there are none, the cross-entropy is zero.
    is_positive = is_correct[photo_of_pair] & ~is_equal
    targets = is_positive / is_positive.sum(1, keepdim=True).clamp(min=1)
    logits_of_combined = logits_of_combined.masked_fill(is_equal, EXCLUDED)
    return loss.mean() + COMBINED_WEIGHT * F.cross_entropy(logits_of_combined, targets)
