"""The dataset of one split, the order of an epoch, and its batches."""
import copy
import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from src.utils.errors import DataError
from src.utils.ragged import Ragged
from src.utils.tokenizers import different_pairs, number_texts

GPU_SHARE = 0.5  # the photos are kept on the GPU if they take at most this share of its free memory
TEXT_BUCKET = 16  # the length of a batch's text is a multiple of this, which makes few shapes
WINDOW_BYTES = 8e9  # photos that take more are shuffled in windows of this size, to fit in memory


class Flickr8kImageTextDataset:
    """One split as photo-caption pairs. It does not change after its construction.

    pairs: a `PairsOfSplit`, whose attributes it takes over: names, photos (N, 3, side, side), uint8
    `Rows` or features, captions (M texts, photo by photo), photo_of_caption (M,), text_features,
    folders, split, skipped, extra_data. `texts` are the token ids of the captions. text_encoder: a
    pretrained encoder that is fine-tuned takes the captions themselves. fisher_latents: those of
    the photos (N, D) and of the captions (M, D), None unless `replace` has set them, see
    `with_fisher_latents`.

    text_ids: positive integers (M,), equal for equal captions, and texts_of_photo: those of each
    photo, as a `Ragged`. Both are None unless photos share captions, see
    `Folder.different_captions`.

    Raises DataError for a caption that has no tokens."""

    def __init__(self, pairs, tokenizer, text_encoder=None):
        self.split, self.folders, self.skipped = pairs.split, pairs.folders, pairs.skipped
        self.extra_data = pairs.extra_data
        self.names, self.photos, self.digests = pairs.names, pairs.photos, pairs.digests
        self.captions, self.photo_of_caption = pairs.captions, pairs.photo_of_caption
        self.text_features, self.fisher_latents = pairs.text_features, None
        fine_tuned = text_encoder is not None and not text_encoder.frozen
        self.prepare_texts = text_encoder.prepare_texts if fine_tuned else None
        self.texts = Ragged.from_sequences(self._token_ids(tokenizer), "H")
        self.text_ids = self.texts_of_photo = None
        if any(folder.different_captions is not None for folder in self.folders):
            numbers = number_texts(self.captions)
            photos, texts = different_pairs(self.photo_of_caption.numpy(), numbers)
            counts = np.bincount(photos, minlength=len(self.names))
            self.text_ids = torch.from_numpy(numbers)
            self.texts_of_photo = Ragged(texts, np.cumsum(counts) - counts, counts)

    def _token_ids(self, tokenizer):
        for i, caption in enumerate(self.captions):
            try:
                yield tokenizer.encode(caption)
            except ValueError as error:
                name = self.names[self.photo_of_caption[i]]
                folder = next(folder for folder in self.folders if name in folder.row_of)
                raise DataError(f"{folder.place_of(name, caption)}: {error}") from None

    def replace(self, **attributes):
        """Return this dataset with other attributes, such as photos=..., in place of its own."""
        dataset = copy.copy(self)
        vars(dataset).update(attributes)
        return dataset

    def first(self, number):
        """Return the dataset of the first photos and their captions."""
        part = copy.copy(self)
        captions = slice(int((self.photo_of_caption < number).sum()))  # they lie photo by photo
        part.names, part.digests = self.names[:number], self.digests[:number]
        part.photos = self.photos.choose(slice(number))
        part.captions, part.texts = self.captions.take(captions), self.texts.take(captions)
        part.photo_of_caption = self.photo_of_caption[captions]
        if self.text_ids is not None:
            part.text_ids = self.text_ids[captions]
            part.texts_of_photo = self.texts_of_photo.take(slice(number))
        if self.text_features is not None:
            part.text_features = self.text_features.choose(captions)
        return part

    def epoch(self, captions_per_image, batch_size, seed):
        """Return the pairs of an epoch's batches, see `epoch_batches`. If the photos take more than
        WINDOW_BYTES, they are shuffled in windows."""
        shard_of_photo, shards_in_window = None, 1
        if self.photos.nbytes > WINDOW_BYTES:
            shard_of_photo = torch.from_numpy(self.photos.part_of(np.arange(len(self.photos))))
            shards = int(shard_of_photo.max()) + 1
            shards_in_window = max(1, int(shards * WINDOW_BYTES / self.photos.nbytes))
        return epoch_batches(self.photo_of_caption, captions_per_image, batch_size, seed,
                             shard_of_photo, shards_in_window)

    def text_inputs(self, captions, multiple=1):
        """Return the model's inputs for captions, given by their rows, as a dict.

        "text" are token ids (B, L), where L is a multiple of `multiple`. With a pretrained text
        encoder there is also "text_features": features (B, width), or, if the encoder is
        fine-tuned, a dict of the tensors that it takes."""
        captions = np.asarray(captions)
        inputs = {"text": torch.from_numpy(self.texts.padded(captions, multiple))}
        if self.text_features is not None:
            inputs["text_features"] = self.text_features[captions]
        elif self.prepare_texts is not None:
            inputs["text_features"] = self.prepare_texts([self.captions[i] for i in captions])
        return inputs

    def shared_texts(self, captions, photos):
        """Return what the loss needs to know where photos share captions, and else an empty dict:
        "text_ids" of captions (B,), and "texts_of_photo" (P, C), the text_ids of all captions of
        each photo, padded with 0. Both are chosen by rows. C is the same in all batches."""
        if self.text_ids is None:
            return {}
        most = int(self.texts_of_photo.lengths.max())
        texts_of_photo = self.texts_of_photo.padded(np.asarray(photos), most)
        return {"text_ids": self.text_ids[captions],
                "texts_of_photo": torch.from_numpy(texts_of_photo)}

    def __len__(self):
        return len(self.captions)

    def counts(self):
        """Return what config.json tells about the split. "captions_per_photo" maps a number of
        captions to the number of photos that have so many. If photos share captions, there are also
        "different_captions", their number, "texts_per_photo", which counts only different captions
        of a photo, and "photos_per_caption", which maps a number of photos to the number of
        captions whose text so many photos have."""
        form = "pixels" if self.photos.dtype == torch.uint8 else "features"
        counts = {"photos": len(self.names), form: self.photos.shape[-1], "captions": len(self),
                  "skipped": len(self.skipped),
                  "captions_per_photo": histogram(np.bincount(self.photo_of_caption))}
        if self.text_ids is not None:
            photos_of_text = np.bincount(self.texts_of_photo.concatenated(slice(None)))
            counts["different_captions"] = int((photos_of_text > 0).sum())
            counts["texts_per_photo"] = histogram(self.texts_of_photo.lengths)
            counts["photos_per_caption"] = histogram(photos_of_text[self.text_ids.numpy()])
        return counts

    def fingerprint(self):
        """Return a hash of the photos' names, their order, the captions and the photos' files. It
        also tells whether equal captions count as one."""
        content = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogatepass"))
        content.update(np.ascontiguousarray(self.digests))
        content.update(self.photo_of_caption.numpy())
        self.captions.update_hash(content)
        if self.text_ids is not None:
            content.update(self.text_ids.numpy())
        return content.hexdigest()


