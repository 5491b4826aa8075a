"""Weights: reads a checkpoint, whoever wrote it, and loads it into a network.

`Checkpoint.read` recognises files of train.py, mmsegmentation (FCN R-50-D8, R-101-D8), torchfcn (FCN8s, FCN8sAtOnce),
and ImageNet weights (torchvision's for vgg16 and resnet50, OpenMMLab's for *_d8). Files are read as plain tensors and
values; nothing in them is run.
"""
import contextlib
import dataclasses
import pickle
import re
import shlex
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import torch

from cli import UserError, first_line
from fcn8s import BACKBONES, FCN8s, published
from voc import CLASSES, palette

CLASS_LAYERS = ("decode_head.conv_seg.weight", "decode_head.score_fr.weight")  # [C, channels, 1, 1]
TORCHFCNS = {"conv1_1.weight", "fc7.weight"}  # keys that tell torchfcn's files
TRAINING_STATE = {"optimizer", "precision", "progress"}  # what train.py saves with the weights, to resume
REFERENCE_SCALE = (2048, 512)  # mmsegmentation's evaluation: (long, short) side, in pixels
PLAIN_COMMAND = ('python -c "import json, sys, torch; c = torch.load(sys.argv[1], \'cpu\', weights_only=False); '
                 "k = c.keys() & {'state_dict', 'model_state_dict', 'model', 'arch'} or c.keys(); "
                 "p = {n: c[n] for n in k}; "
                 "p['meta'] = json.loads(json.dumps(c.get('meta'), default=lambda v: getattr(v, 'tolist', v.__str__)()"
                 ')); torch.save(p, sys.argv[1] + \'.plain.pth\')" ')
OLDER_FORMAT = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # begins PyTorch's files that are no ZIP files
STATES = ("state_dict", "model_state_dict", "model")  # keys of the weights in files that hold more
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # what DataParallel and torch.compile put before a name
KEYS_SHOWN = 3
COUNTS = ("iteration", "evaluated", "samples", "best", "best_iteration", "skipped", "seconds")  # of train.Progress


