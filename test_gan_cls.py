"""The tests, and the graders of the README's exercises. No network, no GPU, no other files.

    pytest -q                           # all of them, some minutes
    pytest -q -k exercise_1             # grade one exercise: exercise_1 to exercise_5
    KILLS=100 pytest -q -k killed       # the long form of one test: kill a run 100 times

The order: graders, the paper, the text encoder, data, training, sampling and measuring, the
command line, robustness, the repository itself. Equations are compared with slow versions of
them, written here in float64, that use nothing of the code under test.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
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
# Shared: small images, archives, data sets and runs
# ==============================================================================================

TALLY = {"runs killed": 0, "broken inputs tried": 0}    # counted when the test that did it passed


@pytest.fixture(scope="session", autouse=True)
def tally(request):
    """Says at the end what was tried."""
    yield
    if any(TALLY.values()):
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            counts = ", ".join(f"{what}: {n:,}" for what, n in TALLY.items())
            print(f"\n{counts}; lost: none")


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


def call(module, *args):
    """A script's command line, in this process. Returns its exit code."""
    old = sys.argv
    sys.argv = [module.__name__ + ".py", *map(str, args)]
    try:
        data.run_script(module.main)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = old


# ---- Files -----------------------------------------------------------------------------------

COLOUR_BYTES = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def jpeg(colour=(200, 30, 30), size=(90, 80), kind="JPEG"):
    """The bytes of an image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def unpacked(path, files):
    """Write files, {name: bytes}, to a folder; below, to a .tar or a .zip. Returns the path."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def mutated(rng, content):
    """Some bytes changed, cut out, doubled, or the end missing."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        kind = rng.randrange(5)
        at = rng.randrange(len(content) or 1)
        if kind == 0:
            content[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at:at + rng.randint(1, 64)]
        elif kind == 3:
            content[at:at] = content[at:at + rng.randint(1, 64)]
        else:
            content[at:at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
    return bytes(content)


# ---- Data sets -------------------------------------------------------------------------------

def own_folder(path, classes=4, each=3):
    """A folder of images, `each` of each class, with two captions each."""
    for c in range(classes):
        for i in range(each):
            unpacked(path, {
                f"kind{c}/p{i}.png": jpeg(COLOUR_BYTES[c % 4], kind="PNG"),
                f"kind{c}/p{i}.txt": f"colour {c}\npicture {i}".encode()})
    return path


def small_data(folder, classes=5, each=4):
    """A small data set: 5 classes of 4 images, of which 1 class is unseen."""
    return data.load(str(own_folder(folder / "mine", classes, each)))


def cub_files():
    """{name: bytes} of 12 images and of their captions, in CUB's own layout.

    Of the four classes 1 and 4 are unseen ones.
    """
    images = {}
    captions = {}
    listed = []
    boxes = []
    parts = []
    for c, label in enumerate(("001.Albatross", "002.Auk", "003.Ani", "004.Bunting")):
        for i in range(3):
            number = len(listed) + 1
            name = f"{label}/{label[4:]}_{i:04d}"
            text = f"a bird of kind {c}\n\nit has number {i}\n"
            images[f"CUB_200_2011/images/{name}.jpg"] = jpeg(COLOUR_BYTES[c], (152, 76))
            captions[f"cvpr2016_cub/text_c10/{name}.txt"] = text.encode()
            listed.append(f"{number} {name}.jpg")
            boxes.append(f"{number} 20.0 10.0 40.0 50.0")
            for part in range(1, 16):
                parts.append(f"{number} {part} {part}.0 {2 * part}.0 {int(part != 14)}")

    listed.reverse()        # the order of images.txt is the source's order, whatever it is
    images["CUB_200_2011/images.txt"] = "\n".join(listed).encode()
    images["CUB_200_2011/bounding_boxes.txt"] = "\n".join(boxes).encode()
    images["CUB_200_2011/parts/part_locs.txt"] = "\n".join(parts).encode()
    captions["cvpr2016_cub/trainvalclasses.txt"] = b"002.Auk\n003.Ani\n"
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
    classes = np.concatenate([np.flatnonzero(~toy.unseen_classes)[:4],
                              np.flatnonzero(toy.unseen_classes)[:4]])
    keep = np.flatnonzero(np.isin(toy.labels, classes))
    return dataclasses.replace(
        toy, images=np.array(toy.images[keep]), captions=[toy.captions[i][:3] for i in keep],
        labels=np.searchsorted(classes, toy.labels[keep]), rows=np.arange(len(keep)),
        class_names=[toy.class_names[c] for c in classes],
        unseen_classes=np.array(toy.unseen_classes[classes]),
        boxes=np.array(toy.boxes[keep]), keypoints=np.array(toy.keypoints[keep]))


# ---- Runs ------------------------------------------------------------------------------------

@pytest.fixture
def short_training(monkeypatch):
    """Text encoders are trained for three steps, 8 wide. The options of each training."""
    needs_exercises(3)
    train_encoder = encoder.train_encoder
    calls = []

    def short(ds, device="cpu", steps=0, precision="fp32", **options):
        calls.append(options)
        return train_encoder(ds, device, 3, precision, **dict(options, cnn_dim=8))

    monkeypatch.setattr(encoder, "train_encoder", short)
    return calls


TINY = ("--dataset", "mine", "--ngf", 2, "--ndf", 2, "--batch-size", 8, "--recipe", "quick",
        "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def tiny(here, short_training, monkeypatch):
    """A small data set and short trainings: with TINY a whole run takes a second."""
    needs_exercises(1, 2, 4, 5)
    own_folder(here / "mine", classes=5, each=4)
    train_style_encoder = train.train_style_encoder
    monkeypatch.setattr(train, "train_style_encoder",
                        lambda run, batches: train_style_encoder(run, batches, 3))
    monkeypatch.setattr(train, "EVERY", dict(log=2, sample=4, save=4))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    return here


def load_run(folder):
    return data.load_checkpoint(Path(folder) / "checkpoint.pt", "gan-cls")


def random_run(recipe="quick", variant="gan-int-cls", device="cpu", precision="fp32"):
    """A run and batches of noise, without files: 64 images of 8 classes."""
    needs_exercises(1, 2, 4, 5)
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
# A grader takes a solution, and raises an AssertionError that says what is wrong with it. The
# right solutions here are our own, so a grader does not depend on what a student has written.
# The graders are tested too: on several right ways to write a solution, and on planted mistakes.

RIGHT_WAYS = []     # (grader, right solution)
MISTAKES = []       # (grader, wrong solution)


def attempt(where, solution, *inputs):
    """What the solution returns for these inputs, which it must not change."""
    copies = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    try:
        got = solution(*copies)
    except NotImplementedError:
        got = None
    assert got is not None, f"{where}: nothing is returned. Is the body still blank?"

    for x, copy in zip(inputs, copies):
        if torch.is_tensor(x):
            assert torch.equal(x, copy), \
                f"{where}: an input is changed in place, and the caller still needs it"
    return got


def check_scalar(where, got, right, formula):
    assert torch.is_tensor(got) and got.shape == (), \
        f"{where}: expected a scalar tensor, the mean over the batch; the formula: {formula}"
    assert math.isclose(got.item(), right, rel_tol=1e-4, abs_tol=1e-4), \
        f"{where}: expected {right:.5f}, got {got.item():.5f}; the formula: {formula}"


def check_no_known_mistake(where, got, wrong_formulas):
    """wrong_formulas: a list of (name, its value, hint)."""
    if torch.is_tensor(got) and got.shape == ():
        for name, value, hint in wrong_formulas:
            assert not math.isclose(got.item(), value, rel_tol=1e-5), \
                f"{where}: check {name}. {hint}"


def check_gradient(where, solution, *inputs):
    """Autograd's gradient is compared with finite differences, for each input that requires one.

    The step of 0.01 is large because the losses are computed in 32 bits.
    """
    try:
        torch.autograd.gradcheck(solution, inputs, eps=1e-2, atol=2e-3, rtol=1e-2)
    except RuntimeError as error:
        raise AssertionError(f"{where}: the value is right, but not its gradient. "
                             f"What is detached, or changed in place? ({error})") from None


def blank(*inputs):
    return None


def not_implemented(*inputs):
    raise NotImplementedError


# ---- Exercise 1: Algorithm 1, lines 10 and 12 ------------------------------------------------

def logits(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


REAL = logits(2.0, -1.0, 0.5, 3.0)
WRONG = logits(-0.7, 1.2, 0.1, -2.0)
FAKE = logits(0.3, -1.5, 2.2, -0.4)


def grade_discriminator_loss(solution):
    where = "Algorithm 1, line 10"
    log = torch.log
    s_r, s_w, s_f = [logit.detach().sigmoid() for logit in (REAL, WRONG, FAKE)]
    s_r2, s_w2, s_f2 = [s.sigmoid() for s in (s_r, s_w, s_f)]
    L_D = log(s_r) + (log(1 - s_w) + log(1 - s_f)) / 2

    got = attempt(where, solution, REAL, WRONG, FAKE)
    check_no_known_mistake(where, got, [
        ("the sign", L_D.mean(),
         "An optimiser minimises, so return minus L_D."),
        ("the half", -(log(s_r) + log(1 - s_w) + log(1 - s_f)).mean(),
         "The wrong text and the fake image share the weight of one \"no\"."),
        ("the wrong text", -(log(s_r) + (log(s_w) + log(1 - s_f)) / 2).mean(),
         "A real image with a wrong text must be refused: log(1 - s_w)."),
        ("l_wrong", -(log(s_r) + log(1 - s_f)).mean(),
         "It is given, but it is not used."),
        ("the sigmoid", -(log(s_r2) + (log(1 - s_w2) + log(1 - s_f2)) / 2).mean(),
         "It is taken twice: the inputs are logits, s = sigmoid(logit)."),
    ])
    check_scalar(where, got, -L_D.mean(),
                 "L_D = log(s_r) + (log(1 - s_w) + log(1 - s_f)) / 2, s = sigmoid(logit)")
    check_gradient(where, solution, REAL, WRONG, FAKE)

    where = "eq. 1, the plain GAN, l_wrong=None"
    try:
        got = attempt(where, solution, REAL, None, FAKE)
    except (AttributeError, TypeError) as error:
        raise AssertionError(f"{where}: there is no wrong text, ask for that first ({error})")
    check_scalar(where, got, -(log(s_r) + log(1 - s_f)).mean(), "log D(x) + log(1 - D(G(z)))")
    check_gradient(where, solution, REAL, None, FAKE)
    check_16_bits("Algorithm 1, line 10", solution, 3)


def grade_generator_loss(solution):
    where = "Algorithm 1, line 12"
    s_f = FAKE.detach().sigmoid()

    got = attempt(where, solution, FAKE)
    check_no_known_mistake(where, got, [
        ("the sign", s_f.log().mean(),
         "An optimiser minimises, so return minus L_G."),
        ("which logarithm", -(1 - s_f).log().mean(),
         "G wants its images to be taken for real: log(s_f)."),
        ("which logarithm", (1 - s_f).log().mean(),
         "That is eq. 1, flat where D is sure. Algorithm 1 has log(s_f)."),
    ])
    check_scalar(where, got, -s_f.log().mean(), "L_G = log(s_f), s_f = sigmoid(logit)")
    check_gradient(where, solution, FAKE)
    check_16_bits(where, solution, 1)


def check_16_bits(where, solution, inputs):
    """Under autocast the logits come in 16 bits; 1000 is far outside what exp() can take there."""
    for dtype in (torch.float16, torch.bfloat16):
        for logit in (-1000.0, 1000.0):
            x = torch.full((4,), logit, dtype=dtype)
            loss = solution(*[x] * inputs)
            assert loss.dtype == torch.float32, \
                f"{where}: logits in {dtype} give a loss in {loss.dtype}: .float() them first"
            assert loss.isfinite(), \
                f"{where}: the loss of logits {logit} is {loss:.0f}: use softplus, which never " \
                f"overflows, not the logarithm of a sigmoid"


def test_exercise_1_algorithm_1():
    grade_exercise(1)


def right_D_loss(real, wrong, fake):
    yes = -F.logsigmoid(real.float()).mean()
    no = -F.logsigmoid(-fake.float()).mean()
    if wrong is not None:
        no = (no - F.logsigmoid(-wrong.float()).mean()) / 2
    return yes + no


def cross_entropy_D(real, wrong, fake):
    def answer(logit, wanted):
        logit = logit.float()
        return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, wanted))

    if wrong is None:
        return answer(real, 1.0) + answer(fake, 0.0)
    return answer(real, 1.0) + 0.5 * answer(wrong, 0.0) + 0.5 * answer(fake, 0.0)


def wrong_sign_D(real, wrong, fake):
    return -right_D_loss(real, wrong, fake)


def forgot_the_half(real, wrong, fake):
    if wrong is None:
        return right_D_loss(real, wrong, fake)
    return right_D_loss(real, None, fake) - F.logsigmoid(-wrong.float()).mean()


def sigmoid_twice(real, wrong, fake):
    wrong = None if wrong is None else wrong.sigmoid()
    return right_D_loss(real.sigmoid(), wrong, fake.sigmoid())


def accepted_the_wrong_text(real, wrong, fake):
    return right_D_loss(real, None if wrong is None else -wrong, fake)


def took_the_fake_for_the_wrong_text(real, wrong, fake):
    return right_D_loss(real, fake, fake)


def ignored_the_wrong_text(real, wrong, fake):
    return right_D_loss(real, None, fake)


def always_expects_a_wrong_text(real, wrong, fake):
    return right_D_loss(real, wrong.float(), fake)


def summed_over_the_batch_D(real, wrong, fake):
    return len(real) * right_D_loss(real, wrong, fake)


def detached_the_fake(real, wrong, fake):
    return right_D_loss(real, wrong, fake.detach())


def right_G_loss(fake):
    return F.softplus(-fake.float()).mean()


def cross_entropy_G(fake):
    return F.binary_cross_entropy_with_logits(fake.float(), torch.ones(len(fake)))


def wrong_sign_G(fake):
    return -right_G_loss(fake)


def log_of_one_minus_s(fake):
    return -torch.log(1 - torch.sigmoid(fake)).mean()


def log_of_sigmoid(fake):                       # overflows at a logit of -1000
    return -torch.log(torch.sigmoid(fake.float())).mean()


def stayed_in_16_bits(fake):
    return F.softplus(-fake).mean()


def detached_G(fake):
    return right_G_loss(fake.detach())


RIGHT_WAYS += [
    (grade_discriminator_loss, right_D_loss),
    (grade_discriminator_loss, cross_entropy_D),
    (grade_generator_loss, right_G_loss),
    (grade_generator_loss, cross_entropy_G),
]
MISTAKES += [
    (grade_discriminator_loss, blank),
    (grade_discriminator_loss, not_implemented),
    (grade_discriminator_loss, wrong_sign_D),
    (grade_discriminator_loss, forgot_the_half),
    (grade_discriminator_loss, sigmoid_twice),
    (grade_discriminator_loss, accepted_the_wrong_text),
    (grade_discriminator_loss, took_the_fake_for_the_wrong_text),
    (grade_discriminator_loss, ignored_the_wrong_text),
    (grade_discriminator_loss, always_expects_a_wrong_text),
    (grade_discriminator_loss, summed_over_the_batch_D),
    (grade_discriminator_loss, detached_the_fake),
    (grade_generator_loss, blank),
    (grade_generator_loss, not_implemented),
    (grade_generator_loss, wrong_sign_G),
    (grade_generator_loss, log_of_one_minus_s),
    (grade_generator_loss, log_of_sigmoid),
    (grade_generator_loss, stayed_in_16_bits),
    (grade_generator_loss, detached_G),
]


# ---- Exercise 2: eq. 5 -----------------------------------------------------------------------

def grade_interpolate(solution):
    where = "eq. 5"
    h1 = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
    h2 = torch.tensor([[3.0, -2.0], [8.0, 4.0]])
    expected = [
        (0.5, [[2.0, 0.0], [4.0, 0.0]]),
        (0.25, [[2.5, -1.0], [6.0, 2.0]]),
        (1.0, h1.tolist()),
        (0.0, h2.tolist()),
    ]
    for beta, right in expected:
        got = attempt(where, solution, h1, h2, beta)
        assert torch.is_tensor(got) and got.shape == h1.shape and got.dtype == h1.dtype, \
            f"{where}: expected a tensor of the shape and type of h1"
        assert torch.allclose(got, torch.tensor(right)), \
            f"{where}, beta * h1 + (1 - beta) * h2 with beta = {beta}: " \
            f"expected {right}, got {got.tolist()}"

    got = attempt(where, solution, h1, h2)
    assert torch.allclose(got, (h1 + h2) / 2), \
        f"{where}: section 4.3 fixes beta at 0.5: make it the default"


def test_exercise_2_interpolate():
    grade_exercise(2)


def right_blend(h1, h2, beta=0.5):
    return beta * h1 + (1 - beta) * h2


def lerp(h1, h2, beta=0.5):
    return torch.lerp(h2, h1, beta)


def beta_for_both(h1, h2, beta=0.5):
    return beta * h1 + beta * h2


def beta_for_the_second(h1, h2, beta=0.5):
    return (1 - beta) * h1 + beta * h2


def another_default(h1, h2, beta=0.3):
    return beta * h1 + (1 - beta) * h2


def changed_in_place(h1, h2, beta=0.5):
    return h1.mul_(beta).add_((1 - beta) * h2)


RIGHT_WAYS += [
    (grade_interpolate, right_blend),
    (grade_interpolate, lerp),
]
MISTAKES += [
    (grade_interpolate, blank),
    (grade_interpolate, not_implemented),
    (grade_interpolate, beta_for_both),
    (grade_interpolate, beta_for_the_second),
    (grade_interpolate, another_default),
    (grade_interpolate, changed_in_place),
]


# ---- Exercise 3: eq. 2 -----------------------------------------------------------------------

def grade_joint_embedding_loss(solution):
    where = "eq. 2, with a hinge for the 0-1 loss"
    g = torch.Generator().manual_seed(3)
    N = 5
    v = torch.randn(N, 7, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(N, 7, generator=g, dtype=torch.float64, requires_grad=True)

    pairs = N * (N - 1)
    images_choose = 0.0
    texts_choose = 0.0
    without_margin = 0.0
    for i, j in np.ndindex(N, N):
        if i != j:
            s_ii = (v[i] @ t[i]).item()
            s_ij = (v[i] @ t[j]).item()                     # image i with the text of image j
            s_ji = (v[j] @ t[i]).item()                     # image j with the text of image i
            images_choose += max(0, 1 + s_ij - s_ii) / pairs
            texts_choose += max(0, 1 + s_ji - s_ii) / pairs
            without_margin += (max(0, s_ij - s_ii) + max(0, s_ji - s_ii)) / pairs
    right = images_choose + texts_choose
    over_all = right * pairs / N ** 2                       # divided by N^2, not by N (N - 1)
    diagonal = 2 / N                                        # 1 + s_ii - s_ii, N times, twice

    got = attempt(where, solution, v, t)
    check_no_known_mistake(where, got, [
        ("the directions", images_choose, "Texts must also choose among images."),
        ("the directions", texts_choose, "Images must also choose among texts."),
        ("the directions", 2 * images_choose, "The same one is taken twice."),
        ("the directions", 2 * texts_choose, "The same one is taken twice."),
        ("the directions", right / 2, "They are added, not averaged."),
        ("the margin", without_margin, "The right partner must score by 1 more."),
        ("the diagonal", over_all + diagonal, "i = j is the right partner, not another one."),
        ("the mean", over_all, "It is over the N (N - 1) pairs with i != j."),
    ])
    check_scalar(where, got, right, "the mean over i != j of max(0, 1 + s_ij - s_ii), "
                 "plus the same with images and texts exchanged")
    check_gradient(where, solution, v, t)


def test_exercise_3_joint_embedding():
    grade_exercise(3)


def hinge(s):
    """Each row of s chooses: mean over i != j of max(0, 1 + s_ij - s_ii)."""
    other = ~torch.eye(len(s), dtype=torch.bool)
    return F.relu(1 + s - s.diagonal()[:, None])[other].mean()


def right_joint_loss(v, t):
    return hinge(v @ t.T) + hinge(t @ v.T)


def diagonal_subtracted(v, t):
    def direction(s):
        N = len(s)
        return (F.relu(1 + s - s.diagonal()[:, None]).sum() - N) / (N * (N - 1))

    return direction(v @ t.T) + direction(t @ v.T)


def one_direction(v, t):
    return hinge(v @ t.T)


def one_direction_twice(v, t):
    return hinge(v @ t.T) * 2


def kept_the_diagonal(v, t):
    s = v @ t.T
    right = s.diagonal()
    return F.relu(1 + s - right[:, None]).mean() + F.relu(1 + s - right).mean()


def no_margin(v, t):
    s = v @ t.T
    right = s.diagonal()
    other = ~torch.eye(len(s), dtype=torch.bool)
    return F.relu(s - right[:, None])[other].mean() + F.relu(s - right)[other].mean()


def diagonal_filled_in_place(v, t):             # the value is right, backward() fails
    def direction(s):
        N = len(s)
        hinges = F.relu(1 + s - s.diagonal()[:, None]).fill_diagonal_(0)
        return hinges.sum() / (N * (N - 1))

    return direction(v @ t.T) + direction(t @ v.T)


RIGHT_WAYS += [
    (grade_joint_embedding_loss, right_joint_loss),
    (grade_joint_embedding_loss, diagonal_subtracted),
]
MISTAKES += [
    (grade_joint_embedding_loss, blank),
    (grade_joint_embedding_loss, not_implemented),
    (grade_joint_embedding_loss, one_direction),
    (grade_joint_embedding_loss, one_direction_twice),
    (grade_joint_embedding_loss, kept_the_diagonal),
    (grade_joint_embedding_loss, no_margin),
    (grade_joint_embedding_loss, diagonal_filled_in_place),
]


# ---- Exercise 4: section 4.1, the text at every place of the map -----------------------------

def grade_score(solution):
    where = "section 4.1"
    torch.manual_seed(0)
    D = gan_cls.Discriminator(ndf=2, text_dim=6, text_small=3, joint=8)
    f = torch.randn(5, 16, 4, 4, requires_grad=True)
    h = torch.randn(5, 6, requires_grad=True)

    t = D.text(h)
    depth = torch.zeros(5, 16 + 3, 4, 4)
    for b, y, x in np.ndindex(5, 4, 4):
        depth[b, :16, y, x] = f[b, :, y, x]
        depth[b, 16:, y, x] = t[b]
    right = D.joint(depth).flatten()

    try:
        got = attempt(where, solution, D, f, h)
    except RuntimeError as error:
        raise AssertionError(f"{where}: the sizes do not fit. They are those of f and of "
                             f"self.text(h), here 3 channels and not 128 ({error})") from None
    assert torch.is_tensor(got) and got.shape == (5,), \
        f"{where}: expected a tensor of 5 logits, one an image, not {got}"
    assert not torch.allclose(got, right.sigmoid(), atol=1e-5), \
        f"{where}: expected logits; the losses take the sigmoid"
    assert torch.allclose(got, right, atol=1e-5), \
        f"{where}: the compressed text of each image must stand at all 16 places of its 4x4 " \
        f"map, behind the features in depth"

    expected = torch.autograd.grad(right.square().sum(), [f, h])
    gradients = [None, None]
    if got.requires_grad:
        gradients = torch.autograd.grad(got.square().sum(), [f, h], allow_unused=True)
    for name, gradient, wanted in zip("fh", gradients, expected):
        tolerance = 1e-3 * wanted.abs().max().item()
        assert gradient is not None and torch.allclose(gradient, wanted, atol=tolerance), \
            f"{where}: the logits are right, their gradient by {name} is not: is it detached?"


def test_exercise_4_replication():
    grade_exercise(4)


def spread(t):
    """(B, c) -> (B, c, 4, 4), the same at all places."""
    return t[:, :, None, None].expand(-1, -1, 4, 4)


def right_score(D, f, h):
    return D.joint(torch.cat([f, spread(D.text(h))], 1)).flatten()


def repeat_and_index(D, f, h):
    t = D.text(h)
    t = t.view(len(t), -1, 1, 1).repeat(1, 1, 4, 4)
    return D.joint(torch.cat((f, t), dim=1))[:, 0]


def detached_the_text(D, f, h):
    return right_score(D, f, h.detach())


def one_corner_only(D, f, h):
    t = F.pad(D.text(h)[:, :, None, None], (0, 3, 0, 3))
    return D.joint(torch.cat([f, t], 1)).flatten()


def text_before_features(D, f, h):
    return D.joint(torch.cat([spread(D.text(h)), f], 1)).flatten()


def text_not_compressed(D, f, h):
    return D.joint(torch.cat([f, spread(h)], 1)).flatten()


def text_of_another_image(D, f, h):
    return D.joint(torch.cat([f, spread(D.text(h).flip(0))], 1)).flatten()


def sigmoid_of_the_logits(D, f, h):
    return right_score(D, f, h).sigmoid()


RIGHT_WAYS += [
    (grade_score, right_score),
    (grade_score, repeat_and_index),
]
MISTAKES += [
    (grade_score, blank),
    (grade_score, not_implemented),
    (grade_score, detached_the_text),
    (grade_score, one_corner_only),
    (grade_score, text_before_features),
    (grade_score, text_not_compressed),
    (grade_score, text_of_another_image),
    (grade_score, sigmoid_of_the_logits),
]


# ---- Exercise 5: eq. 6 -----------------------------------------------------------------------

def grade_style_loss(solution):
    where = "eq. 6"
    z = torch.zeros(2, 100)
    z_hat = torch.zeros(2, 100, dtype=torch.float64)
    z[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    z_hat[0, :3] = torch.tensor([1.0, 0.0, 0.0])            # 0 + 4 + 9
    z_hat[1, :3] = torch.tensor([2.0, 0.0, 0.0])            # 4 + 0 + 0
    z_hat.requires_grad_(True)

    got = attempt(where, solution, z, z_hat)
    check_no_known_mistake(where, got, [
        ("the mean", 17 / 200, "|| ||^2 is the sum over the 100 numbers of z, not their mean."),
        ("the mean", 17.0, "It is missing: the mean over the batch."),
        ("the square", (13 ** 0.5 + 4 ** 0.5) / 2, "The norm is squared."),
        ("the square", (5 + 2) / 2, "That is the sum of absolute differences."),
    ])
    check_scalar(where, got, 17 / 2, "||z - S(G(z, phi(t)))||^2: the sum over the numbers of z, "
                 "then the mean over the batch")
    check_gradient(where, solution, z, z_hat)               # z is noise and needs no gradient


def test_exercise_5_style():
    grade_exercise(5)


def right_style_loss(z, z_hat):
    return (z - z_hat).square().sum(1).mean()


def mse_loss(z, z_hat):
    return F.mse_loss(z_hat, z.to(z_hat), reduction="sum") / len(z)


def detached_z_hat(z, z_hat):
    return right_style_loss(z, z_hat.detach())


def mean_over_the_numbers(z, z_hat):
    return (z - z_hat).square().mean()


def sum_over_the_batch(z, z_hat):
    return (z - z_hat).square().sum()


def norm_not_squared(z, z_hat):
    return (z - z_hat).norm(dim=1).mean()


def absolute_differences(z, z_hat):
    return (z - z_hat).abs().sum(1).mean()


RIGHT_WAYS += [
    (grade_style_loss, right_style_loss),
    (grade_style_loss, mse_loss),
]
MISTAKES += [
    (grade_style_loss, blank),
    (grade_style_loss, not_implemented),
    (grade_style_loss, detached_z_hat),
    (grade_style_loss, mean_over_the_numbers),
    (grade_style_loss, sum_over_the_batch),
    (grade_style_loss, norm_not_squared),
    (grade_style_loss, absolute_differences),
]


# ---- All exercises ---------------------------------------------------------------------------

EXERCISES = {
    1: [(grade_discriminator_loss, gan_cls.discriminator_loss),
        (grade_generator_loss, gan_cls.generator_loss)],
    2: [(grade_interpolate, gan_cls.interpolate)],
    3: [(grade_joint_embedding_loss, encoder.joint_embedding_loss)],
    4: [(grade_score, gan_cls.Discriminator.score)],
    5: [(grade_style_loss, gan_cls.style_loss)],
}


def grade_exercise(number):
    for grader, solution in EXERCISES[number]:
        grader(solution)


@functools.cache
def what_is_wrong(number):
    """The grader's message, or None where the exercise is solved."""
    try:
        grade_exercise(number)
    except Exception as error:
        return str(error) or type(error).__name__


