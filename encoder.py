"""The text encoder phi: from letters to 1024 numbers, so that a sentence lies near its pictures.

S. Reed, Z. Akata, B. Schiele, H. Lee, Learning Deep Representations of Fine-grained Visual Descriptions,
CVPR 2016: "[B]" below, in short in [A] section 3.2, whose equation numbers stand here. phi(t) is a
char-CNN-RNN over a caption's letters; the image side, "v" below, is a small convolutional network or 1024
frozen features. Both are trained so that v(x) . phi(t) is large where t describes x.

    python encoder.py --dataset toy                             # train, then measure
    python encoder.py --dataset cub --image-features cub.npy    # image side: given features
    python encoder.py --dataset toy --evaluate                  # measure the one that is there
"""

import argparse, contextlib, json, time, warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from data import CROP, IMAGE_SIZE, UserError, write_atomically
from gan_cls import TEXT_DIM, StyleEncoder, pick_autocast, pick_device

# ---- Letters ---------------------------------------------------------------------------------
# The authors' string. The hyphen stands in it twice, so that one of its 70 rows is never used; the last is a space.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
MAX_LETTERS = 201    # the authors' doc_length
ROW = {letter: row for row, letter in enumerate(ALPHABET, 1)}    # the second hyphen wins, as in their Lua table

def encode_text(texts):
    """list of N str -> (N, 201) uint8, a letter's row in the alphabet, counted from 1: lower-cased, cut at 201 letters, padded with 0.
    Letters that the alphabet lacks are 0 too, so any script goes in."""
    out = np.zeros((len(texts), MAX_LETTERS), np.uint8)
    for i, text in enumerate(texts):
        rows = [ROW.get(letter, 0) for letter in text[:MAX_LETTERS].lower()[:MAX_LETTERS]]
        out[i, :len(rows)] = rows
    return torch.from_numpy(out)

# ---- phi(t): the char-CNN-RNN of [B] ---------------------------------------------------------
class CharCNNRNN(nn.Module):
    """phi: (N, 201) letters -> (N, 1024). [B] section 4, as the GAN paper's code has it: 512 wide (`cnn_dim`), two poolings, so 18 time steps.
    Convolutions see words, the recurrent network their order, the mean over time the whole sentence."""
    def __init__(self, cnn_dim=512, out_dim=TEXT_DIM):
        super().__init__()
        self.cnn = nn.Sequential(                                               # (N,      70, 201)
            nn.Conv1d(len(ALPHABET), 384, 4), nn.ReLU(), nn.MaxPool1d(3),       # (N,     384,  66): 201 -> 198 -> 66
            nn.Conv1d(384, 512, 4), nn.ReLU(), nn.MaxPool1d(3),                 # (N,     512,  21):  66 ->  63 -> 21
            nn.Conv1d(512, cnn_dim, 4), nn.ReLU())                              # (N, cnn_dim,  18):  21 ->  18
        self.rnn = nn.GRU(cnn_dim, cnn_dim, batch_first=True)
        self.out = nn.Linear(cnn_dim, out_dim)
        for p in self.parameters():
            nn.init.uniform_(p, -0.08, 0.08)        # the authors' code

    def forward(self, tokens):
        # One-hot without the column of "no letter": an unknown letter is all zeros.
        x = F.one_hot(tokens.long(), len(ALPHABET) + 1)[:, :, 1:].transpose(1, 2).float()   # (N, 70, 201)
        x = self.cnn(x).transpose(1, 2)                                         # (N, 18, cnn_dim)
        x, _ = self.rnn(x)                                                      # (N, 18, cnn_dim), a state a time step
        return self.out(x.mean(1))                                              # (N, 1024)

@torch.no_grad()
def embed(phi, texts, batch=512):
    """phi of a list of texts -> (len(texts), 1024) float32 on phi's device. Equal texts are worked out once."""
    unique = list(dict.fromkeys(texts))
    device = next(phi.parameters()).device
    with pick_autocast(device)[0]:
        out = torch.cat([phi(encode_text(unique[i:i + batch]).to(device)).float() for i in range(0, len(unique), batch)])
    place = {t: i for i, t in enumerate(unique)}
    return out[torch.tensor([place[t] for t in texts], device=device)]

