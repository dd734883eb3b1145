"""The contrastive loss between photos and captions, and its backward pass in chunks and over several processes."""
import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F


def gather(rows):
    """(B, ...) of this process -> (B x processes, ...) of all, in order of rank; the same B everywhere.

    Every process computes the same loss from the same rows, but gradients reach its own rows only. They are multiplied
    by the number of processes, because DistributedDataParallel then takes the mean over processes: what comes out is
    the gradient of the loss over the whole batch.
    """
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
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021) over B pairs, a scalar.

    image_latents, text_latents: (B, D), of any length, pair i in row i. logit_scale: scalar, the logarithm of the
    inverse temperature. photo_ids: (B,) integers; two pairs with the same id hold the same photo, so their captions
    are taken out of each other's negatives (and so are the photos): each is a positive of its own. Computed in float32
    whatever the autocast, over the pairs of all processes.
    """
    image_latents = gather(F.normalize(image_latents.float(), dim=-1))
    text_latents = gather(F.normalize(text_latents.float(), dim=-1))
    with torch.autocast(image_latents.device.type, enabled=False):
        logits = logit_scale.float().exp() * image_latents @ text_latents.T
    labels = torch.arange(len(logits), device=logits.device)
    if photo_ids is not None:
        photo_ids = gather(photo_ids)
        same_photo = photo_ids[:, None] == photo_ids[None, :]
        same_photo.fill_diagonal_(False)
        logits = logits.masked_fill(same_photo, float("-inf"))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contrastive_backward(encode, batch, memory_loss_weight, chunk_size=None, scale=lambda loss: loss):
    """One training step's forward and backward pass -> the contrastive loss, a detached scalar.

    encode(images, text) -> image latents (P, D), text latents (B, D), logit_scale, memory losses (2,) of photos and of
    captions; a module, perhaps wrapped in DistributedDataParallel, without dropout or other chance. batch: a dict of
    "images" (P, ...), "text" (B, L), "photo_ids" (P,), "photo_of_pair" (B,), rising. scale: GradScaler.scale.

    With a chunk_size, photos and captions are encoded that many pairs at a time, and memory is that of one chunk
    (GradCache, Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"): first
    without a graph; then the loss of the whole batch gives the gradient of each latent; then chunk by chunk, each latent
    passing on its own. Loss and gradients are those of the whole batch at once, except that batch norm sees a chunk.
    """
    images, text, photo_of_pair = batch["images"], batch["text"], batch["photo_of_pair"]
    photo_ids = batch["photo_ids"][photo_of_pair]
    if chunk_size is None or chunk_size >= len(text):
        image_latents, text_latents, logit_scale, memory_losses = encode(images, text)
        loss = info_nce_loss(image_latents[photo_of_pair], text_latents, logit_scale, photo_ids)
        scale(loss + memory_loss_weight * memory_losses.sum()).backward()
        return loss.detach()

    # A chunk is so many photos with all of their captions, which stand side by side.
    num_photos = max(1, chunk_size * len(images) // len(text))
    starts = range(0, len(images), num_photos)
    edges = torch.searchsorted(photo_of_pair, torch.tensor([*starts[1:]], device=text.device)).tolist()  # a sync
    captions = [slice(a, b) for a, b in zip([0, *edges], [*edges, len(text)])]
    chunks = [(slice(start, start + num_photos), rows) for start, rows in zip(starts, captions)]
    with torch.no_grad():
        encoded = [encode(images[photos], text[rows]) for photos, rows in chunks]
    image_latents, text_latents = (torch.cat([chunk[i] for chunk in encoded]).requires_grad_() for i in range(2))
    logit_scale = encoded[0][2].detach().requires_grad_()
    loss = info_nce_loss(image_latents[photo_of_pair], text_latents, logit_scale, photo_ids)
    scale(loss).backward()
    for photos, rows in chunks:
        # Gradients of all chunks but the last stay with this process; the last one's backward exchanges the sum.
        last = rows.stop == len(text)
        with contextlib.nullcontext() if last or not hasattr(encode, "no_sync") else encode.no_sync():
            chunk_images, chunk_text, chunk_scale, memory_losses = encode(images[photos], text[rows])
            surrogate = (chunk_images.float() * image_latents.grad[photos]).sum() + (
                chunk_text.float() * text_latents.grad[rows]).sum() + chunk_scale * logit_scale.grad * last
            share = torch.stack([memory_losses[0] * len(chunk_images) / len(images),
                                 memory_losses[1] * len(chunk_text) / len(text)])
            (surrogate + scale(memory_loss_weight * share.sum())).backward()
    return loss.detach()
