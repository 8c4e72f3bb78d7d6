import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from jkmeans.report import page
from jkmeans.report.examples import NEAREST
from jkmeans.report.maps import MAP_EXAMPLES, map_embeddings
from jkmeans.report.page import write_page
from jkmeans.report.page_data import FARTHEST, LINE_FEATURES
from tests.reports import DEGENERATE, IN_PICTURES, CountedRows, clusters_of, history, run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
)

HOSTILE = (
    '</script><script>document.documentElement.dataset.hacked="1"</script>'
    "<img src=x onerror=\"document.documentElement.dataset.hacked='1'\">"
    "</title></style>'\" &amp; ${title} \u2028\u2029 \x00 Zürich 猫"
)


def hostile_run():
    arguments = run(n=60, k=4, n_classes=3)
    records = [r | {"phase": f"{r['phase']}{HOSTILE}", HOSTILE: 1.0} for r in history()]
    records[2] |= {"loss": float("nan"), "inertia": float("inf")}
    return arguments | {
        "metrics": records,
        "title": HOSTILE,
        "class_names": [HOSTILE, f"b{HOSTILE}", "\ud800"],
        "config": {"a": {HOSTILE: HOSTILE}, "b": [HOSTILE], "nan": float("nan")},
        "results": {HOSTILE: HOSTILE, "acc": float("nan"), "inertia": np.float32("inf")},
    }