# ---- Eq. 2, 3, 4: the joint embedding --------------------------------------------------------
def joint_embedding_loss(image_emb, text_emb):
    """[A] eq. 2, made convex. (N, 1024) each, row i of both from one pair, every row of another class -> scalar, float32. Eq. 2 counts the
    mistakes of the two classifiers of eq. 3 and 4, which has no gradient. In its place stands a hinge: the right partner should score by
    1 more than every other one of the minibatch."""
    s = image_emb.float() @ text_emb.float().T                  # (N, N):  s_ij = v_i . phi(t_j)
    right = s.diagonal()
    others = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    # images choose among texts:  mean over i != j of max(0, 1 + s_ij - s_ii)
    image_loss = (1 + s - right[:, None]).clamp(min=0)[others].mean()
    # texts choose among images:  mean over i != j of max(0, 1 + s_ij - s_jj)
    text_loss = (1 + s - right[None, :]).clamp(min=0)[others].mean()
    return image_loss + text_loss

def classify(emb, means):
    """[A] eq. 3, with pictures' embeddings and classes' mean captions; eq. 4 with the two exchanged. (N, 1024), (C, 1024) -> (N, C), best first."""
    # Eq. 3:  f_v(v) = argmax_y  E_{t ~ T(y)} [ v . phi(t) ]   =  argmax_y  v . (mean phi of class y)
    # Eq. 4:  f_t(t) = argmax_y  E_{v ~ V(y)} [ v . phi(t) ]
    return (emb @ means.T).argsort(1, descending=True)

def average_precision_at_50(image_emb, labels, text_means, classes, k=50):
    """[B]'s AP@50: each class's mean caption retrieves pictures; the share of its first k that are of the class, mean over classes. A
    class with fewer than k pictures cannot reach 1, as in [B]."""
    best = (text_means @ image_emb.T).argsort(1, descending=True)[:, :k]        # (C, k)
    return (labels[best] == classes[:, None]).float().mean().item()

# ---- The image side --------------------------------------------------------------------------
def image_encoder(image_side):
    """v. "conv": (N, 3, 64, 64) in [-1, 1] -> (N, 1024), a tower like D's and S's, trained along with phi. departs from the paper: nothing to
    fetch. Else frozen features (N, 1024) -> (N, 1024): as they are, but for the change of basis by `whiten`."""
    if image_side == "conv":
        return StyleEncoder(z_dim=TEXT_DIM)
    v = nn.Linear(TEXT_DIM, TEXT_DIM, bias=False).requires_grad_(False)
    v.weight.copy_(torch.eye(TEXT_DIM))
    return v

GOOGLENET = "https://download.pytorch.org/models/googlenet-1378be20.pth"

def conv_bn(c_in, c_out, kernel, **kw):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(c_in, c_out, kernel, bias=False, **kw), bn=nn.BatchNorm2d(c_out, eps=0.001), relu=nn.ReLU()))

class Inception(nn.Module):
    def __init__(self, c, c1, c3_in, c3, c5_in, c5, c_pool):
        super().__init__()
        self.branch1 = conv_bn(c, c1, 1)
        self.branch2 = nn.Sequential(conv_bn(c, c3_in, 1), conv_bn(c3_in, c3, 3, padding=1))
        # 5x5 in the paper; torchvision's weights have a 3x3 there, an old slip that all who use them share.
        self.branch3 = nn.Sequential(conv_bn(c, c5_in, 1), conv_bn(c5_in, c5, 3, padding=1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv_bn(c, c_pool, 1))

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.children()], 1)

def googlenet():
    """The papers' frozen image side: (N, 3, 224, 224) in [-1, 1] -> (N, 1024), the last average pooling. C. Szegedy et al., CVPR 2015,
    with the layer names of torchvision, whose weights fit."""
    pool = lambda k: nn.MaxPool2d(k, 2, ceil_mode=True)
    return nn.Sequential(OrderedDict(
        conv1=conv_bn(3, 64, 7, stride=2, padding=3), maxpool1=pool(3), conv2=conv_bn(64, 64, 1), conv3=conv_bn(64, 192, 3, padding=1),
        maxpool2=pool(3), inception3a=Inception(192, 64, 96, 128, 16, 32, 32), inception3b=Inception(256, 128, 128, 192, 32, 96, 64),
        maxpool3=pool(3), inception4a=Inception(480, 192, 96, 208, 16, 48, 64), inception4b=Inception(512, 160, 112, 224, 24, 64, 64),
        inception4c=Inception(512, 128, 128, 256, 24, 64, 64), inception4d=Inception(512, 112, 144, 288, 32, 64, 64),
        inception4e=Inception(528, 256, 160, 320, 32, 128, 128), maxpool4=pool(2),
        inception5a=Inception(832, 256, 160, 320, 32, 128, 128), inception5b=Inception(832, 384, 192, 384, 48, 128, 128),
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))

