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
    "These measurements take longer or need a GPU. Their results have pages of their own:",
    "",
    "- [One NVIDIA H200](results/gpu-nvidia-h200.md): correctness, speed, and CIFAR-10",
    "- [All methods with one recipe](results/family.md), and [every method with its own",
    "  settings](results/methods.md): accuracy on `photos`",
    "- [Runs stopped 20 times](results/faults.md), compared with uninterrupted runs",
    "- [Scaling to many GPUs](../docs/scaling.md): counted bytes, and predictions",
)
# why a target is out of reach, by the name of its figure; RESULTS.md has the reason if it is missed
OUT_OF_REACH = {
    "synco_over_moco": "MoCo's head, the random draws, the norms and similarities of the "
    "synthetic negatives, and one pass over the similarities of the bank take "
    "`synco_parts_over_moco` times as long as MoCo's head. With 65,536 entries, this is more than "
    "the target; with 262,144, about as much. SynCo also needs a search that takes longer than one "
    "pass, the exponentials and the gradient of its synthetic negatives, and the similarities of "
    "the whole bank, which it must keep until the search has ended. MoCo's head does none of this. "
    "It takes half the time of a head with concatenated logits, or less. `synco_over_plain_moco` "
    "compares SynCo's head with that one. Both figures are in the sections below.",
    "topk_over_pass": "One pass takes .1 to .2 ns per number on two cores. Of 65,536 numbers of a "
    "query, the search also selects the 1024 largest, in two steps with 8192 numbers each, and "
    "sorts them. This takes several times as long. The ratio of the search to the product that "
    "computes the similarities is `topk_over_product`.",
}
# in the names of figures that compare this code with another library's
PEERS = ("lightly", "kornia", "solo", "torchvision", "pil")
_HEAD = {
    "moco_over_floor": "time of MoCo's head / of the arithmetic that any head must do",
    "moco_over_plain_moco": "time of MoCo's head / with concatenated logits",
    "synco_over_moco": "time of SynCo's head / of MoCo's head",
    "synco_parts_over_moco": "time of MoCo's head, draws, norms and one pass together / of MoCo's "
    "head",
    "synco_over_plain_moco": "time of SynCo's head / of MoCo's with concatenated logits",
    "loop_extra_over_ours_extra": "time that one autograd call for each perturbed and "
    "adversarial negative adds / time that our SynCo adds to our MoCo",
    "explicit_memory_over_ours": "memory of explicit synthetic negatives / of ours",
    "topk_over_pass": "time of the search for the hardest negatives / of one pass over "
    "the similarities",
    "topk_over_product": "time of this search / of the product that computes the similarities",
    "lightly_over_step": "time of lightly's loss and queue update / of ours",
    "lightly_memory_over_step": "memory of lightly's loss and queue update / of ours",
    "solo_over_moco": "time of solo-learn's loss / of ours",
}
PARTS = (
    Part(
        "negatives",
        "The contrastive head",
        "negatives.py",
        "The loss and its gradient, forward and backward, for random features. moco and synco are "
        "ours, with their metrics; step is moco and the update of the queue. plain: MoCo with "
        "concatenated logits; explicit: SynCo with every synthetic negative as a vector; loop: "
        "SynCo with one autograd call per perturbed or adversarial negative; lightly: lightly's "
        "NTXentLoss with its memory bank, which it also updates; solo: solo-learn's "
        "moco_loss_func. The losses and gradients of MoCo agree to 1e-5, and so do those of SynCo. "
        "floor and blocks are the arithmetic that any head must do, on the full matrix and block "
        "by block: the product with the bank, the exponentials, their sums, and the product for "
        "the gradient. Parts of synco: draw: the random draws; topk: the search for the hardest "
        "negatives; mix: the norms and similarities of the synthetic negatives; product: the "
        "similarities of the bank. amax: one pass over them.",
        _HEAD,
    ),
    Part(
        "negatives_large",
        "The contrastive head with 262,144 entries",
        "negatives.py --n 256 --k 262144 --rounds 5",
        "As above, with 256 queries and 262,144 entries.",
        _HEAD,
    ),
    Part(
        "false_negatives",
        "FNC's head",
        "false_negatives.py",
        "Forward and backward, with the search for false negatives. Ours works on chunks of "
        "images. The plain head uses autograd on all views at once. The script fails if the loss "
        "or the gradient differs. Our head needs two buffers of size [chunk, entries].",
        {
            "plain_over_ours": "time of the plain head / of ours",
            "plain_memory_over_ours": "memory of the plain head / of ours",
            "half_the_chunk_memory": "memory with half the chunk / with the chunk",
            "half_the_views_memory": "memory with half the views / with all views",
            "twice_the_images_memory": "memory with twice the images / with the images",
        },
    ),
    Part(
        "step",
        "A full step",
        "step.py --arch resnet18 --size 64 --rounds 31",
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
        "ddp",
        "Averaging gradients",
        "ddp.py",
        "A SimCLR step on two processes of one machine. default: DDP with buckets of 25 MB and "
        "copies of the gradients; views: gradients that are views of the buckets, as in all "
        "scripts. Each other row changes one thing in views. See "
        "[docs/scaling.md](../docs/scaling.md#gradient-reduction).",
        {
            "views_over_default": "time with views of the buckets / with copies",
            "static_graph_over_views": "time with DDP's static graph / without",
            "10_MB_over_views": "time with buckets of 10 MB / of 25 MB",
            "50_MB_over_views": "time with buckets of 50 MB / of 25 MB",
            "100_MB_over_views": "time with buckets of 100 MB / of 25 MB",
            "bf16_over_views": "time with --grad-compress bf16 / without",
            "SyncBN_over_BN": "time with synchronized batch norm / with batch norm",
            "SyncBN_exchange": "time with synchronized batch norm / with its arithmetic alone",
        },
    ),
    Part(
        "threads",
        "Training on a busy machine",
        "threads.py",
        "Training steps alone, and next to programs that keep all cores busy and start later. "
        "ours: OpenMP's threads wait as the scripts set it (GOMP_SPINCOUNT); torch's default: they "
        "wait as OpenMP does by default; one thread: OMP_NUM_THREADS=1.",
        {
            "contention": "time of a step / with one thread, both next to busy programs",
            "busy_over_one_thread_alone": "time of a step next to busy programs / with one thread "
            "on a quiet machine",
            "busy_default_over_one_thread": "time of a step with PyTorch's default / with one "
            "thread, both next to busy programs",
            "alone_over_default": "time of a step / with PyTorch's default, both on a quiet "
            "machine",
        },
    ),
    Part(
        "loader",
        "Two MoCo v2 views of a JPEG",
        "loader.py",
        "One thread. host: decoding and crops, as our workers do; cpu: the same, and the color "
        "operations on the CPU too; pil and v2: torchvision's pipelines on PIL images and on "
        "tensors; lightly: its MoCoV2Transform. The other rows are stages of our pipeline, and "
        "other libraries for single stages: libjpeg-turbo (through simplejpeg) for decoding, and "
        "kornia for the colors. A row is missing if its package is not installed. Decoding takes "
        "most of host's time, and all pipelines decode with libjpeg-turbo. Times are processor "
        "times, each the mean over a turn of .4 s, but `one worker` and `decode and resize` are "
        "wall-clock times.",
        {
            "host_over_pil": "images/s of our workers / of torchvision on PIL images",
            "cpu_over_pil": "images/s of our views, with colors on the CPU / of torchvision on PIL "
            "images",
            "host_over_v2": "images/s of our workers / of torchvision on tensors",
            "cpu_over_v2": "images/s of our views, with colors on the CPU / of torchvision on "
            "tensors",
            "host_over_lightly": "images/s of our workers / of lightly's transform",
            "cpu_over_lightly": "images/s of our views, with colors on the CPU / of lightly's "
            "transform",
            "host_over_decode_and_resize": "time of a loader process, with reading, batching and "
            "copying / of decoding and resizing alone",
            "colors_over_kornia": "speed of our color operations / of kornia's",
        },
    ),
    Part(
        "loader_small",
        "Two views of 32-pixel images",
        "loader.py --small --rounds 2",
        "An epoch of 50,000 images in memory. Each pipeline has two processes with one thread "
        "each. ours: one worker crops, and the main process does the color operations; crops: ours "
        "without the color operations; colors: these alone; pil: torchvision on PIL images, in a "
        "DataLoader with two workers.",
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
        "Images in random order, on one thread. read: the bytes alone; views: also decoding and "
        "two crops. Before a cold measurement, the files are removed from the system's cache. The "
        "system reads arrow files ahead, so most of their cold reads come from the cache.",
    ),
    Part(
        "startup",
        "Start-up",
        "startup.py --rounds 5",
        "The time from a command to its help, to the refusal of an option, and to the end of the "
        "first step (ResNet-18 at 64 pixels on `photos`). The packages are in the system's cache. "
        "The last rows are the listing of 100,000 images in 1000 folders.",
        {
            "slowest_help_s": "seconds of --help, the slowest of all scripts and tools",
            "refused_s": "seconds until a script refuses an option",
            "import_torch_s": "seconds of `import torch`",
            "first_step_s": "seconds until the first step has ended",
            "first_step_over_import_torch": "time until the first step has ended / of `import "
            "torch`",
            "torchvision_over_ours": "time of torchvision's ImageFolder / of our listing",
        },
    ),
    Part(
        "names",
        "A list of ten million images",
        "names.py --rounds 3",
        "`--file-list`: checking and reading the list, shuffling, and the paths of the first "
        "batch, at the start of a run and when it continues in the middle of an epoch. Memory is "
        "that of a process with all imports.",
        {
            "seconds": "seconds for ten million names",
            "GiB": "GiB of a process with ten million names",
        },
    ),
    Part(
        "probe",
        "Five learning rates of a linear probe in one pass",
        "probe.py",
        "ResNet-18 at 64 pixels on `photos`, one epoch, training and testing. The script fails if "
        "an accuracy differs from that of a run with this learning rate alone.",
        {"five_over_one": "time of a probe with five learning rates / with one"},
    ),
    Part(
        "memory",
        "Memory of a ViT-L",
        "memory.py",
        "A process that pre-trains ViT-L/16 with MoCo v3: tensors that do not depend on the batch, "
        "and those that a forward pass keeps for the backward pass, for each image. See "
        "[docs/scaling.md](../docs/scaling.md#sharded-parameters-fsdp).",
        {
            "fixed_gib": "GiB that do not depend on the batch, float32, AdamW",
            "parameters_millions": "millions of trained parameters",
            "mib_per_image_off": "MiB per image, float32",
            "mib_per_image_off_grad_checkpoint": "MiB per image, float32, --grad-checkpoint",
            "mib_per_image_bf16": "MiB per image, --amp bf16",
            "mib_per_image_bf16_grad_checkpoint": "MiB per image, --amp bf16, --grad-checkpoint",
        },
    ),
)
