"""[A] section 5: look at a trained run, and measure it.

    python sample.py "an all black bird" "a red bird with a white belly"  # a row a text
    python sample.py @queries.txt                                         # texts, one a line
    python sample.py --interpolate "a bright red bird" "an all blue bird" # phi moves, z stays
    python sample.py --interpolate-style "an all black bird"              # z moves, phi stays
    python sample.py "an all black bird" --style query.jpg other.jpg      # z = S(query)
    python sample.py --measure runs/toy-gan runs/toy-gan-cls              # results, side by side

The first half of this file makes grids of images: [A] figures 6 and 8. The second half measures
runs, side by side, on the images of unseen classes ([A] figures 3 and 4): style verification ([A]
section 5.2, figure 5), sentences matched, and others. A run is a folder in runs/, a checkpoint.pt,
or a name in weights/.
"""

import argparse
import json
import os
import re
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

TRUNCATION = 0.8             # what z is multiplied with, to draw; --measure takes z as in training
BATCH = 256                  # images that go through a network at once
SCORER_SEEDS = (1, 2, 3)     # the measures by `get_scorers` are means over three trained networks
SETTINGS = ("dataset", "variant", "recipe", "steps", "batch_size", "ngf", "seed")    # shown of runs
LEGEND = """
Sentences matched: the share of images for which a scorer ranks their sentence's class first. The
sentences themselves: for which it ranks the class first by the text alone; a text leaves much open.
Pixel diversity: how much the images of one sentence differ; 1 is as real images of one class do.
Frechet distance: from the real images, 0 where they are the same. It is taken on features of the
scorers, so it is not the FID of papers: compare it only within this table.
Style transfer: the share of images that keep what S read from another image.
Style verification: the area under the ROC curve; 1 is perfect, 0.5 is chance.
Of runs that differ in their seed: the mean +- the standard deviation.
"""


# ---- A trained run ---------------------------------------------------------------------------

class Model:
    """What sampling needs of a run.

    G: the generator with the average of its weights (EMA). S: the style encoder, or None where
    the run has not trained it yet. phi: the text encoder. settings: those of the training.
    Raises UserError where the file does not hold a run.
    """

    def __init__(self, path, device="cpu"):
        checkpoint = data.load_checkpoint(path, "gan-cls")
        self.path = path
        self.device = device
        with data.checkpoint_errors(path):
            self.settings = dict(checkpoint["settings"])
            self.dataset = self.settings["dataset"]
            G = data.load_network(lambda: Generator(self.settings["ngf"]), checkpoint["average"])
            self.G = G.to(device).eval()
            self.S = None
            if checkpoint["S"]:
                self.S = data.load_network(StyleEncoder, checkpoint["S"]).to(device).eval()
            self.phi, _ = encoder.build(checkpoint["encoder"], device)

    def generate(self, z, h):
        """z (N, 100), h (N, 1024), or (1024,) for all z -> images (N, 3, 64, 64) in [-1, 1], with
        the 256 levels that an image file has, as the real images have."""
        x = in_parts(self.G, z.to(self.device), h.expand(len(z), -1))
        return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    def styles(self, x):
        """S of images x (N, 3, 64, 64) in [-1, 1] -> s (N, 100), in the place of a z."""
        if self.S is None:
            raise UserError(f"{self.path} has no style encoder yet. Finish its training with:  "
                            f"python train.py --resume --out {shlex.quote(str(self.path.parent))}")
        return in_parts(self.S, x.to(self.device))


@torch.no_grad()
def in_parts(network, *inputs):
    """network(*inputs), BATCH rows at once."""
    parts = zip(*[rows.split(BATCH) for rows in inputs])
    return torch.cat([network(*part) for part in parts])


def find_weights(name=None):
    """The file that holds a run.

    name: the file itself, a run's folder, or a name in weights/, which is found from any working
    folder. None is the newest run in runs/, or weights/cub.pt where there is none.
    """
    if name is None:
        runs = Path("runs").glob("*/checkpoint.pt")
        candidates = [max(runs, key=os.path.getmtime, default=encoder.WEIGHTS / "cub.pt")]
    else:
        candidates = [Path(name), Path(name) / "checkpoint.pt", encoder.WEIGHTS / f"{name}.pt"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.stem for path in encoder.WEIGHTS.glob("*.pt"))
    raise UserError(f"found no run {name or 'in runs/'}: python train.py trains one. A run is a "
                    f"folder with checkpoint.pt, a file, or in weights/ ({', '.join(known)})")


