"""Each file of examples/methods against its paper's equation, written again in NumPy; its length, source and command.

q, k, v are random, in float64. Shapes: N = 2 variations in two guidance halves, 2 heads, a grid of 4 x 4 cells, a text
of 7 tokens.
"""

import importlib.util
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT

import isadca
from isadca.attention import Site
from isadca.loop import Conditions, Controls, Run, guide, sample

FOLDER = ROOT / "examples" / "methods"
SCRIPTS = ("measure", "claims", "inversion")
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SCRIPTS)
NAMES = [path.stem for path in FILES]
N, HEADS, GRID, TOKENS, WIDTH = 2, 2, (4, 4), 7, 5
UP = Site("up_blocks.1.attentions.0.transformer_blocks.0.attn1", "self", "up", 9, GRID)
MID = UP._replace(name="mid_block.attentions.0.transformer_blocks.0.attn1", place="mid", layer=6)
CROSS = UP._replace(name="up_blocks.1.attentions.0.transformer_blocks.0.attn2", kind="cross")
HALVES = ["unconditional", "text"]  # in place of their keys and values


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def method_of(module) -> isadca.Method:
    [(name, method)] = [(k, v) for k, v in vars(module).items() if isinstance(v, isadca.Method)]
    assert name == module.__name__.upper()
    return method


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def drawn(site=UP, rows=2 * N):
    cells, tokens = GRID[0] * GRID[1], TOKENS if site.kind == "cross" else GRID[0] * GRID[1]
    return normal(rows, HEADS, cells, WIDTH), normal(rows, HEADS, tokens, WIDTH), normal(rows, HEADS, tokens, WIDTH)


def controls(module, **changes):
    """The fields of isadca.Controls that the gallery reads; a reference of one row."""
    fields = dict(z=normal(N, 4, 8, 8), t=700, i=3, steps=10, n=N, halves=2, ref_kv={UP.name: drawn(rows=1)[1:]},
                  ref_qk={}, ip_kv={CROSS.name: (normal(2, HEADS, 3, WIDTH), normal(2, HEADS, 3, WIDTH))},
                  method=method_of(module), kernel=isadca.attend,
                  conditions=SimpleNamespace(text_kv=HALVES, words=[("a", [1]), ("lemon", [2, 3])], kept={}))
    return SimpleNamespace(**fields | changes)


def is_close(ours, theirs):
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-10)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def probs(q, k):
    return softmax(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]))


def numpy(*tensors):
    return [x.numpy() for x in tensors]


# ---- the reference's keys and values ---------------------------------------------------------------------------

def test_cross_image():
    module, (q, k, v) = load("cross_image"), drawn()
    c = controls(module)
    k_ref, v_ref = numpy(*c.ref_kv[UP.name])
    a = probs(q.numpy(), k_ref)
    a = np.clip(1.67 * (a - a.mean(-1, keepdims=True)) + a.mean(-1, keepdims=True), 0, 1)
    is_close(module.cross_image(c)(q, k, v, UP), a @ v_ref)
    plain = oracle.attention(*numpy(q, k, v))
    for untouched in (UP._replace(place="down"), UP._replace(hw=(2, 2)), UP._replace(hw=(1, 1))):
        at = c if untouched.hw != (2, 2) else controls(module, z=normal(N, 4, 8, 8))
        is_close(module.cross_image(at)(q, k, v, untouched), plain)
    for i, until in ((0, 0), (7, 0), (9, 0)):  # the grid of half the latent's side: from the second step to the seventh
        is_close(module.cross_image(controls(module, i=i))(q, k, v, UP), plain)
    is_close(module.cross_image(controls(module, i=8, z=normal(N, 4, 4, 4), ref_kv=c.ref_kv))(q, k, v, UP), a @ v_ref)


