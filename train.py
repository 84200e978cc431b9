"""Train the four models of the paper: GAN, GAN-CLS, GAN-INT and GAN-INT-CLS, then S.

    python train.py                                 # cartoon birds, from nothing to images
    python train.py --dataset cub                   # the paper's birds
    python train.py --variant all                   # the four models, one after the other
    python train.py --resume                        # go on with a run that was stopped

Algorithm 1 itself is `gan_cls_step` in gan_cls.py; the loop around it is `train`, below.
A run lies in runs/DATASET-VARIANT[-SEED]/ (or --out), its phi in runs/DATASET-encoder.pt.
"""

import argparse
import contextlib
import copy
import math
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
import encoder
from data import Batches, UserError
from gan_cls import (TEXT_DIM, Z_DIM, Discriminator, Generator, StyleEncoder, augment, gan_cls_step,
                     mode_seeking_loss, r1_penalty, sharpen, style_loss, update, update_ema)

# The four models are two switches of one step.
VARIANTS = {
    "gan":         dict(cls=False, int_=False),
    "gan-cls":     dict(cls=True, int_=False),
    "gan-int":     dict(cls=False, int_=True),
    "gan-int-cls": dict(cls=True, int_=True),
}

RECIPES = {
    # [A] section 5, for its 600 epochs.
    "paper": dict(
        steps=None,             # 600 epochs
        batch_size=64,
        lr_G=2e-4,              # halved every 100 epochs, as in the authors' code, not in [A]
        lr_D=2e-4,
        captions=(1, 1),        # h is one caption's embedding
        augment=False,          # the rest is not in the paper, and off
        sharpen=0.0,
        blends_to_D=False,
        mode_seeking=0.0,
        style=0.0,
        r1=None,
        ema=0.0,
        decay=1.0),
    # departs from the paper: makes fewer steps enough. Measured: weights/README.md.
    "quick": dict(
        steps=25_000,
        batch_size=32,          # twice the steps in the same time, on a CPU
        lr_G=4e-4,              # twice D's: with 2e-4 the images of a text differ less
        lr_D=2e-4,
        captions=(1, 5),        # h is the mean of 1 to 5 captions' embeddings, drawn per image
        augment=True,           # D sees images shifted, lighter, darker: it memorises less
        sharpen=0.0,            # off; above 0 D sees images with more fine detail, see "toy"
        blends_to_D=True,       # D sees the fake images of eq. 5 too: else one image fools it
        mode_seeking=0.05,      # term of G's loss: other z, other images; else z has little effect
        style=0.02,             # eq. 6 as a term of G's loss: S can then recover z from an image
        r1=(0.01, 0.01),        # gradient penalty on D, for image and text; 0.1: worse (by eye)
        ema=0.998,              # samples use a moving average of G over about 500 steps
        decay=0.1),             # from half of the steps on both rates fall, to this share of them
}
RECIPES["toy"] = dict(
    RECIPES["quick"],
    steps=4600,
    batch_size=24,              # a tenth less time a step than with 32
    sharpen=2.5,                # else dots and grids, and birds without legs and eyes
    style=0.1,                  # z decides where a bird looks; on photographs 0.1 gave dark spots
    r1=(0.3, 0.03))             # None: D memorised 150 species; (0.3, 0.3): it mixed up colours
RECIPES["gpu"] = dict(          # the default with CUDA: large batches, the paper's 600 epochs
    RECIPES["quick"],
    steps=None,                 # 600 epochs
    fewest_steps=5000,          # but never fewer than this
    batch_size=128,
    lr_G=5e-4,                  # a little more than for batches of 32
    lr_D=2.5e-4,
    ema=0.999,                  # over about 1,000 steps
    decay=0.04)

STYLE_STEPS = 1200              # of S, after G and D
EVERY = dict(log=50, save=500)      # steps; the second is a multiple of the first
FIRST_SAVES = (100, 250)            # steps: so that something is seen early


# ---- The loop --------------------------------------------------------------------------------

