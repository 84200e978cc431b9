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
    return encoder.train_encoder(ds, **dict(dict(steps=2, cnn_dim=8, log=silent), **options))


def save_features(path, rows=20):
    np.save(path, np.random.default_rng(0).normal(size=(rows, 1024)).astype(np.float16))
    return path


def test_alphabet():
    assert len(encoder.ALPHABET) == 70 and encoder.ALPHABET.count("-") == 2
    row = encoder.encode_text(["aZ 9"])[0].tolist()
    assert row == [1, 26, 70, 36] + 197 * [0]
    assert encoder.encode_text(["é\x7f日🐦\n"]).sum() == 0              # letters that it lacks
    assert (encoder.encode_text(["b" * 500]) == 2).all()
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


def test_embed_gives_equal_texts_equal_rows():
    phi = small_phi()
    texts = ["a red bird", "a blue bird", "a red bird", "日"]
    out = encoder.embed(phi, texts, batch=1)
    assert torch.equal(out[0], out[2])
    assert torch.allclose(out, phi(encoder.encode_text(texts)), atol=1e-6)
    short = encoder.embed(phi, texts, "bf16")
    assert short.dtype == torch.float32 and torch.allclose(out, short, atol=0.02)


# ---- Eq. 3, 4, AP@50 -------------------------------------------------------------------------

def test_eq3_eq4_and_ap_at_50_against_loops(here, monkeypatch):
    """`evaluate` on 6 unseen classes of 10 images, with a phi and features that know something."""
    ds = small_data(here, classes=24, each=10)
    ds.labels = np.random.default_rng(0).permutation(ds.labels)
    unseen = ds.unseen_images().tolist()
    g = torch.Generator().manual_seed(0)
    of_class = 0.08 * torch.randn(24, 1024, generator=g)[ds.labels]
    features = of_class + torch.randn(240, 1024, generator=g)
    phi_of = {}
    for i in unseen:
        ds.captions[i] = [f"{text} of {i}" for text in ds.captions[i]]
        for text in ds.captions[i]:
            phi_of[text] = of_class[i] + torch.randn(1024, generator=g)
    monkeypatch.setattr(encoder, "frozen_features", lambda ds, path: features)
    monkeypatch.setattr(encoder, "embed", lambda phi, texts, precision="fp32": torch.stack(
        [phi_of[text] for text in texts]))

    images_of = {c: [i for i in unseen if ds.labels[i] == c] for c in ds.labels[unseen]}
    captions_of = {c: sum([ds.captions[i] for i in images_of[c]], []) for c in images_of}

    def score(image, text):
        return float(features[image].double() @ phi_of[text].double())

    def image_score(i, c):
        return np.mean([score(i, text) for text in captions_of[c]])

    def text_score(i, c):               # of the first caption of image i
        return np.mean([score(image, ds.captions[i][0]) for image in images_of[c]])
    eq3 = [max(images_of, key=lambda c: image_score(i, c)) == ds.labels[i] for i in unseen]
    eq4 = [max(images_of, key=lambda c: text_score(i, c)) == ds.labels[i] for i in unseen]
    found = []
    for c in images_of:
        best = sorted(unseen, key=lambda i: -image_score(i, c))[:50]
        found.append(np.mean([ds.labels[i] == c for i in best]))
    wanted = [np.mean(eq3), np.mean(eq4), np.mean(found), 1 / 6]
    assert len(set(wanted)) == 4 and 0 < min(wanted) <= max(wanted) < 1
    measured = encoder.evaluate(ds, small_phi(), encoder.ImageEncoder("features"))
    assert list(measured.values()) == pytest.approx(wanted, abs=1e-6)


# ---- The image side, whitening ---------------------------------------------------------------

def test_image_encoder_has_features_and_head():
    v = encoder.ImageEncoder("conv").eval()
    x = torch.rand(2, 3, 64, 64)
    assert v.features(x).shape == (2, 256, 4, 4)
    assert torch.allclose(v(x), v.head(v.features(x).flatten(1)))


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
    (np.zeros(1024, np.float32), r"\(1024,\)"),
    (np.zeros((20, 1024), np.int64), "holds int64"),
    (np.full((20, 1024), np.nan, np.float32), "not finite"),
    (np.zeros((20, 1024), np.float32), "all the same"),
    (None, "cannot read features")])
def test_files_of_features_that_do_not_fit_are_refused(here, rows, message):
    ds = small_data(here)
    if rows is not None:
        np.save("f.npy", rows)
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

@pytest.mark.parametrize("options", [
    dict(image_features="f.npy"), dict(anneal=True), dict()])
def test_the_rate_is_constant_or_falls_in_a_straight_line(here, monkeypatch, options):
    rates = []
    step = torch.optim.RMSprop.step

    def watched(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)
    monkeypatch.setattr(torch.optim.RMSprop, "step", watched)
    save_features("f.npy")
    quick_encoder(small_data(here), steps=6, **options)
    falling = [1, 1, 1, 0.05 + 0.95 * 2 / 3, 0.05 + 0.95 / 3, 0.05]
    assert rates == pytest.approx([7e-4 * share for share in falling] if options else [7e-4] * 6)


def test_pairs_are_of_different_classes(here, monkeypatch):
    ds = small_data(here, classes=8, each=3)
    for i in range(len(ds.captions)):           # the captions name the image
        ds.captions[i] = [f"image {i} caption {k}" for k in range(1 + i % 3)]
    rows = torch.arange(24.0)[:, None].expand(24, 1024)
    monkeypatch.setattr(encoder, "MIX", 0.0)
    monkeypatch.setattr(encoder, "DROP", 0.0)
    texts = sum(ds.captions, [])
    tokens = encoder.encode_text(texts)
    batches = data.Batches(ds, tokens, "cpu")
    text_of = {tuple(row.tolist()): text for row, text in zip(tokens, texts)}
    seen = set()
    for _ in range(100):
        x, tokens = encoder.draw_pairs(batches, 4, rows)
        drawn = [text_of[tuple(row.tolist())] for row in tokens]
        assert [int(text.split()[1]) for text in drawn] == x[:, 0].tolist()
        assert len(set(ds.labels[x[:, 0].long()])) == 4         # four classes
        seen.update(drawn)
    # Any caption of any training image comes up.
    assert seen == set(encoder.captions_of(ds, ds.training_images()))


def test_drop_and_mix_of_features(here, monkeypatch):
    batches = data.Batches(small_data(here, classes=5, each=2), torch.zeros(20, 201), "cpu")
    features = torch.arange(10.0)[:, None].expand(10, 1024)     # images 2k and 2k + 1 are a class

    def many(mix, drop):
        monkeypatch.setattr(encoder, "MIX", mix)
        monkeypatch.setattr(encoder, "DROP", drop)
        return torch.cat([encoder.draw_pairs(batches, 4, 1 + features)[0] - 1 for _ in range(50)])
    x = many(0.5, 0.0)
    assert torch.equal(x.amin(1), x.amax(1))                    # one weight for an image
    assert 0.3 < ((x[:, 0] + 1e-3) % 1 > 2e-3).float().mean() < 0.7
    assert ((x[:, 0] + 1e-3) % 2 < 1 + 2e-3).all()              # never of two classes
    x = 1 + many(0.0, 0.25)
    assert (x == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert (x.amax(1) * 0.75 % 1).min() < 1e-5                  # the rest is larger


def test_ema_is_the_weighted_mean_of_weights_and_statistics():
    a = nn.BatchNorm1d(3)
    b = nn.BatchNorm1d(3)
    b.weight.data.fill_(5.0)
    b.running_mean.fill_(2.0)
    gan_cls.update_ema(a, b, 0.75)
    assert a.weight.tolist() == [2.0] * 3 and a.running_mean.tolist() == [0.5] * 3


def test_loss_in_32_bits_and_gradients_clipped(here, monkeypatch):
    seen = []
    loss = encoder.joint_embedding_loss
    clip = nn.utils.clip_grad_norm_

    def watched_loss(image_emb, text_emb):
        seen.append((text_emb.dtype, torch.is_autocast_enabled("cpu")))
        return 1e6 * loss(image_emb, text_emb)

    def watched_clip(parameters, most):
        parameters = list(parameters)
        assert clip(parameters, most) > 5
        assert clip(parameters, most) == pytest.approx(5, rel=1e-3)

    monkeypatch.setattr(encoder, "joint_embedding_loss", watched_loss)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched_clip)
    quick_encoder(small_data(here), precision="bf16")
    assert seen == [(torch.bfloat16, False)] * 2


@pytest.mark.parametrize("features", [None, "f.npy"])
def test_what_is_kept_is_the_average_and_its_scores(here, monkeypatch, features):
    """phi and v of the checkpoint score as before `whiten`: the averages of the weights where the
    image side is given features, else the last weights."""
    ds = small_data(here)
    save_features("f.npy")
    x = torch.randn(3, 1024) if features else torch.rand(3, 3, 64, 64)
    texts = ["a red bird", "a bird"]
    before = []
    whiten = encoder.whiten

    def watched(phi, v, *others):
        before.append(v(x) @ encoder.embed(phi, texts).T)
        whiten(phi, v, *others)
    monkeypatch.setattr(encoder, "whiten", watched)
    slow = quick_encoder(ds, image_features=features, steps=6)
    phi, v = encoder.build(slow)
    assert torch.allclose(v(x) @ encoder.embed(phi, texts).T, before[0], rtol=0.02)
    monkeypatch.setattr(encoder, "EMA", 0.0)                    # the last weights alone
    fast = quick_encoder(ds, image_features=features, steps=6)
    assert same(fast["phi"], slow["phi"]) == (features is None)
    assert not same(fast["phi"], quick_encoder(ds, image_features=features, seed=1)["phi"])


