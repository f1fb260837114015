"""Builds both images without a container engine, by Debian's buildah, and runs limoe in them as an ordinary user.

sudo python -m tests.soak.docker_build --out docs/measured/docker.json

Needs the packages buildah and debootstrap. The base of the CPU image is a Debian 12 made by debootstrap. NVIDIA's image
is neither here nor used: docker/Dockerfile is built over a stand-in, a Debian with torch, numpy and DALI in its system
Python at other versions or names than requirements.txt has, as NVIDIA's has them. What is shown is that they are kept,
and that limoe runs with them; nothing of CUDA is.

--volume HOST:IMAGE[:ro] is for what a build needs of this machine, such as a pip.conf or a folder of wheels, and
--pip-options for pip itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limoe_dist.config.parse import write_atomically
from tests.benchmarks.machine import origin
from tests.support.shards import write_shards

MODULE = "tests.soak.docker_build"
ROOT = Path(__file__).parents[2]
UID = 12345
"""A user that neither image knows, as `docker run --user` gives."""
SHAPE = ("--model.depth", "2", "--model.width", "32", "--moe.blocks", "1", "--image.size", "16", "--image.patch", "8")
TEXT = ("--text.vocab-size", "32", "--text.length", "8")
STEPS = ("--train.steps", "3", "--optim.warmup-steps", "1", "--optim.cooldown-steps", "1", "--log.every-steps", "1")
TRAIN = (*SHAPE, *TEXT, *STEPS, "--moe.group-pairs", "4", "--train.batch-pairs", "24")
BASE_BRINGS = ("torch==2.13.0", "numpy==2.3.5", "nvidia-dali-cuda130==2.4.0")
STAND_IN = """\
FROM localhost/debian:12
ARG PIP_OPTIONS=""
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv python3-pip
RUN python3 -m pip install --break-system-packages --no-cache-dir {packages} ${{PIP_OPTIONS}}
"""
WHAT_IS_WHERE = """
import json, numpy, torch, nvidia.dali
print(json.dumps({m.__name__: [m.__version__, m.__file__] for m in (torch, numpy, nvidia.dali)}))
"""


@dataclass
class Builder:
    folder: Path
    volumes: tuple[str, ...]
    pip_options: str
    seconds: dict[str, float] = field(default_factory=dict)

    def buildah(self, *words: str, seconds: str | None = None) -> str:
        """Standard output. Ends the program where buildah fails; seconds: note those that it took by this name."""
        command = ["buildah", "--root", str(self.folder / "store"), "--runroot", str(self.folder / "run"), *words]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"BUILDAH_ISOLATION": "chroot"})
        if seconds:
            self.seconds[seconds] = round(time.monotonic() - began, 1)
        if done.returncode:
            raise SystemExit("\n".join([*done.stdout.splitlines()[-20:], *done.stderr.splitlines()[-20:]]))
        return done.stdout.strip()

    def import_debian(self) -> None:
        tree = self.folder / "debian"
        began = time.monotonic()
        subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", str(tree)], check=True, stdout=subprocess.DEVNULL
        )
        container = self.buildah("from", "scratch")
        self.buildah("copy", "--quiet", container, str(tree), "/")
        self.buildah("commit", "--quiet", container, "localhost/debian:12")
        self.buildah("rm", container)
        self.seconds["base"] = round(time.monotonic() - began, 1)

    def build(self, name: str, file: Path, base: str, context: Path = ROOT) -> None:
        volumes = [word for volume in self.volumes for word in ("--volume", volume)]
        arguments = ["--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"PIP_OPTIONS={self.pip_options}"]
        # docker's format: OCI's has no health check.
        words = ["--format", "docker", "--layers=false", *volumes, *arguments, "--file", str(file)]
        self.buildah("build", *words, "--tag", f"localhost/{name}", str(context), seconds=name)


class Image:
    """A container of an image, where commands run as a stranger."""

    def __init__(self, builder: Builder, name: str, shared: Path) -> None:
        self.builder, self.name, self.shared = builder, name, shared
        self.container = builder.buildah("from", f"localhost/{name}")

    def run(self, *words: str, seconds: str | None = None) -> str:
        options = ["--user", f"{UID}:{UID}", "--volume", f"{self.shared}:/shared"]
        name = f"{self.name}: {seconds}" if seconds else None
        return self.builder.buildah("run", *options, self.container, "--", *words, seconds=name)

    def settings(self) -> dict[str, Any]:
        return dict(json.loads(self.builder.buildah("inspect", self.container))["Docker"]["config"])


def use(image: Image) -> dict[str, Any]:
    """What limoe does in the image; ends the program where a command fails."""
    settings = image.settings()
    health = settings["Healthcheck"]["Test"]
    assert health[0] == "CMD", health
    image.run(*health[1:], seconds="health check")
    doctor = json.loads(image.run("limoe", "doctor", "--json", seconds="limoe doctor"))
    helped = image.run("limoe", "--help", seconds="limoe --help")
    assert "train a preset" in helped
    out = f"/shared/{image.name.replace(':', '-')}"
    words = ["limoe", "train", "tiny", "--data", "/shared/data/manifest.json", "--out", out, "--ranks", "2"]
    image.run(*words, *TRAIN, seconds="3 steps on 2 ranks")
    lines = (image.shared / Path(out).name / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    owners = {path.stat().st_uid for path in (image.shared / Path(out).name).rglob("*")}
    root_of = Path(image.builder.buildah("mount", image.container))
    return {
        "user": settings["User"],
        "entrypoint": settings.get("Entrypoint"),
        "health_check": health[1:],
        "can_train": doctor["can_train"],
        "missing": [one["name"] for one in doctor["findings"] if one["status"] == "missing"],
        "uid_of_the_run": sorted(owners),
        "losses": losses,
        "modules": json.loads(image.run("/opt/limoe/bin/python", "-c", WHAT_IS_WHERE)),
        "caches": [str(path.relative_to(root_of)) for path in root_of.glob("root/.cache/*")],
        "apt_lists": len(list(root_of.glob("var/lib/apt/lists/*_Packages*"))),
    }


def measure(builder: Builder) -> dict[str, Any]:
    shared = builder.folder / "shared"
    write_shards(shared / "data")
    shared.chmod(0o777)
    builder.import_debian()
    builder.build("limoe:cpu", ROOT / "docker/Dockerfile.cpu", "localhost/debian:12")
    stand_in = builder.folder / "stand-in"
    stand_in.mkdir()
    (stand_in / "Dockerfile").write_text(STAND_IN.format(packages=" ".join(BASE_BRINGS)))
    builder.build("stand-in", stand_in / "Dockerfile", "", context=stand_in)
    builder.build("limoe:over-base", ROOT / "docker/Dockerfile", "localhost/stand-in")
    images = json.loads(builder.buildah("images", "--json"))
    sizes = {name.removeprefix("localhost/"): image["size"] for image in images for name in image["names"] or ()}
    found: dict[str, Any] = {"base_brings": BASE_BRINGS, "sizes": sizes}
    for name in ("limoe:cpu", "limoe:over-base"):
        found[name] = use(Image(builder, name, shared))
    return found | {"seconds": builder.seconds}


def wrong(found: dict[str, Any]) -> list[str]:
    """What is not as the Dockerfiles promise."""
    over, cpu = found["limoe:over-base"]["modules"], found["limoe:cpu"]["modules"]
    told = [f"{name} is not the base's: {place}" for name, (_, place) in over.items() if not place.startswith("/usr/")]
    told += [f"{name} is not the image's: {place}" for name, (_, place) in cpu.items() if "/opt/limoe/" not in place]
    for name in ("limoe:cpu", "limoe:over-base"):
        image = found[name]
        if image["user"] != "1000:1000" or image["uid_of_the_run"] != [UID] or len(image["losses"]) != 3:
            told.append(f"{name}: {image}")
    if found["limoe:cpu"]["caches"] or found["limoe:cpu"]["apt_lists"]:
        told.append(f"left in limoe:cpu: {found['limoe:cpu']['caches']}, apt's lists")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--pip-options", default="")
    asked = parser.parse_args()
    if missing := [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]:
        raise SystemExit(f"{' and '.join(missing)}: not on PATH: sudo apt install buildah debootstrap")
    # The store of a user's own would want subordinate ids; /var/tmp: /tmp may be in memory, and this takes 15 GB.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        builder = Builder(Path(folder), tuple(asked.volume), asked.pip_options)
        try:
            found = measure(builder)
        finally:
            builder.buildah("rm", "--all")
            builder.buildah("rmi", "--all", "--force")
    write_atomically(asked.out, json.dumps({**origin(MODULE), **found}, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    if told := wrong(found):
        raise SystemExit("\n".join(told))


if __name__ == "__main__":
    main()