def test_reference_only():
    module, (q, k, v) = load("reference_only"), drawn()
    c = controls(module)
    k_ref, v_ref = (np.broadcast_to(x, (2 * N, *x.shape[1:])) for x in numpy(*c.ref_kv[UP.name]))
    q_, k_, v_ = numpy(q, k, v)
    both = oracle.attention(q_, np.concatenate([k_ref, k_], 2), np.concatenate([v_ref, v_], 2))
    both[:N] = 0.5 * both[:N] + 0.5 * oracle.attention(q_, k_, v_)[:N]
    is_close(module.reference_only(c)(q, k, v, UP), both)


def test_style_aligned():
    module, (q, k, v), q_ref = load("style_aligned"), drawn(), drawn(rows=1)[0]
    c = controls(module, ref_qk={UP.name: (q_ref, None)})
    q_, k_, v_, q_ref, k_ref, v_ref = numpy(q, k, v, q_ref, *c.ref_kv[UP.name])

    def like(x, ref):
        std = [np.sqrt(y.var(2, ddof=1, keepdims=True) + 1e-5) for y in (x, ref)]
        return (x - x.mean(2, keepdims=True)) / std[0] * std[1] + ref.mean(2, keepdims=True)
    k_ref_, v_ref_ = (np.broadcast_to(x, (2 * N, *x.shape[1:])) for x in (k_ref, v_ref))
    expected = oracle.attention(like(q_, q_ref), np.concatenate([like(k_, k_ref), k_ref_], 2),
                                np.concatenate([v_, v_ref_], 2))
    is_close(module.style_aligned(c)(q, k, v, UP), expected)


def test_masactrl_masks():
    module, (q, k, v), (qx, kx, vx) = load("masactrl_masks"), drawn(), drawn(CROSS)
    q_ref, k_ref_text = normal(1, HEADS, 16, WIDTH), normal(1, HEADS, TOKENS, WIDTH)
    c = controls(module, ref_qk={CROSS.name: (q_ref, k_ref_text)})
    c.method = isadca.Method(layers=(9,))
    attend = module.masactrl_masks(c)
    is_close(attend(q, k, v, UP), oracle.attention(*numpy(q, k, v)))  # no map yet
    is_close(attend(qx, kx, vx, CROSS), oracle.attention(*numpy(qx, kx, vx)))
    ours = attend(q, k, v, UP).numpy()

    def mask(a, rows):  # (H,N,M) -> (N,)
        heat = a[:, :, rows].sum(-1).mean(0)
        return (heat - heat.min()) / (heat.max() - heat.min()) >= 0.5
    m_ref = mask(probs(*numpy(q_ref, k_ref_text))[0], [2])
    k_ref, v_ref = numpy(*c.ref_kv[UP.name])
    scores = q.numpy() @ np.swapaxes(k_ref, -1, -2) / np.sqrt(WIDTH)
    for row in range(2 * N):
        m = mask(probs(*numpy(qx, kx))[N + row % N], [2, 3])
        for cell in range(16):
            readable = m_ref if m[cell] else ~m_ref
            a = softmax(scores[row, :, cell][:, readable])[:, None] @ v_ref[0][:, readable]
            np.testing.assert_allclose(ours[row, :, cell], a[:, 0], atol=1e-10)
    other = UP._replace(layer=3)
    is_close(attend(q, k, v, other), oracle.attention(*numpy(q, k, v)))


def test_prompt_to_prompt():
    module = load("prompt_to_prompt")
    for site, last in ((UP, 3), (CROSS, 7)):  # the last of ten steps: 40 % and 80 %
        (q, k, v), (q_ref, k_ref, _) = drawn(site), drawn(site, 1)
        plain = oracle.attention(*numpy(q, k, v))
        swapped = np.concatenate([plain[:N], probs(*numpy(q_ref, k_ref)) @ v[N:].numpy()])
        for i, expected in ((0, swapped), (last, swapped), (last + 1, plain)):
            c = controls(module, i=i, ref_qk={site.name: (q_ref, k_ref)})
            is_close(module.prompt_to_prompt(c)(q, k, v, site), expected)
    q, k, v = drawn()
    fine = controls(module, i=0, z=normal(N, 4, 4, 4))
    is_close(module.prompt_to_prompt(fine)(q, k, v, UP), oracle.attention(*numpy(q, k, v)))


