"""The contrastive loss between photos and captions, and its backward pass, at once or in chunks, in
one process or several."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from src.model import PHOTO_WEIGHT

COMBINED_WEIGHT = 0.2  # of the loss of a photo together with one of its captions


def gather(rows):
    """(B, ...) of this process -> (B x processes, ...) of all, by rank; the same B everywhere.

    Gradients reach a process's own rows only, times the number of processes, of which
    DistributedDataParallel then takes the mean."""
    if not dist.is_initialized():
        return rows
    world = dist.get_world_size()
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.detach().contiguous())
    own = rows.view_as(rows)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * world)
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def info_nce_loss(image_latents, text_latents, logit_scale, photo_ids=None):
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021), a scalar, in float32
    over the pairs of all processes; and, where a photo comes with several captions, COMBINED_WEIGHT
    of the contrast (supervised; Khosla et al. 2020) in which it, together with each of them, must
    find the others.

    image_latents, text_latents: (B, D), of any length, pair i in row i. logit_scale: scalar, the
    logarithm of the inverse temperature. photo_ids: (B,) integers; pairs with the same id hold the
    same photo and are not each other's negatives."""
    image_latents = gather(F.normalize(image_latents.float(), dim=-1))
    text_latents = gather(F.normalize(text_latents.float(), dim=-1))
    rows = torch.arange(len(text_latents), device=text_latents.device)
    photo_ids = rows if photo_ids is None else gather(photo_ids)
    same_photo = (photo_ids[:, None] == photo_ids).fill_diagonal_(False)
    with torch.autocast(image_latents.device.type, enabled=False):
        together = F.normalize(torch.lerp(text_latents, image_latents, PHOTO_WEIGHT), dim=-1)
        logits_per_image, logits_together = (logit_scale.float().exp() * (latents @ text_latents.T)
                                             for latents in (image_latents, together))
    loss = sum(F.cross_entropy(logits.masked_fill(same_photo, float("-inf")), rows) / 2
               for logits in (logits_per_image, logits_per_image.T))
    log_shares = logits_together.fill_diagonal_(float("-inf")).log_softmax(1)
    of_others = log_shares.masked_fill(~same_photo, 0).sum(1) / same_photo.sum(1).clamp(min=1)
    return loss - COMBINED_WEIGHT * of_others.mean()