# ---- Grids of images: [A] figures 6 and 8 ----------------------------------------------------

def noise(n, seed, truncation=1.0):
    """z (n, 100) from N(0, 1), times `truncation`. z[i] depends on the seed and on i, not on n.

    departs from the paper: below 1, z lies nearer to its mean than in training. The images of a
    text differ less and, by eye, fewer of them go wrong. This is the truncation trick of BigGAN
    (Brock et al., ICLR 2019), which draws large values again where we scale all.
    """
    # torch.randn makes sixteen numbers at once, and the last ones in another way: hence a row more.
    z = torch.randn(n + 1, Z_DIM, generator=torch.Generator().manual_seed(seed))
    return truncation * z[:n]


def grid_of_texts(model, h, z):
    """A row a text, a column a noise: h (T, 1024), z (n, 100) -> T rows of n images."""
    return [model.generate(z, text) for text in h]


def grid_between_texts(model, h_from, h_to, z, steps):
    """[A] figure 8 left: a row keeps its noise, the text moves. h_from, h_to (1024,),
    z (rows, 100); steps: numbers from 0 (h_from) to 1 (h_to)."""
    h = torch.stack([interpolate(h_from, h_to, 1 - t) for t in steps])    # (n, 1024)
    return [model.generate(one.expand(len(h), -1), h) for one in z]


def grid_between_noises(model, h, z_from, z_to, steps):
    """[A] figure 8 right: a row keeps its text, the noise moves. h (rows, 1024), z (rows, 100)."""
    z = torch.stack([interpolate(z_from, z_to, 1 - t) for t in steps], 1)   # (rows, n, 100)
    return [model.generate(*row) for row in zip(z, h)]


def grid_of_styles(model, h, paths):
    """[A] section 4.4, figure 6: the style of an image, the content of a text. h (T, 1024), paths
    of n images -> the n images as S sees them, then T rows of n images."""
    images = []
    for path in paths:
        try:
            images.append(data.read_image(Path(path).read_bytes())[0])     # (76, 76, 3)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image {path}: {error}") from None
    x = centre_crops(torch.tensor(np.stack(images)), torch.arange(len(images)))  # (n, 3, 64, 64)
    s = model.styles(x)                                                         # s <- S(x)
    return [x, *grid_of_texts(model, h, s)]                   # x_hat <- G(s, phi(t))


def draw(args):
    """Makes the grid that the command line asks for, and writes it."""
    texts = [" ".join(text.split()) for text in args.texts]
    for text in texts:
        encoder.check_text(text)
    if len(texts) > 1 and " " not in "".join(texts):
        print(f'a row for each word; quotes make one text of them: "{" ".join(texts)}"')
    model = Model(find_weights(args.weights), args.device)
    h = embed(model.phi, texts)                               # (texts, 1024)
    steps = torch.linspace(0, 1, args.n).tolist()
    titles = None
    labels = texts
    if args.interpolate:
        rows = grid_between_texts(model, *h, noise(4, args.seed, args.truncation), steps)
        titles = [f"{t:.2f}" for t in steps]
        labels = [f"from: {texts[0]}", f"to: {texts[1]}", "", ""]
    elif args.interpolate_style:
        z = noise(2 * len(texts), args.seed, args.truncation)      # two for each text
        rows = grid_between_noises(model, h, z[::2], z[1::2], steps)
    elif args.style:
        rows = grid_of_styles(model, h, args.style)
        labels = ["style of:", *texts]
    else:
        rows = grid_of_texts(model, h, noise(args.n, args.seed, args.truncation))
    out = args.out or "sample.png"
    save_image(image_grid([to_pixels(row) for row in rows], labels, titles), out)
    print(f"wrote {out}, drawn with {model.path}, which was trained on {model.dataset}")


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
        x, y, w, h = ds.boxes[i]
        if np.isfinite(x + y + w + h):
            outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
            outside[int(y):int(y + h) + 1, int(x):int(x + w) + 1] = False
            colours[n] = torch.from_numpy(ds.images[i][outside].mean(0))
    return colours


