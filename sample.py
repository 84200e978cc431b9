"""[A] section 5: look at a trained run, and measure it.

    python sample.py "an all black bird" "a red bird with a white belly"  # a row a text
    python sample.py --interpolate "a bright red bird" "an all blue bird" # phi moves, z stays
    python sample.py --interpolate-style "an all black bird"              # z moves, phi stays
    python sample.py "an all black bird" --style query.jpg other.jpg      # z = S(query)
    python sample.py --measure runs/toy-gan runs/toy-gan-cls              # results, side by side

The first half of this file makes grids of images: [A] figures 3, 4, 6 and 8. The second half
measures runs on the images of unseen classes: style verification ([A] section 5.2, figure 5),
sentences matched, the Frechet distance, and others. A run is a folder in runs/, a checkpoint.pt,
or a name in weights/.
"""

import argparse
import json
import shlex
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import encoder
from data import IMAGE_SIZE, UserError, centre_crops, image_grid, plot, save_image, to_pixels
from encoder import embed
from gan_cls import Z_DIM, Generator, StyleEncoder, interpolate

TRUNCATION = 0.8             # what z is multiplied with to draw; to measure 1, the z of training
BATCH = 256                  # images that go through a network at once
SCORER_SEEDS = (1, 2, 3)     # the measures of `Scorers` are means over three trained networks


# ---- A trained run ---------------------------------------------------------------------------

class Model:
    """What sampling needs of a run.

    G: the generator with the average of its weights (EMA). S: the style encoder, or None where
    the run has not trained it yet. phi: the text encoder. settings: those of the training.
    Raises UserError where the file does not hold a run.
    """

    def __init__(self, path, device="cpu"):
        checkpoint = data.load_checkpoint(path, "gan-cls")
        self.path = Path(path)
        self.device = torch.device(device)
        with data.checkpoint_errors(path):
            self.settings = dict(checkpoint["settings"])
            ngf = self.settings["ngf"]
            self.G = data.load_network(lambda: Generator(ngf), checkpoint["average"])
            self.S = None
            if checkpoint["S"]:
                self.S = data.load_network(StyleEncoder, checkpoint["S"])
                self.S.to(self.device).eval()
            self.phi, _ = encoder.build(checkpoint["encoder"], self.device)
            self.phi_settings = dict(checkpoint["encoder"]["settings"])
        self.G.to(self.device).eval()

    @torch.no_grad()
    def generate(self, z, h):
        """z (N, 100), h (N, 1024), on any device -> images (N, 64, 64, 3) uint8."""
        images = []
        for z_part, h_part in zip(z.split(BATCH), h.split(BATCH)):
            x = self.G(z_part.to(self.device), h_part.to(self.device))    # (B, 3, 64, 64)
            images.append(to_pixels(x))
        return np.concatenate(images)

    @torch.no_grad()
    def styles(self, x):
        """S of images x (N, 3, 64, 64) in [-1, 1] -> s (N, 100), in the place of a z."""
        return torch.cat([self.S(part.to(self.device)) for part in x.split(BATCH)])

    def style(self, path):
        """An image file -> its s (1, 100), and the image as S saw it, (64, 64, 3) uint8."""
        if self.S is None:
            folder = shlex.quote(str(self.path.parent))
            raise UserError("this run has no style encoder yet. Finish its training with:  "
                            f"python train.py --resume --out {folder}")
        try:
            pixels, _ = data.read_image(data.read_bounded(Path(path)))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image {path}: {error}") from None
        x = centre_crops(torch.tensor(pixels)[None], torch.tensor([0]))    # (1, 3, 64, 64)
        return self.styles(x), to_pixels(x)[0]


def find_weights(name=None):
    """The file that holds a run.

    name: the file itself, a run's folder, or a name in weights/, which is found from any working
    folder. None is the newest run in runs/, or weights/cub.pt where there is none.
    """
    if name is None:
        runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        candidates = [*runs[-1:], encoder.WEIGHTS / "cub.pt"]
    else:
        candidates = [Path(name), Path(name) / "checkpoint.pt", encoder.WEIGHTS / f"{name}.pt"]
    for path in candidates:
        if path.is_file():
            return path
    if name is None:
        raise UserError("there is no run and no weights/cub.pt: train one first with  "
                        "python train.py")
    known = ", ".join(sorted(path.stem for path in encoder.WEIGHTS.glob("*.pt")))
    raise UserError(f"there is no file {name}, no folder of that name with a checkpoint.pt in it, "
                    f"and it is not a name in weights/ (there: {known or 'nothing'})")


# ---- Grids of images: [A] figures 3, 4, 6 and 8 ----------------------------------------------

