"""Declare when the options of the shared sections have no effect.

Each function declares the rules of one section with `EffectsParser.has_effect`. Its condition gets
an object that has all settings as attributes, and the config itself as `config`. Conditions are
called after the options are parsed, so they may import modules that import torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

from moco import sections, sections_eval, sections_methods, sections_pretrain
from moco.augment import recipes
from moco.cli.effects import EffectsParser, Options
from moco.config import Config
from moco.data import catalog
from moco.encoder import archs
from moco.encoder.archs import ARCHS
from moco.engine import lr_schedule
from moco.launch import processes
from moco.loss.settings import TYPES
from moco.sections_negatives import COUNTS, BatchNegatives, SyntheticNegatives

Declare = Callable[[EffectsParser], None]
TWO_SOURCES = "--dataset, or the word photos, already names the images; leave out one of them"
_AUGMENTATION = " ".join(one.name for one in recipes.CHANGES)


def section_rules(config: Config) -> Iterator[Declare]:
    """Yield the functions that declare the rules of the sections of `config`."""
    for section in vars(config).values():
        for section_type in type(section).__mro__:
            if section_type in _RULES:
                yield _RULES[section_type]


def _input(parser: EffectsParser) -> None:
    folder = "image folders are not downloaded; give --dataset NAME for a data set to download, "
    folder += "or leave it out"
    of_photos = lambda args: args.dataset not in ("imagenet", "photos")  # noqa: E731
    parser.has_effect("download", of_photos, folder)
    only = "it is for folders of ImageNet; leave it out"
    parser.has_effect("data_name", lambda args: args.dataset == "imagenet", only)
    photos = "the word photos already names the data set; for another one, give its folder instead"
    same = lambda args: args.data != "photos" or parser.given.get("dataset") == "photos"  # noqa: E731
    parser.has_effect("dataset", same, photos)
    arrays = "the images of this data set are not in image files; leave it out"
    in_files = lambda args: args.dataset not in catalog.IN_MEMORY  # noqa: E731
    parser.has_effect("exif white shrink_on_decode", in_files, arrays)


def _views(parser: EffectsParser) -> None:
    def declare(name: str, condition: Callable[..., bool], why: str) -> None:
        def when(args: Options) -> bool:
            views = args.config.views
            # a missing recipe is reported elsewhere; incomplete settings have no size
            known = args.recipe and args.image_size
            return not known or condition(recipes.from_settings(views), views)

        parser.has_effect(name, when, why)

    for name, (condition, why) in recipes.EFFECTS.items():
        declare(name, condition, why)


def _network(parser: EffectsParser) -> None:
    only = "it is for torchvision's ResNets; leave it out"
    parser.has_effect("stem", lambda args: args.arch in ARCHS, only)
    swin = "it is for Swins; leave it out"
    parser.has_effect("norm_eps", lambda args: archs.is_swin(args.arch or ""), swin)


def _launch(parser: EffectsParser) -> None:
    def plan(args: Options) -> processes.Plan:
        return processes.plan(args.config.launch)

    spawned = "it counts the processes that --multiprocessing-distributed starts; "
    spawned += "give both, or neither"
    parser.has_effect("nproc_per_node", lambda args: plan(args).launcher == "spawn", spawned)
    own = "there are several processes, and each has its own GPU; leave it out"
    parser.has_effect("gpu", lambda args: plan(args).local_world_size == 1, own)
    alone = "the run has one process"
    for name in ("dist_url", "dist_backend"):
        parser.has_effect(name, lambda args: plan(args).url, alone, refuse=False)
    launcher = "the launcher sets the address and the number of nodes"
    counts = lambda args: plan(args).launcher in ("spawn", "single")  # noqa: E731
    parser.has_effect("world_size rank", counts, launcher, refuse=False)
    found = lambda args: plan(args).launcher != "torchrun"  # noqa: E731
    parser.has_effect("dist_url", found, launcher, refuse=False)


def _compute(parser: EffectsParser) -> None:
    def exchanges(args: Options) -> bool:
        # an evaluation refuses the option elsewhere
        off = args.grad_compress == "off" or not args.config.TRAINS
        return off or processes.plan(args.config.launch).world_size > 1

    alone = "the run has one process, which exchanges no gradients; leave it out"
    parser.has_effect("grad_compress", exchanges, alone)


def _schedule(parser: EffectsParser) -> None:
    def cosine(args: Options) -> bool:
        return args.cos or args.sgdr

    def begins(args: Options) -> bool:
        return cosine(args) or min(args.schedule, default=0) < args.epochs

    follows = "the learning rate follows a cosine (--cos, --sgdr); "
    follows += "leave it out, or give --no-cos and --no-sgdr"
    parser.has_effect("schedule", lambda args: not cosine(args), follows)
    late = "the run ends before the first of these epochs"
    parser.has_effect("schedule", begins, late, refuse=False)
    own = "--sgdr is another cosine schedule; give only one of them"
    parser.has_effect("cos", lambda args: not args.sgdr, own)
    steps = "--sgdr changes the learning rate at each step (--lr-by step); leave it out"
    parser.has_effect("lr_by", lambda args: not args.sgdr or args.lr_by == "step", steps)
    period = "it is the period of --sgdr; give both, or neither"
    parser.has_effect("sgdr_t0", lambda args: args.sgdr, period)
    ends = "it is the end of a cosine schedule; give --cos as well, or leave it out"
    parser.has_effect("lr_final", cosine, ends)
    quarter = "the cosine of --cos 2 ends at 0; leave it out, or give --cos 1"
    parser.has_effect("lr_final", lambda args: args.sgdr or args.cos != 2, quarter)
    changes = "the learning rate changes at the epochs of --schedule alone; leave it out"
    parser.has_effect("lr_by", lambda args: cosine(args) or args.lr_warmup_epochs, changes)
    warmup = "it is the start of the warm-up; give --lr-warmup-epochs as well, or leave it out"
    parser.has_effect("lr_warmup_from", lambda args: args.lr_warmup_epochs, warmup)
    rises = "with --lr-by epoch, the warm-up rises from 0; give --lr-by step, or leave it out"
    by_epoch = lambda args: lr_schedule.changes_by(args.config.optimizer) == "epoch"  # noqa: E731
    parser.has_effect("lr_warmup_from", lambda args: not by_epoch(args), rises)
    adam = "adam and adamw do not use it; leave it out"
    uses = lambda args: args.optimizer not in ("adam", "adamw")  # noqa: E731
    parser.has_effect("momentum", uses, adam, zero_is_off=False)
    sgd = "it is for --optimizer sgd; leave it out"
    parser.has_effect("nesterov", lambda args: args.optimizer == "sgd", sgd)


def _listed(parser: EffectsParser) -> None:
    parser.has_effect("file_list", lambda args: args.file_list, TWO_SOURCES)


def _start(parser: EffectsParser) -> None:
    resumed = "the run continues with the weights of its checkpoint (--resume)"
    parser.has_effect("init", lambda args: not args.resume, resumed, refuse=False)


def _monitor(parser: EffectsParser) -> None:
    off = "k-NN is not measured; give --knn-every EPOCHS as well, or leave it out"
    parser.has_effect("knn_k knn_t knn_features", lambda args: args.knn_every, off)


def _classifier(parser: EffectsParser) -> None:
    frozen = "--weights freeze trains no block of the network; leave it out"
    parser.has_effect("grad_checkpoint", lambda args: args.weights == "finetune", frozen)
    running = "--weights freeze uses the running statistics of batch norm; leave it out"
    parser.has_effect("sync_bn", lambda args: args.weights == "finetune", running)
    several = lambda args: processes.plan(args.config.launch).world_size > 1  # noqa: E731
    parser.has_effect("sync_bn", several, "the run has one process", refuse=False)
    parser.has_effect("sync_bn", _has_batch_norm, _NO_BATCH_NORM)
    none = "the network has no stochastic depth; leave it out"
    parser.has_effect("drop_path", _has_stochastic_depth, none)
    binary = "each image has several labels, and the loss is binary; leave it out"
    one_label = lambda args: catalog.METRIC[args.dataset] != "map11"  # noqa: E731
    parser.has_effect("label_smoothing", one_label, binary)
    trains = "epochs optimizer lr lr_backbone lr_classifier learning_rate_scaling wd schedule cos"
    trains += " lr_by sgdr sgdr_t0 lr_final lr_warmup_epochs lr_warmup_from momentum clip_grad"
    trains += " nesterov accumulation_steps print_freq save_every_steps on_bad_image recipe"
    trains += f" {_AUGMENTATION} zero_init_classifier sync_bn grad_checkpoint grad_compress"
    trains += " pretrained cache_images shrink_on_decode label_smoothing drop_path protocol"
    only_tests = "--evaluate only tests the classifier of --resume"
    parser.has_effect(trains, lambda args: not args.evaluate, only_tests, refuse=False)
    last = "only the last and the best checkpoint of a classifier are kept; leave it out"
    parser.has_effect("save_every", lambda args: False, last)


def _feature_files(parser: EffectsParser) -> None:
    centre = "this script uses centre crops and trains nothing; leave it out"
    views = f"recipe {_AUGMENTATION} shrink_on_decode grad_checkpoint grad_compress"
    parser.has_effect(views, lambda args: False, centre)
    once = "this script reads images from their files; leave it out"
    parser.has_effect("cache_images", lambda args: False, once)
    loaded = "features come from files (--load-features)"
    files = (
        "batch_size workers exif white image_size test_resize stem norm_eps mean std amp compile"
    )
    files += " data dataset download data_name seed"
    parser.has_effect(files, lambda args: not args.load_features, loaded, refuse=False)


def _compared(parser: EffectsParser) -> None:
    def on_gpu(args: Options) -> bool:
        from moco import devices

        return devices.resolve_type(args.device) != "cpu"

    on_cpu = "there is no GPU, so features are always in the host's memory"
    parser.has_effect("host_features", on_gpu, on_cpu, refuse=False)


def _other_test(parser: EffectsParser) -> None:
    alone = "it maps the class folders of --eval-data; give both, or leave it out"
    parser.has_effect("class_map", lambda args: args.eval_data, alone)


_NO_BATCH_NORM = "the network has no batch norm; leave it out"


def _has_network(args: Options) -> bool:
    """Return whether the settings are complete: others may have no arch and no size."""
    return bool(args.arch and args.image_size)


def _has_batch_norm(args: Options) -> bool:
    from moco.encoder import trial

    network, size = args.config.network, args.image_size
    return not _has_network(args) or args.arch in ARCHS or trial.has_batch_norm(network, size)


def _has_stochastic_depth(args: Options) -> bool:
    from moco.encoder import trial

    network, size = args.config.network, args.image_size
    return not _has_network(args) or trial.has_stochastic_depth(network, size)


def _query_and_key(parser: EffectsParser) -> None:
    named = "--recipe already chooses the views; leave it out"
    follows = lambda args: args.recipe == ("mocov2" if args.aug_plus else "mocov1")  # noqa: E731
    parser.has_effect("aug_plus", follows, named)
    shuffled = "it is for a run of one process, and this run has several; leave it out"
    alone = lambda args: processes.plan(args.config.launch).world_size == 1  # noqa: E731
    parser.has_effect("bn_splits bn_splits_query", alone, shuffled)
    parser.has_effect("bn_splits bn_splits_query", _has_batch_norm, _NO_BATCH_NORM)
    one = "--bn-splits 1 makes one group; leave out one of them"
    parser.has_effect("bn_splits_query", lambda args: args.bn_splits > 1, one)


def _synthetic(parser: EffectsParser, eta: str = SyntheticNegatives.ETA) -> None:
    for count, one in zip(COUNTS, TYPES, strict=True):
        if one.size:
            none = f"there are no {one.name} negatives; give --{count} as well, or leave it out"
            size = eta if one.size == "eta" else one.size
            has = lambda args, count=count: vars(args)[count]  # noqa: E731
            parser.has_effect(size, has, none, zero_is_off=False)
    at_once = "all join at once; give --synthetic-ramp-epochs as well, or leave it out"
    has_ramp = lambda args: args.synthetic_ramp_epochs  # noqa: E731
    parser.has_effect("synthetic_ramp synthetic_ramp_of", has_ramp, at_once)


def _batch_negatives(parser: EffectsParser) -> None:
    _synthetic(parser, BatchNegatives.ETA)
    none = "there are no synthetic negatives; give --n1 to --n6 as well, or leave it out"
    has = lambda args: any(vars(args)[count] for count in COUNTS)  # noqa: E731
    options = "n_hard synthetic_first synthetic_last synthetic_ramp_epochs"
    parser.has_effect(options, has, none)


# options of other methods with a similar name, which the user may have meant
_MEANT = {
    "beta": "isogclr has --beta-u",
    "eta": "synthetic negatives have --synthetic-eta",
}


def only_with(parser: EffectsParser, losses: Sequence[str], names: str) -> None:
    """Declare that options, given by attribute names, have an effect with some --loss only."""
    why = f"only --loss {' and '.join(losses)} {'use' if len(losses) > 1 else 'uses'} it"
    if names in _MEANT:
        why += f" ({_MEANT[names]})"
    parser.has_effect(names, lambda args: args.loss in losses, f"{why}; leave it out")


def _loss(parser: EffectsParser) -> None:
    for name, losses in sections_methods.USED_BY.items():
        only_with(parser, losses, name)
    constant = "--beta is 0 from the start; leave it out"
    parser.has_effect("anneal", lambda args: args.beta, constant)


def _batch_loss(parser: EffectsParser) -> None:
    def averages(args: Options) -> bool:
        return args.loss in sections_methods.AVERAGES

    none = (
        f"only --loss {' and '.join(sections_methods.AVERAGES)} have moving averages; leave it out"
    )
    same = lambda args: args.gamma == sections_methods.GAMMA  # noqa: E731
    parser.has_effect("gamma", lambda args: averages(args) or same(args), none)
    parser.has_effect("gamma", averages, none, refuse=False)


def _temperatures(parser: EffectsParser) -> None:
    names = [one.name for one in fields(sections_methods.Temperatures) if one.name != "eta"]
    for options in (" ".join(names), "eta"):
        only_with(parser, ["isogclr"], options)


def _false_negatives(parser: EffectsParser) -> None:
    off = "false negatives are not searched (--fn-mode off, or --fn-topk 0); leave it out"
    searched = lambda args: args.fn_mode != "off"  # noqa: E731
    found = lambda args: searched(args) and args.fn_topk  # noqa: E731
    parser.has_effect("fn_topk fn_from", searched, off)
    parser.has_effect("fn_threshold", found, off, zero_is_off=False)
    similar = "only --fn-from similarity uses it; leave it out"
    compared = lambda args: not args.config.fnc.uses_labels  # noqa: E731
    parser.has_effect("fn_topk", compared, similar)
    parser.has_effect("fn_threshold", compared, similar, zero_is_off=False)
    alone = "without a memory (--memory-multiplier 0) there is one encoder; leave it out"
    parser.has_effect("ema", lambda args: args.memory_multiplier, alone, zero_is_off=False)


_RULES: dict[type, Declare] = {
    SyntheticNegatives: _synthetic,
    BatchNegatives: _batch_negatives,
    sections_methods.Loss: _loss,
    sections_methods.BatchLoss: _batch_loss,
    sections_methods.Temperatures: _temperatures,
    sections_methods.FalseNegatives: _false_negatives,
    sections.Input: _input,
    sections.Views: _views,
    sections.Network: _network,
    sections.Launch: _launch,
    sections.Compute: _compute,
    sections.Schedule: _schedule,
    sections.Monitor: _monitor,
    sections_eval.Classifier: _classifier,
    sections_eval.FeatureFiles: _feature_files,
    sections_eval.Compared: _compared,
    sections_eval.OtherTest: _other_test,
    sections.QueryAndKey: _query_and_key,
    sections_pretrain.Listed: _listed,
    sections_pretrain.Start: _start,
}
