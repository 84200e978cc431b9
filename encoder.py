"""The text encoder phi: from letters to 1024 numbers, so that a caption lies near its images.

"[B]" is S. Reed, Z. Akata, B. Schiele, H. Lee, Learning Deep Representations of Fine-grained Visual
Descriptions, CVPR 2016. [A] tells it in short in section 3.2; the equation numbers here are [A]'s.
phi(t) is a char-CNN-RNN over the letters of a caption t. The image side, v(x), is a small
convolutional network or 1024 features that are given. Both are trained so that the score
v(x) . phi(t) is large where t describes x. (In eq. 2 to 4 [A] writes v for an image, and for
its embedding another letter phi than for the text's; we write x and v(x).)

    python encoder.py --dataset toy                             # train, then measure
    python encoder.py --dataset cub --image-features cub.npy    # image side: given features
    python encoder.py --dataset toy --evaluate                  # measure the one that is there

To put another text encoder in phi's place, change these functions, empty SHIPPED, and remove the
old ones from runs/ (*-encoder.pt, *-scorer-*.pt):

    embed(phi, texts)   list of str -> (len(texts), 1024) float32, equal rows for equal texts. G's
                        noise z is N(0, 1), so h should be of that order too, with its variance in
                        many directions: see `whiten`. 1024 is gan_cls.TEXT_DIM.
    build(checkpoint, device)   (phi, v) from a dict of tensors and plain values. phi is an
                        nn.Module; v may be None, then --evaluate and sample.py --measure do
                        not work. --measure also calls v.features, see ImageEncoder.
    train_encoder(ds, ...)      (arguments as now) such a dict: kind="encoder", phi, v, and settings
                        with dataset, digest, image_side, and whatever build needs.
    check_text, check_captions  raise UserError for texts that it cannot read.
"""

import argparse
import copy
import hashlib
import math
import re
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from data import (
    Batches, UserError, autocast, centre_crops, image_tensor, load_checkpoint, load_network,
    random_below, random_captions, random_crops, save_checkpoint)
from gan_cls import MAP, TEXT_DIM, ImageTower, init_weights, update_ema

# ---- The alphabet ----------------------------------------------------------------------------

# The authors' string. The hyphen stands in it twice, so that one of the 70 rows is never used;
# the last letter is a space.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
MAX_LETTERS = 201    # the authors' doc_length: what comes behind is not read

# The second hyphen wins, as in the authors' Lua table. Row 0 means "no letter".
ROW = {letter: row for row, letter in enumerate(ALPHABET, 1)}


def encode_text(texts):
    """N texts -> (N, 201) uint8: the row of each letter in the alphabet, counted from 1.

    Lower-cased, cut at 201 letters, padded with 0. Letters that the alphabet lacks are 0 too, so
    that any script goes in.
    """
    tokens = np.zeros((len(texts), MAX_LETTERS), np.uint8)
    for i, text in enumerate(texts):
        letters = text[:MAX_LETTERS].lower()[:MAX_LETTERS]     # a few letters are two in lower case
        tokens[i, :len(letters)] = [ROW.get(letter, 0) for letter in letters]
    return torch.from_numpy(tokens)


# ---- phi(t): the char-CNN-RNN of [B] ---------------------------------------------------------

