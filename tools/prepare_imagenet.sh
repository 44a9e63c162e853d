#!/usr/bin/env bash
# Unpack ImageNet's two archives to DIR/train/WNID/*.JPEG and DIR/val/WNID/*.JPEG, and check every count.
#
#   tools/prepare_imagenet.sh TARS DIR [--val-labels FILE] [--md5]
#
# TARS is the folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. Registered users can download them from
# image-net.org. The script may be stopped at any time and started again; it skips the classes that are complete. It never
# deletes or overwrites files that are already in DIR.
#
#   --val-labels FILE   classes of the val images, which the archives lack. Each line of FILE is a WNID (in the order of the
#                       images) or holds an image name and a WNID: `NAME WNID`, valprep.sh of soumith's imagenetloader.torch,
#                       or Kaggle's LOC_val_solution.csv. FILE is read as text and never run. It is not needed if TARS also
#                       holds the small ILSVRC2012_devkit_t12.tar.gz; torchvision reads that, with PYTHON (default: python).
#   --md5               first compare the archives with the published MD5 sums; this takes minutes
#   --counts C T V      data of another size: C classes, T train images, V val images (default: 1000 1281167 50000)
set -euo pipefail
export LC_ALL=C

train_md5=${TRAIN_MD5:-1d675b47d978889d74fa0da5fadfb00e} val_md5=${VAL_MD5:-29b22e2961454d5413ddabcf34fc5622}
classes=1000 train_images=1281167 val_images=50000
wnid_pattern='n[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]'

say() { echo "prepare_imagenet.sh: $1"; }
fail() {
    echo "prepare_imagenet.sh: error: $1" >&2
    exit 2
}
is_number() { case $1 in '' | 0* | *[!0-9]*) return 1 ;; esac }

# Options

words=() labels_file="" md5=""
while [ $# -gt 0 ]; do
    case $1 in
        --val-labels)
            [ $# -ge 2 ] || fail "--val-labels: give a file"
            labels_file=$2
            shift
            ;;
        --md5) md5=1 ;;
        --counts)
            if ! { [ $# -ge 4 ] && is_number "$2" && is_number "$3" && is_number "$4"; }; then
                fail "--counts: give classes, train and val images"
            fi
            classes=$2 train_images=$3 val_images=$4
            shift 3
            ;;
        -h | --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -*) fail "unknown option $1; see --help" ;;
        *) words+=("$1") ;;
    esac
    shift
done
[ ${#words[@]} -eq 2 ] || fail "usage: tools/prepare_imagenet.sh TARS DIR [--val-labels FILE] [--md5]"
[ -d "${words[0]}" ] || fail "${words[0]}: no such folder; give the one that holds the archives"
[ -z "$labels_file" ] || [ -r "$labels_file" ] || fail "--val-labels $labels_file: cannot be read"
[ $((val_images % classes)) -eq 0 ] || fail "--counts: V must be a multiple of C, because each class has the same number of val images"
tars=$(cd "${words[0]}" && pwd)
mkdir -p "${words[1]}" || fail "${words[1]}: cannot be created"
out=$(cd "${words[1]}" && pwd)
train_tar=$tars/ILSVRC2012_img_train.tar val_tar=$tars/ILSVRC2012_img_val.tar devkit=$tars/ILSVRC2012_devkit_t12.tar.gz
each=$((val_images / classes))

# Incomplete folders stay here, on the same disk, so that a single rename makes them visible in train/ or as val/
work=$out/.prepare
mkdir -p "$work" || fail "$out: cannot be written"
if ! mkdir "$work/lock" 2>/dev/null; then
    other=$(cat "$work/lock/pid" 2>/dev/null || true)
    if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
        fail "process $other prepares $out; wait for it, or remove $work/lock if that is another program"
    fi
fi
echo $$ >"$work/lock/pid"
trap 'rm -rf "$work/lock"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Tar must stop reading after the requested member, because the archives are large
case $(tar --version) in *GNU*) first=--occurrence=1 ;; *) first=-q ;; esac