def train(run, batches, out_dir, sample_grid, eager=False, start=None):
    """Train to run.settings["steps"]. Returns False after Ctrl-C or kill.

    sample_grid(G) -> an image of samples. Progress lines are means since the last one. With CUDA
    the step is recorded, unless it is to be `eager`. start: time.time() before phi was trained.
    """
    settings = run.settings
    B = settings["batch_size"]
    per_epoch = max(1, len(batches) // B)
    on_cuda = run.device.type == "cuda"
    save_every = EVERY["save"] * (5 if on_cuda else 1)      # drawing and saving would take long
    step = Step(run, batches)
    if on_cuda and not eager:
        step.record()
    progress = Progress(run, start)
    order = None
    last = False
    with stop_signals() as stopped:
        while not last:
            epoch, i = divmod(run.step, per_epoch)
            if i == 0 or order is None:
                # The same order whenever seed and epoch are the same.
                generator = torch.Generator().manual_seed(1_000_003 * settings["seed"] + epoch)
                order = torch.randperm(len(batches), generator=generator).to(run.device)
            set_rates(run, epoch)
            progress.add(step(order[i * B:(i + 1) * B]))

            last = run.step == settings["steps"] or bool(stopped)
            if run.step % EVERY["log"] == 0 or last:        # only here does the CPU wait for CUDA
                progress.report(epoch)
            if run.step % save_every == 0 or run.step in FIRST_SAVES or last:
                renew_statistics(run.G_ema, batches)
                data.save_image(sample_grid(run.G_ema), out_dir / "samples" / f"{run.step:06d}.png")
                plot_history(run.history, out_dir / "loss.png")
                run.save(out_dir / "checkpoint.pt")
    return not stopped


class Step:
    """A training step: Algorithm 1 on a batch, and around it what the recipe adds."""

    def __init__(self, run, batches):
        self.run = run
        self.batches = batches
        self.positions = torch.arange(run.settings["batch_size"], device=run.device)

    def __call__(self, positions):
        """A step on the training images at `positions` (B,). Returns what gan_cls_step does."""
        run = self.run
        self.positions.copy_(positions)
        self.algorithm_1()
        run.step += 1
        if run.recipe["r1"] and run.step % 4 == 0:          # seldom, but 4 times as strong
            self.gradient_penalty()
        # A shorter average in the beginning, when the first weights are still random.
        update_ema(run.G_ema, run.G, min(run.recipe["ema"], run.step / (run.step + 10)))
        return self.out

    def algorithm_1(self):
        run = self.run
        self.x, self.h, h_wrong = self.batches.batch(self.positions)
        self.out = gan_cls_step(
            run.generate, run.D, run.opt_G, run.opt_D, self.x, self.h, h_wrong,
            **VARIANTS[run.settings["variant"]], view=run.view,
            blends_to_D=run.recipe["blends_to_D"], extra_G_loss=run.extra_G_loss,
            amp=run.amp, scaler=run.scaler)

    def gradient_penalty(self):
        """A step of D down R1, in 32 bits. A second derivative is slow: 16 images are enough."""
        run = self.run
        penalty = r1_penalty(run.D, run.view(self.x[:16]), self.h[:16], *run.recipe["r1"])
        update(run.opt_D, 4 * penalty, run.scaler)

    def record(self):
        """Record the parts as CUDA graphs; from then on a call of one replays its graph.

        A step is some 1,200 kernels. Launching them takes Python 32 ms on a fast card, which runs
        them in 9. A replayed graph reads and writes the same memory each time: self.positions, the
        weights, Adam's rates. Whatever raises here leaves the step as it was.
        """
        before = copy.deepcopy(self.run.state())
        parts = [self.algorithm_1]
        if self.run.recipe["r1"]:
            parts.append(self.gradient_penalty)
        try:
            warm_up(parts)
            self.run.load_state(before)         # of the warm-up nothing remains
            graphs = record_graphs(parts)
        except Exception as error:              # whatever a driver or a changed step raises
            self.run.D.requires_grad_(True)     # gan_cls_step may have failed with D frozen
            end_recording(self.run.device)
            self.run.load_state(before)
            reason = str(error).strip().split("\n")[0]
            return print(f"the step is not recorded, and runs kernel by kernel ({reason})")
        for part, graph in zip(parts, graphs):
            setattr(self, part.__name__, graph.replay)


def warm_up(parts):
    """What is set up at first use, such as Adam's state, must be there before it is recorded.
    Raises where a part reads a number from the device, which cannot be recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for mode in ("default", "default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for part in parts:
                    part()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)


def record_graphs(parts):
    """A CUDA graph of each function, all in one pool of memory."""
    graphs = []
    with torch.cuda.stream(torch.cuda.current_stream()):    # restored after a failure
        for part in parts:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                part()
            graphs.append(graph)
    return graphs


def end_recording(device):
    """A recording that failed leaves CUDA's random numbers in recording mode: begin anew."""
    if device.type == "cuda":
        new = torch.Generator(device).graphsafe_get_state()
        torch.cuda.default_generators[device.index or 0].graphsafe_set_state(new)


@torch.no_grad()
def renew_statistics(G, batches, size=1024, at_once=256):
    """Batch norm's statistics of an averaged G, from up to `size` training captions.

    Averaged weights need statistics of their own. In large batches, because single images can have
    very large activations. The run's own random numbers stay as they are.
    """
    for module in G.modules():
        if hasattr(module, "reset_running_stats"):      # batch norm
            module.reset_running_stats()
            module.momentum = None              # the plain mean over all batches from here on
    some = batches.training_images[::math.ceil(len(batches) / size)]
    h = batches.caption_table[batches.caption_starts[some]].float()
    z = torch.randn(len(h), Z_DIM, generator=torch.Generator().manual_seed(2)).to(h.device)
    G.train()
    chunks = math.ceil(len(h) / at_once)        # equally large: each weighs the same
    for z_part, h_part in zip(z.chunk(chunks), h.chunk(chunks)):
        G(z_part, h_part)
    G.eval()


def set_rates(run, epoch):
    """The learning rates of a step. [A] section 5: 2e-4; in the authors' code they are halved
    every 100 epochs. With a `decay` below 1: from half of the steps on in a straight line."""
    factor = 0.5 ** (epoch // 100)
    if run.recipe["decay"] < 1:
        factor = min(1.0, max(run.recipe["decay"], 2 - 2 * run.step / run.settings["steps"]))
    for optimizer, key in ((run.opt_G, "lr_G"), (run.opt_D, "lr_D")):
        rate = run.recipe[key] * factor
        group = optimizer.param_groups[0]
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)             # where a recorded step reads it
        else:
            group["lr"] = rate


class Progress:
    """Means of what the steps return: a row of run.history, and a line of output."""

    def __init__(self, run, begun=None):
        self.run = run
        self.first_step = run.step
        self.start = time.time()
        self.begun = begun or self.start
        self.sums = {}
        self.count = 0

    def add(self, out):
        for key, value in out.items():
            self.sums[key] = self.sums.get(key, 0) + value      # stays on the device
        self.count += 1

    def report(self, epoch):
        step = self.run.step
        steps = self.run.settings["steps"]
        means = {key: value.item() / self.count for key, value in self.sums.items()}
        if not all(math.isfinite(value) for value in means.values()):       # and nothing is saved
            raise UserError(f"a loss is no longer finite at step {step}: go on with --resume, or "
                            "begin again where nothing was saved; --precision fp32 may help")
        self.run.history.append(dict(step=step, **means))
        self.sums = {}
        self.count = 0
        seconds = (time.time() - self.start) / (step - self.first_step)
        left = (steps - step + STYLE_STEPS / 2) * seconds / 60      # a step of S takes half
        whole = (time.time() - self.begun) / 60 + left
        numbers = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
        print(f"step {step}/{steps}  epoch {epoch}  {numbers}  "
              f"{self.run.settings['batch_size'] / seconds:.0f} images/s  "
              f"{left:.1f} of {whole:.1f} minutes left")


@contextlib.contextmanager
def stop_signals():
    """A list that is no longer empty after Ctrl-C or kill: the loop ends its step and saves."""
    stopped = []
    handlers = {}
    with contextlib.suppress(ValueError):       # Python allows them in the main thread only
        for sig in (signal.SIGINT, signal.SIGTERM):
            handlers[sig] = signal.signal(sig, lambda *_: stopped.append(True))
    try:
        yield stopped
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)