def needs_exercises(*numbers):
    """For tests that run what exercises ask for: say which one is not solved, and stop there."""
    for number in numbers:
        if what_is_wrong(number):
            pytest.fail(f"This test runs what exercise {number} asks for, and it is not solved "
                        f"yet: pytest -q -k exercise_{number}\n{what_is_wrong(number)}",
                        pytrace=False)


@pytest.mark.parametrize("grader, solution", RIGHT_WAYS)
def test_graders_accept(grader, solution):
    grader(solution)


@pytest.mark.parametrize("grader, mistake", MISTAKES)
def test_graders_refuse(grader, mistake):
    with pytest.raises(AssertionError, match="Algorithm 1|eq. |section 4"):     # it must teach
        grader(mistake)


# ==============================================================================================
# The paper: gan_cls.py
# ==============================================================================================

def small_nets(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    G = gan_cls.Generator(4, text_dim=12, text_small=5)
    D = gan_cls.Discriminator(4, text_dim=12, text_small=5, joint=16)
    return G.to(dtype), D.to(dtype)


def small_batch(B=8, dtype=torch.float64, side=64):
    """x, h, h_wrong."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(B, 3, side, side, generator=g, dtype=torch.float64) * 2 - 1
    h = torch.randn(B, 12, generator=g, dtype=torch.float64)
    h_wrong = torch.randn(B, 12, generator=g, dtype=torch.float64)
    return x.to(dtype), h.to(dtype), h_wrong.to(dtype)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def gradients(net):
    return [p.grad for p in net.parameters()]


def assert_near(tensors, others):
    """Equal but for the rounding of the losses, which are computed in 32 bits."""
    for a, b in zip(tensors, others, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9


def take_step(G, D, batch, rate_G=1.0, rate_D=1.0, **options):
    """gan_cls_step with plain gradient descent, and always the same noise."""
    needs_exercises(1, 4)
    if options.get("int_", True):
        needs_exercises(2)
    opt_G = torch.optim.SGD(G.parameters(), rate_G)
    opt_D = torch.optim.SGD(D.parameters(), rate_D)
    torch.manual_seed(7)
    return gan_cls.gan_cls_step(G, D, opt_G, opt_D, *batch, **options)


def same_noise(count):
    torch.manual_seed(7)
    return torch.randn(count, 100)


every_variant = pytest.mark.parametrize(
    "cls, int_", [(False, False), (True, False), (False, True), (True, True)],
    ids=["gan", "gan-cls", "gan-int", "gan-int-cls"])


# ---- 4.1: the networks -----------------------------------------------------------------------

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
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                assert abs(m.weight.mean()) < 0.003
                assert abs(m.weight.std() - 0.02) < 0.003
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert abs(m.weight.mean() - 1) < 0.02
                assert 0 < m.weight.std() < 0.05
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                assert m.bias is None                       # the authors hold them at zero
            elif getattr(m, "bias", None) is not None:
                assert not m.bias.any()


def test_layers_of_D():
    """[A] 4.1: leaky ReLUs, of slope 0.2 in the authors' code; batch norm but on the first layer,
    and on the text as there."""
    D = gan_cls.Discriminator(8)
    slopes = {m.negative_slope for m in D.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2}
    assert [type(m) for m in D.text] == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU]
    assert [type(m) for m in D.joint[:3]] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    kinds = [type(m) for m in D.features][:5]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]


def test_one_image_pass_serves_two_texts():
    needs_exercises(4)
    _, D = small_nets()
    x, h, h_wrong = small_batch()
    f = D.features(x)
    assert D(x, h).shape == (8,)
    assert torch.equal(D.score(f, h), D(x, h))
    assert torch.equal(D.score(f, h_wrong), D(x, h_wrong))
    assert not torch.allclose(D(x, h), D(x, h_wrong))       # the text matters


def tower_for_128x128(tower, ndf):
    _, *rest = tower
    return nn.Sequential(gan_cls.conv(3, ndf // 2, 4, 2, 1), nn.LeakyReLU(0.2),
                         gan_cls.conv(ndf // 2, ndf, 4, 2, 1), *rest)


def test_networks_for_128x128():
    """One more layer in G and one in the tower, where the comments in gan_cls.py ask for them."""
    G, D = small_nets(dtype=torch.float32)
    S = gan_cls.StyleEncoder(4)
    *layers, to_pixels, tanh = G.net
    G.net = nn.Sequential(*layers, gan_cls.deconv(4, 4), nn.BatchNorm2d(4), nn.ReLU(),
                          to_pixels, tanh)
    D.features = tower_for_128x128(D.features, 4)
    S.net[0] = tower_for_128x128(S.net[0], 4)
    for net in (G, D, S):
        gan_cls.init_weights(net)

    x, h, h_wrong = small_batch(4, torch.float32, side=128)
    assert D.features(x).shape == (4, 32, 4, 4)
    assert S(x).shape == (4, 100)
    assert G(torch.randn(4, 100), h).shape == (4, 3, 128, 128)

    old_G = weights(G)
    old_D = weights(D)
    out = take_step(G, D, (x, h, h_wrong), view=gan_cls.augment)
    assert all(value.isfinite() for value in out.values())
    assert not same(old_G, weights(G))
    assert not same(old_D, weights(D))


# ---- 4.2, 4.3: Algorithm 1 -------------------------------------------------------------------

def algorithm_1(G, D, x, h, h_wrong, cls, int_, view=nn.Identity(), reward=None,
                blends_to_D=False):
    """[A] Algorithm 1 line by line: D looks at images three times, logarithms are spelled out.

    D moves by minus its gradient. Returns the gradients of D's and of G's weights, and the losses.
    """
    B = len(x)
    texts = h
    if int_:
        t1, t2 = h.split(B // 2)
        texts = torch.cat([h, 0.5 * t1 + 0.5 * t2])         # eq. 5
    z = same_noise(len(texts))                              # line 5
    x_fake = G(z, texts)                                    # line 6

    s_r = torch.sigmoid(D(view(x), h))                      # line 7
    s_w = torch.sigmoid(D(view(x), h_wrong))                # line 8
    shown = len(texts) if blends_to_D else B
    s_f = torch.sigmoid(D(view(x_fake[:shown]), texts[:shown]))         # line 9
    fake = (1 - s_f).log().mean()
    if cls:
        L_D = s_r.log().mean() + ((1 - s_w).log().mean() + fake) / 2    # line 10
    else:
        L_D = s_r.log().mean() + fake                       # eq. 1
    loss_D = -L_D
    gradients_D = torch.autograd.grad(loss_D, list(D.parameters()), retain_graph=True)
    with torch.no_grad():
        for p, gradient in zip(D.parameters(), gradients_D):
            p.sub_(gradient)                                # line 11

    s = torch.sigmoid(D(view(G(z, texts)), texts))
    loss_G = -s[:B].log().mean()                            # line 12
    if int_:
        loss_G = loss_G - s[B:].log().mean()
    total = loss_G
    if reward is not None:
        total = total + reward(z, texts, G(z, texts))
    gradients_G = torch.autograd.grad(total, list(G.parameters()))
    return gradients_D, gradients_G, loss_D, loss_G


@every_variant
def test_the_step_is_algorithm_1(cls, int_):
    G, D = small_nets()
    batch = small_batch()
    for p in [*G.parameters(), *D.parameters()]:
        p.grad = torch.ones_like(p)             # left by an earlier step: must not count
    out = take_step(G, D, batch, cls=cls, int_=int_)

    slow_G, slow_D = small_nets()
    gradients_D, gradients_G, loss_D, loss_G = algorithm_1(slow_G, slow_D, *batch, cls, int_)
    assert_near(gradients(D), gradients_D)      # G's half of the step adds nothing to these
    assert_near(gradients(G), gradients_G)
    assert_near(weights(D), weights(slow_D))
    assert_near([out["loss_D"], out["loss_G"]], [loss_D, loss_G])
    assert all(p.requires_grad for p in D.parameters())
    assert not any(value.requires_grad for value in out.values())


@every_variant
def test_blends_to_D_shows_D_the_fake_images_of_the_blends(cls, int_):
    G, D = small_nets()
    batch = small_batch()
    seen = []
    D.text.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    out = take_step(G, D, batch, cls=cls, int_=int_, blends_to_D=True)

    slow_G, slow_D = small_nets()
    gradients_D, gradients_G, loss_D, loss_G = algorithm_1(
        slow_G, slow_D, *batch, cls, int_, blends_to_D=True)
    assert_near(gradients(D), gradients_D)
    assert_near(gradients(G), gradients_G)
    assert_near([out["loss_D"], out["loss_G"]], [loss_D, loss_G])
    assert len(seen[-2]) == (12 if int_ else 8)             # the last is for G's loss
    # D's gradient is another one where there are blends, and only there.
    G_alone, D_alone = small_nets()
    take_step(G_alone, D_alone, batch, cls=cls, int_=int_)
    assert same(gradients(D), gradients(D_alone)) == (not int_)


@pytest.mark.parametrize("moving", ["D", "G"])
def test_each_half_moves_its_own_network(moving):
    G, D = small_nets()
    old_G = weights(G)
    old_D = weights(D)
    take_step(G, D, small_batch(), rate_G=float(moving == "G"), rate_D=float(moving == "D"))
    assert same(old_G, weights(G)) == (moving != "G")
    assert same(old_D, weights(D)) == (moving != "D")


@every_variant
def test_a_variant_has_its_own_texts(cls, int_):
    x, h, h_wrong = small_batch()
    G, D = small_nets()
    texts_of_G = []
    texts_of_D = []
    G.register_forward_pre_hook(lambda net, inputs: texts_of_G.append(inputs[1]))
    D.text.register_forward_pre_hook(lambda net, inputs: texts_of_D.append(inputs[0]))
    out = take_step(G, D, (x, h, h_wrong), cls=cls, int_=int_)

    assert ("D(wrong)" in out) == cls                       # only CLS shows D a wrong text
    assert any(torch.equal(texts, h_wrong) for texts in texts_of_D) == cls
    assert len(texts_of_G) == 1
    assert len(texts_of_G[0]) == (12 if int_ else 8)        # only INT blends, B/2 times
    assert torch.equal(texts_of_G[0][:8], h)
    if int_:
        for i in range(4):                                  # of two different images of the batch
            assert torch.allclose(texts_of_G[0][8 + i], 0.5 * h[i] + 0.5 * h[4 + i])


def test_the_switches_change_the_losses_they_should():
    losses = {}
    for name, cls, int_ in (("gan", False, False), ("cls", True, False), ("int", False, True)):
        G, D = small_nets()
        losses[name] = take_step(G, D, small_batch(), 0.0, 0.0, cls=cls, int_=int_)

    assert losses["cls"]["loss_D"] != losses["gan"]["loss_D"]           # CLS: another loss of D
    assert losses["cls"]["loss_G"] == losses["gan"]["loss_G"]
    assert losses["int"]["loss_G"] > 1.5 * losses["gan"]["loss_G"]      # INT: a second term, eq. 5


def test_each_image_passes_once():
    G, D = small_nets()
    counts = []
    D.features.register_forward_pre_hook(lambda net, inputs: counts.append(("D", len(inputs[0]))))
    G.register_forward_pre_hook(lambda net, inputs: counts.append(("G", len(inputs[0]))))
    take_step(G, D, small_batch())
    # G: 8 captions and 4 blends. D: the real images, once for both texts; the fake ones; and
    # for G's loss those and the blends.
    assert counts == [("G", 12), ("D", 8), ("D", 8), ("D", 12)]


def test_view_is_what_d_sees():
    G, D = small_nets()
    batch = small_batch()
    generated = []
    viewed = []
    seen = []
    G.register_forward_hook(lambda net, inputs, x_fake: generated.append(x_fake))
    D.features.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))

    def halve(images):
        viewed.append(images)
        return images / 2

    take_step(G, D, batch, view=halve)
    x_fake = generated[0]
    assert same(viewed, [batch[0], x_fake[:8], x_fake])
    assert same(seen, [images / 2 for images in viewed])
    assert not viewed[1].requires_grad                      # D's half does not move G

    # G's gradient goes through the view.
    slow_G, slow_D = small_nets()
    gradients_D, gradients_G, _, _ = algorithm_1(slow_G, slow_D, *batch, True, True, view=halve)
    assert_near(gradients(D), gradients_D)
    assert_near(gradients(G), gradients_G)


def test_extra_G_loss_reaches_G_and_not_D():
    G, D = small_nets()
    batch = small_batch()
    torch.manual_seed(5)
    style_Q = gan_cls.StyleEncoder(4).double()
    calls = []

    def reward(z, texts, x_fake):
        """Eq. 6, weighted: the z of each image should be read from it."""
        calls.append((z, texts, x_fake))
        z_hat = style_Q(x_fake)
        return 0.3 * sum((z[i] - z_hat[i]).square().sum() for i in range(len(z))) / len(z)

    out = take_step(G, D, batch, extra_G_loss=reward)
    gradients_Q = gradients(style_Q)

    slow_G, slow_D = small_nets()
    gradients_D, gradients_G, _, loss_G = algorithm_1(
        slow_G, slow_D, *batch, True, True, reward=reward)
    assert len(calls) == 2                                  # one by the step, one by the slow one
    for got, expected in zip(*calls):                       # z, texts, x_fake
        assert len(got) == 12
        assert torch.allclose(got, expected)
    assert_near(gradients(D), gradients_D)
    assert_near(gradients(G), gradients_G)
    assert_near([out["loss_G"]], [loss_G])                  # reported without the extra term
    assert all(gradient.any() for gradient in gradients_Q)

    # Without it G's gradient is another one: the extra term matters.
    G_alone, D_alone = small_nets()
    take_step(G_alone, D_alone, batch)
    assert same(gradients(D_alone), gradients(D))
    assert not same(gradients(G_alone), gradients(G))


# ---- Not in the paper ------------------------------------------------------------------------

def test_augment_draws_for_each_image():
    """A row ramp, a column ramp and a flat channel show what is done to an image: they tell it."""
    torch.manual_seed(0)
    N = 500
    ramp = torch.linspace(-0.5, 0.5, 64)
    flat = 0.4
    image = torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64),
                         torch.full((64, 64), flat)])
    y = gan_cls.augment(image.expand(N, 3, 64, 64), shift=8)
    assert y.shape == (N, 3, 64, 64)

    # y = gain * x + offset, moved; rows and columns 20 to 40 are far from the border.
    gain = (y[:, 0, 40, 32] - y[:, 0, 20, 32]) / (ramp[40] - ramp[20])
    offset = y[:, 2, 32, 32] - gain * flat
    brightness = offset - (1 - gain) * image.mean()         # contrast keeps the mean
    pixel = ramp[1] - ramp[0]
    down = ((y[:, 0, 32, 32] - offset) / gain - ramp[32]) / pixel
    right = ((y[:, 1, 32, 32] - offset) / gain - ramp[32]) / pixel

    # The whole range is used, and nothing outside it.
    for drawn, low, high in ((gain, 0.8, 1.2), (brightness, -0.2, 0.2)):
        near_an_end = 0.05 * (high - low)
        assert low - 1e-4 <= drawn.min() <= low + near_an_end
        assert high - near_an_end <= drawn.max() <= high + 1e-4
    assert set(down.round().int().tolist()) == set(range(-8, 9))
    assert set(right.round().int().tolist()) == set(range(-8, 9))

    # Four draws an image, and none follows from another.
    correlations = torch.corrcoef(torch.stack([gain, brightness, down, right]))
    assert (correlations - torch.eye(4)).abs().max() < 0.2

    # With these four numbers loops give the same images, the border repeated.
    for n in range(3):
        dy = round(down[n].item())
        dx = round(right[n].item())
        expected = torch.zeros(3, 64, 64)
        for i, j in np.ndindex(64, 64):
            from_i = min(max(i + dy, 0), 63)
            from_j = min(max(j + dx, 0), 63)
            expected[:, i, j] = gain[n] * image[:, from_i, from_j] + offset[n]
        assert torch.allclose(y[n], expected, atol=1e-4)


def test_augment_is_differentiable():
    x = small_batch(6, torch.float32)[0].requires_grad_(True)
    change = torch.randn(x.shape)
    weight = torch.randn(x.shape)

    def augmented(images):
        torch.manual_seed(3)
        return gan_cls.augment(images)

    y = augmented(x)
    (y * weight).sum().backward()
    # With the same draws augment is linear: the gradient tells what any change of x does.
    expected = ((augmented(x + change) - y) * weight).flatten(1).sum(1)
    got = (x.grad * change).flatten(1).sum(1)
    assert torch.allclose(got, expected, atol=0.02)
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_sharpen_against_loops():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = x.clone()
    for n, c, i, j in np.ndindex(*x.shape):
        around = x[n, c, max(0, i - 1):i + 2, max(0, j - 1):j + 2]      # fewer at the border
        expected[n, c, i, j] += 0.7 * (x[n, c, i, j] - around.mean())
    assert torch.allclose(gan_cls.sharpen(x, 0.7), expected)


def test_sharpen_shows_checkerboards():
    flat = torch.full((1, 3, 64, 64), 0.25)
    assert torch.allclose(gan_cls.sharpen(flat, 1.5), flat)             # no fine detail in it

    place = torch.arange(64)
    sign = 1 - 2 * ((place[:, None] + place) % 2)
    checkerboard = gan_cls.sharpen(flat + 0.1 * sign, 1.5) - flat
    stronger = 1 + 1.5 * 8 / 9                                          # 2.3 times
    assert torch.allclose(checkerboard[..., 1:-1, 1:-1], 0.1 * stronger * sign[1:-1, 1:-1])


def test_mode_seeking_rewards_different_images():
    z1 = torch.zeros(2, 100)
    z2 = torch.ones(2, 100)

    def loss(first, second):
        """Of two pairs of images that differ by this much."""
        x1 = torch.zeros(2, 3, 8, 8)
        x2 = x1 + torch.tensor([first, second])[:, None, None, None]
        return gan_cls.mode_seeking_loss(z1, z2, x1, x2).item()

    assert loss(0.1, 0.1) == pytest.approx(1 / 0.15, rel=1e-5)
    assert loss(0.1, 0.5) == pytest.approx((1 / 0.15 + 1 / 0.55) / 2, rel=1e-5)
    assert loss(0.3, 0.3) < loss(0.0, 0.6)      # a large difference does not excuse a small one


def test_r1_penalty_against_finite_differences():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 12 + 4, generator=g, dtype=torch.float64)   # images 3x2x2, and texts
    first = torch.randn(16, 5, generator=g, dtype=torch.float64) / 4
    second = torch.randn(5, generator=g, dtype=torch.float64)

    def tiny_D(x, h, first, second):
        """(B, 3, 2, 2), (B, 4) -> logits (B,)."""
        return torch.tanh(torch.cat([x.flatten(1), h], 1) @ first) @ second

    def logits(inputs):
        return tiny_D(inputs[:, :12].view(-1, 3, 2, 2), inputs[:, 12:], first, second)

    eps = 1e-5
    expected = 0.0
    for n, k in np.ndindex(2, 16):
        step = torch.zeros_like(inputs)
        step[n, k] = eps
        slope = (logits(inputs + step) - logits(inputs - step))[n].item() / (2 * eps)
        expected += slope ** 2 / 2                                      # mean over the batch

    def penalty(first, second):
        x = inputs[:, :12].view(-1, 3, 2, 2)
        h = inputs[:, 12:]
        return gan_cls.r1_penalty(lambda x, h: tiny_D(x, h, first, second), x, h)

    assert penalty(first, second).item() == pytest.approx(expected, rel=1e-6)
    # Its own gradient, for D's weights, is a second derivative.
    assert torch.autograd.gradcheck(penalty, (first.requires_grad_(), second.requires_grad_()))


def test_r1_penalty_moves_only_D():
    needs_exercises(4)
    G, D = small_nets()
    x, h, _ = small_batch()
    old_G = weights(G)
    opt_D = torch.optim.SGD(D.parameters(), 1e-3)
    x_fake = G(torch.randn(8, 100), h)
    before = gan_cls.r1_penalty(D, x_fake, h)
    before.backward()
    opt_D.step()
    assert gan_cls.r1_penalty(D, x_fake, h) < before
    assert gradients(G) == [None] * len(old_G)              # nothing flows on to G
    assert same(old_G, weights(G))


# ---- Precision and devices -------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_is_near_full_precision(dtype):
    batch = small_batch(16, torch.float32)
    G, D = small_nets(dtype=torch.float32)
    full = take_step(G, D, batch, 0.01, 0.01)
    G, D = small_nets(dtype=torch.float32)
    old_G = weights(G)
    old_D = weights(D)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10, enabled=dtype == torch.float16)
    mixed = take_step(G, D, batch, 0.01, 0.01, amp=torch.autocast("cpu", dtype), scaler=scaler)

    for key in full:
        assert mixed[key].item() == pytest.approx(full[key].item(), rel=0.05, abs=0.05)
    assert mixed["loss_D"] != full["loss_D"]                # it was on
    assert mixed["loss_D"].dtype == mixed["loss_G"].dtype == torch.float32
    for tensor in [*G.state_dict().values(), *D.state_dict().values()]:
        assert tensor.dtype in (torch.float32, torch.int64)     # int64: batch norm counts
    assert not same(old_G, weights(G))
    assert not same(old_D, weights(D))


def test_loss_scaling_changes_nothing_but_overflow():
    """fp16 needs a GradScaler. Scaling by a power of two is exact, so its path can be checked."""
    batch = small_batch(dtype=torch.float32)
    G, D = small_nets(dtype=torch.float32)
    take_step(G, D, batch)
    scaled_G, scaled_D = small_nets(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    take_step(scaled_G, scaled_D, batch, scaler=scaler)
    assert scaler.get_scale() == 2.0 ** 10
    assert same(weights(D), weights(scaled_D))
    assert same(weights(G), weights(scaled_G))


def test_an_overflow_skips_the_half_it_is_in():
    batch = small_batch(dtype=torch.float32)
    G, D = small_nets(dtype=torch.float32)
    old_G = weights(G)
    old_D = weights(D)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)

    def overflow(z, texts, x_fake):
        return x_fake.sum() * float("inf")

    take_step(G, D, batch, scaler=scaler, extra_G_loss=overflow)
    assert not same(old_D, weights(D))
    assert same(old_G, weights(G))
    assert scaler.get_scale() == 2.0 ** 9                   # and the next step scales less

    take_step(G, D, batch, scaler=scaler)                   # and goes on
    assert not same(old_G, weights(G))
    assert all(p.isfinite().all() for p in [*G.parameters(), *D.parameters()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_on_cuda(dtype):
    G, D = small_nets(dtype=torch.float32)
    batch = small_batch(dtype=torch.float32)
    expected = take_step(G, D, batch, 0.01, 0.01)

    G, D = small_nets(dtype=torch.float32)
    G.cuda().to(memory_format=torch.channels_last)
    D.cuda().to(memory_format=torch.channels_last)
    out = take_step(
        G, D, [tensor.cuda() for tensor in batch], 0.01, 0.01,
        amp=torch.autocast("cuda", dtype, enabled=dtype != torch.float32),
        scaler=torch.amp.GradScaler("cuda", enabled=dtype == torch.float16))
    # The noise is another on CUDA, so the losses are only near.
    for key in expected:
        assert out[key].item() == pytest.approx(expected[key].item(), rel=0.3, abs=0.1)


# ==============================================================================================
# The text encoder: encoder.py
# ==============================================================================================

def small_phi(seed=0):
    torch.manual_seed(seed)
    return encoder.CharCNNRNN(8).eval()


def quick_encoder(ds, **options):
    """A text encoder trained for two steps."""
    needs_exercises(3)
    options = dict(dict(steps=2, cnn_dim=8, log=silent), **options)
    return encoder.train_encoder(ds, **options)


def save_features(path, rows=20, kind=np.float16):
    np.save(path, np.random.default_rng(0).normal(size=(rows, 1024)).astype(kind))
    return path


def test_alphabet():
    assert len(encoder.ALPHABET) == 70
    assert encoder.ALPHABET.count("-") == 2 and encoder.ALPHABET[-1] == " "
    row = encoder.encode_text(["aZ 9"])[0].tolist()
    assert row[:5] == [1, 26, 70, 36, 0] and len(row) == 201
    assert encoder.encode_text(["é\x7f日🐦\n"])[0].sum() == 0           # letters that it lacks
    long = encoder.encode_text(["b" * 500])
    assert long.shape == (1, 201) and (long == 2).all()
    for letter in encoder.ALPHABET:
        assert encoder.ALPHABET[encoder.encode_text([letter])[0, 0] - 1] == letter


def test_any_text_can_be_encoded():
    rng = random.Random(0)
    for _ in range(1000):
        codes = [rng.choice([rng.randrange(128), rng.randrange(0x110000)]) for _ in range(250)]
        tokens = encoder.encode_text(["".join(map(chr, codes[:rng.randrange(250)]))])
        assert tokens.shape == (1, 201) and tokens.max() <= 70


def test_char_cnn_rnn_time_steps():
    phi = encoder.CharCNNRNN(8)
    lengths = []
    for layer in phi.cnn:
        layer.register_forward_hook(lambda m, a, out: lengths.append(out.shape[2]))
    seen = []
    phi.rnn.register_forward_hook(lambda m, a, out: seen.append((a[0].shape, out[0])))
    out = phi(encoder.encode_text(["a red bird", "日本"]))
    assert [lengths[i] for i in (0, 2, 3, 5, 6)] == [198, 66, 63, 21, 18]
    assert seen[0][0] == (2, 18, 8) and out.shape == (2, 1024)
    # The mean of the states, then a linear layer.
    assert torch.allclose(out, phi.out(seen[0][1].mean(1)))
    assert all(p.abs().max() <= 0.08 for p in phi.parameters())
    nothing = phi(torch.zeros(1, 201, dtype=torch.uint8))[0]
    assert torch.allclose(out[1], nothing, atol=1e-6)           # unknown letters: all-zero one-hots


def slow_phi(state, tokens):
    """[B] section 4 in loops, float64: one caption's (201,) letters -> (1024,)."""
    state = {key: value.double().numpy() for key, value in state.items()}
    x = np.zeros((70, len(tokens)))
    for place, row in enumerate(tokens):
        if row > 0:
            x[row - 1, place] = 1
    for name, pool in (("cnn.0", True), ("cnn.3", True), ("cnn.6", False)):
        weight = state[name + ".weight"]
        bias = state[name + ".bias"]
        columns = [np.einsum("oik,ik->o", weight, x[:, t:t + 4]) for t in range(x.shape[1] - 3)]
        x = np.maximum(0, np.stack(columns, 1) + bias[:, None])
        if pool:
            x = np.stack([x[:, t:t + 3].max(1) for t in range(0, x.shape[1] - 2, 3)], 1)

    width = x.shape[0]
    h = np.zeros(width)
    total = np.zeros(width)
    for t in range(x.shape[1]):
        a = state["rnn.weight_ih_l0"] @ x[:, t] + state["rnn.bias_ih_l0"]
        b = state["rnn.weight_hh_l0"] @ h + state["rnn.bias_hh_l0"]
        reset = 1 / (1 + np.exp(-(a[:width] + b[:width])))
        update = 1 / (1 + np.exp(-(a[width:2 * width] + b[width:2 * width])))
        new = np.tanh(a[2 * width:] + reset * b[2 * width:])
        h = (1 - update) * new + update * h
        total += h
    return state["out.weight"] @ (total / x.shape[1]) + state["out.bias"]


def test_char_cnn_rnn_against_loops():
    phi = small_phi()
    tokens = encoder.encode_text(["This bird has wings that are black, and a yellow crown!"])
    wanted = slow_phi(phi.state_dict(), tokens[0].tolist())
    assert np.allclose(phi(tokens)[0].detach().numpy(), wanted, atol=1e-6)


def test_embed_gives_equal_texts_equal_rows():
    phi = small_phi()
    texts = ["a red bird", "a blue bird", "a red bird"]
    out = encoder.embed(phi, texts, batch=1)
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    assert torch.allclose(out, phi(encoder.encode_text(texts)), atol=1e-6)
    short = encoder.embed(phi, texts, "bf16")
    assert short.dtype == torch.float32 and torch.allclose(out, short, atol=0.02)


# ---- Eq. 3, 4, AP@50 -------------------------------------------------------------------------

def test_eq3_and_eq4_against_loops():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(12, 6, generator=g, dtype=torch.float64)
    t = torch.randn(20, 6, generator=g, dtype=torch.float64)
    for items, others in ((v, t), (t, v)):
        labels = torch.arange(len(others)) % 4
        means = torch.stack([others[labels == c].mean(0) for c in range(4)])
        ranked = encoder.rank_classes(items, means)
        for item, order in zip(items, ranked.tolist()):
            scores = [(others[labels == c] @ item).mean() for c in range(4)]
            assert order == np.argsort(scores)[::-1].tolist()


def test_top_k_accuracy_by_hand():
    emb = torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 3, 2]])
    labels = torch.tensor([7, 7, 9])
    classes = torch.tensor([7, 8, 9])           # ranked 7 8 9, then 9 8 7, then 8 9 7
    accuracies = [encoder.top_k_accuracy(k, emb, labels, classes, torch.eye(3)) for k in (1, 2, 3)]
    assert accuracies == pytest.approx([1 / 3, 2 / 3, 1])


