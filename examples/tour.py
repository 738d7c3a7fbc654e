"""A tour of the paper, one equation at a time. This file is the source of tour.ipynb; see make_tour.py."""

# %% [markdown]
# # Image variations, by running them
#
# You have a picture and a sentence. You want the picture again, but with what the sentence says: a rocket on a
# dotted backdrop, and "a lemon", should give a lemon on *that* backdrop. Nothing is to be trained for it.
#
# This is a tour of [one paper that does so](https://doi.org/10.1109/ACCESS.2024.3477734) (Jeong et al., IEEE Access
# 2024). It visits every equation. At each stop there is
#
# - what the equation says, in words,
# - the function that computes it, as a link to its line,
# - a cell that runs it on something small, and **asserts** that it is true,
# - a picture.
#
# You need PyTorch and the softmax, and no more. Every other term is explained where it first occurs, with its source.
#
# **How to use it.** Read it where it is: the outputs are here. Better, run it: two processor cores will do, and
# nothing is downloaded.
#
# ```
# pip install -e . jupyterlab
# jupyter lab examples/tour.ipynb      # or, without a notebook: python examples/tour.py
# ```
#
# Now and then you are asked to **predict, then run**. Say your answer aloud before you unfold ours. Some cells do
# things wrong on purpose; those teach the most.

# %%
import tempfile
from dataclasses import replace
from statistics import mean

import torch
from PIL import ImageChops
from tour_pictures import border_colour, curves, difference, framed, grey, heat, matrix, row, sheet

import isadca
from isadca.common.images import clip_pixels, to_images, to_tensor
from isadca.ddim import add_noise, draw_noise, inverse_step, predict_x0, step
from isadca.evaluation.metrics import psnr, ssim
from isadca.loop import guide

model = isadca.load(device="cpu")
references = isadca.default_weights() / "references"
rocket, cat = (isadca.load_image(references / f"{name}.png") for name in ("rocket", "cat"))
row(("our reference", rocket), ("another one", cat))

# %% [markdown]
# The model is a small relative of Stable Diffusion 1.5. It has the same parts under the same names, but it knows one
# world only: 48 emoji on patterned backdrops, 64 pixels a side. It was
# [trained in this repository](../weights/demo/README.md).
#
# ## 1. A picture becomes a latent
#
# Diffusion on pixels is slow. So a picture is first squeezed into a smaller tensor, its **latent**, by an
# **autoencoder** ("VAE"): one network encodes, another decodes
# ([latent diffusion](https://arxiv.org/abs/2112.10752)). From here on, everything happens among latents. We decode
# only to look. The paper writes $x_0$ for the picture and $z_0$ for its latent.
#
# Functions: [`networks.model.Model.encode`], [`networks.model.Model.decode`].

# %%
z0 = model.encode(to_tensor(rocket))  # (1,3,64,64) -> (1,4,16,16)
back = to_images(model.decode(z0))[0]

print(f"{rocket.width * rocket.height * 3} numbers became {z0.numel()}")
print(f"after decoding: {psnr(back, rocket):.0f} dB PSNR (30 is hard to tell apart at this size)")
assert z0.shape == (1, 4, 16, 16)
assert psnr(back, rocket) > 25
channels = [(f"latent channel {i}", grey(z0[0, i])) for i in range(4)]
row(("the picture", rocket), *channels, ("decoded again", back))

# %% [markdown]
# A latent still has the layout of its picture: each of its 16 × 16 cells stands for 4 × 4 pixels. That is why the
# dots can be seen in it. (In Stable Diffusion 1.5 a cell stands for 8 × 8 pixels, and a picture has 64 × 64 cells.)
#
# ## 2. Eq. 1: what the network was trained to do
#
# $$L(\theta) = \mathbb{E}\left[\,\lVert \epsilon - \epsilon_\theta(z_t, t, c) \rVert^2\,\right]$$
#
# Mix a latent with random noise $\epsilon$. Show the result, $z_t$, to a network $\epsilon_\theta$, and ask: *which
# noise was it?* It is told two more things: $t$, how much noise there is (1: hardly any, 1000: hardly anything else),
# and $c$, a caption. The loss is the squared error of its answer
# ([denoising diffusion](https://arxiv.org/abs/2006.11239)).
#
# The network is a **UNet**: convolutions that go down to coarser grids and up again, with attention layers between
# them. Others trained it; this paper trains nothing. So there is no function for Eq. 1 here, but we can compute it.
# The noise comes from [`ddim.draw_noise`], the mixture from [`ddim.add_noise`] (that is Eq. 2, next).
#
# **Predict, then run.** A network that always answers "zero" has a loss of 1, since the noise has variance 1. Where
# will ours be better: at much noise, or at little?
#
# <details><summary>Answer</summary>
#
# At much noise. There, $z_t$ *is* nearly the noise, and copying the input is nearly right. At $t = 1$ the noise is so
# faint that it can hardly be seen beside the picture.
#
# </details>

# %%
noise = draw_noise(z0, torch.Generator().manual_seed(0))
no_caption = model.context([""])
loss = {}
for t in (1, 201, 501, 801, 981):
    z_t = add_noise(z0, noise, model.schedule.alpha_bar(t))
    loss[t] = ((noise - model.noise(z_t, t, no_caption)) ** 2).mean().item()  # Eq. 1, for one picture