@torch.no_grad()
def googlenet_features(ds, device):
    """(N, 1024) features of all pictures of a data set, from its 76x76 pictures enlarged to 224 (departs from the paper). Raises UserError."""
    net, out = googlenet(), []
    try:                                    # torchvision's ImageNet weights, fetched once and checked by hash
        state = torch.hub.load_state_dict_from_url(GOOGLENET, check_hash=True, weights_only=True, map_location="cpu")
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith(("aux", "fc"))})
    except (OSError, RuntimeError) as error:
        raise UserError(f"GoogLeNet's weights cannot be had ({error}): use --image-encoder conv, or give features of "
                        "your own with --image-features FILE.npy") from None
    net.to(device).eval()
    for i in range(0, len(ds.images), 64):
        # They were trained on pictures normalised with mean and deviation 0.5, which [-1, 1] is.
        x = torch.from_numpy(ds.images[i:i + 64]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        out.append(net(F.interpolate(x, 224, mode="bicubic")).cpu())
    return torch.cat(out)

def load_features(path, ds):
    """A file of features, a row for each picture of the source, in its order -> (N, 1024) float32."""
    try:
        features = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read features from {path}: {error}") from None
    if features.ndim != 2 or features.shape[1] != TEXT_DIM or len(features) <= ds.rows.max():
        raise UserError(f"{path} is {features.shape}: expected at least ({ds.rows.max() + 1}, {TEXT_DIM}), one row a picture")
    features = torch.from_numpy(features[ds.rows].astype(np.float32))
    if not features.isfinite().all():
        raise UserError(f"{path} holds numbers that are not finite")
    return features

def frozen_features(ds, image_side, path, device):
    """The image side's features (N, 1024), or None for "conv". Centred and scaled by the training pictures' (departs from the paper), so
    that the margin of 1 in the loss means something."""
    if image_side == "conv":
        return None
    if image_side == "features" and not path:
        raise UserError("this encoder's image side is given features: name them with --image-features FILE.npy")
    features = load_features(path, ds) if image_side == "features" else googlenet_features(ds, device)
    train = features[ds.split(False)]
    return ((features - train.mean(0)) / (train - train.mean(0)).norm(dim=1).mean()).to(device)

# ---- Pictures for the networks ---------------------------------------------------------------
def picture_tensor(ds, device="cpu"):
    """The data set's pictures as one uint8 tensor; on a CPU it stays memory-mapped. Never written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # torch dislikes that the file is mapped read-only
        return torch.from_numpy(ds.images).to(device)

def crops(images, index, dy, dx, flip):
    """Windows of many pictures at once. images (N, 76, 76, 3) uint8 on any device; index, dy, dx (B,) int, flip (B,) bool, on the same ->
    (B, 3, 64, 64) float32 in [-1, 1], channels last in memory."""
    steps = torch.arange(CROP, device=images.device)
    rows = dy[:, None] + steps                                              # (B, 64)
    cols = dx[:, None] + torch.where(flip[:, None], CROP - 1 - steps, steps)
    x = images[index[:, None, None], rows[:, :, None], cols[:, None, :]]    # (B, 64, 64, 3)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1

def random_crops(images, index):
    """[A] section 5: a random view of the picture, as in the authors' code a 64x64 window of 76x76, mirrored at random."""
    B, device = len(index), images.device
    dy, dx = torch.randint(IMAGE_SIZE - CROP + 1, (2, B), device=device)
    return crops(images, index, dy, dx, torch.rand(B, device=device) < 0.5)

def centre_crops(images, index):
    middle = torch.full_like(index, (IMAGE_SIZE - CROP) // 2)
    return crops(images, index, middle, middle, torch.zeros_like(index, dtype=torch.bool))

def to_pixels(x):
    """(N, 3, 64, 64) in [-1, 1] -> (N, 64, 64, 3) uint8 on the CPU."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

# ---- Checkpoints: a dict of tensors and plain values, nothing that could run -----------------
FORMAT = 1

def save_checkpoint(path, **content):
    write_atomically(path, lambda f: torch.save(dict(format=FORMAT, **content), f))

@contextlib.contextmanager
def fitting(what):
    """Inside it any failure is a UserError: the contents of a file of another sort may bring about whatever they please."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} does not fit this version's networks ({type(error).__name__})") from None

def load_into(make, state):
    """A network made by `make()`, with the weights of a checkpoint, in 32 bits. It is made without memory ("meta"), so that settings that
    ask for a monster fail on their shapes, not on the machine."""
    with torch.device("meta"):
        net = make()
    net.load_state_dict(dict(state), assign=True)   # a copy: torch notes "assign" in state itself, for whoever loads it next
    return net.float()

def load_checkpoint(path, kind):
    """Read a file that `save_checkpoint` wrote; kind is "gan-cls" or "encoder". Raises UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:          # a file of another sort can fail anywhere in the unpickler
        raise UserError(f"{path} is not a checkpoint, or only a part of one ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UserError(f"{path} does not hold a {kind} checkpoint")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}, this version reads {FORMAT}: train it again")
    return content

# ---- Training and measuring ------------------------------------------------------------------
def train_encoder(ds, device="cpu", steps=600, cnn_dim=512, image_side="conv", image_features=None, seed=0, classes=40, log=print):
    """Train phi and the image side on the training classes of a data set. [B]'s settings: RMSprop, rate 7e-4, decay 0.98 an epoch,
    minibatches of 40 classes; ours are alpha and gradients clipped at a norm of 5. image_side: "conv", "googlenet", or "features", which
    are read from the file image_features. Returns a checkpoint: a dict of plain values and tensors."""
    torch.manual_seed(seed)
    amp, scaler, _ = pick_autocast(device)
    features, images = frozen_features(ds, image_side, image_features, device), picture_tensor(ds)
    phi = CharCNNRNN(cnn_dim).to(device)
    v = image_encoder(image_side).to(device, memory_format=torch.channels_last)
    parameters = [p for p in [*phi.parameters(), *v.parameters()] if p.requires_grad]
    optimiser = torch.optim.RMSprop(parameters, lr=7e-4, alpha=0.95)

    tokens, starts = encode_text([t for c in ds.captions for t in c]), caption_starts(ds)
    of_class = [np.flatnonzero(ds.labels == c) for c in np.flatnonzero(~ds.unseen)]
    classes = min(classes, len(of_class))
    if classes < 2:
        raise UserError("the text encoder needs at least two training classes")
    epoch = max(1, len(ds.split(False)) // classes)             # steps of one
    rng, began, mean_loss = np.random.default_rng(seed), time.time(), 0.0
    for step in range(1, steps + 1):
        # One picture and one of its captions from each of 40 classes: every pair of rows then differs in class.
        rows = torch.tensor([rng.choice(of_class[c]) for c in rng.permutation(len(of_class))[:classes]])
        t = tokens[starts[rows] + (torch.rand(len(rows)) * (starts[rows + 1] - starts[rows])).long()].to(device)
        with amp:
            emb, said = v(features[rows.to(device)] if features is not None else random_crops(images, rows).to(device)), phi(t)
        loss = joint_embedding_loss(emb, said)                  # outside: autocast would take the scores in 16 bits
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(parameters, 5)
        scaler.step(optimiser)
        scaler.update()
        if step % epoch == 0:
            for group in optimiser.param_groups:
                group["lr"] *= 0.98
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 100 == 0 or step == steps:
            log(f"text encoder: step {step}/{steps}  loss {mean_loss:.3f}  {(time.time() - began) / step * 1000:.0f} ms a step")
    texts = [t for i in ds.split(False) for t in ds.captions[i]]
    whiten(phi, v, texts[::1 + len(texts) // 20_000])           # some 20,000 captions are enough for a covariance
    return dict(kind="encoder", phi=phi.state_dict(), v=v.state_dict(), settings=dict(
        dataset=ds.name, cnn_dim=cnn_dim, steps=steps, seed=seed, image_side=image_side))

@torch.no_grad()
def whiten(phi, v, texts, floor=0.005):
    """Choose the basis of the joint space in which phi's outputs over these texts have about equal variance in every direction (those
    below `floor` of the largest stay small) and mean square 1/4. phi goes through M, v through M^-1, M symmetric: every score v . phi(t)
    stays what it was. departs from the paper: the loss leaves phi with numbers of some 0.02, half of whose variance is in three
    directions. G, whose z is N(0, 1), would hear no text for a thousand steps, and never learn a crown's colour."""
    h = embed(phi, texts).double()
    values, U = torch.linalg.eigh(torch.cov(h.T))
    M = U * (values + floor * values[-1]).rsqrt() @ U.T
    M /= 2 * (h @ M).square().mean().sqrt()
    for layer, change in ((phi.out, M), (v if isinstance(v, nn.Linear) else v.net[-1], torch.linalg.inv(M))):
        for p in layer.parameters():                            # weight (1024, n), and bias (1024,) where there is one
            p.copy_(change @ p.double())