def test_ap_at_50_by_hand():
    image = torch.tensor([[1.0, 0], [0.9, 0], [0, 1.0], [0.8, 0], [0, 0.7]])
    labels = torch.tensor([3, 3, 5, 5, 5])
    classes = torch.tensor([3, 5])
    # Class 3 retrieves images 0, 1, 3, of which two are its own; class 5 images 2, 4, 0: two again.
    means = torch.tensor([[1.0, 0], [0.01, 1.0]])
    got = encoder.average_precision_at_50(image, labels, classes, means, k=3)
    assert got == pytest.approx((2 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize("side", ["features", "conv"])
def test_evaluate_by_hand(here, monkeypatch, side):
    """Top-1, top-5 and AP@50 on 6 unseen classes of 10 images, by loops."""
    ds = small_data(here, classes=24, each=10)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, ds.images.shape, dtype=np.uint8)
    ds = dataclasses.replace(ds, images=images, labels=rng.permutation(ds.labels))
    # An untrained phi gives nearly one embedding for all texts: here each has its own.
    monkeypatch.setattr(encoder, "embed", lambda phi, texts, precision="fp32": torch.stack(
        [torch.randn(1024, generator=torch.Generator().manual_seed(len(t) + sum(t.encode()) ** 2))
         for t in texts]))
    phi = small_phi()
    v = encoder.ImageEncoder(side).eval()
    features = torch.from_numpy(rng.normal(size=(len(images), 1024)).astype(np.float32))

    means = {}
    for c in np.flatnonzero(ds.unseen_classes):
        texts = sum((ds.captions[i] for i in np.flatnonzero(ds.labels == c)), [])
        means[c] = encoder.embed(phi, texts).mean(0)
    unseen = ds.unseen_images()
    if side == "features":
        for i in unseen:
            features[i] += 0.3 * means[ds.labels[i]]
        rows = features[unseen]
    else:
        crops = [torch.from_numpy(images[i][6:70, 6:70].copy()).permute(2, 0, 1) for i in unseen]
        rows = v(torch.stack(crops) / 127.5 - 1).detach()
    emb = dict(zip(unseen, rows))
    assert len(means) == 6 and len(unseen) == 60
    first = []
    five = []
    for i, e in emb.items():
        ranked = sorted(means, key=lambda c: -float(e @ means[c]))
        first.append(ranked[0] == ds.labels[i])
        five.append(ds.labels[i] in ranked[:5])
    found = []
    for c, mean in means.items():
        best = sorted(emb, key=lambda i: -float(emb[i] @ mean))[:50]
        found.append(np.mean([ds.labels[i] == c for i in best]))
    wanted = {"zero-shot top-1": np.mean(first), "zero-shot top-5": np.mean(five),
              "AP@50": np.mean(found), "chance": 1 / 6}
    assert 0 < wanted["zero-shot top-1"] < wanted["zero-shot top-5"] < 1
    assert abs(wanted["AP@50"] - 1 / 6) > 1e-3              # not what any order would give
    assert encoder.evaluate(ds, phi, v, features if side == "features" else None) == pytest.approx(
        wanted, abs=1e-6)


def test_unseen_classes_are_eq3s_mean_captions(here):
    ds = small_data(here, classes=8)
    phi = small_phi()
    found = encoder.unseen_classes(ds, phi)
    assert found.images.tolist() == ds.unseen_images().tolist() and len(found.classes) == 2
    for c, mean in zip(found.classes.tolist(), found.means):
        texts = sum((ds.captions[i] for i in np.flatnonzero(ds.labels == c)), [])
        slow = torch.stack([encoder.embed(phi, [t])[0] for t in texts]).mean(0)
        assert torch.allclose(mean, slow, atol=1e-6)


# ---- The image side, whitening ---------------------------------------------------------------

def test_image_encoder_has_features_and_head():
    torch.manual_seed(0)
    v = encoder.ImageEncoder("conv").eval()
    x = torch.rand(2, 3, 64, 64)
    assert v.features(x).shape == (2, 256, 4, 4)
    assert torch.allclose(v(x), v.head(v.features(x).flatten(1)))
    assert v.head.bias.abs().max() == 0
    assert v.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    given = encoder.ImageEncoder("features")
    f = torch.randn(2, 1024)
    assert torch.equal(given(f), f) and not any(p.requires_grad for p in given.parameters())


def test_whitening_changes_no_score():
    torch.manual_seed(0)
    texts = []
    for a in ("red", "blue", "black", "white", "yellow"):
        for b in ("green", "brown", "grey", "white", "orange"):
            texts.append(f"a {a} bird with {b} wings")
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


@pytest.mark.parametrize("rows, kind, message", [
    (np.zeros((19, 1024), np.float32), "npy", r"float32 \(19, 1024\): expected .*\(20, 1024\)"),
    (np.zeros((20, 1000), np.float32), "npy", r"\(20, 1000\)"),
    (np.zeros(1024, np.float32), "npy", r"\(1024,\)"),
    (np.zeros((20, 1024), np.int64), "npy", "holds int64"),
    (np.full((20, 1024), np.nan, np.float32), "npy", "not finite"),
    (np.zeros((20, 1024), np.float32), "npy", "all the same"),
    (np.zeros((20, 1024), np.float32), "npz", "cannot read features")])
def test_files_of_features_that_do_not_fit_are_refused(here, rows, kind, message):
    ds = small_data(here)
    with open("f.npy", "wb") as file:
        np.save(file, rows) if kind == "npy" else np.savez(file, rows)
    with pytest.raises(data.UserError, match=message):
        encoder.frozen_features(ds, "f.npy")


def test_features_are_centred_and_scaled_by_the_training_images(here):
    ds = small_data(here)
    ds.rows = ds.rows[::-1].copy()              # the source's order is not ours
    rows = np.load(save_features("f.npy", 25))  # the source has 5 images more, which were left out
    features = encoder.frozen_features(ds, "f.npy")
    train = features[ds.training_images()]
    assert train.mean(0).abs().max() < 1e-6
    assert float(train.norm(dim=1).mean()) == pytest.approx(1)
    difference = torch.from_numpy((rows[ds.rows[3]] - rows[ds.rows[7]]).astype(np.float32))
    assert torch.cosine_similarity(features[3] - features[7], difference, 0) > 0.999


# ---- Training phi ----------------------------------------------------------------------------

def test_the_rate_is_held_then_falls_in_a_straight_line():
    rates = [encoder.learning_rate(step, 100) for step in range(1, 101)]
    assert rates[:50] == [7e-4] * 50
    falls = np.diff(rates[49:])
    assert np.allclose(falls, falls[0]) and falls[0] < 0
    assert rates[-1] == pytest.approx(7e-4 / 20)
    assert encoder.learning_rate(75, 100) == pytest.approx(7e-4 * 0.525)
    assert encoder.learning_rate(95, 100, hold=0.9) == pytest.approx(7e-4 * 0.525)
    assert encoder.learning_rate(1, 1) == pytest.approx(7e-4 / 20)


def test_the_optimiser_steps_at_that_rate_or_a_constant_one(here, monkeypatch):
    rates = []
    step = torch.optim.RMSprop.step

    def watched(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)
    monkeypatch.setattr(torch.optim.RMSprop, "step", watched)
    save_features("f.npy")
    quick_encoder(small_data(here), steps=4, image_side="features", image_features="f.npy")
    assert rates == [encoder.learning_rate(i, 4) for i in (1, 2, 3, 4)] and rates[3] < rates[0]

    rates.clear()
    quick_encoder(small_data(here), steps=4)                    # the small network
    assert rates == [7e-4] * 4
    rates.clear()
    quick_encoder(small_data(here), steps=4, anneal=True)       # one that judges
    assert rates == [encoder.learning_rate(i, 4) for i in (1, 2, 3, 4)]


def test_minibatches_are_pairs_of_different_classes(here, monkeypatch):
    ds = small_data(here, classes=8, each=3)
    for i in range(len(ds.captions)):           # the captions name image and class
        ds.captions[i] = [f"image {i} class {ds.labels[i]} caption {k}" for k in range(1 + i % 3)]
    rows = torch.arange(24.0)[:, None].expand(24, 1024)
    monkeypatch.setattr(encoder, "MIX", 0.0)
    monkeypatch.setattr(encoder, "DROP", 0.0)
    minibatches = encoder.Minibatches(ds, rows, "cpu")
    texts = sum(ds.captions, [])
    letters = {tuple(row.tolist()): t for row, t in zip(encoder.encode_text(texts), texts)}
    training = ds.training_images().tolist()
    seen = set()
    for _ in range(100):
        x, tokens = minibatches.draw(4)
        drawn = [letters[tuple(row.tolist())] for row in tokens]
        images = [int(t.split()[1]) for t in drawn]
        assert x[:, 0].tolist() == images                       # the features of the same image
        assert len({int(ds.labels[i]) for i in images}) == 4    # four classes
        seen.update(drawn)
    # Any caption of any training image comes up.
    assert seen == set(sum((ds.captions[i] for i in training), []))


def test_drop_and_mix_of_features(here, monkeypatch):
    ds = small_data(here, classes=5, each=2)
    features = torch.zeros(10, 1024)
    for i in range(10):
        features[i] = 1 + i
    minibatches = encoder.Minibatches(ds, features, "cpu")
    monkeypatch.setattr(encoder, "MIX", 0.5)
    monkeypatch.setattr(encoder, "DROP", 0.0)
    blends = torch.cat([minibatches.draw(4)[0] for _ in range(50)])
    assert torch.equal(blends.amin(1), blends.amax(1))          # one weight for an image
    inside = blends[:, 0].frac() > 0.01                         # images 2k and 2k + 1 are a class
    assert 0.3 < inside.float().mean() < 0.7 and blends.min() >= 1 and blends.max() <= 10
    low = 2 * ((blends[:, 0] - 1) / 2).floor() + 1
    assert (blends[:, 0] <= low + 1 + 1e-5).all()               # never of two classes

    monkeypatch.setattr(encoder, "MIX", 0.0)
    monkeypatch.setattr(encoder, "DROP", 0.25)
    x = torch.cat([minibatches.draw(4)[0] for _ in range(20)])
    assert (x == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert set((x / x.amax(1, keepdim=True)).unique().tolist()) == {0, 1}   # the rest is whole
    assert (x.amax(1) * 0.75).frac().abs().max() < 1e-5         # and larger: the mean stays


def test_ema_is_the_weighted_mean_of_weights_and_statistics():
    a = nn.BatchNorm1d(3)
    b = nn.BatchNorm1d(3)
    b.weight.data.fill_(5.0)
    b.running_mean.fill_(2.0)
    gan_cls.update_ema(a, b, 0.75)
    assert a.weight.tolist() == [2.0] * 3 and a.running_mean.tolist() == [0.5] * 3
    gan_cls.update_ema(a, b, 0.0)
    assert a.weight.tolist() == [5.0] * 3


def test_gradients_of_the_text_encoder_are_clipped(here, monkeypatch):
    ds = small_data(here)
    loss = encoder.joint_embedding_loss
    norms = []
    clip = nn.utils.clip_grad_norm_

    def watched(parameters, most):
        before = clip(parameters, most)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        norms.append((float(before), float(after)))
        return before

    monkeypatch.setattr(encoder, "joint_embedding_loss", lambda v, t: 1e6 * loss(v, t))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    quick_encoder(ds)
    assert len(norms) == 2
    assert all(before > 5 and after <= 5.001 for before, after in norms)


@pytest.mark.parametrize("side", ["conv", "features"])
def test_what_is_kept_is_the_average_and_its_scores(here, monkeypatch, side):
    """phi and v of the checkpoint score as before `whiten`: the averages of the weights where the
    image side is given features, else the last weights."""
    ds = small_data(here)
    save_features("f.npy")
    kept = []
    real = encoder.whiten

    def watched(phi, v, texts, precision):
        x = torch.rand(3, 3, 64, 64) if side == "conv" else torch.randn(3, 1024)
        kept.append((x, v(x) @ encoder.embed(phi, texts).T, texts))
        real(phi, v, texts, precision)
    monkeypatch.setattr(encoder, "whiten", watched)
    slow = quick_encoder(ds, image_side=side, image_features="f.npy", steps=6)
    (x, scores, texts), = kept
    phi, v = encoder.build(slow)
    again = v(x) @ encoder.embed(phi, texts).T
    assert (again - scores).abs().max() < 0.02 * scores.abs().max()
    monkeypatch.setattr(encoder, "EMA", 0.0)                    # the last weights alone
    fast = quick_encoder(ds, image_side=side, image_features="f.npy", steps=6)
    same = torch.equal(fast["phi"]["rnn.weight_hh_l0"], slow["phi"]["rnn.weight_hh_l0"])
    assert same == (side == "conv")


def test_the_loss_of_eq2_is_taken_in_32_bits(here, monkeypatch):
    seen = []
    real = encoder.joint_embedding_loss

    def watched(image_emb, text_emb):
        seen.append((text_emb.dtype, torch.is_autocast_enabled("cpu"), real(image_emb, text_emb)))
        return seen[-1][2]
    monkeypatch.setattr(encoder, "joint_embedding_loss", watched)
    quick_encoder(small_data(here), steps=1, precision="bf16")
    (kind, autocast, loss), = seen
    assert kind == torch.bfloat16 and not autocast and loss.dtype == torch.float32


def test_same_seed_same_encoder(here):
    ds = small_data(here)
    state = torch.get_rng_state()
    a, b, c = [quick_encoder(ds, seed=seed)["phi"]["out.weight"] for seed in (0, 0, 1)]
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.set_rng_state(state)


def test_a_few_steps_learn_something(here):
    """Classes whose features and captions differ plainly: the training classes are told apart."""
    ds = small_data(here)
    noise = np.random.default_rng(0).normal(size=(5 + 20, 1024)).astype(np.float32)
    np.save("f.npy", noise[ds.labels] + 0.1 * noise[5:])
    lines = []
    checkpoint = quick_encoder(ds, steps=200, cnn_dim=64, image_side="features",
                               image_features="f.npy", log=lines.append)
    losses = [float(line.split("loss")[1].split()[0]) for line in lines]
    assert len(losses) == 2 and losses[1] < 0.85 * losses[0]
    assert checkpoint["settings"]["digest"] == ds.digest()


@pytest.mark.parametrize("captions, message", [
    (["小鸟 是 红色", "🐦 🐦"], r"none of the 32 training captions has a letter .*小鸟"),
    (["a bird"], r"all 16 training captions are the same .*'a bird'"),
    (["x" * 201 + "red", "x" * 201 + "blue"], "all 32 .*reads 201 letters"),
    (["é", "a", "b"], None)])
def test_captions_that_teach_nothing_are_said_before_training(here, monkeypatch, captions, message):
    ds = small_data(here, classes=5, each=4)
    ds.captions = [captions] * len(ds.captions)
    if message is None:
        assert quick_encoder(ds)["settings"]["steps"] == 2
    else:
        monkeypatch.setattr(torch.optim, "RMSprop", None)       # training would fail here
        with pytest.raises(data.UserError, match=message):
            quick_encoder(ds)


def test_phi_needs_two_training_classes(here):
    ds = small_data(here)
    ds.labels = np.zeros_like(ds.labels)
    ds.unseen_classes = np.zeros_like(ds.unseen_classes)
    with pytest.raises(data.UserError, match="at least two"):
        quick_encoder(ds)


# ---- What a user's text is read as, and the table of all captions ----------------------------

def test_check_text():
    lines = []
    encoder.check_text("An all BLACK bird, 2 wings!\n", lines.append)
    assert lines == []
    for text in ("", " \n\t "):
        with pytest.raises(data.UserError, match="empty text"):
            encoder.check_text(text, lines.append)
    for text in ("鳥", "красная птица", "🐦 🐦", "鳥" * 300 + "bird"):
        with pytest.raises(data.UserError, match="knows no letter of"):
            encoder.check_text(text, lines.append)
    assert lines == []
    encoder.check_text("une tête rouge ✓", lines.append)
    assert len(lines) == 1 and "only a part" in lines[0] and lines[0].endswith("ê ✓")
    encoder.check_text("a red bird " * 30, lines.append)
    assert len(lines) == 2 and "only the first 201 letters of 330" in lines[1]
    assert "\n" not in "".join(lines) and max(map(len, lines)) < 200


def test_caption_table_is_kept_and_read(here, monkeypatch):
    ds = small_data(here)
    phi = small_phi()
    lines = []
    table = encoder.caption_table(ds, phi, "fp32", lines.append)
    texts = sum(ds.captions, [])
    assert table.shape == (len(texts), 1024) and table.dtype == torch.float16
    assert torch.equal(table, encoder.embed(phi, texts).half())
    kept, = data.CACHE.glob("*captions-*.npy")
    assert len(lines) == 1 and str(kept) in lines[0]

    with monkeypatch.context() as m:
        m.setattr(encoder, "embed", None)           # the second time nothing is computed
        assert torch.equal(encoder.caption_table(ds, phi, "fp32", lines.append), table)
    assert len(lines) == 1
    again = small_data(here)                                      # nor in another process
    assert again.digest() == ds.digest()
    kept.write_bytes(kept.read_bytes()[:-100])                  # a damaged one is computed again
    assert torch.equal(encoder.caption_table(ds, phi, "fp32", lines.append), table)
    assert len(lines) == 2 and len(list(data.CACHE.glob("*captions-*"))) == 1


def test_caption_table_belongs_to_weights_captions_and_precision(here):
    ds = small_data(here)
    (data.CACHE / "own-other-captions-0123456789abcdef.npy").touch()
    names = set()

    def table(phi, precision="fp32"):
        out = encoder.caption_table(ds, phi, precision, silent)
        kept, = data.CACHE.glob("own-mine*captions-*.npy")      # the older one is removed
        names.add(kept.name)
        return out
    first = table(small_phi(0))
    assert not torch.equal(table(small_phi(1)), first)
    table(small_phi(0), "bf16")
    ds.captions[0] = ["a caption that was mended", *ds.captions[0][1:]]
    mended = table(small_phi(0))
    assert len(names) == 4 and not torch.equal(mended[0], first[0])
    assert torch.equal(mended[1:], first[1:])
    assert (data.CACHE / "own-other-captions-0123456789abcdef.npy").exists()


# ---- Which encoder a run uses ----------------------------------------------------------------

def test_get_encoder_trains_once_and_knows_its_data(here, short_training, monkeypatch):
    ds = small_data(here)
    lines = []
    first = encoder.get_encoder(ds, log=lines.append)
    path = encoder.encoder_path(ds)
    assert path.exists() and path.parent.name == "runs" and path.name.startswith("own-mine")
    assert first["settings"]["image_side"] == "conv"
    again = encoder.get_encoder(ds, log=lines.append)
    assert len(short_training) == 1
    assert all(torch.equal(value, again["phi"][key]) for key, value in first["phi"].items())
    phi, v = encoder.build(again)
    assert phi(encoder.encode_text(["a"])).shape == (1, 1024)
    assert v(torch.rand(2, 3, 64, 64)).shape == (2, 1024)

    with pytest.raises(data.UserError, match="image side conv, not features: remove it"):
        encoder.get_encoder(ds, image_features="f.npy", log=silent)
    with monkeypatch.context() as patch:
        patch.setattr(data, "CROP", 128)
        with pytest.raises(data.UserError, match="runs.*images of 64x64, now they are 128x128"):
            encoder.get_encoder(ds, log=silent)
    ds.captions[0] = ["a caption that was mended"]
    with pytest.raises(data.UserError, match="runs.*own-mine.*other captions.*has now: remove it"):
        encoder.get_encoder(ds, log=silent)
    path.unlink()
    mended = encoder.get_encoder(ds, log=silent)
    assert mended["settings"]["digest"] == ds.digest() != first["settings"]["digest"]


def test_an_encoder_without_a_digest_is_stale(here, short_training):
    ds = small_data(here)
    checkpoint = dict(encoder.get_encoder(ds, path="e.pt", log=silent))
    del checkpoint["settings"]["digest"]                        # as older versions wrote them
    data.save_checkpoint("e.pt", **{k: v for k, v in checkpoint.items() if k != "format"})
    with pytest.raises(data.UserError, match="e.pt was trained on"):
        encoder.get_encoder(ds, path="e.pt", log=silent)


def shipped_weights(folder, ds):
    """A file as in weights/: phi and v in half precision inside the checkpoint of a run."""
    save_features("f.npy")
    trained = quick_encoder(ds, image_side="features", image_features="f.npy")
    for part in ("phi", "v"):
        trained[part] = {key: value.half() for key, value in trained[part].items()}
    for name in ("cub", "flowers", "toy"):
        data.save_checkpoint(folder / f"{name}.pt", kind="gan-cls", settings={}, encoder=trained)
    data.save_checkpoint(folder / "cub-encoder.pt", **trained)
    data.save_checkpoint(folder / "bare.pt", kind="gan-cls", settings={}, encoder=dict(
        kind="encoder", settings=trained["settings"], phi=trained["phi"]))
    return trained


def test_the_phi_given_away_is_the_default(here, monkeypatch, short_training):
    ds = small_data(here)
    trained = shipped_weights(here / "given", ds)
    monkeypatch.setattr(encoder, "WEIGHTS", here / "given")
    short_training.clear()
    for name in ("cub", "cub-box", "flowers"):
        ds.name = name
        lines = []
        found = encoder.get_encoder(ds, log=lines.append)
        assert torch.equal(found["phi"]["out.weight"], trained["phi"]["out.weight"])
        file = "flowers.pt" if name == "flowers" else "cub-encoder.pt"
        assert len(lines) == 1 and file in lines[0]
    assert not short_training and not (here / "runs").exists()
    phi, v = encoder.build(found)
    assert all(p.dtype == torch.float32 for p in [*phi.parameters(), *v.parameters()])

    for name, options in (("toy", {}), ("cub", dict(image_side="conv")), ("cub-box", {})):
        ds.name = name
        if name == "cub-box":                   # one that is there already comes first
            shutil.copy("runs/cub-encoder.pt", "runs/cub-box-encoder.pt")
        found = encoder.get_encoder(ds, log=silent, **options)
        assert found["settings"]["image_side"] == "conv"
    assert len(short_training) == 2
    monkeypatch.setattr(encoder, "WEIGHTS", here / "nowhere")
    ds.name = "flowers"
    encoder.get_encoder(ds, log=silent)
    assert len(short_training) == 3


# ==============================================================================================
# Data: data.py
# ==============================================================================================

def check_form(ds, images, classes, unseen):
    """The form in which every data set comes."""
    assert ds.images.shape == (images, 76, 76, 3) and ds.images.dtype == np.uint8
    assert len(ds.captions) == len(ds.labels) == len(ds.rows) == images
    assert all(captions and all(map(str.strip, captions)) for captions in ds.captions)
    assert len(ds.class_names) == len(ds.unseen_classes) == classes
    assert ds.unseen_classes.sum() == unseen
    training = ds.training_images()
    held_out = ds.unseen_images()
    assert sorted([*training, *held_out]) == list(range(images))
    assert not set(ds.labels[training]) & set(ds.labels[held_out])      # class-disjoint


def check_colours(ds):
    """Each image has the colour of its class, so none is another one's."""
    for pixels, label in zip(ds.images, ds.labels):
        assert np.abs(pixels.astype(int) - COLOUR_BYTES[label]).max() < 8


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# ---- Views, batches --------------------------------------------------------------------------

def test_crops_are_the_windows():
    images = torch.randint(0, 256, (2, 76, 76, 3), dtype=torch.uint8)
    x = data.crops(images, torch.tensor([1, 0]), torch.tensor([3, 12]), torch.tensor([5, 0]),
                   torch.tensor([False, True]))
    x = ((x + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert torch.equal(x[0], images[1, 3:67, 5:69].float())
    assert torch.equal(x[1], images[0, 12:76, 0:64].flip(1).float())


def test_random_crops_reach_every_window_and_both_directions():
    place = torch.arange(76, dtype=torch.uint8)
    image = torch.stack(torch.meshgrid(place, place, place[:1], indexing="ij"), 2)[..., 0]
    x = data.random_crops(image[None], torch.zeros(2000, dtype=torch.long))
    x = ((x + 1) * 127.5).round()                           # tells where each pixel was
    assert set(x[:, 0].amin((1, 2)).tolist()) == set(range(13))
    assert set(x[:, 1].amin((1, 2)).tolist()) == set(range(13))
    assert 0.4 < (x[:, 1, 0, 0] > x[:, 1, 0, 63]).float().mean() < 0.6


def test_pixels_are_the_crops_again():
    images = torch.randint(0, 256, (3, 76, 76, 3), dtype=torch.uint8)
    x = data.centre_crops(images, torch.arange(3))
    assert np.array_equal(data.to_pixels(x), images[:, 6:70, 6:70])
    assert set(data.to_pixels(9 * x.sign()).ravel()) == {0, 255}


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


def class_of_each_caption(ds):
    return np.repeat(ds.labels, [len(captions) for captions in ds.captions])


def test_a_batch_has_right_texts_and_wrong_ones_of_other_classes(here):
    ds = small_data(here)
    batches = batches_that_say(ds, class_of_each_caption(ds))
    assert len(batches) == 16
    assert batches.images.dtype == torch.uint8
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
    colours = torch.tensor(COLOUR_BYTES)[h[:, 0].long() % 4] / 127.5 - 1
    assert x.shape == (64, 3, 64, 64) and torch.allclose(x.mean((2, 3)), colours, atol=0.05)


@pytest.mark.parametrize("captions, sixtieths", [
    ((1, 1), {0, 60}),
    ((4, 4), {0, 15, 30, 45, 60}),
    ((1, 3), {0, 20, 30, 40, 60})])                         # of one, two or three captions
def test_text_of_an_image_is_a_mean_of_its_own_captions(here, captions, sixtieths):
    ds = small_data(here, classes=4, each=3)
    # Of each image's two captions the first says 0, the second 1.
    h = batches_that_say(ds, np.arange(24) % 2, captions).texts(torch.tensor([2] * 4000))
    assert h.shape == (4000, 1) and h.dtype == torch.float32
    assert set((h[:, 0] * 60).round().int().tolist()) == sixtieths
    assert abs(h.mean() - 0.5) < 0.05
    own = batches_that_say(ds, np.arange(24) // 2, captions).texts(torch.arange(12))
    assert own[:, 0].tolist() == list(range(12))


def test_one_training_class_is_not_enough(here):
    ds = small_data(here, classes=2)
    ds.unseen_classes = np.array([True, False])
    with pytest.raises(data.UserError, match="two"):
        batches_that_say(ds, class_of_each_caption(ds))


def test_examples_are_of_unseen_classes_and_then_of_trained_ones(toy, here):
    chosen = data.example_images(toy, 8)
    labels = toy.labels[chosen]
    assert len(set(labels)) == 8 and toy.unseen_classes[labels].all()
    assert chosen[:6] == data.example_images(toy, 6) == [6746, 6942, 7450, 6172, 6108, 6143]
    few = small_data(here, classes=9)                       # two of them unseen
    labels = few.labels[data.example_images(few)]
    assert len(set(labels)) == 6
    assert few.unseen_classes[labels].tolist() == [True, True, False, False, False, False]


# ---- The toy birds ---------------------------------------------------------------------------

def test_toy(toy):
    check_form(toy, 8000, 200, 50)
    assert all(len(captions) == 10 for captions in toy.captions)
    assert (np.bincount(toy.labels) == 40).all()
    assert not np.isnan(toy.keypoints).any() and (toy.boxes[:, 2:] > 30).all()
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


def test_toy_images_carry_the_colours_that_captions_name():
    rng = random.Random(3)
    hits = []
    for bird in data.toy_species(rng, 60):
        pixels, _, points = data.toy_draw(rng, bird)
        words = set(" ".join(data.toy_captions(rng, bird)).replace(",", "").split())
        for part, below in (("belly", 0), ("crown", 2)):
            x, y = points[data.KEYPOINTS.index(part)].round().astype(int)
            difference = pixels[y + below, x].astype(int) - data.COLOURS[bird[part]]
            hits.append(np.abs(difference).max() < 50)
            assert bird[part] in words
        its_own = {bird[part] for part in ("body", "wing", "crown", "belly", "billcolour")}
        assert words & set(data.COLOURS) <= its_own
    assert np.mean(hits) > 0.95


def test_toy_bird_for_a_caption_has_what_it_names_and_the_rest_at_random():
    rng = random.Random(4)
    forms = data.BEGINNINGS + data.ONE_COLOUR_BEGINNINGS + sum(data.PARTS, [])
    for bird in data.toy_species(rng, 60):
        for caption in data.toy_captions(rng, bird):
            other = data.toy_bird_for(rng, caption)
            for form in forms:                          # what is said of one is true of the other
                if form.format(**bird) in caption.replace("an orange", "a orange"):
                    assert form.format(**other) == form.format(**bird)

    # What is not named: 9 of 16 parts have the body's colour, as in toy_species. Bayes: of a body
    # that is not named, 9 of the 9 + 7 weights are on the colour of a part.
    for caption, part, colour in (
            ("a red bird with a white crown and a long bill", "wing", "red"),
            ("this bird has a white crown", "body", "white")):
        birds = [data.toy_bird_for(rng, caption) for _ in range(2000)]
        assert abs(np.mean([bird[part] == colour for bird in birds]) - 9 / 16) < 0.04


# ---- CUB and Oxford-102 ----------------------------------------------------------------------

def packed(path, files):
    """A folder, a .zip or a .tar.gz of files, {name: bytes}, by the ending. Returns the path."""
    return {".zip": zipped, ".gz": tar, ".tgz": tar}.get(path.suffix, unpacked)(path, files)


def write_cub(folder, images_as, captions_as, text):
    """CUB, its images and captions packed, and captions named as in a layout, with the pattern
    `text`. The authors' lists of classes are in their own layout only."""
    images, captions = cub_files()
    texts = {}
    for name, content in captions.items():
        kind, file = name.split("/")[-2:]
        if "classes" not in file or "cvpr" in text:
            texts[name if "classes" in file else text.format(kind=kind, file=file)] = content
    packed(folder / images_as, images)
    packed(folder / captions_as, texts)


@pytest.mark.parametrize("layout", [
    ("CUB_200_2011.tgz", "cvpr2016_cub.tar.gz", "./cvpr2016_cub/text_c10/{kind}/{file}"),
    ("", "", "cvpr2016_cub/text_c10/{kind}/{file}"),
    ("", "caption-data-cub-v1.0.0.zip", "captions/{file}"),
    ("", "", "text/{kind}/{file}"),                             # AttnGAN's
    ("", "birds.zip", "birds/text/{kind}/{file}")])             # DF-GAN's
def test_every_layout_of_cub_gives_the_same(here, layout):
    write_cub(here, *layout)
    outline = {"CUB_200_2011/segmentations/001.Albatross/Albatross_0000.png": b"dark"}
    unpacked(here, outline)                                     # is no photograph
    ds = data.load("cub", here)
    check_form(ds, 12, 4, 2)
    check_colours(ds)
    assert ds.skipped == []
    assert ds.class_names == ["001.Albatross", "002.Auk", "003.Ani", "004.Bunting"]
    assert ds.unseen_classes.tolist() == [True, False, False, True]
    assert ds.rows.tolist() == list(range(12))
    assert ds.labels[0] == 3                                    # images.txt's order
    assert ds.captions[0] == ["a bird of kind 3", "it has number 2"]
    assert np.allclose(ds.boxes[0], [10, 10, 20, 50])           # 152x76 became 76x76: x halves
    parts = [[part / 2, 2 * part] for part in (2, 3, 4, 5, 6)]
    assert np.allclose(ds.keypoints[0][:5], parts)
    assert np.isnan(ds.keypoints[0][5]).all()                   # part 14 is not visible


@pytest.mark.parametrize("box, window", [
    ((20.0, 10.0, 40.0, 50.0), (5.0, 0.0, 75.0, 70.0)),         # it lies inside the image
    ((0.0, 0.0, 20.0, 50.0), (0.0, 0.0, 70.0, 70.0)),           # it would stick out: moved
    ((10.0, 0.0, 100.0, 76.0), (0.0, 0.0, 140.0, 76.0))])       # higher than the image: cut
def test_the_square_around_a_bird(box, window):
    assert data.square_around(box, (152, 76)) == window


def test_cub_box_shows_the_square_around_the_bird(here):
    images, captions = cub_files()
    photo = Image.new("RGB", (152, 76), "white")
    photo.paste("red", (20, 10, 60, 60))
    photos = {name: saved(photo, "PNG") for name in images if name.endswith(".jpg")}
    unpacked(here, {**images, **captions, **photos})
    ds = data.load("cub-box", here)
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
    files = {"jpg/image_00009.jpg": b"broken", "text_c10/testclasses.txt": b"class_00020"}
    for i in range(1, 10):                          # class 20 is unseen, 21 to 23 are not
        files.setdefault(f"jpg/image_{i:05d}.jpg", jpeg(COLOUR_BYTES[i % 4]))
        name = folder.format(20 + i % 4) + f"image_{i:05d}.txt"
        files[name] = b"this flower is nice\n{}\nv\n"
    files["jpg/image_00000.jpg"] = jpeg()
    ds = data.load("flowers", unpacked(here, files))
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
    "csv of Excel": {**IMAGES, **own_table("metadata.csv", "%s;%s", "file_name;caption")},
    "csv without quotes": {**IMAGES, **own_table("metadata.csv", "%s,%s", "file_name,text")},
    "jsonl": {**IMAGES, **own_table("metadata.jsonl", '{"file_name": "%s", "text": "%s"}')},
    "jsonl in a folder": {
        **own_data("data/kind{c}/p{i}.png"),
        **own_table("data/metadata.jsonl", '{"file_name": "./%s", "caption": ["%s"]}')},
}


@pytest.mark.parametrize("name", ["mine", "mine.zip", "mine.tar.gz"])
@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_every_layout_of_an_own_folder_gives_the_same(here, layout, name):
    ds = data.load(str(packed(here / name, OWN_LAYOUTS[layout])))
    check_form(ds, 8, 4, 1)
    check_colours(ds)
    assert [name.lower() for name in ds.class_names] == ["kind0", "kind1", "kind2", "kind3"]
    assert ds.skipped == []
    for n, captions in enumerate(ds.captions):
        assert captions == [f"colour {n // 2}, red", f"image {n % 2}"]


@pytest.mark.parametrize("tops, classes, unseen", [
    # The folders of four images, how many classes they are, and the unseen ones; "?": by chance.
    (["train/a", "test/b", "train/c", "test/d"], 4, "bd"),
    (["train/a", "Validation/b", "train/c", "dev/d"], 4, "bd"),
    (["train_images/a", "test_images/b", "train_images/c", "test_images/d"], 4, "bd"),
    (["train_images/a", "test_images/b", "train_images/c", "test_images/a"], 3, "?"),
    (["train/a", "test/A", "train/c", "test/d"], 4, "?"),       # the same on some disks
    (["train/a", "test/b", "train/c", "more/d"], 4, "?")])      # what lies beside is neither
def test_train_and_test_are_the_split_where_they_share_no_class(here, tops, classes, unseen):
    for i, top in enumerate(tops):
        unpacked(here / "mine", {f"{top}/{i}.png": jpeg(), f"{top}/{i}.txt": b"some text"})
    ds = data.load("mine")
    held_out = "".join(np.array(ds.class_names)[ds.unseen_classes])
    assert len(ds.class_names) == classes
    assert held_out == unseen if unseen != "?" else "not taken as the split" in ds.skipped[0]


def test_links_are_followed_and_what_this_project_writes_is_not_its_data(here, monkeypatch):
    own_folder(here / "elsewhere", classes=3)
    mine = own_folder(here / "mine", classes=1)
    (mine / "linked").symlink_to(here / "elsewhere/kind1")
    (mine / "kind0/lost.png").symlink_to(here / "nowhere.png")
    monkeypatch.chdir(mine)
    for _ in range(2):
        unpacked(Path("runs"), {"x/samples/1.png": jpeg(), "x/samples/1.txt": b"a bird"})
        ds = data.load(".")
        assert len(ds.images) == 6 and ds.class_names == ["kind0", "linked"]
        assert len(ds.skipped) == 1 and "lost.png" in ds.skipped[0]


def test_what_cannot_be_used_is_listed_with_the_reason(here, capsys):
    mine = unpacked(own_folder(here / "mine"), {
        "phone.heic": b"\0\0\0\x18ftypheic", "phone.txt": b"from a phone",
        "bare.png": jpeg(),
        "blank.png": jpeg(), "blank.txt": b"\n{}\n",
        "two.png": jpeg(), "two.jpg": jpeg(), "two.txt": b"of which?",
        "alone.txt": b"no image here",
        "metadata.jsonl": b'{"file_name": "gone/1.png", "text": "a bird"}'})
    (mine / "film.mp4").touch()
    os.truncate(mine / "film.mp4", data.MAX_FILE + 1)       # neither image nor caption: not read
    for _ in range(2):                                      # built, and read again
        ds = data.load(str(mine))
        listed, = Path("cache").glob("own-mine-*-skipped.txt")
        assert f"7 things are not: see {listed}" in capsys.readouterr().out
        assert listed.read_text().splitlines() == ds.skipped
    check_form(ds, 12, 4, 1)
    several = "several images have this name, so no caption"
    unreadable = "not an image, or of a kind that this Pillow cannot read"
    assert dict(line.split(": ") for line in ds.skipped) == {
        "phone.heic": unreadable, "bare.png": data.NO_CAPTION, "blank.png": data.NO_CAPTION,
        "two.png": several, "two.jpg": several, "alone.txt": "no image", "gone/1.png": "no image"}


@pytest.mark.parametrize("content, captions", [
    ("a bird\r\n\r\n  \n two  birds ".encode(), ["a bird", "two birds"]),
    ("\ufeffa bird".encode(), ["a bird"]),
    ("a bird… with “red” été".encode("cp1252"), ["a bird… with “red” été"]),
    ("a bird".encode("utf-16"), ["a bird"]),
    (b"", []),
    (b"a bird\n" * 1000, ["a bird"] * data.MAX_CAPTIONS)])
def test_captions_of_any_encoding(content, captions):
    assert data.read_captions(content) == captions


# ---- Images ----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, kind", [
    ("RGB", "PNG"), ("L", "TIFF"), ("P", "GIF"), ("LA", "PNG"), ("CMYK", "JPEG"), ("RGB", "BMP")])
def test_all_kinds_of_images(mode, kind):
    pixels, window = data.read_image(saved(Image.new(mode, (50, 90)), kind))
    assert pixels.shape == (76, 76, 3) and pixels.dtype == np.uint8
    assert window == (0, 0, 50, 90) and set(pixels.ravel()) <= {0, 255}


def test_transparent_is_white_and_a_phones_photograph_upright():
    clear = saved(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG")
    assert data.read_image(clear)[0].min() == 255

    tag = Image.Exif()
    tag[0x0112] = 6                                         # "turn me a quarter clockwise"
    lying = Image.new("RGB", (200, 80))
    lying.paste("red", (0, 0, 100, 80))                     # red at the left; upright: above
    upright = data.read_image(saved(lying, "JPEG", exif=tag))[0]
    assert upright[:30, :, 0].min() > 200 and upright[46:, :, 0].max() < 50


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"    # a program
HUGE = b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 9000, 9000, 1, 24, *[0] * 6)


@pytest.mark.parametrize("content, message", [
    (b"", "read"), (b"GIF89a", "read"), (jpeg()[:200], "read"), (POSTSCRIPT, "cannot read"),
    (HUGE, "too many"), (saved(Image.new("I;16", (9, 9)), "PNG"), "more than 8 bits")])
def test_no_image(content, message):
    with pytest.raises(ValueError, match=message):
        data.read_image(content)


# ---- Archives --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["it.zip", "it.tgz"])
def test_a_broken_archive_is_never_taken_for_a_whole_one(here, name):
    rng = random.Random(0)
    files = {"d/a.txt": b"a caption", "d/b.bin": rng.randbytes(1000), "d/c.txt": b"another"}
    path = packed(here / name, files)
    folder = data.unpack(path, here / "whole")
    assert {name: (folder / name).read_bytes() for name in data.names_below(folder)} == files

    content = path.read_bytes()
    broken = [content[:cut] for cut in range(len(content))]
    for _ in range(300):                                    # one bit of d/b.bin
        at = len(content) // 2 + rng.randrange(-300, 300)
        bit = bytes([content[at] ^ 1 << rng.randrange(8)])
        broken.append(content[:at] + bit + content[at + 1:])
    for number, part in enumerate(broken):
        path.write_bytes(part)
        with pytest.raises(data.UserError, match="damaged, or only a part") as error:
            data.unpack(path, here / f"broken {number}")
        assert "\n" not in str(error.value)
    TALLY["broken inputs tried"] += len(broken)


@pytest.mark.parametrize("name", ["it.zip", "it.tgz"])
def test_nothing_in_an_archive_leads_outside_or_fills_the_disk(here, name, monkeypatch):
    monkeypatch.setattr(data, "MAX_TOTAL", 30_000)
    names = ["good.txt", "../1.txt", f"{here}/2.txt", "a/../../3.txt"]
    path = packed(here / name, dict.fromkeys(names, b"x"))
    data.unpack(path, here / "out/side")
    assert (here / "out/side/good.txt").exists()
    files = [file for file in here.rglob("*.txt") if here / "out/side" not in file.parents]
    assert files == []

    bomb = packed(here / name, {"x": bytes(20_000), "y": bytes(20_000)})
    with pytest.raises(data.UserError, match="too large"):
        data.unpack(bomb, here / "none")
    assert not (here / "none").exists()


# ---- Downloads, caches -----------------------------------------------------------------------

@pytest.fixture
def web(here, monkeypatch):
    """A folder from which cub is fetched."""
    (here / "web").mkdir()
    write_cub(here / "web", "CUB_200_2011.tgz", "cvpr2016_cub.tar.gz", "{kind}/{file}")
    sources = []
    for name in ("CUB_200_2011.tgz", "cvpr2016_cub.tar.gz"):
        sha256 = hashlib.sha256((here / "web" / name).read_bytes()).hexdigest()
        sources.append(data.Source(name, (here / "web" / name).as_uri(), sha256))
    monkeypatch.setitem(data.DATASETS, "cub", data.DATASETS["cub"]._replace(sources=sources))
    return here / "web"


def test_what_is_not_there_is_fetched_once(web):
    check_form(data.load("cub"), 12, 4, 2)
    shutil.rmtree(web)
    shutil.rmtree("cache/downloads")
    check_form(data.load("cub"), 12, 4, 2)


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b"wrong"),
    lambda path: os.truncate(path, 1000)])
