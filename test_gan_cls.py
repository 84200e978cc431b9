"""The tests, and the graders of the README's exercises. No network, no GPU, nothing outside the repository.

    pytest                      # all
    pytest -k test_alg1         # exercise 1; also test_eq5, test_eq2, test_replication, test_eq6

Every equation is held against a slow transcription in float64 that uses nothing of the code under test.
"""

import ast
import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import encoder
import gan_cls
import sample
import train

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared" / "data"
torch.set_num_threads(2)

# ==============================================================================================
# The graders: each takes a piece of code to grade and explains what is wrong with it
# ==============================================================================================

LOGITS = [torch.tensor(x, dtype=torch.float64) for x in (
    [2.0, -1.0, 0.5, 3.0], [-0.7, 1.2, 0.1, -2.0], [0.3, -1.5, 2.2, -0.4])]     # real, wrong, fake


def sigma(x):
    return 1 / (1 + math.exp(-x))


def expect(got, wanted, what, tolerance=1e-4):
    assert got is not None, f"{what}: nothing is returned. Is the body still blank?"
    assert isinstance(got, torch.Tensor) and got.shape == (), f"{what}: expected a scalar tensor, the mean over the batch"
    assert abs(float(got) - wanted) <= tolerance * max(1, abs(wanted)), \
        f"{what}: expected {wanted:.5f}, got {float(got):.5f}"


