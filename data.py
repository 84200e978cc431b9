"""The data: whatever the source, one form.

    toy      200 species of cartoon birds, drawn here in seconds. The default.
    cub      CUB-200-2011: 11,788 photographs of birds, 10 captions each.
    cub-box  the same, each image a square around the bird. Departs from the paper: the birds are
             about twice as large.
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
import os
import posixpath
import random
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import textwrap
import time
import unicodedata
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

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


# ---- Views of the images ---------------------------------------------------------------------
def image_tensor(ds, device="cpu"):
    """All images of a data set as one uint8 tensor (N, 76, 76, 3). On a CPU it shares their memory:
    never write to it."""
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
    """Indices of n images, one a class, always the same ones: of unseen classes, and where these
    are fewer than n, of trained classes behind them. Beside these one sees whether training failed
    or only the unseen is hard."""
    rng = np.random.default_rng(0)
    unseen = rng.permutation(np.flatnonzero(ds.unseen_classes))
    classes = [*unseen, *np.flatnonzero(~ds.unseen_classes)][:n]
    return [int(rng.choice(np.flatnonzero(ds.labels == label))) for label in classes]


# ---- The toy birds ---------------------------------------------------------------------------
# What a builder gives of each image: (76, 76, 3) uint8, a list of captions, the name of its class,
# its row in a file of given features (images that are left out count), and where known its box
# (4,) and keypoints (6, 2), in pixels of the 76x76 image.
Example = namedtuple("Example", "pixels captions label row box keypoints",
                     defaults=(np.nan, np.nan))

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
    """The examples, the names of the unseen classes, and what was left out: nothing."""
    birds = toy_species(random.Random(0), 200)
    labels = []
    for number, bird in enumerate(birds):
        labels.append("{:03d}.{body}-{wing}-{crown}-{belly}".format(number, **bird))
    with ProcessPoolExecutor() as pool:
        examples = sum(pool.map(toy_examples, range(200), birds, labels, chunksize=25), [])
    return examples, labels[150:], []


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
    images = names_below(images_folder, r"\.jpg$")      # outlines, which may lie there, are .png
    names, boxes, keypoints = cub_tables(images_folder, images)
    if around_box and np.isnan(boxes).all():
        raise UserError("there are no bounding boxes: cub-box needs images.txt, bounding_boxes.txt "
                        "and part_locs.txt of CUB_200_2011. Without them, use --dataset cub")
    image_of = {plain_stem(image): image for image in images}
    texts = read_texts(captions_folder)
    captions, skipped = pair(images, texts, plain_stem)
    in_classes = images if len(set(map(last_folder, images))) > 1 else texts
    label_of = {plain_stem(path): last_folder(path) for path in in_classes}

    around = dict(zip(map(image_of.get, names), boxes)) if around_box else {}
    pictures = read_images(images_folder, captions, skipped, around)
    examples = []
    for row, name in enumerate(names):      # the source's own order
        if image_of.get(name) in pictures:
            pixels, window = pictures[image_of[name]]
            x, y, width, height = boxes[row]
            corners = [(x, y), (x + width, y + height)]
            low, high, *points = to_small(window, [*corners, *keypoints[row]])
            box = np.concatenate([low, high - low])
            texts_of = captions[image_of[name]]
            examples.append(Example(pixels, texts_of, label_of[name], row, box, points))
    is_unseen = re.compile(rf"\D*0*({unseen})(?!\d)")       # 013.Bobolink and class_00013 are 13
    return examples, set(filter(is_unseen.match, label_of.values())), skipped


def cub_tables(folder, images):
    """What CUB's tables say, in pixels of the original images: the names in images.txt, which are
    those of the `images` without it, boxes (n, 4) x, y, width, height, and KEYPOINTS (n, 6, 2).
    NaN is what is not known: all, unless all three tables are there."""
    tables = {}
    for path in names_below(folder, r"(^|/)(images|bounding_boxes|part_locs)\.txt$"):
        lines = decode_text(read_bounded(folder / path)).splitlines()
        tables[plain_stem(path)] = [line.split() for line in lines]
    try:
        names = [plain_stem(path) for _, path in tables.get("images", [])]
        boxes = np.full((len(images), 4), np.nan)
        keypoints = np.full((len(images), 6, 2), np.nan)
        if len(tables) == 3:
            numbers = np.array([number for number, _ in tables["images"]], int) - 1
            boxes = np.array(tables["bounding_boxes"], float)[numbers, 1:]
            parts = np.array(tables["part_locs"], float).reshape(-1, 15, 5)[numbers][:, CUB_PARTS]
            keypoints = np.where(parts[:, :, 4:] == 1, parts[:, :, 2:4], np.nan)
    except (LookupError, ValueError) as error:
        raise UserError(f"a table of CUB is not as it should be: {error}") from None
    return names or list(map(plain_stem, images)), boxes, keypoints


def to_small(window, points):
    """Points (n, 2) of an original image, in pixels of the 76x76 image of a part of it."""
    left, top, right, bottom = window
    scale = IMAGE_SIZE / np.array([right - left, bottom - top])
    return (np.array(points) - [left, top]) * scale


# ---- A folder of your own --------------------------------------------------------------------
IMAGES_OR_TEXTS = set("images image imgs img jpg text texts txt captions caption text_c10".split())
TRAINING_FOLDER = r"train(ing)?(\d*|[_-]images)"
TEST_FOLDER = r"(val|valid|validation|dev|eval|test|testing)(\d*|[_-]images)"


def build_folder(folder):
    """Your own images. Captions come as
        NAME.txt beside NAME.jpg, one caption a line; or text/NAME.txt and images/NAME.jpg,
        metadata.jsonl or metadata.csv with file_name and text or caption, as Hugging Face's
        imagefolder.
    Sub-folders are classes; without them each image is a class of its own. Where train/ and test/
    (or val/, train_images/, test_images/) stand at the top and share no class, the latter is what
    is never trained on; otherwise it is a quarter of the classes, as in CUB."""
    images = names_below(folder, IMAGE_NAMES)
    texts = read_texts(folder)

    def place(path):        # images/kind/1.jpg and text/kind/1.txt both lie in "kind"
        parts = Path(path).parent.parts
        return "/".join(part for part in parts if part.lower() not in IMAGES_OR_TEXTS)

    for table in names_below(folder, r"(^|/)metadata\.(csv|jsonl)$"):
        for file, caption in table_rows(folder, table):
            path = posixpath.join(posixpath.dirname(table), file.replace("\\", "/"))
            texts.setdefault(posixpath.normpath(path), []).extend(clean_captions([caption]))

    def key(path):
        return plain(place(path)), plain_stem(path)

    captions, skipped = pair(images, texts, key)
    pictures = read_images(folder, captions, skipped)
    classes, unseen = own_classes({image: place(image) for image in pictures}, skipped)
    examples = []
    for row, image in enumerate(images):
        if image in pictures:
            pixels, _ = pictures[image]
            texts_of = list(dict.fromkeys(captions[image]))[:MAX_CAPTIONS]
            examples.append(Example(pixels, texts_of, classes[image], row))
    return examples, unseen, skipped


def own_classes(places, skipped):
    """Folders {image: folder} -> classes {image: class} and the names of the unseen classes. Adds
    a line to `skipped` for a split that is not taken."""
    around = posixpath.commonpath(places.values()) if places else ""
    classes = {}
    trained = {}        # the classes of the images in train/ ...
    tested = {}         # ... and in test/, without that part
    for image, folder in places.items():
        folder = folder[len(around):].strip("/")
        top, _, inner = folder.partition("/")
        classes[image] = folder or image
        for pattern, inside in ((TRAINING_FOLDER, trained), (TEST_FOLDER, tested)):
            if re.fullmatch(pattern, top, re.IGNORECASE):
                inside[image] = inner or image

    if trained and tested:
        if len(trained) + len(tested) == len(places):
            classes = trained | tested
            if not set(map(plain, trained.values())) & set(map(plain, tested.values())):
                return classes, set(tested.values())
        skipped.append("the folders for training and test are not taken as the split: they share a "
                       "class, or have images beside them")
    names = sorted(set(classes.values()))
    random.Random(0).shuffle(names)
    return classes, names[:len(names) // 4]


def table_rows(folder, table):
    """A list of (file name, caption) of a metadata.csv or metadata.jsonl. Raises UserError."""
    text = decode_text(read_bounded(folder / table))
    rows = []
    try:
        if table.lower().endswith(".csv"):
            entries = csv_entries(text)
        else:
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        for entry in entries:
            columns = [column for column in ("text", "caption") if column in entry]
            if "file_name" not in entry or not columns:
                raise ValueError("expected columns file_name and text (or caption), found "
                                 f"{', '.join(map(str, entry))}")
            captions = entry[columns[0]]
            for caption in captions if isinstance(captions, list) else [captions]:
                rows.append((str(entry["file_name"]), str(caption or "")))
    except Exception as error:      # what stands in a file can be anything
        raise UserError(f"{table} cannot be read ({type(error).__name__}): {error}") from None
    return rows


def csv_entries(text):
    """The rows of a .csv as dicts. The separator is a comma, or what Excel writes for it. A caption
    with commas outside quotes is put together again where it is the last column."""
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    header, *rows = filter(None, reader)                    # without empty lines
    header = [column.strip().lower() for column in header]
    last = len(header) - 1
    for row in rows:
        if header[last] in ("text", "caption"):
            row[last:] = [separator.join(row[last:])]
        if len(row) > len(header):
            raise ValueError(f"the row of {row[0]!r} has more columns than the first row: put a "
                             "text with commas in quotes")
    return [dict(zip(header, row)) for row in rows]


# ---- The table of data sets ------------------------------------------------------------------
# A new data set is a row here, and where it is laid out otherwise a builder. It gets the folders of
# the images and of the captions (archives come unpacked), and returns Examples, the names of the
# unseen classes, and a line for each thing left out. It reads nothing else: a cache is built again
# only where they, or this code, change. Before G train its text encoder, for photographs longer
# than by default:  python encoder.py --dataset NAME --from DIR --steps 6000
Entry = namedtuple("Entry", "build sources", defaults=[()])
# names: what the images or the captions may be called, packed or unpacked. url: where they come
# from if none is there, sha256: of that file.
Source = namedtuple("Source", "names url sha256", defaults=[None])

MIRROR = "https://github.com/raphaelsenn/gan-text-to-image/releases/latest/download/"
CUB = [
    Source("CUB_200_2011.tgz CUB_200_2011 images",
           "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
           "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"),
    Source("cvpr2016_cub.tar.gz cvpr2016_cub caption-data-cub-v1.0.0.zip captions text_c10 text "
           "text.zip birds.zip", MIRROR + "caption-data-cub-v1.0.0.zip")]
FLOWERS = [
    Source("102flowers.tgz jpg 102flowers images",
           "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
           "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246"),
    Source("cvpr2016_flowers.tar.gz cvpr2016_flowers caption-data-flowers-v1.0.0.zip captions "
           "text_c10 text text.zip flowers.zip", MIRROR + "caption-data-flowers-v1.0.0.zip")]
DATASETS = {
    "toy": Entry(build_toy),
    "cub": Entry(partial(build_photographs, unseen=CUB_UNSEEN), CUB),
    "cub-box": Entry(partial(build_photographs, unseen=CUB_UNSEEN, around_box=True), CUB),
    "flowers": Entry(partial(build_photographs, unseen=FLOWERS_UNSEEN), FLOWERS)}


def find_files(name, source):
    """The paths whose folders a builder gets: none for toy, images and captions for cub and
    flowers. Without `source` they are fetched to cache/downloads."""
    if name not in DATASETS:
        return [Path(name).resolve()]
    folder = Path(source or CACHE / "downloads")
    paths = []
    for names, url, sha256 in DATASETS[name].sources:
        there = [folder / file for file in names.split() if (folder / file).exists()]
        if source and not there:
            raise UserError(f"{folder} has none of {', '.join(names.split())}, which {name} needs")
        path = there[0] if there else fetch(url, sha256, folder)
        paths.append(path.resolve())
    return paths


def fetch(url, sha256, folder):
    """Download a file into a folder, whole or not at all. Returns its path. Raises UserError."""
    path = folder / url.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {url}")
    socket.setdefaulttimeout(60)
    try:
        torch.hub.download_url_to_file(url, str(path), sha256)
    except Exception as error:      # no network, another checksum ...
        raise UserError(f"{url} cannot be fetched ({error}). Fetch it by hand into {folder} "
                        "(curl -LOC - URL goes on where a line broke) and run this with "
                        f"--from {folder}; other addresses: README, \"Data\"") from None
    finally:
        socket.setdefaulttimeout(None)
    return path


# ---- Reading what comes from outside: folders, archives, images, captions --------------------
MAX_FILE = 256 << 20            # bytes of an image or a text
MAX_TOTAL = 8 << 30             # bytes of one archive, unpacked
MAX_PIXELS = 64_000_000         # width x height of one image
MAX_CAPTIONS = 100              # of one image; more are left out
NO_CAPTION = "no caption"
# Not all of these can be read. They count as images, so that they are listed as skipped.
IMAGE_NAMES = r"\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|avif|heic|heif|jxl)$"
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"]     # not EPS: a program that would be run


def names_below(folder, pattern=""):
    """Names of the files below a folder that have the pattern, in order, such as kind/1.jpg. Hidden
    files are no data. Links are followed."""
    ours = ("cache/", "runs/") if folder == Path.cwd() else ()      # they change meanwhile
    names = [Path(name).as_posix() for name in glob.glob("**", root_dir=folder, recursive=True)]
    names = [name for name in names if re.search(pattern, name, re.I) and not name.startswith(ours)]
    return sorted((name for name in names if not Path(folder, name).is_dir()),
                  key=lambda name: name.split("/"))


def unpack(path, folder):
    """Unpack a .zip or .tar.gz into a folder, and return it. Raises UserError where it is not
    whole, which its checksums tell."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > MAX_TOTAL:
                    raise ValueError("too large")
                archive.extractall(folder)      # compares the checksums; no name leads outside
        else:
            unpack_tar(path, folder)
    except Exception as error:          # the readers raise all sorts of things on broken archives
        raise UserError(f"{path} is no .zip or .tar.gz, or is damaged, or only a part of one "
                        f"({type(error).__name__}: {error})") from None
    return folder