def test_what_cannot_be_fetched_whole_is_not_kept(web, spoil):
    spoil(web / "cvpr2016_cub.tar.gz")
    with pytest.raises(data.UserError, match="cvpr2016_cub.tar.gz cannot be fetched.*--from"):
        data.load("cub")
    assert [path.name for path in Path("cache/downloads").iterdir()] == ["CUB_200_2011.tgz"]


@pytest.mark.parametrize("old, new, changes", [
    ("class Batches", "class Batch", False), ("def save_checkpoint", "def save", False),
    ("COLOURS = {", "COLOURS  = {", True), ("def build_folder", "def build", True),
    ("def read_image(", "def image(", True), ("    write_atomically(path", "    #", True)])
def test_a_cache_depends_on_the_code_that_builds_it(here, monkeypatch, old, new, changes):
    code = data.building_code()
    text = Path(data.__file__).read_text()
    (here / "changed.py").write_text(text.replace(old, new))
    monkeypatch.setattr(data, "__file__", "changed.py")
    assert (data.building_code() != code) == changes
    monkeypatch.setattr(data, "IMAGE_SIZE", 152)
    assert data.building_code() != code


def test_a_cache_depends_on_its_files(here):
    text = own_folder(here / "mine") / "kind0/p0.txt"
    times = []
    for content in (None, None, "another colour"):
        if content:
            text.write_text(content)
        assert data.load("mine").captions[0][0] == (content or "colour 0")
        cache, = Path("cache").glob("*.npz")                # an older one is gone
        times.append(cache.stat().st_mtime_ns)
    assert times[0] == times[1] != times[2]                 # the second time it was not built


