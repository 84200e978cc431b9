"""Generative Adversarial Text to Image Synthesis (Reed et al., ICML 2016): section 4, in code.

Read this file with the paper open: it goes in the paper's order.

    4.1  network architecture        -> Generator, Discriminator
    4.2  GAN-CLS; and eq. 1          -> discriminator_loss, generator_loss
    4.3  GAN-INT, eq. 5              -> interpolate
         Algorithm 1                 -> gan_cls_step, with both
    4.4  style transfer, eq. 6       -> StyleEncoder, style_loss
    --   what is not in the paper    -> augment, sharpen, mode_seeking_loss, r1_step; pick_device, pick_autocast

"[A]" is that paper. The letters are its letters: t a caption, h = phi(t) its embedding (made by
`encoder.py`), h_wrong the embedding of a caption that does not describe the picture, z the noise,
x a picture in [-1, 1], s a score. "The authors' code" is github.com/reedscot/icml2016.
"""

import argparse, contextlib

import torch
import torch.nn.functional as F
from torch import nn

TEXT_DIM = 1024      # numbers in phi(t)
TEXT_SMALL = 128     # what G and D each compress them to, section 4.1
Z_DIM = 100          # numbers in z

# ---- 4.1  Network architecture ---------------------------------------------------------------
def conv(c_in, c_out, kernel, stride=1, padding=0):
    # No bias: batch norm, which follows almost everywhere, would subtract it. The authors' code holds all at zero.
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)

def deconv(c_in, c_out, kernel, stride=1, padding=0):
    return nn.ConvTranspose2d(c_in, c_out, kernel, stride, padding, bias=False)

def init_weights(net):
    """In place, as the authors' code: convolutions N(0, 0.02), batch-norm scales N(1, 0.02), biases 0; linear layers as convolutions."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(m.weight, 1.0, 0.02)
        if getattr(m, "bias", None) is not None:
            nn.init.zeros_(m.bias)
    return net

class Residual(nn.Module):
    """The bottleneck of the authors' code, which the paper does not mention: x + f(x), where f is a 1x1, a 3x3 and a
    3x3 convolution, `width` channels inside. (B, channels, H, W), kept."""
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
    """G(z, h): noise and a sentence to a picture. [A] section 4.1, figure 2 left.

    ngf: channels at 32x32; each step towards 4x4 doubles them. 128 is the authors' size."""
    def __init__(self, ngf=128, z_dim=Z_DIM, text_dim=TEXT_DIM, text_small=TEXT_SMALL):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.text = nn.Sequential(nn.Linear(text_dim, text_small), nn.LeakyReLU(0.2, inplace=True))
        self.net = nn.Sequential(
            # The first deconvolution, of a 1x1 "picture" to 4x4, is one matrix product.
            nn.Linear(z_dim + text_small, 8 * ngf * 4 * 4, bias=False),
            nn.Unflatten(1, (8 * ngf, 4, 4)), nn.BatchNorm2d(8 * ngf),      # (B, 8*ngf, 4, 4)
            Residual(8 * ngf, 2 * ngf, relu),                               # (B, 8*ngf,  4,  4)
            deconv(8 * ngf, 4 * ngf, 4, 2, 1), nn.BatchNorm2d(4 * ngf),
            Residual(4 * ngf, ngf, relu),                                   # (B, 4*ngf,  8,  8)
            deconv(4 * ngf, 2 * ngf, 4, 2, 1), nn.BatchNorm2d(2 * ngf), relu,   # (B, 2*ngf, 16, 16)
            deconv(2 * ngf, ngf, 4, 2, 1), nn.BatchNorm2d(ngf), relu,       # (B, ngf, 32, 32)
            deconv(ngf, 3, 4, 2, 1), nn.Tanh())                             # (B, 3, 64, 64)
        init_weights(self)

    def forward(self, z, h):
        """z (B, 100), h (B, 1024) -> pictures (B, 3, 64, 64) in [-1, 1]."""
        zh = torch.cat([z, self.text(h)], 1)                                # (B, 228)
        return self.net(zh)                                                 # (B, 3, 64, 64)

class PictureTower(nn.Sequential):
    """D's way from a picture to a 4x4 map: (B, 3, 64, 64) -> (B, 8*ndf, 4, 4)."""
    def __init__(self, ndf):
        leaky = nn.LeakyReLU(0.2, inplace=True)
        super().__init__(
            conv(3, ndf, 4, 2, 1), leaky,                                   # (B, ndf, 32, 32)
            conv(ndf, 2 * ndf, 4, 2, 1), nn.BatchNorm2d(2 * ndf), leaky,    # (B, 2*ndf, 16, 16)
            conv(2 * ndf, 4 * ndf, 4, 2, 1), nn.BatchNorm2d(4 * ndf), leaky,    # (B, 4*ndf, 8, 8)
            conv(4 * ndf, 8 * ndf, 4, 2, 1), nn.BatchNorm2d(8 * ndf),
            Residual(8 * ndf, 2 * ndf, leaky))                              # (B, 8*ndf, 4, 4)