def test_fate_zero():
    module, (q, k, v), (qx, kx, vx) = load("fate_zero"), drawn(), drawn(CROSS)
    (q_ref, k_ref, _), (qx_ref, kx_ref, _) = drawn(UP, 1), drawn(CROSS, 1)
    c = controls(module, ref_qk={UP.name: (q_ref, k_ref), CROSS.name: (qx_ref, kx_ref)})
    attend, a_ref = module.fate_zero(c), probs(*numpy(q_ref, k_ref))
    plain = oracle.attention(*numpy(q, k, v))
    is_close(attend(q, k, v, UP), np.concatenate([plain[:N], a_ref @ v[N:].numpy()]))  # no map yet: M is 0
    a = probs(*numpy(qx, kx))[N:]
    a[..., [0, 1, 4, 5, 6]] = probs(*numpy(qx_ref, kx_ref))[..., [0, 1, 4, 5, 6]]  # all but the rows of "lemon"
    plain_x = oracle.attention(*numpy(qx, kx, vx))
    is_close(attend(qx, kx, vx, CROSS), np.concatenate([plain_x[:N], a @ vx[N:].numpy()]))
    heat = probs(*numpy(qx_ref, kx_ref))[0, :, :, 2].mean(0)
    m = (heat > 0.3 * heat.max())[:, None]
    assert 0 < m.sum() < 16
    fused = m * probs(*numpy(q, k))[N:] + ~m * a_ref
    is_close(attend(q, k, v, UP), np.concatenate([plain[:N], fused @ v[N:].numpy()]))
    assert module.fate_zero(controls(module, i=8)) is isadca.attend


# ---- the image prompt and the text -----------------------------------------------------------------------------

def test_instant_style():
    module, (q, k, v) = load("instant_style"), drawn(CROSS)
    c = controls(module)
    image = [x.numpy().repeat(N, 0) for x in c.ip_kv[CROSS.name]]
    attend, text = module.instant_style(c), oracle.attention(*numpy(q, k, v))
    is_close(attend(q, k, v, CROSS), text + oracle.attention(q.numpy(), *image))
    is_close(attend(q, k, v, CROSS._replace(name=CROSS.name.replace("up_blocks.1", "up_blocks.2"))), text)


def test_nag():
    module, (q, k, v) = load("nag"), drawn(CROSS)
    k[1], v[1] = k[3], v[3] + 0.1 * v[1]  # one variation whose prompts hardly differ
    q_, k_, v_ = numpy(q, k, v)
    ours, clipped = module.nag(controls(module))(q, k, v, CROSS).numpy(), 0
    for row in range(2 * N):
        plus, minus = (probs(q_[row], k_[at + row % N]) @ v_[at + row % N] for at in (N, 0))
        z = 5 * plus - 4 * minus
        for cell in range(16):
            r = np.abs(z[:, cell]).sum() / np.abs(plus[:, cell]).sum()
            clipped += r > 2.5
            expected = 0.5 * z[:, cell] * min(r, 2.5) / r + 0.5 * plus[:, cell]
            np.testing.assert_allclose(ours[row, :, cell], expected, atol=1e-10)
    assert 0 < clipped < 2 * N * 16  # both sides of the threshold were seen
    with pytest.raises(isadca.Problem, match="guidance"):
        module.nag(controls(module, halves=1))