print({t: round(value, 3) for t, value in loss.items()})
assert all(value < 1 for value in loss.values())
assert loss[981] < loss[501] < loss[1]

# %% [markdown]
# ## 3. Eq. 2: towards noise
#
# $$z_t = \sqrt{\alpha_t}\, z_{t-1} + \sqrt{1 - \alpha_t}\; \epsilon_t$$
#
# One step makes the latent a little fainter and adds a little noise. The two factors are chosen so that variance 1
# stays variance 1. A thousand such steps can be taken at once. With $\bar\alpha_t$, the product of all $\alpha$ up to
# $t$,
#
# $$z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon$$
#
# The paper writes $\alpha_t$ for both; from Eq. 3 on it means the product. Functions: [`ddim.add_noise`], and
# [`ddim.Schedule`] for the table of $\bar\alpha_t$.
#
# The cell takes 981 small steps on paper: it follows the factor of $z_0$ and the variance of the noise.

# %%
alpha_bar = model.schedule.alpha_bar
factor, variance = alpha_bar(0) ** 0.5, 1 - alpha_bar(0)
for t in range(1, 982):
    alpha = alpha_bar(t) / alpha_bar(t - 1)
    factor, variance = alpha**0.5 * factor, alpha * variance + (1 - alpha)

print(f"after 981 steps: {factor:.4f} of the picture, noise of variance {variance:.4f}")
assert abs(factor - alpha_bar(981) ** 0.5) < 1e-6
assert abs(variance - (1 - alpha_bar(981))) < 1e-6
times = list(range(1, 1000, 20))
curves(times, {"share of the picture": [alpha_bar(t) ** 0.5 for t in times],
               "share of the noise": [(1 - alpha_bar(t)) ** 0.5 for t in times]}, "t")

# %%
levels = (1, 201, 401, 601, 801, 981)
row(*[(f"t = {t}", isadca.decode(model, add_noise(z0, noise, alpha_bar(t)))[0]) for t in levels])

# %% [markdown]
# (Noise looks like blotches here because we decode it like a picture. It is only there to be looked at.)
#
# ## 4. Eq. 3: back from noise
#
# $$z_{t-1} = \frac{1}{\sqrt{\alpha_t}}\left(z_t - \frac{1-\alpha_t}{\sqrt{1-\alpha_t}}\,
# \epsilon_\theta(z_t, t, c)\right) + \sigma_t\, z$$
#
# The network says which noise it sees. Take it away and scale up: what remains is the clean latent that the network
# believes in, $\hat z_0$ ([`ddim.predict_x0`]). Now put the *same* noise back, but less of it, as the next lower
# level has ([`ddim.add_noise`]). That is one step of **DDIM** ([arXiv
# 2010.02502](https://arxiv.org/abs/2010.02502)), and in code it is one line: [`ddim.step`]. No new noise is drawn
# ($\sigma_t = 0$), so the way back has no chance in it.
#
# Read literally, the equation stops half-way: with $\bar\alpha$ and $\sigma = 0$ its right side *is* $\hat z_0$. A
# whole picture in one jump, and a blurred one. The text beside it says DDIM, and so we take DDIM.

# %%
a, b = alpha_bar(501), alpha_bar(451)
z_t = add_noise(z0, noise, a)
eps = model.noise(z_t, 501, no_caption)
literal = (z_t - (1 - a) / (1 - a) ** 0.5 * eps) / a**0.5

assert torch.allclose(literal, predict_x0(z_t, eps, a), atol=1e-5)
assert torch.equal(step(z_t, eps, a, b), add_noise(predict_x0(z_t, eps, a), eps, b))
row(("z at 501", isadca.decode(model, z_t)[0]), ("Eq. 3 literally", isadca.decode(model, literal)[0]),
    ("z at 451, by DDIM", isadca.decode(model, step(z_t, eps, a, b))[0]), ("the truth", rocket))

# %% [markdown]
# ### Sampling, and classifier-free guidance
#
# Start from pure noise, step down, and a picture appears. To make it follow a caption the network is asked twice:
# with the caption, and with an empty one, "". Then the difference is exaggerated, by a factor $m$:
#
# $$\epsilon = \epsilon_\varnothing + m\,(\epsilon_c - \epsilon_\varnothing)$$
#
# This is **classifier-free guidance** ([arXiv 2207.12598](https://arxiv.org/abs/2207.12598), [`loop.guide`]). The
# paper uses it everywhere, with $m = 7$, and has no number for it. It doubles the work: two rows of the UNet for one
# picture.
#
# A caption reaches the network as 32 vectors (77 in Stable Diffusion), one for each word or piece of a word, from the
# text encoder of **CLIP** ([arXiv 2103.00020](https://arxiv.org/abs/2103.00020)): [`networks.model.Model.context`].