def noise(n, generator, truncation=1.0):
    """z (n, 100) from N(0, 1), times `truncation`.

    departs from the paper: below 1, z lies nearer to its mean than in training. The images of a
    text differ less and fewer of them go wrong (measured: weights/README.md). This is the
    truncation trick of BigGAN (Brock et al., ICLR 2019), which draws large values again where we
    scale all.
    """
    return truncation * torch.randn(n, Z_DIM, generator=generator)


def grid_of_texts(model, h, z):
    """A row a text, a column a noise: h (T, 1024), z (n, 100) -> T rows of n images."""
    return [model.generate(z, text.expand(len(z), -1)) for text in h]


def grid_between_texts(model, h_from, h_to, z, steps):
    """[A] figure 8 left: a row keeps its noise, the text moves.

    h_from, h_to (1024,), z (rows, 100); steps: numbers from 0 (h_from) to 1 (h_to).
    """
    h = torch.stack([interpolate(h_from, h_to, 1 - t) for t in steps])    # (n, 1024)
    return [model.generate(one.expand(len(h), -1), h) for one in z]


def grid_between_noises(model, h, z_from, z_to, steps):
    """[A] figure 8 right: a row keeps its text, the noise moves. h (rows, 1024), z (rows, 100)."""
    rows = []
    for text, start, end in zip(h, z_from, z_to):
        z = torch.stack([interpolate(start, end, 1 - t) for t in steps])    # (n, 100)
        rows.append(model.generate(z, text.expand(len(z), -1)))
    return rows


def grid_of_styles(model, h, paths):
    """[A] section 4.4, figure 6: the style of an image, the content of a text.

    h (T, 1024), paths of n images -> the n images themselves, then T rows of n images.
    """
    queries = [model.style(path) for path in paths]
    s = torch.cat([style for style, _ in queries])            # (n, 100):  s <- S(x)
    images = [image for _, image in queries]
    return [images, *grid_of_texts(model, h, s)]              # x_hat <- G(s, phi(t))


# ---- 5.2  Style: groups, pairs, the ROC curve ------------------------------------------------