def test_a_few_steps_learn_something(here):
    """Classes whose features and captions differ plainly: the training classes are told apart."""
    ds = small_data(here)
    noise = np.random.default_rng(0).normal(size=(25, 1024)).astype(np.float32)
    np.save("f.npy", noise[ds.labels] + 0.1 * noise[5:])
    lines = []
    quick_encoder(ds, steps=200, cnn_dim=64, image_features="f.npy", log=lines.append)
    assert "200 steps; nothing is kept if they are stopped" in lines.pop(0)
    first, last = [float(line.split("loss")[1].split()[0]) for line in lines]
    assert last < 0.85 * first


# ---- What phi reads of a text, and the table of all captions ---------------------------------

@pytest.mark.parametrize("captions, refused, said", [
    (["小鸟 是 红色", "🐦 🐦"], r"none of the 2 training captions has a letter .*小鸟", None),
    (["птица, 1.", "2"], "none of the 2 training captions has a letter", None),
    (["a bird", "A bird"], r"all 2 training captions are the same .*'a bird'", None),
    (["x" * 201 + "red", "x" * 201 + "blue"], "all 2 .*reads 201 letters", None),
    (["é, 12", "a", "b"], None, "reads 66.7% .*; 0 of 3 captions"),
    (["x" * 202, "b"], None, "reads 100.0% .*; 1 of 2 captions are cut"),
    (["a", "b, 12"], None, None)])
def test_check_captions(captions, refused, said):
    check_reading(encoder.check_captions, captions, refused, said)


@pytest.mark.parametrize("text, refused, said", [
    ("An all BLACK bird, 2 wings!\n", None, None),
    ("", "empty text", None),
    (" \n\t ", "empty text", None),
    ("鳥", "knows no letter of", None),
    ("красная птица, 1.", "knows no letter of", None),
    ("鳥" * 300 + "bird", "knows no letter of", None),
    ("une tête rouge ✓", None, "only a part .*: ê ✓$"),
    ("a red bird " * 30, None, "only the first 201 letters of 330")])
def test_check_text(text, refused, said):
    check_reading(encoder.check_text, text, refused, said)


def check_reading(check, what, refused, said):
    """It is refused, or `said` in one line, or read without a word."""
    lines = []
    if refused:
        with pytest.raises(data.UserError, match=refused):
            check(what, lines.append)
    else:
        check(what, lines.append)
    assert len(lines) == bool(said) and all(re.search(said, line) for line in lines)


def test_caption_table_is_kept_and_read(here, monkeypatch):
    ds = small_data(here)
    phi = small_phi()
    lines = []
    table = encoder.caption_table(ds, phi, log=lines.append)
    texts = sum(ds.captions, [])
    assert table.shape == (len(texts), 1024)
    assert torch.equal(table, encoder.embed(phi, texts).half())
    kept, = data.CACHE.glob("*captions-*.npy")
    assert str(kept) in lines.pop()
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "embed", None)       # the second time nothing is computed
        assert torch.equal(encoder.caption_table(ds, phi), table)
    kept.write_bytes(kept.read_bytes()[:-100])      # a damaged one is computed again
    assert torch.equal(encoder.caption_table(ds, phi), table)

    # Its name changes with the weights, precision, captions, and with the code down to `embed`.
    names = {kept.name}

    def kept_anew(phi, precision="fp32"):
        table = encoder.caption_table(ds, phi, precision, silent)
        kept, = data.CACHE.glob("*captions-*.npy")              # the older one is removed
        names.add(kept.name)
        return table
    kept_anew(small_phi(1))
    kept_anew(phi, "bf16")
    ds.captions[0] = ["a caption that was mended", *ds.captions[0][1:]]
    mended = kept_anew(phi)
    assert not torch.equal(mended[0], table[0]) and torch.equal(mended[1:], table[1:])
    code = Path(encoder.__file__).read_text()
    monkeypatch.setattr(encoder, "__file__", "changed.py")
    for text in (code + "# more", code.replace("MAX_LETTERS = 201", "MAX_LETTERS = 20")):
        assert len(names) == 4
        Path("changed.py").write_text(text)
        kept_anew(phi)
    assert len(names) == 5


# ---- Which encoder a run uses ----------------------------------------------------------------

def test_get_encoder_trains_once_and_knows_its_data(here, short_training):
    ds = small_data(here)
    first = encoder.get_encoder(ds, log=silent)
    path = encoder.encoder_path(ds)
    assert path.parent.name == "runs" and path.name.startswith("own-mine")
    assert same(encoder.get_encoder(ds, log=silent), first) and len(short_training) == 1
    with pytest.raises(data.UserError, match="image side conv, not features: remove it"):
        encoder.get_encoder(ds, image_features="f.npy", log=silent)
    ds.captions[0] = ["a caption that was mended"]
    with pytest.raises(data.UserError, match="runs.*own-mine.*other captions.*has now: remove it"):
        encoder.get_encoder(ds, log=silent)
    path.unlink()
    assert encoder.get_encoder(ds, log=silent)["settings"]["digest"] == ds.digest()
    ds.captions = [["鳥"]] * 20
    with pytest.raises(data.UserError, match="none of the 16"):
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
    bare = {key: value for key, value in trained.items() if key != "v"}
    data.save_checkpoint(folder / "bare.pt", kind="gan-cls", settings={}, encoder=bare)
    return trained


def test_the_phi_given_away_is_the_default(here, monkeypatch, short_training):
    ds = small_data(here)
    trained = shipped_weights(here / "given", ds)
    monkeypatch.setattr(encoder, "WEIGHTS", here / "given")
    short_training.clear()
    for name, file in (("cub", "cub.pt"), ("cub-box", "cub.pt"), ("flowers", "flowers.pt")):
        ds.name = name
        lines = []
        assert same(encoder.get_encoder(ds, log=lines.append), trained)
        assert len(lines) == 1 and file in lines[0]
    assert not short_training and not (here / "runs").exists()
    assert all(p.dtype == torch.float32 for net in encoder.build(trained) for p in net.parameters())
    # Trained: where none is given away, where one is asked for, and where one is there already.
    for name, options in (("toy", {}), ("cub", dict(image_side="conv")), ("cub", {})):
        ds.name = name
        found = encoder.get_encoder(ds, log=silent, **options)
        assert found["settings"]["image_side"] == "conv"
    assert len(short_training) == 2


# ==============================================================================================
# Data: data.py
# ==============================================================================================

def check_form(ds, images, classes, unseen):
    """The form in which every data set comes."""
    assert ds.images.shape == (images, 76, 76, 3)
    assert ds.images.dtype == np.uint8 and isinstance(ds.images, np.memmap)
    assert len(ds.captions) == len(ds.labels) == len(ds.rows) == images
    for captions in ds.captions:
        assert captions and all(isinstance(text, str) and text for text in captions)
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


# ---- The toy birds ---------------------------------------------------------------------------

def test_toy(toy):
    check_form(toy, 8000, 200, 50)
    assert all(len(captions) == 10 for captions in toy.captions)
    assert (np.bincount(toy.labels) == 40).all()
    assert not np.isnan(toy.keypoints).any()
    assert (toy.boxes[:, 2:] > 30).all()

    # Any two species differ in two colours or more; those of one colour are trained on.
    colours = np.array([name.split(".")[1].split("-") for name in toy.class_names])
    apart = (colours[:, None] != colours).sum(2) + 4 * np.eye(200)
    assert colours.shape == (200, 4) and apart.min() == 2
    one_colour = len(data.COLOURS)
    assert all(len(set(names)) == 1 for names in colours[:one_colour])
    assert not toy.unseen_classes[:one_colour].any()


def test_toy_is_the_published_one(toy):
    """weights/toy.pt was trained on these captions. Who changes them trains it again."""
    assert toy.digest() == "e9553dfe961c0f68"


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
    parts = ["body", "wing", "crown", "belly", "bill", "billcolour"]
    forms = data.BEGINNINGS + data.ONE_COLOUR_BEGINNINGS + sum(data.PARTS, [])
    for bird in data.toy_species(rng, 60):
        for caption in data.toy_captions(rng, bird):
            other = data.toy_bird_for(rng, caption)
            assert sorted(other) == sorted(parts)
            for form in forms:                          # what is said of one is true of the other
                if form.format(**bird) in caption.replace("an orange", "a orange"):
                    assert form.format(**other) == form.format(**bird)
            if any(form.format(**bird) in caption for form in data.ONE_COLOUR_BEGINNINGS):
                assert len({other[part] for part in parts[:4]}) == 1

    # What is not named: 9 of 16 parts have the body's colour, as in toy_species.
    seen = []
    for _ in range(2000):
        bird = data.toy_bird_for(rng, "a red bird with a white crown and a long bill")
        assert (bird["body"], bird["crown"], bird["bill"]) == ("red", "white", "long")
        seen.append(bird["wing"] == "red")
    assert abs(np.mean(seen) - 9 / 16) < 0.04
    bodies = []                                         # Bayes: 9 of the 9 + 7 weights are white
    for _ in range(2000):
        bodies.append(data.toy_bird_for(rng, "this bird has a white crown")["body"] == "white")
    assert abs(np.mean(bodies) - 9 / 16) < 0.04
    images = data.toy_images_for(["an all red bird", "a blue bird that has a short bill"])
    assert images.shape == (2, 76, 76, 3) and images.dtype == np.uint8


