"""The tests, and the graders of the README's exercises. What needs a GPU or the real data is
skipped without. Equations are compared with slow float64 ones that use nothing of what they test.

    pytest -q                           # all of them, about two minutes on two cores
    pytest -q -k exercise_1             # grade one exercise: exercise_1 to exercise_6
    KILLS=100 pytest -q -k killed       # the long form of one test: kill a run 100 times
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import encoder
import gan_cls
import sample
import train

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared" / "data"        # the real data sets, where they are
torch.set_num_threads(1)    # the networks here are tiny: more threads would wait for one another


# ==============================================================================================
# Shared: small networks, images, archives, data sets and runs
# ==============================================================================================

TALLY = {"runs killed": 0, "broken inputs tried": 0}    # counted when the test that did it passed


@pytest.fixture(scope="session", autouse=True)
def tally(request):
    """Says at the end what was tried."""
    yield
    if any(TALLY.values()):
        tried = ", ".join(f"{what}: {n:,}" for what, n in TALLY.items())
        lost = "" if request.session.testsfailed else "; lost: none"
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n{tried}{lost}")


def silent(line):
    """A log that keeps nothing."""


def same(a, b):
    """Equal to the last bit: tensors, and dicts and lists of them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def copy_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder: caches and runs go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(module, *lines):
    """A script's command line, in this process. Returns its exit code."""
    words = shlex.split(" ".join(map(str, lines)))
    try:
        data.run_script(lambda: module.main(words))
        return 0
    except SystemExit as stop:
        return stop.code or 0


def check_refused(capsys, module, line, message):
    """Code 2 and one line that says why, behind argparse's usage at most."""
    capsys.readouterr()
    code = call(module, line)
    err = capsys.readouterr().err
    assert code == 2 and message in err.splitlines()[-1], (line, code, err)
    assert "Traceback" not in err
    assert err.count("\n") == 1 or err.startswith("usage: ")


def small_nets(dtype=torch.float64):
    """G and D, always the same."""
    torch.manual_seed(0)
    G = gan_cls.Generator(4, text_dim=12, text_small=5)
    D = gan_cls.Discriminator(4, text_dim=12, text_small=5, joint=16)
    return G.to(dtype), D.to(dtype)


def small_batch(B=8, dtype=torch.float64):
    """x, h, h_wrong."""
    torch.manual_seed(1)
    x = 2 * torch.rand(B, 3, 64, 64, dtype=dtype) - 1
    return x, torch.randn(B, 12, dtype=dtype), torch.randn(B, 12, dtype=dtype)


# ---- Files -----------------------------------------------------------------------------------

COLOUR_BYTES = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]


def saved(image, kind, **options):
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(colour=COLOUR_BYTES[0], size=(90, 80), kind="JPEG"):
    return saved(Image.new("RGB", size, colour), kind)


def written(path, files):
    """Files, {name: bytes}, as a folder, a .zip or a .tar.gz, by the ending. Returns the path."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif path.suffix in (".gz", ".tgz"):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def mutated(rng, content):
    """Some bytes changed, left out or doubled, or the end missing."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(content) + 1)
        change = rng.choice([rng.randbytes(1), b"\xff" * 4, b"", 2 * content[at:at + 64]])
        content[at:at + rng.choice([1, 64])] = change
    return bytes(content[:rng.choice([at, None, None])])


# ---- Data sets -------------------------------------------------------------------------------

def own_folder(path, classes=5, each=4):
    """A folder of images, `each` of each class, with two captions each."""
    for c in range(classes):
        for i in range(each):
            written(path, {
                f"kind{c}/p{i}.png": jpeg(COLOUR_BYTES[c % 5], kind="PNG"),
                f"kind{c}/p{i}.txt": f"colour {c}\npicture {i}".encode()})
    return path


def small_data(folder, classes=5, each=4):
    """A small data set: 5 classes of 4 images, of which 1 class is unseen."""
    return data.load(str(own_folder(folder / "mine", classes, each)))


def cub_files(text="cvpr2016_cub/text_c10/{kind}/{file}"):
    """{name: bytes} of 12 images and of their captions, in CUB's own layout, or with captions named
    as in another one. Of the four classes 1 and 4 are unseen ones."""
    images = {}
    captions = {}
    listed = []
    boxes = []
    parts = []
    for c, kind in enumerate(("001.Albatross", "002.Auk", "003.Ani", "004.Bunting")):
        for i in range(3):
            number = len(listed) + 1
            name = f"{kind[4:]}_{i:04d}"
            images[f"CUB_200_2011/images/{kind}/{name}.jpg"] = jpeg(COLOUR_BYTES[c], (152, 76))
            caption = f"a bird of kind {c}\n\nit has number {i}\n"
            captions[text.format(kind=kind, file=f"{name}.txt")] = caption.encode()
            listed.append(f"{number} {kind}/{name}.jpg")
            boxes.append(f"{number} 20.0 10.0 40.0 50.0")
            for part in range(1, 16):
                parts.append(f"{number} {part} {part}.0 {2 * part}.0 {int(part != 14)}")

    listed.reverse()        # the order of images.txt is the source's order, whatever it is
    images["CUB_200_2011/images.txt"] = "\n".join(listed).encode()
    images["CUB_200_2011/bounding_boxes.txt"] = "\n".join(boxes).encode()
    images["CUB_200_2011/parts/part_locs.txt"] = "\n".join(parts).encode()
    if "cvpr" in text:      # the authors' lists of classes
        captions["cvpr2016_cub/testclasses.txt"] = b"001.Albatross\n004.Bunting\n"
    return images, captions


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy birds, drawn once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("toy"))
        return data.load("toy")


@pytest.fixture(scope="session")
def small_toy(toy):
    """Of them 40 images each of 4 training and 4 unseen species, 3 captions an image."""
    trained = np.flatnonzero(~toy.unseen_classes)[:4]
    classes = [*trained, *np.flatnonzero(toy.unseen_classes)[:4]]
    keep = np.flatnonzero(np.isin(toy.labels, classes))
    arrays = {}
    for field in ("images", "boxes", "keypoints"):
        arrays[field] = getattr(toy, field)[keep]
    return dataclasses.replace(
        toy, captions=[toy.captions[i][:3] for i in keep], rows=np.arange(len(keep)),
        labels=np.searchsorted(classes, toy.labels[keep]), class_names=list("abcdefgh"),
        unseen_classes=toy.unseen_classes[classes], **arrays)


# ---- Runs ------------------------------------------------------------------------------------

def train_phi_shortly(patch):
    """Text encoders are trained for three steps, 8 wide. Returns the options of each training."""
    needs_exercises(3)
    train_encoder = encoder.train_encoder
    calls = []

    def short(ds, device="cpu", steps=0, precision="fp32", **options):
        calls.append(options)
        return train_encoder(ds, device, 3, precision, **dict(options, cnn_dim=8))

    patch.setattr(encoder, "train_encoder", short)
    patch.setattr(encoder, "whiten", lambda *inputs: None)      # it takes half a second
    return calls


def train_shortly(patch):
    """With TINY a whole run takes less than a second."""
    needs_exercises(1, 2, 4, 5, 6)
    train_phi_shortly(patch)
    train_style_encoder = train.train_style_encoder
    patch.setattr(train, "train_style_encoder",
                  lambda run, batches: train_style_encoder(run, batches, 3))
    patch.setattr(train, "EVERY", dict(log=2, save=4))


TINY = ("--dataset mine --ngf 2 --ndf 2 --batch-size 8 --recipe quick --device cpu "
        "--precision fp32")


@pytest.fixture
def short_training(monkeypatch):
    return train_phi_shortly(monkeypatch)


@pytest.fixture
def tiny(here, monkeypatch):
    """A small data set, and short trainings."""
    train_shortly(monkeypatch)
    own_folder(here / "mine")
    return here


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of a run of four steps, trained once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("four steps"))
        train_shortly(patch)
        own_folder(Path("mine"))
        assert call(train, TINY, "--steps 4 --out run") == 0
        return Path("run").resolve()


@pytest.fixture
def begun(four_steps, tiny):
    """A run of four steps, to go on with."""
    shutil.copytree(four_steps, tiny / "run")
    return tiny


def load_run(folder):
    return data.load_checkpoint(Path(folder) / "checkpoint.pt", "gan-cls")


def random_run(recipe="quick", variant="gan-int-cls", device="cpu", precision="fp32"):
    """A run and batches of noise, without files: 64 images of 8 classes."""
    needs_exercises(1, 2, 4, 5, 6)
    device = torch.device(device)
    ds = random_data()
    settings = dict(recipe=recipe, variant=variant, seed=0, ngf=4, ndf=2, precision=precision,
                    steps=20, batch_size=8)
    run = train.Run(settings, device)
    table = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)).half()
    return run, data.Batches(ds, table.to(device), device, run.recipe["captions"])


def random_data(name="random"):
    images = np.random.default_rng(0).integers(0, 256, (64, 76, 76, 3), np.uint8)
    return data.Dataset(name, images, [["a bird", "a red bird"]] * 64, np.arange(64) % 8,
                        list("abcdefgh"), np.zeros(8, bool), np.arange(64))


# ==============================================================================================
# The graders
# ==============================================================================================
# A grader takes a solution, and raises an AssertionError whose first line says what is wrong.

def attempt(where, solution, *inputs, **options):
    """What the solution returns for these inputs, which it must not change."""
    copies = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    try:
        got = solution(*copies, **options)
    except NotImplementedError:
        got = None
    except Exception as error:
        line = error.__traceback__.tb_next.tb_lineno        # of the solution
        raise AssertionError(f"{where}: {type(error).__name__} in line {line}: {error}")
    assert got is not None, f"{where}: nothing is returned. Is the body still blank?"
    assert same(copies, list(inputs)), \
        f"{where}: an input is changed in place, and the caller still needs it"
    return got


def check_loss(where, solution, inputs, right, formula, mistakes=()):
    """The value of a loss and its gradient. mistakes: what wrong formulas give, and a hint each."""
    got = attempt(where, solution, *inputs)
    assert torch.is_tensor(got) and got.shape == (), \
        f"{where}: expected a scalar tensor, the mean over the batch; the formula: {formula}"
    got = got.item()
    for value, hint in mistakes:
        assert not math.isclose(got, value, rel_tol=1e-5), f"{where}: check {hint}"
    assert math.isclose(got, right, rel_tol=1e-4, abs_tol=1e-4), \
        f"{where}: expected {right:.5f}, got {got:.5f}; the formula: {formula}"
    check_gradient(where, solution, *inputs)


def check_gradient(where, solution, *inputs, eps=1e-2):
    """Autograd's gradient beside finite differences, for each input that requires one.

    eps is large because the losses are computed in 32 bits.
    """
    try:
        torch.autograd.gradcheck(solution, inputs, eps=eps, atol=2e-3, rtol=1e-2)
    except RuntimeError as error:
        raise AssertionError(f"{where}: the value is right, but not its gradient. What is "
                             f"detached, or changed in place? ({error})")