def kmeans(points, k, seed=0, rounds=50):
    """Lloyd's algorithm from k-means++ seeds: points (N, d) -> (N,), the group of each point."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < min(k, len(points)):
        # A point becomes the next centre with a chance that grows with its distance from the
        # centres so far. 1e-12: there may be fewer than k different points.
        far = torch.cdist(points, centres).min(1).values.square() + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(far, 1, generator=generator)]])

    for _ in range(rounds):
        group = torch.cdist(points, centres).argmin(1)
        for i in group.unique():    # a centre without points stays where it is
            centres[i] = points[group == i].mean(0)
    return group


def background_colours(ds, index):
    """The mean colour outside the bounding box: (n, 3), NaN where the box is not known."""
    colours = torch.full((len(index), 3), torch.nan, dtype=torch.float64)
    for n, i in enumerate(index):
        if not np.isfinite(ds.boxes[i]).all():
            continue
        x, y, w, h = ds.boxes[i]
        outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
        outside[max(0, int(y)):int(y + h) + 1, max(0, int(x)):int(x + w) + 1] = False
        if not outside.any():       # the box is the whole image
            outside[:] = True
        colours[n] = torch.from_numpy(ds.images[i][outside].mean(0))
    return colours


def poses(ds, index):
    """The six keypoints relative to the box, its corner 0 and its sides 1: (n, 12), or NaN."""
    corner = ds.boxes[index][:, None, :2]
    sides = ds.boxes[index][:, None, 2:]
    pose = (ds.keypoints[index] - corner) / sides             # (n, 6, 2)
    return torch.from_numpy(pose).double().flatten(1)


def style_groups(ds, index, k=100):
    """[A] section 5.2: images grouped by style, by k-means with k groups.

    Once by the background's mean colour, once by the pose -> {"background": (n,), "pose": (n,)},
    the group of each image, -1 where a box or one of the six keypoints is not known.
    """
    groups = {}
    style = {"background": background_colours(ds, index), "pose": poses(ds, index)}
    for kind, points in style.items():
        known = points.isfinite().all(1)
        groups[kind] = torch.full((len(index),), -1)
        if known.any():
            groups[kind][known] = kmeans(points[known], k)
    return groups


def style_pairs(group, folds=5, most=2500, seed=0):
    """Pairs of images for style verification, [A] section 5.2. In half of them both images are in
    one group (the same style), in the other half they are in different groups.

    group (N,): the group of each image, -1 for none. The images are divided into folds; each gives
    all its pairs of the first kind (`most` of them, if there are more) and as many of the second.
    Returns a list of (i, j, same), one a fold; no pair is in it twice. A fold without a pair of
    the first kind is left out. Raises UserError where no fold is left.
    """
    rng = np.random.default_rng(seed)
    group = group.numpy()
    known = rng.permutation(np.flatnonzero(group >= 0))
    out = []
    for images in np.array_split(known, folds):
        i, j = images[np.array(np.triu_indices(len(images), 1))]      # all pairs of the fold
        same = group[i] == group[j]
        count = min(same.sum(), (~same).sum(), most)
        if count > 0:
            within = rng.permutation(np.flatnonzero(same))[:count]
            across = rng.permutation(np.flatnonzero(~same))[:count]
            keep = np.concatenate([within, across])
            out.append([torch.from_numpy(values[keep]) for values in (i, j, same)])
    if not out:
        raise UserError(f"style verification needs pairs of images of one style, and among "
                        f"{len(known)} images there is none: it takes more unseen images")
    return out


def roc(scores, same):
    """The ROC curve: scores (N,), same (N,) bool -> false and true positive rates, (N + 1,) each,
    the strictest threshold first."""
    hits = same[scores.argsort(descending=True)].double()
    rates = []
    for counted in (1 - hits, hits):
        rates.append(torch.cat([counted.new_zeros(1), counted.cumsum(0) / counted.sum()]))
    return rates


def auc(scores, same):
    """Area under the ROC curve, 0 to 1: how often a "same" pair scores above a "different" one,
    ties counting half. 0.5 is chance."""
    values, level = scores.double().unique(return_inverse=True)
    yes = torch.bincount(level[same], minlength=len(values)).double()     # at each score
    no = torch.bincount(level[~same], minlength=len(values)).double()
    below = no.cumsum(0) - no / 2
    return ((yes * below).sum() / (yes.sum() * no.sum())).item()


def pair_scores(emb, pairs):
    """emb (N, d), folds of pairs -> a list of (score of each pair, its cosine; same), by fold."""
    return [(F.cosine_similarity(emb[i], emb[j]), same) for i, j, same in pairs]


def verify_style(emb, pairs):
    """Style verification, [A] section 5.2: the AUC, mean over the folds, when the score of a
    pair is the cosine of its two rows of emb (N, d). 0 to 1; 0.5 is chance, 1 is perfect."""
    return float(np.mean([auc(scores, same) for scores, same in pair_scores(emb, pairs)]))


# ---- What is measured, and by what -----------------------------------------------------------

# The images of the unseen classes: index (n,) in the data set, x (n, 3, 64, 64) in [-1, 1] their
# centre crops, labels (n,), texts: one caption of each. pairs: {"background": folds, "pose": folds}
# for style verification; empty where the data set has no boxes and keypoints. direction (n,): see
# `facing`; None where it has no keypoints.
TestSet = namedtuple("TestSet", "ds index x labels texts pairs direction")


def draw_texts(ds, index, seed=0):
    """One caption of each image, drawn at random: what a user gives is one sentence too."""
    rng = np.random.default_rng(seed)
    return [ds.captions[i][rng.integers(len(ds.captions[i]))] for i in index]


def images_at(ds, index, device):
    """The centre crops of these images, (n, 3, 64, 64) in [-1, 1]."""
    return centre_crops(data.image_tensor(ds, device), torch.tensor(index, device=device))


def make_test_set(ds, device):
    """Raises UserError where a data set has too little to measure on."""
    index = ds.unseen_images()
    labels = torch.tensor(ds.labels[index])
    sizes = labels.unique(return_counts=True)[1]
    if len(index) < 4 or sizes.min() < 2:
        raise UserError(f"{ds.name} cannot be measured: expected unseen classes of at least two "
                        f"images each, four in all; found {len(index)} images of {len(sizes)}")
    pairs = {}
    if ds.boxes is not None and ds.keypoints is not None:
        for kind, group in style_groups(ds, index).items():
            pairs[kind] = style_pairs(group)
    direction = facing(ds, index) if ds.keypoints is not None else None
    x = images_at(ds, index, device)
    return TestSet(ds, index, x, labels, draw_texts(ds, index), pairs, direction)


def generate_for(model, h, seed, truncation=1.0):
    """An image for each row of h (N, 1024), in 8 bits as a viewer gets it: (N, 64, 64, 3)."""
    z = noise(len(h), torch.Generator().manual_seed(seed), truncation)
    return model.generate(z, h)


def from_pixels(images, device):
    """The inverse of to_pixels: (N, 64, 64, 3) uint8 -> (N, 3, 64, 64) in [-1, 1]. So generated
    images have the same 256 levels as real ones when both are measured."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def feature_map(v, x):
    """The last map of an image encoder: x (N, 3, 64, 64) -> (N, 256, 4, 4), on the CPU."""
    return torch.cat([v.features(part).float().cpu() for part in x.split(BATCH)])


