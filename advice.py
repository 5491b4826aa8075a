"""What a run advises about its length and its memory: the flags that change them."""
MANY_EPOCHS = 1000  # beyond what any data needs; the recipe of VOC has 15
CPU_CROP = 256  # pixels; with a larger one a CPU takes seconds for each image
CPU_FLAGS = ("--backbone resnet50 --scale 256 128 --crop_size 128 --batch_size 4 --max_iters 400 --amp "
             "--eval_interval 100 --checkpoint_interval 100")


def at_start(recipe, intervals, device, images, performance):
    """Notes on settings that do not fit a training list of `images` images: a list of texts."""
    notes = []
    late = [f"{what} (--{flag} {interval})" for what, flag, interval in (
        ("log line", "log_interval", intervals.log), ("evaluation", "eval_interval", intervals.evaluation),
        ("checkpoint", "checkpoint_interval", intervals.checkpoint)) if interval >= intervals.last]
    if late and not performance and intervals.last > 1:
        notes.append(f"no {', no '.join(late)} before the end at iteration {intervals.last}")
    epochs = intervals.last * recipe.images_per_iteration / images
    if epochs > MANY_EPOCHS:
        notes.append(f"{epochs:,.0f} epochs of {images} images are more than any data needs; lower --max_iters")
    if device.type == "cpu" and (recipe.backbone.endswith("_d8") or recipe.crop_size > CPU_CROP):
        notes.append(f"{recipe.backbone} at --crop_size {recipe.crop_size} is slow on a CPU; this ends in minutes: "
                     + CPU_FLAGS)
    return notes


def of_memory(recipe, amp):
    """The remedy where memory ran out, in words."""
    mixed = "" if amp else "add --amp; "
    if recipe.batch_size == 1:
        return mixed + "lower --crop_size" + ("" if recipe.backbone == "resnet50" else ", or take --backbone resnet50")
    size = max(size for size in range(1, recipe.batch_size) if recipe.batch_size % size == 0)
    batches = recipe.batch_size // size * recipe.accumulate
    return f"{mixed}--batch_size {size} --accumulate {batches} needs less for the same step"