# %%
def generate(caption, m, steps=20, seed=3):
    """Text to image. Returns the last latent, and each step's clean prediction."""
    text, seen = model.context(["", caption]), []
    z = draw_noise(z0, torch.Generator().manual_seed(seed))
    for stride in model.schedule.steps(steps):          # (951, 901), (901, 851), ..., (1, -49)
        eps = guide(model.noise(z.repeat(2, 1, 1, 1), stride.t, text).split(1), m)
        seen.append((stride.t, predict_x0(z, eps, alpha_bar(stride.t))))
        z = model.schedule.step(z, eps, stride)
    return z, seen


fox, seen = generate("a fox on a green striped background", m=7)
believed = [(f"believed at t = {t}", isadca.decode(model, x0)[0]) for t, x0 in seen[::4]]
row(*believed, ("the end", isadca.decode(model, fox)[0]))

# %% [markdown]
# What is large is decided first: colours, then the place of things, then their edges.
#
# **Predict, then run: a failure.** What will $m = 1$ do, and what $m = 15$?
#
# <details><summary>Answer</summary>
#
# $m = 1$ is no guidance: the caption counts as little as it did in training. The colours are paler, and the object
# may be hard to name. $m = 15$ overshoots: colours too strong, shapes swollen and frayed. The steps assume that
# $\epsilon$ is noise of variance 1; the exaggerated one is not.
#
# </details>

# %%
ends = {m: generate("a fox on a green striped background", m)[0] for m in (1, 3, 7, 15)}
print("deviation of the latents:", {m: f"{z.std():.2f}" for m, z in ends.items()})
assert ends[1].std() < ends[7].std() < ends[15].std()
row(*[(f"guidance m = {m}", isadca.decode(model, z)[0]) for m, z in ends.items()])

# %% [markdown]
# ## 5. Eq. 4: a picture's own noise
#
# $$\bar z_{t} = \sqrt{\bar\alpha_{t}}\; \hat z_0 + \sqrt{1-\bar\alpha_{t}}\; \epsilon_\theta(\bar z_{t'}, t, c),
# \qquad t' < t$$
#
# DDIM's step is an affine map, so it can be walked backwards: from the reference *up* to noise. The result,
# $\bar z_T$, is the noise from which the reference would have been drawn. This is **DDIM inversion**
# ([`ddim.inverse_step`], in a loop: [`reference.invert`]). A bar means: of the reference.
#
# (We write the equation as it is used. The paper's has the indices one off, which a few lines of algebra show: its
# squared coefficients do not add up to 1.)
#
# For one and the same $\epsilon$ the way up undoes the way down exactly. But we need $\epsilon$ at the upper level
# before we are there. So it is taken at the lower level, and a small error remains.

# %%
assert torch.allclose(inverse_step(step(z_t, eps, a, b), eps, b, a), z_t, atol=1e-5)  # exact, for one eps

STEPS = 20
chain = [z0]
for stride in reversed(model.schedule.steps(STEPS)):
    eps = model.noise(chain[-1], stride.t, no_caption)
    chain.append(model.schedule.inverse_step(chain[-1], eps, stride))

ref = isadca.invert(model, rocket, steps=STEPS)
assert torch.allclose(torch.cat(chain), ref.chain, atol=1e-5)  # those four lines are isadca.invert

found = isadca.reconstruct(model, ref)
print(f"{len(ref.chain)} latents; back again without any control: {psnr(found, rocket):.1f} dB")
assert psnr(found, rocket) > 25
links = [(f"after {i} steps", isadca.decode(model, ref.chain[[i]])[0]) for i in (0, 5, 10, 15, 20)]
row(*links, ("back again", found))

# %% [markdown]
# **Predict, then run: a failure.** The network wants to know the noise level, as the label $t$. On the way from $t'$
# up to $t$ we show it a latent of level $t'$. A textbook would say: label it $t'$, since that is its level. The code
# above says $t$. Which is better, with ten long steps?
#
# <details><summary>Answer</summary>
#
# $t$, by far. The step down from $t$ to $t'$ will ask the network with the label $t$. The way up is to guess *that*
# answer, not to be right about itself. With many short steps the two labels are nearly the same, and so is the
# result.
#
# </details>

# %%
def there_and_back(steps, label):
    z = z0
    for stride in reversed(model.schedule.steps(steps)):
        z = model.schedule.inverse_step(z, model.noise(z, label(stride), no_caption), stride)
    return isadca.reconstruct(model, isadca.Reference(rocket, z.repeat(steps + 1, 1, 1, 1)))


upper = there_and_back(10, lambda stride: stride.t)
lower = there_and_back(10, lambda stride: max(stride.t_prev, 0))
print(f"label t: {psnr(upper, rocket):.1f} dB, textbook label: {psnr(lower, rocket):.1f} dB")
assert psnr(upper, rocket) > psnr(lower, rocket) + 3
row(("the reference", rocket), ("label t", upper), ("the textbook's label", lower))

# %% [markdown]
# ## 6. Eq. 6: attention, by hand
#
# $$z' = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d_k}}\right)V$$
#
# (Eq. 6 before Eq. 5: the machine before what is put into it.)
#
# A **token** is a vector that stands for something: a cell of the grid, or a word. From each token the layer makes
# three more by a matrix each: a **query** (what am I looking for?), a **key** (what do I have?) and a **value**
# (what do I pass on?). Each query is compared with each key by a scalar product; the softmax turns the scores into
# shares that add up to 1; the output is the mean of the values with these shares ([arXiv
# 1706.03762](https://arxiv.org/abs/1706.03762)). The root keeps the scores from growing with the vectors' length.
#
# In the code: [`attention.attention_probs`], [`attention.attend_reference`], and fused [`attention.attend`]. Here
# with four tokens of eight numbers.