class Discriminator(nn.Module):
    """D(x, h): is this picture real, and does it fit the sentence? [A] section 4.1, figure 2 right.

    In two parts, because only the second sees the text: `D.features(x)` is paid once a picture and `D.score(f, h)` once
    a (picture, text) pair. D(x, h) is both. ndf: channels at 32x32. joint: channels where picture and text meet, the
    authors' 8 * 64 at any ndf: a D that is narrow, so that G can keep up, should still judge well whether the text fits."""
    def __init__(self, ndf=64, text_dim=TEXT_DIM, text_small=TEXT_SMALL, joint=512):
        super().__init__()
        leaky = nn.LeakyReLU(0.2, inplace=True)
        self.features = PictureTower(ndf)
        # The batch norm on the text is the authors' code; the paper does not name it.
        self.text = nn.Sequential(nn.Linear(text_dim, text_small), nn.BatchNorm1d(text_small), leaky)
        self.joint = nn.Sequential(
            conv(8 * ndf + text_small, joint, 1), nn.BatchNorm2d(joint), leaky,     # (B, joint, 4, 4)
            nn.Flatten(), nn.Linear(16 * joint, 1, bias=False))             # the 4x4 convolution to (B, 1)
        init_weights(self)

    def score(self, f, h):
        """Features (B, 8*ndf, 4, 4) and h (B, 1024) -> logits (B,); sigmoid(logit) is the paper's s."""
        t = self.text(h)[:, :, None, None].expand(-1, -1, 4, 4)             # the text at all 16 places
        return self.joint(torch.cat([f, t.to(f.dtype)], 1)).flatten()

    def forward(self, x, h):
        """x (B, 3, 64, 64), h (B, 1024) -> logits (B,)."""
        return self.score(self.features(x), h)

# ---- 4 and 4.2  The game, and the matching-aware discriminator (GAN-CLS) ---------------------
# D returns logits l with s = sigmoid(l). The logarithms are then softplus, which never overflows:
#     log s = -softplus(-l)        log(1 - s) = -softplus(l)
# and the scores are turned to 32 bits first, since a mean in 16 bits would lose the small ones.

def log_s(logits):
    return -F.softplus(-logits.float())

def log_one_minus_s(logits):
    return -F.softplus(logits.float())

def discriminator_loss(s_real, s_wrong, s_fake):
    """Minus L_D of [A] Algorithm 1, for minimisers. Logits (B,) of any float type -> scalar, float32.

    s_real {real picture, right text}, s_wrong {real picture, wrong text}, s_fake {fake picture, right text}.
    s_wrong=None is the plain GAN of eq. 1, which knows no wrong texts."""
    if s_wrong is None:
        # Eq. 1:  log D(x) + log(1 - D(G(z)))
        return -(log_s(s_real).mean() + log_one_minus_s(s_fake).mean())
    # Alg. 1, line 10:  L_D = log(s_r) + (log(1 - s_w) + log(1 - s_f)) / 2
    # Half weight each, so that "no" weighs as much as "yes".
    return -(log_s(s_real).mean() + (log_one_minus_s(s_wrong).mean() + log_one_minus_s(s_fake).mean()) / 2)

def generator_loss(s_fake):
    """Minus L_G of [A] Algorithm 1. Logits (B,) -> scalar, float32."""
    # Alg. 1, line 12:  L_G = log(s_f)
    # Eq. 1 asks for min log(1 - s_f). Where D is sure (s_f near 0) that is flat and log(s_f) steep.
    return -log_s(s_fake).mean()

# ---- 4.3  Learning with manifold interpolation (GAN-INT) -------------------------------------
def interpolate(h1, h2, beta=0.5):
    """[A] eq. 5: the embedding of a sentence that nobody wrote, between two that exist. (N, 1024) each."""
    # Eq. 5:  beta * phi(t1) + (1 - beta) * phi(t2).  Section 4.3 found a fixed 0.5 to work well.
    return beta * h1 + (1 - beta) * h2

