"""What a method's Controls have of the reference."""

from dataclasses import replace

import torch

from isadca import Method, Run, replay, sample


def test_queries_and_keys_are_those_of_the_references_own_prompt(tiny, tiny_ref):
    """One row, whichever rows of keys and values a method reads."""
    ref, given = replace(tiny_ref, prompt="a cat"), []

    def mix(controls):
        given.append(controls)
        return controls.kernel
    for rows in (1, 2):
        sample(tiny, ref, [Run("a lemon", Method(mix=mix, ref_maps=True, ref_rows=rows))])
    first = next(replay(tiny, ref, rows=2, maps=True))
    for controls, rows in ((given[0], 1), (given[6], 2)):
        for name, pair in controls.ref_qk.items():
            for ours, both in zip(pair, first.qk[name]):
                torch.testing.assert_close(ours, both[1:], rtol=0, atol=1e-12)
        for name, pair in controls.ref_kv.items():
            for ours, both in zip(pair, first.kv[name]):
                torch.testing.assert_close(ours, both[-rows:], rtol=0, atol=1e-12)
