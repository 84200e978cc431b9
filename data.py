"""The data: whatever the source, one form.

    toy      200 species of cartoon birds, drawn here in seconds. The default.
    cub      CUB-200-2011: 11,788 photographs of birds, 10 captions each.
    cub-box  the same, each image a square around the bird. Departs from the paper: the birds are
             about twice as large.
    flowers  Oxford-102: 8,189 photographs of flowers, 10 captions each.
    FOLDER   your own images with captions, as a folder or a .zip file. See `build_folder`.

The rest of the code sees a `Dataset`: images, captions, a class for each image, and classes that
are never trained on. It is built once, kept in the folder cache/, and memory-mapped from there.

    python data.py --dataset toy                         # prepare, report, draw a contact sheet
    python data.py --dataset cub --from ~/Downloads      # with files that you fetched by hand
"""

import argparse
import bz2
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import posixpath
import random
import re
import shutil
import sys
import tarfile
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from collections import deque, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

IMAGE_SIZE = 76         # images are kept at 76x76, as in the authors' code ...
CROP = 64               # ... and the networks see a random 64x64 window ([A] section 5)
CACHE = Path("cache")
CACHE_FORMAT = 2        # raise it when the files of a cache are others than before
KEYPOINTS = ["beak", "belly", "breast", "crown", "forehead", "tail"]    # of [A] section 5.2