class Reader(html.parser.HTMLParser):
    """The elements of a page, their attributes, and the text inside of each kind."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag] = self.texts.get(tag, "") + data


def data_of(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(found.group(1), parse_constant=refuse)


def written(tmp_path, arguments):
    path = write_page(tmp_path / "report" / "report.html", **arguments)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def pixels_of(sprite, index):
    from base64 import b64decode

    from PIL import Image

    prefix, code = sprite["url"].split(",")
    assert prefix == "data:image/png;base64"
    sheet = np.asarray(Image.open(io.BytesIO(b64decode(code))))
    top = index // sprite["columns"] * sprite["height"]
    left = index % sprite["columns"] * sprite["width"]
    return sheet[top : top + sprite["height"], left : left + sprite["width"]]


# --- the page as a file ----------------------------------------------------------------------


def test_page_shows_results_and_config(tmp_path):
    arguments = run() | {
        "results": {"acc": 0.87654, "n_epochs": 12, "data": "digits"},
        "config": {"training": {"n_epochs": 12, "tol": 0.1234567}, "seed": 3, "path": ""},
        "title": "digits, K = 4",
    }
    found = Reader(written(tmp_path, arguments)).texts
    assert "digits, K = 4" in found["h1"]
    assert found["h1"].strip() == found["title"].strip()
    for cell in ("0.8765", "120", "12", "nmi", "training.n_epochs", "0.1234567", "''", "digits"):
        assert cell in found["dl"] + found["table"]


def test_nothing_is_fetched(tmp_path):
    text = written(tmp_path, run() | {"title": "no address"})
    # Images are data; the only other address, the name of SVG, is put together by the script.
    assert not re.search(r"https?://|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    for tag, attributes in Reader(text).elements:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    policy = next(a["content"] for _, a in Reader(text).elements if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_hostile_text_makes_no_element(tmp_path):
    def skeleton(arguments):
        reader = Reader(written(tmp_path, arguments))
        return {(tag, *sorted(attributes)) for tag, attributes in reader.elements}, reader

    hostile, reader = skeleton(hostile_run())
    assert "img" not in {tag for tag, *_ in hostile}
    assert not any(name.startswith("on") for _, *names in hostile for name in names)
    assert sum(tag == "script" for tag, _ in reader.elements) == 2
    for place in ("title", "h1", "td", "th"):
        assert 'dataset.hacked="1"</script><img src=x' in reader.texts[place]
    assert "Zürich 猫" in reader.texts["h1"]


def test_hostile_text_and_values_leave_the_json_whole(tmp_path):
    data = data_of(written(tmp_path, hostile_run()))
    assert data["classes"][0]["name"] == HOSTILE
    assert data["curves"]["phases"][0].endswith(HOSTILE)
    loss = next(p for p in data["curves"]["panels"] if p["title"] == "Loss")["lines"][0]
    assert loss["values"][:4] == [1.0, 0.5, None, 0.25]


def test_scripts_hash_is_that_of_the_page(tmp_path):
    from base64 import b64encode
    from hashlib import sha256

    text = written(tmp_path, run())
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert content is not None
        digest = b64encode(sha256(content.group(1).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text


def test_script_writes_text_nodes_only():
    script = page._asset("page.js")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


# The others are those of which test_report_pictures.py draws pictures.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in IN_PICTURES else n for n in DEGENERATE],
)
def test_degenerate_runs(tmp_path, name):
    data = data_of(written(tmp_path, DEGENERATE[name]()))
    assert len(data["map"]["x"]) == len(data["map"]["cluster"])
    assert sum(data["sizes"]["final"]) == len(DEGENERATE[name]()["labels"])


def test_infinite_examples(tmp_path):
    for shape in ((40, 40, 3), (300,)):
        arguments = run(n=40, shape=shape, dtype=np.float64)
        arguments["examples"][0], arguments["examples"][1] = np.inf, 1e300
        arguments["examples"][0, 0] = -np.inf
        arguments["embeddings"][2] = np.inf
        data_of(written(tmp_path, arguments))


def test_page_reads_only_the_examples_it_shows(tmp_path):
    arguments = run(n=MAP_EXAMPLES + 3000, k=4, p=2)

    examples = CountedRows(arguments["examples"])
    written(tmp_path, arguments | {"examples": examples})
    assert examples.read == MAP_EXAMPLES + 4 * (NEAREST + FARTHEST)


@pytest.mark.slow
def test_page_of_images_is_small(tmp_path):
    arguments = run(n=3000, k=10, p=2, shape=(96, 96, 3), dtype=np.uint8)  # noise: the worst case
    assert len(written(tmp_path, arguments)) < 10e6
    arguments = run(n=3000, k=10, p=2, shape=(28, 28), dtype=np.uint8)
    assert len(written(tmp_path, arguments)) < 5e6


def test_failed_page_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(page.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, **run(n=20, p=2))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_arrays_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="distances has 3 rows, but there are 120 labels"):
        write_page(tmp_path / "a" / "report.html", **run() | {"distances": np.zeros(3)})
    assert not (tmp_path / "a").exists()


def test_map_that_is_at_hand_is_not_made_again(tmp_path, monkeypatch):
    arguments = run(n=40)
    placed = map_embeddings(clusters_of(arguments), seed=0)
    expected = data_of(written(tmp_path, arguments))["map"]
    monkeypatch.setattr(page, "map_embeddings", None)
    assert data_of(written(tmp_path, arguments | {"embedding_map": placed}))["map"] == expected


# --- what the page shows ---------------------------------------------------------------------


def test_nearest_and_farthest_examples(tmp_path):
    arguments = run(n=40, k=2, shape=(2, 2), dtype=np.uint8)
    arguments["examples"][:] = np.arange(40).reshape(40, 1, 1)
    arguments["labels"] = np.array([0] * 32 + [1] * 8)
    arguments["distances"] = np.concatenate([np.arange(32.0)[::-1], np.arange(8.0)])
    arguments["distances"][5] = np.nan
    gallery = data_of(written(tmp_path, arguments))["gallery"]
    rows = gallery["rows"]
    large, small = gallery["entries"]
    assert [rows[i] for i in large["nearest"]] == list(range(31, 21, -1))
    # The farthest first; what has no distance is no farthest example.
    assert [rows[i] for i in large["farthest"]] == [0, 1, 2, 3, 4]
    assert [rows[i] for i in small["nearest"]] == list(range(32, 40))
    assert small["farthest"] == []
    # The sheet holds the images in that order, stretched to all greys from those it shows.
    for index, row in enumerate(rows):
        assert np.all(pixels_of(gallery["sprite"], index) == round(row * 255 / 39))


def test_map_shows_each_example_with_its_picture(tmp_path):
    arguments = run(n=30, k=3, p=2, shape=(64, 96), dtype=np.uint8)
    arguments["examples"][:] = 8 * np.arange(30).reshape(30, 1, 1)
    arguments["embeddings"][4] = np.nan
    found = data_of(written(tmp_path, arguments))["map"]
    assert found["rows"] == [i for i in range(30) if i != 4]
    assert found["cluster"] == [i % 3 for i in found["rows"]]
    assert found["class"] == [i % 3 for i in found["rows"]]
    sprite = found["sprite"]
    assert (sprite["height"], sprite["width"]) == (22, 32)
    for index, row in enumerate(found["rows"]):
        assert np.all(pixels_of(sprite, index) == round(row * 255 / 29))
    # Distances in the map are those of the embeddings, up to one scale.
    plane = np.column_stack([found["x"], found["y"]])
    embeddings = arguments["embeddings"][found["rows"]].astype(float)
    ratio = np.ptp(plane, axis=0) / np.ptp(embeddings, axis=0)
    assert ratio[0] == pytest.approx(ratio[1], rel=1e-3)
    assert plane.min() >= 0
    assert plane.max() <= 1


def test_vectors_show_their_features(tmp_path):
    arguments = run(n=40, k=2, shape=(300,))
    arguments["examples"][:] = 1.0
    different = np.arange(7, 300, 6)[:45]
    arguments["examples"][np.ix_(arguments["labels"] == 1, different)] = 5.0
    data = data_of(written(tmp_path, arguments))
    values = [[1.0] * 7 + [1.0 + 4 * (i % 2)] for i in range(40)]
    assert data["map"]["features"] == {"values": values, "n": 300}
    lines = data["gallery"]["lines"]
    assert lines["n"] == 300
    assert len(lines["features"]) == LINE_FEATURES
    assert set(different.tolist()) <= set(lines["features"])
    assert data["gallery"]["sprite"] is None


def test_curves_have_every_term_and_metric(tmp_path):
    records = history()
    for record in records[4:]:
        record["entropy_of_codes"] = 2.0
    panels = data_of(written(tmp_path, run() | {"metrics": records}))["curves"]["panels"]
    assert {p["title"]: [line["label"] for line in p["lines"]] for p in panels} == {
        "Loss": ["total", "reconstruction", "centroid"],
        "Agreement with the true classes": ["ACC", "NMI"],
        "Labels that changed": ["changed"],
        "Empty clusters": ["empty"],
        "Inertia": ["inertia"],
        "Entropy of codes": ["entropy of codes"],
    }
    assert panels[-1]["lines"][0]["values"] == [None] * 4 + [2.0] * 8


def test_sizes_over_the_epochs(tmp_path):
    arguments = run(n=120, k=4)
    assert data_of(written(tmp_path, arguments))["sizes"] == {"final": [30] * 4, "panel": None}
    records = history()
    for record in records[4:]:
        record["cluster_sizes"] = [record["epoch"], 1, 2, 117 - record["epoch"]]
    panel = data_of(written(tmp_path, arguments | {"metrics": records}))["sizes"]["panel"]
    assert panel["epochs"] == list(range(5, 13))
    assert panel["panels"][0]["lines"][0]["values"] == list(range(5, 13))


def test_confusion_matrix(tmp_path):
    arguments = run(n=6, k=2)
    arguments["truth"] = np.array([0, 0, 0, 1, 1, 1])
    arguments["labels"] = np.array([1, 1, 1, 0, 0, 1])
    text = written(tmp_path, arguments | {"class_names": ["bag", "boot"]})
    assert '<th scope="row" title="bag">bag</th><td class="s10">3</td><td class="s0"></td>' in text
    assert (
        '<th scope="row" title="boot">boot</th><td class="s3">1</td><td class="s7">2</td>' in text
    )
    assert "accuracy 83.3%" in text
    assert "confusion-title" not in written(tmp_path, arguments | {"truth": None})
    for n_classes in (30, 31):
        arguments = run(n=62, k=2, n_classes=2) | {"truth": np.arange(62) % n_classes}
        assert ("confusion-title" in written(tmp_path, arguments)) == (n_classes == 30)


# --- the page in a browser -------------------------------------------------------------------


def opened(path, tmp_path):
    """The document after its script has run, as text, without errors on the console."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-quic", "--disable-dev-shm-usage", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1000",
        "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
    assert console == []
    root = re.search(r"<html[^>]*>", done.stdout.decode())
    assert root is not None
    assert 'data-drawn="yes"' in root.group()
    assert "data-failures" not in root.group()
    return root.group(), done.stdout.decode()