def add_network_flags(parser):
    """The flags that name a trained network."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a file of train.py, mmsegmentation or torchfcn; or resnet50_d8_voc, resnet101_d8_voc: "
                             "mmsegmentation's published weights, downloaded")
    network = parser.add_argument_group("network")
    network.add_argument("--backbone", choices=tuple(BACKBONES), help="if the file does not say it")
    network.add_argument("--at_once", action="store_true", help="the file holds torchfcn's FCN8sAtOnce")


@dataclasses.dataclass
class Checkpoint:
    """What a checkpoint file holds."""
    source: str  # the file, or the name of published weights
    state: dict  # the weights under FCN8s's names, or those of an ImageNet classifier under its own
    backbone: str
    form: str  # see FCN8s.use_form
    kind: str  # a description of the file
    num_classes: int | None  # None if it holds no trained heads
    meta: dict  # what train.py wrote about the run; of other files the names and colours of the classes alone
    training: dict | None  # TRAINING_STATE, if it holds all of that

    @classmethod
    def read(cls, source, backbone=None, at_once=False):
        """Reads a file, or downloads the published weights of that name.

        backbone: which one it is of, where the file does not say; "imagenet" names the ImageNet weights of it
        at_once: they are torchfcn's FCN8sAtOnce, whose keys are FCN8s's; `arch` or the file's name tell it, too
        Raises UserError for a file that is not there, damaged, unsafe, or of another backbone.
        """
        source = str(source)
        theirs, url = published().get(source, (None, None))
        if source == "imagenet" and backbone:
            theirs, url = backbone, BACKBONES[backbone].imagenet
            if url is None:
                raise UserError(f"there are no ImageNet weights of {backbone}; add --pretrained none, or a FILE")
        check_backbone(source, theirs, backbone)
        content = download(url, source, theirs) if url else read_file(source)
        with intact(source):
            found = cls.of(source, content, theirs, backbone, at_once)
            found.check()
        return found

    @classmethod
    def of(cls, source, content, theirs, backbone, at_once):
        """The Checkpoint of a file's content. theirs: the backbone that the name of published weights tells, or None"""
        weights = next((content[key] for key in STATES if isinstance(content.get(key), dict)), content)
        state = {WRAPPERS.sub("", str(key)): value for key, value in weights.items() if isinstance(value, torch.Tensor)}
        meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
        our_meta = upgraded(meta) if "backbone" in meta else {}
        name = theirs or our_meta.get("backbone") or ("vgg16" if TORCHFCNS <= state.keys() else backbone)
        if name is None:
            raise UserError(f"{source}: does not say which backbone it is of; add --backbone")
        check_backbone(source, name, backbone)
        state, form, kind = recognise(source, content, state, our_meta, name, at_once)
        num_classes = next((len(state[key]) for key in CLASS_LAYERS if key in state), None)
        meta = our_meta or named_classes(meta, num_classes)
        training = {key: content[key] for key in TRAINING_STATE} if TRAINING_STATE <= content.keys() else None
        return cls(source, state, name, form, kind, num_classes, meta, training)

    def check(self):
        """Raises an exception of some type if a run could not use what the file says, as somebody edited it."""
        meta, texts, shapes = self.meta, [*(self.names() or ())], set()
        if self.form not in ("unpadded", "padded", "at_once")[:None if self.backbone == "vgg16" else 1]:
            raise ValueError(f"form {self.form}")
        if len(texts) not in (0, self.num_classes or len(texts)):
            raise ValueError(f"{len(texts)} names of {self.num_classes} classes")
        long, short = self.scale() or (0, 0)
        numbers = [long, short, meta.get("args", {}).get("pad_to") or 0]
        for ids in filter(None, map(meta.get, ("lists", "images"))):
            texts += [*ids["train"], *ids["val"]]
        if self.training:
            progress, states = self.training["progress"], self.training["optimizer"]["state"].values()
            texts += [meta["digests"]["train"], meta["digests"]["val"], *self.training["precision"]]
            numbers += [meta["ranks"], meta["args"]["seed"], *map(progress.get, COUNTS)]
            total, main, auxiliary, counted, skipped = progress["sums"]
            shapes = {value.shape for own in states for value in own.values() if torch.is_tensor(value) and value.ndim}
        "".join([self.backbone, *texts]), sum(numbers), self.colours()
        if not shapes <= {value.shape for value in self.state.values()}:
            raise ValueError("momentum of other shapes than the weights")

    def __str__(self):
        return f"{self.backbone} from {self.source}: {self.kind}"

    def network(self):
        """The trained FCN8s. Raises UserError, naming the keys, if the weights are not all there."""
        if self.num_classes is None:
            raise UserError(f"{self.source}: holds no trained network, it has none of {', '.join(CLASS_LAYERS)}; it "
                            "may do as a start: train.py --pretrained")
        if self.backbone not in BACKBONES:
            raise UserError(f"{self.source}: is of backbone {self.backbone}, which fcn8s.py here does not have")
        model = FCN8s(self.num_classes, self.backbone)
        model.use_form(self.form)
        if not self.holds("auxiliary_head."):
            model.auxiliary_head = None  # it is for training only, and some files leave it out
        load_exactly(model, self.state, self.source)
        return model

    def start(self, model, classes):
        """Loads the weights into a model as the start of a training. Heads for other classes start afresh.

        classes: the names of the model's classes
        -> a description of what was loaded. Raises UserError if the weights do not fit.
        """
        model.use_form(self.form)
        origin, heads = f"{self.source}: {self.kind}", self.holds("decode_head.", "auxiliary_head.")
        same = self.num_classes in (None, model.num_classes)  # None: the error says which class layer is missing
        if heads and same and self.names() in (None, tuple(classes)):
            fresh = {key: value for key, value in model.state_dict().items()
                     if key.startswith("auxiliary_head.") and not self.holds("auxiliary_head.")}
            load_exactly(model, {**self.state, **fresh}, self.source)
            return origin + (", its auxiliary head starts afresh" if fresh else "")
        state = {key.removeprefix("backbone."): value for key, value in self.state.items()
                 if key.startswith("backbone.")}
        load_exactly(model.backbone, state or model.backbone.from_imagenet(self.state), self.source)
        if not state:
            return origin
        what = "other classes" if same else f"{self.num_classes} classes"
        return origin + (f" for {what}, of which the backbone is taken" if heads else " without heads") + (
            "; the heads start afresh")

    def holds(self, *prefixes):
        """True if a key of the weights starts with one of these."""
        return any(key.startswith(prefixes) for key in self.state)

    def names(self):
        """The names of the classes: a tuple; VOC's for files of others with 21 classes; None if nothing names them."""
        names = self.meta.get("classes", CLASSES if self.num_classes == len(CLASSES) else None)
        return names and tuple(names)

    def colours(self):
        """uint8 [256, 3]: the colour of each class and of IGNORE."""
        colours = palette()
        colours[:self.num_classes] = self.meta.get("palette", colours[:self.num_classes])
        return colours

    def scale(self):
        """(long, short): what images are fitted into, in pixels; None: their own size, as the original release."""
        scale = self.meta.get("scale", REFERENCE_SCALE if self.form == "unpadded" else None)
        return scale and tuple(scale)

    def iteration(self):
        """The iteration it was saved at, or None for files of others."""
        return self.training and self.training["progress"]["iteration"]