def test_toy_drawing_grows_with_the_image_size(monkeypatch):
    """The README's 128x128: the same bird, in the middle of a larger image."""
    bird = data.toy_species(random.Random(0), 9)[8]
    small = data.toy_draw(random.Random(1), bird)
    monkeypatch.setattr(data, "IMAGE_SIZE", 152)
    large = data.toy_draw(random.Random(1), bird)
    assert large[0].shape == (152, 152, 3)
    for a, b in zip(small[1:], large[1:]):
        np.testing.assert_allclose(2 * a, b, atol=0.5)
    half = large[0].reshape(76, 2, 76, 2, 3).mean((1, 3))
    assert np.abs(half - small[0]).mean() < 4


def test_toy_style_is_not_in_the_captions(toy):
    words = set()
    for captions in toy.captions:
        words |= set(" ".join(captions).split())
    assert not words & {"left", "right", "sky", "background", "branch", "large", "facing"}
    facing = toy.keypoints[:, 0, 0] > toy.keypoints[:, 5, 0]
    assert 0.45 < facing.mean() < 0.55


# ---- CUB and Oxford-102 ----------------------------------------------------------------------

def below(folder, files, known):
    """{folder + the rest of the name: content} of the files whose names go on behind `known`."""
    found = {}
    for name, content in files.items():
        if known in name:
            found[folder + name.split(known)[1]] = content
    return found


def cub_archives(folder, images, captions):
    tar(folder / "CUB_200_2011.tgz", images)
    tar(folder / "cvpr2016_cub.tar.gz", captions)


def cub_folders(folder, images, captions):
    unpacked(folder, images)
    unpacked(folder, captions)


def cub_dotted(folder, images, captions):
    tar(folder / "CUB_200_2011.tgz", {"./" + name: content for name, content in images.items()})
    unpacked(folder, captions)


def cub_flat_captions(folder, images, captions):
    unpacked(folder, images)
    texts = below("", captions, "text_c10/")
    flat = {"captions/" + name.split("/")[1]: content for name, content in texts.items()}
    zipped(folder / "caption-data-cub-v1.0.0.zip", flat)


def cub_of_attngan(folder, images, captions):
    unpacked(folder, images)
    unpacked(folder, below("text/", captions, "text_c10/"))


def cub_of_dfgan(folder, images, captions):
    unpacked(folder, images)
    zipped(folder / "birds.zip", below("birds/text/", captions, "text_c10/"))


@pytest.mark.parametrize("write", [cub_archives, cub_folders, cub_dotted, cub_flat_captions,
                                   cub_of_attngan, cub_of_dfgan])
def test_every_layout_of_cub_gives_the_same(here, write):
    write(here, *cub_files())
    ds = data.load("cub", here)
    check_form(ds, 12, 4, 2)
    check_colours(ds)
    assert ds.class_names == ["001.Albatross", "002.Auk", "003.Ani", "004.Bunting"]
    assert ds.unseen_classes.tolist() == [True, False, False, True]
    assert ds.rows.tolist() == list(range(12))
    assert ds.labels[0] == 3                                    # images.txt's order
    assert ds.captions[0] == ["a bird of kind 3", "it has number 2"]
    assert np.allclose(ds.boxes[0], [10, 10, 20, 50])           # 152x76 became 76x76: x halves
    parts = [[part / 2, 2 * part] for part in (2, 3, 4, 5, 6)]
    assert np.allclose(ds.keypoints[0][:5], parts)
    assert np.isnan(ds.keypoints[0][5]).all()                   # part 14 is not visible


def test_cub_matches_by_class_and_name(here):
    """Every class has a 0.jpg and a name without a digit; none overwrites another."""
    images = {}
    texts = {}
    for c, label in enumerate(("002.Auk", "003.Ani")):
        for name in ("0", "wing"):
            images[f"images/{label}/{name}.jpg"] = jpeg(COLOUR_BYTES[c])
            texts[f"{label}/{name}.txt"] = f"{label[4:]} with {name} thing".encode()
    unpacked(here / "a", images)
    zipped(here / "a/text.zip", texts)
    ds = data.load("cub", here / "a")
    assert ds.captions == [["Auk with 0 thing"], ["Auk with wing thing"],
                           ["Ani with 0 thing"], ["Ani with wing thing"]]
    assert ds.labels.tolist() == [0, 0, 1, 1]
    check_colours(ds)

    # Captions without classes cannot tell which "0" is meant: listed, not mixed up.
    unpacked(here / "b", images)
    unpacked(here / "b", {"captions/0.txt": b"whose?", "captions/wing.txt": b"whose?"})
    with pytest.raises(data.UserError, match="several files have this name"):
        data.load("cub", here / "b")


def test_masks_are_no_photographs(here):
    """CUB's and Oxford-102's segmentations have the photographs' names."""
    for folder, photographs, masks in (
            ("cub", "images/{}/", "segmentations/{}/"),
            ("flowers", "102flowers/jpg/", "102flowers/segmim/")):
        for i in range(4):
            kind = f"class_{i + 1:05d}" if folder == "flowers" else f"00{i + 1}.Bird"
            name = f"image_{i:05d}"
            unpacked(here / folder, {
                f"{photographs.format(kind)}{name}.jpg": jpeg(COLOUR_BYTES[i]),
                f"{masks.format(kind)}{name}.png": jpeg((0, 0, 0), kind="PNG"),
                f"text_c10/{kind}/{name}.txt": b"a caption"})
        # An image without a caption does not change what the classes are either.
        if folder == "flowers":
            unpacked(here / folder, {"102flowers/sketches/a.jpg": jpeg()})
        ds = data.load(folder, here / folder)
        assert len(ds.images) == 4 and len(ds.class_names) == 4
        assert all(image.mean() > 20 for image in ds.images)


def test_the_square_around_a_bird():
    size = (152, 76)
    # Centre 40, 35, and 70 wide and high: it lies inside the image, and stays as it is.
    assert data.square_around((20.0, 10.0, 40.0, 50.0), size) == (5.0, 0.0, 75.0, 70.0)
    # It would stick out: moved.
    assert data.square_around((0.0, 0.0, 20.0, 50.0), size) == (0.0, 0.0, 70.0, 70.0)
    # Higher than the image: cut.
    assert data.square_around((10.0, 0.0, 100.0, 76.0), size) == (0.0, 0.0, 140.0, 76.0)


def test_cub_box_shows_the_square_around_the_bird(here):
    images, captions = cub_files()
    photo = Image.new("RGB", (152, 76), "white")
    photo.paste("red", (20, 10, 60, 60))
    out = io.BytesIO()
    photo.save(out, "PNG")
    for name in images:
        if name.endswith(".jpg"):
            images[name] = out.getvalue()
    cub_archives(here, images, captions)
    ds = data.load("cub-box", here)
    check_form(ds, 12, 4, 2)
    scale = 76 / 70                                         # the square of 70 became 76
    x, y, w, h = ds.boxes[0]
    assert np.allclose((x, y, w, h), np.array([15, 10, 40, 50]) * scale, atol=1e-4)
    red = np.argwhere(ds.images[0][..., 1] < 128)           # the box lies where the bird does
    assert np.allclose(red.min(0), (y, x), atol=1)
    assert np.allclose(red.max(0) + 1, (y + h, x + w), atol=1)
    assert np.allclose(ds.keypoints[0][0], [(2 - 5) * scale, 4 * scale], atol=1e-4)


def test_cub_box_needs_boxes(here):
    images, captions = cub_files()
    boxes = images.pop("CUB_200_2011/bounding_boxes.txt").splitlines()
    cub_folders(here, images, captions)
    with pytest.raises(data.UserError, match="bounding_boxes.txt"):
        data.load("cub-box", here)

    # One image lacks its box: that one is left out, and named.
    unpacked(here, {"CUB_200_2011/bounding_boxes.txt": b"\n".join(boxes[1:])})
    ds = data.load("cub-box", here)
    assert len(ds.images) == 11
    assert any("Albatross_0000" in line and "no bounding box" in line for line in ds.skipped)


def test_cub_is_not_taken_for_cub_box(here):
    (here / "from").mkdir()
    cub_archives(here / "from", *cub_files())
    whole = np.array(data.load("cub", here / "from").images)
    close = np.array(data.load("cub-box", here / "from").images)
    own_folder(here / "cub")
    data.load("./cub")                      # a folder of the same name leaves their caches alone
    shutil.rmtree(here / "from")
    assert np.array_equal(data.load("cub").images, whole)
    assert np.array_equal(data.load("cub-box").images, close)