# ---- Algorithm 1: one training step ----------------------------------------------------------
def gan_cls_step(G, D, opt_G, opt_D, x, h, h_wrong, *, cls=True, int_=True,
                 amp=contextlib.nullcontext(), scaler=None, augment=lambda x: x, mode_seeking=0.0, Q=None, style=0.0):
    """One step of [A] Algorithm 1: D up its objective, then G up its own.

    x (B, 3, 64, 64) real pictures in [-1, 1], h (B, 1024) their texts, h_wrong (B, 1024) texts of other classes. The
    two switches give the paper's four models: GAN (neither), GAN-CLS (cls), GAN-INT (int_), GAN-INT-CLS (both). amp: an
    autocast context; scaler: a GradScaler, for fp16. Not in the paper, off by default: augment, mode_seeking, see below; Q, a
    StyleEncoder that opt_G moves too, with weight `style`. Returns a dict, on the device: loss_D, loss_G, mean D outputs."""
    B = len(x)
    scaler = scaler or torch.amp.GradScaler(x.device.type, enabled=False)

    # One pass of G draws all the pictures that the step needs: B for the captions, B/2 for the blends, which only G's
    # loss will see (D has no real picture to set beside a blend).
    texts = [h]
    if int_:
        # The first half with the second: the pictures of a batch are all different.
        texts.append(interpolate(h[:B // 2], h[B // 2:2 * (B // 2)]))
    judged = sum(map(len, texts))
    if mode_seeking:
        texts.append(h[:B // 4])                        # the same texts again, for another z
    texts = torch.cat(texts)                            # (B + B/2 [+ B/4], 1024)
    z = torch.randn(len(texts), Z_DIM, device=x.device)     # line 5:  z ~ N(0, I)
    with amp:
        x_fake = G(z, texts)                            # line 6:  x_fake <- G(z, h)

        # Lines 7 to 9, the three pairs. D looks at the real pictures once and judges them with both texts.
        f_real = D.features(augment(x))
        s_real = D.score(f_real, h)                     # {real picture, right text}
        s_wrong = D.score(f_real, h_wrong) if cls else None     # {real picture, wrong text}
        s_fake = D(augment(x_fake[:B].detach()), h)     # {fake picture, right text}; detached: G is not moved
        loss_D = discriminator_loss(s_real, s_wrong, s_fake)    # line 10
    opt_D.zero_grad(set_to_none=True)
    scaler.scale(loss_D).backward()
    scaler.step(opt_D)                                  # line 11:  D <- D - lr * d(loss_D)/dD

    D.requires_grad_(False)                             # it only passes gradients on now. s_f is asked anew, of the D of line 11
    with amp:
        seen = augment(x_fake[:judged])
        s = D(seen, texts[:judged])
        loss_G = generator_loss(s[:B])                  # line 12
        if int_:
            loss_G = loss_G + generator_loss(s[B:])     # eq. 5, -log D for log(1 - D) as in line 12
        total = loss_G
        if mode_seeking:
            total = total + mode_seeking * mode_seeking_loss(z[:B // 4], z[judged:], x_fake[:B // 4], x_fake[judged:])
        if Q:
            # departs from the paper: eq. 6 rewards G too, through an S of its own (the Q of InfoGAN, Chen et al. 2016): z is
            # to be read off the picture whatever the sentence. On CUB: Frechet distance 0.004, not 0.007; styles transfer.
            total = total + style * style_loss(z[:judged], Q(seen))
    opt_G.zero_grad(set_to_none=True)
    scaler.scale(total).backward()
    scaler.step(opt_G)                                  # line 13:  G <- G - lr * d(loss_G)/dG
    scaler.update()
    D.requires_grad_(True)

    out = {"loss_D": loss_D, "loss_G": loss_G, "D(real)": s_real, "D(wrong)": s_wrong, "D(fake)": s_fake}
    return {k: (v if k.startswith("loss") else v.float().sigmoid().mean()).detach()
            for k, v in out.items() if v is not None}

# ---- 4.4  Inverting the generator for style transfer -----------------------------------------
class StyleEncoder(nn.Module):
    """S(x): which z would have made this picture? [A] section 4.4, which leaves S open: ours is D's tower. (B, 3, 64, 64) -> (B, 100)."""
    def __init__(self, nsf=32, z_dim=Z_DIM):
        super().__init__()
        self.net = nn.Sequential(PictureTower(nsf), nn.Flatten(), nn.Linear(16 * 8 * nsf, z_dim))
        init_weights(self)

    def forward(self, x):
        return self.net(x)

def style_loss(z, z_hat):
    """[A] eq. 6, z_hat = S(G(z, phi(t))): both (B, 100) -> scalar, float32, mean over the batch."""
    # Eq. 6:  || z - S(G(z, phi(t))) ||_2^2: the sum of the squared differences, not their mean.
    return (z.float() - z_hat.float()).square().sum(1).mean()

# ---- Not in the paper: what makes a few thousand steps enough --------------------------------
def augment(x, shift=8):
    """Differentiable augmentation (Zhao et al., NeurIPS 2020) of all that D sees, real or fake.

    Each picture of (B, 3, 64, 64) gets its own brightness, contrast and shift (up to `shift` pixels, the border
    repeated). D can then not learn the training pictures by heart, and G still gets gradients through it."""
    B, _, H, W = x.shape
    r = torch.rand(4, B, 1, 1, device=x.device, dtype=torch.float32)
    x = x + 0.4 * (r[0, :, None] - 0.5)                 # brightness: -0.2 .. 0.2; more, and white could be grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (0.8 + 0.4 * r[1, :, None]) + mean     # contrast: 0.8 .. 1.2
    dy, dx = ((2 * shift + 1) * r[2:]).long() - shift   # (B, 1, 1) each
    rows = (torch.arange(H, device=x.device).view(1, H, 1) + dy).clamp(0, H - 1)
    cols = (torch.arange(W, device=x.device).view(1, 1, W) + dx).clamp(0, W - 1)
    every = torch.arange(B, device=x.device).view(B, 1, 1)
    return x.permute(0, 2, 3, 1)[every, rows, cols].permute(0, 3, 1, 2)

def sharpen(x, gain):
    """Pictures (N, 3, 64, 64) with `gain` times more of what a 3x3 mean takes away. Of such fine detail pictures hold so little that D
    learns last to look there, and meanwhile G's deconvolutions, whose weights take turns from pixel to pixel, paint chequers."""
    return x + gain * (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))

def mode_seeking_loss(z1, z2, x1, x2):
    """The mode-seeking term (Mao et al., CVPR 2019): small when two noises give two pictures.

    z (N, 100), x (N, 3, 64, 64), the text of x1[i] and x2[i] the same -> scalar."""
    far_z = (z1 - z2).abs().mean(1)                                             # (N,)
    far_x = (x1.float() - x2.float()).abs().mean((1, 2, 3))                     # (N,)
    # A ratio for each pair, not of the means: two extremes that share all noises do not pass for variety.
    return (far_z / (far_x + 0.05)).mean()          # far_z is near 1.13: two equal pictures cost 23, not infinity

def r1_step(D, opt_D, x, h, weight):
    """A step of D alone that makes it flat where picture and text are real and fit: R1 (Mescheder et al., ICML 2018), for
    the text too, as in DF-GAN (Tao et al., CVPR 2022). x (B, 3, 64, 64), h (B, 1024). In 32 bits.
    Without it D knows the toy species by heart within 500 steps, and what it says of a fake bird's crown teaches nothing."""
    x, h = x.detach().requires_grad_(True), h.detach().requires_grad_(True)
    slopes = torch.autograd.grad(D(x, h).sum(), (x, h), create_graph=True)
    penalty = sum(slope.flatten(1).square().sum(1).mean() for slope in slopes)      # E |dD/dx|^2 + E |dD/dh|^2
    opt_D.zero_grad(set_to_none=True)
    (weight * penalty).backward()
    opt_D.step()

# ---- The machine: where to compute, and in how many bits -------------------------------------
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

def pick_device(name="auto"):
    """"auto" is CUDA where there is one, else the CPU. For argparse: raises its error for what is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected a cpu or cuda device, got {name!r}")
    if device.type == "cuda":
        torch.cuda.set_device(device)       # CUDA graphs are recorded on the current one
    return device

def pick_autocast(device, precision="auto"):
    """(autocast context, GradScaler, name) for a device and "auto", "bf16", "fp16" or "fp32".

    Matrix products and convolutions run in 16 bits; the losses, batch-norm statistics, the weights and Adam's state
    stay in 32. auto: bf16 where the hardware multiplies it (CUDA of compute capability 8 up, CPUs with AMX or
    AVX512-BF16), fp16 on older CUDA, else fp32. Only fp16 has so small a range that gradients must be scaled."""
    device = torch.device(device)
    if precision == "auto":
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        else:
            precision = "bf16" if cpu_has_bf16() else "fp32"
    amp = torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else contextlib.nullcontext()
    return amp, torch.amp.GradScaler(device.type, enabled=precision == "fp16"), precision

def cpu_has_bf16():
    probes = "_is_avx512_bf16_supported", "_is_amx_tile_supported"      # not torch's public names: absent is False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and any(getattr(torch.cpu, probe, bool)() for probe in probes)