@contextlib.contextmanager
def intact(path, hint="restore it, or name another"):
    """A context in which whatever the content of a damaged or edited file leads to is one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the file is damaged ({first_line(error)}); {hint}") from None


def check_backbone(source, backbone, wanted):
    """Raises UserError if weights are of another backbone than the wanted one. None: not known, any."""
    if None not in (backbone, wanted) and backbone != wanted:
        raise UserError(f"{source}: is of backbone {backbone}, not {wanted}; use --backbone {backbone}")


def named_classes(others_meta, num_classes):
    """mmsegmentation's names and colours of the classes, in the old form or the new one, under our keys."""
    theirs = {**others_meta, **(others_meta.get("dataset_meta") or {})}
    found = {name: theirs.get(name.upper()) or theirs.get(name) for name in ("classes", "palette")}
    return {name: values for name, values in found.items()
            if isinstance(values, list | tuple) and len(values) == num_classes}


def upgraded(our_meta):
    """Our meta, that of version 2.0.0 in today's form, which a later version may drop."""
    if "recipe" not in our_meta:
        return our_meta
    recipe = our_meta["recipe"]
    args = {**recipe, "amp": not recipe["precision"].startswith("float32")}
    digests = {name: recipe[f"{name}_list"] for name in ("train", "val")}
    return {**our_meta, "args": args, "ranks": recipe["ranks"], "digests": digests}


def recognise(source, content, state, our_meta, backbone, at_once):
    """-> (the state under FCN8s's names or a classifier's, its form, its description)"""
    if TORCHFCNS <= state.keys():
        named = f"{content.get('arch')} {Path(source).name}".lower().replace("-", "").replace("_", "")
        form = "at_once" if at_once or "atonce" in named else "padded"
        state = {("backbone." if key.startswith(("conv", "fc")) else "decode_head.") + key: value
                 for key, value in state.items()}
        return state, form, f"torchfcn's FCN-8s, {form} form"
    form = our_meta.get("form", "unpadded")
    if not any(key.startswith("backbone.") for key in state):
        kind = "ImageNet weights of the backbone"
    elif backbone == "vgg16" and "form" not in our_meta:
        raise UserError(f"{source}: does not say which form of vgg16 it is for; take the whole checkpoint, as train.py "
                        "wrote it")
    else:
        ours = our_meta or not backbone.endswith("_d8")
        kind = f"a checkpoint of {'train.py' if ours else 'mmsegmentation'}"
        kind += "" if form == "unpadded" else f", {form} form"
    if at_once and form != "at_once":
        raise UserError(f"{source}: is {kind}, --at_once is for torchfcn's FCN-8s")
    return state, form, kind


def load_start(model, args, classes, ranks):
    """Loads the weights that --pretrained names into a new model. Rank 0 reads or downloads them for all ranks.

    classes: the names of the model's classes
    -> a description of their origin
    """
    if args.pretrained == "none":
        return "random weights"
    here = ranks.rank == 0 and Checkpoint.read(args.pretrained, args.backbone, args.at_once)
    return ranks.share(here).start(model, classes)


def download(url, name, backbone):
    """The content of a URL, its hash checked, by way of torch.hub's folder. name, backbone: of the weights"""
    try:
        if torch.hub.get_dir().startswith("~"):
            raise OSError("the home folder is not known")
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:
        network = isinstance(error, URLError | ConnectionError | TimeoutError)
        folder = "" if network else "set TORCH_HOME to a folder that can be written to, or "
        raise UserError(f"the weights {name} cannot be downloaded ({error}); {folder}fetch {url} elsewhere and give "
                        f"the file with --backbone {backbone} (train.py: --pretrained FILE; or start from random "
                        "weights with --pretrained none)") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"the download of the weights {name} is damaged ({first_line(error)}); delete it in "
                        f"{torch.hub.get_dir()}/checkpoints and try again") from None


