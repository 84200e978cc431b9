"""Draw pictures from sentences, with a trained run.

    python sample.py "an all black bird" "a red bird with a white belly"    # a row a text, a column a noise
    python sample.py --interpolate "a bright red bird" "an all blue bird"   # phi moves, z stays: [A] figure 8 left
    python sample.py --interpolate-style "an all black bird"                # z moves, phi stays: [A] figure 8 right
    python sample.py "an all black bird" --style query.jpg other.jpg        # z = S(query): [A] figure 6
    python sample.py --gallery                                              # six pictures of the README, from weights/
"""

import argparse
from pathlib import Path

import torch

import data, encoder
from data import UserError, read_picture, save_picture, sheet
from encoder import centre_crops, embed, fitting, load_checkpoint, load_into, to_pixels
from gan_cls import Z_DIM, Generator, StyleEncoder, interpolate, pick_device

class Model:
    """What sampling needs of a run: G (the average), S (None in an unfinished run), phi. Raises UserError."""
    def __init__(self, path, device="cpu"):
        checkpoint = load_checkpoint(path, "gan-cls")
        with fitting(path):
            self.settings, self.device = checkpoint["settings"], device
            self.G = load_into(lambda: Generator(self.settings["ngf"]), checkpoint["average"])
            self.S = load_into(StyleEncoder, checkpoint["S"]) if checkpoint["S"] else None
            self.phi, _ = encoder.build(checkpoint["encoder"], device)
        for net in filter(None, (self.G, self.S)):
            net.to(device).eval()

    @torch.no_grad()
    def draw(self, z, h):
        """z (N, 100), h (N, 1024) -> (N, 64, 64, 3) uint8."""
        return to_pixels(self.G(z, h))

    @torch.no_grad()
    def style(self, path):
        """A picture file -> its s (1, 100) and itself, (64, 64, 3) uint8, as S saw it."""
        if not self.S:
            raise UserError("this run has no style encoder yet: let train.py go on to its end (--resume)")
        try:
            pixels, _ = read_picture(data.read_bounded(Path(path)))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the picture {path}: {error}") from None
        x = centre_crops(torch.tensor(pixels)[None].to(self.device), torch.zeros(1, dtype=torch.long, device=self.device))
        return self.S(x), to_pixels(x)[0]

def find_weights(name):
    """A file, or a name in weights/; for None the newest run, and where there is none weights/cub.pt. Raises UserError."""
    candidates = [name] if name else sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)[-1:]
    there = [path for path in map(Path, (*candidates, f"weights/{name or 'cub'}.pt")) if path.is_file()]
    if not there:
        raise UserError(f"there is no {f'file {name}' if name else 'run and no weights/cub.pt'}: train one first with  python train.py")
    return there[0]

GALLERY = {     # picture: weights, and what to say to get it
    "birds": ["cub", "this vibrant red bird has a pointed black beak", "this bird is yellowish orange with black wings",
              "the bright blue bird has a white colored belly"],
    "flowers": ["flowers", "this flower has white petals and a yellow stamen", "the center is yellow surrounded by wavy dark purple petals",
                "this flower has lots of small round pink petals"],
    "between-texts": ["cub", "--interpolate", "a bright red bird", "an all blue bird"],
    "between-noises": ["cub", "--interpolate-style", "an all black bird", "a yellow bird with black wings"],
    "outside": ["cub", "the completely red cat", "the blue bird with green wings"],
    "style": ["toy", "an all red bird", "a blue bird with a white belly", "--style", *(f"assets/query-{n}.png" for n in range(1, 7))]}

def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw pictures from sentences.")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to draw, a row each")
    add("--weights", metavar="FILE", help="a run's checkpoint.pt, or a name in weights/ (default: the newest run, else cub)")
    add("--n", type=data.number(1, 64), default=8, help="pictures a text (default: 8)")
    add("--seed", type=data.number(0, 2 ** 31), default=0, help="seed of the noises: the same seed gives the same file")
    add("--out", type=Path, default=Path("sample.png"), help="where to write (default: sample.png)")
    add("--device", type=pick_device, default="auto")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--interpolate", action="store_true", help="move between two texts: a row a noise")
    mode.add_argument("--interpolate-style", action="store_true", help="move between noises: a row a text")
    mode.add_argument("--style", nargs="+", metavar="PICTURE", help="take the style of these pictures, a column each")
    mode.add_argument("--gallery", action="store_true", help="draw six pictures of the README, into assets/")
    args = parser.parse_args(argv)
    if args.gallery:
        for name, (weights, *words) in GALLERY.items():
            main(["--weights", weights, "--out", f"assets/{name}.png", *words])
        return
    texts = [" ".join(t.split()) for t in args.texts]
    if not texts or not all(texts):
        raise UserError("an empty text describes no picture: say what to draw")
    if args.interpolate and len(texts) != 2:
        raise UserError(f"--interpolate goes from one text to another: expected 2, found {len(texts)}")

    model = Model(find_weights(args.weights), args.device)
    h = embed(model.phi, texts)                                     # (texts, 1024)
    generator = torch.Generator().manual_seed(args.seed)
    noise = lambda n: torch.randn(n, Z_DIM, generator=generator).to(model.device)
    n, titles, steps = args.n, None, torch.linspace(0, 1, args.n).tolist()
    if args.interpolate:
        z = noise(4)
        rows = [model.draw(z[i].expand(n, -1), torch.cat([interpolate(h[1:], h[:1], b) for b in steps])) for i in range(4)]
        titles, texts = [f"{b:.2f}" for b in steps], [f"from: {texts[0]}", f"to: {texts[1]}", "", ""]
    elif args.interpolate_style:
        rows = []
        for text in h:
            z = noise(2)
            z = torch.cat([interpolate(z[1:], z[:1], b) for b in steps])
            rows.append(model.draw(z, text.expand(n, -1)))
    elif args.style:
        styles = [model.style(path) for path in args.style]
        s = torch.cat([s for s, _ in styles])
        rows = [[picture for _, picture in styles]] + [model.draw(s, text.expand(len(s), -1)) for text in h]
        texts = ["style of:"] + texts
    else:
        z = noise(n)                                                # the same noises for every text
        rows = [model.draw(z, text.expand(n, -1)) for text in h]
    save_picture(sheet(rows, texts, titles), args.out)
    print(f"wrote {args.out}")

if __name__ == "__main__":
    data.run(main)