def expect_slope(f, inputs, what, given=0):
    """Autograd must find the slope that the values have, along one direction; the first `given` inputs need no gradient. None may change."""
    g = torch.Generator().manual_seed(0)
    step = [torch.randn(x.shape, generator=g).to(x) * (0.01 if i >= given else 0) for i, x in enumerate(inputs)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    copies = [x * 1 for x in leaves]
    got = f(*copies)
    assert all(map(torch.equal, copies, inputs)), f"{what}: an input is changed in place, and the caller still needs it"
    try:
        grads = torch.autograd.grad(got, leaves, allow_unused=True)
    except RuntimeError as error:
        pytest.fail(f"{what}: the value is right, but nothing can be learned from it: backward() fails ({error})")
    slope = sum(float((d * s).sum()) for d, s in zip(grads, step) if d is not None)
    up, down = (float(f(*[x + sign * s for x, s in zip(inputs, step)])) for sign in (1, -1))
    assert abs(slope - (up - down) / 2) <= 0.02 * abs(up - down) / 2, f"{what}: the value is right, its gradient is not: what is detached?"


def grade_alg1(discriminator_loss, generator_loss):
    real, wrong, fake = ([sigma(float(v)) for v in x] for x in LOGITS)
    n = len(real)
    L_D = sum(math.log(r) + (math.log(1 - w) + math.log(1 - f)) / 2 for r, w, f in zip(real, wrong, fake)) / n
    got = discriminator_loss(*[x.clone() for x in LOGITS])
    assert got is not None, "Algorithm 1, line 10: nothing is returned. Is the body still blank?"
    hints = {-L_D: None, L_D: "the sign: an optimiser minimises, so return minus L_D",
             -sum(math.log(r) + math.log(1 - w) + math.log(1 - f) for r, w, f in zip(real, wrong, fake)) / n:
                 "the 1/2: the wrong text and the fake picture share the weight of one \"no\"",
             -sum(math.log(r) + (math.log(w) + math.log(1 - f)) / 2 for r, w, f in zip(real, wrong, fake)) / n:
                 "the wrong pair: a real picture with a wrong text must be refused, log(1 - s_w)"}
    for value, hint in hints.items():
        if hint and abs(float(torch.as_tensor(got).double().mean()) - value) < 1e-5:
            pytest.fail(f"Algorithm 1, line 10: check {hint}")
    expect(got, -L_D, "Algorithm 1, line 10, L_D = log(s_r) + (log(1 - s_w) + log(1 - s_f)) / 2, mean over the batch, from logits (one sigmoid)")
    expect_slope(discriminator_loss, LOGITS, "Algorithm 1, line 10")
    try:
        got = discriminator_loss(LOGITS[0], None, LOGITS[2])
    except (AttributeError, TypeError) as error:
        pytest.fail(f"eq. 1: s_wrong=None is the plain GAN, which has no wrong pair: ask for it first ({error})")
    expect(got,
           -sum(math.log(r) + math.log(1 - f) for r, f in zip(real, fake)) / n, "eq. 1, log D(x) + log(1 - D(G(z))), when s_wrong is None")
    L_G = sum(math.log(f) for f in fake) / n
    expect(generator_loss(LOGITS[2].clone()), -L_G, "Algorithm 1, line 12, L_G = log(s_f), mean over the batch, minimised as its negative")
    expect_slope(generator_loss, LOGITS[2:], "Algorithm 1, line 12")
    for dtype in (torch.float16, torch.bfloat16):
        for a in (-1000.0, 1000.0):
            x = torch.full((4,), a, dtype=dtype)
            for loss in (discriminator_loss(x, x, x), generator_loss(x)):
                assert loss.dtype == torch.float32, f"Algorithm 1: logits in {dtype} give a loss in {loss.dtype}, expected float32: .float() them first"
                assert loss.isfinite(), \
                    f"the loss of logits {a} in {dtype} is {loss}: take softplus of 32-bit logits, not the log of a sigmoid"


def grade_eq5(interpolate):
    h1, h2 = torch.tensor([[1.0, 2.0], [0.0, -4.0]]), torch.tensor([[3.0, -2.0], [8.0, 4.0]])
    for beta, wanted in ((0.5, [[2.0, 0.0], [4.0, 0.0]]), (0.25, [[2.5, -1.0], [6.0, 2.0]]), (1.0, h1.tolist()), (0.0, h2.tolist())):
        a, b = h1.clone(), h2.clone()
        got = interpolate(a, b, beta)
        assert got is not None, "eq. 5: nothing is returned. Is the body still blank?"
        assert torch.is_tensor(got) and (got.shape, got.dtype) == (h1.shape, h1.dtype), "eq. 5: expected a tensor of the shape and type of h1"
        assert torch.equal(a, h1) and torch.equal(b, h2), "eq. 5: h1 or h2 is changed in place, and the caller still needs it"
        assert torch.allclose(got, torch.tensor(wanted)), \
            f"eq. 5, beta * h1 + (1 - beta) * h2 with beta = {beta}: expected {wanted}, got {got.tolist()}"
    assert torch.allclose(interpolate(h1, h2), (h1 + h2) / 2), "section 4.3 fixes beta at 0.5: make it the default"


def grade_eq2(joint_embedding_loss):
    g = torch.Generator().manual_seed(0)
    v, t = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    s = [[sum(float(a) * float(b) for a, b in zip(v[i], t[j])) for j in range(5)] for i in range(5)]
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    wanted = sum(max(0, 1 + s[i][j] - s[i][i]) for i, j in pairs) / 20 + sum(max(0, 1 + s[j][i] - s[i][i]) for i, j in pairs) / 20
    expect(joint_embedding_loss(v.clone(), t.clone()), wanted, "eq. 2's surrogate, mean over i != j of max(0, 1 + s_ij - s_ii), plus the same with images "
           "and texts exchanged (check: both directions, the margin of 1, the diagonal left out)")
    expect_slope(joint_embedding_loss, (v, t), "eq. 2's surrogate")


def grade_replication(score):
    D = gan_cls.Discriminator(ndf=2, text_dim=6, text_small=3)
    f, h = torch.randn(5, 16, 4, 4, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    t = D.text(h)
    depth = torch.zeros(5, 19, 4, 4)
    for b in range(5):
        for y in range(4):
            for x in range(4):
                depth[b, :16, y, x], depth[b, 16:, y, x] = f[b, :, y, x], t[b]
    wanted = D.joint(depth).flatten()
    try:
        got = score(D, f, h)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        pytest.fail(f"section 4.1: the text must be compressed, then stand at all 4x4 places, behind the features in depth; "
                    f"the sizes are those of f and of self.text(h), here 3 channels, not 128 ({error})")
    assert got is not None, "section 4.1: nothing is returned. Is the body still blank?"
    assert torch.is_tensor(got) and got.shape == (5,), f"section 4.1: expected a tensor of 5 logits, got {type(got).__name__} {tuple(got.shape)}"
    assert not torch.allclose(got, wanted.sigmoid(), atol=1e-5), "section 4.1: expected logits; the losses take the sigmoid"
    assert torch.allclose(got, wanted, atol=1e-5), \
        "section 4.1: the compressed text of each picture must stand at all 16 places of its 4x4 map, behind the features in depth"
    slopes = torch.autograd.grad(wanted.square().sum(), (f, h))
    mine = torch.autograd.grad(got.square().sum(), (f, h), allow_unused=True) if got.requires_grad else (None, None)
    assert all(a is not None and torch.allclose(a, b, atol=1e-3 * float(b.abs().max())) for a, b in zip(mine, slopes)), \
        "section 4.1: the logits are right, their gradients by f and h are not: what is detached?"


def grade_eq6(style_loss):
    z, z_hat = (nn.functional.pad(torch.tensor(x), (0, 97)) for x in ([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0], [2.0, 0.0, 1.0]]))
    expect(style_loss(z.clone(), z_hat.clone()), (0 + 4 + 9 + 4 + 0 + 0) / 2, "eq. 6, ||z - S(G(z, h))||^2: the sum over the numbers of z, then the mean over the batch")
    expect_slope(style_loss, (z, z_hat), "eq. 6", given=1)


def test_alg1():
    grade_alg1(gan_cls.discriminator_loss, gan_cls.generator_loss)


def test_eq5():
    grade_eq5(gan_cls.interpolate)


def test_eq2():
    grade_eq2(encoder.joint_embedding_loss)


def test_replication():
    grade_replication(gan_cls.Discriminator.score)


def test_eq6():
    grade_eq6(gan_cls.style_loss)


L, R = torch.nn.functional.logsigmoid, torch.nn.functional.relu
good_D, good_G = gan_cls.discriminator_loss, gan_cls.generator_loss
eye = lambda s: ~torch.eye(len(s), dtype=torch.bool)


def hinge(s, d):
    return R(1 + s - d)[eye(s)].mean()


MISTAKES = [  # (grader, a wrong solution)
    (grade_alg1, (lambda r, w, f: None, good_G)),
    (grade_alg1, (lambda r, w, f: -good_D(r, w, f), good_G)),
    (grade_alg1, (lambda r, w, f: -(L(r.float()) + L(-f.float()) + (0 if w is None else L(-w.float()))).mean(), good_G)),
    (grade_alg1, (lambda r, w, f: good_D(r.sigmoid(), w if w is None else w.sigmoid(), f.sigmoid()), good_G)),
    (grade_alg1, (lambda r, w, f: good_D(r, w if w is None else -w, f), good_G)),
    (grade_alg1, (lambda r, w, f: good_D(r, f, f), good_G)),
    (grade_alg1, (good_D, lambda f: None)),
    (grade_alg1, (good_D, lambda f: -good_G(f))),
    (grade_alg1, (good_D, lambda f: -torch.log(1 - torch.sigmoid(f)).mean())),
    (grade_alg1, (good_D, lambda f: -torch.log(torch.sigmoid(f)).mean())),      # overflows at -1000
    (grade_alg1, (lambda r, w, f: good_D(r, w, f.detach()), good_G)),
    (grade_alg1, (good_D, lambda f: good_G(f.detach()))),
    (grade_eq5, (lambda a, b, beta=0.5: None,)),
    (grade_eq5, (lambda a, b, beta=0.5: beta * a + beta * b,)),
    (grade_eq5, (lambda a, b, beta=0.5: (1 - beta) * a + beta * b,)),
    (grade_eq5, (lambda a, b, beta=0.3: beta * a + (1 - beta) * b,)),
    (grade_eq2, (lambda v, t: None,)),
    (grade_eq2, (lambda v, t: hinge(v @ t.T, (v @ t.T).diagonal()[:, None]),)),
    (grade_eq2, (lambda v, t: hinge(v @ t.T, (v @ t.T).diagonal()[:, None]) * 2,)),
    (grade_eq2, (lambda v, t: R(1 + v @ t.T - (v @ t.T).diagonal()[:, None]).mean() + R(1 + v @ t.T - (v @ t.T).diagonal()).mean(),)),
    (grade_eq2, (lambda v, t: R(v @ t.T - (v @ t.T).diagonal()[:, None])[eye(v)].mean() + R(v @ t.T - (v @ t.T).diagonal())[eye(v)].mean(),)),
    (grade_eq2, (lambda v, t: sum(R(1 + s - s.diagonal()[:, None]).fill_diagonal_(0).sum() / 20 for s in (v @ t.T, t @ v.T)),)),   # no backward
    (grade_replication, (lambda D, f, h: None,)),
    (grade_replication, (lambda D, f, h: gan_cls.Discriminator.score(D, f, h.detach()),)),
    (grade_replication, (lambda D, f, h: D.joint(torch.cat([f, nn.functional.pad(D.text(h)[:, :, None, None], (0, 3, 0, 3))], 1)).flatten(),)),
    (grade_replication, (lambda D, f, h: D.joint(torch.cat([D.text(h)[:, :, None, None].expand(-1, -1, 4, 4), f], 1)).flatten(),)),
    (grade_replication, (lambda D, f, h: D.joint(torch.cat([f, h[:, :, None, None].expand(-1, -1, 4, 4)], 1)).flatten(),)),
    (grade_replication, (lambda D, f, h: D.joint(torch.cat([f, D.text(h).flip(0)[:, :, None, None].expand(-1, -1, 4, 4)], 1)).flatten(),)),
    (grade_eq6, (lambda z, y: None,)),
    (grade_eq6, (lambda z, y: (z - y.detach()).square().sum(1).mean(),)),
    (grade_eq6, (lambda z, y: (z - y).square().mean(),)),
    (grade_eq6, (lambda z, y: (z - y).square().sum(),)),
    (grade_eq6, (lambda z, y: (z - y).norm(dim=1).mean(),)),
    (grade_eq6, (lambda z, y: (z - y).abs().sum(1).mean(),)),
]

OTHER_WAYS = [  # right solutions that look different
    (grade_alg1, (lambda r, w, f: -L(r.float()).mean() - (L(-f.float()).mean() if w is None else (L(-w.float()) + L(-f.float())).mean() / 2),
                  lambda f: nn.functional.binary_cross_entropy_with_logits(f.float(), torch.ones(len(f))))),
    (grade_eq5, (lambda a, b, beta=0.5: torch.lerp(b, a, beta),)),
    (grade_eq2, (lambda v, t: sum((R(1 + s - s.diagonal()[:, None]).sum() - len(s)) / (len(s) * (len(s) - 1)) for s in (v @ t.T, t @ v.T)),)),
    (grade_replication, (lambda D, f, h: D.joint(torch.cat([f, D.text(h).view(-1, 3, 1, 1).repeat(1, 1, 4, 4)], 1))[:, 0],)),
    (grade_eq6, (lambda z, y: nn.functional.mse_loss(y, z, reduction="sum") / len(z),)),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_graders_catch_mistakes(number):
    grader, wrong = MISTAKES[number]
    with pytest.raises((AssertionError, pytest.fail.Exception)) as caught:
        grader(*wrong)
    assert any(word in str(caught.value) for word in ("Algorithm 1", "eq. ", "section 4", "softplus")), "the message must teach"


@pytest.mark.parametrize("number", range(len(OTHER_WAYS)))
def test_graders_accept_other_ways(number):
    grader, right = OTHER_WAYS[number]
    grader(*right)


# ==============================================================================================
# gan_cls.py
# ==============================================================================================


def small_nets(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return gan_cls.Generator(4, text_dim=12, text_small=5).to(dtype), gan_cls.Discriminator(4, text_dim=12, text_small=5).to(dtype)


def small_batch(B=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return (torch.rand(B, 3, 64, 64, generator=g, dtype=dtype) * 2 - 1, torch.randn(B, 12, generator=g, dtype=dtype),
            torch.randn(B, 12, generator=g, dtype=dtype))


def test_shapes():
    G, D = gan_cls.Generator(), gan_cls.Discriminator()         # the paper's size
    z, h = torch.randn(2, 100), torch.randn(2, 1024)
    x = G(z, h)
    assert x.shape == (2, 3, 64, 64) and x.abs().max() <= 1
    assert D.features(x).shape == (2, 512, 4, 4) and D(x, h).shape == (2,)
    assert G.net[0].weight.shape == (8 * 128 * 16, 228)         # 100 + 128 numbers to 4x4x1024
    assert gan_cls.StyleEncoder()(x).shape == (2, 100)


def test_initialisation():
    G, D = gan_cls.Generator(64), gan_cls.Discriminator(64)
    for net in (G, D):
        for m in net.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                assert abs(m.weight.std() - 0.02) < 0.003 and abs(m.weight.mean()) < 0.003
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert abs(m.weight.mean() - 1) < 0.02 and m.weight.std() < 0.05 and not m.bias.any()
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                assert m.bias is None                           # the authors hold them at zero


def test_one_picture_pass_serves_two_texts():
    _, D = small_nets()
    x, h, h_wrong = small_batch()
    f = D.features(x)
    assert torch.equal(D.score(f, h), D(x, h)) and torch.equal(D.score(f, h_wrong), D(x, h_wrong))
    assert not torch.allclose(D(x, h), D(x, h_wrong))           # and the text matters


def plain_step(G, D, x, h, h_wrong, z, cls, int_):
    """Algorithm 1 as it is written: D on pictures three times, G's pictures with their own pass, every
    logarithm spelled out. Returns gradients of D's and G's losses, D stepped with rate 1 in between."""
    B = len(x)
    texts = torch.cat([h, 0.5 * h[:B // 2] + 0.5 * h[B // 2:]]) if int_ else h
    fake = G(z, texts).detach()[:B]
    log, s = torch.log, lambda x, h: torch.sigmoid(D(x, h))
    L_D = log(s(x, h)).mean() + ((log(1 - s(x, h_wrong)).mean() + log(1 - s(fake, h)).mean()) / 2 if cls else log(1 - s(fake, h)).mean())
    grad_D = torch.autograd.grad(-L_D, list(D.parameters()))
    with torch.no_grad():
        for p, g in zip(D.parameters(), grad_D):
            p -= g
    scores = s(G(z, texts), texts)
    L_G = log(scores[:B]).mean() + (log(scores[B:]).mean() if int_ else 0)
    return grad_D, torch.autograd.grad(-L_G, list(G.parameters()))


def near(a, b):
    """Equal but for the 32 bits in which the losses are summed up."""
    return (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9


@pytest.mark.parametrize("variant", train.VARIANTS)
def test_the_fast_step_is_the_plain_one(variant):
    cls, int_ = train.VARIANTS[variant]
    x, h, h_wrong = small_batch()
    (G, D), (G2, D2) = small_nets(), small_nets()
    before = [[p.detach().clone() for p in net.parameters()] for net in (D, G)]
    torch.manual_seed(7)
    gan_cls.gan_cls_step(G, D, torch.optim.SGD(G.parameters(), 1.0), torch.optim.SGD(D.parameters(), 1.0), x, h, h_wrong, cls=cls, int_=int_)
    torch.manual_seed(7)
    z = torch.randn(12 if int_ else 8, 100)
    expected = plain_step(G2, D2, x, h, h_wrong, z, cls, int_)
    for net, old, grads in zip((D, G), before, expected):
        for p, o, g in zip(net.parameters(), old, grads):
            assert near(o - p, g)
    # In G's half of the step D gets no gradients: what D holds is its own loss's.
    for p, g in zip(D.parameters(), expected[0]):
        assert p.requires_grad and near(p.grad, g)


def test_each_half_moves_its_own_network():
    x, h, h_wrong = small_batch()
    for moved in ("D", "G"):
        G, D = small_nets()
        old = {k: [p.detach().clone() for p in n.parameters()] for k, n in (("G", G), ("D", D))}
        gan_cls.gan_cls_step(G, D, torch.optim.SGD(G.parameters(), float(moved == "G")), torch.optim.SGD(D.parameters(), float(moved == "D")),
                             x, h, h_wrong)
        for k, n in (("G", G), ("D", D)):
            same = all(torch.equal(a, b) for a, b in zip(old[k], n.parameters()))
            assert same == (k != moved)


def test_the_four_variants_differ_where_they_should():
    x, h, h_wrong = small_batch()
    seen = {}
    for variant, (cls, int_) in train.VARIANTS.items():
        G, D = small_nets()
        texts = []
        G.register_forward_pre_hook(lambda m, a: texts.append(a[1]))
        torch.manual_seed(0)
        out = gan_cls.gan_cls_step(G, D, torch.optim.SGD(G.parameters(), 0.0), torch.optim.SGD(D.parameters(), 0.0), x, h, h_wrong, cls=cls, int_=int_)
        seen[variant] = out
        assert ("D(wrong)" in out) == cls                       # only CLS shows D a wrong text
        assert len(texts) == 1 and len(texts[0]) == (12 if int_ else 8)     # only INT draws B/2 more
        assert torch.equal(texts[0][:8], h)
        for i in range(4 if int_ else 0):                       # a blend is of two different pictures of the batch
            assert torch.allclose(texts[0][8 + i], 0.5 * h[i] + 0.5 * h[4 + i])
    assert torch.equal(seen["gan"]["loss_D"], seen["gan"]["loss_D"]) and not torch.equal(seen["gan"]["loss_D"], seen["gan-cls"]["loss_D"])
    assert seen["gan-int"]["loss_G"] > seen["gan"]["loss_G"]    # eq. 5 is one term more


def test_only_one_pass_over_the_pictures():
    x, h, h_wrong = small_batch()
    G, D = small_nets()
    calls = []
    D.features.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    G.register_forward_pre_hook(lambda m, a: calls.append(-len(a[0])))
    gan_cls.gan_cls_step(G, D, torch.optim.SGD(G.parameters(), 0.1), torch.optim.SGD(D.parameters(), 0.1), x, h, h_wrong)
    assert calls == [-12, 8, 8, 12]     # G once; D: the real ones, the fakes, and G's 1.5 B


def test_augment_is_differentiable_and_per_picture():
    torch.manual_seed(0)
    x = torch.rand(6, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    y = gan_cls.augment(x)
    assert y.shape == x.shape and not torch.allclose(y[0] - x[0], y[1] - x[1])
    y.sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().sum(1) > 0).all()
    # one colour stays one colour: what a shift and a change of brightness must keep
    flat = gan_cls.augment(torch.full((3, 3, 64, 64), 0.25))
    assert torch.allclose(flat.flatten(2).std(2), torch.zeros(3, 3), atol=1e-6)


def test_sharpen_against_loops():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = x.clone()
    for n, c, i, j in np.ndindex(*x.shape):
        around = [x[n, c, a, b].item() for a in range(max(0, i - 1), min(5, i + 2)) for b in range(max(0, j - 1), min(4, j + 2))]
        expected[n, c, i, j] += 0.7 * (x[n, c, i, j] - sum(around) / len(around))
    assert torch.allclose(gan_cls.sharpen(x, 0.7), expected)
    flat, sign = torch.full((1, 3, 64, 64), 0.25), 1 - 2 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2)
    assert torch.allclose(gan_cls.sharpen(flat, 1.5), flat)                                      # nothing fine in it
    chequers = gan_cls.sharpen(flat + 0.1 * sign, 1.5) - flat
    assert torch.allclose(chequers[..., 1:-1, 1:-1], 0.1 * sign[1:-1, 1:-1] * (1 + 1.5 * 8 / 9))    # 2.3 times as strong


def test_mode_seeking_rewards_different_pictures():
    z1, z2, x = torch.zeros(2, 100), torch.ones(2, 100), torch.zeros(2, 3, 8, 8)
    apart = lambda *d: float(gan_cls.mode_seeking_loss(z1, z2, x, x + torch.tensor(d).view(2, 1, 1, 1)))
    assert apart(0.1, 0.1) == pytest.approx(1 / 0.15, rel=1e-5) and apart(0.1, 0.5) == pytest.approx((1 / 0.15 + 1 / 0.55) / 2, rel=1e-5)
    assert apart(0.3, 0.3) < apart(0.0, 0.6)        # one collapsed pair is not made up for by a distant one


def test_the_style_reward_is_eq6_for_g_and_q():
    x, h, h_wrong = small_batch()
    torch.manual_seed(5)
    Q = gan_cls.StyleEncoder(4).double()
    (G, D), (G2, D2), Q2 = small_nets(), small_nets(), gan_cls.StyleEncoder(4).double()
    Q2.load_state_dict(Q.state_dict())
    nets, lifted = (G, Q), lambda x: x + 0.1                    # Q sees what D sees
    before = [p.detach().clone() for net in nets for p in net.parameters()]
    torch.manual_seed(7)
    out = gan_cls.gan_cls_step(G, D, torch.optim.SGD([p for net in nets for p in net.parameters()], 1.0), torch.optim.SGD(D.parameters(), 0.0),
                               x, h, h_wrong, augment=lifted, Q=Q, style=0.3)
    torch.manual_seed(7)
    z, texts = torch.randn(12, 100).double(), torch.cat([h, 0.5 * h[:4] + 0.5 * h[4:]])
    seen = lifted(G2(z, texts))
    log_s = torch.log(torch.sigmoid(D2(seen, texts)))
    reward = sum(((z[i] - Q2(seen)[i]) ** 2).sum() for i in range(12)) / 12         # eq. 6: over captions and blends
    expected = torch.autograd.grad(-log_s[:8].mean() - log_s[8:].mean() + 0.3 * reward, [*G2.parameters(), *Q2.parameters()])
    assert out["loss_G"].item() == pytest.approx((-log_s[:8].mean() - log_s[8:].mean()).item(), rel=1e-5)     # the paper's, alone
    for p, old, g in zip([p for net in nets for p in net.parameters()], before, expected):
        assert near(old - p, g) and g.any()


def test_r1_step_is_the_slope_of_d_alone():
    # D(x, h) = a |x|^2 / 2 + b sum(h) has the slopes a x and b: the penalty is a^2 mean|x|^2 + 1024 b^2.
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (2.0, 3.0))

        def forward(self, x, h):
            return self.a * x.square().sum((1, 2, 3)) / 2 + self.b * h.sum(1)
    x, h = torch.rand(5, 3, 64, 64, dtype=torch.float64), torch.rand(5, 1024, dtype=torch.float64)
    x.requires_grad_(True)              # as if G had drawn it: nothing may flow there
    D = Plain()
    gan_cls.r1_step(D, torch.optim.SGD(D.parameters(), lr=1.0), x, h, 1e-6)
    assert D.a.item() == pytest.approx(2 - 1e-6 * 2 * 2 * x.square().sum().item() / 5, rel=1e-12)
    assert D.b.item() == pytest.approx(3 - 1e-6 * 2 * 3 * 1024, rel=1e-12) and x.grad is None


def test_mixed_precision_is_near_full_precision():
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        G, D = gan_cls.Generator(8), gan_cls.Discriminator(8)
        x, h, h_wrong = torch.rand(16, 3, 64, 64) * 2 - 1, torch.randn(16, 1024), torch.randn(16, 1024)
        amp, scaler, name = gan_cls.pick_autocast("cpu", precision)
        out = gan_cls.gan_cls_step(G, D, torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters()), x, h, h_wrong, amp=amp, scaler=scaler)
        assert all(p.dtype == torch.float32 for p in [*G.parameters(), *D.parameters(), *G.buffers()] if p.is_floating_point())
        assert out["loss_D"].dtype == out["loss_G"].dtype == torch.float32
        losses.append(out)
    for key in losses[0]:
        assert float(losses[0][key]) == pytest.approx(float(losses[1][key]), rel=0.05, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_is_found_and_steps():
    device = gan_cls.pick_device()
    assert device.type == "cuda"
    G, D = (n.to(device) for n in small_nets(dtype=torch.float32))
    x, h, h_wrong = (t.float().to(device) for t in small_batch())
    amp, scaler, _ = gan_cls.pick_autocast(device)
    out = gan_cls.gan_cls_step(G, D, torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters()), x, h, h_wrong, amp=amp, scaler=scaler)
    assert all(v.isfinite() for v in out.values())


# ==============================================================================================
# encoder.py
# ==============================================================================================


def test_alphabet():
    assert len(encoder.ALPHABET) == 70 and encoder.ALPHABET.count("-") == 2 and encoder.ALPHABET[-1] == " "
    row = encoder.encode_text(["aZ 9"])[0].tolist()
    assert row[:5] == [1, 26, 70, 36, 0] and len(row) == 201
    assert encoder.encode_text(["é\x7f日🐦\n"])[0].sum() == 0           # letters it lacks
    long = encoder.encode_text(["b" * 500])
    assert long.shape == (1, 201) and (long == 2).all()
    for c in encoder.ALPHABET:
        assert encoder.ALPHABET[encoder.encode_text([c])[0, 0] - 1] == c


def test_char_cnn_rnn_steps():
    phi = encoder.CharCNNRNN(8)
    lengths = []
    for layer in phi.cnn:
        layer.register_forward_hook(lambda m, a, out: lengths.append(out.shape[2]))
    seen = []
    phi.rnn.register_forward_hook(lambda m, a, out: seen.append((a[0].shape, out[0])))
    tokens = encoder.encode_text(["a red bird", "日本"])
    out = phi(tokens)
    assert [lengths[i] for i in (0, 2, 3, 5, 6)] == [198, 66, 63, 21, 18] and seen[0][0] == (2, 18, 8) and out.shape == (2, 1024)
    assert torch.allclose(out, phi.out(seen[0][1].mean(1)))             # the mean of the hidden states, then linear
    assert all(p.abs().max() <= 0.08 for p in phi.parameters())
    assert torch.allclose(out[1], phi(torch.zeros(1, 201, dtype=torch.uint8))[0], atol=1e-6)    # no known letter: all-zero one-hots


def test_eq3_and_eq4_against_loops():
    g = torch.Generator().manual_seed(0)
    v, t = torch.randn(12, 6, generator=g, dtype=torch.float64), torch.randn(20, 6, generator=g, dtype=torch.float64)
    labels = torch.arange(20) % 4
    for items, others in ((v, t), (t[:12], torch.cat([v, v[:8]]))):
        best = []
        for item in items:
            scores = [np.mean([float(item @ o) for o, y in zip(others, labels) if y == c]) for c in range(4)]
            best.append(int(np.argmax(scores)))
        means = torch.stack([others[labels[:len(others)] == c].mean(0) for c in range(4)])
        assert encoder.classify(items, means)[:, 0].tolist() == best


def test_ap_at_50_by_hand():
    image = torch.tensor([[1.0, 0], [0.9, 0], [0, 1.0], [0.8, 0], [0, 0.7]])
    labels, classes = torch.tensor([3, 3, 5, 5, 5]), torch.tensor([3, 5])
    # class 3 retrieves pictures 0, 1, 3: two of three are its own; class 5 retrieves 2, 4 and one of the rest (0)
    means = torch.tensor([[1.0, 0], [0.01, 1.0]])
    assert encoder.average_precision_at_50(image, labels, means, classes, k=3) == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_embed_gives_equal_texts_equal_rows():
    phi = encoder.CharCNNRNN(8)
    out = encoder.embed(phi, ["a red bird", "a blue bird", "a red bird"])
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])


def test_crops_are_the_windows():
    images = torch.arange(2 * 76 * 76 * 3).view(2, 76, 76, 3).to(torch.uint8)
    x = encoder.crops(images, torch.tensor([1, 0]), torch.tensor([3, 12]), torch.tensor([5, 0]), torch.tensor([False, True]))
    assert torch.equal(x[0], images[1, 3:67, 5:69].permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(x[1], images[0, 12:76, 0:64].flip(1).permute(2, 0, 1).float() / 127.5 - 1)


def test_googlenet_has_the_papers_shape():
    net = encoder.googlenet().eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1024)
    assert sum(p.numel() for p in net.parameters()) == 5_599_904        # torchvision's count, without classifiers


def test_googlenet_unreachable_names_the_choice(here, monkeypatch):
    def refuse(*a, **k):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(data.UserError, match="--image-encoder conv"):
        encoder.googlenet_features(None, "cpu")


# ==============================================================================================
# data.py
# ==============================================================================================

COLOUR_BYTES = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def jpeg(colour=(200, 30, 30), size=(90, 80), kind="JPEG", mode="RGB"):
    out = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(out, kind)
    return out.getvalue()


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


def unpacked(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def cub_files(per_class=3):
    """Pictures and captions in CUB's own layout: classes 1 and 4 are of the unseen ones, 2 and 3 are not."""
    pictures, captions, images, boxes, parts = {}, {}, [], [], []
    for c, label in enumerate(("001.Albatross", "002.Auk", "003.Ani", "004.Bunting")):
        for i in range(per_class):
            number, stem = len(images) + 1, f"{label[4:]}_{i:04d}"
            pictures[f"CUB_200_2011/images/{label}/{stem}.jpg"] = jpeg(COLOUR_BYTES[c], (152, 76))
            captions[f"cvpr2016_cub/text_c10/{label}/{stem}.txt"] = f"a bird of kind {c}\n\nit has number {i}\n".encode()
            images.append(f"{number} {label}/{stem}.jpg")
            boxes.append(f"{number} 20.0 10.0 40.0 50.0")
            parts += [f"{number} {p} {p}.0 {2 * p}.0 {int(p != 14)}" for p in range(1, 16)]
    images.reverse()        # the order of images.txt is the source's order, whatever it is
    for name, lines in (("images.txt", images), ("bounding_boxes.txt", boxes), ("parts/part_locs.txt", parts)):
        pictures["CUB_200_2011/" + name] = "\n".join(lines).encode()
    captions["cvpr2016_cub/trainvalclasses.txt"] = b"002.Auk\n003.Ani\n"
    captions["cvpr2016_cub/testclasses.txt"] = b"001.Albatross\n004.Bunting\n"
    return pictures, captions


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder: caches and runs go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_form(ds, pictures, classes, unseen):
    assert ds.images.shape == (pictures, 76, 76, 3) and ds.images.dtype == np.uint8 and isinstance(ds.images, np.memmap)
    assert len(ds.captions) == len(ds.labels) == len(ds.rows) == pictures and all(ds.captions)
    assert all(isinstance(t, str) and t for c in ds.captions for t in c)
    assert len(ds.class_names) == len(ds.unseen) == classes and ds.unseen.sum() == unseen
    both = np.concatenate([ds.split(False), ds.split(True)])
    assert sorted(both) == list(range(pictures))
    assert not set(ds.labels[ds.split(False)]) & set(ds.labels[ds.split(True)])         # class-disjoint


def test_every_layout_of_cub_gives_the_same(here):
    pictures, captions = cub_files()
    plain_captions = {"captions/" + k.rsplit("/", 1)[1]: v for k, v in captions.items() if "text_c10" in k}
    layouts = {
        "archives": lambda d: (tar(d / "CUB_200_2011.tgz", pictures), tar(d / "cvpr2016_cub.tar.gz", captions)),
        "folders": lambda d: (unpacked(d, pictures), unpacked(d, captions)),
        "mirror": lambda d: (unpacked(d, pictures), zipped(d / "caption-data-cub-v1.0.0.zip", plain_captions))}
    seen = []
    for name, make in layouts.items():
        source = here / name
        source.mkdir()
        make(source)
        ds = data.load("cub", source)
        check_form(ds, 12, 4, 2)
        assert ds.class_names == ["001.Albatross", "002.Auk", "003.Ani", "004.Bunting"] and ds.unseen.tolist() == [True, False, False, True]
        assert ds.labels[0] == 3 and ds.captions[0] == ["a bird of kind 3", "it has number 2"]      # images.txt's order
        assert np.allclose(ds.boxes[0], [10, 10, 20, 50])           # 152x76 became 76x76: x halves
        assert np.allclose(ds.keypoints[0][:5], [[p / 2, 2 * p] for p in (2, 3, 4, 5, 6)]) and np.isnan(ds.keypoints[0][5]).all()
        assert np.abs(ds.images[0].astype(int) - COLOUR_BYTES[3]).max() < 8
        seen.append(np.array(ds.images))
    assert all(np.array_equal(seen[0], s) for s in seen)


def test_cub_box_is_the_square_around_the_bird(here):
    (x, y, w, h), size = data.close_up((20.0, 10.0, 40.0, 50.0), (152, 76)), (152, 76)
    assert (x, y, w, h) == (5.0, 0.0, 75.0, 70.0)                       # centre 40, 35; 70 wide and high: inside, as it is
    assert data.close_up((0.0, 0.0, 20.0, 50.0), size) == (0.0, 0.0, 70.0, 70.0)            # would stick out: moved
    assert data.close_up((10.0, 0.0, 100.0, 76.0), size) == (0.0, 0.0, 140.0, 76.0)         # higher than the picture: cut
    pictures, captions = cub_files()
    photo = Image.new("RGB", (152, 76), "white")
    photo.paste("red", (20, 10, 60, 60))
    out = io.BytesIO()
    photo.save(out, "PNG")
    pictures = {k: out.getvalue() if k.endswith(".jpg") else v for k, v in pictures.items()}
    tar(here / "CUB_200_2011.tgz", pictures), tar(here / "cvpr2016_cub.tar.gz", captions)
    ds = data.load("cub-box", here)
    check_form(ds, 12, 4, 2)
    assert np.allclose(ds.boxes[0], [15 * 76 / 70, 10 * 76 / 70, 40 * 76 / 70, 50 * 76 / 70], atol=1e-4)
    red = ds.images[0].astype(int)[..., 1] < 128                        # the box lies where the bird does
    assert np.allclose(np.argwhere(red).min(0), ds.boxes[0][[1, 0]], atol=1) and np.allclose(np.argwhere(red).max(0) + 1, ds.boxes[0][[1, 0]] + ds.boxes[0][[3, 2]], atol=1)
    assert np.allclose(ds.keypoints[0][0], [(2 - 5) * 76 / 70, 4 * 76 / 70], atol=1e-4)


def test_flowers(here):
    pictures = {f"jpg/image_{i:05d}.jpg": jpeg(COLOUR_BYTES[i % 4]) for i in range(1, 9)}
    class_of = lambda i: 20 + i % 4         # 20 is unseen, 21 to 23 are not
    for layout, pattern in (("a", "text_c10/class_{:05d}/"), ("b", "captions/class_{:04d}/")):
        (here / layout).mkdir()
        tar(here / layout / "102flowers.tgz", pictures)
        files = {pattern.format(class_of(i)) + f"image_{i:05d}.txt": b"this flower is nice\n{}\nv\n" for i in range(1, 9)}
        if layout == "a":
            tar(here / layout / "cvpr2016_flowers.tar.gz", files)
        else:
            zipped(here / layout / "caption-data-flowers-v1.0.0.zip", files)
        ds = data.load("flowers", here / layout)
        check_form(ds, 8, 4, 1)
        assert ds.captions[0] == ["this flower is nice"]            # "{}" and "v" of the real set are no captions
        assert ds.unseen.tolist() == [True, False, False, False] and ds.boxes is None


def own_folder(path, classes=4, each=3):
    for c in range(classes):
        for i in range(each):
            unpacked(path, {f"kind{c}/p{i}.png": jpeg(COLOUR_BYTES[c % 4], kind="PNG"), f"kind{c}/p{i}.txt": f"colour {c}\npicture {i}".encode()})
    return path


def test_own_folder(here):
    own_folder(here / "mine")
    (here / "mine/film.mp4").touch()
    os.truncate(here / "mine/film.mp4", data.MAX_FILE + 1)              # is neither picture nor caption: not looked at
    ds = data.load(str(here / "mine"))
    check_form(ds, 12, 4, 1)
    assert ds.captions[0] == ["colour 0", "picture 0"] and ds.class_names[0] == "kind0"
    flat = unpacked(here / "flat", {"a.jpg": jpeg(), "a.txt": b"one thing", "b.jpg": jpeg(), "b.txt": b"other thing", "c.jpg": jpeg()})
    ds = data.load(str(flat))
    assert ds.class_names == ["a.jpg", "b.jpg"] and any("c.txt" in line for line in ds.skipped)     # each its own class


def test_toy(here):
    ds = data.load("toy")
    check_form(ds, 8000, 200, 50)
    assert all(len(c) == 10 for c in ds.captions) and (np.bincount(ds.labels) == 40).all()
    assert not np.isnan(ds.keypoints).any() and (ds.boxes[:, 2:] > 30).all()
    kinds = np.array([n.split(".")[1].split("-") for n in ds.class_names])
    apart = (kinds[:, None] != kinds).sum(2) + 4 * np.eye(200)
    assert kinds.shape == (200, 4) and apart.min() == 2                 # any two species differ in two colours or more
    assert all(len(set(kind)) == 1 for kind in kinds[:len(data.COLOURS)]) and not ds.unseen[:len(data.COLOURS)].any()


def test_toy_pictures_carry_the_colours_that_captions_name(here):
    rng = random.Random(3)
    near = lambda pixel, name: np.abs(pixel.astype(int) - data.COLOURS[name]).max() < 50
    hits = []
    for bird in data.toy_species(rng, 60):
        pixels, box, points = data.toy_draw(rng, bird)
        text = " ".join(data.toy_captions(rng, bird))
        for part, name in (("belly", "belly"), ("crown", "crown")):
            x, y = points[data.KEYPOINTS.index(part)].round().astype(int) + (0, 2 if part == "crown" else 0)
            hits.append(near(pixels[y, x], bird[name]))
            assert bird[name] in text
        for other in set(data.COLOURS) - {bird[k] for k in ("body", "wing", "crown", "belly", "billcolour")}:
            assert other not in text.split()            # captions name the bird's own colours and no others
    assert np.mean(hits) > 0.95


def test_toy_style_is_not_in_the_captions(here):
    ds = data.load("toy")
    words = set(" ".join(t for c in ds.captions for t in c).split())
    assert not words & {"left", "right", "sky", "background", "branch", "large", "facing"}
    facing = ds.keypoints[:, 0, 0] > ds.keypoints[:, 5, 0]
    assert 0.45 < facing.mean() < 0.55


def test_wrong_texts_are_never_of_the_own_class(here):
    ds = data.load(str(own_folder(here / "mine", classes=5, each=4)))
    batches = train.Batches(ds, encoder.CharCNNRNN(8), "cpu", captions=1)
    owner = np.repeat(ds.labels, [len(c) for c in ds.captions])
    batches.table = torch.from_numpy(owner)[:, None].half()             # each caption "says" its class
    seen = set()
    for _ in range(50):
        places = torch.randint(len(batches.order), (64,))
        _, h, h_wrong = batches.batch(places)
        assert torch.equal(h[:, 0], torch.from_numpy(ds.labels[batches.order[places]]).float())
        assert (h != h_wrong).all()
        seen |= set(zip(h[:, 0].tolist(), h_wrong[:, 0].tolist()))
    assert len(seen) == 4 * 3           # every other training class comes up


def test_text_of_a_picture_is_a_mean_of_its_own_captions(here):
    ds = data.load(str(own_folder(here / "mine")))
    batches = train.Batches(ds, encoder.CharCNNRNN(8), "cpu", captions=4)
    h = batches.texts(torch.tensor([2] * 200))
    own = batches.table[batches.starts[2]:batches.starts[3]].float()
    possible = torch.stack([(k * own[0] + (4 - k) * own[1]) / 4 for k in range(5)])
    apart = (h[:, None] - possible).abs().amax(2)
    assert (apart.min(1).values < 1e-3 * possible.abs().max()).all() and len(apart.argmin(1).unique()) == 5


# -------- what comes from outside


def test_hostile_archives_are_refused(here):
    outside = here / "outside.txt"
    for number, name in enumerate(("../outside.txt", "/tmp/outside.txt", "a/../../outside.txt", "C:\\outside.txt")):
        path = tar(here / f"{number}.tgz", {name: b"x"})
        with pytest.raises(data.UserError, match="leads outside"):
            list(data.members(path))
        with pytest.raises(data.UserError, match="leads outside"):
            list(data.members(zipped(here / f"{number}.zip", {name: b"x"})))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(here / "link.tar", "w") as archive:
            info = tarfile.TarInfo("x.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        with pytest.raises(data.UserError, match="link"):
            list(data.members(here / "link.tar"))
    assert not outside.exists()


def test_archive_bombs_are_bounded(here, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 1000)
    monkeypatch.setattr(data, "MAX_TOTAL", 1500)
    with pytest.raises(data.UserError, match="too large"):
        list(data.members(tar(here / "a.tgz", {"x": bytes(2000)})))
    with pytest.raises(data.UserError, match="too large"):
        list(data.members(zipped(here / "b.zip", {"x": bytes(900), "y": bytes(900)})))


def test_all_kinds_of_pictures():
    for mode, kind in (("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG"),
                       ("RGB", "GIF"), ("RGB", "BMP"), ("RGB", "WEBP"), ("F", "TIFF")):
        out = io.BytesIO()
        (Image.new("I;16", (50, 90), 30000) if mode == "I;16" else Image.new("RGB", (50, 90), (120, 120, 120)).convert(mode)).save(out, kind)
        pixels, window = data.read_picture(out.getvalue())
        assert pixels.shape == (76, 76, 3) and pixels.dtype == np.uint8 and window == (0, 0, 50, 90)
        assert mode == "1" or 80 < pixels.mean() < 160, mode
    clear = io.BytesIO()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(clear, "PNG")
    assert data.read_picture(clear.getvalue())[0].min() == 255          # transparent is white, not black
    tag, lying = Image.Exif(), io.BytesIO()                             # a phone's upright picture, stored on its side
    tag[0x0112] = 6                                                     # "turn me a quarter clockwise"
    half_red = np.zeros((80, 200, 3), np.uint8)
    half_red[:, :100] = (250, 0, 0)                                     # left; upright: above
    Image.fromarray(half_red).save(lying, "JPEG", exif=tag)
    upright = data.read_picture(lying.getvalue())[0]
    assert upright[:30, :, 0].min() > 200 and upright[46:, :, 0].max() < 50
    with pytest.raises(ValueError, match="cannot identify"):            # PostScript is a program: no picture for us
        data.read_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for bad in (b"", b"GIF89a", jpeg()[:200], b"\x00" * 1000):
        with pytest.raises(ValueError):
            data.read_picture(bad)
    huge = io.BytesIO()
    Image.new("1", (30000, 30000)).save(huge, "PNG")
    with pytest.raises(ValueError, match="pixels"):
        data.read_picture(huge.getvalue())


def test_captions_of_any_encoding():
    assert data.read_captions("a bird\r\n\r\n  \n two  birds ".encode()) == ["a bird", "two birds"]
    assert data.read_captions("\ufeffa bird".encode()) == ["a bird"]
    assert data.read_captions("un été".encode("latin-1")) == ["un été"]
    assert data.read_captions("a bird".encode("utf-16")) == ["a bird"]
    assert data.read_captions(b"") == [] and len(data.read_captions(b"a bird\n" * 1000)) == data.MAX_CAPTIONS


class Server:
    """A local web server: serves `content`, honours ranges, breaks off after `limit` bytes."""

    def __init__(self, content, limit=None, ranges=True):
        outer, self.asked = self, []
        self.content, self.limit, self.ranges = content, limit, ranges

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.headers.get("Range"))
                begin = 0
                if self.path != "/file":
                    return self.send_error(404)
                if self.headers.get("Range") and outer.ranges:
                    begin = int(self.headers["Range"][6:-1])
                    if begin >= len(outer.content):
                        return self.send_error(416)
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(outer.content) - begin))
                self.end_headers()
                self.wfile.write(outer.content[begin:begin + (outer.limit or len(outer.content))])

            def log_message(self, *a):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/file"

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.server.shutdown()
        self.server.server_close()


def test_downloads(here):
    content = np.random.default_rng(0).bytes(100_000)
    md5, path = hashlib.md5(content).hexdigest(), here / "file.bin"
    with Server(content) as server:
        data.download(server.url, path, md5)
        assert path.read_bytes() == content and not (here / "file.bin.part").exists()
        with pytest.raises(data.UserError, match="404"):
            data.download(server.url + "x", here / "y")
    with Server(content, limit=40_000) as server:           # breaks off twice, goes on each time
        path.unlink()
        for _ in range(2):
            with pytest.raises(data.UserError, match="run this again"):
                data.download(server.url, path, md5)
            assert not path.exists()
        data.download(server.url, path, md5)
        assert path.read_bytes() == content and server.asked == [None, "bytes=40000-", "bytes=80000-"]
    with Server(content, ranges=False) as server:           # a server that cannot resume starts over
        path.unlink()
        (here / "file.bin.part").write_bytes(b"old and wrong")
        data.download(server.url, path, md5)
        assert path.read_bytes() == content
    with Server(b"wrong" * 100) as server:
        path.unlink()
        with pytest.raises(data.UserError, match=md5) as error:
            data.download(server.url, path, md5)
        assert hashlib.md5(b"wrong" * 100).hexdigest() in str(error.value) and not path.exists()
    with pytest.raises(data.UserError, match="cannot be fetched"):
        data.download("http://127.0.0.1:9/file", here / "z")


def test_captions_that_cannot_be_fetched_are_named(here, monkeypatch):
    with Server(b"") as server:
        monkeypatch.setitem(data.SOURCES, "cub", dict(data.SOURCES["cub"], captions_url=server.url + "-none"))
        unpacked(here / "cache" / "downloads", {"CUB_200_2011.tgz": b"there"})
        with pytest.raises(data.UserError, match="cvpr2016_cub.tar.gz.*cache/downloads"):
            data.load("cub")


def test_a_changed_source_is_seen(here):
    folder = own_folder(here / "mine")
    assert data.load(str(folder)).captions[0][0] == "colour 0"
    stamp = os.stat(next((here / "cache").glob("own-mine-*/images.npy"))).st_mtime_ns
    data.load(str(folder))
    assert os.stat(next((here / "cache").glob("own-mine-*/images.npy"))).st_mtime_ns == stamp       # not built again
    (folder / "kind0" / "p0.txt").write_text("another colour")
    assert data.load(str(folder)).captions[0][0] == "another colour"
    assert len(list((here / "cache").iterdir())) == 1               # the old one is gone, and nothing is left about
    half = next((here / "cache").iterdir())
    (half / "meta.json").unlink()                                   # as when a killed process had left it
    shutil.rmtree(half / "x", ignore_errors=True)
    assert data.load(str(folder)).captions[0][0] == "another colour"


@pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not beside this repository")
@pytest.mark.parametrize("name, pictures, classes, unseen", [("cub", 11788, 200, 50), ("flowers", 8189, 102, 20)])
def test_real_data(here, name, pictures, classes, unseen):
    check_form(data.load(name, SHARED), pictures, classes, unseen)


# ==============================================================================================
# train.py and sample.py
# ==============================================================================================


def call(module, *args):
    """A script's command line, in this process. Returns its exit code."""
    old, sys.argv = sys.argv, [module.__name__ + ".py", *map(str, args)]
    try:
        data.run(module.main)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = old


@pytest.fixture
def tiny(here, monkeypatch):
    """A small data set and quick settings, so that a whole run takes a second or two."""
    own_folder(here / "mine", classes=5, each=4)
    real = encoder.train_encoder
    monkeypatch.setattr(encoder, "train_encoder", lambda ds, device="cpu", steps=0, cnn_dim=8, **kw: real(ds, device, 3, 8, **kw))
    monkeypatch.setattr(train, "STYLE_STEPS", 3)
    monkeypatch.setattr(train, "EVERY", dict(log=2, sample=4, save=4))
    return here


TINY = ("--dataset", "mine", "--ngf", 2, "--ndf", 2, "--batch-size", 8, "--recipe", "quick", "--device", "cpu")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_a_run_from_start_to_picture(tiny, capsys):
    assert call(train, *TINY, "--steps", 8, "--out", "run") == 0
    out = capsys.readouterr().out
    assert "loss_D" in out and "D(wrong)" in out and "pictures/s" in out
    assert {p.name for p in tiny.iterdir()} == {"mine", "cache", "run"}         # nothing is written elsewhere
    assert sorted(p.name for p in (tiny / "run/samples").iterdir()) == ["000004.png", "000008.png"]
    assert Image.open(tiny / "run/loss.png").size == (720, 360)
    assert call(sample, "an all black bird", "日本 🐦 UPPER", "x" * 5000, "--weights", "run/checkpoint.pt", "--n", 3, "--out", "a.png") == 0
    assert call(sample, "an all black bird", "日本 🐦 UPPER", "x" * 5000, "--weights", "run/checkpoint.pt", "--n", 3, "--out", "b.png") == 0
    assert (tiny / "a.png").read_bytes() == (tiny / "b.png").read_bytes()
    assert call(sample, "an all black bird", "--weights", "run/checkpoint.pt", "--n", 3, "--seed", 1, "--out", "c.png") == 0
    assert (tiny / "a.png").read_bytes() != (tiny / "c.png").read_bytes()


def test_resumed_is_unbroken(tiny):
    paper = (*TINY, "--recipe", "paper")            # argparse takes the last one; quick's rates depend on --steps
    assert call(train, *paper, "--steps", 10, "--out", "whole") == 0
    assert call(train, *paper, "--steps", 4, "--out", "parts") == 0
    assert call(train, *paper, "--resume", "--steps", 10, "--out", "parts") == 0
    equal = same(encoder.load_checkpoint(tiny / "whole/checkpoint.pt", "gan-cls"), encoder.load_checkpoint(tiny / "parts/checkpoint.pt", "gan-cls"))
    assert equal


def test_resuming_in_another_precision(tiny, capsys):
    assert call(train, *TINY, "--steps", 4, "--precision", "bf16", "--out", "run") == 0
    for steps, options, said in ((6, (), "bf16"), (8, ("--precision", "fp32"), "fp32"), (10, (), "fp32")):     # what is said last stays
        capsys.readouterr()
        assert call(train, "--resume", "--device", "cpu", "--steps", steps, *options, "--out", "run") == 0
        assert f"{said} on cpu" in capsys.readouterr().out


def test_interrupted_in_an_epoch_the_falling_rates_are_the_unbroken_ones(tiny, monkeypatch):
    real, stop_at = train.Trainer.train_step, 9                     # a step of an epoch's middle, in the second half of the run
    def step(run, *rest):
        if run.step == stop_at:
            signal.raise_signal(signal.SIGTERM)                     # as `kill` does: the step is finished and saved
        return real(run, *rest)
    monkeypatch.setattr(train.Trainer, "train_step", step)
    stop_at = None
    assert call(train, *TINY, "--batch-size", 4, "--steps", 16, "--out", "whole") == 0
    stop_at = 9
    assert call(train, *TINY, "--batch-size", 4, "--steps", 16, "--out", "parts") == 130
    assert call(train, *TINY, "--batch-size", 4, "--resume", "--out", "parts") == 0
    equal = same(encoder.load_checkpoint(tiny / "whole/checkpoint.pt", "gan-cls"), encoder.load_checkpoint(tiny / "parts/checkpoint.pt", "gan-cls"))
    assert equal


def test_a_signal_between_two_steps_is_not_too_late_to_save(tiny, monkeypatch):
    real = train.check_health
    def check(now, history, step):
        if step == 6:                                               # not a step that is saved
            signal.raise_signal(signal.SIGINT)
        real(now, history, step)
    monkeypatch.setattr(train, "check_health", check)
    assert call(train, *TINY, "--steps", 16, "--out", "run") == 130
    assert encoder.load_checkpoint(tiny / "run/checkpoint.pt", "gan-cls")["step"] == 7


def test_progress_is_the_mean_since_the_last_line(tiny, monkeypatch):
    real, losses = train.gan_cls_step, []
    def step(*args, **kw):
        out = real(*args, **kw)
        losses.append(out["loss_D"].item())
        return out
    monkeypatch.setattr(train, "gan_cls_step", step)
    assert call(train, *TINY, "--steps", 5, "--out", "run") == 0
    rows = encoder.load_checkpoint(tiny / "run/checkpoint.pt", "gan-cls")["history"]
    assert [r["step"] for r in rows] == [2, 4, 5]
    assert [r["loss_D"] for r in rows] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]])


