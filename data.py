"""The data: four sources, one form.

    toy      200 species of cartoon birds, drawn here in seconds. The default.
    cub      CUB-200-2011: 11,788 photographs of birds, 10 captions each.
    cub-box  the same, each picture a square around the bird: departs from the paper, birds are twice as large.
    flowers  Oxford-102: 8,189 photographs of flowers, 10 captions each.
    FOLDER   your own: pictures with a .txt beside each, a caption a line. Sub-folders are classes.

Whatever the source, the rest of the code sees a `Dataset`: pictures, captions, a class a picture, and
classes that are never trained on. It is built once, into the folder `cache/`, and memory-mapped.

    python data.py --dataset toy                         # prepare, report, draw a contact sheet
    python data.py --dataset cub --from ~/Downloads      # files brought by hand
"""

import argparse, hashlib, inspect, io, json, os, random, re, shutil, sys, tarfile, tempfile, textwrap, urllib.request, warnings, zipfile
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

IMAGE_SIZE = 76      # pictures are kept at 76x76 (as in the authors' code) ...
CROP = 64            # ... and a random 64x64 window of each is what the networks see ([A] section 5)
CACHE = Path("cache")
FORMAT = 1           # raise it when what a cache holds changes: older ones are then rebuilt

# ---- What the scripts share: one kind of error, one way to run, one to write -----------------
class UserError(Exception):
    """What the user can mend: `run` prints it in one line and exits with code 2."""

def run(main):
    """Run a script's main function. UserError and Ctrl-C give a line, not a traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)     # progress shows at once, in a file too
    try:
        main()
    except (UserError, OSError) as error:       # OSError: a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)

def number(low, high):
    """For argparse: a whole number from low to high."""
    def parse(text):
        if not text.isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low:,} to {high:,}, got {text[:40]!r}")
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

@dataclass
class Dataset:
    """One form for all sources. images (N, 76, 76, 3) uint8, memory-mapped; captions: N lists of strings, none empty; labels (N,) class
    of each picture; class_names (C); unseen (C,) bool, the zero-shot classes. boxes (N, 4) x, y, w, h and keypoints (N, 6, 2) x, y of
    KEYPOINTS, both in pixels of the 76x76 picture, NaN where not known; None if the source has none. rows (N,): each picture's place in
    the source's own order (a file of features has one row for each). skipped: what was left out, and why."""
    name: str
    images: np.ndarray
    captions: list
    labels: np.ndarray
    class_names: list
    unseen: np.ndarray
    rows: np.ndarray
    boxes: np.ndarray = None
    keypoints: np.ndarray = None
    skipped: list = field(default_factory=list)

    def split(self, unseen):
        """Indices of the pictures of the training classes (False) or of the unseen ones (True)."""
        return np.flatnonzero(self.unseen[self.labels] == unseen)

# What a source gives of one picture, before the cache: (76, 76, 3) uint8, list of captions, name of its class, place in the source's order.
Picture = namedtuple("Picture", "pixels captions label row boxes keypoints", defaults=(None, None))

