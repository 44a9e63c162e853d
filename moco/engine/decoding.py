"""Complete the settings that say how a run decodes images: its own, or those of a checkpoint."""

from moco.config import AnyConfig, replaced
from moco.encoder.metadata import Metadata
from moco.messages import print_rank0
from moco.sections_images import Decoding

# settings of runs of earlier versions, which lacked these options
BEFORE = {"exif": "ignore", "white": None, "shrink_on_decode": True}


def of_resumed(facts: Metadata) -> Metadata:
    """Return the facts of a checkpoint of `--resume`, whose run may be of an earlier version."""
    own = {name: getattr(facts, name) for name in BEFORE}
    return facts._replace(
        **{name: BEFORE[name] if own[name] is None else own[name] for name in own}
    )


def complete(config: AnyConfig, facts: Metadata | None = None) -> AnyConfig:
    """Return the config of an evaluation, with the decoding of a checkpoint. Given options win.

    Print a line if the checkpoint's settings are not the defaults, or not those of this run. The
    training views of an evaluation do not depend on whether the pre-training shrank images.
    """
    images, found = config.input, {}
    for name, default in (("exif", "ignore"), ("white", None)):
        given, own = getattr(images, name), getattr(facts, name, None)
        found[name] = used = given or own or default
        if facts and used != (own or default):
            before = f"with {_option(name, own)}" if own else f"without --{name}"
            here = _option(name, used)
            print_rank0(f"images were decoded {before} in pre-training, and with {here} here")
        elif not given and used != default:
            print_rank0(f"images are decoded with {_option(name, used)}, as in pre-training")
    return replaced(config, **found, shrink_on_decode=bool(images.shrink_on_decode))


def options(settings: Decoding) -> str:
    """Return the options with which images are decoded, except for defaults."""
    given = ["--exif apply"] * (settings.exif == "apply")
    given += [_option("white", settings.white)] if settings.white else []
    return ", ".join(given + ["--shrink-on-decode"] * bool(settings.shrink_on_decode))


def _option(name: str, value: str | float) -> str:
    """Return an option as on the command line."""
    return f"--{name} {value}" if isinstance(value, str) else f"--{name} {value:g}"