def caption_starts(ds):
    """Where each picture's captions begin when all are laid end to end: (N + 1,)."""
    return torch.tensor([0] + [len(c) for c in ds.captions]).cumsum(0)

def build(checkpoint, device="cpu"):
    """(phi, v) of an encoder's checkpoint, ready to use. Raises UserError if it is not one."""
    with fitting("this text encoder"):
        settings = checkpoint["settings"]
        phi = load_into(lambda: CharCNNRNN(settings["cnn_dim"]), checkpoint["phi"])
        v = load_into(lambda: image_encoder(settings["image_side"]), checkpoint["v"]) if "v" in checkpoint else None  # weights/ hold phi alone
    return phi.to(device).eval(), v and v.to(device, memory_format=torch.channels_last).eval()

@torch.no_grad()
def embed_pictures(v, x):
    """v of pictures (N, 3, 64, 64) or of features (N, 1024) -> (N, 1024) float32."""
    with pick_autocast(x.device)[0]:
        return torch.cat([v(x[i:i + 256]).float() for i in range(0, len(x), 256)])

def unseen(ds, phi):
    """Of the unseen classes: indices of the pictures (n,), their labels (n,), the classes (C,), eq. 3's mean captions (C, 1024), all on the CPU."""
    index = ds.split(True)
    if not len(index):
        raise UserError(f"{ds.name} has no unseen classes to measure on")
    labels, classes = torch.from_numpy(ds.labels[index]), torch.from_numpy(np.flatnonzero(ds.unseen))
    owners = labels.repeat_interleave(torch.tensor([len(ds.captions[i]) for i in index]))
    emb = embed(phi, [t for i in index for t in ds.captions[i]]).cpu()
    return torch.from_numpy(index), labels, classes, torch.stack([emb[owners == c].mean(0) for c in classes])

