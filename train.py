"""Train the four models of the paper: GAN, GAN-CLS, GAN-INT and GAN-INT-CLS, then the style encoder S.

    python train.py                                 # cartoon birds, from nothing to pictures
    python train.py --dataset cub --recipe paper    # the paper's birds, by the paper's recipe
    python train.py --variant gan-cls --steps 2000
    python train.py --resume                        # go on with a run that was stopped

Algorithm 1 itself is `gan_cls_step` in gan_cls.py; here is what surrounds it. A run lies in runs/DATASET-VARIANT/ (or --out).
"""

import argparse, copy, json, math, signal, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data, encoder
from data import UserError, save_picture, sheet
from encoder import centre_crops, embed, fitting, load_checkpoint, load_into, picture_tensor, random_crops, roc, save_checkpoint, to_pixels
from gan_cls import DTYPES, Z_DIM, Discriminator, Generator, StyleEncoder, augment, gan_cls_step, pick_autocast, r1_step, sharpen, style_loss

# variant: (matching-aware, interpolated). One loop, two switches.
VARIANTS = {"gan": (False, False), "gan-cls": (True, False), "gan-int": (False, True), "gan-int-cls": (True, True)}

RECIPES = {
    # [A] section 5, but for phi (`whiten`) and its captions, one of 10 where [A] used 5: --recipe paper.
    "paper": dict(batch_size=64, lr_G=2e-4, lr_D=2e-4, captions=1, augment=False, sharpen=0.0, mode_seeking=0.0, style=0.0, r1=0.0,
                  average=0.0, decay=False),
    # departs from the paper, to turn its 600 epochs into minutes. Smaller batches, so more steps; G's rate doubled, both falling over the
    # last half; the text of a picture is the mean of several of its captions (the authors' code: 4); D sees augmented pictures and is kept
    # smooth (r1_step); G is rewarded for heeding z (mode_seeking; eq. 6, by `style`); samples come from the average of its last 500 steps or so.
    "quick": dict(batch_size=32, lr_G=4e-4, lr_D=2e-4, captions=5, augment=True, sharpen=0.0, mode_seeking=0.05, style=0.02, r1=0.01,
                  average=0.998, decay=True)}
# departs from the paper: a D that knows 150 drawn species by heart needs ten times the smoothing; on photographs so much of it leaves D
# deaf to the text. A `style` of 0.1 makes z say where a drawn bird looks; on photographs so much turns into patterns that only Q can read.
# Shown sharpened pictures, D sees to it that drawn birds have legs, eyes and no chequers; on photographs it gets too far ahead of G.
RECIPES["toy"] = dict(RECIPES["quick"], r1=0.1, style=0.1, sharpen=1.5)

TOY_STEPS, STYLE_STEPS = 6000, 1200             # of G and D on the toy birds; of S
EVERY = dict(log=50, sample=500, save=500)      # steps between two progress lines, grids, checkpoints: the last two multiples of the first

# ---- Batches ---------------------------------------------------------------------------------
class Batches:
    """All that a step reads, on the device: the pictures as uint8, every caption's embedding as one table. A batch is a few gathers."""
    def __init__(self, ds, phi, device, captions=1):
        self.images, self.captions = picture_tensor(ds, device), captions
        self.starts = encoder.caption_starts(ds).to(device)
        self.table = embed(phi, [t for c in ds.captions for t in c]).half()      # (captions of all pictures, 1024)
        order = ds.split(False)
        order = order[np.argsort(ds.labels[order], kind="stable")]               # training pictures, class by class
        _, class_of, size = np.unique(ds.labels[order], return_inverse=True, return_counts=True)
        if len(size) < 2:
            raise UserError("training needs pictures of at least two classes: a wrong text comes from another class")
        self.order, self.class_of, self.size = (torch.from_numpy(a).to(device) for a in (order, class_of, size))
        self.first = self.size.cumsum(0) - self.size

    def texts(self, pictures):
        """h of pictures (B,): the mean of `captions` of each one's captions, drawn at random. (B, 1024)"""
        start, count = self.starts[pictures], self.starts[pictures + 1] - self.starts[pictures]
        draw = (torch.rand(self.captions, len(pictures), device=pictures.device) * count).long()
        return self.table[start + draw].float().mean(0)

    def batch(self, places):
        """places (B,) in the order class by class -> x, h, h_wrong."""
        B, classes, mine = len(places), len(self.size), self.class_of[places]
        draw = lambda n: (torch.rand(B, device=places.device, dtype=torch.float64) * n).long()     # 0 .. n - 1
        other = (mine + 1 + draw(classes - 1)) % classes                         # a class that is not the picture's
        wrong = self.first[other] + draw(self.size[other])
        return random_crops(self.images, self.order[places]), self.texts(self.order[places]), self.texts(self.order[wrong])