# Print "WNID COUNT" for each class folder of $1. Empty files do not count: a power failure may leave them
counts() {
    if [ -d "$1" ]; then
        (cd "$1" && find . -mindepth 2 -maxdepth 2 -type f -name '*.JPEG' -size +0) |
            awk -F/ '{ n[$2]++ } END { for (name in n) print name, n[name] }' | sort
    fi
}

# Write the labels of val as "NAME WNID" lines to $work/labels. Fail if they are wrong; return 1 if there is no source.

read_labels() {
    local source
    if [ -n "$labels_file" ]; then
        source=$labels_file
        cp "$labels_file" "$work/source"
    elif [ -f "$devkit" ]; then
        source=$devkit
        read_devkit >"$work/source" 2>"$work/why" || fail "$devkit: $(tail -n 1 "$work/why")"
    else
        return 1
    fi
    awk -v wnid="$wnid_pattern" '
        { sub(/\r$/, "") }
        /^ *$/ || /^#/ || /^mkdir/ || /^ImageId/ { next }
        $0 ~ "^" wnid "$" { printf "ILSVRC2012_val_%08d.JPEG %s\n", ++bare, $0; next }
        match($0, /ILSVRC2012_val_[0-9]+/) {
            name = substr($0, RSTART, RLENGTH)
            rest = substr($0, RSTART + RLENGTH)
            if (match(rest, wnid)) { print name ".JPEG", substr(rest, RSTART, RLENGTH); next }
        }
        { print NR ": " $0 > "/dev/stderr"; exit 1 }
    ' "$work/source" 2>"$work/why" | sort >"$work/labels" ||
        fail "$source: cannot find an image and a class in line $(head -n 1 "$work/why" | cut -c 1-80)"
    local n
    n=$(awk '{ print $1 }' "$work/labels" | uniq | wc -l)
    [ $((n)) -eq "$val_images" ] && [ $(($(wc -l <"$work/labels"))) -eq "$val_images" ] ||
        fail "$source: has classes for $((n)) images; expected $val_images, each once"
    n=$(awk -v each="$each" '{ n[$2]++ } END { for (name in n) if (n[name] == each) right++; print right + 0 }' "$work/labels")
    [ "$n" -eq "$classes" ] || fail "$source: $n classes have $each images; expected $classes"
}

read_devkit() { # print the WNIDs in the order of the images
    "${PYTHON:-python}" - "$devkit" "${DEVKIT_MD5:-}" <<'PYTHON'
import os, sys, tempfile
from torchvision.datasets import imagenet

devkit, md5 = sys.argv[1:]
name, published = imagenet.ARCHIVE_META["devkit"]
imagenet.ARCHIVE_META["devkit"] = name, md5 or published
with tempfile.TemporaryDirectory() as folder:  # torchvision writes the parsed form next to the archive
    os.symlink(devkit, os.path.join(folder, name))
    imagenet.parse_devkit_archive(folder)
    print(*imagenet.load_meta_file(folder)[1], sep="\n")
PYTHON
}

# Check what DIR already holds

counts "$out/train" >"$work/train.before"
counts "$out/val" >"$work/val.before"
is_complete() { # arguments: file of counts, number of classes, number of images
    awk -v classes="$2" -v images="$3" '{ n += $2 } END { exit !(NR == classes && n == images) }' "$1"
}
needs_train=1 needs_val=1
is_complete "$work/train.before" "$classes" "$train_images" && needs_train=""
is_complete "$work/val.before" "$classes" "$val_images" && needs_val=""
[ -z "$needs_train" ] || [ -f "$train_tar" ] || fail "$train_tar: no such file; TARS holds the two archives under their own names"
[ -z "$needs_val" ] || [ -f "$val_tar" ] || fail "$val_tar: no such file; TARS holds the two archives under their own names"