# %%
torch.manual_seed(3)
q, k, v = 1.2 * torch.randn(3, 4, 8)
shares = (q @ k.T / 8**0.5).softmax(dim=-1)             # (4,4): row i is where query i looks
by_hand = shares @ v


def lift(x):
    return x[None, None]                                # the library's shape: one row, one head, (1,1,4,8)


assert torch.allclose(shares.sum(1), torch.ones(4))
assert torch.allclose(by_hand, isadca.attend_reference(lift(q), lift(k), lift(v))[0, 0], atol=1e-6)
assert torch.allclose(by_hand, isadca.attend(lift(q), lift(k), lift(v), None)[0, 0], atol=1e-6)
matrix(shares, [f"key {j}" for j in range(4)])

# %% [markdown]
# The UNet has two kinds of such layers. In **self-attention** queries, keys and values all come from the cells of the
# picture: cells read cells. In **cross-attention** the keys and values come from the caption: cells read words.
#
# All of them call *one* function that is handed down to them, `attend(q, k, v, site)`. The site says who is calling.
# Replace the function and you have changed the network, without touching it. That is the whole trick of this
# repository: everything below is such a function.

# %%
for site in model.unet.sites[::2]:
    print(f"block {site.layer}, {site.place:<4}  {site.name}")

# %% [markdown]
# ## 7. Eq. 5: intra-image self-attention (ISA)
#
# $$Q = W_Q(z_t), \qquad K = W_K(\bar z_t \oplus z_t), \qquad V = W_V(\bar z_t \oplus z_t)$$
#
# The new picture's queries may look at *two* pictures: at itself, and at the reference at the same noise level. So it
# can copy what the reference has, wherever that fits ([RIVAL](https://arxiv.org/abs/2305.18729),
# [MasaCtrl](https://arxiv.org/abs/2304.08465); here [`attention.isa`]).
#
# $\oplus$ sets the reference's tokens beside the picture's own: four keys become eight. One softmax over all of them
# decides who is heard. That makes ISA a gate: with $w$, the share that goes to the reference,
# the output is $w \cdot$ (attention to the reference) $+\,(1-w)\,\cdot$ (attention to itself).

# %%
k_ref, v_ref = 1.2 * torch.randn(2, 4, 8)
both = (q @ torch.cat([k_ref, k]).T / 8**0.5).softmax(-1)   # (4,8)
by_hand = both @ torch.cat([v_ref, v])

here = isadca.Site("a layer", "self", "mid", 0, (2, 2))
isa = isadca.isa({"a layer": (lift(k_ref), lift(v_ref))})
assert torch.allclose(by_hand, isa(lift(q), lift(k), lift(v), here)[0, 0], atol=1e-6)

w = both[:, :4].sum(1, keepdim=True)
alone = (q @ k_ref.T / 8**0.5).softmax(-1) @ v_ref
assert torch.allclose(by_hand, w * alone + (1 - w) * shares @ v, atol=1e-6)
matrix(both, [f"ref {j}" for j in range(4)] + [f"own {j}" for j in range(4)])

# %% [markdown]
# **Predict, then run: a failure.** The paper says that $\oplus$ joins "along the feature dimension". Then a token of
# 64 numbers would become one of 128, instead of 256 tokens becoming 512. Try it on a layer of the model.
#
# <details><summary>Answer</summary>
#
# It cannot work: $W_K$ is a trained matrix for vectors of 64 numbers. Longer vectors would need a new matrix, and a
# new matrix would need training, which this method does without. So it must be the tokens.
#
# </details>

# %%
W_K = model.unet.get_submodule(model.unet.sites[0].name).to_k
tokens = torch.randn(1, 256, W_K.in_features)           # of one picture; the other's have this shape, too
print("along tokens:  ", tuple(W_K(torch.cat([tokens, tokens], dim=1)).shape))
try:
    W_K(torch.cat([tokens, tokens], dim=2))
    raise AssertionError("this should not be possible")
except RuntimeError as error:
    print("along features:", error)

# %% [markdown]
# ### Where the reference's keys come from
#
# They depend on the reference and the level alone, never on what is being made. So they are computed once, by sending
# the known chain through the network and storing the keys and values of every layer: [`reference.replay`], with
# [`attention.capture`].
#
# This gives a test that costs nothing. Suppose the new picture *is* the reference: $z_t = \bar z_t$. Then ISA sees
# every key twice, and a softmax over twins gives the same mean as one over singles. **ISA must change nothing.**
#
# **Predict, then run: a failure.** RIVAL's first code took the reference one step late: keys of level $t + 1$ while
# the picture was at $t$ ([its issue 8](https://github.com/dvlab-research/RIVAL/issues/8)). Would you have seen it in
# the pictures?
#
# <details><summary>Answer</summary>
#
# Hardly. Look at the pair below: both are lemons on dots. An error of one step is an error of a few per cent in every
# layer. The identity sees it at once. This is why this repository tests identities before it looks at pictures.
#
# </details>