@pytest.mark.parametrize("size", [0, 1000, -30])
def test_a_damaged_cache_is_named(here, size):
    small_data(here)
    cache, = Path("cache").glob("own-mine-*.npz")
    os.truncate(cache, size % cache.stat().st_size)
    with pytest.raises(data.UserError, match=f"{cache.name} is damaged.*remove it"):
        data.load("mine")


def test_two_folders_of_one_name_do_not_share(here):
    for folder, classes in (("x/mine", 4), ("y/mine", 5), ("x/mine", 4)):
        own_folder(here / folder, classes)
        assert len(data.load(folder).class_names) == classes
    odd = data.short_name(str(here / ("ö $x\n" * 60)))
    assert len(odd) < 60 and odd.isprintable() and "/" not in odd


def test_the_digest_is_that_of_the_content(here):
    ds = small_data(here)
    shutil.copytree("mine", "elsewhere")
    assert data.load("elsewhere").digest() == ds.digest()
    others = [
        dataclasses.replace(ds, captions=[["another caption"], *ds.captions[1:]]),
        dataclasses.replace(ds, unseen_classes=~ds.unseen_classes),
        dataclasses.replace(ds, labels=ds.labels[::-1])]
    assert len({ds.digest(), *(other.digest() for other in others)}) == 4


def prepare(barrier):
    barrier.wait()
    data.load("mine")