def test_classes_of_the_split_that_did_not_come_are_named(here, capsys):
    images, captions = cub_files()
    for name in list(captions):
        if "003.Ani/" in name:
            del captions[name]
    cub_folders(here, images, captions)
    ds = data.load("cub", here)
    line = next(line for line in ds.skipped if "classes of the split" in line)
    assert line.startswith("1 ") and line.endswith(" 3")
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("captions_as", ["text_c10/class_{:05d}/", "captions/class_{:04d}/"])
def test_flowers(here, captions_as):
    images = {}
    texts = {}
    for i in range(1, 9):                           # class 20 is unseen, 21 to 23 are not
        images[f"jpg/image_{i:05d}.jpg"] = jpeg(COLOUR_BYTES[i % 4])
        name = captions_as.format(20 + i % 4) + f"image_{i:05d}.txt"
        texts[name] = b"this flower is nice\n{}\nv\n"
    tar(here / "102flowers.tgz", images)
    if captions_as.startswith("text"):
        tar(here / "cvpr2016_flowers.tar.gz", texts)
    else:
        zipped(here / "caption-data-flowers-v1.0.0.zip", texts)
    ds = data.load("flowers", here)
    check_form(ds, 8, 4, 1)
    check_colours(ds)
    assert ds.captions[0] == ["this flower is nice"]        # "{}" and "v" are no captions
    assert ds.unseen_classes.tolist() == [True, False, False, False]
    assert ds.boxes is None
    assert ds.rows.tolist() == list(range(8))


def test_an_unreadable_image_keeps_its_row(here):
    """A file of features has a row for it."""
    for i in range(1, 5):
        image = b"broken" if i == 2 else jpeg()
        unpacked(here, {f"jpg/image_{i:05d}.jpg": image,
                        f"text/class_{i}/image_{i:05d}.txt": b"a flower"})
    ds = data.load("flowers", here)
    assert ds.rows.tolist() == [0, 2, 3]
    assert any("image_00002.jpg" in line for line in ds.skipped)


@pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not here")
@pytest.mark.parametrize("name, images, classes, unseen", [
    ("cub", 11788, 200, 50),
    ("flowers", 8189, 102, 20)])
def test_real_data(here, name, images, classes, unseen):
    check_form(data.load(name, SHARED), images, classes, unseen)


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
                files[text.format(c=c, i=i)] = f"colour {c}\nimage {i}".encode()
    return files


def own_table(kind, image, folder=""):
    """The same captions as a table: {its name: bytes}."""
    rows = []                                                   # (name of the image, caption)
    for c in range(4):
        for i in range(2):
            name = image.format(c=c, i=i)
            rows += [(name, f"colour {c}"), (name, f"image {i}")]

    if kind == "csv":
        lines = ["file_name,text", *(f'{name},"{text}"' for name, text in rows)]
        return {folder + "metadata.csv": "\n".join(lines).encode()}
    if kind == "jsonl":
        lines = [json.dumps(dict(file_name=name, text=text)) for name, text in rows]
        return {folder + "metadata.jsonl": "\n".join(lines).encode()}
    names = list(dict.fromkeys(name for name, _ in rows))
    images = [dict(id=7 * n, file_name=name) for n, name in enumerate(names)]
    annotations = [dict(image_id=7 * names.index(name), caption=text) for name, text in rows]
    content = json.dumps(dict(images=images, annotations=annotations)).encode()
    return {folder + "captions_train2017.json": content}


OWN_LAYOUTS = {
    "beside": own_data("kind{c}/p{i}.png", "kind{c}/p{i}.txt"),
    "images and text": own_data("images/kind{c}/p{i}.png", "text/kind{c}/p{i}.txt"),
    "images and captions": own_data("images/kind{c}/p{i}.png", "captions/kind{c}/p{i}.txt"),
    "below each class": own_data("kind{c}/images/p{i}.png", "kind{c}/text/p{i}.txt"),
    "AttnGAN's": own_data("birds/CUB_200_2011/images/kind{c}/p{i}.png",
                          "birds/text/kind{c}/p{i}.txt"),
    "upper case": own_data("kind{c}/P{i}.PNG", "kind{c}/P{i}.TXT"),
    "either case": own_data("kind{c}/P{i}.PNG", "kind{c}/p{i}.txt"),
    "jfif": own_data("kind{c}/p{i}.jfif", "kind{c}/p{i}.txt"),
    "one folder around": own_data("all/kind{c}/p{i}.png", "all/kind{c}/p{i}.txt"),
    "hidden files": {
        **own_data("kind{c}/p{i}.png", "kind{c}/p{i}.txt"),
        "kind0/.ipynb_checkpoints/p0.png": jpeg(),
        ".ipynb_checkpoints/p0.png": jpeg(),
        ".ipynb_checkpoints/p0.txt": b"not data",
        "__MACOSX/kind0/._p0.png": b"fork"},
    "metadata.csv": {
        **own_data("kind{c}/p{i}.png"),
        **own_table("csv", "kind{c}/p{i}.png")},
    "metadata.jsonl": {
        **own_data("kind{c}/p{i}.png"),
        **own_table("jsonl", "kind{c}/p{i}.png")},
    "metadata in a folder": {
        **own_data("data/kind{c}/p{i}.png"),
        **own_table("jsonl", "./kind{c}\\p{i}.png", "data/")},
    "COCO": {
        **own_data("images/kind{c}/p{c}_{i}.png"),
        **own_table("coco", "p{c}_{i}.png", "annotations/")},
}


@pytest.mark.parametrize("packed", [unpacked, zipped, tar])
@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_every_layout_of_an_own_folder_gives_the_same(here, layout, packed):
    ending = {unpacked: "", zipped: ".zip", tar: ".tgz"}[packed]
    ds = data.load(str(packed(here / f"mine{ending}", OWN_LAYOUTS[layout])))
    check_form(ds, 8, 4, 1)
    check_colours(ds)
    assert ds.class_names == ["kind0", "kind1", "kind2", "kind3"]
    assert ds.skipped == []
    for n, captions in enumerate(ds.captions):
        assert captions == [f"colour {n // 2}", f"image {n % 2}"]


@pytest.mark.parametrize("images, texts", [("", ""), ("images/", "text/")])
def test_images_without_classes_are_a_class_each(here, images, texts):
    ds = data.load(str(unpacked(here / "mine", {
        f"{images}a.jpg": jpeg(), f"{texts}a.txt": b"one thing",
        f"{images}b.jpg": jpeg(), f"{texts}b.txt": b"other thing"})))
    assert len(ds.class_names) == 2
    assert ds.captions == [["one thing"], ["other thing"]]


@pytest.mark.parametrize("held_out", ["test", "val", "Validation", "dev"])
def test_train_and_test_at_the_top_are_the_split(here, held_out):
    for c in range(4):
        top = "train" if c in (1, 3) else held_out
        unpacked(here / "mine", {f"{top}/kind{c}/0.png": jpeg(), f"{top}/kind{c}/0.txt": b"text"})
    ds = data.load("mine")
    assert ds.class_names == ["kind0", "kind1", "kind2", "kind3"]
    assert ds.unseen_classes.tolist() == [True, False, True, False]


def test_a_split_whose_classes_are_not_disjoint_is_not_taken(here, capsys):
    texts = []
    for c in range(4):
        for top in ("train", "test"):
            texts.append(f"{top} {c}")
            unpacked(here / "mine", {f"{top}/kind{c}/0.png": jpeg(),
                                     f"{top}/kind{c}/0.txt": texts[-1].encode()})
    ds = data.load("mine")
    assert ds.class_names == ["kind0", "kind1", "kind2", "kind3"]
    assert ds.unseen_classes.sum() == 1
    assert sorted(ds.captions) == sorted([text] for text in texts)
    assert "not taken as the split" in capsys.readouterr().out


def test_a_split_with_images_beside_it_is_not_taken(here, capsys):
    for c in range(4):
        top = ("train", "test", "more", "train")[c]
        unpacked(here / "mine", {f"{top}/kind{c}/0.png": jpeg(), f"{top}/kind{c}/0.txt": b"text"})
    data.load("mine")
    out = capsys.readouterr().out
    assert "train/ and test/ are not taken as the split: 1 images" in out and "more/kind2" in out


def test_classes_of_a_split_that_differ_in_case_are_the_same(here, capsys):
    for top, kind in (("train", "Auk"), ("train", "ani"), ("test", "auk"), ("test", "Ani")):
        unpacked(here / "mine", {f"{top}/{kind}/0.png": jpeg(), f"{top}/{kind}/0.txt": b"text"})
    data.load("mine")
    assert "2 of its classes are in the training folder" in capsys.readouterr().out


def test_what_this_project_writes_is_not_its_data(here, monkeypatch):
    own_folder(here / "mine")
    monkeypatch.chdir(here / "mine")
    for _ in range(2):
        unpacked(Path("runs"), {"x/samples/1.png": jpeg(), "x/samples/1.txt": b"a bird"})
        ds = data.load(".")
        assert len(ds.images) == 12
    assert len(list(Path("cache").iterdir())) == 1              # built once


def test_links_are_followed_but_not_in_circles(here):
    own_folder(here / "elsewhere", classes=3)
    mine = own_folder(here / "mine", classes=1)
    (mine / "linked").symlink_to(here / "elsewhere/kind1")
    (mine / "kind0/extra.png").symlink_to(here / "elsewhere/kind2/p0.png")
    (mine / "kind0/extra.txt").symlink_to(here / "elsewhere/kind2/p0.txt")
    (mine / "kind0/lost.png").symlink_to(here / "nowhere.png")
    (mine / "kind0/up").symlink_to(mine)
    (mine / "self").symlink_to(mine / "self")
    ds = data.load(str(mine))
    assert len(ds.images) == 7
    assert ds.class_names == ["kind0", "linked"]
    assert ["colour 2", "picture 0"] in ds.captions
    assert any("lost.png" in line for line in ds.skipped)