def test_the_loss_of_eq2_is_taken_in_32_bits(tiny, monkeypatch):
    seen, real = [], encoder.joint_embedding_loss
    monkeypatch.setattr(encoder, "pick_autocast", lambda *_: gan_cls.pick_autocast("cpu", "bf16"))
    monkeypatch.setattr(encoder, "joint_embedding_loss", lambda a, b: seen.append(real(a, b)) or seen[-1])
    encoder.train_encoder(data.load("mine"), steps=1, cnn_dim=8, classes=4, log=lambda _: None)
    assert {loss.dtype for loss in seen} == {torch.float32}


def test_same_seed_same_run(tiny):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(train, *TINY, "--steps", 4, "--seed", seed, "--out", out) == 0
    a, b, c = (encoder.load_checkpoint(tiny / n / "checkpoint.pt", "gan-cls") for n in "abc")
    equal, other = same(a, b), same(a["G"], c["G"])
    assert equal and not other


def test_checkpoint_round_trip(tiny):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    checkpoint = encoder.load_checkpoint(tiny / "run/checkpoint.pt", "gan-cls")
    run = train.Trainer(checkpoint["settings"], torch.device("cpu"), checkpoint["encoder"])
    run.restore(checkpoint)
    run.save(tiny / "again.pt")
    again = torch.load(tiny / "again.pt", weights_only=True)
    assert all(same(checkpoint[k], again[k]) for k in again if k != "S")