def check_16_bits(where, solution, inputs):
    """Under autocast the logits come in 16 bits; 1000 is far outside what exp() can take there."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.tensor([-1000.0, 1000.0], dtype=dtype)
        loss = solution(*[x] * inputs)
        assert loss.dtype == torch.float32, \
            f"{where}: logits in {dtype} give a loss in {loss.dtype}: .float() them first"
        assert loss.isfinite(), \
            f"{where}: the loss of logits 1000 and -1000 is {loss:.0f}: use softplus, which " \
            f"never overflows, not the logarithm of a sigmoid"


# ---- Exercise 1: Algorithm 1, lines 10 and 12 ------------------------------------------------

def logits(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


REAL = logits(2.0, -1.0, 0.5, 3.0)
WRONG = logits(-0.7, 1.2, 0.1, -2.0)
FAKE = logits(0.3, -1.5, 2.2, -0.4)


def D_objective(s_r, s_w, s_f):
    """Algorithm 1, line 10. Without s_w eq. 1."""
    no = torch.log(1 - s_f).mean()
    if s_w is not None:
        no = (no + torch.log(1 - s_w).mean()) / 2
    return (torch.log(s_r).mean() + no).item()


def grade_discriminator_loss(solution):
    where = "Algorithm 1, line 10"
    s_r, s_w, s_f = [logit.sigmoid() for logit in (REAL, WRONG, FAKE)]
    L_D = D_objective(s_r, s_w, s_f)
    game = D_objective(s_r, None, s_f)
    check_loss(where, solution, [REAL, WRONG, FAKE], -L_D,
               "L_D = log(s_r) + (log(1 - s_w) + log(1 - s_f)) / 2, s = sigmoid(logit)", [
        (L_D, "the sign. An optimiser minimises, so return minus L_D."),
        (s_r.log().mean().item() - 2 * L_D,
         "the half. The wrong text and the fake image share the weight of one \"no\"."),
        (-D_objective(s_r, 1 - s_w, s_f),
         "the wrong text. A real image with one must be refused: log(1 - s_w)."),
        (-game, "l_wrong. It is given, but it is not used."),
        (-D_objective(s_r.sigmoid(), s_w.sigmoid(), s_f.sigmoid()),
         "the sigmoid. It is taken twice: the inputs are logits, s = sigmoid(logit)."),
    ])
    check_16_bits(where, solution, 3)
    check_loss("eq. 1, the plain GAN, l_wrong=None", solution, [REAL, None, FAKE], -game,
               "log D(x) + log(1 - D(G(z)))")


def grade_generator_loss(solution):
    where = "Algorithm 1, line 12"
    yes = FAKE.sigmoid().log().mean().item()
    no = (1 - FAKE.sigmoid()).log().mean().item()
    check_loss(where, solution, [FAKE], -yes, "L_G = log(s_f), s_f = sigmoid(logit)", [
        (yes, "the sign. An optimiser minimises, so return minus L_G."),
        (-no, "which logarithm. G wants its images to be taken for real: log(s_f)."),
        (no, "which logarithm. That is eq. 1, flat where D is sure. Algorithm 1 has log(s_f)."),
    ])
    check_16_bits(where, solution, 1)


# ---- Exercise 2: eq. 5 -----------------------------------------------------------------------

def grade_interpolate(solution):
    where = "eq. 5, beta * h1 + (1 - beta) * h2"
    h1 = torch.tensor([[1.0, 2.0, 0.0]])
    h2 = torch.tensor([[3.0, -2.0, 8.0]])
    for beta in (0.25, 0.5):
        got = attempt(where, solution, h1, h2, beta)
        right = beta * h1 + (1 - beta) * h2
        assert same(got, right), f"{where}: beta={beta} gives {got}, not {right}"
    assert same(attempt(where, solution, h1, h2), got), \
        f"{where}: section 4.3 fixes beta at 0.5: make it the default"


# ---- Exercise 3: eq. 2 -----------------------------------------------------------------------

def grade_joint_embedding_loss(solution):
    where = "eq. 2, with a hinge for the 0-1 loss"
    torch.manual_seed(3)
    N = 5
    v = torch.randn(N, 7, dtype=torch.float64, requires_grad=True)
    t = torch.randn(N, 7, dtype=torch.float64, requires_grad=True)

    images_choose = 0.0
    texts_choose = 0.0
    without_margin = 0.0
    s = (v @ t.T).tolist()                                  # s[i][j]: image i with text j
    for i, j in np.ndindex(N, N):
        if i != j:
            images_choose += max(0, 1 + s[i][j] - s[i][i]) / (N * (N - 1))
            texts_choose += max(0, 1 + s[j][i] - s[i][i]) / (N * (N - 1))
            without_margin += max(0, s[i][j] - s[i][i]) / (N * (N - 1))
            without_margin += max(0, s[j][i] - s[i][i]) / (N * (N - 1))
    right = images_choose + texts_choose
    over_all = right * (N - 1) / N                          # divided by N^2, not by N (N - 1)

    check_loss(where, solution, [v, t], right, "the mean over i != j of max(0, 1 + s_ij - s_ii), "
               "plus the same with images and texts exchanged", [
        (images_choose, "the directions. Texts must also choose among images."),
        (texts_choose, "the directions. Images must also choose among texts."),
        (2 * images_choose, "the directions. The same one is taken twice."),
        (right / 2, "the directions. They are added, not averaged."),
        (without_margin, "the margin. The right partner must score by 1 more."),
        (over_all + 2 / N, "the diagonal. i = j is the right partner, not another one."),
        (over_all, "the mean. It is over the N (N - 1) pairs with i != j."),
    ])


# ---- Exercise 4: section 4.1, the text at every place of the map -----------------------------

def grade_score(solution):
    where = "section 4.1, here with 8 channels in f and 3 in self.text(h)"
    torch.manual_seed(0)
    D = gan_cls.Discriminator(ndf=1, text_dim=6, text_small=3, joint=8).double()
    f = torch.randn(5, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    depth = torch.zeros(5, 8 + 3, 4, 4, dtype=torch.float64)
    for b, y, x in np.ndindex(5, 4, 4):
        depth[b, :8, y, x] = f[b, :, y, x]
        depth[b, 8:, y, x] = D.text(h)[b]
    right = D.joint(depth).flatten()

    got = attempt(where, solution, D, f, h)
    assert torch.is_tensor(got) and got.shape == (5,), \
        f"{where}: expected a tensor of 5 logits, one an image, not {got}"
    assert not torch.allclose(got, right.sigmoid()), \
        f"{where}: expected logits; the losses take the sigmoid"
    assert torch.allclose(got, right), \
        f"{where}: the compressed text of each image must stand at all 16 places of its 4x4 " \
        f"map, behind the features in depth"
    check_gradient(where, lambda f, h: 100 * solution(D, f, h), f, h, eps=1e-6)


# ---- Exercise 5: eq. 6 -----------------------------------------------------------------------

def grade_style_loss(solution):
    where = "eq. 6"
    z = torch.zeros(2, 100)
    z_hat = torch.zeros(2, 100, dtype=torch.float64)
    z[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    z_hat[:, 0] = torch.tensor([1.0, 2.0])                  # 0 + 4 + 9 and 4 + 0 + 0
    z_hat.requires_grad_(True)

    # z is noise and needs no gradient.
    check_loss(where, solution, [z, z_hat], 17 / 2, "||z - S(G(z, phi(t)))||^2: the sum over the "
               "numbers of z, then the mean over the batch", [
        (17 / 200, "the mean. || ||^2 is the sum over the 100 numbers of z, not their mean."),
        (17.0, "the mean. It is missing: the mean over the batch."),
        ((13 ** 0.5 + 4 ** 0.5) / 2, "the square. The norm is squared."),
        ((5 + 2) / 2, "the square. That is the sum of absolute differences."),
    ])


# ---- Exercise 6: Algorithm 1, lines 5 to 13 --------------------------------------------------

def algorithm_1(G, D, z, x, h, h_wrong, cls, int_, view=nn.Identity(), blends_to_D=False,
                extra_G_loss=None, scaler=None):
    """[A] Algorithm 1 line by line: D looks at images three times, logarithms are spelled out.

    z: the noise of line 5. Both networks move by minus their gradient. Returns what gan_cls_step
    does.
    """
    B = len(x)
    texts = h
    if int_:
        texts = torch.cat([h, 0.5 * h[:B // 2] + 0.5 * h[B // 2:]])     # eq. 5
    x_fake = G(z, texts)                                    # line 6
    s_r = torch.sigmoid(D(view(x), h))                      # line 7
    s_w = torch.sigmoid(D(view(x), h_wrong))                # line 8
    shown = len(texts) if blends_to_D else B
    s_f = torch.sigmoid(D(view(x_fake[:shown]), texts[:shown]))         # line 9
    no = (1 - s_f).log().mean()                             # eq. 1
    if cls:
        no = ((1 - s_w).log().mean() + no) / 2              # line 10
    L_D = s_r.log().mean() + no
    descend(D, -L_D)                                        # line 11

    s = torch.sigmoid(D(view(G(z, texts)), texts))
    L_G = s[:B].log().mean()                                # line 12
    if int_:
        L_G = L_G + s[B:].log().mean()
    extra = extra_G_loss(z, texts, G(z, texts)) if extra_G_loss else 0
    descend(G, extra - L_G)                                 # line 13
    out = {"loss_D": -L_D, "loss_G": -L_G, "D(real)": s_r.mean(), "D(fake)": s_f.mean()}
    if cls:
        out["D(wrong)"] = s_w.mean()
    return out


def descend(net, loss):
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for p, gradient in zip(net.parameters(), gradients):
        p.data -= gradient


def near(a, b):
    """Equal but for the rounding of the losses, which are computed in 32 bits."""
    return (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9


def same_way(*nets):
    """Did net and slow move from old by the same?"""
    weights = [list(net.parameters()) for net in nets]
    return all(near(p - old, slow - old) for p, slow, old in zip(*weights))


STEP_OPTIONS = [
    {}, dict(view=torch.tanh),
    dict(blends_to_D=True),
    dict(scaler=torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)),     # must change nothing
    dict(extra_G_loss=lambda z, texts, x: (x.mean((1, 2, 3)) * z[:, 0] * texts[:, 0]).sum()),
]


def grade_gan_cls_step(solution):
    """With plain gradient descent at a rate of 1 a weight moves by minus its gradient."""
    needs_exercises(1, 2, 4)
    x, h, h_wrong = small_batch(4)
    blends = (h[:2] + h[2:]) / 2
    for variant, extras in itertools.product(train.VARIANTS, STEP_OPTIONS):
        where = ", ".join(["Algorithm 1", f"model {variant}", *extras])
        options = dict(train.VARIANTS[variant], **extras)
        G, D = small_nets()
        slow_G, slow_D = small_nets()
        old_G, old_D = small_nets()
        for p in [*G.parameters(), *D.parameters()]:
            p.grad = torch.ones_like(p)             # left by an earlier step: must not count
        drawn = []
        G.register_forward_pre_hook(lambda net, inputs: drawn.append(inputs))
        out = attempt(where, solution, G, D, torch.optim.SGD(G.parameters(), 1.0),
                      torch.optim.SGD(D.parameters(), 1.0), x, h, h_wrong, **options)

        z, texts = drawn[0]
        expected = torch.cat([h, blends]) if options["int_"] else h
        assert texts.shape == expected.shape and torch.allclose(texts, expected), \
            f"{where}, line 6: G takes the B captions; with int_ the B/2 blends come behind them"
        assert z.shape == (len(texts), 100) and abs(z.std() - 1) < 0.2, \
            f"{where}, line 5: z has 100 numbers from N(0, 1) for each text"
        slow_out = algorithm_1(slow_G, slow_D, z, x, h, h_wrong, **options)
        assert same_way(D, slow_D, old_D), \
            f"{where}, lines 7 to 11: D does not move by minus the gradient of -L_D. Which " \
            f"images, which texts? Is an old gradient left, or does G's half move D too?"
        assert same_way(G, slow_G, old_G), \
            f"{where}, lines 12 and 13: G does not move by minus the gradient of -L_G. Is D that " \
            f"of line 11? Is there a mean for the captions, and another for the blends?"
        assert all(p.requires_grad for p in D.parameters()), f"{where}: D is left frozen"
        assert out.keys() == slow_out.keys(), f"{where}: expected a dict of {list(slow_out)}"
        for key, value in slow_out.items():
            assert near(out[key], value) and not out[key].requires_grad, \
                f"{where}: {key} is {out[key]}, expected {value.item():.5f}, detached"


# ---- All exercises ---------------------------------------------------------------------------

EXERCISES = {
    1: [(grade_discriminator_loss, gan_cls.discriminator_loss),
        (grade_generator_loss, gan_cls.generator_loss)],
    2: [(grade_interpolate, gan_cls.interpolate)],
    3: [(grade_joint_embedding_loss, encoder.joint_embedding_loss)],
    4: [(grade_score, gan_cls.Discriminator.score)],
    5: [(grade_style_loss, gan_cls.style_loss)],
    6: [(grade_gan_cls_step, gan_cls.gan_cls_step)],
}


@functools.cache
def what_is_wrong(number):
    """The grader's message, one line, or None where the exercise is solved."""
    try:
        for grader, solution in EXERCISES[number]:
            grader(solution)
    except (Exception, pytest.fail.Exception) as error:
        return str(error).split("\n")[0] or type(error).__name__


def needs_exercises(*numbers):
    """For tests that run what exercises ask for: say which one is not solved, and stop there."""
    for number in numbers:
        if what_is_wrong(number):
            pytest.fail(f"it needs exercise {number}, which is not solved yet: "
                        f"pytest -q -k exercise_{number}", pytrace=False)


@pytest.mark.parametrize("number", EXERCISES, ids="exercise_{}".format)
def test_grade(number):
    if what_is_wrong(number):
        pytest.fail(what_is_wrong(number), pytrace=False)


# ==============================================================================================
# For teachers: other solutions, planted mistakes, the tests of the graders. Delete this part, up
# to "The paper: gan_cls.py", before you hand the folder out; nothing below uses it.
# ==============================================================================================

def cross_entropy(logit, wanted):
    logit = logit.float()
    return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, wanted))


def cross_entropy_D(real, wrong, fake):
    if wrong is None:
        return cross_entropy(real, 1.0) + cross_entropy(fake, 0.0)
    no = cross_entropy(wrong, 0.0) + cross_entropy(fake, 0.0)
    return cross_entropy(real, 1.0) + 0.5 * no


def hinge(s):
    """Each row of s chooses: mean over i != j of max(0, 1 + s_ij - s_ii)."""
    N = len(s)
    return (F.relu(1 + s - s.diagonal()[:, None]).sum() - N) / (N * (N - 1))


@pytest.mark.parametrize("grader, solution", [
    (grade_discriminator_loss, cross_entropy_D),
    (grade_generator_loss, lambda fake: cross_entropy(fake, 1.0)),
    (grade_interpolate, lambda h1, h2, beta=0.5: torch.lerp(h2, h1, beta)),
    (grade_joint_embedding_loss, lambda v, t: hinge(v @ t.T) + hinge(t @ v.T)),
    (grade_style_loss, lambda z, s: F.mse_loss(s, z.to(s), reduction="sum") / len(z))])
def test_graders_accept(grader, solution):
    grader(solution)


# {what a student may have written: in place of which text of the solution}
MISTAKES = {
    grade_discriminator_loss: {
        "return log_s(l_real).mean() + no": "return -(log_s(l_real).mean() + no)",
        "log_s(l_real).sum() + no": "log_s(l_real).mean() + no",
        ".mean())": ".mean()) / 2",
        "True": "l_wrong is None", "False": "l_wrong is None",
        "log_s(l_wrong)": "log_one_minus_s(l_wrong)",
        "log_one_minus_s(l_fake)": "log_one_minus_s(l_wrong)",
        "log_one_minus_s(l_wrong.detach())": "log_one_minus_s(l_wrong)",
        "    l_real, l_wrong, l_fake = map(torch.sigmoid, [l_real, l_wrong, l_fake])\n"
        "    # Alg.": "    # Alg.",
    },
    grade_generator_loss: {
        "return log_s(l_fake)": "return -log_s(l_fake)",
        "log_one_minus_s(l_fake)": "-log_s(l_fake)",
        "torch.log(l_fake.float().sigmoid())": "log_s(l_fake)",
        "F.softplus(-l_fake)": "-log_s(l_fake)",
        "log_s(l_fake.detach())": "log_s(l_fake)",
    },
    grade_interpolate: {
        "beta * h2": "(1 - beta) * h2",
        "(1 - beta) * h1 + beta * h2": "beta * h1 + (1 - beta) * h2",
        "h1.mul_(beta) +": "beta * h1 +",
        "beta=0.3": "beta=0.5",
    },
    grade_joint_embedding_loss: {
        "return image_loss": "return image_loss + text_loss",
        "return 2 * image_loss": "return image_loss + text_loss",
        "image_loss = (s": "image_loss = (1 + s",
        "torch.ones(s.shape": "~torch.eye(len(s)",
        "right[:, None].detach())": "right[:, None])",
    },
    grade_score: {
        "h": "self.text(h)",
        "self.text(h.flip(0))": "self.text(h)",
        "self.text(h.detach())": "self.text(h)",
        " * torch.eye(MAP)": ".expand(-1, -1, MAP, MAP)",
        "[text, f]": "[f, text]",
        ".flatten().sigmoid()": ".flatten()",
    },
    grade_style_loss: {
        "z_hat.float().detach()": "z_hat.float()",
        "square().mean()": "square().sum(1).mean()",
        "square().sum()": "square().sum(1).mean()",
        "norm(dim=1)": "square().sum(1)",
        "abs()": "square()",
    },
    grade_gan_cls_step: {
        "h[:half])": "h[half:2 * half])",
        "torch.rand(": "torch.randn(",
        "h) if cls": "h_wrong) if cls",
        "h_wrong) if int_": "h_wrong) if cls",
        "D(x_fake[:shown].detach()": "D(seen[:shown].detach()",
        "= len(texts)": "= len(texts) if blends_to_D else B",
        "D(x_fake, texts)": "D(seen, texts)",
        "D(seen.detach(), texts)": "D(seen, texts)",
        "generator_loss(l_G)": "generator_loss(l_G[:B])",
        "loss_G,": "loss_G + extra,",
        "pass": "D.requires_grad_(True)",
        "None": "update(opt_D, loss_D, scaler)",
        '"loss_G": loss_G + extra': '"loss_G": loss_G',
    },
}


@pytest.mark.parametrize("grader", MISTAKES)
def test_graders_refuse(grader):
    needs_exercises(*EXERCISES)
    function = dict(sum(EXERCISES.values(), []))[grader]
    source = textwrap.dedent(inspect.getsource(function))
    solutions = {"nothing": lambda *inputs, **options: None}
    for mistake, text in MISTAKES[grader].items():
        assert source.count(text) == 1, text
        module = dict(vars(sys.modules[function.__module__]))
        exec(source.replace(text, mistake), module)
        solutions[mistake] = module[function.__name__]
    for mistake, solution in solutions.items():
        try:
            grader(solution)
        except AssertionError as error:
            assert re.match("Algorithm 1|eq. |section 4", str(error)), mistake      # it must teach
        else:
            pytest.fail(f"{mistake} is accepted")


# ==============================================================================================
# The paper: gan_cls.py
# ==============================================================================================

def test_shapes():
    G = gan_cls.Generator()                                 # the paper's sizes
    assert G.net[0].weight.shape == (8 * 128 * 16, 228)     # 100 + 128 numbers to 4x4x1024
    x = G(torch.randn(2, 100), torch.randn(2, 1024))
    assert x.shape == (2, 3, 64, 64)
    assert x.abs().max() <= 1
    assert gan_cls.Discriminator().features(x).shape == (2, 512, 4, 4)
    assert gan_cls.StyleEncoder()(x).shape == (2, 100)


def test_initialisation():
    for net in (gan_cls.Generator(64), gan_cls.Discriminator(64)):
        for m in net.modules():
            if hasattr(m, "weight"):
                mean = 1 if "BatchNorm" in type(m).__name__ else 0
                assert abs(m.weight.mean() - mean) < 0.02 and 0.01 < m.weight.std() < 0.03
                assert m.bias is None or not m.bias.any()


def test_layers_of_D():
    """[A] 4.1: leaky ReLUs, of slope 0.2 in the authors' code; batch norm but on the first layer,
    and on the text as there; no biases in convolutions, which the authors hold at zero."""
    D = gan_cls.Discriminator(8)
    layers = " ".join(type(m).__name__ for m in [*D.text, *D.joint[:3], *D.features])
    assert layers.startswith("Linear BatchNorm1d LeakyReLU Conv2d BatchNorm2d LeakyReLU "
                             "Conv2d LeakyReLU Conv2d BatchNorm2d LeakyReLU Conv2d BatchNorm2d")
    assert set(re.findall(r"slope=([\d.]+)", str(D))) == {"0.2"}
    assert str(D).count("Conv2d(") == str(D).count("bias=False") - 1     # and the last layer


def test_residual_adds_its_input():
    block = gan_cls.Residual(3, 2, nn.ReLU())
    for p in block.f.parameters():
        p.data.zero_()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_is_near_full_precision(dtype):
    needs_exercises(6)
    losses = []
    for mixed in (False, True):
        nets = small_nets(torch.float32)
        losses.append(gan_cls.gan_cls_step(
            *nets, *[torch.optim.SGD(net.parameters(), 0.01) for net in nets],
            *small_batch(16, torch.float32), amp=torch.autocast("cpu", dtype, enabled=mixed)))
    full, mixed = [torch.stack(list(out.values())) for out in losses]
    assert not torch.equal(full, mixed) and torch.allclose(full, mixed, rtol=0.05, atol=0.05)