def test_what_cannot_be_used_is_listed_with_the_reason(here, capsys):
    mine = unpacked(own_folder(here / "mine"), {
        "kind0/phone.heic": b"\0\0\0\x18ftypheic", "kind0/phone.txt": b"from a phone",
        "kind1/bad.jpg": b"broken", "kind1/bad.txt": b"a bird",
        "kind2/bare.png": jpeg(),
        "kind2/blank.png": jpeg(), "kind2/blank.txt": b"\n{}\n",
        "kind3/alone.txt": b"no image here"})
    (mine / "film.mp4").touch()
    os.truncate(mine / "film.mp4", data.MAX_FILE + 1)       # neither image nor caption: not read
    ds = data.load(str(mine))
    check_form(ds, 12, 4, 1)
    reasons = dict(line.split(": ", 1) for line in ds.skipped)
    assert set(reasons) == {"kind0/phone.heic", "kind1/bad.jpg", "kind2/bare.png",
                            "kind2/blank.png", "kind3/alone.txt"}
    assert "Pillow" in reasons["kind0/phone.heic"]
    assert reasons["kind2/bare.png"] == reasons["kind2/blank.png"] == data.NO_CAPTION

    out = capsys.readouterr().out
    listed = next(Path("cache").glob("own-mine-*")) / "skipped.txt"
    assert "2 of 14 images have no caption" in out
    assert str(listed) in out and "and 2 more" in out
    assert listed.read_text().splitlines() == ds.skipped
    data.load(str(mine))                                    # and not only the first time
    assert "2 of 14 images have no caption" in capsys.readouterr().out


def test_rows_of_a_table_without_image_are_counted(here):
    files = dict(OWN_LAYOUTS["metadata.csv"])
    files["metadata.csv"] += b"\ngone/1.png,a caption\ngone/2.png,a caption\n"
    ds = data.load(str(unpacked(here / "mine", files)))
    assert len(ds.images) == 8
    assert len(ds.skipped) == 1
    assert "2 of its rows" in ds.skipped[0] and "gone/1.png" in ds.skipped[0]


def test_a_table_may_name_files_in_other_case(here, capsys):
    table = b"file_name,text\nP0.JPG,a red bird\nSub/p1.jpg,a blue bird\n"
    unpacked(here / "a", {"p0.jpg": jpeg(), "sub/P1.jpg": jpeg(), "metadata.csv": table})
    assert sorted(data.load("a").captions) == [["a blue bird"], ["a red bird"]]
    # Where nothing fits, the table's own line says why.
    unpacked(here / "b", {f"q{i}.jpg": jpeg() for i in range(4)})
    unpacked(here / "b", {"metadata.csv": table})
    with pytest.raises(data.UserError, match="2 of its rows name no image.*P0.JPG"):
        data.load("b")


def test_captions_of_any_encoding():
    read = data.read_captions
    assert read("a bird\r\n\r\n  \n two  birds ".encode()) == ["a bird", "two birds"]
    assert read("\ufeffa bird".encode()) == ["a bird"]
    assert read("un été".encode("latin-1")) == ["un été"]
    assert read("a bird… with “red” wings".encode("cp1252")) == ["a bird… with “red” wings"]
    assert read("a bird".encode("utf-16")) == ["a bird"]
    assert read(b"") == []
    assert len(read(b"a bird\n" * 1000)) == data.MAX_CAPTIONS


# ---- Images ----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, kind", [
    ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"),
    ("I;16", "PNG"), ("CMYK", "JPEG"), ("RGB", "GIF"), ("RGB", "BMP"), ("RGB", "WEBP"),
    ("F", "TIFF")])
def test_all_kinds_of_images(mode, kind):
    image = Image.new("RGB", (50, 90), (120, 120, 120))
    if mode == "I;16":
        image = Image.new(mode, (50, 90), 30000)
    out = io.BytesIO()
    image.convert(mode).save(out, kind)
    pixels, window = data.read_image(out.getvalue())
    assert pixels.shape == (76, 76, 3) and pixels.dtype == np.uint8
    assert window == (0, 0, 50, 90)
    assert mode == "1" or 80 < pixels.mean() < 160


def test_floats_from_0_to_1_are_scaled():
    out = io.BytesIO()
    Image.new("F", (9, 9), 0.5).save(out, "TIFF")
    assert abs(data.read_image(out.getvalue())[0].mean() - 127.5) <= 1


def test_transparent_is_white():
    out = io.BytesIO()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(out, "PNG")
    assert data.read_image(out.getvalue())[0].min() == 255


def test_a_phones_photograph_is_turned_upright():
    tag = Image.Exif()
    tag[0x0112] = 6                                         # "turn me a quarter clockwise"
    lying = np.zeros((80, 200, 3), np.uint8)
    lying[:, :100] = (250, 0, 0)                            # red at the left; upright: above
    out = io.BytesIO()
    Image.fromarray(lying).save(out, "JPEG", exif=tag)
    upright = data.read_image(out.getvalue())[0]
    assert upright[:30, :, 0].min() > 200
    assert upright[46:, :, 0].max() < 50


def test_a_large_jpeg_shows_the_same_window():
    """It is decoded at a fraction of its size; a box must still hit the same place."""
    photo = np.full((800, 1600, 3), 255, np.uint8)
    photo[200:400, 1000:1200] = (200, 0, 0)
    out = io.BytesIO()
    Image.fromarray(photo).save(out, "JPEG", quality=95)
    pixels, window = data.read_image(out.getvalue(), box=(1000, 200, 200, 200))
    assert window == (960, 160, 1240, 440)
    red = np.argwhere(pixels[..., 1] < 128)
    assert np.allclose(red.min(0), 40 * 76 / 280, atol=1.5)
    assert np.allclose(red.max(0) + 1, 240 * 76 / 280, atol=1.5)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"    # a program


@pytest.mark.parametrize("content", [b"", b"GIF89a", jpeg()[:200], bytes(1000), POSTSCRIPT])
def test_no_image(content):
    with pytest.raises(ValueError, match="read"):
        data.read_image(content)


def png_chunk(name, content):
    length = struct.pack(">I", len(content))
    return length + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_a_huge_image_is_not_decoded():
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    with pytest.raises(ValueError, match="too many"):
        data.read_image(png)


# ---- Archives --------------------------------------------------------------------------------

ARCHIVES = ["w", "w:gz", "w:bz2", "w:xz", "zip"]


def archive(path, files, kind):
    return zipped(path, files) if kind == "zip" else tar(path, files, kind)


def small_archive():
    rng = random.Random(0)
    return {"d/a.jpg": rng.randbytes(700), "d/a.txt": b"a caption",
            "d/other.bin": rng.randbytes(1024), "d/b.txt": b"another one"}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_truncated_archive_is_never_taken_for_a_whole_one(here, kind):
    path = archive(here / "whole", small_archive(), kind)
    names = [name for name, _ in data.iterate_files(path, r"\.txt$")]
    assert names == ["d/a.txt", "d/b.txt"]

    content = path.read_bytes()
    last = len(content)
    if kind == "w":
        last = len(content.rstrip(b"\0")) + 512         # a .tar ends in blocks of zeros
    for cut in [*range(0, last - 64, 29), *range(last - 64, last, 3), last - 1]:
        (here / "cut").write_bytes(content[:cut])
        with pytest.raises(data.UserError, match="cut is damaged, broken off.*fetch it again"):
            list(data.iterate_files(here / "cut", r"\.txt$"))
            pytest.fail(f"cut after {cut} of {len(content)} bytes")


@pytest.mark.parametrize("kind", ["w:gz", "zip"])
def test_a_changed_byte_is_noticed_wherever_it_is(here, kind):
    """Also in a member that nobody asked for: the archive's checksums are compared."""
    path = archive(here / "whole", small_archive(), kind)
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    if kind == "zip":
        at = content.find(small_archive()["d/other.bin"][:16])
    content[at + 8] ^= 1
    path.write_bytes(content)
    with pytest.raises(data.UserError, match="damaged"):
        list(data.iterate_files(path, r"\.txt$"))


@pytest.mark.parametrize("name", [
    "../outside.txt", "/tmp/outside.txt", "a/../../outside.txt", "C:\\outside.txt"])
@pytest.mark.parametrize("kind", ["w:gz", "zip"])
def test_names_that_lead_outside_are_harmless(here, name, kind):
    """Nothing is unpacked to disk."""
    (here / "inside").mkdir()
    path = archive(here / "inside/it", {name: b"x", "good.txt": b"y"}, kind)
    assert ("good.txt", b"y") in list(data.iterate_files(path, r"\.txt$"))
    assert sorted(here.rglob("*")) == [here / "inside", path]


@pytest.mark.parametrize("kind", [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, "zip"])
def test_members_that_are_no_plain_files_are_named_not_followed(here, kind):
    if kind == "zip":
        info = zipfile.ZipInfo("x.jpg")
        info.external_attr = 0o120777 << 16                 # a link
        with zipfile.ZipFile(here / "links", "w") as made:
            made.writestr(info, "/etc/passwd")
    else:
        info = tarfile.TarInfo("x.jpg")
        info.type = kind
        info.linkname = "/etc/passwd"
        with tarfile.open(here / "links", "w") as made:
            made.addfile(info)
    assert list(data.iterate_files(here / "links", r"\.jpg$")) == [("x.jpg", None)]
    files = data.read_files(here / "links", r"\.jpg$")
    assert not files.images and "x.jpg" in files.skipped[0]


