"""The settings of a run: sections put together, and how they become one flat table.

A script's settings are a subclass of `Pretraining`, `Probing` or `Evaluation`; the sections that are
its fields' defaults hold the script's defaults.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from moco.sections import (
    Classifier,
    Compute,
    Encoder,
    FeatureFiles,
    Input,
    Labels,
    Launch,
    Log,
    Monitor,
    Network,
    Optimizer,
    Retention,
    Run,
    Schedule,
    Views,
)

# mean and standard deviation of ImageNet's images, R, G and B in [0, 1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    """The settings that every run has."""

    TRAINS: ClassVar[bool] = False  # whether the run trains, and can be resumed
    EVALUATES: ClassVar[bool] = False  # whether it evaluates an encoder
    TRANSFORMERS: ClassVar[bool] = True  # whether other networks than ResNets may train

    run: Run = Run()
    input: Input = Input()
    views: Views = Views()
    network: Network = Network()
    compute: Compute = Compute()
    launch: Launch = Launch()

    @property
    def only_tests(self) -> bool:
        """Return whether the run tests a classifier that an earlier run has trained."""
        return False

    @property
    def kept_layers(self) -> int:
        """Return how many layers of the projection head stay below a classifier."""
        return 0

    @property
    def of_head(self) -> bool:
        """Return whether features are those of the projection head, not of the backbone."""
        return False

    @property
    def labels(self) -> Labels | None:
        """Return which labels are used; None for all."""
        return None

    @property
    def val_from_train(self) -> float | None:
        """Return the fraction of the training images to choose a classifier on, if any."""
        return None


@dataclass(frozen=True)
class Training(Config):
    """The settings of a run that trains."""

    TRAINS: ClassVar[bool] = True
    SCHEDULED: ClassVar[bool] = False  # whether the method, too, depends on --epochs

    optimizer: Schedule = Optimizer()
    log: Log = Log()


@dataclass(frozen=True)
class Pretraining(Training):
    """The settings of a pre-training. A script adds those of its method."""

    TRANSFORMERS: ClassVar[bool] = False

    optimizer: Optimizer = Optimizer(schedule=(120, 160))
    retention: Retention = Retention()
    monitor: Monitor = Monitor()


@dataclass(frozen=True)
class Evaluation(Config):
    """The settings of an evaluation of frozen features."""

    EVALUATES: ClassVar[bool] = True

    views: Views = Views(image_size=None)
    network: Network = Network(arch=None)
    encoder: Encoder = Encoder()
    files: FeatureFiles = FeatureFiles()

    @property
    def on_host(self) -> bool:
        """Return whether features are kept in the host's memory, not on the GPU."""
        return False


@dataclass(frozen=True)
class Probing(Training):
    """The settings of an evaluation that trains a classifier."""

    EVALUATES: ClassVar[bool] = True

    views: Views = Views(recipe="probe", image_size=None)
    network: Network = Network(arch=None)
    encoder: Encoder = Encoder()
    classifier: Classifier = Classifier()

    @property
    def only_tests(self) -> bool:
        """Return whether the run tests a classifier that an earlier run has trained."""
        return self.classifier.evaluate

    @property
    def val_from_train(self) -> float | None:
        """Return the fraction of the training images to choose a classifier on, if any."""
        return self.classifier.val_from_train


AnyConfig = TypeVar("AnyConfig", bound=Config)


def sections(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each section of a config."""
    for one in dataclasses.fields(config):
        yield one.name, getattr(config, one.name)


def flat(config: Any) -> dict[str, Any]:
    """Return all settings by name, as args.yaml and checkpoints hold them; tuples become lists."""
    found = {}
    for _, section in sections(config):
        for one in dataclasses.fields(section):
            value = getattr(section, one.name)
            found[one.name] = list(value) if isinstance(value, tuple) else value
    return found


def replaced(config: AnyConfig, **values: Any) -> AnyConfig:
    """Return `config` with some settings changed, given by name. Raises KeyError for an unknown name."""
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
