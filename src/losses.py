"""The contrastive loss between photos and captions."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from src.model import PHOTO_WEIGHT

COMBINED_WEIGHT = 0.2  # of the loss of a photo combined with one of its captions


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


def scaled_similarities(queries, texts, logit_scale):
    """Unit vectors (Q, D) and (M, D) -> their cosines, divided by the temperature, (Q, M)."""
    with torch.autocast(queries.device.type, enabled=False):
        return logit_scale.float().exp() * (queries @ texts.T)


def info_nce_loss(image_latents, text_latents, logit_scale, photo_ids=None, text_ids=None,
                  texts_of_photo=None):
    """The contrastive loss of a batch of pairs, a scalar in float32, over all processes.

    It is the symmetric InfoNCE loss (van den Oord et al. 2018; CLIP, Radford et al. 2021). Where a
    photo comes with several captions, COMBINED_WEIGHT times a second term is added: the photo
    combined with each of its captions must find the photo's other captions (supervised contrastive
    learning, Khosla et al. 2020).

    image_latents, text_latents: (B, D), which need not be normalised, pair i in row i. logit_scale:
    scalar, the logarithm of the inverse temperature. photo_ids: (B,) integers. Pairs with the same
    id hold the same photo and are not negatives of each other; by default all photos differ.

    text_ids: (B,) positive integers, equal for equal captions, and texts_of_photo: (B, C), those of
    all captions that the photo of each pair has, padded with 0. They are given where photos share
    captions; then a caption is not a negative of any photo that has it."""
    image_latents = gather(F.normalize(image_latents.float(), dim=-1))
    text_latents = gather(F.normalize(text_latents.float(), dim=-1))
    targets = torch.arange(len(text_latents), device=text_latents.device)
    # Which captions (columns) are right for the photo of each row, and which are equal to its own.
    if text_ids is None:
        photo_ids = targets if photo_ids is None else gather(photo_ids)
        is_correct = photo_ids[:, None] == photo_ids
        is_equal = targets[:, None] == targets
    else:
        text_ids, texts_of_photo = gather(text_ids), gather(texts_of_photo)
        is_correct = torch.zeros(len(targets), len(targets), dtype=torch.bool,
                                 device=targets.device)
        for column in texts_of_photo.T:
            is_correct |= column[:, None] == text_ids
        is_equal = text_ids[:, None] == text_ids
    # The query of the second term: a photo combined with a caption.
    combined = F.normalize(torch.lerp(text_latents, image_latents, PHOTO_WEIGHT), dim=-1)
    logits_per_image = scaled_similarities(image_latents, text_latents, logit_scale)
    logits_of_combined = scaled_similarities(combined, text_latents, logit_scale)

    no_negatives = is_correct.clone().fill_diagonal_(False)
    logits_per_image = logits_per_image.masked_fill(no_negatives, float("-inf"))
    loss = (F.cross_entropy(logits_per_image, targets)
            + F.cross_entropy(logits_per_image.T, targets)) / 2

    # The caption that is part of the query is neither a positive nor a negative.
    log_probabilities = logits_of_combined.masked_fill(is_equal, float("-inf")).log_softmax(1)
    is_positive = is_correct & ~is_equal
    positives = log_probabilities.masked_fill(~is_positive, 0)
    mean_of_positives = positives.sum(1) / is_positive.sum(1).clamp(min=1)
    return loss - COMBINED_WEIGHT * mean_of_positives.mean()  # minus: it is a log-likelihood