def get_encoder(ds, path, device, image_side=None, log=print, **options):
    """The text encoder's checkpoint at `path`, trained first when not there. image_side: None is any. Raises UserError where it has another."""
    log(f"text encoder: {path}" + ("" if path.exists() else " is not there yet, training one"))
    if not path.exists():
        save_checkpoint(path, **encoder.train_encoder(ds, device, image_side=image_side or "conv", log=log, **options))
    checkpoint = load_checkpoint(path, "encoder")
    with fitting(path):
        made = checkpoint["settings"]
        if image_side not in (None, made["image_side"]) or Path(made["dataset"]).resolve() != Path(ds.name).resolve():
            raise UserError(f"{path} was trained on {made['dataset']} with image side {made['image_side']}, not on {ds.name} with {image_side or 'any'}: remove it to train another")
    return checkpoint

# ---- Pictures of the progress ----------------------------------------------------------------
def plot(panels, path, size=360):
    """Line plots side by side, as a picture: panels is a list of {name: (xs, ys)}; both axes begin at 0."""
    pen = ImageDraw.Draw(page := Image.new("RGB", (size * len(panels), size), "white"))
    for n, lines in enumerate(panels):
        left, right, top, bottom = n * size + 45, (n + 1) * size - 15, 20 + 14 * len(lines), size - 30
        wide, high = (max(1e-9, max(float(v) for line in lines.values() for v in line[axis])) for axis in (0, 1))
        pen.rectangle((left, top, right, bottom), outline="grey")
        for place, anchor, text in (((left - 6, top), "rm", f"{high:.1f}"), ((left - 6, bottom), "rm", "0"), ((right, bottom + 12), "rm", f"{wide:g}")):
            pen.text(place, text, "black", anchor=anchor)
        for i, (name, (xs, ys)) in enumerate(lines.items()):
            points = [(left + (right - left) * float(x) / wide, bottom - (bottom - top) * float(y) / high) for x, y in zip(xs, ys)]
            ink = ("black", "red", "green", "orange", "blue")[i % 5]
            if len(points) > 1:
                pen.line(points, ink, 2)
            pen.text((left, 10 + 14 * i), name, ink, anchor="lm")
    save_picture(page, path)

