"""What comes before the training loop: the Fisher network is trained, or, if pretrained encoders
are to be fine-tuned, all but these; and what all validations have in common is computed.

Both are trained on stored features of the photos, which takes a minute or a few. There are no
checkpoints: a run that is interrupted meanwhile begins anew. How long an epoch of fine-tuning will
take is measured last."""
import copy
import dataclasses
import logging
import math
import time

import torch

from src.device import autocast_dtype
from src.evaluation import evaluate, prepare_photos
from src.fisher import make_fisher_vectors, with_fisher_latents
from src.settings import FISHER_EPOCHS, FISHER_PHOTOS, for_first_stage
from src.training import (
    RunState,
    augment,
    contrastive_backward,
    frozen_statistics,
    training_step,
)
from src.utils import distributed
from src.utils.console import ProgressLine
from src.utils.errors import RunError
from src.utils.flickr8k_simple import iterate_batches, place_photos

log = logging.getLogger("flickr8k_sgd")
SEED_STRIDE = 1_000_003  # a prime, so that the seeds of different runs do not overlap


def batches_of_epoch(data, settings, epoch):
    """This process's share of each batch of an epoch, as rows of captions (steps, pairs)."""
    rank, world = distributed.rank_and_world()
    batches = data.epoch(settings.captions_per_image, settings.batch_size,
                         settings.seed * SEED_STRIDE + epoch)
    share = batches.shape[1] // world
    return batches[:, rank * share:(rank + 1) * share]


@torch.no_grad()
def set_temperature(model, temperature):
    model.logit_scale.fill_(-math.log(temperature))
    model.clamp_logit_scale_()


def first_weights(settings, model, encoders, tokenizer, train, features, initial, device):
    """Give the model the weights with which a run begins -> (the training split, perhaps with
    latents of the Fisher network, the seconds that this took, the loss of the first stage or None).
    features: the splits for the first stage of fine-tuning, or None where there is none. initial:
    the InitialModel whose weights are taken, or None."""
    seconds, first_loss = 0.0, None
    if features is not None:
        first_loss, seconds = train_first_stage(
            settings, model, encoders, tokenizer, features, device)
    elif initial is None:
        encoders.initialize(model, train)
    if settings.finetune:
        encoders.attach(model, settings)  # their unused weights are frozen already
    if initial is not None:
        initial.load_into(model)
        log.info(f"beginning with {initial}")
        if settings.temperature != initial.settings.temperature:
            set_temperature(model, settings.temperature)
    if settings.fisher:
        train, seconds = train_fisher_network(
            settings, model.fisher_network, tokenizer, train, device, initial is None)
    return train, seconds, first_loss


def train_fisher_network(settings, network, tokenizer, data, device, is_new=True):
    """Train the Fisher network -> (the training split, perhaps with its latents, seconds).

    It has the recipe of the memory network, except that the Fisher vectors of the photos and of
    their mirror images are computed once, for at most FISHER_PHOTOS photos. is_new: whether it is
    fit to these photos first; otherwise it is trained further as it is."""
    began, part = time.time(), data.first(FISHER_PHOTOS)
    log.info(f"training the Fisher network first, on {len(part.photos):,} photos")
    settings = dataclasses.replace(settings, epochs=FISHER_EPOCHS, chunk_size=0)
    amp_dtype = autocast_dtype(settings.amp, device)
    if is_new:
        network.image_backbone.fit(part.photos)
        distributed.broadcast_buffers(network.image_backbone)  # each process makes some vectors
    vectors = make_fisher_vectors(network.image_backbone, part.photos, amp_dtype, views=2)
    if is_new:
        set_temperature(network, settings.temperature)
    network.requires_grad_(True)
    train_on_features(settings, network, tokenizer, part, vectors, range(FISHER_EPOCHS), device)
    network.requires_grad_(False)
    if len(part.photos) == len(data.photos):  # the bank will use them
        data = with_fisher_latents(network, data, amp_dtype, vectors)
    seconds = time.time() - began
    log.info(f"the Fisher network took {seconds:.0f} s, which count towards the first epoch")
    return data, seconds