def test_reweight():
    module, (q, k, v) = load("reweight"), drawn(CROSS)
    q_, k_, v_ = numpy(q, k, v)
    expected = oracle.attention(q_, k_, v_)
    expected[N:] += (probs(q_, k_)[..., 2:4] @ v_[..., 2:4, :])[N:]  # the last word's share, a second time
    is_close(module.reweight(controls(module))(q, k, v, CROSS), expected)
    q, k, v = drawn()
    is_close(module.reweight(controls(module))(q, k, v, UP), oracle.attention(*numpy(q, k, v)))


@pytest.mark.parametrize("site, w", [(CROSS, 1.0), (UP, 0.3)], ids=["cross", "self"])
def test_dense_diffusion(site, w):
    module, (q, k, v) = load("dense_diffusion"), drawn(site)
    q_, k_, v_ = numpy(q, k, v)
    inside = np.zeros((4, 4), bool)
    inside[1:3, 2:] = True          # BOX: 0.2 to 0.8 of the height, the right half; cells by their centres
    inside = inside.flatten()
    expected = oracle.attention(q_, k_, v_)
    for row in range(N, 2 * N):
        for head in range(HEADS):
            for i in range(16):
                s = k_[row, head] @ q_[row, head, i]
                r = inside == inside[i] if site.kind == "self" else inside[i] & np.isin(np.arange(TOKENS), [2, 3])
                share = np.mean(inside == inside[i])
                m = w * 0.7**5 * (1 - share) * np.where(r, s.max() - s, s.min() - s)
                expected[row, head, i] = softmax((s + m) / np.sqrt(WIDTH)) @ v_[row, head]
    is_close(module.dense_diffusion(controls(module, i=2))(q, k, v, site), expected)
    assert module.dense_diffusion(controls(module, i=3)) is isadca.attend  # after 30 % of the steps


# ---- guidance --------------------------------------------------------------------------------------------------

def test_pag():
    module, (q, k, v) = load("pag"), drawn()
    m = method_of(module).guidance
    rows = module.pag(controls(module))
    u, c, p = normal(3, N, 4, 8, 8)
    assert [row.context for row in rows] == ["unconditional", "text", "text"]
    is_close(guide([u, c, p], *(row.weight for row in rows[1:])), (u + m * (c - u) + 3 * (c - p)).numpy())
    alone = module.pag(controls(module, conditions=SimpleNamespace(text_kv=HALVES[1:])))
    assert [row.context for row in alone] == ["text", "text"]
    is_close(guide([p, c], alone[1].weight), (c + 3 * (c - p)).numpy())
    plain = oracle.attention(*numpy(q, k, v))
    for row in rows[:2]:
        is_close(row.attend(q, k, v, MID), plain)
    is_close(rows[2].attend(q, k, v, MID), v.numpy())
    is_close(rows[2].attend(q, k, v, UP), plain)


def test_seg():
    module, (q, k, v) = load("seg"), drawn()
    perturbed, text = module.seg(controls(module))
    c, p = normal(2, N, 4, 8, 8)
    assert perturbed.context == text.context == "text"
    is_close(guide([p, c], text.weight), (c + 3 * (c - p)).numpy())
    g = np.exp(-0.5 * (np.arange(-2, 3) / 10) ** 2)
    g /= g.sum()
    grid = np.pad(q.numpy().reshape(2 * N, HEADS, 4, 4, WIDTH), ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), "reflect")
    blurred = sum(g[y] * g[x] * grid[:, :, y:y + 4, x:x + 4] for y in range(5) for x in range(5))
    _, k_, v_ = numpy(q, k, v)
    is_close(perturbed.attend(q, k, v, MID), oracle.attention(blurred.reshape(2 * N, HEADS, 16, WIDTH), k_, v_))
    for site in (UP, CROSS._replace(place="mid")):
        is_close(perturbed.attend(q, k, v, site), oracle.attention(*numpy(q, k, v)))