def test_archive_bombs_are_bounded(here, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 1000)
    monkeypatch.setattr(data, "MAX_TOTAL", 1500)
    paths = [
        tar(here / "a.tgz", {"x": bytes(2000)}),
        zipped(here / "b.zip", {"x": bytes(900), "y": bytes(900)}),
        tar(here / "c.tgz", {"n" * 3000 + ".txt": b"x"})]   # the name is a member, of 3,000 bytes
    for path in paths:
        with pytest.raises(data.UserError, match="too large"):
            list(data.iterate_files(path, "x"))
    content = gzip.decompress(tar(here / "d.tgz", {"x": b"y"}).read_bytes())
    (here / "d.tgz").write_bytes(gzip.compress(content + bytes(1 << 20)))
    with pytest.raises(data.UserError, match="goes on"):
        list(data.iterate_files(here / "d.tgz", "x"))


# ---- Downloads, caches -----------------------------------------------------------------------

class Server:
    """A local web server: serves `content`, honours ranges, breaks off after `limit` bytes."""

    def __init__(self, content, limit=10 ** 9, ranges=True):
        asked = []                                          # the ranges that came

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.headers.get("Range"))
                begin = 0
                if self.path != "/file":
                    return self.send_error(404)
                if asked[-1] and ranges:
                    begin = int(asked[-1].removeprefix("bytes=")[:-1])
                    if begin >= len(content):
                        return self.send_error(416)
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                self.wfile.write(content[begin:begin + limit])

            def log_message(self, *args):
                pass

        self.asked = asked
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/file"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


CONTENT = random.Random(0).randbytes(100_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_a_file_is_fetched(here):
    with Server(CONTENT) as server:
        data.download(server.url, here / "file", MD5)
        assert (here / "file").read_bytes() == CONTENT
        assert not (here / "file.part").exists()
        with pytest.raises(data.UserError, match="404"):
            data.download(server.url + "x", here / "y")

        (here / "file").rename("file.part")                 # whole, but not yet renamed
        data.download(server.url, here / "file", MD5)
        assert (here / "file").read_bytes() == CONTENT
    with pytest.raises(data.UserError, match="cannot be fetched"):
        data.download("http://127.0.0.1:9/file", here / "z")


def test_a_download_goes_on_where_it_broke_off(here):
    with Server(CONTENT, limit=40_000) as server:
        for _ in range(2):
            with pytest.raises(data.UserError, match="run this again"):
                data.download(server.url, here / "file", MD5)
            assert not (here / "file").exists()
        data.download(server.url, here / "file", MD5)
        assert (here / "file").read_bytes() == CONTENT
        assert server.asked == [None, "bytes=40000-", "bytes=80000-"]


def test_a_server_that_cannot_go_on_starts_over(here):
    with Server(CONTENT, ranges=False) as server:
        (here / "file.part").write_bytes(b"old and wrong")
        data.download(server.url, here / "file", MD5)
        assert (here / "file").read_bytes() == CONTENT


def test_a_wrong_file_is_not_kept(here):
    with Server(b"wrong") as server:
        with pytest.raises(data.UserError, match=MD5) as error:
            data.download(server.url, here / "file", MD5)
    assert hashlib.md5(b"wrong").hexdigest() in str(error.value)
    assert not (here / "file").exists()


def test_cub_is_fetched_once_where_nothing_is_there(here, monkeypatch):
    images, captions = cub_files()
    with (Server(tar(here / "i", images).read_bytes()) as first,
          Server(zipped(here / "c", captions).read_bytes()) as second):
        row = dataclasses.replace(data.DATASETS["cub"], url=first.url, md5="",
                                  captions_url=second.url, captions=("file",))
        monkeypatch.setitem(data.DATASETS, "cub", row)
        for _ in range(2):
            check_form(data.load("cub"), 12, 4, 2)
        assert len(first.asked) == len(second.asked) == 1


def test_captions_that_cannot_be_fetched_are_named(here, monkeypatch):
    unpacked(here / "cache/downloads", {"CUB_200_2011.tgz": b"there"})
    with Server(b"") as server:
        row = dataclasses.replace(data.DATASETS["cub"], captions_url=server.url + "-none")
        monkeypatch.setitem(data.DATASETS, "cub", row)
        with pytest.raises(data.UserError, match="cvpr2016_cub.tar.gz.*cache/downloads"):
            data.load("cub")


def test_a_new_row_without_addresses(here, monkeypatch):
    row = data.Entry(data.build_cub, images=("i.tar",), captions=("c.tar",))
    monkeypatch.setitem(data.DATASETS, "dogs", row)
    with pytest.raises(data.UserError, match="dogs is not fetched.*--from DIR"):
        data.load("dogs")
    images, captions = cub_files()
    downloads = here / "cache/downloads"
    downloads.mkdir(parents=True)
    tar(downloads / "i.tar", images)
    with pytest.raises(data.UserError, match="no address for those of dogs.*Get c.tar"):
        data.load("dogs")
    tar(downloads / "c.tar", captions)
    assert len(data.load("dogs").images) == 12

    # A row of one kind: all is in one file.
    monkeypatch.setitem(data.DATASETS, "cats", dataclasses.replace(row, captions=()))
    data.fetch_files("cats")
    assert data.find_files("cats", downloads) == [(downloads / "i.tar").resolve()]


@pytest.mark.parametrize("field, value, message", [
    ("pixels", np.zeros((76, 76, 3)), "pixels of float64"),
    ("pixels", np.zeros((64, 64, 3), np.uint8), "64, 64, 3"),
    ("pixels", (np.zeros((76, 76, 3), np.uint8), None), "the first of"),
    ("label", 3, "its class's name: 3"),
    ("captions", "a bird", "a bird"),
    ("captions", [], r"\[\]")])
def test_mistakes_of_a_new_builder_are_named(here, field, value, message):
    good = data.Example(np.zeros((76, 76, 3), np.uint8), ["a bird"], "kind", 0)
    with pytest.raises(AssertionError, match=message):
        data.write_cache(here / "cache/x", "x", [], [good._replace(**{field: value})], [], [])


def test_a_split_that_names_no_class_is_a_mistake_of_the_builder(here):
    good = data.Example(np.zeros((76, 76, 3), np.uint8), ["a bird"], "kind", 0)
    with pytest.raises(AssertionError, match="no class is called \\['kid'\\]"):
        data.write_cache(here / "cache/x", "x", [], [good], {"kid"}, [])
    data.write_cache(here / "cache/x", "x", [], [good], {"kind", "kid"}, [])
    assert (here / "cache/x/skipped.txt").read_text() == "unseen classes without an image: kid\n"


@pytest.mark.parametrize("label, key", [
    ("013.Bobolink", 13), ("class_00013", 13), ("13", 13), ("Bobolink", "bobolink"),
    ("Boeing-747.x", "boeing-747.x"), ("3d birds", "3d birds")])
def test_a_class_is_known_by_the_number_before_its_name(label, key):
    assert data.class_key(label) == key


def test_a_cache_depends_on_all_code_that_builds_it(here, monkeypatch):
    own_folder(here / "mine")
    code = data.building_code()
    for part in ("COLOURS = {", "CUB_UNSEEN = {", "def build_folder", "def read_image"):
        assert part in code
    assert "class Batches" not in code and "def save_checkpoint" not in code

    names = []
    for changed in (code, code + " ", code):
        monkeypatch.setattr(data, "building_code", lambda: changed)
        data.load("mine")
        names.append(next(Path("cache").glob("own-mine-*")).name)
    assert names[0] == names[2] != names[1]


def test_a_changed_source_is_seen(here):
    mine = own_folder(here / "mine")

    def first_caption_and_stamp():
        caption = data.load("mine").captions[0][0]
        cache, = Path("cache").iterdir()                    # an older one is gone
        return caption, (cache / "images.npy").stat().st_mtime_ns

    caption, stamp = first_caption_and_stamp()
    assert caption == "colour 0"
    assert first_caption_and_stamp() == (caption, stamp)    # not built again
    (mine / "kind0/p0.txt").write_text("another colour")
    assert first_caption_and_stamp()[0] == "another colour"
    cache, = Path("cache").iterdir()
    (cache / "meta.json").unlink()                          # as when someone removed a part
    assert first_caption_and_stamp()[0] == "another colour"


@pytest.mark.parametrize("size", [0, 1000])
def test_a_damaged_cache_is_named(here, size):
    small_data(here)
    images = next(Path("cache").glob("own-mine-*/images.npy"))
    os.truncate(images, size)
    with pytest.raises(data.UserError, match=f"{images.parent.name} is damaged.*remove"):
        data.load("mine")


def test_a_cache_of_an_older_version_is_built_again(here):
    cub_folders(here / "from", *cub_files())
    data.load("cub", here / "from")
    cache = next(Path("cache").glob("cub-*"))
    old = cache.rename(cache.with_name("cub-0123456789abcdef"))
    meta = json.loads((old / "meta.json").read_text())
    del meta["format"]
    (old / "meta.json").write_text(json.dumps(meta))
    (old / "unseen_classes.npy").rename(old / "unseen.npy")
    check_form(data.load("cub"), 12, 4, 2)                  # it remembers where the files are
    assert list(Path("cache").iterdir()) == [cache]


def test_two_folders_of_one_name_do_not_share(here):
    a = own_folder(here / "x/mine")
    b = own_folder(here / "y/mine", classes=5)
    assert data.short_name(str(a)) != data.short_name(str(b))
    assert data.short_name(str(a)) == data.short_name("x/mine")
    data.load(str(a))
    data.load(str(b))
    assert len(list(Path("cache").iterdir())) == 2
    odd = data.short_name(str(here / ("ö $x\n" * 60)))
    assert len(odd) < 60 and odd.isprintable() and "/" not in odd
    assert data.short_name("cub-box") == "cub-box"


def test_the_digest_is_that_of_the_content(here):
    ds = small_data(here)
    shutil.copytree("mine", "elsewhere")
    assert data.load("elsewhere").digest() == ds.digest()
    assert len(ds.digest()) == 16
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
        assert len(list(Path("cache").iterdir())) == 1


# ---- Views, batches --------------------------------------------------------------------------

def test_crops_are_the_windows():
    images = torch.randint(0, 256, (2, 76, 76, 3), dtype=torch.uint8)

    def window(image, top, left):
        return images[image, top:top + 64, left:left + 64].permute(2, 0, 1).float() / 127.5 - 1

    x = data.crops(images, torch.tensor([1, 0]), torch.tensor([3, 12]), torch.tensor([5, 0]),
                   torch.tensor([False, True]))
    assert torch.equal(x[0], window(1, 3, 5))
    assert torch.equal(x[1], window(0, 12, 0).flip(2))
    assert torch.equal(data.centre_crops(images, torch.tensor([1]))[0], window(1, 6, 6))


def test_random_crops_reach_every_window_and_both_directions():
    place = torch.arange(76, dtype=torch.uint8)
    rows = place[:, None].expand(76, 76)
    image = torch.stack([rows, rows.T, torch.zeros_like(rows)], 2)      # tells where a pixel was
    x = data.random_crops(image[None], torch.zeros(2000, dtype=torch.long))
    x = ((x + 1) * 127.5).round()
    assert set(x[:, 0].amin((1, 2)).tolist()) == set(range(13))
    assert set(x[:, 1].amin((1, 2)).tolist()) == set(range(13))
    mirrored = x[:, 1, 0, 0] > x[:, 1, 0, 63]
    assert 0.4 < mirrored.float().mean() < 0.6


def test_pixels_are_the_crops_again():
    images = torch.randint(0, 256, (3, 76, 76, 3), dtype=torch.uint8)
    pixels = data.to_pixels(data.centre_crops(images, torch.arange(3)))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, images[:, 6:70, 6:70])
    for value, level in ((7.0, 255), (-7.0, 0)):
        assert (data.to_pixels(torch.full((1, 3, 2, 2), value)) == level).all()


