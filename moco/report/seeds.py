"""Find pre-training runs that differ only in their seed, so that their results are averaged."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moco.engine.resume import MAY_DIFFER
from moco.errors import InputError
from moco.files import read_yaml, to_json

# the total batch changes the result
_IGNORED = MAY_DIFFER - {"batch_size", "accumulation_steps", "data"} | {"seed"}


def merge(found: list[tuple[Any, Path]]) -> list[Any]:
    """Return results in which encoders that differ only in their pre-training seed are the same.

    The options of a pre-training are read from args.yaml next to the checkpoint. Without it, an
    encoder stays a row of its own. So do two encoders that have the same seed.

    Args:
        found: results, each with the path of its results.json.
    """
    options = {}
    for one, file in found:
        if one.encoder not in options or options[one.encoder] is None:
            options[one.encoder] = _options(one.encoder.checkpoint, file)
    groups = defaultdict(list)
    for encoder, known in options.items():
        if known is not None:
            groups[encoder._replace(checkpoint=None), known[0]].append((encoder, known[1]))
    renamed: dict[Any, Callable] = {}
    for members in groups.values():
        seeds = [seed for _, seed in members]
        if len(members) == 1 or len(set(seeds)) < len(seeds):
            continue
        files = ", ".join(sorted(encoder.checkpoint for encoder, _ in members))
        for encoder, seed in members:
            same = encoder._replace(checkpoint=files)
            renamed[encoder] = lambda one, same=same, seed=seed: one._replace(
                encoder=same, pretrain_seed=seed
            )
    return [renamed.get(one.encoder, lambda one: one)(one) for one, _ in found]


def _options(checkpoint: str | None, file: Path) -> tuple[str, int] | None:
    """Return the options of the run that saved `checkpoint`, as JSON, and its seed.

    Paths may be relative to an unknown folder, and runs may have been moved together with their
    evaluations, so this also searches above and next to `file`, the results.json.
    """
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    above = list(file.resolve().parents)[:4]
    near = [folder for folder in above if folder.name == path.parent.name]
    near += [folder / path.parent.name for folder in above[1:] if path.parent.name]
    for folder in (path.parent, *near):
        try:
            options = read_yaml(folder / "args.yaml")
        except InputError:
            continue
        seed = options.get("seed")
        if "pretrained" in options or not isinstance(seed, int):  # an evaluation
            continue
        kept = {name: value for name, value in options.items() if name not in _IGNORED}
        kept["data"] = Path(str(options.get("data"))).name
        return to_json(kept, sort_keys=True), seed
    return None
