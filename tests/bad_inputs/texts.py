"""Bad text files: recipes, results and lists."""

import itertools
import json
import pickle
import random

from run_helpers import INPUT, typed

from bad_inputs.base import Case, Place


def bad_yaml(rng: random.Random, place: Place) -> Case:
    marker = place.own / "ran"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
    )
    key = rng.choice(
        [
            "lr",
            "epochs",
            "batch_size",
            "workers",
            "seed",
            "wd",
            "momentum",
            "image-size",
            "print_freq",
        ]
    )
    texts = [
        "",
        "#\n",
        "- a\n- b\n",
        "word\n",
        "3\n",
        "null\n",
        "a: [1\n",
        "a: b: c\n",
        "\t- x\n",
        "%YAML 9\n---\n",
        "lr: 1\n---\nlr: 2\n",
        "{" * 3000,
        "[" * 3000,
        f"lr: !!python/object/apply:os.system ['touch {marker}']\n",
        f"!!python/object/apply:os.system ['touch {marker}']\n",
        f"lr: !!python/object/new:subprocess.Popen [['touch', '{marker}']]\n",
        "lr: !!python/name:os.system\n",
        "lr: !nosuch 1\n",
        "cos: !!binary =\n",
        bomb,
        f"lr: {bomb.splitlines()[0][3:]}\n",
        "a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
        "lr: &l [*l]\n",
        f"{key}: 1\n{key}: 2\n",
        "batch_size: 8\nbatch-size: 9\n",
        f"{key}: many\n",
        f"{key}: [1, 2]\n",
        f"{key}: {{a: 1}}\n",
        f"{key}: yes\n",
        f"{key}: .nan\n",
        f"{key}: .inf\n",
        f"{key}: -7\n" if key != "seed" else "seed: x\n",
        f"{key}: ''\n",
        f"{key}: 2001-02-30\n",
        f"{key}: {'9' * 5000}\n",
        f"{key}: 0o9\n",
        "cos: 3\n",
        "cos: maybe\n",
        "mlp: [true]\n",
        "schedule: 120\n",
        "schedule: [a]\n",
        "schedule: [[1]]\n",
        "randaugment: [1]\n",
        "randaugment: 3\n",
        "arch: resnet81\n",
        "arch: [resnet18]\n",
        "recipe: moco\n",
        "amp: fp8\n",
        "optimizer: rmsprop\n",
        "compile: 1\n",
        "knn-t: 0\n",
        "resume: ''\n",
        "? [1, 2]\n: 3\n",
        "1: 2\n",
        "~: 2\n",
        "true: false\n",
        f"{'k' * 3000}: 1\n",
        f"arch: {'v' * 3000}\n",
        "moco_kk: 5\n",
        "epohcs: 5\n",
        "nhard: 5\n",
    ]
    data: list[bytes] = [text.encode() for text in texts]
    data += [
        b"\xff\xfe\x00",
        rng.randbytes(200),
        b"lr: \x00\n",
        "lr: \ud800".encode("utf-16", "surrogatepass"),
        pickle.dumps({"lr": 1}),
    ]
    (place.own / "c.yaml").write_bytes(rng.choice(data))
    words = (
        place.data,
        *typed("--save-dir {} --cfg {} --image-size 32", place.own / "run", place.own / "c.yaml"),
        *typed("-j 0 -b 8"),
    )
    return Case("main_synco", words)


def bad_yaml_of_views(rng: random.Random, place: Place) -> Case:
    marker = place.own / "ran"
    texts = [
        "",
        "- a\n",
        "a: [1\n",
        "recipe: mocov3\n",
        "recipe: [mocov2]\n",
        "recipe: mocov2\nrecipe: byol\n",
        "recipe: mocov2\nviews: 0\n",
    ]
    texts += [
        "recipe: mocov2\nimage-size: big\n",
        "recipe: mocov2\ncrop-min: .nan\n",
        "recipe: mocov2\nrandaugment: [1]\n",
        "lr: 3\n",
    ]
    texts += [
        f"recipe: !!python/object/apply:os.system ['touch {marker}']\n",
        "recipe: {a: b}\n",
        "aug-plus: 7\n",
        "recipe: &a [*a]\n",
    ]
    (place.own / "c.yaml").write_text(rng.choice(texts))
    return Case(
        "tools.show_views",
        ("--cfg", place.own / "c.yaml", place.data, "--out", place.own / "v.png"),
    )


def bad_results(rng: random.Random, place: Place) -> Case:
    """results.json for the table."""
    good = {
        "method": "synco",
        "arch": "resnet18",
        "checkpoint": "c",
        "pretrain_epochs": 1,
        "protocol": "linear",
        "dataset": "photos",
    }
    good |= {"metrics": {"acc1": 0.5, "acc5": 0.9}, "settings": {"seed": 0}}
    if rng.random() < 0.4:
        data = rng.choice(
            [
                b"",
                b"{",
                b"\xff\xfe",
                b"[" * 100_000,
                b'{"protocol": NaN',
                b"9" * 5000,
                rng.randbytes(100),
            ]
        )
    else:
        key = rng.choice(["method", "arch", "dataset", "metrics", "settings", "protocol"])
        value = rng.choice([None, 3, [], ["x"], {"acc1": "x"}, {"acc1": None}, True])
        if rng.random() < 0.3 and key not in ("settings", "protocol"):
            del good[key]
        else:
            good[key] = value if key != "settings" else rng.choice([3, ["x"], None, "word"])
        data = json.dumps(good).encode()
    (place.own / "results.json").write_bytes(data)
    return Case("tools.collect", (place.own,), ("results.json",))


def bad_list(rng: random.Random, place: Place) -> Case:
    names = ["class0", "class1", "class2"]
    texts = [
        "",
        "\n\n \n",
        "class7\n",
        "class0\nclas1\n",
        "../train/class0\n",
        f"{place.data}/train/class0\n",
        "class0/0.jpg\n",
    ]
    texts += [
        "class0,class1\n",
        "CLASS0\n",
        "class0\x00\n",
        "\n".join(["zebra"] * 50),
        f"{'n' * 3000}\n",
        "/etc/passwd\n",
        ".\n",
        "..\n",
        "\u202eclass0\n",
    ]
    images = [
        "",
        "class0/99.jpg\n",
        "../val/class0/0.jpg\n",
        f"{place.data}/train/class0/0.jpg\n",
        "0.jpg\n",
        "class0\n",
        "class0/0.jpg class1\n",
    ]
    images += [
        "class0\\0.jpg\n",
        "class0/0.jpeg\n",
        "/etc/passwd\n",
        "./class0/0.jpg\n",
        f"{'n' * 3000}\n",
        "class0/0.jpg,1\n",
    ]
    file = place.own / "list.txt"
    binary = rng.choice(
        [
            b"\xff\xfe\x00\x01",
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(50),
            pickle.dumps(names),
            b"class0\xff\n",
        ]
    )
    if rng.random() < 0.5:
        file.write_bytes(rng.choice([*(text.encode() for text in texts), binary]))
        program = rng.choice(("main_synco", "main_knn", "main_lincls"))
        return Case(
            program,
            (place.data, *INPUT, "--save-dir", place.own / "run", "--class-list", file),
            ("--class-list",),
        )
    file.write_bytes(rng.choice([*(text.encode() for text in images), binary]))
    return Case(
        "main_semisup",
        (place.data, *INPUT, "--save-dir", place.own / "run", "--subset-file", file),
        ("list.txt",),
    )