has_labels=""
no_labels="val/ needs the classes of its images: put ILSVRC2012_devkit_t12.tar.gz into $tars, or give --val-labels FILE (see --help)"
if [ -n "$needs_val" ]; then
    if read_labels; then
        has_labels=1
        if [ -e "$out/val" ]; then # of another program, because this script creates val/ only when it is complete
            short=$(awk -v each="$each" '$2 < each { print $1 " has " $2 " of " each; exit }' "$work/val.before")
            short=${short:-$(($(wc -l <"$work/val.before"))) of $classes classes}
            fail "$out/val is not complete ($short); move it away and run this again"
        fi
    else
        say "$no_labels; unpacking train/ first"
    fi
fi

# Check the free disk space and the archives

size() { if [ -f "$1" ]; then echo $(($(wc -c <"$1") / 1024)); else echo 0; fi; } # KiB
need=0
if [ -n "$needs_train" ]; then
    left=$((classes - $(wc -l <"$work/train.before")))
    [ "$left" -gt 0 ] || left=0
    need=$(($(size "$train_tar") * left * 105 / classes / 100))
fi
[ -z "$needs_val" ] || [ -d "$work/val.flat" ] || need=$((need + $(size "$val_tar") * 105 / 100))
free=$(df -Pk "$out" | sed -n '2s/.* \([0-9][0-9]*\)  *[0-9][0-9]*%.*/\1/p')
[ -z "$free" ] || [ "$free" -ge "$need" ] ||
    fail "$out: $need KiB are needed and $free KiB are free; make room or choose another disk"

check_md5() {
    local sum
    say "$1: md5 ..."
    if command -v md5sum >/dev/null; then sum=$(md5sum <"$1"); else sum=$(md5 -q <"$1"); fi
    [ "${sum%% *}" = "$2" ] || fail "$1: its md5 is ${sum%% *} and not $2; download it again"
}
if [ -n "$md5" ]; then
    [ -z "$needs_train" ] || check_md5 "$train_tar" "$train_md5"
    [ -z "$needs_val" ] || check_md5 "$val_tar" "$val_md5"
fi

# Unpack train/, one class at a time

# Unpack the archive of a class in one pass. Tar accepts an archive that is cut off between two images, so check that it ends
# with the end mark, 1024 zero bytes.
unpack_class() { # arguments: member, folder
    rm -f "$work/pipe"
    mkfifo "$work/pipe"
    tail -c 1024 <"$work/pipe" >"$work/end" &
    tar -xOf "$train_tar" "$first" "$1" | tee "$work/pipe" | (tar -xof - -C "$2" && cat >/dev/null) || return 1
    wait $!
    if [ "$(wc -c <"$work/end")" -ne 1024 ] || [ "$(tr -d '\0' <"$work/end" | wc -c)" -ne 0 ]; then
        echo "ends too early" >&2
        return 1
    fi
}

