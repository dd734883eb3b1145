"""The contrastive loss between photos and captions, and its backward pass in chunks and over several processes."""
import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F

MARGIN = 0.2  # between a positive and the nearest negative, in cosine: VSE++'s


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


def caption_contrast_loss(text_latents, logit_scale, photo_ids):
    """Supervised contrastive loss (Khosla et al. 2020) among captions, a scalar: those of one photo are each other's
    positives, all others negatives (the within-modality constraint of Wang et al. 2016, "Learning deep structure-
    preserving image-text embeddings", as a softmax). It teaches the text encoder which words say the same thing.

    text_latents: (B, D) of unit length. logit_scale, photo_ids: as for `info_nce_loss`. A caption alone with its photo
    adds nothing.
    """
    itself = torch.eye(len(text_latents), dtype=torch.bool, device=text_latents.device)
    positive = (photo_ids[:, None] == photo_ids) & ~itself
    with torch.autocast(text_latents.device.type, enabled=False):
        logits = (logit_scale.float().exp() * (text_latents @ text_latents.T)).masked_fill(itself, float("-inf"))
    surprise = -logits.log_softmax(1).masked_fill(~positive, 0.0)
    return (surprise.sum(1) / positive.sum(1).clamp(min=1)).mean()


def info_nce_loss(image_latents, text_latents, logit_scale, photo_ids=None, label_smoothing=0.0, hard_negatives=0.0,
                  caption_contrast=0.0, queue=None):
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021) over B pairs, a scalar.

    image_latents, text_latents: (B, D), of any length, pair i in row i. logit_scale: scalar, the logarithm of the
    inverse temperature. photo_ids: (B,) integers; two pairs with the same id hold the same photo, so their captions
    are taken out of each other's negatives (and so are the photos): each is a positive of its own. Computed in float32
    whatever the autocast, over the pairs of all processes.

    label_smoothing: share of the target spread over a row's positive and negatives. hard_negatives: weight of an added
    triplet loss on each row's nearest negative alone (VSE++, Faghri et al. 2018). caption_contrast: weight of an added
    `caption_contrast_loss`. queue: a LatentQueue, whose latents are negatives too, and which this batch then joins.
    """
    image_latents = gather(F.normalize(image_latents.float(), dim=-1))
    text_latents = gather(F.normalize(text_latents.float(), dim=-1))
    photo_ids = torch.arange(len(text_latents), device=text_latents.device) if photo_ids is None else gather(photo_ids)
    all_images, all_texts, all_ids = image_latents, text_latents, photo_ids
    if queue is not None:
        all_images, all_texts = torch.cat([image_latents, queue.images]), torch.cat([text_latents, queue.texts])
        all_ids = torch.cat([photo_ids, queue.photo_ids])
        queue.push(image_latents, text_latents, photo_ids)
    negative = (photo_ids[:, None] != all_ids[None, :]) & (all_ids != LatentQueue.EMPTY)
    allowed = negative.clone().fill_diagonal_(True)
    labels, loss = torch.arange(len(negative), device=negative.device), 0.0
    for rows, columns in ((image_latents, all_texts), (text_latents, all_images)):
        with torch.autocast(rows.device.type, enabled=False):
            cosine = rows @ columns.T
            logits = (logit_scale.float().exp() * cosine).masked_fill(~allowed, float("-inf"))
        loss = loss + F.cross_entropy(logits, labels) / 2 * (1 - label_smoothing)
        if label_smoothing:  # cross_entropy's own would spread it over what is left out as well
            surprise = -logits.log_softmax(1).masked_fill(~allowed, 0.0)
            loss = loss + (surprise.sum(1) / allowed.sum(1)).mean() / 2 * label_smoothing
        if hard_negatives:
            nearest = cosine.masked_fill(~negative, -1.0).amax(1)
            loss = loss + F.relu(MARGIN + nearest - cosine.diagonal()).mean() / 2 * hard_negatives
    if caption_contrast:
        loss = loss + caption_contrast * caption_contrast_loss(text_latents, logit_scale, photo_ids)
    return loss


class LatentQueue(torch.nn.Module):
    """The latents of the last `size` pairs, of unit length: negatives from earlier batches, as good as those of this
    one while the weights change slowly (cross-batch memory, Wang et al. 2020). Empty places are never negatives."""

    EMPTY = -1

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, dim))
        self.register_buffer("texts", torch.zeros(size, dim))
        self.register_buffer("photo_ids", torch.full((size,), self.EMPTY))

    @torch.no_grad()
    def push(self, images, texts, photo_ids):
        """(B, D), (B, D), (B,) go in, the B oldest go out."""
        for name, new in (("images", images), ("texts", texts), ("photo_ids", photo_ids)):
            setattr(self, name, torch.cat([new.detach(), getattr(self, name)])[:len(self.photo_ids)])


def contrastive_backward(encode, batch, memory_loss_weight, chunk_size=None, scale=lambda loss: loss,
                         contrast=info_nce_loss):
    """One training step's forward and backward pass -> the contrastive loss, a detached scalar.

    encode(images, text) -> image latents (P, D), text latents (B, D), logit_scale, memory losses (2,) of photos and of
    captions; a module, perhaps wrapped in DistributedDataParallel. batch: a dict of "images" (P, ...), "text" (B, L),
    "photo_ids" (P,), "photo_of_pair" (B,), rising. scale: GradScaler.scale. contrast: `info_nce_loss`, with its options.

    With a chunk_size, photos and captions are encoded that many pairs at a time, and memory is that of one chunk
    (GradCache, Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"): first
    without a graph; then the loss of the whole batch gives the gradient of each latent; then chunk by chunk, each latent
    passing on its own. Loss and gradients are those of the whole batch at once, except that batch norm sees a chunk.
    """
    images, text, photo_of_pair = batch["images"], batch["text"], batch["photo_of_pair"]
    photo_ids = batch["photo_ids"][photo_of_pair]
    if chunk_size is None or chunk_size >= len(text):
        image_latents, text_latents, logit_scale, memory_losses = encode(images, text)
        loss = contrast(image_latents[photo_of_pair], text_latents, logit_scale, photo_ids)
        scale(loss + memory_loss_weight * memory_losses.sum()).backward()
        return loss.detach()

    # A chunk is so many photos with all of their captions, which stand side by side.
    num_photos = max(1, chunk_size * len(images) // len(text))
    starts = range(0, len(images), num_photos)
    edges = torch.searchsorted(photo_of_pair, torch.tensor([*starts[1:]], device=text.device)).tolist()  # a sync
    captions = [slice(a, b) for a, b in zip([0, *edges], [*edges, len(text)])]
    chunks = [(slice(start, start + num_photos), rows) for start, rows in zip(starts, captions)]
    seed = torch.initial_seed()  # what chance there is in encoding (stochastic depth) must fall alike both times

    def encode_chunk(i):
        torch.manual_seed(seed + i)
        return encode(*(part[rows] for part, rows in zip((images, text), chunks[i])))

    with torch.no_grad():
        encoded = [encode_chunk(i) for i in range(len(chunks))]
    image_latents, text_latents = (torch.cat([chunk[i] for chunk in encoded]).requires_grad_() for i in range(2))
    logit_scale = encoded[0][2].detach().requires_grad_()
    loss = contrast(image_latents[photo_of_pair], text_latents, logit_scale, photo_ids)
    scale(loss).backward()
    for i, (photos, rows) in enumerate(chunks):
        # Gradients of all chunks but the last stay with this process; the last one's backward exchanges the sum.
        last = rows.stop == len(text)
        with contextlib.nullcontext() if last or not hasattr(encode, "no_sync") else encode.no_sync():
            chunk_images, chunk_text, chunk_scale, memory_losses = encode_chunk(i)
            surrogate = (chunk_images.float() * image_latents.grad[photos]).sum() + (
                chunk_text.float() * text_latents.grad[rows]).sum() + chunk_scale * logit_scale.grad * last
            share = torch.stack([memory_losses[0] * len(chunk_images) / len(images),
                                 memory_losses[1] * len(chunk_text) / len(text)])
            (surrogate + scale(memory_loss_weight * share.sum())).backward()
    return loss.detach()