def test_augment_against_loops():
    def augmented(x):
        torch.manual_seed(0)
        return gan_cls.augment(x, shift=3)

    x = torch.rand(4, 3, 12, 12)
    got = augmented(x)
    torch.manual_seed(0)
    for image, result, draw in zip(x, got, torch.rand(4, 4).T.tolist()):
        image = image + 0.4 * (draw[0] - 0.5)               # brightness
        image = image.mean() + (image - image.mean()) * (0.8 + 0.4 * draw[1])   # contrast
        down = math.floor(7 * draw[2]) - 3                  # -3 .. 3, each as likely
        right = math.floor(7 * draw[3]) - 3
        for i, j in np.ndindex(12, 12):                     # the border is repeated
            expected = image[:, min(max(i + down, 0), 11), min(max(j + right, 0), 11)]
            assert torch.allclose(result[:, i, j], expected, atol=1e-5)
    assert torch.autograd.gradcheck(augmented, x[:1, :, :6, :6].double().requires_grad_(True))


def test_sharpen_against_loops():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = x.clone()
    for n, c, i, j in np.ndindex(*x.shape):
        around = x[n, c, max(0, i - 1):i + 2, max(0, j - 1):j + 2]      # fewer at the border
        expected[n, c, i, j] += 0.7 * (x[n, c, i, j] - around.mean())
    assert torch.allclose(gan_cls.sharpen(x, 0.7), expected)


def test_mode_seeking_is_a_mean_of_ratios():
    x1 = torch.zeros(2, 3, 8, 8)
    x2 = x1 + torch.tensor([0.1, 0.5])[:, None, None, None]             # two pairs of images
    loss = gan_cls.mode_seeking_loss(torch.zeros(2, 100), torch.ones(2, 100), x1, x2)
    assert loss.item() == pytest.approx((1 / 0.15 + 1 / 0.55) / 2)


def test_r1_penalty_against_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    first = (torch.randn(16, 5, dtype=torch.float64) / 4).requires_grad_(True)
    second = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def tiny_D(xh, first, second):
        return torch.tanh(xh @ first) @ second

    def penalty(first, second):
        return gan_cls.r1_penalty(
            lambda x, h: tiny_D(torch.cat([x.flatten(1), h], 1), first, second), x, h, 0.3, 0.03)

    expected = 0.0
    xh = torch.cat([x.flatten(1), h], 1)
    for i, step in enumerate(1e-5 * torch.eye(16, dtype=torch.float64)):
        difference = tiny_D(xh + step, first, second) - tiny_D(xh - step, first, second)
        weight = 0.3 if i < 12 else 0.03                            # 12 pixels, 4 numbers of h
        expected += weight * (difference / 2e-5).square().mean().item()
    assert penalty(first, second).item() == pytest.approx(expected, rel=1e-6)
    # Its own gradient, for D's weights, is a second derivative. It goes on to nothing else.
    assert torch.autograd.gradcheck(penalty, (first, second))
    penalty(first, second).backward()
    assert x.grad is None and h.grad is None


def test_ema_is_the_weighted_mean_of_weights_and_statistics():
    a = nn.BatchNorm1d(3)
    b = nn.BatchNorm1d(3)
    b.weight.data.fill_(5.0)
    b.running_mean.fill_(2.0)
    gan_cls.update_ema(a, b, 0.75)
    assert a.weight.tolist() == [2.0] * 3 and a.running_mean.tolist() == [0.5] * 3


# ==============================================================================================
# The text encoder: encoder.py
# ==============================================================================================

def small_phi(seed=0):
    torch.manual_seed(seed)
    return encoder.CharCNNRNN(8).eval()


def quick_encoder(ds, **options):
    """A text encoder trained for two steps."""
    needs_exercises(3)
    return encoder.train_encoder(ds, **dict(dict(steps=2, cnn_dim=8, log=silent), **options))


def save_features(path, rows=20):
    np.save(path, np.random.default_rng(0).normal(size=(rows, 1024)).astype(np.float16))
    return path


@pytest.fixture
def unwhitened(monkeypatch):
    """`whiten` takes half a second. Most tests do not need it."""
    monkeypatch.setattr(encoder, "whiten", lambda *inputs: None)


def test_alphabet():
    assert len(encoder.ALPHABET) == 70 and encoder.ALPHABET.count("-") == 2
    assert encoder.encode_text(["aZ 9"])[0].tolist() == [1, 26, 70, 36] + 197 * [0]
    assert encoder.encode_text(["é\x7f日🐦\n"]).sum() == 0              # letters that it lacks
    assert encoder.encode_text(["İ" * 201]).shape == (1, 201)           # two letters in lower case
    for letter in encoder.ALPHABET:
        assert encoder.ALPHABET[encoder.encode_text([letter])[0, 0] - 1] == letter


def slow_phi(state, tokens):
    """[B] section 4 in loops, float64: one caption's (201,) letters -> (1024,)."""
    state = {key: value.double().numpy() for key, value in state.items()}
    x = np.eye(71)[tokens].T[1:]                                # (70, 201)
    for name, pool in (("cnn.0", 3), ("cnn.3", 3), ("cnn.6", 1)):
        columns = []
        for t in range(x.shape[1] - 3):
            column = np.einsum("oik,ik->o", state[name + ".weight"], x[:, t:t + 4])
            columns.append(np.maximum(0, column + state[name + ".bias"]))
        x = np.stack(columns, 1)
        x = np.stack([x[:, t:t + pool].max(1) for t in range(0, x.shape[1], pool)], 1)

    assert x.shape == (8, 18)
    h = np.zeros(8)
    total = np.zeros(8)
    for t in range(18):
        a = state["rnn.weight_ih_l0"] @ x[:, t] + state["rnn.bias_ih_l0"]
        b = state["rnn.weight_hh_l0"] @ h + state["rnn.bias_hh_l0"]
        reset, update = 1 / (1 + np.exp(-(a + b)[:16].reshape(2, 8)))
        new = np.tanh(a[16:] + reset * b[16:])
        h = (1 - update) * new + update * h
        total += h
    return state["out.weight"] @ (total / 18) + state["out.bias"]


@pytest.mark.parametrize("length", [0, 1, 55, 144, 145, 201])
def test_char_cnn_rnn_against_loops(length):
    """Alone, where the time steps behind it are not computed, and beside a longer caption."""
    phi = small_phi()
    assert all(p.abs().max() <= 0.08 for p in phi.parameters())
    text = ("This bird, 日本, has wings that are black, and a yellow crown! " * 4)[:length]
    tokens = encoder.encode_text([text, "x" * 201])
    wanted = slow_phi(phi.state_dict(), tokens[0].tolist())
    gradients = []
    for out in (phi(tokens[:1])[0], phi(tokens)[0]):
        assert np.allclose(out.detach().numpy(), wanted, atol=1e-6)
        gradients.append(torch.autograd.grad(out.square().sum(), phi.parameters()))
    for alone, beside in zip(*gradients):
        assert torch.allclose(alone, beside, rtol=1e-4, atol=1e-6)


def test_eq3_eq4_and_ap_at_50_against_loops(monkeypatch):
    """`evaluate` on 8 classes of 8 images, with a phi and features that know something."""
    ds = random_data()
    ds.unseen_classes[:] = True
    ds.captions = [[f"{i} a", f"{i} b"] for i in range(64)]
    g = torch.Generator().manual_seed(0)
    of_class = 0.08 * torch.randn(8, 1024, generator=g)[ds.labels]
    features = of_class + torch.randn(64, 1024, generator=g)
    phi_of = {}
    for i in range(64):
        for text in ds.captions[i]:
            phi_of[text] = of_class[i] + torch.randn(1024, generator=g)
    monkeypatch.setattr(encoder, "frozen_features", lambda ds, path: features)
    monkeypatch.setattr(encoder, "embed", lambda phi, texts, precision="fp32": torch.stack(
        [phi_of[text] for text in texts]))

    images_of = [np.flatnonzero(ds.labels == c) for c in range(8)]
    captions_of = [encoder.captions_of(ds, images) for images in images_of]

    def score(image, text):
        return float(features[image].double() @ phi_of[text].double())

    def image_score(i, c):
        return np.mean([score(i, text) for text in captions_of[c]])

    def text_score(i, c):               # of the first caption of image i
        return np.mean([score(image, ds.captions[i][0]) for image in images_of[c]])

    eq3 = [max(range(8), key=lambda c: image_score(i, c)) == ds.labels[i] for i in range(64)]
    eq4 = [max(range(8), key=lambda c: text_score(i, c)) == ds.labels[i] for i in range(64)]
    found = []
    for c in range(8):
        best = sorted(range(64), key=lambda i: -image_score(i, c))[:50]
        found.append(np.mean(ds.labels[best] == c))
    wanted = [np.mean(eq3), np.mean(eq4), np.mean(found), 1 / 8]
    assert len(set(wanted)) == 4 and 0 < min(wanted) <= max(wanted) < 1
    measured = encoder.evaluate(ds, small_phi(), encoder.ImageEncoder("features"))
    assert list(measured.values()) == pytest.approx(wanted, abs=1e-6)


def test_whitening_changes_no_score():
    torch.manual_seed(0)
    colours = ("red", "blue", "black", "white", "yellow")
    texts = [f"a {colours[i // 5]} bird with {colours[i % 5]} wings" for i in range(25)]
    for side, x in (("conv", torch.rand(6, 3, 64, 64)), ("features", torch.randn(6, 1024))):
        v = encoder.ImageEncoder(side).eval()
        phi = encoder.CharCNNRNN(16)
        before = v(x) @ encoder.embed(phi, texts).T
        encoder.whiten(phi, v, texts)
        h = encoder.embed(phi, texts)
        assert float(h.square().mean()) == pytest.approx(0.25, rel=1e-2)
        assert (v(x) @ h.T - before).abs().max() < 0.02 * before.abs().max()
        values = torch.linalg.eigvalsh(torch.cov(h.T))
        assert values[-1] < 0.5 * values.sum()          # before, one direction held most of it
        assert (values > 0.5 * values[-1]).sum() >= 7   # and now several have as much


@pytest.mark.parametrize("rows, message", [
    (np.zeros((19, 1024), np.float32), r"float32 \(19, 1024\): expected .*\(20, 1024\)"),
    (np.zeros((20, 1000), np.float32), r"\(20, 1000\)"),
    (np.zeros((20, 1024), np.int64), "holds int64"),
    (np.full((20, 1024), np.nan, np.float32), "not finite"),
    (np.zeros((20, 1024), np.float32), "all the same"),
    (None, "cannot read features")])
def test_files_of_features_that_do_not_fit_are_refused(here, rows, message):
    if rows is not None:
        np.save("f.npy", rows)
    with pytest.raises(data.UserError, match=message):
        encoder.frozen_features(small_data(here), "f.npy")


def test_features_are_centred_and_scaled_by_the_training_images(here):
    ds = small_data(here)
    ds.rows = ds.rows[::-1].copy()              # the source's order is not ours
    rows = np.load(save_features("f.npy", 25))  # the source has 5 images more, which were left out
    rows = torch.from_numpy(rows[ds.rows].astype(np.float32))
    features = encoder.frozen_features(ds, "f.npy")
    train = features[ds.training_images()]
    assert train.mean(0).abs().max() < 1e-6
    assert float(train.norm(dim=1).mean()) == pytest.approx(1)
    assert torch.cosine_similarity(features[3] - features[7], rows[3] - rows[7], 0) > 0.999


# ---- Training phi ----------------------------------------------------------------------------

def test_pairs_are_of_different_classes(here, monkeypatch):
    """Here an image's captions are its number, and its feature is its class, in which it may be
    mixed with another image."""
    ds = small_data(here, classes=8, each=3)
    ds.captions = [["a bird"] * (1 + i % 3) for i in range(24)]
    monkeypatch.setattr(encoder, "DROP", 0.0)
    numbers = np.repeat(range(24), [len(captions) for captions in ds.captions])
    batches = data.Batches(ds, torch.from_numpy(numbers), "cpu")
    features = torch.from_numpy(ds.labels)[:, None].float()
    seen = set()
    for _ in range(100):
        x, images = encoder.draw_pairs(batches, 4, features)
        assert torch.allclose(x, features[images])
        assert len(set(ds.labels[images])) == 4                 # four classes
        seen.update(images.tolist())
    assert seen == set(ds.training_images())                    # any of them comes up


def test_loss_in_32_bits_and_gradients_clipped(here, unwhitened, monkeypatch):
    loss = encoder.joint_embedding_loss
    seen = []

    def watched_loss(image_emb, text_emb):
        seen.append((text_emb.dtype, torch.is_autocast_enabled("cpu")))
        return 1e6 * loss(image_emb, text_emb)

    def watched_step(self):
        gradients = [p.grad.flatten() for p in self.param_groups[0]["params"]]
        seen.append(float(torch.cat(gradients).norm()))

    monkeypatch.setattr(encoder, "joint_embedding_loss", watched_loss)
    monkeypatch.setattr(torch.optim.RMSprop, "step", watched_step)
    quick_encoder(small_data(here), steps=1, precision="bf16")
    assert seen == [(torch.bfloat16, False), pytest.approx(5, rel=1e-3)]


@pytest.mark.parametrize("options", [dict(image_features="f.npy"), dict(anneal=True), dict()])
def test_what_is_kept_is_the_average_and_its_scores(here, monkeypatch, options):
    """phi and v of the checkpoint score as before `whiten`. With given features, or `anneal`, they
    are the averages of the weights, and the rate falls in a straight line."""
    save_features("f.npy")
    x = torch.randn(3, 1024) if "image_features" in options else torch.rand(3, 3, 64, 64)
    texts = ["a red bird", "a bird"]
    before = []
    rates = []
    whiten = encoder.whiten
    step = torch.optim.RMSprop.step

    def watched(phi, v, *others):
        before.append((copy_of(phi), v(x) @ encoder.embed(phi, texts).T))
        if len(before) == 1:
            whiten(phi, v, *others)
    monkeypatch.setattr(encoder, "whiten", watched)
    monkeypatch.setattr(torch.optim.RMSprop, "step", lambda self: (
        rates.append(self.param_groups[0]["lr"]) or step(self)))
    ds = small_data(here)
    phi, v = encoder.build(quick_encoder(ds, steps=6, **options))
    assert torch.allclose(v(x) @ encoder.embed(phi, texts).T, before[0][1], rtol=0.02)
    falling = [1, 1, 1, 0.05 + 0.95 * 2 / 3, 0.05 + 0.95 / 3, 0.05]
    assert rates == pytest.approx([7e-4 * share for share in falling] if options else [7e-4] * 6)
    monkeypatch.setattr(encoder, "EMA", 0.0)                    # the last weights alone
    for seed in (0, 1):
        quick_encoder(ds, steps=6, seed=seed, **options)
    average, last, other = [weights for weights, _ in before]
    assert same(average, last) == (not options) and not same(last, other)


# ---- What phi reads of a text, and the table of all captions ---------------------------------

@pytest.mark.parametrize("what, refused, said", [
    # Captions to train on.
    (["小鸟 是 红色", "🐦 🐦"], r"none of the 2 training captions has a letter .*小鸟", None),
    (["a bird", "A bird"], r"all 2 training captions are the same .*'a bird'", None),
    (["x" * 201 + "red", "x" * 201 + "blue"], "all 2 .*reads 201 letters", None),
    (["é, 12", "a", "b"], None, "reads 66.7% .*; 0 of 3 captions"),
    (["x" * 202, "b"], None, "reads 100.0% .*; 1 of 2 captions are cut"),
    # A text to draw from.
    ("An all BLACK bird, 2 wings!\n", None, None), (" \n\t ", "empty text", None),
    ("красная птица, 1.", "knows no letter of", None),
    ("une tête rouge ✓", None, "only a part .*: ê ✓$"),
    ("a red bird " * 30, None, "only the first 201 letters of 330")])
def test_what_phi_cannot_read_is_refused_or_said(what, refused, said):
    """It is refused, or `said` in one line, or read without a word."""
    check = encoder.check_text if isinstance(what, str) else encoder.check_captions
    lines = []
    refusal = pytest.raises(data.UserError, match=refused)
    with refusal if refused else contextlib.nullcontext():
        check(what, lines.append)
    assert len(lines) == bool(said) and all(re.search(said, line) for line in lines)