def test_random_captions_are_the_images_own():
    ds = data.Dataset("x", None, [["a", "b"], ["c"], ["d"] * 4], None, None, None, None)
    starts = data.caption_starts(ds)
    assert starts.tolist() == [0, 2, 3, 7]
    rows = data.random_captions(starts, torch.tensor([2, 0, 1]), count=400)
    assert rows.shape == (400, 3)
    assert [set(column.tolist()) for column in rows.T] == [{3, 4, 5, 6}, {0, 1}, {2}]


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


def test_wrong_texts_are_never_of_the_own_class(here):
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
        assert x.shape == (64, 3, 64, 64) and x.abs().max() <= 1
        assert torch.equal(h[:, 0], classes[positions].float())
        assert (h != h_wrong).all()
        seen |= set(zip(h[:, 0].tolist(), h_wrong[:, 0].tolist()))
    assert len(seen) == 4 * 3                               # every other training class


def test_images_and_texts_of_a_batch_belong_together(here):
    ds = small_data(here, classes=4)
    batches = batches_that_say(ds, class_of_each_caption(ds))
    x, h, _ = batches.batch(torch.arange(len(batches)))
    for image, text in zip(x, h):
        colour = torch.tensor(COLOUR_BYTES[int(text)]) / 127.5 - 1
        assert torch.allclose(image.mean((1, 2)), colour, atol=0.05)


@pytest.mark.parametrize("captions, sixtieths", [
    ((1, 1), {0, 60}),
    ((4, 4), {0, 15, 30, 45, 60}),
    ((1, 3), {0, 20, 30, 40, 60})])                         # of one, two or three captions
def test_text_of_an_image_is_a_mean_of_its_own_captions(here, captions, sixtieths):
    ds = small_data(here, classes=4, each=3)
    # Of each image's two captions the first says 0, the second 1.
    batches = batches_that_say(ds, np.arange(24) % 2, captions)
    images = torch.tensor([2] * 600)
    h = batches.texts(images)
    assert h.shape == (600, 1) and h.dtype == torch.float32
    assert set((h[:, 0] * 60).round().int().tolist()) == sixtieths


@pytest.mark.parametrize("low, high", [(1, 1), (5, 5), (1, 8)])
def test_a_text_is_right_on_average(here, low, high):
    ds = small_data(here, classes=4, each=3)
    batches = batches_that_say(ds, np.arange(24), (low, high))
    mean = batches.texts(torch.tensor([2] * 4000)).mean()
    assert abs(mean - 4.5) < 0.05                           # its captions are rows 4 and 5


def test_one_training_class_is_not_enough(here):
    ds = small_data(here, classes=2)
    ds.unseen_classes = np.array([True, False])
    with pytest.raises(data.UserError, match="two"):
        batches_that_say(ds, class_of_each_caption(ds))


def test_example_images_are_of_unseen_classes(toy, here):
    chosen = data.example_images(toy, 8)
    labels = toy.labels[chosen]
    assert len(set(labels)) == 8 and toy.unseen_classes[labels].all()
    assert all(type(i) is int for i in chosen)
    assert chosen == data.example_images(toy, 8)
    few = small_data(here, classes=3)                       # no unseen class at all
    assert len(set(few.labels[data.example_images(few)])) == 3


# ---- Grids, plots ----------------------------------------------------------------------------

def test_image_grid_puts_every_image_in_its_place():
    rows = []
    for i in range(2):
        rows.append([np.full((10, 20, 3), 40 * i + 10 * j, np.uint8) for j in range(3)])
    assert np.asarray(data.image_grid(rows, scale=2)).shape == (2 * 22, 3 * 42, 3)

    texts = ["a text", "x\x1b[31m\ud800 \n" * 99]
    page = np.asarray(data.image_grid(rows, texts, ["one", "two", "three"], width=100))
    assert page.shape == (22 + 2 * 12, 100 + 3 * 22, 3)
    for i, j in np.ndindex(2, 3):
        top = 22 + 12 * i
        left = 100 + 22 * j
        assert (page[top:top + 10, left:left + 20] == 40 * i + 10 * j).all()
    assert (page[:22] < 100).any()                          # the titles are written
    assert (page[22:32, :100] < 100).any()                  # and the text


def test_plot_draws_the_lines(here):
    panel = {
        "rising": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        "level": (torch.arange(5), torch.full((5,), 2.0)),
        "one point": ([1], [1]),
        "none": ([], [])}
    data.plot([panel, {"zero": ([0, 0], [0, 0])}], here / "out/plot.png", size=300)
    pixels = np.asarray(Image.open("out/plot.png"))
    assert pixels.shape == (300, 600, 3)
    black = np.argwhere((pixels[120:, 50:280] < 50).all(2))                 # the first line
    assert np.corrcoef(black.T)[0, 1] < -0.95                               # rises
    red = np.argwhere((pixels[90:260, 50:280] == (255, 0, 0)).all(2))       # the second
    assert np.ptp(red[:, 0]) <= 2 and np.ptp(red[:, 1]) > 200               # is level


def test_save_image_knows_its_endings(here):
    image = Image.new("RGB", (4, 4), "red")
    for name in ("a.png", "b.JPG", "c.webp"):
        data.save_image(image, here / name)
        assert Image.open(name).size == (4, 4)
    for name in ("x.exe", "x", "x.mp4"):
        with pytest.raises(data.UserError, match="image file"):
            data.save_image(image, here / name)
        assert not (here / name).exists()


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


def test_a_checkpoint_comes_back(here):
    content = dict(kind="encoder", settings=dict(steps=3, name="é"), history=[1.5, None],
                   phi=dict(w=torch.randn(3, 4), n=torch.tensor(7)))
    data.save_checkpoint(here / "a/x.pt", **content)
    again = data.load_checkpoint(here / "a/x.pt", "encoder")
    assert again.pop("format") == data.FORMAT == 1
    assert same(again, content)