def test_s_learns_what_d_sees_of_a_frozen_g(tiny, monkeypatch):
    """Eq. 6: only S moves, and its pictures are augmented like D's, or it would read patterns that no photograph has."""
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    checkpoint = encoder.load_checkpoint(tiny / "run/checkpoint.pt", "gan-cls")
    inputs = []

    class Watched(gan_cls.StyleEncoder):
        def forward(self, x):
            inputs.append(x.detach())
            return super().forward(x)
    monkeypatch.setattr(train, "StyleEncoder", Watched)
    run = train.Trainer(checkpoint["settings"], torch.device("cpu"), checkpoint["encoder"])
    run.restore(checkpoint)
    run.augment = lambda x: torch.full_like(x, 0.25)
    phi, _ = encoder.build(checkpoint["encoder"])
    G, S0 = copy_of(run.average), copy_of(run.S)
    S = train.train_style_encoder(run, train.Batches(data.load("mine"), phi, torch.device("cpu"), 5), 2, log=lambda _: None)
    assert len(inputs) == 2 and all((x == 0.25).all() for x in inputs)
    assert same(G, run.average.state_dict()) and not same(S0, S.state_dict())


def copy_of(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def test_learning_rate_halves_every_100_epochs(tiny, monkeypatch):
    rates = []
    real = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step", lambda self, *a: rates.append(
        tuple(round(float(o.param_groups[0]["lr"]), 9) for o in (self.opt_G, self.opt_D))) or real(self, *a))
    assert call(train, *TINY[:-4], "--recipe", "paper", "--steps", 210, "--out", "run", "--batch-size", 16) == 0
    assert rates[0] == rates[99] == (2e-4, 2e-4) and rates[100] == (1e-4, 1e-4) and rates[200] == (5e-5, 5e-5)