def plot_history(history, path):
    """Two panels: the losses, and D's mean outputs."""
    steps = [row["step"] for row in history]
    panels = [{}, {}]
    for key in list(history[0])[1:]:
        panels[key.startswith("D(")][key] = steps, [row[key] for row in history]
    data.plot(panels, path)


# ---- The state of a run ----------------------------------------------------------------------

class Run:
    """Networks, optimizers and what else a checkpoint holds. phi_checkpoint: see encoder.build."""

    def __init__(self, settings, device, phi_checkpoint=None):
        self.settings = settings
        self.device = device
        self.phi_checkpoint = phi_checkpoint
        self.recipe = RECIPES[settings["recipe"]]
        self.step = 0
        self.history = []
        self.S = None               # trained when G and D are done

        torch.manual_seed(settings["seed"])
        # Channels last: how convolutions in 16 bits want images to lie in memory.
        put = dict(device=device, memory_format=torch.channels_last)
        self.G = Generator(settings["ngf"]).to(**put)
        self.D = Discriminator(settings["ndf"]).to(**put)
        self.Q = StyleEncoder(settings["ndf"]).to(**put) if self.recipe["style"] else None
        self.G_ema = copy.deepcopy(self.G).eval()

        # [A] section 5: Adam with beta1 = 0.5. Q is a second style encoder that learns together
        # with G, for the `style` term of G's loss. It is not S: that is trained on a frozen G.
        with_G = torch.nn.ModuleList([self.G, self.Q] if self.Q else [self.G])
        self.opt_G = adam(with_G, device)
        self.opt_D = adam(self.D, device)
        self.amp = data.autocast(device, settings["precision"])
        # fp16 has so small a range that gradients must be scaled; for the others it does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")

    # What all recipes but "paper" add to Algorithm 1:
    def seen_by_S(self, x):
        """What S and Q see of images (N, 3, 64, 64). Unaugmented, G would hide z in them."""
        return augment(x) if self.recipe["augment"] else x

    def view(self, x):
        """What D sees of images (N, 3, 64, 64), real or fake."""
        x = self.seen_by_S(x)
        return sharpen(x, self.recipe["sharpen"]) if self.recipe["sharpen"] else x

    def generate(self, z, texts):
        """G(z, texts), for gan_cls_step, and in the same pass what the mode-seeking term needs: the
        first texts with another z. One pass, so that batch norm sees one batch of all of them."""
        if not self.recipe["mode_seeking"]:
            return self.G(z, texts)
        n = self.settings["batch_size"] // 4
        z2 = torch.randn_like(z[:n])
        x = self.G(torch.cat([z, z2]), torch.cat([texts, texts[:n]]))
        self.second = z2, x[len(z):]
        return x[:len(z)]

    def extra_G_loss(self, z, texts, x_fake):
        """A scalar for G's loss. z (N, 100), texts (N, 1024), x_fake = generate(z, texts)."""
        loss = 0.0
        if self.recipe["mode_seeking"]:
            z2, x2 = self.second
            self.second = None                  # it would keep the step's gradients in memory
            pairs = mode_seeking_loss(z[:len(z2)], z2, x_fake[:len(z2)], x2)
            loss = loss + self.recipe["mode_seeking"] * pairs
        if self.recipe["style"]:
            # Eq. 6 rewards G too, through an S of its own (Q, as in InfoGAN, Chen et al. 2016):
            # z is to be read off the image, whatever the sentence. Where fine detail counts much,
            # Q sees none: else G writes more of z in dots.
            x = self.seen_by_S(x_fake)
            if self.recipe["sharpen"]:
                x = sharpen(x, -1)              # the 3x3 mean
            with self.amp:
                z_hat = self.Q(x)
            loss = loss + self.recipe["style"] * style_loss(z, z_hat)
        return loss

    def parts(self):
        """What has a state_dict. "average" is the name of G_ema in files."""
        parts = dict(G=self.G, D=self.D, Q=self.Q, average=self.G_ema, opt_G=self.opt_G,
                     opt_D=self.opt_D, scaler=self.scaler)
        return {name: part for name, part in parts.items() if part is not None}

    def state(self):
        """All that a step changes or reads, but `step`: a dict of state_dicts and random states."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state["rng"] = torch.get_rng_state()
        cuda = self.device.type == "cuda"
        state["cuda_rng"] = torch.cuda.get_rng_state(self.device) if cuda else None
        return state

    def load_state(self, state):
        for name, part in self.parts().items():
            if isinstance(part, torch.optim.Adam):
                load_adam(part, state[name])
            elif name != "scaler" or state[name]:       # empty: it was not in fp16
                part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def save(self, path):
        S = self.S.state_dict() if self.S else None
        data.save_checkpoint(
            path, kind="gan-cls", settings=self.settings, encoder=self.phi_checkpoint,
            step=self.step, history=self.history, S=S, **self.state())

    def restore(self, checkpoint):
        self.load_state(checkpoint)
        self.step = checkpoint["step"]
        self.history = checkpoint["history"]
        if checkpoint["S"]:
            self.S = data.load_network(StyleEncoder, checkpoint["S"]).to(self.device).eval()


def adam(net, device):
    """[A] section 5: Adam with beta1 = 0.5. The rate is set at every step, see `set_rates`."""
    options = dict(betas=(0.5, 0.999), fused=True)      # fused: one kernel for all weights
    if device.type == "cuda":       # a recorded step reads its rate there, and counts its steps
        options.update(lr=torch.zeros((), device=device), capturable=True)
    return torch.optim.Adam(net.parameters(), **options)


def load_adam(optimizer, state):
    """Adam's means and squares from a state_dict. Its options are the device's, not the file's."""
    if state["state"]:
        options = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(dict(state, param_groups=options))
    else:                                       # before the first step all of them are zero
        for values in optimizer.state.values():
            for value in values.values():
                value.zero_()