@dataclass
class Dataset:
    """A data set as all other files see it. N images of C classes."""
    name: str
    images: np.ndarray              # (N, 76, 76, 3) uint8, memory-mapped
    captions: list                  # N lists of strings, none of them empty
    labels: np.ndarray              # (N,) the class of each image
    class_names: list               # C strings
    unseen_classes: np.ndarray      # (C,) bool: the zero-shot classes, never trained on
    rows: np.ndarray                # (N,) each image's place in the source's own order
    boxes: np.ndarray = None        # (N, 4) x, y, width, height in pixels of the 76x76 image
    keypoints: np.ndarray = None    # (N, 6, 2) x, y of KEYPOINTS, NaN where one is not visible
    skipped: list = field(default_factory=list)     # what was left out and why, a line each;
                                                    # what concerns the whole stands last

    def training_images(self):
        """Indices of the images of the training classes."""
        return np.flatnonzero(~self.unseen_classes[self.labels])

    def unseen_images(self):
        """Indices of the images of the unseen (zero-shot) classes."""
        return np.flatnonzero(self.unseen_classes[self.labels])

    def digest(self):
        """16 hex digits of what a text encoder and a run depend on: captions, classes, split.
        They stay the same when the files move."""
        content = json.dumps([self.captions, self.labels.tolist(), self.unseen_classes.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


# What a builder gives of each image: (76, 76, 3) uint8, a list of captions, the name of its class,
# its row in a file of given features (images that are left out count), and where known its box
# (4,) and keypoints (6, 2), in pixels of the 76x76 image: see `to_small`.
Example = namedtuple("Example", "pixels captions label row box keypoints", defaults=(None, None))


def load(name, source=None):
    """A data set, built now or read from its cache.

    name: toy, cub, cub-box, flowers, or the path of a folder or a .zip file. source: a folder
    with the files of cub or flowers. A cache is named after all that it was made from, files and
    code, so that a change there leads to a new cache. Raises UserError."""
    if name not in DATASETS and not Path(name).exists():
        raise UserError(f"unknown data set {name!r}: expected {', '.join(DATASETS)}, "
                        "or a folder or .zip file of images with captions")
    # paths: the files of the newest cache; none for toy, with `source`, or where there is no cache.
    folder, paths = (None, []) if source else newest_cache(name)
    removed = any(not path.exists() for path in paths)      # to save space, say: the cache stays
    if not removed:
        paths = paths or find_files(name, source)
        build = DATASETS.get(name, OWN_FOLDER).build
        made_from = (CACHE_FORMAT, IMAGE_SIZE, building_code(), file_stamps(paths))
        digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
        folder = CACHE / f"{short_name(name)}-{digest}"
        if not (folder / "meta.json").exists():
            made_of = f" from {', '.join(map(str, paths))}" if paths else ""
            print(f"preparing {name}{made_of}: this is done once and kept in {folder}")
            write_cache(folder, short_name(name), paths, *build(*paths))
    # A folder's whole path: a run on it may go on from another place.
    ds = read_cache(folder, name if name in DATASETS else str(Path(name).resolve()))

    without = sum(line.endswith(NO_CAPTION) for line in ds.skipped)
    others = [line for line in ds.skipped if not line.endswith(NO_CAPTION)]
    if without:
        print(f"{name}: {without:,} of {without + len(ds.images):,} images have no caption and are "
              f"left out, listed in {folder / 'skipped.txt'}")
    if others:
        more = f", and {len(others) - 1:,} more in {folder / 'skipped.txt'}"
        print(f"{name}: {others[-1]}{more if len(others) > 1 else ''}")
    return ds


def short_name(name):
    """What is kept of a data set is called by this name: "cub", "own-FOLDER-1a2b3c". The digits
    come from the whole path, because two folders may have the same last name."""
    if name in DATASETS:
        return name
    path = Path(name).resolve()
    plain = re.sub(r"[^\w.-]", "_", path.name)[:40]
    return f"own-{plain}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


# ---- toy: birds drawn here -------------------------------------------------------------------
COLOURS = {     # what a caption can say of a part of the bird
    "black": (35, 35, 40), "white": (245, 245, 240), "brown": (130, 85, 45), "red": (215, 40, 40),
    "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (60, 160, 70),
    "blue": (45, 95, 215)}
BACKGROUNDS = [     # style: no caption says anything about it
    (150, 200, 238), (176, 222, 172), (232, 212, 168), (240, 196, 196), (204, 192, 232),
    (112, 128, 146), (78, 112, 88), (248, 236, 226)]
BILLS = {"short": 0.11, "long": 0.20}
BILL_COLOURS = ["black", "orange", "yellow"]

# A caption is a beginning and some parts, in the manner of CUB's. Parts come in any order and
# number, so that phi learns words in all places of a sentence and not whole sentences by heart.
BEGINNINGS = [
    "a {body} bird with ", "a small {body} bird with ", "this {body} bird has ",
    "this bird is {body} and has ", "this is a {body} bird that has ", "a {body} bird that has ",
    "this bird has "]
ONE_COLOUR_BEGINNINGS = [
    "an all {body} bird", "this bird is all {body}", "this all {body} bird",
    "this is a completely {body} bird", "a bird that is {body} all over"]
PARTS = [       # four parts, each with its forms
    ["{wing} wings", "wings that are {wing}"],
    ["a {crown} crown", "a {crown} head"],
    ["a {belly} belly", "a {belly} belly and breast"],
    ["a {bill} bill", "a {bill} {billcolour} beak", "a {billcolour} bill"]]


def toy_species(rng, count):
    """`count` species, a dict of colours and bill each. Any two differ in at least two of the
    four colours of body, wing, crown and belly."""
    names = list(COLOURS)
    species = [(colour,) * 4 for colour in names]       # one of each single colour
    while len(species) < count:
        body = rng.choice(names)
        new = [body]
        for _ in ("wing", "crown", "belly"):
            new.append(toy_part_colour(rng, body))
        if all(differences(new, old) >= 2 for old in species):
            species.append(tuple(new))

    birds = []
    for body, wing, crown, belly in species:
        birds.append(dict(body=body, wing=wing, crown=crown, belly=belly,
                          bill=rng.choice(list(BILLS)), billcolour=rng.choice(BILL_COLOURS)))
    return birds        # those of one colour come first: they are trained on


def toy_part_colour(rng, body):
    """The body's colour with probability 1/2, else any of the 8: in all with 1/2 + 1/16."""
    return body if rng.random() < 0.5 else rng.choice(list(COLOURS))


def differences(a, b):
    return sum(x != y for x, y in zip(a, b))


def toy_captions(rng, bird):
    """10 captions of a bird. Each names two to four of its parts. If the bird has one colour
    only, a caption says so, and may name fewer parts or none."""
    one_colour = bird["body"] == bird["wing"] == bird["crown"] == bird["belly"]
    captions = []
    for _ in range(10):
        count = rng.randint(0 if one_colour else 2, 4)
        parts = [rng.choice(forms) for forms in rng.sample(PARTS, count)]
        if one_colour:
            caption = rng.choice(ONE_COLOUR_BEGINNINGS)
            if parts:
                caption += " with "
        else:
            caption = rng.choice(BEGINNINGS)
        caption += ", ".join(parts[:-1])
        if len(parts) > 1:
            caption += " and "
        if parts:
            caption += parts[-1]
        captions.append(caption.format(**bird).replace("a orange", "an orange"))
    return captions


def toy_draw(rng, bird):
    """One image of a bird: (76, 76, 3) uint8, its box (4,) and its six keypoints (6, 2)."""
    S = 3                                       # drawn three times as large, then averaged
    pixel = S * IMAGE_SIZE / 76                 # numbers below are for an image of 76x76
    facing = rng.choice([-1, 1])
    unit = pixel * rng.uniform(50, 58)          # one unit of length
    centre_x = pixel * rng.uniform(34, 39)
    centre_y = pixel * rng.uniform(38, 43)
    background = [min(255, c + rng.randint(-10, 10)) for c in rng.choice(BACKGROUNDS)]
    tint = rng.randint(-8, 8)
    tilt = 3 * rng.uniform(-0.05, 0.05)

    # A sky that darkens downwards: a column of pixels, stretched.
    shade = np.linspace(1.06, 0.86, IMAGE_SIZE * S)[:, None, None]
    sky = np.clip(np.array(background) * shade, 0, 255).astype(np.uint8)
    image = Image.fromarray(sky).resize((IMAGE_SIZE * S, IMAGE_SIZE * S), Image.NEAREST)
    pen = ImageDraw.Draw(image)
    outline = []                                # every point of the bird, for its box

    def at(x, y):       # from the bird's own coordinates to pixels
        return centre_x + facing * unit * x, centre_y + unit * y

    def colour(name, factor=1.0):
        return tuple(int(max(0, min(255, c * factor + tint))) for c in COLOURS[name])

    def shape(points, fill):
        points = [at(x, y) for x, y in points]
        pen.polygon(points, fill=fill)
        outline.extend(points)

    def oval(x, y, rx, ry, fill, angle=0.0, first=0.0, last=1.0):
        a = np.linspace(first, last, 32) * 2 * np.pi
        u = rx * np.cos(a)
        v = ry * np.sin(a)
        cos, sin = np.cos(angle), np.sin(angle)
        shape(list(zip(x + cos * u - sin * v, y + sin * u + cos * v)), fill)

    branch = [(-3, 0.40 - tilt), (3, 0.40 + tilt), (3, 0.47 + tilt), (-3, 0.47 - tilt)]
    pen.polygon([at(x, y) for x, y in branch], fill=(112, 80, 56))
    for x in (-0.02, 0.10):                                                         # legs
        pen.line([at(x, 0.15), at(x + 0.02, 0.42)], fill=(90, 70, 50), width=round(pixel) + 1)
    tail = [(-0.20, -0.06), (-0.20, 0.10), (-0.50, 0.22), (-0.54, 0.09)]
    shape(tail, colour(bird["body"], 0.82))
    oval(0.0, 0.0, 0.35, 0.235, colour(bird["body"]), 0.10)
    oval(0.20, -0.14, 0.16, 0.17, colour(bird["body"]))                             # neck
    oval(0.06, 0.11, 0.23, 0.125, colour(bird["belly"]))
    length = BILLS[bird["bill"]]
    bill = [(0.42, -0.34), (0.42, -0.23), (0.43 + length, -0.26)]
    shape(bill, COLOURS[bird["billcolour"]])
    oval(0.28, -0.28, 0.19, 0.18, colour(bird["body"]))                             # head
    oval(0.28, -0.28, 0.19, 0.18, colour(bird["crown"]), 0.0, 0.44, 1.06)           # upper 2/3
    oval(0.37, -0.27, 0.042, 0.042, (250, 250, 250))                                # eye
    oval(0.38, -0.27, 0.024, 0.024, (10, 10, 10))
    oval(-0.14, -0.07, 0.24, 0.115, colour(bird["wing"], 0.75), 0.25)               # rim of wing
    oval(-0.14, -0.07, 0.22, 0.095, colour(bird["wing"]), 0.25)

    # To 76 pixels by averaging, which makes the edges smooth.
    pixels = np.asarray(image.reduce(S))
    low = (np.array(outline) / S).min(0).clip(0, IMAGE_SIZE)
    high = (np.array(outline) / S).max(0).clip(0, IMAGE_SIZE)
    spots = [(0.43 + length, -0.26), (0.06, 0.15), (0.28, -0.02),       # in KEYPOINTS' order
             (0.29, -0.44), (0.42, -0.36), (-0.52, 0.15)]
    keypoints = np.array([at(x, y) for x, y in spots]) / S
    return pixels, np.concatenate([low, high - low]), keypoints


def toy_examples(number, bird, label):
    """The 40 images of one species. It has random numbers of its own, so that several processes
    can share the work."""
    rng = random.Random(number)
    examples = []
    for i in range(40):
        pixels, box, keypoints = toy_draw(rng, bird)
        captions = toy_captions(rng, bird)
        examples.append(Example(pixels, captions, label, 40 * number + i, box, keypoints))
    return examples


def toy_bird_for(rng, caption):
    """A bird of which a caption of `toy_captions` is true: what is not named is drawn at random,
    as `toy_species` draws it."""
    caption = caption.replace("an orange", "a orange")
    values = dict(bill=BILLS, billcolour=BILL_COLOURS)      # of the other parts: COLOURS
    named = {}
    for form in BEGINNINGS + ONE_COLOUR_BEGINNINGS + sum(PARTS, []):
        found = re.search(re.sub(r"{(\w+)}", r"(?P<\1>\\w+)", form), caption)
        if not found:
            continue
        for part, word in found.groupdict().items():
            if word in values.get(part, COLOURS):
                named[part] = word
        if form in ONE_COLOUR_BEGINNINGS:
            named.update(dict.fromkeys(("wing", "crown", "belly"), named["body"]))

    # Bayes' rule: a part has its body's colour with probability 9/16, each other one with 1/16.
    colours = [named[part] for part in ("wing", "crown", "belly") if part in named]
    weights = [9 ** colours.count(colour) for colour in COLOURS]
    bird = dict(body=rng.choices(list(COLOURS), weights)[0])
    bird.update(named)
    for part in ("wing", "crown", "belly"):
        bird.setdefault(part, toy_part_colour(rng, bird["body"]))
    bird.setdefault("bill", rng.choice(list(BILLS)))
    bird.setdefault("billcolour", rng.choice(BILL_COLOURS))
    return bird


def toy_images_for(captions, seed=0):
    """What one can draw who knows the sentence alone: an image for each -> (N, 76, 76, 3) uint8."""
    rng = random.Random(seed)
    return np.stack([toy_draw(rng, toy_bird_for(rng, caption))[0] for caption in captions])


def build_toy():
    birds = toy_species(random.Random(0), 200)
    labels = []
    for number, bird in enumerate(birds):
        labels.append("{:03d}.{body}-{wing}-{crown}-{belly}".format(number, **bird))
    examples = []
    with ProcessPoolExecutor() as pool:
        for species in pool.map(toy_examples, range(200), birds, labels, chunksize=25):
            examples += species
    return examples, set(labels[150:]), []


# ---- CUB-200-2011: images, captions, boxes, parts --------------------------------------------
CUB_UNSEEN = {      # testclasses.txt of the authors, for captions that come without that file
    1, 4, 6, 8, 9, 14, 23, 29, 31, 33, 34, 35, 36, 37, 38, 43, 49, 51, 53, 66, 72, 79, 83, 84, 86,
    91, 95, 96, 98, 101, 102, 103, 112, 114, 119, 121, 130, 135, 138, 147, 156, 163, 165, 166, 180,
    183, 185, 186, 187, 197}
CUB_PARTS = ("2", "3", "4", "5", "6", "14")     # CUB's own numbers of KEYPOINTS
CUB_TABLES = r"(^|/)(images|bounding_boxes|part_locs)\.txt$"


def build_cub(images_path, captions_path, around_box=False):
    """CUB, packed or unpacked: CLASS/NAME.jpg, its captions as CLASS/NAME.txt or as NAME.txt all
    in one folder, and where there are CUB's tables, boxes and keypoints."""
    box_of = None
    if around_box:      # the boxes must be known before the images are read
        box_of = CubTables(images_path, read_files(images_path, CUB_TABLES).texts).box
    files = read_files(images_path, f"{PHOTOGRAPHS}|{CUB_TABLES}", box_of)
    tables = CubTables(images_path, files.texts)
    if around_box and not tables.boxes:
        raise UserError(f"{images_path} has no bounding boxes: cub-box needs images.txt and "
                        "bounding_boxes.txt of CUB_200_2011. Without them, use --dataset cub")
    captions, unseen, skipped = read_caption_archive(captions_path, files.images, CUB_UNSEEN)
    left_out = files.skipped

    # CUB's own order is that of images.txt. Without it, the order of the names.
    rows = tables.rows or {listed_name(path): row for row, path in enumerate(files.images)}
    examples = []
    for path in sorted(captions, key=lambda path: rows.get(listed_name(path), -1)):
        if listed_name(path) not in rows:
            left_out.append(f"{path}: is not in images.txt")
        elif around_box and not tables.box(path):
            left_out.append(f"{path}: no bounding box")
        else:
            pixels, window = files.images[path]
            examples.append(Example(pixels, *captions[path], rows[listed_name(path)],
                                    tables.small_box(path, window), tables.keypoints(path, window)))
    return examples, unseen, left_out + skipped


def build_cub_box(images_path, captions_path):
    return build_cub(images_path, captions_path, around_box=True)


class CubTables:
    """What images.txt, bounding_boxes.txt and part_locs.txt say of an image. All may be absent."""

    def __init__(self, source, texts):
        lines = {"images": [], "bounding_boxes": [], "part_locs": []}
        for path, content in texts.items():
            lines[stem(path)] = [line.split() for line in decode_text(content).splitlines()]
        self.numbers = {}       # CUB's number of an image, by CLASS/NAME
        self.boxes = {}         # number: (x, y, width, height), in pixels of the original image
        self.parts = {}         # (number, part): (x, y), likewise
        try:
            for number, path in lines["images"]:
                self.numbers[listed_name(path)] = number
            for number, *numbers in lines["bounding_boxes"]:
                x, y, width, height = finite(*numbers)
                if width > 0 and height > 0:
                    self.boxes[number] = (x, y, width, height)
            for number, part, x, y, visible in lines["part_locs"]:
                if visible == "1":
                    self.parts[number, part] = finite(x, y)
        except ValueError as error:
            raise UserError(f"{source}: a table is not as CUB's are ({error})") from None
        self.rows = {name: row for row, name in enumerate(self.numbers)}

    def box(self, path):
        return self.boxes.get(self.numbers.get(listed_name(path)))

    def small_box(self, path, window):
        """The box (x, y, width, height) in pixels of the 76x76 image that shows `window`."""
        if not self.box(path):
            return None
        x, y, width, height = self.box(path)
        corners = to_small(window, [(x, y), (x + width, y + height)])
        return np.concatenate([corners[0], corners[1] - corners[0]])

    def keypoints(self, path, window):
        """KEYPOINTS (6, 2) in pixels of the 76x76 image; NaN for those that are not visible."""
        if not self.parts:
            return None
        number = self.numbers.get(listed_name(path))
        points = [self.parts.get((number, part), (np.nan, np.nan)) for part in CUB_PARTS]
        return to_small(window, points)


def finite(*words):
    values = tuple(map(float, words))
    if not np.isfinite(values).all():
        raise ValueError(f"{' '.join(words)} is not finite")
    return values


def to_small(window, points):
    """Points (n, 2) of an original image, in pixels of the 76x76 image of a part of it."""
    left, top, right, bottom = window
    scale = IMAGE_SIZE / np.array([right - left, bottom - top])
    return (np.array(points) - [left, top]) * scale


def listed_name(path):
    """An image as CUB's images.txt calls it, without the ending: CLASS/NAME."""
    return f"{last_folder(path)}/{stem(path)}"


# ---- Oxford-102 flowers ----------------------------------------------------------------------
FLOWERS_UNSEEN = set(range(1, 21))      # testclasses.txt of the authors


def build_flowers(images_path, captions_path):
    """jpg/image_00001.jpg and class_00077/image_00001.txt: the class is where the text lies."""
    files = read_files(images_path, PHOTOGRAPHS)
    captions, unseen, skipped = read_caption_archive(captions_path, files.images, FLOWERS_UNSEEN)
    examples = []
    # The source's order is that of the file names, which Oxford-102 numbers throughout. Where each
    # class begins with 1.jpg, take files.images as they come: by folder, then by name.
    for row, path in enumerate(sorted(files.images, key=stem)):
        if path in captions:
            pixels, _ = files.images[path]
            examples.append(Example(pixels, *captions[path], row))
    return examples, unseen, files.skipped + skipped


# ---- a folder of your own --------------------------------------------------------------------
IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpg"}
TEXT_FOLDERS = {"text", "texts", "txt", "captions", "caption", "text_c10"}
TRAINING_FOLDER = r"train(ing)?\d*"
TEST_FOLDER = r"(val|valid|validation|dev|eval|test|testing)\d*"
CAPTION_TABLES = r"(^|/)(metadata\.jsonl|metadata\.csv|captions_[^/]*\.json)$"


def build_folder(path):
    """Your own images. Captions come as
        NAME.txt beside NAME.jpg, one caption a line; or text/NAME.txt and images/NAME.jpg,
        metadata.jsonl or metadata.csv with file_name and text (Hugging Face's imagefolder),
        captions_*.json (COCO).
    Sub-folders are classes; without them each image is a class of its own. Where train/ and test/
    (or val/) stand at the top and share no class, the latter is what is never trained on;
    otherwise it is a quarter of the classes, as in CUB."""
    files = read_files(path, rf"{IMAGE_NAMES}|\.txt$|{CAPTION_TABLES}")
    tables = {name: text for name, text in files.texts.items() if is_called(name, CAPTION_TABLES)}
    texts = {name: text for name, text in files.texts.items() if name not in tables}
    place = places(files.images, texts)
    pairs, alone = match(files.images, texts, place)

    captions = {image: [] for image in files.images}
    for image, text in pairs.items():
        captions[image] += read_captions(texts[text])
    skipped = files.skipped
    for name, content in tables.items():
        skipped += add_table(captions, name, content)
    whole = []
    for image, pixels in files.images.items():
        if pixels and captions[image]:
            whole.append(image)
        elif pixels:
            skipped.append(f"{image}: {alone.get(image, NO_CAPTION)}")
    skipped += sorted(f"{text}: {alone[text]}" for text in texts if text in alone)

    label_of, unseen, notes = folder_classes({image: place(image) for image in whole})
    rows = {image: row for row, image in enumerate(files.images)}
    examples = []
    for image in whole:
        pixels, _ = files.images[image]
        texts_of = list(dict.fromkeys(captions[image]))[:MAX_CAPTIONS]
        examples.append(Example(pixels, texts_of, label_of[image], rows[image]))
    return examples, unseen, skipped + notes


def places(images, texts):
    """A function from a path to its folder, without a part such as images/ or text/ that only
    says which of the two it holds: images/kind/1.jpg and text/kind/1.txt both lie in "kind"."""
    image_parts = folder_parts(images)
    text_parts = folder_parts(texts)
    apart = (IMAGE_FOLDERS & image_parts - text_parts) | (TEXT_FOLDERS & text_parts - image_parts)

    def place(path):
        return "/".join(part for part in path.split("/")[:-1] if part.lower() not in apart)
    return place


def folder_parts(paths):
    parts = set()
    for path in paths:
        parts.update(path.lower().split("/")[:-1])
    return parts


def folder_classes(folders):
    """Folders {image: folder} -> classes {image: class}, the set of the unseen classes, and a
    list of notes about the split."""
    around = posixpath.commonpath(folders.values()) if folders else ""
    inside = {image: folder[len(around):].strip("/") for image, folder in folders.items()}
    top = {image: folder.split("/")[0].lower() for image, folder in inside.items()}
    in_training = [image for image in folders if re.fullmatch(TRAINING_FOLDER, top[image])]
    in_test = [image for image in folders if re.fullmatch(TEST_FOLDER, top[image])]
    beside = sorted(set(folders) - {*in_training, *in_test})
    is_split = in_training and in_test and not beside

    classes = {}
    for image, folder in inside.items():
        name = folder.partition("/")[2] if is_split else folder
        classes[image] = name or image          # without a folder: a class of its own
    notes = []
    if is_split:
        unseen = {classes[image] for image in in_test}
        trained = {classes[image].lower() for image in in_training}
        in_both = [name for name in unseen if name.lower() in trained]
        if not in_both:
            return classes, unseen, notes
        notes.append(f"{top[in_test[0]]}/ is not taken as the split: {len(in_both)} of its classes "
                     "are in the training folder too")
    elif in_training and in_test:
        notes.append(f"{top[in_training[0]]}/ and {top[in_test[0]]}/ are not taken as the split: "
                     f"{len(beside)} images with captions lie beside them, such as {beside[0]}")
    names = sorted(set(classes.values()))
    random.Random(0).shuffle(names)
    return classes, set(names[:len(names) // 4]), notes


def add_table(captions, table, content):
    """Add the captions of a table to {image: list of captions}. Returns the lines to skip."""
    at = {}             # by the whole path, and by the file's name alone: COCO says no more
    called = {}
    for image in captions:
        at.setdefault(image.lower(), []).append(image)
        called.setdefault(posixpath.basename(image).lower(), []).append(image)
    lost = []
    for file, caption in table_rows(table, content):
        file = file.replace("\\", "/")
        image = posixpath.normpath(posixpath.join(posixpath.dirname(table), file))
        if image not in captions:
            named = at.get(image.lower()) or called.get(file.lower(), [])
            image = named[0] if len(named) == 1 else None
        if image:
            captions[image] += clean_captions([caption])
        else:
            lost.append(file)
    if lost:
        return [f"{table}: {len(lost)} {NO_IMAGE}, such as {lost[0]}"]
    return []


def table_rows(table, content):
    """A list of (file name, caption) of a metadata.csv, a metadata.jsonl or a COCO file."""
    text = decode_text(content)
    try:
        if table.lower().endswith(".csv"):
            entries = list(csv.DictReader(io.StringIO(text, newline="")))
        elif table.lower().endswith(".jsonl"):
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            coco = json.loads(text)
            file_of = {image["id"]: image["file_name"] for image in coco["images"]}
            entries = []
            for entry in coco["annotations"]:
                file = file_of.get(entry["image_id"], "an image without file_name")
                entries.append({"file_name": file, "text": entry["caption"]})
        rows = []
        for entry in entries:
            captions = entry["text"] if isinstance(entry["text"], list) else [entry["text"]]
            for caption in captions:
                rows.append((str(entry["file_name"]), str(caption or "")))
        return rows
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({type(error).__name__}: {error}): expected each "
                        "row to have file_name and text, or COCO's images and annotations"
                        ) from None


# ---- The table of data sets: a new one is a function above and a row here --------------------
# The shortest builder to copy is build_flowers. It gets the paths of the images and the captions,
# and returns Examples, the names of the unseen classes, and a line for each thing left out.
#     read_files(path, IMAGE_NAMES).images    {path: (pixels, window)} of a folder or an archive,
#                   None for an image that cannot be read: leave it out, it is in .skipped already.
#                   In an archive the path has the folders around it, too. The same for both are
#                   posixpath.basename(path), and where each class has a folder listed_name(path),
#                   its CLASS/NAME without the ending
#     read_caption_archive    a .txt for each image. It counts classes by the numbers in names such
#                   as 013.Bobolink or class_00013; for others name the unseen classes yourself
#     decode_text(read_bounded(path))         the text of one file, for captions in a form of your
#                   own; then clean_captions(list of strings). A line for an image without a caption
#                   ends with NO_CAPTION.
# Read no file outside the paths that you get: a cache is built again only where they change. A list
# of unseen classes lies with the images or the captions, or stands in the code.
# Before G train its text encoder, for photographs longer than by default:
#     python encoder.py --dataset NAME --from DIR --steps 6000
@dataclass
class Entry:
    build: callable         # function of the paths -> (examples, names of unseen classes, skipped)
    images: tuple = ()      # what the images' archive or folder may be called; the first is fetched
    captions: tuple = ()    # likewise the captions'; none where images and captions are in one file
    url: str = ""           # of the images; without it --from DIR is needed the first time
    md5: str = ""
    captions_url: str = ""  # ends with one of the names of `captions`


MIRROR = "https://github.com/raphaelsenn/gan-text-to-image/releases/latest/download/"
OWN_FOLDER = Entry(build_folder)
DATASETS = {
    "toy": Entry(build_toy),
    "cub": Entry(
        build_cub,
        images=("CUB_200_2011.tgz", "CUB_200_2011", "images"),
        captions=("cvpr2016_cub.tar.gz", "cvpr2016_cub", "caption-data-cub-v1.0.0.zip",
                  "captions", "text_c10", "text", "text.zip", "birds.zip"),
        url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        md5="97eceeb196236b17998738112f37df78",
        captions_url=MIRROR + "caption-data-cub-v1.0.0.zip"),
    "flowers": Entry(
        build_flowers,
        images=("102flowers.tgz", "jpg", "102flowers", "images"),
        captions=("cvpr2016_flowers.tar.gz", "cvpr2016_flowers", "caption-data-flowers-v1.0.0.zip",
                  "captions", "text_c10", "text", "text.zip", "flowers.zip"),
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
        md5="52808999861908f626f3c1f4e79d11fa",
        captions_url=MIRROR + "caption-data-flowers-v1.0.0.zip")}
DATASETS["cub-box"] = dataclasses.replace(DATASETS["cub"], build=build_cub_box)


def find_files(name, source):
    """The paths that a builder gets: none for toy, (images, captions) for cub and flowers."""
    if name not in DATASETS:
        return [Path(name).resolve()]
    if not DATASETS[name].images:
        return []
    if not source:
        fetch_files(name)
    folder = Path(source or CACHE / "downloads")
    paths = []
    for kind in ("images", "captions"):
        names = getattr(DATASETS[name], kind)
        assert isinstance(names, tuple), f"{kind} of {name}: a tuple, so with a comma: {names!r}"
        there = [folder / file for file in names if (folder / file).exists()]
        if not names:                   # a row of one kind: all is in one file
            continue
        if not there:
            raise UserError(f"no {kind} of {name} in {folder}: expected one of {', '.join(names)}")
        paths.append(there[0].resolve())
    return paths


def fetch_files(name):
    """Download to cache/downloads what is not there yet."""
    data_set = DATASETS[name]
    folder = CACHE / "downloads"
    if not (folder / data_set.images[0]).exists():
        if not data_set.url:
            raise UserError(f"{name} is not fetched: name the folder with its files, --from DIR")
        download(data_set.url, folder / data_set.images[0], data_set.md5)
    if not data_set.captions or any((folder / file).exists() for file in data_set.captions):
        return
    try:
        if not data_set.captions_url:
            raise UserError(f"there is no address for those of {name}")
        download(data_set.captions_url, folder / data_set.captions_url.rsplit("/", 1)[1])
    except UserError as error:
        raise UserError(f"the captions could not be fetched ({error}). Get {data_set.captions[0]} "
                        f"(see the README, \"Data\"), put it into {folder}, run this again"
                        ) from None


def download(url, path, md5=""):
    """Fetch a URL to `path`. What broke off is kept as a .part and continued. Raises UserError
    when it fails, or when the file's MD5 is not the expected one."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            receive(answer, part, have)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:           # 416: nothing is left to fetch
            raise UserError(f"{url} answered {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:   # no network, a bad URL ...
        raise UserError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}") from None
    if md5:
        found = file_md5(part)
        if found != md5:
            part.unlink()
            raise UserError(f"{path.name} has MD5 {found}, expected {md5}: it was removed, "
                            "run this again")
    os.replace(part, path)


def receive(answer, part, have):
    """Write a server's answer to the end of a file of `have` bytes, with a progress line."""
    if answer.status != 206:                        # the server starts at the beginning
        have = 0
    total = have + int(answer.headers.get("Content-Length") or 0)
    with open(part, "r+b" if have else "wb") as f:
        f.seek(have)
        content = answer.read(1 << 20)
        while content:
            f.write(content)
            have += len(content)
            print(f"\r{part.stem}: {have / 1e6:.0f} of {total / 1e6:.0f} MB", end="", flush=True)
            content = answer.read(1 << 20)
    print()
    if have < total:
        raise UserError(f"{answer.url} broke off after {have:,} of {total:,} bytes: "
                        "run this again to go on")


def file_md5(path):
    digest = hashlib.md5()
    with open(path, "rb") as f:
        for content in iter(lambda: f.read(1 << 20), b""):
            digest.update(content)
    return digest.hexdigest()


# ---- Which caption belongs to which image ----------------------------------------------------
NO_CAPTION = "no caption"
NO_IMAGE = "of its rows name no image that is here"
CLASS_LISTS = r"classes\d*\.txt$"       # testclasses.txt, trainvalclasses.txt, allclasses.txt


def match(images, texts, place):
    """Paths of images and of texts -> {image: text}, and {path: reason} for those left alone.

    place(path) is the class or folder of a path. An image and a text belong together if they have
    the same name in the same place. Where the two sides have no place in common, its last part
    decides (birds/images/kind/1.jpg, text/kind/1.txt), or else the name alone (jpg/1.jpg,
    class_7/1.txt). Upper and lower case count as equal. What is not unique is left alone."""
    def last_part(path):
        return posixpath.basename(place(path))

    def nothing(path):
        return ""

    for where in (place, last_part, nothing):
        image_places = {where(image).lower() for image in images}
        text_places = {where(text).lower() for text in texts}
        if (image_places & text_places) - {""}:
            break

    def key(path):
        return where(path).lower(), stem(path).lower()

    texts_of = {}
    places_of = {}
    for text in texts:
        texts_of.setdefault(key(text), []).append(text)
    for image in images:
        places_of.setdefault(key(image), set()).add(place(image))

    pairs = {}
    alone = {}
    for image in images:
        found = texts_of.get(key(image), [])
        if len(found) == 1 and len(places_of[key(image)]) == 1:
            pairs[image] = found[0]
        elif found:
            alone[image] = f"several files have this name, so {NO_CAPTION}"
    used = set(pairs.values())
    alone.update({text: "no image" for text in texts if text not in used})
    return pairs, alone


def read_caption_archive(captions_path, images, unseen):
    """Captions of CUB or Oxford-102 for images {path: decoded image or None} -> {image: (captions,
    class)}, the names of the unseen classes, and lines on what is missing. unseen: numbers of
    the unseen classes, where no testclasses.txt names them."""
    texts = read_files(captions_path, r"\.txt$").texts
    lists = {path for path in texts if is_called(path, CLASS_LISTS)}
    pairs, alone = match(images, set(texts) - lists, last_folder)

    # The class is the image's folder; where all images are in one, the caption's.
    one_folder = len({last_folder(image) for image in pairs}) == 1
    found = {}
    skipped = []
    for image, decoded in images.items():
        text = pairs.get(image)
        captions = read_captions(texts[text]) if text else []
        if decoded and captions:
            found[image] = captions, last_folder(text if one_folder else image)
        elif decoded:
            skipped.append(f"{image}: {alone.get(image, NO_CAPTION)}")
    skipped += sorted(f"{text}: {alone[text]}" for text in texts if text in alone)

    named = set()
    for path in lists:
        keys = {class_key(label) for label in decode_text(texts[path]).split()}
        named |= keys
        if stem(path).lower() == "testclasses":
            unseen = keys
    named |= unseen
    labels = {label for _, label in found.values()}
    gone = sorted(map(str, named - {class_key(label) for label in labels}))
    if gone:
        more = " ..." if len(gone) > 5 else ""
        skipped.append(f"{len(gone)} classes of the split have no image with a caption: "
                       f"{', '.join(gone[:5])}{more}")
    return found, {label for label in labels if class_key(label) in unseen}, skipped


def class_key(label):
    """013.Bobolink -> 13, class_00013 -> 13; a name without a number stays as it is."""
    number = re.match(r"(?:class_)?(\d{1,9})(?:\.|$)", label.lower())
    return int(number[1]) if number else label.lower()


def last_folder(path):
    """.../013.Bobolink/1.jpg -> 013.Bobolink"""
    return posixpath.basename(posixpath.dirname(path))


def stem(path):
    """.../013.Bobolink/1.jpg -> 1"""
    return posixpath.splitext(posixpath.basename(path))[0]


# ---- Reading what comes from outside: folders, archives, images, captions --------------------
MAX_FILE = 256 << 20            # bytes of one file; CUB's table of attributes has some 60 MB
MAX_TOTAL = 8 << 30             # bytes of one archive, unpacked
MAX_PIXELS = 64_000_000         # width x height of one image
MAX_CAPTIONS = 100              # of one image; more are left out
# Not every Pillow reads the last four. They count as images nevertheless, so that they are listed
# as skipped and do not vanish unseen.
IMAGE_NAMES = r"\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|avif|heic|heif|jxl)$"
# Not the outlines of the birds and flowers, which lie beside the photographs under the same names.
PHOTOGRAPHS = rf"^(?!.*(^|/)(segmentations|segmim)/).*{IMAGE_NAMES}"
Image.init()
FORMATS = [kind for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")
           if kind in Image.OPEN]       # and not EPS, which is a program that would be run

# images {path: (pixels, window) or None where it cannot be read}, texts {path: bytes}, skipped:
# a line for each image that cannot be read, and why.
Files = namedtuple("Files", "images texts skipped")


def is_called(path, pattern):
    return re.search(pattern, path, re.IGNORECASE) is not None


def read_files(path, pattern, box_of=None):
    """All files of a folder or archive whose path has the pattern, in the order of their paths.
    box_of: from an image's path to the box for `read_image`."""
    images = {}
    texts = {}
    skipped = []
    waiting = deque()

    def finish_one():
        name, future = waiting.popleft()
        images[name] = None
        try:
            images[name] = future.result()
        except ValueError as error:
            skipped.append(f"{name}: {error}")

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")         # Pillow's own about large images
        for name, content in iterate_files(path, pattern):
            if content is None:
                skipped.append(f"{name}: is a link or a device, not a file")
            elif is_called(name, IMAGE_NAMES):
                box = box_of(name) if box_of else None
                waiting.append((name, pool.submit(read_image, content, box)))
            else:
                texts[name] = content
            if len(waiting) > 32:               # so that a gigabyte of images does not pile up
                finish_one()
        while waiting:
            finish_one()
    in_order = sorted(images, key=lambda name: name.split("/"))
    return Files({name: images[name] for name in in_order}, texts, sorted(skipped))


def iterate_files(path, pattern):
    """(path, bytes) of each file with the pattern in its path, of a folder, a .zip or a .tar, also
    a compressed one. Bytes are None for what is no plain file. Hidden files are no data. Nothing
    is unpacked to disk. Archives are read to their end, so that a broken-off one is noticed.
    Raises UserError."""
    path = Path(path)
    if path.is_dir():
        for file in folder_files(path):
            name = file.relative_to(path).as_posix()
            if is_called(name, pattern):
                yield name, read_bounded(file) if file.is_file() else None
        return
    try:
        with open(path, "rb") as f:
            is_zip = f.read(4) in (b"PK\3\4", b"PK\5\6")
        if is_zip:
            yield from zip_members(path, pattern)
        else:
            yield from tar_members(path, pattern)
    except UserError:
        raise
    except Exception as error:          # the readers raise all sorts of things on broken archives
        raise UserError(f"{path} is damaged, broken off or not an archive ({type(error).__name__}: "
                        f"{error}): remove it and fetch it again") from None


def folder_files(folder, above=()):
    """Paths of all files below a folder. Links are followed, but not in circles."""
    real = folder.resolve()
    if real in above:
        return
    ours = (CACHE.resolve(), Path("runs").resolve())    # these change while they are read
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or real / entry.name in ours:
            continue
        if entry.is_dir():
            yield from folder_files(entry, (*above, real))
        else:
            yield entry


def zip_members(path, pattern):
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            total = check_size(path, member.filename, member.file_size, total)
            name = plain_name(member.filename, pattern)
            if member.is_dir():
                continue
            if name:
                content = archive.read(member)
                is_file = (member.external_attr >> 28) in (0, 8)      # 0: made on Windows
                yield name, content if is_file else None
            else:
                with archive.open(member) as f:
                    read_to_end(f)      # its checksum is compared there


class StrictTarInfo(tarfile.TarInfo):
    """A header of a .tar. Python's own takes any broken or missing header for the end of the
    archive; here the end is a block of zeros and nothing else."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end of the archive: {error}") from None

    def _proc_member(self, archive):
        """Made for subclasses; what is behind a header is read only here, a long name too."""
        if self.size > MAX_FILE:
            raise tarfile.ReadError(f"{self.name!r} is too large ({self.size:,} bytes)")
        return super()._proc_member(archive)


def tar_members(path, pattern):
    total = 0
    with open_compressed(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:
            for member in archive:
                total = check_size(path, member.name, member.size, total)
                name = plain_name(member.name, pattern)
                if name and not member.isdir():
                    yield name, archive.extractfile(member).read() if member.isreg() else None
        read_to_end(stream)             # the checksum of a .gz is behind the last member


def open_compressed(path):
    with open(path, "rb") as f:
        start = f.read(3)
    for mark, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7z", lzma.open)):
        if start.startswith(mark):
            return opener(path)
    return open(path, "rb")


def read_to_end(stream):
    total = 0
    content = stream.read(1 << 20)
    while content:
        total += len(content)
        if total > MAX_TOTAL:
            raise UserError(f"an archive goes on for more than {MAX_TOTAL >> 30} GB")
        content = stream.read(1 << 20)


def plain_name(name, pattern):
    """A member's path without "./", if it has the pattern and is not hidden; else None."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") for part in parts)
    name = "/".join(parts)
    return name if not hidden and is_called(name, pattern) else None


def check_size(archive, name, size, total):
    """The bytes so far, after one more member. Raises UserError where they are too many."""
    if size > MAX_FILE or total + size > MAX_TOTAL:
        raise UserError(f"{archive} is refused: its member {name!r} is too large "
                        f"({size:,} bytes, after {total:,})")
    return total + size


def read_bounded(path):
    """The bytes of an image or text file. Raises UserError where they are too many."""
    size = Path(path).stat().st_size
    if size > MAX_FILE:
        raise UserError(f"{path} has more than {MAX_FILE >> 20} MB: not an image or a text")
    return Path(path).read_bytes()


def read_image(data, box=None):
    """An image file -> ((76, 76, 3) uint8, the window (left, top, right, bottom) that it shows).

    data: the file's bytes. box (x, y, width, height): show only a square around it. Like the
    authors, scales to 76x76 without keeping the proportions. Raises ValueError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels, too many")
        window = square_around(box, image.size) if box else (0, 0, width, height)

        # A large JPEG can be decoded at a half, a quarter ... of its size, as long as the window
        # has twice the pixels that are needed.
        left, top, right, bottom = window
        enough_x = 2 * IMAGE_SIZE * width / (right - left)
        enough_y = 2 * IMAGE_SIZE * height / (bottom - top)
        image.draft("RGB", (round(enough_x), round(enough_y)))
        scale_x = image.width / width
        scale_y = image.height / height
        part = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
        image = to_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC, part)
        image = ImageOps.exif_transpose(image)          # phones store upright images lying down
        return np.asarray(image), window
    except UnidentifiedImageError:
        raise ValueError("not an image, or of a kind that this Pillow cannot read") from None
    except Exception as error:          # Pillow's decoders raise all sorts of things
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from None


def square_around(box, size):
    """The window (left, top, right, bottom) around a box (x, y, width, height) in an image of
    the given size: 1.4 times the box's longer side wide and high, moved and cut to lie inside."""
    x, y, width, height = box
    side = 1.4 * max(width, height)
    window_width = min(side, size[0])
    window_height = min(side, size[1])
    left = min(max(0, x + width / 2 - window_width / 2), size[0] - window_width)
    top = min(max(0, y + height / 2 - window_height / 2), size[1] - window_height)
    return left, top, left + window_width, top + window_height


def to_rgb(image):
    """Any mode of Pillow's to RGB. 16-bit greys, and floats from 0 to 1, are scaled; what is
    transparent is laid on white."""
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image).astype(np.float32))
        if grey.max() > 255:
            grey = grey / 257
        elif image.mode == "F" and grey.max() <= 1:
            grey = grey * 255
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode_text(data):
    """Bytes of a text file in any of the usual encodings -> string."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        return data.decode("utf-16" if is_utf16 else "cp1252", errors="replace")


def read_captions(data):
    """Bytes of a caption file -> list of captions, one a line."""
    return clean_captions(decode_text(data).splitlines())


def clean_captions(lines):
    """Captions with single spaces. Those with fewer than 3 letters are left out: the real sets
    have lines such as "{}" or "v"."""
    captions = [" ".join(line.split()) for line in lines]
    return [line for line in captions if sum(map(str.isalpha, line)) >= 3][:MAX_CAPTIONS]


# ---- The cache -------------------------------------------------------------------------------
def file_stamps(paths):
    """What a cache is made from: name, size and time of every file."""
    files = []
    for path in paths:
        files += folder_files(path) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files if file.exists()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def building_code():
    """All of this file above "The cache": whoever edits a builder, a table of words, or how images
    are read gets a new cache."""
    return Path(__file__).read_text(encoding="utf-8").split("\n# ---- The cache ---")[0]


def newest_cache(name):
    """(folder, paths that it was made from) of the newest cache of cub or flowers. (None, []):
    there is none, or one of another version, whose files are gone."""
    if name not in DATASETS:
        return None, []
    caches = sorted(CACHE.glob(f"{name}-{'[0-9a-f]' * 16}/meta.json"), key=os.path.getmtime)
    if not caches:
        return None, []
    try:
        meta = json.loads(caches[-1].read_text())
        paths = [Path(path) for path in meta["paths"]]
        readable = meta.get("format") == [CACHE_FORMAT, IMAGE_SIZE]
        readable = readable or all(path.exists() for path in paths)
        return (caches[-1].parent, paths) if readable else (None, [])
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, []


def write_cache(folder, label, paths, examples, unseen, skipped):
    """Write a cache to a folder of another name, which is then renamed: a killed or a second
    process never leaves half of one. label: its `short_name`."""
    if not examples:
        # The line of a table says more than that of an image.
        without = [line for line in skipped if line.endswith(NO_CAPTION)]
        tables = [line for line in skipped if NO_IMAGE in line]
        why = f": {(tables or without or skipped)[0]} ({len(skipped)} in all)" if skipped else ""
        raise UserError(f"{label}: found no image with a caption{why}")
    for example in examples:                        # mistakes of a new builder
        assert isinstance(example.pixels, np.ndarray), "pixels: the first of (pixels, window)"
        assert isinstance(example.label, str), f"a label is its class's name: {example.label!r}"
        assert example.pixels.dtype == np.uint8, f"pixels of {example.pixels.dtype}, not uint8"
        assert example.pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3), example.pixels.shape
        assert example.captions and not isinstance(example.captions, str), example.captions
    class_names = sorted({example.label for example in examples})
    assert not unseen or set(unseen) & set(class_names), f"no class is called {list(unseen)[:5]}"
    gone = sorted(set(unseen) - set(class_names))
    if gone:
        skipped = [*skipped, f"unseen classes without an image: {', '.join(gone)}"]
    number_of = {name: number for number, name in enumerate(class_names)}
    arrays = {
        "images": np.stack([example.pixels for example in examples]),
        "labels": np.array([number_of[example.label] for example in examples]),
        "unseen_classes": np.array([name in unseen for name in class_names]),
        "rows": np.array([example.row for example in examples])}
    if any(example.box is not None for example in examples):
        arrays["boxes"] = stack_known([example.box for example in examples], (4,))
    if any(example.keypoints is not None for example in examples):
        arrays["keypoints"] = stack_known([example.keypoints for example in examples], (6, 2))
    meta = dict(format=[CACHE_FORMAT, IMAGE_SIZE], paths=[str(path) for path in paths],
                class_names=class_names, captions=[example.captions for example in examples])
    lines = [printable(line) + "\n" for line in skipped]

    CACHE.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=CACHE, prefix=".new-"))
    try:
        for key, array in arrays.items():
            np.save(new / f"{key}.npy", array)
        (new / "skipped.txt").write_text("".join(lines), encoding="utf-8")
        (new / "meta.json").write_text(json.dumps(meta))
        new.chmod(0o755)
        if folder.exists() and not (folder / "meta.json").exists():
            shutil.rmtree(folder)                   # a cache of which someone removed a part
        os.replace(new, folder)
    except OSError:
        if not (folder / "meta.json").exists():     # else another process was faster, all is well
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for other in CACHE.iterdir():                   # of an earlier state of the same source
        if other != folder and re.fullmatch(re.escape(label) + "-[0-9a-f]{16}", other.name):
            shutil.rmtree(other, ignore_errors=True)


def printable(text):
    """A text without line ends and other control characters: a blank for each."""
    return "".join(c if c.isprintable() else " " for c in text)


def stack_known(values, shape):
    """A list of arrays or None -> one float32 array, NaN for None."""
    unknown = np.full(shape, np.nan)
    return np.stack([unknown if v is None else v for v in values]).astype(np.float32)


def read_cache(folder, name):
    try:
        meta = json.loads((folder / "meta.json").read_text())
        skipped = (folder / "skipped.txt").read_text(encoding="utf-8").splitlines()
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
        return Dataset(name=name, captions=meta["captions"], class_names=meta["class_names"],
                       skipped=skipped, **arrays)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"the cache {folder} is damaged ({type(error).__name__}: {error}): "
                        "remove this folder, it is then built again") from None


# ---- Views of the images ---------------------------------------------------------------------
def image_tensor(ds, device="cpu"):
    """All images of a data set as one uint8 tensor (N, 76, 76, 3). On a CPU it stays
    memory-mapped. Never write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # torch warns that the map is read-only
        return torch.from_numpy(ds.images).to(device)


def crops(images, index, dy, dx, flip):
    """Windows of many images at once. images (N, 76, 76, 3) uint8; index, dy, dx (B,) int and
    flip (B,) bool on the same device -> (B, 3, 64, 64) float32 in [-1, 1], channels last in
    memory."""
    steps = torch.arange(CROP, device=images.device)
    rows = dy[:, None] + steps                                              # (B, 64)
    columns = dx[:, None] + torch.where(flip[:, None], CROP - 1 - steps, steps)
    x = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]     # (B, 64, 64, 3)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def random_crops(images, index):
    """[A] section 5: a random view of each image, a 64x64 window, mirrored or not."""
    B = len(index)
    dy, dx = torch.randint(IMAGE_SIZE - CROP + 1, (2, B), device=images.device)
    flip = torch.rand(B, device=images.device) < 0.5
    return crops(images, index, dy, dx, flip)


