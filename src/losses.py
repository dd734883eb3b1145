"""The contrastive loss between photos and captions, and its backward pass, at once or in chunks, in
one process or several."""
import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

FUSED_WEIGHT = 0.2  # of the contrast of photos fused with a caption; 1 lowers the plain R@K by 0.6


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


def contrast_with_captions(queries, text_latents, logit_scale, own, photo_ids):
    """Supervised contrastive loss (Khosla et al. 2020), a scalar: of the captions, the others of a
    query's photo are its positives, those of other photos its negatives.

    queries: (Q, D), text_latents: (B, D), of unit length. own: (Q,) row of the caption that a query
    is made of, and that is left out. logit_scale, photo_ids: as for `info_nce_loss`."""
    positive = (photo_ids[own, None] == photo_ids).scatter(1, own[:, None], False)
    with torch.autocast(queries.device.type, enabled=False):
        logits = logit_scale.float().exp() * (queries @ text_latents.T)
    logits = logits.scatter(1, own[:, None], float("-inf"))
    nll = -logits.log_softmax(1).masked_fill(~positive, 0.0)
    return (nll.sum(1) / positive.sum(1).clamp(min=1)).mean()


def info_nce_loss(image_latents, text_latents, logit_scale, photo_ids=None, fused=None):
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021), a scalar, in float32
    over the pairs of all processes.

    image_latents, text_latents: (B, D), of any length, pair i in row i. logit_scale: scalar, the
    logarithm of the inverse temperature. photo_ids: (B,) integers; pairs with the same id hold the
    same photo and are not each other's negatives. fused: (rows (Q,), latents (Q, D)) of pairs whose
    photo and caption were fused, which are contrasted with the photo's other captions."""
    image_latents = gather(F.normalize(image_latents.float(), dim=-1))
    first = len(text_latents) * (dist.get_rank() if dist.is_initialized() else 0)
    text_latents = gather(F.normalize(text_latents.float(), dim=-1))
    rows = torch.arange(len(text_latents), device=text_latents.device)
    photo_ids = rows if photo_ids is None else gather(photo_ids)
    left_out = (photo_ids[:, None] == photo_ids).fill_diagonal_(False)
    with torch.autocast(image_latents.device.type, enabled=False):
        logits_per_image = logit_scale.float().exp() * (image_latents @ text_latents.T)
    loss = sum(F.cross_entropy(logits.masked_fill(left_out, float("-inf")), rows) / 2
               for logits in (logits_per_image, logits_per_image.T))
    if fused is not None:
        own, latents = gather(first + fused[0]), gather(F.normalize(fused[1].float(), dim=-1))
        loss = loss + FUSED_WEIGHT * contrast_with_captions(
            latents, text_latents, logit_scale, own, photo_ids)
    return loss


class PairEncoder(torch.nn.Module):
    """What a step computes of the model in one call: photos (P, ...), text (B, L), the features of
    that, where the model takes such, and fused, (2, Q) rows of the photos and captions to fuse ->
    image latents (P, D), text latents (B, D), fused latents (Q, D), logit_scale, and memory losses
    (2,) of photos and of captions."""

    def __init__(self, model, amp_dtype):
        super().__init__()
        self.model, self.amp_dtype, self.compiled = model, amp_dtype, None

    def compile(self, **options):
        """By torch.compile, with its options, from now on; one graph for all lengths of text."""
        self.compiled = torch.compile(self.encode, **options)

    def forward(self, images, text, text_features, fused):
        if self.compiled is None:
            return self.encode(images, text, text_features, fused)
        torch._dynamo.mark_dynamic(text, 1)
        return self.compiled(images, text, text_features, fused)

    def encode(self, images, text, text_features, fused):
        model, enabled = self.model, self.amp_dtype is not None
        with torch.autocast(images.device.type, dtype=self.amp_dtype, enabled=enabled):
            images = model.encode_images(images)
            text = model.encode_text(text, None, text_features)
            latents = (model.fuse(images), model.fuse(text=text),
                       model.fuse(images[fused[0]], text[fused[1]]))
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


def contrastive_backward(encode, batch, memory_loss_weight, chunk_size=0, scale=lambda loss: loss,
                         fuse_every=0):
    """One training step's forward and backward pass -> the contrastive loss, a detached scalar.

    encode: a PairEncoder, perhaps in DistributedDataParallel. batch: see `iterate_batches`. scale:
    GradScaler.scale. fuse_every: of how many pairs one is fused; 0: none.

    The loss is taken from the latents of the whole batch, and its gradient of each is passed on to
    the encoders. With a chunk_size these see that many pairs at a time, to save memory (GradCache,
    Gao et al. 2021): first without a graph, for the loss, then once more. Loss and gradients are
    the same, if nothing in the encoders is left to chance, except that batch norm sees a chunk."""
    images, text, photo_of_pair = batch["images"], batch["text"], batch["photo_of_pair"]
    text_features = batch.get("text_features")

    def rows_to_fuse(captions):
        first = captions.stop
        if fuse_every:
            first = min(first, math.ceil(captions.start / fuse_every) * fuse_every)
        return torch.arange(first, captions.stop, fuse_every or 1, device=text.device)

    def encode_chunk(photos, captions):
        features = text_features
        if isinstance(features, dict):  # what a pretrained text encoder takes
            features = {name: tensor[captions] for name, tensor in features.items()}
        elif features is not None:
            features = features[captions]
        rows = rows_to_fuse(captions)
        fused = torch.stack([photo_of_pair[rows] - photos.start, rows - captions.start])
        return encode(images[photos], text[captions], features, fused)

    chunks = split_in_chunks(batch, chunk_size)
    whole = len(chunks) == 1
    if whole:
        outputs = [encode_chunk(*chunks[0])]
    else:
        with torch.no_grad(), frozen_statistics(encode):
            outputs = [encode_chunk(*chunk) for chunk in chunks]

    leaves = [torch.cat([output[i].detach() for output in outputs]).requires_grad_()
              for i in range(3)]
    image_latents, text_latents, fused_latents = leaves
    logit_scale = outputs[0][3].detach().requires_grad_()
    options = {}
    if fuse_every:
        options["fused"] = rows_to_fuse(slice(0, len(text))), fused_latents
    with full_float32():
        loss = info_nce_loss(image_latents[photo_of_pair], text_latents, logit_scale,
                             batch["photo_ids"][photo_of_pair], **options)
        scale(loss).backward()

    for i, (photos, captions) in enumerate(chunks):
        last = i == len(chunks) - 1  # whose backward pass exchanges the sum of all gradients
        alone = hasattr(encode, "no_sync") and not last
        with encode.no_sync() if alone else contextlib.nullcontext():
            output = outputs[0] if whole else encode_chunk(photos, captions)
            *latents, chunk_scale, memory_losses = output
            memory_loss = (memory_losses[0] * (len(latents[0]) / len(images))
                           + memory_losses[1] * (len(latents[1]) / len(text)))
            tensors, gradients = [], []
            for j, leaf in enumerate(leaves):
                if leaf.grad is not None:  # as that of the fused, where nothing is fused
                    tensors.append(latents[j])
                    gradients.append(leaf.grad.split([len(output[j]) for output in outputs])[i])
            if memory_loss.requires_grad:
                tensors.append(scale(memory_loss_weight * memory_loss))
                gradients.append(None)
            if last:
                tensors.append(chunk_scale)
                gradients.append(logit_scale.grad)
            torch.autograd.backward(tensors, gradients)
    return loss.detach()