def without_policy(text):
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert changed != text
    return changed


@needs_chromium
@pytest.mark.parametrize("policy", [True, False])
def test_hostile_text_does_not_run(tmp_path, policy):
    """Twice: the policy must not be what hides a hole in the escaping."""
    text = written(tmp_path, hostile_run())
    path = tmp_path / "page.html"
    path.write_text(text if policy else without_policy(text), encoding="utf-8")
    root, document = opened(path, tmp_path)
    assert "data-hacked" not in root
    assert "<img" not in re.sub(r"<script.*?</script>", "", document, flags=re.S)


@needs_chromium
def test_policy_stops_a_script_that_is_not_ours(tmp_path):
    """The flag of the test above does get set where a script runs."""
    script = "<script>document.documentElement.dataset.hacked='1'</script></head>"
    text = written(tmp_path, run(n=20, p=2))
    path = tmp_path / "page.html"
    path.write_text(without_policy(text).replace("</head>", script), encoding="utf-8")
    assert 'data-hacked="1"' in opened(path, tmp_path)[0]
    path.write_text(text.replace("</head>", script), encoding="utf-8")
    with pytest.raises(AssertionError, match="violates the following Content Security Po"):
        opened(path, tmp_path)


VISITOR = """<script>
// Frames do not follow the browser's virtual time, timers do.
window.requestAnimationFrame = (draw) => setTimeout(draw, 1);
const all = (selector) => [...document.querySelectorAll(selector)];
const press = (node, key) => node.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
async function visit() {
  while (!document.documentElement.dataset.drawn) await new Promise((r) => setTimeout(r, 20));
  const seen = {};
  const canvas = document.getElementById("map-canvas");
  const readOut = () => all("#map-read-out dt").map((dt) =>
    [dt.textContent, dt.nextElementSibling.textContent]);
  const painted = () => new Promise((r) => setTimeout(() => r(canvas.toDataURL()), 50));
  const first = await painted();
  canvas.focus();
  press(canvas, "ArrowRight");
  seen.byKey = readOut();
  seen.tile = all("#map-read-out canvas").length;
  press(canvas, "Escape");
  seen.let_go = readOut();
  seen.hovered = null;
  const box = canvas.getBoundingClientRect();
  for (let x = 0; x < box.width && !seen.hovered; x += 6) {
    for (let y = 0; y < box.height && !seen.hovered; y += 6) {
      canvas.dispatchEvent(new PointerEvent("pointermove",
        { clientX: box.left + x, clientY: box.top + y, pointerId: 1 }));
      if (readOut().length) seen.hovered = readOut();
    }
  }
  canvas.dispatchEvent(new PointerEvent("pointermove",
    { clientX: box.left + 1, clientY: box.top + 1, pointerId: 1 }));
  seen.same = (await painted()) === first;
  const legend = all("#map-legend button");
  legend[1].click();
  seen.pressed = legend.map((b) => b.getAttribute("aria-pressed"));
  seen.highlights = (await painted()) !== first;
  legend[1].click();
  press(canvas, "+");
  seen.zooms = (await painted()) !== first;
  press(canvas, "0");
  seen.resets = (await painted()) === first;
  const point = (kind, x, y, id = 1) => canvas.dispatchEvent(new PointerEvent(kind,
    { clientX: box.left + x, clientY: box.top + y, pointerId: id, bubbles: true }));
  canvas.setPointerCapture = () => {}; // these pointers are not real
  point("pointerdown", 200, 200);
  point("pointermove", 260, 230);
  point("pointerup", 260, 230);
  seen.drags = (await painted()) !== first;
  point("pointerdown", 260, 230);
  point("pointermove", 200, 200);
  point("pointerup", 200, 200);
  seen.drags_back = (await painted()) === first;
  point("pointerdown", 200, 200, 1);
  point("pointerdown", 300, 200, 2);
  point("pointermove", 400, 200, 2);
  point("pointerup", 200, 200, 1);
  point("pointerup", 400, 200, 2);
  seen.pinches = (await painted()) !== first;
  all("#map-zoom button")[2].click();
  const wheel = () => canvas.dispatchEvent(new WheelEvent("wheel",
    { deltaY: -100, clientX: box.left + 90, clientY: box.top + 90, cancelable: true }));
  canvas.blur();
  seen.scrolls = wheel() && (await painted()) === first;
  canvas.focus();
  seen.wheels = !wheel() && (await painted()) !== first;
  all("#map-zoom button")[2].click();
  all("#map-colour button")[1].click();
  seen.classes = all("#map-legend button span").map((s) => s.textContent);
  seen.curves = all("#curves svg").length;
  press(all("#curves svg")[0], "ArrowRight");
  seen.epoch = all("#curves figcaption span").map((s) => s.textContent);
  seen.loss = all("#curves .keys")[0].textContent;
  const chart = all("#curves svg")[0].getBoundingClientRect();
  all("#curves svg")[0].dispatchEvent(new PointerEvent("pointermove",
    { clientX: chart.right - 1, clientY: chart.top + 50 }));
  seen.hovered_epoch = all("#curves figcaption span")[2].textContent;
  seen.nameless = all("button, [role=img], [role=application], [tabindex]").filter((node) =>
    !(node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") ||
      node.textContent.trim())).length;
  seen.tiles = all("#gallery .row canvas").length;
  seen.framed = all("#gallery canvas.other").length;
  seen.bars = all("#sizes .bars rect").length;
  seen.scroll = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
}
visit();
</script></body>"""


