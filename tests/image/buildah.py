"""Images without Docker: buildah as root in a store of its own, on a base that debootstrap makes."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
MIRROR = "http://deb.debian.org/debian"


def missing() -> str | None:
    """Return why no image can be built here, or None."""
    if os.geteuid() != 0:
        return "buildah needs root here: it runs containers in a chroot"
    tools = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    return f"not installed: {', '.join(tools)} (apt-get install {' '.join(tools)})" if tools else None


@dataclass(frozen=True, slots=True)
class Store:
    """A folder with images and containers that nobody else sees; delete the folder and they are gone."""

    folder: Path

    def run(self, *arguments: object, timeout_s: float = 1500) -> str:
        """Run buildah and return its standard output; what went wrong is in the error."""
        options = ("--root", self.folder / "root", "--runroot", self.folder / "run", "--storage-driver", "vfs")
        command = ["buildah", *map(str, (*options, *arguments))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done.stdout

    def build(self, tag: str, dockerfile: Path, context: Path, **arguments: str) -> None:
        """Build an image as `docker build` does, with the network and the local wheels of this machine."""
        values = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        wheels = [f"--volume={folder}:{folder}:ro" for folder in local_wheels()]
        options = ("--format=docker", "--isolation=chroot", "--network=host", *wheels, *values)
        self.run("build", *options, "--tag", tag, "--file", dockerfile, context)

    def start(self, tag: str) -> str:
        """Return the name of a new container of an image."""
        return self.run("from", "--pull-never", tag).strip()

    def inside(self, container: str, *command: object, volumes: Sequence[Path] = ()) -> str:
        """Run a command in a container as its user and return what it printed."""
        mounts = [f"--volume={folder}:{folder}" for folder in volumes]
        return self.run("run", "--isolation=chroot", "--network=host", *mounts, container, "--", *command)

    def remove(self) -> None:
        """Unmount and delete everything."""
        self.run("rm", "--all")
        shutil.rmtree(self.folder)


def local_wheels() -> list[str]:
    """Return the folders with wheels that pip knows on this machine: an image may use them as well."""
    return [folder for folder in os.environ.get("PIP_FIND_LINKS", "").split() if os.path.isdir(folder)]


def make_base(store: Store, tag: str, ray_version: str) -> None:
    """Build the image that stands in for Ray's: Debian's Python 3.11, Ray and the user 1000."""
    context = store.folder / "base"
    context.mkdir()
    packages = "--include=ca-certificates,python3,python3-venv"
    _run("debootstrap", "--variant=minbase", packages, "bookworm", context / "rootfs", MIRROR)
    _run("tar", "--create", "--file", context / "rootfs.tar", "--directory", context / "rootfs", ".")
    shutil.rmtree(context / "rootfs")
    shutil.copy(CERTIFICATES, context)
    links = "".join(f"find-links = {folder}\n" for folder in local_wheels())
    (context / "pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n{links}")
    store.build(tag, HERE / "Base.Dockerfile", context, RAY_VERSION=ray_version)


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