def test_caption_table_is_kept_and_read(here, monkeypatch):
    """Its name changes with weights, precision, captions, and with the code down to `embed`."""
    ds = small_data(here)
    names = set()

    def kept(seed=0, precision="fp32"):
        """Makes a table, and reads it. The file, the only one, is left damaged."""
        phi = small_phi(seed)
        table = encoder.caption_table(ds, phi, precision, silent)
        slow = phi(encoder.encode_text(encoder.captions_of(ds, range(20))))
        assert torch.allclose(table.float(), slow, atol=2e-2 if precision == "bf16" else 1e-3)
        assert torch.equal(table[0], table[8]) == (ds.captions[0] == ds.captions[4])
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "embed", None)       # the second time nothing is computed
            assert torch.equal(encoder.caption_table(ds, phi, precision), table)
        path, = data.CACHE.glob("*captions-*.npy")
        path.write_bytes(path.read_bytes()[:-100])      # and so it is computed again
        names.add(path.name)
        return len(names)

    assert [kept(), kept(), kept(seed=1), kept(precision="bf16")] == [1, 1, 2, 3]
    ds.captions[0] = ds.captions[4]
    assert kept() == 4
    code = Path(encoder.__file__).read_text()
    monkeypatch.setattr(encoder, "__file__", "changed.py")
    Path("changed.py").write_text(code + "# more")
    assert kept() == 4
    Path("changed.py").write_text(code.replace("MAX_LETTERS = 201", "MAX_LETTERS = 20"))
    assert kept() == 5


def test_an_encoder_of_other_captions_is_refused(here, short_training):
    ds = small_data(here)
    encoder.get_encoder(ds, log=silent)
    ds.captions[0] = ["a caption that was mended"]
    with pytest.raises(data.UserError, match="runs.*own-mine.*other captions.*has now: remove it"):
        encoder.get_encoder(ds, log=silent)
    ds.labels = np.zeros_like(ds.labels)
    with pytest.raises(data.UserError, match="at least two"):
        quick_encoder(ds)


def shipped_weights(folder, ds):
    """Files as in weights/: phi and v in half precision inside the checkpoint of a run."""
    save_features("f.npy")
    trained = quick_encoder(ds, image_features="f.npy")
    for part in ("phi", "v"):
        trained[part] = {key: value.half() for key, value in trained[part].items()}
    for name in ("cub", "flowers", "toy"):
        data.save_checkpoint(folder / f"{name}.pt", kind="gan-cls", settings={}, encoder=trained)
    del trained["v"]
    data.save_checkpoint(folder / "bare.pt", kind="gan-cls", settings={}, encoder=trained)


@pytest.mark.parametrize("name, file, side", [
    ("cub", "cub.pt", None), ("cub-box", "cub.pt", None), ("flowers", "flowers.pt", None),
    ("toy", None, None), ("cub", None, "conv")])
def test_the_phi_given_away_is_the_default(here, monkeypatch, short_training, name, file, side):
    """One is trained, once, where none is given away, or where an image side is asked for."""
    ds = small_data(here)
    shipped_weights(here / "given", ds)
    monkeypatch.setattr(encoder, "WEIGHTS", here / "given")
    short_training.clear()
    ds.name = name
    lines = []
    found = encoder.get_encoder(ds, image_side=side, log=lines.append)
    assert same(encoder.get_encoder(ds, log=silent), found)
    assert len(short_training) == (file is None)
    if file:
        assert same(found, encoder.encoder_in(here / "given" / file)) and file in lines[0]
    assert all(p.dtype == torch.float32 for net in encoder.build(found) for p in net.parameters())


# ==============================================================================================
# Data: data.py
# ==============================================================================================

def check_form(ds, images, classes, unseen):
    """The form in which every data set comes."""
    assert ds.images.shape == (images, 76, 76, 3) and ds.images.dtype == np.uint8
    assert len(ds.captions) == len(ds.labels) == len(ds.rows) == images
    assert all(captions and all(map(str.strip, captions)) for captions in ds.captions)
    assert len(ds.class_names) == classes and ds.unseen_classes.sum() == unseen
    training = ds.training_images()
    held_out = ds.unseen_images()
    assert sorted([*training, *held_out]) == list(range(images))
    assert not set(ds.labels[training]) & set(ds.labels[held_out])      # class-disjoint


def check_colours(ds):
    """Each image has the colour of its class, so none is another one's."""
    for pixels, label in zip(ds.images, ds.labels):
        assert np.abs(pixels.astype(int) - COLOUR_BYTES[label]).max() < 8


def test_crops_are_the_windows_and_pixels_again():
    images = torch.randint(0, 256, (2, 76, 76, 3), dtype=torch.uint8)
    x = data.crops(images, torch.tensor([1, 0]), torch.tensor([3, 12]), torch.tensor([5, 0]),
                   torch.tensor([False, True]))
    left, right = torch.from_numpy(data.to_pixels(x))
    assert torch.equal(left, images[1, 3:67, 5:69])
    assert torch.equal(right, images[0, 12:76, 0:64].flip(1))
    x = data.centre_crops(images, torch.arange(2))
    assert np.array_equal(data.to_pixels(x), images[:, 6:70, 6:70])
    assert x.min() == -1 and x.max() == 1 and set(data.to_pixels(9 * x.sign()).ravel()) == {0, 255}


def test_random_crops_reach_every_window_and_both_directions():
    place = torch.arange(76, dtype=torch.uint8)
    image = torch.stack(torch.meshgrid(place, place, place[:1], indexing="ij"), 2)[..., 0]
    x = data.random_crops(image[None], torch.zeros(2000, dtype=torch.long))
    x = ((x + 1) * 127.5).round()                           # tells where each pixel was
    for axis in (0, 1):
        assert set(x[:, axis].amin((1, 2)).tolist()) == set(range(13))
    assert 0.4 < (x[:, 1, 0, 0] > x[:, 1, 0, 63]).float().mean() < 0.6


def test_another_class_is_any_other_with_equal_chance():
    own = torch.arange(5).repeat(8000)
    other = data.draw_other_class(own, 5)
    counts = torch.bincount(5 * own + other, minlength=25).view(5, 5)
    assert (counts.diagonal() == 0).all()                   # never the own one
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert others.min() > 1800 and others.max() < 2200      # 2,000 each
    assert (data.draw_other_class(torch.zeros(9, dtype=torch.long), 2) == 1).all()


def batches_that_say(ds, values, captions=(1, 1)):
    """Batches whose embeddings are one number each: `values`, of all captions in order."""
    table = torch.as_tensor(np.asarray(values))[:, None].half()
    return data.Batches(ds, table, "cpu", captions)


def test_a_batch_has_right_texts_and_wrong_ones_of_other_classes(here):
    ds = small_data(here)
    batches = batches_that_say(ds, ds.labels.repeat(2))     # each image has two captions
    assert len(batches) == 16
    classes = torch.from_numpy(ds.labels[batches.training_images])
    assert (classes.diff() >= 0).all()                      # class by class
    seen = set()
    for _ in range(50):
        positions = torch.randint(len(batches), (64,))
        x, h, h_wrong = batches.batch(positions)
        assert torch.equal(h[:, 0], classes[positions].float())
        assert (h != h_wrong).all()
        seen |= set(zip(h[:, 0].tolist(), h_wrong[:, 0].tolist()))
    assert len(seen) == 4 * 3                               # every other training class
    colours = torch.tensor(COLOUR_BYTES)[h[:, 0].long()] / 127.5 - 1
    assert x.shape == (64, 3, 64, 64) and torch.allclose(x.mean((2, 3)), colours, atol=0.05)


@pytest.mark.parametrize("captions, sixtieths", [
    ((1, 1), {0, 60}), ((4, 4), {0, 15, 30, 45, 60}),
    ((1, 3), {0, 20, 30, 40, 60})])                         # of one, two or three captions
