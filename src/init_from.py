"""A run that begins with the weights and the tokenizer of another one (--init_from).

It is transfer learning: a model that was trained on much data is trained further on little. Which
settings such a run has is told by `settings_from_run` in `src/settings.py`."""
import hashlib
from dataclasses import dataclass
from pathlib import Path

from src.settings import settings_of
from src.utils.duplicates import has_flickr_form
from src.utils.errors import UsageError

ENCODER_PARTS = ("image_backbone", "text_backbone")  # pretrained encoders, if they are trained
FLICKR = ("Flickr8k", "Flickr30k")  # the layouts of two data sets with photos in common


@dataclass(frozen=True)
class InitialModel:
    """The best model of the run in a folder. best: its checkpoint."""

    run: str
    best: dict

    def __str__(self):
        return (f"the weights and the tokenizer of {self.run}: epoch {self.best['epoch']}, "
                f"R@1 {self.best['metrics']['avg_r1']:.2f} on the val split of its own data")

    @property
    def weights(self):
        return self.best["model_state_dict"]

    @property
    def settings(self):
        return settings_of(self.best["config"], self.run)

    def describe(self):
        """Return what config.json says about the model that a run began with."""
        content = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            values = tensor.cpu().float().flatten().numpy()
            content.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
        return {"run": self.run, "epoch": self.best["epoch"],
                "val_avg_r1": self.best["metrics"]["avg_r1"], "weights": content.hexdigest()[:16]}

    def check_unchanged(self, recorded):
        """Raise UsageError unless this is the model that a run's config.json recorded."""
        if self.describe()["weights"] != recorded["weights"]:
            raise UsageError(f"{self.run}: the run has changed since another one began with its "
                             "weights and was stopped before its first checkpoint; begin that one "
                             "anew with --overwrite")

    def seen_before(self, config, val_names):
        """Tell in a line why this model may have been trained on photos that another run has in val
        or test, or return None. config: that run's. val_names: of its photos in val.

        This knows what the two configs tell; the photos are not compared."""
        before, folder = self.best["config"], Path(config["settings"]["data_dir"]).resolve()
        recorded = before.get("fingerprints", {})
        if all(recorded.get(split) == config["fingerprints"][split] for split in ("val", "test")):
            return before.get("init_from", {}).get("seen_before")  # by the run that it began with

        def is_folder(path):
            return Path(path).resolve() == folder

        layouts = [extra["layout"] for extra in before["extra_data"]]
        if not before["settings"]["synthetic"]:
            layouts.append(before["layout"])
        is_flickr = (config["layout"].startswith("Flickr30k")
                     or config["layout"].startswith("Flickr8k") and has_flickr_form(val_names[0]))
        if any(extra["split"] == "all" and is_folder(extra["folder"])
               for extra in before["extra_data"]):
            reason = "that run used all photos of this folder (--extra_all)"
        elif is_folder(before["settings"]["data_dir"]):
            reason = "this folder's val or test is not what it was in that run"
        elif is_flickr and any(layout.startswith(FLICKR) for layout in layouts):
            reason = "Flickr8k and Flickr30k share photos, and the splits differ"
        else:
            return None
        return (f"{self.run} may have been trained on photos that are now in val or test, which "
                f"would make all figures too good: {reason}")

    def check_encoders(self, encoders):
        """Raise UsageError unless the pretrained encoders are those of this model."""
        recorded = self.best["config"].get("encoders") or {}
        current = encoders.describe()
        for encoder in encoders:
            before, now = recorded.get(encoder.modality, {}), current[encoder.modality]
            if before.get("name") != now["name"] and before.get("weights") != now["weights"]:
                raise UsageError(f"{self.run} was trained on features of {before.get('name')}, and "
                                 f"not of {now['name']}; leave --{encoder.modality}_encoder out")
        encoders.check_unchanged(self.best["config"], self.run)

    def load_into(self, model):
        """Give a model these weights. Raises UsageError for a model of another shape."""
        here, given = model.state_dict(), dict(self.weights)
        if not self.settings.finetune:  # its encoders are as their authors left them
            given |= {name: tensor for name, tensor in here.items()
                      if name.split(".")[0] in ENCODER_PARTS}
        wrong = [name for name in {**given, **here}
                 if name not in here or name not in given or given[name].shape != here[name].shape]
        if wrong:
            def size(state):
                shape = state[wrong[0]].shape if wrong[0] in state else None
                return "absent" if shape is None else " x ".join(map(str, shape)) or "a number"

            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in wrong))
            raise UsageError(
                f"the weights of {self.run} do not fit this model in {parts}: {wrong[0]} is "
                f"{size(given)} there and {size(here)} here.\nLeave out the flags that change the "
                "model, such as --model, --memory_size and --finetune.")
        model.load_state_dict(given)
