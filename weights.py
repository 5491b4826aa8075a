"""Weights: reads a checkpoint, whoever wrote it, and loads it into a network.

`Checkpoint.read` recognises files of train.py, mmsegmentation (FCN R-50-D8, R-101-D8), torchfcn (FCN8s, FCN8sAtOnce),
and ImageNet weights (torchvision's for vgg16 and resnet50, OpenMMLab's for *_d8). Files are read as plain tensors and
values; nothing in them is run.
"""
import dataclasses
import functools
import pickle
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import torch

from backbones import BACKBONES, published
from errors import WeightsError, first_line
from fcn8s import FCN8s
from palette import palette
from voc import CLASSES

CLASS_LAYERS = ("decode_head.conv_seg.weight", "decode_head.score_fr.weight")  # [C, channels, 1, 1]
HEADS = ("decode_head.", "auxiliary_head.")
TRAINING_STATE = ("optimizer", "precision", "progress")  # what train.py saves beside the weights, to resume
REFERENCE_SCALE = (2048, 512)  # mmsegmentation's evaluation: (long, short) side, in pixels
PLAIN_COMMAND = ("""python -c "import torch; c = torch.load('{0}', map_location='cpu', weights_only=False); """
                 """k = c.keys() & {{'state_dict', 'model_state_dict', 'arch'}} or c.keys(); """
                 """torch.save({{n: c[n] for n in k}}, '{0}.plain.pth')\"""")
KEYS_SHOWN = 3