# %%
late = replace(ref, chain=torch.cat([ref.chain[1:], ref.chain[-1:]]))   # the next level in each one's place
i, stride = 10, model.schedule.steps(STEPS)[10]
z_bar = ref.chain[[STEPS - i]]
plain = model.noise(z_bar, stride.t, no_caption)
errors = {}
for name, source in (("in step", ref), ("one step late", late)):
    keys_values = list(isadca.replay(model, source))[i].kv
    under_isa = model.noise(z_bar, stride.t, no_caption, isadca.isa(keys_values))
    errors[name] = (under_isa - plain).abs().max().item()

print({name: f"{error:.0e}" for name, error in errors.items()})
assert errors["in step"] < 1e-4 < 1e-3 < errors["one step late"]
[right] = isadca.vary(model, ref, "a lemon", lam=1.0)
[wrong] = isadca.vary(model, ref, "a lemon", lam=1.0, replayed=list(isadca.replay(model, late)))
row(("the reference", rocket), ("ISA alone, in step", right), ("one step late", wrong))

# %% [markdown]
# ### What the picture reads in the reference
#
# To see where attention goes, a function is put in the place of `attend` that notes the shares and then does the usual:
# [`app.record.record`]. Below: three cells of the new picture (framed), and where each looks in the last step. Left of
# a pair: in itself. Right: in the reference.

# %%
def last_step(site, t, branch):
    return site.kind == "self" and t == 1


recorder = isadca.record(isadca.Method(lam=1.0), last_step)
[lemon] = isadca.vary(model, ref, "a lemon", recorder.method)
maps = {found.site.hw: found.probs for found in recorder.maps}    # (N,2N) each, mean of the heads
assert difference(lemon, right) <= 1                              # to look changes nothing
hw = (8, 8)
looks = maps[hw]
assert torch.allclose(looks.sum(1), torch.ones(64), atol=1e-5)
for (h, w), p in maps.items():
    print(f"{h} × {w} cells: {p[:, : h * w].sum(1).mean():.0%} of the attention goes to the reference")
sheet([[("cell", framed(lemon, hw, at)), ("looks in itself", heat(looks[at, 64:], hw, lemon, at)),
        ("looks in the reference", heat(looks[at, :64], hw, rocket))] for at in (9, 28, 62)])

# %% [markdown]
# Backdrop looks at backdrop, object at object. So ISA carries surfaces, colours and layout: the things that a caption
# never mentions. The interactive page [explore.html](explore.html) lets you click any cell.
#
# ## 8. Eq. 7: a picture as a prompt
#
# $$K = W_K(c_p),\; V = W_V(c_p), \qquad K' = W'_K(c_i),\; V' = W'_V(c_i)$$
#
# CLIP has a second half, an **image encoder**, trained so that a picture and its caption get similar vectors.
# **IP-Adapter** ([arXiv 2308.06721](https://arxiv.org/abs/2308.06721)) turns this one vector into four tokens, $c_i$,
# and gives each cross-attention a second pair of matrices for them. $c_p$ are the caption's tokens, as before.
# Functions: [`networks.model.Model.image_tokens`], [`networks.ip_adapter.IPAdapter.keys_values`].
#
# Guidance needs a version "without". For the caption it is "". For the picture it is a vector of zeros, since that is
# what the adapter saw in training when there was no picture. Hence two rows: [without, with].

# %%
image_tokens = model.image_tokens(rocket)                   # (2,4,128): [zeros, the rocket]
sites, heads = model.unet.sites, model.unet.config.n_heads
ip_kv = model.ip_adapter.keys_values(image_tokens, sites, heads)

first = next(site for site in sites if site.kind == "cross")
k_ip, v_ip = ip_kv[first.name]                              # (2,heads,4,d)
W_K_ip = model.ip_adapter.ip_adapter["1"].to_k_ip           # the files count 1, 3, 5, ...
assert torch.allclose(k_ip.transpose(1, 2).flatten(2), W_K_ip(image_tokens), atol=1e-5)
print(f"keys of one layer: image prompt {k_ip.shape[2]}, caption {no_caption.shape[1]}, "
      f"ISA's reference {len(maps[16, 16])} on the finest grid")

# %% [markdown]
# ## 9. Eq. 8: decoupled cross-attention (DCA)
#
# $$z'' = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d_k}}\right)V \;+\;
# \mathrm{softmax}\!\left(\frac{QK'^\top}{\sqrt{d_k}}\right)V'$$
#
# Two attentions with the same queries: one to the caption, one to the picture's tokens. Their outputs are added
# ([`attention.dca`]).
#
# **Predict, then run.** Why two softmaxes, and not one over all tokens, as in ISA?
#
# <details><summary>Answer</summary>
#
# In one softmax the two would compete: every bit of attention to the picture would be taken from the caption. Here
# each has its own 100 %. That is the "decoupled" in the name, and it is also why a scale can be put before the second
# term.
#
# </details>