# ---- S, after G and D ------------------------------------------------------------------------

def train_style_encoder(run, batches, steps=STYLE_STEPS):
    """S by [A] eq. 6, with G frozen: draw z, generate, ask S for the z. -> a StyleEncoder.

    An S that always answers 0 would have a loss of E ||z||^2 = 100. It does not begin as Q: Q reads
    patterns that G made for it, which real images do not have. Begun so, two runs on the toy birds
    had a smaller loss, 27 and 46 instead of 75, but kept 78 % of the backgrounds instead of 93 %.
    """
    torch.manual_seed(run.settings["seed"])
    B = run.settings["batch_size"]
    S = StyleEncoder().to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(S.parameters(), 1e-3, fused=True)  # not in [A]: Adam's defaults
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.scaler.is_enabled())
    for step in range(1, steps + 1):
        z = torch.randn(B, Z_DIM, device=run.device)
        index = torch.randint(len(batches), (B,), device=run.device)
        h = batches.texts(batches.training_images[index])
        with run.amp:
            with torch.no_grad():
                x = run.seen_by_S(run.G_ema(z, h))
            loss = style_loss(z, S(x))
        update(optimizer, loss, scaler)
        if step == steps * 3 // 4:
            optimizer.param_groups[0]["lr"] /= 10
        if step % 200 == 0 or step == steps:
            print(f"style encoder: step {step}/{steps}  loss {loss.item():.1f} (of 100)")
    return S.eval()