@dataclasses.dataclass
class Checkpoint:
    """What a checkpoint file holds.

    source: the file, or the name of a published network
    state: the weights under FCN8s's names, or a classifier's under its own (`kind` says which)
    backbone: its name; form: see FCN8s.use_form
    num_classes: None if it holds no trained heads
    kind: what it was recognised as, in words; classifier: whether it holds ImageNet weights of a backbone alone
    meta: what train.py wrote about the run; {} for other files
    training: {"optimizer", "precision", "progress"} to resume from, or None
    """
    source: str
    state: dict
    backbone: str
    form: str
    num_classes: int | None
    kind: str
    classifier: bool
    meta: dict
    training: dict | None

    @classmethod
    def read(cls, source, backbone=None, at_once=False):
        """Reads a file, or downloads the published network of that name.

        backbone: which one it is of, where the file does not say
        at_once: they are torchfcn's FCN8sAtOnce, whose keys are FCN8s's; `arch` or the file's name tell it, too
        Raises WeightsError for what is not there, damaged, unsafe, or of another backbone.
        """
        source, named = str(source), published().get(str(source))
        content = download(*named, source) if named else read_file(source)
        raw = next((content[key] for key in ("state_dict", "model_state_dict") if key in content), content)
        raw = raw if isinstance(raw, dict) else {}
        state = {str(key).removeprefix("module."): value for key, value in raw.items()
                 if isinstance(value, torch.Tensor)}
        meta = content.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        torchfcns = {"conv1_1.weight", "fc7.weight"} <= state.keys()
        theirs = named[0] if named else meta.get("backbone", "vgg16" if torchfcns else None)
        if theirs is None and backbone is None:
            raise WeightsError(f"{source}: does not say which backbone it is of; add --backbone")
        if theirs is not None and backbone not in (None, theirs):
            raise WeightsError(f"{source}: is of backbone {theirs}, not {backbone}; use --backbone {theirs}")
        state, form, kind, classifier = recognise(source, content, state, meta, theirs or backbone, at_once)
        training = {key: content[key] for key in TRAINING_STATE if key in content}
        return cls(source, state, theirs or backbone, form,
                   next((state[key].shape[0] for key in CLASS_LAYERS if key in state), None), kind, classifier, meta,
                   training if len(training) == len(TRAINING_STATE) else None)

    def network(self):
        """The trained FCN8s. Raises WeightsError, naming the keys, if the weights are not all there."""
        if self.num_classes is None:
            raise WeightsError(f"{self.source}: holds no trained network, it has none of {', '.join(CLASS_LAYERS)}; "
                               "it may do as a start: train.py --pretrained")
        model = FCN8s(self.num_classes, self.backbone)
        model.use_form(self.form)
        if not self.has_auxiliary_head():
            model.auxiliary_head = None  # it is for training only, and some files leave it out
        load_exactly(model, self.state, self.source)
        return model

    def start(self, model, classes):
        """Loads the weights into a model as the start of a training. Heads for other classes start afresh.

        classes: the names of the model's classes
        -> what was loaded, in words. Raises WeightsError if the weights do not fit.
        """
        origin = f"{self.source}: {self.kind}"
        if self.classifier:
            load_classifier(model, self.state, self.source)
            return origin
        model.use_form(self.form)
        if not any(key.startswith(HEADS) for key in self.state):
            load_exactly(model.backbone, {key.removeprefix("backbone."): value for key, value in self.state.items()},
                         self.source)
            return f"{origin} without heads; the heads start afresh"
        same = self.num_classes == model.num_classes
        if self.num_classes is None or (same and self.names() in (None, tuple(classes))):
            state = self.state
            if model.auxiliary_head is not None and not self.has_auxiliary_head():
                fresh = {key: value for key, value in model.state_dict().items() if key.startswith("auxiliary_head.")}
                state, origin = {**state, **fresh}, f"{origin}, its auxiliary head starts afresh"
            load_exactly(model, state, self.source)  # without a class layer, this says what is missing
            return origin
        model.backbone.load_state_dict(self.network().backbone.state_dict())
        what = "other classes" if same else f"{self.num_classes} classes"
        return f"{origin} for {what}, of which the backbone is taken; the heads start afresh"

    def has_auxiliary_head(self):
        return any(key.startswith("auxiliary_head.") for key in self.state)

    def names(self):
        """The names of the classes: a tuple; VOC's for files of others with 21 classes; None if nothing names them."""
        names = self.meta.get("classes", CLASSES if self.num_classes == len(CLASSES) else None)
        if names is None:
            return None
        if not isinstance(names, (list, tuple)) or len(names) != self.num_classes:
            raise WeightsError(f"{self.source}: its list of class names is damaged; take another checkpoint")
        return tuple(map(str, names))

    def colours(self):
        """uint8 [256, 3]: the colour of each class and of IGNORE."""
        colours = palette()
        try:
            colours[:self.num_classes] = self.meta.get("palette", colours[:self.num_classes])
        except (TypeError, ValueError, OverflowError):
            raise WeightsError(f"{self.source}: its colours of classes are damaged; take another checkpoint") from None
        return colours

    def scale(self):
        """(long, short): what images are fitted into, in pixels; None: their own size, as the original release."""
        scale = self.meta.get("scale")
        if scale is None:
            return REFERENCE_SCALE if self.form == "unpadded" else None
        pair = isinstance(scale, (list, tuple)) and len(scale) == 2
        if not pair or not all(isinstance(side, int) and side > 0 for side in scale):
            raise WeightsError(f"{self.source}: holds the scale {scale}, which is invalid; give --scale LONG SHORT")
        return tuple(scale)

    def pad_to(self):
        """The side, in pixels, that images were padded to in the evaluations of the training, or None."""
        recipe = self.meta.get("recipe")
        side = recipe.get("pad_to") if isinstance(recipe, dict) else None
        return side if isinstance(side, int) and side > 0 else None

    def iteration(self):
        """The iteration it was saved at, or None for files of others."""
        progress = (self.training or {}).get("progress")
        return progress.get("iteration") if isinstance(progress, dict) else None


def recognise(source, content, state, meta, backbone, at_once):
    """-> (the state under FCN8s's names, its form, what it is in words, whether it is a classifier's)"""
    if {"conv1_1.weight", "fc7.weight"} <= state.keys():
        named = f"{content.get('arch')} {Path(source).name}".lower().replace("-", "").replace("_", "")
        form = "at_once" if at_once or "atonce" in named else "padded"
        state = {("backbone." if key.startswith(("conv", "fc")) else "decode_head.") + key: value
                 for key, value in state.items()}
        return state, form, f"torchfcn's FCN-8s, {form} form", False
    if not any(key.startswith("backbone.") for key in state):
        form, kind, classifier = "unpadded", "ImageNet weights of the backbone", True
    else:
        if backbone == "vgg16" and "form" not in meta:
            raise WeightsError(f"{source}: does not say which form of vgg16 it is for; take the whole checkpoint, as "
                               "train.py wrote it")
        form, classifier = meta.get("form", "unpadded"), False
        kind = "a checkpoint of " + ("train.py" if "backbone" in meta or not backbone.endswith("_d8") else
                                     "mmsegmentation")
        kind += "" if form == "unpadded" else f", {form} form"
    if at_once and form != "at_once":
        raise WeightsError(f"{source}: is {kind}, --at_once is for torchfcn's FCN-8s")
    return state, form, kind, classifier