def test_t_gate():
    module, (q, k, v) = load("t_gate"), drawn(CROSS)
    shared = controls(module).conditions
    step = lambda i: module.t_gate(controls(module, i=i, conditions=shared))
    assert step(2) is isadca.attend
    both = oracle.attention(*numpy(q, k, v))
    is_close(step(3)(q, k, v, CROSS), both)  # the fourth of ten steps: the gate
    [row] = step(4)
    assert row.context == "text"
    later = [x[:N] for x in drawn(CROSS)]
    is_close(row.attend(*later, CROSS), (both[:N] + both[N:]) / 2)
    later = [x[:N] for x in drawn()]
    is_close(row.attend(*later, UP), oracle.attention(*numpy(*later)))


def test_todo():
    module, (q, k, v) = load("todo"), drawn()
    cells = [0, 2, 8, 10]  # every second one of 4 x 4
    finest = controls(module, z=normal(N, 4, 4, 4))
    q_, k_, v_ = numpy(q, k, v)
    is_close(module.todo(finest)(q, k, v, UP), oracle.attention(q_, k_[:, :, cells], v_[:, :, cells]))
    is_close(module.todo(controls(module))(q, k, v, UP), oracle.attention(q_, k_, v_))  # half the latent's side


def test_freeu():
    module = load("freeu")
    edit, h = module.freeu(controls(module)), normal(N, 6, 4, 5)
    for place, b in (("mid_block.resnets.1", 1.5), ("up_blocks.1.attentions.0", 1.6), ("up_blocks.2.resnets.0", 1)):
        is_close(edit(h, place), h.numpy() * np.array([b, b, b, 1, 1, 1])[:, None, None])
    for block, s in ((0, 0.9), (1, 0.2)):
        waves = np.fft.fftshift(np.fft.fft2(h.numpy()), (-2, -1))
        waves[..., 1:3, 1:3] *= s  # the authors' box of threshold 1 about the centre, 4 // 2 and 5 // 2
        expected = np.fft.ifft2(np.fft.ifftshift(waves, (-2, -1))).real
        is_close(edit(h, f"up_blocks.{block}.skips.1"), expected)
    assert edit(h, "up_blocks.2.skips.0") is h and edit(h, "conv_in") is h


# ---- the batch -------------------------------------------------------------------------------------------------

def test_story_diffusion():
    module, (q, k, v) = load("story_diffusion"), drawn()
    attend = module.story_diffusion(controls(module))
    ours, (q_, k_, v_) = attend(q, k, v, UP).numpy(), numpy(q, k, v)
    taken = torch.rand(N, 16, generator=torch.Generator().manual_seed(3)).numpy() < 0.5
    for half in (0, 1):
        for row in (0, 1):
            own, other, cells = 2 * half + row, 2 * half + 1 - row, taken[1 - row]
            keys, values = (np.concatenate([x[own], x[other][:, cells]], 1) for x in (k_, v_))
            np.testing.assert_allclose(ours[own], probs(q_[own], keys) @ values, atol=1e-10)
    is_close(attend(q, k, v, UP._replace(place="down")), oracle.attention(q_, k_, v_))
    assert module.story_diffusion(controls(module, i=0)) is isadca.attend


# ---- before a step ---------------------------------------------------------------------------------------------

def at_step(model, z, i, prompt="a lemon", **changes):
    """True controls for a model's own pass, of ten steps."""
    context = model.context(["", prompt])
    told = Conditions(context, [model.unet.keys_values(half) for half in context.split(1)],
                      model.tokenizer.words(prompt), {}, {})
    fields = dict(z=z, t=700, i=i, steps=10, lam=0, conditions=told, ref_kv={}, ref_eps=None, mask=None,
                  method=isadca.Method(), kernel=isadca.attend)
    return Controls(**fields | changes)


