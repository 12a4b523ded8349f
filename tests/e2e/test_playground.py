"""The playground in a real browser, over a real server: what a user clicks, types, sees and hears.

On the demo base with its three adapters where that is installed, else on a tiny model of random weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora.server.cli import demo_base
from manylora.server.model.families import ModelSpec
from manylora.server.model.synthetic import synthetic_adapter
from tests.browser import chromium, needs_browser, wait
from tests.checkpoints import write_weights
from tests.e2e.server_process import Server, serving

pytestmark = [pytest.mark.timeout(900), needs_browser]

BASE = "base<i/id=evil>"
"""A name that would be markup, if the page made any of what the server says."""
ADMIN = "the-admin-key"
ADAPTERS = ["json", "pirate", "sql"]
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A directory with the three adapters, and a fourth that is not loaded at the start."""
    root = tmp_path_factory.mktemp("playground-adapters")
    if demo_base() is not None:
        for name in ADAPTERS:
            (root / "loaded" / name).parent.mkdir(exist_ok=True)
            (root / "loaded" / name).symlink_to(EXAMPLES / name)
        (root / "late").mkdir()
        for file in (EXAMPLES / "pirate").glob("adapter_*"):
            (root / "late" / file.name).write_bytes(file.read_bytes())
        return root
    spec = ModelSpec.from_hf_config(json.loads((checkpoints["llama"] / "config.json").read_text()))
    for seed, path in enumerate([*(root / "loaded" / name for name in ADAPTERS), root / "late"]):
        write_weights(path, spec.lora_shapes(), synthetic_adapter(spec.lora_shapes(), 8, seed=seed))
    return root


