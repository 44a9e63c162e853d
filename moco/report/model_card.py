"""Write the model card of an encoder: README.md in the layout of Hugging Face.

The texts of a checkpoint and of results.json may come from strangers. They appear only in code
spans and code blocks, which show every character as it is.
"""

import dataclasses
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from moco import sections, sections_pretrain
from moco.encoder import networks
from moco.encoder.pretrained import Encoder
from moco.errors import InputError, one_line, short
from moco.files import to_json
from moco.messages import print_rank0
from moco.methods import METHODS, trains_on_labels
from moco.report import results

_TEXT = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- transformers
- image-feature-extraction
{tag}---

# Image encoder {title}

This network maps an RGB image to {dim} features. It has no classifier.

{facts}

## How to load it

`FOLDER` is the folder of this file.

```python
import timm
import torch
from PIL import Image

net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
config = timm.data.resolve_model_data_config(net)
view = timm.data.create_transform(**config, is_training=False)
image = Image.open("image.jpg").convert("RGB")
with torch.inference_mode():
    features = net(view(image)[None])  # [1, {dim}]
```

The same with transformers:

```python
from transformers import AutoModel

net = AutoModel.from_pretrained("FOLDER")
features = net(view(image)[None]).pooler_output
```
{training}{results}
## Licence

The licence of these weights is not set here. The person who publishes them chooses it, and adds it
as `license:` to the first lines of this file. The code that wrote this folder has the licence
CC BY-NC 4.0 (Attribution-NonCommercial 4.0 International).
"""

_TRAINING = """
## How it was trained

Save the options below as `options.yaml`. This command is that of the pre-training, except for the
folders and the number of processes:

```
python {script}.py --cfg options.yaml DIR
```

```yaml
{options}
```
"""

# fields of a run's settings that do not change the encoder, or that name files and machines
_PRIVATE = {
    field.name
    for section in (
        *(sections.Launch, sections.Log, sections.Retention, sections.Monitor, sections.Run),
        *(sections_pretrain.Start, sections.Compute),
    )
    for field in dataclasses.fields(section)
} - {"seed", "amp", "script", "method"}
_PRIVATE |= {"workers", "cache_images", "class_list", "download", "batch_is_per_process"}
_PRIVATE |= {"batch_is_of_all_nodes", "batch_per_process", "nodes", "views"}
_SCRIPTS = {method.script for method in METHODS.values()}
_DEEPEST = 2  # levels of folders below the checkpoint's in which results are searched


def model_card(found: Encoder, checkpoint: Path) -> str:
    """Return the text of README.md.

    It has the facts that the checkpoint contains, and the results of its evaluations that are in
    results.json files in its folder, or up to two levels below.
    """
    options = found.options
    data = options.get("dataset")
    if data == "imagenet" and isinstance(options.get("data"), str):  # any folder of images
        data = Path(options["data"]).name
    start = options.get("init")
    facts = {
        "method": None if found.method == "unknown" else found.method,
        "labels": "used in pre-training" if trains_on_labels(found.method) else None,
        "network": found.arch,
        "epochs of pre-training": found.epoch,
        "data of pre-training": data,
        "views of pre-training": options.get("recipe"),
        "weights that pre-training started from": start and Path(str(start)).name,
        "image size": f"{found.image_size} pixels",
        "mean of RGB values in [0, 1]": _numbers(found.mean),
        "standard deviation of RGB values": _numbers(found.std),
        "source": checkpoint.name,
    }
    named = "" if found.method == "unknown" else f", pre-trained with {code(found.method)}"
    lines = [
        f"- {name}: {code(fact)}" for name, fact in facts.items() if isinstance(fact, str | int)
    ]
    return _TEXT.format(
        tag="" if trains_on_labels(found.method) else "- self-supervised-learning\n",
        title=code(found.arch) + named,
        dim=networks.num_features(found.net),
        facts="\n".join(lines),
        training=_training(options),
        results=_results(checkpoint),
    )


def code(text: object) -> str:
    """Return `text` as a code span of Markdown, on one line."""
    return f"`{one_line(short(text)).replace('`', chr(39)) or '?'}`"


def _numbers(values: list[float]) -> str:
    return " ".join(map(str, values))


def _training(options: dict[str, Any]) -> str:
    """Return the section with the command; "" if no script of this project wrote the options."""
    script = f"main_{options.get('script')}"
    if script not in _SCRIPTS:
        return ""
    lines = [
        f"{name}: {to_json(value)}"
        for name, value in sorted(options.items(), key=str)
        if isinstance(name, str)
        and re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name)
        and name not in _PRIVATE
        and _is_plain(value)
    ]
    return _TRAINING.format(script=script, options="\n".join(lines))


def _is_plain(value: object) -> bool:
    """Return whether `value` is a finite number, a short word, or a list of them."""
    if isinstance(value, list):
        return len(value) <= 16 and all(not isinstance(x, list) and _is_plain(x) for x in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w.+-]{1,40}", value, re.ASCII) is not None
    return isinstance(value, bool | int | float) and math.isfinite(value)


def _results(checkpoint: Path) -> str:
    """Return the section with the results of the checkpoint's evaluations; "" without any."""
    groups = defaultdict(list)
    for depth in range(_DEEPEST + 1):
        for file in sorted(checkpoint.parent.glob("*/" * depth + "results.json")):
            try:
                found = list(results.read(file))
            except InputError as error:
                print_rank0(one_line(f"left out of the model card: {error}"))
                continue
            for one in found:
                if _is_same(one.encoder.checkpoint, checkpoint):
                    groups[one.column].append(one)
    if not groups:
        return ""
    best = {column: results.best(found) for column, found in sorted(groups.items())}
    lines = [
        f"- {code(f'{data}, {protocol}')}: {results.cell(one)}"
        for (data, protocol), one in best.items()
    ]
    text = "In per cent, with the standard deviation over seeds if there were several.\n\n"
    if any(one.on_val for one in best.values()):
        lines.append("\n\\* the best of several settings, chosen on the test images")
    return f"\n## Results\n\n{text}" + "\n".join(lines) + "\n"


def _is_same(name: object, checkpoint: Path) -> bool:
    """Return whether `name`, the checkpoint in a results.json, is `checkpoint`.

    The folder may have moved since the evaluation; then the file's name decides.
    """
    if not isinstance(name, str):
        return False
    try:
        return Path(name).samefile(checkpoint)
    except (OSError, ValueError):
        return Path(name).name == checkpoint.name
