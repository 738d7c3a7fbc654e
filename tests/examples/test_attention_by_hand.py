"""examples/attention_by_hand.py does what it says: its NumPy kernels are ours to the last digits."""

import runpy

from conftest import ROOT


def test_by_hand_and_ours_agree(capsys):
    main = runpy.run_path(str(ROOT / "examples" / "attention_by_hand.py"))["main"]
    differences = main()
    assert len(differences) == 10 and max(differences) < 1e-12
    printed = capsys.readouterr().out
    assert printed.count("NumPy - isadca") == len(differences)
    assert printed.count("query 0") == 2  # the share of the reference, for ISA and for the blend