class Scorers:
    """Three text encoders with their image sides, which say how well images fit sentences.

    Each is trained on the training classes, with a seed of its own, and kept in runs/. No G was
    trained with one of them. What one says depends much on its seed: a measure is their mean.
    """

    def __init__(self, test, device, precision, log=print):
        ds = test.ds
        self.image_encoders = []
        self.unseen = []            # eq. 3's mean captions of the unseen classes, by each of them
        for seed in SCORER_SEEDS:
            path = Path("runs") / f"{data.short_name(ds.name)}-scorer-{seed}.pt"
            checkpoint = encoder.get_encoder(
                ds, device, precision, image_side="conv", path=path, seed=seed, anneal=True,
                log=log)
            phi, v = encoder.build(checkpoint, device)
            self.image_encoders.append(v)
            self.unseen.append(encoder.unseen_classes(ds, phi, precision))
        self.chance = 1 / len(self.unseen[0].classes)
        self.real_features = self.features(test.x)

    def matched(self, x):
        """Sentences matched: x (n, 3, 64, 64), an image for a caption of each unseen image, or
        these images themselves -> two shares, 0 to 1, top-1 and top-5.

        An image matches where the class of its sentence is the first by eq. 3, or among the
        first five: [B]'s zero-shot classification, of generated images. So it is measured
        whether an image fits its class, not each word of its sentence.
        """
        shares = []
        for v, unseen in zip(self.image_encoders, self.unseen):
            emb = encoder.image_embeddings(v, x).cpu()
            shares.append([
                encoder.top_k_accuracy(k, emb, unseen.labels, unseen.classes, unseen.means)
                for k in (1, 5)])
        return np.mean(shares, 0).tolist()

    def features(self, x):
        """For the Frechet distance: x (N, 3, 64, 64) -> (N, 256) of each of the three."""
        return [feature_map(v, x).mean((2, 3)) for v in self.image_encoders]

    def say_little(self, top_1):
        """top_1: `matched` of the real images. Is it so low that it means little? The
        rule: less than a third of the way from chance to 1."""
        return top_1 - self.chance <= (1 - self.chance) / 3


# ---- The measures, each a function -----------------------------------------------------------

