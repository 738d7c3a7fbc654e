"""Plug-and-Play, arXiv 2211.12572; authors' code: MichalGeyer/plug-and-play.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/plug_and_play.py:PLUG_AND_PLAY

    f ← f_ref after a residual block (theirs: before its shortcut);    A ← softmax(Q_ref K_refᵀ / √d) above it

The layout comes from the inverted reference: features of output block 4 for 80 % of the steps, maps of blocks 4 to 11
for 50 %; the look is the prompt's. Features are not replayed, so the reference goes through the UNet once more.
"""

from isadca import Method, capture

FEATURE, FIRST = "up_blocks.1.resnets.1", "up_blocks.1.attentions.1"  # output block 4; names above it are greater
FEATURES_UNTIL, MAPS_UNTIL = 0.8, 0.5                                 # shares of the steps


def read(model, controls):
    def keep(h, place):
        controls.conditions.kept[place] = h
        return h
    kernel = capture({}, controls.kernel, controls.conditions.kept)  # by the site's name: queries and keys
    model.noise(controls.ref_z[:1], controls.t, model.context([""]), kernel, keep)
    return controls.z


def maps(controls):
    def attend(q, k, v, site):
        if site.kind == "self" and site.name >= FIRST:
            q, k = (x.expand(len(q), -1, -1, -1) for x in controls.conditions.kept[site.name])
        return controls.kernel(q, k, v, site)
    return attend if controls.i < MAPS_UNTIL * controls.steps else controls.kernel


def features(controls):
    within, kept = controls.i < FEATURES_UNTIL * controls.steps, controls.conditions.kept
    return lambda h, place: kept[place].expand_as(h) if within and place == FEATURE else h


PLUG_AND_PLAY = Method("plug-and-play", mix=maps, edit=features, before_step=read, guidance=7.5, ip_scale=0,
                       source="Plug-and-Play, arXiv 2211.12572; 0.8 of the steps features, 0.5 maps")
