"""Generative Adversarial Text to Image Synthesis (Reed et al., ICML 2016): section 4, in code.

Read this file with the paper open: it goes in the paper's order.

    4.1  network architecture        -> Generator, Discriminator
    4.2  GAN-CLS; eq. 1 (of 3.1)     -> discriminator_loss, generator_loss
    4.3  GAN-INT, eq. 5              -> interpolate
         Algorithm 1, with both      -> gan_cls_step
    4.4  style transfer, eq. 6       -> StyleEncoder, style_loss
    --   what is not in the paper    -> augment, sharpen, mode_seeking_loss, r1_penalty,
                                         update_ema

"[A]" is that paper. The letters are its letters: t a caption, h = phi(t) its embedding (made by
`encoder.py`), h_wrong (h with a hat in [A]) that of a caption that is not the image's, z the noise,
x an image in [-1, 1], s a score (in the code its logit l, s = sigmoid(l)). "The authors' code"
is github.com/reedscot/icml2016.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

TEXT_DIM = 1024     # numbers in h = phi(t)
TEXT_SMALL = 128    # what G and D each compress them to, section 4.1
Z_DIM = 100         # numbers in z
MAP = 4             # G starts from a 4x4 map, D ends with one; each layer doubles or halves it


# ---- 4.1  Network architecture ---------------------------------------------------------------

def conv(c_in, c_out, kernel, stride=1, padding=0):
    # No bias: batch norm, which follows almost everywhere, would subtract it.
    # The authors' code holds all of them at zero.
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)


def deconv(c_in, c_out):
    """A deconvolution that doubles height and width."""
    return nn.ConvTranspose2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False)


def init_weights(net):
    """Initialise a network in place.

    Convolutions N(0, 0.02), batch-norm scales N(1, 0.02), biases 0, as in the authors' code.
    Linear layers like convolutions; the authors' text layers keep their library's default.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1.0, 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class Residual(nn.Module):
    """The bottleneck of the authors' code, which the paper does not mention: activation(x + f(x)).

    f is a 1x1, a 3x3 and a 3x3 convolution with `width` channels inside.
    (B, channels, H, W) -> the same shape.
    """

    def __init__(self, channels, width, activation):
        super().__init__()
        self.f = nn.Sequential(
            conv(channels, width, 1), nn.BatchNorm2d(width), activation,
            conv(width, width, 3, padding=1), nn.BatchNorm2d(width), activation,
            conv(width, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.activation = activation

    def forward(self, x):
        return self.activation(x + self.f(x))


class Generator(nn.Module):
    """G(z, h): noise and a sentence to an image. [A] section 4.1, figure 2 left.

    ngf: channels at 32x32; each step towards 4x4 doubles them. 128 is the authors' size.
    """

    def __init__(self, ngf=128, text_dim=TEXT_DIM, text_small=TEXT_SMALL):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.text = nn.Sequential(
            nn.Linear(text_dim, text_small), nn.LeakyReLU(0.2, inplace=True))   # (B, 128)
        self.net = nn.Sequential(
            # The first deconvolution, from 1x1 to 4x4, is one matrix product.
            nn.Linear(Z_DIM + text_small, 8 * ngf * MAP * MAP, bias=False),
            nn.Unflatten(1, (8 * ngf, MAP, MAP)),
            nn.BatchNorm2d(8 * ngf),                # no ReLU before a Residual, which ends with one
            Residual(8 * ngf, 2 * ngf, relu),                               # (B, 8*ngf,  4,  4)
            deconv(8 * ngf, 4 * ngf), nn.BatchNorm2d(4 * ngf),
            Residual(4 * ngf, ngf, relu),                                   # (B, 4*ngf,  8,  8)
            deconv(4 * ngf, 2 * ngf), nn.BatchNorm2d(2 * ngf), relu,        # (B, 2*ngf, 16, 16)
            deconv(2 * ngf, ngf), nn.BatchNorm2d(ngf), relu,                # (B,   ngf, 32, 32)
            # For 128x128 add a line here: deconv(ngf, ngf), nn.BatchNorm2d(ngf), relu,
            # one at the place that ImageTower marks, and double IMAGE_SIZE and CROP in data.py.
            # Trained networks no longer fit; the tests and the shapes in comments are for 64x64.
            # Two lengths in pixels may be left as they are: `shift` in augment, the six rows in
            # sample.py's background_kept.
            deconv(ngf, 3), nn.Tanh())                                      # (B,     3, 64, 64)
        init_weights(self)

    def forward(self, z, h):
        """z (B, 100), h (B, 1024) -> images (B, 3, 64, 64) in [-1, 1]."""
        zh = torch.cat([z, self.text(h)], 1)                                # (B, 228)
        return self.net(zh)


class ImageTower(nn.Sequential):
    """The convolutions of D, from an image to a 4x4 map: (B, 3, 64, 64) -> (B, 8*ndf, 4, 4)."""

    def __init__(self, ndf):
        leaky = nn.LeakyReLU(0.2, inplace=True)
        super().__init__(
            # For 128x128 add a line here: conv(3, ndf // 2, 4, 2, 1), leaky,
            # and let the next one begin with ndf // 2 channels in place of 3.
            conv(3, ndf, 4, 2, 1), leaky,                                   # (B,   ndf, 32, 32)
            conv(ndf, 2 * ndf, 4, 2, 1), nn.BatchNorm2d(2 * ndf), leaky,    # (B, 2*ndf, 16, 16)
            conv(2 * ndf, 4 * ndf, 4, 2, 1), nn.BatchNorm2d(4 * ndf), leaky,    # (B, 4*ndf, 8, 8)
            conv(4 * ndf, 8 * ndf, 4, 2, 1), nn.BatchNorm2d(8 * ndf),
            Residual(8 * ndf, 2 * ndf, leaky))                              # (B, 8*ndf,  4,  4)


class Discriminator(nn.Module):
    """D(x, h): is this image real, and does it fit the sentence? [A] section 4.1, figure 2 right.

    It has two parts, because only the second sees the text: `D.features(x)` is computed once an
    image, `D.score(f, h)` once an (image, text) pair. D(x, h) is both.

    ndf: channels at 32x32. joint: channels where image and text meet. These are the authors'
    8 * 64 for any ndf: a narrow D should still judge well whether the text fits.
    """

    def __init__(self, ndf=64, text_dim=TEXT_DIM, text_small=TEXT_SMALL, joint=512):
        super().__init__()
        leaky = nn.LeakyReLU(0.2, inplace=True)
        self.features = ImageTower(ndf)
        # The batch norm on the text is in the authors' code; the paper does not name it.
        self.text = nn.Sequential(
            nn.Linear(text_dim, text_small), nn.BatchNorm1d(text_small), leaky)     # (B, 128)
        self.joint = nn.Sequential(
            conv(8 * ndf + text_small, joint, 1), nn.BatchNorm2d(joint), leaky,
            nn.Flatten(), nn.Linear(MAP * MAP * joint, 1, bias=False))  # the 4x4 convolution
        init_weights(self)

    def score(self, f, h):
        """Features f (B, 8*ndf, 4, 4) and h (B, 1024) -> logits (B,); sigmoid(logit) is s.

        The compressed text stands behind f in depth, at all 16 places of the map.
        """
        text = self.text(h)                                         # (B, 128)
        text = text[:, :, None, None].expand(-1, -1, MAP, MAP)      # the same at all 16 places
        return self.joint(torch.cat([f, text], 1)).flatten()

    def forward(self, x, h):
        """x (B, 3, 64, 64), h (B, 1024) -> logits (B,)."""
        return self.score(self.features(x), h)


# ---- 3.1 and 4.2  The game, and the matching-aware discriminator (GAN-CLS) -------------------
# D returns logits l_real, l_wrong, l_fake; the paper's s_r, s_w, s_f are sigmoid(l), in 0 .. 1.
# The logarithms are a softplus, softplus(a) = log(1 + e^a), which never overflows:
#     log s = -softplus(-l)        log(1 - s) = -softplus(l)
# The logits are turned to 32 bits first: a mean in 16 bits would lose the small ones.

def log_s(l):
    return -F.softplus(-l.float())


def log_one_minus_s(l):
    return -F.softplus(l.float())


def discriminator_loss(l_real, l_wrong, l_fake):
    """Minus L_D of [A] Algorithm 1, because optimisers minimise.

    Logits (B,) of any float type -> scalar, float32, the mean over the batch. l_real {real image,
    right text}, l_wrong {real image, wrong text}, l_fake {fake image, right text}.
    l_wrong=None is the paper's baseline: eq. 1 given the text, D(x, h) and G(z, h), no wrong texts.
    """
    if l_wrong is None:
        # Eq. 1, given h:  log D(x, h) + log(1 - D(G(z, h), h))
        return -(log_s(l_real).mean() + log_one_minus_s(l_fake).mean())

    # Alg. 1, line 10:  L_D = log(s_r) + (log(1 - s_w) + log(1 - s_f)) / 2
    # The two kinds of wrong pairs together weigh as much as the right pairs.
    no = (log_one_minus_s(l_wrong).mean() + log_one_minus_s(l_fake).mean()) / 2
    return -(log_s(l_real).mean() + no)


def generator_loss(l_fake):
    """Minus L_G of [A] Algorithm 1. Logits (B,) -> scalar, float32, the mean over the batch."""
    # Alg. 1, line 12:  L_G = log(s_f)
    # Eq. 1 asks for min log(1 - s_f). Its derivative with respect to the logit is -s_f: almost 0
    # where D is sure (s_f near 0), and G would not learn. That of log(s_f) is 1 - s_f, almost 1.
    return -log_s(l_fake).mean()


# ---- 4.3  Learning with manifold interpolation (GAN-INT) -------------------------------------

def interpolate(h1, h2, beta=0.5):
    """The text in [A] eq. 5: the embedding of a sentence that nobody wrote, between two that exist.

    h1, h2 (N, 1024) -> (N, 1024). beta is the weight of h1.
    """
    # Eq. 5:  beta * phi(t1) + (1 - beta) * phi(t2).  Section 4.3: a fixed 0.5 works well.
    return beta * h1 + (1 - beta) * h2


# ---- Algorithm 1: one training step ----------------------------------------------------------

def update(optimizer, loss, scaler):
    """One step of an optimizer down a loss. `scaler` does nothing except in fp16."""
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def gan_cls_step(G, D, opt_G, opt_D, x, h, h_wrong, *, cls=True, int_=True,
                 view=nn.Identity(), blends_to_D=False, extra_G_loss=None,
                 amp=contextlib.nullcontext(), scaler=None):
    """One step of [A] Algorithm 1: D up its objective, then G up its own.

    Lines 3 and 4, h = phi(t), are done before: phi is trained first (encoder.py) and then fixed,
    so every caption is embedded once.

    x (B, 3, 64, 64) real images in [-1, 1], h (B, 1024) their texts, h_wrong (B, 1024) texts of
    other classes. The two switches give the paper's four models: GAN (neither), GAN-CLS (cls),
    GAN-INT (int_), GAN-INT-CLS (both). amp: an autocast context; scaler: a GradScaler, for fp16.

    G generates all fake images of the step at once: B for the captions, and behind them with int_
    B/2 for the blends of eq. 5, of captions i and B/2 + i. G's loss is the sum of a mean over the
    captions and one over the blends.

    Not in the paper; off unless given: view(images) is what D is shown of them, real or fake;
    blends_to_D shows D the fake images of the blends too, else G can fool it with one image for
    many of them; extra_G_loss(z, texts, x_fake) is a scalar that is added to G's loss.
    Returns a dict of scalars on the device: "loss_D", "loss_G" (without the extra) and the mean
    outputs of D, "D(real)", "D(fake)" and with cls "D(wrong)".
    """
    B = len(x)
    scaler = scaler or torch.amp.GradScaler(x.device.type, enabled=False)

    texts = h                                               # (B, 1024)
    if int_:
        half = B // 2
        blends = interpolate(h[:half], h[half:2 * half])
        texts = torch.cat([h, blends])                      # (B + B/2, 1024)
    z = torch.randn(len(texts), Z_DIM, device=x.device)     # line 5:  z ~ N(0, I)
    with amp:
        x_fake = G(z, texts)                                # line 6:  x_fake <- G(z, h)
        seen = view(x_fake)                                 # what D is shown, in both updates

    # (1) Update D: maximise  L_D = log(s_r) + (log(1 - s_w) + log(1 - s_f)) / 2
    shown = len(texts) if blends_to_D else B                # in the paper without the blends
    with amp:
        f_real = D.features(view(x))                        # once, for both texts
        l_real = D.score(f_real, h)                         # line 7:  {real image, right text}
        l_wrong = D.score(f_real, h_wrong) if cls else None     # line 8:  {real image, wrong text}
        l_fake = D(seen[:shown].detach(), texts[:shown])    # line 9:  {fake image, right text}
    loss_D = discriminator_loss(l_real, l_wrong, l_fake)    # line 10
    # [A] prints D <- D - alpha dL_D/dD, and line 13 likewise: down what should go up. Our losses
    # are minus L_D and minus L_G, so that down is right for them.
    update(opt_D, loss_D, scaler)                           # line 11

    # (2) Update G: maximise  L_G = log(s_f), and for eq. 5  log D(G(z, blend), blend)
    D.requires_grad_(False)                                 # it only passes gradients on to G
    with amp:
        l_G = D(seen, texts)                                # line 9 again, with the updated D
    loss_G = generator_loss(l_G[:B])                        # line 12
    if int_:
        # Eq. 5, -log D as in line 12. A mean of its own, as heavy as that of the captions, so
        # that blends are half of the sum. In the authors' code one mean is over both: a third.
        loss_G = loss_G + generator_loss(l_G[B:])
    extra = extra_G_loss(z, texts, x_fake) if extra_G_loss else 0
    update(opt_G, loss_G + extra, scaler)                   # line 13
    D.requires_grad_(True)

    out = {"loss_D": loss_D, "loss_G": loss_G}
    for name, logits in (("D(real)", l_real), ("D(wrong)", l_wrong), ("D(fake)", l_fake)):
        if logits is not None:
            out[name] = logits.float().sigmoid().mean()
    return {name: value.detach() for name, value in out.items()}


# ---- 4.4  Inverting the generator for style transfer -----------------------------------------

class StyleEncoder(nn.Module):
    """S(x): which z would have made this image? (B, 3, 64, 64) -> (B, 100). [A] section 4.4.

    [A]: convolutional, its layers not stated. Ours are D's tower and one linear layer.
    """

    def __init__(self, nsf=32):
        super().__init__()
        self.net = nn.Sequential(
            ImageTower(nsf), nn.Flatten(), nn.Linear(MAP * MAP * 8 * nsf, Z_DIM))
        init_weights(self)

    def forward(self, x):
        return self.net(x)


def style_loss(z, z_hat):
    """[A] eq. 6, z_hat = S(G(z, phi(t))). Both (B, 100) -> scalar, float32, mean over the batch."""
    # Eq. 6:  || z - S(G(z, phi(t))) ||_2^2: the sum of the squared differences, not their mean.
    return (z.float() - z_hat.float()).square().sum(1).mean()


# ---- Not in the paper: what makes fewer steps enough -----------------------------------------

def augment(x, shift=8):
    """Differentiable augmentation (Zhao et al., NeurIPS 2020) of all that D sees, real or fake.

    Each image of (B, 3, 64, 64) gets its own brightness, contrast and shift: up to `shift` pixels,
    the border repeated. So D memorises the training images less, and G still gets gradients.
    """
    B, _, _, W = x.shape
    random = torch.rand(4, B, device=x.device, dtype=torch.float32)     # 0 .. 1
    brightness = 0.4 * (random[0, :, None, None, None] - 0.5)           # (B, 1, 1, 1) -0.2 .. 0.2
    contrast = 0.8 + 0.4 * random[1, :, None, None, None]               # (B, 1, 1, 1)  0.8 .. 1.2
    mean = x.mean((1, 2, 3), keepdim=True)
    x = contrast * x + ((1 - contrast) * mean + brightness)

    # Pixel p of the result is read at p + offset: `matrix` is [identity | offset] for each image,
    # in units in which an image goes from -1 to 1.
    offset = ((2 * shift + 1) * random[2:]).long() - shift              # (2, B): rows, columns
    matrix = torch.eye(2, 3, device=x.device, dtype=x.dtype).repeat(B, 1, 1)
    matrix[:, :, 2] = offset.flip(0).T * 2 / W                          # columns come first there
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x, grid, "nearest", padding_mode="border", align_corners=False)


def sharpen(x, gain):
    """Images (N, 3, 64, 64) plus `gain` times their fine detail: what a 3x3 mean takes away.

    A deconvolution computes neighbouring pixels with different weights, so G easily leaves
    checkerboard artefacts. They are faint, and D notices them late; amplified, early.
    """
    W = x.shape[-1]
    near = x.new_ones(W, W).triu(-1).tril(1)                # 1 where two pixels are neighbours
    mean = near / near.sum(0)                               # each column: 1/3, at the border 1/2
    # x @ mean takes the mean of each pixel and its neighbours in a row, mean.T @ x in a column.
    return x + gain * (x - mean.T @ x @ mean)


def mode_seeking_loss(z1, z2, x1, x2):
    """Mode seeking (Mao et al., CVPR 2019): small when different noises give different images.

    z1, z2 (N, 100), x1, x2 (N, 3, 64, 64); x1[i] and x2[i] have the same text -> scalar.
    """
    far_z = (z1 - z2).abs().mean(1)                                         # (N,), about 1.13
    far_x = (x1.float() - x2.float()).abs().mean((1, 2, 3))                 # (N,)
    # A ratio for each pair, not of the means: a few large differences do not make up for many
    # small ones. The 0.05 bounds it where two images are equal.
    return (far_z / (far_x + 0.05)).mean()


def r1_penalty(D, x, h, weight_x, weight_h):
    """R1 (Mescheder et al., ICML 2018): how steep D is at real images with their right texts.

    For the text too, as in DF-GAN (Tao et al., CVPR 2022). x (B, 3, 64, 64), h (B, 1024), and a
    weight for each -> scalar with a gradient for D's weights. Under batch norm the slope is not
    each image's own: an image also moves the statistics by which the others are normalised.
    """
    x = x.detach().requires_grad_(True)
    h = h.detach().requires_grad_(True)
    slope_x, slope_h = torch.autograd.grad(D(x, h).sum(), (x, h), create_graph=True)
    # weight_x E |dD/dx|^2 + weight_h E |dD/dh|^2
    penalty_x = slope_x.square().sum((1, 2, 3)).mean()
    penalty_h = slope_h.square().sum(1).mean()
    return weight_x * penalty_x + weight_h * penalty_h


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net: weights, and batch norm's means and variances.

    G's moving average draws better images than its last weights.
    In place: what a state_dict holds are the network's own tensors.
    """
    old = [t for t in ema.state_dict().values() if t.is_floating_point()]
    new = [t for t in net.state_dict().values() if t.is_floating_point()]
    torch._foreach_lerp_(old, new, 1 - decay)
