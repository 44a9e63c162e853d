"""Small copies of data sets with ImageNet's classes, for `dataset_trees`.

Each function writes one data set to a `dataset_trees.Tree`. It returns the classes and, for the
training images and for the test images, a list of (number, label) in order.
"""

import torchvision.datasets as tv


def imagenet(tree):
    train = [
        (tree.image(f"train/n0{label}/{i}.JPEG"), label) for label in range(3) for i in range(2)
    ]
    return (
        ["n00", "n01", "n02"],
        train,
        [(tree.image(f"val/n0{label}/9.JPEG"), label) for label in (1, 2)],
    )


def tiny_imagenet(tree, folder="tiny-imagenet-200"):
    classes = ["n01443537", "n01629819", "n02124075"]
    tree.lines(f"{folder}/wnids.txt", reversed(classes))
    tree.lines(f"{folder}/words.txt", [f"{name}\ta thing, or another" for name in classes])
    train = []
    for label, name in enumerate(classes):
        inside = f"{folder}/train/{name}"
        files = [f"{name}_{i}.JPEG" for i in range(2)]
        train += [(tree.image(f"{inside}/images/{file}"), label) for file in files]
        tree.lines(f"{inside}/{name}_boxes.txt", [f"{file}\t0\t10\t63\t58" for file in files])
    labels = [2, 0, 1, 2]
    val = [
        (tree.image(f"{folder}/val/images/val_{i}.JPEG"), label) for i, label in enumerate(labels)
    ]
    lines = [f"val_{i}.JPEG\t{classes[label]}\t0\t32\t44\t62" for i, label in enumerate(labels)]
    tree.lines(f"{folder}/val/val_annotations.txt", lines)
    tree.image(f"{folder}/test/images/test_0.JPEG")
    return classes, train, val


def imagenette(tree, folder="imagenette2-320"):
    classes = sorted(tv.Imagenette._WNID_TO_CLASS)
    tree.lines(f"{folder}/noisy_imagenette.csv", ["path,noisy_labels_0"])
    train = [
        (tree.image(f"{folder}/train/{name}/{name}_{i}.JPEG"), label)
        for label, name in enumerate(classes)
        for i in range(2)
    ]
    return (
        classes,
        train,
        [
            (tree.image(f"{folder}/val/{name}/ILSVRC2012_val_{label}.JPEG"), label)
            for label, name in enumerate(classes)
        ],
    )