@pytest.mark.parametrize("recipe, weight", [("quick", 0.04), ("toy", 0.4), ("paper", None)])
def test_r1_at_every_fourth_step_of_recipe_quick_on_what_d_sees(tiny, monkeypatch, recipe, weight):
    steps, real, seen = [], gan_cls.r1_step, []
    last = "sharpen" if recipe == "toy" else "augment"              # of what happens to a picture on its way to D
    monkeypatch.setattr(train, last, lambda *a: seen.append(getattr(gan_cls, last)(*a) + 0) or seen[-1])
    monkeypatch.setattr(train, "r1_step", lambda D, opt, x, h, weight: (
        steps.append((round(weight, 9), x is seen[-1], len(x) == len(h) == 8)), real(D, opt, x, h, weight)))
    assert call(train, *TINY[:-4], "--recipe", recipe, "--steps", 9, "--out", "run") == 0
    assert steps == ([(weight, True, True)] * 2 if weight else [])


def random_run(recipe="quick", variant="gan-int-cls", device="cpu", precision="fp32"):
    """A trainer and batches of noise, without files: 64 pictures of 8 classes."""
    ds = data.Dataset("random", np.random.default_rng(0).integers(0, 256, (64, 76, 76, 3), np.uint8),
                      [["a bird", "a red bird"]] * 64, np.arange(64) % 8, list("abcdefgh"), np.zeros(8, bool), np.arange(64))
    settings = dict(recipe=recipe, variant=variant, seed=0, ngf=4, ndf=2, precision=precision, steps=20, batch_size=8)
    device = torch.device(device)
    run, phi = train.Trainer(settings, device, None), encoder.CharCNNRNN(8).to(device)
    return run, train.Batches(ds, phi, device, run.recipe["captions"])