# ---- Main: a new or a resumed run, G and D, S, what to do next -------------------------------

def main(argv=None):
    args = parse_args(argv)
    action = benchmark if args.benchmark else train_variant
    if args.export is not None:
        action = export
    for variant in VARIANTS if args.variant == "all" else [args.variant or "gan-int-cls"]:
        action(args, variant)


def train_variant(args, variant):
    start = time.time()
    # 1. A new run, or one that was stopped. With "all": go on with those that are there.
    folder = args.out or run_folder(args, variant)
    path = folder / "checkpoint.pt"
    resume = path.exists() if args.variant == "all" else args.resume
    if resume:
        run, ds = resumed_run(args, path)
    else:
        run, ds = new_run(args, variant, path)
    settings = run.settings
    precision = settings["precision"]
    phi, _ = encoder.build(run.phi_checkpoint, run.device)
    table = encoder.caption_table(ds, phi, precision)
    batches = Batches(ds, table, run.device, run.recipe["captions"])
    print(f"{settings['dataset']}, {settings['variant']}, recipe {settings['recipe']}: "
          f"{len(batches):,} images, {settings['steps']:,} steps, {precision} on {run.device}; "
          f"ngf {settings['ngf']}, ndf {settings['ndf']}")

    # 2. G and D. In the grids of samples all texts have the same noises.
    examples = data.example_images(ds)          # of unseen classes, as long as there are some
    texts = [ds.captions[i][0] for i in examples]
    unseen = int(ds.unseen_classes[ds.labels[examples]].sum())
    if unseen < len(texts):
        print(f"samples/: {unseen} rows are of unseen classes, those below of trained ones")
    h = encoder.embed(phi, texts, precision)
    z = torch.randn(8, Z_DIM, generator=torch.Generator().manual_seed(1)).to(run.device)

    @torch.no_grad()
    def sample_grid(G):
        rows = [data.to_pixels(G(z, text.expand(len(z), -1))) for text in h]
        return data.image_grid(rows, texts)

    if run.step < settings["steps"]:
        run.S = None                            # S belonged to the old G: retrain it
        if not train(run, batches, folder, sample_grid, args.eager, start):
            again = f"python train.py --out {shlex.quote(str(folder))} --resume"
            print(f"stopped at step {run.step} and saved; go on with:  "
                  f"{'the same command' if args.variant == 'all' else again}")
            sys.exit(130)

    # 3. S. fork_rng keeps the random state, so that a run that goes on later is unchanged.
    if run.S is None:
        print("G and D are done and saved; now S, which --resume begins anew if it is stopped")
        with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
            run.S = train_style_encoder(run, batches)
        run.save(path)

    print(f"done: {path}\nnow try: python sample.py --weights {shlex.quote(str(path))} "
          f"{shlex.quote(texts[-1])}")


