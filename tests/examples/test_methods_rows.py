"""Methods of the gallery that act on rows of guidance, on the batch or on z_t, each against its paper's equation,
written again in NumPy."""

from types import SimpleNamespace

import numpy as np
import oracle
import torch
from gallery import (CROSS, HALVES, HEADS, MID, N, UP, WIDTH, controls, drawn, is_close, load, method_of, normal,
                     numpy, probs, softmax)

import isadca
from isadca.loop import Conditions, Controls, guide


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