def write_bad_checkpoints(folder):
    data.save_checkpoint(folder / "good.pt", kind="gan-cls", w=torch.zeros(1000))
    good = (folder / "good.pt").read_bytes()
    unpacked(folder, {"text.pt": b"hello", "cut.pt": good[:len(good) // 2], "nothing.pt": b""})
    zipped(folder / "zip.pt", {"a": b"b"})
    torch.save(dict(kind="gan-cls", format=99), folder / "old.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(dict(kind="gan-cls", format=1, run=os.system), folder / "code.pt")
    (folder / "folder.pt").mkdir()


@pytest.mark.parametrize("name, kind, message", [
    ("missing.pt", "gan-cls", "no file"),
    ("text.pt", "gan-cls", "not a checkpoint"),
    ("cut.pt", "gan-cls", "not a checkpoint"),
    ("nothing.pt", "gan-cls", "not a checkpoint"),
    ("zip.pt", "gan-cls", "not a checkpoint"),
    ("folder.pt", "gan-cls", "not a checkpoint"),
    ("code.pt", "gan-cls", "not a checkpoint"),
    ("list.pt", "gan-cls", "does not hold"),
    ("good.pt", "encoder", "does not hold"),
    ("old.pt", "gan-cls", "format 99")])
def test_no_checkpoint(here, name, kind, message):
    write_bad_checkpoints(here)
    with pytest.raises(data.UserError, match=message) as error:
        data.load_checkpoint(here / name, kind)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_load_network_makes_no_memory_for_what_does_not_fit():
    half = {key: value.half() for key, value in nn.Linear(3, 2).state_dict().items()}
    net = data.load_network(lambda: nn.Linear(3, 2), half)
    assert net.weight.dtype == torch.float32
    assert torch.equal(net.weight, half["weight"].float())
    with pytest.raises(data.UserError, match="run.pt does not fit"):
        with data.checkpoint_errors("run.pt"):
            data.load_network(lambda: nn.Linear(10 ** 9, 10 ** 6), half)    # would have 4,000 TB
    with pytest.raises(data.UserError, match="as it was"):
        with data.checkpoint_errors("run.pt"):
            raise data.UserError("as it was")


# ---- Devices, precision ----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mps", "toaster", "meta", "cuda:99", "xpu", ""])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    with pytest.raises(data.UserError, match="expected one of: cpu") as error:
        data.pick_device(name)
    assert "\n" not in str(error.value)


def test_devices(monkeypatch):
    assert data.pick_device("cpu") == torch.device("cpu")
    assert data.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")

    # A driver that names a card which cannot be used.
    def broken(*args, **options):
        raise RuntimeError("CUDA driver is too old\nlong explanation")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(data.UserError, match="cuda cannot be used: CUDA driver is too old$"):
        data.pick_device()


@pytest.mark.parametrize("fp32, bf16, expected", [
    (10e-3, 5e-3, "bf16"),
    (5e-3, 10e-3, "fp32"),
    (10e-3, 9.5e-3, "fp32")])
def test_auto_precision_takes_what_was_measured(monkeypatch, fp32, bf16, expected):
    seconds = dict(fp32=fp32, bf16=bf16)
    monkeypatch.setattr(data, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(data, "time_convolution", lambda precision: seconds[precision])
    lines = []
    assert data.pick_precision("cpu", log=lines.append) == expected
    assert len(lines) == 1 and expected in lines[0]
    assert f"{1000 * fp32:.1f} ms" in lines[0] and f"{1000 * bf16:.1f} ms" in lines[0]


def test_precision_without_a_measurement(monkeypatch):
    monkeypatch.setattr(data, "time_convolution", None)
    for name in ("fp32", "bf16", "fp16"):
        assert data.pick_precision("cpu", name) == name                     # as asked
    monkeypatch.setattr(data, "cpu_has_bf16", lambda: False)
    assert data.pick_precision("cpu") == "fp32"
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert data.pick_precision(torch.device("cuda")) == expected


def test_the_measurement_is_short_and_draws_no_random_numbers():
    before = torch.get_rng_state()
    with torch.no_grad():
        for precision in ("fp32", "bf16", "fp32"):
            assert 0 < data.time_convolution(precision) < 2
    assert torch.equal(torch.get_rng_state(), before)


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
    assert "12 images, 24 captions, 4 classes" in out and "12 in all" in out
    sheet = Image.open(f"cache/{data.short_name('mine')}.png")
    assert sheet.height == 4 * 78


def encrypted_zip(path):
    content = bytearray(zipped(path, {"a.txt": b"secret"}).read_bytes())
    content[6] |= 1                                         # "encrypted", in the member's header
    content[content.find(b"PK\1\2") + 8] |= 1               # and in the directory
    return bytes(content)


# What is in the folder x, and what is said of it.
BAD_FOLDERS = [
    ({"a.jpg": jpeg(), "b.txt": b"alone"}, "no caption"),
    ({"a.jpg": jpeg(), "a.txt": b"\n \n"}, "no caption"),
    ({"a.jpg": b"not an image", "a.txt": b"a bird"}, "a.jpg"),
    ({".hidden": b""}, "found no image"),
    ({"a.jpg": jpeg(), "metadata.csv": b"file_name,caption\na.jpg,a bird\n"}, "file_name and text"),
    ({"a.jpg": jpeg(), "metadata.csv": b"file_name,te\0xt\na.jpg,a bird\n"}, "metadata.csv"),
    ({"a.jpg": jpeg(), "metadata.jsonl": b'{"file_name": "a.jpg"'}, "metadata.jsonl cannot"),
    ({"a.jpg": jpeg(), "metadata.jsonl": b"[" * 100_000}, "metadata.jsonl cannot be read"),
    ({"a.jpg": jpeg(), "metadata.jsonl": b"1\n2\n"}, "metadata.jsonl cannot be read"),
    ({"a.jpg": jpeg(), "captions_val.json": b"[1, 2]"}, "captions_val.json cannot be read"),
]


@pytest.mark.parametrize("files, message", BAD_FOLDERS)
def test_bad_folders(here, capsys, files, message):
    unpacked(here / "x", files)
    check_refused(capsys, data, ["--dataset", "x"], message)
    assert not list(Path().glob("cache/*/images.npy"))


# What stands in CUB's tables of one image, and what is said of it.
BAD_TABLES = [
    ("cub", "1 a b c", "", "table"),
    ("cub-box", "1 1.A/a.jpg", "1 a b c d", "table"),
    ("cub-box", "1 1.A/a.jpg", "1 nan 0 inf 0", "not finite"),
    ("cub-box", "1 1.A/a.jpg", "1 5 5 0 0", "no bounding boxes"),
]


@pytest.mark.parametrize("name, images, boxes, message", BAD_TABLES)
def test_bad_tables_of_cub(here, capsys, name, images, boxes, message):
    unpacked(here / "from", {
        "CUB_200_2011/images/1.A/a.jpg": jpeg(), "text/1.A/a.txt": b"a bird",
        "CUB_200_2011/images.txt": images.encode(),
        "CUB_200_2011/bounding_boxes.txt": boxes.encode()})
    check_refused(capsys, data, ["--dataset", name, "--from", "from"], message)


def test_bad_sources(here, capsys):
    unpacked(here, {
        "bare/x": b"", "a.txt": b"a caption", "secret.zip": encrypted_zip(here / "z"),
        "broken/CUB_200_2011.tgz": b"x" * 999, "broken/cvpr2016_cub.tar.gz": b"neither",
        "empty/CUB_200_2011.tgz": b"", "empty/cvpr2016_cub.tar.gz": b""})
    for args, message in [
            (["--dataset", "nowhere"], "unknown data set"),
            (["--dataset", "a.txt"], "not an archive"),
            (["--dataset", "secret.zip"], "damaged"),
            (["--dataset", "cub", "--from", "missing"], "in missing: expected one of"),
            (["--dataset", "cub", "--from", "bare"], "no images of cub"),
            (["--dataset", "cub", "--from", "broken"], "not an archive"),
            (["--dataset", "cub", "--from", "empty"], "not an archive")]:
        check_refused(capsys, data, args, message)


# ---- encoder.py ------------------------------------------------------------------------------

def test_encoder_on_its_own(here, monkeypatch, capsys):
    needs_exercises(3)
    own_folder(here / "mine", classes=5, each=4)
    own_folder(here / "three", classes=3)                       # no unseen class
    shipped_weights(here / "given", data.load("mine"))
    monkeypatch.setattr(encoder, "WEIGHTS", here / "given")
    (here / "text.pt").write_bytes(b"hello")
    torch.save(dict(kind="encoder", format=data.FORMAT), here / "noset.pt")
    settings = dict(dataset="mine", digest=data.load("mine").digest(), image_side="conv")
    data.save_checkpoint("wide.pt", kind="encoder", settings=dict(settings, cnn_dim=10 ** 12),
                         phi={}, v={})
    mine = "--device cpu --precision fp32 --dataset mine "

    def printed(args):
        encoder.main((mine + args).split())                     # as in a notebook
        return capsys.readouterr().out
    trained = printed("--steps 2")
    measured = printed("--evaluate")
    assert "eq. 3" in measured and "eq. 4" in measured and trained.endswith(measured)
    trained = printed("--steps 2 --image-features f.npy --out f.pt")
    assert trained.endswith(printed("--evaluate --image-features f.npy --out f.pt"))
    assert "eq. 3" in printed("--evaluate --weights cub --image-features f.npy")
    assert "no unseen classes to measure" in printed("--steps 2 --dataset three --out e.pt")
    for args, message in (
            ("--steps 2", "add --evaluate"),                    # --evaluate was forgotten
            ("--evaluate --out f.pt", "--image-features"),      # whose features?
            ("--evaluate --image-features f.npy", "image side conv, not features"),
            ("--image-features f.npy --image-encoder conv", "two image sides"),
            ("--evaluate --dataset three --out e.pt", "no unseen classes"),
            ("--weights cub", "--image-features"),
            ("--weights bare --image-features f.npy", "phi without the image side"),
            ("--weights missing", "no file"),
            ("--evaluate --out text.pt", "not a checkpoint"),
            ("--evaluate --out missing.pt", "no file missing.pt"),
            ("--evaluate --out noset.pt", "does not fit"),
            ("--evaluate --out wide.pt", "does not fit"),
            ("--steps 0", "expected a number"),
            ("--precision int4", "invalid choice")):
        check_refused(capsys, encoder, (mine + args).split(), message)


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