wrong=()
if [ -n "$needs_train" ]; then
    tar -tf "$train_tar" >"$work/members" 2>"$work/why" ||
        fail "$train_tar: cut off or damaged ($(head -n 1 "$work/why")); fetch it again"
    members=$(grep -c '\.tar$' "$work/members" || true)
    [ "$members" -eq "$classes" ] || fail "$train_tar: holds $members of $classes classes; fetch it again"
    mkdir -p "$out/train"
    done_before="" n=0
    while IFS= read -r member; do
        n=$((n + 1))
        wnid=$(basename "$member" .tar)
        folder=$out/train/$wnid
        if [ -d "$folder" ]; then
            # The count is recorded when this script unpacks a class. Another program may have created the folder; then
            # count the images in the archive
            expected=$(awk -v name="$wnid" '$1 == name { n = $2 } END { print n }' "$work/train.done" 2>/dev/null || true)
            [ -n "$expected" ] || expected=$(tar -xOf "$train_tar" "$first" "$member" | tar -tf - | grep -c '\.JPEG$' || true)
            found=$(awk -v name="$wnid" '$1 == name { n = $2 } END { print n + 0 }' "$work/train.before")
            if [ "$found" -eq "$expected" ]; then
                echo "$wnid $expected" >>"$work/train.done"
                done_before=$((${done_before:-0} + 1))
            else
                wrong+=("train/$wnid has $found of $expected images")
            fi
            continue
        fi
        part=$work/$wnid.part
        rm -rf "$part"
        mkdir "$part"
        unpack_class "$member" "$part" 2>"$work/why" ||
            fail "$train_tar: $member: $(head -n 1 "$work/why"); a full disk, or a damaged archive: see --md5"
        found=$(find "$part" -type f -name '*.JPEG' -size +0 | wc -l)
        [ "$found" -gt 0 ] || fail "$train_tar: $member: holds no *.JPEG; fetch the archive again"
        mv "$part" "$folder"
        echo "$wnid $((found))" >>"$work/train.done"
        [ $((n % 50)) -ne 0 ] || say "train: $n of $classes classes"
    done < <(grep '\.tar$' "$work/members")
    [ -z "$done_before" ] || say "train: $done_before classes were already complete"
    counts "$out/train" >"$work/train.after"
    if [ ${#wrong[@]} -eq 0 ] && ! is_complete "$work/train.after" "$classes" "$train_images"; then
        total=$(awk '{ n += $2 } END { print n + 0 }' "$work/train.after")
        least=$(sort -k2,2n "$work/train.after" | awk 'NR == 1 { print "the smallest is " $1 " with " $2 }')
        found=$(($(wc -l <"$work/train.after")))
        wrong+=("train/ holds $total images in $found classes, expected $train_images in $classes ($least)")
    fi
fi

# Unpack val/: first all images, then move each to its class, and last move val/ to DIR when every class is complete

if [ -n "$needs_val" ] && [ -n "$has_labels" ]; then
    if [ ! -d "$work/val.flat" ]; then
        say "val: unpacking $val_tar"
        rm -rf "$work/val.part" "$work/val"
        mkdir "$work/val.part"
        tar -xof "$val_tar" -C "$work/val.part" 2>"$work/why" ||
            fail "$val_tar: $(head -n 1 "$work/why"); a full disk, or a cut or damaged archive: see --md5"
        mv "$work/val.part" "$work/val.flat"
    fi
    mkdir -p "$work/val"
    awk '{ names[$2] = names[$2] " " $1 } END { for (wnid in names) print wnid names[wnid] }' "$work/labels" >"$work/by_class"
    cd "$work/val.flat"
    while read -r wnid names; do
        mkdir -p "$work/val/$wnid"
        move=()
        for name in $names; do
            [ ! -s "$name" ] || move+=("$name") # else it was moved earlier, or it is missing and the counts below differ
        done
        [ ${#move[@]} -eq 0 ] || mv "${move[@]}" "$work/val/$wnid/"
    done <"$work/by_class"
    cd "$out"
    counts "$work/val" >"$work/val.after"
    while read -r wnid _; do
        found=$(awk -v name="$wnid" '$1 == name { n = $2 } END { print n + 0 }' "$work/val.after")
        [ "$found" -eq "$each" ] || wrong+=("val/$wnid has $found of $each images")
    done <"$work/by_class"
    if is_complete "$work/val.after" "$classes" "$val_images"; then
        mv "$work/val" "$out/val"
        rm -rf "$work/val.flat"
    else
        rm -rf "$work/val" "$work/val.flat" # so that the next start unpacks the archive again
    fi
fi

# Report the outcome

if [ ${#wrong[@]} -gt 0 ]; then
    for line in "${wrong[@]:0:20}"; do
        echo "prepare_imagenet.sh: $line" >&2
    done
    fail "wrong counts (above); compare the archives with --md5, move short folders away, and run this again"
fi
[ -z "$needs_val" ] || [ -n "$has_labels" ] || fail "train/ is complete; $no_labels, and run this again"
say "complete: $out/train with $train_images images, $out/val with $val_images, of $classes classes each"
rm -rf "$work"