@pytest.mark.parametrize("recipe, variant", [("paper", "gan-int-cls"), *(("quick", variant) for variant in train.VARIANTS)])
def test_no_step_reads_a_number_from_the_device(recipe, variant, monkeypatch):
    # Fake tensors have shapes but no numbers: .item(), an if on a value or a mask as an index would raise. On a GPU each would make
    # the CPU wait, and none could be recorded in a CUDA graph.
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    run, batches = random_run(recipe, variant)
    monkeypatch.setattr(torch, "_fused_adam_", lambda *a, **kw: None)       # has no fake form in every version
    with FakeTensorMode(allow_non_fake_inputs=True):
        for step in range(4):                                               # the fourth is followed by r1_step
            out = run.train_step(batches, torch.arange(8))
        with pytest.raises(DataDependentOutputException):                   # and this is what it would look like
            float(out["loss_D"])


class Recording:
    """What CUDA graphs do, on a CPU: while recording nothing is computed, a replay computes all, in place."""
    def __init__(self, run, batches):
        self.run, self.batches = run, batches

    def __call__(self, graph):                                              # torch.cuda.graph(graph)
        return self

    def __enter__(self):
        self.state, self.rng = [(t, t.clone()) for t in self.tensors()], torch.get_rng_state()

    def __exit__(self, *_):
        torch.set_rng_state(self.rng)
        for t, old in self.state:
            t.copy_(old)

    @torch.no_grad()
    def tensors(self):
        return [t.detach() for net in (self.run.G, self.run.D, self.run.Q) for t in net.state_dict().values()] + [
            t for opt in (self.run.opt_G, self.run.opt_D) for state in opt.state.values() for t in state.values()]

    def replay(self):
        (x, h, _), out = self.run.recorded
        batch = self.batches.batch(self.run.graph_places)
        now = self.run.algorithm1(batch)
        x.copy_(batch[0]), h.copy_(batch[1])
        for k in out:
            out[k].copy_(now[k])


def test_a_recorded_run_is_the_unrecorded_one(monkeypatch):
    order, runs = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:8] for i in range(12)]), []
    for recorded in (False, True):
        run, batches = random_run()
        recording = Recording(run, batches)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recording)
        monkeypatch.setattr(torch.cuda, "graph", recording)
        run.capture_at = 3 if recorded else None
        losses = [{k: v.item() for k, v in run.train_step(batches, places).items()} for places in order]
        assert bool(run.graph) == recorded
        runs.append((losses, {k: v.state_dict() for k, v in run.parts().items()}))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_where_nothing_can_be_compiled_one_line_says_so(monkeypatch):
    def refuse(f):
        error = RuntimeError("backend='inductor' raised:\nRuntimeError: Cannot find ...")     # as torch 2.6 puts it
        error.inner_exception = RuntimeError("Cannot find a working triton installation.\n\nMore of it.")
        raise error
    monkeypatch.setattr(torch, "compile", refuse)
    lines, (run, _) = [], random_run()
    run.compile(lines.append)
    assert lines[1:] == ["going on without compiling: Cannot find a working triton installation."]
    assert run.G._compiled_call_impl is None and run.r1_step is gan_cls.r1_step and run.capture_at == 3      # recorded it is all the same


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision, near", [("fp32", 0.05), ("bf16", 0.2)])
def test_cuda_compiled_and_recorded_is_eager(precision, near):
    order, runs = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:8] for i in range(12)]).cuda(), []
    for fast in (False, True):
        run, batches = random_run(device="cuda", precision=precision)
        if fast:
            run.compile(lambda _: None)
        runs.append([{k: v.item() for k, v in run.train_step(batches, places).items()} for places in order])
        assert bool(run.graph) == fast
    for plain, fast in zip(*runs):
        assert fast == pytest.approx(plain, rel=near, abs=near)


@pytest.mark.parametrize("options, recipe", [((), "toy"), (("--dataset", "cub"), "quick"), (("--recipe", "paper"), "paper")])
def test_recipe_follows_the_data_unless_named(monkeypatch, options, recipe):
    taken = []
    monkeypatch.setattr(train, "run_one", lambda args, *rest: taken.append(args.recipe))
    assert call(train, *options) == 0 and taken == [recipe]


def test_atomic_writes(here):
    def fail(f):
        f.write(b"half")
        raise OSError("disk full")
    data.write_atomically(here / "x", lambda f: f.write(b"whole"))
    with pytest.raises(OSError):
        data.write_atomically(here / "x", fail)
    assert (here / "x").read_bytes() == b"whole" and len(list(here.iterdir())) == 1


