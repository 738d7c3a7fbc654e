"""The explorable page in a real browser: it opens from disk, and its controls do what they say."""

import shutil

import pytest
import torch
from browser import DOWN, LEFT, RIGHT, UP, Browser, missing
from conftest import ROOT
from PIL import Image

import isadca
from isadca.app import explore

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"the page was not looked at in a browser: {missing()}")
PROMPT = 'a <b>lemon</b> & "an apple"</script>'


@pytest.fixture(scope="module")
def file(demo, tmp_path_factory):
    ref = isadca.invert(demo, isadca.load_image(ROOT / "examples" / "rocket.png"), 2)
    beside = [isadca.PRESETS["masactrl"]]
    keep = torch.zeros(64, 64)
    keep[:32] = 1
    data = explore.look_inside(demo, ref, PROMPT, explore.method_at(0.7), beside=beside, keep=keep)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(explore.page(data | {"code": "../isadca"}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, file):
    """Opened anew. Whatever a test does, the console hears of no error."""
    browser.errors()
    browser.open(file)
    yield browser
    assert browser.errors() == []


def source(page, name: str) -> str:
    return page.js("return document.getElementById(arguments[0]).src", name)


def heat(page, name: str) -> list:
    """A heat map's size and its cells' strengths."""
    return page.js("const c = document.querySelector(`#${arguments[0]} canvas`);"
                   "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
                   "return [c.width, c.height, [...d].filter((_, i) => i % 4 == 3)]", name)


def text(page, name: str) -> str:
    return page.js("return document.getElementById(arguments[0]).textContent", name)


def data(page, path: str):
    return page.js(f"return data.{path}")


def test_the_console_is_watched(browser, file):
    browser.open(file)
    browser.js("setTimeout(() => { noticed(); }); console.error('told')")
    assert len(browser.errors()) == 2


def test_everything_is_loaded_and_described(page):
    pictures = page.js("return [...document.images].map(i => [i.complete && i.naturalWidth, i.hasAttribute('alt')])")
    assert len(pictures) > 12 and all(width == 64 and described for width, described in pictures)
    unnamed = page.js("return [...document.querySelectorAll('input,button,svg,[tabindex]')].filter(e => "
                      "!(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)")
    assert unnamed == []


def test_the_prompt_is_text(page):
    assert text(page, "prompt") == PROMPT and PROMPT in page.js("return document.title")
    assert page.js("return document.querySelectorAll('header h1 b, #words b').length") == 0


def test_each_function_leads_to_its_file_and_other_methods_are_shown(page):
    links = page.js("return [...document.querySelectorAll('a > code')].map(c => [c.textContent, c.parentNode.href])")
    assert len(links) > 10
    for name, href in links:
        module, function = name.rsplit(".", 1)
        path, _, sought = href.partition("#:~:text=def%20")
        assert path.endswith(f"/isadca/{module.replace('.', '/')}.py") and sought == f"{function}("
        assert f"def {function}(" in (ROOT / "isadca" / f"{module.replace('.', '/')}.py").read_text()
    assert "masactrl" in text(page, "beside")


def test_step_slider(page):
    page.keys("#step", LEFT * 9)
    before = [source(page, f"x0-{branch}") for branch in ("isa", "mixed", "dca")]
    assert before == [data(page, f"x0.{branch}[0]") for branch in ("isa", "mixed", "dca")]
    page.keys("#step", RIGHT)
    assert [source(page, f"x0-{branch}") for branch in ("isa", "mixed", "dca")] == [
        data(page, f"x0.{branch}[1]") for branch in ("isa", "mixed", "dca")] != before
    assert text(page, "step-at") == "2 of 2, t = 1"


def test_lam_slider_moves_pictures_curves_and_numbers(page):
    assert source(page, "lam-noise") == data(page, "mixes.noise.pictures[7]")
    marker = "return +document.querySelector('#distance circle.noise').getAttribute('cx')"
    before = page.js(marker)
    page.keys("#lam", LEFT * 4)
    for mix in ("noise", "attention"):
        assert source(page, f"lam-{mix}") == data(page, f"mixes.{mix}.pictures[3]")
        for name, line in (("distance", "distance-at"), ("similarity", "similarity-at")):
            assert f"{mix} {data(page, f'mixes.{mix}.{name}[3]'):.3f}" in text(page, line)
    assert page.js(marker) < before
    page.keys("#lam", LEFT * 9)
    assert text(page, "lam-at") == "0.0, DCA alone" and source(page, "lam-noise") == source(page, "lam-attention")


def test_click_a_pixel(page):
    """A quarter above the middle is cell (4, 8) of 16 × 16; both maps are that query's row."""
    quarter = page.js("return document.getElementById('pick').clientWidth / 4")
    before = heat(page, "looks"), heat(page, "pick"), text(page, "looks-at")
    page.click("#pick", 3, 3 - int(quarter))
    after = heat(page, "looks"), heat(page, "pick"), text(page, "looks-at")
    assert all(a != b for a, b in zip(before, after))
    assert "row 5, column 9 of 16 × 16" in after[2]
    row = page.js("return [...data.attention[state.moment].levels[0].looks].slice(72 * 512, 73 * 512)")
    strength = [v * v // 255 for v in row]
    assert max(strength) == 255
    assert max(abs(a - b) for a, b in zip(after[0][2] + after[1][2], strength)) <= 1
    share = sum(v * v for v in row[:256]) / sum(v * v for v in row)
    assert f"{100 * share:.0f} % of the attention goes to the reference" in after[2]


def test_arrow_keys_pick_a_pixel(page):
    page.click("#pick", 3, 3)
    seen = [heat(page, "looks")]
    for key, place in [(RIGHT, "row 9, column 10"), (DOWN, "row 10, column 10"), (LEFT, "row 10, column 9"),
                       (UP, "row 9, column 9")]:
        page.keys("#pick", key)
        assert place in text(page, "looks-at")
        seen.append(heat(page, "looks"))
    assert seen[0] == seen[-1] and all(a != b for a, b in zip(seen, seen[1:]))
    page.keys("#pick", UP * 20 + LEFT * 20)
    assert "row 1, column 1 of" in text(page, "looks-at")


def test_level_and_step(page):
    page.click("#levels .pill:last-child")
    assert heat(page, "looks")[:2] == heat(page, "acts")[:2] == [4, 4]
    before = heat(page, "looks"), text(page, "bars")
    page.click("#moments .pill:first-of-type")
    assert heat(page, "looks") != before[0] and text(page, "bars") != before[1]
    assert f"t = {data(page, 'times[0]')}" in text(page, "looks-at")
    shares = [round(100 * layer["share"]) for layer in data(page, "attention[0].layers")]
    assert [int(part.split()[0]) for part in page.js(
        "return [...document.querySelectorAll('#bars li > span:last-child')].map(s => s.textContent)")] == shares


def test_words_by_pointer_and_by_keyboard(page):
    words = data(page, "words")
    assert "lemon" in words and "apple" in words
    maps = []
    for i in (words.index("lemon"), words.index("apple")):
        page.js("document.querySelectorAll('#words button')[arguments[0]].focus()", i)
        maps.append(heat(page, "acts"))
    page.click(f"#words button:nth-child({words.index('lemon') + 1})")
    assert maps[0] != maps[1] and heat(page, "acts") == maps[0]
    assert page.js("return document.querySelector('#words [aria-pressed=true]').textContent") == "lemon"


CONTRASTS = """
const channel = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = colour => colour.match(/\\d+/g).map(v => channel(v / 255))
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = light(getComputedStyle(document.querySelector("section")).backgroundColor);
const texts = [...document.querySelectorAll("section p, figcaption, code, .isa, .dca, .mix")];
return [ground, ...texts.map(e => light(getComputedStyle(e).color)).map(
  t => (Math.max(t, ground) + .05) / (Math.min(t, ground) + .05))]"""


@pytest.mark.parametrize("width, scheme", [(1100, "light"), (1100, "dark"), (360, "light")])
def test_it_fits_and_can_be_read(page, file, tmp_path, width, scheme):
    """No sideways scrolling; text stands out from its ground by WCAG's 4.5 : 1; a screenshot shows pictures."""
    page.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.open(file)
    assert page.js("return document.documentElement.scrollWidth") <= width
    ground, *contrasts = page.js(CONTRASTS)
    assert (ground < 0.5) == (scheme == "dark")
    assert len(contrasts) > 20 and min(contrasts) >= 4.5
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.height > 2 * picture.width and len(picture.getcolors(1 << 24)) > 1000


def test_a_missing_browser_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert missing() == "no chromium and no chromedriver; on Debian: apt-get install chromium chromium-driver"


def test_what_is_kept_is_lit(page):
    width, height, cells = heat(page, "keep")
    assert (width, height) == (16, 16) and max(cells[128:]) == 0 < min(cells[:128]) <= max(cells[:128]) < 128
