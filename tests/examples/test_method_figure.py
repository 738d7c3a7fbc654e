"""The method on one sheet is a whole SVG, and shows a run in which the variation starts where the inversion ends."""

from xml.etree import ElementTree

import method_figure


def test_it_is_drawn(monkeypatch):
    monkeypatch.setattr(method_figure, "STEPS", 3)
    monkeypatch.setattr(method_figure, "SHOWN", 1)
    svg = ElementTree.fromstring(method_figure.figure())
    urls = [image.get("href") for image in svg.iter("{http://www.w3.org/2000/svg}image")]
    assert len(urls) == 8 and len(set(urls)) == 7, "z at T is z̄ at T"
    assert "replay" in "".join(svg.itertext())
