"""The method on one sheet, with pictures of one run: inversion, replay, the two branches, λ.

    python examples/method_figure.py -o examples/method.svg
"""

import argparse
import base64
import io
from html import escape
from pathlib import Path

import isadca

HERE = Path(__file__).parent
STEPS, SHOWN, SIDE = 20, 8, 84                        # the step that is shown in parts is number SHOWN of STEPS
COLUMNS = {"0": 30, "t−1": 190, "t": 655, "T": 806}   # x of the pictures at these levels
TOP, BOTTOM = 52, 432                                 # y of the reference's row and of the variation's
INK, ISA, DCA, MIX = "#333", "#1f6fb4", "#c4571a", "#2a7d46"


def pictures() -> tuple[dict[str, str], dict[str, str]]:
    """The reference's chain and the variation at each column's level, as data URLs."""
    model = isadca.load(device="cpu")
    ref = isadca.invert(model, isadca.load_image(HERE / "rocket.png"), STEPS)
    latents = []                                      # of the variation, from z_T on
    [z] = isadca.sample(model, ref, [isadca.Run("a lemon")], on_step=lambda run, t, z, noise: latents.append(z))
    latents.append(z)
    at = {"0": STEPS, "t−1": SHOWN + 1, "t": SHOWN, "T": 0}

    def url(z):
        data = io.BytesIO()
        isadca.decode(model, z)[0].save(data, "PNG")
        return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

    return ({name: url(ref.chain[[STEPS - i]]) for name, i in at.items()},
            {name: url(latents[i]) for name, i in at.items()})


def text(x: float, y: float, words: str, colour: str = INK, size: int = 14, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def arrow(points: str, colour: str = INK, dashed: bool = False) -> str:
    style = ' stroke-dasharray="5 4"' if dashed else ""
    return (f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{style} '
            f'marker-end="url(#{colour[1:]})"/>')


def box(x: float, y: float, width: float, height: float, colour: str, *lines: str) -> str:
    middle = y + height / 2 - 9 * (len(lines) - 1) + 5
    words = [text(x + width / 2, middle + 18 * i, line, colour, anchor="middle") for i, line in enumerate(lines)]
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}" fill-opacity="0.09" '
            f'stroke="{colour}" stroke-width="1.5"/>' + "".join(words))


def row(y: float, images: dict[str, str], letter: str, below: bool, leftward: bool) -> list[str]:
    """Four pictures of one chain, with arrows between them; the variation's middle arrow is the step."""
    parts, ends = [], sorted(COLUMNS.values())
    for name, x in COLUMNS.items():
        parts.append(f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" href="{images[name]}"/>')
        height = y + SIDE + 18 if below else y - 8
        parts.append(text(x + SIDE / 2, height, f"{letter} at {name}", size=13, anchor="middle"))
    for left, right in zip(ends, ends[1:]):
        a, b, middle = left + SIDE + 6, right - 6, y + SIDE / 2
        if not (leftward and left == COLUMNS["t−1"]):
            parts.append(arrow(f"{b},{middle} {a},{middle}" if leftward else f"{a},{middle} {b},{middle}"))
    return parts


def figure() -> str:
    chain, variation = pictures()
    markers = "".join(f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                      f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{c}"/></marker>' for c in (INK, ISA, DCA, MIX))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 590" font-family="sans-serif">'
             f'<defs>{markers}</defs><rect width="920" height="590" fill="white"/>',
             text(30, 24, "1  Inversion, once: DDIM run backwards, from the reference to noise (Eq. 4)", size=16),
             text(30, 572, "3  Variation, N at once: from noise to pictures (Algorithm 1)", size=16),
             text(30, 172, "2  One step", size=16)]
    parts += row(TOP, chain, "z̄", below=False, leftward=False) + row(BOTTOM, variation, "z", below=True, leftward=True)
    parts += [
        box(420, 178, 215, 68, ISA, "ISA, Eq. 5: self-attention", "softmax(Q · [K̄, K]) · [V̄, V]"),
        box(420, 276, 215, 68, DCA, "DCA, Eq. 8: cross-attention", "text + scale × image"),
        box(420, 372, 92, 44, DCA, "prompt", "K, V"),
        box(522, 372, 113, 44, DCA, "CLIP(reference)", "K′, V′  (Eq. 7)"),
        arrow("466,372 466,348", DCA), arrow("578,372 578,348", DCA),
        arrow("685,138 685,196 639,196", ISA),
        text(694, 172, "replay: K̄, V̄", ISA), text(694, 190, "at the same t", ISA),
        arrow("700,430 700,230 639,230"), arrow("700,310 639,310"), text(709, 275, "Q, K, V of z"),
        arrow("418,212 338,212 338,238", ISA), text(348, 204, "ε of ISA", ISA, 13),
        arrow("418,310 338,310 338,286", DCA), text(348, 328, "ε of DCA", DCA, 13),
        f'<circle cx="338" cy="262" r="22" fill="{MIX}" fill-opacity="0.12" stroke="{MIX}" stroke-width="1.5"/>',
        text(338, 268, "λ", MIX, 20, "middle"),
        arrow("314,262 232,262 232,428", MIX),
        text(30, 236, "λ · ε of ISA + (1−λ) · ε of DCA", MIX), text(30, 254, "(Eq. 9)", MIX),
        text(30, 330, "DDIM step (Eq. 10)", MIX), text(30, 348, "with classifier-free guidance", MIX),
        arrow("862,138 862,428", dashed=True), text(853, 350, "start: z = z̄,", size=13, anchor="end"),
        text(853, 367, "shuffled, or noise", size=13, anchor="end")]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "method.svg")
    args = parser.parse_args(argv)
    args.out.write_text(figure(), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