def run_folder(args, variant):
    seed = f"-{args.seed}" if args.seed else ""
    return Path("runs") / f"{data.short_name(args.dataset or 'toy')}-{variant}{seed}"


def new_run(args, variant, path):
    """(run, data set) from the command line."""
    if path.exists():
        raise UserError(f"{path} is there already: go on with --resume, or name another --out")
    ds = data.load(args.dataset or "toy", args.source)
    settings = choose_settings(args, variant, ds, args.device)
    phi_checkpoint = encoder.get_encoder(       # one for all runs on a data set
        ds, args.device, settings["precision"], image_side=args.image_encoder,
        image_features=args.image_features)
    return Run(settings, args.device, phi_checkpoint), ds


def choose_settings(args, variant, ds, device):
    """A run's settings, a dict of plain values."""
    default = "gpu" if device.type == "cuda" else "quick"
    recipe = args.recipe or ("toy" if ds.name == "toy" else default)
    n = len(ds.training_images())
    batch_size = args.batch_size or min(RECIPES[recipe]["batch_size"], n)
    if not 4 <= batch_size <= n:
        raise UserError(f"--batch-size {batch_size} and {n} training images: expected 4 or more, "
                        "and no larger batch than there are images")

    steps = max(600 * (n // batch_size), RECIPES[recipe].get("fewest_steps", 0))    # 600 epochs
    steps = min(steps, RECIPES[recipe]["steps"] or steps)
    ngf = args.ngf or (128 if device.type == "cuda" else 32)    # the authors' width, or a quarter
    return dict(
        dataset=ds.name, digest=ds.digest(), variant=variant, recipe=recipe,
        batch_size=batch_size, steps=args.steps or steps, seed=args.seed or 0, ngf=ngf,
        ndf=args.ndf or max(1, ngf // 2),       # the authors': 128 and 64. A D as wide as G wins
        precision=data.pick_precision(device, args.precision or "auto"))


def resumed_run(args, path):
    """(run, data set) from a checkpoint. What the command line says must agree with it."""
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}; leave --resume out to begin it")
    checkpoint = data.load_checkpoint(path, "gan-cls")
    with data.checkpoint_errors(path):
        settings = checkpoint["settings"]
        for key in ("recipe", "batch_size", "seed", "ngf", "ndf", "variant"):
            value = getattr(args, key)
            if value not in (None, "all", settings[key]):
                option = "--" + key.replace("_", "-")
                raise UserError(f"{path} was begun with {option} {settings[key]}, not {value}: "
                                "leave it out to go on, or name another --out")
        trained_on = args.dataset or settings["dataset"]
    ds = data.load(trained_on, args.source)     # what fails here is not the checkpoint's fault
    with data.checkpoint_errors(path):
        if ds.digest() != settings["digest"]:
            raise UserError(f"{path} was trained on {settings['dataset']}, and {ds.name} has other "
                            "captions or another split: name the same data, or another --out")
        settings["dataset"] = ds.name           # the same data may have moved
        settings["steps"] = args.steps or settings["steps"]
        if settings["steps"] < checkpoint["step"]:
            raise UserError(f"{path} has done {checkpoint['step']:,} steps: ask for as many")
        if args.precision not in (None, "auto"):
            settings["precision"] = args.precision
        run = Run(settings, args.device, checkpoint["encoder"])
        run.restore(checkpoint)
    return run, ds


def export(args, variant):
    """What sampling needs of a finished run, its weights in 8 bits, to weights/NAME.pt."""
    if Path(args.export).name != args.export:
        raise UserError(f"--export takes a name, such as toy, not a path: {args.export}")
    path = (args.out or run_folder(args, variant)) / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, "gan-cls")
    with data.checkpoint_errors(path):
        if not checkpoint["S"]:
            raise UserError(f"{path} is not finished: let it go on with --resume")
        kept = ("settings", "step", "encoder", "average", "S")
        content = data.to_8_bits({key: checkpoint[key] for key in kept})
    out = encoder.WEIGHTS / f"{args.export}.pt"
    data.save_checkpoint(out, kind="gan-cls", **content)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB")


# ---- How fast it is --------------------------------------------------------------------------

def benchmark(args, variant):
    """Time the step of a data set, beside what the machine reaches at best. Prints."""
    device = args.device
    ds = data.load(args.dataset or "toy", args.source)
    settings = choose_settings(args, variant, ds, device)
    run = Run(settings, device)
    table = torch.randn(sum(map(len, ds.captions)), TEXT_DIM).half()    # in place of phi
    step = Step(run, Batches(ds, table, device, run.recipe["captions"]))
    print(f"{settings}; torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}")

    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=data.DTYPES[settings["precision"]])
    product = 2 * size ** 3 / seconds(lambda: a @ a) / 1e12
    print(f"  a matrix product: {product:.2f} TFLOP/s")
    with FlopCounterMode(display=False) as counter:
        step.algorithm_1()
    tera = counter.get_total_flops() / 1e12
    for how in ("eager", "recorded"):
        core = seconds(step.algorithm_1)
        whole = seconds(lambda: step(step.positions))
        print(f"  {how}: a step takes {1000 * whole:.1f} ms, {len(step.x) / whole:,.0f} images/s"
              f"; Algorithm 1 with what the recipe adds {1000 * core:.1f} ms, "
              f"{tera / core:.2f} TFLOP/s, {tera / core / product:.0%} of the product's rate")
        if device.type != "cuda":
            break
        step.record()