def poses(ds, index):
    """The six keypoints relative to the box, its corner 0 and its sides 1: (n, 12), or NaN."""
    boxes = ds.boxes[index][:, None]                          # (n, 1, 4)
    pose = (ds.keypoints[index] - boxes[..., :2]) / boxes[..., 2:]      # (n, 6, 2)
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
    Returns a list of (i, j, same), one a fold that has such pairs; no pair is in it twice.
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
            keep = np.concatenate([
                rng.permutation(np.flatnonzero(kind))[:count] for kind in (same, ~same)])
            out.append([torch.from_numpy(values[keep]) for values in (i, j, same)])
    return out


def roc(scores, same):
    """The ROC curve: scores (N,), same (N,) bool -> false and true positive rates, (N + 1,) each,
    the strictest threshold first."""
    hits = same[scores.argsort(descending=True)].double()
    return [F.pad(found.cumsum(0) / found.sum(), (1, 0)) for found in (1 - hits, hits)]


def auc(scores, same):
    """Area under the ROC curve, 0 to 1: how often a "same" pair scores above a "different" one,
    ties counting half. 0.5 is chance."""
    difference = scores[same][:, None] - scores[~same]        # each of one kind, each of the other
    wins = (difference > 0).double() + (difference == 0).double() / 2
    return wins.mean().item()


def verify_style(emb, pairs):
    """Style verification, [A] section 5.2: the AUC, mean over the folds, when the score of a
    pair is the cosine of its two rows of emb (N, d). 0 to 1; 0.5 is chance, 1 is perfect."""
    return np.mean([auc(F.cosine_similarity(emb[i], emb[j]), same) for i, j, same in pairs])


# ---- What is measured, and by what -----------------------------------------------------------

# The images of the unseen classes: x (n, 3, 64, 64) in [-1, 1] their centre crops, labels (n,),
# texts, one caption of each. scorers: see `get_scorers`. Where there are boxes and keypoints, pairs
# for style verification: {"background": folds, "pose": folds}, and for style transfer query
# (q, 3, 64, 64), the images whose direction is known, direction (q,), other (q,), places of other
# images whose texts are taken, and probe, which reads a direction.
TestSet = namedtuple("TestSet", "ds x labels texts scorers pairs query direction other probe",
                     defaults=({}, *[None] * 4))


def images_at(ds, index, device):
    """The centre crops of these images, (n, 3, 64, 64) in [-1, 1]."""
    return centre_crops(data.image_tensor(ds, device), torch.tensor(index, device=device))


