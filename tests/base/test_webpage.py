"""The shell of HTML pages: data that cannot break out, and no script but the page's own."""

import base64
import hashlib
import json
import re
import sys

import pytest

from sngpt_jax.base import webpage

HOSTILE = (
    "</script><script>document.title='taken'</script><!-- <![CDATA[ ]]> {{data}} & \u2028 \ud800 😀"
    " \\ \" '"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a page of its own."""
    folder = tmp_path / "some_pages"
    folder.mkdir()
    script = "$('text').textContent = data.text;\n"
    html, css = "<p id=text></p>\n", "p { color: red }\n"
    files = {"__init__.py": "", "small.html": html, "small.css": css, "small.js": script}
    for name, content in files.items():
        (folder / name).write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "some_pages"
    sys.modules.pop("some_pages", None)


def script_of(page):
    return re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]


def test_data_are_read_back_and_hold_no_markup():
    text = webpage.to_json({"text": HOSTILE, HOSTILE: [1, None]})
    assert json.loads(text) == {"text": HOSTILE, HOSTILE: [1, None]}
    assert text.isascii() and not set("<>&") & set(text)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            webpage.to_json([value])


def test_hostile_texts_change_nothing_but_the_data(package):
    texts = (HOSTILE, "tame")
    page, tame = (webpage.render(package, "small", text, {"text": text}) for text in texts)
    assert page.count("<script") == tame.count("<script") == 2 and page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(data[1]) == {"text": HOSTILE}
    assert "&lt;/script&gt;" in re.search("<title>(.*?)</title>", page)[1]
    assert script_of(page) == script_of(tame)
    page.encode("utf-8")  # a lone surrogate, of a file's name that is no text, has been replaced


def test_the_policy_names_the_script_by_its_hash(package):
    page = webpage.render(package, "small", "title", {})
    digest = base64.b64encode(hashlib.sha256(script_of(page).encode()).digest()).decode()
    policy = re.search('Content-Security-Policy" content="(.*?)"', page)[1]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "connect-src" not in policy
    assert "connect-src 'self'" in webpage.render(package, "small", "title", {}, connect=True)
    assert not re.search(r"(src|href)=|@import|url\(", page)
