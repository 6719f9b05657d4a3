"""The heads of the report's layer table sort its rows, in a browser."""

import re
import shutil
import subprocess
from html import unescape

import pytest

from hodec.experiment.report.collect import collect
from hodec.experiment.report.render import draw_all, render_html

CLICKS = """
const rows = () => [...document.querySelectorAll("table.layers tbody tr")];
const shown = () => rows().map((row) => row.cells[0].textContent).join(" ");
const buttons = [...document.querySelectorAll("table.layers thead button")];
const button = (name) => buttons.find((one) => one.textContent === name);
const seen = [shown()];
for (let click = 0; click < 3; click++) { button("params").click(); seen.push(shown()); }
button("layer").click(); seen.push(shown());
seen.push(document.querySelectorAll("[aria-sort=ascending]").length);
document.title = seen.join("|");
"""


@pytest.mark.slow
def test_the_rows_of_the_layer_table_are_sorted_by_its_heads(finished, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs a headless Chromium")
    run = collect(finished)
    html = render_html(run, draw_all(run))

    def shown(page: str) -> str:
        """What the browser makes of a page."""
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'me'}"]
        done = subprocess.run([browser, *options, f"file://{tmp_path / 'page.html'}"], capture_output=True, timeout=120)
        return done.stdout.decode()

    head = html[html.index('class="layers"') :].partition("</thead>")[0]
    assert shown(html).count('<button type="button">') == head.count('<th scope="col"'), "under the page's policy"
    page = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"<script>{CLICKS}</script></body>")
    title = unescape(re.findall(r"<title>(.*?)</title>", shown(page))[0])
    before, upwards, downwards, again, by_name, sorted_heads = title.split("|")
    layers = list(run.plan)
    by_params = sorted(layers, key=lambda name: (run.plan[name].params_before, layers.index(name)))
    params = {name: run.plan[name].params_before for name in layers}
    assert before == again == " ".join(layers)
    assert [params[name] for name in upwards.split()] == [params[name] for name in by_params]
    assert [params[name] for name in downwards.split()] == [params[name] for name in reversed(by_params)]
    assert (by_name, sorted_heads) == (" ".join(sorted(layers)), "1")
