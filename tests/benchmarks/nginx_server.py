"""nginx with files of a folder: no S3, but what S3 clients read from it shows how fast they can be at best."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.s3_server import free_port

PACKAGE = "nginx-light"
_START_S = 10
_STOP_S = 10
_POLL_S = 0.02

_CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    sendfile_max_chunk 2m;
    keepalive_requests 1000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
    }}
}}
"""


def is_missing() -> bool:
    """Return whether nginx is not installed here."""
    return shutil.which("nginx") is None


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """Serve the folders below ``root`` as buckets and give the URL; configuration and logs go to ``folder``."""
    folder.mkdir()
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, root=root, port=port))
    process = subprocess.Popen(["nginx", "-c", str(configuration)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while not (folder / "pid").exists():  # written once it listens
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nginx did not come up:\n{(folder / 'error.log').read_text()[-1000:]}")
            time.sleep(_POLL_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(_STOP_S)
