#!/usr/bin/env python
"""Retrieval: rank images by the similarity of the features of a pre-trained encoder.

On folders of classes and other data sets, the images of val/ are searched in train/, or in val/
itself (--database val). --dataset roxford5k and rparis6k are revisited Oxford and Paris, with their
own evaluation. Without --pretrained, the encoder is randomly initialised, which is the baseline to
compare with.
"""

import dataclasses
from dataclasses import dataclass

from moco import config, sections, sections_eval
from moco.cli import entry
from moco.cli.effects import Options
from moco.cli.parser import Parser
from moco.cli.types import Device
from moco.data import catalog
from moco.messages import print_rank0
from moco.sections import option


@dataclass(frozen=True)
class Input(sections.Input):
    """The images of this script."""

    dataset: str = option(
        "imagenet",
        f"data set in DIR: {', '.join(catalog.REVISITED)}, {{datasets}}",
        metavar="NAME",
    )


@dataclass(frozen=True)
class Config(config.Evaluation):
    """The settings of this script."""

    input: Input = Input()
    retrieval: sections_eval.Retrieval = sections_eval.Retrieval()
    extraction: sections_eval.Extraction = sections_eval.Extraction()

    @property
    def compared(self) -> sections_eval.Compared:
        """Return the settings of the features to compare."""
        return self.retrieval

    @property
    def any_size(self) -> bool:
        """Return whether the network must take images of any size and shape."""
        how, size = self.extraction, self.views.image_size
        one_size = how.center_crop and not how.multiscale and how.imsize == size
        return is_revisited(self.input) and not one_size


def is_revisited(options: Input | Options) -> bool:
    return options.dataset in catalog.REVISITED


def parser() -> Parser:
    p = Parser(__doc__, Config())
    own = "protocol imsize crop_queries center_crop multiscale scales pooling normalize_scales ap"
    only = f"it is for --dataset {' and '.join(catalog.REVISITED)}; leave it out"
    p.has_effect(own, is_revisited, only)
    shapes = "images keep their shapes, and --imsize limits their longer side; leave it out"
    names = "image_size test_resize batch_size compile"
    p.has_effect(names, lambda args: not is_revisited(args), shapes)
    own = "the data set has its own queries and database, and is downloaded by hand; leave it out"
    names = "database features host_features dump_features load_features class_list download"
    p.has_effect(names, lambda args: not is_revisited(args), own)
    one = "there is one scale; give --multiscale as well, or leave it out"

    def joins_scales(args: Options) -> bool:
        # a protocol names its scales even if --multiscale is off by default
        return args.multiscale or not is_revisited(args) or "scales" not in p.given

    p.has_effect("scales", joins_scales, one)
    both = "features of both splits are saved, and --database val needs no train/; leave out either"
    p.has_effect("dump_features", lambda args: args.database == "train", both)
    return p


def complete(c: Config) -> Config:
    from moco.evaluate import inputs, revisited, whole_images

    inputs.check_distinct("--k", c.retrieval.k)
    if is_revisited(c.input):
        revisited.read(c.input.dataset, c.run.data)
        c = inputs.complete_encoder(c)
        return config.replaced(c, pooling=whole_images.check(c, c.extraction), test_resize=None)
    inputs.check_head(c)
    c = inputs.complete_features(c, multi_label=False)
    none = dict.fromkeys(field.name for field in dataclasses.fields(c.extraction))
    return config.replaced(c, features=c.retrieval.features or "backbone", **none)


def worker(c: Config, device: Device) -> None:
    from moco.evaluate import inputs, results, retrieval, whole_images

    ks, within = list(c.retrieval.k), c.retrieval.database == "val"
    if is_revisited(c.input):
        name = c.retrieval.protocol
        found = whole_images.evaluate(c, c.extraction, ks, device)
        results.write_results(c, f"retrieval {name}" if name else "retrieval", found)
        return
    if within:
        database, _ = inputs.frozen_split(c, device, "val")
        queries = database
    else:
        database, queries, _ = inputs.frozen_features(c, device)
    found = retrieval.measure(database, queries, ks, within)
    where = "the other images of val/" if within else "train/"
    recalls = "  ".join(f"Recall@{k} {100 * found[f'recall_{k}']:.3f}" for k in ks)
    print_rank0(f"* mAP {100 * found['map']:.3f}  {recalls}  (in {where})")
    results.write_results(c, "retrieval in val" if within else "retrieval", found)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