def test_processes_prepare_at_once(here):
    own_folder(here / "mine")
    fork = multiprocessing.get_context("fork")              # so that none need import torch
    for n in range(3):
        (here / "mine/kind0/p0.txt").write_text(f"round {n}")
        barrier = fork.Barrier(4)
        processes = [fork.Process(target=prepare, args=(barrier,)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert data.load("mine").captions[0] == [f"round {n}"]
        assert len(list(Path("cache").glob("*.npz"))) == 1


# ---- Grids, plots ----------------------------------------------------------------------------

def test_image_grid_puts_every_image_in_its_place():
    a, b, c, d = [np.full((10, 20, 3), level, np.uint8) for level in (0, 40, 80, 90)]
    rows = [[a, b], [c, d]]
    page = np.asarray(data.image_grid(rows, ["a", "\x1b\ud800 \n" * 99], ["one", "two"], scale=2))
    assert page.shape == (22 + 2 * 22, 230 + 2 * 42, 3)
    for i, j in np.ndindex(2, 2):
        image = page[22 + 22 * i:, 230 + 42 * j:][:20, :40]
        assert (image == rows[i][j][0, 0]).all()
    assert (page[:22, 230:] < 100).any() and (page[22:, :230] < 100).any()      # the words


def test_plot_draws_the_lines(here):
    panel = {"black": ([0, 4], [0, 4]), "red": (torch.arange(5), torch.full((5,), 2.0)),
             "one point": ([1], [1]), "none": ([], [])}
    data.plot([panel, {"zero": ([0, 0], [0, 0])}], here / "out/plot.png", size=300)
    pixels = np.asarray(Image.open("out/plot.png")).astype(int)
    assert pixels.shape == (300, 600, 3)
    y, x = np.argwhere((pixels[90:260, 50:280] == (255, 0, 0)).all(2)).T
    assert np.ptp(y) <= 2 and np.ptp(x) > 200               # level
    y, x = np.argwhere((pixels[120:, 50:280] < 50).all(2)).T
    assert np.corrcoef(x, y)[0, 1] < -0.95                  # rising


def test_save_image_knows_its_endings(here):
    for name in ("x.exe", "x", "x.mp4", "a.JPG"):
        with contextlib.suppress(data.UserError):
            data.save_image(Image.new("RGB", (4, 4), "red"), here / name)
    assert [path.name for path in here.iterdir()] == ["a.JPG"]


# ---- Files that are written ------------------------------------------------------------------

def test_atomic_writes(here):
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    data.write_atomically(here / "x", lambda file: file.write(b"whole"))
    with pytest.raises(OSError):
        data.write_atomically(here / "x", fail)
    assert (here / "x").read_bytes() == b"whole"
    assert len(list(here.iterdir())) == 1


def checkpoint_bytes(content):
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


GOOD = checkpoint_bytes(dict(kind="gan-cls", format=1, w=torch.zeros(1000)))


@pytest.mark.parametrize("content, kind, message", [
    (None, "gan-cls", "no file"),
    (b"hello", "gan-cls", "not a checkpoint"),
    (b"", "gan-cls", "not a checkpoint"),
    (GOOD[:len(GOOD) // 2], "gan-cls", "not a checkpoint"),
    (checkpoint_bytes(dict(kind="gan-cls", run=os.system)), "gan-cls", "not a checkpoint"),
    (checkpoint_bytes([1, 2]), "gan-cls", "does not hold"),
    (GOOD, "encoder", "does not hold"),
    (checkpoint_bytes(dict(kind="gan-cls", format=99)), "gan-cls", "format 99")])
def test_no_checkpoint(here, content, kind, message):
    if content is not None:
        (here / "x.pt").write_bytes(content)
    with pytest.raises(data.UserError, match=f"x.pt.*{message}|{message}.*x.pt") as error:
        data.load_checkpoint(here / "x.pt", kind)
    assert "\n" not in str(error.value)


def test_load_network_makes_no_memory_for_what_does_not_fit():
    half = {key: value.half() for key, value in nn.Linear(3, 2).state_dict().items()}
    net = data.load_network(lambda: nn.Linear(3, 2), half)
    assert torch.equal(net.weight, half["weight"].float())
    with pytest.raises(data.UserError, match="run.pt does not fit"):
        with data.checkpoint_errors("run.pt"):
            data.load_network(lambda: nn.Linear(10 ** 9, 10 ** 6), half)    # would have 4,000 TB


# ---- Devices, precision ----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mps", "toaster", "meta", "cuda:99", "xpu", ""])
def test_devices(name):
    assert data.pick_device("cpu") == torch.device("cpu")
    assert data.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(data.UserError, match="expected auto, cpu|cannot be used") as error:
        data.pick_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fp32, bf16, expected", [
    (10e-3, 5e-3, "bf16"),
    (5e-3, 10e-3, "fp32"),
    (10e-3, 9.5e-3, "fp32")])
def test_auto_precision_takes_what_was_measured(monkeypatch, fp32, bf16, expected):
    monkeypatch.setattr(data, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(data, "time_convolution", dict(fp32=fp32, bf16=bf16).get)
    lines = []
    assert data.pick_precision("cpu", log=lines.append) == expected
    assert f"{expected}: " in lines[0] and f"{1000 * bf16:.1f} ms in bf16" in lines[0]


def test_precision_without_a_measurement(monkeypatch):
    monkeypatch.setattr(data, "cpu_has_bf16", lambda: False)
    for name, precision in (("auto", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")):
        assert data.pick_precision("cpu", name) == precision
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert data.pick_precision("cuda") == expected
    before = torch.get_rng_state()
    assert data.time_convolution("fp32") > 0
    assert torch.equal(torch.get_rng_state(), before)       # the measurement draws no numbers


def test_autocast_and_scaler():
    a = torch.ones(2, 2)
    for precision, dtype in data.DTYPES.items():
        with data.autocast("cpu", precision):
            assert (a @ a).dtype == dtype
        assert data.grad_scaler("cpu", precision).is_enabled() == (precision == "fp16")


# ==============================================================================================
# Training: train.py
# ==============================================================================================

def test_a_run_from_start_to_image(tiny, capsys):
    assert call(train, *TINY, "--steps", 8, "--out", "run") == 0
    out = capsys.readouterr().out
    assert "loss_D" in out and "D(wrong)" in out and "images/s" in out
    # Nothing is written elsewhere.
    assert {p.name for p in tiny.iterdir()} == {"mine", "cache", "run"}
    samples = sorted(p.name for p in (tiny / "run/samples").iterdir())
    assert samples == ["000004.png", "000008.png"]
    assert Image.open(tiny / "run/loss.png").size == (720, 360)

    text = ["an all black bird", "日本 🐦 UPPER", "x" * 5000, "--weights", "run/checkpoint.pt"]
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        assert call(sample, *text, "--n", 3, "--seed", seed, "--out", name) == 0
    files = [(tiny / name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_is_unbroken(tiny, precision):
    # Recipe paper: the rates of the others depend on --steps. argparse takes the last --recipe.
    paper = (*TINY, "--recipe", "paper", "--precision", precision)
    assert call(train, *paper, "--steps", 10, "--out", "whole") == 0
    assert call(train, *paper, "--steps", 4, "--out", "parts") == 0
    assert call(train, *paper, "--resume", "--steps", 10, "--out", "parts") == 0
    equal = same(load_run("whole"), load_run("parts"))
    assert equal


def test_the_chosen_precision_is_kept_when_a_run_goes_on(tiny, monkeypatch, capsys):
    choices = iter(["bf16", "fp32"])
    pick = data.pick_precision

    def measured(device, name="auto", log=print):
        return next(choices) if name == "auto" else pick(device, name, log)

    monkeypatch.setattr(data, "pick_precision", measured)
    assert call(train, *TINY[:-2], "--steps", 4, "--out", "run") == 0       # measures: bf16
    assert load_run("run")["settings"]["precision"] == "bf16"
    for steps, options, expected in (
            (6, (), "bf16"), (8, ("--precision", "fp32"), "fp32"), (10, (), "fp32")):
        capsys.readouterr()
        options = ("--device", "cpu", *options)
        assert call(train, "--resume", "--steps", steps, *options, "--out", "run") == 0
        assert f"{expected} on cpu" in capsys.readouterr().out
    assert next(choices) == "fp32"                                          # measured once only


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


def test_stopped_in_an_epoch_and_resumed_is_unbroken(tiny, monkeypatch):
    # Batches of 4 of 16 images: step 10 is in an epoch's middle, and in the half where rates fall.
    short = (*TINY, "--batch-size", 4)
    assert call(train, *short, "--steps", 16, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert call(train, *short, "--steps", 16, "--out", "parts") == 130
    assert load_run("parts")["step"] == 10
    assert call(train, *short, "--resume", "--out", "parts") == 0
    whole = load_run("whole")
    parts = load_run("parts")
    assert whole.pop("history")[-1]["step"] == parts.pop("history")[-1]["step"]
    equal = same(whole, parts)
    assert equal


@pytest.mark.parametrize("variant", train.VARIANTS)
def test_the_loop_gives_the_step_what_the_run_asks_for(tiny, monkeypatch, variant):
    """Its switches, rates, Adam's betas, captions, and each training image once an epoch."""
    steps = []
    positions = []
    gan_cls_step = train.gan_cls_step
    batch = data.Batches.batch

    def watched(G, D, opt_G, opt_D, *rest, **options):
        groups = [optimizer.param_groups[0] for optimizer in (opt_G, opt_D)]
        steps.append((options["cls"], options["int_"], [(g["lr"], g["betas"]) for g in groups]))
        return gan_cls_step(G, D, opt_G, opt_D, *rest, **options)

    def drawn(self, index):
        assert self.captions == train.RECIPES["quick"]["captions"]
        positions.append(index.tolist())
        return batch(self, index)

    monkeypatch.setattr(train, "gan_cls_step", watched)
    monkeypatch.setattr(data.Batches, "batch", drawn)
    assert call(train, *TINY, "--variant", variant, "--steps", 4, "--out", "run") == 0
    assert [step[:2] for step in steps] == [tuple(train.VARIANTS[variant].values())] * 4
    rates = [[rate for rate, _ in step[2]] for step in steps]
    assert rates == [[4e-4, 2e-4]] * 3 + [[2e-4, 1e-4]]
    assert all(betas == (0.5, 0.999) for step in steps for _, betas in step[2])
    epochs = [sum(positions[:2], []), sum(positions[2:], [])]       # 16 images, batches of 8
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs) and epochs[0] != epochs[1]


def test_what_surrounds_algorithm_1(monkeypatch):
    """G's average has a short memory in the beginning; every fourth step has the penalty, on what D
    sees; Q learns with G."""
    run, batches = random_run()
    first_Q = copy.deepcopy(run.Q.state_dict())
    decays = []
    penalised = []
    monkeypatch.setattr(train, "update_ema", lambda ema, net, decay: decays.append(decay))
    monkeypatch.setattr(run, "view", lambda x: x * 0.5)
    monkeypatch.setattr(train, "r1_penalty", lambda D, x, h: penalised.append(x) or D(x, h).sum())
    for _ in range(8):
        x, h, h_wrong = batches.batch(torch.arange(8))
        train.training_step(run, x, h, h_wrong)
    assert decays == [n / (n + 10) for n in range(1, 9)]
    assert len(penalised) == 2 and torch.equal(penalised[1], x * 0.5)
    assert not torch.equal(run.Q.state_dict()["net.2.weight"], first_Q["net.2.weight"])


def test_no_S_of_an_older_G_is_kept(tiny, monkeypatch, capsys):
    monkeypatch.setattr(encoder, "WEIGHTS", tiny / "weights")
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    first = load_run("run")["S"]
    with monkeypatch.context() as patch:                    # it goes on, and is stopped
        stop_at(patch, 2)
        assert call(train, "--resume", "--out", "run", "--steps", 12) == 130
    assert load_run("run")["S"] is None
    check_refused(capsys, train, ["--out", "run", "--export", "x"], "not finished")

    def interrupted(run, batches):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:                    # G and D are done, S is not
        patch.setattr(train, "train_style_encoder", interrupted)
        assert call(train, "--resume", "--out", "run") == 130
    assert load_run("run")["step"] == 12 and load_run("run")["S"] is None
    assert call(train, "--resume", "--out", "run") == 0
    last = load_run("run")["S"]
    assert not torch.equal(first["net.2.weight"], last["net.2.weight"])


def test_a_signal_between_two_steps_is_not_too_late_to_save(tiny, monkeypatch):
    check_health = train.check_health

    def check(means, history, step):
        if step == 6:                                               # not a step that is saved
            signal.raise_signal(signal.SIGINT)
        check_health(means, history, step)

    monkeypatch.setattr(train, "check_health", check)
    assert call(train, *TINY, "--steps", 16, "--out", "run") == 130
    assert load_run("run")["step"] == 7


def test_training_in_a_thread_sets_no_signal_handler(tiny):
    # As in a notebook's worker. Python allows handlers in the main thread only.
    codes = []
    worker = threading.Thread(
        target=lambda: codes.append(call(train, *TINY, "--steps", 4, "--out", "run")))
    worker.start()
    worker.join()
    assert codes == [0] and load_run("run")["step"] == 4


def test_progress_is_the_mean_since_the_last_line(tiny, monkeypatch):
    gan_cls_step = train.gan_cls_step
    losses = []

    def watched(*args, **options):
        out = gan_cls_step(*args, **options)
        losses.append(out["loss_D"].item())
        return out

    monkeypatch.setattr(train, "gan_cls_step", watched)
    assert call(train, *TINY, "--steps", 5, "--out", "run") == 0
    rows = load_run("run")["history"]
    assert [row["step"] for row in rows] == [2, 4, 5]
    expected = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [row["loss_D"] for row in rows] == pytest.approx(expected)


def test_same_seed_same_run(tiny):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(train, *TINY, "--steps", 4, "--seed", seed, "--out", out) == 0
    equal = same(load_run("a"), load_run("b"))
    other = same(load_run("a")["G"], load_run("c")["G"])
    assert equal and not other


def test_checkpoint_round_trip(tiny):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    checkpoint = load_run("run")
    run = train.Run(checkpoint["settings"], torch.device("cpu"), checkpoint["encoder"])
    run.restore(checkpoint)
    run.save(tiny / "again/checkpoint.pt")
    equal = same(checkpoint, load_run("again"))
    assert equal


# ---- The parts of a step ---------------------------------------------------------------------

def test_s_learns_what_a_frozen_g_generates(monkeypatch):
    """Eq. 6: only S moves. Its images are augmented, or it would read patterns of G alone."""
    run, batches = random_run()
    inputs = []

    class Watched(gan_cls.StyleEncoder):
        def forward(self, x):
            inputs.append(x.detach())
            return super().forward(x)

    monkeypatch.setattr(train, "StyleEncoder", Watched)
    monkeypatch.setattr(train, "augment", lambda x: torch.full_like(x, 0.25))
    before = copy_of(run.G_ema)
    first = copy_of(train.train_style_encoder(run, batches, 1, log=silent))
    second = copy_of(train.train_style_encoder(run, batches, 2, log=silent))
    assert len(inputs) == 3 and all((x == 0.25).all() for x in inputs)
    assert same(before, run.G_ema.state_dict()) and not same(first, second)


@pytest.mark.parametrize("recipe, steps, expected", [
    # [A]: halved every 100 epochs, here of 8 steps.
    ("paper", 2000, {0: (2e-4, 2e-4), 799: (2e-4, 2e-4), 800: (1e-4, 1e-4), 1600: (5e-5, 5e-5)}),
    # Constant for a half, then in a straight line to a tenth.
    ("quick", 1000, {0: (4e-4, 2e-4), 500: (4e-4, 2e-4), 750: (2e-4, 1e-4), 999: (4e-5, 2e-5)}),
])
def test_learning_rates(recipe, steps, expected):
    run, _ = random_run(recipe)
    run.settings["steps"] = steps
    for step, rates in expected.items():
        run.step = step
        train.set_rates(run, step // 8)
        got = [optimizer.param_groups[0]["lr"] for optimizer in (run.opt_G, run.opt_D)]
        assert got == pytest.approx(rates)


@pytest.mark.parametrize("recipe, weight", [("quick", 0.04), ("toy", 1.2), ("paper", None)])
def test_the_gradient_penalty_comes_at_every_fourth_step(tiny, monkeypatch, recipe, weight):
    seen = []

    def watched(run, x, h, weight):
        seen.append((run.step, weight, len(x)))

    monkeypatch.setattr(train.Run, "gradient_penalty_step", watched)
    assert call(train, *TINY, "--recipe", recipe, "--steps", 9, "--out", "run") == 0
    assert seen == ([(4, weight, 8), (8, weight, 8)] if weight else [])


def test_the_gradient_penalty_makes_d_flatter_and_leaves_g_alone():
    run, batches = random_run()
    train.set_rates(run, 0)
    x, h, _ = batches.batch(torch.arange(8))
    before = copy_of(run.G)
    state = torch.random.get_rng_state()
    slopes = []
    for _ in range(30):
        torch.random.set_rng_state(state)                          # the same augmentation each time
        slopes.append(gan_cls.r1_penalty(run.D, run.view(x), h).item())
        torch.random.set_rng_state(state)
        run.gradient_penalty_step(x, h, 10.0)
    assert slopes[-1] < 0.5 * slopes[0] and same(before, run.G.state_dict())


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_what_d_is_shown_follows_the_recipe(monkeypatch, recipe):
    run, batches = random_run(recipe)
    x = batches.batch(torch.arange(8))[0]
    monkeypatch.setattr(train, "augment", lambda x: x + 1)
    monkeypatch.setattr(train, "sharpen", lambda x, gain: x * gain)
    expected = {"paper": x, "quick": x + 1, "toy": (x + 1) * train.RECIPES["toy"]["sharpen"]}
    assert torch.equal(run.view(x), expected[recipe])
    assert run.step_options()["blends_to_D"] == (recipe != "paper")


def test_extra_loss_is_mode_seeking_and_eq_6():
    run, batches = random_run()
    z = torch.randn(12, 100)
    texts = torch.randn(12, 1024)
    x_fake = run.G(z, texts)
    torch.manual_seed(5)
    got = run.extra_G_loss(z, texts, x_fake)
    torch.manual_seed(5)
    z2 = torch.randn(2, 100)                                        # a quarter of the batch of 8
    x2 = run.G(z2, texts[:2])
    expected = 0.05 * gan_cls.mode_seeking_loss(z[:2], z2, x_fake[:2], x2)
    expected = expected + 0.02 * gan_cls.style_loss(z, run.Q(run.view(x_fake)))
    assert torch.allclose(got, expected)

    got.backward()
    for net in (run.G, run.Q):
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert all(p.grad is None for p in run.D.parameters())
    assert random_run("paper")[0].extra_G_loss(z, texts, x_fake) == 0.0


# ---- torch.compile ---------------------------------------------------------------------------

class Broken(torch.autograd.Function):
    """Fails in the backward pass only, as inductor does with some chains of deconvolutions."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("expected size 4==4, stride 1==16 at dim=1\nand more lines")


def fails_at_once(forward, **_):
    raise RuntimeError("Cannot find a working triton installation.\n\nMore of it.")


def fails_when_called(forward, **_):
    def compiled(*args):
        raise RuntimeError("no C++ compiler\nand more lines")
    return compiled


def fails_backward(forward, **_):
    return lambda *args: Broken.apply(forward(*args))


@pytest.mark.parametrize("fake", [fails_at_once, fails_when_called, fails_backward])
def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, fake):
    """One line, and a run whose weights equal those of one without compiling, bit for bit."""
    runs = []
    for compiled in (False, True):
        run, batches = random_run()
        if compiled:
            monkeypatch.setattr(torch, "compile", fake)
            lines = []
            train.compile_networks(run, batches, lines.append)
            assert len(lines) == 2 and "\n" not in lines[1]
            assert "G, D.features, D.score, Q" in lines[1]
        for _ in range(3):
            x, h, h_wrong = batches.batch(torch.arange(8))
            train.set_rates(run, 0)
            train.gan_cls_step(run.G, run.D, run.opt_G, run.opt_D, x, h, h_wrong, view=run.view,
                               extra_G_loss=run.extra_G_loss)
        runs.append({name: part.state_dict() for name, part in run.parts().items()})
    assert same(*runs)


def test_a_rehearsal_leaves_no_trace():
    run, batches = random_run()
    for _ in range(2):                                  # before the first step, and after it
        before = copy.deepcopy(run.state())
        train.rehearse(run, batches)
        assert same(before, run.state())
        train.set_rates(run, 0)
        x, h, h_wrong = batches.batch(torch.arange(8))
        train.gan_cls_step(run.G, run.D, run.opt_G, run.opt_D, x, h, h_wrong)


def test_a_compiled_step_has_the_eager_gradients(monkeypatch):
    """All convolutions of D and G are in captured graphs, and one step's gradients are eager's."""
    counted = []
    lines = []

    def counting(graph, inputs):
        for node in graph.graph.nodes:
            counted.extend([1] * ("conv" in str(node.target)))
        return graph

    found = []
    for backend in (None, "aot_eager", counting):
        run, batches = random_run("paper")
        run.opt_D.param_groups[0]["lr"] = 0.0       # Adam would enlarge differences of rounding
        if backend:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
                train.compile_networks(run, batches, lines.append)
        torch.manual_seed(0)
        x, h, h_wrong = batches.batch(torch.arange(8))
        train.gan_cls_step(run.G, run.D, run.opt_G, run.opt_D, x, h, h_wrong)
        found.append(gradients(run.G) + gradients(run.D))
    convolutions = 0
    for net in (run.G, run.D):
        for module in net.modules():
            convolutions += isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    assert not any("not compiled" in line for line in lines)
    assert len(counted) >= convolutions > 20 - 3
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_compiled_step_has_the_eager_gradients():
    """In fp32 up to TF32's rounding; in bf16 as near to fp32 as an eager step is."""
    def G_gradients(precision, compiled):
        run, batches = random_run("paper", device="cuda", precision=precision)
        run.opt_D.param_groups[0]["lr"] = 0.0       # Adam would enlarge differences of rounding
        if compiled:
            train.compile_networks(run, batches, silent)
        torch.manual_seed(0)
        x, h, h_wrong = batches.batch(torch.arange(8, device="cuda"))
        train.gan_cls_step(run.G, run.D, run.opt_G, run.opt_D, x, h, h_wrong, amp=run.amp)
        return torch.cat([gradient.flatten() for gradient in gradients(run.G)])

    exact = G_gradients("fp32", compiled=False)

    def error(precision, compiled):
        return (G_gradients(precision, compiled) - exact).norm() / exact.norm()

    assert error("fp32", compiled=True) < 0.05
    assert error("bf16", compiled=True) < 1.5 * error("bf16", compiled=False)


def test_compiling_stays_below_the_limit_on_recompilations(monkeypatch):
    """Beyond it Dynamo runs a network eagerly, and says so only in a warning."""
    name = "fail_on_recompile_limit_hit"
    if not hasattr(torch._dynamo.config, name):
        name = "fail_on_cache_limit_hit"                # torch 2.6
    monkeypatch.setattr(torch._dynamo.config, name, True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run, batches = random_run(precision="bf16")
    lines = []
    train.compile_networks(run, batches, lines.append)
    for options in (dict(amp=run.amp), run.step_options()):     # as in the benchmark
        x, h, h_wrong = batches.batch(torch.arange(8))
        train.gan_cls_step(run.G, run.D, run.opt_G, run.opt_D, x, h, h_wrong, **options)
        run.gradient_penalty_step(x, h, 0.1)
    assert len(lines) == 1


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
    ds = ds or data.Dataset("mine", np.zeros((2, 76, 76, 3), np.uint8), [["a bird"], ["a fish"]],
                            np.arange(2), ["0", "1"], np.zeros(2, bool), np.arange(2))
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


# ---- Generating ------------------------------------------------------------------------------

def test_sampling_modes(here, capsys):
    needs_exercises(2)
    run_by_hand(here / "runs/mine-gan/checkpoint.pt")               # found as the newest run
    text = "an all black bird"
    assert call(sample, text, "a red bird", "--n", 3, "--out", "a.png") == 0
    assert call(sample, text, "a red bird", "--n", 3, "--out", "b.png") == 0
    assert call(sample, text, "a red bird", "--n", 3, "--seed", 1, "--out", "c.png") == 0
    a, b, c = ((here / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c

    assert call(sample, "--interpolate", "a red bird", "a blue bird", "--out", "i.png") == 0
    assert call(sample, "--interpolate-style", "a red bird", "--out", "z.png") == 0
    Image.new("CMYK", (300, 40)).save("q.jpg")
    Image.new("I;16", (20, 20)).save("q.png")
    assert call(sample, "a red bird", "a blue bird", "--style", "q.jpg", "q.png",
                "--out", "s.png") == 0
    i, z, s = (Image.open(name).size for name in ("i.png", "z.png", "s.png"))
    assert i[0] == z[0] > s[0]
    assert "wrote s.png" in capsys.readouterr().out


def test_interpolations_go_from_the_first_to_the_second(here):
    needs_exercises(2)
    model = sample.Model(run_by_hand(here / "run.pt"))
    g = torch.Generator().manual_seed(0)
    h = torch.randn(2, 1024, generator=g)
    z = sample.noise(2, g)
    steps = [0.0, 0.25, 1.0]

    def image(z, h):
        return model.generate(z[None], h[None])[0].astype(int)

    def near(a, b):
        return np.abs(a.astype(int) - b).max() <= 1

    for row, noise in zip(sample.grid_between_texts(model, h[0], h[1], z, steps), z):
        assert near(row[0], image(noise, h[0])) and near(row[2], image(noise, h[1]))
        assert near(row[1], image(noise, 0.75 * h[0] + 0.25 * h[1]))
    for row, text in zip(sample.grid_between_noises(model, h, z[[0, 0]], z[[1, 1]], steps), h):
        assert near(row[0], image(z[0], text)) and near(row[2], image(z[1], text))
        assert near(row[1], image(0.75 * z[0] + 0.25 * z[1], text))


def test_truncation_multiplies_z(here, monkeypatch):
    needs_exercises(2)
    whole = sample.noise(5, torch.Generator().manual_seed(3))
    short = sample.noise(5, torch.Generator().manual_seed(3), 0.5)
    assert torch.equal(short, 0.5 * whole)

    path = run_by_hand(here / "run.pt")
    seen = []
    generate = sample.Model.generate
    monkeypatch.setattr(sample.Model, "generate",
                        lambda self, z, h: seen.append(z) or generate(self, z, h))
    for args in (["a bird"], ["--interpolate", "a bird", "a red one"],
                 ["--interpolate-style", "a bird"]):
        seen.clear()
        assert call(sample, *args, "--weights", path, "--n", 2) == 0
        rows = len(seen)
        assert call(sample, *args, "--weights", path, "--n", 2, "--truncation", 0.7) == 0
        for whole, short in zip(seen[:rows], seen[rows:], strict=True):
            assert torch.allclose(short, 0.7 / sample.TRUNCATION * whole, atol=1e-6)


def test_eight_bits_are_those_of_to_pixels(here):
    """Generated images are measured with the 256 levels that real ones have."""
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = levels / 127.5 - 1
    pixels = data.to_pixels(x)
    assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2).long(), levels)
    assert torch.equal(sample.from_pixels(pixels, "cpu"), x)
    between = torch.tensor([-1.0, -0.99, 0.0, 0.001, 0.5, 0.998, 1.0]).view(1, 1, 1, 7)
    pixels = data.to_pixels(between.expand(1, 3, 1, 7))
    # (x + 1) * 127.5, rounded
    assert pixels[0, 0, :, 0].tolist() == [0, 1, 128, 128, 191, 255, 255]
    assert sample.from_pixels(pixels, "cpu").abs().max() <= 1

    model = sample.Model(run_by_hand(here / "run.pt"))
    h = torch.randn(3, 1024)
    images = sample.generate_for(model, h, seed=0)
    z = sample.noise(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert np.array_equal(images, data.to_pixels(model.G(z, h)))


def test_many_images_are_generated_in_parts(here, monkeypatch):
    model = sample.Model(run_by_hand(here / "run.pt"))
    z = sample.noise(10, torch.Generator().manual_seed(0))
    h = torch.randn(10, 1024)
    whole = model.generate(z, h)
    monkeypatch.setattr(sample, "BATCH", 4)
    parts = model.generate(z, h)
    assert whole.shape == parts.shape == (10, 64, 64, 3)
    assert np.abs(whole.astype(int) - parts).max() <= 1


# ---- Which run -------------------------------------------------------------------------------

def test_no_run_yet(here, monkeypatch, capsys):
    monkeypatch.setattr(encoder, "WEIGHTS", here / "none")
    assert call(sample, "a bird") == 2
    assert "python train.py" in capsys.readouterr().err


def test_weights_are_found_from_any_folder(here, monkeypatch):
    assert sample.find_weights() == HERE / "weights/cub.pt"          # no run here
    assert sample.find_weights("toy") == HERE / "weights/toy.pt"
    older = run_by_hand(here / "runs/mine-gan/checkpoint.pt")
    newer = run_by_hand(here / "runs/mine-gan-cls/checkpoint.pt")
    assert older.stat().st_mtime_ns < newer.stat().st_mtime_ns
    assert sample.find_weights() == Path("runs/mine-gan-cls/checkpoint.pt")
    assert sample.find_weights("runs/mine-gan") == Path("runs/mine-gan/checkpoint.pt")
    assert sample.find_weights(str(older)) == older
    (here / "toy").mkdir()                                  # a folder without a run hides nothing
    assert sample.find_weights("toy") == HERE / "weights/toy.pt"
    with pytest.raises(data.UserError, match="no file nowhere.*there: cub.*toy"):
        sample.find_weights("nowhere")


@pytest.mark.parametrize("name", ["toy", "cub", "flowers"])
def test_the_shipped_weights_load(here, name):
    model = sample.Model(sample.find_weights(name))
    h = sample.embed(model.phi, ["an all black bird", "this flower has yellow petals"])
    image = model.generate(torch.zeros(2, 100), h)
    assert image.shape == (2, 64, 64, 3) and image.std() > 10
    assert model.S is not None
    assert 0.1 < h.std() < 1.5
    phi, v = encoder.build(encoder.encoder_in(encoder.WEIGHTS / f"{name}.pt"))
    assert torch.equal(encoder.embed(phi, ["a bird"]), sample.embed(model.phi, ["a bird"]))


def test_a_run_without_S_says_how_to_get_it(here, capsys):
    path = run_by_hand(here / "my run$/checkpoint.pt", finished=False)
    (here / "q.jpg").write_bytes(jpeg())
    assert call(sample, "a bird", "--weights", path) == 0
    assert call(sample, "a bird", "--weights", "my run$", "--style", "q.jpg") == 2
    assert "python train.py --resume --out 'my run$'" in capsys.readouterr().err


# ---- Measuring -------------------------------------------------------------------------------

def measured(capsys):
    """The output of sample.py --measure, and the line of JSON in it."""
    out = capsys.readouterr().out
    return out, json.loads(next(line for line in out.splitlines() if line.startswith("{")))


def test_measure_two_runs(here, small_toy, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda name, source=None: small_toy)
    scorers_by_hand(small_toy)
    run_by_hand(here / "runs/toy-gan/checkpoint.pt", small_toy, "gan", seed=0)
    run_by_hand(here / "runs/toy-gan-cls/checkpoint.pt", small_toy, "gan-cls", seed=1)
    assert call(sample, "--measure", "runs/toy-gan", "runs/toy-gan-cls",
                "--save-images", "judge") == 0
    out, numbers = measured(capsys)

    assert numbers["dataset"] == "toy" and numbers["images"] == 160
    assert numbers["scorers"] == [1, 2, 3] and numbers["truncation"] == 1.0
    assert list(numbers["runs"]) == ["toy-gan", "toy-gan-cls"]
    run = numbers["runs"]["toy-gan"]
    assert run["variant"] == "gan" and run["seed"] == 0 and run["steps"] == 4
    figures = list(run)[4:]
    assert figures == [
        "sentences matched, top-1", "sentences matched, top-5", "pixel diversity",
        "pixel diversity, blends", "Frechet distance", "style transfer, background kept",
        "style transfer, direction kept",
        "style verification, background", "style verification, pose"]
    assert all(0 <= run[key] <= 1 for key in figures if key not in figures[2:5])
    assert all(run[key] > 0 for key in figures[2:5])
    # 4 unseen classes, so all are among the first five.
    assert run["sentences matched, top-5"] == 1.0

    references = numbers["references"]
    assert references["sentences matched, top-1"]["chance"] == 0.25
    assert references["sentences matched, top-5"]["chance"] == 1
    frechet = references["Frechet distance"]
    assert set(frechet) == {"real images, two halves",
                            "real images, training against unseen classes"}
    assert 0 < frechet["real images, two halves"] < run["Frechet distance"]
    assert 0.9 < references["style transfer, direction kept"]["real images, by the linear probe"]
    assert set(references) == set(figures) - {"pixel diversity", "pixel diversity, blends"}

    # The table: each figure a row, with the numbers of the JSON, and its references below.
    lines = out.splitlines()
    row = next(line for line in lines if line.startswith("Frechet distance"))
    assert [float(word) for word in row.split()[2:]] == pytest.approx(
        [numbers["runs"][name]["Frechet distance"] for name in numbers["runs"]], abs=6e-5)
    assert lines[lines.index(row) + 1].startswith("    real images, two halves: ")
    assert "not the FID of papers" in out
    for kind in ("background", "pose"):
        line = next(line for line in lines if line.startswith(f"style groups by {kind}"))
        assert int(line.split()[4].replace(",", "")) > 0 and "distinct pairs" in line

    assert Image.open("runs/toy-measure/models.png").width > 3 * 96
    assert Image.open("runs/toy-measure/roc.png").width == 720
    assert {p.name for p in Path("judge").iterdir()} == {"real.npy", "toy-gan.npy",
                                                         "toy-gan-cls.npy"}
    real = np.load("judge/real.npy")
    unseen = small_toy.unseen_images()
    assert np.array_equal(real, small_toy.images[unseen][:, 6:70, 6:70])
    fake = np.load("judge/toy-gan.npy")
    assert fake.shape == real.shape and fake.dtype == real.dtype == np.uint8

    # Alone and again: the same figures.
    assert call(sample, "--measure", "runs/toy-gan-cls", "--out", "other") == 0
    _, again = measured(capsys)
    assert again["runs"]["toy-gan-cls"] == numbers["runs"]["toy-gan-cls"]
    assert (here / "other/models.png").exists()


def test_measure_shows_a_G_that_knows_one_image_for_blends(small_toy, monkeypatch):
    needs_exercises(2)
    test = sample.make_test_set(small_toy, torch.device("cpu"))
    torch.manual_seed(0)
    h = torch.randn(len(test.texts), 1024).sign()           # blends of two rows have zeros
    monkeypatch.setattr(sample, "embed", lambda phi, texts: h)

    def generate(z, h):
        blend = (h == 0).any(1)
        images = (40 * z[:, :3] + 128).clamp(0, 255).byte()
        images[blend] = 128
        return images[:, None, None].expand(-1, 64, 64, -1).numpy()

    model = SimpleNamespace(phi=None, S=None, device=torch.device("cpu"), generate=generate)
    scorers = SimpleNamespace(matched=lambda x: (0, 0), real_features=[torch.rand(9, 4)],
                              features=lambda x: [torch.rand(9, 4)])
    results = sample.measure_run(model, test, scorers, None)
    assert results["pixel diversity"] > 0.1
    assert results["pixel diversity, blends"] == 0


def test_measure_generates_from_the_right_noises_and_texts(small_toy, monkeypatch):
    """The sentence of each image for the matches; for a style, another image's sentence."""
    needs_exercises(2)
    test = sample.make_test_set(small_toy, torch.device("cpu"))
    n = len(test.texts)
    h = torch.arange(n).float()[:, None].expand(-1, 1024)
    monkeypatch.setattr(sample, "embed", lambda phi, texts: h)
    monkeypatch.setattr(sample, "background_kept", lambda x, y: float(len(x)))
    monkeypatch.setattr(sample, "direction_kept", lambda y, direction, v, probe: float(len(y)))
    asked = []
    verified = []
    monkeypatch.setattr(sample, "verify_style", lambda emb, pairs: verified.append(emb) or 0.0)

    def generate(z, h):
        asked.append((z, h[:, 0].int().tolist()))
        return np.zeros((len(z), 64, 64, 3), np.uint8)

    model = SimpleNamespace(phi=None, S=True, device=torch.device("cpu"), generate=generate,
                            styles=lambda x: x.flatten(1)[:, :100])
    scorers = SimpleNamespace(matched=lambda x: (0, 0), real_features=[torch.rand(9, 4)],
                              features=lambda x: [torch.rand(9, 4)], image_encoders=[None])
    sample.measure_run(model, test, scorers, probe=True, truncation=0.5)
    z, texts = asked[0]
    assert texts == list(range(n)) and z.std() == pytest.approx(0.5, abs=0.01)
    query, other = sample.style_queries(test)
    s, texts = asked[-1]
    assert texts == other.tolist() and not (query == other).any()
    assert torch.equal(s, test.x[query].flatten(1)[:, :100])
    assert len(verified) == 2 and torch.equal(verified[0], test.x.flatten(1)[:, :100])


def test_measure_trains_the_scorers_that_are_missing(here, short_training, capsys):
    ds = small_data(here)
    run_by_hand(here / "a/checkpoint.pt", ds, finished=False)
    assert call(sample, "--measure", "a") == 0
    out, numbers = measured(capsys)
    scorers = sorted(Path("runs").glob("own-mine*-scorer-*.pt"))
    assert len(scorers) == 3
    phis = [data.load_checkpoint(path, "encoder")["phi"]["out.bias"] for path in scorers]
    assert not torch.equal(phis[0], phis[1]) and not torch.equal(phis[1], phis[2])
    # No boxes and keypoints, and no S: what needs them is left out.
    assert list(numbers["runs"]["a"])[4:] == ["sentences matched, top-1",
                                              "sentences matched, top-5", "pixel diversity",
                                              "pixel diversity, blends", "Frechet distance"]
    assert "a has no style encoder yet" in out
    # One unseen class: every image is matched, which says nothing.
    assert "say little" in out
    stamps = [path.stat().st_mtime_ns for path in scorers]
    assert call(sample, "--measure", "a") == 0                      # now they are there
    assert stamps == [path.stat().st_mtime_ns for path in scorers]


def test_runs_of_other_data_are_refused(here, capsys):
    own_folder(here / "mine", classes=5, each=4)
    ds = data.load("mine")
    scorers_by_hand(ds)
    run_by_hand(here / "a/checkpoint.pt", ds)
    run_by_hand(here / "b/checkpoint.pt", ds, dataset="flowers")
    assert call(sample, "--measure", "a", "b") == 2
    assert "b was trained on flowers, not on mine" in capsys.readouterr().err
    run_by_hand(here / "c/checkpoint.pt", ds, digest="0" * 16)
    assert call(sample, "--measure", "a", "c") == 2
    assert "c was trained on mine, whose captions" in capsys.readouterr().err

    shutil.move(here / "mine", here / "moved")
    assert call(sample, "--measure", "a") == 2
    assert "--dataset" in capsys.readouterr().err
    scorers_by_hand(data.load("moved"))
    assert call(sample, "--measure", "a", "--dataset", "moved") == 0
    (here / "moved/kind0/p0.txt").write_text("something else")
    assert call(sample, "--measure", "a", "--dataset", "moved") == 2
    assert "those that moved has now" in capsys.readouterr().err

    for n in range(8):
        unpacked(here / "single", {f"{n}.jpg": jpeg(), f"{n}.txt": b"a bird"})
    run_by_hand(here / "d/checkpoint.pt", data.load("single"))
    assert call(sample, "--measure", "d") == 2
    assert "at least two images each" in capsys.readouterr().err


def test_equal_runs_of_several_seeds_share_a_column(here, capsys):
    class Run:
        def __init__(self, phi="conv", **settings):
            self.settings = settings
            self.phi_settings = dict(image_side=phi, seed=settings["seed"])

    runs = {"a": Run(variant="gan", steps=4, seed=0), "b": Run(variant="gan-cls", steps=4, seed=0),
            "a-1": Run(variant="gan", steps=4, seed=1), "long": Run(variant="gan", steps=9, seed=2),
            "b-changed": Run(variant="gan-cls", steps=4, seed=0),
            "a-phi": Run("features", variant="gan", steps=4, seed=2)}
    columns = sample.group_by_seed(runs)
    assert columns == {"a (2 seeds)": ["a", "a-1"], "b": ["b"], "b-changed": ["b-changed"],
                       "long": ["long"], "a-phi": ["a-phi"]}
    figures = {name: {"x": n ** 2} for n, name in enumerate(runs)}
    del figures["long"]["x"]
    sample.print_table(columns, figures, {"x": {"chance": 0.5}})
    row, reference = capsys.readouterr().out.splitlines()[-2:]
    # Of a and a-1, 0 and 4: mean 2, deviation sqrt(4 + 4).
    assert row.split() == ["x", "2.0000", "+-", "2.8284", "1.0000", "16.0000", "-", "25.0000"]
    assert reference == "    chance: 0.5000"


def test_one_caption_an_image_drawn_with_a_seed(small_toy):
    index = small_toy.unseen_images()
    texts = sample.draw_texts(small_toy, index)
    assert texts == sample.draw_texts(small_toy, index) != sample.draw_texts(small_toy, index, 1)
    places = [small_toy.captions[i].index(text) for i, text in zip(index, texts)]
    assert set(places) == {0, 1, 2}


def test_scorers_match_by_the_class_and_take_the_mean_of_three():
    scorers = sample.Scorers.__new__(sample.Scorers)
    labels = torch.tensor([3, 7, 3, 7])
    classes = torch.tensor([3, 7])
    means = torch.eye(2)
    unseen = encoder.UnseenClasses(torch.arange(4), labels, classes, means)
    scorers.unseen = [unseen, unseen]
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    scorers.image_encoders = [torch.nn.Identity(), torch.nn.Flatten()]
    assert scorers.matched(x) == [0.75, 1.0]
    scorers.image_encoders[1] = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        scorers.image_encoders[1].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert scorers.matched(x) == [0.5, 1.0]                 # 0.75 and 0.25
    scorers.chance = 0.02
    assert [scorers.say_little(top) for top in (0.02, 0.07, 0.34, 0.36, 0.9)] == [
        True, True, True, False, False]
    scorers.chance = 1.0
    assert scorers.say_little(1.0)


def test_pixel_diversity_is_a_ratio_of_deviations():
    g = torch.Generator().manual_seed(0)
    real = [torch.randn(500, 3, 8, 8, generator=g) for _ in range(3)]
    assert sample.pixel_diversity([0.5 * x for x in real], real) == pytest.approx(0.5)
    assert sample.pixel_diversity([x[:1].expand(16, -1, -1, -1) for x in real], real) == 0


# ---- The measures ----------------------------------------------------------------------------

def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=g, dtype=torch.float64)
    # exactly mean 0, covariance I
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5])
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5])
    # |m|^2 + sum (1 - scale)^2, for diagonal covariances
    wanted = float(shift.square().sum() + (1 - scale).square().sum())
    assert sample.frechet_distance(x, x * scale + shift) == pytest.approx(wanted, rel=1e-6)
    assert sample.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    three = sample.mean_frechet_distance([x, x, x], [x, x + shift, x * scale])
    wanted = (shift.square().sum() + (1 - scale).square().sum()) / 3
    assert three == pytest.approx(float(wanted), rel=1e-6)
    # covariances that do not commute, against the closed form through numpy
    A = torch.randn(4, 4, generator=g, dtype=torch.float64)
    B = torch.randn(4, 4, generator=g, dtype=torch.float64)
    root = np.linalg.eigvals((A @ A.T @ B @ B.T).numpy()).real.clip(0)
    wanted = float((A @ A.T).trace() + (B @ B.T).trace()) - 2 * np.sqrt(root).sum()
    assert sample.frechet_distance(x @ A.T, x @ B.T) == pytest.approx(wanted, rel=1e-6)


def test_auc_against_all_pairs():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (90,), generator=g).float()
    same = torch.rand(90, generator=g) < 0.4
    wins = []
    for a in scores[same].tolist():
        for b in scores[~same].tolist():
            wins.append(1.0 if a > b else 0.5 if a == b else 0.0)
    assert sample.auc(scores, same) == pytest.approx(np.mean(wins))
    distinct = torch.randn(90, generator=g)
    false, true = sample.roc(distinct, same)
    assert float(torch.trapezoid(true, false)) == pytest.approx(sample.auc(distinct, same))
    assert true[-1] == false[-1] == 1


def test_kmeans_finds_blobs():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 6
    points = torch.randn(6, 3, generator=g)[truth] * 20 + torch.randn(300, 3, generator=g) * 0.1
    before = points.clone()
    group = sample.kmeans(points, 6)
    assert all(len(group[truth == i].unique()) == 1 for i in range(6))
    assert len(group.unique()) == 6 and torch.equal(points, before)
    assert len(sample.kmeans(torch.zeros(7, 2), 3).unique()) == 1   # fewer different points than k

    # Without blobs: each point is in the group whose mean is nearest.
    points = torch.rand(300, 2, generator=g)
    group = sample.kmeans(points, 6, rounds=300)
    means = torch.stack([points[group == i].mean(0) for i in range(6)])
    assert torch.equal(torch.cdist(points, means).argmin(1), group)


def test_style_verification_knows_a_perfect_and_a_random_S():
    g = torch.Generator().manual_seed(0)
    group = torch.randint(0, 10, (600,), generator=g)
    pairs = sample.style_pairs(group, most=500)
    assert len(pairs) == 5
    for i, j, same in pairs:
        assert len(same) == 1000 and same.float().mean() == 0.5
        assert (group[i] == group[j]).equal(same) and not (i == j).any()
        assert len({frozenset(pair) for pair in zip(i.tolist(), j.tolist())}) == 1000   # distinct
    assert not set(pairs[0][0].tolist()) & set(pairs[1][0].tolist())    # folds share no image
    perfect = torch.nn.functional.one_hot(group).float()
    assert sample.verify_style(perfect, pairs) == 1.0
    chance = torch.randn(600, 100, generator=g)
    assert sample.verify_style(chance, pairs) == pytest.approx(0.5, abs=0.03)
    longer = chance * (torch.rand(600, 1, generator=g) + 0.1)       # a cosine, whatever the length
    assert sample.verify_style(longer, pairs) == pytest.approx(sample.verify_style(chance, pairs))


def test_style_pairs_are_all_there_are():
    group = torch.tensor([4, 4, -1, 7, 7, 7, 4, -1, 4, 7])
    pairs = sample.style_pairs(group, folds=1)
    i, j, same = pairs[0]
    found = {frozenset(pair) for pair in zip(i[same].tolist(), j[same].tolist())}
    wanted = set()
    for a in range(10):
        for b in range(a):
            if group[a] == group[b] >= 0:
                wanted.add(frozenset((a, b)))
    assert found == wanted and (~same).sum() == same.sum() == len(wanted)
    for group in (torch.arange(50), torch.full((50,), -1), torch.zeros(50).long(),
                  torch.tensor([]).long()):
        with pytest.raises(data.UserError, match="pairs of images of one style"):
            sample.style_pairs(group)


def test_style_groups_read_background_and_pose(small_toy):
    ds = small_toy
    index = np.arange(len(ds.images))
    background, pose = sample.style_groups(ds, index, 8).values()
    colours = torch.tensor(np.array([ds.images[i][:3, :].mean((0, 1)) for i in index]))
    inside = []
    for k in background.unique():
        if (background == k).sum() > 1:
            inside.append(colours[background == k].std(0).mean())
    assert torch.stack(inside).mean() < 0.5 * colours.std(0).mean()
    right = sample.facing(ds, index) > 0
    for k in pose.unique():                 # a group of poses faces one way
        share = right[pose == k].float().mean()
        assert max(share, 1 - share) > 0.95

    # [A]: 100 groups. A pose is the same wherever its bird is, and however large.
    assert 90 < len(sample.style_groups(ds, index)["pose"].unique()) <= 100
    moved = dataclasses.replace(
        ds, keypoints=ds.keypoints * 0.5 + [3, 5], boxes=ds.boxes * 0.5 + [3, 5, 0, 0])
    assert torch.allclose(sample.poses(moved, index), sample.poses(ds, index), atol=1e-4)

    # What is not known is in no group.
    keypoints = ds.keypoints.copy()
    keypoints[3, 2] = np.nan
    boxes = ds.boxes.copy()
    boxes[5] = np.nan
    partly = dataclasses.replace(ds, keypoints=keypoints, boxes=boxes)
    background, pose = sample.style_groups(partly, index, 8).values()
    assert (background < 0).nonzero().flatten().tolist() == [5]
    assert (pose < 0).nonzero().flatten().tolist() == [3, 5]
    nothing = dataclasses.replace(ds, keypoints=np.full_like(keypoints, np.nan))
    assert (sample.style_groups(nothing, index, 8)["pose"] == -1).all()
    with pytest.raises(data.UserError, match="a beak and a tail"):
        sample.direction_probe(nothing, None, "cpu")


def test_background_and_direction_kept():
    g = torch.Generator().manual_seed(0)
    colours = torch.rand(8, 3, generator=g)[torch.arange(64) % 8] * 2 - 1
    x = colours[:, :, None, None].expand(-1, -1, 64, 64)
    below = x.clone()
    below[:, :, 6:] = 0                                     # only the top rows count
    assert sample.background_kept(x, below) == 1.0
    assert sample.background_kept(x, x.roll(1, 0)) == 0.0

    class Tower(torch.nn.Module):
        def features(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x, 4)

    # An image whose brighter half is the side that the bird looks to.
    direction = torch.tensor([1.0, -1.0] * 20)
    x = torch.linspace(-1, 1, 64).expand(40, 3, 64, 64) * direction[:, None, None, None]
    features = sample.direction_features(Tower(), x)
    probe = torch.linalg.lstsq(features, direction[:, None], driver="gelsd").solution
    assert sample.direction_kept(x, direction, Tower(), probe) == 1.0
    assert sample.direction_kept(x.flip(3), direction, Tower(), probe) == 0.0


# ==============================================================================================
# The command line
# ==============================================================================================

# ---- What the scripts share ------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [("1", 1), ("64", 64), ("007", 7)])
def test_int_between(text, value):
    assert data.int_between(1, 64)(text) == value


@pytest.mark.parametrize("text", ["0", "65", "-3", "1.5", "x", "", "9" * 5000, "²", "1_0"])
def test_int_between_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 64"):
        data.int_between(1, 64)(text)


def test_what_a_console_cannot_show_ends_no_run(monkeypatch):
    out = io.BytesIO()
    err = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="cp1252"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="ascii"))

    def main():
        print("bird 🐦 \udcff é")
        raise data.UserError("no bird 🐦")

    with pytest.raises(SystemExit) as stop:
        data.run_script(main)
    assert stop.value.code == 2
    assert out.getvalue().startswith(b"bird \\U0001f426 \\udcff \xe9")
    assert err.getvalue() == b"error: no bird \\U0001f426\n"


@pytest.mark.parametrize("error, code, line", [
    (data.UserError("mend it"), 2, "error: mend it"),
    (OSError(28, "No space left on device"), 2, "No space left"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_run_script_ends_in_one_line(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        data.run_script(main)
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert line in err and err.count("\n") == 1


def check_refused(capsys, module, args, message):
    """Code 2 and one line that says why, behind argparse's usage at most."""
    capsys.readouterr()
    code = call(module, *args)
    err = capsys.readouterr().err
    assert code == 2 and message in err.splitlines()[-1], (args, code, err)
    assert "Traceback" not in err
    assert err.count("\n") == 1 or err.startswith("usage: ")


# ---- data.py ---------------------------------------------------------------------------------

def test_data_on_its_own(here, capsys):
    own_folder(here / "mine")
    unpacked(here / "mine", {f"kind0/bare{i}.png": jpeg() for i in range(12)})
    assert call(data, "--dataset", "mine") == 0
    out = capsys.readouterr().out
    assert "12 images, 24 captions" in out and "12 things are not" in out
    assert "unseen, never trained on: 3 images, classes: 1" in out
    sheet = Image.open(f"cache/{data.short_name('mine')}.png")
    assert sheet.height == 4 * 78

    process = start(here, "import data; data.run_script(data.main)", "--dataset", "mine")
    process.stdout.close()                                  # as `| head` does
    assert process.wait() != 0
    data.main(["--dataset", "mine"])                        # as in a notebook


def encrypted_zip(folder):
    content = bytearray(zipped(folder / "z", {"a.txt": b"secret"}).read_bytes())
    content[6] |= 1                                         # "encrypted", in the member's header
    content[content.find(b"PK\1\2") + 8] |= 1               # and in the directory
    return bytes(content)


def table(name, content):
    return {"x/a.jpg": jpeg(), f"x/{name}": content}


def cub_with(**tables):
    """One image of CUB and its caption, with these lines in its tables."""
    files = {"x/images/1.A/a.jpg": jpeg(), "x/text/1.A/a.txt": b"a bird"}
    for name, line in tables.items():
        files[f"x/images/{name}.txt"] = line.encode()
    return files


# What is there, the options, and what is said.
BAD_DATA = [
    ({}, ["nowhere"], "unknown data set 'nowhere': expected toy"),
    ({}, ["some/where/cubb"], "unknown data set 'cubb': did you mean cub?"),
    ({"a.txt": b"a caption"}, ["a.txt"], "no .zip or .tar.gz"),
    ({"x.hdf5": b"\x89HDF\r\n\x1a\n"}, ["x.hdf5"], "x.hdf5 is no .zip or .tar.gz"),
    ({"x.zip": zipfile}, ["x.zip"], "encrypted"),
    ({}, ["cub", "--from", "x"], "x has none of CUB_200_2011.tgz, CUB"),
    ({"x/CUB_200_2011.tgz": b"", "x/birds.zip": b""}, ["cub", "--from", "x"], "no .zip or .tar.gz"),
    # Nothing belongs together: what is there, a name of each, and the form expected.
    ({"x/a.jpg": jpeg(), "x/b.txt": b"alone"}, ["x"], "x has 1 .jpg (a.jpg), 1 .txt (b.txt)"),
    ({"x/a.jpg": jpeg(), "x/a.caption": b"a bird", "x/t.parquet": b""}, ["x"],
     "1 .caption (a.caption), 1 .jpg (a.jpg), 1 .parquet (t.parquet). Expected for each NAME"),
    ({"x/a.jpg": jpeg(), "x/a.txt": b"\n \n"}, ["x"], "a.jpg: no caption"),
    ({"x/a.jpg": b"no image", "x/a.txt": b"a bird"}, ["x"], "a.jpg: not an image"),
    ({"x/.hidden": b""}, ["x"], "x has no files"),
    ({"x/images/1.A/a.jpg": jpeg(), "x/text/captions.pickle": b""}, ["cub", "--from", "x"],
     "images has 1 .jpg (1.A/a.jpg); text has 1 .pickle (captions.pickle)"),
    ({"x/images/1.A/a.jpg": jpeg(), "x/text/1.B/b.txt": b"a bird"}, ["cub", "--from", "x"],
     "1 .jpg (1.A/a.jpg); text has 1 .txt (1.B/b.txt)"),
    # Tables.
    (table("metadata.csv", b"file;words\na.jpg;a bird\n"), ["x"], "found file, words"),
    (table("metadata.csv", b"text,file_name\na bird, red,a.jpg\n"), ["x"], "in that of a bird"),
    (table("metadata.csv", b"file_name,te\0xt\na.jpg,a bird\n"), ["x"], "metadata.csv cannot"),
    (table("metadata.jsonl", b'{"file_name": "a.jpg"'), ["x"], "metadata.jsonl cannot be read"),
    (table("metadata.jsonl", b"[" * 100_000), ["x"], "metadata.jsonl cannot be read"),
    (table("metadata.jsonl", b"1\n2\n"), ["x"], "metadata.jsonl cannot be read"),
    (cub_with(images="1 a b c"), ["cub", "--from", "x"], "table of CUB"),
    (cub_with(images="1 1.A/a.jpg"), ["cub-box", "--from", "x"], "no bounding boxes"),
    (cub_with(images="1 1.A/a.jpg", bounding_boxes="1 a b c d", part_locs=""),
     ["cub-box", "--from", "x"], "table of CUB"),
    (cub_with(images="2 1.A/a.jpg", bounding_boxes="1 1 2 3 4", part_locs="1 1 1 1 1\n" * 15),
     ["cub-box", "--from", "x"], "table of CUB"),
]


@pytest.mark.parametrize("files, args, message", BAD_DATA)
def test_bad_data(here, capsys, files, args, message):
    for name, content in files.items():
        unpacked(here, {name: encrypted_zip(here) if content is zipfile else content})
    check_refused(capsys, data, ["--dataset", *args], message)
    assert not list(Path().glob("cache/*"))


# ---- encoder.py ------------------------------------------------------------------------------

def test_encoder_on_its_own(here, capsys):
    needs_exercises(3)
    own_folder(here / "mine", classes=5, each=4)
    options = ("--dataset", "mine", "--device", "cpu", "--precision", "fp32")
    assert call(encoder, *options, "--steps", 2) == 0
    first = capsys.readouterr().out
    assert call(encoder, *options, "--evaluate") == 0
    again = capsys.readouterr().out
    path = encoder.encoder_path(data.load("mine"))
    kept = path.read_bytes()
    check_refused(capsys, encoder, options, "add --evaluate")   # --evaluate was forgotten
    assert path.read_bytes() == kept
    assert "zero-shot top-1" in first and "AP@50" in first
    assert first.splitlines()[-1] == again.splitlines()[-1]

    save_features("f.npy")
    features = ("--image-features", "f.npy", "--out", "f.pt")
    assert call(encoder, *options, "--steps", 2, *features) == 0
    assert call(encoder, *options, "--evaluate", *features) == 0
    assert call(encoder, *options, "--evaluate", "--out", "f.pt") == 2      # whose features?
    assert "--image-features" in capsys.readouterr().err
    assert call(encoder, *options, "--evaluate", "--image-features", "f.npy") == 2
    assert "image side conv, not features" in capsys.readouterr().err


def test_evaluate_weights(here, monkeypatch, capsys):
    ds = small_data(here)
    trained = shipped_weights(here / "given", ds)
    monkeypatch.setattr(encoder, "WEIGHTS", here / "given")
    options = ("--dataset", "mine", "--device", "cpu", "--precision", "fp32", "--evaluate")
    assert call(encoder, *options, "--weights", "cub", "--image-features", "f.npy") == 0
    phi, v = encoder.build(trained)
    wanted = encoder.evaluate(ds, phi, v, encoder.frozen_features(ds, "f.npy"))
    assert f"zero-shot top-1  {wanted['zero-shot top-1']:.3f}" in capsys.readouterr().out
    for args, message in (
            (("--weights", "cub"), "--image-features"),
            (("--weights", "bare", "--image-features", "f.npy"), "phi without the image side"),
            (("--weights", "missing"), "no file")):
        assert call(encoder, *options, *args) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert call(encoder, *options[:-1], "--weights", "cub") == 2
    assert "add --evaluate" in capsys.readouterr().err


def test_an_encoder_without_unseen_classes_is_kept(here, capsys):
    needs_exercises(3)
    own_folder(here / "mine", classes=3, each=4)
    options = ("--dataset", "mine", "--device", "cpu", "--precision", "fp32", "--steps", 2)
    assert call(encoder, *options, "--out", "e.pt") == 0
    assert "no unseen classes" in capsys.readouterr().out and os.path.exists("e.pt")
    assert call(encoder, *options, "--evaluate", "--out", "e.pt") == 2
    assert "no unseen classes" in capsys.readouterr().err


def test_bad_input_to_encoder(here, capsys):
    own_folder(here / "mine", classes=5, each=4)
    (here / "text.pt").write_bytes(b"hello")
    torch.save(dict(kind="encoder", format=data.FORMAT), here / "noset.pt")
    ds = data.load("mine")
    settings = dict(dataset="mine", digest=ds.digest(), image_side="conv", cnn_dim=10 ** 12)
    data.save_checkpoint("wide.pt", kind="encoder", settings=settings, phi={}, v={})
    options = ("--dataset", "mine", "--device", "cpu", "--evaluate")
    for args, message in (
            (("--out", "text.pt"), "not a checkpoint"),
            (("--out", "missing.pt"), "no file missing.pt"),
            (("--out", "noset.pt"), "does not fit"),
            (("--out", "wide.pt"), "does not fit"),
            (("--steps", "0"), "expected a number"),
            (("--precision", "int4"), "invalid choice")):
        check_refused(capsys, encoder, [*options, *args], message)


# ---- train.py --------------------------------------------------------------------------------

def test_benchmark_prints_and_writes_nothing(here, capsys, monkeypatch):
    needs_exercises(1, 2, 4, 5)
    strides = []
    gan_cls_step = train.gan_cls_step

    def watched(G, D, opt_G, opt_D, *rest, **options):
        out = gan_cls_step(G, D, opt_G, opt_D, *rest, **options)
        for p, state in [*opt_G.state.items(), *opt_D.state.items()]:
            strides.append(state["exp_avg"].stride() == p.stride())
        return out

    monkeypatch.setattr(train, "gan_cls_step", watched)
    monkeypatch.setattr(train, "matrix_product_rate", lambda *_: 0.25)
    assert call(train, "--benchmark", "--ngf", 2, "--ndf", 2, "--batch-size", 8, "--device", "cpu",
                "--precision", "bf16") == 0
    out = capsys.readouterr().out
    assert re.search(r"Algorithm 1, fp32, default layout +[\d.]+ ms", out)
    assert re.search(r"channels last +[\d.]+ ms: [\d.]+ times as fast", out)
    assert "0.25 TFLOP/s" in out and "images a second" in out and list(here.iterdir()) == []
    # Fused Adam on CUDA refuses a state that lies in memory in another order than its weights.
    assert len(strides) > 1000 and all(strides)


@pytest.mark.parametrize("options, recipe, steps", [
    ((), "toy", 6000), (("--recipe", "paper"), "paper", 600 * (6400 // 64)),
    (("--epochs", 2), "toy", 2 * (6400 // 32))])
def test_recipe_and_length_follow_the_data_unless_named(monkeypatch, options, recipe, steps):
    _, batches = random_run()
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, options)])
    args = train.parse_args()
    ds = data.Dataset("toy", batches.images.numpy(), [["a bird"]] * 6400, np.arange(6400) % 8,
                      list("abcdefgh"), np.zeros(8, bool), np.arange(6400))
    settings = train.choose_settings(args, "gan", ds, torch.device("cpu"))
    assert (settings["recipe"], settings["steps"]) == (recipe, steps)
    ds.name = "cub"
    settings = train.choose_settings(args, "gan", ds, torch.device("cpu"))
    if not options:
        assert (settings["recipe"], settings["steps"]) == ("quick", 25_000)

    # Never more than the paper's 600 epochs: a few images need no 25,000 steps.
    ds.labels = ds.labels[:64]
    settings = train.choose_settings(args, "gan", ds, torch.device("cpu"))
    if not options:
        assert settings["steps"] == 600 * (64 // 32)


def test_resuming_with_other_settings_names_both(tiny, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    own_folder(tiny / "other", classes=6, each=4)
    for option, value, known in (
            ("--ngf", 4, "2"), ("--ndf", 4, "2"), ("--batch-size", 4, "8"), ("--seed", 3, "0"),
            ("--recipe", "paper", "quick"), ("--variant", "gan", "gan-int-cls"),
            ("--dataset", "other", "mine")):
        capsys.readouterr()
        assert call(train, "--resume", "--out", "run", "--steps", 8, option, value) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert str(value) in line and known in line
    assert load_run("run")["step"] == 4


def test_data_that_moved_are_the_same_data(tiny):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    shutil.move("mine", "moved")
    assert call(train, "--resume", "--out", "run", "--steps", 6) == 2       # not there any more
    assert call(train, "--resume", "--out", "run", "--steps", 6, "--dataset", "moved") == 0
    assert load_run("run")["step"] == 6


def test_a_run_goes_on_from_another_folder(tiny, monkeypatch):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    (tiny / "elsewhere").mkdir()
    monkeypatch.chdir(tiny / "elsewhere")
    assert call(train, "--resume", "--out", "../run", "--steps", 6) == 0
    assert load_run("../run")["step"] == 6


def test_the_last_line_can_be_pasted(tiny, capsys):
    for file in (tiny / "mine").rglob("*.txt"):
        file.write_text("a `red` bird's \"$HOME\" é; rm x")
    some = sorted((tiny / "mine").rglob("*.txt"))[0]
    some.write_text("a blue bird")
    assert call(train, *TINY, "--steps", 4, "--out", "a run") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.removeprefix("now try: "))
    assert words[:3] == ["python", "sample.py", "--weights"]
    assert words[3] == "a run/checkpoint.pt" and len(words) == 5
    assert call(sample, *words[2:], "--n", 2) == 0


def test_the_four_variants_are_trained_and_finished_ones_stay(tiny):
    for steps in (2, 4):
        assert call(train, *TINY, "--steps", steps, "--variant", "all") == 0
        runs = sorted(tiny.glob("runs/*/checkpoint.pt"))
        assert len(runs) == 4
        checkpoints = [load_run(path.parent) for path in runs]
        assert {c["settings"]["variant"] for c in checkpoints} == set(train.VARIANTS)
        assert all(c["step"] == steps for c in checkpoints)
    stamps = [path.stat().st_mtime_ns for path in runs]
    assert call(train, *TINY, "--steps", 4, "--variant", "all") == 0
    assert stamps == [path.stat().st_mtime_ns for path in runs]


def test_four_variants_go_on_where_they_were_stopped(tiny, monkeypatch, capsys):
    four = (*TINY, "--variant", "all", "--epochs", 2)       # 4 steps: 16 training images
    with monkeypatch.context() as patch:
        stop_at(patch, 6)                                   # in the second of them
        assert call(train, *four) == 130
    assert len(list(tiny.glob("runs/*/checkpoint.pt"))) == 2
    assert call(train, *four, "--resume") == 0
    runs = sorted(tiny.glob("runs/*/checkpoint.pt"))
    assert len(runs) == 4 and all(load_run(path.parent)["step"] == 4 for path in runs)
    check_refused(capsys, train, [*TINY, "--variant", "all", "--steps", 3], "has done 4 steps")


def test_what_fails_beside_a_checkpoint_is_not_blamed_on_it(tiny, monkeypatch, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    resume = ["--resume", "--out", "run", "--steps", 8]

    def full_disk(*args):
        raise OSError("no space left")

    def full_gpu(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(data, "load", full_disk)
        check_refused(capsys, train, resume, "no space left")
    monkeypatch.setattr(train, "Run", full_gpu)
    check_refused(capsys, train, resume, "the GPU's memory is full")


def test_export_keeps_what_sampling_needs(tiny, monkeypatch):
    monkeypatch.setattr(encoder, "WEIGHTS", tiny / "weights")
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    assert call(train, "--out", "run", "--export", "mine") == 0
    for weights, out in (("run", "a.png"), ("weights/mine.pt", "b.png")):
        assert call(sample, "a bird", "--weights", weights, "--out", out) == 0
    a = np.asarray(Image.open("a.png")).astype(int)
    b = np.asarray(Image.open("b.png")).astype(int)
    assert np.abs(a - b).max() <= 3
    size = (tiny / "weights/mine.pt").stat().st_size
    assert size < 0.5 * (tiny / "run/checkpoint.pt").stat().st_size


def test_a_run_on_a_phi_without_its_image_side_can_be_exported(tiny, monkeypatch):
    # As flowers.pt gives it to a new training.
    monkeypatch.setattr(encoder, "WEIGHTS", tiny / "weights")
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    content = load_run("run")
    del content["encoder"]["v"], content["format"]
    data.save_checkpoint(tiny / "run/checkpoint.pt", **content)
    assert call(train, "--out", "run", "--export", "mine") == 0
    assert call(sample, "a bird", "--weights", "mine") == 0


def broken_checkpoints(folder):
    """What a file may be that is called checkpoint.pt, but was not written by this run."""
    whole = torch.load(folder / "run/checkpoint.pt", weights_only=True)
    settings = whole["settings"]
    nameless = {key: value for key, value in settings.items() if key != "dataset"}
    for name, content in (
            ("short", dict(kind="gan-cls", format=data.FORMAT, settings=dict(ngf=3))),
            ("wide", dict(whole, settings=dict(settings, ngf=10 ** 6))),
            ("recipe", dict(whole, settings=dict(settings, recipe=["quick"]))),
            ("nameless", dict(whole, settings=nameless)),
            ("weights", dict(whole, G={})),
            ("other", dict(kind="other"))):
        (folder / name).mkdir()
        torch.save(content, folder / name / "checkpoint.pt")
    (folder / "cut").mkdir()
    good = (folder / "run/checkpoint.pt").read_bytes()
    (folder / "cut/checkpoint.pt").write_bytes(good[:len(good) // 2])


BAD_TRAINING = [
    (["--dataset", "nowhere"], "unknown data set"),
    ([*TINY, "--out", "run"], "--resume"),
    ([*TINY, "--out", "new", "--resume"], "nothing to resume"),
    ([*TINY, "--steps", "-3"], "expected a number"),
    (["--device", "toaster"], "toaster"),
    (["--device", "mps"], "expected one of: cpu"),
    ([*TINY, "--out", "few", "--batch-size", 3], "too small"),
    (["--out", "run", "--resume", "--epochs", 1], "has done 4 steps"),
    (["--out", "run", "--resume", "--steps", 3], "has done 4 steps"),
    (["--out", "run", "--resume", "--image-encoder", "conv"], "its text encoder already"),
    (["--out", "run", "--resume", "--image-features", "f.npy"], "its text encoder already"),
    (["--ngf", 100_000], "expected a number from 1 to 1,024"),
    (["--variant", "all", "--out", "x"], "leave --out out"),
    (["--image-encoder", "conv", "--image-features", "f.npy"], "name one"),
    (["--variant", "all", "--benchmark"], "take one --variant"),
    (["--variant", "all", "--export", "x"], "take one --variant"),
    (["--out", "run", "--export", "../x"], "not a path"),
    (["--out", "short", "--resume"], "does not fit"),
    (["--out", "short", "--export", "x"], "does not fit"),
    (["--out", "wide", "--resume"], "does not fit"),
    (["--out", "recipe", "--resume"], "does not fit"),
    (["--out", "nameless", "--resume"], "does not fit"),
    (["--out", "weights", "--resume"], "does not fit"),
    (["--out", "other", "--resume"], "does not hold a gan-cls"),
    (["--out", "cut", "--resume"], "only a part of one"),
]


def test_bad_input_to_train(tiny, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    broken_checkpoints(tiny)
    for args, message in BAD_TRAINING:
        check_refused(capsys, train, args, message)


# ---- sample.py -------------------------------------------------------------------------------

def test_bad_input_to_sample(here, capsys):
    path = run_by_hand(here / "run/checkpoint.pt")
    run_by_hand(here / "real/checkpoint.pt")
    unpacked(here, {"text.pt": b"hello", "broken.jpg": b"not an image", "bare/x": b""})
    whole = torch.load(path, weights_only=True)
    short = {"settings": dict(ngf=3), "format": whole["format"], "kind": "gan-cls"}
    torch.save(short, here / "short.pt")
    torch.save(dict(whole, settings=dict(whole["settings"], ngf=10 ** 6)), here / "wide.pt")
    del whole["settings"]["dataset"]
    torch.save(whole, here / "nameless.pt")

    text = "an all black bird"
    ours = ["--weights", "run"]
    cases = [
        ([""], "empty text"),
        ([" \n\t "], "empty text"),
        ([], "no text: say what to generate"),
        ([text, "--weights", "missing.pt"], "no file missing.pt"),
        ([text, "--weights", "bare"], "no folder of that name with a checkpoint.pt"),
        ([text, "--weights", "text.pt"], "not a checkpoint"),
        ([text, "--weights", "short.pt"], "does not fit"),
        ([text, "--weights", "wide.pt"], "does not fit"),
        ([text, *ours, "--n", "0"], "expected a number from 1 to 64"),
        ([text, *ours, "--seed", "-1"], "expected a number from 0"),
        ([text, *ours, "--truncation", "0"], "expected a number above 0"),
        ([text, *ours, "--truncation", "nan"], "expected a number above 0"),
        ([text, *ours, "--truncation", "0.5", "--style", "q.jpg"], "cannot be used with it"),
        ([text, *ours, "--out", "x.exe"], "x.exe"),
        ([text, *ours, "--interpolate"], "expected 2"),
        ([text, *ours, "--interpolate", "--interpolate-style"], "not allowed with"),
        ([text, *ours, "--style", "broken.jpg"], "cannot read the image broken.jpg"),
        ([text, *ours, "--style", "missing.jpg"], "cannot read the image missing.jpg"),
        ([text, *ours, "--dataset", "toy"], "go with --measure"),
        ([text, "--measure", "run"], "takes runs, no texts"),
        (["--measure", "run", "--weights", "run"], "no --weights"),
        (["--measure", "missing"], "no file missing"),
        (["--measure", "run", "run"], "two of the runs are called run"),
        (["--measure", "real"], "rename it"),
        (["--measure", "run", "--seed", "0"], "are for noises that are drawn"),
        ([text, *ours, "--style", "q.jpg", "--n", "3"], "are for noises that are drawn"),
        (["--frechet", "a.npy", "b.npy", "--n", "3"], "are for noises that are drawn"),
        (["--measure", "nameless.pt"], "does not fit"),
        (["--measure", "run", "--dataset", "nowhere"], "nowhere"),
        (["--device", "toaster", text], "toaster"),
    ]
    for args, message in cases:
        check_refused(capsys, sample, args, message)
        assert not (here / "sample.png").exists()


def test_the_distance_of_given_features(here, capsys):
    """Of N(0, 1) moved by 2 in one of 3 directions, in float16 too: 4."""
    a = np.random.default_rng(0).standard_normal((500, 3))
    np.save("a.npy", a)
    np.save("moved.npy", (a + [2, 0, 0]).astype(np.float16))
    assert call(sample, "--frechet", "a.npy", "moved.npy") == 0
    printed = capsys.readouterr().out
    assert float(printed.split()[2].strip(",")) == pytest.approx(4, abs=0.01)
    assert "500 and 500 images" in printed

    np.save("wide.npy", np.zeros((5, 4)))
    np.save("whole.npy", np.zeros((5, 3), np.int64))
    np.save("nan.npy", np.full((5, 3), np.nan))
    np.save("one.npy", np.zeros((1, 3)))
    np.save("narrow.npy", np.zeros((5, 1)))
    np.save("huge.npy", np.full((5, 3), 1e200))             # not finite in 32 bits
    (here / "text.npy").write_text("no array")
    (here / "header.npy").write_bytes((here / "a.npy").read_bytes().replace(b"), }", b"((( "))
    np.savez("zip", np.zeros((5, 3)))
    (here / "zip.npz").rename("zip.npy")
    for name, message in (("wide", "has 4: name two files"), ("whole", "expected floats"),
                          ("nan", "not finite"), ("huge", "not finite"),
                          ("one", "expected floats"), ("narrow", "expected floats"),
                          ("text", "cannot read"), ("zip", "cannot read"),
                          ("header", "cannot read"),
                          ("absent", "cannot read")):
        check_refused(capsys, sample, ["--frechet", "a.npy", f"{name}.npy"], message)
    check_refused(capsys, sample, ["a bird", "--frechet", "a.npy", "a.npy"], "no texts")


# ==============================================================================================
# Robustness
# ==============================================================================================

# ---- Killed, stopped, gone wrong -------------------------------------------------------------

OFTEN = ("import data, train; train.EVERY.update(log=1, sample=7, save=3); train.SAVE_SECONDS = 0; "
         "train.train_style_encoder.__defaults__ = (3, print); data.run_script(train.main)")


def write_encoder(folder):
    """What a run in another process finds, so that it need not train a text encoder at length."""
    ds = data.load(str(folder / "mine"))
    data.save_checkpoint(folder / encoder.encoder_path(ds), **encoder.train_encoder(ds, log=silent))


def start(folder, code, *args):
    environment = dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


KILLS = int(os.environ.get("KILLS", 8))                 # KILLS=100 pytest -k killed: the long form


def test_killed_runs_resume_to_the_same_weights(tiny):
    """kill -9 at random moments of a real run; what comes out is the unbroken run's."""
    rng = random.Random(0)
    steps = 60 if KILLS <= 8 else 12 * KILLS
    write_encoder(tiny)
    run = start(tiny, OFTEN, *TINY, "--steps", steps, "--out", "whole")
    assert "done" in run.communicate()[0]
    kills = 0
    for _ in range(4 * KILLS + 30):
        resume = ["--resume"] if (tiny / "killed/checkpoint.pt").exists() else []
        run = start(tiny, OFTEN, *TINY, "--steps", steps, "--out", "killed", *resume)
        for line in run.stdout:
            if kills < KILLS and line.startswith("step "):      # it trains: kill it very soon
                time.sleep(rng.uniform(0, 0.25))
                run.kill()
                break
        run.stdout.close()
        kills += run.wait() == -9
        if (tiny / "killed/checkpoint.pt").exists():
            load_run("killed")                                      # whole, always
        if run.returncode == 0:
            break
    equal = same(load_run("whole"), load_run("killed"))
    assert kills >= min(3, KILLS) and equal
    TALLY["runs killed"] += kills


def test_checkpoints_are_not_written_too_often(tiny, monkeypatch):
    """On a GPU the steps between two saves would take less time than a save."""
    written = []
    save = train.Run.save

    def watched(run, path):
        written.append(run.step)
        save(run, path)

    monkeypatch.setattr(train.Run, "save", watched)
    for seconds, expected in ((0, [4, 8, 10, 10]), (1000, [10, 10])):       # the last one for S
        monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
        assert call(train, *TINY, "--steps", 10, "--out", f"run-{seconds}") == 0
        assert written == expected
        written.clear()


def test_ctrl_c_saves_and_says_how_to_go_on(tiny):
    write_encoder(tiny)
    run = start(tiny, OFTEN, *TINY, "--steps", 100000, "--out", "run")
    for line in run.stdout:
        if line.startswith("step 5/"):
            run.send_signal(signal.SIGINT)
            break
    rest = run.stdout.read()
    assert run.wait() == 130 and "--resume" in rest and "Traceback" not in rest
    assert load_run("run")["step"] == load_run("run")["history"][-1]["step"] >= 5


def test_a_run_that_goes_wrong_keeps_its_last_good_checkpoint(tiny, monkeypatch, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    before = (tiny / "run/checkpoint.pt").read_bytes()
    gan_cls_step = train.gan_cls_step

    def not_finite(*args, **options):
        return dict(gan_cls_step(*args, **options), loss_G=torch.tensor(math.nan))

    monkeypatch.setattr(train, "gan_cls_step", not_finite)
    assert call(train, *TINY, "--steps", 8, "--out", "run", "--resume") == 2
    assert "no longer finite at step 6" in capsys.readouterr().err
    assert (tiny / "run/checkpoint.pt").read_bytes() == before

    def won(*args, **options):
        out = {"loss_D": 0.0, "loss_G": 20.0, "D(real)": 0.9999, "D(fake)": 1e-5}
        return {key: torch.tensor(value) for key, value in out.items()}

    monkeypatch.setattr(train, "gan_cls_step", won)
    assert call(train, *TINY, "--steps", 40, "--out", "new") == 2
    assert "D has won" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(tiny, monkeypatch, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    before = (tiny / "run/checkpoint.pt").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert call(train, *TINY, "--steps", 8, "--out", "run", "--resume") == 2
    assert "No space left" in capsys.readouterr().err
    assert (tiny / "run/checkpoint.pt").read_bytes() == before
    assert not list((tiny / "run").glob("*.tmp"))


FULL_DISK = """
import resource, signal, sys
import torch, data

def main():
    data.save_checkpoint("x.pt", kind="encoder", w=torch.zeros(10))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    data.save_checkpoint("x.pt", kind="encoder", w=torch.ones(100_000))

data.run_script(main)
"""


def test_a_file_that_cannot_be_written_whole_loses_nothing(here):
    """A limit on the size of files is the full disk that a test can make."""
    process = start(here, FULL_DISK)
    out = process.communicate()[0]
    assert process.returncode == 2
    assert out.startswith("error: ") and out.count("\n") == 1
    assert data.load_checkpoint(here / "x.pt", "encoder")["w"].sum() == 0
    assert [path.name for path in here.iterdir()] == ["x.pt"]


# ---- Odd and broken input --------------------------------------------------------------------

def test_odd_names_in_a_folder(here):
    """Names that are no UTF-8, or not printable, pass through all files of the cache."""
    mine = own_folder(here / "mine")
    odd = os.fsencode(mine) + b"/kind\xe9\n"
    os.mkdir(odd)
    for name, content in ((b"a\xff.png", jpeg()), (b"a\xff.txt", b"text"), (b"b\xff.png", jpeg())):
        with open(odd + b"/" + name, "wb") as file:
            file.write(content)
    for _ in range(2):                                      # built, and read again
        ds = data.load("mine")
        assert len(ds.images) == 13
        assert len(ds.skipped) == 1 and ds.skipped[0].endswith(data.NO_CAPTION)


READ = ["a\x00b\x1b[31m", "line\nline\ttab", "x" * 100_000, "../../etc/passwd", "a b " * 5000,
        "\u202eabc", "日本 🐦 UPPER", "-"]


NOT_READ = ["🐦🦜", "طائر أسود", "ß" * 300, "\ud800"]


def test_prompts_of_every_sort(here, monkeypatch, capsys):
    path = run_by_hand(here / "run.pt")
    monkeypatch.setattr(socket, "socket", None)             # sample.py never needs a network
    before = set(here.rglob("*"))
    assert call(sample, *READ, "--weights", path, "--n", 2, "--out", "out.png") == 0
    out = capsys.readouterr().out
    assert "only the first 201 letters" in out and "only a part is read" in out
    assert set(here.rglob("*")) - before == {here / "out.png"}      # and nothing else is written

    (here / "out.png").unlink()
    for text in NOT_READ:
        assert call(sample, "a bird", text, "--weights", path, "--out", "out.png") == 2
        error = capsys.readouterr().err
        assert "no letter" in error and len(error.splitlines()) == 1
    assert call(sample, "--drop-table", "--weights", path) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert set(here.rglob("*")) == before


def test_fuzz_captions():
    rng = random.Random(0)
    for _ in range(3000):
        begin = rng.choice([b"", b"\xff\xfe", b"\xef\xbb\xbf"])
        for caption in data.read_captions(begin + rng.randbytes(rng.randrange(300))):
            assert caption.strip() and "\n" not in caption
    TALLY["broken inputs tried"] += 3000


@pytest.mark.filterwarnings("ignore")      # of Pillow; read_files silences them
def test_fuzz_images():
    rng = random.Random(1)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    seeds = []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        out = io.BytesIO()
        noise.save(out, kind)
        seeds.append(out.getvalue())
    good = 0
    for i in range(3000):
        box = (3, 3, 20, 9) if i % 2 else None
        try:
            pixels, _ = data.read_image(mutated(rng, seeds[i % 6]), box)
        except ValueError:
            continue
        assert pixels.shape == (76, 76, 3) and pixels.dtype == np.uint8
        good += 1
    assert 100 < good < 2900
    TALLY["broken inputs tried"] += 3000


def test_fuzz_archives(here):
    rng = random.Random(2)
    files = {f"x/{i}.txt": bytes([65 + i]) * 300 for i in range(5)}
    seeds = []
    for kind in ("w:gz", "w", "zip"):
        seeds.append(archive(here / "x", files, kind).read_bytes())
    good = 0
    for i in range(1500):
        (here / "x").write_bytes(mutated(rng, seeds[i % 3]))
        try:
            good += len(list(data.iterate_files(here / "x", r"\.txt$"))) > 0
        except data.UserError as error:
            assert "\n" not in str(error)
    assert 50 < good < 1450
    assert list(here.iterdir()) == [here / "x"]
    TALLY["broken inputs tried"] += 1500


def accepts_tables(tables):
    """Are they read? {name: bytes}: one of a folder of one's own, or the tables of CUB."""
    try:
        if len(tables) == 1:
            (name, content), = tables.items()
            captions = {path: [] for path in own_data("kind{c}/p{i}.png")}
            data.add_table(captions, name, content)
        else:
            cub = data.CubTables("CUB", tables)
            cub.small_box("004.Bunting/Bunting_0002.jpg", (0, 0, 90, 80))
            cub.keypoints("004.Bunting/Bunting_0002.jpg", (0, 0, 90, 80))
        return True
    except data.UserError:
        return False


def test_fuzz_tables():
    """metadata.csv, metadata.jsonl, COCO, and CUB's own."""
    rng = random.Random(3)
    seeds = [own_table(kind, "kind{c}/p{i}.png") for kind in ("csv", "jsonl", "coco")]
    images, _ = cub_files()
    seeds.append({name: text for name, text in images.items() if name.endswith(".txt")})
    good = 0
    for i in range(2000):
        tables = dict(seeds[i % 4])
        name = rng.choice(list(tables))
        tables[name] = mutated(rng, tables[name])
        good += accepts_tables(tables)
    assert 100 < good < 1900
    TALLY["broken inputs tried"] += 2000


def test_fuzz_checkpoints(here):
    path = run_by_hand(here / "run.pt")
    rng = random.Random(3)
    whole = torch.load(path, weights_only=True)
    content = path.read_bytes()

    def loads():
        try:
            sample.Model(here / "x.pt")
            return True
        except data.UserError:
            return False

    good = 0
    for _ in range(50):
        (here / "x.pt").write_bytes(mutated(rng, content))
        good += loads()
    for _ in range(50):                             # well-formed files that hold something else
        place = whole
        for _ in range(rng.randint(0, 3)):
            inner = [value for value in place.values() if isinstance(value, dict)]
            if not inner:
                break
            place = rng.choice(inner)
        key = rng.choice(list(place))
        old = place[key]
        place[key] = rng.choice(
            [None, -1, 10 ** 12, "x", [], {}, torch.zeros(3), float("nan")])
        torch.save(whole, here / "x.pt")
        good += loads()
        place[key] = old
    assert good < 85
    TALLY["broken inputs tried"] += 100


# ==============================================================================================
# The repository itself
# ==============================================================================================

MODULES = ["gan_cls", "encoder", "data", "train", "sample"]


def paper_table():
    """(file, name, the row) of each row of the README's tables that links to a piece of code."""
    for row in (HERE / "README.md").read_text().splitlines():
        link = re.search(r"\[`([\w.]+?)(?:\(.*\))?`\]\((\w+\.py)\)", row)
        if row.startswith("|") and link:
            yield link[2], link[1], row


def code_named(file, name):
    """The source of a function, a class or a method "Class.method" of a file; None without one."""
    text = (HERE / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        inner = [n for n in node.body if getattr(n, "name", None) == part]
        if not inner:
            return None
        node = inner[0]
    return ast.get_source_segment(text, node)


def marks(text):
    """Equations, lines and sections that a text names: {"eq. 3", "line 10", "4.1"}."""
    text = text.lower()
    found = set(re.findall(r"algorithm 1|line \d+|(?<![\d.])\d\.\d(?!\.?\d)", text))
    for numbers in re.findall(r"eqs?\. (\d(?:(?:,| and|, and) (?:eq\. )?\d)*)", text):
        found |= {f"eq. {n}" for n in re.findall(r"\d", numbers)}
    return found


def test_the_readme_points_to_the_code():
    """Each function in "Read it with the paper" is there, and names what its row names."""
    needs_exercises(1, 2, 3, 4, 5)                          # else comments may be missing
    rows = list(paper_table())
    assert len(rows) >= 10, "README: expected rows with a link such as [`Generator`](gan_cls.py)"
    named = set()
    for file, name, row in rows:
        code = code_named(file, name)
        assert code, f"README: there is no {name} in {file}"
        its_marks = marks(re.sub(r"`.*?`|\]\(.*?\)", "", row))
        assert its_marks <= marks(code), f"{file}: {name} names not all of {its_marks}"
        named |= its_marks
    assert named >= {f"eq. {n}" for n in range(1, 7)}


def imported(module):
    """The first names of all that a module imports."""
    names = set()
    for node in ast.walk(ast.parse((HERE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_nothing_but_torch_numpy_pillow():
    assert {path.stem for path in HERE.glob("*.py")} == {*MODULES, "test_gan_cls"}
    allowed = {*MODULES, *sys.stdlib_module_names, "torch", "numpy", "PIL"}
    for module in MODULES:
        assert imported(module) <= allowed, module