def seconds(function):
    """The mean time of a call; on CUDA it waits for the device."""
    timer = Timer("function()", globals=dict(function=function),
                  num_threads=torch.get_num_threads())
    timer.timeit(4)
    return timer.blocked_autorange(min_run_time=2).mean


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    count = data.int_between(1, 10_000_000)
    width = data.int_between(1, 1024)
    encoder.add_options(parser)
    # None means "not given": a resumed run then keeps its own value.
    parser.set_defaults(dataset=None, seed=None, precision=None)
    add("--variant", choices=[*VARIANTS, "all"],
        help="which of the paper's four models (default: gan-int-cls)")
    add("--recipe", choices=RECIPES,
        help="see RECIPES in train.py (default: toy for toy, gpu with CUDA, else quick)")
    add("--steps", type=count, help=f"toy: {RECIPES['toy']['steps']:,}, "
        f"quick: {RECIPES['quick']['steps']:,}, others: 600 epochs; S has {STYLE_STEPS:,} more")
    add("--batch-size", type=count, help="default: recipe toy 24, quick 32, paper 64, gpu 128")
    add("--ngf", type=width, help="width of G (the authors: 128, the default with CUDA; else 32)")
    add("--ndf", type=width, help="width of D (default: half of G's, as the authors')")
    add("--out", type=Path, metavar="DIR", help="default: runs/DATASET-VARIANT[-SEED]")
    add("--resume", action="store_true", help="go on with the run that is there")
    add("--eager", action="store_true", help="with CUDA: an unrecorded step, as for breakpoints")
    add("--export", metavar="NAME", help="write a finished run to weights/NAME.pt, for sample.py")
    add("--benchmark", action="store_true", help="time the step; trains nothing")
    add("--lr", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.lr:
        parser.error("there is no --lr: the rates stand in RECIPES in train.py, lr_G and lr_D")
    if args.variant == "all" and (args.out or args.export):
        parser.error("--variant all trains each model in its own folder: no --out, no --export")
    return args


if __name__ == "__main__":
    data.run_script(main)
