"""The contrastive loss between photos and captions, and its backward pass, at once or in chunks, in
one process or several."""
import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from src.model import IMAGE, PHOTO_SHARE, TEXT

TOGETHER_WEIGHT = 0.2  # of the loss of a photo together with one of its captions


@contextlib.contextmanager
def full_float32():
    """Float32 matrices are multiplied in float32 inside, where TF32 may be on outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    over the pairs of all processes; and, where a photo comes with several captions, TOGETHER_WEIGHT
    of the contrast (supervised; Khosla et al. 2020) in which it, together with each of them, must
    find the others.

    image_latents, text_latents: (B, D), of any length, pair i in row i. logit_scale: scalar, the
    logarithm of the inverse temperature. photo_ids: (B,) integers; pairs with the same id hold the
    same photo and are not each other's negatives."""
    image_latents = gather(F.normalize(image_latents.float(), dim=-1))
    text_latents = gather(F.normalize(text_latents.float(), dim=-1))
    rows = torch.arange(len(text_latents), device=text_latents.device)
    photo_ids = rows if photo_ids is None else gather(photo_ids)
    left_out = (photo_ids[:, None] == photo_ids).fill_diagonal_(False)
    with torch.autocast(image_latents.device.type, enabled=False):
        together = F.normalize(torch.lerp(text_latents, image_latents, PHOTO_SHARE), dim=-1)
        logits_per_image, logits_together = (logit_scale.float().exp() * (latents @ text_latents.T)
                                             for latents in (image_latents, together))
    loss = sum(F.cross_entropy(logits.masked_fill(left_out, float("-inf")), rows) / 2
               for logits in (logits_per_image, logits_per_image.T))
    log_shares = logits_together.fill_diagonal_(float("-inf")).log_softmax(1)
    of_others = log_shares.masked_fill(~left_out, 0).sum(1) / left_out.sum(1).clamp(min=1)
    return loss - TOGETHER_WEIGHT * of_others.mean()


class PairEncoder(torch.nn.Module):
    """What a step computes of the model in one call: photos (P, ...), text (B, L), and the features
    of that, where the model takes such -> image latents (P, D), text latents (B, D), logit_scale,
    and memory losses (2,) of photos and of captions."""

    def __init__(self, model, amp_dtype):
        super().__init__()
        self.model, self.amp_dtype = model, amp_dtype

    def forward(self, images, text, text_features):
        model, enabled = self.model, self.amp_dtype is not None
        with torch.autocast(images.device.type, dtype=self.amp_dtype, enabled=enabled):
            images = model.encode_images(images)
            text = model.encode_text(text, None, text_features)
            latents = model.fuse(images, IMAGE), model.fuse(text, TEXT)
            memory_losses = torch.stack([model.memory_loss(images), model.memory_loss(text)])
        return *latents, model.logit_scale, memory_losses


def split_in_chunks(batch, chunk_size):
    """-> [(slice of photos, slice of captions)] of a batch, about chunk_size pairs each, 0 for all.
    All processes have as many, as they wait for each other in synchronised batch norm."""
    num_photos, num_pairs = len(batch["images"]), len(batch["text"])
    if not chunk_size or chunk_size >= num_pairs:
        return [(slice(0, num_photos), slice(0, num_pairs))]
    device = batch["text"].device
    fewest = torch.tensor(num_photos, device=device)
    if dist.is_initialized():
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
    num_chunks = min(math.ceil(num_pairs / chunk_size), int(fewest))  # a sync
    photos = [num_photos * i // num_chunks for i in range(num_chunks + 1)]
    edges = torch.tensor(photos, device=device)
    captions = torch.searchsorted(batch["photo_of_pair"], edges).tolist()  # a sync
    return [(slice(*photos[i:i + 2]), slice(*captions[i:i + 2])) for i in range(num_chunks)]


@contextlib.contextmanager
def frozen_statistics(module):
    """Batch norm goes on normalising by its batch, but takes no running statistics from it."""
    norms = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def contrastive_backward(encode, batch, memory_loss_weight, chunk_size=0, scale=lambda loss: loss):
    """One training step's forward and backward pass -> the contrastive loss, a detached scalar.

    encode: a PairEncoder, perhaps in DistributedDataParallel. batch: see `iterate_batches`. scale:
    GradScaler.scale.

    The loss is taken from the latents of the whole batch, and its gradient of each is passed on to
    the encoders. With a chunk_size these see that many pairs at a time, to save memory (GradCache,
    Gao et al. 2021): first without a graph, for the loss, then once more. Loss and gradients are
    the same, if nothing in the encoders is left to chance, except that batch norm sees a chunk."""
    images, text, photo_of_pair = batch["images"], batch["text"], batch["photo_of_pair"]
    text_features = batch.get("text_features")

    def encode_chunk(photos, captions):
        features = text_features
        if isinstance(features, dict):  # what a pretrained text encoder takes
            features = {name: tensor[captions] for name, tensor in features.items()}
        elif features is not None:
            features = features[captions]
        return encode(images[photos], text[captions], features)

    chunks = split_in_chunks(batch, chunk_size)
    whole = len(chunks) == 1
    if whole:
        outputs = [encode_chunk(*chunks[0])]
    else:
        with torch.no_grad(), frozen_statistics(encode):
            outputs = [encode_chunk(*chunk) for chunk in chunks]

    image_latents, text_latents = (
        torch.cat([output[i].detach() for output in outputs]).requires_grad_() for i in range(2))
    logit_scale = outputs[0][2].detach().requires_grad_()
    with full_float32():
        loss = info_nce_loss(image_latents[photo_of_pair], text_latents, logit_scale,
                             batch["photo_ids"][photo_of_pair])
        scale(loss).backward()

    for i, (photos, captions) in enumerate(chunks):
        last = i == len(chunks) - 1  # whose backward pass exchanges the sum of all gradients
        alone = hasattr(encode, "no_sync") and not last
        with encode.no_sync() if alone else contextlib.nullcontext():
            output = outputs[0] if whole else encode_chunk(photos, captions)
            *latents, chunk_scale, memory_losses = output
            memory_loss = (memory_losses[0] * (len(latents[0]) / len(images))
                           + memory_losses[1] * (len(latents[1]) / len(text)))
            tensors = list(latents)
            gradients = [image_latents.grad[photos], text_latents.grad[captions]]
            if memory_loss.requires_grad:
                tensors.append(scale(memory_loss_weight * memory_loss))
                gradients.append(None)
            if last:
                tensors.append(chunk_scale)
                gradients.append(logit_scale.grad)
            torch.autograd.backward(tensors, gradients)
    return loss.detach()
