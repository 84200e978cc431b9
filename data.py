"""The data: whatever the source, one form.

    toy      200 species of cartoon birds, drawn here in seconds. The default.
    cub      CUB-200-2011: 11,788 photographs of birds, 10 captions each.
    cub-box  the same, each image a square around the bird: departs from the paper.
    flowers  Oxford-102: 8,189 photographs of flowers, 10 captions each.
    FOLDER   your own images with captions, a folder, .zip or .tar.gz. See `build_folder`.

The rest of the code sees a `Dataset`: images, captions, a class for each image, and classes that
are never trained on. `load` builds it once and keeps it in the folder cache/.

    python data.py --dataset toy                         # prepare, report, draw a contact sheet
    python data.py --dataset cub --from ~/Downloads      # with files that you fetched by hand
"""

import argparse
import contextlib
import csv
import difflib
import glob
import gzip
import hashlib
import io
import itertools
import json
import operator
import os
import random
import re
import socket
import sys
import tarfile
import tempfile
import textwrap
import unicodedata
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import (Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps,
                 UnidentifiedImageError)

IMAGE_SIZE = 76         # images are kept at 76x76, as in the authors' code ...
CROP = 64               # ... and the networks see a random 64x64 window ([A] section 5)
CACHE = Path("cache")
KEYPOINTS = ["beak", "belly", "breast", "crown", "forehead", "tail"]    # of [A] section 5.2