def unpack_tar(path, folder):
    """Unpack the plain files of a .tar.gz. It is read to its end first, where the checksum is: one
    that is broken off may look like one of fewer files."""
    with gzip.open(path) as f:
        if f.seek(MAX_TOTAL + 1) > MAX_TOTAL:
            raise ValueError("too large")
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            file = (folder / member.name).resolve()
            if member.isreg() and not member.issparse() and file.is_relative_to(folder):
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "wb") as f:
                    shutil.copyfileobj(archive.extractfile(member), f)


def read_texts(folder):
    """{path: list of captions} of all .txt files below a folder but the authors' lists of classes
    (testclasses.txt ...)."""
    texts = {}
    for name in names_below(folder, r"(?<!classes)\.txt$"):
        texts[name] = read_captions(read_bounded(folder / name))
    return texts


def pair(images, texts, key):
    """Which captions belong to which image: those whose paths have the same key.

    images: paths. texts: {path: list of captions}. -> {image: captions}, and a line for each path
    that is left alone.
    """
    captions_of = {}
    for text, captions in texts.items():
        captions_of.setdefault(key(text), []).extend(captions)
    count = Counter(map(key, images))
    pairs = {}
    skipped = []
    for image in images:
        captions = captions_of.get(key(image))
        if captions and count[key(image)] == 1:
            pairs[image] = captions
        else:
            several = "several images have this name, so " if captions else ""
            skipped.append(f"{image}: {several}{NO_CAPTION}")
    skipped += [f"{text}: no image" for text in texts if key(text) not in count]
    return pairs, skipped


