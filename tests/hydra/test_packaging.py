"""The wheel, the sdist and the editable install, each built, installed and composed through."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ADAMW, AUTO, ENVIRONMENT, OPTIONS, ROOT

pytestmark = pytest.mark.once

COMPOSE = """
from hydra import compose, initialize_config_dir
import precision_policy, sys
with initialize_config_dir(version_base="1.3", config_dir=sys.argv[1]):
    cfg = compose("config", ["+precision_policy=on"], return_hydra_config=True)
print(cfg.model.torch_dtype, cfg.hydra.precision_policy.decision.rule, precision_policy.__file__)
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it, so that both are shown to be whole."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def composed(python: Path, folder: Path) -> str:
    (folder / "config.yaml").write_text(AUTO + ADAMW)
    run = subprocess.run(
        [str(python), "-c", COMPOSE, str(folder)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_install(form, built, tmp_path):
    """Each form is found by Hydra and decides."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    # torch and Hydra come from the environment that runs the tests, by a .pth file: installing them takes minutes. The
    # package itself is installed for real, and found before the one that is installed there.
    site = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    mine = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    what = ["-e", str(ROOT)] if form == "editable" else [str(built[form])]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*install, *what], check=True, timeout=300)
    links = [
        p for p in Path(site).iterdir() if "precision_policy" not in p.name and p.suffix != ".pth" and p.name != "hydra_plugins"
    ]
    for path in links:
        if not (mine / path.name).exists():
            (mine / path.name).symlink_to(path)
    out = composed(python, tmp_path).split()
    assert out[:2] == ["float32", "set"]
    assert out[2].startswith(str(ROOT if form == "editable" else mine))


def test_wheel_contents(built):
    """Nothing of ours lands at the top of site-packages, and what users need is in."""
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hydra_plugins", "precision_policy"}
    assert "precision_policy/py.typed" in names
    assert {f"precision_policy/conf/precision_policy/{option}.yaml" for option in OPTIONS} <= set(names)
    assert {f"precision_policy/unsupported/precision_policy/{option}.yaml" for option in OPTIONS} <= set(names)
    assert "precision_policy/conf/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"[hydra.plugins]" in zipfile.ZipFile(built["wheel"]).read(entry_points)


def test_runtime_dependencies(built):
    """Three, and the extras are optional."""
    wheel = zipfile.ZipFile(built["wheel"])
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0].split("<")[0] for line in needed) == ["hydra-core", "omegaconf", "torch"]


def test_sdist_contents(built):
    names = [name.partition("/")[2] for name in tarfile.open(built["sdist"]).getnames()]
    assert {"conf/precision_policy/on.yaml", "LICENSE", "README.md", "precision_policy/py.typed"} <= set(names)
