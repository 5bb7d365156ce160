"""A real JupyterLab or Voilà, on loopback and with a token, in a real browser without a window.

tests/test_browser.py uses it. It needs the package playwright and a Chromium of the system (Debian:
apt-get install chromium); no browser is downloaded. CHROMIUM names another one.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def find_chromium():
    "Its path, or None."
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


CHROMIUM = find_chromium()
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# of Lab: no news (it would ask the network), and every cell in the page, seen or not
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url, token=None):
    "Status of a GET request, and its body."
    request = urllib.request.Request(
        url, headers={"Authorization": f"token {token}"} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as f:
            return f.status, f.read()
    except urllib.error.HTTPError as e:
        return e.code, b""


@contextmanager
def served(command, ready, env, log, patience=60, cwd=None):
    "Start a server, wait until `ready()` is true, end it with its kernels."
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        began = time.time()
        while True:
            try:
                if ready():
                    break
            except OSError:
                pass
            if process.poll() is not None or time.time() - began > patience:
                raise RuntimeError(f"{command[2]} did not start:\n" + Path(log).read_text()[-3000:])
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def private(folder, **more):
    "An environment whose Jupyter settings, workspaces and runtime files are in this folder."
    for name, value in SETTINGS.items():
        path = Path(folder, "settings", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    at = dict(
        JUPYTERLAB_SETTINGS_DIR="settings",
        JUPYTERLAB_WORKSPACES_DIR="workspaces",
        JUPYTER_RUNTIME_DIR="runtime",
        JUPYTER_CONFIG_DIR="config",
    )
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # inline figures
    return env | {k: str(Path(folder, v)) for k, v in at.items()} | more


@contextmanager
def lab(root, **env):
    "A JupyterLab for the notebooks in `root`; yields its address and token."
    port, token = free_port(), secrets.token_hex(16)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as t:
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--LabApp.expose_app_in_browser=True",
            f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={root}",
        ]

        def ready():
            return ask(f"{url}/api/status", token)[0] == 200

        with served(command, ready, private(t, **env), f"{t}/log"):
            yield url, token


@contextmanager
def voila(arguments, root, **env):
    "A Voilà with these arguments; yields its address and the token it has made."
    port = free_port()
    with tempfile.TemporaryDirectory() as t:
        said = Path(t, "log")

        def token():
            return re.search(r"running at:\s+http://localhost:\d+/\?token=(\w+)", said.read_text())

        command = [
            sys.executable,
            "-m",
            "voila",
            "--no-browser",
            f"--port={port}",
            "--show_tracebacks=True",
            *arguments,
        ]
        with served(command, token, private(t, **env), said, cwd=root):
            yield f"http://127.0.0.1:{port}", token()[1]


@contextmanager
def browser(width=1400, height=1800):
    "A browser of this size; yields a page."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page: Any = b.new_page(viewport=dict(width=width, height=height))
        page.errors = []
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        yield page
        b.close()


def run_all(page, server, notebook, patience=300):
    "Open a notebook in Lab and run all its cells by the menu; what `cells` sees afterwards."
    url, token = server
    page.goto(f"{url}/lab/tree/{notebook}?token={token}&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)

    def state():
        "Of the notebook's kernel; None before it has one."
        sessions = json.loads(ask(f"{url}/api/sessions", token)[1])
        states = [s["kernel"]["execution_state"] for s in sessions if s["path"] == notebook]
        return states[0] if states else None

    def until(true, what, seconds):
        began = time.time()
        while not true():
            if time.time() - began > seconds:
                raise TimeoutError(f"{what} after {seconds} s: {prompts()}")
            page.wait_for_timeout(250)

    def prompts():
        "'[*]:' while a cell is queued or running, then its number."
        texts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").all_inner_texts()
        return [text.strip() for text in texts]

    def done():
        said = prompts()
        running = any("*" in prompt for prompt in said)
        begun = any(re.search(r"\d", prompt) for prompt in said)
        return state() == "idle" and begun and not running

    # else the cells would queue behind a dialogue
    until(lambda: state() == "idle", "no idle kernel", 60)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    until(done, "still running", patience)
    page.wait_for_timeout(1000)  # widgets are drawn after the kernel is idle
    until(done, "still running", patience)
    return cells(page)


def cells(page):
    """What a reader sees: a dict per code cell, with prompt, text, error and images.

    Errors are read from the notebook's model: in the page they look like any other output.
    """
    model = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON()")
    code = [c for c in model["cells"] if c["cell_type"] == "code"]
    shown = page.locator(".jp-Notebook .jp-CodeCell").all()
    return [seen(cell, c["outputs"]) for cell, c in zip(shown, code, strict=True)]


def seen(cell, outputs):
    errors = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    return dict(
        prompt=cell.locator(".jp-InputPrompt").first.inner_text().strip(),
        text="\n".join(cell.locator(".jp-OutputArea-output").all_inner_texts()).strip(),
        error=errors[0] if errors else None,
        images=cell.locator(".jp-OutputArea-output img").count(),
    )
