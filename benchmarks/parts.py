"""The benchmarks of `make benchmarks`, and the words about them in RESULTS.md."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A benchmark.

    Attributes:
        name: name of the file with its results.
        title: heading of its section in RESULTS.md.
        command: the script in benchmarks/, with its options.
        about: what is compared, in one paragraph.
        figures: what each figure is, by name. A figure without words is shown with its name only.
    """

    name: str
    title: str
    command: str
    about: str
    figures: dict[str, str] = field(default_factory=dict)


INTRODUCTION = (
    "`make benchmarks` writes this page. In each measurement, the candidates take turns. Times are "
    "medians over rounds, and a ratio is the median of the rounds' ratios, so it may differ a "
    "little from the quotient of two times. On a shared machine, times change by half between "
    "quiet and busy phases; ratios change much less."
)
LONGER = (
    "These benchmarks take an hour or need a GPU. Their results have pages of their own:",
    "",
    "- [One NVIDIA H200](results/gpu-nvidia-h200.md): correctness, speed, and CIFAR-10",
    "- [All methods with one recipe](results/family.md), and [every method with its own",
    "  settings](results/methods.md): accuracy on `photos`",
    "- [Runs stopped 20 times](results/faults.md), and their bits",
)
# in the names of figures that compare this code with another library's
PEERS = ("lightly", "kornia", "solo", "torchvision", "pil")
PARTS = (
    Part(
        "negatives",
        "The contrastive head",
        "negatives.py",
        "The loss and its gradient, forward and backward, for random features. All heads have the "
        "same loss and gradient, to 1e-5.",
        {
            "synco_over_moco": "time of SynCo's head / of MoCo's head",
            "synco_over_plain_moco": "time of SynCo's head / of MoCo's with concatenated logits",
            "loop_extra_over_ours_extra": "time that one autograd call for each perturbed and "
            "adversarial negative adds / time that our SynCo adds to our MoCo",
            "explicit_memory_over_ours": "memory of explicit synthetic negatives / of ours",
        },
    ),
    Part(
        "false_negatives",
        "FNC's head",
        "false_negatives.py",
        "Forward and backward, with the search for false negatives. Ours works on chunks of "
        "images. The plain one uses autograd on all views at once. The script fails if the loss or "
        "the gradient differs. Our memory is that of two [chunk, entries] buffers.",
        {
            "plain_over_ours": "time of the plain head / of ours",
            "plain_memory_over_ours": "memory of the plain head / of ours",
            "half_the_chunk_memory": "memory with half the chunk / with the chunk",
            "half_the_views_memory": "memory with half the views / with all views",
            "twice_the_images_memory": "memory with twice the images / with the images",
        },
    ),
    Part(
        "loader",
        "Two MoCo v2 views of a JPEG",
        "loader.py",
        "One thread. host: decoding and crops, as our workers do; cpu: the same, and the color "
        "operations on the CPU too; pil and v2: torchvision's pipelines on PIL images and on "
        "tensors; lightly: its MoCoV2Transform.",
        {
            "host_over_pil": "images/s of our workers / of torchvision on PIL images",
            "cpu_over_pil": "the same, with the color work on the CPU too",
            "host_over_lightly": "images/s of our workers / of lightly's transform",
            "cpu_over_lightly": "the same, with the color work on the CPU too",
        },
    ),
    Part(
        "loader_small",
        "Two views of 32-pixel images",
        "loader.py --small --rounds 2",
        "An epoch of 50,000 images in memory. Each pipeline has two processes with one thread "
        "each. ours: one worker crops, and the main process does the color operations; crops: ours "
        "without the color operations; colours: these alone; pil: a DataLoader with two workers.",
        {"ours_over_pil": "images/s of our pipeline / of torchvision on PIL images"},
    ),
    Part(
        "loader_large",
        "JPEGs of 12 megapixels",
        "loader.py --large --images 4",
        "Two views of photographs of 4000x3000 pixels, without and with --shrink-on-decode, and "
        "the decoders of the full image.",
        {"on_over_off": "images/s with --shrink-on-decode / without"},
    ),
    Part(
        "loader_shards",
        "Tar, arrow and parquet files",
        "loader.py --shards --images 2000 --rounds 3",
        "Images in random order, on one thread. read: the bytes alone; views: decoding and two "
        "crops, too. Before a cold measurement, the system is told to forget the files. The disk "
        "reads ahead, so most of the cold arrow figures are warm.",
    ),
    Part(
        "step",
        "A full step",
        "step.py --arch resnet18 --size 64",
        "One optimizer step in fp32, with one process and with two. The views are in memory. "
        "plain: MoCo with a momentum update per parameter and concatenated logits; it gathers all "
        "images to shuffle them. AdCo's bank has as many entries as MoCo's queue.",
        {
            "synco_over_moco": "time of a SynCo step / of a MoCo step, one process",
            "synco_over_moco_2_processes": "time of a SynCo step / of a MoCo step, two processes",
            "adco_over_moco": "time of an AdCo step / of a MoCo step, one process",
            "adco_over_moco_2_processes": "time of an AdCo step / of a MoCo step, two processes",
            "ours_over_plain": "time of our MoCo step / of a plain one, one process",
            "ours_over_plain_2_processes": "time of our MoCo step / of a plain one, two processes",
        },
    ),
    Part(
        "startup",
        "Start-up",
        "startup.py",
        "Listing 100,000 images in 1000 folders.",
        {"torchvision_over_ours": "time of torchvision's ImageFolder / of our listing"},
    ),
    Part(
        "probe",
        "Five learning rates of a linear probe in one pass",
        "probe.py",
        "ResNet-18 at 64 pixels on photos, one epoch, training and testing. The script fails if an "
        "accuracy differs from that of a run with this learning rate alone.",
        {"five_over_one": "time of a probe with five learning rates / with one"},
    ),
    Part(
        "threads",
        "Threads on a busy machine",
        "threads.py",
        "Training steps alone, and next to programs that keep all cores busy.",
    ),
)