def test_attend_and_excite(tiny):
    """The gradient, against differences of the loss, which is written again in NumPy."""
    module, z = load("attend_and_excite"), normal(2, 4, 8, 8)
    module.COARSE = 1  # the grid of the tiny UNet's six layers; its middle has one
    c = at_step(tiny, z, 2)

    def losses(z):
        maps = []

        def kernel(q, k, v, site):
            if site.kind == "cross" and site.hw == (8, 8):
                maps.append(probs(*numpy(q, k)).mean(1))
            return isadca.attend(q, k, v, site)
        tiny.noise(z, 700, tiny.context(["a lemon"]), kernel)
        heat = softmax(100 * np.mean(maps, 0)[:, :, 1:-1])[..., 1].reshape(-1, 8, 8)  # "lemon", after "a"
        padded, g = np.pad(heat, ((0, 0), (1, 1), (1, 1)), "reflect"), np.exp(-np.array([1, 0, 1]) / (2 * 0.5**2))
        g = np.outer(g, g) / g.sum() ** 2
        smooth = sum(g[y, x] * padded[:, y:y + 8, x:x + 8] for y in range(3) for x in range(3))
        return 1 - smooth.max((1, 2))
    along = normal(2, 4, 8, 8)
    slope = (losses(z + 1e-6 * along) - losses(z - 1e-6 * along)) / 2e-6
    with torch.no_grad():
        moved = module.excite(tiny, c)
    np.testing.assert_allclose(((z - moved) * along).sum((1, 2, 3)), 20 * 0.9**0.5 * slope, rtol=1e-4)
    assert module.excite(tiny, c._replace(i=5)) is z  # half of the steps


def test_plug_and_play(tiny, tiny_ref):
    """Features and maps of a pass over the reference alone, and where and when they are put in."""
    module, z_ref, own = load("plug_and_play"), tiny_ref.chain[3:4], {}

    def keep(h, place):
        own[place] = h
        return h

    def kernel(q, k, v, site):
        own[site.name] = q, k
        return isadca.attend(q, k, v, site)
    tiny.noise(z_ref, 700, tiny.context([""]), kernel, keep)
    c = at_step(tiny, normal(N, 4, 8, 8), 4, ref_z=torch.stack([z_ref[0], normal(4, 8, 8)]))
    assert module.read(tiny, c) is c.z
    h = normal(2 * N, *own["up_blocks.1.resnets.1"].shape[1:])
    edit = module.features(c)
    assert torch.equal(edit(h, "up_blocks.1.resnets.1"), own["up_blocks.1.resnets.1"].expand_as(h))
    assert edit(h, "up_blocks.1.resnets.0") is h and module.features(c._replace(i=8))(h, module.FEATURE) is h
    for site in (site for site in tiny.unet.sites if site.kind == "self"):
        (q, k), v = own[site.name], normal(2 * N, *own[site.name][0].shape[1:])
        theirs = [normal(*v.shape), normal(*v.shape)]
        swapped = site.place == "up" and not site.name.startswith(("up_blocks.0", "up_blocks.1.attentions.0"))
        a = probs(*numpy(q, k)) if swapped else probs(*numpy(*theirs))
        is_close(module.maps(c)(*theirs, v, site), a @ v.numpy())
    assert module.maps(c._replace(i=5)) is isadca.attend


def test_style_id():
    module, (q, k, v), q_ref = load("style_id"), drawn(), drawn(rows=1)[0]
    content, style = drawn(rows=1)[1:], drawn(rows=1)[1:]
    z_ref = normal(2, 4, 8, 8) * 3 + 1
    c = controls(module, ref_qk={UP.name: (q_ref, None)}, ref_z=z_ref,
                 ref_kv={UP.name: [torch.cat(pair, 2) for pair in zip(content, style)]})
    q_, q_ref_, k_style, v_style = numpy(q, q_ref, *style)
    mixed = 1.5 * (0.75 * q_ref_ + 0.25 * q_)
    is_close(module.style_id(c)(q, k, v, UP), probs(mixed, k_style) @ v_style)
    for untouched in (UP._replace(place="down"), UP._replace(hw=(2, 2)), UP._replace(kind="cross")):
        is_close(module.style_id(c)(q, k, v, untouched), oracle.attention(*numpy(q, k, v)))
    z, style = numpy(c.z, z_ref[1])
    at = dict(axis=(-1, -2), keepdims=True)
    std = [np.sqrt(x.var(ddof=1, **at) + 1e-5) for x in (z, style)]
    c.i = 0
    is_close(module.start(None, c), (z - z.mean(**at)) / std[0] * std[1] + style.mean(**at))
    c.i = 1
    assert module.start(None, c) is c.z