# ---- toy: birds drawn here -------------------------------------------------------------------
COLOURS = {  # what a caption can say of a part
    "black": (35, 35, 40), "white": (245, 245, 240), "brown": (130, 85, 45), "red": (215, 40, 40),
    "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (60, 160, 70), "blue": (45, 95, 215)}
BACKGROUNDS = [  # style: no caption speaks of it
    (150, 200, 238), (176, 222, 172), (232, 212, 168), (240, 196, 196), (204, 192, 232), (112, 128, 146), (78, 112, 88), (248, 236, 226)]
BILLS = {"short": 0.11, "long": 0.20}
# Captions in the manner of CUB's are put together from these, so that phi learns words in all places and not sentences by heart.
WHOLE = ["a {body} bird with ", "a small {body} bird with ", "this {body} bird has ", "this bird is {body} and has ", "this is a {body} bird that has ",
         "a {body} bird that has ", "this bird has "]
PLAIN = ["an all {body} bird", "this bird is all {body}", "this all {body} bird", "this is a completely {body} bird", "a bird that is {body} all over"]
PARTS = [["{wing} wings", "wings that are {wing}"], ["a {crown} crown", "a {crown} head"], ["a {belly} belly", "a {belly} belly and breast"],
         ["a {bill} bill", "a {bill} {billcolour} beak", "a {billcolour} bill"]]
KEYPOINTS = ["beak", "belly", "breast", "crown", "forehead", "tail"]     # the six of [A] section 5.2

def toy_species(rng, count):
    """`count` species: a dict of colours and bill each. Any two differ in two of their four colours or more."""
    names = list(COLOURS)
    species = dict.fromkeys((c, c, c, c) for c in names)    # one of each single colour
    while len(species) < count:                             # in the others some parts look like the body, as in birds
        body = rng.choice(names)
        new = (body, *(body if rng.random() < 0.5 else rng.choice(names) for _ in range(3)))
        if all(sum(a != b for a, b in zip(new, old)) >= 2 for old in species):
            species[new] = None
    return [dict(zip(("body", "wing", "crown", "belly"), colours), bill=rng.choice(list(BILLS)), billcolour=rng.choice(["black", "orange", "yellow"]))
            for colours in species]                         # those of one colour come first: they are trained on

def toy_captions(rng, bird):
    """10 captions. Each names two to four of wings, crown, belly and bill; those of a bird of one colour may name none."""
    out, plain = [], len({bird[p] for p in ("body", "wing", "crown", "belly")}) == 1
    for _ in range(10):
        parts = [rng.choice(forms) for forms in rng.sample(PARTS, rng.randint(0 if plain else 2, 4))]
        text = rng.choice(PLAIN) + (" with " if parts else "") if plain else rng.choice(WHOLE)
        text += ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + "".join(parts[-1:])
        out.append(text.format(**bird).replace("a orange", "an orange"))
    return out

def toy_draw(rng, bird):
    """One picture: (76, 76, 3) uint8, its box (x, y, w, h) and its six keypoints (6, 2), in pixels."""
    S = 3                                              # drawn three times as large, then averaged
    facing, unit = rng.choice([-1, 1]), S * rng.uniform(50, 58)      # pixels of one unit of length
    cx, cy = S * rng.uniform(34, 39), S * rng.uniform(38, 43)
    back = [min(255, c + rng.randint(-10, 10)) for c in rng.choice(BACKGROUNDS)]
    at = lambda x, y: (cx + facing * unit * x, cy + unit * y)

    # A sky that darkens downwards: a column of pixels, stretched.
    shade = np.linspace(1.06, 0.86, IMAGE_SIZE * S)[:, None, None]
    sky = np.clip(np.array(back) * shade, 0, 255).astype(np.uint8)
    picture = Image.fromarray(sky).resize((IMAGE_SIZE * S,) * 2, Image.NEAREST)
    draw = ImageDraw.Draw(picture)
    seen = []                                          # every point of the bird, for its box

    def colour(name, factor=1.0):
        return tuple(int(max(0, min(255, c * factor + tint))) for c in COLOURS[name])
    def shape(points, fill):
        points = [at(x, y) for x, y in points]
        draw.polygon(points, fill=fill)
        seen.extend(points)
    def oval(x, y, rx, ry, fill, angle=0.0, first=0.0, last=1.0):
        a = np.linspace(first, last, 32) * 2 * np.pi
        u, v, c, s = rx * np.cos(a), ry * np.sin(a), np.cos(angle), np.sin(angle)
        shape(list(zip(x + c * u - s * v, y + s * u + c * v)), fill)

    tint, tilt = rng.randint(-8, 8), 3 * rng.uniform(-0.05, 0.05)
    draw.polygon([at(-3, 0.40 - tilt), at(3, 0.40 + tilt), at(3, 0.47 + tilt), at(-3, 0.47 - tilt)], fill=(112, 80, 56))   # branch
    for x in (-0.02, 0.10):                            # legs
        draw.line([at(x, 0.15), at(x + 0.02, 0.42)], fill=(90, 70, 50), width=S + 1)
    shape([(-0.20, -0.06), (-0.20, 0.10), (-0.50, 0.22), (-0.54, 0.09)], colour(bird["body"], 0.82))   # tail
    oval(0.0, 0.0, 0.35, 0.235, colour(bird["body"]), 0.10)
    oval(0.20, -0.14, 0.16, 0.17, colour(bird["body"]))                             # neck
    oval(0.06, 0.11, 0.23, 0.125, colour(bird["belly"]))
    length = BILLS[bird["bill"]]
    shape([(0.42, -0.34), (0.42, -0.23), (0.43 + length, -0.26)], COLOURS[bird["billcolour"]])
    oval(0.28, -0.28, 0.19, 0.18, colour(bird["body"]))                             # head
    oval(0.28, -0.28, 0.19, 0.18, colour(bird["crown"]), 0.0, 0.44, 1.06)           # its upper two thirds
    oval(0.37, -0.27, 0.042, 0.042, (250, 250, 250))                                # eye
    oval(0.38, -0.27, 0.024, 0.024, (10, 10, 10))
    oval(-0.14, -0.07, 0.24, 0.115, colour(bird["wing"], 0.75), 0.25)               # wing, with a rim
    oval(-0.14, -0.07, 0.22, 0.095, colour(bird["wing"]), 0.25)

    # To 76 pixels, by averaging: that is where the smooth edges come from.
    seen = np.array(seen) / S
    low, high = seen.min(0).clip(0, IMAGE_SIZE), seen.max(0).clip(0, IMAGE_SIZE)
    spots = [(0.43 + length, -0.26), (0.06, 0.15), (0.28, -0.02), (0.29, -0.44), (0.42, -0.36), (-0.52, 0.15)]
    return np.asarray(picture.reduce(S)), np.concatenate([low, high - low]), np.array([at(x, y) for x, y in spots]) / S

def toy_pictures(number, bird, label):
    """The 40 pictures of one species. It has a random state of its own, so that processes can share the work."""
    rng, out = random.Random(number), []
    for i in range(40):
        pixels, box, keypoints = toy_draw(rng, bird)
        out.append(Picture(pixels, toy_captions(rng, bird), label, 40 * number + i, box, keypoints))
    return out

def build_toy():
    birds = toy_species(random.Random(0), 200)
    labels = ["{:03d}.{body}-{wing}-{crown}-{belly}".format(i, **bird) for i, bird in enumerate(birds)]
    with ProcessPoolExecutor() as pool:
        pictures = [p for species in pool.map(toy_pictures, range(200), birds, labels, chunksize=25) for p in species]
    return pictures, set(labels[150:]), []          # pictures, names of the unseen classes, what was skipped

# ---- Reading what came from outside: folders, archives, pictures, captions -------------------
MAX_FILE = 256 << 20         # bytes of one member; CUB's table of attributes has some 60 MB
MAX_TOTAL = 8 << 30          # bytes of one archive, unpacked
MAX_PIXELS = 64_000_000      # width x height of one picture
MAX_CAPTIONS = 100           # of one picture; more are left out
PICTURE = r"\.(jpe?g|png|gif|bmp|webp|tiff?)$"

def members(path):
    """(name, bytes) of every plain file in a folder, .tar, .tgz or .zip. Nothing is unpacked to disk. A member that points outside the
    archive, a link or a device is refused: no honest archive of pictures holds one."""
    path, total = Path(path), 0
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file() and re.search(r"\.txt$|" + PICTURE, file.name, re.I):
                    yield file.relative_to(path).as_posix(), read_bounded(file)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for m in archive.infolist():
                    if not m.is_dir():
                        total = check_member(path, m.filename, m.file_size, total, (m.external_attr >> 28) in (0, 8))
                        yield m.filename, archive.read(m)
        else:
            with tarfile.open(path, "r|*") as archive:
                for m in archive:
                    if not m.isdir():
                        total = check_member(path, m.name, m.size, total, m.isreg())
                        yield m.name, archive.extractfile(m).read()
    except UserError:
        raise
    except Exception as error:          # the readers raise whatever they please on broken archives
        raise UserError(f"{path} is damaged or not an archive ({type(error).__name__}: {error}): fetch it again") from None

def read_bounded(file):
    if file.stat().st_size > MAX_FILE:
        raise UserError(f"{file} is larger than {MAX_FILE >> 20} MB: not a picture or a caption file")
    return file.read_bytes()

def check_member(archive, name, size, total, plain):
    """The bytes so far, after one more member. Raises UserError where the member is not acceptable."""
    if not plain or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
        raise UserError(f"{archive} is refused: its member {name!r} is a link, a device or leads outside")
    if size > MAX_FILE or total + size > MAX_TOTAL:
        raise UserError(f"{archive} is refused: its member {name!r} is too large ({size:,} bytes, after {total:,})")
    return total + size

def read_picture(data, box=None):
    """Bytes of a picture file -> ((76, 76, 3) uint8, the window (left, top, right, bottom) that it shows). Raises ValueError. Like the
    authors, scales to 76x76 without keeping the proportions. box (x, y, w, h): show a square around it alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # Pillow's own warning of large pictures
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"))   # not EPS: it would be run
            size = picture.size
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"{size[0]}x{size[1]} pixels, too many")
            picture.draft("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))  # a large JPEG: decode at a half, a quarter ...
            window = close_up(box, size) if box else (0, 0, *size)
            part = [v * now / old for v, now, old in zip(window, picture.size * 2, size * 2)]   # as decoded
            picture = to_rgb(picture).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC, part)
            return np.asarray(ImageOps.exif_transpose(picture)), window     # upright, as a phone's photographs are not stored
    except Exception as error:          # Pillow's decoders raise whatever they please on broken files
        raise ValueError(f"not a whole picture ({type(error).__name__}: {error})") from None

def close_up(box, size):
    """The window around a box (x, y, w, h): 1.4 times its longer side wide and high, moved and cut to lie inside the picture."""
    x, y, w, h = box
    sides = [min(1.4 * max(w, h), total) for total in size]
    start = [min(max(0, middle - side / 2), total - side) for middle, side, total in zip((x + w / 2, y + h / 2), sides, size)]
    return (*start, start[0] + sides[0], start[1] + sides[1])

def to_rgb(picture):
    """Any mode of Pillow's to RGB: 16-bit greys are scaled, transparency is laid on white."""
    if picture.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(picture).astype(np.float32))
        return Image.fromarray((grey / (257 if grey.max() > 255 else 1)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")

def read_captions(data):
    """Bytes of a caption file -> list of captions, one a line; lines with fewer than 3 letters (such as "{}", of the real sets) are left out."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1", errors="replace")
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if sum(map(str.isalpha, line)) >= 3][:MAX_CAPTIONS]

def read_all(path, box=lambda name: None, texts=True):
    """Of a folder or archive: {name: (pixels, window)} of the pictures, {name: bytes} of the .txt files (where `texts`), and a list of the
    pictures that could not be read. box: of each name, for read_picture."""
    pictures, others, skipped, waiting = {}, {}, [], []

    def attempt(item):
        try:
            pictures[item[0]] = read_picture(item[1], box(item[0]))
        except ValueError as error:
            skipped.append(f"{item[0]}: {error}")

    def work_off():
        pictures.update(dict.fromkeys(name for name, _ in waiting))     # in the order of the source, whoever is first
        list(pool.map(attempt, waiting))
        waiting.clear()

    with ThreadPoolExecutor() as pool:      # Pillow decodes outside Python's lock
        for name, content in members(path):
            if re.search(r"(^|/)[^./][^/]*" + PICTURE, name, re.I):
                waiting.append((name, content))
            elif texts and name.endswith(".txt"):
                others[name] = content
            if len(waiting) == 256:         # bounded, so that a gigabyte of pictures does not pile up
                work_off()
        work_off()
    return {name: p for name, p in pictures.items() if p}, others, sorted(skipped)

# ---- cub and flowers -------------------------------------------------------------------------
MIRROR = "https://github.com/raphaelsenn/gan-text-to-image/releases/latest/download/"
SOURCES = {
    "cub": dict(pictures=["CUB_200_2011.tgz", "CUB_200_2011"],
        captions=["cvpr2016_cub.tar.gz", "cvpr2016_cub", "caption-data-cub-v1.0.0.zip", "captions", "text_c10"],
        url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", md5="97eceeb196236b17998738112f37df78",
        captions_url=MIRROR + "caption-data-cub-v1.0.0.zip",
        unseen="1 4 6 8 9 14 23 29 31 33 34 35 36 37 38 43 49 51 53 66 72 79 83 84 86 91 95 96 98 101 102 103 "
               "112 114 119 121 130 135 138 147 156 163 165 166 180 183 185 186 187 197"),  # testclasses.txt, for captions without it
    "flowers": dict(pictures=["102flowers.tgz", "jpg", "102flowers"],
        captions=["cvpr2016_flowers.tar.gz", "cvpr2016_flowers", "caption-data-flowers-v1.0.0.zip", "captions", "text_c10"],
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", md5="52808999861908f626f3c1f4e79d11fa",
        captions_url=MIRROR + "caption-data-flowers-v1.0.0.zip", unseen=" ".join(map(str, range(1, 21))))}
SOURCES["cub-box"] = SOURCES["cub"]
CUB_PARTS = ("2", "3", "4", "5", "6", "14")     # CUB's numbers of KEYPOINTS

def find_sources(name, folder):
    """(pictures, captions): paths below `folder`, an archive or an unpacked folder each."""
    def first(kind):
        there = [folder / candidate for candidate in SOURCES[name][kind] if (folder / candidate).exists()]
        if there:
            return there[0]
        raise UserError(f"no {kind} of {name} in {folder}: expected one of {', '.join(SOURCES[name][kind])}")
    return first("pictures"), first("captions")

def fetch_sources(name):
    """Download what is not there yet to cache/downloads."""
    source, folder = SOURCES[name], CACHE / "downloads"
    pictures = folder / source["pictures"][0]
    if not pictures.exists():
        download(source["url"], pictures, source["md5"])
    try:
        if not any((folder / candidate).exists() for candidate in source["captions"]):
            download(source["captions_url"], folder / source["captions_url"].rsplit("/", 1)[1])
    except UserError as error:
        raise UserError(f"the captions could not be fetched ({error}). Get {source['captions'][0]} (the link is in the "
                        f"README of github.com/reedscot/cvpr2016), put it into {folder}, run this again") from None
    return find_sources(name, folder)

def download(url, path, md5=None, chunk=1 << 20):
    """Fetch a URL to `path`, with a progress line; goes on with a broken-off one, a .part. Raises UserError when it fails or has another MD5."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:                            # the server starts at the beginning
                have = 0
            total = have + int(answer.headers.get("Content-Length") or 0)
            with open(part, "r+b" if have else "wb") as f:
                f.seek(have)
                while data := answer.read(chunk):
                    f.write(data)
                    have += len(data)
                    print(f"\r{path.name}: {have / 1e6:.0f} of {total / 1e6:.0f} MB", end="", flush=True)
            print()
        if have < total:
            raise UserError(f"{url} broke off after {have:,} of {total:,} bytes: run this again to go on")
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:                       # 416: nothing is left to fetch
            raise UserError(f"{url} answered {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:                      # no network, a time-out, a bad URL
        raise UserError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}") from None
    if md5:
        found = hashlib.md5()
        with open(part, "rb") as f:
            while data := f.read(chunk):
                found.update(data)
        if found.hexdigest() != md5:
            part.unlink()
            raise UserError(f"{path.name} has MD5 {found.hexdigest()}, expected {md5}: it was removed, run this again")
    os.replace(part, path)

def build_archives(name, pictures_path, captions_path):
    """CUB or Oxford-102 from archives or unpacked folders, in any of the layouts they come in: pictures and captions are matched by file
    name, .../NAME.jpg with .../NAME.txt."""
    captions, classes, unseen = {}, {}, {int(n) for n in SOURCES[name]["unseen"].split()}
    number_of = lambda label: int(re.sub(r"\D", "", label.split(".")[0])[:9] or -1)         # 013.Bobolink, class_00013
    for path, content in members(captions_path):
        folder, _, file = path.rpartition("/")
        if file == "testclasses.txt":
            unseen = {number_of(label) for label in content.decode("utf-8", "replace").split()}
        elif re.fullmatch(r"[^.].*\d\.txt", file):
            captions[file[:-4]], classes[file[:-4]] = read_captions(content), folder.rpartition("/")[2]

    stem = lambda path: os.path.splitext(path.rpartition("/")[2])[0]
    tables = {stem(path): [line.split() for line in content.decode("utf-8", "replace").splitlines()]
              for path, content in members(pictures_path) if re.search(r"(^|/)(images|bounding_boxes|part_locs)\.txt$", path)}
    try:
        boxes = {number: (float(x), float(y), float(w), float(h)) for number, x, y, w, h in tables.get("bounding_boxes", [])}
        points = {(number, part): (float(x), float(y)) for number, part, x, y, seen in tables.get("part_locs", []) if seen == "1"}
        listed = {stem(path): number for number, path in tables.get("images", [])}
    except ValueError as error:
        raise UserError(f"{pictures_path}: a table is not as CUB's are ({error})") from None
    pictures, _, skipped = read_all(pictures_path, lambda path: boxes.get(listed.get(stem(path))) if name == "cub-box" else None, texts=False)
    pictures = {stem(path): (path, *rest) for path, rest in pictures.items()}
    # The source's own order: that of images.txt where there is one, else by file name.
    order = list(listed.items()) or [(s, s) for s in sorted(pictures)]

    out = []
    for row, (name_of, number) in enumerate(order):
        if name_of not in pictures or not captions.get(name_of):
            skipped.append(f"{name_of}: no {'caption' if name_of in pictures else 'picture'}")
            continue
        path, pixels, (left, top, right, bottom) = pictures[name_of]
        origin, scale = np.array([left, top]), IMAGE_SIZE / np.array([right - left, bottom - top])  # boxes and parts to 76x76 pixels
        box = (np.array(boxes[number]) - [*origin, 0, 0]) * np.tile(scale, 2) if number in boxes else None
        parts = [(np.array(points.get((number, part), (np.nan, np.nan))) - origin) * scale for part in CUB_PARTS] if points else None
        label = path.split("/")[-2] if name != "flowers" and "/" in path else classes[name_of]
        out.append(Picture(pixels, captions[name_of], label, row, box, parts))
    return out, {p.label for p in out if number_of(p.label) in unseen}, skipped

# ---- a folder of your own --------------------------------------------------------------------
def build_folder(folder):
    pictures, texts, skipped = read_all(folder)
    out = []
    for row, (name, (pixels, _)) in enumerate(pictures.items()):
        text = os.path.splitext(name)[0] + ".txt"
        captions = read_captions(texts.get(text, b""))
        if captions:
            # Sub-folders are classes; without them every picture is one.
            out.append(Picture(pixels, captions, name.rpartition("/")[0] or name, row))
        else:
            skipped.append(f"{name}: {'no caption in' if text in texts else 'there is no'} {text}")
    labels = sorted({p.label for p in out})
    random.Random(0).shuffle(labels)
    return out, set(labels[:len(labels) // 4]), skipped         # a quarter of the classes is unseen, as in CUB

# ---- The cache -------------------------------------------------------------------------------
def stamp(paths):
    """What a cache is made from: name, size and time of every file."""
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]

def load(name, source=None):
    """The data set `name` (toy, cub, cub-box, flowers or a folder), from its cache. A cache's folder is named after all that it was made from, so
    that a change there means another cache. source: a folder with the archives of cub or flowers. Raises UserError."""
    paths, label = [], short_name(name)
    if name == "toy":
        made_of = [inspect.getsource(f) for f in (toy_species, toy_captions, toy_draw, toy_pictures, build_toy)]
        made_of += [COLOURS, BACKGROUNDS, BILLS, WHOLE, PLAIN, PARTS]
        build = build_toy
    elif name in SOURCES:
        old = sorted(CACHE.glob(f"{name}-{'[0-9a-f]' * 16}/meta.json"), key=os.path.getmtime)
        if old and not source:                                  # what it was made from last time
            paths = [Path(p) for p in json.loads(old[-1].read_text())["paths"]]
            if not all(p.exists() for p in paths):
                return read_cache(old[-1].parent, name)         # is gone: the cache stays good
        paths = paths or (find_sources(name, Path(source)) if source else fetch_sources(name))
        made_of, build = stamp(paths), lambda: build_archives(name, *paths)
    else:
        if not Path(name).is_dir():
            raise UserError(f"unknown data set {name!r}: expected toy, cub, cub-box, flowers or a folder of pictures")
        paths = [Path(name).resolve()]
        made_of, build = stamp(paths), lambda: build_folder(paths[0])
    digest = hashlib.sha256(repr((FORMAT, made_of)).encode()).hexdigest()[:16]
    folder = CACHE / f"{label}-{digest}"
    if not (folder / "meta.json").exists():
        write_cache(folder, label, *build(), paths=[str(p.resolve()) for p in paths])
    return read_cache(folder, name)

def short_name(name):
    """What is written of a data set is called by this name. A folder of yours may be called cub."""
    return name if name in ("toy", *SOURCES) else f"own-{Path(name).resolve().name}"

def read_cache(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {f.stem: np.load(f, mmap_mode="r") for f in folder.glob("*.npy")}
    return Dataset(name=name, captions=meta["captions"], class_names=meta["class_names"], skipped=meta["skipped"], **arrays)

def write_cache(folder, label, pictures, unseen, skipped, paths):
    """Into a folder of its own, which then takes its name: a killed or a second process never leaves half of one."""
    if not pictures:
        raise UserError(f"{label}: found no picture with a caption" + (f": {skipped[0]} ({len(skipped)} in all)" if skipped else ""))
    class_names = sorted({p.label for p in pictures})
    number = {name: i for i, name in enumerate(class_names)}
    arrays = dict(images=np.stack([p.pixels for p in pictures]), labels=np.array([number[p.label] for p in pictures]),
                  unseen=np.array([c in unseen for c in class_names]), rows=np.array([p.row for p in pictures]))
    for key, shape in (("boxes", 4), ("keypoints", (6, 2))):
        known = [getattr(p, key) for p in pictures]
        if any(k is not None for k in known):
            arrays[key] = np.stack([np.full(shape, np.nan) if k is None else k for k in known]).astype(np.float32)
    CACHE.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=CACHE, prefix=".new-"))
    try:
        for key, array in arrays.items():
            np.save(new / f"{key}.npy", array)
        (new / "meta.json").write_text(json.dumps(dict(
            paths=paths, class_names=class_names, skipped=skipped, captions=[p.captions for p in pictures])))
        if folder.exists() and not (folder / "meta.json").exists():
            shutil.rmtree(folder)                   # somebody has been at it
        os.replace(new, folder)
    except OSError:
        if not (folder / "meta.json").exists():     # else another process was faster: its cache is as good
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for other in CACHE.iterdir():                   # of an earlier state of the same source
        if other != folder and re.fullmatch(re.escape(label) + "-[0-9a-f]{16}", other.name):
            shutil.rmtree(other, ignore_errors=True)

# ---- Looking at it ---------------------------------------------------------------------------
def sheet(rows, texts=None, titles=None, scale=1, width=230):
    """A picture of a grid of pictures: rows of equally many (H, W, 3) uint8, `texts` beside the rows, `titles` above the columns.
    All grids of this project are drawn here. Returns a Pillow image."""
    font = ImageFont.load_default(13)
    h, w = (int(scale * n) for n in rows[0][0].shape[:2])
    left, top = (width if texts else 0), (22 if titles else 0)
    page = Image.new("RGB", (left + (w + 2) * len(rows[0]), top + (h + 2) * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for j, title in enumerate(titles or []):
        draw.text((left + j * (w + 2) + w / 2, 10), title, "black", font, "mm")
    for i, row in enumerate(rows):
        y = top + i * (h + 2)
        if texts:
            text = "".join(c if c.isprintable() else " " for c in texts[i][:500])
            draw.multiline_text((6, y + 2), "\n".join(textwrap.wrap(text, 32, max_lines=max(1, h // 17), placeholder=" ...")), "black", font)
        for j, picture in enumerate(row):
            picture = Image.fromarray(np.ascontiguousarray(picture)).resize((w, h), Image.NEAREST)
            page.paste(picture, (left + j * (w + 2), y))
    return page

def save_picture(picture, path):
    """Write a Pillow image, whole or not at all. Raises UserError for an ending that Pillow does not know."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"cannot write {path}: name a picture file, such as sample.png")
    write_atomically(path, lambda f: picture.save(f, kind))

def add_options(add):
    add("--dataset", default="toy", help="toy, cub, cub-box, flowers, or a folder of pictures with captions (default: toy)")
    add("--from", dest="source", metavar="DIR", help="folder with the archives of cub or flowers, brought by hand")

def main():
    parser = argparse.ArgumentParser(description="Prepare a data set and report what it holds.")
    add_options(parser.add_argument)
    args = parser.parse_args()
    ds = load(args.dataset, args.source)
    print(f"{args.dataset}: {len(ds.images):,} pictures, {sum(map(len, ds.captions)):,} captions, {len(ds.class_names)} classes")
    print(f"  training: {len(ds.split(False)):,} pictures of {(~ds.unseen).sum()} classes; unseen: {len(ds.split(True)):,} of {ds.unseen.sum()}")
    print(f"  {ds.images.nbytes / 1e6:.0f} MB of pixels; boxes: {ds.boxes is not None}; keypoints: {ds.keypoints is not None}")
    for line in ds.skipped[:10] + ([f"... {len(ds.skipped)} in all, listed in meta.json of the cache"] if len(ds.skipped) > 10 else []):
        print(f"  skipped {line}")
    rng, rows, texts = random.Random(1), [], []
    for label in rng.sample(range(len(ds.class_names)), min(8, len(ds.class_names))):
        picks = [int(rng.choice(np.flatnonzero(ds.labels == label))) for _ in range(6)]
        rows.append([ds.images[i] for i in picks])
        texts.append(rng.choice(ds.captions[picks[0]]))
    path = CACHE / f"{short_name(args.dataset)}.png"
    save_picture(sheet(rows, texts), path)
    print(f"  contact sheet: {path}")

if __name__ == "__main__":
    run(main)