def read_file(path):
    """The dict in a checkpoint file, tensors on the CPU. Only tensors and plain values are read, no code is run.

    Raises UserError if the file is not there, damaged, or holds other objects.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint file, nor are there published weights of that name")
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():  # PyTorch warns about pickles that it does not read
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
            changed = zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip()
            if changed:  # the checksums, which torch.load does not look at
                raise ValueError(f"the checksum of its part {changed} is wrong")
        except Exception as error:  # whatever the damage leads to
            raise UserError(f"{path}: {why_unread(file, error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def why_unread(file, error):
    """Why torch.load read no plain tensors from an open file, as text. error: what it raised"""
    if not isinstance(error, pickle.UnpicklingError):
        return f"the file is damaged or no checkpoint ({first_line(error)}); use another"
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    file.seek(0)
    start = file.read(16)
    if unsafe and (start.startswith(b"PK") or OLDER_FORMAT in start):
        return (f"refused, it holds objects other than tensors and plain values ({unsafe[1]}), which could run code; "
                f"if you trust it, make a plain one: {PLAIN_COMMAND}{shlex.quote(file.name)}")
    return "the file is damaged, or a plain pickle, which could run code and is not read; take another one"


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
        raise UserError(f"{source}: the weights do not fit: {', '.join(wrong[:KEYS_SHOWN])}{more}")
    module.load_state_dict(state, strict=False)


# ---- resuming

def images_of(digests, name):
    """The digests of the images of a list, as a set; empty if they are not known."""
    return set((digests or {}).get(name, ()))


def same_list(meta, data, name):
    """True if the list `name`, train or val, has the ids that it had for the checkpoint, and the same images."""
    was, now = images_of(meta.get("images"), name), images_of(data.images, name)
    return meta["digests"][name] == data.digests()[name] and (was == now or not (was and now))


def load_resumed(model, args, data, ranks, start):
    """Loads the weights of `start`, the Checkpoint to resume from. -> its origin and what has changed since, as text

    Raises UserError if it cannot be the same run.
    """
    meta, source, iteration, problem = start.meta, start.source, start.iteration(), None
    trained, scored = (images_of(meta.get("images"), name) for name in ("train", "val"))
    renamed = images_of(data.images, "val") & trained - scored
    if start.training is None:
        problem = f"holds no training state; start from its weights with --pretrained {source}"
    elif (start.backbone, meta.get("num_classes")) != (model.backbone_name, model.num_classes):
        problem = (f"has backbone {start.backbone} and {meta.get('num_classes')} classes, this run "
                   f"{model.backbone_name} and {model.num_classes}; they must be the same to resume")
    elif start.names() != tuple(data.classes):
        problem = (f"its classes have other names ({', '.join(start.names() or ())}); give them by --classes, or start "
                   f"from its weights with --pretrained {source}")
    elif meta["args"]["seed"] != args.seed:
        problem = f"is of a run with --seed {meta['args']['seed']}, not {args.seed}; a run keeps its seed"
    elif iteration > args.max_iters:
        problem = f"is of iteration {iteration}, past --max_iters {args.max_iters}"
    elif data.lists and renamed:
        problem = (f"was trained on {len(renamed)} images that now have names of its list to evaluate on; give images "
                   "their old names, or name another --work_dir")
    if problem:
        raise UserError(f"{source}: {problem}")
    model.use_form(start.form)
    load_exactly(model, start.state, source)
    # What shapes the result and has changed since, each by its flag; older checkpoints have val_scale as scale.
    pairs = [("ranks", meta["ranks"], ranks.count)]
    pairs += [(f"--{name}", tuple(was) if isinstance(was, list) else was, getattr(args, name))
              for name, was in {"val_scale": meta.get("scale"), **meta["args"]}.items() if hasattr(args, name)]
    changed = [f"{name} {was} -> {now}" for name, was, now in pairs if was != now]
    changed += [f"the list '{getattr(data, name).split}' holds other images" for name in ("train", "val")
                if not same_list(meta, data, name)]
    return "; ".join([f"{source}, iteration {iteration}", *changed])


def resume(args, optimizer, precision, data, start, progress):
    """Loads the training state of a Checkpoint. `progress` becomes the checkpoint's. -> its iteration"""
    with intact(start.source):
        precision.load_state_dict(start.training["precision"])  # with apex's O2 this changes the parameters
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Momentum alone: the groups' settings are this run's. What the checkpoint lacks stays zero.
        for number, state in start.training["optimizer"]["state"].items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    # Fused SGD reads parameter and momentum in storage order, which differs between devices.
                    like = parameters[number] if value.ndim else value  # of one value: a step's number, say Adam's
                    optimizer.state[parameters[number]][name] = torch.empty_like(like).copy_(value)
    vars(progress).update(start.training["progress"])
    was = start.scale(), start.meta["args"].get("pad_to")
    if was != (args.val_scale, args.pad_to) or not same_list(start.meta, data, "val"):
        # Scores of another evaluation are not comparable. That of this iteration is taken anew.
        progress.best, progress.best_iteration = -1.0, 0
        progress.evaluated = min(progress.evaluated, progress.iteration - 1)
    return progress.iteration