def top(k, emb, labels, classes, means):
    """Zero-shot accuracy by eq. 3: the share of rows of emb (n, 1024) whose class is among the k best."""
    return (classes[classify(emb, means)[:, :k]] == labels[:, None]).any(1).float().mean().item()

def evaluate(ds, phi, v, features=None, device="cpu"):
    """Zero-shot top-1 (eq. 3) and AP@50 on the unseen classes -> dict of numbers in 0..1."""
    index, labels, classes, means = unseen(ds, phi)
    emb = embed_pictures(v, features[index.to(device)] if features is not None else centre_crops(picture_tensor(ds), index).to(device)).cpu()
    return {"zero-shot top-1": top(1, emb, labels, classes, means), "zero-shot top-5": top(5, emb, labels, classes, means),
            "AP@50": average_precision_at_50(emb, labels, means, classes), "chance": 1 / len(classes)}

# ---- Measures of generated pictures, for train.py --compare ----------------------------------
def frechet_distance(a, b):
    """Distance of two Gaussians fitted to features (N, d) and (M, d), as in the FID: |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of (C_a C_b)^(1/2) is that of the symmetric (R C_b R)^(1/2), R = C_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def kmeans(points, k, seed=0, rounds=50):
    """Lloyd's algorithm from k-means++ seeds: (N, d) -> (N,) the group of each point."""
    g = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=g)]
    while len(centres) < min(k, len(points)):
        far = torch.cdist(points, centres).min(1).values.square() + 1e-12       # where all points are equal too
        centres = torch.cat([centres, points[torch.multinomial(far, 1, generator=g)]])
    for _ in range(rounds):
        group = torch.cdist(points, centres).argmin(1)
        centres = torch.stack([points[group == i].mean(0) if (group == i).any() else centres[i] for i in range(len(centres))])
    return group