def plain(name):
    """A name as names are compared: "ö" may be one letter or two (Macs), case does not matter."""
    return unicodedata.normalize("NFC", name).casefold()


def plain_stem(path):
    """.../013.Bobolink/Wing_1.jpg -> wing_1"""
    return plain(Path(path).stem)


def last_folder(path):
    """.../013.Bobolink/Wing_1.jpg -> 013.Bobolink"""
    return Path(path).parent.name


def read_bounded(path):
    """The bytes of an image or text file. Raises UserError where they are too many."""
    size = Path(path).stat().st_size
    if size > MAX_FILE:
        raise UserError(f"{path} has more than {MAX_FILE >> 20} MB: not an image or a text")
    return Path(path).read_bytes()


def read_images(folder, names, skipped, box_of={}):
    """{name: what `read_image` gives} of images below a folder. Adds a line to `skipped` for each
    one that cannot be read. box_of: {name: box}."""
    def read(name):
        try:
            return read_image(read_bounded(folder / name), box_of.get(name))
        except (ValueError, OSError, UserError) as error:
            skipped.append(f"{name}: {error}")

    with ThreadPoolExecutor() as pool:
        pictures = dict(zip(names, pool.map(read, names)))
    return {name: picture for name, picture in pictures.items() if picture}


def read_image(data, box=None):
    """An image file -> ((76, 76, 3) uint8, the window (left, top, right, bottom) that it shows).

    data: the file's bytes. box (x, y, width, height): show only a square around it. Like the
    authors, scales to 76x76 without keeping the proportions. Raises ValueError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels, too many")
        window = (0, 0, width, height) if box is None else square_around(box, image.size)
        image = to_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC, window)
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
    """Any mode of Pillow's with 8 bits to RGB. What is transparent is laid on white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits a colour (mode {image.mode}): save it with 8")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
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
def load(name, source=None):
    """A data set, built now or read from its cache.

    name: toy, cub, cub-box, flowers, or the path of a folder, .zip or .tar.gz. source: a folder
    with the files of cub or flowers; later calls find them without it. Raises UserError.

    A cache is named after all that it was made from, code and files, so that a change there leads
    to a new one. Without `source` cub and flowers are not looked at again: they may be removed.
    """
    if name not in DATASETS and not Path(name).exists():
        last = Path(name).name
        close = difflib.get_close_matches(last, DATASETS, 1)
        hint = f"did you mean {close[0]}? Else " if close else ""
        raise UserError(f"unknown data set {last!r}: {hint}expected {', '.join(DATASETS)}, or a "
                        "folder or .zip file of images with captions")
    begin = f"{short_name(name)}-{building_code()}"
    path = next(CACHE.glob(f"{begin}{8 * '[0-9a-f]'}.npz"), None)
    if source or name not in DATASETS or not path:
        paths = find_files(name, source)
        path = CACHE / f"{begin}{digest(file_stamps(paths))}.npz"
        if not path.exists():
            print(f"preparing {name}: this is done once and kept in {path}")
            prepare(path, name, paths)
    # A folder's whole path: a run on it may go on from another place.
    ds = read_cache(path, name if name in DATASETS else str(Path(name).resolve()))
    if ds.skipped:
        print(f"{name}: {len(ds.images):,} images are used. What is left out and why "
              f"({len(ds.skipped):,} in all) is in {skipped_file(name)}; its end: {ds.skipped[-1]}")
    return ds