# %%
k_words, v_words = torch.randn(2, 5, 8)                 # five words
k_image, v_image = torch.randn(2, 4, 8)                 # four tokens of a picture
to_words = (q @ k_words.T / 8**0.5).softmax(-1) @ v_words
to_image = (q @ k_image.T / 8**0.5).softmax(-1) @ v_image

here = isadca.Site("a layer", "cross", "mid", 0, (2, 2))
dca = isadca.dca({"a layer": (lift(k_image), lift(v_image))})
found = dca(lift(q), lift(k_words), lift(v_words), here)[0, 0]
assert torch.allclose(to_words + to_image, found, atol=1e-6)
print("with a scale of 0 the picture is left out; the paper has 1")

# %% [markdown]
# ### What an image prompt can carry, and what not
#
# Four pictures from random noise, no caption, only the rocket as image prompt. Then **a failure**:
# the zeros are replaced by the picture itself, so that *both* halves of guidance see it.
#
# **Predict, then run.** What will the first row share with the rocket? And what happens in the second?
#
# <details><summary>Answer</summary>
#
# First row: colours, pattern and *what kind of thing* it is, roughly. Not where the dots are, nor the rocket's exact
# shape. Second row: guidance exaggerates the *difference* between its halves. If both see the picture there is no
# difference, and even the backdrop's colour is lost now and then. What stands for "nothing" matters as much as what
# stands for something.
#
# </details>

# %%
def both_halves_see_it(controls):
    """A method's own attention: DCA, but with the picture in place of the zeros."""
    same = {name: (k[-1:], v[-1:]) for name, (k, v) in controls.ip_kv.items()}
    return isadca.dca(same)


zeros = isadca.vary(model, ref, "", "ip-adapter", seeds=range(4), guidance=5.0)
no_zeros = isadca.vary(model, ref, "", "ip-adapter", seeds=range(4), guidance=5.0, mix=both_halves_see_it)


def off(pictures):
    """How far the backdrops' colours are from the rocket's, in grey levels."""
    wanted = border_colour(rocket)
    return torch.stack([(border_colour(p) - wanted).abs().mean() for p in pictures]).mean()


print(f"backdrop off by {off(zeros):.0f} grey levels with the zeros, by {off(no_zeros):.0f} without")
assert off(zeros) < off(no_zeros)
sheet([[("image prompt", rocket)] + [("zeros against it", p) for p in zeros],
       [("image prompt", rocket)] + [("itself against it", p) for p in no_zeros]])

# %% [markdown]
# Why not the place of the dots? Because the vector does not know it. Shift the picture by eight pixels, and hardly a
# pixel is what it was. To CLIP's encoder it is the same picture.
#
# Likeness in pixels is measured by **SSIM**: 1 for equal pictures, around 0 for unrelated ones
# ([Wang et al. 2004](https://doi.org/10.1109/TIP.2003.819861), [`evaluation.metrics.ssim`]). Likeness to CLIP is the
# cosine of the two vectors.

# %%
def embed(image):
    return model.vision(clip_pixels(image, model.vision.config.image_size))[0]


def likeness(a, b):
    return ssim(to_tensor(a), to_tensor(b)).item()


shifted = ImageChops.offset(rocket, 8, 0)
pixels, clip = {}, {}
for name, other in (("shifted", shifted), ("the cat", cat)):
    pixels[name] = likeness(other, rocket)
    clip[name] = torch.cosine_similarity(embed(other), embed(rocket)).item()
    print(f"{name}: SSIM {pixels[name]:.2f}, cosine {clip[name]:.2f}")
assert pixels["shifted"] < 0.5 and clip["shifted"] > 0.9 > clip["the cat"]
row(("the rocket", rocket), ("shifted by 8 pixels", shifted), ("the cat", cat))

# %% [markdown]
# ## 10. Eq. 9: λ
#
# $$\tilde z_t = \lambda\, z'_t + (1 - \lambda)\, z''_t$$
#
# ISA keeps the look of the reference and knows nothing of its meaning. DCA is the other way round. λ mixes them: 1 is
# ISA alone, 0 is DCA alone. The paper does not say *where* it mixes, and there are two good readings.
#
# **In the noise** ([`loop.predict`], the default). Both branches start from the same $z_t$ and predict their noise;
# the predictions are mixed. Figure 2 of the paper looks like this. It needs two passes.
#
# **In the attention** ([`loop.mix_in_attention`]). Inside every block the outputs of two attentions are mixed. One
# pass is enough, at half the cost. The paper's timings look like this.
#
# Does it matter that we mix noise, where the equation has latents? No. DDIM's step is affine and the weights add up
# to 1, so mixing before the step or after it is the same.

# %%
steps_seen = []
isadca.vary(model, ref, "a lemon",
            on_step=lambda run, t, z, noise: steps_seen.append((t, z, noise)))

t, z_t, both = steps_seen[8]
stride = model.schedule.steps(STEPS)[8]
before = model.schedule.step(z_t, 0.7 * both.isa + 0.3 * both.dca, stride)
after = 0.7 * model.schedule.step(z_t, both.isa, stride) + 0.3 * model.schedule.step(z_t, both.dca, stride)
assert torch.allclose(before, after, atol=1e-5)
assert torch.allclose(0.7 * both.isa + 0.3 * both.dca, both.mixed, atol=1e-5)