def load_imagenet(model):
    """Downloads the ImageNet weights of a model's backbone (to torch.hub's folder) and loads them. -> their origin"""
    name = model.backbone_name
    where = BACKBONES[name].imagenet
    if where is None:
        raise WeightsError(f"there are no ImageNet weights of {name}; add --pretrained none, or a FILE")
    get_state = (functools.partial(torch.hub.load_state_dict_from_url, where) if ":" in where else
                 torchvision_weights(where).get_state_dict)
    content = get_download(get_state, f"the ImageNet weights of {name}",
                           "give a file with --pretrained FILE, or start from random weights with --pretrained none")
    load_classifier(model, content.get("state_dict", content), f"ImageNet weights of {name}")
    return "ImageNet weights"


def download(backbone, url, name):
    """The content of a published network's file."""
    return get_download(functools.partial(torch.hub.load_state_dict_from_url, url), f"the weights {name}",
                        f"fetch {url} elsewhere and give the file with --backbone {backbone}")


def get_download(get_state, what, instead):
    """What a function of torch.hub's kind downloads, its hash checked; an error says what to do instead."""
    try:
        return get_state(map_location="cpu", check_hash=True, weights_only=True)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise WeightsError(f"{what} cannot be downloaded ({error}); {instead}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"the download of {what} is damaged ({first_line(error)}); delete it in "
                           f"{torch.hub.get_dir()}/checkpoints and try again") from None


def torchvision_weights(name):
    """The torchvision weights of a name such as "ResNet50_Weights.IMAGENET1K_V1"."""
    try:
        from torchvision import models  # only here: a torchvision that does not match torch fails on import
    except (ImportError, RuntimeError) as error:
        raise WeightsError(f"torchvision cannot be imported ({first_line(error)}); install the release that belongs "
                           f"to torch {torch.__version__}, from where torch came") from None
    enum, member = name.split(".")
    return getattr(models, enum)[member]


def read_file(path):
    """The dict in a checkpoint file, tensors on the CPU. Only tensors and plain values are read, no code is run.

    Raises WeightsError if the file is not there, damaged, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such checkpoint file")
    try:
        with warnings.catch_warnings():  # PyTorch warns about pickles that it does not read
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                changed = archive.testzip()  # compares the checksums, which torch.load does not look at
            if changed:
                raise ValueError(f"the checksum of its part {changed} is wrong")
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: {why_refused(path)}") from None
    except PermissionError:
        raise
    except Exception as error:  # whatever the damage leads to
        raise WeightsError(f"{path}: the file is damaged or no checkpoint ({first_line(error)}); take another one"
                           ) from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def why_refused(path):
    """Why torch.load read no plain tensors from a file, in words."""
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no file of torch.save
        objects = []
    if not objects:
        return ("the file is damaged, or no checkpoint but a plain pickle, which could run code and is not read; take "
                "another one")
    return (f"refused, it holds objects other than tensors and plain values ({objects[0]}), which could run code; if "
            f"you trust it, make a plain one: {PLAIN_COMMAND.format(path)}")


def load_classifier(model, state, source):
    """Loads a classifier's state dict into the model's backbone."""
    try:
        state = model.backbone.from_imagenet(state)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    load_exactly(model.backbone, state, source)


def load_exactly(module, state, source):
    """load_state_dict, but an error is one line that names the first keys that do not fit."""
    ours = module.state_dict()
    wrong = [f"{key} is missing" for key in ours if key not in state and not key.endswith("num_batches_tracked")]
    wrong += [f"{key} is unexpected" for key in state if key not in ours]
    wrong += [f"{key} has shape {tuple(state[key].shape)}, not {tuple(ours[key].shape)}"
              for key in ours if key in state and state[key].shape != ours[key].shape]
    wrong += [f"{key} holds NaN or infinity" for key in ours if key in state and not state[key].isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - KEYS_SHOWN} more" if len(wrong) > KEYS_SHOWN else ""
        raise WeightsError(f"{source}: the weights do not fit: {', '.join(wrong[:KEYS_SHOWN])}{more}")
    module.load_state_dict(state, strict=False)