@pytest.fixture(scope="module")
def server(base_cache: Path, adapters: Path, checkpoints: dict[str, Path]) -> Iterator[Server]:
    model = () if demo_base() is not None else ("--model", str(checkpoints["llama"]))
    flags = ["--served-model-name", BASE, "--cache-dir", str(base_cache), "--device", "cpu", "--port", "0"]
    flags += ["--admin-key", ADMIN, "--adapter-dir", str(adapters / "loaded"), "--adapter-root", str(adapters)]
    flags += ["--adapter-root", str(EXAMPLES), "--kv-memory", "192MiB", "--max-context", "1024", "--state-dir", "none"]
    with serving(adapters / "server.log", *model, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    """The same server, asked by its API."""
    with httpx.Client(base_url=server.url, timeout=300, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


needs_demo = pytest.mark.skipif(
    demo_base() is None, reason="the demo base is not installed; the tiny model is done before it can be watched"
)


class Page:
    """What a user can do on it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> Page:
        self.driver.get(self.url + "/")
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.get(self.url + "/")
        wait(self.driver, lambda: len(self.lanes) == 4, "four answers, one for each model")
        return self

    def all(self, selector: str, within: Any = None) -> list[Any]:
        found: list[Any] = (within or self.driver).find_elements("css selector", selector)
        return found

    def one(self, selector: str, within: Any = None) -> Any:
        return (within or self.driver).find_element("css selector", selector)

    def text(self, selector: str, within: Any = None) -> str:
        return str(self.one(selector, within).text)

    def type(self, selector: str, text: str) -> None:
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, select: Any, value: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(select).select_by_value(value)

    @property
    def lanes(self) -> list[Any]:
        return self.all(".lane")

    def send(self, prompt: str, *, tokens: int = 24) -> None:
        """Ask, as a completion, and wait for the end of all answers."""
        self.choose(self.one("#mode"), "completion")
        self.type("#max-tokens", str(tokens))
        self.type("#prompt", prompt)
        self.one("#send").click()

    def click_stop_at_the_first_words(self) -> None:
        """From within the page: by the time that a click from here arrives, a fast server may have answered."""
        self.driver.execute_script(
            """
            const timer = setInterval(() => {
              if (!document.querySelector('.answer').textContent) return;
              clearInterval(timer);
              document.querySelector('#stop').click();
            }, 5);
            """
        )

    def watch(self) -> None:
        """Have the page keep the most that it ever shows at once: looks from here may be seconds apart."""
        self.driver.execute_script(
            """
            window.most = {growing: 0, rows: 0, distinct: 0, rate: 0};
            const keep = (name, value) => { most[name] = Math.max(most[name], value || 0); };
            const look = () => {
              const answers = [...document.querySelectorAll('.lane.running .answer')];
              keep('growing', answers.filter((one) => one.textContent).length);
              for (const name of ['rows', 'distinct', 'rate'])
                keep(name, parseFloat(document.getElementById('gauge-' + name).textContent));
            };
            new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
            """
        )

    def most(self, name: str) -> float:
        return float(self.driver.execute_script(f"return most.{name}"))

    def wait_for_answers(self) -> None:
        wait(self.driver, lambda: self.one("#send").is_enabled() and not self.all(".lane.running"), "all answers")

    def use_key(self, key: str) -> None:
        self.one("#keys summary").click()
        self.type("#admin-key", key)
        self.one("#key-form button[type=submit]").click()

    def row(self, name: str) -> dict[str, Any]:
        """The cells of an adapter's row, by their labels; its buttons under "actions". Empty if there is none."""
        for row in self.all("#adapters tbody tr"):
            if self.text("th", row) == name:
                cells = {cell.get_attribute("data-label"): cell.text for cell in self.all("td[data-label]", row)}
                return cells | {"actions": {button.text: button for button in self.all("button", row)}}
        return {}

    def problems(self) -> list[str]:
        """What the browser complained about: errors, refused sources. Not the statuses that the page itself shows."""
        log = self.driver.get_log("browser")
        return [one["message"] for one in log if "the server responded with a status" not in one["message"]]


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    page = Page(browser, server.url).open()
    yield page
    assert page.problems() == []


def greedy(api: httpx.Client, prompt: str, tokens: int, **target: Any) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **target}
    answer = api.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def steps_of_several_rows(api: httpx.Client) -> float:
    """Steps of more than two rows, so far."""
    text = api.get("/metrics").text
    counts = dict(re.findall(r'^manylora_step_rows_bucket\{le="([^"]+)"\} (\S+)$', text, re.MULTILINE))
    return float(counts["+Inf"]) - float(counts["2.0"])


def test_four_answers_stream_side_by_side(page: Page, api: httpx.Client) -> None:
    models = [BASE, *ADAPTERS]
    assert [page.text("h3", lane) for lane in page.lanes] == models
    before = steps_of_several_rows(api)
    page.watch()
    page.send("Once upon a time, a ship", tokens=48)
    page.wait_for_answers()
    assert page.most("growing") >= 2, "some answers grew while others did"
    assert steps_of_several_rows(api) > before, "out of one batch"
    for model, lane in zip(models, page.lanes, strict=True):
        shown = page.one(".answer", lane).get_property("textContent")
        assert shown == greedy(api, "Once upon a time, a ship", 48, model=model), model
        assert re.fullmatch(r"\d+\.\d tokens/s", page.text(".rate", lane))
        assert re.match(
            r"48 tokens · first after \d+\.\d\d s · (length|stop)|\d+ tokens · ", page.text(".figures", lane)
        )
    versions = {one["name"]: one["version"] for one in api.get("/v1/adapters").json()["data"]}
    for name, lane in zip(ADAPTERS, page.lanes[1:], strict=True):
        assert f"version {versions[name][:12]}" in page.text(".figures", lane)
    spoken = page.one("#announce").get_property("textContent")
    assert all(f"{model}: " in spoken for model in models), "a screen reader is told of the ends"


@needs_demo
def test_adapters_are_composed_and_scaled(page: Page, api: httpx.Client) -> None:
    from selenium.webdriver.common.keys import Keys

    while len(page.lanes) > 1:
        page.one(".remove", page.lanes[-1]).click()
    lane = page.lanes[0]
    page.choose(page.one("select", lane), "pirate")
    page.one("input[type=range]", lane).send_keys(Keys.ARROW_LEFT * 4)
    page.one(".add-part", lane).click()
    second = page.all(".part", lane)[1]
    page.choose(page.one("select", second), "sql")
    page.one("input[type=range]", second).send_keys(Keys.ARROW_LEFT * 10)
    assert page.text("h3", lane) == "0.80 pirate + 0.50 sql"
    page.send("The sea is", tokens=16)
    page.wait_for_answers()
    mixed = [{"name": "pirate", "scale": 0.8}, {"name": "sql", "scale": 0.5}]
    shown = page.one(".answer", lane).get_property("textContent")
    assert shown == greedy(api, "The sea is", 16, model=BASE, adapters=mixed)
    assert shown != greedy(api, "The sea is", 16, model="pirate"), "the sliders do something"


def test_errors_of_the_api_are_shown_as_they_are(page: Page, api: httpx.Client) -> None:
    page.send("Once", tokens=100_000)
    page.wait_for_answers()
    body = {"prompt": "Once", "max_tokens": 100_000, "temperature": 0}
    for model, lane in zip([BASE, *ADAPTERS], page.lanes, strict=True):
        error = api.post("/v1/completions", json={**body, "model": model}).json()["error"]
        assert page.text(".problem", lane) == f"{error['code']} · {error['type']} · {error['message']}"
    page.send("Once", tokens=4)
    page.wait_for_answers()
    assert not [one for one in page.all(".lane .problem") if one.is_displayed()], "gone with the next answer"


@needs_demo
def test_answers_can_be_stopped(page: Page, api: httpx.Client) -> None:
    page.click_stop_at_the_first_words()
    page.send("Count: one, two, three,", tokens=900)
    page.wait_for_answers()
    ends = [page.text(".figures", lane) for lane in page.lanes]
    assert any(end.endswith("stopped") for end in ends), ends

    def idle() -> bool:
        found = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", api.get("/metrics").text, re.MULTILINE)
        return found is not None and float(found[1]) == 0

    wait(page.driver, idle, "the server to have stopped too")


def test_managing_takes_the_admin_key_and_keeps_it_in_the_tab(page: Page, server: Server) -> None:
    refused = httpx.get(server.url + "/v1/adapters").json()["error"]
    wait(page.driver, lambda: page.text("#adapters-problem"), "why there is no table")
    assert page.text("#adapters-problem") == f"401 · {refused['type']} · {refused['message']}"
    assert not page.all("#adapters tbody tr")
    page.use_key("wrong")
    wait(page.driver, lambda: "The API key is wrong." in page.text("#adapters-problem"), "the refusal")
    page.use_key(ADMIN)
    wait(page.driver, lambda: page.row("sql"), "the table")
    assert not page.one("#adapters-problem").is_displayed()
    kept = page.driver.execute_script(
        "return [location.href, document.cookie, JSON.stringify(localStorage), document.documentElement.outerHTML,"
        " JSON.stringify(performance.getEntriesByType('resource').map((one) => one.name))]"
    )
    assert not any(ADMIN in part for part in kept)
    page.driver.refresh()
    wait(page.driver, lambda: page.row("sql"), "the table, in the same tab")
    page.one("#keys summary").click()
    page.one("#forget").click()
    wait(page.driver, lambda: page.one("#adapters-problem").is_displayed(), "the refusal again")
    assert page.driver.execute_script("return sessionStorage.length") == 0


def test_load_pin_merge_and_unload(page: Page, api: httpx.Client, adapters: Path) -> None:
    page.use_key(ADMIN)
    wait(page.driver, lambda: page.row("sql"), "the table")
    page.type("#load-name", "late")
    page.type("#load-source", "/nowhere")
    page.one("#load-send").click()
    wait(page.driver, lambda: page.one("#adapters-problem").is_displayed(), "the refusal")
    refused = api.put("/v1/adapters/late", json={"source": "/nowhere"}).json()["error"]
    assert page.text("#adapters-problem") == f"{refused['code']} · {refused['type']} · {refused['message']}"

    page.type("#load-source", str(adapters / "late"))
    page.one("#load-send").click()
    wait(page.driver, lambda: page.row("late"), "its row")
    assert not page.one("#adapters-problem").is_displayed()
    info = api.get("/v1/adapters/late").json()
    row = page.row("late")
    assert (row["State"], row["Version"]) == ("ready", info["version"][:12])
    assert (row["Tier"], row["Rank"]) == (info["tier"], ", ".join(map(str, info["ranks"])))
    offered = [one.get_attribute("value") for one in page.all("option", page.one("select", page.lanes[0]))]
    wait(page.driver, lambda: "late" in page.text("select", page.lanes[0]), f"late among {offered}")

    def do(action: str, until: Any) -> None:
        page.row("late")["actions"][action].click()
        wait(page.driver, until, f"{action} to be done")

    do("Pin", lambda: "pinned" in page.row("late")["State"])
    assert api.get("/v1/adapters/late").json()["pinned"]
    do("Unpin", lambda: "pinned" not in page.row("late")["State"])
    do("Merge", lambda: "merged (exact)" in page.row("late")["State"])
    assert api.get("/v1/adapters/late").json()["merged"] == "exact"
    do("Unmerge", lambda: "merged" not in page.row("late")["State"])
    do("Unload", lambda: "Really?" in page.row("late")["actions"])
    assert api.get("/v1/adapters/late").status_code == 200, "one click takes nothing away"
    do("Really?", lambda: not page.row("late"))
    assert api.get("/v1/adapters/late").status_code == 404


@needs_demo
def test_traffic_and_gauges_are_live(page: Page, api: httpx.Client) -> None:
    page.use_key(ADMIN)
    wait(page.driver, lambda: page.row("sql"), "the table")
    before = int(page.row("sql")["Tokens made"].replace(",", ""))
    page.watch()
    page.send("Once upon a time", tokens=400)
    page.wait_for_answers()
    assert page.most("rows") >= 2, "rows that run"
    assert page.most("distinct") > 1, "several adapters in a step"
    assert page.most("rate") > 0, "tokens a second"
    wait(page.driver, lambda: int(page.row("sql")["Tokens made"].replace(",", "")) > before, "its traffic")
    assert page.row("sql")["Tier"] == "device"
    assert re.fullmatch(r"[3-9] of 32", page.text("#gauge-slots"))
    wait(page.driver, lambda: page.text("#gauge-rows") == "0", "no rows")


def test_all_of_it_works_by_keyboard(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    def focused() -> Any:
        return page.driver.switch_to.active_element

    order = []
    for _ in range(40):
        focused().send_keys(Keys.TAB)
        one = focused()
        if one.tag_name == "body":
            break
        order.append(one.get_attribute("id") or one.get_attribute("class") or one.text or one.tag_name)
        outline = one.value_of_css_property("outline-style"), one.value_of_css_property("outline-width")
        assert outline == ("solid", "3px"), f"{order[-1]}: the focus must be seen, got {outline}"
    wanted = ["skip", "prompt", "mode", "max-tokens", "temperature", "send", "answer", "load-name", "load-send"]
    places = [order.index(name) for name in wanted]
    assert places == sorted(places), order
    page.choose(page.one("#mode"), "completion")
    page.type("#max-tokens", "4")
    page.type("#prompt", "Once")
    page.one("#prompt").send_keys(Keys.CONTROL + Keys.ENTER)
    wait(page.driver, lambda: page.one(".answer", page.lanes[0]).get_property("textContent"), "an answer")
    page.wait_for_answers()


def test_everything_has_a_name(page: Page) -> None:
    """As the browser's own accessibility tree has it: what a screen reader says."""
    page.use_key(ADMIN)
    wait(page.driver, lambda: page.row("sql"), "the table")
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {
        "button",
        "textbox",
        "combobox",
        "MenuListPopup",
        "slider",
        "spinbutton",
        "checkbox",
        "link",
        "table",
        "region",
    }
    seen, unnamed = set(), []
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node.get("ignored") or role not in roles - {"MenuListPopup"}:
            continue
        seen.add(role)
        if not node.get("name", {}).get("value"):
            unnamed.append(role)
    assert unnamed == []
    assert {"button", "textbox", "combobox", "slider", "table", "region"} <= seen


def test_names_are_text_and_never_markup(page: Page) -> None:
    assert page.text("#base") == BASE
    assert page.all("#evil") == []
    assert page.driver.execute_script("return document.querySelectorAll('i').length") == 0


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_phone(page: Page, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.use_key(ADMIN)
        wait(page.driver, lambda: page.row("sql"), "the table")
        page.send("Once", tokens=4)
        page.wait_for_answers()
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
        outside = page.driver.execute_script(
            "return [...document.querySelectorAll('button, input, select, textarea, .answer, td')]"
            ".filter((one) => one.checkVisibility())"
            ".map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])"
            f".filter(([, box]) => box.left < 0 || box.right > {width}).map(([text]) => text)"
        )
        assert outside == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_light_and_in_dark(page: Page, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG 2.1, 1.4.3) of all colours of text with what is behind them."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        colour = {
            name: page.driver.execute_script(
                "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])", f"--{name}"
            )
            for name in ("ground", "card", "ink", "quiet", "accent", "accent-ink", "bad", "bad-soft", "good", "soft")
        }
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert (luminance(colour["ground"]) > 0.5) == (scheme == "light")
    pairs = [(front, behind) for front in ("ink", "quiet", "accent") for behind in ("ground", "card")]
    pairs += [("accent-ink", "accent"), ("bad", "bad-soft"), ("good", "soft")]
    for front, behind in pairs:
        high, low = sorted((luminance(colour[front]), luminance(colour[behind])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, front, behind)


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.1)."""
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