class CharCNNRNN(nn.Module):
    """phi: letters (N, 201) uint8 -> (N, 1024). [B] section 4, in the size of the GAN paper's code.

    Convolutions detect groups of letters, the GRU reads them in order, and the mean of its states
    stands for the caption.
    cnn_dim: width of the last convolution and of the GRU.

    Not quite the authors' GRU: theirs applies the reset gate before the product with the state,
    and starts from the first input instead of zeros.
    """

    def __init__(self, cnn_dim=512):
        super().__init__()
        self.cnn = nn.Sequential(                                           # (N, 70, 201)
            nn.Conv1d(len(ALPHABET), 384, 4), nn.ReLU(), nn.MaxPool1d(3),   # (N, 384, 66)
            nn.Conv1d(384, 512, 4), nn.ReLU(), nn.MaxPool1d(3),             # (N, 512, 21)
            nn.Conv1d(512, cnn_dim, 4), nn.ReLU())                          # (N, cnn_dim, 18)
        self.rnn = nn.GRU(cnn_dim, cnn_dim, batch_first=True)
        self.out = nn.Linear(cnn_dim, TEXT_DIM)
        for p in self.parameters():
            nn.init.uniform_(p, -0.08, 0.08)                                # the authors' code

    def forward(self, tokens):
        # To save time: a time step t of the convolutions sees letters 9t to 9t + 47, so all steps
        # behind the longest caption are alike. One of them is computed, and repeated.
        last = max(tokens.any(0).nonzero().flatten().tolist(), default=0)
        steps = min(18, last // 9 + 2)
        # One-hot without the column of "no letter": an unknown letter is all zeros.
        x = F.one_hot(tokens[:, :9 * steps + 39].long(), len(ALPHABET) + 1)[:, :, 1:]
        x = self.cnn(x.transpose(1, 2).float())                     # (N, cnn_dim, steps)
        x = F.pad(x, (0, 18 - steps), mode="replicate")             # (N, cnn_dim, 18)
        x, _ = self.rnn(x.transpose(1, 2))          # (N, 18, cnn_dim), a state for each time step
        return self.out(x.mean(1))                                          # (N, 1024)


@torch.no_grad()
def embed(phi, texts, precision="fp32", batch=128):
    """phi of N texts -> (N, 1024) float32 on phi's device. Equal ones once, short ones together."""
    device = next(phi.parameters()).device
    short_first = sorted(dict.fromkeys(texts), key=len)
    with autocast(device, precision):
        parts = encode_text(short_first).split(batch)
        h = torch.cat([phi(part.to(device)).float() for part in parts])
    rows = {text: row for row, text in enumerate(short_first)}
    return h[[rows[text] for text in texts]]


# ---- Eq. 2: the loss of the joint embedding --------------------------------------------------

def joint_embedding_loss(image_emb, text_emb):
    """[A] eq. 2, made convex. (N, 1024) each -> scalar, float32.

    Row i of both comes from one right pair (image, caption); no two rows are of one class.
    """
    # Eq. 2:  1/N sum_n  Delta(y_n, f_v(x_n)) + Delta(y_n, f_t(t_n)),  Delta the 0-1 loss
    # It counts the mistakes of the classifiers of eq. 3 and 4, and a count has no gradient. In its
    # place stands a hinge: the right partner should score by 1 more than every other one of the
    # minibatch. [B]'s script divides by N^2 where we take the mean over the N(N - 1) pairs.
    s = image_emb.float() @ text_emb.float().T                  # (N, N):  s_ij = v(x_i) . phi(t_j)
    right = s.diagonal()
    others = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    # Images choose among texts:  mean over i != j of max(0, 1 + s_ij - s_ii)
    image_loss = (1 + s - right[:, None]).clamp(min=0)[others].mean()
    # Texts choose among images:  mean over i != j of max(0, 1 + s_ij - s_jj)
    text_loss = (1 + s - right[None, :]).clamp(min=0)[others].mean()
    return image_loss + text_loss


# ---- Eq. 3 and 4: the classifiers; top-k and AP@50 -------------------------------------------

def rank_classes(emb, means):
    """Embeddings (N, 1024) and the classes' means (C, 1024) -> (N, C) classes, the best first.

    [A] eq. 3 takes images' embeddings and the mean caption of each class. Eq. 4 is the same with
    captions' embeddings and the mean image of each class. `evaluate` measures both.
    """
    # Eq. 3:  f_v(x) = argmax_y  E_{t ~ T(y)} [ v(x) . phi(t) ]  =  argmax_y  v(x) . mean phi of y
    # Eq. 4:  f_t(t) = argmax_y  E_{x ~ V(y)} [ v(x) . phi(t) ]
    return (emb @ means.T).argsort(1, descending=True)


def top_k_accuracy(k, emb, labels, classes, means):
    """How often the right class is among the k best of eq. 3 or 4: a share, 0 to 1.

    emb (N, 1024) of items whose classes are labels (N,); means (C, 1024) of `classes` (C,).
    """
    best = classes[rank_classes(emb, means)[:, :k]]             # (N, k)
    return (best == labels[:, None]).any(1).float().mean().item()


def average_precision_at_50(emb, labels, classes, means, k=50):
    """[B]'s AP@50: the mean caption of each class retrieves images; which share of the first 50 is
    of that class? The mean over classes, 0 to 1. Arguments as for `top_k_accuracy`.

    A class with fewer than 50 images cannot reach 1, as in [B].
    """
    best = (means @ emb.T).argsort(1, descending=True)[:, :k]               # (C, k) images
    return (labels[best] == classes[:, None]).float().mean().item()


# ---- The image side --------------------------------------------------------------------------

class ImageEncoder(nn.Module):
    """v: an image's embedding, to be compared with phi(t). It trains phi and measures it.

    "conv": images (N, 3, 64, 64) in [-1, 1] -> (N, 1024), a tower like D's and a linear layer,
    trained together with phi. departs from the paper: nothing has to be fetched.
    "features": given features (N, 1024) -> (N, 1024), not trained; the papers' way, with a
    GoogLeNet's. The linear layer does nothing until `whiten` changes the basis.
    """

    def __init__(self, image_side="conv", width=32):
        super().__init__()
        if image_side == "conv":
            self.tower = ImageTower(width)
            self.head = nn.Linear(8 * width * MAP * MAP, TEXT_DIM)
            init_weights(self)
        else:
            self.tower = None
            self.head = nn.Linear(TEXT_DIM, TEXT_DIM, bias=False).requires_grad_(False)
            self.head.weight.copy_(torch.eye(TEXT_DIM))

    def features(self, x):
        """Images (N, 3, 64, 64) -> the tower's map (N, 256, 4, 4)."""
        return self.tower(x)

    def forward(self, x):
        if self.tower is not None:
            x = self.features(x).flatten(1)                     # (N, 4096)
        return self.head(x)                                     # (N, 1024)


def open_features(path):
    """A .npy file, a row for each image -> an array that stays on the disk. Raises UserError."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:          # NumPy raises all sorts of things on a damaged header
        raise UserError(f"cannot read features from {path}: {error}") from None


def frozen_features(ds, path):
    """Given features of all images -> (N, 1024) float32. path: a .npy file, a row for each image of
    the source, in the source's order. Raises UserError.

    departs from the paper: centred, and scaled to a mean length of 1 over the training images, so
    that the margin of 1 in eq. 2 means the same for any features.
    """
    if not path:
        raise UserError("this text encoder's image side is features that are given: name their "
                        "file with --image-features FILE.npy")
    rows = open_features(path)
    # ds.rows: the row of each image in the file, which has rows for images that were skipped, too.
    least = int(ds.rows.max()) + 1
    if rows.dtype.kind != "f" or rows.shape[1:] != (TEXT_DIM,) or len(rows) < least:
        raise UserError(f"{path} holds {rows.dtype} {rows.shape}: expected floats, at least "
                        f"({least}, {TEXT_DIM}), a row for each image of {ds.name}")
    features = torch.from_numpy(rows[ds.rows].astype(np.float32))
    train = features[ds.training_images()]
    mean = train.mean(0)
    features = (features - mean) / (train - mean).norm(dim=1).mean()
    if not features.isfinite().all():
        raise UserError(f"{path} holds numbers that are not finite, or rows that are all the same")
    return features


# ---- Training --------------------------------------------------------------------------------

# [B]'s script: RMSprop at 7e-4 with the library's memory of 0.99, the rate times 0.98 every 150
# steps, 30,000 steps, 40 classes in a minibatch, of each image one of ten views. It declares a clip
# of the gradients at 5 and never applies it. Where a line below differs, it departs from the paper.
STEPS = 600         # minibatches; enough for the toy birds, at 0.1 to 0.3 s each on two cores
CLASSES = 40        # in a minibatch: one image of each, and one of its captions
RATE = 7e-4         # RMSprop's learning rate
ALPHA = 0.95        # RMSprop's memory of squared gradients: some 20 steps
CLIP = 5.0          # largest norm of the gradients: a GRU's are now and then very large

# Only with `anneal`, see train_encoder. phi then classifies better, but with the small network as
# image side G seemed to do worse: 47 % of the toy birds' images matched their sentence, without it
# 51 % (one seed). Perhaps phi learns the training classes too closely.
HOLD = 0.5          # share of the steps with RATE; then it falls in a straight line
LAST_RATE = 0.05    # the last rate, as a share of RATE
EMA = 0.999         # phi and v are the moving average of their weights

# Only for given features:
DROP = 0.3          # dropout of an image's given features: less is memorised, so more steps help
MIX = 0.7           # a second image of the class is blended in, with a random weight from 0 to this


def learning_rate(step, steps):
    """RMSprop's rate at step 1, 2, ... `steps`: RATE, then a straight line to RATE * LAST_RATE."""
    left = min(1, (steps - step) / (steps - HOLD * steps))      # 1, then down to 0
    return RATE * (LAST_RATE + (1 - LAST_RATE) * left)


def draw_images(batches, classes):
    """A random image of each of these classes (n,) -> (n,)."""
    place = random_below(batches.class_size[classes], classes)
    return batches.training_images[batches.class_start[classes] + place]


def draw_pairs(batches, n, features=None):
    """What the hinge for eq. 2 asks for: n right pairs (image, caption), no two of one class.

    batches: with letters (captions, 201) as caption_table. features: (N, 1024) of the given image
    side. -> n images (n, 3, 64, 64) or features (n, 1024), and the letters of n captions (n, 201).
    """
    classes = torch.randperm(len(batches.class_size), device=batches.class_size.device)[:n]
    images = draw_images(batches, classes)
    tokens = batches.caption_table[random_captions(batches.caption_starts, images)[0]]
    if features is None:
        return random_crops(batches.images, images), tokens
    second = features[draw_images(batches, classes)]
    weight = MIX * torch.rand_like(second[:, :1])               # one for each image
    return F.dropout(torch.lerp(features[images], second, weight), DROP), tokens


def train_encoder(ds, device="cpu", steps=STEPS, precision="fp32", cnn_dim=512,
                  image_features=None, seed=0, anneal=False, log=print):
    """Train phi and v on the training classes of a data set -> a checkpoint.

    image_features: a file of given features; None: the image side is the small network. anneal: let
    the rate fall and average the weights, as is always done with given features. Raises UserError.
    """
    if precision == "fp16":
        precision = "fp32"      # in fp16 the gradients would have to be scaled
    torch.manual_seed(seed)
    image_side = "features" if image_features else "conv"
    features = frozen_features(ds, image_features).to(device) if image_features else None
    texts = captions_of(ds, ds.training_images())
    letters = encode_text(captions_of(ds, range(len(ds.captions))))
    batches = Batches(ds, letters, device)

    nets = nn.ModuleList([CharCNNRNN(cnn_dim), ImageEncoder(image_side)])
    nets.to(device, memory_format=torch.channels_last)          # quicker for convolutions
    phi, v = nets
    ema = copy.deepcopy(nets).eval()
    optimiser = torch.optim.RMSprop(nets.parameters(), lr=RATE, alpha=ALPHA)
    anneal = anneal or image_side == "features"

    log(f"text encoder: {steps:,} steps; nothing is kept if they are stopped before the last")
    start = time.time()
    losses = []
    for step in range(1, steps + 1):
        if anneal:
            optimiser.param_groups[0]["lr"] = learning_rate(step, steps)
        x, tokens = draw_pairs(batches, CLASSES, features)
        with autocast(device, precision):
            image_emb = v(x)                                    # (n, 1024)
            text_emb = phi(tokens)                              # (n, 1024)
        # Outside: autocast would compute the scores in 16 bits.
        loss = joint_embedding_loss(image_emb, text_emb)

        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), CLIP)
        optimiser.step()
        # A short memory at first. Without `anneal` none: the last weights are kept.
        update_ema(ema, nets, min(EMA, step / (step + 10)) if anneal else 0.0)

        losses.append(loss.detach())
        if step % 100 == 0 or step == steps:
            mean_loss = float(sum(losses)) / len(losses)
            if not math.isfinite(mean_loss):
                raise UserError(f"the text encoder's loss is no longer finite at step {step}: try "
                                "--precision fp32, or encoder.py with another --seed")
            log(f"text encoder: step {step}/{steps}  loss {mean_loss:.3f}  "
                f"{(time.time() - start) / step * 1000:.0f} ms a step")
            losses = []

    phi, v = ema
    whiten(phi, v, texts[::1 + len(texts) // 20_000], precision)    # some 20,000 are enough
    settings = dict(dataset=ds.name, digest=ds.digest(), cnn_dim=cnn_dim, steps=steps, seed=seed,
                    image_side=image_side, precision=precision)
    return dict(kind="encoder", settings=settings, phi=phi.state_dict(), v=v.state_dict())


# ---- After training: a better basis ----------------------------------------------------------

# departs from the paper: eq. 2 depends on the scores alone, so the basis of phi(t) is free. After
# training its numbers are about 0.02, and three directions hold half of their variance. With such
# an h, beside a noise z of N(0, 1), the text had no effect on the images in the first 2,000 steps,
# and in an earlier version of G's training the colour of a bird's crown never had.

def whitening_matrix(h, floor=0.005):
    """h (n, 1024) -> M (1024, 1024), symmetric, float64. h M has about the same variance in every
    direction, and mean square 1/4. Directions whose variance is below `floor` of the largest stay
    small: there is little but noise in them."""
    # covariance of h  =  U diag(values) U^T
    values, U = torch.linalg.eigh(torch.cov(h.T))
    # M  =  U diag(1 / sqrt(values + floor * largest)) U^T
    scale = (values + floor * values[-1]).rsqrt()
    M = (U * scale) @ U.T
    # Divided by a number so that mean((h M)^2) = 1/4. Any value of that order would do.
    return M / (2 * (h @ M).square().mean().sqrt())


@torch.no_grad()
def change_basis(layer, M):
    """A linear layer's output y becomes M y. In place."""
    for p in layer.parameters():                # weight (1024, n), and bias (1024,) if there is one
        p.copy_(M @ p.double())


@torch.no_grad()
def whiten(phi, v, texts, precision="fp32"):
    """Change the basis of the joint space so that G can use phi's outputs. In place, in 3 steps."""
    # 1. phi(t) over these texts, and the M that whitens it.
    M = whitening_matrix(embed(phi, texts, precision).double())
    # 2. phi(t)  <-  M phi(t)
    change_basis(phi.out, M)
    # 3. v(x)  <-  M^-1 v(x).  M is symmetric, so no score changes:  (M^-1 v) . (M phi) = v . phi
    change_basis(v.head, torch.linalg.inv(M))


# ---- Measuring: zero-shot, on the classes that were never trained on -------------------------

def build(checkpoint, device="cpu"):
    """(phi, v) of an encoder's checkpoint, ready to use. v is None where the checkpoint holds phi
    alone. Raises UserError if it is no such checkpoint."""
    with data.checkpoint_errors("this text encoder"):
        settings = checkpoint["settings"]
        phi = load_network(lambda: CharCNNRNN(settings["cnn_dim"]), checkpoint["phi"])
        phi = phi.to(device).eval()
        v = None
        if "v" in checkpoint:
            v = load_network(lambda: ImageEncoder(settings["image_side"]), checkpoint["v"])
            v = v.to(device, memory_format=torch.channels_last).eval()
    return phi, v


@torch.no_grad()
def image_embeddings(v, x, precision="fp32", batch=256):
    """v of images (N, 3, 64, 64) or of features (N, 1024) -> (N, 1024) float32."""
    with autocast(x.device, precision):
        return torch.cat([v(part).float() for part in x.split(batch)])


# Of the unseen classes: indices of their images (n,), the labels of these (n,), the classes (C,),
# and eq. 3's mean caption of each class (C, 1024). On the CPU.
UnseenClasses = namedtuple("UnseenClasses", "images labels classes means")


def unseen_classes(ds, phi, precision="fp32"):
    """What zero-shot measures need of a data set -> UnseenClasses. Raises UserError."""
    images = torch.tensor(ds.unseen_images())
    if not len(images):
        raise UserError(f"{ds.name} has no unseen classes to measure on")
    labels = torch.tensor(ds.labels)[images]
    classes = labels.unique()
    means = [embed(phi, captions_of(ds, images[labels == c]), precision).mean(0) for c in classes]
    return UnseenClasses(images, labels, classes, torch.stack(means).cpu())


def evaluate(ds, phi, v, image_features=None, precision="fp32"):
    """Zero-shot accuracy (eq. 3 and 4) and AP@50 on the unseen classes -> dict of shares, 0 to 1.

    image_features: the file of given features, where v takes them. Eq. 4 classifies the first
    caption of each image. Raises UserError."""
    device = next(phi.parameters()).device
    images, labels, classes, means = unseen_classes(ds, phi, precision)
    if v.tower is None:
        x = frozen_features(ds, image_features)[images].to(device)
    else:
        x = centre_crops(image_tensor(ds, device), images.to(device))
    emb = image_embeddings(v, x, precision).cpu()
    mean_images = torch.stack([emb[labels == c].mean(0) for c in classes])
    h = embed(phi, [ds.captions[i][0] for i in images], precision).cpu()
    return {
        "images, top-1 (eq. 3)": top_k_accuracy(1, emb, labels, classes, means),
        "captions, top-1 (eq. 4)": top_k_accuracy(1, h, labels, classes, mean_images),
        "AP@50": average_precision_at_50(emb, labels, classes, means),
        "chance": 1 / len(classes)}


# ---- All captions of a data set, and captions that phi cannot read ---------------------------

def captions_of(ds, images):
    """The captions of these images, one list after the other."""
    texts = []
    for i in images:
        texts += ds.captions[i]
    return texts


def caption_table(ds, phi, precision="fp32", log=print):
    """phi of all captions of a data set -> (captions of all images, 1024) half, on phi's device.
    [A] Algorithm 1, line 3 and line 4, for all steps at once: phi is fixed.

    CUB's 118,000 captions take minutes. So the table is kept in the cache, under a name that
    changes with the captions, phi's weights and code, and the precision.
    """
    device = next(phi.parameters()).device
    code = Path(__file__).read_text(encoding="utf-8").split("\n# ---- Eq. 2")[0]  # to `embed`
    digest = hashlib.sha256(f"{ds.digest()} {precision} {device.type} {code}".encode())
    for weights in phi.state_dict().values():
        digest.update(weights.cpu().numpy())
    name = f"{data.short_name(ds.name)}-captions"
    path = data.CACHE / f"{name}-{digest.hexdigest()[:16]}.npy"

    try:
        return torch.from_numpy(np.load(path)).to(device)
    except (OSError, ValueError, EOFError):                     # not there yet, or damaged
        pass
    texts = captions_of(ds, range(len(ds.captions)))
    log(f"text encoder: phi of {len(texts):,} captions, once; then kept in {path}")
    table = embed(phi, texts, precision).half()
    for older in data.CACHE.glob(f"{name}-*.npy"):              # of other weights or captions
        older.unlink(missing_ok=True)
    data.write_atomically(path, lambda file: np.save(file, table.cpu().numpy()))
    return table


def check_text(text, log=print):
    """Before an image is generated from a text: does phi read what the user wrote?

    Raises UserError where it reads no word; says in a line where it reads only a part.
    """
    shown = repr(text if len(text) <= 40 else text[:40] + "...")
    letters = "".join(text[:MAX_LETTERS].lower().split())       # without spaces and line ends
    if not letters:
        raise UserError("empty text: expected a sentence, such as \"an all black bird\"")
    if not re.search("[a-z]", letters):
        raise UserError(f"the text encoder knows no letter of {shown}: expected words in a to z, "
                        "such as \"an all black bird\"")
    unknown = [letter for letter in letters if letter not in ROW]
    if unknown:
        some = " ".join(dict.fromkeys(unknown[:20]))
        log(f"of {shown} only a part is read; not in the text encoder's alphabet: {some}")
    if len(text) > MAX_LETTERS:
        log(f"of {shown} only the first {MAX_LETTERS} letters of {len(text):,} are read")


def check_captions(texts, log=print):
    """The same for the captions to train on. Raises UserError where there is nothing to learn."""
    tokens = encode_text(texts)
    read = int(((tokens > 0) & (tokens <= 26)).sum())           # a to z: the rows 1 to 26
    letters = sum(map(str.isalpha, "".join(text[:MAX_LETTERS] for text in texts)))
    long = sum(len(text) > MAX_LETTERS for text in texts)
    if not read:
        raise UserError(f"none of the {len(texts):,} training captions has a letter that the text "
                        f"encoder knows (the first: {texts[0][:40]!r}): write them in a to z")
    if (tokens == tokens[0]).all():
        raise UserError(f"all {len(texts):,} training captions are the same to the text encoder, "
                        f"which reads {MAX_LETTERS} letters: {texts[0][:40]!r}")
    if read < letters or long:
        log(f"text encoder: reads {read / letters:.1%} of the captions' letters (a to z); "
            f"{long:,} of {len(texts):,} captions are cut at {MAX_LETTERS} letters")


# ---- Which encoder a run uses ----------------------------------------------------------------

WEIGHTS = Path(__file__).resolve().parent / "weights"
# The file in weights/ whose phi is the default:
SHIPPED = {"cub": "cub.pt", "cub-box": "cub.pt", "flowers": "flowers.pt"}


def encoder_path(ds):
    """Where the text encoder of a data set is kept, for all runs on it."""
    return Path("runs") / f"{data.short_name(ds.name)}-encoder.pt"


def encoder_in(path):
    """The encoder's checkpoint in a file of weights/, each of which is a run. Raises UserError."""
    with data.checkpoint_errors(path):
        return load_checkpoint(path, "gan-cls")["encoder"]


def load_encoder(path, ds, image_side=None):
    """The checkpoint in `path`. Raises UserError where it was trained on other captions or another
    split than ds has, or with another image side than asked for (None: any)."""
    checkpoint = load_checkpoint(path, "encoder")
    with data.checkpoint_errors(path):
        settings = checkpoint["settings"]
        if settings.get("digest") != ds.digest():
            raise UserError(f"{path} was trained on {settings['dataset']}, with other captions, "
                            f"classes or split than {ds.name} has now: remove it, and try again")
        if image_side not in (None, settings["image_side"]):
            raise UserError(f"{path} was trained with image side {settings['image_side']}, not "
                            f"{image_side}: remove it, and try again")
    return checkpoint


def get_encoder(ds, device="cpu", precision="fp32", image_side=None, image_features=None, path=None,
                seed=0, anneal=False, log=print):
    """The text encoder for a data set, as a checkpoint: the one in `path`, the one that this
    project gives away, or a new one, which is kept in `path` (default: `encoder_path`).

    image_side: None takes any; "conv", or a file image_features, asks for one trained that way.
    anneal: see train_encoder. Raises UserError where `path` holds another one."""
    check_captions(captions_of(ds, ds.training_images()), log)
    path = Path(path or encoder_path(ds))
    if image_features:
        image_side = "features"
    shipped = WEIGHTS / SHIPPED.get(ds.name, "")
    if image_side is None and not path.exists() and shipped.is_file():
        log(f"text encoder: phi of {shipped}, ready trained (--image-encoder conv or "
            "--image-features FILE.npy train a new one)")
        return encoder_in(shipped)

    if path.exists():
        log(f"text encoder: {path}")
    else:
        log(f"text encoder: {path} is not there yet, training it")
        save_checkpoint(path, **train_encoder(
            ds, device, STEPS, precision, image_features=image_features, seed=seed, anneal=anneal,
            log=log))
    return load_encoder(path, ds, image_side)


def add_options(parser):
    """What encoder.py and train.py both ask for."""
    add = parser.add_argument
    data.add_options(add)
    side = parser.add_mutually_exclusive_group().add_argument
    side("--image-encoder", choices=("conv",),
         help="train a text encoder whose image side is a small network")
    side("--image-features", metavar="FILE.npy",
         help="train a text encoder whose image side is these features, a row for each image")
    add("--seed", type=data.int_between(0, 2 ** 31), default=0, help="default: 0")
    add("--device", type=data.pick_device, default="auto", help="auto (default), cpu, cuda, cuda:1")
    add("--precision", choices=("auto", *data.DTYPES), default="auto",
        help="of the convolutions and products (default: what is fast on the device)")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the text encoder, or measure it.")
    add_options(parser)
    add = parser.add_argument
    add("--steps", type=data.int_between(1, 10_000_000), default=STEPS, help=f"default: {STEPS}")
    add("--out", type=Path, help="where to keep it (default: runs/DATASET-encoder.pt)")
    add("--evaluate", action="store_true", help="measure the one that is there")
    add("--weights", metavar="NAME", help="measure the one in weights/NAME.pt")
    args = parser.parse_args(argv)

    ds = data.load(args.dataset, args.source)
    check_captions(captions_of(ds, ds.training_images()))
    precision = data.pick_precision(args.device, args.precision)
    path = args.out or encoder_path(ds)
    if args.weights:
        path = WEIGHTS / f"{args.weights}.pt"
        checkpoint = encoder_in(path)
        if checkpoint["settings"].get("digest") != ds.digest():
            print(f"{path} was trained on other captions or another split: its figures are not "
                  "zero-shot if it has seen these classes")
    elif args.evaluate:
        image_side = "features" if args.image_features else args.image_encoder
        checkpoint = load_encoder(path, ds, image_side)
    elif path.exists():
        raise UserError(f"{path} is there already: add --evaluate to measure it; to train a new "
                        "one, remove it or name another --out")
    else:
        checkpoint = train_encoder(ds, args.device, args.steps, precision, seed=args.seed,
                                   image_features=args.image_features)
        save_checkpoint(path, **checkpoint)
        print(f"wrote {path}")
        if not len(ds.unseen_images()):
            return print("there are no unseen classes to measure it on")

    phi, v = build(checkpoint, args.device)
    if v is None:
        raise UserError(f"{path} holds phi without the image side: it cannot be measured")
    for name, value in evaluate(ds, phi, v, args.image_features, precision).items():
        print(f"  {name:24} {value:6.1%}")


if __name__ == "__main__":
    data.run_script(main)