def epoch_batches(photo_of_caption, captions_per_image, batch_size, seed, shard_of_photo=None,
                  shards_in_window=1):
    """Return the batches of one epoch, rows of captions (steps, batch_size), in an order that
    follows from the seed.

    The captions of a photo stand side by side in groups of captions_per_image, or of half the batch
    if that is fewer. The groups are drawn again in each epoch. A photo with fewer captions has one
    group of all of them. Captions that do not fill a group, and pairs that do not fill a batch, are
    left out of this epoch. If there are fewer pairs than batch_size, all of them make one batch. A
    group at the end of a batch may continue in the next one.

    shard_of_photo: (N,), given if the photos are larger than memory. Then as many shards as
    shards_in_window, drawn at random, are shuffled together, then the next ones, and so on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(photo_of_caption), generator=generator)
    order = order[torch.argsort(photo_of_caption[order], stable=True)]  # by photo, then shuffled
    group_size = min(captions_per_image, batch_size // 2)  # a batch of one photo has no negatives
    counts = torch.bincount(photo_of_caption)
    sizes = counts.clamp(max=group_size)  # of the groups of each photo
    groups = torch.where(sizes > 0, counts // sizes.clamp(min=1), 0)

    # For each group: its photo, its number among the photo's groups, its first caption in `order`.
    photo = torch.arange(len(counts)).repeat_interleave(groups)
    number = torch.arange(len(photo)) - (groups.cumsum(0) - groups)[photo]
    first = (counts.cumsum(0) - counts)[photo] + number * sizes[photo]
    shuffled = torch.randperm(len(photo), generator=generator)
    if shard_of_photo is not None:
        drawn = torch.randperm(int(shard_of_photo.max()) + 1, generator=generator)
        window = drawn[shard_of_photo[photo[shuffled]]] // shards_in_window
        shuffled = shuffled[torch.argsort(window, stable=True)]

    first, size = first[shuffled], sizes[photo[shuffled]]
    ends = size.cumsum(0)
    place_in_group = torch.arange(int(ends[-1])) - (ends - size).repeat_interleave(size)
    pairs = order[first.repeat_interleave(size) + place_in_group]
    batch_size = min(batch_size, len(pairs))
    return pairs[:len(pairs) // batch_size * batch_size].view(-1, batch_size)


def histogram(numbers):
    """Return how often each number occurs, {number: times}, with the numbers as strings for JSON.
    """
    values, times = np.unique(numbers, return_counts=True)
    return dict(zip(map(str, values.tolist()), times.tolist()))


def map_tensors(function, value):
    """Apply a function to a tensor, or to each tensor in a dict, which may be nested."""
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    return function(value)


def place_photos(photos, device):
    """Move the photos to the GPU if they take at most GPU_SHARE of its free memory, and return
    them."""
    if device.type == "cuda" and photos.nbytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return photos[:].to(device)
    return photos


def iterate_batches(data, photos, batches, device):
    """Yield the batches of an epoch on the device, given rows of captions (steps, B). For a GPU,
    the next batch is prepared while one is in use. photos: `data.photos`, or what `place_photos`
    made of them. A batch is a dict of
    - "images": uint8 (P, 3, H, W) or features (P, 2, width), each photo once for its captions
    - "photo_ids": (P,) the rows of these photos in the dataset
    - "text": (B, L), where L is a multiple of TEXT_BUCKET, and perhaps "text_features", see
      `Flickr8kImageTextDataset.text_inputs`
    - "photo_of_pair": (B,) the photo of each caption, rising from 0 to P - 1
    - perhaps "text_ids" and "texts_of_photo", see `Flickr8kImageTextDataset.shared_texts`"""
    def prepare(pairs):
        photo_ids, photo_of_pair = torch.unique_consecutive(data.photo_of_caption[pairs],
                                                            return_inverse=True)
        batch = {"photo_ids": photo_ids, "photo_of_pair": photo_of_pair}
        batch |= data.text_inputs(pairs, TEXT_BUCKET)
        batch |= data.shared_texts(pairs, photo_ids)
        if photos.device.type == "cpu":
            batch["images"] = photos[photo_ids]
        is_cuda = device.type == "cuda"
        if is_cuda:  # a copy from pinned memory does not block the host
            with torch.cuda.device(device):  # otherwise this thread would touch the first GPU
                batch = map_tensors(torch.Tensor.pin_memory, batch)
        # Without pinned memory the GPU of a Mac would read what may have been freed already
        # (https://github.com/pytorch/pytorch/issues/189690).
        batch = map_tensors(lambda tensor: tensor.to(device, non_blocking=is_cuda), batch)
        return batch if "images" in batch else batch | {"images": photos[batch["photo_ids"]]}

    if device.type == "cpu":  # here a thread would slow the step by more than a batch costs
        yield from map(prepare, batches)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for pairs in batches:
            prepared, ahead = ahead, pool.submit(prepare, pairs)
            if prepared:
                yield prepared.result()
        if ahead:
            yield ahead.result()