def centre_crops(images, index):
    middle = torch.full_like(index, (IMAGE_SIZE - CROP) // 2)
    return crops(images, index, middle, middle, torch.zeros_like(index, dtype=torch.bool))


def to_pixels(x):
    """(N, 3, 64, 64) in [-1, 1] -> (N, 64, 64, 3) uint8 on the CPU."""
    x = (x.clamp(-1, 1) + 1) * 127.5
    return x.round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---- Batches: x, h, h_wrong ------------------------------------------------------------------
def caption_starts(ds):
    """Where each image's captions begin when all captions are laid end to end: (N + 1,) long."""
    return torch.tensor([0] + [len(captions) for captions in ds.captions]).cumsum(0)


def random_captions(starts, images, count=1):
    """Draw captions of images (B,): their rows (count, B) in the list of all captions."""
    first = starts[images]
    number = starts[images + 1] - first
    draw = torch.rand(count, len(images), device=images.device) * number       # below `number`
    return first + draw.long()


def draw_other_class(own, classes):
    """For classes `own` (B,), numbers from 0 to classes - 1, draw another class each: (B,).

    Each other one is equally likely. With 5 classes and own = 3 a step of 1, 2, 3 or 4 is drawn,
    and 3 + step, counted around the circle (modulo 5), is 4, 0, 1 or 2."""
    step = 1 + random_below(classes - 1, own)
    return (own + step) % classes


def random_below(limit, like):
    """Whole numbers from 0 to limit - 1, as many as `like` has. limit: a number, or one each."""
    return (torch.rand(len(like), device=like.device, dtype=torch.float64) * limit).long()


class Batches:
    """All that a step reads, on the device: the images as uint8 and the embedding of every
    caption. A batch is a few gathers, so that no loader process is needed.

    caption_table: (captions of all images, 1024) half. captions=(low, high): h is the mean of k
    captions of the image, k drawn from low to high. Raises UserError if there is only one
    training class: a wrong text comes from another class."""

    def __init__(self, ds, caption_table, device, captions=(1, 1)):
        index = ds.training_images()
        index = index[np.argsort(ds.labels[index], kind="stable")]      # class by class
        _, class_of, class_size = np.unique(
            ds.labels[index], return_inverse=True, return_counts=True)
        if len(class_size) < 2:
            raise UserError(f"{ds.name} has images of {len(class_size)} training class: at least "
                            "two are needed, because a wrong text comes from another class")
        self.images = image_tensor(ds, device)
        self.captions = captions
        self.caption_table = caption_table.to(device)
        self.caption_starts = caption_starts(ds).to(device)
        self.training_images = torch.from_numpy(index).to(device)       # (n,) class by class
        self.class_of = torch.from_numpy(class_of).to(device)           # (n,) 0 .. classes - 1
        self.class_size = torch.from_numpy(class_size).to(device)       # (classes,)
        self.class_start = self.class_size.cumsum(0) - self.class_size  # where each class begins

    def __len__(self):
        return len(self.training_images)

    def texts(self, images):
        """h of images (B,): the mean of k random captions of each -> (B, 1024) float32."""
        low, high = self.captions
        rows = random_captions(self.caption_starts, images, high)       # (high, B)
        h = self.caption_table[rows].float()                            # (high, B, 1024)
        if low == high:
            return h.mean(0)
        k = torch.randint(low, high + 1, (len(images),), device=images.device)
        taken = torch.arange(high, device=images.device)[:, None] < k   # (high, B): the first k
        return (h * taken[:, :, None]).sum(0) / k[:, None]

    def batch(self, positions):
        """What [A] Algorithm 1 draws for a step: x, h and h_wrong.

        positions (B,) in training_images -> images, texts that describe them, and texts of a
        random image of another class.
        """
        other = draw_other_class(self.class_of[positions], len(self.class_size))
        wrong = self.class_start[other] + random_below(self.class_size[other], positions)
        x = random_crops(self.images, self.training_images[positions])
        h = self.texts(self.training_images[positions])
        h_wrong = self.texts(self.training_images[wrong])
        return x, h, h_wrong


def example_images(ds, n=6):
    """n images of unseen classes (of any, if there are none), one a class, always the same."""
    rng = np.random.default_rng(0)
    classes = np.flatnonzero(ds.unseen_classes)
    if len(classes) == 0:
        classes = np.arange(len(ds.class_names))
    chosen = rng.permutation(classes)[:n]
    return [int(rng.choice(np.flatnonzero(ds.labels == label))) for label in chosen]


# ---- Grids and plots -------------------------------------------------------------------------
def image_grid(rows, texts=None, titles=None, scale=1, width=230):
    """Rows of equally many images, (H, W, 3) uint8 each, as one Pillow image. texts: one beside
    each row, in a column of `width` pixels. titles: one above each column."""
    font = ImageFont.load_default(13)
    image_height, image_width = rows[0][0].shape[:2]
    h = int(scale * image_height)
    w = int(scale * image_width)
    left = width if texts else 0
    top = 22 if titles else 0
    page = Image.new("RGB", (left + (w + 2) * len(rows[0]), top + (h + 2) * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for j, title in enumerate(titles or []):
        pen.text((left + j * (w + 2) + w / 2, 10), title, "black", font, "mm")
    for i, row in enumerate(rows):
        y = top + i * (h + 2)
        if texts:
            text = printable(texts[i][:500])
            lines = textwrap.wrap(text, 32, max_lines=max(1, h // 17), placeholder=" ...")
            pen.multiline_text((6, y + 2), "\n".join(lines), "black", font)
        for j, pixels in enumerate(row):
            image = Image.fromarray(np.ascontiguousarray(pixels)).resize((w, h), Image.NEAREST)
            page.paste(image, (left + j * (w + 2), y))
    return page


def plot(panels, path, size=360):
    """Write line plots side by side. panels: a list of {name: (xs, ys)}. Axes begin at 0."""
    page = Image.new("RGB", (size * len(panels), size), "white")
    pen = ImageDraw.Draw(page)
    for number, lines in enumerate(panels):
        left = number * size + 45
        right = (number + 1) * size - 15
        top = 20 + 14 * len(lines)
        bottom = size - 30
        widest = max([1e-9] + [float(max(xs, default=0)) for xs, _ in lines.values()])
        highest = max([1e-9] + [float(max(ys, default=0)) for _, ys in lines.values()])
        pen.rectangle((left, top, right, bottom), outline="grey")
        pen.text((left - 6, top), f"{highest:.1f}", "black", anchor="rm")
        pen.text((left - 6, bottom), "0", "black", anchor="rm")
        pen.text((right, bottom + 12), f"{widest:g}", "black", anchor="rm")
        for i, (name, (xs, ys)) in enumerate(lines.items()):
            points = []
            for x, y in zip(xs, ys):
                points.append((left + (right - left) * float(x) / widest,
                               bottom - (bottom - top) * float(y) / highest))
            colour = ("black", "red", "green", "orange", "blue")[i % 5]
            if len(points) > 1:
                pen.line(points, colour, 2)
            pen.text((left, 10 + 14 * i), name, colour, anchor="lm")
    save_image(page, path)


def save_image(image, path):
    """Write a Pillow image, whole or not at all. Raises UserError for an unknown ending."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"cannot write {path}: name an image file, such as sample.png")
    write_atomically(path, lambda f: image.save(f, kind))


# ---- Shared by the scripts: errors, writing, checkpoints, device and precision ---------------
class UserError(Exception):
    """What the user can mend. `run_script` prints it in one line and exits with code 2."""


def run_script(main):
    """Run a script's main function. UserError and Ctrl-C give a line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Progress shows at once, in a file too; letters that a console lacks end no run.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except (UserError, OSError) as error:       # OSError: a full disk, a folder without rights
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: choose a smaller --batch-size or --ngf, or end "
              "what else runs on it", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def int_between(low, high):
    """For argparse: a whole number from low to high."""
    def parse(text):
        if not text.isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:,} to {high:,}, got {text[:40]!r}")
        return int(text)
    return parse


def write_atomically(path, write):
    """`write(file)` into `path`, whole or not at all: first beside it, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())        # on the disk before the name points to it
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


FORMAT = 1      # of checkpoints


def save_checkpoint(path, **content):
    """Write a dict of tensors and plain values, whole or not at all. A full disk is an OSError."""
    buffer = io.BytesIO()       # torch.save on a full disk would raise a RuntimeError
    torch.save(dict(format=FORMAT, **content), buffer)
    write_atomically(path, lambda f: f.write(buffer.getbuffer()))


def load_checkpoint(path, kind):
    """Read a file that `save_checkpoint` wrote. kind: "gan-cls" or "encoder". Nothing in it is
    run as code. Raises UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:          # a file of another sort can fail anywhere in torch.load
        raise UserError(f"{path} is not a checkpoint, or only a part of one "
                        f"({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UserError(f"{path} does not hold a {kind} checkpoint")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}, this version reads {FORMAT}: "
                        "train it again")
    return content


def load_network(make, state):
    """A network made by `make()` with the weights of a checkpoint, in 32 bits. It is made without
    memory ("meta"), so that settings that ask for a huge one fail on their shapes."""
    with torch.device("meta"):
        net = make()
    net.load_state_dict(from_8_bits(state), assign=True)
    return net.float()


SCALE = " scale"        # of a weight "net.0.weight" in 8 bits: "net.0.weight scale"


def to_8_bits(state):
    """A state_dict for a file: weights as whole numbers from -127 to 127, with a scale for each
    row. The rest, biases and batch norm, stays as it is."""
    small = {}
    for key, value in state.items():
        if value.is_floating_point() and value.dim() > 1:
            scale = value.abs().amax(tuple(range(1, value.dim())), keepdim=True).float() / 127
            scale = scale.clamp(min=1e-12)
            small[key] = (value / scale).round().to(torch.int8)
            small[key + SCALE] = scale
        else:
            small[key] = value
    return small


def from_8_bits(state):
    """The inverse of `to_8_bits`. What is not in 8 bits is left as it is."""
    large = {}
    for key, value in state.items():
        if key + SCALE in state:
            value = value * state[key + SCALE]
        if not key.endswith(SCALE):
            large[key] = value
    return large


@contextlib.contextmanager
def checkpoint_errors(path):
    """Inside it any failure is a UserError: a checkpoint of another sort can fail anywhere. But
    a full disk or a full GPU is not the checkpoint's fault."""
    try:
        yield
    except (UserError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} does not fit this version's networks ({type(error).__name__}): "
                        "it is damaged, or of other code; train it again, into another folder"
                        ) from None


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name="auto"):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch device. auto: CUDA where there is one. Raises
    UserError for any other. On CUDA, "fp32" means TF32 from here on: products and convolutions
    take numbers with 10 bits behind the point, which is several times as fast."""
    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if "cuda" in here else "cpu"
    if name not in here:
        raise UserError(f"there is no device {name!r} here, expected one of: {', '.join(here)}")
    try:
        probe = torch.ones(1, device=name)
        probe.sum().item()              # a kernel must run, not only be sent
        device = probe.device
    except RuntimeError as error:       # a driver or a card that does not fit, for instance
        raise UserError(f"{name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True           # try the convolutions' kernels, once
        torch.set_float32_matmul_precision("high")      # TF32
    return device


def pick_precision(device, name="auto", log=print):
    """"auto", "bf16", "fp16" or "fp32" -> one of the last three: what products and convolutions
    are computed in. Losses, weights, batch norm's statistics and Adam's state stay in fp32.

    auto: on CUDA bf16 from compute capability 8 on, else fp16. On a CPU with bf16 instructions
    the faster one, by a measurement: on some they make it twice as fast, on others twice as
    slow."""
    device = torch.device(device)
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if not cpu_has_bf16():
        return "fp32"
    # In turns, and the best of each: other programs on the machine disturb single measurements.
    times = []
    for _ in range(20):
        times.append((time_convolution("fp32"), time_convolution("bf16")))
    fp32, bf16 = np.min(times, axis=0)
    precision = "bf16" if fp32 > 1.15 * bf16 else "fp32"
    log(f"precision {precision}: a convolution takes {1000 * fp32:.1f} ms in fp32 and "
        f"{1000 * bf16:.1f} ms in bf16")
    return precision


def cpu_has_bf16():
    """Does this CPU multiply bf16 itself?"""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, probe, bool)():       # not torch's public names; bool() is False
            return True
    return False


def time_convolution(precision):
    """Seconds for one of D's convolutions on the CPU, forward and backward. Draws no random
    numbers, so that a seed gives the same run with and without it."""
    x = torch.ones(32, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.ones(128, 64, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    start = time.perf_counter()
    with torch.enable_grad():
        with autocast(torch.device("cpu"), precision):
            y = F.conv2d(x, weight, stride=2, padding=1)
        torch.autograd.grad(y.float().sum(), (x, weight))
    return time.perf_counter() - start


def autocast(device, precision):
    """A context in which products and convolutions are computed in bf16 or fp16."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[precision])


def grad_scaler(device, precision):
    """fp16 has so small a range that gradients must be scaled; for the others it does nothing."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")


def add_options(add):
    """The options that all scripts with a data set have. add: a parser's add_argument."""
    add("--dataset", default="toy",
        help=f"{', '.join(DATASETS)}, or a folder or .zip of images with captions (default: toy)")
    add("--from", dest="source", metavar="DIR",
        help="folder with the files of a data set, such as cub, that you fetched by hand")


def main():
    parser = argparse.ArgumentParser(description="Prepare a data set and report what it holds.")
    add_options(parser.add_argument)
    args = parser.parse_args()
    ds = load(args.dataset, args.source)
    captions = sum(map(len, ds.captions))
    unseen = int(ds.unseen_classes.sum())
    print(f"{args.dataset}: {len(ds.images):,} images, {captions:,} captions, "
          f"{len(ds.class_names)} classes")
    print(f"  training: {len(ds.training_images()):,} images of {len(ds.class_names) - unseen} "
          f"classes; unseen: {len(ds.unseen_images()):,} of {unseen}")
    print(f"  {ds.images.nbytes / 1e6:.0f} MB of pixels; boxes: {ds.boxes is not None}; "
          f"keypoints: {ds.keypoints is not None}")
    for line in ds.skipped[:10]:
        print(f"  skipped {line}")
    if len(ds.skipped) > 10:
        print(f"  ... {len(ds.skipped)} in all, listed in skipped.txt of the cache")

    rng = random.Random(1)
    rows = []
    texts = []
    for label in rng.sample(range(len(ds.class_names)), min(8, len(ds.class_names))):
        of_class = np.flatnonzero(ds.labels == label)
        images = [int(rng.choice(of_class)) for _ in range(6)]
        rows.append([ds.images[i] for i in images])
        texts.append(rng.choice(ds.captions[images[0]]))
    path = CACHE / f"{short_name(args.dataset)}.png"
    save_image(image_grid(rows, texts), path)
    print(f"  contact sheet: {path}")


if __name__ == "__main__":
    run_script(main)
