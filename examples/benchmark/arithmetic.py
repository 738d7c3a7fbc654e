"""What a variation costs in multiplications and kept memory, from the sizes of the UNet alone.

    python examples/benchmark/arithmetic.py

One FLOP is one multiplication or one addition, in convolutions, linear layers and attention's two products. A
transformer of C channels on N cells costs, beyond its linear layers,

    4·N²·C            self-attention: QKᵀ and its product with V, over z_t's own N keys
    4·N²·C more       for ISA, whose keys are the reference's and z_t's own; nothing more where it replaces
    4·N²·C more       for the blend of plain attention and ISA where a kernel does not return its softmax's sum
    4·N·M·C           cross-attention to M tokens: 77 of text, and 4 more of the picture for DCA

Memory is counted in maps of N × C numbers at the finest level, where the UNet is at its fullest: see `activations`.
"""

from isadca.networks.sizes import UNetConfig

TEXT, IMAGE, STEPS, AT_ONCE = 77, 4, 50, 5


def transformers(config: UNetConfig, side: int) -> list[tuple[int, int]]:
    """(cells N, channels C) of every transformer block, for a latent of side × side."""
    found = []
    for level, (c, attends) in enumerate(zip(config.channels, config.attention)):
        found += [((side >> level) ** 2, c)] * (2 * config.layers_per_block + 1) * attends
    return [*found, ((side >> len(config.channels) - 1) ** 2, config.channels[-1])]


def resnets(config: UNetConfig, side: int) -> list[tuple[int, int, int]]:
    """(cells, channels in, channels out) of every resnet: the way down, the middle, the way up with its skips."""
    found, skips, x = [], [config.channels[0]], config.channels[0]
    last = len(config.channels) - 1
    for level, c in enumerate(config.channels):
        for _ in range(config.layers_per_block):
            found.append(((side >> level) ** 2, x, c))
            x = c
            skips.append(c)
        skips += [c] * (level < last)
    found += [((side >> last) ** 2, x, x)] * 2
    for level, c in reversed(list(enumerate(config.channels))):
        for _ in range(config.layers_per_block + 1):
            found.append(((side >> level) ** 2, x + skips.pop(), c))
            x = c
    return found


def forward(config: UNetConfig = UNetConfig(), side: int = 64, self_products: int = 1, tokens: int = TEXT) -> int:
    """FLOP of one row through the UNet: `self_products` times N keys in self-attention, `tokens` in cross-attention,
    whose keys and values are made beforehand."""
    c0, temb = config.channels[0], 4 * config.channels[0]
    total = 2 * (c0 * temb + temb * temb) + 2 * 9 * side**2 * c0 * (config.in_channels + config.out_channels)
    for n, c_in, c_out in resnets(config, side):
        total += 2 * n * (9 * c_in * c_out + 9 * c_out * c_out + c_in * c_out * (c_in != c_out)) + 2 * temb * c_out
    for n, c in transformers(config, side):
        linear = 2 + 4 + 2 + 12  # in and out; self q, k, v, out; cross q, out; feed-forward
        total += 2 * n * c * c * linear + 4 * n * n * c * self_products + 4 * n * tokens * c
    for level, c in enumerate(config.channels[:-1]):
        total += 2 * 9 * (side >> level + 1) ** 2 * c * c                            # down to the next level
        total += 2 * 9 * (side >> level) ** 2 * config.channels[level + 1] ** 2      # and up from it
    return total


def text_keys_values(config: UNetConfig = UNetConfig(), side: int = 64) -> int:
    """FLOP of the text's keys and values at every cross-attention, once a prompt."""
    return sum(2 * 2 * TEXT * config.context_dim * c for _, c in transformers(config, side))


def kept(config: UNetConfig = UNetConfig(), side: int = 64, itemsize: int = 2) -> int:
    """Bytes of one step of the reference: its keys and values at every self-attention."""
    return sum(2 * n * c * itemsize for n, c in transformers(config, side))


def activations(config: UNetConfig = UNetConfig(), side: int = 64, itemsize: int = 2) -> int:
    """Bytes of one row at the UNet's fullest moment, the last transformer's feed-forward, whatever its attention: 8
    maps of values and gates, 4 of gelu(gates), 4 of their product, 6 of the transformer's residuals, norms and tokens;
    a map of each earlier layer of the block and of each skip; and the block's input, as wide as the level below."""
    layers, (c0, c1, *_) = config.layers_per_block, config.channels
    return ((8 + 4 + 4 + 6 + layers + layers + 1) * c0 + c1) * side**2 * itemsize


def memory(rows: int, reference: bool, config: UNetConfig = UNetConfig(), side: int = 64, itemsize: int = 2) -> int:
    """Bytes beside the weights in a job whose steps have `rows` rows. The reference is replayed a chunk of steps at
    once, and the chunk before is freed only after the first step of the new one."""
    row, chunk = activations(config, side, itemsize), AT_ONCE * kept(config, side, itemsize)
    return max(rows, AT_ONCE) * row + 2 * chunk if reference else rows * row


def systems() -> dict[str, tuple[int, int]]:
    """FLOP of one guided step: for each variation, and for the reference, which all variations share."""
    plain, isa, dca = forward(), forward(self_products=2), forward(tokens=TEXT + IMAGE)
    return {"plain text to image": (2 * plain, 0),
            "ISA alone": (2 * isa, plain),
            "attention mix, CPU": (2 * forward(self_products=2, tokens=TEXT + IMAGE), plain),
            "attention mix, elsewhere": (2 * forward(self_products=3, tokens=TEXT + IMAGE), plain),
            "noise mix": (2 * isa + 2 * dca, plain),
            "RIVAL's rows, two of the reference": (2 * isa, 2 * isa)}


def main() -> None:
    print("| a guided step at 512² | GFLOP, N = 1 | over ISA | whole job per variation, TFLOP: N = 1 | 4 | 16 |")
    print("|---|---|---|---|---|---|")
    each, shared = systems()["ISA alone"]
    base = each + shared
    for name, (each, shared) in systems().items():
        inversion = forward() if shared else 0
        jobs = [STEPS * (each + (shared + inversion) / n) / 1e12 for n in (1, 4, 16)]
        cells = [f"{(each + shared) / 1e9:,.0f}", f"{(each + shared) / base - 1:+.1%}", *(f"{job:.1f}" for job in jobs)]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| memory beside the weights, GB, half precision | rows of a step | N = 1 | 4 | 16 |")
    print("|---|---|---|---|---|")
    for name, rows in {"plain text to image": 2, "ISA alone, attention mix": 2, "noise mix": 4}.items():
        cells = [f"{memory(n * rows, rows == 4 or 'ISA' in name) / 1e9:.2f}" for n in (1, 4, 16)]
        print(f"| {name} | {rows}·N | {' | '.join(cells)} |")
    print(f"| RIVAL's rows, one picture at a time | 4 {f'| {memory(4, False) / 1e9:.2f} ' * 3}|")
    print(f"\nA step of the reference keeps {kept() / 1e6:.0f} MB of keys and values in half precision: "
          f"{5 * kept() / 1e6:.0f} MB for the 5 replayed at once, {STEPS * kept() / 1e9:.1f} GB for all {STEPS}.")
    print(f"A prompt's keys and values: {text_keys_values() / 1e9:.1f} GFLOP once, in place of every step.")


if __name__ == "__main__":
    main()