def test_bad_input_gives_one_line_and_code_2(tiny, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    good = (tiny / "run/checkpoint.pt").read_bytes()
    unpacked(tiny, {"none/a.jpg": jpeg(), "none/b.txt": b"alone", "broken/a.jpg": b"not a picture", "broken/a.txt": b"a bird",
                    "empty/a.jpg": jpeg(), "empty/a.txt": b"\n \n", "text.pt": b"hello", "cut.pt": good[:len(good) // 2], "nothing.pt": b"",
                    **{f"single/{n}.jpg": jpeg() for n in range(8)}, **{f"single/{n}.txt": b"a bird" for n in range(8)},
                    "from/CUB_200_2011.tgz": b"not an archive", "from/cvpr2016_cub.tar.gz": b"neither", "bare/x": b""})
    own_folder(tiny / "x/mine", classes=5, each=4)
    np.savez(tiny / "two.npz", np.zeros((20, 1024)), np.zeros(3))
    torch.save(dict(kind="other"), tiny / "other.pt")
    torch.save(dict(kind="gan-cls", format=99), tiny / "old.pt")
    torch.save(dict(kind="gan-cls", format=encoder.FORMAT, settings=dict(ngf=3)), tiny / "short.pt")
    torch.save(dict(kind="encoder", format=encoder.FORMAT), tiny / "noset.pt")
    whole = torch.load(tiny / "run/checkpoint.pt", weights_only=True)
    for name, content in (("short", dict(kind="gan-cls", format=encoder.FORMAT, settings=dict(ngf=3))),
                          ("wide", dict(whole, settings=dict(whole["settings"], ngf=10 ** 6))),
                          ("recipe", dict(whole, settings=dict(whole["settings"], recipe=["quick"]))),
                          ("nameless", dict(whole, settings={k: v for k, v in whole["settings"].items() if k != "dataset"})),
                          ("history", dict(whole, history=[dict(step=1, loss_D="low")]))):
        (tiny / name).mkdir()
        torch.save(content, tiny / name / "checkpoint.pt")
    text = "an all black bird"
    cases = [
        (data, ["--dataset", "nowhere"], "unknown data set"),
        (data, ["--dataset", "cub", "--from", "missing"], "in missing: expected one of"),
        (data, ["--dataset", "cub", "--from", "bare"], "no pictures of cub"),
        (data, ["--dataset", "cub", "--from", "from"], "damaged or not an archive"),
        (data, ["--dataset", "none"], "there is no a.txt"),
        (data, ["--dataset", "broken"], "not a whole picture"),
        (data, ["--dataset", "empty"], "no caption in a.txt"),
        (train, ["--dataset", "nowhere"], "unknown data set"),
        (train, [*TINY, "--out", "run"], "--resume"),
        (train, [*TINY, "--out", "new", "--resume"], "nothing to resume"),
        (train, [*TINY, "--steps", "-3"], "expected a number"),
        (train, ["--device", "toaster"], "toaster"),
        (train, ["--device", "meta"], "expected a cpu or cuda device"),
        (train, [*TINY, "--out", "few", "--batch-size", 3], "too small"),
        (train, ["--out", "run", "--resume", "--epochs", 7], "--steps"),
        (train, [*TINY, "--out", "other", "--image-encoder", "googlenet"], "image side conv, not on mine with googlenet"),
        (train, ["--dataset", "x/mine", "--out", "other"], "was trained on mine with image side conv, not on x/mine"),
        (train, ["--dataset", "x/mine", "--recipe", "quick", "--measure", "--out", "run"], "is of dataset mine, not x/mine: say --dataset mine"),
        (train, [*TINY, "--variant", "gan", "--measure", "--out", "run"], "is of variant gan-int-cls, not gan"),
        (train, [*TINY, "--variant", "gan", "--measure", "--resume", "--out", "run"], "is of variant gan-int-cls, not gan"),
        (train, [*TINY, "--recipe", "paper", "--measure", "--out", "run"], "is of recipe quick, not paper"),
        (train, ["--dataset", "single", "--measure"], "at least two pictures each"),
        (train, ["--ngf", 100_000], "expected a number from 1 to 1,024"),
        (sample, ["", "--weights", "run/checkpoint.pt"], "empty text"),
        (sample, [" \n\t ", "--weights", "run/checkpoint.pt"], "empty text"),
        (sample, [text, "--weights", "missing.pt"], "no file missing.pt"),
        (sample, [text, "--weights", "text.pt"], "not a checkpoint"),
        (sample, [text, "--weights", "cut.pt"], "not a checkpoint"),
        (sample, [text, "--weights", "nothing.pt"], "not a checkpoint"),
        (sample, [text, "--weights", "other.pt"], "does not hold a gan-cls"),
        (sample, [text, "--weights", "old.pt"], "format 99"),
        (sample, [text, "--weights", "short.pt"], "does not fit"),
        (sample, [text, "--weights", "mine"], "mine"),
        (sample, [text, "--weights", "run/checkpoint.pt", "--n", "0"], "expected a number from 1 to 64"),
        (sample, [text, "--weights", "run/checkpoint.pt", "--seed", "-1"], "expected a number from 0"),
        (sample, [text, "--weights", "run/checkpoint.pt", "--out", "x.exe"], "name a picture file"),
        (sample, [text, "--weights", "run/checkpoint.pt", "--interpolate"], "expected 2"),
        (sample, [text, "--weights", "run/checkpoint.pt", "--style", "broken/a.jpg"], "cannot read the picture"),
        (encoder, ["--dataset", "mine", "--image-features", "text.pt"], "cannot read features"),
        (encoder, ["--dataset", "mine", "--image-features", "nothing.pt"], "cannot read features"),
        (encoder, ["--dataset", "mine", "--image-features", "two.npz"], "cannot read features"),
        (train, ["--measure", "--compare"], "not allowed with"),
        (encoder, ["--dataset", "mine", "--evaluate", "--out", "noset.pt"], "does not fit"),
        (train, ["--out", "run", "--export", "../x"], "not a path"),
        (train, ["--out", "short", "--resume"], "does not fit"),
        (train, ["--out", "short", "--export", "x"], "does not fit"),
        (train, ["--out", "wide", "--resume"], "does not fit"),
        (train, ["--out", "recipe", "--resume"], "does not fit"),
        (train, ["--out", "nameless", "--resume"], "does not fit"),
        (train, ["--out", "history", "--resume", "--steps", 99], "does not fit"),
    ]
    (tiny / "runs").mkdir()
    shutil.copy(tiny / "run/encoder.pt", tiny / "runs/own-mine-encoder.pt")
    capsys.readouterr()
    for module, args, message in cases:
        code = call(module, *args)
        err = capsys.readouterr().err
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, (module.__name__, args, code, err)


def test_no_run_yet(here, capsys):
    assert call(sample, "a bird") == 2 and "python train.py" in capsys.readouterr().err


def test_compare_and_export(tiny, capsys):
    assert call(train, *TINY, "--steps", 4, "--compare") == 0
    out = capsys.readouterr().out
    numbers = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert list(numbers) == list(train.VARIANTS) and all({"top-1 fake", "top-5 real", "spread", "Frechet"} <= set(v[0]) for v in numbers.values())
    assert numbers["gan"][0]["top-1 real"] == numbers["gan-cls"][0]["top-1 real"]         # the same real pictures for all
    assert Image.open("runs/own-mine-compare/models.png").width > 300
    stamps = {p: p.stat().st_mtime_ns for p in tiny.glob("runs/*/checkpoint.pt")}
    assert call(train, *TINY, "--steps", 4, "--compare", 2) == 0                           # another seed beside each; finished runs are reused
    assert len(stamps) == 4 and all(p.stat().st_mtime_ns == t for p, t in stamps.items()) and len(list(tiny.glob("runs/*/checkpoint.pt"))) == 8
    first, second = (encoder.load_checkpoint(tiny / f"runs/own-mine-gan{end}/checkpoint.pt", "gan-cls") for end in ("", "-1"))
    assert second["settings"] == dict(first["settings"], seed=1) and not same(first["G"], second["G"])
    shutil.rmtree(tiny / "runs/own-mine-gan-cls")
    assert call(train, *TINY, "--steps", 2, "--compare") == 2 and "gan-cls has (steps, recipe, ngf, ndf) (2, 'quick', 2, 2), another (4," in capsys.readouterr().err   # else it would not be fair
    assert call(train, "--dataset", "mine", "--export", "mine") == 0
    assert call(sample, "a bird", "--weights", "runs/own-mine-gan-int-cls/checkpoint.pt", "--out", "a.png") == 0
    assert call(sample, "a bird", "--weights", "mine", "--out", "b.png") == 0
    a, b = (np.asarray(Image.open(p)).astype(int) for p in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 3 and (tiny / "weights/mine.pt").stat().st_size < 0.5 * (tiny / "runs/own-mine-gan-int-cls/checkpoint.pt").stat().st_size


def test_two_seeds_give_mean_and_deviation(tiny, monkeypatch, capsys):
    found = iter(range(8))
    monkeypatch.setattr(train, "run_one", lambda args, variant, seed, *rest, **kw: (data.load("mine"), types.SimpleNamespace(images=torch.zeros(
        20, 76, 76, 3, dtype=torch.uint8)), types.SimpleNamespace(step=4, settings={}, average=None, S=None, encoder=None)))
    monkeypatch.setattr(train, "get_encoder", lambda *a, **kw: None)
    monkeypatch.setattr(train, "measure", lambda *a: (dict(spread=float(next(found)) ** 2), None, None))
    monkeypatch.setattr(encoder, "build", lambda *a: (None, None))
    monkeypatch.setattr(train, "embed", lambda *a: None)
    monkeypatch.setattr(train, "paint", lambda *a, **kw: torch.zeros(8, 3, 64, 64))
    assert call(train, *TINY, "--compare", 2) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("spread"))
    assert row.split()[1:] == ["0.500", "+-0.500", "6.500", "+-2.500", "20.500", "+-4.500", "42.500", "+-6.500"]     # of 0 1, 4 9, 16 25, 36 49


def test_cub_is_not_taken_for_cub_box(here):
    pictures, captions = cub_files()
    (here / "from").mkdir()
    tar(here / "from/CUB_200_2011.tgz", pictures), tar(here / "from/cvpr2016_cub.tar.gz", captions)
    whole = np.array(data.load("cub", here / "from").images)
    close = np.array(data.load("cub-box", here / "from").images)
    own_folder(here / "cub")
    data.load("./cub")                              # a folder of the same name leaves the other caches alone
    shutil.rmtree(here / "from")
    assert np.array_equal(data.load("cub").images, whole) and np.array_equal(data.load("cub-box").images, close)


def test_benchmark_writes_nothing(here, capsys):
    assert call(train, "--benchmark", "--ngf", 2, "--ndf", 2, "--batch-size", 8, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "faster than plain" in out and "TFLOP/s" in out and "663,600 steps" in out and list(here.iterdir()) == []


def test_encoder_on_its_own(here, capsys):
    own_folder(here / "mine", classes=5, each=4)
    assert call(encoder, "--dataset", "mine", "--steps", 2, "--device", "cpu") == 0
    first = capsys.readouterr().out
    assert call(encoder, "--dataset", "mine", "--evaluate", "--device", "cpu") == 0
    again = capsys.readouterr().out
    assert "zero-shot top-1" in first and "AP@50" in first and first.splitlines()[-1] == again.splitlines()[-1]
    np.save("f.npy", np.random.default_rng(0).normal(size=(20, 1024)).astype(np.float16))
    features = ["--image-features", "f.npy", "--out", "f.pt", "--device", "cpu"]
    assert call(encoder, "--dataset", "mine", "--steps", 2, *features) == 0
    assert call(encoder, "--dataset", "mine", "--evaluate", *features) == 0
    assert call(encoder, "--dataset", "mine", "--evaluate", "--out", "f.pt", "--device", "cpu") == 2    # whose features?


def test_whitening_changes_no_score():
    torch.manual_seed(0)
    texts = [f"a {a} bird with {b} wings" for a in data.COLOURS for b in data.COLOURS]
    for v, x in ((encoder.image_encoder("conv").eval(), torch.rand(6, 3, 64, 64)), (encoder.image_encoder("features"), torch.randn(6, 1024))):
        phi = encoder.CharCNNRNN(16)
        before = v(x) @ encoder.embed(phi, texts).T
        encoder.whiten(phi, v, texts)
        h = encoder.embed(phi, texts)
        assert float(h.square().mean()) == pytest.approx(0.25, rel=1e-2)
        assert (v(x) @ h.T - before).abs().max() < 0.02 * before.abs().max()
        values = torch.linalg.eigvalsh(torch.cov(h.T))
        assert values[-1] < 0.5 * values.sum()                  # before, the first direction held most of it


def test_sampling_modes(tiny):
    assert call(train, *TINY, "--steps", 4, "--out", "runs/own-mine-gan-int-cls") == 0      # found as the newest run
    assert call(sample, "--interpolate", "a red bird", "a blue bird", "--out", "i.png") == 0
    assert call(sample, "--interpolate-style", "a red bird", "--out", "z.png") == 0
    Image.new("CMYK", (300, 40)).save("q.jpg")
    Image.new("I;16", (20, 20)).save("q.png")
    assert call(sample, "a red bird", "a blue bird", "--style", "q.jpg", "q.png", "--out", "s.png") == 0
    sizes = [Image.open(p).size for p in ("i.png", "z.png", "s.png")]
    assert sizes[0][0] == sizes[1][0] > sizes[2][0]


# ==============================================================================================
# The measures
# ==============================================================================================


def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=g, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T         # exactly mean 0, covariance I
    shift, scale = torch.tensor([1.0, -2.0, 0.0, 0.5]), torch.tensor([1.0, 2.0, 3.0, 0.5])
    # |m|^2 + sum (1 - scale)^2, for diagonal covariances
    wanted = float(shift.square().sum() + (1 - scale).square().sum())
    assert encoder.frechet_distance(x, x * scale + shift) == pytest.approx(wanted, rel=1e-6)
    assert encoder.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # covariances that do not commute, against the closed form through numpy
    A = torch.randn(4, 4, generator=g, dtype=torch.float64)
    B = torch.randn(4, 4, generator=g, dtype=torch.float64)
    root = np.linalg.eigvals((A @ A.T @ B @ B.T).numpy()).real.clip(0)
    wanted = float((A @ A.T).trace() + (B @ B.T).trace()) - 2 * np.sqrt(root).sum()
    assert encoder.frechet_distance(x @ A.T, x @ B.T) == pytest.approx(wanted, rel=1e-6)


def test_auc_against_all_pairs():
    g = torch.Generator().manual_seed(0)
    scores, same = torch.randint(0, 12, (90,), generator=g).float(), torch.rand(90, generator=g) < 0.4
    yes, no = scores[same].tolist(), scores[~same].tolist()
    wanted = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no])
    assert encoder.auc(scores, same) == pytest.approx(wanted)
    distinct = torch.randn(90, generator=g)
    false, true = encoder.roc(distinct, same)
    assert float(torch.trapezoid(true, false)) == pytest.approx(encoder.auc(distinct, same)) and true[-1] == false[-1] == 1


def test_kmeans_finds_blobs():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 6
    points = torch.randn(6, 3, generator=g)[truth] * 20 + torch.randn(300, 3, generator=g) * 0.1
    group = encoder.kmeans(points, 6)
    assert all(len(group[truth == i].unique()) == 1 for i in range(6)) and len(group.unique()) == 6


def test_style_verification_knows_a_perfect_and_a_random_S():
    g = torch.Generator().manual_seed(0)
    group = torch.randint(0, 10, (600,), generator=g)
    pairs = encoder.style_pairs(group, pairs=1000)
    assert len(pairs) == 5 and all(same.float().mean() == 0.5 and (group[i] == group[j]).equal(same) for i, j, same in pairs)
    assert not set(pairs[0][0].tolist()) & set(pairs[1][0].tolist())            # folds share no picture
    perfect = torch.nn.functional.one_hot(group).float()
    assert encoder.verify_style(perfect, pairs) == 1.0
    assert encoder.verify_style(torch.randn(600, 100, generator=g), pairs) == pytest.approx(0.5, abs=0.03)
    assert encoder.style_pairs(torch.where(group == 0, -1, group), pairs=100)[0][0].max() < 600


def test_style_groups_read_background_and_pose(here):
    ds = data.load("toy")
    index = ds.split(True)[:400]
    background, pose = encoder.style_groups(ds, index, 8)
    colours = torch.tensor(np.array([ds.images[i][:3, :].mean((0, 1)) for i in index]))
    facing = torch.from_numpy(ds.keypoints[index, 0, 0] > ds.keypoints[index, 5, 0])
    inside = torch.stack([colours[background == k].std(0).mean() for k in range(8) if (background == k).sum() > 1]).mean()
    assert inside < 0.5 * colours.std(0).mean()
    purity = [max(facing[pose == k].float().mean(), 1 - facing[pose == k].float().mean()) for k in range(8) if (pose == k).any()]
    assert min(purity) > 0.95           # a group of poses faces one way


# ==============================================================================================
# It never loses work and never trusts input
# ==============================================================================================

TALLY = {"runs killed": 0, "broken inputs tried": 0}        # counted when the test that did it has passed


@pytest.fixture(scope="session", autouse=True)
def tally(request):
    yield
    if any(TALLY.values()):
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + ", ".join(f"{what}: {n:,}" for what, n in TALLY.items()) + "; lost: none")