def test_text_of_an_image_is_a_mean_of_its_own_captions(here, captions, sixtieths):
    ds = small_data(here)
    # Of each image's two captions the first says 0, the second 1.
    h = batches_that_say(ds, np.arange(40) % 2, captions).texts(torch.tensor([2] * 4000))
    assert h.dtype == torch.float32 and abs(h.mean() - 0.5) < 0.05
    assert set((h[:, 0] * 60).round().int().tolist()) == sixtieths
    own = batches_that_say(ds, np.arange(40) // 2, captions).texts(torch.arange(20))
    assert own[:, 0].tolist() == list(range(20))


def test_examples_are_of_unseen_classes_and_then_of_trained_ones(toy, here):
    assert data.example_images(toy, 6) == [6746, 6942, 7450, 6172, 6108, 6143]
    few = small_data(here, classes=9, each=1)               # two of them unseen
    unseen = few.unseen_classes[few.labels[data.example_images(few)]]
    assert unseen.tolist() == [True, True, False, False, False, False]


# ---- The toy birds ---------------------------------------------------------------------------

def test_toy(toy):
    check_form(toy, 8000, 200, 50)
    assert all(len(captions) == 10 for captions in toy.captions)
    assert (np.bincount(toy.labels) == 40).all()
    assert toy.digest() == "e9553dfe961c0f68"       # weights/toy.pt was trained on these captions

    # Any two species differ in two colours or more; those of one colour are trained on.
    colours = np.array([name.split(".")[1].split("-") for name in toy.class_names])
    apart = (colours[:, None] != colours).sum(2) + 4 * np.eye(200)
    assert apart.min() == 2
    assert not toy.unseen_classes[(colours == colours[:, :1]).all(1)].any()

    # Style is in no caption.
    words = set(" ".join(sum(toy.captions, [])).split())
    assert not words & {"left", "right", "sky", "background", "branch", "large", "facing"}
    assert 0.45 < (toy.keypoints[:, 0, 0] > toy.keypoints[:, 5, 0]).mean() < 0.55


# ---- CUB and Oxford-102 ----------------------------------------------------------------------

@pytest.mark.parametrize("images_as, captions_as, text", [
    ("CUB_200_2011.tgz", "cvpr2016_cub.tar.gz", "./cvpr2016_cub/text_c10/{kind}/{file}"),
    ("", "", "cvpr2016_cub/text_c10/{kind}/{file}"),
    ("", "caption-data-cub-v1.0.0.zip", "captions/{file}"),
    ("", "", "text/{kind}/{file}"),                             # AttnGAN's
    ("", "birds.zip", "birds/text/{kind}/{file}")])             # DF-GAN's
def test_every_layout_of_cub_gives_the_same(here, images_as, captions_as, text):
    images, captions = cub_files(text)
    images["CUB_200_2011/segmentations/001.Albatross/Albatross_0000.png"] = b"no photograph"
    written(here / images_as, images)
    written(here / captions_as, captions)
    ds = data.load("cub", here)
    check_form(ds, 12, 4, 2)
    check_colours(ds)
    assert ds.skipped == []
    assert ds.class_names == ["001.Albatross", "002.Auk", "003.Ani", "004.Bunting"]
    assert ds.unseen_classes.tolist() == [True, False, False, True]
    assert ds.rows.tolist() == list(range(12)) and ds.labels[0] == 3    # images.txt's order
    assert ds.captions[0] == ["a bird of kind 3", "it has number 2"]
    assert np.allclose(ds.boxes[0], [10, 10, 20, 50])           # 152x76 became 76x76: x halves
    parts = [[part / 2, 2 * part] for part in (2, 3, 4, 5, 6)]
    assert np.allclose(ds.keypoints[0][:5], parts)
    assert np.isnan(ds.keypoints[0][5]).all()                   # part 14 is not visible


def test_cub_box_shows_the_square_around_the_bird(here):
    images, captions = cub_files()
    photo = Image.new("RGB", (152, 76), "white")
    photo.paste("red", (20, 10, 60, 60))
    images["CUB_200_2011/images/004.Bunting/Bunting_0002.jpg"] = saved(photo, "PNG")    # row 0
    ds = data.load("cub-box", written(here, {**images, **captions}))
    scale = 76 / 70                                         # the square of 70 became 76
    x, y, w, h = ds.boxes[0]
    assert np.allclose(ds.boxes[0], np.array([15, 10, 40, 50]) * scale, atol=1e-4)
    red = np.argwhere(ds.images[0][..., 1] < 128)           # the box lies where the bird does
    assert np.allclose([*red.min(0), *red.max(0) + 1], (y, x, y + h, x + w), atol=1)
    assert np.allclose(ds.keypoints[0][0], [(2 - 5) * scale, 4 * scale], atol=1e-4)
    shutil.rmtree(here / "CUB_200_2011")                    # the files need not stay
    assert np.array_equal(data.load("cub-box").images, ds.images)


@pytest.mark.parametrize("folder", ["text_c10/class_{:05d}/", "captions/class_{:04d}/"])
def test_flowers(here, folder):
    files = {"text_c10/testclasses.txt": b"class_00020"}
    for i in range(1, 10):                          # class 20 is unseen, 21 to 23 are not
        files[f"jpg/image_{i:05d}.jpg"] = jpeg(COLOUR_BYTES[i % 4])
        name = folder.format(20 + i % 4) + f"image_{i:05d}.txt"
        files[name] = b"this flower is nice\n{}\nv\n"
    files.update({"jpg/image_00000.jpg": jpeg(), "jpg/image_00009.jpg": b"broken"})
    ds = data.load("flowers", written(here, files))
    check_form(ds, 8, 4, 1)
    check_colours(ds)
    assert ds.captions[0] == ["this flower is nice"]        # "{}" and "v" are no captions
    assert ds.unseen_classes.tolist() == [True, False, False, False]
    assert ds.boxes is None and ds.keypoints is None
    assert ds.rows.tolist() == list(range(1, 9))            # image 0 has no caption, but a row
    assert [line.split(":")[0] for line in ds.skipped] == ["image_00000.jpg", "image_00009.jpg"]


@pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not here")
@pytest.mark.parametrize("name, form, digest", [
    ("cub", (11788, 200, 50), "c5b85ac2fec33596"),
    ("flowers", (8189, 102, 20), "a25855bb4e597c30")])
def test_real_data(here, name, form, digest):
    ds = data.load(name, SHARED)
    check_form(ds, *form)
    assert ds.digest() == digest and not ds.skipped


# ---- A folder of your own, in the layouts people have ----------------------------------------

def own_data(image, text=None):
    """{name: bytes} of two images each of 4 classes, with two captions each.

    image, text: patterns of their names. text=None: without captions.
    """
    files = {}
    for c in range(4):
        for i in range(2):
            files[image.format(c=c, i=i)] = jpeg(COLOUR_BYTES[c], kind="PNG")
            if text:
                files[text.format(c=c, i=i)] = f"colour {c}, red\nimage {i}".encode()
    return files


def own_table(name, line, header=""):
    """The same captions as a table: {its name: bytes}. line: the pattern of a row."""
    lines = [header] if header else []
    for c in range(4):
        for i in range(2):
            for text in (f"colour {c}, red", f"image {i}"):
                lines.append(line % (f"kind{c}/p{i}.png", text))
    return {name: "\n".join(lines).encode("utf-8-sig")}


IMAGES = own_data("kind{c}/p{i}.png")
OWN_LAYOUTS = {
    "beside": own_data("kind{c}/p{i}.png", "kind{c}/p{i}.txt"),
    "images and text": own_data("images/kind{c}/p{i}.png", "text/kind{c}/p{i}.txt"),
    "below each class": own_data("kind{c}/images/p{i}.png", "kind{c}/captions/p{i}.txt"),
    "either case": own_data("kind{c}/P{i}.PNG", "KIND{c}/p{i}.TXT"),
    "accents of a Mac": own_data("kind{c}/vo\u0308gel{i}.png", "kind{c}/vögel{i}.txt"),
    "one folder around": own_data("all/kind{c}/p{i}.jfif", "all/kind{c}/p{i}.txt"),
    "hidden files": {
        **own_data("kind{c}/p{i}.png", "kind{c}/p{i}.txt"),
        ".ipynb_checkpoints/p0.png": jpeg(), ".ipynb_checkpoints/p0.txt": b"not data",
        "__MACOSX/kind0/._p0.png": b"fork"},
    "csv": {**IMAGES, **own_table("metadata.csv", '%s,"%s"', "file_name,text")},
    "csv of Excel": {**IMAGES, **own_table("metadata.csv", "%s;%s", "File_Name; caption")},
    "csv without quotes": {**IMAGES, **own_table("metadata.csv", "%s,%s", "file_name,text")},
    "jsonl": {**IMAGES, **own_table("metadata.jsonl", '{"file_name": "%s", "text": "%s"}')},
    "jsonl in a folder": {
        **own_data("data/kind{c}/p{i}.png"),
        **own_table("data/metadata.jsonl", '{"file_name": "./%s", "caption": ["%s"]}')},
}


@pytest.mark.parametrize("name", ["mine", "mine.zip", "mine.tar.gz"])
@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_every_layout_of_an_own_folder_gives_the_same(here, layout, name):
    ds = data.load(str(written(here / name, OWN_LAYOUTS[layout])))
    check_form(ds, 8, 4, 1)
    check_colours(ds)
    assert [name.lower() for name in ds.class_names] == ["kind0", "kind1", "kind2", "kind3"]
    assert ds.skipped == []
    for n, captions in enumerate(ds.captions):
        assert captions == [f"colour {n // 2}, red", f"image {n % 2}"]


@pytest.mark.parametrize("tops, classes, unseen", [
    # The folders of four images, how many classes they are, and the unseen ones; "?": by chance.
    ("train/a test/b train/c test/d", 4, "bd"), ("train/a Validation/b train/c dev/d", 4, "bd"),
    ("train_images/a test_images/b train_images/c test_images/d", 4, "bd"),
    ("train_images/a test_images/b train_images/c test_images/a", 3, "?"),
    ("train/a test/A train/c test/d", 4, "?"),              # the same on some disks
    ("train/a test/a train/c more/d", 3, "?")])             # what lies beside is neither
def test_train_and_test_are_the_split_where_they_share_no_class(here, tops, classes, unseen):
    for i, top in enumerate(tops.split()):
        written(here / "mine", {f"{top}/{i}.png": jpeg(), f"{top}/{i}.txt": b"some text"})
    ds = data.load("mine")
    held_out = "".join(np.array(ds.class_names)[ds.unseen_classes])
    assert len(ds.class_names) == classes
    assert held_out == unseen if unseen != "?" else "not taken as the split" in ds.skipped[0]


def test_what_cannot_be_used_is_listed_with_the_reason(here, capsys):
    mine = written(own_folder(here / "mine"), {
        "phone.heic": b"\0\0\0\x18ftypheic", "phone.txt": b"from a phone",
        "bare.png": jpeg(),
        "blank.png": jpeg(), "blank.txt": b"\n{}\n",
        "two.png": jpeg(), "two.jpg": jpeg(), "two.txt": b"of which?",
        "alone.txt": b"no image here",
        "metadata.jsonl": b'{"file_name": "gone/1.png", "text": "a bird"}'})
    (mine / "film.mp4").touch()
    os.truncate(mine / "film.mp4", 1 << 40)                 # neither image nor caption: not read
    for _ in range(2):                                      # built, and read again
        ds = data.load(str(mine))
        listed, = Path("cache").glob("own-mine-*-skipped.txt")
        assert f"(7 in all) is in {listed}" in capsys.readouterr().out
        assert listed.read_text().splitlines() == ds.skipped
    check_form(ds, 20, 5, 1)
    several = "several images have this name, so no caption"
    bare = "no caption of 3 letters or more"
    unreadable = "not an image, or of a kind that this Pillow cannot read"
    assert dict(line.split(": ") for line in ds.skipped) == {
        "phone.heic": unreadable, "bare.png": bare, "blank.png": bare,
        "two.png": several, "two.jpg": several, "alone.txt": "no image", "gone/1.png": "no image"}


@pytest.mark.parametrize("content, captions", [
    ("a bird\r\n\r\n  \n two  birds ".encode(), ["a bird", "two birds"]),
    ("\ufeffa bird".encode(), ["a bird"]),
    ("\n".join(map("bird {}".format, range(200))).encode(),
     [f"bird {i}" for i in range(data.MAX_CAPTIONS)])])
def test_captions_of_a_file(here, content, captions):
    ds = data.load(str(written(here / "mine", {"a.png": jpeg(), "a.txt": content})))
    assert ds.captions == [captions]


@pytest.mark.parametrize("mode, colour, kind, expected", [
    ("RGBA", (0, 0, 0, 0), "PNG", 255),                     # what is transparent is laid on white
    ("LA", (100, 255), "PNG", 100), ("P", 0, "GIF", 0), ("CMYK", (0, 0, 0, 0), "JPEG", 255)])
def test_images_of_other_modes(mode, colour, kind, expected):
    pixels, _ = data.read_image(saved(Image.new(mode, (50, 90), colour), kind))
    assert pixels.shape == (76, 76, 3) and set(pixels.ravel()) == {expected}


def test_images_are_turned_as_their_exif_says():
    exif = Image.Exif()
    exif[274] = 3                                                   # upside down
    black_above = Image.linear_gradient("L").convert("RGBA")
    pixels, _ = data.read_image(saved(black_above, "PNG", exif=exif))
    assert pixels[0].min() > 200 and pixels[-1].max() < 50


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"    # a program
@pytest.mark.parametrize("content, message", [
    (b"GIF89a", "read"), (jpeg()[:200], "read"), (POSTSCRIPT, "cannot read"),
    (saved(Image.new("I;16", (9, 9)), "PNG"), "more than 8 bits")])
def test_no_image(content, message):
    with pytest.raises(ValueError, match=message):
        data.read_image(content)


@pytest.mark.parametrize("name", ["mine.zip", "mine.tar.gz"])
def test_a_broken_archive_is_refused_or_changes_nothing(here, name):
    """Every cut of it is refused, in one line. Changed bytes may be such as nobody reads."""
    rng = random.Random(0)
    files = {}
    for kind in "ab":
        files[f"{kind}/1.png"] = saved(Image.new("L", (9, 9), ord(kind)), "PNG")
        files[f"{kind}/1.txt"] = f"kind {kind}, {rng.randbytes(60).hex()}".encode()
    content = written(here / name, files).read_bytes()
    whole = data.load(name)
    broken = [content[:cut] for cut in range(len(content))]
    broken += [mutated(rng, content) for _ in range(200)]
    for number, part in enumerate(broken):
        (here / name).write_bytes(part)
        try:
            ds = data.load(name)
        except data.UserError as error:
            assert "\n" not in str(error)
        else:
            assert number >= len(content) and ds.digest() == whole.digest()
            assert np.array_equal(ds.images, whole.images)
    TALLY["broken inputs tried"] += len(broken)


@pytest.mark.parametrize("name", ["mine.zip", "mine.tar.gz"])
def test_nothing_in_an_archive_leads_outside_or_fills_the_disk(here, name, monkeypatch):
    monkeypatch.setattr(data, "MAX_TOTAL", 30_000)
    names = ["x.txt", "../out1.txt", f"{here}/out2.txt", "a/../../../out3.txt"]
    written(here / name, {"x.png": jpeg(), **dict.fromkeys(names, b"a bird")})
    data.load(name)
    assert list(here.parent.rglob("out?.txt")) == []
    written(here / name, {"x.png": bytes(20_000), "x.txt": bytes(20_000)})
    with pytest.raises(data.UserError, match="too large"):
        data.load(name)


@pytest.mark.parametrize("spoiled", ["CUB_200_2011.tgz", "birds.zip"])
@pytest.mark.parametrize("spoil", [
    None, Path.unlink, lambda path: path.write_bytes(b"?"), lambda path: os.truncate(path, 1000)])
def test_what_is_not_there_is_fetched_once_and_whole(here, monkeypatch, spoil, spoiled):
    sources = []
    for name, files in zip(("CUB_200_2011.tgz", "birds.zip"), cub_files()):
        path = written(here / name, files)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if "tgz" in name else None
        sources.append((name, path.as_uri(), sha256))
    monkeypatch.setitem(data.DATASETS, "cub", (data.DATASETS["cub"][0], sources))
    if spoil:
        spoil(here / spoiled)
        with pytest.raises(data.UserError, match=f"{spoiled} cannot be fetched.*--from"):
            data.load("cub")
        assert os.listdir("cache/downloads") == ["CUB_200_2011.tgz"] * (spoiled == "birds.zip")
    else:
        data.load("cub")
        shutil.rmtree("cache/downloads")
        check_form(data.load("cub"), 12, 4, 2)


@pytest.mark.parametrize("old, changes", [
    ("class Batches", False), ("def save_checkpoint", False), ("COLOURS = {", True),
    ("def build_folder", True), ("def read_image(", True), ("    write_atomically(path", True)])
def test_a_cache_depends_on_the_code_that_builds_it(here, monkeypatch, old, changes):
    small_data(here)
    before = list(Path("cache").glob("*.npz"))
    code = Path(data.__file__).read_text()
    assert old in code
    (here / "changed.py").write_text(code.replace(old, old + " "))
    monkeypatch.setattr(data, "__file__", "changed.py")
    data.load("mine")
    assert (list(Path("cache").glob("*.npz")) != before) == changes


def test_a_cache_depends_on_its_files_and_their_folder(here):
    text = own_folder(here / "mine") / "kind0/p0.txt"
    times = []
    for content in (None, None, "another colour"):
        if content:
            text.write_text(content)
        assert data.load("mine").captions[0][0] == (content or "colour 0")
        cache, = Path("cache").glob("*.npz")                # an older one is gone
        times.append(cache.stat().st_mtime_ns)
    assert times[0] == times[1] != times[2]                 # the second time it was not built
    own_folder(here / "x/mine", classes=4)                  # two folders of one name
    assert [len(data.load(name).class_names) for name in ("x/mine", "mine")] == [4, 5]


def test_image_grid_puts_every_image_in_its_place():
    images = [np.full((20, 40, 3), level, np.uint8) for level in (0, 40, 80, 90)]
    rows = [images[:2], images[2:]]
    page = np.asarray(data.image_grid(rows, ["a", "\x1b\ud800 \n" * 99], ["one", "two"]))
    assert page.shape == (22 + 2 * 22, 230 + 2 * 42, 3)
    for i, j in np.ndindex(2, 2):
        image = page[22 + 22 * i:, 230 + 42 * j:][:20, :40]
        assert (image == rows[i][j][0, 0]).all()
    assert (page[:22, 230:] < 100).any() and (page[22:, :230] < 100).any()      # the words


@pytest.mark.parametrize("device, has, expected", [
    ("cpu", "flags: avx512f avx512_bf16", "bf16"), ("cpu", "flags: avx2", "fp32"),
    ("cuda", (7, 5), "fp16"), ("cuda", (8, 0), "bf16")])
def test_auto_precision(monkeypatch, device, has, expected):
    monkeypatch.setattr(Path, "read_text", lambda path: has)            # of /proc/cpuinfo
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    assert data.pick_precision(torch.device(device)) == expected
    assert data.pick_precision(torch.device(device), "fp16") == "fp16"


# ==============================================================================================
# Training: train.py
# ==============================================================================================

def test_a_run_from_start_to_image(tiny, capsys, monkeypatch):
    """In a thread, as in a notebook's worker, where Python allows no signal handlers."""
    for path in sorted(tiny.rglob("*.txt"))[1:]:
        path.write_text("a `red` bird's \"$HOME\" é; rm x")
    monkeypatch.setattr(train, "FIRST_SAVES", (2,))
    worker = threading.Thread(target=call, args=(train, TINY, "--steps 8 --out 'a run'"))
    worker.start()
    worker.join()
    out = capsys.readouterr().out
    assert len(re.findall(r"D\(wrong\) .* images/s  [\d.]+ of [\d.]+ minutes left", out)) == 4
    samples = sorted(path.name for path in Path("a run/samples").iterdir())
    assert samples == ["000002.png", "000004.png", "000008.png"]
    assert Image.open("a run/loss.png").size == (804, 402)

    # The last line can be pasted. sample.py needs no network, and draws any text.
    monkeypatch.setattr(socket, "socket", None)
    words = shlex.split(out.splitlines()[-1].removeprefix("now try: "))
    assert words[:4] == ["python", "sample.py", "--weights", "a run/checkpoint.pt"]
    odd = ["日本 UPPER", "x" * 100_000, "a\x00b\x1b[31m", "line\n\ttab", "../etc", "\u202eabc"]
    for name, seed in (("a.png", "0"), ("b.png", "0"), ("c.png", "1")):
        sample.main([*words[2:], *odd, "--n", "2", "--seed", seed, "--out", name])
    files = [Path(name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert files[0] == files[1] != files[2]
    # Nothing is written elsewhere, but phi, which is for all runs on these data.
    assert sorted(os.listdir()) == ["a run", "a.png", "b.png", "c.png", "cache", "mine", "runs"]


def stop_at(monkeypatch, step):
    """`kill` comes while this step is computed."""
    gan_cls_step = train.gan_cls_step
    seen = []

    def watched(*args, **options):
        seen.append(1)
        if len(seen) == step:
            signal.raise_signal(signal.SIGTERM)
        return gan_cls_step(*args, **options)

    monkeypatch.setattr(train, "gan_cls_step", watched)


@pytest.mark.parametrize("options, first, code, step", [
    # Done, and then made longer. By recipe paper: the rates of the others depend on --steps.
    ("--recipe paper --precision bf16", "--steps 4", 0, 4),
    # Killed in an epoch's middle (16 images, batches of 4), in the half where the rates fall.
    ("--batch-size 4", "--steps 16", 130, 10)])
def test_a_resumed_run_is_unbroken(tiny, monkeypatch, options, first, code, step):
    assert call(train, TINY, options, "--steps 16 --out whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert call(train, TINY, options, first, "--out parts") == code
    assert load_run("parts")["step"] == step
    assert call(train, TINY, options, "--resume --steps 16 --out parts") == 0
    equal = same(load_run("whole"), load_run("parts"))
    assert equal


@pytest.mark.parametrize("variant, cls, int_", [
    ("gan", False, False), ("gan-cls", True, False), ("gan-int", False, True),
    ("gan-int-cls", True, True)])
def test_the_loop_gives_the_step_what_the_run_asks_for(tiny, monkeypatch, variant, cls, int_):
    """Its switches, rates, Adam's betas, captions, and each training image once an epoch. Progress
    is the mean since the last line."""
    steps = []
    losses = []
    positions = []
    gan_cls_step = train.gan_cls_step
    batch = data.Batches.batch

    def watched(G, D, opt_G, opt_D, *rest, **options):
        groups = [optimizer.param_groups[0] for optimizer in (opt_G, opt_D)]
        assert (options["cls"], options["int_"]) == (cls, int_)
        assert all(group["betas"] == (0.5, 0.999) for group in groups)
        steps.append([group["lr"] for group in groups])
        out = gan_cls_step(G, D, opt_G, opt_D, *rest, **options)
        losses.append(out["loss_D"].item())
        return out

    def drawn(self, index):
        assert self.captions == train.RECIPES["quick"]["captions"]
        positions.append(index.tolist())
        return batch(self, index)

    monkeypatch.setattr(train, "gan_cls_step", watched)
    monkeypatch.setattr(data.Batches, "batch", drawn)
    assert call(train, TINY, "--steps 5 --out run --variant", variant) == 0
    assert np.allclose(steps, np.outer([1, 1, 1, 0.8, 0.4], [4e-4, 2e-4]))
    epochs = [sum(positions[:2], []), sum(positions[2:4], [])]      # 16 images, batches of 8
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs) and epochs[0] != epochs[1]
    rows = load_run("run")["history"]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["loss_D"] for row in rows] == pytest.approx(
        [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]])


def test_no_S_of_an_older_G_is_kept(begun, monkeypatch, capsys):
    first = load_run("run")["S"]
    with monkeypatch.context() as patch:                    # it goes on, and is stopped
        stop_at(patch, 2)
        assert call(train, "--resume --out run --steps 12") == 130
    assert load_run("run")["S"] is None
    check_refused(capsys, train, "--out run --export x", "not finished")

    def interrupted(run, batches):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:                    # G and D are done, S is not
        patch.setattr(train, "train_style_encoder", interrupted)
        assert call(train, "--resume --out run") == 130
    assert load_run("run")["step"] == 12 and load_run("run")["S"] is None
    assert call(train, "--resume --out run") == 0
    last = load_run("run")["S"]
    assert not torch.equal(first["net.2.weight"], last["net.2.weight"])


def test_same_seed_same_run(begun):
    for seed in (0, 1):
        assert call(train, TINY, f"--steps 4 --seed {seed} --out {seed}") == 0
    first, again, other = [load_run(out) for out in ("run", "0", "1")]
    # The order of the images aside: the first weights follow the seed too.
    new = [train.Run(run["settings"], torch.device("cpu")).G for run in (first, other)]
    assert not same(*map(copy_of, new)) and not same(first["G"], other["G"])
    for run in (first, again):
        del run["settings"], run["encoder"]["settings"]     # the folders have other paths
    equal = same(first, again)
    assert equal


@pytest.mark.parametrize("recipe, r1", [
    ("quick", (0.01, 0.01)), ("toy", (0.3, 0.03)), ("paper", None)])
def test_what_surrounds_algorithm_1(monkeypatch, recipe, r1):
    """G's average has a short memory in the beginning; every fourth step has the penalty, on what D
    sees, and it moves D alone; Q learns with G."""
    run, batches = random_run(recipe)
    train.set_rates(run, 0)
    first_Q = copy_of(run.Q) if run.Q else None
    averages = []
    weights = []
    seen = []
    monkeypatch.setattr(train, "update_ema", lambda *inputs: averages.append(inputs))
    monkeypatch.setattr(run, "view", lambda x: x * 0.5)

    def penalty(*inputs):
        seen.append((r1_penalty(*inputs), *inputs))
        return seen[-1][0]

    r1_penalty = train.r1_penalty
    monkeypatch.setattr(train, "r1_penalty", penalty)
    monkeypatch.setattr(train, "update", lambda optimizer, loss, scaler: weights.append(
        (run.step, optimizer is run.opt_D, (loss / seen[-1][0]).item())))
    step = train.Step(run, batches)
    for _ in range(8):
        step(torch.arange(8))
    decays = [min(run.recipe["ema"], n / (n + 10)) for n in range(1, 9)]
    assert averages == [(run.G_ema, run.G, decay) for decay in decays]
    expected = [(4, True, 4.0), (8, True, 4.0)] if r1 else []
    assert weights == [pytest.approx(row) for row in expected]
    assert not r1 or torch.equal(seen[1][2], step.x * 0.5) and seen[1][4:] == r1
    assert not run.Q or not same(first_Q, copy_of(run.Q))


def test_s_learns_what_a_frozen_g_generates(monkeypatch):
    """Eq. 6: only S moves. Its images are augmented, or it would read patterns of G alone."""
    run, batches = random_run()
    inputs = []

    monkeypatch.setattr(gan_cls.StyleEncoder, "forward", lambda S, x: inputs.append(x) or S.net(x))
    monkeypatch.setattr(train, "augment", lambda x: torch.full_like(x, 0.25))
    before = copy_of(run.G_ema)
    run.G = None                                                    # its average is meant
    first, second = [copy_of(train.train_style_encoder(run, batches, n)) for n in (1, 2)]
    assert len(inputs) == 3 and all((x == 0.25).all() for x in inputs)
    assert same(before, run.G_ema.state_dict()) and not same(first, second)


@pytest.mark.parametrize("recipe, steps, expected", [
    # [A]: halved every 100 epochs, here of 8 steps.
    ("paper", 2000, {0: (2e-4, 2e-4), 799: (2e-4, 2e-4), 800: (1e-4, 1e-4), 1600: (5e-5, 5e-5)}),
    # Constant for a half, then in a straight line to a share of the first.
    ("quick", 1000, {0: (4e-4, 2e-4), 500: (4e-4, 2e-4), 750: (2e-4, 1e-4), 999: (4e-5, 2e-5)}),
    ("gpu", 1000, {500: (5e-4, 2.5e-4), 750: (2.5e-4, 1.25e-4), 999: (2e-5, 1e-5)})])
def test_learning_rates(recipe, steps, expected):
    run, _ = random_run(recipe)
    run.settings["steps"] = steps
    held = torch.zeros(())
    run.opt_G.param_groups[0]["lr"] = held                          # a tensor, as on CUDA
    for step, rates in expected.items():
        run.step = step
        train.set_rates(run, step // 8)
        assert (float(held), run.opt_D.param_groups[0]["lr"]) == pytest.approx(rates)


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_what_d_is_shown_follows_the_recipe(monkeypatch, recipe):
    run, batches = random_run(recipe, precision="bf16")
    x = batches.batch(torch.arange(8))[0]
    monkeypatch.setattr(train, "augment", lambda x: x + 1)
    monkeypatch.setattr(train, "sharpen", lambda x, gain: x * gain)
    expected = {"paper": x, "toy": (x + 1) * train.RECIPES["toy"]["sharpen"]}
    assert torch.equal(run.view(x), expected.get(recipe, x + 1))
    options = {}
    monkeypatch.setattr(train, "gan_cls_step", lambda *inputs, **more: options.update(more))
    train.Step(run, batches).algorithm_1()
    assert options["blends_to_D"] == (recipe != "paper")
    assert options["scaler"] is run.scaler and options["amp"] is run.amp
    assert random_run(precision="fp16")[0].scaler.is_enabled() and not run.scaler.is_enabled()


@pytest.mark.parametrize("recipe, style", [("quick", 0.02), ("toy", 0.1)])
def test_extra_loss_is_mode_seeking_and_eq_6(recipe, style):
    """The second images of the first texts come from the same pass of G."""
    run, _ = random_run(recipe)
    z = torch.randn(12, 100)
    texts = torch.randn(12, 1024)
    G = copy.deepcopy(run.G)
    x_fake = run.generate(z, texts)
    z2 = run.second[0]
    assert len(z2) == 2                                             # a quarter of the batch of 8
    x = G(torch.cat([z, z2]), torch.cat([texts, texts[:2]]))
    assert torch.equal(x_fake, x[:12])
    torch.manual_seed(5)
    got = run.extra_G_loss(z, texts, x_fake)
    torch.manual_seed(5)
    expected = 0.05 * gan_cls.mode_seeking_loss(z[:2], z2, x[:2], x[12:])
    seen = gan_cls.sharpen(gan_cls.augment(x[:12]), -1 if recipe == "toy" else 0)
    expected = expected + style * gan_cls.style_loss(z, run.Q(seen))
    assert torch.allclose(got, expected)
    got.backward()
    assert all(p.grad.any() for net in (run.G, run.Q) for p in net.parameters())
    assert all(p.grad is None for p in run.D.parameters())
    paper, _ = random_run("paper")
    assert torch.equal(paper.generate(z, texts), paper.G(z, texts))
    assert paper.extra_G_loss(z, texts, x_fake) == 0.0


def test_statistics_of_the_average_are_those_of_its_own_activations():
    """By hand for the first batch norm, from the first caption of every training image."""
    run, batches = random_run()
    G = run.G_ema
    with torch.no_grad():
        for p in G.parameters():
            p.mul_(1.5)
    random = torch.get_rng_state()
    train.renew_statistics(G, batches, at_once=32)                  # two batches of 64 images
    first = copy_of(G)
    train.renew_statistics(G, batches, at_once=32)
    assert same(first, G.state_dict()) and torch.equal(random, torch.get_rng_state())
    assert not G.training

    h = batches.caption_table[::2].float()                          # two captions an image
    h = h[batches.training_images]
    z = torch.randn(64, 100, generator=torch.Generator().manual_seed(2))
    linear, unflatten, norm = G.net[:3]
    with torch.no_grad():
        maps = unflatten(linear(torch.cat([z, G.text(h)], 1))).double()
    halves = [part.transpose(0, 1).flatten(1) for part in maps.split(32)]
    mean = sum(part.mean(1) for part in halves) / 2
    var = sum(part.var(1) for part in halves) / 2
    assert torch.allclose(norm.running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(norm.running_var.double(), var, rtol=1e-4)


# ---- The recorded step -----------------------------------------------------------------------

def stand_in_for_cuda(monkeypatch, replays):
    """The replay of a "graph" runs the function that was recorded."""
    def record(part):
        return SimpleNamespace(replay=lambda: replays.append(part.__name__) or part())

    monkeypatch.setattr(train, "warm_up", lambda parts: [part() for part in 3 * parts])
    monkeypatch.setattr(train, "record_graphs", lambda parts: list(map(record, parts)))


def trained(run, batches, steps, recorded=False):
    """The state after some steps, and what each step has seen and returned."""
    step = train.Step(run, batches)
    if recorded:
        step.record()
    seen = []
    for _ in range(steps):
        train.set_rates(run, 0)
        out = step((torch.arange(8, device=run.device) + 8 * run.step) % len(batches))
        seen.append((step.x.clone(), step.h.clone(), {name: v.item() for name, v in out.items()}))
    return copy.deepcopy(run.state()), seen


@pytest.mark.parametrize("recipe, fails", [
    ("quick", "nothing"), ("quick", "warm_up"), ("quick", "record_graphs"), ("paper", "nothing")])
def test_a_recorded_step_is_the_step(monkeypatch, capsys, recipe, fails):
    """Recorded before the first step, and in a run that goes on: the warm-up leaves no trace. What
    cannot be recorded runs as it is."""
    def failing(parts):
        if fails == "warm_up":
            parts[0]()                              # while it is recorded nothing is computed
        recorded.D.requires_grad_(False)
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    replays = []
    stand_in_for_cuda(monkeypatch, replays)
    monkeypatch.setattr(train, fails, failing, raising=False)
    plain, batches = random_run(recipe)
    recorded, _ = random_run(recipe)
    for steps in (5, 4):
        torch.manual_seed(3)
        expected = trained(plain, batches, steps)
        torch.manual_seed(3)
        assert same(expected, trained(recorded, batches, steps, True))
    lines = capsys.readouterr().out.splitlines()
    if fails == "nothing":
        four = ["algorithm_1"] * 4 + ["gradient_penalty"] * (recipe == "quick")
        assert replays == [*four, *four, "algorithm_1"] and lines == []
    else:
        assert replays == [] and len(lines) == 2
        assert all("not permitted when stream is capturing)" in line for line in lines)


def test_a_checkpoint_does_not_tell_on_what_it_was_made():
    """Adam's rate as a tensor and `capturable` belong to CUDA, its means and squares to the run.
    Fused Adam on CUDA asks for them in the order in memory that the weights have."""
    run, batches = random_run()
    state, _ = trained(run, batches, 2)
    for group in state["opt_D"]["param_groups"]:
        group.update(lr=torch.tensor(0.5), capturable=True)
    other, _ = random_run()
    other.load_state(state)
    assert same(run.opt_D.state_dict()["state"], other.opt_D.state_dict()["state"])
    group = other.opt_D.param_groups[0]
    assert group["capturable"] is False and not torch.is_tensor(group["lr"])
    for p, values in run.opt_D.state.items():
        assert values["exp_avg"].stride() == p.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_recorded_steps_beside_eager_ones(precision, monkeypatch, capsys):
    """Recorded before the first step and, after six, in a run that goes on: they draw the same
    numbers as eager ones, to the last bit. The losses differ by rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    seen = {}
    for recorded in (False, True):
        run, batches = random_run(device="cuda", precision=precision)
        torch.cuda.manual_seed(3)
        state, first = trained(run, batches, 6, recorded)
        run, batches = random_run(device="cuda", precision=precision)
        run.load_state(state)
        run.step = 6
        _, rest = trained(run, batches, 4, recorded)
        assert capsys.readouterr().out == ""
        seen[recorded] = first + rest
    for (x, h, losses), (x_recorded, h_recorded, losses_recorded) in zip(*seen.values()):
        assert torch.equal(x, x_recorded) and torch.equal(h, h_recorded)
        assert losses == pytest.approx(losses_recorded, rel=0.05, abs=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("warm_up, message", [
    (train.warm_up, "synchronizing"),
    (lambda parts: [part() for part in parts], "captur")])      # found only while it is recorded
def test_cuda_what_cannot_be_recorded_runs_eagerly(monkeypatch, capsys, warm_up, message):
    """A step that reads a number cannot be recorded. The run goes on without."""
    monkeypatch.setattr(train, "warm_up", warm_up)
    gan_cls_step = train.gan_cls_step
    read = []

    def reads_a_number(*args, **options):
        out = gan_cls_step(*args, **options)
        read.append(out["loss_D"].item())
        return out

    monkeypatch.setattr(train, "gan_cls_step", reads_a_number)
    _, seen = trained(*random_run(device="cuda"), 3, True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and message in lines[0] and len(read) >= 3
    assert [losses["loss_D"] for _, _, losses in seen] == read[-3:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_run_goes_on_on_a_cpu_and_back(tiny, capsys):
    for device, steps, more in (("cuda", 4, ""), ("cpu", 6, "--resume"), ("cuda", 8, "--resume"),
                                ("cuda", 10, "--resume --eager")):
        assert call(train, TINY, f"--out run {more} --steps {steps} --device {device}") == 0
        out = capsys.readouterr().out
        assert f"fp32 on {device}" in out and "not recorded" not in out
    assert load_run("run")["step"] == 10


# ==============================================================================================
# Sampling and measuring: sample.py
# ==============================================================================================

def encoder_by_hand(ds, seed=0):
    torch.manual_seed(seed)
    settings = dict(dataset=ds.name, digest=ds.digest(), cnn_dim=8, steps=1, seed=seed,
                    image_side="conv", precision="fp32")
    return dict(kind="encoder", settings=settings, phi=encoder.CharCNNRNN(8).state_dict(),
                v=encoder.ImageEncoder("conv").state_dict())


def run_by_hand(path, ds=None, variant="gan-int-cls", seed=0, finished=True, **settings):
    """A checkpoint as a run's, with what sampling needs of it."""
    ds = ds or random_data("mine")
    phi = encoder_by_hand(ds)
    torch.manual_seed(seed)
    settings = dict(dict(dataset=ds.name, digest=ds.digest(), variant=variant, recipe="quick",
                         batch_size=8, steps=4, seed=seed, precision="fp32", ngf=4, ndf=4),
                    **settings)
    S = gan_cls.StyleEncoder().state_dict() if finished else None
    data.save_checkpoint(path, kind="gan-cls", settings=settings, step=4, encoder=phi,
                         average=gan_cls.Generator(4).state_dict(), S=S)
    return path


def scorers_by_hand(ds):
    """So that measuring need not train any."""
    for seed in sample.SCORER_SEEDS:
        path = f"runs/{data.short_name(ds.name)}-scorer-{seed}.pt"
        data.save_checkpoint(path, **encoder_by_hand(ds, seed))


def picture(*lines):
    """sample.py's image for these arguments, as an array."""
    assert call(sample, *lines, "--out picture.png") == 0
    return np.asarray(Image.open("picture.png"))


def test_sampling_modes(here, capsys):
    needs_exercises(2)
    run = run_by_hand(here / "runs/mine-gan/checkpoint.pt")         # found as the newest run
    texts = "'an all black bird' 'a red bird'"
    first = picture(texts)
    assert np.array_equal(first, picture(texts, "--truncation 0.8 --seed 0"))
    for other in ("--seed 1", "--truncation 1"):
        assert not np.array_equal(first, picture(texts, other))
    (here / "queries.txt").write_text("\ufeffan all black bird\n\n   \n a red   bird \n")
    assert np.array_equal(first, picture("@queries.txt"))

    i = picture("--interpolate", texts)
    z = picture("--interpolate-style 'a red bird'")
    (here / "q.jpg").write_bytes(jpeg(size=(300, 40)))
    s = picture(texts, "--style q.jpg q.jpg")
    assert i.shape[1] == z.shape[1] > s.shape[1] and len(i) > len(s) > len(z)

    # The newest run may not be what one expects: it is named. Nor a text for each word.
    capsys.readouterr()
    picture("a red bird")
    out = capsys.readouterr().out
    assert f"drawn with {run.relative_to(here)}, which was trained on mine" in out
    assert 'quotes make one text of them: "a red bird"' in out


def test_interpolations_go_from_the_first_to_the_second():
    needs_exercises(2)
    # A "generator" that shows what it was given.
    model = SimpleNamespace(generate=lambda z, h: torch.cat([z, h.expand(len(z), -1)], 1))
    h = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    z = sample.noise(2, seed=0)
    shares = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.0, 1.0]])
    texts = sample.grid_between_texts(model, *h, z, shares[:, 1])
    noises = sample.grid_between_noises(model, h, z[[0, 0]], z[[1, 1]], shares[:, 1])
    for i in range(2):
        assert torch.allclose(texts[i], model.generate(z[[i, i, i]], shares @ h), atol=1e-6)
        assert torch.allclose(noises[i], model.generate(shares @ z, h[i]), atol=1e-6)