def train_first_stage(settings, model, encoders, tokenizer, splits, device):
    """Train the model on the features of frozen encoders, as a run does that keeps them frozen ->
    (the loss of the last epoch, seconds). Fine-tuning begins with this model, because a random one
    would distort the encoders (linear probing, then fine-tuning; Kumar et al. 2022).

    splits: with the features. A contrastive pair may be better as it is. The model is then left as
    that pair, and the loss is None."""
    began, settings, line = time.time(), for_first_stage(settings), ProgressLine()
    data, amp_dtype = splits["train"], autocast_dtype(settings.amp, device)
    log.info(f"training all but the encoders first, for {settings.epochs} epochs")
    encoders.initialize(model, data)
    if encoders.is_contrastive_pair:
        state_before = copy.deepcopy(model.state_dict())
        score_before = evaluate(
            model, splits["val"], amp_dtype, line.counter("validating"))["avg_r1"]
    loss = train_on_features(
        settings, model, tokenizer, data, data.photos, range(1, settings.epochs + 1), device)
    if encoders.is_contrastive_pair:
        score = evaluate(model, splits["val"], amp_dtype, line.counter("validating"))["avg_r1"]
        line.clear()
        log.info(f"val R@1 {score_before:.2f} of the contrastive pair as it is, {score:.2f} after "
                 "the first stage; fine-tuning begins with the better of both")
        if score < score_before:
            model.load_state_dict(state_before)
            loss = None
    seconds = time.time() - began
    log.info(f"the first stage took {seconds:.0f} s, which count towards epoch 0; now the encoders "
             "are trained, too")
    return loss, seconds


def train_on_features(settings, model, tokenizer, data, features, epochs, device):
    """Train a model for these epochs -> the mean loss of the last one. features: of the photos and
    of their mirror images (N, 2, width). Raises RunError if that loss is not finite."""
    batches = [batches_of_epoch(data, settings, epoch) for epoch in epochs]
    steps = sum(map(len, batches))
    model.train()
    run = RunState(settings, model, tokenizer, device, steps)
    features, losses = place_photos(features, device), []
    line = ProgressLine()
    show_progress = line.counter("training")
    for step, batch in enumerate(iterate_batches(data, features, torch.cat(batches), device)):
        torch.manual_seed(settings.seed * SEED_STRIDE + step)
        losses.append(training_step(run, batch))
        show_progress(step + 1, steps, "steps")
    line.clear()
    model.load_state_dict(run.evaluated_model.state_dict())
    model.zero_grad()  # otherwise these gradients would count when later ones are clipped
    loss = torch.stack(losses[-len(batches[-1]):]).mean().item()
    if not math.isfinite(loss):
        raise RunError(f"the loss became {loss}; a smaller --lr may help")
    return loss


def estimate_epoch_seconds(run, splits):
    """About how long an epoch of fine-tuning takes, measured with a few photos. Nothing is
    learned."""
    data, settings = splits["train"], run.settings
    pairs = max(20 * settings.captions_per_image, 2 * settings.chunk_size)
    pairs = batches_of_epoch(data, settings, 1)[0][:pairs]
    for _ in range(2):  # the first time is a warm-up
        began = time.time()
        batch = next(iterate_batches(data, data.photos, [pairs], run.device))
        augment(run, batch)
        with frozen_statistics(run.encode):
            contrastive_backward(run.encode, batch, settings.memory_loss, settings.chunk_size)
        seconds = time.time() - began
    return seconds * len(data) / len(pairs)


def prepare_splits(run, splits):
    """Return splits with what validations and the bank would otherwise compute anew each time: the
    latents of the Fisher network, and the photos of val as the convnet takes them. A training split
    of more than FISHER_PHOTOS photos stays as it is, as the bank needs but a few of them."""
    prepared, settings = {}, run.settings
    for name, data in splits.items():
        is_needed = name != "train" or len(data.photos) <= FISHER_PHOTOS
        if settings.fisher and data.fisher_latents is None and is_needed:
            data = with_fisher_latents(run.model.fisher_network, data, run.amp_dtype)
        if name == "val" and not settings.image_encoder:
            data = prepare_photos(data, settings.eval_pixels, run.amp_dtype, run.device)
        prepared[name] = data
    return prepared