OFTEN = "import data, train; train.EVERY.update(log=1, sample=7, save=3); train.STYLE_STEPS = 3; data.run(train.main)"


def small_encoder(folder):
    """What a run started by `start` finds there, so that it need not train a real one."""
    train.get_encoder(data.load(str(folder / "mine")), folder / "runs/own-mine-encoder.pt", torch.device("cpu"))


def start(folder, code, *args):
    environment = dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_runs_resume_to_the_same_weights(tiny):
    """kill -9 at random moments of a real run, again and again; what comes out is the unbroken run's."""
    rng, steps = random.Random(0), 60
    small_encoder(tiny)
    run = start(tiny, OFTEN, *TINY, "--steps", steps, "--out", "whole")
    assert "done" in run.communicate()[0]
    kills = 0
    for _ in range(60):
        resume = ["--resume"] if (tiny / "killed/checkpoint.pt").exists() else []
        run = start(tiny, OFTEN, *TINY, "--steps", steps, "--out", "killed", *resume)
        doomed = kills < 8
        for line in run.stdout:
            if doomed and line.startswith("step "):         # it trains: kill it within the next tenths of a second
                time.sleep(rng.uniform(0, 0.25))
                run.kill()
                break
        run.stdout.close()
        kills += run.wait() == -9
        if (tiny / "killed/checkpoint.pt").exists():
            encoder.load_checkpoint(tiny / "killed/checkpoint.pt", "gan-cls")           # whole, always
        if run.returncode == 0:
            break
    equal = same(encoder.load_checkpoint(tiny / "whole/checkpoint.pt", "gan-cls"), encoder.load_checkpoint(tiny / "killed/checkpoint.pt", "gan-cls"))
    assert kills >= 3 and equal
    TALLY["runs killed"] += kills


def test_ctrl_c_saves_and_says_how_to_go_on(tiny):
    small_encoder(tiny)
    run = start(tiny, OFTEN, *TINY, "--steps", 100000, "--out", "run")
    for line in run.stdout:
        if line.startswith("step 5/"):
            run.send_signal(2)
            break
    rest = run.stdout.read()
    assert run.wait() == 130 and "--resume" in rest and "Traceback" not in rest
    saved = encoder.load_checkpoint(tiny / "run/checkpoint.pt", "gan-cls")
    assert saved["step"] == saved["history"][-1]["step"] >= 5


def test_a_run_that_goes_wrong_keeps_its_last_good_checkpoint(tiny, monkeypatch, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    before = (tiny / "run/checkpoint.pt").read_bytes()
    real = train.gan_cls_step
    monkeypatch.setattr(train, "gan_cls_step", lambda *a, **k: dict(real(*a, **k), loss_G=torch.tensor(float("nan"))))
    assert call(train, *TINY, "--steps", 8, "--out", "run", "--resume") == 2
    assert "no longer finite at step 6" in capsys.readouterr().err and (tiny / "run/checkpoint.pt").read_bytes() == before
    won = {"loss_D": torch.tensor(0.0), "loss_G": torch.tensor(20.0), "D(real)": torch.tensor(0.9999), "D(fake)": torch.tensor(1e-5)}
    monkeypatch.setattr(train, "gan_cls_step", lambda *a, **k: won)
    assert call(train, *TINY, "--steps", 40, "--out", "new") == 2
    assert "D has won" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(tiny, monkeypatch, capsys):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    before = (tiny / "run/checkpoint.pt").read_bytes()

    def full(content, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    assert call(train, *TINY, "--steps", 8, "--out", "run", "--resume") == 2
    assert "No space left" in capsys.readouterr().err and (tiny / "run/checkpoint.pt").read_bytes() == before
    assert [p.name for p in (tiny / "run").glob("*.tmp")] == []


def test_two_processes_prepare_at_once(here):
    own_folder(here / "mine")
    for _ in range(2):
        both = [start(here, "import data; data.run(data.main)", "--dataset", "mine") for _ in range(3)]
        assert [p.communicate()[0].count("12 pictures") for p in both] == [1, 1, 1]
        check_form(data.load("mine"), 12, 4, 1)
        assert len([p for p in (here / "cache").iterdir() if p.is_dir()]) == 1
        (here / "mine/kind0/p0.txt").write_text("something else")


PROMPTS = ["🐦🦜", "طائر أسود", "a\x00b\x1b[31m", "line\nline\ttab", "x" * 100_000, "-", "../../etc/passwd", "a b " * 5000, "\u202eabc", "ß" * 300, "\ud800"]


def test_prompts_of_every_sort(tiny, monkeypatch, capsys):
    import socket
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    monkeypatch.setattr(socket, "socket", None)             # sample.py never needs a network
    before = {p for p in tiny.rglob("*")}
    assert call(sample, *PROMPTS, "--weights", "run/checkpoint.pt", "--n", 2, "--out", "out.png") == 0
    assert {p for p in tiny.rglob("*")} - before == {tiny / "out.png"}          # and nothing else is written
    assert call(sample, "--drop-table", "--weights", "run/checkpoint.pt") == 2
    assert "Traceback" not in capsys.readouterr().err


def mutated(rng, content):
    """Some bytes changed, cut out, doubled, or the end missing."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        kind, at = rng.randrange(5), rng.randrange(len(content) or 1)
        if kind == 0:
            content[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at:at + rng.randint(1, 64)]
        elif kind == 3:
            content[at:at] = content[at:at + rng.randint(1, 64)]
        else:
            content[at:at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
    return bytes(content)


def test_fuzz_texts_and_captions():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) for _ in range(rng.randrange(260)))
        tokens = encoder.encode_text([text])
        assert tokens.shape == (1, 201) and tokens.max() <= 70
        captions = data.read_captions(rng.choice([b"", b"\xff\xfe", b"\xef\xbb\xbf"]) + rng.randbytes(rng.randrange(300)))
        assert all(c.strip() and "\n" not in c for c in captions)
    TALLY["broken inputs tried"] += 6000


def test_fuzz_pictures():
    rng = random.Random(1)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    seeds = []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        out = io.BytesIO()
        noise.save(out, kind)
        seeds.append(out.getvalue())
    good = 0
    for i in range(3000):
        try:
            pixels, _ = data.read_picture(mutated(rng, seeds[i % 6]))
            good += 1
            assert pixels.shape == (76, 76, 3) and pixels.dtype == np.uint8
        except ValueError:
            pass
    assert 100 < good < 2900
    TALLY["broken inputs tried"] += 3000


def test_fuzz_archives(here):
    rng = random.Random(2)
    files = {f"x/{i}.txt": bytes([65 + i]) * 300 for i in range(5)}
    seeds = [tar(here / "a", files).read_bytes(), tar(here / "b", files, "w").read_bytes(), zipped(here / "c", files).read_bytes()]
    before, good = set(here.iterdir()), 0
    for i in range(1500):
        (here / "a").write_bytes(mutated(rng, seeds[i % 3]))
        try:
            good += len(list(data.members(here / "a"))) > 0
        except data.UserError:
            pass
    assert 50 < good < 1450 and set(here.iterdir()) == before
    TALLY["broken inputs tried"] += 1500


def test_fuzz_checkpoints(tiny):
    assert call(train, *TINY, "--steps", 4, "--out", "run") == 0
    rng, whole = random.Random(3), torch.load(tiny / "run/checkpoint.pt", weights_only=True)
    content = io.BytesIO()
    torch.save({k: whole[k] for k in ("format", "kind", "settings", "average", "S", "encoder", "step")}, content)
    good = 0
    for _ in range(150):
        (tiny / "x.pt").write_bytes(mutated(rng, content.getvalue()))
        try:
            sample.Model(tiny / "x.pt")
            good += 1
        except data.UserError:
            pass
    for _ in range(150):                            # well-formed files that hold something else
        broken = {k: whole[k] for k in ("format", "kind", "settings", "average", "S", "encoder", "step")}
        place = broken
        for _ in range(rng.randint(0, 3)):
            inner = [v for v in place.values() if isinstance(v, dict)]
            if not inner:
                break
            place = rng.choice(inner)
        key = rng.choice(list(place))
        old = place[key]
        place[key] = rng.choice([None, -1, 10 ** 12, "x", [], {}, torch.zeros(3), float("nan")])
        torch.save(broken, tiny / "x.pt")
        try:
            sample.Model(tiny / "x.pt")
            good += 1
        except data.UserError:
            pass
        place[key] = old
    assert good < 250
    TALLY["broken inputs tried"] += 300


# ==============================================================================================
# The repository itself
# ==============================================================================================


def test_the_readme_points_to_the_code():
    """Each row of "Read it with the paper": the function is where the table says, and names the equation there."""
    rows = re.findall(r"^\| (.+?) \| (\w+\.py) \| `(\w+)` \| (\d+)-(\d+) \|$", (HERE / "README.md").read_text(), re.M)
    assert len(rows) >= 12
    for what, file, name, first, last in rows:
        text = (HERE / file).read_text()
        node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
        assert (node.lineno, node.end_lineno) == (int(first), int(last)), f"README: {name} is at {node.lineno}-{node.end_lineno} of {file}"
        body = "\n".join(text.splitlines()[node.lineno - 1:node.end_lineno]).lower()
        for mark in re.findall(r"eq\. \d|algorithm 1|line \d+|section \d[.\d]*|\d\.\d", what.lower()):
            assert mark in body, f"{file}: {name} does not name {mark}"


def test_five_modules_under_2000_lines():
    files = [HERE / f"{m}.py" for m in ("gan_cls", "encoder", "data", "train", "sample")]
    assert sum(len(f.read_text().splitlines()) for f in files) < 2000
    assert {f.name for f in HERE.glob("*.py")} == {f.name for f in files} | {"test_gan_cls.py"}
    ours = {"data", "encoder", "gan_cls", "train", "sample"}
    for f in files:                     # nothing but torch, numpy, pillow and the standard library
        imports = {a.name.split(".")[0] for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Import) for a in n.names}
        imports |= {n.module.split(".")[0] for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.ImportFrom)}
        assert imports - ours <= set(sys.stdlib_module_names) | {"torch", "numpy", "PIL"}
