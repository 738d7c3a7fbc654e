"""Methods of the gallery that act within attention, each against its paper's equation, written again in NumPy."""

import numpy as np
import oracle
import pytest
from gallery import (CROSS, HEADS, N, TOKENS, UP, WIDTH, controls, drawn, is_close, load, normal,
                     numpy, probs, softmax)

import isadca


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