def test_a_noise_depends_on_the_seed_and_its_place_alone():
    many = sample.noise(64, seed=3)
    for n in range(1, 64):
        assert torch.equal(sample.noise(n, seed=3), many[:n])
    assert torch.equal(sample.noise(64, seed=3, truncation=0.5), 0.5 * many)
    assert not torch.equal(sample.noise(64, seed=4), many)


def test_generated_images_have_256_levels_and_come_in_parts(here, monkeypatch):
    model = sample.Model(run_by_hand(here / "run.pt"))
    monkeypatch.setattr(sample, "BATCH", 4)
    h = torch.randn(10, 1024)
    z = torch.randn(10, 100, generator=torch.Generator().manual_seed(5))
    x = sample.generate_for(model, h, 5, truncation=0.5)
    assert torch.allclose(x, model.G(0.5 * z, h), atol=0.0041)      # half a level
    levels = torch.from_numpy(data.to_pixels(x)).permute(0, 3, 1, 2)
    assert torch.equal(levels / 127.5 - 1, x)


def test_weights_are_found_from_any_folder(here, monkeypatch):
    assert sample.find_weights() == HERE / "weights/cub.pt"          # no run here
    older, newer = [run_by_hand(here / f"runs/{name}/checkpoint.pt") for name in ("old", "new")]
    os.utime(older, (1, 1))
    (here / "toy").mkdir()                                  # a folder without a run hides nothing
    assert sample.find_weights().resolve() == newer
    assert sample.find_weights("runs/old").resolve() == sample.find_weights(older) == older
    assert sample.find_weights("toy") == HERE / "weights/toy.pt"