def clean(eps, z, t):
    return isadca.decode(model, predict_x0(z, eps, alpha_bar(t)))[0]


sheet([[(f"{name}, t = {t}", clean(getattr(noise, name), z, t)) for t, z, noise in steps_seen[::5]]
       for name in ("isa", "mixed", "dca")])

# %% [markdown]
# Each column is one step; shown is the clean picture that each prediction stands for. The branches never run apart:
# both always start from what was mixed the step before.
#
# **Predict, then run.** Where must the two readings agree exactly?
#
# <details><summary>Answer</summary>
#
# At both ends. At λ = 1 each is ISA alone, at λ = 0 each is DCA alone. In between they differ, since the network is
# not linear: the mean of two answers is not the answer to a mean.
#
# </details>

# %%
lams = (0.0, 0.3, 0.5, 0.7, 1.0)
in_noise = [isadca.vary(model, ref, "a lemon", lam=lam)[0] for lam in lams]
in_attention = [isadca.vary(model, ref, "a lemon", lam=lam, mix="attention")[0] for lam in lams]

assert difference(in_noise[0], in_attention[0]) <= 1 and difference(in_noise[-1], in_attention[-1]) <= 1
assert difference(in_noise[2], in_attention[2]) > 1
sheet([[("the reference", rocket)] + [(f"{lam}, in the noise", p) for lam, p in zip(lams, in_noise)],
       [("the reference", rocket)] + [(f"{lam}, in attention", p) for lam, p in zip(lams, in_attention)]])

# %% [markdown]
# ## 11. Eq. 10, and Algorithm 1
#
# $$z_{t-1} = \frac{1}{\sqrt{\alpha_t}}\left(\tilde z_t - \frac{1-\alpha_t}{\sqrt{1-\alpha_t}}\,
# \epsilon_\theta(\tilde z_t, t, c)\right) + \sigma_t\, z$$
#
# Eq. 10 is Eq. 3 again, after the mix. Read literally it would ask the network a third time; the paper's figure has
# no third pass, and neither have we. The mixed noise *is* the step's noise: [`ddim.step`].
#
# Now everything is there. Algorithm 1, written out with the parts that you have met:

# %%
def algorithm_1(model, ref, prompt, lam=0.7, m=7):
    text = model.context(["", prompt])                                              # c_p; "" for guidance
    tokens = model.image_tokens(ref.image)                                          # c_i
    ip_kv = model.ip_adapter.keys_values(tokens, model.unet.sites, model.unet.config.n_heads)   # Eq. 7
    z = ref.chain[-1:]                                                              # z_T, from Eq. 4
    for stride, reference in zip(model.schedule.steps(ref.steps), isadca.replay(model, ref)):
        rows = z.repeat(2, 1, 1, 1)                                                 # two halves of guidance
        eps_isa = model.noise(rows, stride.t, text, isadca.isa(reference.kv))       # Eqs. 5 and 6
        eps_dca = model.noise(rows, stride.t, text, isadca.dca(ip_kv))              # Eq. 8
        eps_isa, eps_dca = guide(eps_isa.split(1), m), guide(eps_dca.split(1), m)
        eps = lam * eps_isa + (1 - lam) * eps_dca                                   # Eq. 9
        z = model.schedule.step(z, eps, stride)                                     # Eq. 10
    return isadca.decode(model, z)[0]


by_hand = algorithm_1(model, ref, "a lemon")
[ours] = isadca.vary(model, ref, "a lemon")
assert difference(by_hand, ours) <= 1
row(("the reference", rocket), ("Algorithm 1, above", by_hand), ("isadca.vary", ours))

# %% [markdown]
# That is the paper. The package's own loop, [`loop.sample`], does the same for many pictures at once, and lets you
# change each part.
#
# ## 12. Many variations, one reference
#
# Start from $\bar z_T$ and nothing is left to chance: one reference, one prompt, one λ give *one* variation. For
# more, mix some noise into the start: $z_T = \sqrt{1-d}\,\bar z_T + \sqrt{d}\,\epsilon$
# ([`reference.initial_latent`]).
#
# **Predict, then run.** RIVAL sends the reference along with every picture, through both halves of guidance: $4N$
# rows of the UNet a step for $N$ pictures. How many does ISA need if the reference's keys are shared?
#
# <details><summary>Answer</summary>
#
# $2N + 1$: two for each picture, and one for the reference, whatever $N$ is. With both branches (λ between 0 and 1)
# it is $4N + 1$.
#
# </details>

# %%
rows = []


def counting(q, k, v, site):
    if site == model.unet.sites[0]._replace(hw=site.hw):    # one layer is enough to count
        rows.append(len(q))
    return isadca.attend(q, k, v, site)


N, d = 6, 0.5
alone = isadca.vary(model, ref, "a lemon", lam=1.0, diversity=d, seeds=range(N), kernel=counting)
print(f"{sum(rows) / STEPS:g} rows a step for {N} pictures; RIVAL's layout has {4 * N}")
assert sum(rows) == STEPS * (2 * N + 1)

