"""Load and check the data and the pre-trained encoder of an evaluation."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moco.config import MEAN, STD, AnyConfig, Config, Evaluation, flat, replaced
from moco.data import registry, subsets
from moco.encoder import archs, metadata, networks, trial
from moco.encoder import pretrained as encoders
from moco.engine import checkpoint, decoding, features, precision
from moco.errors import InputError, short
from moco.evaluate import feature_files, other_images, splits
from moco.messages import print_rank0


def complete(config: AnyConfig) -> AnyConfig:
    """Return `config` with the checkpoint's network, image size, mean and std.

    Given options are kept. Call it before any process starts. Raises InputError if the data or the
    checkpoint do not fit.
    """
    if config.run.data == "photos":
        config = replaced(config, dataset="photos")
    images = config.input
    registry.check(images.dataset, config.run.data, images.download)
    if images.dataset == "imagenet":
        subsets.check_classes(Path(config.run.data), images.class_list, images.data_name)
    other_images.check(config.other_test, images.dataset)
    return complete_encoder(config)


def complete_encoder(config: AnyConfig) -> AnyConfig:
    """Return `config` with the checkpoint's network, image size, mean and std; see `complete`.

    It does not read the data. Raises InputError if the checkpoint does not fit.
    """
    config = replaced(config, test_resize=config.views.test_resize or "scaled")
    if not config.encoder.pretrained or tests_full_network(config):
        config = decoding.complete(config)
    if tests_full_network(config) and config.encoder.encoder_method:
        config = replaced(
            config,
            stem=config.network.stem or "imagenet",
            norm_eps=config.network.norm_eps or "timm",
            mean=config.views.mean or MEAN,
            std=config.views.std or STD,
        )
    elif config.encoder.pretrained:
        config = _complete_from(config, config.encoder.pretrained)
    else:
        config = replaced(
            config,
            arch=config.network.arch or "resnet50",
            image_size=config.views.image_size or 224,
            mean=config.views.mean or MEAN,
            std=config.views.std or STD,
            stem=config.network.stem or "imagenet",
            norm_eps=config.network.norm_eps or "timm",
            encoder_method="random",
            pretrain_epochs=None,
        )
    if config.network.arch not in archs.ARCHS:
        trial.check(create_network(config, 1), config.network.arch, [config.views.image_size])
    return config


def _complete_from(config: AnyConfig, path: str) -> AnyConfig:
    """Return `config` with the settings of the checkpoint in `path`. Given options are kept."""
    state = checkpoint.load(path)
    facts = metadata.read_metadata(state)
    image_size = config.views.image_size or facts.image_size
    if not image_size:
        used = "224 pixels are used (--image-size)"
        print_rank0(f"{path}: does not say its image size; {used}")
    used = facts._replace(mean=config.views.mean or facts.mean, std=config.views.std or facts.std)
    if line := metadata.normalization_note(path, used):
        print_rank0(f"{line} (--mean, --std)")
    config = replaced(
        decoding.complete(config, facts),
        arch=networks.canonical(config.network.arch or facts.arch or "resnet50"),
        image_size=image_size or 224,
        norm_eps=metadata.norm_eps(path, facts, config.network.norm_eps),
        mean=used.mean or MEAN,
        std=used.std or STD,
        encoder_method=facts.method,
        encoder_script=facts.script,
        pretrain_epochs=facts.epoch,
    )
    arch, image_size = config.network.arch, config.views.image_size
    net = networks.create(arch, 1, image_size)
    stem = encoders.stem_of(net, encoders.tensors_of(net, state))
    if config.network.stem not in (None, stem):
        raise InputError(
            f"--stem {config.network.stem}: {path} has the stem {stem}; leave --stem out"
        )
    with encoders.suggest_arch(path, facts.arch, arch):
        config = replaced(config, stem=stem)
        _load(create_network(config, 1), config, state)
    return config


def tests_full_network(config: Config) -> bool:
    """Return whether the run only tests a classifier whose checkpoint has the full network."""
    return config.only_tests and not config.kept_layers


def restore_options(config: AnyConfig, options: Iterable[str]) -> AnyConfig:
    """Return `config` with the network, normalization and test resize of `--resume`'s classifier.

    With `--evaluate`, also restore the seed and the `options`.

    Args:
        config: the settings of the evaluation.
        options: names of the options that `--evaluate` restores.

    Raises InputError if `--resume` is not a classifier's checkpoint, or if a given option
    contradicts it.
    """
    path, tests = config.log.resume, config.only_tests
    if tests and not path:
        raise InputError(
            "--evaluate tests a trained classifier: give its checkpoint with --resume FILE"
        )
    if not path:
        return config
    state = checkpoint.load(path)
    if (origin := checkpoint.origin(state)) != "classifier":
        lacking = ", ".join(checkpoint.missing_keys(state))
        what = f"is a {origin} checkpoint, not a classifier's"
        if lacking:
            what = f"cannot be resumed: it lacks {lacking}"
        train = ", and leave out --evaluate: it has no classifier to test" if tests else ""
        raise InputError(f"{path}: {what}; give it with --pretrained instead of --resume{train}")
    checkpoint.check_script(state, config)
    config = _restore_facts(config, metadata.read_metadata(state))
    if not tests:
        return config
    saved, settings = state["args"], flat(config)
    restored = {"seed": state["progress"]["seed"]}
    shared = ("pretrained", "val_from_train", "class_list", "learning_rate_scaling")
    for name in (*options, *shared):
        value = saved.get(name, settings[name])
        if not _alike(value, settings[name]):
            raise InputError(
                f"{path}: its --{name.replace('_', '-')} is {short(str(value))}, "
                "which is not valid; take another checkpoint"
            )
        restored[name] = value
    types = {"encoder_method": str, "encoder_script": str, "pretrain_epochs": int}
    for name, expected in types.items():
        value = saved.get(name)
        restored[name] = value if isinstance(value, expected) else None
    return replaced(config, **restored)


def _restore_facts(config: AnyConfig, facts: metadata.Metadata) -> AnyConfig:
    """Return `config` with the classifier's network, normalization, test resize and decoding.

    Raises InputError if given options differ. With `--evaluate`, the image
    size and the resize of test images may differ.
    """
    settings, path, found = flat(config), config.log.resume, {}
    facts = decoding.of_resumed(facts)
    names = "arch image_size stem norm_eps mean std test_resize exif white".split()
    for name in names + ["shrink_on_decode"] * (not config.only_tests):
        given, own = settings[name], getattr(facts, name)
        if own is None or given in (None, own):
            found[name] = own if given is None else given
        elif name == "image_size" and config.only_tests:
            print_rank0(
                f"the classifier was trained at {own} pixels, and is tested at {given} "
                "(--image-size)"
            )
        elif name == "test_resize" and config.only_tests:
            print_rank0(
                f"the classifier was chosen on test images that were resized as {own}, and is "
                f"tested on images resized as {given} (--test-resize)"
            )
        else:
            given, own = (
                " ".join(map(str, one)) if isinstance(one, list) else one for one in (given, own)
            )
            raise InputError(
                f"--{name.replace('_', '-')} {given}: {path} was trained with {own}; leave it out"
            )
    return replaced(config, **found)


def _alike(saved: object, given: object) -> bool:
    """Return whether a value in a checkpoint has the type of the option's value in this run.

    If either is None, the value may be None, a string or a number.
    """
    if isinstance(given, list):
        return isinstance(saved, list) and bool(saved) and all(_alike(one, 0.0) for one in saved)
    if given is None or saved is None:
        return isinstance(saved, str | int | float | None)
    number = isinstance(given, int | float)
    return isinstance(saved, int | float) if number else isinstance(saved, type(given))


def check_distinct(flag: str, values: Iterable[float | str]) -> None:
    """Raise InputError if a value of an option is given twice, or prints like another one."""
    # numbers are printed as in the names of results
    printed = [value if isinstance(value, str) else f"{value:g}" for value in values]
    if len(set(printed)) < len(printed):
        raise InputError(f"{flag} {' '.join(printed)}: a value is given twice; give each once")


def load_network(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """Return the encoder of `--pretrained` with a new classifier, on `device`.

    Without `--pretrained` the encoder is randomly initialised.

    Args:
        config: the settings of the evaluation.
        num_classes: number of outputs of the classifier.
        device: the device of this process.

    Raises InputError if the checkpoint cannot be read or does not fit.
    """
    torch.manual_seed(config.run.seed)
    arch, image_size, path = (
        config.network.arch,
        config.views.image_size,
        config.encoder.pretrained,
    )
    net = create_network(config, num_classes)
    if tests_full_network(config):
        print_rank0(f"testing the classifier of {config.log.resume}, {arch} at {image_size} pixels")
    elif path:
        state = checkpoint.load(path)
        print_rank0(f"{path}: {_load(net, config, state)}")
        facts = metadata.read_metadata(state)
        if facts.image_size not in (None, image_size):
            print_rank0(
                f"it was pre-trained at {facts.image_size} pixels, and is used at {image_size} "
                "(--image-size)"
            )
        _print_other_normalization(config, facts)
    else:
        print_rank0(f"no --pretrained: a randomly initialised {arch}")
    return precision.prepare_model(
        net, device, config.compute.compile, config.compute.grad_checkpoint
    )


def create_network(config: Config, out: int) -> nn.Module:
    """Return the network of an evaluation, randomly initialized, with `out` outputs.

    Raises InputError like `networks.create`.
    """
    network = config.network
    size, drop_path = config.views.image_size, config.drop_path
    # a line at the start says if --drop-path has no effect
    drop_path = drop_path if drop_path and trial.has_stochastic_depth(network, size) else 0.0
    options = (drop_path, network.stem, network.norm_eps)
    return networks.create(network.arch, out, size, *options, any_size=config.any_size)


def _print_other_normalization(config: Config, facts: metadata.Metadata) -> None:
    """Print a line if `--mean` or `--std` differs from that of the checkpoint."""
    settings = flat(config)
    names = [name for name in ("mean", "std") if getattr(facts, name) not in (None, settings[name])]
    if names:
        own, given = (
            " and ".join(f"{name} {' '.join(f'{one:g}' for one in source[name])}" for name in names)
            for source in (facts._asdict(), settings)
        )
        options = ", ".join(f"--{name}" for name in names)
        print_rank0(
            f"images were normalized with {own} in pre-training, and with {given} here ({options})"
        )


def _load(net: nn.Module, config: Config, state: checkpoint.State) -> str:
    """Load the backbone, and the layers of the projection head that the evaluation uses.

    Returns a line with the number of tensors that matched and the encoder that was chosen.
    """
    tensors = encoders.tensors_of(net, state)
    matched = encoders.load_backbone(net, tensors, config.encoder.pretrained)
    chosen = encoders.describe_choice(net, tensors)
    if kept := config.kept_layers:
        encoders.keep_projection(net, tensors, kept, config.encoder.pretrained)
    if config.use_head_features:
        encoders.load_projection(net, tensors, config.encoder.pretrained)
    line = f"{matched} of {len(networks.backbone_keys(net))} backbone tensors matched"
    return f"{line} ({chosen})" if chosen else line


def check_head(config: Evaluation) -> None:
    """Raise InputError if the features are those of a projection head, and there is none."""
    if config.use_head_features and not (config.encoder.pretrained or config.files.load_features):
        what = "needs a checkpoint with a projection head"
        raise InputError(f"--features head: {what}; give it with --pretrained")


def complete_features(config: Evaluation, multi_label: bool) -> Evaluation:
    """Return `config` with the settings of the checkpoint or of the features of `--load-features`.

    This is `complete` for a script that classifies frozen features.

    Args:
        config: the settings of the evaluation.
        multi_label: whether the evaluation is for images that can show several classes.

    Raises InputError if the data, checkpoint or features do not fit.
    """
    config = feature_files.complete(config, multi_label)
    if not config.files.load_features:
        config = complete(config)
        feature_files.check_dump(config)
    return config


def frozen_features(
    config: Evaluation, device: torch.device, unit_norm: bool = True
) -> tuple[features.Features, features.Features, tuple[str, ...]]:
    """Return this rank's training and validation features, and the class names.

    The features are loaded from `--load-features`, or computed by the encoder. With `--eval-data`,
    both splits have only the classes of its images.

    Args:
        config: the settings of the evaluation.
        device: the device of this process.
        unit_norm: whether computed features are normalized to norm 1.

    Raises InputError if a feature is NaN or infinite.
    """
    if config.files.load_features:
        train, val, classes = feature_files.load(config, device)
    else:
        images, val_images, _ = splits.load(config)
        if config.other_test.eval_data:
            images, val_images = other_images.restrict(images, val_images)
        net = load_network(config, len(images.classes), device)
        classes = images.classes
        train, val = feature_files.extract_splits(
            net, images, val_images, config, device, unit_norm
        )
    _check_finite(config, train[0], val[0])
    return train, val, classes


def frozen_split(
    config: Evaluation,
    device: torch.device,
    split: str,
    check: Callable[[np.ndarray], None] | None = None,
) -> tuple[features.Features, tuple[str, ...]]:
    """Return this rank's features of one split, and the class names; see `frozen_features`.

    Computed features have norm 1. The other split is not read.

    Args:
        config: the settings of the evaluation.
        device: the device of this process.
        split: train or val.
        check: a function that is called with the labels before features are computed. It raises
            InputError if they do not fit the evaluation.
    """
    if config.files.load_features:
        train, val, classes = feature_files.load(config, device)
        found = train if split == "train" else val
    else:
        images, val_images, _ = splits.load(config)
        chosen, classes = images if split == "train" else val_images, images.classes
        if check is not None:
            check(chosen.labels)
        net = load_network(config, len(images.classes), device)
        found = feature_files.extract_one(net, chosen, config, device)
    _check_finite(config, found[0])
    return found, classes


def _check_finite(config: Evaluation, *rows: torch.Tensor) -> None:
    """Raise InputError if features contain NaN or infinity."""
    if not all(one.sum().isfinite() for one in rows):
        source = config.files.load_features or config.encoder.pretrained
        raise InputError(
            f"{source}: its features contain NaN or infinity; "
            "the encoder diverged, or --amp fp16 overflows"
        )
