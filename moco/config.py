"""Combine the sections of settings into the config of a run, and convert it to one flat dict.

The settings of a script are a subclass of `Pretraining`, `Probing` or `Evaluation`. Its fields are
the sections, and the defaults of the sections are the script's defaults.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from moco.sections import (
    Compute,
    Input,
    Launch,
    Log,
    Monitor,
    Network,
    Optimizer,
    Retention,
    Run,
    Schedule,
    Tracking,
    Views,
)
from moco.sections_eval import Classifier, Compared, Encoder, FeatureFiles, Labels, OtherTest
from moco.sections_eval import Views as EvaluationViews
from moco.sections_pretrain import Listed, Start

# mean and standard deviation of ImageNet's images, R, G and B in [0, 1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    """The base class of the settings of a run.

    Attributes:
        TRAINS: whether the run trains, and can be resumed.
        EVALUATES: whether the run evaluates an encoder.
    """

    TRAINS: ClassVar[bool] = False
    EVALUATES: ClassVar[bool] = False

    run: Run = Run()
    input: Input = Input()
    views: Views = Views()
    network: Network = Network()
    compute: Compute = Compute()
    launch: Launch = Launch()
    tracking: Tracking = Tracking()

    @property
    def only_tests(self) -> bool:
        """Return whether the run only tests a classifier that an earlier run has trained."""
        return False

    @property
    def kept_layers(self) -> int:
        """Return the number of layers of the projection head to keep below the classifier."""
        return 0

    @property
    def any_size(self) -> bool:
        """Return whether the evaluated network must take images of any size and shape."""
        return False

    @property
    def other_test(self) -> OtherTest:
        """Return the settings of test images in another folder than the training images."""
        return OtherTest()

    @property
    def compared(self) -> Compared | None:
        """Return the settings of the features to compare, if the evaluation has them."""
        return None

    @property
    def use_head_features(self) -> bool:
        """Return whether to use the features of the projection head instead of the backbone."""
        return self.compared is not None and self.compared.features == "head"

    @property
    def labels(self) -> Labels | None:
        """Return the settings of the labels to use; None for all labels."""
        return None

    @property
    def val_from_train(self) -> float | None:
        """Return the fraction of training images held out to choose the classifier on, or None."""
        return None

    @property
    def drop_path(self) -> float:
        """Return the rate of stochastic depth of the evaluated network in training."""
        return 0.0


@dataclass(frozen=True)
class Training(Config):
    """The settings of a run that trains."""

    TRAINS: ClassVar[bool] = True

    optimizer: Schedule = Optimizer()
    log: Log = Log()

    @property
    def depends_on_epochs(self) -> bool:
        """Return whether a schedule other than the learning rate's depends on --epochs."""
        return False


@dataclass(frozen=True)
class Pretraining(Training):
    """The settings of a pre-training. Each script adds the settings of its method."""

    listed: Listed = Listed()
    start: Start = Start()
    optimizer: Optimizer = Optimizer(schedule=(120, 160))
    retention: Retention = Retention()
    monitor: Monitor = Monitor()


@dataclass(frozen=True)
class Evaluation(Config):
    """The settings of an evaluation of frozen features."""

    EVALUATES: ClassVar[bool] = True

    views: Views = EvaluationViews(image_size=None)
    network: Network = Network(arch=None)
    encoder: Encoder = Encoder()
    files: FeatureFiles = FeatureFiles()

    @property
    def on_host(self) -> bool:
        """Return whether to keep features in the host's memory instead of on the GPU."""
        return self.compared is not None and self.compared.host_features


@dataclass(frozen=True)
class Probing(Training):
    """The settings of an evaluation that trains a classifier."""

    EVALUATES: ClassVar[bool] = True

    views: Views = EvaluationViews(recipe="probe", image_size=None)
    network: Network = Network(arch=None)
    encoder: Encoder = Encoder()
    classifier: Classifier = Classifier()

    @property
    def only_tests(self) -> bool:
        """Return whether the run only tests a classifier that an earlier run has trained."""
        return self.classifier.evaluate

    @property
    def val_from_train(self) -> float | None:
        """Return the fraction of training images held out to choose the classifier on, or None."""
        return self.classifier.val_from_train

    @property
    def drop_path(self) -> float:
        """Return the rate of stochastic depth of the evaluated network in training."""
        return self.classifier.drop_path


AnyConfig = TypeVar("AnyConfig", bound=Config)


def sections(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each section of a config."""
    for one in dataclasses.fields(config):
        yield one.name, getattr(config, one.name)


def flat(config: Any) -> dict[str, Any]:
    """Return all settings by name, as in args.yaml and checkpoints. Tuples become lists."""
    found = {}
    for _, section in sections(config):
        for one in dataclasses.fields(section):
            value = getattr(section, one.name)
            found[one.name] = list(value) if isinstance(value, tuple) else value
    return found


def replaced(config: AnyConfig, **values: Any) -> AnyConfig:
    """Return a copy of `config` with new `values`. Raises KeyError for an unknown name."""
    changed = {}
    for name, section in sections(config):
        mine = {one.name for one in dataclasses.fields(section)} & values.keys()
        if mine:
            new = {one: values.pop(one) for one in mine}
            new = {key: tuple(one) if isinstance(one, list) else one for key, one in new.items()}
            changed[name] = dataclasses.replace(section, **new)
    if values:
        raise KeyError(f"{type(config).__name__} has no setting {', '.join(values)}")
    return dataclasses.replace(config, **changed)