def short_name(name):
    """What is kept of a data set is called by this name: "cub", "own-FOLDER-1a2b3c". The digits
    come from the whole path, because two folders may have the same last name."""
    if name in DATASETS:
        return name
    path = Path(name).resolve()
    last = re.sub(r"[^\w.-]", "_", path.name)[:40]
    return f"own-{last}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def skipped_file(name):
    return CACHE / f"{short_name(name)}-skipped.txt"


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def building_code():
    """A digest of the code that builds a cache: whoever edits a builder, a table of words, or how
    images are read gets a new cache."""
    code = Path(__file__).read_text(encoding="utf-8")
    return digest((IMAGE_SIZE, code.split("\n# ---- The toy birds")[1].split("\n# ---- Grids")[0]))


def file_stamps(paths):
    """What a cache is made from: name, size and time of every file."""
    stamps = []
    for path in paths:
        for name in names_below(path) or [""]:          # a file has no names below it
            file = path / name
            if file.exists():
                stamps.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return stamps


def prepare(path, name, paths):
    """Build a data set and write its cache, whole or not at all. Archives are unpacked for it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".unpacked-") as work:
        folders = []
        for number, packed in enumerate(paths):
            folder = Path(work).resolve() / str(number)
            folders.append(packed if packed.is_dir() else unpack(packed, folder))
        build = DATASETS[name].build if name in DATASETS else build_folder
        examples, unseen, skipped = build(*folders)
        skipped = [printable(line) for line in skipped]
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
    texts = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    arrays = dict(images=np.stack(pixels), labels=labels, rows=np.array(rows),
                  unseen_classes=np.isin(class_names, list(unseen)))
    for key, values in dict(boxes=boxes, keypoints=keypoints).items():
        if not np.isnan(values).all():
            arrays[key] = np.array(values, np.float32)

    skipped_file(name).write_text("\n".join(skipped), encoding="utf-8")
    write_atomically(path, lambda f: np.savez(f, texts=texts, **arrays))
    for older in CACHE.glob(f"{short_name(name)}-{16 * '[0-9a-f]'}.npz"):
        if older != path:                       # of an earlier state of the same source
            older.unlink(missing_ok=True)


def kinds_of_files(path, folder):
    """What is there in place of images and captions: birds.zip has 1 .pickle (captions.pickle)."""
    kinds = {}
    for name in names_below(folder):
        kinds.setdefault(Path(name).suffix.lower(), []).append(name)
    counts = [f"{len(names):,} {kind} ({names[0]})" for kind, names in kinds.items()]
    return printable(f"{path.name} has {', '.join(counts[:8]) or 'no files'}")


def read_cache(path, name):
    try:
        with np.load(path) as arrays:
            fields = dict(arrays)
        return Dataset(name=name, **json.loads(fields.pop("texts").tobytes()), **fields)
    except Exception as error:          # the reader raises all sorts of things on a damaged file
        raise UserError(f"the cache {path} is damaged ({type(error).__name__}: {error}): remove "
                        "it, it is then built again") from None


# ---- Grids and plots -------------------------------------------------------------------------
def printable(text):
    """A text without line ends and other control characters: a blank for each."""
    return "".join(c if c.isprintable() else " " for c in text)


def image_grid(rows, texts=None, titles=None, scale=1):
    """Rows of equally many images, (H, W, 3) uint8 each, as one Pillow image. texts: one beside
    each row. titles: one above each column."""
    height, width = [int(scale * side) for side in rows[0][0].shape[:2]]
    left = 230 if texts else 0
    top = 22 if titles else 0
    size = (left + (width + 2) * len(rows[0]), top + (height + 2) * len(rows))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for i, row in enumerate(rows):
        y = top + i * (height + 2)
        if texts:
            lines = textwrap.wrap(printable(texts[i][:500]), 32, max_lines=max(1, height // 17),
                                  placeholder=" ...")
            pen.multiline_text((6, y + 2), "\n".join(lines), "black", font)
        for j, pixels in enumerate(row):
            x = left + j * (width + 2)
            image = Image.fromarray(np.ascontiguousarray(pixels))
            page.paste(image.resize((width, height), Image.NEAREST), (x, y))
            if titles:
                pen.text((x + width / 2, 10), titles[j], "black", font, "mm")
    return page


def plot(panels, path, size=360):
    """Write line plots side by side. panels: a list of {name: (xs, ys)}. Axes begin at 0."""
    page = Image.new("RGB", (size * len(panels), size), "white")
    pen = ImageDraw.Draw(page)
    for number, panel in enumerate(panels):
        lines = {name: np.array([*zip(*x_y), (0, 0)], float) for name, x_y in panel.items()}
        widest, highest = np.concatenate([*lines.values(), [(1e-9, 1e-9)]]).max(0)
        left = number * size + 45
        top = 20 + 14 * len(lines)
        right = left + size - 60
        bottom = size - 30
        pen.rectangle((left, top, right, bottom), outline="grey")
        pen.text((left - 6, top), f"{highest:.1f}", "black", anchor="rm")
        pen.text((right, bottom + 12), f"{widest:g}", "black", anchor="rm")
        for i, (name, points) in enumerate(lines.items()):
            colour = ("black", "red", "green", "orange", "blue")[i % 5]
            pen.text((left, 10 + 14 * i), name, colour, anchor="lm")
            x = left + points[:-1, 0] * (right - left) / widest
            y = bottom - points[:-1, 1] * (bottom - top) / highest
            pen.line(list(zip(x, y)), colour, 2)
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
        # Progress shows at once, in a file too; letters that a console lacks end no run.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    code = 2
    try:
        return main()
    except BrokenPipeError:         # `| head` has read enough: what is still to come goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
    except (UserError, OSError) as error:       # OSError: a full disk, a folder without rights
        line = f"error: {error}"
    except torch.OutOfMemoryError:
        line = ("error: the GPU's memory is full: choose a smaller --batch-size or --ngf, or end "
                "what else runs on it")
    except KeyboardInterrupt:
        line = "stopped"
        code = 130
    print(line, file=sys.stderr)
    sys.exit(code)


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
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}: expected auto, cpu, cuda, or cuda:1")
    try:
        probe = torch.ones(1, device=name)
        probe.sum().item()              # a kernel must run, not only be sent
        device = probe.device
    except Exception as error:          # no such card; or a driver that does not fit
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
    x = torch.ones(32, 64, 16, 16, requires_grad=True)
    weight = torch.ones(128, 64, 4, 4, requires_grad=True)
    start = time.perf_counter()
    with torch.enable_grad():
        with autocast("cpu", precision):
            y = F.conv2d(x.to(memory_format=torch.channels_last), weight, stride=2, padding=1)
        y.float().sum().backward()
    return time.perf_counter() - start


def autocast(device, precision):
    """A context in which products and convolutions are computed in bf16 or fp16."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[precision])