def make_test_set(ds, device):
    """Raises UserError where a data set has too little to measure on."""
    index = ds.unseen_images()
    if len(index) < 4:
        raise UserError(f"{ds.name}: too few images of unseen classes to measure on")
    labels = torch.tensor(ds.labels[index])
    rng = np.random.default_rng(0)
    texts = [ds.captions[i][rng.integers(len(ds.captions[i]))] for i in index]
    scorers = get_scorers(ds, device)
    test = TestSet(ds, images_at(ds, index, device), labels, texts, scorers)
    if ds.boxes is None:
        return test
    pairs = {kind: style_pairs(group) for kind, group in style_groups(ds, index).items()}
    if not all(pairs.values()):                 # too few images for two of one style
        return test
    direction = facing(ds, index)
    known = direction.isfinite().nonzero()[:, 0]
    return test._replace(
        pairs=pairs, query=test.x[known], direction=direction[known],
        other=known.roll(len(known) // 2), probe=direction_probe(ds, scorers[0][1], device))


def generate_for(model, h, seed, truncation):
    """An image for each row of h (N, 1024), all with their own noise: (N, 3, 64, 64)."""
    z = torch.randn(len(h), Z_DIM, generator=torch.Generator().manual_seed(seed))
    return model.generate(truncation * z, h)


def feature_map(v, x):
    """The last map of an image encoder: x (N, 3, 64, 64) -> (N, 256, 4, 4), on the CPU."""
    return in_parts(v.features, x).float().cpu()


def get_scorers(ds, device):
    """Three text encoders with their image sides, which say how well images fit sentences.

    Each is trained on the training classes, with a seed of its own, and kept in runs/. No G was
    trained with one. What one says depends much on its seed: a measure is their mean. Returns a
    list of (phi, image encoder, encoder.UnseenClasses).
    """
    precision = data.pick_precision(device)
    scorers = []
    for seed in SCORER_SEEDS:
        path = Path("runs") / f"{data.short_name(ds.name)}-scorer-{seed}.pt"
        checkpoint = encoder.get_encoder(
            ds, device, precision, image_side="conv", path=path, seed=seed, anneal=True)
        phi, v = encoder.build(checkpoint, device)
        scorers.append((phi, v, encoder.unseen_classes(ds, phi, precision)))
    return scorers


# ---- The measures, each a function -----------------------------------------------------------

def sentences_matched(scorers, x, texts=None):
    """0 to 1: x (n, 3, 64, 64), an image generated from a caption of each unseen image, or these
    images themselves.

    An image matches where the class of its sentence is the first by eq. 3: [B]'s zero-shot
    classification, of generated images. It tells whether an image fits its class, not each word.
    With texts, captions of the real images x: whether they themselves fit their class, by eq. 4."""
    shares = []
    for phi, v, (_, labels, classes, means) in scorers:
        emb = encoder.image_embeddings(v, x).cpu()
        if texts:
            means = torch.stack([emb[labels == c].mean(0) for c in classes])
            emb = embed(phi, texts).cpu()
        shares.append(encoder.top_k_accuracy(1, emb, labels, classes, means))
    return np.mean(shares)


def mean_frechet_distance(scorers, x, y):
    """Of images x (N, 3, 64, 64) and y (M, 3, 64, 64): the mean of the distances of each scorer's
    features. Not the FID of papers, which takes the features of an Inception network."""
    distances = []
    for _, v, _ in scorers:
        features = [feature_map(v, images).mean((2, 3)).double() for images in (x, y)]
        distances.append(frechet_distance(*features))
    return np.mean(distances)


def frechet_distance(a, b):
    """Frechet distance of the two Gaussians fitted to features a (N, d) and b (M, d), float64.

        |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2))

    The formula of the FID (Heusel et al., NeurIPS 2017). Fewer images give a larger value.
    """
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)
    # The trace of (C_a C_b)^(1/2) is that of the symmetric (R C_b R)^(1/2), R = C_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    squares = (a.mean(0) - b.mean(0)).square().sum()
    return (squares + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def pixel_deviation(groups):
    """The standard deviation of a pixel within a group of images, mean over pixels and groups.
    groups: a list of (m, 3, 64, 64); those of one image do not count. 0: equal images."""
    return torch.stack([x.std(0).mean() for x in groups]).nanmean()


def background_kept(x, y):
    """Style transfer ([A] section 4.4), 0 to 1: how often is the background of y that of x?

    x, y (n, 3, 64, 64): query images, and what the style of each gave with another's text. The
    mean colours of the top six rows, where there is hardly ever a bird, are put into 8 groups; a
    background is kept where both are of one group. Chance is about 1 in 8.
    """
    above = torch.cat([x, y])[:, :, :6].mean((2, 3)).cpu()
    group_x, group_y = kmeans(above, 8).chunk(2)
    return (group_x == group_y).float().mean().item()


def facing(ds, index):
    """+1 where the beak is to the right of the tail, -1 to the left, NaN where not known: (n,)."""
    x = ds.keypoints[index, :, 0]                             # data.KEYPOINTS: from beak to tail
    return torch.from_numpy(np.sign(x[:, 0] - x[:, -1]))


def direction_probe(ds, v, device):
    """A linear map from v's features to the direction, fitted by least squares to every second
    training image whose beak and tail are known: (1024, 1)."""
    index = ds.training_images()
    direction = facing(ds, index)
    known = direction.isfinite()
    x = images_at(ds, index[known.numpy()][::2], device)
    features = feature_map(v, x).mean(2).flatten(1)           # left and right stay apart
    return torch.linalg.lstsq(features, direction[known][::2, None], driver="gelsd").solution


def direction_kept(test, y):
    """Style transfer, 0 to 1: how often does the bird in y (q, 3, 64, 64) look to the side that
    its query image looks to? By the linear probe. Chance is 1 in 2."""
    features = feature_map(test.scorers[0][1], y).mean(2).flatten(1)
    found = (features @ test.probe).sign()[:, 0]
    return (found == test.direction).float().mean().item()


# ---- Measuring a run, and real images to compare it with -------------------------------------

def measure_run(model, test, h, fake, truncation):
    """The results of a run on the unseen classes -> {name: number}. Those of style are left out
    where the data set has no keypoints. h (n, 1024): phi of the test set's texts; fake
    (n, 3, 64, 64): an image for each."""
    results = {"sentences matched": sentences_matched(test.scorers, fake)}

    # 16 images of one text of each class, beside the real images of the class. The same of blends:
    # where D never sees them, G can fool it with one image for many blends, whatever z.
    classes, first = np.unique(test.labels, return_index=True)
    real = pixel_deviation([test.x[test.labels == c] for c in classes])
    blends = interpolate(h[first], h[first].roll(1, 0), 0.5)    # eq. 5, of two classes each
    for name, texts in (("pixel diversity", h[first]), ("pixel diversity, blends", blends)):
        generated = generate_for(model, texts.repeat_interleave(16, 0), 1, truncation)
        results[name] = (pixel_deviation(generated.split(16)) / real).item()

    results["Frechet distance"] = mean_frechet_distance(test.scorers, fake, test.x)
    if test.pairs:
        s = model.styles(test.query)                          # s <- S(x)
        y = model.generate(s, h[test.other])                  # x_hat <- G(s, phi(t))
        results["style transfer, background kept"] = background_kept(test.query, y)
        results["style transfer, direction kept"] = direction_kept(test, y)
    return results


def measure_references(test, captions):
    """What others reach -> {measure: {name of the reference: number}}. captions (n, 1024): phi of
    the test set's texts, from which no style can be read."""
    matched = {"real images": sentences_matched(test.scorers, test.x),
               "the sentences themselves": sentences_matched(test.scorers, test.x, test.texts),
               "chance": 1 / len(test.labels.unique())}
    references = {"sentences matched": matched, "pixel diversity": {},
                  "pixel diversity, blends": {}, "Frechet distance": {}}
    if test.pairs:
        references["style transfer, background kept"] = {
            "real images, each with another": background_kept(test.query, test.x[test.other])}
        references["style transfer, direction kept"] = {
            "real images": direction_kept(test, test.query)}
    for kind, pairs in test.pairs.items():
        references[f"style verification, {kind}"] = {"captions": verify_style(captions, pairs)}
    return references


# ---- Several runs side by side ---------------------------------------------------------------

def load_models(runs, device):
    """Runs as find_weights takes them -> {name: Model}, by the run's folder or the file's stem."""
    models = {}
    for run in runs:
        path = find_weights(run)
        name = path.resolve().parent.name if path.name == "checkpoint.pt" else path.stem
        if name in (*models, "real", "captions"):
            raise UserError(f"{path}: the name {name} is taken, copy or rename it")
        models[name] = Model(path, device)
    return models


def print_table(columns, runs, references):
    """A row a measure, below it its references; a column a run, or the mean over seeds and the
    standard deviation (divided by n - 1)."""
    print(" " * 36 + "".join(f"{column:>24}" for column in columns))
    for measure, others in references.items():
        row = f"{measure:36}"
        for names in columns.values():
            values = [runs[name][measure] for name in names]
            cell = f"{np.mean(values):.4f}"
            if len(values) > 1:
                cell += f" +- {np.std(values, ddof=1):.4f}"
            row += f"{cell:>24}"
        print(row)
        for name, value in others.items():
            print(f"    {name}: {value:.4f}")
    print(LEGEND)


def model_grid(models, test, truncation):
    """[A] figures 3 and 4: a row a text, a column real images and one a run. A run's images have
    a noise for each row, the same in all runs."""
    ds = test.ds
    shown = data.example_images(ds, 8)
    texts = [ds.captions[i][0] for i in shown]
    columns = [images_at(ds, shown, "cpu")]
    for model in models.values():
        columns.append(generate_for(model, embed(model.phi, texts), 3, truncation))
    rows = zip(*[to_pixels(x).repeat(2, 1).repeat(2, 2) for x in columns])      # twice as large
    return image_grid(list(rows), texts, ["real", *models])


def roc_panels(embeddings, pairs):
    """[A] figure 5: for each kind of pairs the ROC curves of embeddings, {name: (n, d)}, over the
    pairs of all folds."""
    panels = []
    for kind, folds in pairs.items():
        i, j, same = [torch.cat(parts) for parts in zip(*folds)]
        panels.append({
            f"{name}, {kind}": roc(F.cosine_similarity(emb[i], emb[j]), same)
            for name, emb in embeddings.items()})
    return panels


def measure_runs(args):
    # 1. Load, and check.
    models = load_models(args.measure, args.device)
    first, *_ = models.values()
    ds = data.load(args.dataset or first.dataset, args.source)
    for name, model in models.items():
        if model.settings.get("digest", model.dataset) not in (ds.digest(), ds.name):
            raise UserError(f"{name} was trained on {model.dataset}, not on what {ds.name} is now")
    test = make_test_set(ds, args.device)

    # 2. Measure.
    embeddings = {"captions": embed(first.phi, test.texts).cpu()}
    references = measure_references(test, embeddings["captions"])
    images = {"real": test.x}
    runs = {}
    columns = {}
    for name, model in models.items():
        runs[name] = {key: model.settings.get(key) for key in SETTINGS}
        print(f"measuring {name}:", ", ".join(f"{key} {runs[name][key]}" for key in SETTINGS))
        h = embed(model.phi, test.texts)                                    # (n, 1024)
        images[name] = generate_for(model, h, 0, args.truncation)           # (n, 3, 64, 64)
        runs[name] |= measure_run(model, test, h, images[name], args.truncation)
        # train.py adds the seed to a run's name: NAME, NAME-1, NAME-2. They share a column.
        column = name.removesuffix(f"-{runs[name]['seed']}")
        columns.setdefault(column, []).append(name)
        if test.pairs:
            s = model.styles(test.x).cpu()
            embeddings.setdefault(column, s)
        for kind, pairs in test.pairs.items():
            runs[name][f"style verification, {kind}"] = verify_style(s, pairs)

    # 3. Print, and write.
    print(f"\n{ds.name}: {len(test.x):,} images of unseen classes, one caption each; z times "
          f"{args.truncation:g}; scorers trained with seeds {SCORER_SEEDS}\n")
    print_table(columns, runs, references)
    print(json.dumps(dict(
        dataset=ds.name, truncation=args.truncation, references=references, runs=runs)))

    out = args.out or Path("runs") / f"{data.short_name(ds.name)}-measure"
    save_image(model_grid(models, test, args.truncation), out / "models.png")
    if test.pairs:
        plot(roc_panels(embeddings, test.pairs), out / "roc.png")
    print(f"images{' and ROC curves' if test.pairs else ''} in {out}")
    if args.save_images:
        for name, x in images.items():
            path = args.save_images / f"{name}.npy"
            data.write_atomically(path, lambda file: np.save(file, to_pixels(x)))
        print(f"{len(test.x):,} images each of {', '.join(images)} in {args.save_images}")


# ---- Main ------------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Generate images from texts, or measure runs.", fromfile_prefix_chars="@")
    # No texts: empty lines, and Windows' U+FEFF. `encode` raises where a file is not UTF-8.
    parser.convert_arg_line_to_args = lambda line: re.findall(
        r"[^\s\ufeff].*", line.encode().decode())
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="a row each; @FILE stands for the lines of a file")
    add("--weights", metavar="RUN",
        help="a run's folder or file, or a name in weights/ (default: the newest run, else cub)")
    add("--n", type=data.int_between(1, 64), default=8, help="images for a text (default: 8)")
    add("--seed", type=data.int_between(0, 2 ** 31), default=0, help="of the noises (default: 0)")
    add("--truncation", type=float,
        help=f"multiplies z: less variety, fewer go wrong (default: {TRUNCATION}, --measure: 1)")
    add("--out", type=Path, help="what to write (default: sample.png); with --measure a folder")
    add("--device", type=data.pick_device, default="auto", help="auto (default), cpu, cuda, cuda:1")
    way = parser.add_mutually_exclusive_group().add_argument
    way("--interpolate", action="store_true", help="move between two texts: a row a noise")
    way("--interpolate-style", action="store_true", help="move between noises: a row a text")
    way("--style", nargs="+", metavar="IMAGE", help="the style of these images, a column each")
    way("--measure", nargs="+", metavar="RUN", help="measure these runs, of one data set")
    add("--dataset", help="with --measure: where the runs' data set is now, if it has moved")
    add("--from", dest="source", metavar="DIR", help="with --measure: folder with its archives")
    add("--save-images", type=Path, metavar="DIR", help="with --measure: write images as arrays")
    try:
        args = parser.parse_args(argv)
    except UnicodeError:
        parser.error("@FILE: expected a text file in UTF-8, a sentence a line")
    if args.truncation is None:
        args.truncation = 1.0 if args.measure else TRUNCATION
    if not args.texts and not args.measure:
        parser.error('no text: say what to generate, such as "an all black bird"')
    if args.interpolate and len(args.texts) != 2:
        parser.error(f"--interpolate: expected 2 texts, found {len(args.texts)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    run = measure_runs if args.measure else draw
    run(args)


if __name__ == "__main__":
    data.run_script(main)