# ---- Training --------------------------------------------------------------------------------
class Trainer:
    """The state of a run, and how it is saved and restored."""
    def __init__(self, settings, device, encoder_checkpoint):
        self.settings, self.device, self.encoder = settings, device, encoder_checkpoint
        self.recipe = RECIPES[settings["recipe"]]
        see, gain = augment if self.recipe["augment"] else (lambda x: x), self.recipe["sharpen"]
        self.augment, self.shown, self.r1_step = see, (lambda x: sharpen(see(x), gain)) if gain else see, r1_step     # shown: to D
        torch.manual_seed(settings["seed"])
        layout = dict(device=device, memory_format=torch.channels_last)     # what convolutions in 16 bits like
        self.G = Generator(settings["ngf"]).to(**layout)
        self.D = Discriminator(settings["ndf"]).to(**layout)
        self.Q = StyleEncoder(settings["ndf"]).to(**layout) if self.recipe["style"] else None
        self.average = copy.deepcopy(self.G).eval()
        adam = dict(betas=(0.5, 0.999), fused=True)         # [A] section 5: beta1 = 0.5. Rates as tensors: a recorded step reads them anew
        self.opt_G = torch.optim.Adam([p for net in (self.G, self.Q) if net for p in net.parameters()], torch.tensor(self.recipe["lr_G"], device=device), **adam)
        self.opt_D = torch.optim.Adam(self.D.parameters(), torch.tensor(self.recipe["lr_D"], device=device), **adam)
        self.amp, self.scaler, self.precision = pick_autocast(device, settings["precision"])
        self.step, self.history, self.S, self.graph, self.capture_at = 0, [], None, None, None

    def parts(self):
        return {k: getattr(self, k) for k in ("G", "D", "Q", "average", "opt_G", "opt_D", "scaler") if getattr(self, k)}

    def save(self, path):
        save_checkpoint(path, kind="gan-cls", settings=self.settings, encoder=self.encoder, step=self.step,
                        history=self.history, S=self.S and self.S.state_dict(), rng=torch.get_rng_state(),
                        cuda_rng=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                        **{k: v.state_dict() for k, v in self.parts().items()})

    def restore(self, checkpoint):
        for k, v in self.parts().items():
            if k != "scaler" or checkpoint[k]:              # empty: the run was in bf16 or fp32 until now
                v.load_state_dict(checkpoint[k])
        for group in self.opt_G.param_groups + self.opt_D.param_groups:     # the run may have been on another device
            group["lr"] = group["lr"].to(self.device)
        self.step, self.history = checkpoint["step"], checkpoint["history"]
        for row in self.history:
            if not {"step", "loss_D", "loss_G", "D(real)", "D(fake)"} <= row.keys() == self.history[0].keys() or not all(map(math.isfinite, row.values())):
                raise ValueError("history")
        if checkpoint["S"]:
            self.S = load_into(StyleEncoder, checkpoint["S"]).to(self.device, memory_format=torch.channels_last).eval()
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.device)

    def update_average(self):
        """average <- d * average + (1 - d) * G, with a smaller d in the first steps; d = 0 is G itself."""
        d = min(self.recipe["average"], self.step / (self.step + 10))
        with torch.no_grad():
            ours, theirs = ([t for t in net.state_dict().values() if t.is_floating_point()] for net in (self.average, self.G))
            torch._foreach_lerp_(ours, theirs, 1 - d)

    def algorithm1(self, batch):
        """One step of Algorithm 1 on (x, h, h_wrong) -> its losses, still on the device."""
        cls, int_ = VARIANTS[self.settings["variant"]]
        return gan_cls_step(self.G, self.D, self.opt_G, self.opt_D, *batch, cls=cls, int_=int_, amp=self.amp, scaler=self.scaler,
                            augment=self.shown, mode_seeking=self.recipe["mode_seeking"], Q=self.Q, style=self.recipe["style"])

    def train_step(self, batches, places):
        """The step and what follows it: at every fourth the smoothing of D, four times as strong, and G's average."""
        if self.graph:
            self.graph_places.copy_(places)
            self.graph.replay()
            (x, h, _), out = self.recorded
        else:
            x, h, _ = batch = batches.batch(places)
            out = self.algorithm1(batch)
        self.step += 1
        if self.recipe["r1"] and self.step % 4 == 0:
            self.r1_step(self.D, self.opt_D, self.shown(x), h, 4 * self.recipe["r1"])
        self.update_average()
        if self.step == self.capture_at:
            self.capture(batches, places)
        return out

    def compile(self, log=print):
        """On CUDA, where launching the kernels of so small a step takes longer than running them: fuse them (torch.compile); after three
        steps record the whole step and replay it from then on (a CUDA graph). fp16, for older cards, is not recorded: nobody has tried."""
        log("compiling the step: a minute or two (--no-compile skips it)")
        self.capture_at = None if self.precision == "fp16" else self.step + 3
        try:                            # something small first: without a compiler each part would fail, in a hundred lines
            torch.compile(torch.sin)(torch.ones(8, device=self.device))
        except Exception as error:      # whatever the compilers raise
            return log(f"going on without compiling: {getattr(error, 'inner_exception', error)}".splitlines()[0])     # torch 2.6 wraps it
        torch._dynamo.config.suppress_errors = True         # what cannot be compiled runs as it is
        torch._dynamo.config.cache_size_limit = 32          # the parts share one counter of compiled versions
        for part in filter(None, (self.G, self.Q, self.D.features, self.D.text, self.D.joint)):
            part.compile(dynamic=False)
        self.r1_step = torch.compiler.set_stance("force_eager")(r1_step)     # what is compiled has no second derivative

    def capture(self, batches, places):
        self.graph_places, graph = places.clone(), torch.cuda.CUDAGraph()
        self.opt_G.param_groups[0]["capturable"] = self.opt_D.param_groups[0]["capturable"] = True
        try:
            with torch.cuda.graph(graph):
                self.recorded = (batch := batches.batch(self.graph_places)), self.algorithm1(batch)     # rewritten by each replay
        except RuntimeError as error:           # CUDA's random generator stays stuck in recording
            raise UserError(f"the step cannot be recorded here ({str(error).splitlines()[0]}): run again with --no-compile") from None
        self.opt_G.param_groups[0]["capturable"] = self.opt_D.param_groups[0]["capturable"] = False     # r1_step runs outside
        self.graph = graph

    def set_rates(self, epoch, first):
        """The learning rates of an epoch whose first step is `first`. [A] section 5: 2e-4, in the authors' code halved every 100 epochs.
        Recipe "quick": down to a tenth, in a straight line, over the last half of the steps."""
        factor = min(1.0, max(0.1, 2 - 2 * first / self.settings["steps"])) if self.recipe["decay"] else 0.5 ** (epoch // 100)
        self.opt_G.param_groups[0]["lr"].fill_(self.recipe["lr_G"] * factor)
        self.opt_D.param_groups[0]["lr"].fill_(self.recipe["lr_D"] * factor)

def train(run, batches, out_dir, show, log=print):
    """Train to settings["steps"]; show(G) -> a picture of samples. Returns False if it was interrupted."""
    s, start, began, logged, sums, last = run.settings, time.time(), run.step, run.step, {}, False
    B, n, per_epoch = s["batch_size"], len(batches.order), max(1, len(batches.order) // s["batch_size"])
    stop = []                           # Ctrl-C and kill: finish the step, or one more, save, go
    handlers = {sig: signal.signal(sig, lambda *_: stop.append(1)) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not last:
            epoch, i = divmod(run.step, per_epoch)
            if i == 0 or run.step == began:
                # The order of an epoch depends on seed and epoch alone: a resumed run finds the same one.
                order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * s["seed"] + epoch)).to(run.device)
                run.set_rates(epoch, epoch * per_epoch)
            sums = {k: sums.get(k, 0) + v for k, v in run.train_step(batches, order[i * B:(i + 1) * B]).items()}     # on the device

            last = run.step == s["steps"] or bool(stop)
            if run.step % EVERY["log"] == 0 or last:      # only here does the CPU wait for the numbers
                now, sums, logged = {k: v.item() / (run.step - logged) for k, v in sums.items()}, {}, run.step      # means: one batch says little
                check_health(now, run.history, run.step)
                run.history.append(dict(step=run.step, **now))
                rate = (run.step - began) / (time.time() - start)
                log(f"step {run.step}/{s['steps']}  epoch {epoch}  " + "  ".join(f"{k} {v:.3f}" for k, v in now.items())
                    + f"  {rate * B:.0f} pictures/s  {(s['steps'] - run.step) / rate / 60:.1f} min left")
            if run.step % EVERY["sample"] == 0 or last:
                save_picture(show(run.average), out_dir / "samples" / f"{run.step:06d}.png")
                curves = lambda *keys: {k: ([r["step"] for r in run.history], [r[k] for r in run.history]) for k in keys if k in now}
                plot([curves("loss_D", "loss_G"), curves("D(real)", "D(wrong)", "D(fake)")], out_dir / "loss.png")
            if run.step % EVERY["save"] == 0 or last:
                run.save(out_dir / "checkpoint.pt")
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
    return not stop

def check_health(now, history, step):
    """Stop a run that cannot recover, before it overwrites its last good checkpoint."""
    if not all(map(math.isfinite, now.values())):
        raise UserError(f"a loss is no longer finite at step {step}: go on from the last checkpoint with --resume, and "
                        "if it comes again try --precision fp32 or another --seed")
    if all(r["D(real)"] > 0.999 and r["D(fake)"] < 0.001 for r in history[-5:] + [now]) and len(history) >= 5:
        raise UserError(f"D has won at step {step}: it is certain of every picture and teaches G nothing more; try "
                        "--recipe quick, a smaller --ndf or another --seed")

def train_style_encoder(run, batches, steps, log=print):
    """S by [A] eq. 6, on a frozen G: draw z, let G paint, ask S for the z. Always answering 0 would lose E||z||^2 = 100."""
    torch.manual_seed(run.settings["seed"])
    S, scaler = StyleEncoder().to(run.device, memory_format=torch.channels_last), pick_autocast(run.device, run.precision)[1]
    optimiser = torch.optim.Adam(S.parameters(), 1e-3, betas=(0.9, 0.999), fused=True)
    B, start = run.settings["batch_size"], time.time()
    for step in range(1, steps + 1):
        z = torch.randn(B, Z_DIM, device=run.device)
        pictures = batches.order[torch.randint(len(batches.order), (B,), device=run.device)]
        with run.amp:
            with torch.no_grad():
                x = run.augment(run.average(z, batches.texts(pictures)))    # else S reads patterns that no photograph has
            loss = style_loss(z, S(x))
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        if step == steps * 3 // 4:
            optimiser.param_groups[0]["lr"] /= 10
        if step % 200 == 0 or step == steps:
            log(f"style encoder: step {step}/{steps}  loss {loss.item():.1f} (of 100)  {time.time() - start:.0f} s")
    return S.eval()

# ---- Measuring: the four models side by side ([A] sections 5.1 and 5.2) ----------------------
@torch.no_grad()
def paint(G, h, seed=0):
    """Pictures (N, 3, 64, 64) in [-1, 1] of texts (N, 1024), a fresh noise each, as a viewer gets them: in 8 bits."""
    z = torch.randn(len(h), Z_DIM, generator=torch.Generator().manual_seed(seed)).to(h.device)
    return torch.cat([(G(z[i:i + 256], h[i:i + 256]) * 127.5).round() / 127.5 for i in range(0, len(h), 256)])

@torch.no_grad()
def measure(ds, batches, G, S, scorer, groups, device):
    """One trained model on the unseen classes -> dict of numbers, S (n, 100) and captions (n, 1024) of the real pictures. scorer: an encoder's
    checkpoint that had no part in the training of G; groups: {name: pairs} of style verification."""
    phi, v = encoder.build(scorer, device)
    index, labels, classes, means = encoder.unseen(ds, phi)
    torch.manual_seed(0)
    real, fake, out = centre_crops(batches.images, index.to(device)), paint(G, batches.texts(index.to(device))), {}
    for name, x in (("real", real), ("fake", fake)):
        emb = encoder.embed_pictures(v, x).cpu()
        out.update({f"top-{k} {name}": encoder.top(k, emb, labels, classes, means) for k in (1, 5)})
    # Spread: standard deviation of a pixel over 16 noises of one text, against that over the pictures of one class.
    firsts = torch.stack([index[labels == c][0] for c in classes]).to(device)
    drawn = paint(G, batches.texts(firsts).repeat_interleave(16, 0), seed=1).unflatten(0, (-1, 16))
    out["spread"] = (drawn.std(1).mean() / torch.stack([real[(labels == c).to(device)].std(0).mean() for c in classes]).mean().clamp(min=1e-6)).item()
    # Features of the Frechet distance: the scorer's last map of 4x4x256, averaged over its places.
    tower = lambda x: torch.cat([v.net[0](part) for part in x.split(256)]).cpu()            # (N, 256, 4, 4)
    out["Frechet"] = encoder.frechet_distance(tower(fake).mean((2, 3)), tower(real).mean((2, 3)))
    if ds.keypoints is not None:
        out.update(measure_transfer(ds, batches, G, S, index, tower, device))
    style, said = S(real).cpu(), batches.texts(index.to(device)).cpu()
    for name, pairs in groups.items():
        out[f"AUC {name}"] = encoder.verify_style(style, pairs)
        out[f"AUC {name}, captions"] = encoder.verify_style(said, pairs)
    return out, style, said

def measure_transfer(ds, batches, G, S, index, tower, device):
    """Style transfer ([A] section 4.4): every unseen picture's style with another's text. How often do the colour above the bird (of 8
    groups; chance about 1 in 8) and the direction (a linear probe on features; chance 1 in 2) stay the query's?"""
    facing = torch.from_numpy(np.sign(ds.keypoints[:, 0, 0] - ds.keypoints[:, 5, 0]))       # beak against tail; nan: not seen
    known = lambda i: i[facing[i].isfinite()]
    train, query = known(torch.from_numpy(ds.split(False)))[::2], known(index)
    pictures = lambda i: centre_crops(batches.images, i.to(device))
    columns = lambda x: tower(x).mean(2).flatten(1)                                         # (N, 256 * 4): left and right kept apart
    probe = torch.linalg.lstsq(columns(pictures(train)), facing[train, None].float(), driver="gelsd").solution
    x = pictures(query)
    y = torch.cat([G(S(a), h) for a, h in zip(x.split(256), batches.texts(query.flip(0).to(device)).split(256))])
    above = [p[:, :, :6].mean((2, 3)).cpu() for p in (x, y)]    # the top 6 rows, hardly ever bird
    group = encoder.kmeans(torch.cat(above), 8).view(2, -1)
    return {"style: background": (group[0] == group[1]).float().mean().item(),
            "style: direction": ((columns(y) @ probe).sign()[:, 0] == facing[query]).float().mean().item(),
            "  probe on real ones": ((columns(x) @ probe).sign()[:, 0] == facing[query]).float().mean().item()}

def export(args, path):
    """What sampling needs of a run, in half precision, to weights/NAME.pt. Raises UserError."""
    run, out = load_checkpoint(path, "gan-cls"), Path("weights") / f"{args.export}.pt"
    if Path(args.export).name != args.export:
        raise UserError(f"--export takes a name, such as toy, not a path: {args.export}")
    half = lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    with fitting(path):
        if not run["S"]:
            raise UserError(f"{path} is not finished: let it go on with --resume")
        phi = dict(kind="encoder", settings=run["encoder"]["settings"], phi=half(run["encoder"]["phi"]))
        run = dict(kind="gan-cls", settings=run["settings"], step=run["step"], average=half(run["average"]), S=half(run["S"]), encoder=phi)
    save_checkpoint(out, **run)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB")

def compare(args):
    """GAN, GAN-CLS, GAN-INT and GAN-INT-CLS (with --measure: one of them): same data, text encoder, seeds and steps. Finished runs are
    reused. Writes the grid of pictures and the two ROC plots, prints the table and the same as JSON."""
    started, device, name = time.time(), args.device, data.short_name(args.dataset)
    rows, curves, columns, made, variants = {}, [{}, {}], [], None, list(VARIANTS) if args.compare else [args.variant]
    seeds = range(args.compare) if args.compare else [args.seed]
    ds = data.load(args.dataset, args.source)
    if min(np.bincount(ds.labels)[ds.unseen], default=0) < 2:
        raise UserError(f"{name} cannot be measured: expected unseen classes of at least two pictures each")
    for variant in variants:
        for seed in seeds:
            folder = args.out if args.out and not args.compare else run_folder(args, variant, seed)
            ds, batches, run = run_one(args, variant, seed, folder, resume=(folder / "checkpoint.pt").exists())
            mine = run.step, *map(run.settings.get, ("recipe", "ngf", "ndf"))
            if (made := made or mine) != mine:
                raise UserError(f"{folder} has (steps, recipe, ngf, ndf) {mine}, another {made}: remove it, or name the longer one in --steps")
            if not columns:
                # The scorer: another text encoder, with another seed and trained image side, that no G has learned from.
                scorer = get_encoder(ds, Path("runs") / f"{name}-scorer.pt", device, seed=1)
                groups = {}
                if ds.boxes is not None and ds.keypoints is not None:
                    groups = {k: encoder.style_pairs(g) for k, g in zip(("background", "pose"), encoder.style_groups(ds, ds.split(True)))}
                shown = sample_pictures(ds, 8)
                texts = [ds.captions[i][0] for i in shown]
                columns.append(to_pixels(centre_crops(batches.images, torch.tensor(shown, device=device))))
            numbers, style, said = measure(ds, batches, run.average, run.S, scorer, groups, device)
            rows.setdefault(variant, []).append(numbers)
            if seed == seeds[0]:
                phi, _ = encoder.build(run.encoder, device)
                columns.append(to_pixels(paint(run.average, embed(phi, texts), seed=3)))
                for lines, (kind, pairs) in zip(curves, groups.items()):
                    i, j, same = (torch.cat(p) for p in zip(*pairs))
                    for who, emb in {"captions": said, variant: style}.items():
                        lines[f"{who}, {kind}"] = roc(F.cosine_similarity(emb[i], emb[j]), same)
    out = Path("runs") / f"{name}-compare"
    save_picture(sheet(list(zip(*columns)), texts, ["real", *variants], scale=1.5), out / "models.png")
    if groups:
        plot(curves, out / "roc.png")
    print("\n" + " " * 24 + "".join(f"{v:>18}" for v in variants))
    for key in rows[variants[0]][0]:
        values = [[r[key] for r in rows[v]] for v in variants]
        print(f"{key:24}" + "".join(f"{np.mean(x):>18.3f}" if len(x) == 1 else f"{np.mean(x):>10.3f} +-{np.std(x):.3f}" for x in values))
    print(json.dumps({v: [{k: round(x, 4) for k, x in r.items()} for r in rows[v]] for v in variants}))
    print(f"measured in {(time.time() - started) / 60:.1f} minutes, training included; pictures in {out}")

# ---- How fast it is --------------------------------------------------------------------------
def plain_step(run, x, h, h_wrong):
    """Algorithm 1 as usually written, to compare with: D runs five times, G three, and G's step fills D's gradients too. The same losses."""
    G, D, B = run.G, run.D, len(x)
    log_yes, log_no = (lambda s: F.logsigmoid(s).mean()), (lambda s: F.logsigmoid(-s).mean())
    noise = lambda n: torch.randn(n, Z_DIM, device=x.device)
    loss_D = -(log_yes(D(x, h)) + (log_no(D(x, h_wrong)) + log_no(D(G(noise(B), h).detach(), h))) / 2)
    run.opt_D.zero_grad()
    loss_D.backward()
    run.opt_D.step()
    blends = (h[:B // 2] + h[B // 2:2 * (B // 2)]) / 2
    loss_G = -log_yes(D(G(noise(B), h), h)) - log_yes(D(G(noise(B // 2), blends), blends))
    run.opt_G.zero_grad()
    loss_G.backward()
    run.opt_G.step()

def benchmark(args):
    """Time the step on random data. Prints; writes nothing."""
    device, B, cuda = args.device, args.batch_size or 64, args.device.type == "cuda"
    done, size = (torch.cuda.synchronize, 8192) if cuda else (lambda: None, 2048)
    n = max(2048, 2 * B)
    settings = dict(choose_settings(args, args.variant, args.seed, n, device), batch_size=B)
    ds = data.Dataset("random", np.random.default_rng(0).integers(0, 256, (n, 76, 76, 3), np.uint8), [["a bird"] * 10] * n, np.arange(n) % 64,
                      [str(i) for i in range(64)], np.zeros(64, bool), np.arange(n))
    batches = Batches(ds, encoder.CharCNNRNN(8).to(device), device, RECIPES[settings["recipe"]]["captions"])
    places = lambda: torch.randint(n, (B,), device=device)

    def milliseconds(step, repeats=25, warm=6):
        times = []
        for i in range(warm + repeats):
            start = time.perf_counter()
            step(), done()
            times.append(time.perf_counter() - start)
        return 1000 * float(np.median(times[warm:]))

    from torch.utils.flop_counter import FlopCounterMode        # here: it takes a second to import
    usual = Trainer(dict(settings, precision="fp32"), device, None)
    x, h, h_wrong = fixed = batches.batch(places())
    with FlopCounterMode(display=False) as counter:
        usual.algorithm1(fixed)
    usual.G.to(memory_format=torch.contiguous_format), usual.D.to(memory_format=torch.contiguous_format)
    plain = milliseconds(lambda: plain_step(usual, x.contiguous(), h, h_wrong), 9, 3)
    began, run = time.perf_counter(), Trainer(settings, device, None)
    if cuda and not args.no_compile:
        run.compile()
        for _ in range(4):
            run.train_step(batches, places())
        done()
    preparation = time.perf_counter() - began
    bare, loop = milliseconds(lambda: run.algorithm1(fixed)), milliseconds(lambda: run.train_step(batches, places()))
    a = torch.randn(size, size, device=device, dtype=DTYPES[run.precision])
    peak = 2 * size ** 3 / milliseconds(lambda: a @ a, 11, 3) / 1e9             # TFLOP/s
    rate, steps = counter.get_total_flops() / loop / 1e9, 600 * (8855 // B)     # [A]: 600 epochs; CUB has 8,855 training pictures
    memory = torch.cuda.max_memory_allocated(device) if cuda else math.nan      # Windows does not tell
    if not cuda and sys.platform != "win32":
        import resource
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{torch.cuda.get_device_name(device) if cuda else f'CPU, {torch.get_num_threads()} threads'}; ngf {settings['ngf']}, ndf {settings['ndf']}, "
          f"batch {B}, {run.precision}, {settings['variant']}, recipe {settings['recipe']}; torch {torch.__version__}")
    for what, value in (
            ("plain fp32 step", f"{plain:.1f} ms"), ("bare step", f"{bare:.1f} ms"), ("whole loop, data included", f"{loop:.1f} ms"),
            ("faster than plain", f"{plain / loop:.2f} x"), ("pictures a second", f"{1000 * B / loop:,.0f}"),
            ("operations a step", f"{counter.get_total_flops() / 1e9:.1f} GFLOP"), ("rate", f"{rate:.3f} TFLOP/s"),
            (f"of a {size}^3 matrix product", f"{100 * rate / peak:.1f} % of {peak:.2f} TFLOP/s"), ("peak memory", f"{memory / 1e6:,.0f} MB"),
            ("preparation", f"{preparation:.1f} s"), ("the paper's CUB schedule", f"{steps:,} steps, {steps * loop / 3.6e6:.2f} hours")):
        print(f"  {what:30} {value}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, positive, width = parser.add_argument, data.number(1, 10_000_000), data.number(1, 1024)
    encoder.add_options(add)
    add("--variant", choices=VARIANTS, default="gan-int-cls", help="which of the paper's four models (default: gan-int-cls)")
    add("--recipe", choices=RECIPES, help="paper: section 5; quick: with what makes few steps enough; toy: quick with a smoother D that sees sharpened pictures, and more of eq. 6 (default: toy for toy, else quick)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, help="length of training (paper: 600, the default but for toy)")
    length.add_argument("--steps", type=positive, help="length of training, in steps (default for toy: 6000)")
    add("--batch-size", type=positive, help="of recipe paper: 64; quick: 32")
    add("--ngf", type=width, help="width of G (the authors: 128, the default with CUDA; without: 32)")
    add("--ndf", type=width, help="width of D (default: half of G's, as the authors')")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="bits of the convolutions (default: what the device is good at)")
    add("--out", type=Path, metavar="DIR", help="where the run is kept (default, and always with --compare: runs/DATASET-VARIANT)")
    add("--resume", action="store_true", help="go on with the run in --out")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--compare", type=positive, nargs="?", const=1, metavar="SEEDS", help="train the four models and measure them, with so many seeds")
    either("--measure", action="store_true", help="measure the run of --variant, which is trained first where it is not there")
    either("--export", metavar="NAME", help="write what sampling needs of the run to weights/NAME.pt")
    add("--no-compile", action="store_true", help="on CUDA: do not compile and record the step")
    either("--benchmark", action="store_true", help="time the step on random data; writes nothing")
    args = parser.parse_args()
    args.recipe = args.recipe or ("toy" if args.dataset == "toy" else "quick")
    if args.benchmark:
        return benchmark(args)
    if args.compare or args.measure:
        return compare(args)
    if args.export:
        return export(args, (args.out or run_folder(args, args.variant, args.seed)) / "checkpoint.pt")
    run_one(args, args.variant, args.seed, args.out, args.resume)

def run_folder(args, variant, seed):
    return Path("runs") / (f"{data.short_name(args.dataset)}-{variant}" + (f"-{seed}" if seed else ""))

def run_one(args, variant, seed, out_dir=None, resume=False):
    """One whole run, or the rest of one: text encoder, G and D, S. Returns (data set, batches, run)."""
    out_dir = out_dir or run_folder(args, variant, seed)
    path, device, measuring = out_dir / "checkpoint.pt", args.device, args.compare or args.measure
    if path.exists() and not resume:
        raise UserError(f"{path} is there already: add --resume to go on with it, or name another --out")
    if resume and not path.exists():
        raise UserError(f"nothing to resume: there is no {path}")
    checkpoint = load_checkpoint(path, "gan-cls") if resume else None
    if resume:
        with fitting(path):             # before anything is made of it
            settings, trained = checkpoint["settings"], checkpoint["encoder"]
            for key, allowed in (("variant", VARIANTS), ("recipe", RECIPES), ("precision", ("auto", *DTYPES)), ("seed", range(2 ** 31 + 1)),
                                 ("batch_size", range(1, 10 ** 7)), ("steps", range(1, 10 ** 7 + 1))):
                if settings[key] not in allowed:
                    raise ValueError(key)
            load_into(lambda: Generator(settings["ngf"]), checkpoint["G"]), load_into(lambda: Discriminator(settings["ndf"]), checkpoint["D"])
            settings["dataset"] = str(settings["dataset"])
        if args.epochs and not measuring:
            raise UserError("with --resume, say in --steps how far to go")
        for key, asked in dict(dataset=args.dataset, variant=variant, recipe=args.recipe).items():
            if measuring and settings[key] != asked:        # it would be measured as what it is not
                raise UserError(f"{path} is of {key} {settings[key]}, not {asked}: say --{key} {settings[key]}, or name another --out")
        settings["steps"], settings["precision"] = args.steps or settings["steps"], args.precision if args.precision != "auto" else settings["precision"]
    ds = data.load(settings["dataset"] if resume else args.dataset, args.source)
    if not resume:
        settings = choose_settings(args, variant, seed, len(ds.split(False)), device)
        shared = Path("runs") / f"{data.short_name(args.dataset)}-encoder.pt"  # for all runs on a data set; with --out nothing is written elsewhere
        trained = get_encoder(ds, shared if shared.exists() or not args.out else out_dir / "encoder.pt", device, image_features=args.image_features,
                              image_side="features" if args.image_features else args.image_encoder)
    phi, _ = encoder.build(trained, device)
    run = Trainer(settings, device, trained)
    batches = Batches(ds, phi, device, run.recipe["captions"])
    if checkpoint:
        with fitting(path):
            run.restore(checkpoint)
    if device.type == "cuda" and not args.no_compile and run.step < settings["steps"]:
        run.compile()
    print(f"{settings['dataset']}, {settings['variant']}, recipe {settings['recipe']}: {len(batches.order):,} pictures, "
          f"{settings['steps']:,} steps, {run.precision} on {device}; ngf {settings['ngf']}, ndf {settings['ndf']}")
    texts = [ds.captions[i][0] for i in sample_pictures(ds)]
    h, z = embed(phi, texts), torch.randn(8, Z_DIM, generator=torch.Generator().manual_seed(1)).to(device)

    @torch.no_grad()
    def show(G):                        # the same noises for all texts
        return sheet([to_pixels(G(z, t.expand(len(z), -1))) for t in h], texts)
    if run.step < settings["steps"]:
        if not train(run, batches, out_dir, show):
            print(f"stopped at step {run.step} and saved; go on with:  python train.py --out {out_dir} --resume")
            sys.exit(130)
        run.S = None                    # of a G that is no more
    if run.S is None:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):   # a run that goes on later must not notice
            run.S = train_style_encoder(run, batches, STYLE_STEPS)
        run.save(path)
    print(f"done: {path}\nnow try: python sample.py --weights {path} {json.dumps(texts[0])}")
    return ds, batches, run

def choose_settings(args, variant, seed, pictures, device):
    ngf = args.ngf or (128 if device.type == "cuda" else 32)
    if device.type != "cuda" and not args.ngf:
        print("no CUDA device: training at a quarter of the width, ngf 32 (--ngf and --ndf choose)")
    batch_size = min(args.batch_size or RECIPES[args.recipe]["batch_size"], pictures)
    if batch_size < 4:
        raise UserError(f"a batch of {batch_size} is too small: expected 4 training pictures or more")
    steps = args.steps or (TOY_STEPS if args.dataset == "toy" and not args.epochs else (args.epochs or 600) * (pictures // batch_size))
    return dict(dataset=args.dataset, variant=variant, recipe=args.recipe, batch_size=batch_size, steps=steps, seed=seed,
                precision=args.precision, ngf=ngf, ndf=args.ndf or max(1, ngf // 2))

def sample_pictures(ds, n=6):
    """n pictures of unseen classes (of any, where all are seen), one a class, always the same ones."""
    rng = np.random.default_rng(0)
    classes = np.flatnonzero(ds.unseen) if ds.unseen.any() else np.arange(len(ds.class_names))
    return [rng.choice(np.flatnonzero(ds.labels == c)) for c in rng.permutation(classes)[:n]]

if __name__ == "__main__":
    data.run(main)