def grad_scaler(device, precision):
    """fp16 has so small a range that gradients must be scaled; for the others it does nothing."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")


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
    print(f"{args.dataset}: {len(ds.images):,} images, {sum(map(len, ds.captions)):,} captions; "
          f"boxes: {ds.boxes is not None}; keypoints: {ds.keypoints is not None}")
    for kind, index in (("to train on", ds.training_images()),
                        ("unseen, never trained on", ds.unseen_images())):
        print(f"  {kind}: {len(index):,} images, classes: {len(set(ds.labels[index]))}")
    captions = list(itertools.chain(*ds.captions))
    letters = list(filter(str.isalpha, "".join(captions).lower()))
    read = sum(map(str.isascii, letters)) / len(letters)        # as encoder.py reads captions
    long = sum(len(caption) > 201 for caption in captions)
    print(f"  a to z, which the text encoder reads: {read:.1%} of the captions' letters; captions "
          f"longer than the 201 letters that it reads: {long:,}")
    for line in ds.skipped[:10]:
        print(f"  left out: {line}")
    shown = example_images(ds, 8)
    rows = []
    for image in shown:
        of_class = np.flatnonzero(ds.labels == ds.labels[image])
        rows.append(ds.images[[image, *random.choices(of_class, k=5)]])
    path = CACHE / f"{short_name(args.dataset)}.png"
    save_image(image_grid(rows, [ds.captions[image][0] for image in shown]), path)
    print(f"  contact sheet: {path}")


if __name__ == "__main__":
    run_script(main)