def frechet_distance(a, b):
    """Frechet distance of the two Gaussians fitted to features a (N, d) and b (M, d), >= 0.

        |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2))

    The formula of the FID (Heusel et al., NeurIPS 2017). Fewer images give a larger value.
    """
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)
    # The trace of (C_a C_b)^(1/2) is that of the symmetric (R C_b R)^(1/2), R = C_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    squares = (a.mean(0) - b.mean(0)).square().sum()
    return (squares + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def read_features(path):
    """Features of images by a network of the user's own: a .npy file -> (N, d) float32."""
    rows = encoder.open_features(path)
    if rows.dtype.kind != "f" or rows.ndim != 2 or min(rows.shape) < 2:
        raise UserError(f"{path} holds {rows.dtype} {rows.shape}: expected floats (N, d), a row of "
                        "two or more numbers for each of two or more images")
    rows = torch.from_numpy(rows.astype(np.float64)).float()
    if not rows.isfinite().all():
        raise UserError(f"{path} holds numbers that are not finite in 32 bits")
    return rows


def measure_files(paths):
    """--frechet: the distance of two files of features, real and generated."""
    a, b = [read_features(path) for path in paths]
    if a.shape[1] != b.shape[1]:
        raise UserError(f"{paths[0]} has {a.shape[1]} features an image, {paths[1]} has "
                        f"{b.shape[1]}: name two files by the same network")
    print(f"Frechet distance {frechet_distance(a, b):.4f}, {len(a):,} and {len(b):,} images")


def mean_frechet_distance(features_a, features_b):
    """The mean of the Frechet distances on each scorer's features. Not the FID of papers, which
    takes the features of an Inception network: compare it only within one table."""
    distances = [frechet_distance(a, b) for a, b in zip(features_a, features_b)]
    return float(np.mean(distances))


def pixel_diversity(generated, real):
    """How much do the images of one text differ, beside the real images of one class?

    The standard deviation of a pixel, mean over pixels: generated, a list of (16, 3, 64, 64), 16
    noises for one text each; real, a list of (m, 3, 64, 64), the images of one class each ->
    their ratio. 0: z changes nothing. 1: as in real images. Not in [A].
    """
    within_texts = torch.stack([x.std(0).mean() for x in generated]).mean()
    within_classes = torch.stack([x.std(0).mean() for x in real]).mean()
    return (within_texts / within_classes.clamp(min=1e-6)).item()


def background_kept(x, y):
    """Style transfer ([A] section 4.4), 0 to 1: how often is the background of y that of x?

    x, y (n, 3, 64, 64): query images, and what the style of each gave with another's text. The
    mean colours of the top six rows, where there is hardly ever a bird, are put into 8 groups; a
    background is kept where both are of one group. Chance is about 1 in 8.
    """
    above = [images[:, :, :6].mean((2, 3)).cpu() for images in (x, y)]
    group = kmeans(torch.cat(above), 8)
    return (group[:len(x)] == group[len(x):]).float().mean().item()


def facing(ds, index):
    """+1 where the beak is to the right of the tail, -1 to the left, NaN where not known: (n,)."""
    beak = ds.keypoints[index, data.KEYPOINTS.index("beak"), 0]
    tail = ds.keypoints[index, data.KEYPOINTS.index("tail"), 0]
    return torch.from_numpy(np.sign(beak - tail))


def direction_features(v, x):
    """A scorer's last map, mean over its rows, so that left and right stay apart: (N, 1024)."""
    return feature_map(v, x).mean(2).flatten(1)


def direction_probe(ds, v, device):
    """A linear map from direction_features to the direction, fitted by least squares to every
    second training image whose beak and tail are known: (1024, 1)."""
    index = ds.training_images()
    index = index[facing(ds, index).isfinite().numpy()][::2]
    if not len(index):
        raise UserError(f"{ds.name}: no training image has both a beak and a tail among its "
                        "keypoints, so a direction cannot be learned from them")
    features = direction_features(v, images_at(ds, index, device))
    directions = facing(ds, index)[:, None].float()
    return torch.linalg.lstsq(features, directions, driver="gelsd").solution


def direction_kept(y, direction, v, probe):
    """Style transfer, 0 to 1: how often does the bird in y (n, 3, 64, 64) look to the side that
    its query image looks to? By the linear probe; direction (n,) +1 or -1. Chance is 1 in 2."""
    found = (direction_features(v, y) @ probe).sign()[:, 0]
    return (found == direction).float().mean().item()


# ---- Measuring a run, and real images to compare it with -------------------------------------

def measure_run(model, test, scorers, probe, truncation=1.0):
    """The results of a run on the unseen classes -> {name: number}.

    Those of S are left out in a run without S, those of the keypoints where there are none.
    """
    h = embed(model.phi, test.texts)                                            # (n, 1024)
    fake = from_pixels(generate_for(model, h, 0, truncation), model.device)     # (n, 3, 64, 64)
    top_1, top_5 = scorers.matched(fake)
    results = {"sentences matched, top-1": top_1, "sentences matched, top-5": top_5}

    # 16 images of one text of each class, beside the real images of the class. The same of blends:
    # where D never sees them, G can fool it with one image for many blends, whatever z.
    classes = test.labels.unique()
    first = [int((test.labels == c).nonzero()[0]) for c in classes]
    h_first = h[first]
    blends = interpolate(h_first, h_first.roll(1, 0), 0.5)    # eq. 5, of two classes each
    real = [test.x[test.labels == c] for c in classes]
    for name, texts in (("pixel diversity", h_first), ("pixel diversity, blends", blends)):
        generated = generate_for(model, texts.repeat_interleave(16, 0), 1, truncation)
        generated = from_pixels(generated, model.device).split(16)
        results[name] = pixel_diversity(generated, real)

    results["Frechet distance"] = mean_frechet_distance(
        scorers.features(fake), scorers.real_features)
    if model.S is None:
        return results

    if probe is not None:
        query, other = style_queries(test)
        x = test.x[query]
        s = model.styles(x)                                   # s <- S(x)
        y = model.generate(s, h[other])                       # x_hat <- G(s, phi(t))
        y = from_pixels(y, model.device)
        results["style transfer, background kept"] = background_kept(x, y)
        results["style transfer, direction kept"] = direction_kept(
            y, test.direction[query], scorers.image_encoders[0], probe)
    for kind, pairs in test.pairs.items():
        results[f"style verification, {kind}"] = verify_style(model.styles(test.x).cpu(), pairs)
    return results


def style_queries(test):
    """For style transfer: the images whose direction is known, and for each another one of them,
    whose text is taken. Two (q,), places in the test set."""
    query = test.direction.isfinite().nonzero()[:, 0]
    return query, query.roll(len(query) // 2)


def measure_references(test, scorers, probe, phi):
    """What real images reach, and chance -> {measure: {name of the reference: number}}."""
    top_1, top_5 = scorers.matched(test.x)
    out = {
        "sentences matched, top-1": {"real images": top_1, "chance": scorers.chance},
        "sentences matched, top-5": {"real images": top_5, "chance": min(1, 5 * scorers.chance)},
        "Frechet distance": frechet_references(test, scorers)}
    if test.ds.name == "toy":       # a sentence leaves out some of what distinguishes a species
        drawn = torch.from_numpy(data.toy_images_for(test.texts))
        x = centre_crops(drawn, torch.arange(len(drawn))).to(test.x.device)
        for k, share in zip((1, 5), scorers.matched(x)):
            out[f"sentences matched, top-{k}"]["drawn from the sentence alone"] = share
    if probe is not None:
        query, other = style_queries(test)
        x = test.x[query]
        found = direction_kept(x, test.direction[query], scorers.image_encoders[0], probe)
        out["style transfer, background kept"] = {
            "real images, each with another": background_kept(x, test.x[other])}
        out["style transfer, direction kept"] = {
            "real images, by the linear probe": found, "chance": 0.5}
    h = embed(phi, test.texts).cpu()
    for kind, pairs in test.pairs.items():
        out[f"style verification, {kind}"] = {"captions": verify_style(h, pairs), "chance": 0.5}
    return out


def frechet_references(test, scorers, seed=0):
    """Between real images: two halves of the unseen ones (what chance makes of one and the same
    kind of images), and as many training images beside the unseen ones (other species)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(test.index))
    half = len(order) // 2
    halves = mean_frechet_distance([real[order[:half]] for real in scorers.real_features],
                                   [real[order[half:]] for real in scorers.real_features])
    training = rng.permutation(test.ds.training_images())[:len(order)]
    training = scorers.features(images_at(test.ds, training, test.x.device))
    return {
        "real images, two halves": halves,
        "real images, training against unseen classes": mean_frechet_distance(
            training, scorers.real_features)}


# ---- Several runs side by side ---------------------------------------------------------------

def load_models(runs, device):
    """Runs as find_weights takes them -> {name: Model}, by the run's folder or the file's stem."""
    models = {}
    for run in runs:
        path = find_weights(run)
        name = path.resolve().parent.name if path.name == "checkpoint.pt" else path.stem
        if name in models:
            raise UserError(f"two of the runs are called {name}: copy or rename one of them")
        if name == "real":
            raise UserError(f"{path}: rename it, \"real\" are the real images")
        models[name] = Model(path, device)
    return models


def trained_on(model):
    with data.checkpoint_errors(model.path):
        return str(model.settings["dataset"])


def load_dataset(models, dataset=None, source=None):
    """The data set of the runs. dataset: where it is now, if it has moved."""
    first = next(iter(models.values()))
    try:
        return data.load(dataset or trained_on(first), source)
    except UserError as error:
        raise UserError(f"{error} (--dataset names the runs' data where it has moved)") from None


def check_dataset(models, ds, moved):
    """Raises UserError where a run was trained on other data than ds. moved: the user named ds, so
    that data of one's own, a folder or a .zip, may have another name than in training."""
    for name, model in models.items():
        theirs = trained_on(model)
        both_own = theirs not in data.DATASETS and ds.name not in data.DATASETS
        if theirs != ds.name and not (moved and both_own):
            raise UserError(f"{name} was trained on {theirs}, not on {ds.name}: results of "
                            "different data sets cannot be compared, measure one at a time")
        if model.settings.get("digest", ds.digest()) != ds.digest():
            raise UserError(f"{name} was trained on {theirs}, whose captions, classes or split "
                            f"were not those that {ds.name} has now")


def group_by_seed(models):
    """{column of the table: names of its runs}. Runs that are equal, phi included, in all but seed
    and precision make one column; a run that has no such company is a column of its own."""
    def but_seed(settings):
        return sorted((k, v) for k, v in settings.items() if k not in ("seed", "precision"))

    groups = {}
    for name, model in models.items():
        key = repr([but_seed(model.settings), but_seed(model.phi_settings)])
        groups.setdefault(key, []).append(name)

    columns = {}
    for names in groups.values():
        seeds = {repr(models[name].settings.get("seed")) for name in names}
        if len(seeds) == len(names) > 1:
            columns[f"{names[0]} ({len(names)} seeds)"] = names
        else:                       # one run, or two of the same seed, such as of changed code
            columns.update({name: [name] for name in names})
    return columns


def print_table(columns, results, references):
    """A row a measure, below it its references; a column a run, or the mean over seeds and the
    standard deviation (divided by n - 1)."""
    width = max(18, *(len(column) + 2 for column in columns))
    keys = {}
    for run in results.values():
        keys.update(run)
    print("\n" + " " * 36 + "".join(f"{column:>{width}}" for column in columns))
    for key in keys:
        row = ""
        for names in columns.values():
            values = [results[name][key] for name in names if key in results[name]]
            row += f"{mean_and_deviation(values):>{width}}"
        print(f"{key:36}" + row)
        for name, value in references.get(key, {}).items():
            print(f"    {name}: {value:.4f}")


def mean_and_deviation(values):
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}"


def print_json(models, results, references, test, truncation):
    runs = {}
    for name, model in models.items():
        settings = {key: model.settings.get(key) for key in ("variant", "recipe", "steps", "seed")}
        rounded = {key: round(value, 5) for key, value in results[name].items()}
        runs[name] = dict(settings, **rounded)
    rounded = {}
    for key, values in references.items():
        rounded[key] = {name: round(value, 5) for name, value in values.items()}
    print(json.dumps(dict(
        dataset=test.ds.name, images=len(test.index), scorers=SCORER_SEEDS, truncation=truncation,
        references=rounded, runs=runs)))


def model_grid(models, test, truncation):
    """[A] figures 3 and 4: a row a text, a column real images and one a run. A run's images have
    a noise for each row, the same in all runs."""
    ds = test.ds
    shown = data.example_images(ds, 8)
    texts = [ds.captions[i][0] for i in shown]
    columns = [to_pixels(images_at(ds, shown, "cpu"))]
    titles = ["real"]
    for name, model in models.items():
        columns.append(generate_for(model, embed(model.phi, texts), 3, truncation))
        titles.append(name.removeprefix(data.short_name(ds.name) + "-")[:14])
    return image_grid(list(zip(*columns)), texts, titles, scale=1.5)


def roc_panels(columns, models, test):
    """[A] figure 5: for each kind of style groups the ROC curves of the captions and of the first
    run of each column, over the pairs of all folds."""
    first = next(iter(models.values()))
    embeddings = {"captions": embed(first.phi, test.texts).cpu()}
    for column, names in columns.items():
        model = models[names[0]]
        if model.S is not None:
            embeddings[column] = model.styles(test.x).cpu()

    panels = []
    for kind, pairs in test.pairs.items():
        curves = {}
        for name, emb in embeddings.items():
            scores, same = zip(*pair_scores(emb, pairs))
            curves[f"{name}, {kind}"] = roc(torch.cat(scores), torch.cat(same))
        panels.append(curves)
    return panels


def save_images(folder, models, test, truncation):
    """For a judge of your own: real.npy and a file for each run, (n, 64, 64, 3) uint8."""
    images = {"real": to_pixels(test.x)}
    for name, model in models.items():
        images[name] = generate_for(model, embed(model.phi, test.texts), 0, truncation)
    for name, pixels in images.items():
        path = Path(folder) / f"{name}.npy"
        data.write_atomically(path, lambda file: np.save(file, pixels))
    print(f"wrote {len(test.index):,} images each of {', '.join(images)}, in {folder}")


def measure_runs(args):
    # 1. Load.
    models = load_models(args.measure, args.device)
    ds = load_dataset(models, args.dataset, args.source)

    # 2. Check.
    check_dataset(models, ds, moved=args.dataset is not None)
    test = make_test_set(ds, args.device)
    for kind, pairs in test.pairs.items():
        count = sum(int(same.sum()) for _, _, same in pairs)
        print(f"style groups by {kind}: {count:,} distinct pairs of one style, as many of two")
    precision = data.pick_precision(args.device)
    scorers = Scorers(test, args.device, precision)

    # 3. Measure.
    probe = None
    if ds.keypoints is not None:
        probe = direction_probe(ds, scorers.image_encoders[0], args.device)
    first = next(iter(models.values()))
    references = measure_references(test, scorers, probe, first.phi)
    results = {}
    for name, model in models.items():
        print(f"measuring {name}")
        if model.S is None:
            print(f"{name} has no style encoder yet: its results of style are left out")
        results[name] = measure_run(model, test, scorers, probe, args.truncation)

    # 4. Print, and write.
    columns = group_by_seed(models)
    classes = len(test.labels.unique())
    print(f"\n{ds.name}: {len(test.index):,} images of {classes} unseen classes, one caption each; "
          f"scorers trained with seeds {SCORER_SEEDS}; truncation {args.truncation:g}")
    print_table(columns, results, references)
    print("The Frechet distance is taken on features of our own scorers: it is not the FID of "
          "papers, compare it within this table.")
    top_1 = references["sentences matched, top-1"]["real images"]
    if scorers.say_little(top_1):
        print(f"The scorers name the class of {top_1:.0%} of the real images, by chance it would "
              f"be {scorers.chance:.0%}: on this data set 'sentences matched' and the Frechet "
              "distance say little; --save-images and --frechet are for a network of your own.")
    print_json(models, results, references, test, args.truncation)

    out = args.out or Path("runs") / f"{data.short_name(ds.name)}-measure"
    save_image(model_grid(models, test, args.truncation), out / "models.png")
    if test.pairs:
        plot(roc_panels(columns, models, test), out / "roc.png")
    print(f"images{' and ROC curves' if test.pairs else ''} in {out}")
    if args.save_images:
        save_images(args.save_images, models, test, args.truncation)


# ---- Main ------------------------------------------------------------------------------------

def truncation(text):
    """For argparse: what z is multiplied with."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 2:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 2, got {text[:40]!r}")
    return value


def parse_args():
    parser = argparse.ArgumentParser(description="Generate images from texts, or measure runs.")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to generate, a row each")
    add("--weights", metavar="RUN",
        help="a run's folder or checkpoint.pt, or a name in weights/ (default: the newest run, "
             "else cub)")
    add("--n", type=data.int_between(1, 64), help="images for a text (default: 8)")
    add("--seed", type=data.int_between(0, 2 ** 31),
        help="of the noises: the same seed gives the same file (default: 0)")
    add("--truncation", type=truncation,
        help="multiply z: below 1, images differ less and fewer go wrong (default: "
             f"{TRUNCATION}; with --measure 1)")
    add("--out", type=Path,
        help="the file to write (default: sample.png); with --measure a folder (default: "
             "runs/DATASET-measure)")
    add("--device", type=data.pick_device, default="auto", help="auto (default), cpu, cuda, cuda:1")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--interpolate", action="store_true", help="move between two texts: a row a noise")
    mode("--interpolate-style", action="store_true", help="move between noises: a row a text")
    mode("--style", nargs="+", metavar="IMAGE", help="the style of these images, a column each")
    mode("--measure", nargs="+", metavar="RUN", help="measure these runs, of one data set")
    mode("--frechet", nargs=2, metavar="FILE.npy",
         help="the Frechet distance of features, by a network of your own, of two sets of images")
    add("--dataset", help="with --measure: where the runs' data set is now, if it has moved")
    add("--from", dest="source", metavar="DIR",
        help="with --measure: folder with the archives of cub or flowers")
    add("--save-images", type=Path, metavar="DIR",
        help="with --measure: write the images as arrays, for a judge of your own")
    args = parser.parse_args()
    check_args(args)
    args.n = args.n or 8
    args.seed = args.seed or 0
    args.truncation = args.truncation or (1.0 if args.measure else TRUNCATION)
    return args


def check_args(args):
    """What argparse cannot say. Raises UserError."""
    given = args.n is not None or args.seed is not None
    if given and (args.measure or args.frechet or args.style):
        raise UserError("--n and --seed are for noises that are drawn: --style takes z from the "
                        "images, --measure and --frechet have numbers and seeds of their own")
    if args.measure:
        if args.texts or args.weights:
            raise UserError("--measure takes runs, no texts and no --weights: the texts are "
                            "captions of the unseen classes")
        return
    if args.dataset or args.source or args.save_images:
        raise UserError("--dataset, --from and --save-images go with --measure")
    if args.frechet:
        if args.texts or args.weights:
            raise UserError("--frechet takes two files, no texts and no --weights")
        return
    if not args.texts:
        raise UserError('no text: say what to generate, such as "an all black bird"')
    if args.interpolate and len(args.texts) != 2:
        raise UserError(f"--interpolate goes from one text to another: expected 2, found "
                        f"{len(args.texts)}")
    if args.style and args.truncation:
        raise UserError("--style takes z from the images: --truncation cannot be used with it")


def main():
    args = parse_args()
    if args.measure:
        return measure_runs(args)
    if args.frechet:
        return measure_files(args.frechet)

    texts = [" ".join(text.split()) for text in args.texts]
    for text in texts:
        encoder.check_text(text)
    model = Model(find_weights(args.weights), args.device)
    h = embed(model.phi, texts)                               # (texts, 1024)
    generator = torch.Generator().manual_seed(args.seed)
    titles = None
    labels = texts
    steps = torch.linspace(0, 1, args.n).tolist()
    if args.interpolate:
        z = noise(4, generator, args.truncation)
        rows = grid_between_texts(model, h[0], h[1], z, steps)
        titles = [f"{t:.2f}" for t in steps]
        labels = [f"from: {texts[0]}", f"to: {texts[1]}", "", ""]
    elif args.interpolate_style:
        z = torch.stack([noise(2, generator, args.truncation) for _ in texts])    # (texts, 2, 100)
        rows = grid_between_noises(model, h, z[:, 0], z[:, 1], steps)
    elif args.style:
        rows = grid_of_styles(model, h, args.style)
        labels = ["style of:", *texts]
    else:
        rows = grid_of_texts(model, h, noise(args.n, generator, args.truncation))

    out = args.out or Path("sample.png")
    save_image(image_grid(rows, labels, titles), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    data.run_script(main)