rows.clear()
pictures = isadca.vary(model, ref, "a lemon", diversity=d, seeds=range(N), kernel=counting)
assert sum(rows) == STEPS * (4 * N + 1)
[again] = isadca.vary(model, ref, "a lemon", diversity=d, seeds=(2,))
assert difference(again, pictures[2]) <= 2                  # a seed's picture is its own
row(*[(f"seed {seed}", picture) for seed, picture in enumerate(pictures)])

# %% [markdown]
# ## 13. The table
#
# The paper's Table 1 asks two questions of a system. *Is the variation still like the reference?* By SSIM, and by
# **LPIPS** ([arXiv 1801.03924](https://arxiv.org/abs/1801.03924)), a distance between features of a network that was
# trained to recognise things: 0 for equal pictures. *Does it follow the prompt?* By the cosine between CLIP's
# vectors of picture and prompt (CLIP-T; another CLIP than the model's own).
#
# To be good at one of them is easy. Return the reference, and the first is perfect.
#
# The cell makes the table for three systems over four pairs of a reference and a prompt, in ten steps
# ([`evaluation.run.evaluate`]; the command `isadca evaluate` makes the whole one). Four pairs say little: see
# how it is done, and do not believe the digits. (RIVAL shuffles the cells of $z_T$ before it starts: it means to
# keep the look and not the place. Its SSIM is low by intention.)

# %%
PAIRS = [(references / f"{name}.png", prompt)
         for name in ("rocket", "cat") for prompt in ("a lemon", "a crown")]
METRICS = {"ssim": "SSIM ↑", "lpips-alex": "LPIPS ↓", "clip-t": "CLIP-T ↑"}


def table(*systems):
    """One row for each system, means over the pairs."""
    with tempfile.TemporaryDirectory() as folder:
        found = isadca.evaluate(PAIRS, systems, METRICS, out=folder, model=model, steps=10)
    print(f"{'':<18}", *[f"{heading:>10}" for heading in METRICS.values()])
    means = {}
    for system in dict.fromkeys(item.system for item in found.numbers):
        scores = [value for item, value in found.numbers.items() if item.system == system]
        means[system.name] = {metric: mean(score[metric] for score in scores) for metric in METRICS}
        print(f"{system.label:<18}", *[f"{value:>10.3f}" for value in means[system.name].values()])
    return means


scores = table("isadca", "rival", "ip-adapter")
assert scores["isadca"]["ssim"] > scores["ip-adapter"]["ssim"]    # a vector does not know where the dots are

# %% [markdown]
# ## 14. Your own attention, in the table
#
# A method is a function. It is told what a step has ([`loop.Controls`]: the level `t`, the reference's keys `ref_kv`,
# the image prompt's `ip_kv`, λ, ...) and returns an `attend`. Here is one: while there is much noise, look at the
# reference *alone*; then, for the finer things, at nothing but the caption.
#
# Change it. Some ideas: the reference in the coarse layers only (`isadca.where(lambda site: site.hw < (16, 16),
# ...)`); the image prompt in the first half of the steps only; a sharper softmax (multiply `q` by 1.5). Then look
# for your row.

# %%
def layout_first(controls):
    if controls.t > 500:
        return isadca.isa(controls.ref_kv, "replace")
    return isadca.attend


scores = table("isadca", layout_first)
[mine] = isadca.vary(model, ref, "a lemon", mix=layout_first)
assert difference(mine, ours) > 1
row(("the reference", rocket), ("λ = 0.7", ours), ("layout_first", mine))

# %% [markdown]
# The same function in a file works on the command line: `--method mine.py:layout_first`, in `isadca vary`, `sweep`
# and `evaluate`. Published methods, each in one short file, are in [methods/](methods/README.md).
#
# ## What this demo cannot show you
#
# - **Whether the paper is right.** Its claims are about Stable Diffusion 1.5 and photographs. What holds among emoji
#   of 64 pixels may not hold there, and the other way round. Our own figures, with their errors, are [beside the
#   checkpoint](../weights/demo/README.md).
# - **Hard captions.** The model knows 48 nouns, a few colours and patterns. Ask it for anything else and it makes
#   something up. Two objects, or actions, it has never seen.
# - **Fine detail.** Faces, hair, letters: where inversion and ISA earn their keep, and where they fail.
# - **Cost.** Here everything is quick. At 512 × 512 pixels ISA's longer keys and the second branch are felt.
#
# ## How to go on
#
# With the real weights, every cell of this tour runs unchanged, if you give the path to `isadca.load` and pictures of
# your own. A GPU helps: on a CPU a picture takes tens of minutes.
#
# ```
# isadca fetch sd15 ip-adapter --to weights     # 4.7 GB
# isadca vary photo.jpg "a photo of a cat" -o out.png --weights weights/sd15
# ```
#
# Then read the five files of the paper, in order: [attention](../isadca/attention.py), [ddim](../isadca/ddim.py),
# [methods](../isadca/methods.py), [reference](../isadca/reference.py), [loop](../isadca/loop.py). You know what is in
# them. What the paper leaves open, and what was chosen here, is in [isadca/README.md](../isadca/README.md).