@pytest.mark.parametrize("name", ["toy", "cub", "flowers"])
def test_the_shipped_weights_load(here, name):
    model = sample.Model(sample.find_weights(name))
    h = sample.embed(model.phi, ["an all black bird", "this flower has yellow petals"])
    images = model.generate(torch.zeros(2, 100), h)
    assert images.shape == (2, 3, 64, 64) and images.std() > 0.1
    assert model.S is not None and 0.1 < h.std() < 1.5


FIGURES = ["sentences matched", "pixel diversity", "pixel diversity, blends", "Frechet distance",
           "style transfer, background kept", "style transfer, direction kept",
           "style verification, background", "style verification, pose"]


def measured(capsys):
    """The output of sample.py --measure, and the line of JSON in it."""
    out = capsys.readouterr().out
    return out, json.loads(next(line for line in out.splitlines() if line.startswith("{")))


def test_measure_runs(here, small_toy, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda name, source=None: small_toy)
    scorers_by_hand(small_toy)
    names = ["toy-gan", "toy-gan-1", "toy-gan-cls"]
    for seed, name in enumerate(names):
        run_by_hand(here / f"runs/{name}/checkpoint.pt", small_toy, seed=seed)
    paths = [f"runs/{name}" for name in names]
    assert call(sample, "--measure", *paths, "--save-images judge") == 0
    out, numbers = measured(capsys)
    runs = numbers["runs"]
    references = numbers["references"]
    assert list(runs["toy-gan"]) == [*sample.SETTINGS, *FIGURES] and list(references) == FIGURES
    assert references["sentences matched"]["chance"] == 0.25
    assert references["style transfer, direction kept"]["real images"] > 0.9
    assert "    the sentences themselves: " in out and "    captions: 0." in out

    # The table: runs that differ in the seed share a column, with mean and deviation.
    row = next(line for line in out.splitlines() if line.startswith("Frechet distance "))
    a, b, c = (run["Frechet distance"] for run in runs.values())
    assert [float(word) for word in row.replace("+-", "").split()[2:]] == pytest.approx(
        [(a + b) / 2, abs(a - b) / 2 ** 0.5, c], abs=6e-5)

    images = {path.stem: np.load(path) for path in Path("judge").iterdir()}
    real = small_toy.images[small_toy.unseen_images()][:, 6:70, 6:70]
    assert sorted(images) == ["real", *names] and np.array_equal(images["real"], real)
    assert images["toy-gan"].shape == real.shape


class Tower(nn.Module):
    """In place of a scorer's image side: an image in four by four squares."""

    def features(self, x):
        return F.adaptive_avg_pool2d(x, 4)


@pytest.fixture
def test_set(small_toy, monkeypatch):
    """The unseen species of small_toy; every sentence is matched."""
    needs_exercises(2)
    monkeypatch.setattr(sample, "get_scorers", lambda ds, device: [(None, Tower(), None)])
    monkeypatch.setattr(sample, "sentences_matched", lambda scorers, x: 1.0)
    return sample.make_test_set(small_toy, "cpu")


def test_measure_draws_each_text_and_transfers_to_another(test_set):
    """By a G that shows z, but one image for all blends, and the query images with style."""
    h = torch.randn(len(test_set.x), 1024).sign()           # blends of two rows have zeros
    asked = []

    def generate(z, h):
        if not z.any():
            asked.append(h)
            return test_set.query
        x = (0.3 * z[:, :3]).clamp(-1, 1)
        x[(h == 0).any(1)] = 0.0
        return x[:, :, None, None].expand(-1, -1, 64, 64)

    model = SimpleNamespace(styles=lambda x: 0 * x.flatten(1), generate=generate)
    results = sample.measure_run(model, test_set, h, test_set.x, 1.0)
    assert results["pixel diversity"] > 0.1 and results["pixel diversity, blends"] == 0
    assert results["Frechet distance"] == pytest.approx(0, abs=1e-6)
    assert results["style transfer, background kept"] == 1
    places = torch.arange(len(h))
    assert torch.equal(asked[0], h[test_set.other]) and (test_set.other != places).all()
    assert torch.equal(test_set.other.sort().values, places)


def test_measure_trains_the_scorers_that_are_missing(here, short_training, capsys):
    run_by_hand(here / "a/checkpoint.pt", small_data(here), finished=False)
    assert call(sample, "--measure a") == 0
    # Without boxes and keypoints nothing of style is measured, and no S is needed.
    assert list(measured(capsys)[1]["runs"]["a"])[len(sample.SETTINGS):] == FIGURES[:4]
    phis = set()
    for path in Path("runs").glob("own-mine*-scorer-*.pt"):
        phis.add(data.load_checkpoint(path, "encoder")["phi"]["out.bias"].sum().item())
        path.rename(str(path).replace(data.short_name("mine"), data.short_name("moved")))
    shutil.move("mine", "moved")
    assert call(sample, "--measure a --dataset moved") == 0
    assert len(phis) == len(short_training) == 3                    # now they are there


def test_sentences_matched_against_a_slow_count(monkeypatch):
    x, h, *means = torch.randn(5, 60, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([3, 7, 8])
    labels = classes.repeat(20)

    def share(rows, means):
        scores = rows.double() @ torch.stack(list(means)).double().T
        return (classes[scores.argmax(1)] == labels).double().mean().item()

    unseen = [encoder.UnseenClasses(None, labels, classes, mean[:3]) for mean in means]
    scorers = [(None, nn.Identity(), each) for each in unseen]
    wanted = np.mean([share(x, mean[:3]) for mean in means])                        # eq. 3
    assert sample.sentences_matched(scorers, x) == pytest.approx(wanted)
    monkeypatch.setattr(sample, "embed", lambda phi, texts: h)
    wanted = share(h, [x[labels == c].mean(0) for c in classes])                    # eq. 4
    assert sample.sentences_matched(scorers, x, ["a bird"]) == pytest.approx(wanted)


def test_pixel_deviation_is_a_mean_over_groups():
    groups = torch.randn(3, 5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = np.std(groups.double().numpy(), axis=1, ddof=1).mean()
    assert float(sample.pixel_deviation([*groups, groups[0][:1]])) == pytest.approx(wanted, 1e-5)


def test_frechet_distance_by_the_eigenvalues_of_a_product(monkeypatch):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(50, 4, generator=g).double()
    b = a.flip(0) @ torch.randn(4, 4, generator=g).double()
    cov_a = np.cov(a.T)
    cov_b = np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b) - 2 * root
    assert sample.frechet_distance(a, b) == pytest.approx(wanted)

    # Of images: the mean over the scorers.
    monkeypatch.setattr(sample, "feature_map", lambda v, x: v * x)
    x = torch.rand(9, 3, 8, 8, generator=g)
    distance = sample.mean_frechet_distance([(0, 1, 0), (0, 3, 0)], x, x + 2)
    assert distance == pytest.approx((12 + 9 * 12) / 2, rel=1e-4)


def test_auc_and_roc_against_a_count():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (90,), generator=g).float()
    same = torch.rand(90, generator=g) < 0.4
    wins = []
    for a in scores[same].tolist():
        wins += [1.0 if a > b else 0.5 if a == b else 0.0 for b in scores[~same].tolist()]
    assert sample.auc(scores, same) == pytest.approx(np.mean(wins))

    distinct = torch.randn(90, generator=g)
    false, true = sample.roc(distinct, same)
    for n, limit in enumerate([math.inf, *sorted(distinct.tolist(), reverse=True)]):
        found = distinct >= limit
        assert true[n] == pytest.approx(float(found[same].double().mean()))
        assert false[n] == pytest.approx(float(found[~same].double().mean()))


def test_kmeans_puts_each_point_to_the_nearest_mean():
    points = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    before = points.clone()
    group = sample.kmeans(points, 6, rounds=300)
    means = torch.stack([points[group == i].mean(0) for i in range(6)])
    assert torch.equal(torch.cdist(points, means).argmin(1), group)
    assert torch.equal(points, before)
    assert len(sample.kmeans(torch.zeros(7, 2), 3).unique()) == 1   # fewer different points than k


def test_style_verification_knows_a_perfect_and_a_random_S():
    g = torch.Generator().manual_seed(0)
    group = torch.randint(-1, 10, (600,), generator=g)                  # -1: in none
    pairs = sample.style_pairs(group, most=500)
    assert len(pairs) == 5
    for i, j, same in pairs:
        assert len(same) == 1000 and same.float().mean() == 0.5
        assert (group[i] == group[j]).equal(same) and group[i].min() == group[j].min() == 0
        assert len(set(map(frozenset, zip(i.tolist(), j.tolist())))) == 1000    # no pair twice
    assert not set(pairs[0][0].tolist()) & set(pairs[1][0].tolist())    # folds share no image
    chance = torch.randn(600, 100, generator=g)
    perfect = F.one_hot(group + 1) * (torch.rand(600, 1, generator=g) + 0.1)    # of any length
    assert sample.verify_style(chance, pairs) == pytest.approx(0.5, abs=0.03)
    assert sample.verify_style(perfect, pairs) == 1.0


def test_style_groups_read_background_and_pose(small_toy):
    boxes = small_toy.boxes.copy()
    keypoints = small_toy.keypoints.copy()
    keypoints[3, 2] = np.nan                # what is not known is in no group
    boxes[5] = np.nan
    ds = dataclasses.replace(small_toy, boxes=boxes, keypoints=keypoints)
    index = np.arange(len(ds.images))
    background, pose = sample.style_groups(ds, index, 8).values()
    assert (background < 0).nonzero().flatten().tolist() == [5]
    assert (pose < 0).nonzero().flatten().tolist() == [3, 5]
    above = torch.tensor(ds.images[:, :3].mean((1, 2)))
    right = sample.facing(ds, index) > 0
    for k in range(8):                      # a group has one background, and faces one way
        assert above[background == k].std(0).mean() < above.std(0).mean()
        assert abs(right[pose == k].float().mean() - 0.5) > 0.45
    assert len(sample.style_groups(ds, index)["pose"].unique()) > 90    # [A]: 100 groups


def test_background_and_direction_kept(test_set):
    colours = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    x = colours.repeat(8, 1)[:, :, None, None].expand(-1, -1, 64, 64)
    below = x.clone()
    below[:, :, 6:] = 0                                     # only the top rows count
    assert sample.background_kept(x, below) == 1.0
    assert sample.background_kept(x, x.roll(1, 0)) == 0.0
    assert sample.direction_kept(test_set, test_set.query) > 0.9
    assert sample.direction_kept(test_set, test_set.query.flip(3)) < 0.3
    few = dataclasses.replace(test_set.ds, keypoints=test_set.ds.keypoints * np.nan)
    assert not sample.make_test_set(few, "cpu").pairs       # none can be formed: nothing of style


# ==============================================================================================
# The command line
# ==============================================================================================

def test_data_on_its_own(here, capsys):
    written(own_folder(here / "mine", 4, 3), {
        "kind0/p0.txt": ("птица" * 41).encode(),            # 205 letters beside 143 of the others
        "bare.png": jpeg()})
    assert call(data, "--dataset mine") == 0
    out = capsys.readouterr().out
    assert "12 images, 23 captions, 1 of them longer than" in out and "(1 in all) is in" in out
    assert "unseen: 3 images, classes: 1\n" in out
    assert Image.open(f"cache/{data.short_name('mine')}.png").height == 4 * 78
    os.chdir("mine")                                        # in it our own files are no data
    assert call(data, "--dataset .") == call(data, "--dataset .") == 0
    assert capsys.readouterr().out.count("preparing") == 1


def test_encoder_on_its_own(here, unwhitened, monkeypatch, capsys):
    needs_exercises(3)
    own_folder(here / "three", classes=3)                       # no unseen class
    shipped_weights(here / "given", small_data(here))
    monkeypatch.setattr(encoder, "WEIGHTS", here / "given")

    def printed(line):
        encoder.main(f"--device cpu --precision fp32 --dataset mine {line}".split())
        return capsys.readouterr().out
    trained = printed("--steps 2")
    measured = printed("--evaluate")
    assert "eq. 3" in measured and "eq. 4" in measured and trained.endswith(measured)
    trained = printed("--steps 2 --image-features f.npy --out f.pt")
    assert trained.endswith(printed("--evaluate --image-features f.npy --out f.pt"))
    assert "eq. 3" in printed("--evaluate --weights cub --image-features f.npy")
    assert "no unseen classes to measure" in printed("--steps 2 --dataset three --out e.pt")


def test_benchmark_prints_and_writes_nothing(tiny, capsys, monkeypatch):
    monkeypatch.setattr(train, "seconds", lambda function: function() is None and 0.5 or 0.25)
    assert call(train, TINY, "--benchmark") == 0
    out = capsys.readouterr().out
    rate = 2 * 2048 ** 3 / 0.25 / 1e12
    assert f"a matrix product: {rate:.2f} TFLOP/s" in out
    assert "eager: a step takes 250.0 ms, 32 images/s" in out
    assert re.search(r"adds 500.0 ms, [\d.]+ TFLOP/s, \d+% of the product's rate", out)
    assert sorted(os.listdir()) == ["cache", "mine"]


@pytest.mark.parametrize("name, device, images, options, recipe, steps, ngf", [
    ("toy", "cpu", 6400, "", "toy", 4600, 32),
    ("toy", "cpu", 6400, "--recipe paper", "paper", 600 * 100, 32),
    ("cub", "cpu", 6400, "", "quick", 25_000, 32),
    ("cub", "cuda", 6400, "--ngf 8", "gpu", 600 * 50, 8),
    ("mine", "cpu", 64, "", "quick", 600 * 2, 32),              # few images need no 25,000 steps
    ("mine", "cuda", 64, "", "gpu", 5000, 128)])
def test_recipe_and_length_follow_data_and_device(
        name, device, images, options, recipe, steps, ngf):
    args = train.parse_args(f"--device cpu --precision fp32 {options}".split())
    ds = dataclasses.replace(random_data(name), labels=np.arange(images) % 8)
    settings = train.choose_settings(args, "gan", ds, torch.device(device))
    assert (settings["recipe"], settings["steps"], settings["ngf"]) == (recipe, steps, ngf)


def test_a_run_goes_on_elsewhere_on_data_that_moved_and_keeps_its_precision(
        tiny, monkeypatch, capsys):
    assert call(train, TINY, "--steps 4 --out run") == 0
    (tiny / "elsewhere").mkdir()
    monkeypatch.chdir(tiny / "elsewhere")
    resume = "--resume --device cpu --out ../run --steps"
    assert call(train, resume, 6) == 0 and "fp32 on cpu" in capsys.readouterr().out
    assert call(train, resume, 8, "--precision bf16") == 0
    shutil.move("../mine", "../moved")
    assert call(train, resume, 10) == 2                             # not there any more
    assert call(train, resume, 10, "--dataset ../moved") == 0
    assert capsys.readouterr().out.count("bf16 on cpu") == 2 and load_run("../run")["step"] == 10