def roc(scores, same):
    """Scores (N,) and truth (N,) bool -> false and true positive rates (N + 1,), the strictest threshold first."""
    hits = same[scores.argsort(descending=True)].double()
    return tuple(torch.cat([c.new_zeros(1), c.cumsum(0) / c.sum()]) for c in (1 - hits, hits))

def auc(scores, same):
    """Area under the ROC curve: how often a "same" pair scores above a "different" one, ties counting half."""
    values, place = scores.double().unique(return_inverse=True)
    yes, no = (torch.bincount(place[m], minlength=len(values)).double() for m in (same, ~same))
    return (yes * (no.cumsum(0) - no / 2)).sum().item() / (yes.sum() * no.sum()).item()

def style_groups(ds, index, k=100):
    """[A] section 5.2: pictures grouped by style, once by the mean colour outside the bounding box, once by pose (the six keypoints
    relative to the box; pictures that lack one are left out: -1). Two (N,) tensors."""
    background = []
    for i in index:
        x, y, w, h = ds.boxes[i]
        outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
        outside[max(0, int(y)):int(y + h) + 1, max(0, int(x)):int(x + w) + 1] = False
        background.append(ds.images[i][outside if outside.any() else ~outside].mean(0))
    pose = (ds.keypoints[index] - ds.boxes[index][:, None, :2]) / ds.boxes[index][:, None, 2:]
    pose = torch.from_numpy(pose.reshape(len(index), -1)).double()
    whole = pose.isfinite().all(1)
    group = torch.full((len(index),), -1)
    group[whole] = kmeans(pose[whole], k)
    return kmeans(torch.tensor(np.array(background)), k), group

def style_pairs(group, folds=5, pairs=5000, seed=0):
    """For each fold of the pictures, pairs (i, j): half of one group, half of two. List of (i, j, same)."""
    rng, group, out = np.random.default_rng(seed), group.numpy(), []
    for members in np.array_split(rng.permutation(np.flatnonzero(group >= 0)), folds):
        i, j = rng.choice(members, (2, 200 * pairs))        # of 100 groups, one pair in 100 is "same"
        same = group[i] == group[j]
        keep = np.concatenate([np.flatnonzero(same & (i != j))[:pairs // 2], np.flatnonzero(~same)[:pairs // 2]])
        out.append(tuple(torch.from_numpy(a[keep]) for a in (i, j, same)))
    return out

def verify_style(emb, pairs):
    """Area under the ROC curve, mean over folds, when the score of a pair is the cosine of its rows of emb (N, d)."""
    return float(np.mean([auc(F.cosine_similarity(emb[i], emb[j]), same) for i, j, same in pairs]))

def add_options(add):
    """What encoder.py and train.py both ask for."""
    data.add_options(add)
    add("--image-encoder", choices=("conv", "googlenet"), help="image side of the text encoder (default: conv; paper: googlenet)")
    add("--image-features", metavar="FILE.npy", help="its image side as given features, a row a picture")
    add("--seed", type=data.number(0, 2 ** 31), default=0, help="default: 0")
    add("--device", type=pick_device, default="auto", help="auto (default), cpu, cuda or cuda:1")

def main():
    parser = argparse.ArgumentParser(description="Train the text encoder, or measure it.")
    add = parser.add_argument
    add_options(add)
    add("--steps", type=data.number(1, 10_000_000), default=600, help="default: 600")
    add("--out", type=Path, help="where to keep it (default: runs/DATASET-encoder.pt)")
    add("--evaluate", action="store_true", help="measure the one that is there")
    args = parser.parse_args()
    ds, device = data.load(args.dataset, args.source), args.device
    path = args.out or Path("runs") / f"{data.short_name(args.dataset)}-encoder.pt"
    if args.evaluate:
        checkpoint = load_checkpoint(path, "encoder")
    else:
        side = "features" if args.image_features else args.image_encoder or "conv"
        checkpoint = train_encoder(ds, device, args.steps, image_side=side, image_features=args.image_features, seed=args.seed)
        save_checkpoint(path, **checkpoint)
        print(f"wrote {path}")
    phi, v = build(checkpoint, device)
    features = frozen_features(ds, checkpoint["settings"]["image_side"], args.image_features, device)
    result = evaluate(ds, phi, v, features, device)
    print("\n".join(f"  {key:16} {value:.3f}" for key, value in result.items()))
    print(json.dumps(dict(dataset=args.dataset, **{k: round(v, 4) for k, v in result.items()})))

if __name__ == "__main__":
    data.run(main)