@needs_chromium
def test_page_answers_its_visitor(tmp_path):
    arguments = run(n=120, k=4, p=2)
    arguments["truth"][:3] = 3
    names = ["bag", "boot", "coat", "dress"]
    text = written(tmp_path, arguments | {"class_names": names})
    path = tmp_path / "page.html"
    path.write_text(without_policy(text).replace("</body>", VISITOR), encoding="utf-8")
    document = opened(path, tmp_path)[1]
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, re.S)
    assert found is not None, "the visitor did not come to the end"
    seen = json.loads(found.group(1))
    for read in (dict(seen["byKey"]), dict(seen["hovered"])):
        row = int(read["example"])
        assert int(read["cluster"]) == arguments["labels"][row]
        assert read["class"] == names[arguments["truth"][row]]
        assert float(read["distance"]) == pytest.approx(arguments["distances"][row], rel=1e-3)
    assert (seen["tile"], seen["let_go"]) == (1, [])
    assert seen["pressed"] == ["false", "true", "false", "false"]
    moves = ["same", "highlights", "zooms", "resets", "drags", "drags_back", "pinches"]
    assert {name: seen[name] for name in [*moves, "scrolls", "wheels"] if not seen[name]} == {}
    assert seen["classes"] == names
    assert seen["curves"] == 5
    assert set(seen["epoch"]) == {"epoch 1"}
    assert seen["loss"] == "total 1reconstruction 1centroid –"
    assert seen["hovered_epoch"] == "epoch 12"
    assert seen["nameless"] == 0
    assert (seen["tiles"], seen["bars"]) == (4 * (NEAREST + FARTHEST), 4)
    assert 0 <= seen["framed"] <= 3
    assert seen["scroll"] == 0


@needs_chromium
@pytest.mark.parametrize("name", ["one example", "not finite", "one dimension, scalars"])
def test_degenerate_pages_are_drawn(tmp_path, name):
    path = tmp_path / "page.html"
    path.write_text(written(tmp_path, DEGENERATE[name]()), encoding="utf-8")
    opened(path, tmp_path)
