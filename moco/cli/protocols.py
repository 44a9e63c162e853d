"""Choose the protocol of an evaluation: the settings of a paper, which become the defaults."""

from collections.abc import Container, Mapping
from typing import NamedTuple

from moco.config import Config, flat
from moco.encoder import archs, metadata
from moco.encoder.archs import ARCHS
from moco.errors import InputError, unknown
from moco.launch import processes
from moco.methods import METHODS, PROTOCOLS, Method, Protocol


class Choice(NamedTuple):
    """A protocol, and the reason why it was chosen, to print."""

    protocol: Protocol
    why: str


def names(script: str) -> list[str]:
    """Return the names of the protocols of `script`, such as main_lincls. Its default is first."""
    return list(dict.fromkeys(one.name for one in PROTOCOLS if one.script == script))


def apply(script: str, settings: Mapping[str, object]) -> bool:
    """Return whether `script` has a protocol for these settings.

    main_retrieval.py has them for some data sets only.
    """
    return any(one.script == script and _fits(one, settings) for one in PROTOCOLS)


def _fits(protocol: Protocol, settings: Mapping[str, object]) -> bool:
    return all(settings.get(option) == value for option, value in protocol.options.items())


def name_of(recipe: str) -> str | None:
    """Return the name of the protocol whose settings a recipe of configs/ has, if any."""
    return next((one.name for one in PROTOCOLS if one.recipe == recipe), None)


def choose(script: str, settings: Mapping[str, object], given: Mapping[str, object]) -> Choice:
    """Return the protocol that `--protocol` names, or else that of the checkpoint's method.

    Args:
        script: the evaluation script, without .py.
        settings: all settings by name.
        given: those of the command line.

    Raises InputError if the name is unknown, or if the protocol needs other options.
    """
    known, path = names(script), settings.get("pretrained")
    named = given.get("protocol")
    if named is not None and named not in known:
        raise unknown("protocol", named, known)
    # a named protocol needs the checkpoint only if its settings depend on the network
    mine = [one for one in PROTOCOLS if (one.script, one.name) == (script, named)]
    by_network = any(one.transformers for one in mine) and not settings.get("arch")
    facts = _read(path) if path and (named is None or by_network) else None
    settings = {**settings, "arch": settings.get("arch") or (facts.arch if facts else None)}
    if named is not None:
        return Choice(_recipe(script, named, settings), "--protocol")
    name, why = _of_checkpoint(path, facts, known)
    found = _recipe(script, name, settings, f" ({why})" if name != known[0] else "")
    others = [f"--{option.replace('_', '-')}" for option in found.unless if option in given]
    if others:
        why = f"the default, because {others[0]} is given; the checkpoint's is {name}"
        found = _recipe(script, known[0], settings)
    return Choice(found, why)


def _read(path: object) -> metadata.Metadata | None:
    """Return the facts in a checkpoint; None if it cannot be read."""
    from moco.engine import checkpoint  # it imports torch, which --help does not need

    try:
        return metadata.read_metadata(checkpoint.load(str(path)))
    except InputError:  # the evaluation will raise it again when it loads the encoder
        return None


def _of_checkpoint(
    path: object, facts: metadata.Metadata | None, known: list[str]
) -> tuple[str, str]:
    """Return the name of the protocol for a checkpoint, if there is any, and the reason.

    Args:
        path: the checkpoint.
        facts: the facts in it.
        known: the names of the script's protocols, the default first.
    """
    default = known[0]
    if not path:
        return default, "the default, because there is no --pretrained"
    if facts is None:
        return default, f"the default; {path} cannot be read"
    method = _method(facts)
    if method is None:
        return default, f"the default, because {path} does not name a method of this project"
    name = f"{method.saved or method.name} ({method.script}.py)"
    if method.protocol in known:
        return method.protocol, f"that of {name}, with which {path} was pre-trained"
    return default, f"the default; {path} was pre-trained with {name}"


def _method(found: metadata.Metadata) -> Method | None:
    """Return the method that pre-trained an encoder, if it is one of this project's.

    SynCo and SynCo-v2 have the same name in checkpoints. If the checkpoint does not name the script
    of its pre-training, as those of earlier versions' classifiers, the network tells which: at that
    time, only main_moby.py trained transformers.
    """
    name = found.method.removesuffix(", fine-tuned")
    same = [one for one in METHODS.values() if name == (one.saved or one.name)]
    by_script = [one for one in same if one.script == f"main_{found.script}"]
    transformer = found.arch is not None and found.arch not in ARCHS
    by_arch = [one for one in same if (one.script == "main_moby") == transformer]
    return next(iter(by_script or by_arch or same), None)


def _recipe(script: str, name: str, settings: Mapping[str, object], why: str = "") -> Protocol:
    """Return the first protocol of that name for the network and options of the settings.

    `why` is the reason for the name, for the error.

    Raises InputError if there is none.
    """
    mine = [one for one in PROTOCOLS if (one.script, one.name) == (script, name)]
    transformer = bool(settings["arch"]) and archs.is_transformer(str(settings["arch"]))
    for one in mine:
        if _fits(one, settings) and (transformer or not one.transformers):
            return one
    needed = " or ".join(
        f"--{option.replace('_', '-')} {value}"
        for one in mine
        for option, value in one.options.items()
    )
    others = " or ".join(f"--protocol {other}" for other in names(script) if other != name)
    raise InputError(f"protocol {name}{why} has settings only for {needed}; give one, or {others}")


def note_batch(config: Config, given: Container[str]) -> str | None:
    """Return a line if a published command would have another total batch than this one.

    `--batch-size` counts the images of a process in the scripts of MoBY and SynCo-v2, and those of
    the node in the evaluations here.

    Args:
        config: the settings of the evaluation.
        given: the names of the options on the command line.
    """
    if flat(config).get("protocol") != "moby" or "batch_size" not in given:
        return None
    if (n := processes.plan(config.launch).local_world_size) == 1:
        return None
    batch = config.input.batch_size
    return (
        f"--batch-size {batch} is the total of all {n} processes. In the authors' script, it is "
        f"the batch of each process: for {batch} each, give --batch-size {batch * n}"
    )