def test_four_variants_go_on_where_they_were_stopped_and_finished_ones_stay(tiny, monkeypatch):
    four = f"{TINY} --variant all --steps 4"
    with monkeypatch.context() as patch:
        stop_at(patch, 6)                                   # in the second of them
        assert call(train, four) == 130
    assert len(list(tiny.glob("runs/*/checkpoint.pt"))) == 2
    assert call(train, four, "--resume") == 0
    runs = sorted(tiny.glob("runs/*/checkpoint.pt"))
    checkpoints = [load_run(path.parent) for path in runs]
    assert {c["settings"]["variant"] for c in checkpoints} == set(train.VARIANTS)
    assert all(c["step"] == 4 for c in checkpoints)
    stamps = [path.stat().st_mtime_ns for path in runs]
    assert call(train, four) == 0
    assert stamps == [path.stat().st_mtime_ns for path in runs]


def test_export_keeps_what_sampling_needs(begun, monkeypatch):
    """In 8 bits, a quarter of the size."""
    monkeypatch.setattr(encoder, "WEIGHTS", begun / "weights")
    assert call(train, "--out run --export mine") == 0
    assert call(sample, "'a bird' --weights mine") == 0
    whole = load_run("run")
    size = Path("weights/mine.pt").stat().st_size
    assert size < 0.3 * Path("run/checkpoint.pt").stat().st_size
    small = data.load_checkpoint("weights/mine.pt", "gan-cls")
    assert same(data.to_8_bits(small), small)               # it is in 8 bits already
    back = data.from_8_bits(small["average"])
    assert small["settings"] == whole["settings"] and back.keys() == whole["average"].keys()
    for key, value in whole["average"].items():
        step = 0.0                                                  # biases, batch norm: as it is
        if value.dim() > 1:                                         # else half a step is the error
            step = value.abs().amax(tuple(range(1, value.dim())), keepdim=True) / 127
        assert ((back[key] - value).abs() <= 0.51 * step).all(), key


# ---- Bad input -------------------------------------------------------------------------------

def cub_with(**tables):
    """One image of CUB and its caption, with these lines in its tables."""
    files = {"x/images/1.A/a.jpg": jpeg(), "x/text/1.A/a.txt": b"a bird"}
    for name, line in tables.items():
        files[f"x/images/{name}.txt"] = line.encode()
    return files


# What is there, the data set, and what is said.
BAD_DATA = [
    ({"x/CUB_200_2011.tgz": b"", "x/birds.zip": b""}, "cub --from x", "no .zip or .tar.gz"),
    # Nothing belongs together: what is there, a name of each, and the form expected.
    ({"x/a.jpg": jpeg(), "x/b.txt": b"alone"}, "x", "x has 1 .jpg (a.jpg), 1 .txt (b.txt)"),
    ({"x/a.jpg": jpeg(), "x/a.txt": b"\n \n"}, "x", "a.jpg: no caption of 3 letters"),
    ({"x/a.jpg": b"no image", "x/a.txt": b"a bird"}, "x", "a.jpg: not an image"),
    ({"x/.hidden": b""}, "x", "x has no files. Expected for each NAME"),
    ({"x/images/1.A/a.jpg": jpeg(), "x/text/captions.pickle": b""}, "cub --from x",
     "images has 1 .jpg (1.A/a.jpg); text has 1 .pickle (captions.pickle)"),
    ({"x/metadata.csv": b"file;words\na.jpg;a bird\n"}, "x", "found file, words"),
    ({"x/metadata.csv": b"text,file_name\na bird, red,a.jpg\n"}, "x", "the row of 'a bird' has"),
    ({"x/metadata.jsonl": b"[" * 100_000}, "x", "metadata.jsonl cannot be read"),
    (cub_with(images="1 a b c", bounding_boxes="", part_locs=""), "cub --from x", "together"),
    (cub_with(), "cub-box --from x", "no bounding boxes"),
    (cub_with(images="1 1.A/a.jpg"), "cub-box --from x", "belong together"),
    (cub_with(images="2 1.A/a.jpg", bounding_boxes="1 1 2 3 4", part_locs="1 1 1 1 1\n" * 15),
     "cub-box --from x", "belong together"),
]


@pytest.mark.parametrize("files, line, message", BAD_DATA)
def test_bad_data(here, capsys, files, line, message):
    written(here, files)
    check_refused(capsys, data, f"--dataset {line}", message)
    assert not list(Path().glob("cache/*"))


@pytest.fixture(scope="module")
def broken(four_steps):
    """A folder with a run, its data, and files that are not what their names say."""
    folder = four_steps.parent
    good = (four_steps / "checkpoint.pt").read_bytes()
    whole = torch.load(four_steps / "checkpoint.pt", weights_only=True)
    settings = whole["settings"]
    own_folder(folder / "other", classes=6)
    written(folder, {
        "q.jpg": jpeg(), "latin.txt": "ein Vögelchen".encode("latin-1"),
        "text/checkpoint.pt": b"hello", "cut/checkpoint.pt": good[:len(good) // 2]})
    for name, content in (
            ("short", dict(kind="gan-cls", settings=dict(ngf=3))),
            ("wide", dict(whole, settings=dict(settings, ngf=10 ** 6))),
            ("recipe", dict(whole, settings=dict(settings, recipe=["quick"]))),
            ("nameless", dict(whole, settings=dict(settings, dataset=None))),
            ("weights", dict(whole, G={})),
            ("my run$", dict(whole, S=None)),
            ("flowers", dict(whole, settings=dict(settings, dataset="flowers", digest="0"))),
            ("phi", dict(kind="encoder")),
            ("code", dict(kind="gan-cls", run=os.system))):
        (folder / name).mkdir()
        torch.save(content, folder / name / "checkpoint.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shipped_weights(folder / "given", data.load("mine"))
    return folder


MINE = "--dataset mine --device cpu --precision fp32"
RUN = "--device cpu --resume --steps 8 --out"
BIRD = "'an all black bird'"

# The script, its arguments, and what is said.
BAD_INPUT = [
    (data, "--dataset nowhere", "unknown data set 'nowhere': did you mean toy or"),
    (data, "--dataset latin.txt", "latin.txt is no .zip or .tar.gz"),
    (data, "--dataset cub --from mine", "mine has none of CUB_200_2011.tgz, CUB"),
    (data, "cub", "did you mean --dataset cub?"),
    (encoder, f"{MINE} --steps 2", "add --evaluate"),
    (encoder, f"{MINE} --evaluate --image-features f.npy", "image side conv, not features"),
    (encoder, "--image-features f.npy --image-encoder conv", "not allowed with"),
    (train, "--image-features f.npy --image-encoder conv", "not allowed with"),
    (encoder, f"{MINE} --weights cub", "--image-features"),
    (encoder, f"{MINE} --weights bare --image-features f.npy", "phi without the image side"),
    (encoder, f"{MINE} --evaluate --out text/checkpoint.pt", "no checkpoint"),
    (encoder, f"{MINE} --evaluate --out phi/checkpoint.pt", "does not fit"),
    (train, "--lr 0.1", "the rates stand in RECIPES"), (train, f"{TINY} --out run", "--resume"),
    (train, f"{TINY} --out new --resume", "nothing to resume"),
    (train, "--device mps", "unknown device 'mps'"),
    (train, "--device cuda:99", "cuda:99 cannot be used"),
    (train, f"{TINY} --out few --batch-size 3", "--batch-size 3 and"),
    (train, f"{TINY} --out few --batch-size 999", "no larger batch than there are"),
    (train, "--variant all --out x", "in its own folder"), (train, "--out run --export ../x", "not a path"),
    (train, "--out run --resume --steps 3", "has done 4 steps"),
    (train, "--out short --export x", "does not fit"),
    (train, f"{RUN} run --ngf 4", "--ngf 2, not 4"),
    (train, f"{RUN} run --recipe paper", "--recipe quick, not paper"),
    (train, f"{RUN} run --variant gan", "--variant gan-int-cls, not gan"),
    (train, f"{RUN} run --dataset other", "other has other captions"),
    *[(train, f"{RUN} {name}", "does not fit") for name in ("short", "wide", "recipe", "weights")],
    (train, f"{RUN} phi", "does not hold a gan-cls"),
    (train, f"{RUN} code", "no checkpoint"), (train, f"{RUN} cut", "only a part of one"),
    (sample, "''", "empty text"), (sample, "", "no text: say what to generate"),
    (sample, "@latin.txt", "expected a text file"),
    (sample, f"{BIRD} --weights latin.txt", "no checkpoint"),
    (sample, f"{BIRD} --n 65", "expected a number from 1 to 64"),
    (sample, f"{BIRD} --weights run --out x.exe", "x.exe"),
    (sample, f"{BIRD} --interpolate", "expected 2"),
    (sample, f"{BIRD} --interpolate-style --style a.png", "not allowed with"),
    (sample, f"{BIRD} --weights run --style latin.txt", "cannot read the image latin.txt"),
    (sample, f"{BIRD} --weights 'my run$' --style q.jpg",
     "python train.py --resume --out 'my run$'"),
    (sample, "--measure missing", "no run missing"),
    (sample, "--measure run run", "the name run is taken"),
    (sample, "--measure run flowers", "flowers was trained on flowers, not on what"),
]


@pytest.mark.parametrize("module, line, message", BAD_INPUT)
def test_bad_input(broken, monkeypatch, capsys, module, line, message):
    monkeypatch.chdir(broken)
    monkeypatch.setattr(encoder, "WEIGHTS", broken / "given")
    before = os.listdir()
    check_refused(capsys, module, line, message)
    assert os.listdir() == before


# ==============================================================================================
# Robustness
# ==============================================================================================

OFTEN = ("import data, train; train.EVERY.update(log=1, save=3); "
         "train.train_style_encoder.__defaults__ = (3,); data.run_script(train.main)")


KILLS = int(os.environ.get("KILLS", 2))                 # KILLS=100 pytest -k killed: the long form


def test_killed_runs_resume_to_the_same_weights(tiny, monkeypatch):
    """Ctrl-C, then kill -9 at random moments; what comes out is the unbroken run's."""
    rng = random.Random(0)
    ds = data.load("mine")
    phi = encoder.train_encoder(ds, log=silent)         # which the processes need not train
    data.save_checkpoint(encoder.encoder_path(ds), **phi)
    environment = dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    line = f"{TINY} --steps {8 * (KILLS + 1)}"
    monkeypatch.setattr(train, "EVERY", dict(log=1, save=3))
    assert call(train, line, "--out whole") == 0
    ends = [signal.SIGINT] + KILLS * [signal.SIGKILL]
    codes = []
    resume = ""
    while 0 not in codes:
        words = f"{line} --out killed {resume}".split()
        run = subprocess.Popen([sys.executable, "-c", OFTEN, *words], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for out in run.stdout:
            if ends and out.startswith("step "):                    # it trains: end it very soon
                time.sleep(rng.uniform(0, 0.25))
                run.send_signal(ends.pop(0))
                break
        rest = run.communicate()[0]
        codes.append(run.returncode)
        assert "Traceback" not in rest
        assert codes[-1] != 130 or "go on with:  python train.py --out killed --resume" in rest
        if Path("killed/checkpoint.pt").exists():
            load_run("killed")                                      # whole, always
            resume = "--resume"
    kills = codes.count(-signal.SIGKILL)
    assert codes[0] == 130 and kills >= min(2, KILLS) and kills + 2 == len(codes)
    assert same(load_run("whole"), load_run("killed"))
    TALLY["runs killed"] += kills


def test_a_full_disk_loses_nothing(begun, capsys):
    before = Path("run/checkpoint.pt").read_bytes()
    resource = pytest.importorskip("resource")          # Windows has none
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:    # a limit on the size of files is the full disk that a test can make
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        check_refused(capsys, train, "--out run --resume --steps 8", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("loss_G, message", [
    (math.nan, "no longer finite at step 6"), (None, "error: CUDA out of memory")])
def test_a_run_that_goes_wrong_ends_in_one_line(begun, monkeypatch, capsys, loss_G, message):
    def step(*inputs, **options):
        if loss_G is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"loss_D": torch.tensor(0.0), "loss_G": torch.tensor(loss_G)}

    before = Path("run/checkpoint.pt").read_bytes()
    monkeypatch.setattr(train, "gan_cls_step", step)
    check_refused(capsys, train, "--steps 40 --out run --resume", message)
    assert Path("run/checkpoint.pt").read_bytes() == before


def odd_files():
    """An image of each kind, captions in files and in a table, and names that are no UTF-8, or not
    printable, which must pass through all files of the cache."""
    files = {"metadata.csv": b"file_name,text\nPNG/1.PNG,a red bird\nGIF/1.GIF,a fish\n",
             "k\udce9\n/a\udcff.png": jpeg(), "k\udce9\n/a\udcff.txt": b"a bird",
             "k\udce9\n/b\udcff.png": jpeg()}
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        files[f"{kind}/1.{kind}"] = jpeg(size=(9, 8), kind=kind)
        files[f"{kind}/1.txt"] = f"a bird\nof kind {kind}\n".encode()
    return files


@pytest.mark.filterwarnings("ignore")      # of Pillow, about odd images
@pytest.mark.parametrize("name, write, read, tries", [
    ("mine", lambda path: written(path, odd_files()), data.load, 100),
    ("cub", lambda path: [written(path, files) for files in cub_files()],
     lambda path: data.load("cub", path), 100),
    ("run.pt", run_by_hand, sample.Model, 30)])
def test_what_is_broken_is_read_or_refused_in_one_line(here, name, write, read, tries):
    rng = random.Random(0)
    write(here / name)
    read(name)
    refused = 0
    for _ in range(tries):
        path = rng.choice([path for path in sorted(here.rglob("*")) if path.is_file()])
        whole = path.read_bytes()               # of the cache too
        path.write_bytes(mutated(rng, whole))
        try:
            read(name)
        except data.UserError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused
    TALLY["broken inputs tried"] += tries


# ==============================================================================================
# The repository itself
# ==============================================================================================

MODULES = ["gan_cls", "encoder", "data", "train", "sample"]
README = (HERE / "README.md").read_text()


def marks(text):
    """Equations, lines and sections that a text names: {"eq. 3", "line 10", "4.1"}."""
    text = text.lower()
    found = set(re.findall(r"algorithm 1|line \d+|(?<![\d.])\d\.\d(?!\.?\d)", text))
    for numbers in re.findall(r"eqs?\. (\d(?:(?:,| and|, and) (?:eq\. )?\d)*)", text):
        found |= {f"eq. {n}" for n in re.findall(r"\d", numbers)}
    return found


def test_the_readme_points_to_the_code():
    """Each function in "Read it with the paper" is there, and names what its row names."""
    needs_exercises(*EXERCISES)                             # else comments may be missing
    named = set()
    for row in re.findall(r"^\|.*", README, re.M):
        for name, module in re.findall(r"\[`([\w.]+)`\]\((\w+)\.py\)", row):
            code = functools.reduce(getattr, name.split("."), sys.modules[module])
            its_marks = marks(re.sub(r"`.*?`|\]\(.*?\)", "", row))
            assert its_marks <= marks(inspect.getsource(code)), f"{name} names not all of {row}"
            named |= its_marks
    assert named >= {f"eq. {n}" for n in range(1, 7)}


@pytest.mark.parametrize("name", ["README.md", "weights/README.md"])
def test_links_lead_somewhere(name):
    text = (HERE / name).read_text()
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        path = (HERE / name).parent / file if file else HERE / name
        assert path.exists(), file
        if anchor:                                          # a heading, as GitHub writes it
            headings = re.findall(r"^#+ (.*)", path.read_text().lower(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings]


@pytest.mark.parametrize("line", re.findall(
    r"python ((?:data|encoder|train|sample)\.py.*?)[`\n]", README))
def test_commands_of_the_readme_are_understood(here, monkeypatch, line):
    """All options that README names are there. Nothing is run but the reading of the line."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(*args):
        parse_args(*args)
        raise KeyboardInterrupt                             # which ends a script with code 130

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    (here / "queries.txt").write_text("a bird\n")
    script, *words = shlex.split(line, comments=True)
    assert call(sys.modules[script.removesuffix(".py")], shlex.join(words)) == 130


def test_nothing_but_torch_numpy_pillow():
    assert {path.stem for path in HERE.glob("*.py")} == {*MODULES, "test_gan_cls"}
    allowed = {*MODULES, *sys.stdlib_module_names, "torch", "numpy", "PIL"}
    for module in MODULES:
        for node in ast.walk(ast.parse((HERE / f"{module}.py").read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                name = getattr(node, "module", node.names[0].name)
                assert name.split(".")[0] in allowed, module