@dataclass
class Dataset:
    """A data set as all other files see it. N images of C classes."""
    name: str
    images: np.ndarray              # (N, 76, 76, 3) uint8
    captions: list                  # N lists of strings, none of them empty
    labels: np.ndarray              # (N,) the class of each image
    class_names: list               # C strings
    unseen_classes: np.ndarray      # (C,) bool: the zero-shot classes, never trained on
    rows: np.ndarray                # (N,) each image's place in the source's own order
    boxes: np.ndarray = None        # (N, 4) x, y, width, height in pixels of the 76x76 image
    keypoints: np.ndarray = None    # (N, 6, 2) x, y of KEYPOINTS, NaN where one is not visible
    skipped: list = ()              # what was left out and why, a line each

    def training_images(self):
        """Indices of the images of the training classes."""
        return np.flatnonzero(~self.unseen_classes[self.labels])

    def unseen_images(self):
        """Indices of the images of the unseen (zero-shot) classes."""
        return np.flatnonzero(self.unseen_classes[self.labels])

    def digest(self):
        """16 hex digits of what a text encoder and a run depend on: captions, classes, split."""
        content = json.dumps([self.captions, self.labels.tolist(), self.unseen_classes.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


# ---- Views of the images ---------------------------------------------------------------------
def image_tensor(ds, device="cpu"):
    """All images (N, 76, 76, 3) uint8. On a CPU it is the data set's memory: never write to it."""
    return torch.from_numpy(ds.images).to(device)


def crops(images, index, dy, dx, flip):
    """Windows of many images at once. images (N, 76, 76, 3) uint8; index, dy, dx (B,) int and flip
    (B,) bool, all on one device -> (B, 3, 64, 64) float32 in [-1, 1], in memory channels last."""
    windows = images.unfold(1, CROP, 1).unfold(2, CROP, 1)      # (N, 13, 13, 3, 64, 64), a view
    x = windows[index, dy, dx]                                  # (B, 3, 64, 64)
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def random_crops(images, index):
    """[A] section 5: a random view of each image, a 64x64 window, mirrored or not."""
    B = len(index)
    dy, dx = torch.randint(IMAGE_SIZE - CROP + 1, (2, B), device=images.device)
    flip = torch.rand(B, device=images.device) < 0.5
    return crops(images, index, dy, dx, flip)


def centre_crops(images, index):
    middle = torch.full_like(index, (IMAGE_SIZE - CROP) // 2)
    return crops(images, index, middle, middle, torch.zeros_like(index).bool())


def to_pixels(x):
    """(N, 3, 64, 64) in [-1, 1] -> (N, 64, 64, 3) uint8 on the CPU."""
    x = (x.clamp(-1, 1) + 1) * 127.5
    return x.round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---- Batches: x, h, h_wrong ------------------------------------------------------------------
def random_captions(starts, images, count=1):
    """Draw captions of images (B,): their rows (count, B) in the list of all captions, in which
    those of image i begin at starts[i]."""
    first = starts[images]
    number = starts[images + 1] - first
    draw = torch.rand(count, len(images), device=images.device) * number       # below `number`
    return first + draw.long()


def draw_other_class(own, classes):
    """For classes `own` (B,), numbers from 0 to classes - 1, draw another class each: (B,). With 5
    classes and own = 3 a step of 1, 2, 3 or 4 from there leads (modulo 5) to 4, 0, 1 or 2."""
    step = 1 + random_below(classes - 1, own)
    return (own + step) % classes


def random_below(limit, like):
    """Whole numbers from 0 to limit - 1, as many as `like` has. limit: a number, or one each."""
    return (torch.rand_like(like, dtype=torch.float64) * limit).long()


class Batches:
    """All that a step reads, on the device: the images as uint8 and the embedding of every
    caption. A batch is a few gathers, so that no loader process is needed.
    caption_table: (captions of all images, 1024) half. captions=(low, high): h is the mean of k
    captions of the image, k drawn from low to high. Raises UserError if there is only one
    training class: a wrong text comes from another class."""

    def __init__(self, ds, caption_table, device, captions=(1, 1)):
        index = torch.as_tensor(ds.training_images(), device=device)
        labels = torch.as_tensor(ds.labels, device=device)
        labels, order = labels[index].sort(stable=True)
        _, class_of, class_size = labels.unique(return_inverse=True, return_counts=True)
        if len(class_size) < 2:
            raise UserError(f"{ds.name} has images of {len(class_size)} training class: at least "
                            "two are needed, because a wrong text comes from another class")
        self.images = image_tensor(ds, device)
        self.captions = captions
        self.caption_table = caption_table.to(device)
        # Where each image's captions begin when all captions are laid end to end: (N + 1,).
        counts = torch.tensor([0, *map(len, ds.captions)], device=device)
        self.caption_starts = counts.cumsum(0)
        self.training_images = index[order]                         # (n,) class by class
        self.class_of = class_of                                    # (n,) 0 .. classes - 1
        self.class_size = class_size                                # (classes,)
        self.class_start = class_size.cumsum(0) - class_size        # where each class begins

    def __len__(self):
        return len(self.training_images)

    def texts(self, images):
        """h of images (B,): the mean of k random captions of each -> (B, 1024) float32."""
        low, high = self.captions
        rows = random_captions(self.caption_starts, images, high)       # (high, B)
        h = self.caption_table[rows].float()                            # (high, B, 1024)
        k = torch.randint(low, high + 1, (len(images),), device=images.device)
        taken = torch.arange(high, device=images.device)[:, None] < k   # (high, B): the first k
        return (h * taken[:, :, None]).sum(0) / k[:, None]

    def batch(self, positions):
        """What [A] Algorithm 1 draws for a step. positions (B,) in training_images -> x, images; h,
        texts that describe them; h_wrong, texts of a random image of another class."""
        other = draw_other_class(self.class_of[positions], len(self.class_size))
        wrong = self.class_start[other] + random_below(self.class_size[other], positions)
        x = random_crops(self.images, self.training_images[positions])
        h = self.texts(self.training_images[positions])
        h_wrong = self.texts(self.training_images[wrong])
        return x, h, h_wrong


def example_images(ds, n=6):
    """Indices of n images, one a class, always the same ones: of unseen classes, and where these
    are fewer than n, of trained classes behind them, which show whether training failed."""
    rng = np.random.default_rng(0)
    unseen = rng.permutation(np.flatnonzero(ds.unseen_classes))
    classes = [*unseen, *np.flatnonzero(~ds.unseen_classes)][:n]
    return [int(rng.choice(np.flatnonzero(ds.labels == label))) for label in classes]


# ---- The toy birds ---------------------------------------------------------------------------
# What a builder gives of each image: (76, 76, 3) uint8, a list of captions, the name of its class,
# its row in a file of given features (images that are left out count), and where known its box
# (4,) and keypoints (6, 2), in pixels of the 76x76 image.
Example = namedtuple("Example", "pixels captions label row box keypoints", defaults=2 * [np.nan])

COLOURED = ["body", "wing", "crown", "belly"]       # the parts that have one of these colours
COLOURS = {     # what a caption can say of a part of the bird
    "black": "#232328", "white": "#f5f5f0", "brown": "#82552d", "red": "#d72828",
    "orange": "#f58c1e", "yellow": "#fad732", "green": "#3ca046", "blue": "#2d5fd7"}
BACKGROUNDS = [     # style: no caption says anything about it
    "#96c8ee", "#b0deac", "#e8d4a8", "#f0c4c4", "#ccc0e8", "#708092", "#4e7058", "#f8ece2"]
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
    four colours of COLOURED. Those of one colour come first: they are trained on."""
    species = [[colour] * 4 for colour in COLOURS]
    while len(species) < count:
        body = rng.choice(list(COLOURS))
        new = [body]
        for _ in COLOURED[1:]:
            new.append(body if rng.random() < 0.5 else rng.choice(list(COLOURS)))
        if all(sum(map(operator.ne, new, old)) >= 2 for old in species):
            species.append(new)
    return [dict(zip(COLOURED, colours), bill=rng.choice(list(BILLS)),
                 billcolour=rng.choice(BILL_COLOURS)) for colours in species]


def toy_captions(rng, bird):
    """10 captions of a bird. Each names two to four of its parts. If the bird has one colour
    only, a caption says so, and may name fewer parts or none."""
    one_colour = len({bird[part] for part in COLOURED}) == 1
    captions = []
    for _ in range(10):
        count = rng.randint(0 if one_colour else 2, 4)
        parts = [rng.choice(forms) for forms in rng.sample(PARTS, count)]
        caption = rng.choice(ONE_COLOUR_BEGINNINGS if one_colour else BEGINNINGS)
        if one_colour and parts:
            caption += " with "
        caption += " and ".join(", ".join(parts).rsplit(", ", 1))       # a, b and c
        captions.append(caption.format(**bird).replace("a orange", "an orange"))
    return captions


def toy_draw(rng, bird):
    """One image of a bird: (76, 76, 3) uint8, its box (4,) and its six keypoints (6, 2)."""
    S = 3                                       # drawn three times as large, then averaged
    side = S * IMAGE_SIZE
    pixel = side / 76                           # numbers below are for an image of 76x76
    facing = rng.choice([-1, 1])
    unit = pixel * rng.uniform(50, 58)          # one unit of length
    centre_x = pixel * rng.uniform(34, 39)
    centre_y = pixel * rng.uniform(38, 43)
    background = [c + rng.randint(-10, 10) for c in ImageColor.getrgb(rng.choice(BACKGROUNDS))]
    tint = rng.randint(-8, 8)
    tilt = 3 * rng.uniform(-0.05, 0.05)

    # A sky that darkens downwards: a column of pixels, repeated.
    shade = np.linspace(1.06, 0.86, side)[:, None, None]
    sky = np.clip(np.array(background) * shade, 0, 255).astype(np.uint8)
    image = Image.fromarray(sky.repeat(side, 1))
    pen = ImageDraw.Draw(image)
    outline = []                                # every point of the bird, for its box

    def at(points):     # from the bird's own coordinates to pixels
        return [(centre_x + facing * unit * x, centre_y + unit * y) for x, y in points]

    def colour(name, factor=1.0):
        rgb = ImageColor.getrgb(COLOURS[name])
        return tuple(int(max(0, min(255, c * factor + tint))) for c in rgb)

    def shape(points, fill):
        pen.polygon(at(points), fill)
        outline.extend(at(points))

    def oval(x, y, rx, ry, fill, angle=0.0, first=0.0, last=1.0):
        a = np.linspace(first, last, 32) * 2 * np.pi
        u = rx * np.cos(a)
        v = ry * np.sin(a)
        cos, sin = np.cos(angle), np.sin(angle)
        shape(list(zip(x + cos * u - sin * v, y + sin * u + cos * v)), fill)

    branch = [(-3, 0.40 - tilt), (3, 0.40 + tilt), (3, 0.47 + tilt), (-3, 0.47 - tilt)]
    pen.polygon(at(branch), "#705038")
    for x in (-0.02, 0.10):                                             # legs
        pen.line(at([(x, 0.15), (x + 0.02, 0.42)]), "#5a4632", round(pixel) + 1)
    body, wing, crown, belly = [colour(bird[part]) for part in COLOURED]
    shape([(-0.20, -0.06), (-0.20, 0.10), (-0.50, 0.22), (-0.54, 0.09)],    # tail
          colour(bird["body"], 0.82))
    oval(0.0, 0.0, 0.35, 0.235, body, 0.10)
    oval(0.20, -0.14, 0.16, 0.17, body)                                 # neck
    oval(0.06, 0.11, 0.23, 0.125, belly)
    tip = 0.43 + BILLS[bird["bill"]]
    shape([(0.42, -0.34), (0.42, -0.23), (tip, -0.26)], COLOURS[bird["billcolour"]])
    oval(0.28, -0.28, 0.19, 0.18, body)                                 # head
    oval(0.28, -0.28, 0.19, 0.18, crown, 0.0, 0.44, 1.06)               # upper 2/3
    oval(0.37, -0.27, 0.042, 0.042, "#fafafa")                          # eye
    oval(0.38, -0.27, 0.024, 0.024, "#0a0a0a")
    oval(-0.14, -0.07, 0.24, 0.115, colour(bird["wing"], 0.75), 0.25)   # rim of wing
    oval(-0.14, -0.07, 0.22, 0.095, wing, 0.25)

    # Softened, then to 76 pixels by averaging. With hard edges real images have so much detail of
    # one or two pixels that D does not notice the dots which G draws along every edge.
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6 * pixel)).reduce(S))
    outline = np.clip(np.array(outline) / S, 0, IMAGE_SIZE)
    spots = [(tip, -0.26), (0.06, 0.15), (0.28, -0.02),                 # in KEYPOINTS' order
             (0.29, -0.44), (0.42, -0.36), (-0.52, 0.15)]
    box = np.concatenate([outline.min(0), np.ptp(outline, 0)])
    return pixels, box, np.array(at(spots)) / S


def toy_examples(number, bird):
    """The 40 images of one species, with random numbers of its own: processes share the work."""
    rng = random.Random(number)
    label = f"{number:03d}." + "-".join(bird[part] for part in COLOURED)
    examples = []
    for row in range(40 * number, 40 * number + 40):
        pixels, box, keypoints = toy_draw(rng, bird)
        examples.append(Example(pixels, toy_captions(rng, bird), label, row, box, keypoints))
    return examples


def build_toy():
    """The examples, the names of the unseen classes, and what was left out: nothing."""
    birds = toy_species(random.Random(0), 200)
    with ProcessPoolExecutor() as pool:
        examples = sum(pool.map(toy_examples, range(200), birds), [])
    return examples, {example.label for example in examples[150 * 40:]}, []


# ---- CUB-200-2011 and Oxford-102 -------------------------------------------------------------
# The numbers of the unseen classes, those in testclasses.txt of the authors.
CUB_UNSEEN = ("1|4|6|8|9|14|23|29|31|33|34|35|36|37|38|43|49|51|53|66|72|79|83|84|86|91|95|96|98|"
              "101|102|103|112|114|119|121|130|135|138|147|156|163|165|166|180|183|185|186|187|197")
FLOWERS_UNSEEN = "1|2|3|4|5|6|7|8|9|10|11|12|13|14|15|16|17|18|19|20"
CUB_PARTS = [1, 2, 3, 4, 5, 13]     # KEYPOINTS among CUB's 15 parts, counted from 0


def build_photographs(images_folder, captions_folder, unseen, around_box=False):
    """The two sets of the paper: NAME.jpg and NAME.txt in any folders, each NAME once. The class is
    the image's folder, as in 013.Bobolink/NAME.jpg; where all images lie in one, as Oxford-102's
    do, it is the caption's: class_00077/NAME.txt."""
    images = names_below(images_folder, r"\.jpg$")      # segmentation masks are .png
    texts = read_texts(captions_folder)
    marks = cub_tables(images_folder)
    if around_box and not marks:
        raise UserError("there are no bounding boxes: cub-box needs images.txt, bounding_boxes.txt "
                        "and part_locs.txt of CUB_200_2011. Without them, use --dataset cub")
    box_of = {name: marks[name][0] for name in marks if around_box}
    found, skipped = read_pairs(images_folder, images, texts, plain_stem, box_of)
    in_classes = images if len({Path(image).parent.name for image in images}) > 1 else texts
    folder_of = {plain_stem(path): Path(path).parent.name for path in in_classes}

    examples = []
    for row, name in enumerate(marks or map(plain_stem, images)):       # the source's own order
        if name in found:
            pixels, window, captions = found[name]
            known = ()
            if marks:       # from the original image to the window, which was scaled to 76x76
                (x, y, width, height), points = marks[name]
                points = np.array([(x, y), (x + width, y + height), *points])
                scale = IMAGE_SIZE / np.subtract(window[2:], window[:2])
                low, high, *points = (points - window[:2]) * scale
                known = ([*low, *(high - low)], points)
            examples.append(Example(pixels, captions, folder_of[name], row, *known))
    is_unseen = re.compile(rf"\D*0*({unseen})(?!\d)")       # 013.Bobolink and class_00013 are 13
    return examples, set(filter(is_unseen.match, folder_of.values())), skipped


def cub_tables(folder):
    """What CUB's tables say, if they are there, in the order of images.txt: {name: (box (4,),
    keypoints (6, 2))}, in pixels of the original image, NaN where a keypoint is not visible."""
    paths = names_below(folder, r"(^|/)(images|bounding_boxes|part_locs)\.txt$")
    if not paths:
        return {}
    with user_error("images.txt, bounding_boxes.txt and part_locs.txt of CUB belong together, and "
                    "one of them is not as it should be"):
        lines_of = {}
        for path in paths:
            lines = (folder / path).read_text().splitlines()
            lines_of[plain_stem(path)] = np.array([line.split() for line in lines])
        numbers, names = lines_of["images"].T
        order = numbers.astype(int) - 1
        boxes = lines_of["bounding_boxes"].astype(float)[order, 1:]
        parts = lines_of["part_locs"].astype(float).reshape(-1, 15, 5)[order][:, CUB_PARTS]
        keypoints = np.where(parts[:, :, 4:] == 1, parts[:, :, 2:4], np.nan)
        return dict(zip(map(plain_stem, names), zip(boxes, keypoints)))


# ---- A folder of your own --------------------------------------------------------------------
IMAGES_OR_TEXTS = set("images image imgs img jpg text texts txt captions caption text_c10".split())
SPLIT_FOLDER = r"(train(ing)?|(?P<test>val|valid|validation|dev|eval|test|testing))(\d*|[_-]images)"


def build_folder(folder):
    """Your own images. Captions come as NAME.txt beside NAME.jpg, one caption a line; as
    text/NAME.txt and images/NAME.jpg; or in metadata.jsonl or metadata.csv, with file_name and text
    or caption (Hugging Face's imagefolder). Sub-folders are classes; without them each image is
    one. Where train/ and test/ (or val/, train_images/, test_images/) stand at the top and share no
    class, the latter is never trained on; otherwise a quarter of the classes is not, as in CUB."""
    def place(path):        # images/kind/1.jpg and text/kind/1.txt both lie in ["kind"]
        return [name for name in Path(path).parent.parts if name.lower() not in IMAGES_OR_TEXTS]

    def key(path):
        return plain("/".join(place(path))), plain_stem(path)

    images = names_below(folder, IMAGE_NAMES)
    texts = read_texts(folder)
    for table in names_below(folder, r"(^|/)metadata\.(csv|jsonl)$"):
        read_table(folder, table, texts)
    found, skipped = read_pairs(folder, images, texts, key)
    places = {image: place(image) for image in images if key(image) in found}
    classes, unseen = own_classes(places, skipped)
    examples = []
    for row, image in enumerate(images):
        if image in classes:
            pixels, _, captions = found[key(image)]
            captions = list(dict.fromkeys(captions))[:MAX_CAPTIONS]     # each once
            examples.append(Example(pixels, captions, classes[image], row))
    return examples, unseen, skipped


def own_classes(places, skipped):
    """{image: the folders that it lies in} -> {image: class} and the names of the unseen classes.
    Adds a line to `skipped` for a split that is not taken."""
    around = len(os.path.commonprefix(list(places.values())))   # folders that contain everything
    classes = {}
    trained = {}        # {image: its class without the "train/" in front}
    tested = {}         # and those in test/
    for image, folders in places.items():
        folders = folders[around:]
        classes[image] = "/".join(folders) or image
        split = folders and re.fullmatch(SPLIT_FOLDER, folders[0], re.IGNORECASE)
        if split:
            side = tested if split["test"] else trained
            side[image] = "/".join(folders[1:]) or image

    if trained and tested:
        classes |= trained | tested
        disjoint = set(map(plain, trained.values())).isdisjoint(map(plain, tested.values()))
        if disjoint and len(trained) + len(tested) == len(places):
            return classes, set(tested.values())
        skipped.append("the folders for training and test are not taken as the split: they share a "
                       "class, or have images beside them")
    names = sorted(set(classes.values()))
    random.Random(0).shuffle(names)
    return classes, names[:len(names) // 4]


def read_table(folder, table, texts):
    """Add the captions of a metadata.csv or metadata.jsonl to texts {image: captions}."""
    with user_error(f"{table} cannot be read"):
        text = decode_text((folder / table).read_bytes()).strip("\r\n")
        if table.lower().endswith(".csv"):
            entries = csv_entries(text)
        else:
            entries = map(json.loads, filter(str.strip, text.split("\n")))
        for entry in entries:
            column = "text" if "text" in entry else "caption"
            if not {"file_name", column} <= set(entry):
                raise ValueError("expected columns file_name and text (or caption), found "
                                 f"{', '.join(map(str, entry))}")
            captions = entry[column]
            captions = captions if isinstance(captions, list) else [captions]
            file = str(entry["file_name"]).replace("\\", "/")
            image = os.path.normpath(Path(table).parent / file)
            texts.setdefault(image, []).extend(clean_captions(map(str, filter(None, captions))))


def csv_entries(text):
    """The rows of a .csv as dicts. The separator is a comma, or what Excel writes for it. A caption
    with commas outside quotes is put together again where it is the last column."""
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", delimiter=separator)
    columns = reader.fieldnames = [column.strip().lower() for column in reader.fieldnames]
    last = columns[-1]
    for row in reader:
        too_much = row.pop(None, [])
        if too_much and last not in ("text", "caption"):
            raise ValueError(f"the row of {row[columns[0]]!r} has more columns than the first row: "
                             "put a text with commas in quotes")
        row[last] = separator.join([row[last], *too_much])
        yield row


# ---- The table of data sets ------------------------------------------------------------------
# A new data set is a row here, and where it is laid out otherwise a builder. The builder gets the
# folders of images and of captions (archives come unpacked), reads nothing else, and returns
# Examples, the names of the unseen classes, and a line for each thing left out. Before G train its
# text encoder, for photographs longer than by default:  encoder.py --dataset NAME --steps 6000
# CUB: of the images, then of the captions, possible names, an address, and its SHA-256 if known.
# (../CUB_200_2011: DIR may be that folder itself; its tables are needed, too.)
MIRROR = "https://github.com/raphaelsenn/gan-text-to-image/releases/latest/download/"
CUB = [
    ("CUB_200_2011.tgz CUB_200_2011 ../CUB_200_2011 images",
     "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
     "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"),
    ("cvpr2016_cub.tar.gz cvpr2016_cub caption-data-cub-v1.0.0.zip captions text_c10 text text.zip "
     "birds.zip", MIRROR + "caption-data-cub-v1.0.0.zip", None)]
FLOWERS = [
    ("102flowers.tgz jpg 102flowers images",
     "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
     "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246"),
    ("cvpr2016_flowers.tar.gz cvpr2016_flowers caption-data-flowers-v1.0.0.zip captions text_c10 "
     "text text.zip flowers.zip", MIRROR + "caption-data-flowers-v1.0.0.zip", None)]
DATASETS = {
    "toy": (build_toy, []),
    "cub": (partial(build_photographs, unseen=CUB_UNSEEN), CUB),
    "cub-box": (partial(build_photographs, unseen=CUB_UNSEEN, around_box=True), CUB),
    "flowers": (partial(build_photographs, unseen=FLOWERS_UNSEEN), FLOWERS)}


def find_files(name, source):
    """The paths whose folders a builder gets: none for toy, images and captions for cub and
    flowers. Without `source` they are fetched to cache/downloads. Raises UserError."""
    if name not in DATASETS:
        if Path(name).exists():
            return [Path(name)]
        last = Path(name).name
        near = difflib.get_close_matches(last, DATASETS, 1) or DATASETS
        raise UserError(f"unknown data set {last!r}: did you mean {' or '.join(near)}, or a folder "
                        "or .zip file of images with captions?")
    folder = Path(source or CACHE / "downloads").resolve()
    paths = []
    _, sources = DATASETS[name]
    for names, url, sha256 in sources:
        there = [folder / file for file in names.split() if (folder / file).exists()]
        if source and not there:
            raise UserError(f"{folder} has none of {', '.join(names.split())}, which {name} needs")
        paths.append(there[0] if there else fetch(url, sha256, folder))
    return paths


def fetch(url, sha256, folder):
    """Download a file into a folder, whole or not at all. Returns its path. Raises UserError."""
    path = folder / Path(url).name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {url}")
    socket.setdefaulttimeout(60)
    with user_error(f"{url} cannot be fetched. Fetch it by hand into {folder} (curl -LOC - URL "
                    f"goes on where a line broke) and run this with --from {folder}; other "
                    "addresses: README, \"Data\""):
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)
            if not sha256 and not zipfile.is_zipfile(path):
                path.unlink()
                raise ValueError("it did not come whole")
        finally:
            socket.setdefaulttimeout(None)
    return path


# ---- Reading what comes from outside: folders, archives, images, captions --------------------
MAX_TOTAL = 8 << 30             # bytes of one archive, unpacked
MAX_CAPTIONS = 100              # of one image; more are left out
# Not all of these can be read. They count as images, so that they are listed as skipped.
IMAGE_NAMES = r"\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|avif|heic|heif|jxl)$"
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"]     # not EPS: a program that would be run


def names_below(folder, pattern=""):
    """Sorted names, such as kind/1.jpg, of the files below a folder. Hidden ones are no data."""
    if os.path.samefile(folder, "."):
        pattern = f"^(?!cache/|runs/).*{pattern}"           # which are ours, and change
    paths = map(Path, glob.glob("**", root_dir=folder, recursive=True))
    names = [path.as_posix() for path in paths if (folder / path).is_file()]
    return sorted(filter(re.compile(pattern, re.I | re.S).search, names), key=Path)


def unpack(path, folder):
    """Unpack a .zip or .tar.gz, if its checksums say that it is whole -> folder, or UserError."""
    with user_error(f"{path} is no .zip or .tar.gz, or is damaged, or only a part of one"):
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            size = sum(member.file_size for member in archive.infolist())
            members = archive.namelist()            # extractall lets none lead outside
        else:
            # To its end, where the checksum is: a cut archive may look like one of fewer files.
            with gzip.open(path) as file:
                size = file.seek(MAX_TOTAL + 1)
            archive = tarfile.open(path, "r:gz")
            members = (member for member in archive if member.isreg() and not member.issparse()
                       and (folder / member.name).resolve().is_relative_to(folder))
        with archive:
            if size > MAX_TOTAL:
                raise ValueError("too large")
            archive.extractall(folder, members)
    return folder


def read_texts(folder):
    """{path: list of captions} of all .txt files below a folder but the authors' lists of classes
    (testclasses.txt ...)."""
    texts = {}
    for name in names_below(folder, r"(?<!classes)\.txt$"):
        text = decode_text((folder / name).read_bytes())
        texts[name] = clean_captions(text.splitlines())
    return texts


def read_pairs(folder, images, texts, key, box_of={}):
    """Read the images that have captions: those of the texts whose paths have the same key.

    images: paths below a folder. texts: {path: list of captions}. box_of: {key: box around which
    an image is cut}. -> {key: (pixels, window, captions)}, and a line for each path left out."""
    count = Counter(map(key, images))
    captions_of = {}
    for text, captions in texts.items():
        captions_of.setdefault(key(text), []).extend(captions)

    def read(image):
        captions = captions_of.get(key(image))
        if not captions:
            return "no caption of 3 letters or more"
        if count[key(image)] > 1:
            return "several images have this name, so no caption"
        try:
            return *read_image((folder / image).read_bytes(), box_of.get(key(image))), captions
        except (ValueError, OSError) as error:
            return str(error)

    found = {}
    skipped = []
    with ThreadPoolExecutor() as pool:
        for image, result in zip(images, pool.map(read, images)):
            if isinstance(result, str):     # the reason why it is left out
                skipped.append(f"{image}: {result}")
            else:
                found[key(image)] = result
    return found, skipped + [f"{text}: no image" for text in texts if key(text) not in count]


def plain(name):
    """A name as names are compared: "ö" may be one letter or two (Macs), case does not matter."""
    return unicodedata.normalize("NFC", name).casefold()


def plain_stem(path):
    """.../013.Bobolink/Wing_1.jpg -> wing_1"""
    return plain(Path(path).stem)


def read_image(data, box=None):
    """An image file -> ((76, 76, 3) uint8, the window (left, top, right, bottom) that it shows).
    data: the file's bytes. box (x, y, width, height): show only a square around it. Like the
    authors, scales to 76x76 without keeping the proportions. Raises ValueError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image = ImageOps.exif_transpose(image)      # phones store upright images lying down
        window = (0, 0, *image.size) if box is None else square_around(box, image.size)
        if image.mode[0] in "IF":
            raise ValueError(f"more than 8 bits a colour (mode {image.mode}): save it with 8")
        if image.has_transparency_data:             # what is transparent is laid on white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC, window)
        return np.asarray(image), window
    except UnidentifiedImageError:
        raise ValueError("not an image, or of a kind that this Pillow cannot read") from None
    except Exception as error:                      # Pillow's decoders raise all sorts of things
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from None


def square_around(box, size):
    """The window (left, top, right, bottom) around a box (x, y, width, height) in an image of
    the given size: 1.4 times the box's longer side wide and high, moved and cut to lie inside."""
    corner, sides = np.split(np.array(box), 2)
    window = np.minimum(1.4 * sides.max(), size)                # width, height
    low = np.clip(corner + sides / 2 - window / 2, 0, size - window)
    return *low, *(low + window)


def decode_text(data):
    """Bytes of a text file in any of the usual encodings -> string."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        return data.decode("utf-16" if is_utf16 else "cp1252", errors="replace")


def clean_captions(lines):
    """Captions with single spaces. Those with fewer than 3 letters are left out: the real sets
    have lines such as "{}" or "v"."""
    captions = [" ".join(line.split()) for line in lines]
    return [line for line in captions if sum(map(str.isalpha, line)) >= 3][:MAX_CAPTIONS]


# ---- The cache -------------------------------------------------------------------------------
def load(name, source=None):
    """A data set, built now or read from its cache.

    name: toy, cub, cub-box, flowers, or the path of a folder, .zip or .tar.gz. source: a folder
    with the files of cub or flowers; later calls read the cache. Raises UserError.
    A cache is named after all that it was made from, code and files: a change there leads to a new
    one. Without `source` cub and flowers are not looked at again: they may be removed."""
    if name not in DATASETS:
        name = str(Path(name).resolve())        # a run on it may go on from another place
    begin = f"{short_name(name)}-{building_code()}"
    path = next(CACHE.glob(f"{begin}{8 * '[0-9a-f]'}.npz"), None)
    if source or name not in DATASETS or not path:
        paths = find_files(name, source)
        path = CACHE / f"{begin}{digest(file_stamps(paths))}.npz"
        if not path.exists():
            print(f"preparing {name}: this is done once and kept in {path}")
            prepare(path, name, paths)
    with user_error(f"the cache {path} is damaged: remove it, it is then built again"):
        fields = dict(np.load(path))
        ds = Dataset(name=name, **json.loads(fields.pop("texts").item()), **fields)
    if ds.skipped:
        listed = CACHE / f"{short_name(name)}-skipped.txt"
        listed.write_text("\n".join(ds.skipped), encoding="utf-8")
        print(f"{name}: {len(ds.images):,} images are used. What is left out and why "
              f"({len(ds.skipped):,} in all) is in {listed}; its end: {ds.skipped[-1]}")
    return ds


def short_name(name):
    """What is kept of a data set is called by this name: "cub", "own-FOLDER-1a2b3c". The digits
    come from the whole path, because two folders may have the same last name."""
    if name in DATASETS:
        return name
    path = Path(name).resolve()
    last = re.sub(r"[^\w.-]", "_", path.name)[:40]
    return f"own-{last}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def building_code():
    """A digest of the code that builds a cache: whoever edits a builder gets a new one."""
    code = Path(__file__).read_text(encoding="utf-8")
    return digest((IMAGE_SIZE, code.split("\n# ---- The toy birds")[1].split("\n# ---- Grids")[0]))


def file_stamps(paths):
    """What a cache is made from: name, size and time of every file."""
    stamps = []
    for path in paths:
        for name in names_below(path) or [""]:          # a file has no names below it
            status = (path / name).stat()
            stamps.append((str(path / name), status.st_size, status.st_mtime_ns))
    return stamps


def prepare(path, name, paths):
    """Build a data set and write its cache, whole or not at all. Archives are unpacked for it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".unpacked-") as work:
        work = Path(work).resolve()
        folders = [path if path.is_dir() else unpack(path, work / path.name) for path in paths]
        build, _ = DATASETS.get(name, (build_folder, []))
        examples, unseen, skipped = build(*folders)
        skipped = list(map(printable, skipped))
        if not examples:
            found = "; ".join(map(kinds_of_files, paths, folders))
            first = f" ({skipped[0]})" if skipped else ""
            raise UserError(f"{name}: no image with a caption{first}. {found}. Expected for each "
                            "NAME.jpg a NAME.txt with a caption a line, or for data of your own a "
                            "metadata.jsonl (README, \"Data\", says how to write one)")

    # From a list of examples to a list of each of their fields.
    pixels, captions, labels, rows, boxes, keypoints = zip(*examples)
    class_names, labels = np.unique(labels, return_inverse=True)
    texts = dict(captions=captions, class_names=class_names.tolist(), skipped=skipped)
    arrays = dict(texts=json.dumps(texts).encode(), images=pixels, labels=labels, rows=rows,
                  unseen_classes=np.isin(class_names, list(unseen)))
    if not np.isnan(boxes).all():
        arrays.update(boxes=np.float32(boxes), keypoints=np.float32(keypoints))
    write_atomically(path, lambda file: np.savez(file, **arrays))
    for older in set(CACHE.glob(f"{short_name(name)}-{16 * '[0-9a-f]'}.npz")) - {path}:
        older.unlink(missing_ok=True)           # of an earlier state of the same source


def kinds_of_files(path, folder):
    """What is there in place of images and captions: birds.zip has 1 .pickle (captions.pickle)."""
    kinds = {}
    for name in names_below(folder):
        kinds.setdefault(Path(name).suffix.lower(), []).append(name)
    counts = [f"{len(names):,} {kind} ({names[0]})" for kind, names in kinds.items()]
    return printable(f"{path.name} has {', '.join(counts) or 'no files'}")


# ---- Grids and plots -------------------------------------------------------------------------
def printable(text):
    """A text with a blank for each line end and other control character."""
    return "".join(c if c.isprintable() else " " for c in text)


def image_grid(rows, texts=None, titles=None):
    """Rows of equally many images, (H, W, 3) uint8 each, as one Pillow image. texts: one beside
    each row. titles: one above each column."""
    height, width, _ = rows[0][0].shape
    left = 230 if texts else 0
    top = 22 if titles else 0
    size = (left + (width + 2) * len(rows[0]), top + (height + 2) * len(rows))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for i, row in enumerate(rows):
        y = top + i * (height + 2)
        for j, pixels in enumerate(row):
            page.paste(Image.fromarray(pixels), (left + j * (width + 2), y))
        if texts:
            text = textwrap.fill(printable(texts[i]), 32, max_lines=height // 17,
                                 placeholder=" ...")
            pen.text((6, y + 2), text, "black", font)
    for j, title in enumerate(titles or []):
        pen.text((left + j * (width + 2) + width / 2, 10), title, "black", font, "mm")
    return page


def plot(panels, path, size=400):
    """Write line plots side by side. panels: a list of {name: (xs, ys)}. Axes begin at 0."""
    pages = []
    for panel in panels:
        page = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(page)
        lines = [np.reshape(list(zip(*x_y)), (-1, 2)) for x_y in panel.values()]
        ends = np.concatenate([[(1e-9, 1e-9)], *lines]).max(0)      # of the axes
        top = 30 + 14 * len(lines)
        pen.text((10, 8), f"x to {ends[0]:g}, y to {ends[1]:.3g}", "black")
        pen.rectangle((10, top, size - 10, size - 10), outline="grey")
        for i, name in enumerate(panel):
            colour = ("black", "red", "green", "orange", "blue")[i % 5]
            pen.text((10, 24 + 14 * i), name, colour)
            points = (10, size - 10) + lines[i] / ends * (size - 20, top + 10 - size)
            pen.line(points.ravel().tolist(), colour, 2)
        pages.append(np.asarray(page))
    save_image(image_grid([pages]), path)


def save_image(image, path):
    """Write a Pillow image, whole or not at all. Raises UserError for an unknown ending."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    with user_error(f"cannot write {path}: name an image file, such as sample.png", [OSError]):
        write_atomically(path, lambda f: image.save(f, kind))


# ---- Shared by the scripts: errors, writing, checkpoints, device and precision ---------------
SCALE = " scale"        # of a weight "net.0.weight" in 8 bits: "net.0.weight scale"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class UserError(Exception):
    """What the user can mend. `run_script` prints it in one line and exits with code 2."""


@contextlib.contextmanager
def user_error(message, but=()):
    """Any failure inside is a UserError with this message. but: types of errors that pass."""
    try:
        yield
    except (UserError, *but):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(printable(f"{message} ({reason})")) from None


def run_script(main):
    """Run a script's main function. UserError and Ctrl-C give a line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # Progress shows at once, in a file too; letters that a console lacks end no run.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    code = 2
    try:
        return main()
    except BrokenPipeError:         # `| head` has read enough: what is still to come goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
    except (UserError, OSError, torch.OutOfMemoryError) as error:   # a full disk, a full GPU
        line = f"error: {error}"
    except KeyboardInterrupt:
        line = "stopped"
        code = 130
    print(line, file=sys.stderr)
    sys.exit(code)


def int_between(low, high):
    """For argparse: a whole number from low to high."""
    def number(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low:,} to {high:,}")
        return int(text)
    return number


def write_atomically(path, write):
    """`write(file)` into `path`, whole or not at all: first beside it, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())        # on the disk before the name points to it
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path, **content):
    """Write a dict of tensors and plain values, whole or not at all. A full disk is an OSError."""
    buffer = io.BytesIO()       # torch.save on a full disk would raise a RuntimeError
    torch.save(content, buffer)
    write_atomically(path, lambda f: f.write(buffer.getbuffer()))


def load_checkpoint(path, kind):
    """What `save_checkpoint` wrote, of this kind. Runs none of its code. Raises UserError."""
    with user_error(f"{path} is not there, or no checkpoint, or only a part of one"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["kind"] != kind:
            raise UserError(f"{path} does not hold a {kind} checkpoint")
        return content


def load_network(make, state):
    """A network made by `make()` with the weights of a checkpoint, in 32 bits. It is made without
    memory ("meta"), so that settings that ask for a huge one fail on their shapes."""
    with torch.device("meta"):
        net = make()
    net.load_state_dict(from_8_bits(state), assign=True)
    return net.float()


def to_8_bits(state):
    """A dict for a file: the weights of its state_dicts as whole numbers from -127 to 127, with a
    scale for each row. The rest, biases and batch norm and settings, stays as it is."""
    small = {}
    for key, value in state.items():
        small[key] = value
        if isinstance(value, dict):
            small[key] = to_8_bits(value)
        weight = torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1
        if weight and not key.endswith(SCALE):      # a scale stays as it is
            scale = value.abs().amax(tuple(range(1, value.dim())), keepdim=True).float() / 127
            scale = scale.clamp(min=1e-12)
            small[key] = (value / scale).round().to(torch.int8)
            small[key + SCALE] = scale
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


def checkpoint_errors(path):
    """Any failure inside is a UserError; but a full disk or GPU is not the checkpoint's fault."""
    return user_error(f"{path} does not fit this version's networks: it is damaged, or of other "
                      "code; train it again, into another folder",
                      but=(OSError, torch.OutOfMemoryError))


def pick_device(name="auto"):
    """"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1" -> torch device. On CUDA "fp32"
    means TF32 from here on: fractions of 10 bits in products, several times as fast."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}: expected auto, cpu, cuda, or cuda:1")
    with user_error(f"{name} cannot be used"):      # no such card; or a driver that does not fit
        probe = torch.ones(1, device=name)
        probe.sum().item()              # a kernel must run, not only be sent
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
        torch.backends.cudnn.benchmark = True           # try the convolutions' kernels, once
        torch.set_float32_matmul_precision("high")      # TF32
    return probe.device


def pick_precision(device, name="auto"):
    """"auto", "bf16", "fp16" or "fp32" -> one of the last three: what products and convolutions
    are computed in. Losses, weights, batch norm's statistics and Adam's state stay in fp32.
    auto: on CUDA bf16 from compute capability 8 on, else fp16; on a CPU bf16 where Linux names an
    instruction for it (then up to twice as fast as fp32, else several times slower)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    cpu = Path("/proc/cpuinfo")
    return "bf16" if cpu.exists() and "avx512_bf16" in cpu.read_text() else "fp32"


def autocast(device, precision):
    """A context in which products and convolutions are computed in bf16 or fp16."""
    device = torch.device(device).type
    return torch.autocast(device, DTYPES[precision], enabled=precision != "fp32")


def not_by_position(text):
    """For argparse: what stands alone is most often a folder of images."""
    raise argparse.ArgumentTypeError(f"did you mean --dataset {text}?")


def add_options(add):
    """The options that all scripts with a data set have. add: a parser's add_argument."""
    add("--dataset", default="toy",
        help=f"{', '.join(DATASETS)}, or a folder, .zip or .tar.gz of images with captions (toy)")
    add("--from", dest="source", metavar="DIR",
        help="folder with the files of a data set, such as cub, that you fetched by hand")
    add("alone", nargs="*", type=not_by_position, help=argparse.SUPPRESS)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepare a data set and report what it holds.")
    add_options(parser.add_argument)
    args = parser.parse_args(argv)
    ds = load(args.dataset, args.source)
    captions = list(itertools.chain(*ds.captions))
    long = sum(len(caption) > 201 for caption in captions)
    print(f"{args.dataset}: {len(ds.images):,} images, {len(captions):,} captions, {long:,} of "
          "them longer than the 201 letters that the text encoder reads")
    for use, index in (("to train on", ds.training_images()), ("unseen", ds.unseen_images())):
        print(f"  {use}: {len(index):,} images, classes: {len(set(ds.labels[index]))}")
    sheet = CACHE / f"{short_name(args.dataset)}.png"
    shown = example_images(ds, 8)
    texts = [ds.captions[image][0] for image in shown]
    save_image(image_grid(ds.images[shown][:, None], texts), sheet)
    print(f"  contact sheet: {sheet}")


if __name__ == "__main__":
    run_script(main)