# ---- what the seam gives them ----------------------------------------------------------------------------------

def test_ref_qk_is_the_reference_s_own_pass(tiny, tiny_ref):
    """Queries and keys of every layer, cross-attention too, at each step; nothing where no method asks."""
    given = []

    def mix(controls):
        given.append(controls.ref_qk)
        return controls.kernel
    for asks in (False, True):
        sample(tiny, tiny_ref, [Run("a lemon", isadca.Method(mix=mix, ref_maps=asks))])
    assert given[:6] == [{}] * 6 and set(given[6]) == {site.name for site in tiny.unet.sites}
    own = {}

    def kernel(q, k, v, site):
        own[site.name] = q, k
        return isadca.attend(q, k, v, site)
    last = tiny.schedule.steps(6)[-1].t
    tiny.noise(tiny_ref.chain[1:2], last, tiny.context([""]), kernel)
    for name, pair in given[-1].items():
        for ours, theirs in zip(pair, own[name]):
            torch.testing.assert_close(ours, theirs)


def test_what_a_run_keeps_is_its_own(tiny, tiny_ref):
    seen = []

    def mix(controls):
        seen.append(dict(controls.conditions.kept))
        controls.conditions.kept[controls.conditions.words[0][0]] = controls.i
        return controls.kernel
    method = isadca.Method(mix=mix)
    sample(tiny, tiny_ref, [Run("lemon", method), Run("tulip", method)])
    assert seen[:4] == [{}, {}, {"lemon": 0}, {"tulip": 0}]


# ---- every file ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_short_and_says_where_it_is_from(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    doc = load(path.stem).__doc__
    assert ("arXiv" in doc and "authors' code: " in doc) or "no paper: " in doc
    assert f"examples/methods/{path.name}:{path.stem.upper()}" in doc
    assert f"test_{path.stem}" in globals(), "its equation is not tested"


@pytest.mark.parametrize("name", NAMES)
def test_a_method_runs_and_changes_the_picture(name, tiny, tiny_ref):
    """Through the real Controls, with two variations; where guidance is 1, too."""
    method = method_of(load(name))
    seeds = (0, 1) if not method.deterministic else (0,)
    layers = method.layers and (-1, -2)  # this UNet has fewer
    for guidance in (method.guidance, 1) if name != "nag" else (method.guidance,):
        own = replace(method, guidance=guidance, layers=layers)
        plain = replace(own, mix=lambda controls: controls.kernel, edit=None, before_step=None)
        ours, theirs = sample(tiny, tiny_ref, [Run("a lemon", own, seeds), Run("a lemon", plain, seeds)])
        assert ours.isfinite().all() and ours.shape == theirs.shape
        assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_command_of_the_docstring_runs(path, tmp_path, monkeypatch):
    doc = load(path.stem).__doc__.replace("\\\n", " ")
    [command] = [line.strip() for line in doc.splitlines() if line.strip().startswith("isadca vary")]
    words = shlex.split(command)[1:]
    monkeypatch.chdir(ROOT)
    for flag in ("-o", "--grid"):
        if flag in words:
            words[words.index(flag) + 1] = str(tmp_path / words[words.index(flag) + 1])
    from isadca.app.cli import main
    assert not main([*words, "--steps", "4", "--quiet"])
    assert list(tmp_path.glob("*.png"))
